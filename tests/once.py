"""What takes long to make, and is made once for all processes of a run of the tests."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, worker_id: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of that name; the first process that asks has it made, and the others wait.

    :param make: is called with the folder, which is empty, and fills it.
    """
    base = factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with open(folder.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder
