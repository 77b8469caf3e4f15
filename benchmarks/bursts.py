"""Many requests at once: what they wait for, and how many connections a pool opens for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from sqlalchemy.pool import Pool

from sqla_queries_pool.demo.workload import Work

from .competitors import PSYCOPG, PSYCOPG_BELOW, QUERIES, QUEUE, Backend, Competitor, FakeConnection, fake
from .effort import Effort
from .figures import Cell, Figure, Target

GROUP = "50 requests at once"
REQUESTS = 50
LIMIT = 50
"""Connections: a pool that opens one for each is not kept from it."""
IDLE = 5
TIMEOUT = 30.0
Burst = tuple[float, float, int]
"""Median and longest latency in seconds, and how many connections were opened meanwhile."""


class Driver:
    """Takes time to connect, and counts."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.attempts: list[None] = []  # append() is atomic, += is not

    def connect(self) -> Any:
        """Open a connection."""
        self.attempts.append(None)
        time.sleep(self._seconds)
        return FakeConnection()


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """A spike on a pool that has some connections, and a start with none."""
    spike = _measure(idle=IDLE, connect=0.15, work=0.002, rounds=effort.rounds)
    cell = _cell("5 idle connections, connect 150 ms, work 2 ms", spike)
    cell.targets.append(_beside(spike, QUEUE, "median latency, spike"))
    if PSYCOPG.there:
        cell.targets.append(_beside(spike, PSYCOPG))
    cell.targets.append(Target("connections opened", cell.figures[QUERIES.name]["connects"], at_most=1))
    yield cell
    cold = _measure(idle=0, connect=0.02, work=0.02, rounds=effort.rounds)
    cell = _cell("no connection, connect 20 ms, work 20 ms", cold)
    cell.targets.append(_beside(cold, QUEUE, "median latency, cold start"))
    yield cell


def _measure(idle: int, connect: float, work: float, rounds: int) -> dict[str, list[Burst]]:
    order = [competitor for competitor in (QUEUE, PSYCOPG, PSYCOPG_BELOW, QUERIES) if competitor.there]
    bursts: dict[str, list[Burst]] = {competitor.name: [] for competitor in order}
    for _ in range(rounds):
        for competitor in order:
            bursts[competitor.name].append(_burst(competitor, idle, connect, work))
        order.append(order.pop(0))
    return bursts


def _burst(competitor: Competitor, idle: int, connect: float, work: float) -> Burst:
    driver = Driver(connect)
    backend = fake(driver.connect)
    with backend.pools(competitor, LIMIT, TIMEOUT) as (pool,):
        for connection in [pool.connect() for _ in range(idle)]:
            connection.close()
        opened = len(driver.attempts)
        latencies = at_once(pool, backend.work(work))
        return median(latencies), max(latencies), len(driver.attempts) - opened


def at_once(pool: Pool, work: Work) -> list[float]:
    """Have all the requests begin together; return how long each took."""
    ready = threading.Barrier(REQUESTS)
    latencies: list[float] = []

    def request() -> None:
        ready.wait()
        begin = time.perf_counter()
        connection = pool.connect()
        work(connection)
        connection.close()
        latencies.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=request, daemon=True) for _ in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(latencies) < REQUESTS:
        raise RuntimeError("a request has failed, see above")
    return latencies


def _cell(name: str, bursts: dict[str, list[Burst]]) -> Cell:
    return Cell(GROUP, name, {each: _figures(bursts[each]) for each in bursts})


def _figures(bursts: list[Burst]) -> dict[str, Figure]:
    return {
        "median latency, ms": Figure.of(middle * 1000 for middle, _, _ in bursts),
        "longest, ms": Figure.of(longest * 1000 for _, longest, _ in bursts),
        "connects": Figure.of(connects for _, _, connects in bursts),
    }


def _beside(bursts: dict[str, list[Burst]], other: Competitor, bar: str = "") -> Target:
    ratio = Figure.ratio((ours[0] for ours in bursts[QUERIES.name]), (its[0] for its in bursts[other.name]))
    return Target(f"median latency / {other.name}", ratio, at_most=1.0, bar=bar)
