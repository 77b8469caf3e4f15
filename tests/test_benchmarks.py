from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import io
import json
import re
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Observer
from rich.console import Console
from sqlalchemy import create_engine, exc, make_url
from sqlalchemy.pool import NullPool

from sqla_queries_pool.budget import ledger
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.demo.server import Server, read_url
from sqla_queries_pool.engine import queries_pool
from sqla_queries_pool.runtime import checkout

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The benchmarks: a package of the repository, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY))
        names = [path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")]
        yield SimpleNamespace(**{n.strip("_"): importlib.import_module(f"benchmarks.{n}") for n in names})


@pytest.fixture(scope="module")
def tiny(program: Any) -> Any:
    """As little effort as can be."""
    return program.effort.Effort(
        rounds=2,
        batches=2,
        checkouts=3,
        threads=(2, 6),
        connections=(2,),
        works=(0.0, 0.001),
        load_rounds=1,
        seconds=0.03,
        turns=2,
        crowd=30,
        imports=1,
        overload=0.2,
        loops=("asyncio",),
        task_works=(0.0, 0.001),
        task_seconds=0.03,
        fault=0.1,
        down=0.5,
    )


@pytest.fixture(scope="module")
def cells(program: Any, tiny: Any, pg_server: EmbeddedPostgres) -> list[Any]:
    """All that is measured."""
    with closing(Server(read_url(pg_server.url()))) as server:
        backends = [program.competitors.fake(), program.competitors.postgresql(server)]
        return list(program.main.cells(list(program.main.GROUPS), backends, tiny))


def shown(program: Any, cells: list[Any]) -> str:
    """What the program prints."""
    text = io.StringIO()
    program.report.show(cells, Console(file=text, width=200))
    return text.getvalue()


# -- figures and verdicts ---------------------------------------------------------------------------


def test_a_figure_is_the_median_with_what_was_least_and_most(program: Any) -> None:
    """Of the rounds, in whatever order."""
    figure = program.figures.Figure.of([5.0, 1.0, 2.0])
    assert (figure.median, figure.least, figure.most) == (2.0, 1.0, 5.0)


def test_a_ratio_is_one_of_the_same_round(program: Any) -> None:
    """A machine that is slow in one round is slow for both."""
    figure = program.figures.Figure.ratio([10.0, 200.0], [20.0, 100.0])
    assert (figure.least, figure.median, figure.most) == (0.5, 1.25, 2.0)


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ((0.9, 1.0, 1.1), {"at_least": 1.0}, "met"),
        ((0.8, 0.9, 1.1), {"at_least": 1.0}, "within the spread"),
        ((0.7, 0.8, 0.9), {"at_least": 1.0}, "not met"),
        ((0.9, 1.0, 1.1), {"at_most": 1.0}, "met"),
        ((0.9, 1.1, 1.2), {"at_most": 1.0}, "within the spread"),
        ((1.1, 1.2, 1.3), {"at_most": 1.0}, "not met"),
        ((0, 0, 0), {"at_most": 0}, "met"),
        ((1, 1, 1), {"at_most": 0}, "not met"),
        ((1, 2, 3), {}, ""),
    ],
)
def test_the_median_decides_whether_a_target_is_met(
    program: Any, values: tuple[float, ...], bounds: dict[str, float], verdict: str
) -> None:
    """If it misses it and a round does not, that is said, too; without a bound there is no verdict."""
    target = program.figures.Target("what", program.figures.Figure.of(values), **bounds)
    assert target.verdict == verdict
    assert target.judged == bool(bounds)


# -- what is printed, and drawn ---------------------------------------------------------------------


def grid(program: Any, *values: float) -> list[Any]:
    """Cells of one group with one target each, its spread on both sides."""
    figures = program.figures
    return [
        figures.Cell(
            "grid",
            f"cell {number}",
            {"QueuePool": {"per second": figures.Figure.of([7654.0])}},
            [
                figures.Target(
                    "ratio", figures.Figure(value, value / 2, value + 0.05), at_least=1.0, bar="ratio"
                )
            ],
        )
        for number, value in enumerate(values)
    ]


def test_many_cells_are_shown_in_a_line_each(program: Any) -> None:
    """With what was to be reached, and a word where it was not."""
    lines = shown(program, grid(program, 1.2, 0.5, 1.1, 1.3)).splitlines()
    (missed,) = [line for line in lines if "cell 1" in line]
    assert "0.5" in missed
    assert "not met" in missed
    (reached,) = [line for line in lines if "cell 3" in line]
    assert "not met" not in reached
    assert not any("7,654" in line for line in lines)


