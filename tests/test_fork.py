"""What a fork leaves to the child, and to the parent (design 13): on PostgreSQL, with two drivers."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import functools
import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import inside
import psycopg2
import pytest
from conftest import Observer
from fakes import FakeDriver
from hazards import (
    DEADLINE,
    Ring,
    Stop,
    Thread,
    assert_whole,
    eventually,
    new_pid,
    no_descriptor_left,
    pool_of,
)
from sqlalchemy import Connection, Engine, create_engine, event, exc, make_url, text

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.budget import ages, engines
from sqla_queries_pool.budget.audit import check
from sqla_queries_pool.budget.ledger import Ledger
from sqla_queries_pool.pool import Pool
from sqla_queries_pool.runtime import garbage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork"),
    # Python 3.12 on says so of every fork of a process with threads, which is what these tests are about.
    pytest.mark.filterwarnings(
        r"ignore:This process \(pid=\d+\) is multi-threaded, use of fork\(\):DeprecationWarning"
    ),
]

Eventually = Callable[..., None]
ROOT = Path(__file__).parent.parent
DRIVERS = ["psycopg2", "psycopg"]
WITHOUT_LOCKS = {"sslmode": "disable", "gssencmode": "disable"}
"""OpenSSL and Kerberos have locks that no fork makes anew, and libpq asks both before each connect.  If
another thread of the tests' process connects at the moment of a fork, which may be one that an earlier test
has left, a child waits for its lock for ever.  No pool can help there."""
CHILDREN = 4
MAX_SIZE = 4
BACKEND = text("SELECT pg_backend_pid()")
_numbers = itertools.count(1)


# -- children ---------------------------------------------------------------------------------------


LIFETIME = int(3 * DEADLINE)
"""Seconds after which a child ends that hangs.  What it waits for itself may take as long as its deadline."""


class Child:
    """A forked process that does some work and tells what comes of it.  It runs nothing of pytest's."""

    def __init__(self, work: Callable[[], Any], start: int | None = None) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(work, writer, start)
        os.close(writer)

    def _live(self, work: Callable[[], Any], writer: int, start: int | None) -> None:
        try:
            faulthandler.register(
                signal.SIGALRM, file=writer, chain=True
            )  # if it hangs it tells where, and ends
            signal.alarm(LIFETIME)
            if start is not None:
                os.read(start, 1)
            try:
                answer = {"result": work()}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)

    def result(self) -> Any:
        """What the work returned; fails if it raised something or hung."""
        with open(self._reader, "rb") as reader:
            told = reader.read()
        _, status = os.waitpid(self.pid, 0)
        assert told, f"the child died: it ended with status {status}"
        assert not os.WIFSIGNALED(status), f"the child hung:\n{told.decode()}"
        answer = json.loads(told)
        assert "error" not in answer, f"in the child: {answer['error']}"
        return answer["result"]


def in_a_child(work: Callable[[], Any]) -> Any:
    """What the work returns in a child."""
    return Child(work).result()


def in_children(work: Callable[[], Any]) -> list[Any]:
    """What the work returns in children that begin with it at once."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb", buffering=0) as start:
        children = [Child(work, reader) for _ in range(CHILDREN)]
        start.write(b"!" * CHILDREN)
        return [child.result() for child in children]


# -- what both sides do -----------------------------------------------------------------------------


def shared(engine: Engine) -> Pool:
    """The pool of an engine's database."""
    return inside.shared(pool_of(engine))


def use_all(engine: Engine) -> list[int]:
    """Have all of an engine's connections at once, and see that there is no other; their backends."""
    pool = pool_of(engine)
    with ExitStack() as stack:
        connections = [stack.enter_context(engine.connect()) for _ in range(pool.size())]
        found = [connection.scalar(BACKEND) for connection in connections]
        timeout = pool.timeout()
        inside.set_timeout(pool, 0)
        with pytest.raises(CheckoutTimeout):
            engine.connect()
        inside.set_timeout(pool, timeout)
    return found


def see_idle_connections_close(engine: Engine) -> None:
    """Nobody calls: it takes the housekeeper, who finds them due, and the worker, who closes them."""
    shared(engine).set_idle_ttl(0.05)
    engine.connect().close()
    eventually(lambda: len(shared(engine)) == 0, f"idle_ttl does nothing: {shared(engine)!r}")
    assert not inside.by_handle(shared(engine))


