"""The state of one database's budget: which slots there are, whose they are, and in which state.

These are the smallest steps that keep it right; ledger.py decides who gets what, and says what always holds.
No lock, no thread, no clock, no I/O, nothing of SQLAlchemy.

The ledger refers to slots strongly and to entries and engines weakly, for two reasons: it keeps no engine
alive, and an entry that dies (abandoned in a cycle, lost to an exception) gives its slot back through
:meth:`Ledger.lost`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from .backoff import Backoff
from .leaks import Leaks
from .lifetimes import Lifetimes
from .queue import Pace
from .slots import (
    CLOSING,
    GONE,
    HELD,
    LOCKED,
    OUT,
    SUSPENDED,
    TRANSITIONS,
    Attachment,
    EntryRef,
    Numbers,
    Quota,
    Slot,
    Waiter,
)
from .stats import ClassStatistics, Totals
from .work import Close, Due, Renew, Work

SUSPECTED_FOR = 1.0
"""Seconds for which one connection that was found dead makes only those suspect that are idle then."""
VACANT_FOR = 60.0
"""Seconds for which a pool without slots and engines is kept at most, but for one made by hand."""
LOOK_EVERY = 5.0
"""Seconds between two looks at whether an engine still has its ``min_size`` of living connections."""
DEFAULT_LIMIT = 15.0
"""The limit where nobody set one (design 3)."""


def go_on(attachment: Attachment) -> None:
    """An engine is stopped no more; what was out meanwhile still closes when it is returned."""
    if attachment.retired == math.inf:
        attachment.generation += 1
        attachment.retired = attachment.generation
    attachment.quota.stopped = None


class LedgerState:
    """The state of one pool, and the smallest steps that keep it right.

    :param lost: called with an :class:`EntryRef` whose entry died, in any thread and at any moment,
        inside another method too; it must put the call of :meth:`Ledger.lost` aside.
    :param new_slot: makes a slot.
    """

    def __init__(self, lost: Callable[[EntryRef], None], new_slot: Callable[[], Slot] = Slot) -> None:
        self._on_lost = lost
        self._new_slot = new_slot
        self.slots: set[Slot] = set()
        """Every slot that counts."""
        self.out = 0
        """How many slots are held or locked; counted along, for a checkout has no time to count them."""
        self.peak_held = 0
        """The most slots that were held or locked at once.  A connection that the pool itself renews or opens
        is counted only together with others."""
        self.opening: set[Slot] = set()
        self.closing: dict[Slot, weakref.ref[Close]] = {}
        """Slots whose connection is being closed, and the work that says so: dead where it got lost."""
        self.attachments: dict[weakref.ref[Attachment], Quota] = {}
        """The attached engines.  The quota stays known when the engine is dead."""
        self.by_hand = Attachment(Quota(None), 60.0)
        """The connections that were added by hand: nobody waits for them, an engine may evict them.
        Where the pool has no idle TTL set, they follow that of the engine that attached last."""
        self.queues: dict[Attachment, None] = {}
        """The attachments in whose queue somebody waits."""
        self.spare_at = 0.0
        """When waiters are to be given again what another engine can spare."""
        self.set_limit_to: float | None = None
        """What ``create`` or ``set_max_size`` said; None leaves it to the attached engines."""
        self.limit = DEFAULT_LIMIT
        """The limit in force, ``inf`` for none."""
        self.ttl: float | None = None
        """What ``create`` or ``set_idle_ttl`` said for all, in seconds, ``inf`` for never; None: each engine
        has its own."""
        self.due = math.inf
        """When :func:`ages.expire` is to be called next, by the :class:`Due` that was returned last."""
        self.mean_wait = 0.0
        """Moving mean of how long the served waited, in seconds."""
        self.mean_connect = 0.0
        """Moving mean of how long connecting took, from the permit on, in seconds."""
        self.borrowed: set[Slot] = set()
        """What the pool itself has for a moment, to ask the server something.  It is held, by nobody."""
        self.lifetimes = Lifetimes()
        self.backoff = Backoff()
        self.served_at = -math.inf
        """When a connection was opened last, or handed from a checkout to one that waited."""
        self.leaks = Leaks()
        self.suspected_at = -math.inf
        """When all idle connections were last suspected together."""
        self.totals = Totals()
        """What was done so far."""
        self.used = self.totals.used
        """Where a check-in finds it."""
        self.vacant_since: float | None = None
        """Since when there is neither a slot nor an engine; None while there is."""

    # -- the states of slots -----------------------------------------------------------------------

    def move(self, slot: Slot, state: str) -> None:
        """Change the state of a slot.  Nothing else does, but :meth:`Ledger.take` and :meth:`Ledger.give`.

        Its holder is written before that: the peak does not count what the pool itself takes.
        """
        before = slot.state
        assert (before, state) in TRANSITIONS, f"{slot!r}: {before} to {state}"
        slot.state = state
        self.out += (state in OUT) - (before in OUT)
        if state is LOCKED or (state is HELD and slot.holder is not None):
            self.peak_held = max(self.peak_held, self.out)

    def bind(self, slot: Slot, entry: Any) -> None:
        """Say what the holder of a slot has in hand from now on."""
        slot.entry = EntryRef(entry, self._on_lost, slot)

    def _add(self, slot: Slot, attachment: Attachment) -> None:
        slot.quota = attachment.quota
        slot.home = attachment.ref
        slot.quota.slots.add(slot)
        self.slots.add(slot)
        self.vacant_since = None

    def remove(self, slot: Slot) -> None:
        """It does not count any more, if it did."""
        if slot.state is not GONE:
            self.move(slot, GONE)
        self.slots.discard(slot)
        self.opening.discard(slot)
        self.closing.pop(slot, None)
        if slot.quota is not None:
            slot.quota.slots.discard(slot)

    def close(self, entry: Any, reason: str) -> Close:
        """Close the connection of an entry that was taken off its list."""
        return self._closing(entry.slot, entry, reason)

    def _closing(self, slot: Slot, entry: Any, reason: str) -> Close:
        self.move(slot, CLOSING)
        slot.session = None
        item = Close(slot, entry, reason)
        self.closing[slot] = weakref.ref(item)
        return item

    def close_idle(self, attachment: Attachment, reason: str) -> Work:
        """Close what this attachment has idle."""
        work: Work = []
        for entries in (attachment.idle, attachment.hollow):
            while entries:
                work.append(self.close(entries.popleft(), reason))
        return work

    # -- queues, suspicion, ages -------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Is there one engine, or event loop, and nothing that was added by hand?"""
        return len(self.attachments) == 1 and not self.by_hand.quota.slots

    def heads(self) -> list[Waiter]:
        """The first waiter of each queue that may be served.  A queue that an interrupt has left behind empty
        is forgotten."""
        for attachment in [a for a in self.queues if not a.queue]:
            del self.queues[attachment]
        served = [a for a in self.queues if a.quota.stopped != SUSPENDED]
        return [next(iter(attachment.queue)) for attachment in served]

    # What a pool without classes of callers says; classes.py overrides it.

    def first(self, attachment: Attachment) -> Waiter | None:
        """The waiter of a queue that is served next."""
        return next(iter(attachment.queue), None)

    def barred(self, waiter: Waiter) -> bool:
        """Does it wait for its own class?"""
        return False

    def could_serve(self, waiter: Waiter) -> list[Slot] | None:
        """The slots of its class, where it waits for that."""
        return None

    def wanting(self, attachment: Attachment) -> int:
        """How many of a queue could use one more."""
        return len(attachment.queue)

    def ahead_of(self, waiter: Waiter) -> int:
        """How many of its queue have come before it."""
        return list(waiter.attachment.queue).index(waiter)

    def pace_of(self, waiter: Waiter) -> Pace:
        """How those move that are served as it is."""
        return waiter.attachment.pace

    def note_classes(self) -> None:
        """Engines have come or gone: find out which classes there are."""

    def class_statistics(self) -> dict[str, ClassStatistics]:
        """What each class has and has done."""
        return {}

    def _leave_queue(self, waiter: Waiter) -> None:
        attachment = waiter.attachment
        attachment.queue.pop(waiter, None)
        if not attachment.queue:
            self.queues.pop(attachment, None)

    def suspect(self, now: float) -> None:
        """One connection was found dead: suspect all that are idle, once per second at most."""
        if now - self.suspected_at >= SUSPECTED_FOR:
            self.suspected_at = now
            for attachment in self.everyone():
                for entry in attachment.idle:
                    entry.slot.suspect = True

    def suspect_own(self, attachment: Attachment) -> None:
        """Suspect all that an engine has, also what is out: each is tested before its next use."""
        for slot in attachment.quota.slots:
            slot.suspect = True

    def apply_ttl(self) -> None:
        """Tell the engines their TTL: what was set for the pool comes before their own."""
        for attachment in self.everyone():
            attachment.ttl = attachment.own_ttl if self.ttl is None else self.ttl

    def expire_by(self, at: float) -> Work:
        """Have :func:`ages.expire` called at that time at the latest; ``inf`` asks for nothing."""
        if at >= self.due:
            return []
        self.due = at
        return [Due(at)]

    def note_lifetime(self, slot: Slot) -> Work:
        """A connection is idle again, or new: have it renewed when its lifetime is over."""
        return self.expire_by(self.lifetimes.add(slot))

    def renew(self, now: float) -> Work:
        """Have the next connection renewed whose lifetime is over: now, or when it is returned."""
        if self.backoff.refusals:
            return self.expire_by(now + LOOK_EVERY) if self.lifetimes else []
        over = self.lifetimes.begin(now)
        if over is None:
            return self.expire_by(self.lifetimes.due)
        slot, attachment, entry = over
        attachment.idle.remove(entry)
        slot.holder = None
        self.move(slot, HELD)
        return [Renew(slot, entry, slot.since)]

    def vacancy(self, now: float) -> Work:
        """See whether the pool has neither slots nor engines, and have it looked at when it may leave."""
        if self.slots or self.attachments:
            return []
        if self.vacant_since is None:
            self.vacant_since = now
        return [] if self.vacant(now) else self.expire_by(self.vacant_since + self.leave_after)

    # -- reading -----------------------------------------------------------------------------------

    def everyone(self) -> Iterator[Attachment]:
        """The living attachments and the one for what was added by hand."""
        for ref in list(self.attachments):
            attachment = ref()
            if attachment is not None:
                yield attachment
        yield self.by_hand

    def waiters(self) -> list[Waiter]:
        """All waiters, in no order."""
        return [waiter for attachment in self.everyone() for waiter in list(attachment.queue)]

    def numbers(self) -> Numbers:
        """Count; without the lock a moment may lie between one number and the next."""
        everyone = list(self.everyone())
        total, closing = len(self.slots), len(self.closing)
        opening = len(self.opening) + len(self.lifetimes.renewing)
        idle = sum(len(a.idle) for a in everyone)
        idle += sum(slot.state is HELD and slot.holder is None for slot in self.borrowed.copy())
        hollow = sum(len(a.hollow) for a in everyone)
        waiting = sum(len(a.queue) for a in everyone)
        held = max(0, total - opening - closing - idle - hollow)
        return Numbers(total, held, idle, opening, closing, hollow, waiting)

    @staticmethod
    def held_of(attachment: Attachment) -> Iterator[Slot]:
        """What an engine has out that may be returned."""
        return (s for s in attachment.quota.slots if s.state is HELD and s.home is attachment.ref)

    @staticmethod
    def size_of(attachment: Attachment) -> int:
        """How many connections an engine has, or is opening."""
        slots = [slot for slot in attachment.quota.slots if slot.home is attachment.ref]
        return sum(slot.state is not CLOSING for slot in slots) - len(attachment.hollow)

    @property
    def leave_after(self) -> float:
        """Seconds after which a vacant pool is of no use to anyone: the idle TTL, a minute at most.

        One whose TTL was set for the pool itself was made by hand, for connections to come.
        """
        ttl = self.by_hand.ttl
        longest = VACANT_FOR if self.ttl is None or ttl == math.inf else ttl
        return max(1.0, min(ttl, longest))

    def vacant(self, now: float) -> bool:
        """Has it been without slots and engines for so long?"""
        return self.vacant_since is not None and now - self.vacant_since >= self.leave_after
