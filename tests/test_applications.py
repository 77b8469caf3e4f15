"""Applications that make their engines themselves: run on PostgreSQL where they are small, else their calls.

What the pages in ``docs/recipes`` show beyond that, ``tests/test_docs.py`` runs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import inside
import pytest
from conftest import Observer
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, Pool, QueuePool, SingletonThreadPool
from test_docs import URL, blocks, source
from test_examples import (
    Run,
    backends,
    documented,
    environment,
    highest,
    run,
    run_to_its_end,
)

from sqla_queries_pool import CheckoutTimeout, QueriesPool

__all__ = ["environment", "run"]  # the fixtures, for pytest

Eventually = Callable[..., None]
PLATFORMS = "plugin=queries&max_size=8&share=host"
"""What the page tells to write into the URL of Airflow, MLflow and Dagster."""


def with_options(url: str, options: str) -> str:
    """The URL with more parameters."""
    return f"{url}{'&' if '?' in url else '?'}{options}"


# -- Optuna


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_of_a_study_share_the_limit_of_the_host(
    environment: dict[str, str],
    tmp_path: Path,
    pg_url: str,
    pg_observer: Observer,
) -> None:
    """Three at once, four threads each: all trials are there, on four connections at most."""
    pytest.importorskip("optuna")
    options = "plugin=queries&max_size=4&share=host"
    page = source("recipes/optuna")
    assert f'export DATABASE_URL="postgresql+psycopg2://{URL}?{options}"' in page
    environment |= {"DATABASE_URL": with_options(pg_url, options), "XDG_RUNTIME_DIR": str(tmp_path)}
    create = [
        word.replace("$DATABASE_URL", environment["DATABASE_URL"])
        for word in documented("optuna", "optuna create")
    ]
    run_to_its_end(create, environment)
    study = [sys.executable, "optuna_study.py"]
    assert " & ".join(["python optuna_study.py"] * 3) + " & wait" in page
    with highest(lambda: len(backends(pg_observer, pg_url))) as seen, ThreadPoolExecutor(3) as processes:
        list(processes.map(lambda _: run_to_its_end(study, environment), range(3)))
    engine = create_engine(pg_url, poolclass=NullPool)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM trials WHERE state = 'COMPLETE'")) == 15
    assert 1 < max(seen) <= 4


# -- Celery's result backend

RESULTS = """
import os
from celery_app import app
engines = []  # those of the parent as well
app.conf.database_engine_callback = lambda engine: engines.append((os.getpid(), engine))

@app.task
def pools():
    "What the results of this child go through, once it has had one."
    own = [engine.pool for pid, engine in engines if pid == os.getpid()]
    return [[os.getpid(), type(pool).__name__, pool.size()] for pool in own]
"""
ASK = """
import json
import whole_files
from celery_app import take_order
from results_app import engines, pools
orders = [take_order.delay(f"article {n}") for n in range(10)]
numbers = [order.get(timeout=60)[0] for order in orders]
told = [pool for result in [pools.delay() for _ in range(10)] for pool in result.get(timeout=60)]
print(json.dumps([numbers, told, {type(engine.pool).__name__ for _, engine in engines}.pop()]))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_results_of_a_celery_worker_go_through_the_pool_in_its_children(
    run: Run,
    environment: dict[str, str],
    tmp_path: Path,
    pg_url: str,
    pg_observer: Observer,
    eventually: Eventually,
) -> None:
    """With the URL of the page.  The client, which Celery gives a NullPool, reads them."""
    pytest.importorskip("celery")
    [setting] = [
        line.strip() for line in source("recipes/celery-results").splitlines() if "RESULT_BACKEND=" in line
    ]
    options = setting.partition("?")[2].rstrip('"')
    environment["RESULT_BACKEND"] = f"db+{with_options(pg_url, options)}"
    (tmp_path / "results_app.py").write_text(RESULTS)
    worker = run(["celery", "-A", "results_app", *documented("celery-results", "celery")[3:]], **environment)
    numbers, told, clients = json.loads(run_to_its_end([sys.executable, "-c", ASK], environment))
    assert sorted(numbers) == list(range(1, 11))
    assert told
    assert {(name, size) for _, name, size in told} == {("QueriesPool", 2)}
    assert worker.pid not in {pid for pid, _, _ in told}
    assert clients == "NullPool"
    # Two engines of one database: together they have two per child, and the parent has one.
    assert len(backends(pg_observer, pg_url)) <= 3 * 2 + 1
    worker.stop()
    assert "Traceback" not in worker.said()
    eventually(lambda: not backends(pg_observer, pg_url), "no connection is left")


