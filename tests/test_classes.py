"""Classes of callers: floors, ceilings and weights, in the ledger and for engines."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
from fakes import FakeDriver
from hazards import Thread, eventually, new_pid
from ledger_fakes import CheckedWaiter, Record, Simulator
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_queries_pool import (
    CheckoutTimeout,
    ParameterError,
    PoolDeadlock,
    PoolManager,
    QueriesPool,
    TooManyRequests,
    checkouts,
)
from sqla_queries_pool.budget import choice, engines
from sqla_queries_pool.budget.slots import QUEUE_FULL, Attachment, Terms
from sqla_queries_pool.exporters.prometheus import register
from sqla_queries_pool.monitor.data import collect
from sqla_queries_pool.monitor.history import History
from sqla_queries_pool.monitor.page import document

WEB = {"web": {"min": 1, "weight": 4.0}, "background": {"max": 2}}


class Load:
    """Callers of two classes, each of which waits again as soon as it was served.

    :param limit: of the pool.
    :param stated: the classes.
    """

    def __init__(self, limit: int, **stated: Terms) -> None:
        self.simulator = Simulator()
        self.engine: Attachment = self.simulator.engine(limit, stated=stated)
        self.held: dict[str, list[Record]] = {}
        self.waiting: dict[str, list[CheckedWaiter]] = {}
        self.served: Counter[str] = Counter()
        for name in stated:
            self.held[name], self.waiting[name] = [], []

    def come(self, name: str, several: int = 1) -> None:
        """So many of a class check out, or wait."""
        self.simulator.caller = name
        for _ in range(several):
            self.simulator.now += 0.001
            entry = self.simulator.wait(self.engine)
            if isinstance(entry, CheckedWaiter):
                self.waiting[name].append(entry)
            else:
                self._has(name, entry)

    def _has(self, name: str, entry: Any) -> None:
        self.held[name].append(
            entry if isinstance(entry, Record) else self.simulator.use_permit(self.engine, entry)
        )
        self.served[name] += 1

    def give(self, name: str) -> str | None:
        """The oldest of a class returns its connection; return the class that has it then."""
        self.simulator.now += 0.001
        self.simulator.give(self.engine, self.held[name].pop(0))
        for other, waiters in self.waiting.items():
            for waiter in [w for w in waiters if w.answer is not None]:
                waiters.remove(waiter)
                self._has(other, waiter.answer)
                return other
        return None

    def turns(self, number: int) -> Counter[str]:
        """So often the one returns its connection that has held one for longest, and comes again; return how
        often each class was served meanwhile."""
        before = Counter(self.served)
        for _ in range(number):
            records = [(record.slot.since, name) for name, held in self.held.items() for record in held]
            name = min(records)[1]
            self.give(name)
            self.come(name)
        return self.served - before

    def numbers(self) -> dict[str, int]:
        """How many each class has."""
        return {name: len(held) for name, held in self.held.items()}


# -- the ledger --------------------------------------------------------------------------------------------


def test_a_class_has_no_more_than_its_ceiling_and_others_pass_those_who_wait_for_it() -> None:
    """Also while slots are free."""
    load = Load(5, web=Terms(), background=Terms(max=2))
    load.come("background", 4)
    assert load.numbers() == {"web": 0, "background": 2}
    load.come("web", 2)
    assert load.numbers() == {"web": 2, "background": 2}
    assert load.give("web") is None, "it is idle now, and the ceiling holds"
    assert load.give("background") == "background"
    load.come("web")
    assert load.numbers() == {"web": 2, "background": 2}


def test_however_many_classes_wait_at_their_ceilings_the_next_one_is_served() -> None:
    """Also where all those that came before it can't be."""
    load = Load(3, a=Terms(max=1), b=Terms(max=1), c=Terms())
    for name in "abc":
        load.come(name, 2)
    assert load.give("c") == "c"


def test_a_place_below_a_ceiling_that_gets_free_serves_from_what_is_idle() -> None:
    """The connection of its class was detached; another one is idle beside those that wait."""
    load = Load(3, web=Terms(), background=Terms(max=1))
    load.come("web")
    load.come("background", 2)
    load.give("web")
    load.simulator.detach(load.held["background"].pop())
    assert load.waiting["background"][0].answer is not None
    assert len(load.simulator.ledger.slots) == 1


