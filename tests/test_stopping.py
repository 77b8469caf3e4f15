"""Engines that hand nothing out: drained before a process ends, suspended during a failover."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import inside
import pytest
from fakes import FakeDriver, Task
from hazards import Thread, eventually, new_pid
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_queries_pool import (
    CheckoutTimeout,
    ParameterError,
    PoolDrained,
    PoolManager,
    QueriesPool,
    labelled,
)
from sqla_queries_pool.budget.audit import check
from sqla_queries_pool.budget.slots import DRAINED, SUSPENDED

Make = Callable[..., QueriesPool]


@pytest.fixture
def make(driver: FakeDriver) -> Make:
    """Makes engines' pools that share one limit of 2."""
    pid = new_pid()
    return lambda **kw: QueriesPool(driver.connect, pool_id=pid, **{"max_size": 2, "timeout": 10, **kw})


def whole(pool: QueriesPool) -> None:
    """The bookkeeping agrees with itself and with the facts."""
    check(inside.ledger(pool))
    assert pool.audit().mended == ()


def used_once(pool: QueriesPool) -> QueriesPool:
    """It has one idle connection."""
    pool.connect().close()
    return pool


# -- drain -------------------------------------------------------------------------------------------


def test_a_drained_engine_rejects_checkouts_and_closes_all(make: Make, driver: FakeDriver) -> None:
    """At once, with an error of its own that is SQLAlchemy's timeout, too."""
    pool = used_once(make())
    stopped = pool.drain(5)
    assert (stopped.complete, stopped.left, driver.numbers()) == (True, (), [])
    with pytest.raises(PoolDrained, match=r"because its engine was drained.*resume\(\) undoes it"):
        pool.connect()
    assert pool.statistics().rejected == 1
    assert "drained" in pool.status()
    whole(pool)


def test_a_drain_waits_for_what_is_out_and_says_who_has_it(make: Make, driver: FakeDriver) -> None:
    """It ends when the last one was returned, which closes; and at its timeout says who still has what."""
    pool = make()
    with labelled("GET /report"):
        connection = pool.connect()
    late = pool.drain(0.02)
    assert not late.complete
    assert [(held.label, held.state) for held in late.left] == [("GET /report", "held")]
    assert "1 still out, held by" in str(late)
    assert driver.numbers() == [1]  # nothing is taken away
    task = Task(lambda: pool.drain(100))
    connection.close()
    assert task.result().complete  # within less than that: it ended when that was returned
    assert driver.numbers() == []
    whole(pool)


def test_a_checkout_that_waited_before_the_drain_is_served(make: Make, driver: FakeDriver) -> None:
    """By what is returned, and that is no connect; the drain ends after it."""
    pool = make(max_size=1)
    connection = pool.connect()
    task = Task(pool.connect)
    eventually(lambda: pool.statistics().waiting == 1)
    assert pool.drain(0).waiting == 1
    connection.close()
    task.result().close()
    assert driver.events == ["open 1", "close 1"]
    assert pool.drain(0).complete
    whole(pool)


def test_an_engine_is_drained_alone_and_a_pool_with_all_its_engines(make: Make, driver: FakeDriver) -> None:
    """What others of the database have stays; ``Pool.drain`` closes what was added by hand, too."""
    one, two = used_once(make()), used_once(make())
    assert one.drain(0).complete
    two.connect().close()
    assert driver.events == ["open 1", "open 2", "close 1"]
    inside.shared(two).add(driver.connect())
    assert inside.shared(two).drain(5).complete
    assert driver.numbers() == []
    with pytest.raises(PoolDrained):
        two.connect()


@pytest.mark.usefixtures("no_other_pools")
def test_the_manager_drains_and_suspends_all_pools(driver: FakeDriver) -> None:
    """At once, with one timeout for all together; and lets all go on."""
    pools = [used_once(QueriesPool(driver.connect, pool_id=new_pid(), timeout=0)) for _ in range(2)]
    assert [stopped.complete for stopped in PoolManager.drain(5)] == [True, True]
    assert driver.numbers() == []
    for pool in pools:
        with pytest.raises(PoolDrained):
            pool.connect()
    PoolManager.resume()
    assert [stopped.state for stopped in PoolManager.suspend()] == [SUSPENDED, SUSPENDED]
    for pool in pools:
        with pytest.raises(CheckoutTimeout, match="suspended"):
            pool.connect()
    PoolManager.resume()
    for pool in pools:
        used_once(pool)


def test_it_stays_drained_after_a_dispose_until_it_is_resumed(driver: FakeDriver, pg_url: str) -> None:
    """Hooks at the end of a process dispose, and must not open it again."""
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=1)
    before = engine.pool
    assert isinstance(before, QueriesPool)
    assert before.drain(5).complete
    engine.dispose()
    with pytest.raises(PoolDrained):
        engine.connect()
    assert isinstance(engine.pool, QueriesPool)
    assert engine.pool is not before
    engine.pool.resume()
    engine.connect().close()
    assert engine.pool.checkedin() == 1
    whole(engine.pool)
    engine.dispose()


