"""After a fork the child starts empty, and the parent notices nothing (design 13).

A forked child has a copy of everything, sockets included.  What it sent on one of them, be it a rollback or
the Terminate message of a polite close, would arrive in the parent's session; and of the parent's threads
only the one that forked is here, so a lock that another one had is taken for ever.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from typing import Any

from ..budget.stats import ManagerStatistics
from ..concurrency.housekeeping import Housekeeper
from ..host.postman import postman
from ..logs import logger
from ..runtime import garbage
from ..runtime.core import Core
from .manager import PoolManager
from .pool import every_pool

INHERITED = "this connection belongs to the parent process: check out a new one after the fork"
"""What the holder of a connection is told in the child."""


def before_fork() -> None:
    """In the parent: import what the child needs and nobody else.  The child itself imports nothing: another
    thread of the parent may have been in the middle of that."""
    import ctypes  # noqa: F401


def after_fork_in_child() -> None:
    """In the child: forget all connections, and have locks and threads of its own."""
    postman.after_fork_in_child()  # first: pools have their leases counted anew
    PoolManager._lock = threading.RLock()
    PoolManager._gone = ManagerStatistics()
    Core.housekeeper = Housekeeper()
    garbage.after_fork_in_child()
    for pool in list(every_pool):
        try:
            _forget(pool.core)
        except Exception:  # the sockets of the others are the parent's all the same
            logger.exception("A forked child could not forget what %r had from its parent", pool)


def _forget(core: Core) -> None:
    for thing in core.after_fork_in_child():
        _keep(thing)
        _keep(getattr(thing, "handle", None))
        _keep(socket := getattr(thing, "socket", None))
        _cut_off(getattr(socket, "fileno", None))
        _cut_off(getattr(socket, "drivers_fileno", None))
        if hasattr(thing, "cut_off"):
            thing.cut_off(INHERITED)


def _keep(thing: Any) -> None:
    """Never finalize it, not even when the process ends: drivers close a connection then, or complain, and
    SQLite would roll back what the parent is doing."""
    import ctypes  # which is there, see before_fork()

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _cut_off(fileno: Callable[[], int] | None) -> None:
    """Let the descriptor of a connection lead nowhere: nothing can be sent to the parent's server any more.

    A holder in the child finds the connection broken.  The descriptor stays for the life of the child:
    closed, its number would soon be that of something else.

    :param fileno: tells the descriptor.
    """
    if fileno is None:  # a driver that has none to tell
        return
    try:
        fd = fileno()
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return
        os.close(fd)  # first, for there may be no other descriptor left
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != fd:
            try:
                os.dup2(nowhere, fd, inheritable=False)
            finally:
                os.close(nowhere)
    except Exception:  # closed already
        return


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork either
    os.register_at_fork(before=before_fork, after_in_child=after_fork_in_child)
