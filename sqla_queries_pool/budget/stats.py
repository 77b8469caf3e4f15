"""What a pool has done so far, in numbers.

:class:`Totals` is the ledger's: it counts under the pool's lock, so nothing is lost between threads.
:class:`Statistics` is what others get: frozen, and made without a lock, so that one number may be a moment
older than the next.  Durations are counted in histograms, which add up and need no more room with time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

BOUNDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
"""Upper bounds of the buckets, in seconds; what took longer is in one more bucket."""
SHORTEST: Final = BOUNDS[0]


@dataclass(frozen=True)
class Histogram:
    """How long something took, and how often."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    """How many took at most as long as the bound of the same index in :data:`BOUNDS`, and longer than the one
    before; the last: longer than all of them."""
    seconds: float = 0.0
    """The sum."""

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Seconds on average, 0 where there was none."""
        return self.seconds / self.count if self.count else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same in what JSON knows."""
        return {"count": self.count, "seconds": self.seconds, "counts": list(self.counts)}

    def __add__(self, other: Histogram) -> Histogram:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(counts, self.seconds + other.seconds)

    def __sub__(self, other: Histogram) -> Histogram:
        """What came after ``other``, an earlier one."""
        counts = tuple(a - b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(counts, self.seconds - other.seconds)


class Durations:
    """A histogram that is being counted."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def frozen(self) -> Histogram:
        """As it is now."""
        return Histogram(tuple(self.counts), self.seconds)


class Totals:
    """What one pool has done; written under its lock alone."""

    __slots__ = (
        *("bypasses", "closes", "connect_errors", "connects", "dead", "deadlocks", "failed_resets", "left"),
        *("mended", "rejected", "timeouts", "used", "waited"),
    )

    def __init__(self) -> None:
        self.used = Durations()
        """From checkout to check-in; one for each connection that was returned."""
        self.left = 0
        """Connections that were out and never returned: detached, or lost with their holder."""
        self.waited = Durations()
        """How long the checkouts waited that were served after a wait."""
        self.connects = Durations()
        """How long opening a connection took."""
        self.connect_errors = 0
        self.closes: Counter[str] = Counter()
        """Reason -> how many connections were closed for it."""
        self.timeouts = 0
        """Checkouts that got no connection within their timeout, deadlocks included."""
        self.rejected = 0
        """Checkouts that were rejected before their time was over; not among the timeouts."""
        self.deadlocks = 0
        self.bypasses = 0
        """How often a connection went to its own engine's waiter although another engine's had waited longer
        (design 6)."""
        self.dead = 0
        """Connections that were found dead before they were used."""
        self.failed_resets = 0
        """Connections that could not be rolled back when they were returned."""
        self.mended = 0
        """What was put right in the ledger (audit.py)."""

    # Letters, see CriticalSection._post: the last argument is the time.

    def closed(self, reason: str, _: float) -> None:
        """A connection was closed."""
        self.closes[reason] += 1

    def connected(self, seconds: float, _: float) -> None:
        """A connection was opened."""
        self.connects.add(seconds)

    def one_more(self, what: str, _: float) -> None:
        """Something happened that is just counted."""
        setattr(self, what, getattr(self, what) + 1)


class LabelledTime(NamedTuple):
    """How long something took, of the checkouts that have one label and one class of callers in common."""

    label: str | None
    """What ``checkout_label`` said; None where it said nothing."""
    caller: str | None
    """The class of callers; None where there are none."""
    time: Histogram

    def as_dict(self) -> dict[str, Any]:
        """The same in what JSON knows."""
        return {"label": self.label, "caller": self.caller, "time": self.time.as_dict()}


NEW_FOLDER = "its files are new, and for half a second only processes whose folder was deleted use them"
"""A :attr:`HostStatistics.problem` that passes."""


class HostProcess(NamedTuple):
    """One process that shares a budget."""

    process: int
    """Its process id, as it sees it itself."""
    program: str
    leases: int
    """How many connections it may have now."""
    waiting: int
    """Blocked checkouts that could use one more."""
    me: bool
    """Is it the process that tells?"""

    def __str__(self) -> str:
        waiting = f", {self.waiting} waiting" if self.waiting else ""
        name = "this process" if self.me else f"process {self.process} ({self.program})"
        return f"{name} {self.leases}{waiting}"


class HostStatistics(NamedTuple):
    """A budget that several processes share, as far as one of them knows: what the others have is a moment
    old."""

    share: str
    """``host``, or the folder."""
    budget: int
    """The largest number of connections of all processes together."""
    processes: tuple[HostProcess, ...]
    """This one, then the others that have something or wait for it, those with the most first."""
    problem: str | None
    """Why not all of it can be had, where that is known."""

    @property
    def leases(self) -> int:
        """How many connections all processes together may have now."""
        return sum(each.leases for each in self.processes)

    @property
    def mine(self) -> int:
        """How many of them are this process's."""
        return sum(each.leases for each in self.processes if each.me)

    @property
    def is_elsewhere(self) -> bool:
        """May other processes have what this one lacks?"""
        return self.mine < self.budget

    def __str__(self) -> str:
        who, count = "; ".join(map(str, self.processes)), len(self.processes)
        processes = f"{count} process{'es' if count > 1 else ''}"
        problem = f". It can't be used fully: {self.problem}" if self.problem else ""
        return f"Host: {self.leases} of {self.budget} taken by {processes}: {who}{problem}"


