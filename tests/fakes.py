"""A DBAPI driver without a database, a dialect for it, a clock, and threads that report.

``create_engine("fake://host/database", module=driver, …)`` gives an engine whose creator is SQLAlchemy's own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy.dialects import registry
from sqlalchemy.engine.default import DefaultDialect

T = TypeVar("T")
SECONDS = 20.0
"""The longest that anything here may take on a machine that is busy with other things."""


class FakeClock:
    """A ``time_method``: its time goes on when it is told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeConnection:
    """A DBAPI connection that counts what it is asked for: ``calls["rollback"]``."""

    def __init__(self, driver: FakeDriver, number: int) -> None:
        self.driver = driver
        self.number = number
        """The driver's first is 1."""
        self.calls: Counter[str] = Counter()
        self.closed = False
        self.executing = False

    def close(self) -> None:
        self.calls["close"] += 1
        if not self.closed:
            self.closed = True
            self.driver._closed(self)

    def rollback(self) -> None:
        self.calls["rollback"] += 1

    def commit(self) -> None:
        self.calls["commit"] += 1

    def isexecuting(self) -> bool:
        return self.executing

    def ping(self) -> None:
        """What ``pool_pre_ping`` does with the dialect below."""
        self.calls["ping"] += 1
        self.driver.on_ping(self)

    def __repr__(self) -> str:
        return f"<FakeConnection {self.number}{' closed' if self.closed else ''}>"


class FakeDriver:
    """A DBAPI module."""

    apilevel, threadsafety, paramstyle = "2.0", 1, "named"

    class Error(Exception):
        """PEP 249's."""

    class OperationalError(Error):
        """PEP 249's; what a failing ``connect`` raises."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        """Connecting stops here while it is not set."""
        self.gate.set()
        self.failures = 0
        """How many of the next attempts to connect fail."""
        self.on_ping: Callable[[FakeConnection], None] = lambda connection: None
        self.attempts = 0
        """How often ``connect`` was called."""
        self.connecting = 0
        """How many calls of ``connect`` have not returned yet."""
        self.connections: list[FakeConnection] = []
        """All that there ever were, in the order of their numbers."""
        self.live: set[FakeConnection] = set()
        """Those that are open."""
        self.peak = 0
        """The most that were ever open or connecting at once."""
        self.events: list[str] = []
        """``open 1``, ``close 1``, … in the order in which it happened."""
        self._lock = threading.Lock()

    def connect(self, *args: Any, **kw: Any) -> Any:
        with self._lock:
            self.attempts += 1
            self.connecting += 1
            self.peak = max(self.peak, len(self.live) + self.connecting)
        assert self.gate.wait(SECONDS), "nobody opened the gate"
        with self._lock:
            self.connecting -= 1
            if self.failures > 0:
                self.failures -= 1
                raise self.OperationalError("the server is not there")
            connection = FakeConnection(self, len(self.connections) + 1)
            self.connections.append(connection)
            self.live.add(connection)
            self.events.append(f"open {connection.number}")
            return connection

    def _closed(self, connection: FakeConnection) -> None:
        with self._lock:
            self.live.remove(connection)
            self.events.append(f"close {connection.number}")

    def numbers(self) -> list[int]:
        """The numbers of the open connections."""
        return sorted(connection.number for connection in list(self.live))


class FakeDialect(DefaultDialect):
    """Speaks no SQL; it passes on what pools and engines ask of a connection."""

    name = driver = "fake"
    supports_statement_cache = True

    def initialize(self, connection: Any) -> None:
        pass

    def do_ping(self, dbapi_connection: Any) -> bool:
        try:
            dbapi_connection.ping()
        except FakeDriver.OperationalError:
            return False
        return True

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        return isinstance(e, FakeDriver.OperationalError)


registry.register("fake", __name__, "FakeDialect")


class Task(threading.Thread, Generic[T]):
    """A thread that does something and keeps what comes out: ``Task(pool.connect).result()``."""

    def __init__(self, work: Callable[[], T], name: str | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._result: T | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self._work

    def result(self) -> T:
        """What the work returned; raises what it raised."""
        self.join(SECONDS)
        assert not self.is_alive(), f"{self.name} does not come to an end"
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
