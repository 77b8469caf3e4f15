"""What is used of SQLAlchemy without standing in its documentation: these fail when SQLAlchemy changes it.

They look at SQLAlchemy alone, through a pool as small as can be, so that a failure here says what changed
and one elsewhere what it breaks.
"""

from __future__ import annotations

import ast
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from fakes import FakeDriver
from sqlalchemy import create_engine, event, exc
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import Pool, QueuePool
from sqlalchemy.pool import base as pool_base
from sqlalchemy.pool.base import ResetStyle
from sqlalchemy.util import get_cls_kwargs

import sqla_queries_pool
from sqla_queries_pool import QueriesPool
from sqla_queries_pool.engine import seams
from sqla_queries_pool.engine.records import Record

PACKAGE = Path(sqla_queries_pool.__file__).parent
SQLALCHEMYS = (Pool, pool_base._ConnectionRecord, pool_base._ConnectionFairy)


PING = "_do_ping_w_event" if hasattr(Dialect, "_do_ping_w_event") else "do_ping"
"""SQLAlchemy 2.0.0 pings without its listeners."""
PROXYS = {
    "close": {"_counter", "_checkin"},
    "_close_special": {"_counter", "_checkin"},
    "_checkin": {*("_finalize_fairy", "dbapi_connection", "_connection_record", "_pool", "_echo")},
    "_reset": {
        *("dispatch", "reset", "dbapi_connection", "_connection_record", "PoolResetState"),
        *("_reset_on_return", "reset_rollback", "reset_commit", "_dialect", "do_rollback", "do_commit"),
        *("_echo", "logger", "debug"),
    },
    "_checkout": {
        *("_ConnectionRecord", "checkout", "weakref", "ref", "current", "_connection_record", "_counter"),
        *("dbapi_connection", "fresh", "get_connection", "invalidate", "_checkin_failed", "dispatch"),
        *("_pre_ping", "_echo", "_dialect", PING, "_invalidate", "invalidate_pool", "logger"),
        *("exc", "DisconnectionError", "InvalidatePoolError", "InvalidRequestError", "BaseException"),
        *("util", "safe_reraise", "info", "debug"),
    },
}
"""What the methods of SQLAlchemy's proxy use whose work ours does: when it is checked out, and returned."""


class SpyPool(Pool):
    """Makes a record for each checkout, and tells in which order SQLAlchemy asks for what."""

    _is_asyncio = False
    _sqla_logger_namespace = "sqlalchemy.pool.Spy"

    def __init__(self, creator: Any, **kw: Any) -> None:
        self.said: list[str] = []
        super().__init__(creator, **kw)

    def _should_wrap_creator(self, creator: Any) -> Any:
        create = super()._should_wrap_creator(creator)

        def connect(record: Any) -> Any:
            self.said.append("open")
            return create(record)

        return connect

    def _do_get(self) -> Any:
        self.said.append("get")
        return pool_base._ConnectionRecord(self, connect=False)

    def _return_conn(self, record: Any) -> None:
        self.said.append("return")
        super()._return_conn(record)

    def _do_return_conn(self, record: Any) -> None:
        self.said.append("let go")

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        self.said.append("terminate" if terminate else "close")
        super()._close_connection(connection, terminate=terminate)


@pytest.fixture
def spy(driver: FakeDriver) -> SpyPool:
    """A pool that tells."""
    return SpyPool(driver.connect)


def private_names(tree: ast.AST) -> set[str]:
    """Every name with a leading underscore that a module reads, defines or passes, but for dunders."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            found |= {node.name, *(a.arg for a in node.args.args)}
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy"):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def sqlalchemys() -> set[str]:
    """Every private name of SQLAlchemy's base pool, its records and fairies, and of what they are made of."""
    found = {name for name in vars(pool_base) if name.startswith("_")}
    for cls in SQLALCHEMYS:
        found |= set(dir(cls)) | set(inspect.signature(cls.__init__).parameters)
        for _, function in inspect.getmembers(cls, inspect.isfunction):
            found |= set(function.__code__.co_names) | set(inspect.signature(function).parameters)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_all_that_is_private_in_sqlalchemy_is_listed_with_its_reason() -> None:
    """Whatever room it is used in; "private" is what begins with an underscore."""
    ours = set(dir(Record)) - set(dir(pool_base._ConnectionRecord))  # and what we only call the same
    used = {name for path in PACKAGE.rglob("*.py") for name in private_names(ast.parse(path.read_text()))}
    for room in sorted((PACKAGE / "engine").glob("*.py")):
        names = private_names(ast.parse(room.read_text()))
        assert (names & sqlalchemys()) - ours <= set(seams.PRIVATE)
    assert {name for name in seams.PRIVATE if name.startswith("_")} <= used


