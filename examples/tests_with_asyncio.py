"""Tests of an asynchronous application: each has an event loop of its own, and all have one engine.

DATABASE_URL=postgresql+asyncpg://… pytest tests_with_asyncio.py
"""

import os

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sqla_queries_pool import QueriesPool

# Your application's.
engine = create_async_engine(os.environ["DATABASE_URL"], poolclass=QueriesPool, max_size=2)


@pytest.mark.asyncio
@pytest.mark.parametrize("number", range(3))
async def test_an_application(number: int) -> None:
    """It works in every test, whatever loop that has."""
    async with AsyncSession(engine) as session:
        assert await session.scalar(text("SELECT :number + 1"), {"number": number}) == number + 1
