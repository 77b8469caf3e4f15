"""SQLAlchemy's contract for pools, point by point, with QueuePool as the yardstick.

A test that takes ``pool_class`` runs with both.  Where QueuePool fails it, :data:`DIFFERENCES` says why, and
``docs/contract.rst`` tells users; a difference that is none (any more) fails here.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import inside
import psycopg
import psycopg2
import psycopg2.extensions
import pytest
import sqlalchemy
from conftest import in_memory
from fakes import FakeClock, FakeConnection, FakeDialect, FakeDriver, Task
from hazards import Ring, Thread, assert_whole, eventually, settled
from sqlalchemy import (
    JSON,
    URL,
    Engine,
    MetaData,
    cast,
    create_engine,
    event,
    exc,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState, QueuePool
from sqlalchemy.pool import Pool as SQLAlchemyPool

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres

Eventually = Callable[..., None]
Make = Callable[..., Any]
VERSION = tuple(int(part) for part in sqlalchemy.__version__.split(".")[:3] if part.isdigit())
_numbers = itertools.count()


class Difference(NamedTuple):
    """Why QueuePool fails a test."""

    reason: str
    until: tuple[int, ...] = (99,)
    """The version of SQLAlchemy from which on it passes."""


DIFFERENCES = {
    "test_the_connection_that_was_returned_last_is_used_first": Difference(
        "QueuePool is first-in first-out unless pool_use_lifo says otherwise"
    ),
    "test_what_is_returned_above_pool_size_stays": Difference(
        "QueuePool closes a connection above pool_size when it is returned"
    ),
    "test_a_checkin_listener_that_fails_loses_no_slot": Difference(
        "QueuePool counts the connection as checked out for ever"
    ),
    "test_a_finalize_callback_that_fails_loses_no_slot": Difference(
        "QueuePool counts the connection as checked out for ever"
    ),
    "test_a_close_listener_that_fails_stops_no_dispose": Difference(
        "QueuePool stops closing, and counts what it had closed by then"
    ),
    "test_a_connect_listener_that_fails_strands_no_socket": Difference(
        "QueuePool leaves the socket to the driver's destructor", until=(2, 0, 53)
    ),
    "test_a_detached_connection_leaves_no_record_in_the_pool": Difference(
        "QueuePool keeps the hollow record, and its record_info"
    ),
    "test_what_is_out_over_a_dispose_still_counts": Difference(
        "QueuePool's successor knows nothing of what its predecessor has out"
    ),
    "test_what_is_out_over_a_dispose_is_closed_when_it_is_returned": Difference(
        "QueuePool takes it back into the disposed pool, and leaves closing to the driver's destructor"
    ),
    "test_engines_of_one_database_have_one_limit": Difference("QueuePool has one limit per engine"),
    "test_a_value_that_means_nothing_is_an_error_at_once": Difference(
        "QueuePool raises a ValueError when it would have to wait"
    ),
    "test_it_is_no_queuepool": Difference("it is one"),
    "test_a_memory_database_is_never_a_second_one": Difference(
        "QueuePool opens a second connection, which is a second, empty database"
    ),
    "test_a_memory_database_survives_a_checkout_in_another_thread": Difference(
        "QueuePool opens a second connection, which is a second, empty database"
    ),
}
"""Tests that QueuePool fails -> why."""


@pytest.fixture(params=[QueriesPool, QueuePool], ids=["QueriesPool", "QueuePool"])
def pool_class(request: pytest.FixtureRequest) -> Any:
    """The pool, and the yardstick; a stated difference has to be one."""
    difference = DIFFERENCES.get(request.node.originalname)
    if request.param is QueuePool and difference is not None and difference.until > VERSION:
        failures = (AssertionError, RuntimeError, exc.SQLAlchemyError, pytest.fail.Exception)
        request.applymarker(pytest.mark.xfail(reason=difference.reason, strict=True, raises=failures))
    return request.param


@pytest.fixture
def make_pool(pool_class: Any, driver: FakeDriver) -> Make:
    """Make pools without an engine, by QueuePool's parameters: ``make_pool(2)`` has 2 connections at most."""

    def make(size: int = 2, creator: Any = driver.connect, **kw: Any) -> Any:
        return pool_class(creator, **{"pool_size": size, "max_overflow": 0, "timeout": 0, **kw})

    return make


