"""``QueriesPool``: SQLAlchemy's side.

Few overrides, at the seams where SQLAlchemy lets a pool see what it does (design 15): a checkout is
``_do_get``, a check-in :meth:`Record.checkin`, a detach ``_do_return_conn``; every opening goes through
the wrapped creator and every closing through ``_close_connection``, also those that SQLAlchemy does by
itself for ``recycle``, ``pre_ping`` and invalidation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool import Pool as SQLAlchemyPool

from . import identity, logs, parameters
from .diagnostics import checkout_timeout
from .errors import ParameterError
from .parameters import UNSTATED, Unstated
from .pool import Connection, Pool, PoolManager
from .seams import AdhocProxiedConnection, ConnectionRecord
from .slots import HELD, LENT, OPENING, Attachment, Permit, Quota


class Record(ConnectionRecord):
    """SQLAlchemy's record of a connection, which knows its slot."""

    __slots__ = ("owner", "slot")

    def __init__(self, owner: QueriesPool, slot: Connection) -> None:
        # Without a connection yet: get_connection() opens it, as it does for one that was
        # invalidated, so that there is one way in which connections are opened.
        super().__init__(owner, connect=False)
        self.owner = owner
        """The pool that it was born in."""
        self.slot = slot
        """Its slot, for life."""

    @property
    def logger(self) -> Any:
        """Where its engine logs, at the level of its ``echo_pool``."""
        return self.owner.logger

    def reset(self) -> None:
        """Roll back, through the dialect."""
        dbapi_connection = self.dbapi_connection
        if dbapi_connection is not None:
            proxied = AdhocProxiedConnection(dbapi_connection, self)
            self.owner._dialect.do_rollback(proxied)

    def checkin(self, _fairy_was_created: bool = True) -> None:
        """Come home.

        Does what SQLAlchemy's does, and gives the slot back also where a listener fails, when
        SQLAlchemy's has lost sight of the record already.  (Calling that one in here would cost 3 % of a
        checkout and return; doing without it saves a frame.)
        """
        if self.fairy_ref is None and _fairy_was_created:
            super().checkin()  # for the second time: it warns, and that is all
            return
        self.fairy_ref = None
        owner = self.owner
        if self.finalize_callback or owner.dispatch.checkin:
            self._tell_listeners()
        owner._shared.give(owner._attachment, self)

    def _tell_listeners(self) -> None:
        connection = self.dbapi_connection
        try:
            while self.finalize_callback:  # the dialect's: they reset the isolation level
                callback = self.finalize_callback.pop()
                if connection is not None:
                    callback(connection)
            self.owner.dispatch.checkin(connection, self)
        except BaseException as error:
            self._come_home_hollow(error)
            raise

    def _come_home_hollow(self, error: BaseException) -> None:
        """In which state the connection is nobody knows: close it, then give the slot back."""
        try:
            self.invalidate(error)
        finally:
            self.dbapi_connection = None  # a listener may have kept invalidate() from closing it
            self.owner._shared.give_hollow(self.owner._attachment, self)

    def cut_off(self) -> None:
        """In a forked child: the connection is the parent's.

        Who has it out finds it invalidated, as after a lost connection, and gets another one.
        """
        fairy = None if self.fairy_ref is None else self.fairy_ref()
        if fairy is not None:
            fairy.dbapi_connection = None  # type: ignore[assignment]
        self.dbapi_connection = None
        self.__class__ = ForeignRecord


class ForeignRecord(Record):
    """A record that was out when the process forked.  It has no slot here."""

    __slots__ = ()

    def checkin(self, _fairy_was_created: bool = True) -> None:
        self.fairy_ref = None


