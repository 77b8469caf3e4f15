"""What the page, the JSON and the terminal view show: plain data, cut, and safe to show."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import replace
from typing import Any

from ..insight.snapshot import Snapshot, snapshot
from ..pool import Pool, PoolManager
from .history import WINDOW, History, minute, series

Data = dict[str, Any]
NOTHING = "\N{EN DASH}"
"""Where there is no value."""
MOST_POOLS = 200
MOST_HOLDERS = 25
MOST_WAITING = 10
MOST_TIMEOUTS = 5
MOST_HOLDERS_THEN = 5
"""Of each timeout."""
MOST_LABELS = 5
"""Of those that were idle in a transaction, the worst."""
MOST_FRAMES = 8
"""Of any stack, the innermost."""
MOST_CHARACTERS = 200
"""Of any text."""
_SECRET = re.compile(r"(?i)(\b(?:pass(?:word|wd)?|pwd)\s*=\s*)('[^']*'|\S+)|(://[^/?#\s]*?:)[^/\s]*(?=@)")


def collect(history: History, only: str | None = None, detailed: int = MOST_POOLS) -> Data:
    """Everything, as JSON knows it.

    :param only: the id of the one pool to show; None for all.
    :param detailed: for how many pools to list the holders; pools where checkouts wait, or did, come first.
    """
    history.look()
    pools = sorted(PoolManager.pools(), key=lambda pool: (pool.label, pool.id))
    found = [(pool, _numbers(pool, history)) for pool in pools if only in (None, pool.id)]
    urgent = sorted(found, key=lambda each: not _is_urgent(each[1]))[:MOST_POOLS]
    return {
        "process": os.getpid(),
        "taken_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "window": WINDOW,
        "pools": [
            {**numbers, **(_details(pool) if place < detailed else {})}
            for place, (pool, numbers) in enumerate(urgent)
        ],
        "all_pools": len(pools),
        "more_pools": len(found) - len(urgent),
    }


def _numbers(pool: Pool, history: History) -> Data:
    samples = history.of(pool)
    numbers: dict[str, Any] = clean(pool.statistics().as_dict())
    # The id as it is, since one asks for a pool by it.
    return {
        "id": pool.id,
        "statistics": numbers,
        "last_minute": minute(samples),
        "history": series(samples, history.now()),
    }


def _is_urgent(numbers: dict[str, Any]) -> bool:
    last: dict[str, Any] = numbers["last_minute"] or {"timeouts": 0, "wait_95": None}
    return bool(numbers["statistics"]["waiting"] or last["timeouts"] or last["wait_95"] is not None)


def _details(pool: Pool) -> Data:
    now = snapshot(pool)
    timeouts = pool.last_timeouts
    last = [_cut(then, MOST_HOLDERS_THEN, 0) for then in reversed(timeouts[-MOST_TIMEOUTS:])]
    for then in last:
        then["seconds_ago"] = (
            now.taken_at - datetime.datetime.fromisoformat(then["taken_at"])
        ).total_seconds()
    # Its statistics go with who it says holds and waits: those of a moment ago would not add up.
    return {
        **_cut(now, MOST_HOLDERS, MOST_WAITING),
        "timeouts": last,
        "more_timeouts": len(timeouts) - len(last),
    }


def _cut(whole: Snapshot, holders: int, waiting: int) -> Data:
    """The first of those who hold and wait, and how many more there are."""
    part = replace(whole, holders=whole.holders[:holders], waiting=whole.waiting[:waiting])
    data = part.as_dict()
    data["last_connect_error"] = _without_secrets(data["last_connect_error"])
    if data["diagnosis"] is not None:
        data["diagnosis"]["cause"] = _without_secrets(data["diagnosis"]["cause"])
    for each in (*data["holders"], *data["waiting"]):
        for name in ("stack", "now_at"):
            each[name] = each.get(name, ())[-MOST_FRAMES:]
    return {
        **clean(data),
        "more_holders": len(whole.holders) - len(part.holders),
        "more_waiting": len(whole.waiting) - len(part.waiting),
    }


def _without_secrets(text: str | None) -> str | None:
    """On one line.  A driver may quote what it was told to connect to."""
    if text is None:
        return None
    return _SECRET.sub(lambda found: f"{found[1] or found[3]}***", " ".join(text.split()))


def clean(value: Any) -> Any:
    """The same with every text in it cut, and what can't be seen, or turns the rest around, spelled out."""
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, dict):
        return {clean(key): clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    return value


def _clean_text(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def whose(idle: Data) -> str:
    """The label, and the class of callers, of what was idle in a transaction."""
    return " ".join(filter(None, (idle["label"] or "without a label", idle["caller"])))


def short(frame: str) -> str:
    """One frame of a stack, its file without the folders."""
    return re.split(r"[/\\]", frame)[-1]


def how_long_ago(seconds: float) -> str:
    """A moment in the past, to the second."""
    return f"{max(0.0, seconds):.0f} s ago" if seconds < 59.5 else f"{duration(max(60.0, seconds))} ago"


def count(number: int) -> str:
    """With thousands set apart."""
    return f"{number:,}"


def rate(number: float | None) -> str:
    """So many per second."""
    return NOTHING if number is None else f"{number:,.3g}" if number < 100 else f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    """As people write it."""
    if seconds is None:
        return NOTHING
    if seconds < 0.0095:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
