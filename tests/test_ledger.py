"""The rules of the bookkeeping, one by one.  ``Simulator`` checks all invariants after every operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from ledger_fakes import Gate, Record, Session, Simulator

from sqla_queries_pool.budget import ledger as reasons
from sqla_queries_pool.budget.slots import (
    CLOSING,
    HELD,
    IDLE,
    LOCKED,
    OPENING,
    Attachment,
    Close,
    NotHeld,
    Permit,
    Quota,
    Reset,
    Slot,
)


@pytest.fixture
def books() -> Simulator:
    """An empty pool, at time 0."""
    return Simulator()


def limited(books: Simulator, limit: float | None) -> None:
    """Set the limit."""
    books.decide(books.ledger.set_limit, limit, books.now)


def held(books: Simulator, engine: Attachment, number: int) -> list[Record]:
    """So many connections, out."""
    return [books.connected(engine) for _ in range(number)]


def idle(books: Simulator, engine: Attachment, number: int = 1, hollows: int = 0) -> list[Record]:
    """So many connections, come home one second after the other, in this order; so many more of the
    records at the end of the list have lost theirs before."""
    records = held(books, engine, number + hollows)
    for record in records[number:]:
        books.unplug(record.slot)
    for record in records:
        books.now += 1
        books.give(engine, record)
    return records


def locked(books: Simulator, slot: Slot) -> Session:
    """The session that has locked the slot."""
    session = Session()
    assert books.lock(slot, session)
    return session


def waiting(books: Simulator, *engines: Attachment) -> list[Gate]:
    """One waiter for each of the engines, come one millisecond after the other."""
    waiters = []
    for engine in engines:
        books.now += 0.001
        waiters.append(books.wait(engine))
    assert all(isinstance(waiter, Gate) for waiter in waiters)
    return waiters


def answers(*waiters: Gate) -> list[bool]:
    """Which of the waiters have their answer."""
    return [waiter.answer is not None for waiter in waiters]


# -- which connection is used ----------------------------------------------------------------------


@pytest.mark.parametrize("lifo", [True, False])
def test_the_last_that_came_home_is_used_first_or_the_first_if_wished(books: Simulator, lifo: bool) -> None:
    """lifo: the connection that is idle for the shortest time is taken; else the one idle for longest."""
    engine = books.engine(lifo=lifo)
    records = idle(books, engine, 3)
    assert held(books, engine, 3) == (records[::-1] if lifo else records)


def test_an_idle_connection_goes_before_a_hollow_record_and_that_before_a_new_one(books: Simulator) -> None:
    """Nothing is opened while a connection is idle, and no slot is made while there is a hollow record."""
    engine = books.engine()
    connection, record = idle(books, engine, 1, hollows=1)
    assert books.take(engine) is connection
    assert books.take(engine) is record
    assert isinstance(books.take(engine), Permit)


def test_who_takes_a_connection_is_written_down(books: Simulator) -> None:
    """Holder, time and number of uses are those of the last take, whether direct or by hand-over."""
    engine = books.engine(1)
    (record,) = idle(books, engine)
    books.now = 7.0
    assert books.ledger.take(engine, 41, books.now) is record
    assert (record.slot.holder, record.slot.since, record.slot.uses) == (41, 7.0, 2)
    (waiter,) = waiting(books, engine)
    waiter.holder = 42
    books.now = 8.0
    books.give(engine, record)
    assert (record.slot.holder, record.slot.since, record.slot.uses) == (42, 8.0, 3)
    books.now = 9.0
    books.give(engine, record)
    assert (record.slot.holder, record.slot.since, record.slot.uses) == (None, 9.0, 3)


# -- waiting for one's own engine ------------------------------------------------------------------


def test_within_one_engine_who_came_first_is_served_first(books: Simulator) -> None:
    """Connections that come home go to the line in its order, the same records, one each."""
    engine = books.engine(2)
    records = held(books, engine, 2)
    waiters = waiting(books, engine, engine, engine)
    books.give(engine, records[1])
    assert answers(*waiters) == [True, False, False]
    books.give(engine, records[0])
    assert [waiter.answer for waiter in waiters] == [records[1], records[0], None]


def test_a_newcomer_does_not_overtake_who_was_handed_a_connection(books: Simulator) -> None:
    """A connection that is handed over is never idle: a checkout at that moment gets nothing."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    (waiter,) = waiting(books, engine)
    books.give(engine, record)
    assert books.take(engine) is None
    assert waiter.answer is record


def test_who_timed_out_is_not_served(books: Simulator) -> None:
    """One that leaves the line takes nothing along and keeps nobody's place."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    first, second = waiting(books, engine, engine)
    assert books.leave(first) is None
    books.give(engine, record)
    assert answers(first, second) == [False, True]


def test_who_was_answered_while_timing_out_gets_the_answer(books: Simulator) -> None:
    """Leaving returns what was given in the same moment, so that it can be passed on."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    first, second = waiting(books, engine, engine)
    books.give(engine, record)
    assert books.leave(first) is record
    books.give(engine, record)
    assert second.answer is record


def test_a_hollow_record_is_handed_over_too(books: Simulator) -> None:
    """A record whose connection was invalidated is a slot: who waits may have it, and opens."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    (waiter,) = waiting(books, engine)
    books.unplug(record.slot)
    books.give(engine, record)
    assert waiter.answer is record


def test_a_slot_that_came_free_meanwhile_needs_no_waiting(books: Simulator) -> None:
    """Between the first try and the joining of the line the lock is free: joining tries again."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    assert books.take(engine) is None
    books.give(engine, record)
    assert books.wait(engine) is record


def test_the_mean_wait_follows_what_the_served_waited(books: Simulator) -> None:
    """One sixteenth of each new wait; checkouts that do not wait do not count."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    for _ in range(2):
        (waiter,) = waiting(books, engine)
        books.now = waiter.since + 1.6
        books.give(engine, record)
    assert books.ledger.mean_wait == pytest.approx(0.1 + 1.5 / 16)


# -- waiting beside other engines ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean_wait", "waited", "goes_over"),
    [(0.0, 0.09, False), (0.0, 0.11, True), (0.02, 0.11, True), (0.5, 1.9, False), (0.5, 2.1, True)],
)
def test_another_engines_waiter_goes_first_when_it_waited_for_too_long(
    books: Simulator, mean_wait: float, waited: float, goes_over: bool
) -> None:
    """An engine's own line has what comes home, unless the oldest of all has waited for more than
    100 ms and more than four times the mean wait."""
    own, other = books.engine(1), books.engine(1)
    limited(books, 1)
    (record,) = held(books, own, 1)
    (older,) = waiting(books, other)
    books.now = older.since + waited
    (younger,) = waiting(books, own)
    books.now = older.since + waited
    books.ledger.mean_wait = mean_wait
    books.give(own, record)
    assert answers(older, younger) == [goes_over, not goes_over]
    assert (younger.answer or older.answer.evicts) is record


def test_the_oldest_waiter_of_all_never_loses_its_turn_to_another_engine(books: Simulator) -> None:
    """Patience is about older waiters of others: one's own oldest is served, however long all wait."""
    own, other = books.engine(1), books.engine(1)
    limited(books, 1)
    (record,) = held(books, own, 1)
    older, younger = waiting(books, own, other)
    books.now += 100
    books.give(own, record)
    assert answers(older, younger) == [True, False]


