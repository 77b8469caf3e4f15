"""What can be stated about an engine's pool: each parameter once, with its default and how text is read.

A new parameter is a field of :class:`Settings`, a parameter of ``QueriesPool.__init__`` (whose signature
``create_engine`` reads) and a key of :class:`QueriesPoolOptions` (which type checkers read); its row in
``docs/configuration.rst`` is for people.  ``tests/test_settings.py`` compares the four.  The URL plugin,
``recreate()`` and the ledger's parameters follow from the field.

Annotations are no text in here (no ``from __future__ import annotations``): they are read below.
"""

import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypedDict

from sqlalchemy.pool import Pool

from .. import parameters
from ..errors import ParameterError
from ..parameters import UNSTATED, Unstated

RAISE, WARN, IGNORE = "raise", "warn", "ignore"
"""What to do about a deadlock: ``on_deadlock``."""


class Option(NamedTuple):
    """What is known of a parameter besides its type and its default."""

    read: Callable[[str, Any], Any]
    """Makes the value of what was stated, which may be text; raises ``ParameterError``."""
    doc: str
    """One line, for people."""
    name: str = ""
    """What ``create_engine`` calls it, where that is another name."""
    ledger: bool = False
    """Is it the ledger's?  It has ``inf`` for ``None``."""


def _as_stated(_: str, value: Any) -> Any:
    """Three parameters mean one number; :meth:`Settings.read` makes it of them."""
    return value


def _on_deadlock(name: str, value: object) -> str:
    return parameters.one_of(name, value, (RAISE, WARN, IGNORE))


