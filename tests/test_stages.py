"""What a checkout was at when its error came, and that SQLAlchemy's own ping can't hang."""

from __future__ import annotations

import itertools
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import inside
import pytest
from fakes import FakeConnection, FakeDriver
from hazards import Probe, Thread, new_pid, new_pool
from proxy import Proxy
from sqlalchemy import Engine, create_engine, event, exc, make_url
from sqlalchemy.engine.default import DefaultDialect

from sqla_queries_pool import CheckoutTimeout, QueriesPool
from sqla_queries_pool.engine.stages import OPENING, PROBING, WAITING, Stages
from sqla_queries_pool.sockets.liveness import PingTimeout

Eventually = Callable[..., None]
NewEngine = Callable[..., Engine]
DRIVERS = ("psycopg2", "psycopg")
CONNECT = {"connect_timeout": 2}
"""The shortest that all versions of libpq take as it is.  For what connects to nobody alone: a busy machine
may take as long to connect."""
PASSWORD = "Conspicuous/Pa55word"
_numbers = itertools.count(1)


@pytest.fixture
def new_engine() -> Iterator[NewEngine]:
    """``create_engine`` with a QueriesPool, disposed of at the end."""
    engines: list[Engine] = []

    def new(url: Any, **kw: Any) -> Engine:
        engines.append(create_engine(url, **({"poolclass": QueriesPool} | kw)))
        return engines[-1]

    yield new
    for engine in engines:
        engine.dispose()


@pytest.fixture
def proxy(pg_server: Any) -> Iterator[Proxy]:
    """In front of the tests' server."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        yield proxy


def behind(proxy: Proxy, url: str, driver: str = "psycopg2") -> str:
    """The URL through the proxy, for a driver."""
    reached = make_url(proxy.url(url)).set(drivername=f"postgresql+{driver}")
    return reached.render_as_string(hide_password=False)


@contextmanager
def black_hole(proxy: Proxy, engine: Engine) -> Iterator[None]:
    """What an engine sends is swallowed, and a connect gives up soon."""

    def give_up_soon(dialect: Any, record: Any, args: Any, params: dict[str, Any]) -> None:
        params |= CONNECT

    event.listen(engine, "do_connect", give_up_soon)
    proxy.blackhole()
    yield
    proxy.pass_on()
    event.remove(engine, "do_connect", give_up_soon)


def past(proxy: Proxy, engine: Engine, server: Any) -> None:
    """Have an engine connect straight to the server from now on."""

    @event.listens_for(engine, "do_connect")
    def straight(dialect: Any, record: Any, args: Any, params: dict[str, Any]) -> None:
        params |= {"host": server.host, "port": server.port}


def fake_engine(new_engine: NewEngine, **kw: Any) -> tuple[Any, FakeDriver]:
    """An engine without a server, and its driver."""
    driver = FakeDriver()
    return new_engine(f"fake://me@host/stages_{next(_numbers)}", module=driver, **kw), driver


def notes(error: BaseException | None) -> list[str]:
    """What was noted on an error; where SQLAlchemy has wrapped it, on the driver's."""
    return list(getattr(getattr(error, "orig", error), "__notes__", []))


def spent(error: BaseException | None) -> tuple[str, dict[str, float]]:
    """The stage in which an error came, and how many seconds each stage has taken."""
    (note,) = notes(error)
    found = re.fullmatch(r"QueriesPool (\S+) was (.*)\. Time spent: (.*)", note)
    assert found, note
    each = [part.partition(" s ") for part in found[3].split(", ")]
    assert len({stage for _, _, stage in each}) == len(each), "a stage twice"
    return found[2], {stage: float(seconds) for seconds, _, stage in each}