def test_where_the_own_line_is_empty_the_oldest_of_those_without_a_slot_gets_it(books: Simulator) -> None:
    """What comes home and nobody of its engine waits for goes at once to the oldest of the others, if
    that one's engine has nothing at all."""
    own, second, third = books.engine(), books.engine(), books.engine()
    limited(books, 1)
    (record,) = held(books, own, 1)
    older, younger = waiting(books, third, second)
    books.give(own, record)
    assert answers(older, younger) == [True, False]
    assert isinstance(older.answer, Permit)
    assert older.answer.evicts is record


def served_after(books: Simulator, waiter: Gate) -> float:
    """Let time pass until the waiter has its answer; how many seconds it took."""
    begin = books.now
    while waiter.answer is None:
        assert books.now < begin + 10
        books.now += 0.01
        books.insist(waiter)
    return books.now - begin


def test_a_connection_that_is_about_to_be_used_again_is_not_closed_for_others_at_once(
    books: Simulator,
) -> None:
    """An engine that has slots of its own gets another one's idle connection when that was idle for
    50 ms, or when its waiter has waited for 100 ms and the connection came home later than that."""
    own, other = books.engine(), books.engine()
    limited(books, 3)
    held(books, other, 1)
    spare, busy = held(books, own, 2)
    (waiter,) = waiting(books, other)
    books.give(own, spare)
    assert waiter.answer is None
    assert served_after(books, waiter) == pytest.approx(0.05, abs=0.011)
    assert waiter.answer.evicts is spare
    books.use_permit(other, waiter.answer)

    (waiter,) = waiting(books, other)
    for _ in range(9):  # it is out and in all the time
        books.now += 0.01
        books.give(own, busy)
        assert books.take(own) is busy
    assert waiter.answer is None
    books.now += 0.011
    books.give(own, busy)
    assert waiter.answer.evicts is busy


@pytest.mark.parametrize("wanted", [True, False])
def test_a_hollow_record_goes_to_the_oldest_of_all_at_once(books: Simulator, wanted: bool) -> None:
    """Whoever gets it has to open a connection: nothing is lost by moving the slot."""
    own, other = books.engine(), books.engine()
    limited(books, 2)
    keeps, (record,) = held(books, other, 1), held(books, own, 1)
    waiters = waiting(books, other, own) if wanted else waiting(books, other)
    books.unplug(record.slot)
    books.give(own, record)
    assert waiters[0].answer.evicts is record
    del keeps


def test_who_can_not_wait_may_have_any_idle_connection(books: Simulator) -> None:
    """The last word of a waiter that is about to give up."""
    own, other = books.engine(), books.engine()
    limited(books, 2)
    held(books, other, 1)
    (record,) = idle(books, own)
    (waiter,) = waiting(books, other)
    assert waiter.answer is None
    books.insist(waiter, last=True)
    assert waiter.answer.evicts is record


def test_nobody_overtakes_by_insisting(books: Simulator) -> None:
    """What a waiter gets by insisting goes to the first of its line."""
    own, other = books.engine(), books.engine()
    limited(books, 2)
    held(books, other, 1)
    idle(books, own)
    older, younger = waiting(books, other, other)
    books.insist(younger, last=True)
    assert answers(older, younger) == [True, False]


def test_a_newcomer_does_not_overtake_by_coming_when_something_is_spare_by_now(books: Simulator) -> None:
    """What time alone has made available is for who waits already, also before that one asks again."""
    own, other = books.engine(), books.engine()
    limited(books, 2)
    held(books, other, 1)
    out = held(books, own, 1)
    (waiter,) = waiting(books, other)
    books.give(own, out[0])
    books.now += 0.06
    assert books.take(other) is None
    assert isinstance(books.wait(other), Gate)
    books.insist(waiter)
    assert waiter.answer.evicts is out[0]


def test_an_engine_that_has_nothing_gets_what_an_older_waiter_may_not_have_yet(books: Simulator) -> None:
    """A waiter who has to wait until a connection is spare keeps it from nobody who has not."""
    own, modest, poor = books.engine(), books.engine(), books.engine()
    limited(books, 2)
    held(books, modest, 1)
    (record,) = held(books, own, 1)
    older, younger = waiting(books, modest, poor)
    books.give(own, record)
    assert answers(older, younger) == [False, True]
    assert younger.answer.evicts is record


def test_slots_spread_over_the_engines_in_proportion_to_what_they_want(books: Simulator) -> None:
    """However they were shared at first: 30 threads of three engines on 9 slots end with 3 each, with few
    transfers, and then no more."""
    engines = [books.engine() for _ in range(3)]
    limited(books, 9)
    out = [(engines[0], record) for record in held(books, engines[0], 9)]
    # After a check-in its thread is back at the end of its line, so that demand stays what it is.
    lines = {engine: [*waiting(books, *[engine] * n)] for engine, n in zip(engines, (1, 10, 10), strict=True)}
    transfers = []
    for turn in range(200):
        books.now += 0.001
        engine, record = out.pop(0)
        books.give(engine, record)
        lines[engine] += waiting(books, engine)
        for other, line in lines.items():
            while line and line[0].answer is not None:
                entry = line.pop(0).answer
                if isinstance(entry, Permit):
                    transfers.append(turn)
                    entry = books.use_permit(other, entry)
                out.append((other, entry))
        books.do_all()
    assert [len(engine.quota.slots) for engine in engines] == [3, 3, 3]
    assert len(transfers) < 10
    assert max(transfers) < 100


def test_an_engine_keeps_slots_in_proportion_to_its_line(books: Simulator) -> None:
    """One that has more of them than another gives none away when it wants that many more, too."""
    busy, calm = books.engine(), books.engine()
    limited(books, 5)
    out, keeps = held(books, busy, 4), held(books, calm, 1)
    own, *_ = waiting(books, *[busy] * 12)
    (other,) = waiting(books, calm)
    books.give(busy, out.pop())  # 4 of 16 against 1 of 2
    assert answers(own, other) == [True, False]
    del keeps


def test_an_engine_at_its_own_ceiling_is_passed_over(books: Simulator) -> None:
    """A waiter whose engine has all that it may have keeps nobody else from the slot."""
    full, own, other = books.engine(1), books.engine(), books.engine()
    limited(books, 2)
    (keeps,) = held(books, full, 1)
    (record,) = held(books, own, 1)
    older, younger = waiting(books, full, other)
    books.now += 1  # both may have any idle connection by now
    books.give(own, record)
    assert answers(older, younger) == [False, True]
    books.give(full, keeps)
    assert older.answer is keeps


def test_an_engine_at_its_own_ceiling_waits_while_others_open(books: Simulator) -> None:
    """No engine exceeds its own max_size, whatever room there is, and that stops nobody else."""
    small, large = books.engine(1), books.engine(5)
    held(books, small, 1)
    (waiter,) = waiting(books, small)
    assert len(held(books, large, 3)) == 3
    assert answers(waiter) == [False]


