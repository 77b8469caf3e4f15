"""The thread that does the letters of all shares of the process, and the lock that guards them."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import threading
import time
from typing import Protocol

from ..logs import logger

AGAIN_IN = 1.0
"""Seconds after which a share that has failed is looked after again."""


class Attended(Protocol):
    """A share, as the thread sees it."""

    due: float
    """When :meth:`tick` is to be called at the latest, by ``time.monotonic``."""

    @property
    def fds(self) -> list[int]:
        """Descriptors: it is called as well when one of them can be read."""

    def tick(self, now: float) -> bool:
        """Do what is due; return whether it is still of use."""

    def log(self) -> None:
        """Log what went wrong; called without the lock, for a log may take as long as it likes."""

    def end(self) -> None:
        """It is of no use for now."""

    def after_fork_in_child(self) -> None:
        """What is open is the parent's."""


class Postman:
    """The thread that does the letters of all shares of the process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Guards all shares: held for microseconds, and while the process forks, so that a child knows of
        each lease that it has inherited.  A pool's own lock is taken inside it, never the other way round."""
        self._shares: dict[Attended, None] = {}
        self._runs = False
        self._pipe: tuple[int, int] | None = None

    @property
    def runs(self) -> bool:
        """Is there the thread?"""
        return self._runs

    def attends(self, share: Attended) -> bool:
        """Does the thread look after it?"""
        return share in self._shares and self._runs

    def attend(self, share: Attended) -> None:
        """Look after a share, from now on; called with the lock."""
        self._shares[share] = None
        if self._runs:
            self.wake()
            return
        try:
            if self._pipe is None:
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[0], False)
                os.set_blocking(self._pipe[1], False)
            self._runs = True
            threading.Thread(target=self._run, name="sqla_queries_pool host", daemon=True).start()
        except BaseException as error:
            # Too many descriptors or threads, or the interpreter is about to end: the next call tries again.
            self._runs = False
            if not isinstance(error, (OSError, RuntimeError)):
                raise

    def wake(self) -> None:
        """Have the thread look what is due."""
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe[1], b"!")

    def _run(self) -> None:
        try:
            while (pause := self._round()) is not None:
                poll = select.poll()
                with self.lock:
                    fds = [fd for share in self._shares for fd in share.fds]
                    fds += [] if self._pipe is None else [self._pipe[0]]
                for fd in fds:
                    poll.register(fd, select.POLLIN)
                poll.poll(1000 * pause)
        except BaseException:
            self._runs = False
            raise

    def _round(self) -> float | None:
        """Look after each share once; return after how many seconds again, or None for never."""
        failures: list[Exception] = []
        with self.lock:
            shares = list(self._shares)
            pause = self._look_after(shares, failures)
        for failure in failures:
            logger.error("Exception in the thread of a budget of the host", exc_info=failure)
        for share in shares:
            share.log()
        return pause

    def _look_after(self, shares: list[Attended], failures: list[Exception]) -> float | None:
        """:meth:`_round`, with the lock."""
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._pipe[0], 4096)
        now = time.monotonic()
        for share in shares:
            try:
                stays = share.tick(now)
            except Exception as error:
                failures.append(error)
                share.due, stays = now + AGAIN_IN, True
            if not stays:
                share.end()
                del self._shares[share]
        if not self._shares:
            self._runs = False
            return None
        return max(0.0, min(share.due for share in self._shares) - now)

    def close(self) -> None:
        """The process ends: leave no mailbox behind.  The kernel frees the leases."""
        with self.lock:
            for share in self._shares:
                share.end()
            self._shares.clear()

    def after_fork_in_child(self) -> None:
        """Only the forking thread is here; all shares begin anew when they are used.

        pool/after_fork.py calls it: the pools come after it.
        """
        self.lock = threading.RLock()
        shares, self._shares = self._shares, {}
        self._runs = False
        for fd in self._pipe or ():
            os.close(fd)
        self._pipe = None
        for share in shares:
            share.after_fork_in_child()


postman = Postman()
"""The process's."""
atexit.register(postman.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: postman.lock.acquire(),
        after_in_parent=lambda: postman.lock.release(),
    )
