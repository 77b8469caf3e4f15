"""What is used of SQLAlchemy and does not stand in its documentation: all of it, with the reasons.

``tests/test_seams.py`` fails when SQLAlchemy changes any of it, and when another room uses something
private that :data:`PRIVATE` does not name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool.base import _AdhocProxiedConnection as AdhocProxiedConnection
from sqlalchemy.pool.base import _ConnectionFairy as ConnectionFairy
from sqlalchemy.pool.base import _ConnectionRecord as ConnectionRecord
from sqlalchemy.pool.base import _finalize_fairy

__all__ = [
    "FINALIZER",
    "KNOWS_PROXY",
    "PRIVATE",
    "AdhocProxiedConnection",
    "ConnectionFairy",
    "ConnectionRecord",
    "begun",
    "connect_arguments",
    "made_by_engine",
    "renew_first_mutex",
]

FINALIZER: Final = _finalize_fairy.__code__
"""What calls a record's ``invalidate()`` where its rollback has failed at check-in."""

KNOWS_PROXY: Final = {*ConnectionFairy.__slots__} - {"_finalizer", "__dict__", "__weakref__"} == {
    *("_connection_record", "_counter", "_echo", "_pool", "dbapi_connection")
}
"""Is SQLAlchemy's proxy made of what ``records.Proxy`` fills in?  A later SQLAlchemy may want more; then its
own way of checking out and in is gone, which is slower."""

PRIVATE: Final[Mapping[str, str]] = {
    # Overridden: the points at which SQLAlchemy lets a pool see what it does.
    "_do_get": "a checkout asks for a record",
    "_do_return_conn": "a record is let go: by detach(), and by SQLAlchemy's own checkin()",
    "_close_connection": "every socket that SQLAlchemy closes goes through it",
    "_should_wrap_creator": "every socket that SQLAlchemy opens goes through what it returns",
    "_invalidate": "of a pool: a disconnect was found, all that are older are to be replaced",
    "_checkin": "a parameter of it; of a proxy: SQLAlchemy's own way of returning it",
    "_invalidate_time": "of a pool: what is older is to be replaced",
    "_soft_invalidate_time": "of a record: the same",
    "_sqla_logger_namespace": "the logger's name, which is the module's otherwise",
    # Read, to make a successor with the same parameters; SQLAlchemy's own pools do the same.
    "_creator": "what opens a connection",
    "_dialect": "resets and closes; an instance has one only if it was passed",
    "_recycle": "pool_recycle",
    "_pre_ping": "pool_pre_ping; off, for probe.py pings",
    "Dialect._do_ping_w_event": "what pool_pre_ping asks; it tells the handle_error listeners",
    "_orig_logging_name": "pool_logging_name, None where none was stated",
    "_dispatch": "a parameter of Pool: the listeners",
    # Of a record.
    "_ConnectionRecord": "the one class whose objects a pool hands to SQLAlchemy; made without a "
    "connection, it opens one in get_connection()",
    "checkin": "of a record: what it does is done again in Record.checkin, so that a failure loses no slot",
    "_fairy_was_created": "a parameter of checkin(): False where a checkout failed before it had a fairy",
    "finalize_callback": "of a record: what dialects want called when it is returned, or closed",
    # Of a connection's proxy.
    "_ConnectionFairy": "the proxy itself; Proxy is one, and does what it does in fewer steps",
    "_connection_record": "its record, None once it was returned",
    "_pool": "the pool that it came from",
    "_echo": "is it logged?",
    "_counter": "how many have it, which is one: it is closed when it is 0",
    "_finalizer": "what SQLAlchemy 2.1 gives it in case it is abandoned; detached when it was returned",
    "_reset": "tells the listeners how a connection was reset that cannot be",
    "_should_log_debug": "of a pool: is a checkout to be logged?",
    "_checkin_failed": "of a record: returns it where a checkout listener has failed",
    "_close_special": "close(), where the transaction is known to be over",
    "_reset_on_return": "pool_reset_on_return",
    "_finalize_fairy": "a function, known by its code: invalidates a record whose rollback has failed",
    "_AdhocProxiedConnection": "what a dialect's do_rollback() takes for a connection that is nobody's",
    # Of asyncio.
    "AsyncAdapt_asyncpg_connection._transaction": "None where none has begun; its rollback() looks at it",
    "AsyncAdapt_asyncpg_connection._execute_mutex": "locked while a statement executes",
    "await_only": "waits in a greenlet, and lets the loop go on: dialects of others use it, too",
    "_exec_once_mutex": "of listeners: one connection alone runs those to connect first; a lock of one loop",
    "_set_asyncio": "of listeners: that lock is one of asyncio's, not of threads, which would block the loop",
    "greenlet_spawn": "runs a function in which await_only() can be used",
    # Of an engine: see connect_arguments.
    "sqlalchemy.engine.create": "the module of the creator that create_engine makes",
    "cargs_tup": "a variable of that creator: the positional connect arguments",
    "cargs": "the same in SQLAlchemy 2.0.0",
    "cparams": "another: the connect arguments by name",
}
"""What -> why."""


