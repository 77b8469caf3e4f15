"""Where all of this package logs: below ``sqlalchemy.pool``, with SQLAlchemy's own pools."""

from __future__ import annotations

import logging

NAME = "sqlalchemy.pool.QueriesPool"
"""An engine's own records go here too, with ``.`` and its ``pool_logging_name`` appended; ``echo_pool``
lowers the level for them."""

logger = logging.getLogger(NAME)
"""For what is of no single engine."""
