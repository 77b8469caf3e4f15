"""Which connections close because somebody wants it: an engine's dispose, the queries API.

Each function is an operation of the ledger, which it takes first, and is called as the ledger's methods are:
under the pool's lock.  It returns the work of closing.
"""

from __future__ import annotations

from collections.abc import Iterable

from .ledger import DISPOSED, ENDED, REMOVED, Ledger
from .slots import HELD, IDLE, LOCKED, OPENING, Attachment, Slot
from .work import Close, Work

GRACE = 0.1
"""Seconds for which a checkout waits for a close that takes long."""


def close_all(ledger: Ledger) -> Work | Slot:
    """Close every connection, or none and return one that is busy."""
    for slot in ledger.slots:
        if slot.state in (OPENING, HELD) or (slot.state is LOCKED and not slot.stale):
            return slot
    work: Work = []
    for attachment in ledger.everyone():
        work += ledger.close_idle(attachment, REMOVED)
        while attachment.locked:
            work.append(ledger.close(attachment.locked.popitem()[1], REMOVED))
    return work


def close_one(ledger: Ledger, slot: Slot, force: bool = False, reason: str = REMOVED) -> Work:
    """Close one connection that is idle or whose lock is stale; return nothing if it is neither.

    :param force: also one that a living session has locked.
    """
    attachment = slot.home() if slot.home is not None else None
    if attachment is None:
        return []
    if slot.state is IDLE:
        entry = slot.entry() if slot.entry is not None else slot
        (attachment.idle if entry in attachment.idle else attachment.hollow).remove(entry)
        return [ledger.close(entry, reason)]
    if slot in attachment.locked and (slot.stale or force):
        return [ledger.close(attachment.locked.pop(slot), reason)]
    return []


def dispose(ledger: Ledger, attachment: Attachment) -> Work:
    """Close what is idle and end the generation; what is out is returned as usual (design 10)."""
    attachment.generation += 1
    return ledger.close_idle(attachment, DISPOSED)


def retire(ledger: Ledger, attachment: Attachment) -> Work:
    """Close what was opened before the last dispose: what is idle now, the others when they are returned."""
    if not attachment.quota.stopped:
        attachment.retired = attachment.generation
    return ledger.close_idle(attachment, DISPOSED)


def abandon(ledger: Ledger, attachment: Attachment, now: float) -> Work:
    """Close all that an attachment has, also what is out, and let its waiters go: its runtime has ended, and
    with it whoever could return, open or use any of it."""
    attachment.warm = False
    for waiter in list(attachment.queue):
        ledger.leave(waiter)
    work = ledger.close_idle(attachment, ENDED)
    for slot in [slot for slot in attachment.quota.slots if slot.home is attachment.ref]:
        if slot.state in (HELD, OPENING):
            work += ledger.cast_off(slot, now, ENDED)
        elif slot in attachment.locked:
            work.append(ledger.close(attachment.locked.pop(slot), ENDED))
    return work + ledger.serve(now)


def retire_all(ledger: Ledger) -> Work:
    """Close all that engines have open, now or when it is returned."""
    work: Work = []
    for attachment in ledger.everyone():
        if attachment is not ledger.by_hand:
            work += dispose(ledger, attachment) + retire(ledger, attachment)
    return work


def late(ledger: Ledger, more: Iterable[Close], patience: float, now: float) -> list[Close]:
    """Somebody waits for closes: return those that were waited for for long enough.

    :param more: what is closed to be opened again.
    :param patience: for how many seconds.
    """
    items = [*more, *(item for ref in ledger.closing.values() if (item := ref()) is not None)]
    for item in items:
        if item.awaited is None:
            item.awaited = now
    return [item for item in items if item.awaited is not None and now - item.awaited >= patience]


def cut(ledger: Ledger, slot: Slot, now: float) -> Work:
    """The socket of a connection is shut down: its slot is free.  It counts as closed when it is closed."""
    ledger.lifetimes.end(slot)
    return ledger.closed(slot, None, now)
