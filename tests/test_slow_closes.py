"""A close that takes long, because a listener does, is felt by the one who closes, and by nobody else.

The roles of these tests may connect as often as the pool, so a server that still counts what was closed
refuses: then ``connect_errors`` says so.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from conftest import Observer
from fakes import FakeDriver
from hazards import Stop, Thread, assert_whole, eventually
from sqlalchemy import Engine, create_engine, event, exc, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import Pool, QueuePool

from sqla_queries_pool import QueriesPool

LATE = 15.0
"""Seconds within which a checkout has its connection although a listener takes for ever, which is a little
longer: ``Stop`` ends it."""
_roles = itertools.count(1)
_databases = itertools.count(1)


class Listener:
    """Takes until it is told to go on, when a connection is closed; and notes what it saw."""

    def __init__(self, engine: Engine) -> None:
        self.stop = Stop()
        self.seen: list[Any] = []
        event.listen(engine, "close", self)

    def __call__(self, raw: Any, _: Any) -> None:
        self.stop.here()
        self.seen.append(raw)


@pytest.fixture
def slow(
    pg_url: str, pg_observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Engine, Listener]]]:
    """Makes engines with a slow listener, of a role that may connect ``max_size`` times, 1 by default.

    They wait for the server for as long as a busy machine may take.
    """
    patient = inside.patient_pool_class(monkeypatch)
    role = f"slow_{next(_roles)}"
    pg_observer.query(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    url = make_url(pg_url).set(username=role, password="secret")
    made: list[tuple[Engine, Listener]] = []

    def make(max_size: int = 1, driver: str = "psycopg2", **options: Any) -> tuple[Engine, Listener]:
        pg_observer.query(f"ALTER ROLE {role} CONNECTION LIMIT {max_size}")
        engine = create_engine(
            url.set(drivername=f"postgresql+{driver}"),
            **{"poolclass": patient, "max_size": max_size, "pool_timeout": 10} | options,
        )
        made.append((engine, Listener(engine)))
        return made[-1]

    yield make
    for engine, listener in made:
        listener.stop.go()
        engine.dispose()
    pg_observer.query(
        f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{role}'"
    )
    pg_observer.query(f"DROP ROLE {role}")


def served(engine: Engine) -> None:
    """Check out within a moment, without having been refused by the server."""

    def checkout() -> None:
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1

    Thread(checkout).join(LATE)
    assert pool_of(engine).statistics().connect_errors == 0


def pool_of(engine: Engine) -> QueriesPool:
    """Its pool."""
    pool = engine.pool
    assert isinstance(pool, QueriesPool)
    return pool


def disposed(engine: Engine, listener: Listener) -> Thread:
    """A connection is closed by ``dispose()`` in another thread, which is in the listener now."""
    engine.connect().close()
    thread = Thread(engine.pool.dispose)
    listener.stop.reached()
    return thread


# -- what closes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_dispose_in_another_thread_keeps_no_checkout_waiting(
    slow: Callable[..., tuple[Engine, Listener]], driver: str
) -> None:
    """The listener goes on with the connection, which is closed after that, counted once."""
    engine, listener = slow(driver=driver)
    closing = disposed(engine, listener)
    served(engine)
    assert closing.alive
    listener.stop.go()
    closing.join()
    (raw,) = listener.seen
    assert raw.closed
    assert sum(pool_of(engine).statistics().closes.values()) == 1
    assert_whole(pool_of(engine), eventually)


def test_a_checkout_that_may_not_wait_is_served(slow: Callable[..., tuple[Engine, Listener]]) -> None:
    """As with QueuePool, which counts nothing that is being closed."""
    engine, listener = slow()
    inside.set_timeout(engine.pool, 0.0)
    disposed(engine, listener)
    served(engine)


def test_neither_do_those_that_are_closed_after_it(slow: Callable[..., tuple[Engine, Listener]]) -> None:
    """The listener runs for all, one after the other, but their slots are free before."""
    engine, listener = slow(3)
    for connection in [engine.connect() for _ in range(3)]:
        connection.close()
    closing = disposed(engine, listener)
    held = [Thread(engine.connect) for _ in range(3)]
    connections = [thread.join(LATE) for thread in held]
    assert pool_of(engine).statistics().connect_errors == 0
    listener.stop.go()
    closing.join()
    eventually(lambda: len(listener.seen) == 3, "it was called for each")
    eventually(lambda: all(raw.closed for raw in listener.seen), "all are closed")
    for connection in connections:
        connection.close()
    assert_whole(pool_of(engine), eventually)


def test_neither_does_an_idle_ttl(slow: Callable[..., tuple[Engine, Listener]]) -> None:
    """It is the worker that is in the listener."""
    engine, listener = slow(idle_ttl=0.05)
    engine.connect().close()
    listener.stop.reached()
    served(engine)


def test_a_listener_that_never_ends_keeps_no_other_connection_open(
    pg_observer: Observer, slow: Callable[..., tuple[Engine, Listener]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is in the listener, and nobody waits; what else was idle for too long is shut down."""
    inside.catch_up_after(monkeypatch, 0.05)
    engine, listener = slow(2, idle_ttl=0.05)
    other, another = slow(2, idle_ttl=0.05)
    another.stop.go()
    engine.connect().close()
    listener.stop.reached()
    other.connect().close()
    backends = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
    eventually(lambda: pg_observer.query(backends, engine.url.username) == [(1,)], "it is shut down")
    assert not another.seen
    listener.stop.go()
    eventually(lambda: another.seen, "its listener is called in the end")
    assert_whole(pool_of(engine), eventually)


