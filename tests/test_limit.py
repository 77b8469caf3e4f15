"""One limit for all that connects to a database, whatever goes on."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import inside
import psycopg
import psycopg2
import psycopg2.extensions
import pytest
from hazards import Thread, assert_whole
from sqlalchemy import Engine, create_engine, event, exc, make_url, text

from sqla_queries_pool import NoIdleConnectionsError, PoolManager, QueriesPool

SEED = 20261122
LIMIT = 8
SECONDS = 6.0


class Sockets:
    """Counts sockets: one is open from just before its connect until its close has returned."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.open = 0
        self.peak = 0
        self.opened = 0

    def opening(self) -> None:
        with self._lock:
            self.open += 1
            self.opened += 1
            self.peak = max(self.peak, self.open)

    def closed(self) -> None:
        with self._lock:
            self.open -= 1


sockets = Sockets()
trouble = threading.Event()  # while it is set, connects fail now and then


def take_time(connection: Any) -> None:
    """A close that takes no time at all would hide whom it counts for meanwhile."""
    with suppress(psycopg2.Error, psycopg.Error):
        connection.rollback()
        connection.cursor().execute("SELECT pg_sleep(0.02)")


class Counted:
    """What counts a driver's connection."""

    counted = True

    def close(self) -> None:
        take_time(self)
        super().close()  # type: ignore[misc]
        if self.counted:
            self.counted = False
            sockets.closed()


class Counted2(Counted, psycopg2.extensions.connection):
    """psycopg2's connection, counted."""


class Counted3(Counted, psycopg.Connection[Any]):
    """psycopg's connection, counted."""


def new_engine(url: str, rng: random.Random, max_size: int, driver: str = "psycopg2") -> Engine:
    """An engine whose connects are counted, and fail now and then."""
    # A server on a busy machine may take its time to end a backend, which counts until then.
    patient = inside.pool_class(close_timeout=inside.PATIENT)
    engine = create_engine(
        make_url(url).set(drivername=f"postgresql+{driver}"), poolclass=patient, max_size=max_size
    )

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        if trouble.is_set() and rng.random() < 0.05:
            raise dialect.dbapi.OperationalError("no luck")
        sockets.opening()
        try:
            if driver == "psycopg":
                return Counted3.connect(*arguments, **options)
            return psycopg2.connect(*arguments, connection_factory=Counted2, **options)
        except BaseException:
            sockets.closed()
            raise

    return engine


class Session:
    """Who locks connections through the queries API."""


