"""Classes of callers: which of several that share a pool is served next.

A pool whose engines state ``classes`` has a :class:`ClassLedger`, any other a plain :class:`Ledger`, which
knows nothing of all this.  A class has a floor, a ceiling and a weight, and what holds is:

1. No class uses more slots than its ceiling, unless it did before the ceiling was stated.
2. A class below its floor that waits is served by the next slot that it can use.  Its floor is not
   reserved: while it does not wait, others use it.
3. Above their floors, a class is served first that has less than its share, by weight, of the slots that
   there are.  What is left of these shares, for they are no whole numbers, goes around by turns: each class
   has a time of its own, which a checkout puts forward by one divided by the weight, and the one that is
   behind is next.  (Start-time fair queueing: P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996.)  So a pool of one
   connection is shared by weight, too, and no class starves.
4. Nobody waits beside a slot that it could use: a class may use all that no other one wants.
5. Inside a class the order is that of a pool without classes.

Where the limit is lower than the sum of the floors, as when it is set at run time, each class below its own
is served in proportion to it.

What a class uses is counted when it is asked for; a checkout that finds an idle connection asks only if its
class has a ceiling.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from . import choice
from .ledger import DISPOSED, Ledger
from .queue import Pace
from .slots import DRAINED, HELD, OPENING, OTHER, SUSPENDED, Attachment, Slot, Terms, Waiter
from .stats import ClassStatistics, Durations
from .work import Wake, Work

ClassOf = Callable[[Attachment], str]
"""To which class does the checkout belong that asks now?"""
_BELOW_FLOOR, _BELOW_SHARE, _IN_TURN = range(3)


def objection(
    stated: Iterable[Mapping[str, Terms]], callers: Iterable[str | None], limit: float
) -> str | None:
    """Say what is wrong with what the engines of a pool state, or return None.

    :param stated: the classes, by engine.
    :param callers: the class of each engine's own checkouts.
    :param limit: the pool's.
    """
    classes: dict[str, Terms] = {}
    for each in stated:
        for name, terms in each.items():
            if classes.setdefault(name, terms) != terms:
                return (
                    f"this engine states the class {name!r} as {terms}, and another engine of this database "
                    f"as {classes[name]}. They have one pool: state the same in both"
                )
    floors = sum(terms.min for terms in classes.values())
    if floors > limit:
        return f"the sum of min of all classes is {floors:g}, above the limit of {limit:g}: lower a min"
    for caller in callers:
        if classes and caller is not None and caller not in (*classes, OTHER):
            known = ", ".join(sorted(classes))
            return f"caller={caller!r} is none of the classes of this database: write one of {known}"
    return None


def use(ledger: Ledger, class_of: ClassOf) -> None:
    """Have a ledger know classes from now on."""
    if not isinstance(ledger, ClassLedger):
        ledger.__class__ = ClassLedger
        assert isinstance(ledger, ClassLedger)
        ledger.begin(class_of)


class Turn:
    """Who is served next, at one moment.

    :param ledger: whose waiters.
    """

    def __init__(self, ledger: ClassLedger) -> None:
        self._ledger = ledger
        self.held = ledger.held_by_class()
        self.firsts = [(a, ledger.firsts(a)) for a in ledger.queues if a.quota.stopped != SUSPENDED]
        waiting = {name for _, firsts in self.firsts for name in firsts}
        self._weights = sum(ledger.terms(name).weight for name in {*self.held, *waiting})
        if waiting:
            ledger.time = max(ledger.time, min(ledger.times.get(name, 0.0) for name in waiting))

    def full(self, name: str) -> bool:
        """Has a class as many as it may have?"""
        return self.held[name] >= self._ledger.terms(name).max

    def key(self, name: str) -> tuple[int, float]:
        """The least of these is served next."""
        held, terms, ledger = self.held[name], self._ledger.terms(name), self._ledger
        if held < terms.min:
            return _BELOW_FLOOR, held / terms.min
        if held + 1 <= len(ledger.slots) * terms.weight / self._weights + 1e-9:
            return _BELOW_SHARE, held / terms.weight
        return _IN_TURN, max(ledger.time, ledger.times.get(name, 0.0))

    def candidates(self) -> Iterator[tuple[tuple[int, float], Waiter]]:
        """The first waiter of each class that may have more, of each engine, and how soon it is served."""
        for _, firsts in self.firsts:
            for name, waiter in firsts.items():
                if not self.full(name):
                    yield self.key(name), waiter

    def in_order(self) -> list[Waiter]:
        """The same, the next one first."""
        return [w for _, w in sorted(self.candidates(), key=lambda each: (each[0], each[1].since))]


class ClassLedger(Ledger):
    """The ledger of a pool whose engines state classes."""

    classes: dict[str, Terms]
    """What the engines state, by name."""
    times: dict[str, float]
    """How far each class is in its own time, where it was served after a wait."""
    time: float
    """How far the one is that waits and is furthest behind: none that comes begins earlier."""
    waited: dict[str, Durations]
    """How long the checkouts of each class waited that were served after a wait."""
    paces: dict[str, Pace]
    """When each class was served in time, for ``queue_target``."""

    def begin(self, class_of: ClassOf) -> None:
        """Have no history.

        :param class_of: called inside the critical section, by the thread or the task that checks out.
        """
        self._class_of = class_of
        self.classes, self.times, self.time, self.waited, self.paces = {}, {}, 0.0, {}, {}

    # -- reading -----------------------------------------------------------------------------------

    def terms(self, name: str) -> Terms:
        """What is stated of a class."""
        return self.classes.get(name, Terms())

    def held_by_class(self) -> Counter[str]:
        """How many slots each class uses, those included that it opens."""
        return Counter(slot.caller_class or OTHER for slot in list(self.slots) if _in_use(slot))

    def used_by(self, name: str) -> list[Slot]:
        """The slots that a class uses."""
        return [s for s in list(self.slots) if _in_use(s) and (s.caller_class or OTHER) == name]

    def _full(self, name: str) -> bool:
        ceiling = self.terms(name).max
        return ceiling < math.inf and len(self.used_by(name)) >= ceiling

    def firsts(self, attachment: Attachment) -> dict[str, Waiter]:
        """The first waiter of each class in a queue."""
        found: dict[str, Waiter] = {}
        for waiter in attachment.queue:
            name = waiter.caller_class or OTHER
            if name not in found:
                found[name] = waiter
                if len(found) > len(self.classes):  # and those that belong to none
                    break
        return found

    def first(self, attachment: Attachment) -> Waiter | None:
        order = [waiter for waiter in Turn(self).in_order() if waiter.attachment is attachment]
        return order[0] if order else None

    def heads(self) -> list[Waiter]:
        super().heads()  # forgets queues that are empty
        found: dict[Attachment, Waiter] = {}
        for waiter in Turn(self).in_order():
            found.setdefault(waiter.attachment, waiter)
        return list(found.values())

    def barred(self, waiter: Waiter) -> bool:
        return self._full(waiter.caller_class or OTHER)

    def could_serve(self, waiter: Waiter) -> list[Slot] | None:
        name = waiter.caller_class or OTHER
        return self.used_by(name) if self._full(name) else None

    def wanting(self, attachment: Attachment) -> int:
        waiting = Counter(waiter.caller_class or OTHER for waiter in list(attachment.queue))
        held = self.held_by_class()
        return int(sum(min(n, max(0, self.terms(name).max - held[name])) for name, n in waiting.items()))

    def ahead_of(self, waiter: Waiter) -> int:
        same = [w for w in waiter.attachment.queue if w.caller_class == waiter.caller_class]
        return same.index(waiter)

    def pace_of(self, waiter: Waiter) -> Pace:
        return self.paces.setdefault(waiter.caller_class or OTHER, Pace())

    def class_statistics(self) -> dict[str, ClassStatistics]:
        held, waiting = self.held_by_class(), Counter(w.caller_class or OTHER for w in self.waiters())
        names = {*self.classes, *held, *waiting, *self.waited.copy()}
        return {
            name: ClassStatistics(
                *_shown(self.terms(name)),
                held[name],
                waiting[name],
                self.waited.get(name, Durations()).frozen(),
            )
            for name in sorted(names)
        }

    # -- checkouts ---------------------------------------------------------------------------------

    def take(self, attachment: Attachment, holder: Any, now: float) -> Any:
        name = self._class_of(attachment)
        if attachment.quota.stopped == DRAINED:
            return super().take(attachment, holder, now)  # it rejects
        if self._full(name):
            return None
        if attachment.idle or not attachment.queue:
            entry = super().take(attachment, holder, now)
        elif self.first(attachment) is not None:
            return None  # nobody overtakes
        else:  # those before it wait for their own class
            entry = self._open(attachment, holder, now, insist=False)
        if entry is not None:
            entry.slot.caller_class = name
        return entry

    def enqueue(self, waiter: Waiter, now: float, since: float | None = None) -> None:
        waiter.caller_class = name = self._class_of(waiter.attachment)
        if not any((other.caller_class or OTHER) == name for other in self.waiters()):
            self.pace_of(waiter).in_time = now
        alone = self.first(waiter.attachment) is None
        super().enqueue(waiter, now, since)
        if alone:  # those before it wait for their own class: it is the first that could connect
            waiter.attachment.pace.begin(self.mean_connect, now)

    def _open(self, attachment: Attachment, holder: Any, now: float, insist: bool, last: bool = False) -> Any:
        # Without classes nobody waits beside what is idle; here it may have been for a class at its ceiling.
        if attachment.idle:
            entry = attachment.pop()
            slot = entry.slot
            if now - slot.since >= attachment.ping_after or now >= slot.expires:
                slot.suspect = True
            return self._hold(entry, holder, now)
        if attachment.hollow and self.backoff.may_connect(now):
            return self._hold(attachment.hollow.pop(), holder, now)
        return super()._open(attachment, holder, now, insist, last)

    def _answer(self, waiter: Waiter, entry: Any, now: float) -> Wake:
        name = waiter.caller_class or OTHER
        entry.slot.caller_class = name
        self.times[name] = max(self.time, self.times.get(name, 0.0)) + 1 / self.terms(name).weight
        self.waited.setdefault(name, Durations()).add(now - waiter.since)
        return super()._answer(waiter, entry, now)

    def serve(self, now: float) -> Work:
        work: Work = []
        while self.queues:
            for waiter in Turn(self).in_order():
                insist = choice.may_insist(waiter, now)
                entry = self._open(waiter.attachment, waiter.holder, now, insist)
                if entry is not None:
                    work.append(self._answer(waiter, entry, now))
                    break
            else:
                break
        return work

    def _give_on(self, attachment: Attachment, entry: Any, slot: Slot, now: float) -> Work:
        too_many = len(self.slots) - len(self.closing) > self.limit
        retired = slot.generation < attachment.retired
        if too_many or (retired and not self._serves_yet(attachment, slot)):
            return super()._give_on(attachment, entry, slot, now)  # it closes, whoever waits
        name = slot.caller_class or OTHER
        was_full = len(self.used_by(name)) + 1 >= self.terms(name).max
        hollow = slot.handle is None
        waiter = self._next_for(attachment, hollow, now)
        connects = waiter is not None and (hollow or waiter.attachment is not attachment)
        if connects and not self.backoff.may_connect(now):
            waiter = None if hollow else self.first(attachment)
        if waiter is None and retired:  # those that wait are of classes at their ceilings
            work = [self.close(entry, DISPOSED), *self.serve(now)]
        elif waiter is None and not hollow and now >= slot.expires:
            work = self._idle_again(attachment, entry, now) + self.note_lifetime(slot)
            work += [] if self.queues else self.renew(now)
        else:
            work = self._pass_on(attachment, entry, waiter, now)
        # Where it goes to another class, one of its own may have what is idle elsewhere.
        return work + self.serve(now) if was_full else work

    def _next_for(self, attachment: Attachment, hollow: bool, now: float) -> Waiter | None:
        """Choose the waiter that gets a slot of this attachment that was returned, as choice.next_for does.

        Another engine's gets it at once if its class is below its floor or its share.
        """
        quota, found = attachment.quota, []
        for key, waiter in Turn(self).candidates():
            other = waiter.attachment
            if other is not attachment and other.quota is not quota and other.quota.full:
                continue
            near = other is attachment or other.kin(attachment)
            if near or hollow or key[0] != _IN_TURN or choice.may_insist(waiter, now):
                found.append((key, waiter))
        if not found:
            return None
        best = min(key for key, _ in found)
        same = [waiter for key, waiter in found if key == best]
        own = [waiter for waiter in same if waiter.attachment is attachment]
        others = [waiter for waiter in same if waiter.attachment is not attachment]
        return choice.between(
            self,
            attachment,
            min(own, key=choice.arrival, default=None),
            min(others, key=choice.arrival, default=None),
            hollow,
            now,
        )

    # -- engines -----------------------------------------------------------------------------------

    def note_classes(self) -> None:
        self.classes = {name: terms for a in self.everyone() for name, terms in a.classes.items()}

    def stood_still(self, now: float) -> None:
        super().stood_still(now)
        for pace in self.paces.values():
            pace.in_time = now

    def fresh(self) -> Ledger:
        child = super().fresh()
        use(child, self._class_of)
        return child


def _in_use(slot: Slot) -> bool:
    return slot.holder is not None and slot.state in (HELD, OPENING)


def _shown(terms: Terms) -> tuple[int, int | None, float]:
    return terms.min, None if terms.max == math.inf else int(terms.max), terms.weight
