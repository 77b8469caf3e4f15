"""The rules of the ledger, one by one.  ``Simulator`` checks all invariants after every operation."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import inside
import pytest
from ledger_fakes import CheckedWaiter, Record, Session, Simulator

from sqla_queries_pool.budget import ages, closing, engines, locks
from sqla_queries_pool.budget import ledger as reasons
from sqla_queries_pool.budget.slots import (
    CLOSING,
    HELD,
    IDLE,
    LOCKED,
    OPENING,
    Attachment,
    NotHeld,
    Permit,
    Quota,
    Slot,
)
from sqla_queries_pool.budget.work import Close, Renew, Reset


@pytest.fixture
def simulator() -> Simulator:
    """An empty pool, at time 0."""
    return Simulator()


def limited(simulator: Simulator, limit: float | None) -> None:
    """Set the limit."""
    simulator.decide(engines.set_limit, simulator.ledger, limit, simulator.now)


def held(simulator: Simulator, engine: Attachment, number: int) -> list[Record]:
    """So many connections, out."""
    return [simulator.connected(engine) for _ in range(number)]


def idle(simulator: Simulator, engine: Attachment, number: int = 1, hollows: int = 0) -> list[Record]:
    """So many connections, returned one second after the other, in this order; so many more records at the
    end of the list have lost theirs before."""
    records = held(simulator, engine, number + hollows)
    for record in records[number:]:
        simulator.unplug(record.slot)
    for record in records:
        simulator.now += 1
        simulator.give(engine, record)
    return records


def locked(simulator: Simulator, slot: Slot) -> Session:
    """The session that has locked the slot."""
    session = Session()
    assert simulator.lock(slot, session)
    return session


def waiting(simulator: Simulator, *engines: Attachment) -> list[CheckedWaiter]:
    """One waiter for each of the engines, come one millisecond after the other."""
    waiters = []
    for engine in engines:
        simulator.now += 0.001
        waiters.append(simulator.wait(engine))
    assert all(isinstance(waiter, CheckedWaiter) for waiter in waiters)
    return waiters


def answers(*waiters: CheckedWaiter) -> list[bool]:
    """Which of the waiters have their answer."""
    return [waiter.answer is not None for waiter in waiters]


# -- which connection is used ----------------------------------------------------------------------


@pytest.mark.parametrize("lifo", [True, False])
def test_the_last_that_was_returned_is_used_first_or_the_first_if_wished(
    simulator: Simulator, lifo: bool
) -> None:
    """lifo: the connection that is idle for the shortest time is taken; else the one idle for longest."""
    engine = simulator.engine(lifo=lifo)
    records = idle(simulator, engine, 3)
    assert held(simulator, engine, 3) == (records[::-1] if lifo else records)


def test_an_idle_connection_goes_before_a_hollow_record_and_that_before_a_new_one(
    simulator: Simulator,
) -> None:
    """Nothing is opened while a connection is idle, and no slot is made while there is a hollow record."""
    engine = simulator.engine()
    connection, record = idle(simulator, engine, 1, hollows=1)
    assert simulator.take(engine) is connection
    assert simulator.take(engine) is record
    assert isinstance(simulator.take(engine), Permit)


def test_a_caller_that_takes_a_connection_is_written_down(simulator: Simulator) -> None:
    """Holder, time and number of uses are those of the last take, whether direct or by hand-over."""
    engine = simulator.engine(1)
    (record,) = idle(simulator, engine)
    simulator.now = 7.0
    assert simulator.ledger.take(engine, 41, simulator.now) is record
    assert (record.slot.holder, record.slot.since, record.slot.uses) == (41, 7.0, 2)
    (waiter,) = waiting(simulator, engine)
    waiter.holder = 42
    simulator.now = 8.0
    simulator.give(engine, record)
    assert (record.slot.holder, record.slot.since, record.slot.uses) == (42, 8.0, 3)
    simulator.now = 9.0
    simulator.give(engine, record)
    assert (record.slot.holder, record.slot.since, record.slot.uses) == (None, 9.0, 3)


# -- waiting for one's own engine ------------------------------------------------------------------


def test_within_one_engine_the_first_that_came_is_served_first(simulator: Simulator) -> None:
    """Connections that are returned go to the waiters in order, the same records, one each."""
    engine = simulator.engine(2)
    records = held(simulator, engine, 2)
    waiters = waiting(simulator, engine, engine, engine)
    simulator.give(engine, records[1])
    assert answers(*waiters) == [True, False, False]
    simulator.give(engine, records[0])
    assert [waiter.answer for waiter in waiters] == [records[1], records[0], None]


def test_a_newcomer_does_not_overtake_one_that_was_handed_a_connection(simulator: Simulator) -> None:
    """A connection that is handed over is never idle: a checkout at that moment gets nothing."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    (waiter,) = waiting(simulator, engine)
    simulator.give(engine, record)
    assert simulator.take(engine) is None
    assert waiter.answer is record


def test_a_caller_that_timed_out_is_not_served(simulator: Simulator) -> None:
    """One that leaves the queue takes nothing along and keeps no other's place."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    first, second = waiting(simulator, engine, engine)
    assert simulator.leave(first) is None
    simulator.give(engine, record)
    assert answers(first, second) == [False, True]


def test_a_caller_that_was_answered_while_timing_out_gets_the_answer(simulator: Simulator) -> None:
    """Leaving returns what was given in the same moment, so that it can be passed on."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    first, second = waiting(simulator, engine, engine)
    simulator.give(engine, record)
    assert simulator.leave(first) is record
    simulator.give(engine, record)
    assert second.answer is record


def test_a_hollow_record_is_handed_over_too(simulator: Simulator) -> None:
    """A record whose connection was invalidated is a slot: a waiter may have it, and opens."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    (waiter,) = waiting(simulator, engine)
    simulator.unplug(record.slot)
    simulator.give(engine, record)
    assert waiter.answer is record


def test_a_slot_that_came_free_meanwhile_needs_no_waiting(simulator: Simulator) -> None:
    """Between the first try and the joining of the queue the lock is free: joining tries again."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    assert simulator.take(engine) is None
    simulator.give(engine, record)
    assert simulator.wait(engine) is record


def test_the_mean_wait_follows_what_the_served_waited(simulator: Simulator) -> None:
    """One sixteenth of each new wait; checkouts that do not wait do not count."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    for _ in range(2):
        (waiter,) = waiting(simulator, engine)
        simulator.now = waiter.since + 1.6
        simulator.give(engine, record)
    assert simulator.ledger.mean_wait == pytest.approx(0.1 + 1.5 / 16)


# -- waiting beside other engines ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean_wait", "waited", "goes_over"),
    [(0.0, 0.09, False), (0.0, 0.11, True), (0.02, 0.11, True), (0.5, 1.9, False), (0.5, 2.1, True)],
)
def test_another_engines_waiter_goes_first_when_it_waited_for_too_long(
    simulator: Simulator, mean_wait: float, waited: float, goes_over: bool
) -> None:
    """An engine's own queue has what is returned, unless the oldest of all has waited for more than
    100 ms and more than four times the mean wait."""
    own, other = simulator.engine(1), simulator.engine(1)
    limited(simulator, 1)
    (record,) = held(simulator, own, 1)
    (older,) = waiting(simulator, other)
    simulator.now = older.since + waited
    (younger,) = waiting(simulator, own)
    simulator.now = older.since + waited
    simulator.ledger.mean_wait = mean_wait
    simulator.give(own, record)
    assert answers(older, younger) == [goes_over, not goes_over]
    assert (younger.answer or older.answer.evicts) is record


def test_the_oldest_waiter_of_all_never_loses_its_turn_to_another_engine(simulator: Simulator) -> None:
    """Patience is about older waiters of others: one's own oldest is served, however long all wait."""
    own, other = simulator.engine(1), simulator.engine(1)
    limited(simulator, 1)
    (record,) = held(simulator, own, 1)
    older, younger = waiting(simulator, own, other)
    simulator.now += 100
    simulator.give(own, record)
    assert answers(older, younger) == [True, False]