# -- which stage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.3])
def test_a_timeout_says_that_it_was_waiting(new_engine: NewEngine, timeout: float) -> None:
    """And for how long, which is the timeout at least."""
    engine, _ = fake_engine(new_engine, max_size=1, pool_timeout=timeout)
    began = time.monotonic()
    with engine.connect(), pytest.raises(CheckoutTimeout) as raised:
        engine.connect()
    took = time.monotonic() - began
    stage, seconds = spent(raised.value)
    assert stage == WAITING
    assert list(seconds) == [WAITING]
    assert timeout <= seconds[WAITING] + 0.05
    assert seconds[WAITING] <= took + 0.05


def test_an_opening_that_fails_says_so(new_engine: NewEngine) -> None:
    """The note is on the driver's error, which SQLAlchemy wraps."""
    engine, driver = fake_engine(new_engine)
    driver.failures = 1
    with pytest.raises(exc.DBAPIError) as raised:
        engine.connect()
    assert isinstance(raised.value.orig, FakeDriver.OperationalError)
    stage, seconds = spent(raised.value)
    assert stage == OPENING
    assert list(seconds) == [OPENING]


def test_a_checkout_that_waits_and_then_opens_says_both(eventually: Eventually) -> None:
    """Another engine's slot came free; the time before is the waiting's."""
    pid, driver = new_pid(), FakeDriver()
    other = new_pool(pid, driver.connect, max_size=1)
    pool = new_pool(pid, driver.connect, max_size=1)
    held = other.connect()
    waiting = Thread(pool.connect)
    eventually(lambda: inside.attachment(pool).queue)
    driver.failures = 1
    held.close()
    with pytest.raises(FakeDriver.OperationalError) as raised:
        waiting.join()
    stage, seconds = spent(raised.value)
    assert stage == OPENING
    assert list(seconds) == [WAITING, OPENING]


def test_what_was_pinged_in_vain_and_could_not_be_replaced_says_both(new_engine: NewEngine) -> None:
    """Probing, then opening."""
    engine, driver = fake_engine(new_engine, max_size=1, ping_after=0)
    engine.connect().close()

    def ping(_: FakeConnection) -> None:
        driver.failures = 1
        raise FakeDriver.OperationalError

    driver.on_ping = ping
    with pytest.raises(exc.DBAPIError) as raised:
        engine.connect()
    stage, seconds = spent(raised.value)
    assert stage == OPENING
    assert list(seconds) == [PROBING, OPENING]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("fault", ["blackhole", "accept_and_hang"])
@pytest.mark.slow
def test_a_server_that_says_nothing_was_being_opened(
    driver: str, fault: str, proxy: Proxy, pg_url: str, new_engine: NewEngine
) -> None:
    """The driver gives up after its own limit, and the note says where the time went."""
    engine = new_engine(behind(proxy, pg_url, driver), connect_args=CONNECT, pool_timeout=0)
    getattr(proxy, fault)()
    began = time.monotonic()
    with pytest.raises(exc.OperationalError) as raised:
        engine.connect()
    took = time.monotonic() - began
    stage, seconds = spent(raised.value)
    assert stage == OPENING
    assert list(seconds) == [OPENING]
    assert 0.9 <= seconds[OPENING] <= took + 0.05


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.slow
def test_a_checkout_that_waited_pinged_and_opened_in_vain_says_all_three(
    driver: str, proxy: Proxy, pg_url: str, new_engine: NewEngine, eventually: Eventually
) -> None:
    """One after the other, each with its seconds; together they are no more than the checkout took."""
    engine: Any = new_engine(
        behind(proxy, pg_url, driver),
        max_size=1,
        ping_after=0,
        ping_timeout=0.5,
        pool_timeout=6,
        pool_reset_on_return=None,
    )
    shared, line = inside.shared(engine.pool), inside.attachment(engine.pool).queue
    held = engine.raw_connection()
    began = time.monotonic()
    waiting = Thread(engine.connect)
    eventually(lambda: line)
    since = next(iter(line)).since
    eventually(lambda: inside.now(shared) - since > 0.3)
    with black_hole(proxy, engine):
        held.close()
        with pytest.raises((CheckoutTimeout, exc.OperationalError)) as raised:  # whose limit was the shorter
            waiting.join()
    took = time.monotonic() - began
    _, seconds = spent(raised.value)
    assert list(seconds) == [WAITING, PROBING, OPENING]
    assert seconds[WAITING] >= 0.2
    assert seconds[PROBING] >= 0.4
    assert seconds[OPENING] >= 0.9
    assert sum(seconds.values()) <= took + 0.15


