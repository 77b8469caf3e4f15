"""Which drivers tell the socket of a connection, and what stands for the socket of one that does not.

Nothing is asked of a connection whose driver is not known: what looks like a method may be anything, of a
mock or of a proxy that counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

TELLING: Final = {"psycopg", "psycopg2", "psycopg2cffi"}
"""Packages whose connections have a ``fileno()`` for any thread, also those of subclasses of them."""
ASKED_ONCE: Final[Mapping[str, Callable[[Any], int]]] = {
    # Public; but while a thread uses the connection, another one gets an error.
    "MySQLdb": lambda connection: connection.fileno(),
    # Private, for there is no public way.  Where it is gone the connection is one that can't be seen.
    "pymysql": lambda connection: connection._sock.fileno(),
    "pg8000": lambda connection: connection._usock.fileno(),
    # The public ``socket`` closes the descriptor a second time when it is collected.
    "mariadb": lambda connection: connection._get_socket(),
}
"""Packages whose connections tell their descriptor in another way -> how."""
MOCKS: Final = {"mock", "unittest"}
"""Packages whose objects say that they are whatever they stand for, and count what is asked of them."""
UNSEEN_FOR: Final = 0.5
"""Seconds for which a connection may be idle and is still used without a ping, where its socket can't be
seen.  As HikariCP has it (``aliveBypassWindowMs``), which never looks at sockets."""


class Unseen:
    """A connection whose socket can't be had: it can be closed, and that is all."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def close(self) -> None:
        """Close it, as its driver does."""
        self._handle.close()


class Remembered:
    """A connection whose driver was asked for the descriptor once, right after connecting.

    Later a driver may be busy, or have closed it, and then the number is soon somebody else's.  The number of
    the inode tells: no other socket has it while this one is open.

    :raises Exception: it has no socket that can be seen.
    """

    __slots__ = ("_fd", "_handle", "_inode")

    def __init__(self, handle: Any, descriptor: Callable[[Any], int]) -> None:
        self._handle = handle
        self._fd = int(descriptor(handle))
        self._inode = os.fstat(self._fd).st_ino

    def fileno(self) -> int:
        """The driver's own descriptor; -1 where it has closed it."""
        try:
            return self._fd if os.fstat(self._fd).st_ino == self._inode else -1
        except OSError:
            return -1

    def close(self) -> None:
        """Close it, as its driver does."""
        self._handle.close()


def socket_of(handle: Any) -> Any:
    """Return the :attr:`.Slot.socket` of a DBAPI connection: itself, where its driver tells its socket."""
    if _package(type(handle)) in MOCKS:
        return Unseen(handle)
    # Not type(): a proxy that stands for a driver's connection (wrapt's, of tracers) says whose it is.
    for kind in getattr(handle.__class__, "__mro__", ()):
        package = _package(kind)
        if package in TELLING:
            return handle
        if package in ASKED_ONCE:
            try:
                return Remembered(handle, ASKED_ONCE[package])
            except Exception:  # another version of the driver, which has no such thing
                break
    return Unseen(handle)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def is_seen(socket: Any) -> bool:
    """Can the socket be looked at?"""
    try:
        return int(socket.fileno()) >= 0
    except Exception:  # no such method, or closed
        return False
