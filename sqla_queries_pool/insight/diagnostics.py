"""Who holds what, who waits, and why: snapshots of a pool, and the text of an exhausted one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ..budget import slots
from ..budget.slots import HELD, LOCKED, QUEUE_FULL, REJECTED, Attachment, Rejected, Slot
from ..budget.stats import Statistics
from ..budget.work import Leaked, Resetter, Returned
from ..errors import CheckoutTimeout, PoolDeadlock, TooManyRequests
from ..logs import logger
from ..pool import Pool
from ..runtime.core import Core
from . import stacks

MOST_NAMED = 3
"""How many holders the first line of an error names."""
MOST_HOLDERS = 10
"""How many holders, and who wait, a report has."""
DEEPEST_SHOWN = 5
"""How many calls of a stack a report shows, the innermost ones."""
MOST_STACKS = 3
"""Of how many of them a report shows where the connection was checked out."""
LONGEST_NAME = 80
"""How many characters of a name or a label are shown."""
LONG = 10.0
"""Seconds for which a connection must be out to look forgotten, at least ..."""
LONGER = 10.0
"""... and so many times as long as connections are used on average."""

MOST_SPENT = 0.25
"""Seconds that go into snapshots for errors before several errors share one, ..."""
OLDEST = 1.0
"""... which is so many seconds old at most."""

WAITING, OPENING, PROBING = "waiting for a slot", "opening a connection", "probing one that was idle"
"""What a checkout may be at."""
_WE = "QueriesPool"
_TRANSACTIONS = {0: "idle", 1: "executing", 2: "in transaction", 3: "in error", 4: "unknown"}
"""libpq's ``PQtransactionStatus``, which psycopg2 and psycopg hand on without asking the server."""


def named(name: str, label: str | None) -> str:
    """For one line: a label may be a request's path, and so anybody's text."""
    shown = [" ".join(text.split())[:LONGEST_NAME] for text in (name, label or "")]
    return f"{shown[0]} [{shown[1]}]" if shown[1] else shown[0]


@dataclass(frozen=True)
class Holder:
    """Who has one connection."""

    thread: int | None
    """The identifier of the thread; None for a session's, and for one that has ended."""
    name: str
    """The thread's name, or the kind of the session that locked it."""
    label: str | None
    """What ``checkout_label`` said when it was checked out."""
    seconds: float
    """For how long."""
    state: str
    """``held``, ``opening`` or ``locked`` (by a session)."""
    uses: int
    """How often the connection was handed out, this time included."""
    backend_pid: int | None
    """The process id of the server's backend, where the driver tells."""
    transaction: str | None
    """``idle``, ``in transaction``, ``in error`` or ``executing``, where the driver tells."""
    stack: tuple[str, ...] = field(default=(), repr=False)
    """Where it was checked out, outermost call first: with ``track_stacks=True``."""
    now_at: tuple[str, ...] = field(default=(), repr=False)
    """Where its thread is now."""
    ended: bool = False
    """Has its thread ended?"""

    def __str__(self) -> str:
        about = [f"{self.seconds:.1f} s"]
        if self.state == slots.OPENING:
            about.append("opening")
        elif self.transaction not in (None, "idle", "unknown"):
            about.append(str(self.transaction))
        return f"{named(self.name, self.label)} ({', '.join(about)})"


@dataclass(frozen=True)
class Waiting:
    """One blocked checkout."""

    thread: int
    name: str
    label: str | None
    seconds: float
    now_at: tuple[str, ...] = field(default=(), repr=False)
    """Where it waits, outermost call first."""

    def __str__(self) -> str:
        return f"{named(self.name, self.label)} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter, most likely, and what to do about it."""

    kind: str
    """One of ``deadlock queue-full overload refused nested-checkout slow-connect leak long-use too-small``."""
    cause: str
    remedy: str
    details: str = ""
    """More lines, where there is more to say."""


