"""Several engines on one budget: which limit holds, who gives way to whom, and who shares nothing."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import pytest
from fakes import FakeClock, FakeDriver, Task
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool

Eventually = Callable[..., None]
_numbers = itertools.count()


@pytest.fixture
def pid() -> str:
    """A pool id that only this test has."""
    return f"sharing-{next(_numbers)}"


@pytest.fixture
def make_pool(driver: FakeDriver, pid: str) -> Callable[..., QueriesPool]:
    """Make pools of engines that share one pool id: ``make_pool(max_size=2)``."""

    def make(**kw: Any) -> QueriesPool:
        return QueriesPool(driver.connect, pool_id=pid, **{"timeout": 0, **kw})

    return make


def report(pid: str) -> dict[str, Any]:
    """What is reported about a pool."""
    found: dict[str, Any] = inside.pools()[pid].report()
    return found


def used_once(pool: QueriesPool) -> QueriesPool:
    """The pool, which now has one idle connection more."""
    pool.connect().close()
    return pool


# -- which limit holds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "limit"),
    [
        ([{}], 15),
        ([{}, {}], 15),
        ([{"max_size": 3}], 3),
        ([{"max_size": 3}, {"max_size": 5}], 5),
        ([{"max_size": 3}, {}], 3),
        ([{"max_size": 20}, {}, {"max_size": 2}], 20),
        ([{"max_size": 3}, {"max_size": None}], None),
        ([{"max_size": 3}, {"pool_size": 2, "max_overflow": 4}], 6),
        ([{"max_size": 3}, {"pool_size": 0}], None),
        ([{"max_size": 3}, {"max_overflow": -1}], None),
    ],
)
def test_the_limit_is_the_largest_that_an_engine_states(
    pid: str, make_pool: Callable[..., QueriesPool], stated: list[dict[str, Any]], limit: int | None
) -> None:
    """In whatever order the engines are made; who states nothing asks for nothing; 15 where nobody does."""
    for order in itertools.permutations(stated):
        pools = [make_pool(**kw) for kw in order]
        assert report(pid)["max_size"] == limit
        del pools
        gc.collect()
        PoolManager.clean(pid)


def test_engines_of_one_database_share_its_limit(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool]
) -> None:
    """The budget is the database's: what one engine has out, no other can have."""
    one, two = make_pool(max_size=3), make_pool(max_size=3)
    connections = [one.connect(), two.connect(), one.connect()]
    for pool in (one, two):
        with pytest.raises(CheckoutTimeout, match="open 3, held 3"):
            pool.connect()
    connections.pop().close()
    two.connect().close()
    assert driver.peak == 3
    del connections


def test_an_engine_that_waits_gets_what_another_gives_back(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str, eventually: Eventually
) -> None:
    """A waiter is served by any engine's slot: that connection is closed, then one of its own opened."""
    one, two = make_pool(max_size=1), make_pool(max_size=1, timeout=30)
    connection = one.connect()
    task = Task(two.connect)
    eventually(lambda: report(pid)["waiting"] == 1)
    connection.close()
    task.result().close()
    assert driver.events == ["open 1", "close 1", "open 2"]


def test_an_engine_that_states_less_does_not_exceed_its_own(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool]
) -> None:
    """The limit is 5 for all together; the one that stated 2 has 2 at most."""
    big, small = make_pool(max_size=5), make_pool(max_size=2)
    connections = [small.connect(), small.connect()]
    with pytest.raises(CheckoutTimeout, match=r"limit 5 \(2 for this engine\)"):
        small.connect()
    connections += [big.connect() for _ in range(3)]
    assert (small.size(), big.size()) == (2, 5)
    assert driver.peak == 5
    del connections


def test_an_engine_at_its_own_ceiling_takes_nothing_from_others(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool]
) -> None:
    """Another engine's idle connection is no help to one that has all it may have."""
    big, small = used_once(make_pool(max_size=5)), make_pool(max_size=1)
    connection = small.connect()
    with pytest.raises(CheckoutTimeout):
        small.connect()
    assert big.checkedin() == 1
    connection.close()


def test_a_limit_set_by_hand_holds_whatever_engines_state(
    pid: str, make_pool: Callable[..., QueriesPool]
) -> None:
    """``PoolManager.create`` decides, before and after engines come; it may allow more and less than they."""
    PoolManager.create(pid, max_size=2)
    pool = make_pool(max_size=9)
    assert report(pid)["max_size"] == 2
    connections = [pool.connect(), pool.connect()]
    with pytest.raises(CheckoutTimeout):
        pool.connect()
    del connections
    assert pool.size() == 9


def test_an_engine_without_a_statement_has_the_limit_that_was_set(
    pid: str, make_pool: Callable[..., QueriesPool]
) -> None:
    """Its size() is the pool's."""
    PoolManager.create(pid, max_size=2)
    assert make_pool().size() == 2


