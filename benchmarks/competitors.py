"""What is compared, and on what."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import Dialect
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.server import Server
from sqla_queries_pool.demo.workload import Work, sleep_on_server

TIMEOUT = 1.0
"""Seconds, of all pools."""


class BarePool(Pool):
    """As little as a pool can do: a deque, no limit, nobody waits.  What SQLAlchemy itself costs."""

    def __init__(self, creator: Any, **kw: Any) -> None:
        super().__init__(creator, **kw)
        self._idle: deque[ConnectionPoolEntry] = deque()

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            return self._idle.pop()
        except IndexError:
            return self._create_connection()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._idle.append(record)

    def dispose(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()


@dataclass(frozen=True)
class Competitor:
    """One kind of pool, or some pools that share a limit."""

    name: str
    make: Callable[..., Pool]
    """Takes a creator, ``max_size``, ``pool_id`` and what ``Pool`` takes."""
    engines: int = 1


def _queue_pool(creator: Any, max_size: int, pool_id: str, **kw: Any) -> Pool:
    return QueuePool(creator, pool_size=max_size, max_overflow=0, timeout=TIMEOUT, **kw)


def _queue_pool_lifo(*args: Any, **kw: Any) -> Pool:
    return _queue_pool(*args, use_lifo=True, **kw)


def _queries_pool(creator: Any, max_size: int, pool_id: str, **kw: Any) -> Pool:
    return QueriesPool(creator, max_size=max_size, timeout=TIMEOUT, pool_id=pool_id, **kw)


def _bare_pool(creator: Any, max_size: int, pool_id: str, **kw: Any) -> Pool:
    return BarePool(creator, **kw)


QUEUE = Competitor("QueuePool", _queue_pool)
QUEUE_LIFO = Competitor("QueuePool, LIFO", _queue_pool_lifo)
QUERIES = Competitor("QueriesPool", _queries_pool)
QUERIES_3 = Competitor("QueriesPool, 3 engines", _queries_pool, engines=3)
BARE = Competitor("a bare deque", _bare_pool)


@dataclass(frozen=True)
class Backend:
    """Where the connections come from."""

    name: str
    creator: Callable[[], Any] = field(repr=False)
    work: Callable[[float], Work] = field(repr=False)
    """Makes work that takes that many seconds."""
    dialect: Dialect | None = None
    look: Work | None = field(default=None, repr=False)
    """The smallest thing that one uses a connection for; None where there is nothing to use."""

    @contextmanager
    def pools(self, competitor: Competitor, max_size: int) -> Iterator[list[Pool]]:
        """Make the pools of a competitor; at the end they are disposed."""
        pool_id = f"benchmark {secrets.token_hex(4)}"
        made = [
            competitor.make(self.creator, max_size, pool_id, dialect=self.dialect)
            for _ in range(competitor.engines)
        ]
        try:
            yield made
        finally:
            for pool in made:
                pool.dispose()


class FakeConnection:
    """What a pool needs of a DBAPI connection, at no cost."""

    def rollback(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def cursor(self) -> None:
        """Have none."""


def fake() -> Backend:
    """A driver that costs nothing: what is left is the pool."""

    def work(seconds: float) -> Work:
        return (lambda connection: time.sleep(seconds)) if seconds else (lambda connection: None)

    return Backend("fake driver", FakeConnection, work)


def postgresql(server: Server) -> Backend:
    """Connections to a server."""
    engine = server.engine("benchmark", pool_reset_on_return=None)
    arguments, options = engine.dialect.create_connect_args(engine.url)

    def connect() -> Any:
        return engine.dialect.connect(*arguments, **options)

    def look(connection: PoolProxiedConnection) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    return Backend("PostgreSQL", connect, sleep_on_server, engine.dialect, look)
