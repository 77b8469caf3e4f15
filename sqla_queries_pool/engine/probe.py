"""Is this connection alive, and still to be used?  Asked before one that was idle is handed out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from ..sockets import liveness

LEAST_PING = 0.5
"""Seconds that a server has for the answer to a ping, however little is left of a checkout's timeout."""


class Silent(Exception):
    """The server did not answer the ping in time."""


def staleness(record: Any) -> str | None:
    """Return why SQLAlchemy would replace a record's connection next, in its words, or None.

    There, one that can't be opened is an error at once; here it can be tried again.
    """
    pool = record.owner
    if -1 < pool._recycle < time.time() - record.starttime:
        return "exceeded timeout"
    if pool._invalidate_time > record.starttime:
        return "invalidated due to pool invalidation"
    if record._soft_invalidate_time > record.starttime:
        return "invalidated due to local soft invalidation"
    return None


def alive(record: Any, deadline: float) -> bool:
    """Is a record's connection alive?  Asks the server only where the socket does not tell.

    :param deadline: when the checkout's time is over, by ``time.monotonic``.
    :raises Silent: the server did not answer in time; the connection is lost.
    """
    pool, slot = record.owner, record.slot
    if record.attachment.ping_after == 0:
        slot.suspect = True
    if slot.poll(0):
        verdict = liveness.look(slot.socket, slot.poll, pool._core.failures)
        if verdict is liveness.DEAD:
            return False
        # What another database's server has sent may mean anything.
        if verdict is liveness.DOUBT or getattr(pool._dialect, "name", None) != "postgresql":
            slot.suspect = True
    return not slot.suspect or _answers(record, deadline)


def _start_timeout(record: Any, deadline: float) -> liveness.PingTimeout:
    """Have the connection hung up if a ping takes too long."""
    pool = record.owner
    timeout = liveness.PingTimeout(record.slot.socket, pool._core.failures)
    longest = pool.settings.ping_timeout
    if longest is not None:
        left = max(deadline - time.monotonic(), LEAST_PING)
        timeout.start(pool._core.housekeeper.schedule, min(longest, left))
    return timeout


@contextlib.contextmanager
def ping_timeout(record: Any, deadline: float) -> Iterator[None]:
    """What asks the server in the block has as much time as a ping."""
    timeout = _start_timeout(record, deadline)
    try:
        yield
    finally:
        timeout.cancel()


def _answers(record: Any, deadline: float) -> bool:
    """Ask the server, for as long as a ping may take."""
    pool, slot = record.owner, record.slot
    timeout = _start_timeout(record, deadline)
    try:
        # A pool without an engine has no dialect to ask with.
        answers = not hasattr(pool._dialect, "do_ping") or _ping(pool, slot.handle)
    except NotImplementedError:  # so says that of SQLAlchemy's first 2.0
        answers = True
    except Exception as error:
        if pool.pings and not timeout.expired:  # as SQLAlchemy does; a disconnect is no error there
            raise
        pool.logger.info("%s: %r does not answer the ping: %r", pool._shared.label, slot, error)
        answers = _is_answer(pool._dialect, error, slot.handle)
    finally:
        timeout.cancel()
    slot.suspect = not answers or timeout.expired
    if timeout.expired:
        raise Silent
    return not slot.suspect


def _ping(pool: Any, handle: Any) -> bool:
    """Ask the server; with ``pool_pre_ping`` as SQLAlchemy does: ``handle_error`` listeners hear of it."""
    dialect = pool._dialect
    ping = getattr(dialect, "_do_ping_w_event", dialect.do_ping) if pool.pings else dialect.do_ping
    return bool(ping(handle))


def _is_answer(dialect: Any, error: Exception, handle: Any) -> bool:
    """Does the error not say that the connection is lost?  One in a transaction can't be pinged."""
    of_driver = isinstance(error, dialect.loaded_dbapi.Error)
    return of_driver and not dialect.is_disconnect(error, handle, None)
