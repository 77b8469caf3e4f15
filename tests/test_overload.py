"""What is rejected early, so that what is served is served in time: ``max_waiting`` and ``queue_target``."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from fakes import FakeClock, FakeDriver, Task
from ledger_fakes import CheckedWaiter, Record, Simulator
from sqlalchemy import create_engine, exc

from sqla_queries_pool import (
    CheckoutTimeout,
    ParameterError,
    PoolManager,
    QueriesPool,
    TooManyRequests,
    snapshot,
)
from sqla_queries_pool.budget import choice, engines
from sqla_queries_pool.budget.queue import INTERVAL
from sqla_queries_pool.budget.slots import OVERLOAD, QUEUE_FULL, Attachment, Permit
from sqla_queries_pool.insight import report

TARGET = 0.5
"""A number that adds up without rounding."""


@pytest.fixture
def simulator() -> Simulator:
    """An empty pool for one connection, at time 0."""
    simulator = Simulator()
    simulator.decide(engines.set_limit, simulator.ledger, 1, simulator.now)
    return simulator


def engine_of(
    simulator: Simulator, max_waiting: float = math.inf, queue_target: float = math.inf
) -> Attachment:
    """An engine with these two."""
    engine = simulator.engine()
    engine.max_waiting, engine.queue_target = max_waiting, queue_target
    return engine


def came(simulator: Simulator, engine: Attachment, number: int = 1) -> list[CheckedWaiter]:
    """So many checkouts that wait."""
    waiters = [simulator.wait(engine) for _ in range(number)]
    assert all(isinstance(waiter, CheckedWaiter) for waiter in waiters)
    return waiters


def handed_on(simulator: Simulator, engine: Attachment, record: Record, waiter: CheckedWaiter) -> Record:
    """The connection is returned, and goes to this one."""
    simulator.give(engine, record)
    answer: object = waiter.answer
    assert answer is record
    return record


# -- max_waiting -----------------------------------------------------------------------------------


def test_a_queue_is_as_long_as_it_may_be_and_one_more_is_rejected(simulator: Simulator) -> None:
    """The last one, whoever asks when; those before it stay."""
    engine = engine_of(simulator, max_waiting=2)
    record = simulator.connected(engine)
    waiters = came(simulator, engine, 3)
    kinds = [away and away.kind for away in [simulator.reject(waiter, new=True) for waiter in waiters]]
    assert kinds == [None, None, QUEUE_FULL]
    assert list(engine.queue) == waiters[:2]
    del record


def test_a_caller_that_moved_up_meanwhile_stays(simulator: Simulator) -> None:
    """Its place counts, not how long the queue is."""
    engine = engine_of(simulator, max_waiting=1)
    record = simulator.connected(engine)
    first, second = came(simulator, engine, 2)
    record = handed_on(simulator, engine, record, first)
    assert simulator.reject(second, new=True) is None
    assert list(engine.queue) == [second]


def test_a_caller_that_has_waited_before_is_never_rejected_for_the_length_of_the_queue(
    simulator: Simulator,
) -> None:
    """Somebody who was refused by the server comes back before it; the limit is for newcomers."""
    engine = engine_of(simulator, max_waiting=1)
    record = simulator.connected(engine)
    simulator.now = 1.0
    (waiter,) = came(simulator, engine)
    back = simulator.wait(engine, since=0.5)
    assert list(engine.queue) == [back, waiter]
    assert simulator.reject(waiter) is None
    del record


def test_each_engine_has_a_queue_of_its_own(simulator: Simulator) -> None:
    """How long one queue may be says nothing of another."""
    engine, other = engine_of(simulator, max_waiting=1), engine_of(simulator, max_waiting=1)
    record = simulator.connected(engine)
    waiters = came(simulator, engine) + came(simulator, other)
    assert [simulator.reject(waiter, new=True) for waiter in waiters] == [None, None]
    del record


# -- queue_target ----------------------------------------------------------------------------------


def overdue(simulator: Simulator, waiter: CheckedWaiter) -> bool:
    """Is it rejected now?"""
    away = simulator.reject(waiter)
    assert away is None or away.kind == OVERLOAD
    return away is not None


def test_a_queue_that_is_late_for_an_interval_rejects_one_that_has_waited_for_longer_than_its_target(
    simulator: Simulator,
) -> None:
    """Not a moment before; and not one that came later."""
    engine = engine_of(simulator, queue_target=TARGET)
    record = simulator.connected(engine)
    waiters = came(simulator, engine, 4)
    simulator.now += TARGET * (INTERVAL + 0.5)
    (fresh,) = came(simulator, engine)
    assert not overdue(simulator, fresh), "overloaded, but it has just come"
    assert all(overdue(simulator, waiter) for waiter in waiters)
    simulator.now += TARGET * 0.5
    assert not overdue(simulator, fresh)
    simulator.now += TARGET * 0.5
    assert overdue(simulator, fresh)
    del record


def test_a_queue_that_is_slow_for_less_than_an_interval_rejects_nobody(simulator: Simulator) -> None:
    """A burst is served, however long some of it waits."""
    engine = engine_of(simulator, queue_target=TARGET)
    record = simulator.connected(engine)
    (waiter,) = came(simulator, engine)
    simulator.now += TARGET * (INTERVAL - 1)
    assert not overdue(simulator, waiter)
    del record


def test_a_queue_that_is_never_empty_but_in_time_rejects_nobody_when_one_use_is_long(
    simulator: Simulator,
) -> None:
    """Twenty threads on ten connections always wait a little: that is no overload."""
    engine = engine_of(simulator, queue_target=TARGET)
    record = simulator.connected(engine)
    waiters = came(simulator, engine)
    for _ in range(4 * INTERVAL):
        simulator.now += TARGET
        waiters += came(simulator, engine)
        record = handed_on(simulator, engine, record, waiters[-2])
    simulator.now += TARGET * 5
    assert not overdue(simulator, waiters[-1])


def test_an_overload_is_over_when_the_queue_is_empty_and_not_before(simulator: Simulator) -> None:
    """While it lasts all that are served are served in time: that alone says nothing."""
    engine = engine_of(simulator, queue_target=TARGET)
    record = simulator.connected(engine)
    (waiter,) = came(simulator, engine)
    simulator.now += TARGET * INTERVAL
    waiters = came(simulator, engine, 2)
    assert overdue(simulator, waiter)
    simulator.now += TARGET / 4
    record = handed_on(simulator, engine, record, waiters[0])
    simulator.now += TARGET
    assert overdue(simulator, waiters[1]), "one was served in time, but the queue was never empty"
    (waiter,) = came(simulator, engine)
    simulator.now += TARGET
    assert not overdue(simulator, waiter), "the queue was empty"
    del record


def test_a_caller_that_waits_looks_when_it_is_overdue(simulator: Simulator) -> None:
    """A pause that is computed: at its target in an overload, at the end of the interval before."""
    engine = engine_of(simulator, queue_target=TARGET)
    record = simulator.connected(engine)
    first, second = came(simulator, engine, 2)
    assert choice.look_in(simulator.ledger, first, simulator.now) == pytest.approx(
        TARGET * INTERVAL, abs=0.001
    )
    simulator.now += TARGET * INTERVAL
    assert choice.look_in(simulator.ledger, first, simulator.now) == pytest.approx(0.0, abs=0.001)
    (fresh,) = came(simulator, engine)
    assert choice.look_in(simulator.ledger, fresh, simulator.now) == pytest.approx(TARGET, abs=0.001)
    engine.queue_target = math.inf
    assert choice.look_in(simulator.ledger, second, simulator.now) == math.inf
    del record


def test_nobody_is_rejected_where_nothing_was_asked_for(simulator: Simulator) -> None:
    """Both are off by default."""
    engine = simulator.engine()
    record = simulator.connected(engine)
    (waiter,) = came(simulator, engine)
    simulator.now += 1e6
    assert simulator.reject(waiter, new=True) is None
    del record


def test_a_caller_that_was_answered_is_not_rejected(simulator: Simulator) -> None:
    """It has what it waited for, if late."""
    engine = engine_of(simulator, max_waiting=0, queue_target=TARGET)
    record = simulator.connected(engine)
    (waiter,) = came(simulator, engine)
    simulator.now += TARGET * INTERVAL
    simulator.give(engine, record)
    assert simulator.reject(waiter, new=True) is None


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 1.5, "many", True, float("inf")])
def test_max_waiting_is_a_whole_number(value: Any) -> None:
    """What it is, and what to write."""
    text = r"max_waiting=.*: write a whole number of checkouts, zero or more, or None for any number"
    with pytest.raises(ParameterError, match=text):
        QueriesPool(FakeDriver().connect, max_waiting=value, pool_id=secrets.token_hex(4))


@pytest.mark.parametrize("value", [0, -0.1, "soon", True, float("inf")])
def test_queue_target_is_more_than_no_time(value: Any) -> None:
    """What it is, and what to write."""
    text = r"queue_target=.*: write a number of seconds above zero, or None for none"
    with pytest.raises(ParameterError, match=text):
        QueriesPool(FakeDriver().connect, queue_target=value, pool_id=secrets.token_hex(4))


def test_both_may_be_text_come_with_the_url_and_stay_when_the_pool_is_recreated() -> None:
    """``plugin=queries&max_waiting=3&queue_target=0.25``, and ``Engine.dispose()``."""
    url = f"fake://host/db?plugin=queries&max_waiting=3&queue_target=0.25&pool_id={secrets.token_hex(4)}"
    engine = create_engine(url, module=FakeDriver())
    for _ in range(2):
        attachment = inside.attachment(engine.pool)
        assert (attachment.max_waiting, attachment.queue_target) == (3, 0.25)
        engine.dispose()


# -- threads ---------------------------------------------------------------------------------------


class Stage:
    """A pool for one connection, which is out, on a fake driver and a clock of its own."""

    def __init__(self, **kw: Any) -> None:
        self.driver = FakeDriver()
        self.clock = FakeClock()
        pool_id = f"overload {secrets.token_hex(4)}"
        PoolManager.create(pool_id, max_size=1, time_method=self.clock)
        self.pool = QueriesPool(self.driver.connect, timeout=20.0, pool_id=pool_id, **kw)
        self.held = self.pool.connect()
        self.tasks: list[Task[None]] = []

    def waits(self) -> Task[None]:
        """A thread that wants the connection, and gives it back."""
        self.tasks.append(Task(lambda: self.pool.connect().close()))
        return self.tasks[-1]

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self.pool.statistics().waiting


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    """Makes stages; at the end everybody has come to an end."""
    made: list[Stage] = []

    def make(**kw: Any) -> Stage:
        made.append(Stage(**kw))
        return made[-1]

    yield make
    for each in made:
        each.held.close()
        for task in each.tasks:
            task.join(20.0)
            assert not task.is_alive()


def test_one_more_than_may_wait_is_refused_at_once(
    stage: Callable[..., Stage], eventually: Callable[..., Any]
) -> None:
    """It says why, by the parameter's name; it is counted, remembered, and a TimeoutError as any other."""
    full = stage(max_waiting=2)
    full.waits()
    full.waits()
    eventually(lambda: full.waiting == 2, "two wait")
    with pytest.raises(TooManyRequests) as caught:
        full.pool.connect()
    error = caught.value
    assert isinstance(error, CheckoutTimeout)
    assert isinstance(error, exc.TimeoutError)
    first = str(error).splitlines()[0]
    assert re.search(
        r"rejected a checkout after \d\.\d s because the queue is full \(max_waiting=2\): ", first
    )
    assert "Held by, longest first: MainThread" in first
    assert error.snapshot.diagnosis.kind == QUEUE_FULL
    assert inside.shared(full.pool).last_timeouts[-1] is error.snapshot
    numbers = full.pool.statistics()
    assert (numbers.rejected, numbers.timeouts, numbers.waiting) == (1, 0, 2)
    assert PoolManager.statistics().rejected >= 1


