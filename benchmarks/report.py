"""The table, and the file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import sqlalchemy
from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table

from sqla_queries_pool import __version__

from .figures import Cell, Figure

WIDTH = 160
"""Columns, where the output is no terminal."""

NOTE = """Medians of the rounds (least..most). A ratio is to the first row of the cell, in the same round.
A turn is threads / connections x work: the time in which everybody could have had a connection once.
Waits are as long as they can be seen: a thread that got nothing waited for the whole of its measurement."""


def show(cells: Sequence[Cell], console: Console) -> None:
    """Print a table for each group of cells."""
    for group, members in groupby(cells, key=lambda cell: cell.group):
        console.print(_table(group, list(members)))
    console.print(NOTE)


def _table(group: str, cells: list[Cell]) -> Table:
    columns = list(dict.fromkeys(what for cell in cells for row in cell.figures.values() for what in row))
    table = Table(box=ROUNDED, title=group, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for cell in cells:
        table.add_section()
        table.add_row(f"[bold]{cell.name}[/bold]".replace(": ", "\n"))
        for competitor, figures in cell.figures.items():
            table.add_row(f"  {competitor}", *(_text(figures.get(column)) for column in columns))
    return table


def _text(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    middle, least, most = map(_number, (figure.median, figure.least, figure.most))
    return middle if least == most else f"{middle} ({least}..{most})"


def _number(value: float) -> str:
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
        "cells": [asdict(cell) for cell in cells],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
