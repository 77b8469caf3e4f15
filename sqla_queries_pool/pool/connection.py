"""One connection, as queries shows it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from ..budget.slots import HELD, LOCKED, OPENING, Slot


class Connection(Slot):
    """One connection of a pool, or the slot for one: the handle, and who has it.

    :param handle: the DBAPI connection.

    A lone one, not in any pool, has a pool of its own.
    """

    __slots__ = ("_pool", "exceptions", "executions")

    put_into_a_pool: ClassVar[Callable[[Connection], None]]
    """Gives a lone connection a pool of its own; pool.py says how."""

    def __init__(self, handle: Any = None) -> None:
        super().__init__(handle)
        self._pool: Any = None
        """The :class:`.Pool` that it is in."""
        self.executions = 0
        """queries' counter; for its sessions to write."""
        self.exceptions = 0
        """queries' counter; for its sessions to write."""

    @property
    def id(self) -> int:
        """The ``id()`` of the DBAPI connection."""
        return id(self.handle)

    @property
    def closed(self) -> bool:
        """Is there no open DBAPI connection?"""
        return self.handle is None or bool(getattr(self.handle, "closed", False))

    @property
    def executing(self) -> bool:
        """Does it execute an asynchronous operation (psycopg2's ``isexecuting()``)?"""
        isexecuting = getattr(self.handle, "isexecuting", None)
        if isexecuting is None or self.closed:  # psycopg2 says yes of one that was closed meanwhile
            return False
        try:
            return bool(isexecuting())
        except Exception:  # closed meanwhile: psycopg2.InterfaceError
            return False

    @property
    def locked(self) -> bool:
        """Does somebody have it?  Also true for the lock of a session that is dead."""
        return self.state in (HELD, LOCKED)

    @property
    def busy(self) -> bool:
        """Is it executing, or does somebody who still exists have it?"""
        return (self.locked and not self.stale) or self.state is OPENING or self.executing

    @property
    def used_by(self) -> weakref.ref[Any] | None:
        """A weak reference to who has it: the session, or what SQLAlchemy has checked out."""
        if self.state is not HELD or self.entry is None:
            return self.session
        fairy: weakref.ref[Any] | None = getattr(self.entry(), "fairy_ref", None)
        return self.entry if fairy is None else fairy

    def lock(self, session: object) -> None:
        """Lock it for ``session``, which is referred to weakly.

        :raises ConnectionBusyError: somebody has it.
        """
        self._in_pool().lock(self.handle, session)

    def free(self) -> None:
        """Take the lock off, and what the session may have left in it: see :meth:`Pool.free`.

        :raises ConnectionBusyError: it is executing, or an engine has it.
        """
        self._in_pool().free(self.handle)

    def close(self) -> None:
        """Close it and give its slot back.

        :raises ConnectionBusyError: it is executing, or somebody has it.
        """
        if self.handle is not None:
            self._in_pool().remove(self.handle)

    def _in_pool(self) -> Any:
        if self._pool is None:
            Connection.put_into_a_pool(self)
        return self._pool

    def __repr__(self) -> str:
        what = "no connection" if self.handle is None else f"handle {self.id:#x}"
        return f"<Connection {what}, {self.state}, used {self.uses} times>"