class QueriesPool(SQLAlchemyPool):
    """A pool whose limit belongs to the database: all engines of one URL in a process share it.

    :param creator: returns a DBAPI connection; ``create_engine`` passes its own.
    :param max_size: the largest number of connections, ``None`` for no limit.  The database's pool
        has the largest that its engines state, 15 where none does; no engine exceeds its own.
    :param idle_ttl: seconds after which an idle connection is closed, ``None`` for never.
    :param timeout: seconds that a checkout waits for a slot, ``None`` for ever, 0 not at all
        (``pool_timeout`` of ``create_engine``).
    :param pool_id: names the pool, in place of the id that follows from the URL.
    :param use_lifo: use the connection that came home last, so that those not needed age out;
        else the one idle for longest (``pool_use_lifo`` of ``create_engine``).
    :param pool_size: QueuePool's; with ``max_overflow`` it is read as ``max_size``, their sum.
    :param max_overflow: QueuePool's, see ``pool_size``.
    :param gc_on_wait: ask the garbage collector for abandoned connections while waiting.
    :param kw: what :class:`sqlalchemy.pool.Pool` takes.
    :raises ParameterError: an :class:`sqlalchemy.exc.ArgumentError`; a value means nothing.
    :raises TypeError: for a parameter that nobody knows.
    """

    _is_asyncio = False
    _sqla_logger_namespace = logs.NAME

    def __init__(
        self,
        creator: Any,
        max_size: int | Unstated | None = UNSTATED,
        idle_ttl: float | None = 60.0,
        timeout: float | None = 30.0,
        pool_id: str | None = None,
        use_lifo: bool = True,
        pool_size: int | Unstated = UNSTATED,
        max_overflow: int | Unstated = UNSTATED,
        gc_on_wait: bool = True,
        **kw: Any,
    ) -> None:
        # Not a parameter, because create_engine would take it for one.
        predecessor: QueriesPool | None = kw.pop("_predecessor", None)
        self._max_size = _stated_max_size(max_size, pool_size, max_overflow)
        self._idle_ttl = parameters.seconds("idle_ttl", idle_ttl)
        self._timeout = parameters.seconds("timeout", timeout)
        self._pool_id = _stated_pool_id(pool_id)
        self._use_lifo = parameters.flag("use_lifo", use_lifo)
        self._gc_on_wait = parameters.flag("gc_on_wait", gc_on_wait)
        self._disposed = False
        """Was it disposed?  Then a following ``recreate()`` completes an ``Engine.dispose()``."""
        super().__init__(creator, **_understood(kw))
        if self._dialect.is_async:  # SQLAlchemy says so too, but for its oldest 2.0
            raise exc.ArgumentError(
                f"Pool class {type(self).__name__} cannot be used with asyncio engine", code="pcls"
            )
        self._identity = who = self._identify(predecessor)
        if predecessor is not None and predecessor._identity == who:
            quota = predecessor._attachment.quota
        else:
            quota = self._make_quota(who)
        ttl = math.inf if self._idle_ttl is None or who.in_memory else self._idle_ttl
        self._attachment: Attachment = Attachment(quota, ttl, self._use_lifo)
        self._shared: Pool = PoolManager.attach(who.pid, who.label, self._attachment)
        if quota.stated == math.inf:
            self._shared.warn_of_no_limit()

    def _identify(self, predecessor: QueriesPool | None) -> identity.Identity:
        if predecessor is not None:
            who = predecessor._identity
            if who.private and not predecessor._disposed:
                return identity.private(who.label, who.in_memory)
            return who
        return identity.of_engine(self._creator, self.__dict__.get("_dialect"), self._pool_id)

    def _make_quota(self, who: identity.Identity) -> Quota:
        if who.in_memory:  # a second connection would be a second, empty database
            return Quota(1.0)
        if isinstance(self._max_size, Unstated):
            return Quota(None)
        return Quota(math.inf if self._max_size is None else self._max_size)

    @property
    def pid(self) -> str:
        """The id of the pool in the :class:`~sqla_queries_pool.pool.PoolManager`."""
        return self._shared.id

    # -- checkout ----------------------------------------------------------------------------------

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._shared.take(self._attachment)
        if record.__class__ is Record:
            # Whether it must be reopened (invalidated, too old) SQLAlchemy asks next, in
            # get_connection(), and sends it home if that fails.  The slot is held all the time, so
            # it is bounded, and the seams see it; asking here too costs 0.3 microseconds.
            return record
        return self._open(record) if record is not None else self._wait()

    def _wait(self) -> ConnectionPoolEntry:
        timeout = math.inf if self._timeout is None else self._timeout
        entry = self._shared.wait(self._attachment, timeout, self._gc_on_wait)
        if entry is None:
            raise checkout_timeout(self._shared, self._attachment, timeout)
        return entry if isinstance(entry, Record) else self._open(entry)

    def _open(self, permit: Permit) -> Record:
        shared = self._shared
        try:
            shared.close_evicted(permit)
            record = Record(self, permit.slot)  # type: ignore[arg-type]
            shared.bind(record.slot, record)
            record.get_connection()
        except BaseException as error:
            shared.failed(permit, error)
            raise
        shared.opened(record.slot)
        return record

    def _should_wrap_creator(self, creator: Any) -> Callable[[ConnectionPoolEntry], Any]:
        create = super()._should_wrap_creator(creator)

        def connect(record: ConnectionPoolEntry) -> Any:
            # Read before connecting: what a dispose overtakes is of the old generation.
            generation = self._attachment.generation
            try:
                dbapi_connection = create(record)
            except Exception as error:
                self._shared.connect_failed(error)
                raise
            if isinstance(record, Record):
                self._shared.socket_opened(record.slot, dbapi_connection, generation)
            return dbapi_connection

        return connect

    # -- what happens to what is out; Record.checkin is the way home --------------------------------

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # SQLAlchemy's checkin() would come by here, Record's does not: this is a fairy that detaches.
        self._shared.let_go(record.slot)  # type: ignore[attr-defined]

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        try:
            super()._close_connection(connection, terminate=terminate)
        finally:
            self._shared.socket_closed(connection)

    # -- the life of the pool ----------------------------------------------------------------------

    def dispose(self) -> None:
        """Close this engine's idle connections; the pool stays usable."""
        self._disposed = True
        self._shared.dispose(self._attachment)
        self.logger.info("Pool disposed. %s", self.status())

    def recreate(self) -> QueriesPool:
        """Return a pool with the same parameters, listeners, limit and id.

        After :meth:`dispose`, as ``Engine.dispose()`` calls it, what this pool's connections were
        out then close when they come home.
        """
        self.logger.info("Pool recreating")
        if self._disposed:
            self._shared.retire(self._attachment)
        return self.__class__(
            self._creator,
            max_size=self._max_size,
            idle_ttl=self._idle_ttl,
            timeout=self._timeout,
            pool_id=self._pool_id,
            use_lifo=self._use_lifo,
            gc_on_wait=self._gc_on_wait,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            dialect=self._dialect,
            _dispatch=self.dispatch,
            _predecessor=self,
        )

    # -- what tools read: of this engine -----------------------------------------------------------

    def size(self) -> int:
        """This engine's ``max_size``, or the pool's where it states none; 0 for no limit."""
        stated = self._attachment.quota.stated
        size = self._shared.max_size if stated is None else stated
        return 0 if size is None or size == math.inf else int(size)

    def checkedin(self) -> int:
        """How many connections this engine has idle."""
        return len(self._attachment.idle) + len(self._attachment.hollow)

    def checkedout(self) -> int:
        """How many connections of this engine are out, or being opened."""
        ref = self._attachment.ref
        states = [slot.state for slot in list(self._attachment.quota.slots) if slot.home is ref]
        return sum(state in (HELD, LENT, OPENING) for state in states)

    def overflow(self) -> int:
        """QueuePool's: how many connections there are above ``size()``; here, zero or less."""
        return self.checkedin() + self.checkedout() - self.size() if self.size() else 0

    def timeout(self) -> float | None:
        """Seconds that a checkout waits, None for ever."""
        return self._timeout

    def status(self) -> str:
        """The state of the pool, and this engine's part of it."""
        return (
            f"{self._shared}; this engine: size {self.size()}, "
            f"checked in {self.checkedin()}, checked out {self.checkedout()}"
        )

    def __repr__(self) -> str:
        return f"<QueriesPool {self.status()}>"


def _stated_max_size(
    max_size: int | Unstated | None, pool_size: object, max_overflow: object
) -> int | Unstated | None:
    sums = parameters.queuepool_max_size(pool_size, max_overflow)
    if isinstance(max_size, Unstated):
        return sums
    if not isinstance(sums, Unstated):
        other = "max_overflow" if pool_size is UNSTATED else "pool_size"
        raise ParameterError(
            f"max_size={parameters.shown(max_size)} and {other} can't both be stated: max_size is the "
            "sum of pool_size and max_overflow, write it alone"
        )
    return parameters.max_size("max_size", max_size)


def _understood(kw: dict[str, Any]) -> dict[str, Any]:
    """What is SQLAlchemy's, with text understood: create_engine converts none, engine_from_config some."""
    convert = {"recycle": parameters.recycle, "pre_ping": parameters.flag, "echo": parameters.echo}
    return {name: convert[name](name, kw[name]) if name in convert else kw[name] for name in kw}


def _stated_pool_id(pool_id: object) -> str | None:
    if pool_id is None or (isinstance(pool_id, str) and pool_id):
        return pool_id
    raise ParameterError(f"pool_id={parameters.shown(pool_id)} is not valid: write a name, or None")
