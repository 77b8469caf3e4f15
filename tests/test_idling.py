"""Time in a transaction in which nothing executes: the housekeeper samples it, and logs it once."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
from fakes import FakeClock
from hazards import Thread
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_queries_pool import BOUNDS, QueriesPool, labelled
from sqla_queries_pool.logs import NAME
from sqla_queries_pool.monitor.data import collect
from sqla_queries_pool.monitor.history import History
from sqla_queries_pool.monitor.page import document
from sqla_queries_pool.monitor.text import picture
from sqla_queries_pool.runtime.idling import MOST_LABELS, OTHERS
from sqla_queries_pool.sockets.transactions import EXECUTING, IN_TRANSACTION, of_server

Eventually = Callable[..., None]
MakeEngine = Callable[..., Engine]


@pytest.fixture
def engine(pid: str, tmp_path: Path) -> Iterator[MakeEngine]:
    """Engines of one pool whose time is the test's; the test looks, not the housekeeper."""
    made: list[Engine] = []

    def make(after: float | None = 5.0, **options: Any) -> Engine:
        new = create_engine(
            f"sqlite:///{tmp_path}/shop.db",
            poolclass=QueriesPool,
            pool_id=pid,
            idle_in_transaction_after=after,
            **options,
        )
        inside.idling_by_hand(new)
        with new.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
        made.append(new)
        return new

    yield make
    for each in made:
        each.dispose()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged of it, without the label of the pool."""
    caplog.set_level(logging.WARNING, NAME)
    said = ": a connection has been idle in a transaction for "
    return lambda: [m.partition(said)[2] for r in caplog.records if said in (m := r.getMessage())]


def insert(connection: Any) -> None:
    """Begin a transaction."""
    connection.execute(text("INSERT INTO t VALUES (1)"))


def test_it_is_logged_once_with_its_holder_and_counted_when_it_ends(
    engine: MakeEngine, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """Of each checkout, what was idle in it together, in a transaction only, between two looks as one."""
    shop = engine(track_stacks=True)
    look = inside.idling_by_hand(shop)
    for _ in range(2):
        with labelled("POST /order"), shop.connect() as connection:
            clock.now += 100.0
            look()  # no transaction yet
            insert(connection)
            for _ in range(4):
                clock.now += 1.0
                look()
            connection.commit()
            clock.now += 100.0
            look()  # no transaction any more
            assert len(lines()) in (0, 1)
            insert(connection)
            clock.now += 1.0
            look()
            clock.now += 1.0
            look()
        look()
    first, second = lines()
    assert first.startswith("5.0 s: MainThread [POST /order] (205.0 s, in transaction)\n")
    assert re.search(r"  checked out at \S*test_idling\.py:\d+ in test_it_is_logged_once\w+$", first)
    assert second == first
    (order,) = shop.pool.statistics().idle_in_transaction  # type: ignore[attr-defined]
    assert (order.label, order.caller, order.time.count, order.time.seconds) == ("POST /order", None, 2, 12.0)
    assert order.time.counts[BOUNDS.index(10.0)] == 2


def test_the_next_holder_begins_anew(
    engine: MakeEngine, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """The same connection, returned and taken between two looks; the time before its checkout is not its."""
    shop = engine()
    look = inside.idling_by_hand(shop)
    for _ in range(3):
        with shop.connect() as connection:
            insert(connection)
            clock.now += 4.0
            look()
        clock.now += 2.0
        with shop.connect() as connection:
            insert(connection)
            clock.now += 2.0
            look()
    look()
    assert lines() == []
    (found,) = shop.pool.statistics().idle_in_transaction  # type: ignore[attr-defined]
    assert (found.label, found.time.count, found.time.seconds) == (None, 6, 18.0)


def test_engines_that_do_not_state_it_are_not_looked_at(
    engine: MakeEngine, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """Off by default: of the same pool, the one that states it is counted alone."""
    engine(5.0)
    other = engine(None)
    look = inside.idling_by_hand(other)
    with other.connect() as connection:
        insert(connection)
        look()
        clock.now += 60.0
        look()
    look()
    assert lines() == []
    assert other.pool.statistics().idle_in_transaction == ()  # type: ignore[attr-defined]


def test_labels_without_end_share_one_histogram(engine: MakeEngine, clock: FakeClock) -> None:
    """The first ones have their own."""
    shop = engine()
    look = inside.idling_by_hand(shop)
    for number in range(MOST_LABELS + 3):
        with labelled(f"GET /{number}"), shop.connect() as connection:
            insert(connection)
            clock.now += 1.0
            look()
    look()
    worst, *rest = shop.pool.statistics().idle_in_transaction  # type: ignore[attr-defined]
    assert (worst.label, worst.time.seconds, len(rest)) == (OTHERS, 3.0, MOST_LABELS)


def test_what_shows_a_pool_shows_the_worst_labels(
    no_other_pools: None, engine: MakeEngine, clock: FakeClock
) -> None:
    """The page, the terminal, Prometheus and OpenTelemetry."""
    prometheus = pytest.importorskip("prometheus_client")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    console = pytest.importorskip("rich.console").Console(width=120, record=True, file=io.StringIO())
    from sqla_queries_pool.exporters import opentelemetry
    from sqla_queries_pool.exporters import prometheus as exporter

    shop = engine()
    reader, registry = export.InMemoryMetricReader(), prometheus.CollectorRegistry()
    opentelemetry.instrument(sdk.MeterProvider([reader]))
    exporter.register(registry)
    look = inside.idling_by_hand(shop)
    for label, seconds in (("GET /<slow>", 3.0), ("GET /fast", 1.0)):
        with labelled(label), shop.connect() as connection:
            insert(connection)
            clock.now += seconds
            look()
    look()
    data = collect(History())
    shown = re.sub(r"<.*?>", " ", document(data, ""))
    assert re.search(
        r"worst labels first\s+3\.0 s\s+GET /&lt;slow&gt;\s+in 1 of its checkouts\s+1\.0 s\s+GET /fast", shown
    )
    console.print(picture(data))
    assert "idle in a transaction: GET /<slow> 3.0 s, GET /fast 1.0 s" in console.export_text()
    labels = {"database": inside.shared(shop).label, "pool": inside.shared(shop).id, "caller": ""}
    name = f"{exporter.PREFIX}idle_in_transaction_seconds"
    assert registry.get_sample_value(f"{name}_sum", {**labels, "label": "GET /<slow>"}) == 3.0
    assert registry.get_sample_value(f"{name}_bucket", {**labels, "label": "GET /fast", "le": "1.0"}) == 1.0
    for _ in range(2):  # cumulative: what was recorded is not recorded again
        (resource,) = reader.get_metrics_data().resource_metrics
        metrics = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
        points = metrics[f"{opentelemetry.PREFIX}idle_in_transaction_time"].data.data_points
        found = {point.attributes[opentelemetry.LABEL]: (point.count, point.sum) for point in points}
        assert found == {"GET /<slow>": (1, 3.0), "GET /fast": (1, 1.0)}


def test_the_housekeeper_looks_while_there_is_something_to_look_at(
    tmp_path: Path, lines: Callable[[], list[str]], eventually: Eventually
) -> None:
    """From the first connection on, by itself; else it stops. Not for an engine that states nothing."""
    url = f"sqlite:///{tmp_path}/shop.db"
    quiet = create_engine(url, poolclass=QueriesPool, pool_id=f"quiet {tmp_path}")
    quiet.connect().close()
    assert not inside.watches_idling(quiet)
    shop = create_engine(
        url, poolclass=QueriesPool, pool_id=f"shop {tmp_path}", idle_in_transaction_after="0.01"
    )
    assert not inside.watches_idling(shop)
    with shop.connect() as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
        insert(connection)
        eventually(lines, "the line")
    shop.dispose()
    eventually(lambda: not inside.watches_idling(shop), "that it stops")
    with shop.connect() as connection:
        insert(connection)
        eventually(lambda: len(lines()) == 2, "the line of another connection")
    shop.dispose()
    quiet.dispose()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_what_executes_is_not_idle(driver: str, pg_url: str, eventually: Eventually) -> None:
    """Any thread may ask, also while a statement executes: here it waits for a lock."""
    lock = text("SELECT pg_advisory_xact_lock(16)")
    pool = create_engine(make_url(pg_url).set(drivername=f"postgresql+{driver}"), poolclass=QueriesPool)
    with pool.connect() as connection:
        handle = connection.connection.dbapi_connection
        with pool.begin() as other:
            other.execute(lock)
            waits = Thread(lambda: connection.execute(lock))
            eventually(lambda: of_server(handle)[1] == EXECUTING, "that it executes")
        waits.join()
        assert of_server(handle)[1] == IN_TRANSACTION
    pool.dispose()


def test_what_executes_in_a_loop_is_not_idle(pg_url: str) -> None:
    """asyncpg does not tell; SQLAlchemy's adapter does."""

    async def work() -> None:
        url = make_url(pg_url).set(drivername="postgresql+asyncpg")
        engine = create_async_engine(url, poolclass=QueriesPool)
        async with engine.connect() as connection:
            handle = (await connection.get_raw_connection()).dbapi_connection
            await connection.execute(text("SELECT 1"))
            assert of_server(handle)[1] == IN_TRANSACTION
            executing = asyncio.ensure_future(connection.execute(text("SELECT pg_sleep(0.05)")))
            states = set()
            while not executing.done():
                await asyncio.sleep(0)
                states.add(of_server(handle)[1])
            assert EXECUTING in states
            assert of_server(handle)[1] == IN_TRANSACTION
        await engine.dispose()

    asyncio.run(work())
