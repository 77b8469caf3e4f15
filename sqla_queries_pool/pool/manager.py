"""All pools of the process."""

from __future__ import annotations

import datetime
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

from ..budget.audit import Audit
from ..budget.slots import DRAINED, SUSPENDED, Attachment
from ..budget.stats import ManagerStatistics
from ..concurrency.threads import THREADS
from ..errors import ConnectionBusyError, ParameterError, PoolFullError
from ..parameters import UNSTATED
from ..runtime.connections import close_quietly
from . import stopping
from .connection import Connection
from .pool import DEFAULT_IDLE_TTL, DEFAULT_MAX_SIZE, Pool, every_pool
from .stopping import Stopped


class PoolManager:
    """All pools of the process, by pool id.

    The id stands for a database and the user of it; neither the manager nor its pools know a URL or
    a password.
    """

    _instance: ClassVar[PoolManager | None] = None
    _lock: ClassVar[threading.RLock] = threading.RLock()
    """Guards which pools there are; taken when pools come and go, never for a checkout.  It is taken
    before a pool's own lock, never after."""
    _pools: ClassVar[dict[str, Pool]] = {}
    _gone: ClassVar[ManagerStatistics] = ManagerStatistics()
    """What the pools have done that were forgotten; written under :attr:`_lock`."""

    @classmethod
    def instance(cls) -> PoolManager:
        """Return the one instance."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def __contains__(self, pid: object) -> bool:
        pool = self._pools.get(pid)  # type: ignore[call-overload]
        return pool is not None and pool._listed

    @classmethod
    def create(
        cls,
        pid: str,
        idle_ttl: float | None = DEFAULT_IDLE_TTL,
        max_size: int | None = DEFAULT_MAX_SIZE,
        time_method: Callable[[], float] | None = None,
    ) -> None:
        """Make a pool; what is set here overrules what engines state.

        :param idle_ttl: seconds after which an idle connection is closed; None for never.
        :param max_size: the largest number of connections; None for no limit.
        :param time_method: a monotonic clock in seconds, in place of the pool's own.
        :raises KeyError: there is a pool of this id.
        :raises ParameterError: a number has no meaning.
        """
        new = Pool(pid, idle_ttl, max_size, time_method)
        with cls._lock:
            old = cls._pools.get(pid)
            if old is not None and old._listed:
                raise KeyError(f"Pool {pid} already exists")
            if old is None:
                cls._register(new)
            else:  # it was removed, but engines use it
                old._listed = True
        if old is None:
            new.core.upkeep.sweep()
        else:
            old.set_idle_ttl(idle_ttl)
            old.set_max_size(max_size)

    @classmethod
    def add(cls, pid: str, connection: Any) -> None:
        """:meth:`Pool.add`.

        :raises KeyError: there is no such pool.
        """
        try:
            with cls._lock:  # so that the pool can't be forgotten meanwhile
                cls._listed(pid)._adopt(Connection(connection))
        except PoolFullError:
            close_quietly(connection, pid)
            raise

    @classmethod
    def audit(cls, pid: str) -> Audit:
        """:meth:`Pool.audit`.

        :raises KeyError: there is no such pool.
        """
        return cls._listed(pid).audit()

    @classmethod
    def clean(cls, pid: str) -> None:
        """:meth:`Pool.clean`, then forget the pool if it has neither connections nor engines.

        Returns quietly where there is no such pool.
        """
        pool = cls._pools.get(pid)
        if pool is not None and pool._listed:
            pool.clean()
            cls._forget_if_vacant(pool, at_once=True)

    @classmethod
    def drain(cls, timeout: float | None) -> list[Stopped]:
        """:meth:`Pool.drain` of all pools at once.  Engines that are made later are not drained.

        :param timeout: seconds to wait, at most, for all together; None for as long as it takes.
        """
        return cls._stop(DRAINED, timeout)

    @classmethod
    def suspend(cls, timeout: float | None = 0.0) -> list[Stopped]:
        """:meth:`Pool.suspend` of all pools at once.  Engines that are made later are not suspended.

        :param timeout: seconds to wait, at most, for all together; None for as long as it takes.
        """
        return cls._stop(SUSPENDED, timeout)

    @classmethod
    def resume(cls) -> None:
        """:meth:`Pool.resume` of all pools."""
        for pool in list(cls._pools.values()):
            pool.resume()

    @classmethod
    def _stop(cls, how: str, timeout: float | None) -> list[Stopped]:
        deadline = time.monotonic() + stopping.seconds_of(timeout)
        pools = list(cls._pools.values())
        for pool in pools:  # first, lest one hands out while another is waited for
            stopping.stop(pool.core, None, how, 0.0, THREADS.pause)
        found = []
        for pool in pools:
            left = max(0.0, deadline - time.monotonic())
            found.append(stopping.stop(pool.core, None, how, left, THREADS.pause))
        return found

    @classmethod
    def expire(cls, pid: str, rolling: bool = False) -> None:
        """:meth:`Pool.expire`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).expire(rolling)

    @classmethod
    def free(cls, pid: str, connection: Any) -> None:
        """:meth:`Pool.free`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).free(connection)

    @classmethod
    def get(cls, pid: str, session: object) -> Any:
        """:meth:`Pool.get`.

        :raises KeyError: there is no such pool.
        """
        return cls._listed(pid).get(session)

    @classmethod
    def get_connection(cls, pid: str, connection: Any) -> Connection:
        """:meth:`Pool.connection_handle`.

        :raises KeyError: there is no such pool, or no such connection in it.
        """
        return cls._listed(pid).connection_handle(connection)

    @classmethod
    def has_connection(cls, pid: str, connection: Any) -> bool:
        """Has the pool this DBAPI connection?

        :raises KeyError: there is no such pool.
        """
        return connection in cls._listed(pid)

    @classmethod
    def has_idle_connection(cls, pid: str) -> bool:
        """Has the pool a connection that nobody has?

        :raises KeyError: there is no such pool.
        """
        return bool(cls._listed(pid).idle_connections)

    @classmethod
    def is_full(cls, pid: str) -> bool:
        """:attr:`Pool.is_full`.

        :raises KeyError: there is no such pool.
        """
        return cls._listed(pid).is_full

    @classmethod
    def lock(cls, pid: str, connection: Any, session: object) -> None:
        """:meth:`Pool.lock`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).lock(connection, session)

    @classmethod
    def remove(cls, pid: str) -> None:
        """:meth:`Pool.close`, then forget the pool and what was set for it.

        Engines that use it work again at their next checkout.

        :raises ConnectionBusyError: a connection is busy; then nothing was done.
        :raises KeyError: there is no such pool.
        """
        pool = cls._listed(pid)
        pool.close()
        with cls._lock:
            pool._listed = False
            if not pool.core.ledger.attachments:
                cls._forget(pool)
        pool._unset()

    @classmethod
    def remove_connection(cls, pid: str, connection: Any) -> None:
        """:meth:`Pool.remove`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).remove(connection)

    @classmethod
    def set_idle_ttl(cls, pid: str, ttl: float | None) -> None:
        """:meth:`Pool.set_idle_ttl`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).set_idle_ttl(ttl)

    @classmethod
    def set_max_size(cls, pid: str, size: int | None) -> None:
        """:meth:`Pool.set_max_size`.

        :raises KeyError: there is no such pool.
        """
        cls._listed(pid).set_max_size(size)

    @classmethod
    def shutdown(cls) -> None:
        """:meth:`Pool.shutdown` of all pools.

        :raises ConnectionBusyError: a connection executes; all others were closed.
        """
        busy: ConnectionBusyError | None = None
        for pool in list(cls._pools.values()):
            try:
                pool.shutdown()
            except ConnectionBusyError as error:
                busy = busy or error
        if busy is not None:
            raise busy

    @classmethod
    def size(cls, pid: str) -> int:
        """Return how many connections the pool has.

        :raises KeyError: there is no such pool.
        """
        return len(cls._listed(pid))

    @classmethod
    def pools(cls) -> list[Pool]:
        """Return all pools."""
        return [pool for pool in list(cls._pools.values()) if pool._listed]

    @classmethod
    def statistics(cls) -> ManagerStatistics:
        """Return what all pools have now and have done, those that are gone included."""
        with cls._lock:  # that of the pools that come and go: one that goes is counted once
            return ManagerStatistics.of([pool.statistics() for pool in cls._pools.values()], cls._gone)

    @classmethod
    def report(cls) -> dict[str, Any]:
        """Return the state of all pools."""
        return {
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "process": os.getpid(),
            "pools": {pool.id: pool.report() for pool in cls.pools()},
        }

    @classmethod
    def _register(cls, pool: Pool) -> None:
        pool._on_vacant = cls._forget_if_vacant
        cls._pools[pool.id] = pool

    @classmethod
    def _listed(cls, pid: str) -> Pool:
        pool = cls._pools.get(pid)
        if pool is None or not pool._listed:
            raise KeyError(f"Pool {pid} has not been created")
        return pool

    @classmethod
    def _forget_if_vacant(cls, pool: Pool, at_once: bool = False) -> None:
        """Forget a pool that nobody uses any more: it has had no slots and no engines for a while."""
        with cls._lock:  # an engine attaches under this lock: it can't come in between
            ledger = pool.core.ledger
            vacant = ledger.vacant_since is not None if at_once else ledger.vacant(pool.core.now())
            if vacant:
                cls._forget(pool)

    @classmethod
    def _forget(cls, pool: Pool) -> None:
        known = cls._pools.get(pool.id)
        if known is not None and known is pool:
            cls._gone = ManagerStatistics.of([known.statistics()], cls._gone, show=False)
            del cls._pools[pool.id]


