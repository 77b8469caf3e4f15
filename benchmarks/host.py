"""One budget for all processes of a host, beside other ways to share it: ``python -m benchmarks.host``.

Each way has the same processes, threads and work (a statement that takes 10 ms), and a role that may have no
more connections than the budget, unless it is to be shown what happens with more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg2
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.pool import QueuePool

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres

WORK = 0.01
SAMPLE = 0.005
"""Seconds between two looks at how many connections there are."""


# -- one process ------------------------------------------------------------------------------------------


def work(told: dict[str, Any]) -> None:
    """Be one of the processes: start at the first line of the input, tell what was done at the end."""
    options = {"pool_timeout": 60, **told["options"]}
    kind = QueuePool if "pool_size" in options else QueriesPool
    engine = create_engine(told["url"], poolclass=kind, **options)
    served, longest, errors = [0] * told["threads"], [0.0] * told["threads"], 0
    print("ready", flush=True)
    sys.stdin.readline()
    deadline = time.monotonic() + told["seconds"]

    def go(number: int) -> None:
        nonlocal errors
        statement = text(f"SELECT pg_sleep({WORK})")
        while (begin := time.monotonic()) < deadline:
            try:
                with engine.connect() as connection:
                    if begin > deadline - told["seconds"] + told["warm_up"]:
                        longest[number] = max(longest[number], time.monotonic() - begin)
                    connection.execute(statement)
            except Exception:
                errors += 1
            else:
                if begin > deadline - told["seconds"] + told["warm_up"]:
                    served[number] += 1

    threads = [threading.Thread(target=go, args=(number,)) for number in range(told["threads"])]
    for thread in threads:
        thread.start()
    connects = [0, 0]
    for at in range(2):
        time.sleep(max(0.0, told["warm_up"] if not at else deadline - time.monotonic()))
        if kind is QueriesPool:
            pool: Any = engine.pool
            connects[at] = pool.statistics().connects
            errors += pool.statistics().connect_errors if at else 0
    for thread in threads:
        thread.join()
    print(
        json.dumps(
            {
                "served": served,
                "longest": max(longest, default=0.0),
                "errors": errors,
                "connects": connects[1] - connects[0],
            }
        ),
        flush=True,
    )


# -- all of them ------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What came of one way."""

    name: str
    rate: float
    jain: float
    """Over processes."""
    peak: int
    longest: float
    connects: float
    """Per second, after the warm-up."""
    errors: int


