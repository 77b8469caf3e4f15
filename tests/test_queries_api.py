"""The queries API: names, arguments and exceptions of ``queries.pool``, on the bookkeeping of the engines."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from random import Random
from typing import Any
from unittest import mock

import inside
import psycopg2
import pytest
from fakes import FakeClock, FakeDriver, Task
from hazards import Stop, assert_whole, driver_connection_of
from psycopg2.extras import wait_select
from sqlalchemy import create_engine, exc, make_url, text
from sqlalchemy.engine import Engine

import sqla_queries_pool
from sqla_queries_pool import (
    CheckoutTimeout,
    Connection,
    ConnectionBusyError,
    ConnectionNotFoundError,
    NoIdleConnectionsError,
    Pool,
    PoolFullError,
    PoolManager,
    QueriesPool,
    pool,
)
from sqla_queries_pool.budget.audit import check

Eventually = Callable[..., None]
NAMES = [
    "ActivePoolError",
    "Connection",
    "ConnectionBusyError",
    "ConnectionException",
    "ConnectionNotFoundError",
    "NoIdleConnectionsError",
    "Pool",
    "PoolConnectionException",
    "PoolException",
    "PoolFullError",
    "PoolManager",
    "QueriesException",
]
_numbers = itertools.count()


class Session:
    """Who locks connections."""


@pytest.fixture
def pid() -> Iterator[str]:
    """A pool id that only this test has; what is left of its pool is closed."""
    name = f"api-{next(_numbers)}"
    yield name
    found = inside.pools().get(name)
    if found is not None:
        found.shutdown()
        PoolManager.clean(name)


@pytest.fixture
def dsn(pg_url: str) -> str:
    """The test's database, for psycopg2."""
    return make_url(pg_url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def engine(pg_url: str, pid: str) -> Iterator[Engine]:
    """An engine on the test's database that uses the pool ``pid``."""
    made = create_engine(pg_url, poolclass=QueriesPool, pool_id=pid, max_size=3, pool_timeout=0)
    yield made
    made.dispose()


@pytest.fixture
def executing(dsn: str) -> Iterator[Any]:
    """A psycopg2 connection that executes something and goes on doing so."""
    connection = psycopg2.connect(dsn, async_=1)
    wait_select(connection)
    connection.cursor().execute("SELECT pg_sleep(600)")
    assert connection.isexecuting()
    yield connection
    connection.close()


def handle_of(connection: Any) -> Any:
    """The DBAPI connection of a SQLAlchemy connection."""
    return connection.connection.dbapi_connection


def states(observer: Any, url: str) -> Counter[str]:
    """What the backends of a database do, as the server sees it."""
    rows = observer.query(
        "SELECT state FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s",
        make_url(url).database,
    )
    return Counter(state for (state,) in rows)


def begin(handle: Any) -> None:
    """Leave a transaction open."""
    with handle.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS t (i integer)")


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_queries_pool_are_exported(name: str) -> None:
    """By ``sqla_queries_pool.pool``, which can stand in for ``queries.pool``, and by the package."""
    assert getattr(pool, name) is getattr(sqla_queries_pool, name)


def test_the_exceptions_are_related_as_in_queries() -> None:
    """Who catches a base class of queries' catches the same."""
    assert issubclass(pool.PoolException, pool.QueriesException)
    assert issubclass(pool.ConnectionException, pool.QueriesException)
    assert issubclass(pool.PoolConnectionException, pool.PoolException)
    for error in (pool.ActivePoolError, NoIdleConnectionsError, PoolFullError):
        assert issubclass(error, pool.PoolException)
    assert issubclass(ConnectionBusyError, pool.ConnectionException)
    assert issubclass(ConnectionNotFoundError, pool.PoolConnectionException)


def test_there_is_one_manager() -> None:
    """``instance()`` returns the same one, also to threads that ask at once."""
    tasks = [Task(PoolManager.instance) for _ in range(8)]
    assert {id(task.result()) for task in tasks} == {id(PoolManager.instance())}


# -- pools that there are and are not ----------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda pid: PoolManager.add(pid, FakeDriver().connect()),
        lambda pid: PoolManager.free(pid, FakeDriver().connect()),
        lambda pid: PoolManager.get(pid, Session()),
        lambda pid: PoolManager.get_connection(pid, FakeDriver().connect()),
        lambda pid: PoolManager.has_connection(pid, FakeDriver().connect()),
        lambda pid: PoolManager.has_idle_connection(pid),
        lambda pid: PoolManager.is_full(pid),
        lambda pid: PoolManager.lock(pid, FakeDriver().connect(), Session()),
        lambda pid: PoolManager.remove(pid),
        lambda pid: PoolManager.remove_connection(pid, FakeDriver().connect()),
        lambda pid: PoolManager.set_idle_ttl(pid, 5),
        lambda pid: PoolManager.set_max_size(pid, 5),
        lambda pid: PoolManager.size(pid),
    ],
)
def test_a_pool_that_does_not_exist_is_a_key_error(pid: str, call: Callable[[str], Any]) -> None:
    """Every call says so, with the pid; and makes none."""
    with pytest.raises(KeyError, match=pid):
        call(pid)
    assert pid not in PoolManager.instance()


def test_clean_returns_quietly_where_there_is_no_pool(pid: str) -> None:
    """Who cleans up need not know whether somebody did before."""
    PoolManager.clean(pid)
    assert pid not in PoolManager.instance()


def test_create_makes_a_pool_once(pid: str) -> None:
    """The second one is a KeyError, and leaves the first as it is."""
    PoolManager.create(pid, idle_ttl=5, max_size=2)
    assert pid in PoolManager.instance()
    with pytest.raises(KeyError, match=f"Pool {pid} already exists"):
        PoolManager.create(pid, max_size=9)
    assert PoolManager.report()["pools"][pid]["max_size"] == 2


def test_create_has_queries_defaults(pid: str) -> None:
    """One connection, a minute."""
    PoolManager.create(pid)
    found = PoolManager.report()["pools"][pid]
    assert (found["max_size"], found["idle"]["ttl"]) == (1, 60)


def test_create_is_atomic(pid: str) -> None:
    """Of many threads at once one makes the pool, all others get KeyError."""
    count = 16
    barrier = threading.Barrier(count)
    created: list[int] = []
    refused: list[int] = []

    def create(number: int) -> None:
        barrier.wait(10)
        try:
            PoolManager.create(pid, max_size=number + 1)
        except KeyError:
            refused.append(number)
        else:
            created.append(number)

    for task in [Task(lambda number=number: create(number)) for number in range(count)]:  # type: ignore[misc]
        task.result()
    assert (len(created), len(refused)) == (1, count - 1)
    assert PoolManager.report()["pools"][pid]["max_size"] == created[0] + 1


