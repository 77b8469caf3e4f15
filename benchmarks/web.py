"""The applications that ``benchmarks.applications`` asks: the same endpoints with Flask and with FastAPI.

gunicorn and uvicorn import this module in each of their processes.  The endpoints have the shapes of
TechEmpower's: ``/db`` reads a row, ``/queries`` reads some, ``/updates`` reads and writes some.  ``/slow`` is
``/updates`` with a database that takes long.  What the pool or the database can't do is answered with 503.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, create_engine, exc, text
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool

from sqla_queries_pool import QueriesPool

ROWS = 10_000
SEVERAL = 5
"""Rows of a request for several."""
ENDPOINTS = ("db", "queries", "updates")
SLOW, SLOW_SECONDS = "slow", 0.1
WRITING = ("updates", SLOW)
TOLD = "BENCHMARKS_APPLICATION"
"""The variable with the URL and the parameters of the engine, as JSON."""
POOLS = {kind.__name__: kind for kind in (QueuePool, NullPool, AsyncAdaptedQueuePool, QueriesPool)}
UNAVAILABLE = 503

READ = text("SELECT id, randomnumber FROM world WHERE id = :id")
WAIT = text("SELECT pg_sleep(:seconds)")
WRITE = text("UPDATE world SET randomnumber = :randomnumber WHERE id = :id")


def _engine_arguments() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(os.environ[TOLD])
    return told | {"poolclass": POOLS[told["poolclass"]]}


def _ids(endpoint: str) -> list[int]:
    """In order: else two that write would wait for each other."""
    return sorted(random.sample(range(1, ROWS + 1), 1 if endpoint == "db" else SEVERAL))


# -- Flask ------------------------------------------------------------------------------------------


def flask() -> Any:
    """Make the application of Flask."""
    from flask import Flask, jsonify

    engine = create_engine(**_engine_arguments())
    application = Flask(__name__)

    def answer(endpoint: str) -> Any:
        with engine.connect() as connection:
            found = _work(connection, endpoint)
        return jsonify(found)

    application.add_url_rule("/<endpoint>", view_func=answer)
    application.register_error_handler(exc.SQLAlchemyError, lambda error: ("", UNAVAILABLE))
    return application


def _work(connection: Connection, endpoint: str) -> list[dict[str, int]]:
    found = [dict(connection.execute(READ, {"id": each}).one()._mapping) for each in _ids(endpoint)]
    if endpoint == SLOW:
        connection.execute(WAIT, {"seconds": SLOW_SECONDS})
    if endpoint in WRITING:
        for row in found:
            row["randomnumber"] = random.randint(1, ROWS)
            connection.execute(WRITE, row)
        connection.commit()
    return found


# -- FastAPI ----------------------------------------------------------------------------------------


def fastapi() -> Any:
    """Make the application of FastAPI."""
    from fastapi import FastAPI, Response
    from sqlalchemy.ext.asyncio import create_async_engine

    arguments = _engine_arguments()
    if arguments["poolclass"] is NullPool:
        arguments["connect_args"] = _behind_pgbouncer()
    engine = create_async_engine(**arguments)
    application = FastAPI()

    async def answer(endpoint: str) -> list[dict[str, int]]:
        async with engine.connect() as connection:
            found = [
                dict((await connection.execute(READ, {"id": each})).one()._mapping) for each in _ids(endpoint)
            ]
            if endpoint == SLOW:
                await connection.execute(WAIT, {"seconds": SLOW_SECONDS})
            if endpoint in WRITING:
                for row in found:
                    row["randomnumber"] = random.randint(1, ROWS)
                    await connection.execute(WRITE, row)
                await connection.commit()
        return found

    async def unavailable(request: object, error: object) -> Response:
        return Response(status_code=UNAVAILABLE)

    application.add_api_route("/{endpoint}", answer)
    application.add_exception_handler(exc.SQLAlchemyError, unavailable)
    return application


def _behind_pgbouncer() -> dict[str, Any]:
    """As SQLAlchemy's documentation has it: asyncpg prepares all statements, and none for later.

    Their names must not be those of another process that had the server's connection before.
    """
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
    }