def test_neither_does_a_return_that_closes(slow: Callable[..., tuple[Engine, Listener]]) -> None:
    """The one that returns an old connection closes it, and waits for the listener alone."""
    engine, listener = slow()
    connection = engine.connect()
    pool_of(engine).expire()
    returning = Thread(connection.close)
    listener.stop.reached()
    served(engine)
    assert returning.alive


def test_an_eviction_waits_for_no_listener_of_the_other_engine(
    slow: Callable[..., tuple[Engine, Listener]],
) -> None:
    """The checkout that closes it is not the one whose listener it is."""
    engine, listener = slow()
    another, _ = slow()
    engine.connect().close()
    served(another)
    listener.stop.go()
    eventually(lambda: listener.seen and listener.seen[0].closed, "it is closed, after its listener")
    eventually(lambda: pool_of(engine).statistics().evictions == 1, "it is counted, once")
    assert_whole(pool_of(engine), eventually)


def test_neither_does_a_renewal(slow: Callable[..., tuple[Engine, Listener]]) -> None:
    """What is renewed in the background is closed first; a checkout takes its slot."""
    engine, listener = slow()
    engine.connect().close()
    pool_of(engine).expire(rolling=True)
    listener.stop.reached()
    served(engine)
    listener.stop.go()
    eventually(lambda: listener.seen and listener.seen[0].closed, "it is closed, and not opened again")
    assert_whole(pool_of(engine), eventually)
    assert pool_of(engine).statistics().open == 1


def test_a_loop_waits_for_no_listener_in_a_thread(pg_url: str) -> None:
    """A thread disposes of what a loop has idle."""

    async def main() -> None:
        engine = create_async_engine(
            make_url(pg_url).set(drivername="postgresql+psycopg"), poolclass=QueriesPool, max_size=1
        )
        listener = Listener(engine.sync_engine)
        async with engine.connect():
            pass
        closing = Thread(engine.sync_engine.pool.dispose)
        listener.stop.reached()
        connection = await asyncio.wait_for(engine.connect(), LATE)
        assert await connection.scalar(text("SELECT 1")) == 1
        await connection.close()
        listener.stop.go()
        await asyncio.to_thread(closing.join)
        await engine.dispose()

    asyncio.run(main())


# -- what the listener may do -----------------------------------------------------------------------


@pytest.mark.parametrize("pool_class", [QueriesPool, QueuePool])
def test_a_listener_may_use_the_connection(pg_url: str, pool_class: type[Pool]) -> None:
    """SQLAlchemy calls it before the close, and QueuePool's yardstick holds: a word to the server."""
    engine = create_engine(pg_url, poolclass=pool_class, pool_size=1, max_overflow=0)
    said: list[Any] = []

    @event.listens_for(engine, "close")
    def close(raw: Any, _: Any) -> None:
        with raw.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            said.append(cursor.fetchone()[0] == raw.info.backend_pid)

    engine.connect().close()
    engine.dispose()
    assert said == [True]


def test_a_statement_of_a_listener_is_waited_for(slow: Callable[..., tuple[Engine, Listener]]) -> None:
    """The server would go on with it, and count it: no slot is free before it has ended."""
    engine, listener = slow(poolclass=inside.pool_class(close_timeout=0.3))
    listener.stop.go()
    before: list[Any] = []

    @event.listens_for(engine, "close", insert=True)
    def close(raw: Any, _: Any) -> None:
        if not before:
            with raw.cursor() as cursor:
                before.append(cursor.execute("SELECT pg_sleep(0.9)") or cursor.rowcount)

    engine.connect().close()
    closing = Thread(engine.pool.dispose)
    served(engine)
    assert before == [1]
    closing.join()


# -- what is the same with QueuePool ----------------------------------------------------------------


@pytest.mark.parametrize("pool_class", [QueriesPool, QueuePool])
def test_what_its_holder_invalidates_is_its_holders(pool_class: type[Pool], driver: FakeDriver) -> None:
    """It has the slot in any case, until it returns it; a checkout waits for that, as with QueuePool."""
    pool: Any = pool_class(driver.connect, pool_size=1, max_overflow=0, timeout=10)  # type: ignore[call-arg]
    stop = Stop()
    event.listen(pool, "close", lambda *_: stop.here())
    connection = pool.connect()
    invalidating = Thread(connection.invalidate)
    stop.reached()
    pool._timeout = 0.2  # QueuePool's
    if pool_class is QueriesPool:
        inside.set_timeout(pool, 0.2)
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    stop.go()
    invalidating.join()
    connection.close()
    pool.connect().close()


# -- what opens -------------------------------------------------------------------------------------


def test_a_connect_in_the_background_holds_up_no_close(driver: FakeDriver) -> None:
    """For ``min_size``, and the server does not answer: idle connections are closed meanwhile."""
    url = f"fake://host/openings_{next(_databases)}"
    warm = create_engine(url, module=driver, poolclass=QueriesPool, min_size=2)
    other = create_engine(url, module=driver, poolclass=QueriesPool, idle_ttl=0.05)
    stop, connects = Stop(), itertools.count(1)

    @event.listens_for(warm, "do_connect")
    def connect(*_: Any) -> None:
        if next(connects) == 2:
            stop.here()

    warm.connect().close()
    stop.reached()
    other.connect().close()
    eventually(lambda: driver.numbers() == [1], "the other's is closed", LATE)
    stop.go()
    eventually(lambda: len(driver.live) == 2, "what the pool opens is there")
    for engine in (warm, other):
        engine.dispose()
