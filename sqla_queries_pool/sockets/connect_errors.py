"""Which errors of connecting pass by themselves.

Where a driver hands on a code of the server, or has one of its own, the code counts, whatever the language.

PostgreSQL says why it refuses by an SQLSTATE, but libpq hands the text alone to the drivers when a
connection could not be made, so it is the text that is read: the server's messages in English
(``lc_messages``), libpq's own in the language of the drivers' wheels, which is English.
https://www.postgresql.org/docs/current/errcodes-appendix.html

MySQL and MariaDB have numbers: the server's, and the client library's, which drivers in Python use as well.
https://dev.mysql.com/doc/mysql-errors/en/server-error-reference.html
https://mariadb.com/docs/server/reference/error-codes

Oracle's and SQL Server's are as their documentation has them; no such server was tried.
https://docs.oracle.com/en/error-help/db/
https://learn.microsoft.com/sql/relational-databases/errors-events/database-engine-events-and-errors
"""

from __future__ import annotations

import re
from asyncio import TimeoutError as AsyncTimeoutError  # Python's own since 3.11
from collections.abc import Callable
from socket import gaierror
from typing import Any, Final, NamedTuple

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
    r"^network error$",  # pg8000: the end of the stream
    # PgBouncer.
    r"server login has been failing",
    r"pgbouncer cannot connect to server|query_wait_timeout|client_login_timeout|\(server down\)",
)
_PASSES: Final = "|".join(_TEXTS)
_IS_FULL: Final = "|".join(_FULL)
_STATES: Final = ("53300", "57P01", "57P02", "57P03", "08003", "08006", "08001")
_OF_PYTHON: Final = (ConnectionError, TimeoutError, AsyncTimeoutError, FileNotFoundError)
"""What drivers raise that have the socket from Python, as it is (asyncpg) or as the cause of an error."""


_CACHED: Final = r"cached error: (.*)"
"""PgBouncer 1.24 and later say what the server behind it has said."""


class Codes(NamedTuple):
    """The codes of one database."""

    of: Callable[[Any], set[Any]]
    """The codes of a driver's error."""
    full: set[Any]
    """The server is there, and has as many connections as it may have."""
    passing: set[Any]
    """It is starting, stopping, restarting, or out of reach; what is full passes, too."""


def _of_mysql(error: Any) -> set[Any]:
    number = getattr(error, "errno", None)  # mariadb's, and MySQL's own driver
    if not isinstance(number, int):
        number = error.args[0] if error.args else None
    if number == USER_LIMIT and "max_user_connections" not in str(error):
        return set()  # so many statements or connections per hour
    return {number}


def _of_oracle(error: Any) -> set[Any]:
    # "DPY-6005: cannot connect … DPY-6000: Listener refused … (Similar to ORA-12516)", the least first.
    found = re.findall(r"ORA-(\d+)|(DPY-\d+)", str(error))
    codes: set[Any] = {int(number) if number else code for number, code in found}
    return codes - {"DPY-6005"} or codes


def _of_sql_server(error: Any) -> set[Any]:
    first = error.args[0] if error.args else None
    if isinstance(first, tuple):  # pymssql
        first = first[0] if first else None
    # pyodbc has an SQLSTATE, and the server's number in the text: "… (18456) (SQLDriverConnect)".
    return {first, *map(int, re.findall(r"\((\d+)\)", str(error)))}