def test_a_floor_is_used_by_others_until_it_is_needed_and_lost_by_the_next_return() -> None:
    """The web has nothing while it needs nothing, and then each return until it has its floor."""
    load = Load(4, web=Terms(min=2), background=Terms(weight=1000))
    load.come("background", 10)
    assert load.numbers() == {"web": 0, "background": 4}
    load.come("web", 3)
    assert [load.give("background") for _ in range(3)] == ["web", "web", "background"]
    assert load.numbers() == {"web": 2, "background": 2}
    assert load.give("web") == "web"


def test_floors_above_a_limit_that_was_lowered_are_served_in_proportion() -> None:
    """Twelve were promised, three are there: two to one."""
    load = Load(12, a=Terms(min=8), b=Terms(min=4))
    load.simulator.decide(engines.set_limit, load.simulator.ledger, 3.0, load.simulator.now)
    load.come("a", 10)
    load.come("b", 10)
    load.turns(30)
    assert load.numbers() == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("limit", "has"), [(10, {"web": 8, "background": 2}), (5, {"web": 4, "background": 1})]
)
def test_what_all_want_is_shared_by_weight(limit: int, has: dict[str, int]) -> None:
    """Whoever came first."""
    load = Load(limit, web=Terms(weight=4), background=Terms())
    load.come("background", 2 * limit)
    load.come("web", 2 * limit)
    load.turns(3 * limit)
    assert load.numbers() == has


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_pool_of_few_connections_is_shared_by_weight_by_turns(limit: int) -> None:
    """Four to one, and no class starves."""
    load = Load(limit, web=Terms(weight=4), background=Terms())
    load.come("background", 20)
    load.come("web", 20)
    load.turns(10)
    served = load.turns(500)
    assert served["web"] / served["background"] == pytest.approx(4, rel=0.3 if limit > 1 else 0.01)


def test_a_class_uses_all_that_no_other_one_wants() -> None:
    """And pays nothing for it later: it has its share at once when another one comes, and so has that."""
    load = Load(1, web=Terms(), background=Terms())
    load.come("background", 8)
    load.turns(50)
    load.come("web", 8)
    assert load.turns(20)["web"] == pytest.approx(10, abs=1)


def test_what_a_class_holds_for_long_counts_into_its_share() -> None:
    """Three of five are more than its fifth: it gets nothing more, however often others are served."""
    load = Load(5, web=Terms(weight=4), background=Terms())
    load.come("background", 3)
    load.come("web", 4)
    load.come("background", 2)
    assert [load.give("web") for _ in range(2)] == ["web", "web"]
    load.come("web", 10)
    assert {load.give("web") for _ in range(10)} == {"web"}


def test_inside_a_class_the_order_is_that_of_arrival() -> None:
    """However the classes are mixed."""
    load = Load(1, web=Terms(weight=3), background=Terms())
    for name in ("web", "background") * 5:
        load.come(name)
    first = {name: list(waiters) for name, waiters in load.waiting.items()}
    for _ in range(8):
        load.give(next(name for name, held in load.held.items() if held))
    for name, waiters in first.items():
        answered = [waiter.answer is not None for waiter in waiters]
        assert answered == sorted(answered, reverse=True), name


def test_a_slot_of_another_engine_goes_to_a_class_below_its_floor_at_once() -> None:
    """Without the patience that engines have with each other: its connection is closed, another opened."""
    simulator = Simulator()
    stated = {"web": Terms(min=2), "background": Terms()}
    jobs = simulator.engine(4, stated=stated, caller="background")
    web = simulator.engine(4, stated=stated, caller="web")
    records = [simulator.connected(jobs) for _ in range(3)]
    held = simulator.connected(web)
    mine, theirs = simulator.wait(jobs), simulator.wait(web)
    simulator.give(jobs, records.pop())
    assert theirs.answer is not None
    assert mine.answer is None
    del held


