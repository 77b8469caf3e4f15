"""Attacks on a pool with a PostgreSQL server, each with what must hold.

Others have files of their own: restarts (test_restart.py), a network that breaks (test_liveness.py), a server
that is full (test_connect_errors.py), and all of it at random (test_soak.py).
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import inside
import psutil
import pytest
from conftest import Observer, in_memory
from fakes import SECONDS, Task
from hazards import assert_whole, pool_of
from sqlalchemy import Engine, create_engine, exc, make_url, text

from sqla_queries_pool import CheckoutTimeout, QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres

Eventually = Callable[..., None]
CROWD = 2000


@pytest.fixture
def new_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines that are disposed in the end."""
    with ExitStack() as stack:

        def make(url: Any, **settings: Any) -> Engine:
            engine = create_engine(url, poolclass=QueriesPool, **{"pool_timeout": 20, **settings})
            stack.callback(engine.dispose)
            return engine

        yield make


NewEngine = Callable[..., Engine]


def backend(connection: Any) -> int:
    """Which process of the server serves a connection."""
    return int(connection.scalar(text("SELECT pg_backend_pid()")))


def use(engine: Engine) -> int:
    """One checkout with a statement."""
    with engine.connect() as connection:
        return backend(connection)


# -- 200,000 checkouts -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.exhaustive
def test_200_000_checkouts_leave_nothing_behind(
    new_engine: NewEngine, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """Neither objects nor memory, descriptors, threads or backends, whatever became of the checkouts.

    One for each thousand checkouts would be 200.  Without an idle TTL, since what reminds of it stays for so
    long.  The texts of the last timeouts, which are kept, have some blocks more or less, and more on a busy
    machine; what leaks does so each time.
    """
    engine, hasty = (
        new_engine(pg_url, max_size=3, idle_ttl=None, pool_timeout=timeout) for timeout in (20, 0)
    )
    database = make_url(pg_url).database or ""

    def work(checkouts: int) -> None:
        for number in range(checkouts):
            connection = engine.raw_connection()
            if number % 2000 == 0:
                connection.invalidate()
            connection.close()
            if number % 500 == 0:
                with suppress(CheckoutTimeout):
                    hasty.raw_connection().close()
            if number % 10_000 == 0:
                engine.dispose()

    def crowd(checkouts: int) -> None:
        for task in [Task(lambda: work(checkouts // 4)) for _ in range(4)]:
            task.join(120)
            task.result()

    def what_there_is() -> Counter[str]:
        eventually(lambda: inside.shared(engine).numbers.closing == 0, "all is closed")
        with ExitStack() as stack:  # as many connections each time, no more and no less
            for _ in range(3):
                stack.enter_context(engine.connect())
        gc.collect()
        gc.collect()
        return Counter(
            blocks=sys.getallocatedblocks(),
            objects=len(gc.get_objects()),
            descriptors=psutil.Process().num_fds(),
            threads=threading.active_count(),
            backends=pg_observer.backends(database),
        )

    crowd(40_000)
    after = what_there_is()
    for _ in range(3):
        before = after
        crowd(200_000)
        after = what_there_is()
        print(before, after)
        more = {what: after[what] - before[what] for what in after}
        assert (more["descriptors"], more["threads"], more["backends"]) == (0, 0, 0)
        if more["objects"] < 200 and more["blocks"] < 1000:
            break
    assert more["objects"] < 200
    assert more["blocks"] < 1000
    assert_whole(pool_of(engine), eventually)


# -- 2,000 waiters -----------------------------------------------------------------------------------


@contextmanager
def small_stacks() -> Iterator[None]:
    """Threads that begin in here take little of the address space."""
    before = threading.stack_size(256 * 1024)
    try:
        yield
    finally:
        threading.stack_size(before)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_2_000_waiters_are_served_in_order(
    new_engine: NewEngine, pg_url: str, eventually: Eventually
) -> None:
    """Each once, by the one connection that there is, and nobody in vain."""
    engine = new_engine(pg_url, max_size=1, pool_timeout=60)
    held = engine.raw_connection()
    served: list[int] = []

    def wait() -> None:
        connection = engine.raw_connection()
        served.append(threading.get_ident())
        connection.close()

    with small_stacks():
        tasks = [Task(wait) for _ in range(CROWD)]
    eventually(lambda: inside.shared(engine).numbers.waiting == CROWD, "all of them wait", 60)
    order = [waiter.holder.ident for waiter in inside.waiters(engine)]
    held.close()
    for task in tasks:
        task.result()
    assert served == order
    statistics = inside.shared(engine).statistics()
    assert (statistics.waits, statistics.timeouts, statistics.connects) == (CROWD, 0, 1)
    assert_whole(pool_of(engine), eventually)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_2_000_waiters_that_get_nothing_end_in_time(
    new_engine: NewEngine, pg_url: str, eventually: Eventually
) -> None:
    """Each with an error that says who has the connection; then all is as before."""
    engine = new_engine(pg_url, max_size=1, pool_timeout=4)
    held = engine.raw_connection()
    took: list[float] = []

    def wait() -> str:
        began = time.monotonic()
        with pytest.raises(CheckoutTimeout) as caught:
            engine.raw_connection()
        took.append(time.monotonic() - began)
        return str(caught.value)

    with small_stacks():
        tasks = [Task(wait) for _ in range(CROWD)]
    # On a busy machine the first have given up before the last has come.
    eventually(lambda: inside.shared(engine).numbers.waiting + len(took) == CROWD, "all have come", 60)
    for task in tasks:
        task.join(120)
    said = [task.result() for task in tasks]
    assert all("MainThread" in words for words in said)
    print(f"{min(took):.2f} s to {max(took):.2f} s")
    assert min(took) >= 4
    held.close()
    assert_whole(pool_of(engine), eventually)


# -- SIGSTOP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server that may be stopped."""
    with EmbeddedPostgres({}, in_memory()) as server:
        yield server


@contextmanager
def frozen(*processes: int) -> Iterator[None]:
    """Stop processes, and let them go on."""
    try:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


class Crowd:
    """Twelve threads that use an engine over and over until they are told to stop."""

    def __init__(self, engine: Engine) -> None:
        self.done: Counter[int] = Counter()
        self.backends: set[int] = set()
        self._seen = -1, 0.0
        self._stop = threading.Event()

        def work(number: int) -> None:
            while not self._stop.is_set():
                self.backends.add(use(engine))
                self.done[number] += 1

        self._tasks = [Task(lambda number=number: work(number)) for number in range(12)]  # type: ignore[misc]

    def gets_on(self, eventually: Eventually, rounds: int = 5) -> None:
        """Wait until each of them was served so often again."""
        before = self.done.copy()
        eventually(lambda: all(self.done[n] >= before[n] + rounds for n in range(12)), "all get on")

    def stands(self) -> bool:
        """Has nobody been served for half a second?  Answers that were under way have come by then."""
        done = sum(self.done.values())
        if done != self._seen[0]:
            self._seen = done, time.monotonic()
        return time.monotonic() - self._seen[1] > 0.5

    def stop(self) -> None:
        """End it; what a thread has raised is raised here."""
        self._stop.set()
        for task in self._tasks:
            task.result()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_server_that_stands_still_costs_its_time_and_nothing_else(
    own_server: EmbeddedPostgres, new_engine: NewEngine, eventually: Eventually
) -> None:
    """No error, no connection closed or opened, when it goes on; and meanwhile a timeout is kept."""
    engine = new_engine(own_server.url(), max_size=4)
    hasty = new_engine(own_server.url(), max_size=4, pool_timeout=0.5)
    use(hasty)
    hasty.dispose()
    crowd = Crowd(engine)
    crowd.gets_on(eventually)
    eventually(lambda: len(crowd.backends) == 4, "all connections were used")
    postmaster = psutil.Process(own_server.pid)
    with frozen(postmaster.pid, *(child.pid for child in postmaster.children(recursive=True))):
        eventually(crowd.stands, "what is returned now would be the hasty one's, which would connect")
        assert inside.shared(engine).numbers.waiting == 8, "four have a connection"
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(CheckoutTimeout):
                hasty.connect()
            assert 0.5 <= time.monotonic() - began < SECONDS
    crowd.gets_on(eventually)
    crowd.stop()
    statistics = inside.shared(engine).statistics()
    assert len(crowd.backends) == 4
    assert (statistics.dead, statistics.connect_errors, statistics.timeouts) == (0, 0, 3)
    assert statistics.connects == 5
    assert_whole(pool_of(engine), eventually)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_backend_that_stands_still_delays_its_holder_alone(
    own_server: EmbeddedPostgres, new_engine: NewEngine, eventually: Eventually
) -> None:
    """The others share what is left, and the holder gets its answer when the backend goes on."""
    engine = new_engine(own_server.url(), max_size=4)
    with engine.connect() as connection:
        stuck = backend(connection)
        with frozen(stuck):
            answer = Task(lambda: backend(connection))
            crowd = Crowd(engine)
            crowd.gets_on(eventually, 20)
            crowd.stop()
            assert len(crowd.backends) <= 3
            assert stuck not in crowd.backends
            assert answer.is_alive()
        assert answer.result() == stuck
    assert_whole(pool_of(engine), eventually)


# -- what the administrator does ---------------------------------------------------------------------


@pytest.fixture
def role(pg_url: str, pg_observer: Observer) -> Iterator[str]:
    """A role that may connect six times."""
    name = f"attacked_{make_url(pg_url).database}"
    pg_observer.query(f"CREATE ROLE {name} LOGIN PASSWORD 'secret' CONNECTION LIMIT 6")
    yield name
    end_sessions(pg_observer, name)
    pg_observer.query(f"DROP ROLE {name}")


def end_sessions(observer: Observer, role: str) -> None:
    """Terminate all of a role, return when they are gone."""
    observer.query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", role)


def all_at_once(engine: Engine, number: int) -> None:
    """So many threads have a connection each at the same time."""
    everybody = threading.Barrier(number)

    def hold() -> None:
        with engine.connect():
            everybody.wait(20)

    for task in [Task(hold) for _ in range(number)]:
        task.result()


def test_a_role_limit_that_is_lowered_makes_callers_wait_and_no_errors(
    role: str, new_engine: NewEngine, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """They share what the server still allows; when it allows more again, the pool has more again."""
    url = make_url(pg_url).set(username=role, password="secret")
    engine = new_engine(url, max_size=6)
    all_at_once(engine, 6)
    pg_observer.query(f"ALTER ROLE {role} CONNECTION LIMIT 2")
    end_sessions(pg_observer, role)
    crowd = Crowd(engine)
    crowd.gets_on(eventually)
    assert len(crowd.backends) == 2
    crowd.stop()
    statistics = inside.shared(engine).statistics()
    assert statistics.connect_errors > 0
    assert (statistics.timeouts, statistics.mended, statistics.open) == (0, 0, 2)
    pg_observer.query(f"ALTER ROLE {role} CONNECTION LIMIT 6")
    all_at_once(engine, 6)
    assert_whole(pool_of(engine), eventually)


_databases = itertools.count(1)


def test_a_database_that_is_dropped_and_made_again_is_used_again(
    new_engine: NewEngine, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """While it is missing, checkouts get the driver's error at once; then all get new connections."""
    name = f"{make_url(pg_url).database}_again_{next(_databases)}"
    pg_observer.query(f"CREATE DATABASE {name}")
    engine = new_engine(make_url(pg_url).set(database=name), max_size=3)
    all_at_once(engine, 3)
    held = engine.connect()
    try:
        pg_observer.query(f"DROP DATABASE {name} WITH (FORCE)")
        with pytest.raises(exc.OperationalError) as ended:
            backend(held)
        assert ended.value.connection_invalidated
        held.close()
        for _ in range(5):
            began = time.monotonic()
            with pytest.raises(exc.OperationalError, match=f'database "{name}" does not exist'):
                engine.connect()
            assert time.monotonic() - began < SECONDS  # the engine's timeout is longer
        pg_observer.query(f"CREATE DATABASE {name}")
        all_at_once(engine, 3)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT current_database()")) == name
        assert pg_observer.backends(name) == 3
        assert_whole(pool_of(engine), eventually)
    finally:
        pg_observer.query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def test_held_backends_that_are_terminated_cost_their_holders_an_error_and_waiters_none(
    new_engine: NewEngine, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """Each holder gets one error and gives its slot back; each waiter gets a new connection."""
    engine = new_engine(pg_url, max_size=4)
    held = [engine.connect() for _ in range(4)]
    old = {backend(connection) for connection in held}
    waiting = [Task(lambda: use(engine)) for _ in range(8)]
    eventually(lambda: inside.shared(engine).numbers.waiting == 8, "eight wait")
    assert pg_observer.terminate(make_url(pg_url).database or "") == 4
    for connection in held:
        with pytest.raises(exc.OperationalError) as ended:
            backend(connection)
        assert ended.value.connection_invalidated
        connection.close()
    new = {task.result() for task in waiting}
    assert not new & old
    assert pg_observer.backends(make_url(pg_url).database or "") <= 4
    statistics = inside.shared(engine).statistics()
    assert (statistics.connect_errors, statistics.mended) == (0, 0)
    assert_whole(pool_of(engine), eventually)