@pytest.fixture
def make_engine(pool_class: Any, driver: FakeDriver) -> Iterator[Make]:
    """Make engines of a database that only this test has, with 2 connections at most: ``make_engine(2)``."""
    url = f"fake://host/contract_{next(_numbers)}"
    engines: list[Engine] = []

    def make(size: int = 2, url: Any = url, **kw: Any) -> Engine:
        if str(url).startswith("fake:"):
            kw.setdefault("module", driver)
        limits = {"poolclass": pool_class, "pool_size": size, "max_overflow": 0, "pool_timeout": 0}
        engines.append(create_engine(url, **{**limits, **kw}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture(params=["psycopg2", "psycopg"])
def database(request: pytest.FixtureRequest, pg_url: str) -> URL:
    """The URL of an empty database of PostgreSQL, with each driver."""
    return make_url(pg_url).set(drivername=f"postgresql+{request.param}")


EVENTS = (
    "connect",
    "first_connect",
    "checkout",
    "checkin",
    "reset",
    "invalidate",
    "soft_invalidate",
    "close",
    "detach",
    "close_detached",
)


class Recorder:
    """Hears all events of a target; writes them between what the driver does: ``<connect> 1``."""

    def __init__(self, driver: FakeDriver, target: Any) -> None:
        self.driver = driver
        self.calls: list[tuple[Any, ...]] = []
        for name in EVENTS:
            event.listen(target, name, self._listener(name))

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(*args: Any) -> None:
            number = None if args[0] is None else args[0].number
            self.driver.events.append(f"<{name}> {number}")
            self.calls.append((name, *args))

        return listen

    def news(self) -> str:
        """What has happened since it was asked last."""
        news = ", ".join(self.driver.events)
        self.driver.events.clear()
        return news

    def arguments(self, name: str) -> tuple[Any, ...]:
        """What the listener of an event got the last time."""
        return next(call[1:] for call in reversed(self.calls) if call[0] == name)


def report(pool: Any) -> dict[str, Any]:
    """What is reported about the connections of a pool."""
    found: dict[str, Any] = inside.shared(pool).report()["connections"]
    return found


def record_of(fairy: Any) -> Any:
    """The record behind what was checked out."""
    return inside.record(fairy)


def age(fairy: Any, seconds: float = 3600.0) -> None:
    """Make a connection that is out look as old as that."""
    record_of(fairy).starttime -= seconds


class Cancelled(BaseException):
    """What a library for concurrency may throw into any call."""


# == 1. Events =========================================================================================


def test_every_event_comes_in_its_place(make_pool: Make, driver: FakeDriver) -> None:
    """A whole life: which events, in which order, and what the driver was asked for between them."""
    pool = make_pool(1)
    heard = Recorder(driver, pool)
    fairy = pool.connect()
    assert heard.news() == "open 1, <first_connect> 1, <connect> 1, <checkout> 1"
    fairy.close()
    assert heard.news() == "<reset> 1, <checkin> 1"
    fairy = pool.connect()
    assert heard.news() == "<checkout> 1"
    fairy.invalidate(soft=True)
    assert heard.news() == "<soft_invalidate> 1"
    fairy.close()
    assert heard.news() == "<reset> 1, <checkin> 1"
    fairy = pool.connect()
    assert heard.news() == "<close> 1, close 1, open 2, <connect> 2, <checkout> 2"
    fairy.invalidate()
    assert heard.news() == "<invalidate> 2, <close> 2, close 2, <checkin> None"
    fairy = pool.connect()
    assert heard.news() == "open 3, <connect> 3, <checkout> 3"
    fairy.detach()
    assert heard.news() == "<detach> 3"
    fairy.close()
    assert heard.news() == "<reset> 3, <close_detached> 3, close 3"
    pool.connect().close()
    assert heard.news() == "open 4, <connect> 4, <checkout> 4, <reset> 4, <checkin> 4"
    pool.dispose()
    assert heard.news() == "<close> 4, close 4"


def test_every_event_has_its_arguments(make_pool: Make, driver: FakeDriver) -> None:
    """The DBAPI connection itself, its record, the proxy; why it is reset; why it was invalidated."""
    pool = make_pool(1)
    heard = Recorder(driver, pool)
    fairy = pool.connect()
    record = record_of(fairy)
    raw = driver.connections[0]
    assert isinstance(record, ConnectionPoolEntry)
    assert isinstance(fairy, PoolProxiedConnection)
    assert heard.arguments("first_connect") == heard.arguments("connect") == (raw, record)
    assert heard.arguments("checkout") == (raw, record, fairy)
    assert record.in_use
    reason = ValueError("soft")
    fairy.invalidate(reason, soft=True)
    assert heard.arguments("soft_invalidate") == (raw, record, reason)
    fairy.close()
    assert heard.arguments("checkin") == (raw, record)
    *known, state = heard.arguments("reset")
    assert known == [raw, record]
    assert state == PoolResetState(transaction_was_reset=False, terminate_only=False, asyncio_safe=True)
    assert not record.in_use
    fairy = pool.connect()
    assert heard.arguments("close") == (raw, record)
    assert record_of(fairy) is record
    raw = driver.connections[1]
    reason = ValueError("hard")
    fairy.invalidate(reason)
    assert heard.arguments("invalidate") == (raw, record, reason)
    assert heard.arguments("checkin") == (None, record)
    fairy = pool.connect()
    record, raw = record_of(fairy), driver.connections[2]
    fairy.detach()
    assert heard.arguments("detach") == (raw, record)
    assert record.dbapi_connection is None
    fairy.close()
    assert heard.arguments("close_detached") == (raw,)
    assert heard.arguments("reset")[:2] == (raw, None)
    assert heard.arguments("reset")[2].terminate_only


def test_an_engines_rollback_is_told_to_the_reset_listener(make_engine: Make, driver: FakeDriver) -> None:
    """A Connection ends its transaction itself, so the pool does not roll back a second time."""
    engine = make_engine(1)
    heard = Recorder(driver, engine)
    engine.connect().close()  # the engine's first, in which its dialect is initialized
    connection = engine.connect()
    driver.connections[0].calls.clear()
    connection.begin()
    connection.close()
    assert heard.arguments("reset")[2].transaction_was_reset
    assert driver.connections[0].calls == {"rollback": 1}


def test_a_reset_listener_of_the_old_kind_is_called(make_pool: Make) -> None:
    """SQLAlchemy 1.4's has two arguments."""
    pool = make_pool(1)
    seen: list[Any] = []

    @event.listens_for(pool, "reset")
    def reset(dbapi_connection: Any, record: Any) -> None:
        seen.append(dbapi_connection)

    with pytest.warns(exc.SADeprecationWarning, match="argument signature"):
        pool.connect().close()
    assert len(seen) == 1


def test_first_connect_comes_once(make_pool: Make, driver: FakeDriver) -> None:
    """Once per pool, not per connection; again if its listener failed."""
    pool = make_pool(2)
    seen: list[int] = []

    @event.listens_for(pool, "first_connect")
    def first(dbapi_connection: Any, record: Any) -> None:
        seen.append(dbapi_connection.number)
        if len(seen) == 1:
            raise RuntimeError("not yet")

    with pytest.raises(RuntimeError, match="not yet"):
        pool.connect()
    fairies = [pool.connect(), pool.connect()]
    assert seen == [1, 2]
    for fairy in fairies:
        fairy.close()


def test_listeners_are_called_in_their_order_and_can_be_removed(make_pool: Make) -> None:
    """As they were added; ``insert=True`` before the others; a removed one no more."""
    pool = make_pool(1)
    seen: list[str] = []

    def one(*args: Any) -> None:
        seen.append("one")

    def two(*args: Any) -> None:
        seen.append("two")

    event.listen(pool, "checkin", one)
    event.listen(pool, "checkin", two, insert=True)
    pool.connect().close()
    assert seen == ["two", "one"]
    event.remove(pool, "checkin", two)
    pool.connect().close()
    assert seen == ["two", "one", "one"]


@pytest.mark.parametrize(
    "target", ["engine", "pool", "pool class", "Pool", "Engine", "pool_events", "execution_options"]
)
def test_listeners_are_heard_wherever_they_listen_and_survive_dispose(
    make_engine: Make, pool_class: Any, target: str
) -> None:
    """On an engine, a pool, their classes, a shard, or by ``pool_events``; on the successor of each too."""
    seen: list[str] = []
    listeners = {name: lambda *args, name=name: seen.append(name) for name in EVENTS}
    kw = {"pool_events": [(fn, name) for name, fn in listeners.items()]} if target == "pool_events" else {}
    classes = {"pool class": pool_class, "Pool": SQLAlchemyPool, "Engine": Engine}
    wide = classes.get(target)
    try:
        for name, listener in listeners.items() if wide is not None else ():
            event.listen(wide, name, listener)
        engine = make_engine(1, **kw)
        narrow = {"engine": engine, "pool": engine.pool, "execution_options": engine.execution_options()}
        for name, listener in listeners.items() if target in narrow else ():
            event.listen(narrow[target], name, listener)
        for _ in range(2):
            with engine.connect() as connection:
                connection.detach()
            with engine.connect() as connection:
                connection.invalidate()
            engine.raw_connection().invalidate(soft=True)
            engine.connect().close()
            engine.dispose()
            assert set(seen) == set(EVENTS)
            assert seen.count("connect") == seen.count("close") + seen.count("close_detached") == 4
            seen.clear()
    finally:
        for name, listener in listeners.items() if wide is not None else ():
            event.remove(wide, name, listener)


def test_events_given_to_a_pool_are_heard(make_pool: Make) -> None:
    """``events=`` of a pool without an engine; its recreated successor hears them too."""
    seen: list[int] = []
    pool = make_pool(1, events=[(lambda raw, record: seen.append(raw.number), "connect")])
    pool.connect().close()
    pool.dispose()
    pool.recreate().connect().close()
    assert seen == [1, 2]


# == 2. Exceptions in events ============================================================================


def test_a_disconnection_error_gets_another_connection(make_pool: Make, driver: FakeDriver) -> None:
    """Raised by a ``checkout`` listener it replaces this connection, and leaves the others alone."""
    pool = make_pool(2)
    for fairy in [pool.connect(), pool.connect()]:
        fairy.close()
    stale = driver.connections[:]
    refused: list[int] = []

    @event.listens_for(pool, "checkout")
    def refuse(raw: FakeConnection, record: Any, proxy: Any) -> None:
        if raw in stale and not refused:
            refused.append(raw.number)
            raise exc.DisconnectionError

    first = pool.connect()
    assert first.dbapi_connection.number == 3
    second = pool.connect()
    assert second.dbapi_connection.number == 3 - refused[0]
    assert (driver.attempts, driver.peak) == (3, 2)
    first.close()
    second.close()


def test_an_invalidate_pool_error_replaces_them_all(make_pool: Make, driver: FakeDriver) -> None:
    """Raised by a ``checkout`` listener it also makes every other connection of before be reopened."""
    pool = make_pool(3)
    for fairy in [pool.connect() for _ in range(3)]:
        fairy.close()
    refused: list[int] = []

    @event.listens_for(pool, "checkout")
    def refuse(raw: FakeConnection, record: Any, proxy: Any) -> None:
        if not refused:
            refused.append(raw.number)
            raise exc.InvalidatePoolError

    fairies = [pool.connect() for _ in range(3)]
    assert driver.numbers() == [4, 5, 6]
    assert driver.peak == 3
    for fairy in fairies:
        fairy.close()


@pytest.mark.parametrize("error", [exc.DisconnectionError, exc.InvalidatePoolError])
def test_the_second_disconnection_error_is_the_last(
    make_pool: Make, driver: FakeDriver, error: type[Exception]
) -> None:
    """Two attempts, then an InvalidRequestError; the slot is free, and no socket is left."""
    pool = make_pool(1)
    attempts: list[int] = []

    @event.listens_for(pool, "checkout")
    def refuse(raw: FakeConnection, record: Any, proxy: Any) -> None:
        attempts.append(raw.number)
        raise error

    with pytest.raises(exc.InvalidRequestError, match="This connection is closed"):
        pool.connect()
    assert attempts == [1, 2]
    assert driver.numbers() == []
    assert pool.checkedout() == 0


def test_a_checkout_listener_that_fails_gives_the_connection_back(
    make_pool: Make, driver: FakeDriver
) -> None:
    """Any other exception goes to the caller; the connection is invalidated and its slot free."""
    pool = make_pool(1)

    @event.listens_for(pool, "checkout")
    def refuse(raw: FakeConnection, record: Any, proxy: Any) -> None:
        raise RuntimeError("not today")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="not today"):
            pool.connect()
    assert (pool.checkedout(), driver.numbers()) == (0, [])
    event.remove(pool, "checkout", refuse)
    pool.connect().close()


def test_a_connect_listener_that_fails_strands_no_socket(make_pool: Make, driver: FakeDriver) -> None:
    """What could not be configured is closed, and its slot free."""
    pool = make_pool(1)
    refuse = [RuntimeError("no such search_path"), Cancelled()]

    @event.listens_for(pool, "connect")
    def configure(raw: FakeConnection, record: Any) -> None:
        if refuse:
            raise refuse.pop()

    for error in (Cancelled, RuntimeError):
        with pytest.raises(error):
            pool.connect()
        assert (pool.checkedout(), driver.numbers()) == (0, [])
    pool.connect().close()


def test_a_reset_that_fails_closes_the_connection(
    make_pool: Make, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """Who closes sees nothing of it: it is logged, and the connection is returned without a socket."""
    pool = make_pool(1)

    @event.listens_for(pool, "reset")
    def reset(raw: FakeConnection, record: Any, state: Any) -> None:
        raise RuntimeError("the server is gone")

    pool.connect().close()
    assert (pool.checkedin(), driver.numbers()) == (1, [])
    assert "Exception during reset or similar" in caplog.text
    event.remove(pool, "reset", reset)
    pool.connect().close()


def test_a_close_that_fails_is_logged_and_frees_the_slot(
    make_pool: Make, driver: FakeDriver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that can't close what is broken is no concern of who invalidates it."""
    pool = make_pool(1)
    fairy = pool.connect()

    def close() -> None:
        raise FakeDriver.OperationalError("it is broken")

    monkeypatch.setattr(fairy.dbapi_connection, "close", close)
    fairy.invalidate()
    assert "terminating connection" in caplog.text or "closing connection" in caplog.text  # 2.0.0
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)
    assert pool.connect().dbapi_connection.number == 2


def test_a_checkin_listener_that_fails_loses_no_slot(make_pool: Make, driver: FakeDriver) -> None:
    """Its exception goes to who closes; the connection is closed and its slot free at once.

    Also while somebody keeps the exception, whose traceback refers to the record.
    """
    pool = make_pool(1)
    errors = [RuntimeError("no such metric"), KeyboardInterrupt(), Cancelled()]
    kept: list[BaseException] = []

    @event.listens_for(pool, "checkin")
    def checkin(raw: FakeConnection, record: Any) -> None:
        if errors:
            raise errors.pop()

    told: list[Any] = []
    event.listen(pool, "invalidate", lambda raw, record, error: told.append(error))
    while errors:
        fairy = pool.connect()
        with pytest.raises(type(errors[-1])) as raised:
            fairy.close()
        kept.append(raised.value)
        assert (pool.checkedout(), pool.checkedin(), driver.numbers()) == (0, 1, [])
        assert told == kept
    fairy.close()  # the second time nothing happens
    pool.connect().close()
    assert len(kept) == 3
    assert driver.peak == 1


def test_a_finalize_callback_that_fails_loses_no_slot(
    make_engine: Make, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The isolation level can't be reset: nobody gets the connection as it is, and its slot is free."""
    engine = make_engine(1)
    monkeypatch.setattr(FakeDialect, "get_isolation_level_values", lambda *_: ["AUTOCOMMIT"], raising=False)
    monkeypatch.setattr(FakeDialect, "set_isolation_level", lambda *_: None, raising=False)

    def reset(*_: Any) -> None:
        raise RuntimeError("the server is gone")

    monkeypatch.setattr(FakeDialect, "reset_isolation_level", reset, raising=False)
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(RuntimeError, match="gone"):
        connection.close()
    pool: Any = engine.pool
    assert (pool.checkedout(), pool.checkedin(), driver.numbers()) == (0, 1, [])
    engine.connect().close()


def test_a_close_listener_that_fails_stops_no_dispose(make_pool: Make, driver: FakeDriver) -> None:
    """All idle connections are closed, also those after the one whose listener failed."""
    pool = make_pool(3)
    for fairy in [pool.connect() for _ in range(3)]:
        fairy.close()

    @event.listens_for(pool, "close")
    def close(raw: FakeConnection, record: Any) -> None:
        raise RuntimeError("no such metric")

    pool.dispose()
    assert (driver.numbers(), pool.checkedin(), pool.checkedout()) == ([], 0, 0)


def test_an_invalidation_that_fails_after_a_failed_checkout_loses_no_slot(make_pool: Make) -> None:
    """A ``checkout`` listener fails, and so does the ``invalidate`` listener that this calls for."""
    pool = make_pool(1)
    armed = [True]

    def fail(*args: Any) -> None:
        if armed:
            raise RuntimeError("no")

    event.listen(pool, "checkout", fail)
    event.listen(pool, "invalidate", fail)
    with pytest.raises(RuntimeError):
        pool.connect()
    armed.clear()
    gc.collect()  # for SQLAlchemy before 2.0.55, whose fairy is returned when it is abandoned
    assert pool.checkedout() == 0
    pool.connect().close()


class Case(NamedTuple):
    """A way through the pool, and the events on it."""

    events: str
    prepare: Callable[[Any], Any]
    """Called with the pool; what it returns is what the test holds."""
    act: Callable[[Any, Any], Any]
    """Called with the pool and that, while the listener fails."""


def _hollow(pool: Any) -> None:
    pool.connect().invalidate()


def _old(pool: Any) -> None:
    fairy = pool.connect()
    age(fairy)
    fairy.close()


def _soft(pool: Any) -> None:
    fairy = pool.connect()
    fairy.invalidate(soft=True)
    fairy.close()


def _detached(pool: Any) -> Any:
    fairy = pool.connect()
    fairy.detach()
    return fairy


def _use(pool: Any, held: Any) -> None:
    pool.connect().close()


CASES = {
    "first open": Case("first_connect connect checkout", lambda pool: None, _use),
    "reuse": Case("checkout reset checkin", lambda pool: pool.connect().close(), _use),
    "reopen what was invalidated": Case("connect checkout", _hollow, _use),
    "reopen what was invalidated softly": Case("close connect checkout", _soft, _use),
    "recycle": Case("close connect checkout", _old, _use),
    "pre_ping": Case("invalidate close connect checkout", lambda pool: pool.connect().close(), _use),
    "invalidate": Case(
        "invalidate close checkin", lambda pool: pool.connect(), lambda pool, held: held[0].invalidate()
    ),
    "invalidate softly": Case(
        "soft_invalidate", lambda pool: pool.connect(), lambda pool, held: held[0].invalidate(soft=True)
    ),
    "abandon": Case("reset checkin", lambda pool: pool.connect(), lambda pool, held: held.clear()),
    "detach": Case("detach", lambda pool: pool.connect(), lambda pool, held: held[0].detach()),
    "close what is detached": Case("reset close_detached", _detached, lambda pool, held: held[0].close()),
    "dispose": Case("close", lambda pool: pool.connect().close(), lambda pool, held: pool.dispose()),
}


def logged(name: str, error: type[BaseException]) -> bool:
    """Is it logged and nothing else?"""
    return name in {"reset", "close_detached"} and issubclass(error, Exception)


def expected_of(path: str, name: str, error: type[BaseException], once: bool) -> type[BaseException] | None:
    """What comes out of it."""
    disconnected = issubclass(error, exc.DisconnectionError)
    if name == "checkout" and disconnected:  # QueuePool counts a ping that fails as one of its two attempts
        return None if once else exc.InvalidRequestError
    if path == "pre_ping" and name in {"invalidate", "close"}:
        return error
    if path == "abandon" or logged(name, error) or (path == "dispose" and issubclass(error, Exception)):
        return None
    return error


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException]]:
    """What finalizers raised: nobody can catch it, so Python tells a hook."""
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: seen.append(told.exc_type))
    return seen


