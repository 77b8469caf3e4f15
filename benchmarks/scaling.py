"""What must not cost more where there is more of something.

Where a clock is not needed, what is counted is the instructions of Python's interpreter, which are the same
in each run.  What a built-in function does counts as one, however long it takes: so the clock looks, too.
"""

from __future__ import annotations

import gc
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from types import FrameType
from typing import Any

from sqlalchemy.pool import Pool

from sqla_queries_pool import PoolManager, QueriesPool
from sqla_queries_pool.budget import engines
from sqla_queries_pool.budget.ledger import Ledger
from sqla_queries_pool.budget.slots import Attachment, Permit, Quota
from sqla_queries_pool.concurrency.threads import ThreadWaiter

from .competitors import QUERIES, Backend, FakeConnection, fake
from .effort import Effort
from .figures import Cell, Figure, Target
from .uncontended import batch

GROUP = "more of something"
FLAT = 1.1
CONNECTIONS = 1_000
DUE = 10
"""Connections whose time has come at once."""


def cells(_: Sequence[Backend], effort: Effort) -> Iterator[Cell]:
    """Pools, connections, waiters, and idle connections that are to be closed."""
    yield _pools(effort)
    yield _connections(effort)
    yield _waiters(effort)
    yield _housekeeping(effort)


def _flat(name: str, few: str, many: str, what: str, values: list[tuple[float, float]]) -> Cell:
    """A cell about one figure, measured where there are few, and where there are many."""
    ratio = Figure.ratio((value for _, value in values), (value for value, _ in values))
    cell = Cell(GROUP, name, {few: {what: Figure.of(value for value, _ in values)}})
    cell.figures[many] = {what: Figure.of(value for _, value in values)}
    cell.targets.append(Target(f"{name}: {what}, ratio", ratio, at_most=FLAT))
    return cell


# -- measured ---------------------------------------------------------------------------------------


def _pools(effort: Effort) -> Cell:
    """A checkout where the registry knows one pool, and where it knows many."""
    values = [_pools_once(effort) for _ in range(effort.rounds)]
    return _flat("pools in the registry", "1", f"{effort.crowd:,}", "µs", values)


def _pools_once(effort: Effort) -> tuple[float, float]:
    backend = fake()
    with backend.pools(QUERIES, 5) as (pool,):
        before = _microseconds([pool], effort)
        ids = [f"benchmark {secrets.token_hex(8)}" for _ in range(effort.crowd - 1)]
        others = [QueriesPool(backend.connect, max_size=1, pool_id=pool_id) for pool_id in ids]
        among_many = _microseconds([pool], effort)
        del others
        for pool_id in ids:  # a pool stays known for its idle_ttl
            PoolManager.remove(pool_id)
        after = _microseconds([pool], effort)
    return (before[0] + after[0]) / 2, among_many[0]


def _connections(effort: Effort) -> Cell:
    """A checkout from a pool that has one connection, and from one that has many."""
    backend = fake()
    with backend.pools(QUERIES, 1) as (small,), backend.pools(QUERIES, CONNECTIONS) as (large,):
        for connection in [large.connect() for _ in range(CONNECTIONS)]:
            connection.close()
        values = [_microseconds([small, large], effort) for _ in range(effort.rounds)]
    pairs = [(few, many) for few, many in values]
    return _flat("connections in a pool", "1", f"{CONNECTIONS:,}", "µs", pairs)


def _microseconds(pools: Sequence[Pool], effort: Effort) -> list[float]:
    """What a checkout and its return take, of pools that take turns."""
    gc.collect()
    turns = [[batch(pool, None, effort.checkouts) for pool in pools] for _ in range(effort.batches)]
    return [median(turn[number] for turn in turns) * 1e6 for number in range(len(pools))]


# -- counted ----------------------------------------------------------------------------------------


def instructions(call: Callable[[], object]) -> int:
    """Count the instructions of Python's interpreter that a call takes in this thread.

    The garbage collector, which might come meanwhile, waits.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return _monitored(call) if hasattr(sys, "monitoring") else _traced(call)
    finally:
        if collects:
            gc.enable()


def _traced(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def _monitored(call: Callable[[], object]) -> int:
    """From Python 3.12 on, where a tracer misses what it sees for the first time."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    count, me = 0, threading.get_ident()

    def instruction(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == me

    tool = monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, "benchmarks")
    try:
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, instruction)
        monitoring.set_events(tool, monitoring.events.INSTRUCTION)
        call()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
    return count


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class _Entry:
    """What stands for a connection."""

    def __init__(self, permit: Permit) -> None:
        self.slot = permit.slot


