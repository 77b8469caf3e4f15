"""Tasks of asyncio: which one asks, how one waits, opens and closes; and when an event loop ends.

What runs where.  A checkout runs in a greenlet of SQLAlchemy's, in the thread of its loop: it waits by
``await_only()``, which lets the loop go on.  The answer may come from any thread: in that of
the loop it sets the future directly, elsewhere by ``call_soon_threadsafe``, the one method of a loop that
other threads may call.  What is written here without a lock is written in the thread of the loop;
:meth:`TaskWaiter.accept` says how an answer has one owner.  Nobody awaits inside the critical section: a task
that did would let another one of the same thread in, and its lock, which is the thread's, would not keep it
out.

A loop can end in two ways.  ``asyncio.run()`` and its like close the asynchronous generators of a loop while
it still runs: one of ours hears of it, and closes the idle connections politely.  ``loop.close()`` alone
drops what the loop had to do later: a thing that dies with that tells of it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import functools
import gc
import itertools
import math
import threading
import time
import weakref
from asyncio import AbstractEventLoop, Future, Task
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Protocol, TypeVar

from sqlalchemy import exc
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from ..budget.slots import Attachment, Entry
from ..logs import logger
from .housekeeping import Worker
from .late import TooLate, pass_on

_T = TypeVar("_T")
FOREVER = 1e9
"""Seconds after which the thing that tells of a loop's end would be asked for: some thirty years."""
SLICE = 0.002
"""Seconds between two looks at whether the server has let go of a connection: it takes one to three
milliseconds, and to watch a descriptor would take longer."""
YOUNG = 1
"""The oldest generation that is collected while a checkout waits: all of them may take a second, in which
nothing else runs in the loop.  What was abandoned a moment ago is young."""
LONGEST_END = 1.0
"""Seconds for which the end of a loop waits for what is under way."""
TURNS = 3
"""How many turns of the loop transports need to close their sockets."""

