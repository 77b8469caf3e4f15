"""Idle connections close by themselves, and who sees to it."""

from __future__ import annotations

import _thread
import itertools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import inside
import pytest
from fakes import FakeClock
from hazards import Handle, Thread, assert_whole, new_pid, new_pool, pool_of
from sqlalchemy import Engine, create_engine, event, make_url, text

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.budget import ages
from sqla_queries_pool.concurrency.housekeeping import Housekeeper, Worker

Eventually = Callable[..., None]
NEVER = None


@pytest.fixture
def new_engine(pg_url: str) -> Iterator[Callable[..., Engine]]:
    """Make engines of the test's database, each with an `application_name`."""
    engines: list[Engine] = []

    def new(name: str = "engine", **kw: Any) -> Engine:
        arguments = {"application_name": name}
        engines.append(create_engine(pg_url, poolclass=QueriesPool, connect_args=arguments, **kw))
        return engines[-1]

    yield new
    for engine in engines:
        engine.dispose()


def backends(observer: Any, url: str) -> dict[str, int]:
    """How many client backends the test's database has, by `application_name`."""
    sql = (
        "SELECT application_name, count(*) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND datname = %s GROUP BY 1"
    )
    return dict(observer.query(sql, make_url(url).database))


# -- on a server ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_burst_shrinks_within_a_second_after_the_idle_ttl_although_one_stays_busy(
    new_engine: Callable[..., Engine], pg_url: str, pg_observer: Any
) -> None:
    """9 of 10 connections leave `pg_stat_activity` by themselves: not before their time, not after."""
    engine = new_engine(max_size=10, idle_ttl=1.0)
    connections = [engine.connect() for _ in range(10)]
    checkouts: list[object] = []
    event.listen(engine, "checkout", lambda *_: checkouts.append(None))
    busy = connections.pop()
    working = Thread(busy.execute, text("SELECT pg_sleep(1.5)"))
    first_closed = time.monotonic()
    for connection in connections:
        connection.close()
    last_closed = time.monotonic()
    first_gone = math.inf
    while (left := backends(pg_observer, pg_url)["engine"]) > 1:
        now = time.monotonic()
        if left < 10:
            first_gone = min(first_gone, now)
        assert now < last_closed + 30.0
        time.sleep(0.01)
    all_gone = time.monotonic()
    assert not checkouts
    assert first_gone - first_closed >= 1.0
    assert all_gone - last_closed <= 10.0  # 2 s, and more for a busy machine
    working.join()
    assert busy.execute(text("SELECT 1")).scalar() == 1
    busy.close()


@pytest.mark.slow
def test_a_burst_shrinks_although_the_engine_is_in_use(
    new_engine: Callable[..., Engine], pg_url: str, pg_observer: Any, eventually: Eventually
) -> None:
    """The connection that was returned last is used first, so that those not needed age out."""
    engine = new_engine(max_size=5, idle_ttl=0.5)
    for connection in [engine.connect() for _ in range(5)]:
        connection.close()
    enough = threading.Event()

    def use() -> None:
        while not enough.is_set():
            with engine.connect() as connection:
                connection.execute(text("SELECT pg_sleep(0.02)"))

    using = Thread(use)
    eventually(lambda: backends(pg_observer, pg_url) == {"engine": 1}, "one connection is left")
    enough.set()
    using.join()


@pytest.mark.slow
def test_each_engine_of_a_pool_has_its_own_idle_ttl(
    new_engine: Callable[..., Engine], pg_url: str, pg_observer: Any, eventually: Eventually
) -> None:
    """Their connections follow it, until `set_idle_ttl` overrules it for all; the last is closed, too."""
    engines = [
        new_engine("short", max_size=6, idle_ttl=0.3),
        new_engine("long", max_size=6, idle_ttl=60.0),
        new_engine("never", max_size=6, idle_ttl=NEVER),
    ]
    connections = [engine.connect() for engine in engines for _ in range(2)]
    assert backends(pg_observer, pg_url) == {"short": 2, "long": 2, "never": 2}
    for connection in connections:
        connection.close()
    eventually(lambda: "short" not in backends(pg_observer, pg_url), "the short-lived ones are gone")
    assert backends(pg_observer, pg_url) == {"long": 2, "never": 2}
    assert pool_of(engines[0]).checkedin() == 0
    pid = pool_of(engines[0]).pid
    PoolManager.set_idle_ttl(pid, 0.2)
    eventually(lambda: backends(pg_observer, pg_url) == {}, "all are gone")
    eventually(lambda: PoolManager.size(pid) == 0, "their slots are free")
    for engine in engines:
        with engine.connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1


