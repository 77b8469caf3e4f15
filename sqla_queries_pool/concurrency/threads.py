"""Threads: which one asks, and how one waits."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from ..budget.slots import Attachment, Entry


class _Life:
    """Dies with the thread that it belongs to."""

    __slots__ = ("__weakref__",)


class Caller:
    """A thread that has used a pool: which one it is, for longer than it lives.

    The identifier of a thread that has ended is soon another thread's.  What the dead one still holds would
    be shown as that one's, and where that one waits, as a deadlock.
    """

    __slots__ = ("_life", "ident")

    def __init__(self, life: _Life) -> None:
        self.ident = threading.get_ident()
        """The identifier that it had, while it lived."""
        self._life = weakref.ref(life)

    @property
    def alive(self) -> bool:
        """Does the thread still run?"""
        return self._life() is not None


class _Here(threading.local):
    def __init__(self) -> None:
        self._life = _Life()
        self.caller = Caller(self._life)


here = _Here()
"""``here.caller`` is the thread that asks.  It takes 10 ns more than ``get_ident()``."""


class ThreadWaiter:
    """A waiter that is a thread: a lock that is taken at birth and released once.

    The cheapest thing that Python can block on: no condition, no list of waiters
    (``threading.Condition`` makes one such lock per wait itself).

    The ledger writes ``answer`` inside the critical section; the thread that was inside calls :meth:`wake`
    after it has left.  A wake-up wakes, it does not tell: a waiter believes ``answer`` alone.  So a wake-up
    that an exception in the other thread has lost costs the waiter the rest of a slice, not its turn.
    """

    __slots__ = ("_asleep", "answer", "attachment", "before", "holder", "label", "since")

    attachment: Attachment
    """The engine's side for which it waits."""
    holder: Any
    """The waiting thread, a :class:`Caller`: it will hold what it is given."""
    since: float
    """When it joined the queue, by the pool's clock; written by the ledger."""
    before: int
    """How many of its queue had their answer when it joined, or looked last; written by the ledger first."""
    answer: Entry | None
    """What it was given; written once, by the ledger, inside the critical section."""

    label: str | None
    """What its thread calls what it does (labels.py)."""

    def __init__(self, attachment: Attachment, holder: Any, label: str | None = None) -> None:
        self.attachment = attachment
        self.holder = holder
        self.label = label
        self.since = 0.0
        self.answer = None
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wait(self, seconds: float) -> None:
        """Sleep until :meth:`wake` is called, for ``seconds`` at most."""
        self._asleep.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Wake the waiter; called once, by the thread that has to do the ledger's work."""
        self._asleep.release()
