"""Time for which connections are held in a transaction while nothing executes in it.

Sampled, not counted: the housekeeper looks at what is out, and asks the driver, which knows it by itself.  A
look that finds a connection idle in a transaction counts the time since the look before.  So a checkout does
nothing for it; and what is shorter than the time between two looks may be missed, or counted as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from ..budget.ledger import Ledger
from ..budget.slots import HELD, Slot
from ..budget.stats import Durations, LabelledTime
from ..concurrency.housekeeping import Housekeeper
from ..sockets.transactions import IN_ERROR, IN_TRANSACTION, of_server
from .critical_section import CriticalSection

EVERY = 1.0
"""Seconds between two looks, at most."""
LOOKS = 4
"""How many looks there are within ``idle_in_transaction_after``, where that is shorter than four seconds."""
SHORTEST = 0.05
"""Seconds between two looks, at least."""
MOST_LABELS = 50
"""How many labels have a histogram of their own: a label may be a request's path, and these have no end."""
OTHERS = "(other labels)"

_Key: TypeAlias = tuple[str | None, str | None]


class _Holding:
    """One checkout that was found idle in a transaction."""

    __slots__ = ("key", "seconds", "told", "uses")

    def __init__(self, slot: Slot, uses: int) -> None:
        self.key: _Key = (slot.label, slot.caller_class)
        self.uses = uses
        self.seconds = 0.0
        self.told = False


class Idling:
    """Looks at one pool's connections; the housekeeper's alone, but for :meth:`watch` and :meth:`times`.

    :param ledger: the pool's ledger; it is read without the lock.
    :param section: has the pool's clock.
    :param housekeeper: the thread that calls :meth:`sweep`.
    :param on_long: called with what was idle for as long as its engine states, and for how many seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        section: CriticalSection,
        housekeeper: Housekeeper,
        on_long: Callable[[list[tuple[Slot, float]]], None],
    ) -> None:
        self._ledger = ledger
        self._section = section
        self._housekeeper = housekeeper
        self._on_long = on_long
        self._watches = False
        self._last = section.clock()
        """When it looked last."""
        self._holdings: dict[Slot, _Holding] = {}
        self._times: dict[_Key, Durations] = {}

    def watch(self) -> None:
        """A connection was opened for an engine that states ``idle_in_transaction_after``."""
        if not self._watches:
            self._watches = True
            self._last = self._section.clock()
            self._housekeeper.schedule(self, 0.0)

    def neglected(self) -> None:
        """The housekeeper's thread has died: the next connection that is opened starts it again."""
        self._watches = False

    def sweep(self) -> None:
        """Look; and look again soon, while there is something to look at."""
        soonest = self._look()
        if soonest == math.inf:
            self._watches = False
            soonest = self._soonest()  # one that was opened meanwhile has seen that it is watched
            if soonest == math.inf:
                return
            self._watches = True
        self._housekeeper.schedule(self, max(SHORTEST, min(EVERY, soonest / LOOKS)))

    def times(self) -> tuple[LabelledTime, ...]:
        """For how long checkouts that have ended were idle in a transaction, the worst label first."""
        found = [LabelledTime(*key, time.frozen()) for key, time in self._times.copy().items()]
        return tuple(sorted(found, key=lambda each: -each.time.seconds))

    def _soonest(self) -> float:
        return min((_after(slot) for slot in self._ledger.slots.copy()), default=math.inf)

    def _look(self) -> float:
        """Return the shortest ``idle_in_transaction_after`` of what is open, ``inf`` where there is none."""
        now = self._section.clock()
        passed, self._last = now - self._last, now
        long: list[tuple[Slot, float]] = []
        slots, soonest = self._ledger.slots.copy(), math.inf
        for slot in slots:
            if (after := _after(slot)) == math.inf:
                continue
            soonest = min(soonest, after)
            holding = self._sampled(slot, passed, now)
            if holding is not None and not holding.told and holding.seconds >= after:
                holding.told = True
                long.append((slot, holding.seconds))
        for slot in [slot for slot in self._holdings if slot not in slots]:
            self._end(slot)
        if long:
            self._on_long(long)
        return soonest

    def _sampled(self, slot: Slot, passed: float, now: float) -> _Holding | None:
        """Return what the holder of a connection has idled, where it idles now."""
        # Unlocked: it may be returned, and taken by another one, at any step.  Then its uses differ.
        uses, since = slot.uses, slot.since
        held = slot.state is HELD and slot.holder is not None
        holding = self._holdings.get(slot)
        if holding is not None and (not held or holding.uses != uses):
            self._end(slot)
            holding = None
        if not held or of_server(slot.handle)[1] not in (IN_TRANSACTION, IN_ERROR):
            return None
        holding = holding or _Holding(slot, uses)
        if slot.uses != uses or slot.state is not HELD:
            return None
        self._holdings[slot] = holding
        holding.seconds += max(0.0, min(passed, now - since))
        return holding

    def _end(self, slot: Slot) -> None:
        holding = self._holdings.pop(slot)
        key = holding.key if holding.key in self._times or len(self._times) < MOST_LABELS else (OTHERS, None)
        self._times.setdefault(key, Durations()).add(holding.seconds)


def _after(slot: Slot) -> float:
    home: Any = None if slot.home is None else slot.home()
    return math.inf if home is None else float(home.idle_in_transaction_after)