def live(engine: Engine) -> list[int]:
    """The life of a child: all of its connections on its own, idle ones close, other engines work."""
    found = use_all(engine)
    see_idle_connections_close(engine)
    other = create_engine(engine.url, poolclass=QueriesPool)
    assert shared(other) is shared(engine)
    with other.connect() as connection:
        found.append(connection.scalar(BACKEND))
    inside.decide(shared(engine), check, inside.ledger(shared(engine)))
    return found


class Parent:
    """This process, with an engine that holds a transaction with a row in it and has one idle connection."""

    def __init__(self, engine: Engine, observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.monkeypatch = monkeypatch
        self._observer = observer
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE parents (n int)"))
        self.connection = engine.connect()
        self.connection.execute(text("INSERT INTO parents VALUES (1)"))
        self.backend = self.connection.scalar(BACKEND)
        with engine.connect() as idle:
            self.idle = idle.scalar(BACKEND)
        self.own = {self.backend, self.idle}

    def backends(self) -> set[int]:
        """The backends of its database, as the server sees it."""
        sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s"
        return {pid for (pid,) in self._observer.query(sql, self.engine.url.database)}

    def assert_unharmed(self, eventually: Eventually) -> None:
        """The same backends as before, the transaction commits, all can be had, and the idle ones close."""
        eventually(lambda: self.backends() == self.own, f"{self.backends()} are {self.own}")
        assert self.connection.scalar(BACKEND) == self.backend
        self.connection.commit()
        assert self.connection.scalar(text("SELECT count(*) FROM parents")) == 1
        self.connection.close()
        assert_whole(pool_of(self.engine), eventually)
        see_idle_connections_close(self.engine)
        eventually(lambda: not self.backends(), "the parent's idle connections close")


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each of the drivers."""
    name: str = request.param
    return name


@pytest.fixture
def new_engine(pg_url: str, driver: str) -> Iterator[Callable[..., Engine]]:
    """Make engines of the test's database; they are disposed of."""
    url = make_url(pg_url).set(drivername=f"postgresql+{driver}").update_query_dict(WITHOUT_LOCKS)
    engines: list[Engine] = []

    def new(**kw: Any) -> Engine:
        engines.append(create_engine(url, **({"poolclass": QueriesPool, "max_size": MAX_SIZE} | kw)))
        return engines[-1]

    yield new
    for engine in engines:
        engine.dispose()


@pytest.fixture
def parent(
    new_engine: Callable[..., Engine], pg_observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Parent]:
    """See Parent."""
    parent = Parent(new_engine(), pg_observer, monkeypatch)
    yield parent
    parent.connection.close()


# -- what may be going on in the parent at that moment ------------------------------------------------


def call_once(parent: Parent, owner: Any, method: str, call: Callable[[], object]) -> None:
    """Have `call` called once before a method begins."""
    real = getattr(owner, method)
    calls = [call]

    def patched(self: Any, *args: Any, **kw: Any) -> Any:
        if calls:
            calls.pop()()
        return real(self, *args, **kw)

    parent.monkeypatch.setattr(owner, method, patched)


def use_two(engine: Engine) -> set[int]:
    """The first is the idle one; the second has to be opened."""
    with engine.connect() as first, engine.connect() as second:
        return {first.scalar(BACKEND), second.scalar(BACKEND)}


@contextmanager
def nothing_else(parent: Parent) -> Iterator[None]:
    """One connection is held, one is idle."""
    yield


@contextmanager
def inside_the_lock(
    parent: Parent, method: str, act: Callable[[Engine], set[int]] = use_two, owner: Any = Ledger
) -> Iterator[None]:
    """A thread is inside the ledger, in the middle of a change."""
    stop = Stop()
    call_once(parent, owner, method, stop.here)
    other = Thread(act, parent.engine)
    stop.reached()
    assert inside.is_inside(shared(parent.engine))
    yield
    stop.go()
    parent.own |= other.join()


@contextmanager
def beginning_a_checkout(parent: Parent) -> Iterator[None]:
    """A thread is inside the ledger and has touched nothing yet."""
    with inside_the_lock(parent, "take"):
        yield


@contextmanager
def in_the_middle_of_a_permit(parent: Parent) -> Iterator[None]:
    """A thread is inside the ledger, with a slot that is in no set yet."""
    with inside_the_lock(parent, inside.method_of_step("add")):
        yield


@contextmanager
def others_wait(parent: Parent) -> Iterator[None]:
    """All are out, and three threads wait in the queue."""
    engine = parent.engine
    held = []
    while not shared(engine).is_full or shared(engine).numbers.idle:
        held.append(engine.connect())
    parent.own |= {connection.scalar(BACKEND) for connection in held}

    def wait() -> int:
        with engine.connect() as connection:
            backend: int = connection.scalar(BACKEND)
            return backend

    waiting = [Thread(wait) for _ in range(3)]
    eventually(lambda: shared(engine).numbers.waiting == 3, "they wait")
    yield
    assert shared(engine).numbers.waiting == 3
    held[0].close()
    assert {thread.join() for thread in waiting} <= parent.own
    for connection in held:
        connection.close()


@contextmanager
def one_is_opening(parent: Parent) -> Iterator[None]:
    """A thread is inside the driver, which waits for a server that says nothing."""
    engine = parent.engine
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE)

        astray = [silent.getsockname()[1]]

        def lead_astray(dialect: Any, record: Any, args: Any, kw: dict[str, Any]) -> None:
            if astray:
                kw.update(host="127.0.0.1", port=astray.pop())

        first = engine.connect()  # the idle one, if it still is
        parent.own.add(first.scalar(BACKEND))
        event.listen(engine, "do_connect", lead_astray)
        other = Thread(connect, engine)
        peer, _ = silent.accept()
        with peer:
            yield
            assert shared(engine).numbers.opening == 1
            peer.shutdown(socket.SHUT_RDWR)
    parent.own |= other.join()
    first.close()


