"""One budget for all processes of a host: real processes, PostgreSQL, and a role that may have no more."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import inside
import pytest
from conftest import Observer, SessionServer
from hazards import Thread, eventually
from hosts import Host
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.__main__ import main
from sqla_queries_pool.exporters import prometheus
from sqla_queries_pool.host import lease, share
from sqla_queries_pool.host.lease import Folder, folders_of
from sqla_queries_pool.host.letters import Mailbox
from sqla_queries_pool.host.postman import postman

pytestmark = pytest.mark.skipif(not lease.AVAILABLE, reason="there are no flock and Unix sockets")

Eventually = Callable[..., None]


Hosts = Callable[[int], Host]
_numbers = itertools.count(1)


@pytest.fixture
def host(pg_server: SessionServer, pg_observer: Observer, pg_url: str, tmp_path: Path) -> Iterator[Hosts]:
    """Make a host with such a budget."""
    made: list[Host] = []

    def make(budget: int) -> Host:
        made.append(Host(pg_server, pg_observer, pg_url, tmp_path, budget))
        return made[-1]

    yield make
    for each in made:
        each.end()


def deleted(folder: Path) -> None:
    """Delete it at once: while its files go one by one, those that watch it would make them again."""
    shutil.rmtree(folder.rename(folder.parent.parent / f"deleted-{folder.parent.name}-{next(_numbers)}"))


# -- between processes ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_busy_processes_share_twelve(host: Hosts, eventually: Eventually) -> None:
    """All are served, the server refuses nothing, and never sees more than the budget."""
    one = host(12)
    workers = one.start(8)
    for worker in workers:
        worker.do("state")
    one.watch()
    for worker in workers:
        worker.do("load", 4, 0.005)
    eventually(lambda: all(worker.do("state")["served"] > 20 for worker in workers))
    eventually(lambda: sum(w.do("state")["open"] for w in workers) == 12)
    eventually(lambda: all(1 <= worker.do("state")["open"] <= 3 for worker in workers), "each has its part")
    eventually(lambda: one.peak == 12, "all are seen")
    states = [worker.do("state") for worker in workers]
    assert [state["connect_errors"] for state in states] == [0] * 8
    assert [error for state in states for error in state["errors"]] == []
    for worker in workers:
        worker.do("unload")
    assert one.peak == 12


@pytest.mark.slow
def test_what_is_idle_goes_to_waiting_checkouts(host: Hosts, eventually: Eventually) -> None:
    """One process has used all; another gets all as soon as it wants them."""
    one = host(4)
    first, second = one.start(2)
    one.watch()
    assert first.do("take", 4) == 4
    eventually(lambda: one.peak == 4, "all are seen")
    second.begin("take", 4)
    first.do("release")
    assert second.result() == 4
    first.begin("take", 1)
    second.do("release")
    assert first.result() == 1
    assert first.do("state")["connect_errors"] == second.do("state")["connect_errors"] == 0
    assert one.peak == 4


@pytest.mark.slow
def test_one_that_starts_late_is_served_by_a_full_busy_host(host: Hosts) -> None:
    """Others give, although they wait themselves."""
    one = host(4)
    workers = one.start(2)
    for worker in workers:
        worker.do("load", 8, 0.01)
    (late,) = one.start()
    late.do("state")
    before = sum(worker.do("state")["served"] for worker in workers)
    assert late.do("take", 1) == 1
    served = sum(worker.do("state")["served"] for worker in workers) - before
    assert served < 2000  # a second's are about 400, and a busy machine serves no more


@pytest.mark.slow
def test_the_slots_of_one_that_is_killed_are_free(host: Hosts, eventually: Eventually) -> None:
    """At any moment; and in the end one process can have all of them."""
    draw = random.Random(1)
    one = host(6)
    workers = one.start(4)
    for worker in workers:
        worker.do("load", 4, 0.005)
    for _ in range(3):
        victim = draw.choice(workers)
        victim.kill()
        workers.remove(victim)
        workers += one.start()
        workers[-1].do("load", 4, 0.005)
        for worker in workers:
            before = worker.do("state")["served"]
            eventually(lambda w=worker, before=before: w.do("state")["served"] > before)
    for worker in workers[1:]:
        worker.kill()
    workers[0].do("unload")
    assert workers[0].do("take", 6) == 6
    eventually(lambda: len(list(one.home.glob("box.*"))) == 1)


@pytest.mark.slow
def test_one_that_stands_still_holds_nobody_up(host: Hosts) -> None:
    """It keeps what it has; its mailbox fills; the others share the rest."""
    one = host(4)
    first, second, third = one.start(3)
    first.do("take", 2)
    first.kill(signal.SIGSTOP)
    second.do("load", 4, 0.005)
    third.do("load", 4, 0.005)
    assert second.do("unload")
    third.do("unload")
    assert third.do("take", 2) == 2


@pytest.mark.slow
def test_a_folder_that_is_deleted_is_made_again(host: Hosts, eventually: Eventually) -> None:
    """Those that run keep what they have; one that starts then gets no more than there is."""
    one = host(4)
    first, second = one.start(2)
    one.watch()
    assert first.do("take", 3) == 3
    second.do("state")
    deleted(one.home.parent)
    third = one.start()[0]
    assert third.do("take", 1) == 1
    third.begin("take", 1)
    second.begin("take", 1)
    eventually(lambda: one.home.is_dir())
    first.do("release")
    assert third.result() == 2
    assert second.result() == 1
    assert {w.do("state")["connect_errors"] for w in (first, second, third)} == {0}
    assert one.peak <= 4


@pytest.mark.slow
def test_the_largest_size_counts(host: Hosts, eventually: Eventually) -> None:
    """For as long as the process is there that states it."""
    one = host(5)
    (small,) = one.start(max_size=2)
    assert small.do("take", 2) == 2
    (large,) = one.start(max_size=5)
    assert large.do("take", 3) == 3
    eventually(lambda: small.do("state")["limit"] == 5)
    large.kill()
    eventually(lambda: small.do("state")["limit"] == 2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_leases_of_its_own(host: Hosts, eventually: Eventually) -> None:
    """The parent's stay, whatever the child does."""
    one = host(4)
    one.watch()
    (parent,) = one.start()
    assert parent.do("take", 2) == 2
    child, state = parent.do("fork", 2)
    assert child["rows"] == [1, 1]
    assert child["connect_errors"] == 0
    assert state["open"] == 2
    eventually(lambda: one.backends() == 2, "the server has let go of the child's")
    assert parent.do("take", 2) == 4
    assert parent.do("state")["connect_errors"] == 0
    eventually(lambda: one.peak == 4, "all are seen, and never one more")


