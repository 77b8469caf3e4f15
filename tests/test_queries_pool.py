"""One engine's pool, on a driver without a database: numbers, waiting, timeouts, SQLAlchemy's ways."""

from __future__ import annotations

import gc
import inspect
import itertools
import re
import threading
from collections.abc import Callable
from typing import Any

import inside
import pytest
import sqlalchemy.pool
from fakes import FakeClock, FakeDriver, Task
from hazards import report
from sqlalchemy import create_engine, exc

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool

Eventually = Callable[..., None]
_numbers = itertools.count()


@pytest.fixture
def pid() -> str:
    """A pool id that only this test has."""
    return f"pool-{next(_numbers)}"


def queue_up(
    pool: Any, count: int, eventually: Eventually, work: Callable[[int, Any], None]
) -> list[Task[None]]:
    """Threads that wait for a connection, in this order, and do ``work(number, connection)`` with it."""

    def get_and_work(number: int) -> None:
        connection = pool.connect()
        try:
            work(number, connection)
        finally:
            connection.close()

    tasks = []
    for number in range(count):
        before = report(pool)["waiting"]
        tasks.append(Task(lambda number=number: get_and_work(number), f"waiter-{number}"))  # type: ignore[misc]
        eventually(lambda n=before + 1: report(pool)["waiting"] == n, "the thread waits")
    return tasks


# -- what tools read ---------------------------------------------------------------------------------


def test_without_a_limit_the_size_is_zero_and_nothing_overflows(driver: FakeDriver) -> None:
    """QueuePool says 0 for a pool without a limit, so tools that divide by size() know it."""
    pool = QueriesPool(driver.connect, max_size=None)
    connections = [pool.connect() for _ in range(20)]
    assert (pool.size(), pool.checkedout(), pool.overflow()) == (0, 20, 0)
    del connections


@pytest.mark.parametrize("show", [QueriesPool.status, repr, str])
def test_status_and_repr_tell_the_whole_state(driver: FakeDriver, show: Callable[[Any], str]) -> None:
    """The pool's label, pid and numbers, and the engine's own part of them, are in one line."""
    engine = create_engine("fake://me:secret@host/status", module=driver, poolclass=QueriesPool, max_size=4)
    first, second = engine.connect(), engine.connect()
    second.close()
    shown = show(engine.pool)
    assert "fake://me@host/status" in shown
    assert f"pid {engine.pool.pid}" in shown  # type: ignore[attr-defined]
    assert "open 2, held 1, idle 1, opening 0, waiting 0, limit 4" in shown
    assert "size 4, checked in 1, checked out 1" in shown
    assert "secret" not in shown
    assert "\n" not in shown
    first.close()
    engine.dispose()


def test_the_status_counts_openings_and_waiting_checkouts(driver: FakeDriver, eventually: Eventually) -> None:
    """A connection that is being opened counts as such, and a thread that waits does, too."""
    pool = QueriesPool(driver.connect, max_size=1)
    driver.gate.clear()
    opener = Task(pool.connect)
    eventually(lambda: driver.connecting == 1)
    assert "open 0, held 0, idle 0, opening 1, waiting 0, limit 1" in pool.status()
    assert pool.checkedout() == 1
    waiters = queue_up(pool, 1, eventually, lambda number, connection: None)
    assert "opening 1, waiting 1, limit 1" in pool.status()
    driver.gate.set()
    opener.result().close()
    waiters[0].result()
    assert "open 1, held 0, idle 1, opening 0, waiting 0, limit 1" in pool.status()


def test_the_pid_is_public(driver: FakeDriver, pid: str) -> None:
    """``pool.pid`` is the id under which the manager knows the pool."""
    pool = QueriesPool(driver.connect, pool_id=pid)
    assert pool.pid == pid
    assert pid in PoolManager.instance()


# -- checkout and check-in ---------------------------------------------------------------------------


# -- waiting -----------------------------------------------------------------------------------------


def test_waiters_are_served_in_the_order_in_which_they_came(
    driver: FakeDriver, eventually: Eventually
) -> None:
    """First come, first served, from hand to hand: one connection serves all, whoever closes it."""
    pool = QueriesPool(driver.connect, max_size=1)
    connection = pool.connect()
    order: list[int] = []
    waiters = queue_up(pool, 8, eventually, lambda number, connection: order.append(number))
    connection.close()
    for waiter in waiters:
        waiter.result()
    assert order == list(range(8))
    assert driver.attempts == 1


