"""The table of states and transitions at the head of budget/slots.py, walked against the code.

Which function changes a state to which other is read from the source.  That each transition of the table
happens, and no other, is seen by doing it: ``ledger_fakes.NumberedSlot`` notes and checks each one, here and
in all tests of the ledger.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_fakes import SEEN, Session, Simulator

import sqla_queries_pool
from sqla_queries_pool.budget import audit, closing, slots
from sqla_queries_pool.budget.slots import (
    CLOSING,
    GONE,
    HELD,
    IDLE,
    LOCKED,
    OPENING,
    TRANSITIONS,
    Permit,
    Slot,
)

PACKAGE = Path(sqla_queries_pool.__file__).parent
STATES = {OPENING, IDLE, HELD, LOCKED, CLOSING, GONE}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(folder: Path) -> Iterator[tuple[str, Function]]:
    """All functions below a folder, by the names of their file and class."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            for function in inner:
                if isinstance(function, Function) and isinstance(node, ast.ClassDef):
                    yield f"{node.name}.{function.name}", function
        for node in tree.body:
            if isinstance(node, Function):
                yield f"{path.stem}.{node.name}", node


def writers(folder: Path, attribute: str) -> set[str]:
    """The functions that assign an attribute of that name, to whatever it belongs."""
    return {
        name
        for name, function in functions(folder)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == attribute and not isinstance(node.ctx, ast.Load)
    }


def moves() -> set[tuple[str, str]]:
    """Which function changes a state to which other, by the source."""
    found = set()
    for name, function in functions(PACKAGE / "budget"):
        for node in ast.walk(function):
            value: ast.expr | None = None
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "move"
            ):
                value = node.args[1]
            elif isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Attribute) and target.attr == "state" for target in node.targets
            ):
                value = node.value
            if value is not None and name not in ("Slot.__init__", "LedgerState.move"):
                assert isinstance(value, ast.Name), f"{name}: a state that is computed"
                found.add((name.rpartition(".")[2], getattr(slots, value.id)))
    return found


# -- by the source ---------------------------------------------------------------------------------


def test_one_function_changes_a_state_and_the_hot_path_does() -> None:
    """In all of the package, whatever else has a state of that name."""
    assert writers(PACKAGE, "state") == {"Slot.__init__", "LedgerState.move", "Ledger.take", "Ledger.give"}
    for name, function in functions(PACKAGE):
        for node in ast.walk(function):
            is_setattr = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr"
            assert not (is_setattr and '"state"' in ast.unparse(node).replace("'", '"')), name


def test_what_is_out_is_counted_where_a_state_is_changed() -> None:
    """And by the audit, which counts again."""
    told = {"LedgerState.__init__", "LedgerState.move", "Ledger.take", "Ledger.give", "audit._recount"}
    assert writers(PACKAGE / "budget", "out") == told


def test_the_table_names_the_functions_that_do_it() -> None:
    """Each function that changes a state stands there with the state that it changes to; no other does."""
    told = {
        (function, to)
        for (_, to), text in TRANSITIONS.items()
        for function in text.partition(":")[0].split(", ")
    }
    assert told == moves()


def test_each_state_is_reached_and_left() -> None:
    """From the beginning, and to the end, which are the same: it does not count."""
    assert {state for transition in TRANSITIONS for state in transition} == STATES
    for end, other in ((0, 1), (1, 0)):
        reached = {GONE}
        for _ in STATES:
            reached |= {pair[other] for pair in TRANSITIONS if pair[end] in reached}
        assert reached == STATES


# -- by doing it -----------------------------------------------------------------------------------


def idle(simulator: Simulator, limit: int = 1) -> Any:
    """An engine and its idle connection; both live as long as the simulator."""
    engine = simulator.engine(limit)
    record = simulator.connected(engine)
    simulator.kept += [engine, record]
    simulator.give(engine, record)
    return engine, record


def locked(simulator: Simulator) -> tuple[Any, Slot, Session]:
    """An engine, its connection that a session has locked, and the session."""
    engine, record = idle(simulator)
    session = Session()
    assert simulator.lock(record.slot, session)
    return engine, record.slot, session


def permit_of_two(simulator: Simulator) -> Permit:
    """The right to open a connection, for which another engine's is still to be closed."""
    idle(simulator)
    simulator.now += 10.0
    other = simulator.engine(1)
    permit = simulator.take(other)
    assert isinstance(permit, Permit)
    assert permit.evicts is not None
    simulator.kept.append(other)
    return permit


def opening(simulator: Simulator) -> None:
    """A checkout finds nothing idle."""
    simulator.take(simulator.engine())


def added(simulator: Simulator) -> None:
    """A connection is added by hand."""
    assert simulator.add() is not None


