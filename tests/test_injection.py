"""Exceptions at every step of checkout and check-in: nothing is lost.

Python raises an asynchronous exception (Ctrl-C, a signal handler's, ``PyThreadState_SetAsyncExc``) where a
function is entered, after a call, and where a loop turns back; nowhere else. The sweep sets a real one before
each of these points in the package, one after the other, with a scene that is the same each time.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import dis
import gc
import logging
import operator
import os
import random
import signal
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ClassVar

import inside
import pytest
from conftest import Observer
from fakes import FakeDialect, FakeDriver
from hazards import DEADLINE, Probe, Ring, Stop, Thread, assert_whole, eventually, new_pid, sleeping_collector
from sqlalchemy import create_engine, event, make_url, text

import sqla_queries_pool
from sqla_queries_pool import CheckoutTimeout, ConnectionNotFoundError, PoolManager, QueriesPool
from sqla_queries_pool.budget import audit
from sqla_queries_pool.concurrency.housekeeping import Housekeeper
from sqla_queries_pool.runtime import checkout, upkeep
from sqla_queries_pool.runtime import jitter as retirement

pytestmark = pytest.mark.slow
Eventually = Callable[..., None]
Act = Callable[[], object]
PACKAGE = str(Path(sqla_queries_pool.__file__).parent) + os.sep


# -- what is injected -------------------------------------------------------------------------------


class Failure(Exception):
    """What an `except Exception` catches."""


class Timeout(BaseException):
    """What gevent and eventlet raise, and no `except Exception` catches."""


KINDS: list[type[BaseException]] = [Failure, KeyboardInterrupt, Timeout]
SEED = int(os.environ.get("INJECTION_SEED", "20"))
_set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_async_exc.argtypes = [ctypes.c_ulong, ctypes.py_object]
injected: Counter[str] = Counter()


FEWEST = 3_000
"""Injections of all sweeps that together leave out no point."""
swept: set[tuple[str, str]] = set()
"""Which scenes were interrupted by what, at their part of all points."""


@pytest.fixture(autouse=True, scope="module")
def _count() -> Iterator[None]:
    """Enough was injected, if all sweeps that together leave out no point ran in this process."""
    yield
    print(f"\ninjected: {sum(injected.values())} {dict(injected)}, seed {SEED}")
    if len(swept) == len(SCENES) * len(KINDS):
        assert sum(injected.values()) > FEWEST


def look_for_signals() -> None:
    """Python looks for them where a loop turns back: what is under way comes in here."""
    for _ in range(2):
        pass


class Injector:
    """Interrupts the main thread at the n-th point in the package, as Ctrl-C does; 0 for never.

    The points are those where Python looks for signals: functions entered, calls, and loops.
    """

    _of_code: ClassVar[dict[CodeType, frozenset[int]]] = {}
    # A builtin's result, read as an attribute: after a call, Python would look for signals right here.
    _arm = staticmethod(partial(_thread.interrupt_main, signal.SIGUSR1))
    armed = property(operator.methodcaller("_arm"))

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen = 0
        self.where = ""
        self.visited: set[str] = set()

    def run(self, act: Act) -> None:
        sys.settrace(self._called)
        try:
            act()
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, what: str, _: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        self.visited.add(code.co_name)
        if code not in self._of_code:
            points = [
                i.offset
                for i in dis.get_instructions(code)
                if i.opname.startswith(("CALL", "JUMP_B", "JUMP_A"))
            ]
            self._of_code[code] = frozenset(points)
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._traced(frame, "entered", None)

    def _traced(self, frame: FrameType, what: str, _: object) -> Any:
        if what == "entered" or (what == "opcode" and frame.f_lasti in self._of_code[frame.f_code]):
            self.seen += 1
            if self.seen == self.n:
                sys.settrace(None)
                code = frame.f_code
                self.where = f"{code.co_filename[len(PACKAGE) :]}:{frame.f_lineno} {code.co_name} {what}"
                self.armed  # noqa: B018
                return None
        return self._traced


# -- the scenes -------------------------------------------------------------------------------------


class Handle:
    """A connection without a server that has a socket; the last reference to it closes it, as in drivers."""

    live: ClassVar[weakref.WeakSet[Handle]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.closed = False
        self.live.add(self)

    def rollback(self) -> None: ...

    def ping(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        self.live.discard(self)


class Mute(Handle):
    """It does not answer."""

    def ping(self) -> None:
        raise FakeDriver.OperationalError


class Wired(Handle):
    """It has a socket."""

    def __init__(self) -> None:
        super().__init__()
        self._ours, self.theirs = socket.socketpair()
        self.fileno = self._ours.fileno

    def close(self) -> None:
        super().close()
        self._ours.close()

    def __del__(self) -> None:
        self._ours.close()
        self.theirs.close()


class ServersEnd:
    """The server's end of a connection that it has not let go of."""

    def __init__(self, connection: Wired) -> None:
        self._socket = connection.theirs.dup()

    def __del__(self) -> None:
        self._socket.close()


