"""How a server of the tests' own is started and ended: MariaDB, PgBouncer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sqla_queries_pool.demo.embedded import _account

READY_SECONDS = 30.0


class ServerProcess:
    """The process of a server, which refuses to run as root: root's runs as `postgres` or `nobody`."""

    def __init__(self) -> None:
        self.account = _account() if os.geteuid() == 0 else None
        """The user and the group that it has, where it is not the tests' own."""
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, command: Sequence[str], folder: Path, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Run a command in a folder; what it says is in the file ``log`` there."""
        uid, gid = self.account or (None, None)
        with open(folder / "log", "ab") as log:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=log,
                cwd=folder,
                user=uid,
                group=gid,
                extra_groups=None if uid is None else [],
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )

    def start(self, command: Sequence[str], folder: Path, ready: Callable[[], bool]) -> None:
        """Start it, return when it is ready."""
        since = (folder / "log").stat().st_size if (folder / "log").exists() else 0
        self._process = self.run(command, folder)
        deadline = time.monotonic() + READY_SECONDS
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (folder / "log").read_bytes()[since:].decode(errors="replace")
                raise RuntimeError(f"{command[0]} does not start:\n{said}")
            time.sleep(0.005)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, with all its connections; SIGKILL is a crash."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)  # a test may have frozen it
            try:
                process.wait(READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def pid(self) -> int:
        """Its process id, while it runs."""
        assert self._process is not None, "it does not run"
        return self._process.pid
