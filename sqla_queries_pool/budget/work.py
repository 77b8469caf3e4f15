"""The contract between deciding and doing: what the ledger returns, to be done outside the lock.

Each kind of work says what is to be done, and which operation reports that it was done.  The doing is in
runtime/effects.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from .slots import Attachment, Slot, Waiter


class Wake(NamedTuple):
    """Work: wake a waiter that has its answer."""

    waiter: Waiter


NOT_BEGUN = -1
"""The claim to a close that nobody has begun."""


class Close:
    """Work: close a connection, then report :meth:`Ledger.closed`.  The ledger sees whether it got lost."""

    __slots__ = ("__weakref__", "awaited", "claim", "entry", "queued", "reason", "slot")

    def __init__(self, slot: Slot, entry: Any, reason: str) -> None:
        self.slot = slot
        self.entry = entry
        """What SQLAlchemy closes, None where that has died: then the socket alone is closed."""
        self.reason = reason
        self.claim = [NOT_BEGUN]
        """Who takes it with ``pop`` ends the connection's socket.  :data:`NOT_BEGUN`, or a duplicate of its
        descriptor while listeners run; see runtime/closer.py."""
        self.awaited: float | None = None
        """When somebody first waited for this to be done, by the pool's clock."""
        self.queued = False
        """Is it the worker's to do, among others?"""


class Reset(NamedTuple):
    """Work: if the session that locked it is dead, :func:`locks.unlock` it, roll back, and
    :func:`locks.give_back` it."""

    slot: Slot


class Resetter:
    """Has the lock of a connection while it resets it.  If it dies before that is done, the lock is stale
    again."""

    __slots__ = ("__weakref__",)


class Renew(NamedTuple):
    """Work: close a connection and open it again, then report :func:`ages.renewed`.  Meanwhile it is
    held."""

    slot: Slot
    entry: Any
    since: float
    """Since when it is idle, by the pool's clock."""


class Fill(NamedTuple):
    """Work: open a connection for an engine that has fewer than its ``min_size``."""

    attachment: Attachment


class Leaked(NamedTuple):
    """Work: say that a connection has been held for long."""

    slot: Slot
    seconds: float
    """For how long, so far."""


class Returned(NamedTuple):
    """Work: say that it was returned after all."""

    slot: Slot
    seconds: float
    """For how long it was held."""


class Due(NamedTuple):
    """Work: see to it that :func:`ages.expire` is called at this time of the pool's clock."""

    at: float


Work: TypeAlias = list[Wake | Close | Reset | Renew | Fill | Leaked | Returned | Due]
