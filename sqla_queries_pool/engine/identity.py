"""Which database is it?  The pool id of an engine, and what people call it.

A pool never sees the URL: ``create_engine`` hands it a creator.  The connect arguments of the engine's
own creator can be had without connecting: see :func:`~sqla_queries_pool.engine.seams.connect_arguments`.

The id is a digest of what the database *is*: backend, hosts and ports, database, user.  The password
is not in it, so rotating one keeps the pool, and the id gives nobody anything to guess it with;
neither is the driver, so that two drivers share one budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from ..logs import logger
from . import seams

_SAME = {"mysql": "mysql", "mariadb": "mysql"}
"""SQLAlchemy's names for one kind of server."""
_STANDBYS = ("standby", "read-only", "prefer-standby")
"""Values of ``target_session_attrs`` that lead to other servers than the rest."""


class Identity(NamedTuple):
    """Which pool an engine uses."""

    pid: str
    """The pool id."""
    label: str
    """For people: backend, user, host, port and database; never a password."""
    private: bool
    """Can no other engine have the same?"""
    in_memory: bool = False
    """A database that lives and dies with its connections."""
    alone: bool = False
    """A second connection would be a second, empty database."""


def private(label: str, in_memory: bool = False, alone: bool = False) -> Identity:
    """An identity that is shared with nobody."""
    return Identity(f"private-{uuid.uuid4().hex}", label, True, in_memory, alone)


def of_engine(creator: Any, dialect: Any, pool_id: str | None = None) -> Identity:
    """Find out what an engine connects to, without connecting.

    :param creator: what ``create_engine`` hands to a pool class; one of the user's own makes the identity
        private.
    :param dialect: the engine's dialect, None for a pool without an engine.
    :param pool_id: the id that the user states.  It wins, unless the database is in memory: in a pool with
        others, its last connection would give way one day, and the database with it.
    """
    arguments = seams.connect_arguments(creator, dialect)
    found = None if arguments is None else of_arguments(dialect.name, *arguments)
    if found is not None and found.in_memory:
        return found
    if pool_id is not None:
        return Identity(pool_id, pool_id, private=False)
    if found is not None:
        return found
    if dialect is None or not seams.made_by_engine(creator):
        return private("custom creator")
    # No Python warning: with a driver of a test's own all is well, and warnings may be errors there.
    logger.warning(
        "QueriesPool can't tell which %s database this engine connects to, so the engine shares no limit "
        "with others. Pass the same pool_id='…' to all engines that are to share one",
        dialect.name,
    )
    return private(dialect.name)


