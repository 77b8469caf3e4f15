"""The pool's clock, and how a process that stood still finds out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

STOOD_STILL = 1.0
"""Seconds by which a wait ends late before the process is taken to have stood still: stopped, frozen, or its
event loop blocked.  A processor that is merely busy wakes a thread earlier than that."""


def _default() -> Callable[[], float]:
    """Return Linux's clock that runs while the machine is suspended, which its monotonic clock does not.

    After that, the server and the firewalls between have forgotten connections.  With this clock they were
    idle for as long, and so are pinged (``ping_after``), closed (``idle_ttl``) or renewed (their lifetime).
    """
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic if boottime is None else functools.partial(time.clock_gettime, boottime)


clock = _default()
"""Seconds, steadily; those for which the machine was suspended included, where the platform can tell."""
