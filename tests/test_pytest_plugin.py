"""The pytest plugin: a test that leaks a connection fails, with the line of the checkout; others do not."""

from __future__ import annotations

import configparser
import gc
import random
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import aiosqlite
import inside
import pytest
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from sqlalchemy.dialects.sqlite import aiosqlite as dialect

pytest_plugins = ("pytester",)

IMPORTED = (aiosqlite, dialect, sqlalchemy.ext.asyncio, sqlalchemy.orm)
"""pytester forgets what was imported for a run: each one would import these again."""

PLUGIN = "pytest_queries_pool"
QUIET = ("-p", PLUGIN, "-W", "ignore", "-q", "--tb=no", "-rN")
CONFTEST = """
import asyncio, threading, unittest
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqla_queries_pool import QueriesPool, labelled

options = {"poolclass": QueriesPool, "max_size": 1000}
engine = create_engine("sqlite:///shop.db", **options)
other = create_engine("sqlite:///other.db", pool_reset_on_return=None, **options)
asynchronous = create_async_engine("sqlite+aiosqlite:///shop.db", **options)
with engine.begin() as connection:
    connection.execute(text("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
with other.begin() as connection:
    connection.execute(text("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
kept = []
go = threading.Event()

def dozing(function):
    there = threading.Event()
    thread = threading.Thread(target=function, args=(there,), daemon=True)
    thread.start()
    there.wait()
    return thread

def pytest_sessionfinish():
    go.set()
"""

LEAKS = {
    "connection": "kept.append(engine.connect())  # here",
    "dropped": "engine.connect()  # here",
    "cycle": "box = [engine.connect()]  # here\nbox.append(box)",
    "raw": "kept.append(engine.raw_connection())  # here",
    "raw_dropped": "engine.raw_connection().cursor()  # here",
    "pool": "kept.append(engine.pool.connect())  # here",
    "transaction": "c = engine.connect()  # here\nc.begin()\nkept.append(c)",
    "result": "kept.append(engine.connect().execute(text('SELECT 1')))  # here",
    "session": "s = Session(engine)\ns.execute(text('SELECT 1'))  # here\nkept.append(s)",
    "session_dropped": "s = Session(engine)\ns.execute(text('SELECT 1'))  # here",
    "scoped": "kept.append(scoped_session(sessionmaker(engine)))\nkept[-1].execute(text('SELECT 1'))  # here",
    "labelled": "with labelled('job'):\n    kept.append(engine.connect())  # here",
    "generator": "def rows():\n    with engine.connect() as c:  # here\n"
    "        yield from c.execute(text('SELECT 1'))\nkept.append(rows())\nnext(kept[-1])",
    "thread": "def work():\n    kept.append(engine.connect())  # here\n"
    "t = threading.Thread(target=work)\nt.start()\nt.join()",
    "dozing_thread": "def work(there):\n    with engine.connect():  # here\n        there.set()\n"
    "        go.wait()\ndozing(work)",
    "task": "async def work():\n    kept.append(await asynchronous.connect())  # here\nasyncio.run(work())",
    "task_session": "async def work():\n    s = AsyncSession(asynchronous)\n    kept.append(s)\n"
    "    await s.execute(text('SELECT 1'))  # here\nasyncio.run(work())",
    "task_dropped": "async def work():\n    await asynchronous.connect()  # here\nasyncio.run(work())",
    "returned": "c = other.raw_connection()  # here\n"
    "c.cursor().execute('INSERT INTO t VALUES (1)')\nc.close()",
    "two_deep": "def inner():\n    return engine.connect()  # here\n"
    "def outer():\n    return inner()\nkept.append(outer())",
}
"""How a connection can be left, and the line that is to be named."""
WAYS = {
    "function": "def test_{name}():\n{body}\n",
    "method": "class Test_{name}:\n    def test(self):\n{body2}\n",
    "unittest": "class {name}(unittest.TestCase):\n    def test(self):\n{body2}\n",
    "setup": "@pytest.fixture\ndef f_{name}():\n{body}\ndef test_{name}(f_{name}):\n    pass\n",
    "teardown": "@pytest.fixture\ndef f_{name}():\n    yield\n{body}\ndef test_{name}(f_{name}):\n    pass\n",
}
"""Where in a test."""


@pytest.fixture(autouse=True)
def _no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed here is nothing to these tests, and is imported again for each run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(pytester: pytest.Pytester, source: str, on: bool = True) -> dict[str, str]:
    """Run tests with the plugin, in this process: what failed, by the test's name, with the text."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_shop=f"from conftest import *\n{source}")
    result = pytester.inline_run(*QUIET, *(["--connection-leaks"] if on else []))
    reports = result.getreports("pytest_runtest_logreport")
    assert reports, "nothing ran"
    return {r.nodeid.partition("::")[2]: r.longreprtext for r in reports if r.failed}


@pytest.fixture(autouse=True)
def _what_leaked_goes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Now, and not in a collection during another test; what was leaked on purpose complains then."""
    yield
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    gc.collect()


