"""A ping into a network that swallows everything ends, with whatever driver: what tests of drivers share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fakes import Task
from hazards import eventually, pool_of
from proxy import Proxy
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_queries_pool import QueriesPool

TIMES = {"ping_after": 0, "ping_timeout": 0.2}
"""The engine's."""


def check_ping_ends(proxy: Proxy, engine: Engine, use: Callable[[], object]) -> None:
    """After ping_timeout; then the pool connects again.

    :param use: a checkout of the engine, and its return.
    """
    use()
    proxy.blackhole()
    task = Task(use)
    eventually(lambda: pool_of(engine).statistics().dead == 1, "the ping ends")
    proxy.pass_on()
    task.result()
    proxy.blackhole()
    Task(engine.dispose).result()  # it says goodbye into that network


def check_ping_in_a_loop_ends(host: str, port: int, url: str) -> None:
    """The same for an engine of asyncio.

    :param url: the server's, without a proxy.
    """

    async def main() -> None:
        engine = create_async_engine(proxy.url(url), poolclass=QueriesPool, **TIMES)
        async with engine.connect():
            pass
        proxy.blackhole()
        connection = engine.connect()
        task = asyncio.ensure_future(connection.start())
        while pool_of(engine.sync_engine).statistics().dead == 0:
            await asyncio.sleep(0.01)
        proxy.pass_on()
        await task
        await connection.close()
        await engine.dispose()

    with Proxy(host, port) as proxy:
        asyncio.run(asyncio.wait_for(main(), 60))
