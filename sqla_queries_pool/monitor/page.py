"""The page: made here from what :func:`~.look.look` returns, all that comes from elsewhere escaped.

``page.js`` only asks for the page again and puts into place what has changed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from ..diagnostics import LONG
from ..stats import BOUNDS
from .look import NOTHING, duration, how_long_ago, short

DETAILED = 8
"""Of how many pools the page says who holds what."""
MOST_ROWS = 100
"""Pools in the overview."""
REFRESH = 5
"""Seconds, without JavaScript."""
Data = dict[str, Any]


class Markup(str):
    """HTML that is safe as it is."""

    __slots__ = ()


def tag(name: str, *children: str | int | None, **attributes: str | float | bool | None) -> Markup:
    """One element.  What is no :class:`Markup` is escaped; None and False are left out."""
    said = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{said}>{joined(children)}</{name}>")


def joined(children: Iterable[str | int | None]) -> Markup:
    """One after the other, escaped unless they are :class:`Markup`."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child))
            for child in children
            if child is not None
        )
    )


def foreign(text: str | None) -> Markup | None:
    """What somebody else has named, kept apart: from right to left it would turn around what is beside it."""
    return None if text is None else tag("bdi", text)


def _static(name: str) -> Markup:
    return Markup(importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


CSS, JS = _static("page.css"), _static("page.js")
ICON = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#3566d6" d="M1 9h4v6H1z"/>'
    '<path fill="#3566d6" d="M6 4h4v11H6z"/><path fill="#c9761f" d="M11 1h4v14h-4z"/></svg>'
)
POLICY = (
    f"default-src 'none'; script-src {_digest(JS)}; style-src {_digest(CSS)}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy: these scripts and styles and nothing else, and nothing from elsewhere."""


def document(data: Data, prefix: str) -> str:
    """The whole page.

    :param prefix: where the application is mounted.
    """
    refresh = Markup(f'<noscript><meta http-equiv="refresh" content="{REFRESH}"></noscript>')
    header = tag(
        "header",
        tag("h1", "Connection pools"),
        tag("p", tag("span", _taken(data), id="clock"), class_="dim"),
        tag(
            "p",
            tag("noscript", f"Without JavaScript the page loads again every {REFRESH} s."),
            id="status",
            role="status",
        ),
        tag("button", "Pause", id="pause", type="button", hidden=True),
    )
    return _skeleton(
        refresh,
        header,
        tag("nav", id="processes", aria_label="Processes", hidden=True),
        _main(data),
        _legend(),
        tag("footer", tag("a", "data.json", href=f"{prefix}/data.json"), class_="dim"),
        tag("script", JS),
    )


def message(title: str, *paragraphs: str) -> str:
    """A page that says one thing."""
    return _skeleton(
        Markup(""), tag("main", tag("h1", title), *(tag("p", each) for each in paragraphs), class_="message")
    )


def _skeleton(head: Markup, *body: Markup) -> str:
    first = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    icon = Markup(f'<link rel="icon" href="{escape(ICON)}">')
    title = tag("title", "QueriesPool monitor")
    inside = tag("head", first, title, icon, head, tag("style", CSS))
    return f"<!DOCTYPE html>\n{tag('html', inside, tag('body', *body), lang='en')}\n"


def _taken(data: Data) -> str:
    return f"process {data['process']} as of {data['taken_at'][11:19]} UTC"


def _main(data: Data) -> Markup:
    pools = data["pools"]
    shown = [pool for pool in pools if "holders" in pool]
    body = [_overview(data)] if data["all_pools"] > 1 else []
    body += [_card(pool) for pool in sorted(shown, key=lambda pool: pool["statistics"]["label"])]
    if not shown:
        body.append(tag("p", _nothing(data), class_="empty"))
    return tag(
        "main",
        *body,
        data_process=data["process"],
        data_taken=_taken(data),
    )


def _nothing(data: Data) -> str:
    if data["all_pools"]:
        return "This process has no such pool, or no longer."
    return "No pool yet: one appears with the first engine that uses QueriesPool."


# -- all pools -----------------------------------------------------------------------------------------


def _overview(data: Data) -> Markup:
    rows = sorted(data["pools"], key=lambda pool: pool["statistics"]["label"])[:MOST_ROWS]
    more = data["more_pools"] + len(data["pools"]) - len(rows)
    narrowed = data["all_pools"] > len(data["pools"]) + data["more_pools"]
    said = f"{data['all_pools']} pools"
    head = (
        "Database",
        "Connections",
        "Held",
        "Idle",
        "Waiting",
        "Limit",
        "Per second",
        "Wait, 95 %",
        "Timeouts",
    )
    return tag(
        "section",
        tag("h2", said, tag("a", "show all", href="?", class_="aside") if narrowed else None),
        tag(
            "div",
            tag(
                "table",
                tag("caption", "All pools; figures of the last minute", class_="hidden"),
                tag(
                    "thead", tag("tr", *(tag("th", name, scope="col", class_=_class(name)) for name in head))
                ),
                tag("tbody", *(_overview_row(pool) for pool in rows)),
            ),
            class_="scroll",
        ),
        tag("p", f"and {more:,} more", class_="dim") if more else None,
        class_="card overview",
    )


def _class(column: str) -> str | None:
    return None if column in ("Database", "Connections") else "number"


def _overview_row(pool: Data) -> Markup:
    n, last = pool["statistics"], pool["last_minute"] or {}
    numbers = (
        _count(n["held"]),
        _count(n["idle"]),
        _count(n["waiting"]),
        "none" if n["limit"] is None else _count(n["limit"]),
        _rate(last.get("checkouts_per_second")),
        duration(last.get("wait_95")),
        _count(last.get("timeouts", 0)),
    )
    name = tag("a", foreign(n["label"]), href=f"?pool={_key_of(pool)}")
    wrong = (False, False, n["waiting"] > 0, False, False, False, last.get("timeouts", 0) > 0)
    return tag(
        "tr",
        tag("th", name, scope="row"),
        tag("td", _bar(n, small=True), class_="bar-cell"),
        *(
            tag("td", text, class_="number warn" if bad else "number")
            for text, bad in zip(numbers, wrong, strict=True)
        ),
        data_key=_key_of(pool),
    )


def _key_of(pool: Data) -> str:
    """Its id, as an address and an attribute may have it."""
    return quote(pool["id"], errors="replace")


def _count(number: int) -> str:
    return f"{number:,}"


def _rate(number: float | None) -> str:
    return NOTHING if number is None else f"{number:,.3g}" if number < 100 else f"{number:,.0f}"


# -- one pool ------------------------------------------------------------------------------------------


def _card(pool: Data) -> Markup:
    n = pool["statistics"]
    return tag(
        "article",
        tag("h2", foreign(n["label"]), tag("span", f"pool id {n['pid']}", class_="aside mono")),
        _bar(n),
        _key(n),
        tag("div", *_charts(pool), class_="charts"),
        tag("div", _holders(pool), _waiting(pool), class_="who"),
        _timeouts(pool),
        _since_start(pool),
        class_="card",
        data_key=_key_of(pool),
    )


STATES = ("held", "opening", "closing", "idle")
WIDTH, POOL, HEIGHT = 1000.0, 720.0, 20
"""The bar, in its own units: the pool's part up to the limit, the rest is for those who wait."""
CELLS = 60
SMALL_CELLS = 16
"""Up to this limit each connection is a cell of its own."""


def _bar(n: Data, small: bool = False) -> Markup:
    """What the limit is used for, and beside it who waits, in the same scale."""
    whole = max(n["limit"] or 0, n["open"] + n["opening"], 1 if n["limit"] else n["peak_held"], 1)
    unit = POOL / whole
    x, parts = 0.0, []
    for state in STATES:
        if n[state]:
            width = min(max(n[state] * unit, 3.0), POOL - x)
            parts.append(_box(x, width, state))
            x += width
    if n["waiting"]:
        parts.append(_box(POOL + 6, min(max(n["waiting"] * unit, 4.0), WIDTH - POOL - 6), "waiting"))
    if whole <= (SMALL_CELLS if small else CELLS):
        gaps = "".join(f"M{unit * i:.1f} 0v{HEIGHT}" for i in range(1, whole))
        parts.append(tag("path", d=gaps, class_="gap"))
    if n["limit"] is not None:
        parts.append(tag("path", d=f"M{POOL + 2} -3v{HEIGHT + 6}", class_="limit"))
    return tag(
        "svg",
        _box(0, POOL, "free"),
        tag("path", d=f"M{POOL} {HEIGHT - 0.5}H{WIDTH:.0f}", class_="queue"),
        *parts,
        class_="bar small" if small else "bar",
        viewBox=f"0 -3 {WIDTH:.0f} {HEIGHT + 6}",
        preserveAspectRatio="none",
        role="img",
        aria_label=_in_words(n),
    )


def _box(x: float, width: float, state: str) -> Markup:
    return tag("rect", x=f"{x:.1f}", y=0, width=f"{width:.1f}", height=HEIGHT, class_=state)


def _in_words(n: Data) -> str:
    limit = "no limit" if n["limit"] is None else f"limit {n['limit']}"
    return ", ".join([*(f"{state} {n[state]}" for state in (*STATES, "waiting")), limit])


def _key(n: Data) -> Markup:
    """The numbers, which explain the bar."""
    shown = [state for state in (*STATES, "waiting") if state != "closing" or n[state]]
    items = [(_swatch(state), state, _count(n[state])) for state in shown]
    items.append((_swatch("limit"), "limit", "none" if n["limit"] is None else _count(n["limit"])))
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", swatch, name),
                tag("dd", number),
                class_="warn" if name == "waiting" and n["waiting"] else None,
            )
            for swatch, name, number in items
        ),
        class_="key",
    )