def test_a_recreated_engine_has_its_predecessors_ceiling_and_slots(books: Simulator) -> None:
    """Engines of one quota share the ceiling; what comes home to one can go to the other's waiter."""
    quota = Quota(1)
    old, new = books.engine(quota=quota), books.engine(quota=quota)
    books.engine(5)
    (record,) = held(books, old, 1)
    (waiter,) = waiting(books, new)
    books.give(old, record)
    assert waiter.answer.evicts is record
    assert len(quota.slots) == 1


def test_a_slot_that_is_transferred_counts_once_all_the_time(books: Simulator) -> None:
    """From the check-in of the one to the opening of the other there is one slot and one socket."""
    own, other = books.engine(), books.engine()
    limited(books, 1)
    (record,) = held(books, own, 1)
    (waiter,) = waiting(books, other)

    def count() -> tuple[int, int, int, int]:
        ledger = books.ledger
        return len(ledger.slots), len(books.sockets), len(own.quota.slots), len(other.quota.slots)

    assert count() == (1, 1, 1, 0)
    books.give(own, record)
    assert count() == (1, 1, 0, 1)
    assert (books.ledger.numbers().opening, books.ledger.numbers().held) == (1, 0)
    opened = books.bind(other, waiter.answer)
    assert count() == (1, 0, 0, 1)
    books.plug(other, opened)
    books.opened(opened.slot)
    assert opened.slot.instead_of is None  # else a slot would keep all its predecessors
    assert count() == (1, 1, 0, 1)
    assert (books.ledger.numbers().opening, books.ledger.numbers().held) == (0, 1)


# -- who gives way ---------------------------------------------------------------------------------


def test_what_can_best_be_spared_gives_way_first(books: Simulator) -> None:
    """Hollow records, the engines' least recently used, what was added by hand, stale locks: in this
    order, whatever their age.  What a living session has locked never does."""
    stale, kept, by_hand = books.add(), books.add(), books.add()
    assert stale is not None
    assert kept is not None
    first, second, hungry = books.engine(), books.engine(lifo=False), books.engine()
    limited(books, 8)
    session = locked(books, kept)
    locked(books, stale)
    books.settle()
    (a1, a2), (b1, b2, void) = held(books, first, 2), held(books, second, 3)
    books.unplug(void.slot)
    for engine, record in ((second, b1), (first, a1), (second, b2), (first, a2), (second, void)):
        books.now += 1
        books.give(engine, record)
    evicted = [books.use_permit(hungry, permit) and entry for permit, entry in evictions(books, hungry)]
    assert evicted == [void, b1, a1, b2, a2, by_hand, stale]
    assert kept.session is not None
    assert kept.session() is session


def evictions(books: Simulator, engine: Attachment) -> Any:
    """Check out until nobody gives way: the permits and what each of them evicts."""
    while (permit := books.take(engine)) is not None:
        yield permit, permit.evicts


def test_an_engine_at_its_ceiling_evicts_its_own_alone(books: Simulator) -> None:
    """Where an engine's own ceiling is what stops it, others' idle connections are no help."""
    quota = Quota(1)
    old, new, other = books.engine(quota=quota), books.engine(quota=quota), books.engine(5)
    books.add()
    idle(books, other)
    (record,) = idle(books, old)
    permit = books.take(new)
    assert permit.evicts is record
    assert books.take(new) is None


def test_nothing_gives_way_while_there_is_room(books: Simulator) -> None:
    """Idle connections of others are closed for nobody who can have a free slot."""
    own, other = books.engine(2), books.engine()
    limited(books, 2)
    idle(books, other)
    assert books.take(own).evicts is None
    books.now += 1
    assert books.take(own).evicts is not None


# -- opening ---------------------------------------------------------------------------------------


def test_a_failure_to_open_lets_the_next_waiter_try(books: Simulator) -> None:
    """The slot of an opening that failed goes to the oldest waiter at once, who opens for itself."""
    engine, other = books.engine(), books.engine()
    limited(books, 1)
    permit = books.take(engine)
    older, younger = waiting(books, other, engine)
    books.fail(permit)
    assert answers(older, younger) == [True, False]
    books.fail(older.answer)
    assert answers(older, younger) == [True, True]
    assert younger.answer.evicts is None


def test_what_is_being_opened_counts(books: Simulator) -> None:
    """A permission to open is a slot from the start; who opened holds it since then."""
    engine = books.engine()
    limited(books, 1)
    permit = books.take(engine)
    assert permit.slot.state is OPENING
    assert books.take(engine) is None
    books.now = 3.0
    record = books.use_permit(engine, permit)
    assert (record.slot.state, record.slot.since) == (HELD, 3.0)


# -- refusals --------------------------------------------------------------------------------------


def refused(books: Simulator, engine: Attachment, length: float = 1.0) -> None:
    """Somebody connects, is refused and gives up; so a pause begins."""
    permit = books.take(engine)
    assert books.refuse(length)
    books.fail(permit)


def test_nobody_connects_during_a_pause(books: Simulator) -> None:
    """Neither who comes then nor who waits and insists, whatever room there is; when it is over, he does."""
    engine, other = books.engine(), books.engine()
    refused(books, engine)
    assert books.take(other) is None
    (waiter,) = waiting(books, engine)
    books.now = 0.99
    books.insist(waiter, last=True)
    assert answers(waiter) == [False]
    books.now = 1.0
    books.insist(waiter)
    assert isinstance(waiter.answer, Permit)


def test_after_a_pause_one_connects_and_the_next_after_another_pause(books: Simulator) -> None:
    """Also where the first one has not come back by then: a connect that hangs holds up nobody for good."""
    engine, other = books.engine(), books.engine()
    refused(books, engine)
    first, second, third = waiting(books, engine, engine, other)
    books.now = 1.0
    books.all_insist()
    assert answers(first, second, third) == [True, False, False]
    assert books.take(books.engine()) is None
    books.now = 2.0
    books.insist(second)
    books.insist(third)
    assert answers(second, third) == [True, False]
    books.now = 3.0
    books.insist(third)
    assert answers(third) == [True]


def test_pauses_follow_one_another_until_somebody_is_let_in(books: Simulator) -> None:
    """How long a pause is depends on how many there were before; after a success it begins with one."""
    engine = books.engine()
    asked: list[int] = []

    def pauses(refusals: int) -> float:
        asked.append(refusals)
        return 10.0 * refusals

    def is_refused() -> float:
        permit = books.ledger.take(engine, 0, books.now)
        assert isinstance(permit, Permit)
        books.ledger.refused(pauses, books.now)
        books.ledger.failed(permit.slot, books.now)
        books.now = books.ledger.retry_at
        return books.now

    assert [is_refused(), is_refused(), is_refused()] == [10.0, 30.0, 60.0]
    permit = books.ledger.take(engine, 0, books.now)
    record = books.bind(engine, permit)
    books.plug(engine, record)
    books.ledger.opened(record.slot, books.now)
    assert is_refused() == 70.0
    assert asked == [1, 2, 3, 1]


