"""HikariCP's two published scenarios, with HikariCP itself: a spike, and a database that is down.

https://github.com/brettwooldridge/HikariCP/blob/dev/documents/Welcome-To-The-Jungle.md and
https://github.com/brettwooldridge/HikariCP/wiki/Bad-Behavior:-Handling-Database-Down: the numbers are theirs.
What is compared is how pools behave, never what an operation costs: that is another language.

HikariCP runs from Debian's packages ``libhikaricp-java``, ``libpostgresql-jdbc-java`` and
``openjdk-17-jdk-headless``.  Where they are not, its rows say so.
"""

from __future__ import annotations

import importlib
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol

from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres, EmbeddedPostgresError

from .bursts import IDLE, LIMIT, REQUESTS, Driver, at_once
from .competitors import PSYCOPG_BELOW, QUERIES, QUEUE, Backend, Competitor, fake
from .effort import Effort
from .figures import Cell, Figure, Target
from .heartbeat import logs_to_nowhere
from .network import Network

GROUP = "HikariCP's scenarios"
HIKARI = "HikariCP"
QUERIES_CHECKED = f"{QUERIES.name}, ping_after=0"
"""What checks at each checkout; else it does so after 30 s without use."""
FAIL_FAST_AFTER = 1.0
QUERIES_FAST = f"{QUERIES.name}, fail_fast_after={FAIL_FAST_AFTER:g}"
"""What fails at once when the server has refused for so many seconds."""
SOURCE = Path(__file__).with_name("Hikari.java")
JARS = Path("/usr/share/java")
NEEDED = ("HikariCP.jar", "slf4j-api.jar", "slf4j-nop.jar", "postgresql.jar")

CONNECT, WORK = 0.15, 0.002
SETTLED = 2 * CONNECT
"""Seconds after a spike, until which all connections are open that it made a pool want."""
SIZE = 5
"""Connections, all of them open before the database is down."""
PERIOD = 2.0
"""Seconds from one request to the next.  HikariCP checks connections that were idle for half a second."""
PAUSE = 0.05
"""Seconds after an error: it is seen soon that the database is back."""
OUTAGE = 3
"""How long it is down, in timeouts, after a period: then each pool was asked."""
PATIENCE = 60.0
"""Seconds until a pool must have recovered."""


def missing() -> str:
    """Why HikariCP can't take part; empty if it can."""
    java = shutil.which("java")
    if java is None:
        return "not measured: no JVM"
    absent = [name for name in NEEDED if not (JARS / name).exists()]
    if absent:
        return f"not measured: no {JARS / absent[0]}"
    modules = subprocess.run([java, "--list-modules"], stdout=subprocess.PIPE, check=False, text=True)
    return "" if "jdk.compiler" in modules.stdout else "not measured: the JVM has no compiler"


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """The spike, and two ways to be down."""
    with ExitStack() as stack:
        reason = missing()
        jvm = None if reason else stack.enter_context(Jvm())
        absent: dict[str, dict[str, Figure]] = {f"{HIKARI}: {reason}": {}} if reason else {}
        yield spike(jvm, absent, effort)
        try:
            server = stack.enter_context(EmbeddedPostgres())
        except EmbeddedPostgresError as error:
            yield Cell(GROUP, f"a database that is down: not measured: {error}")
            return
        network = stack.enter_context(Network(server.host, server.port))
        stack.enter_context(logs_to_nowhere())
        url = network.url(make_url(server.url()))
        for name, fault in (("nothing comes through", network.blackhole), ("it refuses", network.refuse)):
            yield down(name, fault, network, callers(url, effort.down, jvm), absent, effort.down)


# -- the JVM ----------------------------------------------------------------------------------------


