"""The exceptions: queries' own names, the checkout timeout, and bad parameters."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc


class QueriesException(Exception):
    """The base of everything that the queries API raises."""


class ConnectionException(QueriesException):
    """Something about one connection; ``cid`` is the ``id()`` of its DBAPI connection."""

    def __init__(self, cid: object) -> None:
        super().__init__(cid)
        self.cid = cid


class PoolException(QueriesException):
    """Something about one pool; ``pid`` is its pool id."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


class PoolConnectionException(PoolException):
    """Something about one connection of one pool."""

    def __init__(self, pid: str, cid: object) -> None:
        super().__init__(pid)
        self.args = (pid, cid)
        self.cid = cid


class ActivePoolError(PoolException):
    """A pool with active connections was to be removed."""

    def __str__(self) -> str:
        return f"Pool {self.pid} has at least one active connection"


class ConnectionBusyError(ConnectionException):
    """The connection is executing, or a session or an engine has it."""

    def __str__(self) -> str:
        return f"Connection {self.cid} is busy"


class ConnectionNotFoundError(PoolConnectionException):
    """The pool has no such connection."""

    def __str__(self) -> str:
        return f"Connection {self.cid} not found in pool {self.pid}"


class NoIdleConnectionsError(PoolException):
    """The pool has no idle connection that was added by hand."""

    def __str__(self) -> str:
        return f"Pool {self.pid} has no idle connections"


class PoolFullError(PoolException):
    """The pool has no slot left for another connection."""

    def __str__(self) -> str:
        return f"Pool {self.pid} is at its maximum capacity"


class CheckoutTimeout(exc.TimeoutError):
    """A checkout got no connection within the ``timeout`` of its engine.

    It is what QueuePool raises, a :class:`sqlalchemy.exc.TimeoutError`.  The first line of its message names
    the pool, its numbers, the likeliest cause and what to do; a report of the holders and the waiting
    checkouts follows.
    """

    snapshot: Any = None
    """The same as data: a :class:`~sqla_queries_pool.insight.snapshot.Snapshot`."""


class TooManyRequests(CheckoutTimeout):
    """The pool rejected a checkout before its ``timeout``: ``max_waiting`` or ``queue_target`` was exceeded.

    A caller that fails early has time left to do something else, and leaves the connections to those that can
    still use one in time.
    """


class PoolDrained(CheckoutTimeout):
    """The pool rejected a checkout because its engine was drained, as before a process ends.

    ``resume()`` makes the engine usable again.
    """


class PoolDeadlock(CheckoutTimeout):
    """Checkouts wait for each other, and nothing has moved for a second.

    Raised in the one that began to wait last, before its timeout; what it holds then serves the others.
    """


class CheckoutReentered(exc.InvalidRequestError):
    """A finalizer or a signal handler called the pool while its own thread was inside the pool.

    The garbage collector may run a finalizer, and with it an event listener, in a thread that is
    in the pool's critical section; Python runs signal handlers in the main thread, wherever that is.  A
    check-in from there is done a moment later; a checkout or a dispose would have to wait for the critical
    section, which waits for the finalizer or the handler.
    """


class ParameterError(exc.ArgumentError, ValueError):
    """A parameter has an invalid value; the text says which, what it was, and what to write."""
