"""The nouns of the bookkeeping: slots, who they belong to, who waits, and what is left to do.

A *slot* is one unit of the budget: an open connection, or the right to open one.  An *entry* is what
its holder has in hand: SQLAlchemy's record, a :class:`Permit` before there is one, or, for a
connection that was added by hand, the slot itself.  ledger.py has the verbs.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from .queue import Pace

OPENING = "opening"
IDLE = "idle"
HELD = "held"
LOCKED = "locked"
CLOSING = "closing"
GONE = "gone"
REJECTED = QUEUE_FULL, OVERLOAD = "queue-full", "overload"
"""Why a checkout is turned away."""


class NotHeld(RuntimeError):
    """A connection was given back by somebody who did not have it: twice, or a stranger's."""


class Quota:
    """What one engine may use and uses, across the pools that it had: dispose() makes a new one."""

    __slots__ = ("slots", "stated")

    def __init__(self, stated: float | None) -> None:
        self.stated = stated
        """The ``max_size`` that the engine states: its own ceiling, its wish for the pool's limit.
        ``inf`` asks for no limit, ``None`` asks for nothing and has no ceiling of its own."""
        self.slots: set[Slot] = set()
        """All slots that count against the ceiling."""

    @property
    def full(self) -> bool:
        return self.stated is not None and len(self.slots) >= self.stated


class Rejected(NamedTuple):
    """What a waiter gets that may not wait, or not for longer: why its queue is too long, or too slow."""

    kind: str
    why: str


class Slot:
    """One unit of the budget."""

    __slots__ = (
        "__weakref__",
        "entry",
        "expires",
        "generation",
        "handle",
        "holder",
        "home",
        "instead_of",
        "label",
        "poll",
        "process",
        "quota",
        "reason",
        "session",
        "since",
        "stack",
        "state",
        "suspect",
        "uses",
    )

    def __init__(self, handle: Any = None) -> None:
        self.state = GONE
        """One of the words above; written under the lock alone."""
        self.handle = handle
        """The DBAPI connection, None while there is none (opening, hollow, closed); written by
        whoever has the slot, when it opens or closes the socket."""
        self.poll: Any = None
        """Called with 0: is there news on the socket?  See liveness.py; written with :attr:`handle`."""
        self.suspect = handle is None
        """Does it take more than :attr:`poll` to know that the connection can be used?  There is none, or it
        was idle for long, or an older one was found dead.  Written by its holder, and by the ledger."""
        self.process = os.getpid()
        """Which process opened the socket.  A forked child has the object too, and must not close it:
        the Terminate message would end the parent's session."""
        self.entry: EntryRef | None = None
        """Weak: what the holder has in hand; None where that is the slot itself."""
        self.home: weakref.ref[Attachment] | None = None
        """Weak: the engine's side of the books; shared by all its slots."""
        self.quota: Quota | None = None
        """The quota that it counts against."""
        self.expires = math.inf
        """When its lifetime is over, by the pool's clock: then it is renewed, unless it is out.  Written with
        :attr:`handle`."""
        self.generation = 0
        """The attachment's generation when the connecting of this socket began."""
        self.holder: Any = None
        """The thread that holds or opens it (callers.py); None for nobody, or the pool itself."""
        self.label: str | None = None
        """What its holder calls what he does (labels.py); his, and left as it is when he gives it back."""
        self.stack: Any = ()
        """Where it was checked out (stacks.py), with ``track_stacks``; as ``label``."""
        self.instead_of: Slot | None = None
        """While opening: the slot that gave way to it, and is perhaps not closed yet."""
        self.reason: str | None = None
        """Why its connection is about to be closed, where that is known; written by who closes it."""
        self.session: weakref.ref[Any] | None = None
        """Weak: the queries session that locked it, or the :class:`Resetter`; dead but not None means a stale
        lock."""
        self.since = 0.0
        """Since when it is in its state, by the pool's clock."""
        self.uses = 0
        """How often it was taken."""

    @property
    def slot(self) -> Slot:
        """A connection that was added by hand is its own entry."""
        return self

    @property
    def stale(self) -> bool:
        """Locked by a session that is dead: to be rolled back or closed before anyone gets it."""
        return self.session is not None and self.session() is None


class Entry(Protocol):
    """What a holder has in hand; see the module's text."""

    @property
    def slot(self) -> Any: ...


class EntryRef(weakref.ref[Any]):
    """A weak reference that knows the slot of what it refers to, for when that has died."""

    __slots__ = ("slot",)

    def __new__(cls, entry: Any, callback: Callable[[EntryRef], None], slot: Slot) -> EntryRef:
        self = super().__new__(cls, entry, callback)
        self.slot = slot
        return self

    def __init__(self, entry: Any, callback: Callable[[EntryRef], None], slot: Slot) -> None:
        super().__init__(entry, callback)  # type: ignore[call-arg]

    slot: Slot


class Permit:
    """The right to open one connection, and what has to be closed before."""

    __slots__ = ("__weakref__", "evicts", "slot")

    def __init__(self, slot: Slot, evicts: Any) -> None:
        self.slot = slot
        self.evicts = evicts
        """The entry that gave way, or None.  Its slot is off the books: this one stands for both."""


