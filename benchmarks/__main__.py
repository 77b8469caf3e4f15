"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from sqla_queries_pool.demo.server import DemoError, Server, database
from sqla_queries_pool.demo.workload import WARM_UP

from . import contended, report, uncontended
from .competitors import QUERIES, QUERIES_3, QUEUE, Backend, fake, postgresql
from .figures import Cell


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    """Of everything; each has all competitors in turn."""
    batches: int
    """In a round without contention."""
    checkouts: int
    """In a batch."""
    seconds: float
    """Of each load under contention, and ..."""
    warm_up: float = WARM_UP
    """... before it is measured."""


FULL = Effort(rounds=4, batches=60, checkouts=500, seconds=1.0)
QUICK = Effort(rounds=2, batches=30, checkouts=300, seconds=0.3)
LOADS = ((40, 4, 0.005), (8, 4, 0.001), (16, 4, 0.0))
"""Threads, connections, seconds of work.  Without work, the pool is all that there is."""
SHARED = ((40, 8, 0.005), (9, 8, 0.005))
"""The same, for several engines on one budget.  With nine threads, there is always somebody else's idle
connection that could be closed to open one's own: a pool that does it at once does little else."""


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Measure everything, cell by cell."""
    rounds, batches, checkouts = effort.rounds, effort.batches, effort.checkouts
    for backend in backends:
        yield uncontended.measure(backend, "checkout, return", None, rounds, batches, checkouts)
        if backend.look is not None:  # twenty times as slow, so a tenth as many are as exact
            name = "checkout, SELECT 1, return"
            yield uncontended.measure(backend, name, backend.look, rounds, batches, max(1, checkouts // 10))
    for group, competitors, loads in (
        ("contended", (QUEUE, QUERIES), LOADS),
        ("one budget", (QUERIES, QUERIES_3, QUEUE), SHARED),
    ):
        for backend in backends:
            for threads, connections, work in loads:
                yield contended.measure(
                    backend,
                    group,
                    competitors,
                    threads=threads,
                    connections=connections,
                    work=work,
                    rounds=effort.rounds,
                    seconds=effort.seconds,
                    warm_up=effort.warm_up,
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the file; return the exit status."""
    chosen = _parser().parse_args(arguments)
    effort = QUICK if chosen.quick else FULL
    status = Console(stderr=True)
    measured = []
    with ExitStack() as stack:
        backends = [fake()]
        try:
            url = stack.enter_context(database(chosen.url, lambda what, _: status.print(what)))
            server = Server(url)
            stack.callback(server.close)
            backends.append(postgresql(server))
        except DemoError as error:
            status.print(f"no figures on PostgreSQL: {error}", markup=False)
        for cell in cells(backends, effort):
            status.print(f"measured: {cell.group}, {cell.name}")
            measured.append(cell)
    report.show(measured, Console(width=None if sys.stdout.isatty() else report.WIDTH, highlight=False))
    if chosen.json is not None:
        report.write(measured, asdict(effort), chosen.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure QueriesPool beside QueuePool; takes three minutes."
    )
    parser.add_argument("--quick", action="store_true", help="measure for less than a minute, less exactly")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, too")
    parser.add_argument("--url", help="the PostgreSQL (default: DATABASE_URL, else one of its own)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
