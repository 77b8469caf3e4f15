"""Alembic: its own templates, in its own program and inside an application's process, on PostgreSQL."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import inside
import pytest
from conftest import Observer
from fakes import SECONDS, Task
from hazards import driver_connection_of
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    NullPool,
    Table,
    create_engine,
    exc,
    inspect,
    make_url,
    text,
)
from sqlalchemy.ext.asyncio import create_async_engine

import sqla_queries_pool
from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool

command: Any = pytest.importorskip("alembic.command")
Config: Any = pytest.importorskip("alembic.config").Config
CommandError: Any = pytest.importorskip("alembic.util").CommandError

pytestmark = pytest.mark.connection_leaks
ABANDONS = pytest.mark.connection_leaks(False)
"""Alembic's template multidb abandons a connection where it fails: a leak that is not ours to mend."""
Eventually = Callable[..., None]
ROOT = Path(sqla_queries_pool.__file__).parent.parent
RECIPE = (Path(__file__).parent.parent / "docs" / "recipes" / "alembic.rst").read_text()
COMMANDS = re.findall(r"^    alembic (.+)$", RECIPE, re.MULTILINE)
OPTIONS = re.findall(r"^    (sqlalchemy\.(?!url).+)$", RECIPE, re.MULTILINE)
NOWHERE = "postgresql+psycopg2://nobody@127.0.0.1:1/nothing"
"""Nobody listens there: who connects fails."""

# What is changed in the files that `alembic init` makes.
POOL_CLASS = (
    ("from sqlalchemy import pool\n", "from sqla_queries_pool import QueriesPool\n"),
    ("poolclass=pool.NullPool", "poolclass=QueriesPool"),
)
TRANSACTION_PER_MIGRATION = (
    "connection=connection, target_metadata=target_metadata\n",
    "connection=connection, target_metadata=target_metadata, transaction_per_migration=True\n",
)
AUTOCOMMIT = (
    "with connectable.connect() as connection:",
    'with connectable.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:',
)
MAKES_ENGINE = "    connectable = engine_from_config("
USE_CONNECTION = """\
    connection = config.attributes.get("connection")
    if connection is not None:
        context.configure(connection=connection, target_metadata=target_metadata)
        with context.begin_transaction():
            context.run_migrations()
        return

"""
SHARED_CONNECTION = (MAKES_ENGINE, USE_CONNECTION + MAKES_ENGINE)
Edits = tuple[tuple[tuple[str, str], ...], ...]
INI_URL = "sqlalchemy.url = driver://user:pass@localhost/dbname\n"
INI_URL_2 = "sqlalchemy.url = driver://user:pass@localhost/dbname2\n"
MODELS_GENERIC = "from models import metadata as target_metadata"
MODELS_MULTIDB = "import models\ntarget_metadata = {'engine1': models.metadata, 'engine2': models.other}"
KEEP_LOGGERS = (
    "fileConfig(config.config_file_name)",
    "fileConfig(config.config_file_name, disable_existing_loggers=False)",
)
MODELS = """\
from sqlalchemy import Column, Integer, MetaData, String, Table

metadata = MetaData()
Table("customer", metadata, Column("id", Integer, primary_key=True), Column("name", String(50)))
other = MetaData()
Table("parcel", other, Column("id", Integer, primary_key=True))
"""


def edit(file: Path, *replacements: tuple[str, str]) -> None:
    """Replace what stands exactly once in a file, so that a changed template is noticed."""
    content = file.read_text()
    for old, new in replacements:
        assert content.count(old) == 1, f"{file} does not have this once: {old!r}"
        content = content.replace(old, new)
    file.write_text(content)


def tables(engine: Engine) -> set[str]:
    """The tables of a database."""
    return set(inspect(engine).get_table_names())


def held(engine: Engine) -> int:
    """How many connections of an engine's pool somebody has."""
    numbers: dict[str, int] = inside.shared(engine.pool).report()["connections"]
    return numbers["held"] + numbers["opening"]


def database(url: str) -> str:
    """The name of the database of a URL."""
    name = make_url(url).database
    assert name
    return name


# -- inside the application's process -----------------------------------------------------------------


