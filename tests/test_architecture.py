"""Rules about the code itself: which room may know which, what is never called, and what a checkout costs."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sqla_queries_pool

PACKAGE = Path(sqla_queries_pool.__file__).parent
NAME = PACKAGE.name
LAYERS: tuple[tuple[str, ...], ...] = (
    ("budget", "errors", "logs", "try_lock"),
    ("concurrency", "host", "labels", "parameters", "sockets"),
    ("runtime",),
    ("pool",),
    ("exporters", "insight"),
    ("engine",),
    ("__init__", "explain", "plugin"),
    ("demo", "pytest_plugin"),
    ("monitor",),
    ("__main__",),
)
"""The rooms by layer, the lowest first: docs/design.rst says what each is for.  A room imports only from
layers below its own; inside a room modules import each other as they like, but never in a circle."""
LAYER = {room: number for number, layer in enumerate(LAYERS, 1) for room in layer}
FOR_FEW = ("concurrency.loops", "engine.loop_sides", "host.share", "runtime.sharing", "sockets.loop_socket")
"""What is imported where an engine is made that needs it: of asyncio, or with ``share``."""
AROUND = {"demo", "exporters", "monitor", "pytest_plugin", "__main__"}
"""What is not the core: it may need more than SQLAlchemy, and print."""


@functools.cache
def modules() -> dict[str, Path]:
    """All modules of the package by their dotted names inside it."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if "__pycache__" not in path.parts
    }


def room(module: str) -> str:
    """The room that a module is in."""
    return module.split(".")[0]


PURE = {module for module in modules() if room(module) == "budget"}
CORE = sorted(module for module in modules() if room(module) not in AROUND)


@functools.cache
def parsed(module: str) -> ast.Module:
    """Its syntax tree."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imports(module: str, typing_too: bool = True) -> set[str]:
    """The full names of the modules that a module imports, wherever in it."""
    tree = parsed(module)
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for_types |= {inner for statement in node.body for inner in ast.walk(statement)}
    package = [NAME, *module.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types and not typing_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if _is_module(name) else source for name in names}
    return found


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith(f"{NAME}.") and (path.with_suffix(".py").exists() or path.is_dir())


def ours(module: str, typing_too: bool = True) -> set[str]:
    """The modules of the package that a module imports, by their dotted names inside it."""
    return {_inner(name) for name in imports(module, typing_too) if name.split(".")[0] == NAME}


def _inner(name: str) -> str:
    inner = name.removeprefix(NAME).lstrip(".")
    known = modules()
    package = f"{inner}.__init__".lstrip(".")
    return inner if inner in known else package if package in known else "__init__"


def test_every_room_has_a_layer() -> None:
    """A new room says here where it stands, and an old one that is gone is not listed."""
    assert {room(module) for module in modules()} == set(LAYER)


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_room_imports_from_layers_below(module: str) -> None:
    """What is below does not know what is above, not even its types."""
    for other in ours(module):
        below = LAYER[room(other)] < LAYER[room(module)]
        assert below or room(other) == room(module), other


def test_the_page_names_every_module_with_its_layer_from_top_to_bottom() -> None:
    """docs/design.rst has one line for each, that says what it owns; a folder's stands for ``__init__``."""
    page = (Path(__file__).parent.parent / "docs" / "design.rst").read_text(encoding="utf-8")
    rows = re.findall(r"^``([\w/]+)(\.py)?`` +(\d+) +\S", page, re.MULTILINE)
    named = [(path.replace("/", ".") + ("" if py else "__init__"), int(layer)) for path, py, layer in rows]
    assert sorted(named) == sorted((module, LAYER[room(module)]) for module in modules())
    layers = [layer for _, layer in named]
    assert layers == sorted(layers, reverse=True)


