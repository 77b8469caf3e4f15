"""A primary fails, and its standby is promoted: real servers, streaming replication, default options."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import psycopg2
import pytest
from conftest import in_memory
from hazards import Thread, pool_of
from sqlalchemy import Engine, create_engine, event, exc, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from standby import Primary, Standby

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.sockets.connect_errors import passes

Eventually = Callable[..., None]
Pair: TypeAlias = tuple[Primary, Standby]
INSERT = text("INSERT INTO t VALUES (1)")
SIZE = 8
IN_TIME = 50 * SIZE
"""Transactions after the promotion from which on there is no error: each connection was used by then."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary with a table, and its standby."""
    with Primary(folder=in_memory()) as primary:
        connection = psycopg2.connect(primary.url().replace("+psycopg2", ""))
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE t (n int)")
        connection.close()
        with Standby(primary, in_memory()) as standby:
            yield primary, standby


class Load:
    """What the workers of a load have seen."""

    def __init__(self) -> None:
        self.errors: list[tuple[int, Any, str]] = []
        """How many transactions were done when it began, on which connection (None: on none), and what."""
        self.done: list[None] = []
        self.over = threading.Event()

    def error(self, began: int, connection: Any, error: Exception) -> None:
        self.errors.append((began, connection, str(error)))

    def check(self, promoted: int) -> None:
        """Each connection has one error at most, and none comes late."""
        erred = Counter(connection for _, connection, _ in self.errors)
        assert max(erred.values(), default=0) <= 1, self.errors
        assert not [error for error in self.errors if error[1] is None]
        assert not [error for error in self.errors if error[0] > promoted + IN_TIME]


def both(pair: Pair, driver: str) -> str:
    """The URL that leads to the primary, whichever of them it is."""
    hosts = [f"{server.host}:{server.port}" for server in pair]
    url = make_url(pair[0].url(driver)).set(host=None, port=None)
    url = url.update_query_dict({"host": hosts, "target_session_attrs": "read-write"})
    return url.render_as_string(hide_password=False)


def fail_over(pair: Pair, how: str, load: Load, eventually: Eventually) -> None:
    """Under load, kill the primary or make it a standby, promote the other one, and let the load go on."""
    primary, standby = pair
    eventually(lambda: len(load.done) > 200, "it works")
    primary.kill() if how == "kill" else primary.demote()
    standby.promote()
    promoted = len(load.done)
    eventually(lambda: len(load.done) > promoted + 2 * IN_TIME, "it goes on", 60)
    load.over.set()
    load.check(promoted)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("driver", "how"), [("psycopg2", "kill"), ("psycopg", "demote")])
