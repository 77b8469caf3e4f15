"""What a checkout that got nothing says: one line for the log, a report below, and the same as data."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from conftest import Observer
from fakes import FakeClock, FakeDriver
from hazards import Stop, Thread, new_pid, new_pool
from sqlalchemy import create_engine, exc, text

from sqla_queries_pool import (
    BOUNDS,
    CheckoutTimeout,
    Diagnosis,
    Histogram,
    Holder,
    PoolDeadlock,
    PoolManager,
    QueriesPool,
    Snapshot,
    Statistics,
    Waiting,
    labelled,
)
from sqla_queries_pool.insight.diagnosis import LONG, LONGER, diagnose
from sqla_queries_pool.insight.report import SHARED_FOR
from sqla_queries_pool.logs import NAME

Eventually = Callable[..., None]
ME, OTHER, THIRD = 1, 2, 3


@pytest.fixture
def pid(clock: FakeClock) -> str:
    """The id of a pool that has that clock."""
    pid = new_pid()
    PoolManager.create(pid, None, 2, clock)
    return pid


def fails(pool: Any) -> CheckoutTimeout:
    """The error of a checkout that gets nothing."""
    with pytest.raises(CheckoutTimeout) as caught:
        pool.connect()
    return caught.value


@contextlib.contextmanager
def held(pool: Any, name: str, label: str | None = None) -> Iterator[Any]:
    """A thread of that name has a connection for the length of a block."""
    stop = Stop()

    def hold() -> None:
        with labelled(label) if label else contextlib.nullcontext():
            connection = pool.connect()
        stop.here()
        connection.close()

    thread = Thread(hold, name=name)
    stop.reached()
    try:
        yield thread
    finally:
        stop.go()
        thread.join()


# -- the likeliest cause, by snapshots that never were --------------------------------------------------


def holder(thread: int | None = OTHER, seconds: float = 0.5, **kw: Any) -> Holder:
    """Somebody who has a connection."""
    about = {"name": f"thread-{thread}", "label": None, "state": "held", "uses": 1, "backend_pid": 42}
    return Holder(thread=thread, caller=thread, seconds=seconds, **({**about, "transaction": "idle"} | kw))


def waiter(thread: int, seconds: float = 0.5) -> Waiting:
    """A checkout that waits for one."""
    return Waiting(thread=thread, name=f"thread-{thread}", label=None, seconds=seconds, caller=thread)


def seen(*holders: Holder, waits: tuple[Waiting, ...] = (), error: str | None = None, **kw: Any) -> Snapshot:
    """A snapshot; the numbers follow from the holders."""
    numbers: dict[str, Any] = dict.fromkeys(
        (field.name for field in dataclasses.fields(Statistics) if field.type == "int"), 0
    )
    opening = sum(h.state == "opening" for h in holders)
    numbers |= {
        "pid": "p",
        "label": "p",
        "limit": len(holders) or 1,
        "open": len(holders) - opening,
        "held": len(holders) - opening,
        "opening": opening,
        "waiting": len(waits),
        "closes": {},
        "wait_time": Histogram(),
        "use_time": Histogram(),
        "connect_time": Histogram(),
    }
    return Snapshot(
        taken_at=datetime.datetime.now(datetime.timezone.utc),
        statistics=Statistics(**(numbers | kw)),
        holders=holders,
        waiting=waits,
        last_connect_error=error,
        diagnosis=None,
    )


def used_for(mean: float) -> Histogram:
    """Of connections that were used ten times, for so long on average."""
    return Histogram((0,) * len(BOUNDS) + (10,), 10 * mean)


@pytest.mark.parametrize(
    ("snapshot", "kind"),
    [
        (seen(holder()), "too-small"),
        (seen(holder(), holder(THIRD)), "too-small"),
        (seen(), "too-small"),
        (seen(holder(seconds=LONG - 0.01)), "too-small"),
        (seen(holder(seconds=LONG)), "leak"),
        (seen(holder(thread=None, seconds=LONG)), "leak"),
        (seen(holder(seconds=LONG, transaction="in transaction")), "leak"),
        (seen(holder(seconds=LONG, transaction="executing")), "long-use"),
        (seen(holder(seconds=99), use_time=used_for(10.0)), "too-small"),
        (seen(holder(seconds=10 * LONGER), use_time=used_for(10.0)), "leak"),
        (seen(holder(None, ended=True)), "leak"),
        (seen(holder(), holder(None, 0.1, ended=True)), "leak"),
        (seen(holder(None, ended=True, transaction="executing")), "too-small"),
        (seen(holder(None, LONG, ended=True, transaction="executing")), "long-use"),
        (seen(holder(ME), holder(None, ended=True)), "nested-checkout"),
        (seen(holder(ME)), "nested-checkout"),
        (seen(holder(ME, seconds=600)), "nested-checkout"),
        (seen(holder(OTHER, seconds=600), waits=(waiter(OTHER),)), "nested-checkout"),
        (seen(holder(OTHER), waits=(waiter(THIRD),)), "too-small"),
        (seen(holder(state="opening"), holder(THIRD, state="opening")), "slow-connect"),
        (seen(holder(state="opening"), holder(THIRD)), "too-small"),
        (seen(holder(state="opening", seconds=600), holder(THIRD)), "too-small"),
        (seen(holder(state="opening"), error="OperationalError: too many clients"), "refused"),
        (seen(error="OperationalError: too many clients"), "refused"),
        (seen(holder(), error="OperationalError: too many clients"), "too-small"),
        (seen(holder(), error="OperationalError: no", limit=None), "refused"),
    ],
)
def test_the_likeliest_cause_follows_from_holders_and_waiting_checkouts(
    snapshot: Snapshot, kind: str
) -> None:
    """Each kind, and on both sides of what divides it from the next."""
    found = diagnose(snapshot, ME)
    assert found.kind == kind
    assert found.cause
    assert found.remedy
    assert "\n" not in found.cause + found.remedy


def test_a_nested_checkout_says_whose_and_how_many() -> None:
    """The asker's own where it has some, else those of all who wait."""
    mine = diagnose(seen(holder(ME), holder(ME), holder(OTHER)), ME)
    assert "this thread already holds 2" in mine.cause
    theirs = diagnose(seen(holder(OTHER), holder(THIRD), waits=(waiter(OTHER), waiter(THIRD))), ME)
    assert "waiting threads already hold 2" in theirs.cause


