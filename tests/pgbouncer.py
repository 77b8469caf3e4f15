"""A PgBouncer of one's own in front of a server, for the tests: on loopback, nothing left behind.

with PgBouncer(server, {"pool_mode": "transaction", "default_pool_size": 4}) as bouncer:
    engine = create_engine(bouncer.url(), poolclass=QueriesPool)
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
from server_process import ServerProcess
from sqlalchemy import URL

from sqla_queries_pool.demo.embedded import EmbeddedPostgres, _free_port

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from 3.11 on

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class PgBouncer:
    """A PgBouncer in front of `server`, or of another port that leads to it; settings as in its manual.

    The files are in a folder of its own, which the account that it runs as (server_process.py) can enter.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        server: EmbeddedPostgres,
        settings: Mapping[str, object] | None = None,
        *,
        port_of_server: int | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        self.server = server
        self.port = _free_port()
        self._users = {server.user: server.password, **(users or {})}
        self._settings = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": "users.txt",
            "admin_users": server.user,
            **(settings or {}),
        }
        self._port_of_server = port_of_server or server.port
        self._folder: Path | None = None
        self._process = ServerProcess()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._discard()

    def url(self, driver: str = "psycopg2", database: str = "postgres") -> str:
        """The SQLAlchemy URL of a database behind it, with the password."""
        user, password = self.server.user, self.server.password
        url = URL.create(f"postgresql+{driver}", user, password, self.host, self.port, database)
        return url.render_as_string(hide_password=False)

    def start(self) -> None:
        """Start it, return when it listens."""
        if self._folder is None:
            self._folder = self._prepare()
        self._process.start([str(PROGRAM), "pgbouncer.ini"], self._folder, self._listens)

    def stop(self) -> None:
        """End it at once, with all its connections."""
        self._process.stop()

    @property
    def pid(self) -> int:
        """Its process id, while it runs."""
        return self._process.pid

    def restart(self) -> None:
        """End it, and start it again on the same port."""
        self.stop()
        self.start()

    def admin(self, command: str) -> list[dict[str, Any]]:
        """Give the admin console a command; the rows, if it has any."""
        with closing(
            psycopg2.connect(
                host=self.host,
                port=self.port,
                user=self.server.user,
                password=self.server.password,
                dbname="pgbouncer",
            )
        ) as connection:
            connection.autocommit = True  # it knows no transactions
            with connection.cursor() as cursor:
                cursor.execute(command)
                if cursor.description is None:
                    return []
                names = [column.name for column in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def log(self) -> str:
        """What it said."""
        return "" if self._folder is None else (self._folder / "log").read_text()

    def _prepare(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="sqla_queries_pool-pgbouncer-", dir="/tmp"))
        lines = [f"{name} = {value}\n" for name, value in self._settings.items()]
        behind = f"* = host={self.server.host} port={self._port_of_server}\n"
        (folder / "pgbouncer.ini").write_text(f"[databases]\n{behind}[pgbouncer]\n{''.join(lines)}")
        (folder / "users.txt").write_text("".join(f'"{u}" "{p}"\n' for u, p in self._users.items()))
        folder.chmod(0o755)
        return folder

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) == 0

    def _discard(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder)
