"""What a checkout and its return cost while nobody else wants anything: one thread, one connection."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from statistics import median

from sqlalchemy.pool import Pool

from sqla_queries_pool.demo.workload import Work

from .competitors import BARE, QUERIES, QUEUE, QUEUE_LIFO, Backend
from .figures import Cell, Figure

GROUP = "uncontended, one thread"
COMPETITORS = (QUEUE, QUEUE_LIFO, QUERIES, BARE)


def measure(
    backend: Backend, name: str, work: Work | None, rounds: int, batches: int, checkouts: int
) -> Cell:
    """Let the competitors take turns, in batches so short that a disturbance hits few of them.

    A ratio is one of neighbours: two batches of the same turn.  The figure of a round is the median of
    its batches.
    """
    cell = Cell(GROUP, f"{backend.name}: {name}", QUEUE.name)
    with ExitStack() as stack:
        pools = {c.name: stack.enter_context(backend.pools(c, 5))[0] for c in COMPETITORS}
        rows = [_round(pools, work, batches, checkouts) for _ in range(rounds)]
    for competitor in pools:
        seconds = [median(turn[competitor] for turn in turns) for turns in rows]
        ratios = [median(turn[competitor] / turn[QUEUE.name] for turn in turns) for turns in rows]
        cell.figures[competitor] = {
            "µs": Figure.of(second * 1e6 for second in seconds),
            "ratio": Figure.of(ratios),
        }
    return cell


def _round(pools: dict[str, Pool], work: Work | None, batches: int, checkouts: int) -> list[dict[str, float]]:
    gc.collect()
    order = list(pools)
    turns = []
    for _ in range(batches):
        turns.append({name: _batch(pools[name], work, checkouts) for name in order})
        order.append(order.pop(0))  # nobody comes always after the same
    return turns


def _batch(pool: Pool, work: Work | None, checkouts: int) -> float:
    """Return the seconds of one checkout."""
    connect = pool.connect
    connect().close()  # opens the connection, and brings the pool's code into the caches
    start = time.perf_counter()
    if work is None:
        for _ in range(checkouts):
            connect().close()
    else:
        for _ in range(checkouts):
            connection = connect()
            work(connection)
            connection.close()
    return (time.perf_counter() - start) / checkouts