@pytest.mark.parametrize("spelling", [{"max_size": None}, {"pool_size": 0}, {"max_overflow": -1}])
def test_a_limit_lifted_by_an_engine_is_warned_of_once(
    make_pool: Callable[..., QueriesPool], caplog: pytest.LogCaptureFixture, spelling: dict[str, Any]
) -> None:
    """It concerns every engine of the database; the log says so, and what a limit is good for.

    Once: neither the next engine nor a dispose repeats it.
    """
    with caplog.at_level(logging.WARNING, "sqlalchemy.pool"):
        pools = [make_pool(**spelling), make_pool(**spelling), make_pool(max_size=None)]
        pools[0].dispose()
        pools[0].recreate()
    (record,) = caplog.records
    assert record.message.startswith(
        f"{pools[0].pid}: an engine sets no limit, so all engines of this database have none"
    )
    assert "With max_size=… checkouts above it wait their turn" in record.message


def test_raised_under_load_waiters_are_served_at_once(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str, eventually: Eventually
) -> None:
    """``set_max_size`` up: as many of those who wait as there are new slots, the oldest first."""
    pool = make_pool(timeout=30)
    PoolManager.set_max_size(pid, 1)
    held = pool.connect()
    served: list[int] = []
    done = threading.Event()

    def work(number: int) -> None:
        connection = pool.connect()
        served.append(number)
        done.wait(10)
        connection.close()

    tasks = []
    for number in range(4):
        tasks.append(Task(lambda number=number: work(number)))  # type: ignore[misc]
        eventually(lambda n=number + 1: report(pid)["waiting"] == n)
    PoolManager.set_max_size(pid, 3)
    eventually(lambda: len(served) == 2)
    assert sorted(served) == [0, 1]
    assert report(pid)["waiting"] == 2
    PoolManager.set_max_size(pid, "none")  # type: ignore[arg-type]
    eventually(lambda: len(served) == 4)
    done.set()
    for task in tasks:
        task.result()
    held.close()
    assert driver.peak == 5


def test_lowered_under_load_idle_ones_close_at_once_and_held_ones_on_return(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str
) -> None:
    """``set_max_size`` down is no error for anybody, and never takes a connection out of a hand."""
    pool = make_pool(max_size=5)
    held = [pool.connect() for _ in range(3)]
    for idle in [pool.connect(), pool.connect()]:
        idle.close()
    PoolManager.set_max_size(pid, 2)
    assert driver.numbers() == [1, 2, 3]
    with pytest.raises(CheckoutTimeout, match="open 3, held 3, opening 0, waiting 0, limit 2"):
        pool.connect()
    held.pop().close()
    assert driver.numbers() == [1, 2]
    held.pop().close()
    assert driver.numbers() == [1, 2]
    assert pool.checkedin() == 1
    held.pop().close()


def test_lowered_under_load_waiters_wait_for_what_is_left(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str, eventually: Eventually
) -> None:
    """The first connections that are returned close, the last one is a waiter's."""
    pool = make_pool(max_size=3, timeout=30)
    held = [pool.connect() for _ in range(3)]
    task = Task(pool.connect)
    eventually(lambda: report(pid)["waiting"] == 1)
    PoolManager.set_max_size(pid, 1)
    for connection in held[:2]:
        connection.close()
    assert report(pid)["waiting"] == 1
    held[2].close()
    task.result().close()
    assert driver.attempts == 3


def test_the_limit_follows_the_engines_that_are_there(
    pid: str, make_pool: Callable[..., QueriesPool], eventually: Eventually
) -> None:
    """An engine that is gone asks for nothing any more."""
    small, big = make_pool(max_size=2), make_pool(max_size=9)
    assert report(pid)["max_size"] == 9
    del big
    gc.collect()
    eventually(lambda: report(pid)["max_size"] == 2)
    del small


# -- who gives way -----------------------------------------------------------------------------------


def test_the_least_recently_used_connection_gives_way(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str
) -> None:
    """Of all engines' idle connections the one idle for longest is closed before the new one opens."""
    clock = FakeClock()
    PoolManager.create(pid, max_size=3, time_method=clock, idle_ttl=None)
    first, second = make_pool(), make_pool()
    connections = [first.connect(), second.connect(), first.connect()]
    for connection in (connections[1], connections[0], connections[2]):
        clock.now += 1
        connection.close()
    newcomer = make_pool()
    held = [newcomer.connect()]
    assert driver.events[3:] == ["close 2", "open 4"]
    held.append(newcomer.connect())
    assert driver.events[5:] == ["close 1", "open 5"]
    held.append(newcomer.connect())
    assert driver.events[7:] == ["close 3", "open 6"]
    with pytest.raises(CheckoutTimeout):
        newcomer.connect()
    assert driver.peak == 3
    del held


