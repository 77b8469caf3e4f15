"""A connection whose server says "read only": is that a standby, so that the connection is to be replaced?

SQLSTATE 25006 alone is no proof, because a session may be read-only by its own wish.  So the connection is
asked, ``pg_is_in_recovery()``, before its next use: until then the failed transaction is its holder's.

A primary may also be fenced: ``default_transaction_read_only`` is set in its configuration, which its
sessions read again.  A session that is older than that is replaced; one that was opened since is not, for
the next one would lead to the same server.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from sqlalchemy import event

from ..budget.slots import Slot
from . import probe
from .records import Record

READ_ONLY = "25006"
STANDBY = "its server is a standby"
FENCED = "its server was set read-only"
QUERY = (
    "SELECT pg_is_in_recovery(), EXISTS (SELECT FROM pg_settings, pg_stat_activity "
    "WHERE name = 'default_transaction_read_only' AND setting = 'on' AND source = 'configuration file' "
    "AND pid = pg_backend_pid() AND backend_start < pg_conf_load_time())"
)
"""The load time of a session is its own: see ``pg_conf_load_time`` in
https://www.postgresql.org/docs/current/functions-info.html"""
SPREAD_EVERY = 60.0
"""Seconds from one time that a connection on a standby has all others of its engine asked to the next.  Where
the URL leads to a standby, those that are opened instead are on it, too."""


class Failover:
    """Which connections of an engine are to be asked.

    :param core: the pool's.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self._to_ask: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._spread_at = -math.inf

    def said_read_only(self, slot: Slot) -> None:
        """The holder of a connection had this error: the connection is asked before its next use."""
        self._to_ask.add(slot)
        slot.suspect = True

    def why_useless(self, record: Record, deadline: float) -> str | None:
        """Return why a record's connection can't write, if not by its own wish, or None.

        The server is asked where there is a reason alone.

        :param deadline: when the checkout's time is over, by ``time.monotonic``.
        """
        if record.slot not in self._to_ask:
            return None
        self._to_ask.discard(record.slot)
        if (why := _ask(record, deadline)) is None:
            return None
        now = self._core.now()
        if now - self._spread_at >= SPREAD_EVERY:
            self._spread_at = now
            self._to_ask.update(
                slot for slot in self._core.ledger.slots.copy() if slot.home is record.slot.home
            )
            self._to_ask.discard(record.slot)
            self._core.suspect_own(record.attachment)
        return why


def _ask(record: Record, deadline: float) -> str | None:
    """Ask the server, for as long as a ping may take.  One that does not answer is of no use either."""
    with probe.ping_timeout(record, deadline):
        try:
            cursor: Any = record.dbapi_connection.cursor()  # type: ignore[union-attr]
            try:
                cursor.execute(QUERY)
                in_recovery, is_fenced = cursor.fetchone()
            finally:
                cursor.close()
            record.reset()
        except Exception:
            return STANDBY
    return STANDBY if in_recovery else FENCED if is_fenced else None


def listen(dialect: Any) -> None:
    """Have the connections of a dialect's engines asked where their server has said "read only"."""
    if getattr(dialect, "name", None) == "postgresql" and not event.contains(
        dialect, "handle_error", _on_error
    ):
        event.listen(dialect, "handle_error", _on_error)


def _on_error(context: Any) -> None:
    error, connection = context.original_exception, context.connection
    if connection is None or READ_ONLY not in (
        getattr(error, "sqlstate", None),
        getattr(error, "pgcode", None),
    ):
        return
    if (
        connection.closed
        or connection.invalidated
        or connection.get_execution_options().get("postgresql_readonly")
    ):
        return
    record = getattr(connection.connection, "_connection_record", None)
    if record.__class__ is Record:
        record.owner.failover.said_read_only(record.slot)