def test_where_the_own_queue_is_empty_the_oldest_of_those_without_a_slot_gets_it(
    simulator: Simulator,
) -> None:
    """What is returned and no waiter of its engine waits for goes at once to the oldest of the others, if
    that one's engine has nothing at all."""
    own, second, third = simulator.engine(), simulator.engine(), simulator.engine()
    limited(simulator, 1)
    (record,) = held(simulator, own, 1)
    older, younger = waiting(simulator, third, second)
    simulator.give(own, record)
    assert answers(older, younger) == [True, False]
    assert isinstance(older.answer, Permit)
    assert older.answer.evicts is record


def served_after(simulator: Simulator, waiter: CheckedWaiter) -> float:
    """Let time pass until the waiter has its answer; how many seconds it took."""
    begin = simulator.now
    while waiter.answer is None:
        assert simulator.now < begin + 10
        simulator.now += 0.01
        simulator.insist(waiter)
    return simulator.now - begin


def test_a_connection_that_is_about_to_be_used_again_is_not_closed_for_others_at_once(
    simulator: Simulator,
) -> None:
    """An engine that has slots of its own gets another one's idle connection when that was idle for
    50 ms, or when its waiter has waited for 100 ms and the connection was returned later than that."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 3)
    held(simulator, other, 1)
    spare, busy = held(simulator, own, 2)
    (waiter,) = waiting(simulator, other)
    simulator.give(own, spare)
    assert waiter.answer is None
    assert served_after(simulator, waiter) == pytest.approx(0.05, abs=0.011)
    assert waiter.answer.evicts is spare  # type: ignore[attr-defined]
    simulator.use_permit(other, waiter.answer)  # type: ignore[arg-type]

    (waiter,) = waiting(simulator, other)
    for _ in range(9):  # it is out and in all the time
        simulator.now += 0.01
        simulator.give(own, busy)
        assert simulator.take(own) is busy
    assert waiter.answer is None
    simulator.now += 0.011
    simulator.give(own, busy)
    assert waiter.answer.evicts is busy  # type: ignore[attr-defined]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_hollow_record_goes_to_the_oldest_of_all_at_once(simulator: Simulator, wanted: bool) -> None:
    """Whoever gets it has to open a connection: nothing is lost by moving the slot."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 2)
    keeps, (record,) = held(simulator, other, 1), held(simulator, own, 1)
    waiters = waiting(simulator, other, own) if wanted else waiting(simulator, other)
    simulator.unplug(record.slot)
    simulator.give(own, record)
    assert waiters[0].answer.evicts is record
    del keeps


def test_a_caller_that_can_not_wait_may_have_any_idle_connection(simulator: Simulator) -> None:
    """The last word of a waiter that is about to give up."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 2)
    held(simulator, other, 1)
    (record,) = idle(simulator, own)
    (waiter,) = waiting(simulator, other)
    assert waiter.answer is None
    simulator.insist(waiter, last=True)
    assert waiter.answer.evicts is record  # type: ignore[attr-defined]


def test_nobody_overtakes_by_insisting(simulator: Simulator) -> None:
    """What a waiter gets by insisting goes to the first of its queue."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 2)
    held(simulator, other, 1)
    idle(simulator, own)
    older, younger = waiting(simulator, other, other)
    simulator.insist(younger, last=True)
    assert answers(older, younger) == [True, False]


def test_a_newcomer_does_not_overtake_by_coming_when_something_is_spare_by_now(simulator: Simulator) -> None:
    """What time alone has made available is for a waiter that waits already, also before that asks again."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 2)
    held(simulator, other, 1)
    out = held(simulator, own, 1)
    (waiter,) = waiting(simulator, other)
    simulator.give(own, out[0])
    simulator.now += 0.06
    assert simulator.take(other) is None
    assert isinstance(simulator.wait(other), CheckedWaiter)
    simulator.insist(waiter)
    assert waiter.answer.evicts is out[0]


def test_an_engine_that_has_nothing_gets_what_an_older_waiter_may_not_have_yet(simulator: Simulator) -> None:
    """A waiter that has to wait until a connection is spare keeps it from no other that has not."""
    own, modest, poor = simulator.engine(), simulator.engine(), simulator.engine()
    limited(simulator, 2)
    held(simulator, modest, 1)
    (record,) = held(simulator, own, 1)
    older, younger = waiting(simulator, modest, poor)
    simulator.give(own, record)
    assert answers(older, younger) == [False, True]
    assert younger.answer.evicts is record


def test_slots_spread_over_the_engines_in_proportion_to_what_they_want(simulator: Simulator) -> None:
    """However they were shared at first: 30 threads of three engines on 9 slots end with 3 each, with few
    transfers, and then no more."""
    engines = [simulator.engine() for _ in range(3)]
    limited(simulator, 9)
    out = [(engines[0], record) for record in held(simulator, engines[0], 9)]
    # After a check-in its thread is back at the end of its queue, so that demand stays what it is.
    queues = {
        engine: [*waiting(simulator, *[engine] * n)] for engine, n in zip(engines, (1, 10, 10), strict=True)
    }
    transfers = []
    for turn in range(200):
        simulator.now += 0.001
        engine, record = out.pop(0)
        simulator.give(engine, record)
        queues[engine] += waiting(simulator, engine)
        for other, queue in queues.items():
            while queue and queue[0].answer is not None:
                entry = queue.pop(0).answer
                if isinstance(entry, Permit):
                    transfers.append(turn)
                    entry = simulator.use_permit(other, entry)
                out.append((other, entry))
        simulator.do_all()
    assert [len(engine.quota.slots) for engine in engines] == [3, 3, 3]
    assert len(transfers) < 10
    assert max(transfers) < 100


def test_an_engine_keeps_slots_in_proportion_to_its_queue(simulator: Simulator) -> None:
    """One that has more of them than another gives none away when it wants that many more, too."""
    busy, calm = simulator.engine(), simulator.engine()
    limited(simulator, 5)
    out, keeps = held(simulator, busy, 4), held(simulator, calm, 1)
    own, *_ = waiting(simulator, *[busy] * 12)
    (other,) = waiting(simulator, calm)
    simulator.give(busy, out.pop())  # 4 of 16 against 1 of 2
    assert answers(own, other) == [True, False]
    del keeps


def test_an_engine_at_its_own_ceiling_is_passed_over(simulator: Simulator) -> None:
    """A waiter whose engine has all that it may have keeps nobody else from the slot."""
    full, own, other = simulator.engine(1), simulator.engine(), simulator.engine()
    limited(simulator, 2)
    (keeps,) = held(simulator, full, 1)
    (record,) = held(simulator, own, 1)
    older, younger = waiting(simulator, full, other)
    simulator.now += 1  # both may have any idle connection by now
    simulator.give(own, record)
    assert answers(older, younger) == [False, True]
    simulator.give(full, keeps)
    assert older.answer is keeps


def test_an_engine_at_its_own_ceiling_waits_while_others_open(simulator: Simulator) -> None:
    """No engine exceeds its own max_size, whatever room there is, and that stops nobody else."""
    small, large = simulator.engine(1), simulator.engine(5)
    held(simulator, small, 1)
    (waiter,) = waiting(simulator, small)
    assert len(held(simulator, large, 3)) == 3
    assert answers(waiter) == [False]


def test_a_recreated_engine_has_its_predecessors_ceiling_and_slots(simulator: Simulator) -> None:
    """Engines of one quota share the ceiling; what is returned to one can go to the other's waiter."""
    quota = Quota(1)
    old, new = simulator.engine(quota=quota), simulator.engine(quota=quota)
    simulator.engine(5)
    (record,) = held(simulator, old, 1)
    (waiter,) = waiting(simulator, new)
    simulator.give(old, record)
    assert waiter.answer.evicts is record
    assert len(quota.slots) == 1


