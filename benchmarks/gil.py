"""Two threads with and without the global interpreter lock, where this Python can do without."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence

from sqla_queries_pool.demo.workload import run

from .competitors import QUERIES, Backend, fake
from .effort import Effort
from .figures import Cell, Figure, Target

GROUP = "free-threaded Python"
THREADS = 2
MODES = {"with the GIL": "1", "without": "0"}


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Compare the two, or say why not."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        yield compare(effort)
    else:
        yield Cell(GROUP, "not measured: this Python has the GIL")


def compare(effort: Effort) -> Cell:
    """Run this very Python both ways."""
    measured: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(effort.load_rounds):
        for mode in MODES:
            measured[mode].append(_elsewhere(MODES[mode], effort.seconds))
    ratio = Figure.ratio(*(measured[mode] for mode in reversed(MODES)))
    cell = Cell(GROUP, f"{THREADS} threads, no work")
    cell.figures.update({mode: {"checkouts/s": Figure.of(measured[mode])} for mode in MODES})
    cell.targets.append(Target("throughput / with the GIL", ratio, at_least=1.0))
    return cell


def _elsewhere(gil: str, seconds: float) -> float:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-X", f"gil={gil}", "-m", __name__, str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout)


def throughput(seconds: float) -> float:
    """Checkouts per second of two threads that have a connection each."""
    backend = fake()
    with backend.pools(QUERIES, THREADS) as pools:
        return run(pools, backend.work(0.0), threads=THREADS, seconds=seconds, warm_up=0.1).throughput


if __name__ == "__main__":
    print(throughput(float(sys.argv[1])))
