"""Which pool does a URL lead to?  Told without connecting: ``python -m sqla_queries_pool explain URL``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import create_engine, exc, make_url

from .budget.state import DEFAULT_LIMIT
from .engine.queries_pool import QueriesPool
from .engine.settings import OPTIONS, Settings
from .parameters import UNSTATED


class UrlError(Exception):
    """``create_engine`` does not take the URL; says why, without the password."""


def explain(text: str) -> str:
    """Return the database, the pool id, the limit and the settings of an engine of this URL, a line each.

    :raises UrlError: there is no such engine.
    """
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError):
        # SQLAlchemy's message may quote the text, and so the password.
        raise UrlError("this is not a database URL; write postgresql://user:password@host/database") from None
    try:
        engine = create_engine(url, poolclass=QueriesPool)
    except ImportError as error:
        raise UrlError(f"the driver is not installed: {error}") from None
    except Exception as error:
        said = str(error)
        for secret in (url.password, *_texts(url.query.get("password"))):
            said = said.replace(secret, "***") if secret else said
        raise UrlError(said) from None
    pool: Any = engine.pool
    rows = [
        ("database", pool.statistics().label),
        ("pool id", pool.pid),
        ("limit", _limit(pool)),
        *((name, _value(value, default)) for name, value, default in _settings(pool)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    if pool.pid.startswith("private-"):
        lines.append("The pool id is a new one for each engine: it shares its limit with no other.")
        if url.get_backend_name() == "sqlite":
            lines.append("The database is in memory, so idle_ttl and ping_after do not apply.")
    if "queries" not in _texts(url.query.get("plugin")):
        lines.append("The URL does not choose this pool: add plugin=queries, or state poolclass=QueriesPool.")
    engine.dispose()
    return "\n".join(lines)


def _limit(pool: Any) -> str:
    if pool.settings.max_size is UNSTATED and pool.size() == DEFAULT_LIMIT:
        return f"{pool.size()} (the default)"
    return str(pool.size() or None)


def _settings(pool: Any) -> list[tuple[str, Any, Any]]:
    """Name as ``create_engine`` has it, value, default."""
    stated, default = pool.settings.as_arguments(), Settings().as_arguments()
    shown = [name for name in OPTIONS if name not in ("max_size", "pool_size", "max_overflow", "pool_id")]
    found = [(OPTIONS[name].name or name, stated[name], default[name]) for name in shown]
    return [*found, ("pool_recycle", pool._recycle, -1), ("pool_pre_ping", pool.pings, False)]


def _value(value: Any, default: Any) -> str:
    return f"{value} (the default)" if value == default else str(value)


def _texts(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()