class ClassStatistics(NamedTuple):
    """One class of callers: what is stated of it, what it has now, and how long it waited."""

    min: int
    max: int | None
    """None for no ceiling."""
    weight: float
    held: int
    """Connections that it has, or opens."""
    waiting: int
    """Blocked checkouts."""
    wait_time: Histogram
    """How long its checkouts waited that were served after a wait."""

    @property
    def waits(self) -> int:
        """Checkouts that were served after a wait in the queue."""
        return self.wait_time.count

    @property
    def is_full(self) -> bool:
        """Has it as many as it may have?"""
        return self.max is not None and self.held >= self.max

    def __str__(self) -> str:
        most = "" if self.max is None else f" of {self.max}"
        return f"{self.held}{most}{f', {self.waiting} waiting' if self.waiting else ''}"


@dataclass(frozen=True)
class Statistics:
    """What one pool has now, and has done since the process began; :meth:`.Pool.statistics` makes it."""

    pid: str
    label: str
    """Which database it is, without the password."""
    limit: int | None
    """The largest number of connections, None for no limit."""
    open: int
    """Connections that are open, or still being closed."""
    idle: int
    held: int
    """Connections that are checked out."""
    opening: int
    """Connections that are being opened, or renewed."""
    closing: int
    waiting: int
    """Blocked checkouts."""
    peak_held: int
    """The most connections that were checked out at once."""
    checkouts: int
    """Connections that were checked out and returned, or detached; not those that are checked out now."""
    waits: int
    """Checkouts that were served after a wait in the queue."""
    timeouts: int
    """Checkouts that got no connection within their timeout, deadlocks included."""
    rejected: int
    """Checkouts that the pool rejected before their timeout (``max_waiting``, ``queue_target``, ``drain()``,
    ``fail_fast_after``); not among the timeouts."""
    deadlocks: int
    bypasses: int
    """How often a connection went to its own engine's waiter although another engine's had waited longer."""
    connects: int
    connect_errors: int
    closes: Mapping[str, int]
    """Reason -> how many connections were closed for it."""
    evictions: int
    """Idle connections that gave way to another engine's."""
    dead: int
    """Connections that were found dead before they were used."""
    failed_resets: int
    """Connections that could not be rolled back when they were returned."""
    mended: int
    """Errors in the bookkeeping that were repaired, by an audit, the housekeeper or a waiting checkout."""
    wait_time: Histogram = field(repr=False)
    use_time: Histogram = field(repr=False)
    connect_time: Histogram = field(repr=False)
    liveness: str = "unknown"
    """How it is seen whether an idle connection is alive.  ``poll``: its socket is looked at before each use,
    and the server is pinged where that does not tell.  ``ping``: the server is pinged, before each use or
    after the connection was idle for some time, for nothing can be seen in between.  ``none``: nothing is
    done.  ``unknown``: none was opened yet.  Of a pool whose engines differ, all of them: ``ping, poll``."""
    host: HostStatistics | None = None
    """The budget that it shares with other processes of the host; None without ``share``."""
    idle_in_transaction: tuple[LabelledTime, ...] = field(default=(), repr=False)
    """For how long checkouts were in a transaction while nothing executed, by label, the worst first: of
    those that have ended and were found so.  With ``idle_in_transaction_after``."""
    classes: Mapping[str, ClassStatistics] = field(default_factory=dict)
    """The classes of callers by name; empty where no engine states ``classes``."""

    def as_dict(self) -> dict[str, Any]:
        """The same in what JSON knows."""
        told = dict(vars(self), closes=dict(self.closes))
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                told[name] = value.as_dict()
        told["idle_in_transaction"] = [each.as_dict() for each in self.idle_in_transaction]
        told["classes"] = {
            name: each._asdict() | {"wait_time": each.wait_time.as_dict()}
            for name, each in self.classes.items()
        }
        if self.host is not None:
            told["host"] = self.host._asdict() | {
                "processes": [each._asdict() for each in self.host.processes]
            }
        return told


class ManagerStatistics(NamedTuple):
    """All pools of the process, and totals to which those have added that are gone."""

    pools: Mapping[str, Statistics] = {}
    """By pool id; nobody writes into it."""
    checkouts: int = 0
    waits: int = 0
    timeouts: int = 0
    rejected: int = 0
    deadlocks: int = 0
    connects: int = 0
    connect_errors: int = 0
    closes: int = 0

    @classmethod
    def of(cls, pools: list[Statistics], gone: ManagerStatistics, *, show: bool = True) -> ManagerStatistics:
        """Add pools up.

        :param gone: what those have done that are not among them.
        :param show: show each of them, too.
        """
        return cls(
            pools={pool.pid: pool for pool in pools} if show else {},
            checkouts=gone.checkouts + sum(pool.checkouts for pool in pools),
            waits=gone.waits + sum(pool.waits for pool in pools),
            timeouts=gone.timeouts + sum(pool.timeouts for pool in pools),
            rejected=gone.rejected + sum(pool.rejected for pool in pools),
            deadlocks=gone.deadlocks + sum(pool.deadlocks for pool in pools),
            connects=gone.connects + sum(pool.connects for pool in pools),
            connect_errors=gone.connect_errors + sum(pool.connect_errors for pool in pools),
            closes=gone.closes + sum(sum(pool.closes.values()) for pool in pools),
        )
