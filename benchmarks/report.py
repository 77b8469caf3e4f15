"""The tables, and the file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import sqlalchemy
from rich.box import ROUNDED, SIMPLE
from rich.console import Console
from rich.table import Table

from sqla_queries_pool import __version__

from .figures import MET, NOT_MET, WITHIN, Cell, Figure, Target

WIDTH = 200
"""Columns, where the output is no terminal."""
LONG = 3
"""A group of more cells than these, which all have much the same targets, is shown in a line for each."""
STYLES = {MET: "green", WITHIN: "yellow", NOT_MET: "red", "": "default"}
NOTE = """Medians of the rounds (least..most); a ratio is to the other's of the same round.
A turn is threads (or tasks) / connections x work: the time in which everybody could have had a connection
once.  A heartbeat is a task that wants to run every 5 ms; its p99 and its longest are how late it was.
Waits are as long as they can be seen: a thread that got nothing waited for the whole of its measurement.
"within the spread": the median misses it, and a round reached it.
Capacity is what the connections could serve if they were never idle; in time is what was served before its
caller gave up.
psycopg_pool, psycopg2.pool, queries' own and asyncpg's pool have no SQLAlchemy around them, only an object
that gives the connection back; psycopg_pool's connections are psycopg 3's, and asyncpg's pool resets a
connection by a statement.  psycopg2.pool and queries' own raise when they are full, and NullPool has no
limit: where anybody has to wait, they can't take part."""


def show(cells: Sequence[Cell], console: Console) -> None:
    """Print a table for each group of cells, and one of what is to be reached."""
    for group, members in _groups(cells):
        alike = len({target.what for cell in members for target in cell.targets}) <= len(members)
        console.print((_lines if alike and len(members) > LONG else _table)(group, members))
    console.print(_summary(cells))
    console.print(NOTE, markup=False)


def _groups(cells: Iterable[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for group, members in groupby(cells, key=lambda cell: cell.group):
        yield group, list(members)


def _columns(names: Iterable[str], title: str) -> Table:
    table = Table(box=ROUNDED, title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in dict.fromkeys(names):
        table.add_column(name, justify="right", overflow="fold")
    return table


def _lines(group: str, cells: list[Cell]) -> Table:
    """One line per cell: what is to be reached, and how far it is."""
    table = _columns((target.what for cell in cells for target in cell.targets), group)
    for cell in cells:
        targets = {target.what: target for target in cell.targets}
        columns = [str(column.header) for column in table.columns[1:]]
        table.add_row(cell.name, *(_judged(targets.get(column)) for column in columns))
    return table


def _judged(target: Target | None) -> str:
    if target is None:
        return "-"
    said = "" if target.verdict == MET else target.verdict
    return f"[{STYLES[target.verdict]}]{text(target.value)}[/] {said}".rstrip()


def _table(group: str, cells: list[Cell]) -> Table:
    """One line per competitor, and below what is to be reached."""
    table = _columns((what for cell in cells for row in cell.figures.values() for what in row), group)
    columns = [str(column.header) for column in table.columns[1:]]
    for cell in cells:
        table.add_section()
        table.add_row(f"[bold]{cell.name}[/bold]")
        for competitor, figures in cell.figures.items():
            table.add_row(f"  {competitor}", *(text(figures.get(column)) for column in columns))
        for target in cell.targets:
            table.add_row(f"  {_sentence(target)}")
    return table


def _sentence(target: Target) -> str:
    value = f"{target.what}: {text(target.value)}"
    if not target.judged:
        return value
    return f"{value}, {target.bound}: [{STYLES[target.verdict]}]{target.verdict}[/]"


def _summary(cells: Sequence[Cell]) -> Table:
    """What is to be reached, on how many cells, and the value that is farthest from it."""
    table = Table(box=SIMPLE, title="what must be reached", title_justify="left")
    for name in ("", "", "", "farthest", MET, WITHIN, NOT_MET):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    judged = [(cell.group, target) for cell in cells for target in cell.targets if target.judged]
    for group, what, bound in dict.fromkeys((group, t.what, t.bound) for group, t in judged):
        same = [t for g, t in judged if (g, t.what, t.bound) == (group, what, bound)]
        middles = [target.value.median for target in same]
        farthest = max(middles) if same[0].at_most is not None else min(middles)
        counts = [sum(target.verdict == verdict for target in same) for verdict in (MET, WITHIN, NOT_MET)]
        table.add_row(group, what, bound, number(farthest), *(str(count or "") for count in counts))
    return table


def text(figure: Figure | None) -> str:
    """A figure and its spread."""
    if figure is None:
        return "-"
    middle, least, most = map(number, (figure.median, figure.least, figure.most))
    return middle if least == most else f"{middle} ({least}..{most})"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def write(cells: Sequence[Cell], parameters: dict[str, object], path: Path) -> None:
    """Write all figures, what ran, and on what."""
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "sqlalchemy": sqlalchemy.__version__,
        "sqla_queries_pool": __version__,
    }
    content = {
        "environment": environment,
        "parameters": parameters,
        "cells": [_written(cell) for cell in cells],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _written(cell: Cell) -> dict[str, object]:
    targets = [asdict(target) | {"verdict": target.verdict} for target in cell.targets]
    return asdict(cell) | {"targets": targets}