def connect(engine: Engine) -> set[int]:
    """The backend of a checkout; none where connecting fails."""
    try:
        with engine.connect() as connection:
            return {connection.scalar(BACKEND)}
    except exc.OperationalError:
        return set()


@contextmanager
def the_worker_closes_one(parent: Parent) -> Iterator[None]:
    """The pool's worker is in the middle of closing a connection that was idle for too long."""
    engine = create_engine(parent.engine.url, poolclass=QueriesPool, max_size=1, idle_ttl=0.01)
    assert shared(engine) is shared(parent.engine)
    stop = Stop()
    stops = [stop]

    do_close = engine.dialect.do_close

    def close(connection: Any) -> None:
        if stops:  # not in a listener: those who wait would not wait for that
            stops.pop().here()
        do_close(connection)

    engine.dialect.do_close = close  # type: ignore[method-assign, assignment]
    engine.connect().close()
    stop.reached()
    assert shared(engine).numbers.closing == 1
    yield
    assert shared(engine).numbers.closing == 1
    stop.go()
    eventually(lambda: shared(engine).numbers.closing == 0, "it is closed")


@contextmanager
def an_engine_is_being_made(parent: Parent) -> Iterator[None]:
    """A thread has the lock of the PoolManager, and a pool's."""
    stop = Stop()
    call_once(parent, engines, "attach", stop.here)
    making = Thread(lambda: create_engine(parent.engine.url, poolclass=QueriesPool))
    stop.reached()
    yield
    stop.go()
    assert shared(making.join()) is shared(parent.engine)


@contextmanager
def one_is_abandoned(parent: Parent) -> Iterator[None]:
    """A connection lies in a reference cycle, in the middle of a transaction."""
    gc.disable()
    try:
        connection = parent.engine.connect()
        connection.execute(text("INSERT INTO parents VALUES (2)"))
        Ring(connection)
        del connection
        yield
        assert pool_of(parent.engine).checkedout() == 2
    finally:
        gc.enable()
    gc.collect()
    eventually(lambda: pool_of(parent.engine).checkedout() == 1, "it is returned")


class Session:
    """Who locks connections through the queries API."""


@contextmanager
def a_session_has_locked_one(parent: Parent) -> Iterator[None]:
    """A queries session has the idle connection, and writes."""
    [idle] = [slot.handle for slot in shared(parent.engine).idle_connections]
    session = Session()
    PoolManager.lock(pool_of(parent.engine).pid, idle, session)
    cursor = idle.cursor()
    cursor.execute("INSERT INTO parents VALUES (2)")
    yield
    cursor.execute("SELECT pg_backend_pid(), (SELECT count(*) FROM parents)")
    assert cursor.fetchone() == (parent.idle, 1)  # its own row; the other transaction's is not to be seen
    PoolManager.free(pool_of(parent.engine).pid, idle)


@contextmanager
def one_was_added(parent: Parent) -> Iterator[None]:
    """A connection was added by hand, and counts."""
    pid = pool_of(parent.engine).pid
    added = psycopg2.connect(plain(parent.engine))
    parent.own.add(added.info.backend_pid)
    PoolManager.add(pid, added)
    yield
    session = Session()
    assert PoolManager.get(pid, session) is added
    with added.cursor() as cursor:
        cursor.execute("SELECT 1")
    del session
    PoolManager.free(pid, added)