def test_no_other_room_imports_what_is_private() -> None:
    """``seams`` does, under a name of its own."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private or path.name == "seams.py", (path, private)


def test_a_checkout_gets_then_opens_and_a_check_in_returns(spy: SpyPool) -> None:
    """A record made without a connection opens one in get_connection(), through the wrapped creator."""
    spy.connect().close()
    assert spy.said == ["get", "open", "return", "let go"]


def test_a_detach_lets_go_directly_and_its_close_closes(spy: SpyPool) -> None:
    """``_do_return_conn`` without ``_return_conn`` is a detach, and nothing else is."""
    fairy = spy.connect()
    fairy.detach()
    assert spy.said == ["get", "open", "let go"]
    fairy.close()
    assert spy.said[3:] == ["close"]


def test_an_invalidation_closes_through_the_pool(spy: SpyPool) -> None:
    """With ``terminate``: it may not be polite to a dead server."""
    spy.connect().invalidate()
    assert spy.said == ["get", "open", "terminate", "return", "let go"]


def test_a_reopening_goes_through_the_pool(driver: FakeDriver) -> None:
    """Recycling, pre-ping and soft invalidation reopen inside SQLAlchemy, after ``_do_get``."""
    spy = SpyPool(driver.connect)
    record = pool_base._ConnectionRecord(spy, connect=False)
    record.get_connection()
    record.invalidate(soft=True)
    record._soft_invalidate_time += 1  # later than its opening, on a clock that ticks coarsely, too
    record.get_connection()
    assert spy.said == ["open", "terminate", "open"]


def test_a_checkout_that_fails_after_the_get_returns_the_record(driver: FakeDriver, spy: SpyPool) -> None:
    """``_fairy_was_created`` is False then, so that it is no second check-in."""
    driver.failures = 1
    with pytest.raises(FakeDriver.OperationalError):
        spy.connect()
    assert spy.said == ["get", "open", "return", "let go"]


def test_a_check_in_does_what_ours_does_again() -> None:
    """``Record.checkin`` repeats it: whatever SQLAlchemy adds to its own, ours has to have, too."""
    code = pool_base._ConnectionRecord.checkin.__code__
    assert set(code.co_names) == {
        *("fairy_ref", "util", "warn"),  # a second check-in
        *("dbapi_connection", "_ConnectionRecord__pool", "finalize_callback", "pop"),
        *("dispatch", "checkin", "_return_conn"),
    }
    assert code.co_varnames[: code.co_argcount] == ("self", "_fairy_was_created")


def test_a_proxy_is_made_of_what_ours_fills_in(spy: SpyPool) -> None:
    """And ours does what SQLAlchemy's does: whatever that adds, ours has to have, too."""
    assert seams.KNOWS_PROXY
    fairy: Any = spy.connect()
    assert (fairy._pool, fairy._counter, fairy._echo) == (spy, 1, False)
    assert fairy._connection_record.fairy_ref() is fairy
    assert fairy._connection_record.dbapi_connection is fairy.dbapi_connection
    names = {name: set(getattr(pool_base._ConnectionFairy, name).__code__.co_names) for name in PROXYS}
    assert names == PROXYS


def test_a_second_check_in_only_warns(spy: SpyPool) -> None:
    """``fairy_ref`` is None when nobody has it."""
    record = pool_base._ConnectionRecord(spy, connect=False)
    assert record.fairy_ref is None
    with pytest.warns(exc.SAWarning, match="Double checkin attempted"):
        record.checkin()
    assert not spy.said


def test_a_check_in_calls_back_the_last_first_then_tells_the_listeners(spy: SpyPool) -> None:
    """Dialects append to ``finalize_callback``, a deque; callbacks are for connections that are open."""
    told: list[Any] = []
    event.listen(spy, "checkin", lambda *arguments: told.append(arguments))
    record = pool_base._ConnectionRecord(spy)
    connection = record.dbapi_connection
    record.finalize_callback.extend([lambda c: told.append(("first", c)), lambda c: told.append(("last", c))])
    record.checkin(_fairy_was_created=False)
    assert told == [("last", connection), ("first", connection), (connection, record)]