def _swatch(state: str) -> Markup:
    inside = (
        tag("path", d="M6 0v12", class_="limit")
        if state == "limit"
        else tag("rect", width=12, height=12, class_=state)
    )
    return tag("svg", inside, class_="swatch", viewBox="0 0 12 12", aria_hidden="true")


def _legend() -> Markup:
    """The patterns that the bars are filled with: nothing is told by its colour alone."""

    def pattern(name: str, size: int, *inside: Markup) -> Markup:
        return tag(
            "pattern",
            *inside,
            id=name,
            width=size,
            height=size,
            patternUnits="userSpaceOnUse",
            viewBox=f"0 0 {size} {size}",
        )

    def ground(size: int, name: str) -> Markup:
        return tag("rect", width=size, height=size, class_=f"{name}-ground")

    return tag(
        "svg",
        tag(
            "defs",
            pattern("opening", 8, ground(8, "opening"), tag("path", d="M0 4h8", class_="opening-line")),
            pattern("closing", 6, tag("circle", cx=3, cy=3, r=1.3, class_="closing-dot")),
            pattern("waiting", 8, ground(8, "waiting"), tag("path", d="M4 0v8", class_="waiting-line")),
        ),
        width=0,
        height=0,
        class_="patterns",
        aria_hidden="true",
    )