@pytest.mark.slow
def test_two_hundred_leaks_are_named(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fails its own test, once, with the line that has checked the connection out."""
    inside.give_no_grace(monkeypatch)
    dice, source, lines = random.Random(16), ["from conftest import *"], {}
    kinds = [*LEAKS, *dice.choices(list(LEAKS), k=200 - len(LEAKS))]
    for number, kind in enumerate(kinds):
        name, body = f"{kind}_{number}", textwrap.indent(LEAKS[kind], "    ")
        way = dice.choice(list(WAYS.values()))
        test = way.format(name=name, body=body, body2=textwrap.indent(body, "    "))
        (at,) = (n for n, line in enumerate(test.splitlines()) if line.endswith("# here"))
        lines[name] = sum(text.count("\n") + 1 for text in source) + at + 1
        source.append(test)
    failed = run(pytester, "\n".join(source[1:]))
    named = {}
    for test, text in failed.items():
        (name,) = (name for name in lines if re.search(rf"(^|_){name}($|::)", test))
        assert "this test leaks 1 connection:" in text, text
        named[name] = int(re.findall(r"checked out at test_shop\.py:(\d+) in \w+$", text, re.MULTILINE)[-1])
    assert named == lines


FINE = """
@pytest.fixture(scope="session")
def of_session():
    with engine.connect() as c:
        yield c

@pytest.fixture(scope="module")
def of_module():
    c = engine.connect()
    c.execute(text("SELECT 1"))
    yield c
    c.close()

@pytest.fixture(params=[1, 2], scope="module")
def of_params(request, of_session):
    with engine.connect() as c:
        yield c

@pytest.fixture
def of_test():
    with engine.begin() as c:
        yield c

def test_none():
    pass

def test_all(of_session, of_module, of_test):
    with Session(engine) as s:
        s.execute(text("SELECT 1"))

def test_its_transaction_ends(of_session):
    with of_session.begin():
        of_session.execute(text("INSERT INTO t VALUES (1)"))

def test_params(of_params):
    pass

def test_late(request):
    request.getfixturevalue("of_module")

class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.c = engine.connect()

    @classmethod
    def tearDownClass(cls):
        cls.c.close()

    def setUp(self):
        self.own = engine.connect()
        self.addCleanup(self.own.close)

    def test_a(self):
        self.c.execute(text("SELECT 1"))
        self.c.rollback()

    def test_b(self):
        self.own.execute(text("SELECT 1"))

def test_generator():
    def rows():
        with engine.connect() as c:
            yield from c.execute(text("SELECT 1"))
    g = rows()
    next(g)
    del g

def test_detached():
    c = engine.connect()
    c.detach()
    c.close()

def test_invalidated():
    c = engine.connect()
    c.invalidate()
    c.close()

def test_tasks():
    async def work():
        async with AsyncSession(asynchronous) as s:
            await s.execute(text("SELECT 1"))
    async def all_of_them():
        await asyncio.gather(work(), work(), work())
    asyncio.run(all_of_them())

def test_a_thread_is_about_to_return_it():
    def serve(there):
        with engine.connect():
            there.set()
            threading.Event().wait(0.05)
    dozing(serve)

def test_a_dispose():
    with engine.connect():
        engine.dispose()
"""


def test_what_is_returned_is_no_leak(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixtures of all scopes, unittest's too, threads that return a moment later, tasks, generators."""
    inside.give_long_grace(monkeypatch)
    assert run(pytester, FINE) == {}


FIXTURES = """
@pytest.fixture(scope="module")
def forgets():
    c = engine.connect()  # forgotten
    yield c

@pytest.fixture(scope="session")
def of_session():
    with engine.connect() as c:  # begun
        yield c

def test_begins(of_session):
    of_session.execute(text("INSERT INTO t VALUES (1)"))

def test_goes_on(of_session):
    of_session.execute(text("INSERT INTO t VALUES (1)"))

def test_first(forgets):
    pass

def test_last(forgets):
    pass
"""


def test_what_fixtures_leave_fails_where_it_is_left(pytester: pytest.Pytester) -> None:
    """A fixture of a module that forgets its connection: the test at whose end it ends. One that a test
    leaves in a transaction: that test, not the next one, which found it so."""
    failed = run(pytester, FIXTURES)
    source = f"from conftest import *\n{FIXTURES}".splitlines()
    at = {line.partition("# ")[2]: number for number, line in enumerate(source, 1) if "  # " in line}
    assert set(failed) == {"test_begins", "test_last"}
    assert "left in a transaction by this test" in failed["test_begins"]
    assert f"checked out at test_shop.py:{at['begun']} in of_session" in failed["test_begins"]
    assert "still checked out" in failed["test_last"]
    assert f"checked out at test_shop.py:{at['forgotten']} in forgets" in failed["test_last"]


def test_the_report(pytester: pytest.Pytester) -> None:
    """Which database, how it was left, whose it is, and where it was checked out, innermost call last."""
    source = """
def order():
    return Session(engine)
def stock(session):
    session.execute(text("INSERT INTO t VALUES (1)"))
def test_shop():
    kept.append(order())
    with labelled("POST /order"):
        stock(kept[-1])
"""
    assert run(pytester, source)["test_shop"].splitlines() == [
        "this test leaks 1 connection:",
        f"  a connection of sqlite://{pytester.path}/shop.db: still checked out, in transaction "
        "(MainThread [POST /order])",
        "    checked out at test_shop.py:10 in test_shop",
        "    checked out at test_shop.py:6 in stock",
    ]


def test_one_that_has_failed_anyway_has_one_reason(pytester: pytest.Pytester) -> None:
    """Its traceback keeps the connection; the next test is not blamed for it either."""
    source = "def test_a():\n    c = engine.connect()\n    c.boom()\ndef test_b():\n    pass\n"
    failed = run(pytester, source)
    assert set(failed) == {"test_a"}
    assert "leaks" not in failed["test_a"]


def test_the_marker_switches_it_on_and_off(pytester: pytest.Pytester) -> None:
    """On for what has it, where the option is not given; off with False, where it is."""
    source = """
def test_unmarked():
    kept.append(engine.connect())

@pytest.mark.connection_leaks
def test_on():
    kept.append(engine.connect())

@pytest.mark.connection_leaks(False)
def test_off():
    kept.append(engine.connect())
"""
    before = inside.watched()
    assert set(run(pytester, source)) == {"test_unmarked", "test_on"}
    pytester.makeini("[pytest]\nconnection_leaks = false\n")
    assert set(run(pytester, source, on=False)) == {"test_on"}
    pytester.makeini("[pytest]\nconnection_leaks = true\n")
    assert set(run(pytester, source, on=False)) == {"test_unmarked", "test_on"}
    assert inside.watched() == before


def test_a_run_that_has_nothing_to_do_with_it_imports_nothing(pytester: pytest.Pytester) -> None:
    """Neither the package nor SQLAlchemy; and setup.cfg has pytest load no more than that."""
    pytester.makepyfile(
        "import sys\ndef test_imports():\n"
        "    assert not {'sqlalchemy', 'sqla_queries_pool'} & set(sys.modules)\n"
    )
    pytester.runpytest_subprocess("-p", PLUGIN).assert_outcomes(passed=1)
    metadata = configparser.ConfigParser()
    metadata.read(Path(__file__).parent.parent / "setup.cfg")
    assert metadata["options.entry_points"]["pytest11"].strip() == f"{PLUGIN} = {PLUGIN}"
    assert metadata["options"]["py_modules"] == PLUGIN


def test_what_the_page_shows_happens(pytester: pytest.Pytester) -> None:
    """The tests of docs/testing.rst, with the output that it shows."""
    page = (Path(__file__).parent.parent / "docs" / "testing.rst").read_text()
    source, shown = re.findall(r"code-block:: (?:python|text)\n\n((?:    .*\n|\n)+)", page)[:2]
    pytester.makepyfile(test_orders=textwrap.dedent(source).strip())
    result = pytester.runpytest_inprocess("-p", PLUGIN, "--connection-leaks", "-q", "-W", "ignore")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [line.replace("[", "[[]") for line in textwrap.dedent(shown).strip().splitlines()]
    )


@pytest.mark.slow
def test_with_processes_of_xdist_and_loops_of_pytest_asyncio(pytester: pytest.Pytester) -> None:
    """Each process watches its own; the end of a test's loop leaves nothing to look at, and is told."""
    pytest.importorskip("pytest_asyncio")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        test_shop="""
from conftest import *

@pytest.mark.parametrize("n", range(4))
def test_threads(n):
    if n % 2:
        kept.append(engine.connect())

@pytest.mark.asyncio
@pytest.mark.parametrize("n", range(4))
async def test_tasks(n):
    connection = await asynchronous.connect()
    if n % 2:
        kept.append(connection)
    else:
        await connection.close()
"""
    )
    plugins = ("-p", PLUGIN, "-p", "xdist", "-p", "pytest_asyncio.plugin")
    result = pytester.runpytest_subprocess(*plugins, "--connection-leaks", "-n", "1", "-rE")
    result.assert_outcomes(passed=8, errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "*checked out at test_shop.py:6 in test_threads",
            "*still checked out when its event loop ended (task *",
            "*checked out at test_shop.py:11 in test_tasks",
        ]
    )