def of_arguments(backend: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Identity | None:
    """Return the identity behind the arguments of a DBAPI's ``connect``, None if it can't be told."""
    if backend == "sqlite":
        return _of_sqlite(arguments, options)
    options = dict(options)
    if backend == "postgresql":
        for dsn in [*arguments, options.pop("dsn", None), options.pop("conninfo", None)]:
            if isinstance(dsn, str) and dsn:
                # As the drivers do: keywords win over what the string says.
                options = {**_parse_dsn(dsn), **options}
        return _of_postgresql(options)
    if backend in _SAME and not any(arguments):
        return _of_mysql(backend, options)
    database = _first(options, "database", "dbname", "db", "service_name", "sid")
    host = _first(options, "host", "hostname", "server")
    if any(arguments) or (host is None and database is None):
        return None
    user = _first(options, "user", "username")
    port = _first(options, "port")
    return _identity(backend, [(_text(host).lower(), _text(port))], _text(database), _text(user))


def _of_sqlite(arguments: Sequence[Any], options: Mapping[str, Any]) -> Identity:
    """SQLite's rules: https://www.sqlite.org/uri.html and https://www.sqlite.org/inmemorydb.html

    A URI's parameters are neither in the id nor in the label: one of them may be a key.
    """
    file = _text(arguments[0] if arguments else options.get("database"))
    parameters: dict[str, str] = {}
    if options.get("uri") and file.startswith("file:"):
        where, _, query = file.removeprefix("file:").partition("#")[0].partition("?")
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        if where.startswith("//"):  # the authority, which is empty or localhost
            where = "/" + where[2:].partition("/")[2]
        file = unquote(where)
    memdb = parameters.get("vfs") == "memdb"
    if file in ("", ":memory:") or memdb or parameters.get("mode") == "memory":
        shared = bool(file) and parameters.get("cache") == "shared" and not memdb
        label = f"sqlite:///{file} (shared memory)" if shared else "sqlite://"
        return private(label, in_memory=True, alone=not shared)
    return _identity("sqlite", [], os.path.abspath(file), "")


def _of_postgresql(options: Mapping[str, Any]) -> Identity:
    """libpq's rules and defaults: https://www.postgresql.org/docs/current/libpq-connect.html"""
    service = _first(options, "service") or os.environ.get("PGSERVICE", "")
    user = _text(_first(options, "user") or os.environ.get("PGUSER") or _os_user())
    database = _first(options, "dbname", "database") or os.environ.get("PGDATABASE") or user
    env = os.environ.get
    host = _first(options, "hostaddr") or env("PGHOSTADDR") or _first(options, "host") or env("PGHOST", "")
    port = _first(options, "port") or os.environ.get("PGPORT", "")
    hosts = [h.strip() if h.startswith("/") else h.strip().lower() for h in _text(host).split(",")]
    ports = [p.strip() or "5432" for p in _text(port).split(",")]
    if len(ports) == 1:
        ports *= len(hosts)
    session = _first(options, "target_session_attrs") or env("PGTARGETSESSIONATTRS", "")
    more = [f"service {service}"] if service else []
    # The primary is one of them, and that is where the others lead that say nothing, or "any".
    if _text(getattr(session, "value", session)) in _STANDBYS:  # asyncpg has an enumeration
        more.append("standby")
    return _identity(
        "postgresql", list(zip(hosts, ports, strict=False)), _text(database), user, ", ".join(more)
    )


def _of_mysql(backend: str, options: Mapping[str, Any]) -> Identity | None:
    """The drivers' rules: a socket wins over a host, and a file of options fills in what is not said.

    https://dev.mysql.com/doc/c-api/8.4/en/mysql-real-connect.html; each driver names the file in its own way.
    """
    socket, host = _text(_first(options, "unix_socket")), _text(_first(options, "host")).lower()
    database = _text(_first(options, "database", "db"))
    stated = _text(_first(options, "read_default_file", "default_file", "option_files"))
    groups = _text(_first(options, "read_default_group", "default_group", "option_groups"))
    files = [os.path.abspath(os.path.expanduser(file)) for file in stated.split(",") if file]
    if not (socket or host or database or files):
        return None
    port = _text(_first(options, "port"))
    if not (files or groups):  # else what is not said may be said there
        host, port = host or "localhost", port or "3306"
    more = [f"options of {','.join(files)}"] if files else []
    more += [f"group {groups}"] if groups else []
    where = (socket, "") if socket else (host, port)
    return _identity(backend, [where], database, _text(_first(options, "user", "username")), ", ".join(more))


def _identity(
    backend: str, hosts: list[tuple[str, str]], database: str, user: str, more: str = ""
) -> Identity:
    # Hosts in any order: all of a list are one cluster, whichever is tried first.
    canonical = json.dumps([_SAME.get(backend, backend), sorted(hosts), database, user, more])
    where = ",".join(_host_and_port(host, port) for host, port in hosts)
    who = f"{user}@" if user else ""
    label = f"{backend}://{who}{where}/{database.lstrip('/')}" + (f" ({more})" if more else "")
    return Identity(hashlib.sha256(canonical.encode()).hexdigest()[:32], label, private=False)


def _host_and_port(host: str, port: str) -> str:
    bracketed = f"[{host}]" if ":" in host or "/" in host else host
    return f"{bracketed}:{port}" if port else bracketed


def _parse_dsn(dsn: str) -> dict[str, str]:
    from psycopg2.extensions import parse_dsn

    try:
        parsed: dict[str, str] = parse_dsn(dsn)
    except Exception:  # the driver will say what is wrong with it, when it connects
        return {}
    return parsed


def _os_user() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return os.environ.get("USERNAME", "")


def _first(options: Mapping[str, Any], *names: str) -> Any:
    return next((options[name] for name in names if options.get(name) not in (None, "", [])), None)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):  # asyncpg takes several hosts and ports so, libpq with commas
        return ",".join(map(_text, value))
    return "" if value is None else str(value)
