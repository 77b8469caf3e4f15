"""The URL alone configures the pool: ``?plugin=queries&max_size=10``."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
from psycopg.pq import Conninfo
from sqlalchemy import Engine, create_engine, engine_from_config, exc, pool, text
from sqlalchemy.engine import make_url

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.engine.settings import NAMES

URL = "postgresql+psycopg2://scott:tiger@db.example.net/shop?plugin=queries"
DRIVERS_OWN = {
    "sqlite3": "timeout detect_types isolation_level check_same_thread cached_statements uri cache mode vfs",
    "psycopg": "autocommit prepare_threshold row_factory cursor_factory context",
    "psycopg2": "executemany_mode executemany_values_page_size use_native_unicode async_ client_encoding",
    "PyMySQL": "unix_socket charset connect_timeout read_timeout write_timeout ssl_ca local_infile compress",
    "mysql-connector": "pool_name pool_reset_session raise_on_warnings buffered use_pure failover",
    "pyodbc": "driver Encrypt TrustServerCertificate MultiSubnetFailover fast_executemany mars_connection",
    "oracledb": "service_name sid mode threaded purity encoding arraysize",
}
"""Options of drivers, by what their documentation calls them; libpq's own come from libpq."""


def options() -> list[str]:
    """What a URL may have for the drivers, all of it."""
    libpq = [option.keyword.decode() for option in Conninfo.get_defaults()]
    return sorted({*libpq, *" ".join(DRIVERS_OWN.values()).split()})


@pytest.fixture
def make() -> Iterator[Any]:
    """``create_engine``; what it made is disposed of."""
    engines: list[Engine] = []

    def create(url: str, **kw: Any) -> Engine:
        engine = create_engine(url, **kw)
        engines.append(engine)
        return engine

    yield create
    for engine in engines:
        engine.dispose()


def pool_of(engine: Engine) -> QueriesPool:
    """Its pool, which is ours."""
    assert type(engine.pool) is QueriesPool
    return engine.pool


def connect_arguments(engine: Engine) -> tuple[Any, Any]:
    """What the driver gets."""
    return engine.dialect.create_connect_args(engine.url)


def test_the_url_alone_chooses_the_pool_and_configures_all_of_it(make: Any) -> None:
    """Everything that create_engine takes for the pool can be said, as text."""
    engine = make(
        f"{URL}&max_size=10&idle_ttl=2.5&pool_id=shop-{os.getpid()}&check_limits=off&pool_timeout=1.5"
        "&pool_use_lifo=false&pool_recycle=3600&pool_pre_ping=false&pool_reset_on_return=commit"
        "&pool_logging_name=web&echo_pool=false"
    )
    queries = pool_of(engine)
    assert (queries.size(), inside.setting(queries, "idle_ttl"), inside.setting(queries, "check_limits")) == (
        10,
        2.5,
        False,
    )
    assert (queries.timeout(), inside.setting(queries, "use_lifo"), inside.setting(queries, "recycle")) == (
        1.5,
        False,
        3600,
    )
    assert (inside.setting(queries, "pre_ping"), inside.setting(queries, "reset_on_return").name) == (
        False,
        "reset_commit",
    )
    assert (queries.logging_name, queries.echo, queries.pid) == ("web", False, f"shop-{os.getpid()}")


def test_queuepools_parameters_can_be_said_too(make: Any) -> None:
    """They are read as one ``max_size``, as everywhere."""
    assert pool_of(make(f"{URL}&pool_size=3&max_overflow=4")).size() == 7


def test_every_parameter_of_the_pool_is_known_to_the_url() -> None:
    """A new one is not forgotten: what ``create_engine`` takes for the class, but for objects."""
    from sqlalchemy.util import get_cls_kwargs

    spelt = {"echo": "echo_pool", **{n: f"pool_{n}" for n in ("timeout", "use_lifo", "recycle", "pre_ping")}}
    spelt |= {n: f"pool_{n}" for n in ("reset_on_return", "logging_name")}
    names = get_cls_kwargs(QueriesPool) - {"creator", "dialect", "events", "_dispatch"}
    assert {spelt.get(name, name) for name in names} == set(NAMES)


