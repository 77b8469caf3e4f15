from __future__ import annotations

import math
import subprocess
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine

pytest.importorskip("opentelemetry.sdk.metrics")

import psycopg2
from opentelemetry.metrics import CallbackOptions
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
    Sum,
)
from opentelemetry.semconv._incubating.metrics import db_metrics

from sqla_queries_pool import CheckoutTimeout, Pool, PoolManager, QueriesPool
from sqla_queries_pool.budget import stats
from sqla_queries_pool.budget.stats import BOUNDS
from sqla_queries_pool.exporters import opentelemetry
from sqla_queries_pool.exporters.opentelemetry import NAME, PREFIX, STATE

DELTA = dict.fromkeys((Counter, Histogram), AggregationTemporality.DELTA)
Provide = Callable[..., MeterProvider]
Eventually = Callable[..., None]


@pytest.fixture
def provide(no_other_pools: None) -> Iterator[Provide]:
    """Make a meter provider that measures the pools: `provide(reader, …)`."""
    made: list[MeterProvider] = []

    def make(*readers: Any) -> MeterProvider:
        made.append(MeterProvider(readers, shutdown_on_exit=False))
        opentelemetry.instrument(made[-1])
        return made[-1]

    yield make
    for provider in made:
        provider.shutdown()


@pytest.fixture
def reader(provide: Provide) -> InMemoryMetricReader:
    """Reads what a provider was told."""
    made = InMemoryMetricReader()
    provide(made)
    return made


@pytest.fixture
def engine(pg_url: str, reader: InMemoryMetricReader) -> Iterator[Engine]:
    """An engine with two connections at most, made after its reader."""
    made = create_engine(pg_url, poolclass=QueriesPool, max_size=2)
    yield made
    made.dispose()


def pool_of(engine: Engine) -> Pool:
    """The pool of an engine."""
    assert isinstance(engine.pool, QueriesPool)
    [pool] = [pool for pool in PoolManager.pools() if pool.id == engine.pool.pid]
    return pool


def use(engine: Engine, times: int = 1) -> None:
    """Check out, ask the server something, check in."""
    for _ in range(times):
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")


