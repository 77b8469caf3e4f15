"""The sides of an engine of asyncio: one attachment for each event loop that uses it.

A connection of asyncio belongs to the loop in which it was opened, and is handed out in it alone; all loops
of an engine share its quota.  Engines whose callers are threads import nothing of this.
"""

from __future__ import annotations

import threading
import time
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from sqlalchemy import exc

from ..budget.ledger import ENDED
from ..budget.slots import CLOSING, GONE, HELD, Attachment
from ..concurrency import loops
from ..concurrency.threads import THREADS
from ..runtime import unreturned
from ..runtime.core import Core
from ..sockets.loop_socket import LoopSocket
from .seams import begun, renew_first_mutex
from .sides import NotFirst

More: TypeAlias = weakref.WeakMethod[Callable[[], Attachment]]
_ALONE = 0.005
"""Seconds between two looks at whether another loop has opened an engine's first connection."""


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
        self._opening: loops.Loop | None = None
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
        runtime = loops.running()
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
    def runtime(self) -> loops.Loop:
        return loops.running()

    @property
    def runtime_or_thread(self) -> Any:
        return THREADS if _get_running_loop() is None else loops.running()

    def socket(self, handle: Any) -> Any:
        try:
            return LoopSocket(handle, loops.running(), self._core.failures)
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
        loop = loops.running()
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

    def _may_open_first(self, pool: Any, loop: loops.Loop) -> bool:
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

    def loop_ends(self, loop: loops.Loop) -> None:
        """Close what is idle, while the loop still runs; what is out when it is returned."""
        for attachment in self.all():
            if attachment.runtime is loop:
                self._core.dispose(attachment)
                self._core.retire(attachment)
                for slot in list(self._core.connections.by_handle.values()):
                    socket = slot.socket
                    if slot.home is attachment.ref and slot.state in (CLOSING, GONE) and socket is not None:
                        socket.close()  # another thread is about to, and may come too late

    def loop_ended(self, loop: loops.Loop) -> None:
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