def test_few_cells_are_shown_with_all_competitors(program: Any) -> None:
    """Each with its figures, and each target in words."""
    text = shown(program, grid(program, 1.2))
    assert "7,654" in text
    assert "ratio: 1.2 (0.6..1.25), at least 1: met" in text


def test_the_summary_counts_verdicts_and_names_the_farthest_value(program: Any) -> None:
    """Targets that are called the same are one requirement."""
    lines = shown(program, grid(program, 1.2, 0.5, 0.7, 1.3)).splitlines()
    (row,) = [line.split() for line in lines if "at least 1" in line]
    assert row == ["grid", "ratio", "at", "least", "1", "0.5", "2", "2"]


def test_a_bar_stands_for_all_cells_that_name_it(program: Any) -> None:
    """It is their median, and its line goes from the least to the most of them."""
    (bar,) = program.chart.bars(grid(program, 0.5, 1.2, 1.1))
    assert (bar.value, bar.least, bar.most, bar.bound, bar.less) == (1.1, 0.5, 1.2, 1.0, False)
    assert bar.label == "ratio (3 cells)"
    assert bar.reaches


def test_a_bar_of_one_cell_has_the_spread_of_its_rounds(program: Any) -> None:
    """There are no other cells to tell how it varies."""
    figures = program.figures
    target = figures.Target("time", figures.Figure.of([0.4, 0.5, 1.1]), at_most=1.0, bar="checkout")
    (bar,) = program.chart.bars([figures.Cell("group", "cell", {}, [target])])
    assert (bar.label, bar.value, bar.least, bar.most, bar.less) == ("checkout", 0.5, 0.4, 1.1, True)


@pytest.mark.slow
def test_the_chart_names_its_bars(program: Any, tmp_path: Path) -> None:
    """The text of an SVG can be read and searched; the same figures make the same file."""
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        program.chart.draw(grid(program, 0.5, 1.2, 1.1), tmp_path / name)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert ">ratio (3 cells)</text>" in text
    assert "1.10" in text
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")


# -- who is compared --------------------------------------------------------------------------------


def everybody(program: Any) -> list[Any]:
    """All competitors that are installed."""
    known = vars(program.competitors).values()
    found = {c.name: c for c in known if isinstance(c, program.competitors.Competitor)}
    found |= {c.name: c for c in program.overload.COMPETITORS}
    return [competitor for competitor in found.values() if competitor.there]


def test_who_is_not_installed_does_not_take_part(program: Any) -> None:
    """Without an error: not everybody has all of them."""
    kind = program.competitors.Competitor
    assert not kind("a pool", program.competitors.queue_pool(), needs="no_such_module").there
    assert kind("a pool", program.competitors.queue_pool()).there


def test_every_competitor_gives_a_connection_and_takes_it_back(program: Any) -> None:
    """One after the other gets the same one, after a rollback; NullPool gives each a new one.

    The one that pings can't do so here.
    """
    calls: deque[str] = deque()

    class Connection(program.competitors.FakeConnection):  # type: ignore[misc]
        def rollback(self) -> None:
            calls.append("rollback")

    def connect() -> Connection:
        calls.append("connect")
        return Connection()

    for competitor in (c for c in everybody(program) if c is not program.competitors.PRE_PING):
        calls.clear()
        with program.competitors.fake(connect).pools(competitor, 2) as pools:
            assert len(pools) == competitor.engines
            for _ in range(3):
                pools[0].connect().close()
        assert calls.count("connect") == (3 if competitor.name == "NullPool" else 1), competitor.name
        assert calls.count("rollback") == 3, competitor.name


def test_a_checkout_that_waits_in_vain_fails_with_sqlalchemys_words(program: Any) -> None:
    """All that take part where somebody has to wait raise the same error, and know the same limit."""
    for competitor in (*program.overload.COMPETITORS, program.competitors.QUERIES_3):
        if competitor.there:
            with program.competitors.fake().pools(competitor, 1, timeout=0.01) as pools:
                with closing(pools[0].connect()), pytest.raises(exc.TimeoutError):
                    pools[-1].connect()
                pools[-1].connect().close()


# -- who is compared where tasks ask ----------------------------------------------------------------


@pytest.fixture(params=["asyncpg", "psycopg"])
def place(request: pytest.FixtureRequest, program: Any, pg_url: str) -> Any:
    """A database, with each driver, in asyncio's own loop."""
    pytest.importorskip(request.param)
    return program.async_competitors.Place(make_url(pg_url), request.param, "asyncio")


