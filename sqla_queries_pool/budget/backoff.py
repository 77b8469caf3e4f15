"""When may the pool connect, while the server refuses connections?  One checkout in each pause."""

from __future__ import annotations

import math
from collections.abc import Callable


class Backoff:
    """The refusals of one pool's server and the pauses after them.  Times are by the pool's clock."""

    __slots__ = ("probing", "refusals", "refused_at", "retry_after", "retry_at", "since")

    def __init__(self) -> None:
        self.refusals = 0
        """How many pauses there were, one after the other, since the server has refused a connection; 0 while
        it accepts connections."""
        self.probing = False
        """Is a checkout trying to connect after the last pause?"""
        self.since = math.inf
        """When the first connect began that was refused; ``inf`` while the server accepts connections."""
        self.refused_at = -math.inf
        """When it refused one last."""
        self.retry_after = 0.0
        """Seconds between attempts to connect, while there are refusals."""
        self.retry_at = -math.inf
        """While there are refusals: nobody tries to connect before that time."""

    def refused(self, pause: Callable[[int], float], now: float) -> None:
        """The server has refused a connection, and it is worth trying again: after a pause.

        :param pause: how long a pause is, in seconds, after so many refusals.
        """
        self.since, self.refused_at = min(self.since, now), now
        if self.refusals and not self.probing:
            return  # it was connecting already when the pause began
        self.probing = False
        self.refusals += 1
        self.retry_after = pause(self.refusals)
        self.retry_at = now + self.retry_after

    def pausing(self, now: float) -> bool:
        """Is there a pause, in which nobody connects?"""
        return self.refusals > 0 and now < self.retry_at

    def may_connect(self, now: float) -> bool:
        """May a checkout try to connect, which it then does?  While the server refuses, one in each pause."""
        if not self.refusals:
            return True
        if now < self.retry_at:
            return False
        self.probing = True
        self.retry_at = now + self.retry_after
        return True

    def began(self, at: float) -> None:
        """What the server has refused began at that time."""
        if self.refusals:
            self.since = min(self.since, at)

    def let_in(self) -> bool:
        """The server accepts connections again, or it is no use to wait for it; return whether it refused."""
        refused = self.refusals > 0
        self.refusals = 0
        self.since = math.inf
        return refused