# -- charts --------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 300.0, 56.0


def _charts(pool: Data) -> Iterator[Markup]:
    history, last = pool["history"], pool["last_minute"] or {}
    rates, timeouts = history["checkouts_per_second"], history["timeouts"]
    missed = last.get("timeouts", 0)
    yield _figure(
        "Checkouts",
        f"{_rate(last.get('checkouts_per_second'))} per second",
        f"{missed:,} {'timeout' if missed == 1 else 'timeouts'}" if missed else None,
        top := _nice(max(rates, default=0.0)),
        f"{top:g}/s",
        _columns(history, rates, top, "columns"),
        _ticks(history, timeouts),
    )
    for title, name in (("Wait in line", "wait"), ("Use", "use")):
        median, most = history[f"{name}_median"], history[f"{name}_95"]
        top = _bound(max((value for value in most if value is not None), default=0.0))
        yield _figure(
            title,
            f"median {duration(last.get(f'{name}_median'))}",
            f"95 % {duration(last.get(f'{name}_95'))}",
            top,
            f"{top:g} s" if top >= 1 else f"{top * 1000:g} ms",
            _columns(history, most, top, f"area {name}"),
            _line(history, median, top, f"line {name}"),
            class_=name,
        )


def _figure(
    title: str,
    first: str,
    second: str | None,
    top: float,
    scale: str,
    *drawn: Markup,
    class_: str = "checkouts",
) -> Markup:
    """One chart.  What its caption says stands in words beside the drawing."""
    words = ", ".join([f"{title} in the last minute: {first}", *([second] if second else [])])
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("b", title),
            tag("span", first, class_="first"),
            tag("span", second, class_="second") if second else None,
        ),
        tag("span", scale if top else "", class_="scale"),
        tag(
            "svg",
            tag("path", d=f"M0 .5H{CHART_WIDTH:.0f}M0 {CHART_HEIGHT - 0.5}H{CHART_WIDTH:.0f}", class_="grid"),
            *drawn,
            viewBox=f"0 0 {CHART_WIDTH:.0f} {CHART_HEIGHT:.0f}",
            preserveAspectRatio="none",
            role="img",
            aria_label=words,
        ),
        tag("span", tag("span", "60 s ago"), tag("span", "now"), class_="axis"),
        class_=class_,
    )