def test_no_circles_of_imports() -> None:
    """Each module can be read after those that it imports."""
    needs = {module: ours(module) for module in modules()}
    list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_bookkeeping_is_pure(module: str) -> None:
    """No lock, no thread, no clock, no log, nothing of SQLAlchemy: a test can drive all of it."""
    allowed = {
        "__future__",
        "bisect",
        "collections",
        "collections.abc",
        "dataclasses",
        "heapq",
        "math",
        "types",
        "typing",
        "weakref",
    }
    if module == "budget.slots":
        allowed.add("os")  # a socket belongs to the process that opened it
    assert imports(module) - {f"{NAME}.{pure}" for pure in PURE} <= allowed


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_nothing_but_sqlalchemy_and_the_standard_library(module: str) -> None:
    """psycopg2 is asked to take a DSN apart, where an engine was given one; loops.py may ask what SQLAlchemy
    needs for asyncio; nothing else is needed."""
    found = {name.split(".")[0] for name in imports(module)}
    foreign = found - sys.stdlib_module_names - {NAME, "sqlalchemy"}
    assert foreign <= {"engine.identity": {"psycopg2"}, "concurrency.loops": {"greenlet"}}.get(module, set())


@pytest.mark.parametrize("module", CORE)
def test_the_core_does_not_sleep(module: str) -> None:
    """Whoever waits, waits for something: ``time.sleep`` is nowhere, under no name.  A loop may go on."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Attribute) and node.attr == "sleep":
            assert isinstance(node.value, ast.Name), f"line {node.lineno}"
            assert node.value.id == "asyncio", f"line {node.lineno}"
        assert not (isinstance(node, ast.ImportFrom) and any(alias.name == "sleep" for alias in node.names))


@pytest.mark.parametrize("module", CORE)
def test_nothing_of_the_core_prints(module: str) -> None:
    """What it has to say goes to the log, to errors and to reports."""
    calls = [node.func for node in ast.walk(parsed(module)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_importing_the_package_starts_nothing() -> None:
    """No thread; neither a driver nor what is around the core, nor what few engines need."""
    code = (
        f"import sys, threading, {NAME}; assert threading.active_count() == 1;"
        f"around = tuple('{NAME}.' + room for room in {[*sorted(AROUND), *FOR_FEW]});"
        "assert not [m for m in sys.modules if m.startswith((*around, 'psycopg2'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)


# -- the tests themselves -----------------------------------------------------------------------------

TESTS = Path(__file__).parent
HELPERS = [path for path in TESTS.glob("*.py") if not path.name.startswith(("test_", "inside"))]
OF_SQLALCHEMY = {"test_seams.py"}
"""It looks at private parts of SQLAlchemy, which is what it is for."""


def private_names(tree: ast.AST) -> set[str]:
    """The private names that a module gives to something."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


@functools.cache
def privates() -> frozenset[str]:
    """The private names of the package that the tests' helpers do not have as well."""
    helpers = [ast.parse(path.read_text(encoding="utf-8")) for path in HELPERS]
    ours = set().union(*(private_names(parsed(module)) for module in modules()))
    return frozenset(ours.difference(*map(private_names, helpers)))


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.name)
def test_tests_reach_what_is_private_through_inside_alone(path: Path) -> None:
    """So that what is moved or renamed is mended in one place."""
    if path.name == "inside.py" or path.name in OF_SQLALCHEMY:
        return
    ours_alone = set(privates())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours_alone -= private_names(tree)  # the test's own
    reached = [
        f"line {node.lineno}: {name}"  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        for name in _reached(node)
        if name in ours_alone
    ]
    assert not reached


def _reached(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute) and not (
        isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    ):
        return [node.attr]
    patches = isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    if patches and (getattr(node.func, "attr", "") or getattr(node.func, "id", "")) in (  # type: ignore[attr-defined]
        *("setattr", "getattr", "hasattr", "delattr"),
    ):
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # type: ignore[attr-defined]
        return [text.rpartition(".")[2] for text in texts]
    return []