def test_those_who_were_connecting_already_begin_no_pause_of_their_own(books: Simulator) -> None:
    """Ten that are refused together are one refusal: the pause does not grow with the number of threads."""
    engine = books.engine()
    permits = [books.take(engine) for _ in range(10)]
    began = []
    for permit in permits:
        books.now += 0.01
        began.append(books.refuse())
        books.fail(permit)
    assert began == [True] + [False] * 9
    assert (books.refusals, books.pause_ends) == (1, 1.01)


def test_who_was_connecting_when_the_pause_began_may_end_it(books: Simulator) -> None:
    """The server lets one in: then it lets in others, and nobody waits for the end of the pause."""
    engine, other = books.engine(), books.engine()
    limited(books, 4)
    late = books.take(engine)
    refused(books, engine)
    waiters = waiting(books, engine, other, engine, engine)
    record = books.use_permit(engine, late)
    assert answers(*waiters) == [True, True, True, False]
    assert books.refusals == 0
    del record


def test_a_success_lets_everybody_in(books: Simulator) -> None:
    """As many as there are slots for, the oldest first, also those that come then."""
    engine, other = books.engine(), books.engine()
    limited(books, 4)
    refused(books, engine)
    waiters = waiting(books, engine, other, engine)
    books.now = 2.0
    books.insist(waiters[0])
    assert answers(*waiters) == [True, False, False]
    record = books.use_permit(engine, waiters[0].answer)
    assert answers(*waiters) == [True, True, True]
    assert isinstance(books.take(other), Permit)
    del record


def test_a_reopening_that_succeeds_lets_everybody_in_too(books: Simulator) -> None:
    """A record that had lost its connection proves it as well as a new one does."""
    engine, other = books.engine(), books.engine()
    (record,) = held(books, engine, 1)
    refused(books, engine)
    (waiter,) = waiting(books, other)
    books.unplug(record.slot)
    books.plug(engine, record)
    books.opened(record.slot)
    assert answers(waiter) == [True]


@pytest.mark.parametrize("how", ["given up", "lost"])
def test_an_attempt_that_comes_to_nothing_is_followed_by_another_one(books: Simulator, how: str) -> None:
    """Who was let try may give up before he knows, or be lost: the next one tries after the next pause."""
    engine = books.engine()
    refused(books, engine)
    first, second = waiting(books, engine, engine)
    books.now = 2.0
    books.insist(first)
    permit = first.answer
    if how == "given up":
        books.fail(permit)
    del first, permit
    books.do_all()
    books.settle()
    assert (len(books.ledger.slots), answers(second)) == (0, [False])
    books.now = 3.0
    books.insist(second)
    assert answers(second) == [True]


def test_what_comes_home_during_a_pause_is_used_again(books: Simulator) -> None:
    """A connection of our own that comes back is better than any attempt: it is handed over as ever."""
    engine = books.engine()
    first, second = held(books, engine, 2)
    refused(books, engine)
    older, younger = waiting(books, engine, engine)
    books.give(engine, first)
    assert (older.answer, younger.answer) == (first, None)
    books.give(engine, second)
    assert younger.answer is second
    books.give(engine, first)
    assert books.take(engine) is first


@pytest.mark.parametrize("younger", [True, False])
def test_during_a_pause_a_connection_stays_with_its_engine(books: Simulator, younger: bool) -> None:
    """It is not closed for another engine's waiter, who could not connect: its own engine's has it, or
    nobody, until the pause is over."""
    own, other = books.engine(), books.engine()
    limited(books, 1)
    (record,) = held(books, own, 1)
    books.refuse(10.0)
    (foreign,) = waiting(books, other)
    books.now += 5.0  # it may have any idle connection, if it could connect
    waiters = waiting(books, own) if younger else []
    books.give(own, record)
    assert [waiter.answer for waiter in waiters] == [record] * younger
    assert answers(foreign) == [False]
    books.insist(foreign)
    assert answers(foreign) == [False]
    if younger:
        books.give(own, record)
    books.now = 10.01
    books.insist(foreign)
    assert foreign.answer.evicts is record


def test_a_hollow_record_that_comes_home_during_a_pause_is_nobodys_until_it_is_over(books: Simulator) -> None:
    """To have it is to connect: neither who waits gets it nor who comes, and then the first of the line."""
    engine = books.engine(2)
    first, second = held(books, engine, 2)
    older, younger = waiting(books, engine, engine)
    books.refuse(1.0)
    books.unplug(first.slot)
    books.give(engine, first)
    assert answers(older, younger) == [False, False]
    assert list(engine.hollow) == [first]
    assert books.take(engine) is None
    books.insist(older, last=True)
    assert answers(older, younger) == [False, False]
    books.now = 2.0
    books.all_insist()
    assert answers(older, younger) == [True, False]
    assert len(books.ledger.slots) == 2
    books.unplug(second.slot)
    books.give(engine, second)
    assert answers(younger) == [False], "one attempt in each pause"


def test_a_hollow_record_is_taken_by_one_after_each_pause(books: Simulator) -> None:
    """Where nobody waits who comes then reopens it; the second one waits for the next pause to end."""
    engine = books.engine(2)
    records = idle(books, engine, 0, hollows=2)
    books.refuse(1.0)
    assert books.take(engine) is None
    books.now += 1.0
    assert books.take(engine) in records
    assert books.take(engine) is None
    books.now += 1.0
    assert books.take(engine) in records


def test_who_was_refused_has_its_place_in_the_line_again(books: Simulator) -> None:
    """By when it came at first: behind who came before it, before who came later, and it is no newcomer."""
    engine = books.engine(2)
    record, hollow = held(books, engine, 2)
    first, second, third = waiting(books, engine, engine, engine)
    books.unplug(hollow.slot)
    books.give(engine, hollow)
    assert first.answer is hollow
    books.refuse(1.0)
    books.give(engine, hollow)
    again = books.wait(engine, first.since)
    assert list(engine.queue) == [again, second, third]
    books.leave(second)
    rejoined = books.wait(engine, second.since)
    assert list(engine.queue) == [again, rejoined, third]
    books.give(engine, record)
    assert (again.answer, rejoined.answer) == (record, None)


def test_who_was_refused_takes_what_came_home_meanwhile(books: Simulator) -> None:
    """Between its refusal and its coming back somebody may have checked in: nothing has to be opened."""
    engine = books.engine()
    (record,) = held(books, engine, 1)
    permit = books.take(engine)
    books.refuse(1.0)
    books.fail(permit)
    books.give(engine, record)
    assert books.wait(engine, 0.0) is record


def test_where_waiting_is_of_no_use_everybody_may_try(books: Simulator) -> None:
    """The database is not there, or the error is for good: each is to have an error of his own."""
    engine, other = books.engine(), books.engine()
    refused(books, engine, 1000.0)
    waiters = waiting(books, engine, other, engine)
    books.let_in()
    assert answers(*waiters) == [True] * 3
    assert isinstance(books.take(other), Permit)


