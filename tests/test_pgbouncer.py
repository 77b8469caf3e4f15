"""Behind PgBouncer: a real one, in both of its modes, with what goes away behind it and in front of it.

Here ``max_size`` limits the clients that PgBouncer has, not what the server has.  What each setting does to
the pool, and the numbers of docs/recipes/pgbouncer.rst, are from these tests (``pytest -s``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import inside
import psycopg2
import pytest
from conftest import observer
from fakes import SECONDS, Task
from pgbouncer import PROGRAM, PgBouncer
from sqlalchemy import Connection, Engine, create_engine, event, exc, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqla_queries_pool import CheckoutTimeout, QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.sockets.connect_errors import passes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer (Debian: apt-get install pgbouncer)"),
]

Eventually = Callable[..., None]
Start = Callable[..., PgBouncer]
New = Callable[..., Engine]

THREADS = 16
CHECKOUTS = 1000
ROUNDS = 4
DATABASE = "shop"
BACKEND = text("SELECT pg_backend_pid()")
# Of both drivers each error is a DBAPIError; an OperationalError where PgBouncer, or the server, hangs up.
LOST = exc.OperationalError

OURS = {"listen_addr", "listen_port", "auth_file"}
"""Settings that are the launcher's, whatever the page shows."""

each_mode = pytest.mark.parametrize("mode", ["transaction", "session"])
each_driver = pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """One for the module: nobody else minds that it restarts."""
    with EmbeddedPostgres() as server:
        with observer(server) as look:
            look.query(f"CREATE DATABASE {DATABASE}")
        yield server


def backends(server: EmbeddedPostgres) -> int:
    """How many connections PgBouncer has to the server."""
    with observer(server) as look:
        return look.backends(DATABASE)


@pytest.fixture
def start(server: EmbeddedPostgres) -> Iterator[Start]:
    """Start a PgBouncer for this test: `start(mode, default_pool_size=4)`."""
    with ExitStack() as stack:

        def started(mode: str, **settings: object) -> PgBouncer:
            settings = {"default_pool_size": THREADS, "server_login_retry": 1} | settings
            return stack.enter_context(PgBouncer(server, {"pool_mode": mode, **settings}))

        yield started


@pytest.fixture
def new(start: Start) -> Iterator[New]:
    """Make an engine behind a PgBouncer: `new(bouncer)`; disposed of before that one ends."""
    engines: list[Engine] = []

    def engine(bouncer: PgBouncer, driver: str = "psycopg2", **kw: Any) -> Engine:
        if driver == "psycopg":
            kw = {"connect_args": {"prepare_threshold": None}} | kw
        url = bouncer.url(driver, DATABASE)
        engines.append(create_engine(url, poolclass=QueriesPool, **{"max_size": THREADS} | kw))
        return engines[-1]

    yield engine
    for one in engines:
        one.dispose()


def clients(bouncer: PgBouncer) -> int:
    """How many clients PgBouncer has, its console apart."""
    return sum(row["database"] == DATABASE for row in bouncer.admin("SHOW CLIENTS"))


