"""A SQLAlchemy connection pool in the style of the queries library.

``create_engine(url, poolclass=QueriesPool, max_size=10, idle_ttl=60)``: all engines of one database
share one limit, and idle connections go away by themselves.
"""

from .errors import (
    ActivePoolError,
    CheckoutReentered,
    CheckoutTimeout,
    ConnectionBusyError,
    ConnectionException,
    ConnectionNotFoundError,
    NoIdleConnectionsError,
    ParameterError,
    PoolConnectionException,
    PoolException,
    PoolFullError,
    QueriesException,
)
from .pool import Connection, Pool, PoolManager
from .queries_pool import QueriesPool

__all__ = [
    "ActivePoolError",
    "CheckoutReentered",
    "CheckoutTimeout",
    "Connection",
    "ConnectionBusyError",
    "ConnectionException",
    "ConnectionNotFoundError",
    "NoIdleConnectionsError",
    "ParameterError",
    "Pool",
    "PoolConnectionException",
    "PoolException",
    "PoolFullError",
    "PoolManager",
    "QueriesException",
    "QueriesPool",
]
__version__ = "0.1.0"
