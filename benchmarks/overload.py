"""More requests than can be served, for a while: how many are served while their caller still wants it?

A pool that serves first come, first served, and lets all wait, soon serves only those who have waited for
as long as they can: each gets its connection when it is about to give up, and nobody is in time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median

from sqlalchemy import exc
from sqlalchemy.pool import Pool

from sqla_queries_pool.demo.workload import Work

from .competitors import (
    PSYCOPG,
    PSYCOPG_BELOW,
    QUERIES,
    QUEUE,
    Backend,
    Competitor,
    fake,
    psycopg_pool,
    queries_pool,
)
from .effort import Effort
from .figures import Cell, Figure, Target

CONNECTIONS = 4
WORK = 0.04
"""Seconds."""
CAPACITY = CONNECTIONS / WORK
"""Requests per second."""
LOAD = 2.0
"""Arrivals, in capacities."""
PATIENCE = 1.0
"""Seconds from its arrival in which a request is of use."""
MAX_WAITING = round(CAPACITY * PATIENCE / 2)
"""As many as can be served in half the time that they have."""
QUEUE_TARGET = 0.05
"""Seconds."""
REFUSING = (
    Competitor("QueriesPool, max_waiting", queries_pool(max_waiting=MAX_WAITING)),
    Competitor("QueriesPool, queue_target", queries_pool(queue_target=QUEUE_TARGET)),
)
"""QueriesPool with early refusal, in its ways."""
COMPETITORS = (
    QUEUE,
    PSYCOPG,
    PSYCOPG_BELOW,
    Competitor("psycopg_pool, max_waiting", psycopg_pool(max_waiting=MAX_WAITING), needs="psycopg_pool"),
    QUERIES,
    *REFUSING,
)


@dataclass(frozen=True)
class Result:
    """What became of all requests."""

    in_time: float
    """Served before their caller gave up: in capacities."""
    latency: float
    """The median of those, in seconds."""
    late: int
    """Served, but too late."""
    refused: int
    """Not served; their median ..."""
    refused_after: float
    """... wait, in seconds."""


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """One after the other, once: it takes long."""
    there = [competitor for competitor in COMPETITORS if competitor.there]
    results = {competitor.name: _measure(competitor, effort.overload) for competitor in there}
    name = f"{LOAD:g} x capacity for {effort.overload:g} s, callers wait for {PATIENCE:g} s"
    cell = Cell("overload", name, {each: _figures(results[each]) for each in results})
    cell.targets.extend(_targets(results))
    yield cell


def _figures(result: Result) -> dict[str, Figure]:
    figures = {
        "in time / capacity": result.in_time,
        "their median, ms": result.latency * 1000,
        "too late": result.late,
        "refused": result.refused,
        "after ms": result.refused_after * 1000,
    }
    return {what: Figure.of([value]) for what, value in figures.items()}


def _targets(results: dict[str, Result]) -> Iterator[Target]:
    for competitor in REFUSING:
        name, in_time = competitor.name, results[competitor.name].in_time
        yield Target(f"in time / capacity, {name}", Figure.of([in_time]), at_least=0.95)
        ratio = Figure.ratio([in_time], [results[QUEUE.name].in_time])
        yield Target(f"in time / QueuePool's, {name}", ratio, at_least=1.0, bar=f"overload, {name}")


def _measure(competitor: Competitor, seconds: float) -> Result:
    backend = fake()
    with backend.pools(competitor, CONNECTIONS, PATIENCE) as (pool,):
        for connection in [pool.connect() for _ in range(CONNECTIONS)]:
            connection.close()
        return _Crowd(pool, backend.work(WORK), seconds).run()


class _Crowd:
    """Callers who come at random, at the same moments to each competitor."""

    def __init__(self, pool: Pool, work: Work, seconds: float) -> None:
        self._pool = pool
        self._work = work
        self._seconds = seconds
        self._next = threading.Lock()
        self._served: list[float] = []
        """Latencies in seconds, from the arrival to the end of the work."""
        self._refused: list[float] = []

    def run(self) -> Result:
        self._arrivals = self._times()
        # As many as can be there at once, and some more.
        callers = round(1.25 * LOAD * CAPACITY * (PATIENCE + WORK))
        threads = [threading.Thread(target=self._caller, daemon=True) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_time = [latency for latency in self._served if latency <= PATIENCE]
        return Result(
            in_time=len(in_time) / (CAPACITY * self._seconds),
            latency=median(in_time or [0.0]),
            late=len(self._served) - len(in_time),
            refused=len(self._refused),
            refused_after=median(self._refused or [0.0]),
        )

    def _times(self) -> Iterator[float]:
        chance = random.Random(1)
        begin = at = time.perf_counter() + 0.2  # when the threads run
        while (at := at + chance.expovariate(LOAD * CAPACITY)) < begin + self._seconds:
            yield at

    def _caller(self) -> None:
        while True:
            with self._next:
                arrival = next(self._arrivals, None)
            if arrival is None:
                return
            time.sleep(max(0.0, arrival - time.perf_counter()))
            self._request(arrival)

    def _request(self, arrival: float) -> None:
        try:
            with closing(self._pool.connect()) as connection:
                self._work(connection)
        except exc.TimeoutError:
            self._refused.append(time.perf_counter() - arrival)
        else:
            self._served.append(time.perf_counter() - arrival)