@pytest.mark.slow
def test_a_timeout_says_that_another_process_has_them(host: Hosts, eventually: Eventually) -> None:
    """With its process id, its program, and how many."""
    one = host(3)
    first, second = one.start(2)
    first.do("take", 2)
    second.do("take", 1)
    eventually(lambda: len(second.do("state")["host"]["processes"]) == 2, "they know of each other")
    second.begin("take_within", 1, 2)
    with pytest.raises(AssertionError) as caught:
        second.result()
    assert "CheckoutTimeout" in str(caught.value)
    assert f"process {first.pid} (host_worker.py) 2" in str(caught.value)
    assert "Most likely other processes of this host hold 2 of the 3 connections" in str(caught.value)
    found = second.do("state")["host"]
    assert found["budget"] == 3
    assert [(p["process"], p["leases"]) for p in found["processes"]] == [(second.pid, 1), (first.pid, 2)]


@pytest.mark.slow
def test_a_process_that_was_short_of_something_for_a_while_gets_its_connections_later(host: Hosts) -> None:
    """Its thread could not be started; the next checkout that waits starts it."""
    one = host(1)
    (has,), short = one.start(), one.start(2, pool_timeout=0.01)
    has.do("take", 1)
    has.do("release")
    for worker, what in zip(short, ["threads", "descriptors"], strict=True):
        assert worker.do("take_while_short_of", what) == "CheckoutTimeout"
        eventually(lambda w=worker: w.do("take_if_it_can") == 1, f"it had no {what} then")  # type: ignore[misc]
        worker.do("release")


