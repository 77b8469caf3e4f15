"""Why a checkout got nothing, most likely, and what to do about it."""

from __future__ import annotations

import math

from ..budget import slots
from ..budget.slots import QUEUE_FULL, Rejected
from ..budget.stats import NEW_FOLDER, HostStatistics
from .snapshot import Diagnosis, Snapshot

LONG = 10.0
"""Seconds for which a connection must be checked out to look forgotten, at least ..."""
LONGER = 10.0
"""... and so many times as long as connections are used on average."""

OF_NO_CLASS = ("nested-checkout", "refused", "slow-connect")
"""What counts, whatever class a checkout is of."""

NEVER_NEST = (
    "Don't check out a second connection while holding the first, or raise max_size above the number of "
    "threads or tasks that do."
)


def diagnose(
    seen: Snapshot, asker: int, parents: tuple[int, ...] = (), own: float | None = None
) -> Diagnosis:
    """Say why a checkout got nothing, most likely, and what to do about it.

    :param asker: the :attr:`.Holder.caller` whose checkout this is; 0 where the snapshot may be older than
        the checkout, so that nothing is said of the asker itself.
    :param parents: of the asker, as :attr:`.Waiting.parents`.
    :param own: the limit of the asker's engine, where that has all of it and the pool has more.
    """
    host = seen.statistics.host
    elsewhere = host if host is not None and host.is_elsewhere and own is None else None
    return (
        _refused(seen)
        or (_nested(seen, asker, parents) if elsewhere is None else None)
        or _slow_connect(seen)
        or _kept(seen)
        or (_host(elsewhere) if elsewhere is not None else _too_small(own))
    )


def _refused(seen: Snapshot) -> Diagnosis | None:
    n = seen.statistics
    if not seen.last_connect_error or n.open >= (n.limit or math.inf):
        return None
    return Diagnosis(
        "refused",
        f"the server refuses connections ({seen.last_connect_error.splitlines()[0]})",
        "Check the server. The pool keeps trying and serves waiting checkouts as soon as it connects.",
    )


def _nested(seen: Snapshot, asker: int, parents: tuple[int, ...]) -> Diagnosis | None:
    """Does a caller that waits hold a connection, or one that waits for those that wait?"""
    callers = [(holder, holder.caller) for holder in seen.holders if holder.caller is not None]
    nested = [holder for holder, who in callers if who == asker or who in seen.callers_waiting]
    if nested:
        mine = sum(holder.caller == asker for holder in nested)
        kind = "task" if nested[0].is_task else "thread"
        whose = f"this {kind} already holds" if mine else f"waiting {kind}s already hold"
        return Diagnosis(
            "nested-checkout",
            f"{whose} {mine or len(nested)} of them, and each nested checkout needs one more",
            NEVER_NEST,
        )
    outer = next((h for h, who in callers if who in parents or who in seen.parents_of_waiting), None)
    if outer is None:
        return None
    return Diagnosis(
        "nested-checkout",
        f"{outer} has a connection and has started tasks that wait for one, as asyncio.gather() does",
        NEVER_NEST,
    )


def _slow_connect(seen: Snapshot) -> Diagnosis | None:
    if not seen.holders or any(holder.state != slots.OPENING for holder in seen.holders):
        return None
    return Diagnosis(
        "slow-connect",
        "connecting is slow: all of them are still being opened",
        "Check the network and the server. The driver's connect_timeout limits how long a connect takes.",
    )


def _kept(seen: Snapshot) -> Diagnosis | None:
    """Does one holder keep a connection that others would have returned by now?"""
    # While it executes, another thread has it.
    ended = next((h for h in seen.holders if h.ended and h.transaction != "executing"), None)
    if ended is not None:
        return _leak(f"{ended} did not return its connection")
    longest = next((holder for holder in seen.holders if holder.state != slots.OPENING), None)
    if longest is None or longest.seconds < max(LONG, LONGER * seen.statistics.use_time.mean):
        return None
    if longest.transaction == "executing":
        return Diagnosis(
            "long-use",
            f"{longest} runs a long statement",
            "Find it in pg_stat_activity by its backend's pid. statement_timeout would end it.",
        )
    return _leak(f"{longest} seems to have forgotten to return its connection")


def _too_small(own: float | None) -> Diagnosis:
    """Nothing looks wrong."""
    if own is not None:
        return Diagnosis(
            "too-small",
            f"this engine has reached its own limit of {own:.0f}, and none is held for long",
            "Raise the max_size of this engine, or return connections sooner.",
        )
    return Diagnosis(
        "too-small",
        "all connections are in use, and none for long",
        "Raise max_size, which all engines of this database share, or return connections sooner.",
    )


def of_class(seen: Snapshot, name: str | None, likely: Diagnosis) -> Diagnosis:
    """Return why a class got nothing: it has all that it may have, or what was found without looking at that.

    :param name: the class of the checkout, None where the pool has none.
    :param likely: what was found.
    """
    terms = seen.statistics.classes.get(name or "")
    if terms is None or not terms.is_full or likely.kind in OF_NO_CLASS:
        return likely
    return Diagnosis(
        "ceiling",
        f"class {name} has reached its ceiling of {terms.max}",
        "Raise its max in classes, or return connections sooner.",
    )


def _host(host: HostStatistics) -> Diagnosis:
    if host.problem:
        return Diagnosis(
            "host",
            f"the budget of the host can't be used fully: {host.problem}",
            "Try again in a moment."
            if host.problem == NEW_FOLDER
            else "Give the folder back to this user, or make room where it is.",
        )
    others = host.leases - host.mine
    hold = f"hold {others} of the {host.budget}" if others else f"hold the other {host.budget - host.mine}"
    return Diagnosis(
        "host",
        f"other processes of this host {hold} connections",
        "Raise max_size in all of them, if the server has room for more, or return connections sooner.",
    )


def _leak(cause: str) -> Diagnosis:
    return Diagnosis(
        "leak",
        cause,
        "Close each connection (or its session) as soon as its work is done. track_stacks=True shows where "
        "it was checked out.",
    )


def rejected(why: Rejected) -> Diagnosis:
    """Say why the pool rejected a checkout, and what to do about it."""
    if why.kind == QUEUE_FULL:
        return Diagnosis(why.kind, why.why, "Try again later, or raise max_waiting.")
    if why.kind == slots.DRAINED:
        return Diagnosis(why.kind, why.why, "The process is about to end. engine.pool.resume() undoes it.")
    if why.kind == slots.UNREACHABLE:
        return Diagnosis(why.kind, why.why, "Check the server. The first connect that succeeds ends it.")
    return Diagnosis(why.kind, why.why, "Try again later, reduce the load, or raise queue_target.")


SUSPENDED = Diagnosis(
    slots.SUSPENDED,
    "The pool is suspended: checkouts wait until it is resumed",
    "Call engine.pool.resume() when the failover or the migration is over.",
)
"""What a checkout is told that was suspended for as long as it could wait."""
SILENT = Diagnosis(
    "slow-connect",
    "the server is not reached: it answered neither a ping nor a connect",
    "Check the network and the server.",
)
"""What a checkout is told whose ping and connect were not answered."""
