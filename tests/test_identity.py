"""Which engines share a pool: the pool id that follows from URLs and arguments, without a server."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from fakes import FakeDriver
from sqlalchemy import create_engine, event
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine import URL, Engine

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.engine.identity import of_arguments
from sqla_queries_pool.logs import NAME

BASE = "pg://me:secret@host/db"


@pytest.fixture(autouse=True)
def _nothing_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects while an engine is made fails; and no setting of this machine plays a part."""

    def connect(*args: Any, **kw: Any) -> Any:
        raise AssertionError("something connects")

    monkeypatch.setattr(psycopg2, "connect", connect)
    if importlib.util.find_spec("psycopg") is not None:
        monkeypatch.setattr("psycopg.connect", connect)
    for name in (
        "PGTARGETSESSIONATTRS",
        "PGHOST",
        "PGPORT",
        "PGUSER",
        "PGDATABASE",
        "PGSERVICE",
        "PGHOSTADDR",
    ):
        monkeypatch.delenv(name, raising=False)


def engine(url: str | URL = BASE, **kw: Any) -> Engine:
    """An engine, with psycopg2 where the URL names no other driver."""
    if isinstance(url, str) and url.startswith("pg:"):
        url = url.replace("pg:", "postgresql+psycopg2:")
    return create_engine(url, poolclass=QueriesPool, **kw)


def pid(url: str | URL = BASE, **kw: Any) -> str:
    """The pool id of an engine, which must be one that others can have."""
    found: str = engine(url, **kw).pool.pid  # type: ignore[attr-defined]
    assert not found.startswith("private-")
    return found


# -- the table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kw"),
    [
        (BASE, {}),
        ("pg://me:rotated@host/db", {}),
        ("pg://me@host/db", {}),
        ("pg://me@host:5432/db", {}),
        ("pg://me@HOST/db", {}),
        ("pg://me@Host:5432/db?host=", {}),
        ("pg://me@/db?host=host", {}),
        ("pg://me@/db?host=host&port=5432", {}),
        ("pg://me@host/db?application_name=web&connect_timeout=3", {}),
        ("pg://me@host/db?sslmode=require", {}),
        (BASE, {"connect_args": {"application_name": "batch", "password": "other"}}),
        ("pg://me@/db", {"connect_args": {"host": "host"}}),
        ("pg://", {"connect_args": {"host": "host", "port": 5432, "user": "me", "dbname": "db"}}),
        ("pg://", {"connect_args": {"host": "host", "port": "5432", "user": "me", "database": "db"}}),
        ("pg://me@elsewhere:1/db", {"connect_args": {"host": "host", "port": 5432}}),
        ("pg://", {"connect_args": {"dsn": "host=host user=me dbname=db password='se cret'"}}),
        ("pg://", {"connect_args": {"dsn": "postgresql://me:secret@host:5432/db"}}),
        ("pg://me@host/db", {"connect_args": {"dsn": "host=elsewhere dbname=other user=you"}}),
        (URL.create("postgresql", "me", "secret", "host", 5432, "db"), {}),
        (BASE, {"pool_pre_ping": True, "echo_pool": False, "isolation_level": "AUTOCOMMIT"}),
    ],
    ids=str,
)
def test_ways_to_name_one_database_have_one_pid(url: Any, kw: dict[str, Any]) -> None:
    """Neither driver, password, spelling nor options that say nothing about which database it is."""
    assert pid(url, **kw) == pid()


def test_both_drivers_have_one_pid() -> None:
    """psycopg and psycopg2 share one budget: the database counts connections, not libraries."""
    pytest.importorskip("psycopg")
    assert pid("postgresql+psycopg://me:secret@host/db") == pid()
    assert pid("postgresql://me:secret@host/db") == pid()
    hosts = "://me@/db?host=h1:1&host=h2:2"
    assert pid(f"postgresql+psycopg{hosts}") == pid(f"postgresql+psycopg2{hosts}")
    conninfo = {"conninfo": "host=host user=me dbname=db"}
    assert pid("postgresql+psycopg://", connect_args=conninfo) == pid()


