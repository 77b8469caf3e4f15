"""What the values that people write mean: ``max_size``, ``idle_ttl``, ``timeout`` and the like.

Text that is a number is taken, because ini files and URLs have nothing else, and so is ``none``.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from sqlalchemy.pool.base import ResetStyle

from .errors import ParameterError


class Unstated(enum.Enum):
    """The type of :data:`UNSTATED`: the caller said nothing, which is not ``None``."""

    UNSTATED = "unstated"

    def __repr__(self) -> str:
        return "UNSTATED"


UNSTATED: Final = Unstated.UNSTATED

_CLASS: Final = r"[\w.-]{1,40}"
_CLASSES: Final = (
    "{'web': {'min': 6, 'weight': 4}, 'background': {'max': 4}}, or in a text "
    "web:min=6,weight=4;background:max=4, or None"
)

QUEUEPOOL_SIZE: Final = 5
"""QueuePool's default ``pool_size``."""
QUEUEPOOL_OVERFLOW: Final = 10
"""QueuePool's default ``max_overflow``."""


def seconds(name: str, value: object) -> float | None:
    """Return a duration of zero or more in seconds, ``None`` for one without an end.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    number = _number(value)
    if number is not None and not number >= 0:
        raise _error(name, value, "a number of seconds, zero or more, or None")
    return number


def max_size(name: str, value: object) -> int | None:
    """Return a limit of one or more connections, ``None`` for none at all.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    number = _number(value)
    if number is not None and not (number >= 1 and number.is_integer()):
        raise _error(name, value, "a whole number of connections, at least 1, or None for no limit")
    return None if number is None else int(number)


def min_size(name: str, value: object) -> int:
    """Return a number of connections, zero or more.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    number = _number(value)
    if number is None or not (number >= 0 and number.is_integer()):
        raise _error(name, value, "a whole number of connections, zero or more")
    return int(number)


def max_waiting(name: str, value: object) -> int | None:
    """Return how many may wait, zero or more, ``None`` for any number.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    number = _number(value)
    if number is not None and not (number >= 0 and number.is_integer()):
        raise _error(name, value, "a whole number of checkouts, zero or more, or None for any number")
    return None if number is None else int(number)


def queue_target(name: str, value: object) -> float | None:
    """Return a duration of more than zero in seconds, ``None`` for none.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    number = _number(value)
    if number is not None and not number > 0:
        raise _error(name, value, "a number of seconds above zero, or None for none")
    return number


def flag(name: str, value: object) -> bool:
    """Return a yes or no; ini files have text for it.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    known = isinstance(value, str) or value in (True, False)
    text = str(value).strip().lower() if known else ""
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise _error(name, value, "True or False")


def queuepool_flag(name: str, value: object) -> bool:
    """Return a yes or no of QueuePool's: there, None and an empty text are a no.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    return False if value is None or (isinstance(value, str) and not value) else flag(name, value)


def recycle(name: str, value: object) -> float:
    """Return SQLAlchemy's ``recycle``: seconds after which a connection is replaced, -1 for never.

    As there, every number below zero means never.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    number = _number(value)
    if number is not None and math.isnan(number):
        raise _error(name, value, "a number of seconds, zero or more, or -1 for never")
    return -1 if number is None or number < 0 else number


def echo(name: str, value: object) -> bool | Literal["debug"]:
    """Return SQLAlchemy's ``echo``: may it log, and how much?

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    if value is None:
        return False
    if isinstance(value, str) and value.strip().lower() == "debug":
        return "debug"
    try:
        return flag(name, value)
    except ParameterError:
        raise _error(name, value, "True, False or 'debug'") from None


def queuepool_max_size(pool_size: object, max_overflow: object) -> int | Unstated | None:
    """Return the ``max_size`` that QueuePool's two parameters amount to: their sum.

    QueuePool spells "no limit" as ``pool_size=0`` or ``max_overflow=-1``.

    :raises ParameterError: for what QueuePool has no meaning for.
    """
    if pool_size is UNSTATED and max_overflow is UNSTATED:
        return UNSTATED
    size = QUEUEPOOL_SIZE if pool_size is UNSTATED else _number(pool_size)
    overflow = QUEUEPOOL_OVERFLOW if max_overflow is UNSTATED else _number(max_overflow)
    if size is None or not (size >= 0 and float(size).is_integer()):
        raise _error("pool_size", pool_size, "a whole number, or 0 for no limit (or use max_size)")
    # As there, what stands beside pool_size=0 does not matter.
    if overflow is None or not ((overflow >= -1 or size == 0) and float(overflow).is_integer()):
        remedy = "a whole number, or -1 for no limit (or use max_size)"
        raise _error("max_overflow", max_overflow, remedy)
    if size == 0 or overflow == -1:
        return None
    if size + overflow == math.inf:
        raise _error("pool_size", pool_size, "a smaller number of connections, or 0 for no limit")
    return int(size + overflow)


def caller(name: str, value: object) -> str | None:
    """Return the name of a class of callers, or None.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    if value is None or (isinstance(value, str) and re.fullmatch(_CLASS, value)):
        return value
    raise _error(name, value, "the name of a class: letters, digits, '_', '-' and '.', or None")