def plain(engine: Engine) -> str:
    """An engine's URL as libpq reads it."""
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


HAZARDS: list[Callable[[Parent], AbstractContextManager[None]]] = [
    nothing_else,
    beginning_a_checkout,
    in_the_middle_of_a_permit,
    others_wait,
    one_is_opening,
    the_worker_closes_one,
    an_engine_is_being_made,
    one_is_abandoned,
    a_session_has_locked_one,
    one_was_added,
]


@pytest.mark.parametrize("hazard", HAZARDS)
def test_four_children_have_backends_of_their_own_and_the_parent_notices_nothing(
    hazard: Callable[[Parent], AbstractContextManager[None]], parent: Parent, eventually: Eventually
) -> None:
    """Whatever goes on in the parent: each child gets its whole budget at once, no lock is stuck, its idle
    connections close; and the parent's backends, transaction, waiters and housekeeper live on."""
    with hazard(parent):
        before = parent.backends()
        found = in_children(lambda: live(parent.engine))
        eventually(lambda: parent.backends() == before, "a fork has changed the parent's backends")
    assert_apart(parent.own, found)
    parent.assert_unharmed(eventually)


def assert_apart(parents: set[int], found: list[list[int]]) -> None:
    """No backend is anybody else's."""
    apart = [parents, *map(set, found)]
    assert len(set().union(*apart)) == sum(map(len, apart))


