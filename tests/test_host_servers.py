"""One budget for all processes of real servers: gunicorn, uvicorn, Celery, and multiprocessing.

The role may have no more connections than the budget, so one too many would be refused.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Observer, SessionServer
from hazards import Thread, free_port
from hosts import Host
from sqlalchemy import NullPool, create_engine, text
from test_examples import ROOT, Program, arguments, ask, documented, load, run_to_its_end, wait_for

from sqla_queries_pool.host import lease

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not lease.AVAILABLE, reason="there are no flock and Unix sockets"),
]

Eventually = Callable[..., None]
BUDGET = 3
PROCESSES = 3
"""Of those that serve; what has started them has the application, too, where it is preloaded or forked."""
ROUNDS = 20
"""How often the load is put up at most, until all processes have had their share."""

APP = """
import json
import os
from sqlalchemy import create_engine, text
from sqla_queries_pool import QueriesPool

engine = create_engine(os.environ["DATABASE_URL"], pool_timeout=30)

def use():
    "Have a connection for a while."
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_sleep(0.005)"))
    return os.getpid()

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(use()).encode()]

use()  # where it is preloaded, the parent does this, and has the connection idle
"""
TASKS = """
from celery.signals import worker_init
from celery_app import app, make_tables
from shared_app import use
worker_init.disconnect(make_tables)
use = app.task(use)
"""
ORDER = """
import json
import whole_files
from shared_tasks import use
results = [use.delay() for _ in range(30)]
print(json.dumps([result.get(timeout=60) for result in results]))
"""
MAIN = """
import json, multiprocessing, os, sys, time
import shared_app

def child(barrier, answers):
    barrier.wait(60)
    answers.put([shared_app.use() for _ in range(10)])
    while not os.path.exists(os.environ["GO_ON"]):  # the test looks how many connections there are
        time.sleep(0.01)
    barrier.wait(60)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    context.set_forkserver_preload(["shared_app"])
    barrier, answers = context.Barrier(int(sys.argv[2])), context.SimpleQueue()
    children = [context.Process(target=child, args=(barrier, answers)) for _ in range(int(sys.argv[2]))]
    for each in children:
        each.start()
    found = [pid for _ in children for pid in answers.get()]
    for each in children:
        each.join()
    assert [each.exitcode for each in children] == [0] * len(children)
    shared_app.use()
    print(json.dumps(found))
