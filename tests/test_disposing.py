"""dispose, recreate and Engine.dispose(): which connections close, when, and what goes on meanwhile."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import inside
import pytest
from fakes import FakeConnection, FakeDriver, Task
from hazards import driver_connection_of, report
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool

Eventually = Callable[..., None]
_numbers = itertools.count()


@pytest.fixture
def make_engine(driver: FakeDriver) -> Callable[..., Engine]:
    """Make engines of one database that only this test has: ``make_engine(max_size=2)``."""
    url = f"fake://host/disposing_{next(_numbers)}"

    def make(**kw: Any) -> Engine:
        kw = {"pool_timeout": 0, **kw}
        return create_engine(url, module=driver, poolclass=QueriesPool, **kw)

    return make


# -- dispose() alone ---------------------------------------------------------------------------------


def test_dispose_closes_what_is_idle_and_leaves_the_pool_usable(driver: FakeDriver) -> None:
    """The connections that are returned later stay, the disposed pool goes on with them."""
    pool = QueriesPool(driver.connect, max_size=3, timeout=0)
    out, idle = pool.connect(), pool.connect()
    idle.close()
    pool.dispose()
    assert driver.numbers() == [1]
    assert (pool.checkedin(), pool.checkedout()) == (0, 1)
    out.close()
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    again = pool.connect()
    assert driver_connection_of(again) is driver.connections[0]
    again.close()


def test_dispose_closes_hollow_ones_too(driver: FakeDriver) -> None:
    """A connection that was invalidated has nothing to close, but its slot is free after dispose."""
    pool = QueriesPool(driver.connect, max_size=2, timeout=0)
    connection = pool.connect()
    connection.invalidate()
    connection.close()
    pool.dispose()
    assert (pool.checkedin(), pool.checkedout()) == (0, 0)
    assert PoolManager.size(pool.pid) == 0


def test_dispose_closes_no_other_engines_connections(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """Engines of one database share the budget, not their connections' lives."""
    mine, other = make_engine(), make_engine()
    for engine in (mine, other):
        engine.connect().close()
    mine.dispose()
    assert driver.numbers() == [2]
    assert other.pool.checkedin() == 1  # type: ignore[attr-defined]


def test_a_program_that_disposes_again_and_again_leaves_one_reminder(
    make_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """The housekeeper comes by once; it does not remember each time that it was asked to."""
    engine = make_engine()
    for _ in range(100):
        engine.connect().close()
        engine.dispose()
    upkeep = inside.upkeep(inside.shared(engine.pool))
    eventually(lambda: weakref.getweakrefcount(upkeep) == 1, "the housekeeper has read its mail")


def test_disposing_twice_is_harmless(driver: FakeDriver, make_engine: Callable[..., Engine]) -> None:
    """A second dispose closes nothing and counts nothing down."""
    engine = make_engine(max_size=2)
    engine.connect().close()
    engine.dispose()
    engine.dispose()
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.checkedout(), pool.overflow()) == (0, 0, -2)
    engine.connect().close()


# -- Engine.dispose() --------------------------------------------------------------------------------


