"""When a checkout that finds nothing idle opens a connection, and when it waits for one that is out."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable
from typing import Any

import inside
import pytest
from fakes import FakeClock, FakeDriver, Task
from ledger_fakes import CheckedWaiter, Record, Simulator
from sqlalchemy import create_engine, event

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.budget import closing, engines
from sqla_queries_pool.budget.choice import look_in
from sqla_queries_pool.budget.queue import FIRST_LOOK, LONGEST, WORTH_IT, Pace, mean
from sqla_queries_pool.budget.slots import Attachment, Permit
from sqla_queries_pool.pool import PoolManager

PRICE = 0.125
"""What a connect takes in the simulator below, in seconds; a number that adds up without rounding."""
LOOK = PRICE * FIRST_LOOK


@pytest.fixture
def simulator() -> Simulator:
    """An empty pool without a limit, at time 0."""
    simulator = Simulator()
    simulator.decide(engines.set_limit, simulator.ledger, math.inf, simulator.now)
    return simulator


def priced(simulator: Simulator, engine: Attachment, number: int, price: float = PRICE) -> list[Record]:
    """So many connections, out, each of which took so long to open."""
    permits = [simulator.take(engine) for _ in range(number)]
    simulator.now += price
    return [simulator.use_permit(engine, permit) for permit in permits]


def crowd(simulator: Simulator, engine: Attachment, number: int) -> list[CheckedWaiter]:
    """So many checkouts at once that all wait."""
    came = [simulator.wait(engine) for _ in range(number)]
    assert all(isinstance(waiter, CheckedWaiter) for waiter in came)
    return came


def look(simulator: Simulator, waiters: list[CheckedWaiter]) -> int:
    """Everybody who still waits insists; how many may open by now?"""
    for waiter in waiters:
        simulator.insist(waiter)
    return sum(isinstance(waiter.answer, Permit) for waiter in waiters)


def test_where_nothing_is_open_everybody_opens_at_once(simulator: Simulator) -> None:
    """Also while others are opening: what is not open yet is returned late."""
    engine = simulator.engine()
    permits = [simulator.wait(engine) for _ in range(5)]
    assert all(isinstance(permit, Permit) for permit in permits)
    simulator.now += PRICE
    record = simulator.use_permit(engine, permits.pop())
    assert isinstance(simulator.wait(engine), CheckedWaiter), "one is out by now"
    del record


def test_a_burst_is_served_by_what_is_out(simulator: Simulator) -> None:
    """Fifty at once on five connections that are returned every 2 ms: nobody opens any."""
    engine = simulator.engine()
    out = priced(simulator, engine, 5)
    waiters = crowd(simulator, engine, 45)
    answered: list[CheckedWaiter] = []
    while len(answered) < len(waiters):
        simulator.now += 0.002
        for record in [*out, *(waiter.answer for waiter in answered[-5:])][-5:]:
            simulator.give(engine, record)
        answered = [waiter for waiter in waiters if waiter.answer is not None]
        assert look(simulator, waiters) == 0
    assert len(simulator.ledger.slots) == 5
    assert [type(waiter.answer) for waiter in waiters] == [Record] * 45


def test_a_caller_that_waits_in_vain_opens_after_the_price_of_a_connect(simulator: Simulator) -> None:
    """So it pays twice at most; and it knows when to look."""
    engine = simulator.engine()
    out = priced(simulator, engine, 3)
    (waiter,) = crowd(simulator, engine, 1)
    begin = simulator.now
    looks = []  # type: ignore[var-annotated]
    while waiter.answer is None and len(looks) < 5:
        pause = look_in(simulator.ledger, waiter, simulator.now)
        looks.append(simulator.now - begin + pause)
        simulator.now += pause
        simulator.insist(waiter)
    assert looks == pytest.approx([LOOK, PRICE], abs=0.001)
    assert isinstance(waiter.answer, Permit)
    del out


def test_a_caller_that_can_not_wait_any_more_does_not_fail_because_others_were_first(
    simulator: Simulator,
) -> None:
    """There is room: those before it are opened for, too, as if nobody had waited; those behind are not."""
    engine = simulator.engine()
    out = priced(simulator, engine, 1)
    waiters = crowd(simulator, engine, 5)
    simulator.insist(waiters[2], last=True)
    assert [isinstance(waiter.answer, Permit) for waiter in waiters] == [True] * 3 + [False] * 2
    del out


def test_a_crowd_before_a_connection_that_stays_out_opens_at_its_first_look(simulator: Simulator) -> None:
    """At the pace so far the last would wait for longer than a connect: all open but those who would not."""
    engine = simulator.engine()
    out = priced(simulator, engine, 1)
    waiters = crowd(simulator, engine, 20)
    simulator.now += LOOK * 0.9
    assert look(simulator, waiters) == 0, "not known yet"
    simulator.now += LOOK * 0.11
    assert look(simulator, waiters) == 20 - 7, "seven at an eighth of the price are less than the price"
    assert [waiter.answer is not None for waiter in waiters] == [True] * 13 + [False] * 7, "nobody overtakes"
    del out


def test_a_crowd_that_moves_waits(simulator: Simulator) -> None:
    """The same crowd, where the connection was returned as often as the pace asks for."""
    engine = simulator.engine()
    (record,) = priced(simulator, engine, 1)
    waiters = crowd(simulator, engine, 20)
    for waiter in waiters[:2]:
        simulator.now += LOOK / 2
        simulator.give(engine, record)
        record = waiter.answer
    assert look(simulator, waiters) == 0


def test_a_queue_that_stands_opens_as_many_as_have_stood_and_at_most_doubles(simulator: Simulator) -> None:
    """It is served fast enough, but never empty: so many more would have been in use all the time."""
    engine = simulator.engine()
    out = priced(simulator, engine, 2)
    queue = crowd(simulator, engine, 4)
    for number in (2, 3):  # what is out is doubled, then so many as stand there are opened
        begin = simulator.now
        permits: list[Any] = []
        while not permits:
            simulator.now += LOOK / 2
            simulator.give(engine, out.pop(0))
            queue += crowd(simulator, engine, 1)
            while look_in(simulator.ledger, queue[-1], simulator.now) == 0:
                simulator.insist(queue[-1])
            permits = [waiter.answer for waiter in queue if isinstance(waiter.answer, Permit)]
            out += [waiter.answer for waiter in queue if isinstance(waiter.answer, Record)]
            queue = [waiter for waiter in queue if waiter.answer is None]
        assert simulator.now - begin == pytest.approx(PRICE)
        assert len(permits) == number
        out += [simulator.use_permit(engine, permit) for permit in permits]
        queue += crowd(simulator, engine, 4 - len(queue))


def test_a_queue_that_was_short_once_opens_no_more_than_stood_then(simulator: Simulator) -> None:
    """Those who came after that may be a burst of their own."""
    engine = simulator.engine()
    out = priced(simulator, engine, 4)
    queue = crowd(simulator, engine, 4)
    simulator.now += PRICE / 2
    for record in out[:3]:
        simulator.give(engine, record)
    queue += crowd(simulator, engine, 5)
    simulator.now += PRICE / 2
    assert look(simulator, queue[-1:]) == 0
    assert sum(isinstance(waiter.answer, Permit) for waiter in queue) == 1
    del out


def test_a_queue_that_comes_and_goes_opens_none(simulator: Simulator) -> None:
    """However long it goes on: what is out is enough."""
    engine = simulator.engine()
    (record,) = priced(simulator, engine, 1)
    for _ in range(50):
        (waiter,) = crowd(simulator, engine, 1)
        simulator.now += PRICE * 0.9
        simulator.insist(waiter)
        simulator.give(engine, record)
        assert isinstance(waiter.answer, Record)
        record = waiter.answer
        simulator.now += PRICE * 0.9
    assert len(simulator.ledger.slots) == 1


def test_a_caller_that_can_not_wait_opens_at_once(simulator: Simulator) -> None:
    """``timeout=0``, and when the time of a checkout is over."""
    engine = simulator.engine()
    out = priced(simulator, engine, 1)
    (waiter,) = crowd(simulator, engine, 1)
    simulator.insist(waiter, last=True)
    assert isinstance(waiter.answer, Permit)
    del out


def test_a_caller_that_holds_all_that_is_out_opens_at_once(simulator: Simulator) -> None:
    """A checkout inside a checkout: nothing is returned while it waits."""
    engine = simulator.engine()
    out = priced(simulator, engine, 2)
    assert isinstance(simulator.take(engine), Permit), "the same holder as of the first two"
    assert simulator.take(engine, object()) is None
    del out


@pytest.mark.parametrize("price", [0.0, WORTH_IT * 0.9])
def test_a_connect_that_takes_no_time_is_not_waited_for(simulator: Simulator, price: float) -> None:
    """A change of threads takes longer; and a clock that stands still makes nobody wait."""
    engine = simulator.engine()
    out = priced(simulator, engine, 1, price)
    assert isinstance(simulator.wait(engine), Permit)
    del out


def test_a_connect_that_has_hung_makes_nobody_wait_for_as_long(simulator: Simulator) -> None:
    """The longest that anybody waits so is bounded."""
    engine = simulator.engine()
    out = priced(simulator, engine, 1, 60.0)
    (waiter,) = crowd(simulator, engine, 1)
    simulator.now += LONGEST
    simulator.insist(waiter)
    assert isinstance(waiter.answer, Permit)
    del out


def test_when_what_was_out_is_gone_a_caller_that_waits_for_it_opens(simulator: Simulator) -> None:
    """It was detached, or lost with its holder, or closes on its return: nothing is left to wait for."""
    engine = simulator.engine()
    simulator.decide(engines.set_limit, simulator.ledger, 4, simulator.now)
    for how in ("detached", "lost", "disposed"):
        out = priced(simulator, engine, 1)
        (waiter,) = crowd(simulator, engine, 1)
        if how == "detached":
            simulator.detach(out.pop())
        elif how == "lost":
            out.clear()
            simulator.settle()
        else:
            simulator.decide(closing.dispose, simulator.ledger, engine)
            simulator.decide(closing.retire, simulator.ledger, engine)
            simulator.give(engine, out.pop())
        assert isinstance(waiter.answer, Permit), how
        simulator.fail(waiter.answer)
        simulator.do_all()


def test_after_the_server_has_refused_everybody_opens_at_once_when_it_lets_in(simulator: Simulator) -> None:
    """They have waited already, for the server."""
    engine = simulator.engine()
    out = priced(simulator, engine, 1)
    permit = simulator.take(engine)
    simulator.refuse(5.0)
    simulator.fail(permit)
    waiters = crowd(simulator, engine, 3)
    simulator.let_in()
    assert [isinstance(waiter.answer, Permit) for waiter in waiters] == [True] * 3
    del out


def test_at_the_limit_nobody_looks_more_often_for_it(simulator: Simulator) -> None:
    """There is nothing to open, so nothing to wake up for."""
    engine = simulator.engine()
    out = priced(simulator, engine, 2)
    simulator.decide(engines.set_limit, simulator.ledger, 2, simulator.now)
    (waiter,) = crowd(simulator, engine, 1)
    assert look_in(simulator.ledger, waiter, simulator.now) == math.inf
    simulator.decide(engines.set_limit, simulator.ledger, 3, simulator.now)
    assert look_in(simulator.ledger, waiter, simulator.now) == pytest.approx(LOOK, abs=0.001)
    del out


def test_a_spare_connection_of_another_engine_is_not_closed_for_a_burst(simulator: Simulator) -> None:
    """To have one give way costs a close and a connect; after the price of a connect it does."""
    engine, other = simulator.engine(), simulator.engine()
    simulator.decide(engines.set_limit, simulator.ledger, 2, simulator.now)
    (spare,) = priced(simulator, other, 1)
    out = priced(simulator, engine, 1)
    simulator.give(other, spare)
    simulator.now += 1.0
    (waiter,) = crowd(simulator, engine, 1)
    simulator.insist(waiter)
    assert waiter.answer is None
    simulator.now += PRICE
    simulator.insist(waiter)
    assert isinstance(waiter.answer, Permit)
    assert waiter.answer.evicts is spare
    del out


def test_the_mean_follows_what_connects_take() -> None:
    """The first counts in full, later ones for a quarter each."""
    assert mean(0.0, 0.2) == 0.2
    assert mean(0.2, 0.4) == pytest.approx(0.25)


def test_a_pace_that_was_never_watched_lets_everybody_open() -> None:
    """Where the price was not known when the queue began, or is none."""
    for price in (0.0, WORTH_IT * 0.9):
        pace = Pace()
        pace.begin(price, 7.0)
        assert pace.opens(1, 7.0)
        assert pace.price == 0, "so nobody looks for it"


# -- threads ---------------------------------------------------------------------------------------


class Stage:
    """An engine on a fake driver whose connects take a price by the pool's clock, and no time."""

    def __init__(self, **kw: Any) -> None:
        self.driver = FakeDriver()
        self.clock = FakeClock()
        self.connected_in: list[str] = []
        pool_id = f"delay {secrets.token_hex(4)}"
        PoolManager.create(pool_id, max_size=10, time_method=self.clock)
        self.engine = create_engine(
            "fake://host/db", module=self.driver, poolclass=QueriesPool, pool_id=pool_id, **kw
        )
        self.shared = inside.shared(self.engine.pool)
        event.listen(self.engine, "connect", self._connect)

    def _connect(self, *_: Any) -> None:
        self.clock.now += PRICE
        self.connected_in.append(threading.current_thread().name)


