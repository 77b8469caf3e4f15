"""``python -m sqla_queries_pool explain URL``: which pool a URL leads to, without connecting."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import create_engine

from sqla_queries_pool import QueriesPool
from sqla_queries_pool.__main__ import main
from sqla_queries_pool.engine.settings import NAMES

URL = "postgresql+psycopg2://scott:ti%2Fger@nothing.invalid/shop"
NOT_SHOWN = {"max_size", "pool_size", "max_overflow", "pool_id"}
"""Shown as the limit, and as the pool id."""
NOT_OURS = {"pool_reset_on_return", "pool_logging_name", "echo_pool"}


def explained(capsys: pytest.CaptureFixture[str], url: str) -> tuple[dict[str, str], str]:
    """What it prints: the table, and all of it."""
    assert main(["explain", url]) == 0
    out = capsys.readouterr().out
    return dict(line.split(None, 1) for line in out.replace("pool id", "pool_id").splitlines()), out


def test_identity_limit_and_settings_of_a_url_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As they are for an engine of this URL; nothing of the password."""
    url = f"{URL}?plugin=queries&pool_size=3&max_overflow=4&idle_ttl=5&pool_pre_ping=true&pool_timeout=none"
    rows, out = explained(capsys, url)
    pool: Any = create_engine(url).pool
    assert (rows["database"], rows["pool_id"]) == ("postgresql://scott@nothing.invalid:5432/shop", pool.pid)
    assert (rows["limit"], rows["idle_ttl"], rows["pool_pre_ping"]) == ("7", "5.0", "True")
    assert (rows["pool_timeout"], rows["min_size"]) == ("None", "0 (the default)")
    assert set(rows) == ({*NAMES} - NOT_SHOWN - NOT_OURS) | {"database", "pool_id", "limit"}
    assert "ger" not in out


def test_a_url_without_the_plugin_is_explained_too(capsys: pytest.CaptureFixture[str]) -> None:
    """With a word about what chooses the pool."""
    url = URL.replace("shop", "other")
    rows, out = explained(capsys, url)
    assert rows["limit"] == "15 (the default)"
    assert rows["pool_id"] == create_engine(url, poolclass=QueriesPool).pool.pid  # type: ignore[attr-defined]
    assert "The URL does not choose this pool: add plugin=queries" in out


def test_what_is_private_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Its pool id is another one next time."""
    rows, out = explained(capsys, "sqlite://?plugin=queries&max_size=5")
    assert (rows["database"], rows["limit"]) == ("sqlite://", "1")
    assert "shares its limit with no other" in out
    assert "in memory, so idle_ttl and ping_after do not apply" in out


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("scott:ti%2Fger@nothing", "this is not a database URL"),
        ("postgresql://scott:ti%2Fger@nothing:port/shop", "this is not a database URL"),
        (f"{URL}?plugin=queries&max_sise=5", "did you mean max_size"),
        (f"{URL}?plugin=queries&max_size=zwei", "max_size='zwei' is not valid"),
        ("nosuch+driver://scott:ti%2Fger@nothing/shop", "Can't load plugin"),
        ("oracle+cx_oracle://scott:ti%2Fger@nothing/shop", "the driver is not installed"),
    ],
)
def test_a_url_that_is_not_taken_is_an_error_without_the_password(
    capsys: pytest.CaptureFixture[str], url: str, what: str
) -> None:
    """Exit status 2, and one line."""
    assert main(["explain", url]) == 2
    ended = capsys.readouterr()
    assert what in ended.err
    assert not ended.out
    assert "ger" not in ended.err
    assert len(ended.err.splitlines()) == 1


QUIET = ("-W", "error", "-W", "ignore:datetime.datetime.utcfrom")
COMMAND = (sys.executable, *QUIET, "-m", "sqla_queries_pool", "explain", "sqlite:////tmp/some.db")


def test_it_is_a_command() -> None:
    """In a process of its own, where nothing is installed but the library."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    assert "sqlite:///tmp/some.db" in done.stdout


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """As ``head``: the status of a program that SIGPIPE ends, and no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            COMMAND, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (141, "")
