"""When a connection retires, and how long one waits before the next attempt: pure policy."""

from __future__ import annotations

import math
import random

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
SPREAD = 0.1
"""The part of a lifetime over which connections that were opened together retire."""


def pause(refusals: int) -> float:
    """Seconds between attempts to connect, after so many refusals: doubling, with jitter.

    Jitter of a quarter either way, so that many processes do not come back at once after an outage:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(refusals - 1, 30))
    return longest * random.uniform(0.75, 1.25)


def lifetime(recycle: float) -> float:
    """Seconds after which a connection is renewed, of a ``pool_recycle`` in seconds, -1 for never.

    Spread over the last tenth, so that connections that were opened together do not retire together.
    """
    return math.inf if recycle < 0 else recycle * (1.0 - SPREAD * random.random())
