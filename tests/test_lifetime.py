"""How long connections live: renewed in the background, kept in readiness, replaced on demand."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import inside
import pytest
from conftest import Observer
from fakes import FakeClock, FakeDriver, Task
from hazards import assert_whole, new_pid
from sqlalchemy import Engine, create_engine, event, make_url, text

from sqla_queries_pool import CheckoutTimeout, ParameterError, PoolManager, QueriesPool
from sqla_queries_pool.budget.state import LOOK_EVERY
from sqla_queries_pool.concurrency.threads import THREADS
from sqla_queries_pool.runtime import jitter as retirement

Eventually = Callable[..., None]
Make = Callable[..., QueriesPool]


@pytest.fixture
def clock() -> FakeClock:
    """The pools' clock."""
    return FakeClock(1000.0)


@pytest.fixture
def pid(clock: FakeClock) -> str:
    """A pool that reads the clock; it closes nothing for being idle."""
    name = new_pid()
    PoolManager.create(name, idle_ttl=None, max_size=10, time_method=clock)
    return name


@pytest.fixture
def make(pid: str, driver: FakeDriver) -> Make:
    """Make an engine's pool there."""
    quiet = inside.pool_class(gc_on_wait=False)
    return lambda **kw: quiet(driver.connect, **{"pool_id": pid, "timeout": 5, **kw})


def use_all(pool: QueriesPool, size: int) -> None:
    """Have so many out at once, and give them back."""
    for fairy in [pool.connect() for _ in range(size)]:
        fairy.close()


def quiet(pool: QueriesPool) -> bool:
    """Does nobody close or open anything in the background?"""
    numbers = inside.shared(pool).numbers
    return not (numbers.held or numbers.opening or numbers.closing)


# -- lifetime ------------------------------------------------------------------------------------------


def test_a_lifetime_is_spread_over_the_last_tenth() -> None:
    """A hundred that are opened together do not retire together, and none too late."""
    lifetimes = [retirement.lifetime(1000.0) for _ in range(100)]
    assert 900 <= min(lifetimes) < 925
    assert 975 < max(lifetimes) <= 1000
    assert retirement.lifetime(-1) == float("inf")


def test_an_idle_connection_is_renewed_in_the_background(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """Nobody pays for the reconnect: it was made before anybody asks."""
    pool = make(recycle=100)
    use_all(pool, 3)
    clock.now += 101
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.numbers() == [4, 5, 6] and quiet(pool), "all are renewed")
    assert driver.peak <= 3, "each was closed before it was opened again"
    threads = []
    event.listen(pool, "connect", lambda *_: threads.append(threading.current_thread()))
    use_all(pool, 3)
    assert not threads
    assert_whole(pool, eventually)


def test_one_is_renewed_at_a_time(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """The others can be used meanwhile."""
    pool = make(recycle=100, max_size=3, timeout=0)
    use_all(pool, 3)
    clock.now += 101
    driver.gate.clear()
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.connecting == 1, "one is being renewed")
    inside.upkeep(pool).sweep()  # it has to wait for that one
    out = [pool.connect(), pool.connect()]
    with pytest.raises(CheckoutTimeout, match="the pool itself"):
        pool.connect()
    driver.gate.set()
    for fairy in out:
        fairy.close()
    eventually(lambda: quiet(pool) and not set(driver.numbers()) & {1, 2, 3}, "all are renewed")
    assert_whole(pool, eventually)


def test_what_is_renewed_is_not_checked_out(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """Everything was returned: a test for leaks, or an alert, must not take the pool's own work for one."""
    pool = make(recycle=100)
    use_all(pool, 3)
    clock.now += 101
    driver.gate.clear()
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.connecting == 1, "one is being renewed")
    assert (pool.checkedin(), pool.checkedout(), pool.overflow()) == (3, 0, 3 - pool.size())
    numbers = pool.statistics()
    assert (numbers.held, numbers.idle, numbers.opening) == (0, 2, 1)
    fairy = pool.connect()
    assert (pool.checkedin(), pool.checkedout(), pool.statistics().held) == (2, 1, 1)
    fairy.close()
    driver.gate.set()
    eventually(lambda: quiet(pool) and not set(driver.numbers()) & {1, 2, 3}, "all are renewed")
    assert_whole(pool, eventually)


def test_what_is_opened_for_min_size_is_not_checked_out(
    make: Make, driver: FakeDriver, eventually: Eventually
) -> None:
    """Nor is what the housekeeper opens."""
    pool = make(min_size=2)
    fairy = pool.connect()
    driver.gate.clear()
    fairy.close()
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.connecting == 1, "the second one is being opened")
    assert (pool.checkedin(), pool.checkedout(), pool.statistics().held) == (1, 0, 0)
    driver.gate.set()
    eventually(lambda: quiet(pool) and pool.checkedin() == 2, "both are there")
    assert_whole(pool, eventually)


