"""Who holds what: the text of an exhausted pool."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

from .errors import CheckoutTimeout
from .pool import Pool
from .slots import HELD, LENT, OPENING, Attachment

MOST_HOLDERS = 10
"""How many holders the message of a timeout names."""


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
        opening = ", opening" if self.state == OPENING else ""
        return f"{self.name} ({self.seconds:.1f} s{opening})"


def holders(pool: Pool) -> list[Holder]:
    """Return who has the connections of a pool, longest first.  Takes no lock of the pool."""
    now = pool.now()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for slot in pool.connections:
        ident, session, state = slot.holder, slot.session, slot.state
        if state not in (HELD, LENT, OPENING):
            continue
        if session is not None:
            alive = session()
            name = "dead session" if alive is None else f"session {type(alive).__name__}"
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
