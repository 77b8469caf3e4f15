"""Checkouts that wait for each other: who is told, when, and who is not."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import inside
import pytest
from hazards import (
    Handle,
    Ring,
    Stop,
    Thread,
    assert_whole,
    driver_connection_of,
    new_pid,
    sleeping_collector,
)
from hazards import new_pool as any_pool
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session

from sqla_queries_pool import CheckoutTimeout, PoolDeadlock, QueriesPool, labelled
from sqla_queries_pool.insight import deadlock
from sqla_queries_pool.logs import NAME
from sqla_queries_pool.pool import Pool
from sqla_queries_pool.pool.manager import everywhere
from sqla_queries_pool.runtime import checkout

new_pool = functools.partial(any_pool, on_deadlock="raise")
Eventually = Callable[..., None]
SEEDS = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (20261123, 7, 4711)]
DEADLINE = 120.0
"""Seconds after which a thread of the stress run counts as one that had no error of its deadlock."""


class Server(Handle):
    """A connection whose driver knows the transaction's state, as psycopg2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.info = SimpleNamespace(backend_pid=0, transaction_status=2)


class Side:
    """A thread that holds connections, then waits for one more, until the test lets it have it."""

    def __init__(self, name: str, *pools: QueriesPool) -> None:
        self.name, self.pools = name, pools
        self.error: BaseException | None = None
        self.held: list[Any] = []
        self._then: list[QueriesPool] = []
        self._has, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        assert self._has.wait(DEADLINE), "it gets no connection"

    def _run(self) -> None:
        self.held += [pool.connect() for pool in self.pools]
        self._has.set()
        assert self._go.wait(DEADLINE), "nobody told it what to wait for"
        try:
            for pool in self._then:
                with contextlib.closing(pool.connect()):
                    pass
        except CheckoutTimeout as error:
            self.error = error
        while self.held:
            self.held.pop().close()

    def waits_for(self, pool: QueriesPool, eventually: Eventually) -> Any:
        """Have it wait in the queue, and return the waiter."""
        self._then.append(pool)
        self._go.set()
        eventually(lambda: self.waiter(pool) is not None or self.error, f"{self.name} waits")
        return self.waiter(pool)

    def waiter(self, pool: QueriesPool) -> Any:
        """It, in the queue of a pool; None where it does not wait."""
        found = [w for w in inside.waiters(pool) if w.holder.ident == self.ident]
        return found[0] if found else None

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def end(self) -> BaseException | None:
        """Let it do without a further connection, wait for its end, and return its error."""
        self._go.set()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), f"{self.name} hangs"
        return self.error


@pytest.fixture
def sides() -> Iterator[Callable[..., Side]]:
    """Make sides.  At the end of the test the limits go, so that none of them waits any longer."""
    made: list[Side] = []
    pools: set[Pool] = set()

    def new(name: str, *held: QueriesPool) -> Side:
        made.append(Side(name, *held))
        return made[-1]

    yield new
    for side in made:
        pools |= {inside.shared(pool) for pool in (*side.pools, *side._then)}
        for pool in (*side.pools, *side._then):
            inside.attachment(pool).quota.stated = None
    for shared in pools:
        inside.decide(shared, inside.ledger(shared).let_in, 0.0)
        shared.set_max_size(100)
    for side in made:
        side.end()


def in_turn(pool: QueriesPool, eventually: Eventually, *made: Side) -> list[Any]:
    """Have them wait for a connection of a pool, in this order."""
    return [side.waits_for(pool, eventually) for side in made]


def still_pool(pid: str | None = None, **kw: Any) -> QueriesPool:
    """A pool whose checkouts never look for a deadlock themselves: the test does, by a clock of its own."""
    return new_pool(pid, Server, **({"max_size": 1, "timeout": None, "on_deadlock": "ignore"} | kw))


def watch(*pools: QueriesPool, grace: float = 1.0) -> deadlock.Watch:
    """What one checkout sees, of these pools."""
    return deadlock.Watch(lambda: [inside.shared(pool) for pool in pools], grace, math.inf)


def told(waiter: Any, *pools: QueriesPool) -> Any:
    """Look twice, the grace apart, at what does not move in between."""
    look = watch(*pools)
    assert look.hopeless(waiter, 0.0) is None, "told at once"
    return look.hopeless(waiter, 1.0)


