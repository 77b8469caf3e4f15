from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlencode

import inside
import psutil
import psycopg2
import psycopg2.extensions
import pytest
from fakes import Task
from hazards import settled, sleeping_collector
from sqlalchemy import exc, make_url, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.pool import StaticPool

from sqla_queries_pool import CheckoutTimeout, QueriesPool
from sqla_queries_pool.pool import Pool

pytest.importorskip("flask_sqlalchemy")  # an extra that is not there with the oldest SQLAlchemy

from flask import Flask, Response, stream_with_context
from werkzeug.serving import WSGIRequestHandler, make_server

EXAMPLES = Path(__file__).parents[1] / "examples"
Eventually = Callable[..., None]
MakeApp = Callable[..., Flask]

pytestmark = pytest.mark.connection_leaks


def load_example() -> ModuleType:
    """The example as it is, under its own name."""
    spec = importlib.util.spec_from_file_location("flask_app", EXAMPLES / "flask_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flask_app"] = module  # where SQLAlchemy looks up what annotations mean
    spec.loader.exec_module(module)
    return module


example = load_example()
db = example.db


@pytest.fixture
def make_app(pg_url: str) -> Iterator[MakeApp]:
    """`create_app` of the example, with its tables made; at the end of the test its engines are disposed of.

    The URL is the test's own database; `options=…` stands for the engine options of the default engine.
    """
    apps: list[Flask] = []

    def make(url: str = pg_url, options: dict[str, Any] | None = None, **config: Any) -> Flask:
        if options is not None:
            config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        app: Flask = example.create_app(url, **config)
        apps.append(app)
        with app.app_context():
            db.create_all()
        return app

    yield make
    for app in apps:
        dispose(app)


@pytest.fixture
def errors_unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that fail on purpose leave no traceback in the output."""
    monkeypatch.setattr(logging.getLogger("flask_app"), "disabled", True)


def engines_of(app: Flask) -> dict[str | None, Engine]:
    """All engines of an application, by bind; the default one is None's."""
    with app.app_context():
        return dict(db.engines)


def pool_of(app: Flask, bind: str | None = None) -> QueriesPool:
    """The pool of one of its engines."""
    pool = engines_of(app)[bind].pool
    assert isinstance(pool, QueriesPool)
    return pool


def shared_of(app: Flask) -> Pool:
    """What the default engine shares with the others of its database."""
    return inside.shared(pool_of(app))


def dispose(app: Flask) -> None:
    """What one does at the end of an application."""
    for engine in engines_of(app).values():
        engine.dispose()


def use(app: Flask) -> None:
    """Use all three engines, as a test of the application would."""
    client = app.test_client()
    assert client.post("/notes", data={"text": "hello"}).status_code == 201
    assert client.get("/notes").get_json()[0]["text"] == "hello"
    assert json.loads(client.get("/notes/export").text.splitlines()[0])["text"] == "hello"


class Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing."""


class Site(NamedTuple):
    """An application that is being served."""

    port: int

    def ask(self, path: str, **form: str) -> tuple[int, str]:
        """GET a page, or POST a form: `ask("/notes", text="…")`; return the status and the body."""
        with self.connect() as connection:
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST" if form else "GET", path, urlencode(form) or None, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    @contextmanager
    def connect(self) -> Iterator[HTTPConnection]:
        """A client."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            yield connection


