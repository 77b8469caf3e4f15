"""SQLAlchemy's contract for pools of asynchronous engines, point by point, with AsyncAdaptedQueuePool as the
yardstick.

As ``test_contract.py``, whose sections it has: a test that takes ``pool_class`` runs with both.  The server
and the drivers are real.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import json
import logging
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg  # type: ignore[import-untyped]
import inside
import psycopg
import pytest
from conftest import Observer
from hazards import Ring
from sqlalchemy import JSON, URL, Engine, cast, create_engine, event, exc, inspect, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, PoolProxiedConnection, PoolResetState
from sqlalchemy.pool import Pool as SQLAlchemyPool
from test_asyncio import one, soon
from test_contract import (
    DEBUG,
    EVENTS,
    INFO,
    SETTINGS,
    VERSION,
    Cancelled,
    Reader,
    Writer,
    logged_by,
    nothing_logged,
)

from sqla_queries_pool import QueriesPool

__all__ = ["nothing_logged"]

pytestmark = pytest.mark.slow


LEAVES_TO_DESTRUCTORS = True
"""AsyncAdaptedQueuePool does, and psycopg's complain; see conftest.py."""
ALWAYS, NEVER = (99,), (0,)
MENDED = (2, 0, 55)


class Difference(NamedTuple):
    """Why AsyncAdaptedQueuePool fails a test, and from which version of SQLAlchemy on it passes."""

    reason: str
    asyncpg: tuple[int, ...] = ALWAYS
    psycopg: tuple[int, ...] = ALWAYS
    always: bool = True
    """False: a race decides, which a busy machine can turn the other way."""


DIFFERENCES = {
    "test_a_checkin_listener_that_fails_loses_no_slot": Difference("it stays checked out for ever"),
    "test_a_close_listener_that_fails_stops_no_dispose": Difference("it stops closing"),
    "test_a_detached_connection_leaves_no_record_in_the_pool": Difference("it keeps a hollow record"),
    "test_a_detached_connection_lives_on_its_own": Difference(
        "closing it is left to the driver's destructor", asyncpg=NEVER
    ),
    "test_a_dispose_after_a_cancellation_leaves_nothing": Difference(
        "a backend is left; psycopg finishes a connect that was cancelled", MENDED, always=False
    ),
    "test_a_reset_listener_that_is_interrupted_loses_no_slot": Difference(
        "it stays checked out", MENDED, MENDED
    ),
    "test_a_timeout_of_zero_does_not_wait": Difference(
        "it does not get what is there, either", MENDED, MENDED
    ),
    "test_cancelled_at_any_await_nothing_is_lost": Difference("it swallows a cancellation", MENDED, MENDED),
    "test_cancelled_at_any_await_while_it_connects_nothing_is_lost": Difference(
        "a backend is left; psycopg finishes a connect that was cancelled", MENDED, always=False
    ),
    "test_every_event_of_a_detached_connection": Difference(
        "there is no close_detached: closing it is left to the driver's destructor", asyncpg=NEVER
    ),
    "test_listeners_of_all_events_are_heard_on_the_class": Difference("an AttributeError"),
    "test_pre_ping_sees_that_the_server_is_gone": Difference(
        "asyncpg's InternalClientError", asyncpg=(2, 0, 50), psycopg=NEVER
    ),
    "test_the_connection_that_was_returned_last_is_used_first": Difference("it is first-in first-out"),
    "test_what_is_out_over_a_dispose_is_closed_when_it_is_returned": Difference("the old pool keeps it"),
    "test_what_is_out_over_a_dispose_still_counts": Difference("the successor starts to count from 0"),
    "test_what_is_returned_above_pool_size_stays": Difference("it is closed when it is returned"),
    "test_what_nobody_refers_to_is_closed": Difference(
        "closing it is left to the driver's destructor", asyncpg=NEVER
    ),
}
"""Tests that AsyncAdaptedQueuePool fails -> why."""

OTHERWISE = {
    "test_a_detached_connection_lives_on_its_own",
    "test_every_event_of_a_detached_connection",
    "test_what_nobody_refers_to_is_closed",
    "test_what_nobody_refers_to_is_reported_and_its_slot_is_free",
}
"""Before 2.0.3, SQLAlchemy was of another opinion; QueriesPool is of today's with any version."""

DRIVERS: dict[str, type] = {"asyncpg": asyncpg.Connection, "psycopg": psycopg.AsyncConnection}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The name of a driver."""
    return str(request.param)


@pytest.fixture(
    params=[QueriesPool, pytest.param(AsyncAdaptedQueuePool, marks=pytest.mark.exhaustive)],
    ids=["QueriesPool", "AsyncAdaptedQueuePool"],
)
def pool_class(request: pytest.FixtureRequest, driver: str) -> Iterator[Any]:
    """The pool, and the yardstick; a stated difference has to be one."""
    if request.param is QueriesPool:
        yield request.param
        return
    for ignored in (ResourceWarning, pytest.PytestUnraisableExceptionWarning, exc.SAWarning):
        warnings.simplefilter("ignore", ignored)  # pytest sets them back after the test
    if request.node.originalname in OTHERWISE and VERSION < (2, 0, 3):
        pytest.skip("SQLAlchemy before 2.0.3 does something else")
    difference = DIFFERENCES.get(request.node.originalname)
    if difference is not None and getattr(difference, driver) > VERSION:
        ours = (AssertionError, AttributeError, RuntimeError, pytest.fail.Exception)
        failures = (*ours, exc.SQLAlchemyError, asyncpg.InternalClientError)
        expected = pytest.mark.xfail(reason=difference.reason, strict=difference.always, raises=failures)
        request.applymarker(expected)
    yield request.param
    gc.collect()  # what it leaves to the drivers' destructors


@pytest.fixture
def database(driver: str, pg_url: str) -> URL:
    """The URL of an empty database of PostgreSQL, with each driver."""
    return make_url(pg_url).set(drivername=f"postgresql+{driver}")


class Engines:
    """Makes engines, with 2 connections at most: ``engines(2)``."""

    def __init__(self, pool_class: Any, url: URL, patience: float) -> None:
        self._patience = patience
        self._limits = {"poolclass": pool_class, "max_overflow": 0, "pool_timeout": 0.1}
        self._url = url
        self._made: list[AsyncEngine] = []

    def __call__(self, size: int = 2, **kw: Any) -> AsyncEngine:
        limits = {"pool_size": size, **self._limits} if "pool" not in kw else {}
        self._made.append(create_async_engine(self._url, **{**limits, **kw}))
        return self._made[-1]

    async def dispose(self) -> None:
        for engine in self._made:
            await engine.dispose()

    async def soon(self, condition: Callable[[], object], what: str) -> None:
        """Wait for it while the loop goes on; not for long where it is known that it does not come about."""
        await soon(condition, what, self._patience)


@pytest.fixture
def engines(request: pytest.FixtureRequest, pool_class: Any, database: URL) -> Engines:
    """See Engines."""
    return Engines(pool_class, database, 0.5 if request.node.get_closest_marker("xfail") else 20.0)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop, in which its engines are disposed of."""

    @functools.wraps(test)
    def run(*args: Any, **kw: Any) -> None:
        async def main() -> None:
            try:
                await test(*args, **kw)
            finally:
                for made in kw.values():
                    if isinstance(made, Engines):
                        await made.dispose()

        asyncio.run(main())

    return run