@pytest.mark.slow
def test_the_limit_holds_whatever_goes_on(
    pg_url: str, pg_observer: Any, eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 engines of one URL, two drivers, raw connections through the queries API, 50 threads, max_size 8.

    Never more than 8 sockets of the package, never more than 9 backends as the server sees it (it counts a
    closed one for some milliseconds more), while engines are disposed of, dropped and made again,
    connections invalidated, connects fail and the limit changes. Nobody times out, and nothing is lost.
    """
    print(f"seed {SEED}")
    monkeypatch.setattr(f"{__name__}.sockets", Sockets())
    name = make_url(pg_url).database
    dsn = make_url(pg_url).set(drivername="postgresql").render_as_string(hide_password=False)
    kinds = [(8, "psycopg2"), (8, "psycopg"), (5, "psycopg2"), (3, "psycopg2"), (8, "psycopg2")]
    rng = random.Random(SEED)
    engines = [new_engine(pg_url, rng, size, driver) for size, driver in kinds]
    pools: list[Any] = [engine.pool for engine in engines]
    pid = pools[0].pid
    assert {pool.pid for pool in pools} == {pid}
    trouble.set()
    end = time.monotonic() + SECONDS
    counts = {"checkouts": 0, "failed": 0, "disposed": 0, "dropped": 0, "invalidated": 0, "raw": 0}

    def goes_on() -> bool:
        """Until all has happened, which takes longer on a busy machine."""
        now = time.monotonic()
        return now < end or (not all(counts.values()) and now < end + 3 * SECONDS)

    def use(number: int) -> None:
        rng = random.Random(SEED + number)
        while goes_on():
            which = rng.randrange(5)
            try:
                with engines[which].connect() as connection:
                    assert connection.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) == 1
                    if rng.random() < 0.02:
                        connection.invalidate()
                        counts["invalidated"] += 1
                counts["checkouts"] += 1
            except exc.OperationalError:
                counts["failed"] += 1
            chance = rng.random()
            if chance < 0.004:
                engines[which].dispose()
                counts["disposed"] += 1
            elif chance < 0.006:
                engines[which].pool.dispose()
            elif chance < 0.010:
                engines[which] = new_engine(pg_url, rng, *kinds[which])
                counts["dropped"] += 1

    def use_raw(session: Session, handle: Any) -> None:
        while time.monotonic() < end:
            with handle.cursor() as cursor:
                cursor.execute("SELECT 1")
            counts["raw"] += 1
            if time.monotonic() > end - SECONDS / 2:
                PoolManager.free(pid, handle)
                try:
                    handle = PoolManager.get(pid, session)
                except NoIdleConnectionsError:
                    return  # an engine needed the slot

    def resize() -> None:
        rng = random.Random(SEED - 1)
        while goes_on():
            PoolManager.set_max_size(pid, rng.choice([4, 5, 6, 7, LIMIT, LIMIT, LIMIT]))
            pg_observer.query("SELECT pg_sleep(0.2)")

    def watch() -> None:
        other = make_url(dsn).set(database="postgres").render_as_string(hide_password=False)
        with closing(psycopg2.connect(other)) as connection:
            connection.autocommit = True  # in a transaction it would see the same all the time
            with connection.cursor() as cursor:
                while goes_on():
                    cursor.execute(
                        "SELECT count(*) FROM pg_stat_activity"
                        " WHERE backend_type = 'client backend' AND datname = %s",
                        (name,),
                    )
                    [(found,)] = cursor.fetchall()
                    most.append(found)

    most: list[int] = []
    raw = []
    for _ in range(2):
        sockets.opening()
        PoolManager.add(pid, psycopg2.connect(dsn, connection_factory=Counted2))
        session = Session()
        raw.append((session, PoolManager.get(pid, session)))
    threads = [Thread(use_raw, session, handle) for session, handle in raw]
    threads += [Thread(use, number, name=f"user {number}") for number in range(48)]
    threads += [Thread(resize), Thread(watch)]
    for thread in threads:
        thread.join(4 * SECONDS + 30)

    print("backends, how often seen:", sorted(Counter(most).items()))
    print(counts, "most sockets", sockets.peak, "opened", sockets.opened, "most backends", max(most))
    assert all(counts.values()), "something did not happen"
    assert sockets.peak <= LIMIT
    assert max(most) <= LIMIT + 1
    PoolManager.set_max_size(pid, LIMIT)
    gc.collect()
    trouble.clear()
    for engine, (size, _) in zip(engines, kinds, strict=True):
        assert isinstance(engine.pool, QueriesPool)
        eventually(lambda: inside.pools()[pid].numbers.closing == 0)
        assert_whole(engine.pool, eventually, size)
    for engine in engines:
        engine.dispose()
    assert sockets.open == len(inside.pools()[pid])
    eventually(lambda: pg_observer.backends(name) == sockets.open)


def test_two_drivers_share_one_limit(pg_url: str) -> None:
    """psycopg2 and psycopg 3 have the same database, hence the same budget."""
    url = make_url(pg_url)
    one = create_engine(url, poolclass=QueriesPool, max_size=2, pool_timeout=0)
    other = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=QueriesPool, pool_timeout=0)
    with one.connect(), other.connect(), pytest.raises(exc.TimeoutError):
        other.connect()
    one.dispose()
    other.dispose()