class Project:
    """A project whose migrations run in this process; each calls the configuration's attribute ``during``."""

    def __init__(self, folder: Path, template: str = "generic") -> None:
        self.folder = folder / "migrations"
        self._last: str | None = None
        command.init(Config(folder / "alembic.ini", stdout=io.StringIO()), str(self.folder), template)
        self.edit(*POOL_CLASS)

    def edit(self, *replacements: tuple[str, str]) -> None:
        """Change env.py."""
        edit(self.folder / "env.py", *replacements)

    def add(self, name: str, upgrade: str = "pass") -> None:
        """Add a revision."""
        (self.folder / "versions" / f"{name}.py").write_text(
            "from alembic import context, op\nimport sqlalchemy as sa\n"
            f"revision, down_revision = {name!r}, {self._last!r}\n"
            "def upgrade(engine_name=None):\n"
            "    context.config.attributes.get('during', lambda connection: None)(op.get_bind())\n"
            f"{textwrap.indent(upgrade, '    ')}\n"
            "def downgrade(engine_name=None):\n"
            "    pass\n"
        )
        self._last = name

    def config(self, url: str, **options: object) -> Any:
        """Configuration without an ini file: such a file would configure the logging of the tests."""
        config = self.multidb_config({"alembic": url}, **options)
        config.stdout = io.StringIO()
        return config

    def multidb_config(self, urls: dict[str, str], **options: object) -> Any:
        """The same for the template multidb: name and URL of each database."""
        config = Config()
        config.set_main_option("script_location", str(self.folder))
        config.set_main_option("databases", ", ".join(urls))
        for name, url in urls.items():
            defaults = {"url": url, "max_size": 1, "pool_timeout": 0}
            for option, value in (defaults | options).items():
                config.set_section_option(name, f"sqlalchemy.{option}", str(value).replace("%", "%%"))
        return config


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Alembic's template generic, with the pool class changed."""
    return Project(tmp_path)


