"""The lock of a pool, and what may come upon it: finalizers, listeners, interrupts (design 7, 8, 9).

All with a driver that has no server: what counts here is who is inside the pool, and when.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import inside
import pytest
import sqlalchemy
from hazards import (
    Handle,
    Ring,
    Stop,
    Thread,
    assert_whole,
    driver_connection_of,
    new_pid,
    new_pool,
    sleeping_collector,
)
from sqlalchemy import event

from sqla_queries_pool import (
    CheckoutReentered,
    CheckoutTimeout,
    ConnectionBusyError,
    PoolManager,
    QueriesPool,
    TooManyRequests,
)
from sqla_queries_pool.budget import ages, choice, closing, engines, locks
from sqla_queries_pool.budget.audit import check
from sqla_queries_pool.budget.backoff import Backoff
from sqla_queries_pool.budget.ledger import Ledger
from sqla_queries_pool.budget.lifetimes import Lifetimes
from sqla_queries_pool.budget.slots import Attachment, NotHeld, Quota
from sqla_queries_pool.budget.state import LedgerState
from sqla_queries_pool.concurrency.housekeeping import Housekeeper
from sqla_queries_pool.concurrency.threads import ThreadWaiter
from sqla_queries_pool.insight.snapshot import snapshot
from sqla_queries_pool.pool import Pool
from sqla_queries_pool.pool.manager import attach
from sqla_queries_pool.runtime import checkout, jitter

Eventually = Callable[..., None]
VERSION = tuple(int(part) for part in sqlalchemy.__version__.split(".")[:3])
INTERRUPTS_ARE_KEPT = (
    "before 2.0.56 SQLAlchemy keeps a record until the BaseException that its reset has raised is forgotten"
    if VERSION < (2, 0, 56)
    else ""
)


class Interrupt(BaseException):
    """What no `except Exception` catches."""


class Session:
    """Who locks connections through the queries API."""


@pytest.fixture
def collector() -> Iterator[None]:
    """See sleeping_collector."""
    with sleeping_collector():
        yield


def call_inside(monkeypatch: pytest.MonkeyPatch, method: str, call: Callable[[], object]) -> None:
    """Have `call` called once, inside the ledger and hence inside the lock, before `method` begins."""
    real = getattr(Ledger, method)
    calls = [call]

    def patched(self: Ledger, *args: Any, **kw: Any) -> Any:
        if calls:
            calls.pop()()
        return real(self, *args, **kw)

    monkeypatch.setattr(Ledger, method, patched)


class WatchedLock:
    """Stands in for a pool's lock."""

    def __init__(self, shared: Pool) -> None:
        self.real = inside.lock(shared)
        self.misses = 0
        """How many of the next tries fail, as if another thread had let go of the lock right after."""
        self.at_release: list[Callable[[], object]] = []
        """Each is called once, one at each release, right before it."""
        inside.replace_lock(shared, self, self.try_lock)

    def try_lock(self) -> bool:
        if self.misses:
            self.misses -= 1
            return False
        taken: bool = self.real.acquire(False)
        return taken

    def release(self) -> None:
        if self.at_release:
            self.at_release.pop()()
        self.real.release()

    def __enter__(self) -> bool:
        taken: bool = self.real.acquire()
        return taken

    def __exit__(self, *args: object) -> None:
        self.release()


# -- a check-in while the lock is taken -------------------------------------------------------------


