"""A Celery application: tasks that use the database, in the children of the prefork pool.

DATABASE_URL=postgresql+psycopg2://… celery -A celery_app worker --concurrency 3

It needs no broker: messages and results are files below the folder CELERY_FOLDER.  Yours has a broker of
its own; nothing else here depends on that.  RESULT_BACKEND, if it is set, is where the results go instead.
"""

import os
from pathlib import Path

from celery import Celery
from celery.signals import worker_init, worker_process_shutdown
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_queries_pool import PoolManager, QueriesPool

folder = Path(os.environ.get("CELERY_FOLDER", "celery-messages")).resolve()
for name in ("queue", "control", "results"):
    (folder / name).mkdir(parents=True, exist_ok=True)

backend = os.environ.get("RESULT_BACKEND", f"file://{folder}/results")
app = Celery("celery_app", broker="filesystem://", backend=backend)
app.conf.broker_transport_options = {
    "data_folder_in": folder / "queue",
    "data_folder_out": folder / "queue",
    "control_folder": folder / "control",
}

# A child of the prefork pool does one task at a time: it needs one connection, and a second one only if a
# task asks for it while it holds the first.
engine = create_engine(os.environ["DATABASE_URL"], poolclass=QueriesPool, max_size=2, idle_ttl=60)


class Base(DeclarativeBase):
    """The tables."""


class Order(Base):
    """An order that was taken."""

    __tablename__ = "celery_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str]


@worker_init.connect
def make_tables(**_: object) -> None:
    """In the parent, before it forks.  The connection that this took stays the parent's."""
    Base.metadata.create_all(engine)


@worker_process_shutdown.connect
def drain(**_: object) -> None:
    """In a child, after its last task: let its connections end in peace, and say who has one yet."""
    for stopped in PoolManager.drain(5):
        print(stopped, flush=True)


@app.task
def take_order(article: str) -> tuple[int, int, int]:
    """Write an order.  Return its number, which process wrote it, and on which server connection."""
    with Session(engine) as session, session.begin():
        order = Order(article=article)
        session.add(order)
        session.flush()
        backend = session.scalars(select(func.pg_backend_pid())).one()
        return order.id, os.getpid(), backend
