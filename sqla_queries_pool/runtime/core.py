"""What engines do with a pool: check out, open, check in, close."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

from ..budget.audit import COLLECTED, UNDER_WAY, Audit, Finding, findings, mend
from ..budget.ledger import GAVE_WAY, LOOK_EVERY, PATIENCE, SPARE
from ..budget.slots import HELD, Attachment, NotHeld, Permit, Rejected, Wake, Work
from ..concurrency.callers import here
from ..concurrency.gates import ThreadWaiter
from ..concurrency.housekeeping import Worker
from ..labels import checkout_label
from ..logs import logger
from ..pool.connection import Connection
from ..sockets.lingering import Lingering
from .effects import Effects
from .garbage import GC_AFTER, collect_garbage

InVain: TypeAlias = Callable[[ThreadWaiter, float], None]
LOOKS_COST = 100.0
"""How many times as long as it took nobody looks at the books again because he waits in vain."""


def looks(alone: bool, gc_after: float) -> Iterator[float]:
    """After how many seconds whoever waits looks for something, if not earlier.

    :param alone: are there no others, whose idle connections may be had after a while?
    :param gc_after: after how many seconds it looks for what is wrong.
    """
    yield from () if alone else (SPARE, PATIENCE)
    yield from itertools.count(gc_after, 1.0)  # so that nothing depends on one wake-up


every_pool: weakref.WeakSet[Core] = weakref.WeakSet()
"""All that there are in the process, also those that no PoolManager knows."""


class _Visit:
    """Tells when the housekeeper has come by."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def sweep(self) -> None:
        self.over.set()

    def neglected(self) -> None:
        self.over.set()


