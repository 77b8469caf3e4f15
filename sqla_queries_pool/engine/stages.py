"""The stages of a checkout, and how long each took: a note on its error."""

from __future__ import annotations

import contextlib
import time
from typing import Any

WAITING, OPENING, PROBING = "waiting in the queue", "opening a connection", "checking an idle connection"
"""What a checkout may be doing."""
_WE = "QueriesPool"


class Stages:
    """What a checkout has done so far, and for how long: for its error.

    :param begin: when its first stage began, by ``time.monotonic``.
    """

    def __init__(self, begin: float) -> None:
        self._spent: dict[str, float] = {}
        self._stage = ""
        self._since = begin

    def enter(self, stage: str) -> None:
        """Begin a stage, and end the one before."""
        if self._stage:
            now = time.monotonic()
            self._spent[self._stage] = self._spent.get(self._stage, 0.0) + now - self._since
            self._since = now
        self._stage = stage

    def note(self, error: Any, label: str) -> None:
        """Say in which stage an error came (PEP 678; before Python 3.11 tracebacks don't show notes)."""
        self.enter(stage := self._stage)
        spent = ", ".join(f"{seconds:.1f} s {stage}" for stage, seconds in self._spent.items())
        with contextlib.suppress(Exception):  # one that takes no notes
            others = [note for note in getattr(error, "__notes__", []) if not note.startswith(_WE)]
            error.__notes__ = [*others, f"{_WE} {label} was {stage}. Time spent: {spent}"]
