"""Real applications with different pools: ``python -m benchmarks.applications``.

Flask on gunicorn, 2 workers with 16 threads each, and FastAPI with an async engine on uvicorn, 2 workers.  A
table has 10,000 rows; ``benchmarks.web`` has the endpoints.  Each way may have 16 connections in all.

First wrk asks, with so many clients of whom each waits for its answer: a closed loop.  All applications run
all the time, and are asked in turn.

Then there is an overload: twice as many requests come as can be served, whatever becomes of them, from
clients that give up after a second (``benchmarks.crowd`` says why that is not wrk).  An answer within the
second is in time.  They ask for ``/slow``, which is ``/updates`` with 100 ms more in the database, as if that
were busy: so what is short are connections.  Where it is the machine's processors, most of an overload is
HTTP, and a pool can save little.  What can be served is what wrk's clients get of SQLAlchemy's own pool, just
before; it is the same for all ways of a server.  Each pool, and PgBouncer, lets requests wait for half a
second, so that there is time left to serve them.  QueriesPool is there with ``queue_target`` and
``max_waiting``, too, which are meant for this.

It needs PostgreSQL, wrk and PgBouncer (Debian's ``wrk`` and ``pgbouncer``), and
``pip install -e ".[demo,benchmarks]"``.  It takes less than nine minutes, and ``--quick`` three.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, text

from sqla_queries_pool.demo.embedded import EmbeddedPostgres

from . import wrk
from .crowd import Answers, offer
from .ways import LIMIT, SERVERS, TIMEOUT, Running, Way, overloaded_ways, running, ways
from .web import ENDPOINTS, ROWS, SLOW

CLIENTS = (16, 64, 256)
SAMPLE = 0.05
"""Seconds between two looks at how many connections there are."""

OVERLOAD = "overload"
LOAD = 2.0
"""Arrivals, in requests that can be served."""
ENOUGH, CAPACITY_SECONDS = 64, 4
"""Clients of wrk who get what can be served, and for how long they ask."""
WARM_UP = 2
"""Seconds until an overload has come to stay: the queue is as long as clients wait, or is kept short."""

# -- the load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of one way, one endpoint, and so many clients."""

    way: str
    endpoint: str
    clients: int
    answers: wrk.Answers
    backends: int
    """The most that were seen at once."""
    processor: float
    """Milliseconds of processor time for an answer, of the application's processes and PgBouncer."""


class Observer:
    """Looks at how many connections a role has."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url, isolation_level="AUTOCOMMIT")
        self._numbers = count()

    def prepare(self) -> None:
        """Make the table."""
        self._execute(
            "CREATE TABLE world (id integer PRIMARY KEY, randomnumber integer NOT NULL)",
            f"INSERT INTO world SELECT id, 1 + random() * {ROWS - 1} FROM generate_series(1, {ROWS}) id",
            "ANALYZE world",
        )

    def admit(self) -> str:
        """Make another role that uses the table."""
        role = f"way_{next(self._numbers)}"
        self._execute(
            f"CREATE ROLE {role} LOGIN PASSWORD '{role}'", f"GRANT SELECT, UPDATE ON world TO {role}"
        )
        return role

    def _execute(self, *statements: str) -> None:
        with self._engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    @contextmanager
    def watch(self, role: str) -> Iterator[list[int]]:
        """All that was seen meanwhile."""
        seen: list[int] = []
        ended = threading.Event()
        backends = text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role")

        def look() -> None:
            with self._engine.connect() as connection:
                while not ended.wait(SAMPLE):
                    seen.append(connection.execute(backends, {"role": role}).scalar_one())

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
    before = target.processor()
    with observer.watch(target.role) as seen:
        answers = wrk.ask(target.url(endpoint), clients, seconds, TIMEOUT)
    each = 1000 * (target.processor() - before) / max(1, answers.good)
    target.rest()
    return Result(str(target.way), endpoint, clients, answers, max(seen, default=0), each)


# -- the overload -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overload:
    """What came of one way when too many asked."""

    way: Way
    capacity: float
    """What can be served, in answers per second."""
    answers: Answers
    backends: int
    """The most that were seen at once."""
    processor: float
    """Milliseconds of processor time for an answer in time, of those whom ``Result`` has."""


def flood(target: Running, capacity: float, seconds: int, observer: Observer) -> Overload:
    """Have too many come for so long."""
    before: list[float] = []
    with observer.watch(target.role) as seen:
        answers = offer(
            target.url(SLOW),
            LOAD * capacity,
            seconds,
            LIMIT,
            warm_up=WARM_UP,
            settled=lambda: before.append(target.processor()),
        )
    each = 1000 * (target.processor() - before[0]) / max(1, len(answers.in_time))
    return Overload(target.way, capacity, answers, max(seen, default=0), each)


# -- the program ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A server with the table, and a folder for those whose processes share a budget."""

    server: EmbeddedPostgres
    observer: Observer
    share: str

    @contextmanager
    def running(self, way: Way) -> Iterator[Running]:
        """Start an application, which has a role of its own."""
        with running(way, self.server, self.observer.admit()) as target:
            yield target


