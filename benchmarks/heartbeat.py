"""How late other tasks of the loop are while a pool is in trouble.

A task wants to run every few milliseconds, and notes how late it was.  Beside it tasks use the pool, and
meanwhile something fails: the server, the network, the pool's users.  Whatever blocks the loop makes it late.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy import create_engine
from sqlalchemy.engine import Engine, make_url

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres, EmbeddedPostgresError

from .async_competitors import QUERIES, QUEUE, AsyncCompetitor, Place, installed, places
from .clock import Clock
from .competitors import Backend
from .effort import Effort
from .figures import Cell, Figure, Target
from .network import Network
from .tasks import Source, on_server

GROUP = "a heartbeat"
INTERVAL = 0.005
"""Seconds between two beats."""
AT_MOST, P99 = 50, 5
"""Milliseconds that a beat may be late: each, and 99 of 100."""
CONNECTIONS = 8
CALLERS, MANY = 40, 200
"""Tasks that want a connection now and then; and at once."""
WORK, PAUSE = 0.02, 0.02
"""Seconds that they have it, and that they pause on average: so long that the loop has time to spare."""
TIMEOUT, PATIENCE = 0.5, 0.7
"""Seconds: the pool's timeout, and what a caller waits for a statement before it is cancelled."""
RECOVERY = 0.3
"""Seconds after the fault that count, too: all want to connect then."""
HEAP = 1_000_000
"""Objects, as many as an application may have: a collection of all of them takes a tenth of a second."""
SYNC_DRIVER = "psycopg2"


class Heart:
    """A task that wants to run at fixed times.  What makes one beat late makes those late that follow."""

    def __init__(self) -> None:
        self.late: list[float] = []
        """Seconds, for each beat."""
        self._clock = Clock()
        self._task = asyncio.create_task(self._beat(), name="heartbeat")

    async def _beat(self) -> None:
        due = self._clock()
        while True:
            due += INTERVAL
            await asyncio.sleep(max(0.0, due - self._clock()))
            while (early := due - self._clock()) > 0:  # the clock stood still meanwhile
                await asyncio.sleep(early)
            self.late.append(-early)

    async def stop(self) -> None:
        """The end; what is due by then still counts."""
        await asyncio.sleep(2 * INTERVAL)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._clock.close()


class Callers:
    """Tasks that use a pool, and go on whatever they get."""

    def __init__(self, source: Source, tasks: int, pause: float = PAUSE) -> None:
        self.served = self.failed = 0
        self._ended = False
        self._source = source
        self._pause = pause
        self._work = on_server(WORK)
        self._chance = random.Random(1)
        self._tasks = [asyncio.create_task(self._call(), name=f"caller {n}") for n in range(tasks)]

    async def _call(self) -> None:
        while not self._ended:
            try:
                await asyncio.wait_for(self._request(), PATIENCE)
                self.served += 1
            except Exception:  # the drivers' own, the pools' own, and those of sockets
                self.failed += 1
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * self._pause)

    async def _request(self) -> None:
        async with self._source.connect() as connection:
            await self._work(self._source, connection)

    async def stop(self) -> None:
        """Cancel them, and wait for their ends."""
        self._ended = True  # before Python 3.12, ``wait_for`` may swallow that it is cancelled
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class Scene:
    """What a fault may use, and for how long."""

    place: Place
    server: EmbeddedPostgres
    network: Network
    competitor: AsyncCompetitor
    seconds: float
    heart: Heart | None = None
    """Beats from the moment when the connections are open."""
    pool_id: str = field(default_factory=lambda: f"benchmark {secrets.token_hex(4)}")
    served: int = 0

    async def source(self) -> Source:
        """An engine; all of one scene have one budget, if they can."""
        return await self.competitor.make(self.place, CONNECTIONS, TIMEOUT, self.pool_id)

    def sync_engine(self) -> Engine:
        """One for threads, on the same budget."""
        names: dict[str, Any] = {"poolclass": QueriesPool, "max_size": CONNECTIONS, "pool_id": self.pool_id}
        return create_engine(self.place.server.set(drivername=f"postgresql+{SYNC_DRIVER}"), **names)

    def begin(self) -> None:
        """From now on it counts how late the loop is."""
        self.heart = self.heart or Heart()

    @property
    def shared(self) -> bool:
        """Can threads have a part of the budget?"""
        return self.competitor is QUERIES and installed(SYNC_DRIVER)

    @asynccontextmanager
    async def callers(
        self, source: Source, tasks: int = CALLERS, pause: float = PAUSE
    ) -> AsyncIterator[None]:
        """Let tasks use it, and go on for a while after the fault."""
        callers = Callers(source, tasks, pause)
        try:
            await asyncio.sleep(RECOVERY)
            self.begin()
            yield
            await asyncio.sleep(RECOVERY)
        finally:
            await callers.stop()
            self.served += callers.served


