"""Which drivers' sockets are looked at, and what is done about those that can't be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import inside
import pytest
from conftest import Observer
from fakes import FakeClock, FakeDriver
from hazards import eventually, new_pid, new_pool
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.sockets.drivers import UNSEEN_FOR, Unseen, socket_of


@pytest.fixture
def engine_of(clock: FakeClock) -> Iterator[Callable[..., Engine]]:
    """Makes engines of a driver without a server."""
    made: list[Engine] = []

    def new(driver: FakeDriver, **kw: Any) -> Engine:
        pid = new_pid()
        PoolManager.create(pid, None, 5, clock)
        made.append(
            create_engine("fake://host/database", module=driver, poolclass=QueriesPool, pool_id=pid, **kw)
        )
        return made[-1]

    yield new
    for engine in made:
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_driver_that_is_known_tells_its_socket(pg_url: str, driver: str) -> None:
    """Also one whose connection is of a class of the user's own."""
    dsn = make_url(pg_url)
    engine = create_engine(dsn.set(drivername=f"postgresql+{driver}"), poolclass=QueriesPool)
    with engine.connect() as connection:
        handle: Any = connection.connection.dbapi_connection
        assert socket_of(handle) is handle

        class Stands:
            """For a driver's connection, and says so, as tracers' proxies do."""

            __class__ = type(handle)

        stands = Stands()
        assert socket_of(stands) is stands
    engine.dispose()


def test_nothing_is_asked_of_a_connection_whose_driver_is_not_known() -> None:
    """SQLAlchemy's own tests, and others', count the calls on a connection."""
    handle = MagicMock()
    pool = new_pool(creator=lambda: handle, ping_after=0)
    for _ in range(3):
        pool.connect().close()
    pool.connect().invalidate()
    pool.dispose()
    pool.audit()
    assert {name for name, *_ in handle.method_calls} == {"rollback", "close"}


def test_one_that_cannot_be_looked_at_is_pinged_after_half_a_second(
    clock: FakeClock, engine_of: Callable[..., Engine]
) -> None:
    """HikariCP's rule; nothing sees that it is dead."""
    driver = FakeDriver()
    engine = engine_of(driver)
    for seconds, pings in ((0.0, 0), (UNSEEN_FOR / 2, 0), (UNSEEN_FOR, 1)):
        engine.raw_connection().close()
        clock.now += seconds
        engine.raw_connection().close()
        assert driver.connections[0].calls["ping"] == pings


def test_ping_after_none_never_pings_it(clock: FakeClock, engine_of: Callable[..., Engine]) -> None:
    """Who says never means it."""
    driver = FakeDriver()
    engine = engine_of(driver, ping_after=None)
    engine.raw_connection().close()
    clock.now += 1e6
    engine.raw_connection().close()
    assert driver.connections[0].calls["ping"] == 0


def test_sqlite_needs_no_pings(tmp_path: Any) -> None:
    """A file is not lost while nobody looks."""
    engine = create_engine(f"sqlite:///{tmp_path}/some.db", poolclass=QueriesPool)
    engine.connect().close()
    assert inside.attachment(engine.pool).ping_after > UNSEEN_FOR
    assert isinstance(inside.slots(engine.pool)[0].socket, Unseen)
    engine.dispose()


def test_what_a_pool_below_this_one_takes_back_stays_open(pg_url: str, pg_observer: Observer) -> None:
    """psycopg documents ``creator=pool.getconn`` with ``close_returns=True``: ``close()`` closes nothing."""
    psycopg_pool = pytest.importorskip("psycopg_pool")
    url = make_url(pg_url)
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg_pool.ConnectionPool(conninfo, min_size=2, max_size=2, close_returns=True) as below:
        engine = create_engine(
            "postgresql+psycopg://", creator=below.getconn, poolclass=QueriesPool, max_size=2
        )
        for _ in range(20):
            with engine.connect() as one, engine.connect() as other:
                assert one.execute(text("SELECT 1")).scalar() == 1
                assert other.execute(text("SELECT 1")).scalar() == 1
            engine.dispose()
        assert below.get_stats().get("connections_lost", 0) == 0
        assert below.get_stats()["connections_num"] == 2
    eventually(lambda: pg_observer.backends(str(url.database)) == 0, "psycopg's pool has closed them")
