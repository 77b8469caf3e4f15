"""A Flask application whose engines share one hard limit of connections.

    python examples/flask_app.py

serves it at http://127.0.0.1:5000, with the database that `DATABASE_URL` names, and without one with a
PostgreSQL of its own (the extra `demo` has the server).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from flask import Blueprint, Flask, Response, current_app, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_queries_pool import CheckoutTimeout, QueriesPool


class Base(DeclarativeBase):
    """What all models have in common."""


# start: extension
# The pool class is stated here, for all engines: SQLALCHEMY_ENGINE_OPTIONS are not for binds.
db = SQLAlchemy(
    model_class=Base,
    engine_options={"poolclass": QueriesPool},
    session_options={"expire_on_commit": False},  # a note can be shown after the commit, without a connection
)
# end: extension


class Note(db.Model):
    """What people write."""

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class AuditEntry(db.Model):
    """Who wrote it."""

    __bind_key__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


pages = Blueprint("pages", __name__)


@pages.get("/notes")
def latest_notes() -> list[dict[str, Any]]:
    """The latest notes first."""
    notes = db.session.scalars(select(Note).order_by(Note.id.desc()).limit(20))
    return [{"id": note.id, "text": note.text} for note in notes]


@pages.post("/notes")
def add_note() -> tuple[dict[str, Any], int]:
    """Add the note of the form."""
    note = Note(text=request.form["text"])
    db.session.add(note)
    # Commit before the other bind is used. Both in one transaction would take a connection of each engine,
    # and threads that hold one while they wait for a second one can wait for each other.
    db.session.commit()
    db.session.add(AuditEntry(text=f"note {note.id} from {request.remote_addr}"))
    db.session.commit()
    return {"id": note.id, "text": note.text}, 201


@pages.get("/notes/export")
def export_notes() -> Response:
    """All notes, a line of JSON each."""
    engine = db.engines["exports"]

    def lines() -> Iterator[str]:
        # Not db.session, which Flask tears down before the first line is sent. The connection is back when
        # the last line is sent, or the client is gone.
        with engine.connect().execution_options(yield_per=100) as connection:
            for row in connection.execute(select(Note.id, Note.text).order_by(Note.id)):
                yield json.dumps(row._asdict()) + "\n"

    return Response(lines(), mimetype="application/x-ndjson")


@pages.get("/pool")
def pool_status() -> Response:
    """The pool in numbers. It names the server and the user: for those who run it, not for the public."""
    return Response(db.engine.pool.status() + "\n", mimetype="text/plain")


@pages.app_errorhandler(CheckoutTimeout)
def no_connection(error: CheckoutTimeout) -> tuple[str, int]:
    """The error says who holds the connections: that is for the log."""
    current_app.logger.error("%s", error)
    return "busy, please try again\n", 503


def create_app(url: str | None = None, audit_url: str | None = None, **config: Any) -> Flask:
    """Make an application; `config` overrules what is set here."""
    url = url or os.environ["DATABASE_URL"]
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"max_size": 10, "idle_ttl": 60, "pool_timeout": 10}
    app.config["SQLALCHEMY_BINDS"] = {
        # The same database, so the same limit of 10; exports, which take long, get 2 of these at most.
        "exports": {"url": url, "max_size": 2, "execution_options": {"postgresql_readonly": True}},
        # Another database has a limit of its own, here 3; of the same one's limit this engine gets 3 at most.
        "audit": {"url": audit_url or url, "max_size": 3, "idle_ttl": 5},
    }
    app.config.update(config)
    db.init_app(app)
    app.register_blueprint(pages)
    return app


if __name__ == "__main__":
    with ExitStack() as stack:
        url = os.environ.get("DATABASE_URL")
        if url is None:
            from sqla_queries_pool.demo.embedded import EmbeddedPostgres

            url = stack.enter_context(EmbeddedPostgres()).url()
        app = create_app(url)
        with app.app_context():
            db.create_all()
        app.run(port=int(os.environ.get("PORT", "5000")))
