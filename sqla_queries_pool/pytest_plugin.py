"""Fails the tests that leak connections.  ``pytest_queries_pool`` registers it where it is switched on."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias

import pytest

from .budget.slots import HELD, IDLE, LOCKED, Slot
from .budget.work import Resetter
from .engine.queries_pool import QueriesPool
from .insight import stacks
from .insight.snapshot import DEEPEST_SHOWN, named
from .pool.manager import everywhere
from .runtime import unreturned
from .sockets.transactions import IN_ERROR, IN_TRANSACTION, of_server

GRACE = 0.5
"""Seconds that another thread has for a return that it is about to make: a server in a thread answers a
request before it has returned the connection."""
_LOOK_EVERY = 0.005
_RUNNERS = frozenset({"_pytest", "pluggy", "pytest_asyncio", "anyio"})
"""The folders of what calls tests and fixtures."""

Key: TypeAlias = tuple[Slot, int]
"""One checkout: the slot, and how often it was used by then."""

_failed = pytest.StashKey[bool]()


@dataclass(frozen=True)
class _Leak:
    """One checkout that a test has left behind."""

    key: Key
    how: str
    holder: Any
    label: str | None
    stack: stacks.Calls
    transaction: str | None


class LeakCheck:
    """Looks before and after each test at what is checked out.

    What was checked out before the test is not the test's, nor is what a fixture of a larger scope (class,
    module, package, session) checks out in its setup: that is looked for when the fixture ends.

    :param config: pytest's.
    :param marker: the name of the marker that switches it on and off for a test.
    :param all_tests: is it on for tests without the marker?
    """

    def __init__(self, config: pytest.Config, marker: str, all_tests: bool) -> None:
        self._root = os.path.join(config.rootpath, "")
        self._marker = marker
        self._all_tests = all_tests
        self._on = False
        """Is it on for the test that runs?"""
        QueriesPool._track_stacks = all_tests
        self._unreturned: deque[_Leak] = deque()
        """What the collector found and what loops left, since the test began."""
        unreturned.listeners.append(self._note)
        self._before: set[Key] = set()
        """What was out when the test began."""
        self._begun: set[Key] = set()
        """Which connections were in a transaction when the test began, or their fixture was set up."""
        self._of_fixtures: dict[Any, set[Key]] = {}
        """What fixtures of a larger scope have out, which have not ended."""
        self._ended: set[Key] = set()
        """What fixtures had out that have ended during the test."""

    def pytest_unconfigure(self) -> None:
        """Leave all as it was."""
        QueriesPool._track_stacks = False
        unreturned.listeners.remove(self._note)

    def _note(self, slot: Slot, how: str) -> None:
        if self._on:
            self._unreturned.append(_leak(slot, how))

    # -- whose is what is out --------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """A test begins."""
        marker = item.get_closest_marker(self._marker)
        self._on = self._all_tests if marker is None else _is_on(*marker.args, **marker.kwargs)
        if not self._on:
            return
        QueriesPool._track_stacks = True
        self._ended.clear()
        self._before = {_key(slot) for slot, _ in _out()}
        self._begun = {_key(slot) for slot, _ in _all() if _in_transaction(slot)}
        # Last: what the collector finds from here on is among what was out, or is the test's.
        self._unreturned.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """What a fixture of a larger scope checks out is its own until it ends."""
        if not self._on or fixturedef.scope == "function":
            return (yield)
        before = {_key(slot) for slot, _ in _out()}
        try:
            return (yield)
        finally:
            new = {_key(slot): slot for slot, _ in _out()}
            for key in before.union(*self._of_fixtures.values()):
                new.pop(key, None)
            self._of_fixtures.setdefault(fixturedef, set()).update(new)
            self._begun |= {key for key, slot in new.items() if _in_transaction(slot)}

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """What it has not returned by now, it will not."""
        self._ended |= self._of_fixtures.pop(fixturedef, set())

    # -- the verdict -----------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, Any, Any]:
        """A traceback keeps what its frames have; and a test that has failed needs no second reason."""
        if call.excinfo is not None:
            item.stash[_failed] = True
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """The outermost step of the end of a test: its fixtures have ended, too."""
        try:
            result = yield
            if self._on and not item.stash.get(_failed, False) and (leaks := self._leaks()):
                pytest.fail(self._report(leaks), pytrace=False)
            return result
        finally:
            QueriesPool._track_stacks = self._all_tests

    def _leaks(self) -> list[_Leak]:
        """Return what the test has left."""
        others = (self._before - self._ended).union(*self._of_fixtures.values())
        deadline = time.monotonic() + GRACE
        while any(_moves(s) for s, _ in _out() if _key(s) not in others) and time.monotonic() < deadline:
            threading.Event().wait(_LOOK_EVERY)
        found = {
            _key(slot): _leak(slot, "still checked out") for slot, _ in _out() if _key(slot) not in others
        }
        for leak in list(self._unreturned):
            if leak.key not in self._before or leak.key in self._ended.union(*self._of_fixtures.values()):
                found.setdefault(leak.key, leak)
        for slot, _ in _all():
            key = _key(slot)
            if key not in found and key not in self._begun and _in_transaction(slot):
                if slot.state is IDLE:
                    found[key] = _leak(slot, "returned in a transaction")
                elif key in others and slot.state is HELD and not _moves(slot):
                    found[key] = _leak(slot, "left in a transaction by this test")
        return list(found.values())

    def _report(self, leaks: list[_Leak]) -> str:
        lines = [f"this test leaks {len(leaks)} connection{'s' if len(leaks) > 1 else ''}:"]
        threads, labels = stacks.Threads(), dict(_all())
        for leak in leaks:
            of = f"of {labels[leak.key[0]]}: " if leak.key[0] in labels else ""
            who = named("nobody" if leak.holder is None else threads.name(leak.holder), leak.label)
            state = f", {leak.transaction}" if leak.transaction in (IN_TRANSACTION, IN_ERROR) else ""
            lines.append(f"  a connection {of}{leak.how}{state} ({who})")
            lines += [
                f"    checked out at {call.removeprefix(self._root)}" for call in _applications(leak.stack)
            ]
        return "\n".join(lines)


def _is_on(on: bool = True) -> bool:
    """The parameter of the marker."""
    return on


def _all() -> Iterator[tuple[Slot, str]]:
    """Every connection of every pool, with the pool's label."""
    for pool in everywhere():
        for slot in list(pool.core.ledger.slots):
            yield slot, pool.core.section.label


