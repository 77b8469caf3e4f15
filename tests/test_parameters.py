"""What the numbers that people write mean, and what they are told when they mean nothing."""

from __future__ import annotations

import decimal
import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import inside
import pytest
from fakes import FakeDriver
from sqlalchemy import create_engine, exc

from sqla_queries_pool import ParameterError, PoolManager, QueriesPool, parameters
from sqla_queries_pool.parameters import UNSTATED
from sqla_queries_pool.pool import Pool

_numbers = itertools.count()
HUGE = "postgresql://me@host/" + "x" * 5000
NOT_NUMBERS = [
    True,
    False,
    math.nan,
    math.inf,
    -math.inf,
    "nan",
    "inf",
    "infinity",
    "",
    " ",
    "many",
    "5 connections",
    "0x10",
    "5,5",
    b"5",
    bytearray(b"5"),
    [5],
    (5,),
    {},
    5j,
    object(),
    decimal.Decimal(5),
    HUGE,
    "9" * 5000,
    10**400,
    10**5000,
    -(10**5000),
]


class Unprintable:
    """A value that can't even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def kind(value: object) -> str:
    """A short name of a value, for the names of tests."""
    shown = "huge" if isinstance(value, int) and abs(value) > 10**100 else repr(value)
    return f"{type(value).__name__} {shown:.12}"


# -- one by one --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (1, 1),
        (8, 8),
        (10**9, 10**9),
        (8.0, 8),
        ("8", 8),
        (" 8 ", 8),
        ("8.0", 8),
        ("+8", 8),
        ("1e2", 100),
        (None, None),
        ("none", None),
        ("None", None),
        (" NONE ", None),
    ],
)
def test_a_max_size_is_a_whole_number_or_none(value: object, meaning: int | None) -> None:
    """Numbers, text that is one, and None for no limit; the result is an int."""
    found = parameters.max_size("max_size", value)
    assert found == meaning
    assert type(found) is type(meaning)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1, 0.5, 7.5, "0", "-1", "0.5", -0.0, UNSTATED], ids=kind)
def test_anything_else_is_no_max_size(value: object) -> None:
    """Zero and negatives too: a pool without connections is no pool, and -1 is not how no limit is spelt."""
    with pytest.raises(ParameterError, match=r"at least 1, or None for no limit"):
        parameters.max_size("max_size", value)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (0, 0.0),
        (0.0, 0.0),
        (60, 60.0),
        (0.25, 0.25),
        (1e9, 1e9),
        ("60", 60.0),
        (" 0.5 ", 0.5),
        ("1e-3", 0.001),
        (None, None),
        ("none", None),
        ("NONE", None),
    ],
)
def test_seconds_are_zero_or_more_or_none(value: object, meaning: float | None) -> None:
    """Fractions are fine, None has no end."""
    assert parameters.seconds("idle_ttl", value) == meaning


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1, -0.001, "-1", UNSTATED], ids=kind)
def test_anything_else_is_no_seconds(value: object) -> None:
    """Negative durations are refused rather than read as zero or as for ever: libraries differ about them."""
    with pytest.raises(ParameterError, match=r"zero or more, or None$"):
        parameters.seconds("idle_ttl", value)


@pytest.mark.parametrize(
    ("pool_size", "max_overflow", "meaning"),
    [
        (UNSTATED, UNSTATED, UNSTATED),
        (5, 10, 15),
        (5, UNSTATED, 15),
        (20, UNSTATED, 30),
        (UNSTATED, 0, 5),
        (UNSTATED, 10, 15),
        (5, 0, 5),
        (1, 0, 1),
        ("3", "4", 7),
        (3.0, 4.0, 7),
        (0, UNSTATED, None),
        (0, 10, None),
        (0, 0, None),
        (UNSTATED, -1, None),
        (5, -1, None),
        ("5", "-1", None),
        (0, -1, None),
        (0, -5, None),
    ],
)
def test_queuepools_parameters_are_read_as_their_sum(
    pool_size: object, max_overflow: object, meaning: object
) -> None:
    """What one leaves out has QueuePool's default; 0 and -1 are its spellings of no limit."""
    assert parameters.queuepool_max_size(pool_size, max_overflow) == meaning


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1, -5, 2.5, "2.5", None, "none"], ids=kind)
def test_anything_else_is_no_pool_size(value: object) -> None:
    """Also where max_overflow alone would lift the limit; the remedy names max_size, too."""
    for max_overflow in (UNSTATED, 3, -1):
        with pytest.raises(ParameterError, match=r"^pool_size=.* or 0 for no limit \(or use max_size\)$"):
            parameters.queuepool_max_size(value, max_overflow)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -2, 2.5, "-2", None, "none"], ids=kind)
def test_anything_else_is_no_max_overflow(value: object) -> None:
    """Also where pool_size alone would lift the limit."""
    for pool_size in (UNSTATED, 3, *([] if value in (-2, "-2") else [0])):
        with pytest.raises(ParameterError, match=r"^max_overflow=.* or -1 for no limit \(or use max_size\)$"):
            parameters.queuepool_max_size(pool_size, value)


