"""What engines do with a pool: check out, open, check in, close."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

from .. import liveness
from ..audit import UNDER_WAY, Audit, Finding, findings, mend
from ..callers import here
from ..connect_errors import is_full, passes
from ..errors import QueriesException
from ..gates import ThreadGate
from ..housekeeping import Housekeeper, Worker
from ..labels import checkout_label
from ..ledger import GAVE_WAY, LOOK_EVERY, PATIENCE, SPARE, Ledger
from ..lingering import LONGEST, Lingering
from ..logs import logger
from ..retirement import pause as pause_after
from ..slots import (
    HELD,
    Attachment,
    Close,
    Due,
    EntryRef,
    Fill,
    Leaked,
    NotHeld,
    Permit,
    Renew,
    Resetter,
    Returned,
    Slot,
    TurnedAway,
    Wake,
    Work,
)
from .connection import Connection
from .garbage import GC_AFTER, collect_garbage
from .guard import Guard

LIFETIME = "its lifetime (pool_recycle) is over"
DEAD = "found dead before it was used"
INVALIDATED = "invalidated by its holder"
InVain: TypeAlias = Callable[[ThreadGate, float], None]
AT_ONCE = (Wake, Due, Leaked, Returned)
"""Work that takes no time."""
LOOKS_COST = 20.0
"""How many times as long as it took nobody looks at the books again because he waits in vain."""
REMEMBERED = 30.0
"""Seconds for which a database that was there counts as one that will be there again."""


def looks() -> Iterator[float]:
    """After how many seconds whoever waits looks for something, if not earlier."""
    yield from (SPARE, PATIENCE, GC_AFTER)
    yield from itertools.count(GC_AFTER + 1.0)


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


class Core(Guard):
    """The shell around a :class:`~sqla_queries_pool.ledger.Ledger`: it has the clock and the hands.

    :param pool_id: the pool id.
    :param time_method: a monotonic clock in seconds, in place of ``time.monotonic``.
    """

    housekeeper: ClassVar[Housekeeper] = Housekeeper()

    def __init__(self, pool_id: str, time_method: Callable[[], float] | None = None) -> None:
        super().__init__(pool_id, time_method)
        self.id = pool_id
        self.listed = True
        """Does the PoolManager know it?  ``remove`` takes a pool off the list whose engines live on;
        their next opening puts it there again."""
        self.last_connect_error: BaseException | None = None
        """A copy of why opening failed last, without traceback (that has the password in its
        frames, and the engine); None once a connection was opened."""
        self.on_vacant: Callable[[Core], None] = _nothing
        """Called by the housekeeper when there were no slots and no engines for the idle TTL; the
        PoolManager's, for the pools that it knows."""
        self.on_leak: Callable[[Any, Leaked | Returned], None] = _nothing_of_it
        """Called by the housekeeper when a connection is out for long, or came home after all."""
        self._warned_of_no_limit = False
        self._last_open = -math.inf
        """When a connection was closed last: until then, at least, the database was there."""
        self._mended: deque[str] = deque(maxlen=100)
        """What was put right since the last audit."""
        self._suspects: dict[Finding, float] = {}
        """What looked wrong last time, and since when."""
        self._mend_at = -math.inf
        """When the housekeeper looks for something to mend again."""
        self._books_at = -math.inf
        """When who waits in vain may look at the books again (``time.monotonic``): a look goes through all
        connections."""
        self._worker = Worker()
        self.lingering = Lingering(self.housekeeper.schedule)
        every_pool.add(self)
        self._ledger = Ledger(self._entry_died, self._new_connection)
        self._by_handle: dict[int, Connection] = {}
        """id(handle) -> connection, for as long as the connection refers to the handle."""
        self._detached: dict[int, weakref.ref[Any] | None] = {}
        """id(handle) of connections that were detached and are, as far as one can see, open."""

    # -- checkout and check-in ----------------------------------------------------------------------

    def take(self, attachment: Attachment, since: float | None = None) -> Any:
        """Return an entry that the caller now holds, a :class:`Permit` to open a connection, or, where there
        is no slot, a :class:`ThreadGate`: the caller is in line, and has to :meth:`wait` with it.

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
                        entry = ThreadGate(attachment, here.caller, checkout_label.get())
                        ledger.line_up(entry, now, since)
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
        waiter: ThreadGate,
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
        :return: None if ``timeout`` was over first, :class:`TurnedAway` if it may not wait, or for no
            longer.
        :raises CheckoutReentered: this thread is inside the pool already.
        """
        begin, attachment = time.monotonic(), waiter.attachment
        away: TurnedAway | None = None
        try:
            if len(attachment.line) > attachment.max_waiting and timeout and not again:
                # Whoever may not wait is served as who can't: by what can be opened, or is spare.
                self._do(self._decide(self._ledger.insist, waiter, self._clock(), True))
                away = self._decide(self._ledger.turn_away, waiter, self._clock(), True)
            if away is None and waiter.answer is None:
                # Nearly everybody is served before there is anything to be looked at.
                waiter.wait(max(0.0, min(SPARE, timeout, self._ledger.look_in(waiter, self._clock()))))
                if waiter.answer is None:
                    away = self._look_while_waiting(waiter, begin, begin + timeout, gc_on_wait, watch)
            if away is None and waiter.answer is None:
                self._decide(self._ledger.leave, waiter)
            return away or waiter.answer
        except BaseException:
            entry = self._decide(self._ledger.leave, waiter)
            if entry is not None:
                self._hand_back(attachment, entry)
            raise

    def _look_while_waiting(
        self,
        waiter: ThreadGate,
        begin: float,
        deadline: float,
        gc_on_wait: bool,
        watch: Callable[[], InVain] | None,
    ) -> TurnedAway | None:
        attachment = waiter.attachment
        in_vain: InVain | None = None
        gc_at = begin + min(GC_AFTER, (deadline - begin) / 2)
        # It looks again when time has changed what it may have, and every second, so that nothing depends on
        # one wake-up.
        times = (begin + after for after in looks())
        look = next(times)
        while True:
            now = time.monotonic()
            self._do(self._decide(self._ledger.insist, waiter, self._clock(), now >= deadline))
            if waiter.answer is None and attachment.queue_target < math.inf:
                away = self._decide(self._ledger.turn_away, waiter, self._clock())
                if away is not None:
                    return away
            if waiter.answer is None and now >= min(max(gc_at, look), deadline):
                if gc_on_wait and now >= gc_at:
                    collect_garbage()
                if now >= self._books_at and self.mend():
                    waiter.wait(2 * UNDER_WAY)
                    self.mend()
                if watch is not None and waiter.answer is None:
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
            visit = _Visit()
            self._worker.submit(functools.partial(self.housekeeper.schedule, visit, 2 * UNDER_WAY))
            visit.over.wait(1.0)
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

    def give_unused(self, attachment: Attachment, entry: Any) -> None:
        """:meth:`give`, of what was taken to be opened or passed on: no checkout."""
        self._post(self._ledger.give_unused, attachment, entry)

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

    def refused(self, error: BaseException) -> bool:
        """Is it worth trying again?  Then there is a pause now, in which nobody of this pool connects.

        It is, where the error passes by itself, and the database is there, or was a moment ago; one that is
        not there when the application starts is the application's affair.
        """
        known = self._by_handle or self._clock() - self._last_open <= REMEMBERED
        if not isinstance(error, Exception):
            return False
        if not (known or is_full(error)) or not passes(error):
            # The others wait for nothing: each is to have its own error.
            self._do(self._decide(self._ledger.let_in, self._clock()))
            return False
        self._decide(self._ledger.refused, pause_after, self._clock())
        return True

    def may_connect(self) -> bool:
        """May one connect now, who then does?  Not in the pause after a refusal."""
        return not self._ledger.refusals or self._decide(self._ledger.may_connect, self._clock())

    def refusal(self) -> Exception | None:
        """Return the last refusal, during the pauses after it, where there would be a slot."""
        error = self.last_connect_error
        is_why = self._ledger.refusals and len(self._ledger.slots) < self._ledger.limit
        return _retold(error) if is_why and isinstance(error, Exception) else None

    def failed(self, permit: Permit, error: BaseException | None) -> None:
        """The caller of :meth:`take` could not open it; the slot goes to the next waiter."""
        slot: Connection = permit.slot  # type: ignore[assignment]
        try:
            self.close_evicted(permit)
            self._drop_handle(slot)
        finally:
            self._post(self._ledger.failed, slot)

    def connect_failed(self, error: Exception) -> None:
        """Remember why opening failed, for the error of a checkout that gets nothing."""
        self.last_connect_error = _retold(error)
        self.count("connect_errors")

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

    def wait_for_room(self, seconds: float) -> None:
        """Wait until the server has let go of those that were closed, where there is no room for another.

        :param seconds: at most.
        """
        if self.lingering:
            self.lingering.wait(self._room, seconds)

    def _room(self) -> float:
        if self._ledger.refusals:  # the server may be full, of what was just closed for one
            return 0
        numbers = self._ledger.numbers()
        return self._ledger.limit - numbers.total + numbers.hollow

    def socket_opened(
        self, slot: Connection, handle: Any, generation: int, lifetime: float, seconds: float
    ) -> None:
        """A slot's holder has opened a socket for it.  Without the lock: the slot is its own.

        :param seconds: how long it took.
        """
        self.last_connect_error = None
        if slot.handle is not None:  # whoever closed it was interrupted
            self._by_handle.pop(id(slot.handle), None)
        slot.expires = self._clock() + lifetime
        slot.poll = liveness.poll_of(handle)
        slot.suspect = False
        slot.generation = generation
        slot.process = os.getpid()
        self._detached.pop(id(handle), None)  # the id of one that died unseen
        self._by_handle[id(handle)] = slot
        slot.handle = handle
        self._post(self._ledger.totals.connected, seconds)

    def socket_closed(self, handle: Any) -> None:
        """A socket was closed, by the holder of its slot or by who detached it."""
        slot = self._by_handle.get(id(handle))
        if slot is not None and slot.handle is handle:
            self._last_open = self._clock()
            del self._by_handle[id(handle)]
            slot.handle = slot.poll = None
            slot.suspect = True
            reason, slot.reason = slot.reason or INVALIDATED, None
            self._post(self._ledger.totals.closed, reason)
        else:
            self._detached.pop(id(handle), None)

    def found_dead(self, slot: Connection) -> None:
        """A connection was found dead before it was used: older ones are suspect."""
        slot.reason = DEAD
        self.count("dead")
        liveness.hang_up(slot.handle, socket.SHUT_WR)
        self._decide(self._ledger.suspect, self._clock())

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

    def reserve(self, attachment: Attachment) -> Permit | None:
        """Return the right to open one more for an engine that has fewer than its ``min_size``, or None."""
        return self._decide(self._ledger.reserve, attachment, self._clock())

    def _engine_died(self, ref: weakref.ref[Attachment]) -> None:
        self._post(self._ledger.detach, ref)

    def _entry_died(self, ref: EntryRef) -> None:
        self._post(self._ledger.lost, ref.slot)

    def count(self, what: str) -> None:
        """One more of what is just counted in :class:`Totals`."""
        self._post(self._ledger.totals.one_more, what)

    def _new_connection(self) -> Connection:
        raise NotImplementedError

    # -- closing and resetting ---------------------------------------------------------------------

    def _close(self, item: Close) -> None:
        try:
            self._say_closing(item.slot, item.entry, item.reason)
            self._close_entry(item.slot, item.entry)
        finally:
            if item.slot.handle is None:  # else who looks for something to mend has it closed again
                self._post(self._ledger.closed, item.slot)

    def _say_closing(self, slot: Slot, entry: Any, reason: str) -> None:
        slot.reason = reason
        _logger_of(entry).info("%s: closing %r: %s", self.label, slot, reason)

    def _close_entry(self, slot: Slot, entry: Any) -> None:
        """Close as SQLAlchemy does where there is a record, and in any case."""
        try:
            if entry is not None and entry is not slot and slot.process == os.getpid():
                entry.close()
        except Exception:
            _logger_of(entry).exception("%s: exception while closing %r", self.label, slot)
        finally:
            self._drop_handle(slot)

    def _drop_handle(self, slot: Slot) -> None:
        """Close the DBAPI connection itself, where nobody did."""
        handle = slot.handle
        if handle is None:
            return
        self.socket_closed(handle)
        slot.handle = None
        if slot.process == os.getpid():
            with self.lingering.closing(handle, LONGEST):
                close_quietly(handle, self.label)

    def _reset(self, slot: Slot, if_stale: bool = False) -> None:
        """Take a session's lock, roll back what it left, then give the connection back; or close it."""
        me = Resetter()
        if not self._decide(self._ledger.unlock, slot, weakref.ref(me), if_stale):
            return
        handle = slot.handle
        if handle is None:  # closed by force meanwhile
            return
        try:
            if slot.entry is not None and (record := slot.entry()) is not None:
                record.reset()
            elif _in_transaction(handle) is not False:
                handle.rollback()
            if _in_transaction(handle):
                # BEGIN in autocommit mode, where psycopg2's rollback() does nothing.
                handle.cursor().execute("ROLLBACK")
        except BaseException as error:
            logger.warning("%s: closing %r: rollback failed: %r", self.label, slot, error)
            self.count("failed_resets")
            self._do(self._decide(self._ledger.close_one, slot, True))
            if not isinstance(error, Exception):
                raise
        else:
            self._do(self._decide(self._ledger.give_lent, slot, self._clock()))

    def _renew(self, item: Renew) -> None:
        self._say_closing(item.slot, item.entry, LIFETIME)
        try:
            item.entry.close()
            item.entry.get_connection()
        except Exception as error:
            self.refused(error)
            self._drop_handle(item.slot)
            _logger_of(item.entry).warning("%s: could not renew %r: %r", self.label, item.slot, error)
        finally:
            self._do(self._decide(self._ledger.renewed, item.slot, item.entry, item.since, self._clock()))

    def _fill(self, attachment: Attachment) -> None:
        """Open what an engine's ``min_size`` asks for, as far as there is room."""
        opener = attachment.opener()
        try:
            while opener is not None and (permit := self.reserve(attachment)) is not None:
                self.give_unused(attachment, opener(permit))
        except Exception as error:
            why = error.__cause__ or error
            logger.warning("%s: could not open a spare connection: %r", self.label, why)

    def _close_dead(self, attachments: list[Attachment]) -> int:
        """Find out who has died among those that are idle, before a checkout does; return how many."""
        dead = 0
        for slot in [entry.slot for attachment in attachments for entry in list(attachment.idle)]:
            # A poll of its own: that of the slot is its holder's, which anybody may be by now.
            handle = slot.handle
            if liveness.look(handle, liveness.poll_of(handle)) is liveness.DEAD:
                work = self._decide(self._ledger.close_one, slot, False, DEAD)
                for _ in work:
                    self.count("dead")
                dead += len(work)
                self._do_soon(work)
        return dead

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

    def start_anew(self) -> list[Any]:
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
        self._do(self._decide(self._ledger.start_anew, self._clock()))
        return [*slots, *entries]

    # -- the work that the ledger returns ------------------------------------------------------------

    def _do(self, work: Work) -> None:
        """Do what the ledger decided, in order; an exception leaves none of it undone."""
        todo = deque(work)
        try:
            while todo:
                item = todo.popleft()
                if isinstance(item, Wake):
                    item.waiter.open()
                elif isinstance(item, Due):
                    self.housekeeper.schedule(self, item.at - self._clock())
                elif isinstance(item, Close):
                    self._close(item)
                elif isinstance(item, Renew):
                    self._worker.submit(functools.partial(self._renew, item))
                elif isinstance(item, Fill):
                    self._worker.submit(functools.partial(self._fill, item.attachment))
                elif isinstance(item, Leaked | Returned):
                    self.on_leak(self, item)
                else:
                    self._reset(item.slot, True)
        except BaseException:
            self._do_soon(list(todo))
            raise

    def _do_soon(self, work: Work) -> None:
        """Do at once what takes no time; the worker closes and resets."""
        self._do([item for item in work if isinstance(item, AT_ONCE)])
        slow: Work = [item for item in work if not isinstance(item, AT_ONCE)]
        if slow:
            self._worker.submit(lambda: self._do(slow))


def _logger_of(entry: Any) -> Any:
    """An engine's own, which its ``echo_pool`` may have lowered, where it is an engine's."""
    return getattr(entry, "logger", logger)


def close_quietly(handle: Any, label: str) -> None:
    """Close a DBAPI connection that nobody wants; failing to is logged."""
    try:
        handle.close()
    except Exception as error:
        logger.debug("%s: exception while closing a connection: %r", label, error)


def _retold(error: Exception) -> Exception:
    """The kind and the text of an error, and nothing that it refers to.

    Its traceback knows the engine and the password, and drivers hang the failed connection on it (which
    copy.copy() takes off the original: psycopg 3).
    """
    text = str(error)
    try:
        retold = type(error)(text)
        if str(retold) == text:
            return retold
    except Exception:  # one that is made of something else
        pass
    return QueriesException(f"{type(error).__name__}: {text}")


def _in_transaction(handle: Any) -> bool | None:
    """What the driver knows without asking the server: psycopg2 and psycopg do, None for others."""
    status = getattr(getattr(handle, "info", None), "transaction_status", None)
    return None if status is None else int(status) != 0


def _nothing(_: Core) -> None: ...


def _nothing_of_it(_: Core, __: object) -> None: ...