def test_a_slot_that_is_transferred_counts_once_all_the_time(simulator: Simulator) -> None:
    """From the check-in of the one to the opening of the other there is one slot and one socket."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 1)
    (record,) = held(simulator, own, 1)
    (waiter,) = waiting(simulator, other)

    def count() -> tuple[int, int, int, int]:
        ledger = simulator.ledger
        return len(ledger.slots), len(simulator.sockets), len(own.quota.slots), len(other.quota.slots)

    assert count() == (1, 1, 1, 0)
    simulator.give(own, record)
    assert count() == (1, 1, 0, 1)
    assert (simulator.ledger.numbers().opening, simulator.ledger.numbers().held) == (1, 0)
    opened = simulator.bind(other, waiter.answer)
    assert count() == (1, 0, 0, 1)
    simulator.plug(other, opened)
    simulator.opened(opened.slot)
    assert opened.slot.instead_of is None  # else a slot would keep all its predecessors
    assert count() == (1, 1, 0, 1)
    assert (simulator.ledger.numbers().opening, simulator.ledger.numbers().held) == (0, 1)


# -- who gives way ---------------------------------------------------------------------------------


def test_what_can_best_be_spared_gives_way_first(simulator: Simulator) -> None:
    """Hollow records, the engines' least recently used, what was added by hand, stale locks: in this
    order, whatever their age.  What a living session has locked never does."""
    stale, kept, by_hand = simulator.add(), simulator.add(), simulator.add()
    assert stale is not None
    assert kept is not None
    first, second, hungry = simulator.engine(), simulator.engine(lifo=False), simulator.engine()
    limited(simulator, 8)
    session = locked(simulator, kept)
    locked(simulator, stale)
    simulator.settle()
    (a1, a2), (b1, b2, void) = held(simulator, first, 2), held(simulator, second, 3)
    simulator.unplug(void.slot)
    for engine, record in ((second, b1), (first, a1), (second, b2), (first, a2), (second, void)):
        simulator.now += 1
        simulator.give(engine, record)
    evicted = [
        simulator.use_permit(hungry, permit) and entry for permit, entry in evictions(simulator, hungry)
    ]
    assert evicted == [void, b1, a1, b2, a2, by_hand, stale]
    assert kept.session is not None
    assert kept.session() is session


def evictions(simulator: Simulator, engine: Attachment) -> Any:
    """Check out until nobody gives way: the permits and what each of them evicts."""
    while (permit := simulator.take(engine)) is not None:
        yield permit, permit.evicts


def test_an_engine_at_its_ceiling_evicts_its_own_alone(simulator: Simulator) -> None:
    """Where an engine's own ceiling is what stops it, others' idle connections are no help."""
    quota = Quota(1)
    old, new, other = simulator.engine(quota=quota), simulator.engine(quota=quota), simulator.engine(5)
    simulator.add()
    idle(simulator, other)
    (record,) = idle(simulator, old)
    permit = simulator.take(new)
    assert permit.evicts is record
    assert simulator.take(new) is None


def test_what_is_spare_is_used_although_those_that_wait_are_served_before_they_look(
    simulator: Simulator,
) -> None:
    """Three connections go round among many waiters of one engine; the fourth slot is another's, and idle."""
    limit = 4
    other, engine = simulator.engine(limit), simulator.engine(limit)
    idle(simulator, other)
    records = held(simulator, engine, limit - 1)
    waiters = waiting(simulator, *[engine] * 30)
    for n in range(20):
        simulator.now += 0.01
        simulator.give(engine, records[n % 3])
    assert [w for w in waiters if isinstance(w.answer, Permit)], "nobody opens in place of what is idle"
    assert not other.idle


def test_nothing_gives_way_while_there_is_room(simulator: Simulator) -> None:
    """Idle connections of others are closed for nobody who can have a free slot."""
    own, other = simulator.engine(2), simulator.engine()
    limited(simulator, 2)
    idle(simulator, other)
    assert simulator.take(own).evicts is None
    simulator.now += 1
    assert simulator.take(own).evicts is not None


# -- opening ---------------------------------------------------------------------------------------


def test_a_failure_to_open_lets_the_next_waiter_try(simulator: Simulator) -> None:
    """The slot of an opening that failed goes to the oldest waiter at once, who opens for itself."""
    engine, other = simulator.engine(), simulator.engine()
    limited(simulator, 1)
    permit = simulator.take(engine)
    older, younger = waiting(simulator, other, engine)
    simulator.fail(permit)
    assert answers(older, younger) == [True, False]
    simulator.fail(older.answer)
    assert answers(older, younger) == [True, True]
    assert younger.answer.evicts is None


def test_what_is_being_opened_counts(simulator: Simulator) -> None:
    """A permission to open is a slot from the start; who opened holds it since then."""
    engine = simulator.engine()
    limited(simulator, 1)
    permit = simulator.take(engine)
    assert permit.slot.state is OPENING
    assert simulator.take(engine) is None
    simulator.now = 3.0
    record = simulator.use_permit(engine, permit)
    assert (record.slot.state, record.slot.since) == (HELD, 3.0)


# -- refusals --------------------------------------------------------------------------------------


def refused(simulator: Simulator, engine: Attachment, length: float = 1.0) -> None:
    """Somebody connects, is refused and gives up; so a pause begins."""
    permit = simulator.take(engine)
    assert simulator.refuse(length)
    simulator.fail(permit)


def test_nobody_connects_during_a_pause(simulator: Simulator) -> None:
    """Neither a newcomer nor a waiter that insists, whatever room there is; afterwards the waiter does."""
    engine, other = simulator.engine(), simulator.engine()
    refused(simulator, engine)
    assert simulator.take(other) is None
    (waiter,) = waiting(simulator, engine)
    simulator.now = 0.99
    simulator.insist(waiter, last=True)
    assert answers(waiter) == [False]
    simulator.now = 1.0
    simulator.insist(waiter)
    assert isinstance(waiter.answer, Permit)


def test_after_a_pause_one_connects_and_the_next_after_another_pause(simulator: Simulator) -> None:
    """Also where the first one has not come back by then: a connect that hangs holds up nobody for good."""
    engine, other = simulator.engine(), simulator.engine()
    refused(simulator, engine)
    first, second, third = waiting(simulator, engine, engine, other)
    simulator.now = 1.0
    simulator.all_insist()
    assert answers(first, second, third) == [True, False, False]
    assert simulator.take(simulator.engine()) is None
    simulator.now = 2.0
    simulator.insist(second)
    simulator.insist(third)
    assert answers(second, third) == [True, False]
    simulator.now = 3.0
    simulator.insist(third)
    assert answers(third) == [True]


def test_pauses_follow_one_another_until_somebody_is_let_in(simulator: Simulator) -> None:
    """How long a pause is depends on how many there were before; after a success it begins with one."""
    engine = simulator.engine()
    asked: list[int] = []

    def pauses(refusals: int) -> float:
        asked.append(refusals)
        return 10.0 * refusals

    def is_refused() -> float:
        permit = simulator.ledger.take(engine, 0, simulator.now)
        assert isinstance(permit, Permit)
        simulator.ledger.backoff.refused(pauses, simulator.now)
        simulator.ledger.failed(permit.slot, simulator.now)
        simulator.now = simulator.ledger.backoff.retry_at
        return simulator.now

    assert [is_refused(), is_refused(), is_refused()] == [10.0, 30.0, 60.0]
    permit = simulator.ledger.take(engine, 0, simulator.now)
    record = simulator.bind(engine, permit)
    simulator.plug(engine, record)
    simulator.ledger.opened(record.slot, simulator.now)
    assert is_refused() == 70.0
    assert asked == [1, 2, 3, 1]


def test_those_that_were_connecting_already_begin_no_pause_of_their_own(simulator: Simulator) -> None:
    """Ten that are refused together are one refusal: the pause does not grow with the number of threads."""
    engine = simulator.engine()
    permits = [simulator.take(engine) for _ in range(10)]
    began = []
    for permit in permits:
        simulator.now += 0.01
        began.append(simulator.refuse())
        simulator.fail(permit)
    assert began == [True] + [False] * 9
    assert (simulator.refusals, simulator.pause_ends) == (1, 1.01)


def test_a_caller_that_was_connecting_when_the_pause_began_may_end_it(simulator: Simulator) -> None:
    """The server lets one in: then it lets in others, and nobody waits for the end of the pause."""
    engine, other = simulator.engine(), simulator.engine()
    limited(simulator, 4)
    late = simulator.take(engine)
    refused(simulator, engine)
    waiters = waiting(simulator, engine, other, engine, engine)
    record = simulator.use_permit(engine, late)
    assert answers(*waiters) == [True, True, True, False]
    assert simulator.refusals == 0
    del record


