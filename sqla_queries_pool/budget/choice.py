"""Which waiter gets a slot, and which connection gives way to it: the rules of fairness (design 6 and 24).

The functions only choose, but for :func:`pick`; ledger.py acts on the choice.
"""

from __future__ import annotations

import math
from typing import Any

from .queue import LATE, WORTH_IT
from .slots import OVERLOAD, QUEUE_FULL, UNREACHABLE, Attachment, Rejected, Waiter
from .state import LedgerState

SPARE = 0.05
"""Seconds after which an idle connection counts as spare: another engine may have its slot at once.
One that was returned just now is about to be used again, and moving its slot costs a close and a connect
(design 6)."""
PATIENCE = 0.1
"""Seconds after which a waiter may have the slot of any other engine's idle connection."""
LONGEST_PAUSE = 2.0
"""Seconds; pauses after refusals are shorter, jitter included."""
PATIENCE_FACTOR = 4.0
"""For how many mean waits, and for PATIENCE at least, another engine's waiter lets a connection's own
engine go first although it came first itself."""


def arrival(waiter: Waiter) -> float:
    """When it began to wait, by the pool's clock: the oldest goes first."""
    return waiter.since


def next_for(ledger: LedgerState, attachment: Attachment, hollow: bool, now: float) -> Waiter | None:
    """Choose the waiter that gets a slot of this attachment that was returned (design 6).

    :param hollow: it has no connection: the waiter that gets it connects.
    """
    own = ledger.first(attachment)
    mine = attachment.quota
    # Its slot frees a place under its own quota, so engines of that quota are never too full.
    others = [
        waiter
        for waiter in ledger.heads()
        if (other := waiter.attachment) is not attachment and (other.quota is mine or not other.quota.full)
    ]
    if own is None and not hollow:  # then it stays, unless another engine's waiter may insist
        others = [w for w in others if w.attachment.kin(attachment) or may_insist(w, now)]
    return between(ledger, attachment, own, min(others, key=arrival, default=None), hollow, now)


def between(
    ledger: LedgerState,
    attachment: Attachment,
    own: Waiter | None,
    oldest: Waiter | None,
    hollow: bool,
    now: float,
) -> Waiter | None:
    """Choose between an attachment's first waiter and the oldest of the others, for a slot of its own."""
    if own is None or oldest is None:
        return own or oldest
    first = oldest.since < own.since
    if first and (hollow or now - oldest.since > max(PATIENCE, PATIENCE_FACTOR * ledger.mean_wait)):
        return oldest
    # Even with one slot less, mine would get as large a share of what it wants as the other with one more: so
    # slots spread in proportion to demand, and never swing back, also where the demand swings a little.  An
    # engine that has nothing gets one.
    has, its = len(attachment.own), len(oldest.attachment.own)
    wanted, its_wanted = has + len(attachment.queue), its + len(oldest.attachment.queue)
    if (has - 1) * its_wanted >= (its + 1) * wanted or (not its and has > 1):
        return oldest
    ledger.totals.bypasses += first
    return own


def may_insist(waiter: Waiter, now: float) -> bool:
    """May it have the slot of a connection that its engine is about to use again?"""
    return not waiter.attachment.own or now - waiter.since >= PATIENCE


def may_wait(ledger: LedgerState, attachment: Attachment, holder: Any, now: float) -> bool:
    """Is it better to wait for a connection that this engine has out than to open another (queue.py)?

    :param holder: who would wait; what it holds itself is not returned meanwhile.
    """
    if ledger.mean_connect < WORTH_IT or ledger.backoff.refusals:
        return False
    if (wanting := ledger.wanting(attachment)) and attachment.pace.opens(wanting, now):
        return False
    return any(slot.holder is not holder for slot in ledger.held_of(attachment))


