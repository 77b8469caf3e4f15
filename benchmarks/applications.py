"""Real applications with different pools: ``python -m benchmarks.applications``.

Flask on gunicorn, 2 workers with 16 threads each, and FastAPI with an async engine on uvicorn, 2 workers.  A
table has 10,000 rows, and the endpoints have the shapes of TechEmpower's: ``/db`` reads a row, ``/queries``
reads some, ``/updates`` reads and writes some.  wrk asks for them.  Each way may have 16 connections in all.

All applications run all the time, and are asked in turn.  It needs PostgreSQL, wrk and PgBouncer (Debian's
``wrk`` and ``pgbouncer``), and ``pip install -e ".[demo,benchmarks]"``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres

ROWS = 10_000
SEVERAL = 5
"""Rows of a request for several."""
WORKERS, THREADS = 2, 16
BUDGET = 16
"""Connections of a way, in all its processes."""
CLIENTS = (16, 64, 256)
ENDPOINTS = ("db", "queries", "updates")
TIMEOUT = 10
"""Seconds that a checkout waits, and that wrk waits for an answer."""
READY = 60.0
SAMPLE = 0.05
"""Seconds between two looks at how many connections there are."""
QUIET, BUSY = 0.3, 0.1
"""Seconds in which an application does nothing, and the processor time of each that does not count."""
TOLD = "BENCHMARKS_APPLICATION"
"""The variable with the URL and the parameters of the engine, as JSON."""
TESTS = Path(__file__).parent.parent / "tests"
POOLS = {kind.__name__: kind for kind in (QueuePool, NullPool, AsyncAdaptedQueuePool, QueriesPool)}

READ = text("SELECT id, randomnumber FROM world WHERE id = :id")
WRITE = text("UPDATE world SET randomnumber = :randomnumber WHERE id = :id")


# -- the applications -------------------------------------------------------------------------------


def _engine_arguments() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(os.environ[TOLD])
    return told | {"poolclass": POOLS[told["poolclass"]]}


def _ids(endpoint: str) -> list[int]:
    """In order: else two that write would wait for each other."""
    return sorted(random.sample(range(1, ROWS + 1), 1 if endpoint == "db" else SEVERAL))


def flask() -> Any:
    """Make the application of Flask."""
    from flask import Flask, jsonify

    engine = create_engine(**_engine_arguments())
    application = Flask(__name__)

    def answer(endpoint: str) -> Any:
        with engine.connect() as connection:
            found = _work(connection, endpoint)
        return jsonify(found)

    application.add_url_rule("/<any(db, queries, updates):endpoint>", view_func=answer)
    return application


def _work(connection: Connection, endpoint: str) -> list[dict[str, int]]:
    found = [dict(connection.execute(READ, {"id": each}).one()._mapping) for each in _ids(endpoint)]
    if endpoint == "updates":
        for row in found:
            row["randomnumber"] = random.randint(1, ROWS)
            connection.execute(WRITE, row)
        connection.commit()
    return found


def fastapi() -> Any:
    """Make the application of FastAPI."""
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(**_engine_arguments())
    application = FastAPI()

    async def answer(endpoint: str) -> list[dict[str, int]]:
        async with engine.connect() as connection:
            found = [
                dict((await connection.execute(READ, {"id": each})).one()._mapping) for each in _ids(endpoint)
            ]
            if endpoint == "updates":
                for row in found:
                    row["randomnumber"] = random.randint(1, ROWS)
                    await connection.execute(WRITE, row)
                await connection.commit()
        return found

    application.add_api_route("/{endpoint}", answer)
    return application


# -- who is compared --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """An application and a pool."""

    server: str
    pool: str
    options: dict[str, Any] = field(hash=False)
    behind: bool = False
    """Is PgBouncer in between?"""

    def __str__(self) -> str:
        return f"{self.server}, {self.pool}"


def ways(share: str) -> list[Way]:
    """All of them; the processes of each that share a budget meet in a folder below ``share``."""
    own = BUDGET // WORKERS
    queue = {"poolclass": "QueuePool", "pool_size": own, "max_overflow": 0, "pool_timeout": TIMEOUT}
    asynchronous = queue | {"poolclass": "AsyncAdaptedQueuePool"}
    ours = {"poolclass": "QueriesPool", "max_size": own, "pool_timeout": TIMEOUT}
    shared = ours | {"max_size": BUDGET}
    return [
        Way("Flask", "QueuePool", queue),
        Way("Flask", "QueuePool, pre-ping", queue | {"pool_pre_ping": True}),
        Way("Flask", "NullPool behind PgBouncer", {"poolclass": "NullPool"}, behind=True),
        Way("Flask", "QueriesPool", ours),
        Way("Flask", 'QueriesPool, share="host"', shared | {"share": f"{share}/flask"}),
        Way("FastAPI", "AsyncAdaptedQueuePool", asynchronous),
        Way("FastAPI", "QueriesPool", ours),
        Way("FastAPI", 'QueriesPool, share="host"', shared | {"share": f"{share}/fastapi"}),
    ]


@dataclass
class Running:
    """A way whose processes run."""

    way: Way
    role: str
    port: int
    processes: list[psutil.Process]
    """The first of its application, and PgBouncer."""

    def url(self, endpoint: str) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}/{endpoint}"

    def processor(self) -> float:
        """Seconds that all processes have used."""
        total = 0.0
        for first in self.processes:
            for process in (first, *first.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def rest(self) -> None:
        """Wait until it does nothing: it still does what wrk has given up, which is no part of the next."""
        deadline, before = time.monotonic() + TIMEOUT, -1.0
        while (now := self.processor()) - before > BUSY * QUIET and time.monotonic() < deadline:
            before = now
            time.sleep(QUIET)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + READY
        while True:
            try:
                with urllib.request.urlopen(self.url("updates"), timeout=TIMEOUT):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.way} does not answer, see above") from None
                time.sleep(0.1)


@contextmanager
def running(way: Way, server: EmbeddedPostgres, role: str) -> Iterator[Running]:
    """Start the processes; at the end they are stopped."""
    with ExitStack() as stack:
        url = make_url(server.url()).set(username=role, password=role)
        processes = []
        if way.behind:
            settings = {"pool_mode": "transaction", "default_pool_size": BUDGET, "max_client_conn": 1000}
            sys.path.append(str(TESTS))
            kind = importlib.import_module("pgbouncer").PgBouncer
            bouncer = stack.enter_context(kind(server, settings, users={role: role}))
            url = url.set(port=bouncer.port)
            processes.append(psutil.Process(bouncer.pid))
        if way.server == "FastAPI":
            url = url.set(drivername="postgresql+asyncpg")
        told = {"url": url.render_as_string(hide_password=False), **way.options}
        port = _free_port()
        process = subprocess.Popen(_command(way.server, port), env=os.environ | {TOLD: json.dumps(told)})
        stack.callback(process.wait)
        stack.callback(process.terminate)
        processes.append(psutil.Process(process.pid))
        yield Running(way, role, port, processes)


def _command(server: str, port: int) -> list[str]:
    module, workers = "benchmarks.applications", str(WORKERS)
    if server == "Flask":
        options = ["--workers", workers, "--threads", str(THREADS), "--log-level", "warning"]
        return [
            sys.executable,
            "-m",
            "gunicorn",
            "--bind",
            f"127.0.0.1:{port}",
            *options,
            f"{module}:flask()",
        ]
    options = ["--workers", workers, "--log-level", "warning", "--no-access-log"]
    return [sys.executable, "-m", "uvicorn", "--port", str(port), *options, "--factory", f"{module}:fastapi"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- the load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of one way, one endpoint, and so many clients."""

    way: str
    endpoint: str
    clients: int
    goodput: float
    """Answers per second that were no errors."""
    p50: float
    p99: float
    """Milliseconds."""
    errors: int
    backends: int
    """The most that were seen at once."""
    processor: float
    """Milliseconds of processor time for an answer, of the application's processes and PgBouncer."""


