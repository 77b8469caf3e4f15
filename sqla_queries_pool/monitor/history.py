"""What pools did in the last minute: samples of their counters, taken while somebody looks."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..budget.stats import BOUNDS, Histogram
from ..pool import Pool, PoolManager

EVERY = 1.0
"""Seconds between two samples."""
WINDOW = 60.0
"""Seconds that are shown."""
GAP = 3.0
"""Seconds: two samples that are further apart say nothing about the time in between."""
LINGER = 15.0
"""Seconds for which sampling goes on after the last look."""


@dataclass(frozen=True)
class Sample:
    """A pool's counters at one moment."""

    at: float
    held: int
    waiting: int
    checkouts: int
    timeouts: int
    wait_time: Histogram = field(repr=False)
    use_time: Histogram = field(repr=False)


class History:
    """The last minute of all pools.

    Nothing runs while nobody looks: a look starts a thread that samples once per second, and ends when there
    was no look for a while.

    :param clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._samples: weakref.WeakKeyDictionary[Pool, deque[Sample]] = weakref.WeakKeyDictionary()
        self._last_sample = self._last_look = -float("inf")
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Somebody looks: there is a sample of this moment, and there will be others."""
        if self._process != os.getpid():  # forked: the parent's thread, lock and pools are not here
            self._begin()
        with self._lock:
            self._last_look = self._clock()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="QueriesPool monitor", daemon=True)
                self._thread.start()
        self.sample()

    @property
    def sampling(self) -> bool:
        """Does the thread run?"""
        return self._thread is not None and self._thread.is_alive()

    def sample(self) -> None:
        """Take a sample of all pools, unless the last one is a moment old."""
        with self._lock:
            now = self._clock()
            if now - self._last_sample < EVERY / 2:
                return
            self._last_sample = now
            for pool in PoolManager.pools():
                self._add(pool, now)

    def _add(self, pool: Pool, now: float) -> None:
        samples = self._samples.setdefault(pool, deque())
        n = pool.statistics()
        wait_time, use_time = n.wait_time, n.use_time
        if samples:  # what has not changed is kept once: a pool that rests takes no room
            wait_time = samples[-1].wait_time if samples[-1].wait_time == wait_time else wait_time
            use_time = samples[-1].use_time if samples[-1].use_time == use_time else use_time
        samples.append(Sample(now, n.held, n.waiting, n.checkouts, n.timeouts, wait_time, use_time))
        while samples[0].at < now - WINDOW - EVERY:
            samples.popleft()

    def _run(self) -> None:
        tick = threading.Event()
        while True:
            tick.wait(EVERY)
            with self._lock:
                if self._clock() - self._last_look > LINGER:
                    self._thread = None
                    return
            self.sample()

    def of(self, pool: Pool) -> Sequence[Sample]:
        """The samples of a pool, oldest first."""
        with self._lock:
            return tuple(self._samples.get(pool, ()))

    def now(self) -> float:
        """The time by its clock."""
        return self._clock()


def series(samples: Sequence[Sample], now: float) -> dict[str, list[Any]]:
    """What happened between each two samples, as columns; None where nothing can be said."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for before, after in itertools.pairwise(samples):
        if after.at - before.at > GAP or now - after.at > WINDOW:
            continue
        row = (round(now - after.at, 3), round(after.at - before.at, 3), after.held, after.waiting)
        for name, value in zip(COLUMNS, (*row, *between(before, after).values()), strict=False):
            columns[name].append(value)
    return columns


COLUMNS = (
    *("seconds_ago", "seconds", "held", "waiting"),
    *("checkouts_per_second", "timeouts", "wait_median", "wait_95", "use_median", "use_95"),
)


def between(before: Sample, after: Sample) -> dict[str, float | int | None]:
    """What happened between two samples."""
    waited, used = after.wait_time - before.wait_time, after.use_time - before.use_time
    return {
        "checkouts_per_second": round(max(0, after.checkouts - before.checkouts) / (after.at - before.at), 2),
        "timeouts": after.timeouts - before.timeouts,
        "wait_median": quantile(waited, 0.5),
        "wait_95": quantile(waited, 0.95),
        "use_median": quantile(used, 0.5),
        "use_95": quantile(used, 0.95),
    }


def minute(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What happened from the first sample to the last; None where there is one at most."""
    if len(samples) < 2:
        return None
    first, last = samples[0], samples[-1]
    return {"seconds": round(last.at - first.at, 3), **between(first, last)}


def quantile(histogram: Histogram, share: float) -> float | None:
    """The duration that this share of all did not exceed, as the buckets tell; None where there is none."""
    rest = share * histogram.count
    if rest <= 0:
        return None
    for count, low, high in zip(histogram.counts, (0.0, *BOUNDS), (*BOUNDS, BOUNDS[-1]), strict=True):
        if count >= rest:
            return float(f"{low + (high - low) * rest / count:.3g}")
        rest -= count
    return BOUNDS[-1]
