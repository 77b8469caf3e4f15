"""Engines of asyncio: one class and one budget with those of threads, any number of event loops."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import inside
import pytest
from conftest import Observer
from hazards import DEADLINE, LATE, Thread, eventually
from sqlalchemy import Engine, create_engine, event, exc, text
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from sqla_queries_pool import CheckoutTimeout, PoolDeadlock, PoolManager, QueriesPool, checkout_label

DRIVERS = ("asyncpg", "psycopg")
Make = Callable[..., AsyncEngine]


def url_of(pg_url: str, driver: str) -> Any:
    """The same database with another driver."""
    return make_url(pg_url).set(drivername=f"postgresql+{driver}")


def pool_of(engine: AsyncEngine | Engine) -> QueriesPool:
    """The engine's pool."""
    assert isinstance(engine.pool, QueriesPool)
    return engine.pool


def runners() -> list[Any]:
    """What runs a coroutine in a loop of its own: asyncio's, and uvloop's where it is installed."""
    found: list[Any] = [pytest.param(asyncio.run, id="asyncio")]
    try:
        import uvloop
    except ImportError:
        return [*found, pytest.param(None, id="uvloop", marks=pytest.mark.skip("uvloop is not installed"))]
    return [*found, pytest.param(uvloop.run, id="uvloop")]


@pytest.fixture(params=["asyncpg", pytest.param("psycopg", marks=pytest.mark.exhaustive)])
def driver(request: pytest.FixtureRequest) -> str:
    """The name of a driver for asyncio."""
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[Any]], Any]:
    """Runs a coroutine in a new event loop, and closes the loop."""
    runner: Callable[[Awaitable[Any]], Any] = request.param
    return runner


@pytest.fixture
def make(pg_url: str, driver: str) -> Iterator[Make]:
    """Makes engines of the test's database."""
    made = []

    def new(**kw: Any) -> AsyncEngine:
        kw = {"poolclass": QueriesPool, "max_size": 4, "pool_timeout": 10, **kw}
        made.append(create_async_engine(url_of(pg_url, driver), **kw))
        return made[-1]

    yield new
    for engine in made:
        pool_of(engine).dispose()
        assert pool_of(engine).audit().mended == ()


@contextmanager
def threads_engine(pg_url: str, **kw: Any) -> Iterator[Engine]:
    """An engine of the same database whose callers are threads."""
    engine = create_engine(pg_url, poolclass=QueriesPool, **{"max_size": 4, "pool_timeout": 10, **kw})
    yield engine
    engine.dispose()


def name_of(pg_url: str) -> str:
    """The database's name."""
    return str(make_url(pg_url).database)


async def soon(
    condition: Callable[[], object], what: str = "the condition", seconds: float = DEADLINE
) -> None:
    """As ``eventually``, while the loop goes on."""
    left = seconds
    while not condition():
        assert left > 0, f"{what} did not come about"
        begin = time.monotonic()
        await asyncio.sleep(0.001)
        left -= min(time.monotonic() - begin, 0.001 + LATE)


async def one(connection: AsyncConnection) -> Any:
    """What ``SELECT 1`` returns."""
    return (await connection.execute(text("SELECT 1"))).scalar_one()


async def check_out(engine: AsyncEngine) -> None:
    """Check a connection out, and return it."""
    async with engine.connect():
        pass


async def checkout(engine: AsyncEngine) -> AsyncConnection:
    """A connection that is out."""
    return await engine.connect()


@asynccontextmanager
async def all_out(engine: AsyncEngine, number: int = 4) -> AsyncIterator[list[AsyncConnection]]:
    """So many connections are out."""
    held = [await engine.connect() for _ in range(number)]
    yield held
    for connection in held:
        await connection.close()


# -- one class, one budget -------------------------------------------------------------------------------


def test_one_class_serves_both_and_the_database_decides_on_the_budget(pg_url: str) -> None:
    """Whatever the driver is: the same pool."""
    with threads_engine(pg_url) as threads:
        for driver in DRIVERS:
            tasks = create_async_engine(url_of(pg_url, driver), poolclass=QueriesPool)
            assert pool_of(tasks).pid == pool_of(threads).pid