@pytest.fixture(scope="module")
def quick_collector() -> None:
    """The collector looks only at what is made from now on, so that it can be asked often."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nothing_logged() -> Iterator[None]:
    """A test's log keeps the exceptions, and with them (before SQLAlchemy 2.0.56) what was checked out."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quick_collector", "nothing_logged")
@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError, exc.DisconnectionError, exc.InvalidatePoolError, KeyboardInterrupt, Cancelled],
    ids=lambda error: error.__name__,
)
@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, case in CASES.items() for name in case.events.split()]
)
def test_no_exception_in_an_event_loses_a_slot_or_strands_a_socket(
    driver: FakeDriver,
    eventually: Eventually,
    unraisable: list[type[BaseException]],
    path: str,
    name: str,
    error: type[BaseException],
    once: bool,
) -> None:
    """Ours alone: QueuePool loses slots in some of them, in more of them the older SQLAlchemy is.

    When the exception is forgotten, the whole budget can be had, the pool has as many connections as the
    driver has open, and disposing of it closes them.
    """
    pool = QueriesPool(
        driver.connect,
        pool_size=2,
        max_overflow=0,
        timeout=0,
        recycle=60,
        pre_ping=path == "pre_ping",
        dialect=FakeDialect(dbapi=driver),  # type: ignore[arg-type]
    )
    case = CASES[path]
    raised: list[type[BaseException]] = []
    armed = False

    def fail(*args: Any) -> None:
        if armed and not (once and raised):
            raised.append(error)
            raise error

    def dead(connection: FakeConnection) -> None:
        raise FakeDriver.OperationalError("server closed the connection unexpectedly")

    event.listen(pool, name, fail)
    held = [case.prepare(pool)]
    if path == "pre_ping":
        driver.on_ping = dead
    armed, came = True, None
    try:
        case.act(pool, held)
    except BaseException as caught:
        came = type(caught)
    armed = False
    driver.on_ping = lambda connection: None
    assert raised, "the listener was not called"
    assert came is expected_of(path, name, error, once)
    # SQLAlchemy before 2.0.56 adds an AttributeError of its own.
    told = [kind for kind in unraisable if kind is error]
    assert told == ([error] if path == "abandon" and not logged(name, error) else [])
    while held and held[0] is not None:
        held.pop().close()  # as `with closing(…)` does
    held.clear()
    gc.collect()
    assert_whole(pool, eventually)
    numbers = report(pool)
    assert numbers["open"] + numbers["detached"] == len(driver.live)
    assert driver.peak <= 2 + numbers["detached"]
    pool.dispose()
    # SQLAlchemy does not close a detached connection whose reset or close listener fails: the driver's
    # destructor does.  Till then it is shown.
    assert len(driver.live) == report(pool)["detached"] <= (path == "close what is detached")


