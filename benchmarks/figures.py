"""What comes out of a benchmark: figures with their spread, and what they must reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

MET, WITHIN, NOT_MET = "met", "within the spread", "not met"


@dataclass(frozen=True)
class Figure:
    """One figure over several rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        """Sum up what the rounds said."""
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])

    @classmethod
    def ratio(cls, values: Iterable[float], others: Iterable[float]) -> Figure:
        """Sum up the ratios of two who took turns: each value to the other's of the same round."""
        return cls.of(value / max(other, 1e-9) for value, other in zip(values, others, strict=True))


@dataclass(frozen=True)
class Target:
    """What a figure of a cell must reach."""

    what: str
    """Targets of one group that are called the same are one requirement, on several cells."""
    value: Figure
    at_least: float | None = None
    at_most: float | None = None
    """Neither: it is reported, and not judged."""
    bar: str = ""
    """The bar of the chart that it counts into; none where it is empty."""

    @property
    def judged(self) -> bool:
        """Is there something to reach?"""
        return self.at_least is not None or self.at_most is not None

    @property
    def bound(self) -> str:
        """What must be reached, in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"

    @property
    def verdict(self) -> str:
        """Does the median reach it?  If not, and some round did, nobody knows: more rounds would tell."""
        if not self.judged or self._reached(self.value.median):
            return MET if self.judged else ""
        return WITHIN if self._reached(self.value.least) or self._reached(self.value.most) else NOT_MET

    def _reached(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is None or value <= self.at_most


@dataclass(frozen=True)
class Cell:
    """One thing that was measured, for all who take part."""

    group: str
    name: str
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """Competitor -> what -> figure."""
    targets: list[Target] = field(default_factory=list)
    """What QueriesPool must reach here."""