class Session:
    """Who locks connections through the queries API."""


class Stage:
    """One pool of two engines, and what a scene needs."""

    def __init__(self) -> None:
        self.pid = new_pid()
        self.pools: list[QueriesPool] = []
        self.threads: list[Thread] = []
        self.handles: list[Any] = []
        self.kept: list[Any] = []
        self.ended = False

    def pool(self, creator: Callable[[], Any] = Handle, **kw: Any) -> QueriesPool:
        settings: dict[str, Any] = {"max_size": 2, "timeout": DEADLINE, "gc_on_wait": False} | kw
        constants = {name: settings.pop(name) for name in inside.CONSTANTS if name in settings}
        made = inside.pool_class(**constants)(
            creator,
            pool_id=self.pid,
            dialect=FakeDialect(dbapi=FakeDriver()),  # type: ignore[arg-type]
            **settings,
        )
        self.pools.append(made)
        return made

    def idle(self, n: int = 1, creator: Callable[[], Any] = Handle, **kw: Any) -> QueriesPool:
        """A pool with n idle connections."""
        pool = self.pool(creator, **kw)
        for fairy in [pool.connect() for _ in range(n)]:
            fairy.close()
        return pool

    def lingering(self) -> Wired:
        """A creator: the server lets go of its connections when what the stage has kept goes."""
        made = Wired()
        if not self.ended:
            self.kept.append(ServersEnd(made))
        return made

    def when_waiting(self, do: Act) -> None:
        """Another thread does something as soon as somebody waits, or when it is over."""
        shared = inside.shared(self.pools[0])

        def work() -> None:
            eventually(lambda: inside.ledger(shared).queues or self.ended, "somebody waits")
            do()

        self.threads.append(Thread(work))

    def waiting(self, pool: QueriesPool) -> None:
        """Another thread waits for a connection, and uses it."""
        self.threads.append(Thread(lambda: pool.connect().close()))
        eventually(lambda: inside.attachment(pool).queue, "it waits")


def use(pool: QueriesPool) -> None:
    """Check out and in."""
    pool.connect().close()


def fast(stage: Stage) -> Act:
    """An idle connection is used."""
    return partial(use, stage.idle())


def opened(stage: Stage) -> Act:
    """A connection is opened."""
    return partial(use, stage.pool())


def listened(stage: Stage) -> Act:
    """A connection is opened and used, and listeners listen."""
    pool = stage.pool()
    for name in ("connect", "checkout", "checkin", "reset", "close"):
        event.listen(pool, name, lambda *_: None)
    return partial(use, pool)


def waits(stage: Stage) -> Act:
    """A thread waits, and another gives it its connection."""
    pool = stage.pool(max_size=1)
    stage.when_waiting(pool.connect().close)
    return partial(use, pool)


