"""What a checkout and its return cost with a connection idle and nobody waiting, in what can be counted.

Counts do not depend on the machine: Python frames, locks taken, objects made.  And what is written out for
that (``QueriesPool.connect``, ``Proxy.close``) does what SQLAlchemy's does.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import subprocess
import sys
import tracemalloc
import weakref
from types import FrameType
from typing import Any

import inside
import pytest
from fakes import FakeDriver
from hazards import new_pid, new_pool, sleeping_collector
from sqlalchemy import event
from sqlalchemy.pool import Pool, QueuePool

import sqla_queries_pool
from sqla_queries_pool import QueriesPool
from sqla_queries_pool.engine.records import Proxy
from sqla_queries_pool.logs import NAME

PACKAGE = os.path.dirname(sqla_queries_pool.__file__) + os.sep
FRAMES = [
    "engine/queries_pool.py:connect",
    "engine/queries_pool.py:_do_get",
    "runtime/checkout.py:take",
    "budget/ledger.py:take",
    "engine/records.py:__init__",
    "engine/records.py:close",
    "engine/records.py:rollback",
    "runtime/checkout.py:give",
    "budget/ledger.py:give",
]
"""The functions of this package that a checkout and its return run."""
EVENTS = ("connect", "first_connect", "checkout", "checkin", "reset", "close", "invalidate", "detach")
BARE = {"on_deadlock": "ignore"}
FEATURES: list[dict[str, Any]] = [
    {},
    {"leak_after": 30.0},
    {"idle_in_transaction_after": 5.0},
    {"on_deadlock": "warn"},
    {"leak_after": 30.0, "idle_in_transaction_after": 5.0},
]


def all_frames(pool: Pool) -> list[str]:
    """The Python frames of one checkout and its return, by file and function."""
    found: list[str] = []

    def profile(frame: FrameType, what: str, _: object) -> None:
        if what == "call" and frame.f_code.co_filename != __file__:
            found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    pool.connect().close()
    pool.connect().close()
    with sleeping_collector():  # no finalizer of another test's comes in between
        sys.setprofile(profile)
        try:
            pool.connect().close()
        finally:
            sys.setprofile(None)
    return found


def frames(pool: QueriesPool) -> list[str]:
    """Those of this package."""
    return [call.removeprefix(PACKAGE) for call in all_frames(pool) if call.startswith(PACKAGE)]


def allocated(pool: QueriesPool) -> int:
    """Bytes at the highest point of a hundred checkouts, one after the other: the least of many turns, as
    caches fill, and other threads' bytes count, too."""
    pool.connect().close()
    found = []
    with sleeping_collector():
        for _ in range(30):
            tracemalloc.start()
            try:
                for _ in range(100):
                    pool.connect().close()
                found.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    return min(found)


def objects(pool: Pool) -> int:
    """How many objects that the collector has to look at a connection that is out is made of."""
    pool.connect().close()
    with sleeping_collector():
        before, nothing = gc.get_count()[0], gc.get_count()[0]
        connection = pool.connect()
        made = gc.get_count()[0] - nothing - (nothing - before)
        connection.close()
    return made


class CountingLock:
    """A lock that counts how often it is taken."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.taken = lock, 0

    def acquire(self, *args: Any) -> Any:
        """Count."""
        self.taken += 1
        return self.lock.acquire(*args)

    def release(self) -> None:
        """As it does."""
        self.lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


# -- counted -----------------------------------------------------------------------------------------------


def test_a_checkout_runs_nine_functions_of_this_package_and_none_that_diagnoses() -> None:
    """Statistics are counted in place, the label is one call of C; nothing of leaks, deadlocks, snapshots or
    stacks is on it.  A frame costs 15 to 30 ns: one more is a decision, and it is taken here.  The proxy's
    ``rollback`` is in place of its ``__getattr__``, SQLAlchemy's."""
    assert [call for call in frames(new_pool()) if call != "sockets/liveness.py:<lambda>"] == FRAMES


def test_listeners_of_a_checkout_and_its_return_add_one_function_of_this_package() -> None:
    """And SQLAlchemy's two that call them.  So OpenTelemetry's instrumentation costs what it does itself."""
    pool = new_pool()
    alone = len(all_frames(pool))
    event.listen(pool, "checkout", lambda connection, record, proxy: None)
    event.listen(pool, "checkin", lambda connection, record: None)
    called = [call for call in frames(pool) if call != "sockets/liveness.py:<lambda>"]
    assert sorted(called) == sorted([*FRAMES, "engine/records.py:tell_listeners"])
    assert len(all_frames(pool)) <= alone + 3


def test_a_checkout_runs_fewer_functions_than_queuepools() -> None:
    """SQLAlchemy's own and the standard library's included: half of QueuePool's at most."""
    ours, queue_pools = all_frames(new_pool()), all_frames(QueuePool(FakeDriver().connect))
    assert 2 * len(ours) <= len(queue_pools), "\n".join(ours)


