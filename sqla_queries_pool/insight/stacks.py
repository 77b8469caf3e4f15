"""Where in the application a thread or a task is, without the frames of this package and of SQLAlchemy."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import tempfile
import threading
from asyncio import Task
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import sqlalchemy

from ..concurrency.threads import Caller

if TYPE_CHECKING:
    from ..concurrency.tasks import TaskCaller

DEEPEST = 20
"""How many calls are kept, the innermost ones."""
Calls = tuple[tuple[CodeType, int], ...]
Place = tuple[str, str, str]
"""File, line, function."""
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
"""The package, not this room."""
# SQLAlchemy also makes functions at run time, in "files" of these names.
_OURS = (_HERE, os.path.dirname(sqlalchemy.__file__) + os.sep, "<sqlalchemy", "<string>")
_APPLICATIONS = (os.path.join(_HERE, "demo", ""), os.path.join(_HERE, "monitor", ""))
_THREAD = r"(?:Current thread|Thread) 0x([0-9a-f]+)"
_PLACE = r'  File "(.*)", line (\d+) in (.*)$'


def calls(frame: FrameType | None) -> Calls:
    """Return the calls of this thread's stack, innermost first, as they are; told() makes text of them."""
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < DEEPEST:
        file = frame.f_code.co_filename  # _is_applications() by hand: this is done at each checkout
        if not file.startswith(_OURS) or file.startswith(_APPLICATIONS):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back or _below(frame)
    return tuple(found)


def _below(frame: FrameType) -> FrameType | None:
    """Who has started the greenlet of SQLAlchemy's whose outermost frame this is: a coroutine."""
    module = sys.modules.get("greenlet")
    current: Any = None if module is None else module.getcurrent()
    # The mark is of 2.0.24 and later.
    marked = getattr(current, "__sqlalchemy_greenlet_provider__", False)
    if not marked and not type(current).__module__.startswith("sqlalchemy."):
        return None
    parent: FrameType | None = current.parent.gr_frame
    return parent if frame.f_code.co_filename.startswith(_OURS) else None


def as_text(found: Calls) -> tuple[str, ...]:
    """Return the same as text, outermost call first, without those of Python's own library."""
    return _as_text((code.co_filename, str(line), code.co_name) for code, line in found)


def _as_text(places: Iterable[Place]) -> tuple[str, ...]:
    found = [place for place in places if _is_applications(place[0])][:DEEPEST]
    own = [place for place in found if not _is_pythons(place[0])] or found[:1]
    return tuple(f"{file}:{line} in {name}" for file, line, name in reversed(own))


def _is_applications(file: str) -> bool:
    return not file.startswith(_OURS) or file.startswith(_APPLICATIONS)


def _is_pythons(file: str) -> bool:
    return file.startswith(_PYTHONS) and "site-packages" not in file


class Threads:
    """The threads of the process at this moment."""

    def __init__(self) -> None:
        self._names = {thread.ident: thread.name for thread in threading.enumerate()}
        self._at: dict[int, list[Place]] = {}
        with contextlib.suppress(OSError):  # there is nowhere to write
            self._look()

    def _look(self) -> None:
        # In C, in one go.  Other threads run between two steps of Python, and to follow the frames of one
        # that runs is not safe: in Python 3.11 `f_back` of such a frame was seen to be something else.
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            text = file.read().decode(errors="replace")
        places: list[Place] = []
        for line in text.splitlines():
            if thread := re.match(_THREAD, line):
                places = self._at[int(thread[1], 16)] = []
            elif place := re.match(_PLACE, line):
                places.append((place[1], place[2], place[3]))

    def name(self, caller: Caller | TaskCaller) -> str:
        """The name of a thread or a task."""
        return caller.name or self._names.get(caller.ident) or f"thread {caller.ident}"

    def at(self, caller: Caller | TaskCaller | None) -> tuple[str, ...]:
        """Where it is, outermost call first; empty where it has ended, or can't be said."""
        if caller is None or not caller.alive:
            return ()
        if isinstance(caller, Caller):
            return _as_text(self._at.get(caller.ident, ()))
        return _as_text(reversed(list(_awaits(caller.task()))))


def _awaits(task: Task[Any] | None) -> Iterator[Place]:
    """What a task awaits, the outermost call first: the frames of its coroutines.

    None is followed to its caller, so it does not matter that the task may run.
    """
    coroutine: Any = None if task is None else task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            yield frame.f_code.co_filename, str(frame.f_lineno), frame.f_code.co_name
        coroutine = getattr(coroutine, "cr_await", None)