def test_nothing_of_ours_reaches_the_driver(make: Any) -> None:
    """Neither through the URL nor through what is connected with; the driver's own options do."""
    words = {"on_deadlock": "warn", "share": "none", "classes": "none"}
    every = "&".join(
        f"{name}={words.get(name, 1)}"
        for name in NAMES
        if name not in ("pool_size", "max_overflow", "pool_reset_on_return")
    )
    engine = make(f"{URL}&{every}&sslmode=require&application_name=till")
    assert dict(engine.url.query) == {"sslmode": "require", "application_name": "till"}
    assert set(connect_arguments(engine)[1]) == {
        *("host", "dbname", "user", "password", "sslmode", "application_name"),
    }


def test_what_queries_calls_them_can_be_said_in_the_url_and_in_the_code(make: Any) -> None:
    """Celery drops options that begin with `pool` where it uses a NullPool; `max_size` is an error there."""
    engine = make(f"{URL}&pool_max_size=3&pool_idle_ttl=5&application_name=till")
    assert (pool_of(engine).size(), inside.setting(engine.pool, "idle_ttl")) == (3, 5.0)
    assert dict(engine.url.query) == {"application_name": "till"}
    code = make(URL, pool_max_size=4, pool_idle_ttl=6)
    assert (pool_of(code).size(), inside.setting(code.pool, "idle_ttl")) == (4, 6.0)
    assert pool_of(make(f"{URL}&max_size=3", pool_max_size=4)).size() == 3  # the URL wins
    assert type(make(URL, pool_max_size=4, poolclass=pool.NullPool).pool) is pool.NullPool


def test_engines_of_one_url_share_a_pool_however_they_were_configured(make: Any) -> None:
    """What the URL says of the pool is no part of which database it is."""
    url = "postgresql+psycopg2://scott@db.example.net/for-two"
    plain = make(url, poolclass=QueriesPool, max_size=3)
    assert pool_of(make(f"{url}?plugin=queries&max_size=4")).pid == pool_of(plain).pid
    assert inside.pools()[pool_of(plain).pid].max_size == 4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        *[("max_sise", "max_size"), ("maxsize", "max_size"), ("Max_Size", "max_size")],
        *[("max-size", "max_size"), ("pool_maxsize", "max_size"), ("idle_tll", "idle_ttl")],
        *[("pool-idle-ttl", "idle_ttl"), ("overflow", "max_overflow"), ("pooltimeout", "pool_timeout")],
        *[("pre_ping", "pool_pre_ping"), ("recycle", "pool_recycle"), ("use_lifo", "pool_use_lifo")],
        *[("poolid", "pool_id"), ("check_limit", "check_limits"), ("logging_name", "pool_logging_name")],
    ],
)
def test_what_looks_like_ours_misspelt_is_an_error_that_names_the_nearest(wrong: str, right: str) -> None:
    """Else the driver would get it, or nobody."""
    with pytest.raises(exc.ArgumentError, match=rf"parameter '{wrong}' is not known: did you mean {right}\?"):
        create_engine(f"{URL}&{wrong}=1")


def test_the_drivers_own_options_pass_through(make: Any) -> None:
    """None of them looks like one of ours."""
    assert {"sslmode", "keepalives_idle", "connect_timeout", "target_session_attrs"} <= set(options())
    engine = make(URL + "".join(f"&{option}=1" for option in options()))
    assert sorted(engine.url.query) == options()


@pytest.mark.parametrize(
    ("url", "kw", "what"),
    [
        (f"{URL}&max_size=3&max_size=4", {}, "max_size is given twice, in the URL"),
        (f"{URL}&max_size=3&pool_max_size=4", {}, "max_size is given twice, in the URL"),
        (URL, {"max_size": 3, "pool_max_size": 4}, "max_size is given twice, in the code"),
        (f"{URL}&max_size=3&pool_size=4", {}, "max_size='3' and pool_size can't both be set"),
        (URL, {"max_size": 3, "pool_size": 4}, "max_size=3 and pool_size can't both be set"),
        (f"{URL}&plugin=queries", {}, "plugin=queries is given twice"),
        (URL, {"plugins": ["queries"]}, "plugin=queries is given twice"),
    ],
)
def test_what_stands_twice_is_an_error(url: str, kw: dict[str, Any], what: str) -> None:
    """Nobody could tell which of them is meant."""
    with pytest.raises(exc.ArgumentError, match=what):
        create_engine(url, **kw)


