"""Each driver of MySQL and MariaDB on a real MariaDB: lost connections, pings, refusals, the limit."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import inside
import pytest
from fakes import Task
from hazards import driver_connection_of, eventually, new_pid, pool_of
from mariadb_server import DRIVERS, MariaDB, needs_server
from proxy import Proxy
from sqlalchemy import Engine, create_engine, exc, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from swallowed_pings import TIMES, check_ping_ends, check_ping_in_a_loop_ends

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.sockets.connect_errors import is_full, passes

pytestmark = [pytest.mark.slow, needs_server]
MAX_CONNECTIONS = 10  # the least that MariaDB takes
THREADS = 20
ROUNDS = 30
IDLE = 4
QUICK = {"pymysql": {"ssl_disabled": True}}
"""PyMySQL reads the system's certificates for each connection, which takes 50 ms."""


@pytest.fixture(scope="module")
def tls() -> Iterator[dict[str, Path]]:
    """The server's settings for TLS; their files can be read by its account."""
    authority = pytest.importorskip("trustme").CA()
    certificate = authority.issue_cert("127.0.0.1")
    with TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        found = {setting: folder / setting for setting in ("ssl_ca", "ssl_cert", "ssl_key")}
        authority.cert_pem.write_to_path(found["ssl_ca"])
        certificate.cert_chain_pems[0].write_to_path(found["ssl_cert"])
        certificate.private_key_pem.write_to_path(found["ssl_key"])
        for path in found.values():
            path.chmod(0o644)
        yield found


@pytest.fixture(scope="module")
def server(tls: dict[str, Path]) -> Iterator[MariaDB]:
    """One for the module, with a user that has nothing beyond the limit, and one with a limit of its own."""
    with MariaDB({"max_connections": MAX_CONNECTIONS, **tls}) as server:
        with administrator(server) as query:
            for user, limit in (("plain", ""), ("three", "WITH MAX_USER_CONNECTIONS 3")):
                query(f"CREATE USER {user}@'%' IDENTIFIED BY '{server.password}' {limit}")
                query(f"GRANT ALL ON tests.* TO {user}@'%'")
            for name in DRIVERS:
                hourly = f"hourly_{name}@'%' IDENTIFIED BY '{server.password}'"
                query(f"CREATE USER {hourly} WITH MAX_CONNECTIONS_PER_HOUR 1")
                query(f"GRANT ALL ON tests.* TO hourly_{name}@'%'")
        yield server


class administrator:
    """The one connection that a full server still takes."""

    def __init__(self, server: MariaDB) -> None:
        pymysql: Any = importlib.import_module("pymysql")
        self._connection = pymysql.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            autocommit=True,
            ssl_disabled=True,
        )

    def __enter__(self) -> Callable[[str], list[Any]]:
        return self.query

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def query(self, sql: str) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())


def others(query: Callable[[str], list[Any]]) -> list[int]:
    """The sessions of all but the administrator."""
    sql = (
        "SELECT id FROM information_schema.processlist WHERE id <> connection_id() AND user <> 'system user'"
    )
    return [row[0] for row in query(sql)]


def kill_all(server: MariaDB) -> int:
    """End all sessions, return when they are gone; how many there were."""
    with administrator(server) as query:
        sessions = others(query)
        for session in sessions:
            with suppress(Exception):  # it has gone by itself
                query(f"KILL {session}")
        eventually(lambda: not others(query), "the sessions end")
    return len(sessions)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """SQLAlchemy's name of each driver that is there."""
    pytest.importorskip(DRIVERS[request.param])
    return str(request.param)


@pytest.fixture
def new(server: MariaDB, driver: str) -> Iterator[Callable[..., Engine]]:
    """Makes engines: ``new(url, max_size=3)``; when the test begins, the server has nobody else."""
    with administrator(server) as query:
        eventually(lambda: not others(query), "the last test's sessions have ended")
    engines: list[Engine] = []
    pid = new_pid()

    def make(url: str | None = None, **kw: Any) -> Engine:
        arguments = QUICK.get(driver, {}) | kw.pop("connect_args", {})
        kw = {"poolclass": QueriesPool, "connect_args": arguments} | kw
        if kw["poolclass"] is QueriesPool:
            kw.setdefault("pool_id", pid)
        engines.append(create_engine(url or server.url(driver), **kw))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


