"""An engine's sides of its pool, its attachments: what it knows of them, and that of threads.

loop_sides.py has those of an engine of asyncio.  ``QueriesPool`` chooses, and with them the runtime.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ..budget.slots import Attachment
from ..concurrency.threads import THREADS
from ..runtime.core import Core
from ..sockets.drivers import socket_of


class NotFirst(Exception):
    """Another loop has not opened an engine's first connection yet."""


class Sides(Protocol):
    """What an engine knows of its attachments."""

    @property
    def take(self) -> Callable[..., Any]:
        """:meth:`.Checkouts.take` with the caller's attachment."""

    def all(self) -> list[Attachment]:
        """The attachments."""

    @property
    def here(self) -> Attachment:
        """The caller's attachment."""

    @property
    def runtime(self) -> Any:
        """The caller's runtime."""

    @property
    def runtime_or_thread(self) -> Any:
        """The caller's runtime; that of threads also for an engine of asyncio where no loop runs."""

    def socket(self, handle: Any) -> Any:
        """Return the :attr:`.Slot.socket` of a connection that was opened here."""

    def begun(self, handle: Any, dialect: Any) -> Callable[[], Any] | None:
        """Return the :attr:`.Slot.begun` of a connection that was opened here."""

    def close(self, socket: Any, as_sqlalchemy: Callable[[], None]) -> None:
        """Close a connection: as SQLAlchemy does, or, where it is a loop's, without waiting."""

    def opening(self, pool: Any, deadline: float) -> AbstractContextManager[object]:
        """The block opens a connection; before that, wait while another loop opens the engine's first one.

        :param pool: whose: the engine's.
        :param deadline: until when, by ``time.monotonic``.
        :raises NotFirst: it still does.
        """


class ThreadSide:
    """That of an engine whose callers are threads."""

    runtime = runtime_or_thread = THREADS

    def __init__(self, attachment: Attachment, core: Core) -> None:
        self.here = attachment
        self.take = functools.partial(core.checkouts.take, attachment)

    def all(self) -> list[Attachment]:
        return [self.here]

    def socket(self, handle: Any) -> Any:
        return socket_of(handle)

    def begun(self, _: Any, __: Any) -> None:
        return None

    def close(self, _: Any, as_sqlalchemy: Callable[[], None]) -> None:
        as_sqlalchemy()

    def opening(self, _: Any, __: float) -> AbstractContextManager[object]:
        return nullcontext()