@pytest.mark.skipif(
    not hasattr(PGDialect, "_split_multihost_from_url"),
    reason="SQLAlchemy's first 2.0 has no URL of several hosts for asyncpg",
)
def test_several_hosts_are_the_same_database_with_every_driver() -> None:
    """asyncpg takes lists, libpq text with commas."""
    query = "?host=a.example:5432&host=b.example:5433"
    pids = {
        pool_of(create_async_engine(f"postgresql+{driver}://me@/shop{query}", poolclass=QueriesPool)).pid
        for driver in DRIVERS
    }
    pids.add(pool_of(create_engine(f"postgresql+psycopg2://me@/shop{query}", poolclass=QueriesPool)).pid)
    assert len(pids) == 1


def test_a_task_waits_for_what_a_thread_returns_and_the_loop_goes_on(make: Make, pg_url: str) -> None:
    """The limit is that of all; the answer comes from another thread."""

    async def main(threads: Engine) -> None:
        held = [threads.connect() for _ in range(4)]
        waiting = asyncio.create_task(checkout(tasks))
        await soon(lambda: pool_of(tasks).statistics().waiting == 1, "it waits")
        for _ in range(100):  # this loop's turns
            await asyncio.sleep(0)
        assert not waiting.done()
        await asyncio.to_thread(held.pop().close)
        connection = await waiting
        assert await one(connection) == 1
        await connection.close()
        for other in held:
            other.close()

    tasks = make()
    with threads_engine(pg_url) as threads:
        asyncio.run(main(threads))
    assert pool_of(tasks).statistics().evictions >= 1


def test_a_thread_waits_for_what_a_task_returns(make: Make, pg_url: str) -> None:
    """The other way round."""

    async def main(threads: Engine) -> None:
        async with all_out(tasks) as held:
            waiting = Thread(threads.connect)
            await soon(lambda: pool_of(tasks).statistics().waiting == 1, "it waits")
            await held.pop().close()
            await soon(lambda: not waiting.alive, "it is served")
            waiting.join().close()

    tasks = make()
    with threads_engine(pg_url) as threads:
        asyncio.run(main(threads))


def test_a_thread_gets_the_slot_of_an_idle_connection_of_a_loop_that_is_blocked(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """The socket is shut down from outside, so the backend goes; the driver notices when its loop runs."""
    name = name_of(pg_url)

    async def main(threads: Engine) -> None:
        async with all_out(tasks):
            pass
        assert pg_observer.backends(name) == 4
        connection = threads.connect()  # in the loop's own thread: nothing of it runs
        eventually(lambda: pg_observer.backends(name) == 4, "one of its own has gone")
        await asyncio.sleep(0)
        connection.close()
        async with tasks.connect() as again:
            assert await one(again) == 1

    tasks = make()
    with threads_engine(pg_url) as threads:
        asyncio.run(main(threads))


def test_waiters_are_served_in_order(make: Make) -> None:
    """First come, first served, as for threads."""
    order: list[int] = []

    async def work(number: int) -> None:
        async with tasks.connect():
            order.append(number)
            await asyncio.sleep(0)

    def waiting_are(number: int) -> Callable[[], bool]:
        return lambda: pool_of(tasks).statistics().waiting == number

    async def main() -> None:
        async with all_out(tasks):
            waiting = []
            for number in range(20):
                waiting.append(asyncio.create_task(work(number)))
                await soon(waiting_are(number + 1))
        await asyncio.gather(*waiting)

    tasks = make()
    asyncio.run(main())
    assert order == sorted(order)


# -- event loops -----------------------------------------------------------------------------------------


def test_an_engine_works_in_one_loop_after_the_other(
    make: Make, run: Any, pg_url: str, pg_observer: Observer
) -> None:
    """As in tests, scripts and task queues; nothing stays on the server of a loop that has ended."""

    async def main() -> Any:
        async with all_out(tasks):
            pass
        async with tasks.connect() as connection:
            return await one(connection)

    tasks = make()
    for _ in range(3):
        assert run(main()) == 1
        eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0, "all are closed")
        assert pool_of(tasks).statistics().open == 0
    assert len(inside.ledger(pool_of(tasks)).attachments) == 1


