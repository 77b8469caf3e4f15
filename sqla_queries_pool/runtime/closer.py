"""Closes connections; and where that takes long, has checkouts wait for the server alone (design 40).

SQLAlchemy calls the ``close`` listeners before it closes a connection, so that they can use it, and they may
take as long as they like.  A checkout may need the slot before that.  It gives a close
:data:`~sqla_queries_pool.budget.closing.GRACE`, and then *cuts* it: it shuts the socket down, by a duplicate
of the descriptor, and the slot is free.  The opening that follows waits until the server has let go, as after
any close (lingering.py).  The one that closes goes on as if nothing had happened: listeners, then the driver.

Who ends the socket is decided by ``Close.claim``, a list with at most one item, and by ``list.pop``, which is
atomic.  No lock, for a close may run in a finalizer.  At first it has :data:`NOT_BEGUN`: who takes that
closes the connection, so nobody else touches the descriptor meanwhile.  The one that closes then puts a
duplicate there for as long as listeners run, and takes it back afterwards.  If it is not there any more, the
one that took it has freed the slot, or is about to.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..budget import closing
from ..budget.ledger import Ledger
from ..budget.slots import Slot
from ..budget.work import NOT_BEGUN, Close
from ..concurrency.housekeeping import Worker
from ..concurrency.threads import THREADS
from ..sockets import liveness
from ..sockets.drivers import is_seen
from ..sockets.lingering import LONGEST, duplicate, let_go
from .connections import LIFETIME, Connections, logger_of
from .critical_section import CriticalSection

CATCH_UP = 5.0
"""Seconds after which the housekeeper looks whether a listener keeps the worker from other closes."""
_FIRST_LOOK, _LONGEST_LOOK = 0.0005, 0.02
"""Seconds after which a checkout looks whether what gives way to it is closed: mostly it is soon."""
_EXECUTES = 1
"""libpq's ``PQTRANS_ACTIVE``: a statement is under way."""


