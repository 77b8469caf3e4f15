"""An engine's sides of its pool: one attachment for threads, or one for each event loop that uses it.

This is the place that chooses the runtime.  A connection of asyncio belongs to the loop in which it was
opened, and is handed out in it alone; all loops of an engine share its quota.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias

from sqlalchemy import exc

from ..budget.ledger import ENDED
from ..budget.slots import CLOSING, GONE, HELD, Attachment
from ..concurrency import tasks
from ..concurrency.threads import THREADS
from ..runtime import unreturned
from ..runtime.core import Core
from ..sockets.drivers import socket_of
from ..sockets.loop_socket import LoopSocket
from .seams import begun, renew_first_mutex

More: TypeAlias = weakref.WeakMethod[Callable[[], Attachment]]
_ALONE = 0.005
"""Seconds between two looks at whether another loop has opened an engine's first connection."""


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


class LoopSides:
    """Those of an engine of asyncio.

    :param first: an attachment that no loop uses yet.
    :param more: weak: makes and attaches another one.
    :param records_out: the engine's records that are out.
    """

    def __init__(self, first: Attachment, core: Core, more: More, records_out: set[Any]) -> None:
        first.quota.split = True
        self._core = core
        self._checkouts = core.checkouts
        self._more = more
        self._records_out = records_out
        self._by_loop: dict[int, Attachment] = {}
        """``id()`` of a loop that is not closed -> its attachment: :meth:`loop_ended` comes before the number
        can be another's, and to look a loop up by a weak reference takes half as long as all the rest."""
        self._lock = threading.RLock()
        """Guards which loop has which attachment.  Reentrant, for a loop may end in a finalizer."""
        self._spare = [first]
        """Attachments that no loop uses."""
        self._known = False
        """Was a connection opened?"""
        self._opening: tasks.Loop | None = None
        """The loop that opens the first one, or was the last to try."""
        self._number_opening = 0
        """How many it opens now."""

    def take(self, since: float | None = None) -> Any:
        attachment = self._by_loop.get(id(_get_running_loop())) or self._enter()
        return self._checkouts.take(attachment, since)

    @property
    def here(self) -> Attachment:
        return self._by_loop.get(id(_get_running_loop())) or self._enter()

    def _enter(self) -> Attachment:
        """The running loop uses the engine for the first time."""
        runtime = tasks.running()
        with self._lock:
            attachment = self._spare.pop() if self._spare else None
        if attachment is None:  # not under the lock: this takes the pool's
            more = self._more()
            assert more is not None, "the engine's pool is calling"
            attachment = more()
        attachment.runtime = runtime
        with self._lock:
            self._by_loop[id(_get_running_loop())] = attachment
        runtime.used_by(self)
        return attachment

    def all(self) -> list[Attachment]:
        with self._lock:
            return [*self._spare, *self._by_loop.values()]

    @property
    def runtime(self) -> tasks.Loop:
        return tasks.running()

    @property
    def runtime_or_thread(self) -> Any:
        return THREADS if _get_running_loop() is None else tasks.running()

    def socket(self, handle: Any) -> Any:
        try:
            return LoopSocket(handle, tasks.running(), self._core.failures)
        except exc.MissingGreenlet:  # one that was detached, and is closed where no loop runs
            return handle

    def begun(self, handle: Any, dialect: Any) -> Callable[[], Any] | None:
        return begun(handle, dialect)

    def close(self, socket: LoopSocket, _: Callable[[], None]) -> None:
        socket.close()

    @contextmanager
    def opening(self, pool: Any, deadline: float) -> Iterator[None]:
        """SQLAlchemy has an asyncio.Lock for the first connection, which belongs to one loop."""
        if self._known:
            yield
            return
        loop = tasks.running()
        while not self._may_open_first(pool, loop):
            if time.monotonic() > deadline:  # a loop may stop in the middle
                raise NotFirst
            loop.pause((), _ALONE)
        try:
            yield
            self._known = True
        finally:
            with self._lock:
                if self._opening is loop:
                    self._number_opening -= 1

    def _may_open_first(self, pool: Any, loop: tasks.Loop) -> bool:
        with self._lock:
            if self._known:
                return True
            if self._opening is not loop:
                if self._number_opening and self._opening is not None and not self._opening.closed:
                    return False
                if self._opening is not None:
                    renew_first_mutex(pool)
                self._opening, self._number_opening = loop, 0
            self._number_opening += 1
            return True

    # -- the end of a loop -------------------------------------------------------------------------

    def loop_ends(self, loop: tasks.Loop) -> None:
        """Close what is idle, while the loop still runs; what is out when it is returned."""
        for attachment in self.all():
            if attachment.runtime is loop:
                self._core.dispose(attachment)
                self._core.retire(attachment)
                for slot in list(self._core.connections.by_handle.values()):
                    socket = slot.socket
                    if slot.home is attachment.ref and slot.state in (CLOSING, GONE) and socket is not None:
                        socket.close()  # another thread is about to, and may come too late

    def loop_ended(self, loop: tasks.Loop) -> None:
        """Nobody there can return anything: free all slots at once."""
        with self._lock:
            keys = [key for key, attachment in self._by_loop.items() if attachment.runtime is loop]
            ended = [self._by_loop.pop(key) for key in keys]
        for attachment in ended:
            for record in [r for r in self._records_out.copy() if r.attachment is attachment]:
                if record.slot.state is HELD:  # else it was cut off before, with a loop before this one
                    unreturned.tell(record.slot, unreturned.LOOP_ENDED)
                record.cut_off(f"{ENDED}: check out a new connection")
            # Another loop may have it when that is done, not before: it may have to wait for another thread.
            self._core.abandon(attachment, self._spare.append)


def sides(
    asynchronous: bool,
    attachment: Attachment,
    core: Core,
    more: More,
    records_out: set[Any],
) -> Sides:
    """Return the sides of an engine.

    :param asynchronous: is it one of asyncio?
    """
    return LoopSides(attachment, core, more, records_out) if asynchronous else ThreadSide(attachment, core)
