"""``QueriesPool``: SQLAlchemy's side.

Few overrides, at the seams where SQLAlchemy lets a pool see what it does (design 15): a checkout is
``connect``, a check-in :meth:`Proxy.close`, a detach ``_do_return_conn``; every opening goes through
the wrapped creator and every closing through ``_close_connection``, also those that SQLAlchemy does by
itself for ``recycle``, ``pre_ping`` and invalidation.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.pool import Pool as SQLAlchemyPool

from .. import logs, parameters
from ..budget.audit import Audit
from ..budget.slots import (
    DRAINED,
    HELD,
    IDLE,
    LOCKED,
    OPENING,
    SUSPENDED,
    Attachment,
    Permit,
    Quota,
    Slot,
    Terms,
)
from ..budget.stats import Statistics
from ..errors import ParameterError
from ..insight import deadlock, stacks
from ..insight.report import log_idle, log_leak
from ..insight.snapshot import Snapshot, snapshot
from ..labels import checkout_label
from ..parameters import Unstated
from ..pool import Pool, stopping
from ..pool.manager import attach
from ..runtime.garbage import GC_AFTER
from ..sockets import liveness
from ..sockets.lingering import LONGEST
from . import failover, identity, seams
from .attempt import Attempt
from .opening import creator_of, open_connection, warm_up
from .records import Proxy, Record
from .settings import OF_CREATE_ENGINE, OPTIONS, Settings, refuse_removed
from .sides import Sides, ThreadSide

if TYPE_CHECKING:
    from .loop_sides import LoopSides

_label = checkout_label.get


class QueriesPool(SQLAlchemyPool):
    """A pool whose limit belongs to the database: all engines of one database in a process share it.

    :param creator: returns a DBAPI connection; ``create_engine`` passes its own.

    :param others: here stands what settings.py says of each of the others.
    :param kw: what :class:`sqlalchemy.pool.Pool` takes.
    :raises ParameterError: an :class:`sqlalchemy.exc.ArgumentError`: a value is not allowed.
    :raises TypeError: for a parameter that does not exist.
    """

    _sqla_logger_namespace = logs.NAME
    # Constants; tests have classes with others.
    _gc_on_wait = True
    """Does a waiting checkout ask the garbage collector for connections that were abandoned in a cycle?"""
    _close_timeout = LONGEST
    """Seconds for which an opening at the limit waits until the server has let go of what was closed before,
    so that there are never more than the limit on the server either."""
    _deadlock_grace = deadlock.GRACE
    _track_stacks = False
    """Note where connections are checked out?  A test run may set it for all pools (pytest_plugin.py)."""

    def __init__(
        self,
        creator: Any,
        # These four in QueuePool's order, so that what is written without names means the same.
        pool_size: int | Unstated = Settings.pool_size,
        max_overflow: int | Unstated = Settings.max_overflow,
        timeout: float | None = Settings.timeout,
        use_lifo: bool = Settings.use_lifo,
        max_size: int | Unstated | None = Settings.max_size,
        idle_ttl: float | None = Settings.idle_ttl,
        pool_id: str | None = Settings.pool_id,
        ping_after: float | None = Settings.ping_after,
        ping_timeout: float | None = Settings.ping_timeout,
        min_size: int = Settings.min_size,
        track_stacks: bool = Settings.track_stacks,
        leak_after: float | None = Settings.leak_after,
        on_deadlock: str = Settings.on_deadlock,
        max_waiting: int | None = Settings.max_waiting,
        queue_target: float | None = Settings.queue_target,
        fail_fast_after: float | None = Settings.fail_fast_after,
        share: str | None = Settings.share,
        classes: dict[str, dict[str, float]] | None = Settings.classes,
        caller: str | None = Settings.caller,
        check_limits: bool = Settings.check_limits,
        idle_in_transaction_after: float | None = Settings.idle_in_transaction_after,
        **kw: Any,
    ) -> None:
        refuse_removed(kw)
        # create_engine passes its dialect, and its callers have written its names.
        names = OF_CREATE_ENGINE if "dialect" in kw else {}
        self.settings = Settings.read(locals(), names)
        """What was stated for this engine."""
        # Not a parameter, because create_engine would take it for one.
        predecessor: QueriesPool | None = kw.pop("_predecessor", None)
        self.records_out: set[Any] = set()
        """The records that are out.  Where a proxy dies in a cycle with its record, its weak reference is
        told only if something outside leads to it; not the slot, for the registry must lead to no engine."""
        self._disposed = False
        """Was it disposed?  Then a following ``recreate()`` completes an ``Engine.dispose()``."""
        super().__init__(creator, **parameters.of_sqlalchemys(kw, names))
        # SQLAlchemy's own ping knows no limit of time, and listeners run right after it.  So probe.py pings.
        self.pings, self._pre_ping = self._pre_ping, False
        """Was ``pool_pre_ping`` stated?  Then each checkout pings, as SQLAlchemy does."""
        self._identity = who = self._identify(predecessor)
        if predecessor is not None and predecessor._identity == who:
            quota = predecessor._attachment.quota
        else:
            quota = self._make_quota(who)
        self._attachment: Attachment = self._new_attachment(quota)
        """The first one: an engine of asyncio has one for each event loop."""
        if self._dialect.is_async:
            _loop_sides()  # now, lest the first checkout import it, which may be one of a forked child
        failover.listen(self._dialect)
        if self.settings.track_stacks:
            self._track_stacks = True
        self._shared: Pool = self._attach(who, self._attachment)
        self._core = self._shared.core
        self.failover = failover.Failover(self._core)
        """Which of its connections are to be asked whether their server can't write."""
        self._checkouts = self._core.checkouts
        self._core.on_leak, self._core.on_idle = log_leak, log_idle
        if quota.stated == math.inf:
            self._core.warn_of_no_limit()

    @functools.cached_property
    def _sides(self) -> Sides:
        """Its attachments.  Chosen when they are first asked for: a pool that is made before its engine
        (``create_async_engine(pool=…)``) gets the engine's dialect later."""
        if self._dialect.is_async:
            more = weakref.WeakMethod(self._attach_another)
            new: Sides = _loop_sides()(self._attachment, self._core, more, self.records_out)
        else:
            new = ThreadSide(self._attachment, self._core)
        # Of two threads that ask at once, both get the first one's.
        chosen: Sides = self.__dict__.setdefault("_sides", new)
        return chosen

    @functools.cached_property
    def _take(self) -> Callable[..., Any]:
        return self._sides.take

    def _identify(self, predecessor: QueriesPool | None) -> identity.Identity:
        if predecessor is not None:
            who = predecessor._identity
            if who.private and not predecessor._disposed:
                return identity.private(who.label, who.in_memory, who.alone)
            return who
        return identity.of_engine(self._creator, self.__dict__.get("_dialect"), self.settings.pool_id)

    def _new_attachment(self, quota: Quota) -> Attachment:
        told = self.settings.of_ledger()
        if self.pings:
            told["ping_after"] = 0.0
        if self._identity.in_memory:  # the database is gone with its last connection
            told |= {"idle_ttl": math.inf, "ping_after": math.inf}
        attachment = Attachment(quota, **told)
        attachment.caller = self.settings.caller
        stated: Any = self.settings.classes or {}
        attachment.classes = {name: Terms(**terms) for name, terms in stated.items()}
        attachment.opener = weakref.WeakMethod(self._open)
        early = min(attachment.max_waiting, attachment.queue_target, attachment.fail_fast_after)
        if early == math.inf and attachment.ping_after and self._recycle < 0:
            timeout = self.settings.timeout
            attachment.first_look = GC_AFTER if timeout is None else min(GC_AFTER, timeout / 2)
        return attachment

    def _attach_another(self) -> Attachment:
        attachment = self._new_attachment(self._attachment.quota)
        self._attach(self._identity, attachment)
        return attachment

    def _attach(self, who: identity.Identity, attachment: Attachment) -> Pool:
        share = self.settings.share
        if share is not None and who.private:
            raise ParameterError(
                f"share={share!r}: no other process can know the database of this engine ({who.label}). Pass "
                "the same pool_id='…' to all engines that are to share their limit, or leave share out"
            )
        return attach(who.pid, who.label, attachment, share)

    def _make_quota(self, who: identity.Identity) -> Quota:
        if who.alone:  # a second connection would be a second, empty database
            return Quota(1.0)
        stated = self.settings.max_size
        if isinstance(stated, Unstated):
            return Quota(None)
        return Quota(math.inf if stated is None else stated)

    @property
    def pid(self) -> str:
        """The id of the pool in the :class:`~sqla_queries_pool.pool.PoolManager`."""
        return self._shared.id

    # -- checkout ----------------------------------------------------------------------------------

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out.

        :raises CheckoutTimeout: there was none within ``timeout``.
        :raises Exception: the driver's, if one can't be opened.
        """
        # What SQLAlchemy's does, without its `_checkout()`, `checkout()` and `get_connection()`: what the
        # last one looks for makes a slot suspect, so `_do_get()` has seen to it.
        record: Any = self._do_get()
        # Recycling goes by the time of day; and who closed it may have been interrupted.
        if self._recycle > -1 or record.dbapi_connection is None:
            try:
                record.get_connection()
            except BaseException as error:
                record.return_hollow(error)
                raise
        echo = self.logger.isEnabledFor(logging.DEBUG)
        proxy = Proxy(self, record, echo)
        record.fairy_ref = weakref.ref(proxy, record.abandoned)
        self.records_out.add(record)
        if echo:
            self.logger.debug("Connection %r checked out from pool", proxy.dbapi_connection)
        if self.dispatch.checkout:
            record.fresh = False
            try:
                self.dispatch.checkout(proxy.dbapi_connection, record, proxy)
            except BaseException as error:
                proxy.listener_failed(error)
        return proxy

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._take()
        if record.__class__ is Record:
            slot = record.slot
            slot.label = _label()
            if self._track_stacks:
                slot.stack = stacks.calls(sys._getframe(1))
            # Twice, for other threads run during the poll, and one may find that the server is gone.
            if not slot.suspect and not slot.poll(0) and not slot.suspect:
                return record
        return Attempt(self, record, stacks.calls(sys._getframe(1)) if self._track_stacks else ()).run()

    def _open(self, permit: Permit) -> Record:
        """Open a connection by a permit, for the housekeeper: :func:`.open_connection`."""
        return open_connection(self, permit)

    def _should_wrap_creator(self, creator: Any) -> Callable[[ConnectionPoolEntry], Any]:
        return creator_of(self, super()._should_wrap_creator(creator))

    # -- what happens to what is out; Record.checkin returns it -------------------------------------

    def _invalidate(
        self, connection: Any, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        # SQLAlchemy replaces all that are older, each at its next checkout, and what can't be opened there is
        # an error at once; here it is tried again.  So before, and for those checked meanwhile, after.
        self._core.suspect_own(self._attachment)
        super()._invalidate(connection, exception, _checkin)
        self._core.suspect_own(self._attachment)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # SQLAlchemy's checkin() would come by here, Record's does not: this is a proxy that detaches.
        self._checkouts.let_go(record.slot)  # type: ignore[attr-defined]

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        connections, close = self._core.connections, super()._close_connection
        slot = connections.find(connection)
        socket = self._sides.socket(connection) if slot is None else slot.socket
        try:
            with connections.lingering.closing(socket, self._close_timeout):
                self._sides.close(socket, functools.partial(close, connection, terminate=terminate))
        finally:
            connections.closed(connection)

    # -- what it says of itself -------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return what the whole pool has now, and has done; takes no lock.

        ``liveness`` is this engine's own.
        """
        return replace(self._shared.statistics(), liveness=liveness.of_all(self._sides.all()))

    def snapshot(self) -> Snapshot:
        """Return the holders and the waiting checkouts of the whole pool; takes no lock."""
        return snapshot(self._shared)

    # -- the life of the pool ----------------------------------------------------------------------

    def dispose(self) -> None:
        """Close this engine's idle connections; the pool stays usable."""
        self._disposed = True
        for attachment in self._sides.all():
            self._core.dispose(attachment)
        self.logger.info("Pool disposed. %s", self.status())

    def warm_up(self) -> Any:
        """Open connections now, until there are ``min_size``, or as many as the limit leaves room for.

        With an engine of asyncio: ``await engine.pool.warm_up()``, in the loop that is to use them.

        :raises Exception: the driver's, if one can't be opened.
        """
        attachment = self._sides.here
        return self._sides.runtime.call(functools.partial(warm_up, self, attachment))

    def expire(self, rolling: bool = False) -> None:
        """Replace this engine's connections without an error to anybody, as when credentials were rotated.

        :param rolling: renew them one after the other in the background; else what is idle is closed at once.
            What is checked out is replaced when it is returned, either way.
        """
        for attachment in self._sides.all():
            if rolling:
                self._core.expire_rolling(attachment)
            else:
                self._core.dispose(attachment)
                self._core.retire(attachment)

    def drain(self, timeout: float | None) -> Any:
        """Reject new checkouts of this engine, and wait until nothing is out any more: before a process ends.

        Checkouts that wait already are served.  What is idle is closed at once, what is out when it is
        returned; nothing is taken away from its holder.  The engine stays drained, also after
        ``Engine.dispose()``, until :meth:`resume`; a forked child's is not drained.

        With an engine of asyncio: ``await engine.pool.drain(timeout)`` in its loop; where no loop runs, it
        blocks the thread.

        :param timeout: seconds to wait, at most; None for as long as it takes.
        :return: a :class:`.Stopped`: who still has connections.
        """
        return self._stop(DRAINED, timeout)

    def suspend(self, timeout: float | None = 0.0) -> Any:
        """Have checkouts of this engine wait until :meth:`resume`: for a failover, or a migration.

        They wait within their timeouts.  What is idle is closed at once, what is out when it is returned.

        With an engine of asyncio: ``await engine.pool.suspend()``, as for :meth:`drain`.

        :param timeout: seconds to wait until nothing is out any more, at most.
        :return: a :class:`.Stopped`: who still has connections.
        """
        return self._stop(SUSPENDED, timeout)

    def resume(self) -> None:
        """Hand connections out again, after :meth:`suspend` or :meth:`drain`; waiting checkouts first."""
        stopping.resume(self._core, (self._attachment.quota,))

    def _stop(self, how: str, timeout: float | None) -> Any:
        runtime = self._sides.runtime_or_thread
        quotas = (self._attachment.quota,)
        return runtime.call(lambda: stopping.stop(self._core, quotas, how, timeout, runtime.pause))

    def audit(self) -> Audit:
        """Compare the bookkeeping of the whole pool with the facts: see :meth:`.Pool.audit`."""
        return self._shared.audit()

    def recreate(self) -> QueriesPool:
        """Return a pool with the same parameters, listeners, limit and id.

        After :meth:`dispose`, as ``Engine.dispose()`` calls it, what this pool's connections were
        out then close when they are returned.
        """
        self.logger.info("Pool recreating")
        if self._disposed:
            for attachment in self._sides.all():
                attachment.min_size = 0  # its successor keeps connections in readiness
                self._core.retire(attachment)
        return self.__class__(
            self._creator,
            **self.settings.as_arguments(),
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self.pings,
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
        """How many connections this engine has idle, those included that are being renewed."""
        return sum(
            slot.state is IDLE or (slot.state is HELD and slot.holder is None) for slot in self._slots()
        )

    def checkedout(self) -> int:
        """How many connections of this engine are out, or being opened for a checkout."""
        return sum(
            slot.state is LOCKED or (slot.state in (HELD, OPENING) and slot.holder is not None)
            for slot in self._slots()
        )

    def _slots(self) -> list[Slot]:
        homes = {attachment.ref for attachment in self._sides.all()}
        return [slot for slot in list(self._attachment.quota.slots) if slot.home in homes]

    def overflow(self) -> int:
        """QueuePool's: how many connections there are above ``size()``; here, zero or less."""
        return self.checkedin() + self.checkedout() - self.size() if self.size() else 0

    def timeout(self) -> float | None:
        """Seconds that a checkout waits, None for ever."""
        return self.settings.timeout

    def status(self) -> str:
        """The state of the pool, and this engine's part of it."""
        whose = ", which shares its limit with no other" if self._identity.private else ""
        if stopped := self._attachment.quota.stopped:
            whose += f", {stopped}"
        return (
            f"{self._shared}; this engine{whose}: size {self.size()}, "
            f"checked in {self.checkedin()}, checked out {self.checkedout()}"
        )

    def __repr__(self) -> str:
        return f"<QueriesPool {self.status()}>"


def _loop_sides() -> type[LoopSides]:
    """Imported when an engine of asyncio is made; others need none of it."""
    from .loop_sides import LoopSides

    return LoopSides


if QueriesPool.__doc__:  # None under -OO
    before, _, after = QueriesPool.__doc__.partition(":param others: ")
    indent = before[before.rindex("\n") :]  # Python 3.13 takes the indentation off
    each = indent.join(f":param {name}: {option.doc}" for name, option in OPTIONS.items())
    QueriesPool.__doc__ = before + each + after[after.index("\n") :]


if not seams.KNOWS_PROXY:
    del QueriesPool.connect  # SQLAlchemy's own, then, which asks _do_get()