def test_a_loop_that_is_just_closed_gives_its_slots_back_at_once(
    make: Make, run: Any, pg_url: str, pg_observer: Observer
) -> None:
    """Without a word before: what is idle, and what is out."""
    new_loop = asyncio.new_event_loop if run is asyncio.run else pytest.importorskip("uvloop").new_event_loop
    tasks = make()
    loop = new_loop()
    kept = loop.run_until_complete(tasks.connect())

    async def main() -> None:
        async with tasks.connect() as connection:
            await one(connection)

    loop.run_until_complete(main())
    assert pool_of(tasks).statistics().open == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()
        eventually(lambda: pool_of(tasks).statistics().open == 0, "its slots are free")
        eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0, "its connections are closed")
        gc.collect()

    async def broken() -> None:
        with pytest.raises(exc.DBAPIError, match="its event loop has ended"):
            await kept.execute(text("SELECT 1"))
        await kept.close()

    asyncio.run(broken())
    assert pool_of(tasks).statistics().closes["its event loop has ended"] == 2
    run(main())


@pytest.mark.parametrize("loops", [2, 3])
def test_no_connection_crosses_loops(make: Make, loops: int) -> None:
    """Each thread has a loop, all share the limit; each gets connections, and they stay with it."""
    tasks = make(max_size=2 * loops)
    together = threading.Barrier(loops)

    async def work(owners: dict[int, Any]) -> None:
        for _ in range(50):
            async with tasks.connect() as connection:
                driver_connection = (await connection.get_raw_connection()).driver_connection
                owners[id(driver_connection)] = driver_connection
                assert await one(connection) == 1

    async def main() -> dict[int, Any]:
        owners: dict[int, Any] = {}
        await asyncio.to_thread(together.wait, 20)
        await asyncio.gather(*(work(owners) for _ in range(4)))
        await asyncio.to_thread(together.wait, 20)
        return owners

    threads = [Thread(asyncio.run, main()) for _ in range(loops)]
    found = [thread.join() for thread in threads]
    statistics = pool_of(tasks).statistics()
    assert sum(map(len, found)) == len({key for owners in found for key in owners})
    assert statistics.connects <= statistics.checkouts / 10, "slots spread, and stay"
    assert statistics.open == 0


def test_a_cold_start_in_two_loops_works(make: Make) -> None:
    """SQLAlchemy guards the first connection of an engine with a lock that belongs to one loop."""
    for _ in range(5):
        tasks = make()
        together = threading.Barrier(2)

        @event.listens_for(tasks.sync_engine, "connect")
        def listen(connection: Any, _: Any) -> None:
            connection.cursor().execute("SELECT pg_sleep(0.01)")

        async def main(tasks: AsyncEngine = tasks, together: threading.Barrier = together) -> None:
            together.wait(20)
            await asyncio.gather(*(self_test(tasks) for _ in range(2)))

        for thread in [Thread(asyncio.run, main()) for _ in range(2)]:
            thread.join()


async def self_test(engine: AsyncEngine) -> None:
    """Use one connection."""
    async with engine.connect() as connection:
        assert await one(connection) == 1


def test_dispose_in_another_loop_closes_the_connections_of_all(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """From a thread, too."""
    tasks = make()
    used, go_on = threading.Event(), threading.Event()

    async def first() -> None:
        await self_test(tasks)
        used.set()
        await asyncio.to_thread(go_on.wait, 20)
        await self_test(tasks)

    thread = Thread(asyncio.run, first())
    assert used.wait(20)
    asyncio.run(tasks.dispose())
    eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0, "all are closed")
    go_on.set()
    thread.join()


def test_a_waiter_whose_loop_stands_still_lets_others_go_first(make: Make, pg_url: str) -> None:
    """A loop may stop in the middle of a checkout.  It keeps nothing from others, and has its place again."""
    tasks = make(max_size=1)
    loop = asyncio.new_event_loop()

    async def begin() -> asyncio.Task[AsyncConnection]:
        waiting = asyncio.create_task(checkout(tasks))
        await soon(lambda: pool_of(tasks).statistics().waiting == 1, "it waits")
        return waiting

    async def end(waiting: asyncio.Task[AsyncConnection]) -> None:
        connection = await waiting
        assert await one(connection) == 1
        await connection.close()

    with threads_engine(pg_url, max_size=1) as threads:
        held = threads.connect()
        waiting = loop.run_until_complete(begin())
        other = Thread(threads.connect)
        eventually(lambda: pool_of(tasks).statistics().waiting == 2, "both wait")
        eventually(lambda: pool_of(tasks).snapshot().waiting[0].seconds > 0.5, "it has waited for long")
        held.close()
        held = other.join()
        assert pool_of(tasks).statistics().waiting == 0
        Thread(held.close).join()
        loop.run_until_complete(end(waiting))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_no_loop_no_connection(make: Make) -> None:
    """SQLAlchemy's own error for it, not a connection of some loop."""
    with pytest.raises(exc.MissingGreenlet):
        make().sync_engine.connect()