def test_a_proxy_whose_checkin_failed_has_no_hold_on_the_record(driver: FakeDriver) -> None:
    """Ours alone: by then the record may be somebody else's, whose connection is none of its business."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    errors = [RuntimeError("no such metric")]

    @event.listens_for(pool, "checkin")
    def checkin(raw: FakeConnection, record: Any) -> None:
        if errors:
            raise errors.pop()

    failed = pool.connect()
    with pytest.raises(RuntimeError):
        failed.close()
    other = pool.connect()
    with pytest.warns(exc.SAWarning, match="already-closed"):
        failed.invalidate()
    assert (pool.checkedout(), driver.numbers()) == (1, [2])
    other.close()


# == 3. Invalidation and age ============================================================================


def test_an_invalidated_connection_is_closed_and_reopens_in_its_record(
    make_pool: Make, driver: FakeDriver
) -> None:
    """``record_info`` is the record's and stays, ``info`` is the connection's and goes."""
    pool = make_pool(1)
    fairy = pool.connect()
    fairy.info["of"] = "connection 1"
    fairy.record_info["of"] = "the record"
    fairy.invalidate()
    assert not fairy.is_valid
    assert (pool.checkedin(), pool.checkedout(), driver.numbers()) == (1, 0, [])
    fairy.close()
    with pytest.warns(exc.SAWarning, match="already-closed"):
        fairy.invalidate()
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    fairy = pool.connect()
    assert (fairy.info, fairy.record_info) == ({}, {"of": "the record"})
    fairy.info["of"] = "connection 2"
    fairy.close()
    fairy = pool.connect()
    assert (fairy.info, fairy.record_info) == ({"of": "connection 2"}, {"of": "the record"})
    fairy.close()


@pytest.mark.parametrize("through", ["soft", "recycle", "pool-wide", "pre_ping"])
def test_what_is_replaced_at_its_checkout_is_closed_before_the_next_opens(
    make_engine: Make, driver: FakeDriver, through: str
) -> None:
    """Soft invalidation, age, a disconnect elsewhere, a ping without answer: never two sockets for one."""
    engine = make_engine(1, pool_recycle=60, pool_pre_ping=True)
    pool: Any = engine.pool
    fairy = pool.connect()
    fairy.info["of"], fairy.record_info["of"] = "connection 1", "the record"
    if through == "soft":
        fairy.invalidate(soft=True)
        assert fairy.is_valid
    elif through == "recycle":
        age(fairy, 61)
    fairy.close()
    assert (driver.numbers(), pool.checkedin()) == ([1], 1)
    if through == "pool-wide":
        inside.invalidate_all(pool, None)
    elif through == "pre_ping":

        def dead(connection: FakeConnection) -> None:
            if connection.number == 1:
                raise FakeDriver.OperationalError("server closed the connection unexpectedly")

        driver.on_ping = dead
    for _ in range(2):  # once is enough
        fairy = pool.connect()
        assert driver.events == ["open 1", "close 1", "open 2"]
        assert (fairy.info, fairy.record_info) == ({}, {"of": "the record"})
        assert (pool.checkedin(), pool.checkedout()) == (0, 1)
        fairy.close()


def test_what_is_young_enough_is_not_recycled(make_pool: Make, driver: FakeDriver) -> None:
    """Nor is anything with ``recycle=-1``, which is the default."""
    for recycle, seconds in ((60, 50.0), (-1, 1e6)):
        pool = make_pool(1, recycle=recycle)
        fairy = pool.connect()
        age(fairy, seconds)
        fairy.close()
        again = pool.connect()
        assert again.dbapi_connection is driver.connections[-1]
        again.close()
    assert driver.attempts == 2


def test_a_connection_is_pinged_when_it_is_used_again(make_engine: Make, driver: FakeDriver) -> None:
    """At every checkout but that for which it was opened."""
    engine = make_engine(1, pool_pre_ping=True)
    for pings in range(3):
        engine.connect().close()
        assert driver.connections[0].calls["ping"] == pings


def test_a_ping_without_answer_replaces_them_all(make_engine: Make, driver: FakeDriver) -> None:
    """The server was restarted: the others are replaced at their next checkout, without a ping of theirs."""
    engine = make_engine(3, pool_pre_ping=True)
    for connection in [engine.connect() for _ in range(3)]:
        connection.close()

    def dead(connection: FakeConnection) -> None:
        if connection.number <= 3:
            raise FakeDriver.OperationalError("server closed the connection unexpectedly")

    driver.on_ping = dead
    connections = [engine.connect() for _ in range(3)]
    assert driver.numbers() == [4, 5, 6]
    assert sum(connection.calls["ping"] for connection in driver.connections) == 1
    assert driver.peak == 3
    for connection in connections:
        connection.close()


def test_a_ping_that_fails_otherwise_is_an_error(make_engine: Make, driver: FakeDriver) -> None:
    """An exception that is no disconnect goes to the caller; the slot is free."""
    engine = make_engine(1, pool_pre_ping=True)
    engine.connect().close()

    def broken(connection: FakeConnection) -> None:
        raise LookupError("no such function")

    driver.on_ping = broken
    with pytest.raises(LookupError):
        engine.connect()
    pool: Any = engine.pool
    assert (pool.checkedout(), driver.numbers()) == (0, [])
    engine.connect().close()


def test_a_reconnect_that_fails_leaves_the_record_to_the_next(make_pool: Make, driver: FakeDriver) -> None:
    """The caller gets the driver's error, and the next one tries again."""
    pool = make_pool(1)
    pool.connect().invalidate()
    driver.failures = 2
    for _ in range(2):
        with pytest.raises(FakeDriver.OperationalError):
            pool.connect()
        assert pool.checkedout() == 0
    pool.connect().close()
    assert driver.peak == 1


def test_a_connection_invalidated_by_its_record_is_the_same(make_pool: Make, driver: FakeDriver) -> None:
    """Listeners have the record and not the proxy: it closes the socket, and its slot is free with it."""
    pool = make_pool(1)

    @event.listens_for(pool, "reset")
    def reset(raw: FakeConnection, record: Any, state: Any) -> None:
        record.invalidate()

    pool.connect().close()
    assert (pool.checkedin(), pool.checkedout(), driver.numbers()) == (1, 0, [])
    pool.connect().close()
    assert driver.peak == 1


@pytest.mark.parametrize(
    "through", ["hard", "soft", "recycle", "pool-wide", "pre_ping", "retry", "do_connect"]
)
def test_every_way_through_sqlalchemy_is_counted_bounded_and_shown(driver: FakeDriver, through: str) -> None:
    """Ours alone: the seams.  At each opening and closing there is room for it, and the report knows it."""
    engine = create_engine(
        f"fake://host/seam_{next(_numbers)}",
        module=driver,
        poolclass=QueriesPool,
        max_size=1,
        pool_timeout=0,
        pool_recycle=60,
        pool_pre_ping=through == "pre_ping",
    )
    pool: Any = engine.pool
    shown: list[tuple[int, int]] = []
    refused: list[int] = []

    def look(*args: Any) -> None:
        # In a `close` event the socket is still open, in a `connect` event it is open already.
        shown.append((report(pool)["open"] + report(pool)["opening"], len(driver.live)))

    @event.listens_for(pool, "checkout")
    def checkout(raw: FakeConnection, record: Any, proxy: Any) -> None:
        if through == "retry" and len(refused) < 1:
            refused.append(raw.number)
            raise exc.InvalidatePoolError

    if through == "do_connect":
        event.listen(engine, "do_connect", lambda *args: driver.connect())
    event.listen(pool, "close", look)
    event.listen(pool, "connect", look)
    for _ in range(3):
        fairy: Any = pool.connect()
        if through in {"hard", "do_connect"}:
            fairy.invalidate()
            assert (report(pool)["open"], driver.live) == (0, set())
        elif through == "soft":
            fairy.invalidate(soft=True)
        elif through == "recycle":
            age(fairy, 61)
        fairy.close()
        if through == "pool-wide":
            inside.invalidate_all(pool, None)
        elif through == "pre_ping":
            last = len(driver.connections)

            def dead(connection: FakeConnection, last: int = last) -> None:
                if connection.number <= last:
                    raise FakeDriver.OperationalError("server closed the connection unexpectedly")

            driver.on_ping = dead
        refused.clear()
    assert shown == [(1, 1)] * len(shown)
    assert len(driver.connections) >= 3
    assert driver.peak == 1
    engine.dispose()
    assert (report(pool)["open"], driver.live) == (0, set())


# == 4. Reset and isolation =============================================================================

RESETS = [
    ({}, {"rollback": 1}),
    ({"reset_on_return": "rollback"}, {"rollback": 1}),
    ({"reset_on_return": True}, {"rollback": 1}),
    ({"reset_on_return": "commit"}, {"commit": 1}),
    ({"reset_on_return": None}, {}),
    ({"reset_on_return": "none"}, {}),
    ({"reset_on_return": False}, {}),
]


@pytest.mark.parametrize(("kw", "calls"), RESETS, ids=lambda value: str(value))
def test_reset_on_return_in_all_its_values(
    make_pool: Make, driver: FakeDriver, kw: dict[str, Any], calls: dict[str, int]
) -> None:
    """What is asked of a connection that is returned, closed or abandoned, also after a dispose."""
    pool = make_pool(1, **kw)
    pool.connect().close()
    assert driver.connections[0].calls == calls
    driver.connections[0].calls.clear()
    pool.connect()
    gc.collect()
    assert driver.connections[0].calls == calls
    pool.dispose()
    pool.recreate().connect().close()
    assert driver.connections[1].calls == calls


def test_reset_on_return_means_something(make_pool: Make, make_engine: Make) -> None:
    """Anything else is an ArgumentError, of the pool and of an engine."""
    with pytest.raises(exc.ArgumentError, match="reset_on_return"):
        make_pool(1, reset_on_return="perhaps")
    with pytest.raises(exc.ArgumentError, match="reset_on_return"):
        make_engine(1, pool_reset_on_return="perhaps")


def test_a_reset_of_ones_own(make_engine: Make, driver: FakeDriver) -> None:
    """SQLAlchemy's recipe: no reset by the pool, and a ``reset`` listener that does it."""
    engine = make_engine(1, pool_reset_on_return=None)
    engine.connect().close()

    @event.listens_for(engine, "reset")
    def reset(raw: FakeConnection, record: Any, state: PoolResetState) -> None:
        if not state.terminate_only:
            raw.calls["DISCARD ALL"] += 1
        raw.rollback()

    driver.connections[0].calls.clear()
    engine.raw_connection().close()
    assert driver.connections[0].calls == {"DISCARD ALL": 1, "rollback": 1}
    fairy = engine.raw_connection()
    fairy.detach()
    fairy.close()
    assert driver.connections[0].calls == {"DISCARD ALL": 1, "rollback": 2, "close": 1}


# == 5. Logging =========================================================================================


@pytest.fixture
def loggers(pool_class: Any) -> Iterator[str]:
    """The name of the logger; SQLAlchemy's handlers for ``echo`` are taken off at the end."""
    name = "sqlalchemy.pool.QueriesPool" if pool_class is QueriesPool else "sqlalchemy.pool.impl.QueuePool"
    yield name
    for known in [name, f"{name}.mine"]:
        logging.getLogger(known).handlers.clear()


def a_life(pool: Any) -> None:
    """A checkout, a soft and a hard invalidation, a dispose."""
    fairy = pool.connect()
    fairy.invalidate(soft=True)
    fairy.close()
    pool.connect().invalidate()
    pool.dispose()


def logged_by(caplog: pytest.LogCaptureFixture, name: str, level: int) -> str:
    """What one logger said, at one level."""
    return "\n".join(r.getMessage() for r in caplog.records if (r.name, r.levelno) == (name, level))


