"""What many threads get that want few connections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqla_queries_pool.demo.workload import WARM_UP, Outcome, run

from .competitors import PSYCOPG, PSYCOPG_BELOW, QUERIES, QUERIES_3, QUEUE, TIMEOUT, Backend, Competitor
from .effort import Effort
from .figures import Cell, Figure, Target

GRID = "many threads, fake driver"
ON_SERVER = "many threads, PostgreSQL"
BUDGET = "one budget"
SERVER_LOADS = ((40, 4, 0.005), (16, 4, 0.0))
"""Threads, connections, seconds of work.  Where work is sleep, the pool is what differs, and the machine has
no server beside it: so the grid is the fake driver's, and these tell whether the real one's says the same."""
BUDGET_LOADS = ((40, 8, 0.005), (9, 8, 0.005))
"""The same, for several engines on one budget.  With nine threads, there is always somebody else's idle
connection that could be closed to open one's own: a pool that does it at once does little else."""
SETTLED = 0.05
"""Seconds, and a turn, after which those who came all at once have found their rhythm; on a server, whose
connections take time to open, it is WARM_UP."""
LONG = 1.0
"""Seconds: two rounds of more than that are enough."""


@dataclass(frozen=True)
class Load:
    """How many threads, or tasks, want how many connections, for how many seconds each."""

    threads: int
    connections: int
    work: float
    who: str = "threads"

    @property
    def turn(self) -> float:
        """The seconds in which everybody could have had a connection once."""
        return self.threads / self.connections * self.work

    @property
    def scarce(self) -> bool:
        """Does anybody have to wait?"""
        return self.threads > self.connections

    def seconds(self, effort: Effort) -> float:
        """How long to measure."""
        return max(effort.seconds, effort.turns * self.turn)

    def __str__(self) -> str:
        return f"{self.threads} {self.who}, {self.connections} connections, {self.work * 1000:g} ms"


def grid(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """The grid, on the first backend, and some of it on the others."""
    competitors = [c for c in (QUEUE, PSYCOPG, PSYCOPG_BELOW, QUERIES) if c.there]
    loads = [Load(t, c, w) for t in effort.threads for c in effort.connections for w in effort.works]
    for number, backend in enumerate(backends):
        group = ON_SERVER if number else GRID
        for load in [Load(*each) for each in SERVER_LOADS] if number else loads:
            outcomes = measure(backend, competitors, load, effort)
            cell = _cell(group, str(load), outcomes, load)
            bar = "" if number else f"throughput, {load.threads} threads"
            cell.targets.extend(_beside(outcomes, competitors, bar))
            cell.targets.extend(_fairness(cell.figures, load))
            yield cell


def budget(backends: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Several engines beside one that has the budget for itself."""
    competitors = (QUERIES, QUERIES_3, QUEUE)
    for backend in backends:
        for load in [Load(*each) for each in BUDGET_LOADS]:
            outcomes = measure(backend, competitors, load, effort)
            cell = _cell(BUDGET, f"{backend.name}: {load}", outcomes, load)
            ratio = throughput(outcomes, QUERIES_3.name, QUERIES.name)
            fair = cell.figures[QUERIES_3.name]["Jain"]
            judged = load == Load(*BUDGET_LOADS[0])
            cell.targets.append(Target("throughput / one engine", ratio, at_least=0.9 if judged else None))
            cell.targets.append(Target("Jain's index", fair, at_least=0.95 if judged else None))
            yield cell


def measure(
    backend: Backend, competitors: Sequence[Competitor], load: Load, effort: Effort
) -> dict[str, list[Outcome]]:
    """Let the competitors take turns."""
    order = list(competitors)
    warm_up = load.turn + (SETTLED if backend.dialect is None else WARM_UP)
    outcomes: dict[str, list[Outcome]] = {competitor.name: [] for competitor in competitors}
    for _ in range(rounds(load.seconds(effort), effort)):
        for competitor in order:
            with backend.pools(competitor, load.connections, max(TIMEOUT, 4 * load.turn)) as pools:
                outcome = run(
                    pools,
                    backend.work(load.work),
                    threads=load.threads,
                    seconds=load.seconds(effort),
                    warm_up=warm_up,
                )
            outcomes[competitor.name].append(outcome)
        order.append(order.pop(0))
    return outcomes


def rounds(seconds: float, effort: Effort) -> int:
    """How often to measure what takes that long."""
    return min(effort.load_rounds, 2) if seconds > LONG else effort.load_rounds


def _cell(group: str, name: str, outcomes: dict[str, list[Outcome]], load: Load) -> Cell:
    return Cell(group, name, {each: figures(outcomes[each], load.turn) for each in outcomes})


def figures(outcomes: list[Outcome], turn: float) -> dict[str, Figure]:
    """Sum up one competitor."""
    summed = {
        "checkouts/s": Figure.of(outcome.throughput for outcome in outcomes),
        "Jain": Figure.of(outcome.jain for outcome in outcomes),
        "longest wait, ms": Figure.of(outcome.longest_wait * 1000 for outcome in outcomes),
    }
    if turn:
        summed["in turns"] = Figure.of(outcome.longest_wait / turn for outcome in outcomes)
    summed["timeouts"] = Figure.of(outcome.timeouts for outcome in outcomes)
    return summed


def throughput(outcomes: dict[str, list[Outcome]], one: str, other: str) -> Figure:
    """The ratio of two competitors."""
    return Figure.ratio((o.throughput for o in outcomes[one]), (o.throughput for o in outcomes[other]))


def _beside(
    outcomes: dict[str, list[Outcome]], competitors: Sequence[Competitor], bar: str
) -> Iterator[Target]:
    for competitor in competitors:
        if competitor is not QUERIES:
            ratio = throughput(outcomes, QUERIES.name, competitor.name)
            shown = bar if competitor is QUEUE else ""
            yield Target(f"throughput / {competitor.name}", ratio, at_least=1.0, bar=shown)


def _fairness(measured: dict[str, dict[str, Figure]], load: Load) -> Iterator[Target]:
    """What can be judged: where nobody waits the pool has no say, and without work there is no turn.

    Beside it stands how long somebody waits with psycopg_pool, which is as fair: so much is the machine's.
    """
    judged = load.scarce or load.work > 0
    ours = measured[QUERIES.name]
    yield Target("Jain's index", ours["Jain"], at_least=0.95 if judged else None)
    what, unit, bound = ("in turns", "turns", 2.0) if load.work else ("longest wait, ms", "ms", None)
    yield Target(f"longest wait, {unit}", ours[what], at_most=bound if load.scarce else None)
    if PSYCOPG.name in measured:
        yield Target(f"psycopg_pool's, {unit}", measured[PSYCOPG.name][what])
    yield Target("timeouts", ours["timeouts"], at_most=0)
