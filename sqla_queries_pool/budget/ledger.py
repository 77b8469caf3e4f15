"""Who has which slot of one database's budget, and who waits for one.

Pure bookkeeping: no lock, no thread, no clock, no I/O, nothing of SQLAlchemy.  ``Pool`` calls every
method with its lock held and passes the time in; what has to be done outside the lock (wake, close,
reset, look again later) is returned as a list of work.  Reads by properties take no lock and may be
a moment old.

What always holds when no method is running; :func:`audit.check` asserts it:

1. The slots in use do not exceed the limit; where a lowered limit left more, they only get fewer.
2. Nobody waits who could be served: by a free slot, or by one that somebody else can spare (design 6
   says when), unless it is better to wait for a connection that is out (design 24); as for what time
   brings about, once the waiter has insisted.
3. A slot is opening, idle, held, locked by a session, or closing: exactly one.
4. A waiter is in the line of its engine until it is answered, and never after.
5. A slot that is opening ends as opened or failed, and a failure serves the next waiter.
6. No idle connection is of a retired generation.
7. No engine uses more slots than its own ceiling, unless it passed its pool's limit on a lowering.
"""

from __future__ import annotations

import heapq
import math
import weakref
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from .queue import WORTH_IT
from .queue import mean as moving_mean
from .slots import (
    CLOSING,
    GONE,
    HELD,
    IDLE,
    LOCKED,
    OPENING,
    OVERLOAD,
    QUEUE_FULL,
    Attachment,
    Close,
    Fill,
    NotHeld,
    Permit,
    Quota,
    Rejected,
    Renew,
    Reset,
    Resetter,
    Slot,
    Waiter,
    Wake,
    Work,
)
from .state import LedgerState
from .stats import BOUNDS, SHORTEST

IDLE_TTL = "idle for its idle_ttl"
DISPOSED = "its generation has ended"
GAVE_WAY = "gave way to another engine"
LOWERED = "max_size was lowered"
ABANDONED = "its holder is gone"
REMOVED = "removed through the queries API"

SPARE = 0.05
"""Seconds after which an idle connection counts as spare: another engine may have its slot at once.
One that has just come home is about to be used again, and moving its slot costs a close and a connect
(design 6)."""
GRACE = 0.5
"""Seconds from the death of a session that had a lock to its reset, where nobody needs it earlier."""
PATIENCE = 0.1
"""Seconds after which a waiter may have the slot of any other engine's idle connection."""
PATIENCE_FACTOR = 4.0
"""For how many mean waits, and for PATIENCE at least, another engine's waiter lets a connection's own
engine go first although it came first itself."""


LOOK_EVERY = 5.0
"""Seconds between two looks at whether an engine still has its ``min_size`` of living connections."""


