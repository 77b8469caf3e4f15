"""The pools: what queries calls ``Connection``, ``Pool`` and ``PoolManager``.

The names, the arguments and the exceptions are those of ``queries.pool``
(https://queries.readthedocs.io/en/latest/pool.html); the bookkeeping behind them is the one that
the engines use, so that there is one truth about every connection.
"""

from ..errors import (
    ActivePoolError,
    ConnectionBusyError,
    ConnectionException,
    ConnectionNotFoundError,
    NoIdleConnectionsError,
    PoolConnectionException,
    PoolException,
    PoolFullError,
    QueriesException,
)
from . import after_fork as after_fork
from .connection import Connection
from .manager import PoolManager
from .pool import DEFAULT_IDLE_TTL, DEFAULT_MAX_SIZE, Pool

__all__ = [
    "DEFAULT_IDLE_TTL",
    "DEFAULT_MAX_SIZE",
    "ActivePoolError",
    "Connection",
    "ConnectionBusyError",
    "ConnectionException",
    "ConnectionNotFoundError",
    "NoIdleConnectionsError",
    "Pool",
    "PoolConnectionException",
    "PoolException",
    "PoolFullError",
    "PoolManager",
    "QueriesException",
]