# -- cancellation ----------------------------------------------------------------------------------------


def test_a_cancelled_checkout_leaves_the_queue(make: Make) -> None:
    """And the next one gets what it would have got."""

    async def main() -> None:
        async with all_out(tasks) as held:
            waiting = [asyncio.create_task(self_test(tasks)) for _ in range(3)]
            await soon(lambda: pool_of(tasks).statistics().waiting == 3, "all wait")
            waiting[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting[0]
            assert pool_of(tasks).statistics().waiting == 2
            await held.pop().close()
            await asyncio.gather(*waiting[1:])

    tasks = make()
    asyncio.run(main())


def test_one_cancelled_as_it_is_answered_passes_the_connection_on(make: Make) -> None:
    """The answer and the cancellation come in one turn of the loop."""

    async def main() -> None:
        async with all_out(tasks) as held:
            waiting = [asyncio.create_task(self_test(tasks)) for _ in range(2)]
            await soon(lambda: pool_of(tasks).statistics().waiting == 2, "both wait")
            await held.pop().close()
            waiting[0].cancel()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert results[1] is None
            assert pool_of(tasks).checkedout() == 3

    tasks = make()
    asyncio.run(main())


def test_a_cancelled_opening_goes_on_and_its_connection_is_used(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """The driver may not stop in the middle, so the slot counts until it is over: the limit holds."""
    opened: list[Any] = []

    async def main() -> None:
        @event.listens_for(tasks.sync_engine, "connect")
        def listen(connection: Any, _: Any) -> None:
            connection.run_async(lambda _: gate.wait())
            opened.append(connection)

        gate = asyncio.Event()
        opening = asyncio.create_task(self_test(tasks))
        await soon(lambda: pg_observer.backends(name_of(pg_url)) == 1, "it connects")
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert pool_of(tasks).statistics().opening == 1
        gate.set()
        await soon(lambda: pool_of(tasks).statistics().idle == 1, "it is there")
        await self_test(tasks)
        assert len(opened) == 1

    tasks = make(max_size=1)
    asyncio.run(main())


def test_a_cancelled_holder_leaves_no_transaction_open(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """In the middle of a statement; its slot is free, and the connection is rolled back or gone."""

    async def use() -> None:
        async with tasks.begin() as connection:
            await connection.execute(text("CREATE TEMPORARY TABLE t (i int)"))
            await connection.execute(text("SELECT pg_sleep(60)"))

    async def main() -> None:
        using = asyncio.create_task(use())
        name = name_of(pg_url)
        await soon(lambda: pg_observer.query(
            "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND query LIKE '%%pg_sleep%%'", name
        ), "it sleeps")  # fmt: skip
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        await soon(lambda: pg_observer.backends(name, "idle in transaction") == 0, "it is over")
        assert pool_of(tasks).checkedout() == 0
        async with all_out(tasks):
            pass

    tasks = make()
    asyncio.run(main())


def test_anyio_cancels_again_at_each_await_and_nothing_is_lost(make: Make) -> None:
    """A scope that is cancelled does so until it is left."""
    anyio = pytest.importorskip("anyio")

    async def main() -> None:
        for seconds in (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01):
            with anyio.move_on_after(seconds):
                async with tasks.begin() as connection:
                    await connection.execute(text("SELECT pg_sleep(1)"))
        await soon(lambda: pool_of(tasks).checkedout() == 0, "nothing is out, or being opened")
        async with all_out(tasks):
            pass

    tasks = make()
    asyncio.run(main())


# -- who has what ----------------------------------------------------------------------------------------


def test_holders_and_waiters_are_tasks(make: Make) -> None:
    """By name, with their label, and where they are."""

    async def holding(go_on: asyncio.Event) -> None:
        checkout_label.set("nightly report")
        async with tasks.begin() as connection:
            await one(connection)
            await go_on.wait()

    async def main() -> None:
        go_on = asyncio.Event()
        holder = asyncio.create_task(holding(go_on), name="holder")
        await soon(lambda: pool_of(tasks).checkedout() == 1, "it holds")
        waiting = asyncio.create_task(self_test(tasks), name="waiting")
        await soon(lambda: pool_of(tasks).statistics().waiting == 1, "it waits")
        await soon(lambda: pool_of(tasks).snapshot().holders[0].transaction == "in transaction")
        seen = pool_of(tasks).snapshot()
        assert seen.holders[0].name == "task 'holder'"
        assert seen.holders[0].label == "nightly report"
        assert any("in holding" in call for call in seen.holders[0].now_at)
        assert seen.holders[0].backend_pid
        assert seen.waiting[0].name == "task 'waiting'"
        assert any("in self_test" in call for call in seen.waiting[0].now_at)
        go_on.set()
        await asyncio.gather(holder, waiting)

    tasks = make(max_size=1)
    asyncio.run(main())


def test_a_timeout_names_the_tasks_that_hold(make: Make) -> None:
    """The text of the error says who; other tasks in the same thread are not taken for the asker."""

    async def hold(out: asyncio.Event, enough: asyncio.Event) -> None:
        async with tasks.connect():
            out.set()
            await enough.wait()

    async def main() -> CheckoutTimeout:
        out, enough = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(out, enough), name="the holder")
        await out.wait()
        with pytest.raises(CheckoutTimeout) as caught:
            await self_test(tasks)
        enough.set()
        await holder
        return caught.value

    tasks = make(max_size=1, pool_timeout=0.05)
    error = asyncio.run(main())
    assert "task 'the holder'" in str(error)
    assert error.snapshot is not None
    assert error.snapshot.diagnosis.kind == "too-small"


def test_a_nested_checkout_is_told_as_such(make: Make) -> None:
    """In one task, and in a task that waits for those that it has started."""

    async def in_one_task() -> Any:
        async with tasks.connect():
            with pytest.raises(CheckoutTimeout) as caught:
                await self_test(tasks)
        return caught.value.snapshot.diagnosis

    async def in_tasks_below() -> Any:
        async with tasks.connect():
            found = await asyncio.gather(*(self_test(tasks) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, CheckoutTimeout) for error in found)
        return found[0].snapshot.diagnosis  # type: ignore[union-attr]

    tasks = make(max_size=1, pool_timeout=0.2)  # an error's snapshot is shared for half of that
    found = asyncio.run(in_one_task())
    assert (found.kind, "this task already holds 1" in found.cause) == ("nested-checkout", True)
    found = asyncio.run(in_tasks_below())
    assert (found.kind, "has started tasks" in found.cause) == ("nested-checkout", True)


@pytest.mark.slow
def test_tasks_that_wait_for_each_other_are_reported(make: Make) -> None:
    """A deadlock of two tasks in one thread."""

    async def two(both: list[int]) -> None:
        async with tasks.connect():
            both.append(1)
            await soon(lambda: len(both) == 2)
            async with tasks.connect():
                pass

    async def main() -> list[Any]:
        both: list[int] = []
        return list(await asyncio.gather(two(both), two(both), return_exceptions=True))

    quick = inside.pool_class(deadlock_grace=0.1)
    tasks = make(poolclass=quick, max_size=2, pool_timeout=60, on_deadlock="raise")
    (error,) = [error for error in asyncio.run(main()) if error is not None]
    assert isinstance(error, PoolDeadlock)
    assert "2 checkouts wait for each other" in str(error)
    assert "in two" in str(error), "where they are"


def test_a_connection_that_nobody_returns_is_closed_by_the_collector(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """With SQLAlchemy's words; its slot comes back, and nothing is awaited for it."""

    async def main() -> None:
        connection = await tasks.connect()
        await connection.execute(text("CREATE TEMPORARY TABLE t (i int)"))
        del connection
        with pytest.warns(exc.SAWarning, match="non-checked-in connection .* will be terminated"):
            gc.collect()
        await soon(lambda: pg_observer.backends(name_of(pg_url)) == 0, "it is closed")
        await self_test(tasks)

    tasks = make(max_size=1)
    asyncio.run(main())
    assert pool_of(tasks).statistics().closes["abandoned by its holder"] == 1


# -- what is promised in docs/ ---------------------------------------------------------------------------


@pytest.mark.slow
def test_dead_connections_are_replaced_without_an_error(
    make: Make, pg_url: str, pg_observer: Observer
) -> None:
    """All idle backends are terminated: no checkout fails, whether the loop has run since or not."""

    async def main() -> None:
        for number in range(6):
            async with all_out(tasks):
                pass
            if number % 2:
                await asyncio.to_thread(pg_observer.terminate, name_of(pg_url))
            else:
                pg_observer.terminate(name_of(pg_url))  # the loop stands still meanwhile
            for _ in range(4):
                await self_test(tasks)

    tasks = make()
    asyncio.run(main())


def test_idle_connections_go_away(make: Make, pg_url: str, pg_observer: Observer) -> None:
    """After ``idle_ttl``, while the loop does something else."""

    async def main() -> None:
        async with all_out(tasks):
            pass
        await soon(lambda: pg_observer.backends(name_of(pg_url)) == 0, "they are gone")
        await self_test(tasks)

    tasks = make(idle_ttl=0.05)
    asyncio.run(main())
    assert pool_of(tasks).statistics().closes["idle for longer than idle_ttl"] >= 4


def test_min_size_is_opened_in_the_loop(make: Make) -> None:
    """In the background, by a task of the loop, once the first was opened."""

    async def main() -> None:
        await self_test(tasks)
        await soon(lambda: pool_of(tasks).checkedin() == 3, "three are open")

    tasks = make(min_size=3)
    asyncio.run(main())
    assert pool_of(tasks).statistics().open == 0


def test_warm_up_is_awaited(make: Make) -> None:
    """In a coroutine; in a greenlet of SQLAlchemy's it just returns."""

    async def main() -> None:
        await pool_of(tasks).warm_up()
        assert pool_of(tasks).checkedin() == 3
        pool_of(tasks).dispose()
        async with tasks.connect() as connection:
            await connection.run_sync(lambda _: pool_of(tasks).warm_up())
        assert pool_of(tasks).checkedin() == 3

    tasks = make(min_size=3)
    asyncio.run(main())


def test_old_connections_are_renewed_in_their_loop(make: Make) -> None:
    """``pool_recycle``, and ``expire(rolling=True)``: one after the other, in the background."""

    async def main() -> None:
        async with all_out(tasks, 2):
            pass
        before = pool_of(tasks).statistics().connects
        pool_of(tasks).expire(rolling=True)
        await soon(lambda: pool_of(tasks).statistics().connects == before + 2, "both are renewed")
        await soon(lambda: pool_of(tasks).checkedin() == 2, "both are idle")
        await self_test(tasks)

    tasks = make()
    asyncio.run(main())
    assert pool_of(tasks).statistics().closes["older than pool_recycle"] == 2


def test_expire_replaces_all(make: Make) -> None:
    """What is idle now, what is out when it is returned."""

    async def main() -> None:
        async with all_out(tasks, 2) as held:
            await held.pop().close()
            pool_of(tasks).expire()
            assert pool_of(tasks).statistics().idle == 0
        assert pool_of(tasks).statistics().open == 0
        await self_test(tasks)

    tasks = make()
    asyncio.run(main())


def test_a_restart_of_the_server_fails_no_checkout(pg_own_server: Callable[..., Any], driver: str) -> None:
    """While it is down checkouts wait; each is served when it is back."""
    server = pg_own_server()

    async def main() -> None:
        await asyncio.gather(*(self_test(tasks) for _ in range(4)))
        restarting = asyncio.create_task(asyncio.to_thread(server.restart))
        while not restarting.done():  # nothing is under way on a connection when the server stops
            await asyncio.gather(*(check_out(tasks) for _ in range(8)))
        await restarting
        await self_test(tasks)

    tasks = create_async_engine(
        url_of(server.url(), driver), poolclass=QueriesPool, max_size=4, pool_timeout=30
    )
    asyncio.run(main())


def test_a_session_that_is_read_only_by_its_own_wish_keeps_its_connection(make: Make) -> None:
    """After SQLSTATE 25006 the server is asked, in the loop, whether it is a standby."""

    async def main() -> None:
        await self_test(tasks)
        before = pool_of(tasks).statistics().connects
        async with tasks.connect() as connection:
            await connection.execute(text("SET TRANSACTION READ ONLY"))
            with pytest.raises(exc.DBAPIError) as caught:
                await connection.execute(text("CREATE TABLE t (i int)"))
        assert not caught.value.connection_invalidated
        await self_test(tasks)
        assert pool_of(tasks).statistics().connects == before

    tasks = make()
    asyncio.run(main())


def test_credentials_may_rotate(make: Make, pg_url: str) -> None:
    """A ``do_connect`` listener is asked for each connection, and does not change the pool's identity."""
    asked = []

    async def main() -> None:
        @event.listens_for(tasks.sync_engine, "do_connect")
        def token(*_: Any) -> None:
            asked.append(_[-1].setdefault("password", make_url(pg_url).password))

        async with all_out(tasks, 2):
            pass

    tasks = make()
    asyncio.run(main())
    assert len(asked) == 2


def test_the_url_alone_is_enough(pg_url: str, driver: str) -> None:
    """``plugin=queries`` in the URL of an asynchronous engine."""
    url = url_of(pg_url, driver).update_query_dict({"plugin": "queries", "max_size": "3"})
    tasks = create_async_engine(url)
    asyncio.run(self_test(tasks))
    assert pool_of(tasks).size() == 3


def test_a_session_works(make: Make) -> None:
    """What applications use."""

    async def main() -> None:
        async with AsyncSession(tasks) as session, session.begin():
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1
        assert pool_of(tasks).checkedout() == 0

    tasks = make()
    asyncio.run(main())


def test_aiosqlite_shares_the_budget_of_its_file(tmp_path: Path) -> None:
    """It has no socket, a thread for each connection, and is closed all the same."""
    pytest.importorskip("aiosqlite")
    file = tmp_path / "some.db"
    tasks = create_async_engine(f"sqlite+aiosqlite:///{file}", poolclass=QueriesPool, max_size=2)
    threads = create_engine(f"sqlite:///{file}", poolclass=QueriesPool, max_size=2)
    assert pool_of(tasks).pid == pool_of(threads).pid
    before = threading.active_count()

    async def main() -> None:
        async with all_out(tasks, 2):
            pass
        await asyncio.gather(*(self_test(tasks) for _ in range(10)))

    for _ in range(3):
        asyncio.run(main())
        eventually(lambda: threading.active_count() <= before + 1, "its threads have ended")
        assert pool_of(tasks).statistics().open == 0
    threads.connect().close()
    threads.dispose()


def test_a_forked_child_begins_anew(make: Make, pg_url: str, pg_observer: Observer) -> None:
    """The child's loop has connections of its own; the parent's go on."""
    name = name_of(pg_url)

    async def main() -> None:
        held = await tasks.connect()
        assert await one(held) == 1
        await self_test(tasks)
        child = os.fork()
        if not child:
            code = 1
            try:
                Thread(asyncio.run, self_test(tasks)).join()
                code = int(pool_of(tasks).statistics().open != 0)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert await one(held) == 1
        await held.close()
        await self_test(tasks)
        assert pg_observer.backends(name) == 2

    tasks = make()
    asyncio.run(main())


PROGRAM = """
import asyncio, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqla_queries_pool import QueriesPool
run = asyncio.run
if sys.argv[2] == "uvloop":
    import uvloop
    run = uvloop.run
engine = create_async_engine(sys.argv[1], poolclass=QueriesPool, min_size=2)
async def use():
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
async def main():
    await asyncio.gather(*(use() for _ in range(3)))
run(main())
if sys.argv[3:] == ["twice"]:
    run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["twice"]])
def test_a_program_that_ends_without_dispose_ends_clean(
    pg_url: str, driver: str, run: Any, more: list[str]
) -> None:
    """Exit status 0, and nothing on stderr in Python's development mode."""
    url = url_of(pg_url, driver).render_as_string(hide_password=False)
    kind = "asyncio" if run is asyncio.run else "uvloop"
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAM, url, kind, *more],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # A machine that is busy is slow, and the loop's debug mode says so.
    said = [line for line in ended.stderr.splitlines() if not line.startswith("Executing <")]
    assert (ended.returncode, said) == (0, [])


def test_pools_that_are_no_longer_used_keep_no_loop(make: Make) -> None:
    """A loop that has ended is collected with all that it had."""
    import weakref

    tasks = make()

    async def main() -> Any:
        await self_test(tasks)
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(main())
    gc.collect()
    assert loop() is None
    assert pool_of(tasks).pid in {pool.id for pool in PoolManager.pools()}