def answers(bouncer: PgBouncer) -> bool:
    """Is a client that comes now served?"""
    engine = create_engine(bouncer.url("psycopg2", DATABASE), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            return bool(connection.execute(text("SELECT 1")).scalar())
    except exc.DBAPIError:
        return False


def pool(bouncer: PgBouncer) -> dict[str, Any]:
    """PgBouncer's pool of the database; `cl_` counts clients, `sv_` connections to the server."""
    return next(row for row in bouncer.admin("SHOW POOLS") if row["database"] == DATABASE)


def use(engine: Engine) -> int:
    """One checkout, with a statement: whose session it was."""
    with engine.connect() as connection:
        return int(connection.scalar(BACKEND) or 0)


def fill(engine: Engine, number: int = THREADS) -> None:
    """Have so many idle connections."""
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(engine.connect()).scalar(BACKEND)


def crowd(engine: Engine, checkouts: int = CHECKOUTS // ROUNDS) -> list[str]:
    """16 threads share so many checkouts, with a statement each; what went wrong."""
    tickets = itertools.count()
    errors: list[str] = []

    def work() -> None:
        while next(tickets) < checkouts:
            try:
                use(engine)
            except Exception as error:
                errors.append(repr(error))

    for task in [Task(work) for _ in range(THREADS)]:
        task.result()
    return errors


async def tasks(bouncer: PgBouncer, connect_args: dict[str, Any]) -> None:
    """64 tasks at once on 16 connections to PgBouncer, four times, each with a statement of its own."""
    url = bouncer.url("asyncpg", DATABASE)
    engine = create_async_engine(url, poolclass=QueriesPool, max_size=THREADS, connect_args=connect_args)

    async def one(number: int) -> None:
        async with engine.connect() as connection:
            statement = text(f"SELECT CAST(:number AS INTEGER) + {number}")
            assert await connection.scalar(statement, {"number": number}) == 2 * number

    try:
        for _ in range(ROUNDS):
            await asyncio.gather(*map(one, range(64)))
    finally:
        await engine.dispose()


@pytest.mark.exhaustive
def test_asyncpg_works_in_transaction_mode_with_the_settings_of_the_page(start: Start) -> None:
    """With its defaults it meets statements that other clients have prepared."""
    pytest.importorskip("asyncpg")
    bouncer = start("transaction", default_pool_size=2, server_reset_query_always=1)
    no_cache = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    asyncio.run(tasks(bouncer, no_cache | {"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__"}))
    bouncer = start("transaction", default_pool_size=2)
    with pytest.raises(exc.DBAPIError, match="prepared statement"):
        asyncio.run(tasks(bouncer, {}))


def change(bouncer: PgBouncer, setting: str, value: int) -> None:
    """From now on.  A limit that is a test's subject is set when it is its turn: a busy machine may break it
    before."""
    bouncer.admin(f"SET {setting} = {value}")


def waiting(engine: Engine) -> int:
    """How many wait for a connection of the pool."""
    return int(inside.shared(engine.pool).numbers.waiting)


# -- the pool does what it does without -------------------------------------------------------------


@each_mode
@each_driver
def test_the_clients_of_all_engines_stay_within_one_limit(
    mode: str, driver: str, start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """Three engines, `max_size` 4: PgBouncer has four clients, and four connections to the server."""
    bouncer = start(mode)
    engines = [new(bouncer, driver, max_size=4, pool_timeout=0.2) for _ in range(3)]
    with ExitStack() as stack:
        for _, engine in zip(range(4), itertools.cycle(engines), strict=False):
            stack.enter_context(engine.connect()).scalar(BACKEND)
        assert (clients(bouncer), backends(server)) == (4, 4)
        for engine in engines:
            with pytest.raises(CheckoutTimeout, match="held 4"):
                engine.connect()
        assert clients(bouncer) == 4
    eventually(lambda: pool(bouncer)["cl_waiting"] == 0, "nobody waits in PgBouncer")
    assert clients(bouncer) == 4
    patient = [new(bouncer, driver, max_size=4) for _ in range(3)]
    assert [error for engine in patient for error in crowd(engine, 100)] == []
    eventually(lambda: clients(bouncer) <= 4, "the limit is kept")


@each_mode
def test_waiting_checkouts_are_served_in_order(
    mode: str, start: Start, new: New, eventually: Eventually
) -> None:
    """One connection, eight threads that came one after the other: they have it in that order."""
    engine = new(start(mode), max_size=1)
    order: list[int] = []

    def want(number: int) -> None:
        with engine.connect() as connection:
            connection.scalar(BACKEND)
            order.append(number)

    with engine.connect() as connection:
        connection.scalar(BACKEND)
        tasks = []
        for number in range(8):
            tasks.append(Task(partial(want, number)))
            eventually(lambda n=number: waiting(engine) == n + 1, "the next one waits")
    for task in tasks:
        task.result()
    assert order == list(range(8))


@each_mode
def test_idle_clients_go_after_the_ttl_and_the_servers_connections_stay_with_pgbouncer(
    mode: str, start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """`idle_ttl` closes clients; their servers are then free for others, and are PgBouncer's to close."""
    bouncer = start(mode, server_idle_timeout=0)
    engine = new(bouncer, idle_ttl=0.5)
    fill(engine, 6)
    eventually(lambda: clients(bouncer) == 0, "all idle clients closed")
    eventually(lambda: pool(bouncer)["sv_idle"] == 6, "all servers free")
    assert backends(server) == 6


@each_mode
def test_a_returned_connection_gives_its_server_back_in_transaction_mode_alone(
    mode: str, start: Start, new: New, eventually: Eventually
) -> None:
    """The pool's rollback ends the transaction; in session mode an idle client keeps its server.

    The second engine has a pool of its own, as if it were in another process.
    """
    bouncer = start(mode, default_pool_size=1)
    first, second = new(bouncer), new(bouncer, pool_id="another process", pool_timeout=1)
    with closing(first.raw_connection()) as raw:  # an engine's connection would roll back by itself
        cursor = raw.cursor()
        cursor.execute("SELECT pg_backend_pid()")
        backend = (cursor.fetchone() or [None])[0]
        assert pool(bouncer)["sv_active"] == 1
    assert clients(bouncer) == 1
    if mode == "transaction":
        eventually(lambda: pool(bouncer)["sv_active"] == 0, "the server is free")
        assert use(second) == backend
        return
    assert pool(bouncer)["sv_active"] == 1
    change(bouncer, "query_wait_timeout", 1)
    with pytest.raises(LOST):
        use(second)
    change(bouncer, "query_wait_timeout", 120)
    first.dispose()
    eventually(lambda: pool(bouncer)["sv_active"] == 0, "the server is free")
    assert use(second) == backend


# -- something goes away ------------------------------------------------------------------------------


@each_driver
def test_what_client_idle_timeout_has_closed_is_found_before_it_is_used(
    driver: str, start: Start, new: New, eventually: Eventually
) -> None:
    """`client_idle_timeout` below `idle_ttl`, 16 idle clients: no error in 1,000 checkouts."""
    bouncer = start("transaction")
    engine = new(bouncer, driver, idle_ttl=None)
    fill(engine)
    assert clients(bouncer) == THREADS
    change(bouncer, "client_idle_timeout", 1)
    eventually(lambda: clients(bouncer) == 0, "all closed")
    assert engine.pool.checkedin() == THREADS  # type: ignore[attr-defined]
    assert crowd(engine, CHECKOUTS) == []


def test_client_idle_timeout_leaves_clients_with_a_server_alone(
    start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """In session mode, that is who has ever run a statement: nothing but `idle_ttl` ends those.

    A client that never ran one tells when it is time.
    """
    bouncer = start("session")
    engine = new(bouncer, idle_ttl=None)
    fill(engine, 1)
    mine = addresses(bouncer)
    url = make_url(bouncer.url(database=DATABASE)).set(drivername="postgresql")
    with closing(psycopg2.connect(url.render_as_string(hide_password=False))):
        assert clients(bouncer) == 2
        change(bouncer, "client_idle_timeout", 1)
        eventually(lambda: clients(bouncer) == 1, "it was closed")
    assert addresses(bouncer) == mine


@each_mode
def test_an_idle_ttl_below_client_idle_timeout_leaves_nothing_for_it(
    mode: str, start: Start, new: New, eventually: Eventually
) -> None:
    """All are closed by the pool, none by PgBouncer."""
    bouncer = start(mode, client_idle_timeout=30)
    fill(new(bouncer, idle_ttl=0.5))
    eventually(lambda: clients(bouncer) == 0, "all closed")
    assert bouncer.log().count("closing because: client close request") >= THREADS
    assert "closing because: client_idle_timeout" not in bouncer.log()


EVENTS: dict[str, Callable[[EmbeddedPostgres, PgBouncer], object]] = {
    "PgBouncer restarts": lambda server, bouncer: bouncer.restart(),
    "the server restarts, fast": lambda server, bouncer: server.restart("fast"),
    "the server restarts, immediate": lambda server, bouncer: server.restart("immediate"),
    "the server's backends are terminated": lambda server, bouncer: terminate(server),
}


def terminate(server: EmbeddedPostgres) -> None:
    """End what PgBouncer has of the server."""
    with observer(server) as look:
        sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"
        assert look.query(sql, DATABASE)[0][0] > 0


@each_mode
@each_driver
@pytest.mark.parametrize("what", EVENTS)
def test_no_checkout_surfaces_an_error_once_it_is_up_again(
    what: str,
    mode: str,
    driver: str,
    start: Start,
    new: New,
    server: EmbeddedPostgres,
    eventually: Eventually,
) -> None:
    """16 threads, 1,000 checkouts in four rounds; before each something goes and comes back.

    In session mode the clients are lost with their servers, which is seen before they are used.  In
    transaction mode the clients live on, and PgBouncer replaces the server's connection.
    """
    bouncer = start(mode)
    engine = new(bouncer, driver)
    errors: list[str] = []
    for _ in range(ROUNDS):
        fill(engine)
        before = clients(bouncer)
        EVENTS[what](server, bouncer)
        kept = before if mode == "transaction" and "server" in what else 0
        eventually(lambda kept=kept: clients(bouncer) == kept, f"{kept} clients left")
        eventually(lambda: not any(pool_servers(bouncer)), "PgBouncer has seen it")
        # A login that failed meanwhile is remembered for `server_login_retry`.
        eventually(lambda: answers(bouncer), "PgBouncer has logged in again")
        errors += crowd(engine)
    print(f"{mode}, {driver}, {what} x {ROUNDS}: {CHECKOUTS} checkouts, {len(errors)} errors")
    assert errors == []


def pool_servers(bouncer: PgBouncer) -> list[int]:
    """PgBouncer's connections to the server, by their states."""
    rows = [row for row in bouncer.admin("SHOW POOLS") if row["database"] == DATABASE]
    return [row[name] for row in rows for name in ("sv_active", "sv_idle", "sv_used", "sv_tested")]


@each_mode
@each_driver
def test_while_the_server_is_away_a_checkout_succeeds_and_its_first_statement_fails(
    mode: str, driver: str, start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """PgBouncer lets clients in although it has no server: neither the socket nor connecting can tell.

    The first statement waits for `query_wait_timeout`; later ones fail at once, also after the server is
    back, until PgBouncer tries again after `server_login_retry`.
    """
    bouncer = start(mode, server_login_retry=3600)
    engine = new(bouncer, driver)
    use(engine)
    change(bouncer, "query_wait_timeout", 1)
    server.stop(keep=True)
    try:
        for said in ("query_wait_timeout", "server login has been failing"):
            connection = engine.connect()  # no error
            with pytest.raises(LOST) as caught:
                connection.scalar(BACKEND)
            # The text does not get through psycopg2.
            assert (said if driver == "psycopg" else "server closed the connection") in str(caught.value)
            assert caught.value.connection_invalidated
            assert f"closing because: {said}" in bouncer.log()
            connection.close()
    finally:
        server.start()
    with pytest.raises(LOST):
        use(engine)  # the server is there, and PgBouncer does not know it yet
    change(bouncer, "server_login_retry", 1)
    change(bouncer, "query_wait_timeout", 120)

    def works() -> bool:
        try:
            return bool(use(engine))
        except LOST:
            return False

    eventually(works, "PgBouncer has tried again")
    assert crowd(engine) == []


def ask_the_server(engine: Engine) -> None:
    """The page's listener: a new connection counts once the server behind PgBouncer has answered."""

    @event.listens_for(engine, "connect")
    def answer(dbapi_connection: Any, record: Any) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        dbapi_connection.rollback()


@each_mode
@each_driver
def test_with_a_listener_that_asks_the_server_checkouts_wait_until_it_is_back(
    mode: str, driver: str, start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """What PgBouncer says passes by itself, so it is tried again: with a statement while one connects.

    With `ping_after=0`, 16 threads ask while the server is away, and no error surfaces.
    """
    bouncer = start(mode)
    engine = new(bouncer, driver, ping_after=0, pool_timeout=3 * SECONDS)
    ask_the_server(engine)
    use(engine)
    change(bouncer, "query_wait_timeout", 1)
    server.stop(keep=True)
    try:
        tasks = [Task(partial(use, engine)) for _ in range(THREADS)]
        eventually(lambda: "closing because: server login has been failing" in bouncer.log(), "a refusal")
        assert all(task.is_alive() for task in tasks), "somebody has failed"
    finally:
        server.start()
    assert all(task.result() for task in tasks)
    change(bouncer, "query_wait_timeout", 120)
    assert crowd(engine) == []
    assert clients(bouncer) <= THREADS


@contextmanager
def under_load(engine: Engine, eventually: Eventually) -> Iterator[list[str]]:
    """16 threads that do not stop while something happens; their errors."""
    stop = threading.Event()
    errors: list[str] = []
    done = itertools.count()

    def work() -> None:
        while not stop.is_set():
            errors.extend(crowd_of_one(engine))
            next(done)

    tasks = [Task(work) for _ in range(THREADS)]

    def progress() -> None:
        now = next(done)
        eventually(lambda: next(done) > now + 2 * CHECKOUTS // ROUNDS, "they go on")

    try:
        progress()
        yield errors
        progress()
    finally:
        stop.set()
    for task in tasks:
        task.result()


def crowd_of_one(engine: Engine) -> list[str]:
    """One checkout; what went wrong."""
    try:
        use(engine)
    except Exception as error:
        return [repr(error)]
    return []


@each_driver
@pytest.mark.parametrize("way", ["fast", "immediate"])
def test_a_restart_between_pause_and_resume_costs_nothing_in_transaction_mode(
    way: str, driver: str, start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """PAUSE lets transactions end and has the next ones wait: no error, though the threads never stop."""
    bouncer = start("transaction")
    with under_load(new(bouncer, driver), eventually) as errors:
        bouncer.admin("PAUSE")
        server.restart(way)
        bouncer.admin("RESUME")
    print(f"transaction, {driver}, PAUSE, restart {way}, RESUME under load: {len(errors)} errors")
    assert errors == []


def test_pause_in_session_mode_waits_until_idle_clients_have_gone(
    start: Start, new: New, server: EmbeddedPostgres, eventually: Eventually
) -> None:
    """It waits for clients to leave: an idle one keeps it waiting until `idle_ttl`, or a dispose."""
    bouncer = start("session")
    kept, short = new(bouncer, idle_ttl=None), new(bouncer, idle_ttl=0.5)
    fill(kept, 1)
    fill(short, 1)
    pause = Task(partial(bouncer.admin, "PAUSE"))
    eventually(lambda: clients(bouncer) == 1, "the one with a TTL has gone")
    assert pause.is_alive()
    kept.dispose()
    pause.result()
    bouncer.admin("RESUME")
    assert use(kept)


# -- no room ------------------------------------------------------------------------------------------


@each_mode
@each_driver
def test_a_checkout_waits_for_room_among_pgbouncers_clients(
    mode: str, driver: str, start: Start, new: New, eventually: Eventually
) -> None:
    """`max_client_conn` is reached: what it says passes, so 16 threads share four without an error."""
    bouncer = start(mode, max_client_conn=4)
    engine = new(bouncer, driver, pool_timeout=SECONDS)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(engine.connect()).scalar(BACKEND)
        tasks = [Task(partial(use, engine)) for _ in range(THREADS)]
        refused = "closing because: no more connections allowed (max_client_conn)"
        eventually(lambda: refused in bouncer.log(), "a refusal")
        eventually(lambda: waiting(engine) == THREADS, "all wait")
    assert all(task.result() for task in tasks)
    assert crowd(engine) == []
    assert clients(bouncer) <= 4


@each_mode
@each_driver
def test_more_than_default_pool_size_wait_in_pgbouncer_and_not_in_the_pool(
    mode: str, driver: str, start: Start, new: New, eventually: Eventually
) -> None:
    """The checkout succeeds, the first statement waits in PgBouncer, and `query_wait_timeout` ends that."""
    bouncer = start(mode, default_pool_size=1)
    engine = new(bouncer, driver, max_size=2)
    with engine.connect() as holder:
        backend = holder.scalar(BACKEND)
        change(bouncer, "query_wait_timeout", 1)
        with pytest.raises(LOST) as caught:
            use(engine)
        assert caught.value.connection_invalidated
        assert "closing because: query_wait_timeout" in bouncer.log()
        if mode == "transaction":
            change(bouncer, "query_wait_timeout", 120)
        late = Task(partial(use, engine))
        eventually(lambda: pool(bouncer)["cl_waiting"] == 1, "it waits in PgBouncer")
        holder.rollback()
        if mode == "transaction":
            assert late.result() == backend
            return
        with pytest.raises(LOST):
            late.result()  # in session mode, it is the client that would have to go


@each_driver
def test_a_ping_that_waits_in_pgbouncer_counts_as_lost_after_ping_timeout(
    driver: str, start: Start, new: New
) -> None:
    """In transaction mode a ping needs a server, too: with all of them busy, a good client is replaced."""
    bouncer = start("transaction", default_pool_size=1, query_wait_timeout=5)
    engine = new(bouncer, driver, max_size=2, ping_after=0, ping_timeout=1)
    fill(engine, 1)
    busy = new(bouncer, driver)
    with busy.connect() as holder:
        holder.scalar(BACKEND)
        before = bouncer.log().count("login attempt")
        with engine.connect():
            assert bouncer.log().count("login attempt") == before + 1
    assert "closing because: query_wait_timeout" not in bouncer.log()
    assert use(engine)


@each_mode
@each_driver
def test_what_pgbouncer_says_when_it_has_no_server_passes(
    mode: str, driver: str, start: Start, new: New, server: EmbeddedPostgres
) -> None:
    """Whatever it says while one connects, to a PgBouncer that has never had its server."""
    bouncer = start(mode, client_login_timeout=1)
    engine = new(bouncer, driver)
    server.stop(keep=True)
    try:
        errors = []
        for _ in range(3):
            with pytest.raises(LOST) as caught:
                engine.connect()
            errors.append(caught.value.orig)
    finally:
        server.start()
    assert all(passes(error) for error in errors if error is not None), errors


# -- what the page warns of ---------------------------------------------------------------------------


def settings_of(connection: Connection) -> str:
    """A setting that PgBouncer does not know of."""
    return str(connection.exec_driver_sql("SHOW statement_timeout").scalar_one())


def set_by(engine: Engine, statement: str = "SET statement_timeout = '7s'") -> None:
    """What one must not do in transaction mode: a `connect` listener that sets something for the session."""

    @event.listens_for(engine, "connect")
    def configure(dbapi_connection: Any, record: Any) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute(statement)
        dbapi_connection.commit()


def test_what_a_connect_listener_sets_leaks_to_others_in_transaction_mode(start: Start, new: New) -> None:
    """It is set in the server's session, which is the next client's: here another engine's."""
    bouncer = start("transaction", default_pool_size=1)
    one, other = new(bouncer), new(bouncer)
    set_by(one)
    use(one)
    with other.connect() as connection:
        assert settings_of(connection) == "7s"


def test_what_a_connect_listener_sets_is_missing_on_other_servers_in_transaction_mode(
    start: Start, new: New
) -> None:
    """The same client, one transaction later, on another server: it does not find what it has set."""
    bouncer = start("transaction")
    one, other = new(bouncer, max_size=1), new(bouncer, max_size=2)
    set_by(one)
    with one.connect() as connection:
        assert settings_of(connection) == "7s"
    with other.connect() as holder:
        assert settings_of(holder) == "7s"  # the only server that there is, and busy from now on
        with one.connect() as connection:
            assert settings_of(connection) == "0"


def test_what_pgbouncer_follows_does_not_leak(start: Start, new: New) -> None:
    """TimeZone goes with the client, as do few others; the page names them."""
    bouncer = start("transaction", default_pool_size=1)
    one, other = new(bouncer), new(bouncer)
    set_by(one, "SET TimeZone = 'Asia/Tokyo'")
    for engine, zone in ((one, True), (other, False), (one, True)):
        with engine.connect() as connection:
            assert (connection.exec_driver_sql("SHOW TimeZone").scalar() == "Asia/Tokyo") is zone


def test_what_is_set_for_the_transaction_does_not_leak(start: Start, new: New) -> None:
    """The page's way: SET LOCAL in a listener of the event `begin`."""
    bouncer = start("transaction", default_pool_size=1)
    one, other = new(bouncer), new(bouncer)

    @event.listens_for(one, "begin")
    def configure(connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL statement_timeout = '7s'")

    for engine, value in ((one, "7s"), (other, "0"), (one, "7s")):
        with engine.connect() as connection:
            assert settings_of(connection) == value


@pytest.mark.parametrize(("reset", "found"), [("DISCARD ALL", "0"), ("", "7s")])
def test_server_reset_query_clears_a_session_when_its_client_goes(
    reset: str, found: str, start: Start, new: New, eventually: Eventually
) -> None:
    """In session mode; PgBouncer's default is DISCARD ALL, and without it a setting is the next client's."""
    bouncer = start("session", default_pool_size=1, server_reset_query=reset)
    one, other = new(bouncer), new(bouncer)
    set_by(one)
    with one.connect() as connection:
        assert settings_of(connection) == "7s"
    one.dispose()
    eventually(lambda: clients(bouncer) == 0, "it has gone")
    with other.connect() as connection:
        assert settings_of(connection) == found


def run_often(engine: Engine) -> None:
    """Twice as often as makes psycopg prepare a statement (`prepare_threshold`, 5)."""
    with engine.begin() as connection:  # a rollback would drop what it has prepared
        for _ in range(10):
            connection.scalar(BACKEND)


def test_psycopg_prepares_nothing_with_the_setting_for_transaction_mode(start: Start, new: New) -> None:
    """`prepare_threshold=None`: two engines, one server, no error."""
    bouncer = start("transaction", default_pool_size=1)
    for engine in (new(bouncer, "psycopg"), new(bouncer, "psycopg")):
        run_often(engine)


def test_psycopg_without_that_setting_meets_what_others_have_prepared(start: Start, new: New) -> None:
    """PgBouncer knows of none before 1.21, nor later with max_prepared_statements 0."""
    bouncer = start("transaction", default_pool_size=1)
    one, other = (new(bouncer, "psycopg", connect_args={}) for _ in range(2))
    run_often(one)
    with pytest.raises(exc.ProgrammingError, match=r"prepared statement .* already exists"):
        run_often(other)


@each_mode
def test_options_in_the_connect_arguments_are_refused_at_once(mode: str, start: Start, new: New) -> None:
    """PgBouncer takes no `options`; that does not pass by itself, so nobody waits for it."""
    engine = new(start(mode), connect_args={"options": "-c statement_timeout=7s"})
    with pytest.raises(LOST, match="unsupported startup parameter") as caught:
        engine.connect()
    assert caught.value.orig is not None
    assert not passes(caught.value.orig)


def test_options_that_pgbouncer_is_told_to_ignore_do_nothing(start: Start, new: New) -> None:
    """`ignore_startup_parameters`."""
    bouncer = start("session", ignore_startup_parameters="options")
    with new(bouncer, connect_args={"options": "-c statement_timeout=7s"}).connect() as connection:
        assert settings_of(connection) == "0"


def test_pgbouncer_takes_the_configuration_that_the_page_shows(start: Start, new: New) -> None:
    """All of it, but for where it listens and its files; with it the main things work."""
    page = (Path(__file__).parent.parent / "docs" / "recipes" / "pgbouncer.rst").read_text()
    (shown,) = re.findall(r"^\.\. code-block:: ini\n\n((?: +.*\n|\n)+)", page, re.MULTILINE)
    parser = ConfigParser()
    parser.read_string(textwrap.dedent(shown))
    settings = {name: value for name, value in parser["pgbouncer"].items() if name not in OURS}
    bouncer = start(settings.pop("pool_mode"), **settings)
    took = {row["key"]: row["value"] for row in bouncer.admin("SHOW CONFIG")}
    assert {name: took[name] for name in settings} == settings
    assert crowd(new(bouncer)) == []


# -- a fork -------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.filterwarnings(r"ignore:This process \(pid=\d+\) is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_a_client_of_its_own(
    mode: str, start: Start, new: New, eventually: Eventually
) -> None:
    """Parent and child, each with `max_size` 1: two clients, and the parent's is the one that it had."""
    bouncer = start(mode)
    engine = new(bouncer, max_size=1)
    use(engine)
    (mine,) = addresses(bouncer)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            use(engine)
            os.write(writer, json.dumps(sorted(addresses(bouncer))).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        seen = json.loads(told.read())
    assert os.waitpid(child, 0)[1] == 0
    assert len(seen) == 2
    assert mine in seen
    use(engine)
    eventually(lambda: addresses(bouncer) == {mine}, "the child's has gone, the parent's is there")


def addresses(bouncer: PgBouncer) -> set[int]:
    """The ports that the clients come from."""
    return {row["port"] for row in bouncer.admin("SHOW CLIENTS") if row["database"] == DATABASE}