def test_a_checkout_that_is_tried_again_has_each_stage_once(new_engine: NewEngine) -> None:
    """Refused, waited for the pause, refused again: the seconds of each stage are added up."""
    engine, driver = fake_engine(new_engine)
    engine.connect().close()
    engine.dispose()
    connect, tried = driver.connect, []

    def refuse(*args: Any, **kw: Any) -> Any:
        tried.append(1)
        if len(tried) < 3:
            raise ConnectionRefusedError("Connection refused")
        raise ValueError("this does not pass by itself")

    driver.connect = refuse  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="this does not pass") as raised:
        engine.raw_connection()
    driver.connect = connect  # type: ignore[method-assign]
    assert len(tried) == 3
    _, seconds = spent(raised.value)
    assert list(seconds) == [OPENING, WAITING]


# -- the note ----------------------------------------------------------------------------------------


def test_a_note_names_the_pool_and_is_printed(new_engine: NewEngine) -> None:
    """By its label, in the traceback, from Python 3.11 on; the message of the error is as it was."""
    engine, driver = fake_engine(new_engine)
    driver.failures = 1
    with pytest.raises(exc.DBAPIError) as raised:
        engine.connect()
    (note,) = notes(raised.value)
    assert note.startswith(
        f"QueriesPool {inside.shared(engine.pool).label} was opening a connection. Time spent: "
    )
    assert str(raised.value.orig) == "the server is not there"
    printed = "".join(traceback.format_exception(raised.value))
    assert note in printed or not hasattr(raised.value, "add_note")


def test_one_error_that_is_raised_again_has_one_note(new_engine: NewEngine) -> None:
    """The last; what others have noted stays, in its order."""
    error = ValueError("no such database")
    error.__notes__ = ["the administrator's note"]

    def creator() -> Any:
        raise error

    pool = new_pool(creator=creator)
    for _ in range(5):
        with pytest.raises(ValueError, match="no such database"):
            pool.connect()
    first, second = notes(error)
    assert first == "the administrator's note"
    assert second.startswith("QueriesPool ")


def test_notes_of_two_pools_do_not_pile_up(new_engine: NewEngine) -> None:
    """An error that passes through both has the note of the last one that raised it."""
    error = ValueError("no such database")

    def creator() -> Any:
        raise error

    inner = new_pool(creator=creator)
    outer = new_pool(creator=lambda: inner.connect().dbapi_connection)
    for _ in range(3):
        with pytest.raises(ValueError, match="no such database"):
            outer.connect()
    assert len(notes(error)) == 1
    assert inside.shared(outer).label in notes(error)[0]


