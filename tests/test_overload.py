"""What is refused early, so that what is served is served in time: ``max_waiting`` and ``queue_target``."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from fakes import FakeClock, FakeDriver, Task
from ledger_fakes import Gate, Record, Simulator
from sqlalchemy import create_engine, exc

from sqla_queries_pool import CheckoutTimeout, ParameterError, PoolManager, QueriesPool, TooManyRequests
from sqla_queries_pool.budget.queue import INTERVAL
from sqla_queries_pool.budget.slots import OVERLOAD, QUEUE_FULL, Attachment, Permit
from sqla_queries_pool.insight import diagnostics

TARGET = 0.5
"""A number that adds up without rounding."""


@pytest.fixture
def books() -> Simulator:
    """An empty pool for one connection, at time 0."""
    books = Simulator()
    books.decide(books.ledger.set_limit, 1, books.now)
    return books


def engine_of(books: Simulator, max_waiting: float = math.inf, queue_target: float = math.inf) -> Attachment:
    """An engine with these two."""
    engine = books.engine()
    engine.max_waiting, engine.queue_target = max_waiting, queue_target
    return engine


def came(books: Simulator, engine: Attachment, number: int = 1) -> list[Gate]:
    """So many checkouts that wait."""
    gates = [books.wait(engine) for _ in range(number)]
    assert all(isinstance(gate, Gate) for gate in gates)
    return gates


def handed_on(books: Simulator, engine: Attachment, record: Record, gate: Gate) -> Record:
    """The connection comes home, and goes to this one."""
    books.give(engine, record)
    answer = gate.answer
    assert answer is record
    return record


# -- max_waiting -----------------------------------------------------------------------------------


def test_a_line_is_as_long_as_it_may_be_and_one_more_is_turned_away(books: Simulator) -> None:
    """The last one, whoever asks when; those before it stay."""
    engine = engine_of(books, max_waiting=2)
    record = books.connected(engine)
    gates = came(books, engine, 3)
    kinds = [away and away.kind for away in [books.reject(gate, new=True) for gate in gates]]
    assert kinds == [None, None, QUEUE_FULL]
    assert list(engine.queue) == gates[:2]
    del record


def test_who_moved_up_meanwhile_stays(books: Simulator) -> None:
    """Its place counts, not how long the line is."""
    engine = engine_of(books, max_waiting=1)
    record = books.connected(engine)
    first, second = came(books, engine, 2)
    record = handed_on(books, engine, record, first)
    assert books.reject(second, new=True) is None
    assert list(engine.queue) == [second]


def test_who_has_waited_before_is_never_turned_away_for_the_length_of_the_line(books: Simulator) -> None:
    """Somebody who was refused by the server comes back before it; the limit is for newcomers."""
    engine = engine_of(books, max_waiting=1)
    record = books.connected(engine)
    books.now = 1.0
    (gate,) = came(books, engine)
    back = books.wait(engine, since=0.5)
    assert list(engine.queue) == [back, gate]
    assert books.reject(gate) is None
    del record


def test_each_engine_has_a_line_of_its_own(books: Simulator) -> None:
    """What one may have in line says nothing of another's."""
    engine, other = engine_of(books, max_waiting=1), engine_of(books, max_waiting=1)
    record = books.connected(engine)
    gates = came(books, engine) + came(books, other)
    assert [books.reject(gate, new=True) for gate in gates] == [None, None]
    del record


# -- queue_target ----------------------------------------------------------------------------------


def overdue(books: Simulator, gate: Gate) -> bool:
    """Is it turned away now?"""
    away = books.reject(gate)
    assert away is None or away.kind == OVERLOAD
    return away is not None


def test_a_line_that_is_late_for_an_interval_refuses_who_has_waited_for_longer_than_its_target(
    books: Simulator,
) -> None:
    """Not a moment before; and not who came later."""
    engine = engine_of(books, queue_target=TARGET)
    record = books.connected(engine)
    gates = came(books, engine, 4)
    books.now += TARGET * (INTERVAL + 0.5)
    (fresh,) = came(books, engine)
    assert not overdue(books, fresh), "overloaded, but it has just come"
    assert all(overdue(books, gate) for gate in gates)
    books.now += TARGET * 0.5
    assert not overdue(books, fresh)
    books.now += TARGET * 0.5
    assert overdue(books, fresh)
    del record