def _x(seconds_ago: float) -> float:
    return CHART_WIDTH * (1 - min(seconds_ago, 60.0) / 60.0)


def _columns(history: Data, values: Sequence[float | None], top: float, kind: str) -> Markup:
    """A column for each interval."""
    parts = []
    for ago, seconds, value in zip(history["seconds_ago"], history["seconds"], values, strict=True):
        if value:
            left, right = _x(ago + seconds), _x(ago)
            height = min(value / top, 1.0) * CHART_HEIGHT
            parts.append(
                f"M{left:.1f} {CHART_HEIGHT:.0f}V{CHART_HEIGHT - height:.1f}H{right:.1f}V{CHART_HEIGHT:.0f}z"
            )
    return tag("path", d="".join(parts), class_=kind)


def _line(history: Data, values: Sequence[float | None], top: float, kind: str) -> Markup:
    """A step for each interval, connected where one follows another."""
    parts, end = [], None
    for ago, seconds, value in zip(history["seconds_ago"], history["seconds"], values, strict=True):
        left, right = _x(ago + seconds), _x(ago)
        if value is None:
            end = None
            continue
        y = CHART_HEIGHT * (1 - min(value / top, 1.0))
        parts.append(f"{'M' if end is None or left - end > 1 else 'L'}{left:.1f} {y:.1f}H{right:.1f}")
        end = right
    return tag("path", d="".join(parts), class_=kind)


def _ticks(history: Data, timeouts: Sequence[int]) -> Markup:
    """A mark hanging from the top for each interval in which somebody got nothing."""
    marks = [
        f"M{_x(ago + seconds / 2):.1f} 0v12"
        for ago, seconds, number in zip(history["seconds_ago"], history["seconds"], timeouts, strict=True)
        if number
    ]
    return tag("path", d="".join(marks), class_="ticks")


def _nice(most: float) -> float:
    """The end of an axis: 1, 2 or 5 times a power of ten."""
    top = 1.0
    while True:
        for factor in (1, 2, 5):
            if top * factor >= most:
                return top * factor
        top *= 10


def _bound(most: float) -> float:
    """The end of an axis of durations: a bound of the histograms, so that it seldom changes."""
    return next((bound for bound in BOUNDS if bound >= most), BOUNDS[-1]) if most else 0.0


# -- who, and why --------------------------------------------------------------------------------------


def _holders(pool: Data) -> Markup:
    holders, more = pool["holders"], pool["more_holders"]
    if not holders:
        return tag("p", "Nobody holds a connection.", class_="dim")
    head = ("For", "Held by", "Label", "State", "Backend", "Uses", "Checked out at")
    numbers = ("For", "Backend", "Uses")
    seen: Counter[str] = Counter()
    rows = []
    for holder in holders:
        key = f"{holder['thread']} {holder['name']} {holder['backend_pid']} {holder['uses']}"
        seen[key] += 1
        rows.append(_holder_row(holder, f"{key} {seen[key]}"))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", f"Held, longest first ({len(holders) + more:,})"),
            tag(
                "thead",
                tag(
                    "tr",
                    *(
                        tag("th", name, scope="col", class_="number" if name in numbers else None)
                        for name in head
                    ),
                ),
            ),
            tag("tbody", *rows),
            class_="holders",
        ),
        tag("p", f"and {more:,} more", class_="dim") if more else None,
        class_="scroll",
    )