Fault: TypeAlias = Callable[[Scene], Awaitable[None]]


async def nothing(scene: Scene) -> None:
    """No pool at all: so late is the machine."""
    scene.begin()
    await asyncio.sleep(scene.seconds)


async def full(scene: Scene) -> None:
    """More tasks than connections, all the time."""
    source = await scene.source()
    async with scene.callers(source, 100, pause=0.0):
        await asyncio.sleep(scene.seconds)
    await source.close()


async def timeouts(scene: Scene) -> None:
    """All connections are out, and many tasks wait in vain and time out at once."""
    source = await scene.source()
    leases = [source.connect() for _ in range(CONNECTIONS)]
    for lease in leases:
        await lease.__aenter__()
    scene.begin()
    callers = Callers(source, MANY, pause=0.0)
    await asyncio.sleep(max(scene.seconds, 1.5 * TIMEOUT))
    await callers.stop()
    for lease in leases:
        await lease.__aexit__(None, None, None)
    await source.close()


async def refuse(scene: Scene) -> None:
    """All connections end, and the server refuses others."""
    source = await scene.source()
    async with scene.callers(source):
        scene.network.refuse()
        await asyncio.sleep(scene.seconds)
        scene.network.pass_on()
    await source.close()


async def restart(scene: Scene) -> None:
    """The server restarts."""
    source = await scene.source()
    async with scene.callers(source):
        await asyncio.get_running_loop().run_in_executor(None, scene.server.restart)
    await source.close()


async def blackhole(scene: Scene) -> None:
    """Nothing comes through, neither on open connections nor on new ones."""
    source = await scene.source()
    async with scene.callers(source):
        scene.network.blackhole()
        await asyncio.sleep(scene.seconds)
        scene.network.pass_on()
    await source.close()


async def threads(scene: Scene) -> None:
    """Threads have the whole budget, and return it at the end."""
    source = await scene.source()
    engine = scene.sync_engine()
    executor = asyncio.get_running_loop().run_in_executor
    held = await asyncio.gather(*(executor(None, engine.connect) for _ in range(CONNECTIONS)))
    async with scene.callers(source):
        await asyncio.sleep(scene.seconds)
        await asyncio.gather(*(executor(None, connection.close) for connection in held))
    await source.close()
    await executor(None, engine.dispose)


