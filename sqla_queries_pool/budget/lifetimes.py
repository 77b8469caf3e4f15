"""Which connection's lifetime is over, and which one is being renewed: one at a time."""

from __future__ import annotations

import heapq
import math
import weakref
from typing import Any

from .slots import HELD, IDLE, Attachment, Slot

LONGEST_RENEWAL = 5.0
"""Seconds for which the others wait for the renewal of one."""


class Lifetimes:
    """The lifetimes of one pool's connections.  Times are by the pool's clock."""

    __slots__ = ("_ends", "_next_at", "_renewing")

    def __init__(self) -> None:
        self._ends: list[tuple[float, int, weakref.ref[Slot]]] = []
        """Heap: when the lifetime of a connection is over; also of some that are gone by then."""
        self._renewing: dict[Slot, None] = {}
        """Mostly one, see :meth:`begin`."""
        self._next_at = -math.inf
        """When the next one is renewed, though the renewal of one is not over."""

    def __len__(self) -> int:
        """How many ends are noted, including those of connections that are gone."""
        return len(self._ends)

    def add(self, slot: Slot) -> float:
        """Note when the lifetime of a connection is over, and return it: ``inf`` for never."""
        if slot.expires < math.inf:
            heapq.heappush(self._ends, (slot.expires, id(slot), weakref.ref(slot)))
        return slot.expires

    def begin(self, now: float) -> tuple[Slot, Attachment, Any] | None:
        """Begin to renew the next idle connection whose lifetime is over, unless one is being renewed.

        Not for long: its event loop may have stopped in the middle, or its server not answer.

        One that is held is renewed when it is returned.

        :return: the slot, its engine and its entry, or None.
        """
        while self._ends and self._ends[0][0] <= now and (not self.renewing or now >= self._next_at):
            slot = heapq.heappop(self._ends)[2]()
            if slot is None or slot.state is not IDLE or slot.expires > now or slot.handle is None:
                continue
            attachment = slot.home() if slot.home is not None else None
            entry = slot.entry() if slot.entry is not None else None
            if attachment is None or entry is None:
                continue
            self._renewing = {**dict.fromkeys(self.renewing), slot: None}
            self._next_at = now + LONGEST_RENEWAL
            return slot, attachment, entry
        return None

    def end(self, slot: Slot) -> None:
        """The connection was renewed, or could not be."""
        self._renewing.pop(slot, None)

    @property
    def renewing(self) -> list[Slot]:
        """The connections that are being renewed: one at a time, so that few are missed, but for those that
        take too long.

        They are held meanwhile, by nobody.  One that is not has lost its renewal to an interrupt: the next
        one goes on.
        """
        return [slot for slot in list(self._renewing) if slot.state is HELD and slot.holder is None]

    @property
    def due(self) -> float:
        """When the next one is renewed, ``inf`` for never.  The end of a renewal begins the next, too."""
        if not self._ends:
            return math.inf
        return self._ends[0][0] if not self.renewing else max(self._ends[0][0], self._next_at)
