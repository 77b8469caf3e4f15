"""One waiter: how it sleeps, and how it is woken.

The ledger writes ``answer``, inside the pool's lock; whoever held the lock opens the gate after
having let go of it.  Opening wakes, it does not tell: a waiter believes ``answer`` alone, so that a
wake-up lost to an exception in the other thread costs it the rest of a slice, not its turn.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..budget.slots import Attachment, Entry


class ThreadWaiter:
    """A waiter that is a thread: a lock that is taken at birth and released once.

    The cheapest thing that Python can block on: no condition, no list of waiters
    (``threading.Condition`` makes one such lock per wait itself).
    """

    __slots__ = ("_closed", "answer", "attachment", "before", "holder", "label", "since")

    attachment: Attachment
    """For whom it waits."""
    holder: Any
    """The waiting thread (callers.py): it will hold what it is given."""
    since: float
    """When it joined the line, by the pool's clock; written by the ledger."""
    before: int
    """How many of its line had their answer when it joined, or looked last; written by the ledger first."""
    answer: Entry | None
    """What it was given; written once, by the ledger, inside the lock."""

    label: str | None
    """What its thread calls what it does (labels.py)."""

    def __init__(self, attachment: Attachment, holder: Any, label: str | None = None) -> None:
        self.attachment = attachment
        self.holder = holder
        self.label = label
        self.since = 0.0
        self.answer = None
        self._closed = threading.Lock()
        self._closed.acquire()

    def wait(self, seconds: float) -> None:
        """Sleep until the gate opens, for ``seconds`` at most."""
        self._closed.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def open(self) -> None:
        """Wake the waiter; called once, by whoever was told by the ledger to."""
        self._closed.release()
