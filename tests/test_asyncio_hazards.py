"""What has broken engines of asyncio, or nearly so: loops that stop or end halfway, cancellation, garbage."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import inside
import pytest
import sqlalchemy
from conftest import Observer
from hazards import DEADLINE, Ring, Stop, Thread, eventually
from sqlalchemy import event, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import concurrency
from test_asyncio import (
    Make,
    all_out,
    driver,
    make,
    name_of,
    pool_of,
    self_test,
    soon,
    threads_engine,
    url_of,
)

from sqla_queries_pool import CheckoutTimeout, QueriesPool

__all__ = ["driver", "make"]  # fixtures
SEED = int(os.environ.get("SQLA_QUERIES_POOL_SEED") or random.SystemRandom().randrange(2**32))


def ended(loop: asyncio.AbstractEventLoop) -> None:
    """End a loop as ``asyncio.run()`` does."""
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def opening_stops(engine: AsyncEngine, number: int) -> tuple[threading.Event, asyncio.Event]:
    """Have the opening of the n-th connection stop: set when it does, and what it waits for then."""
    stopped, go_on, opened = threading.Event(), asyncio.Event(), []

    @event.listens_for(engine.sync_engine, "connect")
    def listen(connection: Any, _: Any) -> None:
        opened.append(connection)
        if len(opened) == number:
            stopped.set()
            connection.run_async(lambda _: go_on.wait())

    return stopped, go_on


# -- loops -----------------------------------------------------------------------------------------------


def test_a_loop_that_stops_while_it_opens_the_first_connection_holds_no_other_up(make: Make) -> None:
    """The other loop's checkout has its timeout, and is told who opens."""
    tasks = make(pool_timeout=0.2)
    loop = asyncio.new_event_loop()
    stopped, go_on = opening_stops(tasks, 1)

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(self_test(tasks), name="the first")
        await soon(stopped.is_set, "it opens")
        return task

    first = loop.run_until_complete(begin())
    with pytest.raises(CheckoutTimeout, match="'the first'"):
        Thread(asyncio.run, self_test(tasks)).join()
    go_on.set()
    loop.run_until_complete(first)
    ended(loop)
    asyncio.run(self_test(tasks))


def test_a_failed_opening_lets_no_other_loop_open_the_first_connection_too(make: Make) -> None:
    """Two of one loop are under way: while one is, other loops wait."""
    tasks = make()
    stopped, go_on = opening_stops(tasks, 1)
    other_waits = threading.Event()

    async def other() -> None:
        other_waits.set()
        await self_test(tasks)

    async def main() -> None:
        first = asyncio.create_task(self_test(tasks))
        await soon(stopped.is_set, "it opens")

        @event.listens_for(tasks.sync_engine, "do_connect")
        def fail(*_: Any) -> None:
            raise ValueError("no token")

        with pytest.raises(ValueError, match="no token"):
            await self_test(tasks)
        event.remove(tasks.sync_engine, "do_connect", fail)
        thread = Thread(asyncio.run, other())
        await soon(other_waits.is_set)
        await soon(lambda: pool_of(tasks).statistics().opening == 2, "the other one is about to")
        await asyncio.sleep(0.02)  # it would connect in this time
        assert pool_of(tasks).statistics().connects == 1
        assert thread.alive
        go_on.set()
        await first
        await asyncio.to_thread(thread.join)

    asyncio.run(main())


def test_two_loops_one_after_the_other_open_their_first_connections_together(make: Make) -> None:
    """SQLAlchemy's lock for the first one is that of the loop in which somebody waited for it first."""
    tasks, fails = make(), [True]
    connected: list[Any] = []

    @event.listens_for(tasks.sync_engine, "do_connect")
    def connect(dialect: Any, _: Any, arguments: Any, options: Any) -> Any:
        connected.append(dialect.connect(*arguments, **options))
        return connected[-1]

    @event.listens_for(tasks.sync_engine, "connect")
    def listen(connection: Any, _: Any) -> None:
        if connection is connected[0]:
            connection.run_async(lambda _: soon(lambda: len(connected) == 2, "the other one waits for it"))
        if fails:
            raise ValueError("not today")

    async def main() -> list[Any]:
        return [*await asyncio.gather(self_test(tasks), self_test(tasks), return_exceptions=True)]

    assert [str(error) for error in asyncio.run(main())] == ["not today", "not today"]
    fails.clear()
    connected.clear()
    assert asyncio.run(main()) == [None, None]


