"""Connections that are out for longer than their engine finds likely: reported once, and on return."""

from __future__ import annotations

import math

from .slots import HELD, Attachment, Slot
from .work import Leaked, Returned, Work

LOOK_EVERY = 1.0
"""Seconds between two looks at whether one that was reported was returned, at most."""


class Leaks:
    """What was reported and is still out; the ledger's, under the pool's lock."""

    def __init__(self) -> None:
        self._told: dict[Slot, tuple[int, float]] = {}
        """Slot -> how often it was used by then, and since when it was out."""

    def look(self, attachment: Attachment, now: float) -> tuple[Work, float]:
        """Return what is to be reported of one engine's connections, and when to look again."""
        after = attachment.leak_after
        if after == math.inf:
            return [], math.inf
        work: Work = []
        due = now + after  # by then one may be out that is not yet
        for slot in attachment.quota.slots:
            if slot.home is not attachment.ref or slot.state is not HELD or slot.holder is None:
                continue
            if slot.since + after > now:
                due = min(due, slot.since + after)
            elif self._told.get(slot) != (slot.uses, slot.since):
                self._told[slot] = (slot.uses, slot.since)
                work.append(Leaked(slot, now - slot.since))
        for slot, (uses, since) in list(self._told.items()):
            theirs = slot.home is not None and slot.home() not in (None, attachment)
            if not theirs and (slot.state is not HELD or slot.uses != uses):
                del self._told[slot]
                if slot.since != since:  # else it was detached, or closed where it was
                    # Used again since, it was returned some time before that.
                    work.append(Returned(slot, slot.since - since))
        return work, min(due, now + LOOK_EVERY) if self._told else due
