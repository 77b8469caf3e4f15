"""A FastAPI application with async endpoints and SQLModel: it counts visits, and shows its pool.

DATABASE_URL=postgresql+asyncpg://… uvicorn fastapi_async_app:app
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from a2wsgi import WSGIMiddleware
from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, func, select
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.types import ASGIApp, Receive, Scope, Send

from sqla_queries_pool import CheckoutTimeout, QueriesPool, labelled
from sqla_queries_pool.monitor import Monitor

engine = create_async_engine(
    os.environ["DATABASE_URL"], poolclass=QueriesPool, max_size=5, idle_ttl=60, pool_timeout=10
)


class Visit(SQLModel, table=True):
    """Somebody was here."""

    __tablename__ = "fastapi_async_visit"
    id: int | None = Field(default=None, primary_key=True)
    page: str


class Count(SQLModel):
    """What an endpoint answers."""

    page: str
    visits: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Before the first request, and after the last."""
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    yield
    await engine.pool.drain(5)  # a task in the background may still have one
    await engine.dispose()


class Labels:
    """Reports of the pool name the request that has a connection, by this label of its checkouts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.  The label is a context variable, so each task has its own."""
        if scope["type"] == "http":
            with labelled(f"{scope['method']} {scope['path']}"):
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)


app = FastAPI(lifespan=lifespan)
app.add_middleware(Labels)
app.mount("/pools", WSGIMiddleware(Monitor()))  # for clients on this machine; it runs in threads


@app.exception_handler(CheckoutTimeout)
async def busy(request: Request, error: CheckoutTimeout) -> PlainTextResponse:
    """There was no connection in time.  The error says who has them, which is for the log."""
    logging.getLogger("uvicorn.error").error("%s", error)
    return PlainTextResponse("busy, please try again\n", 503)


async def get_session() -> AsyncIterator[AsyncSession]:
    """A session for one request.  It takes no connection before it is used."""
    async with AsyncSession(engine) as session:
        yield session


SessionOfRequest = Annotated[AsyncSession, Depends(get_session)]


async def count(session: AsyncSession, page: str) -> int:
    """How often was the page visited?"""
    return (await session.exec(select(func.count()).where(Visit.page == page))).one()


@app.post("/visits/{page}")
async def add_visit(page: str, session: SessionOfRequest) -> Count:
    """Note a visit, and say how many there are."""
    async with session.begin():  # the connection goes back at the end of this block
        session.add(Visit(page=page))
        await session.flush()
        return Count(page=page, visits=await count(session, page))


@app.get("/visits/{page}")
async def show_visits(page: str, session: SessionOfRequest) -> Count:
    """Say how many visits there are.  What only reads ends its transaction, too."""
    async with session.begin():
        return Count(page=page, visits=await count(session, page))
