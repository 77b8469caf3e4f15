"""Who holds what: the text of an exhausted pool."""

from __future__ import annotations

import math
import threading
import time
from typing import Any, NamedTuple

from . import slots
from .errors import CheckoutTimeout
from .pool import Pool
from .slots import HELD, LENT, Attachment, Resetter

MOST_HOLDERS = 10
"""How many holders the message of a timeout names."""


WAITING, OPENING, PROBING = "waiting for a slot", "opening a connection", "probing one that was idle"
"""What a checkout may be at."""
_WE = "QueriesPool"


class Stages:
    """What a checkout has been at, and for how long: for its error."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._stage = ""
        self._since = time.monotonic()

    def enter(self, stage: str) -> None:
        """Begin a stage, and end the one before."""
        now = time.monotonic()
        if self._stage:
            self._spent[self._stage] = self._spent.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def note(self, error: Any, label: str) -> None:
        """Say in which stage an error came (PEP 678; before Python 3.11 tracebacks don't show notes)."""
        self.enter(stage := self._stage)
        spent = ", ".join(f"{seconds:.1f} s {stage}" for stage, seconds in self._spent.items())
        others = [note for note in getattr(error, "__notes__", []) if not note.startswith(_WE)]
        error.__notes__ = [*others, f"{_WE} {label} was {stage}; it has spent {spent}"]


class Holder(NamedTuple):
    """Who has one connection."""

    thread: int | None
    """The identifier of the thread; None for a session's."""
    name: str
    """The thread's name, or the kind of the session that locked it."""
    seconds: float
    """For how long."""
    state: str
    """``held`` or ``opening``."""

    def __str__(self) -> str:
        opening = ", opening" if self.state == slots.OPENING else ""
        return f"{self.name} ({self.seconds:.1f} s{opening})"


def holders(pool: Pool) -> list[Holder]:
    """Return who has the connections of a pool, longest first.  Takes no lock of the pool."""
    now = pool.now()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for slot in pool.connections:
        ident, session, state = slot.holder, slot.session, slot.state
        if state not in (HELD, LENT, slots.OPENING):
            continue
        if session is not None:
            alive = session()
            name = "dead session" if alive is None else f"session {type(alive).__name__}"
            if isinstance(alive, Resetter):
                name = "the pool itself, which resets it"
        elif ident is None:
            name = "the pool itself"
        else:
            name = names.get(ident, f"thread {ident}, which has ended")
        found.append(Holder(None if session is not None else ident, name, max(0.0, now - slot.since), state))
    return sorted(found, key=lambda holder: -holder.seconds)


def checkout_timeout(pool: Pool, attachment: Attachment, timeout: float) -> CheckoutTimeout:
    """Return the error for a checkout that got no connection; its cause is the last connect error."""
    n = pool.numbers  # the one that asks has left the line, but counts
    who = holders(pool)
    shown = ", ".join(map(str, who[:MOST_HOLDERS]))
    rest = f", and {len(who) - MOST_HOLDERS} more" if len(who) > MOST_HOLDERS else ""
    ceiling = attachment.quota.stated
    own = (
        ""
        if ceiling is None or ceiling >= (pool.max_size or math.inf)
        else f" ({ceiling:.0f} for this engine)"
    )
    mine = sum(holder.thread == threading.get_ident() for holder in who)
    nested = (
        f"This thread holds {mine} of them itself: what is checked out inside another checkout counts "
        "as well, in all threads that do so at once. "
    )
    error = CheckoutTimeout(
        f"QueriesPool {pool.label} (pid {pool.id}) had no connection within {timeout:g} s: "
        f"open {n.open}, held {n.held}, opening {n.opening}, waiting {n.waiting + bool(timeout)}, "
        f"limit {pool.max_size}{own}. "
        f"Held by, longest first: {shown or 'nobody any more'}{rest}. {nested if mine else ''}"
        "Either some of them keep a connection for too long: close it (or the session) as soon as "
        "the work with it is done, and never ask for a second one while holding the first. Or the "
        "limit, which all engines of this database share, is too small: raise max_size.",
        code="3o7r",
    )
    error.__cause__ = pool.last_connect_error
    return error
