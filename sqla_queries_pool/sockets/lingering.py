"""Connections that were closed, and that the server may not have let go of yet (design 20).

PostgreSQL goes on counting a backend for some milliseconds after its client has said goodbye.  It leaves the
socket open until the process has ended, so that a client that cares can wait for the end of the stream: see
``socket_close()`` in its ``src/backend/libpq/pqcomm.c``.  Here a duplicate of the descriptor waits, and an
open waits for it where there would be one too many otherwise.  So a close never waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..try_lock import TryLock
from .liveness import AVAILABLE, Failed, borrowed, hang_up, unheard

LONGEST = 1.0
"""Seconds for which the server is waited for."""
FOLLOW: Final = "wait for the server to let go of what was closed"
_SLICE = 0.05
"""Seconds after which an open that waits counts again: fewer may be open by then, too."""


class Lingering:
    """The closed connections of a pool that the server may still count.

    A close may happen in a finalizer, in any thread, so no thread waits for a lock here.  The one that finds
    it free looks at the descriptors and closes them, alone: the number of one that another thread has
    closed would soon be that of a new connection, whose bytes a look would take away.

    :param schedule: has :meth:`sweep` called in so many seconds.
    :param failed: is told where a connection can't be followed.
    """

    def __init__(self, schedule: Callable[[Lingering, float], None], failed: Failed = unheard) -> None:
        self._schedule = schedule
        self._failed = failed
        self._ends: dict[int, float] = {}
        """The duplicate of a descriptor -> until when it is waited for, by ``time.monotonic``."""
        self._scheduled = False
        self._looking = TryLock(threading.Lock())

    def __len__(self) -> int:
        return len(self._ends)

    @contextlib.contextmanager
    def closing(self, socket_: Any, seconds: float) -> Iterator[None]:
        """The block closes a connection; the server is then waited for, for so many seconds at most.

        :param socket_: the connection's :attr:`.Slot.socket`.
        """
        own = fd = -1
        try:
            if AVAILABLE:
                own = socket_.fileno()
                if not _takes_more(own):
                    # Else a driver that says goodbye blocks.
                    hang_up(socket_, socket.SHUT_WR, self._failed)
                fd = os.dup(own) if seconds > 0 else -1
        except OSError as error:
            if error.errno != errno.EBADF:
                self._failed(FOLLOW, error)
        except Exception:  # it is closed already; or there is none, which liveness says
            pass
        try:
            yield
        finally:
            if fd >= 0 and _fileno(socket_) == own:
                os.close(fd)  # its driver has not closed it, but given it to another: a pool below this one
            elif fd >= 0:
                self._follow(fd, seconds)

    def cut(self, fd: int, seconds: float) -> None:
        """Shut a connection down while something else is to be done before its close.

        :param fd: of :func:`duplicate`; it belongs to this object from now on.
        :param seconds: for which the server is waited for.
        """
        self._follow(fd, seconds)

    def _follow(self, fd: int, seconds: float) -> None:
        # A close ends the stream; with a duplicate open it has to be said.
        try:
            with borrowed(fd) as end:
                end.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the server was first
                self._failed(FOLLOW, error)
        if _is_gone(fd):
            os.close(fd)
            return
        self._ends[fd] = time.monotonic() + seconds  # from now on it belongs to the thread that looks
        if not self._scheduled:
            self._scheduled = True
            self._schedule(self, seconds)

    def wait(
        self, room: Callable[[], float], seconds: float, pause: Callable[[list[int], float], None]
    ) -> None:
        """Wait until no more are left than there is room for, for so many seconds at most.

        :param room: also below zero, where the limit was lowered: then until none is left.
        :param pause: waits until there is news on one of these descriptors, or for so many seconds.
        """
        deadline = time.monotonic() + seconds
        while len(self._ends) > max(0, room()):
            self._prune()
            left = deadline - time.monotonic()
            if len(self._ends) <= max(0, room()) or left <= 0:
                return
            pause(list(self._ends), min(left, _SLICE))

    def still(self) -> int:
        """Look which of them are gone; return how many are left."""
        self._prune()
        return len(self._ends)

    def sweep(self) -> None:
        """Forget those that are gone, and those that have had their time."""
        self._scheduled = False
        self._prune()
        if self._ends and not self._scheduled:
            self._scheduled = True
            self._schedule(self, max(0.0, min(self._ends.copy().values(), default=0.0) - time.monotonic()))

    def neglected(self) -> None:
        """The housekeeper's thread has died: the next one that is closed comes back to it."""
        self._scheduled = False

    def forget(self) -> None:
        """Wait for none of them any more.  Nobody else may use this object by now."""
        for fd in list(self._ends):
            self._drop(fd)

    def _prune(self) -> None:
        if self._looking.taken_now:
            try:
                now = time.monotonic()
                for fd, until in self._ends.copy().items():
                    if now >= until or _is_gone(fd):
                        self._drop(fd)
            finally:
                self._looking.release()

    def _drop(self, fd: int) -> None:
        if self._ends.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # a program that becomes a daemon closes all that is open
                os.close(fd)

    def __del__(self) -> None:
        self.forget()


def duplicate(socket_: Any) -> int:
    """Return a descriptor of its own for a connection, -1 where it can't be had.

    :param socket_: its :attr:`.Slot.socket`, which nobody closes meanwhile.
    """
    try:
        return os.dup(socket_.fileno()) if AVAILABLE else -1
    except Exception:  # it is closed already, or the driver has no descriptor to tell
        return -1


def let_go(fd: int) -> None:
    """Close what :func:`duplicate` returned."""
    os.close(fd)


def _fileno(socket_: Any) -> int:
    try:
        return int(socket_.fileno())
    except Exception:  # closed
        return -1


def _takes_more(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _is_gone(fd: int) -> bool:
    """Has the server closed its side?  What it has said before that is of no interest."""
    try:
        with borrowed(fd) as end:
            while end.recv(4096, socket.MSG_DONTWAIT):
                pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
