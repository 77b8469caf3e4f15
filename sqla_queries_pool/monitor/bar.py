"""How much of a pool's limit is used: the bar, its key and its patterns."""

from __future__ import annotations

from .data import Data, count
from .markup import Markup, tag

STATES = ("held", "opening", "closing", "idle")
WIDTH, POOL, HEIGHT = 1000.0, 720.0, 20
"""The bar, in its own units: the pool's part up to the limit, the rest is for waiting checkouts."""
CELLS = 60
SMALL_CELLS = 16
"""Up to this limit each connection is a cell of its own."""


def bar(n: Data, small: bool = False) -> Markup:
    """What uses the limit, and beside it the waiting checkouts, on the same scale."""
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
        aria_label=in_words(n),
    )


def _box(x: float, width: float, state: str) -> Markup:
    return tag("rect", x=f"{x:.1f}", y=0, width=f"{width:.1f}", height=HEIGHT, class_=state)


def in_words(n: Data) -> str:
    """The same in words, for screen readers."""
    limit = "no limit" if n["limit"] is None else f"limit {n['limit']}"
    return ", ".join([*(f"{state} {n[state]}" for state in (*STATES, "waiting")), limit])


def key(n: Data) -> Markup:
    """The numbers, which explain the bar."""
    shown = [state for state in (*STATES, "waiting") if state != "closing" or n[state]]
    items = [(_swatch(state), state, count(n[state])) for state in shown]
    items.append((_swatch("limit"), "limit", "none" if n["limit"] is None else count(n["limit"])))
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


def patterns() -> Markup:
    """The patterns that the bars are filled with: nothing is shown by colour alone."""

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
