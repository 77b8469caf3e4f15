"""``checkouts(timeout=…)``: a deadline for waiting, opening and pinging, of a thread or a task."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from fakes import FakeDriver
from hazards import DEADLINE, Thread, eventually, new_pool, no_thread_starts
from sqlalchemy import create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util.concurrency import await_only
from test_fast_path import frames

from sqla_queries_pool import (
    CheckoutTimeout,
    ParameterError,
    QueriesPool,
    checkout_label,
    checkouts,
    labelled,
)

_numbers = itertools.count(1)


@pytest.fixture
def driver() -> FakeDriver:
    """The one of the engine below."""
    return FakeDriver()


@pytest.fixture
def new(driver: FakeDriver) -> Iterator[Callable[..., Any]]:
    """Makes an engine without a server."""
    engines: list[Any] = []

    def make(**kw: Any) -> Any:
        kw = {"max_size": 1, "poolclass": QueriesPool, **kw}
        engines.append(create_engine(f"fake://me@host/deadline_{next(_numbers)}", module=driver, **kw))
        return engines[-1]

    yield make
    driver.gate.set()
    for engine in engines:
        engine.dispose()


def error_of(engine: Any) -> str:
    """The first line of the error of a checkout that gets nothing."""
    with pytest.raises(CheckoutTimeout) as raised:
        engine.connect()
    return str(raised.value).partition("\n")[0]


# -- waiting -----------------------------------------------------------------------------------------------


def test_a_checkout_waits_until_the_deadline_of_its_block_and_the_error_names_it(
    new: Callable[..., Any],
) -> None:
    """Not for the engine's thirty seconds."""
    engine, began = new(), time.monotonic()
    with engine.connect(), checkouts(timeout=0.05, label="GET /health"):
        error = error_of(engine)
    assert 0.05 <= time.monotonic() - began < DEADLINE
    # What was left of the block's time when it began to wait: nothing, where the machine was busy.
    said = r"had no connection within \S+ s \(checkouts\(timeout=0\.05, label='GET /health'\)\): open 1"
    assert re.search(said, error), error


def test_the_timeout_of_the_engine_counts_where_it_ends_earlier(new: Callable[..., Any]) -> None:
    """And the error says that it was the engine's."""
    engine = new(pool_timeout=0.02)
    with engine.connect(), checkouts(timeout=30):
        assert "within 0.02 s (the engine's timeout): open 1" in error_of(engine)
    with engine.connect():
        assert "within 0.02 s: open 1" in error_of(engine)


def test_an_engine_that_waits_for_ever_has_the_deadline_of_the_block(new: Callable[..., Any]) -> None:
    """``pool_timeout=None``."""
    engine = new(pool_timeout=None)
    with engine.connect(), checkouts(timeout=0):
        assert "within 0 s (checkouts(timeout=0)): open 1" in error_of(engine)


def test_what_is_left_of_the_deadline_counts_for_each_checkout_of_a_block(new: Callable[..., Any]) -> None:
    """It is one for the block: the second checkout has nothing left."""
    engine = new()
    with engine.connect(), checkouts(timeout=0.05):
        error_of(engine)
        assert "within 0 s (checkouts(timeout=0.05))" in error_of(engine)


def test_an_inner_deadline_can_only_be_earlier(new: Callable[..., Any]) -> None:
    """A library that is called can't give itself more time than its caller has."""
    engine = new()
    with engine.connect(), checkouts(timeout=0.1, label="outer"):
        with checkouts(timeout=30, label="inner"):
            assert checkout_label.get() == "inner"
            with checkouts(timeout=0, label="sooner"):
                assert "(checkouts(timeout=0, label='sooner'))" in error_of(engine)
            assert "(checkouts(timeout=0.1, label='outer'))" in error_of(engine)
        assert checkout_label.get() == "outer"
    assert checkout_label.get() is None


def test_the_deadline_ends_with_its_block_and_is_of_its_thread_alone(new: Callable[..., Any]) -> None:
    """Another thread waits for as long as its engine says."""
    engine = new(pool_timeout=DEADLINE)
    holder = engine.connect()
    with checkouts(timeout=0):
        waiting = Thread(lambda: engine.connect().close())
        eventually(lambda: inside.waiters(engine), "a waiter")
        error_of(engine)
    after = Thread(lambda: engine.connect().close())
    eventually(lambda: len(inside.waiters(engine)) == 2, "another waiter")
    holder.close()
    waiting.join()
    after.join()


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "soon", True])
def test_a_timeout_that_means_nothing_is_an_error(timeout: Any) -> None:
    """Where the block begins, with what to write."""
    with pytest.raises(
        ParameterError, match=r"checkouts\(timeout=.*\) is not valid: write a number of seconds"
    ):
        checkouts(timeout=timeout).__enter__()


def test_a_block_is_no_decorator() -> None:
    """The block around an ``async def`` would end before that runs: it is an error, and not nothing."""

    async def endpoint() -> None: ...

    for block in (checkouts(timeout=1), labelled("report")):
        decorate: Any = block
        with pytest.raises(TypeError, match="'checkouts' object is not callable"):
            decorate(endpoint)


