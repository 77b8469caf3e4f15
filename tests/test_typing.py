"""What a type checker says of an application that uses the pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from sqlalchemy import create_engine
from sqla_queries_pool import QueriesPool, QueriesPoolOptions

options: QueriesPoolOptions = {{{options}}}
engine = create_engine("postgresql+psycopg2://host/shop", poolclass=QueriesPool, **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ('"max_size": 10, "idle_ttl": 2.5, "pool_timeout": None, "pool_pre_ping": True', None),
        ('"max_sise": 10', 'Extra key "max_sise" for TypedDict "QueriesPoolOptions"'),
        ('"max_size": "ten"', 'Incompatible types (expression has type "str"'),
        ('"timeout": 5', 'Extra key "timeout"'),
    ],
    ids=["right", "misspelt", "wrong type", "the pool's own name"],
)
def test_a_type_checker_knows_the_options(tmp_path: Path, options: str, error: str | None) -> None:
    """``create_engine`` itself takes any keyword; the ``TypedDict`` says which there are."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(options=options), encoding="utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(program)]
    said = subprocess.run(mypy, capture_output=True, text=True, timeout=170, check=False, cwd=tmp_path)
    assert (said.returncode == 0) == (error is None), said.stdout
    assert error is None or error in said.stdout