AIRFLOWS = {"pool_size": 5, "max_overflow": 10, "pool_recycle": 1800, "pool_pre_ping": True}
"""What a framework states for each engine that it makes, whatever its user wants."""


@pytest.mark.parametrize(
    ("said", "code", "size", "overruled"),
    [
        ("max_size=7", AIRFLOWS, 7, "pool_size, max_overflow"),
        ("max_size=7&pool_recycle=60", AIRFLOWS, 7, "pool_size, max_overflow, pool_recycle"),
        ("pool_size=2", AIRFLOWS, 12, "pool_size"),
        ("pool_size=2&max_overflow=0", AIRFLOWS, 2, "pool_size, max_overflow"),
        ("max_size=7", {"max_size": 3, "poolclass": QueriesPool}, 7, "max_size"),
        ("pool_size=2&max_overflow=1", {"max_size": 7, "poolclass": QueriesPool}, 3, "max_size"),
        (
            "idle_ttl=5&pool_timeout=3",
            {"idle_ttl": 6, "pool_timeout": 9, "pool_size": 1},
            11,
            "idle_ttl, pool_timeout",
        ),
        ("idle_ttl=5", AIRFLOWS, 15, None),
    ],
)
def test_the_url_wins_over_the_code(
    make: Any,
    caplog: pytest.LogCaptureFixture,
    said: str,
    code: dict[str, Any],
    size: int,
    overruled: str | None,
) -> None:
    """With one line in the log.  What only the code states stays."""
    with caplog.at_level(logging.INFO, "sqlalchemy.pool"):
        queries = pool_of(make(f"{URL}&{said}", **code))
    lines = [line for line in caplog.messages if line.startswith("plugin=queries")]
    told = f"plugin=queries: the URL takes precedence over the code's {overruled}"
    assert lines == ([] if overruled is None else [told])
    assert queries.size() == size
    options = make_url(f"{URL}&{said}").query
    if "pool_recycle" in code:
        assert inside.setting(queries, "recycle") == int(options.get("pool_recycle", 1800))  # type: ignore[arg-type]
        assert inside.setting(queries, "pre_ping") is True
    if "pool_timeout" in options:
        assert (queries.timeout(), inside.setting(queries, "idle_ttl")) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("max_size=zwei", "max_size='zwei' is not valid"),
        ("idle_ttl=-1", "idle_ttl='-1' is not valid"),
        ("pool_pre_ping=perhaps", "^pool_pre_ping='perhaps' is not valid"),
        ("pool_recycle=never", "^pool_recycle='never' is not valid"),
        ("echo_pool=loud", "^echo_pool='loud' is not valid"),
        ("pool_reset_on_return=perhaps", "^pool_reset_on_return="),
        ("pool_timeout=soon", "^pool_timeout="),
    ],
)
def test_a_value_that_means_nothing_is_an_error(said: str, what: str) -> None:
    """As everywhere: early, with the name, the value and what to write."""
    with pytest.raises(exc.ArgumentError, match=what):
        create_engine(f"{URL}&{said}")


@pytest.mark.parametrize("said", ["max_sise=1", "max_size=1&max_size=2", "max_size=zwei", "plugin=queries"])
def test_no_error_shows_the_password(said: str) -> None:
    """The URL is at hand where it is made, and is not in it."""
    with pytest.raises(exc.ArgumentError) as caught:
        create_engine(f"{URL}&{said}")
    assert "tiger" not in str(caught.value)