class Jvm:
    """HikariCP in a process of its own, which takes orders as lines."""

    def __init__(self) -> None:
        path = ":".join(str(JARS / name) for name in NEEDED)
        self._process = subprocess.Popen(
            ["java", "-cp", path, str(SOURCE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(self, *words: object) -> str:
        """Have it do something, and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(*words, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the JVM has ended, see above")
        return answer.strip()

    def __enter__(self) -> Jvm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


# -- the spike --------------------------------------------------------------------------------------

Spike = tuple[int, list[float]]
"""How many connections were opened, and how many seconds each request took."""


def spike(jvm: Jvm | None, absent: dict[str, dict[str, Figure]], effort: Effort) -> Cell:
    """50 threads ask at once, where 5 connections are idle and up to 50 are allowed."""
    ways: dict[str, Callable[[], Spike]] = {}
    if jvm is not None:
        ways[HIKARI] = partial(hikari_spike, jvm)
        ways[HIKARI]()  # to load and compile it, as theirs does
    ways.update({each.name: partial(_spike, each) for each in (QUEUE, PSYCOPG_BELOW, QUERIES) if each.there})
    found: dict[str, list[Spike]] = {name: [] for name in ways}
    for _ in range(effort.rounds):
        for name, way in ways.items():
            found[name].append(way())
    cell = Cell(GROUP, "a spike: 50 requests, 5 idle connections, connect 150 ms, work 2 ms")
    cell.figures.update(absent)
    cell.figures.update({name: _spikes(spikes) for name, spikes in found.items()})
    cell.targets.append(Target("connections opened", cell.figures[QUERIES.name]["opened"], at_most=1))
    return cell


def hikari_spike(jvm: Jvm) -> Spike:
    """HikariCP's."""
    milliseconds = (round(seconds * 1000) for seconds in (CONNECT, WORK, SETTLED))
    opened, *nanoseconds = map(int, jvm.order("spike", REQUESTS, IDLE, LIMIT, *milliseconds).split())
    return opened, [each / 1e9 for each in nanoseconds]


def _spike(competitor: Competitor) -> Spike:
    driver = Driver(CONNECT)
    backend = fake(driver.connect)
    with backend.pools(competitor, LIMIT, timeout=30.0) as (pool,):
        for connection in [pool.connect() for _ in range(IDLE)]:
            connection.close()
        before = len(driver.attempts)
        latencies = at_once(pool, backend.work(WORK))
        time.sleep(SETTLED)
        return len(driver.attempts) - before, latencies


def _spikes(spikes: Sequence[Spike]) -> dict[str, Figure]:
    """The p99 is that of the requests of all rounds: one has 50."""
    latencies = sorted(seconds * 1000 for _, each in spikes for seconds in each)
    return {
        "opened": Figure.of(opened for opened, _ in spikes),
        "median, ms": Figure.of(median(each) * 1000 for _, each in spikes),
        "p99, ms": Figure.of([latencies[int(0.99 * len(latencies))]]),
    }


# -- the database is down ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """When one began and ended, in seconds of ``time.time()``, and what came of it."""

    begin: float
    end: float
    served: bool


class Calling(Protocol):
    """Somebody who asks a pool for a connection every now and then, and uses it."""

    def served_since(self, since: float) -> bool:
        """Was a request served since then?"""

    def stop(self) -> list[Request]:
        """End, and return all requests."""


class Caller:
    """One for an engine."""

    def __init__(self, engine: Engine, close: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._close = close
        self._requests: list[Request] = []
        self._ended = threading.Event()
        for connection in [engine.connect() for _ in range(SIZE)]:
            connection.close()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            begin, served = time.time(), False
            with suppress(Exception):  # the pools' own, and the drivers'
                with self._engine.connect() as connection:
                    connection.exec_driver_sql("SELECT 1")
                served = True
            self._requests.append(Request(begin, time.time(), served))
            self._ended.wait(max(0.0, begin + PERIOD - time.time()) if served else PAUSE)

    def served_since(self, since: float) -> bool:
        return any(request.served and request.end >= since for request in list(self._requests))

    def stop(self) -> list[Request]:
        self._ended.set()
        self._thread.join()
        self._engine.dispose()
        self._close()
        return self._requests


class JvmCaller:
    """One for HikariCP."""

    def __init__(self, jvm: Jvm, url: URL, timeout: float) -> None:
        self._jvm = jvm
        milliseconds = (round(seconds * 1000) for seconds in (timeout, PERIOD, PAUSE))
        address = f"jdbc:postgresql://{url.host}:{url.port}/{url.database}"
        jvm.order("call", address, url.username, url.password, SIZE, *milliseconds)

    def served_since(self, since: float) -> bool:
        return self._jvm.order("served", round(since * 1000)) == "true"

    def stop(self) -> list[Request]:
        found = [map(int, request.split(":")) for request in self._jvm.order("stop").split()]
        return [Request(begin / 1000, end / 1000, bool(served)) for begin, end, served in found]


def callers(url: URL, timeout: float, jvm: Jvm | None) -> Iterator[tuple[str, Calling]]:
    """One for each pool, with connections that are checked at the checkout where that can be."""
    if jvm is not None:
        yield HIKARI, JvmCaller(jvm, url, timeout)
    connect = {"connect_timeout": _connect_timeout(timeout)}  # HikariCP states it itself
    queue: dict[str, Any] = {"pool_size": SIZE, "max_overflow": 0, "pool_pre_ping": True}
    yield (
        "QueuePool, pre-ping",
        Caller(create_engine(url, connect_args=connect, pool_timeout=timeout, **queue)),
    )
    if PSYCOPG_BELOW.there:
        yield PSYCOPG_BELOW.name, _psycopg_below(url, timeout, connect)
    for name, more in (
        (QUERIES.name, {}),
        (QUERIES_CHECKED, {"ping_after": 0, "ping_timeout": timeout}),
        (QUERIES_FAST, {"fail_fast_after": FAIL_FAST_AFTER}),
    ):
        ours: dict[str, Any] = {"poolclass": QueriesPool, "max_size": SIZE, "pool_id": secrets.token_hex(8)}
        yield name, Caller(create_engine(url, connect_args=connect, pool_timeout=timeout, **ours, **more))


def _psycopg_below(url: URL, timeout: float, connect: dict[str, int]) -> Caller:
    """As SQLAlchemy's documentation has it, with psycopg_pool's own check."""
    kind = importlib.import_module("psycopg_pool").ConnectionPool
    below = kind(
        url.set(drivername="postgresql").render_as_string(hide_password=False),
        kwargs=connect,
        min_size=SIZE,
        max_size=SIZE,
        timeout=timeout,
        check=kind.check_connection,
        close_returns=True,
        open=True,
    )
    below.wait(PATIENCE)
    engine = create_engine("postgresql+psycopg://", poolclass=NullPool, creator=below.getconn)
    return Caller(engine, below.close)


def down(
    name: str,
    fault: Callable[[], None],
    network: Network,
    calling: Iterator[tuple[str, Calling]],
    absent: dict[str, dict[str, Figure]],
    timeout: float,
) -> Cell:
    """Let the database be down for all of them at once, and be back."""
    pools: dict[str, Calling] = {}
    seconds = PERIOD + OUTAGE * timeout
    try:
        pools.update(calling)
        wait_until_served(pools, time.time())
        fault()
        begin = time.time()
        time.sleep(seconds)
        network.pass_on()
        back = time.time()
        wait_until_served(pools, back)
    finally:
        requests = {pool: caller.stop() for pool, caller in pools.items()}
    cell = Cell(GROUP, f"the database is down for {seconds:g} s, {name}; timeout {timeout:g} s")
    cell.figures.update(absent)
    cell.figures.update({pool: outcome(requests[pool], begin, back) for pool in pools})
    cell.targets.extend(_targets(cell, timeout))
    return cell


def wait_until_served(pools: dict[str, Calling], since: float) -> None:
    """Until each pool has served somebody since then."""
    deadline = time.monotonic() + PATIENCE
    for name, caller in pools.items():
        while not caller.served_since(since):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} has not recovered after {PATIENCE:g} s")
            time.sleep(PAUSE)


def outcome(requests: Sequence[Request], begin: float, back: float) -> dict[str, Figure]:
    """How long the requests of the outage took, and when it was over for this pool."""
    longest = max(request.end - request.begin for request in requests if begin <= request.begin < back)
    served = min(request.end for request in requests if request.served and request.end >= back)
    failed = [request for request in requests if not request.served]
    return {
        "longest request, s": Figure.of([longest]),
        "errors": Figure.of([len(failed)]),
        "recovered after, s": Figure.of([served - back]),
        "errors after it was back": Figure.of([sum(request.end >= back for request in failed)]),
    }


def _targets(cell: Cell, timeout: float) -> Iterator[Target]:
    """A checkout may take the pool's timeout and the driver's, one after the other."""
    longest = cell.figures[QUERIES_CHECKED]["longest request, s"].median
    ratio = Figure.of([longest / (timeout + _connect_timeout(timeout))])
    yield Target("longest request / timeouts of pool and driver", ratio, at_most=1.1)
    for name in (QUERIES.name, QUERIES_CHECKED, QUERIES_FAST):
        recovered = cell.figures[name]["recovered after, s"]
        yield Target(f"{name}: recovered after, s", recovered, at_most=2.0)


def _connect_timeout(timeout: float) -> int:
    """The driver's own, in libpq's whole seconds, of which it takes two at least."""
    return max(2, round(timeout))
