"""What a contributor reads agrees with what there is."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from test_architecture import LAYER

import sqla_queries_pool

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sqla_queries_pool.__file__).parent


def text(name: str) -> str:
    """The content of a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    """In the metadata, in the package and at the top of the changelog."""
    metadata = configparser.ConfigParser()
    metadata.read_string(text("setup.cfg"))
    assert metadata["metadata"]["version"] == sqla_queries_pool.__version__
    newest = re.findall(r"^## \[(\d.*?)\]", text("CHANGELOG.md"), re.MULTILINE)[0]
    assert newest == sqla_queries_pool.__version__


def test_an_extra_with_an_asynchronous_driver_brings_greenlet() -> None:
    """SQLAlchemy 2.1 does not by itself; its extra ``asyncio`` does."""
    metadata = configparser.ConfigParser()
    metadata.read_string(text("setup.cfg"))
    extras = {name: set(needs.split()) for name, needs in metadata["options.extras_require"].items()}
    with_driver = {name for name, needs in extras.items() if needs & {"asyncpg", "aiosqlite"}}
    assert {"asyncpg", "examples"} <= with_driver
    assert {name for name in with_driver if not extras[name] & {"greenlet", "sqlalchemy[asyncio]"}} == set()


def test_contributing_has_every_folder_in_the_order_of_the_layers() -> None:
    """From the bottom, as it says."""
    section = text("CONTRIBUTING.rst").partition("Where things are\n====")[2]
    named = re.findall(r"``(\w+)/``", section.partition("\n====")[0])
    assert set(named) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == sorted(named, key=LAYER.__getitem__)


def test_what_the_hooks_check_is_checked_for_every_change() -> None:
    """Each hook before a commit has its step in ``.ci/run``, where it changes nothing."""
    hooks = re.findall(r"^ +entry: (.*)$", text(".pre-commit-config.yaml"), re.MULTILINE)
    steps = re.findall(r"^step (.*)$", text(".ci/run"), re.MULTILINE)
    checks = {"ruff check --fix": "ruff check .", "ruff format": "ruff format --check ."}
    assert len(hooks) == 4
    assert {checks.get(hook, hook) for hook in hooks} <= set(steps)