def test_a_newcomer_does_not_overtake_a_waiting_checkout(driver: FakeDriver, eventually: Eventually) -> None:
    """A connection that was returned while somebody waits is that one's: who gave it back waits, too."""
    pool = QueriesPool(driver.connect, max_size=1)
    connection = pool.connect()
    go_on = threading.Event()
    waiters = queue_up(pool, 1, eventually, lambda number, connection: go_on.wait(10) and None)  # type: ignore[arg-type]
    connection.close()
    assert "held 1, idle 0" in pool.status()
    late = Task(pool.connect)
    eventually(lambda: report(pool)["waiting"] == 1, "the newcomer waits")
    go_on.set()
    waiters[0].result()
    late.result().close()


def test_a_timeout_of_none_waits_until_there_is_one(driver: FakeDriver, eventually: Eventually) -> None:
    """``timeout=None`` never gives up."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=None)
    assert pool.timeout() is None
    connection = pool.connect()
    waiters = queue_up(pool, 1, eventually, lambda number, connection: None)
    connection.close()
    waiters[0].result()


def test_a_timeout_of_zero_fails_at_once(driver: FakeDriver) -> None:
    """``timeout=0`` does not wait for anything: nobody is ever seen in the queue."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()
    with pytest.raises(CheckoutTimeout, match=r"within 0 s: open 1, held 1, opening 0, waiting 0, limit 1\b"):
        pool.connect()
    connection.close()
    pool.connect().close()


def test_who_timed_out_has_left_the_queue(driver: FakeDriver, eventually: Eventually) -> None:
    """Its message counts it; but after that nobody waits, and the connection is returned to no ghost."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0.01)
    connection = pool.connect()
    for _ in range(3):
        with pytest.raises(CheckoutTimeout, match=r"within 0\.01 s: open 1, held 1, opening 0, waiting 1,"):
            pool.connect()
    assert report(pool)["waiting"] == 0
    connection.close()
    assert pool.checkedin() == 1


def test_a_waiter_finds_what_was_abandoned_in_a_cycle(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all wait the collector does not run by itself: a waiter asks it."""
    inside.next_collection(monkeypatch, 0.0)
    gc.collect()
    gc.disable()
    try:
        pool = QueriesPool(driver.connect, max_size=1, timeout=60.0)
        cycle: list[Any] = [pool.connect()]
        cycle.append(cycle)
        del cycle
        pool.connect().close()
    finally:
        gc.enable()
        gc.collect()


# -- exhausted ---------------------------------------------------------------------------------------


def test_the_timeout_is_sqlalchemys(driver: FakeDriver) -> None:
    """Who catches QueuePool's timeout catches this one: type, and the code of the error's web page."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()
    with pytest.raises(exc.TimeoutError) as raised:
        pool.connect()
    assert isinstance(raised.value, CheckoutTimeout)
    assert raised.value.code == "3o7r"
    connection.close()


def test_the_timeout_names_the_pool_its_numbers_its_holders_and_what_to_do(
    driver: FakeDriver, pid: str
) -> None:
    """Holders by thread name and seconds, longest first; ten at most, and how many more there are."""
    clock = FakeClock()
    PoolManager.create(pid, max_size=12, time_method=clock)
    pool = QueriesPool(driver.connect, pool_id=pid, timeout=0)
    connections = []
    for number in range(12):
        connections.append(Task(pool.connect, f"holder-{number}").result())
        clock.now += 1.5
    with pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    message = str(raised.value)
    assert f"pid {pid}" in message
    assert "open 12, held 12, opening 0, waiting 0, limit 12" in message
    line, report = message.split("\n", 1)
    assert "and 9 more" in line
    assert "and 2 more" in report
    for part, named in ((line.split("Most likely")[0], 3), (report, 10)):
        seconds = [float(s) for s in re.findall(r"\((\d+\.\d) s\)", part)]
        assert seconds == [18.0 - 1.5 * n for n in range(named)]
    assert "which has ended (18.0 s) did not return its connection" in line
    assert "Close each connection" in line
    assert raised.value.snapshot.diagnosis.kind == "leak"


def test_the_timeout_names_threads_that_still_run(driver: FakeDriver) -> None:
    """A holder is named as its thread is, so that logs and stacks lead on from there."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    done = threading.Event()

    def hold() -> None:
        connection = pool.connect()
        taken.set()
        done.wait(10)
        connection.close()

    taken = threading.Event()
    task = Task(hold, "the nightly report")
    assert taken.wait(10)
    with pytest.raises(CheckoutTimeout, match=r"longest first: the nightly report \(\d\.\d s\)\. "):
        pool.connect()
    done.set()
    task.result()


