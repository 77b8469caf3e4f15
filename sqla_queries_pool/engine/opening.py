"""How a connection is opened: by a permit, or again where it was closed; and what is noted of it.

However it is opened, SQLAlchemy calls what :func:`creator_of` returns.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from ..budget.slots import HELD, OPENING, UNKNOWN, Attachment, Permit
from ..runtime.jitter import lifetime
from ..sockets import liveness
from ..sockets.drivers import UNSEEN_FOR, is_seen
from . import credentials
from .limits import Check
from .records import Record
from .sides import NotFirst

LOOK_EVERY = 0.01
"""Seconds between two looks at what the pool itself opens, while an application waits for it."""


class Refused(Exception):
    """There is nothing, and it is worth trying again: the server has refused a connection, mostly."""

    def __init__(self, refusal: Any) -> None:
        # Without the traceback, which would keep the record alive for as long as the checkout waits.
        self.refusal: Exception | None = None if refusal is None else refusal.with_traceback(None)


def open_connection(
    pool: Any, permit: Permit, deadline: float = math.inf, leaves_at: float = math.inf
) -> Record:
    """Open a connection by a permit; the caller holds it then.

    :param deadline: until when it may wait for another loop that opens the first one, by ``time.monotonic``.
    :param leaves_at: when its caller leaves, by the same clock.
    :raises TooLate: its caller has left: what is opened goes to the next one.
    :raises Refused: the server has refused, and it is worth trying again; or the time was over.
    :raises Exception: the driver's; the slot was given back.
    """
    return in_runtime(pool, functools.partial(_open, pool, permit, deadline), leaves_at)


def _open(pool: Any, permit: Permit, deadline: float) -> Record:
    core = pool._core
    try:
        core.checkouts.close_evicted(permit)
        record = Record(pool, permit.slot)
        core.checkouts.bind(record.slot, record)
        with pool._sides.opening(pool, deadline):
            record.get_connection()
    except NotFirst:
        core.checkouts.failed(permit)
        raise Refused(None) from None
    except BaseException as error:
        refused = core.admission.refused(error)
        core.checkouts.failed(permit)
        if refused:
            raise Refused(error) from error
        raise
    core.checkouts.opened(record.slot)
    return record


def reopen(pool: Any, record: Record, leaves_at: float = math.inf) -> Record:
    """Open a record's connection again, which was closed; the caller holds it.

    :param leaves_at: when its caller leaves, by ``time.monotonic``.
    :raises TooLate: its caller has left: what is opened goes to the next one.
    :raises Refused: the server has refused, and it is worth trying again.
    :raises Exception: the driver's; the record was returned.
    """
    return in_runtime(pool, functools.partial(_reopen, pool, record), leaves_at)


def _reopen(pool: Any, record: Record) -> Record:
    core = pool._core
    try:
        record.get_connection()
    except BaseException as error:
        refused = core.admission.refused(error)
        record.slot.holder = None  # nobody had it: no checkout
        record.return_hollow(error)
        if refused:
            raise Refused(error) from error
        raise
    core.checkouts.opened(record.slot)
    return record


def in_runtime(pool: Any, opening: Callable[[], Record], leaves_at: float = math.inf) -> Record:
    """Have the runtime open a connection.  Where its caller leaves meanwhile, it goes to the next one."""

    def unwanted(record: Record) -> None:
        pool._core.checkouts.give_unused(record.attachment, record)

    if pool._identity.in_memory:  # SQLite's may be used in the thread alone that has opened it
        leaves_at = math.inf
    record: Record = pool._sides.runtime.open(opening, unwanted, leaves_at)
    return record


def warm_up(pool: Any, attachment: Attachment) -> None:
    """Open connections until there are ``min_size``, or as many as there is room for.

    :raises Exception: the driver's, if one can't be opened.
    """
    _fill(pool, attachment)
    # The housekeeper may have begun one just before.  Where that fails, it is opened here.
    while _in_work(attachment):
        attachment.runtime.pause((), LOOK_EVERY)
        _fill(pool, attachment)


def _fill(pool: Any, attachment: Attachment) -> None:
    permits: list[Permit] = []
    try:
        # All at once: the housekeeper might begin to open some of them, too.
        while (permit := pool._checkouts.reserve(attachment)) is not None:
            permits.append(permit)
        while permits:
            pool._checkouts.give_unused(attachment, open_connection(pool, permits.pop()))
    except Refused as error:
        raise error.refusal or error from None
    finally:
        for permit in permits:
            pool._checkouts.failed(permit)


def _in_work(attachment: Attachment) -> bool:
    """Does the pool itself open one for it, or renew one?  Takes no lock."""
    slots = attachment.quota.slots.copy()
    its = (slot for slot in slots if slot.home is attachment.ref and slot.holder is None)
    return any(slot.state in (OPENING, HELD) for slot in its)


# -- the creator -----------------------------------------------------------------------------------


def creator_of(
    pool: Any, create: Callable[[ConnectionPoolEntry], Any]
) -> Callable[[ConnectionPoolEntry], Any]:
    """Return what SQLAlchemy calls to open a connection.

    :param create: opens one; SQLAlchemy's own wrapper of the engine's creator.
    """

    def connect(record: ConnectionPoolEntry) -> Any:
        # Read before connecting: what a dispose overtakes is of the old generation.
        attachment, core = getattr(record, "attachment", pool._attachment), pool._core
        generation = attachment.generation
        core.admission.wait_for_room(pool._close_timeout, attachment.runtime.pause)
        begin = time.monotonic()
        try:
            dbapi_connection = credentials.create(create, record, pool.logger)
        except Exception as error:
            core.admission.failed(error)
            raise
        if isinstance(record, Record):
            _note(pool, record, dbapi_connection, attachment, generation, time.monotonic() - begin)
        return dbapi_connection

    return connect


def _note(
    pool: Any, record: Record, handle: Any, attachment: Attachment, generation: int, took: float
) -> None:
    """A connection was opened: tell those parts of the pool that want to know.

    :param took: for how many seconds it was being opened.
    """
    core, sides = pool._core, pool._sides
    core.admission.last_error = None
    socket = sides.socket(handle)
    _note_liveness(pool, attachment, socket)
    begun = sides.begun(handle, pool._dialect)
    core.connections.opened(record.slot, handle, socket, begun, generation, lifetime(pool._recycle), took)
    if pool._invalidate_time > record.starttime:
        # While it was opened, another was found dead.  SQLAlchemy would replace this one, too, at
        # once; here it is checked, next time.
        record.starttime = time.time()
        record.slot.suspect = True
    pool.logger.info("%s: opened %r in %.3f s", pool._shared.label, record.slot, took)
    if pool.settings.idle_in_transaction_after is not None:
        core.idling.watch()
    if pool.settings.check_limits and (core.limits_check is None or core.limit > core.limits_check.size):
        _check_limits(pool, attachment)


def _note_liveness(pool: Any, attachment: Attachment, socket: Any) -> None:
    """What can be done to see whether such a connection is alive?"""
    settings, dialect, failures = pool.settings, pool._dialect, pool._core.failures
    seen, name, before = is_seen(socket), getattr(dialect, "name", None), attachment.liveness
    # One of SQLite's can't be lost.
    never = settings.ping_after is None or name in (None, "sqlite")
    if not seen and not never:
        attachment.ping_after = min(attachment.ping_after, UNSEEN_FOR)
    attachment.liveness = liveness.way(seen, attachment.ping_after if name else math.inf)
    if before != UNKNOWN or name in (None, "sqlite"):
        return
    if seen and not liveness.AVAILABLE:
        failures("look at sockets on this platform", "each checkout pings")
    elif not seen:
        after = attachment.ping_after
        then = "nothing" if after == math.inf else f"a ping of what was idle for {after:g} s"
        why = f"{then} tells whether a connection is alive, and ping_timeout does nothing"
        failures(f"see the sockets of the driver {getattr(dialect, 'driver', name)}", why)


def _check_limits(pool: Any, attachment: Attachment) -> None:
    core = pool._core
    core.limits_check = Check(pool, attachment)
    if getattr(pool._dialect, "name", "") == "postgresql" and not pool._identity.private:
        core.limits_check.begin()