def made_by_engine(creator: object) -> bool:
    """Is it the creator that ``create_engine`` makes where the user gives none?"""
    return getattr(creator, "__module__", None) == "sqlalchemy.engine.create"


def connect_arguments(creator: Callable[..., Any], dialect: Any) -> tuple[Any, Any] | None:
    """Return what an engine's own creator passes to the DBAPI's ``connect``, without connecting.

    A ``do_connect`` listener that raises sees it.  One on the dialect's *class* runs before ours, and may
    connect for real: then the creator's variables tell.

    :return: the arguments by position and by name; None if the creator is a user's own, which is never
        called for this, or does not tell.
    """
    if dialect is None or not made_by_engine(creator):
        return None
    seen: list[tuple[Any, Any]] = []
    me = get_ident()

    def listen(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
        if get_ident() == me:
            seen.append((list(arguments), dict(options)))
            raise _Seen

    event.listen(dialect, "do_connect", listen, insert=True)
    try:
        if next(iter(dialect.dispatch.do_connect), None) is listen:
            creator()
    except _Seen:
        return seen.pop()
    finally:
        event.remove(dialect, "do_connect", listen)
    variables = inspect.getclosurevars(creator).nonlocals
    arguments = variables.get("cargs_tup", variables.get("cargs"))
    return None if arguments is None or "cparams" not in variables else (arguments, variables["cparams"])


def begun(handle: Any, dialect: Any) -> Callable[[], Any] | None:
    """Return what tells at once whether a transaction has begun on a connection of asyncio, or None.

    A rollback of nothing is nothing to the server; but to await it takes as long as a checkout.  A dialect
    that has more to do in its ``do_rollback`` does it each time.
    """
    if type(dialect).do_rollback is not DefaultDialect.do_rollback or "do_rollback" in vars(dialect):
        return None
    if hasattr(handle, "_transaction"):  # the adapter of asyncpg; its own rollback() looks at the same
        return functools.partial(getattr, handle, "_transaction")
    pgconn = getattr(getattr(handle, "driver_connection", None), "pgconn", None)  # psycopg's
    return None if pgconn is None else functools.partial(getattr, pgconn, "transaction_status")


def renew_first_mutex(pool: Any) -> None:
    """Have another loop open the first connection.

    SQLAlchemy has an :class:`asyncio.Lock` for it, which belongs to the loop in which somebody waited for it
    first, and stays locked where that loop was closed meanwhile.  Called when nobody is inside.
    """
    for listeners in (pool.dispatch.connect, pool.dispatch.first_connect):
        listeners = listeners.for_modify(pool.dispatch)
        if hasattr(listeners, "_get_exec_once_mutex"):
            listeners._exec_once_mutex = None
        else:  # before SQLAlchemy 2.1, where it is made when it is missing; before 2.0.31 or so, here
            with contextlib.suppress(AttributeError):
                del listeners._exec_once_mutex
            listeners._set_asyncio()


class _Seen(Exception):
    """Raised out of the listener, so that nothing connects."""
