"""What SQLAlchemy has in hand: a record for each connection, and a proxy for each checkout of one.

A record knows its slot, and gives it back.  A proxy does what SQLAlchemy's does in fewer steps: that saves
a third of what a checkout and its return take on SQLAlchemy 2.1, and a fourth on 2.0.
"""

from __future__ import annotations

import sys
import time
import weakref
from typing import Any

from sqlalchemy import exc, util
from sqlalchemy.pool import reset_commit, reset_rollback

from ..budget.ledger import ABANDONED
from ..budget.slots import HELD, Slot
from ..runtime import unreturned
from ..runtime.upkeep import Upkeep
from .seams import FINALIZER, AdhocProxiedConnection, ConnectionFairy, ConnectionRecord


class Record(ConnectionRecord):
    """SQLAlchemy's record of a connection, which knows its slot."""

    __slots__ = ("attachment", "owner", "slot")

    def __init__(self, owner: Any, slot: Slot) -> None:
        # Without a connection yet: get_connection() opens it, as it does for one that was
        # invalidated, so that there is one way in which connections are opened.
        super().__init__(owner, connect=False)
        self.owner = owner
        """The ``QueriesPool`` that it was born in."""
        self.slot = slot
        """Its slot, for life."""
        self.attachment: Any = None if slot.home is None else slot.home()
        """Its engine's side of the ledger, in the runtime that it was born in."""

    @property
    def logger(self) -> Any:
        """Where its engine logs, at the level of its ``echo_pool``."""
        return self.owner.logger

    @property
    def heard(self) -> bool:
        """Do listeners hear of its close?  They may take as long as they like."""
        return bool(self.owner.dispatch.close)

    def reset(self) -> None:
        """Roll back, through the dialect."""
        dbapi_connection = self.dbapi_connection
        if dbapi_connection is not None:
            proxied = AdhocProxiedConnection(dbapi_connection, self)
            self.owner._dialect.do_rollback(proxied)

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        """As SQLAlchemy's; it is checked before its next use."""
        if sys._getframe(1).f_code is FINALIZER:  # its rollback has failed
            self.owner._core.count("failed_resets")
        self.slot.suspect = True
        try:
            super().invalidate(e, soft)
        except BaseException:
            # A listener has failed, or was cancelled. SQLAlchemy 2.1 returns it as it is, in a transaction.
            if not soft and self.dbapi_connection is not None:
                self.dbapi_connection = None
                self.owner._core.connections.drop(self.slot)
            raise

    def checkin(self, _fairy_was_created: bool = True) -> None:
        """Return it.

        Does what SQLAlchemy's does, and gives the slot back also where a listener fails, when
        SQLAlchemy's has lost sight of the record already.  (Calling that one in here would cost 3 % of a
        checkout and return; doing without it saves a frame.)
        """
        if self.fairy_ref is None and _fairy_was_created:
            super().checkin()  # for the second time: it warns, and that is all
            return
        owner = self.owner
        owner.records_out.discard(self)
        fairy_ref, self.fairy_ref = self.fairy_ref, None
        if self.finalize_callback or owner.dispatch.checkin:
            self.tell_listeners(fairy_ref)
        owner._checkouts.give(self.attachment, self)

    def tell_listeners(self, fairy_ref: weakref.ref[Any] | None = None) -> None:
        """Call the listeners to its return; if one fails, close the connection and give the slot back."""
        connection = self.dbapi_connection
        try:
            while self.finalize_callback:  # the dialect's: they reset the isolation level
                callback = self.finalize_callback.pop()
                if connection is not None:
                    callback(connection)
            self.owner.dispatch.checkin(connection, self)
        except BaseException as error:
            # The holder's proxy would go on to act on the record, which may be another's soon.
            if fairy_ref is not None and (fairy := fairy_ref()) is not None:
                fairy.dbapi_connection = fairy._connection_record = None
            self.return_hollow(error)
            raise

    def return_hollow(self, error: BaseException) -> None:
        """In which state the connection is nobody knows: close it, then give the slot back."""
        try:
            self.invalidate(error)
        finally:
            self.dbapi_connection = None  # a listener may have kept invalidate() from closing it
            self.owner._checkouts.give_hollow(self.attachment, self)

    def abandoned(self, proxy_ref: weakref.ref[Any]) -> None:
        """Its proxy has died without having been closed: return it, as its close would have."""
        if self.fairy_ref is proxy_ref and self.slot.state is HELD:
            Upkeep.abandoned_at = time.monotonic()
            unreturned.tell(self.slot, unreturned.COLLECTED)
            proxy = Proxy(self.owner, self, self.owner._should_log_debug())
            self.fairy_ref = weakref.ref(proxy, self.abandoned)
            if self.owner._dialect.is_async and proxy.dbapi_connection is not None:
                self._drop(proxy)
            else:  # also where it was invalidated: nothing is to be rolled back
                proxy.close()
            Upkeep.abandoned_at = time.monotonic()
        elif self.fairy_ref is proxy_ref:  # an audit was first
            self.owner.records_out.discard(self)

    def _drop(self, proxy: Proxy) -> None:
        """Nothing can be awaited here, so nothing can be rolled back: close the connection.

        As SQLAlchemy does, with its words and its events; and the slot comes back.
        """
        owner, connection = self.owner, proxy.dbapi_connection
        ends = owner._dialect.has_terminate or getattr(self.slot.socket, "known", False) is True
        self.slot.reason = ABANDONED
        self.fairy_ref = None
        owner.records_out.discard(self)
        try:
            proxy._reset(owner, transaction_was_reset=False, terminate_only=True, asyncio_safe=False)
            owner.dispatch.detach(connection, self)
            if ends:
                owner.dispatch.close_detached(connection)
                owner._close_connection(connection, terminate=owner._dialect.has_terminate)
        except Exception:
            owner.logger.error("Exception during reset or similar", exc_info=True)
        finally:
            proxy._connection_record = proxy.dbapi_connection = None  # type: ignore[assignment]
            self.dbapi_connection = None
            if not ends:
                owner._core.connections.forget(self.slot)
            owner._checkouts.give_hollow(self.attachment, self)
            what = "terminated" if ends else "dropped, as it cannot be safely terminated"
            message = (
                "The garbage collector is trying to clean up non-checked-in connection "
                f"{connection!r}, which will be {what}.  Please "
                "ensure that SQLAlchemy pooled connections are returned to the pool explicitly, either by "
                "calling ``close()`` or by using appropriate context managers to manage their lifecycle."
            )
            owner.logger.error(message)
            util.warn(message)

    def cut_off(self, why: str) -> None:
        """Nobody can use the connection any more: in a forked child it is the parent's; or its event loop has
        ended.

        Its holder finds it broken, as after a restart of the server, and gets another one.

        :param why: a sentence, for the holder.
        """
        fairy = None if self.fairy_ref is None else self.fairy_ref()
        if fairy is not None:
            fairy.dbapi_connection = LeftBehind(self.owner._dialect, why)  # type: ignore[assignment]
        self.dbapi_connection = None
        self.__class__ = ForeignRecord