# -- the same in reality -----------------------------------------------------------------------------------


def test_a_pool_that_is_too_small_for_its_threads_says_so(pid: str) -> None:
    """All are in use, and none for long: raise the limit."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "one"), held(pool, "two"):
        error = fails(pool)
    assert error.snapshot.diagnosis.kind == "too-small"
    assert "Raise max_size" in str(error).splitlines()[0]


def test_a_connection_that_was_forgotten_is_named(pid: str, clock: FakeClock) -> None:
    """The one that is out for much longer than connections are used."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "forgetful"):
        clock.now += 60.0
        with held(pool, "busy"):
            error = fails(pool)
    assert error.snapshot.diagnosis.kind == "leak"
    assert "forgetful (60.0 s) seems to have forgotten to return its connection" in str(error).splitlines()[0]


def test_a_connection_whose_thread_has_ended_is_named_at_once(pid: str) -> None:
    """However short it is out: nobody is there who would give it back."""
    pool = new_pool(pid, timeout=0)
    kept: list[Any] = []
    Thread(lambda: kept.append(pool.connect()), name="leaky").join()
    with held(pool, "busy"):
        error = fails(pool)
    assert error.snapshot.diagnosis.kind == "leak"
    assert "which has ended (0.0 s) did not return its connection" in str(error).splitlines()[0]
    assert [holder.ended for holder in error.snapshot.holders if holder.thread is None] == [True]
    kept.pop().close()


def test_a_checkout_inside_another_is_told_as_such(pid: str) -> None:
    """Where the timeout comes before the grace is over."""
    pool = new_pool(pid, timeout=0.05)
    with held(pool, "other"), contextlib.closing(pool.connect()):
        error = fails(pool)
    assert error.snapshot.diagnosis.kind == "nested-checkout"
    assert "this thread already holds 1 of them" in str(error)


def test_connections_that_are_all_being_opened_are_told_as_slow(eventually: Eventually) -> None:
    """The driver hangs in connect()."""
    driver = FakeDriver()
    engine = create_engine(
        "fake://h/slow", module=driver, poolclass=QueriesPool, pool_id=new_pid(), max_size=1, pool_timeout=0
    )
    driver.gate.clear()
    opener = Thread(lambda: engine.pool.connect().close())
    eventually(lambda: driver.connecting == 1, "it connects")
    error = fails(engine.pool)
    assert error.snapshot.diagnosis.kind == "slow-connect"
    assert [h.state for h in error.snapshot.holders] == ["opening"]
    driver.gate.set()
    opener.join()


