"""Pools that are not SQLAlchemy's, to be asked as those are: ``pool.connect()``, and ``close()`` of what it
gives.

As thin as can be: one object per checkout, that has the connection and gives it back, after a ``rollback()``
as SQLAlchemy's pools call it.  They have nothing of what a checkout through SQLAlchemy does beyond that
(events, a record, invalidation, a detached connection's finalizer).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool, PoolProxiedConnection


class Lease:
    """A connection that is out."""

    __slots__ = ("__weakref__", "connection", "cursor", "put")

    def __init__(self, connection: Any, put: Callable[[Any], None]) -> None:
        self.connection = connection
        self.cursor = connection.cursor
        self.put = put

    def close(self) -> None:
        """Give the connection back."""
        self.connection.rollback()
        self.put(self.connection)


class _Adapter(Pool):
    """A pool for those who know ``connect()`` and ``dispose()`` alone."""

    def __init__(self, creator: Callable[[], Any]) -> None:
        super().__init__(creator)

    def connect(self) -> PoolProxiedConnection:
        return self.lease()  # type: ignore[return-value]

    def lease(self) -> Lease:
        raise NotImplementedError

    def _do_get(self) -> ConnectionPoolEntry:
        raise NotImplementedError

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        raise NotImplementedError


def connection_pool(connect: Callable[[], Any], max_size: int, timeout: float, **options: Any) -> Any:
    """Make psycopg_pool's ConnectionPool of what connects."""
    driver = SimpleNamespace(connect=lambda *_, **__: connect())
    return importlib.import_module("psycopg_pool").ConnectionPool(
        connection_class=driver, min_size=0, max_size=max_size, timeout=timeout, open=True, **options
    )


class PsycopgPool(_Adapter):
    """psycopg_pool's ConnectionPool, with ``getconn`` and ``putconn``."""

    def __init__(self, connect: Callable[[], Any], max_size: int, timeout: float, **options: Any) -> None:
        super().__init__(connect)
        module = importlib.import_module("psycopg_pool")
        self._refused = (module.PoolTimeout, module.TooManyRequests)
        self._pool = connection_pool(connect, max_size, timeout, **options)

    def lease(self) -> Lease:
        try:
            return Lease(self._pool.getconn(), self._pool.putconn)
        except self._refused as error:
            raise exc.TimeoutError(str(error)) from None

    def dispose(self) -> None:
        self._pool.close()


class PsycopgBelow(NullPool):
    """psycopg_pool below SQLAlchemy, as psycopg's documentation has it: SQLAlchemy opens and closes for each
    checkout, and to close a connection gives it back."""

    def __init__(
        self, connect: Callable[[], Any], max_size: int, timeout: float, dialect: Dialect | None
    ) -> None:
        module = importlib.import_module("psycopg_pool")
        self._refused = (module.PoolTimeout, module.TooManyRequests)
        self._below = connection_pool(connect, max_size, timeout, close_returns=True)
        super().__init__(self._below.getconn, dialect=dialect)

    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except self._refused as error:
            raise exc.TimeoutError(str(error)) from None

    def dispose(self) -> None:
        self._below.close()


class Psycopg2Pool(_Adapter):
    """psycopg2's ThreadedConnectionPool.  When it is full it raises; nobody waits."""

    def __init__(self, connect: Callable[[], Any], max_size: int) -> None:
        super().__init__(connect)
        threaded = importlib.import_module("psycopg2.pool").ThreadedConnectionPool

        class Connected(threaded):  # type: ignore[misc, valid-type]
            def _connect(self, key: Any = None) -> Any:
                connection = connect()
                self._used[key], self._rused[id(connection)] = connection, key
                return connection

        # With `minconn` it keeps as many as it may have; else it closes what is returned.  It would open them
        # at once, all with the key None.
        self._pool = Connected(0, max_size)
        self._pool.minconn = max_size

    def lease(self) -> Lease:
        return Lease(self._pool.getconn(), self._pool.putconn)

    def dispose(self) -> None:
        self._pool.closeall()


class QueriesOwnPool(_Adapter):
    """queries' PoolManager.  When it is full it raises; nobody waits.

    Its users ask for an idle connection, and when there is none open one and add it.
    """

    def __init__(self, connect: Callable[[], Any], max_size: int, pool_id: str) -> None:
        super().__init__(connect)
        self._module = importlib.import_module("queries.pool")
        self._connect = connect
        self._id = pool_id
        self._manager = self._module.PoolManager.instance()
        self._manager.create(pool_id, max_size=max_size)

    def lease(self) -> Lease:
        lease = Lease.__new__(Lease)  # it is the session, too, that connections are locked with
        try:
            connection = self._manager.get(self._id, lease)
        except self._module.NoIdleConnectionsError:
            connection = self._connect()
            self._manager.add(self._id, connection)
            self._manager.lock(self._id, connection, lease)
        lease.__init__(connection, self._put)  # type: ignore[misc]
        return lease

    def _put(self, connection: Any) -> None:
        self._manager.free(self._id, connection)

    def dispose(self) -> None:
        self._manager.remove(self._id)
