"""A clock for a machine that does other things meanwhile."""

from __future__ import annotations

import os
import time
from types import TracebackType

WAITED = "/proc/thread-self/schedstat"
"""Its second number: the nanoseconds for which this thread could have run, and another one did."""


class Clock:
    """Seconds; it stands still while the kernel runs others in the place of the thread that made it.

    Where a thread waits for something else, a server or a lock, the clock runs on.  Linux tells that time;
    elsewhere the clock never stands still.
    """

    def __init__(self) -> None:
        self._file = os.open(WAITED, os.O_RDONLY) if os.path.exists(WAITED) else None

    def __call__(self) -> float:
        while True:
            waited, now = self._waited(), time.perf_counter()
            if self._waited() == waited:  # else another program ran in between
                return now - waited / 1e9

    def _waited(self) -> int:
        return 0 if self._file is None else int(os.pread(self._file, 100, 0).split()[1])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Clock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
