"""Two classes of callers, and twice as much work as can be done: does the one that matters notice the other?

Requests of the web come in bursts.  Jobs in the background always want more than there is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from sqlalchemy.pool import Pool

from sqla_queries_pool import QueriesPool, checkouts
from sqla_queries_pool.demo.workload import Work

from .competitors import QUERIES, QUEUE, Backend, Competitor, queries_pool
from .effort import Effort
from .figures import Cell, Figure, Target

CONNECTIONS = 10
WEB, BACKGROUND = "web", "background"
FLOOR = 2
"""Of the background."""
CLASSES = {WEB: {"min": CONNECTIONS - FLOOR, "weight": 4.0}, BACKGROUND: {"min": FLOOR}}
BURSTS = 12
WEB_WORK, JOB = 0.3, 0.04
"""Seconds, where the bursts are at their usual pace."""
LOAD, SHARE = 2.0, 0.8
"""What is wanted, in capacities, and the background's part of it."""
JOBS = 64
"""Threads in the background ..."""
PAUSE = JOB * (JOBS / (CONNECTIONS * LOAD * SHARE) - 1)
"""... and for how many seconds each has something else to do after a job."""
BURST = 16
"""Requests of the web at once ..."""
EVERY = BURST * WEB_WORK / (CONNECTIONS * LOAD * (1 - SHARE))
"""... every so many seconds."""
TIMEOUT = 3600.0
"""Seconds: nobody gives up, so that all waits are seen."""
COMPETITORS = (Competitor("QueriesPool, classes", queries_pool(classes=CLASSES)), QUERIES, QUEUE)
ALONE = "web alone"


@dataclass
class Result:
    """What one pool did."""

    waits: list[float] = field(default_factory=list)
    """Of the web, in seconds, from the arrival."""
    done: list[str] = field(default_factory=list)
    """The class of each that was done in time.  Many threads append, which is one step; they can't count."""
    least: int = CONNECTIONS
    """As many connections the background had, at least; where classes are counted."""
    seconds: float = 0.0
    """How long it took, at the usual pace."""

    @property
    def used(self) -> float:
        """The work that was done in time, in capacities."""
        work = self.done.count(WEB) * WEB_WORK + self.done.count(BACKGROUND) * JOB
        return work / (CONNECTIONS * self.seconds)

    @property
    def p99(self) -> float:
        """Seconds."""
        ordered = sorted(self.waits) or [0.0]
        return ordered[int(0.99 * (len(ordered) - 1))]


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """On a server, if there is one: one after the other, once, as it takes long."""
    backend = backends[-1]
    seconds = effort.overload / 2
    pace = seconds / (BURSTS * EVERY)
    alone = _measure(backend, COMPETITORS[0], pace, jobs=0)
    results = {each.name: _measure(backend, each, pace) for each in COMPETITORS}
    name = f"{LOAD:g} x capacity for {seconds:g} s, {SHARE:.0%} of it in the background, {backend.name}"
    rows = {ALONE: alone, **results}
    cell = Cell("classes", name, {each: _figures(rows[each], alone) for each in rows})
    ours = results[COMPETITORS[0].name]
    cell.targets.extend(
        [
            Target("p99 wait of the web / alone", Figure.ratio([ours.p99], [alone.p99]), at_most=1.2),
            Target("least connections of the background", Figure.of([ours.least]), at_least=FLOOR),
            Target("used / capacity", Figure.of([ours.used]), at_least=0.95),
        ]
    )
    yield cell


def _figures(result: Result, alone: Result) -> dict[str, Figure]:
    figures = {
        "web: p99 wait, ms": 1000 * result.p99,
        "/ alone": result.p99 / max(alone.p99, 1e-9),
        "jobs done": float(result.done.count(BACKGROUND)),
        "used / capacity": result.used,
    }
    return {what: Figure.of([value]) for what, value in figures.items()}


def _measure(backend: Backend, competitor: Competitor, pace: float, jobs: int = JOBS) -> Result:
    with backend.pools(competitor, CONNECTIONS, TIMEOUT) as (pool,):
        opened = [pool.connect() for _ in range(CONNECTIONS)]
        for connection in opened:
            backend.work(0.001)(connection)  # what a server does for the first statement of each
            connection.close()
        return _Load(pool, backend, pace, jobs).run()


class _Load:
    """Threads of both classes.

    :param pace: what all times are multiplied with.
    """

    def __init__(self, pool: Pool, backend: Backend, pace: float, jobs: int) -> None:
        self._pool, self._jobs = pool, jobs
        self._request: Work = backend.work(pace * WEB_WORK)
        self._job: Work = backend.work(pace * JOB)
        self._pause = pace * PAUSE
        self._begin = time.perf_counter() + 0.2  # when the threads run
        self._arrivals = [self._begin + pace * number * EVERY for number in range(BURSTS)]
        self._end = self._begin + pace * BURSTS * EVERY
        self._result = Result(seconds=BURSTS * EVERY)

    def run(self) -> Result:
        """Return when all have ended."""
        threads = [threading.Thread(target=self._web, daemon=True) for _ in range(BURST)]
        threads += [threading.Thread(target=self._background, daemon=True) for _ in range(self._jobs)]
        for thread in threads:
            thread.start()
        time.sleep(max(0.0, self._begin - time.perf_counter()))
        while time.perf_counter() < self._end:
            if isinstance(self._pool, QueriesPool) and (known := self._pool.statistics().classes):
                self._result.least = min(self._result.least, known[BACKGROUND].held)
            time.sleep(0.01)
        for thread in threads:
            thread.join()
        return self._result

    def _done(self, what: str) -> None:
        if self._begin < time.perf_counter() < self._end:
            self._result.done.append(what)

    def _web(self) -> None:
        with checkouts(caller=WEB):
            for arrival in self._arrivals:
                time.sleep(max(0.0, arrival - time.perf_counter()))
                with closing(self._pool.connect()) as connection:
                    self._result.waits.append(time.perf_counter() - arrival)
                    self._request(connection)
                    self._done(WEB)

    def _background(self) -> None:
        with checkouts(caller=BACKGROUND):
            while time.perf_counter() < self._end:
                time.sleep(self._pause)
                with closing(self._pool.connect()) as connection:
                    self._job(connection)
                    self._done(BACKGROUND)