async def close(scene: Scene) -> None:
    """Idle connections of tasks and threads are closed in a network that lets nothing through: the engine is
    disposed, and another one wants their slots."""
    source, other = await scene.source(), await scene.source()
    executor = asyncio.get_running_loop().run_in_executor
    async with scene.callers(source):
        pass
    engine = scene.sync_engine() if scene.shared else None
    if engine is not None:
        await executor(None, _use, engine, CONNECTIONS // 2)
    scene.network.blackhole()
    async with scene.callers(other):
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(source.close(), scene.seconds)
        scene.network.pass_on()
    await other.close()
    if engine is not None:
        await executor(None, engine.dispose)


def _use(engine: Engine, connections: int) -> None:
    for connection in [engine.connect() for _ in range(connections)]:
        connection.close()


FAULTS: dict[str, Fault] = {
    "no pool": nothing,
    "a full pool": full,
    f"{MANY} timeouts at once": timeouts,
    "the server refuses": refuse,
    "the server restarts": restart,
    "a blackholed network": blackhole,
    "threads hold the budget": threads,
    "closes that hang": close,
}


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Measure each fault; the server is one of our own, for it has to restart."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(EmbeddedPostgres({"scram_iterations": "1"}))
        except EmbeddedPostgresError as error:
            yield Cell(GROUP, f"not measured: {error}")
            return
        _quicken(server)
        network = stack.enter_context(Network(server.host, server.port))
        stack.enter_context(logs_to_nowhere())
        heap = [[number] for number in range(HEAP)]
        gc.collect()
        url = network.url(make_url(server.url()))
        yield from places(GROUP, partial(_cells, server, network), [url], effort)
        del heap


def _quicken(server: EmbeddedPostgres) -> None:
    """Store the password again, with few rounds: drivers do these in the loop, for 3 to 6 ms a connection."""
    setting = create_engine(server.url())
    with setting.begin() as connection:
        connection.exec_driver_sql(f"ALTER ROLE {server.user} PASSWORD '{server.password}'")
    setting.dispose()


@contextmanager
def logs_to_nowhere() -> Iterator[None]:
    """Write what the pools log of the faults, as an application would, but to nowhere."""
    with open(os.devnull, "w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


def _cells(server: EmbeddedPostgres, network: Network, place: Place, effort: Effort) -> Iterator[Cell]:
    beats: dict[str, list[float]] = {QUEUE.name: [], QUERIES.name: []}
    served = dict.fromkeys(beats, 0)
    for name, fault in FAULTS.items():
        cell = Cell(GROUP, f"{place}: {name}")
        for competitor in (QUEUE, QUERIES):
            if fault is threads and competitor is QUEUE:
                continue
            scene = Scene(place, server, network, competitor, effort.fault)
            late = place.run(_measure(fault, scene))
            cell.figures[competitor.name] = _figures(late, scene.served)
            if fault is not nothing:
                beats[competitor.name] += late
                served[competitor.name] += scene.served
        cell.targets.extend(_targets(cell, judged=fault is not nothing))
        yield cell
    cell = Cell(GROUP, f"{place}: all of these together")
    cell.figures.update({name: _figures(sorted(late), served[name]) for name, late in beats.items()})
    cell.targets.extend(_targets(cell, judged=True))
    yield cell


def _figures(late: Sequence[float], served: int) -> dict[str, Figure]:
    """Sum up beats, in order of how late they were."""
    return {
        "p99, ms": Figure.of([late[min(len(late) - 1, int(0.99 * len(late)))] * 1000]),
        "longest, ms": Figure.of([late[-1] * 1000]),
        "beats": Figure.of([len(late)]),
        "served": Figure.of([served]),
    }


def _targets(cell: Cell, judged: bool) -> Iterator[Target]:
    for what, bound in (("p99, ms", P99), ("longest, ms", AT_MOST)):
        yield Target(what, cell.figures[QUERIES.name][what], at_most=bound if judged else None)
        if QUEUE.name in cell.figures:
            yield Target(f"{QUEUE.name}'s {what}", cell.figures[QUEUE.name][what])


async def _measure(fault: Fault, scene: Scene) -> list[float]:
    """How late the beats were while it happened, in order."""
    gc.collect()  # of the program, not of the pool
    try:
        await fault(scene)
    finally:
        scene.network.pass_on()
        if scene.heart is not None:
            await scene.heart.stop()
    assert scene.heart is not None, "nothing was measured"
    return sorted(scene.heart.late)
