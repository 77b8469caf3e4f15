"""Processes that share a budget (host_worker.py), and a role that may have no more, for tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import Observer, SessionServer, observer
from hazards import DEADLINE
from sqlalchemy import make_url

WORKER = Path(__file__).parent / "host_worker.py"
_numbers = itertools.count(1)


class Worker:
    """A process that does what it is told (host_worker.py).

    :param inside: the beginning of a command that runs another one somewhere.
    """

    def __init__(self, url: str, inside: Sequence[str] = (), **options: Any) -> None:
        told = json.dumps({"url": url, "pool_timeout": DEADLINE, **options})
        self._process = subprocess.Popen(
            [*inside, sys.executable, str(WORKER), told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, name: str, *arguments: Any) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """What came of it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        good, answer = json.loads(line)
        assert good, answer
        return answer

    def do(self, name: str, *arguments: Any) -> Any:
        """Both."""
        self.begin(name, *arguments)
        return self.result()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Let it die."""
        self._process.send_signal(sign)
        if sign == signal.SIGKILL:
            self.end()

    def end(self) -> None:
        """Close its input, wait until it has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait(DEADLINE)


class Host:
    """A role that may have no more connections than the budget, and processes that share them.

    :param budget: the role's ``CONNECTION LIMIT``.
    """

    def __init__(
        self, server: SessionServer, observer: Observer, url: str, folder: Path, budget: int
    ) -> None:
        self.folder, self.budget, self._observer, self._server = folder, budget, observer, server
        self.role = f"host_{next(_numbers)}"
        observer.query(f"CREATE ROLE {self.role} LOGIN PASSWORD 'secret' CONNECTION LIMIT {budget}")
        self.url = make_url(url).set(username=self.role, password="secret")
        self.workers: list[Worker] = []
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(server,))

    def start(self, count: int = 1, **options: Any) -> list[Worker]:
        """Processes begin."""
        told = {"share": str(self.folder), "max_size": self.budget, **options}
        new = [Worker(self.url.render_as_string(False), **told) for _ in range(count)]
        self.workers += new
        return new

    def backends(self) -> int:
        """How many connections the role has."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
        return int(self._observer.query(sql, self.role)[0][0])

    def refused(self) -> bool:
        """Did the server ever say that the role has too many?"""
        return f'too many connections for role "{self.role}"' in self._server.log(sys.maxsize)

    def watch(self) -> None:
        """Look all the time how many connections there are."""
        self._thread.start()

    def _sample(self, server: SessionServer) -> None:
        with observer(server) as looking:
            while not self._over.wait(0.005):
                sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
                self.peak = max(self.peak, int(looking.query(sql, self.role)[0][0]))

    def end(self) -> None:
        """All end."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        for worker in self.workers:
            worker.kill(signal.SIGCONT)
            worker.end()
        self._observer.query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", self.role
        )
        self._observer.query(f"DROP ROLE {self.role}")

    @property
    def home(self) -> Path:
        """The folder of its one budget."""
        (outer,) = self.folder.iterdir()
        (inner,) = outer.iterdir()
        return inner