def test_a_failover_under_load_costs_each_connection_one_error_at_most(
    pair: Pair, driver: str, how: str, eventually: Eventually
) -> None:
    """Threads on two hosts; whoever has no connection meanwhile waits for the promotion."""
    engine, load = create_engine(both(pair, driver), poolclass=QueriesPool, max_size=SIZE), Load()

    def work() -> None:
        while not load.over.is_set():
            used, began = None, len(load.done)
            try:
                with engine.begin() as connection:
                    used = connection.info.setdefault("which", object())
                    connection.execute(INSERT)
                load.done.append(None)
            except exc.DBAPIError as error:
                load.error(began, used, error)

    threads = [Thread(work) for _ in range(SIZE + 4)]
    try:
        fail_over(pair, how, load, eventually)
    finally:
        load.over.set()
        for thread in threads:
            thread.join()
        engine.dispose()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_same_in_an_event_loop(pair: Pair, eventually: Eventually) -> None:
    """Tasks, asyncpg, which says in its own words that no host is the primary yet."""
    load = Load()

    async def work(engine: Any) -> None:
        while not load.over.is_set():
            used, began = None, len(load.done)
            try:
                async with engine.begin() as connection:
                    used = (await connection.get_raw_connection()).info.setdefault("which", object())
                    await connection.execute(INSERT)
                load.done.append(None)
            except (exc.DBAPIError, OSError) as error:
                load.error(began, used, error)

    async def main() -> None:
        engine = create_async_engine(both(pair, "asyncpg"), poolclass=QueriesPool, max_size=SIZE)
        await asyncio.gather(*(work(engine) for _ in range(SIZE + 4)))
        await engine.dispose()

    thread = Thread(lambda: asyncio.run(main()))
    try:
        fail_over(pair, "demote", load, eventually)
    finally:
        load.over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_was_opened_to_a_standby_is_replaced_once_it_says_so(
    pair: Pair,
) -> None:
    """A name that leads to the wrong server for a while: one error, and all are asked before their next use.
    Those that were opened instead stay, as those of sessions do that are read-only by their own wish."""
    primary, standby = pair
    engine = create_engine(primary.url(), poolclass=QueriesPool, max_size=SIZE)
    leads_to: list[EmbeddedPostgres] = [standby]

    @event.listens_for(engine, "do_connect")
    def resolve(_: Any, __: Any, ___: Any, options: dict[str, Any]) -> None:
        options["port"] = leads_to[0].port

    def is_refused() -> bool:
        try:
            with engine.begin() as connection:
                connection.execute(INSERT)
        except exc.DBAPIError as error:
            return "read-only transaction" in str(error)
        return False

    held = [engine.connect() for _ in range(4)]
    for connection in held:
        connection.close()
    assert is_refused()
    leads_to[0] = primary
    assert not any(is_refused() for _ in range(8))
    held = [engine.connect() for _ in range(4)]
    assert {connection.scalar(text("SELECT pg_is_in_recovery()")) for connection in held} == {False}
    for connection in held:
        connection.close()
    statistics = pool_of(engine).statistics()
    assert (statistics.connects, statistics.closes) == (8, {"its server is a standby": 4})
    engine.dispose()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_older_than_the_fence_of_its_server_is_replaced() -> None:
    """``default_transaction_read_only`` in the configuration: one error, and all are asked before their next
    use.  What is opened then leads to the same server here, and stays; so does a session's own wish."""
    with EmbeddedPostgres(folder=in_memory()) as server:
        engine = create_engine(server.url(), poolclass=QueriesPool, max_size=SIZE)
        wish = {"options": "-c default_transaction_read_only=on"}
        reader = create_engine(server.url(), poolclass=QueriesPool, pool_id="reader", connect_args=wish)

        def writes(engine: Engine) -> None:
            with engine.begin() as connection, pytest.raises(exc.DBAPIError, match="read-only transaction"):
                connection.execute(text("CREATE TABLE t (n int)"))

        held = [engine.connect() for _ in range(3)]
        for connection in held:
            connection.close()
        writes(reader)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ALTER SYSTEM SET default_transaction_read_only = on"))
            connection.execute(text("SELECT pg_reload_conf()"))
            while connection.scalar(text("SHOW default_transaction_read_only")) == "off":
                pass
        for _ in range(4):
            writes(engine)
            writes(reader)
        held = [engine.connect() for _ in range(3)]
        for connection in held:
            connection.close()
        statistics = pool_of(engine).statistics()
        assert (statistics.connects, statistics.closes) == (6, {"its server was set read-only": 3})
        assert pool_of(reader).statistics().connects == 1
        engine.dispose()
        reader.dispose()


def test_a_session_that_is_read_only_by_its_own_wish_costs_no_connection(pg_url: str) -> None:
    """By an option of SQLAlchemy's, and by a statement, in each of many transactions."""
    engine: Engine = create_engine(pg_url, poolclass=QueriesPool)
    for options in ({"postgresql_readonly": True}, {}):
        for _ in range(5):
            with engine.connect().execution_options(**options) as connection:
                if not options:
                    connection.execute(text("SET TRANSACTION READ ONLY"))
                with pytest.raises(exc.DBAPIError) as caught:
                    connection.execute(text("CREATE TABLE t (i int)"))
                assert not caught.value.connection_invalidated
    statistics = pool_of(engine).statistics()
    assert (statistics.connects, dict(statistics.closes)) == (1, {})
    engine.dispose()


def test_no_primary_among_the_hosts_passes_by_itself(pg_url: str) -> None:
    """What libpq says of a server that is none, with ``read-write``; a missing standby is another matter."""
    url = make_url(pg_url)
    for wanted, read_only in (("read-write", "-c default_transaction_read_only=on"), ("standby", "")):
        dsn: dict[str, Any] = {
            "host": url.host,
            "port": url.port,
            "user": url.username,
            "password": url.password,
        }
        with pytest.raises(psycopg2.OperationalError) as caught:
            psycopg2.connect(**dsn, dbname=url.database, target_session_attrs=wanted, options=read_only)
        assert passes(caught.value) is (wanted == "read-write"), str(caught.value)
