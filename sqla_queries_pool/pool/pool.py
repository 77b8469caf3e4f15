"""What queries does with a pool: add, get, lock, free, remove, and look."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import parameters
from ..budget import ages, closing, locks
from ..budget.audit import Audit
from ..budget.slots import DRAINED, HELD, IDLE, LOCKED, SUSPENDED, Numbers, Slot
from ..budget.stats import Statistics
from ..concurrency.threads import THREADS
from ..errors import ConnectionBusyError, ConnectionNotFoundError, NoIdleConnectionsError, PoolFullError
from ..parameters import Unstated
from ..runtime.connections import close_quietly
from ..runtime.core import Core
from ..sockets import liveness
from ..sockets.drivers import Remembered, socket_of
from . import stopping
from .connection import Connection, Connections
from .statistics import statistics_of
from .stopping import Stopped

DEFAULT_IDLE_TTL = 60.0
"""queries' default ``idle_ttl``, in seconds."""
DEFAULT_MAX_SIZE = parameters.max_size("QUERIES_MAX_POOL_SIZE", os.environ.get("QUERIES_MAX_POOL_SIZE", 1))
"""queries' default ``max_size``, for pools that are made by hand: 1, or what the environment says."""


every_pool: weakref.WeakSet[Pool] = weakref.WeakSet()
"""All that there are in the process, also those that no PoolManager knows."""


