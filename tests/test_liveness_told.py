"""What a platform, a driver or a setting can't do is told: in the statistics, and once in the log."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fakes import FakeDriver
from hazards import new_pid
from sqlalchemy import create_engine, make_url

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.logs import NAME, Failures
from sqla_queries_pool.sockets import liveness
from sqla_queries_pool.sockets.lingering import FOLLOW, Lingering
from sqla_queries_pool.sockets.liveness import DOUBT, SHUT_DOWN, PingTimeout, hang_up, look


def told(url: Any, **options: Any) -> tuple[str, str]:
    """What an engine says that it does, before it has opened a connection, and after that."""
    engine = create_engine(url, poolclass=QueriesPool, **options)
    pool: Any = engine.pool
    before = pool.statistics().liveness
    engine.raw_connection().close()
    after = pool.statistics().liveness
    engine.dispose()
    return before, after


def test_an_engine_says_what_is_really_done(
    pg_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """By its driver, its settings, and the platform."""
    fake: dict[str, Any] = {"url": "fake://host/database", "module": FakeDriver()}
    assert told(pg_url) == ("unknown", "poll")
    assert told(make_url(pg_url).set(drivername="postgresql+psycopg")) == ("unknown", "poll")
    assert told(pg_url, pool_pre_ping=True) == ("unknown", "ping")
    assert told(pg_url, ping_after=None) == ("unknown", "poll")
    assert told(**fake) == ("unknown", "ping")
    assert told(**fake, ping_after=None) == ("unknown", "none")
    assert told("sqlite://") == ("unknown", "none")
    assert told(f"sqlite:///{tmp_path}/some.db") == ("unknown", "ping")
    monkeypatch.setattr(liveness, "AVAILABLE", False)
    assert told(pg_url) == ("unknown", "ping")


def test_of_engines_that_differ_each_says_its_own_and_the_pool_all(pg_url: str) -> None:
    """They share a pool, and nothing else."""
    with ExitStack() as stack:
        pool_id = new_pid()
        engines = []
        for pings in (False, True):
            engine = create_engine(pg_url, poolclass=QueriesPool, pool_id=pool_id, pool_pre_ping=pings)
            stack.callback(engine.dispose)
            engine.connect().close()
            engines.append(engine)
        own = [engine.pool.statistics().liveness for engine in engines]  # type: ignore[attr-defined]
        assert own == ["poll", "ping"]
        assert PoolManager.statistics().pools[pool_id].liveness == "ping, poll"


@pytest.fixture
def pipe() -> Iterator[Any]:
    """What has a descriptor that is no socket."""
    ends = os.pipe()

    class Handle:
        def fileno(self) -> int:
            return ends[1]

        def close(self) -> None:
            pass

    yield Handle()
    for end in ends:
        os.close(end)


def test_no_failure_is_swallowed(pipe: Any) -> None:
    """To look, to shut down, to end a ping that takes too long, and to follow what was closed."""
    said: list[str] = []

    def failed(what: str, why: object) -> None:
        said.append(what)
        assert why

    assert look(pipe, lambda _: [(0, 1)], failed) is DOUBT
    assert said.pop().startswith("look at a socket")
    assert not hang_up(pipe, failed=failed)
    assert not hang_up(object(), failed=failed)
    PingTimeout(pipe, failed).sweep()
    assert [said.pop() for _ in range(3)] == [SHUT_DOWN] * 3
    lingering = Lingering(lambda *_: None, failed)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        with lingering.closing(pipe, 1.0):
            assert said.pop() == FOLLOW  # no descriptor is left for it
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with lingering.closing(pipe, 1.0):
        pipe.__class__.fileno = lambda self: -1
    assert said == [FOLLOW]


def test_what_cannot_be_seen_is_logged_once_for_a_pool(
    pg_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what that means; another engine of the pool says nothing new."""
    caplog.set_level(logging.INFO, NAME)
    monkeypatch.setattr(liveness, "AVAILABLE", False)
    told(pg_url)
    assert "could not look at sockets on this platform: each checkout pings" in caplog.text
    caplog.clear()
    driver, pool_id = FakeDriver(), new_pid()
    for _ in range(2):
        engine = create_engine(
            "fake://host/database", module=driver, poolclass=QueriesPool, pool_id=pool_id, max_size=5
        )
        for connection in [engine.raw_connection(), engine.raw_connection()]:
            connection.close()
        engine.dispose()
    (text,) = [r.getMessage() for r in caplog.records if "could not" in r.getMessage()]
    assert "could not see the sockets of the driver fake: a ping of what was idle for 0.5 s tells" in text


def test_a_failure_that_comes_again_is_for_debug(caplog: pytest.LogCaptureFixture) -> None:
    """One that can't be mended would fill the log."""
    caplog.set_level(logging.DEBUG, NAME)
    failures = Failures("fake://host/database")
    for _ in range(3):
        failures("shut a connection down", OSError("no socket"))
    failures("look at a socket", "it is a pipe")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "DEBUG", "DEBUG", "INFO"]
    assert caplog.records[0].getMessage() == (
        "fake://host/database: could not shut a connection down: OSError('no socket')"
    )
