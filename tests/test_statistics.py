"""What a pool has done, in numbers: each moved by its cause, and counted again by somebody else."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import gc
import json
import math
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import inside
import pytest
from conftest import Observer
from fakes import FakeClock, FakeDriver
from hazards import Handle, Ring, Stop, Thread, new_pid, new_pool, sleeping_collector
from sqlalchemy import Engine, create_engine, event, exc, make_url, text

from sqla_queries_pool import (
    BOUNDS,
    CheckoutTimeout,
    Histogram,
    ManagerStatistics,
    Pool,
    PoolManager,
    QueriesPool,
    Statistics,
    checkouts,
)
from sqla_queries_pool.budget.ledger import ABANDONED, DISPOSED, GAVE_WAY, IDLE_TTL, LOWERED, REMOVED
from sqla_queries_pool.budget.stats import Durations
from sqla_queries_pool.runtime.connections import DEAD, INVALIDATED

Eventually = Callable[..., None]
SEED = 20261123


@pytest.fixture
def clock() -> FakeClock:
    """The time of the pools of a test; it goes on when it is told to."""
    return FakeClock(1000.0)


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager knows the pools of this test alone; others' still close what earlier tests left."""
    inside.hide_pools(monkeypatch)
    inside.forget_the_gone(monkeypatch, ManagerStatistics())


@pytest.fixture
def pid(clock: FakeClock) -> str:
    """The id of a pool that has that clock."""
    pid = new_pid()
    PoolManager.create(pid, None, 5, clock)
    return pid


@pytest.fixture
def driver() -> FakeDriver:
    """A driver of the test's own."""
    return FakeDriver()


@pytest.fixture
def engine(driver: FakeDriver) -> Callable[..., Engine]:
    """Make engines on that driver."""

    def make(**kw: Any) -> Engine:
        return create_engine(
            "fake://host/db", module=driver, poolclass=QueriesPool, **({"pool_id": new_pid()} | kw)
        )

    return make


def moved(before: Statistics, after: Statistics) -> dict[str, Any]:
    """The counters that differ, by how much; histograms by their count."""
    found = {}
    for field in dataclasses.fields(Statistics):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(new, Histogram):
            old, new = old.count, new.count
        if isinstance(new, dict):
            new = {reason: n - old.get(reason, 0) for reason, n in new.items() if n != old.get(reason, 0)}
            old = {}
        if old != new and field.name != "liveness":  # no number
            found[field.name] = new if isinstance(new, dict) else new - old
    return found


# -- each number and its cause -----------------------------------------------------------------------------


def test_a_checkout_that_opens_moves_what_is_out_then_what_was_returned(pid: str, clock: FakeClock) -> None:
    """And nothing else."""
    pool = new_pool(pid)
    zero = pool.statistics()
    connection = pool.connect()
    out = pool.statistics()
    assert moved(zero, out) == {"open": 1, "held": 1, "peak_held": 1, "connects": 1, "connect_time": 1}
    clock.now += 3.0
    connection.close()
    home = pool.statistics()
    assert moved(out, home) == {"held": -1, "idle": 1, "checkouts": 1, "use_time": 1}
    assert home.use_time.seconds == 3.0
    again = pool.connect()
    assert moved(home, pool.statistics()) == {"held": 1, "idle": -1}
    again.close()


def test_peak_held_is_the_most_that_were_out_at_once(pid: str) -> None:
    """Not of what is open, nor of one engine alone."""
    one, other = new_pool(pid, max_size=5), new_pool(pid, max_size=5)
    for pool in (one, other):  # each its own two, one after the other
        for connection in [pool.connect() for _ in range(2)]:
            connection.close()
    assert (one.statistics().open, one.statistics().peak_held) == (4, 2)
    out = [one.connect(), other.connect(), one.connect(), other.connect()]
    assert one.statistics().peak_held == 4
    for connection in out:
        connection.close()
    assert one.statistics().peak_held == 4


def test_what_the_pool_opens_for_itself_is_no_checkout_and_no_peak(pid: str) -> None:
    """``warm_up`` moves connects alone."""
    pool = new_pool(pid, min_size=3, max_size=4)
    zero = pool.statistics()
    pool.warm_up()
    assert moved(zero, pool.statistics()) == {"open": 3, "idle": 3, "connects": 3, "connect_time": 3}