def classes(name: str, value: object) -> dict[str, dict[str, float]] | None:
    """Return what is stated of each class of callers, or None.

    :param value: a dictionary of dictionaries, or text: ``web:min=6,weight=4;background:max=4``.
    :raises ParameterError: for anything else, with the class and what to write.
    """
    if value is None or (isinstance(value, str) and value[:9].strip().lower() == "none"):
        return None
    stated = _classes_of_text(name, value) if isinstance(value, str) else value
    if not isinstance(stated, Mapping) or not all(isinstance(terms, Mapping) for terms in stated.values()):
        raise _error(name, value, _CLASSES)
    if not all(isinstance(each, str) and re.fullmatch(_CLASS, each) for each in stated):
        raise _error(name, value, f"{_CLASSES}; names have letters, digits, '_', '-' and '.'")
    return {each: _terms(name, each, terms) for each, terms in stated.items()}


def _classes_of_text(name: str, value: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for part in value.split(";"):
        each, colon, terms = part.partition(":")
        each = each.strip()
        if each in found:
            raise ParameterError(f"{name}: the class {shown(each)} is given twice: remove one of them")
        pairs = [term.partition("=") for term in terms.split(",") if term.strip()]
        found[each] = {key.strip(): number.strip() for key, _, number in pairs}
        if not colon or len(found[each]) < len(pairs):
            raise _error(name, value, _CLASSES)
    return found


def _terms(name: str, each: str, stated: Mapping[str, object]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in stated.items():
        number, where = _number(value), f"{name}, class {each!r}: {key}"
        whole = number is not None and float(number).is_integer()
        if key == "weight":
            if number is None or not number > 0:
                raise _error(where, value, "a number above zero")
            found[key] = number
        elif key in ("min", "max"):
            if number is None or not whole or number < (key == "max"):
                least = "at least 1" if key == "max" else "zero or more"
                raise _error(where, value, f"a whole number of connections, {least}")
            found[key] = int(number)
        else:
            raise ParameterError(f"{name}: {shown(key)} of the class {each!r} is not known: write {_CLASSES}")
    if found.get("min", 0) > found.get("max", math.inf):
        raise ParameterError(
            f"{name}: the class {each!r} has min={found['min']}, above its max={found['max']}: lower its min"
        )
    return found


def one_of(name: str, value: object, words: tuple[str, ...]) -> str:
    """Return one of some words.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    if not isinstance(value, str) or value not in words:
        raise _error(name, value, f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}")
    return value


def reset_on_return(name: str, value: object) -> object:
    """Return what SQLAlchemy's own pools take, which would show the whole value otherwise.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    if isinstance(value, ResetStyle) or (isinstance(value, str) and value in ("rollback", "commit", "none")):
        return value
    if value is None or (isinstance(value, (bool, int)) and value in (0, 1)):
        return value
    raise _error(name, value, "'rollback', 'commit' or None")


def logging_name(name: str, value: object) -> str | None:
    """Return a name for the logger, or None.

    :raises ParameterError: it is no text.
    """
    if value is not None and not isinstance(value, str):
        raise _error(name, value, "a name, or None")
    return value


def stated_max_size(
    limit: int | Unstated | None, pool_size: object, max_overflow: object
) -> int | Unstated | None:
    """Return the limit that an engine states, by either name.

    :raises ParameterError: it is stated by both, or means nothing.
    """
    sums = queuepool_max_size(pool_size, max_overflow)
    if isinstance(limit, Unstated):
        return sums
    if not isinstance(sums, Unstated):
        other = "max_overflow" if pool_size is UNSTATED else "pool_size"
        raise ParameterError(
            f"max_size={shown(limit)} and {other} can't both be set: max_size is the sum of pool_size and "
            "max_overflow. Set max_size alone"
        )
    return max_size("max_size", limit)


def of_sqlalchemys(kw: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What is SQLAlchemy's, with text understood: create_engine converts none, engine_from_config some.

    :param names: the names by which parameters were stated, where they are others: an error has those.
    """
    convert: dict[str, Callable[[str, object], object]] = {
        "recycle": recycle,
        "pre_ping": queuepool_flag,
        "echo": echo,
        "reset_on_return": reset_on_return,
        "logging_name": logging_name,
    }
    return {
        name: convert[name](names.get(name, name), kw[name]) if name in convert else kw[name] for name in kw
    }


def pool_id(name: str, value: object) -> str | None:
    """Return a name for a pool, or None.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    raise _error(name, value, "a name, or None")


def share(name: str, value: object) -> str | None:
    """Return with which processes a limit is shared: ``host``, a folder, or None for none.

    :raises ParameterError: for anything else, with the parameter's name and what to write.
    """
    if value is None or value == "" or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    if isinstance(value, str) and (value == "host" or (os.path.isabs(value) and "\0" not in value)):
        return value
    raise _error(name, value, "'host', the absolute path of a folder, or None")


def _number(value: object) -> float | None:
    """``None`` for None, NaN for what is no number; a boolean is none, whatever Python says."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def shown(value: object) -> str:
    """What an error shows of a value: it may be anything, of any length, and a URL with a password."""
    if isinstance(value, str) and len(value) <= 20 and not {":", "@", "="}.intersection(value):
        return repr(value)
    if isinstance(value, str):
        return f"(a text of {len(value)} characters)"
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1e20):
        return repr(value)
    return f"({type(value).__name__})"


def _error(name: str, value: object, remedy: str) -> ParameterError:
    return ParameterError(f"{name}={shown(value)} is not valid: write {remedy}")
