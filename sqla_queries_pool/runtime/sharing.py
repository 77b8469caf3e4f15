"""What a share of a host's budget (host/share.py) sees of its pool, and changes in it."""

from __future__ import annotations

import math
from typing import Any

from ..budget import engines
from ..budget.slots import SUSPENDED, Attachment
from ..budget.state import DEFAULT_LIMIT
from ..host.policy import IDLE_FOR, Own

NOTHING = Own(0, 0, 0, 0, 0.0, 0)


class SharedPool:
    """One pool, as its share sees it.

    :param core: the pool's, which has other parts after a fork.
    """

    def __init__(self, core: Any) -> None:
        self._core: Any = core
        self.label = core.section.label

    def leave(self) -> None:
        """The pool shares nothing any more."""
        self._core = None

    def size(self) -> int:
        """The ``max_size`` of this process: what was set for the pool, else the largest of its engines."""
        if self._core is None:
            return 0
        if self._core.stated_limit is not None:
            return int(self._core.stated_limit)
        stated = [q.stated for q in list(self._core.ledger.attachments.values()) if q.stated is not None]
        return int(max(stated, default=DEFAULT_LIMIT))

    def waiting(self) -> int:
        """Return how many checkouts wait; takes no lock."""
        return 0 if self._core is None else int(self._core.numbers.waiting)

    def own(self) -> Own:
        """Return what the pool has and wants."""
        if self._core is None:
            return NOTHING
        self.label = self._core.section.label
        own: Own = self._core.section.decide(self._own)
        lingering = self._core.connections.lingering
        return own._replace(used=own.used + lingering.still()) if lingering else own

    def _own(self) -> Own:
        ledger, now = self._core.ledger, self._core.now()
        everyone = list(ledger.everyone())
        n = ledger.numbers()
        waiting = sum(_may_have(attachment, ledger.wanting(attachment)) for attachment in everyone)
        spare = 0
        if not waiting:
            spare = n.hollow + sum(
                entry.slot.since <= now - IDLE_FOR for attachment in everyone for entry in attachment.idle
            )
        waited = now - min((head.since for head in ledger.heads()), default=now) if waiting else 0.0
        return Own(n.total, spare, n.held + n.opening, waiting, max(0.0, waited), self.size())

    def set_limit(self, limit: int) -> None:
        """Set how many connections the pool may have; what is idle above it is closed by the worker."""
        if self._core is not None:
            section = self._core.section
            work = section.decide(engines.set_limit, self._core.ledger, float(limit), section.clock())
            section.effects.do_soon(work)


def _may_have(attachment: Attachment, wanting: int) -> int:
    """How many of those that wait could use one more: not those whose engine is suspended, or has all that it
    may have."""
    quota = attachment.quota
    if quota.stopped == SUSPENDED:
        return 0
    room = math.inf if quota.stated is None else quota.stated - len(quota.slots)
    return int(max(0, min(wanting, room)))
