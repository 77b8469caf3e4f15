"""Which engines use the pool, and which limit follows from what they state.

Each function is an operation of the ledger, as those of closing.py are.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

from . import ages, choice
from .ledger import LOWERED, Ledger
from .slots import Attachment
from .state import DEFAULT_LIMIT, go_on
from .work import Work


def attach(
    ledger: Ledger, attachment: Attachment, gone: Callable[[weakref.ref[Attachment]], None], now: float
) -> Work:
    """An engine begins to use the pool.

    :param gone: called when the engine has died, as ``lost`` is for an entry; it must put the call of
        :func:`detach` aside.
    """
    attachment.ref = weakref.ref(attachment, gone)
    ledger.by_hand.own_ttl = attachment.own_ttl
    ledger.attachments[attachment.ref] = attachment.quota
    ledger.apply_ttl()
    ledger.vacant_since = None
    return relimit(ledger, now) + ages.expire(ledger, now)  # its idle_ttl holds for what was added by hand


def detach(ledger: Ledger, ref: weakref.ref[Attachment], now: float) -> Work:
    """An engine is gone."""
    ledger.attachments.pop(ref, None)
    return relimit(ledger, now) + ledger.vacancy(now)


def set_limit(ledger: Ledger, limit: float | None, now: float) -> Work:
    """Set the limit, ``inf`` for none; None leaves it to the attached engines."""
    ledger.set_limit_to = limit
    return relimit(ledger, now)


def relimit(ledger: Ledger, now: float) -> Work:
    """Find out which limit holds, and act on it."""
    ledger.note_classes()
    if ledger.set_limit_to is not None:
        ledger.limit = ledger.set_limit_to
    elif ledger.attachments:
        stated = [q.stated for q in ledger.attachments.values() if q.stated is not None]
        ledger.limit = max(stated, default=DEFAULT_LIMIT)
    # Without engines it stays as it was: what they left open may still be closing.
    work: Work = []
    while len(ledger.slots) - len(ledger.closing) > ledger.limit:
        entry = choice.pick(ledger, None, False, math.inf)
        if entry is None:
            break
        work.append(ledger.close(entry, LOWERED))
    return work + ledger.serve(now)


def in_child(ledger: Ledger, now: float) -> tuple[Ledger, Work]:
    """In a forked child: return a new ledger with the same engines and limits, and its first work.

    Slots and waiters are the parent's: none of them counts here, and a holder that returns one gets
    :exc:`.NotHeld`.  Another thread may have been inside a method when the process forked.  That thread is
    not here, and what it left half done stays with the old ledger, which nobody is to use any more.
    """
    for slot in list(ledger.slots):
        ledger.remove(slot)
    child = ledger.fresh()
    child.set_limit_to, child.limit, child.ttl = ledger.set_limit_to, ledger.limit, ledger.ttl
    child.by_hand.own_ttl, child.by_hand.ttl = ledger.by_hand.own_ttl, ledger.by_hand.ttl
    for ref, quota in ledger.attachments.items():
        quota.slots.clear()
        if (attachment := ref()) is not None:  # else its death is in a letter in the parent's inbox
            attachment.make_fresh()
            go_on(attachment)
            child.attachments[ref] = quota
    return child, relimit(child, now) + child.vacancy(now)