class Closer:
    """Closes what a pool has to close.

    :param worker: closes what nobody else does.
    """

    def __init__(
        self, section: CriticalSection, ledger: Ledger, connections: Connections, worker: Worker
    ) -> None:
        self._section = section
        self._ledger = ledger
        self._connections = connections
        self._worker = worker
        self.renewals: set[Close] = set()
        """What is being closed to be opened again: it is held, by nobody."""
        self._listened: Close | None = None
        """Whose listeners keep the worker."""
        self.remind: Callable[[float], None] = _nothing
        """Has :meth:`catch_up` called in so many seconds."""

    def close(self, item: Close, counts: bool = True) -> None:
        """Close a connection, unless another does, and report that it is closed.

        :param counts: does its slot count until then?  One that gave way has none.
        """
        if not _taken(item):
            return
        slot, was_open = item.slot, item.slot.handle is not None
        armed = self._arm(item)
        try:
            self._close(item)
        finally:
            # If it is open yet, the next look for something to mend has it closed again.
            if self._is_own(item, armed) and counts and slot.handle is None:
                slot.reason = None
                self._section.post(self._ledger.closed, slot, item.reason if was_open else None)

    def _close(self, item: Close) -> None:
        if not (item.queued and _is_heard(item)):
            self._connections.close(item)
            return
        self._listened = item
        self.remind(CATCH_UP)
        try:
            self._connections.close(item)
        finally:
            self._listened = None

    def close_to_renew(self, item: Close) -> bool:
        """Close a connection that is to be opened again; return whether its slot is still there for that.

        :raises Exception: a listener's.
        """
        slot, entry = item.slot, item.entry
        slot.reason = LIFETIME
        logger_of(entry).info("%s: closing %r: %s", self._section.label, slot, LIFETIME)
        item.claim.clear()
        armed = self._arm(item)
        self.renewals.add(item)
        try:
            entry.close()
        finally:
            self.renewals.discard(item)
            own = self._is_own(item, armed)
        return own

    def give_way(self, item: Close, runtime: Any) -> None:
        """Close what gave way to a checkout, which waits for that: for its listeners not for long.

        :param runtime: the checkout's.
        """
        slot = item.slot
        heard = _is_heard(item) and _has_socket(slot)
        home = slot.home() if slot.home is not None else None
        in_own_loop = home is not None and home.runtime is runtime is not THREADS
        if not heard or in_own_loop:  # there a listener may await, and nothing may block
            self.close(item, counts=False)
            return
        item.queued = True
        self._worker.submit(functools.partial(self.close, item, counts=False))
        begin, look = time.monotonic(), _FIRST_LOOK
        try:
            while slot.handle is not None and slot not in self._connections.cut:
                if time.monotonic() - begin >= closing.GRACE and self.cut(item):
                    return
                runtime.pause((), look)
                look = min(2 * look, _LONGEST_LOOK)
        except BaseException:  # the slot is another's next
            self.cut(item, force=True)
            raise

    # -- what takes long ---------------------------------------------------------------------------

    def hurry(self, last: bool = False) -> None:
        """A checkout waits: cut what has kept checkouts waiting for long enough.  Never waits.

        :param last: it is about to give up: for however long.
        """
        for item in self._late(self.renewals.copy(), 0.0 if last else closing.GRACE):
            self.cut(item)

    def _late(self, more: Iterable[Close], patience: float) -> list[Close]:
        section = self._section
        return section.decide(closing.late, self._ledger, more, patience, section.clock())

    @staticmethod
    def queued(items: Iterable[Any]) -> None:
        """These are the worker's to do, one after the other."""
        for item in items:
            item.queued = True

    def catch_up(self) -> bool:
        """Cut what waits behind a close whose listener keeps the worker; return whether there is one."""
        if self._listened is None:
            return False
        for item in self._late((), closing.GRACE):
            if item.queued and NOT_BEGUN in item.claim:
                self.cut(item)
        return True

    def cut(self, item: Close, force: bool = False) -> bool:
        """Free a slot before its connection is closed; return False where that can't be.

        Not while a listener's statement runs: the server would go on with it, and count it.

        :param force: also then.
        """
        slot, worker = item.slot, self._worker
        if slot.handle is not None and not _has_socket(slot):
            return False
        if not force and _executes(slot.handle):
            return False
        try:
            end = item.claim.pop()
        except IndexError:  # it is too late, or nobody listens
            return False
        begun = end != NOT_BEGUN
        if not begun and slot.handle is not None and (end := duplicate(slot.socket)) < 0:
            item.claim.append(NOT_BEGUN)
            worker.submit(functools.partial(self.close, item))  # who should have may have come by
            return False
        self._connections.cut.add(slot)
        if end >= 0:
            self._connections.lingering.cut(end, LONGEST)
        self._section.post(closing.cut, self._ledger, slot)
        self._connections.on_closed()
        if not begun:
            worker.submit(functools.partial(self._finish, item))
        return True

    def _finish(self, item: Close) -> None:
        """Close what was cut before anybody had begun to close it."""
        item.queued = True
        try:
            self._close(item)
        finally:
            self._connections.cut.discard(item.slot)

    def _arm(self, item: Close) -> bool:
        """Let it be cut, if listeners may take long."""
        end = duplicate(item.slot.socket) if _is_heard(item) else -1
        if end >= 0:
            item.claim.append(end)
        return end >= 0

    def _is_own(self, item: Close, armed: bool) -> bool:
        """The close is over: was it cut?"""
        if not armed:
            return True
        try:
            let_go(item.claim.pop())
        except IndexError:
            self._connections.cut.discard(item.slot)
            return False
        return True


def _nothing(_: float) -> None: ...


def _has_socket(slot: Slot) -> bool:
    return liveness.AVAILABLE and is_seen(slot.socket)


def _is_heard(item: Close) -> bool:
    return getattr(item.entry, "heard", False) is True


def _taken(item: Close) -> bool:
    try:
        return item.claim.pop() == NOT_BEGUN
    except IndexError:
        return False


def _executes(handle: Any) -> bool:
    """Does a statement run, as far as the driver knows without asking the server?"""
    try:
        return int(handle.info.transaction_status) == _EXECUTES
    except Exception:  # not psycopg's, or closed
        return False