def _out() -> Iterator[tuple[Slot, str]]:
    """What somebody has checked out, or locked; not what the pool itself has."""
    for slot, pool in _all():
        session: Callable[[], Any] | None = slot.session
        locked = slot.state is LOCKED and session is not None and not isinstance(session(), Resetter)
        if locked or (slot.state is HELD and slot.holder is not None):
            yield slot, pool


def _key(slot: Slot) -> Key:
    return slot, slot.uses


def _in_transaction(slot: Slot) -> bool:
    return of_server(slot.handle)[1] in (IN_TRANSACTION, IN_ERROR)


def _moves(slot: Slot) -> bool:
    """Has another thread it, which may return it?"""
    holder = slot.holder
    return holder is not None and holder.alive and holder.ident != threading.get_ident()


def _leak(slot: Slot, how: str) -> _Leak:
    return _Leak(_key(slot), how, slot.holder, slot.label, slot.stack, of_server(slot.handle)[1])


def _applications(stack: stacks.Calls) -> list[str]:
    """The calls from the test or the fixture on, the outermost one first, the innermost of them."""
    calls = tuple(takewhile(lambda call: _RUNNERS.isdisjoint(call[0].co_filename.split(os.sep)), stack))
    return list(stacks.as_text(calls)[-DEEPEST_SHOWN:]) or ["a place that is not known"]
