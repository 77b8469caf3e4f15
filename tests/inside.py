"""The tests' only way to private state of the package.

What is private is moved and renamed here, and nowhere else in the tests: ``tests/test_architecture.py`` sees
to it.  Where a pool is asked for, an engine, a ``QueriesPool`` and a ``Pool`` will do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine

from sqla_queries_pool import Pool, PoolManager, QueriesPool, pytest_plugin
from sqla_queries_pool.budget import lifetimes
from sqla_queries_pool.budget.ledger import Ledger
from sqla_queries_pool.demo import embedded
from sqla_queries_pool.engine import attempt
from sqla_queries_pool.host.postman import postman as the_postman
from sqla_queries_pool.insight import deadlock
from sqla_queries_pool.runtime import closer, garbage, unreturned
from sqla_queries_pool.runtime import connections as connections_module
from sqla_queries_pool.runtime import upkeep as upkeep_module
from sqla_queries_pool.runtime.core import Core
from sqla_queries_pool.sockets import liveness
from sqla_queries_pool.try_lock import TryLock

PATIENT = 20.0
"""Seconds."""

# -- from one to the other -------------------------------------------------------------------------------


def shared(pool: Any) -> Pool:
    """The pool of the database that an engine uses."""
    if isinstance(pool, Engine):
        pool = pool.pool
    return pool._shared if isinstance(pool, QueriesPool) else pool


def core(pool: Any) -> Any:
    """The engine room of a pool."""
    return shared(pool).core


def checkouts(pool: Any) -> Any:
    """What engines do with its slots."""
    return core(pool).checkouts


def connections(pool: Any) -> Any:
    """Its open DBAPI connections."""
    return core(pool).connections


def upkeep(pool: Any) -> Any:
    """What mends and sweeps it."""
    return core(pool).upkeep


def section(pool: Any) -> Any:
    """Its lock and its inbox."""
    return core(pool).section


def ledger(pool: Any) -> Any:
    """Its bookkeeping."""
    return core(pool).ledger


def attachment(pool: Any) -> Any:
    """One engine's side of the ledger."""
    return pool._attachment


def attachment_here(pool: Any) -> Any:
    """The one of the running event loop."""
    return pool._sides.here


def record(connection: Any) -> Any:
    """SQLAlchemy's record of a connection that is out."""
    return connection._connection_record


def pools(manager: Any = PoolManager) -> dict[str, Any]:
    """The pools that a manager knows, by their ids; queries' own has them under the same name."""
    found: dict[str, Any] = manager._pools
    return found


def manager() -> Any:
    """The manager's one instance."""
    return PoolManager._instance


def waiters(pool: Any) -> Any:
    """The checkouts that wait for a slot."""
    return core(pool).ledger.waiters()


def slots(pool: Any) -> list[Any]:
    """All that counts against its limit."""
    return list(ledger(pool).slots)


def by_handle(pool: Any) -> dict[int, Any]:
    """Its slots by the ``id()`` of their connections."""
    return connections(pool).by_handle


def lingering(pool: Any) -> Any:
    """Its connections that were closed, and that the server may still count."""
    return connections(pool).lingering


def ends(pool: Any) -> dict[int, float]:
    """The descriptors of those, and until when each is waited for, by ``time.monotonic``."""
    ends: dict[int, float] = lingering(pool)._ends
    return ends


def last_connect_error(pool: Any) -> Any:
    """Why opening a connection failed last."""
    return core(pool).admission.last_error


def mended(pool: Any) -> Any:
    """What was put right since the last audit."""
    return upkeep(pool)._mended


def now(pool: Any) -> float:
    """The time by its clock."""
    return core(pool).now()


# -- the critical section --------------------------------------------------------------------------------


def lock(pool: Any) -> Any:
    """What guards its ledger."""
    return section(pool).lock


def replace_lock(pool: Any, new: Any, try_lock: Callable[[], bool]) -> None:
    """Give it another lock."""
    attempt = TryLock(SimpleNamespace(acquire=lambda _: try_lock(), release=new.release))
    for part in (section(pool), checkouts(pool)):
        for name in ("lock", "_lock"):
            if hasattr(part, name):
                setattr(part, name, new)
        for name in ("attempt", "_attempt"):
            if hasattr(part, name):
                setattr(part, name, attempt)


