"""Credentials that expire: the example's tokens, and that the pool asks its listener once more."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Observer
from fakes import Task
from hazards import eventually
from sqlalchemy import Engine, create_engine, event, exc, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

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
    return module


class Service:
    """Stands for a service: the token is the role's password, so the one before is revoked at once."""

    def __init__(self, example: Any, observer: Observer, role: str, seconds: float) -> None:
        self._example, self._observer, self.role, self._seconds = example, observer, role, seconds
        self.times: list[float] = []
        """When it was asked."""

    def __call__(self) -> Any:
        self.times.append(time.monotonic())
        return self._example.Fetched({"password": self.rotate()}, self._seconds)

    def rotate(self) -> str:
        """Another token."""
        token = f"token-{time.monotonic_ns()}"
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


def test_a_listener_is_asked_twice_at_most_and_only_where_there_is_one(
    service: Callable[[float], Service], pg_url: str
) -> None:
    """A password that is wrong is the driver's error."""
    vault = service(600)
    vault.rotate()
    engine = engine_of(pg_url, vault.role)
    asked: list[bool] = []

    @event.listens_for(engine, "do_connect")
    def give(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
        asked.append("authentication_error" in record.info)
        cparams["password"] = "wrong"

    with pytest.raises(exc.OperationalError, match="authentication failed"):
        engine.connect()
    assert asked == [False, True]
    with pytest.raises(exc.OperationalError, match="authentication failed"):
        engine.connect()
    assert asked == [False, True, False, True]


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
    assert (arguments, round(seconds)) == ({"password": "t"}, 60)
    expiry = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) + datetime.timedelta(
        seconds=60
    )
    credentials = SimpleNamespace(token="t", expiry=expiry, refresh=lambda request: None)
    arguments, seconds = example.cloud_sql(credentials, None)
    assert (arguments, round(seconds)) == ({"password": "t"}, 60)
    secret = {"data": {"username": "u", "password": "p"}, "lease_duration": 3600}
    database = SimpleNamespace(generate_credentials=lambda name: secret)
    client = SimpleNamespace(secrets=SimpleNamespace(database=database))
    assert example.vault(client, "r") == ({"user": "u", "password": "p"}, 3600)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_day_of_tokens_of_a_quarter_of_an_hour_brings_no_error_and_one_refresh_each(
    example: Any, service: Callable[[float], Service], pg_url: str
) -> None:
    """Compressed: each is renewed after 0.1 s, which revokes the one before at once. Four threads open a
    connection every few milliseconds, and all that is open is renewed with each token."""
    vault = service(0.15)
    engine = engine_of(pg_url, vault.role)
    assert isinstance(engine.pool, QueriesPool)
    pool = engine.pool
    tokens = example.Tokens(vault, lambda: pool.expire(rolling=True))
    example.use(tokens, engine)
    over = threading.Event()

    def work() -> int:
        done = 0
        while not over.is_set():
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT 1")) == 1
                if done % 3 == 0:
                    connection.invalidate()
            done += 1
        return done

    tasks = [Task(work) for _ in range(4)]
    eventually(lambda: len(vault.times) >= PERIODS or not all(t.is_alive() for t in tasks), "a day", 60)
    tokens.end()
    over.set()
    done = sum(task.result() for task in tasks)
    statistics = pool.statistics()
    print(f"{len(vault.times)} tokens, {done} checkouts, {statistics.connects} connects")
    assert statistics.connect_errors == 0
    gaps = [after - before for before, after in zip(vault.times, vault.times[1:], strict=False)]
    assert min(gaps) >= 0.099  # one for each
    engine.dispose()
