"""Where in the application a thread is, without the frames of this package and of SQLAlchemy."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

import sqlalchemy

DEEPEST = 20
"""How many calls are kept, the innermost ones."""
Calls = tuple[tuple[CodeType, int], ...]
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_OURS = (os.path.dirname(__file__) + os.sep, os.path.dirname(sqlalchemy.__file__) + os.sep)


def calls(frame: FrameType | None) -> Calls:
    """Return the calls of a stack, innermost first, as they are: cheap, to be told later."""
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < DEEPEST:
        code = frame.f_code
        if not code.co_filename.startswith(_OURS):
            found.append((code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def told(found: Calls) -> tuple[str, ...]:
    """Return the same for people, outermost call first, without those of Python's own library."""
    own = [call for call in found if not _is_pythons(call[0].co_filename)] or found[:1]
    return tuple(f"{code.co_filename}:{line} in {code.co_name}" for code, line in reversed(own))


def _is_pythons(file: str) -> bool:
    return file.startswith(_PYTHONS) and "site-packages" not in file


def now(thread: int | None) -> tuple[str, ...]:
    """Return where a thread is at this moment; empty where it has ended."""
    frames = sys._current_frames()
    try:
        return told(calls(frames.get(thread))) if thread is not None else ()
    finally:
        del frames  # it has this very frame
