"""A pool at one moment: its numbers, who has its connections, which checkouts wait for one."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..budget import slots
from ..budget.slots import HELD, LOCKED, Slot
from ..budget.stats import Statistics
from ..budget.work import Resetter
from ..pool import Pool, stopping
from ..sockets.transactions import of_server
from . import stacks

MOST_NAMED = 3
"""How many holders the first line of an error names."""
MOST_HOLDERS = 10
"""How many holders, and how many waiting checkouts, a report lists."""
DEEPEST_SHOWN = 5
"""How many calls of a stack a report shows, the innermost ones."""
MOST_STACKS = 3
"""For how many holders a report shows where the connection was checked out."""
LONGEST_NAME = 80
"""How many characters of a name or a label are shown."""


def named(name: str, label: str | None) -> str:
    """For one line: a label may be a request's path, and so anybody's text."""
    shown = [" ".join(text.split())[:LONGEST_NAME] for text in (name, label or "")]
    return f"{shown[0]} [{shown[1]}]" if shown[1] else shown[0]


@dataclass(frozen=True)
class Holder:
    """Who has one connection."""

    thread: int | None
    """The identifier of the thread, a task's of the thread of its loop; None for a session's, and for one
    that has ended."""
    name: str
    """The thread's or the task's name, or the kind of the session that locked it."""
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
    """``idle``, ``in transaction``, ``in error`` or ``executing``, where the driver tells.  None while it is
    opened: that is no transaction of the checkout's."""
    stack: tuple[str, ...] = field(default=(), repr=False)
    """Where it was checked out, outermost call first: with ``track_stacks=True``."""
    now_at: tuple[str, ...] = field(default=(), repr=False)
    """Where its thread is now."""
    ended: bool = False
    """Has its thread ended?  A task's end proves nothing: another task may return what it has."""
    caller: int | None = None
    """A number that all have in common that one thread, or one task, holds and waits for."""
    caller_class: str | None = None
    """The class of its checkout, where the pool has classes of callers."""

    @property
    def is_task(self) -> bool:
        """Is it a task of asyncio's?"""
        return self.thread is not None and self.caller not in (None, self.thread)

    def __str__(self) -> str:
        about = [f"{self.seconds:.1f} s"]
        if self.state == slots.OPENING:
            about.append("opening")
        if self.transaction not in (None, "idle", "unknown"):
            about.append(str(self.transaction))
        return f"{named(self.name, self.label)} ({', '.join(about)})"


@dataclass(frozen=True)
class Waiting:
    """One blocked checkout."""

    thread: int
    """The identifier of the thread, a task's of the thread of its loop."""
    name: str
    label: str | None
    seconds: float
    now_at: tuple[str, ...] = field(default=(), repr=False)
    """Where it waits, outermost call first."""
    caller: int | None = None
    """As a holder's."""
    parents: tuple[int, ...] = ()
    """The same of the tasks that have started this one, the nearest first, as far as they use a pool: they
    may wait for it to end."""
    caller_class: str | None = None
    """As a holder's."""

    def __str__(self) -> str:
        return f"{named(self.name, self.label)} ({self.seconds:.1f} s)"


class Diagnosis(NamedTuple):
    """Why a checkout got nothing, most likely, and what to do about it."""

    kind: str
    """One of ``deadlock queue-full overload drained suspended unreachable refused nested-checkout
    slow-connect ceiling leak long-use host too-small``."""
    cause: str
    remedy: str
    details: str = ""
    """More lines, where there is more to say."""