def test_a_success_lets_everybody_in(simulator: Simulator) -> None:
    """As many as there are slots for, the oldest first, also those that come then."""
    engine, other = simulator.engine(), simulator.engine()
    limited(simulator, 4)
    refused(simulator, engine)
    waiters = waiting(simulator, engine, other, engine)
    simulator.now = 2.0
    simulator.insist(waiters[0])
    assert answers(*waiters) == [True, False, False]
    record = simulator.use_permit(engine, waiters[0].answer)
    assert answers(*waiters) == [True, True, True]
    assert isinstance(simulator.take(other), Permit)
    del record


def test_a_reopening_that_succeeds_lets_everybody_in_too(simulator: Simulator) -> None:
    """A record that had lost its connection proves it as well as a new one does."""
    engine, other = simulator.engine(), simulator.engine()
    (record,) = held(simulator, engine, 1)
    refused(simulator, engine)
    (waiter,) = waiting(simulator, other)
    simulator.unplug(record.slot)
    simulator.plug(engine, record)
    simulator.opened(record.slot)
    assert answers(waiter) == [True]


@pytest.mark.parametrize("how", ["given up", "lost"])
def test_an_attempt_that_comes_to_nothing_is_followed_by_another_one(simulator: Simulator, how: str) -> None:
    """Who was let try may give up before he knows, or be lost: the next one tries after the next pause."""
    engine = simulator.engine()
    refused(simulator, engine)
    first, second = waiting(simulator, engine, engine)
    simulator.now = 2.0
    simulator.insist(first)
    permit = first.answer
    if how == "given up":
        simulator.fail(permit)
    del first, permit
    simulator.do_all()
    simulator.settle()
    assert (len(simulator.ledger.slots), answers(second)) == (0, [False])
    simulator.now = 3.0
    simulator.insist(second)
    assert answers(second) == [True]


def test_what_is_returned_during_a_pause_is_used_again(simulator: Simulator) -> None:
    """A connection of our own that comes back is better than any attempt: it is handed over as ever."""
    engine = simulator.engine()
    first, second = held(simulator, engine, 2)
    refused(simulator, engine)
    older, younger = waiting(simulator, engine, engine)
    simulator.give(engine, first)
    assert (older.answer, younger.answer) == (first, None)
    simulator.give(engine, second)
    assert younger.answer is second
    simulator.give(engine, first)
    assert simulator.take(engine) is first


@pytest.mark.parametrize("younger", [True, False])
def test_during_a_pause_a_connection_stays_with_its_engine(simulator: Simulator, younger: bool) -> None:
    """It is not closed for another engine's waiter, who could not connect: its own engine's has it, or
    nobody, until the pause is over."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 1)
    (record,) = held(simulator, own, 1)
    simulator.refuse(10.0)
    (foreign,) = waiting(simulator, other)
    simulator.now += 5.0  # it may have any idle connection, if it could connect
    waiters = waiting(simulator, own) if younger else []
    simulator.give(own, record)
    assert [waiter.answer for waiter in waiters] == [record] * younger
    assert answers(foreign) == [False]
    simulator.insist(foreign)
    assert answers(foreign) == [False]
    if younger:
        simulator.give(own, record)
    simulator.now = 10.01
    simulator.insist(foreign)
    assert foreign.answer.evicts is record


def test_a_hollow_record_that_is_returned_during_a_pause_is_nobodys_until_it_is_over(
    simulator: Simulator,
) -> None:
    """To have it is to connect: neither a waiter gets it nor a newcomer, and then the first of the queue."""
    engine = simulator.engine(2)
    first, second = held(simulator, engine, 2)
    older, younger = waiting(simulator, engine, engine)
    simulator.refuse(1.0)
    simulator.unplug(first.slot)
    simulator.give(engine, first)
    assert answers(older, younger) == [False, False]
    assert list(engine.hollow) == [first]
    assert simulator.take(engine) is None
    simulator.insist(older, last=True)
    assert answers(older, younger) == [False, False]
    simulator.now = 2.0
    simulator.all_insist()
    assert answers(older, younger) == [True, False]
    assert len(simulator.ledger.slots) == 2
    simulator.unplug(second.slot)
    simulator.give(engine, second)
    assert answers(younger) == [False], "one attempt in each pause"


def test_a_hollow_record_is_taken_by_one_after_each_pause(simulator: Simulator) -> None:
    """Where nobody waits the next that comes reopens it; the second one waits for the next pause to end."""
    engine = simulator.engine(2)
    records = idle(simulator, engine, 0, hollows=2)
    simulator.refuse(1.0)
    assert simulator.take(engine) is None
    simulator.now += 1.0
    assert simulator.take(engine) in records
    assert simulator.take(engine) is None
    simulator.now += 1.0
    assert simulator.take(engine) in records


def test_a_caller_that_was_refused_has_its_place_in_the_queue_again(simulator: Simulator) -> None:
    """By when it came at first: behind those from before it, before those from later; it is no newcomer."""
    engine = simulator.engine(2)
    record, hollow = held(simulator, engine, 2)
    first, second, third = waiting(simulator, engine, engine, engine)
    simulator.unplug(hollow.slot)
    simulator.give(engine, hollow)
    assert first.answer is hollow
    simulator.refuse(1.0)
    simulator.give(engine, hollow)
    again = simulator.wait(engine, first.since)
    assert list(engine.queue) == [again, second, third]
    simulator.leave(second)
    rejoined = simulator.wait(engine, second.since)
    assert list(engine.queue) == [again, rejoined, third]
    simulator.give(engine, record)
    assert (again.answer, rejoined.answer) == (record, None)


def test_a_caller_that_was_refused_takes_what_was_returned_meanwhile(simulator: Simulator) -> None:
    """Between its refusal and its coming back somebody may have checked in: nothing has to be opened."""
    engine = simulator.engine()
    (record,) = held(simulator, engine, 1)
    permit = simulator.take(engine)
    simulator.refuse(1.0)
    simulator.fail(permit)
    simulator.give(engine, record)
    assert simulator.wait(engine, 0.0) is record


def test_where_waiting_is_of_no_use_everybody_may_try(simulator: Simulator) -> None:
    """The database is not there, or the error is for good: each is to have an error of his own."""
    engine, other = simulator.engine(), simulator.engine()
    refused(simulator, engine, 1000.0)
    waiters = waiting(simulator, engine, other, engine)
    simulator.let_in()
    assert answers(*waiters) == [True] * 3
    assert isinstance(simulator.take(other), Permit)


def test_while_the_server_refuses_what_is_idle_gives_way_also_below_the_limit(simulator: Simulator) -> None:
    """It may be full of our own: an attempt that ends one of them first has room.  Spare ones alone, and
    where there is none it is an attempt like any other."""
    own, other = simulator.engine(), simulator.engine()
    (record,) = idle(simulator, own)
    held(simulator, other, 1)
    refused(simulator, other)
    (waiter,) = waiting(simulator, other)
    simulator.now += 1.0
    simulator.insist(waiter)
    assert waiter.answer.evicts is record
    simulator.fail(waiter.answer)
    (again,) = waiting(simulator, other)
    simulator.now += 1.0
    simulator.insist(again)
    assert again.answer.evicts is None


def test_a_forked_child_knows_of_no_refusals(simulator: Simulator) -> None:
    """The first one that comes connects; and what the parent's attempt found out there is not known here."""
    engine = simulator.engine()
    refused(simulator, engine, 1000.0)
    simulator.now = 1000.0
    attempt = simulator.take(engine)
    assert isinstance(attempt, Permit)
    waiting(simulator, engine)
    simulator.fork()
    assert not engine.queue
    permits = [simulator.take(engine) for _ in range(3)]
    assert all(isinstance(permit, Permit) for permit in permits)
    assert [simulator.refuse(), simulator.refuse()] == [True, False]


# -- forks -----------------------------------------------------------------------------------------

CARRIED_OVER = {*inside.GIVEN_TO_A_LEDGER, "set_limit_to", "limit", "ttl", "attachments", "by_hand"}
"""What of a ledger a forked child has from its parent; due and the time of vacancy follow from it."""


def plain(value: Any) -> Any:
    """What can be compared."""
    names = getattr(type(value), "__slots__", None) or getattr(value, "__dict__", None)
    return {name: plain(getattr(value, name)) for name in names} if names else value