class Recorder:
    """Hears all events of an engine: ``<connect> 1``, by the numbers of the drivers' connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._known: list[Any] = []
        self._news: list[str] = []
        for name in EVENTS:
            event.listen(engine.sync_engine, name, self._listener(name))

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(*args: Any) -> None:
            self._news.append(f"<{name}> {self.number(args[0])}")
            self.calls.append((name, *args))

        return listen

    def number(self, raw: Any) -> int | None:
        """The number of an adapted connection; the first is 1."""
        if raw is None:
            return None
        if raw.driver_connection not in self._known:
            self._known.append(raw.driver_connection)
        return self._known.index(raw.driver_connection) + 1

    def news(self) -> str:
        """What has happened since it was asked last."""
        news, self._news = ", ".join(self._news), []
        return news

    def arguments(self, name: str) -> tuple[Any, ...]:
        """What the listener of an event got the last time."""
        return next(call[1:] for call in reversed(self.calls) if call[0] == name)


async def in_greenlet(engine: AsyncEngine, function: Callable[[Any], Any]) -> Any:
    """Call a function with the engine's pool, where it may await as SQLAlchemy does."""
    from sqlalchemy.util.concurrency import greenlet_spawn

    return await greenlet_spawn(function, engine.pool)


async def raw_of(connection: Any) -> Any:
    """The driver's own connection."""
    return (await connection.get_raw_connection()).driver_connection


def end(driver_connection: Any) -> None:
    """Close what somebody left open."""
    if isinstance(driver_connection, asyncpg.Connection):
        driver_connection.terminate()
    else:
        driver_connection.pgconn.finish()


