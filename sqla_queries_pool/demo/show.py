"""The demo's output: progress on stderr, and a table or JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .run import KINDS, QUERIES, QUEUE, Burst, Facts, Load, Parameters, options, summary
from .server import Say

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
"""Columns, if the output is not a terminal."""


@contextmanager
def progress() -> Iterator[Say]:
    """Show the progress: a moving line on a terminal, plain lines elsewhere.

    On stderr, so that the stdout of ``--json`` is only JSON.
    """
    if not sys.stderr.isatty():
        yield lambda what, seconds: print(f"{what} (about {seconds:.0f} s)", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as moving:
        task = moving.add_task("", total=None)
        yield lambda what, seconds: moving.update(task, description=f"{what} (about {seconds:.0f} s)")


def as_json(facts: Facts) -> None:
    """Print the facts as JSON."""
    json.dump(facts.as_dict(), sys.stdout, indent=2)
    print()


def as_table(facts: Facts) -> None:
    """Print the facts as a table."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(Text(_title(facts)), _table(facts), sep="\n")
    if facts.three_engines[QUERIES].most_connections > facts.parameters.max_size:
        console.print("More than max_size: the server counts a closed connection for some milliseconds more.")
    for name in KINDS:
        message = Text(facts.exhausted[name].message)
        console.print(Panel(message, title=f"(d) an exhausted {name} says", title_align="left"))
    for sentence in summary(facts):
        console.print(Text(sentence))


def _table(facts: Facts) -> Table:
    from rich.box import ROUNDED
    from rich.table import Table

    table = Table(box=ROUNDED)
    table.add_column("measured")
    for name in KINDS:
        table.add_column(name, justify="right")
    for heading, rows in _sections(facts):
        table.add_section()
        table.add_row(f"[bold]{heading}[/bold]")
        for label, cells in rows:
            table.add_row(f"  {label}", *cells)
    return table


def _title(facts: Facts) -> str:
    e = facts.environment
    return (
        f"{e['database']}, PostgreSQL {e['postgresql']}, Python {e['python']}, "
        f"SQLAlchemy {e['sqlalchemy']}, {e['driver']}"
    )


Row = tuple[str, tuple[str, ...]]


def _sections(facts: Facts) -> Iterator[tuple[str, list[Row]]]:
    p = facts.parameters
    load = (
        f"{p.threads} threads in a loop, {p.work * 1000:g} ms of work per checkout,\n"
        f"timeout {p.timeout:g} s, measured for {p.seconds:g} s"
    )
    yield (
        f"(a) {p.engines} engines of one URL, max_size {p.max_size}\n{load}",
        [
            _parameters(p.max_size, p),
            _row("most server connections ever seen", facts.three_engines, lambda x: x.most_connections),
            *_load_rows(facts.three_engines, per_connection=True),
        ],
    )
    yield (
        f"(b) fairness, max_size {p.connections}\n{load}",
        [_parameters(p.connections, p), *_load_rows(facts.fairness)],
    )
    yield (
        f"(c) a burst of {p.burst}, then one is in use\nidle_ttl {p.idle_ttl:g} s",
        [_parameters(p.burst, p), *_burst_rows(facts.burst, p)],
    )
    yield (
        f"(d) {len(p.holders)} threads hold all connections\ntimeout {p.exhausted_timeout:g} s",
        [_row("holders that the error below names", facts.exhausted, lambda x: x.holders_named)],
    )


def _parameters(max_size: int, p: Parameters) -> Row:
    """The limits of the pools, from the arguments that they were made with."""
    made = {name: options(name, max_size, p.timeout, p.idle_ttl) for name in KINDS}
    theirs = f"{made[QUEUE]['pool_size']} + {made[QUEUE]['max_overflow']}"
    return "limit: pool_size + max_overflow; max_size", (theirs, str(made[QUERIES]["max_size"]))


def _load_rows(loads: dict[str, Load], *, per_connection: bool = False) -> list[Row]:
    rates = [_row("checkouts per second, all threads", loads, lambda x: f"{x.checkouts_per_second:,.0f}")]
    if per_connection:  # where one pool opened more connections than the other, the sum alone misleads
        label = "checkouts per second and server connection"
        rates.append(_row(label, loads, lambda x: f"{x.checkouts_per_second_per_connection:,.0f}"))
    return [
        _row("checkouts per thread, min", loads, lambda x: x.fewest_checkouts),
        _row("checkouts per thread, median", loads, lambda x: f"{x.median_checkouts:g}"),
        _row("checkouts per thread, max", loads, lambda x: x.most_checkouts),
        _row("Jain's fairness index (1: all equal)", loads, lambda x: f"{x.jain:.3f}"),
        _row("longest wait", loads, lambda x: f"{x.longest_wait * 1000:,.0f} ms"),
        _row("timeouts", loads, lambda x: x.timeouts),
        *rates,
        _row("connections opened", loads, lambda x: x.connects),
    ]


def _burst_rows(bursts: dict[str, Burst], p: Parameters) -> list[Row]:
    def to_one(burst: Burst) -> str:
        return "never" if burst.seconds_to_one is None else f"{burst.seconds_to_one:.1f} s"

    return [
        _row("server connections at the peak", bursts, lambda x: x.connections),
        _row(f"still open {p.idle_ttl + p.grace:g} s later", bursts, lambda x: x.left),
        _row("only the one in use left after", bursts, to_one),
        _row("checkouts in between", bursts, lambda x: x.checkouts_meanwhile),
    ]


def _row(label: str, values: dict[str, Any], show: Callable[[Any], object]) -> Row:
    return label, tuple(str(show(values[name])) for name in KINDS)
