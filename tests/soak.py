"""A soak: many threads on a server to which everything happens, and what must hold all the time.

    python tests/soak.py --seconds 60 --seed 7

64 threads share 4 engines of 2 databases, hence 2 pools, with more threads than connections.  Beside them
run two event loops, whose tasks use 2 engines of the same databases and are cancelled at any await; when each
has run for a while another one follows.  Meanwhile one thread restarts the server,
terminates backends, changes limits, disposes of engines, forks, detaches, and now and then has all of them
rest to see that everything was returned.  What is looked at:

* The server never sees more connections than the limit: each pool has a role of its own, whose CONNECTION
  LIMIT follows the pool's limit.  So the server itself refuses what is above, and its log says so.
* Nothing is handed out twice, no wrong row is read, no transaction leaks from one holder to the next, no
  committed update is lost, and no error reaches a thread whose connection nobody has touched.
* At rest and at the end: all slots are free and can be had at once, and the audit finds nothing to mend.
  At the end neither connection nor thread nor descriptor is left.

What happens follows from the seed; how the threads interleave does not.  The exit status is 0 if all of it
held; else what failed is printed, with the state of the pools and the stacks of all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import itertools
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import inside
import psutil
import psycopg
import psycopg2
from sqlalchemy import Connection, Engine, create_engine, exc, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.errors import (
    ConnectionBusyError,
    ConnectionNotFoundError,
    NoIdleConnectionsError,
    PoolFullError,
)

THREADS = 64
LOOPS = 2
TASKS = 12
"""Of each event loop."""
EVERYBODY = THREADS + LOOPS * TASKS
FEW = 8
"""Those that use the queries API, too, and that go on in a lull."""
BALANCE = 1000
"""What each thread's account has in the beginning."""
SECONDS = 30.0
"""Within which everything that comes to an end does."""
PATIENCE: dict[str, Any] = {"poolclass": inside.pool_class(close_timeout=SECONDS), "pool_timeout": SECONDS}
"""A server on a busy machine may take its time to end a backend, which counts until then."""
HASTY = 0.3
"""The timeout of the engines for nested checkouts, whose threads could wait for each other for ever."""
AFTERMATH = 15.0
"""Seconds after a restart in which the pauses that refusals bring may outlast a hasty timeout."""
OVER = 5
"""How often in a row the poll sees too many connections before it counts: it is no snapshot."""

ENGINES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "north": [
        ("psycopg2", {"max_size": 6, "idle_ttl": 0.5}),
        ("psycopg", {"max_size": 4, "idle_ttl": 0.5, "ping_after": 0.05, "pool_timeout": HASTY}),
    ],
    "south": [
        ("psycopg2", {"max_size": 5, "idle_ttl": 0.5, "pool_recycle": 2, "pool_timeout": HASTY}),
        ("psycopg", {"max_size": 8, "idle_ttl": 0.5, "min_size": 2}),
    ],
}
"""By database: drivers and parameters.  All other timeouts are ``SECONDS``."""

ASYNC_ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "north": ("asyncpg", {"max_size": 5, "idle_ttl": 0.5}),
    "south": ("psycopg", {"max_size": 4, "idle_ttl": 0.5, "pool_recycle": 2}),
}
"""The same for tasks: one for each database."""