def test_a_line_that_is_slow_for_less_than_an_interval_refuses_nobody(books: Simulator) -> None:
    """A burst is served, however long some of it waits."""
    engine = engine_of(books, queue_target=TARGET)
    record = books.connected(engine)
    (gate,) = came(books, engine)
    books.now += TARGET * (INTERVAL - 1)
    assert not overdue(books, gate)
    del record


def test_a_line_that_is_never_empty_but_in_time_refuses_nobody_when_one_use_is_long(books: Simulator) -> None:
    """Twenty threads on ten connections always wait a little: that is no overload."""
    engine = engine_of(books, queue_target=TARGET)
    record = books.connected(engine)
    gates = came(books, engine)
    for _ in range(4 * INTERVAL):
        books.now += TARGET
        gates += came(books, engine)
        record = handed_on(books, engine, record, gates[-2])
    books.now += TARGET * 5
    assert not overdue(books, gates[-1])


def test_an_overload_is_over_when_the_line_is_empty_and_not_before(books: Simulator) -> None:
    """While it lasts all that are served are served in time: that alone says nothing."""
    engine = engine_of(books, queue_target=TARGET)
    record = books.connected(engine)
    (gate,) = came(books, engine)
    books.now += TARGET * INTERVAL
    gates = came(books, engine, 2)
    assert overdue(books, gate)
    books.now += TARGET / 4
    record = handed_on(books, engine, record, gates[0])
    books.now += TARGET
    assert overdue(books, gates[1]), "one was served in time, but the line was never empty"
    (gate,) = came(books, engine)
    books.now += TARGET
    assert not overdue(books, gate), "the line was empty"
    del record


def test_who_waits_looks_when_it_is_overdue(books: Simulator) -> None:
    """A pause that is computed: at its target in an overload, at the end of the interval before."""
    engine = engine_of(books, queue_target=TARGET)
    record = books.connected(engine)
    first, second = came(books, engine, 2)
    assert books.ledger.look_in(first, books.now) == pytest.approx(TARGET * INTERVAL, abs=0.001)
    books.now += TARGET * INTERVAL
    assert books.ledger.look_in(first, books.now) == pytest.approx(0.0, abs=0.001)
    (fresh,) = came(books, engine)
    assert books.ledger.look_in(fresh, books.now) == pytest.approx(TARGET, abs=0.001)
    engine.queue_target = math.inf
    assert books.ledger.look_in(second, books.now) == math.inf
    del record


def test_nobody_is_turned_away_where_nothing_was_asked_for(books: Simulator) -> None:
    """Both are off by default."""
    engine = books.engine()
    record = books.connected(engine)
    (gate,) = came(books, engine)
    books.now += 1e6
    assert books.reject(gate, new=True) is None
    del record


def test_who_was_answered_is_not_turned_away(books: Simulator) -> None:
    """It has what it waited for, if late."""
    engine = engine_of(books, max_waiting=0, queue_target=TARGET)
    record = books.connected(engine)
    (gate,) = came(books, engine)
    books.now += TARGET * INTERVAL
    books.give(engine, record)
    assert books.reject(gate, new=True) is None


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
    text = r"queue_target=.*: write a number of seconds above zero, or None for no target"
    with pytest.raises(ParameterError, match=text):
        QueriesPool(FakeDriver().connect, queue_target=value, pool_id=secrets.token_hex(4))


def test_both_may_be_text_come_with_the_url_and_stay_when_the_pool_is_recreated() -> None:
    """``plugin=queries&max_waiting=3&queue_target=0.25``, and ``Engine.dispose()``."""
    url = f"fake://host/db?plugin=queries&max_waiting=3&queue_target=0.25&pool_id={secrets.token_hex(4)}"
    engine = create_engine(url, module=FakeDriver())
    for _ in range(2):
        attachment = inside.attachment(engine.pool)  # type: ignore[attr-defined]
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
    assert "the queue is full: 2 checkouts wait already (max_waiting)" in first
    assert "Held by, longest first: MainThread" in first
    assert error.snapshot.diagnosis.kind == QUEUE_FULL
    assert inside.shared(full.pool).last_timeouts[-1] is error.snapshot
    numbers = full.pool.statistics()
    assert (numbers.rejected, numbers.timeouts, numbers.waiting) == (1, 0, 2)
    assert PoolManager.statistics().rejected >= 1


