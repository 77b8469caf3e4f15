"""A pair of embedded PostgreSQLs: the standby is a base backup in place of a new cluster, and follows."""

from __future__ import annotations

from pathlib import Path

import psycopg2

from sqla_queries_pool.demo.embedded import EmbeddedPostgres


class Primary(EmbeddedPostgres):
    """It can be made a standby."""

    def _ready(self, pid: int) -> bool:
        lines = self._pid_file()
        return lines[0] == str(pid) and len(lines) > 7 and lines[7].strip() in ("ready", "standby")

    def demote(self) -> None:
        """Restart it as a standby, which follows nobody."""
        self.stop(keep=True)
        (self.folder / "data" / "standby.signal").touch()
        self.start()


class Standby(Primary):
    """It follows another server until it is promoted."""

    def __init__(self, primary: EmbeddedPostgres, folder: Path | None = None) -> None:
        super().__init__({}, folder)
        self._primary = primary
        self.password = primary.password

    def _run(self, program: str, *arguments: str | Path) -> None:
        if program == "initdb":
            source, program = self._primary.url().replace("+psycopg2", ""), "pg_basebackup"
            arguments = ("-D", self.folder / "data", "-R", "-c", "fast", "-d", source)
        super()._run(program, *arguments)

    def promote(self) -> None:
        """Return when it is the primary."""
        connection = psycopg2.connect(self.url().replace("+psycopg2", ""))
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_promote(true, 30)")
        connection.close()
