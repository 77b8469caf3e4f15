"""One process that shares a budget, for tests: it does what it reads, a line of JSON each, and answers.

``python host_worker.py '{"url": …, "share": …, "max_size": …}'``
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import inside
from hazards import no_descriptor_left, no_thread_starts
from sqlalchemy import Connection, Engine, create_engine, text

from sqla_queries_pool import CheckoutTimeout, checkouts

PATIENT_POOL = inside.pool_class(close_timeout=inside.PATIENT)
"""A server on a busy machine may take its time to end a backend, which counts until then."""


class Worker:
    """Does what it is told."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.held: list[Connection] = []
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self.done: list[int] = []
        self.errors: list[str] = []
        self.longest = 0.0
        self.since = time.monotonic()

    def pool_id(self) -> str:
        """What names its budget."""
        return str(self.engine.pool.pid)  # type: ignore[attr-defined]

    def take_within(self, count: int, seconds: float) -> int:
        """The same, with a deadline."""
        with checkouts(timeout=seconds):
            return self.take(count)

    def take(self, count: int) -> int:
        """Check so many out and keep them; how many are out then."""
        for _ in range(count):
            self.held.append(self.engine.connect())
        return len(self.held)

    def take_while_short_of(self, what: str) -> str:
        """The error of a checkout while the process can have no more ``threads`` or ``descriptors``."""
        with {"threads": no_thread_starts, "descriptors": no_descriptor_left}[what]():
            try:
                self.take(1)
            except Exception as error:
                return type(error).__name__
        return ""

    def take_if_it_can(self) -> int:
        """:meth:`take` one; how many are out then."""
        with suppress(CheckoutTimeout):
            self.take(1)
        return len(self.held)

    def release(self) -> int:
        """Return all of them."""
        while self.held:
            self.held.pop().close()
        return 0

    def load(self, threads: int, work: float) -> int:
        """Have so many threads check out, work and return, again and again."""
        self.stop.clear()
        self.done = [0] * threads
        for number in range(threads):
            thread = threading.Thread(target=self._work, args=(number, work), daemon=True)
            self.threads.append(thread)
            thread.start()
        return threads

    def _work(self, number: int, work: float) -> None:
        statement = text(f"SELECT pg_sleep({work})")
        while not self.stop.is_set():
            begin = time.monotonic()
            try:
                with self.engine.connect() as connection:
                    self.longest = max(self.longest, time.monotonic() - begin)
                    connection.execute(statement)
                self.done[number] += 1
            except Exception as error:
                self.errors.append(str(error))

    def unload(self) -> list[int]:
        """End them; how often each was served."""
        self.stop.set()
        for thread in self.threads:
            thread.join()
        self.threads.clear()
        return self.done

    def state(self) -> dict[str, Any]:
        """What it has, has done, and knows of the others."""
        names = ("open", "limit", "connects", "connect_errors", "waiting", "host")
        found: dict[str, Any] = self.engine.pool.statistics().as_dict()  # type: ignore[attr-defined]
        return {
            "pid": os.getpid(),
            "served": sum(self.done),
            "errors": self.errors,
            "longest": self.longest,
            **{name: found[name] for name in names},
        }

    def fork(self, count: int) -> list[Any]:
        """What a forked child comes to that takes so many, and what the parent still has."""
        reader, writer = os.pipe()
        if not (child := os.fork()):
            try:
                told: Any = self.take_anew(count)
            except BaseException as error:
                told = repr(error)
            os.write(writer, json.dumps(told).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as told_file:
            told = json.loads(told_file.read())
        os.waitpid(child, 0)
        return [told, self.state()]

    def take_anew(self, count: int) -> dict[str, Any]:
        """In a child: what the parent holds is not its own."""
        mine = [self.engine.connect() for _ in range(count)]
        rows = [connection.execute(text("SELECT 1")).scalar() for connection in mine]
        return {"rows": rows, **self.state()}


def main() -> None:
    """Read, do, answer."""
    options = json.loads(sys.argv[1])
    url = options.pop("url")
    worker = Worker(create_engine(url, poolclass=PATIENT_POOL, **options))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        what: Callable[..., Any] = getattr(worker, name)
        try:
            answer = [True, what(*arguments)]
        except Exception as error:
            answer = [False, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
