"""Many threads that share few connections, and how much each of them got.

This is the load of the demo and of the benchmarks: every thread checks out a connection, works with it,
returns it, and asks again at once, until the time is up.  It uses only SQLAlchemy's ``Pool``, so it treats
all kinds of pools alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

from sqlalchemy import event, exc
from sqlalchemy.pool import Pool, PoolProxiedConnection

Work: TypeAlias = Callable[[PoolProxiedConnection], object]
"""The work of a thread with its connection."""

WARM_UP = 0.3
"""Seconds that a load runs before it is measured: connections are opened, threads settle."""


@dataclass
class Share:
    """The share of one thread. Only that thread writes it."""

    checkouts: int = 0
    """Its checkouts during the measurement."""
    waited: float = 0.0
    """Seconds that it waited for them in all."""
    longest_wait: float = 0.0
    """Seconds.  A checkout that timed out and was tried again counts as one wait: how long the thread had no
    connection.  So the pool's timeout does not hide how long a thread starved."""
    timeouts: int = 0
    """How often a checkout timed out."""


@dataclass(frozen=True)
class Outcome:
    """The shares of all threads."""

    seconds: float
    """How long the measurement took."""
    shares: tuple[Share, ...] = field(repr=False)
    """One for each thread."""
    connects: int
    """Connections that the pools opened, warm-up included."""

    @property
    def counts(self) -> list[int]:
        """Checkouts per thread, in ascending order."""
        return sorted(share.checkouts for share in self.shares)

    @property
    def throughput(self) -> float:
        """Checkouts per second."""
        return sum(self.counts) / self.seconds

    @property
    def fewest(self) -> int:
        """The checkouts of the thread that got the fewest."""
        return self.counts[0]

    @property
    def median(self) -> float:
        """The checkouts of the thread in the middle."""
        return median(self.counts)

    @property
    def most(self) -> int:
        """The checkouts of the thread that got the most."""
        return self.counts[-1]

    @property
    def longest_wait(self) -> float:
        """Seconds that the unluckiest thread had no connection, see Share."""
        return max(share.longest_wait for share in self.shares)

    @property
    def mean_wait(self) -> float:
        """Seconds that a checkout waited on average."""
        return sum(share.waited for share in self.shares) / max(1, sum(self.counts))

    @property
    def timeouts(self) -> int:
        """How often checkouts timed out."""
        return sum(share.timeouts for share in self.shares)

    @property
    def jain(self) -> float:
        """Jain's fairness index over the checkouts per thread."""
        return jain(self.counts)


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all have the same, 1/n if one of n has everything.

    R. Jain, D. Chiu, W. Hawe: A quantitative measure of fairness, DEC TR-301, 1984.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def sleep_on_server(seconds: float) -> Work:
    """Work for a PostgreSQL: a statement that takes this long, in a transaction as usual."""
    statement = f"SELECT pg_sleep({seconds})"

    def work(connection: PoolProxiedConnection) -> None:
        with closing(connection.cursor()) as cursor:
            cursor.execute(statement)

    return work


def run(
    pools: Sequence[Pool], work: Work, *, threads: int, seconds: float, warm_up: float = WARM_UP
) -> Outcome:
    """Let ``threads`` threads, spread evenly over the pools, use connections for a while.

    :param seconds: how long to measure, after ``warm_up`` seconds that do not count.
    :raises Exception: the first error of a thread other than the pool's timeout, after all have ended.
    """
    load = _Load(work, threads, seconds, warm_up)
    connects: list[None] = []  # append() is atomic, += is not

    def connected(*_: Any) -> None:
        connects.append(None)

    for pool in pools:
        event.listen(pool, "connect", connected)
    try:
        shares = load.run([pools[number % len(pools)] for number in range(threads)])
    finally:
        for pool in pools:
            event.remove(pool, "connect", connected)
    return Outcome(seconds, shares, len(connects))


class _Load:
    """One run."""

    def __init__(self, work: Work, threads: int, seconds: float, warm_up: float) -> None:
        self._work = work
        self._seconds = seconds
        self._warm_up = warm_up
        self._ready = threading.Barrier(threads + 1)
        self._end = threading.Event()
        """Set when the time is up, a thread has failed, or the user pressed Ctrl-C."""
        self._from = self._until = 0.0
        """Checkouts between these two times count. Set before the barrier falls."""
        self._errors: list[BaseException] = []

    def run(self, pools: Sequence[Pool]) -> tuple[Share, ...]:
        shares = tuple(Share() for _ in pools)
        threads = [
            threading.Thread(target=self._thread, args=(pool, share), name=f"load {number}", daemon=True)
            for number, (pool, share) in enumerate(zip(pools, shares, strict=True))
        ]
        try:
            for thread in threads:
                thread.start()
            self._from = time.perf_counter() + self._warm_up
            self._until = self._from + self._seconds
            self._ready.wait()
            self._end.wait(self._until - time.perf_counter())
        except BaseException:  # Ctrl-C; or no more threads can be started
            self._ready.abort()
            raise
        finally:
            self._end.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._errors:
            raise self._errors[0]
        return shares

    def _thread(self, pool: Pool, share: Share) -> None:
        try:
            self._ready.wait()
            while not self._end.is_set():
                self._checkout(pool, share)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            self._errors.append(error)
            self._end.set()

    def _checkout(self, pool: Pool, share: Share) -> None:
        asked = time.perf_counter()
        while (connection := self._ask(pool, share)) is None:
            if self._end.is_set():
                return self._count(share, asked, served=False)
        with closing(connection):
            self._count(share, asked, served=True)
            self._work(connection)

    def _ask(self, pool: Pool, share: Share) -> PoolProxiedConnection | None:
        try:
            return pool.connect()
        except exc.TimeoutError:
            if time.perf_counter() >= self._from:
                share.timeouts += 1
            return None

    def _count(self, share: Share, asked: float, served: bool) -> None:
        now = time.perf_counter()
        if now < self._from:
            return
        # A thread may wait already when the measurement begins, or still when it ends.  The part of its wait
        # inside the measurement counts.
        waited = max(0.0, min(now, self._until) - max(asked, self._from))
        share.longest_wait = max(share.longest_wait, waited)
        if served and now < self._until:
            share.checkouts += 1
            share.waited += waited
