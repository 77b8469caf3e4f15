"""How a connection goes from one caller to the next: QueriesPool's way, and others that were built and left.

QueriesPool hands what is returned to the caller that waits longest: it is never idle in between, so nobody
overtakes, and the connection does nothing until that caller runs.  Other designs give up a part of the order,
or spend time, to shorten that.  They are built here, on the pool's own parts, only to be measured:

* *barging*: what is returned is idle, the first waiter is woken to look for it, and the first one that comes
  has it, mostly the caller that returned it.  While the first waiter has waited for longer than a bound,
  connections are handed over.  (Go's ``sync.Mutex`` has a starvation mode like that,
  with a bound of 1 ms; Elixir's DBConnection lets newcomers in by its queue target.)
* *spinning*: a waiter looks again and again for the length of a switch of threads, before it sleeps.
* *early wake*: the first waiter is woken before the connection is rolled back, which takes a round trip, and
  spins until it has it.
* *yielding*: who has woken a waiter lets other threads run at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy.pool import Pool

from sqla_queries_pool.budget.ledger import Ledger
from sqla_queries_pool.budget.work import Wake
from sqla_queries_pool.concurrency import loops
from sqla_queries_pool.concurrency.tasks import TaskWaiter
from sqla_queries_pool.concurrency.threads import Threads, ThreadWaiter

from . import async_competitors, async_contended, tasks
from .async_competitors import AsyncCompetitor, EngineSource, Place, places, servers
from .competitors import PSYCOPG_BELOW, QUERIES, QUEUE, Backend, Competitor, Make
from .contended import Load, figures, measure, throughput
from .effort import Effort
from .figures import Cell, Target
from .tasks import Source

GROUP = "designs of a hand-over"
OF_TASKS = "designs of a hand-over, tasks"
LOADS = ((8, 2, 0.0), (16, 8, 0.001), (64, 10, 0.001))
"""Threads, connections, seconds of work: where strict order costs most."""
ON_SERVER = ((16, 4, 0.0), (16, 8, 0.001))
"""The same with statements: there the reset takes a round trip."""
TASK_WORKS = (0.0, 0.001)
SPIN = 0.00005
"""Seconds: about a switch of threads."""
BOUND_OF_TASKS = 0.01
"""Seconds."""
ROUND_TRIP = 0.0005
"""Seconds for which a waiter that was woken early spins."""


# -- barging ----------------------------------------------------------------------------------------


class Barging(Ledger):
    """Hands over only to a waiter that has waited for as long as the bound."""

    bound: float
    """Seconds."""
    woken: set[Any]
    """The waiters that were woken to look, and have not looked yet."""

    def give(self, attachment: Any, entry: Any, now: float) -> Any:
        first = next(iter(attachment.queue), None)
        if first is None or now - first.since >= self.bound:
            return super().give(attachment, entry, now)
        queues, self.queues = self.queues, OrderedDict()
        try:
            work = super().give(attachment, entry, now) or []
        finally:
            self.queues = queues
        return [*work, *self._wake_first(attachment)]

    def _wake_first(self, attachment: Any) -> list[Any]:
        first = next(iter(attachment.queue), None)
        if first is None or first in self.woken or not attachment.idle:
            return []
        self.woken.add(first)
        return [Wake(first)]

    def look(self, waiter: Any, now: float) -> list[Any]:
        """It was woken: it takes what is idle, if that is still there."""
        attachment = waiter.attachment
        self.woken.discard(waiter)
        first: Any = next(iter(attachment.queue), None)
        if first is waiter and attachment.idle:
            self._answer(waiter, self._hold(attachment.pop(), waiter.holder, now), now)  # it is awake
        return self._wake_first(attachment)


class _Looks:
    """A waiter that looks when it is woken."""

    answer: Any
    core: Any

    def wait(self, seconds: float) -> None:
        """Wait for an answer, not for a wake-up alone."""
        end = time.monotonic() + seconds
        while self.answer is None and (left := end - time.monotonic()) > 0:
            super().wait(left)  # type: ignore[misc]
            self.sleep_again()
            if self.answer is None:
                self.core.section.run(self.core.ledger.look, self, self.core.now())

    def sleep_again(self) -> None:
        """Be ready for another wake-up."""


class _LookingThread(_Looks, ThreadWaiter):
    __slots__ = ("core",)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was woken to look, and does not sleep yet
            super().wake()


class _LookingTask(_Looks, TaskWaiter):
    __slots__ = ("core",)

    def sleep_again(self) -> None:
        self._woken = False


def _barge(pool: Any, bound: float) -> None:
    ledger = pool._core.ledger
    ledger.__class__ = Barging
    ledger.bound, ledger.woken = bound, set()


# -- spinning, waking early, yielding ----------------------------------------------------------------


class _SpinningThread(ThreadWaiter):
    """Looks for a while before it sleeps."""

    __slots__ = ()

    def wait(self, seconds: float) -> None:
        spin(self, SPIN)
        super().wait(seconds)


class _EarlyThread(ThreadWaiter):
    """Is woken before it has its answer."""

    __slots__ = ("early",)

    def wait(self, seconds: float) -> None:
        self.early = True
        super().wait(seconds)
        if self.answer is None and not self.early:
            spin(self, ROUND_TRIP)
            if self.answer is None:
                super().wait(seconds)

    def get_ready(self) -> None:
        """Its answer comes soon."""
        if getattr(self, "early", False):
            self.early = False
            super().wake()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # another thread has just woken it early
            super().wake()


class _YieldingThread(ThreadWaiter):
    """Runs at once."""

    __slots__ = ()

    def wake(self) -> None:
        super().wake()
        time.sleep(0)


def spin(waiter: Any, seconds: float) -> None:
    """Let other threads run, again and again, until a waiter has its answer."""
    end = time.monotonic() + seconds
    while waiter.answer is None and time.monotonic() < end:
        time.sleep(0)


class _Early:
    """A dialect that wakes the first waiter before it rolls back."""

    def __init__(self, dialect: Any, attachment: Any) -> None:
        self.__dict__.update(copy.copy(dialect).__dict__)
        self._dialect, self._attachment = dialect, attachment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dialect, name)

    def do_rollback(self, connection: Any) -> None:
        """Wake, and roll back."""
        for first in self._attachment.queue.copy():
            first.get_ready()
            break
        self._dialect.do_rollback(connection)


# -- the designs ------------------------------------------------------------------------------------


def _waiters(pool: Any, kind: type[Any]) -> None:
    """Have an engine's threads wait with waiters of another kind."""
    core = pool._core

    class Runtime(Threads):
        def waiter(self, attachment: Any, label: Any, decline: Any) -> Any:
            made = kind(attachment, self.here.caller, label)
            if issubclass(kind, _Looks):
                made.core = core
            return made

    pool._attachment.runtime = Runtime()


