"""How long to measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How long to measure; a round has all competitors in turn."""

    rounds: int
    """Of what is short: one thread, bursts, scaling."""
    batches: int
    """In a round of one thread."""
    checkouts: int
    """In a batch."""
    threads: tuple[int, ...]
    """The grid: how many want ..."""
    connections: tuple[int, ...]
    """... how many, and ..."""
    works: tuple[float, ...]
    """... for how many seconds each."""
    load_rounds: int
    """Of each load under contention; two are enough where one takes long."""
    seconds: float
    """Of each load, at least, and ..."""
    turns: int
    """... as many turns: in each, everybody could have had a connection once."""
    crowd: int
    """How many pools and waiters there are, where that must not matter, ..."""
    imports: int
    """... how often the package is imported, ..."""
    overload: float
    """... and for how many seconds too many ask."""
    loops: tuple[str, ...]
    """asyncio: in which event loops, where they are installed, ..."""
    task_works: tuple[float, ...]
    """... for how many seconds tasks want a connection, ..."""
    task_seconds: float
    """... for how many seconds they are measured, at least, ..."""
    fault: float
    """... and how many seconds each fault lasts."""
    down: float
    """Seconds that a checkout waits where the database is down for longer."""


FULL = Effort(
    rounds=5,
    batches=40,
    checkouts=300,
    threads=(2, 8, 16, 64, 200),
    connections=(2, 4, 8, 10),
    works=(0.0, 0.001, 0.005),
    load_rounds=3,
    seconds=0.2,
    turns=10,
    crowd=10_000,
    imports=15,
    overload=30.0,
    loops=("asyncio", "uvloop"),
    task_works=(0.0, 0.001, 0.005),
    task_seconds=1.0,
    fault=2.0,
    down=5.0,
)
QUICK = Effort(
    rounds=2,
    batches=15,
    checkouts=200,
    threads=(8, 40),
    connections=(4,),
    works=(0.0, 0.001, 0.005),
    load_rounds=2,
    seconds=0.1,
    turns=5,
    crowd=1_000,
    imports=3,
    overload=2.0,
    loops=("asyncio",),
    task_works=(0.0,),
    task_seconds=0.4,
    fault=0.3,
    down=2.0,
)