def test_every_async_competitor_gives_a_connection_and_takes_it_back(
    program: Any, place: Any, pg_url: str, pg_observer: Observer
) -> None:
    """One after the other gets the same one; at the end it is closed, as are the pools."""
    name = make_url(pg_url).database or ""

    async def use(competitor: Any) -> int:
        async with place.pools(competitor, 2) as sources:
            assert len(sources) == competitor.engines
            for _ in range(3):
                async with sources[0].connect() as connection:
                    await sources[0].execute(connection, "SELECT 1")
            return pg_observer.backends(name)

    everyone = [c for c in program.async_competitors.ALL if c.there(place)]
    assert {c.name for c in everyone} > {"AsyncAdaptedQueuePool", "QueriesPool"}
    for competitor in everyone:
        assert place.run(use(competitor)) == 1, competitor.name


def test_which_task_waits_in_vain_is_told_so(program: Any, place: Any) -> None:
    """By the error that its pool is known for; and the connection can be had afterwards."""

    async def checkout(source: Any) -> Any:
        """Some pools give up while they still connect."""
        while True:
            lease = source.connect()
            with suppress(source.timeouts):
                await lease.__aenter__()
                return lease

    async def wait(competitor: Any) -> None:
        async with place.pools(competitor, 1, timeout=0.05) as sources:
            lease = await checkout(sources[0])
            with pytest.raises(sources[-1].timeouts):
                await sources[-1].connect().__aenter__()
            await lease.__aexit__(None, None, None)
            await (await checkout(sources[-1])).__aexit__(None, None, None)

    waiting = (*program.async_competitors.WAITING, program.async_competitors.QUERIES_3)
    for competitor in (c for c in waiting if c.there(place)):
        place.run(wait(competitor))


def test_the_pool_of_one_driver_does_not_take_part_with_the_other(program: Any, place: Any) -> None:
    """asyncpg's pool has asyncpg's connections, and psycopg_pool has psycopg's."""
    pytest.importorskip("psycopg_pool")
    names = {c.name for c in program.async_competitors.ALL if c.there(place)}
    assert ("asyncpg's pool" in names) == (place.driver == "asyncpg")
    assert ("AsyncConnectionPool" in names) == (place.driver == "psycopg")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("greenlet", ["not measured: greenlet is not installed"]),
        ("asyncpg", ["asyncpg: not measured: asyncpg is not installed", "psycopg, asyncio: measured"]),
        ("uvloop", ["asyncpg, uvloop: not measured: uvloop is not installed"]),
    ],
)
def test_what_is_not_installed_has_a_cell_that_says_so(
    program: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, missing: str, said: list[str]
) -> None:
    """A driver, a loop, or all that SQLAlchemy needs for tasks: the others are measured."""
    monkeypatch.setattr(program.async_competitors, "installed", lambda module: module != missing)

    def measure(place: Any, effort: Any) -> Iterator[Any]:
        yield program.figures.Cell("group", f"{place}: measured")

    url, effort = make_url("postgresql://server"), dataclasses.replace(tiny, loops=("asyncio", "uvloop"))
    cells = list(program.async_competitors.places("group", measure, [url], effort))
    names = [cell.name for cell in cells]
    assert set(said) <= set(names)
    assert sum("not measured" not in name for name in names) == {"greenlet": 0}.get(missing, 2)
    assert all(name in shown(program, cells) for name in names)


# -- how it is counted ------------------------------------------------------------------------------


def test_instructions_are_the_same_in_each_run_and_grow_with_the_work(program: Any) -> None:
    """Also of what is called; and a tracer that was there before is there again."""

    def work(times: int) -> None:
        for _ in range(times):
            step()

    def step() -> int:
        return sum((1, 2, 3))

    def tracer(*_: object) -> None: ...

    count = program.scaling.instructions
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        once, again, more = count(lambda: work(1)), count(lambda: work(1)), count(lambda: work(11))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert once == again
    assert more - once >= 10 * 4


def test_a_checkout_of_the_queue_keeps_it_as_long_as_it_is(program: Any) -> None:
    """The first gets the connection and the last is new, so that each checkout is like the one before."""
    queue = program.scaling.Queue(3)
    waiting = list(queue.attachment.queue)
    for _ in range(3):
        queue.checkout()
    assert len(queue.attachment.queue) == 3
    assert all(waiter.answer is not None for waiter in waiting)
    assert not set(waiting) & set(queue.attachment.queue)