INFO = [
    "Soft Invalidate connection",
    "recycling",
    "Invalidate connection",
    "Pool disposed",
    "Pool recreating",
]
DEBUG = [
    "Created new connection",
    "checked out from pool",
    "being returned to pool",
    "rollback-on-return",
    "losing connection",
]


@pytest.mark.parametrize("echo", [None, True, "debug"])
@pytest.mark.parametrize("logging_name", [None, "mine"])
def test_echo_pool_says_what_it_does(
    make_engine: Make, loggers: str, caplog: pytest.LogCaptureFixture, echo: Any, logging_name: str | None
) -> None:
    """Nothing, INFO, or DEBUG too; to the logger of the class, with the name stated; after a dispose too."""
    engine = make_engine(1, echo_pool=echo, pool_logging_name=logging_name)
    name = loggers if logging_name is None else f"{loggers}.{logging_name}"
    for _ in range(2):
        a_life(engine.pool)
        engine.dispose()
        info, debug = logged_by(caplog, name, logging.INFO), logged_by(caplog, name, logging.DEBUG)
        assert [words in info for words in INFO] == [bool(echo)] * len(INFO), info
        assert [words in debug for words in DEBUG] == [echo == "debug"] * len(DEBUG), debug
        if echo is None:
            assert not [r for r in caplog.records if r.name.startswith("sqlalchemy.pool")]
        caplog.clear()


def test_the_logger_sqlalchemy_pool_turns_it_on(
    make_pool: Make, loggers: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As SQLAlchemy's documentation has it: ``logging.getLogger("sqlalchemy.pool").setLevel(…)``."""
    caplog.set_level(logging.DEBUG, "sqlalchemy.pool")
    a_life(make_pool(1))
    assert "checked out from pool" in logged_by(caplog, loggers, logging.DEBUG)
    assert "Invalidate connection" in logged_by(caplog, loggers, logging.INFO)


# == 6. Raw, detached, abandoned ========================================================================


def test_a_raw_connection_is_the_drivers_own(make_engine: Make, driver: FakeDriver) -> None:
    """``engine.raw_connection()``: the driver's connection behind a proxy, which is returned when closed."""
    engine = make_engine(1)
    pool: Any = engine.pool
    with closing(engine.raw_connection()) as fairy:
        raw = driver.connections[0]
        assert fairy.dbapi_connection is fairy.driver_connection is raw
        assert fairy.number == 1  # what the proxy does not know it asks the connection
        assert record_of(fairy).driver_connection is raw
        assert (pool.checkedout(), fairy.is_valid, fairy.is_detached) == (1, True, False)
    assert (pool.checkedout(), pool.checkedin(), driver.numbers()) == (0, 1, [1])
    with engine.connect() as connection:
        assert connection.connection.driver_connection is raw


def test_closing_twice_gives_back_once(make_pool: Make) -> None:
    """The second close() changes nothing, though somebody else has the connection by now."""
    pool = make_pool(1)
    first = pool.connect()
    first.close()
    second = pool.connect()
    first.close()
    assert (pool.checkedout(), pool.checkedin()) == (1, 0)
    second.close()
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)


def test_a_record_that_is_returned_twice_is_returned_once(make_pool: Make) -> None:
    """SQLAlchemy warns of it, and the connection is nobody's twice."""
    pool = make_pool(2)
    fairy = pool.connect()
    record = record_of(fairy)
    fairy.close()
    with pytest.warns(exc.SAWarning, match="Double checkin"):
        record.checkin()
    both = [pool.connect(), pool.connect()]
    assert both[0].dbapi_connection is not both[1].dbapi_connection
    for fairy in both:
        fairy.close()
    assert (pool.checkedin(), pool.checkedout()) == (2, 0)


def test_parameters_may_be_given_by_position(pool_class: Any, driver: FakeDriver) -> None:
    """``pool_size``, ``max_overflow``, ``timeout``, ``use_lifo``."""
    pool = pool_class(driver.connect, 2, 1, 0, True)
    assert pool.timeout() == 0
    three = [pool.connect() for _ in range(3)]
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    last = three[1].dbapi_connection
    for fairy in three[:2]:
        fairy.close()
    assert pool.connect().dbapi_connection is last


def test_a_subclass_may_have_parameters_of_its_own(pool_class: Any, driver: FakeDriver) -> None:
    """It sets some whatever it was asked for, or has other defaults, or passes all of them on by position."""

    class Sets(pool_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kw: Any) -> None:
            kw |= {"pool_size": 2, "max_overflow": 0, "timeout": 0}
            super().__init__(*args, **kw)

    class Passes(pool_class):  # type: ignore[misc]
        def __init__(
            self, creator: Any, pool_size: int = 2, max_overflow: int = 0, timeout: float = 0, **kw: Any
        ) -> None:
            super().__init__(creator, pool_size, max_overflow, timeout, **kw)

    for kind in (Sets, Passes):
        engine = create_engine(f"fake://host/contract_{next(_numbers)}", module=driver, poolclass=kind)
        engine.connect().close()
        engine.dispose()  # it makes another one of the class
        assert type(engine.pool) is kind
        both = [engine.connect(), engine.connect()]
        with pytest.raises(exc.TimeoutError):
            engine.connect()
        for connection in both:
            connection.close()
        engine.dispose()


@pytest.mark.parametrize(
    "stated",
    [
        {"pool_pre_ping": None, "pool_use_lifo": None, "pool_recycle": -5, "pool_reset_on_return": 0},
        {"pool_pre_ping": "", "pool_use_lifo": "", "pool_recycle": -2.5, "pool_reset_on_return": 1},
    ],
    ids=str,
)
def test_what_python_takes_for_a_no_is_one(make_engine: Make, stated: dict[str, Any]) -> None:
    """An environment variable that is not set is None, or an empty text."""
    engine = make_engine(1, **stated)
    engine.connect().close()
    with engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
    assert (raw.number, raw.calls["ping"]) == (1, 0)


def test_an_exhausted_pool_raises_sqlalchemys_timeout(make_pool: Make) -> None:
    """TimeoutError, with the code of the error's page."""
    pool = make_pool(1)
    fairy = pool.connect()
    with pytest.raises(exc.TimeoutError) as raised:
        pool.connect()
    assert raised.value.code == "3o7r"
    fairy.close()


def test_the_numbers_follow_the_connections(make_pool: Make) -> None:
    """size, checkedin, checkedout, overflow and timeout, which tools for monitoring read."""
    pool = make_pool(2, timeout=3)

    def numbers() -> tuple[Any, ...]:
        return pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow(), pool.timeout()

    assert numbers() == (2, 0, 0, -2, 3)
    first, second = pool.connect(), pool.connect()
    assert numbers() == (2, 0, 2, 0, 3)
    first.close()
    assert numbers() == (2, 1, 1, 0, 3)
    second.invalidate()
    assert numbers() == (2, 2, 0, 0, 3)
    pool.dispose()
    assert numbers() == (2, 0, 0, -2, 3)


def test_the_connection_that_was_returned_last_is_used_first(make_pool: Make, driver: FakeDriver) -> None:
    """So that those that are not needed age out."""
    pool = make_pool(3)
    for fairy in [pool.connect() for _ in range(3)]:
        fairy.close()
    assert pool.connect().dbapi_connection is driver.connections[2]


@pytest.mark.parametrize(("use_lifo", "number"), [(True, 3), (False, 1)])
def test_use_lifo_says_which_is_used_first(make_pool: Make, use_lifo: bool, number: int) -> None:
    """``pool_use_lifo``, in both directions."""
    pool = make_pool(3, use_lifo=use_lifo)
    for fairy in [pool.connect() for _ in range(3)]:
        fairy.close()
    assert pool.connect().dbapi_connection.number == number


def test_what_is_returned_above_pool_size_stays(make_pool: Make, driver: FakeDriver) -> None:
    """``max_size`` is one number: whatever is within it may stay idle, for ``idle_ttl``."""
    pool = make_pool(1, max_overflow=1)
    for fairy in [pool.connect(), pool.connect()]:
        fairy.close()
    assert (pool.checkedin(), driver.numbers()) == (2, [1, 2])
    assert (pool.size(), pool.overflow()) == (2, 0)


def test_detaching_frees_the_slot(make_engine: Make, driver: FakeDriver) -> None:
    """``Connection.detach()``: it is its holder's, has no record, and is closed when it is closed."""
    engine = make_engine(1)
    pool: Any = engine.pool
    connection = engine.connect()
    connection.info["of"] = "connection 1"
    connection.detach()
    fairy: Any = connection.connection
    assert (fairy.is_detached, fairy.is_valid, fairy.record_info) == (True, True, None)
    assert connection.info == {"of": "connection 1"}
    assert pool.checkedout() == 0
    engine.connect().close()
    assert driver.numbers() == [1, 2]
    connection.close()
    assert driver.numbers() == [2]
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)


def test_a_detached_connection_can_be_invalidated(make_pool: Make, driver: FakeDriver) -> None:
    """It has no record to reopen it: no event, no effect on the pool; the driver closes it."""
    pool = make_pool(1)
    heard = Recorder(driver, pool)
    fairy = pool.connect()
    fairy.detach()
    heard.news()
    fairy.invalidate()
    assert heard.news() == ""
    assert pool.checkedout() == 0
    pool.connect().close()


def test_a_detached_connection_leaves_no_record_in_the_pool(make_pool: Make) -> None:
    """Its slot is free and its record gone: nothing is checked in, and a new record has no record_info."""
    pool = make_pool(1)
    fairy = pool.connect()
    fairy.record_info["of"] = "the record"
    fairy.detach()
    checked_in = pool.checkedin()
    again = pool.connect()
    assert (checked_in, again.record_info) == (0, {})
    again.close()
    fairy.close()


