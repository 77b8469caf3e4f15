"""One budget for all processes of a host, beside other ways to share it: ``python -m benchmarks.host``.

Each way has the same processes, threads and work (a statement that takes 10 ms), and a role that may have no
more connections than the budget, unless it is to be shown what happens with more.  At the end stands what was
measured beside what is promised.  Takes four minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
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
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.pool import QueuePool

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres

from .clock import Clock

WORK = 0.01
SAMPLE = 0.005
"""Seconds between two looks at how many connections there are."""
KILLS = 30
"""For so many seconds one process is killed in each of them."""


# -- one process ------------------------------------------------------------------------------------------


def work(told: dict[str, Any]) -> None:
    """Be one of the processes: start at the first line of the input, tell what was done at the end."""
    options = {"pool_timeout": 60, **told["options"]}
    kind = QueuePool if "pool_size" in options else QueriesPool
    engine = create_engine(told["url"], poolclass=kind, **options)
    served, longest, errors = [0] * told["threads"], [0.0] * told["threads"], 0
    if not told["threads"]:  # it is idle, but it was not always
        engine.connect().close()
    print("ready", flush=True)
    sys.stdin.readline()
    deadline = time.monotonic() + float(told["seconds"])
    measured = deadline - float(told["seconds"]) + float(told["warm_up"])

    def waited(begin: float) -> float:
        return min(time.monotonic(), deadline) - max(begin, measured)

    def go(number: int) -> None:
        nonlocal errors
        statement = text(f"SELECT pg_sleep({WORK})")
        while (begin := time.monotonic()) < deadline:
            try:
                with engine.connect() as connection:
                    longest[number] = max(longest[number], waited(begin))
                    connection.execute(statement)
            except Exception:
                errors += 1
            else:
                if begin > measured:
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
    found: dict[str, Found] = field(default_factory=dict)

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
        self.url = self.of_app(self.server.url())

    def of_app(self, url: str) -> str:
        """The URL for the role."""
        return make_url(url).set(username="app", password="app").render_as_string(False)

    def query(self, sql: str) -> Any:
        """The first row, if there is one."""
        with self._connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone() if cursor.description else None

    def start(
        self, threads: int, options: dict[str, Any], seconds: float, url: str, warm_up: float
    ) -> subprocess.Popen[str]:
        """Start one process."""
        told = {"url": url, "threads": threads, "options": options, "seconds": seconds, "warm_up": warm_up}
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
        url: str = "",
        kills: float = 0,
    ) -> None:
        """Run processes with so many threads each.

        :param limit: the role's.
        :param kills: for so many seconds, kill one each second, and start another one.
        """
        if self.only not in name:
            return
        self.query(f"ALTER ROLE app CONNECTION LIMIT {limit}")
        seconds = kills or self.seconds + self.warm_up
        processes = [self.start(n, options, seconds, url or self.url, self.warm_up) for n in threads]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            _go(process)
        peak, end, kill_at = 0, time.monotonic() + seconds, time.monotonic() + 1.0
        draw = random.Random(1)
        while (now := time.monotonic()) < end:
            peak = max(peak, self.query("SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'")[0])
            if kills and now > kill_at and now < end - 3.0:  # the last one has time to begin
                kill_at += 1.0
                victim = processes.pop(draw.randrange(len(processes)))
                victim.kill()
                victim.communicate()
                processes.append(self.start(threads[0], options, end - now - 2.0, self.url, 0.0))
                _go(processes[-1])
            time.sleep(SAMPLE)
        lines = [process.communicate()[0].splitlines()[-1] for process in processes]
        self._tell(name, peak, kills or self.seconds, [json.loads(line) for line in lines])

    def _tell(self, name: str, peak: int, seconds: float, told: list[Any]) -> None:
        sums = [sum(each["served"]) for each in told]
        found = self.found[name] = Found(
            name,
            sum(sums) / seconds,
            sum(sums) ** 2 / (len(sums) * sum(n * n for n in sums) or 1),
            peak,
            max(each["longest"] for each in told),
            sum(each["connects"] for each in told) / seconds,
            sum(each["errors"] for each in told),
        )
        # Of those that were killed nobody knows what they have done.
        done = " " * 22 if "killed" in name else f"{found.rate:7.0f}/s  Jain {found.jain:.2f}  "
        print(
            f"{found.name:52} {done}backends {found.peak:3}  longest {found.longest:5.2f} s  "
            f"connects {found.connects:5.1f}/s  errors {found.errors}",
            flush=True,
        )


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextmanager
def pgbouncer(bench: Bench, size: int) -> Iterator[str | None]:
    """The URL of a PgBouncer in front of the server, which has so many connections; None without one."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))  # they know how to start one
    module = importlib.import_module("pgbouncer")
    if module.PROGRAM is None:
        yield None
        return
    settings = {"pool_mode": "transaction", "default_pool_size": size}
    with module.PgBouncer(bench.server, settings, users={"app": "app"}) as bouncer:
        yield bench.of_app(bouncer.url(database=bench.server.database))


