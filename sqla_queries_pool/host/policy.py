"""Who gives which lease to whom: one process's side, in plain numbers, with the time as an argument.

A process that has nothing free asks all others, again and again.  One that could give offers, the asker
takes, and then the lease is passed, as soon as the connection that stood on it is closed.  Neither an ask
nor an offer binds anybody, and a promise ends by itself, so that any letter may get lost, and any process
may die at any step.

What is given:

* what nobody needs here: leases without a connection, and connections that were idle for a while;
* one of several, where even with one less this process has a larger part of what it wants than the asker has:
  so leases spread in proportion to demand, and never swing back (budget/choice.py does so among engines);
* the last one, to an asker that has nothing, where both have waited for a turn: so where there are more
  processes than leases, each gets its turn.

No lock, no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .letters import Ask, Letter, Offer, Passed, Take

ASK_EVERY = 0.1
"""Seconds between two asks of a process whose checkouts wait ..."""
SELDOM = 0.2
"""... and after the first second, where nothing came of them: each ask wakes a thread in all processes."""
IDLE_FOR = 0.05
"""Seconds after which an idle connection is of no use to its process, where no checkout waits there."""
PATIENCE = 0.05
"""Seconds that a checkout waits before its process, if it has a lease already, gets one of a busy process."""
TURN = 0.4
"""Seconds for which a process keeps its only lease, and for which another that has none waits for it."""
SETTLE = 0.005
"""Seconds for which offers are collected, where nobody has any to spare."""
MARGIN = 1.25
"""How much larger the giver's remaining part has to be than the asker's: demand is a guess."""
NO = Offer(0, 0.0, 0.0)
"""The answer to a process that takes what it can't have any more."""
MEAN_OF = 1.0
"""Seconds over which the demand is averaged."""
GIVE_WITHIN = 2.0
"""Seconds after which a promise ends: no connection was returned."""
TAKE_AGAIN = 0.5
"""Seconds after which a process that was promised a lease asks another one as well ..."""
SPARE_WITHIN = 0.2
"""... or, for a spare one, after which it does not count on it any more."""
FRESH = 1.0
"""Seconds for which a process believes what another one said of itself."""
UNUSED_FOR = 1.0
"""Seconds after which a lease is freed on which there is no connection."""


class Own(NamedTuple):
    """A process's own pool at one moment."""

    used: int
    """Slots that count, and closed connections that the server may still count."""
    spare: int
    """Connections that were idle for :data:`IDLE_FOR`; 0 while a checkout waits."""
    busy: int
    """Connections that are out, or being opened."""
    waiting: int
    """Checkouts that wait."""
    waited: float
    """Seconds that the first of them has waited."""
    ceiling: int
    """How many this process may use."""

    @property
    def demand(self) -> int:
        """How many it would use now."""
        return min(self.busy + self.waiting, self.ceiling)


class Promise(NamedTuple):
    """A lease that will be given as soon as there is no connection on it."""

    to: str
    """The mailbox; empty where it is just given up."""
    until: float


class Post(NamedTuple):
    """A letter to be sent."""

    to: str
    """The mailbox; empty for all others."""
    letter: Letter
    lease: Any = None
    """The lease that goes with it; the member has let go of it."""
    promise: Promise | None = None
    """Then: what is kept by it."""


class _Peer(NamedTuple):
    ask: Ask
    at: float
    """When it asked."""


