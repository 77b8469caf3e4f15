"""Which drivers' sockets are looked at, and what is done about those that can't be."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import inside
import pytest
from conftest import Observer, SessionServer, observer
from fakes import FakeClock, FakeDriver, Task
from hazards import eventually, new_pid, new_pool, pool_of
from proxy import Proxy
from sqlalchemy import URL, Engine, create_engine, exc, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from swallowed_pings import TIMES, check_ping_ends, check_ping_in_a_loop_ends

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.sockets.connect_errors import is_full, passes
from sqla_queries_pool.sockets.drivers import UNSEEN_FOR, Remembered, Unseen, is_seen, socket_of


@pytest.fixture
def engine_of(clock: FakeClock) -> Iterator[Callable[..., Engine]]:
    """Makes engines of a driver without a server."""
    made: list[Engine] = []

    def new(driver: FakeDriver, **kw: Any) -> Engine:
        pid = new_pid()
        PoolManager.create(pid, None, 5, clock)
        made.append(
            create_engine("fake://host/database", module=driver, poolclass=QueriesPool, pool_id=pid, **kw)
        )
        return made[-1]

    yield new
    for engine in made:
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_driver_that_is_known_tells_its_socket(pg_url: str, driver: str) -> None:
    """Also one whose connection is of a class of the user's own."""
    dsn = make_url(pg_url)
    engine = create_engine(dsn.set(drivername=f"postgresql+{driver}"), poolclass=QueriesPool)
    with engine.connect() as connection:
        handle: Any = connection.connection.dbapi_connection
        assert socket_of(handle) is handle

        class Stands:
            """For a driver's connection, and says so, as tracers' proxies do."""

            __class__ = type(handle)

        stands = Stands()
        assert socket_of(stands) is stands
    engine.dispose()


@pytest.fixture
def pg8000_url(pg_url: str, pg_observer: Observer) -> Iterator[URL]:
    """The database with pg8000, which takes no passwords of fewer rounds than PostgreSQL's default."""
    pytest.importorskip("pg8000")
    pg_observer.query("SET scram_iterations = 4096")
    pg_observer.query("CREATE ROLE rounds SUPERUSER LOGIN PASSWORD 'rounds'")
    yield make_url(pg_url).set(drivername="postgresql+pg8000", username="rounds", password="rounds")
    pg_observer.query("DROP ROLE rounds")


def test_pg8000_tells_its_socket_once(pg8000_url: URL) -> None:
    """Which is private; another version of it may have none, and then it is one that can't be seen."""
    engine = create_engine(pg8000_url, poolclass=QueriesPool)
    with engine.connect() as connection:
        handle: Any = connection.connection.dbapi_connection
        seen = socket_of(handle)
        assert isinstance(seen, Remembered)
        assert is_seen(seen)
        handle._usock, own = None, handle._usock
        assert isinstance(socket_of(handle), Unseen)
        handle._usock = own
        connection.invalidate()
        assert not is_seen(seen)
    engine.dispose()


def test_a_number_that_is_another_sockets_by_now_is_not_told() -> None:
    """To shut that one down would end a connection of somebody else's."""
    ours, theirs = socket.socketpair()
    with theirs:
        seen = Remembered(ours, socket.socket.fileno)
        number = seen.fileno()
        ours.close()
        assert seen.fileno() == -1
        with socket.socket() as other:
            if other.fileno() != number:
                os.dup2(other.fileno(), number)
            assert seen.fileno() == -1
            if other.fileno() != number:
                os.close(number)