@dataclass(frozen=True)
class Settings:
    """The parameters of one ``QueriesPool``."""

    max_size: Annotated[
        int | Unstated | None,
        Option(
            _as_stated,
            "The largest number of connections, None for no limit. The database's pool has the "
            "largest that its engines state, 15 where none does; no engine exceeds its own.",
        ),
    ] = UNSTATED
    idle_ttl: Annotated[
        float | None,
        Option(
            parameters.seconds,
            "Seconds after which an idle connection is closed, None for never.",
            ledger=True,
        ),
    ] = 60.0
    timeout: Annotated[
        float | None,
        Option(
            parameters.seconds,
            "Seconds that a checkout waits for a connection, None for ever, 0 not at all.",
            name="pool_timeout",
        ),
    ] = 30.0
    pool_id: Annotated[
        str | None,
        Option(
            parameters.pool_id,
            "Names the pool, in place of the id that follows from the URL.",
        ),
    ] = None
    use_lifo: Annotated[
        bool,
        Option(
            parameters.queuepool_flag,
            "Use the connection that was returned last, so that those not needed age out; else "
            "the one idle for longest.",
            name="pool_use_lifo",
            ledger=True,
        ),
    ] = True
    pool_size: Annotated[
        int | Unstated,
        Option(
            _as_stated,
            "QueuePool's; with max_overflow it is read as max_size, their sum.",
        ),
    ] = UNSTATED
    max_overflow: Annotated[
        int | Unstated,
        Option(
            _as_stated,
            "QueuePool's; see pool_size.",
        ),
    ] = UNSTATED
    ping_after: Annotated[
        float | None,
        Option(
            parameters.seconds,
            "Seconds for which a connection may be idle and is still used without a ping; None "
            "never pings, 0 always. Whether the server has hung up is seen in any case, without a "
            "round trip.",
            ledger=True,
        ),
    ] = 30.0
    ping_timeout: Annotated[
        float | None,
        Option(
            parameters.seconds,
            "Seconds that the server has for its answer to a ping, None for as long as it takes.",
        ),
    ] = 5.0
    min_size: Annotated[
        int,
        Option(
            parameters.min_size,
            "How many connections are kept open for this engine, once one was opened, as far as "
            "the limit allows; they have no idle_ttl, and others are opened in the background "
            "where some are lost.",
            ledger=True,
        ),
    ] = 0
    track_stacks: Annotated[
        bool,
        Option(
            parameters.flag,
            "Remember where each connection was checked out, for reports; costs some microseconds.",
        ),
    ] = False
    leak_after: Annotated[
        float | None,
        Option(
            parameters.seconds,
            "Seconds after which a connection that is out is logged, once, with its holder; None for never.",
            ledger=True,
        ),
    ] = None
    on_deadlock: Annotated[
        str,
        Option(
            _on_deadlock,
            "What to do if checkouts wait for each other: 'raise' a PoolDeadlock in the newest of them, "
            "'warn' in the log, or 'ignore' it.",
        ),
    ] = WARN
    max_waiting: Annotated[
        int | None,
        Option(
            parameters.max_waiting,
            "How many checkouts of this engine may wait; one more is rejected at once, with "
            "TooManyRequests; None for any number.",
            ledger=True,
        ),
    ] = None
    queue_target: Annotated[
        float | None,
        Option(
            parameters.queue_target,
            "Seconds within which a waiting checkout is to be served; where none was for twenty "
            "times as long, those that have waited for longer are rejected, with TooManyRequests, "
            "until the queue is empty, so that those served are served in time; None rejects "
            "none.",
            ledger=True,
        ),
    ] = None

    fail_fast_after: Annotated[
        float | None,
        Option(
            parameters.queue_target,
            "Seconds for which the server may refuse connects, or not answer them. After that, checkouts "
            "that find nothing idle fail at once, with the driver's last error, except for one that tries; "
            "None has each wait for its timeout.",
            ledger=True,
        ),
    ] = None

    share: Annotated[
        str | None,
        Option(
            parameters.share,
            "Share the limit with all processes of this user on this host that state the same for this "
            "database: 'host', or the path of a folder in which they meet; None with none.",
        ),
    ] = None

    classes: Annotated[
        dict[str, dict[str, float]] | None,
        Option(
            parameters.classes,
            "Classes of callers that share the pool: of each its 'min', as many connections it may have "
            "before others, its 'max', as many it has at most, and its 'weight', its share of what several "
            "want; None for none. All engines of a database have the classes that any of them states.",
        ),
    ] = None

    caller: Annotated[
        str | None,
        Option(
            parameters.caller,
            "The class of this engine's checkouts, where checkouts(caller=…) says no other; None for none.",
        ),
    ] = None

    check_limits: Annotated[
        bool,
        Option(
            parameters.flag,
            "Ask the server once, in the background, whether it has room for max_size connections of each "
            "process, and log a warning if not.",
        ),
    ] = True

    idle_in_transaction_after: Annotated[
        float | None,
        Option(
            parameters.seconds,
            "Seconds that a checkout may be idle in a transaction, in all; after that it is logged, once, "
            "with its holder; None does not look.",
            ledger=True,
        ),
    ] = None

    @classmethod
    def read(cls, stated: Mapping[str, Any], names: Mapping[str, str]) -> "Settings":
        """Return what was stated, as text or not; what else is in there is left alone.

        :param names: the names by which parameters were stated, where they are others: an error has those.
        :raises ParameterError: a value means nothing.
        """
        found = {name: option.read(names.get(name, name), stated[name]) for name, option in OPTIONS.items()}
        found["max_size"] = parameters.stated_max_size(
            found["max_size"], found["pool_size"], found["max_overflow"]
        )
        return cls(**found)

    def of_ledger(self) -> dict[str, Any]:
        """The parameters of an attachment: the ledger has ``inf`` where people write ``None``."""
        values = {name: getattr(self, name) for name, option in OPTIONS.items() if option.ledger}
        return {name: math.inf if value is None else value for name, value in values.items()}

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of a ``QueriesPool`` with the same settings.

        In the words in which they were stated: a subclass may take, or pass on, QueuePool's parameters alone.
        """
        stated = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not UNSTATED}
        if stated.keys() & {"pool_size", "max_overflow"}:
            del stated["max_size"]  # their sum
        return stated


OPTIONS: dict[str, Option] = {
    name: hint.__metadata__[0] for name, hint in typing.get_type_hints(Settings, include_extras=True).items()
}
"""What is known of each parameter, by its name."""
REMOVED = {
    "gc_on_wait": "a waiting checkout always asks the garbage collector, for a tenth of the time at most",
    "close_timeout": "it is always a second at most",
    "deadlock_grace": "it is always a second",
    "read_only_is_disconnect": "a connection that says read only is replaced if its server is a standby",
}
"""What was a parameter once -> what holds now."""
OF_SQLALCHEMY = {
    "recycle": "pool_recycle",
    "pre_ping": "pool_pre_ping",
    "reset_on_return": "pool_reset_on_return",
    "logging_name": "pool_logging_name",
    "echo": "echo_pool",
}
"""What SQLAlchemy's own pools take -> what ``create_engine`` calls it."""
OF_CREATE_ENGINE = {name: option.name or name for name, option in OPTIONS.items()} | OF_SQLALCHEMY
"""What a pool takes -> what ``create_engine`` calls it."""
NAMES = tuple(OF_CREATE_ENGINE.values())
"""What can be stated, by the names of ``create_engine``; a URL with ``plugin=queries`` takes them."""


def refuse_removed(names: Iterable[str]) -> None:
    """Say what became of a parameter that there was once.

    :raises ParameterError: one of the names is such a one.
    """
    for name in names:
        if name in REMOVED:
            raise ParameterError(f"{name} is no parameter any more: {REMOVED[name]}. Remove it")


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
    ping_after: float | None
    ping_timeout: float | None
    min_size: int
    track_stacks: bool
    leak_after: float | None
    on_deadlock: str
    max_waiting: int | None
    queue_target: float | None
    fail_fast_after: float | None
    share: str | None
    classes: dict[str, dict[str, float]] | None
    caller: str | None
    check_limits: bool
    idle_in_transaction_after: float | None
    pool_recycle: float
    pool_pre_ping: bool
    pool_reset_on_return: Any
    pool_logging_name: str
    echo_pool: Any
