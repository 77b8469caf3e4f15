"""The demo's database: its URL, its limits, and the number of our connections."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeAlias

from sqlalchemy import create_engine, exc, make_url
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import NullPool, PoolProxiedConnection

from .embedded import EmbeddedPostgres, EmbeddedPostgresError

DRIVERS = ("psycopg2", "psycopg")
CONNECT_TIMEOUT = 10
"""Seconds, if the URL does not say."""
INTERVAL = 0.01
"""Seconds between two queries of the server. A connection that is open for a shorter time may go unseen."""
GONE_WITHIN = 5.0
"""Seconds for which the next measurement waits until connections are gone, at most."""
VARIABLE = "DATABASE_URL"
EXAMPLE = "postgresql://user:password@host:5432/database"


Say: TypeAlias = Callable[[str, float], None]
"""Called with the next step, and about how many seconds it takes."""


class DemoError(Exception):
    """An error that the user can correct. The text is one line, with the remedy and without secrets."""


def read_url(text: str) -> URL:
    """Return the URL of a PostgreSQL database.

    :raises DemoError: it is not one.
    """
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError):
        # SQLAlchemy's message may quote the text, and so the password.
        raise DemoError(f"this is not a database URL; write {EXAMPLE}") from None
    name, _, driver = url.drivername.partition("+")
    if name not in ("postgresql", "postgres"):  # the latter is libpq's, and what hosters hand out
        raise DemoError(f"the demo needs PostgreSQL, this is a URL for {name}; write {EXAMPLE}")
    if driver and driver not in DRIVERS:
        known = " or ".join(f"postgresql+{known}://" for known in DRIVERS)
        raise DemoError(f"the demo can't use the driver {driver}; write {known}")
    if "plugin" in url.query:
        raise DemoError("the demo makes the pools itself; leave plugin=… out of the URL")
    return url.set(drivername=f"postgresql+{driver or DRIVERS[0]}")


@contextmanager
def database(stated: str | None, say: Say) -> Iterator[URL]:
    """The database of ``--url`` or of the environment, else a server of our own for the duration.

    :raises DemoError: it is not PostgreSQL, or no PostgreSQL is installed to start.
    """
    source, text = ("--url", stated) if stated is not None else (VARIABLE, os.environ.get(VARIABLE))
    if stated is None and not text:
        with _embedded(say) as url:
            yield url
        return
    try:
        url = read_url(text or "")
    except DemoError as error:
        raise DemoError(f"{source}: {error}") from None
    yield url


@contextmanager
def _embedded(say: Say) -> Iterator[URL]:
    say("starting a PostgreSQL", 1.0)
    server = EmbeddedPostgres()
    try:
        server.start()
    except EmbeddedPostgresError as error:
        raise DemoError(f"{error}; or name a database: --url, or {VARIABLE}") from None
    try:
        yield read_url(server.url())
    finally:
        server.stop()


class Server:
    """One database, and an observer's connection to it.

    :param url: of the database, from :func:`read_url`.
    :raises DemoError: it can't be reached.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._run = f"sqla_queries_pool {secrets.token_hex(4)}"
        """Prefix of the ``application_name`` of this run's connections. Only these are counted."""
        self._engine = self.engine("observer", poolclass=NullPool)
        self._observer = self._connect()
        self._turn = threading.Lock()
        """A DBAPI connection runs one statement at a time."""

    def engine(self, name: str, **arguments: Any) -> Engine:
        """Make an engine whose connections are counted under ``name``.

        :raises DemoError: its driver is not installed.
        """
        options = {"application_name": f"{self._run} {name}"}
        if "connect_timeout" not in self._url.query:
            options["connect_timeout"] = str(CONNECT_TIMEOUT)
        try:
            return create_engine(self._url, connect_args=options, **arguments)
        except ImportError:
            name = self._url.get_driver_name()
            remedy = f"pip install {name}, or write postgresql+{DRIVERS[0]}://"
            raise DemoError(f"the driver {name} is not installed: {remedy}") from None

    def _connect(self) -> PoolProxiedConnection:
        try:
            observer = self._engine.raw_connection()
        except self.errors as error:
            raise DemoError(
                f"can't connect to {self}: {self.explain(error)}; is the server there, and are host, port, "
                "database, user and password right?"
            ) from None
        observer.dbapi_connection.autocommit = True  # type: ignore[union-attr]
        return observer

    def explain(self, error: BaseException) -> str:
        """The first line of a driver's error, without the password."""
        said = str(error).strip() or type(error).__name__
        line = said.splitlines()[0].strip()
        for secret in (self._url.password, *_texts(self._url.query.get("password"))):
            if secret:
                line = line.replace(str(secret), "***")
        return line

    def close(self) -> None:
        """Close the observer's connection."""
        with suppress(self.errors):
            self._observer.close()

    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """The rows of a statement, run on the observer's connection."""
        with self._turn, closing(self._observer.cursor()) as cursor:
            cursor.execute(sql, parameters)
            return list(cursor.fetchall())

    @property
    def errors(self) -> type[Exception]:
        """The driver's base exception. SQLAlchemy does not wrap the errors of pools and raw connections."""
        dbapi = self._engine.dialect.loaded_dbapi
        error: type[Exception] = dbapi.Error
        return error

    @property
    def driver(self) -> str:
        """The driver and its version."""
        dbapi = self._engine.dialect.loaded_dbapi
        return f"{dbapi.__name__} {dbapi.__version__.split()[0]}"

    @property
    def version(self) -> str:
        """The server's version."""
        return str(self.query("SHOW server_version")[0][0])

    def room(self) -> int:
        """How many more connections this user may open."""
        rows = self.query(
            "SELECT name, setting::int FROM pg_settings WHERE name IN "
            "('max_connections', 'superuser_reserved_connections', 'reserved_connections')"
        )
        settings: dict[str, int] = {name: int(value) for name, value in rows}
        limit = settings.pop("max_connections") - sum(settings.values())
        # Not from pg_stat_activity: only superusers see the backend_type of others there.
        everybody, here, mine, role, database = self.query(
            "SELECT sum(numbackends)::int, sum(numbackends) FILTER (WHERE datname = current_database())::int,"
            " (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user),"
            " (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user),"
            " (SELECT datconnlimit FROM pg_database WHERE datname = current_database())"
            " FROM pg_stat_database"
        )[0]
        rooms: list[int] = [limit - everybody]
        rooms += [role - mine] if role >= 0 else []
        rooms += [database - here] if database >= 0 else []
        return max(0, min(rooms))

    def connections(self) -> Counter[str]:
        """The number of connections of each name."""
        rows = self.query(
            "SELECT application_name, count(*) FROM pg_stat_activity "
            "WHERE starts_with(application_name, %s) GROUP BY 1",
            f"{self._run} ",
        )
        return Counter({name.removeprefix(f"{self._run} "): int(count) for name, count in rows})

    def wait_until_gone(self, name: str) -> None:
        """Wait until the server has closed all of a name, so that the next measurement starts alone."""
        deadline = time.monotonic() + GONE_WITHIN
        while self.connections()[name] and time.monotonic() < deadline:
            time.sleep(INTERVAL)

    @contextmanager
    def watch(self, name: str) -> Iterator[Peak]:
        """Query the server all the time, and remember the most connections of a name."""
        peak = Peak(lambda: self.connections()[name])
        thread = threading.Thread(target=peak.watch, name="observer", daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            peak.end.set()
            thread.join()
        if peak.error is not None:
            raise peak.error

    def __str__(self) -> str:
        url = self._url
        user = f"{url.username}@" if url.username else ""
        port = f":{url.port}" if url.port else ""
        return f"postgresql://{user}{url.host or ''}{port}/{url.database or ''}"


class Peak:
    """The most connections ever seen."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self.most = 0
        self.looks = 0
        """How often the server was asked."""
        self.end = threading.Event()
        self.error: Exception | None = None
        """The error that ended it early."""

    def watch(self) -> None:
        """Query the server until ``end`` is set."""
        try:
            while not self.end.wait(INTERVAL):
                self.most = max(self.most, self._count())
                self.looks += 1
        except Exception as error:
            self.error = error


def _texts(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()
