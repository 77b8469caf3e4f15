"""A pool's critical section, and the inbox for what may not wait for it.

* The ledger is touched inside alone, and nothing else is done inside: what the ledger returns as work is
  done afterwards, by ``effects``.
* A return of a connection never waits.  The garbage collector runs SQLAlchemy's finalizer in whichever thread
  it likes, also in one that is inside.  So whatever may come from a finalizer is posted: it is put into the
  inbox, and the thread that gets the lock empties the inbox.  A post tries the lock *after* having put its
  letter in, and every thread looks into the inbox after having released the lock, so that no letter lies
  unread: either the post got the lock, or the thread that had it looks into the inbox later than that.
* The lock is reentrant only in order to notice: ``inside`` says that its thread is inside already.  A post
  leaves its letter to the outer call, everything else raises
  :class:`~sqla_queries_pool.errors.CheckoutReentered` instead of waiting for itself for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ..budget.work import Work
from ..errors import CheckoutReentered
from ..logs import logger
from ..try_lock import TryLock

_T = TypeVar("_T")


class Doer(Protocol):
    """What does the work; see effects.py."""

    def do(self, work: Work) -> None:
        """Do it, in order."""

    def do_soon(self, work: Work) -> None:
        """Do at once what takes no time, and have the worker do the rest."""


class CriticalSection:
    """Runs operations of a ledger one at a time, and has the work done that they return.

    :param label: for people: which pool it is.
    :param clock: returns the pool's time in seconds.
    """

    effects: Doer
    """What does the work; it says so itself when it is made."""

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self.label = label
        """For people: engines say which database it is, without the password."""
        self.clock = clock
        self.lock = threading.RLock()
        """Guards the ledger, and nothing but the ledger."""
        self.attempt = TryLock(self.lock)
        """Takes the lock where nobody has it, for those who may not wait."""
        self.inside = False
        """Does an operation of the ledger run?  Written under the lock."""
        self.inbox: deque[tuple[Callable[..., Work | None], tuple[Any, ...]]] = deque()
        """What found the lock taken."""

    def decide(self, operation: Callable[..., _T], *args: Any) -> _T:
        """Run one operation of the ledger inside, and the inbox after it.

        :raises CheckoutReentered: this thread is inside already.
        """
        try:
            with self.lock:
                if self.inside:
                    raise self.reentered()
                self.inside = True
                try:
                    return operation(*args)
                finally:
                    self.inside = False
        finally:
            if self.inbox:
                self.settle()

    def run(self, operation: Callable[..., Work], *args: Any) -> None:
        """Run one operation of the ledger inside, then do the work that it returns.

        :raises CheckoutReentered: this thread is inside already.
        """
        self.effects.do(self.decide(operation, *args))

    def post(self, operation: Callable[..., Work | None], *args: Any) -> None:
        """Have an operation of the ledger run and its work done, now or by the thread that is inside.

        The operation gets the time as its last argument.  Never waits.
        """
        self.inbox.append((operation, args))
        self.settle()

    def settle(self) -> None:
        """Empty the inbox, unless another thread is inside, which then does so."""
        inbox = self.inbox
        while inbox and self.attempt.taken_now:
            work: Work = []
            failures: list[Exception] = []
            try:
                if self.inside:  # a finalizer of this very thread: the outer call settles
                    return
                self.inside = True
                try:
                    while inbox:
                        operation, args = inbox.popleft()
                        try:
                            work += operation(*args, self.clock()) or ()
                        except Exception as error:  # one bad letter keeps no other from being read
                            failures.append(error)
                finally:
                    self.inside = False
            except BaseException:
                self.effects.do_soon(work)
                raise
            finally:
                self.attempt.release()
            while failures:  # none stays in a variable: its traceback has this frame, and the caller's
                logger.error("%s: a posted operation failed", self.label, exc_info=failures.pop())
            # A thread that settles has come for something else, and may run a finalizer.
            self.effects.do_soon(work)

    def reentered(self) -> CheckoutReentered:
        """Return the error of a thread that is inside already."""
        return CheckoutReentered(
            f"{self.label}: a finalizer or a signal handler called this pool while its own thread was inside "
            "it. Don't check out or dispose there, nor in an event listener that a finalizer can run: set a "
            "flag, or start a thread, and do it later. Returning a connection is fine"
        )
