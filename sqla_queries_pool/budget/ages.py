"""How old connections get: idle ones expire, those whose lifetime is over are renewed.  What the pool itself
borrows for a moment gets no younger.

Each function is an operation of the ledger, as those of closing.py are.
"""

from __future__ import annotations

import math
from typing import Any

from .ledger import IDLE_TTL, Ledger
from .slots import HELD, IDLE, Attachment, Slot
from .state import LOOK_EVERY
from .work import Fill, Reset, Work


def set_ttl(ledger: Ledger, ttl: float | None, now: float) -> Work:
    """Set the idle TTL of all, ``inf`` for never; None leaves each engine its own."""
    ledger.ttl = ttl
    ledger.apply_ttl()
    return expire(ledger, now)


def expire(ledger: Ledger, now: float) -> Work:
    """Close what was idle for too long, reset what dead sessions left, and say when to look again."""
    work: Work = []
    due = math.inf
    for attachment in ledger.everyone():
        work += [Reset(slot) for slot in attachment.locked if slot.stale]
        spare = ledger.size_of(attachment) - attachment.min_size if attachment.min_size else math.inf
        for entries in (attachment.hollow, attachment.idle):
            while entries and spare > 0 and entries[0].slot.since + attachment.ttl <= now:
                if entries is attachment.idle:
                    spare -= 1
                work.append(ledger.close(entries.popleft(), IDLE_TTL))
            if entries and spare > 0:
                due = min(due, entries[0].slot.since + attachment.ttl)
        leaks, look_at = ledger.leaks.look(attachment, now)
        work += leaks
        if look_at < due and attachment.quota.slots:
            due = look_at
        if attachment.warm:
            due = min(due, now + LOOK_EVERY)
            if spare < 0:
                work.append(Fill(attachment))
    ledger.due = math.inf
    return work + ledger.renew(now) + ledger.expire_by(due) + ledger.vacancy(now)


def idle_since(ledger: Ledger, start: float) -> Work:
    """All that is idle has been so since then: the same time for all, so that their order holds."""
    for attachment in ledger.everyone():
        for entry in attachment.idle:
            entry.slot.since = start
    if ledger.vacant_since is not None:
        ledger.vacant_since = start
    return []


def expire_now(ledger: Ledger, attachment: Attachment, now: float) -> Work:
    """End the lifetime of all that an engine has: one is renewed after the other, those that are out when
    they are returned, those that are being opened when they are."""
    attachment.generation += 1  # first: by it, openings know
    for slot in attachment.quota.slots:
        if slot.home is attachment.ref and slot.handle is not None:
            slot.expires = now
            ledger.lifetimes.add(slot)
    return ledger.renew(now)


def renewed(ledger: Ledger, slot: Slot, entry: Any, since: float, now: float) -> Work:
    """Take back what was renewed, or could not be; if nobody waits, it is idle for as long as before."""
    ledger.lifetimes.end(slot)
    return give_borrowed(ledger, slot, entry, since, now)


def borrow(ledger: Ledger, attachment: Attachment) -> tuple[Any, float] | None:
    """Take an idle entry for the pool itself, if no checkout of its engine waits: the one that a checkout
    would get last; return it, and since when it is idle.  It goes on to count as idle."""
    if attachment.queue or not attachment.idle:
        return None
    entry = attachment.idle.popleft() if attachment.lifo else attachment.idle.pop()
    entry.slot.holder = None
    ledger.borrowed.add(entry.slot)
    ledger.move(entry.slot, HELD)
    return entry, entry.slot.since


def give_borrowed(ledger: Ledger, slot: Slot, entry: Any, since: float, now: float) -> Work:
    """Take it back; if nobody waits, it is idle for as long as before."""
    attachment = slot.home() if slot.home is not None else None
    work: Work = []
    ledger.borrowed.discard(slot)
    if slot.state is HELD and attachment is not None:
        work = ledger.give_unused(attachment, entry, now) or []
        work += ledger.note_lifetime(slot)  # also where a waiter has it now, who returns it unnoted
        if slot.state is IDLE and slot.handle is not None:
            slot.since = since
            idle = attachment.idle
            idle.remove(entry)
            idle.insert(sum(other.slot.since <= since for other in idle), entry)
            work += ledger.expire_by(since + attachment.ttl)
    return work + ledger.renew(now)