def test_create_refuses_the_pid_of_an_engines_pool(driver: FakeDriver, pid: str) -> None:
    """That pool exists; its limits are to be set instead."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid)
    with pytest.raises(KeyError):
        PoolManager.create(pid)
    del engine_pool


# -- add, get, lock, free ----------------------------------------------------------------------------


def test_a_connection_goes_round(dsn: str, pid: str) -> None:
    """add, get, free and get again: the same connection, locked while a session has it."""
    PoolManager.create(pid, max_size=2)
    handle, session = psycopg2.connect(dsn), Session()
    PoolManager.add(pid, handle)
    assert (PoolManager.size(pid), PoolManager.has_connection(pid, handle)) == (1, True)
    assert PoolManager.has_idle_connection(pid)
    for _ in range(3):
        assert PoolManager.get(pid, session) is handle
        assert not PoolManager.has_idle_connection(pid)
        assert PoolManager.get_connection(pid, handle).used_by() is session  # type: ignore[misc]
        PoolManager.free(pid, handle)
    assert PoolManager.get_connection(pid, handle).used_by is None
    assert not handle.closed


def test_get_without_an_idle_connection_says_so(driver: FakeDriver, pid: str) -> None:
    """NoIdleConnectionsError, with the pid: the caller opens one and adds it."""
    PoolManager.create(pid)
    session = Session()
    for _ in range(2):  # without any connection, and with one that is locked
        with pytest.raises(NoIdleConnectionsError, match=f"Pool {pid} has no idle connections") as raised:
            PoolManager.get(pid, Session())
        assert raised.value.pid == pid
        if not driver.connections:
            PoolManager.add(pid, driver.connect())
            PoolManager.get(pid, session)


def test_a_connection_added_twice_is_a_value_error(dsn: str, pid: str) -> None:
    """And it stays open, and in the pool, once."""
    PoolManager.create(pid, max_size=2)
    handle = psycopg2.connect(dsn)
    PoolManager.add(pid, handle)
    with pytest.raises(ValueError, match="already exists in pool"):
        PoolManager.add(pid, handle)
    assert PoolManager.size(pid) == 1
    assert not handle.closed


def test_a_connection_beyond_the_limit_is_closed_and_refused(dsn: str, pid: str) -> None:
    """As queries does: the pool took it over, and has no place for it."""
    PoolManager.create(pid, max_size=1)
    PoolManager.add(pid, psycopg2.connect(dsn))
    handle = psycopg2.connect(dsn)
    with pytest.raises(PoolFullError, match=f"Pool {pid} is at its maximum capacity") as raised:
        PoolManager.add(pid, handle)
    assert raised.value.pid == pid
    assert handle.closed
    assert PoolManager.is_full(pid)
    assert not PoolManager.has_connection(pid, handle)


def test_a_shrunken_cap_holds(driver: FakeDriver, pid: str) -> None:
    """With more connections than the limit a pool is full, too; what is above it closes when it is freed."""
    PoolManager.create(pid, max_size=3)
    session = Session()
    handles = [driver.connect() for _ in range(3)]
    for handle in handles:
        PoolManager.add(pid, handle)
        PoolManager.get(pid, session)
    PoolManager.set_max_size(pid, 1)
    assert (PoolManager.size(pid), PoolManager.is_full(pid)) == (3, True)
    with pytest.raises(PoolFullError):
        PoolManager.add(pid, driver.connect())
    for handle in handles:
        PoolManager.free(pid, handle)
    assert PoolManager.size(pid) == 1
    assert [handle.closed for handle in handles] == [True, True, False]


@pytest.mark.parametrize("session", [None, 5, "name", ("a",), object()], ids=lambda it: type(it).__name__)
def test_a_session_has_to_be_one_that_can_be_seen_dying(driver: FakeDriver, pid: str, session: Any) -> None:
    """What can't be weakly referred to can't hold a lock: TypeError, and the connection stays idle."""
    PoolManager.create(pid)
    handle = driver.connect()
    PoolManager.add(pid, handle)
    for call in (lambda: PoolManager.get(pid, session), lambda: PoolManager.lock(pid, handle, session)):
        with pytest.raises(TypeError, match="Pass an instance of a class of your own"):
            call()
    assert PoolManager.has_idle_connection(pid)


def test_a_locked_connection_is_busy(driver: FakeDriver, pid: str) -> None:
    """lock says so with the id of the connection, also to the session that has it."""
    PoolManager.create(pid)
    handle, session = driver.connect(), Session()
    PoolManager.add(pid, handle)
    PoolManager.lock(pid, handle, session)
    for who in (session, Session()):
        with pytest.raises(ConnectionBusyError, match=f"Connection {id(handle)} is busy") as raised:
            PoolManager.lock(pid, handle, who)
        assert raised.value.cid == id(handle)


@pytest.mark.parametrize(
    "call",
    [
        lambda pid, handle: PoolManager.free(pid, handle),
        lambda pid, handle: PoolManager.lock(pid, handle, Session()),
        lambda pid, handle: PoolManager.remove_connection(pid, handle),
    ],
    ids=["free", "lock", "remove_connection"],
)
def test_a_connection_that_is_not_in_the_pool_is_not_found(
    driver: FakeDriver, pid: str, call: Callable[[str, Any], Any]
) -> None:
    """ConnectionNotFoundError, with both ids."""
    PoolManager.create(pid)
    handle = driver.connect()
    message = f"Connection {id(handle)} not found in pool {pid}"
    with pytest.raises(ConnectionNotFoundError, match=message) as raised:
        call(pid, handle)
    assert (raised.value.pid, raised.value.cid) == (pid, id(handle))


def test_get_connection_of_a_stranger_is_a_key_error(driver: FakeDriver, pid: str) -> None:
    """As in queries, where it is a look into a dictionary."""
    PoolManager.create(pid)
    with pytest.raises(KeyError):
        PoolManager.get_connection(pid, driver.connect())
    assert not PoolManager.has_connection(pid, driver.connect())


def test_free_rolls_back(pg_url: str, dsn: str, pid: str, pg_observer: Any) -> None:
    """Whatever the session left in the connection is undone before anybody else gets it."""
    PoolManager.create(pid)
    handle, session = psycopg2.connect(dsn), Session()
    PoolManager.add(pid, handle)
    PoolManager.get(pid, session)
    begin(handle)
    assert states(pg_observer, pg_url) == {"idle in transaction": 1}
    PoolManager.free(pid, handle)
    assert states(pg_observer, pg_url) == {"idle": 1}
    assert not handle.closed


def test_freeing_an_idle_connection_changes_nothing(driver: FakeDriver, pid: str) -> None:
    """As in queries."""
    PoolManager.create(pid)
    handle = driver.connect()
    PoolManager.add(pid, handle)
    PoolManager.free(pid, handle)
    assert PoolManager.has_idle_connection(pid)
    assert handle.calls == {}


def test_free_closes_what_it_can_not_reset(
    driver: FakeDriver, pid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose rollback fails is given to nobody; its slot is free."""
    PoolManager.create(pid)
    handle, session = driver.connect(), Session()
    PoolManager.add(pid, handle)
    PoolManager.get(pid, session)

    def rollback() -> None:
        raise FakeDriver.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(handle, "rollback", rollback)
    PoolManager.free(pid, handle)
    assert handle.closed
    assert PoolManager.size(pid) == 0


