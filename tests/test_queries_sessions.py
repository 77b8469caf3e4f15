"""queries' own sessions, on this project's pools and a PostgreSQL server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Observer
from sqlalchemy import make_url
from test_docs import ROOT, URL, blocks, source

from sqla_queries_pool import NoIdleConnectionsError, PoolFullError, PoolManager, pool


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package; its sessions have our pools, which are removed in the end."""
    package = pytest.importorskip("queries")
    before = {found.id for found in PoolManager.pools()}
    monkeypatch.setattr("queries.session.pool", pool)
    if package.TornadoSession is not None:
        monkeypatch.setattr("queries.tornado_session.pool", pool)
    yield package
    for found in PoolManager.pools():
        if found.id not in before:
            found.shutdown()
            PoolManager.clean(found.id)


@pytest.fixture
def uri(pg_url: str) -> str:
    """The test's database, as queries has it."""
    return make_url(pg_url).set(drivername="postgresql").render_as_string(hide_password=False)


def test_a_session_works(queries: Any, uri: str) -> None:
    """Queries, calls, counters; the next session has its connection, and a full pool says so at once."""
    with queries.Session(uri, pool_max_size=1) as session:
        assert session.query("SELECT %(n)s AS n", {"n": 1}).as_dict() == {"n": 1}
        assert session.callproc("mod", [6, 4]).as_dict() == {"mod": 2}
        with pytest.raises(queries.ProgrammingError):
            session.query("SELECT missing")
        backend = session.backend_pid
        with pytest.raises(NoIdleConnectionsError):
            queries.Session(uri)
        report = PoolManager.report()["pools"][session.pid]
        assert (report["executions"], report["exceptions"], report["connections"]["busy"]) == (3, 1, 1)
    assert PoolManager.has_idle_connection(session.pid)
    session = queries.Session(uri)
    assert session.backend_pid == backend
    session.close()
    assert PoolManager.size(session.pid) == 0


def test_a_session_leaves_no_transaction_to_the_next_one(queries: Any, uri: str) -> None:
    """It is rolled back, as the page says."""
    with queries.Session(uri, autocommit=False) as session:
        session.query("CREATE TABLE gone ()")
    with queries.Session(uri) as session:
        assert session.query("SELECT to_regclass('gone') AS t").as_dict() == {"t": None}


def test_a_session_that_is_forgotten_gives_back_its_connection(queries: Any, uri: str) -> None:
    """At once: it ends its use when it is collected."""
    session = queries.Session(uri)
    name = session.pid
    del session
    connections = PoolManager.report()["pools"][name]["connections"]
    assert (connections["idle"], connections["locked"]) == (1, 0)


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_session_whose_server_has_gone_can_be_closed(
    queries: Any, uri: str, pg_observer: Observer, autocommit: bool
) -> None:
    """Without another error, before it was noticed and after; and the next one connects."""
    for noticed in (True, False):
        session = queries.Session(uri, autocommit=autocommit)
        session.query("SELECT 1")
        pg_observer.query("SELECT pg_terminate_backend(%s, 5000)", session.backend_pid)
        if noticed:
            with pytest.raises(queries.OperationalError):
                session.query("SELECT 1")
        session.close()
        assert PoolManager.size(session.pid) == 0


def test_tornado_sessions_work(queries: Any, uri: str) -> None:
    """At once on all connections of a pool; one too many says so, an error comes, and all go back."""
    pytest.importorskip("tornado")

    async def main() -> None:
        session = queries.TornadoSession(uri, pool_max_size=3)
        sql = "SELECT pg_backend_pid() AS pid, pg_sleep(0.05)"
        results = await asyncio.gather(*(session.query(sql) for _ in range(3)))
        assert len({result.as_dict()["pid"] for result in results}) == 3
        with pytest.raises(PoolFullError):
            await session.query("SELECT 1")
        for result in results:
            result.free()
        with pytest.raises(queries.ProgrammingError):
            await session.query("SELECT missing")
        result = await session.callproc("mod", [6, 4])
        assert result.as_dict() == {"mod": 2}
        result.free()
        report = PoolManager.report()["pools"][session.pid]
        assert (report["executions"], report["exceptions"]) == (4, 1)
        assert (report["connections"]["idle"], report["connections"]["open"]) == (3, 3)

    asyncio.run(main())


def test_the_page_shows_how_queries_gets_these_pools(pg_url: str) -> None:
    """Its block runs, with the sessions of both kinds on our manager."""
    pytest.importorskip("queries")
    shown = next(b.text for b in blocks(source("coming-from/queries")) if "sys.modules" in b.text)
    program = (
        shown.replace(URL, pg_url.split("://")[1]) + "assert queries.session.pool.PoolManager is PoolManager"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == "1\n"