def select(engine: Engine) -> int:
    """One checkout and one statement: whose session it was."""
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT connection_id()").scalar_one())


def fill(engine: Engine, number: int = IDLE) -> None:
    """Have that many idle connections."""
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(engine.connect())


# -- a connection is lost --------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "unix", "tls"])
def test_a_killed_session_is_found_before_it_is_used(
    server: MariaDB, driver: str, new: Callable[..., Engine], tls: dict[str, Path], transport: str
) -> None:
    """Without a ping: the socket tells."""
    file = str(tls["ssl_ca"])
    options: dict[str, Any] = (
        {"ssl_ca": file, "ssl": True} if driver == "mariadbconnector" else {"ssl": {"ca": file}}
    )
    if driver == "pymysql":
        options["ssl_disabled"] = False
    ways = {"tcp": {}, "tls": options, "unix": {"host": "localhost", "unix_socket": server.socket}}
    engine = new(max_size=IDLE, ping_after=None, connect_args=ways[transport])
    with engine.connect() as connection:
        ((_, cipher),) = connection.exec_driver_sql("SHOW STATUS LIKE 'Ssl_cipher'").all()
        assert bool(cipher) == (transport == "tls")
    for _ in range(2):
        fill(engine)
        assert kill_all(server) == IDLE
        for _ in range(IDLE):
            select(engine)
    assert pool_of(engine).statistics().dead >= 2


def pools(url: str, connect_args: dict[str, Any]) -> dict[str, Engine]:
    """Our pool, beside QueuePool with pre-ping, which asks at each checkout, and without."""
    return {
        "QueriesPool": create_engine(url, poolclass=QueriesPool, connect_args=connect_args),
        "QueuePool with pre-ping": create_engine(url, pool_pre_ping=True, connect_args=connect_args),
        "QueuePool": create_engine(url, connect_args=connect_args),
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("event", ["kill", "restart"])
def test_thirty_rounds_of_losses_bring_no_error(event: str) -> None:
    """Of checkouts with a SELECT, with each driver.  Every other restart is a crash."""
    with MariaDB({"max_connections": 100}) as server, ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, module in DRIVERS.items():
            if importlib.util.find_spec(module):
                for pool, engine in pools(server.url(name), QUICK.get(name, {})).items():
                    engines[f"{name}, {pool}"] = engine
                    stack.callback(engine.dispose)
        failed: Counter[str] = Counter()
        for number in range(ROUNDS):
            for engine in engines.values():
                fill(engine)
            if event == "kill":
                assert kill_all(server) == IDLE * len(engines)
            else:
                server.restart(signal.SIGKILL if number % 2 else signal.SIGTERM)
            for name, engine in engines.items():
                for _ in range(IDLE):
                    try:
                        select(engine)
                    except exc.DBAPIError:
                        failed[name] += 1
    for name in engines:
        print(f"{name}, {event} x {ROUNDS}: {failed[name]} errors in {ROUNDS * IDLE} checkouts")
        assert not (failed[name] and "QueriesPool" in name)


def test_a_ping_into_a_network_that_swallows_everything_ends(
    server: MariaDB, driver: str, new: Callable[..., Engine]
) -> None:
    """After ping_timeout, with whatever driver; then the pool connects again."""
    with Proxy(server.host, server.port) as proxy:
        engine = new(proxy.url(server.url(driver)), **TIMES)
        check_ping_ends(proxy, engine, lambda: select(engine))


def test_a_connection_that_waits_for_an_answer_can_be_closed_by_another_thread(
    server: MariaDB, driver: str, new: Callable[..., Engine]
) -> None:
    """mysqlclient tells nobody its descriptor then, so it was asked before."""
    engine = new()
    with engine.connect() as connection:
        handle = connection.connection
        task = Task(lambda: driver_connection_of(handle).cursor().execute("SELECT SLEEP(60)"))
        with administrator(server) as query:
            sleeping = "SELECT count(*) FROM information_schema.processlist WHERE info = 'SELECT SLEEP(60)'"
            eventually(lambda: query(sleeping) == [(1,)], "it executes")
            PoolManager.shutdown()
            with pytest.raises(importlib.import_module(DRIVERS[driver]).Error):
                task.result()
        connection.invalidate()
    kill_all(server)  # by itself it looks every 5 s whether its client is there


# -- what the server says --------------------------------------------------------------------------


def test_what_passes_is_told_by_the_number(server: MariaDB, driver: str, new: Callable[..., Engine]) -> None:
    """Passwords and names are wrong for good; full, down or cut off is not."""
    there = make_url(server.url(driver, "plain"))

    def connect(**changed: Any) -> None:
        connection = new(there.set(**changed), poolclass=NullPool).raw_connection()
        stack.enter_context(closing(connection))

    def error(**changed: Any) -> Exception:
        with pytest.raises(importlib.import_module(DRIVERS[driver]).Error) as caught:
            connect(**changed)
        assert isinstance(caught.value, Exception)
        return caught.value

    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        for wrong in ("password", "database", "username"):
            assert not passes(error(**{wrong: "wrong"}))
        assert not passes(error(host="nowhere.invalid"))
        # One connection in this hour.  It is the same number as of the user's limit; nothing to wait for.
        connect(username=f"hourly_{driver}")
        assert not passes(error(username=f"hourly_{driver}"))

        hang_up = Task(lambda: listener.accept()[0].close())
        cut_off = error(port=listener.getsockname()[1])
        hang_up.result()
        for down in (error(port=1), cut_off):
            assert passes(down)
            assert not is_full(down)

        for _ in range(3):
            connect(username="three")
        assert is_full(error(username="three"))
        for _ in range(MAX_CONNECTIONS - 4):
            connect()
        assert is_full(error())


def test_nobody_fails_on_a_full_server(server: MariaDB, driver: str, new: Callable[..., Engine]) -> None:
    """Twenty threads, whose pool would open twenty, where others have all but four: they wait."""
    url = server.url(driver, "plain")
    other, engine = new(url, poolclass=NullPool), new(url, max_size=THREADS)
    begin = threading.Barrier(THREADS)

    def use() -> None:
        begin.wait()
        for seconds in [0.1] + [0.005] * 9:  # at first for so long that those that wait try to open more
            with engine.connect() as connection:
                connection.exec_driver_sql(f"SELECT SLEEP({seconds})")

    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS - 4):
            stack.enter_context(other.connect())
        for task in [Task(use) for _ in range(THREADS)]:
            task.result()
    assert pool_of(engine).statistics().connect_errors > 0, "it was full"


