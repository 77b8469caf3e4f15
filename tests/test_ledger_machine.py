"""All operations of the ledger in any order: hypothesis drives, ``Simulator`` checks after each of them.

``LEDGER_EXAMPLES=20000 pytest -o faulthandler_timeout=0 tests/test_ledger_machine.py`` searches for
longer, elsewhere each time, and shrinks what it finds, which takes minutes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_fakes import CheckedWaiter, Handle, Record, Session, Simulator

from sqla_queries_pool.budget import ages, closing, engines, stopping
from sqla_queries_pool.budget.ledger import LOWERED, Ledger
from sqla_queries_pool.budget.slots import (
    CLOSING,
    DRAINED,
    HELD,
    IDLE,
    LOCKED,
    SUSPENDED,
    Attachment,
    NotHeld,
    Permit,
    Rejected,
    Slot,
    Terms,
)
from sqla_queries_pool.budget.work import Close

T = TypeVar("T")
which = st.integers(0, 23)
ceilings = st.sampled_from([None, 1, 2, 3, 4, math.inf])
limits = st.sampled_from([None, 1, 2, 3, 4, 5, math.inf])
ttls = st.sampled_from([0.5, 5.0, 60.0, math.inf])
statements: st.SearchStrategy[dict[str, Terms]] = st.sampled_from(
    [
        {},
        {"a": Terms(min=1, weight=4), "b": Terms(max=1)},
        {"a": Terms(min=2, max=3), "b": Terms(min=1, weight=0.5), "other": Terms(max=2)},
    ]
)


def chosen(number: int, things: Sequence[T]) -> T:
    """One of the things."""
    return things[number % len(things)]


class Engine:
    """An engine's pool: what it knows itself.  The holder of something of it refers to it."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.disposals = 0
        self.retired: set[Handle] = set()
        """Sockets that must not be handed out: opened before a completed dispose, as the machine counts."""
        self.born: dict[Handle, int] = {}
        """How often it had been disposed when the socket was opened."""

    @property
    def stopped(self) -> str | None:
        """Is it suspended or drained?"""
        return self.attachment.quota.stopped

    def retire(self) -> None:
        """A dispose is completed: what was born before it is to close, and nothing else."""
        self.retired.update(handle for handle, disposals in self.born.items() if disposals < self.disposals)


class Opening:
    """Somebody opens a connection."""

    def __init__(self, engine: Engine, permit: Permit, since: float) -> None:
        self.engine = engine
        self.since = since
        """Since when it has waited for a connection."""
        self.slot = permit.slot
        self.permit: Permit | None = permit
        """None as soon as there is a record, which then gets a socket."""
        self.record: Record | None = None


class Lock:
    """A session's lock; the session lives for as long as this refers to it."""

    def __init__(self, slot: Slot, session: Session) -> None:
        self.slot = slot
        self.session = session