# -- with a clock of one's own ----------------------------------------------------------------------


def pool_with_clock(clock: FakeClock, **kw: Any) -> QueriesPool:
    """A pool whose time is the test's."""
    pid = new_pid()
    PoolManager.create(pid, idle_ttl=kw.get("idle_ttl", 60), max_size=8, time_method=clock)
    ages.set_ttl(inside.ledger(inside.pools()[pid]), None, clock())  # each engine has its own
    return new_pool(pid, max_size=4, **kw)


def test_without_an_idle_ttl_nothing_ever_closes(eventually: Eventually) -> None:
    """`idle_ttl=None` is for ever, and asks nobody to look."""
    clock = FakeClock()
    pool = pool_with_clock(clock, idle_ttl=NEVER)
    shared = inside.shared(pool)
    assert inside.ledger(shared).due == math.inf
    pool.connect().close()
    assert inside.ledger(shared).due == math.inf
    clock.now = 1e9
    inside.upkeep(shared).sweep()
    shared.clean()
    assert pool.checkedin() == 1
    assert_whole(pool, eventually)


def test_an_idle_connection_is_closed_at_its_idle_ttl_and_not_before(eventually: Eventually) -> None:
    """To the second, each connection since it was returned itself."""
    clock = FakeClock()
    pool = pool_with_clock(clock, idle_ttl=60.0)
    first, second = pool.connect(), pool.connect()
    first.close()
    clock.now = 1.0
    second.close()
    for now, left in [(59.0, 2), (60.0, 1), (60.5, 1), (61.0, 0)]:
        clock.now = now
        inside.upkeep(pool).sweep()
        assert pool.checkedin() == left
    assert_whole(pool, eventually)


def test_an_idle_ttl_can_be_set_at_run_time(eventually: Eventually) -> None:
    """What is over the new one closes at once; `None` keeps the rest; then each engine has its own."""
    clock = FakeClock()
    pool = pool_with_clock(clock, idle_ttl=60.0)
    shared = inside.shared(pool)
    first, second = pool.connect(), pool.connect()
    first.close()
    clock.now = 30.0
    second.close()
    PoolManager.set_idle_ttl(pool.pid, 20)
    assert pool.checkedin() == 1
    PoolManager.set_idle_ttl(pool.pid, None)
    clock.now = 1e6
    inside.upkeep(shared).sweep()
    assert pool.checkedin() == 1
    inside.unset(shared)
    assert pool.checkedin() == 0
    assert_whole(pool, eventually)


def test_what_was_added_by_hand_follows_the_idle_ttl_of_an_engine_that_comes_later(
    eventually: Eventually,
) -> None:
    """Nobody has to call anything after the engine was made."""
    slow = new_pool(idle_ttl=60.0)
    handle = Handle()
    PoolManager.add(slow.pid, handle)
    fast = new_pool(slow.pid, idle_ttl=0.1)
    eventually(lambda: handle.closed, "it was closed")
    assert_whole(fast, eventually)


# -- the housekeeper --------------------------------------------------------------------------------


def kill(housekeeper: Housekeeper, eventually: Eventually) -> object:
    """Have the thread die in the middle of its work.  Keep the result: its death would be mail."""

    class Deadly:
        swept = False

        def sweep(self) -> None:
            self.swept = True
            raise SystemExit

        def neglected(self) -> None:
            pass

    deadly = Deadly()
    housekeeper.schedule(deadly, 0.0)
    eventually(lambda: deadly.swept and not inside.thread_runs(housekeeper), "it died")
    return deadly


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_housekeeper_that_died_is_started_again_by_the_next_checkout(
    when: str, eventually: Eventually
) -> None:
    """Whether the checkout comes before or after something was due: idle connections close in the end."""
    pool = new_pool(idle_ttl=0.5)
    housekeeper = Housekeeper()  # which knows of no other test's pools
    inside.set_housekeeper(housekeeper, pool)
    for fairy in [pool.connect(), pool.connect()]:
        fairy.close()
    deadly = kill(housekeeper, eventually)
    if when == "after":
        eventually(lambda: inside.now(pool) > inside.ledger(pool).due, "something is overdue")
    pool.connect().close()
    eventually(lambda: pool.checkedin() == 0, "all are closed")
    del deadly


