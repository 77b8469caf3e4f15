"""Opening, closing and resetting connections: what is done outside the lock, for engines and by itself."""

from __future__ import annotations

import functools
import math
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from ..budget.ledger import Ledger
from ..budget.slots import (
    Attachment,
    Close,
    Due,
    EntryRef,
    Fill,
    Leaked,
    Permit,
    Renew,
    Resetter,
    Returned,
    Slot,
    Wake,
    Work,
)
from ..concurrency.housekeeping import Housekeeper, Worker
from ..errors import QueriesException
from ..logs import logger
from ..pool.connection import Connection
from ..sockets import liveness
from ..sockets.connect_errors import is_full, passes
from ..sockets.lingering import LONGEST, Lingering
from .critical_section import CriticalSection
from .jitter import pause as pause_after

LIFETIME = "its lifetime (pool_recycle) is over"
DEAD = "found dead before it was used"
INVALIDATED = "invalidated by its holder"
AT_ONCE = (Wake, Due, Leaked, Returned)
"""Work that takes no time."""
REMEMBERED = 30.0
"""Seconds for which a database that was there counts as one that will be there again."""


class Effects(CriticalSection):
    """Does what a :class:`~sqla_queries_pool.budget.ledger.Ledger` has decided.

    :param label: for people: which pool it is.
    :param time_method: a monotonic clock in seconds, in place of ``time.monotonic``.
    """

    housekeeper: ClassVar[Housekeeper] = Housekeeper()

    def __init__(self, label: str, time_method: Callable[[], float] | None = None) -> None:
        super().__init__(label, time_method)
        self.last_connect_error: BaseException | None = None
        """A copy of why opening failed last, without traceback (that has the password in its
        frames, and the engine); None once a connection was opened."""
        self.on_leak: Callable[[Any, Leaked | Returned], None] = _nothing_of_it
        """Called by the housekeeper when a connection is out for long, or came home after all."""
        self._last_open = -math.inf
        """When a connection was closed last: until then, at least, the database was there."""
        self._worker = Worker()
        self.lingering = Lingering(self.housekeeper.schedule)
        self._ledger = Ledger(self._entry_died, self._new_connection)
        self._by_handle: dict[int, Connection] = {}
        """id(handle) -> connection, for as long as the connection refers to the handle."""
        self._detached: dict[int, weakref.ref[Any] | None] = {}
        """id(handle) of connections that were detached and are, as far as one can see, open."""

    def sweep(self) -> None:
        """Do what is due; called by the housekeeper."""
        raise NotImplementedError

    def neglected(self) -> None:
        """The housekeeper's thread has died."""
        raise NotImplementedError

    def _entry_died(self, ref: EntryRef) -> None:
        self._post(self._ledger.lost, ref.slot)

    def count(self, what: str) -> None:
        """One more of what is just counted in :class:`Totals`."""
        self._post(self._ledger.totals.one_more, what)

    def _new_connection(self) -> Connection:
        raise NotImplementedError

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

    # -- connecting --------------------------------------------------------------------------------

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

    def connect_failed(self, error: Exception) -> None:
        """Remember why opening failed, for the error of a checkout that gets nothing."""
        self.last_connect_error = _retold(error)
        self.count("connect_errors")

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
            self._do(self._decide(self._ledger.give_locked, slot, self._clock()))

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

    # -- replacing and filling up ------------------------------------------------------------------

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

    def reserve(self, attachment: Attachment) -> Permit | None:
        """Return the right to open one more for an engine that has fewer than its ``min_size``, or None."""
        return self._decide(self._ledger.reserve, attachment, self._clock())

    def give_unused(self, attachment: Attachment, entry: Any) -> None:
        """:meth:`give`, of what was taken to be opened or passed on: no checkout."""
        self._post(self._ledger.give_unused, attachment, entry)


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


def _nothing_of_it(_: Effects, __: object) -> None: ...