class _NoFinalizer:
    """SQLAlchemy 2.1 detaches what it has made to see that a proxy died.  Ours has a weak reference."""

    def detach(self) -> None:
        """There is nothing to be detached."""


class Proxy(ConnectionFairy):
    """SQLAlchemy's proxy of a connection that is out."""

    __slots__ = ()

    _finalizer: Any = _NoFinalizer()

    def __init__(self, pool: Any, record: Record, echo: Any) -> None:
        self._pool = pool
        self._connection_record = record
        self.dbapi_connection = record.dbapi_connection  # type: ignore[assignment]
        self._echo = echo
        self._counter = 1

    def listener_failed(self, error: BaseException) -> None:
        """Answer a checkout listener that has raised, as SQLAlchemy's ``_checkout()`` does.

        A ``DisconnectionError`` asks for another connection, which the listeners see again; the second one is
        the last.  Anything else returns the record, and is raised.
        """
        pool: Any = self._pool
        record: Any = self._connection_record
        try:
            for attempt in (1, 2):
                if not isinstance(error, exc.DisconnectionError):
                    raise error
                pool.logger.info("Disconnection detected on checkout (reason: %r)", error)
                record.invalidate(error)
                if error.invalidate_pool:
                    pool._invalidate(self, error, _checkin=False)
                self.dbapi_connection = record.get_connection()
                if attempt == 2:
                    break
                record.fresh = False
                try:
                    pool.dispatch.checkout(self.dbapi_connection, record, self)
                except BaseException as another:
                    error = another
                else:
                    return
        except BaseException as last:
            if self._connection_record is not None:
                record._checkin_failed(last, _fairy_was_created=True)
            raise
        pool.logger.info("Reconnection attempts exhausted on checkout")
        self.invalidate()
        raise exc.InvalidRequestError("This connection is closed")

    def close(self, transaction_reset: bool = False) -> None:
        """Roll back, and return the record.

        What SQLAlchemy's does where nobody logs, or listens to resets, without its ``_checkin()``,
        ``_reset()``, ``_finalize_fairy()`` and the record's ``checkin()``; else those.
        """
        self._counter -= 1
        if self._counter:
            return
        pool: Any = self._pool
        record: Any = self._connection_record
        dispatch = pool.dispatch
        if record is not None and (record.fairy_ref is None or record.fairy_ref() is not self):
            # The collector has returned it, and then somebody's `__del__` closes the proxy.
            self._connection_record = self.dbapi_connection = None  # type: ignore[assignment]
            return
        if (
            record.__class__ is not Record  # detached, or inherited by a fork
            or self.dbapi_connection is None
            or self._echo
            or dispatch.reset
        ):
            self._checkin(transaction_reset)
            return
        try:
            if pool._reset_on_return is reset_rollback:
                begun = record.slot.begun
                if not transaction_reset and (begun is None or begun()):
                    pool._dialect.do_rollback(self)
            elif pool._reset_on_return is reset_commit:
                pool._dialect.do_commit(self)
        except BaseException as error:
            if not self._is_over(record, error):
                raise
        # First, so that whatever happens next nobody but this frame has the record, and its death is noticed.
        self._connection_record = self.dbapi_connection = None  # type: ignore[assignment]
        pool.records_out.discard(record)
        record.fairy_ref = None
        if record.finalize_callback or dispatch.checkin:
            record.tell_listeners()
        pool._checkouts.give(record.attachment, record)

    _close_special = close

    def rollback(self) -> None:
        """The driver's; SQLAlchemy's proxy finds it by ``__getattr__``, which takes a sixth of a checkout."""
        self.dbapi_connection.rollback()

    def _checkin(self, transaction_was_reset: bool = False) -> None:
        """As SQLAlchemy's, which leaves a detached connection of asyncio to the destructor of a driver that
        has no ``terminate()``.  Here it can be closed as any other."""
        pool: Any = self._pool
        connection, detached = self.dbapi_connection, self._connection_record is None
        super()._checkin(transaction_was_reset)
        if detached and pool._dialect.is_async and pool._core.connections.is_detached(connection):
            pool.dispatch.close_detached(connection)
            pool._close_connection(connection)

    def detach(self) -> None:
        """As SQLAlchemy's.  First, nothing but the proxy leads to the record, see :meth:`close`."""
        self._pool.records_out.discard(self._connection_record)  # type: ignore[attr-defined]
        super().detach()

    def _is_over(self, record: Record, error: BaseException) -> bool:
        """It could not be reset, so it is of no use any more; is that all, as SQLAlchemy has it?

        An interrupt reaches the thread that closes it; the record is returned in here then.
        """
        self._pool.logger.error("Exception during reset or similar", exc_info=True)
        record.owner._core.count("failed_resets")
        if not isinstance(error, Exception):
            self._connection_record = self.dbapi_connection = None  # type: ignore[assignment]
            self._pool.records_out.discard(record)  # type: ignore[attr-defined]
            record.fairy_ref = None
            record.return_hollow(error)
            return False
        record.invalidate(error)
        return True


class LeftBehind:
    """What a connection is that was cut off from its holder: one that is lost."""

    closed = broken = True

    def __init__(self, dialect: Any, why: str) -> None:
        self._dbapi = getattr(dialect, "loaded_dbapi", None)
        self._why = why

    @property
    def _connection(self) -> LeftBehind:
        """asyncpg's dialect asks what is below SQLAlchemy's adapter whether it is closed."""
        return self

    def is_closed(self) -> bool:
        """It is."""
        return True

    def cursor(self, *_: Any, **__: Any) -> Any:
        """Raise what the driver raises for a connection that is lost."""
        raise getattr(self._dbapi, "OperationalError", RuntimeError)(self._why)

    def rollback(self) -> None:
        """Nothing is to be rolled back here."""

    commit = close = rollback


class ForeignRecord(Record):
    """A record that was cut off from its connection while it was out.  It has no slot any more."""

    __slots__ = ()

    def checkin(self, _fairy_was_created: bool = True) -> None:
        self.owner.records_out.discard(self)
        self.fairy_ref = None