def attach(pid: str, label: str, attachment: Attachment, share: str | None = None) -> Pool:
    """An engine begins to use the pool of this id, which is made if there is none.

    :param label: which database it is, for people.
    :param share: with which processes the engine shares its limit, None for none.
    :raises ParameterError: other engines of this pool state another ``share``, or other classes; these can't
        be had.
    """
    try:
        return _attach(pid, label, attachment, share)
    except ParameterError:
        pass  # not here: the traceback refers to the other engine
    gc.collect()  # that may have been dropped, for an engine is a cycle
    return _attach(pid, label, attachment, share)


def _attach(pid: str, label: str, attachment: Attachment, share: str | None) -> Pool:
    with PoolManager._lock:
        pool = PoolManager._pools.get(pid) or Pool(pid, UNSTATED, UNSTATED)
        pool.core.agree(attachment)
        pool.core.join(share, attachment.quota.stated)
        if pid not in PoolManager._pools:
            PoolManager._register(pool)
        if pool.label == pid:
            pool.core.section.label = label
        pool._listed = True
        work = pool.core.attach(attachment)
    pool.core.effects.do(work)
    return pool


def everywhere() -> list[Pool]:
    """Return all pools of the process, also those that the manager does not know."""
    while True:
        try:
            return list(every_pool)
        except RuntimeError:  # one came or went meanwhile
            continue
