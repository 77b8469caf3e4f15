"""What a checkout and its return cost where somebody listens, as OpenTelemetry's instrumentation does."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.pool import Pool, QueuePool

from sqla_queries_pool import QueriesPool

from .competitors import QUERIES, QUEUE, Backend, Competitor, Make
from .effort import Effort
from .figures import Cell, Target
from .uncontended import measure, ratio

GROUP = "one thread, with listeners"
GOAL = 0.8
OPENTELEMETRY = "opentelemetry.instrumentation.sqlalchemy"


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Listeners that do nothing, and the instrumentation's, which also need an engine of a server."""
    for backend in backends:
        listening = [Competitor(c.name, _listening(c.make)) for c in (QUEUE, QUERIES)]
        yield _cell(backend, listening, "a checkout and a checkin listener", GOAL, effort)
        if backend.url is not None:
            instrumented = [
                Competitor(
                    QUEUE.name, _instrumented(QueuePool, "pool_size", max_overflow=0), needs=OPENTELEMETRY
                ),
                Competitor(QUERIES.name, _instrumented(QueriesPool, "max_size"), needs=OPENTELEMETRY),
            ]
            if instrumented[0].there:
                yield _cell(backend, instrumented, "OpenTelemetry's instrumentation", None, effort)


def _cell(
    backend: Backend, competitors: Sequence[Competitor], name: str, goal: float | None, effort: Effort
) -> Cell:
    rows, cell = measure(
        GROUP, backend, competitors, name, None, effort.rounds, effort.batches, effort.checkouts
    )
    to_queue = ratio(rows, QUERIES.name, QUEUE.name)
    cell.targets.append(Target("time / QueuePool, both with listeners", to_queue, at_most=goal))
    return cell


def _listening(make: Make) -> Make:
    def listening(*arguments: Any) -> Pool:
        pool = make(*arguments)
        event.listen(pool, "checkout", lambda connection, record, proxy: None)
        event.listen(pool, "checkin", lambda connection, record: None)
        return pool

    return listening


def _instrumented(kind: type[Pool], limit: str, **options: Any) -> Make:
    def make(backend: Backend, max_size: int, timeout: float, pool_id: str) -> Pool:
        assert backend.url is not None
        if kind is QueriesPool:
            options["pool_id"] = pool_id
        engine = create_engine(
            backend.url, poolclass=kind, pool_timeout=timeout, **{limit: max_size}, **options
        )
        # With the SDK's meter: the API's own does nothing.  And not by its instrumentor, which declines
        # SQLAlchemy 2.1 and knows one engine at a time: it would make the same of an engine.
        meter = importlib.import_module("opentelemetry.sdk.metrics").MeterProvider().get_meter(__name__)
        tracer = importlib.import_module("opentelemetry.sdk.trace").TracerProvider().get_tracer(__name__)
        usage = meter.create_up_down_counter("db.client.connections.usage")
        importlib.import_module(f"{OPENTELEMETRY}.engine").EngineTracer(tracer, engine, usage)
        return engine.pool

    return make
