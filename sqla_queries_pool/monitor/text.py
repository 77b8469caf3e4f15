"""The same in a terminal."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .data import MOST_LABELS, NOTHING, Data, clean, collect, duration, how_long_ago, short, whose
from .history import EVERY, History

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100
"""Columns, where the output is no terminal."""
BAR = 40
"""Characters, up to the limit."""
STEPS = "▁▂▃▄▅▆▇█"
MOST_POOLS, MOST_HOLDERS, MOST_TIMEOUTS = 20, 5, 2
SECONDS = 5.0
"""The longest that a monitor may take to answer."""
STYLES = {"held": "blue", "opening": "magenta", "closing": "dim", "idle": "cyan", "waiting": "yellow"}
SIGNS = {"held": "█", "opening": "▒", "closing": "∙", "idle": "░", "waiting": "▚"}


class MonitorError(Exception):
    """The monitor of another process does not answer, or what answers is no monitor."""


def here() -> Callable[[], Data]:
    """Show this process."""
    history = History()
    return lambda: collect(history, detailed=MOST_POOLS)


def there(url: str) -> Callable[[], Data]:
    """Show the process whose monitor is at a URL.

    :raises MonitorError: it is none of HTTP; what is returned raises it if there is no answer.
    """
    if not url.startswith(("http://", "https://")) or "@" in url:
        raise MonitorError("write the URL of a monitor's page, http://host:port/path, without a password")
    address = f"{url.rstrip('/').removesuffix('/data.json')}/data.json"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch() -> Data:
        try:
            with opener.open(address, timeout=SECONDS) as answer:
                data: Data = clean(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                raise MonitorError(f"{address} answered {error.code} {error.reason}") from None
        except (OSError, ValueError) as error:
            raise MonitorError(f"{address} does not answer: {getattr(error, 'reason', error)}") from None
        if not isinstance(data, dict) or not isinstance(data.get("pools"), list):
            raise MonitorError(f"{address} is not a QueriesPool monitor")
        return data

    return fetch


def show(source: Callable[[], Data], once: bool) -> None:
    """Show it: once, or again each second until Ctrl-C.

    :raises MonitorError: there was no answer to the first look.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    data = source()
    if once:
        console.print(picture(data))
        return
    with (
        Live(console=console, screen=True, auto_refresh=False)
        if console.is_terminal
        else nullcontext() as live
    ):
        problem = ""
        while True:
            if live is None:
                console.print(picture(data, problem))
            else:
                live.update(picture(data, problem), refresh=True)
            time.sleep(EVERY)
            try:
                data, problem = source(), ""
            except MonitorError as error:
                problem = f"{error}; trying again"


def picture(data: Data, problem: str = "") -> RenderableType:
    """All pools, as rich draws them."""
    from rich.console import Group
    from rich.text import Text

    n = data["all_pools"]
    title = f"{n} {'pool' if n == 1 else 'pools'}, process {data['process']}, {data['taken_at'][11:19]} UTC"
    shown = data["pools"][:MOST_POOLS]
    more = n - len(shown)
    return Group(
        Text(title, style="bold"),
        *([Text(problem, style="bold red")] if problem else []),
        *(_pool(pool) for pool in sorted(shown, key=lambda pool: pool["statistics"]["label"])),
        *([Text(f"and {more:,} more", style="dim")] if more else []),
    )


