"""Where in the application a thread is, without the frames of this package and of SQLAlchemy."""

from __future__ import annotations

import os
import sys
import threading
from types import CodeType, FrameType

import sqlalchemy

from .callers import Caller

DEEPEST = 20
"""How many calls are kept, the innermost ones."""
Calls = tuple[tuple[CodeType, int], ...]
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
# SQLAlchemy also makes functions at run time, in "files" of this name.
_OURS = (_HERE, os.path.dirname(sqlalchemy.__file__) + os.sep, "<sqlalchemy")
_APPLICATIONS = (os.path.join(_HERE, "demo", ""), os.path.join(_HERE, "monitor", ""))


def calls(frame: FrameType | None) -> Calls:
    """Return the calls of a stack, innermost first, as they are: cheap, to be told later."""
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < DEEPEST:
        code = frame.f_code
        file = code.co_filename
        if not file.startswith(_OURS) or file.startswith(_APPLICATIONS):
            found.append((code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def told(found: Calls) -> tuple[str, ...]:
    """Return the same for people, outermost call first, without those of Python's own library."""
    own = [call for call in found if not _is_pythons(call[0].co_filename)] or found[:1]
    return tuple(f"{code.co_filename}:{line} in {code.co_name}" for code, line in reversed(own))


def _is_pythons(file: str) -> bool:
    return file.startswith(_PYTHONS) and "site-packages" not in file


class Threads:
    """The threads of the process at this moment."""

    def __init__(self) -> None:
        self._names = {thread.ident: thread.name for thread in threading.enumerate()}
        # Not the frames themselves: they would keep all that their threads have.
        self._at = {ident: calls(frame) for ident, frame in sys._current_frames().items()}

    def name(self, caller: Caller) -> str:
        """The name of a thread."""
        if not caller.alive:
            return f"thread {caller.ident}, which has ended"
        return self._names.get(caller.ident) or f"thread {caller.ident}"

    def at(self, caller: Caller | None) -> tuple[str, ...]:
        """Where it is, outermost call first; empty where it has ended."""
        return told(self._at.get(caller.ident, ())) if caller is not None and caller.alive else ()
