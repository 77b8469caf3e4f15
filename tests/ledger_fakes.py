"""What ``Pool`` is around a ledger: a clock, an inbox, the work that is done; and fakes of what it counts.

Nothing happens by itself: the clock moves when it is moved, work is done when somebody does it.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from sqla_queries_pool.budget import ages, classes, closing, engines, locks
from sqla_queries_pool.budget.audit import check
from sqla_queries_pool.budget.choice import PATIENCE, may_wait
from sqla_queries_pool.budget.ledger import LOWERED, Ledger
from sqla_queries_pool.budget.locks import GRACE
from sqla_queries_pool.budget.queue import LONGEST, WORTH_IT
from sqla_queries_pool.budget.slots import (
    HELD,
    LOCKED,
    OTHER,
    SUSPENDED,
    TRANSITIONS,
    Attachment,
    EntryRef,
    Permit,
    Quota,
    Rejected,
    Slot,
    Terms,
)
from sqla_queries_pool.budget.work import Close, Due, Reset, Resetter, Wake


class Handle:
    """An open socket."""


class Session:
    """Who locks connections through the queries API."""


NO_CLASSES: Mapping[str, Terms] = {}
STATE: Any = vars(Slot)["state"]
"""What the state of a slot is stored in."""
SEEN: Counter[tuple[str, str]] = Counter()
"""How often the state of a slot was changed from one to another, by anything."""


class NumberedSlot(Slot):
    """A slot that can be put in an order that is the same in every run, and that knows its transitions."""

    __slots__ = ("number",)
    numbers = count()

    def __init__(self, handle: Handle | None = None) -> None:
        super().__init__(handle)
        self.number = next(self.numbers)

    @property
    def state(self) -> str:
        """The slot's own, and what it changes from and to is written down in :data:`SEEN`."""
        found: str = STATE.__get__(self)
        return found

    @state.setter
    def state(self, state: str) -> None:
        before = getattr(self, "state", None)
        STATE.__set__(self, state)
        if before is not None:
            assert (before, state) in TRANSITIONS, f"{before} to {state} is in no table"
            SEEN[before, state] += 1


class Record:
    """The entry of an engine's connection, as SQLAlchemy's record is."""

    def __init__(self, slot: Slot, owner: Attachment) -> None:
        self.slot = slot
        self.owner = owner.ref
        """Weak: which engine's."""


class CheckedWaiter:
    """A waiter that notices when it is answered twice, after it left, or out of turn."""

    def __init__(self, attachment: Attachment, queue: list[CheckedWaiter]) -> None:
        self.attachment = attachment
        self.holder = object()
        """Each waiter is another holder."""
        self.since = self.stood_still = 0.0
        self.before = 0
        self.label: str | None = None
        self.caller_class: str | None = None
        self.queue = queue
        """The waiters of the same engine, in order of arrival, as the tests count them."""
        self.opened = False
        self._answer: Any = None

    def accept(self) -> Any:
        """Take what it was given."""
        return self._answer

    @property
    def answer(self) -> Any:
        """What it was given."""
        return self._answer

    @answer.setter
    def answer(self, entry: Any) -> None:
        assert entry is not None
        assert self._answer is None, "answered twice"
        assert self in self.queue, "answered, but it does not wait"
        same = [waiter for waiter in self.queue if waiter.caller_class == self.caller_class]
        assert same[0] is self, "answered out of turn"
        self.queue.remove(self)
        self._answer = entry

    def wait(self, seconds: float) -> None:
        """Nothing waits in virtual time."""
        raise AssertionError("the ledger waits for nothing")

    def wake(self) -> None:
        """Wake it."""
        assert self._answer is not None, "woken for nothing"
        assert not self.opened, "woken twice"
        self.opened = True


