"""What it takes up: memory per connection, and time to import."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence

from .competitors import BARE, QUERIES, QUEUE, Backend, Competitor, fake
from .effort import Effort
from .figures import Cell, Figure, Target

GROUP = "footprint"
SOME, MANY = 100, 1_100
"""Connections: what a pool takes by itself is in both."""
IMPORT = """
import sys, time
import sqlalchemy.pool
begin = time.process_time()
import sqla_queries_pool
print(time.process_time() - begin)
"""


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Memory, and the import."""
    yield _memory()
    yield _import(effort.imports)


def _memory() -> Cell:
    """The record alone is what a bare deque has."""
    each = {c.name: _bytes_per_connection(c) for c in (BARE, QUEUE, QUERIES)}
    cell = Cell(GROUP, "memory per idle connection")
    for name, size in each.items():
        cell.figures[name] = {"bytes": Figure.of([size])}
    above = Figure.of([each[QUERIES.name] - each[BARE.name]])
    cell.targets.append(Target("bytes above SQLAlchemy's own record", above, at_most=1024))
    return cell


def _bytes_per_connection(competitor: Competitor) -> float:
    with fake().pools(competitor, MANY) as (pool,):
        sizes = []
        tracemalloc.start()
        try:
            for count in (SOME, MANY):
                for connection in [pool.connect() for _ in range(count)]:
                    connection.close()
                del connection
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    return (sizes[1] - sizes[0]) / (MANY - SOME)


def _import(times: int) -> Cell:
    """In processes that have imported SQLAlchemy's pools; the first one compiles.

    It is the processor's time: others who use the machine meanwhile do not count.
    """
    with tempfile.TemporaryDirectory() as cache:
        seconds = [_import_once(cache) for _ in range(times + 1)][1:]
    figure = Figure.of(second * 1000 for second in seconds)
    cell = Cell(GROUP, "import", {QUERIES.name: {"ms": figure}})
    cell.targets.append(Target("ms above `import sqlalchemy.pool`", figure, at_most=30))
    return cell


def _import_once(cache: str) -> float:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout)