@dataclass
class Bench:
    """A server and a role."""

    server: EmbeddedPostgres
    seconds: float
    warm_up: float
    only: str = ""
    """A part of the names of those that are measured."""
    found: list[Found] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._connection = psycopg2.connect(
            host=self.server.host,
            port=self.server.port,
            user=self.server.user,
            password=self.server.password,
            dbname=self.server.database,
        )
        self._connection.autocommit = True
        self.query("CREATE ROLE app LOGIN PASSWORD 'app'")
        self.url = make_url(self.server.url()).set(username="app", password="app").render_as_string(False)

    def query(self, sql: str) -> Any:
        """The first row, if there is one."""
        with self._connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone() if cursor.description else None

    def start(self, threads: int, options: dict[str, Any], seconds: float) -> subprocess.Popen[str]:
        """Start one process."""
        told = {
            "url": self.url,
            "threads": threads,
            "options": options,
            "seconds": seconds,
            "warm_up": self.warm_up,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.host", "--worker", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(
        self,
        name: str,
        threads: list[int],
        options: dict[str, Any],
        limit: int,
        kill_every: float | None = None,
    ) -> None:
        """Run processes with so many threads each."""
        if self.only not in name:
            return
        self.query(f"ALTER ROLE app CONNECTION LIMIT {limit}")
        seconds = self.seconds + self.warm_up
        processes = [self.start(number, options, seconds) for number in threads]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            _go(process)
        peak, end, kill_at = 0, time.monotonic() + seconds, time.monotonic() + (kill_every or 1e9)
        draw = random.Random(1)
        while time.monotonic() < end:
            peak = max(peak, self.query("SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'")[0])
            if time.monotonic() > kill_at and len(processes) > 2:
                kill_at += kill_every or 0
                victim = processes.pop(draw.randrange(len(processes)))
                victim.kill()
                victim.wait()
            time.sleep(SAMPLE)
        told = [json.loads(process.communicate()[0]) for process in processes]
        sums = [sum(each["served"]) for each in told]
        found = Found(
            name,
            sum(sums) / self.seconds,
            sum(sums) ** 2 / (len(sums) * sum(n * n for n in sums) or 1),
            peak,
            max(each["longest"] for each in told),
            sum(each["connects"] for each in told) / self.seconds,
            sum(each["errors"] for each in told),
        )
        self.found.append(found)
        print(
            f"{found.name:58} {found.rate:7.0f}/s  Jain {found.jain:.2f}  backends {found.peak:3}  "
            f"longest {found.longest:5.2f} s  connects {found.connects:5.1f}/s  errors {found.errors}",
            flush=True,
        )


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextmanager
def shared(size: int) -> Iterator[dict[str, Any]]:
    """The options of a budget in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield {"max_size": size, "share": folder}


def compare(bench: Bench) -> None:
    """All processes busy; one busy among idle ones; more processes than connections; deaths."""
    for size in (12, 16):
        bench.measure(f"{size}: one process, 64 threads", [64], {"max_size": size}, size)
        split = {"pool_size": size // 8 + (size % 8 > 0), "max_overflow": 0}
        bench.measure(f"{size}: 8 x 8, QueuePool split ({split['pool_size']} each)", [8] * 8, split, 60)
        bench.measure(f"{size}: 8 x 8, the role's limit alone", [8] * 8, {"max_size": size}, size)
        with shared(size) as options:
            bench.measure(f"{size}: 8 x 8, shared", [8] * 8, options, size)
    busy = [24, 0, 0, 0, 0, 0, 0, 0]
    bench.measure("12: one busy process alone", [24], {"max_size": 12}, 12)
    bench.measure(
        "12: one busy, 7 idle, QueuePool split (2 each)", busy, {"pool_size": 2, "max_overflow": 0}, 60
    )
    with shared(12) as options:
        bench.measure("12: one busy, 7 idle, shared", busy, options, 12)
    bench.measure("4: one process, 32 threads", [32], {"max_size": 4}, 4)
    with shared(4) as options:
        bench.measure("4: 8 x 4, shared", [4] * 8, options, 4)
    with shared(12) as options:
        bench.measure("12: 8 x 8, shared, one killed each second", [8] * 8, options, 12, kill_every=1.0)


def checkout(url: str) -> float:
    """Return how long a checkout and its return take with a share, as a part of what they take without."""
    with shared(4) as options:
        without = create_engine(url, poolclass=QueriesPool, max_size=4, pool_id="without")
        engines = [without, create_engine(url, poolclass=QueriesPool, pool_id="with", **options)]
        times: tuple[list[float], list[float]] = ([], [])
        for _, (engine, taken) in itertools.product(range(30), zip(engines, times, strict=True)):
            taken.append(_time(engine))
        for engine in engines:
            engine.dispose()
    return statistics.median(times[1]) / statistics.median(times[0])


def _time(engine: Engine) -> float:
    connect: Callable[[], Any] = engine.pool.connect
    begin = time.perf_counter()
    for _ in range(2000):
        connect().close()
    return time.perf_counter() - begin


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="measure each way for so long (10)")
    parser.add_argument("--warm-up", type=float, default=2.0, help="after so long (2)")
    parser.add_argument("--only", default="", help="measure those whose name contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(json.loads(chosen.worker))
        return
    with EmbeddedPostgres({"max_connections": "80"}) as server:
        compare(Bench(server, chosen.seconds, chosen.warm_up, chosen.only))
        print(f"a checkout and its return, with a share: {checkout(server.url()):.3f} of the time without")


if __name__ == "__main__":
    main()