def test_the_seconds_are_those_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is entered again adds up; the one that it is in counts until now."""
    now = [10.0]
    monkeypatch.setattr("sqla_queries_pool.engine.stages.time.monotonic", lambda: now[0])
    stages, error = Stages(10.0), ValueError()
    for stage, seconds in [(WAITING, 1.0), (OPENING, 2.0), (WAITING, 4.0), (PROBING, 8.5)]:
        stages.enter(stage)
        now[0] += seconds
    stages.note(error, "label")
    assert spent(error) == (PROBING, {WAITING: 5.0, OPENING: 2.0, PROBING: 8.5})
    now[0] += 1.0
    stages.note(error, "label")
    assert spent(error)[1][PROBING] == 9.5


@pytest.mark.parametrize("driver", DRIVERS)
def test_no_password_is_in_a_note(driver: str, pg_url: str, new_engine: NewEngine) -> None:
    """Neither the right one nor the wrong one; the database is named without."""
    url = make_url(pg_url).set(drivername=f"postgresql+{driver}", password=PASSWORD, username="nobody_at_all")
    engine: Any = new_engine(url, max_size=1, pool_timeout=0)
    with pytest.raises(exc.OperationalError) as failed:
        engine.connect()
    assert str(make_url(pg_url).database) in notes(failed.value)[0]
    holder = inside.checkouts(engine.pool).take(inside.attachment(engine.pool))
    with pytest.raises(CheckoutTimeout) as timeout:
        engine.connect()
    inside.checkouts(engine.pool).failed(holder)
    for error in (failed.value, timeout.value):
        assert len(notes(error)) == 1
        assert "Pa55word" not in notes(error)[0]
        assert "Pa55word" not in "".join(traceback.format_exception(error))


def test_an_error_that_takes_no_notes_is_raised_all_the_same(new_engine: NewEngine) -> None:
    """Whatever a driver raises gets to the caller."""

    class Closed(Exception):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    def creator() -> Any:
        raise Closed("no")

    with pytest.raises(Closed):
        new_pool(creator=creator).connect()


# -- SQLAlchemy's own ping ---------------------------------------------------------------------------


def after(engine: Any, seconds: float) -> None:
    """Wait until the housekeeper has done all that is due by then."""
    probe = Probe()
    inside.housekeeper(engine.pool).schedule(probe, seconds)
    assert probe.swept.wait(20.0), "the housekeeper does not come by"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_pre_ping_that_nobody_answers_ends_and_the_checkout_gets_another_connection(
    driver: str, proxy: Proxy, pg_server: Any, pg_url: str, new_engine: NewEngine
) -> None:
    """After ``ping_timeout``: what is idle is behind a black hole, the server can be reached past it."""
    engine = new_engine(behind(proxy, pg_url, driver), pool_pre_ping=True, ping_timeout=0.1)
    engine.connect().close()
    proxy.blackhole()
    past(proxy, engine, pg_server)
    with Thread(engine.connect).join() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.slow
def test_a_pre_ping_that_nobody_answers_ends_in_an_error_where_nobody_can_connect(
    driver: str, proxy: Proxy, pg_url: str, new_engine: NewEngine
) -> None:
    """After ``pool_timeout``, of which the connect has a second at least; nothing stays taken."""
    engine: Any = new_engine(
        behind(proxy, pg_url, driver),
        pool_pre_ping=True,
        ping_timeout=0.1,
        pool_timeout=0.5,
        max_size=1,
    )
    engine.connect().close()
    with black_hole(proxy, engine):
        with pytest.raises(CheckoutTimeout):
            Thread(engine.connect).join()
        assert engine.pool.checkedout() == 0
    inside.set_timeout(engine.pool, 20.0)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_a_pre_ping_has_no_more_time_than_the_checkout(
    proxy: Proxy, pg_server: Any, pg_url: str, new_engine: NewEngine
) -> None:
    """But for half a second; a ping that could take an hour ends with the checkout's own time."""
    engine = new_engine(behind(proxy, pg_url), pool_pre_ping=True, ping_timeout=3600, pool_timeout=0)
    engine.connect().close()
    proxy.blackhole()
    past(proxy, engine, pg_server)
    Thread(engine.connect).join().close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_pre_ping_that_answers_leaves_nothing_that_could_hang_up(
    driver: str, pg_url: str, new_engine: NewEngine
) -> None:
    """A connection may be out for longer than ``ping_timeout``: the housekeeper comes by, and lets it be."""
    url = make_url(pg_url).set(drivername=f"postgresql+{driver}")
    engine = new_engine(url, pool_pre_ping=True, ping_timeout=0.05)
    engine.connect().close()
    held = engine.raw_connection()
    backend = held.cursor()
    backend.execute("SELECT pg_backend_pid()")
    (first,) = backend.fetchone()  # type: ignore[misc]
    after(engine, 0.06)
    backend.execute("SELECT pg_backend_pid()")
    assert backend.fetchone() == (first,)
    held.close()