@contextmanager
def served(app: Flask) -> Iterator[Site]:
    """Serve an application with a thread per request."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Site(server.port)
    finally:
        server.shutdown()
        thread.join()


def name_of(url: str) -> str:
    """The database of a URL."""
    return str(make_url(url).database)


# -- options ----------------------------------------------------------------------------------------


URL = "postgresql+psycopg2://me@localhost/shop"  # for applications that do not connect


def test_engine_options_reach_the_pool_of_the_default_engine() -> None:
    """All that is ours in SQLALCHEMY_ENGINE_OPTIONS, by the names that `create_engine` has for it."""
    options = {
        "max_size": 7,
        "idle_ttl": 33,
        "pool_timeout": 4,
        "pool_use_lifo": False,
        "pool_id": "of the flask tests",
        "check_limits": False,
    }
    pool = pool_of(example.create_app(URL, SQLALCHEMY_ENGINE_OPTIONS=options))
    assert (pool.size(), pool.timeout(), pool.pid) == (7, 4, "of the flask tests")
    assert (
        inside.attachment(pool).own_ttl,
        inside.setting(pool, "use_lifo"),
        inside.setting(pool, "check_limits"),
    ) == (33, False, False)


def test_the_options_of_the_example_are_those_that_it_states() -> None:
    """Of the default engine and of each bind; the pool class is stated once, for all of them."""
    app = example.create_app(URL)
    pools = {bind: pool_of(app, bind) for bind in engines_of(app)}
    assert {bind: pool.size() for bind, pool in pools.items()} == {None: 10, "exports": 2, "audit": 3}
    ttls = {bind: inside.attachment(pool).own_ttl for bind, pool in pools.items()}
    assert ttls == {None: 60, "exports": 60, "audit": 5}
    assert pools[None].timeout() == 10
    assert pools["exports"].timeout() == 30


def test_queue_pools_options_stand_next_to_the_pool_class(
    make_app: MakeApp, pg_observer: Any, pg_url: str
) -> None:
    """`pool_size` and `max_overflow` add up, and `pool_pre_ping` replaces what the server has ended."""
    options = {"poolclass": QueriesPool, "pool_size": 2, "max_overflow": 1, "pool_pre_ping": True}
    app = make_app(options=options)
    assert pool_of(app).size() == 3
    use(app)
    assert pg_observer.terminate(name_of(pg_url)) == 3
    assert app.test_client().get("/notes").status_code == 200


def test_without_a_pre_ping_a_connection_that_the_server_has_ended_is_replaced_too(
    make_app: MakeApp, pg_observer: Any, pg_url: str
) -> None:
    """Nobody needs `pool_pre_ping` for that here."""
    app = make_app(options={"max_size": 3})
    use(app)
    assert pg_observer.terminate(name_of(pg_url)) == 3
    assert app.test_client().get("/notes").status_code == 200


@pytest.mark.parametrize(("recycle", "kept"), [(0, False), (3600, True)])
def test_pool_recycle_replaces_connections_of_that_age(make_app: MakeApp, recycle: int, kept: bool) -> None:
    """Seen at the server's process behind the connection."""
    app = make_app(options={"max_size": 3, "pool_recycle": recycle})
    pids = []
    for _ in range(2):
        with app.app_context():
            pids.append(db.session.scalar(text("SELECT pg_backend_pid()")))
    assert (pids[0] == pids[1]) is kept


def test_idle_connections_of_an_application_go_away(
    make_app: MakeApp, pg_observer: Any, pg_url: str, eventually: Eventually
) -> None:
    """`idle_ttl` of the options and of a bind, each for its own engine, without a further request."""
    app = make_app(options={"max_size": 3, "idle_ttl": 0.1})
    use(app)
    eventually(lambda: pool_of(app).checkedin() == 0)
    assert pool_of(app, "exports").checkedin() == 1
    dispose(app)
    eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0)


