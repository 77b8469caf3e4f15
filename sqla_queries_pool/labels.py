"""What application code calls what it is doing, for reports of who holds a connection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

checkout_label: Final[ContextVar[str | None]] = ContextVar("sqla_queries_pool.checkout_label", default=None)
"""A request id, an endpoint, the name of a job: what is checked out while it is set carries it."""


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
    """Set :data:`checkout_label` for a block.

    :param label: what to show of it; shown where reports are, so no secret.
    """
    token = checkout_label.set(label)
    try:
        yield
    finally:
        checkout_label.reset(token)
