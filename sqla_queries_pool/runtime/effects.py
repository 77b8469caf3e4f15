"""Does what the ledger decided: wakes, closes, resets, renews and opens, outside the critical section."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ..budget import ages, closing, locks
from ..budget.ledger import Ledger
from ..budget.slots import Attachment, Slot
from ..budget.work import Close, Due, Fill, Leaked, Renew, Reset, Resetter, Returned, Wake, Work
from ..concurrency.housekeeping import Worker
from ..logs import logger
from .admission import Admission
from .closer import Closer
from .connections import LIFETIME, Connections, logger_of
from .critical_section import CriticalSection

AT_ONCE = (Wake, Due, Leaked, Returned, Renew, Fill)
"""Work that takes no time, or is but begun."""


class Effects:
    """Does the work of one pool.

    :param section: the pool's critical section, which hands the work over.
    :param ledger: the pool's ledger, which is called when work is done.
    :param worker: closes.
    :param opener: opens, renews and resets: what waits for the server.
    :param remind: has somebody call :func:`.ages.expire` in so many seconds.
    :param on_leak: called when a connection is out for long, or was returned after all.
    """

    def __init__(
        self,
        section: CriticalSection,
        ledger: Ledger,
        connections: Connections,
        admission: Admission,
        closer: Closer,
        worker: Worker,
        opener: Worker,
        remind: Callable[[float], None],
        on_leak: Callable[[Leaked | Returned], None],
    ) -> None:
        self._section = section
        self._ledger = ledger
        self._connections = connections
        self._admission = admission
        self._closer = closer
        self._worker = worker
        self._opener = opener
        self._filling: weakref.WeakSet[Attachment] = weakref.WeakSet()
        """For whose ``min_size`` the opener has something to do: one job each, however long it takes."""
        self._remind = remind
        self._on_leak = on_leak
        section.effects = self
        self.before_reserving: Callable[[], None] = _nothing
        """Makes room for one more, where the pool shares a budget with other processes."""

    def do(self, work: Work) -> None:
        """Do what the ledger decided, in order; an exception leaves none of it undone."""
        todo = deque(work)
        try:
            while todo:
                item = todo.popleft()
                if isinstance(item, Wake):
                    item.waiter.wake()
                elif isinstance(item, Due):
                    self._remind(item.at - self._section.clock())
                elif isinstance(item, Close):
                    self._closer.close(item)
                elif isinstance(item, Renew):
                    self._begin_renewal(item)
                elif isinstance(item, Fill):
                    self._begin_filling(item.attachment)
                elif isinstance(item, Reset):
                    self.reset(item.slot, if_stale=True)
                else:
                    self._on_leak(item)
        except BaseException:
            self.do_soon(list(todo))
            raise

    def do_soon(self, work: Work) -> None:
        """Do at once what takes no time; the worker closes, the opener resets."""
        self.do([item for item in work if isinstance(item, AT_ONCE)])
        closes: Work = [item for item in work if isinstance(item, Close)]
        if closes:
            self._closer.queued(closes)
            self._worker.submit(lambda: self.do(closes))
        resets: Work = [item for item in work if isinstance(item, Reset)]
        if resets:
            self._opener.submit(lambda: self.do(resets))

    def reset(self, slot: Slot, if_stale: bool = False) -> None:
        """Take a session's lock, roll back what it left, then give the connection back; or close it."""
        section, ledger, me = self._section, self._ledger, Resetter()
        if not section.decide(locks.unlock, ledger, slot, weakref.ref(me), if_stale):
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
            logger.warning("%s: closing %r: rollback failed: %r", section.label, slot, error)
            section.post(ledger.totals.one_more, "failed_resets")
            if slot.entry is None and getattr(handle, "closed", False):
                # Added by hand, and the server is gone: its session may go on to remove it.  Who finds it
                # closed drops it.
                section.run(locks.give_back, ledger, slot, section.clock())
            else:
                section.run(closing.close_one, ledger, slot, True)
            if not isinstance(error, Exception):
                raise
        else:
            section.run(locks.give_back, ledger, slot, section.clock())

    def reset_stale(self, attachment: Attachment) -> None:
        """Reset what sessions have locked that have died."""
        for slot in self._section.decide(locks.stale, self._ledger, attachment):
            self.reset(slot, if_stale=True)

    def _begin_renewal(self, item: Renew) -> None:
        home = item.slot.home() if item.slot.home is not None else None
        if home is None or not home.runtime.submit(self._opener, functools.partial(self._renew, item)):
            # Nothing can be opened in the background: the next checkout does.
            self._opener.submit(functools.partial(self._renew, item, reopen=False))

    def _renew(self, item: Renew, reopen: bool = True) -> None:
        section, slot, entry = self._section, item.slot, item.entry
        try:
            if self._closer.close_to_renew(Close(slot, entry, LIFETIME)) and reopen:
                entry.get_connection()
        except Exception as error:
            self._admission.refused(error)
            self._connections.drop(slot)
            home = slot.home() if slot.home is not None else None
            if home is None or not home.runtime.ending:
                logger_of(entry).warning("%s: could not renew %r: %r", section.label, slot, error)
        finally:
            section.run(ages.renewed, self._ledger, slot, entry, item.since, section.clock())

    def _begin_filling(self, attachment: Attachment) -> None:
        if attachment not in self._filling:
            self._filling.add(attachment)
            if not attachment.runtime.submit(self._opener, functools.partial(self._fill, attachment)):
                self._filling.discard(attachment)

    def _fill(self, attachment: Attachment) -> None:
        """Open what an engine's ``min_size`` asks for, as far as there is room."""
        self._filling.discard(attachment)
        section, ledger, opener = self._section, self._ledger, attachment.opener()
        try:
            while opener is not None and not attachment.runtime.ending:
                self.before_reserving()
                permit = section.decide(ledger.reserve, attachment, section.clock())
                if permit is None:
                    return
                section.post(ledger.give_unused, attachment, opener(permit))
        except Exception as error:
            why = error.__cause__ or error
            if not attachment.runtime.ending:
                logger.warning("%s: could not open a connection for min_size: %r", section.label, why)


def _nothing() -> None: ...


def _in_transaction(handle: Any) -> bool | None:
    """What the driver knows without asking the server: psycopg2 and psycopg do, None for others."""
    status = getattr(getattr(handle, "info", None), "transaction_status", None)
    return status != 0 if isinstance(status, int) else None
