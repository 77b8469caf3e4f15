"""gevent: greenlets in place of threads, on psycopg2 with psycogreen's callback, on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sqla_queries_pool

pytest.importorskip("gevent", reason="greenlets that are scheduled")
pytest.importorskip("psycogreen", reason="psycopg2 waits in gevent's loop with it")

ROOT = Path(sqla_queries_pool.__file__).parent.parent
START = """
import gevent.monkey
gevent.monkey.patch_all()
import psycogreen.gevent
psycogreen.gevent.patch_psycopg()

import json, os
import gevent
from sqlalchemy import create_engine, text
from sqla_queries_pool import CheckoutTimeout, QueriesPool, labelled

URL = os.environ["DATABASE_URL"]
"""


def run(program: str, url: str) -> Any:
    """What a program prints, in a process of its own: the patches of gevent are for ever."""
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-c", START + program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout + ended.stderr
    return json.loads(ended.stdout)


MANY = """
GREENLETS, CONNECTIONS, ROUNDS = 50, 5, 4
engine = create_engine(URL, poolclass=QueriesPool, max_size=CONNECTIONS, pool_timeout=60)
order = []

def client(number):
    for round in range(ROUNDS):
        with engine.connect() as connection:
            order.append(number)
            backends.add(connection.scalar(text("SELECT pg_backend_pid() FROM pg_sleep(0.005)")))

def heartbeat():
    "A greenlet that has no use for the database."
    while True:
        beats.append(engine.pool.statistics().waiting)
        gevent.sleep(0)

backends, beats = set(), []
beating = gevent.spawn(heartbeat)
clients = [gevent.spawn(client, number) for number in range(GREENLETS)]
gevent.joinall(clients, timeout=60, raise_error=True)
beating.kill()
now = engine.pool.statistics()
print(json.dumps({
    "done": sum(each.successful() for each in clients),
    "order": order,
    "backends": len(backends),
    "waiting": max(beats),
    "timeouts": now.timeouts,
    "held": now.held,
    "peak_held": now.peak_held,
    "audit": [str(mended) for mended in engine.pool.audit().mended],
}))
engine.dispose()
"""


@pytest.mark.slow
def test_fifty_greenlets_on_five_connections_are_all_served_in_order(pg_url: str) -> None:
    """Nobody is two rounds ahead of another: those whose turn it is go on as the server answers them.
    Meanwhile the loop runs: another greenlet saw those who waited."""
    found = run(MANY, pg_url)
    served = Counter(dict.fromkeys(range(50), 0))
    for greenlet in found.pop("order"):
        served[greenlet] += 1
        assert max(served.values()) - min(served.values()) <= 2
    assert set(served.values()) == {4}
    assert found == {
        "done": 50,
        "backends": 5,
        "waiting": 45,
        "timeouts": 0,
        "held": 0,
        "peak_held": 5,
        "audit": [],
    }


TIMEOUT = """
from gevent.event import Event

engine = create_engine(URL, poolclass=QueriesPool, max_size=1, pool_timeout=0.1)
got, go = Event(), Event()

def hold():
    with labelled("report"), engine.connect():
        got.set()
        go.wait()

holder = gevent.spawn(hold)
got.wait()
try:
    engine.connect()
except CheckoutTimeout as error:
    said = [(holder.label, holder.state) for holder in error.snapshot.holders]
go.set()
holder.get()
with engine.connect() as connection:
    print(json.dumps([said, connection.scalar(text("SELECT 1"))]))
engine.dispose()
"""


def test_a_greenlet_that_gets_no_connection_is_told_who_has_it_and_the_next_gets_one(pg_url: str) -> None:
    """After its timeout, while the other greenlet runs. Labels follow greenlets; names are numbers."""
    assert run(TIMEOUT, pg_url) == [[["report", "held"]], 1]
