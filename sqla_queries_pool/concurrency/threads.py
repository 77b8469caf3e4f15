"""Threads: which one asks, how one waits, opens and closes."""

from __future__ import annotations

import contextvars
import functools
import gc
import math
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from typing import Any, ClassVar, TypeVar

from ..budget.slots import Attachment, Entry
from .housekeeping import Worker
from .late import TooLate, pass_on

_T = TypeVar("_T")


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

    @property
    def ended(self) -> bool:
        """Has it ended, so that it will return nothing?"""
        return self._life() is None

    @property
    def number(self) -> int:
        """The same for all that this thread holds and waits for, and no other's."""
        return self.ident

    @property
    def name(self) -> str | None:
        """What it is called, where that is known without asking :mod:`threading`."""
        return None if self.alive else f"thread {self.ident}, which has ended"

    @property
    def parents(self) -> tuple[int, ...]:
        """Those that wait for this one to end, as far as is known: none."""
        return ()


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

    __slots__ = (
        *("_asleep", "answer", "attachment", "before", "caller_class", "holder", "label", "since"),
        "stood_still",
    )

    attachment: Attachment
    """The engine's side for which it waits."""
    holder: Any
    """The waiting thread, a :class:`Caller`: it will hold what it is given."""
    since: float
    """When it joined the queue, by the pool's clock; written by the ledger."""
    before: int
    """How many of its queue had their answer when it joined, or looked last; written by the ledger first."""
    stood_still: float
    """For how many seconds it could not be served, because the process stood still; written by itself."""
    answer: Entry | None
    """What it was given; written once, by the ledger, inside the critical section."""

    label: str | None
    """What its thread calls what it does (labels.py)."""
    caller_class: str | None
    """The class of its checkout; written by the ledger, where there are classes."""

    def __init__(self, attachment: Attachment, holder: Any, label: str | None = None) -> None:
        self.attachment = attachment
        self.holder = holder
        self.label = label
        self.caller_class = None
        self.since = self.stood_still = 0.0
        self.answer = None
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wait(self, seconds: float) -> None:
        """Sleep until :meth:`wake` is called, for ``seconds`` at most."""
        self._asleep.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Wake the waiter; called once, by the thread that has to do the ledger's work."""
        self._asleep.release()

    def accept(self) -> Entry | None:
        """Return what it was given, which is its own from now on."""
        return self.answer


class Threads:
    """The runtime of the engines whose callers are threads: whatever takes time blocks the thread.

    loops.py has the one for an event loop, with the same methods.
    """

    here: ClassVar[_Here] = here
    """Who asks."""
    ending: ClassVar[bool] = False
    """Is nothing to be begun in the background any more?"""

    def waiter(self, attachment: Attachment, label: str | None, _: Callable[[Any], None]) -> ThreadWaiter:
        """Return a new waiter: the caller."""
        return ThreadWaiter(attachment, here.caller, label)

    def open(
        self, opening: Callable[[], _T], unwanted: Callable[[_T], None], deadline: float = math.inf
    ) -> _T:
        """Run what opens a connection, and return it.

        A driver's connect can't be stopped from outside.  So with a deadline it runs in a thread of its own;
        when the time is over its caller leaves, and the opening goes on.  Where no thread can be started, it
        runs here, however long it takes.

        :param unwanted: is called with what was opened then.
        :param deadline: by ``time.monotonic``.
        :raises TooLate: the time is over.
        """
        if deadline == math.inf:
            return opening()
        future: Future[_T] = Future()
        run = functools.partial(contextvars.copy_context().run, _keep, future, opening)
        try:
            threading.Thread(target=run, name="sqla_queries_pool-opening", daemon=True).start()
        except RuntimeError:  # too many threads, or the interpreter is about to end
            return opening()
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            if future.done() and future.exception() is error:
                raise
            # It may be done by now: then this is called at once.
            future.add_done_callback(functools.partial(pass_on, unwanted))
            if isinstance(error, NotDone):
                raise TooLate from None
            raise

    def submit(self, worker: Worker, job: Callable[[], None]) -> bool:
        """Have ``job`` run in the background; return False where it can't be."""
        worker.submit(job)
        return True

    def pause(self, descriptors: Iterable[int], seconds: float) -> None:
        """Wait until there is news on one of these sockets, for so many seconds at most."""
        poll = select.poll()
        for fd in descriptors:
            poll.register(fd, select.POLLIN)
        poll.poll(1000 * seconds)

    def call(self, function: Callable[[], _T]) -> _T:
        """Run what may have to wait, for an application."""
        return function()

    def collect(self) -> None:
        """Collect all garbage."""
        gc.collect()


def _keep(future: Future[_T], opening: Callable[[], _T]) -> None:
    try:
        result = opening()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


THREADS = Threads()
"""The one that there is."""