# -- sessions that die -------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True], ids=["transaction", "BEGIN in autocommit mode"])
@pytest.mark.parametrize("clean", [True, False], ids=["clean", "by itself"])
def test_a_session_that_dies_leaves_no_transaction(
    pg_url: str, dsn: str, pid: str, pg_observer: Any, eventually: Eventually, clean: bool, explicit: bool
) -> None:
    """clean, or the housekeeper, takes the lock off, and rolls back or closes: nobody gets a transaction.

    queries' sessions are in autocommit mode, where psycopg2's rollback() does nothing about a BEGIN.
    """
    PoolManager.create(pid)
    handle, session = psycopg2.connect(dsn), Session()
    handle.autocommit = explicit
    PoolManager.add(pid, handle)
    PoolManager.get(pid, session)
    if explicit:
        handle.cursor().execute("BEGIN")
    begin(handle)
    assert states(pg_observer, pg_url) == {"idle in transaction": 1}
    del session
    gc.collect()
    if clean:
        PoolManager.clean(pid)
    eventually(lambda: states(pg_observer, pg_url)["idle in transaction"] == 0, "the transaction is over")
    eventually(lambda: pid not in PoolManager.instance() or not _locked(pid))


def _locked(pid: str) -> int:
    return int(PoolManager.report()["pools"][pid]["connections"]["locked"])


def test_a_stale_lock_is_no_obstacle(driver: FakeDriver, pid: str) -> None:
    """get and lock take over what a dead session has left, after a rollback."""
    PoolManager.create(pid)
    handle = driver.connect()
    PoolManager.add(pid, handle)
    for take in (PoolManager.get, lambda pid, who: PoolManager.lock(pid, handle, who)):
        dead, alive = Session(), Session()
        PoolManager.get(pid, dead)
        before = handle.calls["rollback"]
        del dead
        take(pid, alive)
        assert handle.calls["rollback"] > before
        assert PoolManager.get_connection(pid, handle).used_by() is alive  # type: ignore[misc]
        PoolManager.free(pid, handle)


def test_an_engine_that_needs_the_slot_of_a_dead_session_gets_it(driver: FakeDriver, pid: str) -> None:
    """The connection is closed or rolled back, whichever is first; an engine gets a connection of its own."""
    PoolManager.create(pid)
    PoolManager.add(pid, driver.connect())
    session = Session()
    PoolManager.get(pid, session)
    engine_pool = QueriesPool(driver.connect, pool_id=pid, timeout=5)
    del session
    connection = engine_pool.connect()
    assert driver_connection_of(connection) is not driver.connections[0]
    assert driver.connections[0].closed
    connection.close()


# -- remove, close, clean, shutdown ------------------------------------------------------------------


def test_remove_connection_closes_it_and_frees_its_slot(dsn: str, pid: str) -> None:
    """Idle ones are closed; those that somebody has are refused."""
    PoolManager.create(pid)
    handle, session = psycopg2.connect(dsn), Session()
    PoolManager.add(pid, handle)
    PoolManager.get(pid, session)
    with pytest.raises(ConnectionBusyError, match=str(id(handle))):
        PoolManager.remove_connection(pid, handle)
    assert not handle.closed
    PoolManager.free(pid, handle)
    PoolManager.remove_connection(pid, handle)
    assert handle.closed
    assert PoolManager.size(pid) == 0


@pytest.mark.parametrize("closed_by_session", [True, False])
def test_a_connection_that_is_closed_or_left_can_be_removed(
    driver: FakeDriver, pid: str, closed_by_session: bool
) -> None:
    """Locked, but closed; or locked by a session that is dead."""
    PoolManager.create(pid)
    handle, session = driver.connect(), Session()
    PoolManager.add(pid, handle)
    PoolManager.get(pid, session)
    if closed_by_session:
        handle.close()
    else:
        del session
    PoolManager.remove_connection(pid, handle)
    assert PoolManager.size(pid) == 0
    assert handle.closed


@pytest.mark.parametrize("busy", ["locked", "executing"])
@pytest.mark.parametrize("call", [PoolManager.remove, lambda pid: inside.pools()[pid].close()])
def test_remove_and_close_are_all_or_nothing(
    dsn: str, pid: str, executing: Any, busy: str, call: Callable[[str], None]
) -> None:
    """One busy connection, and none is closed; then all are, and the pool is gone."""
    PoolManager.create(pid, max_size=3)
    idle, other, session = psycopg2.connect(dsn), psycopg2.connect(dsn), Session()
    for handle in (idle, other, executing)[: 2 + (busy == "executing")]:
        PoolManager.add(pid, handle)
    if busy == "locked":
        PoolManager.lock(pid, other, session)
    busy_one = other if busy == "locked" else executing
    with pytest.raises(ConnectionBusyError) as raised:
        call(pid)
    assert raised.value.cid == id(busy_one)
    assert pid in PoolManager.instance()
    assert not idle.closed
    assert not busy_one.closed
    if busy == "locked":
        PoolManager.free(pid, other)
    else:
        executing.close()
    call(pid)
    assert idle.closed
    assert other.closed


def test_a_removed_pool_can_be_created_again(driver: FakeDriver, pid: str) -> None:
    """Nothing of the old one is left, its limits neither."""
    PoolManager.create(pid, max_size=7, idle_ttl=7)
    PoolManager.add(pid, driver.connect())
    PoolManager.remove(pid)
    assert pid not in PoolManager.instance()
    PoolManager.create(pid)
    found = PoolManager.report()["pools"][pid]
    assert (found["max_size"], found["idle"]["ttl"]) == (1, 60)
    assert PoolManager.size(pid) == 0


def test_clean_drops_closed_connections_and_forgets_an_empty_pool(driver: FakeDriver, pid: str) -> None:
    """A connection that somebody closed gives its slot back; a pool of which nothing is left goes."""
    PoolManager.create(pid, max_size=2)
    one, two = driver.connect(), driver.connect()
    PoolManager.add(pid, one)
    PoolManager.add(pid, two)
    one.close()
    PoolManager.clean(pid)
    assert PoolManager.size(pid) == 1
    two.close()
    PoolManager.clean(pid)
    assert pid not in PoolManager.instance()


def test_clean_closes_what_was_idle_for_the_ttl(driver: FakeDriver, pid: str) -> None:
    """By the clock that was injected; it may start at zero."""
    clock = FakeClock(0.0)
    PoolManager.create(pid, idle_ttl=10, max_size=2, time_method=clock)
    found = inside.pools()[pid]
    handle, session = driver.connect(), Session()
    PoolManager.add(pid, handle)
    PoolManager.get(pid, session)
    assert found.idle_duration == 0
    PoolManager.free(pid, handle)
    clock.now = 9.0
    assert found.idle_duration == 9
    PoolManager.clean(pid)
    assert not handle.closed
    clock.now = 10.5
    PoolManager.clean(pid)
    assert handle.closed


def test_set_idle_ttl_holds_at_once(driver: FakeDriver, pid: str) -> None:
    """What is idle for longer than the new one is closed; None keeps it for ever."""
    clock = FakeClock()
    PoolManager.create(pid, idle_ttl=None, max_size=2, time_method=clock)
    handle = driver.connect()
    PoolManager.add(pid, handle)
    clock.now = 1e6
    PoolManager.clean(pid)
    assert not handle.closed
    PoolManager.set_idle_ttl(pid, 5)
    assert handle.closed


