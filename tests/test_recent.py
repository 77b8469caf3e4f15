"""One result for all who ask within a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import FakeClock, Task
from hazards import Stop

from sqla_queries_pool.concurrency.recent import Recent

Eventually = Callable[..., None]


def test_a_result_is_shared_for_some_seconds_after_its_end(clock: FakeClock) -> None:
    """However long it took to make; only the call that made it hears that it did."""
    recent: Recent[str] = Recent()

    def slowly() -> str:
        clock.now += 100.0
        return "first"

    assert recent.get(slowly, 1.0, clock) == ("first", True)
    clock.now += 0.75
    assert recent.get(lambda: "second", 1.0, clock) == ("first", False)
    clock.now += 0.25
    assert recent.get(lambda: "second", 1.0, clock) == ("second", True)


def test_who_asks_while_a_result_is_made_waits_for_it(clock: FakeClock, eventually: Eventually) -> None:
    """A second one would cost as much, and say the same."""
    recent: Recent[str] = Recent()
    stop, arrived, lock = Stop(), [], recent._lock  # type: ignore[var-annotated]

    class Door:
        """The lock, and how many have come to it."""

        def __enter__(self) -> None:
            arrived.append(None)
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    recent._lock = Door()  # type: ignore[assignment]

    def slowly() -> str:
        stop.here()
        return "first"

    first = Task(lambda: recent.get(slowly, 1.0, clock))
    stop.reached()
    second = Task(lambda: recent.get(lambda: "second", 1.0, clock))
    eventually(lambda: len(arrived) == 2, "both are there")
    stop.go()
    assert (first.result(), second.result()) == (("first", True), ("first", False))


def test_a_result_may_be_asked_for_while_the_same_thread_makes_one(clock: FakeClock) -> None:
    """A finalizer may do so, wherever the garbage collector runs it."""
    recent: Recent[str] = Recent()
    inner: list[Any] = []

    def make() -> str:
        inner.append(recent.get(lambda: "inner", 1.0, clock))
        return "outer"

    assert Task(lambda: recent.get(make, 1.0, clock)).result() == ("outer", True)
    assert inner == [("inner", True)]


def test_a_failure_is_not_shared(clock: FakeClock) -> None:
    """The next one tries again."""
    recent: Recent[float] = Recent()
    with pytest.raises(ZeroDivisionError):
        recent.get(lambda: 1 / 0, 1.0, clock)
    assert Task(lambda: recent.get(lambda: 1.0, 1.0, clock)).result() == (1.0, True)
