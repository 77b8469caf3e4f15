"""The parts of one pool, put together: the ledger and what stands around it."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import ages, classes, closing, engines
from ..budget.ledger import Ledger
from ..budget.slots import HELD, OTHER, REJECTED, Attachment, EntryRef, Numbers, Slot
from ..budget.state import DEFAULT_LIMIT
from ..budget.work import Leaked, Returned, Work
from ..concurrency.housekeeping import Housekeeper, Worker
from ..concurrency.recent import Recent
from ..concurrency.threads import THREADS
from ..errors import ParameterError
from ..labels import checkout_caller, known_classes
from ..logs import Failures, logger
from ..sockets.lingering import Lingering
from . import unreturned
from .admission import Admission
from .checkout import Checkouts
from .clock import clock as default_clock
from .closer import Closer
from .connections import Connections
from .critical_section import CriticalSection
from .effects import Effects
from .idling import Idling
from .upkeep import Upkeep

if TYPE_CHECKING:
    from ..host.share import Share
    from .sharing import SharedPool

MOST_TIMEOUTS = 20
"""How many checkouts that got nothing are remembered."""


class Core:
    """Puts the parts of one pool together, and tells them which engines there are.

    :param pool_id: the pool id; for people, too, until an engine says which database it is.
    :param clock: a monotonic clock in seconds, :data:`.clock.clock` by default.
    :param new_slot: makes a slot.
    :param on_opened: called when an engine has opened a connection.
    :param on_vacant: called by the housekeeper when there were no slots and no engines for a while.
    """

    housekeeper: ClassVar[Housekeeper] = Housekeeper()
    """The process's; a forked child has one of its own."""

    section: CriticalSection
    """The lock, and the inbox for what may not wait for it."""
    ledger: Ledger
    """Who has which slot, and which waiters there are; touched inside the section alone."""
    connections: Connections
    """The open DBAPI connections."""
    admission: Admission
    """May one connect now?"""
    effects: Effects
    """Does what the ledger decided."""
    upkeep: Upkeep
    """Does what is due, and mends."""
    idling: Idling
    """Looks for what is idle in a transaction, where an engine wants to know."""
    checkouts: Checkouts
    """What engines do with slots."""

    def __init__(
        self,
        pool_id: str,
        clock: Callable[[], float] | None,
        new_slot: Callable[[], Slot],
        on_opened: Callable[[], None],
        on_vacant: Callable[[], None],
    ) -> None:
        self._clock = clock or default_clock
        self.checkouts = Checkouts(on_opened)
        self._on_vacant = on_vacant
        self.pool_id = pool_id
        self._side: SharedPool | None = None
        self.on_leak: Callable[[Core, Leaked | Returned], None] = _ignore
        """Called by the housekeeper when a connection is out for long, or was returned after all."""
        self.on_idle: Callable[[Core, list[tuple[Slot, float]]], None] = _ignore
        """Called by the housekeeper when connections were idle in a transaction for long."""
        self.timeouts: deque[Any] = deque(maxlen=MOST_TIMEOUTS)
        """Snapshots of the last checkouts that got nothing, the newest last."""
        self._warned_of_no_limit = False
        self.limits_check: Any = None
        """What asks the server whether it has room (engine/limits.py); once for a pool and its limit."""
        self.stated_limit: float | None = None
        """What ``create`` or ``set_max_size`` said; None leaves it to the attached engines."""
        self.share: Share | None = None
        """The pool's part in a budget of the host, where its engines state ``share``: the ledger's limit is
        what the share has."""
        self._build(pool_id, Ledger(self._entry_died, new_slot))

    def _build(self, label: str, ledger: Ledger) -> None:
        """Make all parts: at first, and again in a forked child.

        There all threads but one are gone, and a lock that another one had would be taken for ever.
        """
        self.ledger = ledger
        self.section = section = CriticalSection(label, self._clock)
        self.recent_snapshot: Recent[Any] = Recent()
        """The last snapshot that was made for an error: see insight/report.py."""
        worker = Worker("sqla_queries_pool worker")
        self.opener = opener = Worker("sqla_queries_pool opener")
        """Waits for the server, in the background: opens, renews, resets and asks."""
        self.failures = failures = Failures(label)
        """Says what could not be done to a socket."""
        lingering = Lingering(self.housekeeper.schedule, failures)
        self.connections = Connections(section, ledger, lingering, failures)
        self.admission = Admission(section, ledger, self.connections)
        closer = Closer(section, ledger, self.connections, worker)
        self.upkeep = Upkeep(
            section, ledger, self.connections, worker, closer, self.housekeeper, self._on_vacant
        )
        closer.remind = self.upkeep.schedule
        self.effects = Effects(
            section,
            ledger,
            self.connections,
            self.admission,
            closer,
            worker,
            opener,
            self.upkeep.schedule,
            self._leaked,
        )
        self.idling = Idling(ledger, section, self.housekeeper, self._idle)
        self.checkouts.use(section, ledger, self.connections, self.upkeep, closer)
        self._use_share()

    def _use_share(self) -> None:
        self.checkouts.share = self.share
        self.effects.before_reserving = self.room
        self.connections.on_closed = _nothing if self.share is None else self.share.closed

    def _entry_died(self, ref: EntryRef) -> None:
        if ref.slot.state is HELD and ref.slot.holder is not None:
            unreturned.tell(ref.slot, unreturned.COLLECTED)
        self.section.post(self.ledger.lost, ref.slot)

    def _engine_died(self, ref: weakref.ref[Attachment]) -> None:
        self.section.post(engines.detach, self.ledger, ref)

    def _leaked(self, item: Leaked | Returned) -> None:
        self.on_leak(self, item)

    def _idle(self, long: list[tuple[Slot, float]]) -> None:
        self.on_idle(self, long)

    def now(self) -> float:
        """The time in seconds by the pool's clock."""
        return self._clock()

    @property
    def numbers(self) -> Numbers:
        """How many connections are in which state; takes no lock."""
        return self.ledger.numbers()

    def slots(self) -> list[Slot]:
        """All that counts against the limit, as it is now; takes no lock."""
        return list(self.ledger.slots)

    def got_nothing(self, seen: Any) -> None:
        """A checkout got nothing within its time, or was rejected; ``seen`` is a snapshot of why."""
        self.count("rejected" if seen.diagnosis.kind in REJECTED else "timeouts")
        if seen.diagnosis.kind == "deadlock":
            self.count("deadlocks")
        if not self.timeouts or self.timeouts[-1].taken_at != seen.taken_at:  # not one that is shared
            self.timeouts.append(seen)

    def count(self, what: str) -> None:
        """One more of what is just counted in :class:`.Totals`."""
        self.section.post(self.ledger.totals.one_more, what)

    # -- engines -----------------------------------------------------------------------------------

    def attach(self, attachment: Attachment) -> Work:
        """An engine begins to use the pool; the work is the caller's to have done."""
        before = self.ledger.limit
        attachment.runtime = attachment.runtime or THREADS
        if attachment.classes:
            known_classes.update(attachment.classes)
            self.section.decide(classes.use, self.ledger, self.class_of)
        work = self.section.decide(engines.attach, self.ledger, attachment, self._engine_died, self._clock())
        if self.share is not None:
            self.share.resized()
        self.log_limit(before)
        return work

    def join(self, share: str | None, stated: float | None) -> None:
        """An engine is about to attach: have the pool share a budget with other processes, or not.

        :param share: ``host``, a folder, or None.
        :param stated: the engine's ``max_size``.
        :raises ParameterError: other engines of this pool state something else; there is no limit; it is the
            first one, and the folder can't be used.
        """
        if share is not None and math.inf in (stated, self.stated_limit):
            raise ParameterError(f"share={share!r} needs a limit: set max_size to a number")
        before = None if self.share is None else self.share.name
        if share == before:
            if self.share is not None and stated is not None:
                self.share.prepare_more(int(stated))
            return
        if self.ledger.slots or any(ref() is not None for ref in list(self.ledger.attachments)):
            raise ParameterError(
                f"{self.section.label}: this engine states share={share!r}, and another engine of this "
                f"database in this process states share={before!r}. They have one limit: state the same for "
                "both"
            )
        if self._side is not None:
            self._side.leave()
        self.share = self._side = None
        if share is not None:
            # Here, for few have one.  An engine is being made, where SQLAlchemy imports its driver, too.
            from ..host.share import Share
            from .sharing import SharedPool

            side = SharedPool(self)
            new = Share(share, self.pool_id, side)
            new.prepare(side.size() if stated is None else int(stated))
            self.share, self._side = new, side
        self._use_share()
        self.set_limit(self.stated_limit)

    def set_limit(self, limit: float | None) -> None:
        """Set the limit, ``inf`` for none; None leaves it to the attached engines.

        :raises ParameterError: there is none, but the pool shares it with other processes.
        """
        if self.share is not None and limit == math.inf:
            raise ParameterError("a pool whose engines state share= needs a limit: set max_size to a number")
        self.stated_limit = limit
        # With a share, the ledger's is what that has, at first nothing.
        if self.share is not None:
            self.share.resized()
        self.section.run(
            engines.set_limit, self.ledger, limit if self.share is None else self.share.limit, self._clock()
        )

    @property
    def limit(self) -> float:
        """The largest number of connections, of all processes if they share it; ``inf`` for no limit."""
        return self.ledger.limit if self.share is None else float(self.share.budget)

    def room(self) -> None:
        """Somebody is about to count one more, if there is room."""
        if self.share is not None:
            self.share.room()

    def log_limit(self, before: float) -> None:
        """Log the limit if it is another one than before."""
        if (limit := self.ledger.limit) != before:
            logger.info("%s: the limit is now %g, was %g", self.section.label, limit, before)

    def warn_of_no_limit(self) -> None:
        """Say once what a limit is good for: an engine has lifted it."""
        if not self._warned_of_no_limit:
            self._warned_of_no_limit = True
            logger.warning(
                "%s: an engine sets no limit, so all engines of this database have none. A peak of load then "
                "opens a connection for each checkout, until the server refuses all clients "
                "(max_connections). With max_size=… checkouts above it wait their turn instead.",
                self.section.label,
            )

    def agree(self, attachment: Attachment) -> None:
        """An engine is about to attach: is what it says of classes of callers right, beside the others'?

        An engine that goes on, after a dispose or in another loop, was asked when it was new; the limit may
        have been lowered since.

        :raises ParameterError: it is not.
        """
        others = list(self.ledger.everyone())
        if any(other.quota is attachment.quota for other in others):
            return
        everyone = [*others, attachment]
        sizes = [a.quota.stated for a in everyone if a.quota.stated is not None]
        limit = self.stated_limit if self.stated_limit is not None else max(sizes, default=DEFAULT_LIMIT)
        limit = limit if attachment.classes else math.inf  # else the floors are not its own
        why = classes.objection([a.classes for a in everyone], [a.caller for a in everyone], limit)
        if why is not None:
            raise ParameterError(f"{self.section.label}: {why}")

    def class_of(self, attachment: Attachment) -> str:
        """The class to which the checkout belongs that asks now: its own, or its engine's."""
        known = self.ledger.classes if isinstance(self.ledger, classes.ClassLedger) else {}
        for name in (checkout_caller.get(), attachment.caller):
            if name is not None and (name in known or name == OTHER):
                return name
        return OTHER

    def abandon(self, attachment: Attachment, then: Callable[[Attachment], None]) -> None:
        """The runtime of an attachment has ended: close all that it has, and let its waiters go.

        Never waits: may be called by a finalizer.

        :param then: called when the ledger knows, inside the critical section.
        """
        self.section.post(closing.abandon, self.ledger, attachment)
        self.section.post(lambda _: then(attachment))

    def dispose(self, attachment: Attachment) -> None:
        """Close an engine's idle connections, and end its generation of connections."""
        self.section.run(closing.dispose, self.ledger, attachment)

    def retire(self, attachment: Attachment) -> None:
        """Let an engine's connections of before its last dispose close; those out when they are returned."""
        self.section.run(closing.retire, self.ledger, attachment)

    def expire_rolling(self, attachment: Attachment) -> None:
        """Renew an engine's connections one after the other, those out when they are returned."""
        self.section.run(ages.expire_now, self.ledger, attachment, self._clock())

    def suspect_own(self, attachment: Attachment) -> None:
        """Have all connections of an engine checked before they are used again."""
        self.section.decide(self.ledger.suspect_own, attachment)

    # -- processes ---------------------------------------------------------------------------------

    def after_fork_in_child(self) -> list[Any]:
        """In a forked child: forget the parent's connections, and have locks and threads of its own.

        :return: all that knew the connections, none of which may be finalized in this process.
        """
        slots = {*self.ledger.slots, *self.connections.by_handle.values()}
        slots |= {slot.instead_of for slot in slots if slot.instead_of is not None}
        entries = [slot.entry() for slot in slots if slot.entry is not None]
        self.connections.lingering.forget()
        self.timeouts.clear()
        self.limits_check = None  # the child has siblings, and its parent may have had none
        ledger, work = engines.in_child(self.ledger, self._clock())
        if self.share is not None:  # what it had is the parent's
            work += engines.set_limit(ledger, 0.0, self._clock())
        self._build(self.section.label, ledger)
        self.effects.do(work)
        return [*slots, *entries]


def _nothing() -> None: ...


def _ignore(_: Core, __: object) -> None: ...
