"""Connections that are out for longer than their engine finds likely: told once, and when they come home."""

from __future__ import annotations

import math

from .slots import HELD, Attachment, Leaked, Returned, Slot, Work

LOOK_EVERY = 1.0
"""Seconds between two looks at whether one that was told of has come home, at most."""


class Leaks:
    """What was told of and is still out; the ledger's, under the pool's lock."""

    def __init__(self) -> None:
        self._told: dict[Slot, tuple[int, float]] = {}
        """Slot -> how often it was used by then, and since when it was out."""

    def look(self, attachment: Attachment, now: float) -> tuple[Work, float]:
        """Return what is to be told of one engine's connections, and when to look again."""
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
                    # Used again since, it came home some time before that.
                    work.append(Returned(slot, slot.since - since))
        return work, min(due, now + LOOK_EVERY) if self._told else due

    def clear(self) -> None:
        """In a forked child: what the parent has is out for ever."""
        self._told.clear()