@pytest.mark.parametrize("cycle", [False, True])
def test_what_nobody_refers_to_is_returned(make_pool: Make, driver: FakeDriver, cycle: bool) -> None:
    """The collector gives it back: reset and with its events, as if it had been closed."""
    pool = make_pool(1)
    heard = Recorder(driver, pool)
    fairy = pool.connect()
    heard.news()
    if cycle:
        Ring(fairy)
    del fairy
    heard.calls.clear()  # the arguments of `checkout` were the proxy itself
    gc.collect()
    assert heard.news() == "<reset> 1, <checkin> 1"
    assert driver.connections[0].calls["rollback"] == 1
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)


def test_an_abandoned_engine_connection_is_returned(make_engine: Make, driver: FakeDriver) -> None:
    """A Connection in the middle of a transaction, in a cycle."""
    engine = make_engine(1)
    connection = engine.connect()
    connection.begin()
    Ring(connection)
    del connection
    gc.collect()
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    engine.connect().close()
    assert driver.attempts == 1


# == 7. Engines and their settings ======================================================================


def test_a_pool_can_be_given_as_an_instance(pool_class: Any, driver: FakeDriver) -> None:
    """``create_engine(pool=…)``: its listeners are heard, it exhausts, and it has a successor."""
    pool = pool_class(driver.connect, pool_size=1, max_overflow=0, timeout=0)
    heard = Recorder(driver, pool)
    engine = create_engine("fake://", module=driver, pool=pool)
    assert engine.pool is pool
    with engine.connect():
        assert pool.checkedout() == 1  # type: ignore[attr-defined]
        with pytest.raises(exc.TimeoutError):
            engine.connect()
    assert "<checkin> 1" in heard.news()
    engine.dispose()
    assert engine.pool is not pool
    engine.connect().close()
    assert "<connect> 2" in heard.news()
    assert type(engine.pool) is pool_class


def test_dispose_closes_what_is_idle(make_engine: Make, driver: FakeDriver) -> None:
    """And gives the engine a new, empty pool of the same kind."""
    engine = make_engine(2)
    old: Any = engine.pool
    for connection in [engine.connect(), engine.connect()]:
        connection.close()
    engine.dispose()
    new: Any = engine.pool
    assert driver.numbers() == []
    assert new is not old
    assert (type(new), new.size(), new.checkedin()) == (type(old), 2, 0)
    engine.connect().close()
    assert driver.numbers() == [3]


def test_what_is_out_over_a_dispose_goes_on_working(make_engine: Make, driver: FakeDriver) -> None:
    """A dispose takes nothing out of anybody's hand."""
    engine = make_engine(2)
    connection = engine.connect()
    engine.dispose()
    assert driver.numbers() == [1]
    assert connection.connection.dbapi_connection is driver.connections[0]
    connection.close()


def test_what_is_out_over_a_dispose_is_closed_when_it_is_returned(
    make_engine: Make, driver: FakeDriver
) -> None:
    """Its pool is not used any more, so there is no use in keeping it."""
    engine = make_engine(2)
    connection = engine.connect()
    engine.dispose()
    connection.close()
    assert driver.numbers() == []


def test_what_is_out_over_a_dispose_still_counts(make_engine: Make) -> None:
    """The limit is the database's, which has the connection open."""
    engine = make_engine(1)
    connection = engine.connect()
    engine.dispose()
    with pytest.raises(exc.TimeoutError):
        engine.connect()
    connection.close()
    engine.connect().close()


def test_dispose_without_close_closes_nothing(make_engine: Make, driver: FakeDriver) -> None:
    """SQLAlchemy's recipe after a fork: the child leaves the parent's sockets alone."""
    engine = make_engine(2)
    engine.connect().close()
    old: Any = engine.pool
    engine.dispose(close=False)
    assert (driver.numbers(), old.checkedin()) == ([1], 1)
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection is driver.connections[1]
    assert driver.numbers() == [1, 2]
    old.dispose()


def test_shards_share_the_engines_pool(make_engine: Make, driver: FakeDriver) -> None:
    """``engine.execution_options()`` is an engine with the same pool, also after either was disposed of."""
    engine = make_engine(1)
    shard = engine.execution_options(schema_translate_map={None: "shard"})
    for disposed in (shard, engine):
        assert shard.pool is engine.pool
        with shard.connect(), pytest.raises(exc.TimeoutError):
            engine.connect()
        old = engine.pool
        disposed.dispose()
        assert driver.numbers() == []
        assert engine.pool is not old
        assert shard.pool is engine.pool


SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"isolation_level": "SERIALIZABLE"},
    "two": {"isolation_level": "AUTOCOMMIT"},
    "three": {},
}


class Writer:
    """Writes its name into JSON.  No function: psycopg 3 takes functions of the same code for the same."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: Any) -> str:
        return json.dumps({"written by": self.name, **value})


class Reader(Writer):
    """Reads JSON, and says that it did."""

    def __call__(self, value: Any) -> Any:
        return self.name, json.loads(value)


@pytest.mark.parametrize("size", [1, 3])
def test_engines_of_one_database_never_see_one_anothers_settings(
    make_engine: Make, database: URL, size: int
) -> None:
    """``connect`` listeners, JSON codecs, isolation levels: also where connections give way to each other."""
    engines: dict[str, Engine] = {}
    for name, kw in SETTINGS.items():
        codecs = {"json_serializer": Writer(name), "json_deserializer": Reader(name)}
        engine = engines[name] = make_engine(size, database, **codecs, **kw)

        @event.listens_for(engine, "connect")
        def configure(raw: Any, record: Any, name: str = name) -> None:
            with raw.cursor() as cursor:
                cursor.execute(f"SET search_path TO {name}")
            raw.commit()
            record.record_info["of"] = name

    levels = {"one": "serializable", "two": "read committed", "three": "read committed"}
    for name in [*engines, *reversed(engines), *engines]:
        with engines[name].connect() as connection:
            assert connection.scalar(text("SHOW search_path")) == name
            assert connection.scalar(text("SHOW transaction_isolation")) == levels[name]
            value = connection.scalar(select(cast({"a": 1}, JSON)))
            assert value == (name, {"written by": name, "a": 1})
            fairy: Any = connection.connection
            assert fairy.dbapi_connection.autocommit is (name == "two")
            assert fairy.record_info == {"of": name}


# == 8. Any DBAPI =======================================================================================

sockets = 0


class Hostile:
    """A DBAPI connection that can do what PEP 249 says that it can, and nothing else."""

    __slots__ = ("closed",)  # no __dict__, no __weakref__

    def __init__(self) -> None:
        global sockets
        sockets += 1
        self.closed = False

    def _refuse(self, *args: object) -> Any:
        raise AssertionError("nobody may ask for that")

    __eq__ = __ne__ = __lt__ = __bool__ = __len__ = __iter__ = __contains__ = __copy__ = _refuse
    __hash__ = _refuse

    def rollback(self) -> None: ...

    def commit(self) -> None: ...

    def close(self) -> None:
        global sockets
        sockets -= not self.closed
        self.closed = True


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket is open yet."""
    monkeypatch.setattr(sys.modules[__name__], "sockets", 0)


@pytest.mark.usefixtures("hostile")
def test_nothing_is_assumed_of_a_connection(make_pool: Make) -> None:
    """No weak reference, hash, equality, order, truth value, length: through all that a pool does with it."""
    pool = make_pool(2, Hostile)
    fairy = pool.connect()
    assert type(fairy.dbapi_connection) is Hostile
    fairy.close()
    pool.connect().invalidate()
    assert sockets == 0
    fairy = pool.connect()
    fairy.invalidate(soft=True)
    fairy.close()
    pool.connect().close()
    both = [pool.connect(), pool.connect()]
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    both.pop().detach()  # and nobody closes it
    assert sockets == 2
    both.pop().detach()
    fairy = pool.connect()
    fairy.detach()
    fairy.close()
    assert sockets == 2
    pool.connect()  # abandoned
    gc.collect()
    assert pool.checkedout() == 0
    assert sockets == 3
    pool.dispose()
    assert sockets == 2


@pytest.mark.usefixtures("hostile")
def test_nothing_is_assumed_where_engines_share(eventually: Eventually) -> None:
    """Ours alone: connections that give way, that are idle for too long, that sessions of queries lock."""

    class Session:
        """Who locks."""

    pid, clock = f"hostile-{next(_numbers)}", FakeClock()
    PoolManager.create(pid, max_size=2, idle_ttl=10, time_method=clock)
    one = QueriesPool(Hostile, pool_id=pid, timeout=0)
    two = QueriesPool(Hostile, pool_id=pid, timeout=0)
    for fairy in [one.connect(), one.connect()]:
        fairy.close()
    clock.now += 1
    for fairy in [two.connect(), two.connect()]:
        fairy.close()
    assert (sockets, one.checkedin(), two.checkedin()) == (2, 0, 2)
    session, fairy = Session(), two.connect()
    raw = fairy.dbapi_connection
    fairy.close()
    PoolManager.lock(pid, raw, session)
    assert report(two)["locked"] == 1
    PoolManager.free(pid, raw)
    clock.now += 11
    inside.upkeep(two).sweep()
    eventually(lambda: sockets == 0 and settled(inside.shared(two)), "the idle ones are closed")
    assert_whole(one, eventually)

    @event.listens_for(one, "close")
    def close(raw: Any, record: Any) -> None:
        raise RuntimeError("no such metric")

    one.dispose()
    assert sockets == 0


