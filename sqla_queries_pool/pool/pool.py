"""What queries does with a pool: add, get, lock, free, remove, and look."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import parameters
from ..budget.ledger import GAVE_WAY
from ..budget.slots import CLOSING, HELD, IDLE, OPENING, REJECTED, Attachment, Numbers, Slot, Waiter
from ..budget.stats import Statistics
from ..errors import ConnectionBusyError, ConnectionNotFoundError, NoIdleConnectionsError, PoolFullError
from ..parameters import Unstated
from ..runtime.core import Core
from ..runtime.effects import close_quietly
from ..sockets import liveness
from ..sockets.lingering import LONGEST
from .connection import Connection

MOST_TIMEOUTS = 20
"""How many checkouts that got nothing are remembered."""
DEFAULT_IDLE_TTL = 60.0
"""queries' default ``idle_ttl``, in seconds."""
DEFAULT_MAX_SIZE = 1
"""queries' default ``max_size``, for pools that are made by hand."""


class Pool(Core):
    """The connections of one database: the budget, and who has what.

    :param pool_id: the pool id.
    :param idle_ttl: seconds after which an idle connection is closed; None for never.
    :param max_size: the largest number of connections; None for no limit.
    :param time_method: a monotonic clock in seconds, in place of ``time.monotonic``.
    :raises ParameterError: a number has no meaning.
    """

    def __init__(
        self,
        pool_id: str,
        idle_ttl: float | Unstated | None = DEFAULT_IDLE_TTL,
        max_size: int | Unstated | None = DEFAULT_MAX_SIZE,
        time_method: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(pool_id, time_method)
        self._timeouts: deque[Any] = deque(maxlen=MOST_TIMEOUTS)
        now = self._clock()
        self._ledger.set_ttl(_ttl(idle_ttl), now)
        self._ledger.set_limit(_limit(max_size), now)

    def add(self, connection: Any) -> None:
        """Count a DBAPI connection that was opened elsewhere.  It is never given to an engine.

        :raises PoolFullError: there is no slot for it; it has been closed, as queries does.
        :raises ValueError: it is in the pool already.
        """
        try:
            self.adopt(Connection(connection))
        except PoolFullError:
            close_quietly(connection, self.label)
            raise

    def adopt(self, slot: Connection) -> None:
        """:meth:`add`, but for a :class:`Connection`, and without closing anything."""
        handle = slot.handle
        if handle is None:
            raise ValueError("There is no DBAPI connection to add")
        work = None
        try:
            if self._by_handle.setdefault(id(handle), slot) is not slot:
                raise ValueError("Connection already exists in pool")
            slot._pool = self
            work = self._decide(self._ledger.add, slot, self._clock())
        finally:
            if slot not in self._ledger.slots and self._by_handle.get(id(handle)) is slot:
                del self._by_handle[id(handle)]
                slot._pool = None
        if work is None:
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
            elif not slot.executing and self._lock_for(slot, session):
                return handle
        raise NoIdleConnectionsError(self.id)

    def lock(self, connection: Any, session: object) -> None:
        """Lock an idle connection for ``session``, which is referred to weakly.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: somebody has it.
        """
        slot = self._find(connection)
        if slot.stale:
            self._reset(slot, True)
        if slot.executing or not self._lock_for(slot, session):
            raise ConnectionBusyError(id(connection))

    def free(self, connection: Any) -> None:
        """Take a session's lock off a connection: it is rolled back and idle again.

        :raises ConnectionNotFoundError: it is not in the pool.
        :raises ConnectionBusyError: it is executing, or an engine has it.
        """
        slot = self._find(connection)
        if slot.executing or slot.state is HELD:
            raise ConnectionBusyError(id(connection))
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
        self._do(self._decide(self._ledger.retire_all))
        for slot in list(self._by_handle.values()):
            if slot.executing:
                busy.append(slot.id)
                continue
            work = self._decide(self._ledger.close_one, slot, True)
            if work:
                self._do(work)
            elif slot.state is HELD and slot.entry is not None:
                self._close_under(slot, slot.entry())
        if busy:
            raise ConnectionBusyError(busy[0])

    def expire(self, rolling: bool = False) -> None:
        """Replace all connections of the engines, as when credentials were rotated.

        :param rolling: renew them one after the other in the background; else what is idle is closed at once.
            What is out is replaced when it comes home, either way.
        """
        if rolling:
            for attachment in [a for ref in list(self._ledger.attachments) if (a := ref())]:
                self.expire_rolling(attachment)
        else:
            self._do(self._decide(self._ledger.retire_all))

    def _close_under(self, slot: Connection, record: Any) -> None:
        """Close a connection that an engine has out.

        The socket alone: the record is its holder's, who may be reopening it.  Marked as it is, it is
        reopened at its next checkout at the latest.
        """
        handle = slot.handle
        if record is None or handle is None:
            return
        record.invalidate(soft=True)
        liveness.hang_up(handle)  # whoever waits for an answer in there has the driver's own lock
        with self.lingering.closing(handle, LONGEST):
            close_quietly(handle, self.label)
        if slot.state is IDLE:  # it came home just then
            self._do(self._decide(self._ledger.close_one, slot))

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
        before = self._ledger.limit
        self._do(self._decide(self._ledger.set_limit, _limit(size), self._clock()))
        self.say_limit(before)

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
    def waiters(self) -> list[Waiter]:
        """Who waits for a slot, in no order."""
        return self._ledger.waiters()

    def _make_lock(self) -> None:
        super()._make_lock()
        self.looking = threading.RLock()
        """Whoever makes a snapshot for an error has it: see diagnostics.py."""
        self.looked: Any = None
        """The last of them; written under :attr:`looking`, as is ..."""
        self.looked_for = 0.0, 0.0
        """... how many seconds went into them, less a fiftieth of the time since, and when that was so."""

    def after_fork_in_child(self) -> list[Any]:
        """:meth:`Core.after_fork_in_child`."""
        self._timeouts.clear()
        return super().after_fork_in_child()

    def got_nothing(self, seen: Any) -> None:
        """A checkout got nothing within its time, or was turned away; ``seen`` is a snapshot of why."""
        self.count("rejected" if seen.diagnosis.kind in REJECTED else "timeouts")
        if seen.diagnosis.kind == "deadlock":
            self.count("deadlocks")
        if not self._timeouts or self._timeouts[-1].taken_at != seen.taken_at:  # not one that is shared
            self._timeouts.append(seen)

    @property
    def last_timeouts(self) -> tuple[Any, ...]:
        """Snapshots of the last checkouts that got nothing within their time, or were turned away, the newest
        last."""
        return tuple(self._timeouts.copy())

    def statistics(self) -> Statistics:
        """Return what there is and what was done; takes no lock, from any thread."""
        n, totals = self.numbers, self._ledger.totals
        used, waited, connects = totals.used.frozen(), totals.waited.frozen(), totals.connects.frozen()
        closes = dict(totals.closes)
        return Statistics(
            pid=self.id,
            label=self.label,
            limit=self.max_size,
            open=n.open,
            idle=n.idle,
            held=n.held,
            opening=n.opening,
            closing=n.closing,
            waiting=n.waiting,
            peak_held=self._ledger.peak_held,
            checkouts=used.count + totals.left,
            waits=waited.count,
            timeouts=totals.timeouts,
            rejected=totals.rejected,
            deadlocks=totals.deadlocks,
            bypasses=totals.bypasses,
            connects=connects.count,
            connect_errors=totals.connect_errors,
            closes=closes,
            evictions=closes.get(GAVE_WAY, 0),
            dead=totals.dead,
            failed_resets=totals.failed_resets,
            mended=totals.mended,
            wait_time=waited,
            use_time=used,
            connect_time=connects,
            liveness="poll" if liveness.AVAILABLE else "ping",
        )

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
            "statistics": self.statistics().as_dict(),
        }

    def _find(self, connection: Any) -> Connection:
        slot = self._by_handle.get(id(connection))
        if slot is None or slot.handle is not connection:
            raise ConnectionNotFoundError(self.id, id(connection))
        return slot

    def _lock_for(self, slot: Connection, session: object) -> bool:
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
        return self._decide(self._ledger.lock, slot, ref, self._clock())

    def _reset_stale(self, attachment: Attachment) -> None:
        for slot in self._decide(self._ledger.stale, attachment):
            self._reset(slot, True)

    def _new_connection(self) -> Connection:
        connection = Connection()
        connection._pool = self
        return connection

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