# -- the errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_size", "idle_ttl", "timeout"])
def test_the_error_names_the_parameter_the_value_and_what_to_write(name: str) -> None:
    """It is SQLAlchemy's ArgumentError and Python's ValueError, so that both kinds of callers catch it."""
    with pytest.raises(exc.ArgumentError, match=rf"^{name}='lots' is not valid: write a ") as raised:
        QueriesPool(FakeDriver().connect, **{name: "lots"})  # type: ignore[arg-type]
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("value", [HUGE, HUGE.encode(), [HUGE], 10**5000, "9" * 5000], ids=kind)
def test_the_error_is_short_whatever_the_value(value: object) -> None:
    """A value that got into the wrong place may be of any length, and be anything."""
    with pytest.raises(ParameterError) as raised:
        parameters.max_size("max_size", value)
    assert len(str(raised.value)) < 200


def test_the_error_can_be_made_for_what_cannot_be_shown() -> None:
    """A value whose ``repr`` fails is refused like any other."""
    with pytest.raises(ParameterError, match="max_size="):
        parameters.max_size("max_size", Unprintable())


def test_a_url_in_the_wrong_place_does_not_show_its_password() -> None:
    """Whoever mixes up two settings does not want the one in the log because of the other."""
    with pytest.raises(ParameterError) as raised:
        parameters.max_size("max_size", "postgresql://me:topsecret@host/db")
    assert "topsecret" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong", [{"max_size": HUGE, "pool_size": 5}, {"pool_id": [HUGE]}], ids=["both", "pool_id"]
)
def test_the_errors_about_more_than_a_number_are_short_too(wrong: Any) -> None:
    """The same for the other errors that show what was written."""
    with pytest.raises(ParameterError) as raised:
        QueriesPool(FakeDriver().connect, **wrong)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize("pool_id", ["", 5, True, b"name", ["name"]])
def test_a_pool_id_is_a_name(pool_id: Any) -> None:
    """Empty ones and what is no text are refused with what to write instead."""
    with pytest.raises(ParameterError, match=r"^pool_id=.* is not valid: write a name, or None$"):
        QueriesPool(FakeDriver().connect, pool_id=pool_id)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"pool_size": 5}, "pool_size"),
        ({"max_overflow": 5}, "max_overflow"),
        ({"pool_size": 5, "max_overflow": 5}, "pool_size"),
    ],
)
@pytest.mark.parametrize("max_size", [5, None, "8"])
def test_max_size_beside_queuepools_parameters_is_refused(
    max_size: Any, other: dict[str, Any], named: str
) -> None:
    """Which of the two would hold is nothing to guess, even where they happen to agree."""
    message = rf"^max_size=.* and {named} can't both be set: .* Set max_size alone$"
    with pytest.raises(ParameterError, match=message):
        QueriesPool(FakeDriver().connect, max_size=max_size, **other)


# -- everywhere the same -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda pid, value: QueriesPool(FakeDriver().connect, pool_id=pid, max_size=value),
        lambda pid, value: PoolManager.create(pid, max_size=value),
        lambda pid, value: Pool(pid, max_size=value),
        lambda pid, value: Pool(pid).set_max_size(value),
    ],
    ids=["QueriesPool", "PoolManager.create", "Pool", "set_max_size"],
)
def test_max_size_means_the_same_wherever_it_is_said(use: Callable[[str, Any], Any]) -> None:
    """The engine's parameter and the queries API take, and refuse, the same values."""
    for value in (1, "8", None, "none"):
        use(f"everywhere-{next(_numbers)}", value)
    for value in (0, -1, math.nan, True, "many"):  # type: ignore[assignment]
        with pytest.raises(ParameterError, match=r"^max_size="):
            use(f"everywhere-{next(_numbers)}", value)


@pytest.mark.parametrize(
    "use",
    [
        lambda pid, value: QueriesPool(FakeDriver().connect, pool_id=pid, idle_ttl=value),
        lambda pid, value: PoolManager.create(pid, idle_ttl=value),
        lambda pid, value: Pool(pid, idle_ttl=value),
        lambda pid, value: Pool(pid).set_idle_ttl(value),
    ],
    ids=["QueriesPool", "PoolManager.create", "Pool", "set_idle_ttl"],
)
def test_idle_ttl_means_the_same_wherever_it_is_said(use: Callable[[str, Any], Any]) -> None:
    """The engine's parameter and the queries API take, and refuse, the same values."""
    for value in (0, 1.5, "8", None, "none"):
        use(f"everywhere-{next(_numbers)}", value)
    for value in (-1, math.nan, math.inf, False, "soon"):
        with pytest.raises(ParameterError, match=r"^idle_ttl="):
            use(f"everywhere-{next(_numbers)}", value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_size": 0},
        {"idle_ttl": -1},
        {"pool_timeout": "soon"},
        {"pool_size": -5},
        {"max_size": 5, "pool_size": 5},
        {"pool_reset_on_return": "sometimes"},
        {"max_sise": 5},
    ],
    ids=str,
)
def test_an_engine_that_could_not_be_made_leaves_nothing_behind(wrong: dict[str, Any]) -> None:
    """No entry in the manager, no say in the limit of the database's other engines."""
    url = f"fake://host/parameters_{next(_numbers)}"
    before = set(inside.pools())
    with pytest.raises((TypeError, exc.ArgumentError)):
        create_engine(url, module=FakeDriver(), poolclass=QueriesPool, **wrong)
    gc.collect()
    # create_engine looks for keywords that nobody took after having made the pool: that one has no
    # engine and leaves like every pool that is of no use any more.
    for pid in set(inside.pools()) - before:
        PoolManager.clean(pid)
    assert set(inside.pools()) <= before
    keeper = create_engine(url, module=FakeDriver(), poolclass=QueriesPool, max_size=2)
    assert PoolManager.report()["pools"][keeper.pool.pid]["max_size"] == 2  # type: ignore[attr-defined]