def waits_for_room(stage: Stage) -> Act:
    """A thread waits, and another engine gives it its slot."""
    a, b = stage.pool(max_size=1), stage.pool(max_size=1)
    stage.when_waiting(a.connect().close)
    return partial(use, b)


def hands_over(stage: Stage) -> Act:
    """A connection is given to a thread that waits."""
    pool = stage.pool(max_size=1)
    stage.kept.append(pool.connect())
    stage.waiting(pool)
    return lambda: stage.kept.pop().close()


def makes_room(stage: Stage) -> Act:
    """A slot is given to another engine's thread that waits."""
    a, b = stage.pool(max_size=1), stage.pool(max_size=1)
    stage.kept.append(a.connect())
    stage.waiting(b)
    return lambda: stage.kept.pop().close()


def times_out(stage: Stage) -> Act:
    """A thread waits in vain."""
    pool = stage.pool(max_size=1, timeout=0.002)
    stage.kept.append(pool.connect())

    def act() -> None:
        with contextlib.suppress(CheckoutTimeout):
            use(pool)

    return act


def collects(stage: Stage) -> Act:
    """A thread waits, and the collector finds a connection for it."""
    pool = stage.pool(max_size=1, gc_on_wait=True, timeout=0.01)
    Ring(pool.connect())
    inside.next_collection(None, 0.0)

    def act() -> None:
        with contextlib.suppress(CheckoutTimeout):
            use(pool)

    return act


def reopened(stage: Stage) -> Act:
    """An invalidated connection is reopened."""
    pool = stage.pool()
    pool.connect().invalidate()
    return partial(use, pool)


def evicts(stage: Stage) -> Act:
    """Another engine's idle connection is closed and makes room."""
    stage.idle(2)
    return partial(use, stage.pool())


def lingers(stage: Stage) -> Act:
    """The same, and the server does not let go of the one that was closed: it is waited for."""
    stage.idle(2, stage.lingering, close_timeout=0.002)
    return partial(use, stage.pool(stage.lingering, close_timeout=0.002))


def lets_go(stage: Stage) -> Act:
    """An opening waits for the server to let go of the connection that was closed, and it does."""
    pool = stage.idle(1, stage.lingering, max_size=1, close_timeout=0.2)
    lingering = inside.lingering(pool)

    def let_go() -> None:
        eventually(lambda: lingering or stage.ended, "one is waited for")
        stage.kept.clear()

    def act() -> None:
        pool.connect().invalidate()
        use(pool)

    stage.threads.append(Thread(let_go))
    return act


def recycled(stage: Stage) -> Act:
    """A connection is too old and is reopened."""
    pool = stage.idle(recycle=100)
    inside.attachment(pool).idle[0].starttime = 0
    return partial(use, pool)


def dead(stage: Stage) -> Act:
    """The server has hung up on an idle connection."""
    pool = stage.idle(2, Wired)
    for entry in inside.attachment(pool).idle:
        entry.dbapi_connection.theirs.close()
    return partial(use, pool)


def unasked(stage: Stage) -> Act:
    """The server has said something unasked: a ping tells."""
    pool = stage.idle(1, Wired)
    inside.attachment(pool).idle[0].dbapi_connection.theirs.send(b"S\0\0\0\4")
    return partial(use, pool)


def pinged(stage: Stage) -> Act:
    """A connection was idle for long, and answers a ping."""
    return partial(use, stage.idle(ping_after=0))


def mute(stage: Stage) -> Act:
    """A connection was idle for long, and does not answer."""
    return partial(use, stage.idle(creator=Mute, ping_after=0))


def pre_pinged(stage: Stage) -> Act:
    """SQLAlchemy's own ping."""
    pool = stage.idle(pre_ping=True)
    return partial(use, pool)