def test_shutdown_closes_what_sessions_have_and_spares_what_executes(
    dsn: str, pid: str, executing: Any, driver: FakeDriver
) -> None:
    """All that does not execute is closed, in all pools; then ConnectionBusyError for what does."""
    PoolManager.create(pid, max_size=3)
    other = f"{pid}-other"
    PoolManager.create(other, max_size=3)
    locked, idle, session = psycopg2.connect(dsn), psycopg2.connect(dsn), Session()
    for handle in (executing, locked, idle):
        PoolManager.add(pid, handle)
    PoolManager.lock(pid, locked, session)
    elsewhere = driver.connect()
    PoolManager.add(other, elsewhere)
    with pytest.raises(ConnectionBusyError) as raised:
        PoolManager.shutdown()
    assert raised.value.cid == id(executing)
    assert (locked.closed, idle.closed, elsewhere.closed, executing.closed) == (1, 1, True, 0)
    assert (PoolManager.size(pid), PoolManager.size(other)) == (1, 0)
    executing.close()
    PoolManager.shutdown()
    PoolManager.clean(pid)
    PoolManager.clean(other)


# -- engines: one truth ------------------------------------------------------------------------------


def test_connections_of_engines_are_seen_and_counted(engine: Engine, pid: str) -> None:
    """size, has_connection, is_full and the report speak of every connection, whoever opened it."""
    out, idle = engine.connect(), engine.connect()
    handle = handle_of(idle)
    idle.close()
    assert PoolManager.size(pid) == 2
    assert PoolManager.has_connection(pid, handle)
    assert PoolManager.has_connection(pid, handle_of(out))
    assert PoolManager.has_idle_connection(pid)
    assert not PoolManager.is_full(pid)
    counts = PoolManager.report()["pools"][pid]["connections"]
    assert (counts["busy"], counts["idle"], counts["locked"], counts["open"]) == (1, 1, 1, 2)
    assert PoolManager.get_connection(pid, handle_of(out)).used_by() is out.connection  # type: ignore[misc]
    out.close()


def test_get_hands_out_no_connection_of_an_engine(engine: Engine, pid: str) -> None:
    """It is configured for its engine; who wants that one locks it by name."""
    engine.connect().close()
    assert PoolManager.has_idle_connection(pid)
    with pytest.raises(NoIdleConnectionsError):
        PoolManager.get(pid, Session())


def test_engines_use_no_connection_that_was_added_by_hand(engine: Engine, dsn: str, pid: str) -> None:
    """It counts against the limit, though; and gives way, when it is idle, as the last."""
    added = [psycopg2.connect(dsn) for _ in range(2)]
    for handle in added:
        PoolManager.add(pid, handle)
    first = engine.connect()
    assert handle_of(first) not in added
    assert PoolManager.is_full(pid)
    session = Session()
    PoolManager.lock(pid, added[0], session)
    second = engine.connect()
    assert (added[0].closed, added[1].closed) == (0, 1)
    with pytest.raises(CheckoutTimeout, match="session Session"):
        engine.connect()
    first.close()
    second.close()


def test_a_locked_connection_of_an_engine_is_not_handed_out(
    engine: Engine, pg_url: str, pid: str, pg_observer: Any
) -> None:
    """A session has it for itself until it is freed: rolled back, then the engine's again."""
    with engine.connect() as connection:
        handle = handle_of(connection)
    session = Session()
    PoolManager.lock(pid, handle, session)
    with engine.connect() as connection:
        assert handle_of(connection) is not handle
    begin(handle)
    assert states(pg_observer, pg_url) == {"idle in transaction": 1, "idle": 1}
    PoolManager.free(pid, handle)
    assert states(pg_observer, pg_url) == {"idle": 2}
    with engine.connect() as connection:
        assert handle_of(connection) is handle


def test_freeing_an_engines_connection_asks_the_dialect(driver: FakeDriver, pid: str) -> None:
    """The dialect knows how its driver is rolled back."""
    engine = create_engine("fake://host/free", module=driver, poolclass=QueriesPool, pool_id=pid)
    engine.connect().close()
    seen: list[Any] = []

    def do_rollback(dbapi_connection: Any) -> None:
        seen.append(dbapi_connection)
        dbapi_connection.rollback()

    engine.dialect.do_rollback = do_rollback  # type: ignore[method-assign]
    handle, session = driver.connections[0], Session()
    before = handle.calls["rollback"]
    PoolManager.lock(pid, handle, session)
    PoolManager.free(pid, handle)
    assert len(seen) == 1
    assert handle.calls["rollback"] == before + 1


def test_what_an_engine_has_out_is_refused_to_all_others(engine: Engine, pid: str) -> None:
    """lock, free and remove say ConnectionBusyError: two users on one socket otherwise."""
    connection = engine.connect()
    handle = handle_of(connection)
    for call in (
        lambda: PoolManager.lock(pid, handle, Session()),
        lambda: PoolManager.free(pid, handle),
        lambda: PoolManager.remove_connection(pid, handle),
        lambda: PoolManager.get_connection(pid, handle).free(),
        lambda: PoolManager.get_connection(pid, handle).close(),
        lambda: PoolManager.remove(pid),
    ):
        with pytest.raises(ConnectionBusyError, match=str(id(handle))):
            call()  # type: ignore[no-untyped-call]
    assert connection.execute(text("SELECT 1")).scalar() == 1
    connection.close()


def test_a_removed_connection_of_an_engine_is_closed(engine: Engine, pid: str) -> None:
    """Its slot is free, and the engine opens another when it needs one."""
    with engine.connect() as connection:
        handle = handle_of(connection)
    PoolManager.remove_connection(pid, handle)
    assert handle.closed
    assert PoolManager.size(pid) == 0
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1


def test_an_engine_works_again_after_its_pool_was_removed(engine: Engine, pid: str) -> None:
    """remove forgets the pool, and what was set for it; the next checkout brings it back."""
    PoolManager.set_max_size(pid, 1)
    with engine.connect() as connection:
        handle = handle_of(connection)
    PoolManager.remove(pid)
    assert handle.closed
    assert pid not in PoolManager.instance()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
        assert pid in PoolManager.instance()
        assert PoolManager.report()["pools"][pid]["max_size"] == 3
    PoolManager.clean(pid)
    assert pid in PoolManager.instance()


