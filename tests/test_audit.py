"""The audit: the ledger is broken in every way that it looks for, and put right; and never without need."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from conftest import Observer
from fakes import FakeConnection, FakeDriver
from hazards import DEADLINE, Ring, Stop, Thread, assert_whole, eventually, new_pid, new_pool, pool_of
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.pool import PoolProxiedConnection

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesException, QueriesPool
from sqla_queries_pool.budget import closing
from sqla_queries_pool.budget.audit import COLLECTED, PROXY_GONE, UNDER_WAY, Audit, Finding, check
from sqla_queries_pool.budget.audit import mend as audit_mend
from sqla_queries_pool.budget.slots import CLOSING, GONE, HELD, LOCKED, OPENING, Permit
from sqla_queries_pool.concurrency.threads import ThreadWaiter
from sqla_queries_pool.pool import Pool
from sqla_queries_pool.runtime import checkout

Eventually = Callable[..., None]
PASSWORD = "Conspicuous/Pa55word"


class Session:
    """Who locks connections through the queries API."""


class Scene:
    """Two engines of one database, two connections for both; what a test keeps alive meanwhile."""

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.pid = new_pid()
        self.pool = self.engine()
        self.other = self.engine()
        self.shared: Pool = inside.shared(self.pool)
        self.ledger = inside.ledger(self.shared)
        self.kept: list[Any] = []

    def engine(self, **kw: Any) -> QueriesPool:
        return new_pool(self.pid, self.driver.connect, **kw)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """No callback hears of the death of what is bound in here, as if it had been interrupted."""
        hear = inside.deafen(self.ledger)
        try:
            yield
        finally:
            hear()

    def idle(self) -> Any:
        """The record of an idle connection."""
        self.pool.connect().close()
        return inside.attachment(self.pool).idle[-1]

    def taken_away(self) -> Any:
        """The record of an idle connection that was taken out of the list behind the ledger's back."""
        self.idle()
        self.kept.append(inside.attachment(self.pool).idle.pop())
        return self.kept[-1]

    def out(self) -> Any:
        """The record of a connection that is out."""
        fairy: Any = self.pool.connect()
        self.kept.append(fairy)
        return inside.record(fairy)

    def added(self) -> tuple[Any, Session]:
        """A slot that was added by hand, and the session that has locked it."""
        handle, session = self.driver.connect(), Session()
        PoolManager.add(self.pid, handle)
        PoolManager.lock(self.pid, handle, session)
        self.kept.append(session)
        return inside.by_handle(self.shared)[id(handle)], session

    def assert_right(self, eventually: Eventually) -> None:
        """The ledger agrees with itself, the whole budget can be had, and the sockets are those counted."""
        for pool in (self.pool, self.other):
            assert_whole(pool, eventually)
        shared = self.shared
        eventually(
            lambda: len(self.driver.live) == shared.numbers.open == len(inside.by_handle(shared)), "sockets"
        )
        assert self.driver.peak <= 2 + len([one for one in self.kept if one is STRAY])
        inside.decide(shared, check, self.ledger)


def mend(shared: Pool) -> None:
    """What looks wrong a moment later, too, is mended: it may have been under way at the first look."""
    eventually(lambda: not inside.upkeep(shared).mend(), "nothing looks wrong for the first time")


STRAY = object()
"""Kept where a socket was left open that counted nowhere."""


# -- what an exception from outside may do, one by one ----------------------------------------------


def a_record_that_died_unheard(scene: Scene) -> str:
    """A checkout was lost together with the callback of the record."""
    with scene.deaf():
        slot = inside.do_get(scene.pool).slot
    assert slot.state == HELD
    return "held, but its holder no longer exists"


def a_permit_that_died_unheard(scene: Scene) -> str:
    """The same before the connection was opened."""
    with scene.deaf():
        slot = inside.checkouts(scene.shared).take(inside.attachment(scene.pool)).slot
    assert slot.state == OPENING
    return "opening, but its holder no longer exists"


def a_permit_without_an_entry(scene: Scene) -> str:
    """Interrupted before it was said what stands for the slot."""
    permit = inside.checkouts(scene.shared).take(inside.attachment(scene.pool))
    permit.slot.entry = None
    return "opening, but its holder no longer exists"


