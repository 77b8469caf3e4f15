"""``check_limits``: one question to the server in the background, and one warning, or none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from conftest import Observer, SessionServer
from pgbouncer import PROGRAM, PgBouncer
from sqlalchemy import Engine, create_engine, make_url, text

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.budget import ages
from sqla_queries_pool.engine import limits
from sqla_queries_pool.engine.limits import Room, processes, warning

Eventually = Callable[..., None]
ROOM = Room(100, 3, -1, -1, 7, 1)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is asked as soon as there is an idle connection, by a process that is alone.

    The processes of the test run itself are as alike as an application's workers.
    """
    monkeypatch.setattr(limits, "ASK_AFTER", 0.01)
    monkeypatch.setattr(limits, "processes", lambda: 1)


@pytest.fixture
def limited(pg_server: SessionServer, pg_observer: Observer, pg_url: str) -> Iterator[str]:
    """The URL of a role that may have three connections."""
    name = make_url(pg_url).database
    pg_observer.query(f"CREATE ROLE limited_{name} LOGIN PASSWORD 'secret' CONNECTION LIMIT 3")
    yield make_url(pg_url).set(username=f"limited_{name}", password="secret").render_as_string(False)
    sql = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s"
    pg_observer.query(sql, f"limited_{name}")
    pg_observer.query(f"DROP ROLE limited_{name}")


def asked(engine: Engine, eventually: Eventually) -> None:
    """Use a connection, wait until the question was asked and answered."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    pool: Any = engine.pool
    eventually(lambda: inside.is_checked(pool), "the question is asked")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about limits."""
    return [r.getMessage() for r in caplog.records if "more than the server has room for" in r.getMessage()]


