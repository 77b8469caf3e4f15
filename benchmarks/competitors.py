"""What is compared, and on what."""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

from sqlalchemy.engine import URL, Dialect
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool, QueuePool

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.server import Server
from sqla_queries_pool.demo.workload import Work, sleep_on_server

from . import adapters

TIMEOUT = 1.0
"""Seconds that a checkout waits, where a cell says nothing."""


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

    def recreate(self) -> Pool:
        """Make the next one: an engine asks for it when it is disposed."""
        return type(self)(self._creator, dialect=self._dialect)


@dataclass(frozen=True)
class Backend:
    """Where the connections come from."""

    name: str
    connect: Callable[[], Any] = field(repr=False)
    """Opens a connection: a fake, or psycopg2's."""
    work: Callable[[float], Work] = field(repr=False)
    """Makes work that takes that many seconds."""
    dialect: Dialect | None = None
    look: Work | None = field(default=None, repr=False)
    """The smallest thing that one uses a connection for; None where there is nothing to use."""
    connect_3: Callable[[], Any] | None = field(default=None, repr=False)
    """Opens a connection for psycopg_pool, where ``connect`` gives none that it can use."""
    url: URL | None = field(default=None, repr=False)
    """Of the server, with the password; None where there is none."""

    @contextmanager
    def pools(self, competitor: Competitor, max_size: int, timeout: float = TIMEOUT) -> Iterator[list[Pool]]:
        """Make the pools of a competitor; at the end they are disposed."""
        pool_id = f"benchmark {secrets.token_hex(4)}"
        made = [competitor.make(self, max_size, timeout, pool_id) for _ in range(competitor.engines)]
        try:
            yield made
        finally:
            for pool in made:
                pool.dispose()


Make: TypeAlias = Callable[[Backend, int, float, str], Pool]
"""Makes a pool: on what, with which limit, how many seconds a checkout waits, and a ``pool_id``."""


@dataclass(frozen=True)
class Competitor:
    """One kind of pool, or some pools that share a limit."""

    name: str
    make: Make
    engines: int = 1
    needs: str = ""
    """The module that it comes from, if that may not be installed."""

    @property
    def there(self) -> bool:
        """Can it take part?"""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def queue_pool(**options: Any) -> Make:
    """QueuePool with a hard limit, as the others have it."""

    def make(backend: Backend, max_size: int, timeout: float, pool_id: str) -> Pool:
        limits: dict[str, Any] = {"pool_size": max_size, "max_overflow": 0, "timeout": timeout}
        return QueuePool(backend.connect, dialect=backend.dialect, **limits, **options)

    return make


def queries_pool(**options: Any) -> Make:
    """QueriesPool with its defaults, apart from ``options``."""

    def make(backend: Backend, max_size: int, timeout: float, pool_id: str) -> Pool:
        names: dict[str, Any] = {"max_size": max_size, "timeout": timeout, "pool_id": pool_id}
        return QueriesPool(backend.connect, dialect=backend.dialect, **names, **options)

    return make


def _without_limit(kind: type[Pool]) -> Make:
    return lambda backend, *_: kind(backend.connect, dialect=backend.dialect)


def psycopg_pool(**options: Any) -> Make:
    """psycopg_pool, apart from ``options`` with its defaults and no least size."""

    def make(backend: Backend, max_size: int, timeout: float, _: str) -> Pool:
        return adapters.PsycopgPool(backend.connect_3 or backend.connect, max_size, timeout, **options)

    return make


def _psycopg_below(backend: Backend, max_size: int, timeout: float, _: str) -> Pool:
    dialect = backend.dialect and importlib.import_module("sqlalchemy.dialects.postgresql.psycopg").dialect()
    return adapters.PsycopgBelow(backend.connect_3 or backend.connect, max_size, timeout, dialect)


def _psycopg2_pool(backend: Backend, max_size: int, *_: object) -> Pool:
    return adapters.Psycopg2Pool(backend.connect, max_size)


def _queries_own(backend: Backend, max_size: int, _: float, pool_id: str) -> Pool:
    return adapters.QueriesOwnPool(backend.connect, max_size, pool_id)


QUEUE = Competitor("QueuePool", queue_pool())
QUEUE_LIFO = Competitor("QueuePool, LIFO", queue_pool(use_lifo=True))
PRE_PING = Competitor("QueuePool, pre-ping", queue_pool(pre_ping=True))
NULL = Competitor("NullPool", _without_limit(NullPool))
PSYCOPG = Competitor("psycopg_pool", psycopg_pool(), needs="psycopg_pool")
PSYCOPG_BELOW = Competitor("psycopg_pool below SQLAlchemy", _psycopg_below, needs="psycopg_pool")
PSYCOPG2 = Competitor("psycopg2.pool", _psycopg2_pool)
QUERIES_OWN = Competitor("queries' own", _queries_own, needs="queries")
QUERIES = Competitor("QueriesPool", queries_pool())
QUERIES_3 = Competitor("QueriesPool, 3 engines", queries_pool(), engines=3)
BARE = Competitor("a bare deque", _without_limit(BarePool))


class FakeConnection:
    """What pools need of a DBAPI connection, at no cost: SQLAlchemy's, psycopg_pool, psycopg2's, queries'."""

    closed = 0
    info = pgconn = SimpleNamespace(transaction_status=0)
    """It is idle, always."""

    def rollback(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Return to the psycopg_pool below SQLAlchemy, if there is one, as psycopg's own connections do."""
        pool = getattr(self, "_pool", None)
        if pool is not None and pool.close_returns:
            pool.putconn(self)

    def cursor(self) -> None:
        """Have none."""

    def isexecuting(self) -> bool:
        """Never."""
        return False


def fake(connect: Callable[[], Any] = FakeConnection) -> Backend:
    """A driver that costs nothing: what is left is the pool.

    Work is sleep: as a query does, it lets other threads run.
    """

    def work(seconds: float) -> Work:
        return (lambda connection: time.sleep(seconds)) if seconds else (lambda connection: None)

    return Backend("fake driver", connect, work)


def postgresql(server: Server) -> Backend:
    """Connections to a server: psycopg2's, and psycopg's for psycopg_pool."""
    engine = server.engine("benchmark", pool_reset_on_return=None)
    arguments, options = engine.dialect.create_connect_args(engine.url)
    address = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)

    def connect() -> Any:
        return engine.dialect.connect(*arguments, **options)

    def connect_3() -> Any:
        return importlib.import_module("psycopg").connect(address)

    def look(connection: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    return Backend("PostgreSQL", connect, sleep_on_server, engine.dialect, look, connect_3, engine.url)