@contextmanager
def stage() -> Iterator[Stage]:
    """Start the server."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres({"max_connections": "200"}))
        share = stack.enter_context(tempfile.TemporaryDirectory())
        for name in SERVERS:
            Path(share, name).mkdir(mode=0o700)
        observer = Observer(server.url())
        stack.callback(observer.close)
        observer.prepare()
        yield Stage(server, observer, share)


def compare(
    on: Stage, seconds: int, clients: Sequence[int], endpoints: Sequence[str], named: str = ""
) -> Iterator[Result]:
    """Ask all ways in turn whose name contains ``named``."""
    with ExitStack() as stack:
        everybody = [way for way in ways(on.share) if named in str(way)]
        targets = [stack.enter_context(on.running(way)) for way in everybody]
        for target in targets:
            target.wait()
        for endpoint in endpoints:
            for number in clients:
                for target in targets:
                    yield measure(target, endpoint, number, seconds, on.observer)


def overload(on: Stage, seconds: int, named: str = "") -> Iterator[Overload]:
    """Ask too much of all ways whose name contains ``named``, one after the other."""
    capacities = {server: _capacity(on, server) for server in SERVERS}
    for way in overloaded_ways(on.share, capacities):
        if named in str(way):
            with on.running(way) as target:
                target.wait()
                yield flood(target, capacities[way.server], seconds, on.observer)


def _capacity(on: Stage, server: str) -> float:
    """What can be served: by SQLAlchemy's own pool."""
    with on.running(next(way for way in ways(on.share) if way.server == server)) as target:
        target.wait()
        return measure(target, SLOW, ENOUGH, CAPACITY_SECONDS, on.observer).answers.goodput


def show(results: Sequence[Result], console: Console) -> None:
    """Print a table of what wrk's clients got."""
    names = ("answers/s", "p50, ms", "p99, ms", "errors", "backends", "processor, ms per answer")
    table = _table("applications", names)
    place = None
    for result in results:
        if (result.endpoint, result.clients) != place:
            place = (result.endpoint, result.clients)
            table.add_section()
            table.add_row(f"[bold]/{result.endpoint}, {result.clients} clients[/]")
        answers = result.answers
        figures = [f"{figure:,.0f}" for figure in (answers.goodput, answers.p50, answers.p99, answers.errors)]
        table.add_row(f"  {result.way}", *figures, str(result.backends), f"{result.processor:.2f}")
    console.print(table)


def show_overload(overloads: Sequence[Overload], console: Console) -> None:
    """Print a table of what came of too many requests."""
    names = ("in time/s", "of capacity", "p50, ms", "p99, ms", "rejected", "given up", "errors", "backends")
    table = _table("overload", (*names, "processor, ms per answer"))
    server = None
    for each in overloads:
        if each.way.server != server:
            server = each.way.server
            table.add_section()
            table.add_row(f"[bold]{server}: /{SLOW}, {LOAD * each.capacity:,.0f} requests/s[/]")
        answers = each.answers
        many = len(answers.in_time)
        spread = [f"{1000 * answers.within(part):,.0f}" if many else "" for part in (0.5, 0.99)]
        lost = [str(number) for number in (answers.rejected, answers.given_up, answers.failed)]
        figures = [f"{answers.goodput:,.0f}", f"{answers.goodput / each.capacity:.2f}", *spread, *lost]
        processor = f"{each.processor:.2f}" if many else ""
        table.add_row(f"  {each.way.pool}", *figures, str(each.backends), processor)
    console.print(table)


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.applications",
        description="Real applications with different pools; takes less than ten minutes.",
    )
    parser.add_argument("--quick", action="store_true", help="measure for three minutes, less exactly")
    parser.add_argument("--seconds", type=int, help="of each cell, and half of those of an overload (3; 1)")
    parser.add_argument("--clients", type=int, nargs="+", help="how many ask at once (16 64 256; 64)")
    parser.add_argument(
        "--only", nargs="+", choices=(*ENDPOINTS, OVERLOAD), help="these endpoints, or the overload"
    )
    parser.add_argument("--ways", default="", metavar="NAME", help="those whose name contains this")
    chosen = parser.parse_args(arguments)
    absent = [name for name in ("wrk", "pgbouncer") if not find_program(name)]
    if absent:
        parser.error(f"{' and '.join(absent)} must be installed")
    seconds = chosen.seconds or (1 if chosen.quick else 3)
    clients = chosen.clients or (CLIENTS[1:2] if chosen.quick else CLIENTS)
    only = chosen.only or (*ENDPOINTS, OVERLOAD)
    endpoints = [name for name in only if name != OVERLOAD]
    results, overloads = [], []
    begin = time.monotonic()
    with stage() as on:
        if endpoints:
            for result in compare(on, seconds, clients, endpoints, chosen.ways):
                print(f"/{result.endpoint}, {result.clients} clients: {result.way}", file=sys.stderr)
                results.append(result)
        if OVERLOAD in only:
            for each in overload(on, 2 * seconds, chosen.ways):
                print(f"overload: {each.way}", file=sys.stderr)
                overloads.append(each)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if results:
        show(results, console)
    if overloads:
        show_overload(overloads, console)
    console.print(f"It took {time.monotonic() - begin:.0f} s.")
    return 0


def find_program(name: str) -> str | None:
    """Where it is; None if it is not installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


if __name__ == "__main__":
    sys.exit(main())