@pytest.fixture
def application(pg_url: str) -> Iterator[Callable[..., Engine]]:
    """Make the application's engine: ``application(max_size=2)``; by default it does not wait."""
    engines = []

    def make(url: str = pg_url, max_size: int = 1, pool_timeout: float = 0) -> Engine:
        engines.append(
            create_engine(url, poolclass=QueriesPool, max_size=max_size, pool_timeout=pool_timeout)
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture
def second_url(pg_url: str, pg_observer: Observer) -> Iterator[str]:
    """A second empty database that only this test has."""
    name = f"{database(pg_url)}_second"
    pg_observer.query(f"CREATE DATABASE {name}")
    yield make_url(pg_url).set(database=name).render_as_string(hide_password=False)
    pg_observer.query(f"DROP DATABASE {name} WITH (FORCE)")


def idle(engine: Engine, number: int) -> None:
    """Leave the engine with this many idle connections."""
    for connection in [engine.connect() for _ in range(number)]:
        connection.close()


@pytest.mark.parametrize("max_size", [1, 3])
def test_an_idle_connection_of_the_application_gives_way_to_a_migration(
    project: Project,
    application: Callable[..., Engine],
    pg_url: str,
    pg_observer: Observer,
    eventually: Eventually,
    max_size: int,
) -> None:
    """Where the limit is spent by idle ones, one of them is closed: there are never more than max_size
    backends, and afterwards the application has its connections again."""
    engine = application(max_size=max_size)
    idle(engine, max_size)
    seen = []

    def during(connection: Connection) -> None:
        seen.append((held(engine), engine.pool.checkedin()))  # type: ignore[attr-defined]
        eventually(lambda: pg_observer.backends(database(pg_url)) == max_size, "max_size backends")

    project.add("one", "op.create_table('customer', sa.Column('id', sa.Integer, primary_key=True))")
    config = project.config(pg_url, max_size=max_size)
    config.attributes["during"] = during
    command.upgrade(config, "head")
    assert seen == [(1, max_size - 1)]
    idle(engine, max_size)
    assert tables(engine) == {"alembic_version", "customer"}


def test_where_there_is_room_a_migration_takes_nothing_from_the_application(
    project: Project,
    application: Callable[..., Engine],
    pg_url: str,
    pg_observer: Observer,
    eventually: Eventually,
) -> None:
    """With a larger limit the application keeps its idle connections, and those that it has out. When the
    collector has found the migration's engine, its connection is closed, too."""
    engine = application(max_size=3)
    idle(engine, 2)
    out = engine.connect()
    seen = []
    project.add("one")
    config = project.config(pg_url, max_size=3)
    config.attributes["during"] = lambda connection: seen.append(engine.pool.status())
    command.upgrade(config, "head")
    assert len(seen) == 1
    assert "open 3, held 2" in seen[0]
    assert seen[0].endswith("checked in 1, checked out 1")
    assert out.scalar(text("SELECT 1")) == 1
    gc.collect()
    eventually(lambda: pg_observer.backends(database(pg_url)) == 2, "the application's backends alone")
    out.close()


class Busy:
    """Threads of the application, each of which has a connection until it is told to give it back."""

    def __init__(self, engine: Engine, *names: str) -> None:
        self.go = threading.Event()
        self._engine = engine
        ready = [threading.Event() for _ in names]
        self.threads = [Task(lambda r=r: self._work(r), n) for r, n in zip(ready, names, strict=True)]  # type: ignore[misc]
        for event in ready:
            assert event.wait(SECONDS)

    def _work(self, ready: threading.Event) -> None:
        with self._engine.connect():
            ready.set()
            assert self.go.wait(SECONDS)

    def end(self) -> None:
        """They give back their connections."""
        self.go.set()
        for thread in self.threads:
            thread.result()


def shape(message: str) -> str:
    """An error without what differs from one run to the next."""
    message = re.sub(r"nightly report|web request 17", "thread", " ".join(message.split()))
    return re.sub(r"postgresql://\S+|pid \w+|[\d.]+ s\b", "...", message)


@pytest.mark.parametrize("pool_timeout", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_with_all_connections_checked_out_a_migration_fails_and_names_who_holds_them(
    project: Project, application: Callable[..., Engine], pg_url: str, pool_timeout: int
) -> None:
    """After pool_timeout there is an error with the holders and the limit; nothing was migrated. When the
    connections were returned it works."""
    engine = application(max_size=2)
    busy = Busy(engine, "web request 17", "nightly report")
    project.add("one", "op.create_table('customer', sa.Column('id', sa.Integer, primary_key=True))")
    config = project.config(pg_url, max_size=1, pool_timeout=pool_timeout)
    with pytest.raises(
        CheckoutTimeout, match=rf"within {pool_timeout} s: .* held 2, .* limit 2 \(1 for"
    ) as info:
        command.upgrade(config, "head")
    for name in ("web request 17", "nightly report"):
        assert re.search(rf"Held by, longest first: .*{name} \(", str(info.value))
    if pool_timeout:
        assert shape(str(info.value)).startswith(
            shape(RECIPE.split("CheckoutTimeout: ")[1].split("Nothing")[0])
        )
    busy.end()
    assert tables(engine) == set()
    command.upgrade(config, "head")
    assert tables(engine) == {"alembic_version", "customer"}


def test_a_migration_waits_for_a_connection_that_the_application_gives_back(
    project: Project, application: Callable[..., Engine], pg_url: str, eventually: Eventually
) -> None:
    """Within pool_timeout it waits in the queue, and goes on when it is served."""
    engine = application(max_size=1)
    busy = Busy(engine, "web request 17")
    project.add("one", "op.create_table('customer', sa.Column('id', sa.Integer, primary_key=True))")
    migration = Task(lambda: command.upgrade(project.config(pg_url, pool_timeout=30), "head"), "migration")
    pid = engine.pool.pid  # type: ignore[attr-defined]
    eventually(lambda: PoolManager.report()["pools"][pid]["waiting"] == 1, "the migration waits")
    busy.end()
    migration.result()
    assert tables(engine) == {"alembic_version", "customer"}


def test_every_command_works_with_one_connection_that_the_application_uses_in_between(
    project: Project, application: Callable[..., Engine], pg_url: str
) -> None:
    """max_size=1: each command has the connection while it runs, and the application has it after each."""
    engine = application(max_size=1, pool_timeout=10)  # the collector may be closing a command's
    metadata = MetaData()
    Table("customer", metadata, Column("id", Integer, primary_key=True))
    project.edit(("target_metadata = None", "target_metadata = config.attributes['metadata']"))
    config = project.config(pg_url)
    config.attributes["metadata"] = metadata

    def run(name: str, *arguments: str, **options: object) -> None:
        idle(engine, 1)
        getattr(command, name)(config, *arguments, **options)
        assert held(engine) == 0
        idle(engine, 1)

    run("revision", "customers", autogenerate=True)
    with pytest.raises(CommandError, match="not up to date"):
        run("check")
    run("upgrade", "head")
    assert tables(engine) == {"alembic_version", "customer"}
    run("check")
    run("current")
    run("history")
    run("downgrade", "base")
    assert tables(engine) == {"alembic_version"}
    run("stamp", "head")
    run("current")
    printed = config.stdout.getvalue()
    assert printed.count("(head)") == 3, printed


STEPS = {
    "one": "op.create_table('one', sa.Column('id', sa.Integer))",
    "two": "op.create_table('two', sa.Column('id', sa.Integer))",
    "three": "op.create_table('three', sa.Column('id', sa.Integer))\nop.execute('SELECT 1 / 0')",
}


@pytest.mark.parametrize(
    ("edits", "applied"),
    [((), set()), ((TRANSACTION_PER_MIGRATION,), {"alembic_version", "one", "two"})],
    ids=["one transaction", "transaction_per_migration"],
)
def test_a_migration_that_fails_is_rolled_back_and_gives_back_its_connection(
    project: Project,
    application: Callable[..., Engine],
    pg_url: str,
    edits: tuple[tuple[str, str], ...],
    applied: set[str],
) -> None:
    """With transaction_per_migration those before it stay applied, else none does. Nothing is left checked
    out: with max_size=1 the application works on, and the mended migration goes through."""
    engine = application(max_size=1)
    idle(engine, 1)
    project.edit(*edits)
    for name, upgrade in STEPS.items():
        project.add(name, upgrade)
    config = project.config(pg_url)
    with pytest.raises(exc.DataError, match="division by zero"):
        command.upgrade(config, "head")
    assert held(engine) == 0
    assert tables(engine) == applied
    edit(project.folder / "versions" / "three.py", ("op.execute('SELECT 1 / 0')", "pass"))
    command.upgrade(config, "head")
    assert tables(engine) == {"alembic_version", *STEPS}


def test_migrations_run_on_the_connection_that_the_application_hands_over(
    project: Project, application: Callable[..., Engine], pg_url: str
) -> None:
    """Through config.attributes["connection"] there is no second checkout, so max_size=1 is enough; the
    application's transaction decides what becomes of the migration."""
    engine = application(max_size=1)
    project.edit(SHARED_CONNECTION)
    project.add("one", STEPS["one"])
    config = project.config(pg_url)
    seen: list[Connection] = []
    config.attributes["during"] = seen.append
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        with connection.begin() as transaction:
            command.upgrade(config, "head")
            transaction.rollback()
        assert inspect(connection).get_table_names() == []
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    assert seen[-1] is connection
    assert len(seen) == 2
    assert tables(engine) == {"alembic_version", "one"}


@pytest.mark.parametrize("whose", ["the migration's", "the application's"])
def test_a_migration_that_asks_for_a_second_connection_gets_an_error_and_does_not_hang(
    project: Project, application: Callable[..., Engine], pg_url: str, whose: str
) -> None:
    """It has the only one: the error names its own thread. Nothing stays applied or checked out."""
    engine = application(max_size=1)
    project.add("one", STEPS["one"])
    project.add("two")
    config = project.config(pg_url)

    def during(connection: Connection) -> None:
        if inspect(connection).has_table("one"):
            (connection.engine if whose == "the migration's" else engine).connect()

    config.attributes["during"] = during
    with pytest.raises(CheckoutTimeout, match=rf"held 1, .* {threading.current_thread().name} \("):
        command.upgrade(config, "head")
    assert held(engine) == 0
    assert tables(engine) == set()


@pytest.mark.parametrize("duplicate", [False, True], ids=["it works", "it fails"])
@pytest.mark.parametrize("how", ["autocommit_block", "execution_options"])
def test_a_migration_outside_a_transaction_returns_the_connection_as_it_was(
    project: Project, application: Callable[..., Engine], pg_url: str, how: str, duplicate: bool
) -> None:
    """CREATE INDEX CONCURRENTLY works with max_size=1, in an autocommit block and on a connection that is
    in AUTOCOMMIT as a whole; whether it succeeds or not, the next user has transactions again."""
    engine = application(max_size=1)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE one (id int)"))
        connection.execute(text("INSERT INTO one VALUES (1), (:id)"), {"id": 1 if duplicate else 2})
    index = "op.execute('CREATE UNIQUE INDEX CONCURRENTLY one_id ON one (id)')"
    if how == "execution_options":
        project.edit(AUTOCOMMIT)
    else:
        index = f"with op.get_context().autocommit_block():\n    {index}"
    project.add("one", index)
    seen: list[tuple[Engine, object]] = []
    config = project.config(pg_url)
    config.attributes["during"] = lambda c: seen.append((c.engine, c.scalar(text("SELECT pg_backend_pid()"))))
    if duplicate:
        with pytest.raises(exc.IntegrityError, match="could not create unique index"):
            command.upgrade(config, "head")
    else:
        command.upgrade(config, "head")
    [(migrations, backend)] = seen
    with migrations.connect() as connection:
        assert connection.get_isolation_level() == "READ COMMITTED"
        assert driver_connection_of(connection.connection).autocommit is False
        assert connection.scalar(text("SELECT pg_backend_pid()")) == backend
        connection.execute(text("CREATE TABLE two ()"))
        connection.rollback()
        assert not inspect(connection).has_table("two")
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'one_id'::regclass"
        assert connection.scalar(text(valid)) is not duplicate
    migrations.dispose()


@pytest.mark.slow
@ABANDONS
def test_two_databases_have_a_budget_each(
    tmp_path: Path, application: Callable[..., Engine], pg_url: str, second_url: str
) -> None:
    """The template multidb with max_size=1: it holds one connection to each while the application has one
    idle at each; and when one of them is checked out, that is the one that the error speaks of. (Then env.py
    abandons its connection to the other one in a cycle. A checkout that waits for it has it collected.)"""
    project = Project(tmp_path, "multidb")
    project.add("one", STEPS["one"])
    urls = {"shop": pg_url, "archive": second_url}
    config = project.multidb_config(urls)
    shop, archive = application(pg_url), application(second_url)
    for engine in (shop, archive):
        idle(engine, 1)
    with archive.connect(), pytest.raises(CheckoutTimeout, match=f"/{database(second_url)} "):
        command.upgrade(config, "head")
    config = project.multidb_config(urls, pool_timeout=30)
    command.upgrade(config, "head")
    assert tables(shop) == tables(archive) == {"alembic_version", "one"}
    assert held(shop) == held(archive) == 0


@pytest.mark.slow
@ABANDONS
def test_two_names_of_one_database_need_two_connections(
    tmp_path: Path, application: Callable[..., Engine], pg_url: str
) -> None:
    """The template multidb holds a connection per name. Two names of one URL share one limit: with max_size=1
    the second one gets an error that names this thread; with max_size=2 it works, also after the error."""
    project = Project(tmp_path, "multidb")
    project.edit(
        ('connection=rec["connection"],', 'connection=rec["connection"], version_table=f"{name}_version",')
    )
    project.add("one", "op.create_table(engine_name, sa.Column('id', sa.Integer))")
    engine = application(max_size=1)
    urls = {"shop": pg_url, "archive": pg_url}
    me = threading.current_thread().name
    with pytest.raises(CheckoutTimeout, match=rf"open 1, held 1, .* limit 1\..*first: {me} \("):
        command.upgrade(project.multidb_config(urls), "head")
    command.upgrade(project.multidb_config(urls, max_size=2, pool_timeout=30), "head")
    assert tables(engine) == {"shop_version", "shop", "archive_version", "archive"}


@pytest.mark.parametrize("template", ["generic", "multidb"])
def test_offline_mode_makes_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """It prints SQL from the URL alone."""
    monkeypatch.chdir(tmp_path)  # the template multidb writes one file per database there
    project = Project(tmp_path, template)
    project.add("one", STEPS["one"])
    config = project.multidb_config({"alembic": NOWHERE})
    config.output_buffer = io.StringIO()
    before = set(PoolManager.report()["pools"])
    command.upgrade(config, "head", sql=True)
    printed = config.output_buffer.getvalue()
    if template == "multidb":
        printed = (tmp_path / "alembic.sql").read_text()
    assert "CREATE TABLE one" in printed
    assert set(PoolManager.report()["pools"]) <= before  # what other tests have left may go meanwhile


def test_a_migration_in_a_thread_of_an_asynchronous_application_takes_from_its_limit(
    tmp_path: Path, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """The template async has a loop of its own, in a thread beside the application's loop. An idle connection
    of the application gives way to the migration, and afterwards the application has one again."""
    project = Project(tmp_path, "async")
    project.add("one", STEPS["one"])
    engine = create_async_engine(url_for("async", pg_url), poolclass=QueriesPool, max_size=1)
    config = project.config(url_for("async", pg_url), pool_timeout=30)
    seen = []

    def during(connection: Connection) -> None:
        eventually(lambda: pg_observer.backends(database(pg_url)) == 1, "max_size backends")
        seen.append(engine.pool.statistics())  # type: ignore[attr-defined]

    async def application() -> set[str]:
        await names()
        await asyncio.to_thread(command.upgrade, config, "head")
        try:
            return await names()
        finally:
            await engine.dispose()

    async def names() -> set[str]:
        async with engine.connect() as connection:
            return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))

    config.attributes["during"] = during
    assert asyncio.run(application()) == {"alembic_version", "one"}
    assert [(now.open, now.held, now.limit) for now in seen] == [(1, 1, 1)]


# -- the program ---------------------------------------------------------------------------------------


class Program:
    """A project that the real program makes, and the program in it."""

    def __init__(self, folder: Path, template: str = "generic", edits: Edits = (POOL_CLASS,)) -> None:
        self.folder = folder
        self.run("init", "-t", template, "migrations")
        (folder / "models.py").write_text(MODELS)
        for edits_of_env in edits:
            edit(folder / "migrations" / "env.py", *edits_of_env)

    def ini(self, *replacements: tuple[str, str]) -> None:
        """Change alembic.ini."""
        edit(self.folder / "alembic.ini", *replacements)

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run a command of Alembic's."""
        return self.python("-m", "alembic", *arguments, status=status)

    def python(self, *arguments: str, status: int = 0) -> str:
        """Run Python in the project, every warning an error; what it printed, its log after that."""
        ended = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == status, ended.stderr
        return ended.stdout + ended.stderr

    def revision(self) -> Path:
        """The file of the only revision."""
        [file] = (self.folder / "migrations" / "versions").glob("*.py")
        return file


REPORT = """\
    import json
    from sqla_queries_pool import PoolManager

    connection = op.get_bind()
    pool = connection.engine.pool
    said = {"pool": type(pool).__name__, "name": connection.exec_driver_sql("SHOW application_name").scalar()}
    if hasattr(pool, "pid"):
        pools = PoolManager.report()["pools"]
        numbers = pools[pool.pid]
        said |= {"max_size": numbers["max_size"], "idle_ttl": numbers["idle"]["ttl"]}
        said |= {"timeout": pool.timeout(), "open": numbers["connections"]["open"], "pools": len(pools)}
    print("SAID", json.dumps(said))
"""
"""A migration that says which pool it runs on."""


def said(printed: str) -> Any:
    """What REPORT printed."""
    [line] = re.findall(r"^SAID (.*)$", printed, re.MULTILINE)
    return json.loads(line)


def ini_url(url: str, **query: str) -> str:
    """A URL as it stands in an ini file, where a percent sign is written twice."""
    quoted = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    return (f"{url}?{quoted}" if quoted else url).replace("%", "%%")


def url_for(template: str, url: str) -> str:
    """The URL of a database for a template; its driver for the template async is asyncpg."""
    if template != "async":
        return url
    pytest.importorskip("asyncpg")
    return make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)