def test_pg8000_finds_what_was_terminated_before_it_is_used(pg8000_url: URL, pg_observer: Observer) -> None:
    """Without a ping."""
    engine = create_engine(pg8000_url, poolclass=QueriesPool, ping_after=None)
    for _ in range(3):
        with engine.connect(), engine.connect():
            pass
        assert pg_observer.terminate(str(pg8000_url.database)) == 2
        for _ in range(2):
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_thirty_rounds_of_losses_bring_no_error_with_pg8000(
    pg_own_server: Callable[..., EmbeddedPostgres],
) -> None:
    """Of checkouts with a SELECT, beside QueuePool with pre-ping.  What ends the idle ones takes turns."""
    pytest.importorskip("pg8000")
    server = pg_own_server()

    def terminate() -> None:
        with observer(server) as looking:
            sql = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            looking.query(f"{sql} WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()")

    events = terminate, server.restart, lambda: server.restart("immediate")
    url, failed = server.url("pg8000"), Counter[str]()
    engines = {
        "QueriesPool": create_engine(url, poolclass=QueriesPool),
        "QueuePool with pre-ping": create_engine(url, pool_pre_ping=True),
    }
    for event in events * 10:
        for engine in engines.values():
            engine.connect().close()
        event()
        for name, engine in engines.items():
            try:
                with engine.connect() as connection:
                    connection.scalar(text("SELECT 1"))
            except exc.DBAPIError:
                failed[name] += 1
    for name, engine in engines.items():
        print(
            f"pg8000, {name}, terminate, restart fast, immediate x 10: {failed[name]} errors in 30 checkouts"
        )
        engine.dispose()
    assert failed["QueriesPool"] == 0


@pytest.mark.slow
def test_a_ping_of_pg8000_into_a_network_that_swallows_everything_ends(
    pg8000_url: URL, pg_server: SessionServer
) -> None:
    """After ping_timeout; then the pool connects again."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        url = pg8000_url.render_as_string(hide_password=False)
        engine = create_engine(proxy.url(url), poolclass=QueriesPool, **TIMES)
        check_ping_ends(proxy, engine, lambda: engine.connect().close())


def test_with_pg8000_an_open_waits_for_the_servers_end_of_a_close(
    pg8000_url: URL, pg_observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the server never counts more than the limit, however long its backend takes to end."""
    pg_observer.query("ALTER ROLE rounds NOSUPERUSER CONNECTION LIMIT 1")
    engine = create_engine(pg8000_url, poolclass=inside.patient_pool_class(monkeypatch), max_size=1)
    with engine.connect() as connection:
        backend = connection.scalar(text("SELECT pg_backend_pid()"))
        assert isinstance(backend, int)
        os.kill(backend, signal.SIGSTOP)
        connection.invalidate()
    try:
        task = Task(engine.connect)
        task.join(0.3)  # time enough to be refused
        assert task.is_alive()
        assert len(inside.lingering(engine.pool)) == 1
    finally:
        os.kill(backend, signal.SIGCONT)
    task.result().close()
    assert pool_of(engine).statistics().connect_errors == 0
    engine.dispose()