def refused(stage: Stage) -> Act:
    """The server refuses a connection, then opens one."""
    answers: list[BaseException] = []

    def creator() -> Handle:
        if answers and not stage.ended:
            raise answers.pop()
        return Handle()

    pool = stage.pool(creator)
    stage.kept.append(pool.connect())
    answers.append(ConnectionRefusedError("Connection refused"))
    return partial(use, pool)


def fails(stage: Stage) -> Act:
    """Opening a connection fails."""

    def creator() -> Handle:
        if stage.ended:
            return Handle()
        raise ValueError("no such database")

    pool = stage.pool(creator)

    def act() -> None:
        with contextlib.suppress(ValueError):
            use(pool)

    return act


def invalidated(stage: Stage) -> Act:
    """A connection is invalidated and used again."""
    pool = stage.pool()

    def act() -> None:
        pool.connect().invalidate()
        fairy = pool.connect()
        fairy.invalidate(soft=True)
        fairy.close()
        use(pool)

    return act


def detached(stage: Stage) -> Act:
    """A connection is detached, and closed."""
    pool = stage.idle()

    def act() -> None:
        fairy = pool.connect()
        fairy.detach()
        fairy.close()

    return act


def abandoned(stage: Stage) -> Act:
    """The last reference to a connection goes."""
    pool = stage.idle()

    def act() -> None:
        pool.connect()

    return act


def collected(stage: Stage) -> Act:
    """The collector finds a connection."""
    pool = stage.idle()

    def act() -> None:
        Ring(pool.connect())
        gc.collect()

    return act


def lost(stage: Stage) -> Act:
    """A record is lost, with the connection."""
    pool = stage.idle()

    def act() -> None:
        inside.do_get(pool)

    return act


def disposed(stage: Stage) -> Act:
    """An engine is disposed of, with a connection out and two idle."""
    pool = stage.idle(3, max_size=3)

    def act() -> None:
        fairy = pool.connect()
        pool.dispose()
        stage.pools.append(pool.recreate())
        fairy.close()

    return act


def lowered(stage: Stage) -> Act:
    """The limit is lowered and raised."""
    pool = stage.idle(2)

    def act() -> None:
        fairy = pool.connect()
        PoolManager.set_max_size(stage.pid, 1)
        fairy.close()
        PoolManager.set_max_size(stage.pid, 2)
        use(pool)

    return act


def expired(stage: Stage) -> Act:
    """Connections are too old."""
    pool = stage.idle(2)

    def act() -> None:
        PoolManager.set_idle_ttl(stage.pid, 0)
        PoolManager.set_idle_ttl(stage.pid, 60)
        use(pool)

    return act


def attached(stage: Stage) -> Act:
    """An engine comes, uses the pool, and goes."""
    stage.idle(2)

    def act() -> None:
        pool = QueriesPool(Handle, pool_id=stage.pid, max_size=2)
        use(pool)
        del pool

    return act


def by_hand(stage: Stage) -> Act:
    """A connection that was added by hand is locked, freed, lost by its session and removed."""
    stage.idle()

    def act() -> None:
        handle = Handle()
        PoolManager.add(stage.pid, handle)
        session = Session()
        assert PoolManager.get(stage.pid, session) is handle
        PoolManager.free(stage.pid, handle)
        with contextlib.suppress(ConnectionNotFoundError):  # a reset that fails closes it
            PoolManager.lock(stage.pid, handle, session)
            del session
            PoolManager.clean(stage.pid)
            PoolManager.remove_connection(stage.pid, handle)

    return act


def shut_down(stage: Stage) -> Act:
    """All is closed, also what is out."""
    pool = stage.idle(2)

    def act() -> None:
        fairy = pool.connect()
        inside.pools()[stage.pid].shutdown()
        fairy.close()
        use(pool)

    return act


