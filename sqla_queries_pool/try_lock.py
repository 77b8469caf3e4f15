"""A lock that is tried without a Python frame."""

from __future__ import annotations

import functools
import operator
from typing import Any


class TryLock:
    """Tries a lock, for ``if lock.taken_now: try: … finally: lock.release()``.

    An asynchronous exception (Ctrl-C, ``PyThreadState_SetAsyncExc``) may come after any call, so also between
    a call of ``acquire`` and the ``try``: then the lock would be taken for ever.  Python checks for such
    exceptions after calls, not after an attribute was loaded; and this property has no frame of its own.

    :param lock: a ``threading.Lock`` or ``RLock``.
    """

    __slots__ = ("_try", "release")

    def __init__(self, lock: Any) -> None:
        self._try = functools.partial(lock.acquire, False)
        self.release = lock.release

    taken_now = property(operator.methodcaller("_try"))
    """Take the lock if nobody has it.  Is it ours?"""
