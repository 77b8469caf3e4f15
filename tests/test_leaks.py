"""Connections that are out for too long are logged: once, by name, and when they are returned after all."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import inside
import pytest
from fakes import FakeClock
from hazards import Handle, Stop, Thread, driver_connection_of, new_pool

from sqla_queries_pool import QueriesPool, labelled
from sqla_queries_pool.budget.leaks import Leaks
from sqla_queries_pool.logs import NAME
from sqla_queries_pool.pool.manager import everywhere

Eventually = Callable[..., None]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged of leaks so far, without the label that each line begins with."""
    caplog.set_level(logging.WARNING, NAME)

    def told() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "a connection " in record.getMessage()]
        return [line.partition(": a connection ")[2] for line in found]

    yield told
    for pool in everywhere():  # the housekeeper looks after what a test has left
        inside.ledger(pool).leaks = Leaks()


def look(pool: QueriesPool) -> None:
    """What the housekeeper does when something is due."""
    inside.upkeep(pool).sweep()


def test_one_that_is_out_for_longer_is_logged_once_with_its_holder(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """Not before its time, then with thread, label and for how long; not again, however long it stays out."""
    pool = new_pool(pid, leak_after=30.0)
    with labelled("GET /orders"):
        connection = pool.connect()
    clock.now += 29.9
    look(pool)
    assert lines() == []
    clock.now += 0.1
    look(pool)
    assert lines() == ["has been checked out for a long time: MainThread [GET /orders] (30.0 s)"]
    for _ in range(5):
        clock.now += 100.0
        look(pool)
    assert len(lines()) == 1
    connection.close()


def test_it_says_when_one_is_returned_after_all(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """With how long it was out by then, also where it was seen only later; once."""
    pool = new_pool(pid, leak_after=30.0)
    connection = pool.connect()
    clock.now += 31.0
    look(pool)
    clock.now += 9.0
    connection.close()
    clock.now += 0.7
    for _ in range(3):
        look(pool)
    assert lines()[1:] == ["was returned after all, after 40.0 s"]


def test_each_use_is_logged_anew(pid: str, clock: FakeClock, lines: Callable[[], list[str]]) -> None:
    """The same connection, forgotten again after it had been returned: once more."""
    pool = new_pool(pid, leak_after=30.0)
    for _ in range(3):
        connection = pool.connect()
        clock.now += 30.0
        look(pool)
        connection.close()
        look(pool)
    assert [line.split()[0] for line in lines()] == ["has", "was"] * 3


def test_one_that_was_used_again_between_two_looks_counts_from_its_second_use(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """What was logged was returned and is out again: neither is that leaked, nor is it logged twice."""
    pool = new_pool(pid, leak_after=30.0)
    first = pool.connect()
    clock.now += 30.0
    look(pool)
    first.close()
    second = pool.connect()
    clock.now += 1.0
    look(pool)
    assert [line.split()[0] for line in lines()] == ["has", "was"]
    clock.now += 29.0
    look(pool)
    assert lines()[2:] == ["has been checked out for a long time: MainThread (30.0 s)"]
    second.close()


def test_each_engine_has_its_own_time(pid: str, clock: FakeClock, lines: Callable[[], list[str]]) -> None:
    """Three engines of one pool: after 10 s, after 60 s, never."""
    pools = {after: new_pool(pid, leak_after=after) for after in (10.0, 60.0, None)}
    out = []
    for after, pool in pools.items():
        with labelled(str(after)):
            out.append(pool.connect())
    found = []
    for _ in range(12):
        clock.now += 10.0
        look(pools[None])
        found.append(len(lines()))
    assert found == [1] * 5 + [2] * 7
    assert [re.findall(r"\[(.*)\]", line) for line in lines()] == [["10.0"], ["60.0"]]
    for connection in out:
        connection.close()


def test_nothing_is_ever_closed(pid: str, clock: FakeClock, lines: Callable[[], list[str]]) -> None:
    """Who has it may use it on: it is a warning."""
    pool = new_pool(pid, leak_after=1.0)
    connection = pool.connect()
    handle = driver_connection_of(connection)
    for _ in range(4):
        clock.now += 1000.0
        look(pool)
    assert driver_connection_of(connection) is handle
    assert not handle.closed
    assert connection.is_valid
    connection.close()
    assert pool.checkedin() == 1
    assert dict(pool.statistics().closes) == {}


def test_with_tracked_stacks_it_says_where(
    pid: str, clock: FakeClock, caplog: pytest.LogCaptureFixture, lines: Callable[[], list[str]]
) -> None:
    """A line for each call of the application's, this one the last."""
    pool = new_pool(pid, leak_after=1.0, track_stacks=True)
    connection = pool.connect()
    clock.now += 1.0
    look(pool)
    line = lines()[0].splitlines()
    assert re.fullmatch(
        r"  checked out at \S*test_leaks\.py:\d+ in test_with_tracked_stacks_it_says_where", line[-1]
    )
    connection.close()


def test_who_has_it_is_told_as_it_was_when_it_was_found(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]], eventually: Eventually
) -> None:
    """The worker is busy closing something while the culprit gives it back and another one takes it: the
    line is about the culprit."""
    pool = new_pool(pid, leak_after=30.0)
    stop, has, go = Stop(), Stop(), Stop()

    def forget() -> None:
        connection = pool.connect()
        has.here()
        connection.close()
        go.here()

    culprit = Thread(forget, name="culprit")
    has.reached()
    inside.worker(pool).submit(stop.here)
    stop.reached()
    clock.now += 31.0
    look(pool)
    has.go()
    go.reached()
    connection = pool.connect()
    stop.go()
    eventually(lines, "a line")
    assert lines() == ["has been checked out for a long time: culprit (31.0 s)"]
    go.go()
    culprit.join()
    connection.close()


def test_a_detached_connection_was_not_returned(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """It is its holder's from then on: nothing to tell, or that it left after so long, but never that it was
    out for no time."""
    pool = new_pool(pid, leak_after=30.0)
    connection = pool.connect()
    clock.now += 31.0
    look(pool)
    clock.now += 9.0
    connection.detach()
    look(pool)
    other = pool.connect()
    look(pool)
    assert not [line for line in lines() if "after 0.0 s" in line]
    assert not inside.logged_leaks(inside.ledger(pool))
    other.close()
    connection.close()


def test_it_goes_on_across_a_dispose(pid: str, clock: FakeClock, lines: Callable[[], list[str]]) -> None:
    """What is out when its engine is disposed of is logged, and that it was returned (to be closed)."""
    old = new_pool(pid, leak_after=30.0)
    connection = old.connect()
    old.dispose()
    new = old.recreate()
    assert inside.attachment(new).leak_after == 30.0
    clock.now += 30.0
    look(new)
    clock.now += 5.0
    connection.close()
    clock.now += 1.0
    look(new)
    assert [line.split()[0] for line in lines()] == ["has", "was"]
    again = new.connect()
    clock.now += 30.0
    look(new)
    assert len(lines()) == 3
    again.close()


def test_the_logged_leaks_of_an_engine_that_is_gone_are_forgotten(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """No slot is kept, and nobody looks every second for one that can't be returned any more."""
    other = new_pool(pid, leak_after=1000.0)
    kept = other.connect()
    pool = new_pool(pid, leak_after=10.0)
    connection = pool.connect()
    clock.now += 10.0
    look(other)
    connection.close()
    pool.dispose()
    del pool, connection
    gc.collect()
    for _ in range(2):
        clock.now += 1.5
        look(other)
    ledger = inside.ledger(other)
    assert not inside.logged_leaks(ledger)
    assert ledger.due - clock.now > 100.0
    kept.close()


def test_it_is_looked_for_when_it_is_due_and_no_more_often(pid: str, clock: FakeClock) -> None:
    """After the first opening, ``leak_after`` later; then when the next may be due; every second only while
    one is out that was logged."""
    pool = new_pool(pid, leak_after=30.0)
    ledger = inside.ledger(pool)
    connection = pool.connect()
    assert ledger.due == clock.now + 30.0
    clock.now += 20.0
    connection.close()
    second = pool.connect()
    clock.now += 10.0
    look(pool)
    assert ledger.due == clock.now + 20.0
    clock.now += 20.0
    look(pool)
    assert ledger.due == clock.now + 1.0
    second.close()
    clock.now += 1.0
    look(pool)
    assert ledger.due == clock.now + 30.0


def test_without_it_nothing_is_due_and_nobody_looks(pid: str, clock: FakeClock) -> None:
    """Off, by default: no look is due, no slot is looked at, nothing is kept."""
    pool = new_pool(pid)
    connection = pool.connect()
    ledger = inside.ledger(pool)
    assert ledger.due == float("inf")
    clock.now += 1e6
    look(pool)
    assert ledger.due == float("inf")
    assert not inside.logged_leaks(ledger)
    connection.close()


def test_of_an_engine_without_it_nothing_is_looked_at() -> None:
    """Not even how many connections it has."""
    off: Any = SimpleNamespace(leak_after=float("inf"))
    assert Leaks().look(off, 0.0) == ([], float("inf"))


def test_one_that_is_being_opened_for_long_is_no_leak(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """Nobody has forgotten it: it is not there yet.  Its time begins when it was opened."""
    stop = Stop()

    def connect() -> Handle:
        stop.here()
        return Handle()

    pool, kept = new_pool(pid, connect, leak_after=5.0), []
    opener = Thread(lambda: kept.append(pool.connect()))
    stop.reached()
    clock.now += 60.0
    look(pool)
    assert lines() == []
    stop.go()
    opener.join()
    clock.now += 4.0
    look(pool)
    assert lines() == []
    clock.now += 1.0
    look(pool)
    assert len(lines()) == 1
    kept.pop().close()


def test_what_the_pool_itself_has_out_is_no_leak(
    pid: str, clock: FakeClock, lines: Callable[[], list[str]]
) -> None:
    """A renewal that takes long, of one that is idle: it is nobody's."""
    stop, opened = Stop(), itertools.count()

    def connect() -> Handle:
        if next(opened):
            stop.here()
        return Handle()

    pool = new_pool(pid, connect, leak_after=5.0)
    pool.connect().close()
    pool.expire(rolling=True)
    stop.reached()
    clock.now += 60.0
    look(pool)
    stop.go()
    assert lines() == []


def test_the_housekeeper_looks_by_itself(lines: Callable[[], list[str]], eventually: Eventually) -> None:
    """On the real clock nobody has to do anything."""
    pool = new_pool(leak_after=0.01)
    connection = pool.connect()
    eventually(lines, "the warning")
    connection.close()
    eventually(lambda: len(lines()) == 2, "that it was returned")
    assert lines()[1].startswith("was returned after all")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a platform without fork")
def test_a_forked_child_tells_of_its_own_alone(pid: str, clock: FakeClock) -> None:
    """What the parent had logged, or has out, is nothing to the child, which logs what it has itself."""
    pool = new_pool(pid, leak_after=30.0)
    connection = pool.connect()
    clock.now += 31.0
    look(pool)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            kept = len(inside.logged_leaks(inside.ledger(pool)))
            told: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger(NAME).addHandler(handler)
            clock.now += 100.0
            look(pool)
            before = len(told)
            own = pool.connect()
            clock.now += 31.0
            look(pool)
            os.write(write, json.dumps([kept, before, len(told), "long time" in "".join(told)]).encode())
            del own
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert json.loads(said) == [0, 0, 1, True]
    connection.close()