def test_while_the_server_refuses_what_is_idle_gives_way_also_below_the_limit(books: Simulator) -> None:
    """It may be full of our own: an attempt that ends one of them first has room.  Spare ones alone, and
    where there is none it is an attempt like any other."""
    own, other = books.engine(), books.engine()
    (record,) = idle(books, own)
    held(books, other, 1)
    refused(books, other)
    (waiter,) = waiting(books, other)
    books.now += 1.0
    books.insist(waiter)
    assert waiter.answer.evicts is record
    books.fail(waiter.answer)
    (again,) = waiting(books, other)
    books.now += 1.0
    books.insist(again)
    assert again.answer.evicts is None


def test_a_forked_child_knows_of_no_refusals(books: Simulator) -> None:
    """The first one that comes connects; and what the parent's attempt found out there is not known here."""
    engine = books.engine()
    refused(books, engine, 1000.0)
    books.now = 1000.0
    attempt = books.take(engine)
    assert isinstance(attempt, Permit)
    waiting(books, engine)
    books.fork()
    assert not engine.queue
    permits = [books.take(engine) for _ in range(3)]
    assert all(isinstance(permit, Permit) for permit in permits)
    assert [books.refuse(), books.refuse()] == [True, False]


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "limit"),
    [
        ([None], 15),
        ([None, None], 15),
        ([20], 20),
        ([3, 7, 5], 7),
        ([3, None], 3),
        ([3, math.inf], math.inf),
    ],
)
def test_the_limit_is_the_largest_that_an_engine_states(
    books: Simulator, stated: list[float | None], limit: float
) -> None:
    """15 where none states any, whatever the order; what was set overrules it until it is unset."""
    for order in (stated, stated[::-1]):
        books = Simulator()
        engines = [books.engine(ceiling) for ceiling in order]
        assert books.ledger.limit == limit
        limited(books, 4)
        assert books.ledger.limit == 4
        engines.append(books.engine(100))
        assert books.ledger.limit == 4
        del engines[-1]
        books.settle()
        limited(books, None)
        assert books.ledger.limit == limit


def test_a_limit_that_an_engine_stated_leaves_with_it(books: Simulator) -> None:
    """What exceeds the others' wishes is closed; without any engine the limit stays."""
    small, large = books.engine(2), books.engine(4)
    idle(books, small, 2)
    keeps = held(books, large, 1)
    assert books.ledger.limit == 4
    del large
    books.settle()
    assert books.ledger.limit == 2
    assert books.reasons == [reasons.LOWERED]
    del small
    books.settle()
    assert books.ledger.limit == 2
    del keeps


def test_a_grown_limit_serves_at_once_the_oldest_first(books: Simulator) -> None:
    """Each new slot goes to the oldest waiter of all engines that may have it."""
    first, second = books.engine(9), books.engine(1)
    limited(books, 1)
    held(books, second, 1)
    waiters = waiting(books, second, first, first, first)
    limited(books, 3)
    assert answers(*waiters) == [False, True, True, False]
    limited(books, math.inf)
    assert answers(*waiters) == [False, True, True, True]


def test_a_lowered_limit_closes_what_is_idle_and_the_rest_when_it_comes_home(books: Simulator) -> None:
    """Idle connections above it close at once, those that are out on return, although somebody waits;
    the slots only get fewer."""
    engine, other = books.engine(), books.engine()
    limited(books, 5)
    out = held(books, engine, 3)
    idle(books, other, 2)
    limited(books, 2)
    assert books.reasons == [reasons.LOWERED] * 2
    books.do_all()
    (waiter,) = waiting(books, other)
    books.give(engine, out.pop())
    assert books.reasons == [reasons.LOWERED]
    assert answers(waiter) == [False]
    books.do_all()
    assert (len(books.ledger.slots), answers(waiter)) == (2, [False])
    books.give(engine, out.pop())
    assert answers(waiter) == [True]
    assert len(books.ledger.slots) == 2


def test_what_comes_home_above_a_lowered_limit_is_closed_also_where_nobody_waits(books: Simulator) -> None:
    """As many as are too many; one that closes already is not one of them."""
    engine = books.engine()
    first, second, third = held(books, engine, 3)
    limited(books, 2)
    books.give(engine, first)
    assert books.reasons == [reasons.LOWERED]
    books.give(engine, second)
    assert list(engine.idle) == [second]
    limited(books, 1)
    assert books.reasons == [reasons.LOWERED] * 2
    books.give(engine, third)
    assert list(engine.idle) == [third]


def test_a_lowered_limit_leaves_alone_what_fits_it(books: Simulator) -> None:
    """As many as the limit allows stay; what is closing by then is not closed for a second time."""
    engine = books.engine()
    idle(books, engine, 5)
    limited(books, 3)
    assert books.reasons == [reasons.LOWERED] * 2
    limited(books, 2)
    assert books.reasons == [reasons.LOWERED] * 3
    assert len(engine.idle) == 2


def test_what_is_closing_counts_until_it_is_closed(books: Simulator) -> None:
    """Somebody who comes while a connection closes waits, and gets the slot when it is closed."""
    engine = books.engine(ttl=5)
    limited(books, 1)
    idle(books, engine)
    books.now += 5
    books.sweep()
    (waiter,) = waiting(books, engine)
    assert books.ledger.numbers().closing == 1
    books.do(books.todo[0])
    assert answers(waiter) == [True]


# -- ages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifo", [True, False])
def test_what_was_idle_for_the_ttl_is_closed_whichever_end_is_used(books: Simulator, lifo: bool) -> None:
    """The left end is the oldest: sweeps close from there and say when the next one is due."""
    engine = books.engine(ttl=10, lifo=lifo)
    first, second = idle(books, engine, 2)  # at 1 and 2
    assert books.told == 11
    books.now = 10.9
    books.sweep()
    assert books.reasons == []
    books.now = 11.0
    books.sweep()
    assert [(item.entry, item.reason) for item in books.todo if isinstance(item, Close)] == [
        (first, reasons.IDLE_TTL)
    ]
    assert books.told == 12
    assert books.take(engine) is second
    books.give(engine, second)  # its age begins anew
    books.now = 20.9
    books.sweep()
    assert list(engine.idle) == [second]
    assert books.told == 21


def test_hollow_records_age_too(books: Simulator) -> None:
    """A slot without a connection leaves after the TTL as one with."""
    engine = books.engine(ttl=10)
    idle(books, engine, 0, hollows=1)
    assert books.told == 11
    books.now = 11.0
    books.sweep()
    assert books.reasons == [reasons.IDLE_TTL]


def test_what_is_out_does_not_age(books: Simulator) -> None:
    """Neither a connection that is out nor one that is being opened nor a session's ever expires."""
    engine, slot = books.engine(ttl=1), books.add()
    assert slot is not None
    session = locked(books, slot)
    books.connected(engine)
    permit = books.take(engine)
    books.now = 1000.0
    books.sweep()
    assert books.reasons == [reasons.ABANDONED]  # the one that nobody kept
    del session, permit


