"""What many tasks get that want few connections, also beside other engines, and beside threads."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import create_engine

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.demo import workload
from sqla_queries_pool.demo.workload import WARM_UP, Outcome, jain, sleep_on_server

from . import tasks
from .async_competitors import (
    QUERIES,
    QUERIES_3,
    QUEUE,
    WAITING,
    AsyncCompetitor,
    EngineSource,
    Place,
    engine,
    installed,
    places,
    servers,
)
from .clock import Clock
from .competitors import TIMEOUT, Backend
from .contended import Load, figures, rounds, throughput
from .effort import Effort
from .figures import Cell, Figure, Target

GRID = "many tasks"
BUDGET = "one budget, tasks"
MIXED = "one budget, threads and tasks"
TASKS, CONNECTIONS = 100, 4
TURNS = 2
"""So many times the turns of threads: that a task has one checkout more than another must not count."""
ON_SERVER = 0.005
"""Seconds of the one load whose work is a statement.  Elsewhere it is sleep in the loop, so that the pool is
what differs."""
BUDGET_LOADS = ((40, 8, 0.005), (9, 8, 0.005))
"""As for threads; the first is judged."""
MIXED_THREADS, MIXED_TASKS, MIXED_CONNECTIONS, MIXED_WORK = 64, 100, 8, 0.005
SYNC_DRIVER = "psycopg2"


def grid(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Measure with each driver in each loop."""
    yield from places(GRID, _grid, servers(backends), effort)