def test_a_checkout_takes_one_lock_and_its_return_another() -> None:
    """The pool's, once each; a ``with Lock`` costs as much as five frames."""
    pool = new_pool()
    pool.connect().close()
    lock = CountingLock(inside.lock(pool))
    inside.replace_lock(pool, lock, lambda: lock.acquire(False))
    for _ in range(10):
        pool.connect().close()
    assert lock.taken == 20


def test_a_connection_that_is_out_is_made_of_few_objects_and_none_is_left() -> None:
    """The proxy, its weak reference and what that calls; QueuePool's has more."""
    ours = objects(new_pool())
    assert ours <= 3 < objects(QueuePool(FakeDriver().connect))
    pool = new_pool()
    pool.connect().close()
    left = []
    with sleeping_collector():
        for _ in range(5):  # what other threads make meanwhile counts, too
            before = gc.get_count()[0]
            for _ in range(100):
                pool.connect().close()
            left.append(gc.get_count()[0] - before)
    assert min(left) < 5


def test_an_idle_close_leaves_one_letter_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its count in the totals and its free slot are one step inside the pool, not two."""
    pool = new_pool()
    pool.connect().close()
    section, posted = inside.section(pool), []
    post = section.post

    def told(operation: Any, *args: Any) -> None:
        posted.append(operation.__name__)
        post(operation, *args)

    monkeypatch.setattr(section, "post", told)
    pool.dispose()
    assert posted == ["closed"]
    assert sum(pool.statistics().closes.values()) == 1


@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_what_can_be_switched_on_beside_stacks_costs_a_checkout_nothing(feature: dict[str, Any]) -> None:
    """The same frames as without, and no more memory."""
    assert frames(new_pool(**feature)) == frames(new_pool(**BARE))  # type: ignore[arg-type]
    bare = allocated(new_pool(**BARE))  # type: ignore[arg-type]  # first: caches fill
    assert allocated(new_pool(**feature)) <= bare + 512


def test_where_another_engine_has_idle_connections_a_checkout_costs_the_same() -> None:
    """However many, and however few were ever out at once."""
    pid = new_pid()
    many, few = new_pool(pid, max_size=20), new_pool(pid, max_size=20)
    out = [many.connect() for _ in range(8)]
    for connection in out:
        connection.close()
    assert frames(few) == frames(new_pool())
    inside.ledger(few).peak_held = 1
    assert frames(few) == frames(new_pool())


def test_tracked_stacks_cost_a_frame_more_and_only_where_they_are_on() -> None:
    """An engine without them, in the same pool, pays nothing."""
    pid = new_pid()
    with_it, without = new_pool(pid, track_stacks=True), new_pool(pid)
    assert frames(without) == frames(new_pool())
    extra = [call for call in frames(with_it) if call.startswith("insight/stacks.py")]
    assert extra == ["insight/stacks.py:calls"]


def test_nothing_accumulates_from_checkout_to_checkout() -> None:
    """Ten thousand checkouts leave no more behind than a hundred: totals have a fixed size.

    Other threads may allocate meanwhile; what accumulates does so each time.
    """
    pool = new_pool(leak_after=1e6, track_stacks=True)

    def blocks_after(checkouts: int) -> int:
        for _ in range(checkouts):
            pool.connect().close()
        gc.collect()
        return sys.getallocatedblocks()

    assert min(-blocks_after(100) + blocks_after(10_000) for _ in range(3)) < 200


# -- what SQLAlchemy does, done in fewer steps -------------------------------------------------------------


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_connection_that_can_not_be_rolled_back_is_closed(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged as SQLAlchemy does, counted, and the slot is free; an interrupt reaches the caller."""
    driver = FakeDriver()
    pool = QueriesPool(driver.connect, max_size=1, timeout=0)
    connection = pool.connect()

    def fail() -> None:
        raise kind("no")

    driver.connections[0].rollback = fail  # type: ignore[method-assign]
    if issubclass(kind, Exception):
        connection.close()
    else:
        with pytest.raises(kind):
            connection.close()
    assert "Exception during reset or similar" in caplog.text
    assert driver.connections[0].closed
    assert (pool.checkedout(), pool.statistics().failed_resets) == (0, 1)
    pool.connect().close()
    assert len(driver.connections) == 2


@pytest.mark.parametrize("style", ["rollback", "commit", None])
def test_a_return_resets_as_told(style: Any) -> None:
    """``pool_reset_on_return``; and not where the transaction is known to be over."""
    driver = FakeDriver()
    pool = QueriesPool(driver.connect, reset_on_return=style)
    pool.connect().close()
    connection: Any = pool.connect()
    inside.close_special(connection)
    calls = driver.connections[0].calls
    assert (calls["rollback"], calls["commit"]) == (style == "rollback", 2 * (style == "commit"))
    assert pool.checkedout() == 0


