"""What is on by default, each alone: what it takes of a checkout, of the kernel, and of an idle process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import timeit
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from sqla_queries_pool.budget.stats import BOUNDS, SHORTEST
from sqla_queries_pool.concurrency.threads import here
from sqla_queries_pool.labels import checkout_label
from sqla_queries_pool.runtime.clock import clock

from .competitors import QUERIES, QUEUE, Backend
from .effort import Effort
from .figures import Cell, Figure, Target
from .uncontended import batch

GROUP = "on by default"
LOOK = "liveness: a look at the socket"
COSTS = {
    LOOK: "slot.poll(0)",
    "holder: which thread has it": "holder = runtime.here.caller; slot.holder = holder; slot.holder = None",
    "since when": "slot.since = now; slot.since = now",
    "label": "slot.label = _label()",
    "how often, and the most at once": (
        "slot.uses += 1; self.out = out = self.out + 1\n"
        "if out > self.peak_held: self.peak_held = out\n"
        "self.out -= 1"
    ),
    "histogram of how long": (
        "seconds = now - slot.since; used.seconds += seconds\n"
        "used.counts[0 if seconds <= SHORTEST else bisect_left(BOUNDS, seconds)] += 1"
    ),
    "the time, twice": "self._clock(); self._clock()",
}
"""What a checkout and its return do for it, as the code has it: ``tests/test_benchmarks.py`` compares."""
CHECKOUTS = 2000
"""Of which the kernel's calls are counted."""
CHILD = """
import sys, threading, time
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool
from sqla_queries_pool import QueriesPool

kind, url, share, checkouts, seconds = sys.argv[1:]
options = {"share": share, "max_size": 5} if share else {}
engine = create_engine(url, poolclass={"QueuePool": QueuePool, "QueriesPool": QueriesPool}[kind], **options)
for connection in [engine.pool.connect() for _ in range(5)]:
    connection.close()
for _ in range(int(checkouts)):
    engine.pool.connect().close()
if float(seconds):
    time.sleep(1.0)  # until what was begun is done
    begin = time.process_time()
    time.sleep(float(seconds))
    print(time.process_time() - begin)
"""


def cells(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """On PostgreSQL alone: a fake connection has no socket."""
    for backend in backends:
        if backend.url is not None:
            yield _costs(backend, effort)
            yield _calls(backend)
            yield _idle(backend, effort.fault * 25)


def _costs(backend: Backend, effort: Effort) -> Cell:
    """Time each statement by itself, in turns; a loop of nothing is taken off."""
    cell = Cell(GROUP, f"{backend.name}: one checkout and its return")
    with backend.pools(QUERIES, 1) as (pool,):
        connection: Any = pool.connect()
        counted = SimpleNamespace(seconds=0.0, counts=[0] * (len(BOUNDS) + 1))
        names = {
            "slot": connection._connection_record.slot,
            "runtime": SimpleNamespace(here=here),
            "self": SimpleNamespace(out=0, peak_held=1, _clock=clock),
            "used": counted,
            "now": clock(),
            "_label": checkout_label.get,
            "bisect_left": bisect_left,
            "BOUNDS": BOUNDS,
            "SHORTEST": SHORTEST,
        }
        # As a function's local variables, which they are in the code.
        setup = "; ".join(f"{name} = given[{name!r}]" for name in names)
        timers = {
            what: timeit.Timer(code, setup, globals={"given": names})
            for what, code in {"": "pass", **COSTS}.items()
        }
        rows = [
            {what: timer.timeit(effort.checkouts) / effort.checkouts for what, timer in timers.items()}
            for _ in range(effort.rounds * effort.batches)
        ]
        names["slot"].holder = here.caller
        connection.close()
        whole = [batch(pool, None, effort.checkouts) for _ in range(effort.batches)]
    for what in COSTS:
        nanoseconds = Figure.of(
            1e9 * median([max(0.0, row[what] - row[""]) for row in rows[n :: effort.rounds]])
            for n in range(effort.rounds)
        )
        share = {"%": Figure.of([nanoseconds.median / 1e7 / median(whole)])}
        cell.figures[what] = {"ns": nanoseconds, **share}
    cell.figures["all of it, with SQLAlchemy's"] = {
        "ns": Figure.of([1e9 * median(whole)]),
        "%": Figure.of([100]),
    }
    return cell


def _run(backend: Backend, kind: str, share: str, checkouts: int, seconds: float, *before: str) -> str:
    assert backend.url is not None
    url = backend.url.render_as_string(hide_password=False)
    command = [*before, sys.executable, "-c", CHILD, kind, url, share, str(checkouts), str(seconds)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def _calls(backend: Backend) -> Cell:
    """How often the kernel is called; the difference to a process without checkouts."""
    name = f"{backend.name}: system calls of one checkout and its return"
    if shutil.which("strace") is None:
        return Cell(GROUP, f"{name}: not counted, there is no strace")
    cell = Cell(GROUP, name)
    for competitor in (QUEUE, QUERIES):
        few, many = (_traced(backend, competitor.name, n) for n in (0, CHECKOUTS))
        cell.figures[competitor.name] = {
            "calls": Figure.of([(sum(many.values()) - sum(few.values())) / CHECKOUTS]),
            "polls": Figure.of([(many.get("poll", 0) - few.get("poll", 0)) / CHECKOUTS]),
        }
    calls = cell.figures[QUERIES.name]["calls"]
    cell.targets.append(Target("system calls", Figure.of([round(calls.median, 1)]), at_most=1.0))
    return cell


def _traced(backend: Backend, kind: str, checkouts: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "calls")
        _run(backend, kind, "", checkouts, 0, "strace", "-f", "-c", "-o", str(said))
        rows = [line.split() for line in said.read_text(encoding="utf-8").splitlines()]
        return {row[-1]: int(row[3]) for row in rows if row[3:] and row[3].isdigit() and row[-1] != "total"}


def _idle(backend: Backend, seconds: float) -> Cell:
    """What the threads of a process take that has five idle connections, by the hour.

    Those of QueuePool are none: its figure is what it takes to measure, some 70 microseconds.
    """
    cell = Cell(GROUP, f"{backend.name}: the processor's time of an idle process, measured for {seconds:g} s")
    with tempfile.TemporaryDirectory() as folder:
        shared = f'{QUERIES.name}, share="host"'
        ways = (
            (QUEUE.name, QUEUE.name, ""),
            (QUERIES.name, QUERIES.name, ""),
            (shared, QUERIES.name, folder),
        )
        # At once, for all of them do nothing but sleep.
        with ThreadPoolExecutor(len(ways)) as threads:
            used = threads.map(lambda way: float(_run(backend, way[1], way[2], 0, seconds)), ways)
            for (name, *_), processor in zip(ways, used, strict=True):
                cell.figures[name] = {"ms per hour": Figure.of([processor * 1000 * 3600 / seconds])}
    base = cell.figures[QUEUE.name]["ms per hour"].median
    for name in (QUERIES.name, shared):
        more = Figure.of([cell.figures[name]["ms per hour"].median - base])
        cell.targets.append(Target(f"ms per hour above QueuePool's, {name}", more, at_most=10))
    return cell