@dataclass(frozen=True)
class Snapshot:
    """A pool at one moment: its numbers, who has its connections, which checkouts wait for one."""

    taken_at: datetime.datetime
    statistics: Statistics
    holders: tuple[Holder, ...]
    """Longest first."""
    waiting: tuple[Waiting, ...]
    """Longest first."""
    last_connect_error: str | None
    diagnosis: Diagnosis | None
    """None unless a checkout got no connection."""

    @functools.cached_property
    def callers_waiting(self) -> frozenset[int | None]:
        """The callers that wait."""
        return frozenset(waiting.caller for waiting in self.waiting)

    @functools.cached_property
    def parents_of_waiting(self) -> frozenset[int]:
        """The tasks that may wait for those that wait."""
        return frozenset(parent for waiting in self.waiting for parent in waiting.parents)

    def named(self) -> str:
        """Who has held connections the longest."""
        return self._named

    @functools.cached_property
    def _named(self) -> str:
        if not self.holders:
            return "Held by nobody now"
        names = ", ".join(map(str, self.holders[:MOST_NAMED]))
        rest = len(self.holders) - MOST_NAMED
        return f"Held by, longest first: {names}{f', and {rest} more' if rest > 0 else ''}"

    def line(self, what: str = "") -> str:
        """The numbers, for one line of a log."""
        n = self.statistics
        limit = "none" if n.limit is None else n.limit
        counts = f"open {n.open}, held {n.held}, opening {n.opening}, waiting {n.waiting}, limit {limit}"
        return f"{n.label} (pid {n.pid}){f' {what}' if what else ': '}{counts}"

    def report(self, lists: str = "") -> str:
        """The holders and the waiting checkouts, a line each, and where they are in the code.

        :param lists: :attr:`lists`, where that was made before.
        """
        details = self.diagnosis.details.splitlines() if self.diagnosis else []
        return "\n".join([*details, lists or self.lists])

    @functools.cached_property
    def lists(self) -> str:
        """The holders and the waiting checkouts."""
        shared = self.statistics.host
        lines = [*([str(shared)] if shared is not None else []), *_classes(self.statistics)]
        if self.holders:
            lines.append("Holders, longest first:")
        for n, holder in enumerate(self.holders[:MOST_HOLDERS]):
            times = "time" if holder.uses == 1 else "times"
            backend = f", backend {holder.backend_pid}" if holder.backend_pid else ""
            lines.append(f"  {holder}, used {holder.uses} {times}{backend}")
            if n < MOST_STACKS:
                lines += [f"    checked out at {call}" for call in holder.stack[-DEEPEST_SHOWN:]]
                lines += [f"    now at {call}" for call in holder.now_at[-2:]]
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
            "diagnosis": None if self.diagnosis is None else self.diagnosis._asdict(),
        }


def _classes(numbers: Statistics) -> list[str]:
    each = [f"{name} {has}" for name, has in numbers.classes.items()]
    return [f"Classes: {'; '.join(each)}"] if each else []


def snapshot(pool: Pool, placed: int | None = None) -> Snapshot:
    """Return what a pool is like now.  It takes no lock and asks no server: call it from any thread.

    :param placed: for how many waiting checkouts it says where they are; None for all.
    """
    error, threads = pool.core.admission.last_error, stacks.Threads()
    return Snapshot(
        taken_at=datetime.datetime.now(datetime.timezone.utc),
        statistics=pool.statistics(),
        holders=tuple(holders(pool, threads)),
        waiting=tuple(waiting(pool, threads, placed)),
        last_connect_error=None if error is None else f"{type(error).__name__}: {str(error).strip()}",
        diagnosis=None,
    )


def holders(pool: Pool, threads: stacks.Threads) -> list[Holder]:
    """Return who has the connections of a pool, longest first.  Takes no lock of the pool."""
    busy = (HELD, LOCKED, slots.OPENING)
    found = [holder_of(slot, pool.core.now(), threads) for slot in pool.core.slots() if slot.state in busy]
    return sorted(found, key=lambda holder: -holder.seconds)


def holder_of(slot: Slot, now: float, threads: stacks.Threads) -> Holder:
    """Return who has a connection, or opens it."""
    caller, session = slot.holder, slot.session
    if session is not None:
        alive = session()
        name = "dead session" if alive is None else f"session {type(alive).__name__}"
        if isinstance(alive, Resetter):
            name = "the pool itself, resetting it"
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
        transaction=None if slot.state is slots.OPENING else transaction,
        stack=stacks.as_text(slot.stack),
        now_at=() if session is not None else threads.at(caller),
        ended=session is None and caller is not None and caller.ended,
        caller=caller.number if session is None and caller is not None and not caller.ended else None,
        caller_class=slot.caller_class if caller is not None else None,
    )


def _describe_holders(found: list[Slot], now: float) -> tuple[Holder, ...]:
    threads = stacks.Threads()
    return tuple(sorted((holder_of(slot, now, threads) for slot in found), key=lambda held: -held.seconds))


stopping.describe_holders = _describe_holders


def waiting(pool: Pool, threads: stacks.Threads, placed: int | None = None) -> list[Waiting]:
    """Return the checkouts that wait for a pool's connections, longest first.  Takes no lock of the pool."""
    now = pool.core.now()
    return [
        Waiting(
            thread=w.holder.ident,
            name=threads.name(w.holder),
            label=w.label,
            seconds=max(0.0, now - w.since),
            now_at=threads.at(w.holder) if placed is None or number < placed else (),
            caller=w.holder.number,
            parents=w.holder.parents,
            caller_class=w.caller_class,
        )
        for number, w in enumerate(sorted(pool.core.ledger.waiters(), key=lambda waiter: waiter.since))
    ]