@pytest.mark.parametrize(
    ("url", "kw"),
    [
        ("pg://me@other/db", {}),
        ("pg://me@host:5433/db", {}),
        ("pg://me@host/other", {}),
        ("pg://me@host/DB", {}),
        ("pg://you@host/db", {}),
        ("pg://ME@host/db", {}),
        ("pg://me@/db", {}),
        ("pg://me@/db?host=/var/run/postgresql", {}),
        ("pg://me@/db?host=host:5432&host=other:5432", {}),
        ("pg://me@host/db?service=prod", {}),
        (BASE, {"connect_args": {"host": "other"}}),
        (BASE, {"connect_args": {"port": 5433}}),
        (BASE, {"connect_args": {"user": "you"}}),
        (BASE, {"connect_args": {"dbname": "other"}}),
    ],
    ids=str,
)
def test_another_database_or_user_has_another_pid(url: str, kw: dict[str, Any]) -> None:
    """Server, port, database and user each tell databases apart; names of users and databases have case."""
    assert pid(url, **kw) != pid()


def test_another_backend_has_another_pid() -> None:
    """The same host, port, user and database name, but of another kind of server."""
    options = {"host": "host", "port": 5432, "user": "me", "database": "db"}
    pids = {found.pid for backend in ("postgresql", "mysql") if (found := of_arguments(backend, [], options))}
    assert len(pids) == 2


