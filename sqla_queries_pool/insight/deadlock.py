"""Do checkouts wait for each other? (design 21)

A thread that waits for a connection while it has one waits for those who have the others.  Where all of them
wait as well, in this pool or another, nothing will move before somebody's timeout.  That can't be proved: a
connection may be closed by another thread than the one that checked it out.  So nothing
may have moved for some time, and the checkout that has to give up says why.

Nothing of it is on the way of a checkout that need not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ..budget.slots import HELD, SUSPENDED, Slot, Waiter
from ..concurrency.threads import Caller
from ..pool import Pool
from ..sockets.liveness import traffic
from ..sockets.transactions import EXECUTING, of_server
from . import stacks
from .diagnosis import NEVER_NEST
from .snapshot import DEEPEST_SHOWN, Diagnosis, named

GRACE = 1.0
"""Seconds for which nothing may have moved among checkouts that wait for each other."""
SAMPLES, SAMPLED_FOR = 100, 0.2
"""A deadlock is reported after so many samples within so many seconds: a statement may be short, and on a
unix socket nothing else tells that there was one."""


class Watch:
    """What one waiting checkout has seen.

    :param everywhere: returns all pools of the process.
    :param grace: seconds for which nothing may have moved.
    :param began: when it began to wait, by ``time.monotonic``.
    """

    def __init__(self, everywhere: Callable[[], list[Pool]], grace: float, began: float) -> None:
        self._everywhere, self._grace, self._began = everywhere, grace, began
        self._seen: tuple[Any, float] | None = None
        self._holds: bool | None = None
        self._told: tuple[Any, Diagnosis] | None = None
        """What stood still when :meth:`hopeless` said why, and what it said."""

    def hopeless(self, waiter: Waiter, now: float) -> Diagnosis | None:
        """Is it this checkout that has to give up?  Say why, or return None.

        :param waiter: the asker's, in the queue.
        :param now: seconds, by ``time.monotonic``.
        """
        if self._holds is False:  # it can't take one while it waits
            return None
        me = waiter.holder
        self._holds = me in _holders(self._everywhere, self._began, now)
        if not self._holds:
            return None
        pools = self._everywhere()
        sides = _sides(me, pools)
        newest = max(sides, key=lambda side: (side[1].since, side[1].holder.ident), default=None)
        if newest is None or newest[1] is not waiter:
            self._seen = None
            return None
        still = tuple(sorted(_moves(sides, pools)))
        if self._seen is None or self._seen[0] != still:
            self._seen = (still, now)
            return None
        if now - self._seen[1] < self._grace:
            return None
        waiter.attachment.runtime.collect()  # a waiting checkout does so, but not always
        for _ in range(SAMPLES):
            waiter.wait(SAMPLED_FOR / SAMPLES)
            sides = _sides(me, pools)
            if waiter.answer is not None or still != tuple(sorted(_moves(sides, pools))):
                return None
        self._told = still, _told(sides, pools)
        return self._told[1]

    def still(self, waiter: Waiter) -> Diagnosis | None:
        """Has nothing moved since :meth:`hopeless` said why?  Return that again, or None.

        :param waiter: the asker's, in the queue.
        """
        if self._told is None:
            return None
        pools = self._everywhere()
        now = tuple(sorted(_moves(_sides(waiter.holder, pools), pools)))
        return self._told[1] if now == self._told[0] else None


_last: tuple[float, frozenset[Any]] = -math.inf, frozenset()
"""Who held something, and when that was looked for, by ``time.monotonic``."""


def _holders(everywhere: Callable[[], list[Pool]], began: float, now: float) -> frozenset[Any]:
    """Return who holds a connection, of any pool; as for those that wait since ``began``, to the moment.

    A look at all pools takes long where there are many, and many may wait in vain at once.  While one waits,
    it takes nothing and returns nothing: so any look since then will do, also another's.
    """
    global _last
    if _last[0] < began:  # written whole, so without a lock: at worst two look
        _last = now, frozenset(slot.holder for pool in everywhere() for slot in pool.core.slots())
    return _last[1]


def _sides(me: Caller, pools: list[Pool]) -> list[tuple[Pool, Waiter]]:
    """The circle of waiting checkouts that ``me`` is in; none, where there is hope."""
    waiting = {w.holder: (pool, w) for pool in pools for w in pool.core.ledger.waiters() if w.answer is None}
    stuck = dict(waiting)
    while True:
        free = [thread for thread, (pool, w) in stuck.items() if not _all_held_by(stuck, pool, w)]
        if not free:
            break
        for thread in free:
            del stuck[thread]
    reached: dict[Caller, tuple[Pool, Waiter]] = {}
    todo = [me]
    while todo:
        thread = todo.pop()
        for slot in _could_serve(*stuck[thread]) if thread in stuck else ():
            if slot.holder is not None and slot.holder not in reached and slot.holder in stuck:
                reached[slot.holder] = stuck[slot.holder]
                todo.append(slot.holder)
    return list(reached.values()) if me in reached else []


def _could_serve(pool: Pool, waiter: Waiter) -> list[Slot]:
    """The slots of which any would do, if it was returned."""
    quota = waiter.attachment.quota
    of_class = pool.core.ledger.could_serve(waiter)
    if of_class is not None:
        return of_class
    return list(quota.slots) if quota.full else pool.core.slots()


def _all_held_by(threads: dict[Caller, Any], pool: Pool, waiter: Waiter) -> bool:
    if not pool.core.upkeep.at_rest or waiter.attachment.quota.stopped == SUSPENDED:
        return False
    share = pool.core.share
    its_own = waiter.attachment.quota.full or pool.core.ledger.barred(waiter)
    if share is not None and share.is_elsewhere and not its_own:
        return False  # another process may give one
    found = _could_serve(pool, waiter)
    return bool(found) and all(_is_stuck(slot, threads) for slot in found)


def _is_stuck(slot: Slot, threads: dict[Caller, Any]) -> bool:
    if slot.state is not HELD or slot.holder not in threads:
        return False
    record = slot.entry() if slot.entry is not None else None
    proxy = getattr(record, "fairy_ref", None)
    if proxy is None or proxy() is None:  # it is being returned
        return False
    return bool(of_server(slot.handle)[1] != EXECUTING)


def _moves(sides: list[tuple[Pool, Waiter]], pools: list[Pool]) -> Iterator[tuple[Any, ...]]:
    """What changes when any of them gets on."""
    threads = {waiter.holder for _, waiter in sides}
    for _, waiter in sides:
        yield ("waits", waiter.holder.ident, waiter.since, "")
    for slot in (slot for pool in pools for slot in pool.core.slots() if slot.holder in threads):
        yield ("holds", id(slot), slot.uses, f"{of_server(slot.handle)[1]} {traffic(slot.socket)}")


def _told(sides: list[tuple[Pool, Waiter]], pools: list[Pool]) -> Diagnosis:
    threads = stacks.Threads()
    details = []
    for pool, waiter in sorted(sides, key=lambda side: side[1].since):
        name = named(threads.name(waiter.holder), waiter.label)
        held = [slot for other in pools for slot in other.core.slots() if slot.holder is waiter.holder]
        details.append(f"{name} holds {len(held)} and waits for a connection of {pool.label}")
        for slot in held:
            details += [f"  checked out at {call}" for call in stacks.as_text(slot.stack)[-DEEPEST_SHOWN:]]
        details += [f"  waits at {call}" for call in threads.at(waiter.holder)[-2:]]
    kind = "thread" if isinstance(sides[0][1].holder, Caller) else "task"
    return Diagnosis(
        "deadlock",
        f"a {kind} waits for a connection that it holds itself, and nothing has moved"
        if len(sides) == 1
        else f"{len(sides)} checkouts wait for each other, and nothing has moved",
        f"{NEVER_NEST} (If another {kind} is going to return one of them, this is no deadlock.)",
        "\n".join(details),
    )
