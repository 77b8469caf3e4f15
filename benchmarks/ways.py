"""The applications that ``benchmarks.applications`` asks: which, with which pool, and their processes."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import make_url

from sqla_queries_pool.demo.embedded import EmbeddedPostgres

from .web import TOLD

SERVERS = ("Flask", "FastAPI")
WORKERS, THREADS = 2, 16
BUDGET = 16
"""Connections of a way, in all its processes."""
TIMEOUT = 10
"""Seconds that a checkout waits, and that wrk waits for an answer."""
LIMIT = 1
"""Seconds after which a client of an overload gives up."""
QUEUE_TARGET = LIMIT / 20
READY = 60.0
QUIET, BUSY = 0.3, 0.1
"""Seconds in which an application does nothing, and the processor time of each that does not count."""
TESTS = Path(__file__).parent.parent / "tests"
BOUNCER = {"pool_mode": "transaction", "default_pool_size": BUDGET, "max_client_conn": 8000}


@dataclass(frozen=True)
class Way:
    """An application and a pool."""

    server: str
    pool: str
    options: dict[str, Any] = field(hash=False)
    bouncer: dict[str, Any] | None = field(default=None, hash=False)
    """The settings of the PgBouncer in between, apart from those that all have; None if there is none."""

    def __str__(self) -> str:
        return f"{self.server}, {self.pool}"


def ways(share: str, timeout: float = TIMEOUT) -> list[Way]:
    """All of them; the processes of each that share a budget meet in a folder below ``share``."""
    own = BUDGET // WORKERS
    queue = {"poolclass": "QueuePool", "pool_size": own, "max_overflow": 0, "pool_timeout": timeout}
    asynchronous = queue | {"poolclass": "AsyncAdaptedQueuePool"}
    null = {"poolclass": "NullPool"}
    bouncer = {"query_wait_timeout": timeout}
    discard = {"server_reset_query_always": 1}  # what asyncpg has prepared: see SQLAlchemy's documentation
    ours = {"poolclass": "QueriesPool", "max_size": own, "pool_timeout": timeout}
    shared = ours | {"max_size": BUDGET}
    return [
        Way("Flask", "QueuePool", queue),
        Way("Flask", "QueuePool, pre-ping", queue | {"pool_pre_ping": True}),
        Way("Flask", "NullPool behind PgBouncer", null, bouncer),
        Way("Flask", "QueriesPool", ours),
        Way("Flask", 'QueriesPool, share="host"', shared | {"share": f"{share}/Flask"}),
        Way("FastAPI", "AsyncAdaptedQueuePool", asynchronous),
        Way("FastAPI", "NullPool behind PgBouncer", null, bouncer | discard),
        Way("FastAPI", "QueriesPool", ours),
        Way("FastAPI", 'QueriesPool, share="host"', shared | {"share": f"{share}/FastAPI"}),
    ]


def overloaded_ways(share: str, capacities: Mapping[str, float]) -> list[Way]:
    """All of them, and QueriesPool with what is meant for an overload.

    ``capacities`` are answers per second.  FastAPI's tasks all wait in the pool: as many may do so as can be
    served in half the time that they have.  gunicorn's threads are few, so there are never that many in the
    pool.  Requests wait for a thread instead, where nobody rejects them, and each is late when it has one.
    So there no thread may wait.
    """
    found = ways(share, LIMIT / 2)
    ours = next(way.options for way in found if way.pool == "QueriesPool")
    for server, capacity in capacities.items():
        waiting = 0 if server == "Flask" else round(capacity / WORKERS * LIMIT / 2)
        for name, value in (("max_waiting", waiting), ("queue_target", QUEUE_TARGET)):
            found.append(Way(server, f"QueriesPool, {name}={value}", ours | {name: value}))
    return sorted(found, key=lambda way: SERVERS.index(way.server))


@dataclass
class Running:
    """A way whose processes run."""

    way: Way
    role: str
    port: int
    processes: list[psutil.Process]
    """The first of its application, and PgBouncer."""

    def url(self, endpoint: str) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}/{endpoint}"

    def processor(self) -> float:
        """Seconds that all processes have used."""
        total = 0.0
        for first in self.processes:
            for process in (first, *first.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def rest(self) -> None:
        """Wait until it does nothing: it still does what wrk has given up, which is no part of the next."""
        deadline, before = time.monotonic() + TIMEOUT, -1.0
        while (now := self.processor()) - before > BUSY * QUIET and time.monotonic() < deadline:
            before = now
            time.sleep(QUIET)

    def wait(self) -> None:
        """Until it answers, and all its processes have started."""
        deadline = time.monotonic() + READY
        while not self._answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.way} does not answer, see above")
            time.sleep(0.1)
        self.rest()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url("updates"), timeout=TIMEOUT):
                return True
        except OSError:
            return False


@contextmanager
def running(way: Way, server: EmbeddedPostgres, role: str) -> Iterator[Running]:
    """Start the processes; at the end they are killed."""
    with ExitStack() as stack:
        url = make_url(server.url()).set(username=role, password=role)
        processes = []
        if way.bouncer is not None:
            sys.path.append(str(TESTS))
            kind = importlib.import_module("pgbouncer").PgBouncer
            bouncer = stack.enter_context(kind(server, BOUNCER | way.bouncer, users={role: role}))
            url = url.set(port=bouncer.port)
            processes.append(psutil.Process(bouncer.pid))
        if way.server == "FastAPI":
            url = url.set(drivername="postgresql+asyncpg")
        told = {"url": url.render_as_string(hide_password=False), **way.options}
        port = _free_port()
        process = subprocess.Popen(_command(way.server, port), env=os.environ | {TOLD: json.dumps(told)})
        stack.callback(process.wait)
        first = psutil.Process(process.pid)
        stack.callback(_kill, first)
        yield Running(way, role, port, [*processes, first])


def _kill(first: psutil.Process) -> None:
    """At once: after an overload it has work left that nobody waits for."""
    for process in (first, *first.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _command(server: str, port: int) -> list[str]:
    module, workers = "benchmarks.web", str(WORKERS)
    if server == "Flask":
        options = ["--workers", workers, "--threads", str(THREADS), "--log-level", "warning"]
        return [
            sys.executable,
            "-m",
            "gunicorn",
            "--bind",
            f"127.0.0.1:{port}",
            *options,
            f"{module}:flask()",
        ]
    options = ["--workers", workers, "--log-level", "warning", "--no-access-log"]
    return [sys.executable, "-m", "uvicorn", "--port", str(port), *options, "--factory", f"{module}:fastapi"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
