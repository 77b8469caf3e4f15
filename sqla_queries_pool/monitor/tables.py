"""Who holds connections, which checkouts wait, and why some got none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..insight.diagnosis import LONG
from .bar import in_words
from .data import MOST_LABELS, NOTHING, Data, count, duration, how_long_ago, short, whose
from .markup import Markup, foreign, joined, tag


def holders(pool: Data) -> Markup:
    """A table of the holders."""
    out, more = pool["holders"], pool["more_holders"]
    if not out:
        return tag("p", "Nobody holds a connection.", class_="dim")
    head = ("For", "Held by", "Label", "State", "Backend", "Uses", "Checked out at")
    numbers = ("For", "Backend", "Uses")
    seen: Counter[str] = Counter()
    rows = []
    for holder in out:
        key = f"{holder['thread']} {holder['name']} {holder['backend_pid']} {holder['uses']}"
        seen[key] += 1
        rows.append(_holder_row(holder, f"{key} {seen[key]}"))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", f"Held, longest first ({len(out) + more:,})"),
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
        tag("td", count(holder["uses"]), class_="number"),
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


def waiting(pool: Data) -> Markup | None:
    """The queue."""
    queue, more = pool["waiting"], pool["more_waiting"]
    if not queue:
        return None
    items = [
        tag(
            "li",
            foreign(each["name"]),
            joined([" ", tag("span", foreign(each["label"]), class_="label")]) if each["label"] else None,
            tag("span", f" {duration(each['seconds'])}", class_="dim"),
        )
        for each in queue
    ]
    return tag(
        "section",
        tag("h3", f"Waiting, longest first ({len(queue) + more:,})"),
        tag(
            "ol", *items, tag("li", f"and {more:,} more", class_="dim") if more else None, class_="queue-list"
        ),
    )


def host(numbers: Data) -> Markup | None:
    """The processes that share the limit, where the pool shares it."""
    shared = numbers["host"]
    if shared is None:
        return None
    processes = shared["processes"]
    taken = sum(each["leases"] for each in processes)
    items = [
        tag(
            "li",
            "this process" if each["me"] else foreign(f"process {each['process']} ({each['program']})"),
            tag("b", f" {each['leases']:,}"),
            tag("span", f", {each['waiting']:,} waiting", class_="warn") if each["waiting"] else None,
            data_key=str(each["process"]),
        )
        for each in processes
    ]
    return tag(
        "section",
        tag("h3", f"Shared by the processes of this host ({taken:,} of {shared['budget']:,} taken)"),
        tag("ul", *items, class_="timeouts"),
        tag("p", foreign(shared["problem"]), class_="warn") if shared["problem"] else None,
    )


def idle_in_transaction(numbers: Data) -> Markup | None:
    """The labels whose checkouts were idle in a transaction for longest."""
    worst = numbers.get("idle_in_transaction", [])
    if not worst:
        return None
    items = [
        tag(
            "li",
            tag("b", duration(each["time"]["seconds"])),
            " ",
            foreign(whose(each)),
            tag("span", f" in {count(each['time']['count'])} of its checkouts", class_="dim"),
            data_key=whose(each),
        )
        for each in worst[:MOST_LABELS]
    ]
    more = len(worst) - len(items)
    return tag(
        "section",
        tag("h3", "Idle in a transaction, worst labels first"),
        tag("ul", *items, class_="timeouts"),
        tag("p", f"and {more:,} more labels", class_="dim") if more else None,
    )


def classes(numbers: Data) -> Markup | None:
    """The classes of callers, where the pool has some."""
    if not numbers["classes"]:
        return None
    items = [
        tag(
            "li",
            foreign(name),
            tag("b", f" {each['held']:,}"),
            f" of {each['max']:,} at most" if each["max"] is not None else None,
            f", the first {each['min']:,} before others" if each["min"] else None,
            tag("span", f", {each['waiting']:,} waiting", class_="warn") if each["waiting"] else None,
            data_key=name,
        )
        for name, each in numbers["classes"].items()
    ]
    return tag("section", tag("h3", "Classes of callers"), tag("ul", *items, class_="timeouts"))


def timeouts(pool: Data) -> Markup | None:
    """The last checkouts that got no connection, each with the holders at that moment."""
    last, more = pool["timeouts"], pool["more_timeouts"]
    if not last:
        return None
    return tag(
        "section",
        tag("h3", "Last timeouts, and why"),
        tag("ul", *map(_timeout, last), class_="timeouts"),
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
            tag("summary", in_words(n)),
            tag("ul", *(tag("li", foreign(_in_short(holder))) for holder in then["holders"])),
            tag("p", f"and {then['more_holders']:,} more", class_="dim") if then["more_holders"] else None,
        ),
        data_key=then["taken_at"],
    )


def _in_short(holder: Data) -> str:
    label = f" [{holder['label']}]" if holder["label"] else ""
    return f"{holder['name']}{label}: {holder['state']} for {duration(holder['seconds'])}"
