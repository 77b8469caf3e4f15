"""A demonstration: a small shop that uses PostgreSQL, and now and then has too few connections."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, Engine

from .. import CheckoutTimeout, QueriesPool
from ..demo.server import DemoError, database
from ..demo.show import progress
from ..labels import labelled
from . import serving
from .application import Monitor

PAGES = ("GET /", "GET /products/17", "GET /search?q=tea", "POST /basket", "POST /orders", "GET /orders/4711")
WAVE = 40.0
"""Seconds from one rush hour to the next."""
SLEEP = text("SELECT pg_sleep(:seconds)")


class Shop:
    """Engines and the threads that use them, until it is closed.

    :param url: of a PostgreSQL database; nothing is created in it.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._end = threading.Event()
        self._began = time.monotonic()
        # Three engines of one database: one pool, one limit.
        self._web = [self._engine("web", max_size=8, pool_timeout=0.7, idle_ttl=4) for _ in range(3)]
        self._reports = self._engine("reports", pool_id="reports", max_size=3, pool_timeout=1.2, idle_ttl=10)
        self._exports = self._engine("exports", pool_id="exports", max_size=12, idle_ttl=3)
        workers: list[tuple[str, Callable[[random.Random], None]]] = [
            *((f"web-{n}", self._request) for n in range(1, 19)),
            *((f"report-{n}", self._report) for n in range(1, 6)),
            ("import", self._import),
            *((f"export-{n}", self._export) for n in range(1, 7)),
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(work, random.Random(name)), name=name, daemon=True)
            for name, work in workers
        ]
        for thread in self._threads:
            thread.start()

    def _engine(self, name: str, **options: Any) -> Engine:
        named = {"application_name": f"sqla_queries_pool monitor {name}"}
        return create_engine(
            self._url, poolclass=QueriesPool, track_stacks=True, leak_after=20, connect_args=named, **options
        )

    def _work(self, work: Callable[[random.Random], None], chance: random.Random) -> None:
        while not self._end.is_set():
            with suppress(CheckoutTimeout):
                work(chance)

    def _request(self, chance: random.Random) -> None:
        """Many in the rush hour, few after it."""
        phase = math.sin((time.monotonic() - self._began) * 2 * math.pi / WAVE)
        self._end.wait(chance.expovariate(1 / (0.12 - 0.09 * phase)))
        seconds = 0.4 if chance.random() < 0.02 else chance.lognormvariate(-4.3, 0.7)
        with labelled(chance.choice(PAGES)), chance.choice(self._web).connect() as connection:
            connection.execute(SLEEP, {"seconds": seconds})

    def _report(self, chance: random.Random) -> None:
        report = chance.choice(("sales", "stock", "returns"))
        with labelled(f"report of {report}"), self._reports.connect() as connection:
            connection.execute(SLEEP, {"seconds": chance.uniform(0.3, 1.4)})
        self._end.wait(chance.uniform(0.1, 1.5))

    def _import(self, chance: random.Random) -> None:
        """Begins a transaction and forgets it for a while."""
        with labelled("import of the price list"), self._reports.connect() as connection:
            connection.execute(SLEEP, {"seconds": 0.2})
            self._end.wait(24)
        self._end.wait(12)

    def _export(self, chance: random.Random) -> None:
        self._end.wait(chance.uniform(2, 9))
        with labelled("export"), self._exports.connect() as connection:
            connection.execute(SLEEP, {"seconds": chance.uniform(0.2, 2)})

    def close(self) -> None:
        """End all threads, close all connections."""
        self._end.set()
        for thread in self._threads:
            thread.join()
        for engine in (*self._web, self._reports, self._exports):
            engine.dispose()


@contextmanager
def shop(stated: str | None) -> Iterator[None]:
    """A shop at work, on the database that is stated, that the environment names, or that is started for it.

    :raises DemoError: there is none.
    """
    with ExitStack() as stack:
        with progress() as say:
            url = stack.enter_context(database(stated, say))
        at_work = Shop(url)
        stack.callback(at_work.close)
        yield


def serve(port: int, stated: str | None) -> None:
    """Serve the page of a shop at work until Ctrl-C.

    :raises DemoError: there is no database for it, or the port is taken.
    """
    try:
        server = serving.server(Monitor(), port)
    except OSError as error:
        raise DemoError(
            f"--port {port}: {error.strerror}; write another one, or 0 for any free port"
        ) from None
    with server, shop(stated):
        print(f"http://{serving.HOST}:{server.server_port}/  (press Ctrl-C to stop)", flush=True)
        server.serve_forever(poll_interval=0.1)