def test_a_connection_that_has_just_been_opened_is_not_pinged(new_engine: NewEngine) -> None:
    """SQLAlchemy does not ping it either."""
    engine, driver = fake_engine(new_engine, pool_pre_ping=True)
    pinged: list[Any] = []
    driver.on_ping = pinged.append
    engine.connect().close()
    assert not pinged
    engine.connect().close()
    assert len(pinged) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_listener_that_takes_longer_than_a_ping_may_costs_no_connection(
    driver: str, pg_url: str, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was registered: the limit of time ends with the ping."""
    url = make_url(pg_url).set(drivername=f"postgresql+{driver}")
    engine = new_engine(url, pool_pre_ping=True)
    called: list[Any] = []
    limits: list[PingTimeout] = []
    monkeypatch.setattr(PingTimeout, "start", lambda limit, *_: limits.append(limit))

    def slow(*_: Any) -> None:
        called.append(None)
        for limit in limits:  # its time is over now, by whatever clock
            limit.sweep()

    event.listen(QueriesPool, "checkout", slow, insert=True)  # before all of the engine's own
    try:
        for _ in range(2):
            with engine.connect() as connection:
                assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    finally:
        event.remove(QueriesPool, "checkout", slow)
    assert (len(called), len(limits)) == (2, 1)
    assert engine.pool.statistics().connects == 1  # type: ignore[attr-defined]


@pytest.mark.skipif(
    not hasattr(DefaultDialect, "_do_ping_w_event"), reason="before SQLAlchemy 2.0.5 listeners had no say"
)
def test_listeners_of_errors_have_their_say_about_a_pre_ping(
    proxy: Proxy, pg_server: Any, pg_url: str, new_engine: NewEngine
) -> None:
    """``is_pre_ping`` is told to them, and what they make of the error holds: a disconnect, or not."""
    engine: Any = new_engine(behind(proxy, pg_url), pool_pre_ping=True, ping_timeout=0.1, max_size=1)
    seen: list[tuple[bool, bool]] = []
    verdict = [True]

    @event.listens_for(engine, "handle_error")
    def handle(context: Any) -> None:
        seen.append((context.is_pre_ping, context.is_disconnect))
        context.is_disconnect = verdict[0]

    engine.connect().close()
    proxy.blackhole()
    past(proxy, engine, pg_server)
    Thread(engine.connect).join().close()
    assert seen == [(True, True)]


@pytest.mark.skipif(
    not hasattr(DefaultDialect, "_do_ping_w_event"), reason="before SQLAlchemy 2.0.5 listeners had no say"
)
def test_a_listener_may_say_that_a_pre_pings_error_is_none_of_a_lost_connection(
    new_engine: NewEngine,
) -> None:
    """Then it is raised, as SQLAlchemy has it; the slot is returned, and nothing stays that could hang up."""
    engine, driver = fake_engine(new_engine, pool_pre_ping=True, max_size=1)
    dialect = engine.dialect
    seen: list[bool] = []

    @event.listens_for(engine, "handle_error")
    def handle(context: Any) -> None:
        seen.append(context.is_pre_ping)
        context.is_disconnect = False

    def do_ping(dbapi_connection: Any) -> bool:
        raise FakeDriver.OperationalError("no")

    engine.connect().close()
    dialect.do_ping = do_ping
    with pytest.raises(FakeDriver.OperationalError):
        engine.raw_connection()
    del dialect.do_ping
    assert seen == [True]
    assert engine.pool.checkedout() == 0
    engine.connect().close()
    assert driver.numbers() == [2]