def test_a_server_that_lets_nobody_in_is_told_with_what_it_said(eventually: Eventually) -> None:
    """The last attempt failed, the next one hangs: its error is in the line, in the report, and the cause."""
    driver = FakeDriver()
    engine = create_engine(
        "fake://h/no", module=driver, poolclass=QueriesPool, pool_id=new_pid(), max_size=1, pool_timeout=0
    )
    driver.failures = 1
    with pytest.raises(FakeDriver.OperationalError):
        engine.pool.connect()
    driver.gate.clear()
    opener = Thread(lambda: engine.pool.connect().close())
    eventually(lambda: driver.connecting == 1, "it connects")
    error = fails(engine.pool)
    said = "OperationalError: the server is not there"
    assert error.snapshot.diagnosis.kind == "refused"
    assert error.snapshot.last_connect_error == said
    assert said in str(error).splitlines()[0]
    assert f"Last connect error: {said}" in str(error)
    assert isinstance(error.__cause__, FakeDriver.OperationalError)
    driver.gate.set()
    opener.join()


def test_a_statement_that_runs_for_long_is_told_with_its_backend(
    pg_url: str, pg_observer: Observer, clock: FakeClock, pid: str, eventually: Eventually
) -> None:
    """Not forgotten, but at work: look at the server."""
    engine = create_engine(pg_url, poolclass=QueriesPool, pool_id=pid, max_size=1, pool_timeout=0)
    PoolManager.set_max_size(pid, 1)
    engine.connect().close()

    def run() -> None:
        with engine.connect() as connection, contextlib.suppress(exc.DBAPIError):
            connection.execute(text("SELECT pg_sleep(600)"))

    thread = Thread(run, name="report")
    eventually(
        lambda: (
            [h.transaction for h in engine.pool.snapshot().holders]  # type: ignore[attr-defined]
            == ["executing"]
        )
    )
    clock.now += 120.0
    error = fails(engine.pool)
    assert error.snapshot.diagnosis.kind == "long-use"
    assert "report (120.0 s, executing)" in str(error).splitlines()[0]
    backend = error.snapshot.holders[0].backend_pid
    assert f"backend {backend}" in str(error)
    eventually(lambda: pg_observer.query("SELECT pg_cancel_backend(%s)", backend) and not thread.alive)
    thread.join()
    engine.dispose()


# -- one snapshot for all errors of a moment ------------------------------------------------------------


def test_errors_of_the_same_moment_share_a_snapshot_and_later_ones_do_not(pid: str, clock: FakeClock) -> None:
    """To the end of :data:`SHARED_FOR`, by the pool's clock; each counts, and one is kept."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "one"), held(pool, "two"):
        first = fails(pool)
        clock.now += SHARED_FOR * 0.99
        shared = fails(pool)
        clock.now += SHARED_FOR * 0.01
        later = fails(pool)
    assert shared.snapshot.taken_at == first.snapshot.taken_at
    assert later.snapshot.taken_at > first.snapshot.taken_at
    assert [holder.seconds for holder in later.snapshot.holders] == [pytest.approx(SHARED_FOR)] * 2
    assert pool.statistics().timeouts == 3
    assert [seen.taken_at for seen in inside.shared(pool).last_timeouts] == [
        first.snapshot.taken_at,
        later.snapshot.taken_at,
    ]


def test_a_shared_snapshot_says_nothing_of_what_the_asker_holds(pid: str, clock: FakeClock) -> None:
    """It may have returned it since; with a snapshot of its own it is told."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "other"):
        mine = pool.connect()
        before = fails(pool)
        mine.close()
        with held(pool, "new"):
            shared = fails(pool)
            clock.now += SHARED_FOR
            own = fails(pool)
    assert "this thread already holds 1" in str(before)
    assert "this thread" not in str(shared)
    assert shared.snapshot.diagnosis.kind == own.snapshot.diagnosis.kind == "too-small"
    assert {holder.name for holder in own.snapshot.holders} == {"other", "new"}