def test_all_of_it_at_once(
    new_engine: Callable[..., Engine],
    pg_observer: Observer,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:
    """One holds, one closes, one opens, one is abandoned, the others wait, and one is inside the lock."""

    def set_ttl(engine: Engine) -> set[int]:
        shared(engine).set_idle_ttl(60.0)
        return set()

    # A checkout that waits for a while would have the collector find what is abandoned.
    parent = Parent(
        new_engine(max_size=7, poolclass=inside.pool_class(gc_on_wait=False)), pg_observer, monkeypatch
    )
    with ExitStack() as stack:
        for hazard in (the_worker_closes_one, one_is_abandoned, one_is_opening, others_wait):
            stack.enter_context(hazard(parent))
        stack.enter_context(inside_the_lock(parent, "set_ttl", set_ttl, ages))
        before = parent.backends()
        found = in_children(lambda: live(parent.engine))
        eventually(lambda: parent.backends() == before, "a fork has changed the parent's backends")
    assert_apart(parent.own, found)
    parent.assert_unharmed(eventually)


# -- what the child has inherited ---------------------------------------------------------------------


def test_a_connection_that_was_out_is_found_invalidated_and_gets_another(
    parent: Parent, eventually: Eventually
) -> None:
    """As after a lost connection: its transaction has to be rolled back, then it works, on a backend of the
    child's."""

    def work() -> list[int]:
        connection: Connection = parent.connection
        with pytest.raises((exc.PendingRollbackError, exc.OperationalError)):
            connection.execute(text("INSERT INTO parents VALUES (3)"))
        assert connection.invalidated
        connection.rollback()
        backend: int = connection.scalar(BACKEND)
        connection.close()
        assert pool_of(parent.engine).checkedin() == 1
        return [backend]

    assert_apart(parent.own, in_children(work))
    parent.assert_unharmed(eventually)


ENDS: dict[str, Callable[[Connection], object]] = {
    "closes": lambda connection: connection.close(),
    "rolls back": lambda connection: connection.rollback(),
    "invalidates": lambda connection: connection.invalidate(),
    "detaches": lambda connection: connection.detach(),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_child_may_do_with_an_inherited_connection_what_it_likes(
    end: str, parent: Parent, eventually: Eventually
) -> None:
    """Nothing of it is seen by the parent's server, and nothing of it takes a slot of the child's."""

    def work() -> list[int]:
        with contextlib.suppress(exc.SQLAlchemyError):  # it is lost; how that is told is another test's
            ENDS[end](parent.connection)
        return live(parent.engine)

    assert_apart(parent.own, in_children(work))
    parent.assert_unharmed(eventually)


def test_a_child_may_forget_and_collect_what_it_inherited(parent: Parent, eventually: Eventually) -> None:
    """A finalizer of a connection that is the parent's does not reach the server either."""
    raw = [parent.connection.connection.dbapi_connection]

    def work() -> list[int]:
        Ring(parent.connection)
        del parent.connection
        raw.clear()
        gc.collect()
        return live(parent.engine)

    assert_apart(parent.own, in_children(work))
    parent.assert_unharmed(eventually)


RAW: dict[str, Callable[[Any], object]] = {
    "rolls back": lambda handle: handle.rollback(),
    "commits": lambda handle: handle.commit(),
    "executes": lambda handle: handle.cursor().execute("INSERT INTO parents VALUES (3)"),
    "closes": lambda handle: handle.close(),
}


@pytest.mark.parametrize("act", RAW)
@pytest.mark.parametrize("which", ["held", "idle"])
def test_the_drivers_own_connection_leads_nowhere_in_the_child(
    act: str, which: str, parent: Parent, eventually: Eventually
) -> None:
    """Also what somebody has in hand past SQLAlchemy reaches no server: an error, or no effect."""
    if which == "held":
        handle: Any = parent.connection.connection.dbapi_connection
    else:
        [handle] = [slot.handle for slot in shared(parent.engine).idle_connections]

    def work() -> list[int]:
        with contextlib.suppress(Exception):
            RAW[act](handle)
        return live(parent.engine)

    assert_apart(parent.own, in_children(work))
    parent.assert_unharmed(eventually)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="open descriptors can't be listed")
def test_nor_does_it_where_the_process_had_no_descriptor_left(parent: Parent, eventually: Eventually) -> None:
    """None that leads nowhere can be opened beside it."""
    handle: Any = parent.connection.connection.dbapi_connection
    fork = os.fork

    def without() -> int:
        with no_descriptor_left():
            return fork()

    def work() -> list[int]:
        with contextlib.suppress(Exception):
            RAW["executes"](handle)
        return live(parent.engine)

    parent.monkeypatch.setattr(os, "fork", without)
    found = in_a_child(work)
    assert_apart(parent.own, [found])
    parent.assert_unharmed(eventually)


def test_a_detached_connection_is_its_holders_own_in_the_child_too(
    parent: Parent, eventually: Eventually
) -> None:
    """The pool does not touch it: a parent may hand one on to its child, and let go of it itself."""
    fairy = parent.engine.raw_connection()  # the idle one
    fairy.detach()
    handle: Any = fairy.dbapi_connection

    def work() -> list[Any]:
        with handle.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return [*cursor.fetchone(), live(parent.engine)]

    backend, found = in_a_child(work)
    assert backend == parent.idle
    assert_apart(parent.own, [found])
    fairy.close()
    parent.own.remove(parent.idle)
    parent.assert_unharmed(eventually)


def test_the_queries_api_shows_the_child_a_pool_without_connections(
    parent: Parent, eventually: Eventually
) -> None:
    """What was added is the parent's; what the child adds counts in the child."""
    pid = pool_of(parent.engine).pid
    added = psycopg2.connect(plain(parent.engine))
    PoolManager.add(pid, added)
    parent.own.add(backend := added.info.backend_pid)

    def work() -> list[int]:
        assert PoolManager.size(pid) == 0
        assert not PoolManager.has_connection(pid, added)
        assert not PoolManager.report()["pools"][pid]["connections"]["open"]
        assert PoolManager.report()["process"] == os.getpid()
        own = psycopg2.connect(plain(parent.engine))
        PoolManager.add(pid, own)
        session = Session()
        assert PoolManager.get(pid, session) is own
        with ExitStack() as stack:
            held = [stack.enter_context(parent.engine.connect()) for _ in range(MAX_SIZE - 1)]
            assert PoolManager.is_full(pid)
            return [own.info.backend_pid, *(connection.scalar(BACKEND) for connection in held)]

    assert_apart(parent.own, in_children(work))
    PoolManager.remove_connection(pid, added)
    parent.own.remove(backend)
    parent.assert_unharmed(eventually)


@pytest.mark.parametrize("close", [True, False])
def test_disposing_in_the_child_stays_harmless(close: bool, parent: Parent, eventually: Eventually) -> None:
    """SQLAlchemy's recipe for the child is not needed, and does no harm, to either side."""

    def work() -> list[int]:
        parent.engine.dispose(close=close)
        return live(parent.engine)

    assert_apart(parent.own, in_children(work))
    parent.assert_unharmed(eventually)


def test_a_child_makes_snapshots_for_errors_of_its_own() -> None:
    """A thread of the parent makes one during the fork: the child neither waits for it nor has it."""
    pool = QueriesPool(FakeDriver().connect, max_size=1, timeout=0, pool_id=new_pid())
    recent, stop = inside.core(pool).recent_snapshot, Stop()
    with contextlib.closing(pool.connect()), pytest.raises(CheckoutTimeout):
        pool.connect()
    maker = Thread(lambda: recent.get(stop.here, 0.0, inside.core(pool).now))
    stop.reached()

    def work() -> str:
        with contextlib.closing(pool.connect()), pytest.raises(CheckoutTimeout) as caught:
            pool.connect()
        return str(caught.value)

    said = in_a_child(work)
    stop.go()
    maker.join()
    assert "this thread already holds 1 of them" in said


def test_a_checkout_that_waits_in_the_child_asks_the_collector(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a thread of the parent was just doing so, which keeps others from it."""
    engine = new_engine(max_size=1)
    collect, stop = gc.collect, Stop()
    inside.next_collection(monkeypatch, 0.0)
    monkeypatch.setattr(gc, "collect", stop.here)
    other = Thread(garbage.collect_garbage, gc.collect)
    stop.reached()
    monkeypatch.setattr(gc, "collect", collect)

    def work() -> int:
        gc.disable()
        Ring(engine.connect())
        with engine.connect() as connection:
            backend: int = connection.scalar(BACKEND)
            return backend

    assert in_a_child(work)
    stop.go()
    other.join()


# -- who forks whom -----------------------------------------------------------------------------------


def test_a_child_of_a_child(parent: Parent, eventually: Eventually) -> None:
    """Each generation has what it opened itself, while the one before it holds its own."""

    def work() -> list[list[int]]:
        with parent.engine.connect() as connection:
            own: int = connection.scalar(BACKEND)
            grandchildren = in_children(lambda: live(parent.engine))
            assert connection.scalar(BACKEND) == own
        return [[own], *grandchildren]

    assert_apart(parent.own, in_a_child(work))
    parent.assert_unharmed(eventually)


def test_another_thread_forks(parent: Parent, eventually: Eventually) -> None:
    """The child's one thread is then not the one that the parent began with."""
    found = Thread(in_children, lambda: live(parent.engine)).join()
    assert_apart(parent.own, found)
    parent.assert_unharmed(eventually)


def test_two_pools(parent: Parent, new_engine: Callable[..., Engine], eventually: Eventually) -> None:
    """Each is the child's own."""
    other = new_engine(pool_id=f"other-{next(_numbers)}")
    assert shared(other) is not shared(parent.engine)
    with other.connect() as held:
        parent.own.add(held.scalar(BACKEND))
        found = in_children(lambda: use_all(parent.engine) + use_all(other))
    assert_apart(parent.own, found)
    other.dispose()
    parent.own = {parent.backend, parent.idle}
    parent.assert_unharmed(eventually)


def test_what_fails_in_one_pool_leaves_no_other_with_its_parents_connections(
    parent: Parent, new_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """Whichever comes first."""
    other = new_engine(pool_id=f"other-{next(_numbers)}")
    with other.connect() as held:
        parent.own.add(held.scalar(BACKEND))
        for broken, whole in ((parent.engine, other), (other, parent.engine)):
            with parent.monkeypatch.context() as patch:
                patch.setattr(shared(broken).core, "after_fork_in_child", lambda: 1 // 0)
                found = in_a_child(functools.partial(use_all, whole))
            assert_apart(parent.own, [found])
    other.dispose()
    parent.own = {parent.backend, parent.idle}
    parent.assert_unharmed(eventually)


def test_a_closed_connection_that_the_server_still_counts_may_have_lost_its_descriptor(
    parent: Parent, eventually: Eventually
) -> None:
    """A program that becomes a daemon closes all of them; then it forks again."""
    descriptor = fcntl.fcntl(0, fcntl.F_DUPFD, 500)  # nothing else gets its number
    os.close(descriptor)

    def live() -> list[list[int]]:
        own = use_all(parent.engine)
        inside.ends(shared(parent.engine))[descriptor] = 0.0
        return [own, in_a_child(lambda: use_all(parent.engine))]

    assert_apart(parent.own, in_a_child(live))
    parent.assert_unharmed(eventually)


def test_nothing_was_ever_opened(new_engine: Callable[..., Engine]) -> None:
    """A fork before the first connection: each side has its own."""
    engine = new_engine()
    found = in_children(lambda: live(engine))
    assert_apart(set(use_all(engine)), found)


def descriptors() -> int:
    """How many this process has open, but for pipes: the tests' own."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            count += not os.readlink(f"/proc/self/fd/{name}").startswith("pipe:")
    return count


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc")
def test_descriptors_do_not_pile_up_in_the_children_of_one_parent(parent: Parent) -> None:
    """The tenth child has as many as the first, and the parent as before."""
    before = descriptors()
    in_children(descriptors)
    numbers = {in_a_child(descriptors) for _ in range(10)}
    assert len(numbers) == 1
    assert descriptors() <= before  # less, where what other tests have closed was waited for


# -- what the ledger is made of ----------------------------------------------------------------------


def test_an_engine_that_died_just_then_does_not_count_in_the_child(parent: Parent) -> None:
    """Its limit ends with it, although the thread that was inside the lock can't read the letter there."""
    engine = parent.engine
    big = create_engine(engine.url, poolclass=QueriesPool, max_size=50)
    assert shared(engine).max_size == 50
    with beginning_a_checkout(parent):
        del big
        gc.collect()
        found = in_a_child(lambda: shared(engine).max_size)
    assert found == shared(engine).max_size == MAX_SIZE


def test_a_pool_that_nobody_uses_is_forgotten_in_the_child_too(parent: Parent) -> None:
    """The parent's connection was all that it had; nothing of the child's will ever come by again."""
    pid = f"added-{next(_numbers)}"
    PoolManager.create(pid, idle_ttl=1, max_size=1)
    PoolManager.add(pid, psycopg2.connect(plain(parent.engine)))

    def work() -> None:
        eventually(lambda: pid not in PoolManager.instance(), f"{PoolManager.report()['pools'][pid]}")

    in_a_child(work)
    eventually(lambda: pid not in PoolManager.instance(), "the parent forgets it")


# -- SQLite -------------------------------------------------------------------------------------------


SQLITE = """
    import os, sys
    from sqlalchemy import create_engine, text
    from sqla_queries_pool import QueriesPool

    mode, path = sys.argv[1:]
    engine = create_engine(f"sqlite:///{path}", poolclass=QueriesPool, max_size=3)
    with engine.begin() as connection:
        connection.execute(text(f"PRAGMA journal_mode={mode}"))
        connection.execute(text("CREATE TABLE numbers (n int)"))
    held = engine.connect()
    engine.connect().close()
    held.execute(text("INSERT INTO numbers VALUES (1)"))
    for _ in range(4):
        if os.fork() == 0:
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT count(*) FROM numbers")) == 0
            engine.dispose()
            sys.exit()
    assert [os.wait()[1] for _ in range(4)] == [0] * 4
    held.commit()
    assert held.scalar(text("SELECT count(*) FROM numbers")) == 1
    held.close()
    engine.dispose()
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_the_transaction_of_a_sqlite_file_survives_children_that_end(mode: str, tmp_path: Path) -> None:
    """SQLite would roll it back for the child that closes the connection, be it at the child's exit."""
    run(SQLITE, mode, str(tmp_path / "file.db"))


# -- how children end ---------------------------------------------------------------------------------


def run(program: str, *arguments: str, **environment: str) -> str:
    """Run a program to its end, warnings being errors: it says nothing on stderr.  What it prints."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env=environment_of(**environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return ended.stdout


def environment_of(**more: str) -> dict[str, str]:
    """What a program here needs to know."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), more.pop("folder", ""))),
        # The latter as everywhere here: Python's warning of the fork of a process with threads.
        "PYTHONWARNINGS": "error,ignore:This process:DeprecationWarning",
        **more,
    }


ENDING = """
    import atexit, gc, json, os, signal, sys, threading
    from sqlalchemy import create_engine, text
    from sqla_queries_pool import QueriesPool

    ending, url = sys.argv[1:]
    engine = create_engine(url, poolclass=QueriesPool, max_size=3)
    backend = text("SELECT pg_backend_pid()")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE numbers (n int)"))
    held = engine.connect()
    held.execute(text("INSERT INTO numbers VALUES (1)"))
    before = held.scalar(backend)
    engine.connect().close()

    def end():
        if ending == "uses the engine":
            with engine.connect() as connection:
                assert connection.scalar(backend) != before
            engine.dispose()
        elif ending == "uses the engine at exit":
            atexit.register(lambda: (engine.connect().close(), engine.dispose()))
        elif ending == "raises":
            sys.excepthook = lambda *_: None
            raise RuntimeError
        elif ending == "collects":
            global held
            del held
            gc.collect()
        elif ending == "ends inside with":
            with engine.begin() as connection:
                connection.execute(text("INSERT INTO numbers VALUES (2)"))
                sys.exit()
        elif ending == "closes":
            held.close()
        sys.exit()

    for _ in range(4):
        if os.fork() == 0:
            signal.alarm(50)
            end()
    expected = 256 if ending == "raises" else 0
    assert [os.wait()[1] for _ in range(4)] == [expected] * 4
    assert held.scalar(backend) == before
    held.commit()
    assert held.scalar(text("SELECT count(*) FROM numbers")) == 1
    held.close()
    engine.dispose()
"""


@pytest.mark.parametrize(
    "ending",
    [
        "does nothing",
        "uses the engine",
        "uses the engine at exit",
        "raises",
        "collects",
        "ends inside with",
        "closes",
    ],
)
def test_children_that_end_as_programs_do_say_nothing_and_harm_nothing(
    ending: str, driver: str, pg_url: str
) -> None:
    """With sys.exit() or an exception, atexit and all finalizers: no warning of an unclosed connection, and
    the parent's transaction commits on its backend."""
    run(ENDING, ending, url_of(pg_url, driver))


def url_of(url: str, driver: str) -> str:
    """The URL for a driver."""
    return make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)


KILLED = """
    import os, signal, sys
    from sqlalchemy import create_engine, text
    from sqla_queries_pool import QueriesPool

    engine = create_engine(sys.argv[1], poolclass=QueriesPool, max_size=3)
    held = engine.connect()
    held.execute(text("CREATE TABLE numbers (n int)"))
    engine.connect().close()
    if os.fork() == 0:
        print("child", flush=True)
        sys.stdin.read()  # until the test ends it
        os._exit(0)
    signal.pause()
"""


def test_the_server_sees_the_end_of_a_parent_whose_children_live_on(
    driver: str, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """The children keep none of its connections open: its transactions and locks end with it."""
    database = str(make_url(pg_url).database)
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), url_of(pg_url, driver)],
        env=environment_of(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with program:
        assert program.stdout
        assert program.stdout.readline() == b"child\n"
        assert pg_observer.backends(database) == 2
        program.kill()
        program.wait()
        eventually(lambda: pg_observer.backends(database) == 0, "the server sees it")
        assert program.stdin
        program.stdin.close()


# -- multiprocessing ----------------------------------------------------------------------------------


MODULE = """
    import os
    from contextlib import ExitStack
    from sqlalchemy import create_engine, text
    from sqla_queries_pool import CheckoutTimeout, QueriesPool

    engine = create_engine(
        os.environ["DATABASE_URL"], poolclass=QueriesPool, max_size=3, pool_timeout=0, idle_ttl=None
    )
    backend = text("SELECT pg_backend_pid()")
    held = engine.connect()  # where the module is imported before a fork, this is the parent's
    held.scalar(backend)
    engine.connect().close()

    def use(barrier, answers):
        "All that there is, at once with the others."
        mine = [] if os.getppid() == importer else [held.scalar(backend)]  # this process imported it itself
        with ExitStack() as stack:
            for _ in range(3 - len(mine)):
                mine.append(stack.enter_context(engine.connect()).scalar(backend))
            try:
                engine.connect()
            except CheckoutTimeout:
                barrier.wait(50)
                answers.put(mine)
        held.close()
        engine.dispose()

    importer = os.getpid()
"""
MAIN = """
    import json, multiprocessing, sys
    import connected

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        context.set_forkserver_preload(["connected"])
        barrier, answers = context.Barrier(4), context.SimpleQueue()
        own = [connected.held.scalar(connected.backend)]
        arguments = (barrier, answers)
        children = [context.Process(target=connected.use, args=arguments) for _ in range(4)]
        for child in children:
            child.start()
        found = [answers.get() for _ in children]
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        assert connected.held.scalar(connected.backend) == own[0]
        print(json.dumps([own, *found]))
        connected.held.close()
        connected.engine.dispose()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method: str, driver: str, pg_url: str, tmp_path: Path) -> None:
    """Forked from one that has connected (fork; forkserver, which has preloaded the module), or importing
    the module themselves (spawn): four at once have all of their connections, of their own."""
    (tmp_path / "connected.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "main.py").write_text(textwrap.dedent(MAIN))
    ended = subprocess.run(
        [sys.executable, "main.py", method],
        cwd=tmp_path,
        env=environment_of(folder=str(tmp_path), DATABASE_URL=url_of(pg_url, driver)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    [own, *found] = json.loads(ended.stdout)
    assert [len(backends) for backends in found] == [3] * 4
    assert_apart(set(own), found)