def _barging(bound: float) -> Callable[[Any], None]:
    def change(pool: Any) -> None:
        _barge(pool, bound)
        _waiters(pool, _LookingThread)

    return change


def _early(pool: Any) -> None:
    _waiters(pool, _EarlyThread)
    pool._dialect = _Early(pool._dialect, pool._attachment)


DESIGNS: dict[str, Callable[[Any], None]] = {
    "barging, 1 ms": _barging(0.001),
    "barging, 10 ms": _barging(0.01),
    "spinning": partial(_waiters, kind=_SpinningThread),
    "early wake": _early,
    "yielding": partial(_waiters, kind=_YieldingThread),
}


def _changed(make: Make, change: Callable[[Any], None]) -> Make:
    def changed(*arguments: Any) -> Pool:
        pool = make(*arguments)
        change(pool)
        return pool

    return changed


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Threads on each backend, then tasks."""
    designs = [Competitor(name, _changed(QUERIES.make, change)) for name, change in DESIGNS.items()]
    competitors = [c for c in (QUEUE, PSYCOPG_BELOW, QUERIES, *designs) if c.there]
    for number, backend in enumerate(backends):
        loads = [Load(*each) for each in (ON_SERVER if number else LOADS)]
        for load in loads[: 1 if effort.rounds < 3 else None]:
            outcomes = measure(backend, competitors, load, effort)
            cell = Cell(f"{GROUP}, {backend.name}", str(load))
            for each, runs in outcomes.items():
                cell.figures[each] = figures(runs, load.turn)
                cell.figures[each]["/ QueuePool"] = throughput(outcomes, each, QUEUE.name)
            cell.targets.append(
                Target("throughput / QueuePool", throughput(outcomes, QUERIES.name, QUEUE.name), at_least=1.0)
            )
            yield cell
    yield from places(OF_TASKS, _of_tasks, servers(backends), effort, drivers=["asyncpg"])


def _of_tasks(place: Place, effort: Effort) -> Iterator[Cell]:
    barging = AsyncCompetitor(f"barging, {1000 * BOUND_OF_TASKS:g} ms", _barging_tasks)
    competitors = [c for c in (async_competitors.QUEUE, async_competitors.QUERIES, barging) if c.there(place)]
    for work in TASK_WORKS[: len(effort.task_works)]:
        load = Load(async_contended.TASKS, async_contended.CONNECTIONS, work, "tasks")
        outcomes = place.run(async_contended.take_turns(place, competitors, load, tasks.asleep(work), effort))
        cell = Cell(f"{OF_TASKS}, {place}", str(load), {e: figures(outcomes[e], load.turn) for e in outcomes})
        for each in outcomes:
            cell.figures[each]["/ theirs"] = throughput(outcomes, each, async_competitors.QUEUE.name)
        ratio = throughput(outcomes, async_competitors.QUERIES.name, async_competitors.QUEUE.name)
        cell.targets.append(Target(f"throughput / {async_competitors.QUEUE.name}", ratio, at_least=1.0))
        yield cell


class _LoopOfLooking:
    """A loop whose tasks wait with waiters that look."""

    def __init__(self, loop: loops.Loop, core: Any) -> None:
        self._loop, self._core = loop, core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def waiter(self, attachment: Any, label: Any, decline: Any) -> Any:
        """Return a new waiter: the running task."""
        made = _LookingTask(attachment, self._loop.caller, label, asyncio.get_running_loop(), decline)
        made.core = self._core
        return made


async def _barging_tasks(*arguments: Any) -> Source:
    source = await async_competitors.QUERIES.make(*arguments)
    assert isinstance(source, EngineSource)
    pool: Any = source.engine.pool
    async with source.connect():  # the loop's attachment is made when it is first used
        pass
    _barge(pool, BOUND_OF_TASKS)
    attachment = pool._sides.here
    attachment.runtime = _LoopOfLooking(attachment.runtime, pool._core)
    return source
