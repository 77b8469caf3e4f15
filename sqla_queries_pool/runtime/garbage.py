"""Asking the garbage collector for connections that somebody abandoned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

GC_AFTER = 0.2
"""Seconds that a checkout waits before it asks the collector (design 11)."""
_GC_SHARE = 0.1
"""The largest share of the time that the process spends in collections that waiters asked for."""
_next_collection = 0.0
_collecting = threading.Lock()


def collect_garbage(collect: Callable[[], object]) -> None:
    """Collect, once per second and process at most, and less often where a collection takes long.

    While every thread waits nobody allocates, so the collector never runs by itself, and
    connections that were abandoned in reference cycles would never be returned.

    :param collect: the runtime's, which knows how long it may take.
    """
    global _next_collection
    if time.monotonic() < _next_collection or not _collecting.acquire(False):
        return
    try:
        start = time.monotonic()
        collect()
        took = time.monotonic() - start
        _next_collection = start + max(1.0, took / _GC_SHARE)
    finally:
        _collecting.release()


def after_fork_in_child() -> None:
    """In a forked child: a thread of the parent's may have been collecting."""
    global _collecting
    _collecting = threading.Lock()
