"""Each step of a checkout and a return in an event loop, crossed with what can become of it: nothing is lost.

A step is done, fails, takes its time, never ends, or its task is cancelled in the middle of it: of real tasks
on a real server, with two connections and more tasks than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from conftest import Observer
from hazards import eventually
from sqlalchemy import event, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only
from test_asyncio import all_out, name_of, pool_of, soon, url_of
from test_asyncio_hazards import SEED

from sqla_queries_pool import CheckoutTimeout, QueriesPool

pytestmark = pytest.mark.slow
STEPS = (
    *("do_connect", "connect", "checkout", "before_cursor_execute", "reset", "checkin", "close"),
    *("do_ping", "do_rollback", "do_commit"),
)
"""Events of SQLAlchemy's, then what a dialect does with a connection."""
OUTCOMES = ("ok", "error", "slow", "never", "cancelled")
VISITS = (1, 2, 3)
"""Which time the step is taken."""
TASKS = 5
CASES = list(itertools.product(STEPS, OUTCOMES, VISITS))
if (
    sqlalchemy.__version__ < "2.1"
):  # there, with any pool, Connection.close() returns nothing where that fails
    CASES = [case for case in CASES if case[:2] != ("do_rollback", "error")]
SHARE = 15
"""How many of them are tried where not all are."""


asker: contextvars.ContextVar[asyncio.Task[Any]] = contextvars.ContextVar("asker")
"""The task for which a step is done."""


class Injected(exc.SQLAlchemyError):
    """What a step raises."""


class Case:
    """One step, and what becomes of it, once."""

    def __init__(self, engine: AsyncEngine, step: str, outcome: str, visit: int) -> None:
        self._outcome = outcome
        self._left = visit
        self.happened = False
        self.go_on = asyncio.Event()
        """Set at the end: then the step that never ends does."""
        sync, dialect = engine.sync_engine, engine.dialect
        if step in ("do_ping", "do_rollback", "do_commit"):
            real: Callable[..., Any] = getattr(dialect, step)

            def instead(connection: Any) -> Any:
                self._step()
                return real(connection)

            setattr(dialect, step, instead)
        else:
            event.listen(sync, step, lambda *_: self._step())

    def _step(self) -> None:
        self._left -= 1
        if self._left or asyncio._get_running_loop() is None:  # in the worker's thread nothing is awaited
            return
        self.happened = True
        if self._outcome == "error":
            raise Injected("it fails")
        with contextlib.suppress(exc.MissingGreenlet), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # never awaited, outside of a greenlet
            if self._outcome == "slow":
                await_only(asyncio.sleep(0.01))
            elif self._outcome == "never":
                await_only(self.go_on.wait())
            elif self._outcome == "cancelled":
                asker.get().cancel()  # the pool opens in a task of its own
                await_only(asyncio.sleep(0))


async def work(engine: AsyncEngine) -> None:
    """Use a connection, commit, and invalidate it at last."""
    me = asyncio.current_task()
    assert me is not None
    asker.set(me)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await connection.commit()
        await connection.execute(text("SELECT 2"))
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 3"))
        await connection.invalidate()


async def play(engine: AsyncEngine, what: tuple[str, str, int], observer: Observer, name: str) -> bool:
    """Play one case; return whether it came to the step."""
    case, outcome = Case(engine, *what), what[1]
    tasks = [asyncio.create_task(work(engine)) for _ in range(TASKS)]
    late = (await asyncio.wait(tasks, timeout=0.15 if outcome == "never" else 60))[1]
    assert not late or outcome == "never", "something hangs"
    while late:
        late.pop().cancel()
    await asyncio.sleep(0)
    case.go_on.set()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if outcome in ("ok", "slow"):
            assert error is None
        else:  # whose connection was lost in the middle of it is told so
            told = (Injected, asyncio.CancelledError, exc.PendingRollbackError, exc.DBAPIError)
            assert error is None or isinstance(error, told)
            assert not isinstance(error, CheckoutTimeout)
        del error
    tasks.clear()
    pool = pool_of(engine)

    def nothing_is_out() -> bool:
        # A cancelled close() may have left one to the collector.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exc.SAWarning)
            gc.collect()
        return pool.checkedout() == 0

    await soon(nothing_is_out, "nothing is out, or being opened")
    await soon(lambda: observer.backends(name, "idle in transaction") == 0, "none is in a transaction")
    async with all_out(engine, 2) as held:
        for connection in held:
            assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
        await soon(lambda: observer.backends(name) == 2, "no extra backend")
    return case.happened


@pytest.mark.parametrize("share", [SHARE, pytest.param(len(CASES), marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_whatever_becomes_of_a_step_nothing_is_lost(
    pg_url: str, pg_observer: Observer, driver: str, share: int, caplog: pytest.LogCaptureFixture
) -> None:
    """All slots can be had, no backend is extra or in a transaction, the audit finds nothing."""
    pytest.importorskip(driver)
    print(f"seed {SEED}")
    happened, name, url = 0, name_of(pg_url), url_of(pg_url, driver)
    if driver == "asyncpg":  # its request to cancel a statement asks for TLS first, and may be cut off
        url = url.update_query_dict({"ssl": "disable"})
    for case in random.Random(SEED).sample(CASES, share):
        print(*case)
        engine = create_async_engine(url, poolclass=QueriesPool, max_size=2, ping_after=0, pool_timeout=50)
        happened += asyncio.run(play(engine, case, pg_observer, name))
        eventually(lambda: pg_observer.backends(name) == 0, "all are closed")
        pool = pool_of(engine)
        eventually(lambda pool=pool: pool.statistics().open == 0, "all slots are free")  # type: ignore[misc]
        assert pool.audit().mended == ()
    assert happened > share / 2
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