def test_the_timeout_says_when_the_thread_that_asks_holds_some_itself(driver: FakeDriver) -> None:
    """Checkouts inside checkouts are what an application needs more connections for than it has threads."""
    pool = QueriesPool(driver.connect, max_size=2, timeout=0)
    mine = [pool.connect(), pool.connect()]
    with pytest.raises(CheckoutTimeout, match=r"this thread already holds 2 of them, and each nested"):
        pool.connect()
    with pytest.raises(CheckoutTimeout) as raised:
        Task(pool.connect).result()
    assert raised.value.snapshot.diagnosis.kind == "too-small"
    for connection in mine:
        connection.close()


def test_the_timeout_tells_who_is_still_opening(driver: FakeDriver, eventually: Eventually) -> None:
    """A connect that takes long is no query that takes long, and the message says which it is."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    driver.gate.clear()
    task = Task(pool.connect, "slow start")
    eventually(lambda: driver.connecting == 1)
    with pytest.raises(CheckoutTimeout, match=r"opening 1, .*slow start \(\d\.\d s, opening\)"):
        pool.connect()
    driver.gate.set()
    task.result().close()


def test_the_timeout_names_the_session_that_has_a_lock(driver: FakeDriver, pid: str) -> None:
    """What the queries API has locked is held, too: by a session, which is named by its kind."""

    class Importer:
        """A queries session."""

    pool = QueriesPool(driver.connect, pool_id=pid, max_size=1, timeout=0)
    importer = Importer()
    pool.connect().close()
    PoolManager.lock(pid, driver.connections[0], importer)
    with pytest.raises(CheckoutTimeout, match=r"session Importer \(0\.0 s\)"):
        pool.connect()
    PoolManager.free(pid, driver.connections[0])
    pool.connect().close()


def test_the_timeout_says_that_the_ceiling_is_the_engines_own(driver: FakeDriver, pid: str) -> None:
    """Where the database has room and the engine's own max_size is what stops it, both are told."""
    PoolManager.create(pid, max_size=5)
    pool = QueriesPool(driver.connect, pool_id=pid, max_size=1, timeout=0)
    connection = pool.connect()
    with pytest.raises(CheckoutTimeout, match=r"limit 5 \(1 for this engine\)"):
        pool.connect()
    connection.close()


def exhausted_after_a_failure(driver: FakeDriver, pid: str) -> tuple[QueriesPool, Any]:
    """A pool whose only connection is out, and whose last attempt to open one failed."""
    pool = QueriesPool(driver.connect, pool_id=pid, max_size=2, timeout=0)
    connection = pool.connect()
    driver.failures = 1
    with pytest.raises(FakeDriver.OperationalError):
        pool.connect()
    PoolManager.set_max_size(pid, 1)
    return pool, connection


def test_the_cause_of_a_timeout_is_the_last_connect_error(driver: FakeDriver, pid: str) -> None:
    """A pool that can't open what it needs says why; without a traceback, whose frames know the password."""
    pool, connection = exhausted_after_a_failure(driver, pid)
    with pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    cause = raised.value.__cause__
    assert type(cause) is FakeDriver.OperationalError
    assert str(cause) == "the server is not there"
    assert cause.__traceback__ is None
    connection.close()


def test_a_success_ends_the_last_connect_error(driver: FakeDriver, pid: str) -> None:
    """Once a connection was opened again, the error from before is nobody's cause any more."""
    pool, connection = exhausted_after_a_failure(driver, pid)
    PoolManager.set_max_size(pid, 2)
    second = pool.connect()
    with pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    assert raised.value.__cause__ is None
    connection.close()
    second.close()


def test_an_error_of_a_reconnect_is_a_connect_error_too(driver: FakeDriver, pid: str) -> None:
    """Invalidated connections reopen inside SQLAlchemy; why that fails is told like any other failure."""
    pool = QueriesPool(driver.connect, pool_id=pid, max_size=2, timeout=0)
    held, broken = pool.connect(), pool.connect()
    broken.invalidate()
    broken.close()
    driver.failures = 1
    with pytest.raises(FakeDriver.OperationalError):
        pool.connect()
    PoolManager.set_max_size(pid, 1)
    with pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    assert type(raised.value.__cause__) is FakeDriver.OperationalError
    held.close()


# -- connecting that fails ---------------------------------------------------------------------------


