"""The DBAPI connections of a pool: which are open, for which slot, and how they are closed."""

from __future__ import annotations

import math
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any

from ..budget.ledger import Ledger
from ..budget.slots import CLOSING, Slot
from ..budget.work import Close
from ..logs import Failures, logger
from ..sockets import liveness
from ..sockets.lingering import LONGEST, Lingering
from .critical_section import CriticalSection

DEAD = "found dead before it was used"
INVALIDATED = "invalidated by its holder"
LIFETIME = "older than pool_recycle"


class Connections:
    """Knows each open DBAPI connection by its ``id()``.

    Without the lock: the holder of a slot writes its connection, and nobody else does.

    :param section: the pool's critical section.
    :param ledger: the pool's ledger, for its totals.
    :param lingering: waits for the server to let go of what was closed.
    :param failures: is told what could not be done.
    """

    def __init__(
        self, section: CriticalSection, ledger: Ledger, lingering: Lingering, failures: Failures
    ) -> None:
        self._section = section
        self._ledger = ledger
        self.lingering = lingering
        self._failures = failures
        self.by_handle: dict[int, Any] = {}
        """id(handle) -> slot, for as long as the slot refers to the handle."""
        self._process = os.getpid()
        """One number for all slots, to save room; a forked child makes this object anew."""
        self.detached: dict[int, weakref.ref[Any] | None] = {}
        """id(handle) of connections that were detached and are, as far as one can see, open."""
        self.cut: set[Slot] = set()
        """Slots that are free, and whose connection is shut down, but not closed yet: see closer.py."""
        self.last_open = -math.inf
        """When one was closed last, by the pool's clock: until then, at least, the database was there."""
        self.on_closed: Callable[[], None] = _nothing
        """Called when one is closed or let go of, in any thread; never waits."""

    def find(self, handle: Any) -> Any:
        """Return the slot of a DBAPI connection, None if it is not in the pool."""
        slot = self.by_handle.get(id(handle))
        return slot if slot is not None and slot.handle is handle else None

    def opened(
        self,
        slot: Slot,
        handle: Any,
        socket_: Any,
        begun: Callable[[], Any] | None,
        generation: int,
        lifetime: float,
        seconds: float,
    ) -> None:
        """A slot's holder has opened a connection for it.

        :param socket_: see :attr:`.Slot.socket`.
        :param begun: see :attr:`.Slot.begun`.
        :param generation: the attachment's when the connecting began.
        :param lifetime: seconds after which it is to be renewed, ``inf`` for never.
        :param seconds: how long it took to open it.
        """
        if slot.handle is not None:  # the one that closed it was interrupted
            self.by_handle.pop(id(slot.handle), None)
        slot.expires = math.inf if lifetime == math.inf else self._section.clock() + lifetime
        slot.socket = socket_
        slot.begun = begun
        slot.poll = liveness.poll_of(socket_)
        slot.suspect = False
        slot.generation = generation
        slot.process = self._process
        self.detached.pop(id(handle), None)  # the id of one that died unseen
        self.by_handle[id(handle)] = slot
        slot.handle = handle
        # After it has its handle, by which expire() knows it: one that expire() overtook has old credentials.
        home = None if slot.home is None else slot.home()
        if home is not None and home.generation != generation:
            slot.expires = self._section.clock()
        self._section.post(self._ledger.totals.connected, seconds)

    def closed(self, handle: Any) -> None:
        """A connection was closed, by the holder of its slot or by the one that detached it."""
        slot = self.find(handle)
        if slot is None:
            self.detached.pop(id(handle), None)
            return
        self.last_open = self._section.clock()
        del self.by_handle[id(handle)]
        slot.handle = slot.socket = slot.poll = slot.begun = None
        slot.suspect = True
        self.on_closed()
        if slot.state is not CLOSING:  # else the one that closes it says so once, for this and for its slot
            reason, slot.reason = slot.reason or INVALIDATED, None
            self._section.post(self._ledger.totals.closed, reason)

    def forget(self, slot: Slot) -> None:
        """Nobody can close a slot's connection: the driver may, when it is collected."""
        self.by_handle.pop(id(slot.handle), None)
        slot.handle = slot.socket = slot.poll = slot.begun = None
        self.on_closed()

    def let_go(self, slot: Slot) -> None:
        """The holder of a connection detaches it: it is its own from now on, and closes it."""
        handle = slot.handle
        if handle is None:
            return
        self.last_open = self._section.clock()
        key = id(handle)
        self.by_handle.pop(key, None)  # before the slot forgets it: nothing may keep the key of the dead
        slot.handle = slot.socket = slot.begun = None
        self.on_closed()

        def died(_: weakref.ref[Any]) -> None:
            self.detached.pop(key, None)

        try:  # SQLAlchemy's adapter for asyncio knows no weak references; the driver's own does
            self.detached[key] = weakref.ref(getattr(handle, "driver_connection", handle), died)
        except TypeError:  # a DBAPI whose connections know no weak references: till it is closed
            self.detached[key] = None

    def is_detached(self, handle: Any) -> bool:
        """Was it detached, and not closed since?"""
        return id(handle) in self.detached

    def found_dead(self, slot: Slot) -> None:
        """A connection was found dead before it was used: older ones are suspect."""
        slot.reason = DEAD
        self._section.post(self._ledger.totals.one_more, "dead")
        liveness.hang_up(slot.socket, socket.SHUT_WR, self._failures)
        self._section.decide(self._ledger.suspect, self._section.clock())

    def close(self, item: Close) -> None:
        """Close a slot's connection: as SQLAlchemy does where there is a record, and in any case."""
        slot, entry = item.slot, item.entry
        slot.reason = item.reason
        logger_of(entry).info("%s: closing %r: %s", self._section.label, slot, item.reason)
        try:
            if entry is not None and entry is not slot and slot.process == os.getpid():
                entry.close()
        except Exception:
            logger_of(entry).exception("%s: exception while closing %r", self._section.label, slot)
        finally:
            self.drop(slot)

    def drop(self, slot: Slot) -> None:
        """Close the DBAPI connection itself, where nobody did."""
        handle, socket_ = slot.handle, slot.socket
        if handle is None:
            return
        self.closed(handle)
        slot.handle = slot.socket = None
        if slot.process == os.getpid():
            self.close_socket(handle if socket_ is None else socket_)

    def close_socket(self, socket_: Any) -> None:
        """Close a connection without its record, and follow it until the server has let go of it.

        :param socket_: its :attr:`.Slot.socket`.
        """
        with self.lingering.closing(socket_, LONGEST):
            close_quietly(socket_, self._section.label)

    def strays(self) -> list[Any]:
        """Return the slots whose connection is open and that count nowhere."""
        counted = set(self._ledger.slots.copy())
        counted |= {slot.instead_of for slot in counted if slot.instead_of is not None}
        slots = list(self.by_handle.values())
        counted |= self.cut.copy()
        return [slot for slot in slots if slot not in counted and slot.handle is not None]


def _nothing() -> None: ...


def logger_of(entry: Any) -> Any:
    """An engine's own logger, whose level its ``echo_pool`` may have lowered, where it is an engine's."""
    return getattr(entry, "logger", logger)


def close_quietly(socket_: Any, label: str) -> None:
    """Close a connection that nobody wants; failing to is logged.

    :param socket_: its :attr:`.Slot.socket`, or the DBAPI connection.
    :param label: which pool it is.
    """
    try:
        socket_.close()
    except Exception as error:
        logger.debug("%s: exception while closing a connection: %r", label, error)
