"""What sessions of the queries API lock: an idle connection, until they give it back or die.

Each function is an operation of the ledger, which it takes first, and is called as the ledger's methods are:
under the pool's lock.
"""

from __future__ import annotations

import weakref
from typing import Any

from .ledger import Ledger
from .slots import HELD, IDLE, LOCKED, Attachment, Slot
from .work import Resetter, Work

GRACE = 0.5
"""Seconds from the death of a session that had a lock to its reset, where nobody needs it earlier."""


def lock(ledger: Ledger, slot: Slot, session: weakref.ref[Any], now: float) -> bool:
    """Lock an idle connection for a session; return False if it is not idle."""
    attachment = slot.home() if slot.home is not None else None
    if attachment is None or slot.state is not IDLE or slot.handle is None:
        return False
    entry = slot.entry() if slot.entry is not None else slot
    attachment.locked[slot] = entry  # first: nobody else keeps one that was added by hand
    attachment.idle.remove(entry)
    slot.session = session  # before it is locked: a lock that is nobody's would be for ever
    slot.since = now
    slot.uses += 1
    ledger.move(slot, LOCKED)
    return True


def unlock(ledger: Ledger, slot: Slot, by: weakref.ref[Resetter], if_stale: bool = False) -> bool:
    """Take the lock from a session; the resetter resets the connection and then gives it back.

    :param if_stale: only if the session is dead.
    :return: was it locked, and is it the resetter's now?
    """
    if slot.state is not LOCKED or slot.session is None or (if_stale and not slot.stale):
        return False
    if isinstance(slot.session(), Resetter):
        return False
    slot.session = by
    return True


def give_back(ledger: Ledger, slot: Slot, now: float) -> Work:
    """Take back what :func:`unlock` released, after its reset."""
    attachment = slot.home() if slot.home is not None else None
    if attachment is None or slot not in attachment.locked:
        return []
    ledger.move(slot, HELD)
    slot.session = None
    return ledger.give(attachment, attachment.locked.pop(slot), now) or []


def session_died(ledger: Ledger, slot: Slot, session: weakref.ref[Any], now: float) -> Work:
    """A session died with a lock: a waiter may have the slot, else the housekeeper resets it.

    Not at once: the next caller of ``get`` or ``lock`` would find it being reset, hence busy.
    """
    if slot.session is not session:
        return []
    return ledger.serve(now) + ledger.expire_by(now + GRACE)


def stale(ledger: Ledger, attachment: Attachment) -> list[Slot]:
    """Return what sessions have locked that have died."""
    return [slot for slot in attachment.locked if slot.stale]
