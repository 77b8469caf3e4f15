"""What a checkout and its return cost one task while nobody else wants anything.

Once at the engine's pool alone, in the greenlet that SQLAlchemy runs it in; and once as applications do it,
``async with engine.connect()``, most of which is SQLAlchemy's engine.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from statistics import median
from typing import TypeAlias

from .async_competitors import (
    ALL,
    BARE,
    QUERIES,
    QUEUE,
    AsyncCompetitor,
    EngineSource,
    Place,
    places,
    servers,
)
from .clock import Clock
from .competitors import Backend
from .effort import Effort
from .figures import Cell, Figure, Target
from .tasks import Source
from .uncontended import batch, ratio

GROUP = "one task: checkout and return"
BOUNDS = {"asyncpg": 0.8, "psycopg": 0.9}
"""Of AsyncAdaptedQueuePool's time.  psycopg's ``rollback`` is a coroutine, which both must run."""
AsyncBatch: TypeAlias = Callable[[Source, int, Clock], Awaitable[float]]
"""Returns the seconds of one checkout, of so many."""


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Measure with each driver in each loop."""
    yield from places(GROUP, _cells, servers(backends), effort)


def _cells(place: Place, effort: Effort) -> Iterator[Cell]:
    in_greenlet = [QUEUE, QUERIES, BARE]
    yield place.run(_measure(place, in_greenlet, f"{place}: the engine's pool, in a greenlet", pool, effort))
    all_there = [competitor for competitor in ALL if competitor.there(place)]
    yield place.run(_measure(place, all_there, f"{place}: async with engine.connect()", block, effort))


async def _measure(
    place: Place, competitors: Sequence[AsyncCompetitor], name: str, each: AsyncBatch, effort: Effort
) -> Cell:
    """Let the competitors take turns, as threads' do."""
    async with AsyncExitStack() as stack:
        sources = {c.name: (await stack.enter_async_context(place.pools(c, 5)))[0] for c in competitors}
        clock = stack.enter_context(Clock())
        rows = [await _round(sources, each, effort, clock) for _ in range(effort.rounds)]
    cell = Cell(GROUP, name)
    for competitor in sources:
        seconds = [median(turn[competitor] for turn in turns) for turns in rows]
        cell.figures[competitor] = {
            "µs": Figure.of(second * 1e6 for second in seconds),
            "ratio": ratio(rows, competitor, QUEUE.name),
        }
    for other in [name for name in sources if name != QUERIES.name]:
        beside = ratio(rows, QUERIES.name, other)
        cell.targets.append(_target(place, other, beside, "pool" if each is pool else "engine"))
    return cell


def _target(place: Place, other: str, value: Figure, part: str) -> Target:
    if other != QUEUE.name:
        return Target(f"time / {other}", value)
    what, bar = f"time / {other}, {place.driver}", f"one task, {place.driver}: {part}"
    return Target(what, value, at_most=BOUNDS[place.driver], bar=bar)


async def _round(
    sources: dict[str, Source], each: AsyncBatch, effort: Effort, clock: Clock
) -> list[dict[str, float]]:
    gc.collect()
    order = list(sources)
    turns = []
    checkouts = max(1, effort.checkouts // 3)  # they take several times as long as those of threads
    for _ in range(effort.batches):
        turns.append({name: await each(sources[name], checkouts, clock) for name in order})
        order.append(order.pop(0))
    return turns


async def pool(source: Source, checkouts: int, clock: Clock) -> float:
    """The pool alone: ``connect()`` and ``close()`` in one greenlet."""
    assert isinstance(source, EngineSource)
    spawn = importlib.import_module("sqlalchemy.util").greenlet_spawn
    seconds: float = await spawn(batch, source.engine.pool, None, checkouts, clock)
    return seconds


async def block(source: Source, checkouts: int, clock: Clock) -> float:
    """As applications do it: an ``async with`` block."""
    async with source.connect():  # opens the connection, and brings the code into the caches
        pass
    begin = clock()
    for _ in range(checkouts):
        async with source.connect():
            pass
    return (clock() - begin) / checkouts
