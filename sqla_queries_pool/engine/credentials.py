"""Credentials that expire: a connect whose password was refused is made once more.

A ``do_connect`` listener gives each connect the token of the moment.  Between its answer and the server's
look at the token it may have expired, or been revoked; only the pool can ask again before a caller sees that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..sockets.connect_errors import is_authentication
from . import seams

AUTHENTICATION_ERROR = "authentication_error"
"""In the ``info`` of the record that a ``do_connect`` listener gets, while it is asked for the second time:
the error that its first answer led to.  A listener that has a cache asks its service again then."""


def create(connect: Callable[[Any], Any], record: Any, logger: Any) -> Any:
    """Open a connection; where its credentials are refused, once more, if a listener may have others.

    :param connect: SQLAlchemy's, which calls the listeners.
    :param record: SQLAlchemy's record, for the listeners.
    :raises Exception: the driver's; that of the second connect where there were two.
    """
    try:
        return connect(record)
    except Exception as error:
        if not is_authentication(error) or not _asks(getattr(record, "owner", None)):
            raise
        logger.info("Credentials were refused, asking do_connect once more: %s", str(error).strip())
        record.info[AUTHENTICATION_ERROR] = error
    try:
        return connect(record)
    finally:
        record.info.pop(AUTHENTICATION_ERROR, None)


def _asks(pool: Any) -> bool:
    """Has a pool's engine a listener, and does its creator ask it?  A user's own creator asks none."""
    return (
        pool is not None and seams.made_by_engine(pool._creator) and bool(pool._dialect.dispatch.do_connect)
    )