@pytest.mark.parametrize("forked", [True, False])
@pytest.mark.parametrize("way", ["URL", "options"])
def test_celery_makes_its_engines_with_either_way_to_configure_them(
    way: str, forked: bool, pg_url: str
) -> None:
    """As the page shows them.  `max_size` among the options is an error where Celery takes NullPool."""
    celery: Any = pytest.importorskip("celery")
    manager: Any = pytest.importorskip("celery.backends.database.session").SessionManager()
    app = celery.Celery("shop")
    for block in blocks(source("recipes/celery-results"))[: 2 if way == "options" else 1]:
        exec(
            block.text.replace("app = Celery(", "Celery(").replace(URL, pg_url.split("://")[1]), {"app": app}
        )
    manager.forked = forked
    url = app.conf.result_backend.removeprefix("db+")
    engine: Engine = manager.get_engine(url, **app.conf.database_engine_options)
    try:
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        if forked:
            assert isinstance(engine.pool, QueriesPool)
            assert engine.pool.size() == 2
            assert inside.setting(engine.pool, "idle_ttl") == 60.0
        else:
            assert type(engine.pool) is NullPool
            with pytest.raises(TypeError, match=r"Invalid argument.* 'max_size' sent to create_engine"):
                manager.get_engine(url, plugins=["queries"] * (way == "options"), max_size=2)
    finally:
        engine.dispose()


# -- JupyterHub


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("blocks_of_page", [slice(1), slice(2)], ids=["db_kwargs", "URL"])
def test_jupyterhub_makes_its_engine_of_its_configuration(blocks_of_page: slice, pg_url: str) -> None:
    """The hub makes its tables and its session; a second one, on what is there already, finds the user."""
    application: Any = pytest.importorskip("jupyterhub.app")
    orm: Any = pytest.importorskip("jupyterhub.orm")
    config: Any = pytest.importorskip("traitlets.config").Config()
    names = {"get_config": lambda: config}
    for block in blocks(source("recipes/jupyterhub"))[blocks_of_page]:
        exec(block.text.replace(URL, pg_url.split("://")[1]), names)
    if blocks_of_page.stop == 2:
        del config.JupyterHub.db_kwargs
    for user in ("ada", "grace"):
        hub = application.JupyterHub(config=config)
        hub.init_db()
        engine = hub.db.get_bind()
        hub.db.add(orm.User(name=user))
        hub.db.commit()
        assert hub.db.query(orm.User).filter_by(name="ada").count() == 1
        hub.db.close()
        assert isinstance(engine.pool, QueriesPool)
        assert (engine.pool.size(), engine.pool.checkedout()) == (5, 0)
        engine.dispose()


# -- OpenTelemetry's instrumentation


