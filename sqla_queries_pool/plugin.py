"""The URL plugin: ``postgresql+psycopg2://…/shop?plugin=queries&max_size=10`` is all that it takes.

For where a URL is all that one can configure: environment variables, ini files, other people's programs.
The entry point ``queries`` in the group ``sqlalchemy.plugins`` names the class here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy.engine import URL, CreateEnginePlugin

from .engine.queries_pool import QueriesPool
from .errors import ParameterError
from .logs import logger
from .parameters import shown

PARAMETERS: Final = (
    "max_size",
    "idle_ttl",
    "pool_id",
    "gc_on_wait",
    "ping_after",
    "ping_timeout",
    "close_timeout",
    "track_stacks",
    "leak_after",
    "deadlock_grace",
    "on_deadlock",
    "min_size",
    "max_waiting",
    "queue_target",
    "read_only_is_disconnect",
    "pool_size",
    "max_overflow",
    "pool_timeout",
    "pool_use_lifo",
    "pool_recycle",
    "pool_pre_ping",
    "pool_reset_on_return",
    "pool_logging_name",
    "echo_pool",
)
"""What a URL may say of the pool, by the names that ``create_engine`` has for it."""

LIKENESS = 0.8
"""From which likeness on (difflib's ratio) a name is taken for a misspelt one of ours.  The options of
libpq and of the drivers that SQLAlchemy knows are all below it."""


class QueriesPlugin(CreateEnginePlugin):
    """Has ``create_engine`` use :class:`~sqla_queries_pool.QueriesPool` with what the URL says.

    A ``poolclass`` or ``pool`` that the code states stays: then the URL's parameters of the pool mean
    nothing, and are only taken off, so that the driver does not get them.

    :raises ParameterError: an :class:`sqlalchemy.exc.ArgumentError`; a parameter is misspelt, or stands
        twice: in the URL, or in the URL and in the code.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        said = {name: _values(url.query, name) for name in url.query}
        if [*said.get("plugin", ()), *kwargs.get("plugins", ())].count("queries") > 1:
            raise ParameterError("plugin=queries stands twice: leave one of them out")
        # Flask-SQLAlchemy states echo_pool=False where its user states nothing.
        in_code = {name for name in kwargs if name != "echo_pool" or kwargs[name]}
        for name, values in said.items():
            if name not in PARAMETERS:
                _refuse_misspelt(name)
            elif len(values) > 1 or name in in_code:
                where = "in the URL" if len(values) > 1 else "in the URL and in the code"
                raise ParameterError(f"{name} stands twice, {where}: leave one of them out")
        stated = kwargs.get("poolclass")
        if kwargs.get("pool") is not None or not issubclass(stated or QueriesPool, QueriesPool):
            logger.info("plugin=queries: another pool class is stated in the code, and stays")
            return
        kwargs["poolclass"] = stated or QueriesPool
        kwargs.update({name: said[name][0] for name in PARAMETERS if name in said})

    def update_url(self, url: URL) -> URL:
        """Return the URL without the parameters of the pool."""
        return url.difference_update_query(PARAMETERS)


def _values(query: Mapping[str, Any], name: str) -> list[str]:
    value = query.get(name, ())
    return [value] if isinstance(value, str) else list(value)


def _refuse_misspelt(name: str) -> None:
    """One that is like none of ours is the driver's, or SQLAlchemy's."""
    known = {_plain(parameter): parameter for parameter in PARAMETERS}
    # `timeout` is an option of sqlite3's own, and `id` is too short to be like anything.
    bare = {parameter.removeprefix("pool_"): parameter for parameter in PARAMETERS}
    known |= {_plain(short): bare[short] for short in bare if short not in ("timeout", "id")}
    spellings = dict.fromkeys([_plain(name).removeprefix("pool"), _plain(name)])
    if close := [c for s in spellings for c in difflib.get_close_matches(s, known, 1, LIKENESS)]:
        raise ParameterError(
            f"the URL's parameter {shown(name)} is not valid: write {known[close[0]]}, which is the nearest "
            f"of what plugin=queries takes ({', '.join(PARAMETERS)})"
        )


def _plain(name: str) -> str:
    """A name without what people get wrong first: case, hyphens and underscores."""
    return name.lower().replace("-", "").replace("_", "")