def test_a_forked_child_has_engines_and_limits_and_nothing_else(simulator: Simulator) -> None:
    """All else is as in a ledger that was just made, whatever fields there are."""
    engine, other, gone = simulator.engine(3, lifo=False), simulator.engine(), simulator.engine(9)
    simulator.decide(engines.set_limit, simulator.ledger, 6, simulator.now)
    simulator.decide(ages.set_ttl, simulator.ledger, 70.0, simulator.now)
    idle(simulator, other, 1, hollows=1)
    out = held(simulator, engine, 3)
    slot = simulator.add()
    assert slot is not None
    session = locked(simulator, slot)
    waiting(simulator, engine)
    simulator.refuse()
    parent = simulator.ledger
    inside.logged_leaks(parent)[out[0].slot] = 1, 0.0
    out[0].slot.expires = simulator.now
    parent.lifetimes.add(out[0].slot)
    parent.suspect(simulator.now)
    parent.totals.timeouts += 1
    ref, quota, dead = engine.ref, engine.quota, gone.ref
    del gone
    gc.collect()
    assert dead() is None  # the letter lies in the parent's inbox
    assert dead in parent.attachments
    assert all((other.idle, other.hollow, engine.queue, parent.by_hand.locked))
    simulator.fork()
    child = simulator.ledger
    assert child is not parent
    assert (child.limit, child.set_limit_to, child.ttl, child.by_hand.ttl) == (6, 6, 70.0, 70.0)
    assert child.attachments == {ref: quota, other.ref: other.quota}
    assert (engine.ref, engine.quota, engine.quota.stated, engine.ttl) == (ref, quota, 3, 70.0)
    new = inside.another_ledger(child)
    for name in sorted(vars(new).keys() - CARRIED_OVER):
        assert plain(getattr(child, name)) == plain(getattr(new, name)), name
    for attachment in (engine, other, child.by_hand):
        assert not attachment.quota.slots
        assert not any((attachment.idle, attachment.hollow, attachment.locked, attachment.queue))
    with pytest.raises(NotHeld):
        child.give(engine, out[0], simulator.now)
    records = idle(simulator, engine, 2)
    assert held(simulator, engine, 2) == records, (
        "it takes them from the list that it puts them in, fifo as before"
    )
    del session


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
    simulator: Simulator, stated: list[float | None], limit: float
) -> None:
    """15 where none states any, whatever the order; what was set overrules it until it is unset."""
    for order in (stated, stated[::-1]):
        simulator = Simulator()
        engines = [simulator.engine(ceiling) for ceiling in order]
        assert simulator.ledger.limit == limit
        limited(simulator, 4)
        assert simulator.ledger.limit == 4
        engines.append(simulator.engine(100))
        assert simulator.ledger.limit == 4
        del engines[-1]
        simulator.settle()
        limited(simulator, None)
        assert simulator.ledger.limit == limit


def test_a_limit_that_an_engine_stated_leaves_with_it(simulator: Simulator) -> None:
    """What exceeds the others' wishes is closed; without any engine the limit stays."""
    small, large = simulator.engine(2), simulator.engine(4)
    idle(simulator, small, 2)
    keeps = held(simulator, large, 1)
    assert simulator.ledger.limit == 4
    del large
    simulator.settle()
    assert simulator.ledger.limit == 2
    assert simulator.reasons == [reasons.LOWERED]
    del small
    simulator.settle()
    assert simulator.ledger.limit == 2
    del keeps


def test_a_grown_limit_serves_at_once_the_oldest_first(simulator: Simulator) -> None:
    """Each new slot goes to the oldest waiter of all engines that may have it."""
    first, second = simulator.engine(9), simulator.engine(1)
    limited(simulator, 1)
    held(simulator, second, 1)
    waiters = waiting(simulator, second, first, first, first)
    limited(simulator, 3)
    assert answers(*waiters) == [False, True, True, False]
    limited(simulator, math.inf)
    assert answers(*waiters) == [False, True, True, True]


def test_a_lowered_limit_closes_what_is_idle_and_the_rest_when_it_is_returned(simulator: Simulator) -> None:
    """Idle connections above it close at once, those that are out on return, although somebody waits;
    the slots only get fewer."""
    engine, other = simulator.engine(), simulator.engine()
    limited(simulator, 5)
    out = held(simulator, engine, 3)
    idle(simulator, other, 2)
    limited(simulator, 2)
    assert simulator.reasons == [reasons.LOWERED] * 2
    simulator.do_all()
    (waiter,) = waiting(simulator, other)
    simulator.give(engine, out.pop())
    assert simulator.reasons == [reasons.LOWERED]
    assert answers(waiter) == [False]
    simulator.do_all()
    assert (len(simulator.ledger.slots), answers(waiter)) == (2, [False])
    simulator.give(engine, out.pop())
    assert answers(waiter) == [True]
    assert len(simulator.ledger.slots) == 2


def test_what_is_returned_above_a_lowered_limit_is_closed_also_where_nobody_waits(
    simulator: Simulator,
) -> None:
    """As many as are too many; one that closes already is not one of them."""
    engine = simulator.engine()
    first, second, third = held(simulator, engine, 3)
    limited(simulator, 2)
    simulator.give(engine, first)
    assert simulator.reasons == [reasons.LOWERED]
    simulator.give(engine, second)
    assert list(engine.idle) == [second]
    limited(simulator, 1)
    assert simulator.reasons == [reasons.LOWERED] * 2
    simulator.give(engine, third)
    assert list(engine.idle) == [third]


def test_a_lowered_limit_leaves_alone_what_fits_it(simulator: Simulator) -> None:
    """As many as the limit allows stay; what is closing by then is not closed for a second time."""
    engine = simulator.engine()
    idle(simulator, engine, 5)
    limited(simulator, 3)
    assert simulator.reasons == [reasons.LOWERED] * 2
    limited(simulator, 2)
    assert simulator.reasons == [reasons.LOWERED] * 3
    assert len(engine.idle) == 2


def test_what_is_closing_counts_until_it_is_closed(simulator: Simulator) -> None:
    """A checkout that comes while a connection closes waits, and gets the slot when it is closed."""
    engine = simulator.engine(ttl=5)
    limited(simulator, 1)
    idle(simulator, engine)
    simulator.now += 5
    simulator.sweep()
    (waiter,) = waiting(simulator, engine)
    assert simulator.ledger.numbers().closing == 1
    simulator.do(simulator.todo[0])
    assert answers(waiter) == [True]


# -- ages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifo", [True, False])
def test_what_was_idle_for_the_ttl_is_closed_whichever_end_is_used(simulator: Simulator, lifo: bool) -> None:
    """The left end is the oldest: sweeps close from there and say when the next one is due."""
    engine = simulator.engine(ttl=10, lifo=lifo)
    first, second = idle(simulator, engine, 2)  # at 1 and 2
    assert simulator.told == 11
    simulator.now = 10.9
    simulator.sweep()
    assert simulator.reasons == []
    simulator.now = 11.0
    simulator.sweep()
    assert [(item.entry, item.reason) for item in simulator.todo if isinstance(item, Close)] == [
        (first, reasons.IDLE_TTL)
    ]
    assert simulator.told == 12
    assert simulator.take(engine) is second
    simulator.give(engine, second)  # its age begins again
    simulator.now = 20.9
    simulator.sweep()
    assert list(engine.idle) == [second]
    assert simulator.told == 21


def test_hollow_records_age_too(simulator: Simulator) -> None:
    """A slot without a connection leaves after the TTL as one with."""
    engine = simulator.engine(ttl=10)
    idle(simulator, engine, 0, hollows=1)
    assert simulator.told == 11
    simulator.now = 11.0
    simulator.sweep()
    assert simulator.reasons == [reasons.IDLE_TTL]


def test_what_is_out_does_not_age(simulator: Simulator) -> None:
    """Neither a connection that is out nor one that is being opened nor a session's ever expires."""
    engine, slot = simulator.engine(ttl=1), simulator.add()
    assert slot is not None
    session = locked(simulator, slot)
    simulator.connected(engine)
    permit = simulator.take(engine)
    simulator.now = 1000.0
    simulator.sweep()
    assert simulator.reasons == [reasons.ABANDONED]  # the one that nobody kept
    del session, permit


