"""The pools: what queries calls ``Connection``, ``Pool`` and ``PoolManager``.

The names, the arguments and the exceptions are those of ``queries.pool``
(https://queries.readthedocs.io/en/latest/pool.html); the bookkeeping behind them is the one that
the engines use, so that there is one truth about every connection.

A :class:`Pool` is the shell around a :class:`~sqla_queries_pool.ledger.Ledger`: it has the lock, the
clock and the hands.  The rules:

* The ledger is touched under the lock alone, and nothing else is done under it: what the ledger
  returns is done afterwards, by :meth:`Pool._do`.
* A check-in never waits.  The garbage collector runs SQLAlchemy's finalizer in whichever thread it
  likes, also in one that is inside the lock.  So whatever may come from a finalizer goes through
  :meth:`Pool._post`: it is put into the inbox, and whoever can get the lock empties it.  A post
  tries the lock *after* having put its letter in, and everybody looks at the inbox after having let
  go of the lock, so that no letter lies unread: either the post got the lock, or the one who had it
  then looks at the inbox later than that.
* The lock is reentrant only in order to notice: ``_inside`` says that its thread is inside the
  ledger already.  A post leaves its letter to the outer call, everything else raises
  :class:`~sqla_queries_pool.errors.CheckoutReentered` instead of waiting for itself for ever.
"""

from __future__ import annotations

import copy
import datetime
import gc
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any, ClassVar, TypeVar

from . import parameters
from .errors import (
    ActivePoolError,
    CheckoutReentered,
    ConnectionBusyError,
    ConnectionException,
    ConnectionNotFoundError,
    NoIdleConnectionsError,
    PoolConnectionException,
    PoolException,
    PoolFullError,
    QueriesException,
)
from .gates import ThreadGate
from .housekeeping import Housekeeper, Worker
from .ledger import (
    CLOSING,
    HELD,
    OPENING,
    Attachment,
    Close,
    Due,
    EntryRef,
    Ledger,
    NotHeld,
    Numbers,
    Permit,
    Quota,
    Reset,
    Slot,
    Wake,
    Work,
)
from .parameters import UNSTATED, Unstated

__all__ = [
    "ActivePoolError",
    "Connection",
    "ConnectionBusyError",
    "ConnectionException",
    "ConnectionNotFoundError",
    "NoIdleConnectionsError",
    "Pool",
    "PoolConnectionException",
    "PoolException",
    "PoolFullError",
    "PoolManager",
    "QueriesException",
]

logger = logging.getLogger(__name__)

DEFAULT_IDLE_TTL = 60.0
"""queries' default ``idle_ttl``, in seconds."""
DEFAULT_MAX_SIZE = 1
"""queries' default ``max_size``, for pools that are made by hand."""

_T = TypeVar("_T")


class Connection(Slot):
    """One connection of a pool, or the slot for one: the handle, and who has it.

    :param handle: the DBAPI connection.

    A lone one, not in any pool, has a pool of its own.
    """

    __slots__ = ("_pool", "exceptions", "executions")

    def __init__(self, handle: Any = None) -> None:
        super().__init__(handle)
        self._pool: Pool | None = None
        self.executions = 0
        """queries' counter; for its sessions to write."""
        self.exceptions = 0
        """queries' counter; for its sessions to write."""

    @property
    def id(self) -> int:
        """The ``id()`` of the DBAPI connection."""
        return id(self.handle)

    @property
    def closed(self) -> bool:
        """Is there no open DBAPI connection?"""
        return self.handle is None or bool(getattr(self.handle, "closed", False))

    @property
    def executing(self) -> bool:
        """Does it execute an asynchronous operation (psycopg2's ``isexecuting()``)?"""
        isexecuting = getattr(self.handle, "isexecuting", None)
        if isexecuting is None:
            return False
        try:
            return bool(isexecuting())
        except Exception:  # closed meanwhile: psycopg2.InterfaceError
            return False

    @property
    def locked(self) -> bool:
        """Does somebody have it?  Also true for the lock of a session that is dead."""
        return self.state is HELD

    @property
    def busy(self) -> bool:
        """Is it executing, or does somebody who still exists have it?"""
        return (self.locked and not self.stale) or self.state is OPENING or self.executing

    @property
    def used_by(self) -> weakref.ref[Any] | None:
        """A weak reference to who has it: the session, or what SQLAlchemy has checked out."""
        if self.session is not None or not self.locked or self.entry is None:
            return self.session
        fairy: weakref.ref[Any] | None = getattr(self.entry(), "fairy_ref", None)
        return self.entry if fairy is None else fairy

    def lock(self, session: object) -> None:
        """Lock it for ``session``, which is referred to weakly.

        :raises ConnectionBusyError: somebody has it.
        """
        self._in_pool().lock(self.handle, session)

    def free(self) -> None:
        """Take the lock off, and what the session may have left in it: see :meth:`Pool.free`.

        :raises ConnectionBusyError: it is executing, or an engine has it.
        """
        self._in_pool().free(self.handle)

    def close(self) -> None:
        """Close it and give its slot back.

        :raises ConnectionBusyError: it is executing, or somebody has it.
        """
        if self.handle is not None:
            self._in_pool().remove(self.handle)

    def _in_pool(self) -> Pool:
        if self._pool is None:
            Pool(f"connection-{id(self)}", idle_ttl=None).adopt(self)
            assert self._pool is not None
        return self._pool

    def __repr__(self) -> str:
        what = "no connection" if self.handle is None else f"handle {self.id:#x}"
        return f"<Connection {what}, {self.state}, used {self.uses} times>"


