from __future__ import annotations

from contextlib import closing

import psycopg2
import pytest
from conftest import Databases, Observer, SessionServer
from sqlalchemy import make_url

WRITES = {
    "a table": "CREATE TABLE a (b int)",
    "a table that was rolled back": "BEGIN; CREATE TABLE a (b int); ROLLBACK",
    "a temporary table": "CREATE TEMPORARY TABLE a (b int)",
    "a large object": "SELECT lo_create(0)",
    "a privilege": "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO public",
    "a setting": "ALTER DATABASE {} SET work_mem = '1MB'",
    "a limit": "ALTER DATABASE {} CONNECTION LIMIT 5",
}
READS = {
    "a query": "SELECT count(*) FROM pg_class",
    "a setting of the session": "SET work_mem = '1MB'",
    "a lock": "SELECT pg_advisory_lock(1)",
}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left open"])
@pytest.mark.parametrize("what", [*WRITES, *READS])
def test_a_database_that_was_written_in_is_no_other_test_s(
    what: str, closed: bool, pg_server: SessionServer, pg_databases: Databases, pg_observer: Observer
) -> None:
    """`pg_url` gives each test an empty one: of those before, one in which nothing was written, renamed."""
    name = pg_databases.take()
    [[oid]] = pg_observer.query("SELECT oid FROM pg_database WHERE datname = %s", name)
    url = make_url(pg_server.url(database=name)).set(drivername="postgresql")
    with closing(psycopg2.connect(url.render_as_string(hide_password=False))) as connection:
        connection.autocommit = True
        for statement in (WRITES | READS)[what].format(name).split(";"):
            connection.cursor().execute(statement)
        if closed:
            connection.close()
        pg_databases.give_back(name)
    left = pg_observer.query("SELECT datname FROM pg_database WHERE oid = %s", oid)
    assert len(left) == (what in READS)
    assert (name,) not in left
