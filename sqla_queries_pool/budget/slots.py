"""The nouns of the ledger: slots and their states, engines, quotas, waiters.

A *slot* is one unit of the budget: an open connection, or the right to open one.  An *entry* is what
its holder has in hand: SQLAlchemy's record, a :class:`Permit` before there is one, or, for a
connection that was added by hand, the slot itself.  ledger.py has the verbs.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple, Protocol

from .queue import Pace

OPENING = "opening"
"""Its holder may open a connection, or is opening it.  It is in ``ledger.opening``."""
IDLE = "idle"
"""Nobody has it.  It is in the list ``idle`` of its engine, or in ``hollow`` where it has no connection."""
HELD = "held"
"""A checkout has it; or the pool itself, while it renews it.  It is in no list of its engine."""
LOCKED = "locked"
"""A session of the queries API has it.  It is in the list ``locked`` of its engine."""
CLOSING = "closing"
"""Its connection is being closed, and counts until then.  It is in ``ledger.closing``."""
GONE = "gone"
"""It does not count: not yet, or not any more."""
OUT = (HELD, LOCKED)
"""The states of what somebody has out; ``ledger.out`` counts them."""

TRANSITIONS: Final[dict[tuple[str, str], str]] = {
    (GONE, OPENING): "_permit: a checkout, or the housekeeper, may open a connection",
    (GONE, IDLE): "add: a connection was added by hand",
    (GONE, CLOSING): "_closing: it gave way to a permit that died before it was closed, so it counts again",
    (OPENING, HELD): "opened: the one that opened it has it",
    (OPENING, CLOSING): "_closing: the one that opened it has died with the socket open",
    (OPENING, GONE): "remove: opening failed, or its permit has died",
    (
        IDLE,
        HELD,
    ): "take, _hold, renew, borrow: a checkout has it, at once or as a waiter; or the pool itself",
    (IDLE, LOCKED): "lock: a session has it",
    (IDLE, CLOSING): "_closing: it is too old, too many, disposed, dead or removed",
    (IDLE, GONE): "remove: it gave way to a permit, which closes its connection",
    (HELD, IDLE): "give: it was returned; it may go on to a waiter or be closed in the same operation",
    (HELD, CLOSING): "_closing: its entry has died, nobody can return it",
    (HELD, GONE): "remove: it was detached, or its entry has died without a connection",
    (LOCKED, HELD): "give_back: the lock of its session was taken off and it was reset; it is returned next",
    (LOCKED, CLOSING): "_closing: it was removed, by force if its session lives",
    (LOCKED, GONE): "remove: its session has died, and it gave way: as from idle",
    (CLOSING, CLOSING): "_closing: the work of closing it got lost, and is made again",
    (CLOSING, GONE): "remove: it is closed",
}
"""(From, to): the functions that write it, and what it means.

The functions are in ledger.py, state.py, ages.py and locks.py and run under the pool's lock.  They change a
state through :meth:`LedgerState.move` alone, which holds them to this table.  But the two transitions of the
hot path, in :meth:`Ledger.take` and :meth:`Ledger.give`, are written out: a call would cost a checkout and
its return a frame each, and tests/test_fast_path.py counts those.  A forked child removes its parent's
slots."""

UNKNOWN = "unknown"
"""What an engine does that has opened no connection yet."""

OTHER = "other"
"""The class of callers of those that state none; an engine may say what it may have, as of any class."""
REJECTED = QUEUE_FULL, OVERLOAD, DRAINED, UNREACHABLE = "queue-full", "overload", "drained", "unreachable"
"""Why the pool rejects a checkout."""
SUSPENDED = "suspended"
"""Why checkouts wait although there may be room."""


class NotHeld(RuntimeError):
    """A connection was returned by somebody who did not have it: twice, or another pool's."""


class Quota:
    """What one engine may use and uses, across the pools that it had: dispose() makes a new one."""

    __slots__ = ("slots", "split", "stated", "stopped")

    def __init__(self, stated: float | None) -> None:
        self.stated = stated
        """The ``max_size`` that the engine states: its own ceiling, its wish for the pool's limit.
        ``inf`` asks for no limit, ``None`` asks for nothing and has no ceiling of its own."""
        self.split = False
        """Has the engine been used in more than one runtime?  Then not all of its slots are kin."""
        self.slots: set[Slot] = set()
        """All slots that count against the ceiling."""
        self.stopped: str | None = None
        """:data:`SUSPENDED` or :data:`DRAINED` where the engine hands nothing out; written by stopping.py."""

    @property
    def full(self) -> bool:
        return self.stated is not None and len(self.slots) >= self.stated


