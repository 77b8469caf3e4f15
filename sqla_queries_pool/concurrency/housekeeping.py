"""What happens when nobody calls: one thread that looks after pools when something is due, and two
per pool, one that closes, and one that opens.

All are daemon threads that exist only while there is something to do.  They are fed through
``queue.SimpleQueue``, whose ``put`` may be called from a finalizer in any thread at any moment, so
nothing here can block or deadlock a check-in.
"""

from __future__ import annotations

import _thread
import contextlib
import operator
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from ..logs import logger
from ..try_lock import TryLock

_call = operator.methodcaller("__call__")
LONGEST_SLEEP = 3600.0
"""Seconds; Python can wait for some centuries at most, and people write larger numbers."""


class Sweepable(Protocol):
    """What the housekeeper looks after: a pool."""

    def sweep(self) -> None:
        """Do what is due, and have itself scheduled again for what is due later."""

    def neglected(self) -> None:
        """Nobody looks after it any more: it is to schedule itself at its next use."""


class _PartTimeThread:
    """A daemon thread that runs ``body`` when there is mail and ends when ``body`` returns.

    The caller that finds the lock free starts the thread, which has it for as long as it lives.  It looks
    at its mail once more after it has released the lock: mail that came in between found the lock
    taken and relied on it.
    """

    def __init__(self, name: str, body: Callable[[SimpleQueue[Any]], None]) -> None:
        self._name = name
        self._body = body
        self._mail: SimpleQueue[Any] = SimpleQueue()
        self._running = TryLock(threading.Lock())

    def post(self, item: Any) -> None:
        self._mail.put(item)
        self.start()

    def start(self) -> None:
        """Start the thread unless it runs."""
        if sys.is_finalizing():  # no thread starts any more; gevent's locks raise when they are tried then
            return
        # The one that takes it has to release the lock: the thread, or this one if it could not start it.
        # An asynchronous exception can come when the thread has been started already.
        token = [self._running.release]
        if self._running.taken_now:
            try:
                # threading.Thread.start() takes a lock of the module's own and waits for the thread: a
                # finalizer that runs inside threading.enumerate() would deadlock there.  So a bare
                # thread starts the real one, which has a name and is seen by threading.enumerate().
                _thread.start_new_thread(self._launch, (token,))
            except BaseException as error:
                with contextlib.suppress(IndexError):  # it is the thread's by now
                    # Taken and called without a bytecode in between: another such exception may come.
                    deque(map(_call, iter(token.pop, None)), 0)
                # Too many threads, or the interpreter is about to end: the next post tries again.
                if not isinstance(error, RuntimeError):
                    raise

    def _launch(self, token: list[Callable[[], None]]) -> None:
        try:
            token.pop()
        except IndexError:
            return
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except BaseException:
            self._running.release()

    def _run(self) -> None:
        try:
            self._body(self._mail)
        finally:
            self._running.release()
            if not self._mail.empty():
                self.start()


class Housekeeper:
    """Calls ``sweep()`` of pools at the times they asked for.  It keeps no pool alive."""

    def __init__(self) -> None:
        self._due: dict[weakref.ref[Sweepable], float] = {}
        """Pool -> when; touched by the thread alone."""
        self._thread = _PartTimeThread("sqla_queries_pool housekeeper", self._run)

    def schedule(self, pool: Sweepable, delay: float) -> None:
        """Have ``pool`` swept in ``delay`` seconds, or sooner; callable from a finalizer.

        Of several times the earliest counts: what is due later the sweep finds itself.
        """
        # A pool that dies is mail, too: the thread need not stay until its time would have come.
        ref = weakref.ref(pool, self._thread.post)
        hash(ref)  # which the reference keeps; asked for the first time after the death, it has none
        self._thread.post((time.monotonic() + max(0.0, delay), ref))

    def _run(self, mail: SimpleQueue[Any]) -> None:
        try:
            self._look_after(mail)
        except BaseException:
            # The next checkout of one of them starts the thread again.
            for pool in [ref() for ref in self._due]:
                if pool is not None:
                    pool.neglected()
            raise

    def _look_after(self, mail: SimpleQueue[Any]) -> None:
        due = self._due
        while True:
            pause = min(due.values()) - time.monotonic() if due else 0.0
            try:
                self._read(mail.get(timeout=min(LONGEST_SLEEP, max(0.0, pause))))
                while True:
                    self._read(mail.get_nowait())
            except Empty:
                if not due:
                    return
            now = time.monotonic()
            for ref in sorted((ref for ref, when in due.items() if when <= now), key=due.__getitem__):
                del due[ref]  # first: what the sweep asks for is for later
                self._sweep(ref)

    def _read(self, item: Any) -> None:
        """Note when a pool is to be swept, or that it has died."""
        if not isinstance(item, tuple):
            self._due.pop(item, None)
            return
        when, ref = item
        self._due[ref] = min(when, self._due.get(ref, when))

    @staticmethod
    def _sweep(ref: weakref.ref[Sweepable]) -> None:
        pool = ref()
        if pool is not None:
            try:
                pool.sweep()
            except Exception:
                logger.exception("Exception in the housekeeping of %r", pool)


class Worker:
    """Runs one pool's jobs, one after the other, so that a socket that blocks stops no other pool.

    :param name: of its thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = _PartTimeThread(name, self._work)

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` soon; callable from a finalizer."""
        self._thread.post(job)

    @staticmethod
    def _work(mail: SimpleQueue[Any]) -> None:
        while True:
            try:
                job = mail.get_nowait()
            except Empty:
                return
            try:
                job()
            except BaseException:  # a listener's, and there is nobody else to tell
                logger.exception("Exception in the background")
            # Not before the next job: nothing of this one may stay alive in a local variable.
            del job