def test_a_limit_of_the_engine_alone_counts_over_a_dispose(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """The engine's own ceiling, below the pool's, is not doubled by disposing."""
    sibling = make_engine(max_size=5)
    engine = make_engine(max_size=1)
    out = engine.connect()
    engine.dispose()
    with pytest.raises(CheckoutTimeout, match="1 for this engine"):
        engine.connect()
    out.close()
    engine.connect().close()
    assert sibling.pool.size() == 5  # type: ignore[attr-defined]


def test_a_connection_born_after_the_dispose_stays(driver: FakeDriver) -> None:
    """Who still uses the disposed pool gets new connections there, and keeps them."""
    old = QueriesPool(driver.connect, max_size=3, timeout=0)
    before = old.connect()
    old.dispose()
    new = old.recreate()
    after = old.connect()
    before.close()
    after.close()
    assert driver.numbers() == [2]
    assert old.checkedin() == 1
    assert new.pid == old.pid


def test_a_reconnect_after_the_dispose_is_of_the_new_generation(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """A generation binds sockets, not records: a record that reconnected after the dispose stays open."""
    engine = make_engine(max_size=1, pool_pre_ping=True, pool_timeout=30)
    engine.connect().close()
    old = engine.pool
    pinging, go_on = threading.Event(), threading.Event()

    def ping(connection: FakeConnection) -> None:
        pinging.set()
        assert go_on.wait(10)
        raise FakeDriver.OperationalError("server closed the connection unexpectedly")

    driver.on_ping = ping
    task = Task(old.connect)
    assert pinging.wait(10)
    engine.dispose()
    go_on.set()
    connection = task.result()
    assert driver.numbers() == [2]
    connection.close()
    assert driver.numbers() == [2]
    assert old.checkedin() == 1  # type: ignore[attr-defined]


def test_a_connect_that_a_dispose_overtakes_is_of_the_old_generation(
    driver: FakeDriver, make_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """It may be to the server that the dispose was about: it is used, and closes when it is returned."""
    engine = make_engine(max_size=2)
    driver.gate.clear()
    task = Task(engine.connect)
    eventually(lambda: driver.connecting == 1)
    engine.dispose()
    driver.gate.set()
    connection = task.result()
    assert driver.numbers() == [1]
    connection.close()
    assert driver.numbers() == []


def test_an_invalidated_one_that_was_out_over_a_dispose_leaves_nothing(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """It is returned hollow to a pool that is of no use any more: its slot is free."""
    engine = make_engine(max_size=1)
    out = engine.raw_connection()
    engine.dispose()
    out.invalidate()
    out.close()
    assert PoolManager.size(engine.pool.pid) == 0  # type: ignore[attr-defined]
    engine.connect().close()


def test_a_detached_connection_is_beyond_dispose(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """What was detached belongs to who did it."""
    engine = make_engine(max_size=1)
    connection = engine.connect()
    connection.detach()
    engine.dispose()
    assert driver.numbers() == [1]
    assert report(engine.pool)["connections"]["detached"] == 1  # type: ignore[arg-type]
    connection.close()
    assert driver.numbers() == []
    assert report(engine.pool)["connections"]["detached"] == 0  # type: ignore[arg-type]


def test_a_checkout_that_waits_during_a_dispose_is_served(
    driver: FakeDriver, make_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """Threads in the disposed pool's line get connections, opened after the dispose; nobody is left over."""
    engine = make_engine(max_size=1, pool_timeout=30)
    out = engine.connect()
    old = engine.pool
    order: list[int] = []

    def work(number: int) -> None:
        connection = old.connect()
        order.append(number)
        connection.close()

    tasks = []
    for number in range(4):
        tasks.append(Task(lambda number=number: work(number)))  # type: ignore[misc]
        eventually(lambda n=number + 1: report(old)["waiting"] == n)  # type: ignore[arg-type]
    engine.dispose()
    newcomer = Task(engine.connect)
    eventually(lambda: report(old)["waiting"] == 5)  # type: ignore[arg-type]
    out.close()
    for task in tasks:
        task.result()
    newcomer.result().close()
    assert order == list(range(4))
    assert 1 not in driver.numbers()
    assert driver.peak == 1


# -- recreate() --------------------------------------------------------------------------------------


def test_recreate_alone_leaves_the_old_pool_untouched(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """``Engine.dispose(close=False)``: idle and held connections of the old pool stay open, and count."""
    engine = make_engine(max_size=3)
    out, idle = engine.connect(), engine.connect()
    idle.close()
    old: Any = engine.pool
    engine.dispose(close=False)
    assert engine.pool is not old
    assert driver.numbers() == [1, 2]
    assert PoolManager.size(old.pid) == 2
    out.close()
    assert old.checkedin() == 2
    assert driver.numbers() == [1, 2]


def test_the_old_pools_connections_give_way_to_the_new(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """After ``dispose(close=False)`` the limit still holds: what the old one has idle is evicted."""
    engine = make_engine(max_size=1)
    engine.connect().close()
    old = engine.pool
    engine.dispose(close=False)
    engine.connect().close()
    assert driver.events == ["open 1", "close 1", "open 2"]
    assert old.checkedin() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["custom creator", "sqlite in memory"])
def test_a_private_pool_is_usable_after_dispose_without_close(driver: FakeDriver, what: str) -> None:
    """The recreated pool is another private one: what the old one keeps can't be in its way."""
    kw: dict[str, Any] = {"poolclass": QueriesPool, "max_size": 1, "pool_timeout": 0}
    if what == "custom creator":
        engine = create_engine("fake://", module=driver, creator=driver.connect, **kw)
    else:
        engine = create_engine("sqlite://", **kw)
    engine.connect().close()
    old: Any = engine.pool
    engine.dispose(close=False)
    new: Any = engine.pool
    assert new.pid != old.pid
    assert old.checkedin() == 1
    engine.connect().close()
    assert (old.checkedin(), new.checkedin()) == (1, 1)
    old.dispose()
    engine.dispose()


def test_recreate_carries_over_every_parameter(driver: FakeDriver) -> None:
    """All that can be said to a pool holds for the recreated one, also in a class of the user's own."""

    class Mine(QueriesPool):
        pass

    stated: dict[str, Any] = {
        "max_size": 7,
        "idle_ttl": 12.5,
        "timeout": 3.0,
        "pool_id": f"recreated-{next(_numbers)}",
        "use_lifo": False,
        "check_limits": False,
        "recycle": 99,
        "pre_ping": True,
        "reset_on_return": "commit",
        "logging_name": "mine",
        "echo": "debug",
    }
    old = Mine(driver.connect, **stated)
    old.dispose()
    new: Any = old.recreate()
    assert type(new) is Mine
    assert new.pid == stated["pool_id"]
    assert (new.size(), new.timeout()) == (7, 3.0)
    for name in (
        "logging_name",
        "echo",
    ):
        assert getattr(new, name) == getattr(old, name), name
    assert inside.settings(new) == inside.settings(old)


@pytest.mark.parametrize(
    ("stated", "size"),
    [
        ({}, 15),
        ({"max_size": None}, 0),
        ({"pool_size": 3}, 13),
        ({"max_overflow": 1}, 6),
        ({"pool_size": 2, "max_overflow": 2}, 4),
        ({"pool_size": 0}, 0),
    ],
)
def test_recreate_carries_over_a_limit_however_it_was_stated(
    driver: FakeDriver, stated: dict[str, Any], size: int
) -> None:
    """QueuePool's parameters and no statement at all, too."""
    old = QueriesPool(driver.connect, **stated)
    old.dispose()
    assert old.recreate().size() == old.size() == size


def test_limits_set_at_run_time_survive_a_dispose(
    driver: FakeDriver, make_engine: Callable[..., Engine]
) -> None:
    """``set_max_size`` is about the database, not about the engine that was disposed."""
    engine = make_engine(max_size=5)
    PoolManager.set_max_size(engine.pool.pid, 1)  # type: ignore[attr-defined]
    engine.dispose()
    connection = engine.connect()
    with pytest.raises(CheckoutTimeout):
        engine.connect()
    connection.close()


# -- private pools, and their ids --------------------------------------------------------------------


def test_engine_dispose_keeps_a_private_pid(driver: FakeDriver) -> None:
    """The recreated pool takes the disposed one's place, so it takes its budget, too."""
    old = QueriesPool(driver.connect, max_size=1, timeout=0)
    out = old.connect()
    old.dispose()
    new = old.recreate()
    assert new.pid == old.pid
    with pytest.raises(CheckoutTimeout):
        new.connect()
    out.close()
    new.connect().close()


def test_recreate_alone_makes_a_new_private_pid(driver: FakeDriver) -> None:
    """Two pools that both live on are two."""
    old = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = old.connect()
    new = old.recreate()
    assert new.pid != old.pid
    new.connect().close()
    connection.close()


# -- engines that are dropped ------------------------------------------------------------------------


def test_a_dropped_engine_gives_its_budget_back(
    driver: FakeDriver, make_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """An engine that was collected without dispose() has no connection, slot or say in the limit left."""
    keeper = make_engine(max_size=1)
    dropped = make_engine(max_size=3)
    for connection in [dropped.connect() for _ in range(3)]:
        connection.close()
    pid = keeper.pool.pid  # type: ignore[attr-defined]
    assert report(keeper.pool)["max_size"] == 3  # type: ignore[arg-type]
    del dropped, connection
    gc.collect()
    eventually(lambda: PoolManager.size(pid) == 0 and not driver.live, "the connections are closed")
    assert report(keeper.pool)["max_size"] == 1  # type: ignore[arg-type]


def test_a_waiting_checkout_gets_the_slot_of_a_dropped_engine(
    driver: FakeDriver, make_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """A connection that was out when its engine was forgotten gives its slot to the next waiter."""
    waiting = make_engine(max_size=1, pool_timeout=30)
    dropped = make_engine(max_size=1)
    connection = dropped.connect()
    task = Task(waiting.connect)
    eventually(lambda: report(waiting.pool)["waiting"] == 1)  # type: ignore[arg-type]
    del dropped, connection
    gc.collect()
    task.result().close()
    assert driver.numbers() == [2]


def test_many_engines_made_and_dropped_leave_nothing(
    driver: FakeDriver, make_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """No socket, slot or attachment of an engine that is no more."""
    keeper = make_engine(max_size=4)
    pid = keeper.pool.pid  # type: ignore[attr-defined]
    for _ in range(50):
        engine = make_engine(max_size=4, pool_timeout=30)
        engine.connect().close()
    del engine
    gc.collect()
    eventually(lambda: not driver.live and PoolManager.size(pid) == 0, "nothing is left")
    assert len(inside.ledger(keeper.pool).attachments) == 1
    assert driver.peak <= 4