USER_LIMIT: Final = 1226
_MYSQL: Final = Codes(
    _of_mysql,
    {
        1040,  # too many connections
        1203,  # of this user
        USER_LIMIT,  # the same, where the limit is the user's own
    },
    {
        1053,  # shutdown in progress
        1135,  # no thread for it
        *range(1158, 1162),  # an error while reading or writing, a timeout
        1927,  # killed
        3032,  # offline mode
        # Of the client: refused, no unix socket, gone, lost.
        *(2002, 2003, 2006, 2013, 2055),
    },
)
_ORACLE: Final = Codes(
    _of_oracle,
    {
        18,  # sessions
        20,  # processes
        2391,  # sessions of this user
        *(12516, 12519, 12520),  # the listener's: no handler, which is how a full server looks from there
        12540,  # a limit of the listener's own
    },
    {
        *(1033, 1034, 1089, 1090, 1092),  # starting, not there, stopping
        # The listener: does not know it yet, can't hand over, blocks; is not there.
        *(12505, 12514, 12518, 12528, 12541),
        *(3113, 3114, 3135, 12170, 12535, 12537, 12547, 12571),  # lost, or not in time
        *("DPY-4011", "DPY-6001", "DPY-6003", "DPY-6005"),  # lost, not known yet, out of reach
    },
)
_SQL_SERVER: Final = Codes(
    _of_sql_server,
    {
        17809,  # user connections
        *(10928, 10929, 10936),  # Azure: sessions of the database, of the pool
    },
    {
        *(17142, 17187, 17189, 18401),  # paused, not ready yet, no thread for it, being upgraded
        *(40197, 40501, 40613, 49918),  # Azure: is being moved, busy, not available, no resources
        *(20003, 20004, 20006, 20009, 20047),  # pymssql's DB-Library: timeout, lost, out of reach
        *("08001", "08S01", "HYT00", "HYT01"),  # ODBC: out of reach, lost, timeout
    },
)
_CODES: Final = {
    **dict.fromkeys(("pymysql", "MySQLdb", "mariadb", "mysql", "asyncmy", "aiomysql", "cymysql"), _MYSQL),
    **dict.fromkeys(("oracledb", "cx_Oracle"), _ORACLE),
    **dict.fromkeys(("pyodbc", "pymssql"), _SQL_SERVER),
}
"""The package of a driver's errors -> its codes.  Those of all others are taken for PostgreSQL's."""


def passes(error: BaseException) -> bool:
    """Is it worth trying again a moment later?  Not where it is the password, or the name of the database."""
    if isinstance(_cause(error), gaierror):  # the name of the host
        return False
    if codes := _codes(error):
        return not codes.of(error).isdisjoint(codes.full | codes.passing)
    if state := _state(error):
        return state in _STATES
    if isinstance(error, _OF_PYTHON) or isinstance(_cause(error), _OF_PYTHON):
        return True
    text = str(error)
    if cached := re.search(_CACHED, text):
        text = cached.group(1)
    # Of several hosts, or addresses of one, libpq tells all that it tried; what a server has said counts.
    said = [line for line in text.splitlines() if "FATAL:" in line]
    return all(re.search(_PASSES, line, re.IGNORECASE) for line in said or [text])


def is_full(error: BaseException) -> bool:
    """Is the server there, and has as many connections as it may have?"""
    if codes := _codes(error):
        return not codes.of(error).isdisjoint(codes.full)
    if state := _state(error):
        return state == "53300"
    return re.search(_IS_FULL, str(error), re.IGNORECASE) is not None


def _codes(error: BaseException) -> Codes | None:
    for kind in type(error).__mro__:
        if codes := _CODES.get(kind.__module__.partition(".")[0]):
            return codes
    return None


def _cause(error: BaseException) -> Any:
    """The error of a socket that a driver has made its own of: the first name is PyMySQL's."""
    return getattr(error, "original_exception", None) or error.__cause__


_AUTHENTICATION: Final = (
    # 28P01, and 28000 for PAM (RDS IAM), LDAP, GSSAPI, or a role that was dropped or locked (Vault); not
    # the text of a rule of pg_hba.conf.
    r"authentication failed for (user|role)|role .* (does not exist|is not permitted to log in)"
)


def is_authentication(error: BaseException) -> bool:
    """Has the server refused the password, or the token that stands for it?"""
    said = re.search(_AUTHENTICATION, str(error), re.IGNORECASE)
    return _state(error) in ("28P01", "28000") or said is not None


def _state(error: BaseException) -> str | None:
    state: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state is None and error.args and isinstance(error.args[0], dict):  # pg8000
        state = error.args[0].get("C")
    # A protocol violation is what PgBouncer calls all that it has to say.
    return None if state == "08P01" else state
