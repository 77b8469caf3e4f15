"""Where all of this package logs: below ``sqlalchemy.pool``, with SQLAlchemy's own pools."""

from __future__ import annotations

import logging

NAME = "sqlalchemy.pool.QueriesPool"
"""An engine's own records go here too, with ``.`` and its ``pool_logging_name`` appended; ``echo_pool``
lowers the level for them."""

logger = logging.getLogger(NAME)
"""For what is of no single engine."""


class Failures:
    """Says what a pool could not do to a socket, where there is nobody to raise to.

    The first of each kind is for INFO, the following ones for DEBUG: a platform or a driver that can't do it
    never can.

    :param label: for people: which pool it is.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._said: set[str] = set()

    def __call__(self, what: str, why: object) -> None:
        """Say it.

        :param what: "… could not" is said before it.
        :param why: the error, or a sentence.
        """
        level = logging.DEBUG if what in self._said else logging.INFO
        self._said.add(what)
        logger.log(
            level, "%s: could not %s: %s", self._label, what, why if isinstance(why, str) else repr(why)
        )