def look_in(ledger: LedgerState, waiter: Waiter, now: float) -> float:
    """Return after how many seconds a waiter asks again, because by then it may open a connection, or is
    rejected; ``inf`` for neither.  Takes no lock."""
    attachment, target, seconds = waiter.attachment, waiter.attachment.queue_target, math.inf
    full = attachment.quota.full or len(ledger.slots) >= ledger.limit or ledger.barred(waiter)
    if attachment.pace.price and not full and not ledger.backoff.refusals:
        seconds = attachment.pace.look_in(ledger.wanting(attachment), waiter.since, now)
    if attachment.fail_fast_after < math.inf:
        after = attachment.fail_fast_after
        began = [slot.since for slot in ledger.opening.copy()]
        since = max(min([ledger.backoff.since, *began]), ledger.served_at)
        if since + after > now:
            seconds = min(seconds, LATE + since + after - now)
    if target < math.inf:
        seconds = min(seconds, ledger.pace_of(waiter).overdue_in(waiter.since, target, now))
    return seconds


def unreachable(ledger: LedgerState, attachment: Attachment, now: float) -> bool:
    """Has the server refused or swallowed connects for ``fail_fast_after`` seconds?

    Since the first of them began, none was answered, and no checkout was served by one that was returned: a
    server that is just full is not out of reach.  A refusal that is as old as that proves nothing any more.
    """
    after, backoff = attachment.fail_fast_after, ledger.backoff
    if after == math.inf:
        return False
    known = backoff.refusals and now - backoff.refused_at < max(after, LONGEST_PAUSE)
    since = min((slot.since for slot in ledger.opening), default=math.inf)
    since = min(since, backoff.since) if known else since
    return now - max(since, ledger.served_at) >= after


def probes(ledger: LedgerState, attachment: Attachment, now: float) -> bool:
    """Does a connect go on that may tell whether the server is back?  One that has taken as long as
    ``fail_fast_after`` may hang for ever."""
    return any(now - slot.since < attachment.fail_fast_after for slot in ledger.opening)


def why_rejected(ledger: LedgerState, waiter: Waiter, now: float, new: bool) -> Rejected | None:
    """Return why a waiter may not wait, or not for longer, or None.

    :param new: it has just joined, so the length of the queue counts.
    """
    attachment = waiter.attachment
    queue, target = attachment.queue, attachment.queue_target
    newest = new and len(queue) > attachment.max_waiting
    if newest and ledger.ahead_of(waiter) >= attachment.max_waiting:
        return Rejected(
            QUEUE_FULL,
            f"the queue is full (max_waiting={attachment.max_waiting})",
        )
    if unreachable(ledger, attachment, now):
        return Rejected(
            UNREACHABLE,
            f"the server has accepted no connection for fail_fast_after={attachment.fail_fast_after:g} s",
        )
    if attachment.quota.stopped:  # it waits for its end, or is the last to be served
        return None
    if now - waiter.since >= target and ledger.pace_of(waiter).overloaded(target, now):
        behind = now - ledger.pace_of(waiter).in_time
        return Rejected(
            OVERLOAD,
            f"the pool is overloaded (for {behind:.1f} s the queue was never empty and slower than "
            f"queue_target={target:g} s; until it is empty, no checkout waits longer than that)",
        )
    return None


def pick(ledger: LedgerState, asker: Attachment | None, within: bool, before: float) -> Any:
    """Take the idle entry that can best be spared off its list and return it, or None.

    :param asker: for whom.
    :param within: only from those of its quota.
    :param before: what is not its kin spares what has been idle since then, or longer.
    """
    crowd = [a for a in ledger.everyone() if not within or (asker is not None and a.quota is asker.quota)]
    for attachment in crowd:
        if attachment.hollow:
            return attachment.hollow.popleft()
    kin = {a for a in crowd if asker is not None and asker.kin(a)}
    idle = [a for a in crowd if a.idle and (a in kin or a.idle[0].slot.since <= before)]
    if idle:
        # What was added by hand goes last: nobody opens that again.
        choice = min(idle, key=lambda a: (a is ledger.by_hand, a.idle[0].slot.since))
        return choice.idle.popleft()
    for attachment in crowd:
        for slot in attachment.locked:
            if slot.stale:
                return attachment.locked.pop(slot)
    return None
