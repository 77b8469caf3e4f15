"""How a connection is opened: by a permit, or again in a record that has lost its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ..budget.slots import Permit
from .records import Record
from .sides import NotFirst


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
        with pool._sides.opening(deadline):
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


def reopen(pool: Any, record: Record) -> Record:
    """Open a record's connection again, which was closed; the caller holds it.

    :raises Refused: the server has refused, and it is worth trying again.
    :raises Exception: the driver's; the record was returned.
    """
    return in_runtime(pool, functools.partial(_reopen, pool, record))


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