def test_threads_wait_for_what_is_out_and_open_nothing(eventually: Callable[..., Any]) -> None:
    """Real threads in a queue; the one connection goes from one to the next."""
    stage = Stage()
    held = stage.engine.connect()
    tasks = [Task(lambda: stage.engine.connect().close()) for _ in range(5)]
    eventually(lambda: stage.shared.numbers.waiting == 5, "all wait")
    held.close()
    for task in tasks:
        task.result()
    assert stage.driver.attempts == 1


def test_a_connection_is_opened_in_the_thread_that_asks_for_it(eventually: Callable[..., Any]) -> None:
    """So are its ``connect`` listeners called, as with SQLAlchemy's pools; it wakes by itself when it may."""
    stage = Stage()
    held = stage.engine.connect()
    task = Task(lambda: stage.engine.connect().close(), name="the one that waits")
    eventually(lambda: stage.shared.numbers.waiting == 1, "it waits")
    stage.clock.now += PRICE
    task.result()
    assert stage.connected_in[1:] == ["the one that waits"]
    held.close()


def test_with_no_time_to_wait_a_connection_is_opened() -> None:
    """``pool_timeout=0`` is served by an opening, as before."""
    stage = Stage(pool_timeout=0)
    held = stage.engine.connect()
    Task(lambda: stage.engine.connect().close()).result()
    assert stage.driver.attempts == 2
    held.close()