def compare(bench: Bench, folder: str) -> None:
    """All processes busy; one busy among idle ones; more processes than connections."""
    busy = [24, 0, 0, 0, 0, 0, 0, 0]
    shared = {"share": folder}
    for size in (12, 16):
        bench.measure(f"{size}: one process, 64 threads", [64], {"max_size": size}, size)
        bench.measure(f"{size}: 8 x 8, shared", [8] * 8, {"max_size": size, **shared}, size)
        split = {"pool_size": size // 8 + (size % 8 > 0), "max_overflow": 0}
        bench.measure(f"{size}: 8 x 8, QueuePool split ({split['pool_size']} each)", [8] * 8, split, 60)
        bench.measure(f"{size}: 8 x 8, the role's limit alone", [8] * 8, {"max_size": size}, size)
        clients = {"pool_size": 24, "max_overflow": 0}
        with pgbouncer(bench, size) as url:
            if url is not None:
                bench.measure(f"{size}: 8 x 8, PgBouncer (transaction)", [8] * 8, clients, size, url)
                if size == 12:
                    bench.measure(f"{size}: one busy, 7 idle, PgBouncer", busy, clients, size, url)
    bench.measure("12: one busy process alone", [24], {"max_size": 12}, 12)
    bench.measure("12: one busy, 7 idle, shared", busy, {"max_size": 12, **shared}, 12)
    split = {"pool_size": 2, "max_overflow": 0}
    bench.measure("12: one busy, 7 idle, QueuePool split (2 each)", busy, split, 60)
    bench.measure("4: one process, 32 threads", [32], {"max_size": 4}, 4)
    bench.measure("4: 8 x 4, shared", [4] * 8, {"max_size": 4, **shared}, 4)


def kill(bench: Bench, folder: str) -> None:
    """Processes die all the time; then one takes all."""
    name = "12: 8 x 8, shared, one killed each second"
    options = {"max_size": 12, "share": folder}
    bench.measure(name, [8] * 8, options, 12, kills=KILLS)
    if name in bench.found:
        begin, engine = time.monotonic(), create_engine(bench.url, poolclass=QueriesPool, **options)
        taken = [engine.connect() for _ in range(12)]
        print(f"then one process has {len(taken)} of 12 after {time.monotonic() - begin:.2f} s")
        for connection in taken:
            connection.close()
        engine.dispose()


def checkout(url: str, folder: str) -> float:
    """Return how long a checkout and its return take with a share, as a part of what they take without.

    One after the other, the first one by turns; the median of such pairs.
    """
    without = create_engine(url, poolclass=QueriesPool, max_size=4, pool_id="without")
    shares = create_engine(url, poolclass=QueriesPool, max_size=4, pool_id="with", share=folder)
    ratios = []
    with Clock() as clock:
        for number in range(301):
            pair = [without, shares] if number % 2 else [shares, without]
            taken = {id(engine): _time(engine, clock) for engine in pair}
            ratios.append(taken[id(shares)] / taken[id(without)])
    for engine in (without, shares):
        engine.dispose()
    return statistics.median(ratios[1:])


def _time(engine: Engine, clock: Clock) -> float:
    connect: Callable[[], Any] = engine.pool.connect
    begin = clock()
    for _ in range(500):
        connect().close()
    return clock() - begin


def promises(found: dict[str, Found]) -> Iterator[tuple[str, float, str]]:
    """What is promised, what was measured, and the goal."""
    for size, jain in ((12, 0.88), (16, 0.98)):
        one, all_of_them = found.get(f"{size}: one process, 64 threads"), found.get(f"{size}: 8 x 8, shared")
        if one and all_of_them:
            yield f"{size}: 8 x 8, throughput to one process", all_of_them.rate / one.rate, ">= 0.9"
            yield f"{size}: Jain over processes", all_of_them.jain, f">= {jain}"
            yield f"{size}: connects per second", all_of_them.connects, "<= 3"
            yield f"{size}: backends at most", all_of_them.peak, f"<= {size}"
            yield f"{size}: refused or failed", all_of_them.errors, "= 0"
    alone, idle = found.get("12: one busy process alone"), found.get("12: one busy, 7 idle, shared")
    if alone and idle:
        yield "12: one busy and seven idle to one alone", idle.rate / alone.rate, ">= 0.95"
    if killed := found.get("12: 8 x 8, shared, one killed each second"):
        yield "one killed each second: longest wait of others, s", killed.longest, "<= 2"
        yield "one killed each second: backends at most", killed.peak, "<= 12"


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="measure each way for so long (5)")
    parser.add_argument(
        "--warm-up", type=float, default=3.0, help="after so long (3): connections have spread"
    )
    parser.add_argument("--only", default="", help="measure those whose name contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(json.loads(chosen.worker))
        return
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres({"max_connections": "80"}) as server:
        bench = Bench(server, chosen.seconds, chosen.warm_up, chosen.only)
        compare(bench, folder)
        kill(bench, folder)
        told = [*promises(bench.found)]
        if not chosen.only or chosen.only in "checkout":
            told.append(
                ("a checkout and its return, to those without", checkout(server.url(), folder), "<= 1.02")
            )
        print()
        for name, number, goal in told:
            print(f"{name:52} {number:7.2f}   {goal}")
        logging.disable()  # the folder is gone before the last process has seen that it is of no use


if __name__ == "__main__":
    main()
