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
from ledger_fakes import Gate, Record, Simulator
from sqlalchemy import create_engine, event

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.budget.queue import FIRST_LOOK, LONGEST, WORTH_IT, Pace, mean
from sqla_queries_pool.budget.slots import Attachment, Permit
from sqla_queries_pool.pool import PoolManager

PRICE = 0.125
"""What a connect takes in the books below, in seconds; a number that adds up without rounding."""
LOOK = PRICE * FIRST_LOOK


@pytest.fixture
def books() -> Simulator:
    """An empty pool without a limit, at time 0."""
    books = Simulator()
    books.decide(books.ledger.set_limit, math.inf, books.now)
    return books


def priced(books: Simulator, engine: Attachment, number: int, price: float = PRICE) -> list[Record]:
    """So many connections, out, each of which took so long to open."""
    permits = [books.take(engine) for _ in range(number)]
    books.now += price
    return [books.use_permit(engine, permit) for permit in permits]


def crowd(books: Simulator, engine: Attachment, number: int) -> list[Gate]:
    """So many checkouts at once that all wait."""
    came = [books.wait(engine) for _ in range(number)]
    assert all(isinstance(gate, Gate) for gate in came)
    return came


def look(books: Simulator, gates: list[Gate]) -> int:
    """Everybody who still waits insists; how many may open by now?"""
    for gate in gates:
        books.insist(gate)
    return sum(isinstance(gate.answer, Permit) for gate in gates)


def test_where_nothing_is_open_everybody_opens_at_once(books: Simulator) -> None:
    """Also while others are opening: what is not open yet comes home late."""
    engine = books.engine()
    permits = [books.wait(engine) for _ in range(5)]
    assert all(isinstance(permit, Permit) for permit in permits)
    books.now += PRICE
    record = books.use_permit(engine, permits.pop())
    assert isinstance(books.wait(engine), Gate), "one is out by now"
    del record


def test_a_burst_is_served_by_what_is_out(books: Simulator) -> None:
    """Fifty at once on five connections that come home every 2 ms: nobody opens any."""
    engine = books.engine()
    out = priced(books, engine, 5)
    gates = crowd(books, engine, 45)
    answered: list[Gate] = []
    while len(answered) < len(gates):
        books.now += 0.002
        for record in [*out, *(gate.answer for gate in answered[-5:])][-5:]:
            books.give(engine, record)
        answered = [gate for gate in gates if gate.answer is not None]
        assert look(books, gates) == 0
    assert len(books.ledger.slots) == 5
    assert [type(gate.answer) for gate in gates] == [Record] * 45


def test_one_who_waits_in_vain_opens_after_the_price_of_a_connect(books: Simulator) -> None:
    """So it pays twice at most; and it knows when to look."""
    engine = books.engine()
    out = priced(books, engine, 3)
    (gate,) = crowd(books, engine, 1)
    begin = books.now
    looks = []
    while gate.answer is None and len(looks) < 5:
        pause = books.ledger.look_in(gate, books.now)
        looks.append(books.now - begin + pause)
        books.now += pause
        books.insist(gate)
    assert looks == pytest.approx([LOOK, PRICE], abs=0.001)
    assert isinstance(gate.answer, Permit)
    del out


def test_who_can_not_wait_any_more_does_not_fail_because_others_were_first(books: Simulator) -> None:
    """There is room: those before it are opened for, too, as if nobody had waited; those behind are not."""
    engine = books.engine()
    out = priced(books, engine, 1)
    gates = crowd(books, engine, 5)
    books.insist(gates[2], last=True)
    assert [isinstance(gate.answer, Permit) for gate in gates] == [True] * 3 + [False] * 2
    del out


def test_a_crowd_before_a_connection_that_stays_out_opens_at_its_first_look(books: Simulator) -> None:
    """At the pace so far the last would wait for longer than a connect: all open but those who would not."""
    engine = books.engine()
    out = priced(books, engine, 1)
    gates = crowd(books, engine, 20)
    books.now += LOOK * 0.9
    assert look(books, gates) == 0, "not known yet"
    books.now += LOOK * 0.11
    assert look(books, gates) == 20 - 7, "seven at an eighth of the price are less than the price"
    assert [gate.answer is not None for gate in gates] == [True] * 13 + [False] * 7, "nobody overtakes"
    del out