@pytest.mark.parametrize(("patience", "served"), [(60.0, True), (0.0, False)])
def test_a_request_counts_if_it_is_served_before_its_caller_gives_up(
    program: Any, monkeypatch: pytest.MonkeyPatch, patience: float, served: bool
) -> None:
    """Where they are as patient as can be, all are served of a load that is half of what the pool can do."""
    monkeypatch.setattr(program.overload, "LOAD", 0.5)
    backend = program.competitors.fake()
    with backend.pools(program.competitors.QUEUE, program.overload.CONNECTIONS, timeout=30.0) as (pool,):
        crowd = program.overload._Crowd(pool, backend.work(0.0), 0.2)
        monkeypatch.setattr(program.overload, "PATIENCE", patience)
        result = crowd.run()
    assert (result.in_time > 0) == served
    assert (result.late == 0) == served
    assert result.refused == 0


class OneAtATime:
    """A source with one connection, for which tasks wait in order; some checkouts time out."""

    timeouts = (TimeoutError,)

    def __init__(self, refuse: int = 0) -> None:
        self.connects: list[None] = [None]
        self.refuse = refuse
        self.out = self.most = 0
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[None]:
        if self.refuse:
            self.refuse -= 1
            raise TimeoutError
        async with self._lock:
            self.out += 1
            self.most = max(self.most, self.out)
            yield
            self.out -= 1


def test_tasks_are_spread_over_the_sources_and_each_has_its_share(program: Any) -> None:
    """What is out is returned; the connections that all sources opened are counted."""

    async def load() -> tuple[Any, list[OneAtATime]]:
        sources = [OneAtATime(), OneAtATime()]
        work = program.tasks.asleep(0.001)
        return await program.tasks.run(sources, work, tasks=6, seconds=0.3, warm_up=0.01), sources

    outcome, sources = asyncio.run(load())
    assert len(outcome.shares) == 6
    assert all(share.checkouts for share in outcome.shares)
    assert outcome.connects == 2
    assert [(source.out, source.most) for source in sources] == [(0, 1), (0, 1)]


@pytest.mark.slow
def test_a_task_whose_checkout_timed_out_asks_again(program: Any) -> None:
    """It is counted, and is one wait with the next."""

    async def load() -> Any:
        return await program.tasks.run(
            [OneAtATime(refuse=3)], program.tasks.asleep(0.001), tasks=1, seconds=1.0, warm_up=0.0
        )

    outcome = asyncio.run(load())
    assert outcome.timeouts == 3
    assert outcome.fewest > 0