async def pid_of(connection: Any) -> Any:
    """The process that serves the connection."""
    return (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()


async def use(engine: AsyncEngine) -> Any:
    """Check out, ask, return; the server's process."""
    async with engine.connect() as connection:
        return await pid_of(connection)


async def fill(engine: AsyncEngine, number: int) -> list[Any]:
    """Have so many connections idle; their server's processes, in the order of their return."""
    held = [await engine.connect() for _ in range(number)]
    pids = [await pid_of(connection) for connection in held]
    for connection in held:
        await connection.close()
    return pids


def counts(engine: AsyncEngine) -> tuple[int, int]:
    """How many connections are idle, and out."""
    pool: Any = engine.pool
    return pool.checkedin(), pool.checkedout()


def age(fairy: Any, seconds: float = 3600.0) -> None:
    """Make a connection that is out look as old as that."""
    inside.record(fairy).starttime -= seconds


async def ask(driver_connection: Any) -> Any:
    """``SELECT 1``, in the words of each driver."""
    if isinstance(driver_connection, asyncpg.Connection):
        return await driver_connection.fetchval("SELECT 1")
    return (await (await driver_connection.execute("SELECT 1")).fetchone())[0]


# == 1. Events =========================================================================================


@in_a_loop
async def test_every_event_comes_in_its_place(engines: Engines) -> None:
    """A whole life: which events, in which order."""
    engine = engines(1)
    heard = Recorder(engine)
    connection = await engine.connect()
    assert heard.news() == "<first_connect> 1, <connect> 1, <checkout> 1"
    await connection.close()
    assert heard.news() == "<reset> 1, <checkin> 1"
    connection = await engine.connect()
    assert heard.news() == "<checkout> 1"
    (await connection.get_raw_connection()).invalidate(soft=True)
    assert heard.news() == "<soft_invalidate> 1"
    await connection.close()
    assert heard.news() == "<reset> 1, <checkin> 1"
    connection = await engine.connect()
    assert heard.news() == "<close> 1, <connect> 2, <checkout> 2"
    await connection.invalidate()
    assert heard.news() == "<invalidate> 2, <close> 2, <checkin> None"
    await connection.close()
    assert await use(engine)
    assert heard.news() == "<connect> 3, <checkout> 3, <reset> 3, <checkin> 3"
    await engine.dispose()
    assert heard.news() == "<close> 3"


@in_a_loop
async def test_every_event_of_a_detached_connection(engines: Engines) -> None:
    """Its record stays in the pool, so its reset and its close have none."""
    engine = engines(1)
    heard = Recorder(engine)
    connection = await engine.connect()
    fairy = await connection.get_raw_connection()
    record, raw = inside.record(fairy), fairy.dbapi_connection
    heard.news()
    await connection.run_sync(lambda sync: sync.detach())
    assert heard.news() == "<detach> 1"
    assert heard.arguments("detach") == (raw, record)
    await connection.close()
    assert heard.news() == "<reset> 1, <close_detached> 1"
    assert heard.arguments("close_detached") == (raw,)
    assert heard.arguments("reset")[:2] == (raw, None)
    assert heard.arguments("reset")[2].terminate_only


@in_a_loop
async def test_every_event_has_its_arguments(engines: Engines, driver: str) -> None:
    """The adapted connection, its record, the proxy; why it is reset; why it was invalidated."""
    engine = engines(1)
    heard = Recorder(engine)
    connection = await engine.connect()
    fairy = await connection.get_raw_connection()
    record = inside.record(fairy)
    raw = fairy.dbapi_connection
    assert isinstance(record, ConnectionPoolEntry)
    assert isinstance(fairy, PoolProxiedConnection)
    assert type(raw.driver_connection) is type(record.driver_connection) is DRIVERS[driver]  # type: ignore[union-attr]
    assert heard.arguments("first_connect") == heard.arguments("connect") == (raw, record)
    assert heard.arguments("checkout") == (raw, record, fairy)
    await connection.close()
    assert heard.arguments("checkin") == (raw, record)
    *known, state = heard.arguments("reset")
    assert known == [raw, record]
    assert state == PoolResetState(transaction_was_reset=False, terminate_only=False, asyncio_safe=True)
    async with engine.connect() as connection:
        await one(connection)
    assert heard.arguments("reset")[2].transaction_was_reset
    reason = ValueError("hard")
    connection = await engine.connect()
    await connection.invalidate(reason)
    await connection.close()
    assert heard.arguments("invalidate") == (raw, record, reason)
    assert heard.arguments("checkin") == (None, record)


@pytest.mark.parametrize("target", ["engine", "pool", "Pool", "Engine", "pool_events"])
@in_a_loop
async def test_listeners_are_heard_wherever_they_listen_and_survive_dispose(
    engines: Engines, target: str
) -> None:
    """On an engine, a pool, their base classes, or by ``pool_events``; on the successor of each too."""
    await are_heard(engines, target, {"Pool": SQLAlchemyPool, "Engine": Engine}.get(target))


@in_a_loop
async def test_listeners_of_all_events_are_heard_on_the_class(engines: Engines, pool_class: Any) -> None:
    """On the class of the pool."""
    await are_heard(engines, "class", pool_class)


async def are_heard(engines: Engines, target: str, wide: Any) -> None:
    """Listen there, and live two lives.

    :param wide: a class.
    """
    seen: list[str] = []
    listeners = {name: lambda *args, name=name: seen.append(name) for name in EVENTS}
    kw = {"pool_events": [(fn, name) for name, fn in listeners.items()]} if target == "pool_events" else {}
    with ExitStack() as stack:
        for name, listener in listeners.items() if wide is not None else ():
            event.listen(wide, name, listener)
            stack.callback(event.remove, wide, name, listener)
        engine = engines(1, **kw)
        narrow = {"engine": engine.sync_engine, "pool": engine.pool}
        for name, listener in listeners.items() if target in narrow else ():
            event.listen(narrow[target], name, listener)
        for _ in range(2):
            async with engine.connect() as connection:
                await connection.invalidate()
            async with engine.connect() as connection:
                (await connection.get_raw_connection()).invalidate(soft=True)
            connection = await engine.connect()
            await connection.run_sync(lambda sync: sync.detach())
            await connection.close()
            await use(engine)
            await engine.dispose()
            assert set(seen) | {"close_detached"} == {*EVENTS}  # see the differences
            assert seen.count("connect") == seen.count("close") + seen.count("detach") == 4
            seen.clear()


@in_a_loop
async def test_listeners_may_await(engines: Engines) -> None:
    """With ``run_async``, in each event of a connection that lives; also as an engine is disposed of."""
    engine = engines(1)
    answers: list[tuple[str, Any]] = []
    for name in ("first_connect", "connect", "checkout", "reset", "checkin", "close", "detach", "invalidate"):

        @event.listens_for(engine.sync_engine, name)
        def listen(raw: Any, *_: Any, name: str = name) -> None:
            if raw is not None:
                answers.append((name, raw.run_async(ask)))

    await use(engine)
    await engine.dispose()
    connection = await engine.connect()
    await connection.invalidate()
    await connection.close()
    async with engine.connect() as connection:
        await connection.run_sync(lambda sync: sync.detach())
    names = [name for name, answer in answers if answer == 1]
    assert len(names) == len(answers)
    assert set(names) == {
        *("first_connect", "connect", "checkout", "reset", "checkin", "close", "detach", "invalidate")
    }


@in_a_loop
async def test_do_connect_is_asked_for_each_connection(engines: Engines) -> None:
    """It changes what is passed to the driver, as where credentials rotate."""
    engine = engines(2)
    asked: list[Any] = []

    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        asked.append(record)
        known = options.setdefault("server_settings", {}) if "asyncpg" in str(dialect.driver) else options
        known["application_name"] = f"number {len(asked)}"

    show = text("SHOW application_name")
    async with engine.connect() as connection, engine.connect() as other:
        assert (await connection.scalar(show), await other.scalar(show)) == ("number 1", "number 2")
        assert asked == [
            inside.record(await connection.get_raw_connection()),
            inside.record(await other.get_raw_connection()),
        ]


@pytest.mark.skipif(VERSION < (2, 0, 16), reason="SQLAlchemy has async_creator from 2.0.16 on")
@in_a_loop
async def test_an_async_creator_is_awaited(engines: Engines, database: URL, driver: str) -> None:
    """``async_creator``: a coroutine function that returns the driver's connection."""
    made: list[Any] = []

    async def creator() -> Any:
        url = database.set(drivername="postgresql").render_as_string(hide_password=False)
        connect: Any = asyncpg.connect if driver == "asyncpg" else psycopg.AsyncConnection.connect
        made.append(await connect(url))
        return made[-1]

    engine = engines(1, async_creator=creator)
    await use(engine)
    async with engine.connect() as connection:
        assert await raw_of(connection) is made[0]
        assert await one(connection) == 1
        with pytest.raises(exc.TimeoutError):
            await engine.connect()
    assert len(made) == 1


# == 2. Exceptions in events ============================================================================


@pytest.mark.parametrize("error", [exc.DisconnectionError, exc.InvalidatePoolError])
@in_a_loop
async def test_a_disconnection_error_gets_another_connection(engines: Engines, error: Any) -> None:
    """Raised by a ``checkout`` listener it replaces this connection; or all of before."""
    engine = engines(2)
    stale = await fill(engine, 2)
    refused: list[Any] = []

    @event.listens_for(engine.sync_engine, "checkout")
    def refuse(raw: Any, record: Any, proxy: Any) -> None:
        if not refused:
            refused.append(raw)
            raise error

    async with engine.connect() as connection, engine.connect() as other:
        pids = {await pid_of(connection), await pid_of(other)}
    assert len(pids & set(stale)) == (1 if error is exc.DisconnectionError else 0)


@in_a_loop
async def test_the_second_disconnection_error_is_the_last(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """Two attempts, then an InvalidRequestError; the slot is free, and no backend is left."""
    engine = engines(1)

    @event.listens_for(engine.sync_engine, "checkout")
    def refuse(raw: Any, record: Any, proxy: Any) -> None:
        raise exc.DisconnectionError

    with pytest.raises(exc.InvalidRequestError, match="This connection is closed"):
        await engine.connect()
    assert counts(engine)[1] == 0
    await engines.soon(lambda: pg_observer.backends(str(database.database)) == 0, "no backend")


@pytest.mark.usefixtures("nothing_logged")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *itertools.product(("connect", "checkout"), (RuntimeError, asyncio.CancelledError, Cancelled)),
        ("reset", RuntimeError),
        ("reset", asyncio.CancelledError),
    ],
)
@in_a_loop
async def test_a_listener_that_fails_loses_no_slot_and_strands_no_backend(
    engines: Engines, database: URL, pg_observer: Observer, name: str, error: type[BaseException]
) -> None:
    """``connect``, ``checkout``: the caller gets it; ``reset``: it is logged, unless it is no Exception."""
    await fails_and_recovers(engines, str(database.database), pg_observer, name, error)