class Terms(NamedTuple):
    """What is stated of one class of callers (classes.py)."""

    min: int = 0
    """As many it may have before all others, while it needs them."""
    max: float = math.inf
    """More it never has."""
    weight: float = 1.0
    """Its share of what several classes want."""

    def __str__(self) -> str:
        return (
            f"min={self.min}, max={'none' if self.max == math.inf else int(self.max)}, weight={self.weight:g}"
        )


class Rejected(NamedTuple):
    """What a waiter gets that may not wait, or not for longer: why its queue is too long, or too slow."""

    kind: str
    """One of :data:`REJECTED`."""
    why: str
    """A sentence, for the error."""


class Slot:
    """One unit of the budget."""

    __slots__ = (
        "__weakref__",
        "begun",
        "caller_class",
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
        "socket",
        "stack",
        "state",
        "suspect",
        "uses",
    )

    def __init__(self, handle: Any = None) -> None:
        self.state = GONE
        """One of the words above; written under the lock alone, see :data:`TRANSITIONS`."""
        self.socket: Any = None
        """What any thread may look at, hang up and close (``fileno()``, ``close()``): the DBAPI connection
        itself, or what stands for one that belongs to an event loop; written with :attr:`handle`."""
        self.handle = handle
        """The DBAPI connection, None while there is none (opening, hollow, closed); written by
        its holder, when that opens or closes the socket."""
        self.begun: Callable[[], Any] | None = None
        """Has a transaction begun, as far as the driver knows without asking the server?  None where nobody
        needs to know, because a rollback of nothing costs nothing; written with :attr:`handle`."""
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
        """Weak: the engine's side of the ledger; shared by all its slots."""
        self.quota: Quota | None = None
        """The quota that it counts against."""
        self.expires = math.inf
        """When its lifetime is over, by the pool's clock: then it is renewed, when it is idle.  Written with
        :attr:`handle`."""
        self.generation = 0
        """The attachment's generation when the connecting of this socket began."""
        self.holder: Any = None
        """The thread or the task that holds or opens it (concurrency/); None for nobody, or the pool
        itself."""
        self.label: str | None = None
        """What its holder calls its work (labels.py); written by the holder, for a waiter when it gets its
        answer, and left as it is on return."""
        self.caller_class: str | None = None
        """The class of its holder, written by the ledger where there are classes; as ``label``."""
        self.stack: Any = ()
        """Where it was checked out (stacks.py), with ``track_stacks``; as ``label``."""
        self.instead_of: Slot | None = None
        """While opening: the slot that gave way to it, and is perhaps not closed yet."""
        self.reason: str | None = None
        """Why its connection is about to be closed, where that is known; written before it is closed."""
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
        """The entry that gave way, or None.  Its slot does not count any more: this one stands for both."""


class Waiter(Protocol):
    """One blocked checkout; concurrency/ has those of threads and of tasks."""

    attachment: Attachment
    holder: Any
    label: str | None
    caller_class: str | None
    since: float
    before: int
    stood_still: float
    answer: Any

    def wait(self, seconds: float) -> None: ...
    def wake(self) -> None: ...
    def accept(self) -> Any: ...


def _nobody() -> None: ...


