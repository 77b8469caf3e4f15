"""Which drivers tell the socket of a connection, and what stands for the socket of one that does not.

Nothing is asked of a connection whose driver is not known: what looks like a method may be anything, of a
mock or of a proxy that counts.
"""

from __future__ import annotations

from typing import Any, Final

TELLING: Final = {"psycopg", "psycopg2", "psycopg2cffi"}
"""Packages whose connections have ``fileno()``, also those of subclasses of them."""
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


def socket_of(handle: Any) -> Any:
    """Return the :attr:`.Slot.socket` of a DBAPI connection: itself, where its driver tells its socket."""
    # Not type(): a proxy that stands for a driver's connection (wrapt's, of tracers) says whose it is.
    kinds = getattr(handle.__class__, "__mro__", ())
    tells = any(kind.__module__.partition(".")[0] in TELLING for kind in kinds)
    return handle if tells else Unseen(handle)


def is_seen(socket: Any) -> bool:
    """Can the socket be looked at?"""
    try:
        return int(socket.fileno()) >= 0
    except Exception:  # no such method, or closed
        return False