def inbox(pool: Any) -> Any:
    """What has found the lock taken."""
    return section(pool).inbox


def is_inside(pool: Any) -> bool:
    """Does an operation of its ledger run?"""
    return section(pool).inside


def decide(pool: Any, operation: Callable[..., Any], *args: Any) -> Any:
    """Run one operation of its ledger under its lock."""
    return section(pool).decide(operation, *args)


def post(pool: Any, operation: Callable[..., Any], *args: Any) -> None:
    """Leave a letter for its ledger."""
    section(pool).post(operation, *args)


def settle(pool: Any) -> None:
    """Empty its inbox."""
    section(pool).settle()


def do_soon(pool: Any, work: Any) -> None:
    """Have work done, by the worker where it takes time."""
    section(pool).effects.do_soon(work)


def count(pool: Any, what: str) -> None:
    """One more of what is counted."""
    core(pool).count(what)


# -- threads and time ------------------------------------------------------------------------------------


def set_clock(pool: Any, clock: Callable[[], float]) -> None:
    """Give it another clock."""
    core(pool)._clock = section(pool).clock = checkouts(pool)._clock = clock


def worker(pool: Any) -> Any:
    """The thread that closes its connections."""
    return core(pool).effects._worker


def catch_up_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """How long the worker may be in a listener before others' connections are shut down."""
    for module in (closer, upkeep_module):
        monkeypatch.setattr(module, "CATCH_UP", seconds)


def opener(pool: Any) -> Any:
    """The thread that opens, renews and resets."""
    return core(pool).opener


def housekeeper(pool: Any = Core) -> Any:
    """The thread that looks after pools."""
    return Core.housekeeper if pool is Core else core(pool).upkeep._housekeeper


def set_housekeeper(new: Any, pool: Any = Core) -> None:
    """Give one pool, or all that come, another."""
    if pool is Core:
        Core.housekeeper = new
        return
    upkeep(pool)._housekeeper = core(pool).housekeeper = new
    lingering(pool)._schedule = new.schedule


def patch_housekeeper(monkeypatch: pytest.MonkeyPatch, new: Any) -> None:
    """Give all pools another for a test."""
    monkeypatch.setattr(Core, "housekeeper", new)


def thread_runs(of: Any) -> bool:
    """Does the thread of a worker or a housekeeper run?"""
    running = of._thread._running
    if not running.taken_now:
        return True
    running.release()
    return False


def mail(of: Any) -> int:
    """How much a worker or a housekeeper has still to read."""
    return int(of._thread._mail.qsize())


def mend_soon(pool: Any) -> None:
    """Have the housekeeper's next visit look for what is to be mended."""
    upkeep(pool)._mend_at = 0.0


def next_collection(monkeypatch: pytest.MonkeyPatch | None, at: float) -> None:
    """When a waiter may ask the garbage collector next, by ``time.monotonic``."""
    if monkeypatch is None:
        garbage._next_collection = at
    else:
        monkeypatch.setattr(garbage, "_next_collection", at)


def hide_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have left is in no overview of all pools."""
    monkeypatch.setattr(PoolManager, "_pools", {})


def forget_the_gone(monkeypatch: pytest.MonkeyPatch, nothing: Any) -> None:
    """What pools have done that are gone is not counted."""
    monkeypatch.setattr(PoolManager, "_gone", nothing)


def replace_managers_lock(monkeypatch: pytest.MonkeyPatch, new: Any) -> None:
    """Give the manager another lock."""
    monkeypatch.setattr(PoolManager, "_lock", new)


def set_on_vacant(pool: Any, act: Callable[[Any], None]) -> None:
    """What is called when the pool has been of no use for its idle TTL."""
    shared(pool)._on_vacant = act


def unset(pool: Any) -> None:
    """Forget what was set for the pool through the queries API."""
    shared(pool)._unset()


# -- the ledger ------------------------------------------------------------------------------------------

_STEPS = {"remove": "remove", "add": "_add", "closing": "_closing", "permit": "_permit"}


def step(of: Ledger, name: str) -> Any:
    """One of the ledger's smallest steps: remove, add, close, closing or permit."""
    return getattr(of, _STEPS[name])