# -- in one process ------------------------------------------------------------------------------------


def test_a_process_that_has_all_asks_nothing_of_the_host(
    pg_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    """What its checkouts wait for is its own: they don't even need the lock of what does the letters."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=1)
    held = engine.connect()
    eventually(lambda: inside.has_all_of_the_host(engine), "the thread has seen it")
    with inside.postman().lock:
        other = Thread(engine.connect)
        eventually(lambda: inside.waiters(engine.pool), "it waits")
        held.close()
        other.join().close()
    larger = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=2, pool_timeout=0)
    for path in tmp_path.rglob("slot.*"):
        os.utime(path, (0, 0))
    with larger.connect(), larger.connect() as second:  # it knows at once that there is more to be had
        assert second.scalar(text("SELECT 1")) == 1
    engine.dispose()
    larger.dispose()


def test_an_engine_that_has_all_of_its_own_does_not_blame_other_processes(
    pg_url: str, tmp_path: Path
) -> None:
    """There is more in the budget, which is not for this engine."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=1, pool_timeout=0)
    larger = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=3)
    for path in tmp_path.rglob("slot.*"):
        os.utime(path, (0, 0))
    held = engine.connect()
    other = Thread(engine.connect)
    with pytest.raises(CheckoutTimeout, match="this engine has reached its own limit of 1"):
        other.join()
    held.close()
    engine.dispose()
    larger.dispose()


def test_a_suspended_engine_wants_nothing_of_the_host_until_it_is_resumed(
    pg_url: str, tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its waiting checkouts could not use it: the others would lack it for nothing."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=2, pool_timeout=60)
    pool: Any = engine.pool
    asked = threading.Event()
    wanted = share.Share.wanted

    def ask(self: share.Share) -> None:
        wanted(self)
        asked.set()

    monkeypatch.setattr(share.Share, "wanted", ask)
    pool.suspend()
    other = Thread(lambda: engine.connect().close())
    eventually(asked.is_set, "it waits")
    assert inside.waiters(pool)
    assert inside.of_the_host(pool)[0].waiting == 0
    eventually(lambda: not inside.of_the_host(pool)[1], "nobody looks after it")
    pool.resume()
    other.join()
    engine.dispose()


def test_a_checkout_that_finds_an_idle_connection_pays_nothing(pg_url: str, tmp_path: Path) -> None:
    """It calls what it calls without a share: no function more, of Python or of C, and so no system call."""

    def calls(engine: Engine) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []

        def trace(frame: FrameType, event: str, what: Any) -> None:
            if event in ("call", "c_call"):
                found.append((event, getattr(what, "__qualname__", frame.f_code.co_name)))

        connect = engine.pool.connect
        for _ in range(3):
            connect().close()
        each: list[list[tuple[str, str]]] = []
        for _ in range(5):  # another thread may have the pool's lock, or leave a letter
            found.clear()
            sys.setprofile(trace)
            try:
                connect().close()
            finally:
                sys.setprofile(None)
            each.append(found.copy())
        engine.dispose()
        return min(each, key=len)

    options: list[dict[str, Any]] = [{}, {"share": str(tmp_path)}]
    without, shared = (
        calls(create_engine(pg_url, poolclass=QueriesPool, pool_id=f"calls {number}", **each))
        for number, each in enumerate(options)
    )
    assert len(without) > 10
    assert shared == without


def test_engines_of_one_process_state_the_same(pg_url: str, tmp_path: Path) -> None:
    """Or an error says what the other one states."""
    first = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path))
    for other in ({}, {"share": "host"}):
        with pytest.raises(exc.ArgumentError, match=r"states share=.* state the same for both"):
            create_engine(pg_url, poolclass=QueriesPool, **other)
    second = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=2)
    with first.connect() as one, second.connect() as two:
        assert one.execute(text("SELECT 1")).scalar() == two.execute(text("SELECT 1")).scalar() == 1
    first.dispose()
    second.dispose()


