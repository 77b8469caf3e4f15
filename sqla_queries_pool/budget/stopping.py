"""Which engines hand nothing out for a while: suspended, their checkouts wait; drained, they are rejected.

Each function is an operation of the ledger, as those of closing.py are.

A checkout on the short way takes what is idle, and asks nothing.  So an engine that is stopped has nothing
idle: what it had is closed, and what is returned closes, because no generation is young enough
(``Attachment.retired``).  A checkout that finds nothing takes the long way, where :attr:`.Quota.stopped` is
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from .ledger import DISPOSED, Ledger
from .slots import SUSPENDED, Quota, Slot
from .state import go_on
from .work import Work


def stop(ledger: Ledger, quotas: Collection[Quota], how: str, now: float) -> Work:
    """Suspend engines, or drain them: close what is idle; what is out closes when it is returned.

    :param how: ``SUSPENDED`` or ``DRAINED``.  An engine that is drained is not suspended, but drained where
        it was suspended: then those that wait are served.
    """
    work: Work = []
    for quota in quotas:
        if how != SUSPENDED or quota.stopped is None:
            quota.stopped = how
    for attachment in ledger.everyone():
        if attachment.quota in quotas:
            attachment.retired = math.inf
            work += ledger.close_idle(attachment, DISPOSED)
    return work + ledger.serve(now)


def resume(ledger: Ledger, quotas: Collection[Quota], now: float) -> Work:
    """Let engines hand connections out again; those that waited are served as after an outage."""
    for attachment in ledger.everyone():
        if attachment.quota in quotas:
            go_on(attachment)
            attachment.pace.in_time = now
            attachment.pace.granted = len(attachment.queue)
    for quota in quotas:
        quota.stopped = None
    return ledger.serve(now)


def left(quotas: Collection[Quota]) -> list[Slot]:
    """Return what counts yet of these engines.  Takes no lock."""
    return [slot for quota in quotas for slot in quota.slots.copy()]


def waiting(ledger: Ledger, quotas: Collection[Quota]) -> int:
    """Return how many checkouts of these engines wait.  Takes no lock."""
    return sum(waiter.attachment.quota in quotas for waiter in ledger.waiters())
