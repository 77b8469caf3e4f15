"""Checkouts and returns: taking a slot, waiting for one, and giving it back."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from ..budget import choice, closing
from ..budget.audit import UNDER_WAY
from ..budget.choice import PATIENCE, SPARE
from ..budget.ledger import GAVE_WAY, Ledger
from ..budget.slots import HELD, Attachment, NotHeld, Permit, Rejected, Slot, Waiter
from ..budget.work import Close, Wake, Work
from ..concurrency.threads import THREADS
from ..labels import checkout_deadline, checkout_label
from .clock import STOOD_STILL
from .closer import Closer
from .connections import Connections
from .critical_section import CriticalSection
from .garbage import GC_AFTER, collect_garbage
from .upkeep import Upkeep

if TYPE_CHECKING:
    from ..host.share import Share

InVain: TypeAlias = Callable[[Waiter, float], None]


def looks(alone: bool, gc_after: float) -> Iterator[float]:
    """After how many seconds a waiter looks for something, if not earlier.

    :param alone: are there no other engines, whose idle connections may be had after a while?
    :param gc_after: after how many seconds it looks for what is wrong.
    """
    yield from () if alone else (SPARE, PATIENCE)
    yield from itertools.count(gc_after, 1.0)  # so that nothing depends on one wake-up


def stood_still(late: float) -> float:
    """Return for how many seconds the process stood still if a wait ended so many seconds late."""
    return late if late > STOOD_STILL else 0.0


class Checkouts:
    """What engines do with a pool's slots.  They keep it, so it is the same one after a fork.

    :param on_opened: called when an engine has opened a connection.
    """

    def __init__(self, on_opened: Callable[[], None]) -> None:
        self._on_opened = on_opened
        self.share: Share | None = None
        """The pool's part in a budget of the host, where it has one."""

    def use(
        self,
        section: CriticalSection,
        ledger: Ledger,
        connections: Connections,
        upkeep: Upkeep,
        closer: Closer,
    ) -> None:
        """Use these from now on.

        :param section: the pool's critical section.
        :param ledger: the pool's ledger.
        :param connections: the open connections.
        :param upkeep: mends what keeps a slot from a waiter.
        :param closer: closes what gave way, and frees what takes long to close.
        """
        self._section = section
        self._ledger = ledger
        self._connections = connections
        self._upkeep = upkeep
        self._closer = closer
        self._lock = section.lock
        self._attempt = section.attempt
        self._inbox = section.inbox
        self._clock = section.clock

    def take(self, attachment: Attachment, since: float | None = None) -> Any:
        """Return an entry that the caller now holds, a :class:`Permit` to open a connection, or, where there
        is no slot, a waiter: the caller is in the queue, and has to :meth:`wait` with it.  It may have waited
        until there is something to look for; nearly all are served before that.

        :param since: since when it waits, by the pool's clock, if it was in the queue before: it has its
            place again.
        :raises CheckoutReentered: this thread is inside the pool already.
        """
        # section.decide() written out: 0.2 of the 0.9 microseconds that a checkout takes in here.
        section, ledger, runtime = self._section, self._ledger, attachment.runtime
        waits = False
        try:
            with self._lock:
                if section.inside:
                    raise section.reentered()
                section.inside = True
                try:
                    now = self._clock()
                    entry = ledger.take(attachment, runtime.here.caller, now)
                    if entry is None:  # at once, lest others come and go before it looks again
                        entry = runtime.waiter(attachment, checkout_label.get(), self._declined)
                        ledger.enqueue(entry, now, since)
                        waits = since is None
                finally:
                    section.inside = False
        finally:
            if self._inbox:
                section.settle()
        if now > ledger.due:
            self._upkeep.remind()
        return self._wait_at_first(entry) if waits else entry

    def _wait_at_first(self, waiter: Waiter) -> Any:
        """Wait until there is something to look for; return what was handed over, or the waiter."""
        attachment, ledger = waiter.attachment, self._ledger
        seconds = attachment.first_look
        if not ledger.alone:
            seconds = min(seconds, SPARE)
        opens = attachment.pace.price and len(ledger.slots) < ledger.limit and not attachment.quota.full
        closes = ledger.closing or self._closer.renewals
        if not seconds or opens or closes or self.share is not None or checkout_deadline.get() is not None:
            return waiter
        try:
            self._sleep(waiter, seconds)
            if waiter.answer is None or isinstance(waiter.answer, Permit):
                return waiter  # the long way knows for how long it has waited
            return waiter.accept() or waiter
        except BaseException:
            self._section.decide(ledger.leave, waiter)
            self._declined(waiter)
            raise

    def wait(
        self,
        waiter: Waiter,
        timeout: float,
        gc_on_wait: bool,
        watch: Callable[[], InVain] | None = None,
        again: bool = False,
    ) -> Any:
        """Wait in the queue for what :meth:`take` returns.

        :param timeout: seconds, ``inf`` for as long as it takes; with 0 it may still have a slot that
            another engine can give up.
        :param gc_on_wait: ask the collector for abandoned connections meanwhile.
        :param watch: makes what is called with the waiter and ``time.monotonic`` when the collector and a
            look for what is to be mended have changed nothing; that may raise.
        :param again: it was in the queue before, and so is not rejected by ``max_waiting``.
        :return: None if ``timeout`` was over first, :class:`Rejected` if it may not wait, or for no
            longer; the waiter itself if its answer went to another: it is to be taken again.
        :raises CheckoutReentered: this thread is inside the pool already.
        """
        attachment, ledger, section = waiter.attachment, self._ledger, self._section
        rejected: Rejected | None = None
        try:
            if self.share is not None:
                self.share.wanted()
            begin = time.monotonic()
            alone = ledger.alone
            gc_after = min(GC_AFTER, timeout / 2)
            fails_fast = attachment.fail_fast_after < math.inf
            if fails_fast:
                rejected = section.decide(ledger.reject, waiter, self._clock())
            if rejected is not None:
                pass
            elif len(attachment.queue) > attachment.max_waiting and timeout and not again:
                # One that may not wait is served as one that can't: by what can be opened, or is spare.
                section.run(ledger.insist, waiter, self._clock(), True)
                rejected = section.decide(ledger.reject, waiter, self._clock(), True)
            elif waiter.answer is None:
                # Nearly all are served before there is anything to be looked for.
                pause = gc_after if alone else SPARE
                if attachment.pace.price or attachment.queue_target < math.inf or fails_fast:
                    pause = min(pause, choice.look_in(ledger, waiter, self._clock()))
                if ledger.closing or self._closer.renewals:
                    self._closer.hurry()  # its time counts from now on
                    pause = min(pause, closing.GRACE)
                if waiter.answer is None:
                    self._sleep(waiter, min(pause, timeout))
            if rejected is None and waiter.answer is None:
                times = (begin + after for after in looks(alone, gc_after))
                rejected = self._look_while_waiting(
                    waiter, times, begin + gc_after, begin + timeout, gc_on_wait, watch
                )
                if rejected is None and waiter.answer is None:
                    section.decide(ledger.leave, waiter)
            return rejected or (waiter.answer and (waiter.accept() or waiter))
        except BaseException:
            section.decide(ledger.leave, waiter)
            self._declined(waiter)
            raise

    def _sleep(self, waiter: Waiter, seconds: float) -> None:
        """Have it wait, for ``seconds`` at most.

        While the process stands still nobody can be served: that time is added to what it has left, and makes
        no queue overloaded.  Else all that wait would time out together when it goes on.
        """
        begin, at, seconds = time.monotonic(), self._clock(), max(0.0, seconds)  # no time left is not late
        waiter.wait(seconds)
        if waiter.answer is None:
            waiter.stood_still += stood_still(time.monotonic() - begin - seconds)
            if stood_still(self._clock() - at - seconds):
                self._section.decide(self._ledger.stood_still, self._clock())

    def _look_while_waiting(
        self,
        waiter: Waiter,
        times: Iterator[float],
        gc_at: float,
        deadline: float,
        gc_on_wait: bool,
        watch: Callable[[], InVain] | None,
    ) -> Rejected | None:
        attachment, ledger, section = waiter.attachment, self._ledger, self._section
        in_vain: InVain | None = None
        look = next(times)
        given = deadline
        while True:
            now, deadline = time.monotonic(), given + waiter.stood_still
            section.run(ledger.insist, waiter, self._clock(), now >= deadline)
            closes = ledger.closing or self._closer.renewals
            if closes and waiter.answer is None:
                self._closer.hurry(now >= deadline)
            early = min(attachment.queue_target, attachment.fail_fast_after) < math.inf
            if waiter.answer is None and early:
                rejected = section.decide(ledger.reject, waiter, self._clock())
                if rejected is not None:
                    return rejected
            if waiter.answer is None and now >= min(max(gc_at, look), deadline):
                # Where others were served meanwhile, threads run, and the collector with them.
                moved, waiter.before = attachment.answered != waiter.before, attachment.answered
                if not moved and gc_on_wait and now >= gc_at:
                    collect_garbage(attachment.runtime.collect)
                if not moved and self._upkeep.mend_in_passing(now):
                    waiter.wait(2 * UNDER_WAY)
                    self._upkeep.mend()
                if not moved and watch is not None and waiter.answer is None:
                    in_vain = in_vain or watch()
                    in_vain(waiter, now)
            if waiter.answer is not None or now >= deadline:
                return None
            while look <= now:
                look = next(times)
            pause = min(look - now, choice.look_in(ledger, waiter, self._clock()))
            if closes:
                pause = min(pause, closing.GRACE)
            if ledger.backoff.refusals and (until := ledger.backoff.retry_at - self._clock()) > 0:
                pause = min(pause, max(0.01, until))
            self._sleep(waiter, min(pause, deadline - time.monotonic()))

    def _declined(self, waiter: Waiter) -> None:
        """Pass on what a waiter was given, if anything, that can't use it."""
        entry = waiter.accept()
        if isinstance(entry, Permit):
            self.failed(entry)
        elif entry is not None:
            self.give_unused(waiter.attachment, entry)

    def give(self, attachment: Attachment, entry: Any) -> None:
        """Take an entry back.  Never waits, may be called by a finalizer.

        :raises NotHeld: nobody has it.
        """
        # section.post() written out for when the lock is free: saves 0.3 of 0.8 microseconds.
        section = self._section
        if not self._attempt.taken_now:
            self._give_later(attachment, entry)
            return
        work: Work | None = None
        try:
            try:
                if section.inside:  # a finalizer of this very thread: the outer call settles
                    self._give_later(attachment, entry)
                    return
                section.inside = True
                try:
                    work = self._ledger.give(attachment, entry, self._clock())
                finally:
                    section.inside = False
            finally:
                self._attempt.release()
        finally:
            if self._inbox:
                section.settle()
        if work:
            if len(work) == 1 and work[0].__class__ is Wake:  # the one that is woken waits for the GIL
                work[0].waiter.wake()
            else:
                section.effects.do(work)

    def give_hollow(self, attachment: Attachment, entry: Any) -> None:
        """Take an entry back whose connection is not to be used again, and is closed if it is open.

        :raises NotHeld: nobody has it.
        """
        try:
            self._connections.drop(entry.slot)
        finally:
            self.give(attachment, entry)

    def give_unused(self, attachment: Attachment, entry: Any) -> None:
        """:meth:`give`, of what was taken to be opened or passed on: no checkout."""
        self._section.post(self._ledger.give_unused, attachment, entry)

    def _give_later(self, attachment: Attachment, entry: Any) -> None:
        # Its holder alone may give it back, so its state can be read without the lock.
        if entry.slot.state is not HELD:
            raise NotHeld(f"{entry!r} was returned, but it was not checked out: it is {entry.slot.state}")
        self._section.post(self._ledger.give, attachment, entry)

    def reserve(self, attachment: Attachment) -> Permit | None:
        """Return the right to open one more for an engine that has fewer than its ``min_size``, or None."""
        if self.share is not None:
            self.share.room()
        return self._section.decide(self._ledger.reserve, attachment, self._clock())

    def bind(self, slot: Slot, entry: Any) -> None:
        """Say what stands for a slot from now on.  Called by its holder, so without the lock."""
        self._ledger.bind(slot, entry)

    def opened(self, slot: Slot) -> None:
        """The caller of :meth:`take` has opened the connection, and holds it now."""
        self._on_opened()
        self._section.run(self._ledger.opened, slot, self._clock())

    def failed(self, permit: Permit) -> None:
        """The caller of :meth:`take` could not open it; the slot goes to the next waiter."""
        try:
            self.close_evicted(permit)
            self._connections.drop(permit.slot)
        finally:
            self._section.post(self._ledger.failed, permit.slot)

    def close_evicted(self, permit: Permit) -> None:
        """Close what gave way, before the permit is used: at no time are there two sockets."""
        entry, permit.evicts = permit.evicts, None
        if entry is not None:
            home = permit.slot.home() if permit.slot.home is not None else None
            runtime = THREADS if home is None else home.runtime
            self._closer.give_way(Close(entry.slot, entry, GAVE_WAY), runtime)

    def let_go(self, slot: Slot) -> None:
        """The holder of a connection detaches it: it is its own from now on, and does not count."""
        self._connections.let_go(slot)
        self._section.post(self._ledger.let_go, slot)
