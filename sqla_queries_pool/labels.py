"""What application code says of its checkouts: what they are for, of which class, and until when.

Context variables: each thread and each task has its own, and a task inherits those of the one that starts it.
A checkout that finds an idle connection reads the label alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from .budget.slots import OTHER
from .errors import ParameterError


class Deadline(NamedTuple):
    """Until when a checkout may take."""

    at: float
    """By ``time.monotonic``."""
    whose: str
    """What has stated it, for errors."""


checkout_label: Final[ContextVar[str | None]] = ContextVar("sqla_queries_pool.checkout_label", default=None)
"""A request id, an endpoint, the name of a job: what is checked out while it is set carries it."""
checkout_caller: Final[ContextVar[str | None]] = ContextVar("sqla_queries_pool.checkout_caller", default=None)
"""The class of callers that the innermost block has stated."""
known_classes: Final[set[str]] = set()
"""All classes that an engine of this process has stated: a name that is misspelt is an error at once."""
checkout_deadline: Final[ContextVar[Deadline | None]] = ContextVar(
    "sqla_queries_pool.checkout_deadline", default=None
)
"""The earliest of those that the blocks around have stated."""


class checkouts(contextlib.AbstractContextManager[None]):
    """``with checkouts(…):`` says something of all checkouts of a block, in this thread or task.

    Blocks nest.  What an inner one does not state is as in the outer one; a deadline can only become earlier.
    It is no decorator: an ``async def`` or a generator would run after the block had ended.

    :param timeout: seconds from now in which checkouts may wait, open and ping; 0 for not at all.  Where an
        engine's own ``timeout`` ends earlier, that counts.  None states nothing.
    :param label: what to show of them; shown where reports are, so no secret.  None states nothing.
    :param caller: their class, one of an engine's ``classes``, or ``other`` for none of them; a pool that
        does not know it counts them to the engine's own ``caller``.  None states nothing.
    :raises ParameterError: the timeout is no number of seconds; engines have classes, and none has this.
    """

    def __init__(
        self, *, timeout: float | None = None, label: str | None = None, caller: str | None = None
    ) -> None:
        self._block = _block(timeout, label, caller)

    def __enter__(self) -> None:
        self._block.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


@contextlib.contextmanager
def _block(timeout: float | None, label: str | None, caller: str | None) -> Iterator[None]:
    if caller not in (None, OTHER) and known_classes and caller not in known_classes:
        known = ", ".join(sorted(known_classes))
        raise ParameterError(
            f"checkouts(caller={caller!r}) is not valid: no engine has this class. Write one of {known}"
        )
    with contextlib.ExitStack() as stack:
        if timeout is not None:
            deadline, outer = _deadline(timeout, label), checkout_deadline.get()
            if outer is None or deadline.at < outer.at:
                stack.callback(checkout_deadline.reset, checkout_deadline.set(deadline))
        if label is not None:
            stack.callback(checkout_label.reset, checkout_label.set(label))
        if caller is not None:
            stack.callback(checkout_caller.reset, checkout_caller.set(caller))
        yield


def labelled(label: str) -> contextlib.AbstractContextManager[None]:
    """Set :data:`checkout_label` for a block: ``checkouts(label=label)``.

    :param label: what to show of it; shown where reports are, so no secret.
    """
    return checkouts(label=label)


def _deadline(timeout: object, label: str | None) -> Deadline:
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 <= timeout < math.inf:  # type: ignore[operator]
        raise ParameterError(
            f"checkouts(timeout={timeout!r}) is not valid: write a number of seconds, zero or more, "
            "or leave it out"
        )
    named = "" if label is None else f", label={label!r}"
    return Deadline(time.monotonic() + timeout, f"checkouts(timeout={timeout:g}{named})")  # type: ignore[operator]
