"""What is never given back: connections in reference cycles, engines and sessions that nobody ends."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import inside
import psycopg2
import pytest
from hazards import Ring, Thread, assert_whole, driver_connection_of, new_pid, new_pool, pool_of, settled
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.concurrency.housekeeping import Housekeeper

Eventually = Callable[..., None]
SEED = 20261122


class Session:
    """Who locks connections through the queries API."""


@pytest.fixture
def hungry_collector() -> Iterator[None]:
    """The collector runs all the time, in whichever thread allocates."""
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(15, 2, 2)
    yield
    gc.set_threshold(*thresholds)


@pytest.fixture
def no_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The collector does not run by itself; a waiting checkout may ask for it, whatever another test did."""
    inside.next_collection(monkeypatch, 0.0)
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def new_engine(pg_url: str) -> Iterator[Callable[..., Engine]]:
    """Make engines of the test's database; what is left of them is disposed of."""
    engines: weakref.WeakSet[Engine] = weakref.WeakSet()

    def new(url: str | URL = pg_url, **kw: Any) -> Engine:
        engine = create_engine(url, poolclass=QueriesPool, **kw)
        engines.add(engine)
        return engine

    yield new
    for engine in engines:
        engine.dispose()


def database(url: str) -> str:
    """Its name."""
    name = make_url(url).database
    assert name
    return name


def raw(url: str) -> Any:
    """A connection of one's own."""
    return psycopg2.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False))


def run(threads: int, work: Callable[[int], object]) -> None:
    """Run `work(number)` in many threads at once."""
    start = threading.Barrier(threads, timeout=20.0)

    def begin(number: int) -> None:
        start.wait()
        work(number)

    for thread in [Thread(begin, number, name=f"worker {number}") for number in range(threads)]:
        thread.join(100.0)


# -- connections in cycles --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("hungry_collector")
def test_a_hundred_thousand_checkouts_of_which_many_are_abandoned_in_cycles(eventually: Eventually) -> None:
    """Whichever thread the collector runs the check-ins in: none hangs, no slot is lost, none is shared.

    Every connection knows who has it, from its checkout until it is reset at its check-in.
    """
    print(f"seed {SEED}")
    pid = new_pid()
    pools = [new_pool(pid, max_size=size, timeout=60.0, gc_on_wait=True) for size in (8, 8, 5)]
    counts = [0] * 16

    def work(number: int) -> None:
        rng = random.Random(SEED + number)
        pool = pools[number % 3]
        for _ in range(6250):
            fairy: Any = pool.connect()
            handle = fairy.dbapi_connection
            assert handle.owner is None, "handed out twice"
            assert not handle.closed
            handle.owner = me = object()
            if rng.random() < 0.3:
                Ring(fairy)
            else:
                assert handle.owner is me, "handed out twice"
                fairy.close()
            del fairy
            counts[number] += 1

    run(16, work)
    assert sum(counts) == 100_000
    gc.collect()
    for pool in pools:
        assert_whole(pool, eventually)