class Member:
    """One process's part in a budget."""

    def __init__(self) -> None:
        self.leases: list[Any] = []
        """What it has.  Each has a ``number``."""
        self.promises: list[Promise] = []
        self.want = 0.0
        """The mean of its demand."""
        self._demand_at = -math.inf
        self._asked_at = -math.inf
        self._peers: dict[str, _Peer] = {}
        self._offers: dict[str, Offer] = {}
        """Those without any to spare, since the last ask."""
        self._coming: dict[str, tuple[int, float]] = {}
        """Mailbox -> how many spare ones it was asked for, and until when they count."""
        self._awaited: tuple[str, float] | None = None
        """Who was asked for one that it can't spare, and until when."""
        self._turn_since = -math.inf
        """Since when it has something."""
        self._unused_since: float | None = None
        self._needs_since: float | None = None

    @property
    def limit(self) -> int:
        """How many connections it may have: its leases without those that it has promised."""
        return max(0, len(self.leases) - len(self.promises))

    def needs(self, own: Own, now: float) -> int:
        """Return how many more it could use now, those without that are on their way."""
        if not own.waiting:
            return 0
        coming = sum(count for count, until in self._coming.values() if now < until)
        return max(0, own.demand - self.limit - coming)

    # -- what it does by itself --------------------------------------------------------------------

    def look(self, own: Own, now: float) -> list[Post]:
        """Do what is due: end old promises, ask, choose among offers."""
        self._average(own, now)
        self.promises = [promise for promise in self.promises if now < promise.until]
        self._peers = {name: peer for name, peer in self._peers.items() if now - peer.at < FRESH}
        if not self.needs(own, now):
            self._needs_since = None
            return []
        if self._needs_since is None:
            self._needs_since = now
        posts: list[Post] = []
        awaited = self._awaited is not None and now < self._awaited[1]
        if self._offers and not awaited and now >= self._asked_at + SETTLE:
            best = max(self._offers, key=lambda name: self._offers[name][1:])
            del self._offers[best]
            self._awaited = best, now + TAKE_AGAIN
            posts.append(Post(best, Take(1)))
        if now >= self._asked_at + self._every(now):
            self._asked_at = now
            self._offers.clear()
            waited = max(own.waited, now - self._needs_since) if self.leases else own.waited
            posts.append(Post("", Ask(len(self.leases), max(self.want, 1.0), waited, False)))
        return posts

    def look_in(self, own: Own, now: float, else_in: float) -> float:
        """Return after how many seconds :meth:`look` is to be called again, if no letter comes."""
        if not self.needs(own, now):
            return else_in
        awaited = self._awaited is not None and now < self._awaited[1]
        until = self._asked_at + (SETTLE if self._offers and not awaited else self._every(now))
        return max(0.0, min(else_in, until - now))

    def _every(self, now: float) -> float:
        """Seconds between two asks."""
        since = now if self._needs_since is None else self._needs_since
        return SELDOM if self.leases and now - since > 1.0 else ASK_EVERY

    def _average(self, own: Own, now: float) -> None:
        part = 1 - math.exp(-max(0.0, now - self._demand_at) / MEAN_OF)
        self.want += (own.demand - self.want) * part
        self._demand_at = now

    # -- letters -----------------------------------------------------------------------------------

    def heard(self, sender: str, letter: Letter, own: Own, now: float) -> list[Post]:
        """Read a letter without a lease; return the answers."""
        if isinstance(letter, Ask):
            self._average(own, now)  # an idle process does not look all the time
            self._peers[sender] = _Peer(letter, now)
            offer = self._offer(letter, own, now)
            return [] if offer is None else [Post(sender, offer)]
        if isinstance(letter, Offer):
            return self._offered(sender, letter, own, now)
        if isinstance(letter, Take) and not self._promise(sender, letter.number, own, now):
            return [Post(sender, NO)]
        return []

    def _offer(self, asks: Ask, own: Own, now: float) -> Offer | None:
        """What could be given to one that asks?"""
        free = self.limit
        if free <= 0 or asks.want <= 0:
            return None
        if not own.waiting and (spare := min(free, max(0, free - own.used) + own.spare)) > 0:
            return Offer(spare, 0.0, 0.0)
        turn = max(0.0, min(now - self._turn_since, 1e6))
        if free == 1:
            due = asks.have == 0 and asks.waited >= TURN and turn >= TURN
            return Offer(0, 0.0, turn) if due and not self._overtakes(asks, now) else None
        want = max(self.want, 0.1)
        patient = asks.have == 0 or asks.waited >= PATIENCE
        if patient and (free - 1) * asks.want > asks.have * want * MARGIN:
            return Offer(0, (free - 1) / want, turn)
        return None

    def _offered(self, sender: str, offer: Offer, own: Own, now: float) -> list[Post]:
        if offer == NO:
            self._coming.pop(sender, None)
            if self._awaited is not None and self._awaited[0] == sender:
                self._awaited = None
            return []
        needs = self.needs(own, now)
        if not needs:
            return []
        if not offer.spare:
            self._offers[sender] = offer
            return []
        count = min(needs, offer.spare)
        self._coming[sender] = count, now + SPARE_WITHIN
        return [Post(sender, Take(count))]

    def _promise(self, to: str, number: int, own: Own, now: float) -> bool:
        """One takes what it was offered, perhaps a while ago: is it still so?"""
        peer = self._peers.get(to)
        if any(promise.to == to for promise in self.promises):
            return True
        offer = None if peer is None or now - peer.at >= FRESH else self._offer(peer.ask, own, now)
        if peer is None or offer is None:
            return False
        self.promises += [Promise(to, now + GIVE_WITHIN)] * min(number, max(offer.spare, 1))
        return True

    def _overtakes(self, asks: Ask, now: float) -> bool:
        """Has another that has nothing, and asked lately, waited for longer?"""
        return any(
            other.ask.have == 0 and other.ask.waited > 1.25 * asks.waited + ASK_EVERY
            for other in self._peers.values()
            if now - other.at < 3.5 * ASK_EVERY  # three asks, lest a lost one cost it its place
        )

    # -- leases ------------------------------------------------------------------------------------

    def got(self, lease: Any, now: float, sender: str = "") -> None:
        """It has one more: it has locked a free one, or was passed one."""
        if not self.leases:
            self._turn_since = now
        self.leases.append(lease)
        if not sender:
            return
        count, until = self._coming.pop(sender, (0, now))
        if count > 1:
            self._coming[sender] = count - 1, until
        if self._awaited is not None and self._awaited[0] == sender:
            self._awaited = None
        self._asked_at = -math.inf  # perhaps it needs another one

    def ready(self, own: Own) -> Iterator[Post]:
        """Let go of what is promised and has no connection any more: each is to be sent, or freed where it is
        for nobody.  If it can't be sent, call :meth:`kept` before the next."""
        for promise in list(self.promises):
            if own.used >= len(self.leases):
                return
            self.promises.remove(promise)
            self._peers.pop(promise.to, None)  # what it said is no longer so
            lease = max(self.leases, key=lambda lease: lease.number)
            self.leases.remove(lease)
            yield Post(promise.to, Passed(lease.number), lease, promise)

    def kept(self, post: Post, gone: bool) -> None:
        """A lease could not be sent.

        :param gone: there is nobody; else it may be tried again.
        """
        self.leases.append(post.lease)
        if gone:
            self.forget(post.to)
        elif post.promise is not None:
            self.promises.append(post.promise)

    def forget(self, name: str) -> None:
        """A process has died."""
        self._peers.pop(name, None)
        self._offers.pop(name, None)
        self._coming.pop(name, None)
        if self._awaited is not None and self._awaited[0] == name:
            self._awaited = None
        self.promises = [promise for promise in self.promises if promise.to != name]

    def give_up(self, budget: int, now: float) -> None:
        """The budget is smaller than it was: have those freed that are above it."""
        above = sum(lease.number >= budget for lease in self.leases) - len(self.promises)
        self.promises += [Promise("", now + GIVE_WITHIN)] * above

    def free_unused(self, own: Own, now: float) -> None:
        """Have those freed on which there was no connection for a while."""
        unused = self.limit - own.used
        if own.waiting or unused <= 0:
            self._unused_since = None
        elif self._unused_since is None:
            self._unused_since = now
        elif now - self._unused_since >= UNUSED_FOR:
            self._unused_since = None
            self.promises += [Promise("", now + GIVE_WITHIN)] * unused
