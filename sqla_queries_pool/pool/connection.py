"""One connection, as queries shows it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, ClassVar

from ..budget import closing
from ..budget.slots import HELD, LOCKED, OPENING, Slot
from ..errors import ConnectionBusyError
from ..runtime.core import Core


class Connection(Slot):
    """One connection of a pool, or the slot for one: the handle, and who has it.

    :param handle: the DBAPI connection.

    A lone one, not in any pool, has a pool of its own.
    """

    __slots__ = ("__dict__", "_pool", "exceptions", "executions")  # the first for tests that patch methods

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
    def used_by(self) -> Callable[[], Any] | None:
        """A weak reference to who has it: the session, or what SQLAlchemy has checked out.

        Set, it locks the connection for the session that the reference leads to, in place of the one that had
        it; with None it takes the lock off.
        """
        if self.state is not HELD or self.entry is None:
            return self.session
        fairy: weakref.ref[Any] | None = getattr(self.entry(), "fairy_ref", None)
        return self.entry if fairy is None else fairy

    @used_by.setter
    def used_by(self, reference: Callable[[], Any] | None) -> None:
        session = None if reference is None else reference()
        if self.locked:
            self.free()
        if session is not None:
            self.lock(session)

    @used_by.deleter
    def used_by(self) -> None:
        self.used_by = None

    def lock(self, session: object) -> None:
        """Lock it for ``session``, which is referred to weakly.

        :raises ConnectionBusyError: it is executing, or somebody has it.
        """
        pool = self._in_pool()
        if self.stale:
            pool.core.effects.reset(self, True)
        if self.busy or not pool._lock_for(self, session):
            raise ConnectionBusyError(self.id)

    def free(self) -> None:
        """Take the lock of its session off: it is rolled back and idle again.

        :raises ConnectionBusyError: it is executing, or an engine has it.
        """
        pool = self._in_pool()
        if self.executing or self.state is HELD:
            raise ConnectionBusyError(self.id)
        pool.core.effects.reset(self)

    def close(self) -> None:
        """Close it and give its slot back.

        :raises ConnectionBusyError: it is executing, or somebody has it.
        """
        if self.handle is None:
            return
        core, closed = self._in_pool().core, self.closed
        busy = self.busy and not closed
        work = [] if busy else core.section.decide(closing.close_one, core.ledger, self, closed)
        if not work:
            raise ConnectionBusyError(self.id)
        core.effects.do(work)

    def _in_pool(self) -> Any:
        if self._pool is None:
            Connection.put_into_a_pool(self)
        return self._pool

    def __repr__(self) -> str:
        what = "no connection" if self.handle is None else f"handle {self.id:#x}"
        return f"<Connection {what}, {self.state}, used {self.uses} time{'s' * (self.uses != 1)}>"


class Connections(Mapping[int, Connection]):
    """The open connections of a pool by their ids, as they are at each look.

    Other threads may open and close connections meanwhile: who goes through them goes through a copy.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def _by_handle(self) -> dict[int, Connection]:
        return self._core.connections.by_handle  # a forked child has another one

    def __getitem__(self, cid: int) -> Connection:
        return self._by_handle[cid]

    def __len__(self) -> int:
        return len(self._by_handle)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._by_handle))

    def values(self) -> ValuesView[Connection]:
        return self._by_handle.copy().values()

    def items(self) -> ItemsView[int, Connection]:
        return self._by_handle.copy().items()

    def __repr__(self) -> str:
        return repr(self._by_handle.copy())