@pytest.mark.slow
@pytest.mark.usefixtures("hungry_collector")
def test_abandoned_transactions_are_rolled_back_before_anyone_gets_the_connection(
    new_engine: Callable[..., Engine], pg_url: str, pg_observer: Any, eventually: Eventually
) -> None:
    """The same on PostgreSQL, two drivers, each abandoned in the middle of a transaction."""
    print(f"seed {SEED}")
    psycopg = make_url(pg_url).set(drivername="postgresql+psycopg")
    engines = [new_engine(max_size=6), new_engine(psycopg, max_size=6)]
    for engine in engines:
        engine.connect().close()  # the dialect's own first statements

        @event.listens_for(engine, "checkin")
        def returned(_: Any, record: Any) -> None:
            record.info.pop("owner", None)

    def work(number: int) -> None:
        rng = random.Random(SEED + number)
        engine = engines[number % 2]
        for _ in range(40):
            connection = engine.connect()
            info = connection.connection.info
            assert "owner" not in info, "handed out twice"
            info["owner"] = me = object()
            status = driver_connection_of(connection.connection).info.transaction_status
            assert status == 0, "in the middle of somebody's transaction"
            connection.execute(text("SELECT 1"))
            if rng.random() < 0.08:
                Ring(connection)
            else:
                assert info["owner"] is me
                connection.close()
            del connection, info

    run(16, work)
    gc.collect()
    shared = inside.shared(pool_of(engines[0]))
    eventually(lambda: settled(shared), f"everything given back: {shared!r}")
    assert pg_observer.backends(database(pg_url), "idle in transaction") == 0
    for engine in engines:
        assert_whole(pool_of(engine), eventually)


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.usefixtures("no_collector")
def test_where_all_threads_wait_the_collector_is_asked(engines: int, eventually: Eventually) -> None:
    """12 threads abandon a connection each and then want another: nobody allocates, nobody times out."""
    pid = new_pid()
    pools = [new_pool(pid, max_size=12, timeout=60.0, gc_on_wait=True) for _ in range(engines)]
    all_abandoned = threading.Barrier(12, timeout=20.0)

    def work(number: int) -> None:
        pool = pools[number % engines]
        Ring(pool.connect())
        all_abandoned.wait()
        pool.connect().close()

    run(12, work)
    for pool in pools:
        assert_whole(pool, eventually)


@pytest.mark.usefixtures("no_collector")
def test_where_all_threads_wait_the_collector_is_asked_on_postgresql(
    new_engine: Callable[..., Engine], eventually: Eventually
) -> None:
    """The same with an engine, abandoned within transactions."""
    engine = new_engine(max_size=12, pool_timeout=60.0)
    all_abandoned = threading.Barrier(12, timeout=20.0)

    def work(_: int) -> None:
        connection = engine.connect()
        connection.execute(text("SELECT 1"))
        Ring(connection)
        del connection
        all_abandoned.wait()
        with engine.connect() as again:
            again.execute(text("SELECT 1"))

    run(12, work)
    assert_whole(pool_of(engine), eventually)


# -- engines ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.exhaustive
def test_300_engines_that_were_dropped_leave_nothing(
    pg_url: str, pg_observer: Any, eventually: Eventually
) -> None:
    """Made, used and dropped without `dispose()`: no backend, registry entry, thread or engine is left."""
    name = database(pg_url)
    engines: weakref.WeakSet[Engine] = weakref.WeakSet()
    most = 0
    for number in range(300):
        engine = create_engine(pg_url, poolclass=QueriesPool, max_size=4, idle_ttl=0.2)
        engines.add(engine)
        if number == 0:
            shared = inside.shared(pool_of(engine))
            inside.set_housekeeper(Housekeeper(), shared)  # which knows of no other test's pools
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        if number % 10 == 0:
            most = max(most, pg_observer.backends(name))
    assert most <= 5
    pid = pool_of(engine).pid
    assert pid in PoolManager.instance()
    assert inside.shared(pool_of(engine)) is shared
    del engine, connection
    gc.collect()
    assert not list(engines)
    eventually(lambda: pg_observer.backends(name) == 0, "no backend is left")
    eventually(lambda: pid not in PoolManager.instance(), "no registry entry is left")
    assert pid not in inside.pools()
    threads = [inside.housekeeper(shared), inside.worker(shared)]
    eventually(lambda: not any(inside.thread_runs(thread) for thread in threads), "no thread is left")


