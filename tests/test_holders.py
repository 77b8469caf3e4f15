"""Who has a connection: thread, label, since when, where; and what the driver knows of its transaction."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
import sqlalchemy
from conftest import Observer
from fakes import FakeClock, FakeDriver
from hazards import DEADLINE, Stop, Thread, driver_connection_of, eventually, new_pid, new_pool
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session

import sqla_queries_pool
from sqla_queries_pool import Holder, PoolManager, QueriesPool, checkout_label, labelled, snapshot

Eventually = Callable[..., None]
PACKAGE = os.path.dirname(sqla_queries_pool.__file__) + os.sep
SQLALCHEMY = os.path.dirname(sqlalchemy.__file__) + os.sep
HERE = os.path.basename(__file__)


@pytest.fixture(params=["psycopg2", "psycopg"])
def engine(request: pytest.FixtureRequest, pg_url: str) -> Iterator[Engine]:
    """An engine of the test's database, with either driver."""
    url = sqlalchemy.make_url(pg_url).set(drivername=f"postgresql+{request.param}")
    engine = create_engine(url, poolclass=QueriesPool, max_size=4)
    yield engine
    engine.dispose()


def holders(pool: Any) -> tuple[Holder, ...]:
    """Who has the connections of an engine's pool."""
    found: tuple[Holder, ...] = pool.snapshot().holders
    return found


# -- who, since when, how often -----------------------------------------------------------------------


def test_a_connection_that_is_out_knows_its_thread_and_since_when(pid: str, clock: FakeClock) -> None:
    """The thread's identifier and name, and the seconds by the pool's clock; the longest comes first."""
    pool, stop = new_pool(pid), Stop()
    mine = pool.connect()
    clock.now += 5.0

    def hold() -> None:
        connection = pool.connect()
        stop.here()
        connection.close()

    other = Thread(hold, name="nightly report")
    stop.reached()
    clock.now += 2.5
    first, second = holders(pool)
    assert (first.thread, first.name, first.seconds) == (threading.get_ident(), "MainThread", 7.5)
    assert (second.thread, second.name, second.seconds) == (
        other._thread.ident,
        "nightly report",
        2.5,
    )
    assert (first.state, second.state) == ("held", "held")
    stop.go()
    other.join()
    mine.close()
    assert holders(pool) == ()


def test_it_knows_how_often_it_was_handed_out_this_time_included(pid: str) -> None:
    """One connection, used again and again."""
    pool = new_pool(pid)
    for count in (1, 2, 3):
        with_it = pool.connect()
        assert [holder.uses for holder in holders(pool)] == [count]
        with_it.close()


def test_a_thread_that_has_ended_is_said_to_have_ended_and_never_taken_for_another(pid: str) -> None:
    """Its identifier soon is a new thread's, whose name must not stand for it."""
    pool = new_pool(pid)
    kept: list[Any] = []
    ended = threading.Thread(target=lambda: kept.append(pool.connect()), name="leaky")
    ended.start()
    ended.join()
    stop = Stop()
    others = [Thread(stop.here, name=f"innocent-{n}") for n in range(5)]
    found = holders(pool)[0]
    assert found.name == f"thread {ended.ident}, which has ended"
    assert found.caller is None  # another thread may have its identifier by now
    assert found.thread is None
    assert found.now_at == ()
    stop.go()
    for other in others:
        other.join()
    kept.pop().close()


def test_one_that_is_being_opened_is_shown_with_its_opener() -> None:
    """State ``opening``, with the thread, the label and where it was asked for."""
    driver = FakeDriver()
    engine = create_engine(
        "fake://host/opening", module=driver, poolclass=QueriesPool, pool_id=new_pid(), track_stacks=True
    )
    driver.gate.clear()

    def open_one() -> None:
        with labelled("first request"):
            engine.connect().close()

    opener = Thread(open_one, name="opener")
    eventually(lambda: holders(engine.pool), "it is being opened")
    found = holders(engine.pool)
    assert [(h.state, h.name, h.backend_pid) for h in found] == [("opening", "opener", None)]
    assert "opening" in str(found[0])
    driver.gate.set()
    opener.join()


def test_what_a_session_of_queries_has_locked_is_the_sessions(pid: str) -> None:
    """No thread's: its kind stands for it, and that it is dead once it is."""

    class Report:
        pass

    pool = inside.shared(new_pool(pid))
    driver = FakeDriver()
    pool.add(handle := driver.connect())
    session = Report()
    pool.lock(handle, session)
    found = snapshot(pool).holders
    assert [(h.name, h.thread, h.state) for h in found] == [("session Report", None, "locked")]
    del session
    gc.collect()
    assert [h.name for h in snapshot(pool).holders] in (["dead session"], [])


def test_a_snapshot_can_be_taken_while_another_thread_is_inside_the_pool(pid: str) -> None:
    """It takes no lock: who holds the pool's for ever keeps nobody from looking."""
    pool, stop = new_pool(pid), Stop()
    connection = pool.connect()

    def keep_the_lock() -> None:
        with inside.lock(pool):
            stop.here()

    keeper = Thread(keep_the_lock)
    stop.reached()
    assert len(holders(pool)) == 1
    assert pool.statistics().held == 1
    assert PoolManager.statistics().pools[pid].held == 1
    stop.go()
    keeper.join()
    connection.close()