SCENES = [
    fast,
    opened,
    listened,
    waits,
    waits_for_room,
    hands_over,
    makes_room,
    times_out,
    collects,
    reopened,
    evicts,
    lingers,
    lets_go,
    recycled,
    dead,
    unasked,
    pinged,
    mute,
    pre_pinged,
    refused,
    fails,
    invalidated,
    detached,
    abandoned,
    collected,
    lost,
    disposed,
    lowered,
    expired,
    attached,
    by_hand,
    shut_down,
]


# -- what must hold ---------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No log or report keeps an exception, its traceback and all that took part; a housekeeper of its own."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    # What a scene would only wait for.
    monkeypatch.setattr(retirement, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(checkout, "GC_AFTER", 0.02)
    monkeypatch.setattr(upkeep, "COLLECTED", 0.05)
    monkeypatch.setattr(audit, "COLLECTED", 0.05)
    inside.patch_housekeeper(monkeypatch, Housekeeper())
    logging.disable(logging.CRITICAL)
    try:
        with sleeping_collector():
            yield
    finally:
        logging.disable(logging.NOTSET)


def assert_nothing_lost(pools: list[QueriesPool], eventually: Eventually, live: Callable[[], int]) -> None:
    """Ledger, lock, threads and sockets are as if nothing had happened, and the budget can be had again."""
    shared = inside.shared(pools[0])
    assert not inside.lock(shared)._is_owned(), "the lock is taken"
    assert not inside.is_inside(shared), "inside for ever"
    probe, worked = Probe(), threading.Event()
    inside.housekeeper().schedule(probe, 0.0)
    inside.worker(shared).submit(worked.set)
    assert probe.swept.wait(10.0), "the housekeeper has stopped"
    assert worked.wait(10.0), "the worker has stopped"
    for pool in pools:
        assert_whole(pool, eventually)
    assert live() == shared.numbers.open == len(inside.by_handle(shared)), f"sockets: {live()}, {shared!r}"


def play(scene: Callable[[Stage], Act], injector: Injector, kind: type[BaseException]) -> Stage:
    """Play one scene, with an injection, up to the point where everything was dropped."""
    Handle.live = weakref.WeakSet()
    stage = Stage()
    act = scene(stage)
    sweeper = inside.housekeeper()
    eventually(lambda: not inside.thread_runs(sweeper) or not inside.mail(sweeper), "it has read its mail")
    try:
        injector.run(act)
        look_for_signals()  # it may be under way
    except (kind, ConnectionRefusedError):  # the interrupt may have come in a finalizer, which swallows it
        pass
    stage.ended = True
    stage.kept.clear()
    del act
    shared = inside.shared(stage.pools[0])
    inside.unset(shared)  # whoever comes next reads the letters, too
    gc.collect()
    for thread in stage.threads:
        thread.join(10.0)
    # What whoever waits does: what looks wrong is mended at the second look.
    eventually(lambda: not inside.upkeep(shared).mend(), "nothing looks wrong for the first time")
    inside.ledger(shared).let_in(inside.now(shared))  # a pause after a refusal is soon over
    return stage


def sweep(
    scene: Callable[[Stage], Act], kind: type[BaseException], stride: int, skipped: int
) -> tuple[int, dict[str, str]]:
    """Interrupt a scene at points in turn; how many there were, and what was lost where.

    :param stride: of each so many points, one is taken.
    :param skipped: how many are passed over before the first one.
    """

    def handler(*_: object) -> None:
        raise kind

    soon = partial(eventually, seconds=5.0)
    lost: dict[str, str] = {}
    old = signal.signal(signal.SIGUSR1, handler)
    n = 1 + skipped - stride
    points = 0
    try:
        while len(lost) < 12:
            n += stride
            inside.set_housekeeper(Housekeeper())
            injector = Injector(n)
            stage: Any = None
            try:
                stage = play(scene, injector, kind)
                if not injector.where:
                    break
                points += 1
                assert_nothing_lost(stage.pools, soon, lambda: len(Handle.live))
            except Exception as error:
                lost[f"{n}: {injector.where}"] = f"{type(error).__name__}: {str(error)[:150]}"
            finally:
                if stage is not None:
                    with contextlib.suppress(Exception):
                        inside.shared(stage.pools[0]).shutdown()
                    inside.pools().pop(stage.pid, None)
    finally:
        signal.signal(signal.SIGUSR1, old)
    injected[kind.__name__] += points
    return points, lost


# -- (a) every point, in turn -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["some", "all"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.usefixtures("quiet")
def test_an_interrupt_at_any_point_loses_nothing(
    scene: Callable[[Stage], Act], kind: type[BaseException], every: bool
) -> None:
    """Wherever in the package it comes: no slot, socket, lock or thread is lost, and nobody waits in vain.

    All points are interrupted, each by one kind, and INJECTION_SEED says by which; or some, by all kinds.
    """
    if every:
        stride, skipped = len(KINDS), (KINDS.index(kind) + SEED) % len(KINDS)
    else:
        stride, skipped = 16, random.randrange(16)
    points, losses = sweep(scene, kind, stride, skipped)
    assert points * stride > 5, "hardly anything was interrupted"
    if every:
        swept.add((scene.__name__, kind.__name__))
    assert not losses, f"{len(losses)} of {points}:\n" + "\n".join(f"{k} -> {v}" for k, v in losses.items())


# -- (b) at any moment, in any thread ---------------------------------------------------------------


class Worker:
    """A thread that checks out and in, whatever is raised in it."""

    def __init__(self, pools: list[QueriesPool], seed: int, stop: threading.Event) -> None:
        self.done = 0
        self.hits = 0
        self._pools, self._random, self._stop = pools, random.Random(seed), stop
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                while not self._stop.is_set():
                    self._step()
                    self.done += 1
            except (*KINDS, CheckoutTimeout):  # type: ignore[misc]
                self.hits += 1

    def _step(self) -> None:
        fairy = self._random.choice(self._pools).connect()
        chance = self._random.random()
        if chance < 0.05:
            fairy.invalidate()
        elif chance < 0.1:
            fairy.detach()
            fairy.close()
        elif chance < 0.15:
            Ring(fairy)
        elif chance > 0.2:
            fairy.close()


@pytest.mark.parametrize("rounds", [300, pytest.param(3000, marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("quiet")
def test_exceptions_set_in_other_threads_at_random_lose_nothing(rounds: int, eventually: Eventually) -> None:
    """Four threads on three connections of two engines, exceptions at random moments, also in SQLAlchemy."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    Handle.live = weakref.WeakSet()
    stage = Stage()
    pools = [stage.pool(max_size=3, gc_on_wait=True, timeout=2.0) for _ in range(2)]
    stop = threading.Event()
    workers = [Worker(pools, chance.random(), stop) for _ in range(4)]  # type: ignore[arg-type]
    sent = 0
    for _ in range(rounds):
        worker = chance.choice(workers)
        if not worker.thread.is_alive():
            workers[workers.index(worker)] = Worker(pools, chance.random(), stop)  # type: ignore[arg-type]
            continue
        _set_async_exc(worker.thread.ident, ctypes.py_object(chance.choice(KINDS)))
        sent += 1
        time.sleep(chance.random() * 0.003)  # the threads work; when the next one comes is left to chance
        if chance.random() < 0.05:
            gc.collect()
    stop.set()
    for worker in workers:
        worker.thread.join(DEADLINE)
        assert not worker.thread.is_alive(), "a thread hangs"
    assert sum(worker.done for worker in workers) > rounds / 10
    injected["SetAsyncExc"] += sent
    workers.clear()
    del worker
    gc.collect()
    assert_nothing_lost(pools, eventually, lambda: len(Handle.live))


# -- (c) every step: ok, error, slow, never ---------------------------------------------------------

STEPS = ["creator", "connect", "checkout", "checkin", "reset", "close", "invalidate", "detach", "ping"]


@pytest.mark.parametrize("outcome", ["ok", "error", "slow", "slow error"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("quiet")
def test_a_step_that_fails_or_takes_long_stops_nobody_else(
    step: str, outcome: str, kind: type[BaseException], eventually: Eventually
) -> None:
    """While one thread is stuck in a step, another engine's thread works on; then nothing is lost."""
    stop, mine, todo = Stop(), threading.Event(), [True]
    owner: list[int] = []

    def here(*_: Any) -> None:
        if not todo or threading.get_ident() not in owner:
            return
        todo.clear()
        mine.set()
        if "slow" in outcome:
            stop.here()
        if "error" in outcome:
            raise kind

    class Handle_(Handle):
        def ping(self) -> None:
            if step == "ping":
                here()

    def creator() -> Handle:
        if step == "creator":
            here()
        return Handle_()

    Handle.live = weakref.WeakSet()
    stage = Stage()
    a, b = stage.pool(creator, ping_after=0), stage.pool(ping_after=0)
    if step not in ("creator", "ping"):
        event.listen(a, step, here)

    def work() -> None:
        owner.append(threading.get_ident())
        with contextlib.suppress(kind):
            use(a)
            fairy = a.connect()
            fairy.invalidate()
            fairy = a.connect()
            fairy.detach()
            fairy.close()

    thread = Thread(work)
    assert mine.wait(DEADLINE), "the step was never reached"
    for _ in range(3):
        Thread(use, b).join()
    stop.go()
    thread.join()
    injected["steps"] += 1
    del thread
    gc.collect()
    assert_nothing_lost([a, b], eventually, lambda: len(Handle.live))


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("quiet")
def test_a_step_that_never_ends_costs_its_own_slot_and_nothing_else(
    step: str, kind: type[BaseException] | None, eventually: Eventually
) -> None:
    """Both engines work on with what is left; who wants the slot times out; let go at last, all is there.

    :param kind: what ends the step in the end; None where it ends as if nothing had been.
    """
    stop, todo, owner = Stop(), [True], list[int]()

    def here(*_: Any) -> None:
        if todo and threading.get_ident() in owner:
            todo.clear()
            stop.here()
            if kind is not None:
                raise kind

    class Pinged(Handle):
        def ping(self) -> None:
            if step == "ping":
                here()

    def creator() -> Handle:
        if step == "creator":
            here()
        return Pinged()

    Handle.live = weakref.WeakSet()
    stage = Stage()
    # SQLAlchemy has let go of a connection that is detached before it says so.
    taken, size = (0, 2) if step == "detach" else (1, 2)
    a, b = (stage.pool(creator, ping_after=0, max_size=size) for _ in range(2))
    if step == "connect":
        use(a)  # SQLAlchemy lets nobody else of the engine connect while its very first connection is made
    if step not in ("creator", "ping"):
        event.listen(a, step, here)

    def work() -> None:
        owner.append(threading.get_ident())
        with contextlib.suppress(*KINDS):
            use(a)
            a.connect().invalidate()
            fairy = a.connect()
            fairy.detach()
            fairy.close()

    stuck = Thread(work)
    stop.reached()
    for pool in (a, b):
        inside.set_timeout(pool, 0.02)
    for _ in range(3):
        for pool in (a, b):
            Thread(use, pool).join()
    out = [b.connect() for _ in range(size - taken)]
    for pool in (a, b):
        with pytest.raises(CheckoutTimeout):
            Thread(pool.connect).join()
    assert stuck.alive
    assert inside.shared(a).numbers.total == size
    while out:
        out.pop().close()
    Thread(use, a).join()
    stop.go()
    stuck.join()
    injected["never"] += 1
    del stuck
    for pool in (a, b):
        inside.set_timeout(pool, DEADLINE)
    gc.collect()
    assert_nothing_lost([a, b], eventually, lambda: len(Handle.live))


def stuck_in_its_first_close(stop: Stop, kind: type[BaseException] | None) -> type[Handle]:
    """A creator: whoever closes one of its connections first stops there, and in the end that is raised."""
    todo = [True]

    class Stuck(Handle):
        def close(self) -> None:
            super().close()
            if todo:
                todo.clear()
                stop.here()
                if kind is not None:
                    raise kind

    return Stuck


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.usefixtures("quiet")
def test_closing_what_gave_way_that_never_ends_costs_one_slot(
    kind: type[BaseException] | None, eventually: Eventually
) -> None:
    """The one that makes room is closed by who opens: he alone waits for it, and has the slot of both."""
    stop = Stop()
    creator = stuck_in_its_first_close(stop, kind)
    Handle.live = weakref.WeakSet()
    stage = Stage()
    a = stage.idle(2, creator, timeout=0.02)
    b = stage.pool(timeout=0.02)

    def work() -> None:
        with contextlib.suppress(*KINDS):
            use(b)

    stuck = Thread(work)
    stop.reached()
    for pool in (a, b, a, b):
        Thread(use, pool).join()
    held = a.connect()
    for pool in (a, b):
        with pytest.raises(CheckoutTimeout):
            Thread(pool.connect).join()
    held.close()
    assert stuck.alive
    stop.go()
    stuck.join()
    injected["never"] += 1
    del stuck, held
    gc.collect()
    assert_nothing_lost([a, b], eventually, lambda: len(Handle.live))


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.usefixtures("quiet")
def test_a_close_in_the_background_that_never_ends_stops_no_checkout(
    kind: type[BaseException] | None, eventually: Eventually
) -> None:
    """The worker is stuck in it: its slot stays taken, what is left is used, and closed by who has it."""
    stop = Stop()
    creator = stuck_in_its_first_close(stop, kind)
    Handle.live = weakref.WeakSet()
    stage = Stage()
    a, b = (stage.pool(creator, timeout=0.02) for _ in range(2))
    use(a)
    shared = inside.shared(a)
    PoolManager.set_idle_ttl(stage.pid, 60)
    inside.do_soon(
        shared, inside.decide(shared, inside.ledger(shared).close_idle, inside.attachment(a), "test")
    )
    stop.reached()
    for pool in (a, b, a, b):
        Thread(use, pool).join()
    Thread(lambda: a.connect().invalidate()).join()
    held = b.connect()
    with pytest.raises(CheckoutTimeout):
        Thread(a.connect).join()
    held.close()
    assert shared.numbers.closing == 1
    stop.go()
    injected["never"] += 1
    del held
    gc.collect()
    assert_nothing_lost([a, b], eventually, lambda: len(Handle.live))


# -- (d) PostgreSQL ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some", "all"])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("quiet")
def test_on_postgresql_the_server_agrees(
    stride: int, driver: str, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """After interrupts at every point of a checkout with a query, the server has what the pool says."""
    url = make_url(pg_url)
    engine = create_engine(url.set(drivername=f"postgresql+{driver}"), poolclass=QueriesPool, max_size=3)
    pool: Any = engine.pool

    def handler(*_: object) -> None:
        raise Timeout

    def act() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        with engine.connect() as connection:
            connection.invalidate()

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        for n in range(random.randrange(1, stride + 1), 1000, stride):
            injector = Injector(n)
            with contextlib.suppress(Timeout):
                injector.run(act)
                look_for_signals()
            gc.collect()
            if not injector.where:
                break
            injected[driver] += 1
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert injected[driver] * stride > 50
    assert_whole(pool, eventually)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 2")) == 2
    opened = inside.shared(pool).numbers.open
    eventually(lambda: pg_observer.backends(str(url.database)) == opened, "the server agrees")
    engine.dispose()
    eventually(lambda: pg_observer.backends(str(url.database)) == 0, "all closed")