def test_each_engine_has_its_own_ttl_unless_one_is_set_for_all(simulator: Simulator) -> None:
    """Set, it holds for all engines, those to come and what was added by hand; unset, each has its own."""
    short, never = simulator.engine(ttl=1), simulator.engine(ttl=math.inf)
    idle(simulator, never, 2)
    idle(simulator, short, 2)
    simulator.now += 100
    simulator.sweep()
    assert (len(short.idle), len(never.idle)) == (0, 2)
    assert simulator.told == math.inf
    simulator.do_all()
    idle(simulator, short)
    simulator.decide(ages.set_ttl, simulator.ledger, 50.0, simulator.now)
    assert (len(short.idle), len(never.idle)) == (1, 0)
    late = simulator.engine(ttl=7)
    assert late.ttl == simulator.ledger.by_hand.ttl == 50
    simulator.now += 10
    simulator.sweep()
    assert len(short.idle) == 1
    simulator.decide(ages.set_ttl, simulator.ledger, None, simulator.now)
    assert (short.ttl, never.ttl, late.ttl, simulator.ledger.by_hand.ttl) == (1, math.inf, 7, 7)
    assert len(short.idle) == 0


def test_the_housekeeper_is_told_earlier_when_something_expires_earlier(simulator: Simulator) -> None:
    """Only then: a later expiry than the one that it knows of is no news."""
    slow, quick = simulator.engine(ttl=60), simulator.engine(ttl=5)
    simulator.sweep()
    one, two = simulator.connected(slow), simulator.connected(slow)
    (three,) = held(simulator, quick, 1)
    assert simulator.ledger.give(slow, one, 0.0) == [(60.0,)]
    assert not simulator.ledger.give(slow, two, 1.0)
    assert simulator.ledger.give(quick, three, 2.0) == [(7.0,)]


def test_an_engine_with_a_shorter_ttl_brings_the_housekeeper_earlier(simulator: Simulator) -> None:
    """What was added by hand follows the engine that attached last: also what is there already."""
    first = simulator.engine(ttl=60)
    simulator.add()
    assert simulator.told == 60
    second = simulator.engine(ttl=5)
    assert simulator.told == 5
    del first, second


# -- disposing -------------------------------------------------------------------------------------


def test_dispose_closes_what_is_idle_and_leaves_what_is_out(simulator: Simulator) -> None:
    """Of this engine alone; without a recreate() following, what is out is returned as usual."""
    engine, other = simulator.engine(), simulator.engine()
    idle(simulator, other)
    (out,) = held(simulator, engine, 1)
    idle(simulator, engine, 2, hollows=1)
    simulator.decide(closing.dispose, simulator.ledger, engine)
    assert simulator.reasons == [reasons.DISPOSED] * 3
    simulator.give(engine, out)
    assert list(engine.idle) == [out]
    assert len(other.idle) == 1


def test_what_was_opened_before_a_completed_dispose_closes_when_it_is_returned(simulator: Simulator) -> None:
    """Also when a checkout waits for it: it gets the slot, and opens again.  What was opened later stays."""
    engine = simulator.engine()
    limited(simulator, 2)
    old, older = held(simulator, engine, 2)
    simulator.unplug(older.slot)
    simulator.decide(closing.dispose, simulator.ledger, engine)
    simulator.plug(engine, older)  # reopened: a generation binds sockets, not records
    simulator.decide(closing.retire, simulator.ledger, engine)
    (waiter,) = waiting(simulator, engine)
    simulator.give(engine, old)
    assert simulator.reasons == [reasons.DISPOSED]
    assert answers(waiter) == [False]
    simulator.do_all()
    assert isinstance(waiter.answer, Permit)
    simulator.give(engine, older)
    assert list(engine.idle) == [older]


def test_what_was_returned_between_dispose_and_recreate_is_closed(simulator: Simulator) -> None:
    """It is of the generation that ended: it must not stay idle, to be handed out again."""
    engine = simulator.engine()
    (record,) = held(simulator, engine, 1)
    simulator.decide(closing.dispose, simulator.ledger, engine)
    simulator.give(engine, record)
    simulator.decide(closing.retire, simulator.ledger, engine)
    assert simulator.reasons == [reasons.DISPOSED]
    assert isinstance(simulator.take(engine), Permit)


def test_retiring_all_spares_only_what_was_added_by_hand(simulator: Simulator) -> None:
    """What engines have idle closes at once, what is out when it is returned."""
    engine, other, slot = simulator.engine(), simulator.engine(), simulator.add()
    (record,) = held(simulator, engine, 1)
    idle(simulator, other)
    simulator.decide(closing.retire_all, simulator.ledger)
    assert simulator.reasons == [reasons.DISPOSED]
    simulator.give(engine, record)
    assert simulator.reasons == [reasons.DISPOSED] * 2
    assert list(simulator.ledger.by_hand.idle) == [slot]


# -- what is lost ----------------------------------------------------------------------------------


def test_a_dropped_engine_gives_back_what_it_had(simulator: Simulator) -> None:
    """What it had idle is closed, hollow records need no closing, and the engine is forgotten."""
    engine, _ = simulator.engine(), simulator.engine()
    idle(simulator, engine, 2, hollows=1)
    del engine
    simulator.settle()
    assert simulator.reasons == [reasons.ABANDONED] * 2
    assert len(simulator.ledger.attachments) == 1
    assert len(simulator.ledger.slots) == 2
    simulator.do_all()
    assert not simulator.ledger.slots


def test_a_connection_whose_holder_died_is_closed_before_its_slot_passes_on(simulator: Simulator) -> None:
    """It counts until it is closed; then the oldest waiter gets the slot."""
    engine = simulator.engine(1)
    out = held(simulator, engine, 1)
    (waiter,) = waiting(simulator, engine)
    out.clear()
    simulator.settle()
    assert answers(waiter) == [False]
    (item,) = simulator.todo
    assert isinstance(item, Close)
    assert (item.slot.state, item.entry, item.reason) == (CLOSING, None, reasons.ABANDONED)
    simulator.do(item)
    assert answers(waiter) == [True]


def test_a_held_record_without_a_connection_that_died_leaves_nothing_to_close(simulator: Simulator) -> None:
    """Its slot passes on at once."""
    engine = simulator.engine(1)
    out = held(simulator, engine, 1)
    simulator.unplug(out[0].slot)
    (waiter,) = waiting(simulator, engine)
    out.clear()
    simulator.settle()
    assert answers(waiter) == [True]


def test_a_permission_to_open_that_was_lost_goes_to_the_next(simulator: Simulator) -> None:
    """An exception between being told and opening loses no slot; the one who was answered included."""
    engine = simulator.engine(1)
    permit = simulator.take(engine)
    first, second = waiting(simulator, engine, engine)
    del permit
    simulator.settle()
    assert answers(first, second) == [True, False]
    simulator.do_all()
    del first
    simulator.settle()
    assert answers(second) == [True]


def test_an_opening_that_was_lost_with_its_socket_open_is_closed(simulator: Simulator) -> None:
    """From the socket's opening to the report of it the record answers for it."""
    engine = simulator.engine(1)
    record = simulator.bind(engine, simulator.take(engine))
    simulator.plug(engine, record)
    (waiter,) = waiting(simulator, engine)
    del record
    simulator.settle()
    assert simulator.reasons == [reasons.ABANDONED]
    assert simulator.ledger.numbers().opening == 0
    simulator.do_all()
    assert answers(waiter) == [True]


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_gave_way_to_a_lost_permission_counts_until_it_is_closed(
    simulator: Simulator, by_hand: bool
) -> None:
    """The permit stood for both: who gets the slot must not open a second socket beside it."""
    own, other = simulator.engine(), simulator.engine()
    limited(simulator, 1)
    if by_hand:
        simulator.add()
    else:
        idle(simulator, other)
    permit = simulator.take(own)
    assert permit.evicts is not None
    (waiter,) = waiting(simulator, own)
    del permit
    simulator.settle()
    assert (len(simulator.sockets), len(simulator.ledger.slots), answers(waiter)) == (1, 1, [False])
    assert simulator.reasons == [reasons.ABANDONED]
    simulator.do_all()
    assert (len(simulator.sockets), len(simulator.ledger.slots), answers(waiter)) == (0, 1, [True])