# -- the rule, by a clock of its own ----------------------------------------------------------------


def test_a_thread_that_waits_for_itself_has_an_error_when_nothing_has_moved_for_the_grace(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """A checkout inside another, at a limit of one: nothing at the first look, nothing before the grace is
    over, then a diagnosis."""
    pool = still_pool()
    waiter = sides("nested", pool).waits_for(pool, eventually)
    look = watch(pool, grace=5.0)
    assert [look.hopeless(waiter, now) for now in (10.0, 11.0, 14.99)] == [None] * 3
    found = look.hopeless(waiter, 15.0)
    assert found is not None
    assert found.kind == "deadlock"
    assert "nested holds 1 and waits for a connection of" in found.details


def test_of_those_who_wait_for_each_other_the_newest_is_told(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Three threads hold one each and want another: who began to wait last gives up, and only that one."""
    pool = still_pool(max_size=3)
    waiters = in_turn(pool, eventually, *[sides(name, pool) for name in ("first", "second", "third")])
    found = [told(waiter, pool) for waiter in waiters]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert "3 checkouts" in found[2].cause
    lines = [line for line in found[2].details.splitlines() if " holds " in line]
    assert [line.split()[0] for line in lines] == ["first", "second", "third"]


@pytest.mark.parametrize("count", [2, 3])
def test_a_circle_may_lead_through_several_pools(
    count: int, sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Each holds the only connection of its pool and waits for the next pool's: the newest is told."""
    pools = [still_pool() for _ in range(count)]
    around = [sides(f"side-{n}", pool) for n, pool in enumerate(pools)]
    waiters = [side.waits_for(pools[(n + 1) % count], eventually) for n, side in enumerate(around)]
    found = [told(waiter, *pools) for waiter in waiters]
    assert found[:-1] == [None] * (count - 1)
    assert f"{count} checkouts" in found[-1].cause
    # Who sees one pool alone sees no circle.
    assert told(waiters[-1], pools[0]) is None


def test_a_thread_that_waits_and_holds_nothing_is_not_asked_to_give_up(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """A newcomer without a connection waits on; the newest of those who hold one is told all the same."""
    pool = still_pool(max_size=2)
    three = sides("one", pool), sides("other", pool), sides("newcomer")
    older, newer, last = in_turn(pool, eventually, *three)
    assert told(older, pool) is None
    assert told(last, pool) is None
    assert told(newer, pool) is not None


def test_a_checkout_whose_caller_holds_nothing_looks_once_and_those_that_wait_with_it_not_at_all(
    sides: Callable[..., Side], eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can't get one while it waits.  So many that time out at once cost little beside many pools."""
    inside.forget_holders(monkeypatch)
    pool = still_pool()
    sides("holder", pool)
    waiter = sides("newcomer").waits_for(pool, eventually)
    looked: list[int] = []

    def everywhere() -> list[Pool]:
        looked.append(1)
        return [inside.shared(pool)]

    look = deadlock.Watch(everywhere, 0.0, began=1.0)
    assert [look.hopeless(waiter, now) for now in (2.0, 3.0, 4.0)] == [None] * 3
    assert len(looked) == 1
    assert deadlock.Watch(everywhere, 0.0, began=1.5).hopeless(waiter, 4.0) is None
    assert len(looked) == 1
    holder = sides("one that takes one later", still_pool()).waits_for(pool, eventually)
    assert deadlock.Watch(everywhere, 0.0, began=2.5).hopeless(holder, 4.0) is None
    assert len(looked) == 2


def test_while_one_holder_does_not_wait_there_is_hope(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Two who are nested, and one at work: nobody is told; when that one waits as well, it is."""
    pool = still_pool(max_size=3)
    worker = sides("worker", pool)
    waiters = in_turn(pool, eventually, sides("one", pool), sides("other", pool))
    assert [told(waiter, pool) for waiter in waiters] == [None, None]
    assert told(worker.waits_for(pool, eventually), pool) is not None


def test_a_thread_that_waits_for_a_circle_without_being_in_it_has_no_error(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """A holds in a pool of its own and waits, later than they, for a pool where two wait for each other: they
    have to be told, for if A gave up they would not get on."""
    circle, apart = still_pool(max_size=2), still_pool()
    waiters = in_turn(circle, eventually, sides("one", circle), sides("other", circle))
    outside = sides("outside", apart).waits_for(circle, eventually)
    assert told(outside, circle, apart) is None
    assert told(waiters[1], circle, apart) is not None


def test_an_engines_own_ceiling_makes_a_circle_below_the_pools_limit(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """An engine with room for two, in a pool with room for ten: both nested in it wait for each other, and
    that another engine's holder is at work helps neither."""
    pid = new_pid()
    large, small = still_pool(pid, max_size=10), still_pool(pid, max_size=2)
    sides("at work elsewhere", large)
    older, newer = in_turn(small, eventually, sides("one", small), sides("other", small))
    assert told(older, small) is None
    assert told(newer, small) is not None


def test_what_is_returned_to_the_ceiling_is_hope_even_if_the_rest_of_the_pool_is_stuck(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """The pool's limit of two: one held by a thread that waits for the small engine, whose own is at work."""
    pid = new_pid()
    large, small = still_pool(pid, max_size=2), still_pool(pid, max_size=1)
    worker = sides("worker", small)
    waiter = sides("nested", large).waits_for(small, eventually)
    assert told(waiter, large) is None
    assert worker.end() is None
    eventually(lambda: not inside.waiters(large), "who hoped was served")


def test_one_that_executes_is_no_deadlock_and_starts_the_grace_anew(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """A connection of a waiting thread executes, in whose hands it may be: no grace runs while it does."""
    pool = still_pool()
    side = sides("nested", pool)
    waiter = side.waits_for(pool, eventually)
    info, look = side.held[0].dbapi_connection.info, watch(pool)
    assert look.hopeless(waiter, 0.0) is None
    info.transaction_status = 1
    assert look.hopeless(waiter, 1.0) is None
    info.transaction_status = 2
    assert look.hopeless(waiter, 2.0) is None
    assert look.hopeless(waiter, 2.9) is None
    assert look.hopeless(waiter, 3.0) is not None


@pytest.mark.parametrize("what", ["transaction", "uses"])
def test_what_moves_between_two_looks_starts_the_grace_anew(
    what: str, sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Its transaction has ended, or it was used again meanwhile: somebody works with it."""
    pool = still_pool()
    side = sides("nested", pool)
    waiter, look = side.waits_for(pool, eventually), watch(pool)
    assert look.hopeless(waiter, 0.0) is None
    if what == "transaction":
        side.held[0].dbapi_connection.info.transaction_status = 0
    else:
        inside.record(side.held[0]).slot.uses += 1
    assert [look.hopeless(waiter, now) for now in (1.0, 1.9)] == [None, None]
    assert look.hopeless(waiter, 2.0) is not None


def test_who_joins_the_circle_starts_the_grace_anew(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Another waiter is in the circle now, so it is not the one that stood still."""
    pool = still_pool(max_size=2)
    first, second = sides("first", pool), sides("second", pool)
    first.waits_for(pool, eventually)
    waiter = second.waits_for(pool, eventually)
    look = watch(pool)
    assert look.hopeless(waiter, 0.0) is None
    inside.waiters(pool)[0].since -= 1.0  # the first one has joined again
    assert look.hopeless(waiter, 1.0) is None
    assert look.hopeless(waiter, 2.0) is not None


def test_one_whose_checkin_has_begun_is_no_deadlock(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Another thread is closing the connection, and a listener takes its time."""
    pool = still_pool()
    stop = Stop()
    side = sides("nested", pool)
    waiter = side.waits_for(pool, eventually)
    event.listen(pool, "checkin", lambda *_: stop.here())
    closing = Thread(side.held.pop().close)
    stop.reached()
    assert told(waiter, pool) is None
    stop.go()
    closing.join()
    eventually(lambda: side.waiter(pool) is None, "it was served")


def test_an_unread_letter_is_hope(sides: Callable[..., Side], eventually: Eventually) -> None:
    """A connection was returned while another thread was inside the pool; the letter says so, once read."""
    pool = still_pool()
    shared, stop = inside.shared(pool), Stop()
    side = sides("nested", pool)
    waiter = side.waits_for(pool, eventually)

    def keep_the_lock() -> None:
        with inside.lock(shared):
            stop.here()

    keeper = Thread(keep_the_lock)
    stop.reached()
    inside.count(shared, "bypasses")  # whatever it is about
    assert inside.inbox(shared)
    assert told(waiter, pool) is None
    stop.go()
    keeper.join()
    inside.settle(shared)
    assert told(waiter, pool) is not None


def test_while_the_server_refuses_it_is_no_deadlock(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """A slot is free, and a checkout that waits for it waits for the server, whatever it holds."""
    pool = still_pool(max_size=2)
    shared = inside.shared(pool)
    side = sides("nested", pool)
    inside.decide(shared, inside.ledger(shared).backoff.refused, lambda _: 1e9, inside.now(shared))
    waiter = side.waits_for(pool, eventually)
    assert told(waiter, pool) is None


def test_a_session_that_has_locked_a_connection_is_hope(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Sessions of the queries API belong to no thread: they may free it at any time."""
    pool = still_pool(max_size=2)
    session = type("Session", (), {})()
    inside.shared(pool).add(handle := Server())
    inside.shared(pool).lock(handle, session)
    waiter = sides("nested", pool).waits_for(pool, eventually)
    assert told(waiter, pool) is None


def test_a_connection_that_is_being_opened_is_hope(
    sides: Callable[..., Side], eventually: Eventually
) -> None:
    """Its opener may fail, or be done with it soon."""
    stop, opened = Stop(), itertools.count()

    def connect() -> Server:
        if next(opened):
            stop.here()
        return Server()

    pool = new_pool(creator=connect, max_size=2, timeout=None, on_deadlock="ignore")
    side = sides("nested", pool)
    opener = Thread(lambda: pool.connect().close())
    stop.reached()
    waiter = side.waits_for(pool, eventually)
    assert told(waiter, pool) is None
    stop.go()
    opener.join()


def test_a_thread_with_the_identifier_of_one_that_has_ended_holds_nothing_of_it(
    eventually: Eventually,
) -> None:
    """Python gives identifiers to new threads that others had.  What an ended thread checked out and handed
    on is not the new thread's, which must not be told to give up what it does not have."""
    pool = still_pool()
    handed_on: list[Any] = []
    ended = threading.Thread(target=lambda: handed_on.append(pool.connect()))
    ended.start()
    ended.join()
    for _ in range(100):
        side = Side("innocent")
        if side.ident == ended.ident:
            break
        side.end()
    else:
        pytest.skip("this platform does not give identifiers again")
    waiter = side.waits_for(pool, eventually)
    found = told(waiter, pool)
    handed_on.pop().close()
    assert side.end() is None
    assert found is None


# -- the whole, with threads that look themselves ----------------------------------------------------


@pytest.fixture
def engines(pg_url: str) -> Iterator[Callable[..., Engine]]:
    """Engines of the test's database that wait for ever: nothing but PoolDeadlock ends a deadlock."""
    made: list[Engine] = []

    def new(**kw: Any) -> Engine:
        stated = {"pool_timeout": None, "on_deadlock": "raise"} | kw
        made.append(create_engine(pg_url, poolclass=QueriesPool, **stated))
        return made[-1]

    yield new
    for engine in made:
        engine.dispose()


def checkout_inside_a_checkout(engine: Engine, met: threading.Barrier) -> int:
    """An endpoint with a session, and an audit log with another."""
    with Session(engine) as session, labelled(threading.current_thread().name.upper()):
        session.execute(text("SELECT 1"))
        met.wait()
        with Session(engine) as audit:
            return int(audit.scalar(text("SELECT 1")) or 0)


@pytest.mark.slow
def test_of_two_nested_sessions_one_fails_at_once_and_names_both_and_the_other_goes_on(
    engines: Callable[..., Engine],
) -> None:
    """Real sessions on a real server: one PoolDeadlock long before the timeout, which there is none; it is a
    CheckoutTimeout, names both threads, and says of each where it has checked out and where it waits."""
    engine = engines(max_size=2, track_stacks=True)
    met = threading.Barrier(2)
    both = [Thread(checkout_inside_a_checkout, engine, met, name=name) for name in ("left", "right")]
    for thread in both:
        thread._thread.join(DEADLINE)
    errors = [thread.error for thread in both if thread.error]
    assert [type(error) for error in errors] == [PoolDeadlock]
    assert [thread.result for thread in both if not thread.error] == [1]
    error = errors[0]
    assert isinstance(error, CheckoutTimeout)
    first, _, rest = str(error).partition("\n")
    assert "2 checkouts wait for each other" in first
    assert error.snapshot.diagnosis.kind == "deadlock"
    for name in ("left", "right"):
        assert f"{name} [" in error.snapshot.diagnosis.details or f"{name} holds 1" in rest
        assert name in first
    assert rest.count("checked out at") >= 2
    assert rest.count(f"in {checkout_inside_a_checkout.__name__}") >= 4
    numbers = engine.pool.statistics()  # type: ignore[attr-defined]
    assert (numbers.timeouts, numbers.deadlocks) == (1, 1)
    assert inside.shared(engine.pool).last_timeouts[-1] is error.snapshot


@pytest.mark.slow
def test_a_worker_that_was_handed_the_connection_and_executes_is_waited_for(
    engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that checked out waits for a second connection while a worker executes on the first: it is
    looked at more often than the grace, and told nothing; then it is served."""
    engine = engines(max_size=1)
    looks: list[object] = []
    enough = threading.Event()
    hopeless = deadlock.Watch.hopeless

    def look(self: deadlock.Watch, waiter: Any, now: float) -> Any:
        looks.append(found := hopeless(self, waiter, now))
        if len(looks) >= 4:
            enough.set()
        return found

    monkeypatch.setattr(deadlock.Watch, "hopeless", look)
    connection = engine.connect()
    stopped: list[BaseException] = []

    def work() -> None:
        try:
            connection.exec_driver_sql("SELECT pg_sleep(600)")
        except Exception as error:
            stopped.append(error)
        connection.close()

    worker = Thread(work)

    def cancel() -> None:
        assert enough.wait(DEADLINE)
        driver_connection_of(connection.connection).cancel()

    canceller = Thread(cancel)
    with engine.connect() as second:
        assert second.scalar(text("SELECT 1")) == 1
    worker.join()
    canceller.join()
    assert stopped
    assert looks[:4] == [None] * 4


@pytest.mark.slow
def test_a_worker_that_executes_short_statements_is_waited_for(engines: Callable[..., Engine]) -> None:
    """Between two statements it is not executing, and whoever looks just then sees the same as before: that
    it makes progress in between has to be seen all the same."""
    engine = engines(max_size=1)
    connection = engine.connect()
    executed = 0

    def work() -> None:
        nonlocal executed
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            connection.execute(text("SELECT 1"))
            executed += 1
            time.sleep(0.02)  # it computes something
        connection.close()

    worker = Thread(work)
    with engine.connect() as second:
        assert second.scalar(text("SELECT 1")) == 1
    worker.join()
    assert executed > 10


@pytest.mark.slow
def test_by_default_it_is_logged_and_the_timeout_says_what_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """No checkout fails before its time is over, since another thread may close what it waits for."""
    pool = any_pool(max_size=1, timeout=1.0, deadlock_grace=0.0)
    caplog.set_level(logging.WARNING, NAME)
    with contextlib.closing(pool.connect()), pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    error = raised.value
    assert type(error) is CheckoutTimeout
    assert "had no connection within 1 s: " in str(error)
    assert "Most likely a thread waits for a connection that it holds itself" in str(error)
    assert (error.snapshot.diagnosis.kind, error.snapshot.statistics.waiting) == ("deadlock", 1)
    assert sum("that it holds itself" in record.message for record in caplog.records) == 1
    assert (pool.statistics().deadlocks, pool.statistics().timeouts) == (1, 1)


@pytest.mark.slow
def test_what_moved_after_the_warning_is_no_deadlock_when_the_time_is_over(
    eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread has used the connection since: the error says what it says without a deadlock."""
    pool = any_pool(max_size=1, timeout=4.0, deadlock_grace=0.0)
    caplog.set_level(logging.WARNING, NAME)
    first = pool.connect()

    def use() -> None:
        eventually(lambda: [r for r in caplog.records if "that it holds itself" in r.message], "the warning")
        inside.record(first).slot.uses += 1

    user = Thread(use)
    with contextlib.closing(first), pytest.raises(CheckoutTimeout) as raised:
        pool.connect()
    user.join()
    assert raised.value.snapshot.diagnosis.kind == "nested-checkout"
    assert pool.statistics().deadlocks == 0


@pytest.mark.slow
def test_with_warn_it_is_logged_once_and_waited_on(
    eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """``on_deadlock="warn"``: one line, however long it waits after that; it ends as the holder closes."""
    pool = new_pool(max_size=1, timeout=None, on_deadlock="warn", deadlock_grace=0.0)
    caplog.set_level(logging.WARNING, NAME)
    first = [pool.connect()]
    looks = itertools.count()
    warned: list[int] = []

    def close_later() -> None:
        eventually(lambda: [r for r in caplog.records if "that it holds itself" in r.message], "the warning")
        warned.append(next(looks))
        waiter = inside.waiters(pool)[0]
        eventually(lambda: inside.now(pool) - waiter.since > 2.5, "two more looks")
        first.pop().close()

    closer = Thread(close_later)
    pool.connect().close()
    closer.join()
    assert sum("that it holds itself" in record.message for record in caplog.records) == 1
    assert warned == [0]
    assert pool.statistics().deadlocks == 0


def test_with_ignore_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """``on_deadlock="ignore"``: the checkout waits for its timeout, as with SQLAlchemy's pools."""
    monkeypatch.setattr(deadlock, "Watch", None)  # making one would fail
    pool = new_pool(max_size=1, timeout=0.3, on_deadlock="ignore", deadlock_grace=0.0)
    with contextlib.closing(pool.connect()), pytest.raises(CheckoutTimeout) as caught:
        pool.connect()
    assert type(caught.value) is CheckoutTimeout
    assert caught.value.snapshot.diagnosis.kind == "nested-checkout"


@pytest.mark.slow
@pytest.mark.parametrize("gc_on_wait", [True, False])
def test_garbage_is_collected_before_anybody_is_told(
    gc_on_wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that the thread waits for is its own, forgotten in a cycle; others have asked for a
    collection so short ago that none is due.  It is served, and has no error of a deadlock with itself."""
    pool = new_pool(max_size=1, timeout=20.0, gc_on_wait=gc_on_wait, deadlock_grace=0.0)
    with sleeping_collector():
        Ring(pool.connect())
        inside.next_collection(monkeypatch, time.monotonic() + 1000.0)
        pool.connect().close()
    gc.collect()


@pytest.mark.slow
def test_what_was_given_while_the_error_was_made_is_not_lost(
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is returned between the last look and the error: it goes to the next one, or to this."""
    pool = new_pool(max_size=1, timeout=20.0, deadlock_grace=0.0)
    first = [pool.connect()]
    inside.before_a_deadlock_is_told(monkeypatch, lambda: Thread(first.pop().close).join())
    with contextlib.suppress(PoolDeadlock):
        pool.connect().close()
    assert not first
    assert_whole(pool, eventually)


def test_a_checkout_that_need_not_wait_never_gets_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """No watch is made for a connection that is there, nor looked for one that can be opened."""
    monkeypatch.setattr(deadlock.Watch, "hopeless", None)
    pool = new_pool(max_size=2)
    outer = pool.connect()
    pool.connect().close()
    monkeypatch.setattr(deadlock, "Watch", None)
    pool.connect().close()
    outer.close()


# -- many at random ------------------------------------------------------------------------------------


class History:
    """What happened, in one order, and what follows from it: who can never get on."""

    def __init__(self, limits: dict[str, int], pool_of: dict[str, str]) -> None:
        self._limits, self._pool_of = limits, pool_of
        self._lock = threading.Lock()
        self.events: list[tuple[str, int, str]] = []

    def note(self, what: str, thread: int, engine: str) -> None:
        with self._lock:
            self.events.append((what, thread, engine))

    def told(self) -> Iterator[tuple[int, set[int]]]:
        """Each thread that was told, and who was stuck when it began its last look.

        Not when it was told: while it makes its error, others that were told may make room.
        """
        seen: dict[int, set[int]] = {}
        held: dict[int, list[str]] = {}
        waits: dict[int, str] = {}
        for what, thread, engine in self.events:
            if what == "wait":
                waits[thread] = engine
            elif what == "take":
                del waits[thread]
                held.setdefault(thread, []).append(engine)
            elif what == "give":
                held[thread].remove(engine)
            elif what == "look":
                seen[thread] = self._stuck(held, waits)
            else:
                yield thread, seen[thread]
                del waits[thread]

    def _stuck(self, held: dict[int, list[str]], waits: dict[int, str]) -> set[int]:
        stuck = set(waits)
        while True:
            free = {thread for thread in stuck if self._may_get_on(waits[thread], held, stuck)}
            if not free:
                return stuck
            stuck -= free

    def _may_get_on(self, engine: str, held: dict[int, list[str]], stuck: set[int]) -> bool:
        """Is there a slot under each limit that is, or will be, free?"""
        pool = self._pool_of[engine]
        in_pool = [t for t, engines in held.items() for e in engines if self._pool_of[e] == pool]
        in_engine = [t for t, engines in held.items() for e in engines if e == engine]
        room = (
            (in_pool, self._limits[pool]),
            (in_engine, self._limits[engine]),
        )
        return all(sum(t in stuck for t in holders) < limit for holders, limit in room)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_of_thousands_of_nested_checkouts_just_those_fail_that_are_in_a_deadlock(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve threads, three engines (one with a ceiling of its own) in two pools, nesting at random: each
    PoolDeadlock was one by what was recorded, and none is missing, since nothing else ends the run."""
    print("seed", seed)
    # Looks every 10 ms, so that the run does not take minutes.
    monkeypatch.setattr(checkout, "looks", lambda *_: itertools.count(0.01, 0.01))
    monkeypatch.setattr(checkout, "GC_AFTER", 0.11)
    pids = {"north": new_pid(), "south": new_pid()}
    limits = {"north": 5, "south": 3, "north/all": 5, "north/few": 2, "south/all": 3}
    pools = {
        name: new_pool(
            pids[name.split("/")[0]], Server, max_size=limits[name], timeout=DEADLINE, deadlock_grace=0.05
        )
        for name in ("north/all", "north/few", "south/all")
    }
    for pool in pools.values():
        assert pool.timeout() == DEADLINE
    history = History(limits, {name: name.split("/")[0] for name in pools})
    hopeless = deadlock.Watch.hopeless

    def look(self: deadlock.Watch, waiter: Any, now: float) -> Any:
        history.note("look", int(threading.current_thread().name), "")
        return hopeless(self, waiter, now)

    monkeypatch.setattr(deadlock.Watch, "hopeless", look)
    deadlocks = itertools.count()
    checkouts = itertools.count()

    def nest(chance: random.Random, number: int, depth: int) -> None:
        name = chance.choice(sorted(pools))
        history.note("wait", number, name)
        try:
            connection = pools[name].connect()
        except PoolDeadlock:
            history.note("told", number, name)
            next(deadlocks)
            raise
        history.note("take", number, name)
        next(checkouts)
        try:
            if chance.random() < 0.5:
                time.sleep(0)  # somebody else's turn
            if chance.random() < 0.01:
                time.sleep(0.2)  # at work for longer than the grace: there is hope all the time
            if depth < 3 and chance.random() < 0.12:
                nest(chance, number, depth + 1)
        finally:
            history.note("give", number, name)
            connection.close()

    def run(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        for _ in range(280):
            with contextlib.suppress(PoolDeadlock):
                nest(chance, number, 0)

    threads = [Thread(run, number, name=str(number)) for number in range(12)]
    for thread in threads:
        thread.join(3 * DEADLINE)
    told = list(history.told())
    assert len(told) == next(deadlocks)
    assert [thread for thread, stuck in told if thread not in stuck] == []
    assert next(checkouts) >= 3300
    print("deadlocks", len(told))
    numbers = [pools[name].statistics() for name in ("north/all", "south/all")]
    assert sum(n.deadlocks for n in numbers) == sum(n.timeouts for n in numbers) == len(told)
    assert sum(n.checkouts for n in numbers) == sum(what == "take" for what, _, _ in history.events)
    assert everywhere()
