"""Checkouts that nobody ended: the collector found their connection, or their event loop is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from ..budget.slots import Slot

COLLECTED = "never closed; the garbage collector has returned it"
LOOP_ENDED = "still checked out when its event loop ended"

Listener: TypeAlias = Callable[[Slot, str], None]
listeners: Final[list[Listener]] = []
"""Called with the slot as its holder left it, and one of the above.  A listener may run inside a finalizer,
and so inside any lock: it notes what it was told, and that is all."""


def tell(slot: Slot, how: str) -> None:
    """Somebody has a connection no more, and has not returned it."""
    for listener in listeners:
        listener(slot, how)
