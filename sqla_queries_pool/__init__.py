"""A SQLAlchemy connection pool in the style of the queries library.

``create_engine(url, poolclass=QueriesPool, max_size=10, idle_ttl=60)``: all engines of one database
share one limit, and idle connections go away by themselves.
"""

from .budget.audit import Audit
from .budget.stats import BOUNDS, ClassStatistics, Histogram, ManagerStatistics, Statistics
from .engine.queries_pool import QueriesPool
from .engine.settings import QueriesPoolOptions
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
    PoolDeadlock,
    PoolDrained,
    PoolException,
    PoolFullError,
    QueriesException,
    TooManyRequests,
)
from .insight.snapshot import Diagnosis, Holder, Snapshot, Waiting, snapshot
from .labels import checkout_label, checkouts, labelled
from .pool import Connection, Pool, PoolManager
from .pool.stopping import Stopped

__all__ = [
    "BOUNDS",
    "ActivePoolError",
    "Audit",
    "CheckoutReentered",
    "CheckoutTimeout",
    "ClassStatistics",
    "Connection",
    "ConnectionBusyError",
    "ConnectionException",
    "ConnectionNotFoundError",
    "Diagnosis",
    "Histogram",
    "Holder",
    "ManagerStatistics",
    "NoIdleConnectionsError",
    "ParameterError",
    "Pool",
    "PoolConnectionException",
    "PoolDeadlock",
    "PoolDrained",
    "PoolException",
    "PoolFullError",
    "PoolManager",
    "QueriesException",
    "QueriesPool",
    "QueriesPoolOptions",
    "Snapshot",
    "Statistics",
    "Stopped",
    "TooManyRequests",
    "Waiting",
    "checkout_label",
    "checkouts",
    "labelled",
    "snapshot",
]
__version__ = "0.2.0"
