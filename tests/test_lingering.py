"""Closed connections that the server still counts: who connects waits for room on the server, too."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import inside
import pytest
from conftest import Observer
from hazards import Thread, descriptors_of
from sqlalchemy import Engine, create_engine, event, make_url, text

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.concurrency.threads import THREADS
from sqla_queries_pool.sockets.lingering import Lingering

Eventually = Callable[..., None]
LIMIT = 4
_roles = itertools.count(1)


class Refusals:
    """Counts how often the server has refused to let an engine in."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.connects = 0

    def of(self, engine: Engine) -> Engine:
        connect = engine.dialect.loaded_dbapi.connect

        @event.listens_for(engine, "do_connect")
        def counted(_: Any, __: Any, arguments: Any, options: Any) -> Any:
            self.connects += 1
            try:
                return connect(*arguments, **options)
            except Exception as error:
                self.seen.append(str(error))
                raise

        return engine


@pytest.fixture
def limited(
    pg_url: str, pg_observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    """Makes engines of a role that the server lets in LIMIT times, and no more.

    They wait for it for as long as a busy machine may take.
    """
    patient = inside.patient_pool_class(monkeypatch)
    role = f"limited_{next(_roles)}"
    pg_observer.query(f"CREATE ROLE {role} LOGIN PASSWORD 'secret' CONNECTION LIMIT {LIMIT}")
    url = make_url(pg_url).set(username=role, password="secret")
    engines: list[Engine] = []

    def make(driver: str = "psycopg2", **options: Any) -> Engine:
        settings = {"poolclass": patient, "max_size": LIMIT} | options
        engines.append(create_engine(url.set(drivername=f"postgresql+{driver}"), **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
    pg_observer.query(
        f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{role}'"
    )
    pg_observer.query(f"DROP ROLE {role}")


def churn(engines: list[Engine], rounds: int, seed: int) -> None:
    """Eight threads at the limit, connections closed and opened again in all the ways that there are."""

    def work(number: int) -> None:
        chance = random.Random(seed + number)
        for _ in range(rounds):
            engine = chance.choice(engines)
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                if (what := chance.random()) < 0.2:
                    connection.invalidate()
            if what > 0.9:
                engine.dispose()
            elif what > 0.8:
                engine.pool.expire()  # type: ignore[attr-defined]
            elif what > 0.75:
                engine.pool.expire(rolling=True)  # type: ignore[attr-defined]

    for thread in [Thread(work, number) for number in range(8)]:
        thread.join(60)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_role_that_may_connect_as_often_as_the_pool_is_never_refused(
    limited: Callable[..., Engine], driver: str
) -> None:
    """Three engines make room for each other, are disposed, invalidated, renewed: no connect is refused."""
    refusals = Refusals()
    engines = [refusals.of(limited(driver, pool_timeout=30)) for _ in range(3)]
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    churn(engines, 40, seed)
    print(f"{refusals.connects} connects, {len(refusals.seen)} refused")
    assert refusals.connects > 100
    assert refusals.seen == []


@pytest.fixture
def last_words(pg_observer: Observer) -> Iterator[Callable[[Engine], Callable[[], None]]]:
    """Closes an engine's connection while its backend is stopped, so that the server goes on counting it."""
    stopped: list[int] = []

    def goes_on() -> None:
        while stopped:
            os.kill(stopped.pop(), signal.SIGCONT)

    def close(engine: Engine) -> Callable[[], None]:
        connection = engine.connect()
        stopped.append(int(connection.scalar(text("SELECT pg_backend_pid()")) or 0))
        os.kill(stopped[-1], signal.SIGSTOP)
        connection.invalidate()
        connection.close()
        return goes_on

    yield close
    goes_on()


def test_who_connects_at_the_limit_waits_for_the_server(
    limited: Callable[..., Engine], last_words: Callable[[Engine], Callable[[], None]], eventually: Eventually
) -> None:
    """As long as the backend is there nobody tries to connect; then the connection is opened, at once."""
    refusals = Refusals()
    engine = refusals.of(limited(poolclass=inside.pool_class(close_timeout=30.0)))
    held = [engine.connect() for _ in range(LIMIT - 1)]
    goes_on = last_words(engine)
    lingering: Any = inside.lingering(engine.pool)
    connects = refusals.connects
    looks = itertools.count()
    wait = lingering.wait
    lingering.wait = lambda room, *how: wait(lambda: (next(looks), room())[1], *how)
    checkout = Thread(engine.connect)
    eventually(lambda: next(looks) > 10, "it waits")
    assert refusals.connects == connects
    goes_on()
    held.append(checkout.join())
    assert refusals.seen == []
    for connection in held:
        connection.close()


def test_without_it_the_server_refuses(
    limited: Callable[..., Engine], last_words: Callable[[Engine], Callable[[], None]], eventually: Eventually
) -> None:
    """With no time to wait the server is asked too early; it is tried again, and callers see nothing."""
    refusals = Refusals()
    engine = refusals.of(limited(poolclass=inside.pool_class(close_timeout=0.0)))
    held = [engine.connect() for _ in range(LIMIT - 1)]
    goes_on = last_words(engine)
    checkout = Thread(engine.connect)
    eventually(lambda: refusals.seen, "it was refused")
    goes_on()
    held.append(checkout.join())
    assert all("too many connections for role" in said for said in refusals.seen)
    for connection in held:
        connection.close()


def test_nobody_waits_who_closes(limited: Callable[..., Engine], eventually: Eventually) -> None:
    """Closing returns while the server has the connection, and below the limit one is opened at once."""
    engine = limited(poolclass=QueriesPool)
    lingering: Any = inside.lingering(engine.pool)
    waited: list[float] = []
    lingering.wait = lambda room, *_: waited.append(len(lingering) - room())
    for connection in [engine.connect() for _ in range(2)]:
        connection.invalidate()
        connection.close()
    engine.connect().close()
    assert all(excess <= 0 for excess in waited)
    eventually(lambda: not lingering, "the housekeeper has forgotten them")


# -- without a server ------------------------------------------------------------------------------


class Wire:
    """A connection without a server: both ends of a socket."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.fileno = self.ours.fileno
        self.inode = os.fstat(self.ours.fileno()).st_ino

    def close(self) -> None:
        self.ours.close()


@pytest.fixture
def scheduled() -> list[float]:
    """In how many seconds a sweep was asked for."""
    return []


@pytest.fixture
def lingering(scheduled: list[float]) -> Iterator[Lingering]:
    """What has no housekeeper."""
    made = Lingering(lambda _, seconds: scheduled.append(seconds))
    yield made
    made.forget()


def closed(lingering: Lingering, seconds: float = 60.0) -> Wire:
    """A connection that our side has closed."""
    wire = Wire()
    with lingering.closing(wire, seconds):
        wire.close()
    return wire


def test_a_closed_connection_lingers_until_the_server_has_closed_its_end(lingering: Lingering) -> None:
    """The server is told that it was closed; what it still says is read and thrown away."""
    wire = closed(lingering)
    assert len(lingering) == 1
    assert wire.theirs.recv(1) == b""
    wire.theirs.send(b"S" * 10_000)
    lingering.sweep()
    assert len(lingering) == 1
    wire.theirs.close()
    lingering.sweep()
    assert len(lingering) == 0


def test_one_that_the_server_had_closed_does_not_linger(lingering: Lingering) -> None:
    """It is gone already; no descriptor stays."""
    wire = Wire()
    wire.theirs.close()
    with lingering.closing(wire, 60):
        wire.close()
    assert len(lingering) == 0
    assert descriptors_of(wire.inode) == 0


def test_the_wait_ends_when_there_is_room(lingering: Lingering) -> None:
    """Of two that linger one may stay."""
    first, second = closed(lingering), closed(lingering)
    waiting = Thread(lingering.wait, lambda: 1, 60.0, THREADS.pause)
    assert waiting.alive
    second.theirs.close()
    waiting.join()
    assert len(lingering) == 1
    first.theirs.close()


def test_the_wait_ends_when_none_is_left_where_there_is_less_than_no_room(lingering: Lingering) -> None:
    """The limit was lowered while connections were opened: these are no reason to wait."""
    closed(lingering).theirs.close()

    def pause(descriptors: Iterable[int], seconds: float) -> None:
        assert descriptors, "there is nothing to wait for"
        THREADS.pause(descriptors, seconds)

    lingering.wait(lambda: -1, 60.0, pause)
    assert len(lingering) == 0


def test_the_wait_ends_when_its_time_is_over(lingering: Lingering) -> None:
    """A server that never lets go keeps nobody from connecting for longer; it is forgotten in its time."""
    wire = closed(lingering, 0.02)
    lingering.wait(lambda: 0, 0.01, THREADS.pause)
    assert len(lingering) in (0, 1)
    lingering.wait(lambda: 0, 60.0, THREADS.pause)
    assert len(lingering) == 0
    wire.theirs.close()


def test_one_sweep_is_asked_for_at_a_time(lingering: Lingering, scheduled: list[float]) -> None:
    """The next one when it has come, as long as there is anything to wait for."""
    wires = [closed(lingering, seconds) for seconds in (5.0, 7.0)]
    assert scheduled == [5.0]
    wires[0].theirs.close()
    lingering.sweep()
    assert len(scheduled) == 2
    assert 0 < scheduled[1] <= 7
    wires[1].theirs.close()
    lingering.sweep()
    closed(lingering, 3.0).theirs.close()
    assert scheduled[2:] == [3.0]


def test_what_has_no_descriptor_does_not_linger(lingering: Lingering) -> None:
    """Nor what was closed before, nor what is not to be waited for."""
    wires = [Wire(), Wire()]
    wires[0].close()
    for handle, seconds in [(object(), 60.0), (wires[0], 60.0), (wires[1], 0.0)]:
        with lingering.closing(handle, seconds):
            pass
    assert len(lingering) == 0
    wires[1].close()
    for wire in wires:
        wire.theirs.close()


def test_a_goodbye_that_nobody_reads_blocks_nobody(lingering: Lingering) -> None:
    """What the other end does not read fills the buffers; a driver that says goodbye would wait for ever."""
    wire = Wire()
    wire.ours.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            wire.ours.send(b"x" * 4096)
    wire.ours.setblocking(True)

    def close() -> None:
        with lingering.closing(wire, 60), pytest.raises(BrokenPipeError):
            wire.ours.sendall(b"X\0\0\0\4")
        wire.close()

    Thread(close).join()
    wire.theirs.close()


def test_a_descriptor_is_closed_once(lingering: Lingering) -> None:
    """Several threads that look at the same time do not close another's."""
    wires = [closed(lingering) for _ in range(50)]
    for wire in wires:
        wire.theirs.close()
    start = threading.Barrier(4)

    def look() -> None:
        start.wait(10)
        lingering.sweep()

    for thread in [Thread(look) for _ in range(4)]:
        thread.join()
    assert len(lingering) == 0


def test_forgetting_closes_the_descriptors() -> None:
    """So does the end of the pool."""
    lingering = Lingering(lambda *_: None)
    wires = [closed(lingering) for _ in range(3)]
    inodes = [wire.inode for wire in wires]
    assert descriptors_of(*inodes) == 3
    del lingering
    assert descriptors_of(*inodes) == 0
    for wire in wires:
        wire.theirs.close()


def test_a_fork_waits_for_nothing_of_its_parents(pg_url: str) -> None:
    """The child has no descriptor of what the parent has closed, and may connect at once."""
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=1)
    shared: Any = inside.shared(engine.pool)
    wire = closed(inside.lingering(shared))
    assert len(inside.lingering(shared)) == 1
    child = os.fork()
    if child == 0:  # pragma: no cover
        status = 1
        with suppress(BaseException):
            status = len(inside.lingering(shared))
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(inside.lingering(shared)) == 1
    wire.theirs.close()