class LedgerMachine(RuleBasedStateMachine):
    """See the module's text.

    Hypothesis takes all rules for equally likely: what is rare in life shares one, what is common has
    two or three.
    """

    def __init__(self) -> None:
        super().__init__()
        self.simulator = Simulator()
        self.engines: list[Engine] = []
        self.waiting: list[tuple[Engine, CheckedWaiter]] = []
        """Blocked checkouts; some of them have been answered and have not noticed."""
        self.opening: list[Opening] = []
        self.held: list[tuple[Engine, Record]] = []
        self.locks: list[Lock] = []
        self.connects_take = 0.0
        """Seconds."""
        self.stated: dict[str, Terms] = {}
        """The classes of callers that all engines state."""

    @initialize(
        limit=limits,
        several=st.lists(st.tuples(ceilings, ttls, st.booleans()), min_size=1, max_size=3),
        connects_take=st.sampled_from([0.0, 0.02, 0.4]),
        stated=statements,
    )
    def begin(
        self,
        limit: float | None,
        several: list[tuple[float | None, float, bool]],
        connects_take: float,
        stated: dict[str, Terms],
    ) -> None:
        """A pool has engines."""
        self.connects_take, self.stated = connects_take, stated
        for ceiling, ttl, lifo in several:
            self.attach(ceiling, ttl, lifo)
        self.set_limit(limit)

    @property
    def ledger(self) -> Ledger:
        """The one there is; a fork makes another."""
        return self.simulator.ledger

    # -- checkouts ---------------------------------------------------------------------------------

    def check_out(self, n: int, phases: int) -> None:
        """Take, or wait."""
        engine = chosen(n, self.engines)
        self.simulator.caller = (None, "a", "b")[n // 8]
        entry = self.simulator.take(engine.attachment, object())
        assert isinstance(entry, Rejected) == (engine.stopped == DRAINED)
        if isinstance(entry, Rejected):
            return
        if entry is None:
            entry = self.simulator.wait(engine.attachment)
        if isinstance(entry, CheckedWaiter):
            self.waiting.append((engine, entry))
            return
        assert entry.slot.handle not in engine.retired, "of a generation that has ended"
        self.received(engine, entry, phases, self.simulator.now)

    def received(self, engine: Engine, entry: Any, phases: int, since: float) -> None:
        """A checkout has ended well; if it is a permit, use it, perhaps not to the end."""
        others = [opening.slot for opening in self.opening] + [record.slot for _, record in self.held]
        assert entry.slot not in others, "two have the same"
        assert entry.slot.home() is engine.attachment, "of another engine"
        if isinstance(entry, Permit):
            self.opening.append(Opening(engine, entry, since))
            for _ in range(phases):
                self.go_on_opening(self.opening[-1])
        else:
            assert entry.owner is engine.attachment.ref, "of another engine"
            assert entry.slot.state is HELD
            self.held.append((engine, entry))

    def go_on_opening(self, opening: Opening) -> None:
        """The next phase of three."""
        if opening.permit is not None:
            opening.record = self.simulator.bind(opening.engine.attachment, opening.permit)
            opening.permit = None
            return
        assert opening.record is not None
        if opening.slot.handle is None:
            self.simulator.now += self.connects_take
            self.plug(opening.engine, opening.record)
        else:
            self.opening.remove(opening)
            self.simulator.opened(opening.slot)
            self.held.append((opening.engine, opening.record))

    def plug(self, engine: Engine, record: Record) -> None:
        """A socket is opened."""
        self.simulator.plug(engine.attachment, record)
        engine.born[record.slot.handle] = engine.disposals

    phases = st.sampled_from([3, 3, 0, 1, 2])

    @rule(n=which, phases=phases)
    def somebody_checks_out(self, n: int, phases: int) -> None:
        self.check_out(n, phases)

    @rule(n=which)
    def somebody_else_checks_out(self, n: int) -> None:
        self.check_out(n, 3)

    @rule(n=which, several=st.integers(2, 4))
    def some_check_out(self, n: int, several: int) -> None:
        for _ in range(several):
            self.check_out(n, 3)

    @precondition(lambda self: self.opening or self.answered)
    @rule(n=which, phases=phases)
    def go_on(self, n: int, phases: int) -> None:
        """Somebody who opens comes to the next phase, or a waiter that was answered notices it."""
        item: Any = chosen(n, [*self.answered, *self.opening])
        if isinstance(item, Opening):
            self.go_on_opening(item)
        else:
            self.waiting.remove(item)
            self.received(item[0], item[1].answer, phases, item[1].since)

    @precondition(lambda self: self.waiting)
    @rule(n=which, last=st.booleans())
    def time_out(self, n: int, last: bool) -> None:
        engine, waiter = self.waiting.pop(n % len(self.waiting))
        if last:
            self.simulator.insist(waiter, last=True)
        answer = self.simulator.leave(waiter)
        assert answer is waiter.answer
        if isinstance(answer, Permit):
            self.simulator.fail(answer)
        elif answer is not None:
            self.simulator.give(engine.attachment, answer)

    @precondition(lambda self: self.waiting)
    @rule(n=which, new=st.booleans())
    def is_rejected(self, n: int, new: bool) -> None:
        """It is, if the queue before it is as long as it may be, or is overloaded and it waited for long."""
        engine, waiter = chosen(n, self.waiting)
        before = list(self.simulator.queues[engine.attachment])
        same = [other for other in before if other.caller_class == waiter.caller_class]
        place = same.index(waiter) if waiter in same else -1
        away = self.simulator.reject(waiter, new)
        if away is not None:
            too_long = new and place >= engine.attachment.max_waiting
            assert too_long or self.simulator.now - waiter.since >= engine.attachment.queue_target
            assert waiter.answer is None
            self.waiting.remove((engine, waiter))
        else:
            assert not new or place < engine.attachment.max_waiting

    @precondition(lambda self: self.opening)
    @rule(n=which, let_in=st.booleans())
    def fail_to_open(self, n: int, let_in: bool) -> None:
        """It is given up, or the error is for good."""
        if let_in:
            self.simulator.let_in()
        self.failed(self.opening.pop(n % len(self.opening)))

    # -- refusals ----------------------------------------------------------------------------------

    @property
    def hollow(self) -> list[tuple[Engine, Record]]:
        """The holders of a record without a connection, which they reopen."""
        return [item for item in self.held if item[1].slot.handle is None]

    @precondition(lambda self: self.opening or self.hollow)
    @rule(
        n=which,
        length=st.sampled_from([0.05, 1.0, 5.0]),
        again=st.sampled_from([True, True, False]),
        waited=st.sampled_from([0.0, 0.0, 0.3]),
    )
    def is_refused(self, n: int, length: float, again: bool, waited: float) -> None:
        """The server refuses one that opens or reopens: it has its place in the queue again, or gives up."""
        item: Any = chosen(n, [*self.opening, *self.hollow])
        self.simulator.refuse(length)
        if isinstance(item, Opening):
            engine, since = item.engine, item.since
            self.opening.remove(item)
            self.failed(item)
        else:
            engine, since = item[0], self.simulator.now - waited
            self.held.remove(item)
            self.simulator.give(engine.attachment, item[1])
        del item
        if not again:
            return
        queue = list(self.simulator.queues[engine.attachment])
        entry = self.simulator.wait(engine.attachment, since)
        if isinstance(entry, CheckedWaiter):
            self.waiting.append((engine, entry))
        elif not isinstance(entry, Rejected):
            assert self.stated or not queue, "overtakes a waiter"
            self.received(engine, entry, 3, since)

    def failed(self, opening: Opening) -> None:
        """It could not be opened, however far it had come."""
        if opening.permit is not None:
            self.simulator.fail(opening.permit)
        else:
            self.simulator.unplug(opening.slot)
            self.simulator.decide(self.ledger.failed, opening.slot, self.simulator.now)

    @precondition(lambda self: self.simulator.refusals)
    @rule(insisted=st.booleans())
    def the_pause_ends(self, insisted: bool) -> None:
        """One of the waiters may try by then."""
        simulator = self.simulator
        simulator.now = max(simulator.now, simulator.pause_ends)
        if insisted:
            attempts = simulator.attempts
            simulator.all_insist()
            assert simulator.attempts <= attempts + 1

    @precondition(lambda self: self.hollow)
    @rule(n=which)
    def reopen(self, n: int) -> None:
        """The server accepts a holder of a record without a connection."""
        engine, record = chosen(n, self.hollow)
        self.plug(engine, record)
        self.simulator.opened(record.slot)

    @precondition(lambda self: self.simulator.refusals and self.waiting)
    @rule()
    def the_process_forks(self) -> None:
        """The child has engines and limits, and no refusals."""
        self.simulator.fork()
        for things in (self.waiting, self.opening, self.held, self.locks):
            things.clear()
        assert not self.ledger.slots

    # -- what is held ------------------------------------------------------------------------------

    @rule(n=which, how=st.sampled_from([SUSPENDED, DRAINED, None, None]))
    def is_stopped(self, n: int, how: str | None) -> None:
        """An engine is suspended, drained, or resumed; a drained one is not suspended."""
        self.stop(chosen(n, self.engines), how)

    def everyone(self) -> set[Engine]:
        """All engines, also those that were dropped and have something out."""
        dropped = [*(o.engine for o in self.opening), *(e for e, _ in [*self.held, *self.waiting])]
        return {*self.engines, *dropped}

    def stop(self, engine: Engine, how: str | None) -> None:
        """Suspend, drain or resume an engine, with all pools that it has had."""
        quotas, was = [engine.attachment.quota], engine.stopped
        if how is None:
            self.simulator.decide(stopping.resume, self.ledger, quotas, self.simulator.now)
        else:
            self.simulator.decide(stopping.stop, self.ledger, quotas, how, self.simulator.now)
        assert engine.stopped == (DRAINED if how and was == DRAINED else how)
        for other in self.everyone():
            if (how or was) and other.attachment.quota in quotas:  # what is out closes when it is returned
                other.disposals += 1
                other.retire()

    @invariant()
    def what_is_stopped_has_nothing_idle(self) -> None:
        """A checkout on the short way asks nothing."""
        for engine in self.engines:
            assert not (engine.stopped and (engine.attachment.idle or engine.attachment.hollow))

    @precondition(lambda self: self.held)
    @rule(n=which)
    def check_in(self, n: int) -> None:
        engine, record = self.held.pop(n % len(self.held))
        handle = record.slot.handle
        self.simulator.give(engine.attachment, record)
        if record.slot.state is CLOSING:
            reasons = [
                item.reason
                for item in self.simulator.todo
                if isinstance(item, Close) and item.slot is record.slot
            ]
            assert handle is None or handle in engine.retired or reasons == [LOWERED] or engine.stopped
        else:
            assert handle not in engine.retired or engine.stopped == DRAINED  # handed to one that waits

    @precondition(lambda self: self.held)
    @rule()
    def all_check_in(self) -> None:
        while self.held:
            self.check_in(0)

    @precondition(lambda self: self.held)
    @rule(n=which)
    def check_in_hollow(self, n: int) -> None:
        engine, record = self.held.pop(n % len(self.held))
        self.simulator.unplug(record.slot)
        self.simulator.give(engine.attachment, record)

    @precondition(lambda self: self.held)
    @rule(n=which, detached=st.booleans())
    def detach_or_reopen(self, n: int, detached: bool) -> None:
        engine, record = chosen(n, self.held)
        if detached:
            self.held.remove((engine, record))
            self.simulator.detach(record)
        else:  # what pre_ping and recycle do
            self.simulator.unplug(record.slot)
            self.plug(engine, record)

    def wrongs(self) -> list[tuple[Engine, Record]]:
        """What nobody may give back: what is idle, what a session has locked, another engine's."""
        not_out = [
            (engine, entry)
            for engine in self.engines
            for entries in (
                engine.attachment.idle,
                engine.attachment.hollow,
                engine.attachment.locked.values(),
            )
            for entry in entries
        ]
        return not_out + [
            (e, record) for engine, record in self.held for e in self.engines if e is not engine
        ]

    @precondition(lambda self: self.wrongs())
    @rule(n=which)
    def wrong_check_in(self, n: int) -> None:
        engine, record = chosen(n, self.wrongs())
        with pytest.raises(NotHeld):
            self.ledger.give(engine.attachment, record, self.simulator.now)
        self.simulator.settle()

    def mortals(self) -> list[tuple[list[Any], Any]]:
        """What may be lost; a blocked checkout may not, its thread leaves the queue first."""
        lists: list[list[Any]] = [self.held, self.opening, self.answered]
        return [(things, thing) for things in lists for thing in things]

    @precondition(lambda self: self.mortals())
    @rule(n=which, late=st.booleans())
    def something_dies(self, n: int, late: bool) -> None:
        """Nobody refers any more to a connection, a permit or an answer.

        The ledger is told at once, or late: another operation goes first.
        """
        dying = chosen(n, self.mortals())
        (self.waiting if dying[1] in self.waiting else dying[0]).remove(dying[1])
        del dying
        if not late:
            self.simulator.settle()

    # -- the queries API ---------------------------------------------------------------------------

    def slots(self, *states: str) -> list[Slot]:
        """All slots, or those in one of these states, in an order that is the same in every run."""
        slots = (slot for slot in self.ledger.slots if not states or slot.state in states)
        return sorted(slots, key=lambda slot: slot.number)  # type: ignore[attr-defined]

    @precondition(lambda self: len(self.ledger.by_hand.quota.slots) < 2)
    @rule()
    def add_by_hand(self) -> None:
        full = len(self.ledger.slots) >= self.ledger.limit
        assert (self.simulator.add() is None) == full

    @precondition(lambda self: self.ledger.slots)
    @rule(n=which, idle=st.sampled_from([True, True, True, False]))
    def lock(self, n: int, idle: bool) -> None:
        slot = chosen(n, (self.slots(IDLE) if idle else []) or self.slots())
        session = Session()
        assert slot.home is not None
        possible = slot.state is IDLE and slot.handle is not None and slot.home() is not None
        assert self.simulator.lock(slot, session) == possible
        if possible:
            self.locks.append(Lock(slot, session))

    @precondition(lambda self: self.locks)
    @rule(n=which)
    def unlock(self, n: int) -> None:
        assert self.simulator.unlock(self.locks.pop(n % len(self.locks)).slot)

    @precondition(lambda self: self.locks)
    @rule(n=which, late=st.booleans())
    def session_dies(self, n: int, late: bool) -> None:
        del self.locks[n % len(self.locks)]
        if not late:
            self.simulator.settle()

    @invariant()
    def locks_stay(self) -> None:
        """Nothing takes a living session's lock but itself, and force."""
        for lock in self.locks:
            assert lock.slot.state is LOCKED
            assert lock.slot.session is not None
            assert lock.slot.session() is lock.session

    @precondition(lambda self: self.ledger.slots)
    @rule(n=which, how=st.sampled_from(["one", "force", "all", "all engines'", "stale"]))
    def close(self, n: int, how: str) -> None:
        out = [record.slot for _, record in self.held] + [opening.slot for opening in self.opening]
        out += [waiter.answer.slot for _, waiter in self.answered]
        if how == "all":
            result = self.simulator.decide(closing.close_all, self.ledger)
            assert isinstance(result, Slot) or not out, "it closes what somebody has"
        elif how == "all engines'":
            self.simulator.decide(closing.retire_all, self.ledger)
            dropped = [*(o.engine for o in self.opening), *(e for e, _ in [*self.held, *self.waiting])]
            for engine in {*self.engines, *dropped}:
                engine.disposals += 1
                engine.retire()
        elif how == "stale":
            self.simulator.unlock_stale(
                chosen(n, [*(e.attachment for e in self.engines), self.ledger.by_hand])
            )
        else:
            slot = chosen(n, self.slots())
            if how == "one":  # not of living sessions, either
                out += [lock.slot for lock in self.locks]
            work = self.simulator.decide(closing.close_one, self.ledger, slot, how == "force")
            assert not (work and slot in out), "it closes what somebody has"
            self.locks = [lock for lock in self.locks if lock.slot is not slot or not work]

    # -- engines, limits and time ------------------------------------------------------------------

    @precondition(lambda self: len(self.engines) < 4)
    @rule(ceiling=ceilings, ttl=ttls, lifo=st.booleans())
    def attach(self, ceiling: float | None, ttl: float, lifo: bool) -> None:
        caller = "b" if lifo and self.stated else None
        self.engines.append(
            Engine(self.simulator.engine(ceiling, ttl, lifo, stated=self.stated, caller=caller))
        )
        if not lifo:  # any of them, so that others have neither
            attachment = self.engines[-1].attachment
            attachment.max_waiting, attachment.queue_target = 2, 0.05

    @rule(n=which)
    def dispose(self, n: int) -> None:
        engine = chosen(n, self.engines)
        engine.disposals += 1
        self.simulator.decide(closing.dispose, self.ledger, engine.attachment)
        assert not engine.attachment.idle
        assert not engine.attachment.hollow

    @rule(n=which, dies=st.booleans(), late=st.booleans())
    def recreate(self, n: int, dies: bool, late: bool) -> None:
        engine = chosen(n, self.engines)
        old = engine.attachment
        if engine.disposals:
            self.simulator.decide(closing.retire, self.ledger, old)
            engine.retire()
        self.engines.append(
            Engine(self.simulator.engine(ttl=old.own_ttl, quota=old.quota, stated=self.stated))
        )
        del engine, old
        if dies or len(self.engines) > 5:
            self.drop(n, late)

    @precondition(lambda self: len(self.engines) > 1)
    @rule(n=which, late=st.booleans())
    def drop(self, n: int, late: bool) -> None:
        """An engine is garbage, or will be when the last that it has out is back."""
        del self.engines[n % len(self.engines)]
        if not late:
            self.simulator.settle()

    @rule(limit=st.just("same") | limits, ttl=st.just("same") | st.none() | ttls)
    def reconfigure(self, limit: Any, ttl: Any) -> None:
        if limit != "same":
            self.set_limit(limit)
        if ttl != "same":
            self.simulator.decide(ages.set_ttl, self.ledger, ttl, self.simulator.now)

    def set_limit(self, limit: float | None) -> None:
        """The limit is what was set, or what the engines state."""
        self.simulator.decide(engines.set_limit, self.ledger, limit, self.simulator.now)
        stated = [q.stated for q in self.ledger.attachments.values() if q.stated is not None]
        assert self.ledger.limit == (max(stated, default=15) if limit is None else limit)

    @precondition(lambda self: self.waiting)
    @rule(n=which)
    def insist(self, n: int) -> None:
        self.simulator.insist(chosen(n, self.waiting)[1])

    @rule(
        seconds=st.sampled_from([0.01, 0.03, 0.06, 0.2, 1.0, 10.0, 100.0]),
        swept=st.booleans(),
        insisted=st.booleans(),
    )
    def time_passes(self, seconds: float, swept: bool, insisted: bool) -> None:
        self.simulator.now += seconds
        if insisted:
            self.simulator.all_insist()
        if swept:
            out = [record for _, record in self.held]
            self.simulator.sweep()
            assert all(record.slot.state is HELD for record in out), "it closes what somebody has"

    @precondition(lambda self: self.simulator.todo)
    @rule(n=which, succeeds=st.booleans())
    def some_work_is_done(self, n: int, succeeds: bool) -> None:
        self.simulator.do(chosen(n, self.simulator.todo), succeeds)
        self.simulator.settle()  # the work may have been the last to refer to an entry

    @precondition(lambda self: self.simulator.todo)
    @rule()
    def all_work_is_done(self) -> None:
        self.simulator.do_all()

    # -- the end -----------------------------------------------------------------------------------

    @property
    def answered(self) -> list[tuple[Engine, CheckedWaiter]]:
        """The waiters that were answered and have not noticed."""
        return [item for item in self.waiting if item[1].answer is not None]

    def teardown(self) -> None:
        """When everybody gives back what they have, nobody waits, and nothing is left."""
        simulator = self.simulator
        if not simulator.sound:
            return  # the failure is reported already
        simulator.settle()
        for stopped in [engine for engine in self.everyone() if engine.stopped]:
            self.stop(stopped, None)
            del stopped
        simulator.now += 1.0
        simulator.all_insist()
        while self.waiting or self.opening or self.held or self.locks or simulator.todo:
            if not (self.answered or self.opening or self.held or self.locks or simulator.todo):
                simulator.now = max(simulator.now, simulator.pause_ends)
                simulator.all_insist()
                assert self.answered, "all wait"
            while self.opening or self.answered:
                self.go_on(0, 3)
            while self.held:
                self.check_in(0)
            while self.locks:
                self.unlock(0)
            simulator.do_all()
        simulator.sweep()
        simulator.do_all()
        simulator.decide(ages.set_ttl, self.ledger, 0.0, simulator.now)
        assert all(isinstance(item, Close) for item in simulator.todo)
        simulator.do_all()
        assert not self.ledger.slots
        assert not simulator.sockets
        self.engines.clear()
        simulator.settle()
        assert not self.ledger.attachments
        assert self.ledger.vacant_since is not None


EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "0"))


def settings_for(examples: int) -> settings:
    """With LEDGER_EXAMPLES so many, at random; else as many as said, the same each time."""
    return settings(
        max_examples=EXAMPLES or examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.mark.slow
@pytest.mark.parametrize("examples", [60, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_whatever_happens_in_whatever_order_the_ledger_is_right(examples: int) -> None:
    """See LedgerMachine."""
    run_state_machine_as_test(LedgerMachine, settings=settings_for(examples))
