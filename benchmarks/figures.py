"""What comes out of a benchmark: figures with their spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median


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


@dataclass(frozen=True)
class Cell:
    """One thing that was measured, for all who take part."""

    group: str
    """Cells of a group have the same figures."""
    name: str
    reference: str
    """The competitor that ratios refer to."""
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """Competitor -> what -> figure."""