def test_a_server_that_is_away_for_a_moment_is_waited_for(
    server: MariaDB, driver: str, new: Callable[..., Engine]
) -> None:
    """It was there less than half a minute ago."""
    with Proxy(server.host, server.port) as proxy:
        engine = new(proxy.url(server.url(driver)))
        select(engine)
        proxy.refuse()
        proxy.close()
        tasks = [Task(lambda: select(engine)) for _ in range(3)]
        eventually(lambda: pool_of(engine).statistics().connect_errors > 1, "it tries again")
        proxy.pass_on()
        for task in tasks:
            task.result()


def test_one_that_was_never_there_is_an_error_at_once(
    driver: str, new: Callable[..., Engine], server: MariaDB
) -> None:
    """As with PostgreSQL: the application is to learn it when it starts."""
    with pytest.raises(exc.DBAPIError):
        new(make_url(server.url(driver)).set(port=1), pool_timeout=None).connect()


def test_the_error_at_the_end_has_the_drivers_number(
    server: MariaDB, driver: str, new: Callable[..., Engine]
) -> None:
    """Also for a checkout that was never let try: there was a pause."""
    with Proxy(server.host, server.port) as proxy:
        engine = new(proxy.url(server.url(driver)))
        with engine.connect():
            proxy.refuse()
            patient = Task(lambda: select(engine))
            eventually(lambda: pool_of(engine).statistics().connect_errors > 0, "the refusal")
            for _ in range(5):  # some of them in a pause
                with pytest.raises(exc.DBAPIError) as caught:
                    new(proxy.url(server.url(driver)), pool_timeout=0).connect()
            if driver != "mariadbconnector":  # which keeps its number beside the arguments
                assert caught.value.orig is not None
                assert caught.value.orig.args[0] in (2002, 2003)
            proxy.pass_on()
            patient.result()


