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
    """The connection is executing, or somebody has it."""

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
    """No connection became free within the ``timeout`` of the engine that asked.

    It is what QueuePool raises, a :class:`sqlalchemy.exc.TimeoutError`.  The first line of its message names
    the pool, its numbers, the likeliest cause and what to do; a report of holders and waiters follows.
    """

    snapshot: Any = None
    """The same as data: a :class:`~sqla_queries_pool.insight.diagnostics.Snapshot`."""


class TooManyRequests(CheckoutTimeout):
    """A checkout was refused before its ``timeout``, for too many wait: ``max_waiting`` and ``queue_target``.

    Who is told early has time left to do something else, and leaves the connections to those whose callers
    still wait for an answer.
    """


class PoolDeadlock(CheckoutTimeout):
    """Checkouts wait for each other, and nothing has moved for ``deadlock_grace`` seconds.

    Raised in the one that began to wait last, before its timeout; what it holds then serves the others.
    """


class CheckoutReentered(exc.InvalidRequestError):
    """A finalizer asked the pool for something while its own thread was inside the pool.

    The garbage collector may run a finalizer, and with it an event listener, in a thread that is
    in the pool's critical section.  A check-in from there is put aside and done a moment later; a
    checkout or a dispose has to wait for that critical section, which waits for it.
    """


class ParameterError(exc.ArgumentError, ValueError):
    """A parameter has a value that means nothing; the text says which, what it was, what to write."""
