"""The command line: ``python -m sqla_queries_pool demo``, or ``monitor``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import closing

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""
PORT = 8765
"""Where the monitor of the demo is served."""
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
    monitor = commands.add_parser(
        "monitor",
        help="look at pools, live, in a browser or in the terminal",
        description="Look at pools, live: serve a page with those of a demonstration, or show these, or "
        "those of a monitor that is served elsewhere, in the terminal.",
    )
    monitor.add_argument("--demo", action="store_true", help="a shop at work on a PostgreSQL, to look at")
    monitor.add_argument(
        "--database",
        metavar="URL",
        help="the demo's database (default: DATABASE_URL, else a PostgreSQL of the demo's own)",
    )
    monitor.add_argument(
        "--port", type=_port, default=PORT, help=f"serve at this port of 127.0.0.1 ({PORT}; 0: any)"
    )
    monitor.add_argument("--text", action="store_true", help="show it in the terminal")
    monitor.add_argument("--url", help="with --text: the address of a monitor's page")
    monitor.add_argument("--once", action="store_true", help="with --text: once, not again each second")
    monitor.set_defaults(command=_monitor)
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: write a port, 0 to 65535")
    return int(text)


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


def _monitor(chosen: argparse.Namespace) -> None:
    if chosen.url and (chosen.demo or not chosen.text):
        raise _Usage("--url goes with --text, and without --demo")
    if not chosen.demo and not chosen.url:
        raise _Usage("write --demo, for something to look at here, or --text --url for a monitor elsewhere")
    if chosen.text or sys.stderr.isatty():
        _need("rich")
    from .demo.server import DemoError
    from .monitor import demo, text

    try:
        if chosen.url:
            text.show(text.there(chosen.url), chosen.once)
        elif chosen.text:
            with demo.shop(chosen.database):
                text.show(text.here(), chosen.once)
        else:
            demo.serve(chosen.port, chosen.database)
    except (DemoError, text.MonitorError) as error:
        raise _Usage(error) from None


def _need(module: str) -> None:
    """See that a package of the extra is there, before the work begins."""
    if importlib.util.find_spec(module) is None:
        raise _Usage(f"this needs {module}: {EXTRA}")


if __name__ == "__main__":
    sys.exit(main())