@dataclass(frozen=True)
class Snapshot:
    """A pool at one moment: numbers, who has its connections, who waits for one."""

    taken_at: datetime.datetime
    statistics: Statistics
    holders: tuple[Holder, ...]
    """Longest first."""
    waiting: tuple[Waiting, ...]
    """Longest first."""
    last_connect_error: str | None
    diagnosis: Diagnosis | None
    """None unless a checkout got nothing."""

    def named(self) -> str:
        """Who has a connection for longest."""
        names = ", ".join(map(str, self.holders[:MOST_NAMED])) or "nobody any more"
        rest = len(self.holders) - MOST_NAMED
        return f"Held by, longest first: {names}{f', and {rest} more' if rest > 0 else ''}"

    def line(self, what: str = "") -> str:
        """The numbers, for one line of a log."""
        n = self.statistics
        limit = "none" if n.limit is None else n.limit
        counts = f"open {n.open}, held {n.held}, opening {n.opening}, waiting {n.waiting}, limit {limit}"
        return f"{n.label} (pid {n.pid}){f' {what}' if what else ': '}{counts}"

    def report(self) -> str:
        """Who holds and who waits, a line each, and where they are."""
        lines = self.diagnosis.details.splitlines() if self.diagnosis else []
        lines.append("Holders, longest first:")
        for n, holder in enumerate(self.holders[:MOST_HOLDERS]):
            backend = f", backend {holder.backend_pid}" if holder.backend_pid else ""
            lines.append(f"  {holder}, used {holder.uses} times{backend}")
            if n < MOST_STACKS:
                lines += [f"    checked out at {call}" for call in holder.stack[-DEEPEST_SHOWN:]]
                lines += [f"    now at {call}" for call in holder.now_at[-2:]]
        if not self.holders:
            lines.append("  nobody any more")
        if len(self.holders) > MOST_HOLDERS:
            lines.append(f"  and {len(self.holders) - MOST_HOLDERS} more")
        if self.waiting:
            lines.append("Waiting, longest first:")
            lines += [f"  {waiting}" for waiting in self.waiting[:MOST_HOLDERS]]
        if len(self.waiting) > MOST_HOLDERS:
            lines.append(f"  and {len(self.waiting) - MOST_HOLDERS} more")
        if self.last_connect_error:
            lines.append(f"Last connect error: {self.last_connect_error}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same in what JSON knows."""
        return {
            "taken_at": self.taken_at.isoformat(),
            "statistics": self.statistics.as_dict(),
            "holders": [dataclasses.asdict(holder) for holder in self.holders],
            "waiting": [dataclasses.asdict(waiting) for waiting in self.waiting],
            "last_connect_error": self.last_connect_error,
            "diagnosis": None if self.diagnosis is None else dataclasses.asdict(self.diagnosis),
        }


def snapshot(pool: Pool) -> Snapshot:
    """Look at a pool, from any thread, at any time: it takes no lock, and asks no server."""
    error, threads = pool.core.admission.last_error, stacks.Threads()
    return Snapshot(
        taken_at=datetime.datetime.now(datetime.timezone.utc),
        statistics=pool.statistics(),
        holders=tuple(holders(pool, threads)),
        waiting=tuple(waiting(pool, threads)),
        last_connect_error=None if error is None else f"{type(error).__name__}: {str(error).strip()}",
        diagnosis=None,
    )


def _seen(pool: Pool) -> tuple[Snapshot, bool]:
    """Return a snapshot for an error: of this moment, unless many checkouts ask that had nothing; is it?

    Where hundreds wait, a snapshot takes tens of milliseconds, and overload is not to be made worse by
    telling of it: when :data:`MOST_SPENT` is used up, one serves for :data:`OLDEST` seconds.
    """
    with pool.core.looking:  # the others wait for the one, or each would make its own
        begin = time.monotonic()
        spent, at = pool.core.looked_for
        spent = max(0.0, spent - (begin - at) / 50)  # a fiftieth of the time may go into more of them
        seen: Snapshot | None = pool.core.looked
        if seen is None or spent < MOST_SPENT or begin - at >= OLDEST:
            seen = pool.core.looked = snapshot(pool)
            pool.core.looked_for = spent + time.monotonic() - begin, begin
            return seen, True
    return seen, False


def holders(pool: Pool, threads: stacks.Threads) -> list[Holder]:
    """Return who has the connections of a pool, longest first.  Takes no lock of the pool."""
    busy = (HELD, LOCKED, slots.OPENING)
    found = [_holder(slot, pool.core.now(), threads) for slot in pool.connections if slot.state in busy]
    return sorted(found, key=lambda holder: -holder.seconds)


def _holder(slot: Slot, now: float, threads: stacks.Threads) -> Holder:
    caller, session = slot.holder, slot.session
    if session is not None:
        alive = session()
        name = "dead session" if alive is None else f"session {type(alive).__name__}"
        if isinstance(alive, Resetter):
            name = "the pool itself, which resets it"
    else:
        name = "the pool itself" if caller is None else threads.name(caller)
    backend, transaction = of_server(slot.handle)
    return Holder(
        thread=caller.ident if session is None and caller is not None and caller.alive else None,
        name=name,
        label=slot.label,
        seconds=max(0.0, now - slot.since),
        state=slot.state,
        uses=slot.uses,
        backend_pid=backend,
        transaction=transaction,
        stack=stacks.told(slot.stack),
        now_at=() if session is not None else threads.at(caller),
        ended=session is None and caller is not None and not caller.alive,
    )


def waiting(pool: Pool, threads: stacks.Threads) -> list[Waiting]:
    """Return who waits for a connection of a pool, longest first.  Takes no lock of the pool."""
    now = pool.core.now()
    found = [
        Waiting(
            thread=w.holder.ident,
            name=threads.name(w.holder),
            label=w.label,
            seconds=max(0.0, now - w.since),
            now_at=threads.at(w.holder),
        )
        for w in pool.core.ledger.waiters()
    ]
    return sorted(found, key=lambda waiting: -waiting.seconds)


def of_server(handle: Any) -> tuple[int | None, str | None]:
    """What the driver knows without asking the server: the backend's process id, the transaction's state."""
    info = getattr(handle, "info", None)
    try:
        backend = int(info.backend_pid) if info is not None else None
        transaction = _TRANSACTIONS.get(int(info.transaction_status)) if info is not None else None
    except Exception:  # another driver's, or closed meanwhile
        return None, None
    return backend or None, transaction


# -- what is the matter ----------------------------------------------------------------------------


def diagnose(seen: Snapshot, asker: int) -> Diagnosis:
    """Say why a checkout got nothing, most likely, and what to do about it.

    :param asker: the identifier of the thread that got nothing, and waits no more; 0 for any.
    """
    waiting_too = {asker, *(waiting.thread for waiting in seen.waiting)}
    nested = [holder for holder in seen.holders if holder.thread in waiting_too]
    mine = sum(holder.thread == asker for holder in nested)
    n = seen.statistics
    if seen.last_connect_error and n.open < (n.limit or math.inf):
        return Diagnosis(
            "refused",
            f"the server lets nobody in ({seen.last_connect_error.splitlines()[0]})",
            "See to the server; it is tried again all the time, and who waits is served as soon as it works.",
        )
    if nested:
        whose = "this thread holds" if mine else "threads that wait hold"
        return Diagnosis(
            "nested-checkout",
            f"{whose} {mine or len(nested)} of them: what is checked out inside another checkout counts as "
            "well, in all threads that do so at once",
            "Never ask for a second connection while holding the first, or raise max_size above the number "
            "of threads that do.",
        )
    if seen.holders and all(holder.state == slots.OPENING for holder in seen.holders):
        return Diagnosis(
            "slow-connect",
            "connecting takes long: all of them are still being opened",
            "See to the network and the server; the driver's connect_timeout limits it.",
        )
    # One that executes was handed on.
    ended = next((h for h in seen.holders if h.ended and h.transaction != "executing"), None)
    if ended is not None:
        return _leak(f"{ended} does not give it back")
    longest = next((holder for holder in seen.holders if holder.state != slots.OPENING), None)
    if longest is not None and longest.seconds >= max(LONG, LONGER * n.use_time.mean):
        if longest.transaction == "executing":
            return Diagnosis(
                "long-use",
                f"{longest} executes one statement for long",
                "Look at it in pg_stat_activity by its backend's pid; statement_timeout would end it.",
            )
        return _leak(f"{longest} looks like one that was forgotten")
    return Diagnosis(
        "too-small",
        "all are in use, and none for long",
        "Raise max_size, which all engines of this database share, or keep connections for less long.",
    )


def _leak(cause: str) -> Diagnosis:
    return Diagnosis(
        "leak",
        cause,
        "Close it (or the session) as soon as the work with it is done; track_stacks=True shows where it was "
        "checked out.",
    )


def rejected(why: Rejected) -> Diagnosis:
    """Say why a checkout was refused, and what to do about it."""
    if why.kind == QUEUE_FULL:
        return Diagnosis(why.kind, why.why, "Try again later, or raise max_waiting.")
    return Diagnosis(why.kind, why.why, "Try again later, ask for less, or raise queue_target.")


def checkout_timeout(
    pool: Pool, attachment: Attachment, timeout: float, found: Diagnosis | None = None
) -> CheckoutTimeout:
    """Return the error for a checkout that got no connection; its cause is the last connect error.

    :param timeout: for how many seconds it waited.
    :param found: why it waits no longer although it might: a deadlock, or it was turned away.
    """
    away = found is not None and found.kind in REJECTED
    seen, fresh = _seen(pool) if found is None or away else (snapshot(pool), True)
    if found is None or away:  # the one that asks has left the line, but counts
        more = seen.statistics.waiting + bool(timeout)
        seen = dataclasses.replace(seen, statistics=dataclasses.replace(seen.statistics, waiting=more))
    likely = diagnose(seen, threading.get_ident() if fresh else 0) if found is None or away else found
    seen = dataclasses.replace(seen, diagnosis=found or likely)
    ceiling = attachment.quota.stated
    own = ceiling is not None and ceiling < (pool.max_size or math.inf)
    if found is not None and away:
        kind: type[CheckoutTimeout] = TooManyRequests
        what = f"refused a checkout after {timeout:.1f} s, since {found.cause}: "
        advice = f"{found.remedy} {_told(likely)}"
    else:
        kind = CheckoutTimeout if found is None else PoolDeadlock
        what = f"had no connection within {timeout:{'g' if found is None else '.1f'}} s: "
        advice = _told(likely)
    error = kind(
        f"QueriesPool {seen.line(what)}{f' ({ceiling:.0f} for this engine)' if own else ''}. {seen.named()}. "
        f"{advice}\n{seen.report()}",
        code="3o7r",
    )
    error.snapshot = seen
    error.__cause__ = pool.core.admission.last_error
    pool.core.got_nothing(seen)
    return error


def _told(diagnosis: Diagnosis | None) -> str:
    return f"Most likely {diagnosis.cause}. {diagnosis.remedy}" if diagnosis else ""


def log_leak(core: Core, item: Leaked | Returned) -> None:
    """Log that a connection is out for long, or came home after all."""
    holder = _holder(item.slot, core.now(), stacks.Threads())
    if isinstance(item, Returned):
        logger.warning("%s: a connection came home after all, after %.1f s", core.section.label, item.seconds)
        return
    stack = "".join(f"\n  checked out at {call}" for call in holder.stack)
    logger.warning("%s: a connection is out for long: %s%s", core.section.label, holder, stack)


# -- stages ----------------------------------------------------------------------------------------


class Stages:
    """What a checkout has been at, and for how long: for its error."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._stage = ""
        self._since = time.monotonic()

    def enter(self, stage: str) -> None:
        """Begin a stage, and end the one before."""
        now = time.monotonic()
        if self._stage:
            self._spent[self._stage] = self._spent.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def note(self, error: Any, label: str) -> None:
        """Say in which stage an error came (PEP 678; before Python 3.11 tracebacks don't show notes)."""
        self.enter(stage := self._stage)
        spent = ", ".join(f"{seconds:.1f} s {stage}" for stage, seconds in self._spent.items())
        with contextlib.suppress(Exception):  # one that takes no notes
            others = [note for note in getattr(error, "__notes__", []) if not note.startswith(_WE)]
            error.__notes__ = [*others, f"{_WE} {label} was {stage}; it has spent {spent}"]