def test_several_hosts_are_one_identity_in_any_order() -> None:
    """A list of hosts names one cluster; ports go with their hosts, one port goes with all."""
    one = "pg://me@/db?host=a:1&host=b:2"
    assert pid(one) == pid("pg://me@/db", connect_args={"host": "A, b", "port": "1,2"})
    assert pid(one) == pid("pg://me@/db?host=b:2&host=a:1")
    assert pid(one) != pid("pg://me@/db?host=a:2&host=b:1")
    assert pid("pg://me@/db?host=a,b&port=7,7") == pid("pg://me@/db", connect_args={"host": "a,b", "port": 7})


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_a_standby_is_another_server_than_the_primary(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own limit, by whichever of its names an engine asks for it."""
    pytest.importorskip(driver)
    url = f"postgresql+{driver}://me@/db?host=a:1&host=b:2"
    primary, standby = pid(url), pid(f"{url}&target_session_attrs=standby")
    assert primary != standby
    for name in ("any", "read-write", "primary"):
        assert pid(f"{url}&target_session_attrs={name}") == primary
    for name in ("read-only", "prefer-standby"):
        assert pid(f"{url}&target_session_attrs={name}") == standby
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "standby")
    assert pid(url) == standby
    assert pid(f"{url}&target_session_attrs=read-write") == primary


def test_asyncpgs_enumeration_is_understood() -> None:
    """It has one for what libpq has text for."""
    connect_utils = pytest.importorskip("asyncpg.connect_utils")
    where = {"host": "host", "user": "me", "database": "db"}
    one = of_arguments("postgresql", [], {**where, "target_session_attrs": "standby"})
    value = connect_utils.SessionAttribute.standby
    assert one is not None
    assert one == of_arguments("postgresql", [], {**where, "target_session_attrs": value})
    assert one.label == "postgresql://me@host:5432/db (standby)"


MYSQL = {"host": "localhost", "user": "me", "database": "db"}


@pytest.mark.parametrize(
    "more",
    [
        {"host": "other"},
        {"port": 3307},
        {"unix_socket": "/run/a.sock"},
        {"unix_socket": "/run/A.sock"},
        {"read_default_file": "/etc/a.cnf"},
        {"read_default_file": "/etc/b.cnf"},
        {"read_default_file": "/etc/a.cnf", "read_default_group": "batch"},
        {"read_default_group": "batch"},
        {"option_files": ["/etc/a.cnf", "/etc/b.cnf"]},
    ],
    ids=str,
)
def test_mysql_servers_are_told_apart(more: dict[str, Any]) -> None:
    """By host, socket or the file that says where they are: the URL often says localhost for all of them."""
    others = [{}, {"unix_socket": "/run/other.sock"}, {"read_default_file": "/etc/other.cnf"}]
    pids = [of_arguments("mysql", [], {**MYSQL, **options}) for options in (more, *others)]
    assert len({found.pid for found in pids if found is not None}) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"port": "3306", "host": "LOCALHOST", "charset": "utf8mb4"}),
        ({"unix_socket": "/s"}, {"unix_socket": "/s", "host": "127.0.0.1", "port": 3306}),
        ({"read_default_file": "~/a.cnf"}, {"default_file": os.path.expanduser("~/a.cnf")}),
        ({"read_default_file": "/etc/a.cnf"}, {"option_files": ["/etc/a.cnf"]}),
        ({"password": "a"}, {"password": "b", "ssl_ca": "/etc/ca"}),
    ],
    ids=str,
)
def test_ways_to_name_one_mysql_server_have_one_pid(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Whatever the driver calls it, and whatever tells no server; MariaDB is one, too."""
    found = of_arguments("mysql", [], {**MYSQL, **one})
    same = of_arguments("mariadb", [], {**MYSQL, **other})
    assert found is not None
    assert same is not None
    assert found.pid == same.pid


def test_a_file_of_options_is_enough_for_mysql() -> None:
    """It says where the server is; the label names the file."""
    found = of_arguments("mysql", [], {"read_default_file": "/etc/a.cnf", "read_default_group": "batch"})
    assert found is not None
    assert not found.private
    assert found.label == "mysql:/// (options of /etc/a.cnf, group batch)"


def test_where_hostaddr_says_where_to_connect_it_tells_databases_apart() -> None:
    """libpq connects to ``hostaddr`` where there is one; ``host`` is for the certificate then."""
    one = pid(BASE, connect_args={"hostaddr": "10.0.0.1"})
    two = pid(BASE, connect_args={"hostaddr": "10.0.0.2"})
    assert one != two


def test_a_pid_stays_the_same_over_the_years() -> None:
    """It is what people put into configurations and dashboards; a digest that reveals nothing."""
    assert pid() == pid()
    assert len(pid()) == 32
    assert set(pid()) <= set("0123456789abcdef")


# -- defaults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"PGHOST": "host"}, "pg://me@/db"),
        ({"PGHOST": "HOST", "PGPORT": "5432"}, "pg://me@/db"),
        ({"PGUSER": "me"}, "pg://host/db"),
        ({"PGDATABASE": "db"}, "pg://me@host"),
        ({"PGHOST": "host", "PGUSER": "me", "PGDATABASE": "db"}, "pg://"),
        ({"PGHOST": "elsewhere", "PGPORT": "1"}, "pg://me@host:5432/db"),
        ({"PGUSER": "you", "PGDATABASE": "other"}, "pg://me@host:5432/db"),
    ],
    ids=str,
)
def test_the_environment_fills_in_what_is_not_said(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str
) -> None:
    """libpq's variables are defaults: what the URL says wins."""
    expected = pid()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pid(url) == expected


def test_the_port_of_the_environment_counts_where_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGPORT moves an engine without a port to another server."""
    expected = pid("pg://me@host:6432/db")
    monkeypatch.setenv("PGPORT", "6432")
    assert pid() == expected


def test_the_address_of_the_environment_counts_as_hostaddr_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGHOSTADDR says where an engine without a hostaddr connects, whatever its host is."""
    expected = pid(BASE, connect_args={"hostaddr": "10.0.0.1"})
    monkeypatch.setenv("PGHOSTADDR", "10.0.0.1")
    assert pid() == expected


