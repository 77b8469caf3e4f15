"""The text of an error and of a log line: who holds the connections, why a checkout got none, what to do."""

from __future__ import annotations

import dataclasses
import math

from ..budget.slots import DRAINED, REJECTED, SUSPENDED, UNREACHABLE, Attachment, Slot
from ..budget.work import Leaked, Returned
from ..errors import CheckoutTimeout, PoolDeadlock, PoolDrained, TooManyRequests
from ..logs import logger
from ..pool import Pool
from ..runtime.core import Core
from . import stacks
from .diagnosis import diagnose, of_class
from .snapshot import MOST_HOLDERS, Diagnosis, Holder, holder_of, snapshot

SHARED_FOR = 0.1
"""Seconds for which one snapshot serves all errors of a pool.  Where hundreds wait, a snapshot takes tens of
milliseconds, and reports must not make an overload worse."""
KINDS = {DRAINED: PoolDrained, UNREACHABLE: CheckoutTimeout}
"""The errors of checkouts that are rejected, but for ``TooManyRequests``."""


def checkout_timeout(
    pool: Pool,
    attachment: Attachment,
    timeout: float,
    found: Diagnosis | None = None,
    early: bool = True,
    whose: str = "",
) -> CheckoutTimeout:
    """Return the error for a checkout that got no connection; its cause is the last connect error.

    :param timeout: for how many seconds it waited.
    :param found: a deadlock, why the pool rejected it, or that it is suspended.
    :param early: did it stop waiting for that reason before its timeout?
    :param whose: who has stated the timeout, where there was a choice.
    """
    early = early and found is not None
    ceiling = attachment.quota.stated
    own_limit = ceiling is not None and ceiling < (pool.max_size or math.inf)
    deadlock = found is not None and found.kind not in REJECTED
    if found is not None and deadlock and early:
        seen, likely = snapshot(pool), found
        numbers = seen.statistics
    else:
        seen, own_snapshot = pool.core.recent_snapshot.get(
            lambda: snapshot(pool, MOST_HOLDERS), SHARED_FOR, pool.core.now
        )
        me = attachment.runtime.here.caller
        # This checkout has left the queue, but counts; a shared snapshot may have it in the queue still.
        waited = timeout and (found is None or found.kind != DRAINED)
        waiting = seen.statistics.waiting + bool(waited and me.number not in seen.callers_waiting)
        # What the asker held when a shared snapshot was made, it may have returned since.
        asker = me.number if own_snapshot else 0
        own = ceiling if own_limit and attachment.quota.full and not pool.is_full else None
        likely = found if found is not None and deadlock else diagnose(seen, asker, me.parents, own)
        if found is None and seen.statistics.classes:
            likely = of_class(seen, pool.core.class_of(attachment), likely)
        numbers = dataclasses.replace(seen.statistics, waiting=waiting)
    lists, named = seen.lists, seen.named()  # before it is copied: what is shared is made once
    seen = dataclasses.replace(seen, statistics=numbers, diagnosis=found or likely)
    known = found is not None and found.kind == SUSPENDED
    advice = f"{'' if known else 'Most likely '}{likely.cause}. {likely.remedy}"
    if found is None or deadlock:
        kind: type[CheckoutTimeout] = PoolDeadlock if early else CheckoutTimeout
        stated = f" ({whose})" if whose else ""
        what = f"had no connection within {timeout:{'.1f' if early else 'g'}} s{stated}: "
    else:
        kind = KINDS.get(found.kind, TooManyRequests)
        what = f"rejected a checkout after {timeout:.1f} s because {found.cause}: "
        advice = found.remedy if found.kind in KINDS else f"{found.remedy} {advice}"
    error = kind(
        f"QueriesPool {seen.line(what)}{f' ({ceiling:.0f} for this engine)' if own_limit else ''}. "
        f"{named}. {advice}\n{seen.report(lists)}",
        code="3o7r",
    )
    error.snapshot = seen
    error.__cause__ = pool.core.admission.last_error
    pool.core.got_nothing(seen)
    return error


def log_leak(core: Core, item: Leaked | Returned) -> None:
    """Log that a connection has been checked out for a long time, or was returned after all."""
    if isinstance(item, Returned):
        logger.warning(
            "%s: a connection was returned after all, after %.1f s", core.section.label, item.seconds
        )
        return
    holder = holder_of(item.slot, core.now(), stacks.Threads())
    logger.warning(
        "%s: a connection has been checked out for a long time: %s%s",
        core.section.label,
        holder,
        _checked_out(holder),
    )


def log_idle(core: Core, long: list[tuple[Slot, float]]) -> None:
    """Log that connections were held in a transaction for long while nothing executed.

    :param long: each with the seconds that it was found so, in this checkout.
    """
    threads = stacks.Threads()
    for slot, seconds in long:
        holder = holder_of(slot, core.now(), threads)
        logger.warning(
            "%s: a connection has been idle in a transaction for %.1f s: %s%s",
            core.section.label,
            seconds,
            holder,
            _checked_out(holder),
        )


def _checked_out(holder: Holder) -> str:
    return "".join(f"\n  checked out at {call}" for call in holder.stack)
