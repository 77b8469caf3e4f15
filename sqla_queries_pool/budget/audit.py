"""Does the ledger agree with itself, with the sockets, and with who is alive?

The ledger is right by construction, but for one thing: an exception that comes from outside, at any moment
(Ctrl-C, ``PyThreadState_SetAsyncExc``, a signal handler's), may cut a step in two, or come upon the callback
of a weak reference, where Python swallows it and the message with it.  Nothing of the kind can be prevented
in Python; so it is looked for, and mended: by waiters, by the housekeeper, and by ``audit()``.

Called under the pool's lock, like the ledger, and as pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from . import engines
from .choice import SPARE, may_insist, may_wait
from .ledger import Ledger
from .slots import CLOSING, GONE, HELD, IDLE, LOCKED, OPENING, SUSPENDED, Slot
from .work import Work


class Audit(NamedTuple):
    """What :meth:`.Pool.audit` found."""

    connections: int
    """How many slots were checked."""
    dead: int
    """Idle connections that the server had closed; they were discarded.  That is no error of the pool."""
    mended: tuple[str, ...]
    """What was wrong in the bookkeeping and was repaired, a sentence for each."""


UNDER_WAY = 0.02
"""Seconds after which what looks wrong is looked at again: it may have been under way in another thread."""
COLLECTED = 1.0
"""The same of what the garbage collector may be busy with."""
PROXY_GONE = "held, but the connection object that was checked out no longer exists"


class Finding(NamedTuple):
    """A slot about which the ledger is wrong."""

    slot: Slot
    what: str
    patience: float = UNDER_WAY


def findings(ledger: Ledger) -> list[Finding]:
    """What nobody can ever return; or what is just under way, which is not found again later."""
    # Once for all, or else it would take a walk through a list for each of them.
    listed = {id(e) for a in ledger.everyone() for entries in (a.idle, a.hollow) for e in entries}
    found = [Finding(slot, what) for slot in ledger.slots if (what := _wrong(ledger, slot, listed))]
    # The collector may have many proxies to tell of, one after the other; each may take a round trip.
    return found + [Finding(s, PROXY_GONE, COLLECTED) for s in ledger.slots if _left(s)]


def _left(slot: Slot) -> bool:
    record = slot.entry() if slot.state is HELD and slot.entry is not None else None
    proxy = getattr(record, "fairy_ref", None)
    return proxy is not None and proxy() is None


def _wrong(ledger: Ledger, slot: Slot, listed: set[int]) -> str | None:
    state = slot.state
    entry = slot.entry() if slot.entry is not None else None
    if state in (HELD, OPENING):
        return None if entry is not None else f"{state}, but its holder no longer exists"
    if state is CLOSING:
        item = ledger.closing.get(slot)
        return None if item is not None and item() is not None else "due to be closed, but nobody closes it"
    if state is GONE:
        return "removed, but still counted"
    home = slot.home() if slot.home is not None else None
    if home is None:  # its engine has died; the entry does so next, and says so
        return None if entry is not None else f"{state}, but its engine no longer exists"
    entry = slot if slot.entry is None else entry
    in_list = slot in home.locked if state is LOCKED else id(entry) in listed
    return None if in_list else f"{state}, but not in the list of {state} connections"


def mend(ledger: Ledger, found: list[Finding], now: float) -> tuple[list[str], Work]:
    """Close what nobody can return, and derive anew what follows from the slots; return what was wrong."""
    if found:  # what was found when nobody had the lock may be over: the collector comes to its callbacks
        still = set(findings(ledger))
        found = [finding for finding in found if finding in still]
    work: Work = []
    wrong = [f"{slot!r}: {what}" for slot, what, _ in found]
    for slot, *_ in found:
        # What a living session has locked stays its own.
        work += ledger.lost(slot, now) if slot.state is LOCKED else ledger.cast_off(slot, now)
    wrong += _recount(ledger)
    ledger.totals.mended += len(wrong)
    return wrong, work + engines.relimit(ledger, now)


def _recount(ledger: Ledger) -> Iterator[str]:
    slots = ledger.slots
    if ledger.opening != (opening := {slot for slot in slots if slot.state is OPENING}):
        ledger.opening = opening
        yield "the connections being opened were miscounted"
    if ledger.out != (out := sum(slot.state in (HELD, LOCKED) for slot in slots)):
        ledger.out = out
        yield "the connections checked out were miscounted"
    for slot in [slot for slot in ledger.closing if slot not in slots or slot.state is not CLOSING]:
        del ledger.closing[slot]
        yield "the connections being closed were miscounted"
    for ref in [ref for ref in ledger.attachments if ref() is None]:
        del ledger.attachments[ref]  # its last letter may just not have been read
    for attachment in ledger.everyone():
        for entries in (attachment.idle, attachment.hollow):
            right = [e for e in entries if e.slot.state is IDLE and e.slot in slots]
            if len(right) != len(entries):
                entries.clear()  # in place: attachment.pop is bound to it
                entries.extend(right)
                yield "a list of idle connections contained others"
        for slot in [slot for slot in attachment.locked if slot.state is not LOCKED or slot not in slots]:
            del attachment.locked[slot]
            yield "a list of locked connections contained others"
        for waiter in [waiter for waiter in attachment.queue if waiter.answer is not None]:
            del attachment.queue[waiter]
            yield "a checkout that had its answer was still in the queue"
        if attachment.queue and attachment not in ledger.queues:
            ledger.queues[attachment] = None
            yield "a queue with waiting checkouts was not known"
    for quota in {*ledger.attachments.values(), ledger.by_hand.quota}:
        if quota.slots != (its := {slot for slot in slots if slot.quota is quota}):
            quota.slots = its
            yield "an engine's connections were miscounted"


def check(ledger: Ledger, now: float = -math.inf) -> None:
    """Assert what ledger.py promises, every waiter having insisted at ``now``; for tests."""
    everyone = list(ledger.everyone())
    idle = [(a, e) for a in everyone for e in a.idle]
    hollow = [(a, e) for a in everyone for e in a.hollow]
    locked = {slot for a in everyone for slot in a.locked}
    states: dict[str, set[Slot]] = {s: set() for s in (OPENING, IDLE, HELD, LOCKED, CLOSING, GONE)}
    for slot in ledger.slots:
        states[slot.state].add(slot)
    in_use = len(ledger.slots) - len(ledger.closing)
    assert in_use <= ledger.limit or not (idle or hollow), "1: idle above the limit"
    assert not _could_be_served(ledger, now), "2: a waiter could be served"
    assert (states[OPENING], states[CLOSING]) == (ledger.opening, set(ledger.closing)), "3"
    assert not states[GONE], "3: gone, but counted"
    assert len(states[IDLE]) == len(idle) + len(hollow), "3: idle twice or not at all"
    assert {e.slot for _, e in idle + hollow} == states[IDLE], "3: idle twice or not at all"
    assert locked == states[LOCKED], "3: locked"
    assert ledger.out == len(states[HELD]) + len(locked), "3: out"
    for attachment in everyone:
        assert (attachment in ledger.queues) == bool(attachment.queue), "4: queues"
        for waiter in attachment.queue:
            assert waiter.answer is None, "4: answered, but still in the queue"
            assert waiter.attachment is attachment, "4: in another engine's queue"
    assert all(e.slot.handle is not None for _, e in idle), "6: idle without a connection"
    assert all(e.slot.generation >= a.retired for a, e in idle), "6: idle of a dead generation"
    quotas = {*ledger.attachments.values(), ledger.by_hand.quota}
    for quota in quotas:
        assert quota.slots <= ledger.slots, "7: a quota counts what is gone"
        assert quota.stated is None or len(quota.slots) <= quota.stated, "7: ceiling"
    assert ledger.slots == set().union(*(s.quota.slots for s in ledger.slots if s.quota)), "7"


def _could_be_served(ledger: Ledger, now: float) -> bool:
    firsts = [(a, first) for a in ledger.queues if (first := ledger.first(a)) is not None]
    if any(attachment.idle for attachment, _ in firsts):
        return True
    if ledger.backoff.pausing(now):
        return False
    for attachment, first in firsts:
        quota = attachment.quota
        if quota.stopped == SUSPENDED or may_wait(ledger, attachment, first.holder, now):
            continue
        if not quota.full and len(ledger.slots) < ledger.limit:
            return True
        before = now if may_insist(first, now) else now - SPARE
        for other in ledger.everyone():
            if quota.full and other.quota is not quota:
                continue
            if other.hollow or any(slot.stale for slot in other.locked):
                return True
            if other.idle and (other.kin(attachment) or other.idle[0].slot.since <= before):
                return True
    return False
