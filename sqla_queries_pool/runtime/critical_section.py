"""The lock of a pool, and the inbox for what may not wait for it.

* The ledger is touched under the lock alone, and nothing else is done under it: what the ledger
  returns is done afterwards, by :meth:`CriticalSection._do`.
* A check-in never waits.  The garbage collector runs SQLAlchemy's finalizer in whichever thread it
  likes, also in one that is inside the lock.  So whatever may come from a finalizer goes through
  :meth:`CriticalSection._post`: it is put into the inbox, and whoever can get the lock empties it.  A post
  tries the lock *after* having put its letter in, and everybody looks at the inbox after having let
  go of the lock, so that no letter lies unread: either the post got the lock, or the one who had it
  then looks at the inbox later than that.
* The lock is reentrant only in order to notice: ``_inside`` says that its thread is inside the
  ledger already.  A post leaves its letter to the outer call, everything else raises
  :class:`~sqla_queries_pool.errors.CheckoutReentered` instead of waiting for itself for ever.
"""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from ..budget.slots import Work
from ..errors import CheckoutReentered
from ..logs import logger

_T = TypeVar("_T")


class CriticalSection:
    """Runs operations of a ledger one at a time, and has the work done that they return."""

    def __init__(self, label: str, time_method: Callable[[], float] | None) -> None:
        self.label = label
        """For people: engines say which database it is, without the password."""
        self._clock = time_method or time.monotonic
        self._make_lock()

    def _make_lock(self) -> None:
        """Make the lock and the inbox: at first, and again in a forked child, where another thread of
        the parent's may have had the lock for ever."""
        self._lock = threading.RLock()
        """Guards the ledger, and nothing but the ledger."""
        self._try_lock = functools.partial(self._lock.acquire, False)
        self._inside = False
        """Is a method of the ledger running?  Written under the lock."""
        self._inbox: deque[tuple[Callable[..., Work | None], tuple[Any, ...]]] = deque()
        """What found the lock taken."""

    _locked_now = property(operator.methodcaller("_try_lock"))
    """Try the lock; is it ours?  For ``if self._locked_now: try: … finally: release``.

    An asynchronous exception (Ctrl-C, ``PyThreadState_SetAsyncExc``) may come after any call, so also
    between a call of ``acquire`` and the ``try``, and the lock would be taken for ever.  Python checks for
    them after calls, not after an attribute was loaded; and this property has no frame of its own."""

    def _do(self, work: Work) -> None:
        """Do what the ledger decided, outside the lock."""
        raise NotImplementedError

    def _do_soon(self, work: Work) -> None:
        """Do at once what takes no time, and have somebody else do the rest."""
        raise NotImplementedError

    def _decide(self, operation: Callable[..., _T], *args: Any) -> _T:
        """Run one operation of the ledger under the lock, and the inbox after it.

        :raises CheckoutReentered: this thread is inside the ledger already.
        """
        try:
            with self._lock:
                if self._inside:
                    raise self._reentered()
                self._inside = True
                try:
                    return operation(*args)
                finally:
                    self._inside = False
        finally:
            if self._inbox:
                self._settle()

    def _post(self, operation: Callable[..., Work | None], *args: Any) -> None:
        """Have an operation of the ledger run and its work done, now or by whoever has the lock.

        The operation gets the time as its last argument.  Never waits.
        """
        self._inbox.append((operation, args))
        self._settle()

    def _settle(self) -> None:
        inbox = self._inbox
        while inbox and self._locked_now:
            work: Work = []
            failures: list[Exception] = []
            try:
                if self._inside:  # a finalizer of this very thread: the outer call settles
                    return
                self._inside = True
                try:
                    while inbox:
                        operation, args = inbox.popleft()
                        try:
                            work += operation(*args, self._clock()) or ()
                        except Exception as error:  # one bad letter keeps no other from being read
                            failures.append(error)
                finally:
                    self._inside = False
            except BaseException:
                self._do_soon(work)
                raise
            finally:
                self._lock.release()
            while failures:  # none stays in a variable: its traceback has this frame, and the caller's
                logger.error("%s: a letter failed", self.label, exc_info=failures.pop())
            # Whoever settles has come for something else, and may be a finalizer.
            self._do_soon(work)

    def _reentered(self) -> CheckoutReentered:
        return CheckoutReentered(
            f"{self.label}: the garbage collector ran a finalizer inside the connection pool, and it "
            "asked the same pool for a connection; do not use an engine in a finalizer or in an "
            "event listener that one can run (a check-in is fine)"
        )
