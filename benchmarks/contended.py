"""What many threads get that want few connections."""

from __future__ import annotations

from collections.abc import Sequence

from sqla_queries_pool.demo.workload import Outcome, run

from .competitors import Backend, Competitor
from .figures import Cell, Figure


def measure(
    backend: Backend,
    group: str,
    competitors: Sequence[Competitor],
    *,
    threads: int,
    connections: int,
    work: float,
    rounds: int,
    seconds: float,
    warm_up: float,
) -> Cell:
    """Let the competitors take turns; ratios are to the first of them, in the same round.

    :param work: how long a thread has a connection, in seconds.
    :param seconds: how long each is measured, in each round, after ``warm_up`` seconds.
    """
    name = f"{backend.name}: {threads} threads, {connections} connections, {work * 1000:g} ms"
    cell = Cell(group, name, competitors[0].name)
    order = list(competitors)
    outcomes: dict[str, list[Outcome]] = {competitor.name: [] for competitor in competitors}
    for _ in range(rounds):
        for competitor in order:
            with backend.pools(competitor, connections) as pools:
                load = backend.work(work)
                outcome = run(pools, load, threads=threads, seconds=seconds, warm_up=warm_up)
            outcomes[competitor.name].append(outcome)
        order.append(order.pop(0))
    first = [outcome.throughput for outcome in outcomes[cell.reference]]
    turn = threads / connections * work
    cell.figures.update({each: _figures(outcomes[each], first, turn) for each in outcomes})
    return cell


def _figures(outcomes: list[Outcome], first: list[float], turn: float) -> dict[str, Figure]:
    """Sum up one competitor; in a turn, so many seconds, everybody could have had a connection once."""
    figures = {
        "checkouts/s": Figure.of(outcome.throughput for outcome in outcomes),
        "ratio": Figure.of(o.throughput / max(one, 1e-9) for o, one in zip(outcomes, first, strict=True)),
        "Jain": Figure.of(outcome.jain for outcome in outcomes),
        "longest wait, ms": Figure.of(outcome.longest_wait * 1000 for outcome in outcomes),
    }
    if turn:
        figures["in turns"] = Figure.of(outcome.longest_wait / turn for outcome in outcomes)
    figures["timeouts"] = Figure.of(outcome.timeouts for outcome in outcomes)
    figures["connects"] = Figure.of(outcome.connects for outcome in outcomes)
    return figures