def method_of_step(name: str) -> str:
    """The name of the method that does one of these steps."""
    return _STEPS[name]


def deafen(of: Any) -> Callable[[], None]:
    """Let a ledger not hear of entries that die; returns what lets it hear again."""
    told, of._on_lost = of._on_lost, lambda _: None

    def again() -> None:
        of._on_lost = told

    return again


GIVEN_TO_A_LEDGER = ("_on_lost", "_new_slot")
"""What a ledger is made with."""


def another_ledger(of: Ledger) -> Ledger:
    """A new one, made with the same."""
    return Ledger(of._on_lost, of._new_slot)


def logged_leaks(of: Any) -> Any:
    """The leaks that a ledger has had logged."""
    return of.leaks._told


def new_slot(pool: Any) -> Any:
    """A slot of the kind that it makes."""
    return shared(pool)._new_connection()


def before_an_engines_death_is_told(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have something done before pools hear of an engine that died."""
    real = Core._engine_died

    def later(pool: Any, ref: Any) -> None:
        act()
        real(pool, ref)

    monkeypatch.setattr(Core, "_engine_died", later)


LOOKS: list[Callable[[Any], Any]] = [lambda pool: upkeep(pool).mend(), Pool.audit]
"""What looks for something to mend, each called with a pool."""

# -- the engine's side -----------------------------------------------------------------------------------

SETTINGS = ("recycle", "pre_ping", "reset_on_return", "creator", "dialect")


def setting(pool: Any, name: str) -> Any:
    """What was stated for an engine, by the name of the parameter."""
    if name == "pre_ping":
        return pool.pings
    return getattr(pool.settings, name) if hasattr(pool.settings, name) else getattr(pool, f"_{name}")


def settings(pool: Any) -> dict[str, Any]:
    """All that can be compared of what was stated for an engine."""
    return {"settings": pool.settings} | {name: setting(pool, name) for name in SETTINGS}


CONSTANTS = ("gc_on_wait", "close_timeout", "deadlock_grace")
"""What tests state as if they were parameters."""


@functools.cache
def pool_class(**constants: Any) -> type[QueriesPool]:
    """A ``QueriesPool`` with other constants."""
    return type("QueriesPool", (QueriesPool,), {f"_{name}": value for name, value in constants.items()})


def patient_pool_class(monkeypatch: pytest.MonkeyPatch) -> type[QueriesPool]:
    """A ``QueriesPool`` that waits for the server to let go of what was closed for as long as that takes.

    After a second it would connect all the same, and where the server is on a machine that stands still, it
    is refused then.
    """
    for module in (closer, connections_module):
        monkeypatch.setattr(module, "LONGEST", PATIENT)
    return pool_class(close_timeout=PATIENT)


def set_timeout(pool: Any, timeout: float | None) -> None:
    """Change an engine's ``timeout``."""
    pool.settings = dataclasses.replace(pool.settings, timeout=timeout)
    pool._attachment.first_look = 0.0  # it was made of the timeout before


def do_get(pool: Any) -> Any:
    """Check out, as far as the record."""
    return pool._do_get()


def invalidate_all(pool: Any, connection: Any) -> None:
    """What an engine does after a disconnect."""
    pool._invalidate(connection)


def before_a_look(monkeypatch: pytest.MonkeyPatch, pool: Any, act: Callable[[], None]) -> None:
    """Have something done before a checkout looks whether the connection that it got can be used."""
    real = attempt.Attempt._usable

    def later(self: Any, *args: Any) -> Any:
        if self._pool is pool:
            act()
        return real(self, *args)

    monkeypatch.setattr(attempt.Attempt, "_usable", later)


def before_a_take(monkeypatch: pytest.MonkeyPatch, pool: Any, act: Callable[[], object]) -> None:
    """Have something done once inside the critical section, before the next checkout takes a slot."""
    real = Ledger.take

    def later(self: Any, *args: Any) -> Any:
        if self is ledger(pool):
            monkeypatch.setattr(Ledger, "take", real)
            act()
        return real(self, *args)

    monkeypatch.setattr(Ledger, "take", later)


def renew_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have the renewal of a connection hold the others up for so long."""
    monkeypatch.setattr(lifetimes, "LONGEST_RENEWAL", seconds)


# -- others ----------------------------------------------------------------------------------------------


def patch_free_port(monkeypatch: pytest.MonkeyPatch, offers: Iterator[int]) -> None:
    """Have the embedded server try these ports first."""
    free = embedded._free_port
    monkeypatch.setattr(embedded, "_free_port", lambda: next(offers, None) or free())


def patch_ready(monkeypatch: pytest.MonkeyPatch, ready: Callable[..., bool]) -> None:
    """Decide when the embedded server is ready."""
    monkeypatch.setattr(embedded.EmbeddedPostgres, "_ready", ready)


def prepare(server: Any) -> None:
    """Make the embedded server's folder."""
    server._prepare()


def before_a_deadlock_is_told(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have something done between the last look and the error."""
    real = deadlock._told

    def later(*args: Any) -> Any:
        act()
        return real(*args)

    monkeypatch.setattr(deadlock, "_told", later)


def forget_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has looked yet for who holds a connection."""
    monkeypatch.setattr(deadlock, "_last", (-math.inf, frozenset()))


def sleep_lightly(waiter: Any, seconds: float) -> None:
    """Wait in place of a waiter's own ``wait``, but for a moment."""
    waiter._asleep.acquire(timeout=0.001 if seconds > 0.5 else seconds)


def history_thread(history: Any) -> Any:
    """The thread that takes samples."""
    return history._thread


def history_lock(history: Any) -> Any:
    """What guards the samples."""
    return history._lock


def history_process(history: Any) -> int:
    """The process that takes samples."""
    return int(history._process)


def feed(meter: Any) -> Any:
    """What feeds a meter of OpenTelemetry's."""
    from sqla_queries_pool.exporters import opentelemetry

    return opentelemetry._Feed(meter)


def without_rdhup(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a platform that has no ``POLLRDHUP``."""
    monkeypatch.setattr(liveness, "_HUNG_UP", 0)


def close_special(connection: Any) -> None:
    """What SQLAlchemy calls where it knows that the transaction is over."""
    connection._close_special(transaction_reset=True)


def observe(feed: Any, options: Any) -> Any:
    """What OpenTelemetry calls."""
    return feed._observe(options)


def is_checked(pool: Any) -> bool:
    """Has its server said how many connections it has room for?"""
    check = core(pool).limits_check
    return check is not None and check.done


def give_long_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of a busy machine may take its time to return a connection."""
    monkeypatch.setattr(pytest_plugin, "GRACE", PATIENT)


def give_no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a test, other threads have no time to return what they have."""
    monkeypatch.setattr(pytest_plugin, "GRACE", 0.0)


def watched() -> tuple[bool, int]:
    """Do all pools note where connections are checked out; and who hears of what nobody returns?"""
    return QueriesPool._track_stacks, len(unreturned.listeners)


def idling_by_hand(pool: Any) -> Callable[[], object]:
    """Keep the housekeeper from looking for what is idle in a transaction; what is returned looks."""
    idling = core(pool).idling
    idling._watches = True
    return idling._look


def watches_idling(pool: Any) -> bool:
    """Does the housekeeper look for what is idle in a transaction?"""
    return bool(core(pool).idling._watches)


def log_deadlocks_at_once(pool: Any) -> None:
    """Nothing need have stood still for a while."""
    pool._deadlock_grace = 0.0


def postman() -> Any:
    """What does the letters of all shares of this process."""
    return the_postman


def has_all_of_the_host(pool: Any) -> bool:
    """Does the process know that it has all that it may use of its share?"""
    part: Any = core(pool).share
    return bool(part._nothing_to_do and part._has_all)


def sleeps_for(pool: Any) -> float:
    """After how many seconds the thread looks after its share, if nothing happens."""
    return core(pool).share.due - time.monotonic()


def of_the_host(pool: Any) -> Any:
    """What the share of a pool sees of it, and whether the thread of the host looks after that."""
    share = core(pool).share
    return share._side.own(), postman().attends(share)