def test_a_pool_that_was_removed_can_be_created_though_engines_use_it(driver: FakeDriver, pid: str) -> None:
    """The limits that create says hold then."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid, max_size=5, timeout=0)
    engine_pool.connect().close()
    PoolManager.remove(pid)
    PoolManager.create(pid, max_size=1, idle_ttl=None)
    connection = engine_pool.connect()
    with pytest.raises(CheckoutTimeout):
        engine_pool.connect()
    connection.close()
    assert PoolManager.size(pid) == 1


def test_shutdown_closes_what_engines_have_out(
    engine: Engine, pg_url: str, pid: str, pg_observer: Any, eventually: Eventually
) -> None:
    """An engine finds its connection invalidated, as after a restart of the server, and works again."""
    out, idle = engine.connect(), engine.connect()
    out.execute(text("SELECT 1"))
    idle.close()
    PoolManager.shutdown()
    eventually(lambda: not states(pg_observer, pg_url), "all connections are closed")
    with pytest.raises(exc.DBAPIError) as raised:
        out.execute(text("SELECT 1"))
    assert raised.value.connection_invalidated
    out.rollback()
    assert out.execute(text("SELECT 1")).scalar() == 1
    out.close()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    assert PoolManager.size(pid) <= 2


def test_shutdown_closes_what_is_being_opened_when_it_is_open(
    driver: FakeDriver, pid: str, eventually: Eventually
) -> None:
    """A connection that shutdown can't see yet is used once, and not kept."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid, max_size=1)
    driver.gate.clear()
    task = Task(engine_pool.connect)
    eventually(lambda: driver.connecting == 1)
    PoolManager.shutdown()
    driver.gate.set()
    task.result().close()
    assert driver.numbers() == []