"""


@pytest.fixture
def host(pg_server: SessionServer, pg_observer: Observer, pg_url: str, tmp_path: Path) -> Iterator[Host]:
    """A role that may have three connections; its processes are started by others."""
    made = Host(pg_server, pg_observer, pg_url, tmp_path, BUDGET)
    made.watch()
    yield made
    made.end()


@pytest.fixture
def environment(host: Host, tmp_path: Path) -> dict[str, str]:
    """What the programs are told: the URL says all that there is to say."""
    for name, code in (("shared_app", APP), ("shared_tasks", TASKS), ("main", MAIN)):
        (tmp_path / f"{name}.py").write_text(code)
    query = {"plugin": "queries", "share": "host", "max_size": str(BUDGET)}
    shutil.copy(Path(__file__).with_name("whole_files.py"), tmp_path)
    return {
        **os.environ,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "default",
        "DATABASE_URL": host.url.update_query_dict(query).render_as_string(False),
        "XDG_RUNTIME_DIR": str(tmp_path),
        "CELERY_FOLDER": str(tmp_path / "celery"),
    }


def served_by_all(call: Callable[[], list[int]]) -> set[int]:
    """Call until all processes have served; who they are."""
    found: set[int] = set()
    for _ in range(ROUNDS):  # who gets how much is the kernel's choice, or Celery's
        found |= set(call())
        if len(found) == PROCESSES:
            break
    return found


@pytest.mark.parametrize(
    "command",
    [
        "gunicorn -c gunicorn_conf.py --preload --workers 3 shared_app:wsgi",
        pytest.param(
            "gunicorn -c gunicorn_conf.py --workers 3 shared_app:wsgi", marks=pytest.mark.exhaustive
        ),
    ],
    ids=["with --preload", "without"],
)
def test_the_workers_of_gunicorn_share(
    command: str, host: Host, environment: dict[str, str], tmp_path: Path, eventually: Eventually
) -> None:
    """60 clients at once: all workers serve, there are never more connections than the budget, the server
    refuses none, and when it stops, none is left."""
    pytest.importorskip("gunicorn")
    address = f"127.0.0.1:{free_port()}"
    more = {"GUNICORN_CMD_ARGS": arguments(address)}
    program = Program(shlex.split(command), environment | more, tmp_path / "said.txt")
    try:
        wait_for(f"http://{address}/", program, eventually)
        found = served_by_all(lambda: load(lambda: ask(f"http://{address}/")))
    finally:
        program.stop()
    assert len(found) == PROCESSES
    assert program.pid not in found
    assert complaints(program.said()) == []
    assert_kept(host, eventually)


@pytest.mark.exhaustive
def test_the_workers_of_uvicorn_share(
    host: Host, environment: dict[str, str], tmp_path: Path, pg_url: str, eventually: Eventually
) -> None:
    """With the FastAPI recipe's commands: each of four workers has its part, nothing is lost or refused."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    run_to_its_end(documented("fastapi", "python"), environment | {"DATABASE_URL": pg_url})
    owner = create_engine(pg_url, poolclass=NullPool)
    with owner.begin() as connection:
        connection.execute(text(f"GRANT ALL ON fastapi_visit, fastapi_visit_id_seq TO {host.role}"))
    address = f"127.0.0.1:{(port := free_port())}"
    more = {"UVICORN_PORT": str(port), "UVICORN_LOG_LEVEL": "error"}
    program = Program(documented("fastapi", "uvicorn --workers"), environment | more, tmp_path / "said.txt")
    try:
        wait_for(url := f"http://{address}/visits/home", program, eventually)
        load(lambda: ask(url, b""))
        assert ask(url)["visits"] == 300
        eventually(lambda: len(list(tmp_path.rglob("box.*"))) == 4, "all workers take part")
    finally:
        program.stop()
    assert complaints(program.said()) == []
    assert_kept(host, eventually)
    with owner.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {host.role}"))


@pytest.mark.exhaustive
def test_the_children_of_a_celery_worker_share(
    host: Host, environment: dict[str, str], tmp_path: Path, eventually: Eventually
) -> None:
    """Three children and their parent, which has used the database before, with three connections."""
    pytest.importorskip("celery")
    command = shlex.split("celery -A shared_tasks worker --concurrency 3")
    program = Program(command, environment, tmp_path / "said.txt")
    order = [sys.executable, "-c", ORDER]
    try:
        found = served_by_all(lambda: json.loads(run_to_its_end(order, environment)))
    finally:
        program.stop()
    assert len(found) == PROCESSES
    assert program.pid not in found
    assert complaints(program.said()) == []
    assert_kept(host, eventually)


@pytest.mark.parametrize(
    "method",
    ["fork", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("spawn", "forkserver"))],
)
def test_processes_of_multiprocessing_share(
    method: str, host: Host, environment: dict[str, str], tmp_path: Path, eventually: Eventually
) -> None:
    """However they are started: three at once, and the one that has started them, with three connections."""
    command = [sys.executable, "-W", "error", str(tmp_path / "main.py"), method, "3"]
    go_on = tmp_path / "go on"
    running = Thread(run_to_its_end, command, environment | {"GO_ON": str(go_on)})
    eventually(lambda: host.peak == BUDGET or not running.alive, "all are seen", 60)
    go_on.touch()
    assert len(set(json.loads(running.join(120)))) == 3
    assert_kept(host, eventually)


def complaints(said: str) -> list[str]:
    """What a log has about connections, and of exceptions; uvicorn and Celery have warnings of their own."""
    words = ("Traceback (most", "sqla_queries_pool", "psycopg", "budget")
    return [line for line in said.splitlines() if any(word in line for word in words)]


def assert_kept(host: Host, eventually: Eventually) -> None:
    """All of the budget was used, never more, and nothing was refused; nothing is left."""
    eventually(lambda: not host.backends(), "no connection is left")
    assert host.peak == BUDGET
    assert not host.refused()