SCRIPT = """
import sys, threading, time
from sqlalchemy import create_engine, text
from sqla_queries_pool import PoolManager, QueriesPool

def engine(idle_ttl, **options):
    # The server would be asked for its limits a second later: something else that is due.
    options |= {"idle_ttl": idle_ttl, "check_limits": False}
    return create_engine(sys.argv[1], poolclass=QueriesPool, max_size=5, **options)

def threads():
    return [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]

def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, threads()
        time.sleep(0.005)

"""


def run(script: str, url: str, seconds: float) -> None:
    """Run a program; it ends in time, without an error, and says nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + script, url],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.mark.slow
def test_there_is_a_thread_only_while_something_can_expire(pg_url: str) -> None:
    """None before the first check-in, none without an `idle_ttl`; it ends with the last connection."""
    script = """
started, start = [], threading.Thread.start

def noted(thread):
    started.append(thread.name)  # it may have ended before it can be seen
    start(thread)

threading.Thread.start = noted
never = engine(None)
never.connect().close()
short = engine(0.3)
assert (threads(), started) == ([], []), started
connection = short.connect()
connection.execute(text("SELECT 1"))
assert (threads(), started) == ([], []), started
for _ in range(2):
    connection.close()
    eventually(lambda: short.pool.checkedin() == 0)
    eventually(lambda: threads() == [])
    assert "sqla_queries_pool housekeeper" in started, started
    assert never.pool.checkedin() == 1
    connection = short.connect()
"""
    run(script, pg_url, 60.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        pytest.param("connection.close(); eventually(threads)", id="idle"),
        pytest.param("other.close(); eventually(threads)", id="one is out"),
        pytest.param(
            "connection.close(); other.close(); one.dispose(); one.connect().close()", id="disposed"
        ),
        pytest.param("connection.close(); PoolManager.set_idle_ttl(one.pool.pid, 0.001)", id="expiring"),
        pytest.param(
            "for _ in range(3): one.connect().detach()\n"
            "threading.Thread(target=one.connect, daemon=True).start()\n"
            "connections = [one.connect() for _ in range(3)]",
            id="all are out",
        ),
    ],
)
def test_the_exit_of_the_interpreter_is_not_delayed(script: str, pg_url: str) -> None:
    """A program that has connections with an `idle_ttl` of an hour exits at once, and silently."""
    before = "one = engine(3600)\nconnection, other = one.connect(), one.connect()\n"
    run(before + script, pg_url, 60.0)


@pytest.mark.slow  # it follows each step of Python itself
def test_a_second_interrupt_right_after_the_first_keeps_no_thread_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one comes when the thread has been started, the second one at each step after that."""
    start = _thread.start_new_thread
    steps, interrupt_at = 0, 0

    def start_and_interrupt(*arguments: Any) -> None:
        start(*arguments)
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace
        raise KeyboardInterrupt

    def trace(frame: FrameType, what: str, _: object) -> Any:
        nonlocal steps
        if what != "exception":
            steps += 1
            if steps == interrupt_at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def submit(worker: Worker) -> None:
        try:
            worker.submit(lambda: None)
        finally:
            sys.settrace(None)

    for interrupt_at in itertools.count(1):
        worker, steps, done = Worker("a test's"), 0, threading.Event()
        with monkeypatch.context() as patched:
            patched.setattr(_thread, "start_new_thread", start_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                submit(worker)
        worker.submit(done.set)
        assert done.wait(20), f"after step {interrupt_at}"
        if steps < interrupt_at:
            break
    assert interrupt_at > 3, "nothing was interrupted"
