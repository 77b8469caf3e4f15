"""What a driver knows by itself of its connection's transaction: no round trip, and any thread may ask."""

from __future__ import annotations

from typing import Any

IDLE, EXECUTING, IN_TRANSACTION, IN_ERROR = "idle", "executing", "in transaction", "in error"
_OF_LIBPQ = {0: IDLE, 1: EXECUTING, 2: IN_TRANSACTION, 3: IN_ERROR, 4: "unknown"}
"""libpq's ``PQtransactionStatus``, which psycopg2 and psycopg hand on without asking the server."""


def of_server(handle: Any) -> tuple[int | None, str | None]:
    """Return the backend's process id and the transaction's state, as far as the driver knows by itself."""
    driver = getattr(handle, "driver_connection", handle)  # below SQLAlchemy's adapter for asyncio
    info = getattr(driver, "info", None)
    try:
        if info is not None:
            return int(info.backend_pid) or None, _OF_LIBPQ.get(int(info.transaction_status))
        if hasattr(driver, "get_server_pid"):  # asyncpg
            return int(driver.get_server_pid()), _of_asyncpg(handle, driver)
        if type(driver).__module__.partition(".")[0] in ("sqlite3", "aiosqlite"):
            return None, IN_TRANSACTION if driver.in_transaction else IDLE
    except Exception:  # another driver's, or closed meanwhile
        pass
    return None, None


def _of_asyncpg(handle: Any, driver: Any) -> str:
    """asyncpg does not tell whether it executes; SQLAlchemy's adapter has a lock meanwhile."""
    mutex = getattr(handle, "_execute_mutex", None)
    if mutex is not None and mutex.locked():
        return EXECUTING
    return IN_TRANSACTION if driver.is_in_transaction() else IDLE
