"""What a type checker says of an application that uses the pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sqla_queries_pool

PROGRAM = """
from sqlalchemy import create_engine
from sqla_queries_pool import QueriesPool, QueriesPoolOptions

right: QueriesPoolOptions = {"max_size": 10, "idle_ttl": 2.5, "pool_timeout": None, "pool_pre_ping": True}
engine = create_engine("postgresql+psycopg2://host/shop", poolclass=QueriesPool, **right)
misspelt: QueriesPoolOptions = {"max_sise": 10}
wrong_type: QueriesPoolOptions = {"max_size": "ten"}
the_pools_own_name: QueriesPoolOptions = {"timeout": 5}
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    """``create_engine`` itself takes any keyword; the ``TypedDict`` says which there are."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(program)]
    # A checkout that is installed for editing is found by a hook that mypy does not know.
    where = os.environ | {"MYPYPATH": str(Path(sqla_queries_pool.__file__).parent.parent)}
    said = subprocess.run(
        mypy, capture_output=True, text=True, timeout=170, check=False, cwd=tmp_path, env=where
    ).stdout
    errors = [line.partition(": error: ")[2] for line in said.splitlines() if ": error: " in line]
    assert [error.partition("  [")[0] for error in errors] == [
        'Extra key "max_sise" for TypedDict "QueriesPoolOptions"',
        'Incompatible types (expression has type "str", TypedDict item "max_size" has type "int | None")',
        'Extra key "timeout" for TypedDict "QueriesPoolOptions"',
    ]
