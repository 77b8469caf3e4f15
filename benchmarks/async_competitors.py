"""What is compared where tasks ask, with which drivers, and in which event loops.

Drivers, loops and the pools of drivers are imported when they are used: not everybody has all of them.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import event, exc
from sqlalchemy.engine import URL

from sqla_queries_pool import QueriesPool

from .competitors import TIMEOUT, Backend, BarePool
from .effort import Effort
from .figures import Cell
from .tasks import Source

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


class EngineSource:
    """An engine: ``async with engine.connect()``."""

    timeouts: tuple[type[Exception], ...] = (exc.TimeoutError,)

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.connects: list[None] = []
        event.listen(engine.sync_engine, "connect", lambda *_: self.connects.append(None))

    def connect(self) -> AbstractAsyncContextManager[Any]:
        return self.engine.connect()

    async def execute(self, connection: Any, statement: str) -> None:
        await connection.exec_driver_sql(statement)

    async def close(self) -> None:
        await self.engine.dispose()


class AsyncpgSource:
    """asyncpg's own pool, without SQLAlchemy: ``async with pool.acquire()``."""

    timeouts: tuple[type[Exception], ...] = (asyncio.TimeoutError,)

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout
        self.connects: list[None] = []

    def connect(self) -> AbstractAsyncContextManager[Any]:
        lease: AbstractAsyncContextManager[Any] = self._pool.acquire(timeout=self._timeout)
        return lease

    async def execute(self, connection: Any, statement: str) -> None:
        await connection.execute(statement)

    async def close(self) -> None:
        await self._pool.close()


class PsycopgSource:
    """psycopg_pool's AsyncConnectionPool, without SQLAlchemy: ``async with pool.connection()``."""

    timeouts: tuple[type[Exception], ...]

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.timeouts = (importlib.import_module("psycopg_pool").PoolTimeout,)
        self.connects: list[None] = []

    def connect(self) -> AbstractAsyncContextManager[Any]:
        lease: AbstractAsyncContextManager[Any] = self._pool.connection()
        return lease

    async def execute(self, connection: Any, statement: str) -> None:
        await connection.execute(statement)

    async def close(self) -> None:
        await self._pool.close()


