"""The password is nowhere: not in what the package says, and not within reach of its manager and pools."""

from __future__ import annotations

import configparser
import copy
import gc
import inspect
import itertools
import logging
import os
import pickle
import re
import signal
import threading
import traceback
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import inside
import psycopg2
import pytest
from fakes import FakeDialect, FakeDriver
from hazards import Thread, new_pid, new_pool
from sqlalchemy import create_engine, engine_from_config, event, exc, make_url, text
from sqlalchemy.engine import Engine

from sqla_queries_pool import (
    ActivePoolError,
    CheckoutTimeout,
    ConnectionBusyError,
    ConnectionNotFoundError,
    ParameterError,
    PoolManager,
    QueriesPool,
)
from sqla_queries_pool.engine.records import Record
from sqla_queries_pool.engine.settings import NAMES

Eventually = Callable[..., None]
PASSWORD = "Conspicuous/Pa55word"
WRONG = "Mistyped/Pa55word"
MARK = "Pa55word"
DRIVERS = ["psycopg2", "psycopg"]


@pytest.fixture
def secret_url(pg_url: str, pg_observer: Any) -> Iterator[str]:
    """The URL of the test's database, with a user whose password catches the eye."""
    url = make_url(pg_url)
    user = f"user_of_{url.database}"
    pg_observer.query(f"CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'")
    yield url.set(username=user, password=PASSWORD).render_as_string(hide_password=False)
    gc.collect()
    pg_observer.terminate(url.database)
    pg_observer.query(f"DROP ROLE {user}")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Where everything is put that is said, logged or raised; it is looked through at the end."""
    caplog.set_level(logging.DEBUG)
    return []


def make_engine(url: str, driver: str = "psycopg2", **kw: Any) -> Engine:
    """An engine that does not wait."""
    pytest.importorskip(driver)
    kw = {"max_size": 2, "pool_timeout": 0, **kw}
    return create_engine(make_url(url).set(drivername=f"postgresql+{driver}"), poolclass=QueriesPool, **kw)


def within_reach(*roots: Any, but: tuple[type, ...] = ()) -> Iterator[Any]:
    """All objects that one can come to from these, but for those that everything leads to.

    :param but: nor through objects of these classes.
    """
    seen: set[int] = set()
    todo: deque[Any] = deque(roots)
    while todo:
        thing = todo.popleft()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, *but)):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, types.FunctionType):  # not its globals
            todo += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
        elif isinstance(thing, types.FrameType):
            todo.append(dict(thing.f_locals))
        elif isinstance(thing, logging.Logger | logging.Handler):
            continue  # the test's own log has seen what it has seen
        else:
            todo += gc.get_referents(thing)


ENGINES = (QueriesPool, Record, BaseException)
"""What is half an engine's, which has the URL; and errors, whose tracebacks lead everywhere."""


def owned() -> list[Any]:
    """All living objects of the package's classes but those; the housekeeper is as old as the package."""
    found = [t for t in gc.get_objects() if type(t).__module__.partition(".")[0] == "sqla_queries_pool"]
    return [inside.manager(), inside.housekeeper(), *(t for t in found if not isinstance(t, ENGINES))]


def leaks() -> list[str]:
    """What contains a password: within reach of the manager and its pools, or of anything of ours."""
    found = []
    from_manager = within_reach(inside.pools(), *inside.pools().values(), vars(PoolManager))
    for thing in itertools.chain(from_manager, within_reach(*owned(), but=ENGINES)):
        if isinstance(thing, str | bytes | bytearray):
            content = thing if isinstance(thing, str) else thing.decode("latin-1")
            if MARK in content:
                found.append(content)
    return found


def everything_said(said: list[str], caplog: pytest.LogCaptureFixture) -> str:
    """All that a person could come to read."""
    formatter = logging.Formatter("%(name)s %(message)s")
    pools = [*inside.pools().values()]
    said += [formatter.format(record) for record in caplog.records]
    said += [repr(PoolManager.report()), repr(inside.pools())]
    said += [show(pool) for pool in pools for show in (str, repr)]
    said += [repr(connection) for pool in pools for connection in inside.slots(pool)]
    return "\n".join(said)


