from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.pool import NullPool, PoolProxiedConnection, QueuePool

from sqla_queries_pool.demo.workload import Outcome, Share, jain, run


class FakeConnection:
    """A DBAPI connection that does nothing."""

    def rollback(self) -> None: ...

    def close(self) -> None: ...

    def cursor(self) -> None: ...


def connect() -> Any:
    """A creator for a pool."""
    return FakeConnection()


def nothing(connection: PoolProxiedConnection) -> None:
    """Work that takes no time."""


def load(
    pools: list[Any], work: Callable[[PoolProxiedConnection], object] = nothing, threads: int = 2
) -> Outcome:
    """A short load."""
    return run(pools, work, threads=threads, seconds=0.3, warm_up=0.0)


@pytest.mark.parametrize(
    ("shares", "index"), [([5, 5, 5, 5], 1.0), ([8, 0, 0, 0], 0.25), ([3, 1], 0.8), ([0, 0], 1.0)]
)
def test_jains_index_is_one_for_equal_shares_and_one_in_n_where_one_has_all(
    shares: list[float], index: float
) -> None:
    """Jain's formula, also where nobody got anything."""
    assert jain(shares) == pytest.approx(index)


def test_an_outcome_sums_up_what_the_threads_got() -> None:
    """Fewest, median, most, throughput, waits and timeouts follow from the shares."""
    outcome = Outcome(2.0, (Share(4, 1.0, 0.5, 1), Share(2, 2.0, 1.5), Share(6, 0.0, 0.0, 2)), connects=3)
    assert (outcome.fewest, outcome.median, outcome.most) == (2, 4, 6)
    assert outcome.throughput == 6.0
    assert outcome.longest_wait == 1.5
    assert outcome.mean_wait == 0.25
    assert outcome.timeouts == 3


def test_threads_are_spread_over_the_pools_and_their_opens_are_counted() -> None:
    """Each of the pools is used; opens in any of them count, and no thread is left."""
    pools = [QueuePool(connect, pool_size=1, max_overflow=0) for _ in range(3)]
    outcome = load(pools, threads=6)
    assert len(outcome.shares) == 6
    assert outcome.connects == 3
    assert [pool.checkedout() for pool in pools] == [0, 0, 0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load ")]


def test_an_error_in_a_thread_ends_the_load_and_is_raised() -> None:
    """The first error comes out, once all threads have ended and given back what they had."""
    pool = QueuePool(connect, pool_size=1, max_overflow=0)

    def fail(connection: PoolProxiedConnection) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([pool], fail, threads=4, seconds=60.0)
    assert pool.checkedout() == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load ")]


def test_a_load_counts_nothing_after_its_end_or_in_its_warm_up() -> None:
    """Checkouts count while it is measured: with no time for that, there are none."""
    pool = NullPool(connect)
    outcome = run([pool], nothing, threads=2, seconds=1e-9, warm_up=0.01)
    assert [share.checkouts for share in outcome.shares] == [0, 0]
    assert outcome.connects > 0


def test_a_thread_that_is_refused_asks_again_and_waits_on() -> None:
    """Every refusal is a timeout; the wait goes on over all of them, so it is longer than one."""
    timeout = 0.01
    pool = QueuePool(connect, pool_size=1, max_overflow=0, timeout=timeout)
    held = pool.connect()
    try:
        outcome = load([pool])
    finally:
        held.close()
    assert [share.checkouts for share in outcome.shares] == [0, 0]
    assert all(share.timeouts > 1 for share in outcome.shares)
    assert all(timeout < share.longest_wait <= outcome.seconds for share in outcome.shares)