def test_a_hollow_one_gives_way_first(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str
) -> None:
    """A slot without a socket is spared before any that has one, however old that is."""
    clock = FakeClock()
    PoolManager.create(pid, max_size=2, time_method=clock, idle_ttl=None)
    full, hollow = used_once(make_pool()), make_pool()
    clock.now += 1
    connection = hollow.connect()
    connection.invalidate()
    connection.close()
    newcomer = make_pool()
    held = newcomer.connect()
    assert (full.checkedin(), hollow.checkedin()) == (1, 0)
    assert driver.numbers() == [1, 3]
    held.close()


def test_what_was_added_by_hand_gives_way_last(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str
) -> None:
    """Engines' connections first; then those that somebody opened for the queries API."""
    clock = FakeClock()
    PoolManager.create(pid, max_size=2, time_method=clock, idle_ttl=None)
    PoolManager.add(pid, driver.connect())
    clock.now += 1
    used_once(sibling := make_pool())
    newcomer = make_pool()
    held = [newcomer.connect()]
    assert driver.numbers() == [1, 3]
    held.append(newcomer.connect())
    assert driver.numbers() == [3, 4]
    assert sibling.checkedin() == 0
    del held


def test_an_engine_uses_its_own_before_it_evicts(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool]
) -> None:
    """Nobody gives way to one who has a connection idle, or room for one more."""
    mine, other = used_once(make_pool(max_size=3)), used_once(make_pool(max_size=3))
    connections = [mine.connect(), mine.connect()]
    assert other.checkedin() == 1
    assert driver.numbers() == [1, 2, 3]
    del connections


def test_without_waiting_an_engine_may_evict_and_open(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool]
) -> None:
    """``timeout=0`` is about waiting for others, and an idle connection is nobody's."""
    first = used_once(make_pool(max_size=1))  # kept: one that is collected is being closed for a moment
    sibling = used_once(make_pool(max_size=1))
    connection = make_pool(max_size=1, timeout=0).connect()
    assert (first.checkedin(), sibling.checkedin()) == (0, 0)
    assert driver.peak == 1
    connection.close()


def test_an_eviction_whose_connect_fails_frees_the_slot(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], pid: str
) -> None:
    """What gave way is closed for good; the slot is free for the next one."""
    sibling = used_once(make_pool(max_size=1))
    driver.failures = 1
    with pytest.raises(FakeDriver.OperationalError):
        make_pool(max_size=1).connect()
    assert PoolManager.size(pid) == 0
    sibling.connect().close()
    assert driver.peak == 1