def counted_again(simulator: Simulator) -> None:
    """A permit dies before what gave way was closed."""
    permit = permit_of_two(simulator)
    slot = permit.evicts.slot
    del permit
    gc.collect()
    simulator.settle()
    assert slot.state is CLOSING


def opened(simulator: Simulator) -> None:
    """A connection is opened."""
    simulator.connected(simulator.engine())


def opener_died(simulator: Simulator) -> None:
    """Nobody has the record any more whose socket was opened just now."""
    engine = simulator.engine()
    record = simulator.bind(engine, simulator.take(engine))
    simulator.plug(engine, record)
    del record
    gc.collect()
    simulator.settle()


def failed(simulator: Simulator) -> None:
    """A connection can't be opened."""
    simulator.fail(simulator.take(simulator.engine()))


def taken(simulator: Simulator) -> None:
    """A checkout finds one idle."""
    engine, _ = idle(simulator)
    simulator.take(engine)


def given_back(simulator: Simulator) -> None:
    """A session's connection is reset."""
    _, slot, session = locked(simulator)
    assert simulator.unlock(slot)
    simulator.do_all()
    del session


def disposed(simulator: Simulator) -> None:
    """An engine's idle connection is closed."""
    engine, _ = idle(simulator)
    simulator.decide(closing.dispose, simulator.ledger, engine)


def closed(simulator: Simulator) -> None:
    """The same, and the work is done."""
    disposed(simulator)
    simulator.do_all()


def closed_again(simulator: Simulator) -> None:
    """The same, but an interrupt has lost the work of closing; the audit finds that."""
    disposed(simulator)
    simulator.todo.clear()
    gc.collect()
    found = audit.findings(simulator.ledger)
    wrong, work = audit.mend(simulator.ledger, found, simulator.now)
    assert [finding.what for finding in found] == ["due to be closed, but nobody closes it"]
    assert len(wrong) == 1
    simulator.decide(lambda: work)


def gave_way(simulator: Simulator) -> None:
    """An idle connection gives way to another engine's."""
    permit_of_two(simulator)


def holder_died(simulator: Simulator) -> None:
    """Nobody has the record any more that is held."""
    record = simulator.connected(simulator.engine())
    del record
    gc.collect()
    simulator.settle()


def detached(simulator: Simulator) -> None:
    """A holder keeps its connection."""
    simulator.detach(simulator.connected(simulator.engine()))


def removed_by_force(simulator: Simulator) -> None:
    """A session's connection is closed."""
    _, slot, session = locked(simulator)
    simulator.decide(closing.close_one, simulator.ledger, slot, True)
    del session


def stale_gave_way(simulator: Simulator) -> None:
    """A session dies with its lock, and a checkout needs the slot at once."""
    engine, slot, session = locked(simulator)
    del session
    gc.collect()
    assert isinstance(simulator.wait(engine), Permit)
    assert slot.state is GONE


HOW: dict[tuple[str, str], Callable[[Simulator], object]] = {
    (GONE, OPENING): opening,
    (GONE, IDLE): added,
    (GONE, CLOSING): counted_again,
    (OPENING, HELD): opened,
    (OPENING, CLOSING): opener_died,
    (OPENING, GONE): failed,
    (IDLE, HELD): taken,
    (IDLE, LOCKED): locked,
    (IDLE, CLOSING): disposed,
    (IDLE, GONE): gave_way,
    (HELD, IDLE): idle,
    (HELD, CLOSING): holder_died,
    (HELD, GONE): detached,
    (LOCKED, HELD): given_back,
    (LOCKED, CLOSING): removed_by_force,
    (LOCKED, GONE): stale_gave_way,
    (CLOSING, CLOSING): closed_again,
    (CLOSING, GONE): closed,
}
"""How each transition comes about."""


@pytest.mark.parametrize("transition", sorted({*TRANSITIONS, *HOW}), ids=" to ".join)
def test_each_transition_of_the_table_happens(transition: tuple[str, str]) -> None:
    """It does not stand there for nothing; one that does not stand there fails wherever it happens."""
    before = SEEN[transition]
    simulator = Simulator()
    HOW[transition](simulator)
    assert SEEN[transition] > before
    simulator.settle()


@pytest.mark.parametrize(
    "transition", sorted((a, b) for a in STATES for b in STATES if (a, b) not in TRANSITIONS), ids=" to ".join
)
def test_another_transition_is_an_error(transition: tuple[str, str]) -> None:
    """The ledger does not do what the table does not have."""
    slot = Slot()
    before, after = transition
    slot.state = before
    with pytest.raises(AssertionError, match=f"{before} to {after}"):
        Simulator().ledger.move(slot, after)
    assert slot.state is before
