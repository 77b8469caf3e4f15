"""The runtime of an event loop: which task calls, how what takes time is begun, and when the loop ends.

What runs where.  A checkout runs in a greenlet of SQLAlchemy's, in the thread of its loop: it waits by
``await_only()``, which lets the loop go on.  What is written here without a lock is written in the thread of
the loop.  Nobody awaits inside the critical section: a task that did would let another one of the same thread
in, and its lock, which is the thread's, would not keep it out.

A loop can end in two ways.  ``asyncio.run()`` and its like close the asynchronous generators of a loop while
it still runs: one of ours hears of it, and closes the idle connections politely.  ``loop.close()`` alone
drops what the loop had to do later: a thing that dies with that tells of it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
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

from ..budget.slots import Attachment
from ..logs import logger
from .housekeeping import Worker
from .late import TooLate, pass_on
from .tasks import FOREVER, TaskCaller, TaskWaiter, asker

_T = TypeVar("_T")
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
        task, before = asyncio.current_task(self._loop()), asker.get()
        if before is not None and before.task() is task:
            return before
        caller = TaskCaller(task, before)  # one that is inherited is the parent
        asker.set(caller)
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