def an_idle_connection_in_no_list(scene: Scene) -> str:
    """Interrupted on the way from one list to the other; the record lives."""
    scene.taken_away()
    return "idle, but not in the list of idle connections"


def an_idle_connection_whose_record_died(scene: Scene) -> str:
    """The same, and the record has died unheard."""
    with scene.deaf():
        scene.idle()
    inside.attachment(scene.pool).idle.clear()
    return "idle, but not in the list of idle connections"


def a_hollow_entry_in_no_list(scene: Scene) -> str:
    """The same without a connection."""
    fairy = scene.pool.connect()
    fairy.invalidate()
    scene.kept.append(inside.attachment(scene.pool).hollow.pop())
    return "idle, but not in the list of idle connections"


def a_stale_lock_in_no_list(scene: Scene) -> str:
    """A connection that was added by hand and locked by a session that is dead, and the list has lost it."""
    slot, session = scene.added()
    scene.kept.remove(session)
    del scene.ledger.by_hand.locked[slot]
    return "locked, but not in the list of locked connections"


def an_engines_stale_lock_in_no_list(scene: Scene) -> str:
    """An engine's connection that a session has locked that is dead."""
    record = scene.idle()
    PoolManager.lock(scene.pid, record.dbapi_connection, Session())
    scene.kept.append(record)
    inside.attachment(scene.pool).locked.clear()
    return "locked, but not in the list of locked connections"


def a_close_that_was_dropped(scene: Scene) -> str:
    """The work of closing has got lost; the record lives."""
    scene.kept.append(scene.idle())
    inside.decide(scene.shared, scene.ledger.close_idle, inside.attachment(scene.pool), "test")
    return "due to be closed, but nobody closes it"


def a_close_of_what_was_added_by_hand_that_was_dropped(scene: Scene) -> str:
    """The same where there is no record."""
    handle = scene.driver.connect()
    PoolManager.add(scene.pid, handle)
    inside.decide(scene.shared, closing.close_one, scene.ledger, inside.by_handle(scene.shared)[id(handle)])
    return "due to be closed, but nobody closes it"


def a_close_that_nobody_knows(scene: Scene) -> str:
    """Interrupted before the work was noted."""
    scene.taken_away().slot.state = CLOSING
    return "due to be closed, but nobody closes it"


def a_slot_that_is_gone_and_counts(scene: Scene) -> str:
    """Interrupted while it was removed."""
    scene.taken_away().slot.state = GONE
    return "removed, but still counted"


LOSSES = [
    a_record_that_died_unheard,
    a_permit_that_died_unheard,
    a_permit_without_an_entry,
    an_idle_connection_in_no_list,
    an_idle_connection_whose_record_died,
    a_hollow_entry_in_no_list,
    a_stale_lock_in_no_list,
    an_engines_stale_lock_in_no_list,
    a_close_that_was_dropped,
    a_close_of_what_was_added_by_hand_that_was_dropped,
    a_close_that_nobody_knows,
    a_slot_that_is_gone_and_counts,
]
"""What costs a slot."""


def an_opening_too_many(scene: Scene) -> str:
    """Of an idle connection it stands that it is being opened."""
    scene.ledger.opening.add(scene.idle().slot)
    return "the connections being opened were miscounted"


def an_opening_too_few(scene: Scene) -> str:
    """Of one that is being opened it does not."""
    permit = inside.checkouts(scene.shared).take(inside.attachment(scene.pool))
    scene.kept.append(permit)
    scene.ledger.opening.clear()
    return "the connections being opened were miscounted"


def a_closing_too_many(scene: Scene) -> str:
    """Of an idle connection it stands that it is being closed."""
    scene.ledger.closing[scene.idle().slot] = weakref.ref(Session())
    return "the connections being closed were miscounted"


def a_closing_of_what_is_gone(scene: Scene) -> str:
    """Interrupted in the middle of being removed."""
    slot = scene.taken_away().slot
    scene.kept.append(inside.decide(scene.shared, scene.ledger.close, scene.kept[-1], "test"))
    inside.connections(scene.shared).drop(slot)
    slot.state = GONE
    scene.ledger.slots.discard(slot)
    return "the connections being closed were miscounted"


def an_idle_list_with_what_is_out(scene: Scene) -> str:
    """The next checkout would get what somebody has."""
    inside.attachment(scene.pool).idle.append(scene.out())
    return "a list of idle connections contained others"


