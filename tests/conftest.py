"""A PostgreSQL server for the tests, and for each test a database of its own."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import hazards
import psycopg2
import psycopg2.extensions
import pytest
from fakes import FakeClock, FakeDriver
from hazards import new_pid
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from sqla_queries_pool import PoolManager
from sqla_queries_pool.embedded import EmbeddedPostgres

MAX_CONNECTIONS = 100  # of the session's server
MEMORY = Path("/dev/shm")
ROOM = 1 << 30  # bytes; the session's server takes about a fifth of that
_numbers = itertools.count(1)


def pytest_collection_finish() -> None:
    """What is there by now stays, so the collector, which tests call by the hundred, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _thaw() -> Iterator[None]:
    """What the tests of a module froze and left is found after its end."""
    before = gc.get_freeze_count()
    yield
    if gc.get_freeze_count() > before:
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def in_memory() -> Path | None:
    """Where files are in memory, if there is room and programs may run; None for the temporary folder.

    Each test has a database made, 7 MB: on a disk that costs ten times the time in the kernel, or more.
    """
    try:
        found = os.statvfs(MEMORY)
    except OSError:
        return None
    usable = os.access(MEMORY, os.W_OK) and not found.f_flag & getattr(os, "ST_NOEXEC", 0)
    return MEMORY if usable and found.f_bavail * found.f_frsize >= ROOM else None


class SessionServer(EmbeddedPostgres):
    """A server with what pytest-postgresql reads off the fixture that it depends on."""

    options = ""
    maintenance_dbname = "postgres"
    template_dbname = None  # of the template that it makes: none but PostgreSQL's own


class Observer:
    """Looks at the server from outside: a connection in autocommit mode to the database `postgres`."""

    def __init__(self, connection: psycopg2.extensions.connection) -> None:
        self.connection = connection

    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """All rows of a statement, none for one that returns no rows."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def backends(self, datname: str, state: str | None = None) -> int:
        """How many client backends a database has, in one state (`idle`, `active` …) or in any."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s"
        if state is None:
            return int(self.query(sql, datname)[0][0])
        return int(self.query(f"{sql} AND state = %s", datname, state)[0][0])

    def terminate(self, datname: str) -> int:
        """End all client backends of a database, return when they are gone; how many there were."""
        sql = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = %s"
        return int(self.query(f"{sql} AND backend_type = 'client backend'", datname)[0][0])


@pytest.fixture(scope="session")
def pg_server() -> Iterator[SessionServer]:
    """The server that the tests share; one that stops or changes servers takes `pg_own_server`."""
    # Little of the log is kept: new segments of it would be written with zeros first, 16 MB each.
    settings = {"max_connections": str(MAX_CONNECTIONS), "max_wal_size": "64MB"}
    with SessionServer(settings, in_memory()) as server:
        yield server


# pytest-postgresql's own fixture of this name starts a server of its own, and fails as root.
postgresql_proc = factories.postgresql_noproc(depends_on="pg_server")


@pytest.fixture
def clock() -> FakeClock:
    """The time of a test's pools; it goes on when it is told to."""
    return FakeClock(1000.0)


@pytest.fixture
def driver() -> FakeDriver:
    """A driver of the test's own."""
    return FakeDriver()


@pytest.fixture
def pid(clock: FakeClock) -> str:
    """The id of a pool that has that clock, a limit of 5, and whose connections never age."""
    pid = new_pid()
    PoolManager.create(pid, None, 5, clock)
    return pid


@pytest.fixture
def pg_url(pg_server: SessionServer, postgresql_proc: NoopExecutor) -> Iterator[str]:
    """The SQLAlchemy URL (psycopg2, with the password) of an empty database that only this test has.

    Connections that the test leaves are terminated at its end.
    """
    name = f"test_{next(_numbers)}"
    with DatabaseJanitor(
        user=pg_server.user,
        host=pg_server.host,
        port=pg_server.port,
        password=pg_server.password,
        dbname=name,
        template_dbname=postgresql_proc.template_dbname,
        connection_timeout=10,
    ):
        yield pg_server.url(database=name)


@pytest.fixture
def pg_observer(pg_server: SessionServer) -> Iterator[Observer]:
    """See Observer."""
    with closing(
        psycopg2.connect(
            host=pg_server.host,
            port=pg_server.port,
            user=pg_server.user,
            password=pg_server.password,
            dbname=pg_server.database,
            application_name="observer",
        )
    ) as connection:
        connection.autocommit = True
        yield Observer(connection)


@pytest.fixture
def pg_own_server() -> Iterator[Callable[..., EmbeddedPostgres]]:
    """Start a server for this test alone (about a second): `pg_own_server(max_connections="5")`."""
    with ExitStack() as stack:

        def start(**settings: str) -> EmbeddedPostgres:
            return stack.enter_context(EmbeddedPostgres(settings, in_memory()))

        yield start


@pytest.fixture
def eventually() -> Callable[..., None]:
    """See :func:`hazards.eventually`."""
    return hazards.eventually