@pytest.mark.parametrize("code", [{"poolclass": pool.NullPool}, {"poolclass": pool.QueuePool}])
def test_a_pool_class_in_the_code_stays(
    make: Any, code: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Alembic's env.py says NullPool: it goes on working with the URL of the application."""
    with caplog.at_level(logging.INFO, "sqlalchemy.pool"):
        engine = make(f"{URL}&max_size=3&idle_ttl=5&application_name=till", **code)
    assert type(engine.pool) is code["poolclass"]
    assert dict(engine.url.query) == {"application_name": "till"}
    assert "the code sets another pool class, which is used" in caplog.text


def test_a_pool_in_the_code_stays(make: Any) -> None:
    """``pool=`` is more than a class."""
    mine = pool.NullPool(lambda: None)  # type: ignore[arg-type]
    assert make(f"{URL}&max_size=3", pool=mine).pool is mine


def test_a_class_of_ones_own_that_is_a_queries_pool_gets_the_parameters(make: Any) -> None:
    """The code says which class, the URL how large."""

    class Mine(QueriesPool):
        pass

    engine = make(f"{URL}&max_size=3", poolclass=Mine)
    assert type(engine.pool) is Mine
    assert engine.pool.size() == 3


def test_the_code_may_name_the_plugin_and_the_url_the_rest(make: Any) -> None:
    """SQLAlchemy's other way to name plugins."""
    engine = make("postgresql+psycopg2://scott@db.example.net/shop?max_size=3", plugins=["queries"])
    assert pool_of(engine).size() == 3


def test_it_stands_beside_other_plugins(make: Any) -> None:
    """Which get the URL without what is ours, and their own parameters."""
    from sqlalchemy.dialects import plugins
    from sqlalchemy.engine import CreateEnginePlugin

    class Other(CreateEnginePlugin):
        def __init__(self, url: Any, kwargs: Any) -> None:
            self.said = url.query["colour"]

        def update_url(self, url: Any) -> Any:
            assert "max_size" not in url.query
            return url.difference_update_query(["colour"])

    plugins.register("other-of-test", __name__, "Other")
    globals()["Other"] = Other
    try:
        engine = make(f"{URL}&plugin=other-of-test&colour=red&max_size=3")
    finally:
        del globals()["Other"]
    assert pool_of(engine).size() == 3
    assert not engine.url.query


def test_the_url_of_an_asynchronous_engine_takes_it_too() -> None:
    """As where a framework derives one URL from the other."""
    asyncio = pytest.importorskip("sqlalchemy.ext.asyncio")
    engine = asyncio.create_async_engine(
        "postgresql+psycopg://scott@db.example.net/shop?plugin=queries&max_size=3"
    )
    assert isinstance(engine.pool, QueriesPool)
    assert engine.pool.size() == 3


def test_an_ini_file_needs_the_url_alone(make: Any) -> None:
    """``sqlalchemy.url`` is all that ``engine_from_config`` gets."""
    engine = engine_from_config({"sqlalchemy.url": f"{URL}&max_size=3&pool_pre_ping=false"})
    try:
        assert pool_of(engine).size() == 3
        assert inside.setting(pool_of(engine), "pre_ping") is False
    finally:
        engine.dispose()


@pytest.mark.slow
def test_an_environment_variable_configures_a_program_that_knows_nothing_of_it(
    pg_url: str, tmp_path: Path
) -> None:
    """A program with ``create_engine(os.environ[…])`` and nothing else, in a process of its own."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from sqlalchemy import create_engine, text\n"
        "engine = create_engine(os.environ['DATABASE_URL'])\n"
        "with engine.connect() as connection:\n"
        "    print(connection.scalar(text('SELECT current_database()')))\n"
        "print(engine.pool.status())\n"
    )
    url = make_url(pg_url).update_query_dict({"plugin": "queries", "max_size": "2", "idle_ttl": "5"})
    said = url.render_as_string(hide_password=False)
    done = subprocess.run(
        # SQLAlchemy before 2.0.20 warns while it is imported on Python 3.12.
        [sys.executable, "-W", "error", "-W", "ignore:datetime.datetime.utcfrom", str(program)],
        env={**os.environ, "DATABASE_URL": said},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert not done.stderr
    database, status = done.stdout.splitlines()
    assert database == url.database
    assert "this engine: size 2, checked in 1, checked out 0" in status


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_it_works_with_the_driver(pg_url: str, make: Any, driver: str) -> None:
    """A connection is made, and the driver's option arrives."""
    url = make_url(pg_url).set(drivername=f"postgresql+{driver}")
    said = url.update_query_dict({"plugin": "queries", "max_size": "1", "application_name": "till"})
    with make(said).connect() as connection:
        assert connection.scalar(text("SHOW application_name")) == "till"
