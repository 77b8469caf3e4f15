"""What the drivers for asyncio do not tell by a common interface: their socket, and how they end at once.

None of it waits.  Where a driver has no public way, its private one stands here, with the reason; a driver
that is not known has no socket to be looked at, and is closed as SQLAlchemy closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

CANCELLED_IN: Final = 2.0
"""Seconds that a server has to cancel a statement before its connection is closed; as in SQLAlchemy."""
_TERMINATE: Final = b"X\x00\x00\x00\x04"
"""The message with which a client of PostgreSQL says goodbye.
https://www.postgresql.org/docs/current/protocol-message-formats.html"""

_QUIT: Final = b"\x01\x00\x00\x00\x01"
"""The same of MySQL: ``COM_QUIT``."""


class AsyncDriver(NamedTuple):
    """What is known of one driver."""

    descriptor: Callable[[Any], int]
    """The descriptor of a connection's socket."""
    end: Callable[[Any], Any]
    """Closes a connection, in the thread of its loop.  What it returns, if anything, is a future: of what is
    left to be done before the loop ends."""
    bury: Callable[[Any], None]
    """The same when the loop is closed and can do nothing any more; in any thread."""


def _of_transport(transport: Any) -> int:
    # asyncpg and the drivers of MySQL have no public way to their socket.
    return int(transport.get_extra_info("socket").fileno())


def _end_asyncpg(connection: Any) -> Any:
    if connection._cancellations or connection.is_in_transaction():
        # A statement was cancelled a moment ago, and terminate() would take that back: it would run on.
        return asyncio.get_running_loop().create_task(_cancel_and_close(connection))
    # terminate() says nothing to the server, which counts such a session as abandoned (sessions_abandoned in
    # pg_stat_database).
    with contextlib.suppress(Exception):
        connection._transport.write(_TERMINATE)
    connection.terminate()
    return None


async def _cancel_and_close(connection: Any) -> None:
    # A statement may have ended by itself.  Then close() may end before the requests to cancel are sent.
    # It would stop them in the middle of a connect, and the loop would log a ConnectionError.
    pending: set[Any] = getattr(connection, "_cancellations", set())
    requests = set(pending)
    pending.clear()
    with contextlib.suppress(Exception):  # it is closed then, too
        await connection.close(timeout=CANCELLED_IN)
    if requests:
        _, late = await asyncio.wait(requests, timeout=CANCELLED_IN)
        for request in late:
            request.cancel()


def _bury_asyncpg(connection: Any) -> None:
    with contextlib.suppress(Exception):  # "Event loop is closed"
        connection.terminate()
    # What the loop would have done in its next turn.  uvloop's transports are closed with their loop.
    lost = getattr(connection._transport, "_call_connection_lost", None)
    if lost is not None:
        with contextlib.suppress(Exception):  # it has done so
            lost(None)


def _end_psycopg(connection: Any) -> None:
    connection.pgconn.finish()


def _mysqls(transport_of: Callable[[Any], Any], forget: Callable[[Any], None]) -> AsyncDriver:
    """Return what is known of a driver of MySQL, none of which has a public way to its socket.

    :param transport_of: the transport of a connection.
    :param forget: lets a connection forget it, so that it does not complain when it is collected.
    """

    def end(connection: Any) -> None:
        # close() says nothing to the server, which counts such a session as aborted (Aborted_clients).
        with contextlib.suppress(Exception):
            transport_of(connection).write(_QUIT)
        connection.close()

    def bury(connection: Any) -> None:
        transport = transport_of(connection)
        with contextlib.suppress(Exception):  # "Event loop is closed"
            transport.close()
        if (lost := getattr(transport, "_call_connection_lost", None)) is not None:
            with contextlib.suppress(Exception):  # it has done so
                lost(None)
        forget(connection)

    return AsyncDriver(lambda connection: _of_transport(transport_of(connection)), end, bury)


def _forget_aiomysqls(connection: Any) -> None:
    connection._writer = connection._reader = None


def _forget_asyncmys(connection: Any) -> None:
    connection._transport = None


def _end_aiosqlite(connection: Any) -> Any:
    return connection.stop()  # its thread closes the connection, and then says so in the loop


def _no_descriptor(_: Any) -> int:
    return -1


_KNOWN: Final = {
    "asyncpg": AsyncDriver(lambda c: _of_transport(c._transport), _end_asyncpg, _bury_asyncpg),
    "psycopg": AsyncDriver(lambda c: int(c.fileno()), _end_psycopg, _end_psycopg),
    "aiomysql": _mysqls(lambda c: c._writer.transport, _forget_aiomysqls),
    "asyncmy": _mysqls(lambda c: c._transport, _forget_asyncmys),
    "aiosqlite": AsyncDriver(_no_descriptor, _end_aiosqlite, _end_aiosqlite),
}


def known(connection: Any) -> AsyncDriver | None:
    """Return what is known of the driver of a connection, also of one of a class of the user's own."""
    for kind in type(connection).__mro__:
        if (driver := _KNOWN.get(kind.__module__.partition(".")[0])) is not None:
            return driver if driver.end is not _end_aiosqlite or hasattr(connection, "stop") else None
    return None