@pytest.mark.parametrize("waits", [(), (waiter(THIRD),), (waiter(threading.get_ident()), waiter(THIRD))])
def test_an_error_with_a_shared_snapshot_counts_its_checkout_once(
    pid: str, clock: FakeClock, waits: tuple[Waiting, ...]
) -> None:
    """Was it in the queue then, or has it come since?"""
    pool = new_pool(pid, timeout=0.02)
    before = seen(holder(), waits=waits)
    inside.core(pool).recent_snapshot.get(lambda: before, SHARED_FOR, clock)
    with held(pool, "one"), held(pool, "two"):
        error = fails(pool)
    assert error.snapshot.taken_at == before.taken_at
    others = sum(waiting.thread == THIRD for waiting in waits)
    assert error.snapshot.statistics.waiting == others + 1


# -- text ------------------------------------------------------------------------------------------------


def test_the_first_line_has_the_numbers_who_the_cause_and_the_remedy(pid: str, clock: FakeClock) -> None:
    """Complete, as it stands in a log that shows one line of each error."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "nightly report", "job 7"):
        clock.now += 2.0
        with held(pool, "import"):
            clock.now += 1.0
            first = str(fails(pool)).splitlines()[0]
    assert first == (
        f"QueriesPool {pid} (pid {pid}) had no connection within 0 s: open 2, held 2, opening 0, waiting 0, "
        "limit 2. Held by, longest first: nightly report [job 7] (3.0 s), import (1.0 s). Most likely "
        "all connections are in use, and none for long. Raise max_size, which all engines of this database "
        "share, or return connections sooner."
    )


def test_the_report_has_a_line_for_each_with_stacks_where_they_are_tracked(
    pid: str, clock: FakeClock
) -> None:
    """Holders with how often the connection was used, where it was checked out, where the thread is now."""
    pool = new_pool(pid, timeout=0, track_stacks=True)
    with held(pool, "one"):
        clock.now += 1.0
        with held(pool, "two"):
            lines = str(fails(pool)).splitlines()
    at = lines.index("Holders, longest first:")
    assert lines[at + 1] == "  one (1.0 s), used 1 time"
    assert any(line.startswith("    checked out at ") and line.endswith(" in hold") for line in lines)
    assert any(line.startswith("    now at ") and "hazards.py" in line for line in lines)
    assert [line for line in lines if line.startswith("  two (0.0 s)")]


def test_of_many_holders_three_are_named_ten_reported_and_the_rest_counted() -> None:
    """A line stays a line, a report a page."""
    text_of = dataclasses.replace(
        seen(*[holder(n, seconds=100 - n) for n in range(12)]),
        waiting=tuple(waiter(100 + n, 50 - n) for n in range(12)),
    )
    assert text_of.named() == (
        "Held by, longest first: thread-0 (100.0 s), thread-1 (99.0 s), thread-2 (98.0 s), and 9 more"
    )
    lines = text_of.report().splitlines()
    assert sum(line.startswith("  thread-") for line in lines) == 20
    assert lines.count("  and 2 more") == 2
    assert lines.index("  thread-100 (50.0 s)") == lines.index("Waiting, longest first:") + 1


def test_a_label_with_line_breaks_or_of_any_length_leaves_the_line_a_line(pid: str) -> None:
    """A label may be what a client has sent: it can't begin a line of its own in a log."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "web\nworker", "GET /\n2026-01-01 root logged in\r\n" + "x" * 5000), held(pool, "b"):
        lines = str(fails(pool)).splitlines()
    assert "GET / 2026-01-01 root logged in" in lines[0]
    assert not [line for line in lines if line.lstrip().startswith(("2026", "worker"))]
    assert len(lines[0]) < 1000


def test_a_waiting_checkout_is_reported_with_its_time_and_the_asker_counts(
    pid: str, clock: FakeClock, eventually: Eventually
) -> None:
    """One waits longer than the one that gives up: two in the numbers, the other in the report."""
    pool = new_pool(pid, timeout=None)
    asker = new_pool(pid, timeout=0.02)
    with held(pool, "one"), held(pool, "two"):
        other = Thread(lambda: pool.connect().close(), name="patient")
        eventually(lambda: pool.snapshot().waiting, "it waits")
        clock.now += 4.0
        error = fails(asker)
    other.join()
    assert error.snapshot.statistics.waiting == 2
    assert [(w.name, w.seconds) for w in error.snapshot.waiting] == [("patient", 4.0)]
    lines = str(error).splitlines()
    assert lines[lines.index("Waiting, longest first:") + 1].startswith("  patient (4.0 s)")