def test_a_check_in_does_not_wait_for_the_lock(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """While another thread is inside the pool a check-in returns at once; it counts when that one leaves."""
    pool = new_pool()
    fairy = pool.connect()
    stop = Stop()
    call_inside(monkeypatch, "take", stop.here)
    other = Thread(pool.connect)
    stop.reached()
    Thread(fairy.close).join()
    assert pool.checkedout() == 1, "the ledger was touched while somebody was inside"
    stop.go()
    held = other.join()
    assert not inside.inbox(pool)
    assert pool.checkedout() == 1, "the check-in counts"
    held.close()
    assert_whole(pool, eventually)


def test_a_stranger_is_refused_also_while_the_lock_is_taken(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Giving back twice raises at once, not later in whichever thread reads the letters."""
    pool = new_pool()
    fairy = pool.connect()
    record = inside.record(fairy)
    fairy.close()
    stop = Stop()
    call_inside(monkeypatch, "close_idle", stop.here)
    other = Thread(pool.dispose)
    stop.reached()
    with pytest.raises(NotHeld):
        inside.checkouts(pool).give(inside.attachment(pool), record)
    stop.go()
    other.join()
    assert_whole(pool, eventually)


def test_a_check_in_tries_the_lock_again_after_its_letter(eventually: Eventually) -> None:
    """The lock was let go of between the first try and the letter: the letter is read all the same.

    Without the second try it would lie there until somebody else comes, and those who wait don't.
    """
    pool = new_pool(max_size=1)
    fairy = pool.connect()
    waiting = Thread(pool.connect)
    eventually(lambda: inside.shared(pool).numbers.waiting == 1, "somebody waits")
    lock = WatchedLock(inside.shared(pool))
    lock.misses = 1
    fairy.close()
    assert not lock.misses, "it never tried"
    assert not inside.inbox(pool)
    waiting.join().close()
    assert_whole(pool, eventually)


def take(pool: QueriesPool, fairy: Any) -> Callable[[], object]:
    """A checkout of what is idle."""
    fairy.close()
    kept: list[object] = []
    return lambda: kept.append(pool.connect())


def decide(pool: QueriesPool, _: Any) -> Callable[[], object]:
    """Something that waits for the lock."""
    return lambda: inside.shared(pool).set_idle_ttl(50)


def post(pool: QueriesPool, _: Any) -> Callable[[], object]:
    """Something that does not."""
    return lambda: inside.post(pool, lambda now: None)


def give(_: QueriesPool, fairy: Any) -> Callable[[], object]:
    """A check-in."""
    return lambda: fairy.close()


def give_a_stranger(pool: QueriesPool, fairy: Any) -> Callable[[], object]:
    """A check-in that is refused."""
    record = inside.record(fairy)
    fairy.close()

    def again() -> None:
        with pytest.raises(NotHeld):
            inside.checkouts(pool).give(inside.attachment(pool), record)

    return again


def give_and_close(pool: QueriesPool, fairy: Any) -> Callable[[], object]:
    """A check-in of what is to be closed."""
    pool.dispose()
    pool.recreate()

    def close() -> None:
        assert not inside.inbox(pool), "the letter has to wait until the connection is closed"

    driver_connection_of(fairy).close = close
    return lambda: fairy.close()


@pytest.mark.parametrize(
    "prepare",
    [take, decide, post, give, give_a_stranger, give_and_close],
)
def test_whoever_lets_go_of_the_lock_reads_what_came_meanwhile(
    prepare: Callable[[QueriesPool, Any], Callable[[], object]], caplog: pytest.LogCaptureFixture
) -> None:
    """A letter that came while a thread was inside is read by that thread, before it does anything slow."""
    pool = new_pool(max_size=4)
    visit = prepare(pool, pool.connect())
    letters: list[float] = []
    lock = WatchedLock(inside.shared(pool))
    lock.at_release.append(lambda: inside.inbox(pool).append((letters.append, ())))
    visit()
    assert not lock.at_release, "it was never inside"
    assert letters, "the letter was not read"
    assert not caplog.records


def test_letters_are_read_although_one_of_them_is_bad(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """An operation that fails in the inbox is logged; those behind it are carried out."""
    pool = new_pool()
    first, second = pool.connect(), pool.connect()
    record = inside.record(first)
    stop = Stop()
    call_inside(monkeypatch, "close_idle", stop.here)
    other = Thread(pool.dispose)
    stop.reached()
    first.close()
    # It is still held as far as the ledger knows, so this becomes a letter, too.
    inside.checkouts(pool).give(inside.attachment(pool), record)
    second.close()
    stop.go()
    other.join()
    assert "was returned, but it was not checked out: it is idle" in caplog.text
    assert_whole(pool, eventually)


def test_reading_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever only looks is served while somebody else is inside the pool, for however long."""
    pool = new_pool()
    fairy = pool.connect()
    stop = Stop()
    call_inside(monkeypatch, "take", stop.here)
    other = Thread(pool.connect)
    stop.reached()
    shared = inside.shared(pool)

    def look() -> None:
        assert "held 1" in repr(pool)
        assert "held 1" in repr(shared)
        assert pool.status()
        assert (pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow()) == (2, 0, 1, -1)
        assert shared.report()["connections"]["held"] == 1
        assert PoolManager.report()["pools"][pool.pid]["connections"]["open"] == 1
        assert len(snapshot(shared).holders) == 1
        assert PoolManager.size(pool.pid) == 1
        assert not PoolManager.is_full(pool.pid)
        assert not PoolManager.has_idle_connection(pool.pid)
        assert PoolManager.has_connection(pool.pid, fairy.dbapi_connection)

    Thread(look).join()
    stop.go()
    other.join()


# -- the collector, inside the lock -----------------------------------------------------------------


class Abandoning:
    """Keeps one connection of a pool abandoned in a cycle, until the collector finds it."""

    def __init__(self, pool: QueriesPool) -> None:
        self.pool = pool
        self.shared = inside.shared(pool)
        self.returned_inside = 0
        """How often the collector gave it back while its thread was inside the ledger."""
        self._pending = 0
        event.listen(pool, "checkin", self._returned)

    def again(self) -> None:
        n = self.shared.numbers
        if not self._pending and n.held + n.opening + n.closing + n.waiting < 3:
            self._pending = 1
            fairy = self.pool.connect()
            inside.record(fairy).info["abandoned"] = True
            Ring(fairy)

    def _returned(self, handle: Any, record: Any) -> None:
        if record.info.pop("abandoned", False):
            self._pending = 0
            self.returned_inside += inside.is_inside(self.shared)

    def collect(self) -> None:
        if self._pending and inside.is_inside(self.shared):
            gc.collect()


def a_day(a: QueriesPool, b: QueriesPool, step: Callable[[], None], eventually: Eventually) -> None:
    """Two engines of one pool, of three connections, one of which is abandoned again and again."""
    shared = inside.shared(a)
    step()
    inside.core(shared).retire(inside.attachment(a))
    held = [a.connect(), b.connect()]
    waiting = [Thread(a.connect), Thread(b.connect)]
    eventually(lambda: shared.numbers.waiting + sum(not t.alive for t in waiting) == 2, "both wait")
    inside.decide(shared, inside.ledger(shared).stood_still, inside.now(shared))
    for fairy in held:
        step()
        fairy.close()
    for thread in waiting:
        thread.join().close()
    step()
    others = [b.connect(), b.connect()]  # a's idle ones give way
    step()
    others[0].invalidate()
    step()
    others[0] = b.connect()
    others[0].detach()
    driver_connection_of(others[0]).close()
    others[1].close()
    step()
    raw, session = Handle(), Session()
    PoolManager.clean(a.pid)
    eventually(lambda: not shared.numbers.closing)
    a.dispose()
    b.dispose()
    step()
    PoolManager.add(a.pid, raw)
    PoolManager.lock(a.pid, raw, session)
    step()
    PoolManager.free(a.pid, raw)
    assert PoolManager.get(a.pid, session) is raw
    step()
    del session
    a.connect().close()
    step()
    PoolManager.set_max_size(a.pid, 1)
    PoolManager.set_idle_ttl(a.pid, 0)
    step()
    PoolManager.set_idle_ttl(a.pid, 60)
    shared.idle_start = None
    PoolManager.set_max_size(a.pid, 3)
    fail_to_open(a, step)
    be_refused(a, step)
    inside.upkeep(shared).sweep()
    shared.clean()
    with contextlib.suppress(ConnectionBusyError):
        step()
        shared.close()
    fail_to_wait(a, step)
    be_turned_away(a, step)
    attach(a.pid, "an engine that is dropped at once", Attachment(Quota(None), 60.0))
    step()
    shared.shutdown()
    step()
    a.connect().close()
    renew_and_warm_up(a, eventually)
    step()
    a.connect().close()
    entry, since = inside.decide(a, ages.borrow, inside.ledger(a), inside.attachment(a))
    returned = entry.slot, entry, since, inside.now(a)
    inside.do_soon(a, inside.decide(a, ages.give_borrowed, inside.ledger(a), *returned))
    del entry, returned
    inside.core(b).abandon(inside.attachment(b), lambda _: None)
    step()


def fail_to_open(pool: QueriesPool, step: Callable[[], None]) -> None:
    """Opening a connection fails."""
    pool.dispose()
    step()

    def fail(_: Any) -> None:
        raise Interrupt

    invoke, pool._invoke_creator = pool._invoke_creator, fail  # type: ignore[assignment]
    out = []
    with pytest.raises(Interrupt):  # noqa: PT012
        while True:  # some may be idle
            out.append(pool.connect())
    pool._invoke_creator = invoke


def renew_and_warm_up(pool: QueriesPool, eventually: Eventually) -> None:
    """Connections are opened in the background, and in readiness."""
    pool.expire(rolling=True)
    eventually(lambda: inside.ledger(pool).lifetimes.renewing == [], "it is renewed")
    inside.attachment(pool).min_size = 2
    pool.warm_up()
    inside.core(pool).suspect_own(inside.attachment(pool))
    inside.attachment(pool).min_size = 0


def be_refused(pool: QueriesPool, step: Callable[[], None]) -> None:
    """The server refuses a connection, and the next time lets us in; one is found dead before it is used."""
    pool.connect().invalidate()
    invoke = pool._invoke_creator

    def refuse(_: Any) -> None:
        pool._invoke_creator = invoke
        raise ConnectionRefusedError("Connection refused")

    pool._invoke_creator = refuse  # type: ignore[assignment]
    pool.connect().close()
    step()
    with contextlib.closing(pool.connect()) as fairy:
        inside.connections(pool).found_dead(inside.record(fairy).slot)
    step()


def fail_to_wait(pool: QueriesPool, step: Callable[[], None]) -> None:
    """A checkout finds the pool full, and times out unless the collector helps."""
    step()
    out = []
    timeout = pool.timeout()
    inside.set_timeout(pool, 0.001)
    with pytest.raises(CheckoutTimeout):  # noqa: PT012
        while True:
            out.append(pool.connect())
            step()
    inside.set_timeout(pool, timeout)


def be_turned_away(pool: QueriesPool, step: Callable[[], None]) -> None:
    """A checkout finds the pool full, and may not wait."""
    out = []
    inside.attachment(pool).max_waiting = 0
    with pytest.raises(TooManyRequests):  # noqa: PT012
        while True:
            out.append(pool.connect())
            step()
    inside.attachment(pool).max_waiting = math.inf


OTHERS = {
    *("arrival", "everyone", "fresh", "in_child", "look_in", "numbers", "vacant", "waiters"),
    *("barred", "class_statistics", "could_serve", "late", "pace_of", "probes"),
    "cut",  # it is closed()
}
"""Those that only read, and those that nobody else can be inside of."""
ROOMS: tuple[Any, ...] = (LedgerState, Ledger, Backoff, Lifetimes, ages, choice, closing, engines, locks)
"""Where the operations of the ledger are."""
OPERATIONS = {
    f"{room.__name__.rpartition('.')[2]}.{name}": (Ledger if room is LedgerState else room, name)
    for room in ROOMS
    for name, value in vars(room).items()
    if isinstance(value, FunctionType)
    and value.__module__ == getattr(room, "__module__", room.__name__)
    and not name.startswith("__")
    and name not in OTHERS
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
@pytest.mark.usefixtures("collector")
def test_a_check_in_by_the_collector_inside_the_ledger_lands(
    operation: str, moment: str, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Wherever in the ledger the collector runs a check-in, it is carried out right afterwards.

    In the middle of another operation it would see half a truth: a waiter would be answered twice, or
    a slot counted twice.  So nothing may change while it runs, and nothing may be left to do later.
    """
    pid = new_pid()
    a, b = new_pool(pid, max_size=3), new_pool(pid, max_size=3)
    shared = inside.shared(a)
    abandoning = Abandoning(a)
    owner, name = OPERATIONS[operation]
    real = getattr(owner, name)
    mine = (inside.ledger(shared), inside.ledger(shared).backoff, inside.ledger(shared).lifetimes)

    def collecting(it: Any, *args: Any, **kw: Any) -> Any:
        ours = it in mine or isinstance(it, ThreadWaiter)
        if ours and moment == "before":
            abandoning.collect()
        result = real(it, *args, **kw)
        if ours and moment == "after":
            abandoning.collect()
        return result

    monkeypatch.setattr(owner, name, collecting)
    monkeypatch.setattr(jitter, "FIRST_PAUSE", 0.001)  # a refusal is part of the day
    for module in (
        choice,
        checkout,
    ):  # as is a wait for another engine's connection to be one that it can spare
        monkeypatch.setattr(module, "SPARE", 0.001)

    def step() -> None:
        eventually(lambda: not inside.inbox(shared), "letters are read")  # the housekeeper may have the lock
        inside.decide(shared, check, inside.ledger(shared))
        abandoning.again()

    a_day(a, b, step, eventually)
    gc.collect()
    assert abandoning.returned_inside, "the collector was never inside"
    assert_whole(a, eventually)
    assert_whole(b, eventually)


def test_a_connection_that_is_returned_in_the_middle_of_an_engines_dispose_is_closed(
    eventually: Eventually,
) -> None:
    """Between `dispose()` and `recreate()`, which together are one `Engine.dispose()`, it is not too late.

    It is of the old generation: it must not stay idle, to be handed out or to age out.
    """
    pool = new_pool()
    fairy = pool.connect()
    handle = driver_connection_of(fairy)
    pool.dispose()
    fairy.close()
    pool.recreate()
    inside.decide(pool, check, inside.ledger(pool))
    assert handle.closed
    assert_whole(pool, eventually)


@pytest.mark.usefixtures("collector")
def test_a_waiter_is_woken_by_what_the_collector_finds_inside_the_ledger(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """The letter serves a waiter, which is woken; its answer is not only written."""
    pool = new_pool(max_size=1)
    opened: list[ThreadWaiter] = []
    real = ThreadWaiter.wake

    def wake(waiter: ThreadWaiter) -> None:
        opened.append(waiter)
        real(waiter)

    monkeypatch.setattr(ThreadWaiter, "wake", wake)
    Ring(pool.connect())
    waiting = Thread(pool.connect)
    eventually(lambda: inside.shared(pool).numbers.waiting == 1, "somebody waits")
    call_inside(monkeypatch, "take", gc.collect)
    other = Thread(pool.connect)  # finds nothing, and collects
    eventually(lambda: len(opened) == 1, "the gate is open")
    waiting.join().close()
    other.join().close()
    assert_whole(pool, eventually)


@pytest.mark.parametrize("ask", ["connect", "dispose", "recreate", "set_max_size"])
@pytest.mark.usefixtures("collector")
def test_what_would_wait_for_its_own_thread_raises(
    ask: str, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A `checkin` listener that uses its own pool, run by the collector inside that pool, gets an error.

    It says what to do about it; and the check-in that the listener listens to is carried out.
    """
    pool = new_pool()
    errors: list[BaseException] = []
    asks = {
        "connect": pool.connect,
        "dispose": pool.dispose,
        "recreate": pool.recreate,
        "set_max_size": lambda: PoolManager.set_max_size(pool.pid, 2),
    }

    @event.listens_for(pool, "checkin")
    def ask_again(*_: Any) -> None:
        if not errors:
            try:
                asks[ask]()  # type: ignore[no-untyped-call]
            except CheckoutReentered as error:
                errors.append(error)

    Ring(pool.connect())
    call_inside(monkeypatch, "take", gc.collect)
    Thread(lambda: pool.connect().close()).join()
    assert "Don't check out or dispose there" in str(errors[0])
    gc.collect()
    assert_whole(pool, eventually)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the platform has no such signal")
def test_a_signal_handler_that_checks_out_inside_the_pool_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """It can't be served, for what it has interrupted is half done; a return is fine, and nothing is lost."""
    pool = new_pool()
    held = pool.connect()
    errors: list[BaseException] = []

    def handle(*_: Any) -> None:
        held.close()
        try:
            pool.connect()
        except CheckoutReentered as error:
            errors.append(error)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        call_inside(monkeypatch, "take", lambda: signal.raise_signal(signal.SIGUSR1))
        pool.connect().close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "a signal handler" in str(errors[0])
    assert_whole(pool, eventually)


def test_a_listener_may_use_its_own_pool_outside_the_lock(eventually: Eventually) -> None:
    """A check-in that is nobody's finalizer lets its listeners check out, as QueuePool does."""
    pool = new_pool()
    nested: list[Any] = []

    @event.listens_for(pool, "checkin")
    def ask_again(*_: Any) -> None:
        if not nested:
            nested.append(None)
            nested.append(pool.connect())

    pool.connect().close()
    nested[1].close()
    assert_whole(pool, eventually)


# -- two pools --------------------------------------------------------------------------------------


def inside_both(monkeypatch: pytest.MonkeyPatch, first: Any, second: Any) -> tuple[Thread, Thread]:
    """Two threads, each inside its own pool at the same time, then each drops what the other's pool owns."""
    barrier = threading.Barrier(2, timeout=20.0)
    real = Ledger.take
    todo = {inside.ledger(first[0]): first[1], inside.ledger(second[0]): second[1]}

    def take(self: Ledger, *args: Any) -> Any:
        drop = todo.pop(self, None)
        if drop is not None:
            barrier.wait()
            drop()
        return real(self, *args)

    monkeypatch.setattr(Ledger, "take", take)
    return Thread(lambda: first[0].connect().close()), Thread(lambda: second[0].connect().close())


def test_finalizers_of_two_pools_that_cross_do_not_deadlock(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Two threads, each inside one pool, each runs a check-in to the other's: both go on, both land."""
    a, b = new_pool(), new_pool()
    of_a, of_b = [a.connect()], [b.connect()]
    for thread in inside_both(monkeypatch, (a, of_b.clear), (b, of_a.clear)):
        thread.join()
    assert_whole(a, eventually)
    assert_whole(b, eventually)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry and a housekeeper of the test's own: a deadlock that it finds stops no other test."""
    inside.replace_managers_lock(monkeypatch, threading.RLock())
    inside.hide_pools(monkeypatch)
    inside.patch_housekeeper(monkeypatch, Housekeeper())


class Database:
    """What people write: an object that disposes of its engine when it dies."""

    def __init__(self, pool: QueriesPool) -> None:
        self.pool = pool

    def __del__(self) -> None:
        with contextlib.suppress(CheckoutReentered):
            self.pool.dispose()
            self.pool.recreate()


# -- interrupts and listeners -----------------------------------------------------------------------


@pytest.mark.parametrize("answered", [False, True])
def test_an_interrupt_while_waiting_loses_neither_a_slot_nor_the_queue(
    answered: bool, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Who is interrupted leaves the queue; what it was given meanwhile goes to the next one there."""
    pool = new_pool(max_size=1)
    fairy = pool.connect()
    stop = Stop()
    real = ThreadWaiter.wait
    calls = [True]

    def interrupted(waiter: ThreadWaiter, seconds: float) -> None:
        if calls:
            calls.pop()
            stop.here()
            raise Interrupt
        real(waiter, seconds)

    monkeypatch.setattr(ThreadWaiter, "wait", interrupted)
    order: list[int] = []

    def work(number: int) -> None:
        with contextlib.closing(pool.connect()):
            order.append(number)

    threads = []
    for number in range(3):
        threads.append(Thread(work, number))
        eventually(lambda: inside.shared(pool).numbers.waiting == len(threads), "all wait")
    stop.reached()
    if answered:
        fairy.close()
        assert inside.shared(pool).numbers.waiting == 2
        stop.go()
    else:
        stop.go()
        eventually(lambda: inside.shared(pool).numbers.waiting == 2, "it has left the queue")
        assert order == []
        fairy.close()
    threads[1].join()
    threads[2].join()
    assert order == [1, 2]
    with pytest.raises(Interrupt):
        threads[0].join()
    assert_whole(pool, eventually)


def test_a_signal_interrupts_a_waiting_checkout(eventually: Eventually) -> None:
    """What a signal handler raises leaves a checkout at once, and the slot goes to the next in the queue."""
    pool = new_pool(max_size=1, timeout=None)
    fairy = pool.connect()
    main = threading.get_ident()

    def handler(*_: object) -> None:
        raise Interrupt

    def send() -> Thread:
        eventually(lambda: inside.shared(pool).numbers.waiting == 1, "the main thread waits")
        behind = Thread(pool.connect)
        eventually(lambda: inside.shared(pool).numbers.waiting == 2, "another one behind it")
        signal.pthread_kill(main, signal.SIGUSR1)
        return behind

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        sender = Thread(send)
        with pytest.raises(Interrupt):
            pool.connect()
    finally:
        signal.signal(signal.SIGUSR1, old)
    behind = sender.join()
    assert inside.shared(pool).numbers.waiting == 1
    fairy.close()
    behind.join().close()
    assert_whole(pool, eventually)


EVENTS = [
    "connect",
    "first_connect",
    "checkout",
    "checkin",
    "reset",
    "close",
    "invalidate",
    "soft_invalidate",
    "detach",
    "close_detached",
]


@pytest.mark.parametrize("kind", [RuntimeError, Interrupt])
@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.usefixtures("collector")
def test_a_listener_that_raises_loses_no_slot(
    name: str, kind: type[BaseException], eventually: Eventually
) -> None:
    """Whatever event it listens to, whatever it raises, the first time or the third: the budget is whole."""
    if name == "reset" and kind is Interrupt and INTERRUPTS_ARE_KEPT:
        pytest.skip(INTERRUPTS_ARE_KEPT)
    for when in range(1, 4):
        pool = new_pool()
        calls = 0

        def listen(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == when:  # noqa: B023
                raise kind

        event.listen(pool, name, listen)
        for what in ("close", "invalidate", "soft", "detach", "close", "abandon", "close"):
            # The error ends with its `with` block, and with it what its traceback refers to.
            with contextlib.suppress(kind):
                use(pool, what)
        assert calls, "it was never called"
        event.remove(pool, name, listen)
        gc.collect()
        assert_whole(pool, eventually)


def use(pool: QueriesPool, what: str) -> None:
    """Check out, and end it in one of the ways that there are."""
    fairy = pool.connect()
    if what == "invalidate":
        fairy.invalidate()
    elif what == "soft":
        fairy.invalidate(soft=True)
        fairy.close()
    elif what == "detach":
        fairy.detach()
        fairy.close()
    elif what == "close":
        fairy.close()


@pytest.mark.parametrize("kind", [RuntimeError, Interrupt])
@pytest.mark.parametrize("name", ["creator", "connect", "first_connect", "checkout"])
@pytest.mark.usefixtures("collector")
def test_a_checkout_that_fails_gives_its_slot_back_at_once(
    name: str, kind: type[BaseException], eventually: Eventually
) -> None:
    """While somebody still looks at the error, whose traceback refers to all that took part."""
    handles: list[Handle] = []
    failing = [True]

    def creator() -> Handle:
        fail("creator")
        handles.append(Handle())
        return handles[-1]

    def fail(where: str) -> None:
        if failing and name == where:
            raise kind

    pool = new_pool(max_size=1, creator=creator)
    if name != "creator":
        event.listen(pool, name, lambda *_: fail(name))
    with pytest.raises(kind) as caught:
        pool.connect()
    failing.clear()
    assert inside.shared(pool).numbers.held == inside.shared(pool).numbers.opening == 0
    assert_whole(pool, eventually)
    assert len(handles) == 1 or handles[0].closed
    assert caught.value.__traceback__ is not None


def disposed(pool: QueriesPool) -> None:
    """By `dispose()`."""
    pool.dispose()


def lowered(pool: QueriesPool) -> None:
    """By a lower limit."""
    PoolManager.set_max_size(pool.pid, 1)


def expired(pool: QueriesPool) -> None:
    """By age."""
    PoolManager.set_idle_ttl(pool.pid, 0)


def invalidated(pool: QueriesPool) -> None:
    """By `invalidate()`."""
    fairy = pool.connect()
    handle = driver_connection_of(fairy)
    try:
        fairy.invalidate()
    finally:
        assert PoolManager.has_connection(pool.pid, handle) is not handle.closed
        pool.connect().close()


def evicted(pool: QueriesPool) -> None:
    """For another engine."""
    sibling = new_pool(pool.pid, max_size=3)
    for fairy in [sibling.connect() for _ in range(3)]:
        fairy.close()


@pytest.mark.parametrize("kind", [RuntimeError, Interrupt])
@pytest.mark.parametrize("culprit", ["listener", "driver"])
@pytest.mark.parametrize("how", [disposed, lowered, expired, evicted, invalidated])
def test_a_close_that_fails_loses_no_slot(
    how: Callable[[QueriesPool], None],
    culprit: str,
    kind: type[BaseException],
    eventually: Eventually,
) -> None:
    """The listener or the driver raises: the connection counts as closed, and those behind it are closed."""
    if how is invalidated and culprit == "driver" and kind is Interrupt and INTERRUPTS_ARE_KEPT:
        pytest.skip(INTERRUPTS_ARE_KEPT)
    failing = [True]
    handles: list[Handle] = []

    class Failing(Handle):
        def close(self) -> None:
            super().close()
            fail("driver")

    def fail(who: str) -> None:
        if who == culprit and failing:
            failing.pop()
            raise kind

    def creator() -> Handle:
        handles.append(Failing())
        return handles[-1]

    pool = new_pool(max_size=3, creator=creator)
    event.listen(pool, "close", lambda *_: fail("listener"))
    for fairy in [pool.connect() for _ in range(3)]:
        fairy.close()
    with contextlib.suppress(kind):
        how(pool)
    assert not failing, "nothing was closed"
    left = len(inside.attachment(pool).idle)
    eventually(lambda: sum(not handle.closed for handle in handles) == left, "the sockets are closed")
    eventually(lambda: not inside.shared(pool).numbers.closing, "the slots are free")
    for handle in handles:
        assert PoolManager.has_connection(pool.pid, handle) is not handle.closed
    PoolManager.set_max_size(pool.pid, 3)
    assert_whole(pool, eventually)


@pytest.mark.parametrize("kind", [RuntimeError, Interrupt])
def test_a_waiter_is_served_although_the_listener_of_who_had_it_raises(
    kind: type[BaseException], eventually: Eventually
) -> None:
    """A `checkin` listener that raises keeps SQLAlchemy from returning the connection: its slot passes on."""
    pool = new_pool(max_size=1)
    fairy = pool.connect()
    waiting = Thread(pool.connect)
    eventually(lambda: inside.shared(pool).numbers.waiting == 1, "somebody waits")

    @event.listens_for(pool, "checkin")
    def fail(*_: Any) -> None:
        raise kind

    with contextlib.suppress(kind):
        fairy.close()
    del fairy
    event.remove(pool, "checkin", fail)
    waiting.join().close()
    assert_whole(pool, eventually)