@pytest.mark.slow
def test_the_template_generic_with_the_pool_class_changed(
    tmp_path: Path, pg_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """The recipe's commands, init to downgrade, by the real program with the recipe's options, among them
    max_size=1, which reach the pool. A program that has ended leaves no backend behind."""
    program = Program(tmp_path, edits=(POOL_CLASS, (("target_metadata = None\n", f"{MODELS_GENERIC}\n"),)))
    url = ini_url(pg_url, application_name="nightly migrations")
    program.ini((INI_URL, "\n".join([f"sqlalchemy.url = {url}", *OPTIONS, ""])))
    engine = create_engine(pg_url, poolclass=NullPool)
    assert "New upgrade operations detected" in program.run("check", status=255)
    printed, left = {}, {}
    assert COMMANDS[0] == "init migrations"  # it was run above
    for line in COMMANDS[1:]:
        printed[line] = program.run(*line.split())
        left[line] = tables(engine)
        if line.startswith("revision"):
            edit(program.revision(), ('    """Upgrade schema."""\n', f'    """Upgrade schema."""\n{REPORT}'))
        if line == "upgrade head":
            edit(program.revision(), (REPORT, ""))
    name = program.revision().name.split("_")[0]
    assert "Detected added table 'customer'" in printed["revision --autogenerate -m customers"]
    assert said(printed["upgrade head"]) == {
        "pool": "QueriesPool",
        "name": "nightly migrations",
        "max_size": 1,
        "idle_ttl": 2.5,
        "timeout": 5,
        "open": 1,
        "pools": 1,
    }
    assert left["upgrade head"] == {"alembic_version", "customer"}
    assert f"{name} (head)" in printed["current"]
    assert "No new upgrade operations detected." in printed["check"]
    assert f"<base> -> {name} (head), customers" in printed["history"]
    assert "CREATE TABLE customer" in printed["upgrade head --sql"]
    assert left["downgrade base"] == {"alembic_version"}
    eventually(lambda: pg_observer.backends(database(pg_url)) == 0, "no backends")


ASYNC_PROJECT = {
    "as Alembic makes it": ((), ()),
    "with the pool class changed": (POOL_CLASS, OPTIONS),
}
"""What is changed in ``env.py``, and what stands next to the URL."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "project",
    [pytest.param("as Alembic makes it", marks=pytest.mark.exhaustive), "with the pool class changed"],
)
def test_the_template_async(
    tmp_path: Path, pg_url: str, pg_observer: Observer, eventually: Eventually, project: str
) -> None:
    """The recipe's commands by the real program, with asyncpg: with NullPool, and with QueriesPool and the
    recipe's options. A program that has ended leaves no backend behind."""
    edits, options = ASYNC_PROJECT[project]
    program = Program(tmp_path, "async", (edits, (("target_metadata = None\n", f"{MODELS_GENERIC}\n"),)))
    url = ini_url(url_for("async", pg_url))
    program.ini((INI_URL, "\n".join([f"sqlalchemy.url = {url}", *options, ""])))
    engine = create_engine(pg_url, poolclass=NullPool)
    assert "New upgrade operations detected" in program.run("check", status=255)
    assert "Detected added table 'customer'" in program.run("revision", "--autogenerate", "-m", "customers")
    edit(program.revision(), ('    """Upgrade schema."""\n', f'    """Upgrade schema."""\n{REPORT}'))
    upgraded = said(program.run("upgrade", "head"))
    edit(program.revision(), (REPORT, ""))
    if options:
        assert upgraded == {
            "pool": "QueriesPool",
            "name": "",
            "max_size": 1,
            "idle_ttl": 2.5,
            "timeout": 5,
            "open": 1,
            "pools": 1,
        }
    else:
        assert upgraded["pool"] == "NullPool"
    assert tables(engine) == {"alembic_version", "customer"}
    assert f"{program.revision().name.split('_')[0]} (head)" in program.run("current")
    assert "No new upgrade operations detected." in program.run("check")
    assert "CREATE TABLE customer" in program.run("upgrade", "head", "--sql")
    program.run("downgrade", "base")
    assert tables(engine) == {"alembic_version"}
    eventually(lambda: pg_observer.backends(database(pg_url)) == 0, "no backends")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_template_multidb_with_the_pool_class_changed(
    tmp_path: Path, pg_url: str, second_url: str, pg_observer: Observer, eventually: Eventually
) -> None:
    """The same with two databases, each with max_size=1 and tables of its own."""
    program = Program(tmp_path, "multidb", (POOL_CLASS, (("target_metadata = {}\n", f"{MODELS_MULTIDB}\n"),)))
    for ini, url in ((INI_URL, pg_url), (INI_URL_2, second_url)):
        program.ini((ini, f"sqlalchemy.url = {ini_url(url, connect_timeout='9')}\nsqlalchemy.max_size = 1\n"))
    one, two = create_engine(pg_url, poolclass=NullPool), create_engine(second_url, poolclass=NullPool)

    program.run("revision", "--autogenerate", "-m", "tables")
    edit(
        program.revision(),
        ('    """Upgrade engine2 schema."""\n', f'    """Upgrade engine2 schema."""\n{REPORT}'),
    )
    name = program.revision().name.split("_")[0]
    upgraded = said(program.run("upgrade", "head"))
    assert (upgraded["pool"], upgraded["max_size"], upgraded["pools"]) == ("QueriesPool", 1, 2)
    assert tables(one) == {"alembic_version", "customer"}
    assert tables(two) == {"alembic_version", "parcel"}
    assert program.run("current").count(f"{name} (head)") == 2
    assert "No new upgrade operations detected." in program.run("check")
    program.run("downgrade", "base")
    assert tables(one) == tables(two) == {"alembic_version"}
    for url in (pg_url, second_url):
        eventually(lambda url=url: pg_observer.backends(database(url)) == 0, "no backends")


@pytest.mark.slow
def test_multidb_with_one_url_for_both_names_ends_with_an_error_that_says_why(
    tmp_path: Path, pg_url: str
) -> None:
    """With max_size=1 the program ends after pool_timeout, and its last line has the holder and the limit."""
    program = Program(tmp_path, "multidb")
    for ini in (INI_URL, INI_URL_2):
        options = "sqlalchemy.max_size = 1\nsqlalchemy.pool_timeout = 0\n"
        program.ini((ini, f"sqlalchemy.url = {pg_url}\n{options}"))
    start = "sqla_queries_pool.errors.CheckoutTimeout: QueriesPool postgresql://"
    [said] = [line for line in program.run("current", status=1).splitlines() if line.startswith(start)]
    assert re.search(r"open 1, held 1, .* limit 1\. Held by, longest first: MainThread \(", said)


@pytest.mark.slow
def test_offline_mode_of_the_program_connects_nowhere(tmp_path: Path) -> None:
    """upgrade --sql prints SQL although nobody listens at the URL; the online mode fails there. Both
    templates; multidb writes a file per database."""
    for template, urls in (("generic", [INI_URL]), ("multidb", [INI_URL, INI_URL_2])):
        folder = tmp_path / template
        folder.mkdir()
        program = Program(folder, template)
        for url in urls:
            program.ini((url, f"sqlalchemy.url = {NOWHERE}\nsqlalchemy.max_size = 1\n"))
        program.run("revision", "-m", "empty")
        printed = program.run("upgrade", "head", "--sql")
        if template == "multidb":
            printed = (folder / "engine1.sql").read_text() + (folder / "engine2.sql").read_text()
        assert printed.count("CREATE TABLE alembic_version") == len(urls)
        assert "OperationalError" in program.run("upgrade", "head", status=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("template", ["generic", "async"])
@pytest.mark.parametrize(
    ("edits", "pool", "limit"),
    [((), "NullPool", None), (((("        poolclass=pool.NullPool,\n", ""),),), "QueriesPool", 1)],
    ids=["env.py as it was", "without its poolclass"],
)
def test_a_url_with_the_plugin_works(
    tmp_path: Path, pg_url: str, template: str, edits: Edits, pool: str, limit: int | None
) -> None:
    """?plugin=queries&max_size=1 in sqlalchemy.url: where env.py names a pool class, that one stays and the
    URL's words on the pool mean nothing; where it names none, it is QueriesPool. Offline mode works, too."""
    program = Program(tmp_path, template, edits)
    own = {} if template == "async" else {"application_name": "nightly migrations"}  # asyncpg takes no such
    url = ini_url(url_for(template, pg_url), plugin="queries", max_size="1", **own)
    program.ini((INI_URL, f"sqlalchemy.url = {url}\n"))
    program.run("revision", "-m", "one")
    edit(program.revision(), ('    """Upgrade schema."""\n', f'    """Upgrade schema."""\n{REPORT}'))
    upgraded = said(program.run("upgrade", "head"))
    assert (upgraded["pool"], upgraded["name"]) == (pool, own.get("application_name", ""))
    assert upgraded.get("max_size") == limit
    assert "(head)" in program.run("current")
    program.run("downgrade", "base")
    edit(program.revision(), (REPORT, ""))
    assert "CREATE TABLE alembic_version" in program.run("upgrade", "head", "--sql")


@pytest.mark.slow
def test_migrations_in_an_application_leave_its_logging_alone_where_env_py_says_so(
    tmp_path: Path, pg_url: str
) -> None:
    """env.py configures logging from the ini file. As Alembic makes it, that silences the loggers there are,
    the pool's too; with disable_existing_loggers=False it does not."""
    program = Program(tmp_path)
    program.ini((INI_URL, f"sqlalchemy.url = {pg_url}\nsqlalchemy.max_size = 1\n"))
    script = (
        "import logging\nfrom alembic import command\nfrom alembic.config import Config\n"
        "import sqla_queries_pool\n"
        "loggers = [logging.getLogger(name) for name in ('shop', 'sqlalchemy.pool.QueriesPool')]\n"
        "command.upgrade(Config('alembic.ini'), 'head')\n"
        "print([logger.disabled for logger in loggers])\n"
    )

    assert program.python("-c", script).startswith("[True, True]")
    edit(tmp_path / "migrations" / "env.py", KEEP_LOGGERS)
    assert program.python("-c", script).startswith("[False, False]")


def test_the_recipe_shows_what_is_tested_here() -> None:
    """What changes in env.py stands on the page as it does above."""
    shown = " ".join(RECIPE.split())
    for change in (POOL_CLASS[0][1], POOL_CLASS[1][1], USE_CONNECTION, KEEP_LOGGERS[1]):
        assert " ".join(change.split()) in shown