def test_what_a_living_session_has_locked_survives_its_engine(simulator: Simulator) -> None:
    """The session keeps it, as if it had been added by hand; it counts all the time."""
    engine = simulator.engine()
    slot = idle(simulator, engine)[0].slot
    session = locked(simulator, slot)
    del engine
    simulator.settle()
    assert simulator.reasons == []
    assert (slot.state, list(simulator.ledger.slots)) == (LOCKED, [slot])
    assert simulator.unlock(slot)
    simulator.do_all()
    assert list(simulator.ledger.by_hand.idle) == [slot]
    del session


def test_a_locked_connection_that_outlives_its_engine_frees_a_place_below_the_ceiling(
    simulator: Simulator,
) -> None:
    """It counts against the pool alone from then on: a waiter at the engine's ceiling is served."""
    quota = Quota(1)
    old, new, _ = simulator.engine(quota=quota), simulator.engine(quota=quota), simulator.engine(5)
    session = locked(simulator, idle(simulator, old)[0].slot)
    (waiter,) = waiting(simulator, new)
    del old
    simulator.settle()
    assert answers(waiter) == [True]
    del session


def test_what_a_dead_session_had_locked_dies_with_its_engine(simulator: Simulator) -> None:
    """Nobody can reset it, so it is closed."""
    engine = simulator.engine()
    locked(simulator, idle(simulator, engine)[0].slot)
    simulator.settle()
    del engine
    simulator.settle()
    assert simulator.reasons == [reasons.ABANDONED]


def test_the_death_of_what_was_closed_or_failed_to_open_is_no_news(simulator: Simulator) -> None:
    """The record dies after its slot does not count any more, and nothing else happens."""
    engine = simulator.engine()
    idle(simulator, engine)
    simulator.decide(closing.dispose, simulator.ledger, engine)
    (item,) = simulator.todo
    simulator.do(item)
    del item
    simulator.settle()
    simulator.fail(simulator.take(engine))
    simulator.settle()
    assert simulator.todo == []
    assert not simulator.ledger.slots


# -- giving back what one has not ------------------------------------------------------------------


def given(simulator: Simulator, engine: Attachment) -> Record:
    """It was given back before."""
    return idle(simulator, engine)[0]


def being_closed(simulator: Simulator, engine: Attachment) -> Record:
    """It is being closed."""
    (record,) = idle(simulator, engine)
    simulator.decide(closing.dispose, simulator.ledger, engine)
    return record


def closed(simulator: Simulator, engine: Attachment) -> Record:
    """It was closed."""
    record = being_closed(simulator, engine)
    simulator.do_all()
    return record


def evicted(simulator: Simulator, engine: Attachment) -> Record:
    """It gave way."""
    (record,) = idle(simulator, engine)
    limited(simulator, 1)
    record.engine = simulator.engine()  # type: ignore[attr-defined]
    record.permit = simulator.take(record.engine)  # type: ignore[attr-defined]
    return record


def detached(simulator: Simulator, engine: Attachment) -> Record:
    """It was detached."""
    (record,) = held(simulator, engine, 1)
    simulator.detach(record)
    return record


def opening(simulator: Simulator, engine: Attachment) -> Permit:
    """It is not open yet."""
    permit: Permit = simulator.take(engine)
    return permit


def locked_by_a_session(simulator: Simulator, engine: Attachment) -> Record:
    """A session has it."""
    (record,) = idle(simulator, engine)
    record.session = locked(simulator, record.slot)  # type: ignore[attr-defined]
    return record


def resetting(simulator: Simulator, engine: Attachment) -> Record:
    """A session had it, and it is being reset."""
    record = locked_by_a_session(simulator, engine)
    simulator.unlock(record.slot)
    return record


def strangers(simulator: Simulator, engine: Attachment) -> Record:
    """Another engine has it."""
    other = simulator.engine()
    (record,) = held(simulator, other, 1)
    record.engine = other  # type: ignore[attr-defined]
    return record


@pytest.mark.parametrize(
    "state",
    [given, being_closed, closed, evicted, detached, opening, locked_by_a_session, resetting, strangers],
)
def test_nobody_gives_back_what_nobody_has_or_somebody_else(
    simulator: Simulator, state: Callable[[Simulator, Attachment], Any]
) -> None:
    """It raises, and changes nothing."""
    engine = simulator.engine()
    entry = state(simulator, engine)
    before = entry.slot.state, simulator.ledger.numbers()
    with pytest.raises(NotHeld):
        simulator.ledger.give(engine, entry, simulator.now)
    assert (entry.slot.state, simulator.ledger.numbers()) == before
    simulator.settle()


def test_a_detached_connection_frees_its_slot_at_once(simulator: Simulator) -> None:
    """Its holder owns it; a waiter may open another."""
    engine = simulator.engine(1)
    (record,) = held(simulator, engine, 1)
    (waiter,) = waiting(simulator, engine)
    simulator.detach(record)
    assert isinstance(waiter.answer, Permit)


# -- the queries API -------------------------------------------------------------------------------


def test_what_was_added_by_hand_counts_and_is_no_engines(simulator: Simulator) -> None:
    """It needs a free slot, evicts nobody, and an engine that needs the slot opens its own."""
    engine = simulator.engine()
    limited(simulator, 2)
    idle(simulator, engine)
    slot = simulator.add()
    assert slot is not None
    assert simulator.add() is None
    assert len(engine.idle) == 1
    simulator.now += 1
    taken = held(simulator, engine, 2)
    assert slot not in [record.slot for record in taken]
    assert slot not in simulator.ledger.slots


def test_only_what_is_idle_and_open_can_be_locked(simulator: Simulator) -> None:
    """Not what is out, locked, being opened, hollow or being closed."""
    engine = simulator.engine()
    (out,), permit = held(simulator, engine, 1), simulator.take(engine)
    record, void = idle(simulator, engine, 1, hollows=1)
    session = locked(simulator, record.slot)
    assert not any(simulator.lock(e.slot, session) for e in (out, permit, void, record))
    simulator.decide(closing.dispose, simulator.ledger, engine)
    assert not simulator.lock(void.slot, session)
    simulator.decide(closing.close_one, simulator.ledger, record.slot, True)
    assert not simulator.lock(record.slot, session)


def test_a_lock_is_nobodys_until_the_reset_is_done(simulator: Simulator) -> None:
    """Unlocking frees nothing; the reset that succeeds does, and a waiter gets it clean."""
    engine = simulator.engine(1)
    (record,) = idle(simulator, engine)
    session = locked(simulator, record.slot)
    (waiter,) = waiting(simulator, engine)
    assert simulator.unlock(record.slot)
    assert not simulator.unlock(record.slot)
    assert answers(waiter) == [False]
    simulator.do(simulator.todo[0])
    assert waiter.answer is record
    del session


def test_a_lock_taken_off_leaves_the_connection_idle_from_then_on(simulator: Simulator) -> None:
    """Its age begins when it is returned, whosever it is."""
    engine, slot = simulator.engine(ttl=10), simulator.add()
    assert slot is not None
    (record,) = idle(simulator, engine)
    sessions = [locked(simulator, slot), locked(simulator, record.slot)]
    simulator.now = 100.0
    simulator.sweep()
    for item in (slot, record.slot):
        assert simulator.unlock(item)
    simulator.do_all()
    assert [(s.state, s.since, s.session) for s in (slot, record.slot)] == [(IDLE, 100.0, None)] * 2
    assert simulator.told == 110.0
    del sessions


def test_a_connection_that_can_not_be_reset_is_closed(simulator: Simulator) -> None:
    """The slot passes on when it is closed."""
    engine = simulator.engine(1)
    (record,) = idle(simulator, engine)
    session = locked(simulator, record.slot)
    (waiter,) = waiting(simulator, engine)
    simulator.unlock(record.slot)
    simulator.do(simulator.todo[0], succeeds=False)
    assert simulator.reasons == [reasons.REMOVED]
    simulator.do_all()
    assert answers(waiter) == [True]
    del session


