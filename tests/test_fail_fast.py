"""``fail_fast_after``: while nothing can be opened, checkouts that find nothing idle fail at once."""

from __future__ import annotations

import time
from typing import Any

import inside
import pytest
from fakes import FakeClock, FakeDriver, Task
from hazards import eventually, new_pid

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool, TooManyRequests
from sqla_queries_pool.budget.audit import check
from sqla_queries_pool.budget.slots import UNREACHABLE

AFTER = 0.3
"""Seconds."""


class Driver(FakeDriver):
    """Its server may be down."""

    down = False

    def connect(self, *args: Any, **kw: Any) -> Any:
        self.gate.wait(20)
        if self.down:
            self.attempts += 1
            raise self.OperationalError("connection to server failed: Connection refused")
        return super().connect(*args, **kw)


@pytest.fixture
def driver() -> Driver:
    """A driver that was connected before."""
    return Driver()


def pool_of(driver: Driver, **kw: Any) -> QueriesPool:
    """A pool whose database was there a moment ago."""
    pool = QueriesPool(driver.connect, **{"pool_id": new_pid(), "max_size": 4, "timeout": 20, **kw})
    pool.connect().close()
    pool.dispose()
    return pool


def failing(pool: QueriesPool) -> tuple[float, Exception]:
    """How long a checkout takes to fail, and with what."""
    begin = time.monotonic()
    with pytest.raises(Exception) as raised:  # noqa: PT011
        pool.connect()
    return time.monotonic() - begin, raised.value


def test_checkouts_fail_at_once_with_the_drivers_error_and_the_first_success_ends_it(driver: Driver) -> None:
    """Those that waited when the time was over, and those that come then; one at a time tries."""
    pool = pool_of(driver, fail_fast_after=AFTER, timeout=300)
    driver.down = True
    tasks = [Task(lambda: failing(pool)) for _ in range(4)]
    for task in tasks:
        seconds, error = task.result()
        assert isinstance(error, driver.OperationalError)
        assert "Connection refused" in str(error)
        assert seconds > AFTER / 2
    before = driver.attempts
    errors = [failing(pool) for _ in range(100)]
    assert sum(seconds for seconds, _ in errors) < 60  # less than it takes if each waits for AFTER, thrice
    assert {type(error) for _, error in errors} == {driver.OperationalError}
    assert driver.attempts - before < 20  # pauses go on
    check(inside.ledger(pool))
    driver.down = False

    def served() -> bool:
        try:
            pool.connect().close()
        except driver.OperationalError:
            return False
        return True

    eventually(served, "the pause ends")
    driver.down = True
    pool.connect().close()  # it is idle
    assert pool.audit().mended == ()


def test_without_it_a_checkout_waits_for_its_timeout(driver: Driver) -> None:
    """As ever."""
    pool = pool_of(driver, timeout=3 * AFTER)
    driver.down = True
    assert failing(pool)[0] >= 3 * AFTER


def test_connects_that_are_swallowed_count_from_their_beginning(driver: Driver) -> None:
    """One hangs; when it has for so long, others fail, with an error that says why: there is none of the
    driver.  No more than one hangs besides."""
    pool = pool_of(driver, fail_fast_after=AFTER, timeout=300)
    driver.gate.clear()
    hanging = Task(pool.connect)
    eventually(lambda: pool.statistics().opening == 1)
    time_out = inside.now(pool) + AFTER
    eventually(lambda: inside.now(pool) > time_out)
    probe = Task(pool.connect)
    eventually(lambda: pool.statistics().opening == 2)
    _, error = Task(lambda: failing(pool)).result()  # within less than its timeout
    assert isinstance(error, CheckoutTimeout)
    assert not isinstance(error, TooManyRequests)
    assert "accepted no connection for fail_fast_after=0.3 s" in str(error)
    assert error.snapshot.diagnosis.kind == UNREACHABLE
    driver.gate.set()
    for task in (hanging, probe):
        task.result().close()
    pool.connect().close()
    assert pool.audit().mended == ()


def test_a_server_that_is_full_is_not_out_of_reach(driver: Driver) -> None:
    """Where connections go from one checkout to the next, those that wait are served."""
    clock, pid = FakeClock(1000.0), new_pid()
    PoolManager.create(pid, max_size=4, time_method=clock)
    pool = pool_of(driver, fail_fast_after=AFTER, pool_id=pid)
    connection = pool.connect()
    driver.down = True
    for _ in range(9):
        clock.now += AFTER / 3
        task = Task(pool.connect)
        eventually(lambda: pool.statistics().waiting == 1)
        connection.close()
        connection = task.result()
    connection.close()
    assert pool.statistics().rejected == 0
