"""All pools of the process as OpenTelemetry metrics, by the semantic conventions for connection pools.

    from sqla_queries_pool.exporters import opentelemetry

    opentelemetry.instrument()

https://opentelemetry.io/docs/specs/semconv/db/database-metrics/#connection-pools

Numbers are read when a reader collects: a checkout knows nothing of it.  OpenTelemetry has no instrument
that is asked for a histogram (https://github.com/open-telemetry/opentelemetry-python/issues/4768), so what
took time since the last collection is recorded then: as many as there were in each bucket, with values that
add up to the true sum.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

try:
    from opentelemetry import metrics
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
except ModuleNotFoundError as error:
    raise ImportError(
        "sqla_queries_pool.exporters.opentelemetry needs the library opentelemetry-api: "
        "pip install 'sqla-queries-pool[opentelemetry]'"
    ) from error

from ..budget.stats import BOUNDS, ClassStatistics, Histogram, Statistics
from ..pool import Pool, PoolManager

PREFIX = "db.client.connection."
NAME, STATE, CLASS = f"{PREFIX}pool.name", f"{PREFIX}state", f"{PREFIX}class"
LABEL, CALLER = f"{PREFIX}label", f"{PREFIX}caller"
OBSERVED: tuple[tuple[str, str, str, Callable[[Statistics], float | None]], ...] = (
    ("max", "{connection}", "The maximum number of open connections allowed.", lambda pool: pool.limit),
    (
        "host.leases",
        "{connection}",
        "The connections that this process may have now, of a limit that all processes of the host share.",
        lambda pool: None if pool.host is None else pool.host.mine,
    ),
    # Of as many as there may be, any number may be idle.
    (
        "idle.max",
        "{connection}",
        "The maximum number of idle open connections allowed.",
        lambda pool: pool.limit,
    ),
    (
        "pending_requests",
        "{request}",
        "The number of current pending requests for an open connection.",
        lambda pool: pool.waiting,
    ),
)
CLASSES: tuple[tuple[str, str, str, Callable[[ClassStatistics], float | None]], ...] = (
    ("count", "{connection}", "The connections that a class of callers has.", lambda each: each.held),
    ("max", "{connection}", "The most connections that a class of callers may have.", lambda each: each.max),
    (
        "pending_requests",
        "{request}",
        "The number of current pending requests of a class of callers.",
        lambda each: each.waiting,
    ),
)
TIMES: tuple[tuple[str, str, Callable[[Statistics], Histogram]], ...] = (
    ("create_time", "The time it took to create a new connection.", lambda pool: pool.connect_time),
    (
        "wait_time",
        "The time it took to obtain an open connection from the pool.",
        lambda pool: pool.wait_time,
    ),
    (
        "use_time",
        "The time between borrowing a connection and returning it to the pool.",
        lambda pool: pool.use_time,
    ),
)


def instrument(meter_provider: MeterProvider | None = None) -> None:
    """Tell the readers of a meter provider the numbers of all pools, and what they do from now on.

    :param meter_provider: by default the global one, which may be set later.  A second call for the same one
        adds nothing.
    """
    _Feed(metrics.get_meter("sqla_queries_pool", meter_provider=meter_provider))


@dataclass(frozen=True)
class _Exported:
    """What was exported of a pool so far."""

    timeouts: int = 0
    times: tuple[Histogram, ...] = field(default=(Histogram(),) * len(TIMES))
    idle: Mapping[tuple[str | None, str | None], Histogram] = field(default_factory=dict)
    """By label and class of callers."""

    @classmethod
    def by(cls, pool: Statistics) -> _Exported:
        """All that there is to export."""
        idle = {(each.label, each.caller): each.time for each in pool.idle_in_transaction}
        return cls(pool.timeouts, tuple(times(pool) for _, _, times in TIMES), idle)

    def exceeds(self, other: _Exported) -> bool:
        """Is it more?  Then the other began again, as after a fork."""
        pairs = zip(self.times, other.times, strict=True)
        return self.timeouts > other.timeouts or any(a.count > b.count for a, b in pairs)


class _Feed:
    """The instruments of one provider."""

    def __init__(self, meter: metrics.Meter) -> None:
        self._lock = threading.Lock()
        self._told: weakref.WeakKeyDictionary[Pool, _Exported] = weakref.WeakKeyDictionary()
        for pool in PoolManager.pools():
            self._told[pool] = _Exported.by(pool.statistics())
        self._timeouts = meter.create_counter(
            f"{PREFIX}timeouts",
            "{timeout}",
            "The number of connection timeouts that have occurred trying to obtain a connection "
            "from the pool.",
        )
        self._times = [
            meter.create_histogram(f"{PREFIX}{name}", "s", text, explicit_bucket_boundaries_advisory=BOUNDS)
            for name, text, _ in TIMES
        ]
        self._idle = meter.create_histogram(
            f"{PREFIX}idle_in_transaction_time",
            "s",
            "The time that connections were held in a transaction while nothing executed.",
            explicit_bucket_boundaries_advisory=BOUNDS,
        )
        for name, unit, text, number in OBSERVED:
            meter.create_observable_up_down_counter(f"{PREFIX}{name}", [_observer(number)], unit, text)
        for name, unit, text, of_class in CLASSES:
            meter.create_observable_up_down_counter(
                f"{PREFIX}class.{name}", [_class_observer(of_class)], unit, text
            )
        meter.create_observable_up_down_counter(
            f"{PREFIX}count",
            [self._observe],
            "{connection}",
            "The number of connections that are currently in state described by the `state` attribute.",
        )

    def _observe(self, _: CallbackOptions) -> Iterator[Observation]:
        """Called for each collection, and what it records is collected with it."""
        for pool, attributes in _named():
            with self._lock:  # readers may collect at the same time
                now = pool.statistics()
                self._record(pool, _Exported.by(now), attributes)
            yield Observation(now.idle, {**attributes, STATE: "idle"})
            yield Observation(now.held, {**attributes, STATE: "used"})

    def _record(self, pool: Pool, now: _Exported, attributes: dict[str, str]) -> None:
        """Record what came since the last time."""
        told = self._told.get(pool, _Exported())
        if told.exceeds(now):
            told = _Exported()
        self._timeouts.add(now.timeouts - told.timeouts, attributes)
        recorded = [
            _record_more(instrument, before, after, attributes)
            for instrument, before, after in zip(self._times, told.times, now.times, strict=True)
        ]
        idle = {}
        for key, after in now.idle.items():
            named = {name: said for name, said in zip((LABEL, CALLER), key, strict=True) if said is not None}
            before = told.idle.get(key, Histogram())
            idle[key] = _record_more(self._idle, before, after, {**attributes, **named})
        self._told[pool] = _Exported(now.timeouts, tuple(recorded), idle)


def _record_more(
    instrument: metrics.Histogram, before: Histogram, after: Histogram, attributes: dict[str, str]
) -> Histogram:
    """Record what came between two looks, and return all that was recorded.

    Where a sum was read later than its buckets, the rest follows.
    """
    seconds = before.seconds
    for value, number in values(after - before):
        for _ in range(number):
            instrument.record(value, attributes)
        seconds += value * number
    return Histogram(after.counts, seconds)


def values(histogram: Histogram) -> Iterator[tuple[float, int]]:
    """Make up durations, and how many of each there were, with the buckets and the sum of a histogram.

    Each bucket has one, and all lie at the same part of the way from one bound to the next.
    """
    lows = (0.0, *BOUNDS)
    more = max(0.0, histogram.seconds - sum(n * low for n, low in zip(histogram.counts, lows, strict=True)))
    longest = more / max(1, histogram.counts[-1])  # if all the rest belongs to those above all bounds
    highs = (*BOUNDS, BOUNDS[-1] + longest)
    buckets = list(zip(histogram.counts, lows, highs, strict=True))
    room = sum(n * (high - low) for n, low, high in buckets)
    part = min(1.0, more / room) if room else 0.0
    for n, low, high in buckets:
        if n:
            # A bound belongs to the bucket below it.
            yield max(math.nextafter(low, math.inf), min(high, low + part * (high - low))), n


def _observer(
    number: Callable[[Statistics], float | None],
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for pool, attributes in _named():
            if (now := number(pool.statistics())) is not None:
                yield Observation(now, attributes)

    return observe


def _class_observer(
    number: Callable[[ClassStatistics], float | None],
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for pool, attributes in _named():
            for name, each in pool.statistics().classes.items():
                if (now := number(each)) is not None:
                    yield Observation(now, {**attributes, CLASS: name})

    return observe


def _named() -> Iterator[tuple[Pool, dict[str, str]]]:
    """All pools with their names: what the database is called, and the pool id where two are called so."""
    pools = PoolManager.pools()
    called = Counter(pool.label for pool in pools)
    for pool in pools:
        yield pool, {NAME: pool.label if called[pool.label] == 1 else f"{pool.label} ({pool.id})"}