def test_the_caller_gets_the_drivers_error(driver: FakeDriver) -> None:
    """The error is the driver's own, and the slot is free again."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    driver.failures = 2
    for _ in range(2):
        with pytest.raises(FakeDriver.OperationalError, match="the server is not there"):
            pool.connect()
    assert "open 0, held 0, idle 0, opening 0" in pool.status()
    pool.connect().close()


def test_a_failure_passes_the_slot_on_to_the_next_who_tries_for_himself(
    driver: FakeDriver, eventually: Eventually
) -> None:
    """Each waiting checkout gets the error of its own attempt, until one succeeds."""
    pool = QueriesPool(driver.connect, max_size=1)
    driver.failures = 3
    driver.gate.clear()
    opener = Task(pool.connect)
    eventually(lambda: driver.connecting == 1)
    served: list[int] = []
    waiters = queue_up(pool, 4, eventually, lambda number, connection: served.append(number))
    driver.gate.set()
    for task in (opener, waiters[0], waiters[1]):
        with pytest.raises(FakeDriver.OperationalError):
            task.result()
    waiters[2].result()
    waiters[3].result()
    assert served == [2, 3]
    assert (driver.attempts, driver.peak) == (4, 1)


def test_what_is_no_error_of_the_database_is_no_connect_error() -> None:
    """Somebody's Ctrl-C while connecting explains nothing to others, later on."""
    driver = FakeDriver()
    interrupted: list[bool] = []

    def connect() -> Any:
        if len(driver.connections) == 1 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return driver.connect()

    pool = QueriesPool(connect, max_size=2, timeout=0)
    connection = pool.connect()
    with pytest.raises(KeyboardInterrupt):
        pool.connect()
    PoolManager.set_max_size(pool.pid, 1)
    with pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    assert raised.value.__cause__ is None
    connection.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_no_exception_while_connecting_loses_the_slot(error: type[BaseException]) -> None:
    """Not even one that is no Exception."""
    driver = FakeDriver()

    def connect() -> Any:
        if not failed:
            failed.append(True)
            raise error
        return driver.connect()

    failed: list[bool] = []
    pool = QueriesPool(connect, max_size=1, timeout=0)
    with pytest.raises(error):
        pool.connect()
    pool.connect().close()


# -- what SQLAlchemy closes and opens by itself ------------------------------------------------------


def test_an_invalidated_connection_is_returned_hollow(driver: FakeDriver) -> None:
    """It counts as checked in, is no open connection, keeps its record_info and reopens in its slot."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()
    assert connection.record_info is not None
    connection.record_info["kept"] = True
    connection.info["lost"] = True
    connection.invalidate()
    assert driver.numbers() == []
    connection.close()
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    assert "open 0, held 0, idle 0" in pool.status()
    connection = pool.connect()
    assert connection.record_info == {"kept": True}
    assert connection.info == {}
    assert driver.numbers() == [2]
    assert driver.peak == 1
    connection.close()


def test_a_hollow_one_is_used_before_a_new_slot_is_opened(driver: FakeDriver) -> None:
    """An engine with a hollow connection and room reopens that one: two slots, not three."""
    pool = QueriesPool(driver.connect, max_size=3, timeout=0)
    broken, held = pool.connect(), pool.connect()
    broken.invalidate()
    broken.close()
    again = pool.connect()
    assert (pool.checkedin(), pool.checkedout()) == (0, 2)
    again.close()
    held.close()


def test_a_reconnect_that_fails_keeps_the_slot_hollow(driver: FakeDriver) -> None:
    """The caller gets the driver's error; the slot stays checked in, and the next one tries again."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()
    connection.invalidate()
    connection.close()
    driver.failures = 2
    for _ in range(2):
        with pytest.raises(FakeDriver.OperationalError):
            pool.connect()
        assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    pool.connect().close()
    assert driver.peak == 1


def test_a_reconnect_that_fails_serves_the_next_waiter(driver: FakeDriver, eventually: Eventually) -> None:
    """A checkout that waits behind a failing reconnect gets the slot at once and tries itself."""
    pool = QueriesPool(driver.connect, max_size=1)
    connection = pool.connect()
    connection.invalidate()
    connection.close()
    driver.failures = 1
    driver.gate.clear()
    first = Task(pool.connect)
    eventually(lambda: driver.connecting == 1)
    waiters = queue_up(pool, 1, eventually, lambda number, connection: None)
    driver.gate.set()
    with pytest.raises(FakeDriver.OperationalError):
        first.result()
    waiters[0].result()
    assert driver.peak == 1