def an_idle_list_with_what_is_gone(scene: Scene) -> str:
    """The next checkout would get what counts nowhere."""
    record = scene.idle()
    inside.connections(scene.shared).drop(record.slot)
    inside.step(scene.ledger, "remove")(record.slot)
    return "a list of idle connections contained others"


def a_hollow_list_with_what_is_out(scene: Scene) -> str:
    """The same without a connection."""
    inside.attachment(scene.pool).hollow.append(scene.out())
    return "a list of idle connections contained others"


def a_lock_of_what_is_idle(scene: Scene) -> str:
    """Interrupted while it was locked: it is in both lists."""
    record = scene.idle()
    inside.attachment(scene.pool).locked[record.slot] = record
    return "a list of locked connections contained others"


def an_answered_one_in_a_queue(scene: Scene) -> str:
    """A waiter that has its answer, and has left the queue only in part."""
    waiter = ThreadWaiter(inside.attachment(scene.pool), threading.get_ident())
    waiter.answer = scene.idle()
    inside.attachment(scene.pool).queue[waiter] = None
    scene.ledger.queues[inside.attachment(scene.pool)] = None
    return "a checkout that had its answer was still in the queue"


def a_quota_with_what_is_gone(scene: Scene) -> str:
    """An engine counts a slot that is gone."""
    inside.attachment(scene.pool).quota.slots.add(inside.new_slot(scene.shared))
    return "an engine's connections were miscounted"


def a_quota_without_what_is_its(scene: Scene) -> str:
    """An engine does not count a slot that it has."""
    inside.attachment(scene.pool).quota.slots.discard(scene.idle().slot)
    return "an engine's connections were miscounted"


def a_socket_that_counts_nowhere(scene: Scene) -> str:
    """Interrupted between striking off and closing."""
    inside.step(scene.ledger, "remove")(scene.taken_away().slot)
    scene.kept.append(STRAY)
    return "open, but not counted"


OTHERS = [
    an_opening_too_many,
    an_opening_too_few,
    a_closing_too_many,
    a_closing_of_what_is_gone,
    an_idle_list_with_what_is_out,
    an_idle_list_with_what_is_gone,
    a_hollow_list_with_what_is_out,
    a_lock_of_what_is_idle,
    an_answered_one_in_a_queue,
    a_quota_with_what_is_gone,
    a_quota_without_what_is_its,
    a_socket_that_counts_nowhere,
]
"""What the ledger may have wrong besides."""
Break = Callable[[Scene], str]


@pytest.mark.parametrize("broken", LOSSES + OTHERS)
def test_an_audit_names_what_is_wrong_and_puts_it_right(broken: Break, eventually: Eventually) -> None:
    """All of it: the ledger agrees with itself, the whole budget can be had, lost sockets are closed."""
    scene = Scene()
    what = broken(scene)
    audit = scene.shared.audit()
    assert any(what in said for said in audit.mended), audit
    assert scene.shared.audit().mended == ()
    for thing in scene.kept:
        if isinstance(thing, Permit):
            inside.checkouts(scene.shared).failed(thing)
        elif isinstance(thing, PoolProxiedConnection):
            thing.close()
    scene.assert_right(eventually)
    assert scene.shared.audit().mended == ()


def test_what_gave_way_to_a_checkout_that_died_unheard_is_closed_with_it(eventually: Eventually) -> None:
    """The right to open was lost, and with it the connection that was to be closed for it."""
    scene = Scene()
    with scene.deaf():
        both = [scene.pool.connect(), scene.pool.connect()]
        for fairy in both:
            fairy.close()
        del both, fairy
        permit = inside.checkouts(scene.shared).take(inside.attachment(scene.other))
        assert permit.evicts is not None
        del permit
    audit = scene.shared.audit()
    assert any("opening, but its holder no longer exists" in said for said in audit.mended)
    eventually(lambda: len(scene.driver.live) == 1, "the socket of what gave way is closed")
    assert scene.shared.audit().mended == ()
    scene.assert_right(eventually)


