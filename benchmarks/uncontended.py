"""What a checkout and its return cost while nobody else wants anything: one thread, one connection."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median

from sqlalchemy.pool import Pool

from sqla_queries_pool.demo.workload import Work

from .competitors import (
    BARE,
    NULL,
    PRE_PING,
    PSYCOPG,
    PSYCOPG2,
    PSYCOPG_BELOW,
    QUERIES,
    QUERIES_OWN,
    QUEUE,
    QUEUE_LIFO,
    Backend,
    Competitor,
)
from .effort import Effort
from .figures import Cell, Figure, Target

GROUP = "one thread: checkout and return"
POOLED = (QUEUE, QUEUE_LIFO, PSYCOPG, PSYCOPG_BELOW, PSYCOPG2, QUERIES_OWN, QUERIES, BARE)
WITHOUT_SERVER = (*POOLED, NULL)
ON_SERVER = (*POOLED, PRE_PING)
"""NullPool is missing: there it measures how long it takes to connect, a hundred times as long."""


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Measure on each backend: nothing else, and with a query where there is somebody to ask."""
    rounds, batches, checkouts = effort.rounds, effort.batches, effort.checkouts
    for backend in backends:
        competitors = WITHOUT_SERVER if backend.dialect is None else ON_SERVER
        rows, cell = measure(GROUP, backend, competitors, "nothing else", None, rounds, batches, checkouts)
        cell.targets.extend(_targets(rows, f"checkout, {backend.name}"))
        yield cell
        if backend.look is not None:  # twenty times as slow, so a tenth as many are as exact
            fewer = max(1, checkouts // 10)
            look, between = backend.look, "SELECT 1 between"
            yield measure(GROUP, backend, ON_SERVER, between, look, rounds, batches, fewer)[1]


def measure(
    group: str,
    backend: Backend,
    competitors: Sequence[Competitor],
    name: str,
    work: Work | None,
    rounds: int,
    batches: int,
    checkouts: int,
) -> tuple[list[list[dict[str, float]]], Cell]:
    """Let the competitors take turns, in batches so short that a disturbance hits few of them.

    A ratio is one of neighbours: two batches of the same turn.  The figure of a round is the median of
    its batches.

    :return: the seconds of each batch, and the cell, without targets.
    """
    with ExitStack() as stack:
        there = [c for c in competitors if c.there]
        pools = {c.name: stack.enter_context(backend.pools(c, 5))[0] for c in there}
        rows = [_round(pools, work, batches, checkouts) for _ in range(rounds)]
    cell = Cell(group, f"{backend.name}: {name}")
    for competitor in pools:
        seconds = [median(turn[competitor] for turn in turns) for turns in rows]
        cell.figures[competitor] = {
            "µs": Figure.of(second * 1e6 for second in seconds),
            "ratio": ratio(rows, competitor, QUEUE.name),
        }
    return rows, cell


def _targets(rows: list[list[dict[str, float]]], bar: str) -> Iterator[Target]:
    to_queue = ratio(rows, QUERIES.name, QUEUE.name)
    yield Target("time / QueuePool", to_queue, at_most=1.0, bar=bar)
    if PRE_PING.name in rows[0][0]:
        to_pre_ping = ratio(rows, QUERIES.name, PRE_PING.name)
        yield Target("time / QueuePool, pre-ping", to_pre_ping, at_most=0.25, bar=f"{bar}, to pre-ping")
    else:
        yield Target("time / QueuePool, the goal", to_queue, at_most=0.85)


def ratio(rows: list[list[dict[str, float]]], one: str, other: str) -> Figure:
    """The ratio of two competitors: in each round the median of what the batches of the same turn took."""
    return Figure.of(median(turn[one] / turn[other] for turn in turns) for turns in rows)


def _round(pools: dict[str, Pool], work: Work | None, batches: int, checkouts: int) -> list[dict[str, float]]:
    gc.collect()
    order = list(pools)
    turns = []
    for _ in range(batches):
        turns.append({name: batch(pools[name], work, checkouts) for name in order})
        order.append(order.pop(0))  # nobody comes always after the same
    return turns


def batch(
    pool: Pool, work: Work | None, checkouts: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of one checkout."""
    connect = pool.connect
    connect().close()  # opens the connection, and brings the pool's code into the caches
    start = clock()
    if work is None:
        for _ in range(checkouts):
            connect().close()
    else:
        for _ in range(checkouts):
            connection = connect()
            work(connection)
            connection.close()
    return (clock() - start) / checkouts