# -- what the driver knows -----------------------------------------------------------------------------


def test_pid_and_state_of_the_transaction_are_known_without_asking_the_server(
    engine: Engine, pg_observer: Observer
) -> None:
    """Idle, in transaction, in error, as the server says too; and however often one looks, the server sees
    no statement: the last one stays the last, and it began when it began."""
    with engine.connect() as connection:
        backend = driver_connection_of(connection.connection).info.backend_pid

        def server_says() -> tuple[Any, ...]:
            sql = "SELECT state, query, query_start, state_change FROM pg_stat_activity WHERE pid = %s"
            return pg_observer.query(sql, backend)[0]

        def seen() -> list[tuple[int | None, str | None]]:
            before = server_says()
            for _ in range(20):
                found = [(holder.backend_pid, holder.transaction) for holder in holders(engine.pool)]
            assert server_says() == before
            return found

        connection.rollback()
        assert seen() == [(backend, "idle")]
        connection.execute(text("SELECT 1"))
        assert seen() == [(backend, "in transaction")]
        assert server_says()[0] == "idle in transaction"
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            connection.execute(text("SELECT 1/0"))
        assert seen() == [(backend, "in error")]
        assert "in error" in str(holders(engine.pool)[0])
        connection.rollback()
        assert seen() == [(backend, "idle")]


def test_one_that_executes_is_seen_executing(
    engine: Engine, pg_observer: Observer, eventually: Eventually
) -> None:
    """From another thread, while the statement runs."""
    engine.connect().close()

    def run() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_sleep(600)"))

    thread = Thread(run, name="long statement")
    eventually(lambda: [h.transaction for h in holders(engine.pool)] == ["executing"], "it executes")
    found = holders(engine.pool)[0]
    assert "executing" in str(found)
    eventually(
        lambda: pg_observer.query("SELECT pg_cancel_backend(%s)", found.backend_pid) and not thread.alive
    )
    with pytest.raises(sqlalchemy.exc.DBAPIError):
        thread.join()


def test_one_that_is_being_opened_is_in_no_transaction(engine: Engine) -> None:
    """What a ``connect`` listener executes is not the checkout's."""
    found: list[Holder] = []

    @event.listens_for(engine, "connect")
    def ask(connection: Any, _: object) -> None:
        connection.cursor().execute("SELECT 1")
        found.extend(holders(engine.pool))

    engine.connect().close()
    assert [(holder.state, holder.transaction) for holder in found] == [("opening", None)]
    assert found[0].backend_pid


def test_a_driver_that_knows_nothing_of_it_is_asked_nothing(pid: str) -> None:
    """None, and no error."""
    pool = new_pool(pid)
    connection = pool.connect()
    assert [(h.backend_pid, h.transaction) for h in holders(pool)] == [(None, None)]
    connection.close()


# -- labels ------------------------------------------------------------------------------------------------


def test_a_label_is_what_was_set_at_the_checkout(pid: str, clock: FakeClock) -> None:
    """Of the innermost block; not what is set later, and not that of who had the connection before."""
    pool = new_pool(pid, max_size=3)
    with labelled("outer"):
        with labelled("inner"):
            one = pool.connect()
        clock.now += 1.0
        two = pool.connect()
    clock.now += 1.0
    three = pool.connect()
    assert [h.label for h in holders(pool)] == ["inner", "outer", None]
    assert "MainThread [inner]" in str(holders(pool)[0])
    for connection in (one, two, three):
        connection.close()
    again = pool.connect()
    assert [h.label for h in holders(pool)] == [None]
    again.close()


def test_a_label_is_reset_when_its_block_raises() -> None:
    """The context variable is as it was before."""
    before = checkout_label.get()
    with pytest.raises(KeyError), labelled("failing"):
        raise KeyError
    assert checkout_label.get() is before


def test_a_copied_context_takes_the_label_along_and_a_plain_thread_does_not(pid: str) -> None:
    """``contextvars.copy_context().run`` in a thread has it; ``threading.Thread`` begins without one."""
    pool = new_pool(pid)

    def checkout() -> list[str | None]:
        connection = pool.connect()
        try:
            return [h.label for h in holders(pool)]
        finally:
            connection.close()

    with labelled("request 1"):
        context = contextvars.copy_context()
        assert Thread(checkout).join() == [None]
        assert Thread(context.run, checkout).join() == ["request 1"]


def test_tasks_have_their_own_labels(pid: str) -> None:
    """Two tasks of one loop, their checkouts in threads: neither sees the other's label."""
    pool = new_pool(pid, max_size=5)
    both = threading.Barrier(2)

    def checkout() -> str | None:
        connection = pool.connect()
        both.wait(DEADLINE)
        mine = [h.label for h in holders(pool) if h.thread == threading.get_ident()]
        both.wait(DEADLINE)
        connection.close()
        return mine[0]

    async def task(name: str) -> str | None:
        with labelled(name):
            return await asyncio.to_thread(checkout)

    async def both_of_them() -> list[str | None]:
        return list(await asyncio.gather(task("a"), task("b")))

    assert asyncio.run(both_of_them()) == ["a", "b"]