def _pool(pool: Data) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    parts: list[RenderableType] = [_bar(pool["statistics"]), _charts(pool)]
    parts += [_host(pool["statistics"]["host"])] if pool["statistics"].get("host") else []
    parts += [_classes(pool["statistics"]["classes"])] if pool["statistics"].get("classes") else []
    parts += [_holders(pool)] if pool["holders"] else []
    parts += [_idle(idle)] if (idle := pool["statistics"].get("idle_in_transaction")) else []
    parts += [_timeout(then) for then in pool["timeouts"][:MOST_TIMEOUTS]]
    title = Text(pool["statistics"]["label"], style="bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def _bar(n: Data) -> RenderableType:
    from rich.text import Text

    whole = max(n["limit"] or 0, n["open"] + n["opening"], 1 if n["limit"] else n["peak_held"], 1)
    bar, left = Text(), BAR
    for state in ("held", "opening", "closing", "idle"):
        width = min(left, max(round(n[state] * BAR / whole), 1)) if n[state] else 0
        bar.append(SIGNS[state] * width, STYLES[state])
        left -= width
    bar.append(f"{' ' * left}{' ' if n['limit'] is None else '│'}")
    bar.append(SIGNS["waiting"] * min(BAR // 2, -(-n["waiting"] * BAR // whole)), STYLES["waiting"])
    numbers = Text(no_wrap=False)
    for state in STYLES:
        if state != "closing" or n[state]:
            numbers.append(f"{SIGNS[state]} ", STYLES[state])
            numbers.append(f"{state} {n[state]:,}   ", "bold red" if state == "waiting" and n[state] else "")
    numbers.append("no limit" if n["limit"] is None else f"│ limit {n['limit']:,}")
    return Text("\n").join([bar, numbers])


def _host(shared: Data) -> RenderableType:
    from rich.text import Text

    who = ", ".join(
        f"{'this process' if each['me'] else each['process']} {each['leases']}"
        for each in shared["processes"]
    )
    taken = sum(each["leases"] for each in shared["processes"])
    return Text(f"host: {taken} of {shared['budget']} taken: {who}", style="dim")


def _classes(classes: Data) -> RenderableType:
    from rich.text import Text

    each = []
    for name, has in classes.items():
        most = "" if has["max"] is None else f" of {has['max']}"
        waiting = f" ({has['waiting']} waiting)" if has["waiting"] else ""
        each.append(f"{name} {has['held']}{most}{waiting}")
    return Text(f"classes: {', '.join(each)}", style="dim")


def _charts(pool: Data) -> RenderableType:
    from rich.table import Table

    history, last = pool["history"], pool["last_minute"] or {}
    rate, missed = last.get("checkouts_per_second"), last.get("timeouts", 0)
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "checkouts",
        spark(history["checkouts_per_second"]),
        NOTHING if rate is None else f"{rate:,.3g} per second",
    )
    for title, name in (("wait", "wait"), ("in use", "use")):
        said = f"median {duration(last.get(f'{name}_median'))}, 95 % {duration(last.get(f'{name}_95'))}"
        table.add_row(title, spark(history[f"{name}_95"]), said)
    if missed:
        table.add_row("timeouts", spark(history["timeouts"]), f"[bold red]{missed:,} in the last minute[/]")
    return table


def spark(values: Sequence[float | None]) -> str:
    """A line of columns for the last intervals, two in one character's width of time."""
    pairs = [values[max(0, end - 2) : end] for end in range(len(values), 0, -2)][::-1]
    known = [max((v for v in pair if v is not None), default=None) for pair in pairs]
    top = max((value for value in known if value is not None), default=0.0)
    line = "".join(
        " " if not value else STEPS[min(len(STEPS) - 1, int(value / top * len(STEPS)))] for value in known
    )
    return line.rjust(30)


def _holders(pool: Data) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="bold")
    for holder in pool["holders"][:MOST_HOLDERS]:
        state = holder["state"]
        if holder["transaction"] not in (None, "unknown", "idle"):
            state = f"{state}, {holder['transaction']}"
        table.add_row(
            duration(holder["seconds"]),
            Text(holder["name"]),
            Text(holder["label"] or NOTHING),
            state,
            Text(short(holder["stack"][-1]) if holder["stack"] else "", style="dim"),
        )
    more = len(pool["holders"]) - MOST_HOLDERS + pool["more_holders"]
    if more > 0:
        table.add_row("", Text(f"and {more:,} more", style="dim"))
    return table


def _idle(worst: list[Data]) -> RenderableType:
    from rich.text import Text

    said = (f"{whose(each)} {duration(each['time']['seconds'])}" for each in worst[:MOST_LABELS])
    return Text(f"idle in a transaction: {', '.join(said)}", style="dim")


def _timeout(then: Data) -> RenderableType:
    from rich.text import Text

    why = then["diagnosis"] or {"kind": "unknown", "cause": "", "remedy": ""}
    return Text.assemble(
        (f"{how_long_ago(then['seconds_ago'])}: timeout, {why['kind']}. ", "bold red"),
        why["cause"],
        ". ",
        (why["remedy"], "dim"),
    )