def in_queue(engine: Engine, eventually: Eventually, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Have a thread wait for a connection, do something meanwhile, and let it have one."""
    thread = threading.Thread(target=use, args=(engine,))
    with engine.connect(), engine.connect():
        thread.start()
        eventually(lambda: pool_of(engine).statistics().waiting == 1, "a thread in the queue")
        meanwhile()
    thread.join()


def time_out(engine: Engine) -> None:
    """Ask for a connection where there is none."""
    impatient = create_engine(engine.url, poolclass=QueriesPool, max_size=2, pool_timeout=0)
    with engine.connect(), engine.connect(), pytest.raises(CheckoutTimeout):
        impatient.connect()
    impatient.dispose()


def metrics_of(data: MetricsData | None) -> dict[str, Metric]:
    """What was collected, by name without the prefix."""
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
    return {metric.name.removeprefix(PREFIX): metric for scope in scopes for metric in scope.metrics}


def collected(reader: InMemoryMetricReader) -> dict[tuple[str, ...], Any]:
    """All data points: (metric, pool name, the state where it has one) -> point."""
    return {
        (name, *(str(attributes[key]) for key in (NAME, STATE) if key in attributes)): point
        for name, metric in metrics_of(reader.get_metrics_data()).items()
        for point in metric.data.data_points
        for attributes in [point.attributes or {}]
    }


def test_names_units_and_kinds_are_those_of_the_semantic_conventions(
    reader: InMemoryMetricReader, engine: Engine, eventually: Eventually
) -> None:
    """They are what OpenTelemetry's own package of conventions makes."""
    in_queue(engine, eventually)
    made = metrics_of(reader.get_metrics_data())
    assert set(made) == {
        *("count", "idle.max", "max", "pending_requests", "timeouts"),
        *("create_time", "wait_time", "use_time"),
    }
    theirs = InMemoryMetricReader()
    provider = MeterProvider([theirs], shutdown_on_exit=False)
    for name in made:
        create = getattr(db_metrics, f"create_{PREFIX}{name}".replace(".", "_"))
        instrument = create(provider.get_meter("conventions"))
        (instrument.record if isinstance(instrument, Histogram) else instrument.add)(1)
    for name, metric in metrics_of(theirs.get_metrics_data()).items():
        assert made[name].unit == metric.unit
        assert (made[name].description or "").rstrip(".") == (metric.description or "").rstrip(".")
        ours = made[name].data
        assert type(ours) is type(metric.data)
        if isinstance(metric.data, Sum):
            assert isinstance(ours, Sum)
            assert ours.is_monotonic == metric.data.is_monotonic
    provider.shutdown()


def test_what_is_there_is_told_by_state(
    reader: InMemoryMetricReader, engine: Engine, eventually: Eventually
) -> None:
    """How many are used, idle and allowed, and how many wait, at the moment of the collection."""
    name = pool_of(engine).label
    seen: dict[tuple[str, ...], Any] = {}
    use(engine)
    with engine.connect():
        points = collected(reader)
        assert (points["count", name, "used"].value, points["count", name, "idle"].value) == (1, 0)
        assert points["pending_requests", name].value == 0
    in_queue(engine, eventually, lambda: seen.update(collected(reader)))
    assert (seen["count", name, "used"].value, seen["count", name, "idle"].value) == (2, 0)
    assert seen["pending_requests", name].value == 1
    points = collected(reader)
    assert (points["count", name, "used"].value, points["count", name, "idle"].value) == (0, 2)
    assert (points["max", name].value, points["idle.max", name].value) == (2, 2)


def test_a_pool_without_a_limit_tells_none(reader: InMemoryMetricReader, engine: Engine) -> None:
    """No number means no limit; 0 or a large one would be wrong."""
    name = pool_of(engine).label
    PoolManager.set_max_size(pool_of(engine).id, None)
    points = collected(reader)
    assert ("max", name) not in points
    assert ("idle.max", name) not in points
    assert ("count", name, "idle") in points


def test_durations_have_the_pools_own_buckets_and_sums(
    reader: InMemoryMetricReader, engine: Engine, eventually: Eventually
) -> None:
    """Collected now and then, each bucket has as many as the pool counted, and the sum is the pool's."""
    name = pool_of(engine).label
    for times in (1, 20, 0, 5):
        use(engine, times)
        in_queue(engine, eventually)
        points, now = collected(reader), pool_of(engine).statistics()
        for metric, histogram in (
            ("create_time", now.connect_time),
            ("wait_time", now.wait_time),
            ("use_time", now.use_time),
        ):
            point = points[metric, name]
            assert tuple(point.explicit_bounds) == BOUNDS
            assert tuple(point.bucket_counts) == histogram.counts
            assert point.sum == pytest.approx(histogram.seconds)
    assert (now.connect_time.count, now.wait_time.count, now.use_time.count) == (2, 4, 26 + 4 * 3)


def test_checkouts_that_got_nothing_are_counted(reader: InMemoryMetricReader, engine: Engine) -> None:
    """From 0 on, so that the first one shows as a difference."""
    name = pool_of(engine).label
    assert collected(reader)["timeouts", name].value == 0
    time_out(engine)
    time_out(engine)
    assert collected(reader)["timeouts", name].value == 2
    assert collected(reader)["timeouts", name].value == 2


def test_readers_of_one_provider_each_get_all_of_it(provide: Provide, pg_url: str) -> None:
    """One reads the sums and one what is new, whichever of them collects first."""
    sums, news = InMemoryMetricReader(), InMemoryMetricReader(preferred_temporality=DELTA)  # type: ignore[arg-type]
    provide(sums, news)
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=2)
    name = pool_of(engine).label
    for order in ((sums, news), (news, sums)):
        use(engine, 3)
        points = {reader: collected(reader) for reader in order}
        assert points[news]["use_time", name].count == 3
    assert points[sums]["use_time", name].count == 6
    assert points[sums]["use_time", name].sum == pytest.approx(pool_of(engine).statistics().use_time.seconds)
    engine.dispose()