@pytest.fixture
def instrumented() -> Iterator[Callable[..., Any]]:
    """Give an engine OpenTelemetry's listeners.  Returned: what they count (idle, used), and the spans."""
    metrics: Any = pytest.importorskip("opentelemetry.sdk.metrics")
    export: Any = pytest.importorskip("opentelemetry.sdk.metrics.export")
    sqlalchemy: Any = pytest.importorskip("opentelemetry.instrumentation.sqlalchemy")
    trace: Any = pytest.importorskip("opentelemetry.sdk.trace")
    exporters: Any = pytest.importorskip("opentelemetry.sdk.trace.export")
    in_memory: Any = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    with ExitStack() as stack:

        def instrument(engine: Engine) -> tuple[Callable[[], tuple[int, int]], Any]:
            reader, spans = export.InMemoryMetricReader(), in_memory.InMemorySpanExporter()
            meters = metrics.MeterProvider([reader], shutdown_on_exit=False)
            tracers = trace.TracerProvider(shutdown_on_exit=False)
            tracers.add_span_processor(exporters.SimpleSpanProcessor(spans))
            instrumentor = sqlalchemy.SQLAlchemyInstrumentor()
            instrumentor.instrument(
                engine=engine, meter_provider=meters, tracer_provider=tracers, skip_dep_check=True
            )
            stack.callback(meters.shutdown)
            stack.callback(tracers.shutdown)
            stack.callback(instrumentor.uninstrument)
            stack.callback(engine.dispose)

            def usage() -> tuple[int, int]:
                found = dict.fromkeys(("idle", "used"), 0)
                data = reader.get_metrics_data()
                for resource in data.resource_metrics if data else ():
                    for point in resource.scope_metrics[0].metrics[0].data.data_points:
                        found[point.attributes["state"]] += point.value
                return found["idle"], found["used"]

            return usage, spans

        yield instrument


@pytest.mark.parametrize("poolclass", [QueuePool, QueriesPool])
def test_opentelemetry_counts_by_events_what_the_server_has(
    poolclass: type[Pool],
    instrumented: Callable[..., Any],
    pg_url: str,
    pg_observer: Observer,
    eventually: Eventually,
) -> None:
    """Checked out, returned, invalidated, abandoned, disposed of; and there is a span for each statement."""
    engine = create_engine(pg_url, poolclass=poolclass, pool_size=3, max_overflow=0)
    usage, spans = instrumented(engine)

    def right(used: int) -> None:
        eventually(
            lambda: usage() == (len(backends(pg_observer, pg_url)) - used, used), f"{used} used, {usage()}"
        )

    with engine.connect() as first:
        first.execute(text("SELECT 1"))
        with engine.connect():
            right(2)
        right(1)
    right(0)
    assert usage() == (2, 0)
    with engine.connect() as connection:
        connection.invalidate()
        right(0)
        connection.execute(text("SELECT 2"))
        right(1)
    right(0)
    abandoned = engine.connect()
    right(1)
    del abandoned
    right(0)
    engine.dispose()
    right(0)
    assert usage() == (0, 0)
    found = [dict(span.attributes) for span in spans.get_finished_spans()]
    assert [span["db.statement"] for span in found if "db.statement" in span] == ["SELECT 1", "SELECT 2"]


# -- Airflow, MLflow, Superset, Dagster