class Queue:
    """A ledger with one connection, and a queue for it."""

    def __init__(self, waiters: int) -> None:
        self.ledger = Ledger(lambda _: None)
        self.attachment = Attachment(Quota(1.0), 60.0)
        self.now = 0.0
        engines.attach(self.ledger, self.attachment, lambda _: None, self.now)
        permit = self.ledger.take(self.attachment, self, self.now)
        self._entry = _Entry(permit)
        permit.slot.handle = self
        self.ledger.bind(permit.slot, self._entry)
        self.ledger.opened(permit.slot, self.now)
        for _ in range(waiters):
            self._join()
        self.checkout()  # the first one also looks for what other engines can spare; then not for a while

    def _join(self) -> None:
        self.now += 0.001
        assert self.ledger.take(self.attachment, self, self.now) is None
        self.ledger.enqueue(ThreadWaiter(self.attachment, self), self.now)

    def checkout(self) -> None:
        """The connection is returned, the first waiter gets it, and another one joins the queue."""
        self.ledger.give(self.attachment, self._entry, self.now)
        self._join()


def _waiters(effort: Effort) -> Cell:
    """A returned connection goes to the first waiter, and another one joins the queue."""
    few, many = Queue(1), Queue(effort.crowd)
    values = [(float(instructions(few.checkout)), float(instructions(many.checkout))) for _ in range(3)]
    cell = _flat("waiters in the ledger", "1", f"{effort.crowd:,}", "instructions", values)
    clock = [(_timed(few), _timed(many)) for _ in range(effort.rounds)]
    ratio = Figure.ratio((value for _, value in clock), (value for value, _ in clock))
    cell.targets.append(Target("waiters in the ledger: time, ratio", ratio))
    return cell


def _timed(queue: Queue) -> float:
    return median(_seconds(queue.checkout) for _ in range(200))


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _housekeeping(effort: Effort) -> Cell:
    """The housekeeper's visits to a pool with few idle connections, and to one with many."""
    few, many = 10 * DUE, effort.crowd
    visits = [(_visit(few), _visit(many)) for _ in range(3)]
    counts = [(small[0], large[0]) for small, large in visits]
    name = "idle connections"
    cell = _flat(name, f"{few:,}", f"{many:,}", f"instructions, {DUE} are due", counts)
    for competitor, number in zip(cell.figures.values(), (0, 1), strict=True):
        competitor["a look at all, every 5 s, ms"] = Figure.of(visit[number][1] * 1e3 for visit in visits)
    clock = Figure.ratio((large[2] for _, large in visits), (small[2] for small, _ in visits))
    cell.targets.append(Target(f"{name}: time, {DUE} are due, ratio", clock))
    return cell


def _visit(connections: int) -> tuple[float, float, float]:
    """Count the instructions of a visit when few of the connections are due.

    :return: those; and the seconds of a visit when none is due but all are looked at, which is so every five
        seconds; and of another one like the first.
    """
    clock, pool_id, ttl = _Clock(), f"benchmark {secrets.token_hex(4)}", 60.0
    PoolManager.create(pool_id, ttl, connections, clock)
    engines = QueriesPool(FakeConnection, max_size=connections, idle_ttl=ttl, pool_id=pool_id)
    pool = weakref.proxy(next(pool for pool in PoolManager.pools() if pool.id == pool_id))
    for connection in [engines.connect() for _ in range(connections)]:
        clock.now += 0.001
        connection.close()
    clock.now = ttl
    look_at_all = _seconds(pool.core.upkeep.sweep)
    counts = []
    for _ in range(3):  # the fewest: this thread may have to hear, too, of what the worker has closed
        clock.now += DUE * 0.001
        counts.append(instructions(pool.core.upkeep.sweep))
    clock.now += DUE * 0.001
    seconds = _seconds(pool.core.upkeep.sweep)
    engines.dispose()
    return float(min(counts)), look_at_all, seconds
