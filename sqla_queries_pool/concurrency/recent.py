"""One result for all who ask within a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The last result of something that takes long to make.

    One thread makes a result.  Threads that ask meanwhile, or a moment later, share it.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may run a finalizer while a result is made, and that may ask, too.
        self._lock = threading.RLock()
        self._last: tuple[T, float] | None = None
        """The last result, and when it was finished."""

    def get(self, make: Callable[[], T], seconds: float, clock: Callable[[], float]) -> tuple[T, bool]:
        """Return a result that is less than ``seconds`` old, and whether this call made it.

        :param make: makes a result; called by one thread at a time.
        :param seconds: for how long a result is shared, counted from its end: those who waited while it was
            made share it, however long that took.
        :param clock: a monotonic clock, in seconds.
        """
        with self._lock:
            if self._last is not None and clock() - self._last[1] < seconds:
                return self._last[0], False
            made = make()
            self._last = made, clock()
            return made, True
