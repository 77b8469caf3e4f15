"""Credentials that expire: the example's tokens, and that the pool asks its listener once more."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inside
import psycopg2
import pytest
from conftest import Observer
from fakes import Task
from hazards import eventually, pool_of
from sqlalchemy import Engine, create_engine, event, exc, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from test_fork import in_a_child

from sqla_queries_pool import QueriesPool

PERIODS = 96
"""A day of tokens that are good for 15 minutes."""


@pytest.fixture(scope="module")
def example() -> Any:
    """``examples/tokens.py``."""
    path = Path(__file__).parent.parent / "examples" / "tokens.py"
    spec = importlib.util.spec_from_file_location("tokens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tokens"] = module
    spec.loader.exec_module(module)
    module.__dict__["LEAST"] = 0.0  # these tokens live for less than a second
    return module


class Service:
    """Stands for a service: the token is the role's password, so the one before is revoked at once."""

    def __init__(self, example: Any, observer: Observer, role: str, seconds: float) -> None:
        self._example, self._observer, self.role, self._seconds = example, observer, role, seconds
        self.times: list[float] = []
        """When it was asked."""
        self.token = ""
        """The one that is good, or is about to be."""

    def __call__(self) -> Any:
        self.times.append(time.monotonic())
        return self._example.Fetched({"password": self.rotate()}, self._seconds)

    def rotate(self) -> str:
        """Another token."""
        self.token = token = f"token-{time.monotonic_ns()}"
        self._observer.query(f"ALTER ROLE {self.role} PASSWORD '{token}'")
        return token


@pytest.fixture
def service(example: Any, pg_url: str, pg_observer: Observer) -> Iterator[Callable[[float], Service]]:
    """Makes the service of a role that may log in."""
    role = f"role_{time.monotonic_ns()}"
    pg_observer.query(f"CREATE ROLE {role} LOGIN")
    yield lambda seconds: Service(example, pg_observer, role, seconds)
    pg_observer.terminate(str(make_url(pg_url).database))
    pg_observer.query(f"DROP ROLE {role}")


def engine_of(pg_url: str, role: str, **kw: Any) -> Engine:
    """An engine whose URL has no password."""
    url = make_url(pg_url)._replace(username=role, password=None)
    return create_engine(url, **{"poolclass": QueriesPool, "max_size": 4, "check_limits": False, **kw})