def test_providers_do_not_take_from_each_other(provide: Provide, pg_url: str) -> None:
    """Each has told its readers everything."""
    readers = [InMemoryMetricReader(), InMemoryMetricReader()]
    for reader in readers:
        provide(reader)
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=2)
    use(engine, 3)
    name = pool_of(engine).label
    assert [collected(reader)["use_time", name].count for reader in readers] == [3, 3]
    engine.dispose()


def test_what_was_done_before_is_not_told(provide: Provide, pg_url: str) -> None:
    """The sums begin where the provider got the pools, however long the process had run."""
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=2)
    use(engine, 5)
    reader = InMemoryMetricReader()
    provide(reader)
    use(engine, 2)
    points = collected(reader)
    assert points["use_time", pool_of(engine).label].count == 2
    assert ("create_time", pool_of(engine).label) not in points
    engine.dispose()


def test_a_second_call_changes_nothing(
    provide: Provide, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is told twice, and no SDK has to warn of instruments that it has already."""
    other = InMemoryMetricReader()
    opentelemetry.instrument(provide(other))
    use(engine, 3)
    name = pool_of(engine).label
    assert collected(other)["use_time", name].count == 3
    assert collected(other)["count", name, "idle"].value == 1
    assert not caplog.records


def test_the_global_provider_may_be_set_later() -> None:
    """`instrument()` before and after it is set, and once with itself: once in all."""
    code = """
from sqlalchemy import create_engine
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqla_queries_pool import QueriesPool
from sqla_queries_pool.exporters import opentelemetry

opentelemetry.instrument()
provider = MeterProvider([reader := InMemoryMetricReader()])
metrics.set_meter_provider(provider)
opentelemetry.instrument()
opentelemetry.instrument(provider)
engine = create_engine("sqlite://", poolclass=QueriesPool)
engine.connect().close()
[resource] = reader.get_metrics_data().resource_metrics
[scope] = resource.scope_metrics
found = {metric.name: metric for metric in scope.metrics}
[point] = found["db.client.connection.use_time"].data.data_points
assert point.count == 1, point
"""
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert said.stderr == ""


def test_pools_that_are_called_alike_have_different_names(reader: InMemoryMetricReader, pg_url: str) -> None:
    """A name is unique in the application, and never has a password in it."""
    dsn = pg_url.replace("+psycopg2", "")
    engines = [
        create_engine("postgresql+psycopg2://", poolclass=QueriesPool, creator=lambda: psycopg2.connect(dsn))
        for _ in range(2)
    ]
    for engine in engines:
        use(engine)
    named = create_engine(pg_url, poolclass=QueriesPool, pool_id="shop")
    use(named)
    names = {key[1] for key in collected(reader)}
    assert {f"{pool.label} ({pool.id})" for pool in map(pool_of, engines)} <= names
    assert "shop" in names
    password = named.url.password
    assert password
    assert not any(password in name for name in names)
    for engine in (*engines, named):
        engine.dispose()


def test_a_pool_that_begins_anew_is_told_from_its_beginning(
    reader: InMemoryMetricReader, engine: Engine
) -> None:
    """Numbers that are smaller than before are not those from before: a forked child's, for one."""
    name = pool_of(engine).label
    use(engine, 5)
    assert collected(reader)["use_time", name].count == 5
    ledger = inside.ledger(pool_of(engine))
    ledger.totals = totals = stats.Totals()
    ledger.used = totals.used
    use(engine, 2)
    assert collected(reader)["use_time", name].count == 7


def test_collections_at_the_same_time_tell_everything_once(
    reader: InMemoryMetricReader, provide: Provide, engine: Engine
) -> None:
    """The SDK's readers take turns today; OpenTelemetry asks callbacks not to rely on it."""
    feed = inside.feed(provide(other := InMemoryMetricReader()).get_meter("feed"))
    use(engine, 300)
    together = threading.Barrier(4)

    def collect() -> None:
        together.wait()
        list(inside.observe(feed, CallbackOptions()))

    threads = [threading.Thread(target=collect) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    data = other.get_metrics_data()
    assert data is not None
    scopes = data.resource_metrics[0].scope_metrics
    [found] = [scope for scope in scopes if scope.scope.name == "feed"]
    [point] = [
        point
        for metric in found.metrics
        if metric.name == f"{PREFIX}use_time"
        for point in metric.data.data_points
        if (point.attributes or {}).get(NAME) == pool_of(engine).label
    ]
    assert isinstance(point, HistogramDataPoint)
    assert point.count == 300


class Kept(MetricExporter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[MetricsData] = []

    def export(self, metrics_data: MetricsData, *_: Any, **__: Any) -> MetricExportResult:
        self.given.append(metrics_data)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, *_: Any, **__: Any) -> None:
        pass


def test_a_reader_with_a_thread_of_its_own_exports_while_connections_are_in_use(
    provide: Provide, pg_url: str, eventually: Eventually
) -> None:
    """Collections that meet checkouts lose none, and count none twice."""
    exporter = Kept()
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=10)
    provider = provide(reader)
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=2)
    threads = [threading.Thread(target=use, args=(engine, 200)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    provider.force_flush()
    eventually(lambda: len(exporter.given) > 2, "exports by the reader's thread")
    [point] = [
        point
        for point in metrics_of(exporter.given[-1])["use_time"].data.data_points
        if (point.attributes or {}).get(NAME) == pool_of(engine).label
    ]
    assert isinstance(point, HistogramDataPoint)
    now = pool_of(engine).statistics().use_time
    assert tuple(point.bucket_counts) == now.counts
    assert point.sum == pytest.approx(now.seconds)
    assert now.count == 800
    engine.dispose()


on_any_machine = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine may take any time."""


@on_any_machine
@given(st.lists(st.floats(0, 1000, allow_subnormal=False) | st.sampled_from(BOUNDS), max_size=50))
@example([math.nextafter(60.0, math.inf)])
@example([0.0, 60.0, 61.0])
@example([0.0])
def test_made_up_durations_have_the_true_buckets_and_sum(durations: list[float]) -> None:
    """For whatever was measured, bounds included."""
    counted = stats.Durations()
    for seconds in durations:
        counted.add(seconds)
    made = list(opentelemetry.values(counted.frozen()))
    counts = [0] * (len(BOUNDS) + 1)
    for value, number in made:
        counts[bisect_left(BOUNDS, value)] += number
    assert counts == counted.counts
    total = math.fsum(value * number for value, number in made)
    assert total == pytest.approx(counted.seconds, rel=1e-9, abs=1e-12)


@on_any_machine
@given(st.lists(st.integers(0, 5), min_size=len(BOUNDS) + 1, max_size=len(BOUNDS) + 1), st.floats(0, 1000))
def test_buckets_that_do_not_fit_their_sum_are_kept(counts: list[int], seconds: float) -> None:
    """The two are read one after the other; then the buckets are right, and the sum is at the nearest end."""
    made = list(opentelemetry.values(stats.Histogram(tuple(counts), seconds)))
    found = [0] * len(counts)
    for value, number in made:
        found[bisect_left(BOUNDS, value)] += number
    assert found == counts
    least = sum(n * low for n, low in zip(counts, (0.0, *BOUNDS), strict=True))
    most = math.inf if counts[-1] else sum(n * high for n, high in zip(counts, BOUNDS, strict=False))
    assert math.fsum(value * number for value, number in made) == pytest.approx(
        min(max(seconds, least), most)
    )


def test_a_sum_that_was_read_late_follows(reader: InMemoryMetricReader, engine: Engine) -> None:
    """What could not be recorded with its bucket is recorded with the next one."""
    name = pool_of(engine).label
    totals = inside.ledger(pool_of(engine)).totals
    totals.used.counts[bisect_left(BOUNDS, 0.7)] += 1  # as between the two lines of `add`
    assert collected(reader)["use_time", name].count == 1
    totals.used.seconds += 0.7
    totals.used.add(0.6)
    point = collected(reader)["use_time", name]
    assert (point.count, point.sum) == (2, pytest.approx(1.3))


def test_without_the_library_the_error_names_the_extra() -> None:
    """Somebody who imports it without the extra is told what to install."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "try: import sqla_queries_pool.exporters.opentelemetry\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert "sqla-queries-pool[opentelemetry]" in said.stdout
