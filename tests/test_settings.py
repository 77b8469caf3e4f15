"""A parameter stands once: what else names it agrees with :class:`Settings`."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, exc
from sqlalchemy.engine import make_url
from sqlalchemy.pool import QueuePool

from sqla_queries_pool import QueriesPool, QueriesPoolOptions
from sqla_queries_pool.engine.settings import NAMES, OPTIONS, REMOVED, Settings
from sqla_queries_pool.parameters import UNSTATED

PAGE = Path(__file__).parent.parent / "docs" / "configuration.rst"
SIGNATURE = {
    name: parameter
    for name, parameter in inspect.signature(QueriesPool.__init__).parameters.items()
    if name not in ("self", "creator", "kw")
}


def rows() -> list[list[str]]:
    """The cells of the page's table of parameters."""
    table = PAGE.read_text(encoding="utf-8").partition("\nParameters\n")[2]
    found = re.findall(r"^   \* - (.*?)(?=^   \* - |^\S)", table, re.MULTILINE | re.DOTALL)
    cells = [[cell.strip() for cell in re.split(r"\n     - ", row)] for row in found]
    return [row for row in cells if row[0].startswith("``")]


def names_in(cell: str) -> list[str]:
    """The names of parameters in a cell."""
    return re.findall(r"``(\w+)``", cell)


def test_the_signature_has_the_parameters_and_their_defaults() -> None:
    """``create_engine`` reads it; the settings are the truth.  QueuePool's come first, in its order."""
    assert SIGNATURE.keys() == OPTIONS.keys()
    queuepools = list(inspect.signature(QueuePool).parameters)[1:-1]
    assert list(SIGNATURE)[: len(queuepools)] == queuepools
    for name, parameter in SIGNATURE.items():
        assert parameter.default is getattr(Settings, name), name
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, f"create_engine does not see {name}"


def test_what_is_stated_by_default_is_what_is_understood() -> None:
    """Each default is a value that its own reader takes, and leaves as it is."""
    assert Settings.read({name: getattr(Settings, name) for name in OPTIONS}, {}) == Settings()


def test_type_checkers_know_the_names_of_create_engine() -> None:
    """``QueriesPoolOptions`` has all that can be stated, and the pool class."""
    hints = typing.get_type_hints(QueriesPoolOptions)
    assert set(hints) == {*NAMES, "poolclass"}
    for name, option in OPTIONS.items():
        meant = typing.get_type_hints(Settings)[name]
        stated = hints[option.name or name]
        assert set(typing.get_args(stated) or [stated]) == {
            kind for kind in typing.get_args(meant) or [meant] if kind is not type(UNSTATED)
        }, name


def test_the_page_has_each_parameter_by_both_of_its_names() -> None:
    """In the table of ``docs/configuration.rst``."""
    ours, theirs = set(), set()
    for row in rows():
        theirs |= set(names_in(row[0]))
        ours |= set(names_in(row[1]))
    assert theirs >= set(NAMES)
    assert ours >= set(OPTIONS)


@pytest.mark.parametrize("name", [n for n in OPTIONS if getattr(Settings, n) is not UNSTATED])
def test_the_page_says_the_default(name: str) -> None:
    """As it is written in Python."""
    (row,) = [row for row in rows() if name in names_in(row[1])]
    default = getattr(Settings, name)
    said = [eval(text, {}) for text in re.findall(r"``(None|True|False|'\w+'|\"\w+\"|[\d.]+)``", row[2])]
    assert default in said, (row[2], default)


def test_the_url_takes_all_of_them_and_gives_the_driver_none() -> None:
    """``plugin=queries`` knows what the settings know."""
    values = dict.fromkeys(NAMES, "true")
    values |= {option.name or name: "1" for name, option in OPTIONS.items() if "econds" in option.doc}
    values |= {option.name or name: "1" for name, option in OPTIONS.items() if "timeout" in name}
    values |= {"max_size": "5", "min_size": "1", "max_waiting": "1", "queue_target": "1", "pool_id": "x"}
    values |= {"on_deadlock": "warn", "pool_recycle": "60", "pool_reset_on_return": "commit", "idle_ttl": "1"}
    values |= {"share": "none", "classes": "web:min=2,weight=4;background:max=4", "caller": "web"}
    for taken in ("pool_size", "max_overflow"):  # other words for max_size
        del values[taken]
    url = make_url("postgresql+psycopg2://me@host/shop").update_query_dict({"plugin": "queries", **values})
    engine = create_engine(url)
    assert type(engine.pool) is QueriesPool
    assert engine.url.query == {}
    assert (engine.pool.settings.leak_after, engine.pool.settings.on_deadlock) == (1.0, "warn")
    assert engine.pool.settings.classes == {"web": {"min": 2, "weight": 4.0}, "background": {"max": 4}}


def test_there_are_few_of_them() -> None:
    """A pool with too many parameters is one that nobody understands: before there is one more, one goes."""
    assert len(OPTIONS) <= 24


def test_what_became_of_one_that_there_was_is_said() -> None:
    """In the URL and in the constructor; ``create_engine`` has SQLAlchemy's error, which names it."""
    for name, instead in REMOVED.items():
        said = f"{name} is no parameter any more: {re.escape(instead)}. Remove it"
        with pytest.raises(exc.ArgumentError, match=said):
            create_engine(f"postgresql+psycopg2://me@host/shop?plugin=queries&{name}=1")
        with pytest.raises(exc.ArgumentError, match=said):
            QueriesPool(str, **{name: 1})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=name):
            create_engine("sqlite:///x.db", poolclass=QueriesPool, **{name: 1})


def test_help_says_what_each_is_for() -> None:
    """One line of documentation stands once, and where people look for it."""
    text = inspect.getdoc(QueriesPool) or ""
    assert [name for name in OPTIONS if f":param {name}: " not in text] == []