def test_the_url_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `flask run` and gunicorn call the factory; without a URL there is no application."""
    monkeypatch.setenv("DATABASE_URL", URL)
    assert {engine.url.database for engine in engines_of(example.create_app()).values()} == {"shop"}
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(KeyError, match="DATABASE_URL"):
        example.create_app()


def test_a_misspelt_option_is_an_error_where_the_application_is_made() -> None:
    """Not at the first request."""
    with pytest.raises(TypeError, match="max_sise"):
        example.create_app(URL, SQLALCHEMY_ENGINE_OPTIONS={"max_sise": 3})


def test_a_bind_takes_nothing_from_the_engine_options(make_app: MakeApp, pg_url: str) -> None:
    """So what they state is the default engine's alone, and the extension's `engine_options` are for all."""
    app = make_app(
        options={"max_size": 4, "pool_timeout": 1}, SQLALCHEMY_BINDS={"exports": pg_url, "audit": pg_url}
    )
    assert isinstance(engines_of(app)["exports"].pool, QueriesPool)
    assert pool_of(app).timeout() == 1
    assert pool_of(app, "exports").timeout() == 30
    assert pool_of(app, "exports").size() == 4  # states nothing: it is the database's


def test_the_exports_can_not_write(make_app: MakeApp) -> None:
    """Options of a bind that are not the pool's are in force as well, and no other engine has them."""
    app = make_app()
    insert = text("INSERT INTO note (text) VALUES ('x')")
    with (
        engines_of(app)["exports"].begin() as connection,
        pytest.raises(exc.InternalError, match="read-only"),
    ):
        connection.execute(insert)
    with engines_of(app)[None].begin() as connection:
        connection.execute(insert)


# -- binds ------------------------------------------------------------------------------------------


def test_binds_of_one_url_share_one_budget(
    make_app: MakeApp, pg_observer: Any, pg_url: str, eventually: Callable[..., None]
) -> None:
    """What the default engine, exports and audit hold is counted together; no bind exceeds its own."""
    app = make_app(options={"max_size": 4, "pool_timeout": 0})
    engines = engines_of(app)
    assert len({engine.pool.pid for engine in engines.values()}) == 1  # type: ignore[attr-defined]
    for pool in (pool_of(app, "exports"), pool_of(app, "audit")):
        inside.set_timeout(pool, 0)
    held = [engines[bind].connect() for bind in (None, "exports", "exports")]
    with pytest.raises(CheckoutTimeout, match=r"limit 4 \(2 for this engine\)"):
        engines["exports"].connect()
    held.append(engines["audit"].connect())
    assert pg_observer.backends(name_of(pg_url)) == 4

    def error(engine: Any) -> str:
        with pytest.raises(CheckoutTimeout) as raised:
            engine.connect()
        return str(raised.value)

    for engine in engines.values():  # errors within 100 ms share a snapshot
        eventually(lambda: "held 4, opening 0, waiting 0, limit 4" in error(engine))  # noqa: B023
    for connection in held:
        connection.close()