# -- the limit is hard -----------------------------------------------------------------------------


@pytest.mark.parametrize(("user", "size"), [("three", 3), ("plain", MAX_CONNECTIONS)])
def test_the_server_never_counts_more_than_the_limit(
    server: MariaDB,
    driver: str,
    new: Callable[..., Engine],
    user: str,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user or a server with room for exactly ``max_size`` refuses none, although all are closed after use:
    an open waits until the server has hung up on what was closed before."""
    patient = inside.patient_pool_class(monkeypatch)
    engine = new(server.url(driver, user), max_size=size, poolclass=patient)
    fill(engine, 1)

    def use() -> None:
        for _ in range(10):
            with engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1")
                connection.invalidate()

    for task in [Task(use) for _ in range(size + 3)]:
        task.result()
    statistics = pool_of(engine).statistics()
    assert statistics.connects > 10 * size
    assert statistics.connect_errors == 0


# -- asyncio ---------------------------------------------------------------------------------------


@pytest.fixture(params=["aiomysql", "asyncmy"])
def url(request: pytest.FixtureRequest, server: MariaDB) -> str:
    """With each driver for asyncio that is there; the user has room for three connections."""
    pytest.importorskip(request.param)
    kill_all(server)
    return server.url(request.param, "three")


async def fill_there(engine: AsyncEngine) -> None:
    """Have three idle connections."""
    async with engine.connect(), engine.connect(), engine.connect():
        pass


def test_a_killed_session_is_found_in_a_loop(server: MariaDB, url: str) -> None:
    """Without a ping: the socket tells."""

    async def main() -> None:
        engine = create_async_engine(url, poolclass=QueriesPool, ping_after=None)
        for _ in range(2):
            await fill_there(engine)
            assert await asyncio.to_thread(kill_all, server) == 3
            for _ in range(3):
                async with engine.connect() as connection:
                    await connection.exec_driver_sql("SELECT 1")
        await engine.dispose()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_ping_in_a_loop_ends(server: MariaDB, url: str) -> None:
    """After ping_timeout; then the pool connects again."""
    check_ping_in_a_loop_ends(server.host, server.port, url)


def test_in_a_loop_the_limit_is_hard_and_the_server_hears_a_goodbye(
    server: MariaDB, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the server's refusal is told by its number."""

    async def use(engine: AsyncEngine) -> None:
        for _ in range(5):
            async with engine.connect() as connection:
                await connection.invalidate()

    async def main() -> None:
        patient = inside.patient_pool_class(monkeypatch)
        engine = create_async_engine(url, poolclass=patient, max_size=3)
        async with engine.connect():
            pass
        await asyncio.gather(*[use(engine) for _ in range(6)])
        assert pool_of(engine.sync_engine).statistics().connects > 10
        assert pool_of(engine.sync_engine).statistics().connect_errors == 0
        async with engine.connect(), engine.connect(), engine.connect():
            with pytest.raises(exc.OperationalError) as caught:
                await create_async_engine(url, poolclass=NullPool).connect().start()
            assert caught.value.orig is not None
            assert is_full(caught.value.orig)
        await engine.dispose()

    with administrator(server) as query:
        before = query("SHOW STATUS LIKE 'Aborted_clients'")
        asyncio.run(asyncio.wait_for(main(), 60))
        eventually(lambda: not others(query), "they end")
        assert query("SHOW STATUS LIKE 'Aborted_clients'") == before


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a loop's own, after a bare close
@pytest.mark.parametrize("how", ["run", "bare close"])
def test_a_loop_that_ends_leaves_no_connection(server: MariaDB, url: str, how: str) -> None:
    """However it ends: with time to close them, or without."""
    engine = create_async_engine(url, poolclass=QueriesPool)
    if how == "run":
        asyncio.run(fill_there(engine))
    else:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(fill_there(engine))
        loop.close()
        del loop  # its end is noticed by the collector

    def gone() -> bool:
        gc.collect()
        return pool_of(engine.sync_engine).statistics().open == 0 and not others(query)

    with administrator(server) as query:
        eventually(gone, "they end")