@pytest.mark.parametrize("what", ["one positional", "connection_record", "a class", "partial"])
def test_a_creator_of_any_shape(make_pool: Make, driver: FakeDriver, what: str) -> None:
    """Without arguments, or with the record; functions, classes and what :mod:`functools` makes of them."""
    records: list[Any] = []

    def with_record(record: Any) -> Any:
        records.append(record)
        return driver.connect()

    def named(connection_record: Any = None) -> Any:
        records.append(connection_record)
        return driver.connect()

    class Connection(FakeConnection):
        def __init__(self) -> None:
            self.__dict__.update(driver.connect().__dict__)

    creators: dict[str, Any] = {
        "one positional": with_record,
        "connection_record": named,
        "a class": Connection,
        "partial": functools.partial(driver.connect),
    }
    pool = make_pool(1, creators[what])
    fairy = pool.connect()
    assert records == ([record_of(fairy)] if what in {"one positional", "connection_record"} else [])
    fairy.close()
    assert driver.attempts == 1


def test_a_mock_of_a_drivers_connection_is_asked_for_nothing(make_pool: Make) -> None:
    """It says that it is psycopg2's, has a ``fileno()`` that returns a mock, and counts its calls."""
    made: list[mock.MagicMock] = []

    def create() -> Any:
        made.append(mock.MagicMock(spec=psycopg2.extensions.connection))
        return made[-1]

    pool = make_pool(1, create)
    pool.connect().close()
    pool.connect().invalidate()
    pool.connect().close()
    pool.dispose()
    (rolled_back, closed) = mock.call.rollback(), mock.call.close()
    assert [connection.mock_calls for connection in made] == [[rolled_back, closed], [rolled_back, closed]]


def test_a_creator_that_returns_the_same_connection_again(make_pool: Make) -> None:
    """Nothing is gained by it, but no slot is lost either."""
    raw = FakeDriver().connect()
    raw.close = lambda: None
    pool = make_pool(2, lambda: raw)
    for _ in range(3):
        both = [pool.connect(), pool.connect()]
        assert both[0].dbapi_connection is both[1].dbapi_connection is raw
        both.pop().invalidate()
        both.pop().close()
    assert (pool.checkedout(), pool.checkedin()) == (0, 2)
    pool.dispose()
    assert (pool.checkedout(), pool.checkedin()) == (0, 0)


def test_engines_of_one_database_have_one_limit(make_engine: Make) -> None:
    """Not each of them."""
    one, two = make_engine(1), make_engine(1)
    with one.connect(), pytest.raises(exc.TimeoutError):
        two.connect()


def test_a_value_that_means_nothing_is_an_error_at_once(make_pool: Make) -> None:
    """Not when a checkout has to wait some day."""
    with pytest.raises(exc.ArgumentError):
        make_pool(1, timeout=-1)


def test_it_is_no_queuepool(make_pool: Make) -> None:
    """Listeners on that class do not hear of it."""
    heard: list[Any] = []

    def listen(*arguments: Any) -> None:
        heard.append(arguments)

    event.listen(QueuePool, "checkout", listen)
    try:
        pool = make_pool(1)
        pool.connect().close()
    finally:
        event.remove(QueuePool, "checkout", listen)
    assert not heard
    assert not isinstance(pool, QueuePool)


# == 9. SQLite ==========================================================================================


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The URL of a file."""
    return f"sqlite:///{tmp_path}/contract.db"


def test_a_file_is_used_by_many_connections_and_threads(make_engine: Make, file: str) -> None:
    """pysqlite on a file: what one writes others read, and connections wander from thread to thread."""
    engine = make_engine(2, file)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
        connection.execute(text("INSERT INTO item VALUES (1)"))
    count = "SELECT count(*) FROM item"
    with engine.connect() as connection:
        assert connection.scalar(text(count)) == 1
        with engine.connect() as other:
            assert other.scalar(text(count)) == 1
            assert type(other.connection.driver_connection) is sqlite3.Connection

    def read() -> Any:
        with engine.connect() as connection:
            return connection.scalar(text(count))

    assert Task(read).result() == 1
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (2, 0)


def test_what_was_not_committed_is_rolled_back(make_engine: Make, file: str) -> None:
    """By the Connection; by the pool for a raw one and for one that was abandoned: the file is not locked."""
    engine = make_engine(1, file)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO item VALUES (1)"))
    with closing(engine.raw_connection()) as fairy:
        fairy.cursor().execute("INSERT INTO item VALUES (2)")
    abandoned = engine.connect()
    abandoned.execute(text("INSERT INTO item VALUES (3)"))
    Ring(abandoned)
    del abandoned
    gc.collect()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM item")) == 0


def test_an_isolation_level_is_reset_on_return(make_engine: Make, file: str) -> None:
    """``Connection.execution_options(isolation_level=…)`` holds for one checkout."""
    engine = make_engine(1, file)
    with engine.connect().execution_options(isolation_level="READ UNCOMMITTED") as connection:
        assert connection.scalar(text("PRAGMA read_uncommitted")) == 1
    with engine.connect() as connection:
        assert connection.scalar(text("PRAGMA read_uncommitted")) == 0


def test_reflection_needs_one_connection(make_engine: Make, file: str) -> None:
    """``inspect(engine)`` and ``reflect()`` check out one at a time, and give it back."""
    engine = make_engine(1, file)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE parent (id integer primary key)"))
        connection.execute(text("CREATE TABLE child (id integer references parent (id))"))
    inspector = inspect(engine)
    assert sorted(inspector.get_table_names()) == ["child", "parent"]
    assert inspector.get_foreign_keys("child")[0]["referred_table"] == "parent"
    metadata = MetaData()
    metadata.reflect(engine)
    assert set(metadata.tables) == {"child", "parent"}
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)


def test_reflection_may_nest_in_a_checkout(make_engine: Make, file: str) -> None:
    """It is one connection more, unless it is made of the connection that is there."""
    engine = make_engine(2, file)
    with engine.connect() as connection:
        assert inspect(engine).get_table_names() == []
        with engine.connect():
            with pytest.raises(exc.TimeoutError):
                inspect(engine).get_table_names()
            assert inspect(connection).get_table_names() == []
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (2, 0)


MEMORY = ["sqlite://", "sqlite:///:memory:", "sqlite:///file:contract?mode=memory&uri=true"]


@pytest.mark.parametrize("url", MEMORY)
def test_a_memory_database_lives_as_long_as_its_pool(make_engine: Make, url: str) -> None:
    """What one checkout wrote the next one reads."""
    engine = make_engine(1, url)
    for number in range(5):
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS item (number int)"))
            connection.execute(text("INSERT INTO item VALUES (1)"))
            assert connection.scalar(text("SELECT count(*) FROM item")) == number + 1


@pytest.mark.parametrize("url", MEMORY)
def test_engines_never_share_a_memory_database_by_accident(make_engine: Make, url: str) -> None:
    """Two engines of one such URL are two databases, each with a connection out."""
    one, two = make_engine(1, url), make_engine(1, url)
    with one.connect() as connection, two.connect() as other:
        connection.execute(text("CREATE TABLE item (number int)"))
        assert inspect(connection).get_table_names() == ["item"]
        assert inspect(other).get_table_names() == []


def test_a_memory_database_is_never_a_second_one(make_engine: Make) -> None:
    """Whatever ``max_size`` says there is one connection: who wants a second one waits for it."""
    engine = make_engine(5, "sqlite://")
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
        with pytest.raises(exc.TimeoutError):
            engine.connect()


def test_a_memory_database_survives_a_checkout_in_another_thread(make_engine: Make) -> None:
    """With ``check_same_thread=False`` the threads take turns with the one connection."""
    engine = make_engine(5, "sqlite://", connect_args={"check_same_thread": False})
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
        with pytest.raises(exc.TimeoutError):
            Task(lambda: engine.connect().close()).result()

    def read() -> list[str]:
        with engine.connect() as connection:
            names: list[str] = inspect(connection).get_table_names()
            return names

    assert Task(read).result() == ["item"]
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["item"]


def test_a_memory_database_of_one_thread_is_no_empty_one_for_others(make_engine: Make) -> None:
    """Without ``check_same_thread=False`` pysqlite refuses, so that nobody takes another database for it."""
    engine = make_engine(5, "sqlite://")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
        raw: Any = connection.connection.driver_connection

    def read() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    with pytest.raises(exc.ProgrammingError, match="created in a thread"):
        Task(read).result()
    raw.close()  # in its own thread: SQLAlchemy, in the other one, could not


def test_a_shared_memory_database_is_shared(make_engine: Make) -> None:
    """SQLite's ``cache=shared`` is no accident: engines of that name have one database."""
    url = f"sqlite:///file:shared_{next(_numbers)}?mode=memory&cache=shared&uri=true"
    one, two = make_engine(1, url), make_engine(1, url)
    with one.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
    with two.connect() as connection:
        assert inspect(connection).get_table_names() == ["item"]


@pytest.mark.parametrize("name", ["file:shared_{}?mode=memory&", "file::memory:?"])
def test_a_shared_memory_database_has_several_connections(make_engine: Make, name: str) -> None:
    """All of one database, in all threads; the last of them that is idle stays, and with it the database."""
    url = f"sqlite:///{name.format(next(_numbers))}cache=shared&uri=true"
    engine = make_engine(3, url, connect_args={"check_same_thread": False})
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
    with engine.connect() as one, engine.connect() as two:

        def read() -> list[str]:
            with engine.connect() as three:
                names: list[str] = inspect(three).get_table_names()
                with pytest.raises(exc.TimeoutError):
                    engine.connect()
                return names

        assert inspect(one).get_table_names() == inspect(two).get_table_names() == ["item"]
        assert Task(read).result() == ["item"]
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (3, 0)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["item"]


def test_engines_of_a_shared_memory_database_do_not_wait_for_one_another(make_engine: Make) -> None:
    """Each has a limit of its own: what gave way to another engine might be the last one."""
    url = f"sqlite:///file:shared_{next(_numbers)}?mode=memory&cache=shared&uri=true"
    one, two = make_engine(1, url), make_engine(1, url)
    with one.connect(), two.connect():
        pass


# == 10. PostgreSQL, psycopg2 and psycopg 3 ==============================================================


