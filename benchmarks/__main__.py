"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sqla_queries_pool.demo.server import DemoError, Server, database

from . import (
    async_contended,
    async_uncontended,
    bursts,
    chart,
    classes,
    contended,
    defaults,
    footprint,
    gil,
    hand_over,
    heartbeat,
    hikari,
    listeners,
    overload,
    report,
    scaling,
    uncontended,
)
from .competitors import Backend, fake, postgresql
from .effort import FULL, QUICK, Effort
from .figures import Cell

GROUPS: dict[str, Callable[[Sequence[Backend], Effort], Iterator[Cell]]] = {
    "uncontended": uncontended.cells,
    "listeners": listeners.cells,
    "contended": contended.grid,
    "hand-over": hand_over.cells,
    "budget": contended.budget,
    "bursts": bursts.cells,
    "scaling": scaling.cells,
    "footprint": footprint.cells,
    "defaults": defaults.cells,
    "overload": overload.cells,
    "classes": classes.cells,
    "gil": gil.cells,
    "async-uncontended": async_uncontended.cells,
    "async-contended": async_contended.grid,
    "async-budget": async_contended.budget,
    "heartbeat": heartbeat.cells,
    "hikari": hikari.cells,
}


def cells(groups: Sequence[str], backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Measure, cell by cell."""
    for group in groups:
        yield from GROUPS[group](backends, effort)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the files; return the exit status."""
    chosen = _parser().parse_args(arguments)
    effort = QUICK if chosen.quick else FULL
    status = Console(stderr=True)
    measured = []
    begin = time.perf_counter()
    with ExitStack() as stack:
        backends = [fake()]
        try:
            url = stack.enter_context(database(chosen.url, lambda what, _: status.print(what)))
            server = Server(url)
            stack.callback(server.close)
            backends.append(postgresql(server))
        except DemoError as error:
            status.print(f"no figures on PostgreSQL: {error}", markup=False)
        for cell in cells(chosen.only, backends, effort):
            status.print(f"{time.perf_counter() - begin:.0f} s: {cell.group}, {cell.name}", markup=False)
            measured.append(cell)
    seconds = round(time.perf_counter() - begin)
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH, highlight=False)
    report.show(measured, console)
    console.print(f"It took {seconds} s.")
    if chosen.json is not None:
        report.write(measured, asdict(effort) | {"took": seconds}, chosen.json)
    if chosen.svg is not None:
        chart.draw(measured, chosen.svg)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure QueriesPool beside other pools; takes about 25 minutes.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure for three minutes at most, less exactly"
    )
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME", help=", ".join(GROUPS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, too")
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="draw ratios to SQLAlchemy's pools (matplotlib)"
    )
    parser.add_argument("--url", help="the PostgreSQL (default: DATABASE_URL, else one of its own)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
