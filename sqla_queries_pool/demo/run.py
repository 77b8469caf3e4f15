"""The four demonstrations.

Each gives QueuePool and QueriesPool the same work on the same database, and returns what it measured.
All parameters stand in :class:`Parameters`, and are part of the result.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import Engine
from sqlalchemy.pool import Pool, PoolProxiedConnection, QueuePool

from .. import QueriesPool, __version__
from .server import INTERVAL, DemoError, Say, Server
from .workload import Outcome, run, sleep_on_server

QUEUE, QUERIES = "QueuePool", "QueriesPool"
KINDS = (QUEUE, QUERIES)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a run; durations in seconds."""

    seconds: float = 4.0
    """How long each load is measured."""
    threads: int = 40
    work: float = 0.005
    """How long a thread holds a connection: ``SELECT pg_sleep(0.005)``."""
    timeout: float = 1.0
    """The pools' ``timeout`` under load."""
    engines: int = 3
    max_size: int = 8
    """Of each of these engines."""
    connections: int = 4
    """``max_size`` in the measurement of fairness."""
    burst: int = 10
    """``max_size``, and the number of connections in use at the same time."""
    idle_ttl: float = 2.0
    grace: float = 1.0
    """How long after ``idle_ttl`` the remaining connections are counted."""
    holders: tuple[str, ...] = ("web request 17", "nightly report", "import of orders")
    """The threads that exhaust a pool, each with one of its connections."""
    holders_interval: float = 0.2
    """Between the checkout of one holder and that of the next."""
    exhausted_timeout: float = 0.5
    """The ``timeout`` of that pool."""

    def fitted(self, room: int) -> Parameters:
        """Return the parameters for a server that has room for that many connections.

        :raises DemoError: there is too little room.
        """
        max_size = min(self.max_size, room // self.engines)
        burst = min(self.burst, room // len(KINDS))
        if max_size < 2 or burst < 3:
            raise DemoError(
                f"the server has room for {room} more connections of this user, and the demo needs "
                f"{max(2 * self.engines, 3 * len(KINDS))}: close some, or raise max_connections"
            )
        return replace(self, max_size=max_size, burst=burst, connections=min(self.connections, room))


@dataclass(frozen=True)
class Load:
    """The results of a load on one kind of pool; durations in seconds."""

    checkouts_per_second: float
    checkouts_per_second_per_connection: float
    """Divided by ``most_connections``: what the server got done for each connection that it had to keep."""
    fewest_checkouts: int
    """Of one thread, like the median and the most."""
    median_checkouts: float
    most_checkouts: int
    jain: float
    """Jain's index over the checkouts per thread: 1 where all threads have the same."""
    longest_wait: float
    timeouts: int
    connects: int
    """How many connections were opened."""
    most_connections: int
    """The most that were ever seen on the server."""
    looks: int
    """How often the server was asked."""


@dataclass(frozen=True)
class Burst:
    """The connections that remain after a burst; durations in seconds."""

    connections: int
    """On the server, at the peak of the burst."""
    left: int
    """On the server, ``idle_ttl + grace`` later. One of them is in use all the time."""
    seconds_to_one: float | None
    """When the server first had only the one in use, None if never."""
    checkouts_meanwhile: int
    """0: the idle connections were closed although nobody used the pool."""


@dataclass(frozen=True)
class Exhausted:
    """The error of a checkout from an exhausted pool."""

    message: str
    holders_named: int
    """How many of the threads that hold connections it names."""


@dataclass(frozen=True)
class Facts:
    """All measurements, for each kind of pool, and the environment."""

    parameters: Parameters
    environment: dict[str, str | int] = field(default_factory=dict)
    three_engines: dict[str, Load] = field(default_factory=dict)
    fairness: dict[str, Load] = field(default_factory=dict)
    burst: dict[str, Burst] = field(default_factory=dict)
    exhausted: dict[str, Exhausted] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self) | {"summary": summary(self)}


def demonstrate(server: Server, parameters: Parameters, say: Say) -> Facts:
    """Run all four.

    :raises DemoError: the server does not allow it, or was lost.
    """
    try:
        return _demonstrate(server, parameters, say)
    except server.errors as error:
        raise DemoError(f"lost {server}: {server.explain(error)}; try again") from error


def _demonstrate(server: Server, parameters: Parameters, say: Say) -> Facts:
    room = server.room()
    chosen = parameters.fitted(room)
    facts = Facts(chosen, environment(server, room))
    for name in KINDS:
        say(f"{chosen.engines} engines, {chosen.threads} threads: {name}", chosen.seconds)
        facts.three_engines[name] = under_load(server, chosen, name, chosen.engines, chosen.max_size)
    for name in KINDS:
        say(f"fairness, {chosen.threads} threads, {chosen.connections} connections: {name}", chosen.seconds)
        facts.fairness[name] = under_load(server, chosen, name, 1, chosen.connections)
    say(f"a burst of {chosen.burst}, then idle: both", chosen.idle_ttl + chosen.grace)
    facts.burst.update(after_burst(server, chosen))
    for name in KINDS:
        say(f"an exhausted pool: {name}", 1.0)
        facts.exhausted[name] = when_exhausted(server, chosen, name)
    return facts


def environment(server: Server, room: int) -> dict[str, str | int]:
    """Versions, and the database."""
    return {
        "database": str(server),
        "postgresql": server.version,
        "room_for_connections": room,
        "python": platform.python_version(),
        "sqlalchemy": sqlalchemy.__version__,
        "driver": server.driver,
        "sqla_queries_pool": __version__,
    }


def options(name: str, max_size: int, timeout: float, idle_ttl: float) -> dict[str, Any]:
    """The arguments of ``create_engine`` for one kind of pool with this limit.

    QueuePool keeps its default ``pool_size`` and gets the rest as ``max_overflow``. With a larger
    ``pool_size`` it would look worse after a burst, with a smaller one it would reconnect under load.
    """
    if name == QUERIES:
        return {
            "poolclass": QueriesPool,
            "max_size": max_size,
            "idle_ttl": idle_ttl,
            "pool_timeout": timeout,
        }
    kept = min(5, max_size)
    return {
        "poolclass": QueuePool,
        "pool_size": kept,
        "max_overflow": max_size - kept,
        "pool_timeout": timeout,
    }


@contextmanager
def engines(
    server: Server, name: str, max_size: int, timeout: float, idle_ttl: float, number: int = 1
) -> Iterator[list[Engine]]:
    """Some engines with one kind of pool. At the end they are disposed of, and the server has closed all."""
    made = [server.engine(name, **options(name, max_size, timeout, idle_ttl)) for _ in range(number)]
    try:
        yield made
    finally:
        for engine in made:
            engine.dispose()
        server.wait_until_gone(name)


def under_load(server: Server, p: Parameters, name: str, number: int, max_size: int) -> Load:
    """Demonstrations (a) and (b): many threads on a few engines of one URL."""
    with engines(server, name, max_size, p.timeout, p.idle_ttl, number) as made:
        with server.watch(name) as peak:
            pools = [engine.pool for engine in made]
            outcome = run(pools, sleep_on_server(p.work), threads=p.threads, seconds=p.seconds)
        return _load(outcome, peak.most, peak.looks)


def _load(outcome: Outcome, most: int, looks: int) -> Load:
    return Load(
        checkouts_per_second=round(outcome.throughput, 1),
        checkouts_per_second_per_connection=round(outcome.throughput / max(most, 1), 1),
        fewest_checkouts=outcome.fewest,
        median_checkouts=outcome.median,
        most_checkouts=outcome.most,
        jain=round(outcome.jain, 4),
        longest_wait=round(outcome.longest_wait, 4),
        timeouts=outcome.timeouts,
        connects=outcome.connects,
        most_connections=most,
        looks=looks,
    )


def after_burst(server: Server, p: Parameters) -> dict[str, Burst]:
    """Demonstration (c): both pools at once, so that the wait is shared."""
    with ExitStack() as stack:
        made: dict[str, Engine] = {}
        busy = []
        with ExitStack() as idle:
            for name in KINDS:
                [made[name]] = stack.enter_context(engines(server, name, p.burst, p.timeout, p.idle_ttl))
                busy.append(stack.enter_context(closing(made[name].pool.connect())))
                for _ in range(p.burst - 1):
                    idle.enter_context(closing(made[name].pool.connect()))
            height = server.connections()
            meanwhile = {name: _count_checkouts(engine.pool) for name, engine in made.items()}
        to_one, left = _wait_for_idle(server, p, busy)
        return {
            name: Burst(height[name], left[name], to_one.get(name), len(meanwhile[name])) for name in KINDS
        }


def _count_checkouts(pool: Pool) -> list[None]:
    checkouts: list[None] = []

    def checked_out(*_: Any) -> None:
        checkouts.append(None)

    event.listen(pool, "checkout", checked_out)
    return checkouts


def _wait_for_idle(
    server: Server, p: Parameters, busy: list[PoolProxiedConnection]
) -> tuple[dict[str, float], dict[str, int]]:
    """Keep some connections busy. Return when each pool was down to one, and how many it has left."""
    work = sleep_on_server(p.work)
    start = time.monotonic()
    to_one: dict[str, float] = {}
    while (passed := time.monotonic() - start) < p.idle_ttl + p.grace:
        for connection in busy:
            work(connection)
        left = server.connections()
        for name in KINDS:
            if left[name] == 1:
                to_one.setdefault(name, round(passed, 2))
        time.sleep(INTERVAL)
    return to_one, dict(server.connections())


def when_exhausted(server: Server, p: Parameters, name: str) -> Exhausted:
    """Demonstration (d): as many holders as there are connections, and one more checkout."""
    with engines(server, name, len(p.holders), p.exhausted_timeout, p.idle_ttl) as [engine]:
        with _held_by(p, engine.pool):
            try:
                engine.pool.connect().close()
            except exc.TimeoutError as error:
                message = str(error.args[0])
            else:
                raise RuntimeError(f"{engine.pool!r} gave more connections than it has")
        return Exhausted(message, sum(holder in message for holder in p.holders))


@contextmanager
def _held_by(p: Parameters, pool: Pool) -> Iterator[None]:
    """Let each holder check out a connection, one after the other, and hold it meanwhile."""
    enough = threading.Event()
    errors: list[BaseException] = []
    threads = []

    def hold(taken: threading.Event) -> None:
        try:
            with closing(pool.connect()):
                taken.set()
                enough.wait()
        except BaseException as error:
            errors.append(error)
            taken.set()

    try:
        for name in p.holders:
            taken = threading.Event()
            threads.append(threading.Thread(target=hold, args=(taken,), name=name, daemon=True))
            threads[-1].start()
            taken.wait()
            if errors:
                raise errors[0]
            enough.wait(p.holders_interval)
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def summary(facts: Facts) -> list[str]:
    """Two sentences. They state only what the figures of this run show."""
    return [_about_limits(facts), _about_fairness(facts)]


def _about_limits(facts: Facts) -> str:
    p = facts.parameters
    theirs, ours = facts.three_engines[QUEUE], facts.three_engines[QUERIES]
    before, after = facts.burst[QUEUE], facts.burst[QUERIES]
    most = f"{p.engines} engines with max_size {p.max_size} had {ours.most_connections} connections at most"
    shrunk = f"{p.idle_ttl + p.grace:g} s after a burst {after.left} of {after.connections} were open"
    if ours.most_connections < theirs.most_connections and after.left < before.left:
        return (
            f"QueriesPool: {most} (QueuePool {theirs.most_connections}), "
            f"and {shrunk} (QueuePool {before.left} of {before.connections})."
        )
    return f"This run shows no advantage of QueriesPool in connections: {most}, and {shrunk}."


def _about_fairness(facts: Facts) -> str:
    theirs, ours = facts.fairness[QUEUE], facts.fairness[QUERIES]
    spread = f"{ours.fewest_checkouts} to {ours.most_checkouts} checkouts per thread"
    waited = f"longest wait {ours.longest_wait * 1000:,.0f} ms"
    ratio = ours.checkouts_per_second / max(theirs.checkouts_per_second, 0.1)
    rate = f"{ratio:.2f} times QueuePool's throughput"
    if ours.jain > theirs.jain and ours.longest_wait < theirs.longest_wait:
        return (
            f"QueriesPool: {spread}, {waited} (QueuePool {theirs.fewest_checkouts} to "
            f"{theirs.most_checkouts}, {theirs.longest_wait * 1000:,.0f} ms), at {rate}."
        )
    return f"This run shows no advantage of QueriesPool in fairness: {spread}, {waited}, {rate}."
