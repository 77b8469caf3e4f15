"""A pytest plugin for SQLAlchemy's own tests: where they, or SQLAlchemy, say QueuePool, they get QueriesPool.

``test_sqlalchemys_own.py`` runs them.  What is expected to fail has to: :data:`EXPECTED`.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
from fnmatch import fnmatchcase
from typing import Any

import pytest
import sqlalchemy.pool
from sqlalchemy.pool import impl
from sqlalchemy.util.concurrency import greenlet_spawn

from sqla_queries_pool import PoolManager, QueriesPool

FEW = 5
"""Connections: fewer than tests take that state no limit."""
ONE_CLASS = "one class serves both: it asks the dialect"
PRIVATE = "looks at QueuePool's private _pool, _overflow or _max_overflow"
NUMBERS = "docs/contract.rst, 6: size() is the sum, overflow() is never above 0"
LOGGER = "docs/contract.rst, 4: the logger's name, and two lines more"
DIRECT = "docs/contract.rst, 14: it is closed without waiting, and not by the dialect"
EXPECTED = {
    "AsyncEngineTest::test_cant_use_async_pool_w_create_engine": ONE_CLASS,
    "AsyncEngineTest::test_pool_classes(*QueriesPool-False)": ONE_CLASS,
    "EngineEventsTest::test_close_parameter(*)": "docs/contract.rst, 8: what is out over a dispose counts",
    "IsolationLevelTest*::test_per_connection": "docs/contract.rst, 17: one limit for all engines",
    "LoggingNameTest::test_named_logger_echoflags_execute": LOGGER,
    "LoggingNameTest::test_unnamed_logger_echoflags_execute": LOGGER,
    "MockReconnectTest::test_dialect_initialize_retry_if_exception": PRIVATE,
    "PoolLoggingTest::test_queuepool_echo": LOGGER,
    "PoolLoggingTest::test_queuepool_logging": LOGGER,
    "PoolEventsTest::test_checkin_event_gc(invalidate*-is_asyncio)": DIRECT,
    "PoolEventsTest::test_checkin_event_gc(not_invalidate_conn_rec-has_terminate-is_asyncio)": DIRECT,
    "PoolTest::test_is_asyncio_from_dialect(QueriesPool-*)": ONE_CLASS,
    "PoolTest::test_is_asyncio_from_dialect_cls(QueriesPool-True)": ONE_CLASS,
    "PoolTest::test_rec_info": "docs/contract.rst, 7: a detached connection leaves no record",
    "PoolTest::test_recreate_state(QueriesPool-*)": "compares all attributes, private ones too",
    "PrePingRealTest::test_pre_ping_db_stays_shutdown": PRIVATE,
    "QueuePoolTest::test_close_connection_logging(*)": DIRECT,
    "QueuePoolTest::test_connect_checkout_handler_always_gets_info": PRIVATE,
    "QueuePoolTest::test_connect_handler_not_called_for_recycled": PRIVATE,
    "QueuePoolTest::test_connrec_invalidated_within_checkout_no_race": "patches a private method",
    "QueuePoolTest::test_error_on_pooled_reconnect_cleanup_*": PRIVATE,
    "QueuePoolTest::test_fifo": "docs/contract.rst, 5: last in, first out",
    "QueuePoolTest::test_invalidate_close_interrupted": DIRECT,
    "QueuePoolTest::test_overflow_no_gc": "docs/contract.rst, 6: what is above pool_size stays",
    "QueuePoolTest::test_overflow_reset_on_failed_connect": PRIVATE,
    "QueuePoolTest::test_queuepool_close": NUMBERS,
    "QueuePoolTest::test_queuepool_del": NUMBERS,
    "QueuePoolTest::test_recreate": PRIVATE,
}
"""Class::test(parameters), as a pattern -> why it fails."""
EXPECTED_ON_SQLITE = {
    "OnConnectTest::test_initialize_connect_calls": "docs/contract.rst, 10: it is in memory",
}
"""The same, of tests that pass on PostgreSQL."""

SOON = 1.0
"""Seconds after which a checkout times out where a test states nothing, in place of 30: some have to."""

IN_A_LOOP = (
    "PoolEventsTest::test_checkin_event_gc*(*is_asyncio)",
    "QueuePoolTest::test_close_connection_logging(*)",
    "QueuePoolTest::test_invalidate_close_interrupted",
)

for module in (sqlalchemy, sqlalchemy.pool, impl):
    for name in {"QueuePool", "AsyncAdaptedQueuePool"} & vars(module).keys():
        setattr(module, name, QueriesPool)


def _times_out_soon() -> None:
    parameters = inspect.signature(QueriesPool.__init__).parameters.values()
    stated = [p for p in parameters if p.default is not p.empty]
    defaults = tuple(SOON if p.name == "timeout" else p.default for p in stated)
    QueriesPool.__init__.__defaults__ = defaults


_times_out_soon()


def name_of(item: pytest.Item) -> str:
    """Class::test(parameters), without the name of the database."""
    kind = getattr(item, "cls", None)
    name = item.name.replace("[", "(").replace("]", ")")
    return f"{kind.__name__.partition('_postgresql')[0]}::{name}" if kind is not None else name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is expected to fail has to fail, and has to be there."""
    on_sqlite = any(uri.startswith("sqlite:") for uri in config.getoption("dburi"))
    expected = EXPECTED | (EXPECTED_ON_SQLITE if on_sqlite else {})
    left = {
        pattern for pattern in expected if any(name_of(i).startswith(pattern.split(":")[0]) for i in items)
    }
    for item in items:
        for pattern, reason in expected.items():
            if fnmatchcase(name_of(item), pattern):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
                left.discard(pattern)
    if left:
        raise pytest.UsageError(f"no such tests (any more): {sorted(left)}")


def pytest_runtest_setup() -> None:
    """An engine of an earlier test that was not collected yet would have a small limit for all."""
    if any(pool.max_size is not None and pool.max_size < FEW for pool in PoolManager.pools()):
        gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """These give a pool a dialect of asyncio and use it outside of any loop, which no driver can."""
    if not any(fnmatchcase(name_of(pyfuncitem), pattern) for pattern in IN_A_LOOP):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    asyncio.run(greenlet_spawn(lambda: pyfuncitem.obj(**arguments)))
    return True


def pytest_collection_finish() -> None:
    """An opening whose checkout was cancelled goes on, and counts: look for lost slots when it is over.

    What is there by now stays: later collections need not look at it.
    """
    gc.collect()
    gc.freeze()
    cancellation = sys.modules.get("sqlalchemy.testing.cancellation")
    if cancellation is None:  # an older SQLAlchemy
        return
    accounting: Any = cancellation.ConnectionAccounting
    look, go_on = accounting.record_lost_slots, accounting.record_next_use

    async def record_next_use(self: Any, scenario: Any, engine: Any) -> None:
        deadline = asyncio.get_running_loop().time() + 20
        while engine.pool.checkedout() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.001)
        look(self)
        await go_on(self, scenario, engine)

    accounting.record_lost_slots = lambda self: None
    accounting.record_next_use = record_next_use