def test_each_engine_has_its_own_ttl_unless_one_is_set_for_all(books: Simulator) -> None:
    """Set, it holds for all engines, those to come and what was added by hand; unset, each has its own."""
    short, never = books.engine(ttl=1), books.engine(ttl=math.inf)
    idle(books, never, 2)
    idle(books, short, 2)
    books.now += 100
    books.sweep()
    assert (len(short.idle), len(never.idle)) == (0, 2)
    assert books.told == math.inf
    books.do_all()
    idle(books, short)
    books.decide(books.ledger.set_ttl, 50.0, books.now)
    assert (len(short.idle), len(never.idle)) == (1, 0)
    late = books.engine(ttl=7)
    assert late.ttl == books.ledger.by_hand.ttl == 50
    books.now += 10
    books.sweep()
    assert len(short.idle) == 1
    books.decide(books.ledger.set_ttl, None, books.now)
    assert (short.ttl, never.ttl, late.ttl, books.ledger.by_hand.ttl) == (1, math.inf, 7, 7)
    assert len(short.idle) == 0


def test_the_housekeeper_is_told_earlier_when_something_expires_earlier(books: Simulator) -> None:
    """Only then: a later expiry than the one that it knows of is no news."""
    slow, quick = books.engine(ttl=60), books.engine(ttl=5)
    books.sweep()
    one, two = books.connected(slow), books.connected(slow)
    (three,) = held(books, quick, 1)
    assert books.ledger.give(slow, one, 0.0) == [(60.0,)]
    assert not books.ledger.give(slow, two, 1.0)
    assert books.ledger.give(quick, three, 2.0) == [(7.0,)]


def test_an_engine_with_a_shorter_ttl_brings_the_housekeeper_earlier(books: Simulator) -> None:
    """What was added by hand follows the engine that attached last: also what is there already."""
    first = books.engine(ttl=60)
    books.add()
    assert books.told == 60
    second = books.engine(ttl=5)
    assert books.told == 5
    del first, second


# -- disposing -------------------------------------------------------------------------------------


def test_dispose_closes_what_is_idle_and_leaves_what_is_out(books: Simulator) -> None:
    """Of this engine alone; without a recreate() following, what is out comes home as usual."""
    engine, other = books.engine(), books.engine()
    idle(books, other)
    (out,) = held(books, engine, 1)
    idle(books, engine, 2, hollows=1)
    books.decide(books.ledger.dispose, engine)
    assert books.reasons == [reasons.DISPOSED] * 3
    books.give(engine, out)
    assert list(engine.idle) == [out]
    assert len(other.idle) == 1


def test_what_was_opened_before_a_completed_dispose_closes_when_it_comes_home(books: Simulator) -> None:
    """Also when somebody waits for it: who gets the slot opens anew.  What was opened later stays."""
    engine = books.engine()
    limited(books, 2)
    old, older = held(books, engine, 2)
    books.unplug(older.slot)
    books.decide(books.ledger.dispose, engine)
    books.plug(engine, older)  # reopened: a generation binds sockets, not records
    books.decide(books.ledger.retire, engine)
    (waiter,) = waiting(books, engine)
    books.give(engine, old)
    assert books.reasons == [reasons.DISPOSED]
    assert answers(waiter) == [False]
    books.do_all()
    assert isinstance(waiter.answer, Permit)
    books.give(engine, older)
    assert list(engine.idle) == [older]


def test_what_came_home_between_dispose_and_recreate_is_closed(books: Simulator) -> None:
    """It is of the generation that ended: it must not stay idle, to be handed out again."""
    engine = books.engine()
    (record,) = held(books, engine, 1)
    books.decide(books.ledger.dispose, engine)
    books.give(engine, record)
    books.decide(books.ledger.retire, engine)
    assert books.reasons == [reasons.DISPOSED]
    assert isinstance(books.take(engine), Permit)


def test_retiring_all_spares_only_what_was_added_by_hand(books: Simulator) -> None:
    """What engines have idle closes at once, what is out when it comes home."""
    engine, other, slot = books.engine(), books.engine(), books.add()
    (record,) = held(books, engine, 1)
    idle(books, other)
    books.decide(books.ledger.retire_all)
    assert books.reasons == [reasons.DISPOSED]
    books.give(engine, record)
    assert books.reasons == [reasons.DISPOSED] * 2
    assert list(books.ledger.by_hand.idle) == [slot]


# -- what is lost ----------------------------------------------------------------------------------


def test_a_dropped_engine_gives_back_what_it_had(books: Simulator) -> None:
    """What it had idle is closed, hollow records need no closing, and the engine is forgotten."""
    engine, _ = books.engine(), books.engine()
    idle(books, engine, 2, hollows=1)
    del engine
    books.settle()
    assert books.reasons == [reasons.ABANDONED] * 2
    assert len(books.ledger.attachments) == 1
    assert len(books.ledger.slots) == 2
    books.do_all()
    assert not books.ledger.slots


def test_a_connection_whose_holder_died_is_closed_before_its_slot_passes_on(books: Simulator) -> None:
    """It counts until it is closed; then the oldest waiter gets the slot."""
    engine = books.engine(1)
    out = held(books, engine, 1)
    (waiter,) = waiting(books, engine)
    out.clear()
    books.settle()
    assert answers(waiter) == [False]
    (item,) = books.todo
    assert isinstance(item, Close)
    assert (item.slot.state, item.entry, item.reason) == (CLOSING, None, reasons.ABANDONED)
    books.do(item)
    assert answers(waiter) == [True]


def test_a_held_record_without_a_connection_that_died_leaves_nothing_to_close(books: Simulator) -> None:
    """Its slot passes on at once."""
    engine = books.engine(1)
    out = held(books, engine, 1)
    books.unplug(out[0].slot)
    (waiter,) = waiting(books, engine)
    out.clear()
    books.settle()
    assert answers(waiter) == [True]


def test_a_permission_to_open_that_was_lost_goes_to_the_next(books: Simulator) -> None:
    """An exception between being told and opening loses no slot; the one who was answered included."""
    engine = books.engine(1)
    permit = books.take(engine)
    first, second = waiting(books, engine, engine)
    del permit
    books.settle()
    assert answers(first, second) == [True, False]
    books.do_all()
    del first
    books.settle()
    assert answers(second) == [True]


def test_an_opening_that_was_lost_with_its_socket_open_is_closed(books: Simulator) -> None:
    """From the socket's opening to the report of it the record answers for it."""
    engine = books.engine(1)
    record = books.bind(engine, books.take(engine))
    books.plug(engine, record)
    (waiter,) = waiting(books, engine)
    del record
    books.settle()
    assert books.reasons == [reasons.ABANDONED]
    assert books.ledger.numbers().opening == 0
    books.do_all()
    assert answers(waiter) == [True]


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_gave_way_to_a_lost_permission_counts_until_it_is_closed(
    books: Simulator, by_hand: bool
) -> None:
    """The permit stood for both: who gets the slot must not open a second socket beside it."""
    own, other = books.engine(), books.engine()
    limited(books, 1)
    if by_hand:
        books.add()
    else:
        idle(books, other)
    permit = books.take(own)
    assert permit.evicts is not None
    (waiter,) = waiting(books, own)
    del permit
    books.settle()
    assert (len(books.sockets), len(books.ledger.slots), answers(waiter)) == (1, 1, [False])
    assert books.reasons == [reasons.ABANDONED]
    books.do_all()
    assert (len(books.sockets), len(books.ledger.slots), answers(waiter)) == (0, 1, [True])