class Attachment:
    """One engine's side of the ledger: its idle connections and its queue.

    Owned by the engine's ``QueriesPool``; the ledger refers to it weakly, except while somebody
    waits in its queue.  An engine of asyncio has one for each event loop that uses it, with one quota.

    :param quota: what the engine may use, across the pools that it had.
    :param ttl: the ``idle_ttl`` that the engine states, in seconds, ``inf`` for never.
    :param lifo: use the connection first that was returned last; else the one that is idle for longest.
    :param ping_after: seconds; a connection that was idle for as long is suspect.
    :param min_size: how many connections are kept open.
    """

    __slots__ = (
        "__weakref__",
        "answered",
        "caller",
        "classes",
        "fail_fast_after",
        "first_look",
        "generation",
        "hollow",
        "idle",
        "idle_in_transaction_after",
        "leak_after",
        "lifo",
        "liveness",
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
        "runtime",
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
        idle_in_transaction_after: float = math.inf,
        fail_fast_after: float = math.inf,
    ) -> None:
        self.quota = quota
        self.runtime: Any = None
        """What waits, opens and closes for it (concurrency/): threads, or one event loop.  The ledger
        compares it with others', and that is all."""
        self.classes: Mapping[str, Terms] = {}
        """The classes of callers that the engine states, for the whole pool."""
        self.caller: str | None = None
        """The class of its own checkouts, where they state none."""
        self.lifo = use_lifo
        self.min_size = min_size
        """How many connections are kept open, once it is warm."""
        self.warm = False
        """Are :attr:`min_size` connections to be kept open?  Since the first one was opened."""
        self.opener: Callable[[], Callable[[Permit], Any] | None] = _nobody
        """Weak: how the engine opens a connection by a permit, where the pool does so in its stead."""
        self.ping_after = ping_after
        """Seconds; a connection that was idle for as long is suspect."""
        self.liveness = UNKNOWN
        """How it is seen whether its idle connections are alive: one of sockets/liveness.py's words."""
        self.leak_after = leak_after
        """Seconds after which one that is out is reported."""
        self.idle_in_transaction_after = idle_in_transaction_after
        """Seconds after which one that is idle in a transaction is reported."""
        self.own_ttl = idle_ttl
        """The ``idle_ttl`` that the engine states, in seconds, ``inf`` for never."""
        self.ttl = idle_ttl
        """The one in force: ``set_idle_ttl`` of the pool overrules the engine's own."""
        self.max_waiting = max_waiting
        """How long :attr:`queue` may be."""
        self.queue_target = queue_target
        """Seconds; no checkout waits for longer while the queue is overloaded."""
        self.fail_fast_after = fail_fast_after
        """Seconds without a connection after which checkouts that find nothing idle are rejected."""
        self.first_look = 0.0
        """Seconds that a checkout may wait before there is anything to look for; 0 where that is not simple:
        the pool may reject it, or what it is handed needs more than a look at the socket."""
        self.generation = 0
        """Given to new connections; dispose() ends one."""
        self.retired: float = 0
        """Connections of a generation below this one close when they are returned; ``inf`` while the engine
        is stopped, so that a checkout on the short way, which does not ask, finds nothing idle."""
        self.ref: weakref.ref[Attachment] = weakref.ref(self)
        """What the slots and the ledger know it by; ``attach`` adds the callback."""
        self.make_fresh()

    def kin(self, other: Attachment) -> bool:
        """May the other one's connections be used here?  Those of the same engine before a dispose may; those
        of another event loop may not."""
        return other.quota is self.quota and other.runtime is self.runtime

    @property
    def own(self) -> Collection[Slot]:
        """The slots of its kin."""
        if not self.quota.split:
            return self.quota.slots
        homes = [(slot, slot.home()) for slot in self.quota.slots if slot.home is not None]
        return [slot for slot, home in homes if home is not None and self.kin(home)]

    def make_fresh(self) -> None:
        """Have no connections and no waiters: at first, and in a forked child, as they are the parent's."""
        self.idle: deque[Any] = deque()
        """Entries of open connections, oldest idle on the left: entries are returned on the right, so
        the left end alone tells whether something has expired, whichever end is used first."""
        self.pop = self.idle.pop if self.lifo else self.idle.popleft
        """Takes the next one to be used off :attr:`idle`."""
        self.hollow: deque[Any] = deque()
        """Entries that were returned without a connection (invalidated): a slot, but no socket."""
        self.locked: dict[Slot, Any] = {}
        """What queries sessions have locked: slot -> entry; it keeps the entry alive."""
        self.queue: OrderedDict[Waiter, None] = OrderedDict()
        """Waiters in order of arrival; one that gives up leaves from the middle in O(1)."""
        self.pace = Pace()
        """How :attr:`queue` moves; written by the ledger."""
        self.answered = 0
        """How many of its waiters have had an answer."""


class Numbers(NamedTuple):
    """How many slots are in which state."""

    total: int
    """All that count against the limit."""
    held: int
    """Those that somebody has; not what the pool itself renews."""
    idle: int
    opening: int
    """Also those that are being renewed."""
    closing: int
    hollow: int
    """Idle slots without a connection: it was invalidated."""
    waiting: int
    """Blocked checkouts."""

    @property
    def open(self) -> int:
        """Connections that are open, or still being closed."""
        return self.total - self.opening - self.hollow