def test_a_label_alone_states_no_deadline(new: Callable[..., Any]) -> None:
    """``labelled()`` is the short form."""
    engine = new(pool_timeout=0.01)
    for block in (labelled("report"), checkouts(label="report")):
        with block, engine.connect():
            assert "within 0.01 s: open 1" in error_of(engine)
            assert engine.pool.snapshot().holders[0].label == "report"


def test_a_checkout_that_finds_an_idle_connection_does_not_look_at_a_deadline() -> None:
    """Not at one that has come, either: it runs the same functions."""
    plain = frames(new_pool())
    with checkouts(timeout=0, label="GET /health"):
        assert frames(new_pool()) == plain


# -- opening and pinging -----------------------------------------------------------------------------------


def test_a_checkout_leaves_an_opening_at_its_deadline_and_the_next_one_has_the_connection(
    new: Callable[..., Any], driver: FakeDriver
) -> None:
    """A driver's connect can't be stopped; the slot counts until it has ended."""
    engine = new(max_size=2)
    driver.gate.clear()
    with checkouts(timeout=0.05, label="GET /health"):
        error = error_of(engine)
    assert "(checkouts(timeout=0.05, label='GET /health')): open 0, held 0, opening 1" in error
    assert engine.pool.checkedout() == 0
    driver.gate.set()
    eventually(lambda: engine.pool.checkedin() == 1, "the connection is idle")
    with checkouts(timeout=0), engine.connect():
        assert driver.attempts == 1
    assert engine.pool.statistics().checkouts == 1
    assert engine.pool.audit().mended == ()


def test_the_note_of_the_error_says_that_it_was_opening(new: Callable[..., Any], driver: FakeDriver) -> None:
    """As with every error of a checkout."""
    engine = new()
    driver.gate.clear()
    with checkouts(timeout=0.01), pytest.raises(CheckoutTimeout) as raised:
        engine.connect()
    assert "was opening a connection" in raised.value.__notes__[0]


def test_an_opening_within_the_deadline_is_as_any_other(new: Callable[..., Any], driver: FakeDriver) -> None:
    """Listeners see the label; an error is the driver's."""
    engine = new()
    seen = []
    event.listen(engine, "connect", lambda *_: seen.append(checkout_label.get()))
    with checkouts(timeout=DEADLINE, label="GET /health"):
        engine.connect().close()
        engine.dispose()
        driver.failures = 1
        with pytest.raises(Exception, match="the server is not there"):
            engine.connect()
    assert seen == ["GET /health"]


def test_an_opening_for_which_no_thread_can_be_started_runs_in_the_callers(new: Callable[..., Any]) -> None:
    """There are too many, or the interpreter is about to end: no error, and no slot is lost."""
    engine = new()
    seen: list[int] = []
    event.listen(engine, "connect", lambda *_: seen.append(threading.get_ident()))
    with no_thread_starts(), checkouts(timeout=DEADLINE), engine.connect():
        assert seen == [threading.get_ident()]
    assert engine.pool.checkedin() == 1


def test_an_opening_that_fails_after_its_caller_has_left_frees_its_slot(
    new: Callable[..., Any], driver: FakeDriver
) -> None:
    """The next checkout opens for itself."""
    engine = new()
    driver.gate.clear()
    driver.failures = 1
    with checkouts(timeout=0.01):
        error_of(engine)
    driver.gate.set()
    engine.connect().close()
    assert driver.attempts == 2


def test_a_checkout_leaves_a_ping_at_its_deadline_and_the_connection_stays(
    new: Callable[..., Any], driver: FakeDriver
) -> None:
    """A server that answers a moment later has lost nothing."""
    engine, go = new(pool_pre_ping=True), threading.Event()
    engine.connect().close()

    def slow(_: object) -> None:
        go.wait(DEADLINE)

    driver.on_ping = slow
    with checkouts(timeout=0.05):
        error = error_of(engine)
    assert "(checkouts(timeout=0.05))" in error
    go.set()
    eventually(lambda: engine.pool.checkedin() == 1, "the connection is idle")
    driver.on_ping = lambda _: None
    engine.connect().close()
    assert driver.attempts == 1


# -- tasks -------------------------------------------------------------------------------------------------


def test_a_task_has_a_deadline_of_its_own_for_waiting_and_opening(pg_url: str) -> None:
    """And no other task has it."""
    pytest.importorskip("asyncpg")

    async def main() -> None:
        url = make_url(pg_url).set(drivername="postgresql+asyncpg")
        engine = create_async_engine(url, poolclass=QueriesPool, max_size=1)
        async with engine.connect():  # the first one
            pass
        await engine.dispose()
        gate = asyncio.Event()
        event.listen(engine.sync_engine, "do_connect", lambda *_: await_only(gate.wait()) and None)

        async def probe() -> str:
            with checkouts(timeout=0.05, label="GET /health"), pytest.raises(CheckoutTimeout) as raised:
                await engine.connect()
            return str(raised.value)

        assert "(checkouts(timeout=0.05, label='GET /health')): open 0, held 0, opening 1" in await probe()
        gate.set()
        async with engine.connect():  # what was opened for the first probe
            said = await probe()
            assert re.search(r"within \S+ s \(checkouts\(timeout=0\.05, label='GET /health'\)\)", said)
        assert engine.pool.statistics().connects == 2  # type: ignore[attr-defined]
        await engine.dispose()

    asyncio.run(main())