def test_what_a_living_session_has_locked_survives_its_engine(books: Simulator) -> None:
    """The session keeps it, as if it had been added by hand; it counts all the time."""
    engine = books.engine()
    slot = idle(books, engine)[0].slot
    session = locked(books, slot)
    del engine
    books.settle()
    assert books.reasons == []
    assert (slot.state, list(books.ledger.slots)) == (LOCKED, [slot])
    assert books.unlock(slot)
    books.do_all()
    assert list(books.ledger.by_hand.idle) == [slot]
    del session


def test_a_locked_connection_that_outlives_its_engine_frees_a_place_below_the_ceiling(
    books: Simulator,
) -> None:
    """It counts against the pool alone from then on: who waits at the engine's ceiling is served."""
    quota = Quota(1)
    old, new, _ = books.engine(quota=quota), books.engine(quota=quota), books.engine(5)
    session = locked(books, idle(books, old)[0].slot)
    (waiter,) = waiting(books, new)
    del old
    books.settle()
    assert answers(waiter) == [True]
    del session


def test_what_a_dead_session_had_locked_dies_with_its_engine(books: Simulator) -> None:
    """Nobody can reset it, so it is closed."""
    engine = books.engine()
    locked(books, idle(books, engine)[0].slot)
    books.settle()
    del engine
    books.settle()
    assert books.reasons == [reasons.ABANDONED]


def test_the_death_of_what_was_closed_or_failed_to_open_is_no_news(books: Simulator) -> None:
    """The record dies after its slot has left the books, and that is all."""
    engine = books.engine()
    idle(books, engine)
    books.decide(books.ledger.dispose, engine)
    (item,) = books.todo
    books.do(item)
    del item
    books.settle()
    books.fail(books.take(engine))
    books.settle()
    assert books.todo == []
    assert not books.ledger.slots


# -- giving back what one has not ------------------------------------------------------------------


def given(books: Simulator, engine: Attachment) -> Record:
    """It was given back before."""
    return idle(books, engine)[0]


def closing(books: Simulator, engine: Attachment) -> Record:
    """It is being closed."""
    (record,) = idle(books, engine)
    books.decide(books.ledger.dispose, engine)
    return record


def closed(books: Simulator, engine: Attachment) -> Record:
    """It was closed."""
    record = closing(books, engine)
    books.do_all()
    return record


def evicted(books: Simulator, engine: Attachment) -> Record:
    """It gave way."""
    (record,) = idle(books, engine)
    limited(books, 1)
    record.engine = books.engine()  # type: ignore[attr-defined]
    record.permit = books.take(record.engine)  # type: ignore[attr-defined]
    return record


def detached(books: Simulator, engine: Attachment) -> Record:
    """It was detached."""
    (record,) = held(books, engine, 1)
    books.detach(record)
    return record


def opening(books: Simulator, engine: Attachment) -> Permit:
    """It is not open yet."""
    permit: Permit = books.take(engine)
    return permit


def locked_by_a_session(books: Simulator, engine: Attachment) -> Record:
    """A session has it."""
    (record,) = idle(books, engine)
    record.session = locked(books, record.slot)  # type: ignore[attr-defined]
    return record


def resetting(books: Simulator, engine: Attachment) -> Record:
    """A session had it, and it is being reset."""
    record = locked_by_a_session(books, engine)
    books.unlock(record.slot)
    return record


def strangers(books: Simulator, engine: Attachment) -> Record:
    """Another engine has it."""
    other = books.engine()
    (record,) = held(books, other, 1)
    record.engine = other  # type: ignore[attr-defined]
    return record


@pytest.mark.parametrize(
    "state", [given, closing, closed, evicted, detached, opening, locked_by_a_session, resetting, strangers]
)
def test_nobody_gives_back_what_nobody_has_or_somebody_else(
    books: Simulator, state: Callable[[Simulator, Attachment], Any]
) -> None:
    """It raises, and changes nothing."""
    engine = books.engine()
    entry = state(books, engine)
    before = entry.slot.state, books.ledger.numbers()
    with pytest.raises(NotHeld):
        books.ledger.give(engine, entry, books.now)
    assert (entry.slot.state, books.ledger.numbers()) == before
    books.settle()


def test_a_detached_connection_frees_its_slot_at_once(books: Simulator) -> None:
    """Its holder owns it; who waits may open another."""
    engine = books.engine(1)
    (record,) = held(books, engine, 1)
    (waiter,) = waiting(books, engine)
    books.detach(record)
    assert isinstance(waiter.answer, Permit)


# -- the queries API -------------------------------------------------------------------------------


def test_what_was_added_by_hand_counts_and_is_no_engines(books: Simulator) -> None:
    """It needs a free slot, evicts nobody, and an engine that needs the slot opens its own."""
    engine = books.engine()
    limited(books, 2)
    idle(books, engine)
    slot = books.add()
    assert slot is not None
    assert books.add() is None
    assert len(engine.idle) == 1
    books.now += 1
    taken = held(books, engine, 2)
    assert slot not in taken
    assert slot not in books.ledger.slots


def test_only_what_is_idle_and_open_can_be_locked(books: Simulator) -> None:
    """Not what is out, locked, being opened, hollow or being closed."""
    engine = books.engine()
    (out,), permit = held(books, engine, 1), books.take(engine)
    record, void = idle(books, engine, 1, hollows=1)
    session = locked(books, record.slot)
    assert not any(books.lock(e.slot, session) for e in (out, permit, void, record))
    books.decide(books.ledger.dispose, engine)
    assert not books.lock(void.slot, session)
    books.decide(books.ledger.close_one, record.slot, True)
    assert not books.lock(record.slot, session)


def test_a_lock_is_nobodys_until_the_reset_is_done(books: Simulator) -> None:
    """Unlocking frees nothing; the reset that succeeds does, and who waits gets it clean."""
    engine = books.engine(1)
    (record,) = idle(books, engine)
    session = locked(books, record.slot)
    (waiter,) = waiting(books, engine)
    assert books.unlock(record.slot)
    assert not books.unlock(record.slot)
    assert answers(waiter) == [False]
    books.do(books.todo[0])
    assert waiter.answer is record
    del session


def test_a_lock_taken_off_leaves_the_connection_idle_from_then_on(books: Simulator) -> None:
    """Its age begins when it comes home, whosever it is."""
    engine, slot = books.engine(ttl=10), books.add()
    assert slot is not None
    (record,) = idle(books, engine)
    sessions = [locked(books, slot), locked(books, record.slot)]
    books.now = 100.0
    books.sweep()
    for item in (slot, record.slot):
        assert books.unlock(item)
    books.do_all()
    assert [(s.state, s.since, s.session) for s in (slot, record.slot)] == [(IDLE, 100.0, None)] * 2
    assert books.told == 110.0
    del sessions