@pytest.fixture
def other_url(pg_url: str, pg_observer: Any) -> Iterator[str]:
    """The URL of a second database."""
    name = f"{name_of(pg_url)}_audit"
    pg_observer.query(f"CREATE DATABASE {name}")
    yield make_url(pg_url).set(database=name).render_as_string(hide_password=False)
    pg_observer.query(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_bind_of_another_database_has_a_budget_of_its_own(
    make_app: MakeApp, pg_observer: Any, pg_url: str, other_url: str
) -> None:
    """`create_app(url, audit_url)`: what audit holds does not count against the other database's limit."""
    app = make_app(audit_url=other_url, options={"max_size": 1})
    engines = engines_of(app)
    pid, audit = pool_of(app).pid, pool_of(app, "audit").pid
    assert pid == pool_of(app, "exports").pid != audit
    assert (inside.pools()[pid].max_size, inside.pools()[audit].max_size) == (2, 3)
    held = [engines[bind].connect() for bind in (None, "exports", "audit", "audit", "audit")]
    assert pg_observer.backends(name_of(pg_url)) == 2
    assert pg_observer.backends(name_of(other_url)) == 3
    for connection in held:
        connection.close()


@pytest.mark.usefixtures("errors_unlogged")
def test_a_request_that_uses_two_binds_at_once_holds_two_connections(make_app: MakeApp, pg_url: str) -> None:
    """It may wait for itself, unless the first transaction ends before the second one begins."""
    options = {"max_size": 1, "pool_timeout": 0}
    binds = {"exports": pg_url, "audit": {"url": pg_url, **options}}
    app = make_app(options=options, SQLALCHEMY_BINDS=binds)

    @app.get("/both/<how>")
    def both(how: str) -> str:
        db.session.scalars(select(example.Note)).all()
        if how == "in-turn":
            db.session.commit()
        db.session.scalars(select(example.AuditEntry)).all()
        return ""

    assert app.test_client().get("/both/at-once").status_code == 503
    assert app.test_client().get("/both/in-turn").status_code == 200
    assert settled(shared_of(app))


# -- a server with threads --------------------------------------------------------------------------

THREADS = 16
LIMIT = 4


class Sockets:
    """Counts the sockets that psycopg2 opens and closes: the server goes on counting one for a moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.open = 0
        self.peak = 0
        self.ended: set[int] = set()
        """The server's processes behind connections that were closed."""

    def opening(self) -> None:
        with self._lock:
            self.open += 1
            self.peak = max(self.peak, self.open)

    def closed(self, pid: int) -> None:
        with self._lock:
            self.open -= 1
            self.ended.add(pid)


@pytest.fixture
def sockets(pg_observer: Any, monkeypatch: pytest.MonkeyPatch) -> Sockets:
    """Count psycopg2's sockets from here on."""
    counts = Sockets()

    class Counted(psycopg2.extensions.connection):
        def close(self) -> None:
            pid, was_closed = self.info.backend_pid, self.closed
            super().close()
            if not was_closed:
                counts.closed(pid)

    connect = psycopg2.connect

    def counted(*arguments: Any, **options: Any) -> Any:
        counts.opening()
        return connect(*arguments, connection_factory=Counted, **options)

    monkeypatch.setattr(psycopg2, "connect", counted)
    return counts


def backends_meanwhile(observer: Any, url: str, sockets: Sockets, tasks: list[Task[Any]]) -> int:
    """The most backends that were seen until all tasks had ended, without those that were closed."""
    most = 0
    while any(task.is_alive() for task in tasks):
        rows = observer.query(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s",
            name_of(url),
        )
        most = max(most, len({pid for (pid,) in rows} - sockets.ended))
    return most


def add_hold(app: Flask) -> Callable[[], None]:
    """Add a page `/hold` that keeps its connection until the returned function is called."""
    go = threading.Event()

    @app.get("/hold")
    def hold() -> str:
        db.session.scalars(select(example.Note)).all()
        assert go.wait(20)
        return "held"

    return go.set


def test_more_threads_than_connections_wait_for_their_turn(
    make_app: MakeApp, pg_observer: Any, pg_url: str, eventually: Eventually
) -> None:
    """16 requests at once, 4 connections: the server has 4 backends while 12 wait, and all are answered."""
    app = make_app(options={"max_size": LIMIT})
    go = add_hold(app)
    shared = shared_of(app)
    with served(app) as site:
        tasks = [Task(lambda: site.ask("/hold")) for _ in range(THREADS)]
        eventually(lambda: shared.numbers.held == LIMIT and shared.numbers.waiting == THREADS - LIMIT)
        eventually(lambda: pg_observer.backends(name_of(pg_url), "idle in transaction") == LIMIT)
        # Those of the other engines gave way; the server forgets them in a moment.
        eventually(lambda: pg_observer.backends(name_of(pg_url)) == LIMIT)
        assert (shared.numbers.held, shared.numbers.waiting) == (LIMIT, THREADS - LIMIT)
        go()
        assert [task.result() for task in tasks] == [(200, "held")] * THREADS
    eventually(lambda: settled(shared), "all sessions returned")
    assert pool_of(app).checkedout() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("errors_unlogged")
def test_under_load_there_are_no_errors_and_never_more_backends_than_max_size(
    make_app: MakeApp, pg_observer: Any, pg_url: str, sockets: Sockets, eventually: Eventually
) -> None:
    """16 threads, 4 connections, all pages of the example, three engines: answered, and all is returned."""
    app = make_app(options={"max_size": LIMIT, "pool_timeout": 30})

    @app.get("/broken")
    def broken() -> str:
        db.session.scalars(select(example.Note)).all()
        raise ValueError("a page that fails with its session in use")

    shared = shared_of(app)

    def visit(number: int) -> list[int]:
        statuses = []
        for _ in range(5):
            statuses.append(site.ask("/notes", text=f"of thread {number}")[0])
            statuses += [site.ask(path)[0] for path in ("/notes", "/notes/export", "/broken", "/pool")]
        return statuses

    with served(app) as site:
        tasks = [Task(lambda number=number: visit(number)) for number in range(THREADS)]  # type: ignore[misc]
        most = backends_meanwhile(pg_observer, pg_url, sockets, tasks)
        for task in tasks:
            assert task.result() == [201, 200, 200, 500, 200] * 5
        status = site.ask("/pool")[1]
        assert len(site.ask("/notes/export")[1].splitlines()) == THREADS * 5
    assert most == sockets.peak == LIMIT
    eventually(lambda: settled(shared), "all sessions returned")
    assert {bind: pool_of(app, bind).checkedout() for bind in engines_of(app)} == {
        None: 0, "exports": 0, "audit": 0,
    }  # fmt: skip
    assert re.search(r"held \d, idle \d, opening 0, waiting 0, limit 4; this engine: size 4", status)


def test_an_exhausted_pool_is_answered_with_503_and_says_in_the_log_who_has_it(
    make_app: MakeApp, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """The error handler of the example; the answer itself tells nobody who the server's user is."""
    app = make_app(options={"max_size": 2, "pool_timeout": 0.05})
    go = add_hold(app)
    shared = shared_of(app)
    with served(app) as site:
        tasks = [Task(lambda: site.ask("/hold")) for _ in range(2)]
        eventually(lambda: shared.numbers.held == 2)
        assert site.ask("/notes") == (503, "busy, please try again\n")
        go()
        for task in tasks:
            task.result()
    (record,) = [record for record in caplog.records if record.name == app.logger.name]
    assert "Held by, longest first: Thread-" in record.message


@pytest.mark.usefixtures("errors_unlogged")
def test_a_page_that_raises_returns_its_session(make_app: MakeApp, eventually: Eventually) -> None:
    """In the middle of a transaction; what it had written is rolled back."""
    app = make_app(options={"max_size": 2})

    @app.get("/broken")
    def broken() -> str:
        db.session.add(example.Note(text="never seen"))
        db.session.flush()
        raise ValueError("no luck")

    with served(app) as site:
        assert [site.ask("/broken")[0] for _ in range(3)] == [500] * 3
        eventually(lambda: settled(shared_of(app)), "all sessions returned")
        assert site.ask("/notes") == (200, "[]\n")


@pytest.mark.usefixtures("errors_unlogged")
def test_a_statement_that_fails_returns_its_session(make_app: MakeApp, eventually: Eventually) -> None:
    """The transaction that PostgreSQL has aborted does not reach the next request."""
    app = make_app(options={"max_size": 1})

    @app.get("/wrong")
    def wrong() -> str:
        db.session.execute(text("SELECT 1 / 0"))
        return ""

    with served(app) as site:
        assert site.ask("/wrong")[0] == 500
        assert site.ask("/notes")[0] == 200
        eventually(lambda: settled(shared_of(app)), "all sessions returned")


def add_notes(app: Flask) -> None:
    """2000 notes, 20 MB: more than sockets buffer, so that nobody can send them before they are read."""
    with engines_of(app)[None].begin() as connection:
        connection.execute(
            text("INSERT INTO note (text) SELECT repeat('x', 10000) FROM generate_series(1, 2000)")
        )


def test_a_streamed_export_holds_one_connection_until_its_end(
    make_app: MakeApp, eventually: Eventually
) -> None:
    """And all its lines come out, although the view has long returned."""
    app = make_app(options={"max_size": 3})
    add_notes(app)
    pool = pool_of(app, "exports")
    response = app.test_client().get("/notes/export")
    lines = response.iter_encoded()
    next(lines)
    assert pool.checkedout() == 1
    assert len(list(lines)) == 1999
    response.close()
    eventually(lambda: pool.checkedout() == 0)


def test_a_client_that_goes_away_in_a_stream_leaves_no_connection_out(
    make_app: MakeApp, eventually: Eventually
) -> None:
    """Three times with two connections for exports, so that one that stays out would be missed."""
    app = make_app(options={"max_size": 3})
    add_notes(app)
    pool = pool_of(app, "exports")
    with served(app) as site:
        for _ in range(3):
            with site.connect() as connection:
                connection.request("GET", "/notes/export")
                assert connection.getresponse().read(10)
                assert pool.checkedout() == 1
            eventually(lambda: pool.checkedout() == 0, "the connection returned")
        assert len(site.ask("/notes/export")[1].splitlines()) == 2000


@pytest.mark.slow
def test_more_exports_than_their_bind_may_have_leave_the_rest_to_others(
    make_app: MakeApp, eventually: Eventually
) -> None:
    """Slow clients keep the two connections of the exports; every other page is answered."""
    app = make_app(options={"max_size": 3})
    add_notes(app)
    pool = pool_of(app, "exports")
    with served(app) as site:
        slow = [HTTPConnection("127.0.0.1", site.port, timeout=30) for _ in range(4)]
        for connection in slow[:2]:  # who is read first has to be first in the queue
            connection.request("GET", "/notes/export")
        eventually(lambda: pool.checkedout() == 2)
        for connection in slow[2:]:
            connection.request("GET", "/notes/export")
        eventually(lambda: shared_of(app).numbers.waiting == 2)
        assert site.ask("/notes", text="still here")[0] == 201
        for connection in slow:
            assert len(connection.getresponse().read().splitlines()) >= 2000
            connection.close()
        eventually(lambda: settled(shared_of(app)))


def test_a_session_that_is_used_within_a_stream_is_returned_by_the_teardown_at_its_end(
    make_app: MakeApp, eventually: Eventually
) -> None:
    """With `stream_with_context`: begun in the generator, and returned also if the client stops half way."""
    app = make_app(options={"max_size": 2})

    @app.get("/stream")
    def stream() -> Response:
        @stream_with_context
        def lines() -> Iterator[str]:
            for number in range(10):
                yield f"{db.session.scalar(text('SELECT 1')) + number}\n"

        return Response(lines())  # type: ignore[call-arg]

    with served(app) as site:
        assert site.ask("/stream") == (200, "".join(f"{number}\n" for number in range(1, 11)))
        eventually(lambda: settled(shared_of(app)), "all sessions returned")
    response = app.test_client().get("/stream")
    next(response.iter_encoded())
    assert pool_of(app).checkedout() == 1
    response.close()
    eventually(lambda: settled(shared_of(app)), "the session returned")


# -- applications that come and go ------------------------------------------------------------------

APPS = 30


@pytest.mark.slow
def test_applications_that_are_disposed_of_leave_nothing(
    make_app: MakeApp, pg_observer: Any, pg_url: str, eventually: Eventually
) -> None:
    """30 times made, used, disposed of and dropped: no backend, no socket, no entry in the PoolManager."""
    before = set(inside.pools())
    pid = ""
    for _ in range(APPS):
        app = example.create_app(pg_url, SQLALCHEMY_ENGINE_OPTIONS={"max_size": 4, "idle_ttl": 1})
        pid = pool_of(app).pid
        with app.app_context():
            db.create_all()
        use(app)
        dispose(app)
        del app
        assert set(inside.pools()) - before == {pid}
    eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0, "all backends gone")
    eventually(lambda: gone({pid}), "the entry gone")


def gone(pids: set[str]) -> bool:
    """Are the engines collected, and then the pools left?  A thread of the pool's may have one in hand."""
    gc.collect()
    return not pids & set(inside.pools())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_applications_that_are_merely_dropped_stay_within_the_budget_and_go_with_the_collector(
    pg_observer: Any, pg_url: str, sockets: Sockets, eventually: Eventually
) -> None:
    """30 applications are garbage that nobody has collected, and have no more connections than one may have.

    Then the collector runs, and nothing is left.
    """
    before = set(inside.pools())
    with sleeping_collector():
        for _ in range(APPS):
            app = example.create_app(pg_url, SQLALCHEMY_ENGINE_OPTIONS={"max_size": 4, "idle_ttl": 1})
            pid = pool_of(app).pid
            shared = shared_of(app)
            with app.app_context():
                db.create_all()
            use(app)
            del app
        assert len(inside.ledger(shared).attachments) == 3 * APPS, (
            "they are alive, as far as the pool can see"
        )
        assert sockets.peak == 4
        assert set(inside.pools()) - before == {pid}
        eventually(lambda: gone({pid}), "the entry gone")
        eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0, "all backends gone")
        eventually(lambda: sockets.open == 0, "all sockets closed")
        eventually(lambda: not inside.ledger(shared).attachments, "all engines forgotten")


