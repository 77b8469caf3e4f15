"""What the tests of hazards share: a driver without a server, threads with a deadline, a state of rest."""

from __future__ import annotations

import gc
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import inside
from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from sqla_queries_pool import CheckoutTimeout, QueriesPool
from sqla_queries_pool.budget.audit import check
from sqla_queries_pool.pool import Pool

DEADLINE = 20.0
"""Seconds after which a thread that should have ended counts as hanging."""
LATE = 0.05
"""Seconds by which a thread of a busy machine may wake late."""
_numbers = itertools.count(1)


class Handle:
    """An open connection of a driver that has no server.  It knows who has it."""

    def __init__(self) -> None:
        self.owner: object = None
        self.closed = False

    def rollback(self) -> None:
        """The reset at check-in: nobody has it any more."""
        self.owner = None

    def close(self) -> None:
        self.closed = True


class Ring:
    """A reference cycle with something in it: the garbage collector alone ends it."""

    def __init__(self, content: object) -> None:
        self.content = content
        self.ring = self


class Probe:
    """Is told when the housekeeper comes by."""

    def __init__(self) -> None:
        self.swept = threading.Event()

    def sweep(self) -> None:
        self.swept.set()

    def neglected(self) -> None: ...


class Thread:
    """A thread whose exception and result are not lost."""

    def __init__(self, function: Callable[..., Any], *args: Any, name: str | None = None) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._function: Any = function
        self._args: Any = args
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._function(*self._args)
        except BaseException as error:
            self.error = error
        finally:
            self._function = self._args = None  # they may be what a test wants to see collected

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float = DEADLINE) -> Any:
        """Return the function's result or raise its exception; fail if it hangs."""
        self._thread.join(seconds)
        assert not self.alive, f"{self._thread.name} hangs"
        if self.error is not None:
            raise self.error
        return self.result


class Stop:
    """Stops one thread at one place until it is told to go on."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._go = threading.Event()

    def here(self) -> None:
        """Called by the thread: stop."""
        self._reached.set()
        assert self._go.wait(DEADLINE), "nobody let it go"

    def reached(self) -> None:
        """Wait until the thread is there."""
        assert self._reached.wait(DEADLINE), "nobody came by"

    def go(self) -> None:
        self._go.set()


def eventually(
    condition: Callable[[], object], what: str = "the condition", seconds: float = DEADLINE
) -> None:
    """Look until a condition holds, and fail when it does not in time: ``eventually(lambda: …, "what")``.

    At first it looks often: most of what tests wait for takes less than a millisecond.  Time for which the
    machine stands still, or does not get to this thread, does not count: the others stood still, too.
    """
    left = seconds
    pause = 0.0001
    while not condition():
        assert left > 0, f"{what}: not within {seconds} s"
        begin = time.monotonic()
        time.sleep(pause)
        left -= min(time.monotonic() - begin, pause + LATE)
        pause = min(2 * pause, 0.01)


@contextmanager
def no_thread_starts() -> Iterator[None]:
    """The system has no memory for the stack of another thread."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """The process has as many descriptors as it may."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def new_pid() -> str:
    """A pool id that no other test has."""
    return f"hazard-{next(_numbers)}"


def new_pool(pid: str | None = None, creator: Callable[[], Any] = Handle, **kw: Any) -> QueriesPool:
    """A pool without a server; what waits is left to the test, so the collector is not asked."""
    settings: dict[str, Any] = {"max_size": 2, "timeout": DEADLINE, "gc_on_wait": False} | kw
    constants = {name: settings.pop(name) for name in inside.CONSTANTS if name in settings}
    return inside.pool_class(**constants)(creator, pool_id=pid or new_pid(), **settings)


def pool_of(engine: Engine) -> QueriesPool:
    """An engine's pool."""
    assert isinstance(engine.pool, QueriesPool)
    return engine.pool


def driver_connection_of(fairy: PoolProxiedConnection) -> Any:
    """The driver's connection, which is of any type.  There is one: nobody invalidated it."""
    handle = fairy.dbapi_connection
    assert handle is not None
    return handle


def report(pool: QueriesPool) -> dict[str, Any]:
    """What is reported about a pool, without the many that other tests have left."""
    return inside.shared(pool).report()


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def descriptors_of(*inodes: int) -> int:
    """How many descriptors lead to these files or sockets, whatever other threads open and close."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself, or another thread's
            count += os.fstat(int(fd)).st_ino in inodes
    return count


def settled(shared: Pool) -> bool:
    """Nobody has a connection, opens or closes one, or waits for one; no letter is unread, no pause is on."""
    n = shared.numbers
    pause = inside.ledger(shared).backoff.pausing(inside.now(shared))
    return not (n.held or n.opening or n.closing or n.waiting or inside.inbox(shared) or pause)


def assert_whole(pool: QueriesPool, eventually: Callable[..., None], size: int | None = None) -> None:
    """Everything was given back, and the whole budget can be had again."""
    shared = inside.shared(pool)
    eventually(lambda: settled(shared), f"everything given back: {shared!r}")
    inside.decide(shared, check, inside.ledger(shared))
    timeout = pool.timeout()
    inside.set_timeout(pool, 0)
    try:
        out = [pool.connect() for _ in range(size or pool.size())]
    except CheckoutTimeout as error:
        raise AssertionError(f"a slot was lost: {error}") from None
    finally:
        inside.set_timeout(pool, timeout)
    assert len({id(fairy.dbapi_connection) for fairy in out}) == len(out), "one was handed out twice"
    for fairy in out:
        fairy.close()


@contextmanager
def sleeping_collector() -> Iterator[None]:
    """The collector runs when it is called and never by itself, and finds what is made in here alone.

    What is frozen for that thaws at the end of the module: each thaw costs a look at the whole heap.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
