"""Who has which slot of one database's budget, and who gets one next.

Pure: no lock, no thread, no clock, no I/O, nothing of SQLAlchemy.  The pool calls every method with its
lock held and passes the time in, in seconds by its clock; what has to be done outside the lock (wake, close,
reset, call again later) is returned as a list of work (work.py).  Reads by properties take no lock and may be
a moment old.

choice.py has the rules by which it chooses, state.py the steps that it is made of.  The operations that no
checkout needs are functions, by theme: engines.py (who uses the pool, and the limit), ages.py (idle TTL and
lifetimes), closing.py, stopping.py and locks.py.

What always holds when no method is running; :func:`audit.check` asserts it:

1. The slots in use do not exceed the limit; where a lowered limit left more, they only get fewer.
2. No waiter waits that could be served: by a free slot, or by one that another engine can spare (design 6
   says when), unless it is better to wait for a connection that is out (design 24); as for what time
   brings about, once the waiter has insisted.
3. A slot is opening, idle, held, locked by a session, or closing: exactly one.
4. A waiter is in the queue of its engine until it is answered, and never after.
5. A slot that is opening ends as opened or failed, and a failure serves the next waiter.
6. No idle connection is of a retired generation.
7. No engine uses more slots than its own ceiling, unless it passed its pool's limit on a lowering.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

from . import choice
from .queue import mean as moving_mean
from .slots import (
    CLOSING,
    DRAINED,
    HELD,
    IDLE,
    LOCKED,
    OPENING,
    SUSPENDED,
    Attachment,
    NotHeld,
    Permit,
    Rejected,
    Slot,
    Waiter,
)
from .state import LedgerState
from .stats import BOUNDS, SHORTEST
from .work import Close, Resetter, Wake, Work

IDLE_TTL = "idle for longer than idle_ttl"
DISPOSED = "ended by dispose() or expire()"
GAVE_WAY = "gave way to another engine"
LOWERED = "max_size was lowered"
ABANDONED = "abandoned by its holder"
REMOVED = "removed through the queries API"
ENDED = "its event loop has ended"


class Ledger(LedgerState):
    """One pool's budget: who gets which slot."""

    # -- the hot path ------------------------------------------------------------------------------

    def take(self, attachment: Attachment, holder: Any, now: float) -> Any:
        """Return an entry for this engine, now held (or opening, if a :class:`Permit`), None, or why the
        checkout is rejected."""
        if attachment.idle:
            entry = attachment.pop()
            slot = entry.slot
            if now - slot.since >= attachment.ping_after or now >= slot.expires:
                slot.suspect = True
            slot.holder = holder  # first: held by nobody is what the pool renews
            slot.state = HELD
            slot.since = now
            slot.uses += 1
            self.out = out = self.out + 1
            if out > self.peak_held:
                self.peak_held = out
            return entry
        if attachment.quota.stopped == DRAINED:
            return Rejected(DRAINED, "its engine was drained")
        if attachment.hollow and not attachment.queue and self.backoff.may_connect(now):
            return self._hold(attachment.hollow.pop(), holder, now)
        if attachment.queue:
            return None  # time may have changed what the first waiter may have: nobody overtakes
        return self._open(attachment, holder, now, insist=False)

    def give(self, attachment: Attachment, entry: Any, now: float) -> Work | None:
        """Take an entry back from its holder.

        :raises NotHeld: nobody had it, or another engine's holder.
        """
        slot = entry.slot
        if slot.state is not HELD or slot.home is not attachment.ref:
            raise NotHeld(f"{entry!r} was returned, but it was not checked out: it is {slot.state}")
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
            work = self._give_on(attachment, entry, slot, now)
            # Those that what is returned serves in time never look for themselves.
            return work + self._use_spare(now) if self.queues and now >= self.spare_at else work
        attachment.idle.append(entry)
        if now + attachment.ttl < self.due:
            return self.expire_by(now + attachment.ttl)
        return None

    def give_unused(self, attachment: Attachment, entry: Any, now: float) -> Work | None:
        """:meth:`give`, of what was taken to be opened or passed on: it counts as no checkout."""
        entry.slot.holder = None
        return self.give(attachment, entry, now)

    # -- giving and taking, the rest ---------------------------------------------------------------

    def _hold(self, entry: Any, holder: Any, now: float) -> Any:
        slot: Slot = entry.slot
        slot.holder = holder
        self.move(slot, HELD)
        slot.since = now
        slot.uses += 1
        return entry

    def _give_on(self, attachment: Attachment, entry: Any, slot: Slot, now: float) -> Work:
        """Pass on an entry that was returned: to a waiter, to be closed, or to the idle ones."""
        if len(self.slots) > self.limit and len(self.slots) - len(self.closing) > self.limit:
            return [self.close(entry, LOWERED), *self.serve(now)]
        if slot.generation < attachment.retired and not self._serves_yet(attachment, slot):
            return [self.close(entry, DISPOSED), *self.serve(now)]
        if len(self.queues) == 1 and attachment.queue and slot.handle is not None:
            first = next(iter(attachment.queue))
            return [self._answer(first, self._hold(entry, first.holder, now), now)]
        if slot.handle is not None and now >= slot.expires and not self.queues:
            return self._idle_again(attachment, entry, now) + self.note_lifetime(slot) + self.renew(now)
        hollow = slot.handle is None
        waiter = choice.next_for(self, attachment, hollow, now)
        connects = waiter is not None and (hollow or waiter.attachment is not attachment)
        if connects and not self.backoff.may_connect(now):
            waiter = None if hollow else next(iter(attachment.queue), None)
        return self._pass_on(attachment, entry, waiter, now)

    @staticmethod
    def _serves_yet(attachment: Attachment, slot: Slot) -> bool:
        """Is it drained, and serves those that wait already?"""
        return attachment.quota.stopped == DRAINED and bool(attachment.queue) and slot.handle is not None

    def _pass_on(self, attachment: Attachment, entry: Any, waiter: Waiter | None, now: float) -> Work:
        """Give what was returned to a waiter, whichever engine's, or to the idle ones."""
        if waiter is None:
            return self._idle_again(attachment, entry, now)
        if waiter.attachment is attachment:
            # Direct hand-over: never idle in between, so no newcomer can overtake.
            return [self._answer(waiter, self._hold(entry, waiter.holder, now), now)]
        self.remove(entry.slot)
        permit = self._permit(waiter.attachment, waiter.holder, now, entry)
        return [self._answer(waiter, permit, now), *self.serve(now)]

    def _use_spare(self, now: float) -> Work:
        """Give waiters what another engine has had idle for a while, if it has."""
        self.spare_at = now + choice.SPARE
        return [] if self.alone else self.serve(now)

    def _idle_again(self, attachment: Attachment, entry: Any, now: float) -> Work:
        slot = entry.slot
        (attachment.idle if slot.handle is not None else attachment.hollow).append(entry)
        return self.expire_by(now + attachment.ttl)

    def _open(
        self, attachment: Attachment, holder: Any, now: float, insist: bool, last: bool = False
    ) -> Permit | None:
        """Return the right to open a connection, or None: all is full and no connection can give way, or it
        is better to wait.

        :param insist: have a connection give way that its engine is about to use again.
        :param last: it can't wait.
        """
        quota = attachment.quota
        full = len(self.slots) >= self.limit or quota.full
        if full and self.alone and not (attachment.idle or attachment.hollow or attachment.locked):
            return None  # nothing can give way, as for most that begin to wait
        if choice.unreachable(self, attachment, now) and choice.probes(self, attachment, now):
            return None
        if self.backoff.pausing(now) or quota.stopped == SUSPENDED:
            return None
        if not last and choice.may_wait(self, attachment, holder, now):
            return None
        evicts = None
        if full or self.backoff.refusals:  # a server that is full has room for what gives way here
            before = now if insist or not attachment.own else now - choice.SPARE
            evicts = choice.pick(self, attachment, quota.full, before)
            if evicts is not None:
                self.remove(evicts.slot)
            elif full:
                return None
        self.backoff.may_connect(now)
        if attachment.queue:
            out = sum(1 for _ in self.held_of(attachment))
            attachment.pace.opened(self.wanting(attachment), out, self.mean_connect, now)
        return self._permit(attachment, holder, now, evicts)

    def _permit(self, attachment: Attachment, holder: Any, now: float, evicts: Any) -> Permit:
        slot = self._new_slot()
        slot.holder = holder
        self.move(slot, OPENING)
        slot.since = now
        slot.uses = 1
        slot.instead_of = None if evicts is None else evicts.slot
        permit = Permit(slot, evicts)
        self.bind(slot, permit)
        self._add(slot, attachment)
        self.opening.add(slot)
        return permit

    def reserve(self, attachment: Attachment, now: float) -> Permit | None:
        """Return the right to open one more for an engine that has fewer than its ``min_size``, or None."""
        room = not attachment.quota.full and len(self.slots) < self.limit
        free = room and not self.heads() and not attachment.quota.stopped
        if not free or self.size_of(attachment) >= attachment.min_size or not self.backoff.may_connect(now):
            return None
        permit = self._permit(attachment, 0, now, None)
        permit.slot.holder = None
        return permit

    # -- waiting -----------------------------------------------------------------------------------

    def enqueue(self, waiter: Waiter, now: float, since: float | None = None) -> None:
        """Put a waiter in the queue of its engine: :meth:`take` has just found nothing for it.

        :param since: it was in the queue before, since then, and could not use what it got.
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
        if since is not None:  # only such a waiter goes before others
            for other in [w for w in queue if w.since > since]:
                queue.move_to_end(other)
        self.queues[attachment] = None

    def insist(self, waiter: Waiter, now: float, last: bool = False) -> Work:
        """A waiter asks again: is there, by now, an idle connection whose slot its queue may have?

        :param last: it is about to give up, and so may have any.
        """
        queue = waiter.attachment.queue
        if waiter not in queue:
            return []
        work: Work = []
        while (first := self.first(waiter.attachment)) is not None:  # nobody overtakes, also not by insisting
            insist = last or choice.may_insist(first, now)
            permit = self._open(first.attachment, first.holder, now, insist, last)
            if permit is None:
                break
            work.append(self._answer(first, permit, now))
            # A waiter that is about to give up may have connections opened for those before it, to come to
            # its turn.  Also one that would be the next, if others were not of a class that is served first.
            comes_to_its_turn = last or first.caller_class != waiter.caller_class
            waits_for_it = waiter in queue and comes_to_its_turn and not self.barred(waiter)
            if not (waiter.attachment.pace.granted or waits_for_it):
                break
        return work

    def reject(self, waiter: Waiter, now: float, new: bool = False) -> Rejected | None:
        """Take a waiter out of a queue that is too long for it, or is overloaded; return why, or None.

        :param new: it has just joined, so the length of the queue counts.
        """
        if waiter not in waiter.attachment.queue:
            return None
        why = choice.why_rejected(self, waiter, now, new)
        if why is not None:
            self._leave_queue(waiter)
        return why

    def stood_still(self, now: float) -> None:
        """The process stood still: that nobody was served in time meanwhile makes no queue overloaded."""
        for attachment in self.everyone():
            attachment.pace.in_time = now

    def leave(self, waiter: Waiter) -> Any:
        """Take a waiter out of its queue; return what it was given meanwhile, or None."""
        self._leave_queue(waiter)
        return waiter.answer

    def _answer(self, waiter: Waiter, entry: Any, now: float) -> Wake:
        waiter.answer = entry  # first: one in no queue and without an answer would wait for ever
        entry.slot.label = waiter.label  # a task hears of it a turn of its loop later
        self._leave_queue(waiter)
        attachment, waited = waiter.attachment, now - waiter.since
        if entry.slot.state is HELD:
            self.served_at = now
        attachment.answered += 1
        if attachment.pace.price:
            attachment.pace.was(len(attachment.queue), now)
            attachment.pace.served += entry.slot.state is HELD
        if attachment.queue_target < math.inf:
            self.pace_of(waiter).was_served(waited, attachment.queue_target, now)
        self.mean_wait += (waited - self.mean_wait) / 16
        self.totals.waited.add(waited)
        return Wake(waiter)

    def serve(self, now: float) -> Work:
        """Let the waiters open what can be opened by now, the oldest first."""
        work: Work = []
        while self.queues:
            for waiter in sorted(self.heads(), key=choice.arrival):
                insist = choice.may_insist(waiter, now)
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
        self.served_at = now
        if slot.state is OPENING:
            self.mean_connect = moving_mean(self.mean_connect, now - slot.since)
            self.move(slot, HELD)
        slot.since = now
        work = self.note_lifetime(slot)
        attachment = slot.home() if slot.home is not None else None
        if attachment is not None and attachment.leak_after < math.inf:
            work += self.expire_by(now + attachment.leak_after)
        if attachment is not None and attachment.min_size:
            attachment.warm = True
            if attachment.min_size > self.size_of(attachment):
                work += self.expire_by(now)  # the first of several
        return work + self.let_in(now)

    def let_in(self, now: float) -> Work:
        """The server accepts connections again, or it is no use to wait for it: everybody may try."""
        if not self.backoff.let_in():
            return []
        for attachment in self.queues:
            attachment.pace.granted = len(attachment.queue)  # they have waited for the server
        return self.serve(now)

    def failed(self, slot: Slot, now: float) -> Work:
        """A connection could not be opened: the next waiter may try for itself."""
        self.backoff.began(slot.since)
        return self._free(slot, now)

    def closed(self, slot: Slot, reason: str | None, now: float) -> Work:
        """A connection is closed: its slot is free.  One that gave way to another has no slot to free.

        :param reason: why, for the totals; None where there was no connection.
        """
        if reason is not None:
            self.totals.closed(reason, now)
        slot.entry = None  # its entry dies next, and has nothing more to say
        return self._free(slot, now)

    def let_go(self, slot: Slot, now: float) -> Work:
        """A connection was detached by its holder, which owns it from now on."""
        self.totals.left += 1
        return self._free(slot, now)

    def lost(self, slot: Slot, now: float) -> Work:
        """The entry of a slot has died: nobody can return it any more."""
        session = slot.session() if slot.session is not None else None
        if slot.state is LOCKED and session is not None and not isinstance(session, Resetter):
            # A session has locked an engine's connection, and the engine is gone: the session keeps
            # it, as if it had been added by hand.
            assert slot.quota is not None
            slot.quota.slots.discard(slot)
            slot.entry = None
            self._add(slot, self.by_hand)
            self.by_hand.locked[slot] = slot
            return self.serve(now)  # it no longer counts against the ceiling of its engine
        if slot.state is CLOSING and slot.entry is None:
            return []  # its closing is under way, see below
        return self.cast_off(slot, now)

    def cast_off(self, slot: Slot, now: float, reason: str = ABANDONED) -> Work:
        """Nobody has it: close its connection, if there is one, and free it."""
        evicted, slot.instead_of = slot.instead_of, None
        if slot.state is OPENING and evicted is not None and evicted.handle is not None:
            # The permit died before what gave way was closed: that counts again until it is.
            self.remove(slot)
            evicted.entry = None
            evicted.quota = slot.quota
            self.slots.add(evicted)
            if evicted.quota is not None:
                evicted.quota.slots.add(evicted)
            return [self._closing(evicted, None, reason), *self.serve(now)]
        self.totals.left += slot.state is HELD
        if slot.handle is None:
            return self._free(slot, now)
        if slot not in self.slots:
            return [Close(slot, None, reason)]
        self.opening.discard(slot)
        return [self._closing(slot, None, reason), *self.serve(now)]

    def _free(self, slot: Slot, now: float) -> Work:
        self.remove(slot)
        return self.serve(now) + self.vacancy(now)

    def add(self, slot: Slot, now: float) -> Work | None:
        """Count a connection that was opened elsewhere; None if there is no slot for it."""
        if len(self.slots) >= self.limit:
            return None
        slot.since = now
        self._add(slot, self.by_hand)
        self.move(slot, IDLE)
        self.by_hand.idle.append(slot)
        return self.expire_by(now + self.by_hand.ttl)

    # -- fork --------------------------------------------------------------------------------------

    def fresh(self) -> Ledger:
        """Return a ledger of the same kind that has nothing yet."""
        return Ledger(self._on_lost, self._new_slot)