@pytest.mark.slow
def test_applications_with_a_database_each_leave_no_entry_each(
    tmp_path: Path, eventually: Eventually
) -> None:
    """30 SQLite files, a bind's among them: neither open files nor entries of the PoolManager pile up."""
    before = set(inside.pools())
    for number in range(APPS):
        app = example.create_app(
            f"sqlite:///{tmp_path}/{number}.db",
            SQLALCHEMY_ENGINE_OPTIONS={"max_size": 4, "idle_ttl": 1},
        )
        with app.app_context():
            db.create_all()
        use(app)
        if number % 2:
            dispose(app)
        del app
    gc.collect()
    process = psutil.Process()
    eventually(
        lambda: not [f for f in process.open_files() if f.path.startswith(str(tmp_path))], "files closed"
    )
    eventually(lambda: gone(set(inside.pools()) - before), "the entries gone")


def test_living_applications_of_one_url_share_the_budget(
    make_app: MakeApp, pg_observer: Any, pg_url: str, eventually: Eventually
) -> None:
    """Three of them, at 4 each, have 4 together, and the one that waits gets what another returns."""
    apps = [make_app(options={"max_size": 4}) for _ in range(3)]
    shared = shared_of(apps[0])
    assert all(shared_of(app) is shared for app in apps)
    held = [engines_of(app)[None].connect() for app in apps]
    held.append(engines_of(apps[0])[None].connect())
    client = apps[2].test_client()
    task = Task(lambda: client.get("/notes").status_code)
    eventually(lambda: shared.numbers.waiting == 1)
    assert shared.numbers.open == 4
    held.pop().close()
    assert task.result() == 200
    for connection in held:
        connection.close()
    eventually(lambda: pg_observer.backends(name_of(pg_url)) <= 4)


