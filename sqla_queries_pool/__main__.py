"""The command line: ``python -m sqla_queries_pool demo``, ``monitor``, ``host`` or ``explain``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import closing

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""
NOT_READ = 141
"""The exit status where nobody reads what is printed: 128 and the number of SIGPIPE."""
PORT = 8765
"""Where the monitor of the demo is served."""
LONGEST = 3600
"""Seconds that a load may be measured."""
EXTRA = 'pip install "sqla-queries-pool[demo]"'


class _Usage(Exception):
    """What the user can fix: the text says how, without secrets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 2 where the user can fix the problem."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.command(chosen)
        sys.stdout.flush()
    except BrokenPipeError:
        # `… | head` has read enough.  What is still buffered goes nowhere, or the interpreter would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_READ
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
        help="compare QueriesPool with QueuePool",
        description="Compare QueriesPool with QueuePool on a PostgreSQL server. This takes half a minute, "
        "opens about 25 connections and creates nothing in the database.",
    )
    demo.add_argument(
        "--url",
        help="the database, postgresql://user:password@host:port/database (default: the environment variable "
        "DATABASE_URL; without it the demo starts a PostgreSQL server of its own)",
    )
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo.add_argument("--seconds", type=_seconds, metavar="S", help="measure each load for S seconds (4)")
    demo.set_defaults(command=_demo)
    monitor = commands.add_parser(
        "monitor",
        help="show pools live, in a browser or in the terminal",
        description="Show pools live. With --demo: a page with the pools of a demonstration, or the same in "
        "the terminal (--text). With --text --url: the pools of a monitor that another process serves.",
    )
    monitor.add_argument("--demo", action="store_true", help="demonstrate it: a small shop on PostgreSQL")
    monitor.add_argument(
        "--database",
        metavar="URL",
        help="the demo's database (default: DATABASE_URL; without it the demo starts a PostgreSQL server)",
    )
    monitor.add_argument(
        "--port", type=_port, default=PORT, help=f"the port on 127.0.0.1 (default: {PORT}; 0: any free port)"
    )
    monitor.add_argument("--text", action="store_true", help="show the pools in the terminal")
    monitor.add_argument("--url", help="with --text: the address of a monitor's page")
    monitor.add_argument("--once", action="store_true", help="with --text: show them once, then exit")
    monitor.set_defaults(command=_monitor)
    host = commands.add_parser(
        "host",
        help="list the budgets that processes of this host share",
        description='List the budgets that processes of this host share (share="host"), and who has what. It '
        "shows those of this user; root sees all.",
    )
    host.add_argument(
        "--share", metavar="PATH", default="host", help='the folder, where engines state one: share="/path"'
    )
    host.set_defaults(command=_host)
    explain = commands.add_parser(
        "explain",
        help="show which pool a URL leads to",
        description="Show which pool an engine of a URL uses, its limit and its settings. Nothing connects. "
        "The environment counts as it does for the driver (PGHOST and others).",
    )
    explain.add_argument(
        "url", help="as create_engine takes it; with plugin=queries it may have the pool's parameters"
    )
    explain.set_defaults(command=_explain)
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: write a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of seconds above 0, {LONGEST} at most")
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
        raise _Usage("--url needs --text, and can't be used with --demo")
    if not chosen.demo and not chosen.url:
        raise _Usage("write --demo for a demonstration, or --text --url=… for the monitor of another process")
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


def _host(chosen: argparse.Namespace) -> None:
    from .host.lease import base_of, folders_of
    from .host.visit import visit

    shown = 0
    for path in folders_of(chosen.share):
        try:
            found, silent = visit(path)
        except OSError:
            continue  # another user's
        if found or silent:
            shown += 1
            label = found[0].database if found else path
            print(
                f"{label}: {sum(here.have for here in found)} of {max([0, *(h.budget for h in found)])} taken"
            )
            for here in found:
                waiting = f", {here.waiting} waiting" if here.waiting else ""
                print(f"  process {here.process} ({here.program}) {here.have}{waiting}")
            if silent:
                print(f"  {silent} more did not answer")
    if not shown:
        print(f"No process that this user may see shares a budget below {base_of(chosen.share)}")


def _explain(chosen: argparse.Namespace) -> None:
    from .explain import UrlError, explain

    try:
        print(explain(chosen.url))
    except UrlError as error:
        raise _Usage(error) from None


def _need(module: str) -> None:
    """Check that a package of the extra is installed, before the work begins."""
    if importlib.util.find_spec(module) is None:
        raise _Usage(f"this command needs {module}: {EXTRA}")


if __name__ == "__main__":
    sys.exit(main())
