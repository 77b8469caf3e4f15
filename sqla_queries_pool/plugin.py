"""The URL plugin: ``postgresql+psycopg2://…/shop?plugin=queries&max_size=10`` is all that it takes.

For where a URL is all that one can configure: environment variables, ini files, other people's programs.
The entry point ``queries`` in the group ``sqlalchemy.plugins`` names the class here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import URL, CreateEnginePlugin

from .engine.queries_pool import QueriesPool
from .engine.settings import NAMES, refuse_removed
from .errors import ParameterError
from .logs import logger
from .parameters import shown

LIKENESS = 0.8
"""From which likeness on (difflib's ratio) a name is taken for a misspelt one of ours.  The options of
libpq and of the drivers that SQLAlchemy knows are all below it."""
SPELLINGS = {"pool_max_size": "max_size", "pool_idle_ttl": "idle_ttl"}
"""Other spellings of our parameters, queries' own.  Celery drops each engine option that begins with ``pool``
where it uses a NullPool, which would take ``max_size`` for an error."""


class QueriesPlugin(CreateEnginePlugin):
    """Has ``create_engine`` use :class:`~sqla_queries_pool.QueriesPool` with what the URL says.

    A ``poolclass`` or ``pool`` in the code wins.  The URL's pool parameters are then ignored, and removed so
    that the driver does not get them.  A parameter in the URL wins over the same one in the code.
    ``pool_max_size`` and ``pool_idle_ttl`` are other spellings of ``max_size`` and ``idle_ttl``, in both.

    :raises ParameterError: an :class:`sqlalchemy.exc.ArgumentError`; a parameter is misspelt, or stands
        twice in the URL or in the code.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        said: dict[str, list[str]] = {}
        for name in url.query:
            said.setdefault(SPELLINGS.get(name, name), []).extend(_values(url.query, name))
        code = {name: kwargs.pop(other) for other, name in SPELLINGS.items() if other in kwargs}
        if [*said.get("plugin", ()), *kwargs.get("plugins", ())].count("queries") > 1:
            raise ParameterError("plugin=queries is given twice: remove one of them")
        for name, values in said.items():
            if name not in NAMES:
                refuse_removed([name])
                _refuse_misspelt(name)
            elif len(values) > 1:
                raise ParameterError(f"{name} is given twice, in the URL: remove one of them")
        stated = kwargs.get("poolclass")
        if kwargs.get("pool") is not None or not issubclass(stated or QueriesPool, QueriesPool):
            logger.info("plugin=queries: the code sets another pool class, which is used")
            return
        kwargs["poolclass"] = stated or QueriesPool
        if twice := code.keys() & kwargs.keys():
            raise ParameterError(f"{twice.pop()} is given twice, in the code: remove one of them")
        kwargs.update(code)
        if overruled := [name for name in kwargs if _means_what_is_in(said, name)]:
            # No error: frameworks state their own, and their users can change nothing but the URL.
            for name in overruled:
                del kwargs[name]
            logger.info("plugin=queries: the URL takes precedence over the code's %s", ", ".join(overruled))
        kwargs.update({name: said[name][0] for name in NAMES if name in said})

    def update_url(self, url: URL) -> URL:
        """Return the URL without the parameters of the pool."""
        return url.difference_update_query([*NAMES, *SPELLINGS])


def _means_what_is_in(said: Mapping[str, Any], name: str) -> bool:
    """Does the URL state this parameter of the code?  ``max_size`` is what QueuePool has two names for."""
    if name == "max_size":
        return bool(said.keys() & {"max_size", "pool_size", "max_overflow"})
    return name in NAMES and (name in said or (name in ("pool_size", "max_overflow") and "max_size" in said))


def _values(query: Mapping[str, Any], name: str) -> list[str]:
    value = query.get(name, ())
    return [value] if isinstance(value, str) else list(value)


def _refuse_misspelt(name: str) -> None:
    """A name that is like none of ours is the driver's, or SQLAlchemy's."""
    if name == "timeout":  # sqlite3's own
        return
    known = {_plain(ours): ours for ours in NAMES}
    if close := difflib.get_close_matches(_plain(name), known, 1, LIKENESS):
        raise ParameterError(
            f"the URL parameter {shown(name)} is not known: did you mean {known[close[0]]}? plugin=queries "
            f"takes {', '.join(NAMES)}"
        )


def _plain(name: str) -> str:
    """A name without what people get wrong first: case, hyphens, underscores and the prefix."""
    plain = name.lower().replace("-", "").replace("_", "")
    bare = plain.removeprefix("pool")
    return bare if len(bare) > len("id") else plain  # `id` is like many names
