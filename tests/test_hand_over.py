"""How a waiting checkout gets what another one returns where it has nothing to look for: the short way."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import inside
import pytest
from hazards import DEADLINE, Thread, eventually, new_pid, new_pool
from sqlalchemy import event
from test_fast_path import PACKAGE

from sqla_queries_pool import checkouts
from sqla_queries_pool.budget.closing import GRACE
from sqla_queries_pool.concurrency.threads import ThreadWaiter
from sqla_queries_pool.runtime.garbage import GC_AFTER

OF_WAITER = [
    "engine/queries_pool.py:connect",
    "engine/queries_pool.py:_do_get",
    "runtime/checkout.py:take",
    "budget/ledger.py:take",
    "budget/ledger.py:_open",
    "budget/state.py:alone",
    "concurrency/threads.py:waiter",
    "concurrency/threads.py:__init__",
    "budget/ledger.py:enqueue",
    "budget/queue.py:begin",
    "budget/queue.py:_watch",
    "runtime/checkout.py:_wait_at_first",
    "budget/state.py:alone",
    "runtime/checkout.py:_sleep",
    "concurrency/threads.py:wait",
    "concurrency/threads.py:accept",
    "engine/records.py:__init__",
]
"""The functions of this package that a checkout runs which waits and is served."""
OF_RETURN = [
    "engine/records.py:close",
    "engine/records.py:rollback",
    "runtime/checkout.py:give",
    "budget/ledger.py:give",
    "budget/ledger.py:_give_on",
    "budget/ledger.py:_hold",
    "budget/state.py:move",
    "budget/ledger.py:_answer",
    "budget/state.py:_leave_queue",
    "budget/stats.py:add",
    "concurrency/threads.py:wake",
]
"""And the return that serves it."""


class Asleep(BaseException):
    """The checkout is about to sleep."""


def first_sleep(monkeypatch: pytest.MonkeyPatch, pool: Any, before: Callable[[], object] = bool) -> float:
    """For how long the next checkout is about to sleep.  It is interrupted before, and loses nothing."""
    slept: list[float] = []

    def wait(_: ThreadWaiter, seconds: float) -> None:
        slept.append(seconds)
        before()
        raise Asleep

    with monkeypatch.context() as patch:
        patch.setattr(ThreadWaiter, "wait", wait)
        with pytest.raises(Asleep):
            pool.connect()
    assert not inside.waiters(pool)
    return slept[0]


def traced(found: list[str], function: Callable[[], Any]) -> Any:
    """Run it, and note which functions of this package run."""

    def profile(frame: FrameType, what: str, _: object) -> None:
        name = frame.f_code.co_filename
        if what == "call" and name.startswith(PACKAGE) and frame.f_code.co_name != "<lambda>":
            found.append(f"{name.removeprefix(PACKAGE)}:{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        return function()
    finally:
        sys.setprofile(None)


def test_a_hand_over_runs_few_functions_of_this_package() -> None:
    """It takes twice the time of a checkout that finds an idle connection, and a change of threads."""
    pool = new_pool(max_size=1)
    inside.attachment(pool).first_look = DEADLINE  # a busy machine may not serve it before there is something
    of_waiter: list[str] = []
    of_return: list[str] = []

    def checkout() -> None:
        pool.connect().close()  # this thread's first asks for what is made once for a thread
        first.set()
        assert begin.wait(20)
        traced(of_waiter, pool.connect).close()

    first, begin = threading.Event(), threading.Event()
    thread = Thread(checkout)
    assert first.wait(20)
    connection = pool.connect()
    inside.ledger(pool).mean_connect = 0.0  # where connects take long, the queue is watched
    begin.set()
    eventually(lambda: inside.waiters(pool), "it waits")
    traced(of_return, connection.close)
    thread.join()
    assert of_waiter == OF_WAITER
    assert [call for call in of_return if not call.startswith("runtime/critical_section.py")] == OF_RETURN


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, GC_AFTER),
        ({"timeout": None}, GC_AFTER),
        ({"timeout": 0.1}, 0.05),
        ({"timeout": 0}, 0.0),
        ({"max_waiting": 5}, 0.0),
        ({"queue_target": 1.0}, 0.0),
        ({"fail_fast_after": 1.0}, 0.0),
        ({"ping_after": 0}, 0.0),
        ({"pre_ping": True}, 0.0),
        ({"recycle": 60}, 0.0),
    ],
    ids=str,
)
def test_it_is_taken_where_nothing_rejects_and_a_look_at_the_socket_is_enough(
    options: dict[str, Any], seconds: float
) -> None:
    """And until the collector is to be asked, or half of the timeout is over."""
    assert inside.attachment(new_pool(**options)).first_look == seconds


def test_a_checkout_sleeps_until_there_is_something_to_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector; the deadline of its block; another engine's idle connection."""
    pid = new_pid()
    pool = new_pool(pid, max_size=1)
    connection = pool.connect()
    assert first_sleep(monkeypatch, pool) == GC_AFTER
    with checkouts(timeout=0.02):
        assert first_sleep(monkeypatch, pool) <= 0.02
    other = new_pool(pid, max_size=1)
    assert first_sleep(monkeypatch, pool) == 0.05
    connection.close()
    other.dispose()


def test_it_asks_again_when_it_may_open_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is better to wait for a while first, because connects take long."""
    pool = new_pool(max_size=2)
    connection = Thread(pool.connect).join()  # what it holds itself is not returned meanwhile
    inside.ledger(pool).mean_connect = 0.03
    assert first_sleep(monkeypatch, pool) < 0.04
    connection.close()


def test_a_close_that_takes_long_is_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the moment at which somebody waits for its slot."""
    pool, begun, end = new_pool(max_size=1), threading.Event(), threading.Event()

    def close(*_: object) -> None:
        begun.set()
        end.wait(20)

    event.listen(pool, "close", close)
    pool.connect().close()
    closing = Thread(pool.dispose)
    assert begun.wait(20)
    assert first_sleep(monkeypatch, pool) <= GRACE < GC_AFTER
    end.set()
    closing.join()


def test_another_process_is_asked_before_it_sleeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where processes share a budget: it may have one to spare."""
    pool, asked = new_pool(new_pid(), max_size=1, share=str(tmp_path)), []
    connection = pool.connect()
    monkeypatch.setattr(inside.core(pool).share, "wanted", lambda: asked.append(True))
    assert first_sleep(monkeypatch, pool, lambda: asked.append(False)) < math.inf
    assert asked == [True, False]
    connection.close()
    pool.dispose()