def test_an_application_that_is_disposed_of_works_on(make_app: MakeApp) -> None:
    """As an engine does: the next request connects again, with the same limit."""
    app = make_app(options={"max_size": 4})
    for _ in range(3):
        dispose(app)
        use(app)
    assert pool_of(app).size() == 4


def configured_by_url(url: str) -> Flask:
    """The example with a URL alone: no engine options, and binds that are URLs."""
    app: Flask = example.create_app(
        url, SQLALCHEMY_ENGINE_OPTIONS={}, SQLALCHEMY_BINDS={"exports": url, "audit": url}
    )
    return app


# -- SQLite -----------------------------------------------------------------------------------------


def test_an_in_memory_sqlite_database_has_flask_sqlalchemys_static_pool() -> None:
    """It overrules the pool class: right for SQLite, one connection for all threads."""
    app = configured_by_url("sqlite://")
    assert [type(engine.pool) for engine in engines_of(app).values()] == [StaticPool] * 3
    with app.app_context():
        db.create_all()
    assert app.test_client().post("/notes", data={"text": "hello"}).status_code == 201
    with served(app) as site:
        assert json.loads(site.ask("/notes")[1]) == [{"id": 1, "text": "hello"}]
    dispose(app)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_our_options_with_an_in_memory_sqlite_database_are_an_error(url: str) -> None:
    """SQLAlchemy's, at once: that StaticPool does not know them."""
    with pytest.raises(TypeError, match=r"Invalid argument.*'max_size'.*StaticPool"):
        example.create_app(url)


