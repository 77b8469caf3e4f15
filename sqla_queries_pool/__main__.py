"""The command line: ``python -m sqla_queries_pool demo``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import closing

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""
LONGEST = 3600
"""Seconds that a load may be measured."""
EXTRA = 'pip install "sqla-queries-pool[demo]"'


class _Usage(Exception):
    """What the user can mend: the text says how, without secrets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 2 where the user can mend it."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.command(chosen)
    except _Usage as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sqla_queries_pool",
        description="QueriesPool: a SQLAlchemy connection pool whose limit belongs to the database.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="measure what QueriesPool does, beside QueuePool",
        description="Measure what QueriesPool does, beside QueuePool, on a PostgreSQL. Takes half a minute, "
        "creates nothing in the database, opens some 25 connections.",
    )
    demo.add_argument(
        "--url",
        help="the database, postgresql://user:password@host:port/database (default: what the environment "
        "variable DATABASE_URL says, else a PostgreSQL of the demo's own)",
    )
    demo.add_argument("--json", action="store_true", help="print JSON in place of a table")
    demo.add_argument("--seconds", type=_seconds, metavar="S", help="measure each load for S seconds (4)")
    demo.set_defaults(command=_demo)
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of seconds, {LONGEST} at most")
    return seconds


def _demo(chosen: argparse.Namespace) -> None:
    # Here, for other commands do without: what they import is none of the library's own.
    from .demo import run, show
    from .demo.server import DemoError, Server, database

    if not chosen.json or sys.stderr.isatty():
        _need("rich")
    parameters = run.Parameters() if chosen.seconds is None else run.Parameters(seconds=chosen.seconds)
    try:
        with show.progress() as say, database(chosen.url, say) as url, closing(Server(url)) as server:
            facts = run.demonstrate(server, parameters, say)
    except DemoError as error:
        raise _Usage(error) from None
    (show.as_json if chosen.json else show.as_table)(facts)


def _need(module: str) -> None:
    """See that a package of the extra is there, before the work begins."""
    if importlib.util.find_spec(module) is None:
        raise _Usage(f"the demo needs {module}: {EXTRA}")


if __name__ == "__main__":
    sys.exit(main())