def told_by(error: BaseException) -> str:
    """What an error says: text, representation, causes, and the traceback that is printed."""
    return "\n".join([str(error), repr(error), *traceback.format_exception(error)])


def test_the_search_looks_at_everything_of_the_package() -> None:
    """Also at what no pool knows: whatever has a class of ours."""
    pool = new_pool()
    pool.connect().close()
    kinds = {type(thing).__name__ for thing in owned()}
    assert kinds >= {
        "Pool",
        "Ledger",
        "Connection",
        "Attachment",
        "Quota",
        "Lingering",
        "Worker",
        "Housekeeper",
    }
    stray = type(inside.lingering(pool))(lambda *_: None)
    stray.secret = "".join(["hidden ", MARK])
    assert leaks() == ["hidden " + MARK]
    del stray
    assert leaks() == []


def test_the_search_finds_what_is_there() -> None:
    """Otherwise the tests below would prove nothing."""
    PoolManager.create("secrets")
    pool = inside.pools()["secrets"]
    secret = "".join(["hidden ", MARK])
    inside.set_on_vacant(pool, lambda _: print(secret))
    assert set(leaks()) == {secret}
    PoolManager.remove("secrets")
    del pool
    gc.collect()
    assert leaks() == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_use_leaves_no_password(
    secret_url: str, driver: str, said: list[str], caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """Checkouts, errors of statements, invalidations, timeouts, disposal: while engines live, and after."""
    engine, sibling = make_engine(secret_url, driver), make_engine(secret_url, driver)
    with engine.connect() as one, engine.connect() as two:
        assert one.execute(text("SELECT 1")).scalar() == 1
        said += [repr(engine.pool), engine.pool.status(), repr(one.connection), str(one.connection)]
        with pytest.raises(CheckoutTimeout) as timeout:
            sibling.connect()
        said.append(told_by(timeout.value))
        with pytest.raises(exc.DBAPIError) as wrong:
            one.execute(text("SELECT no_such_column"))
        said.append(told_by(wrong.value))
        two.invalidate()
        assert not leaks()
    with sibling.connect():
        assert not leaks()
    pid = engine.pool.pid  # type: ignore[attr-defined]
    PoolManager.set_max_size(pid, 1)
    said += [repr(PoolManager.report()), repr(engine.pool), repr(sibling.pool)]
    del timeout, wrong
    engine.dispose()
    assert not leaks()
    del engine, sibling, one, two
    gc.collect()
    eventually(lambda: PoolManager.size(pid) == 0)
    assert not leaks()
    assert MARK not in everything_said(said, caplog)
    assert MARK not in pid
    PoolManager.clean(pid)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_login_that_fails_leaves_no_password(
    secret_url: str, driver: str, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in the error, nor in the timeout that it is the cause of, nor in what the pool keeps of it."""
    url = make_url(secret_url).set(password=WRONG).render_as_string(hide_password=False)
    engine, good = make_engine(url, driver), make_engine(secret_url, driver)
    held = good.connect()
    with pytest.raises(exc.OperationalError, match="password authentication failed") as failed:
        engine.connect()
    said.append(str(failed.value))
    del failed
    assert not leaks()
    PoolManager.set_max_size(engine.pool.pid, 1)  # type: ignore[attr-defined]
    with pytest.raises(CheckoutTimeout) as timeout:
        engine.connect()
    cause = timeout.value.__cause__
    assert "password authentication failed" in str(cause)
    assert cause is not None
    assert cause.__traceback__ is None
    assert not [
        thing for thing in within_reach(cause) if isinstance(thing, str | bytes) and MARK in str(thing)
    ]
    said.append(told_by(timeout.value))
    said += [repr(engine.pool), engine.pool.status()]
    assert not leaks()
    assert MARK not in everything_said(said, caplog)
    held.close()
    del timeout, cause
    for one in (engine, good):
        one.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_the_pool_keeps_of_an_error_leaves_the_callers_as_it_is(secret_url: str, driver: str) -> None:
    """psycopg's errors have the connection that failed (with its password), and lose it when copied."""
    url = make_url(secret_url).set(password=WRONG).render_as_string(hide_password=False)
    module = pytest.importorskip(driver)
    engine = make_engine(url, driver)
    raised: list[Any] = []
    connect = module.connect

    @event.listens_for(engine, "do_connect")
    def remember(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        try:
            return connect(*arguments, **options)
        except module.OperationalError as error:
            raised.append((error, copy.copy(vars(error))))
            raise

    with pytest.raises(exc.OperationalError):
        engine.connect()
    error, attributes = raised[0]
    assert {name: value for name, value in vars(error).items() if name != "__notes__"} == attributes
    assert not leaks()


def test_what_an_error_refers_to_is_not_kept() -> None:
    """A driver may hang arguments, or the engine, on its errors: the pool keeps the type and the text."""
    driver = FakeDriver()

    class Anchor:
        """Something that is not to be kept alive."""

    def connect() -> Any:
        error = FakeDriver.OperationalError("the server is not there")
        error.options = {"password": PASSWORD}  # type: ignore[attr-defined]
        error.anchor = anchor()  # type: ignore[attr-defined]
        raise error

    something = Anchor()
    anchor = weakref.ref(something)
    pool = QueriesPool(connect, max_size=1, timeout=0)
    with pytest.raises(FakeDriver.OperationalError):
        pool.connect()
    assert not leaks()
    PoolManager.add(pool.pid, driver.connect())
    PoolManager.lock(pool.pid, driver.connections[0], something)
    with pytest.raises(CheckoutTimeout) as timeout:
        pool.connect()
    assert type(timeout.value.__cause__) is FakeDriver.OperationalError
    assert str(timeout.value.__cause__) == "the server is not there"
    del something, timeout
    gc.collect()
    assert anchor() is None


def test_a_connection_that_cannot_be_closed_or_reset_is_logged_without_a_password(
    secret_url: str, said: list[str], caplog: pytest.LogCaptureFixture, pg_observer: Any
) -> None:
    """Warnings about backends that are gone name the database by its label."""
    engine = make_engine(secret_url)

    class Session:
        """Who locks connections."""

    with engine.connect() as connection:
        handle: Any = connection.connection.dbapi_connection
    pid = engine.pool.pid  # type: ignore[attr-defined]
    session = Session()
    PoolManager.lock(pid, handle, session)
    handle.cursor().execute("SELECT 1")
    pg_observer.terminate(make_url(secret_url).database)
    PoolManager.free(pid, handle)
    assert any("rollback failed" in record.message for record in caplog.records)
    assert MARK not in everything_said(said, caplog)
    engine.dispose()


def test_a_connection_added_by_hand_leaves_no_password(
    secret_url: str, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The queries API knows handles, not how they were opened."""
    dsn = make_url(secret_url).set(drivername="postgresql").render_as_string(hide_password=False)
    PoolManager.create("by hand", max_size=1)
    PoolManager.add("by hand", psycopg2.connect(dsn))
    for connection in inside.pools()["by hand"].connections.values():
        said += [repr(connection), repr(connection.handle)]
    assert not leaks()
    assert MARK not in everything_said(said, caplog)
    PoolManager.remove("by hand")


def test_the_pid_can_not_be_used_to_guess_the_password() -> None:
    """It is the same whatever the password is."""
    url = make_url("postgresql+psycopg2://me@host/db")
    pools: list[Any] = [
        create_engine(url.set(password=password), poolclass=QueriesPool).pool
        for password in (None, "a", PASSWORD)
    ]
    assert len({pool.pid for pool in pools}) == 1


def test_a_pool_that_fails_to_be_made_tells_no_password(said: list[str]) -> None:
    """Errors about parameters, and the warning about an unknown database, show no URL."""
    url = f"postgresql+psycopg2://me:{MARK}@host/db"
    for wrong in ({"max_size": url}, {"idle_ttl": url}, {"pool_timeout": url}, {"pool_id": ["", url]}):
        with pytest.raises(exc.ArgumentError) as raised:
            create_engine(url, poolclass=QueriesPool, **wrong)
        said += [str(raised.value), repr(raised.value)]
    assert MARK not in "\n".join(said)


# -- what it says of itself ------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_reports_audits_and_notes_have_no_password(
    secret_url: str, driver: str, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """With connections out, one lost, one that somebody waited for in vain, and a login that failed."""
    engine: Any = make_engine(secret_url, driver, track_stacks=True, leak_after=3600, pool_pre_ping=True)
    wrong = make_engine(str(make_url(secret_url).set(password=WRONG).render_as_string(False)), driver)
    pool, shared = engine.pool, inside.shared(engine.pool)
    with engine.connect() as connection:
        with pytest.raises(exc.OperationalError) as failed:
            wrong.connect()
        said += [
            *vars(failed.value.orig)["__notes__"],
            repr(pool.statistics()),
            repr(inside.last_connect_error(shared)),
        ]
        hear = inside.deafen(inside.ledger(shared))
        inside.do_get(pool)
        hear()
        snapshot = pool.snapshot()
        said += [repr(snapshot), snapshot.report(), snapshot.line(), repr(snapshot.as_dict())]
        audit = PoolManager.audit(pool.pid)
        assert len(audit.mended) == 1
        said += [repr(audit), *audit.mended]
        with engine.connect(), pytest.raises(CheckoutTimeout) as timeout:
            engine.connect()
        said += [told_by(timeout.value), *timeout.value.__notes__, repr(timeout.value.snapshot)]
        said += [timeout.value.snapshot.report(), repr(timeout.value.snapshot.as_dict())]
        said += [repr(PoolManager.report()), repr(connection.connection)]
        del failed, timeout
        assert not leaks()
    assert MARK not in everything_said(said, caplog)
    assert str(make_url(secret_url).database) in everything_said(said, caplog)
    for one in (engine, wrong):
        one.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_errors_survive_pickling_without_the_password(secret_url: str, driver: str) -> None:
    """As between processes (Celery, multiprocessing): their text arrives, and no URL."""
    engine = make_engine(secret_url, driver)
    errors: list[BaseException] = []
    with engine.connect(), engine.connect():
        with pytest.raises(CheckoutTimeout) as timeout:
            engine.connect()
        errors.append(timeout.value)
    with pytest.raises(ParameterError) as parameter:
        make_engine(secret_url, driver, max_size=secret_url)
    errors += [parameter.value, ActivePoolError("pid"), ConnectionBusyError(1)]
    errors += [ConnectionNotFoundError("pid", 1)]
    for error in errors:
        pickled = pickle.dumps(error)
        assert MARK.encode() not in pickled
        again = pickle.loads(pickled)
        assert type(again) is type(error)
        assert str(again) == str(error)
    engine.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_forked_child_has_no_password_in_its_pools(secret_url: str, driver: str) -> None:
    """Right after the fork, and when it has connected for itself."""
    engine = make_engine(secret_url, driver)
    held, idle = engine.connect(), engine.connect()
    idle.close()
    child = os.fork()
    if child == 0:  # pragma: no cover
        signal.alarm(60)
        status = 1
        try:
            assert not leaks()
            with engine.connect() as mine:
                assert mine.execute(text("SELECT 1")).scalar() == 1
                assert not leaks()
            assert MARK not in repr(PoolManager.report()) + engine.pool.status()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert held.execute(text("SELECT 1")).scalar() == 1
    held.close()
    engine.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_engine_that_the_url_alone_configures_leaves_no_password(
    secret_url: str, driver: str, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The plugin sees the URL, and keeps nothing of it."""
    pytest.importorskip(driver)
    url = make_url(secret_url).set(drivername=f"postgresql+{driver}")
    query = {"plugin": "queries", "max_size": "1", "pool_timeout": "0", "echo_pool": "debug"}
    engine = create_engine(url.update_query_dict(query))
    with engine.connect(), pytest.raises(CheckoutTimeout) as timeout:
        engine.connect()
    said += [told_by(timeout.value), repr(engine.pool)]
    for wrong in (("max_size", "many"), ("max_sise", "1"), ("idle_ttl", str(secret_url))):
        with pytest.raises(exc.ArgumentError) as raised:
            create_engine(url.update_query_pairs([*query.items(), wrong], append=False))
        said.append(str(raised.value))
    del timeout, raised
    assert not leaks()
    assert MARK not in everything_said(said, caplog)
    engine.dispose()


# -- hostile and huge parameters -------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


HOSTILE: dict[str, Any] = {
    "10**400": 10**400,
    "-10**400": -(10**400),
    "10**100000": 10**100_000,
    "1e400": "1e400",
    "-1e400": "-1e400",
    "nan": "nan",
    "NaN": float("nan"),
    "inf": "inf",
    "-inf": float("-inf"),
    "a million nines": "9" * 10**6,
    "a million spaces": " " * 10**6,
    "NUL": "\0",
    "1 and NUL": "1\0",
    "other digits and text": "\u0661\u200b",
    "surrogate": "\ud800",
    "escapes": "\x1b[2J\n\r1",
    "bytes": b"1",
    "a million bytes": b"9" * 10**6,
    "nested": nested(3),
    "nested for ever": nested(100_000),
    "dictionary": {"max_size": {"max_size": 1}},
    "complex": 1j,
    "class": int,
    "a URL": f"postgresql://me:{MARK}@host/db",
    "a URL in a list": [f"postgresql://me:{MARK}@host/db"],
}
ANY_TEXT = ("pool_id", "logging_name")
"""These are names: any text will do, and is no secret."""
OURS = [
    name
    for name in inspect.signature(QueriesPool.__init__).parameters
    if name not in ("self", "creator", "kw", "pool_id")
]
SQLALCHEMYS = ["recycle", "pre_ping", "echo", "reset_on_return"]


def test_a_hostile_value_is_an_error_with_a_short_text() -> None:
    """At once, whatever it is: a ParameterError that names the parameter, and shows nothing that is long."""

    def wrong(name: str, value: Any) -> str | None:
        settings: dict[str, Any] = {"max_size": 2, "pool_id": new_pid()} | {name: value}
        if name in ("pool_size", "max_overflow"):
            del settings["max_size"]
        try:
            Thread(lambda: QueriesPool(FakeDriver().connect, **settings)).join()
        except ParameterError as error:
            message = str(error)
        except Exception as error:
            return f"it raises {type(error).__name__}"
        else:
            return "it is taken"
        right = {
            "the parameter is named": message.startswith((f"{name}=", f"{name}: ")),
            "short": len(message) < 300,
            "without the password": MARK not in message,
            "printable": message.isprintable(),
        }
        return ", ".join(f"not {what}" for what, holds in right.items() if not holds) or None

    table = {
        f"{name}, {what}": wrong(name, value)
        for name in (*OURS, *SQLALCHEMYS, *ANY_TEXT)
        for what, value in HOSTILE.items()
        if not isinstance(value, str)
        or (name not in ANY_TEXT and not (name == "caller" and re.fullmatch(r"[\w.-]{1,9}", value)))
    }
    assert len(table) > 500
    assert {case: what for case, what in table.items() if what is not None} == {}


@pytest.mark.parametrize("name", ["max_size", "pool_size", "min_size", "idle_ttl", "timeout", "ping_timeout"])
def test_negative_zero_is_zero(name: str) -> None:
    """Which is no limit of connections, and no time."""
    settings: dict[str, Any] = {name: -0.0}
    if name == "max_size":
        with pytest.raises(ParameterError, match=r"^max_size=-0\.0 is not valid"):
            QueriesPool(FakeDriver().connect, **settings)
        return
    pool = QueriesPool(FakeDriver().connect, pool_id=new_pid(), **settings)
    assert pool.size() == (0 if name == "pool_size" else 15)


def test_two_numbers_whose_sum_is_too_large_are_an_error() -> None:
    """Each for itself is a number."""
    for number in (1e308, "1e308", int(1e308)):
        with pytest.raises(ParameterError, match=r"^pool_size="):
            QueriesPool(FakeDriver().connect, pool_size=number, max_overflow=number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [v for v in HOSTILE.values() if isinstance(v, str)],
    ids=[k for k in HOSTILE if isinstance(HOSTILE[k], str)],
)
@pytest.mark.parametrize("name", ["max_size", "idle_ttl", "pool_timeout", "pool_recycle", "min_size"])
def test_a_hostile_value_in_a_url_or_an_ini_file_is_an_error_with_a_short_text(name: str, value: str) -> None:
    """There, everything is text."""
    url = make_url(f"fake://me:{MARK}@host/db").update_query_dict({"plugin": "queries", name: value})
    ini = configparser.RawConfigParser()
    ini.read_dict({"app": {"sqlalchemy.url": f"fake://me:{MARK}@host/db", f"sqlalchemy.{name}": value}})
    makers: list[Callable[[], Any]] = [
        lambda: create_engine(url, module=FakeDriver()),
        lambda: engine_from_config(dict(ini["app"]), module=FakeDriver(), poolclass=QueriesPool),
    ]
    for make in makers:
        if make is makers[1] and name in ("pool_recycle", "pool_timeout"):
            continue  # SQLAlchemy converts these itself
        with pytest.raises(exc.ArgumentError) as raised:
            Thread(make).join()
        assert len(str(raised.value)) < 300
        assert MARK not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["max_size" * 10**5, "m" * 10**6, "max_siz\0", "max_size\u0301", "_" * 10**6, "-" * 1000 + "max_size"],
)
def test_a_hostile_name_in_a_url_ends_soon(name: str) -> None:
    """Whether it is taken for one of ours, or for the driver's; a text of any length is not shown."""
    url = make_url(f"fake://me:{MARK}@host/db").update_query_dict({"plugin": "queries", name: "1"})

    def make() -> str:
        try:
            create_engine(url, module=FakeDriver()).dispose()
        except exc.ArgumentError as error:
            return str(error)
        return ""

    message = Thread(make).join()
    assert len(message) < len(", ".join(NAMES)) + 250
    assert MARK not in message


def test_thousands_of_parameters_in_a_url_end_soon() -> None:
    """The driver's own pass through, however many there are."""
    query = {f"option_{n}": "x" for n in range(2000)} | {"plugin": "queries", "max_size": "3"}
    url = make_url(f"fake://me:{MARK}@host/db").update_query_dict(query)
    engine = Thread(lambda: create_engine(url, module=FakeDriver())).join()
    assert engine.pool.size() == 3
    assert len(engine.url.query) == 2000
    engine.dispose()


@pytest.mark.parametrize(
    "settings",
    [
        {"idle_ttl": 1e10},
        {"idle_ttl": 1e300},
        {"recycle": 1e12},
        {"ping_timeout": 1e300, "ping_after": 0},
        {"timeout": 1e300},
        {"leak_after": 1e300},
        {"max_size": 10**300},
        {"min_size": 10**300},
        {"pre_ping": True, "ping_timeout": 1e12},
    ],
    ids=str,
)
def test_a_huge_number_that_is_one_works(settings: dict[str, Any]) -> None:
    """Centuries are for ever; the thread that looks after all pools goes on."""
    driver = FakeDriver()
    pool = new_pool(creator=driver.connect, dialect=FakeDialect(dbapi=driver), **settings)  # type: ignore[arg-type]
    for _ in range(2):
        Thread(lambda: pool.connect().close()).join()
    swept = threading.Event()

    class Probe:
        def sweep(self) -> None:
            swept.set()

        def neglected(self) -> None: ...

    probe = Probe()
    inside.housekeeper(pool).schedule(probe, 0.01)
    assert swept.wait(20.0), "the housekeeper has died"
