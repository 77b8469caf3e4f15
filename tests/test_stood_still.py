"""A process that was stopped, a machine that was suspended: what is late then is nobody's fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import inside
import pytest
from fakes import FakeDriver
from hazards import new_pid

from sqla_queries_pool import QueriesPool

Eventually = Callable[..., None]
TIMEOUT = 2.0
"""Seconds that a checkout waits."""
STOPPED = 3.5
"""Seconds for which the process is stopped: longer than its timeouts, and than twenty queue_targets."""
CHILD = textwrap.dedent(
    """
    import asyncio, sys, threading, time
    from sqlalchemy import create_engine
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqla_queries_pool import QueriesPool

    file, timeout = sys.argv[1], float(sys.argv[2])
    options = {"poolclass": QueriesPool, "max_size": 1, "pool_timeout": timeout}
    plain = create_engine("sqlite:///" + file, pool_id="plain", **options)
    picky = create_engine("sqlite:///" + file, pool_id="picky", queue_target=timeout / 30, **options)
    loops = create_async_engine("sqlite+aiosqlite:///" + file, pool_id="loops", **options)
    served, waits = [], [plain, plain, picky, picky]
    ready, go = threading.Event(), threading.Event()

    def wait(engine):
        try:
            engine.connect().close()
            served.append(engine.pool.pid)
        except Exception as error:
            print(type(error).__name__, error, flush=True)

    async def tasks():
        async def one():
            try:
                await (await loops.connect()).close()
                served.append("loops")
            except Exception as error:
                print(type(error).__name__, error, flush=True)

        held = await loops.connect()
        waiting = [asyncio.ensure_future(one()) for _ in range(2)]
        while loops.pool.statistics().waiting < 2:
            await asyncio.sleep(0.001)
        ready.set()
        await asyncio.to_thread(go.wait)
        await held.close()
        await asyncio.gather(*waiting)
        await loops.dispose()

    held = [plain.connect(), picky.connect()]
    threads = [threading.Thread(target=wait, args=(engine,)) for engine in waits]
    looping = threading.Thread(target=asyncio.run, args=(tasks(),))
    looping.start()
    ready.wait()
    for thread in threads:
        thread.start()
    while plain.pool.statistics().waiting + picky.pool.statistics().waiting < 4:
        time.sleep(0.001)
    print("waiting", flush=True)
    sys.stdin.readline()
    go.set()  # at once: what each has left of its time is not much
    for connection in held:
        connection.close()
    for thread in (*threads, looping):
        thread.join()
    print(*sorted(served), flush=True)
    """
)


@pytest.mark.slow
def test_a_process_that_was_stopped_for_longer_than_all_timeouts_fails_no_checkout(
    tmp_path: Path, eventually: Eventually
) -> None:
    """Threads and tasks wait on, for as long as they had left; and no queue is overloaded for it."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "file"), str(TIMEOUT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        os.kill(child.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{child.pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(STOPPED)  # it is the time that matters here
        os.kill(child.pid, signal.SIGCONT)
        assert child.stdout.read().split() == ["loops", "loops", "picky", "picky", "plain", "plain"]
    assert child.returncode == 0


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this platform has one clock")
def test_the_time_that_the_machine_was_suspended_counts() -> None:
    """Its monotonic clock stands still then, and what is idle would seem to be fresh."""
    pool = QueriesPool(FakeDriver().connect, pool_id=new_pid())
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= inside.core(pool).now() <= time.clock_gettime(time.CLOCK_BOOTTIME)