def test_a_crowd_that_moves_waits(books: Simulator) -> None:
    """The same crowd, where the connection has come home as often as the pace asks for."""
    engine = books.engine()
    (record,) = priced(books, engine, 1)
    gates = crowd(books, engine, 20)
    for gate in gates[:2]:
        books.now += LOOK / 2
        books.give(engine, record)
        record = gate.answer
    assert look(books, gates) == 0


def test_a_line_that_stands_opens_as_many_as_have_stood_and_at_most_doubles(books: Simulator) -> None:
    """It is served fast enough, but never empty: so many more would have been in use all the time."""
    engine = books.engine()
    out = priced(books, engine, 2)
    line = crowd(books, engine, 4)
    for number in (2, 3):  # what is out is doubled, then so many as stand there are opened
        begin = books.now
        permits: list[Any] = []
        while not permits:
            books.now += LOOK / 2
            books.give(engine, out.pop(0))
            line += crowd(books, engine, 1)
            while books.ledger.look_in(line[-1], books.now) == 0:
                books.insist(line[-1])
            permits = [gate.answer for gate in line if isinstance(gate.answer, Permit)]
            out += [gate.answer for gate in line if isinstance(gate.answer, Record)]
            line = [gate for gate in line if gate.answer is None]
        assert books.now - begin == pytest.approx(PRICE)
        assert len(permits) == number
        out += [books.use_permit(engine, permit) for permit in permits]
        line += crowd(books, engine, 4 - len(line))


def test_a_line_that_was_short_once_opens_no_more_than_stood_then(books: Simulator) -> None:
    """Those who came after that may be a burst of their own."""
    engine = books.engine()
    out = priced(books, engine, 4)
    line = crowd(books, engine, 4)
    books.now += PRICE / 2
    for record in out[:3]:
        books.give(engine, record)
    line += crowd(books, engine, 5)
    books.now += PRICE / 2
    assert look(books, line[-1:]) == 0
    assert sum(isinstance(gate.answer, Permit) for gate in line) == 1
    del out


def test_a_line_that_comes_and_goes_opens_none(books: Simulator) -> None:
    """However long it goes on: what is out is enough."""
    engine = books.engine()
    (record,) = priced(books, engine, 1)
    for _ in range(50):
        (gate,) = crowd(books, engine, 1)
        books.now += PRICE * 0.9
        books.insist(gate)
        books.give(engine, record)
        assert isinstance(gate.answer, Record)
        record = gate.answer
        books.now += PRICE * 0.9
    assert len(books.ledger.slots) == 1


def test_who_can_not_wait_opens_at_once(books: Simulator) -> None:
    """``timeout=0``, and when the time of a checkout is over."""
    engine = books.engine()
    out = priced(books, engine, 1)
    (gate,) = crowd(books, engine, 1)
    books.insist(gate, last=True)
    assert isinstance(gate.answer, Permit)
    del out


def test_who_holds_all_that_is_out_opens_at_once(books: Simulator) -> None:
    """A checkout inside a checkout: nothing comes home while it waits."""
    engine = books.engine()
    out = priced(books, engine, 2)
    assert isinstance(books.take(engine), Permit), "the same holder as of the first two"
    assert books.take(engine, object()) is None
    del out


@pytest.mark.parametrize("price", [0.0, WORTH_IT * 0.9])
def test_a_connect_that_takes_no_time_is_not_waited_for(books: Simulator, price: float) -> None:
    """A change of threads takes longer; and a clock that stands still makes nobody wait."""
    engine = books.engine()
    out = priced(books, engine, 1, price)
    assert isinstance(books.wait(engine), Permit)
    del out


def test_a_connect_that_has_hung_makes_nobody_wait_for_as_long(books: Simulator) -> None:
    """The longest that anybody waits so is bounded."""
    engine = books.engine()
    out = priced(books, engine, 1, 60.0)
    (gate,) = crowd(books, engine, 1)
    books.now += LONGEST
    books.insist(gate)
    assert isinstance(gate.answer, Permit)
    del out