@pytest.fixture
def platform_url(pg_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL that the page tells to write."""
    assert f"    {PLATFORMS}\n" in source("recipes/platforms")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return with_options(pg_url, PLATFORMS)


def one(engine: Engine) -> object:
    """What a statement says that any engine can run."""
    with engine.connect() as connection:
        return connection.scalar(text("SELECT 1"))


def test_airflows_engines_share_the_limit_of_the_url(platform_url: str, pg_observer: Observer) -> None:
    """As `airflow.settings` makes them: a synchronous one, an asynchronous one from the same URL; and
    others with pool classes of their own, for migrations."""
    pytest.importorskip("asyncpg")
    pooled = {"pool_size": 5, "pool_recycle": 1800, "pool_pre_ping": True, "max_overflow": 10}
    driver = {"executemany_mode": "values_plus_batch", "executemany_batch_page_size": 2000}
    arguments: dict[str, Any] = {
        "insertmanyvalues_page_size": 10000,
        **driver,
        "connect_args": {},
        "future": True,
    }
    engine = create_engine(platform_url, **arguments, **pooled)
    scheme, _, rest = platform_url.partition(":")
    asynchronous = create_async_engine(
        f"{scheme.partition('+')[0]}+asyncpg:{rest}", connect_args={}, **pooled, future=True
    )
    assert type(engine.pool) is type(asynchronous.pool) is QueriesPool
    assert engine.pool.pid == asynchronous.pool.pid
    assert engine.pool.size() == asynchronous.pool.size() == 8

    async def both() -> object:
        async with asynchronous.connect() as connection:
            with engine.connect():
                assert len(backends(pg_observer, platform_url)) == 2
            found = await connection.scalar(text("SELECT 1"))
        await asynchronous.dispose()
        return found

    assert asyncio.run(both()) == one(engine) == 1
    engine.dispose()
    for theirs in (SingletonThreadPool, NullPool):
        migration = create_engine(platform_url, **arguments, poolclass=theirs)
        assert type(migration.pool) is theirs
        assert one(migration) == 1
        migration.dispose()


def test_the_engines_of_mlflows_stores_share_the_limit_of_the_url(platform_url: str) -> None:
    """As `mlflow.store.db.utils` makes them, with what its environment variables say.  Alembic gets the
    engine's URL, without what is ours."""
    kwargs: dict[str, Any] = {"pool_size": 5, "max_overflow": 2, "pool_recycle": 3600, "echo": False}
    stores = [create_engine(platform_url, pool_pre_ping=True, **kwargs) for _ in range(3)]
    assert {(type(store.pool), store.pool.pid, store.pool.size()) for store in stores} == {  # type: ignore[attr-defined]
        (QueriesPool, stores[0].pool.pid, 8)  # type: ignore[attr-defined]
    }
    assert [one(store) for store in stores] == [1, 1, 1]
    assert not make_url(str(stores[0].url)).query
    queue = create_engine(platform_url, pool_pre_ping=True, **kwargs, poolclass=QueuePool)
    assert type(queue.pool) is QueuePool
    for engine in (*stores, queue):
        engine.dispose()


def test_dagsters_webserver_shares_the_limit_of_the_url(platform_url: str) -> None:
    """As `dagster_postgres` makes them: a NullPool, and for the webserver one engine per storage, with a
    listener that is to see each connection."""
    job = create_engine(platform_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    assert type(job.pool) is NullPool
    assert one(job) == 1

    def statement_timeout(connection: Any, _: object) -> None:
        with connection, connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = 15000;")

    storages = [
        create_engine(
            platform_url, isolation_level="AUTOCOMMIT", pool_size=1, pool_recycle=3600, max_overflow=20
        )
        for _ in range(3)
    ]
    for storage in storages:
        event.listen(storage, "connect", statement_timeout)
    assert [storage.pool.size() for storage in storages] == [8, 8, 8]  # type: ignore[attr-defined]
    assert len({storage.pool.pid for storage in storages}) == 1  # type: ignore[attr-defined]
    for storage in storages:
        with storage.connect() as connection:
            assert connection.scalar(text("SHOW statement_timeout")) == "15s"
        storage.dispose()


def test_supersets_configuration(
    pg_url: str, pg_observer: Observer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own database through Flask-SQLAlchemy, and an engine for each query, of which all share a limit."""
    flask: Any = pytest.importorskip("flask")
    flask_sqlalchemy: Any = pytest.importorskip("flask_sqlalchemy")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config: dict[str, Any] = {}
    [block] = [block for block in blocks(source("recipes/platforms")) if block.language == "python"]
    exec(block.text, config)
    app, db = flask.Flask("superset"), flask_sqlalchemy.SQLAlchemy()
    app.config |= {"SQLALCHEMY_DATABASE_URI": pg_url} | {
        name: config[name] for name in config if name.isupper()
    }
    db.init_app(app)
    with app.app_context():
        assert isinstance(db.engine.pool, QueriesPool)
        assert (one(db.engine), db.engine.pool.size()) == (1, 8)
        db.engine.dispose()

    queried = make_url(pg_url).update_query_dict({"application_name": "charts"})
    with ExitStack() as queries:

        def query(**more: Any) -> None:
            url, params = config["DB_CONNECTION_MUTATOR"](queried, {"poolclass": NullPool}, "ada", None, None)
            engine = create_engine(url, **params, **more, pool_id="charts")
            queries.callback(engine.dispose)
            queries.enter_context(engine.connect())

        for _ in range(3):
            query()
        with pytest.raises(CheckoutTimeout):
            query(pool_timeout=0.1)
        assert len(backends(pg_observer, pg_url)) == 3