def test_an_engines_own_ceiling_is_said() -> None:
    """The limit that was met is the engine's, below the pool's."""
    pid = new_pid()
    large, small = new_pool(pid, max_size=5), new_pool(pid, max_size=1, timeout=0)
    with held(small, "one"), held(large, "two"):
        on_thread = Thread(lambda: fails(small))  # one that holds nothing itself
        line = str(on_thread.join()).splitlines()[0]
    assert "limit 5 (1 for this engine)." in line
    assert "this engine has reached its own limit of 1" in line
    assert "Raise the max_size of this engine" in line


def test_sqlalchemys_link_and_code_stay(pid: str) -> None:
    """It is a TimeoutError of SQLAlchemy's, as QueuePool's."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "a"), held(pool, "b"):
        error = fails(pool)
    assert isinstance(error, exc.TimeoutError)
    assert error.code == "3o7r"
    assert "Background on this error" in str(error)


# -- data ------------------------------------------------------------------------------------------------


def test_the_error_carries_the_same_as_data(pid: str, clock: FakeClock) -> None:
    """Numbers, holders and diagnosis as they are in the text; JSON takes the dictionary."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "one", "job"):
        clock.now += 1.0
        with held(pool, "two"):
            clock.now += 0.5
            error = fails(pool)
    found = error.snapshot
    assert isinstance(found, Snapshot)
    assert isinstance(found.diagnosis, Diagnosis)
    assert (found.statistics.open, found.statistics.held, found.statistics.limit) == (2, 2, 2)
    assert [(h.name, h.label, h.seconds) for h in found.holders] == [("one", "job", 1.5), ("two", None, 0.5)]
    told = json.loads(json.dumps(found.as_dict()))
    assert told["diagnosis"]["kind"] == found.diagnosis.kind
    assert told["holders"][0]["name"] == "one"
    assert told["statistics"]["held"] == 2
    assert datetime.datetime.fromisoformat(told["taken_at"]).tzinfo is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.holders = ()  # type: ignore[misc]


@pytest.mark.parametrize("through", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_the_error_reaches_another_process_with_all_it_says(pid: str, through: Callable[[Any], Any]) -> None:
    """Celery and multiprocessing pickle what a job has raised."""
    pool = new_pool(pid, timeout=0)
    with held(pool, "a"), held(pool, "b"):
        error = fails(pool)
    there = through(error)
    assert type(there) is CheckoutTimeout
    assert str(there) == str(error)
    assert there.snapshot == error.snapshot


def test_the_pool_keeps_the_last_twenty_the_newest_last(pid: str, clock: FakeClock) -> None:
    """And counts them all."""
    pool = new_pool(pid, timeout=0)
    errors = []
    with held(pool, "a"), held(pool, "b"):
        for _ in range(23):
            clock.now += SHARED_FOR
            errors.append(fails(pool))
    kept = inside.shared(pool).last_timeouts
    assert len(kept) == 20
    assert all(a is b.snapshot for a, b in zip(kept, errors[3:], strict=True))
    assert pool.statistics().timeouts == 23


def test_each_leaves_a_line_in_the_engines_log(pid: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first line of the error, at INFO: who raises it is who has to say so louder."""
    caplog.set_level(logging.INFO, NAME)
    pool = new_pool(pid, timeout=0)
    with held(pool, "a"), held(pool, "b"):
        error = fails(pool)
    lines = [record.getMessage() for record in caplog.records if "had no connection" in record.message]
    assert lines == [str(error).splitlines()[0]]


def test_a_deadlock_is_a_timeout_of_its_own_kind() -> None:
    """So that who catches timeouts catches it, and who wants to tell it apart can."""
    assert issubclass(PoolDeadlock, CheckoutTimeout)
    assert PoolDeadlock is not CheckoutTimeout


def test_a_snapshot_that_nobody_asked_for_in_vain_has_no_diagnosis(pid: str) -> None:
    """Nothing is the matter with it."""
    pool = new_pool(pid)
    with held(pool, "one"):
        found = pool.snapshot()
    assert found.diagnosis is None
    assert json.dumps(found.as_dict())
    assert "Held by" in found.named()
    assert "open 1" in found.line()
