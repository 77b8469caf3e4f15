"""Imported by a program that gives tasks to a Celery worker by files: none can be read before it is written.

Celery's file transport opens a message's file, and writes into it a moment later.  A worker that reads it in
between ends: "Unrecoverable error: JSONDecodeError".  Results have such a moment, too.
"""

import time
import uuid
from pathlib import Path
from typing import Any

from celery.backends.filesystem import FilesystemBackend  # type: ignore[import-untyped]
from kombu.transport.filesystem import Channel
from kombu.utils import json

_as_json: Any = json.dumps


def _put(self: Any, queue: str, payload: object, **_: object) -> None:
    path = Path(self.data_folder_out, f"{time.monotonic_ns() // 1_000_000}_{uuid.uuid4()}.{queue}.msg")
    part = path.with_suffix(".part")
    part.write_text(_as_json(payload), encoding="utf-8")
    part.rename(path)


def _get(self: Any, key: object) -> bytes | None:
    return _read(self, key) or None


_read = FilesystemBackend.get
Channel._put = _put  # type: ignore[method-assign]
FilesystemBackend.get = _get