def test_a_shutdown_takes_no_connection_away_that_its_holder_has_just_opened(
    driver: FakeDriver, pid: str, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """It closes the socket that it saw; the record is its holder's, who is about to reopen it."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid, max_size=1)
    fairy = engine_pool.connect()
    fairy.invalidate(soft=True)
    fairy.close()
    taken, closing = Stop(), Stop()
    close = driver.connections[0].close

    def stop_and_close() -> None:
        monkeypatch.undo()
        closing.here()
        close()

    inside.before_a_look(monkeypatch, engine_pool, taken.here)
    monkeypatch.setattr(driver.connections[0], "close", stop_and_close)
    holder = Task(engine_pool.connect)
    taken.reached()
    shutdown = Task(PoolManager.shutdown)
    closing.reached()
    taken.go()
    fairy = holder.result()
    closing.go()
    shutdown.result()
    assert fairy.dbapi_connection is inside.record(fairy).dbapi_connection is driver.connections[1]
    fairy.close()
    assert_whole(engine_pool, eventually)


def test_who_has_locked_an_engines_connection_keeps_it_when_the_engine_dies(
    driver: FakeDriver, pid: str, eventually: Eventually
) -> None:
    """The session goes on; once freed, it is as if the connection had been added by hand."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid, max_size=2)
    engine_pool.connect().close()
    handle, session = driver.connections[0], Session()
    PoolManager.lock(pid, handle, session)
    PoolManager.create(f"{pid}-unrelated")
    del engine_pool
    gc.collect()
    eventually(lambda: not inside.ledger(inside.pools()[pid]).attachments)
    assert not handle.closed
    assert PoolManager.size(pid) == 1
    assert PoolManager.get_connection(pid, handle).used_by() is session  # type: ignore[misc]
    PoolManager.free(pid, handle)
    assert PoolManager.get(pid, session) is handle
    PoolManager.clean(f"{pid}-unrelated")


def test_locks_and_checkouts_at_once_never_share_a_connection(driver: FakeDriver, pid: str) -> None:
    """Threads that lock by name and threads that check out fight for the same sockets; each has one user."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid, max_size=3)
    for connection in [engine_pool.connect() for _ in range(3)]:
        connection.close()
    users: Counter[int] = Counter()
    shared: list[int] = []

    def use(handle: Any) -> None:
        users[id(handle)] += 1
        if users[id(handle)] != 1:
            shared.append(id(handle))
        users[id(handle)] -= 1

    def check_out() -> None:
        for _ in range(300):
            connection = engine_pool.connect()
            use(connection.dbapi_connection)
            connection.close()

    def lock() -> None:
        session = Session()
        for number in range(300):
            handle = driver.connections[number % 3]
            try:
                PoolManager.lock(pid, handle, session)
            except ConnectionBusyError:
                continue
            use(handle)
            PoolManager.free(pid, handle)

    for task in [Task(work) for work in (check_out, lock) * 3]:
        task.result()
    assert not shared
    check(inside.ledger(inside.pools()[pid]))
    assert PoolManager.size(pid) == engine_pool.checkedin() == 3


def test_everything_at_once_keeps_the_books(driver: FakeDriver, pid: str, eventually: Eventually) -> None:
    """Engines, sessions that live and die, removals, shutdowns: nobody shares, nothing is lost."""
    limit = 4
    PoolManager.create(pid, max_size=limit)
    users: Counter[Any] = Counter()
    shared: list[Any] = []

    def use(handle: Any) -> None:
        users[handle] += 1
        if users[handle] != 1:
            shared.append(handle)
        users[handle] -= 1

    def check_out(engine_pool: QueriesPool, random: Random) -> None:
        connection = engine_pool.connect()
        use(connection.dbapi_connection)
        what = random.random()
        if what < 0.1:
            connection.invalidate(soft=what < 0.05)
        if what > 0.9:
            connection.detach()
        connection.close()
        if what > 0.97:
            engine_pool.dispose()

    def lock(engine_pool: QueriesPool, random: Random) -> None:
        session = Session()
        connection = random.choice(list(found.connections.values()) or [None])
        if connection is None or (handle := connection.handle) is None:
            return
        PoolManager.lock(pid, handle, session)
        use(handle)
        if random.random() < 0.5:
            PoolManager.free(pid, handle)

    def get(engine_pool: QueriesPool, random: Random) -> None:
        session = Session()
        try:
            handle = PoolManager.get(pid, session)
        except NoIdleConnectionsError:
            if not PoolManager.is_full(pid):
                PoolManager.add(pid, driver.connect())
        else:
            use(handle)
            if random.random() < 0.3:
                handle.close()

    def meddle(engine_pool: QueriesPool, random: Random) -> None:
        what = random.random()
        if what < 0.5:
            PoolManager.clean(pid)
        elif what < 0.7:
            found.shutdown()
        elif what < 0.8:
            found.close()
        elif (connections := list(found.connections.values())) and (
            handle := random.choice(connections).handle
        ) is not None:
            PoolManager.remove_connection(pid, handle)

    def work(what: Callable[[QueriesPool, Random], None], engine_pool: QueriesPool, seed: int) -> None:
        random = Random(seed)
        for _ in range(400):
            with suppress(pool.QueriesException, ValueError):
                what(engine_pool, random)

    found = inside.pools()[pid]
    engines = [QueriesPool(driver.connect, pool_id=pid, timeout=30) for _ in range(2)]
    whats = [check_out] * 4 + [lock, get, meddle]
    for task in [Task(lambda n=n: work(whats[n], engines[n % 2], n)) for n in range(len(whats))]:  # type: ignore[misc]
        task.result()
    gc.collect()
    PoolManager.clean(pid)
    eventually(lambda: not found.locked_connections and found.numbers.closing == 0, "all are back")
    check(inside.ledger(found))
    assert not shared
    assert found.numbers.total <= limit
    assert {c.handle for c in found.connections.values() if not c.closed} == driver.live


# -- Pool --------------------------------------------------------------------------------------------


def test_a_pool_by_itself_tells_what_it_has(driver: FakeDriver) -> None:
    """The properties of queries' Pool; a closed connection is neither busy nor idle."""
    mine = Pool("mine", max_size=4)
    handles = [driver.connect() for _ in range(4)]
    for handle in handles:
        mine.add(handle)
    session = Session()
    idle, locked, executing, closed = handles
    mine.lock(locked, session)
    executing.executing = True
    closed.close()

    def of(connections: list[Connection]) -> list[Any]:
        return sorted((connection.handle for connection in connections), key=handles.index)

    assert mine.id == "mine"
    assert of(mine.idle_connections) == [idle]
    assert of(mine.busy_connections) == [locked, executing]
    assert of(mine.locked_connections) == [locked]
    assert of(mine.executing_connections) == [executing]
    assert of(mine.closed_connections) == [closed]
    assert (len(mine), mine.is_full, bool(mine), bool(Pool("empty"))) == (4, True, True, True)
    assert locked in mine
    assert driver.connect() not in mine
    assert mine.connection_handle(idle).id == id(idle)
    assert mine.idle_duration == 0


def test_the_report_counts_the_locked(driver: FakeDriver, pid: str) -> None:
    """queries' report has the busy ones there; a stale lock is locked, and not busy."""
    PoolManager.create(pid, max_size=3)
    session, dead = Session(), Session()
    for _ in range(3):
        PoolManager.add(pid, driver.connect())
    PoolManager.get(pid, session)
    PoolManager.get(pid, dead)
    with inside.lock(inside.pools()[pid]):  # so that nobody looks after the dead one before we have looked
        del dead
        counts = inside.pools()[pid].report()["connections"]
    assert (counts["locked"], counts["busy"], counts["idle"]) == (2, 1, 2)


def test_the_report_has_queries_keys(driver: FakeDriver, pid: str) -> None:
    """Tools that read queries' report find all that they know."""
    PoolManager.create(pid, idle_ttl=5, max_size=2)
    PoolManager.add(pid, driver.connect())
    found = PoolManager.report()
    assert set(found) >= {"timestamp", "process", "pools"}
    mine = found["pools"][pid]
    assert set(mine) >= {"connections", "exceptions", "executions", "full", "idle", "max_size"}
    assert set(mine["connections"]) >= {"busy", "closed", "executing", "idle", "locked"}
    assert set(mine["idle"]) == {"duration", "ttl"}
    assert (mine["full"], mine["max_size"], mine["idle"]["ttl"]) == (False, 2, 5)


def test_executions_and_exceptions_are_for_sessions_to_count(driver: FakeDriver, pid: str) -> None:
    """queries' sessions write them at the connection; the report has the sums."""
    PoolManager.create(pid)
    handle = driver.connect()
    PoolManager.add(pid, handle)
    connection = PoolManager.get_connection(pid, handle)
    connection.executions += 3
    connection.exceptions += 1
    mine = PoolManager.report()["pools"][pid]
    assert (mine["executions"], mine["exceptions"]) == (3, 1)


def test_a_pool_by_itself_refuses_what_is_too_much(driver: FakeDriver) -> None:
    """As the manager does: the connection is closed."""
    mine = Pool("mine")
    mine.add(driver.connect())
    with pytest.raises(PoolFullError, match="mine"):
        mine.add(driver.connect())
    assert driver.numbers() == [1]
    with pytest.raises(ValueError, match="already exists in pool"):
        mine.add(driver.connections[0])
    assert driver.numbers() == [1]


def test_a_pool_has_the_setters_of_queries(driver: FakeDriver) -> None:
    """set_idle_ttl and set_max_size act at once."""
    clock = FakeClock()
    mine = Pool("mine", idle_ttl=60, max_size=2, time_method=clock)
    for _ in range(2):
        mine.add(driver.connect())
        clock.now += 1
    mine.set_max_size(1)
    assert (len(mine), driver.numbers()) == (1, [2])
    clock.now += 10
    mine.set_idle_ttl(5)
    assert len(mine) == 0
    assert (mine.idle_ttl, mine.max_size) == (5, 1)


def test_a_connection_of_a_dbapi_that_knows_little_is_fine(pid: str) -> None:
    """No isexecuting, closed, weak references, hash, equality or truth value is asked for."""

    class Spartan:
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        def __bool__(self) -> bool:
            raise AssertionError("asked for its truth value")

        def rollback(self) -> None: ...

        def close(self) -> None: ...

    PoolManager.create(pid, max_size=2)
    handle, session = Spartan(), Session()
    PoolManager.add(pid, handle)
    PoolManager.add(pid, Spartan())
    PoolManager.lock(pid, handle, session)
    connection = PoolManager.get_connection(pid, handle)
    assert (connection.executing, connection.closed, connection.busy) == (False, False, True)
    PoolManager.free(pid, handle)
    assert PoolManager.has_connection(pid, handle)
    assert not PoolManager.has_connection(pid, Spartan())
    PoolManager.report()
    PoolManager.clean(pid)
    engine_pool = QueriesPool(Spartan, pool_id=pid, timeout=0)
    out = engine_pool.connect()
    out.detach()
    assert PoolManager.report()["pools"][pid]["connections"]["detached"] == 1
    out.close()
    assert PoolManager.report()["pools"][pid]["connections"]["detached"] == 0
    PoolManager.remove(pid)


# -- Connection --------------------------------------------------------------------------------------


def test_a_lone_connection_works(dsn: str) -> None:
    """As in queries: a handle with a lock, in no pool."""
    handle, session = psycopg2.connect(dsn), Session()
    lone = Connection(handle)
    assert not any((lone.busy, lone.closed, lone.executing, lone.locked, lone.used_by))
    assert lone.handle is handle
    assert lone.id == id(handle)
    lone.lock(session)
    assert (lone.busy, lone.locked) == (True, True)
    assert lone.used_by is not None
    assert lone.used_by() is session
    for call in (lone.close, lambda: lone.lock(Session())):
        with pytest.raises(ConnectionBusyError, match=str(id(handle))):
            call()
    lone.free()
    assert (lone.busy, lone.locked) == (False, False)
    lone.close()
    assert lone.closed
    assert handle.closed
    lone.close()


def test_a_lone_connection_that_executes_is_busy(executing: Any) -> None:
    """Neither freed nor closed."""
    lone = Connection(executing)
    assert (lone.executing, lone.busy) == (True, True)
    for call in (lone.free, lone.close, lambda: lone.lock(Session())):
        with pytest.raises(ConnectionBusyError):
            call()
    assert not executing.closed


def test_a_lone_connection_forgets_a_dead_session(driver: FakeDriver) -> None:
    """Locked, but not busy: the next one may lock it."""
    lone, dead, alive = Connection(driver.connect()), Session(), Session()
    lone.lock(dead)
    del dead
    assert not lone.busy
    lone.lock(alive)
    assert lone.used_by is not None
    assert lone.used_by() is alive


def test_asynchronous_connections_go_round(dsn: str, pid: str) -> None:
    """queries' Tornado sessions use psycopg2's asynchronous mode, which knows no rollback()."""
    PoolManager.create(pid)
    with closing(psycopg2.connect(dsn, async_=1)) as handle:
        wait_select(handle)
        PoolManager.add(pid, handle)
        for _ in range(2):
            session = Session()
            assert PoolManager.get(pid, session) is handle
            cursor = handle.cursor()
            cursor.execute("SELECT 1")
            with pytest.raises(ConnectionBusyError):
                PoolManager.free(pid, handle)
            wait_select(handle)
            PoolManager.free(pid, handle)
        assert not handle.closed
        assert PoolManager.size(pid) == 1


# -- as attributes, and as tests mock them -----------------------------------------------------------


def test_connections_are_a_mapping_of_ids(driver: FakeDriver, pid: str) -> None:
    """One that follows the pool, and that another thread may change while somebody goes through it."""
    PoolManager.create(pid, max_size=3)
    found = inside.pools()[pid].connections
    assert dict(found) == {}
    handles = [driver.connect() for _ in range(3)]
    for handle in handles:
        PoolManager.add(pid, handle)
    assert (list(found), len(found)) == ([id(handle) for handle in handles], 3)
    assert found[id(handles[0])] is PoolManager.get_connection(pid, handles[0])
    for view in (found.keys, found.values, found.items):
        seen = iter(view())
        next(seen)
        PoolManager.remove_connection(pid, handles.pop())
        assert len(list(seen)) == len(handles)
    with pytest.raises(KeyError):
        found[id(driver)]


def test_connections_have_no_slot_that_is_being_opened(
    driver: FakeDriver, pid: str, eventually: Eventually
) -> None:
    """There is no connection yet."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid)
    found = inside.pools()[pid]
    driver.gate.clear()
    opening = Task(engine_pool.connect)
    eventually(lambda: driver.connecting, "it connects")
    assert (len(found), len(found.connections), dict(found.connections)) == (1, 0, {})
    driver.gate.set()
    out = opening.result()
    assert list(found.connections) == [id(out.dbapi_connection)]
    out.close()


def test_used_by_can_be_set(dsn: str, pid: str) -> None:
    """A reference to a session locks for it, in place of another one; None takes the lock off."""
    PoolManager.create(pid)
    handle, first, second = psycopg2.connect(dsn), Session(), Session()
    PoolManager.add(pid, handle)
    connection = PoolManager.get_connection(pid, handle)
    connection.used_by = None
    for session in (first, second):
        connection.used_by = weakref.ref(session)
        assert (connection.locked, connection.busy) == (True, True)
        assert connection.used_by == weakref.ref(session)
        with pytest.raises(NoIdleConnectionsError):
            PoolManager.get(pid, Session())
        begin(handle)
    connection.used_by = None
    assert not connection.locked
    assert handle.info.transaction_status == 0
    assert PoolManager.get(pid, first) is handle


def test_used_by_cannot_be_set_while_an_engine_has_it(driver: FakeDriver, pid: str) -> None:
    """The engine keeps it."""
    engine_pool = QueriesPool(driver.connect, pool_id=pid)
    out = engine_pool.connect()
    connection = PoolManager.get_connection(pid, out.dbapi_connection)
    for reference in (None, weakref.ref(Session)):
        with pytest.raises(ConnectionBusyError):
            connection.used_by = reference
    assert connection.locked
    out.close()


def test_idle_start_is_since_when_nobody_has_had_one(driver: FakeDriver, pid: str) -> None:
    """By the pool's clock; None while somebody has one.  Set to long ago, the TTL is over."""
    clock = FakeClock(1000.0)
    PoolManager.create(pid, 60, 2, clock)
    found, session = inside.pools()[pid], Session()
    assert found.time_method() == 1000
    handles = [driver.connect(), driver.connect()]
    for handle in handles:
        PoolManager.add(pid, handle)
    PoolManager.lock(pid, handles[0], session)
    assert (found.idle_start, found.idle_duration) == (None, 0)
    clock.now += 10
    PoolManager.free(pid, handles[0])
    clock.now += 5
    assert (found.idle_start, found.idle_duration) == (1010, 5)
    found.idle_start = None
    assert (found.idle_start, found.idle_duration) == (1015, 0)
    found.idle_start = clock.now - 59
    found.clean()
    assert len(found) == 2
    found.idle_start = clock.now - 61
    found.clean()
    assert (len(found), driver.live) == (0, set())


def test_limits_can_be_assigned(driver: FakeDriver, pid: str) -> None:
    """As in queries; they act at once, as the setters do."""
    clock = FakeClock()
    PoolManager.create(pid, 60, 2, clock)
    found = inside.pools()[pid]
    for _ in range(2):
        found.add(driver.connect())
        clock.now += 1
    found.max_size = 1
    assert (found.max_size, driver.numbers()) == (1, [2])
    clock.now += 10
    found.idle_ttl = 5
    assert (found.idle_ttl, len(found)) == (5, 0)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("max_size", 7),
        ("idle_ttl", 7),
        ("idle_start", 7),
        ("connections", {}),
        ("time_method", int),
        ("get", int),
    ],
)
def test_an_attribute_of_a_pool_can_be_mocked(pid: str, attribute: str, value: Any) -> None:
    """On one pool, with what there was before put back."""
    PoolManager.create(pid, 60, 2, FakeClock())
    found = inside.pools()[pid]
    before = getattr(found, attribute)
    with mock.patch.object(found, attribute, value):
        assert getattr(found, attribute) == value
    assert getattr(found, attribute) == before


