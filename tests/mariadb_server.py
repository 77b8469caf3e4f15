"""A MariaDB server of one's own, for the tests: on loopback and a unix socket, nothing left behind.

with MariaDB({"max_connections": 10}) as server:
    engine = create_engine(server.url("pymysql"), poolclass=QueriesPool)

It takes less than a second.  Debian's package `mariadb-server-core` has all that is needed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import URL

from sqla_queries_pool.demo.embedded import _account, _free_port

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from 3.11 on

PROGRAM = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
SCRIPTS = Path("/usr/share/mysql")
SYSTEM = ("mysql_system_tables.sql", "mysql_performance_tables.sql", "mysql_system_tables_data.sql")
"""What makes the database `mysql`.  `mariadb-install-db` runs them, too, but needs MariaDB's clients."""
READY_SECONDS = 30.0
needs_server = pytest.mark.skipif(
    PROGRAM is None or not (SCRIPTS / SYSTEM[0]).is_file(),
    reason="there is no MariaDB server (Debian: apt-get install mariadb-server-core)",
)
DRIVERS = {"pymysql": "pymysql", "mysqldb": "MySQLdb", "mariadbconnector": "mariadb"}
"""SQLAlchemy's name of a driver -> its module."""


class MariaDB:
    """A server; settings as on its command line: ``{"max_connections": 10}``.

    It refuses to run as root, whose servers run as `postgres` or `nobody`.  That account owns the data alone,
    lest root write where a link in its place leads.  The server's own root gets in by the unix socket only.
    """

    host = "127.0.0.1"
    user = "tests"
    """May do anything, and has one connection more than `max_connections`."""
    database = "tests"

    def __init__(self, settings: Mapping[str, object] | None = None, folder: Path | None = None) -> None:
        self.settings = dict(settings or {})
        self.password = secrets.token_urlsafe(16)
        self.port = _free_port()
        self._below = folder or Path("/tmp")
        self._account = _account() if os.geteuid() == 0 else None
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._prepare()
            self.start()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._discard()

    @property
    def folder(self) -> Path:
        """Where the data, the log and the unix socket are."""
        assert self._folder is not None, "it was not started"
        return self._folder

    @property
    def socket(self) -> str:
        """The path of the unix socket."""
        return str(self.folder / "data" / "socket")

    def url(self, driver: str, user: str | None = None) -> str:
        """The SQLAlchemy URL, with the password, which is the same for all users."""
        url = URL.create(
            f"{'mariadb' if driver == 'mariadbconnector' else 'mysql'}+{driver}",
            user or self.user,
            self.password,
            self.host,
            self.port,
            self.database,
        )
        return url.render_as_string(hide_password=False)

    def log(self) -> str:
        """What the server said."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, return when it accepts connections; the data and the port are those of before."""
        since = len(self.log())
        self._process = self._run(f"--init-file={self.folder / 'init.sql'}")
        deadline = time.monotonic() + READY_SECONDS
        while "ready for connections" not in self.log()[since:]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MariaDB does not start:\n{self.log()[since:]}")
            time.sleep(0.005)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, with all its connections; SIGKILL is a crash."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)  # a test may have frozen it
            try:
                process.wait(READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, and start it again."""
        self.stop(number)
        self.start()

    def _prepare(self) -> None:
        self._folder = folder = Path(tempfile.mkdtemp(prefix="sqla_queries_pool-mariadb-", dir=self._below))
        (folder / "log").touch()
        (folder / "data").mkdir()
        (folder / "init.sql").touch(mode=0o600)
        (folder / "init.sql").write_text(
            f"CREATE USER IF NOT EXISTS '{self.user}'@'%' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{self.user}'@'%' WITH GRANT OPTION;\n"
            f"CREATE DATABASE IF NOT EXISTS {self.database};\n"
        )
        folder.chmod(0o755)
        if self._account is not None:
            os.chown(folder / "data", *self._account)
            os.chown(folder / "init.sql", *self._account)
        script = "".join((SCRIPTS / name).read_text() for name in SYSTEM)
        root = "SET @auth_root_socket = 'root';"  # else anybody on this machine would be root
        bootstrap = self._run("--bootstrap", stdin=subprocess.PIPE)
        bootstrap.communicate(f"CREATE DATABASE mysql;\nUSE mysql;\n{root}\n{script}".encode(), READY_SECONDS)
        if bootstrap.returncode:
            raise RuntimeError(f"MariaDB can't be prepared:\n{self.log()}")

    def _run(self, *options: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        uid, gid = self._account or (None, None)
        settings = {
            "bind_address": self.host,
            "port": self.port,
            "socket": self.socket,
            "datadir": self.folder / "data",
            "lc_messages_dir": SCRIPTS,
            "tmpdir": self.folder / "data",
            "pid_file": self.folder / "data" / "pid",
            # InnoDB writes 70 MB to begin with; the pool knows nothing of engines.
            "skip_innodb": "ON",
            "default_storage_engine": "Aria",
            "aria_log_file_size": "8M",
            "skip_name_resolve": "ON",
            "max_connect_errors": 1_000_000,
            **self.settings,
        }
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [str(PROGRAM), "--no-defaults", *(f"--{k}={v}" for k, v in settings.items()), *options],
                stdin=stdin,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=uid,
                group=gid,
                extra_groups=None if uid is None else [],
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )

    def _discard(self) -> None:
        self.stop(signal.SIGKILL)
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder)