@pytest.mark.usefixtures("nothing_logged")
@in_a_loop
async def test_a_reset_listener_that_is_interrupted_loses_no_slot(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """By an exception that is none of asyncio's, and no ``Exception``."""
    await fails_and_recovers(engines, str(database.database), pg_observer, "reset", Cancelled)


@pytest.mark.usefixtures("nothing_logged")
@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, Cancelled])
@in_a_loop
async def test_a_checkin_listener_that_fails_loses_no_slot(
    engines: Engines, database: URL, pg_observer: Observer, error: type[BaseException]
) -> None:
    """Its exception goes to who closes; the connection is closed, and its slot free at once."""
    await fails_and_recovers(engines, str(database.database), pg_observer, "checkin", error)


async def fails_and_recovers(
    engines: Engines, database: str, observer: Observer, name: str, error: type[BaseException]
) -> None:
    """A listener fails once; the one slot of an engine can be had after that."""
    engine = engines(1)
    errors = [error("not today")]

    @event.listens_for(engine.sync_engine, name)
    def fail(*args: Any) -> None:
        if errors:
            raise errors.pop()

    came: list[type[BaseException]] = []

    async def task() -> None:
        try:
            await use(engine)
        except BaseException as caught:
            came.append(type(caught))

    await asyncio.create_task(task())
    assert not errors
    assert came == ([] if name == "reset" and error is RuntimeError else [error])
    gc.collect()  # SQLAlchemy before 2.0.56: the traceback has it
    assert counts(engine)[1] == 0
    await engines.soon(lambda: observer.backends(database) == 0, "it is closed")
    await use(engine)
    assert observer.backends(database) == 1


