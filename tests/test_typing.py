"""What a type checker says of an application: ``mypy --config-file tests/mypy.ini`` reads this file.

An error that does not come is one as well, "unused type: ignore".
"""

from __future__ import annotations

from sqlalchemy import create_engine

from sqla_queries_pool import QueriesPool, QueriesPoolOptions

right: QueriesPoolOptions = {"max_size": 10, "idle_ttl": 2.5, "pool_timeout": None, "pool_pre_ping": True}
misspelt: QueriesPoolOptions = {"max_sise": 10}  # type: ignore[typeddict-unknown-key]
wrong_type: QueriesPoolOptions = {"max_size": "ten"}  # type: ignore[typeddict-item]
the_pools_own_name: QueriesPoolOptions = {"timeout": 5}  # type: ignore[typeddict-unknown-key]


def test_what_has_the_right_types_makes_an_engine() -> None:
    """``create_engine`` itself takes any keyword; the ``TypedDict`` says which there are."""
    engine = create_engine("postgresql+psycopg2://host/shop", poolclass=QueriesPool, **right)
    assert isinstance(engine.pool, QueriesPool)
    assert engine.pool.size() == 10