def test_a_waiting_checkout_has_name_label_and_time_and_then_holds_with_the_same(
    pid: str, clock: FakeClock, eventually: Eventually
) -> None:
    """In the queue, and after it was handed a connection that had another holder's label."""
    pool, stop = new_pool(pid, max_size=1), Stop()
    PoolManager.set_max_size(pid, 1)
    with labelled("holder"):
        connection = pool.connect()

    def wait() -> None:
        with labelled("waiter"):
            second = pool.connect()
        stop.here()
        second.close()

    waiter = Thread(wait, name="patient")
    eventually(lambda: pool.snapshot().waiting, "it waits")
    clock.now += 3.0
    found = pool.snapshot().waiting
    assert [(w.name, w.label, w.seconds, w.thread) for w in found] == [
        ("patient", "waiter", 3.0, waiter._thread.ident)
    ]
    assert found[0].now_at[-1].endswith("in wait")
    connection.close()
    stop.reached()
    assert [(h.name, h.label) for h in holders(pool)] == [("patient", "waiter")]
    stop.go()
    waiter.join()


# -- stacks -----------------------------------------------------------------------------------------------


def test_with_track_stacks_the_application_is_shown_and_nothing_of_the_libraries(pg_url: str) -> None:
    """Through a session: the last call is the application's own, none is SQLAlchemy's or the pool's."""
    engine = create_engine(pg_url, poolclass=QueriesPool, track_stacks=True)

    def endpoint() -> tuple[str, ...]:
        with Session(engine) as session:
            session.execute(text("SELECT 1"))
            return holders(engine.pool)[0].stack

    for _ in range(2):  # opened, then idle
        stack = endpoint()
        assert stack[-1].endswith("in endpoint")
        assert HERE in stack[-1]
        assert not [call for call in stack if call.startswith((PACKAGE, SQLALCHEMY))]
        assert any("in test_with_track_stacks" in call for call in stack[:-1])
    engine.dispose()


def test_the_stack_survives_a_dispose_of_the_engine(pg_url: str) -> None:
    """The successor tracks, too."""
    engine = create_engine(pg_url, poolclass=QueriesPool, track_stacks=True)
    engine.dispose()
    with engine.connect():
        assert "in test_the_stack_survives" in holders(engine.pool)[0].stack[-1]
    engine.dispose()


def test_while_one_is_probed_label_and_stack_are_both_its_new_holders() -> None:
    """A ping that takes its time: the checkout that waits for it is shown, and not the holder before."""
    driver, stop = FakeDriver(), Stop()
    engine = create_engine(
        "fake://host/probing",
        module=driver,
        poolclass=QueriesPool,
        pool_id=new_pid(),
        track_stacks=True,
        ping_after=0,
    )

    def first() -> None:
        with labelled("first"):
            engine.pool.connect().close()

    def second() -> None:
        with labelled("second"):
            engine.pool.connect().close()

    first()
    driver.on_ping = lambda _: stop.here()
    thread = Thread(second)
    stop.reached()
    found = holders(engine.pool)[0]
    assert (found.label, found.stack[-1].rpartition(" in ")[2]) == ("second", "second")
    stop.go()
    thread.join()


def test_after_a_wait_the_stack_is_that_of_who_was_served(eventually: Eventually) -> None:
    """A direct hand-over from one thread to the other."""
    pool, stop = new_pool(max_size=1, track_stacks=True), Stop()

    def holder() -> Any:
        return pool.connect()

    def waiter() -> None:
        connection = pool.connect()
        stop.here()
        connection.close()

    connection = holder()
    assert holders(pool)[0].stack[-1].endswith("in holder")
    thread = Thread(waiter)
    eventually(lambda: pool.snapshot().waiting, "it waits")
    connection.close()
    stop.reached()
    assert holders(pool)[0].stack[-1].endswith("in waiter")
    stop.go()
    thread.join()


def test_without_it_there_is_no_stack_but_where_the_thread_is_now(pid: str) -> None:
    """Off by default."""
    pool = new_pool(pid)
    connection = pool.connect()
    found = holders(pool)[0]
    assert found.stack == ()
    assert found.now_at[-1].endswith("in holders")  # this thread asks itself
    connection.close()


def test_a_deep_stack_keeps_its_innermost_calls(pid: str) -> None:
    """Twenty at most, so that a recursion costs no more than that."""
    pool = new_pool(pid, track_stacks=True)

    def dive(depth: int) -> Any:
        return dive(depth - 1) if depth else pool.connect()

    connection = dive(200)
    stack = inside.record(connection).slot.stack
    assert len(stack) == 20
    assert {code.co_name for code, _ in stack} == {"dive"}
    connection.close()