def test_a_folder_that_is_gone_is_no_error_of_engines_made_later(
    pg_url: str, tmp_path: Path, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """``Engine.dispose()`` makes one.  The process goes on with what it has, and says so."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=3)
    engine.connect().close()
    (outer,) = tmp_path.iterdir()
    with inside.postman().lock:  # else the thread may make it again in between
        shutil.rmtree(outer)
        outer.touch()
    engine.dispose()
    other = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=3)
    with engine.connect() as one:
        assert one.scalar(text("SELECT 1")) == 1
    with other.connect() as two:
        assert two.scalar(text("SELECT 1")) == 1
    pool: Any = engine.pool
    assert str(tmp_path) in pool.statistics().host.problem
    assert "the budget of the host can't be used fully" in caplog.text
    outer.unlink()
    eventually(lambda: pool.statistics().host.problem is None, "it is made again")
    engine.dispose()
    other.dispose()


@pytest.mark.slow
def test_a_folder_that_stays_away_is_no_flood_in_the_log(
    pg_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps fail by turns, each with a text of its own, as often as they are tried."""
    folder = tmp_path / "share"
    folder.mkdir()
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(folder), max_size=2, pool_timeout=1)
    with engine.connect():
        shutil.rmtree(folder)
        with pytest.raises(CheckoutTimeout, match="the budget of the host can't be used fully"):
            engine.connect()
    said = [r.getMessage() for r in caplog.records if "can't be used fully" in r.getMessage()]
    said = [line for line in said if "had no connection" not in line]
    assert said
    assert len(said) == len(set(said))
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "options", "why"),
    [
        ("postgresql+psycopg2://me@host/shop", {"max_size": None}, "needs a limit"),
        ("sqlite://", {}, "no other process can know"),
        ("postgresql+psycopg2://me@host/shop", {"share": "relative/path"}, "is not valid"),
        ("postgresql+psycopg2://me@host/shop", {"share": "/nowhere/at/all"}, "can't be used"),
    ],
)
def test_what_can_not_be_shared_is_an_error(url: str, options: Any, why: str, tmp_path: Path) -> None:
    """When the engine is made."""
    with pytest.raises(exc.ArgumentError, match=why):
        create_engine(url, poolclass=QueriesPool, **{"share": str(tmp_path), **options})


def test_a_checkout_that_cannot_wait_locks_what_is_free(pg_url: str, tmp_path: Path) -> None:
    """Also the first one; what is above the budget is an error at once."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=2, pool_timeout=0)
    for path in tmp_path.rglob("slot.*"):
        os.utime(path, (0, 0))
    with engine.connect(), engine.connect(), pytest.raises(CheckoutTimeout):
        engine.connect()
    pool: Any = engine.pool
    assert pool.statistics().host.mine == 2
    assert (pool.size(), pool.statistics().limit) == (2, 2)
    engine.dispose()


@pytest.mark.skipif(sys.platform != "linux", reason="others have no /proc")
def test_a_checkout_that_comes_too_soon_for_a_new_folder_is_told_so(pg_url: str, tmp_path: Path) -> None:
    """There are no other processes, so the error does not speak of them."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=2, pool_timeout=0)
    with pytest.raises(CheckoutTimeout, match=r"its files are new.* Try again in a moment"):
        engine.connect()
    engine.dispose()