class Core(Effects):
    """What engines do with a pool.

    :param pool_id: the pool id.
    :param time_method: a monotonic clock in seconds, in place of ``time.monotonic``.
    """

    abandoned_at: ClassVar[float] = -math.inf
    """When the collector last brought home what nobody had closed, in any pool, by ``time.monotonic``: each
    takes it a round trip, and it comes to the next when that is over."""

    def __init__(self, pool_id: str, time_method: Callable[[], float] | None = None) -> None:
        super().__init__(pool_id, time_method)
        self.id = pool_id
        self.listed = True
        """Does the PoolManager know it?  ``remove`` takes a pool off the list whose engines live on;
        their next opening puts it there again."""
        self.on_vacant: Callable[[Core], None] = _nothing
        """Called by the housekeeper when there were no slots and no engines for the idle TTL; the
        PoolManager's, for the pools that it knows."""
        self._warned_of_no_limit = False
        self._mended: deque[str] = deque(maxlen=100)
        """What was put right since the last audit."""
        self._suspects: dict[Finding, float] = {}
        """What looked wrong last time, and since when."""
        self._mend_at = -math.inf
        """When the housekeeper looks for something to mend again."""
        self._books_at = -math.inf
        """When who waits in vain may look at the books again (``time.monotonic``): a look goes through all
        connections."""
        every_pool.add(self)

    # -- checkout and check-in ----------------------------------------------------------------------

    def take(self, attachment: Attachment, since: float | None = None) -> Any:
        """Return an entry that the caller now holds, a :class:`Permit` to open a connection, or, where there
        is no slot, a :class:`ThreadWaiter`: the caller is in line, and has to :meth:`wait` with it.

        :param since: since when it waits, by the pool's clock, if it was in line before: it has its place
            again.
        :raises CheckoutReentered: this thread is inside the pool already.
        """
        # _decide() by hand: 0.2 of the 0.9 microseconds that a checkout takes in here.
        ledger = self._ledger
        try:
            with self._lock:
                if self._inside:
                    raise self._reentered()
                self._inside = True
                try:
                    now = self._clock()
                    entry = ledger.take(attachment, here.caller, now)
                    if entry is None:  # at once, lest others come and go before it looks again
                        entry = ThreadWaiter(attachment, here.caller, checkout_label.get())
                        ledger.enqueue(entry, now, since)
                finally:
                    self._inside = False
        finally:
            if self._inbox:
                self._settle()
        if now > ledger.due:
            self._remind()
        return entry

    def _remind(self) -> None:
        """The housekeeper is late.  It may just be busy; or its thread has died."""
        self._ledger.due = self._clock() + 1.0  # unlocked: at worst it is reminded twice
        self.housekeeper.schedule(self, 0.0)

    def wait(
        self,
        waiter: ThreadWaiter,
        timeout: float,
        gc_on_wait: bool,
        watch: Callable[[], InVain] | None = None,
        again: bool = False,
    ) -> Any:
        """Wait in line for what :meth:`take` returns.

        :param timeout: seconds, ``inf`` for as long as it takes; with 0 it may still have a slot that
            somebody can give up.
        :param gc_on_wait: ask the collector for abandoned connections meanwhile.
        :param watch: makes what is called with the waiter and ``time.monotonic`` when the collector and a
            look at the books have changed nothing; that may raise.
        :param again: it was in line before, and so is not turned away by ``max_waiting``.
        :return: None if ``timeout`` was over first, :class:`Rejected` if it may not wait, or for no
            longer.
        :raises CheckoutReentered: this thread is inside the pool already.
        """
        attachment, ledger = waiter.attachment, self._ledger
        away: Rejected | None = None
        try:
            begin = time.monotonic()
            alone = len(ledger.attachments) == 1 and not ledger.by_hand.quota.slots
            gc_after = min(GC_AFTER, timeout / 2)
            if len(attachment.queue) > attachment.max_waiting and timeout and not again:
                # Whoever may not wait is served as who can't: by what can be opened, or is spare.
                self._do(self._decide(ledger.insist, waiter, self._clock(), True))
                away = self._decide(ledger.reject, waiter, self._clock(), True)
            elif waiter.answer is None:
                # Nearly everybody is served before there is anything to be looked at.
                pause = gc_after if alone else SPARE
                if attachment.pace.price or attachment.queue_target < math.inf:
                    pause = min(pause, ledger.look_in(waiter, self._clock()))
                waiter.wait(max(0.0, min(pause, timeout)))
            if away is None and waiter.answer is None:
                times = (begin + after for after in looks(alone, gc_after))
                away = self._look_while_waiting(
                    waiter, times, begin + gc_after, begin + timeout, gc_on_wait, watch
                )
                if away is None and waiter.answer is None:
                    self._decide(ledger.leave, waiter)
            return away or waiter.answer
        except BaseException:
            entry = self._decide(self._ledger.leave, waiter)
            if entry is not None:
                self._hand_back(attachment, entry)
            raise

    def _look_while_waiting(
        self,
        waiter: ThreadWaiter,
        times: Iterator[float],
        gc_at: float,
        deadline: float,
        gc_on_wait: bool,
        watch: Callable[[], InVain] | None,
    ) -> Rejected | None:
        attachment = waiter.attachment
        in_vain: InVain | None = None
        look = next(times)
        while True:
            now = time.monotonic()
            self._do(self._decide(self._ledger.insist, waiter, self._clock(), now >= deadline))
            if waiter.answer is None and attachment.queue_target < math.inf:
                away = self._decide(self._ledger.reject, waiter, self._clock())
                if away is not None:
                    return away
            if waiter.answer is None and now >= min(max(gc_at, look), deadline):
                # Where others were served meanwhile, threads run, and the collector with them.
                moved, waiter.before = attachment.answered != waiter.before, attachment.answered
                if not moved and gc_on_wait and now >= gc_at:
                    collect_garbage()
                if not moved and now >= self._books_at and self.mend():
                    waiter.wait(2 * UNDER_WAY)
                    self.mend()
                if not moved and watch is not None and waiter.answer is None:
                    in_vain = in_vain or watch()
                    in_vain(waiter, now)
            if waiter.answer is not None or now >= deadline:
                return None
            while look <= now:
                look = next(times)
            pause = min(look - now, self._ledger.look_in(waiter, self._clock()))
            if self._ledger.refusals and (until := self._ledger.retry_at - self._clock()) > 0:
                pause = min(pause, max(0.01, until))
            waiter.wait(max(0.0, min(pause, deadline - time.monotonic())))

    def mend(self) -> bool:
        """Put right what an exception from outside has cut in two, or kept from being told: see audit.py.

        :return: is there something that looks wrong for the first time?  It may be under way; call again.
        """
        begin = time.monotonic()
        found, now = self._decide(self._findings), time.monotonic()
        if now - self.abandoned_at < COLLECTED and found:
            return True  # the collector may still come to tell of them, one after the other
        self._books_at = now + LOOKS_COST * (now - begin)
        self._suspects = {finding: self._suspects.get(finding, now) for finding in found}
        sure = [finding for finding, since in self._suspects.items() if now - since >= finding.patience]
        wrong, work = self._decide(mend, self._ledger, sure, self._clock())
        if wrong:
            self._mended.extend(wrong)
            logger.warning("%s: mended: %s", self.label, "; ".join(wrong))
        self._do(work)
        return len(sure) < len(found)

    def audit(self) -> Audit:
        """Compare the bookkeeping with the sockets and with who is alive, and put right what is wrong.

        It collects garbage, and looks at each connection; where something looks wrong, it looks again when
        the worker has done what it had to do, for it may be under way.  To be called now and then, in tests,
        or in doubt.  What is mended is a bug, or the work of an exception from outside (Ctrl-C,
        ``PyThreadState_SetAsyncExc``).

        :raises CheckoutReentered: this thread is inside the pool already.
        """
        gc.collect()
        connections = len(self._ledger.slots)
        dead = self._close_dead(list(self._ledger.everyone()))
        stray = self._stray()
        if self.mend() or stray:
            self._wait_for_others(max(2 * UNDER_WAY, self.abandoned_at + COLLECTED - time.monotonic()))
            if self.mend():
                self._wait_for_others(2 * UNDER_WAY)
                self.mend()
            stray = [slot for slot in self._stray() if slot in stray]
        for slot in stray:
            self._mended.append(f"{slot!r}: open, but not counted")
            self._drop_handle(slot)
        for key in [key for key, slot in list(self._by_handle.items()) if id(slot.handle) != key]:
            self._by_handle.pop(key, None)
        mended = tuple(self._mended)
        self._mended.clear()
        return Audit(connections, dead, mended)

    def _wait_for_others(self, seconds: float) -> None:
        """Wait until the worker has done what it had to do, and for so long after that."""
        visit = _Visit()
        self._worker.submit(functools.partial(self.housekeeper.schedule, visit, seconds))
        visit.over.wait(1.0 + seconds)

    def _stray(self) -> list[Connection]:
        """Whose socket is open that counts nowhere."""
        counted = set(self._ledger.slots.copy())
        counted |= {slot.instead_of for slot in counted if slot.instead_of is not None}
        handles = list(self._by_handle.values())
        return [slot for slot in handles if slot not in counted and slot.handle is not None]

    def _findings(self) -> list[Finding]:
        found = findings(self._ledger)
        # Whose closing is done by now has a letter in the inbox, put there before the work was dropped: so
        # look at the letters last.
        heard_of = {id(argument) for _, arguments in self._inbox.copy() for argument in arguments}
        return [finding for finding in found if id(finding.slot) not in heard_of]

    @property
    def at_rest(self) -> bool:
        """Is there no letter to be read, and does the server let us in?"""
        return not self._inbox and not self._ledger.refusals

    def _hand_back(self, attachment: Attachment, entry: Any) -> None:
        """Pass on what a waiter was given that can't use it."""
        if isinstance(entry, Permit):
            self.failed(entry, None)
        else:
            self.give_unused(attachment, entry)

    def give(self, attachment: Attachment, entry: Any) -> None:
        """Take an entry back.  Never waits, may be called by a finalizer.

        :raises NotHeld: nobody has it.
        """
        # _post() by hand for when the lock is free: saves 0.3 of 0.8 microseconds.
        if not self._locked_now:
            self._give_later(attachment, entry)
            return
        work: Work | None = None
        try:
            try:
                if self._inside:  # a finalizer of this very thread: the outer call settles
                    self._give_later(attachment, entry)
                    return
                self._inside = True
                try:
                    work = self._ledger.give(attachment, entry, self._clock())
                finally:
                    self._inside = False
            finally:
                self._lock.release()
        finally:
            if self._inbox:
                self._settle()
        if work:
            if len(work) == 1 and work[0].__class__ is Wake:  # _do() by hand: who is woken waits for the GIL
                work[0].waiter.open()
            else:
                self._do(work)

    def give_hollow(self, attachment: Attachment, entry: Any) -> None:
        """Take an entry back whose connection is not to be used again, and is closed if it is open.

        :raises NotHeld: nobody has it.
        """
        try:
            self._drop_handle(entry.slot)
        finally:
            self.give(attachment, entry)

    def _give_later(self, attachment: Attachment, entry: Any) -> None:
        # Its holder alone may give it back, so its state can be read without the lock.
        if entry.slot.state is not HELD:
            raise NotHeld(f"{entry!r} was given back, but it is {entry.slot.state}")
        self._post(self._ledger.give, attachment, entry)

    def bind(self, slot: Connection, entry: Any) -> None:
        """Say what stands for a slot from now on.  Called by who holds it, so without the lock."""
        self._ledger.bind(slot, entry)

    def opened(self, slot: Connection) -> None:
        """The caller of :meth:`take` has opened the connection, and holds it now."""
        self.listed = True
        self._do(self._decide(self._ledger.opened, slot, self._clock()))

    def failed(self, permit: Permit, error: BaseException | None) -> None:
        """The caller of :meth:`take` could not open it; the slot goes to the next waiter."""
        slot: Connection = permit.slot  # type: ignore[assignment]
        try:
            self.close_evicted(permit)
            self._drop_handle(slot)
        finally:
            self._post(self._ledger.failed, slot)

    def close_evicted(self, permit: Permit) -> None:
        """Close what gave way, before the permit is used: at no time are there two sockets."""
        entry, permit.evicts = permit.evicts, None
        if entry is not None:
            self._say_closing(entry.slot, entry, GAVE_WAY)
            self._close_entry(entry.slot, entry)

    def let_go(self, slot: Connection) -> None:
        """The holder of a connection detaches it: it is its own from now on, and closes it."""
        handle = slot.handle
        if handle is not None:
            self._last_open = self._clock()
            key = id(handle)
            self._by_handle.pop(key, None)  # before the slot forgets it: nothing may keep the key of the dead
            slot.handle = None

            def died(_: weakref.ref[Any]) -> None:
                self._detached.pop(key, None)

            try:
                self._detached[key] = weakref.ref(handle, died)
            except TypeError:  # a DBAPI whose connections know no weak references: till it is closed
                self._detached[key] = None
        self._post(self._ledger.let_go, slot)

    def suspect_own(self, attachment: Attachment) -> None:
        """Have all that an engine has looked at before they are used again."""
        self._decide(self._ledger.suspect_own, attachment)

    # -- engines -----------------------------------------------------------------------------------

    def warn_of_no_limit(self) -> None:
        """Say once what a limit is good for: an engine has lifted it."""
        if not self._warned_of_no_limit:
            self._warned_of_no_limit = True
            logger.warning(
                "%s: an engine states no limit, which lifts it for all engines of this database. A peak "
                "then opens as many connections as are asked for, until the server refuses everybody's "
                "(max_connections); with max_size=… those above it wait their turn instead.",
                self.label,
            )

    def attach(self, attachment: Attachment) -> Work:
        """An engine begins to use the pool; the work is the caller's to have done."""
        before = self._ledger.limit
        work = self._decide(self._ledger.attach, attachment, self._engine_died, self._clock())
        self.say_limit(before)
        return work

    def say_limit(self, before: float) -> None:
        """Log the limit if it is another one than before."""
        if (limit := self._ledger.limit) != before:
            logger.info("%s: limit %g instead of %g", self.label, limit, before)

    def dispose(self, attachment: Attachment) -> None:
        """Close an engine's idle connections, and end its generation of connections."""
        self._do(self._decide(self._ledger.dispose, attachment))

    def retire(self, attachment: Attachment) -> None:
        """Let an engine's connections from before its last dispose close: those out, when they come home."""
        self._do(self._decide(self._ledger.retire, attachment))

    def expire_rolling(self, attachment: Attachment) -> None:
        """Renew an engine's connections one after the other, those out when they come home."""
        self._do(self._decide(self._ledger.expire_now, attachment, self._clock()))

    def _engine_died(self, ref: weakref.ref[Attachment]) -> None:
        self._post(self._ledger.detach, ref)

    def sweep(self) -> None:
        """Close what was idle for too long; called by the housekeeper."""
        self._close_dead([a for a in self._ledger.everyone() if a.min_size])
        if self._clock() >= self._mend_at:  # it looks at each connection, so not whenever one is due
            self._mend_at = self._clock() + LOOK_EVERY
            if self.mend():
                self.housekeeper.schedule(self, 2 * UNDER_WAY)
                self._mend_at = -math.inf
        work = self._decide(self._ledger.expire, self._clock())
        self._do_soon(work)
        if self._ledger.vacant(self._clock()):
            self.on_vacant(self)

    def neglected(self) -> None:
        """The housekeeper's thread has died; what is due becomes overdue, which a checkout notices."""
        self._ledger.due = -math.inf

    def after_fork_in_child(self) -> list[Any]:
        """In a forked child: forget the parent's connections, and have locks and threads of its own.

        :return: all that knew the connections, none of which may be finalized in this process.
        """
        slots = {*self._ledger.slots, *self._by_handle.values()}
        slots |= {slot.instead_of for slot in slots if slot.instead_of is not None}
        entries = [slot.entry() for slot in slots if slot.entry is not None]
        self._make_lock()
        self._worker = Worker()
        self.lingering.forget()
        self.lingering = Lingering(self.housekeeper.schedule)
        self._by_handle = {}
        self._detached = {}
        self.last_connect_error = None
        self._do(self._decide(self._ledger.after_fork_in_child, self._clock()))
        return [*slots, *entries]


def _nothing(_: Core) -> None: ...
