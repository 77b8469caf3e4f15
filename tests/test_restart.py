"""A server that comes back, and 16 threads that shall not notice.

What is claimed: of a checkout that begins while the server is up, neither the checkout nor the first
statement fails, whatever happened to the connections while they were idle.  A statement that is under way
when the server goes fails, with every pool; in the last test, where the threads do not stop for the restart,
such ones are counted by themselves.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
import pytest
from conftest import in_memory, observer
from fakes import SECONDS, Task
from hazards import eventually
from proxy import Proxy
from sqlalchemy import Engine, create_engine

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres

pytestmark = pytest.mark.slow

Session = tuple[int, Any]
THREADS = 16
CHECKOUTS = 200
"""Of a round."""
ROUNDS = 3
WAYS = list(itertools.product(("psycopg2", "psycopg"), ("tcp", "unix", "tls")))
WHO = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"


class Way(NamedTuple):
    """How the threads get to the server."""

    url: str
    proxy: Proxy | None
    name: str


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """One for the module: nobody else minds that it restarts."""
    with EmbeddedPostgres(folder=in_memory()) as server:
        yield server


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest, server: EmbeddedPostgres) -> Iterator[Way]:
    """Each driver through TCP, the unix socket, and TLS, which a proxy speaks."""
    driver, transport = request.param
    if transport != "tls":
        yield Way(server.url(driver, unix=transport == "unix"), None, f"{driver} {transport}")
        return
    with Proxy(server.host, server.port, tls=True) as proxy:
        yield Way(f"{proxy.url(server.url(driver))}?sslmode=require", proxy, f"{driver} {transport}")


@pytest.fixture
def engine(way: Way) -> Iterator[Engine]:
    """As many connections as threads."""
    engine = create_engine(way.url, poolclass=QueriesPool, max_size=THREADS)
    yield engine
    engine.dispose()


def use(engine: Engine) -> Session:
    """One checkout, with a statement: whose session it was."""
    with engine.connect() as connection:
        row = connection.exec_driver_sql(WHO).one()
        return row[0], row[1]


def fill(engine: Engine) -> set[Session]:
    """Have an idle connection for each thread; their sessions."""
    everybody = threading.Barrier(THREADS)

    def hold() -> Session:
        with engine.connect() as connection:
            row = connection.exec_driver_sql(WHO).one()
            everybody.wait(SECONDS)
            return row[0], row[1]

    return {task.result() for task in [Task(hold) for _ in range(THREADS)]}


class Crowd:
    """16 threads that share so many checkouts; what came of them."""

    def __init__(self, engine: Engine, checkouts: int) -> None:
        self._engine = engine
        self._tickets = iter(range(checkouts))
        self._lock = threading.Lock()
        self.done = 0
        self.sessions: set[Session] = set()
        self.errors: list[Exception] = []
        self._start = threading.Barrier(THREADS)
        self._tasks = [Task(self._work) for _ in range(THREADS)]

    def _work(self) -> None:
        self._start.wait(SECONDS)
        while True:
            with self._lock:
                if next(self._tickets, None) is None:
                    return
            try:
                session, error = use(self._engine), None
            except Exception as raised:
                session, error = None, raised
            with self._lock:
                self.done += 1
                if session is not None:
                    self.sessions.add(session)
                if error is not None:
                    self.errors.append(error)

    def finish(self) -> None:
        """Wait until all are done."""
        for task in self._tasks:
            task.result()


def end_the_idle(server: EmbeddedPostgres) -> None:
    """Terminate every idle connection, return when the processes, hence the sockets, are gone."""
    with observer(server) as look:
        sql = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle'"
        processes = [process for process, _ in look.query(sql)]
    assert len(processes) == THREADS
    eventually(lambda: not any(map(psutil.pid_exists, processes)), "the backends end")


EVENTS: dict[str, Callable[[EmbeddedPostgres], None]] = {
    "restart fast": lambda server: server.restart("fast"),
    "restart immediate": lambda server: server.restart("immediate"),
    "terminate the idle": end_the_idle,
}


@pytest.mark.parametrize("event", EVENTS)
def test_no_checkout_surfaces_an_error_and_none_of_the_dead_is_handed_out(
    event: str,
    way: Way,
    engine: Engine,
    server: EmbeddedPostgres,
    eventually: Callable[..., None],
) -> None:
    """16 threads, rounds of 200 checkouts with a statement each; before each round, all that is idle dies.

    All connections are checked in when it happens, and the server is up again when the threads go on.
    """
    checkouts = died = 0
    errors: list[Exception] = []
    handed_out: set[Session] = set()
    for _ in range(ROUNDS):
        dead = fill(engine)
        assert len(dead) == THREADS
        died += len(dead)
        EVENTS[event](server)
        if way.proxy is not None:
            proxy = way.proxy
            eventually(lambda p=proxy: p.connections == 0, "the proxy has passed on the ends")
        crowd = Crowd(engine, CHECKOUTS)
        crowd.finish()
        checkouts += crowd.done
        errors += crowd.errors
        handed_out |= crowd.sessions & dead
    print(
        f"{way.name}, {event} x {ROUNDS}: {died} idle connections died, {checkouts} checkouts, "
        f"{len(errors)} errors, {len(handed_out)} of the dead handed out"
    )
    assert (checkouts, errors, handed_out) == (ROUNDS * CHECKOUTS, [], set())


class Timeline:
    """When the server was up, by numbers that only grow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._restarts = 0
        self._up = True

    def now(self) -> tuple[int, bool]:
        """How many restarts have begun, and whether the server is up."""
        with self._lock:
            return self._restarts, self._up

    def restart(self, restart: Callable[[], None]) -> None:
        """Restart the server."""
        with self._lock:
            self._restarts, self._up = self._restarts + 1, False
        restart()
        with self._lock:
            self._up = True


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restarts_under_load_cost_what_was_under_way_and_nothing_else(
    mode: str,
    way: Way,
    engine: Engine,
    server: EmbeddedPostgres,
    eventually: Callable[..., None],
) -> None:
    """200 checkouts a restart, begun and ended while the server was up, and as many as the restarts run into.

    The threads do not stop for the restarts, which come at moments of chance.  What began before the server
    went, or while it was away, may fail, and is counted by itself.
    """
    seed = int(os.environ.get("SQLA_QUERIES_POOL_SEED") or random.SystemRandom().randrange(2**32))
    chance = random.Random(seed)
    timeline, lock, stop = Timeline(), threading.Lock(), threading.Event()
    up = away = no_connection = no_answer = 0
    errors: list[Exception] = []

    def work() -> None:
        nonlocal up, away, no_connection, no_answer
        while not stop.is_set():
            before = timeline.now()
            error, connected = None, False
            try:
                with engine.connect() as connection:
                    connected = True
                    connection.exec_driver_sql(WHO).one()
            except Exception as raised:
                error = raised
            quiet = before[1] and timeline.now() == before
            with lock:
                if quiet:
                    up += 1
                    errors.extend([error] if error else [])
                else:
                    away += 1
                    no_answer += error is not None and connected
                    no_connection += error is not None and not connected

    def restart() -> None:
        server.restart(mode)
        if way.proxy is not None:
            # An order is obeyed after a round of the proxy's. Three rounds: in one it reads what the servers
            # have said last, in one their ends, and both have been passed on by the last.
            for _ in range(3):
                way.proxy.pass_on()

    fill(engine)
    tasks = [Task(work) for _ in range(THREADS)]
    try:
        for _ in range(ROUNDS):
            more = up + chance.randrange(CHECKOUTS)
            eventually(lambda n=more: up >= n, "checkouts before the restart", SECONDS)
            timeline.restart(restart)
        eventually(lambda: up >= ROUNDS * CHECKOUTS, "all checkouts", SECONDS)
    finally:
        stop.set()
    for task in tasks:
        task.result()
    print(
        f"{way.name}, restart {mode} x {ROUNDS} under load, seed {seed}: {up} checkouts while it was up, "
        f"{len(errors)} errors; {away} met a restart, {no_answer} of them failed in the statement, "
        f"{no_connection} in the checkout"
    )
    assert errors == []