def test_a_records_reset_takes_a_connection_that_is_nobodys(driver: FakeDriver, spy: SpyPool) -> None:
    """``do_rollback`` of a dialect gets what looks like a fairy."""
    record = pool_base._ConnectionRecord(spy)
    spy._dialect.do_rollback(seams.AdhocProxiedConnection(record.dbapi_connection, record))  # type: ignore[arg-type]
    assert driver.connections[0].calls["rollback"] == 1


def test_a_pools_parameters_are_where_they_were(driver: FakeDriver) -> None:
    """A successor is made of them; QueuePool's ``recreate()`` reads the same."""
    engine = create_engine("fake://", module=driver)
    pool = QueuePool(
        driver.connect,
        recycle=7,
        echo=False,
        logging_name="web",
        reset_on_return="commit",
        pre_ping=True,
        dialect=engine.dialect,
    )
    assert pool._creator == driver.connect
    assert (pool._recycle, pool._pre_ping, pool._orig_logging_name) == (7, True, "web")
    assert pool._reset_on_return is ResetStyle.reset_commit
    assert pool.__dict__["_dialect"] is engine.dialect
    assert "_dialect" not in QueuePool(driver.connect).__dict__


def test_listeners_are_handed_on_by_a_parameter(driver: FakeDriver, spy: SpyPool) -> None:
    """``_dispatch``, as QueuePool's ``recreate()`` passes it."""
    told: list[Any] = []
    event.listen(spy, "checkout", lambda *arguments: told.append(arguments))
    SpyPool(driver.connect, _dispatch=spy.dispatch).connect().close()
    assert len(told) == 1


def test_the_loggers_name_is_an_attribute_of_the_class(driver: FakeDriver) -> None:
    """``_sqla_logger_namespace``; the logging name is appended."""
    assert SpyPool(driver.connect).logger is logging.getLogger("sqlalchemy.pool.Spy")
    assert SpyPool(driver.connect, logging_name="web").logger is logging.getLogger("sqlalchemy.pool.Spy.web")


def test_create_engine_sees_the_parameters_of_the_class(driver: FakeDriver) -> None:
    """By introspection of ``__init__``, up through ``**kw``; it calls ``poolclass(creator, **arguments)``."""
    assert {"max_size", "idle_ttl", "timeout", "recycle", "pre_ping", "dialect"} <= get_cls_kwargs(
        QueriesPool
    )
    engine = create_engine("fake://", module=driver, poolclass=SpyPool, pool_recycle=5)
    assert engine.pool._recycle == 5


@pytest.mark.skipif(
    sqlalchemy.__version__.startswith("2.0.") and int(sqlalchemy.__version__.split(".")[2]) < 28,
    reason="before 2.0.28 anything passed; QueriesPool refuses by itself",
)
def test_create_engine_refuses_an_asynchronous_dialect_for_the_class() -> None:
    """``_is_asyncio`` is what it looks at."""
    pytest.importorskip("greenlet", reason="SQLAlchemy's asynchronous engines need greenlet")
    with pytest.raises(exc.ArgumentError, match="cannot be used with asyncio engine"):
        create_engine("postgresql+psycopg_async://host/database", poolclass=SpyPool)


def test_the_creator_of_an_engine_is_known_by_its_module_and_tells_its_arguments() -> None:
    """The variables of the closure are read where a listener on the dialect's class forbids the event."""
    engine = create_engine("postgresql+psycopg2://scott@db.example.net/shop", poolclass=QueriesPool)
    creator = engine.pool._creator
    assert seams.made_by_engine(creator)
    variables = inspect.getclosurevars(creator).nonlocals
    arguments = variables.get("cargs_tup", variables.get("cargs"))
    assert arguments is not None
    assert variables["cparams"]["dbname"] == "shop"
    assert seams.connect_arguments(creator, engine.dialect) == (list(arguments), variables["cparams"])
    assert not seams.made_by_engine(lambda: None)


def test_the_creator_asks_the_do_connect_listeners_first(driver: FakeDriver) -> None:
    """One that raises sees the arguments, and nothing connects; afterwards it is gone."""
    engine = create_engine("fake://", module=driver, poolclass=QueriesPool, connect_args={"host": "h"})
    assert seams.connect_arguments(engine.pool._creator, engine.dialect) == ([], {"host": "h"})
    assert driver.attempts == 0
    engine.connect().close()
    assert driver.attempts == 1
    engine.dispose()