def test_a_forked_child_of_a_drained_or_suspended_parent_works(make: Make) -> None:
    """It has connections of its own, which it keeps."""
    for stop in (QueriesPool.drain, QueriesPool.suspend):
        pool = make(timeout=0)
        stop(pool, 0)
        child = os.fork()
        if child == 0:
            try:
                pool.connect().close()
                os._exit(0 if pool.checkedin() == 1 else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        pool.resume()


def test_a_timeout_without_meaning_is_an_error(make: Make) -> None:
    """Before anything is done."""
    pool = make()
    with pytest.raises(ParameterError, match="timeout"):
        pool.drain(-1)
    used_once(pool)


# -- suspend -----------------------------------------------------------------------------------------


def test_a_suspended_engine_hands_nothing_out_until_it_is_resumed(make: Make, driver: FakeDriver) -> None:
    """Not what is idle, not what is returned, not what another engine returns; nor opens anything."""
    pool, other = make(max_size=1), make(max_size=1)
    connection = pool.connect()
    assert [held.state for held in pool.suspend().left] == ["held"]
    tasks = [Task(pool.connect), Task(other.connect)]
    eventually(lambda: pool.statistics().waiting == 2)
    connection.close()
    theirs = tasks[1].result()
    assert driver.numbers() == [2]
    theirs.close()
    check(inside.ledger(pool))
    assert pool.statistics().waiting == 1
    pool.resume()
    tasks[0].result().close()
    assert pool.checkedin() == 1  # it is kept, as ever
    whole(pool)


def test_what_is_drained_is_not_suspended_and_the_result_says_so(make: Make) -> None:
    """Its checkouts are rejected as before, and do not wait."""
    pool = make(timeout=0.01)
    pool.drain(0)
    stopped = pool.suspend()
    assert (stopped.state, str(stopped)) == (DRAINED, f"{stopped.pool}: drained, nothing is out after 0.0 s")
    with pytest.raises(PoolDrained):
        pool.connect()


def test_what_a_suspended_engine_opened_before_closes_when_it_is_returned_after(
    make: Make, driver: FakeDriver
) -> None:
    """It may be one to the server that was there before the failover."""
    pool = make()
    connection = pool.connect()
    pool.suspend()
    pool.resume()
    connection.close()
    assert driver.numbers() == []
    used_once(pool)
    assert driver.numbers() == [2]


def test_a_checkout_that_waits_too_long_is_told_that_the_pool_is_suspended(make: Make) -> None:
    """Within its own timeout, and not as a deadlock or an overload."""
    pool = make(timeout=0.05, queue_target=0.001)
    pool.suspend()
    with pytest.raises(
        CheckoutTimeout, match=r"within 0\.05 s: .* The pool is suspended: .*resume\(\)"
    ) as raised:
        pool.connect()
    assert raised.value.snapshot.diagnosis.kind == SUSPENDED


def test_a_suspend_waits_for_what_is_out(make: Make) -> None:
    """So that a migration may begin."""
    pool = make()
    connection = pool.connect()
    task = Task(lambda: pool.suspend(10))
    connection.close()
    assert task.result().complete


def test_a_suspended_engine_opens_nothing_for_min_size(make: Make, driver: FakeDriver) -> None:
    """Nor for ``warm_up()``."""
    pool = make(min_size=2)
    pool.warm_up()
    pool.suspend()
    pool.warm_up()
    assert driver.numbers() == []
    pool.resume()
    pool.warm_up()
    assert len(driver.numbers()) == 2


# -- asyncio -----------------------------------------------------------------------------------------


def test_a_drain_is_awaited_in_a_loop_and_lets_it_run(pg_url: str) -> None:
    """The task that has the connection returns it meanwhile; a thread may drain it as well."""
    pytest.importorskip("asyncpg")
    url = make_url(pg_url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, poolclass=QueriesPool, max_size=1, pool_timeout=10)
    pool: Any = engine.pool

    async def main() -> None:
        connection = await engine.connect()
        waiting = asyncio.create_task(pool.drain(10))
        await asyncio.sleep(0)
        while not inside.attachment(pool).quota.stopped:
            await asyncio.sleep(0.001)
        with pytest.raises(PoolDrained):
            await engine.connect()
        await connection.close()
        assert (await waiting).complete
        pool.resume()
        connection = await engine.connect()
        drained = Thread(lambda: pool.drain(10))
        await asyncio.sleep(0.01)
        await connection.close()
        while drained.alive:
            await asyncio.sleep(0.001)
        assert drained.join().complete

    asyncio.run(main())