def test_many_who_get_nothing_at_once_share_a_snapshot(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overload is not made worse by telling of it: snapshots have a budget; each error counts."""
    taken: list[Any] = []
    take = diagnostics.snapshot

    def slowly(pool: Any) -> Any:
        taken.append(take(pool))
        begin = time.monotonic()
        while time.monotonic() < begin + 0.5:  # it is work, so nothing here waits for time to pass
            pass
        return taken[-1]

    monkeypatch.setattr(diagnostics, "snapshot", slowly)
    full = stage(max_waiting=0)
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
    inside.look_anew(full.pool)  # a while later
    with pytest.raises(CheckoutTimeout):
        full.pool.connect()
    assert len(inside.shared(full.pool).last_timeouts) == len(taken) == 2


def test_with_no_line_at_all_who_finds_nothing_is_refused(stage: Callable[..., Stage]) -> None:
    """``max_waiting=0``; what can be opened is opened."""
    full = stage(max_waiting=0)
    with pytest.raises(TooManyRequests, match="0 checkouts wait already"):
        full.pool.connect()
    full.held.close()
    full.pool.connect().close()


def test_who_may_not_wait_is_served_by_what_can_be_opened(stage: Callable[..., Stage]) -> None:
    """Where it would wait for what is out rather than open another, it opens."""
    full = stage(max_waiting=0)
    inside.shared(full.pool).set_max_size(2)
    inside.ledger(full.pool).mean_connect = 0.5
    Task(lambda: full.pool.connect().close()).result()
    assert full.driver.attempts == 2


def test_who_does_not_wait_anyway_gets_the_timeout(stage: Callable[..., Stage]) -> None:
    """``timeout=0`` is never in line, so no line is too long for it."""
    full = stage(max_waiting=0)
    inside.set_timeout(full.pool, 0.0)
    with pytest.raises(CheckoutTimeout) as caught:
        full.pool.connect()
    assert type(caught.value) is CheckoutTimeout
    assert full.pool.statistics().rejected == 0


def test_in_an_overload_who_has_waited_for_the_target_is_refused_by_its_own_thread(
    stage: Callable[..., Stage], eventually: Callable[..., Any]
) -> None:
    """It wakes by itself, long before its timeout, and says what the pool is like."""
    slow = stage(queue_target=0.01)
    task = slow.waits()
    eventually(lambda: slow.waiting == 1, "it waits")
    slow.clock.now += 0.01 * INTERVAL
    with pytest.raises(TooManyRequests, match=r"overloaded: .*slower than queue_target=0\.01 s"):
        task.result()
    assert slow.pool.statistics().rejected == 1
    assert inside.shared(slow.pool).last_timeouts[-1].diagnosis.kind == OVERLOAD


def test_with_a_target_that_is_kept_everybody_is_served(
    stage: Callable[..., Stage], eventually: Callable[..., Any]
) -> None:
    """No thread is refused while the line is in time."""
    fine = stage(queue_target=0.01, max_waiting=5)
    tasks = [fine.waits() for _ in range(5)]
    eventually(lambda: fine.waiting == 5, "all wait")
    fine.held.close()
    for task in tasks:
        task.result()
    assert fine.pool.statistics().rejected == 0


def test_who_looks_often_does_not_look_for_what_is_wrong_each_time(
    stage: Callable[..., Stage], eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for deadlocks and for what is to be mended takes long where many wait: as seldom as without."""
    often = stage(queue_target=0.01)
    shared = inside.shared(often.pool)
    looks, mends = [], []
    insist, mend = inside.ledger(shared).insist, inside.upkeep(shared).mend
    monkeypatch.setattr(inside.ledger(shared), "look_in", lambda *_: 0.001)
    monkeypatch.setattr(inside.ledger(shared), "insist", lambda *args: looks.append(1) or insist(*args))
    monkeypatch.setattr(inside.upkeep(shared), "mend", lambda: mends.append(1) or mend())
    often.waits()
    eventually(lambda: len(looks) > 500 and mends, "it looks")
    assert len(mends) < len(looks) / 100


def test_a_permit_counts_as_served(books: Simulator) -> None:
    """Who is let open in time has not waited too long, either."""
    engine = engine_of(books, queue_target=TARGET)
    record = books.connected(engine)
    gates = came(books, engine, 2)
    books.now += TARGET / 2
    books.decide(books.ledger.set_limit, 2, books.now)
    assert isinstance(gates[0].answer, Permit)
    books.now += TARGET * (INTERVAL - 0.25)
    assert not overdue(books, gates[1])
    del record
