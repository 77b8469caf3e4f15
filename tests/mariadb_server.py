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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from server_process import READY_SECONDS, ServerProcess
from sqlalchemy import URL

from sqla_queries_pool.demo.embedded import _free_port

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from 3.11 on

PROGRAM = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
SCRIPTS = Path("/usr/share/mysql")
SYSTEM = ("mysql_system_tables.sql", "mysql_performance_tables.sql", "mysql_system_tables_data.sql")
"""What makes the database `mysql`.  `mariadb-install-db` runs them, too, but needs MariaDB's clients."""
needs_server = pytest.mark.skipif(
    PROGRAM is None or not (SCRIPTS / SYSTEM[0]).is_file(),
    reason="there is no MariaDB server (Debian: apt-get install mariadb-server-core)",
)
DRIVERS = {"pymysql": "pymysql", "mysqldb": "MySQLdb", "mariadbconnector": "mariadb"}
"""SQLAlchemy's name of a driver -> its module."""


class MariaDB:
    """A server; settings as on its command line: ``{"max_connections": 10}``.

    The account that it runs as (server_process.py) owns the data alone, lest root write where a link in its
    place leads.  The server's own root gets in by the unix socket only.
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
        self._folder: Path | None = None
        self._process = ServerProcess()

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
        command = self._command(f"--init-file={self.folder / 'init.sql'}")
        self._process.start(command, self.folder, lambda: "ready for connections" in self.log()[since:])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, with all its connections; SIGKILL is a crash."""
        self._process.stop(number)

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
        if self._process.account is not None:
            os.chown(folder / "data", *self._process.account)
            os.chown(folder / "init.sql", *self._process.account)
        script = "".join((SCRIPTS / name).read_text() for name in SYSTEM)
        root = "SET @auth_root_socket = 'root';"  # else anybody on this machine would be root
        bootstrap = self._process.run(self._command("--bootstrap"), folder, subprocess.PIPE)
        bootstrap.communicate(f"CREATE DATABASE mysql;\nUSE mysql;\n{root}\n{script}".encode(), READY_SECONDS)
        if bootstrap.returncode:
            raise RuntimeError(f"MariaDB can't be prepared:\n{self.log()}")

    def _command(self, *options: str) -> list[str]:
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
        return [str(PROGRAM), "--no-defaults", *(f"--{k}={v}" for k, v in settings.items()), *options]

    def _discard(self) -> None:
        self.stop(signal.SIGKILL)
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder)