def test_a_slot_that_goes_to_another_class_lets_its_own_have_what_is_idle_elsewhere() -> None:
    """A ceiling of one: the second of the class waits for the first, beside an idle connection."""
    simulator = Simulator()
    stated = {"web": Terms(), "background": Terms(max=1)}
    a, b = simulator.engine(2, stated=stated), simulator.engine(2, stated=stated)
    simulator.caller = "web"
    idle = simulator.connected(a)
    simulator.caller = "background"
    record = simulator.connected(b)
    job = simulator.wait(a)
    simulator.give(a, idle)
    simulator.caller = "web"
    request = simulator.wait(b)
    assert (job.answer, request.answer) == (None, None)
    simulator.give(b, record)
    assert request.answer is record
    assert job.answer is idle


def test_a_newcomer_does_not_overtake_one_of_its_class_to_what_has_become_spare() -> None:
    """Another engine's connection has been idle for long enough by now; the first is the next to ask."""
    simulator = Simulator()
    stated = {"web": Terms(), "background": Terms()}
    a, b = simulator.engine(2, stated=stated), simulator.engine(2, stated=stated)
    simulator.caller = "web"
    held, idle = simulator.connected(a), simulator.connected(b)
    simulator.give(b, idle)
    first = simulator.wait(a)
    simulator.now += 0.06
    assert simulator.take(a) is None
    simulator.insist(first)
    assert first.answer is not None
    del held


def test_each_class_has_a_queue_as_long_as_max_waiting() -> None:
    """Those that wait for their own class keep no other out."""
    load = Load(2, web=Terms(), background=Terms(max=1))
    load.engine.max_waiting = 1
    load.come("background", 3)
    first, second = load.waiting["background"]
    assert load.simulator.reject(first, new=True) is None
    rejected = load.simulator.reject(second, new=True)
    assert rejected is not None
    assert rejected.kind == QUEUE_FULL
    load.come("web", 2)
    assert load.simulator.reject(load.waiting["web"][0], new=True) is None


def test_a_class_that_is_served_in_time_is_not_rejected_for_another_that_is_late() -> None:
    """``queue_target`` counts by class."""
    load = Load(2, web=Terms(), background=Terms(max=1))
    load.engine.queue_target = 0.05
    load.come("background", 3)
    load.come("web", 2)
    for _ in range(200):
        load.simulator.now += 0.01
        load.give("web")
        load.come("web")
    late, soon = load.waiting["background"][0], load.waiting["web"][0]
    load.simulator.now += 0.06
    assert load.simulator.reject(soon) is None
    assert load.simulator.reject(late) is not None


def test_a_waiter_at_its_ceiling_does_not_ask_again_and_again() -> None:
    """It could connect, as far as the limit goes; nobody looks before something is returned."""
    load = Load(5, background=Terms(max=1))
    load.simulator.ledger.mean_connect = 0.4
    load.come("background", 2)
    load.simulator.now += 10.0
    (waiter,) = load.waiting["background"]
    assert choice.look_in(load.simulator.ledger, waiter, load.simulator.now) == math.inf


# -- engines -----------------------------------------------------------------------------------------------


@pytest.fixture
def new() -> Iterator[Any]:
    """Makes engines of one database without a server."""
    pid, engines = new_pid(), []

    def make(**kw: Any) -> Any:
        kw = {"poolclass": QueriesPool, "pool_id": pid, "max_size": 4, "pool_timeout": 0, **kw}
        engines.append(create_engine(f"fake://me@host/{pid}", module=FakeDriver(), **kw))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
    assert inside.shared(engines[0]).audit().mended == ()


def message(engine: Any) -> str:
    """The error of a checkout that gets nothing."""
    with pytest.raises(CheckoutTimeout) as raised:
        engine.connect()
    return str(raised.value)


def test_the_class_of_a_checkout_is_the_blocks_else_the_engines_else_other(new: Any) -> None:
    """A class is the pool's: an engine that states none has them, too."""
    web, jobs = new(classes=WEB, caller="web"), new(caller="background")
    with web.connect(), jobs.connect(), checkouts(caller="other"), web.connect():
        held = {name: each.held for name, each in web.pool.statistics().classes.items()}
    assert held == {"web": 1, "background": 1, "other": 1}