class Observer:
    """Looks at how many connections a role has."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url, isolation_level="AUTOCOMMIT")

    def prepare(self, roles: Sequence[str]) -> None:
        """Make the table, and the roles that use it."""
        statements = [
            "CREATE TABLE world (id integer PRIMARY KEY, randomnumber integer NOT NULL)",
            f"INSERT INTO world SELECT id, 1 + random() * {ROWS - 1} FROM generate_series(1, {ROWS}) id",
            "ANALYZE world",
        ]
        for role in roles:
            statements.append(f"CREATE ROLE {role} LOGIN PASSWORD '{role}'")
            statements.append(f"GRANT SELECT, UPDATE ON world TO {role}")
        with self._engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    @contextmanager
    def watch(self, role: str) -> Iterator[list[int]]:
        """All that was seen meanwhile."""
        seen: list[int] = []
        ended = threading.Event()
        count = text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role")

        def look() -> None:
            with self._engine.connect() as connection:
                while not ended.wait(SAMPLE):
                    seen.append(connection.execute(count, {"role": role}).scalar_one())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            ended.set()
            thread.join()

    def close(self) -> None:
        """End its connections."""
        self._engine.dispose()


def measure(target: Running, endpoint: str, clients: int, seconds: int, observer: Observer) -> Result:
    """Have so many clients ask for so long."""
    options = ["--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s"]
    command = ["wrk", *options, "--timeout", f"{TIMEOUT}s", "--latency", target.url(endpoint)]
    before = target.processor()
    with observer.watch(target.role) as seen:
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    used = target.processor() - before
    target.rest()
    return understand(said, str(target.way), endpoint, clients, max(seen, default=0), used)


def understand(said: str, way: str, endpoint: str, clients: int, backends: int, used: float) -> Result:
    """Read what wrk printed."""
    answers, took, unit = _found(r"(\d+) requests in ([\d.]+)(ms|s|m)\b", said)
    bad = int((_found(r"Non-2xx or 3xx responses: (\d+)", said) or "0")[0])
    sockets = sum(
        map(int, _found(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said))
    )
    good = int(answers) - bad
    p50, p99 = (_milliseconds(rf"\b{part}%\s+([\d.]+)(us|ms|s|m)\b", said) for part in (50, 99))
    rate = 1000 * good / (float(took) * UNITS[unit])
    each = 1000 * used / max(1, good)
    return Result(way, endpoint, clients, rate, p50, p99, bad + sockets, backends, each)


UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def _found(pattern: str, said: str) -> tuple[str, ...]:
    match = re.search(pattern, said)
    return match.groups() if match else ()


def _milliseconds(pattern: str, said: str) -> float:
    number, unit = _found(pattern, said)
    return float(number) * UNITS[unit]


# -- the program ------------------------------------------------------------------------------------


def compare(
    seconds: int, clients: Sequence[int], endpoints: Sequence[str], named: str = ""
) -> Iterator[Result]:
    """Ask all ways in turn whose name contains ``named``."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres({"max_connections": "200"}))
        share = stack.enter_context(tempfile.TemporaryDirectory())
        observer = Observer(server.url())
        stack.callback(observer.close)
        all_ways = [way for way in ways(share) if named in str(way)]
        roles = [f"way_{number}" for number in range(len(all_ways))]
        observer.prepare(roles)
        for folder in ("flask", "fastapi"):
            Path(share, folder).mkdir(mode=0o700)
        targets = [
            stack.enter_context(running(way, server, role)) for way, role in zip(all_ways, roles, strict=True)
        ]
        for target in targets:
            target.wait()
        for endpoint in endpoints:
            for number in clients:
                for target in targets:
                    yield measure(target, endpoint, number, seconds, observer)