def test_a_close_that_fails_stops_no_eviction(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's error about the other engine's connection is not this caller's."""
    sibling = used_once(make_pool(max_size=1))
    close = driver.connections[0].close

    def fail() -> None:
        close()
        raise FakeDriver.OperationalError("half closed")

    monkeypatch.setattr(driver.connections[0], "close", fail)
    make_pool(max_size=1).connect().close()
    assert sibling.checkedin() == 0


# -- who shares nothing ------------------------------------------------------------------------------


def test_pools_with_creators_of_their_own_are_private() -> None:
    """Nobody knows what a creator connects to: it is not called to find out, and nothing is warned of."""

    def creator() -> Any:
        raise AssertionError("called")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = QueriesPool(creator), QueriesPool(creator)
        three = create_engine("postgresql://me@host/db", creator=creator, poolclass=QueriesPool).pool
    assert len({one.pid, two.pid, three.pid}) == 3  # type: ignore[attr-defined]
    assert all(pool.pid.startswith("private-") for pool in (one, two, three))  # type: ignore[attr-defined]


def test_a_pool_id_makes_private_pools_share(
    driver: FakeDriver, make_pool: Callable[..., QueriesPool]
) -> None:
    """``pool_id`` is how a creator of one's own takes part."""
    one, two = make_pool(max_size=1), make_pool(max_size=1)
    connection = one.connect()
    with pytest.raises(CheckoutTimeout):
        two.connect()
    connection.close()


def test_pools_of_engines_that_were_dropped_unused_leave_within_a_minute() -> None:
    """Thousands of tenants, each with an engine for a moment, would stay for an hour, which is their TTL."""
    clock = FakeClock(1000.0)
    pids = set()
    for number in range(50):
        url = f"postgresql+psycopg2://me@db.example.net/tenant{number}"
        pool: Any = create_engine(url, poolclass=QueriesPool, idle_ttl=3600).pool
        inside.set_clock(pool, clock)
        pids.add(pool.pid)
    upkeeps = [inside.pools()[pid].core.upkeep for pid in pids]
    del pool
    gc.collect()
    assert pids <= set(inside.pools())
    for seconds in (1, 59, 1):
        clock.now += seconds
        for upkeep in upkeeps:
            upkeep.sweep()
    assert not pids & set(inside.pools())


def sqlite(path: str, **kw: Any) -> Engine:
    """An engine of an SQLite database."""
    return create_engine(path, poolclass=QueriesPool, pool_timeout=0, **kw)


def test_engines_of_one_sqlite_file_share_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is one database, by whatever path it is named."""
    monkeypatch.chdir(tmp_path)
    absolute = sqlite(f"sqlite:///{tmp_path}/one.db")
    relative = sqlite("sqlite:///one.db")
    roundabout = sqlite(f"sqlite:///{tmp_path}/../{tmp_path.name}/one.db")
    other = sqlite("sqlite:///two.db")
    pids = [engine.pool.pid for engine in (absolute, relative, roundabout, other)]  # type: ignore[attr-defined]
    assert len(set(pids)) == 2
    assert pids[0] == pids[1] == pids[2]
    for uri in (
        "file:one.db?mode=ro",
        f"file://{tmp_path}/o%6Ee.db?",
        f"file://localhost{tmp_path}/one.db?cache=shared",
    ):
        assert sqlite(f"sqlite:///{uri}&uri=true").pool.pid == pids[0]  # type: ignore[attr-defined]
    with relative.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    assert os.path.exists(tmp_path / "one.db")
    for engine in (absolute, relative, roundabout, other):
        engine.dispose()


def test_a_shared_sqlite_database_in_memory_is_there_for_ever() -> None:
    """Private and without an idle TTL, for it is gone with its last connection; but there may be several."""
    url = "sqlite:///file:shared-for-ever?mode=memory&cache=shared&uri=true"
    one = sqlite(url, max_size=2, idle_ttl=0.001, pool_id="shared")
    pool: Any = one.pool
    assert pool.pid.startswith("private-")
    assert (pool.size(), inside.attachment(pool).ttl) == (2, math.inf)
    with one.begin() as connection, one.connect():
        connection.execute(text("CREATE TABLE t (i integer)"))
    PoolManager.clean(pool.pid)
    assert pool.checkedin() == 2
    successor: Any = pool.recreate()
    assert (successor.size(), successor.pid.startswith("private-")) == (2, True)
    one.dispose()
    assert one.pool.size() == 2  # type: ignore[attr-defined]
    one.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:shared?mode=memory&uri=true",
        "sqlite:///file:?mode=memory&cache=shared&uri=true",
        "sqlite:///file:/shared?vfs=memdb&uri=true",
    ],
)
def test_an_sqlite_database_in_memory_is_one_connection_for_ever(url: str) -> None:
    """Private, one connection, no idle TTL: a second connection would be a second, empty database.

    A ``pool_id`` makes no difference: engines of one pool make room for each other.
    """
    one = sqlite(url, max_size=5, idle_ttl=0.001, pool_id="shared")
    two = sqlite(url, pool_id="shared")
    pool: Any = one.pool
    assert pool.pid != two.pool.pid  # type: ignore[attr-defined]
    assert pool.size() == 1
    assert report(pool.pid)["idle"]["ttl"] is None
    with one.begin() as connection:
        connection.execute(text("CREATE TABLE t (i integer)"))
        with pytest.raises(CheckoutTimeout):
            one.connect()
    PoolManager.clean(pool.pid)
    assert inside.attachment(pool).ttl == math.inf
    with one.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0
    for engine in (one, two):
        engine.dispose()


# -- two engines of one URL, of which each request holds one of each -----------------------------------


@pytest.mark.parametrize(
    ("more", "audits", "served"),
    [
        ({"max_size": 4}, {"max_size": 4}, False),
        ({"max_size": 8}, {"max_size": 8}, True),
        ({"max_size": 4}, {"max_size": 4, "pool_id": "audit-of-requests"}, True),
    ],
    ids=["one limit for both", "twice the requests", "a pool_id of its own"],
)
def test_requests_that_hold_one_of_each_engine(
    pg_url: str, more: dict[str, Any], audits: dict[str, Any], served: bool
) -> None:
    """As docs/coming-from/queuepool.rst says it: four requests, all of which hold their first connection."""
    business = create_engine(pg_url, poolclass=QueriesPool, pool_timeout=0 if not served else 30, **more)
    audit = create_engine(pg_url, poolclass=QueriesPool, pool_timeout=0 if not served else 30, **audits)
    together = threading.Barrier(4)

    def request() -> bool:
        with business.connect() as connection:
            together.wait(30)
            try:
                with audit.connect() as second:
                    assert second.scalar(text("SELECT 1")) == connection.scalar(text("SELECT 1"))
                    together.wait(30)
            except CheckoutTimeout:
                together.wait(30)
                return False
        return True

    for _ in range(6):
        requests = [Task(request) for _ in range(4)]
        assert [request.result() for request in requests] == [served] * 4
    business.dispose()
    audit.dispose()