def _holder_row(holder: Data, key: str) -> Markup:
    long = holder["seconds"] > LONG
    state = holder["state"]
    if holder["transaction"] not in (None, "unknown", "idle"):
        state = f"{state}, {holder['transaction']}"
    return tag(
        "tr",
        tag(
            "td",
            "long: " if long else None,
            duration(holder["seconds"]),
            class_="number warn" if long else "number",
        ),
        tag("td", foreign(holder["name"])),
        tag("td", foreign(holder["label"]) or NOTHING),
        tag("td", state),
        tag("td", holder["backend_pid"] or NOTHING, class_="number"),
        tag("td", _count(holder["uses"]), class_="number"),
        tag("td", _stack(holder["stack"], holder["now_at"])),
        data_key=key,
    )


def _stack(stack: Sequence[str], now_at: Sequence[str]) -> Markup | str:
    """Where the connection was checked out, and where its thread is now."""
    if not stack and not now_at:
        return NOTHING
    return tag(
        "details",
        tag("summary", foreign(short(stack[-1])) if stack else "not tracked"),
        *(
            joined(
                [
                    tag("p", title, class_="dim"),
                    tag("ol", *(tag("li", foreign(f)) for f in frames), class_="mono"),
                ]
            )
            for title, frames in (("Checked out at", stack), ("Now at", now_at))
            if frames
        ),
    )


def _waiting(pool: Data) -> Markup | None:
    waiting, more = pool["waiting"], pool["more_waiting"]
    if not waiting:
        return None
    items = [
        tag(
            "li",
            foreign(each["name"]),
            joined([" ", tag("span", foreign(each["label"]), class_="label")]) if each["label"] else None,
            tag("span", f" {duration(each['seconds'])}", class_="dim"),
        )
        for each in waiting
    ]
    return tag(
        "section",
        tag("h3", f"Waiting, longest first ({len(waiting) + more:,})"),
        tag("ol", *items, tag("li", f"and {more:,} more", class_="dim") if more else None, class_="line-of"),
    )


def _timeouts(pool: Data) -> Markup | None:
    timeouts, more = pool["timeouts"], pool["more_timeouts"]
    if not timeouts:
        return None
    return tag(
        "section",
        tag("h3", "Last timeouts, and why"),
        tag("ul", *map(_timeout, timeouts), class_="timeouts"),
        tag("p", f"and {more:,} earlier", class_="dim") if more else None,
    )


def _timeout(then: Data) -> Markup:
    n, why = then["statistics"], then["diagnosis"] or {"kind": "unknown", "cause": "", "remedy": ""}
    return tag(
        "li",
        tag("time", how_long_ago(then["seconds_ago"]), datetime=then["taken_at"]),
        tag("b", why["kind"], class_="kind"),
        tag("span", foreign(why["cause"]), ". ", tag("em", foreign(why["remedy"])), class_="why"),
        tag(
            "details",
            tag("summary", _in_words(n)),
            tag("ul", *(tag("li", foreign(_in_short(holder))) for holder in then["holders"])),
            tag("p", f"and {then['more_holders']:,} more", class_="dim") if then["more_holders"] else None,
        ),
        data_key=then["taken_at"],
    )


def _in_short(holder: Data) -> str:
    label = f" [{holder['label']}]" if holder["label"] else ""
    return f"{holder['name']}{label}: {holder['state']} for {duration(holder['seconds'])}"


def _since_start(pool: Data) -> Markup:
    n = pool["statistics"]
    reasons = ", ".join(f"{reason}: {number:,}" for reason, number in sorted(n["closes"].items()))
    always = {
        "checkouts": n["checkouts"],
        "after a wait": n["waits"],
        "timeouts": n["timeouts"],
        "opened": n["connects"],
    }
    sometimes = {
        "deadlocks": n["deadlocks"],
        "errors of connecting": n["connect_errors"],
        "found dead": n["dead"],
        "gave way to another engine": n["evictions"],
        "failed resets": n["failed_resets"],
        "mended": n["mended"],
    }
    facts = {
        **always,
        "most held": n["peak_held"],
        **{name: number for name, number in sometimes.items() if number},
    }
    error = pool["last_connect_error"]
    return tag(
        "div",
        tag(
            "p",
            "Since the start: ",
            *(
                joined([", " if place else "", f"{name} ", tag("b", _count(number))])
                for place, (name, number) in enumerate(facts.items())
            ),
            joined([". Closed: ", foreign(reasons)]) if reasons else None,
            ".",
        ),
        tag("p", "Last error of connecting: ", foreign(error), class_="warn") if error else None,
        class_="since dim",
    )