@pytest.mark.usefixtures("no_collector")
def test_what_a_dropped_engine_had_out_passes_on_to_waiting_checkouts(
    new_engine: Callable[..., Engine], pg_observer: Any, pg_url: str, eventually: Eventually
) -> None:
    """An engine and its connections, all out, are dropped in one cycle while another engine waits."""
    dropped = new_engine(max_size=2)
    other = new_engine(max_size=2, pool_timeout=60.0)
    held = [dropped.connect(), dropped.connect()]
    for connection in held:
        connection.execute(text("SELECT 1"))
    shared = inside.shared(pool_of(other))
    waiting = [Thread(other.connect), Thread(other.connect)]
    eventually(lambda: shared.numbers.waiting == 2, "both wait")
    died = weakref.ref(dropped)
    Ring((dropped, held))
    del dropped, held, connection
    for thread in waiting:
        connection = thread.join()
        assert connection.execute(text("SELECT 2")).scalar() == 2
        connection.close()
        thread.result = None
    gc.collect()
    assert died() is None
    assert_whole(pool_of(other), eventually)
    eventually(lambda: pg_observer.backends(database(pg_url)) == 2, "two backends")


@pytest.mark.usefixtures("no_collector")
def test_what_a_dropped_engine_had_idle_passes_on(
    new_engine: Callable[..., Engine], pg_observer: Any, pg_url: str, eventually: Eventually
) -> None:
    """An engine is dropped with all of the budget idle in it; nobody calls `dispose()`."""
    dropped = new_engine(max_size=2)
    other = new_engine(max_size=2, pool_timeout=60.0)
    for connection in [dropped.connect(), dropped.connect()]:
        connection.close()
    died = weakref.ref(dropped)
    del dropped, connection
    gc.collect()
    assert died() is None
    assert_whole(pool_of(other), eventually)
    eventually(lambda: pg_observer.backends(database(pg_url)) == 2, "two backends")


# -- sessions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["by hand", "an engine", "a dropped engine"])
@pytest.mark.parametrize("through", ["clean", "housekeeper", "checkout", "waiting checkout"])
def test_a_session_that_dies_with_a_lock_leaves_no_transaction_open(
    through: str,
    owner: str,
    monkeypatch: pytest.MonkeyPatch,
    new_engine: Callable[..., Engine],
    pg_url: str,
    pg_observer: Any,
    eventually: Eventually,
) -> None:
    """It is rolled back or closed by `clean`, by the housekeeper, and before anyone else gets the slot."""
    name = database(pg_url)
    engine = new_engine(max_size=1, pool_timeout=60.0)
    shared, pid = inside.shared(pool_of(engine)), pool_of(engine).pid
    session: Any = Session()
    if owner == "by hand":
        handle = raw(pg_url)
        PoolManager.add(pid, handle)
        assert PoolManager.get(pid, session) is handle
    else:
        first = engine if owner == "an engine" else new_engine(max_size=1)
        with first.connect() as connection:
            handle = connection.connection.dbapi_connection
        PoolManager.lock(pid, handle, session)
        del connection, first
        gc.collect()
    handle.cursor().execute("CREATE TABLE nobodys (number int)")
    assert pg_observer.backends(name, "idle in transaction") == 1
    assert shared.numbers.total == 1
    handle = weakref.ref(handle)
    waiting = None
    if through == "waiting checkout":
        waiting = Thread(engine.connect)
        eventually(lambda: shared.numbers.waiting == 1, "somebody waits")
    if through != "housekeeper":
        monkeypatch.setattr(Housekeeper, "schedule", lambda *_: None)
    del session
    if through == "clean":
        PoolManager.clean(pid)
        assert pg_observer.backends(name, "idle in transaction") == 0
    elif through == "checkout":
        waiting = Thread(engine.connect)
    if waiting is not None:
        connection = waiting.join()
        assert connection.execute(text("SELECT to_regclass('nobodys')")).scalar() is None
        connection.close()
        waiting.result = None
        del connection
    eventually(lambda: pg_observer.backends(name, "idle in transaction") == 0, "no transaction is open")
    assert_whole(pool_of(engine), eventually)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT to_regclass('nobodys')")).scalar() is None