def test_a_caller_that_waits_gets_what_a_session_left_when_it_died(simulator: Simulator) -> None:
    """At once, by transfer: it is closed, not handed over as it was left."""
    engine = simulator.engine(1)
    (record,) = idle(simulator, engine)
    session = locked(simulator, record.slot)
    (waiter,) = waiting(simulator, engine)
    del session
    simulator.settle()
    assert isinstance(waiter.answer, Permit)
    assert waiter.answer.evicts is record


def test_what_a_dead_session_left_is_reset_by_the_next_sweep(simulator: Simulator) -> None:
    """Which comes soon.  What living sessions have locked stays locked."""
    engine = simulator.engine()
    first, second = idle(simulator, engine, 2)
    dying, living = locked(simulator, first.slot), locked(simulator, second.slot)
    assert simulator.told > simulator.now
    del dying
    simulator.settle()
    assert simulator.told == simulator.now + locks.GRACE
    assert first.slot.stale
    simulator.sweep()
    assert simulator.todo == [Reset(first.slot)]
    simulator.do_all()
    assert list(engine.idle) == [first]
    assert second.slot.session is not None
    assert second.slot.session() is living


def test_the_death_of_a_session_that_has_no_lock_any_more_is_no_news(simulator: Simulator) -> None:
    """The letter may come late: the next session's lock is not taken for stale."""
    engine = simulator.engine()
    (record,) = idle(simulator, engine)
    old = locked(simulator, record.slot)
    late = record.slot.session
    assert simulator.unlock(record.slot)
    simulator.do_all()
    new = locked(simulator, record.slot)
    del old
    told = simulator.told
    simulator.decide(locks.session_died, simulator.ledger, record.slot, late, simulator.now)
    assert simulator.told == told
    assert record.slot.session is not None
    assert record.slot.session() is new


def test_only_what_dead_sessions_left_is_unlocked(simulator: Simulator) -> None:
    """Living ones keep their locks; what gave way, or is closing, has none."""
    engine, other = simulator.engine(), simulator.engine()
    first, second, third = idle(simulator, engine, 3)
    living = locked(simulator, first.slot)
    locked(simulator, second.slot)
    locked(simulator, third.slot)
    simulator.settle()
    limited(simulator, 3)
    permit = simulator.take(other)
    assert permit.evicts is second
    assert not simulator.unlock(second.slot)
    simulator.unlock_stale(engine)
    assert simulator.todo[0] == Reset(third.slot)
    assert first.slot.session is not None
    assert first.slot.session() is living
    assert not simulator.unlock(first.slot, True)
    assert simulator.unlock(first.slot)


def test_one_connection_is_closed_unless_somebody_has_it(simulator: Simulator) -> None:
    """Idle, hollow and stale ones close; with force those of living sessions, too; never what is out."""
    engine, slot = simulator.engine(), simulator.add()
    (out,), permit = held(simulator, engine, 1), simulator.take(engine)
    record, other, stale, void = idle(simulator, engine, 3, hollows=1)
    session = locked(simulator, other.slot)
    locked(simulator, stale.slot)
    simulator.settle()
    for entry in (out, permit, other):
        assert simulator.decide(closing.close_one, simulator.ledger, entry.slot) == []
    for entry in (out, permit):
        assert simulator.decide(closing.close_one, simulator.ledger, entry.slot, True) == []
    for entry in (record, slot, void, stale):
        assert entry is not None
        (item,) = simulator.decide(closing.close_one, simulator.ledger, entry.slot)
        assert (item.entry, item.reason) == (entry, reasons.REMOVED)
    (item,) = simulator.decide(closing.close_one, simulator.ledger, other.slot, True)
    assert item.entry is other
    assert not simulator.unlock(other.slot)
    assert simulator.decide(closing.close_one, simulator.ledger, other.slot, True) == []  # it is closing
    simulator.do_all()
    del session
    assert simulator.ledger.slots == {out.slot, permit.slot}


@pytest.mark.parametrize("busy", [None, "held", "opening", "locked"])
def test_all_connections_are_closed_or_none(simulator: Simulator, busy: str | None) -> None:
    """One that somebody has is returned, and nothing was done; idle, hollow and stale ones are not busy."""
    engine, other, _ = simulator.engine(), simulator.engine(), simulator.add()
    first, second, _ = idle(simulator, engine, 2, hollows=1)
    locked(simulator, first.slot)
    simulator.settle()
    session, busy_one = Session(), None
    if busy == "locked":
        assert simulator.lock(second.slot, session)
        busy_one = second
    elif busy is not None:
        busy_one = simulator.connected(other) if busy == "held" else simulator.take(other)
    before = simulator.ledger.numbers()
    result = simulator.decide(closing.close_all, simulator.ledger)
    if busy_one is None:
        assert simulator.reasons == [reasons.REMOVED] * 4
        simulator.do_all()
        assert not simulator.ledger.slots
    else:
        assert result is busy_one.slot
        assert simulator.ledger.numbers() == before
        assert simulator.todo == []


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ttl", "after"), [(0.2, 1.0), (30.0, 30.0), (3600.0, 60.0), (math.inf, 60.0)])
def test_a_pool_that_nobody_uses_leaves_within_a_minute(
    simulator: Simulator, ttl: float, after: float
) -> None:
    """After its TTL where that is shorter, a second at least; engines and slots keep it.  The housekeeper
    is told."""
    ledger = simulator.ledger
    engine = simulator.engine(ttl=ttl)
    simulator.sweep()
    assert ledger.vacant_since is None
    simulator.now = 100.0
    out = held(simulator, engine, 1)
    del engine
    simulator.settle()
    assert ledger.vacant_since is None
    out.clear()
    simulator.settle()
    simulator.do_all()
    assert ledger.vacant_since == 100.0
    assert simulator.told == 100.0 + after
    assert not ledger.vacant(100.0 + after - 0.1)
    assert ledger.vacant(100.0 + after)
    simulator.add()
    assert not ledger.vacant(1000.0)


def test_a_pool_stays_for_a_ttl_that_was_set_for_it(simulator: Simulator) -> None:
    """Whoever made it by hand wants it for connections to come."""
    ledger = simulator.ledger
    ages.set_ttl(ledger, 3600.0, 100.0)
    assert ledger.vacant_since is not None
    assert not ledger.vacant(ledger.vacant_since + 3599.0)
    assert ledger.vacant(ledger.vacant_since + 3600.0)


def test_the_numbers_count_every_state(simulator: Simulator) -> None:
    """Each slot is in one of them, and the total is their sum."""
    engine, full = simulator.engine(8), simulator.engine(1)
    first, second, *_ = idle(simulator, engine, 4, hollows=1)
    simulator.decide(closing.close_one, simulator.ledger, first.slot)
    session = locked(simulator, second.slot)
    out, permit = held(simulator, full, 1), simulator.take(simulator.engine())
    waiting(simulator, full, full, full)
    numbers = simulator.ledger.numbers()
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


def test_only_the_locks_of_the_dead_are_taken_off_unasked(simulator: Simulator) -> None:
    """By a clean-up, and by a reset that comes late: what a living session has locked is its own."""
    slot = simulator.add()
    assert slot is not None
    session = locked(simulator, slot)
    simulator.unlock_stale(simulator.ledger.by_hand)
    assert simulator.todo == []
    assert not simulator.unlock(slot, True)
    assert slot.session is not None
    assert slot.session() is session


# -- lifetimes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True])
def test_a_renewal_that_an_interrupt_has_lost_keeps_no_other_from_beginning(
    simulator: Simulator, lost: bool
) -> None:
    """One is renewed at a time; but one whose work is gone is not, and the next sweep goes on."""
    engine = simulator.engine()
    first, second = idle(simulator, engine, 2)
    for record in (first, second):
        record.slot.expires = simulator.now + 1.0
        simulator.ledger.lifetimes.add(record.slot)
    simulator.now += 1.0
    (renewal,) = [item for item in ages.expire(simulator.ledger, simulator.now) if isinstance(item, Renew)]
    assert simulator.ledger.lifetimes.renewing == [renewal.slot]
    if lost:
        del first, second, record, renewal
        gc.collect()
        simulator.settle()
        assert simulator.ledger.lifetimes.renewing == []
    work = ages.expire(simulator.ledger, simulator.now)
    assert any(isinstance(item, Renew) for item in work) == lost