@pytest.mark.parametrize("attribute", ["lock", "free", "close", "used_by", "executions", "handle"])
def test_an_attribute_of_a_connection_can_be_mocked(driver: FakeDriver, attribute: str) -> None:
    """On one connection."""
    lone = Connection(driver.connect())
    before = getattr(lone, attribute)
    with mock.patch.object(lone, attribute) as mocked:
        found = getattr(lone, attribute)
        assert found is mocked or found() is mocked()  # used_by refers to the session of its own
    assert getattr(lone, attribute) == before


def test_the_pool_calls_what_is_mocked(driver: FakeDriver, pid: str) -> None:
    """As queries' does: the methods of Connection, and its properties on the class."""
    PoolManager.create(pid)
    handle = driver.connect()
    PoolManager.add(pid, handle)
    with mock.patch.multiple(Connection, lock=mock.DEFAULT, free=mock.DEFAULT, close=mock.DEFAULT) as mocked:
        session = Session()
        assert PoolManager.get(pid, session) is handle
        PoolManager.lock(pid, handle, session)
        assert mocked["lock"].mock_calls == [mock.call(session)] * 2
        PoolManager.free(pid, handle)
        PoolManager.remove_connection(pid, handle)
        assert [len(mocked[name].mock_calls) for name in ("free", "close")] == [1, 1]
    with mock.patch.multiple(Connection, busy=True, closed=False):
        assert not PoolManager.has_idle_connection(pid)
    with mock.patch.object(Connection, "closed", True), mock.patch.object(Pool, "remove") as remove:
        PoolManager.clean(pid)
    remove.assert_called_once_with(handle)


