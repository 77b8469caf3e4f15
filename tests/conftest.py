"""A PostgreSQL server for the tests, and for each test a database of its own."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import hazards
import inside
import psycopg2
import psycopg2.errors
import psycopg2.extensions
import pytest
from fakes import FakeClock, FakeDriver
from hazards import new_pid
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from sqla_queries_pool import PoolManager
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.engine import limits
from sqla_queries_pool.sockets import drivers

pytest_plugins = ("pytest_queries_pool",)
"""Installed, the package has pytest load it by itself."""

MAX_CONNECTIONS = 100  # of the session's server
MEMORY = Path("/dev/shm")
ROOM = 1 << 30  # bytes; the session's server takes about a fifth of that
LONGEST = ("test_soak", "test_benchmarks", "test_examples", "test_injection")
"""Files whose tests take longest, whatever their number."""
_numbers = itertools.count(1)


drivers.TELLING.update({"test_injection", "test_lingering", "test_liveness"})
"""Files with connections of their own that have a socket."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The tests are spread over processes, twice as many as there are processors: many wait for a server.

    Not where that does not pay or gets in the way: for tests chosen by name, with ``-s`` or a debugger.
    ``-n`` says how many, ``-n 0`` none.
    """
    option = config.option
    if hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None or option.tx:
        return  # a process of pytest-xdist's; no pytest-xdist; or told so
    by_name = option.keyword or all("::" in arg for arg in config.args)
    if by_name or option.capture == "no" or option.usepdb or option.trace or option.collectonly:
        return
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    option.numprocesses = 2 * processors
    if option.dist == "no":
        option.dist = "worksteal"  # each process begins with files of its own, and their servers


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Tests may send SIGINT to themselves and to programs that they start, whatever the shell has done.

    A shell's background job has it ignored, as have all programs that it starts.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The order of files is the one below: pytest-xdist's own would begin the soak, one test, last.
    config.option.loadscopereorder = False


def of_second_driver(item: pytest.Item) -> bool:
    """Is it a slow test with psycopg, which runs with psycopg2 as well?"""
    callspec = getattr(item, "callspec", None)
    if callspec is None or item.get_closest_marker("slow") is None:
        return False
    values = [value[0] if isinstance(value, tuple) and value else value for value in callspec.params.values()]
    return any(getattr(value, "__name__", value) == "psycopg" for value in values)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The exhaustive ones run where ``-m`` speaks of them; those that take longest come first.

    Else several processes would wait for one in the end.  Of slow tests with two drivers, one is exhaustive.
    """
    for item in filter(of_second_driver, items):
        item.add_marker("exhaustive")
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONGEST, -tests[item.path]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Function) -> Generator[None, object, object]:
    """Connections that a test has left to a driver's destructor complain here, and not in another test.

    Until here pytest keeps what it has of the test: its fixtures, and an error that was expected.
    """
    result = yield
    if vars(item.module).get("LEAVES_TO_DESTRUCTORS"):
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    return result


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


@contextmanager
def observer(server: EmbeddedPostgres) -> Iterator[Observer]:
    """An Observer of a server."""
    with closing(
        psycopg2.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            dbname=server.database,
            application_name="observer",
        )
    ) as connection:
        connection.autocommit = True
        yield Observer(connection)


@pytest.fixture(scope="session")
def pg_server() -> Iterator[SessionServer]:
    """The server that the tests share; one that stops or changes servers takes `pg_own_server`."""
    # Little of the log is kept: new segments of it would be written with zeros first, 16 MB each.  Autovacuum
    # writes what it knows of pg_database, which changes with each test, into any test's database.
    settings = {"max_connections": str(MAX_CONNECTIONS), "max_wal_size": "64MB", "autovacuum": "off"}
    with SessionServer(settings, in_memory()) as server:
        with observer(server) as looking:
            # Half of what a connection costs is the client's part of SCRAM: a thousand rounds less.
            looking.query("SET scram_iterations = 1")
            looking.query(f"ALTER ROLE {server.user} PASSWORD %s", server.password)
        yield server


# pytest-postgresql's own fixture of this name starts a server of its own, and fails as root.
postgresql_proc = factories.postgresql_noproc(depends_on="pg_server")


@pytest.fixture(autouse=True)
def _no_question_in_between(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is asked for its limits in the midst of no test but its own.

    For a moment the question has a connection that the test looks for.
    """
    if request.module.__name__ != "test_limits":
        monkeypatch.setattr(limits.Check, "begin", lambda _: None)


@pytest.fixture
def clock() -> FakeClock:
    """The time of a test's pools; it goes on when it is told to."""
    return FakeClock(1000.0)


@pytest.fixture
def no_other_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have left is in no overview of all pools."""
    inside.hide_pools(monkeypatch)


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


class Databases:
    """Empty databases of a server, each for one test.

    To make one and to drop it takes longer than most tests do. So one in which nothing was written is the
    next test's as well, under another name: what is left of the test before does not find it.
    """

    UNTOUCHED = """
        SELECT true FROM pg_database d JOIN pg_stat_database s ON s.datid = d.oid
        WHERE d.datname = %s AND s.tup_inserted + s.tup_updated + s.tup_deleted = 0
        AND d.datacl IS NULL AND d.datconnlimit = -1
        AND NOT EXISTS (SELECT FROM pg_db_role_setting WHERE setdatabase = d.oid)
        """
    """Nothing was written, nor was by what was rolled back. Backends tell at the latest when they end."""

    def __init__(self, server: SessionServer, observer: Observer) -> None:
        self._server = server
        self._observer = observer
        self._spare: list[str] = []

    def _janitor(self, name: str) -> DatabaseJanitor:
        return DatabaseJanitor(
            user=self._server.user,
            host=self._server.host,
            port=self._server.port,
            password=self._server.password,
            dbname=name,
            template_dbname=self._server.template_dbname,
            connection_timeout=10,
        )

    def take(self) -> str:
        """The name of a database that is empty."""
        name = f"test_{next(_numbers)}"
        if self._spare:
            self._observer.query(f"ALTER DATABASE {self._spare.pop()} RENAME TO {name}")
        else:
            self._janitor(name).init()
        return name

    def give_back(self, name: str) -> None:
        """End its connections; keep it for another test, or drop it."""
        self._observer.terminate(name)
        if self._observer.query(self.UNTOUCHED, name):
            spare = f"spare_{next(_numbers)}"
            with suppress(psycopg2.errors.ObjectInUse):  # somebody has come back meanwhile
                self._observer.query(f"ALTER DATABASE {name} RENAME TO {spare}")
                self._spare.append(spare)
                return
        self._janitor(name).drop()


@pytest.fixture(scope="session")
def pg_databases(pg_server: SessionServer, postgresql_proc: NoopExecutor) -> Iterator[Databases]:
    """See Databases."""
    with observer(pg_server) as looking:
        yield Databases(pg_server, looking)


@pytest.fixture
def pg_url(pg_server: SessionServer, pg_databases: Databases) -> Iterator[str]:
    """The SQLAlchemy URL (psycopg2, with the password) of an empty database that only this test has.

    Connections that the test leaves are terminated at its end.
    """
    name = pg_databases.take()
    yield pg_server.url(database=name)
    pg_databases.give_back(name)


@pytest.fixture
def pg_observer(pg_server: SessionServer) -> Iterator[Observer]:
    """See Observer."""
    with observer(pg_server) as looking:
        yield looking


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
