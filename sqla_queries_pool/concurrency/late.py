"""What is opened after its caller has left: the next one has it."""

from __future__ import annotations

from asyncio import Future as TaskFuture
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from typing import Any


class TooLate(Exception):
    """The deadline of a checkout has come, and what it began goes on without it."""


def pass_on(unwanted: Callable[[Any], None], future: ThreadFuture[Any] | TaskFuture[Any]) -> None:
    """An opening has ended whose caller has left; an error was logged where it came."""
    if not future.cancelled() and future.exception() is None:
        unwanted(future.result())