def test_when_what_was_out_is_gone_who_waits_for_it_opens(books: Simulator) -> None:
    """It was detached, or lost with its holder, or closes when it comes home: nothing is left to wait for."""
    engine = books.engine()
    books.decide(books.ledger.set_limit, 4, books.now)
    for how in ("detached", "lost", "disposed"):
        out = priced(books, engine, 1)
        (gate,) = crowd(books, engine, 1)
        if how == "detached":
            books.detach(out.pop())
        elif how == "lost":
            out.clear()
            books.settle()
        else:
            books.decide(books.ledger.dispose, engine)
            books.decide(books.ledger.retire, engine)
            books.give(engine, out.pop())
        assert isinstance(gate.answer, Permit), how
        books.fail(gate.answer)
        books.do_all()


def test_after_the_server_has_refused_everybody_opens_at_once_when_it_lets_in(books: Simulator) -> None:
    """They have waited already, for the server."""
    engine = books.engine()
    out = priced(books, engine, 1)
    permit = books.take(engine)
    books.refuse(5.0)
    books.fail(permit)
    gates = crowd(books, engine, 3)
    books.let_in()
    assert [isinstance(gate.answer, Permit) for gate in gates] == [True] * 3
    del out


def test_at_the_limit_nobody_looks_more_often_for_it(books: Simulator) -> None:
    """There is nothing to open, so nothing to wake up for."""
    engine = books.engine()
    out = priced(books, engine, 2)
    books.decide(books.ledger.set_limit, 2, books.now)
    (gate,) = crowd(books, engine, 1)
    assert books.ledger.look_in(gate, books.now) == math.inf
    books.decide(books.ledger.set_limit, 3, books.now)
    assert books.ledger.look_in(gate, books.now) == pytest.approx(LOOK, abs=0.001)
    del out


def test_a_spare_connection_of_another_engine_is_not_closed_for_a_burst(books: Simulator) -> None:
    """To have one give way costs a close and a connect; after the price of a connect it does."""
    engine, other = books.engine(), books.engine()
    books.decide(books.ledger.set_limit, 2, books.now)
    (spare,) = priced(books, other, 1)
    out = priced(books, engine, 1)
    books.give(other, spare)
    books.now += 1.0
    (gate,) = crowd(books, engine, 1)
    books.insist(gate)
    assert gate.answer is None
    books.now += PRICE
    books.insist(gate)
    assert isinstance(gate.answer, Permit)
    assert gate.answer.evicts is spare
    del out


def test_the_mean_follows_what_connects_take() -> None:
    """The first counts in full, later ones for a quarter each."""
    assert mean(0.0, 0.2) == 0.2
    assert mean(0.2, 0.4) == pytest.approx(0.25)


def test_a_pace_that_was_never_watched_lets_everybody_open() -> None:
    """Where the price was not known when the line began, or is none."""
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
        self.shared = inside.shared(self.engine.pool)  # type: ignore[attr-defined]
        event.listen(self.engine, "connect", self._connect)

    def _connect(self, *_: Any) -> None:
        self.clock.now += PRICE
        self.connected_in.append(threading.current_thread().name)


def test_threads_wait_for_what_is_out_and_open_nothing(eventually: Callable[..., Any]) -> None:
    """Real threads in line; the one connection goes from one to the next."""
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
    task = Task(lambda: stage.engine.connect().close(), name="the one who waits")
    eventually(lambda: stage.shared.numbers.waiting == 1, "it waits")
    stage.clock.now += PRICE
    task.result()
    assert stage.connected_in[1:] == ["the one who waits"]
    held.close()


def test_with_no_time_to_wait_a_connection_is_opened() -> None:
    """``pool_timeout=0`` is served by an opening, as before."""
    stage = Stage(pool_timeout=0)
    held = stage.engine.connect()
    Task(lambda: stage.engine.connect().close()).result()
    assert stage.driver.attempts == 2
    held.close()