@pytest.mark.parametrize("of", ["an engine", "by hand"])
def test_what_a_living_session_has_locked_stays_its_own(of: str, eventually: Eventually) -> None:
    """Although no list has it: it is not closed, and can be freed."""
    scene = Scene()
    if of == "by hand":
        slot, session = scene.added()
        scene.ledger.by_hand.locked.clear()
    else:
        record, session = scene.idle(), Session()
        slot = record.slot
        PoolManager.lock(scene.pid, record.dbapi_connection, session)
        scene.kept.append(inside.attachment(scene.pool).locked.popitem())
    handle: Any = slot.handle
    assert any(
        "locked, but not in the list of locked connections" in said for said in scene.shared.audit().mended
    )
    assert not handle.closed
    assert slot.state == LOCKED
    assert slot.session is not None
    assert slot.session() is session
    assert scene.shared.audit().mended == ()
    PoolManager.free(scene.pid, handle)
    assert not handle.closed
    PoolManager.remove_connection(scene.pid, handle)
    scene.assert_right(eventually)


@pytest.mark.parametrize("broken", LOSSES)
def test_a_waiting_checkout_gets_what_was_lost_without_an_audit(
    broken: Break, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """It is looked for after a moment, by a waiter; what was found is told by the next audit."""
    monkeypatch.setattr(checkout, "GC_AFTER", 0.11)
    scene = Scene()
    what = broken(scene)
    held = scene.other.connect()
    Thread(lambda: scene.pool.connect().close()).join()
    assert any(what in said for said in scene.shared.audit().mended)
    held.close()
    scene.assert_right(eventually)


@pytest.mark.parametrize("broken", LOSSES)
def test_a_checkout_that_does_not_wait_gets_what_was_lost_at_once(
    broken: Break, eventually: Eventually
) -> None:
    """It is looked for before anybody gives up."""
    scene = Scene()
    broken(scene)
    inside.set_timeout(scene.other, 0)
    held = [scene.other.connect(), scene.other.connect()]
    with pytest.raises(CheckoutTimeout):
        scene.other.connect()
    for fairy in held:
        fairy.close()
    scene.assert_right(eventually)


@pytest.mark.parametrize("broken", LOSSES)
def test_the_housekeeper_puts_it_right_when_nobody_waits(broken: Break, eventually: Eventually) -> None:
    """When an idle connection has had its time, it looks at everything."""
    scene = Scene()
    what = broken(scene)
    PoolManager.set_idle_ttl(scene.pid, 0.01)
    scene.other.connect().close()
    eventually(lambda: inside.mended(scene.shared), f"the housekeeper has come by: {scene.shared!r}")
    eventually(lambda: not scene.driver.live, "what was lost, and what was idle, is closed")
    assert any(what in said for said in scene.shared.audit().mended)
    PoolManager.set_idle_ttl(scene.pid, 60)
    scene.assert_right(eventually)


def test_the_housekeeper_looks_now_and_then_and_not_each_time(eventually: Eventually) -> None:
    """It looks at each connection, so not whenever one is due; by the pool's own clock."""
    scene = Scene()
    inside.set_clock(scene.shared, lambda: now[0])
    now = [1000.0]
    inside.upkeep(scene.shared).sweep()
    a_record_that_died_unheard(scene)
    inside.upkeep(scene.shared).sweep()
    assert scene.shared.numbers.held == 1
    now[0] += 5.0
    inside.upkeep(scene.shared).sweep()  # what looks wrong a moment later, too, is mended
    eventually(lambda: scene.shared.numbers.held == 0)
    assert len(inside.mended(scene.shared)) == 1


def test_a_queue_that_was_not_known_is_known_again(eventually: Eventually) -> None:
    """Else what is returned would go past the waiters: it is handed over, and never idle."""
    scene = Scene()
    held = [scene.pool.connect(), scene.pool.connect()]
    waiting = Thread(lambda: scene.pool.connect())
    eventually(lambda: inside.attachment(scene.pool).queue)
    scene.ledger.queues.clear()
    assert any("a queue with waiting checkouts was not known" in said for said in scene.shared.audit().mended)
    handle = held[0].dbapi_connection
    held.pop(0).close()
    got = waiting.join()
    assert got.dbapi_connection is handle
    got.close()
    held.pop().close()
    scene.assert_right(eventually)


def test_an_engine_that_died_unheard_has_no_say_in_the_limit_any_more(eventually: Eventually) -> None:
    """Its letter may have been lost; nothing is wrong with the ledger until then, so nothing is told."""
    scene = Scene()
    large = scene.engine(max_size=5)
    assert scene.shared.max_size == 5
    attachment = inside.attachment(large)
    quota = scene.ledger.attachments.pop(attachment.ref)
    attachment.ref = weakref.ref(attachment)
    scene.ledger.attachments[attachment.ref] = quota
    del large, attachment
    gc.collect()
    assert scene.shared.max_size == 5
    assert scene.shared.audit().mended == ()
    assert scene.shared.max_size == 2
    scene.assert_right(eventually)


def test_a_key_of_what_is_closed_is_forgotten(eventually: Eventually) -> None:
    """The id of a handle that is gone may be that of another one soon."""
    scene = Scene()
    slot = scene.idle().slot
    inside.by_handle(scene.shared)[1] = slot
    assert scene.shared.audit().mended == ()
    assert list(inside.by_handle(scene.shared)) == [id(slot.handle)]
    scene.assert_right(eventually)


def test_several_wrongs_are_named_one_by_one(eventually: Eventually) -> None:
    """Each in a sentence of its own, with the connection that it is about."""
    scene = Scene()
    a_record_that_died_unheard(scene)
    an_idle_connection_in_no_list(scene)
    audit = scene.shared.audit()
    assert audit.connections == 2
    assert len(audit.mended) == 2
    assert all(said.startswith("<Connection ") for said in audit.mended)
    scene.assert_right(eventually)


def test_what_was_mended_is_told_once_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With the pool's label, as a warning: it is a bug, or the work of an exception from outside."""
    scene = Scene()
    inside.section(scene.shared).label = "postgresql://me@host/shop"
    a_record_that_died_unheard(scene)
    mend(scene.shared)
    (record,) = [r for r in caplog.records if "mended" in r.message]
    assert record.levelname == "WARNING"
    assert record.name == "sqlalchemy.pool.QueriesPool"
    assert "postgresql://me@host/shop: mended the bookkeeping: <Connection" in record.message
    assert len(scene.shared.audit().mended) == 1
    assert scene.shared.audit().mended == ()


# -- what is right is left alone ---------------------------------------------------------------------


@pytest.mark.parametrize("audits", [1, 3])
def test_what_is_right_is_left_alone(audits: int, eventually: Eventually) -> None:
    """Connections that are out, idle, hollow, locked, being opened, closed, and waited for."""
    scene = Scene()
    PoolManager.set_max_size(scene.pid, 6)
    pool = scene.engine(max_size=6)
    out, idle, hollow = pool.connect(), pool.connect(), pool.connect()
    handle = idle.dbapi_connection
    idle.close()
    hollow.invalidate()
    scene.added()
    permit = inside.checkouts(scene.shared).take(inside.attachment(scene.other))
    closing = inside.decide(
        scene.shared, inside.step(scene.ledger, "permit"), inside.attachment(scene.other), 0, 0.0, None
    )
    work = inside.step(scene.ledger, "closing")(closing.slot, closing, "test")
    scene.ledger.opening.discard(closing.slot)
    PoolManager.set_max_size(scene.pid, 6)
    waiting = Thread(lambda: new_pool(scene.pid, scene.driver.connect, max_size=1).connect())
    eventually(lambda: scene.ledger.queues or not waiting.alive)
    before = scene.shared.numbers
    for _ in range(audits):
        assert scene.shared.audit() == Audit(before.total, 0, ())
    assert scene.shared.numbers == before
    assert handle is not None
    assert not handle.closed
    inside.post(scene.shared, scene.ledger.closed, work.slot, None)
    waiting.join()
    inside.checkouts(scene.shared).failed(permit)
    out.close()


@pytest.mark.slow
def test_what_is_under_way_is_given_time(eventually: Eventually) -> None:
    """A close that the worker has before it looks like one that got lost only to who does not wait for it."""
    scene = Scene()
    record = scene.idle()
    gate, entered = threading.Event(), threading.Event()

    def busy() -> None:
        entered.set()
        gate.wait(DEADLINE)

    inside.worker(scene.shared).submit(busy)
    assert entered.wait(DEADLINE)
    work = inside.decide(scene.shared, scene.ledger.close_idle, inside.attachment(scene.pool), "test")
    slot = work[0].slot
    del scene.ledger.closing[slot]  # it looks lost
    inside.do_soon(scene.shared, work)
    auditing = Thread(scene.shared.audit)
    eventually(lambda: inside.mail(inside.worker(scene.shared)) > 1, "the audit waits for the worker")
    gate.set()
    assert auditing.join().mended == ()
    del record, work
    scene.assert_right(eventually)


class Load:
    """Threads that do all that one can do with connections, and what they met."""

    def __init__(self, pid: str, driver: FakeDriver, seed: int, rounds: int) -> None:
        self._pid, self._driver, self._rounds = pid, driver, rounds
        self._engines = [self._engine() for _ in range(2)]
        self.pool = self._engines[0]
        self.threads = [Thread(self._work, seed + n, name=f"load {n}") for n in range(6)]

    def _engine(self) -> QueriesPool:
        return new_pool(self._pid, self._driver.connect, max_size=3, gc_on_wait=True)

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(self._rounds):
            self._step(chance)

    def _step(self, chance: random.Random) -> None:
        engine, what = chance.choice(self._engines), chance.random()
        if what < 0.05:  # lost between the pool and SQLAlchemy's checkout
            inside.do_get(engine)
            return
        fairy: Any = engine.connect()
        if what < 0.1:
            fairy.invalidate()
        elif what < 0.2:
            fairy.detach()
            fairy.close()
        elif what < 0.3:
            Ring(fairy)
        elif what < 0.4:
            pass  # the last reference goes
        else:
            handle = fairy.dbapi_connection
            fairy.close()
            if what < 0.5:
                self._lock(handle)
        if what > 0.97:
            engine.dispose()
        elif what > 0.94:
            engine.expire(rolling=chance.random() < 0.5)

    def _lock(self, handle: Any) -> None:
        """A session that dies at once: its lock is stale."""
        with contextlib.suppress(QueriesException):  # somebody else has it by now
            PoolManager.lock(self._pid, handle, Session())


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches", [None, pytest.param(1e-6, marks=pytest.mark.exhaustive)], ids=["as usual", "often"]
)
def test_under_load_nothing_is_found(switches: float | None, eventually: Eventually) -> None:
    """Audits, sweeps and waiters look at everything meanwhile; none takes what is under way for lost."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    driver, before = FakeDriver(), sys.getswitchinterval()
    sys.setswitchinterval(switches or before)
    try:
        load = Load(new_pid(), driver, seed, 150)
        shared = inside.shared(load.pool)
        audits: list[Audit] = []
        while any(thread.alive for thread in load.threads):
            audits.append(shared.audit())
            inside.mend_soon(shared)
            inside.housekeeper(shared).schedule(inside.upkeep(shared), 0.0)
        for thread in load.threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    audits.append(shared.audit())
    assert [said for audit in audits for said in audit.mended] == []
    assert len(audits) > 5
    gc.collect()
    assert_whole(load.pool, eventually)
    eventually(lambda: len(driver.live) == shared.numbers.open, "sockets")


def test_what_a_collection_has_not_come_to_yet_is_no_finding(eventually: Eventually) -> None:
    """It has cleared the weak reference to a record, and another callback, which comes first, takes long."""

    class Node:
        """In a cycle with others."""

    scene, gate = Scene(), threading.Event()
    nodes = [Node() for _ in range(2)]
    record: Any = inside.do_get(scene.pool)
    nodes += [Node()]
    heard: list[bool] = []
    refs = [weakref.ref(node, lambda _: heard.append(gate.wait(DEADLINE))) for node in nodes]
    nodes[0].all, nodes[0].record = nodes, record  # type: ignore[attr-defined]
    entry = record.slot.entry
    del nodes, record
    collecting = Thread(gc.collect)
    eventually(lambda: entry() is None, "the weak reference is cleared")
    upkeep = inside.upkeep(scene.shared)
    for _ in range(3):
        assert upkeep.mend()
        threading.Event().wait(2 * UNDER_WAY)
    assert scene.shared.audit().mended == ()
    assert heard == []
    gate.set()
    collecting.join()
    assert len(heard) == len(refs)
    assert scene.shared.audit().mended == ()
    scene.assert_right(eventually)


@pytest.mark.slow
def test_engines_that_come_and_go_are_no_finding(eventually: Eventually) -> None:
    """What an engine had idle goes with it, by a letter; until that is read nothing is wrong with it."""
    scene = Scene()
    stop = threading.Event()

    def audit() -> list[str]:
        said: list[str] = []
        while not stop.is_set():
            inside.upkeep(scene.shared).mend()
            said += scene.shared.audit().mended
        return said

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        auditing = Thread(audit)
        for _ in range(300):
            engine = scene.engine()
            engine.connect().close()
            del engine
        stop.set()
        assert auditing.join() == []
    finally:
        stop.set()
        sys.setswitchinterval(before)
    gc.collect()
    scene.assert_right(eventually)


@pytest.mark.parametrize("look", inside.LOOKS)
def test_an_engine_that_is_just_dying_is_no_finding(
    look: Callable[[Pool], Any], monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Its lists go before anybody was told; what a session has locked of it stays the session's."""
    stop = Stop()
    inside.before_an_engines_death_is_told(monkeypatch, stop.here)
    scene = Scene()
    engines, session = [scene.engine()], Session()
    out: list[Any] = [engines[0].connect(), engines[0].connect()]
    handle = out[0].dbapi_connection
    while out:
        out.pop().close()
    PoolManager.lock(scene.pid, handle, session)
    engines.clear()
    dying = Thread(gc.collect)
    stop.reached()
    looking = Thread(look, scene.shared)
    with contextlib.suppress(AssertionError):
        looking.join(3.0)
    closed = handle.closed
    stop.go()
    dying.join()
    looking.join()
    assert scene.shared.audit().mended == ()
    assert not closed
    assert not handle.closed
    assert inside.by_handle(scene.shared)[id(handle)].state == LOCKED
    del session
    scene.assert_right(eventually)