def test_one_that_is_out_is_renewed_when_it_is_returned(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """By the pool's own thread: who returns it does not pay for it either."""
    pool = make(recycle=100)
    threads = []
    event.listen(pool, "connect", lambda *_: threads.append(threading.current_thread()))
    fairy = pool.connect()
    clock.now += 101
    inside.upkeep(pool).sweep()
    assert driver.numbers() == [1]
    fairy.close()
    eventually(lambda: driver.numbers() == [2] and quiet(pool), "it is renewed")
    assert threads[0] is threading.current_thread()
    assert threads[1].name == "sqla_queries_pool opener"
    assert_whole(pool, eventually)


def test_a_waiting_checkout_does_not_wait_for_a_renewal(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """The spread leaves time: it is handed over, and renewed when nobody wants it."""
    pool = make(recycle=100, max_size=1)
    fairy = pool.connect()
    waiter = Task(pool.connect)
    eventually(lambda: inside.shared(pool).numbers.waiting == 1, "somebody waits")
    clock.now += 101
    fairy.close()
    other = waiter.result()
    assert driver.numbers() == [1]
    other.close()
    eventually(lambda: driver.numbers() == [2] and quiet(pool), "it is renewed")


def test_what_a_waiter_gets_from_a_renewal_is_renewed_again(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """Its new lifetime counts from the renewal on, whoever had it then."""
    pool = make(recycle=100, max_size=1)
    use_all(pool, 1)
    clock.now += 101
    driver.gate.clear()
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.connecting == 1, "it is being renewed")
    waiter = Task(pool.connect)
    eventually(lambda: inside.shared(pool).numbers.waiting == 1, "somebody waits")
    driver.gate.set()
    waiter.result().close()
    assert driver.numbers() == [2]
    clock.now += 101
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.numbers() == [3] and quiet(pool), "it is renewed again")
    assert_whole(pool, eventually)


def test_a_renewal_does_not_make_an_idle_connection_younger(
    driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """Else one with a lifetime below its idle TTL would never go away."""
    pid = new_pid()
    PoolManager.create(pid, idle_ttl=60, max_size=3, time_method=clock)
    pool = QueriesPool(driver.connect, pool_id=pid, recycle=40)
    use_all(pool, 2)
    clock.now += 41
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.numbers() == [3, 4] and quiet(pool), "renewed")
    clock.now += 20
    inside.upkeep(pool).sweep()
    eventually(lambda: not driver.live, "idle for 61 seconds")


def test_the_order_of_the_idle_survives_a_renewal(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """The left end is idle for longest, which the TTL and evictions rely on."""
    pool = make(recycle=100)
    fairies = [pool.connect() for _ in range(3)]
    for fairy in fairies:
        clock.now += 1
        fairy.close()
    clock.now += 100
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.numbers() == [4, 5, 6] and quiet(pool), "renewed")
    since = [entry.slot.since for entry in inside.attachment(pool).idle]
    assert since == sorted(since) == [1001.0, 1002.0, 1003.0]


def test_a_renewal_that_fails_costs_nobody_anything(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the next checkout opens a connection."""
    pool = make(recycle=100)
    use_all(pool, 1)
    clock.now += 101
    driver.failures = 1
    inside.upkeep(pool).sweep()
    eventually(lambda: not driver.live and quiet(pool), "it has failed")
    assert "could not renew" in caplog.text
    pool.connect().close()
    assert driver.numbers() == [2]
    assert_whole(pool, eventually)


def test_an_engine_that_is_dropped_during_a_renewal_leaves_nothing(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """The renewal ends, and then the connection goes with its engine."""
    pool = make(recycle=100)
    shared = inside.shared(pool)
    use_all(pool, 1)
    clock.now += 101
    driver.gate.clear()
    inside.upkeep(shared).sweep()
    eventually(lambda: driver.connecting == 1, "it is being renewed")
    del pool
    driver.gate.set()
    eventually(lambda: gc.collect() >= 0 and not driver.live and not shared.numbers.total, "all is closed")


# -- min_size ------------------------------------------------------------------------------------------


def test_warm_up_opens_min_size_at_once(make: Make, driver: FakeDriver) -> None:
    """In the caller's thread: when it returns they are there, idle."""
    pool = make(min_size=3)
    assert driver.attempts == 0
    pool.warm_up()
    assert (driver.numbers(), pool.checkedin(), pool.checkedout()) == ([1, 2, 3], 3, 0)
    pool.warm_up()
    assert driver.attempts == 3


@pytest.mark.parametrize("failures", [0, 1])
def test_warm_up_waits_for_what_the_housekeeper_opens(
    make: Make,
    driver: FakeDriver,
    clock: FakeClock,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:
    """When it returns, that is there, too.  Where the housekeeper fails, it is opened by who warms up."""

    def pause(descriptors: Iterable[int], seconds: float) -> None:
        driver.gate.set()
        real(descriptors, seconds)

    pool = make(min_size=2)
    pool.warm_up()
    pool.connect().invalidate()
    driver.gate.clear()
    driver.failures = failures
    clock.now += LOOK_EVERY
    inside.upkeep(pool).sweep()
    eventually(lambda: driver.connecting == 1, "the housekeeper opens one")
    real = THREADS.pause
    monkeypatch.setattr(THREADS, "pause", pause)
    pool.warm_up()
    assert inside.shared(pool).numbers.idle == 2
    assert driver.attempts == 3 + failures


def test_warm_up_opens_as_many_as_there_is_room_for(make: Make, driver: FakeDriver) -> None:
    """Nothing gives way for it."""
    other = make()
    use_all(other, 9)
    make(min_size=3).warm_up()
    assert len(driver.live) == 10
    assert other.checkedin() == 9


def test_warm_up_raises_the_drivers_error(make: Make, driver: FakeDriver, eventually: Eventually) -> None:
    """The application starts without its database: it should know."""
    pool = make(min_size=3)
    driver.failures = 1
    with pytest.raises(FakeDriver.OperationalError):
        pool.warm_up()
    assert_whole(pool, eventually, 3)


def test_the_first_connection_brings_the_others(
    make: Make, driver: FakeDriver, eventually: Eventually
) -> None:
    """Making an engine opens nothing; using it does, in the background."""
    pool = make(min_size=3)
    pool.connect().close()
    eventually(lambda: driver.numbers() == [1, 2, 3] and quiet(pool), "three are open")


def test_min_size_has_no_idle_ttl(driver: FakeDriver, clock: FakeClock, eventually: Eventually) -> None:
    """What is above it has."""
    pid = new_pid()
    PoolManager.create(pid, idle_ttl=60, max_size=5, time_method=clock)
    pool = QueriesPool(driver.connect, pool_id=pid, min_size=2)
    use_all(pool, 5)
    clock.now += 61
    inside.upkeep(pool).sweep()
    eventually(lambda: len(driver.live) == 2 and quiet(pool), "two are left")
    left = driver.numbers()
    assert set(left) <= {1, 2, 3, 4, 5}, "they were not closed and opened again"
    clock.now += 600
    inside.upkeep(pool).sweep()
    eventually(lambda: quiet(pool), "nothing is in work")
    assert driver.numbers() == left
    assert inside.ledger(pool).due <= clock.now + LOOK_EVERY, "it looks again in a moment, not at once"
    assert inside.ledger(pool).due > clock.now


def test_what_is_lost_of_min_size_is_opened_again(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """By the next look, without a checkout."""
    pool = make(min_size=2)
    pool.warm_up()
    pool.connect().invalidate()
    assert len(driver.live) == 1
    clock.now += LOOK_EVERY
    inside.upkeep(pool).sweep()
    eventually(lambda: len(driver.live) == 2 and quiet(pool), "two again")


def test_min_size_gives_way_to_another_engine(
    make: Make, driver: FakeDriver, clock: FakeClock, eventually: Eventually
) -> None:
    """The limit is for all: who needs a connection comes before who keeps one in readiness."""
    pool, other = make(min_size=8), make()
    pool.warm_up()
    clock.now += 1
    out = [other.connect() for _ in range(9)]
    assert len(driver.live) == 10
    clock.now += LOOK_EVERY
    inside.upkeep(pool).sweep()
    assert len(driver.live) == 10
    for fairy in out:
        fairy.close()
    assert_whole(other, eventually, 10)


@pytest.mark.parametrize("value", [-1, 1.5, "few", None, True])
def test_min_size_is_a_whole_number(make: Make, value: Any) -> None:
    """Text that is a number is taken."""
    assert inside.setting(make(min_size="2"), "min_size") == 2
    with pytest.raises(ParameterError, match=r"min_size=.* is not valid: write a whole number"):
        make(min_size=value)


# -- expire --------------------------------------------------------------------------------------------


def test_expire_closes_what_is_idle_now_and_what_is_out_when_it_is_returned(
    make: Make, driver: FakeDriver, eventually: Eventually
) -> None:
    """Of this engine alone; it goes on working, and nobody gets an error."""
    pool, other = make(), make()
    other.connect().close()
    out = pool.connect()
    use_all(pool, 2)
    pool.expire()
    assert driver.numbers() == [1, 2]
    out.close()
    eventually(lambda: driver.numbers() == [1], "it is closed")
    pool.connect().close()
    assert driver.numbers() == [1, 5]


def test_expire_by_the_pid_is_for_all_engines(
    make: Make, driver: FakeDriver, pid: str, eventually: Eventually
) -> None:
    """Of the database: who rotates credentials need not know them."""
    engines = [make(), make()]
    for pool in engines:
        pool.connect().close()
    PoolManager.expire(pid)
    eventually(lambda: not driver.live, "all are closed")


@pytest.mark.parametrize("by_pid", [True, False])
def test_a_rolling_expire_renews_one_after_the_other(
    make: Make, driver: FakeDriver, pid: str, eventually: Eventually, by_pid: bool
) -> None:
    """The pool stays full all the time, but for one."""
    pool = make(max_size=3)
    out = pool.connect()
    use_all(pool, 2)
    if by_pid:
        PoolManager.expire(pid, rolling=True)
    else:
        pool.expire(rolling=True)
    eventually(lambda: driver.numbers() == [1, 4, 5] and quiet_but(pool, 1), "the two idle ones are renewed")
    out.close()
    eventually(lambda: quiet(pool) and not set(driver.numbers()) & {1, 2, 3}, "all are renewed")
    order = [line for line in driver.events if line.startswith("close")]
    assert len(order) == 3
    assert driver.peak <= 3


def quiet_but(pool: QueriesPool, held: int) -> bool:
    """Is nothing in work, but so many out?"""
    numbers = inside.shared(pool).numbers
    return (numbers.held, numbers.opening, numbers.closing) == (held, 0, 0)


# -- PostgreSQL ----------------------------------------------------------------------------------------


@pytest.fixture(params=["psycopg2", "psycopg"])
def engine(request: pytest.FixtureRequest, pg_url: str) -> Iterator[Callable[..., Engine]]:
    """Make engines with one driver or the other."""
    url = make_url(pg_url).set(drivername=f"postgresql+{request.param}")
    engines: list[Engine] = []

    def make(**kw: Any) -> Engine:
        engines.append(create_engine(url, poolclass=QueriesPool, **kw))
        return engines[-1]

    yield make
    for each in engines:
        each.dispose()


def test_a_password_may_change_for_every_connect(
    engine: Callable[..., Engine], pg_observer: Observer, pg_url: str, eventually: Eventually
) -> None:
    """A ``do_connect`` listener supplies it; the pid stays; ``expire()`` replaces what had the old one."""
    url = make_url(pg_url)
    role = f"rotating_{url.database}"
    pg_observer.query(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    try:
        one = engine(connect_args={"user": role})
        pid = one.pool.pid  # type: ignore[attr-defined]
        password = ["first"]

        @event.listens_for(one, "do_connect")
        def supply(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
            options["password"] = password[0]

        with one.connect() as connection:
            held = connection.scalar(text("SELECT pg_backend_pid()"))
            pg_observer.query(f"ALTER ROLE {role} PASSWORD 'second'")
            password[0] = "second"
            one.pool.expire()  # type: ignore[attr-defined]
            assert connection.scalar(text("SELECT pg_backend_pid()")) == held
        with one.connect() as connection:
            assert connection.scalar(text("SELECT pg_backend_pid()")) != held
        assert one.pool.pid == pid  # type: ignore[attr-defined]
    finally:
        one.dispose()
        eventually(lambda: not pg_observer.backends(str(url.database)), "all are gone")
        pg_observer.query(f"DROP ROLE {role}")


def test_what_an_outage_has_cost_of_min_size_is_refilled(
    engine: Callable[..., Engine], pg_observer: Observer, pg_url: str, eventually: Eventually
) -> None:
    """Nobody checks anything out: the look finds the dead, and opens others."""
    one = engine(min_size=3)
    pool: Any = one.pool
    pool.warm_up()
    database = str(make_url(pg_url).database)
    before = {
        row[0]
        for row in pg_observer.query(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s",
            database,
        )
    }
    assert pg_observer.terminate(database) == 3
    inside.upkeep(pool).sweep()

    def refilled() -> bool:
        rows = pg_observer.query(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s",
            database,
        )
        return len(rows) == 3 and not before & {row[0] for row in rows} and pool.checkedin() == 3

    eventually(refilled, "three others")