def test_a_connection_that_can_not_be_reset_is_closed(books: Simulator) -> None:
    """The slot passes on when it is closed."""
    engine = books.engine(1)
    (record,) = idle(books, engine)
    session = locked(books, record.slot)
    (waiter,) = waiting(books, engine)
    books.unlock(record.slot)
    books.do(books.todo[0], succeeds=False)
    assert books.reasons == [reasons.REMOVED]
    books.do_all()
    assert answers(waiter) == [True]
    del session


def test_who_waits_gets_what_a_session_left_when_it_died(books: Simulator) -> None:
    """At once, by transfer: it is closed, not handed over as it was left."""
    engine = books.engine(1)
    (record,) = idle(books, engine)
    session = locked(books, record.slot)
    (waiter,) = waiting(books, engine)
    del session
    books.settle()
    assert isinstance(waiter.answer, Permit)
    assert waiter.answer.evicts is record


def test_what_a_dead_session_left_is_reset_by_the_next_sweep(books: Simulator) -> None:
    """Which comes soon.  What living sessions have locked stays locked."""
    engine = books.engine()
    first, second = idle(books, engine, 2)
    dying, living = locked(books, first.slot), locked(books, second.slot)
    assert books.told > books.now
    del dying
    books.settle()
    assert books.told == books.now + reasons.GRACE
    assert first.slot.stale
    books.sweep()
    assert books.todo == [Reset(first.slot)]
    books.do_all()
    assert list(engine.idle) == [first]
    assert second.slot.session is not None
    assert second.slot.session() is living


def test_the_death_of_a_session_that_has_no_lock_any_more_is_no_news(books: Simulator) -> None:
    """The letter may come late: the next session's lock is not taken for stale."""
    engine = books.engine()
    (record,) = idle(books, engine)
    old = locked(books, record.slot)
    late = record.slot.session
    assert books.unlock(record.slot)
    books.do_all()
    new = locked(books, record.slot)
    del old
    told = books.told
    books.decide(books.ledger.session_died, record.slot, late, books.now)
    assert books.told == told
    assert record.slot.session is not None
    assert record.slot.session() is new


def test_only_what_dead_sessions_left_is_unlocked(books: Simulator) -> None:
    """Living ones keep their locks; what gave way, or is closing, has none."""
    engine, other = books.engine(), books.engine()
    first, second, third = idle(books, engine, 3)
    living = locked(books, first.slot)
    locked(books, second.slot)
    locked(books, third.slot)
    books.settle()
    limited(books, 3)
    permit = books.take(other)
    assert permit.evicts is second
    assert not books.unlock(second.slot)
    books.unlock_stale(engine)
    assert books.todo[0] == Reset(third.slot)
    assert first.slot.session is not None
    assert first.slot.session() is living
    assert not books.unlock(first.slot, True)
    assert books.unlock(first.slot)


def test_one_connection_is_closed_unless_somebody_has_it(books: Simulator) -> None:
    """Idle, hollow and stale ones close; with force those of living sessions, too; never what is out."""
    engine, slot = books.engine(), books.add()
    (out,), permit = held(books, engine, 1), books.take(engine)
    record, other, stale, void = idle(books, engine, 3, hollows=1)
    session = locked(books, other.slot)
    locked(books, stale.slot)
    books.settle()
    for entry in (out, permit, other):
        assert books.decide(books.ledger.close_one, entry.slot) == []
    for entry in (out, permit):
        assert books.decide(books.ledger.close_one, entry.slot, True) == []
    for entry in (record, slot, void, stale):
        assert entry is not None
        (item,) = books.decide(books.ledger.close_one, entry.slot)
        assert (item.entry, item.reason) == (entry, reasons.REMOVED)
    (item,) = books.decide(books.ledger.close_one, other.slot, True)
    assert item.entry is other
    assert not books.unlock(other.slot)
    assert books.decide(books.ledger.close_one, other.slot, True) == []  # it is closing
    books.do_all()
    del session
    assert books.ledger.slots == {out.slot, permit.slot}


@pytest.mark.parametrize("busy", [None, "held", "opening", "locked"])
def test_all_connections_are_closed_or_none(books: Simulator, busy: str | None) -> None:
    """One that somebody has is returned, and nothing was done; idle, hollow and stale ones are not busy."""
    engine, other, _ = books.engine(), books.engine(), books.add()
    first, second, _ = idle(books, engine, 2, hollows=1)
    locked(books, first.slot)
    books.settle()
    session, busy_one = Session(), None
    if busy == "locked":
        assert books.lock(second.slot, session)
        busy_one = second
    elif busy is not None:
        busy_one = books.connected(other) if busy == "held" else books.take(other)
    before = books.ledger.numbers()
    result = books.decide(books.ledger.close_all)
    if busy_one is None:
        assert books.reasons == [reasons.REMOVED] * 4
        books.do_all()
        assert not books.ledger.slots
    else:
        assert result is busy_one.slot
        assert books.ledger.numbers() == before
        assert books.todo == []


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ttl", "after"), [(0.2, 1.0), (30.0, 30.0), (math.inf, 60.0)])
def test_a_pool_that_nobody_uses_leaves_after_its_ttl(books: Simulator, ttl: float, after: float) -> None:
    """A second at least, a minute where nothing expires; engines and slots keep it.  The housekeeper
    is told."""
    ledger = books.ledger
    engine = books.engine(ttl=ttl)
    books.sweep()
    assert ledger.vacant_since is None
    books.now = 100.0
    out = held(books, engine, 1)
    del engine
    books.settle()
    assert ledger.vacant_since is None
    out.clear()
    books.settle()
    books.do_all()
    assert ledger.vacant_since == 100.0
    assert books.told == 100.0 + after
    assert not ledger.vacant(100.0 + after - 0.1)
    assert ledger.vacant(100.0 + after)
    books.add()
    assert not ledger.vacant(1000.0)


def test_the_numbers_count_every_state(books: Simulator) -> None:
    """Each slot is in one of them, and the total is their sum."""
    engine, full = books.engine(8), books.engine(1)
    first, second, *_ = idle(books, engine, 4, hollows=1)
    books.decide(books.ledger.close_one, first.slot)
    session = locked(books, second.slot)
    out, permit = held(books, full, 1), books.take(books.engine())
    waiting(books, full, full, full)
    numbers = books.ledger.numbers()
    assert numbers._asdict() == {
        "total": 7,
        "held": 2,
        "idle": 2,
        "opening": 1,
        "closing": 1,
        "hollow": 1,
        "waiting": 3,
    }
    assert numbers.open == 5
    del session, out, permit


def test_only_the_locks_of_the_dead_are_taken_off_unasked(books: Simulator) -> None:
    """By a clean-up, and by a reset that comes late: what a living session has locked is its own."""
    slot = books.add()
    assert slot is not None
    session = locked(books, slot)
    books.unlock_stale(books.ledger.by_hand)
    assert books.todo == []
    assert not books.unlock(slot, True)
    assert slot.session is not None
    assert slot.session() is session