def test_the_first_error_of_a_task_ends_the_load(program: Any) -> None:
    """And no task is left."""

    async def fail(source: Any, connection: Any) -> None:
        raise LookupError

    async def load() -> set[Any]:
        with pytest.raises(LookupError):
            await program.tasks.run([OneAtATime()], fail, tasks=3, seconds=60.0, warm_up=0.0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(load()) == set()


def test_a_loop_that_is_blocked_makes_all_beats_late_that_were_due(program: Any) -> None:
    """Not one alone: each of them would have been somebody's."""
    heartbeat = program.heartbeat
    blocked = 10 * heartbeat.INTERVAL

    async def block() -> list[float]:
        heart = heartbeat.Heart()
        await asyncio.sleep(2 * heartbeat.INTERVAL)
        time.sleep(blocked)  # in the loop, on purpose
        await heart.stop()
        return list(heart.late)

    late = asyncio.run(block())
    assert max(late) >= blocked - heartbeat.INTERVAL
    assert sum(seconds >= blocked / 2 - heartbeat.INTERVAL for seconds in late) >= 5


def test_the_clock_stands_still_but_never_goes_back(program: Any) -> None:
    """It goes on where this thread runs or sleeps."""
    begin = time.perf_counter()
    with program.clock.Clock() as clock:
        seen = [clock() for _ in range(1000)]
        time.sleep(0.01)
        seen.append(clock())
    assert seen == sorted(seen)
    assert 0.0 < seen[-1] - seen[0] <= time.perf_counter() - begin


@pytest.mark.slow
def test_the_network_passes_on_refuses_and_holds(program: Any, pg_url: str) -> None:
    """From a process of its own, which ends with it."""
    url = make_url(pg_url)
    assert url.host is not None
    assert url.port is not None
    with program.network.Network(url.host, url.port) as network:
        engine = create_engine(network.url(url), poolclass=NullPool)
        hasty = create_engine(network.url(url), poolclass=NullPool, connect_args={"connect_timeout": 2})
        with engine.connect() as connection:
            network.refuse()
            with pytest.raises(exc.OperationalError):
                connection.exec_driver_sql("SELECT 1")
        with pytest.raises(exc.OperationalError, match="refused"):
            engine.connect()
        network.blackhole()
        with pytest.raises(exc.OperationalError, match="timeout expired"):
            hasty.connect()
        network.pass_on()
        engine.connect().close()
    assert network._process.returncode == 0


def test_what_is_timed_alone_is_what_the_code_does(program: Any) -> None:
    """Each statement of the table stands in the functions that a checkout and its return run."""
    code = "".join(inspect.getsource(module) for module in (ledger, queries_pool, checkout))
    for statements in program.defaults.COSTS.values():
        for statement in re.split("; |\n", statements):
            first, _, then = statement.removeprefix("holder = ").partition(": ")
            assert first in code, statement
            assert then in code, statement


# -- HikariCP ---------------------------------------------------------------------------------------


def test_what_hikaricp_needs_is_named_where_it_is_not(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The JVM, or the first package of which there is no file."""
    hikari = program.hikari
    monkeypatch.setattr(hikari, "JARS", tmp_path)
    monkeypatch.setattr(hikari.shutil, "which", lambda name: None)
    assert hikari.missing() == "not measured: no JVM"
    monkeypatch.setattr(hikari.shutil, "which", lambda name: "/bin/true")
    assert hikari.missing() == f"not measured: no {tmp_path}/HikariCP.jar"
    for name in hikari.NEEDED:
        (tmp_path / name).touch()
    assert hikari.missing() == "not measured: the JVM has no compiler"


def test_an_outage_is_seen_with_the_eyes_of_the_caller(program: Any) -> None:
    """The longest is one that began in it, the recovery the first that was served after it; from 10 to 20."""
    request = program.hikari.Request
    requests = [request(1.0, 9.0, True), request(11.0, 16.0, False), request(18.0, 21.0, False)]
    requests += [request(21.5, 22.5, True), request(23.0, 29.0, True)]
    figures = program.hikari.outcome(requests, 10.0, 20.0)
    assert {what: figure.median for what, figure in figures.items()} == {
        "longest request, s": 5.0,
        "errors": 2,
        "recovered after, s": 2.5,
        "errors after it was back": 1,
    }


@pytest.mark.exhaustive
def test_a_row_says_that_there_is_no_jvm_beside_those_that_are_measured(
    program: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown, so that nobody takes the table for all of it."""
    monkeypatch.setattr(program.hikari, "missing", lambda: "not measured: no JVM")
    with closing(program.hikari.cells([], dataclasses.replace(tiny, rounds=1))) as cells:
        cell = next(cells)
    assert cell.figures["HikariCP: not measured: no JVM"] == {}
    assert "HikariCP: not measured: no JVM" in shown(program, [cell])
    assert cell.figures["QueriesPool"]["opened"].most <= 1
    assert cell.figures["QueuePool"]["opened"].least > 1


@pytest.fixture
def jvm(program: Any) -> Iterator[Any]:
    """The process of HikariCP."""
    if reason := program.hikari.missing():
        pytest.skip(reason)
    with program.hikari.Jvm() as process:
        yield process


@pytest.fixture
def jdbc_url(pg_url: str, pg_observer: Observer) -> Iterator[Any]:
    """For JDBC's driver: it takes no password that was hashed as quickly as those of the tests."""
    pg_observer.query("SET scram_iterations = 4096")
    pg_observer.query("CREATE ROLE jdbc LOGIN PASSWORD 'jdbc'")
    pg_observer.query("RESET scram_iterations")
    yield make_url(pg_url).set(username="jdbc", password="jdbc")
    pg_observer.query("DROP ROLE jdbc")


@pytest.mark.exhaustive
def test_hikaricp_itself_opens_one_connection_for_a_spike_and_says_what_callers_saw(
    program: Any, jvm: Any, jdbc_url: Any
) -> None:
    """As it was published; and it uses the database that it is told to."""
    opened, latencies = program.hikari.hikari_spike(jvm)
    assert len(latencies) == program.hikari.REQUESTS
    assert min(latencies) >= 0.002
    assert 0 <= opened <= 5  # those of others: 45
    begin = time.time()
    caller = program.hikari.JvmCaller(jvm, jdbc_url, 5.0)
    program.hikari.wait_until_served({"HikariCP": caller}, begin)
    assert not caller.served_since(time.time() + 60.0)
    requests = caller.stop()
    assert requests[0].served
    assert begin - 0.01 <= requests[0].begin <= requests[0].end <= time.time() + 0.01


# -- real applications ------------------------------------------------------------------------------

WRK = """Running 2s test @ http://127.0.0.1:8000/db
  Latency Distribution
     50%  812.00us
     75%    3.00ms
     90%    9.00ms
     99%    1.25s
  4010 requests in 2.00s, 0.72MB read
"""
ERRORS = """  Socket errors: connect 1, read 2, write 3, timeout 4
  Non-2xx or 3xx responses: 10
"""


def test_what_wrk_says_is_understood(program: Any) -> None:
    """In milliseconds, and an error is no answer."""
    assert program.wrk.understand(WRK + ERRORS) == program.wrk.Answers(2000.0, 4000, 0.812, 1250.0, 20)
    assert program.wrk.understand(WRK).errors == 0


class Erratic:
    """A web server, of whose requests each has another fate, in turn."""

    FATES = ("200 OK", "503 Unavailable", "500 Error", "no answer", "the end of the connection")

    def __init__(self) -> None:
        self.met: Counter[str] = Counter()
        self.connections = 0
        self._fates = cycle(self.FATES)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError), closing(writer):
            while await reader.readuntil(b"\r\n\r\n"):
                fate = next(self._fates)
                self.met[fate] += 1
                if fate == "the end of the connection":
                    return
                if fate != "no answer":
                    writer.write(f"HTTP/1.1 {fate}\r\nContent-Length: 2\r\n\r\nok".encode())


@pytest.mark.slow
def test_a_crowd_comes_whatever_becomes_of_it_and_gives_up(program: Any) -> None:
    """Each request counts for what came of it; those of the warm-up do not."""
    erratic = Erratic()
    before: list[int] = []

    async def offer(limit: float, **more: Any) -> Any:
        async with await asyncio.start_server(erratic, "127.0.0.1") as server:
            host, port = server.sockets[0].getsockname()
            url = f"http://{host}:{port}/db"
            return await asyncio.to_thread(program.crowd.offer, url, 300.0, 0.3, limit, **more)

    answers = asyncio.run(offer(3.0))
    met = erratic.met
    assert met.total() == len(list(program.crowd.arrivals(300.0, 0.3))) > len(Erratic.FATES)
    assert len(answers.in_time) == met["200 OK"]
    assert answers.rejected == met["503 Unavailable"]
    assert answers.given_up == met["no answer"]
    assert answers.failed == met["500 Error"] + met["the end of the connection"]
    assert erratic.connections < met.total()
    assert answers.goodput == pytest.approx(met["200 OK"] / 0.3)
    assert 0.0 < answers.within(0.5) <= answers.within(0.99) < 3.0
    erratic.met.clear()
    warm = asyncio.run(offer(0.2, warm_up=1.0, settled=lambda: before.append(erratic.met.total())))
    assert before[0] > 0
    counted = len(warm.in_time) + warm.rejected + warm.given_up + warm.failed
    assert 0 < counted < erratic.met.total()


@pytest.fixture
def world(program: Any, pg_url: str) -> None:
    """The table that the applications use."""
    with closing(program.applications.Observer(pg_url)) as observer:
        observer.prepare()


async def _get(application: Any, endpoints: Sequence[str]) -> dict[str, Any]:
    httpx = pytest.importorskip("httpx")
    transport = httpx.ASGITransport(app=application)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return {name: (await client.get(f"/{name}")).json() for name in endpoints}


@pytest.mark.parametrize(("server", "driver"), [("flask", "psycopg2"), ("fastapi", "asyncpg")])
def test_the_applications_read_and_write(
    program: Any, world: None, pg_url: str, monkeypatch: pytest.MonkeyPatch, server: str, driver: str
) -> None:
    """As many rows as TechEmpower's endpoints do; what was written is there."""
    pytest.importorskip(server)
    url = make_url(pg_url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    told = {"url": url, "poolclass": "QueriesPool", "max_size": 2}
    monkeypatch.setenv(program.web.TOLD, json.dumps(told))
    application = getattr(program.web, server)()
    if server == "flask":
        client = application.test_client()
        got = {name: client.get(f"/{name}").json for name in program.web.ENDPOINTS}
    else:
        got = asyncio.run(_get(application, program.web.ENDPOINTS))
    assert [len(got[name]) for name in program.web.ENDPOINTS] == [1, 5, 5]
    looking = create_engine(pg_url, poolclass=NullPool)
    with looking.connect() as connection:
        for row in got["updates"]:
            assert connection.execute(program.web.READ, row).one() == (
                row["id"],
                row["randomnumber"],
            )


@pytest.fixture
def stage(program: Any) -> Iterator[Any]:
    """A server for the applications, if they are all installed."""
    for name in ("flask", "gunicorn", "fastapi", "uvicorn", "asyncpg"):
        pytest.importorskip(name)
    for name in ("wrk", "pgbouncer"):
        if program.applications.find_program(name) is None:
            pytest.skip(f"{name} is not installed")
    with program.applications.stage() as stage:
        yield stage


def measured(measure: Callable[[int], Iterator[Any]]) -> list[Any]:
    """What is measured in a second, or in as many as a busy machine needs to answer all at least once."""
    for seconds in (1, 5, 25):
        results = list(measure(seconds))
        if all(result.answers.goodput > 0 for result in results):
            break
    return results


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("named", "servers"), [("share=", ["Flask", "FastAPI"]), ("FastAPI, NullPool", ["FastAPI"])]
)
def test_all_processes_of_an_application_have_the_budget_that_is_measured(
    program: Any, stage: Any, named: str, servers: list[str]
) -> None:
    """Whoever shares it out: QueriesPool, or PgBouncer; and the table has them."""
    results = measured(lambda seconds: program.applications.compare(stage, seconds, [32], ["updates"], named))
    assert [result.way.split(",")[0] for result in results] == servers
    for result in results:
        assert result.answers.goodput > 0
        assert result.answers.errors == 0
        assert 0 < result.backends <= program.ways.BUDGET
        assert result.processor > 0
    text = io.StringIO()
    program.applications.show(results, Console(file=text, width=120))
    assert "/updates, 32 clients" in text.getvalue()


@pytest.mark.exhaustive
def test_an_overload_is_rejected_and_the_others_are_served_in_time(
    program: Any, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both servers, where no more may wait than can be served."""
    monkeypatch.setattr(program.applications, "WARM_UP", 1)
    monkeypatch.setattr(program.applications, "CAPACITY_SECONDS", 2)
    overloads = measured(lambda seconds: program.applications.overload(stage, seconds, "max_waiting"))
    assert [each.way.server for each in overloads] == ["Flask", "FastAPI"]
    for each in overloads:
        assert each.answers.goodput > 0
        assert each.answers.rejected > 0
        assert each.answers.failed == 0
        assert 0 < each.backends <= program.ways.BUDGET
    text = io.StringIO()
    program.applications.show_overload(overloads, Console(file=text, width=140))
    assert "Flask: /slow" in text.getvalue()
    assert "max_waiting=0" in text.getvalue()


# -- the program ------------------------------------------------------------------------------------


def test_a_group_that_nobody_knows_is_refused(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured, and with those that there are."""
    with pytest.raises(SystemExit):
        program.main.main(["--only", "uncontented"])
    assert "uncontended" in capsys.readouterr().err


def test_a_python_that_has_the_gil_says_that_it_is_not_measured(
    program: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to compare it with."""
    monkeypatch.setattr(program.gil.sysconfig, "get_config_var", lambda name: None)
    (cell,) = program.gil.cells([], tiny)
    assert cell.name == "not measured: this Python has the GIL"
    assert cell.name in shown(program, [cell])


@pytest.mark.exhaustive
def test_throughput_with_and_without_the_gil_is_measured_in_other_processes(program: Any, tiny: Any) -> None:
    """On a Python that can't do without it, both are with it."""
    cell = program.gil.compare(dataclasses.replace(tiny, seconds=0.5))  # a busy machine does nothing in less
    assert all(figures["checkouts/s"].least > 0 for figures in cell.figures.values())
    assert [target.what for target in cell.targets] == ["throughput / with the GIL"]


@pytest.mark.exhaustive
def test_the_program_measures_what_it_is_told_to_and_writes_it(
    program: Any,
    tiny: Any,
    pg_server: EmbeddedPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The groups that were named, as a table and as JSON, with the parameters and the verdicts."""
    monkeypatch.setattr(program.main, "QUICK", tiny)
    path = tmp_path / "figures.json"
    named = ["--only", "uncontended", "footprint"]
    assert program.main.main(["--quick", *named, "--url", pg_server.url(), "--json", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {cell["group"] for cell in written["cells"]} == {"one thread: checkout and return", "footprint"}
    assert written["parameters"]["checkouts"] == tiny.checkouts
    assert written["parameters"]["took"] >= 0
    verdicts = {target["verdict"] for cell in written["cells"] for target in cell["targets"]}
    assert verdicts <= {"met", "within the spread", "not met", ""}
    printed = capsys.readouterr().out
    assert "memory per idle connection" in printed
    assert "It took" in printed


@pytest.mark.exhaustive
def test_everything_is_measured(program: Any, cells: list[Any], tiny: Any) -> None:
    """One run of all groups, looked at in three ways: each process of the tests would have one of its own."""
    all_groups_have_their_cells_and_all_cells_are_shown(program, cells, tiny)
    all_who_are_installed_are_measured(program, cells)
    hikaricp_is_measured_where_it_is(program, cells)
    what_is_counted_does_not_depend_on_the_machine(cells)
    the_chart_has_bars_of_threads_and_of_tasks(program, cells)


def all_groups_have_their_cells_and_all_cells_are_shown(program: Any, cells: list[Any], tiny: Any) -> None:
    """Every group of the program, with both backends where it says so, and the same targets throughout."""
    groups = [cell.group for cell in cells]
    assert groups.count("one thread: checkout and return") == 3
    assert groups.count("many threads, fake driver") == 2 * 1 * 2
    assert groups.count("many threads, PostgreSQL") == len(program.contended.SERVER_LOADS)
    assert groups.count("designs of a hand-over, fake driver") == 1
    assert groups.count("designs of a hand-over, PostgreSQL") == 1
    assert groups.count("designs of a hand-over, tasks, asyncpg, asyncio") == len(tiny.task_works)
    assert groups.count("one budget") == 2 * len(program.contended.BUDGET_LOADS)
    assert groups.count("50 requests at once") == 2
    assert groups.count("more of something") == 4
    assert groups.count("footprint") == 2
    assert groups.count("one thread, with listeners") == 3
    assert groups.count("on by default") == 3
    assert groups.count("overload") == 1
    drivers, works = len(program.async_competitors.DRIVERS), len(tiny.task_works)
    assert groups.count("one task: checkout and return") == 2 * drivers
    assert groups.count("many tasks") == (works + 1) * drivers
    assert groups.count("one budget, tasks") == len(program.async_contended.BUDGET_LOADS) * drivers
    assert groups.count("one budget, threads and tasks") == 1
    assert groups.count("a heartbeat") == (len(program.heartbeat.FAULTS) + 1) * drivers
    assert groups.count("HikariCP's scenarios") == 3
    assert len({(cell.group, cell.name) for cell in cells}) == len(cells)
    text = shown(program, cells)
    assert all(cell.name in text and cell.group in text for cell in cells)


def all_who_are_installed_are_measured(program: Any, cells: list[Any]) -> None:
    """Each in one cell at least; and who takes part in a cell has the same figures as the others."""
    measured = {name for cell in cells for name in cell.figures}
    assert {competitor.name for competitor in everybody(program)} <= measured
    assert {competitor.name for competitor in program.async_competitors.ALL} <= measured
    for cell in cells:
        if cell.group != "more of something":
            assert len({tuple(figures) for figures in cell.figures.values() if figures}) <= 1
        for figures in cell.figures.values():
            assert all(figure.least <= figure.median <= figure.most for figure in figures.values())


def hikaricp_is_measured_where_it_is(program: Any, cells: list[Any]) -> None:
    """In each of its scenarios; elsewhere the row says why not."""
    reason = program.hikari.missing()
    row = f"HikariCP: {reason}" if reason else "HikariCP"
    for cell in cells:
        if cell.group == "HikariCP's scenarios":
            assert bool(cell.figures[row]) == (not reason)


def what_is_counted_does_not_depend_on_the_machine(cells: list[Any]) -> None:
    """Instructions of a checkout of the ledger, and bytes of a connection."""
    targets = {target.what: target for cell in cells for target in cell.targets}
    checkout = targets["waiters in the ledger: instructions, ratio"].value
    assert checkout.least == checkout.most
    assert 0 < targets["bytes above SQLAlchemy's own record"].value.median < 1024


def the_chart_has_bars_of_threads_and_of_tasks(program: Any, cells: list[Any]) -> None:
    """Of the time of one, and of the throughput of many."""
    bars = {(bar.label.split(" (")[0], bar.less) for bar in program.chart.bars(cells)}
    assert {("checkout, PostgreSQL", True), ("throughput, 6 threads", False)} <= bars
    for driver in program.async_competitors.DRIVERS:
        one = {(f"one task, {driver}: {part}", True) for part in ("pool", "engine")}
        assert bars > one | {(f"throughput, tasks, {driver}", False)}


def test_the_load_of_a_grid_cell_lasts_for_as_many_turns_as_were_asked_for(
    program: Any, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    """Else, where many threads want few connections for long, nobody could have had one twice."""
    seen: list[dict[str, Any]] = []
    real = program.contended.run

    def run(pools: Any, work: Any, **arguments: Any) -> Any:
        seen.append(arguments)
        return real(pools, work, **arguments)

    monkeypatch.setattr(program.contended, "run", run)
    effort = dataclasses.replace(tiny, threads=(6,), works=(0.0, 0.001), turns=20)
    list(program.contended.grid([program.competitors.fake()], effort))
    turn = 6 / 2 * 0.001
    assert sorted({arguments["seconds"] for arguments in seen}) == pytest.approx([effort.seconds, 20 * turn])
    assert max(arguments["warm_up"] for arguments in seen) >= turn