class Pool:
    """The connections of one database: the budget, and who has what.

    :param pool_id: the pool id.
    :param idle_ttl: seconds after which an idle connection is closed; None for never.
    :param max_size: the largest number of connections; None for no limit.
    :param time_method: a monotonic clock in seconds, in place of ``time.monotonic``.
    :raises ParameterError: a number has no meaning.
    """

    housekeeper: ClassVar[Housekeeper] = Housekeeper()

    def __init__(
        self,
        pool_id: str,
        idle_ttl: float | None | Unstated = DEFAULT_IDLE_TTL,
        max_size: int | None | Unstated = DEFAULT_MAX_SIZE,
        time_method: Callable[[], float] | None = None,
    ) -> None:
        self.id = pool_id
        self.label = pool_id
        """For people: engines say which database it is, without the password."""
        self.listed = True
        """Does the PoolManager know it?  ``remove`` takes a pool off the list whose engines live on;
        their next opening puts it there again."""
        self.last_connect_error: BaseException | None = None
        """A copy of why opening failed last, without traceback (that has the password in its
        frames, and the engine); None once a connection was opened."""
        self._lock = threading.RLock()
        """Guards the ledger, and nothing but the ledger.  See the module's text."""
        self._inside = False
        """Is a method of the ledger running?  Written under the lock."""
        self._inbox: deque[tuple[Callable[..., Work | None], tuple[Any, ...]]] = deque()
        """What found the lock taken; see the module's text."""
        self._clock = time_method or time.monotonic
        self._worker = Worker()
        self._ledger = Ledger(self._entry_died, self._new_connection)
        self._by_handle: dict[int, Connection] = {}
        """id(handle) -> connection, for as long as the connection refers to the handle."""
        self._detached: dict[int, weakref.ref[Any] | None] = {}
        """id(handle) of connections that were detached and are, as far as one can see, open."""
        now = self._clock()
        self._ledger.set_ttl(_ttl(idle_ttl), now)
        self._ledger.set_limit(_limit(max_size), now)

    # -- the lock ----------------------------------------------------------------------------------

    def _decide(self, operation: Callable[..., _T], *args: Any) -> _T:
        """Run one operation of the ledger under the lock, and the inbox after it.

        :raises CheckoutReentered: this thread is inside the ledger already.
        """
        try:
            with self._lock:
                if self._inside:
                    raise self._reentered()
                self._inside = True
                try:
                    return operation(*args)
                finally:
                    self._inside = False
        finally:
            if self._inbox:
                self._settle()

    def _post(self, operation: Callable[..., Work | None], *args: Any) -> None:
        """Have an operation of the ledger run and its work done, now or by whoever has the lock.

        The operation gets the time as its last argument.  Never waits.
        """
        self._inbox.append((operation, args))
        self._settle()

    def _settle(self) -> None:
        inbox = self._inbox
        while inbox and self._lock.acquire(False):
            work: Work = []
            failures: list[Exception] = []
            try:
                if self._inside:  # a finalizer of this very thread: the outer call settles
                    return
                self._inside = True
                try:
                    while inbox:
                        operation, args = inbox.popleft()
                        try:
                            work += operation(*args, self._clock()) or ()
                        except Exception as error:  # one bad letter keeps no other from being read
                            failures.append(error)
                finally:
                    self._inside = False
            except BaseException:
                self._do_soon(work)
                raise
            finally:
                self._lock.release()
            for failure in failures:
                logger.error("%s: %s", self.label, failure, exc_info=failure)
            self._do(work)

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
                else:
                    self._reset(item.slot)
        except BaseException:
            if todo:
                self._do_soon(list(todo))
            raise

    def _do_soon(self, work: Work) -> None:
        """Have the worker do it: the caller's time is not for closing."""
        if work:
            self._worker.submit(lambda: self._do(work))

    def _reentered(self) -> CheckoutReentered:
        return CheckoutReentered(
            f"{self.label}: the garbage collector ran a finalizer inside the connection pool, and it "
            "asked the same pool for a connection; do not use an engine in a finalizer or in an "
            "event listener that one can run (a check-in is fine)"
        )

    # -- checkout and check-in, for QueriesPool ----------------------------------------------------

    def take(self, attachment: Attachment, timeout: float | None, gc_on_wait: bool) -> Any:
        """Return an entry that the caller now holds, or a :class:`Permit` to open a connection.

        :param timeout: seconds to wait for a slot, None for as long as it takes, 0 not at all.
        :param gc_on_wait: ask the collector for abandoned connections while waiting.
        :return: None if ``timeout`` was over before a slot was free.
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
                    entry = ledger.take(attachment, get_ident(), now)
                finally:
                    self._inside = False
        finally:
            if self._inbox:
                self._settle()
        if now > ledger.due:
            self._remind()
        if entry is None and timeout != 0:
            return self._wait(attachment, timeout, gc_on_wait)
        return entry

    def _remind(self) -> None:
        """The housekeeper is late.  It may just be busy; or its thread has died."""
        self._ledger.due = self._clock() + 1.0  # unlocked: at worst it is reminded twice
        self.housekeeper.schedule(self, 0.0)

    def _wait(self, attachment: Attachment, timeout: float | None, gc_on_wait: bool) -> Any:
        """Wait in line; return what :meth:`take` does."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        waiter = ThreadGate(attachment, get_ident())
        entry = None
        try:
            entry = self._decide(self._ledger.join, waiter, self._clock())
            # Slices, for the collector's sake, and so that nothing depends on one wake-up.
            seconds = GC_AFTER
            while entry is None and (left := deadline - time.monotonic()) > 0:
                waiter.wait(min(left, seconds))
                entry = waiter.answer
                if entry is None and gc_on_wait:
                    _collect_garbage()
                    entry = waiter.answer
                seconds = 1.0
            if entry is None:
                entry = self._decide(self._ledger.leave, waiter)
            return entry
        except BaseException:
            if entry is None:
                entry = self._decide(self._ledger.leave, waiter)
            if entry is not None:
                self._hand_back(attachment, entry)
            raise

    def _hand_back(self, attachment: Attachment, entry: Any) -> None:
        """Pass on what a waiter was given that can't use it."""
        if isinstance(entry, Permit):
            self.failed(entry, None)
        else:
            self.give(attachment, entry)

    def give(self, attachment: Attachment, entry: Any) -> None:
        """Take an entry back.  Never waits, may be called by a finalizer.

        :raises NotHeld: nobody has it.
        """
        # _post() by hand for when the lock is free: saves 0.3 of 0.8 microseconds.
        if not self._lock.acquire(False):
            self._give_later(attachment, entry)
            return
        work: Work | None = None
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
        if work:
            self._do(work)
        if self._inbox:
            self._settle()

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
        self.last_connect_error = None
        if not self.listed:
            PoolManager._list(self)
        self._decide(self._ledger.opened, slot, self._clock())

    def failed(self, permit: Permit, error: BaseException | None) -> None:
        """The caller of :meth:`take` could not open it; the slot goes to the next waiter."""
        slot: Connection = permit.slot  # type: ignore[assignment]
        if error is not None:
            self.last_connect_error = _without_traceback(error)
        try:
            self.close_evicted(permit)
            self._drop_handle(slot)
        finally:
            self._post(self._ledger.failed, slot)

    def close_evicted(self, permit: Permit) -> None:
        """Close what gave way, before the permit is used: at no time are there two sockets."""
        entry, permit.evicts = permit.evicts, None
        if entry is not None:
            self._close_entry(entry.slot, entry)

    def let_go(self, slot: Connection) -> None:
        """The holder of a connection detaches it: it is its own from now on, and closes it."""
        handle, slot.handle = slot.handle, None
        if handle is not None:
            self._by_handle.pop(id(handle), None)
            key = id(handle)

            def died(_: weakref.ref[Any]) -> None:
                self._detached.pop(key, None)

            try:
                self._detached[key] = weakref.ref(handle, died)
            except TypeError:  # a DBAPI whose connections know no weak references: till it is closed
                self._detached[key] = None
        self._post(self._ledger.let_go, slot)

    def socket_opened(self, slot: Connection, handle: Any, generation: int) -> None:
        """A slot's holder has opened a socket for it.  Without the lock: the slot is its own."""
        slot.generation = generation
        self._detached.pop(id(handle), None)  # the id of one that died unseen
        self._by_handle[id(handle)] = slot
        slot.handle = handle

    def socket_closed(self, handle: Any) -> None:
        """A socket was closed, by the holder of its slot or by who detached it."""
        slot = self._by_handle.get(id(handle))
        if slot is not None and slot.handle is handle:
            del self._by_handle[id(handle)]
            slot.handle = None
        else:
            self._detached.pop(id(handle), None)

    # -- engines -----------------------------------------------------------------------------------

    def attach(self, attachment: Attachment) -> Work:
        """An engine begins to use the pool; the work is the caller's to have done."""
        return self._decide(self._ledger.attach, attachment, self._engine_died, self._clock())

    def dispose(self, attachment: Attachment) -> None:
        """Close an engine's idle connections, and end its generation of connections."""
        self._do(self._decide(self._ledger.dispose, attachment))

    def retire(self, attachment: Attachment) -> None:
        """Let an engine's connections from before its last dispose close when they come home."""
        self._decide(self._ledger.retire, attachment)

    def _engine_died(self, ref: weakref.ref[Attachment]) -> None:
        self._post(self._ledger.detach, ref)

    def _entry_died(self, ref: EntryRef) -> None:
        self._post(self._ledger.lost, ref.slot)

    def _new_connection(self) -> Connection:
        connection = Connection()
        connection._pool = self
        return connection

    # -- closing and resetting ---------------------------------------------------------------------

    def _close(self, item: Close) -> None:
        logger.debug("%s: closing %r: %s", self.label, item.slot, item.reason)
        try:
            self._close_entry(item.slot, item.entry)
        finally:
            self._post(self._ledger.closed, item.slot)

    def _close_entry(self, slot: Slot, entry: Any) -> None:
        """Close as SQLAlchemy does where there is a record, and in any case."""
        try:
            if entry is not None and entry is not slot:
                entry.close()
        except Exception:
            logger.exception("%s: exception while closing %r", self.label, slot)
        finally:
            self._drop_handle(slot)

    def _drop_handle(self, slot: Slot) -> None:
        """Close the DBAPI connection itself, where nobody did."""
        handle = slot.handle
        if handle is None:
            return
        self.socket_closed(handle)
        slot.handle = None
        _close_quietly(handle, self.label)

    def _reset(self, slot: Slot) -> None:
        """Roll back what a session left, then give the connection back; or close it."""
        entry = slot.entry() if slot.entry is not None else slot.handle
        try:
            (entry.rollback if entry is slot.handle else entry.reset)()
        except BaseException as error:
            logger.warning("%s: closing %r: rollback failed: %r", self.label, slot, error)
            self._post(_ignoring_time(self._ledger.close_one), slot, True)
            if not isinstance(error, Exception):
                raise
        else:
            self._post(self._ledger.give_lent, slot)

    def sweep(self) -> None:
        """Close what was idle for too long; called by the housekeeper."""
        work = self._decide(self._ledger.expire, self._clock())
        self._do([item for item in work if isinstance(item, Due)])
        self._do_soon([item for item in work if not isinstance(item, Due)])
        PoolManager._forget_if_vacant(self)

    # -- the queries API ---------------------------------------------------------------------------

    def add(self, connection: Any) -> None:
        """Count a DBAPI connection that was opened elsewhere.  It is never given to an engine.

        :raises PoolFullError: there is no slot for it; it has been closed, as queries does.
        :raises ValueError: it is in the pool already.
        """
        try:
            self.adopt(Connection(connection))
        except PoolFullError:
            _close_quietly(connection, self.label)
            raise

    def adopt(self, slot: Connection) -> None:
        """:meth:`add`, but for a :class:`Connection`, and without closing anything."""
        handle = slot.handle
        if handle is None:
            raise ValueError("There is no DBAPI connection to add")
        if self._by_handle.setdefault(id(handle), slot) is not slot:
            raise ValueError("Connection already exists in pool")
        slot._pool = self
        work = self._decide(self._ledger.add, slot, self._clock())
        if work is None:
            del self._by_handle[id(handle)]
            slot._pool = None
            raise PoolFullError(self.id)
        self._do(work)

    def get(self, session: object) -> Any:
        """Return a DBAPI connection that was added by hand and is idle, now locked for ``session``.

        :param session: any object that can be weakly referred to.
        :raises NoIdleConnectionsError: there is none.
        """
        by_hand = self._ledger.by_hand
        self._reset_stale(by_hand)
        for slot in list(by_hand.idle):
            handle = slot.handle
            if slot.closed:
                self._do(self._decide(self._ledger.close_one, slot))
            elif not slot.executing and self._lend(slot, session):
                return handle
        raise NoIdleConnectionsError(self.id)

    def lock(self, connection: Any, session: object) -> None:
        """Lock an idle connection for ``session``, which is referred to weakly.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: somebody has it.
        """
        slot = self._find(connection)
        if slot.stale and self._decide(self._ledger.unlock, slot):
            self._reset(slot)
        if slot.executing or not self._lend(slot, session):
            raise ConnectionBusyError(id(connection))

    def free(self, connection: Any) -> None:
        """Take a session's lock off a connection: it is rolled back and idle again.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: it is executing, or an engine has it.
        """
        slot = self._find(connection)
        if slot.executing or (slot.locked and slot.session is None):
            raise ConnectionBusyError(id(connection))
        if self._decide(self._ledger.unlock, slot):
            self._reset(slot)

    def remove(self, connection: Any) -> None:
        """Close a connection and give its slot back.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: it is executing, or somebody has it.
        """
        slot = self._find(connection)
        closed = slot.closed
        work = [] if slot.executing else self._decide(self._ledger.close_one, slot, closed)
        if not work:
            raise ConnectionBusyError(id(connection))
        self._do(work)

    def clean(self) -> None:
        """Drop closed connections, undo stale locks, close what was idle for longer than the TTL."""
        for slot in list(self._by_handle.values()):
            if slot.closed:
                self._do(self._decide(self._ledger.close_one, slot, True))
        for attachment in [a for ref in list(self._ledger.attachments) if (a := ref())]:
            self._reset_stale(attachment)
        self._reset_stale(self._ledger.by_hand)
        self._do(self._decide(self._ledger.expire, self._clock()))

    def close(self) -> None:
        """Close all connections.

        :raises ConnectionBusyError: one is busy; then none was closed.
        """
        for slot in list(self._by_handle.values()):
            if slot.executing:
                raise ConnectionBusyError(slot.id)
        work = self._decide(self._ledger.close_all)
        if isinstance(work, Slot):
            raise ConnectionBusyError(id(work.handle))
        self._do(work)

    def shutdown(self) -> None:
        """Close all connections that do not execute, also those that sessions or engines have out.

        An engine finds a connection that was closed under it invalidated.

        :raises ConnectionBusyError: one executes; the others were closed.
        """
        busy: list[int] = []
        self._decide(self._ledger.retire_all)
        for slot in list(self._by_handle.values()):
            if slot.executing:
                busy.append(slot.id)
                continue
            work = self._decide(self._ledger.close_one, slot, True)
            if work:
                self._do(work)
            elif slot.state is HELD and slot.entry is not None:
                record = slot.entry()
                if record is not None:
                    record.invalidate()
        if busy:
            raise ConnectionBusyError(busy[0])

    def set_idle_ttl(self, ttl: float | None) -> None:
        """Set after how many seconds an idle connection is closed, for all; None for never.

        :raises ParameterError: the number has no meaning.
        """
        self._do(self._decide(self._ledger.set_ttl, _ttl(ttl), self._clock()))

    def set_max_size(self, size: int | None) -> None:
        """Set the largest number of connections; None for no limit.

        Raised, waiters are served at once.  Lowered, idle connections above it close at once, and
        others when they come home.

        :raises ParameterError: the number has no meaning.
        """
        self._do(self._decide(self._ledger.set_limit, _limit(size), self._clock()))

    def unset(self) -> None:
        """Forget what was set for the pool: its engines' own parameters hold."""
        self._do(self._decide(self._ledger.set_ttl, None, self._clock()))
        self._do(self._decide(self._ledger.set_limit, None, self._clock()))

    def connection_handle(self, connection: Any) -> Connection:
        """Return the :class:`Connection` of a DBAPI connection.

        :raises KeyError: it is not in the pool.
        """
        try:
            return self._find(connection)
        except ConnectionNotFoundError as error:
            raise KeyError(str(error)) from None

    @property
    def idle_ttl(self) -> float | None:
        """Seconds after which an idle connection is closed, None for never.

        Where it was not set for the pool, each engine has its own, and this is that of the last.
        """
        ttl = self._ledger.by_hand.ttl
        return None if ttl == math.inf else ttl

    @property
    def max_size(self) -> int | None:
        """The largest number of connections, None for no limit."""
        limit = self._ledger.limit
        return None if limit == math.inf else int(limit)

    @property
    def is_full(self) -> bool:
        """Is there no slot left?"""
        return len(self._ledger.slots) >= self._ledger.limit

    @property
    def connections(self) -> list[Connection]:
        """All connections, also those that are being opened or closed."""
        return list(self._ledger.slots)  # type: ignore[arg-type]

    @property
    def idle_connections(self) -> list[Connection]:
        """The open connections that nobody has."""
        return [c for c in self.connections if not c.busy and not c.closed and c.state != CLOSING]

    @property
    def busy_connections(self) -> list[Connection]:
        """The open connections that somebody has."""
        return [c for c in self.connections if c.busy and not c.closed]

    @property
    def executing_connections(self) -> list[Connection]:
        """The connections that execute an asynchronous operation."""
        return [c for c in self.connections if c.executing]

    @property
    def locked_connections(self) -> list[Connection]:
        """The connections that are locked, also by a session that is dead."""
        return [c for c in self.connections if c.locked]

    @property
    def closed_connections(self) -> list[Connection]:
        """The connections that the server or somebody else has closed."""
        return [c for c in self.connections if c.closed and c.state != OPENING]

    @property
    def idle_duration(self) -> float:
        """Seconds for which nobody has had a connection; 0 while somebody has one."""
        connections = self.connections
        if any(c.busy for c in connections):
            return 0.0
        since = max((c.since for c in connections), default=self._ledger.vacant_since)
        return 0.0 if since is None else max(0.0, self._clock() - since)

    def now(self) -> float:
        """The time in seconds by the pool's clock."""
        return self._clock()

    @property
    def numbers(self) -> Numbers:
        """How many connections are in which state; takes no lock."""
        return self._ledger.numbers()

    @property
    def detached(self) -> int:
        """Connections that were detached from the pool and are, as far as one can see, open."""
        return len(self._detached)

    def report(self) -> dict[str, Any]:
        """Return state and configuration: queries' dictionary, and the pool's own numbers."""
        numbers = self.numbers
        return {
            "connections": {
                "busy": len(self.busy_connections),
                "closed": len(self.closed_connections),
                "executing": len(self.executing_connections),
                "idle": len(self.idle_connections),
                "locked": len(self.locked_connections),
                "open": numbers.open,
                "held": numbers.held,
                "opening": numbers.opening,
                "detached": self.detached,
            },
            "waiting": numbers.waiting,
            "exceptions": sum(c.exceptions for c in self.connections),
            "executions": sum(c.executions for c in self.connections),
            "full": self.is_full,
            "idle": {"duration": self.idle_duration, "ttl": self.idle_ttl},
            "label": self.label,
            "max_size": self.max_size,
        }

    def _find(self, connection: Any) -> Connection:
        slot = self._by_handle.get(id(connection))
        if slot is None or slot.handle is not connection:
            raise ConnectionNotFoundError(self.id, id(connection))
        return slot

    def _lend(self, slot: Connection, session: object) -> bool:
        def died(ref: weakref.ref[Any]) -> None:
            self._post(self._ledger.session_died, slot, ref)

        try:
            ref = weakref.ref(session, died)
        except TypeError:
            kind = type(session).__name__
            raise TypeError(
                f"session={kind!r} object can't be weakly referred to: pass an instance of a class "
                "of your own, so that the pool can see when it is gone"
            ) from None
        return self._decide(self._ledger.lend, slot, ref, self._clock())

    def _reset_stale(self, attachment: Attachment) -> None:
        for slot in self._decide(self._ledger.unlock_stale, attachment):
            self._reset(slot)

    def __contains__(self, connection: object) -> bool:
        slot = self._by_handle.get(id(connection))
        return slot is not None and slot.handle is connection

    def __len__(self) -> int:
        return len(self._ledger.slots)

    def __bool__(self) -> bool:
        return True  # not whether it has connections

    def __str__(self) -> str:
        n = self.numbers
        limit = "none" if self.max_size is None else self.max_size
        return (
            f"{self.label} (pid {self.id}): open {n.open}, held {n.held}, idle {n.idle}, "
            f"opening {n.opening}, waiting {n.waiting}, limit {limit}"
        )

    def __repr__(self) -> str:
        n = self.numbers
        more = "".join(
            f", {word} {number}"
            for word, number in (
                ("closing", n.closing),
                ("hollow", n.hollow),
                ("detached", self.detached),
            )
            if number
        )
        return f"<Pool {self}{more}>"