class Waiter(Protocol):
    """One blocked checkout; gates.py has the one for threads."""

    attachment: Attachment
    holder: Any
    label: str | None
    since: float
    before: int
    answer: Any

    def wait(self, seconds: float) -> None: ...
    def wake(self) -> None: ...


def _nobody() -> None: ...


class Attachment:
    """One engine's side of the ledger: its idle connections and its queue.

    Owned by the engine's ``QueriesPool``; the ledger refers to it weakly, except while somebody
    waits in its line.
    """

    __slots__ = (
        "__weakref__",
        "answered",
        "generation",
        "hollow",
        "idle",
        "leak_after",
        "locked",
        "max_waiting",
        "min_size",
        "opener",
        "own_ttl",
        "pace",
        "ping_after",
        "pop",
        "queue",
        "queue_target",
        "quota",
        "ref",
        "retired",
        "ttl",
        "warm",
    )

    def __init__(
        self,
        quota: Quota,
        idle_ttl: float,
        use_lifo: bool = True,
        ping_after: float = math.inf,
        min_size: int = 0,
        leak_after: float = math.inf,
        max_waiting: float = math.inf,
        queue_target: float = math.inf,
    ) -> None:
        self.quota = quota
        self.min_size = min_size
        """How many connections are kept open, once it is warm."""
        self.warm = False
        """Are :attr:`min_size` connections to be kept open?  Since the first one was opened."""
        self.opener: Callable[[], Callable[[Permit], Any] | None] = _nobody
        """Weak: how the engine opens a connection by a permit, for whoever does so in its stead."""
        self.ping_after = ping_after
        """Seconds; a connection that was idle for as long is suspect."""
        self.leak_after = leak_after
        """Seconds after which one that is out is told of."""
        self.own_ttl = idle_ttl
        """The ``idle_ttl`` that the engine states, in seconds, ``inf`` for never."""
        self.ttl = idle_ttl
        """The one in force: ``set_idle_ttl`` of the pool overrules the engine's own."""
        self.idle: deque[Any] = deque()
        """Entries of open connections, oldest idle on the left: entries come home on the right, so
        the left end alone tells whether something has expired, whichever end is used first."""
        self.pop = self.idle.pop if use_lifo else self.idle.popleft
        """Takes the next one to be used off :attr:`idle`."""
        self.hollow: deque[Any] = deque()
        """Entries that came home without a connection (invalidated): a slot, but no socket."""
        self.locked: dict[Slot, Any] = {}
        """What queries sessions have locked: slot -> entry; it keeps the entry alive."""
        self.queue: OrderedDict[Waiter, None] = OrderedDict()
        """Waiters in order of arrival; one that gives up leaves from the middle in O(1)."""
        self.pace = Pace()
        """How :attr:`line` moves; written by the ledger."""
        self.answered = 0
        """How many of its waiters have had an answer."""
        self.max_waiting = max_waiting
        """How long :attr:`line` may be."""
        self.queue_target = queue_target
        """Seconds; nobody waits for longer while the line is overloaded."""
        self.generation = 0
        """Born into new connections; dispose() ends one."""
        self.retired = 0
        """Connections of a generation below this one close when they come home."""
        self.ref: weakref.ref[Attachment] = weakref.ref(self)
        """What the slots and the ledger know it by; ``attach`` adds the callback."""


class Wake(NamedTuple):
    """Work: open the gate of a waiter that has its answer."""

    waiter: Waiter


class Close:
    """Work: close a connection, then report :meth:`Ledger.closed`.  The ledger sees whether it got lost."""

    __slots__ = ("__weakref__", "entry", "reason", "slot")

    def __init__(self, slot: Slot, entry: Any, reason: str) -> None:
        self.slot = slot
        self.entry = entry
        self.reason = reason


class Reset(NamedTuple):
    """Work: if the session that locked it is dead, :meth:`Ledger.unlock` it, roll back, and
    :meth:`Ledger.give_locked`."""

    slot: Slot


class Resetter:
    """Who resets a connection has its lock meanwhile; gone before he is done, the lock is stale again."""

    __slots__ = ("__weakref__",)


class Renew(NamedTuple):
    """Work: close a connection and open it again, then :meth:`Ledger.renewed`; it is out meanwhile."""

    slot: Slot
    entry: Any
    since: float
    """Since when it is idle."""


class Fill(NamedTuple):
    """Work: open a connection for an engine that has fewer than its ``min_size``."""

    attachment: Attachment


class Leaked(NamedTuple):
    """Work: say that a connection is out for long."""

    slot: Slot
    seconds: float


class Returned(NamedTuple):
    """Work: say that it came home after all."""

    slot: Slot
    seconds: float


class Due(NamedTuple):
    """Work: see to it that somebody calls :meth:`Ledger.expire` at this time of the pool's clock."""

    at: float


Work: TypeAlias = list[Wake | Close | Reset | Renew | Fill | Leaked | Returned | Due]


class Numbers(NamedTuple):
    """How many slots are in which state."""

    total: int
    """All that count against the limit."""
    held: int
    idle: int
    opening: int
    closing: int
    hollow: int
    """Idle slots without a connection: it was invalidated."""
    waiting: int
    """Blocked checkouts."""

    @property
    def open(self) -> int:
        """Connections that are open, or still being closed."""
        return self.total - self.opening - self.hollow