SCHEMA = """
CREATE TABLE account (id int PRIMARY KEY, owner text, balance int, commits int);
INSERT INTO account
    SELECT id, current_database() || '-' || id, {balance}, 0 FROM generate_series(0, {last}) id;
GRANT ALL ON account TO PUBLIC
"""
HOLDER = "coalesce(current_setting('soak.holder', true), '')"
READ = text(f"SELECT id, owner, CAST(:nonce AS int), {HOLDER}, pg_sleep(:pause) FROM account WHERE id = :id")
READ_BY_HAND = f"SELECT owner, {HOLDER}, set_config('soak.holder', %s, true) FROM account WHERE id = %s"
TRANSFER = text("UPDATE account SET balance = balance + :n, commits = commits + :c WHERE id = :id")
BACKEND = text("SELECT pg_backend_pid()")
WHO = text("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
COUNT = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = %s AND (usename = %s OR application_name = 'added') AND NOT pid = ANY(%s)
"""
DRIVERS = (psycopg2.Error, psycopg.Error)
"""What reaches SQLAlchemy's caller bare where the return of a connection resets its isolation level."""
IN_TRANSACTION = (1, 2, 3)
"""libpq's transaction status: active, in a transaction, in one that has failed."""


class Wrong(AssertionError):
    """Something that must hold does not."""


class Session:
    """What locks a connection of the queries API."""


class Ring:
    """A reference cycle with something in it: the garbage collector alone ends it."""

    def __init__(self, content: object) -> None:
        self.content = content
        self.ring = self


def eventually(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Wait until it holds.  Time for which the machine stands still does not count."""
    left = seconds
    while not condition():
        if left < 0:
            raise Wrong(f"not within {seconds:g} s: {what}")
        begin = time.monotonic()
        time.sleep(0.002)
        left -= min(time.monotonic() - begin, 0.05)


class Log(logging.Handler):
    """What the pools log: only of what a terminated backend or a restart brings about."""

    EXPECTED = (
        "Exception during reset or similar",
        "%s: could not renew",
        "%s: could not open a connection for min_size",
        "%s: closing %r: rollback failed",
    )

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        super().__init__(logging.WARNING)
        self._fail = fail

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith(self.EXPECTED):
            self._fail(Wrong(f"logged: {self.format(record)}"))


def pool_of(engine: Engine) -> QueriesPool:
    """An engine's pool."""
    assert isinstance(engine.pool, QueriesPool)
    return engine.pool


def is_hasty(engine: Engine) -> bool:
    """Is it for nested checkouts?"""
    return pool_of(engine).timeout() == HASTY


class Gate:
    """Lets threads work, all or a few, or keeps them from their next piece of work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._admitted = EVERYBODY
        self._working = 0

    def enter(self, number: int, wait: bool = True) -> bool:
        """Begin a piece of work; a task can't wait for it here."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: number < self._admitted)
            admitted = number < self._admitted
            self._working += admitted
            return admitted

    @contextmanager
    def passing(self, number: int) -> Iterator[None]:
        """One piece of work of a thread."""
        self.enter(number)
        with self.working():
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """One piece of work, by one that has entered."""
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextmanager
    def admitting(self, threads: int) -> Iterator[None]:
        """The others rest; and they stay as they are for the dump if something fails meanwhile."""
        with self._changed:
            self._admitted = threads
            if not self._changed.wait_for(lambda: self._working <= threads, SECONDS * 2):
                raise Wrong(f"{self._working} threads do not come to an end")
        yield
        with self._changed:
            self._admitted = EVERYBODY
            self._changed.notify_all()


class Registry:
    """Who has which DBAPI connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[int, tuple[Any, str]] = {}

    def claim(self, handle: Any, me: str) -> None:
        """The thread, or the task, has got it."""
        with self._lock:
            _, other = self._holders.setdefault(id(handle), (handle, me))
            if other is not me or self._holders[id(handle)][0] is not handle:
                raise Wrong(f"{handle!r} was handed out to {me}, and {other} has it")

    def release(self, handle: Any) -> None:
        """The thread is about to give it back."""
        with self._lock:
            del self._holders[id(handle)]

    def __len__(self) -> int:
        return len(self._holders)

    def __repr__(self) -> str:
        return str(list(self._holders.values()))


class Kept(threading.local):
    """The connections that a thread keeps for its questions to the server, by database."""

    def __init__(self) -> None:
        self.connections: dict[str, psycopg2.extensions.connection] = {}


class Server:
    """The server, what was done to it, and what its log says."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.postgres = postgres
        self._kept = Kept()
        self._lock = threading.Lock()
        self._restarts = 0
        self._up = True
        self._back = 0.0
        self._gone: dict[int, float] = {}
        """When the terminated backends were gone, ``inf`` for those that are about to."""

    def connect(self, database: str) -> psycopg2.extensions.connection:
        """A connection of the superuser, for whom no role's limit holds."""
        postgres = self.postgres
        connection = psycopg2.connect(
            host=postgres.host,
            port=postgres.port,
            user=postgres.user,
            password=postgres.password,
            dbname=database,
        )
        connection.autocommit = True
        return connection

    def query(self, sql: str, *parameters: object, database: str = "postgres") -> list[tuple[Any, ...]]:
        """All rows of a statement, on a connection that this thread keeps for that."""
        kept = self._kept.connections
        if database not in kept:
            kept[database] = self.connect(database)
        try:
            with kept[database].cursor() as cursor:
                cursor.execute(sql, parameters or None)
                return cursor.fetchall() if cursor.description else []
        except psycopg2.OperationalError:
            self.leave()
            raise

    def leave(self) -> None:
        """Close what this thread keeps."""
        kept = self._kept.connections
        while kept:
            kept.popitem()[1].close()

    def moment(self) -> tuple[int, bool]:
        """How many restarts have begun, and whether the server is up."""
        with self._lock:
            return self._restarts, self._up

    def restart(self, mode: str) -> None:
        """Restart it."""
        with self._lock:
            self._restarts, self._up = self._restarts + 1, False
        self.leave()
        self.postgres.restart(mode)
        with self._lock:
            self._up, self._back = True, time.monotonic()

    @property
    def just_back(self) -> bool:
        """Is the last restart so short a time ago that a pool may be in a pause still?"""
        return time.monotonic() - self._back < AFTERMATH

    def terminate(self, backends: list[int]) -> None:
        """Terminate backends, and return when they are gone."""
        self._gone.update(dict.fromkeys(backends, math.inf))
        self.query("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) pid", backends)
        eventually(lambda: not any(map(psutil.pid_exists, backends)), f"the end of {backends}")
        self._gone.update(dict.fromkeys(backends, time.monotonic()))

    def terminated(self, backend: int, since: float) -> bool:
        """Was it there when its checkout began, and not for ever?"""
        return self._gone.get(backend, -math.inf) >= since

    @property
    def terminations(self) -> int:
        """How many backends were terminated."""
        return len(self._gone)

    def see_gone(self, backends: list[int]) -> None:
        """Wait until the server counts none of these any more."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
        eventually(lambda: not self.query(sql, backends)[0][0], f"the end of {backends}")

    def refusals(self) -> list[str]:
        """What the log says of connections above the limit of a role."""
        log = (self.postgres.folder / "server.log").read_text(errors="replace")
        return [line for line in log.splitlines() if "too many connections for role" in line]


class Database:
    """One database with its role, its pool and its engines."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.outside: set[int] = set()
        """Backends of this role that do not count against the pool: detached ones, and those of forks."""
        self.peak = 0
        password = server.postgres.password
        server.query(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        server.query(f"CREATE DATABASE {name}")
        server.query(SCHEMA.format(balance=BALANCE, last=THREADS - 1), database=name)
        server.leave()  # the database, where backends are terminated
        self.engines = [self._engine(driver, more) for driver, more in ENGINES[name]]
        self.patient, self.hasty = sorted(self.engines, key=is_hasty)
        self.pid = pool_of(self.patient).pid
        self.tasks = self._async_engine(*ASYNC_ENGINES[name])
        self.limit: int = PoolManager.report()["pools"][self.pid]["max_size"]
        self.stated = self.limit
        self._role_limit(self.limit)
        for engine in self.engines:
            engine.connect().close()  # an engine's very first connect is not to meet a fork
        asyncio.run(self._first_task())  # nor the end of its backend: SQLAlchemy asks the server something

    async def _first_task(self) -> None:
        async with self.tasks.connect():
            pass

    def _engine(self, driver: str, parameters: dict[str, Any]) -> Engine:
        url = make_url(self.server.postgres.url(driver, self.name)).set(username=self.name)
        # What encrypts has locks that another thread may have at a fork: psycopg2 alone hangs then.
        url = url.update_query_dict({"sslmode": "disable", "gssencmode": "disable"})
        return create_engine(url, **PATIENCE | parameters)

    def _async_engine(self, driver: str, parameters: dict[str, Any]) -> AsyncEngine:
        url = make_url(self.server.postgres.url("psycopg", self.name)).set(username=self.name)
        url = url.update_query_dict({"ssl" if driver == "asyncpg" else "sslmode": "disable"})
        url = url.set(drivername=f"postgresql+{driver}")
        engine = create_async_engine(url, **PATIENCE | parameters)
        if pool_of(engine.sync_engine).pid != self.pid:
            raise Wrong(f"{engine} is of another pool")
        return engine

    def _role_limit(self, limit: int) -> None:
        self.server.query(f"ALTER ROLE {self.name} CONNECTION LIMIT {limit}")
        self.limit = limit

    @property
    def numbers(self) -> dict[str, Any]:
        """What the pool says of itself."""
        report = PoolManager.report()["pools"][self.pid]
        return {**report["connections"], "waiting": report["waiting"], "max_size": report["max_size"]}

    def backends(self) -> int:
        """How many connections the server counts for the pool."""
        return int(self.server.query(COUNT, self.name, self.name, list(self.outside))[0][0])

    def all_backends(self) -> list[int]:
        """Those that are there, of whatever role."""
        sql = "SELECT pid FROM pg_stat_activity WHERE datname = %s"
        return [pid for (pid,) in self.server.query(sql, self.name)]

    def resize(self, size: int) -> None:
        """Change the pool's limit, and the role's with it as soon as the pool keeps to it."""
        self.stated = size
        self._role_limit(max(size, self.limit))
        PoolManager.set_max_size(self.pid, size)
        eventually(lambda: PoolManager.size(self.pid) <= size, f"{self.name} has {size} slots")
        eventually(lambda: self.backends() <= size, f"{self.name} has {size} backends")
        self._role_limit(size)

    @contextmanager
    def room(self, more: int) -> Iterator[set[int]]:
        """Let the server take some more, which do not count; yields where their process ids are put."""
        self._role_limit(self.stated + more)
        try:
            yield self.outside
            self.server.see_gone(list(self.outside))
            self.outside.clear()
        finally:
            self._role_limit(self.stated)

    def fill(self, stack: ExitStack, since: Any = None) -> list[int]:
        """Have all slots at once, with sessions that have begun since then; the backends."""
        size = self.numbers["max_size"]
        found: list[int] = []
        for engine in (self.patient, self.hasty):
            for _ in range(min(pool_of(engine).size(), size - len(found))):
                connection = stack.enter_context(engine.connect())
                backend, start = connection.execute(WHO).one()
                if backend in found or (since is not None and start < since):
                    raise Wrong(f"backend {backend}, begun {start}, is another's")
                found.append(backend)
        return found

    def at_rest(self) -> bool:
        """Has nobody anything, and waits nobody?"""
        gc.collect()  # each time: it does nothing where another thread's is under way
        numbers = self.numbers
        return not any(numbers[name] for name in ("held", "opening", "locked", "waiting"))

    def see_idle_ones_go(self) -> None:
        """Those that are idle close by themselves, but for those that are to be kept."""
        kept = sum(more.get("min_size", 0) for _, more in ENGINES[self.name])
        eventually(lambda: PoolManager.size(self.pid) <= kept, f"{self.name} without idle connections")

    def forget(self) -> None:
        """Dispose of the engines, and let go of them."""
        for engine in (*self.engines, self.tasks.sync_engine):
            engine.dispose()
        del self.engines[:], self.patient, self.hasty, self.tasks


class Worker(threading.Thread):
    """One of the threads: pieces of work, one after the other, until it is told to stop."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.soak = soak
        self.number = number
        self.chance = random.Random(f"{soak.seed} {number}")
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.checkouts = 0
        self.longest = 0.0
        self.commits = dict.fromkeys(ENGINES, 0)
        """Committed updates of its own account."""
        self.doubtful = dict.fromkeys(ENGINES, 0)
        """Updates whose commit had no answer."""
        self._claimed: dict[int, Any] = {}
        """By id of SQLAlchemy's connection: the driver's."""
        self._backends: dict[int, float] = {}
        """Those that it has used in this piece of work, and when their checkouts began."""
        self._since = 0.0
        # By weight.  The queries API is for a few.
        self._works = [self.read] * 8 + [self.transfer] * 6
        self._works += [
            self.nested,
            self.autocommit,
            self.abandon,
            self.invalidate,
            self.soften,
            self.interrupt,
        ]
        if number < FEW:
            self._works += [self.by_hand] * 20

    def run(self) -> None:
        while not self.soak.stop.is_set():
            with self.soak.gate.passing(self.number):
                self._work(self.chance.choice(self._works))
            time.sleep(self.chance.uniform(0.0, 0.02))  # as if it did something without a connection

    def _work(self, work: Callable[[], None]) -> None:
        before = self.soak.server.moment()
        self._backends.clear()
        try:
            work()
            self.done[work.__name__] += 1
        except (exc.DBAPIError, exc.TimeoutError, *DRIVERS) as error:
            self._judge(error, before)
        except BaseException as error:
            self.soak.fail(error)

    def _judge(self, error: Exception, before: tuple[int, bool]) -> None:
        """Has it to do with what was done to the server, or with what was asked for?"""
        server = self.soak.server
        if getattr(error, "hasty", False) and (isinstance(error, CheckoutTimeout) or server.just_back):
            self.errors["short timeout"] += 1
        elif isinstance(error, CheckoutTimeout):
            self.soak.fail(error)
        elif any(server.terminated(*backend) for backend in self._backends.items()):
            self.errors["terminated"] += 1
        elif not before[1] or server.moment() != before:
            self.errors["restarted"] += 1
        else:
            self.soak.fail(error)

    # -- what the work is made of

    @contextmanager
    def checkout(self, engine: Engine, **options: Any) -> Iterator[Connection]:
        """A connection that nobody else has, and nobody has left anything in."""
        with self.connect(engine) as connection:
            try:
                self.claim(connection)
                if options:
                    connection.execution_options(**options)
                yield connection
            finally:
                self.release(connection)

    def connect(self, engine: Engine) -> Connection:
        """Check out, and see how long it takes."""
        self._since = time.monotonic()
        try:
            return engine.connect()
        except exc.SQLAlchemyError as error:
            error.hasty = is_hasty(engine)  # type: ignore[attr-defined]
            raise
        except DRIVERS as error:
            raise Wrong("the driver's error, which nobody expects of SQLAlchemy") from error
        finally:
            self.checkouts += 1
            self.longest = max(self.longest, time.monotonic() - self._since)

    def claim(self, connection: Connection) -> None:
        """This thread has it from now on."""
        handle: Any = connection.connection.dbapi_connection
        self.soak.registry.claim(handle, self.name)
        self._claimed[id(connection)] = handle
        self._look(handle)

    def release(self, connection: Connection) -> None:
        """This thread is about to give it back, if it has not."""
        handle = self._claimed.pop(id(connection), None)
        if handle is not None:
            self.soak.registry.release(handle)

    def _look(self, handle: Any) -> None:
        self._backends[handle.info.backend_pid] = self._since
        if int(handle.info.transaction_status) in IN_TRANSACTION or handle.autocommit:
            raise Wrong(f"in {handle!r} somebody has left a transaction, or autocommit mode")

    def ask(self, connection: Connection, pause: float = 0.004) -> None:
        """Read the row of one's own."""
        nonce = self.chance.randrange(10**9)
        parameters = {"id": self.number, "nonce": nonce, "pause": self.chance.uniform(0.0, pause)}
        row = tuple(connection.execute(READ, parameters).one())[:4]
        expected = (self.number, f"{connection.engine.url.database}-{self.number}", nonce, "")
        if row != expected:
            raise Wrong(f"{self.name} read {row}, expected {expected}")

    def mark(self, connection: Connection) -> None:
        """Leave something in the transaction, which must end with it."""
        connection.execute(text("SELECT set_config('soak.holder', :me, true)"), {"me": self.name})

    def any_database(self) -> Database:
        return self.chance.choice(self.soak.databases)

    def any_engine(self) -> Engine:
        return self.chance.choice(self.any_database().engines)

    # -- pieces of work

    def read(self) -> None:
        """Read, and leave a transaction that the return ends."""
        with self.checkout(self.any_engine()) as connection:
            self.ask(connection)
            self.mark(connection)

    def transfer(self) -> None:
        """Move something to another's account, and commit or not."""
        database = self.any_database()
        other = (self.number + self.chance.randrange(1, THREADS)) % THREADS
        amount = self.chance.randrange(1, 10)
        with self.checkout(self.chance.choice(database.engines)) as connection:
            self.mark(connection)
            for number in sorted((self.number, other)):  # so that no two wait for each other
                mine = number == self.number
                change = {"id": number, "n": -amount if mine else amount, "c": int(mine)}
                connection.execute(TRANSFER, change)
            if self.chance.random() < 0.3:
                connection.rollback()
                return
            self.doubtful[database.name] += 1
            connection.commit()
            self.doubtful[database.name] -= 1
            self.commits[database.name] += 1

    def nested(self) -> None:
        """Check a second one out, of the same pool perhaps, but don't wait long for it."""
        with self.checkout(self.any_database().patient) as connection:
            self.ask(connection, 0.0)
            with self.checkout(self.any_database().hasty) as another:
                self.ask(another)
            self.ask(connection, 0.0)

    def autocommit(self) -> None:
        """Another isolation level, which the return takes back."""
        with self.checkout(self.any_engine(), isolation_level="AUTOCOMMIT") as connection:
            self.ask(connection)

    def abandon(self) -> None:
        """Lose a connection in a reference cycle, in the midst of a transaction."""
        connection = self.connect(self.any_engine())
        Ring(connection)
        try:
            self.claim(connection)
            self.ask(connection)
            self.mark(connection)
        finally:
            self.release(connection)

    def invalidate(self) -> None:
        """Have the connection replaced under SQLAlchemy's."""
        with self.checkout(self.any_database().patient) as connection:
            self.ask(connection)
            connection.rollback()
            self.release(connection)
            connection.invalidate()
            self.claim(connection)
            self.ask(connection)

    def soften(self) -> None:
        """Have the connection replaced when it is checked out next."""
        with self.checkout(self.any_engine()) as connection:
            self.ask(connection)
            connection.connection.invalidate(soft=True)

    def interrupt(self) -> None:
        """Ctrl-C in the midst of it."""
        with suppress(KeyboardInterrupt), self.checkout(self.any_engine()) as connection:
            self.mark(connection)
            raise KeyboardInterrupt

    def by_hand(self) -> None:
        """The queries API.  An engine that needs a slot, or the TTL, may take what is idle."""
        database, session = self.any_database(), Session()
        try:
            handle = self._added(database, session)
        except (PoolFullError, NoIdleConnectionsError, ConnectionBusyError, ConnectionNotFoundError):
            self.errors["none by hand"] += 1
            return
        self.soak.registry.claim(handle, self.name)
        try:
            self._look(handle)
            with handle.cursor() as cursor:
                cursor.execute("SET application_name = 'added'")
                handle.commit()
                cursor.execute(READ_BY_HAND, (self.name, self.number))
                row = cursor.fetchone()
            if row[:2] != (f"{database.name}-{self.number}", ""):
                raise Wrong(f"{self.name} read {row}")
        except psycopg2.Error:  # nobody has looked whether it is alive
            self.errors["lost by hand"] += 1
        finally:
            self.soak.registry.release(handle)
        if self.chance.random() < 0.7:  # else the session dies with the lock
            PoolManager.free(database.pid, handle)

    def _added(self, database: Database, session: Session) -> Any:
        """A connection that was added by hand, locked: a new one, or whichever is idle."""
        if self.chance.random() < 0.6:
            return PoolManager.get(database.pid, session)
        try:
            handle = self.soak.server.connect(database.name)
        except psycopg2.OperationalError:  # the server is away
            raise NoIdleConnectionsError(database.pid) from None
        handle.autocommit = False
        PoolManager.add(database.pid, handle)
        PoolManager.lock(database.pid, handle, session)
        return handle


class Tasks(threading.Thread):
    """An event loop, then another one, and so on, each with tasks that use the databases for a while."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(name=f"loop {number}", daemon=True)
        self.soak = soak
        self.first = THREADS + number * TASKS
        self._enough = False
        self.chance = random.Random(f"{soak.seed} loop {number}")
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        try:
            while not self.soak.stop.is_set():
                asyncio.run(self._main(self.chance.uniform(1.0, 4.0)))
                self.done["loops"] += 1
        except BaseException as error:
            self.soak.fail(error)

    async def _main(self, seconds: float) -> None:
        end, self._enough = time.monotonic() + seconds, False
        for number in range(self.first, self.first + TASKS):
            task = asyncio.create_task(self._work(number), name=f"task {number}")
            task.add_done_callback(self._look)
        while time.monotonic() < end and not self.soak.stop.is_set():
            await asyncio.sleep(0.01)
        # Each piece of work comes to its end, and so does an opening whose checkout was cancelled: the server
        # would go on to count a connection whose opening asyncio.run() cancels.
        self._enough = True
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.001)

    def _look(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.soak.fail(error)

    async def _work(self, number: int) -> None:
        chance = random.Random(f"{self.chance.random()}")
        gate = self.soak.gate
        while not self._enough:
            if not gate.enter(number, wait=False):
                await asyncio.sleep(0.01)
                continue
            with gate.working():
                await self._piece(Piece(self.soak, number, chance), chance)
            await asyncio.sleep(chance.uniform(0.0, 0.02))

    async def _piece(self, piece: Piece, chance: random.Random) -> None:
        """One piece of work, which may be cancelled."""
        before = self.soak.server.moment()
        task = asyncio.create_task(
            piece.transfer() if chance.random() < 0.3 else piece.read(), name=piece.name
        )
        try:
            # Its parent may be cancelled as well, at the end of the loop; it is waited for then, too.
            await asyncio.wait([task], timeout=chance.uniform(0.0, 0.05) if chance.random() < 0.3 else None)
            cancelled = not task.done() and task.cancel()
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        if cancelled or task.cancelled():
            self.errors["cancelled"] += 1
        elif (error := task.exception()) is None:
            self.done["pieces"] += 1
        elif not isinstance(error, exc.DBAPIError) or isinstance(error, CheckoutTimeout):
            self.soak.fail(error)
        elif any(self.soak.server.terminated(*backend) for backend in piece.backends.items()):
            self.errors["terminated"] += 1
        elif not before[1] or self.soak.server.moment() != before:
            self.errors["restarted"] += 1
        else:
            self.soak.fail(error)


class Piece:
    """One piece of a task's work."""

    def __init__(self, soak: Soak, number: int, chance: random.Random) -> None:
        self.soak = soak
        self.number = number % THREADS
        self.chance = chance
        self.name = f"piece of task {number}"
        self.database = chance.choice(soak.databases)
        self.backends: dict[int, float] = {}
        """Those that it has used, and when it began."""

    @asynccontextmanager
    async def checkout(self) -> AsyncIterator[AsyncConnection]:
        """A connection that nobody else has, and nobody has left anything in."""
        since = time.monotonic()
        async with self.database.tasks.connect() as connection:
            raw = await connection.get_raw_connection()
            handle: Any = raw.driver_connection
            self.soak.registry.claim(handle, self.name)
            try:
                asyncpg = self.database.tasks.driver == "asyncpg"
                self.backends[handle.get_server_pid() if asyncpg else handle.info.backend_pid] = since
                if (
                    handle.is_in_transaction()
                    if asyncpg
                    else handle.info.transaction_status in IN_TRANSACTION
                ):
                    raise Wrong(f"in {handle!r} somebody has left a transaction")
                yield connection
            finally:
                self.soak.registry.release(handle)

    async def read(self) -> None:
        """Read the row of one's own, and leave a transaction that the return ends."""
        async with self.checkout() as connection:
            nonce = self.chance.randrange(10**9)
            parameters = {"id": self.number, "nonce": nonce, "pause": self.chance.uniform(0.0, 0.004)}
            row = tuple((await connection.execute(READ, parameters)).one())[:4]
            if row != (self.number, f"{self.database.name}-{self.number}", nonce, ""):
                raise Wrong(f"{self.name} read {row}")
            await self._mark(connection)

    async def transfer(self) -> None:
        """Move something to another's account; wherever it is cancelled, all of it or nothing."""
        other = (self.number + self.chance.randrange(1, THREADS)) % THREADS
        amount = self.chance.randrange(1, 10)
        async with self.checkout() as connection:
            await self._mark(connection)
            for number in sorted((self.number, other)):
                change = {"id": number, "n": -amount if number == other else amount, "c": 0}
                await connection.execute(TRANSFER, change)
            await connection.commit()

    async def _mark(self, connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT set_config('soak.holder', :me, true)"), {"me": self.name})


class Soak:
    """All of it."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.chance = random.Random(seed)
        self.registry = Registry()
        self.gate = Gate()
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.happened: Counter[str] = Counter()
        self.databases = [Database(server, name) for name in ENGINES]
        self.workers = [Worker(self, number) for number in range(THREADS)]
        self.loops = [Tasks(self, number) for number in range(LOOPS)]
        self._poll = threading.Thread(target=self._watch, name="watch", daemon=True)

    def fail(self, error: BaseException) -> None:
        """What must hold does not: the first one is shown, the others may follow from it."""
        self.failures.append(error)
        self.stop.set()

    def run(self, seconds: float) -> None:
        """Let everything happen, then look at what is left."""
        end = time.monotonic() + seconds
        for thread in (*self.workers, *self.loops, self._poll):
            thread.start()
        for disturb in self._disturbances():
            if self.stop.wait(self.chance.uniform(0.1, 0.6)) or time.monotonic() > end:
                break
            disturb()
            self.happened[disturb.__name__] += 1
        if self.failures:
            return  # with the threads as they are, for the dump
        self.rest()
        self.stop.set()
        for thread in (*self.workers, *self.loops, self._poll):
            thread.join(SECONDS)
            if thread.is_alive():
                raise Wrong(f"{thread.name} does not come to an end")

    def _disturbances(self) -> Iterator[Callable[[], None]]:
        """In an order of chance; each comes as often as it stands here before the first comes again."""
        deck = [self.terminate] * 4 + [self.resize] * 4 + [self.dispose] * 3 + [self.fork, self.detach] * 2
        deck += [self.restart, self.rest, self.expire] + [self.lull, self.audit] * 2
        while True:
            yield from self.chance.sample(deck, len(deck))

    def _watch(self) -> None:
        """See how many connections the server counts."""
        over = dict.fromkeys(self.databases, 0)
        try:
            while not self.stop.wait(0.02):
                for database in self.databases:
                    with suppress(psycopg2.OperationalError):  # the server is away
                        over[database] = over[database] + 1 if self._too_many(database) else 0
                    if over[database] >= OVER:
                        self.fail(Wrong(f"{database.name}: above its limit, {database.limit}"))
        except BaseException as error:
            self.fail(error)

    def _too_many(self, database: Database) -> bool:
        limit, found = database.limit, database.backends()
        if limit == database.stated == database.limit:
            database.peak = max(database.peak, found)
        return found > max(limit, database.limit)

    # -- what happens

    def any_database(self) -> Database:
        return self.chance.choice(self.databases)

    def restart(self) -> None:
        """Take the server away and bring it back."""
        self.server.restart(self.chance.choice(["fast", "immediate"]))

    def terminate(self) -> None:
        """Terminate some backends, or all of a database."""
        found = self.any_database().all_backends()
        few = self.chance.sample(found, min(len(found), self.chance.randrange(1, 4)))
        self.server.terminate(self.chance.choice([found, few, few]))

    def resize(self) -> None:
        """Change a limit."""
        self.any_database().resize(self.chance.randrange(3, 11))

    def dispose(self) -> None:
        """Dispose of an engine that is in use."""
        database = self.any_database()
        self.chance.choice([*database.engines, database.tasks.sync_engine]).dispose()

    def expire(self) -> None:
        """Replace all connections of a database."""
        PoolManager.expire(self.any_database().pid, rolling=self.chance.random() < 0.5)

    def detach(self) -> None:
        """Detach some connections, use and close them."""
        database = self.any_database()
        with database.room(3) as outside, ExitStack() as stack:
            for _ in range(3):
                connection = stack.enter_context(database.patient.connect())
                outside.add(connection.scalar(BACKEND))
                connection.detach()
                connection.scalar(BACKEND)

    def fork(self) -> None:
        """Have a child that uses all slots of both pools at once, while its parent's threads go on."""
        with ExitStack() as stack:
            outside = [stack.enter_context(d.room(d.numbers["max_size"])) for d in self.databases]
            ((since,),) = self.server.query("SELECT clock_timestamp()")
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                self._live(writer, since)
            os.close(writer)
            with open(reader, "rb") as pipe:
                told = pipe.read().decode()
            _, status = os.waitpid(child, 0)
            if status:
                raise Wrong(f"a child ended with status {status}: {told}")
            for backends, database in zip(outside, json.loads(told), strict=True):
                backends.update(database)

    def _live(self, writer: int, since: Any) -> None:
        """The life of the child.  It never leaves this method."""
        status = 1
        try:
            faulthandler.register(signal.SIGALRM, chain=True)  # if it hangs it shows where, and ends
            signal.alarm(int(SECONDS))
            with ExitStack() as stack:
                found = [database.fill(stack, since) for database in self.databases]
            os.write(writer, json.dumps(found).encode())
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def lull(self) -> None:
        """A few threads go on: there are connections to spare, some of them die, and others are too many."""
        with self.gate.admitting(FEW):
            for _ in range(3):
                self.terminate()
                self.stop.wait(self.chance.uniform(0.2, 1.0))

    def rest(self) -> None:
        """Nobody works: everything is returned, and all of it can be had, even if all that is idle dies."""
        with self.gate.admitting(0):
            if self.registry:
                raise Wrong(f"{self.registry} are claimed, and nobody works")
            for database in self.databases:
                eventually(database.at_rest, f"{database.name} at rest")
            self.audit()
            for database in self.databases:
                self.server.terminate(database.all_backends())
                with ExitStack() as stack:
                    database.fill(stack)
            self.audit()
            for database in self.databases:
                database.see_idle_ones_go()

    def audit(self) -> None:
        """Compare the ledger with the sockets and the living holders, also while everybody works."""
        for database in self.databases:
            found = PoolManager.audit(database.pid)
            if found.mended:
                raise Wrong(f"the audit of {database.name} found something to mend: {found}")

    # -- what is left

    def finish(self) -> None:
        """Nothing was lost in the accounts; once all is disposed of, nothing is left of the pools."""
        for database in self.databases:
            self._settle(database)
            database.forget()
        self.server.leave()
        eventually(self._forgotten, "no pool is left")
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = ANY(%s)"
        eventually(lambda: not self.server.query(sql, list(ENGINES))[0][0], "no connection is left")
        eventually(lambda: not our_threads(), "no thread of the package is left")
        if refusals := self.server.refusals():
            raise Wrong(f"{len(refusals)} connections above a limit, the first: {refusals[0]}")

    def _forgotten(self) -> bool:
        gc.collect()  # pools are parts of cycles
        for database in self.databases:
            PoolManager.clean(database.pid)
        return not PoolManager.report()["pools"]

    def _settle(self, database: Database) -> None:
        rows = self.server.query("SELECT id, balance, commits FROM account", database=database.name)
        if sum(balance for _, balance, _ in rows) != THREADS * BALANCE:
            raise Wrong(f"{database.name}: the balance does not add up")
        for number, _, commits in rows:
            least = self.workers[number].commits[database.name]
            if not least <= commits <= least + self.workers[number].doubtful[database.name]:
                raise Wrong(f"{database.name}: {commits} commits of worker {number}, who knows of {least}")

    def summary(self) -> str:
        """One line."""
        done: Counter[str] = sum((worker.done for worker in self.workers), Counter())
        errors: Counter[str] = sum((worker.errors for worker in self.workers), Counter())
        tasks: Counter[str] = sum((loop.done + loop.errors for loop in self.loops), Counter())
        longest = max(worker.longest for worker in self.workers)
        peaks = ", ".join(f"{database.name} {database.peak}" for database in self.databases)
        return (
            f"seed {self.seed}: {sum(worker.checkouts for worker in self.workers)} checkouts, longest wait "
            f"{longest:.1f} s, work {told(done)}, errors {told(errors)}, tasks {told(tasks)}, "
            f"events {told(self.happened)}, "
            f"{self.server.terminations} backends terminated, most backends {peaks}"
        )

    def dump(self) -> None:
        """What there is to see when something has failed."""
        out = sys.stderr
        for error in self.failures[:3]:
            traceback.print_exception(error, file=out)
        print(json.dumps(PoolManager.report(), indent=1), file=out)
        for engine in itertools.chain(*(database.engines for database in self.databases)):
            print(repr(engine.pool), file=out)
        print("claimed:", self.registry, file=out)
        for stack, names in stacks().items():
            print(f"\n{', '.join(names)}:\n{stack}", file=out)


def told(counter: Counter[str]) -> str:
    """A counter in words."""
    return ", ".join(f"{name} {number}" for name, number in counter.most_common()) or "none"


def stacks() -> dict[str, list[str]]:
    """What the threads do: many do the same."""
    found: dict[str, list[str]] = {}
    frames = sys._current_frames()
    for thread in threading.enumerate():
        stack = "".join(traceback.format_stack(frames.get(thread.ident or 0)))
        found.setdefault(stack, []).append(thread.name)
    return found


def our_threads() -> list[str]:
    """The package's threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sqla_queries_pool")]


def descriptors() -> Counter[str]:
    """What kinds of files are open."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found[os.readlink(f"/proc/self/fd/{name}").partition(":")[0]] += 1
    return found


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument(
        "--switch-interval", type=float, default=sys.getswitchinterval(), help="of threads, in seconds"
    )
    options = parser.parse_args()
    sys.setswitchinterval(options.switch_interval)
    print(f"seed {options.seed}, {options.seconds:g} s", flush=True)
    faulthandler.dump_traceback_later(options.seconds + 240, exit=True)
    # Python 3.12 on says so of every fork of a process with threads, which is what is tested here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    with EmbeddedPostgres(settings={"max_connections": "120"}) as postgres:
        before = descriptors()
        soak = Soak(Server(postgres), options.seed)
        logging.getLogger("sqlalchemy.pool").addHandler(Log(soak.fail))
        try:
            soak.run(options.seconds)
            summary = soak.summary()
            if not soak.failures:
                soak.finish()
                soak.server.leave()
                if (after := descriptors()) != before:
                    raise Wrong(f"descriptors: {after}, in the beginning {before}")
        except BaseException as error:
            soak.fail(error)
        if soak.failures:
            soak.dump()
            print(f"FAILED: {soak.failures[0]}")
            return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