@dataclass(frozen=True)
class Place:
    """A server, a driver and an event loop: where tasks are compared."""

    server: URL = field(repr=False)
    driver: str
    loop: str

    @property
    def url(self) -> URL:
        """The server's, for SQLAlchemy and the driver."""
        return self.server.set(drivername=f"postgresql+{self.driver}")

    @property
    def dsn(self) -> str:
        """The server's, for the driver alone, with the password."""
        return self.server.set(drivername="postgresql").render_as_string(hide_password=False)

    def __str__(self) -> str:
        return f"{self.driver}, {self.loop}"

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run it in a new loop of this kind."""
        result: T = importlib.import_module(self.loop).run(main)  # uvloop has the function, too
        return result

    @asynccontextmanager
    async def pools(
        self, competitor: AsyncCompetitor, max_size: int, timeout: float = TIMEOUT
    ) -> AsyncIterator[list[Source]]:
        """Make the pools of a competitor; at the end they are closed."""
        pool_id = f"benchmark {secrets.token_hex(4)}"
        made: list[Source] = []
        try:
            for _ in range(competitor.engines):
                made.append(await competitor.make(self, max_size, timeout, pool_id))
            yield made
        finally:
            for source in made:
                await source.close()


Make: TypeAlias = Callable[[Place, int, float, str], Awaitable[Source]]
"""Makes a pool: where, with which limit, how many seconds a checkout waits, and a ``pool_id``."""


@dataclass(frozen=True)
class AsyncCompetitor:
    """One kind of pool, or some engines that share a limit."""

    name: str
    make: Make
    engines: int = 1
    driver: str = ""
    """The only driver that it works with; empty where that does not matter."""
    needs: str = ""
    """The module that it comes from, if that may not be installed."""

    def there(self, place: Place) -> bool:
        """Can it take part?"""
        return self.driver in ("", place.driver) and (not self.needs or installed(self.needs))


def installed(module: str) -> bool:
    """Can it be imported?"""
    return importlib.util.find_spec(module) is not None


def engine(url: URL, **options: Any) -> AsyncEngine:
    """Make an engine for tasks."""
    made: AsyncEngine = importlib.import_module("sqlalchemy.ext.asyncio").create_async_engine(url, **options)
    return made


async def _queue(place: Place, max_size: int, timeout: float, _: str) -> Source:
    limits = {"pool_size": max_size, "max_overflow": 0, "pool_timeout": timeout}
    return EngineSource(engine(place.url, **limits))  # SQLAlchemy's own choice of the pool


async def _queries(place: Place, max_size: int, timeout: float, pool_id: str) -> Source:
    names = {"max_size": max_size, "pool_timeout": timeout, "pool_id": pool_id}
    return EngineSource(engine(place.url, poolclass=QueriesPool, **names))


async def _bare(place: Place, *_: object) -> Source:
    return EngineSource(engine(place.url, poolclass=BarePool))


def _asyncpg_pool(**options: Any) -> Make:
    async def make(place: Place, max_size: int, timeout: float, _: str) -> Source:
        create = importlib.import_module("asyncpg").create_pool
        return AsyncpgSource(await create(place.dsn, min_size=0, max_size=max_size, **options), timeout)

    return make


async def _no_reset(connection: Any) -> None:
    """A rollback, as the others have it, does nothing where no transaction is open."""


async def _psycopg_pool(place: Place, max_size: int, timeout: float, _: str) -> Source:
    pool = importlib.import_module("psycopg_pool").AsyncConnectionPool
    made = pool(place.dsn, min_size=0, max_size=max_size, timeout=timeout, open=False)
    await made.open()
    return PsycopgSource(made)


QUEUE = AsyncCompetitor("AsyncAdaptedQueuePool", _queue)
ASYNCPG = AsyncCompetitor("asyncpg's pool", _asyncpg_pool(), driver="asyncpg")
ASYNCPG_NO_RESET = AsyncCompetitor(
    "asyncpg's pool, no reset", _asyncpg_pool(reset=_no_reset), driver="asyncpg"
)
PSYCOPG = AsyncCompetitor("AsyncConnectionPool", _psycopg_pool, driver="psycopg", needs="psycopg_pool")
QUERIES = AsyncCompetitor("QueriesPool", _queries)
QUERIES_3 = AsyncCompetitor("QueriesPool, 3 engines", _queries, engines=3)
BARE = AsyncCompetitor("a bare deque", _bare)
"""What SQLAlchemy itself costs; without a limit."""
WAITING = (QUEUE, ASYNCPG, PSYCOPG, QUERIES)
ALL = (*WAITING, ASYNCPG_NO_RESET, BARE)

DRIVERS = ("asyncpg", "psycopg")
LOOPS = ("asyncio", "uvloop")


def servers(backends: Sequence[Backend]) -> list[URL]:
    """Of those that are one, the URLs."""
    return [backend.url for backend in backends if backend.url is not None]


def places(
    group: str,
    measure: Callable[[Place, Effort], Iterator[Cell]],
    servers: Sequence[URL],
    effort: Effort,
    drivers: Sequence[str] = DRIVERS,
) -> Iterator[Cell]:
    """Measure on each server with each driver in each loop; what is not installed has a cell that says so."""
    for url in servers:
        if not installed("greenlet"):
            yield Cell(group, "not measured: greenlet is not installed")
            return
        for driver in drivers:
            if not installed(driver):
                yield Cell(group, f"{driver}: not measured: {driver} is not installed")
                continue
            for loop in effort.loops:
                if installed(loop):
                    yield from measure(Place(url, driver, loop), effort)
                else:
                    yield Cell(group, f"{driver}, {loop}: not measured: {loop} is not installed")
