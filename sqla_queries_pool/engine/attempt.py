"""One checkout that takes the long way: it waits for a slot, opens a connection, or probes an idle one."""

from __future__ import annotations

import functools
import logging
import math
import time
from typing import Any

from sqlalchemy import exc

from ..budget import slots
from ..budget.slots import Permit, Rejected, Slot, Waiter
from ..concurrency.late import TooLate
from ..errors import PoolDeadlock
from ..insight import deadlock, stacks
from ..insight.diagnosis import SILENT, SUSPENDED, rejected
from ..insight.report import checkout_timeout
from ..insight.snapshot import Diagnosis
from ..labels import checkout_deadline, checkout_label
from ..pool.manager import everywhere
from . import probe
from .opening import Refused, in_runtime, open_connection, reopen
from .records import Record
from .settings import IGNORE, RAISE
from .stages import OPENING, PROBING, WAITING, Stages

LEAST_CONNECT = 1.0
"""Seconds that a connect has after a ping that was not answered, however little is left of the timeout."""
NO_WAITER = (Record, Permit, Rejected, type(None))
"""What else ``Checkouts.take()`` returns."""


class Attempt:
    """One checkout of an engine.

    :param pool: the engine's ``QueriesPool``.
    :param entry: what ``Checkouts.take()`` has returned; a waiter may have waited for a while.
    :param stack: where it was asked for (stacks.py).
    """

    def __init__(self, pool: Any, entry: Any, stack: stacks.Calls) -> None:
        timeout = pool.settings.timeout
        self._pool = pool
        self._core = pool._core
        self._entry = entry
        self._stack = stack
        self._timeout = math.inf if timeout is None else timeout
        now = self._core.now()
        self._since: float = now if isinstance(entry, NO_WAITER) else entry.since
        """Since when it waits, by the pool's clock: its place in the queue."""
        self._began = begin = time.monotonic() - (now - self._since)
        """The same by ``time.monotonic``."""
        self._deadline: float = begin + self._timeout
        """When its time is over, by ``time.monotonic``."""
        self._whose = ""
        """Who has stated :attr:`_deadline`, where there was a choice."""
        stated = checkout_deadline.get()
        if stated is not None:
            self._whose = "the engine's timeout" if timeout is not None else ""
            if stated.at < self._deadline:
                self._deadline, self._whose = stated.at, stated.whose
                self._timeout = max(0.0, round(stated.at - begin, 3))
        self._connects_until: float = math.inf
        """When it leaves a connect, if its time is over: not at all, unless a ping was not answered."""
        self._stages = Stages(begin)
        self._refusal: Exception | None = None
        """The last error of the server that it could not use."""
        self._deadlock: Diagnosis | None = None
        """The deadlock that it is in, as far as the last look could tell."""

    def run(self) -> Record:
        """Return a record whose connection can be used.

        :raises CheckoutTimeout: there was none within ``timeout``.
        :raises Exception: the driver's, if one can't be opened.
        """
        entry, self._entry, again = self._entry, None, False
        while True:
            try:
                left = max(0.0, self._deadline - time.monotonic())
                if again:
                    entry = self._pool._take(self._since) if left else None
                if isinstance(entry, Rejected) or not isinstance(entry, NO_WAITER):
                    entry = self._wait(entry, left, again)
                if entry is None:
                    raise self._suspended() or self._refusal or self._known_refusal() or self._timed_out()
                slot = entry.slot
                slot.label, slot.stack = checkout_label.get(), self._stack
                if isinstance(entry, Permit):
                    self._stages.enter(OPENING)
                    return open_connection(self._pool, entry, self._deadline, self._leaves_at)
                return self._usable(entry)
            except TooLate:
                self._core.section.decide(_leave, entry.slot, self._pool._sides.here.runtime.here.caller)
                # Its cause is the server's last error, if there was one: see report.py.
                raise self._late()  # noqa: B904
            except Refused as error:
                again, self._refusal = True, error.refusal or self._refusal
            except Exception as error:
                self._refusal = None  # its traceback refers to this frame
                self._stages.note(error, self._core.section.label)
                raise

    def _wait(self, waiter: Waiter | Rejected, left: float, again: bool) -> Any:
        self._stages.enter(WAITING)
        if isinstance(waiter, Rejected):
            raise self._got_nothing(self._core.now() - self._since, rejected(waiter))
        watch = None if self._pool.settings.on_deadlock == IGNORE else self._watch
        entry = self._core.checkouts.wait(waiter, left, self._pool._gc_on_wait, watch, again)
        self._deadline += waiter.stood_still
        if isinstance(entry, Rejected):
            raise self._rejected(entry)
        if entry is waiter:  # its loop stood still, and another one got what it was given
            raise Refused(None)
        return entry

    # An error is no local variable where it is raised: its traceback refers to the frame, and so to itself.
    # What the caller has checked out would stay out until the next collection.

    def _rejected(self, why: Rejected) -> Exception:
        found = self._got_nothing(self._core.now() - self._since, rejected(why))
        if why.kind == slots.UNREACHABLE:
            return self._refusal or self._known_refusal() or found
        return found

    def _late(self) -> Exception:
        found = self._deadlock if self._connects_until == math.inf else SILENT
        late = self._got_nothing(self._timeout, found, early=False)
        self._stages.note(late, self._core.section.label)
        late.__suppress_context__ = True  # that it left what it had begun says nothing more
        return late

    @property
    def _leaves_at(self) -> float:
        """When it leaves what it has begun, by ``time.monotonic``.

        That is where a block has stated a deadline, or where a ping was not answered, lest a connect take as
        long again.
        """
        return self._deadline if self._whose else max(self._deadline, self._connects_until)

    def _suspended(self) -> Exception | None:
        if self._pool._attachment.quota.stopped != slots.SUSPENDED:
            return None
        return self._got_nothing(self._timeout, SUSPENDED, early=False)

    def _timed_out(self) -> Exception:
        return self._got_nothing(self._timeout, self._deadlock, early=False)

    def _got_nothing(self, seconds: float, found: Diagnosis | None, early: bool = True) -> Exception:
        """Return the error of a checkout that waited in vain.

        :param seconds: for how long.
        :param found: why, where that is known.
        :param early: did it stop before its timeout, for that reason?
        """
        whose = "" if early else self._whose
        error = checkout_timeout(self._pool._shared, self._pool._sides.here, seconds, found, early, whose)
        level = logging.WARNING if isinstance(error, PoolDeadlock) else logging.INFO
        self._pool.logger.log(level, "%s", error.args[0].partition("\n")[0])
        return error

    def _watch(self) -> Any:
        """Return what looks for a deadlock when a checkout waits in vain."""
        watch = deadlock.Watch(everywhere, self._pool._deadlock_grace, self._began)

        told = False

        def in_vain(waiter: Waiter, now: float) -> None:
            nonlocal told
            self._deadlock = found = watch.still(waiter) if told else watch.hopeless(waiter, now)
            if found is None or told:
                return
            if self._pool.settings.on_deadlock == RAISE:
                raise self._got_nothing(self._core.now() - self._since, found)
            told = True  # once; the error says it again, if it is still so when the time is over
            text = f"{found.cause}: {'; '.join(map(str.strip, found.details.splitlines()))}. {found.remedy}"
            self._pool.logger.warning("%s: most likely %s", self._core.section.label, text)

        return in_vain

    def _known_refusal(self) -> Exception | None:
        """Why the pool was refused, if it is an error of this engine's driver, as callers catch it."""
        error: Exception | None = self._core.admission.refusal()
        driver = getattr(self._pool._dialect, "loaded_dbapi", None)
        return error if driver is None or isinstance(error, driver.Error) else None

    def _usable(self, record: Record) -> Record:
        """Return the record when its connection is known to be alive, or else was replaced."""
        pool, slot = self._pool, record.slot
        # What was handed over was in use a moment ago, so a poll is enough; unless all is to be pinged
        # (ping_after=0), or replaced by the time of day (pool_recycle), which probe.staleness() knows.
        enough = record.attachment.ping_after and pool._recycle < 0
        if enough and not slot.suspect and not slot.poll(0) and not slot.suspect:
            return record
        if self._whose:
            return in_runtime(pool, functools.partial(self._made_usable, record), self._leaves_at)
        return self._made_usable(record)

    def _made_usable(self, record: Record) -> Record:
        pool, slot = self._pool, record.slot
        try:
            if record.dbapi_connection is not None:
                self._stages.enter(PROBING)
                self._probe(record)
            if record.dbapi_connection is None and not self._core.admission.may_connect():
                raise Refused(None)
        except BaseException as error:
            slot.holder = None  # nobody had it: no checkout
            record.return_hollow(error)
            raise
        if record.dbapi_connection is None:
            self._stages.enter(OPENING)
            # With a block's deadline all of this is left, not the connect alone.
            leaves_at = math.inf if self._whose else self._leaves_at
            return reopen(pool, record, leaves_at)
        return record

    def _probe(self, record: Record) -> None:
        """Close a record's connection if it is dead, or is to be replaced."""
        why = probe.staleness(record)
        try:
            alive = why is not None or probe.alive(record, self._deadline)
        except probe.Silent:
            alive, self._connects_until = False, time.monotonic() + LEAST_CONNECT
        if alive and why is None:
            why = self._pool.failover.why_useless(record, self._deadline)
        # Another thread may have found a disconnect meanwhile.
        if alive and (why := why or probe.staleness(record)):
            self._pool.logger.info("Connection %r %s; recycling", record.dbapi_connection, why)
            record.slot.reason = why
            record.close()
        elif not alive:
            self._core.connections.found_dead(record.slot)
            if self._pool.pings:  # as SQLAlchemy has it: older ones are replaced without a ping of theirs
                self._pool._invalidate_time = time.time()
            record.invalidate(exc.DisconnectionError("found dead before it was used"))


def _leave(slot: Slot, caller: Any) -> None:
    """What a caller has begun goes on without it; inside the section, for it may be another's by now."""
    if slot.holder is caller:
        slot.holder = None
