"""Is it better to wait for a connection that is out than to open another?  Is it of any use to wait?

A connect has a price, the time that it takes; waiting is paid by the moment, and nobody knows for how long.
A checkout that waits for as long as a connect takes, and then opens, pays twice the best price at most (the
"ski rental problem").  But a checkout does not wait alone, and a connection is used again: so the queue
decides, by how it has moved.  It opens

* at once, where what it needs would take longer than a connect at the pace at which it was served so far: a
  crowd before few connections does not wait for all of them;
* as many as have waited all the time while they could have connected: they would have been in use all that
  time.  A queue that comes and goes opens none.  As many as are out at most, so that a queue that is just
  slow at most doubles what there is, each time.

And where more checkouts come than can be served, one that is served after a long wait is served too late for
its caller: in order of arrival then means that all are served too late.  Such a queue rejects a checkout that
has waited for longer than its target, so that those that are served are fresh.

Plain numbers, no clock; ledger.py has the queues.
"""

from __future__ import annotations

import math

WORTH_IT = 0.001
"""Seconds; a connect that takes less is not worth a change of threads, and so waits for nothing."""
LONGEST = 1.0
"""Seconds that a checkout waits so, at most, before a connection is opened: connects that take longer are
those that hang."""
LATE = 0.00001
"""Seconds by which a look is late, lest it come too early by a rounding error."""
FIRST_LOOK = 0.125
"""The part of its price after which it is first known how a queue moves."""
INTERVAL = 20
"""For how many targets no checkout may have been served within the target before a queue is overloaded.
It is twenty wherever this was thought of: CoDel has 5 and 100 ms (RFC 8289), "Fail at Scale" (B. Maurer,
ACM Queue 13, 2015) the same, Elixir's DBConnection 50 and 1000 ms."""
WEIGHT = 0.25
"""How much the last connect counts in the mean."""


def mean(before: float, took: float) -> float:
    """Return the moving mean of how long connects take; ``before`` is 0 where there was none."""
    return before + (took - before) * WEIGHT if before else took


class Pace:
    """How one queue moves."""

    __slots__ = ("granted", "in_time", "price", "served", "shortest", "since")

    def __init__(self) -> None:
        self.price = 0.0
        """What a connect takes, in seconds; 0 where it is not worth waiting."""
        self.since = 0.0
        """Since when it is watched: since the queue was empty, or for one price at most."""
        self.served = 0
        """How many got a connection that was returned, since then."""
        self.shortest = math.inf
        """How short it has been since its first look."""
        self.granted = 0
        """How many may still open because so many have waited all the time."""
        self.in_time = 0.0
        """When the queue was empty last, or, until it is overloaded, one was served within the target."""

    def begin(self, price: float, now: float) -> None:
        """A waiter comes, and is the first."""
        self.granted = 0
        self.in_time = now
        self._watch(price, now)

    def _watch(self, price: float, now: float) -> None:
        self.price = 0.0 if price < WORTH_IT else min(price, LONGEST)
        self.since = now
        self.served = 0
        self.shortest = math.inf

    def was(self, length: int, now: float) -> None:
        """The queue was as short as that."""
        if length < self.shortest and now - self.since >= self.price * FIRST_LOOK:
            self.shortest = length

    def opens(self, length: int, now: float) -> bool:
        """May the first of so many open a connection?"""
        seconds = now - self.since
        if self.granted or seconds >= self.price:
            return True
        return seconds >= self.price * FIRST_LOOK and length * seconds >= self.price * (self.served + 1)

    def opened(self, length: int, out: int, price: float, now: float) -> None:
        """The first of so many may open one, by :meth:`opens`; so many were out."""
        if not self.granted and now - self.since >= self.price:
            self.granted = int(min(length, self.shortest, max(out, 1)))
            self._watch(price, now)
        if self.granted:
            self.granted -= 1

    def overloaded(self, target: float, now: float) -> bool:
        """Is it of no use to wait for longer than the target?  Until the queue is empty again."""
        return now - self.in_time >= INTERVAL * target

    def was_served(self, waited: float, target: float, now: float) -> None:
        """A checkout was, after so many seconds."""
        if waited <= target and not self.overloaded(target, now):
            self.in_time = now

    def overdue_in(self, came: float, target: float, now: float) -> float:
        """Return after how many seconds a waiter that came at that time is rejected, if nothing changes."""
        return LATE + max(0.0, came + target - now, self.in_time + INTERVAL * target - now)

    def look_in(self, length: int, came: float, now: float) -> float:
        """Return after how many seconds a waiter that came at that time asks whether :meth:`opens` has
        changed."""
        if self.opens(length, now):
            return 0.0
        price = self.price  # read once: this is asked without the lock
        waited, first = now - came, price * FIRST_LOOK
        return LATE + (first - waited if waited < first else price - waited % (price or 1.0))