def test_the_drivers_own_connection_is_at_hand(make_engine: Make, database: URL) -> None:
    """``driver_connection`` of what was checked out, in events too."""
    kind = psycopg.Connection if "psycopg2" not in str(database) else psycopg2.extensions.connection
    engine = make_engine(1, database)
    seen: list[Any] = []
    event.listen(engine, "connect", lambda raw, record: seen.append(record.driver_connection))
    with engine.connect() as connection:
        assert isinstance(connection.connection.driver_connection, kind)
        assert seen == [connection.connection.driver_connection]


def test_a_disconnect_replaces_them_all(
    make_engine: Make, database: URL, pg_observer: Any, eventually: Eventually
) -> None:
    """The server ended the sessions: one statement fails, and every connection is opened anew after that."""
    engine = make_engine(3, database)
    connections = [engine.connect() for _ in range(3)]
    for connection in connections[1:]:
        connection.close()
    assert pg_observer.terminate(database.database) == 3
    with pytest.raises(exc.DBAPIError) as raised:
        connections[0].execute(text("SELECT 1"))
    assert raised.value.connection_invalidated
    assert connections[0].invalidated
    connections[0].close()
    connections = [engine.connect() for _ in range(3)]
    assert [connection.scalar(text("SELECT 1")) for connection in connections] == [1, 1, 1]
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (0, 3)
    eventually(lambda: pg_observer.backends(database.database) == 3, "three backends")
    for connection in connections:
        connection.close()
    engine.dispose()
    eventually(lambda: pg_observer.backends(database.database) == 0, "no backend")


def test_a_connection_that_lost_its_server_reconnects(
    make_engine: Make, database: URL, pg_observer: Any
) -> None:
    """The same Connection, after a rollback: it holds its slot all the time."""
    engine = make_engine(1, database)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        pg_observer.terminate(database.database)
        with pytest.raises(exc.DBAPIError):
            connection.execute(text("SELECT 1"))
        connection.rollback()
        assert connection.scalar(text("SELECT 2")) == 2
        with pytest.raises(exc.TimeoutError):
            engine.connect()
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)


def test_pre_ping_sees_that_the_server_is_gone(make_engine: Make, database: URL, pg_observer: Any) -> None:
    """Nobody gets a dead connection."""
    engine = make_engine(2, database, pool_pre_ping=True)
    for connection in [engine.connect(), engine.connect()]:
        connection.close()
    pg_observer.terminate(database.database)
    with engine.connect() as connection, engine.connect() as other:
        assert connection.scalar(text("SELECT 1")) == other.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize(("reset", "count"), [("rollback", 0), ("commit", 1), (None, 0)])
def test_reset_on_return_rolls_back_or_commits(
    make_engine: Make, database: URL, pg_observer: Any, reset: str | None, count: int
) -> None:
    """What a raw connection left in a transaction; with None it is still in there for the next one."""
    engine = make_engine(1, database, pool_reset_on_return=reset)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
    with closing(engine.raw_connection()) as fairy:
        fairy.cursor().execute("INSERT INTO item VALUES (1)")
    in_transaction = pg_observer.backends(database.database, "idle in transaction")
    assert in_transaction == (1 if reset is None else 0)
    engine.dispose()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM item")) == count


def test_an_isolation_level_holds_for_one_checkout(make_engine: Make, database: URL) -> None:
    """Set by execution options, reset on return: to the server's default, or to the engine's own."""
    show = text("SHOW transaction_isolation")
    for own, default in ((None, "read committed"), ("REPEATABLE READ", "repeatable read")):
        engine = make_engine(1, database, **({} if own is None else {"isolation_level": own}))
        for level in ("SERIALIZABLE", "AUTOCOMMIT"):
            with engine.connect().execution_options(isolation_level=level) as connection:
                raw: Any = connection.connection.dbapi_connection
                assert raw.autocommit is (level == "AUTOCOMMIT")
                if level == "SERIALIZABLE":
                    assert connection.scalar(show) == "serializable"
            with engine.connect() as connection:
                assert connection.connection.dbapi_connection is raw
                assert connection.scalar(show) == default
                assert raw.autocommit is False
        shard = engine.execution_options(isolation_level="SERIALIZABLE")
        with shard.connect() as connection:
            assert connection.scalar(show) == "serializable"
        with engine.connect() as connection:
            assert connection.scalar(show) == default
        engine.dispose()


def test_savepoints(make_engine: Make, database: URL) -> None:
    """``begin_nested()`` in one checkout: what was rolled back to is gone, the rest is there."""
    engine = make_engine(1, database)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (number int)"))
        with connection.begin_nested():
            connection.execute(text("INSERT INTO item VALUES (1)"))
        inner = connection.begin_nested()
        connection.execute(text("INSERT INTO item VALUES (2)"))
        inner.rollback()
    with engine.connect() as connection:
        connection.begin_nested()
        connection.execute(text("INSERT INTO item VALUES (3)"))
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT number FROM item")).all() == [1]


@pytest.fixture(scope="module")
def pg_two_phase() -> Iterator[EmbeddedPostgres]:
    """A server that can prepare transactions, which is off by default."""
    with EmbeddedPostgres({"max_prepared_transactions": "4"}, in_memory()) as server:
        yield server


@pytest.mark.parametrize("driver_name", ["psycopg2", "psycopg"])
def test_two_phase_commits(make_engine: Make, pg_two_phase: EmbeddedPostgres, driver_name: str) -> None:
    """Prepared by one checkout, recovered and ended by another one; the connections are returned usable."""
    url = make_url(pg_two_phase.url()).set(drivername=f"postgresql+{driver_name}")
    engine = make_engine(2, url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS item"))
        connection.execute(text("CREATE TABLE item (number int)"))
    for number, end in enumerate(("commit", "rollback")):
        connection = engine.connect()
        transaction = connection.begin_twophase()
        connection.execute(text("INSERT INTO item VALUES (:number)"), {"number": number})
        transaction.prepare()
        xid = transaction.xid
        connection.invalidate()  # the application dies, the transaction does not
        connection.close()
        with engine.connect() as other:
            assert xid in other.recover_twophase()
            ended = other.commit_prepared if end == "commit" else other.rollback_prepared
            ended(xid, recover=True)
            assert xid not in other.recover_twophase()
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("INSERT INTO item VALUES (2)"))
        transaction.prepare()
        transaction.commit()
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT number FROM item ORDER BY number")).all() == [0, 2]
    pool: Any = engine.pool
    assert pool.checkedout() == 0


def test_reflection_on_postgresql(make_engine: Make, database: URL) -> None:
    """A table, its types and its foreign keys, through one connection."""
    engine = make_engine(1, database)
    with engine.begin() as connection:
        connection.execute(text("CREATE TYPE mood AS ENUM ('glad')"))
        connection.execute(text("CREATE TABLE parent (id int PRIMARY KEY, mood mood)"))
        connection.execute(text("CREATE TABLE child (parent int REFERENCES parent)"))
    metadata = MetaData()
    metadata.reflect(engine)
    assert set(metadata.tables) == {"child", "parent"}
    assert metadata.tables["parent"].c.mood.type.enums == ["glad"]  # type: ignore[attr-defined]
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)


def test_a_detached_connection_lives_on_its_own(
    make_engine: Make, database: URL, pg_observer: Any, eventually: Eventually
) -> None:
    """Beside a full pool, over a dispose, until it is closed."""
    engine = make_engine(1, database)
    connection = engine.connect()
    connection.detach()
    with engine.connect():
        assert pg_observer.backends(database.database) == 2
    engine.dispose()
    assert connection.scalar(text("SELECT 1")) == 1
    connection.close()
    eventually(lambda: pg_observer.backends(database.database) == 0, "no backend")


# == The differences ====================================================================================


def test_every_difference_is_of_a_test_and_told_to_users() -> None:
    """That it is one its test asserts: where QueuePool passes, ``pool_class`` makes it fail."""
    told = (Path(__file__).parents[1] / "docs" / "contract.rst").read_text(encoding="utf-8")
    for name in DIFFERENCES:
        test = globals()[name]
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        assert {"pool_class", "make_pool", "make_engine"} & set(names), f"{name} knows one pool alone"
        assert f"``{name}``" in told, f"docs/contract.rst does not tell of {name}"


# -- connections that change threads -----------------------------------------------------------------


def until_it_would_be_called_a_deadlock(
    caplog: pytest.LogCaptureFixture, pool: Any, work: Callable[[], Any]
) -> None:
    """Do the work after our pool has logged that nothing moves; QueuePool says nothing, so at once."""
    if isinstance(pool, QueriesPool):
        eventually(lambda: "nothing has moved" in caplog.text, "the warning")
    work()


def test_workers_may_close_what_the_main_thread_checked_out(
    make_pool: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """It checks out and hands on, and waits for the next connection while the workers compute."""
    pool = make_pool(2, timeout=30.0)
    if isinstance(pool, QueriesPool):
        inside.log_deadlocks_at_once(pool)
    workers = []
    for _ in range(2):
        out = [pool.connect()]
        workers.append(
            Thread(lambda out=out: until_it_would_be_called_a_deadlock(caplog, pool, out.pop().close))
        )
    pool.connect().close()
    for worker in workers:
        worker.join()
    assert pool.checkedout() == 0


def test_a_session_may_be_opened_in_one_thread_and_closed_in_another(
    make_pool: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """FastAPI's ``def`` dependencies: their first half and their second run in whichever thread is free."""
    pool = make_pool(1, timeout=30.0)
    if isinstance(pool, QueriesPool):
        inside.log_deadlocks_at_once(pool)
    opened: list[Any] = []
    opened.append(pool.connect())  # the first request's dependency, in this thread
    closing = Thread(lambda: until_it_would_be_called_a_deadlock(caplog, pool, opened.pop().close))
    second = pool.connect()  # the second request's, in this thread again
    closing.join()
    second.close()
    assert pool.checkedout() == 0