def test_the_error_says_that_a_class_has_reached_its_ceiling(new: Any) -> None:
    """There are connections, and slots for more; the class has all that it may have."""
    engine = new(classes=WEB, caller="web")
    with checkouts(caller="background"):
        done = threading.Event()

        def job() -> None:
            with checkouts(caller="background"), engine.connect(), engine.connect():
                done.wait(20)

        working = Thread(job)
        eventually(lambda: engine.pool.statistics().classes["background"].held == 2, "two jobs")
        error = message(engine)
    done.set()
    working.join()
    assert "Most likely class background has reached its ceiling of 2. Raise its max in classes" in error
    assert "Classes: background 2 of 2; web 0" in error


def test_statistics_exporters_and_the_page_tell_of_classes(new: Any, no_other_pools: None) -> None:
    """What each has, how many wait, and how long those waited that were served."""
    engine = new(classes=WEB, pool_timeout=20)

    def job() -> None:
        with checkouts(caller="background"):
            engine.connect().close()

    with checkouts(caller="background"):
        held = [engine.connect(), engine.connect()]
    waiting = Thread(job)
    eventually(lambda: engine.pool.statistics().classes["background"].waiting == 1, "a waiter")
    registry = CollectorRegistry()
    register(registry)
    told = generate_latest(registry).decode()
    assert any('class="background"' in line and line.endswith(" 2.0") for line in told.splitlines())
    assert "sqla_queries_pool_class_waiting_checkouts{" in told
    shown = document(collect(History()), "")
    assert "Classes of callers" in shown
    for connection in held:
        connection.close()
    waiting.join()
    numbers = engine.pool.statistics()
    background = numbers.classes["background"]
    assert (background.held, background.waiting, background.waits, background.max) == (0, 0, 1, 2)
    assert numbers.as_dict()["classes"]["background"]["wait_time"]["count"] == 1


def test_max_waiting_names_no_other_class(new: Any) -> None:
    """Over a real queue: the second background checkout is rejected, the web is served."""
    engine = new(classes={"web": {}, "background": {"max": 1}}, max_waiting=0, pool_timeout=20)
    with checkouts(caller="background"), engine.connect(), pytest.raises(TooManyRequests):
        engine.connect()
    with checkouts(caller="web"), engine.connect():
        pass


@pytest.mark.slow
def test_a_deadlock_within_a_ceiling_is_found_although_slots_are_free(new: Any) -> None:
    """Two jobs have one of two each, and each waits for another one."""
    engine = new(classes=WEB, caller="background", on_deadlock="raise", pool_timeout=20)
    both = threading.Barrier(2)

    def job() -> None:
        with engine.connect():
            both.wait(20)
            engine.connect().close()

    with checkouts(caller="web"):
        working = engine.connect()
    jobs = [Thread(job) for _ in range(2)]
    errors = []
    for each in jobs:
        try:
            each.join()
        except PoolDeadlock as error:
            errors.append(error)
    working.close()
    assert len(errors) == 1


def test_without_classes_there_is_nothing_of_them(new: Any) -> None:
    """No ledger of another kind, no numbers; a class in a block changes nothing."""
    engine = new(caller="web")
    with checkouts(caller="web"), engine.connect():
        assert engine.pool.statistics().classes == {}
    assert type(inside.ledger(engine)).__name__ == "Ledger"


def test_classes_outlive_a_fork_a_dispose_and_an_engine(new: Any) -> None:
    """Engines that there are say which there are."""
    engine = new(classes=WEB)
    engine.dispose()
    core = inside.core(engine)
    core.after_fork_in_child()
    with checkouts(caller="background"), engine.connect(), engine.connect():
        message(engine)
    with checkouts(caller="web"):
        engine.connect().close()


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (
            {"web": {"weight": 0}},
            "classes, class 'web': weight=0 is not valid: write a number above zero",
        ),
        ({"web": {"min": -1}}, "classes, class 'web': min=-1 is not valid: write a whole number"),
        ({"web": {"max": 0}}, "classes, class 'web': max=0 is not valid: write a whole number"),
        ({"web": {"min": 3, "max": 2}}, "the class 'web' has min=3, above its max=2: lower its min"),
        ({"web": {"floor": 3}}, "classes: 'floor' of the class 'web' is not known: write {'web'"),
        ({"web": 3}, "classes=(dict) is not valid: write {'web': {'min': 6"),
        ({"a b": {}}, "names have letters, digits, '_', '-' and '.'"),
        ("web:min=1;web:max=2", "classes: the class 'web' is given twice"),
        ("web", "classes='web' is not valid: write {'web': {'min': 6"),
        ("web:min=6,weight", "classes, class 'web': weight='' is not valid"),
        (
            {"web": {"min": 3}, "jobs": {"min": 2}},
            "the sum of min of all classes is 5, above the limit of 4: lower a min",
        ),
    ],
)
def test_what_means_nothing_is_refused_when_the_engine_is_made(new: Any, classes: Any, says: str) -> None:
    """With the class, what was stated, and what to write."""
    with pytest.raises(ParameterError) as raised:
        new(classes=classes)
    assert says in str(raised.value)
    new()