def test_a_loop_that_is_closed_while_it_opens_the_first_connection_holds_no_other_up(make: Make) -> None:
    """Nobody waits for the end of what never ends."""
    tasks = make()
    loop = asyncio.new_event_loop()
    stopped, _ = opening_stops(tasks, 1)

    async def begin() -> None:
        task = asyncio.create_task(self_test(tasks))
        await soon(stopped.is_set, "it opens")
        task.cancel()
        await asyncio.wait({task})

    loop.run_until_complete(begin())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()
        Thread(asyncio.run, self_test(tasks)).join()
        gc.collect()


def test_a_loop_that_stops_while_it_renews_holds_no_other_renewal_up_for_long(
    make: Make, pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is renewed at a time, but none for ever."""
    inside.renew_for(monkeypatch, 0.05)
    tasks = make()
    loop = asyncio.new_event_loop()
    stopped, go_on = opening_stops(tasks, 2)

    async def begin() -> None:
        await self_test(tasks)
        pool_of(tasks).expire(rolling=True)
        await soon(stopped.is_set, "it is renewed")

    loop.run_until_complete(begin())
    with threads_engine(pg_url) as threads:
        threads.connect().close()
        before = pool_of(threads).statistics().connects
        pool_of(threads).expire(rolling=True)
        eventually(lambda: pool_of(threads).statistics().connects == before + 1, "the thread's is renewed")
    go_on.set()
    loop.run_until_complete(asyncio.sleep(0))
    ended(loop)


def test_what_an_ended_loop_had_is_no_other_loops_before_the_pool_knows(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """Where another thread is inside, the pool hears of it in a letter; till then it has its idle ones."""
    tasks = make()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(self_test(tasks))
    stop = Stop()
    thread = Thread(lambda: inside.decide(pool_of(tasks), stop.here))
    stop.reached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()

    async def main() -> None:
        threading.Timer(0.05, stop.go).start()  # a new attachment takes the pool's lock
        assert not inside.attachment_here(pool_of(tasks)).idle
        async with all_out(tasks):
            thread.join()
            await soon(lambda: pool_of(tasks).statistics().open == 4, "the ended loop's are gone")
            await soon(lambda: pg_observer.backends(name_of(pg_url)) == 4)

    asyncio.run(main())


def test_a_loop_that_is_closed_while_an_opening_goes_on_is_collected_with_its_socket(driver: str) -> None:
    """The checkout was cancelled, as by ``asyncio.wait_for``: the opening is nobody's but the pool's."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.setblocking(False)
        url = f"postgresql+{driver}://me@127.0.0.1:{mute.getsockname()[1]}/mute"
        tasks = create_async_engine(url, poolclass=QueriesPool)
        loop = asyncio.new_event_loop()

        async def begin() -> socket.socket:
            loop = asyncio.get_running_loop()
            task = asyncio.ensure_future(tasks.connect().start())
            theirs, _ = await loop.sock_accept(mute)
            await loop.sock_recv(theirs, 1)
            task.cancel()
            await asyncio.wait({task})
            return theirs

        theirs, gone = loop.run_until_complete(begin()), weakref.ref(loop)
        with warnings.catch_warnings(), theirs:
            warnings.simplefilter("ignore", ResourceWarning)
            loop.close()
            del loop
            gc.collect()
            assert gone() is None
            theirs.settimeout(DEADLINE)
            while theirs.recv(1000):
                """What it had sent; then the end."""
        assert pool_of(tasks).statistics().open == 0


def test_a_loop_that_is_closed_while_it_renews_a_connection_logs_nothing(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver complains that the loop is closed, which is nobody's business any more."""
    tasks = make()
    loop, stopped = asyncio.new_event_loop(), threading.Event()

    async def as_drivers_do() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            loop.call_soon(print)

    async def begin() -> None:
        await self_test(tasks)

        @event.listens_for(tasks.sync_engine, "connect")
        def listen(connection: Any, _: Any) -> None:
            stopped.set()
            connection.run_async(lambda _: as_drivers_do())

        pool_of(tasks).expire(rolling=True)
        await soon(stopped.is_set, "it is renewed")

    loop.run_until_complete(begin())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()
        gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    eventually(lambda: pool_of(tasks).statistics().open == 0, "all slots are free")


def test_an_eager_task_factory_is_no_trouble(make: Make) -> None:
    """A task of ours that begins at once would have the caller's greenlet for its parent."""
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("Python 3.12 has it")

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        await asyncio.gather(*(self_test(tasks) for _ in range(10)))
        await soon(lambda: pool_of(tasks).checkedin() >= 3)
        await tasks.dispose()

    tasks = make(min_size=3)
    asyncio.run(main())


@pytest.mark.parametrize("forever", [False, True])
def test_a_loop_that_ends_while_its_min_size_is_filled_leaves_nothing(
    make: Make, pg_url: str, pg_observer: Observer, forever: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """``asyncio.run()`` does not cancel the opening; what it brings is closed; one that hangs is ended."""
    tasks = make(min_size=3)
    stopped, go_on = opening_stops(tasks, 2)
    cancelled = []

    async def main() -> None:
        await self_test(tasks)
        await soon(stopped.is_set, "it is filled")
        ours = [task for task in asyncio.all_tasks() if task.get_name().startswith("sqla_queries_pool")]
        cancelled.extend(ours)
        if not forever:
            asyncio.get_running_loop().call_later(0.05, go_on.set)

    asyncio.run(main(), debug=True)
    assert cancelled == [], "asyncio.run() knows none of ours"
    eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0, "all are closed")
    eventually(lambda: pool_of(tasks).statistics().open == 0, "all slots are free")
    assert pool_of(tasks).statistics().connects == 2
    gc.collect()
    assert [record for record in caplog.records if "destroyed" in record.getMessage()] == []


# -- the collector ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(concurrency, "in_greenlet"),
    reason="SQLAlchemy's first 2.0 marks no greenlet that can await",
)
def test_a_collection_inside_the_pool_lets_no_other_task_in(
    pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy's own pool has been left a connection: its finalizer would await its end, in here."""
    pytest.importorskip("asyncpg")
    tasks = create_async_engine(url_of(pg_url, "asyncpg"), poolclass=QueriesPool, max_size=4)
    other = create_async_engine(url_of(pg_url, "asyncpg"))

    async def main() -> None:
        connection = await other.connect()
        await connection.execute(text("SELECT 1"))
        Ring(connection)
        del connection
        await self_test(tasks)
        inside.before_a_take(monkeypatch, pool_of(tasks), gc.collect)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exc.SAWarning)
            await asyncio.gather(*(self_test(tasks) for _ in range(5)))
        assert other.pool.checkedout() == 0, "it was collected"  # type: ignore[attr-defined]
        await other.dispose()

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


# -- programs that end -----------------------------------------------------------------------------------

BEGINNING = """
import asyncio, logging, os, signal, sys, threading, warnings
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqla_queries_pool import QueriesPool
engine = create_async_engine(sys.argv[1], poolclass=QueriesPool, min_size=2, max_size=4)
# psycopg says so where a busy server takes its time to cancel a statement, under any pool.
logging.getLogger("psycopg").addHandler(logging.NullHandler())
async def use(sql="SELECT 1"):
    async with engine.connect() as connection:
        await connection.execute(text(sql))
"""
PROGRAMS = {
    "without awaiting its tasks": """
async def main():
    for _ in range(4):
        asyncio.ensure_future(use("SELECT pg_sleep(60)"))
    while engine.pool.statistics().held < 4:  # asyncpg complains of a connect that is cancelled
        await asyncio.sleep(0.01)
asyncio.run(main())
""",
    "by an exception in a transaction": """
async def main():
    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1"))
        raise SystemExit(0)
asyncio.run(main())
""",
    "with a connection that is still out": """
async def main():
    global kept
    kept = await engine.connect()
    await kept.execute(text("SELECT 1"))
asyncio.run(main())
""",
    "while a thread runs a loop": """
used = threading.Event()
async def main():
    await asyncio.gather(*(use() for _ in range(5)))
    used.set()
    await asyncio.sleep(60)
threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
used.wait(20)
""",
    "with a loop that was just closed": """
loop = asyncio.new_event_loop()
loop.run_until_complete(use())
loop.close()
""",
    "right after its asynchronous generators": """
loop = asyncio.new_event_loop()
loop.run_until_complete(use())
loop.run_until_complete(loop.shutdown_asyncgens())
loop.close()
""",
    "after dispose in another loop": """
asyncio.run(use())
asyncio.run(engine.dispose())
engine.sync_engine.dispose()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_ends_clean(pg_url: str, driver: str, how: str) -> None:
    """Exit status 0, and nothing on stderr in Python's development mode, however it ends."""
    url = url_of(pg_url, driver)
    if driver == "asyncpg":  # its request to cancel a statement asks for TLS first, and may be cut off
        url = url.update_query_dict({"ssl": "disable"})
    command = [sys.executable, "-X", "dev", "-c", BEGINNING + PROGRAMS[how], url.render_as_string(False)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    # A machine that is busy is slow, and the loop's debug mode says so.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.returncode, said) == (0, [])


# -- cancellation ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cancelled_statements_that_end_meanwhile_are_closed_silently(pg_url: str) -> None:
    """asyncpg connects to the server to cancel a statement; the close does not stop that halfway."""
    tasks = create_async_engine(url_of(pg_url, "asyncpg"), poolclass=QueriesPool, max_size=8)
    complaints: list[object] = []

    async def use(turns: int) -> None:
        async with tasks.connect() as connection:
            execute = asyncio.ensure_future(connection.execute(text("SELECT pg_sleep(0.001)")))
            for _ in range(turns):
                await asyncio.sleep(0)
            execute.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await execute

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        for turns in range(40):
            await asyncio.gather(*(use(turns % 10 + extra) for extra in range(8)))
        await tasks.dispose()

    asyncio.run(main())
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [600, pytest.param(5_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("uv", [False, True], ids=["asyncio", "uvloop"])
def test_cancellations_at_random_awaits_lose_nothing(
    make: Make, pg_url: str, pg_observer: Observer, number: int, uv: bool
) -> None:
    """Once, twice or three times: no extra backend, none in a transaction, all slots to be had."""
    run: Callable[..., Any] = pytest.importorskip("uvloop").run if uv else asyncio.run
    tasks, name, chance = make(), name_of(pg_url), random.Random(SEED)
    print(f"seed {SEED}")
    cancelled = 0

    async def work(chance: random.Random) -> None:
        async with tasks.begin() as connection:
            await connection.execute(text("SELECT 1"))
            if chance.random() < 0.3:
                await connection.execute(text("SELECT pg_sleep(0.002)"))
            if chance.random() < 0.1:
                await connection.invalidate()
                raise ValueError

    async def cancel(chance: random.Random) -> None:
        nonlocal cancelled
        task = asyncio.create_task(work(chance))
        await asyncio.sleep(chance.uniform(0, 0.02))
        again = chance.choice([1, 1, 2, 3])
        for _ in range(again):
            cancelled += task.cancel()
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.CancelledError, ValueError):
            await task

    async def many(seed: float) -> None:
        own = random.Random(seed)
        for _ in range(50):
            await cancel(own)

    async def main() -> None:
        while cancelled < number:
            await asyncio.gather(*(many(chance.random()) for _ in range(10)))
            await soon(lambda: pool_of(tasks).checkedout() == 0, "nothing is out, or being opened")
            await soon(lambda: pg_observer.backends(name, "idle in transaction") == 0, "none is in one")
            await soon(lambda: pg_observer.backends(name) <= 4, "no extra backend")
            async with all_out(tasks) as held:
                for connection in held:
                    assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
                await soon(lambda: pg_observer.backends(name) <= 4, "no extra backend")

    run(main())
    eventually(lambda: pg_observer.backends(name) == 0, "all are closed")
    assert pool_of(tasks).statistics().open == 0


@pytest.mark.skipif(
    sqlalchemy.__version__.startswith("2.0.") and int(sqlalchemy.__version__.split(".")[2]) < 58,
    reason="SQLAlchemy's first 2.0 rolls back a closed connection of asyncpg, and raises its error",
)
@pytest.mark.parametrize("name", ["close", "invalidate"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_invalidation_that_a_listener_interrupts_leaves_no_transaction_open(
    make: Make, pg_url: str, pg_observer: Observer, name: str, fails: bool
) -> None:
    """The connection is closed all the same, whether the listener fails or is cancelled."""
    tasks = make(max_size=1)
    interrupted: list[str] = []

    async def main() -> None:
        @event.listens_for(tasks.sync_engine, name)
        def listen(*_: Any) -> None:
            if not interrupted:
                interrupted.append(name)
                if fails:
                    raise ValueError
                raise asyncio.CancelledError

        with contextlib.suppress(asyncio.CancelledError, ValueError):
            async with tasks.connect() as connection:
                await connection.execute(text("SELECT 1"))
                await connection.invalidate()
        assert interrupted
        await soon(lambda: pg_observer.backends(name_of(pg_url)) == 0, "it is closed")
        await self_test(tasks)

    asyncio.run(main())