class Ledger(LedgerState):
    """The bookkeeping of one pool: who gets which slot."""

    # -- the hot path ------------------------------------------------------------------------------

    def take(self, attachment: Attachment, holder: Any, now: float) -> Any:
        """Return an entry for this engine, now held (or opening, if a :class:`Permit`), or None."""
        if attachment.idle:
            entry = attachment.pop()
            slot = entry.slot
            if now - slot.since >= attachment.ping_after or now >= slot.expires:
                slot.suspect = True
            slot.state = HELD
            slot.holder = holder
            slot.since = now
            slot.uses += 1
            self.out = out = self.out + 1
            if out > self.peak_held:
                self.peak_held = out
            return entry
        if attachment.hollow and not attachment.queue and self.may_connect(now):
            return self._hold(attachment.hollow.pop(), holder, now)
        if attachment.queue:
            return None  # time may have changed what the first of them may have: nobody overtakes
        return self._open(attachment, holder, now, insist=False)

    def give(self, attachment: Attachment, entry: Any, now: float) -> Work | None:
        """Take an entry back from its holder.

        :raises NotHeld: nobody had it.
        """
        slot = entry.slot
        if slot.state is not HELD or slot.home is not attachment.ref:
            raise NotHeld(f"{entry!r} was given back, but it is {slot.state}")
        slot.state = IDLE
        self.out -= 1
        if slot.holder is not None:
            seconds = now - slot.since
            used = self.used  # Durations.add() by hand, and no search where each nanosecond counts
            used.seconds += seconds
            used.counts[0 if seconds <= SHORTEST else bisect_left(BOUNDS, seconds)] += 1
            slot.holder = None
        slot.since = now
        if (
            self.queues
            or slot.handle is None
            or slot.generation < attachment.retired
            or len(self.slots) > self.limit
            or now >= slot.expires
        ):
            return self._give_on(attachment, entry, slot, now)
        attachment.idle.append(entry)
        if now + attachment.ttl < self.due:
            return self._due(now + attachment.ttl)
        return None

    def give_unused(self, attachment: Attachment, entry: Any, now: float) -> Work | None:
        """:meth:`give`, of what was taken to be opened or passed on: no checkout."""
        entry.slot.holder = None
        return self.give(attachment, entry, now)

    # -- giving and taking, the rest ---------------------------------------------------------------

    def _hold(self, entry: Any, holder: Any, now: float) -> Any:
        slot = entry.slot
        slot.state = HELD
        slot.holder = holder
        slot.since = now
        slot.uses += 1
        self.out += 1
        self.peak_held = max(self.peak_held, self.out)
        return entry

    def _give_on(self, attachment: Attachment, entry: Any, slot: Slot, now: float) -> Work:
        """Give an entry that came home to whom it is due: a waiter, the closers, or the idle."""
        if len(self.slots) - len(self.closing) > self.limit:
            return [self._close(entry, LOWERED), *self._serve(now)]
        if slot.generation < attachment.retired:
            return [self._close(entry, DISPOSED), *self._serve(now)]
        if attachment.queue and len(self.queues) == 1 and slot.handle is not None:
            first = next(iter(attachment.queue))
            return [self._answer(first, self._hold(entry, first.holder, now), now)]
        if slot.handle is not None and now >= slot.expires and not self.queues:
            return self._idle_again(attachment, entry, now) + self._count_lifetime(slot) + self._renew(now)
        hollow = slot.handle is None
        waiter = self._next_for(attachment, hollow, now)
        connects = waiter is not None and (hollow or waiter.attachment is not attachment)
        if connects and not self.may_connect(now):
            waiter = None if hollow else next(iter(attachment.queue), None)
        if waiter is None:
            return self._idle_again(attachment, entry, now)
        if waiter.attachment is attachment:
            # Direct hand-over: never idle in between, so no newcomer can overtake.
            return [self._answer(waiter, self._hold(entry, waiter.holder, now), now)]
        self._remove(slot)
        permit = self._permit(waiter.attachment, waiter.holder, now, entry)
        return [self._answer(waiter, permit, now), *self._serve(now)]

    def _idle_again(self, attachment: Attachment, entry: Any, now: float) -> Work:
        slot = entry.slot
        (attachment.idle if slot.handle is not None else attachment.hollow).append(entry)
        return self._due(now + attachment.ttl)

    def _next_for(self, attachment: Attachment, hollow: bool, now: float) -> Waiter | None:
        """Choose who gets a slot of this attachment that has come home (design 6)."""
        own = next(iter(attachment.queue), None)
        mine = attachment.quota
        # Its slot frees a place under its own quota, so engines of that quota are never too full.
        others = [
            waiter
            for waiter in self._heads()
            if (other := waiter.attachment) is not attachment
            and (other.quota is mine or not other.quota.full)
        ]
        if own is None and not hollow:  # then it stays, unless somebody may insist
            others = [w for w in others if w.attachment.quota is mine or self.may_insist(w, now)]
        oldest = min(others, key=_arrival, default=None)
        if own is None or oldest is None:
            return own or oldest
        first = oldest.since < own.since
        if first and (hollow or now - oldest.since > max(PATIENCE, PATIENCE_FACTOR * self.mean_wait)):
            return oldest
        # Even with one slot less, mine would get more of what it wants than the other does: so slots
        # spread in proportion to demand, and never swing back.
        its = len(oldest.attachment.quota.slots)
        wanted, its_wanted = len(mine.slots) + len(attachment.queue), its + len(oldest.attachment.queue)
        if (len(mine.slots) - 1) * its_wanted > its * wanted:
            return oldest
        self.totals.bypasses += first
        return own

    def may_insist(self, waiter: Waiter, now: float) -> bool:
        """May it have the slot of a connection that its engine is about to use again?"""
        quota = waiter.attachment.quota
        return not quota.slots or now - waiter.since >= PATIENCE

    def may_wait(self, attachment: Attachment, holder: Any, now: float) -> bool:
        """Is it better to wait for what this engine has out than to open another (queue.py)?

        :param holder: who would wait; what he has himself does not come home meanwhile.
        """
        if self.mean_connect < WORTH_IT or self.refusals:
            return False
        if attachment.queue and attachment.pace.opens(len(attachment.queue), now):
            return False
        return any(slot.holder is not holder for slot in self._out(attachment))

    def look_in(self, waiter: Waiter, now: float) -> float:
        """Return after how many seconds a waiter looks, since it may open one by then, or is turned away."""
        attachment, target, seconds = waiter.attachment, waiter.attachment.queue_target, math.inf
        full = attachment.quota.full or len(self.slots) >= self.limit
        if attachment.pace.price and not full and not self.refusals:
            seconds = attachment.pace.look_in(len(attachment.queue), waiter.since, now)
        if target < math.inf:
            seconds = min(seconds, attachment.pace.overdue_in(waiter.since, target, now))
        return seconds

    def _open(
        self, attachment: Attachment, holder: Any, now: float, insist: bool, last: bool = False
    ) -> Permit | None:
        """Return the right to open a connection, or None: all full and nobody can give way, or it is
        better to wait.

        :param insist: have somebody give way who does not like to.
        :param last: it can't wait.
        """
        quota = attachment.quota
        if self.refusals and now < self.retry_at:
            return None
        if not last and self.may_wait(attachment, holder, now):
            return None
        evicts = None
        full = quota.full or len(self.slots) >= self.limit
        if full or self.refusals:  # a server that is full has room for what gives way here
            before = now if insist or not quota.slots else now - SPARE
            evicts = self._pick(quota, quota.full, before)
            if evicts is not None:
                self._remove(evicts.slot)
            elif full:
                return None
        self.may_connect(now)
        if attachment.queue:
            out = sum(1 for _ in self._out(attachment))
            attachment.pace.opened(len(attachment.queue), out, self.mean_connect, now)
        return self._permit(attachment, holder, now, evicts)

    def may_connect(self, now: float) -> bool:
        """May somebody try to connect, who then does?  While the server refuses, one in each pause."""
        if not self.refusals:
            return True
        if now < self.retry_at:
            return False
        self.probing = True
        self.retry_at = now + self.retry_after
        return True

    def _permit(self, attachment: Attachment, holder: Any, now: float, evicts: Any) -> Permit:
        slot = self._new_slot()
        slot.state = OPENING
        slot.holder = holder
        slot.since = now
        slot.uses = 1
        slot.instead_of = None if evicts is None else evicts.slot
        permit = Permit(slot, evicts)
        self.bind(slot, permit)
        self._add(slot, attachment)
        self.opening.add(slot)
        return permit

    def _pick(self, quota: Quota | None, within: bool, before: float) -> Any:
        """Take off and return the idle entry that can best be spared, or None.

        :param quota: for whom.
        :param within: look among the engines of this quota alone.
        :param before: others spare what has been idle since then, or longer.
        """
        crowd = [a for a in self.everyone() if not within or a.quota is quota]
        for attachment in crowd:
            if attachment.hollow:
                return attachment.hollow.popleft()
        idle = [a for a in crowd if a.idle and (a.quota is quota or a.idle[0].slot.since <= before)]
        if idle:
            # What was added by hand goes last: nobody opens that again.
            choice = min(idle, key=lambda a: (a is self.by_hand, a.idle[0].slot.since))
            return choice.idle.popleft()
        for attachment in crowd:
            for slot in attachment.locked:
                if slot.stale:
                    return attachment.locked.pop(slot)
        return None

    # -- waiting -----------------------------------------------------------------------------------

    def enqueue(self, waiter: Waiter, now: float, since: float | None = None) -> None:
        """Put a waiter in line, for whom :meth:`take` has just found nothing.

        :param since: it was in line before and since then, and what it got it could not use.
        """
        attachment = waiter.attachment
        queue = attachment.queue
        if queue:
            attachment.pace.was(len(queue), now)
        else:
            attachment.pace.begin(self.mean_connect, now)
        waiter.since = now if since is None else since
        waiter.before = attachment.answered
        queue[waiter] = None
        if since is not None:  # nobody else has come before those who are there
            for other in [w for w in queue if w.since > since]:
                queue.move_to_end(other)
        self.queues[attachment] = None

    def insist(self, waiter: Waiter, now: float, last: bool = False) -> Work:
        """A waiter asks again: is there, by now, an idle connection whose slot its line may have?

        :param last: it is about to give up, and so may have any.
        """
        queue = waiter.attachment.queue
        if waiter not in queue:
            return []
        work: Work = []
        while queue:
            first = next(iter(queue))  # nobody overtakes, also not by insisting
            insist = last or self.may_insist(first, now)
            permit = self._open(first.attachment, first.holder, now, insist, last)
            if permit is None:
                break
            work.append(self._answer(first, permit, now))
            # Who can't wait any more may have those before it opened for, to come to its turn.
            if not (waiter.attachment.pace.granted or (last and waiter in queue)):
                break
        return work

    def reject(self, waiter: Waiter, now: float, new: bool = False) -> Rejected | None:
        """Take a waiter out of the line that is too long for it, or is overloaded; return why, or None.

        :param new: it has just come, and finds the line as long as it may be.
        """
        attachment = waiter.attachment
        queue, target = attachment.queue, attachment.queue_target
        if waiter not in queue:
            return None
        why = None
        newest = new and len(queue) > attachment.max_waiting
        if newest and list(queue).index(waiter) >= attachment.max_waiting:
            why = Rejected(
                QUEUE_FULL,
                f"the queue is full: {attachment.max_waiting} checkouts wait already (max_waiting)",
            )
        elif now - waiter.since >= target and attachment.pace.overloaded(target, now):
            behind = now - attachment.pace.in_time
            why = Rejected(
                OVERLOAD,
                f"the pool is overloaded: for {behind:.1f} s the queue was never empty, and slower than "
                f"queue_target={target:g} s; until it is empty no checkout waits for longer than that",
            )
        if why is not None:
            self._leave_queue(waiter)
        return why

    def leave(self, waiter: Waiter) -> Any:
        """Take a waiter out of the line; return what it was given meanwhile, or None."""
        self._leave_queue(waiter)
        return waiter.answer

    def _answer(self, waiter: Waiter, entry: Any, now: float) -> Wake:
        waiter.answer = entry  # first: one that is out of line, but has no answer, would wait for ever
        self._leave_queue(waiter)
        attachment, waited = waiter.attachment, now - waiter.since
        attachment.answered += 1
        if attachment.pace.price:
            attachment.pace.was(len(attachment.queue), now)
            attachment.pace.served += entry.slot.state is HELD
        if attachment.queue_target < math.inf:
            attachment.pace.was_served(waited, attachment.queue_target, now)
        self.mean_wait += (waited - self.mean_wait) / 16
        self.totals.waited.add(waited)
        return Wake(waiter)

    def _serve(self, now: float) -> Work:
        """Let the waiters open what can be opened by now, the oldest first."""
        work: Work = []
        while self.queues:
            for waiter in sorted(self._heads(), key=_arrival):
                insist = self.may_insist(waiter, now)
                permit = self._open(waiter.attachment, waiter.holder, now, insist)
                if permit is not None:
                    work.append(self._answer(waiter, permit, now))
                    break
            else:
                break
        return work

    # -- opening and closing -----------------------------------------------------------------------

    def opened(self, slot: Slot, now: float) -> Work:
        """A connection was opened, or reopened: its opener holds it."""
        self.opening.discard(slot)
        slot.instead_of = None
        if slot.state is OPENING:
            self.mean_connect = moving_mean(self.mean_connect, now - slot.since)
            slot.state = HELD
            self.out += 1
            if slot.holder is not None:
                self.peak_held = max(self.peak_held, self.out)
        slot.since = now
        work = self._count_lifetime(slot)
        attachment = slot.home() if slot.home is not None else None
        if attachment is not None and attachment.leak_after < math.inf:
            work += self._due(now + attachment.leak_after)
        if attachment is not None and attachment.min_size:
            attachment.warm = True
            if attachment.min_size > self._size(attachment):
                work += self._due(now)  # the first of several
        return work + self.let_in(now)

    def refused(self, pauses: Callable[[int], float], now: float) -> None:
        """The server has refused a connection, and it is worth trying again: after a pause.

        :param pauses: how long a pause is, in seconds, after so many refusals.
        """
        if self.refusals and not self.probing:
            return  # it was connecting already when the pause began
        self.probing = False
        self.refusals += 1
        self.retry_after = pauses(self.refusals)
        self.retry_at = now + self.retry_after

    def let_in(self, now: float) -> Work:
        """The server refuses nobody any more, or it is no use to wait for it: everybody may try."""
        if not self.refusals:
            return []
        self.refusals = 0
        for attachment in self.queues:
            attachment.pace.granted = len(attachment.queue)  # they have waited for the server
        return self._serve(now)

    def failed(self, slot: Slot, now: float) -> Work:
        """A connection could not be opened: the next waiter may try for itself."""
        return self._free(slot, now)

    def closed(self, slot: Slot, now: float) -> Work:
        """A connection is closed: its slot is free.  One that gave its slot on has none to free."""
        return self._free(slot, now)

    def let_go(self, slot: Slot, now: float) -> Work:
        """A connection was detached by its holder, who owns it from now on."""
        self.totals.left += 1
        return self._free(slot, now)

    def lost(self, slot: Slot, now: float) -> Work:
        """The entry of a slot has died: nobody can give it back any more."""
        session = slot.session() if slot.session is not None else None
        if slot.state is LOCKED and session is not None and not isinstance(session, Resetter):
            # A session has locked an engine's connection, and the engine is gone: the session keeps
            # it, as if it had been added by hand.
            assert slot.quota is not None
            slot.quota.slots.discard(slot)
            slot.entry = None
            self._add(slot, self.by_hand)
            self.by_hand.locked[slot] = slot
            return self._serve(now)  # it no longer counts against the ceiling of its engine
        if slot.state is CLOSING and slot.entry is None:
            return []  # its closing is under way, see below
        return self.cast_off(slot, now)

    def cast_off(self, slot: Slot, now: float) -> Work:
        """Nobody has it: close its connection, if there is one, and free it."""
        evicted, slot.instead_of = slot.instead_of, None
        if slot.state is OPENING and evicted is not None and evicted.handle is not None:
            # The permit died before what gave way was closed: that counts again until it is.
            self._remove(slot)
            evicted.entry = None
            evicted.quota = slot.quota
            self.slots.add(evicted)
            if evicted.quota is not None:
                evicted.quota.slots.add(evicted)
            return [self._closing(evicted, None, ABANDONED), *self._serve(now)]
        self.totals.left += slot.state is HELD
        if slot.handle is None:
            return self._free(slot, now)
        if slot not in self.slots:
            return [Close(slot, None, ABANDONED)]
        self.opening.discard(slot)
        return [self._closing(slot, None, ABANDONED), *self._serve(now)]

    def _free(self, slot: Slot, now: float) -> Work:
        self._remove(slot)
        return self._serve(now) + self._vacancy(now)

    def close_all(self) -> Work | Slot:
        """Close every connection, or none and return one that is busy."""
        for slot in self.slots:
            if slot.state in (OPENING, HELD) or (slot.state is LOCKED and not slot.stale):
                return slot
        work: Work = []
        for attachment in self.everyone():
            work += self.close_idle(attachment, REMOVED)
            while attachment.locked:
                work.append(self._close(attachment.locked.popitem()[1], REMOVED))
        return work

    def close_one(self, slot: Slot, force: bool = False, reason: str = REMOVED) -> Work:
        """Close one connection that is idle or whose lock is stale, with ``force`` any that a
        session has locked; else return nothing."""
        attachment = slot.home() if slot.home is not None else None
        if attachment is None:
            return []
        if slot.state is IDLE:
            entry = slot.entry() if slot.entry is not None else slot
            (attachment.idle if entry in attachment.idle else attachment.hollow).remove(entry)
            return [self._close(entry, reason)]
        if slot in attachment.locked and (slot.stale or force):
            return [self._close(attachment.locked.pop(slot), reason)]
        return []

    def dispose(self, attachment: Attachment) -> Work:
        """Close what is idle and end the generation; what is out comes home as usual (design 10)."""
        attachment.generation += 1
        return self.close_idle(attachment, DISPOSED)

    def retire(self, attachment: Attachment) -> Work:
        """Let what was born before the last dispose close when it comes home, or if it has by now."""
        attachment.retired = attachment.generation
        return self.close_idle(attachment, DISPOSED)

    def retire_all(self) -> Work:
        """Let all that engines have open close, now or when it comes home."""
        work: Work = []
        for attachment in self.everyone():
            if attachment is not self.by_hand:
                work += self.dispose(attachment) + self.retire(attachment)
        return work

    # -- the queries API ---------------------------------------------------------------------------

    def add(self, slot: Slot, now: float) -> Work | None:
        """Count a connection that was opened elsewhere; None if there is no slot for it."""
        if len(self.slots) >= self.limit:
            return None
        slot.state = IDLE
        slot.since = now
        self._add(slot, self.by_hand)
        self.by_hand.idle.append(slot)
        return self._due(now + self.by_hand.ttl)

    def lock(self, slot: Slot, session: weakref.ref[Any], now: float) -> bool:
        """Lock an idle connection for a session; False if it is not idle."""
        attachment = slot.home() if slot.home is not None else None
        if attachment is None or slot.state is not IDLE or slot.handle is None:
            return False
        entry = slot.entry() if slot.entry is not None else slot
        attachment.locked[slot] = entry  # first: nobody else keeps one that was added by hand
        attachment.idle.remove(entry)
        slot.session = session  # before it is locked: a lock that is nobody's would be for ever
        slot.since = now
        slot.uses += 1
        slot.state = LOCKED
        self.out += 1
        self.peak_held = max(self.peak_held, self.out)
        return True

    def give_locked(self, slot: Slot, now: float) -> Work:
        """Take back what :meth:`unlock` released, after its reset."""
        attachment = slot.home() if slot.home is not None else None
        if attachment is None or slot not in attachment.locked:
            return []
        slot.state = HELD
        slot.session = None
        return self.give(attachment, attachment.locked.pop(slot), now) or []

    def session_died(self, slot: Slot, session: weakref.ref[Any], now: float) -> Work:
        """A session died with a lock: who waits may have the slot, else the housekeeper resets it.

        Not at once: who calls ``get`` or ``lock`` next would find it being reset, hence busy.
        """
        if slot.session is not session:
            return []
        return self._serve(now) + self._due(now + GRACE)

    def after_fork_in_child(self, now: float) -> Work:
        """In a forked child: engines and limits stay, slots and waiters are the parent's.

        Another thread may have been inside a method when the process forked.  That thread is not here, and
        what it left half done goes with the rest.
        """
        for slot in self.slots:
            slot.state = GONE
        for attachment in self.everyone():
            for things in (attachment.idle, attachment.hollow, attachment.locked, attachment.queue):
                things.clear()
        for quota in (*self.attachments.values(), self.by_hand.quota):
            quota.slots.clear()
        for slots in (self.slots, self.opening, self.closing):
            slots.clear()
        self.queues.clear()
        self.out = 0
        self.due = math.inf
        self.mean_wait = self.mean_connect = 0.0
        self.refusals = 0
        self.lifetimes.clear()
        self.reset_counts()
        self.leaks.clear()
        self.renewing = None
        # Whose death nobody was told, because the letter lay in the parent's inbox.
        self.attachments = {ref: quota for ref, quota in self.attachments.items() if ref() is not None}
        return self.relimit(now) + self._vacancy(now)

    def in_child(self, now: float) -> tuple[Ledger, Work]:
        return self, self.after_fork_in_child(now)

    # -- limits, ages, engines ---------------------------------------------------------------------

    def attach(
        self, attachment: Attachment, gone: Callable[[weakref.ref[Attachment]], None], now: float
    ) -> Work:
        """An engine begins to use the pool; ``gone`` is what ``lost`` is, for the engine."""
        attachment.ref = weakref.ref(attachment, gone)
        self.by_hand.own_ttl = attachment.own_ttl
        self.attachments[attachment.ref] = attachment.quota
        self._apply_ttl()
        self.vacant_since = None
        return self.relimit(now) + self.expire(now)  # its idle_ttl holds for what was added by hand

    def detach(self, ref: weakref.ref[Attachment], now: float) -> Work:
        """An engine is gone."""
        self.attachments.pop(ref, None)
        return self.relimit(now) + self._vacancy(now)

    def set_limit(self, limit: float | None, now: float) -> Work:
        """Set the limit, ``inf`` for none; None leaves it to the attached engines."""
        self.set_limit_to = limit
        return self.relimit(now)

    def relimit(self, now: float) -> Work:
        """Find out which limit holds, and act on it."""
        if self.set_limit_to is not None:
            self.limit = self.set_limit_to
        elif self.attachments:
            stated = [q.stated for q in self.attachments.values() if q.stated is not None]
            self.limit = max(stated, default=self.default_limit)
        # Without engines it stays what it was: what they left open may still be closing.
        work: Work = []
        while len(self.slots) - len(self.closing) > self.limit:
            entry = self._pick(None, False, math.inf)
            if entry is None:
                break
            work.append(self._close(entry, LOWERED))
        return work + self._serve(now)

    def set_ttl(self, ttl: float | None, now: float) -> Work:
        """Set the idle TTL of all, ``inf`` for never; None leaves each engine its own."""
        self.ttl = ttl
        self._apply_ttl()
        return self.expire(now)

    def expire(self, now: float) -> Work:
        """Close what was idle for too long, reset what dead sessions left, and say when to look again."""
        work: Work = []
        due = math.inf
        for attachment in self.everyone():
            work += [Reset(slot) for slot in attachment.locked if slot.stale]
            spare = self._size(attachment) - attachment.min_size if attachment.min_size else math.inf
            for entries in (attachment.hollow, attachment.idle):
                while entries and spare > 0 and entries[0].slot.since + attachment.ttl <= now:
                    if entries is attachment.idle:
                        spare -= 1
                    work.append(self._close(entries.popleft(), IDLE_TTL))
                if entries and spare > 0:
                    due = min(due, entries[0].slot.since + attachment.ttl)
            leaks, look_at = self.leaks.look(attachment, now)
            work += leaks
            if look_at < due and attachment.quota.slots:
                due = look_at
            if attachment.warm:
                due = min(due, now + LOOK_EVERY)
                if spare < 0:
                    work.append(Fill(attachment))
        self.due = math.inf
        return work + self._renew(now) + self._due(due) + self._vacancy(now)

    def _renew(self, now: float) -> Work:
        """Have the next connection renewed whose lifetime is over, if it is idle; else when it comes home."""
        if self.refusals:
            return self._due(now + LOOK_EVERY) if self.lifetimes else []
        while self.lifetimes and self.renewing is None and self.lifetimes[0][0] <= now:
            slot = heapq.heappop(self.lifetimes)[2]()
            if slot is None or slot.state is not IDLE or slot.expires > now or slot.handle is None:
                continue
            attachment = slot.home() if slot.home is not None else None
            entry = slot.entry() if slot.entry is not None else None
            if attachment is None or entry is None:
                continue
            attachment.idle.remove(entry)
            self.renewing = slot
            slot.state, slot.holder, since = HELD, None, slot.since
            self.out += 1
            return [Renew(slot, entry, since)]
        return self._due(self.lifetimes[0][0]) if self.lifetimes and self.renewing is None else []

    def renewed(self, slot: Slot, entry: Any, since: float, now: float) -> Work:
        """Take back what was renewed, or could not be; unless somebody waits, it is as idle as before."""
        self.renewing = None
        attachment = slot.home() if slot.home is not None else None
        work: Work = []
        if slot.state is HELD and attachment is not None:
            work = self.give_unused(attachment, entry, now) or []
            if slot.state is IDLE and slot.handle is not None:
                work += self._count_lifetime(slot)
                slot.since = since
                idle = attachment.idle
                idle.remove(entry)
                idle.insert(sum(other.slot.since <= since for other in idle), entry)
                work += self._due(since + attachment.ttl)
        return work + self._renew(now)

    def expire_now(self, attachment: Attachment, now: float) -> Work:
        """End the lifetime of all that an engine has: one after the other is renewed, those out at home."""
        for slot in attachment.quota.slots:
            if slot.home is attachment.ref and slot.handle is not None:
                slot.expires = now
                heapq.heappush(self.lifetimes, (now, id(slot), weakref.ref(slot)))
        return self._renew(now)

    def reserve(self, attachment: Attachment, now: float) -> Permit | None:
        """Return the right to open one more for an engine that has fewer than its ``min_size``, or None."""
        free = not attachment.quota.full and len(self.slots) < self.limit and not self.queues
        if not free or self._size(attachment) >= attachment.min_size or not self.may_connect(now):
            return None
        permit = self._permit(attachment, 0, now, None)
        permit.slot.holder = None
        return permit


def _arrival(waiter: Waiter) -> float:
    return waiter.since