class Pool:
    """The connections of one database: the budget, and who has what.

    :param pool_id: the pool id.
    :param idle_ttl: seconds after which an idle connection is closed; None for never.
    :param max_size: the largest number of connections; None for no limit.
    :param time_method: a monotonic clock in seconds, in place of the pool's own.
    :raises ParameterError: a number has no meaning.
    """

    def __init__(
        self,
        pool_id: str,
        idle_ttl: float | Unstated | None = DEFAULT_IDLE_TTL,
        max_size: int | Unstated | None = DEFAULT_MAX_SIZE,
        time_method: Callable[[], float] | None = None,
    ) -> None:
        self.id = pool_id
        """The pool id."""
        self._listed = True
        """Does the PoolManager know it?  ``remove`` takes a pool off the list whose engines live on;
        their next opening puts it there again."""
        self._on_vacant: Callable[[Pool], None] = _nothing
        """Called when there were no slots and no engines for a while; the PoolManager's."""
        self.core = core = Core(pool_id, time_method, self._new_connection, self._opened, self._vacant)
        """What its engines use; not for applications."""
        self.connections = Connections(core)
        """The open connections by their ids."""
        self.time_method = core.now
        """The pool's clock, in seconds."""
        self._made_with = idle_ttl, max_size
        ages.set_ttl(core.ledger, _ttl(idle_ttl), core.now())
        core.set_limit(_limit(max_size))
        every_pool.add(self)

    @property
    def label(self) -> str:
        """For people: engines say which database it is, without the password."""
        return self.core.section.label

    def add(self, connection: Any) -> None:
        """Count a DBAPI connection that was opened elsewhere.  It is never given to an engine.

        :raises PoolFullError: there is no slot for it; it has been closed, as queries does.
        :raises ValueError: it is in the pool already.
        """
        try:
            self._adopt(Connection(connection))
        except PoolFullError:
            close_quietly(connection, self.label)
            raise

    def _adopt(self, slot: Connection) -> None:
        """:meth:`add`, but for a :class:`Connection`, and without closing anything."""
        handle = slot.handle
        if handle is None:
            raise ValueError("There is no DBAPI connection to add")
        work = None
        self.core.room()
        try:
            if self.core.connections.by_handle.setdefault(id(handle), slot) is not slot:
                raise ValueError("Connection already exists in pool")
            slot._pool = self
            slot.socket = socket_of(handle)
            work = self.core.section.decide(self.core.ledger.add, slot, self.core.now())
        finally:
            if slot not in self.core.ledger.slots and self.core.connections.by_handle.get(id(handle)) is slot:
                del self.core.connections.by_handle[id(handle)]
                slot._pool = None
        if work is None:
            raise PoolFullError(self.id)
        self.core.effects.do(work)

    def get(self, session: object) -> Any:
        """Return a DBAPI connection that was added by hand and is idle, now locked for ``session``.

        :param session: any object that can be weakly referred to.
        :raises NoIdleConnectionsError: there is none.
        """
        by_hand = self.core.ledger.by_hand
        self.core.effects.reset_stale(by_hand)
        for slot in list(by_hand.idle):
            handle = slot.handle
            if slot.closed:
                self.core.section.run(closing.close_one, self.core.ledger, slot)
            elif not slot.busy:
                with suppress(ConnectionBusyError):  # another thread was faster
                    slot.lock(session)
                    return handle
        raise NoIdleConnectionsError(self.id)

    def lock(self, connection: Any, session: object) -> None:
        """Lock an idle connection for ``session``, which is referred to weakly.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: somebody has it.
        """
        self._find(connection).lock(session)

    def free(self, connection: Any) -> None:
        """Take a session's lock off a connection: it is rolled back and idle again.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: it is executing, or an engine has it.
        """
        self._find(connection).free()

    def remove(self, connection: Any) -> None:
        """Close a connection and give its slot back.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: it is executing, or somebody has it.
        """
        self._find(connection).close()

    def clean(self) -> None:
        """Drop closed connections, undo stale locks, close what was idle for longer than the TTL."""
        for slot in self.closed_connections:
            with suppress(ConnectionBusyError, ConnectionNotFoundError):  # an engine has it; it is gone
                self.remove(slot.handle)
        for attachment in [a for ref in list(self.core.ledger.attachments) if (a := ref())]:
            self.core.effects.reset_stale(attachment)
        self.core.effects.reset_stale(self.core.ledger.by_hand)
        self.core.section.run(ages.expire, self.core.ledger, self.core.now())

    def close(self) -> None:
        """Close all connections.

        :raises ConnectionBusyError: one is busy; then none was closed.
        """
        for slot in self.connections.values():
            if slot.executing:
                raise ConnectionBusyError(slot.id)
        work = self.core.section.decide(closing.close_all, self.core.ledger)
        if isinstance(work, Slot):
            raise ConnectionBusyError(id(work.handle))
        self.core.effects.do(work)

    def shutdown(self) -> None:
        """Close all connections that do not execute, also those that sessions or engines have out.

        An engine finds a connection that was closed under it invalidated.

        :raises ConnectionBusyError: one executes; the others were closed.
        """
        busy: list[int] = []
        self.core.section.run(closing.retire_all, self.core.ledger)
        for slot in self.connections.values():
            if slot.executing:
                busy.append(slot.id)
                continue
            work = self.core.section.decide(closing.close_one, self.core.ledger, slot, True)
            if work:
                self.core.effects.do(work)
            elif slot.state is HELD and slot.entry is not None:
                self._close_under(slot, slot.entry())
        if busy:
            raise ConnectionBusyError(busy[0])

    def expire(self, rolling: bool = False) -> None:
        """Replace all connections of the engines, as when credentials were rotated.

        :param rolling: renew them one after the other in the background; else what is idle is closed at once.
            What is checked out is replaced when it is returned, either way.
        """
        if rolling:
            for attachment in [a for ref in list(self.core.ledger.attachments) if (a := ref())]:
                self.core.expire_rolling(attachment)
        else:
            self.core.section.run(closing.retire_all, self.core.ledger)

    def drain(self, timeout: float | None) -> Stopped:
        """Have all engines of the database reject new checkouts, and wait until nothing is out any more.

        As :meth:`.QueriesPool.drain`; it also closes what was added by hand.  It blocks its thread, also
        where the engines are asyncio's: in a coroutine ``await asyncio.to_thread(pool.drain, timeout)``.

        :param timeout: seconds to wait, at most; None for as long as it takes.
        """
        return stopping.stop(self.core, None, DRAINED, timeout, THREADS.pause)

    def suspend(self, timeout: float | None = 0.0) -> Stopped:
        """Have the checkouts of all engines of the database wait until :meth:`resume`.

        As :meth:`.QueriesPool.suspend`; it blocks as :meth:`drain` does.

        :param timeout: seconds to wait until nothing is out any more, at most.
        """
        return stopping.stop(self.core, None, SUSPENDED, timeout, THREADS.pause)

    def resume(self) -> None:
        """Let all engines of the database go on that were suspended or drained."""
        stopping.resume(self.core, None)

    def _close_under(self, slot: Connection, record: Any) -> None:
        """Close a connection that an engine has out.

        The socket alone: the record is its holder's, who may be reopening it.  Marked as it is, it is
        reopened at its next checkout at the latest.
        """
        socket = slot.socket
        if record is None or socket is None:
            return
        record.invalidate(soft=True)
        liveness.hang_up(socket, failed=self.core.failures)
        # A thread that waits for an answer in there has the driver's own lock.  But these drivers have none,
        # and to close what a thread executes in C crashes the process: its holder closes it.
        if not isinstance(socket, Remembered):
            self.core.connections.close_socket(socket)
        if slot.state is IDLE:  # it was returned just then
            self.core.section.run(closing.close_one, self.core.ledger, slot)

    def set_idle_ttl(self, ttl: float | Unstated | None) -> None:
        """Set after how many seconds an idle connection is closed, for all; None for never.

        :raises ParameterError: the number has no meaning.
        """
        self.core.section.run(ages.set_ttl, self.core.ledger, _ttl(ttl), self.core.now())

    def set_max_size(self, size: int | Unstated | None) -> None:
        """Set the largest number of connections; None for no limit.

        Raised, waiters are served at once.  Lowered, idle connections above it close at once, and
        others when they are returned.

        :raises ParameterError: the number has no meaning.
        """
        before = self.core.ledger.limit
        self.core.set_limit(_limit(size))
        self.core.log_limit(before)

    def _unset(self) -> None:
        """Forget what was set for the pool: its engines' own parameters hold."""
        self.core.section.run(ages.set_ttl, self.core.ledger, None, self.core.now())
        self.core.set_limit(None)

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
        ttl = self.core.ledger.by_hand.ttl
        return None if ttl == math.inf else ttl

    @idle_ttl.setter
    def idle_ttl(self, ttl: float | Unstated | None) -> None:
        self.set_idle_ttl(ttl)

    @idle_ttl.deleter
    def idle_ttl(self) -> None:
        self.set_idle_ttl(self._made_with[0])

    @property
    def max_size(self) -> int | None:
        """The largest number of connections, None for no limit; of all processes of the host, where engines
        state ``share``."""
        limit = self.core.limit
        return None if limit == math.inf else int(limit)

    @max_size.setter
    def max_size(self, size: int | Unstated | None) -> None:
        self.set_max_size(size)

    @max_size.deleter
    def max_size(self) -> None:
        self.set_max_size(self._made_with[1])

    @property
    def is_full(self) -> bool:
        """Is there no slot left?"""
        return len(self.core.ledger.slots) >= self.core.limit

    @property
    def idle_connections(self) -> list[Connection]:
        """The open connections that nobody has."""
        counting = (c for c in self.connections.values() if c.state in (IDLE, LOCKED))
        return [c for c in counting if not c.busy and not c.closed]

    @property
    def busy_connections(self) -> list[Connection]:
        """The open connections that somebody has."""
        return [c for c in self.connections.values() if c.busy and not c.closed]

    @property
    def executing_connections(self) -> list[Connection]:
        """The connections that execute an asynchronous operation."""
        return [c for c in self.connections.values() if c.executing]

    @property
    def locked_connections(self) -> list[Connection]:
        """The connections that are locked, also by a session that is dead."""
        return [c for c in self.connections.values() if c.locked]

    @property
    def closed_connections(self) -> list[Connection]:
        """The connections that the server or somebody else has closed."""
        return [c for c in self.connections.values() if c.closed]

    @property
    def idle_start(self) -> float | None:
        """Since when nobody has had a connection, by :attr:`time_method`; None while somebody has one.

        Set, what is idle counts as idle since then; None is now.
        """
        slots: list[Any] = self.core.slots()
        if any(slot.busy for slot in slots):
            return None
        return max((slot.since for slot in slots), default=self.core.ledger.vacant_since)

    @idle_start.setter
    def idle_start(self, start: float | None) -> None:
        since = self.core.now() if start is None else start
        self.core.section.run(ages.idle_since, self.core.ledger, since)

    @idle_start.deleter
    def idle_start(self) -> None:
        self.idle_start = None

    @property
    def idle_duration(self) -> float:
        """Seconds for which nobody has had a connection; 0 while somebody has one."""
        start = self.idle_start
        return 0.0 if start is None else max(0.0, self.core.now() - start)

    def audit(self) -> Audit:
        """Compare the bookkeeping with the sockets and with who is alive, and put right what is wrong.

        It collects garbage, and looks at each connection; where something looks wrong, it looks again when
        the worker has done what it had to do, for it may be under way.  To be called now and then, in tests,
        or in doubt.  What is mended is a bug, or the work of an exception from outside (Ctrl-C,
        ``PyThreadState_SetAsyncExc``).

        :raises CheckoutReentered: this thread is inside the pool already.
        """
        return self.core.upkeep.audit()

    @property
    def numbers(self) -> Numbers:
        """How many connections are in which state; takes no lock."""
        return self.core.numbers

    @property
    def last_timeouts(self) -> tuple[Any, ...]:
        """Snapshots of the last checkouts that got nothing within their time, or were rejected, the newest
        last."""
        return tuple(self.core.timeouts.copy())

    def statistics(self) -> Statistics:
        """Return what there is and what was done; takes no lock, from any thread."""
        return statistics_of(self.core)

    @property
    def detached(self) -> int:
        """Connections that were detached from the pool and are, as far as one can see, open."""
        return len(self.core.connections.detached)

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
            "exceptions": sum(c.exceptions for c in self.connections.values()),
            "executions": sum(c.executions for c in self.connections.values()),
            "full": self.is_full,
            "idle": {"duration": self.idle_duration, "ttl": self.idle_ttl},
            "label": self.label,
            "max_size": self.max_size,
            "statistics": self.statistics().as_dict(),
        }

    def _find(self, connection: Any) -> Connection:
        slot: Connection | None = self.core.connections.find(connection)
        if slot is None:
            raise ConnectionNotFoundError(self.id, id(connection))
        return slot

    def _lock_for(self, slot: Connection, session: object) -> bool:
        def died(ref: weakref.ref[Any]) -> None:
            self.core.section.post(locks.session_died, self.core.ledger, slot, ref)

        try:
            ref = weakref.ref(session, died)
        except TypeError:
            kind = type(session).__name__
            raise TypeError(
                f"session={kind!r} object can't be weakly referenced. Pass an instance of a class of your "
                "own, so that the pool sees when it no longer exists"
            ) from None
        return self.core.section.decide(locks.lock, self.core.ledger, slot, ref, self.core.now())

    def _opened(self) -> None:
        self._listed = True

    def _vacant(self) -> None:
        self._on_vacant(self)

    def _new_connection(self) -> Connection:
        connection = Connection()
        connection._pool = self
        return connection

    def __contains__(self, connection: object) -> bool:
        return self.core.connections.find(connection) is not None

    def __len__(self) -> int:
        return len(self.core.ledger.slots)

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


def _ttl(value: float | Unstated | None) -> float | None:
    if isinstance(value, Unstated):
        return None
    seconds = parameters.seconds("idle_ttl", value)
    return math.inf if seconds is None else seconds


def _limit(value: int | Unstated | None) -> float | None:
    if isinstance(value, Unstated):
        return None
    size = parameters.max_size("max_size", value)
    return math.inf if size is None else size


def _nothing(_: Pool) -> None: ...


def _put_into_a_pool(connection: Connection) -> None:
    Pool(f"connection-{id(connection)}", idle_ttl=None)._adopt(connection)


Connection.put_into_a_pool = _put_into_a_pool