# -- PostgreSQL --------------------------------------------------------------------------------------


@pytest.fixture
def make(pg_url: str) -> Iterator[Callable[..., Engine]]:
    """Engines of the test's database."""
    engines: list[Engine] = []

    def create(driver: str = "psycopg2", **kw: Any) -> Engine:
        url = make_url(pg_url).set(drivername=f"postgresql+{driver}")
        engines.append(create_engine(url, poolclass=QueriesPool, **kw))
        return engines[-1]

    yield create
    for engine in engines:
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_idle_connections_that_the_server_has_ended_are_closed_and_counted(
    driver: str,
    make: Callable[..., Engine],
    pg_url: str,
    pg_observer: Observer,
    eventually: Eventually,
) -> None:
    """``dead``, of both engines and of what was added by hand; one that is out is its holder's affair."""
    datname = str(make_url(pg_url).database)
    engines = [make(driver, max_size=6) for _ in range(2)]
    out = engines[0].raw_connection()
    for engine in engines:
        for connection in [engine.raw_connection() for _ in range(2)]:
            connection.close()
    shared = inside.shared(pool_of(engines[0]))
    assert shared.audit() == Audit(5, 0, ())
    assert pg_observer.terminate(datname) == 5
    audit = pool_of(engines[1]).audit()
    assert (audit.dead, audit.mended) == (4, ())
    eventually(lambda: shared.numbers.total == 1, "the dead are closed")
    assert shared.audit() == Audit(1, 0, ())
    out.invalidate()
    with engines[1].connect() as connection:  # type: ignore[assignment]
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert PoolManager.audit(shared.id).mended == ()