@in_a_loop
async def test_a_close_listener_that_fails_stops_no_dispose(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """All idle connections are closed, also those after the one whose listener failed."""
    engine = engines(3)
    await fill(engine, 3)
    old: Any = engine.pool

    @event.listens_for(engine.sync_engine, "close")
    def close(raw: Any, record: Any) -> None:
        raise RuntimeError("no such metric")

    await engine.dispose()
    await engines.soon(lambda: pg_observer.backends(str(database.database)) == 0, "all are closed")
    assert (old.checkedin(), old.checkedout()) == (0, 0)


class NeverAwaited:
    """What is awaited where nothing can be; a coroutine would warn of that."""

    def __init__(self, _: Any) -> None: ...

    def __await__(self) -> Generator[Any, Any, Any]:
        raise AssertionError("a loop runs here")


@in_a_loop
async def test_a_close_listener_that_awaits_in_another_thread_is_logged(
    database: URL, pg_observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours alone: a connection that gives way to an engine of threads is closed all the same."""
    engine = create_async_engine(database, poolclass=QueriesPool, max_size=1, pool_timeout=20)
    other = create_engine(database.set(drivername="postgresql+psycopg2"), poolclass=QueriesPool, max_size=1)
    event.listen(engine.sync_engine, "close", lambda raw, record: raw.run_async(NeverAwaited))
    before = await use(engine)

    def evict() -> Any:
        with other.connect() as connection:
            return connection.scalar(text("SELECT pg_backend_pid()"))

    assert await asyncio.to_thread(evict) != before
    await soon(lambda: pg_observer.backends(str(database.database)) == 1, "it is closed")
    assert "exception while closing" in caplog.text
    assert "a loop runs here" not in caplog.text
    await asyncio.to_thread(other.dispose)
    await engine.dispose()


# == 3. Invalidation and age ============================================================================


@in_a_loop
async def test_an_invalidated_connection_is_closed_and_reopens_in_its_record(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """``record_info`` is the record's and stays, ``info`` is the connection's and goes."""
    engine = engines(1)
    connection = await engine.connect()
    fairy: Any = await connection.get_raw_connection()
    fairy.info["of"], fairy.record_info["of"] = "connection 1", "the record"
    await connection.invalidate()
    assert connection.invalidated
    assert counts(engine) == (1, 0)
    await engines.soon(lambda: pg_observer.backends(str(database.database)) == 0, "it is closed")
    assert await one(connection) == 1  # it reconnects
    assert not connection.invalidated
    fairy = await connection.get_raw_connection()
    assert (fairy.info, fairy.record_info) == ({}, {"of": "the record"})
    assert counts(engine) == (0, 1)
    await connection.close()
    assert counts(engine) == (1, 0)


@pytest.mark.parametrize("through", ["soft", "recycle", "pool-wide"])
@in_a_loop
async def test_what_is_replaced_at_its_checkout_is_closed_before_the_next_opens(
    engines: Engines, database: URL, pg_observer: Observer, through: str
) -> None:
    """Soft invalidation, age, a disconnect elsewhere: never two backends for one."""
    engine = engines(1, pool_recycle=60)
    seen: list[int] = []
    event.listen(
        engine.sync_engine, "connect", lambda *_: seen.append(pg_observer.backends(str(database.database)))
    )
    async with engine.connect() as connection:
        before = await pid_of(connection)
        fairy = await connection.get_raw_connection()
        if through == "soft":
            fairy.invalidate(soft=True)
        elif through == "recycle":
            age(fairy, 61)
    if through == "pool-wide":
        inside.invalidate_all(engine.pool, None)
    after = {await use(engine) for _ in range(2)}
    assert len(after) == 1
    assert before not in after
    assert seen == [1, 1]


@in_a_loop
async def test_pre_ping_sees_that_the_server_is_gone(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """No task gets a dead connection."""
    engine = engines(2, pool_pre_ping=True)
    await fill(engine, 2)
    pg_observer.terminate(str(database.database))
    async with engine.connect() as connection, engine.connect() as other:
        assert await one(connection) == await one(other) == 1
    assert counts(engine) == (2, 0)


@in_a_loop
async def test_a_disconnect_replaces_them_all(engines: Engines, database: URL, pg_observer: Observer) -> None:
    """The server ended the sessions: one statement fails, and every connection is opened anew after that."""
    name = str(database.database)
    engine = engines(3)
    held = await engine.connect()
    await one(held)
    await fill(engine, 2)
    assert pg_observer.terminate(name) == 3
    with pytest.raises(exc.DBAPIError) as raised:
        await held.execute(text("SELECT 1"))
    assert raised.value.connection_invalidated
    assert held.invalidated
    await held.rollback()
    assert await one(held) == 1  # the same AsyncConnection reconnects
    async with engine.connect() as connection, engine.connect() as other:
        assert await one(connection) == await one(other) == 1
        assert counts(engine) == (0, 3)
        with pytest.raises(exc.TimeoutError):
            await engine.connect()
    await held.close()
    await engine.dispose()
    await engines.soon(lambda: pg_observer.backends(name) == 0, "no backend")


@pytest.mark.parametrize("wrong", ["password", "database", "port"])
def test_an_error_on_connect_is_the_drivers_own(database: URL, driver: str, wrong: str) -> None:
    """Of the same class with both pools, and the slot is free."""
    changed = {"password": "wrong", "database": "none_such", "port": 1}
    url = database.set(**{wrong: changed[wrong]})  # type: ignore[arg-type]

    async def error_of(pool_class: Any) -> type[BaseException]:
        engine = create_async_engine(url, poolclass=pool_class, pool_size=1, max_overflow=0, pool_timeout=0)
        for _ in range(2):
            with pytest.raises(Exception) as raised:  # noqa: PT011
                await engine.connect()
            assert counts(engine)[1] == 0
        await engine.dispose()
        return raised.type

    assert asyncio.run(error_of(QueriesPool)) is asyncio.run(error_of(AsyncAdaptedQueuePool))


# == 4. Reset and isolation =============================================================================


@pytest.mark.parametrize(("reset", "count"), [("rollback", 0), ("commit", 1), (None, 0)])
@in_a_loop
async def test_reset_on_return_rolls_back_or_commits(
    engines: Engines, database: URL, pg_observer: Observer, reset: str | None, count: int
) -> None:
    """What a raw connection left in a transaction; with None it is still in there for the next one."""
    engine = engines(1, pool_reset_on_return=reset)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE item (number int)"))

    def insert(pool: Any) -> None:
        fairy = pool.connect()
        cursor = fairy.cursor()
        cursor.execute("INSERT INTO item VALUES (1)")
        cursor.close()
        fairy.close()

    await in_greenlet(engine, insert)
    in_transaction = pg_observer.backends(str(database.database), "idle in transaction")
    assert in_transaction == (1 if reset is None else 0)
    await engine.dispose()
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM item")) == count


@in_a_loop
async def test_a_reset_of_ones_own(engines: Engines) -> None:
    """SQLAlchemy's recipe: no reset by the pool, and a ``reset`` listener that does it."""
    engine = engines(1, pool_reset_on_return=None)

    @event.listens_for(engine.sync_engine, "reset")
    def reset(raw: Any, record: Any, state: PoolResetState) -> None:
        if not state.terminate_only:
            cursor = raw.cursor()
            cursor.execute("SET myapp.tenant TO 'nobody'")
            cursor.close()
            raw.commit()
        raw.rollback()

    show = text("SHOW myapp.tenant")
    async with engine.begin() as connection:
        await connection.execute(text("SET myapp.tenant TO 'somebody'"))
        assert await connection.scalar(show) == "somebody"
    async with engine.connect() as connection:
        assert await connection.scalar(show) == "nobody"
        await connection.run_sync(lambda sync: sync.detach())


@in_a_loop
async def test_an_isolation_level_holds_for_one_checkout(engines: Engines) -> None:
    """Set by execution options, reset on return: to the server's default, or to the engine's own."""
    show = text("SHOW transaction_isolation")
    for own, default in ((None, "read committed"), ("REPEATABLE READ", "repeatable read")):
        engine = engines(1, **({} if own is None else {"isolation_level": own}))
        before = await use(engine)
        for level in ("SERIALIZABLE", "AUTOCOMMIT"):
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level=level)
                if level == "SERIALIZABLE":
                    assert await connection.scalar(show) == "serializable"
                else:
                    await one(connection)
                    assert (await connection.get_raw_connection()).driver_connection is not None
            async with engine.connect() as connection:
                assert await pid_of(connection) == before
                assert await connection.scalar(show) == default
        shard = engine.execution_options(isolation_level="SERIALIZABLE")
        async with shard.connect() as connection:
            assert await connection.scalar(show) == "serializable"
        async with engine.connect() as connection:
            assert await connection.scalar(show) == default
        await engine.dispose()


# == 5. Logging =========================================================================================


@pytest.fixture
def logger_name(pool_class: Any) -> Iterator[str]:
    """The name of the logger; SQLAlchemy's handlers for ``echo`` are taken off at the end."""
    kind = "QueriesPool" if pool_class is QueriesPool else "impl.AsyncAdaptedQueuePool"
    name = f"sqlalchemy.pool.{kind}"
    yield name
    for known in [name, f"{name}.mine"]:
        logging.getLogger(known).handlers.clear()


@pytest.mark.parametrize("echo", [None, True, "debug"])
@pytest.mark.parametrize("logging_name", [None, "mine"])
@in_a_loop
async def test_echo_pool_says_what_it_does(
    engines: Engines,
    logger_name: str,
    caplog: pytest.LogCaptureFixture,
    echo: Any,
    logging_name: str | None,
) -> None:
    """Nothing, INFO, or DEBUG too; to the logger of the class, with the name stated; after a dispose too."""
    engine = engines(1, echo_pool=echo, pool_logging_name=logging_name)
    name = logger_name if logging_name is None else f"{logger_name}.{logging_name}"
    for _ in range(2):
        async with engine.connect() as connection:
            (await connection.get_raw_connection()).invalidate(soft=True)
        async with engine.connect() as connection:
            await connection.invalidate()
        await use(engine)
        await engine.dispose()
        info, debug = logged_by(caplog, name, logging.INFO), logged_by(caplog, name, logging.DEBUG)
        assert [words in info for words in INFO] == [bool(echo)] * len(INFO), info
        wanted = [words for words in DEBUG if words != "losing connection"]
        assert [words in debug for words in wanted] == [echo == "debug"] * len(wanted), debug
        if echo is None:
            assert not [r for r in caplog.records if r.name.startswith("sqlalchemy.pool")]
        caplog.clear()


# == 6. Raw, detached, abandoned ========================================================================


@in_a_loop
async def test_the_drivers_own_connection_is_at_hand(engines: Engines, driver: str) -> None:
    """``driver_connection`` of what was checked out; ``exec_driver_sql``, ``stream`` and ``run_sync``."""
    engine = engines(1)
    async with engine.connect() as connection:
        raw = await raw_of(connection)
        assert type(raw) is DRIVERS[driver]
        assert await ask(raw) == 1
        assert (await connection.exec_driver_sql("SELECT 2")).scalar_one() == 2
        rows = [row.n async for row in await connection.stream(text("SELECT generate_series(1, 3) AS n"))]
        assert rows == [1, 2, 3]
        assert await connection.run_sync(lambda sync: sync.scalar(text("SELECT 3"))) == 3
    fairy = await engine.raw_connection()
    assert fairy.driver_connection is raw
    assert counts(engine) == (0, 1)
    await in_greenlet(engine, lambda _: fairy.close())
    assert counts(engine) == (1, 0)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@in_a_loop
async def test_a_stream_that_is_left_gives_its_connection_back(engines: Engines) -> None:
    """In the middle of a server-side cursor; the next one finds nothing of it."""
    engine = engines(1)
    for _ in range(2):
        async with engine.connect() as connection:
            result = await connection.stream(text("SELECT generate_series(1, 100000)"))
            assert (await result.fetchone()) == (1,)
        assert counts(engine) == (1, 0)


@in_a_loop
async def test_closing_twice_gives_back_once(engines: Engines) -> None:
    """The second ``close()`` changes nothing, though somebody else has the connection by now."""
    engine = engines(1)
    first = await engine.connect()
    await first.close()
    second = await engine.connect()
    await first.close()
    assert counts(engine) == (0, 1)
    await second.close()
    assert counts(engine) == (1, 0)


@in_a_loop
async def test_an_exhausted_pool_raises_sqlalchemys_timeout(engines: Engines) -> None:
    """TimeoutError, with the code of the error's page, after ``pool_timeout``; others run meanwhile."""
    engine = engines(1)
    async with engine.connect():
        asked = asyncio.create_task(use(engine))
        turns = 0
        while not asked.done():
            await asyncio.sleep(0)
            turns += 1
        with pytest.raises(exc.TimeoutError) as raised:
            await asked
    assert raised.value.code == "3o7r"
    assert turns > 10
    await use(engine)


@in_a_loop
async def test_a_timeout_of_zero_does_not_wait(engines: Engines) -> None:
    """``pool_timeout=0``: what is idle is to be had, and nothing is waited for."""
    engine = engines(1, pool_timeout=0)
    async with engine.connect():
        with pytest.raises(exc.TimeoutError):
            await engine.connect()
    await use(engine)


@in_a_loop
async def test_a_task_waits_for_what_another_returns(engines: Engines) -> None:
    """Ten tasks and two connections."""
    engine = engines(2, pool_timeout=20)
    pids = await asyncio.gather(*(use(engine) for _ in range(10)))
    assert len(set(pids)) <= 2
    assert counts(engine) == (2, 0)


@in_a_loop
async def test_the_numbers_follow_the_connections(engines: Engines) -> None:
    """size, checkedin, checkedout, overflow and timeout, which tools for monitoring read."""
    engine = engines(2, pool_timeout=3)

    def numbers() -> tuple[Any, ...]:
        pool: Any = engine.pool
        return pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow(), pool.timeout()

    assert numbers() == (2, 0, 0, -2, 3)
    first, second = await engine.connect(), await engine.connect()
    assert numbers() == (2, 0, 2, 0, 3)
    await first.close()
    assert numbers() == (2, 1, 1, 0, 3)
    await second.invalidate()
    assert numbers() == (2, 2, 0, 0, 3)
    await second.close()
    await engine.dispose()
    assert numbers() == (2, 0, 0, -2, 3)


@in_a_loop
async def test_the_connection_that_was_returned_last_is_used_first(engines: Engines) -> None:
    """So that those that are not needed age out."""
    engine = engines(3)
    pids = await fill(engine, 3)
    assert await use(engine) == pids[2]


@pytest.mark.parametrize(("use_lifo", "index"), [(True, 2), (False, 0)])
@in_a_loop
async def test_use_lifo_says_which_is_used_first(engines: Engines, use_lifo: bool, index: int) -> None:
    """``pool_use_lifo``, in both directions."""
    engine = engines(3, pool_use_lifo=use_lifo)
    pids = await fill(engine, 3)
    assert await use(engine) == pids[index]


@in_a_loop
async def test_what_is_returned_above_pool_size_stays(engines: Engines) -> None:
    """``max_size`` is one number: whatever is within it may stay idle, for ``idle_ttl``."""
    engine = engines(1, max_overflow=1)
    await fill(engine, 2)
    assert counts(engine) == (2, 0)


@in_a_loop
async def test_a_detached_connection_lives_on_its_own(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """Beside a full pool, over a dispose, until it is closed."""
    name = str(database.database)
    engine = engines(1)
    connection = await engine.connect()
    raw: Any = (await connection.get_raw_connection()).dbapi_connection
    await connection.run_sync(lambda sync: sync.detach())
    assert counts(engine)[1] == 0
    async with engine.connect() as other:
        assert await pid_of(other) != await pid_of(connection)
        assert pg_observer.backends(name) == 2
    await engine.dispose()
    assert await one(connection) == 1
    kept = raw.driver_connection  # so that no destructor closes it
    await connection.close()
    try:
        await engines.soon(lambda: pg_observer.backends(name) == 0, "no backend")
    finally:
        end(kept)


@in_a_loop
async def test_a_detached_connection_leaves_no_record_in_the_pool(engines: Engines) -> None:
    """Its slot is free and its record gone: nothing is checked in, and a new record has no record_info."""
    engine = engines(1)
    connection = await engine.connect()
    (await connection.get_raw_connection()).record_info["of"] = "the record"  # type: ignore[index]
    await connection.run_sync(lambda sync: sync.detach())
    checked_in = counts(engine)[0]
    async with engine.connect() as again:
        record_info = (await again.get_raw_connection()).record_info
    await connection.close()
    assert (checked_in, record_info) == (0, {})


ABANDONED = pytest.mark.filterwarnings(
    "ignore:The garbage collector is trying", "ignore::ResourceWarning", "ignore::pytest.PytestWarning"
)
"""SQLAlchemy's words; and a driver's destructor, where SQLAlchemy leaves closing to it."""


@ABANDONED
@pytest.mark.parametrize("cycle", [False, True])
@in_a_loop
async def test_what_nobody_refers_to_is_reported_and_its_slot_is_free(engines: Engines, cycle: bool) -> None:
    """Nothing can be awaited in a collection, so it is detached: a warning, and no rollback."""
    engine = engines(1)
    connection = await engine.connect()
    await one(connection)
    heard = Recorder(engine)
    if cycle:
        Ring(connection)
    del connection
    with pytest.warns(exc.SAWarning, match="garbage collector is trying to clean up non-checked-in"):
        gc.collect()
    assert heard.news().startswith("<reset> 1, <detach> 1")
    state = heard.arguments("reset")[2]
    assert (state.terminate_only, state.asyncio_safe) == (True, False)
    heard.calls.clear()
    assert counts(engine)[1] == 0
    await use(engine)


@ABANDONED
@in_a_loop
async def test_what_nobody_refers_to_is_closed(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """At once, though its transaction is open, with any driver."""
    engine = engines(1)
    heard = Recorder(engine)
    connection = await engine.connect()
    await one(connection)
    heard.news()
    heard.calls.clear()
    kept = await raw_of(connection)  # so that no destructor does it
    try:
        del connection
        with pytest.warns(exc.SAWarning, match="which will be terminated"):
            gc.collect()
        assert heard.news() == "<reset> 1, <detach> 1, <close_detached> 1"
        await engines.soon(lambda: pg_observer.backends(str(database.database)) == 0, "it is closed")
    finally:
        end(kept)


def _invalidate(record: Any, _: Any) -> None:
    record.invalidate()


@in_a_loop
async def test_what_was_invalidated_and_abandoned_is_just_returned(engines: Engines) -> None:
    """There is no connection any more that could be reported."""
    engine = engines(1)
    connection = await engine.connect()
    fairy: Any = await connection.get_raw_connection()
    await in_greenlet(engine, functools.partial(_invalidate, inside.record(fairy)))
    heard = Recorder(engine)
    del connection, fairy
    gc.collect()
    assert heard.news() == "<checkin> None"
    assert counts(engine) == (1, 0)
    await use(engine)


# == 7. Engines and their settings ======================================================================


@in_a_loop
async def test_a_pool_can_be_given_as_an_instance(engines: Engines, pool_class: Any, database: URL) -> None:
    """``create_async_engine(pool=…)``: it exhausts, waits without blocking the loop, has a successor."""
    creator = inside.setting(create_async_engine(database, poolclass=QueriesPool).pool, "creator")
    pool = pool_class(creator, pool_size=1, max_overflow=0, timeout=20)
    heard: list[str] = []
    event.listen(pool, "connect", lambda *_: heard.append("connect"))
    engine = engines(pool=pool)
    assert engine.pool is pool
    pids = await asyncio.gather(*(use(engine) for _ in range(3)))
    assert len(set(pids)) == 1
    await engine.dispose()
    assert engine.pool is not pool
    assert await use(engine) != pids[0]
    assert heard == ["connect"] * 2
    assert type(engine.pool) is pool_class


@in_a_loop
async def test_dispose_closes_what_is_idle(engines: Engines, database: URL, pg_observer: Observer) -> None:
    """And gives the engine a new, empty pool of the same kind."""
    engine = engines(2)
    before = await fill(engine, 2)
    old: Any = engine.pool
    await engine.dispose()
    new: Any = engine.pool
    await engines.soon(lambda: pg_observer.backends(str(database.database)) == 0, "no backend")
    assert new is not old
    assert (type(new), new.size(), new.checkedin()) == (type(old), 2, 0)
    assert await use(engine) not in before


@in_a_loop
async def test_what_is_out_over_a_dispose_goes_on_working(engines: Engines) -> None:
    """A dispose takes nothing out of any task's hand."""
    engine = engines(2)
    async with engine.connect() as connection:
        before = await pid_of(connection)
        await engine.dispose()
        assert await pid_of(connection) == before


@in_a_loop
async def test_what_is_out_over_a_dispose_is_closed_when_it_is_returned(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """Its pool is not used any more, so there is no use in keeping it."""
    engine = engines(2)
    connection = await engine.connect()
    old: Any = engine.pool
    await engine.dispose()
    await connection.close()
    kept = old.checkedin()
    await in_greenlet(engine, lambda _: old.dispose())
    assert kept == 0
    await engines.soon(lambda: pg_observer.backends(str(database.database)) == 0, "it is closed")


@in_a_loop
async def test_what_is_out_over_a_dispose_still_counts(engines: Engines) -> None:
    """The limit is the database's, which has the connection open."""
    engine = engines(1)
    async with engine.connect():
        old: Any = engine.pool
        await engine.dispose()
        try:
            with pytest.raises(exc.TimeoutError):
                await use(engine)
        finally:
            await engine.dispose()
    await in_greenlet(engine, lambda _: old.dispose())
    await use(engine)


@pytest.mark.skipif(VERSION < (2, 0, 20), reason="AsyncEngine.dispose() has close= from 2.0.20 on")
@in_a_loop
async def test_dispose_without_close_closes_nothing(
    engines: Engines, database: URL, pg_observer: Observer
) -> None:
    """As after a fork: what the old pool has stays open."""
    engine = engines(2)
    before = await use(engine)
    old: Any = engine.pool
    await engine.dispose(close=False)
    assert old.checkedin() == 1
    assert await use(engine) != before
    assert pg_observer.backends(str(database.database)) == 2
    await in_greenlet(engine, lambda _: old.dispose())
    await engines.soon(lambda: pg_observer.backends(str(database.database)) == 1, "its one is closed")


@in_a_loop
async def test_shards_share_the_engines_pool(engines: Engines) -> None:
    """``engine.execution_options()`` is an engine with the same pool, also after either was disposed of."""
    engine = engines(1)
    shard = engine.execution_options(schema_translate_map={None: "shard"})
    for disposed in (shard, engine):
        assert shard.pool is engine.pool
        async with shard.connect():
            with pytest.raises(exc.TimeoutError):
                await engine.connect()
        old = engine.pool
        await disposed.dispose()
        assert engine.pool is not old
        assert shard.pool is engine.pool


@pytest.mark.parametrize("size", [1, 3])
@in_a_loop
async def test_engines_of_one_database_never_see_one_anothers_settings(engines: Engines, size: int) -> None:
    """``connect`` listeners, JSON codecs, isolation levels: also where connections give way to each other."""
    made: dict[str, AsyncEngine] = {}
    for name, kw in SETTINGS.items():
        codecs = {"json_serializer": Writer(name), "json_deserializer": Reader(name)}
        engine = made[name] = engines(size, **codecs, **kw)

        @event.listens_for(engine.sync_engine, "connect")
        def configure(raw: Any, record: Any, name: str = name) -> None:
            cursor = raw.cursor()
            cursor.execute(f"SET search_path TO {name}")
            cursor.close()
            raw.commit()

    levels = {"one": "serializable", "two": "read committed", "three": "read committed"}
    for name in [*made, *reversed(made), *made]:
        async with made[name].connect() as connection:
            assert await connection.scalar(text("SHOW search_path")) == name
            assert await connection.scalar(text("SHOW transaction_isolation")) == levels[name]
            value = await connection.scalar(select(cast({"a": 1}, JSON)))
            assert value == (name, {"written by": name, "a": 1}), json.dumps(value)


# == 9. Sessions, reflection, savepoints ================================================================


@in_a_loop
async def test_a_session_checks_out_once_and_returns(engines: Engines) -> None:
    """Commit, rollback and ``close`` return; ``invalidate()`` closes; a session in each task."""
    engine = engines(2, pool_timeout=20)
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(text("CREATE TABLE item (number int)"))
        assert counts(engine)[1] == 1
    assert counts(engine)[1] == 0

    async def insert(number: int) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(text("INSERT INTO item VALUES (:number)"), {"number": number})
            if number % 2:
                await session.commit()
            else:
                await session.rollback()
            assert await session.scalar(text("SELECT 1")) == 1

    await asyncio.gather(*(insert(number) for number in range(10)))
    assert counts(engine)[1] == 0
    async with AsyncSession(engine) as session:
        found = await session.scalars(text("SELECT number FROM item ORDER BY number"))
        assert found.all() == [1, 3, 5, 7, 9]
        await session.invalidate()
        assert counts(engine)[1] == 0
    await use(engine)


@in_a_loop
async def test_savepoints(engines: Engines) -> None:
    """``begin_nested()`` in one checkout: what was rolled back to is gone, the rest is there."""
    engine = engines(1)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE item (number int)"))
        async with connection.begin_nested():
            await connection.execute(text("INSERT INTO item VALUES (1)"))
        inner = await connection.begin_nested()
        await connection.execute(text("INSERT INTO item VALUES (2)"))
        await inner.rollback()
    async with engine.connect() as connection:
        await connection.begin_nested()
        await connection.execute(text("INSERT INTO item VALUES (3)"))
    async with engine.connect() as connection:
        assert (await connection.scalars(text("SELECT number FROM item"))).all() == [1]


@in_a_loop
async def test_reflection_needs_one_connection(engines: Engines) -> None:
    """With ``run_sync``."""
    engine = engines(1)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE item (number int)"))
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == ["item"]
    assert counts(engine) == (1, 0)


# == 10. Cancellation ===================================================================================


class CancelledAt:
    """Awaits a coroutine, and cancels its task at one of its awaits."""

    def __init__(self, work: Coroutine[Any, Any, Any], number: int) -> None:
        self._work = work
        self._number = number
        self.awaits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        error: BaseException | None = None
        while True:
            try:
                asked = next(steps) if error is None else steps.throw(error)
            except StopIteration as ended:
                return ended.value
            self.awaits += 1
            if self.awaits == self._number:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield asked
                error = None
            except BaseException as thrown:
                error = thrown


async def a_session(engine: AsyncEngine) -> None:
    """What an application does."""
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        await session.commit()


async def a_connection(engine: AsyncEngine) -> None:
    """What a service does."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TEMPORARY TABLE item (number int)"))
        await connection.execute(text("DROP TABLE item"))


async def closed_by_hand(engine: AsyncEngine) -> None:
    """Without a context manager."""
    connection = await engine.connect()
    try:
        await connection.execute(text("SELECT 1"))
    finally:
        await connection.close()


def recycled(engine: AsyncEngine) -> None:
    """What is idle is to be replaced."""
    inside.invalidate_all(engine.pool, None)


WORK = pytest.mark.parametrize("work", [a_session, a_connection, closed_by_hand])


@WORK
@in_a_loop
async def test_cancelled_at_any_await_while_it_connects_nothing_is_lost(
    engines: Engines, database: URL, pg_observer: Observer, work: Callable[[Any], Any]
) -> None:
    """A first checkout, and one that replaces a connection; the opening goes on till it is over."""
    for prepare in (None, recycled):
        await cancelled_everywhere(engines, str(database.database), pg_observer, work, prepare)


@WORK
@in_a_loop
async def test_a_dispose_after_a_cancellation_leaves_nothing(
    engines: Engines, database: URL, pg_observer: Observer, work: Callable[[Any], Any]
) -> None:
    """At once, while the opening goes on: the connection is closed when it is there."""
    for number in itertools.count(1):
        engine = engines(1, pool_timeout=20)
        cancelled = CancelledAt(work(engine), number)
        await asyncio.gather(_awaiting(cancelled), return_exceptions=True)
        await engine.dispose()
        if cancelled.awaits < number:
            break
        name = str(database.database)
        await engines.soon(functools.partial(no_backend, pg_observer, name), f"at await {number}: its end")


def no_backend(observer: Observer, name: str) -> bool:
    """Has the server no connection of that database?"""
    return not observer.backends(name)


@WORK
@in_a_loop
async def test_cancelled_at_any_await_nothing_is_lost(
    engines: Engines, database: URL, pg_observer: Observer, work: Callable[[Any], Any]
) -> None:
    """A checkout of what is idle, its use and its return."""
    await cancelled_everywhere(engines, str(database.database), pg_observer, work, lambda _: None)


async def cancelled_everywhere(
    engines: Engines,
    name: str,
    observer: Observer,
    work: Callable[[Any], Any],
    prepare: Callable[[AsyncEngine], None] | None,
) -> None:
    """At each in turn: the task ends cancelled, no slot and no backend is lost, none in a transaction."""
    for number in itertools.count(1):
        engine, at = engines(1, pool_timeout=20), f"at await {number}"
        if prepare is not None:
            await use(engine)
            prepare(engine)
        cancelled = CancelledAt(work(engine), number)
        task = asyncio.ensure_future(_awaiting(cancelled))
        await asyncio.wait([task])
        if cancelled.awaits < number:  # it has no more
            await engine.dispose()
            break
        assert task.cancelled(), f"{at}: {task}"
        await engines.soon(functools.partial(is_back, engine), f"{at}: its slot")
        await engines.soon(lambda: not observer.backends(name, "idle in transaction"), f"{at}: its end")
        assert await use(engine)
        await engines.soon(lambda: observer.backends(name) == 1, f"{at}: no backend too many")
        await engine.dispose()
        await engines.soon(lambda: not observer.backends(name), f"{at}: the end of all backends")
    await task
    assert number > 3


def is_back(engine: AsyncEngine) -> bool:
    """Is no connection out?"""
    return not counts(engine)[1]


async def _awaiting(work: Awaitable[Any]) -> None:
    await work


# == The differences ====================================================================================


def test_every_difference_is_of_a_test_and_told_to_users() -> None:
    """That it is one its test asserts: where AsyncAdaptedQueuePool passes, ``pool_class`` makes it fail."""
    told = (Path(__file__).parents[1] / "docs" / "contract.rst").read_text(encoding="utf-8")
    for name in DIFFERENCES:
        test = globals()[name].__wrapped__
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        assert {"pool_class", "engines"} & set(names), f"{name} knows one pool alone"
        assert f"``{name}``" in told, f"docs/contract.rst does not tell of {name}"
