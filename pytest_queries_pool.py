"""Fail the tests that leak connections: the part that pytest loads in each run (entry point ``pytest11``).

It stands beside the package, because importing that imports SQLAlchemy. A run that has nothing to do with
it must not pay for that.  The rest, ``sqla_queries_pool.pytest_plugin``, is imported when it is switched on.
"""

from __future__ import annotations

import pytest

NAME = "connection_leaks"
"""The ini option and the marker; the option of the command line has hyphens."""
_HELP = "fail each test that leaves a connection of a QueriesPool checked out, or in a transaction"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How it is switched on for all tests."""
    parser.getgroup("sqla_queries_pool").addoption("--connection-leaks", action="store_true", help=_HELP)
    parser.addini(NAME, _HELP, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Watch from here on, where all tests are to be watched."""
    config.addinivalue_line("markers", f"{NAME}(on=True): {_HELP}; with False, don't.")
    if config.getoption("--connection-leaks") or config.getini(NAME):
        _watch(config, True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Watch from here on, where a test has the marker."""
    if any(item.get_closest_marker(NAME) for item in items):
        _watch(config, False)


def _watch(config: pytest.Config, all_tests: bool) -> None:
    if not config.pluginmanager.has_plugin(NAME):
        from sqla_queries_pool.pytest_plugin import LeakCheck

        config.pluginmanager.register(LeakCheck(config, NAME, all_tests), NAME)