def test_engines_of_one_database_can_t_contradict_each_other(new: Any) -> None:
    """Neither about a class, nor about which there are."""
    engine = new(classes=WEB)
    with pytest.raises(
        ParameterError, match="as min=0, max=3, weight=1, and another engine of this database as"
    ):
        new(classes={"background": {"max": 3}})
    with pytest.raises(
        ParameterError, match="caller='cron' is none of the classes of this database: write one of background"
    ):
        new(caller="cron")
    with pytest.raises(
        ParameterError, match=r"checkouts\(caller='wbe'\) is not valid: no engine has this class. Write one"
    ):
        checkouts(caller="wbe").__enter__()
    engine.connect().close()


def test_an_engine_goes_on_where_the_limit_was_lowered_below_its_floors(new: Any) -> None:
    """A dispose is no new engine; nor has one that states no classes any floors of its own."""
    engine = new(classes={"web": {"min": 3}})
    PoolManager.set_max_size(engine.pool.pid, 2)
    engine.dispose()
    engine.connect().close()
    new().connect().close()
    with pytest.raises(ParameterError, match="the sum of min of all classes is 4, above the limit of 2"):
        new(classes={"cron": {"min": 1}})


def test_an_engine_that_was_dropped_contradicts_nobody(tmp_path: Path) -> None:
    """Although the garbage collector has not found it yet."""

    def made(**options: Any) -> Any:
        return create_engine(url, poolclass=QueriesPool, module=FakeDriver(), **options).pool

    url = f"fake://me@host/{new_pid()}"
    gc.disable()
    try:
        made(classes={"web": {"min": 3}})
        assert made(classes={"web": {"min": 2}}).statistics().classes["web"].min == 2
        assert made(share=str(tmp_path)).statistics().host is not None
    finally:
        gc.enable()


def test_classes_in_a_url_survive() -> None:
    """As text: of an ini file, or of a URL."""
    stated = "web:min=6,weight=4;background:max=4"
    url = make_url(f"postgresql+psycopg2://me@host/{new_pid()}?plugin=queries&max_size=10&classes={stated}")
    settings = create_engine(url.render_as_string(), pool_size=3).pool.settings  # type: ignore[attr-defined]
    assert settings.classes == {"web": {"min": 6, "weight": 4.0}, "background": {"max": 4}}


def test_a_host_is_asked_for_nothing_that_a_class_could_not_use(new: Any) -> None:
    """What waits at its ceiling wants no lease."""
    engine = new(classes=WEB, caller="background", pool_timeout=20)
    held = [engine.connect(), engine.connect()]
    waiting = Thread(lambda: engine.connect().close())
    eventually(lambda: inside.waiters(engine), "a waiter")
    assert inside.ledger(engine).wanting(inside.attachment(engine.pool)) == 0
    for connection in held:
        connection.close()
    waiting.join()


def test_tasks_have_classes(pg_url: str) -> None:
    """A task inherits that of the task that starts it."""
    pytest.importorskip("asyncpg")

    async def main() -> None:
        url = make_url(pg_url).set(drivername="postgresql+asyncpg")
        engine = create_async_engine(url, poolclass=QueriesPool, max_size=3, classes=WEB, pool_timeout=0)

        async def one() -> None:
            async with engine.connect():
                pass

        with checkouts(caller="background"):
            async with engine.connect(), engine.connect():
                with pytest.raises(CheckoutTimeout):
                    await asyncio.create_task(one())
                with checkouts(caller="web"):
                    await asyncio.create_task(one())
        await engine.dispose()

    asyncio.run(main())
    assert PoolManager.statistics().pools