def budget(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Several engines beside one that has the budget for itself; and threads beside tasks."""
    yield from places(BUDGET, _budget, servers(backends), effort)
    yield from places(MIXED, _mixed, servers(backends), effort, drivers=["asyncpg"])


# -- tasks ------------------------------------------------------------------------------------------


def _grid(place: Place, effort: Effort) -> Iterator[Cell]:
    competitors = [c for c in WAITING if c.there(place)]
    for work in effort.task_works:
        load = Load(TASKS, CONNECTIONS, work, "tasks")
        yield place.run(_measure(place, competitors, load, tasks.asleep(work), effort, f"{place}: {load}"))
    load = Load(TASKS, CONNECTIONS, ON_SERVER, "tasks")
    name = f"{place}: {load}, a statement"
    yield place.run(_measure(place, competitors, load, tasks.on_server(load.work), effort, name))


async def _measure(
    place: Place,
    competitors: Sequence[AsyncCompetitor],
    load: Load,
    work: tasks.Work,
    effort: Effort,
    name: str,
) -> Cell:
    outcomes = await take_turns(place, competitors, load, work, effort)
    cell = Cell(GRID, name, {each: figures(outcomes[each], load.turn) for each in outcomes})
    for competitor in competitors:
        if competitor is not QUERIES:
            ratio = throughput(outcomes, QUERIES.name, competitor.name)
            bound, bar = (1.0, f"throughput, tasks, {place.driver}") if competitor is QUEUE else (None, "")
            cell.targets.append(Target(f"throughput / {competitor.name}", ratio, at_least=bound, bar=bar))
    ours = cell.figures[QUERIES.name]
    cell.targets.append(Target("Jain's index", ours["Jain"], at_least=0.99))
    if load.work:
        cell.targets.append(Target("longest wait, turns", ours["in turns"], at_most=2))
        cell.targets.append(Target(f"{QUEUE.name}'s, turns", cell.figures[QUEUE.name]["in turns"]))
    cell.targets.append(Target("timeouts", ours["timeouts"], at_most=0))
    return cell


def _seconds(load: Load, effort: Effort) -> float:
    return max(effort.task_seconds, TURNS * load.seconds(effort))


async def take_turns(
    place: Place, competitors: Sequence[AsyncCompetitor], load: Load, work: tasks.Work, effort: Effort
) -> dict[str, list[Outcome]]:
    """Let the competitors take turns."""
    order = list(competitors)
    outcomes: dict[str, list[Outcome]] = {competitor.name: [] for competitor in competitors}
    for _ in range(rounds(_seconds(load, effort), effort)):
        for competitor in order:
            timeout = max(TIMEOUT, 8 * load.turn)
            async with place.pools(competitor, load.connections, timeout) as sources:
                with Clock() as clock:
                    outcome = await tasks.run(
                        sources,
                        work,
                        tasks=load.threads,
                        seconds=_seconds(load, effort),
                        warm_up=load.turn + WARM_UP,
                        clock=clock,
                    )
            outcomes[competitor.name].append(outcome)
        order.append(order.pop(0))
    return outcomes


# -- several engines --------------------------------------------------------------------------------


def _budget(place: Place, effort: Effort) -> Iterator[Cell]:
    for load in [Load(*each, "tasks") for each in BUDGET_LOADS]:
        judged = load == Load(*BUDGET_LOADS[0], "tasks")
        yield place.run(_several(place, load, effort, judged))


async def _several(place: Place, load: Load, effort: Effort, judged: bool) -> Cell:
    work = tasks.on_server(load.work)
    outcomes = await take_turns(place, (QUERIES, QUERIES_3, QUEUE), load, work, effort)
    cell = Cell(BUDGET, f"{place}: {load}", {each: figures(outcomes[each], load.turn) for each in outcomes})
    for each, runs in outcomes.items():
        cell.figures[each]["connects"] = Figure.of(outcome.connects for outcome in runs)
    ratio = throughput(outcomes, QUERIES_3.name, QUERIES.name)
    fair = cell.figures[QUERIES_3.name]["Jain"]
    cell.targets.append(Target("throughput / one engine", ratio, at_least=0.9 if judged else None))
    cell.targets.append(Target("Jain's index", fair, at_least=0.95 if judged else None))
    return cell


# -- threads and tasks ------------------------------------------------------------------------------


def _mixed(place: Place, effort: Effort) -> Iterator[Cell]:
    """One budget for a sync and an async engine, beside two pools that have half of it each."""
    if not installed(SYNC_DRIVER):
        yield Cell(MIXED, f"{place}: not measured: {SYNC_DRIVER} is not installed")
        return
    load = Load(MIXED_THREADS + MIXED_TASKS, MIXED_CONNECTIONS, MIXED_WORK, "threads and tasks")
    halves, one = "two pools of 4", "one budget of 8"
    outcomes: dict[str, list[tuple[Outcome, Outcome]]] = {halves: [], one: []}
    for _ in range(rounds(_seconds(load, effort), effort)):
        for name in outcomes:
            outcomes[name].append(place.run(_both(place, load, effort, shared=name == one)))
    together = {name: [_together(*pair) for pair in pairs] for name, pairs in outcomes.items()}
    cell = Cell(MIXED, f"{place}, {SYNC_DRIVER}: {MIXED_THREADS} threads, {MIXED_TASKS} tasks")
    for name, pairs in outcomes.items():
        cell.figures[name] = figures(together[name], load.turn)
        cell.figures[name]["connects"] = Figure.of(outcome.connects for outcome in together[name])
        for who, number in (("threads", 0), ("tasks", 1)):
            cell.figures[name] |= _side([pair[number] for pair in pairs], who, load.turn)
    ours = cell.figures[one]
    cell.targets.append(Target("throughput / two pools", throughput(together, one, halves)))
    for who in ("threads", "tasks"):
        cell.targets.append(Target(f"Jain's index, {who}", ours[f"Jain, {who}"], at_least=0.95))
        cell.targets.append(Target(f"longest wait, {who}, turns", ours[f"turns, {who}"], at_most=2))
    cell.targets.append(Target("Jain's index, all", ours["Jain"], at_least=0.95))
    yield cell


def _together(one: Outcome, other: Outcome) -> Outcome:
    return Outcome(one.seconds, (*one.shares, *other.shares), one.connects + other.connects)


def _side(outcomes: list[Outcome], who: str, turn: float) -> dict[str, Figure]:
    return {
        f"Jain, {who}": Figure.of(jain(outcome.counts) for outcome in outcomes),
        f"turns, {who}": Figure.of(outcome.longest_wait / turn for outcome in outcomes),
    }


async def _both(place: Place, load: Load, effort: Effort, shared: bool) -> tuple[Outcome, Outcome]:
    """Run both loads at once: what the threads got, and what the tasks got."""
    timeout = max(TIMEOUT, 8 * load.turn)
    seconds, warm_up = _seconds(load, effort), load.turn + WARM_UP
    names: dict[str, Any] = {"pool_timeout": timeout}
    if shared:
        pool_id = f"benchmark {secrets.token_hex(4)}"
        names |= {"poolclass": QueriesPool, "max_size": load.connections, "pool_id": pool_id}
    else:
        names |= {"pool_size": load.connections // 2, "max_overflow": 0}
    sync = create_engine(place.server.set(drivername=f"postgresql+{SYNC_DRIVER}"), **names)
    source = EngineSource(engine(place.url, **names))
    work = sleep_on_server(load.work)
    threads = partial(
        workload.run, [sync.pool], work, threads=MIXED_THREADS, seconds=seconds, warm_up=warm_up
    )
    try:
        of_threads = asyncio.get_running_loop().run_in_executor(None, threads)
        of_tasks = await tasks.run(
            [source], tasks.on_server(load.work), tasks=MIXED_TASKS, seconds=seconds, warm_up=warm_up
        )
        return await of_threads, of_tasks
    finally:
        await source.close()
        sync.dispose()
