"""What any thread may do to a connection that belongs to an event loop: look at it, hang it up, close it.

The driver's own methods are for the thread of its loop alone.  A socket is not: ``shutdown()`` on a duplicate
of its descriptor frees the server's backend at once, also while the loop is blocked, and the driver notices
by itself when its loop runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

from ..logs import logger
from .async_drivers import AsyncDriver, known
from .liveness import Failed, hang_up, unheard


class OfLoop(Protocol):
    """What is needed of a loop's runtime."""

    def soon(self, function: Callable[[], None]) -> bool:
        """Run it in the thread of the loop, at once if that is this one; False if the loop is closed."""

    def soon_in_greenlet(self, function: Callable[[], None]) -> None:
        """Run it in a task of the loop, in which it may await as SQLAlchemy's adapters do."""

    def finish(self, future: Any) -> None:
        """Before the loop ends, wait for this, if it is anything."""


class LoopSocket:
    """The socket of a connection of asyncio.

    It has a duplicate of the descriptor: drivers close theirs by themselves, and its number may be something
    else's by then.

    :param handle: SQLAlchemy's adapted connection.
    :param runtime: that of its loop.
    :param failed: is told what can't be done.
    """

    __slots__ = ("_closed", "_driver", "_failed", "_fd", "_handle", "_runtime", "drivers_own")

    def __init__(self, handle: Any, runtime: OfLoop, failed: Failed = unheard) -> None:
        self._fd = -1
        self._failed = failed
        self._closed = False
        self._handle = handle
        self._runtime = runtime
        self.drivers_own: Any = getattr(handle, "driver_connection", handle)
        """The driver's own connection."""
        self._driver: AsyncDriver | None = known(self.drivers_own)
        if self._driver is not None:
            with contextlib.suppress(Exception):  # closed already, or a pipe
                if (fd := self._driver.descriptor(self.drivers_own)) >= 0:
                    self._fd = os.dup(fd)

    @property
    def known(self) -> bool:
        """Can the connection be closed without waiting?"""
        return self._driver is not None

    def fileno(self) -> int:
        """The duplicate, -1 where the driver's socket can't be had, or it was closed."""
        return -1 if self._closed else self._fd

    def drivers_fileno(self) -> int:
        """The driver's own descriptor, -1 where it has none, or none any more."""
        try:
            return self._driver.descriptor(self.drivers_own) if self._driver is not None else -1
        except Exception:
            return -1

    def close(self) -> None:
        """Close the connection without waiting for anything; in any thread."""
        try:
            if self._driver is None:
                self._runtime.soon_in_greenlet(self._handle.close)
            elif not self._runtime.soon(self._end):
                self._driver.bury(self.drivers_own)
        finally:
            # The loop may be blocked, and the duplicate keeps the stream open.
            hang_up(self, socket.SHUT_WR, self._failed)
            self._closed = True

    def _end(self) -> None:
        assert self._driver is not None
        try:
            self._runtime.finish(self._driver.end(self.drivers_own))
        except Exception as error:  # closed meanwhile, mostly; its socket is shut down anyway
            logger.debug("exception while ending a connection of an event loop: %r", error)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