@pytest.mark.slow
def test_a_ping_of_asyncpg_into_a_network_that_swallows_everything_ends(
    pg_url: str, pg_server: SessionServer
) -> None:
    """After ping_timeout; then the pool connects again."""
    pytest.importorskip("asyncpg")
    url = make_url(pg_url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    check_ping_in_a_loop_ends(pg_server.host, pg_server.port, url)


def test_with_asyncpg_an_open_waits_for_the_servers_end_of_a_close(
    pg_url: str, pg_observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the server's refusal, which is told by its SQLSTATE, is waited for."""
    pytest.importorskip("asyncpg")

    async def main() -> None:
        patient = inside.patient_pool_class(monkeypatch)
        engine = create_async_engine(url, poolclass=patient, max_size=1)
        async with engine.connect() as connection:
            backend = await connection.scalar(text("SELECT pg_backend_pid()"))
            os.kill(backend, signal.SIGSTOP)
            await connection.invalidate()
        connection = engine.connect()
        try:
            task = asyncio.ensure_future(connection.start())
            done, _ = await asyncio.wait({task}, timeout=0.3)  # time enough to be refused
            assert not done
            assert len(inside.lingering(engine.pool)) == 1
        finally:
            os.kill(backend, signal.SIGCONT)
        await task
        assert pool_of(engine.sync_engine).statistics().connect_errors == 0
        full = create_async_engine(url, poolclass=NullPool)
        with pytest.raises(Exception, match="too many connections") as caught:
            await full.connect().start()
        assert is_full(
            getattr(caught.value, "orig", caught.value)
        )  # SQLAlchemy's first 2.0 leaves it as it is
        await connection.close()
        await engine.dispose()

    pg_observer.query("CREATE ROLE single LOGIN PASSWORD 'single' CONNECTION LIMIT 1")
    url = make_url(pg_url).set(drivername="postgresql+asyncpg", username="single", password="single")
    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        pg_observer.terminate(str(url.database))
        pg_observer.query("DROP ROLE single")


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_what_pg8000_says_is_told_by_the_sqlstate(pg8000_url: URL, pg_observer: Observer) -> None:
    """Or by the error of its socket."""
    dbapi: Any = pytest.importorskip("pg8000.dbapi")

    def error(**changed: Any) -> Exception:
        with pytest.raises(dbapi.Error) as caught:
            create_engine(pg8000_url.set(**changed), poolclass=NullPool).raw_connection()
        assert isinstance(caught.value, Exception)
        return caught.value

    for wrong in ({"password": "wrong"}, {"database": "nowhere"}, {"host": "nowhere.invalid"}):
        assert not passes(error(**wrong))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hang_up = Task(lambda: listener.accept()[0].close())
        for port in (listener.getsockname()[1], 1):
            assert passes(error(port=port))
        hang_up.result()
    pg_observer.query("ALTER ROLE rounds NOSUPERUSER CONNECTION LIMIT 0")
    full = error()
    assert is_full(full)
    assert passes(full)
    del full
    gc.collect()  # pg8000 leaves the socket of an attempt that failed to the collector


def test_the_sqlstate_of_pg8000_counts_and_not_the_text(pg8000_url: URL) -> None:
    """Which may be in another language."""
    with create_engine(pg8000_url, poolclass=NullPool).connect() as connection:
        for state, said in (("53300", "in another language"), ("28P01", "too many clients already")):
            raising = f"DO $$BEGIN RAISE EXCEPTION '{said}' USING ERRCODE = '{state}'; END$$"
            with pytest.raises(exc.DBAPIError) as caught:
                connection.exec_driver_sql(raising)
            connection.rollback()
            assert caught.value.orig is not None
            assert is_full(caught.value.orig) == (state == "53300")


@pytest.mark.parametrize(
    ("refuses", "full", "passing"),
    [
        (12516, True, True),
        (12519, True, True),
        (12520, True, True),
        (12528, False, True),
        (12504, False, False),
    ],
)
def test_what_oracles_listener_says_is_told_by_the_number(refuses: int, full: bool, passing: bool) -> None:
    """Its client is real, the listener here says no more than that it refuses."""
    oracledb: Any = pytest.importorskip("oracledb")

    def refuse() -> None:
        with listener.accept()[0] as connection:
            connection.recv(8192)
            said = (
                f"(DESCRIPTION=(TMP=)(VSNNUM=0)(ERR={refuses})(ERROR_STACK=(ERROR=(CODE={refuses})(EMFI=4))))"
            )
            packet = struct.pack("!BBH", 34, 0, len(said)) + said.encode()
            connection.sendall(struct.pack("!HHBBH", 8 + len(packet), 0, 4, 0, 0) + packet)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listening = Task(refuse)
        dsn = f"127.0.0.1:{listener.getsockname()[1]}/service"
        with pytest.raises(oracledb.Error) as caught:
            oracledb.connect(user="scott", password="tiger", dsn=dsn)
        listening.result()
    assert (is_full(caught.value), passes(caught.value)) == (full, passing)


def _error_of(module: str, *arguments: object) -> Exception:
    """An error as a driver that is not here would raise it."""
    return type("Error", (Exception,), {"__module__": module})(*arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "full", "passing"),
    [
        (
            _error_of("pyodbc", "42000", "[42000] [Microsoft][SQL Server]Could not connect … (17809)"),
            True,
            True,
        ),
        (_error_of("pyodbc", "42000", "[42000] [Microsoft][SQL Server]… paused. (17142)"), False, True),
        (
            _error_of("pyodbc", "08001", "[08001] [Microsoft]TCP Provider: Error code 0x274D (10061)"),
            False,
            True,
        ),
        (_error_of("pyodbc", "HYT00", "[HYT00] [Microsoft]Login timeout expired (0)"), False, True),
        (
            _error_of("pyodbc", "28000", "[28000] [Microsoft]Login failed for user 'sa'. (18456)"),
            False,
            False,
        ),
        (_error_of("pyodbc", "42000", '[42000] [Microsoft]Cannot open database "x". (4060)'), False, False),
        (_error_of("pymssql", (20009, b"Adaptive Server is unavailable")), False, True),
        (_error_of("pymssql", (18456, b"Login failed for user 'sa'.")), False, False),
    ],
)
def test_what_sql_server_says_is_told_by_the_number(error: Exception, full: bool, passing: bool) -> None:
    """As its documentation has it; it was not run."""
    assert (is_full(error), passes(error)) == (full, passing)


def test_nothing_is_asked_of_a_connection_whose_driver_is_not_known() -> None:
    """SQLAlchemy's own tests, and others', count the calls on a connection."""
    handle = MagicMock()
    pool = new_pool(creator=lambda: handle, ping_after=0)
    for _ in range(3):
        pool.connect().close()
    pool.connect().invalidate()
    pool.dispose()
    pool.audit()
    assert {name for name, *_ in handle.method_calls} == {"rollback", "close"}


def test_one_that_cannot_be_looked_at_is_pinged_after_half_a_second(
    clock: FakeClock, engine_of: Callable[..., Engine]
) -> None:
    """HikariCP's rule; nothing sees that it is dead."""
    driver = FakeDriver()
    engine = engine_of(driver)
    for seconds, pings in ((0.0, 0), (UNSEEN_FOR / 2, 0), (UNSEEN_FOR, 1)):
        engine.raw_connection().close()
        clock.now += seconds
        engine.raw_connection().close()
        assert driver.connections[0].calls["ping"] == pings


def test_ping_after_none_never_pings_it(clock: FakeClock, engine_of: Callable[..., Engine]) -> None:
    """Who says never means it."""
    driver = FakeDriver()
    engine = engine_of(driver, ping_after=None)
    engine.raw_connection().close()
    clock.now += 1e6
    engine.raw_connection().close()
    assert driver.connections[0].calls["ping"] == 0


def test_sqlite_needs_no_pings(tmp_path: Any) -> None:
    """A file is not lost while nobody looks."""
    engine = create_engine(f"sqlite:///{tmp_path}/some.db", poolclass=QueriesPool)
    engine.connect().close()
    assert inside.attachment(engine.pool).ping_after > UNSEEN_FOR
    assert isinstance(inside.slots(engine.pool)[0].socket, Unseen)
    engine.dispose()


def test_what_a_pool_below_this_one_takes_back_stays_open(pg_url: str, pg_observer: Observer) -> None:
    """psycopg documents ``creator=pool.getconn`` with ``close_returns=True``: ``close()`` closes nothing."""
    psycopg_pool = pytest.importorskip("psycopg_pool")
    url = make_url(pg_url)
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg_pool.ConnectionPool(conninfo, min_size=2, max_size=2, close_returns=True) as below:
        engine = create_engine(
            "postgresql+psycopg://", creator=below.getconn, poolclass=QueriesPool, max_size=2
        )
        for _ in range(20):
            with engine.connect() as one, engine.connect() as other:
                assert one.execute(text("SELECT 1")).scalar() == 1
                assert other.execute(text("SELECT 1")).scalar() == 1
            engine.dispose()
        assert below.get_stats().get("connections_lost", 0) == 0
        assert below.get_stats()["connections_num"] == 2
    eventually(lambda: pg_observer.backends(str(url.database)) == 0, "psycopg's pool has closed them")
