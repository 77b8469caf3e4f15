"""All pools of the process as Prometheus metrics.

    from sqla_queries_pool.exporters import prometheus

    prometheus.register()

Numbers are read when they are asked for: a checkout knows nothing of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ImportError(
        "sqla_queries_pool.exporters.prometheus needs the library prometheus_client: "
        "pip install 'sqla-queries-pool[prometheus]'"
    ) from error

from ..budget.ledger import ABANDONED, DISPOSED, GAVE_WAY, IDLE_TTL, LOWERED, REMOVED
from ..budget.stats import BOUNDS, Histogram, Statistics
from ..pool import PoolManager
from ..runtime.connections import DEAD, INVALIDATED, LIFETIME

PREFIX = "sqla_queries_pool_"
LABELS = ("pool", "database")
"""The pool id, and which database it is, without the password."""
STATES = ("idle", "held", "opening", "closing")

GAUGES: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    (
        "connections_max",
        "The limit of the database's connections, +Inf for no limit.",
        lambda pool: math.inf if pool.limit is None else pool.limit,
    ),
    ("connections_peak", "The most connections that were checked out at once.", lambda pool: pool.peak_held),
    ("waiting_checkouts", "Checkouts that wait for a connection now.", lambda pool: pool.waiting),
)
COUNTERS: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    (
        "checkouts",
        "Checkouts whose connection was returned or detached.",
        lambda pool: pool.checkouts,
    ),
    (
        "timeouts",
        "Checkouts that got no connection within their timeout, deadlocks included.",
        lambda pool: pool.timeouts,
    ),
    (
        "rejected",
        "Checkouts that the pool rejected before their timeout (max_waiting, queue_target and others).",
        lambda pool: pool.rejected,
    ),
    (
        "deadlocks",
        "Timeouts of checkouts that waited for each other.",
        lambda pool: pool.deadlocks,
    ),
    ("connects", "Connections that were opened.", lambda pool: pool.connects),
    ("connect_errors", "Attempts to open a connection that failed.", lambda pool: pool.connect_errors),
    (
        "evictions",
        "Idle connections that were closed to make room for another engine's.",
        lambda pool: pool.evictions,
    ),
    ("dead", "Connections that were found dead before they were used.", lambda pool: pool.dead),
    (
        "failed_resets",
        "Connections that could not be rolled back when they were returned.",
        lambda pool: pool.failed_resets,
    ),
    (
        "bypasses",
        "Connections that went to their own engine although another engine's checkout had waited longer.",
        lambda pool: pool.bypasses,
    ),
    ("mended", "Errors in the pool's bookkeeping that were repaired.", lambda pool: pool.mended),
)
HISTOGRAMS: tuple[tuple[str, str, Callable[[Statistics], Histogram]], ...] = (
    ("wait_seconds", "How long served checkouts waited in the queue.", lambda pool: pool.wait_time),
    ("use_seconds", "How long connections were checked out.", lambda pool: pool.use_time),
    ("connect_seconds", "How long it took to open a connection.", lambda pool: pool.connect_time),
)
REASONS = (ABANDONED, DEAD, DISPOSED, GAVE_WAY, IDLE_TTL, INVALIDATED, LIFETIME, LOWERED, REMOVED)
"""Exported from 0 on: the first one of a reason is no increase where there was no number before."""
LE = (*map(str, BOUNDS), "+Inf")
IDLE_IN_TRANSACTION = "How long checkouts were in a transaction while nothing executed, by label and caller."


class QueriesPoolCollector(Collector):
    """Tells the numbers of all pools, each time that it is asked."""

    def collect(self) -> Iterator[Metric]:
        """Return all metrics, those without a pool to tell of included."""
        pools = list(PoolManager.statistics().pools.values())
        yield _connections(pools)
        for name, text, number in GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
            for pool in pools:
                gauge.add_metric(_labels(pool), number(pool))
            yield gauge
        for name, text, number in COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            for pool in pools:
                counter.add_metric(_labels(pool), number(pool))
            yield counter
        yield _closes(pools)
        yield from _host(pools)
        yield from _classes(pools)
        for name, text, times in HISTOGRAMS:
            histogram = HistogramMetricFamily(PREFIX + name, text, labels=LABELS)
            for pool in pools:
                taken = times(pool)
                histogram.add_metric(_labels(pool), _buckets(taken), taken.seconds)
            yield histogram
        yield _idle_in_transaction(pools)


def register(registry: CollectorRegistry = REGISTRY) -> QueriesPoolCollector:
    """Have a registry, and so what serves it, tell the numbers of all pools of the process.

    :param registry: by default prometheus_client's own.
    :return: what was registered, for ``registry.unregister``.
    :raises ValueError: the registry has one already.
    """
    collector = QueriesPoolCollector()
    registry.register(collector)
    return collector


def _connections(pools: Iterable[Statistics]) -> Metric:
    connections = GaugeMetricFamily(
        f"{PREFIX}connections", "Connections by state.", labels=(*LABELS, "state")
    )
    for pool in pools:
        for state in STATES:
            connections.add_metric((*_labels(pool), state), getattr(pool, state))
    return connections


def _host(pools: Iterable[Statistics]) -> Iterator[Metric]:
    """Of pools that share a budget with other processes.  Each of them tells the same for the first."""
    budget = GaugeMetricFamily(
        f"{PREFIX}host_connections_max", "The limit that all processes of the host share.", labels=LABELS
    )
    leases = GaugeMetricFamily(
        f"{PREFIX}host_leases", "How many connections of it this process may have now.", labels=LABELS
    )
    for pool in pools:
        if pool.host is not None:
            budget.add_metric(_labels(pool), pool.host.budget)
            leases.add_metric(_labels(pool), pool.host.mine)
    yield from (budget, leases)


def _classes(pools: Iterable[Statistics]) -> Iterator[Metric]:
    """Of pools that have classes of callers."""
    labels = (*LABELS, "class")
    held = GaugeMetricFamily(
        f"{PREFIX}class_connections", "Connections that a class of callers has.", labels=labels
    )
    most = GaugeMetricFamily(
        f"{PREFIX}class_connections_max", "The ceiling of a class of callers, +Inf for none.", labels=labels
    )
    waiting = GaugeMetricFamily(
        f"{PREFIX}class_waiting_checkouts", "Checkouts of a class that wait now.", labels=labels
    )
    waits = HistogramMetricFamily(
        f"{PREFIX}class_wait_seconds", "How long served checkouts of a class waited.", labels=labels
    )
    for pool in pools:
        for name, each in pool.classes.items():
            which = (*_labels(pool), name)
            held.add_metric(which, each.held)
            most.add_metric(which, math.inf if each.max is None else each.max)
            waiting.add_metric(which, each.waiting)
            waits.add_metric(which, _buckets(each.wait_time), each.wait_time.seconds)
    yield from (held, most, waiting, waits)


def _closes(pools: Iterable[Statistics]) -> Metric:
    closes = CounterMetricFamily(
        f"{PREFIX}closes", "Connections that were closed, by reason.", labels=(*LABELS, "reason")
    )
    for pool in pools:
        for reason, number in {**dict.fromkeys(REASONS, 0), **pool.closes}.items():
            closes.add_metric((*_labels(pool), reason), number)
    return closes


def _idle_in_transaction(pools: Iterable[Statistics]) -> Metric:
    """Of engines that state ``idle_in_transaction_after``; the label is the application's, or empty."""
    name = f"{PREFIX}idle_in_transaction_seconds"
    histogram = HistogramMetricFamily(name, IDLE_IN_TRANSACTION, labels=(*LABELS, "label", "caller"))
    for pool in pools:
        for each in pool.idle_in_transaction:
            labels = (*_labels(pool), _shown(each.label or ""), _shown(each.caller or ""))
            histogram.add_metric(labels, _buckets(each.time), each.time.seconds)
    return histogram


def _buckets(taken: Histogram) -> list[tuple[str, float]]:
    return list(zip(LE, itertools.accumulate(taken.counts), strict=True))


def _labels(pool: Statistics) -> tuple[str, str]:
    return _shown(pool.pid), _shown(pool.label)


def _shown(text: str) -> str:
    """A name may be what no page can show: half a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()
