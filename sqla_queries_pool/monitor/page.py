"""The page: made here from what :func:`.data.collect` returns.

``page.js`` only asks for the page again and puts into place what has changed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from html import escape
from urllib.parse import quote

from . import bar, tables
from .charts import charts
from .data import Data, count, duration, rate
from .markup import Markup, foreign, joined, tag

DETAILED = 8
"""For how many pools the page lists the holders."""
MOST_ROWS = 100
"""Pools in the overview."""
REFRESH = 5
"""Seconds, without JavaScript."""


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
            tag("noscript", f"Without JavaScript the page reloads every {REFRESH} s."),
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
        bar.patterns(),
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
        return "This process has no pool with this id."
    return "No pools yet: the first engine that uses QueriesPool creates one."


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
                tag("caption", "All pools, with the figures of the last minute", class_="hidden"),
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
        count(n["held"]),
        count(n["idle"]),
        count(n["waiting"]),
        "none" if n["limit"] is None else count(n["limit"]),
        rate(last.get("checkouts_per_second")),
        duration(last.get("wait_95")),
        count(last.get("timeouts", 0)),
    )
    name = tag("a", foreign(n["label"]), href=f"?pool={_key_of(pool)}")
    wrong = (False, False, n["waiting"] > 0, False, False, False, last.get("timeouts", 0) > 0)
    return tag(
        "tr",
        tag("th", name, scope="row"),
        tag("td", bar.bar(n, small=True), class_="bar-cell"),
        *(
            tag("td", text, class_="number warn" if bad else "number")
            for text, bad in zip(numbers, wrong, strict=True)
        ),
        data_key=_key_of(pool),
    )


def _key_of(pool: Data) -> str:
    """Its id, as an address and an attribute may have it."""
    return quote(pool["id"], errors="replace")


# -- one pool ------------------------------------------------------------------------------------------


def _card(pool: Data) -> Markup:
    n = pool["statistics"]
    return tag(
        "article",
        tag("h2", foreign(n["label"]), tag("span", f"pool id {n['pid']}", class_="aside mono")),
        bar.bar(n),
        bar.key(n),
        tag("div", *charts(pool), class_="charts"),
        tag("div", tables.holders(pool), tables.waiting(pool), class_="tables"),
        tables.host(n),
        tables.classes(n),
        tables.idle_in_transaction(n),
        tables.timeouts(pool),
        _since_start(pool),
        class_="card",
        data_key=_key_of(pool),
    )


def _since_start(pool: Data) -> Markup:
    n = pool["statistics"]
    reasons = ", ".join(f"{reason}: {number:,}" for reason, number in sorted(n["closes"].items()))
    always = {
        "checkouts": n["checkouts"],
        "of them after a wait": n["waits"],
        "timeouts": n["timeouts"],
        "connections opened": n["connects"],
    }
    sometimes = {
        "deadlocks": n["deadlocks"],
        "connect errors": n["connect_errors"],
        "connections found dead": n["dead"],
        "connections that gave way to another engine": n["evictions"],
        "failed resets": n["failed_resets"],
        "bookkeeping errors mended": n["mended"],
    }
    facts = {
        **always,
        "most held at once": n["peak_held"],
        **{name: number for name, number in sometimes.items() if number},
    }
    error = pool["last_connect_error"]
    return tag(
        "div",
        tag(
            "p",
            "Since the start: ",
            *(
                joined([", " if place else "", f"{name} ", tag("b", count(number))])
                for place, (name, number) in enumerate(facts.items())
            ),
            joined([". Closed: ", foreign(reasons)]) if reasons else None,
            ".",
        ),
        tag("p", "Last connect error: ", foreign(error), class_="warn") if error else None,
        class_="since dim",
    )
