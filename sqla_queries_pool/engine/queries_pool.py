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
import time
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.pool import Pool as SQLAlchemyPool

from .. import logs, parameters
from ..budget import slots
from ..budget.audit import Audit
from ..budget.slots import HELD, LOCKED, Attachment, Permit, Quota, Rejected
from ..budget.stats import Statistics
from ..concurrency.gates import ThreadWaiter
from ..errors import PoolDeadlock
from ..insight import deadlock, stacks
from ..insight.diagnostics import (
    OPENING,
    PROBING,
    WAITING,
    Diagnosis,
    Snapshot,
    Stages,
    checkout_timeout,
    log_leak,
    rejected,
    snapshot,
)
from ..labels import checkout_label
from ..parameters import UNSTATED, Unstated
from ..pool import Pool, PoolManager
from ..runtime import jitter as retirement
from ..sockets import liveness
from . import identity, seams
from .records import Proxy, Record

_label = checkout_label.get
DEADLOCKS = (deadlock.RAISE, deadlock.WARN, deadlock.IGNORE)
LEAST_PING = 0.5
"""Seconds that a server has for the answer to a ping, however little is left of a checkout's timeout."""


class _Refused(Exception):
    """The server has refused a connection, or did so a moment ago, and it is worth trying again."""

    def __init__(self, refusal: Any) -> None:
        # Without the traceback, which would keep the record alive for as long as it is waited.
        self.refusal: Exception | None = None if refusal is None else refusal.with_traceback(None)


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
    :param ping_after: seconds for which a connection may be idle and is still used without asking the
        server whether it is there; ``None`` never asks, 0 always.  Whether the server has hung up is looked
        at in any case, without a round trip.
    :param ping_timeout: seconds that the server has for its answer, ``None`` for as long as it takes.
    :param close_timeout: seconds for which an opening at the limit waits until the server has let go of a
        connection that was closed before, so that there are never more than the limit on the server either; 0
        does not wait.
    :param min_size: how many connections are kept open for this engine, once one was opened, as far as the
        limit allows; they have no ``idle_ttl``, and others are opened in the background where some are lost.
    :param track_stacks: remember where each connection was checked out, for reports; costs some microseconds.
    :param leak_after: seconds after which a connection that is out is logged, once, with who has it; ``None``
        for never.
    :param deadlock_grace: seconds for which nothing may have moved among checkouts that wait for each other.
    :param on_deadlock: what to do then: ``"raise"`` a :class:`PoolDeadlock` in the newest of them, ``"warn"``
        in the log, or ``"ignore"`` it.
    :param read_only_is_disconnect: take an error that says that the server is read only (SQLSTATE 25006) for
        a disconnect: all connections are replaced, and new ones go where the URL points.  For a primary that
        may be demoted while connections stay open.
    :param max_waiting: how many checkouts of this engine may wait; one more is refused at once, with
        :class:`TooManyRequests`; ``None`` for any number.
    :param queue_target: seconds within which who waits is to be served; where nobody was for twenty times as
        long, who has waited for longer is refused, with :class:`TooManyRequests`, until the line is empty, so
        that those served are served in time; ``None`` refuses nobody.
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
        ping_after: float | None = 30.0,
        ping_timeout: float | None = 5.0,
        close_timeout: float = 1.0,
        min_size: int = 0,
        track_stacks: bool = False,
        leak_after: float | None = None,
        deadlock_grace: float = 1.0,
        on_deadlock: str = deadlock.RAISE,
        read_only_is_disconnect: bool = False,
        max_waiting: int | None = None,
        queue_target: float | None = None,
        **kw: Any,
    ) -> None:
        # Not a parameter, because create_engine would take it for one.
        predecessor: QueriesPool | None = kw.pop("_predecessor", None)
        self._max_size = parameters.stated_max_size(max_size, pool_size, max_overflow)
        self._idle_ttl = parameters.seconds("idle_ttl", idle_ttl)
        self._timeout = parameters.seconds("timeout", timeout)
        self._pool_id = parameters.pool_id("pool_id", pool_id)
        self._use_lifo = parameters.flag("use_lifo", use_lifo)
        self._gc_on_wait = parameters.flag("gc_on_wait", gc_on_wait)
        self._ping_after = parameters.seconds("ping_after", ping_after)
        self._ping_timeout = parameters.seconds("ping_timeout", ping_timeout)
        self._close_timeout = parameters.finite_seconds("close_timeout", close_timeout)
        self._min_size = parameters.min_size("min_size", min_size)
        self._track_stacks = parameters.flag("track_stacks", track_stacks)
        self._leak_after = parameters.seconds("leak_after", leak_after)
        self._deadlock_grace = parameters.finite_seconds("deadlock_grace", deadlock_grace)
        self._on_deadlock = parameters.one_of("on_deadlock", on_deadlock, DEADLOCKS)
        self._read_only_is_disconnect = parameters.flag("read_only_is_disconnect", read_only_is_disconnect)
        self._max_waiting = parameters.max_waiting("max_waiting", max_waiting)
        self._queue_target = parameters.queue_target("queue_target", queue_target)
        self.records_out: set[Any] = set()
        """The records that are out.  Where a proxy dies in a cycle with its record, its weak reference is
        told only if something outside leads to it; not the slot, for the registry must lead to no engine."""
        self._disposed = False
        """Was it disposed?  Then a following ``recreate()`` completes an ``Engine.dispose()``."""
        super().__init__(creator, **parameters.of_sqlalchemys(kw))
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
        ping_after = 0.0 if self._pre_ping else self._ping_after
        ping_after = math.inf if ping_after is None or who.in_memory else ping_after
        self._attachment: Attachment = Attachment(quota, ttl, self._use_lifo, ping_after, self._min_size)
        self._attachment.opener = weakref.WeakMethod(self._open)
        if self._read_only_is_disconnect:
            listen_for_read_only(self._dialect)
        if self._pre_ping and _ping_is_over not in self.dispatch.checkout:  # a successor has it already
            event.listen(self, "checkout", _ping_is_over, insert=True)
        self._attachment.max_waiting = math.inf if self._max_waiting is None else self._max_waiting
        self._attachment.queue_target = math.inf if self._queue_target is None else self._queue_target
        self._attachment.leak_after = math.inf if self._leak_after is None else self._leak_after
        if self._track_stacks:  # an attribute of its own, so that nobody else pays
            self._do_get = self._do_get_tracked  # type: ignore[method-assign]
        self._shared: Pool = PoolManager.attach(who.pid, who.label, self._attachment)
        self._shared.on_leak = log_leak
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

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out.

        What SQLAlchemy's does, without its ``_checkout()``, ``checkout()`` and ``get_connection()``: what the
        last one looks for makes a slot suspect, so :meth:`_do_get` has seen to it.

        :raises CheckoutTimeout: there was none within ``timeout``.
        :raises Exception: the driver's, if one can't be opened.
        """
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
        if self._pre_ping or self.dispatch.checkout:
            proxy._counter = 0
            return Proxy._checkout(self, None, proxy)
        return proxy

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._shared.take(self._attachment)
        if record.__class__ is Record:
            slot = record.slot
            slot.label = _label()
            # Twice, for other threads run during the poll, and one may find that the server is gone.
            if not slot.suspect and not slot.poll(0) and not slot.suspect:
                return record
        return self._get(record)

    def _do_get_tracked(self) -> ConnectionPoolEntry:
        """With ``track_stacks``."""
        found = stacks.calls(sys._getframe(1))
        record = self._shared.take(self._attachment)
        if record.__class__ is Record:
            slot = record.slot
            slot.label, slot.stack = _label(), found
            if not slot.suspect and not slot.poll(0) and not slot.suspect:
                return record
        return self._get(record, found)

    def _get(self, entry: Any, found: stacks.Calls = ()) -> ConnectionPoolEntry:
        """The long way: wait for a slot, open a connection, or look whether the one at hand is alive."""
        shared = self._shared
        timeout = math.inf if self._timeout is None else self._timeout
        since, begin = shared.now(), time.monotonic()
        watch = None if self._on_deadlock == deadlock.IGNORE else functools.partial(self._watch, since)
        stages = Stages()
        again = False
        refusal: Exception | None = None
        while True:
            try:
                left = max(0.0, begin + timeout - time.monotonic())
                if again:
                    entry = shared.take(self._attachment, since) if left else None
                if entry.__class__ is ThreadWaiter:
                    stages.enter(WAITING)
                    entry = shared.wait(entry, left, self._gc_on_wait, watch, again)
                    if isinstance(entry, Rejected):
                        raise self._got_nothing(shared.now() - since, rejected(entry))
                if entry is None:
                    raise refusal or self._refusal() or self._got_nothing(timeout)
                slot = entry.slot
                slot.label, slot.stack = _label(), found
                if isinstance(entry, Permit):
                    stages.enter(OPENING)
                    return self._open(entry)
                # What was handed over was in use a moment ago, so a poll is enough; unless all is to be
                # pinged (ping_after=0), or replaced by the time of day (pool_recycle), which _examine() asks.
                enough = self._attachment.ping_after and self._recycle < 0
                if enough and not slot.suspect and not slot.poll(0) and not slot.suspect:
                    return entry  # type: ignore[no-any-return]
                return self._examine(entry, begin + timeout, stages)
            except _Refused as error:
                again, refusal = True, error.refusal or refusal
            except Exception as error:
                refusal = None  # its traceback refers to this frame
                stages.note(error, shared.label)
                raise

    def _got_nothing(self, seconds: float, found: Diagnosis | None = None) -> Exception:
        """Return the error of a checkout that waited in vain, for so long; ``found``: why no longer."""
        error = checkout_timeout(self._shared, self._attachment, seconds, found)
        level = logging.WARNING if isinstance(error, PoolDeadlock) else logging.INFO
        self.logger.log(level, "%s", error.args[0].partition("\n")[0])
        return error

    def _watch(self, since: float) -> Callable[[ThreadWaiter, float], None]:
        """Return what looks for a deadlock when a checkout waits in vain."""
        watch = deadlock.Watch(PoolManager.everywhere, self._deadlock_grace)
        told = False

        def in_vain(waiter: ThreadWaiter, now: float) -> None:
            nonlocal told
            found = None if told else watch.hopeless(waiter, now)
            if found is None:
                return
            if self._on_deadlock == deadlock.RAISE:
                raise self._got_nothing(self._shared.now() - since, found)
            told = True
            text = f"{found.cause}: {'; '.join(found.details.splitlines())}. {found.remedy}"
            self.logger.warning("%s: most likely %s", self._shared.label, text)

        return in_vain

    def _refusal(self) -> Exception | None:
        """Why the pool was refused, if it is an error of this engine's driver, as callers catch it."""
        error = self._shared.refusal()
        driver = getattr(self._dialect, "loaded_dbapi", None)
        return error if driver is None or isinstance(error, driver.Error) else None

    def _open(self, permit: Permit) -> Record:
        shared = self._shared
        try:
            shared.close_evicted(permit)
            record = Record(self, permit.slot)  # type: ignore[arg-type]
            shared.bind(record.slot, record)
            record.get_connection()
        except BaseException as error:
            refused = shared.refused(error)
            shared.failed(permit, error)
            if refused:
                raise _Refused(error) from error
            raise
        shared.opened(record.slot)
        return record

    def _examine(self, record: Record, deadline: float, stages: Stages) -> Record:
        """Return a record that can be used: whose connection is alive, or else was replaced."""
        shared = self._shared
        try:
            if record.dbapi_connection is not None:
                stages.enter(PROBING)
                why = self._staleness(record)
                alive = why is not None or self._alive(record, deadline)
                # Somebody may have found a disconnect meanwhile.
                if alive and (why := why or self._staleness(record)):
                    self.logger.info("Connection %r %s; recycling", record.dbapi_connection, why)
                    record.slot.reason = why
                    record.close()
                elif not alive:
                    shared.found_dead(record.slot)
                    record.invalidate(exc.DisconnectionError("found dead before it was used"))
            if record.dbapi_connection is None:
                if not shared.may_connect():
                    raise _Refused(None)
                stages.enter(OPENING)
                record.get_connection()
                shared.opened(record.slot)
        except BaseException as error:
            refused = not isinstance(error, _Refused) and shared.refused(error)
            record.slot.holder = None  # nobody had it: no checkout
            record.return_hollow(error)
            if refused:
                raise _Refused(error) from error
            raise
        return record

    def _staleness(self, record: Record) -> str | None:
        """Return why SQLAlchemy would replace its connection next, in its words, or None.

        There, one that can't be opened is an error at once; here it can be tried again.
        """
        if -1 < self._recycle < time.time() - record.starttime:
            return "exceeded timeout"
        if self._invalidate_time > record.starttime:
            return "invalidated due to pool invalidation"
        if record._soft_invalidate_time > record.starttime:
            return "invalidated due to local soft invalidation"
        return None

    def _alive(self, record: Record, deadline: float) -> bool:
        slot = record.slot
        if self._attachment.ping_after == 0:
            slot.suspect = True
        if slot.poll(0):
            verdict = liveness.look(slot.handle, slot.poll)
            if verdict is liveness.DEAD:
                return False
            # What another database's server has sent may mean anything.
            if verdict is liveness.DOUBT or getattr(self._dialect, "name", None) != "postgresql":
                slot.suspect = True
        if self._pre_ping:  # SQLAlchemy asks next; it knows no limit of time, but this one
            slot.suspect = False
            record.ping_timeout = self._start_ping_timeout(record, deadline)
            return True
        return not slot.suspect or self._answers(record, deadline)

    def _start_ping_timeout(self, record: Record, deadline: float) -> liveness.PingTimeout:
        """Have the connection hung up if a ping takes too long."""
        ping_timeout = liveness.PingTimeout(record.slot.handle)
        if self._ping_timeout is not None:
            left = max(deadline - time.monotonic(), LEAST_PING)
            self._shared.housekeeper.schedule(ping_timeout, min(self._ping_timeout, left))
        return ping_timeout

    def _answers(self, record: Record, deadline: float) -> bool:
        """Ask the server, for as long as a ping may take."""
        slot = record.slot
        ping_timeout = self._start_ping_timeout(record, deadline)
        try:
            # A pool without an engine has no dialect to ask with.
            answers = not hasattr(self._dialect, "do_ping") or self._dialect.do_ping(slot.handle)
        except NotImplementedError:  # so says that of SQLAlchemy's first 2.0
            answers = True
        except Exception as error:
            self.logger.info("%s: %r does not answer: %r", self._shared.label, slot, error)
            answers = self._is_answer(error, slot.handle)
        finally:
            ping_timeout.remove()
        slot.suspect = not answers or ping_timeout.expired
        return not slot.suspect

    def _is_answer(self, error: Exception, handle: Any) -> bool:
        """Does the error not say that the connection is lost?  One in a transaction can't be pinged."""
        dialect: Any = self._dialect
        of_driver = isinstance(error, dialect.loaded_dbapi.Error)
        return of_driver and not dialect.is_disconnect(error, handle, None)

    def _should_wrap_creator(self, creator: Any) -> Callable[[ConnectionPoolEntry], Any]:
        create = super()._should_wrap_creator(creator)

        def connect(record: ConnectionPoolEntry) -> Any:
            # Read before connecting: what a dispose overtakes is of the old generation.
            generation = self._attachment.generation
            self._shared.wait_for_room(self._close_timeout)
            begin = time.monotonic()
            try:
                dbapi_connection = create(record)
            except Exception as error:
                self._shared.connect_failed(error)
                raise
            if isinstance(record, Record):
                lifetime = retirement.lifetime(self._recycle)
                took = time.monotonic() - begin
                self._shared.socket_opened(record.slot, dbapi_connection, generation, lifetime, took)
                if self._invalidate_time > record.starttime:
                    # While it was opened, another was found dead.  SQLAlchemy would replace this one, too, at
                    # once; here it is looked at, next time.
                    record.starttime = time.time()
                    record.slot.suspect = True
                self.logger.info("%s: opened %r in %.3f s", self._shared.label, record.slot, took)
            return dbapi_connection

        return connect

    # -- what happens to what is out; Record.checkin is the way home --------------------------------

    def _invalidate(
        self, connection: Any, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        # SQLAlchemy replaces all that are older, each at its next checkout, and what can't be opened there is
        # an error at once; here it is tried again.  So before, and for those looked at meanwhile, after.
        self._shared.suspect_own(self._attachment)
        super()._invalidate(connection, exception, _checkin)
        self._shared.suspect_own(self._attachment)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # SQLAlchemy's checkin() would come by here, Record's does not: this is a proxy that detaches.
        self._shared.let_go(record.slot)  # type: ignore[attr-defined]

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        try:
            with self._shared.lingering.closing(connection, self._close_timeout):
                super()._close_connection(connection, terminate=terminate)
        finally:
            self._shared.socket_closed(connection)

    # -- what it says of itself -------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return what the whole pool has now, and has done; takes no lock."""
        return self._shared.statistics()

    def snapshot(self) -> Snapshot:
        """Return who has the connections of the whole pool, and who waits; takes no lock."""
        return snapshot(self._shared)

    # -- the life of the pool ----------------------------------------------------------------------

    def dispose(self) -> None:
        """Close this engine's idle connections; the pool stays usable."""
        self._disposed = True
        self._shared.dispose(self._attachment)
        self.logger.info("Pool disposed. %s", self.status())

    def warm_up(self) -> None:
        """Open connections now, until there are ``min_size``, or as many as the limit leaves room for.

        :raises Exception: the driver's, if one can't be opened.
        """
        permits: list[Permit] = []
        try:
            # All at once: the housekeeper might begin to open some of them, too.
            while (permit := self._shared.reserve(self._attachment)) is not None:
                permits.append(permit)
            while permits:
                self._shared.give_unused(self._attachment, self._open(permits.pop()))
        except _Refused as error:
            raise error.refusal or error from None
        finally:
            for permit in permits:
                self._shared.failed(permit, None)

    def expire(self, rolling: bool = False) -> None:
        """Replace this engine's connections without an error to anybody, as when credentials were rotated.

        :param rolling: renew them one after the other in the background; else what is idle is closed at once.
            What is out is replaced when it comes home, either way.
        """
        if rolling:
            self._shared.expire_rolling(self._attachment)
        else:
            self._shared.dispose(self._attachment)
            self._shared.retire(self._attachment)

    def audit(self) -> Audit:
        """Compare the bookkeeping of the whole pool with the facts: see :meth:`.Pool.audit`."""
        return self._shared.audit()

    def recreate(self) -> QueriesPool:
        """Return a pool with the same parameters, listeners, limit and id.

        After :meth:`dispose`, as ``Engine.dispose()`` calls it, what this pool's connections were
        out then close when they come home.
        """
        self.logger.info("Pool recreating")
        if self._disposed:
            self._attachment.min_size = 0  # its successor keeps connections in readiness
            self._shared.retire(self._attachment)
        return self.__class__(
            self._creator,
            max_size=self._max_size,
            idle_ttl=self._idle_ttl,
            timeout=self._timeout,
            pool_id=self._pool_id,
            use_lifo=self._use_lifo,
            gc_on_wait=self._gc_on_wait,
            ping_after=self._ping_after,
            ping_timeout=self._ping_timeout,
            close_timeout=self._close_timeout,
            min_size=self._min_size,
            track_stacks=self._track_stacks,
            leak_after=self._leak_after,
            deadlock_grace=self._deadlock_grace,
            on_deadlock=self._on_deadlock,
            read_only_is_disconnect=self._read_only_is_disconnect,
            max_waiting=self._max_waiting,
            queue_target=self._queue_target,
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
        return sum(state in (HELD, LOCKED, slots.OPENING) for state in states)

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


if not seams.KNOWS_PROXY:
    del QueriesPool.connect  # SQLAlchemy's own, then, which asks _do_get()


def _ping_is_over(_: Any, record: Any, __: Any) -> None:
    """A listener of ``checkout``, the first: what SQLAlchemy does next after its ping."""
    if record.ping_timeout is not None:
        record.ping_timeout.remove()
        record.ping_timeout = None


def listen_for_read_only(dialect: Any) -> None:
    """Have a dialect take "read only" for a disconnect, which SQLAlchemy answers by replacing everything."""
    if not event.contains(dialect, "handle_error", _read_only_is_disconnect):
        event.listen(dialect, "handle_error", _read_only_is_disconnect)


def _read_only_is_disconnect(context: Any) -> None:
    error = context.original_exception
    if (getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)) == "25006":
        context.is_disconnect = True