def test_a_wait_is_counted_when_it_is_served_with_its_time(
    pid: str, clock: FakeClock, eventually: Eventually
) -> None:
    """Waiting while it waits, then one wait of so many seconds."""
    pool = new_pool(pid, max_size=1)
    first = pool.connect()
    zero = pool.statistics()
    waiter = Thread(lambda: pool.connect().close())
    eventually(lambda: pool.statistics().waiting, "it waits")
    assert moved(zero, pool.statistics()) == {"waiting": 1}
    clock.now += 7.0
    first.close()
    waiter.join()
    assert moved(zero, pool.statistics()) == {
        "held": -1,
        "idle": 1,
        "checkouts": 2,
        "waits": 1,
        "wait_time": 1,
        "use_time": 2,
    }
    assert pool.statistics().wait_time.seconds == 7.0


def test_a_checkout_that_gets_nothing_is_a_timeout(pid: str) -> None:
    """And neither a wait nor a checkout."""
    pool = new_pool(pid, max_size=1, timeout=0.01)
    first = pool.connect()
    zero = pool.statistics()
    with pytest.raises(CheckoutTimeout):
        pool.connect()
    assert moved(zero, pool.statistics()) == {"timeouts": 1}
    first.close()


@pytest.mark.slow
def test_a_deadlock_is_a_timeout_too(pid: str) -> None:
    """Both numbers, once."""
    pool = new_pool(pid, max_size=1, deadlock_grace=0.0, on_deadlock="raise")
    first = pool.connect()
    zero = pool.statistics()
    with pytest.raises(CheckoutTimeout):
        pool.connect()
    assert moved(zero, pool.statistics()) == {"timeouts": 1, "deadlocks": 1}
    first.close()


def test_an_error_of_connecting_is_counted_and_is_no_connect(
    engine: Callable[..., Engine], driver: FakeDriver
) -> None:
    """Nothing else moves."""
    pool: Any = engine().pool
    zero = pool.statistics()
    driver.failures = 2
    for _ in range(2):
        with pytest.raises(FakeDriver.OperationalError):
            pool.connect()
    assert moved(zero, pool.statistics()) == {"connect_errors": 2}
    assert driver.attempts == 2


def test_one_that_is_being_opened_is_neither_open_nor_held(
    engine: Callable[..., Engine], driver: FakeDriver, eventually: Eventually
) -> None:
    """``opening``, until the driver has returned."""
    pool: Any = engine().pool
    zero = pool.statistics()
    driver.gate.clear()
    opener = Thread(lambda: pool.connect().close())
    eventually(lambda: driver.connecting, "it connects")
    assert moved(zero, pool.statistics()) == {"opening": 1}
    driver.gate.set()
    opener.join()


def test_one_that_is_being_closed_is_counted_as_open_and_closing(eventually: Eventually) -> None:
    """Its slot is free when the driver has closed it."""
    stop = Stop()

    class Slow(Handle):
        def close(self) -> None:
            stop.here()
            super().close()

    pool = new_pool(creator=Slow, idle_ttl=0.01)
    pool.connect().close()
    stop.reached()
    numbers = pool.statistics()
    assert (numbers.open, numbers.closing, numbers.idle) == (1, 1, 0)
    stop.go()
    eventually(lambda: not pool.statistics().open, "it is closed")
    assert pool.statistics().closes == {IDLE_TTL: 1}


def test_each_close_is_counted_under_its_reason(
    engine: Callable[..., Engine], driver: FakeDriver, eventually: Eventually
) -> None:
    """Idle for too long, disposed of, lowered, gave way, invalidated, removed: each of them, and their sum is
    what the driver has seen."""
    clock, pid = FakeClock(), new_pid()
    PoolManager.create(pid, 10.0, 4, clock)
    first, second = engine(pool_id=pid, max_size=4), engine(pool_id=pid, max_size=4)
    pool: Any = first.pool
    shared: Pool = inside.shared(pool)

    def closes() -> dict[str, int]:
        return dict(pool.statistics().closes)

    def fill(count: int) -> list[Any]:
        out = [first.pool.connect() for _ in range(count)]
        return out

    fill(1)[0].close()
    clock.now += 11.0
    inside.upkeep(shared).sweep()
    eventually(lambda: closes() == {IDLE_TTL: 1}, "closed by age")
    connection = first.pool.connect()
    connection.invalidate()
    assert closes() == {IDLE_TTL: 1, INVALIDATED: 1}
    for connection in fill(4):
        connection.close()
    PoolManager.set_max_size(pid, 3)
    assert closes()[LOWERED] == 1
    clock.now += 1.0  # they can be spared
    second.pool.connect().close()
    assert closes()[GAVE_WAY] == 1
    assert pool.statistics().evictions == 1
    first.dispose()
    assert closes()[DISPOSED] == 2
    last = inside.attachment(second.pool).idle[0].slot.handle
    PoolManager.remove_connection(pid, last)
    assert closes()[REMOVED] == 1
    numbers = pool.statistics()
    assert sum(numbers.closes.values()) == sum(line.startswith("close") for line in driver.events) == 7
    assert numbers.connects == len(driver.connections) == 7
    assert numbers.open == 0