def test_a_limit_that_does_not_fit_is_told_once(
    limited: str, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """With the numbers, and what to write."""
    engine = create_engine(limited, poolclass=QueriesPool, max_size=5)
    other = create_engine(limited, poolclass=QueriesPool, max_size=4)
    with caplog.at_level(logging.WARNING):
        asked(engine, eventually)
        asked(other, eventually)
    (told,) = said(caplog)
    assert "max_size=5 is more than the server has room for, 3: max_connections is 100, of which 3" in told
    assert "the role's limit is 3" in told
    assert "Write max_size=3, or raise that limit" in told
    assert "secret" not in told
    engine.dispose()
    other.dispose()


def test_the_connection_that_is_asked_is_not_checked_out(pg_url: str) -> None:
    """A test for leaks would take it for one: it counts as idle meanwhile."""
    engine = create_engine(pg_url, poolclass=QueriesPool, check_limits=False)
    engine.connect().close()
    pool: Any = engine.pool
    ledger = inside.ledger(pool)
    before = pool.statistics()
    entry, since = inside.decide(pool, ages.borrow, ledger, inside.attachment(pool))
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    assert pool.statistics() == before
    inside.decide(pool, ages.give_borrowed, ledger, entry.slot, entry, since, inside.now(pool))
    assert pool.statistics() == before
    assert pool.audit().mended == ()
    engine.dispose()


@pytest.mark.parametrize("options", [{"max_size": 3}, {"max_size": 5, "check_limits": False}])
def test_what_fits_or_is_not_asked_for_is_not_told(
    options: Any, limited: str, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """Nor is anything done for it."""
    engine = create_engine(limited, poolclass=QueriesPool, **options)
    if options.get("check_limits", True):
        asked(engine, eventually)
    else:
        with engine.connect():
            pass
    assert said(caplog) == []
    pool: Any = engine.pool
    assert pool.statistics().connects == 1
    engine.dispose()


def test_a_connection_stays_idle_for_as_long_as_before(limited: str, eventually: Eventually) -> None:
    """Nobody has used it: it counts as no checkout, and is in no transaction."""
    engine = create_engine(limited, poolclass=QueriesPool, max_size=5)
    asked(engine, eventually)
    pool: Any = engine.pool
    assert (pool.checkedin(), pool.statistics().peak_held, pool.statistics().checkouts) == (1, 1, 1)
    with engine.connect() as connection:
        info: Any = connection.connection.driver_connection
        assert info.info.transaction_status == 0
    engine.dispose()


def test_a_limit_that_was_raised_is_asked_for_again(
    limited: str, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """By the first connection that is opened after that; and not for one that was lowered."""
    engine = create_engine(limited, poolclass=QueriesPool, max_size=2)
    with caplog.at_level(logging.WARNING):
        asked(engine, eventually)
        assert said(caplog) == []
        larger = create_engine(limited, poolclass=QueriesPool, max_size=7)
        asked(larger, eventually)
        eventually(lambda: said(caplog))
        pool: Any = larger.pool
        PoolManager.set_max_size(pool.pid, 6)
        larger.dispose()
        asked(larger, eventually)
    (told,) = said(caplog)
    assert "max_size=7 is more than the server has room for, 3" in told
    engine.dispose()
    larger.dispose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_asks_for_itself(limited: str, eventually: Eventually) -> None:
    """A server that loads the application first has asked when it was alone: its workers are more."""
    engine = create_engine(limited, poolclass=QueriesPool, max_size=5)
    asked(engine, eventually)
    pool: Any = engine.pool
    child = os.fork()
    if child == 0:
        try:
            before = inside.is_checked(pool)
            asked(engine, eventually)
            os._exit(1 if before else 0)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.dispose()


@pytest.mark.skipif(PROGRAM is None, reason="there is no PgBouncer")
def test_behind_pgbouncer_nothing_is_said(
    pg_own_server: Callable[..., Any], caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """The server's limits are PgBouncer's affair."""
    server = pg_own_server(max_connections="8")
    with PgBouncer(server, {"pool_mode": "transaction", "default_pool_size": 2}) as bouncer:
        engine = create_engine(bouncer.url(), poolclass=QueriesPool, max_size=50)
        asked(engine, eventually)
        engine.dispose()
    assert said(caplog) == []
    direct = create_engine(server.url(), poolclass=QueriesPool, max_size=50)
    asked(direct, eventually)
    direct.dispose()
    assert len(said(caplog)) == 1


def test_what_the_user_may_not_know_is_not_told(
    limited: str, caplog: pytest.LogCaptureFixture, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the server is nobody's, and the connection is as good as before."""
    monkeypatch.setattr(limits, "QUERY", "SELECT * FROM pg_authid")
    engine = create_engine(limited, poolclass=QueriesPool, max_size=50)
    asked(engine, eventually)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    pool: Any = engine.pool
    assert pool.statistics().connects == 1
    assert said(caplog) == []
    engine.dispose()


@pytest.mark.parametrize(
    ("room", "size", "count", "shared", "words"),
    [
        (ROOM, 97, 1, False, None),
        (ROOM, 98, 1, False, "Write max_size=97"),
        (ROOM, 12, 8, False, None),
        (ROOM, 13, 8, False, 'Write share="host" and max_size=97 for all of them, or max_size=12'),
        (ROOM._replace(of_role=5), 1, 8, False, 'Write share="host" and max_size=5, or'),
        (ROOM._replace(of_role=5), 6, 1, True, "the limit of the host, max_size=6, is more"),
        (ROOM._replace(of_database=5), 6, 1, False, "the database's limit is 5"),
        (ROOM._replace(of_role=5), 5, 1, True, None),
    ],
)
def test_what_is_said(room: Room, size: int, count: int, shared: bool, words: str | None) -> None:
    """All numbers, and what to write."""
    told = warning(room, size, count, shared)
    assert told is None if words is None else words in str(told)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell")
def test_processes_of_one_program_are_counted() -> None:
    """Those that their parent has started in the same way; numbers make no difference."""
    code = (
        "import subprocess, sys\n"
        "code = 'import sys; from sqla_queries_pool.engine.limits import processes;'"
        "'sys.stdin.readline(); print(processes(), flush=True); sys.stdin.readline()'\n"
        "pipes = {'stdin': -1, 'stdout': -1, 'text': True}\n"
        "start = lambda n: subprocess.Popen([sys.executable, '-c', code, f'fd={n}'], **pipes)\n"
        "several = [start(n) for n in range(3)]\n"
        "several[0].stdin.write('go\\n'); several[0].stdin.flush(); print(several[0].stdout.readline())\n"
        "for each in several: each.communicate()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    assert processes() >= 1