def test_an_sqlite_file_has_the_pool_with_all_options(tmp_path: Path) -> None:
    """And so is what tests should take that are to have the pool of production."""
    app = example.create_app(f"sqlite:///{tmp_path}/shop.db")
    with app.app_context():
        db.create_all()
    use(app)
    assert pool_of(app).size() == 10
    with served(app) as site:
        tasks = [Task(lambda: site.ask("/notes")[0]) for _ in range(THREADS)]
        assert [task.result() for task in tasks] == [200] * THREADS
    dispose(app)


# -- the URL plugin ---------------------------------------------------------------------------------


def test_a_url_alone_configures_the_pool(pg_url: str, pg_observer: Any, eventually: Eventually) -> None:
    """`plugin=queries` in SQLALCHEMY_DATABASE_URI, and in a bind's URL; all share one limit."""
    app = configured_by_url(f"{pg_url}?plugin=queries&max_size=3&idle_ttl=45&pool_timeout=5")
    for bind in engines_of(app):
        pool = pool_of(app, bind)
        assert (pool.size(), inside.attachment(pool).own_ttl, pool.timeout()) == (3, 45, 5)
        assert inside.shared(pool) is shared_of(app)
    with app.app_context():
        db.create_all()
    use(app)
    assert 1 <= pg_observer.backends(name_of(pg_url)) <= 3
    dispose(app)