class PoolManager:
    """All pools of the process, by pool id.

    The id stands for a database and the user of it; neither the manager nor its pools know a URL or
    a password.
    """

    _instance: ClassVar[PoolManager | None] = None
    _lock: ClassVar[threading.RLock] = threading.RLock()  # type: ignore[valid-type]
    """Guards which pools there are; taken when pools come and go, never for a checkout.  It is taken
    before a pool's own lock, never after."""
    _pools: ClassVar[dict[str, Pool]] = {}

    @classmethod
    def instance(cls) -> PoolManager:
        """Return the one instance."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def __contains__(self, pid: object) -> bool:
        pool = self._pools.get(pid)  # type: ignore[call-overload]
        return pool is not None and pool.listed

    @classmethod
    def create(
        cls,
        pid: str,
        idle_ttl: float | None = DEFAULT_IDLE_TTL,
        max_size: int | None = DEFAULT_MAX_SIZE,
        time_method: Callable[[], float] | None = None,
    ) -> None:
        """Make a pool; what is set here overrules what engines state.

        :param idle_ttl: seconds after which an idle connection is closed; None for never.
        :param max_size: the largest number of connections; None for no limit.
        :param time_method: a monotonic clock in seconds, in place of ``time.monotonic``.
        :raises KeyError: there is a pool of this id.
        :raises ParameterError: a number has no meaning.
        """
        new = Pool(pid, idle_ttl, max_size, time_method)
        with cls._lock:
            old = cls._pools.get(pid)
            if old is not None and old.listed:
                raise KeyError(f"Pool {pid} already exists")
            if old is None:
                cls._pools[pid] = new
            else:  # it was removed, but engines use it
                old.listed = True
        if old is None:
            new.sweep()
        else:
            old.set_idle_ttl(idle_ttl)
            old.set_max_size(max_size)

    @classmethod
    def add(cls, pid: str, connection: Any) -> None:
        """:meth:`Pool.add`.

        :raises KeyError: there is no such pool.
        """
        try:
            with cls._lock:  # so that the pool can't be forgotten meanwhile
                cls._listed(pid).adopt(Connection(connection))
        except PoolFullError:
            _close_quietly(connection, pid)
            raise

    @classmethod
    def clean(cls, pid: str) -> None:
        """:meth:`Pool.clean`, then forget the pool if it has neither connections nor engines.

        Returns quietly where there is no such pool.
        """
        pool = cls._pools.get(pid)
        if pool is not None and pool.listed:
            pool.clean()
            cls._forget_if_vacant(pool, at_once=True)

    @classmethod
    def free(cls, pid: str, connection: Any) -> None:
        """:meth:`Pool.free`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).free(connection)

    @classmethod
    def get(cls, pid: str, session: object) -> Any:
        """:meth:`Pool.get`.

        :raises KeyError: there is no such pool.
        """
        return cls._listed(pid).get(session)

    @classmethod
    def get_connection(cls, pid: str, connection: Any) -> Connection:
        """:meth:`Pool.connection_handle`.

        :raises KeyError: there is no such pool, or no such connection in it.
        """
        return cls._listed(pid).connection_handle(connection)

    @classmethod
    def has_connection(cls, pid: str, connection: Any) -> bool:
        """Has the pool this DBAPI connection?

        :raises KeyError: there is no such pool.
        """
        return connection in cls._listed(pid)

    @classmethod
    def has_idle_connection(cls, pid: str) -> bool:
        """Has the pool a connection that nobody has?

        :raises KeyError: there is no such pool.
        """
        return bool(cls._listed(pid).idle_connections)

    @classmethod
    def is_full(cls, pid: str) -> bool:
        """:attr:`Pool.is_full`.

        :raises KeyError: there is no such pool.
        """
        return cls._listed(pid).is_full

    @classmethod
    def lock(cls, pid: str, connection: Any, session: object) -> None:
        """:meth:`Pool.lock`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).lock(connection, session)

    @classmethod
    def remove(cls, pid: str) -> None:
        """:meth:`Pool.close`, then forget the pool and what was set for it.

        Engines that use it work again at their next checkout.

        :raises ConnectionBusyError: a connection is busy; then nothing was done.
        :raises KeyError: there is no such pool.
        """
        pool = cls._listed(pid)
        pool.close()
        with cls._lock:
            pool.listed = False
            if not pool._ledger.attachments and cls._pools.get(pid) is pool:
                del cls._pools[pid]
        pool.unset()

    @classmethod
    def remove_connection(cls, pid: str, connection: Any) -> None:
        """:meth:`Pool.remove`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).remove(connection)

    @classmethod
    def set_idle_ttl(cls, pid: str, ttl: float | None) -> None:
        """:meth:`Pool.set_idle_ttl`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).set_idle_ttl(ttl)

    @classmethod
    def set_max_size(cls, pid: str, size: int | None) -> None:
        """:meth:`Pool.set_max_size`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).set_max_size(size)

    @classmethod
    def shutdown(cls) -> None:
        """:meth:`Pool.shutdown` of all pools.

        :raises ConnectionBusyError: a connection executes; all others were closed.
        """
        busy: ConnectionBusyError | None = None
        for pool in list(cls._pools.values()):
            try:
                pool.shutdown()
            except ConnectionBusyError as error:
                busy = busy or error
        if busy is not None:
            raise busy

    @classmethod
    def size(cls, pid: str) -> int:
        """Return how many connections the pool has.

        :raises KeyError: there is no such pool.
        """
        return len(cls._listed(pid))

    @classmethod
    def report(cls) -> dict[str, Any]:
        """Return the state of all pools."""
        return {
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "process": os.getpid(),
            "pools": {pid: pool.report() for pid, pool in list(cls._pools.items()) if pool.listed},
        }

    @classmethod
    def attach(cls, pid: str, label: str, attachment: Attachment) -> Pool:
        """An engine begins to use the pool of this id, which is made if there is none."""
        with cls._lock:
            pool = cls._pools.get(pid)
            if pool is None:
                pool = cls._pools[pid] = Pool(pid, UNSTATED, UNSTATED)
            if pool.label == pid:
                pool.label = label
            pool.listed = True
            work = pool.attach(attachment)
        pool._do(work)
        return pool

    @classmethod
    def _listed(cls, pid: str) -> Pool:
        pool = cls._pools.get(pid)
        if pool is None or not pool.listed:
            raise KeyError(f"Pool {pid} has not been created")
        return pool

    @classmethod
    def _list(cls, pool: Pool) -> None:
        with cls._lock:
            pool.listed = True

    @classmethod
    def _forget_if_vacant(cls, pool: Pool, at_once: bool = False) -> None:
        """Forget a pool that nobody has used for its idle TTL: it has no slots and no engines."""
        with cls._lock:  # an engine attaches under this lock: it can't come in between
            ledger = pool._ledger
            vacant = ledger.vacant_since is not None if at_once else ledger.vacant(pool._clock())
            if vacant and cls._pools.get(pool.id) is pool:
                del cls._pools[pool.id]