@pytest.mark.parametrize("names", [EVENTS, *((name,) for name in EVENTS)], ids=",".join)
def test_whoever_listens_is_told_what_queuepool_tells(names: tuple[str, ...]) -> None:
    """The same events in the same order with the same number of arguments, each alone and all together."""
    told: dict[str, list[tuple[str, int]]] = {}
    for pool in (new_pool(), QueuePool(FakeDriver().connect)):
        said = told[type(pool).__name__] = []
        for name in names:
            event.listen(pool, name, lambda *args, n=name, said=said: said.append((n, len(args))))
        for end in ("close", "close", "invalidate", "detach"):
            connection = pool.connect()
            getattr(connection, end)()
            connection.close()
        pool.dispose()
    assert told["QueriesPool"] == told["QueuePool"]


def test_with_echo_it_says_what_queuepool_says(caplog: pytest.LogCaptureFixture) -> None:
    """``echo_pool="debug"``: a checkout, the rollback, the return."""
    said = []
    for pool in (new_pool(echo="debug"), QueuePool(FakeDriver().connect, echo="debug")):
        pool.connect().close()
        caplog.clear()
        pool.connect().close()
        said.append([r.msg for r in caplog.records if r.levelno == logging.DEBUG])
    assert said[0] == said[1]


def test_a_proxy_that_was_closed_is_closed() -> None:
    """Closing it again does nothing, also when the connection is somebody else's by then."""
    pool = new_pool(max_size=1)
    first = pool.connect()
    assert isinstance(first, Proxy)
    first.close()
    second = pool.connect()
    first.close()
    assert first.dbapi_connection is None
    assert pool.checkedout() == 1
    second.close()


def test_a_connection_whose_invalidation_was_cut_short_is_not_used_again() -> None:
    """A listener raises: the connection is closed all the same, and the next checkout opens another."""
    driver = FakeDriver()
    pool: Any = QueriesPool(driver.connect)

    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    event.listen(pool, "invalidate", refuse)
    connection = pool.connect()
    inside.record(connection).starttime -= 1  # the times of day that are compared may be coarse
    with pytest.raises(RuntimeError):
        connection.invalidate()
    connection.close()
    event.remove(pool, "invalidate", refuse)
    pool.connect().close()
    assert [one.closed for one in driver.connections] == [True, False]


def test_who_closes_what_the_collector_has_returned_closes_nothing() -> None:
    """An object in a cycle that closes its connection in ``__del__``: it is somebody else's by then."""
    pool = new_pool(max_size=1)
    late: list[Any] = []

    class Owner:
        def __init__(self) -> None:
            self.me, self.connection = self, pool.connect()

        def __del__(self) -> None:
            late.append(pool.connect())  # it was returned: the collector clears weak references first
            self.connection.close()

    Owner()
    gc.collect()
    (mine,) = late
    assert mine.dbapi_connection is not None
    assert pool.checkedout() == 1
    mine.close()
    assert pool.checkedout() == 0


def test_the_registry_leads_to_no_engine_that_has_a_connection_out() -> None:
    """So it is collected with what it has out, and the slot is free."""
    pid = new_pid()
    pool: Any = new_pool(pid, max_size=1)
    pool.connection = pool.connect()
    engine = weakref.ref(pool)
    del pool
    gc.collect()
    assert engine() is None
    other = new_pool(pid, max_size=1)
    other.connect().close()


def test_an_interrupted_rollback_leaves_no_cycle_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error, traceback, frame, error: it would keep the record, and its death would not be noticed."""
    pool = new_pool(max_size=1)
    connection: Any = pool.connect()
    record = weakref.ref(inside.record(connection))

    def fail() -> None:
        raise KeyboardInterrupt

    connection.dbapi_connection.rollback = fail
    monkeypatch.setattr(logging.getLogger(NAME), "disabled", True)  # the test's own log keeps the traceback
    with sleeping_collector():
        with contextlib.suppress(KeyboardInterrupt):
            connection.close()
        pool.dispose()
        del connection
        assert record() is None


def test_with_a_proxy_of_sqlalchemys_that_it_does_not_know_it_goes_sqlalchemys_way() -> None:
    """A later SQLAlchemy's may be made of more.  Then everything works as well, in more steps."""
    code = """
from sqlalchemy.pool import base
base._ConnectionFairy.__slots__ += ("of_tomorrow",)
import sqla_queries_pool, gc
from sqla_queries_pool.logs import NAME
from sqla_queries_pool.engine.records import Proxy
from fakes import FakeDriver
driver = FakeDriver()
pool = sqla_queries_pool.QueriesPool(driver.connect, max_size=1, timeout=1.0)
for _ in range(3):
    connection = pool.connect()
    assert type(connection) is base._ConnectionFairy, connection
    connection.close()
connection = pool.connect()
del connection
gc.collect()
pool.connect().invalidate()
pool.connect().close()
assert (pool.checkedout(), len(driver.connections), pool.statistics().checkouts) == (0, 2, 6), repr(pool)
"""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([os.path.dirname(PACKAGE.rstrip(os.sep)), here, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
