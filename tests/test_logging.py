"""What the pool says, and where: with SQLAlchemy's own pools, below ``sqlalchemy.pool``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from fakes import FakeClock, FakeDriver
from hazards import driver_connection_of, new_pid, sleeping_collector
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import QueuePool

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.logs import NAME

Eventually = Callable[..., None]
Lines = list[tuple[str, int, str]]


class Kept(logging.Handler):
    """Keeps what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Lines = []
        self.of_this_thread = False
        """Drop what other threads say?  They close what other tests left."""
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if not self.of_this_thread or record.thread == self._thread:
            self.lines.append((record.name, record.levelno, record.getMessage()))


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What reaches a handler of the logger ``sqlalchemy.pool``; whatever levels a test sets are undone."""
    handler = Kept()
    loggers = [logging.getLogger(name) for name in ("sqlalchemy.pool", NAME, f"{NAME}.web")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    for logger in loggers:
        logger.handlers.clear()  # SQLAlchemy's own, of an engine with echo_pool, are for good
    loggers[0].addHandler(handler)
    yield handler
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def clock() -> FakeClock:
    """The pools' clock."""
    return FakeClock(100.0)


@pytest.fixture
def pid(clock: FakeClock) -> str:
    """A pool that reads it."""
    name = new_pid()
    PoolManager.create(name, idle_ttl=10, max_size=5, time_method=clock)
    return name


@pytest.fixture
def engine(pid: str) -> Iterator[Callable[..., Engine]]:
    """Make an engine of that pool."""
    made: list[Engine] = []

    def make(poolclass: type = QueriesPool, **kw: Any) -> Engine:
        mine = {"pool_id": pid} if poolclass is QueriesPool else {}
        made.append(create_engine("fake://", module=FakeDriver(), poolclass=poolclass, **mine, **kw))
        return made[-1]

    yield make
    for each in made:
        each.dispose()


def use(engine: Engine) -> None:
    """A checkout, an invalidation, a checkout."""
    fairy = engine.raw_connection()
    fairy.invalidate()
    fairy.close()
    engine.raw_connection().close()


def without_objects(lines: Lines) -> Lines:
    """With what differs from pool to pool taken out: the class, and the connections."""
    return [
        (name.replace("impl.QueuePool", "QueriesPool"), level, message.split("<")[0])
        for name, level, message in lines
    ]


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_who_configures_sqlalchemy_pool_gets_what_sqlalchemys_pools_say(
    kept: Kept, engine: Callable[..., Engine], level: int
) -> None:
    """The same lines in the same order at the same levels, for the same use."""
    kept.of_this_thread = True
    yardstick, ours = engine(QueuePool), engine()
    with sleeping_collector():  # what other tests left would have its say
        logging.getLogger("sqlalchemy.pool").setLevel(level)
        use(yardstick)
        theirs, kept.lines = kept.lines, []
        use(ours)
    lines = without_objects(kept.lines)
    ours_alone = [line for line in lines if line[2].endswith(": opened ") or "could not see" in line[2]]
    assert len(ours_alone) == 3 * (level < logging.WARNING)
    assert [line for line in lines if line not in ours_alone] == without_objects(theirs)
    assert bool(kept.lines) == (level < logging.WARNING)
    assert {name for name, _, _ in kept.lines} <= {NAME}


@pytest.mark.parametrize(("echo", "least"), [(True, logging.INFO), ("debug", logging.DEBUG)])
def test_echo_pool_lowers_the_level_for_its_engine_alone(
    kept: Kept, engine: Callable[..., Engine], capsys: pytest.CaptureFixture[str], echo: Any, least: int
) -> None:
    """Into the log, and where nobody configured one to the standard output, as SQLAlchemy does."""
    loud, quiet = engine(echo_pool=echo), engine()
    use(quiet)
    assert not kept.lines
    use(loud)
    assert min(level for _, level, _ in kept.lines) == least
    assert "Invalidate connection" in capsys.readouterr().out


def test_pool_logging_name_names_the_engines_lines(kept: Kept, engine: Callable[..., Engine]) -> None:
    """Appended to the logger's name, so that it can be configured by itself."""
    logging.getLogger(f"{NAME}.web").setLevel(logging.INFO)
    use(engine(pool_logging_name="web"))
    use(engine(pool_logging_name="batch"))
    assert {name for name, _, _ in kept.lines} == {f"{NAME}.web"}


def test_the_names_and_levels_survive_a_dispose(kept: Kept, engine: Callable[..., Engine]) -> None:
    """``recreate()`` carries them over."""
    loud = engine(echo_pool="debug", pool_logging_name="web")
    loud.dispose()
    kept.lines.clear()
    use(loud)
    assert {name for name, _, _ in kept.lines} == {f"{NAME}.web"}
    assert min(level for _, level, _ in kept.lines) == logging.DEBUG


@pytest.mark.parametrize("echo", [True, False])
def test_why_a_connection_was_closed_is_in_its_engines_log(
    kept: Kept,
    engine: Callable[..., Engine],
    clock: FakeClock,
    pid: str,
    eventually: Eventually,
    echo: bool,
) -> None:
    """Who closes may be the housekeeper or another engine: the reason stands where its engine logs."""
    loud, other = engine(echo_pool=echo, pool_logging_name="web"), engine()
    loud.raw_connection().close()
    clock.now += 11
    shared = inside.pools()[pid]
    inside.upkeep(shared).sweep()
    eventually(lambda: not shared.numbers.total, "closed")
    PoolManager.set_max_size(pid, 1)
    loud.raw_connection().close()
    clock.now += 1
    other.raw_connection().close()
    reasons = [message.rpartition(": ")[2] for name, _, message in kept.lines if ": closing " in message]
    assert reasons == (["idle for longer than idle_ttl", "gave way to another engine"] if echo else [])
    assert {name for name, _, _ in kept.lines} <= {f"{NAME}.web"}


def test_what_fails_in_closing_is_logged_as_an_error(kept: Kept, engine: Callable[..., Engine]) -> None:
    """SQLAlchemy says it, at the same place."""
    mine = engine()
    fairy = mine.raw_connection()

    def refuse() -> None:
        raise FakeDriver.OperationalError("no")

    driver_connection_of(fairy).close = refuse
    fairy.close()
    mine.dispose()
    ((name, level, message),) = kept.lines
    assert (name, level) == (NAME, logging.ERROR)
    assert message.startswith("Exception closing connection <FakeConnection 1")


def test_a_new_limit_and_a_checkout_in_vain_are_a_line_each(kept: Kept) -> None:
    """At the level of ``echo_pool=True``; the report that an error has below its first line is not logged."""
    logging.getLogger("sqlalchemy.pool").setLevel(logging.INFO)
    pid = new_pid()
    pool = QueriesPool(FakeDriver().connect, pool_id=pid, max_size=3, timeout=0)
    PoolManager.set_max_size(pid, 1)
    PoolManager.set_max_size(pid, 1)
    fairy = pool.connect()
    with pytest.raises(CheckoutTimeout):
        pool.connect()
    fairy.close()
    said = [message for _, level, message in kept.lines if pid in message and level == logging.INFO]
    assert said[:2] == [f"{pid}: the limit is now 3, was 15", f"{pid}: the limit is now 1, was 3"]
    assert said[2].startswith(f"{pid}: opened <Connection ")
    assert said[3].startswith(f"QueriesPool {pid} (pid {pid}) had no connection within 0 s: ")
    assert len(said) == 4
    assert not any("\n" in message for message in said)