def show(results: Sequence[Result], console: Console) -> None:
    """Print a table."""
    table = Table(title="applications", title_justify="left")
    for name in ("", "answers/s", "p50, ms", "p99, ms", "errors", "backends", "processor, ms per answer"):
        table.add_column(name, justify="right" if name else "left")
    place = None
    for result in results:
        if (result.endpoint, result.clients) != place:
            place = (result.endpoint, result.clients)
            table.add_section()
            table.add_row(f"[bold]/{result.endpoint}, {result.clients} clients[/]")
        figures = [f"{result.goodput:,.0f}", f"{result.p50:,.0f}", f"{result.p99:,.0f}", str(result.errors)]
        table.add_row(f"  {result.way}", *figures, str(result.backends), f"{result.processor:.2f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.applications",
        description="Real applications with different pools; takes less than ten minutes.",
    )
    parser.add_argument("--seconds", type=int, default=5, help="of each cell, of which there are 72 (5)")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="how many ask at once")
    parser.add_argument("--only", nargs="+", choices=ENDPOINTS, default=ENDPOINTS, help="these endpoints")
    parser.add_argument("--ways", default="", metavar="NAME", help="those whose name contains this")
    chosen = parser.parse_args(arguments)
    absent = [name for name in ("wrk", "pgbouncer") if not find_program(name)]
    if absent:
        parser.error(f"{' and '.join(absent)} must be installed")
    results = []
    for result in compare(chosen.seconds, chosen.clients, chosen.only, chosen.ways):
        print(f"/{result.endpoint}, {result.clients} clients: {result.way}", file=sys.stderr)
        results.append(result)
    show(results, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0


def find_program(name: str) -> str | None:
    """Where it is; None if it is not installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


if __name__ == "__main__":
    sys.exit(main())