_CAN_AWAIT = "__sqlalchemy_greenlet_provider__"
"""Of a greenlet: SQLAlchemy's mark of one in which ``await_only()`` can be used, since 2.0.24 or so."""
_number = itertools.count(1)
_asker: contextvars.ContextVar[TaskCaller | None] = contextvars.ContextVar(
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


class UsesLoop(Protocol):
    """What hears of the end of a loop: an engine's side."""

    def loop_ends(self, loop: Loop) -> None:
        """The loop is about to end; called in it, while it still runs."""

    def loop_ended(self, loop: Loop) -> None:
        """The loop is closed; called in any thread, by a finalizer."""


class _Sentinel:
    """What a loop drops when it is closed.

    :param generator: suspended; the loop closes it before it ends, where it does so at all.  It leads to the
        loop, so it must not be kept by anything but the loop.
    """

    __slots__ = ("__weakref__", "_generator")

    def __init__(self, generator: AsyncGenerator[None, None]) -> None:
        self._generator = generator
        with contextlib.suppress(StopIteration):
            generator.__anext__().send(None)  # to its yield; now the loop knows it

    def __call__(self) -> None: ...


class Loop:
    """The runtime of the engines whose callers are tasks of one event loop; see :class:`.Threads`.

    It does not keep the loop alive.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._users: weakref.WeakSet[UsesLoop] = weakref.WeakSet()
        self._unfinished: set[Future[Any]] = set()
        """Tasks of ours that are under way, to which a loop refers weakly; what drivers have to do yet."""
        self.here = self
        self.closed = False
        """Is the loop closed?"""
        self.ending = False
        """Was it said to end?  Then nothing begins in the background any more."""
        sentinel = _Sentinel(_until_the_end(self, self._users, self._unfinished))
        loop.call_later(FOREVER, sentinel)
        # It may die in any thread, at any moment; those who hear of it may not wait.
        self._ended = weakref.ref(sentinel, self._loop_ended)

    # -- who asks, and waits -----------------------------------------------------------------------

    @property
    def caller(self) -> TaskCaller:
        """The task that asks."""
        task, before = asyncio.current_task(self._loop()), _asker.get()
        if before is not None and before.task() is task:
            return before
        caller = TaskCaller(task, before)  # one that is inherited is the parent
        _asker.set(caller)
        return caller

    def waiter(self, attachment: Attachment, label: str | None, decline: Callable[[Any], None]) -> TaskWaiter:
        """Return a new waiter: the caller."""
        return TaskWaiter(attachment, self.caller, label, asyncio.get_running_loop(), decline)

    def pause(self, _: Iterable[int], seconds: float) -> None:
        """Let the loop run for a moment."""
        await_only(asyncio.sleep(min(seconds, SLICE)))

    def collect(self) -> None:
        """Collect young garbage."""
        gc.collect(YOUNG)

    # -- tasks of ours -----------------------------------------------------------------------------

    def open(
        self, opening: Callable[[], _T], unwanted: Callable[[_T], None], deadline: float = math.inf
    ) -> _T:
        """Run what opens a connection in a task of its own, and return it.

        Cancelled, the caller leaves, and the opening goes on: not every driver can be stopped in the middle,
        and until it is over the connection counts.

        :param unwanted: is called with what was opened then.
        :param deadline: when the caller leaves, too; by ``time.monotonic``.
        :raises TooLate: the time is over.
        """
        in_background = asyncio.current_task() in self._unfinished
        task = self._start_ours(opening) if in_background else self._start(opening)
        try:
            if deadline < math.inf:
                await_only(asyncio.wait({task}, timeout=max(0.0, deadline - time.monotonic())))
                if not task.done():
                    raise TooLate
                return task.result()
            return await_only(asyncio.shield(task))
        except BaseException:
            task.add_done_callback(functools.partial(pass_on, unwanted))
            raise

    def _start(self, function: Callable[[], _T]) -> Task[_T]:
        loop = asyncio.get_running_loop()
        # Not by the loop's factory: an eager one would begin at once, in the greenlet of the caller.
        task = Task(greenlet_spawn(function), loop=loop, name=f"sqla_queries_pool-{next(_number)}")
        self.finish(task)
        return task

    def _start_ours(self, function: Callable[[], _T]) -> Task[_T]:
        # It is not the application's: asyncio.run() cancels all tasks that it knows before the loop ends, and
        # not every driver likes that while it connects.  _until_the_end() waits for it.
        task = self._start(function)
        asyncio._unregister_task(task)
        return task

    def finish(self, future: Future[Any] | None) -> None:
        """Before the loop ends, wait for this, if it is anything."""
        if future is not None:
            self._unfinished.add(future)
            future.add_done_callback(self._unfinished.discard)

    def submit(self, _: Worker, job: Callable[[], None]) -> bool:
        """Have ``job`` run in a task of the loop; return False where the loop does not run."""
        loop = self._loop()
        runs = loop is not None and loop.is_running() and not self.ending
        return runs and self.soon(functools.partial(self._start_ours, job))

    def soon(self, function: Callable[[], object]) -> bool:
        """Run it in the thread of the loop, at once if that is this one; False if the loop is closed."""
        loop = self._loop()
        if loop is None:
            return False
        if asyncio._get_running_loop() is loop:
            function()
            return True
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:
            return False
        return True

    def soon_in_greenlet(self, function: Callable[[], None]) -> None:
        """Run it in a task of the loop, in which it may await as SQLAlchemy's adapters do."""
        self.soon(functools.partial(self._start_ours, function))

    def call(self, function: Callable[[], _T]) -> Any:
        """Run what may have to wait, for an application: at once in a greenlet, else to be awaited."""
        nothing = _nothing()
        try:
            await_only(nothing)
        except exc.MissingGreenlet:
            nothing.close()
            return greenlet_spawn(function)
        return function()

    # -- the end of the loop -----------------------------------------------------------------------

    def used_by(self, user: UsesLoop) -> None:
        """Call it at the end of the loop; it is not kept alive."""
        self._users.add(user)

    def _loop_ended(self, _: object) -> None:
        self.closed = self.ending = True
        for future in list(self._unfinished):
            _give_up(self._loop(), future)
        self._unfinished.clear()
        for user in list(self._users):
            try:
                user.loop_ended(self)
            except Exception:
                logger.exception("Exception at the end of an event loop")


def _give_up(loop: Any, future: Future[Any]) -> None:
    """Its loop is closed, so it never ends by itself: cancel it, as its loop would have.

    No collection would find it: a greenlet keeps what its frames refer to, which nobody can see, and they
    lead back to it by the socket that is being connected, the loop and the task.  In another thread than that
    of the loop it can't be done.
    """
    if not isinstance(future, Task):
        return
    future._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = future.get_coro()
    later: list[tuple[Any, tuple[Any, ...]]] = []
    with contextlib.suppress(AttributeError):  # uvloop's has none to be set, and closes its sockets itself
        loop.call_soon = lambda callback, *arguments, **_: later.append((callback, arguments))
    with contextlib.suppress(Exception, asyncio.CancelledError):
        coroutine.throw(asyncio.CancelledError())
    with contextlib.suppress(Exception, asyncio.CancelledError):  # it wants to await something yet
        coroutine.close()
    with contextlib.suppress(AttributeError):
        del loop.call_soon
    for callback, arguments in later:
        # What transports do in the next turn: they close their sockets.
        if getattr(callback, "__name__", "") == "_call_connection_lost":
            with contextlib.suppress(Exception):
                callback(*arguments)


async def _until_the_end(
    loop: Loop, users: Iterable[UsesLoop], unfinished: set[Future[Any]]
) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        loop.ending = True
        await _close_idle(loop, users)
        if unfinished:
            _, late = await asyncio.wait(unfinished, timeout=LONGEST_END)
            if late:
                for future in late:
                    future.cancel()
                await asyncio.wait(late, timeout=LONGEST_END)
            await _close_idle(loop, users)  # what was opened meanwhile


async def _close_idle(loop: Loop, users: Iterable[UsesLoop]) -> None:
    for user in list(users):
        user.loop_ends(loop)
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def _nothing() -> None: ...


@functools.cache
def _collect_without_awaiting() -> None:
    """Have no collection await anything, from now on.

    SQLAlchemy's finalizer of an abandoned connection, of any pool, says goodbye to the server where it is in
    a greenlet, and so lets other tasks run: also one that wants into the critical section in which this one
    is.  Elsewhere it just closes the connection.  A collection can begin at any allocation.
    """
    from greenlet import getcurrent  # type: ignore[import-untyped]  # without asyncio there may be none

    def collects(phase: str, _: object) -> None:
        greenlet = getcurrent()
        if phase == "stop":
            vars(greenlet).pop(_CAN_AWAIT, None)
        elif getattr(greenlet, _CAN_AWAIT, False):
            setattr(greenlet, _CAN_AWAIT, False)

    gc.callbacks.append(collects)
    atexit.register(gc.callbacks.remove, collects)  # then no loop runs, and greenlet may be gone


_loops: weakref.WeakKeyDictionary[AbstractEventLoop, Loop] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
"""Guards :data:`_loops`: loops of several threads come and go.  Reentrant, for a finalizer may ask, too."""


def running() -> Loop:
    """Return the runtime of the loop that runs in this thread.

    :raises MissingGreenlet: SQLAlchemy's; none does.
    """
    loop = asyncio._get_running_loop()
    if loop is None:
        raise exc.MissingGreenlet(
            "greenlet_spawn has not been called; no event loop runs in this thread. Use an asynchronous "
            "engine in a coroutine"
        )
    with _lock:
        found = _loops.get(loop)
        if found is None:
            _collect_without_awaiting()
            _loops[loop] = found = Loop(loop)
        return found