def test_what_is_detached_frees_its_slot_and_is_shown_until_it_is_closed(driver: FakeDriver) -> None:
    """A detached connection is its holder's: it counts against nothing, but is not forgotten."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()
    record = inside.record(connection)
    connection.detach()
    assert record.dbapi_connection is None  # it lives, so nothing is freed by its death
    assert (pool.checkedin(), pool.checkedout()) == (0, 0)
    assert report(pool)["connections"]["detached"] == 1
    pool.connect().close()
    assert report(pool)["connections"]["detached"] == 1
    connection.close()
    assert driver.numbers() == [2]
    assert report(pool)["connections"]["detached"] == 0


def test_a_detached_connection_that_dies_is_not_shown_any_more(driver: FakeDriver) -> None:
    """Where the DBAPI's connections can be referred to weakly, their death is seen."""
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()
    connection.detach()
    raw = connection.dbapi_connection
    assert raw is not None
    raw.close()  # behind SQLAlchemy's back
    del connection, raw
    driver.connections.clear()
    gc.collect()
    assert report(pool)["connections"]["detached"] == 0


def test_a_waiting_checkout_gets_the_slot_of_a_detached_connection(
    driver: FakeDriver, eventually: Eventually
) -> None:
    """detach() frees the slot at once: a waiter opens a connection of its own."""
    pool = QueriesPool(driver.connect, max_size=1)
    connection = pool.connect()
    waiters = queue_up(pool, 1, eventually, lambda number, connection: None)
    connection.detach()
    waiters[0].result()
    assert driver.numbers() == [1, 2]
    connection.close()


# -- parameters --------------------------------------------------------------------------------------


def test_an_unknown_keyword_is_a_type_error(driver: FakeDriver) -> None:
    """As everywhere in SQLAlchemy; a misspelt limit must not pass for none."""
    with pytest.raises(TypeError, match="max_sise"):
        QueriesPool(driver.connect, max_sise=3)
    with pytest.raises(TypeError, match="max_sise"):
        create_engine("fake://host/unknown", module=driver, poolclass=QueriesPool, max_sise=3)


def test_create_engine_passes_every_parameter(driver: FakeDriver, pid: str) -> None:
    """All parameters by the names that create_engine has for them, SQLAlchemy's own included."""
    engine = create_engine(
        "fake://host/all",
        module=driver,
        poolclass=QueriesPool,
        max_size=7,
        idle_ttl=12.5,
        pool_timeout=3,
        pool_id=pid,
        pool_use_lifo=False,
        check_limits=False,
        pool_recycle=99,
        pool_pre_ping=True,
        pool_reset_on_return="commit",
        pool_logging_name="mine",
    )
    pool: Any = engine.pool
    assert (pool.size(), pool.timeout(), pool.pid) == (7, 3, pid)
    assert (
        inside.setting(pool, "idle_ttl"),
        inside.setting(pool, "use_lifo"),
        inside.setting(pool, "check_limits"),
    ) == (12.5, False, False)
    assert (inside.setting(pool, "recycle"), inside.setting(pool, "pre_ping"), pool.logging_name) == (
        99,
        True,
        "mine",
    )
    engine.connect().close()
    assert driver.connections[0].calls["commit"] == 1


def test_create_engine_passes_queuepools_parameters(driver: FakeDriver) -> None:
    """An engine that is switched over from QueuePool keeps its limit."""
    engine = create_engine(
        "fake://host/queuepool", module=driver, poolclass=QueriesPool, pool_size=3, max_overflow=4
    )
    assert engine.pool.size() == 7  # type: ignore[attr-defined]


def test_every_parameter_can_be_seen_by_create_engine() -> None:
    """create_engine looks at the signature: nothing may hide in ``**kw`` but SQLAlchemy's own."""
    own = set(inspect.signature(QueriesPool.__init__).parameters) - {"self", "kw"}
    assert own == {
        "caller",
        "classes",
        "creator",
        "max_size",
        "idle_ttl",
        "timeout",
        "pool_id",
        "use_lifo",
        "pool_size",
        "max_overflow",
        "ping_after",
        "ping_timeout",
        "min_size",
        "track_stacks",
        "leak_after",
        "on_deadlock",
        "max_waiting",
        "queue_target",
        "fail_fast_after",
        "share",
        "check_limits",
        "idle_in_transaction_after",
    }
    assert issubclass(QueriesPool, sqlalchemy.pool.Pool)
