"""The chart: QueriesPool's ratios to QueuePool, and to AsyncAdaptedQueuePool where tasks ask."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .figures import Cell, Target

REACHES, MISSES, MARK = "#3b7a57", "#b5651d", "#222222"


@dataclass(frozen=True)
class Bar:
    """One ratio; or that of several cells."""

    label: str
    value: float
    least: float
    most: float
    bound: float
    """What it must reach."""
    less: bool
    """Is less better?"""

    @property
    def reaches(self) -> bool:
        """Does it?"""
        return self.value <= self.bound if self.less else self.value >= self.bound


def bars(cells: Sequence[Cell]) -> list[Bar]:
    """One for each name of a bar; where that stands for several cells, their median, and all of them."""
    targets = [target for cell in cells for target in cell.targets if target.bar]
    names = dict.fromkeys(target.bar for target in targets)
    return [_bar(name, [target for target in targets if target.bar == name]) for name in names]


def _bar(name: str, targets: list[Target]) -> Bar:
    values = [target.value.median for target in targets]
    if len(targets) == 1:
        values = [targets[0].value.least, targets[0].value.median, targets[0].value.most]
    less = targets[0].at_most is not None
    bound = targets[0].at_most if less else targets[0].at_least
    assert bound is not None, f"nothing is to be reached: {name}"
    several = f" ({len(targets)} cells)" if len(targets) > 1 else ""
    return Bar(f"{name}{several}", median(values), min(values), max(values), bound, less)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Write the chart as SVG.

    :raises ModuleNotFoundError: there is no matplotlib.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "benchmarks", "svg.fonttype": "none"}
    )  # small, and always the same
    plot: Any = importlib.import_module("matplotlib.pyplot")
    all_bars = bars(cells)
    sides = [
        ("Time: less is better (checkouts without event listeners)", [bar for bar in all_bars if bar.less]),
        ("Throughput: more is better", [bar for bar in all_bars if not bar.less]),
    ]
    sides = [side for side in sides if side[1]]
    figure, axes = plot.subplots(
        max(1, len(sides)),
        figsize=(8, 1.2 + 0.34 * len(all_bars) + 0.6 * len(sides)),
        height_ratios=[len(members) + 1 for _, members in sides] or None,
        squeeze=False,
    )
    for axis, (title, members) in zip(axes[:, 0], sides, strict=False):
        _side(axis, title, members)
    figure.suptitle("QueriesPool's ratio to QueuePool (tasks: to AsyncAdaptedQueuePool)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    plot.close(figure)


def _side(axis: Any, title: str, members: list[Bar]) -> None:
    """The bars, from the top down, each with its spread, and a mark at what must be reached."""
    axis.set_title(title, fontsize=10, loc="left")
    for place, bar in enumerate(reversed(members)):
        axis.barh(place, bar.value, height=0.6, color=REACHES if bar.reaches else MISSES)
        axis.hlines(place, bar.least, bar.most, color=MARK, linewidth=1)
        axis.vlines(bar.bound, place - 0.42, place + 0.42, color=MARK, linewidth=2.5)
        right = max(bar.value, bar.most, bar.bound)
        axis.annotate(
            f"{bar.value:.2f}", (right, place), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(range(len(members)), [bar.label for bar in reversed(members)], fontsize=8)
    axis.axvline(1.0, color=MARK, linewidth=0.7, linestyle=":")
    axis.set_xlim(0, 1.12 * max(max(bar.value, bar.most, bar.bound) for bar in members))
    axis.spines[["top", "right"]].set_visible(False)
