"""Which errors of connecting pass by themselves.

PostgreSQL says why it refuses by an SQLSTATE, but libpq hands the text alone to the drivers when a
connection could not be made, so it is the text that is read: the server's messages in English
(``lc_messages``), libpq's own in the language of the drivers' wheels, which is English.
https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

import re
from asyncio import TimeoutError as AsyncTimeoutError  # Python's own since 3.11
from typing import Final

_FULL: Final = (
    # 53300, of the server, a role, a database; and what is kept back for superusers.
    r"too many (clients already|connections for (role|database))",
    r"remaining connection slots are reserved",
    r"no more connections allowed",  # PgBouncer
)
_TEXTS: Final = (
    *_FULL,
    # 57P03 and 57P01: it is about to be there, or about to go.
    r"the database system is (starting up|shutting down|in recovery mode|not (yet )?accepting connections)",
    r"terminating connection (due to administrator command|because of crash)",
    # Nobody listens, or not any more: a restart. A unix socket is not there meanwhile.
    r"Connection (refused|reset by peer|timed out)",
    r"server closed the connection unexpectedly",
    r"could not (receive data from|send data to) server",
    r"SSL (connection has been closed unexpectedly|SYSCALL error|error: unexpected eof)",
    r"connection to server on socket .* failed: No such file or directory",
    r"timeout expired",
    # Several hosts, none of which is the primary yet (``target_session_attrs``).
    r"session is read-only|server is in hot standby mode|None of the hosts match the target attribute",
    # asyncpg, and asyncio below it.
    r"Connect call failed|unexpected connection_lost\(\) call",
    r"connection was closed in the middle of operation",
    r"connection timeout",
    # PgBouncer.
    r"server login has been failing",
    r"pgbouncer cannot connect to server|query_wait_timeout|client_login_timeout|\(server down\)",
)
_PASSES: Final = re.compile("|".join(_TEXTS), re.IGNORECASE)
_IS_FULL: Final = re.compile("|".join(_FULL), re.IGNORECASE)
_STATES: Final = ("53300", "57P01", "57P02", "57P03", "08003", "08006", "08001")
_OF_PYTHON: Final = (ConnectionError, TimeoutError, AsyncTimeoutError, FileNotFoundError)
"""What drivers raise that have the socket from Python: asyncpg does, and as they are."""


_CACHED: Final = re.compile(r"cached error: (.*)")
"""PgBouncer 1.24 and later say what the server behind it has said."""


def passes(error: BaseException) -> bool:
    """Is it worth trying again a moment later?  Not where it is the password, or the name of the database."""
    if state := _state(error):
        return state in _STATES
    if isinstance(error, _OF_PYTHON):
        return True
    text = str(error)
    if cached := _CACHED.search(text):
        text = cached.group(1)
    # Of several hosts, or addresses of one, libpq tells all that it tried; what a server has said counts.
    said = [line for line in text.splitlines() if "FATAL:" in line]
    return all(_PASSES.search(line) for line in said or [text])


def is_full(error: BaseException) -> bool:
    """Is the server there, and has as many connections as it may have?"""
    return _state(error) == "53300" or _IS_FULL.search(str(error)) is not None


def _state(error: BaseException) -> str | None:
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    # A protocol violation is what PgBouncer calls all that it has to say.
    return None if state == "08P01" else state