def test_the_database_is_by_default_the_users() -> None:
    """libpq's rule."""
    assert pid("pg://me@host") == pid("pg://me@host/me")


def test_identity_is_what_was_said_when_the_engine_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the environment or a listener that comes later moves no engine to another pool."""
    made = engine("pg://me@/db")
    before = made.pool.pid  # type: ignore[attr-defined]
    monkeypatch.setenv("PGHOST", "elsewhere")

    @event.listens_for(made, "do_connect")
    def elsewhere(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
        options["host"] = "elsewhere"

    made.dispose()
    assert made.pool.pid == before  # type: ignore[attr-defined]


# -- how it is found out -----------------------------------------------------------------------------


def test_a_listener_that_comes_later_still_works() -> None:
    """Looking for the identity leaves nothing behind that would keep ``do_connect`` from being heard."""
    made = engine()
    heard = []

    @event.listens_for(made, "do_connect")
    def listen(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        heard.append(dict(options))
        return FakeDriver().connect()

    with pytest.raises(Exception):  # noqa: B017, PT011 - the fake is no psycopg2 connection
        made.connect()
    assert heard[0]["host"] == "host"
    assert heard[0]["password"] == "secret"
    assert len(heard) == 1


@pytest.fixture
def class_listener() -> Iterator[list[str]]:
    """A ``do_connect`` listener on the dialect's class, and a list of when it was called."""
    called: list[str] = []

    def listen(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        called.append("called")
        return FakeDriver().connect()

    event.listen(PGDialect_psycopg2, "do_connect", listen)
    try:
        yield called
    finally:
        event.remove(PGDialect_psycopg2, "do_connect", listen)


def test_a_listener_on_the_dialects_class_is_not_called(class_listener: list[str]) -> None:
    """It would run before ours, and may connect in earnest: the creator's closure tells the arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pid("pg://me@listened/db")
    assert class_listener == []
    expected = of_arguments("postgresql", [], {"host": "listened", "user": "me", "dbname": "db"})
    assert expected is not None
    assert found == expected.pid


def test_a_creator_of_ones_own_is_private_and_never_called() -> None:
    """It may ask for a password, start a tunnel, or count: and nobody knows where it leads."""

    def creator() -> Any:
        raise AssertionError("called")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = engine(creator=creator).pool, engine(creator=creator).pool
    assert one.pid != two.pid  # type: ignore[attr-defined]
    assert "custom creator" in one.status()


def test_arguments_that_tell_no_database_make_a_private_pool_and_a_log_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An engine that shares no limit although its URL looks as if it did says so once, with the remedy.

    Not by a Python warning: QueuePool gives none, and programs whose warnings are errors would get one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = engine("fake://", module=FakeDriver())
        pool: Any = made.pool
        made.dispose()
        (record,) = caplog.records
        assert record.getMessage().startswith("QueriesPool can't tell which fake database")
        assert "Pass the same pool_id=" in record.getMessage()
        assert (record.name, record.levelno) == (NAME, logging.WARNING)
        assert pool.pid.startswith("private-")
        assert "this engine, which shares its limit with no other: size" in pool.status()
        told: Any = engine("fake://", module=FakeDriver(), pool_id="told").pool
    assert told.pid == "told"
    assert "this engine: size" in told.status()
    assert len(caplog.records) == 1


def test_a_pool_id_wins() -> None:
    """Over the URL, in both directions: two databases in one pool, one database in two."""
    one = engine(pool_id="mine").pool
    two = engine("pg://you@elsewhere/other", pool_id="mine").pool
    assert one.pid == two.pid == "mine"  # type: ignore[attr-defined]
    assert engine(pool_id="yours").pool.pid == "yours"  # type: ignore[attr-defined]
    assert "pid mine" in one.status()


def test_making_an_engine_opens_nothing() -> None:
    """The pool is known to the manager before anything connects, and has no connection."""
    pool: Any = engine("pg://me@nothing.invalid/db").pool
    assert pool.pid in PoolManager.instance()
    assert PoolManager.size(pool.pid) == 0


# -- the label ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "label"),
    [
        (BASE, "postgresql://me@host:5432/db"),
        ("pg://me:secret@HOST:6432/db", "postgresql://me@host:6432/db"),
        ("pg://me:secret@[::1]/db", "postgresql://me@[::1]:5432/db"),
        ("pg://me:secret@/db?host=a:1&host=b:2", "postgresql://me@a:1,b:2/db"),
        ("pg://me:secret@/db?host=/tmp", "postgresql://me@[/tmp]:5432/db"),
        ("pg://me:secret@host/db?service=prod", "postgresql://me@host:5432/db (service prod)"),
    ],
)
def test_the_label_is_for_people_and_has_no_password(url: str, label: str) -> None:
    """It reads like a URL, with the defaults filled in."""
    pool = engine(url).pool
    assert pool.status().startswith(f"{label} (pid ")
    assert "secret" not in repr(pool)


@pytest.mark.parametrize(
    "connect_args",
    [
        {"dsn": "host=host user=me dbname=db password='se\\'cret'"},
        {"dsn": "postgresql://me:se%27cret@host/db"},
        {"password": "se'cret"},
        {"passfile": "/home/me/se'cret"},
    ],
    ids=str,
)
def test_no_argument_brings_a_password_into_the_label(connect_args: dict[str, str]) -> None:
    """Wherever the driver takes a password from, the label leaves it there."""
    shown = repr(engine("pg://me@host/db", connect_args=connect_args).pool)
    assert "cret" not in shown


@pytest.mark.parametrize(
    "file", ["file:{}/shop.db?key=se%27cret", "file:shop?mode=memory&cache=shared&hexkey=se%27cret"]
)
def test_no_parameter_of_an_sqlite_uri_is_shown(file: str, tmp_path: Any) -> None:
    """Some builds of SQLite take the key of an encrypted database there."""
    made = engine(f"sqlite:///{file.format(tmp_path)}&uri=true")
    pool: Any = made.pool
    shown = [
        repr(pool),
        pool.status(),
        repr(PoolManager.report()),
        repr(pool.snapshot()),
        repr(pool.statistics()),
    ]
    assert not [text for text in shown if "cret" in text or "key" in text]
    assert ["shop" in text for text in shown] == [True] * 5


def test_the_id_of_an_sqlite_file_does_not_follow_from_its_key() -> None:
    """It is shown in logs and dashboards: nobody is to guess a key with it."""
    assert pid("sqlite:///file:shop.db?key=one&uri=true") == pid("sqlite:///file:shop.db?key=two&uri=true")


def test_a_dsn_that_is_not_understood_brings_no_password_either() -> None:
    """The driver will say what is wrong with it, when it connects."""
    dsn = "not a dsn password=secret"
    shown = repr(engine("pg://me@host/db", connect_args={"dsn": dsn}).pool)
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("backend", "arguments", "options", "label"),
    [
        (
            "mysql",
            [],
            {"host": "H", "port": 3307, "user": "me", "password": "s", "database": "db"},
            "mysql://me@h:3307/db",
        ),
        ("mysql", [], {"unix_socket": "/tmp/s", "user": "me", "db": "db"}, "mysql://me@[/tmp/s]/db"),
        ("oracle", [], {"host": "h", "service_name": "s", "user": "me"}, "oracle://me@h/s"),
        ("mssql", ["DRIVER=x;PWD=secret"], {}, None),
        ("oracle", [], {"user": "me", "password": "s"}, None),
        ("mysql", [], {}, None),
    ],
)
def test_other_backends_are_told_apart_where_their_arguments_do(
    backend: str, arguments: list[Any], options: dict[str, Any], label: str | None
) -> None:
    """Host or database is enough; a connection string in one piece is nobody's to take apart."""
    found = of_arguments(backend, arguments, options)
    assert (found and found.label) == label