GC_AFTER = 0.2
"""Seconds that a checkout waits before it asks the collector (design 11)."""
_GC_SHARE = 0.05
"""The largest share of the time that the process spends in collections that waiters asked for."""
_next_collection = 0.0
_collecting = threading.Lock()


def _collect_garbage() -> None:
    """Collect, once per second and process at most, and less often where a collection takes long.

    While every thread waits nobody allocates, so the collector never runs by itself, and
    connections that were abandoned in reference cycles would never come home.
    """
    global _next_collection
    if time.monotonic() < _next_collection or not _collecting.acquire(False):
        return
    try:
        start = time.monotonic()
        gc.collect()
        took = time.monotonic() - start
        _next_collection = start + max(1.0, took / _GC_SHARE)
    finally:
        _collecting.release()


def _close_quietly(handle: Any, label: str) -> None:
    try:
        handle.close()
    except Exception as error:
        logger.warning("%s: exception while closing a connection: %r", label, error)


def _without_traceback(error: BaseException) -> BaseException:
    """A copy that refers to no frame: those know the engine and the password."""
    try:
        return copy.copy(error)
    except Exception:
        return QueriesException(f"{type(error).__name__}: {error}")


def _ttl(value: float | None | Unstated) -> float | None:
    if isinstance(value, Unstated):
        return None
    seconds = parameters.seconds("idle_ttl", value)
    return math.inf if seconds is None else seconds


def _limit(value: int | None | Unstated) -> float | None:
    if isinstance(value, Unstated):
        return None
    size = parameters.max_size("max_size", value)
    return math.inf if size is None else size


def _ignoring_time(operation: Callable[..., Work]) -> Callable[..., Work]:
    return lambda *args: operation(*args[:-1])
