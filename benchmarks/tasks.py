"""Many tasks of one event loop that share few connections: the load of ``demo/workload.py``, for asyncio.

Its shares, and what is counted of them, are the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeAlias

from sqla_queries_pool.demo.workload import WARM_UP, Outcome, Share

from .clock import Clock


class Source(Protocol):
    """A pool as tasks see it, or an engine with its pool."""

    timeouts: tuple[type[Exception], ...]
    """What a checkout raises that waited in vain."""
    connects: list[None]
    """One for each connection that was opened, where that is known."""

    def connect(self) -> AbstractAsyncContextManager[Any]:
        """Check a connection out, and return it at the end of the block."""

    async def execute(self, connection: Any, statement: str) -> None:
        """Run a statement."""

    async def close(self) -> None:
        """Close the connections."""


Work: TypeAlias = Callable[[Source, Any], Awaitable[None]]
"""What a task does with its connection."""


async def nothing(source: Source, connection: Any) -> None:
    """Give it back at once."""


def asleep(seconds: float) -> Work:
    """Work that costs the loop nothing: it sleeps in the loop."""

    async def work(source: Source, connection: Any) -> None:
        await asyncio.sleep(seconds)

    return work if seconds else nothing


def on_server(seconds: float) -> Work:
    """A statement that takes this long, in a transaction where the pool's users have one."""
    statement = f"SELECT pg_sleep({seconds})"

    async def work(source: Source, connection: Any) -> None:
        await source.execute(connection, statement)

    return work


async def run(
    sources: Sequence[Source],
    work: Work,
    *,
    tasks: int,
    seconds: float,
    warm_up: float = WARM_UP,
    clock: Clock | None = None,
) -> Outcome:
    """Let ``tasks`` tasks, spread evenly over the sources, use connections for a while.

    :param seconds: how long to measure, after ``warm_up`` seconds that do not count.
    :param clock: the throughput is per second of this clock; waits are as long as they are.
    :raises Exception: the first error of a task other than the pool's timeout, after all have ended.
    """
    load = _Load(work, seconds, warm_up, clock or time.perf_counter)
    shares = tuple(Share() for _ in range(tasks))
    running = [
        asyncio.create_task(load.task(sources[number % len(sources)], share), name=f"load {number}")
        for number, share in enumerate(shares)
    ]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return Outcome(load.seconds, shares, sum(len(source.connects) for source in sources))


class _Load:
    """One run.  Each task looks at the clock itself: with some pools no other task would run meanwhile."""

    def __init__(self, work: Work, seconds: float, warm_up: float, clock: Callable[[], float]) -> None:
        self._work = work
        self._clock = clock
        self._from = time.perf_counter() + warm_up
        self._until = self._from + seconds
        """Checkouts between these two times count."""
        self._began = self._ended = 0.0
        """The same, by the clock; read once each, for it costs as much as some pools."""

    @property
    def seconds(self) -> float:
        """How long it took, by the clock."""
        return self._ended - self._began

    async def task(self, source: Source, share: Share) -> None:
        while time.perf_counter() < self._until:
            await self._checkout(source, share)
        self._ended = self._ended or self._clock()

    async def _checkout(self, source: Source, share: Share) -> None:
        asked = time.perf_counter()
        while True:
            lease = source.connect()
            try:
                connection = await lease.__aenter__()
                break
            except source.timeouts:
                if time.perf_counter() >= self._from:
                    share.timeouts += 1
                if time.perf_counter() >= self._until:
                    return self._count(share, asked, served=False)
        try:
            self._count(share, asked, served=True)
            if time.perf_counter() < self._until:  # else those behind would wait for nothing
                await self._work(source, connection)
        finally:
            await lease.__aexit__(None, None, None)

    def _count(self, share: Share, asked: float, served: bool) -> None:
        now = time.perf_counter()
        if now < self._from:
            return
        self._began = self._began or self._clock()
        # As for threads: the part of a wait that is inside the measurement counts.
        waited = max(0.0, min(now, self._until) - max(asked, self._from))
        share.longest_wait = max(share.longest_wait, waited)
        if served and now < self._until:
            share.checkouts += 1
            share.waited += waited