def test_one_that_the_server_has_hung_up_on_is_counted_as_dead(pg_url: str, pg_observer: Observer) -> None:
    """Found before it was used, replaced, and closed for that reason."""
    engine = create_engine(pg_url, poolclass=QueriesPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    pool: Any = engine.pool
    zero = pool.statistics()
    assert pg_observer.terminate(str(make_url(pg_url).database)) == 1
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    after = moved(zero, pool.statistics())
    assert after == {
        "dead": 1,
        "closes": {DEAD: 1},
        "connects": 1,
        "connect_time": 1,
        "checkouts": 1,
        "use_time": 1,
    }
    engine.dispose()


def test_dead_ones_that_an_audit_finds_are_counted_as_dead_and_closed_as_such(
    pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """Also where nobody has asked for one: it is the same thing that happened to them."""
    engine = create_engine(pg_url, poolclass=QueriesPool)
    engine.connect().close()
    pool: Any = engine.pool
    pg_observer.terminate(str(make_url(pg_url).database))
    assert pool.audit().dead == 1
    eventually(lambda: pool.statistics().closes, "it is closed")
    assert (pool.statistics().dead, dict(pool.statistics().closes)) == (1, {DEAD: 1})
    engine.dispose()


def test_a_rollback_that_fails_at_checkin_is_a_failed_reset() -> None:
    """The connection is closed, the slot free, the number moved: an engine's, and a session's."""

    class Stubborn(Handle):
        def rollback(self) -> None:
            raise RuntimeError("no")

    pool = new_pool(creator=Stubborn)
    connection = pool.connect()
    connection.close()
    numbers = pool.statistics()
    assert (numbers.failed_resets, numbers.checkouts, numbers.held) == (1, 1, 0)
    assert sum(numbers.closes.values()) == 1
    shared = inside.shared(pool)
    shared.add(handle := Stubborn())
    shared.lock(handle, session := type("Session", (), {})())
    shared.free(handle)
    assert pool.statistics().failed_resets == 2
    del session


def test_invalidating_by_hand_is_no_failed_reset(pid: str) -> None:
    """With an error as its reason, and without."""
    pool = new_pool(pid)
    for error in (None, RuntimeError("a reason")):
        connection = pool.connect()
        connection.invalidate(error)
        connection.close()
    assert pool.statistics().failed_resets == 0


def test_detached_and_lost_ones_count_as_checkouts_that_are_over(eventually: Eventually) -> None:
    """They are never returned: the sum still is what was handed out."""
    pool = new_pool(max_size=3)
    detached = pool.connect()
    detached.detach()
    assert (pool.statistics().checkouts, pool.statistics().held) == (1, 0)
    Ring(pool.connect())
    gc.collect()
    eventually(lambda: pool.statistics().checkouts == 2, "its finalizer returned the lost one")
    detached.close()
    assert pool.statistics().checkouts == 2
    # What an interrupt in the middle of a checkout leaves: a record that nobody has in hand any more.
    fairy: Any = pool.connect()
    pool.records_out.clear()
    inside.record(fairy).fairy_ref = None
    fairy.dbapi_connection = fairy._connection_record = None
    del fairy
    gc.collect()
    eventually(lambda: pool.statistics().checkouts == 3, "the lost record is counted")
    eventually(lambda: pool.statistics().closes.get(ABANDONED) == 1, "its connection is closed")
    assert pool.statistics().held == 0


def test_who_waited_longer_and_was_passed_over_is_a_bypass(
    pid: str, clock: FakeClock, eventually: Eventually
) -> None:
    """A connection went to its own engine's waiter, although another engine's had come first."""
    one, other = new_pool(pid, max_size=5), new_pool(pid, max_size=5)
    PoolManager.set_max_size(pid, 2)
    mine, its = one.connect(), other.connect()
    first = Thread(lambda: other.connect().close())
    eventually(lambda: one.statistics().waiting == 1)
    clock.now += 0.01
    second = Thread(lambda: one.connect().close())
    eventually(lambda: one.statistics().waiting == 2)
    mine.close()
    second.join()
    assert one.statistics().bypasses == 1
    its.close()
    first.join()


def test_what_an_audit_puts_right_is_counted(pid: str) -> None:
    """Here, what is being opened was miscounted."""
    pool = new_pool(pid)
    pool.connect().close()
    inside.ledger(pool).opening.update(inside.ledger(pool).slots)
    assert len(pool.audit().mended) == 1
    assert pool.statistics().mended == 1
    assert pool.audit().mended == ()
    assert pool.statistics().mended == 1


# -- durations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, *BOUNDS, *(bound * 1.0001 for bound in BOUNDS), 1e6])
def test_a_duration_is_in_the_bucket_whose_bound_it_does_not_pass(seconds: float) -> None:
    """On the bound still, above it in the next; above the last in one of its own."""
    counted = Durations()
    counted.add(seconds)
    found = counted.frozen()
    index = found.counts.index(1)
    assert found.count == 1
    assert seconds <= (*BOUNDS, math.inf)[index]
    assert index == 0 or seconds > BOUNDS[index - 1]
    assert found.mean == found.seconds == seconds


@pytest.mark.parametrize("what", ["use_time", "wait_time"])
def test_the_pool_puts_durations_into_the_same_buckets(
    what: str, pid: str, clock: FakeClock, eventually: Eventually
) -> None:
    """As one that counts by itself."""
    pool, chance = new_pool(pid, max_size=1), random.Random(SEED)
    seconds = [chance.choice([0.001, 0.3, 2.0, 20.0, 100.0]) for _ in range(12)]
    expected = [0] * (len(BOUNDS) + 1)
    for duration in seconds:
        expected[bisect.bisect_left(BOUNDS, duration)] += 1
        connection = pool.connect()
        if what == "wait_time":
            waiter = Thread(lambda: pool.connect().close())
            eventually(lambda: pool.statistics().waiting, "it waits")
        clock.now += duration
        connection.close()
        if what == "wait_time":
            waiter.join()
    found: Histogram = getattr(pool.statistics(), what)
    if what == "use_time":
        assert list(found.counts) == expected
    assert found.count == len(seconds)
    assert found.seconds == pytest.approx(sum(seconds))


def test_histograms_add_up_and_subtract() -> None:
    """What came between two looks is their difference."""
    one, two = Durations(), Durations()
    for seconds in (0.1, 0.2, 100.0):
        one.add(seconds)
    two.add(0.2)
    both = one.frozen() + two.frozen()
    assert both.count == 4
    assert both.seconds == pytest.approx(100.5)
    assert (both - two.frozen()).counts == one.frozen().counts
    assert Histogram().mean == 0.0


# -- the whole ---------------------------------------------------------------------------------------------


def test_statistics_are_frozen_and_json_takes_the_dictionary(pid: str) -> None:
    """Nobody changes them; every field is in ``as_dict``, in ``report()`` too, under queries' own keys."""
    pool = new_pool(pid)
    pool.connect().close()
    numbers = pool.statistics()
    with pytest.raises(dataclasses.FrozenInstanceError):
        numbers.open = 5  # type: ignore[misc]
    told = json.loads(json.dumps(numbers.as_dict()))
    assert set(told) == {field.name for field in dataclasses.fields(Statistics)}
    assert told["use_time"]["count"] == 1
    assert told["limit"] == 5
    report = PoolManager.report()["pools"][pid]
    assert report["statistics"] == pool.statistics().as_dict()
    assert {"connections", "exceptions", "executions", "full", "idle"} <= set(report)
    assert json.dumps(PoolManager.report())


def test_changing_what_one_was_given_changes_nothing_in_the_pool(pid: str) -> None:
    """It is a copy."""
    pool = new_pool(pid)
    pool.connect().invalidate()
    numbers: Any = pool.statistics()
    with contextlib.suppress(TypeError):
        numbers.closes["mine"] = 5
    assert pool.statistics().closes == {INVALIDATED: 1}


def test_the_cost_of_looking_does_not_grow_with_connections() -> None:
    """As many Python frames for two connections as for a hundred, and no lock is taken."""

    def looks(pool: QueriesPool) -> int:
        with sleeping_collector():  # no finalizer of another test's comes in between, or not each time
            return min(look(pool) for _ in range(5))

    def look(pool: QueriesPool) -> int:
        calls = 0

        def profile(_: FrameType, what: str, __: object) -> None:
            nonlocal calls
            calls += what == "call"

        sys.setprofile(profile)
        try:
            pool.statistics()
        finally:
            sys.setprofile(None)
        return calls

    small, large = new_pool(max_size=200), new_pool(max_size=200)
    out = [small.connect() for _ in range(2)] + [large.connect() for _ in range(100)]
    assert looks(small) == looks(large)
    for connection in out:
        connection.close()
    assert looks(small) == looks(large)


def test_totals_survive_dispose_ttl_and_removal(
    lonely: None, pid: str, clock: FakeClock, eventually: Eventually
) -> None:
    """Of an engine and its successor, after its connections have aged, and after the manager forgot it."""
    pool = new_pool(pid, max_size=2)
    for _ in range(3):
        pool.connect().close()
    pool.dispose()
    successor = pool.recreate()
    successor.connect().close()
    assert successor.statistics().checkouts == 4
    assert successor.statistics().connects == 2
    PoolManager.set_idle_ttl(pid, 10)
    clock.now += 11.0
    inside.upkeep(successor).sweep()
    shared = inside.shared(successor)
    eventually(lambda: not shared.statistics().open, "closed by age")
    assert successor.statistics().checkouts == 4
    del pool, successor
    gc.collect()
    eventually(lambda: not inside.ledger(shared).attachments, "the engines are gone")
    PoolManager.clean(pid)
    assert pid not in PoolManager.statistics().pools
    after = PoolManager.statistics()
    assert (after.checkouts, after.connects, after.closes) == (4, 2, 2)
    again = new_pool(pid)
    again.connect().close()
    assert inside.shared(again) is not shared
    assert PoolManager.statistics().checkouts == 5
    assert PoolManager.statistics().pools[pid].checkouts == 1


def test_each_total_of_pools_that_are_gone_goes_on_counting(pid: str) -> None:
    """What was is added to what is, number by number."""
    names = ("checkouts", "waits", "timeouts", "deadlocks", "connects", "connect_errors", "closes")
    gone = ManagerStatistics(**{name: 10**n for n, name in enumerate(names)})
    pool = new_pool(pid)
    pool.connect().invalidate()
    found = ManagerStatistics.of([pool.statistics()] * 2, gone)
    assert [getattr(found, name) - getattr(gone, name) for name in names] == [2, 0, 0, 0, 2, 0, 2]


def test_the_managers_numbers_are_the_sum_of_the_pools(
    lonely: None, pid: str, engine: Callable[..., Engine], driver: FakeDriver, eventually: Eventually
) -> None:
    """Each pool by its id, and the totals: each of them moved here in two pools."""
    pools: list[Any] = [engine(pool_id=name, max_size=1).pool for name in (pid, new_pid())]
    PoolManager.set_max_size(pid, 1)
    for pool in pools:
        driver.failures = 1
        with pytest.raises(FakeDriver.OperationalError):
            pool.connect()
        connection = pool.connect()
        waiter = Thread(lambda pool=pool: pool.connect().invalidate())
        eventually(lambda pool=pool: pool.statistics().waiting, "it waits")
        with checkouts(timeout=0), pytest.raises(CheckoutTimeout):
            pool.connect()
        connection.close()
        waiter.join()
        inside.count(pool, "deadlocks")
    found, single = PoolManager.statistics(), [pool.statistics() for pool in pools]
    assert isinstance(found, ManagerStatistics)
    assert found.pools == {numbers.pid: numbers for numbers in single}
    for name in ("checkouts", "waits", "timeouts", "deadlocks", "connects", "connect_errors"):
        assert getattr(found, name) == sum(getattr(numbers, name) for numbers in single) >= 2, name
    assert found.closes == sum(sum(numbers.closes.values()) for numbers in single) == 2
    with pytest.raises(AttributeError):
        found.checkouts = 0  # type: ignore[misc]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a platform without fork")
def test_a_forked_child_counts_from_nothing(pid: str) -> None:
    """What the parent has done is in the parent's numbers: whoever adds up processes counts nothing twice."""
    pool = new_pool(pid, max_size=2, timeout=0)
    out = [pool.connect(), pool.connect()]
    with pytest.raises(CheckoutTimeout):
        pool.connect()
    out.pop().close()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine, all_of_them = pool.statistics(), PoolManager.statistics()
            told = [mine.checkouts, mine.connects, mine.timeouts, mine.peak_held, mine.held, mine.open]
            told += [all_of_them.checkouts, all_of_them.closes, len(inside.shared(pool).last_timeouts)]
            pool.connect().close()
            told.append(pool.statistics().checkouts)
            os.write(write, json.dumps(told).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert json.loads(said) == [0] * 9 + [1]
    out.pop().close()


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.usefixtures("restless")
def test_under_threads_every_total_adds_up_exactly(
    engine: Callable[..., Engine], driver: FakeDriver, eventually: Eventually
) -> None:
    """Sixteen threads check out, return, invalidate, detach, abandon, time out and fail to connect on two
    engines of one pool, while others look all the time: every number is what the threads and the driver
    counted themselves, and no total ever falls."""
    print("seed", SEED)
    pid = new_pid()
    engines = [engine(pool_id=pid, max_size=6, pool_timeout=timeout) for timeout in (20.0, 0.0)]
    pool: Any = engines[0].pool
    counted: Counter[str] = Counter()
    lock, done = threading.Lock(), threading.Event()

    def count(what: str) -> None:
        with lock:
            counted[what] += 1

    def work(number: int) -> None:
        chance = random.Random(SEED + number)
        for _ in range(150):
            try:
                connection = chance.choice(engines).pool.connect()
            except CheckoutTimeout:
                count("timeouts")
                continue
            except FakeDriver.OperationalError:
                count("rejected")
                continue
            count("taken")
            what = chance.random()
            if what < 0.1:
                connection.invalidate()
                connection.close()
            elif what < 0.15:
                connection.detach()
                connection.close()  # its own: the pool sees no more of it
                count("detached")
            elif what < 0.2:
                del connection  # abandoned
                continue
            else:
                connection.close()
            if chance.random() < 0.02:
                driver.failures += 1

    totals = ("checkouts", "connects", "connect_errors", "timeouts", "waits", "bypasses", "dead", "peak_held")

    def watch() -> int:
        last = pool.statistics()
        looks = 0
        while not done.is_set():
            new = pool.statistics()
            fell = [name for name in totals if getattr(new, name) < getattr(last, name)]
            assert not fell, fell
            assert all(new.closes.get(reason, 0) >= n for reason, n in last.closes.items())
            assert new.use_time.count >= last.use_time.count
            last, looks = new, looks + 1
        return looks

    watchers = [Thread(watch) for _ in range(2)]
    threads = [Thread(work, number) for number in range(16)]
    for thread in threads:
        thread.join(120.0)
    done.set()
    assert all(watcher.join() for watcher in watchers)
    gc.collect()
    eventually(lambda: not pool.statistics().held and not inside.inbox(pool), "all were returned")
    numbers = pool.statistics()
    opened = sum(line.startswith("open") for line in driver.events)
    closed = sum(line.startswith("close") for line in driver.events)
    assert numbers.checkouts == counted["taken"]
    assert numbers.timeouts == counted["timeouts"]
    assert numbers.connects == opened
    assert numbers.connect_errors == driver.attempts - opened
    assert sum(numbers.closes.values()) == closed - counted["detached"]
    assert numbers.open == len(driver.live) == numbers.connects - closed
    assert numbers.waits == numbers.wait_time.count
    assert numbers.use_time.count == counted["taken"] - counted["detached"]
    assert numbers.peak_held <= 6
    assert (numbers.waiting, numbers.opening, numbers.closing, numbers.mended) == (0, 0, 0, 0)


def test_a_refusal_that_ends_a_checkout_is_the_drivers_error_and_counted_once(
    engine: Callable[..., Engine], driver: FakeDriver
) -> None:
    """With nothing left of its timeout, it raises what the driver said, and that is a connect error."""
    pool: Any = engine(pool_timeout=0).pool
    pool.connect().close()
    pool.dispose()
    driver.failures = 1
    with pytest.raises((FakeDriver.OperationalError, exc.TimeoutError)):
        pool.connect()
    assert pool.statistics().connect_errors == 1


def test_listening_for_events_moves_no_number(pid: str) -> None:
    """A listener at checkout that raises returns the connection; it was out."""
    pool = new_pool(pid)

    def refuse(*_: Any) -> None:
        raise KeyError("no")

    event.listen(pool, "checkout", refuse)
    with pytest.raises(KeyError):
        pool.connect()
    numbers = pool.statistics()
    assert (numbers.checkouts, numbers.held) == (1, 0)