class Simulator:
    """A ledger and what surrounds it; after each operation everything that must hold is checked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ledger = Ledger(self._entry_died, NumberedSlot)
        self.inbox: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        """What died, and the ledger has not been told: each time the last argument is missing."""
        self.todo: list[Wake | Close | Reset] = []
        """Work that nobody has done yet."""
        self.unlocked: dict[Slot, Resetter] = {}
        """What is to be reset and has been unlocked already."""
        self.told = math.inf
        """When the housekeeper will come, by what it was told."""
        self.sockets: dict[Handle, Slot] = {}
        """What is open and neither detached nor lost sight of."""
        self.queues: weakref.WeakKeyDictionary[Attachment, list[CheckedWaiter]] = weakref.WeakKeyDictionary()
        """The waiters of each engine, in order of arrival."""
        self.moved: weakref.WeakKeyDictionary[Attachment, tuple[weakref.ref[CheckedWaiter], float]]
        self.moved = weakref.WeakKeyDictionary()
        """The first waiter of each queue, and since when it is the first."""
        self.refusals = 0
        """How many pauses there were, one after the other, since the server has refused a connection."""
        self.pause_length = 0.0
        self.pause_ends = -math.inf
        """Nobody connects before that time; then one does, who begins the next pause."""
        self.attempts = 0
        """How many were let connect while the server refused."""
        self.parents: list[Any] = []
        """What the process from which this one was forked had."""
        self.kept: list[Any] = []
        """What a test keeps alive."""
        self.caller: str | None = None
        """The class of the next checkouts; None for that of their engine."""
        self.sound = True
        """Did the last operation end, and was nothing found wrong after it?"""
        self.sweep()  # PoolManager.create does so, too

    # -- the lock and the inbox --------------------------------------------------------------------

    def decide(self, operation: Callable[..., Any], *args: Any) -> Any:
        """One operation of the ledger, then the letters in the inbox, then the checks."""
        result = self._run(operation, args)
        self.settle()
        return result

    def settle(self) -> None:
        """Read the inbox."""
        while self.inbox:
            operation, args = self.inbox.pop(0)
            self._run(operation, (*args, self.now))
        self.check()

    def insist(self, waiter: CheckedWaiter, last: bool = False) -> None:
        """A waiter asks again: at moments of its own, so that others are served or come before it does."""
        self.decide(self.ledger.insist, waiter, self.now, last)

    def all_insist(self) -> None:
        """Each waiter asks again: then no waiter waits for what time has made spare."""
        self.settle()
        for waiter in [waiter for queue in self.queues.values() for waiter in queue]:
            self.insist(waiter)
        check(self.ledger, self.now)
        if self.refusals:
            return  # it may wait for the server, whatever is idle
        idle = any(a.idle for a in self.queues) or self.ledger.by_hand.idle
        for attachment, queue in self.queues.items():
            room = not attachment.quota.full and len(self.ledger.slots) < self.ledger.limit
            if attachment.quota.stopped == SUSPENDED:
                continue
            first = self.ledger.first(attachment)
            # With classes another one may have moved meanwhile.
            stands = first is queue[0] if queue else False
            stands = stands and self.now - self.moved[attachment][1] >= LONGEST and not self.classes
            assert not (room and stands), "waits for what is out, and could have connected meanwhile"
            longest = max(PATIENCE, self.ledger.mean_connect)
            patient = first is not None and (
                self.now - first.since >= longest
                and not may_wait(self.ledger, attachment, first.holder, self.now)
            )
            assert not (patient and idle and not attachment.quota.full), "waits beside what is idle"

    def _run(self, operation: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.sound = False
        before = len(self.ledger.slots)
        uses = {slot: slot.uses for slot in self.ledger.slots}
        result = operation(*args)
        after = len(self.ledger.slots)
        self._count_attempts(uses)
        assert after <= max(before, self.ledger.limit), f"grew from {before} to {after} slots"
        for item in result if isinstance(result, list) else ():
            if isinstance(item, Due):
                self.told = min(self.told, item.at)
            elif isinstance(item, (Wake, Close, Reset)):
                self.todo.append(item)
                lowered = isinstance(item, Close) and item.reason == LOWERED
                # What has expired by the same operation would have been there.
                expired = sum(isinstance(each, Close) and each.reason != LOWERED for each in result)
                in_use = after - len(self.ledger.closing) + expired
                assert not lowered or in_use >= self.ledger.limit, "closed more than the limit asks for"
        return result

    def _count_attempts(self, uses: dict[Slot, int]) -> None:
        """Who was let connect by the last operation?  While the server refuses, one after each pause.

        :param uses: how often each slot had been taken before it.
        """
        let = [s for s in self.ledger.slots if s.handle is None and s.uses != uses.get(s, 0)]
        if not self.refusals or not let:
            return
        assert self.now >= self.pause_ends, "somebody connects during a pause"
        assert len(let) == 1, "several connect after a pause"
        self.pause_ends = self.now + self.pause_length
        self.attempts += 1

    def _entry_died(self, ref: EntryRef) -> None:
        self.inbox.append((self.ledger.lost, (ref.slot,)))

    def check(self) -> None:
        """Everything that the ledger promises, and what it can't know itself."""
        ledger = self.ledger
        check(ledger)
        everyone = [a for ref in ledger.attachments if (a := ref())]
        for name, terms in self.classes.items():
            assert len(self.used_by(name)) <= terms.max, f"class {name} has more than its ceiling"
        for attachment in everyone:
            queue = self.queues[attachment]
            assert list(attachment.queue) == queue, "the queue is not the one that formed"
            first = self.moved.get(attachment)
            if queue and (first is None or first[0]() is not queue[0]):
                self.moved[attachment] = weakref.ref(queue[0]), self.now
            assert all(e.owner is attachment.ref for e in [*attachment.idle, *attachment.hollow])
            assert all(e.slot.home is attachment.ref for e in [*attachment.idle, *attachment.hollow])
        for attachment in [*everyone, ledger.by_hand]:
            for entry in [*attachment.idle, *attachment.hollow]:
                assert self.told <= entry.slot.since + attachment.ttl, "nobody was told when it expires"
            stale = any(slot.stale and Reset(slot) not in self.todo for slot in attachment.locked)
            assert not stale or self.told <= self.now + GRACE, "a stale lock was left to nobody"
        assert ledger.backoff.refusals == self.refusals
        assert not self.refusals or ledger.backoff.retry_at == self.pause_ends
        closes = [item.slot for item in self.todo if isinstance(item, Close)]
        assert len(closes) == len(set(closes)), "to be closed twice"
        numbers = ledger.numbers()
        assert numbers.held == sum(slot.state in (HELD, LOCKED) for slot in ledger.slots)
        assert numbers.waiting == sum(map(len, self.queues.values()))
        # A socket whose slot gave way is counted by the permission to open that it gave way to.
        uncounted = sum(slot not in ledger.slots for slot in self.sockets.values())
        assert uncounted <= sum(slot.handle is None for slot in ledger.opening), "open, but not counted"
        if not ledger.slots and not ledger.attachments:
            assert ledger.vacant_since is not None
            leaves = ledger.vacant_since + ledger.leave_after
            assert ledger.vacant(self.now) or self.told <= leaves, "nobody was told that it is vacant"
        else:
            assert ledger.vacant_since is None
        self.sound = True

    def fork(self) -> None:
        """Go on as the child: nothing of the parent's is ever finalized there."""
        slots = [*self.ledger.slots, *self.sockets.values()]
        self.parents += [*slots, *(slot.entry() for slot in slots if slot.entry is not None)]
        self.inbox.clear()
        self.todo.clear()
        self.unlocked.clear()
        self.sockets.clear()
        for queue in self.queues.values():
            queue.clear()
        self.refusals = 0
        self.told = math.inf
        parents = self.ledger

        def in_child() -> Any:
            self.ledger, work = engines.in_child(parents, self.now)
            return work

        self.decide(in_child)

    # -- engines -----------------------------------------------------------------------------------

    def engine(
        self,
        ceiling: float | None = None,
        ttl: float = 60.0,
        lifo: bool = True,
        quota: Quota | None = None,
        stated: Mapping[str, Terms] = NO_CLASSES,
        caller: str | None = None,
    ) -> Attachment:
        """Attach an engine; with ``quota`` one that was made by ``recreate()``."""
        attachment = Attachment(quota or Quota(ceiling), ttl, lifo)
        attachment.classes, attachment.caller = stated, caller
        if stated:
            classes.use(self.ledger, lambda attachment: self.caller or attachment.caller or OTHER)
        self.queues[attachment] = []
        self.decide(engines.attach, self.ledger, attachment, self._engine_died, self.now)
        return attachment

    def _engine_died(self, ref: weakref.ref[Attachment]) -> None:
        self.inbox.append((engines.detach, (self.ledger, ref)))

    # -- classes of callers ------------------------------------------------------------------------

    @property
    def classes(self) -> Mapping[str, Terms]:
        """The classes that there are."""
        return self.ledger.classes if isinstance(self.ledger, classes.ClassLedger) else NO_CLASSES

    def used_by(self, name: str) -> list[Slot]:
        """What a class has, or opens: counted otherwise than the ledger does."""
        used = [s for s in self.ledger.slots if s.state in ("opening", HELD) and s.holder is not None]
        return [slot for slot in used if slot.caller_class == name]

    def _below_floor(self, attachment: Attachment, entry: Any) -> list[CheckedWaiter]:
        """Those of whom one is to have what is returned now: of classes below their floors."""
        ledger, slot = self.ledger, entry.slot
        if self.refusals or slot.generation < attachment.retired or len(ledger.slots) > ledger.limit:
            return []
        found = []
        for other, queue in self.queues.items():
            fits = other.quota is attachment.quota or not other.quota.full
            fits = fits and other.quota.stopped != SUSPENDED
            for waiter in queue if fits else ():
                terms = self.classes.get(waiter.caller_class or OTHER, Terms())
                used = [s for s in self.used_by(waiter.caller_class or OTHER) if s is not slot]
                if len(used) < terms.min:
                    found.append(waiter)
        return found

    # -- slots -------------------------------------------------------------------------------------

    def take(self, attachment: Attachment, holder: object = 0) -> Any:
        """A checkout that does not wait."""
        fresh = not self.inbox
        queue = list(self.queues[attachment])
        others = [s for s in self.ledger.slots if s.state is HELD and s.home is attachment.ref]
        out = any(slot.holder is not holder for slot in others)
        waits = fresh and out and self.ledger.mean_connect >= WORTH_IT and not self.refusals
        entry = self.decide(self.ledger.take, attachment, holder, self.now)
        same = [
            w
            for w in queue
            if not self.classes or w.caller_class == (self.caller or attachment.caller or OTHER)
        ]
        rejected = isinstance(entry, Rejected)
        assert entry is None or rejected or not (fresh and same), "a newcomer has overtaken a waiter"
        assert not (waits and isinstance(entry, Permit)), "opens another although one is out"
        return entry

    def wait(self, attachment: Attachment, since: float | None = None) -> Any:
        """A checkout that waits: what it gets at once, or the waiter.

        :param since: it waited before, since then, and was refused: it goes before those that came later.
        """
        queue = self.queues[attachment]
        waiter = CheckedWaiter(attachment, queue)
        came = self.now if since is None else since
        queue.insert(sum(other.since <= came for other in queue), waiter)

        def join() -> Any:
            entry = self.ledger.take(attachment, waiter.holder, self.now)
            if entry is not None:
                queue.remove(waiter)
            else:
                self.ledger.enqueue(waiter, self.now, since)
                assert waiter.since == came
            return entry

        entry = self.decide(join)
        return waiter if entry is None else entry

    def leave(self, waiter: CheckedWaiter) -> Any:
        """A waiter gives up; return what it was given meanwhile."""

        def leave() -> Any:
            if waiter in waiter.queue:
                waiter.queue.remove(waiter)
            return self.ledger.leave(waiter)

        return self.decide(leave)

    def reject(self, waiter: CheckedWaiter, new: bool = False) -> Rejected | None:
        """A waiter asks whether it may wait at all, or for longer."""

        def reject() -> Rejected | None:
            away = self.ledger.reject(waiter, self.now, new)
            if away is not None:
                waiter.queue.remove(waiter)
            return away

        away: Rejected | None = self.decide(reject)
        return away

    def give(self, attachment: Attachment, entry: Any) -> None:
        """A check-in."""
        urgent = [] if self.inbox else self._below_floor(attachment, entry)
        self.decide(self.ledger.give, attachment, entry, self.now)
        served = [waiter for waiter in urgent if waiter.answer is not None]
        assert served or not urgent, "a class below its floor waits, and another one was served"

    def use_permit(self, attachment: Attachment, permit: Permit) -> Record:
        """Open what it permits to open; the record is held."""
        assert isinstance(permit, Permit)
        record = self.bind(attachment, permit)
        self.plug(attachment, record)
        self.opened(record.slot)
        return record

    def bind(self, attachment: Attachment, permit: Permit) -> Record:
        """The first half of an opening: close what gave way, make the record."""
        self.close_evicted(permit)
        record = Record(permit.slot, attachment)
        self.ledger.bind(permit.slot, record)
        return record

    def plug(self, attachment: Attachment, record: Record) -> None:
        """Open a socket for a record that has none."""
        assert record.slot.handle is None
        record.slot.handle = Handle()
        record.slot.generation = attachment.generation
        self.sockets[record.slot.handle] = record.slot

    def unplug(self, slot: Slot) -> None:
        """Close the socket of a slot, if there is one; to the ledger this says nothing."""
        handle, slot.handle = slot.handle, None
        self.sockets.pop(handle, None)

    def opened(self, slot: Slot) -> None:
        """The server has let somebody in."""
        self.refusals = 0
        self.decide(self.ledger.opened, slot, self.now)

    def refuse(self, length: float = 1.0) -> bool:
        """The server refuses a connection; is that the beginning of a pause?

        :param length: how long it is, in seconds.
        """
        began: list[int] = []

        def pauses(refusals: int) -> float:
            began.append(refusals)
            self.refusals += 1
            assert refusals == self.refusals
            self.pause_length = length
            self.pause_ends = self.now + length
            return length

        self.decide(self.ledger.backoff.refused, pauses, self.now)
        assert self.refusals, "a refusal that nobody takes notice of"
        return bool(began)

    def let_in(self) -> None:
        """It is no use to wait for the server."""
        self.refusals = 0
        self.decide(self.ledger.let_in, self.now)

    def close_evicted(self, permit: Permit) -> None:
        """Close what gave way."""
        entry, permit.evicts = permit.evicts, None
        if entry is not None:
            self.unplug(entry.slot)

    def fail(self, permit: Permit) -> None:
        """An opening fails, whatever there was of it."""
        self.close_evicted(permit)
        self.unplug(permit.slot)
        self.decide(self.ledger.failed, permit.slot, self.now)

    def detach(self, record: Record) -> None:
        """The holder of a connection keeps it for itself."""
        self.unplug(record.slot)
        self.decide(self.ledger.let_go, record.slot, self.now)

    def connected(self, attachment: Attachment) -> Record:
        """Check out, and open what has to be opened."""
        entry = self.take(attachment)
        return self.use_permit(attachment, entry) if isinstance(entry, Permit) else entry

    # -- the queries API ---------------------------------------------------------------------------

    def add(self) -> Slot | None:
        """Add a connection by hand; None if there is no slot for it."""
        slot = NumberedSlot(Handle())

        def add() -> Any:
            work = self.ledger.add(slot, self.now)
            if work is not None:
                assert slot.handle is not None
                self.sockets[slot.handle] = slot
            return work

        return None if self.decide(add) is None else slot

    def lock(self, slot: Slot, session: Session) -> bool:
        """Lock a connection for a session."""

        def died(ref: weakref.ref[Session]) -> None:
            self.inbox.append((locks.session_died, (self.ledger, slot, ref)))

        return bool(self.decide(locks.lock, self.ledger, slot, weakref.ref(session, died), self.now))

    def unlock(self, slot: Slot, if_stale: bool = False) -> bool:
        """Take a session's lock off; its reset is work to be done."""
        resetter = Resetter()
        unlocked: bool = self.decide(locks.unlock, self.ledger, slot, weakref.ref(resetter), if_stale)
        if unlocked:
            self.unlocked[slot] = resetter
            self.todo.append(Reset(slot))
        return unlocked

    def unlock_stale(self, attachment: Attachment) -> None:
        """Take the locks off that dead sessions left; the resets are work to be done."""
        for slot in self.decide(locks.stale, self.ledger, attachment):
            self.unlock(slot, True)

    # -- the work ----------------------------------------------------------------------------------

    def sweep(self) -> None:
        """The housekeeper comes."""
        self.told = math.inf
        self.decide(ages.expire, self.ledger, self.now)

    def do(self, item: Wake | Close | Reset, succeeds: bool = True) -> None:
        """Do one piece of work; a reset may fail."""
        self.todo.remove(item)
        if isinstance(item, Wake):
            item.waiter.wake()
        elif isinstance(item, Close):
            self.unplug(item.slot)
            self.decide(self.ledger.closed, item.slot, None, self.now)
        else:
            resetter = self.unlocked.pop(item.slot, None)
            if resetter is None:
                resetter = Resetter()
                if not self.decide(locks.unlock, self.ledger, item.slot, weakref.ref(resetter), True):
                    return
            if succeeds:
                self.decide(locks.give_back, self.ledger, item.slot, self.now)
            else:
                self.decide(closing.close_one, self.ledger, item.slot, True)

    def do_all(self) -> None:
        """Do all work, also what comes of it."""
        while self.todo:
            self.do(self.todo[0])
            self.settle()  # the work may have been the last to refer to an entry

    @property
    def reasons(self) -> list[str]:
        """Why connections are to be closed that are to be closed now."""
        return [item.reason for item in self.todo if isinstance(item, Close)]
