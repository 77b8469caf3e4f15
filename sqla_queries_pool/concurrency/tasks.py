"""Tasks of asyncio: which one asks, and how one waits.  loops.py has the runtime of their event loop.

The answer to a task that waits may come from any thread: in that of the loop it sets the future directly,
elsewhere by ``call_soon_threadsafe``, the one method of a loop that other threads may call.  What is written
here without a lock is written in the thread of the loop; :meth:`TaskWaiter.accept` says how an answer has one
owner.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from asyncio import AbstractEventLoop, Future, Task
from collections.abc import Callable
from typing import Any

from sqlalchemy.util.concurrency import await_only

from ..budget.slots import Attachment, Entry

FOREVER = 1e9
"""Seconds after which nothing is waited for any more: some thirty years."""
asker: contextvars.ContextVar[TaskCaller | None] = contextvars.ContextVar(
    "sqla_queries_pool_task", default=None
)
"""The task that checked out last here; a task that is started inherits it, and so knows its parent."""


class TaskCaller:
    """A task that has used a pool.  Unlike a thread's, its end proves nothing: another one may return what it
    has (``async with`` in SQLAlchemy closes in a task of its own, ``asyncio.wait_for`` may open in one)."""

    __slots__ = ("__weakref__", "_name", "_parent", "ident", "task")

    ended = False

    def __init__(self, task: Task[Any] | None, parent: TaskCaller | None) -> None:
        self.ident = threading.get_ident()
        """The thread of its loop."""
        self._name = "a callback" if task is None else f"task {task.get_name()!r}"
        self.task: Callable[[], Task[Any] | None] = _no_task if task is None else weakref.ref(task)
        """The task, while it exists."""
        self._parent = None if parent is None else weakref.ref(parent)

    @property
    def alive(self) -> bool:
        """Does the task still run?"""
        return (task := self.task()) is not None and not task.done()

    @property
    def number(self) -> int:
        """The same for all that this task holds and waits for, and no other's."""
        return id(self)

    @property
    def name(self) -> str:
        """What it is called."""
        if (task := self.task()) is not None:
            self._name = f"task {task.get_name()!r}"
        return self._name if self.alive or self.task is _no_task else f"{self._name}, which has ended"

    @property
    def parents(self) -> tuple[int, ...]:
        """The numbers of the tasks that have started it, the nearest first, as far as they used a pool and
        still run: they may wait for it to end."""
        found: list[int] = []
        caller = self if self._parent is None else self._parent()
        while caller is not None and caller is not self and caller.number not in found:
            if caller.alive:
                found.append(caller.number)
            caller = None if caller._parent is None else caller._parent()
        return tuple(found)


def _no_task() -> None:
    """A callback of the loop is in no task."""


class TaskWaiter:
    """A waiter that is a task: a future of its loop.

    The ledger writes ``answer`` inside the critical section.  See :class:`.ThreadWaiter`.
    """

    __slots__ = (
        *("_decline", "_future", "_loop", "_unclaimed", "_woken"),
        *("answer", "attachment", "before", "caller_class", "holder", "label", "since", "stood_still"),
    )

    attachment: Attachment
    """The engine's side for which it waits, in its loop."""
    holder: TaskCaller
    """The waiting task: it will hold what it is given."""
    since: float
    """When it joined the queue, by the pool's clock; written by the ledger."""
    before: int
    """How many of its queue had their answer when it joined, or looked last; written by the ledger first."""
    stood_still: float
    """For how many seconds it could not be served, because its loop stood still; written by itself."""
    answer: Entry | None
    """What it was given; written once, by the ledger, inside the critical section."""
    label: str | None
    """What its task calls what it does (labels.py)."""
    caller_class: str | None
    """The class of its checkout; written by the ledger, where there are classes."""

    def __init__(
        self,
        attachment: Attachment,
        holder: TaskCaller,
        label: str | None,
        loop: AbstractEventLoop,
        decline: Callable[[TaskWaiter], None],
    ) -> None:
        self.attachment = attachment
        self.holder = holder
        self.label = label
        self.caller_class = None
        self.since = self.stood_still = 0.0
        self.answer = None
        self._loop = loop
        self._decline = decline
        self._future: Future[None] | None = None
        self._woken = False
        self._unclaimed = [True]

    def wait(self, seconds: float) -> None:
        """Let the loop run until :meth:`wake` is called, for ``seconds`` at most."""
        if self._woken:
            return
        self._future = future = self._loop.create_future()
        timer = self._loop.call_later(seconds, _finish, future) if seconds < FOREVER else None
        try:
            await_only(future)
        finally:
            self._future = None
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Wake the waiter; called once, by the thread that has to do the ledger's work.

        A loop that does not run, or is closed, would keep its answer from all others: it goes to the next,
        and the waiter, if it ever runs again, takes its old place.
        """
        loop = self._loop
        if asyncio._get_running_loop() is loop:
            self._wake()
            return
        try:
            running = loop.is_running()
            loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # closed
            running = False
        if not running:
            self._decline(self)

    def _wake(self) -> None:
        self._woken = True
        if self._future is not None:
            _finish(self._future)

    def accept(self) -> Entry | None:
        """Return what it was given, once: to the waiter, or to the thread that passes it on.

        ``list.pop`` is atomic, so one of them gets it.
        """
        if self.answer is None or not self._unclaimed:
            return None
        try:
            self._unclaimed.pop()
        except IndexError:
            return None
        return self.answer


def _finish(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)
