"""What can be stated about an engine's pool: each parameter once, with its default and what text means.

A new parameter is a field of :class:`Settings`, a parameter of ``QueriesPool.__init__`` (``create_engine`` reads
its signature) and a key of :class:`QueriesPoolOptions` (type checkers read that); its row in
``docs/configuration.rst`` is for people.  ``tests/test_settings.py`` compares the four; the URL plugin,
``recreate()`` and what the ledger is told follow from the field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from sqlalchemy.pool import Pool

from .. import parameters
from ..parameters import UNSTATED, Unstated

RAISE, WARN, IGNORE = "raise", "warn", "ignore"
"""What to do about a deadlock: ``on_deadlock``."""


def _option(
    default: Any, read: Callable[[str, object], Any], doc: str, name: str = "", ledger: bool = False
) -> Any:
    """Return a field of :class:`Settings`.

    :param read: makes the value of what was stated, which may be text.
    :param doc: one line, for people.
    :param name: what ``create_engine`` calls it, where that is another name.
    :param ledger: is it the ledger's, which has ``inf`` for ``None``?
    """
    return dataclasses.field(
        default=default, metadata={"read": read, "doc": doc, "name": name, "ledger": ledger}
    )


def _as_stated(_: str, value: Any) -> Any:
    """Three parameters mean one number; :meth:`Settings.read` makes it of them."""
    return value


def _deadlock(name: str, value: object) -> str:
    return parameters.one_of(name, value, (RAISE, WARN, IGNORE))


@dataclass(frozen=True)
class Settings:
    """The parameters of one ``QueriesPool``."""

    max_size: int | Unstated | None = _option(
        UNSTATED,
        _as_stated,
        "The largest number of connections, None for no limit.  The database's pool has the largest that its "
        "engines state, 15 where none does; no engine exceeds its own.",
    )
    idle_ttl: float | None = _option(
        60.0,
        parameters.seconds,
        "Seconds after which an idle connection is closed, None for never.",
        ledger=True,
    )
    timeout: float | None = _option(
        30.0,
        parameters.seconds,
        "Seconds that a checkout waits for a slot, None for ever, 0 not at all.",
        name="pool_timeout",
    )
    pool_id: str | None = _option(
        None, parameters.pool_id, "Names the pool, in place of the id that follows from the URL."
    )
    use_lifo: bool = _option(
        True,
        parameters.flag,
        "Use the connection that was returned last, so that those not needed age out; else the one idle for longest.",
        name="pool_use_lifo",
        ledger=True,
    )
    pool_size: int | Unstated = _option(
        UNSTATED,
        _as_stated,
        "QueuePool's; with max_overflow it is read as max_size, their sum.",
    )
    max_overflow: int | Unstated = _option(UNSTATED, _as_stated, "QueuePool's, see pool_size.")
    gc_on_wait: bool = _option(
        True, parameters.flag, "Ask the garbage collector for abandoned connections while waiting."
    )
    ping_after: float | None = _option(
        30.0,
        parameters.seconds,
        "Seconds for which a connection may be idle and is still used without asking the server whether it is "
        "there; None never asks, 0 always.  Whether the server has hung up is seen in any case, without a round "
        "trip.",
        ledger=True,
    )
    ping_timeout: float | None = _option(
        5.0, parameters.seconds, "Seconds that the server has for its answer, None for as long as it takes."
    )
    close_timeout: float = _option(
        1.0,
        parameters.finite_seconds,
        "Seconds for which an opening at the limit waits until the server has let go of a connection that was "
        "closed before, so that there are never more than the limit on the server either; 0 does not wait.",
    )
    min_size: int = _option(
        0,
        parameters.min_size,
        "How many connections are kept open for this engine, once one was opened, as far as the limit allows; "
        "they have no idle_ttl, and others are opened in the background where some are lost.",
        ledger=True,
    )
    track_stacks: bool = _option(
        False,
        parameters.flag,
        "Remember where each connection was checked out, for reports; costs some microseconds.",
    )
    leak_after: float | None = _option(
        None,
        parameters.seconds,
        "Seconds after which a connection that is out is logged, once, with its holder; None for never.",
        ledger=True,
    )
    deadlock_grace: float = _option(
        1.0,
        parameters.finite_seconds,
        "Seconds for which nothing may have moved among checkouts that wait for each other.",
    )
    on_deadlock: str = _option(
        RAISE,
        _deadlock,
        "What to do then: 'raise' a PoolDeadlock in the newest of them, 'warn' in the log, or 'ignore' it.",
    )
    read_only_is_disconnect: bool = _option(
        False,
        parameters.flag,
        "Take an error that says that the server is read only (SQLSTATE 25006) for a disconnect: all connections "
        "are replaced, and new ones go where the URL points.  For a primary that may be demoted while "
        "connections stay open.",
    )
    max_waiting: int | None = _option(
        None,
        parameters.max_waiting,
        "How many checkouts of this engine may wait; one more is rejected at once, with TooManyRequests; None "
        "for any number.",
        ledger=True,
    )
    queue_target: float | None = _option(
        None,
        parameters.queue_target,
        "Seconds within which a waiting checkout is to be served; where none was for twenty times as long, those "
        "that have waited for longer are rejected, with TooManyRequests, until the queue is empty, so that those "
        "served are served in time; None rejects none.",
        ledger=True,
    )

    @classmethod
    def read(cls, stated: Mapping[str, Any]) -> Settings:
        """Return what was stated, as text or not; what else is in there is left alone.

        :raises ParameterError: a value means nothing.
        """
        found = {f.name: f.metadata["read"](f.name, stated[f.name]) for f in dataclasses.fields(cls)}
        found["max_size"] = parameters.stated_max_size(
            found["max_size"], found.pop("pool_size"), found.pop("max_overflow")
        )
        return cls(**found)

    def of_ledger(self) -> dict[str, Any]:
        """What an attachment is told: the ledger counts to ``inf`` where people write ``None``."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata["ledger"]]
        values = {name: getattr(self, name) for name in names}
        return {name: math.inf if value is None else value for name, value in values.items()}

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of a ``QueriesPool`` with the same settings."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


OF_SQLALCHEMY = (
    "pool_recycle",
    "pool_pre_ping",
    "pool_reset_on_return",
    "pool_logging_name",
    "echo_pool",
)
"""What SQLAlchemy's own pools take, by the names of ``create_engine``."""
NAMES = (*(f.metadata["name"] or f.name for f in dataclasses.fields(Settings)), *OF_SQLALCHEMY)
"""What can be stated, by the names of ``create_engine``; a URL with ``plugin=queries`` takes them."""


class QueriesPoolOptions(TypedDict, total=False):
    """The options of ``create_engine`` that are the pool's, for type checkers.

    .. code-block:: python

        options: QueriesPoolOptions = {"max_size": 10, "idle_ttl": 60}
        engine = create_engine(url, poolclass=QueriesPool, **options)
    """

    poolclass: type[Pool]
    max_size: int | None
    idle_ttl: float | None
    pool_timeout: float | None
    pool_id: str | None
    pool_use_lifo: bool
    pool_size: int
    max_overflow: int
    gc_on_wait: bool
    ping_after: float | None
    ping_timeout: float | None
    close_timeout: float
    min_size: int
    track_stacks: bool
    leak_after: float | None
    deadlock_grace: float
    on_deadlock: str
    read_only_is_disconnect: bool
    max_waiting: int | None
    queue_target: float | None
    pool_recycle: float
    pool_pre_ping: bool
    pool_reset_on_return: Any
    pool_logging_name: str
    echo_pool: Any
