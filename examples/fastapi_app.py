"""A FastAPI application with sync endpoints: it counts visits.

DATABASE_URL=postgresql+psycopg2://… uvicorn fastapi_app:app
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_queries_pool import QueriesPool

engine = create_engine(
    os.environ["DATABASE_URL"], poolclass=QueriesPool, max_size=5, idle_ttl=60, pool_timeout=10
)


class Base(DeclarativeBase):
    """The tables."""


class Visit(Base):
    """Somebody was here."""

    __tablename__ = "fastapi_visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str]


class Count(BaseModel):
    """What an endpoint answers."""

    page: str
    visits: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Before the first request, and after the last."""
    Base.metadata.create_all(engine)
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)


def get_session() -> Iterator[Session]:
    """A session for one request.  It takes no connection before it is used."""
    with Session(engine) as session:
        yield session


SessionOfRequest = Annotated[Session, Depends(get_session)]


def count(session: Session, page: str) -> int:
    """How often was the page visited?"""
    return session.scalars(select(func.count()).where(Visit.page == page)).one()


@app.post("/visits/{page}")
def add_visit(page: str, session: SessionOfRequest) -> Count:
    """Note a visit, and say how many there are."""
    with session.begin():  # the connection goes back at the end of this block
        session.add(Visit(page=page))
        session.flush()
        return Count(page=page, visits=count(session, page))


@app.get("/visits/{page}")
def show_visits(page: str, session: SessionOfRequest) -> Count:
    """Say how many visits there are.  What only reads ends its transaction, too."""
    with session.begin():
        return Count(page=page, visits=count(session, page))