def test_a_daemon_finds_the_folder_at_once(pg_url: str, tmp_path: Path) -> None:
    """It has closed all descriptors, the folder's too, and its first checkout can't wait for a thread."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=1, pool_timeout=0)
    for path in tmp_path.rglob("slot.*"):
        os.utime(path, (0, 0))
    (folder,) = folders_of(str(tmp_path))
    (fd,) = [int(each) for each in os.listdir("/proc/self/fd") if _leads_to(each) == folder]
    os.close(fd)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()


def _leads_to(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_what_was_stated_by_one_that_was_killed_does_not_count(pg_url: str, tmp_path: Path) -> None:
    """Its mailbox is still there, and nobody has looked for the dead yet."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=1, pool_timeout=0)
    (path,) = folders_of(str(tmp_path))
    folder = Folder.at(path)
    folder.prepare(2)
    for each in tmp_path.rglob("slot.*"):
        os.utime(each, (0, 0))
    Mailbox(folder, 2).close()
    taken = folder.lock(0)
    with pytest.raises(CheckoutTimeout):
        engine.connect()
    assert taken is not None
    taken.release()
    engine.dispose()
    folder.close()


def test_what_is_kept_open_and_what_is_set_by_hand(
    pg_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    """``min_size``, ``warm_up()`` and ``set_max_size()`` know the share."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=3, min_size=2)
    for path in tmp_path.rglob("slot.*"):
        os.utime(path, (0, 0))
    pool: Any = engine.pool
    pool.warm_up()
    assert pool.checkedin() == 2
    PoolManager.set_max_size(pool.pid, 1)
    eventually(lambda: pool.checkedin() == 1)
    assert pool.statistics().limit == 1
    with pytest.raises(exc.ArgumentError, match="needs a limit"):
        PoolManager.set_max_size(pool.pid, None)
    engine.dispose()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="others have no inotify")
def test_an_idle_process_sleeps_until_something_happens(
    pg_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    """It has a connection, and so a lease; when somebody deletes the folder, it locks a new file at once."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=1, idle_ttl=None)
    with engine.connect():
        pass
    eventually(lambda: inside.sleeps_for(engine) > 100, "it sleeps")
    (outer,) = tmp_path.iterdir()
    deleted(outer)
    eventually(lambda: outer.is_dir() and folders_of(str(tmp_path)), "it is made again")
    (folder,) = map(Folder.at, folders_of(str(tmp_path)))
    eventually(lambda: inside.sleeps_for(engine) > 100, "it sleeps")
    os.utime(Path(folder.path) / "slot.0", (0, 0))
    assert folder.lock(0) is None
    pool: Any = engine.pool
    PoolManager.set_idle_ttl(pool.pid, 0.1)
    eventually(lambda: folder.lock(0) is not None, "it has heard of the close")
    folder.close()
    engine.dispose()


def test_a_log_that_takes_long_holds_nobody_up(pg_url: str, tmp_path: Path, eventually: Eventually) -> None:
    """What is wrong with the folder is logged when the lock of all shares is free again."""

    def try_lock() -> bool:
        free = postman.lock.acquire(timeout=15)
        if free:
            postman.lock.release()
        return free

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "the budget of the host" not in record.getMessage():
                return  # another test's pool may have to say something
            found.append((record.getMessage(), Thread(try_lock).join()))

    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=1)
    found: list[tuple[str, bool]] = []
    logger, slow = logging.getLogger("sqlalchemy.pool"), Slow(logging.WARNING)
    logger.addHandler(slow)
    try:
        with engine.connect():
            (outer,) = tmp_path.iterdir()
            with postman.lock:  # or else its thread makes it again meanwhile
                deleted(outer)
                outer.touch()
            eventually(lambda: found, "it is logged")
    finally:
        logger.removeHandler(slow)
    outer.unlink()
    pool: Any = engine.pool
    eventually(lambda: pool.statistics().host.problem is None, "the folder is made again")
    engine.dispose()
    ((said, free),) = found
    assert "the budget of the host can't be used fully" in said
    assert free


