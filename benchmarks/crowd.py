"""Clients who come whether the others were served or not: an open loop, over HTTP.

wrk, and each load tool of Debian, asks again when it was answered: it waits with an application that is slow,
and asks one that rejects all the more.  Neither is an overload of so many requests per second.  So here are
arrivals at random, and a client that gives up after a while, as a browser or a proxy does: it closes its
connection.  What an application does for it afterwards is in vain.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


@dataclass
class Answers:
    """What became of the requests that came in ``seconds``."""

    seconds: float
    """For how long they came."""
    in_time: list[float] = field(default_factory=list)
    """The seconds that each good answer took, from the moment at which its request was due."""
    rejected: int = 0
    """Answers that say that there is no other: 503."""
    given_up: int = 0
    """Requests whose client did not wait any longer."""
    failed: int = 0
    """All others: connections that were closed, and errors of the application."""

    @property
    def goodput(self) -> float:
        """Good answers in time, per second."""
        return len(self.in_time) / self.seconds

    def within(self, part: float) -> float:
        """The seconds in which this part of the good answers had come; there must be one."""
        return sorted(self.in_time)[int(part * len(self.in_time))]


def offer(
    url: str,
    rate: float,
    seconds: float,
    limit: float,
    warm_up: float = 0.0,
    settled: Callable[[], object] = lambda: None,
) -> Answers:
    """Have ``rate`` clients per second come for ``seconds``, each of whom waits for ``limit`` seconds.

    Those who come in the ``warm_up`` before that, also in seconds, are not counted.  ``settled`` is called
    after it.
    """
    return asyncio.run(_Crowd(url, limit).run(rate, seconds, warm_up, settled))


def arrivals(rate: float, seconds: float) -> Iterator[float]:
    """When they come: at random, and at the same moments each time."""
    chance = random.Random(1)
    at = 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        yield at


class _Crowd:
    def __init__(self, url: str, limit: float) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)
        self._request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        self._limit = limit
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(
        self, rate: float, seconds: float, warm_up: float, settled: Callable[[], object]
    ) -> Answers:
        loop = asyncio.get_running_loop()
        answers, ignored = Answers(seconds), Answers(warm_up)
        begin = loop.time()
        loop.call_at(begin + warm_up, settled)
        tasks = set()
        for at in arrivals(rate, warm_up + seconds):
            await asyncio.sleep(begin + at - loop.time())
            task = loop.create_task(self._client(begin + at, answers if at >= warm_up else ignored))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        for _, writer in self._idle:
            writer.close()
        return answers

    async def _client(self, due: float, answers: Answers) -> None:
        loop = asyncio.get_running_loop()
        try:
            status = await asyncio.wait_for(self._ask(), due + self._limit - loop.time())
        except asyncio.TimeoutError:
            answers.given_up += 1
        except (OSError, EOFError):
            answers.failed += 1
        else:
            if status == 200:
                answers.in_time.append(loop.time() - due)
            elif status == 503:
                answers.rejected += 1
            else:
                answers.failed += 1

    async def _ask(self) -> int:
        reader, writer = await self._connection()
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            await reader.readexactly(int(length[1]) if length else 0)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return int(head.split(maxsplit=2)[1])

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The one that was used last, which the server keeps longest."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)