def test_a_parameter_in_the_url_wins_over_the_engine_options() -> None:
    """Who may change the URL alone can."""
    assert pool_of(example.create_app(f"{URL}?plugin=queries&max_size=3")).size() == 3


@pytest.mark.parametrize("echo_pool", ["true", "debug"])
def test_the_urls_echo_pool_works_although_flask_sqlalchemy_always_states_one(echo_pool: str) -> None:
    """Flask-SQLAlchemy passes `echo_pool=False` to every engine, which nobody has written."""
    app = configured_by_url(f"{URL}?plugin=queries&echo_pool={echo_pool}")
    assert pool_of(app).echo


def test_a_url_with_the_plugin_may_name_an_in_memory_sqlite_database() -> None:
    """Flask-SQLAlchemy's StaticPool is stated in code and stays; the parameters are taken off the URL."""
    app = configured_by_url("sqlite:///:memory:?plugin=queries&max_size=3")
    assert isinstance(engines_of(app)[None].pool, StaticPool)
    with app.app_context():
        db.create_all()
        assert db.session.scalars(select(example.Note)).all() == []
    dispose(app)


# -- the program ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("own_server", [False, True], ids=["DATABASE_URL", "without DATABASE_URL"])
def test_the_example_is_a_program(
    own_server: bool, pg_url: str, pg_observer: Any, eventually: Eventually, tmp_path: Path
) -> None:
    """`python examples/flask_app.py` serves until it is interrupted, and leaves no connection."""
    environment = {**os.environ, "PORT": "0", "DATABASE_URL": pg_url}
    if own_server:
        del environment["DATABASE_URL"]
    log = tmp_path / "log"
    command = [sys.executable, str(EXAMPLES / "flask_app.py")]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stderr=file)
    try:
        running = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")
        eventually(lambda: running.search(log.read_text()) or process.poll() is not None, "it serves", 60)
        assert process.returncode is None, log.read_text()
        site = Site(int(running.findall(log.read_text())[0]))
        assert site.ask("/notes", text="hello")[0] == 201
        assert "limit 10; this engine: size 10" in site.ask("/pool")[1]
        assert (pg_observer.backends(name_of(pg_url)) == 0) is own_server
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    eventually(lambda: pg_observer.backends(name_of(pg_url)) == 0)