def test_many_checkouts_that_get_nothing_at_once_share_a_snapshot(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports don't make an overload worse.  Those that fail while a snapshot is made share it, however long
    that takes; each error counts."""
    full = stage(max_waiting=0)
    taken: list[Any] = []
    take = snapshot

    def slowly(*args: Any) -> Any:
        taken.append(take(*args))
        full.clock.now += 10 * report.SHARED_FOR
        return taken[-1]

    monkeypatch.setattr(report, "snapshot", slowly)
    tasks = [Task(full.pool.connect) for _ in range(8)]
    errors = []
    for task in tasks:
        with pytest.raises(TooManyRequests) as caught:
            task.result()
        errors.append(caught.value)
    inside.set_timeout(full.pool, 0)
    with pytest.raises(CheckoutTimeout) as caught_last:
        full.pool.connect()
    assert len(taken) == 1
    assert {error.snapshot.taken_at for error in [*errors, caught_last.value]} == {taken[0].taken_at}
    numbers = full.pool.statistics()
    assert (numbers.rejected, numbers.timeouts, len(inside.shared(full.pool).last_timeouts)) == (8, 1, 1)
    full.clock.now += report.SHARED_FOR
    with pytest.raises(CheckoutTimeout):
        full.pool.connect()
    assert len(inside.shared(full.pool).last_timeouts) == len(taken) == 2


def test_with_no_queue_at_all_one_that_finds_nothing_is_rejected(stage: Callable[..., Stage]) -> None:
    """``max_waiting=0``; what can be opened is opened."""
    full = stage(max_waiting=0)
    with pytest.raises(TooManyRequests, match=r"the queue is full \(max_waiting=0\)"):
        full.pool.connect()
    full.held.close()
    full.pool.connect().close()


def test_a_caller_that_may_not_wait_is_served_by_what_can_be_opened(stage: Callable[..., Stage]) -> None:
    """Where it would wait for what is out rather than open another, it opens."""
    full = stage(max_waiting=0)
    inside.shared(full.pool).set_max_size(2)
    inside.ledger(full.pool).mean_connect = 0.5
    Task(lambda: full.pool.connect().close()).result()
    assert full.driver.attempts == 2


def test_a_caller_that_does_not_wait_anyway_gets_the_timeout(stage: Callable[..., Stage]) -> None:
    """``timeout=0`` is never in a queue, so none is too long for it."""
    full = stage(max_waiting=0)
    inside.set_timeout(full.pool, 0.0)
    with pytest.raises(CheckoutTimeout) as caught:
        full.pool.connect()
    assert type(caught.value) is CheckoutTimeout
    assert full.pool.statistics().rejected == 0


def test_in_an_overload_one_that_has_waited_for_the_target_is_rejected_by_its_own_thread(
    stage: Callable[..., Stage], eventually: Callable[..., Any]
) -> None:
    """It wakes by itself, long before its timeout, and says what the pool is like."""
    slow = stage(queue_target=0.01)
    task = slow.waits()
    eventually(lambda: slow.waiting == 1, "it waits")
    slow.clock.now += 0.01 * INTERVAL
    with pytest.raises(TooManyRequests, match=r"overloaded \(.*slower than queue_target=0\.01 s"):
        task.result()
    assert slow.pool.statistics().rejected == 1
    assert inside.shared(slow.pool).last_timeouts[-1].diagnosis.kind == OVERLOAD


def test_with_a_target_that_is_kept_everybody_is_served(
    stage: Callable[..., Stage], eventually: Callable[..., Any]
) -> None:
    """No thread is rejected while the queue is in time."""
    fine = stage(queue_target=0.01, max_waiting=5)
    tasks = [fine.waits() for _ in range(5)]
    eventually(lambda: fine.waiting == 5, "all wait")
    fine.held.close()
    for task in tasks:
        task.result()
    assert fine.pool.statistics().rejected == 0


def test_a_caller_that_looks_often_does_not_look_for_what_is_wrong_each_time(
    stage: Callable[..., Stage], eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for deadlocks and for what is to be mended takes long where many wait: as seldom as without."""
    often = stage(queue_target=0.01)
    shared = inside.shared(often.pool)
    looks, mends = [], []
    insist, mend = inside.ledger(shared).insist, inside.upkeep(shared).mend

    def insists(*args: Any) -> Any:
        looks.append(1)
        return insist(*args)

    def mends_it() -> Any:
        mends.append(1)
        return mend()

    monkeypatch.setattr(choice, "look_in", lambda *_: 0.001)
    monkeypatch.setattr(inside.ledger(shared), "insist", insists)
    monkeypatch.setattr(inside.upkeep(shared), "mend", mends_it)
    begin = time.monotonic()
    often.waits()
    eventually(lambda: len(looks) > 500 and mends, "it looks")
    assert len(mends) <= 2 * (
        2 + time.monotonic() - begin
    )  # each second, and twice where something looks wrong


def test_a_permit_counts_as_served(simulator: Simulator) -> None:
    """Who is let open in time has not waited too long, either."""
    engine = engine_of(simulator, queue_target=TARGET)
    record = simulator.connected(engine)
    waiters = came(simulator, engine, 2)
    simulator.now += TARGET / 2
    simulator.decide(engines.set_limit, simulator.ledger, 2, simulator.now)
    assert isinstance(waiters[0].answer, Permit)
    simulator.now += TARGET * (INTERVAL - 0.25)
    assert not overdue(simulator, waiters[1])
    del record