def test_a_token_that_seems_to_have_ended_is_not_asked_for_again_and_again(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine's clock is ahead: the service would be asked all the time, and refuse."""
    monkeypatch.setattr(example, "LEAST", 10.0)
    asked = threading.Semaphore(0)

    def fetch() -> Any:
        asked.release()
        return example.Fetched({"password": "secret"}, -1)

    tokens = example.Tokens(fetch)
    assert asked.acquire(timeout=10)
    assert not asked.acquire(timeout=0.1)
    tokens.end()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_renews_tokens_as_its_parent_does(example: Any) -> None:
    """A server that loads the application first forks its workers; the parent's thread is not there."""
    asked: list[None] = []

    def fetch() -> Any:
        asked.append(None)
        return example.Fetched({"password": str(len(asked))}, 0.03)

    tokens = example.Tokens(fetch)

    def renews() -> bool:
        before = len(asked)
        eventually(lambda: len(asked) > before, "another one is fetched")
        return True

    assert in_a_child(renews)
    tokens.end()


def test_a_token_that_was_revoked_is_asked_for_once_more(
    example: Any, service: Callable[[float], Service], pg_url: str
) -> None:
    """Before a caller sees the error; the service is asked once by all that were refused the same one."""
    vault = service(600)
    tokens = example.Tokens(vault)
    engine = engine_of(pg_url, vault.role)
    example.use(tokens, engine)
    engine.connect().close()
    vault.rotate()  # by somebody else
    with engine.connect(), engine.connect() as connection:
        assert "authentication_error" not in connection.info
    assert len(vault.times) == 2
    refused = tokens.current
    for task in [Task(lambda: tokens.renewed(refused)) for _ in range(3)]:
        assert task.result() is tokens.current
    assert len(vault.times) == 3
    tokens.end()
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize(("listens", "times"), [(True, 2), (False, 1)])
def test_a_password_that_stays_wrong_is_the_drivers_error_after_one_more_attempt_where_a_listener_is_asked(
    pg_url: str, monkeypatch: pytest.MonkeyPatch, listens: bool, times: int
) -> None:
    """Of psycopg2, which knows no SQLSTATE, and of asyncpg, which does; the first one's is not in it."""
    asyncpg = pytest.importorskip("asyncpg")
    url = make_url(pg_url)._replace(password="wrong")
    engine = create_engine(url, poolclass=QueriesPool)
    tasks = create_async_engine(url._replace(drivername="postgresql+asyncpg"), poolclass=QueriesPool)
    attempts = [attempts_of(each, monkeypatch) for each in (engine, tasks.sync_engine)]
    asked = [asked_of(each) for each in (engine, tasks.sync_engine) if listens]

    async def connect() -> None:
        try:
            async with tasks.connect():
                pass
        finally:
            await tasks.dispose()

    for number in (1, 2):  # each checkout
        with pytest.raises(exc.OperationalError, match="authentication failed") as caught:
            engine.connect()
        assert caught.value.orig is not None
        assert caught.value.orig.__context__ is None
        with pytest.raises((exc.DBAPIError, asyncpg.InvalidPasswordError), match="authentication failed"):
            asyncio.run(connect())
        assert attempts == [["wrong"] * times * number] * 2
        assert asked == [[False, True] * number] * (2 if listens else 0)
    assert pool_of(engine).statistics().connect_errors == 4  # of both engines, who are one pool


def attempts_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list with an item for each attempt of the driver to connect: the password."""
    attempts: list[Any] = []
    connect: Callable[..., Any] = engine.dialect.connect

    def count(*arguments: Any, **options: Any) -> Any:
        attempts.append(options["password"])
        return connect(*arguments, **options)

    monkeypatch.setattr(engine.dialect, "connect", count)
    return attempts


def asked_of(engine: Engine) -> list[bool]:
    """Have an engine ask a listener that has nothing to say.

    :return: was it the second time, each time?
    """
    asked: list[bool] = []

    @event.listens_for(engine, "do_connect")
    def listen(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
        asked.append("authentication_error" in record.info)

    return asked


def test_an_engine_with_a_creator_of_its_own_asks_no_listener_so_there_is_one_attempt(pg_url: str) -> None:
    """Although there is a listener."""
    attempts: list[int] = []

    def creator() -> Any:
        attempts.append(1)
        return psycopg2.connect(
            make_url(pg_url)
            .set(drivername="postgresql", password="wrong")
            .render_as_string(hide_password=False)
        )

    engine = create_engine(pg_url, poolclass=QueriesPool, creator=creator)
    asked = asked_of(engine)
    with pytest.raises(exc.OperationalError, match="authentication failed"):
        engine.connect()
    assert (len(attempts), asked) == (1, [])


def test_a_connection_that_is_being_opened_during_a_rolling_expire_is_renewed(pg_url: str) -> None:
    """It has the old credentials, so a later checkout has another backend.  That one stays."""
    engine = create_engine(pg_url, poolclass=QueriesPool)
    engine.connect().close()  # the engine's first looks at the server
    pool = pool_of(engine)
    pool.dispose()

    @event.listens_for(engine, "do_connect", once=True)
    def rotate(*_: Any) -> None:
        pool.expire(rolling=True)

    def backend() -> Any:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT pg_backend_pid()"))

    old = backend()
    eventually(lambda: backend() != old, "it is renewed")
    eventually(lambda: all(slot.expires == math.inf for slot in inside.slots(pool)), "none is any more")
    engine.dispose()


def test_tokens_serve_asyncio(example: Any, service: Callable[[float], Service], pg_url: str) -> None:
    """The loop goes on while the service is asked."""
    pytest.importorskip("asyncpg")
    vault = service(600)
    tokens = example.Tokens(vault)
    url = make_url(pg_url)._replace(drivername="postgresql+asyncpg", username=vault.role, password=None)
    engine = create_async_engine(url, poolclass=QueriesPool, check_limits=False)
    example.use_async(tokens, engine)

    async def main() -> None:
        vault.rotate()
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        await engine.dispose()

    asyncio.run(main())
    assert len(vault.times) == 2
    tokens.end()


def test_each_service_is_asked_as_its_client_documents(example: Any) -> None:
    """With stand-ins for the clients, whose names of methods and results are the real ones'."""
    client: Any = SimpleNamespace(generate_db_auth_token=lambda *a: f"{a}")
    assert example.rds(client, "h", 5432, "u") == ({"password": "('h', 5432, 'u')"}, 900)
    token = SimpleNamespace(token="t", expires_on=time.time() + 60)
    arguments, seconds = example.azure(SimpleNamespace(get_token=lambda scope: token))
    assert (arguments, seconds) == ({"password": "t"}, pytest.approx(60, abs=20))
    expiry = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) + datetime.timedelta(
        seconds=60
    )
    credentials = SimpleNamespace(token="t", expiry=expiry, refresh=lambda request: None)
    arguments, seconds = example.cloud_sql(credentials, None)
    assert (arguments, seconds) == ({"password": "t"}, pytest.approx(60, abs=20))
    secret = {"data": {"username": "u", "password": "p"}, "lease_duration": 3600}
    database = SimpleNamespace(generate_credentials=lambda name: secret)
    client = SimpleNamespace(secrets=SimpleNamespace(database=database))
    assert example.vault(client, "r") == ({"user": "u", "password": "p"}, 3600)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_day_of_tokens_of_a_quarter_of_an_hour_brings_no_error_and_one_refresh_each(
    example: Any, service: Callable[[float], Service], pg_url: str
) -> None:
    """Compressed: each is renewed after 0.2 s, which revokes the one before at once. Four threads open a
    connection every few milliseconds, and all that is open is renewed with each token.

    On a machine so busy that a connect outlasts two tokens, nothing would help: such errors are told apart.
    """
    vault = service(0.3)
    engine = engine_of(pg_url, vault.role)
    assert isinstance(engine.pool, QueriesPool)
    pool = engine.pool
    tokens = example.Tokens(vault, lambda: pool.expire(rolling=True))
    example.use(tokens, engine)
    over = threading.Event()
    too_slow: list[Exception] = []

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except psycopg2.OperationalError as error:
            if "authentication_error" in record.info and options["password"] != vault.token:
                too_slow.append(error)
            raise

    def work() -> int:
        done = 0
        while not over.is_set():
            with suppress(exc.OperationalError), engine.connect() as connection:  # they are counted below
                assert connection.scalar(text("SELECT 1")) == 1
                if done % 3 == 0:
                    connection.invalidate()
            done += 1
        return done

    tasks = [Task(work) for _ in range(4)]
    eventually(lambda: len(vault.times) >= PERIODS or not all(t.is_alive() for t in tasks), "a day", 120)
    tokens.end()
    over.set()
    done = sum(task.result() for task in tasks)
    statistics = pool.statistics()
    print(f"{len(vault.times)} tokens, {done} checkouts, {statistics.connects} connects")
    assert statistics.connect_errors == len(too_slow)
    gaps = [after - before for before, after in zip(vault.times, vault.times[1:], strict=False)]
    assert min(gaps) >= 0.199  # one for each
    engine.dispose()