@pytest.mark.slow
@pytest.mark.exhaustive
def test_leases_are_freed_when_they_are_of_no_use(
    pg_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    """A second after the last connection was closed; and the mailbox goes, too."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=3)
    with engine.connect():
        pass
    pool: Any = engine.pool
    engine.dispose()
    eventually(lambda: pool.statistics().host.mine == 0)
    eventually(lambda: not list(tmp_path.rglob("box.*")))
    eventually(lambda: "sqla_queries_pool host" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.slow
def test_tasks_share_too(host: Hosts) -> None:
    """An asynchronous engine waits for another process without blocking its loop."""
    one = host(2)
    (other,) = one.start()
    assert other.do("take", 2) == 2
    url = one.url.set(drivername="postgresql+asyncpg")
    turns = 0

    async def main() -> int:
        nonlocal turns
        engine = create_async_engine(url, poolclass=QueriesPool, share=str(one.folder), max_size=2)
        waiting = asyncio.create_task(engine.connect().__aenter__())
        while not inside.waiters(engine.pool):
            await asyncio.sleep(0)
        other.begin("release")
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0.001)
        connection = await waiting
        found = await connection.scalar(text("SELECT 1"))
        await connection.close()
        await engine.dispose()
        return int(found)

    assert asyncio.run(main()) == 1
    assert other.result() == 0
    assert turns > 1


@pytest.mark.slow
def test_the_command_lists_who_has_what(host: Hosts, eventually: Eventually) -> None:
    """From outside: the database without its password, each process, and what it has."""
    one = host(3)
    first, second = one.start(2)
    first.do("take", 2)
    second.do("take", 1)
    command = [sys.executable, "-m", "sqla_queries_pool", "host", "--share", str(one.folder)]
    told = [
        f"postgresql://{one.role}@{one.url.host}:{one.url.port}/{one.url.database}: 3 of 3 taken",
        f"  process {first.pid} (host_worker.py) 2",
        f"  process {second.pid} (host_worker.py) 1",
    ]

    def says() -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    # A process of a busy machine may not answer within half a second.
    eventually(lambda: says() == told, "both answer", 60)
    first.kill()
    second.kill()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"No process that this user may see shares a budget below {one.folder}\n"


def test_a_process_answers_the_command(
    pg_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], eventually: Eventually
) -> None:
    """The thread that does the letters says what the process has; then there is nobody."""
    engine = create_engine(pg_url, poolclass=QueriesPool, share=str(tmp_path), max_size=3)
    command = ["host", "--share", str(tmp_path)]

    def said() -> list[str]:
        assert main(command) == 0
        return capsys.readouterr().out.splitlines()

    with engine.connect():
        # A thread of a busy machine may not answer within half a second.
        eventually(lambda: "1 of 3 taken" in said()[0], "it has a mailbox")
        eventually(lambda: f"  process {os.getpid()} " in said()[1], "it answers")
    assert main(["host", "--share", str(tmp_path / "elsewhere")]) == 0
    assert "No process that this user may see shares a budget below" in capsys.readouterr().out
    engine.dispose()


@pytest.mark.slow
@pytest.mark.usefixtures("no_other_pools")
def test_the_page_and_the_metrics_show_the_host(host: Hosts, eventually: Eventually) -> None:
    """Which process has how many."""
    from sqla_queries_pool.monitor import Monitor

    one = host(3)
    (other,) = one.start()
    other.do("take", 2)
    engine = create_engine(one.url, poolclass=QueriesPool, share=str(one.folder), max_size=3)
    with engine.connect():
        pool: Any = engine.pool
        eventually(lambda: pool.statistics().host.leases == 3)
        page = Monitor(allow=lambda _: True)

        def shown() -> str:
            environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
            return b"".join(page(environ, lambda *_: lambda _: None)).decode()

        eventually(lambda: "Shared by the processes of this host (3 of 3 taken)" in shown(), "it is shown")
        eventually(lambda: f"process {other.pid} (host_worker.py)" in shown(), "the other one is shown")
        metrics = {m.name: m for m in prometheus.QueriesPoolCollector().collect()}
        for name, value in (("host_connections_max", 3), ("host_leases", 1)):
            samples = metrics[f"sqla_queries_pool_{name}"].samples
            assert [s.value for s in samples if s.labels["pool"] == pool.pid] == [value]
    engine.dispose()
