"""Everything as text, from an ini file; what SQLAlchemy converts, what the pool converts."""

from __future__ import annotations

import configparser
from collections.abc import Callable, Iterator
from typing import Any

import inside
import pytest
from fakes import FakeDriver
from sqlalchemy import Engine, engine_from_config, exc
from sqlalchemy.engine.default import DefaultDialect

from sqla_queries_pool import ParameterError, QueriesPool, parameters

Make = Callable[..., QueriesPool]


@pytest.fixture
def configured() -> Iterator[Make]:
    """The pool of an engine that an ini file configures: ``configured("max_size = 6")``."""
    engines: list[Engine] = []

    def make(*lines: str, poolclass: type = QueriesPool) -> Any:
        said = "".join(f"sqlalchemy.{line}\n" for line in lines)
        ini = configparser.ConfigParser()
        ini.read_string(f"[app:main]\nsqlalchemy.url = fake://host/config\n{said}")
        engine = engine_from_config(dict(ini["app:main"]), module=FakeDriver(), poolclass=poolclass)
        engines.append(engine)
        return engine.pool

    yield make
    for engine in engines:
        engine.dispose()


def test_our_parameters_take_numbers_fractions_none_and_booleans(configured: Make) -> None:
    """As text, which is all that an ini file has."""
    pool = configured("max_size = 6", "idle_ttl = 2.5", "check_limits = off", "pool_use_lifo = false")
    assert (
        pool.size(),
        inside.setting(pool, "idle_ttl"),
        inside.setting(pool, "check_limits"),
        inside.setting(pool, "use_lifo"),
    ) == (6, 2.5, False, False)
    assert inside.setting(configured("idle_ttl = none"), "idle_ttl") is None
    assert configured("max_size = none").size() == 0
    assert configured("pool_id = till").pid == "till"


def test_queuepools_parameters_are_taken_too(configured: Make) -> None:
    """Both, either, and its ways to say "no limit"."""
    assert configured("pool_size = 3", "max_overflow = 4").size() == 7
    assert configured("pool_size = 3").size() == 13
    assert configured("max_overflow = -1").size() == 0


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "True"])
def test_booleans_that_are_true(configured: Make, text: str) -> None:
    """Every spelling that ini files know."""
    assert inside.setting(configured(f"pool_pre_ping = {text}"), "pre_ping") is True


@pytest.mark.parametrize("text", ["false", "no", "off", "0", "False"])
def test_booleans_that_are_false(configured: Make, text: str) -> None:
    """``pool_pre_ping = false`` is text to SQLAlchemy, and text is true."""
    assert inside.setting(configured(f"pool_pre_ping = {text}"), "pre_ping") is False


def test_what_sqlalchemy_converts_is_whole_numbers(configured: Make) -> None:
    """``pool_timeout`` and the like are numbers before the pool sees them; a fraction is SQLAlchemy's error.

    The documentation says so; if this fails, SQLAlchemy has become better, and the documentation is wrong.
    """
    pool = configured("pool_timeout = 2", "pool_recycle = 1800", "echo_pool = false")
    assert (pool.timeout(), inside.setting(pool, "recycle"), pool.echo) == (2, 1800, False)
    converted = set(DefaultDialect.engine_config_types)
    assert {"pool_timeout", "pool_recycle", "pool_size", "max_overflow", "echo_pool"} <= converted
    assert not {"pool_pre_ping", "pool_use_lifo", "max_size", "idle_ttl"} & converted
    with pytest.raises(ValueError, match=r"invalid literal for int\(\) with base 10: '2\.5'"):
        configured("pool_timeout = 2.5")


@pytest.mark.parametrize(
    ("text", "style"), [("commit", "commit"), ("rollback", "rollback"), ("none", "none")]
)
def test_reset_on_return_is_a_word(configured: Make, text: str, style: str) -> None:
    """SQLAlchemy's own words."""
    assert (
        inside.setting(configured(f"pool_reset_on_return = {text}"), "reset_on_return").name
        == f"reset_{style}"
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("max_size = 0", "max_size='0' is not valid: write a whole number of connections, at least 1"),
        ("max_size = many", "max_size='many' is not valid"),
        ("idle_ttl = -1", "idle_ttl='-1' is not valid: write a number of seconds, zero or more"),
        ("check_limits = perhaps", "check_limits='perhaps' is not valid: write True or False"),
        ("pool_use_lifo = perhaps", "pool_use_lifo='perhaps' is not valid"),
        ("pool_pre_ping = perhaps", "pool_pre_ping='perhaps' is not valid: write True or False"),
        ("pool_size = -1", "pool_size=-1 is not valid"),
    ],
)
def test_a_bad_value_is_one_clear_error_when_the_engine_is_made(
    configured: Make, line: str, what: str
) -> None:
    """SQLAlchemy's ArgumentError, with the name, the value and what is allowed."""
    with pytest.raises(exc.ArgumentError, match="^" + what):
        configured(line)


def test_a_parameter_that_nobody_knows_is_an_error(configured: Make) -> None:
    """SQLAlchemy's own, which names it."""
    with pytest.raises(TypeError, match=r"Invalid argument\(s\) 'max_sise'"):
        configured("max_sise = 3")


# -- one by one --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (-1, -1),
        ("-1", -1),
        (-2, -1),
        (-0.5, -1),
        (None, -1),
        ("none", -1),
        (0, 0),
        ("3600", 3600),
        (0.5, 0.5),
    ],
)
def test_recycle_is_seconds_or_never(value: object, meaning: float) -> None:
    """All below zero are never, as for QueuePool, and None."""
    assert parameters.recycle("recycle", value) == meaning


@pytest.mark.parametrize("value", ["soon", True, float("nan"), [], float("inf")])
def test_anything_else_is_no_recycle(value: object) -> None:
    """Also no boolean, which SQLAlchemy would take for one second."""
    with pytest.raises(ParameterError, match="or -1 for never"):
        parameters.recycle("recycle", value)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(None, False), (False, False), ("false", False), (True, True), ("1", True), ("debug", "debug")],
)
def test_echo_is_a_boolean_or_debug(value: object, meaning: object) -> None:
    """As SQLAlchemy's ``echo``."""
    assert parameters.echo("echo", value) == meaning


@pytest.mark.parametrize("value", ["loud", 2, [], b"debug"])
def test_anything_else_is_no_echo(value: object) -> None:
    """SQLAlchemy would fail with a KeyError."""
    with pytest.raises(ParameterError, match="write True, False or 'debug'"):
        parameters.echo("echo", value)
