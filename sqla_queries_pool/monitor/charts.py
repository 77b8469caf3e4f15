"""The last minute, drawn: checkouts and timeouts, waiting times, times in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..budget.stats import BOUNDS
from .data import Data, duration, rate
from .markup import Markup, tag

WIDTH, HEIGHT = 300.0, 56.0


def charts(pool: Data) -> Iterator[Markup]:
    """All of a pool's."""
    history, last = pool["history"], pool["last_minute"] or {}
    rates, timeouts = history["checkouts_per_second"], history["timeouts"]
    missed = last.get("timeouts", 0)
    yield _figure(
        "Checkouts",
        f"{rate(last.get('checkouts_per_second'))} per second",
        f"{missed:,} {'timeout' if missed == 1 else 'timeouts'}" if missed else None,
        top := _nice(max(rates, default=0.0)),
        f"{top:g}/s",
        _columns(history, rates, top, "columns"),
        _ticks(history, timeouts),
    )
    for title, name in (("Wait in the queue", "wait"), ("Time in use", "use")):
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
            tag("path", d=f"M0 .5H{WIDTH:.0f}M0 {HEIGHT - 0.5}H{WIDTH:.0f}", class_="grid"),
            *drawn,
            viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
            preserveAspectRatio="none",
            role="img",
            aria_label=words,
        ),
        tag("span", tag("span", "60 s ago"), tag("span", "now"), class_="axis"),
        class_=class_,
    )


def _x(seconds_ago: float) -> float:
    return WIDTH * (1 - min(seconds_ago, 60.0) / 60.0)


def _columns(history: Data, values: Sequence[float | None], top: float, kind: str) -> Markup:
    """A column for each interval."""
    parts = []
    for ago, seconds, value in zip(history["seconds_ago"], history["seconds"], values, strict=True):
        if value:
            left, right = _x(ago + seconds), _x(ago)
            height = min(value / top, 1.0) * HEIGHT
            parts.append(f"M{left:.1f} {HEIGHT:.0f}V{HEIGHT - height:.1f}H{right:.1f}V{HEIGHT:.0f}z")
    return tag("path", d="".join(parts), class_=kind)


def _line(history: Data, values: Sequence[float | None], top: float, kind: str) -> Markup:
    """A step for each interval, connected where one follows another."""
    parts, end = [], None
    for ago, seconds, value in zip(history["seconds_ago"], history["seconds"], values, strict=True):
        left, right = _x(ago + seconds), _x(ago)
        if value is None:
            end = None
            continue
        y = HEIGHT * (1 - min(value / top, 1.0))
        parts.append(f"{'M' if end is None or left - end > 1 else 'L'}{left:.1f} {y:.1f}H{right:.1f}")
        end = right
    return tag("path", d="".join(parts), class_=kind)


def _ticks(history: Data, timeouts: Sequence[int]) -> Markup:
    """A mark hanging from the top for each interval in which a checkout timed out."""
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
