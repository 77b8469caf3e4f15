"""SQLAlchemy's own tests of pools, engines, transactions and asyncio, with QueriesPool for its pools."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy
from once import once
from sqlalchemy import make_url
from test_contract import VERSION

import sqla_queries_pool

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

PLUGIN = Path(__file__).with_name("swapped_pools.py")
CANCELLATION = ["test/ext/asyncio/test_cancellation.py"]
OTHERS = [f"test/ext/asyncio/test_{name}.py" for name in ("engine", "scoping", "session")]
RECONNECT = ["test/engine/test_reconnect.py"]
ENGINE = [f"test/engine/test_{name}.py" for name in ("execute", "logging", "parseconnect", "transaction")]
RUNS = {
    "pool": ("sqlite", ["test/engine/test_pool.py"]),
    "engine": ("a file", ENGINE),
    "psycopg2": ("psycopg2", ENGINE + RECONNECT),
    # Apart from the others: its engines state pool_size=1, which is the limit of all engines of the database.
    "asyncpg, cancellation": ("asyncpg", CANCELLATION),
    "asyncpg": ("asyncpg", OTHERS + RECONNECT),
    "psycopg, cancellation": ("psycopg_async", CANCELLATION),
    "psycopg": ("psycopg_async", OTHERS + RECONNECT),
}
"""Driver, and what is run with it."""
NOT_OURS = "test/engine/test_parseconnect.py::CreateEngineTest::test_default_driver"
"""Imports all drivers that are installed, and fails where one lacks its library."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """SQLAlchemy's source distribution, unpacked, of the installed version; once for all processes."""
    folder = once(tmp_path_factory, worker_id, "sqlalchemy", _download)
    found = [path for path in folder.iterdir() if path.is_dir()]
    if not found:
        pytest.skip("pip can't get its source, or it is too old: the first of these tests says which")
    return found[0]


def _download(folder: Path) -> None:
    version = sqlalchemy.__version__
    if VERSION < (2, 0, 58):
        pytest.skip("what is expected to fail is known for SQLAlchemy 2.0.58 and later")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "sqlalchemy"]
    done = subprocess.run(
        [*command, "-d", str(folder), f"sqlalchemy=={version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip can't get SQLAlchemy {version}'s source: {done.stderr.strip()[-300:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    shutil.copy(PLUGIN, found / PLUGIN.name)


@pytest.fixture
def url(pg_url: str) -> str:
    """A database as SQLAlchemy's tests want it."""
    connection = psycopg2.connect(make_url(pg_url).set(drivername="postgresql").render_as_string(False))
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE SCHEMA test_schema")
    connection.close()
    return pg_url


@pytest.mark.parametrize("run", RUNS)
def test_sqlalchemys_own_tests_pass(source: Path, url: str, tmp_path: Path, run: str) -> None:
    """Or fail as expected: see ``swapped_pools.py``."""
    driver, files = RUNS[run]
    files = [file for file in files if (source / file).exists()]
    if not files:
        pytest.skip("this SQLAlchemy has no such tests")
    faulthandler.cancel_dump_traceback_later()  # it takes minutes, and has a timeout below
    dburi = make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(False)
    if driver == "sqlite":
        dburi = "sqlite://"
    elif driver == "a file":
        dburi = f"sqlite:///{tmp_path}/own.db"
    package = Path(sqla_queries_pool.__file__).parent.parent
    options = ["-p", PLUGIN.stem, "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=short", "-rfE"]
    options += ["--deselect", NOT_OURS]
    done = subprocess.run(
        # -s: the SQLAlchemy that is installed, not the source's
        [sys.executable, "-s", "-m", "pytest", *options, "--dburi", dburi, *files],
        cwd=source,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(package)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
