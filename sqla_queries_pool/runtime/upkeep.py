"""Keeping a pool in order: what is due is done, and what an exception has cut in two is mended."""

from __future__ import annotations

import functools
import gc
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from ..budget import ages, closing
from ..budget.audit import COLLECTED, UNDER_WAY, Audit, Finding, findings, mend
from ..budget.ledger import Ledger
from ..budget.slots import Attachment
from ..budget.state import LOOK_EVERY
from ..concurrency.housekeeping import Housekeeper, Worker
from ..logs import logger
from ..sockets import liveness
from .closer import CATCH_UP, Closer
from .connections import DEAD, Connections
from .critical_section import CriticalSection

LOOKS_COST = 100.0
"""For how many times as long as it took, no waiter looks again for what is to be mended."""


class _Visit:
    """Tells when the housekeeper has come by."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def sweep(self) -> None:
        self.over.set()

    def neglected(self) -> None:
        self.over.set()


class Upkeep:
    """Looks after one pool; the housekeeper calls :meth:`sweep` when something is due.

    :param section: the pool's critical section.
    :param ledger: the pool's ledger.
    :param connections: the open connections.
    :param worker: closes what takes time.
    :param closer: is asked whether it does.
    :param housekeeper: the thread that calls :meth:`sweep`.
    :param on_vacant: called when there were no slots and no engines for a while.
    """

    abandoned_at: ClassVar[float] = -math.inf
    """When the collector last returned what nobody had closed, in any pool, by ``time.monotonic``: each
    takes it a round trip, and it comes to the next when that is over."""

    def __init__(
        self,
        section: CriticalSection,
        ledger: Ledger,
        connections: Connections,
        worker: Worker,
        closer: Closer,
        housekeeper: Housekeeper,
        on_vacant: Callable[[], None],
    ) -> None:
        self._section = section
        self._ledger = ledger
        self._connections = connections
        self._worker = worker
        self._closer = closer
        self._housekeeper = housekeeper
        self._on_vacant = on_vacant
        self._mended: deque[str] = deque(maxlen=100)
        """What was put right since the last audit."""
        self._suspects: dict[Finding, float] = {}
        """What looked wrong last time, and since when."""
        self._mend_at = -math.inf
        """When the housekeeper looks for something to mend again, by the pool's clock."""
        self._look_at = -math.inf
        """When a waiter may look for something to mend again, by ``time.monotonic``: a look goes through all
        connections."""

    # -- what is due -------------------------------------------------------------------------------

    def schedule(self, seconds: float) -> None:
        """Have :meth:`sweep` called in so many seconds."""
        self._housekeeper.schedule(self, seconds)

    def remind(self) -> None:
        """The housekeeper is late.  It may just be busy; or its thread has died."""
        self._ledger.due = self._section.clock() + 1.0  # unlocked: at worst it is reminded twice
        self.schedule(0.0)

    def sweep(self) -> None:
        """Close what was idle for too long; called by the housekeeper."""
        section, ledger = self._section, self._ledger
        self._close_dead([a for a in ledger.everyone() if a.min_size])
        if section.clock() >= self._mend_at:  # it looks at each connection, so not whenever one is due
            self._mend_at = section.clock() + LOOK_EVERY
            if self.mend():
                self.schedule(2 * UNDER_WAY)
                self._mend_at = -math.inf
        section.effects.do_soon(section.decide(ages.expire, ledger, section.clock()))
        if self._closer.catch_up():
            self.schedule(CATCH_UP)
        if ledger.vacant(section.clock()):
            self._on_vacant()

    def neglected(self) -> None:
        """The housekeeper's thread has died; what is due becomes overdue, which a checkout notices."""
        self._ledger.due = -math.inf

    def _close_dead(self, attachments: list[Attachment]) -> int:
        """Find the dead among the idle connections, before a checkout does; return how many."""
        section, ledger, dead = self._section, self._ledger, 0
        for slot in [entry.slot for attachment in attachments for entry in list(attachment.idle)]:
            # A poll of its own: that of the slot is its holder's, which anybody may be by now.
            socket = slot.socket
            if liveness.look(socket, liveness.poll_of(socket)) is liveness.DEAD:
                work = section.decide(closing.close_one, ledger, slot, False, DEAD)
                for _ in work:
                    section.post(ledger.totals.one_more, "dead")
                dead += len(work)
                section.effects.do_soon(work)
        return dead

    # -- what is wrong -----------------------------------------------------------------------------

    @property
    def at_rest(self) -> bool:
        """Is there no letter to be read, and does the server let us in?"""
        return not self._section.inbox and not self._ledger.backoff.refusals

    def mend_in_passing(self, now: float) -> bool:
        """:meth:`mend`, by a waiter; not again for a while, since it takes time.

        :param now: ``time.monotonic``.
        """
        return now >= self._look_at and self.mend()

    def mend(self) -> bool:
        """Put right what an exception from outside has cut in two, or kept from being told: see audit.py.

        :return: is there something that looks wrong for the first time?  It may be under way; call again.
        """
        section, begin = self._section, time.monotonic()
        found, now = section.decide(self._findings), time.monotonic()
        if found and (now - Upkeep.abandoned_at < COLLECTED or _collector_is_at_work()):
            return True  # it may still come to tell of them
        self._look_at = now + LOOKS_COST * (now - begin)
        self._suspects = {finding: self._suspects.get(finding, now) for finding in found}
        sure = [finding for finding, since in self._suspects.items() if now - since >= finding.patience]
        wrong, work = section.decide(mend, self._ledger, sure, section.clock())
        if wrong:
            self._mended.extend(wrong)
            logger.warning("%s: mended the bookkeeping: %s", section.label, "; ".join(wrong))
        section.effects.do(work)
        return len(sure) < len(found)

    def audit(self) -> Audit:
        """Compare the bookkeeping with the sockets and with who is alive: see :meth:`.Pool.audit`."""
        gc.collect()
        connections = len(self._ledger.slots)
        dead = self._close_dead(list(self._ledger.everyone()))
        stray = self._connections.strays()
        if self.mend() or stray:
            self._wait_for_others(max(2 * UNDER_WAY, Upkeep.abandoned_at + COLLECTED - time.monotonic()))
            if self.mend():
                self._wait_for_others(2 * UNDER_WAY)
                self.mend()
            stray = [slot for slot in self._connections.strays() if slot in stray]
        for slot in stray:
            self._mended.append(f"{slot!r}: open, but not counted")
            self._connections.drop(slot)
        by_handle = self._connections.by_handle
        for key in [key for key, slot in list(by_handle.items()) if id(slot.handle) != key]:
            by_handle.pop(key, None)
        mended = tuple(self._mended)
        self._mended.clear()
        return Audit(connections, dead, mended)

    def _wait_for_others(self, seconds: float) -> None:
        """Wait until the worker has done what it had to do, and for so long after that."""
        visit = _Visit()
        self._worker.submit(functools.partial(self._housekeeper.schedule, visit, seconds))
        visit.over.wait(1.0 + seconds)

    def _findings(self) -> list[Finding]:
        found = findings(self._ledger)
        # If a closing is done by now, its letter is in the inbox, put there before the work was dropped.
        # So the letters are looked at last.
        letters: list[tuple[Any, tuple[Any, ...]]] = list(self._section.inbox.copy())
        heard_of = {id(argument) for _, arguments in letters for argument in arguments}
        return [finding for finding in found if id(finding.slot) not in heard_of]


def _collector_is_at_work() -> bool:
    """Is a collection under way, in any thread?

    It clears all weak references to what it has found, and then calls their callbacks, one after the other.
    A collection that is asked for meanwhile does not begin.
    """
    begun: list[str] = []

    def hear(phase: str, _: object) -> None:
        begun.append(phase)

    gc.callbacks.append(hear)
    try:
        gc.collect(0)
    finally:
        gc.callbacks.remove(hear)
    return not begun