def test_a_lost_connection_is_closed_on_the_server(
    make: Callable[..., Engine], pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """What nobody can give back: held, idle in no list, open and not counted."""
    datname = str(make_url(pg_url).database)
    pool = pool_of(make(max_size=3))
    shared = inside.shared(pool)
    ledger = inside.ledger(shared)
    hear = inside.deafen(ledger)
    kept: list[Any] = [inside.do_get(pool), inside.do_get(pool), inside.do_get(pool)]
    hear()
    kept.pop()  # held by nobody
    for record in kept:
        inside.checkouts(shared).give(inside.attachment(pool), record)
        inside.attachment(pool).idle.clear()
    inside.step(ledger, "remove")(kept[0].slot)
    assert pg_observer.backends(datname) == 3
    audit = shared.audit()
    assert len(audit.mended) == 3
    eventually(lambda: pg_observer.backends(datname) == 0, "the server has none of them")
    assert shared.numbers.total == 0
    assert shared.audit() == Audit(0, 0, ())
    assert_whole(pool, eventually)


def test_nothing_secret_is_in_an_audit(caplog: pytest.LogCaptureFixture) -> None:
    """Neither in what it found nor in its representation nor in the log: it knows handles, not URLs."""
    url = make_url("fake://me@host/audit").set(password=PASSWORD)
    pool = pool_of(create_engine(url, module=FakeDriver(), poolclass=QueriesPool, max_size=2))
    ledger = inside.ledger(pool)
    hear = inside.deafen(ledger)
    inside.do_get(pool)
    inside.do_get(pool)
    hear()
    mend(inside.shared(pool))
    record: Any = inside.do_get(pool)
    ledger.opening.add(record.slot)
    audit = pool.audit()
    assert len(audit.mended) == 3
    assert PASSWORD not in repr(audit)
    assert PASSWORD not in caplog.text
    assert "fake" in caplog.text


def test_what_has_come_right_since_it_was_found_is_left_alone(eventually: Eventually) -> None:
    """The collector may return an entry between the look and the mending, and somebody takes it."""
    scene = Scene()
    connection: Any = scene.pool.connect()
    slot = inside.record(connection).slot
    found = [Finding(slot, PROXY_GONE, COLLECTED)]
    wrong, work = inside.decide(scene.shared, audit_mend, scene.ledger, found, 0.0)
    assert (wrong, work) == ([], [])
    connection.close()
    scene.assert_right(eventually)


# -- where it can be asked for -----------------------------------------------------------------------


def test_the_manager_the_pool_and_the_engine_audit_the_same_pool(eventually: Eventually) -> None:
    """By id, by hand, and through ``engine.pool``."""
    for ask in (
        lambda scene: PoolManager.audit(scene.pid),
        lambda scene: PoolManager.instance().audit(scene.pid),
        lambda scene: scene.shared.audit(),
        lambda scene: scene.other.audit(),
    ):
        scene = Scene()
        a_record_that_died_unheard(scene)
        audit = ask(scene)
        assert isinstance(audit, Audit)
        assert audit.connections == 1
        assert len(audit.mended) == 1
        scene.assert_right(eventually)


def test_an_audit_of_no_pool_is_a_key_error() -> None:
    """As everything that the manager is asked; also where the pool was removed and engines live on."""
    with pytest.raises(KeyError, match="Pool nowhere has not been created"):
        PoolManager.audit("nowhere")
    scene = Scene()
    PoolManager.remove(scene.pid)
    with pytest.raises(KeyError, match=f"Pool {scene.pid} has not been created"):
        PoolManager.audit(scene.pid)


def test_an_audit_collects_what_was_abandoned() -> None:
    """A connection that is in a cycle is returned, which is no finding."""
    scene = Scene()
    gc.disable()
    try:
        Ring(scene.pool.connect())
        assert scene.shared.numbers.held == 1
        assert scene.shared.audit() == Audit(1, 0, ())
        assert scene.shared.numbers.idle == 1
    finally:
        gc.enable()


def test_a_pool_that_was_made_by_hand_is_audited_too() -> None:
    """Without an engine: what was added, and the session that has locked it."""
    pid, driver, session = new_pid(), FakeDriver(), Session()
    PoolManager.create(pid, max_size=3)
    handles = [driver.connect() for _ in range(3)]
    for handle in handles:
        PoolManager.add(pid, handle)
    PoolManager.lock(pid, handles[0], session)
    assert PoolManager.audit(pid) == Audit(3, 0, ())
    ledger = inside.ledger(inside.pools()[pid])
    ledger.by_hand.idle.clear()
    assert [said.rpartition(": ")[2] for said in PoolManager.audit(pid).mended] == [
        "idle, but not in the list of idle connections"
    ] * 2
    assert driver.live == {handles[0]}
    assert [slot.state for slot in ledger.slots] == [LOCKED]
    assert isinstance(handles[0], FakeConnection)
    PoolManager.shutdown()


@pytest.mark.slow
def test_an_audit_ends_in_time_where_the_worker_does_not(eventually: Eventually) -> None:
    """A close that never ends keeps the worker; the audit says what it sees after a moment."""
    scene = Scene()
    gate = threading.Event()
    inside.worker(scene.shared).submit(lambda: gate.wait(DEADLINE) and None)
    a_record_that_died_unheard(scene)
    audit = Thread(scene.shared.audit).join()
    assert not gate.is_set()
    assert len(audit.mended) == 1
    gate.set()
    scene.assert_right(eventually)
