"""Stop engines and wait for what they have out; go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from .. import parameters
from ..budget import stopping
from ..budget.ledger import REMOVED
from ..budget.slots import DRAINED, HELD, LOCKED, OPENING, Quota, Slot
from ..runtime.core import Core

LOOK_EVERY = 0.01
"""Seconds between two looks at what is still out.  A return takes the short way, and wakes nobody."""


class Stopped(NamedTuple):
    """What ``drain()`` or ``suspend()`` has come to.  ``str()`` says it in a sentence."""

    pool: str
    """Which pool it was."""
    seconds: float
    """How long it waited."""
    left: tuple[Any, ...] = ()
    """Who still has connections, longest first: each a :class:`~sqla_queries_pool.Holder`."""
    waiting: int = 0
    """How many checkouts wait."""
    state: str = DRAINED
    """``drained`` or ``suspended``."""

    @property
    def complete(self) -> bool:
        """Is nothing out any more, and, where it was drained, does no checkout wait?"""
        return not self.left and not (self.waiting and self.state == DRAINED)

    def __str__(self) -> str:
        text = f"{self.pool}: {self.state}, "
        if self.left:
            names = ", ".join(map(str, self.left))
            text += f"but after {self.seconds:.1f} s {len(self.left)} still out, held by {names}"
        else:
            text += f"nothing is out after {self.seconds:.1f} s"
        return f"{text}; {self.waiting} waiting" if self.waiting else text


def _nobody(_: list[Slot], __: float) -> tuple[Any, ...]:
    return ()


describe_holders: Callable[[list[Slot], float], tuple[Any, ...]] = _nobody
"""Says who holds these slots at that time; insight/snapshot.py knows how, and writes it here."""


def stop(
    core: Core,
    quotas: Collection[Quota] | None,
    how: str,
    timeout: float | None,
    pause: Callable[[list[int], float], None],
) -> Stopped:
    """Suspend or drain engines, and wait until nothing of theirs is out.

    :param quotas: the engines'; None for all of the pool, and what was added by hand where it is drained.
    :param how: ``SUSPENDED`` or ``DRAINED``.
    :param timeout: seconds to wait, at most; None for as long as it takes.
    :param pause: waits for so many seconds.
    """
    begin, seconds = time.monotonic(), seconds_of(timeout)
    ledger, all_of_it = core.ledger, quotas is None and how == DRAINED
    quotas = engines(core) if quotas is None else quotas
    counted = [*quotas, ledger.by_hand.quota] if all_of_it else quotas
    core.section.run(stopping.stop, ledger, quotas, how, core.now())
    if quotas and all(quota.stopped == DRAINED for quota in quotas):
        how = DRAINED  # as it was before, if it is to be suspended now
    while True:
        if all_of_it:
            core.section.run(ledger.close_idle, ledger.by_hand, REMOVED)
        slots = stopping.left(counted)
        waiting = stopping.waiting(ledger, quotas)
        spent = time.monotonic() - begin
        if spent >= seconds or not (slots or (waiting and how == DRAINED)):
            break
        pause([], min(LOOK_EVERY, seconds - spent))
    if not slots and seconds > spent:  # the server ends its side some milliseconds later
        core.connections.lingering.wait(_none, seconds - spent, pause)
    busy = [slot for slot in slots if slot.state in (HELD, OPENING, LOCKED)]
    holders, spent = describe_holders(busy, core.now()), time.monotonic() - begin
    return Stopped(core.section.label, spent, holders, waiting, how)


def resume(core: Core, quotas: Collection[Quota] | None) -> None:
    """Let engines go on that were stopped; None for all of the pool."""
    quotas = engines(core) if quotas is None else quotas
    core.section.run(stopping.resume, core.ledger, quotas, core.now())
    if core.share is not None:  # those that waited have asked the host for nothing
        core.share.wanted()


def engines(core: Core) -> set[Quota]:
    """The engines of a pool."""
    return core.section.decide(lambda: set(core.ledger.attachments.values()))


def _none() -> float:
    return 0.0


def seconds_of(timeout: float | None) -> float:
    """Return how long to wait, in seconds.

    :raises ParameterError: the number has no meaning.
    """
    seconds = parameters.seconds("timeout", timeout)
    return math.inf if seconds is None else seconds
