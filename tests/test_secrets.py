"""The password is nowhere: not in what the package says, and not within reach of its manager and pools."""

from __future__ import annotations

import copy
import gc
import logging
import traceback
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from fakes import FakeDriver
from sqlalchemy import create_engine, event, exc, make_url, text
from sqlalchemy.engine import Engine

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool

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


def within_reach(*roots: Any) -> Iterator[Any]:
    """All objects that one can come to from these, but for those that everything leads to."""
    seen: set[int] = set()
    todo: deque[Any] = deque(roots)
    while todo:
        thing = todo.popleft()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType):
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


def leaks() -> list[str]:
    """What can be reached from the manager and its pools and contains a password."""
    found = []
    for thing in within_reach(PoolManager._pools, *PoolManager._pools.values(), vars(PoolManager)):
        if isinstance(thing, str | bytes | bytearray):
            content = thing if isinstance(thing, str) else thing.decode("latin-1")
            if MARK in content:
                found.append(content)
    return found


def everything_said(said: list[str], caplog: pytest.LogCaptureFixture) -> str:
    """All that a person could come to read."""
    formatter = logging.Formatter("%(name)s %(message)s")
    pools = [*PoolManager._pools.values()]
    said += [formatter.format(record) for record in caplog.records]
    said += [repr(PoolManager.report()), repr(PoolManager._pools)]
    said += [show(pool) for pool in pools for show in (str, repr)]
    said += [repr(connection) for pool in pools for connection in pool.connections]
    return "\n".join(said)


def told_by(error: BaseException) -> str:
    """What an error says: text, representation, causes, and the traceback that is printed."""
    return "\n".join([str(error), repr(error), *traceback.format_exception(error)])


def test_the_search_finds_what_is_there() -> None:
    """Otherwise the tests below would prove nothing."""
    PoolManager.create("secrets")
    pool = PoolManager._pools["secrets"]
    secret = "".join(["hidden ", MARK])
    pool.on_vacant = lambda _: print(secret)
    assert leaks() == [secret]
    PoolManager.remove("secrets")
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
        error.anchor = anchor()  # type: ignore[attr-defined,misc]
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
    for connection in PoolManager._pools["by hand"].connections:
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