def test_a_mock_goes_round_as_a_connection(pid: str) -> None:
    """It says of everything that it has it."""
    PoolManager.create(pid)
    handle, session = mock.Mock(closed=False), Session()
    handle.isexecuting.return_value = False
    PoolManager.add(pid, handle)
    assert PoolManager.get(pid, session) is handle
    PoolManager.free(pid, handle)
    handle.rollback.assert_called_once_with()
    PoolManager.remove_connection(pid, handle)
    handle.close.assert_called_once_with()


def test_the_default_of_max_size_comes_from_the_environment_as_in_queries() -> None:
    """``QUERIES_MAX_POOL_SIZE``; 1 without it."""
    assert (pool.DEFAULT_IDLE_TTL, pool.DEFAULT_MAX_SIZE) == (60, 1)
    program = "from sqla_queries_pool.pool import *; print(Pool('mine').max_size, DEFAULT_MAX_SIZE)"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "QUERIES_MAX_POOL_SIZE": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == ["7", "7"]


# -- side by side with queries -----------------------------------------------------------------------

# Pools are made with room for one connection, or as many as ``create`` is told.
SAME = {
    "create twice": "create; create",
    "nothing there": "size; get s1; add c1; remove; clean; is_full",
    "add, get, free, get": "create; add c1; get s1; free c1; get s2; get s1",
    "add twice": "create; add c1; add c1; size",
    "add to a full one": "create; add c1; add c2; size; closed c2; is_full",
    "lock by name": "create; add c1; lock c1 s1; lock c1 s2; get s2; free c1; get s2",
    "lock twice by one session": "create; add c1; lock c1 s1; lock c1 s1",
    "strangers": "create; free c1; lock c1 s1; remove_connection c1; has_connection c1",
    "look for a stranger": "create; get_connection c1",
    "remove one": "create; add c1; remove_connection c1; closed c1; size; remove_connection c1",
    "remove a locked one": "create; add c1; get s1; remove_connection c1; closed c1; size",
    "remove a locked one that is closed": "create; add c1; get s1; close c1; remove_connection c1; size",
    "remove all": "create; add c1; remove; closed c1; size",
    "remove all, one locked": "create; add c1; get s1; remove; closed c1; size",
    "executing": "create; add c1; execute c1; get s1; lock c1 s1; free c1; remove; size",
    "closed while executing": "create; add c1; execute c1; close c1; remove_connection c1; size",
    "a session dies": "create; add c1; get s1; drop s1; get s2; has_idle_connection",
    "a session dies, lock": "create; add c1; get s1; drop s1; lock c1 s2; has_idle_connection",
    "a session dies, remove": "create; add c1; get s1; drop s1; remove; closed c1",
    "clean up what is closed": "create 2; add c1; add c2; close c1; clean; size",
    "clean up all": "create; add c1; close c1; clean; size",
    "clean an empty one": "create; clean; size",
    "has idle": "create; add c1; has_idle_connection; get s1; has_idle_connection; free c1; get s1",
    "grow": "create; add c1; is_full; set_max_size 2; is_full; add c2; size",
    "free an idle one": "create; add c1; free c1; has_idle_connection",
    "shut down": "create; add c1; get s1; pool shutdown; closed c1; size",
    "shut down what executes": "create; add c1; execute c1; pool shutdown; closed c1; size",
    "the first added is the first got": "create 2; add c1; add c2; get s1; get s2",
    "one dies in use": "create; add c1; get s1; close c1; free c1; size; remove_connection c1; size",
    "get removes nothing that is idle": "create 2; add c1; add c2; get s1; has_connection c2",
}
# What is wrong in queries: steps, and what the last of them comes to there and here; the others are alike.
DIFFERENT: dict[str, tuple[str, Any, Any]] = {
    # There the size is compared with the cap by ==, so that a lowered one holds no more.
    "shrunken cap": (
        "create 3; add c1; add c2; lock c1 s1; lock c2 s2; set_max_size 1; add c3",
        None,
        "PoolFullError",
    ),
    # Closed before it is seen that another one is busy.
    "all or nothing": ("create 2; add c1; add c2; lock c2 s1; remove; closed c1", True, False),
    # A closed connection stays in the pool until somebody cleans; here it goes when somebody finds it.
    "get finds a closed one": ("create; add c1; close c1; get s1; size", 1, 0),
    # What a dead session left is handed out as it is.
    "a stale lock is reset": ("create; add c1; get s1; drop s1; get s2; rollbacks c1", 0, 1),
    # free() leaves the transaction of the session to the next one.
    "free rolls back": ("create; add c1; get s1; free c1; rollbacks c1", 0, 1),
    # The first that executes ends it all.
    "shut down the others": ("create 2; add c1; add c2; execute c1; pool shutdown; closed c2", False, True),
}


def outcomes(module: Any, steps: str) -> list[Any]:
    """Do the steps with a module's PoolManager; what each returns, or the name of what it raises.

    ``c1`` and the like are connections, ``s1`` sessions.
    """
    manager, driver = module.PoolManager, FakeDriver()
    name = f"side-by-side-{next(_numbers)}"
    things: dict[str, Any] = {}

    def thing(word: str) -> Any:
        if word.isdigit():
            return int(word)
        if word[1:].isdigit() and word not in things:
            things[word] = driver.connect() if word[0] == "c" else Session()
        return things.get(word, word)

    def do(verb: str, *words: str) -> Any:
        if verb == "drop":
            del things[words[0]]
            return gc.collect() and None
        arguments = [thing(word) for word in words]
        if verb == "create":
            return manager.create(name, 60, *arguments)
        if verb == "pool":
            return getattr(inside.pools(manager)[name], arguments[0])()
        if verb == "close":
            return arguments[0].close()
        if verb == "closed":
            return arguments[0].closed
        if verb == "rollbacks":
            return arguments[0].calls["rollback"]
        if verb == "execute":
            arguments[0].executing = True
            return None
        found = getattr(manager, verb)(name, *arguments)
        return next((word for word, value in things.items() if value is found), found)

    found = []
    for step in steps.split(";"):
        try:
            found.append(do(*step.split()))
        except Exception as error:
            found.append(type(error).__name__)
    for connection in driver.connections:
        connection.executing = False
    if name in manager.instance():
        with suppress(Exception):
            inside.pools(manager)[name].shutdown()
        manager.clean(name)
    return found


@pytest.fixture(scope="module")
def theirs() -> Any:
    """queries' own module, where it is installed."""
    return pytest.importorskip("queries.pool")


@pytest.mark.parametrize("what", SAME)
def test_side_by_side_with_queries(theirs: Any, what: str) -> None:
    """The same steps have the same outcomes: values and exceptions."""
    assert outcomes(pool, SAME[what]) == outcomes(theirs, SAME[what])


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_wrong_in_queries_is_right_here(theirs: Any, what: str) -> None:
    """The intended differences, each seen on both sides."""
    steps, wrong, right = DIFFERENT[what]
    before, there = outcomes(theirs, steps)[:-1], outcomes(theirs, steps)[-1]
    assert there == wrong
    assert outcomes(pool, steps) == [*before, right]


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_right_here_without_queries(what: str) -> None:
    """Our side of the differences, also where queries is not installed."""
    steps, _, right = DIFFERENT[what]
    assert outcomes(pool, steps)[-1] == right
