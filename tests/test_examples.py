"""The examples, started by the commands that the recipes show, under load, as the server counts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Observer
from hazards import free_port
from sqlalchemy import make_url

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = ROOT / "docs" / "recipes"
CLIENTS = 60
"""Threads that ask at once: more than the 40 that Starlette has, and than the examples' `max_size`."""
REQUESTS = 5
"""What each of them asks."""

ROUNDS = 20
"""How often a test puts up the load at most, until all processes have had their share."""

Run = Callable[..., "Program"]


class Program:
    """A program that runs in a folder and a process group of its own; what it says goes to a file."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=EXAMPLES,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to stop as an operator does; insist, and fail, if it does not."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            raise AssertionError(f"it did not stop:\n{self.said()}") from None


@pytest.fixture
def environment(pg_url: str, tmp_path: Path) -> dict[str, str]:
    """What the examples are told: where the database is, and where to listen or to leave files."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    shutil.copy(Path(__file__).with_name("whole_files.py"), tmp_path)
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "default",
        "DATABASE_URL": pg_url,
        "CELERY_FOLDER": str(tmp_path / "celery"),
        "XDG_RUNTIME_DIR": str(tmp_path),
    }


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Iterator[Run]:
    """Start programs in the folder of the examples; they are stopped at the end of the test."""
    with ExitStack() as stack:

        def start(command: Sequence[str], **more: str) -> Program:
            program = Program(command, environment | more, tmp_path / "said.txt")
            stack.callback(program.stop)
            return program

        yield start


def documented(page: str, beginning: str) -> list[str]:
    """The command that a recipe shows, as a shell takes it apart; there is one that begins so."""
    lines = [line.strip() for line in (RECIPES / f"{page}.rst").read_text().splitlines()]
    [command] = [line for line in lines if line.startswith(beginning)]
    return shlex.split(command)


def documented_url(page: str, url: str) -> str:
    """The URL of a database with what a recipe's last one says of the pool."""
    lines = [line.strip() for line in (RECIPES / f"{page}.rst").read_text().splitlines()]
    [*_, told] = [line for line in lines if line.startswith("export DATABASE_URL=")]
    query = make_url(shlex.split(told)[1].partition("=")[2]).query
    assert query["share"] == "host"
    return make_url(url).update_query_dict(query).render_as_string(False)


def ask(url: str, data: bytes | None = None) -> Any:
    """What a server answers.  One that refuses, or answers with an error, is an exception with its text."""
    try:
        with urllib.request.urlopen(url, data, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode()}") from None


def wait_for(url: str, program: Program, eventually: Callable[..., None]) -> None:
    """Wait until a server answers, with whatever."""

    def answers() -> bool:
        assert not program.ended(), program.said()
        try:
            urllib.request.urlopen(url, timeout=60).close()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            return False
        return True

    eventually(answers, "the server answers", seconds=60)


def load(call: Callable[[], Any]) -> list[Any]:
    """Call from many threads at once, each several times; all results."""
    barrier = threading.Barrier(CLIENTS)

    def client(_: int) -> list[Any]:
        barrier.wait(60)
        return [call() for _ in range(REQUESTS)]

    with ThreadPoolExecutor(CLIENTS) as clients:
        return [result for results in clients.map(client, range(CLIENTS)) for result in results]


@contextmanager
def highest(count: Callable[[], int]) -> Iterator[list[int]]:
    """Look again and again meanwhile; the list has what was seen, one number per look."""
    seen: list[int] = []
    stop = threading.Event()

    def look() -> None:
        last = False
        while not last:
            last = stop.is_set()  # one more look, which begins after the end
            seen.append(count())

    with ThreadPoolExecutor(1) as observer:
        looking = observer.submit(look)
        try:
            yield seen
        finally:
            stop.set()
            looking.result()


def backends(observer: Observer, url: str) -> set[int]:
    """The server processes of a database's clients."""
    sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s"
    return {pid for (pid,) in observer.query(sql, make_url(url).database)}


def url_of(url: str, driver: str) -> str:
    """The URL for a driver."""
    return make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)


def by_process(found: Sequence[tuple[int, int]]) -> dict[int, set[int]]:
    """Who has seen which backends, from pairs of a process and a backend."""
    return {process: {backend for its, backend in found if its == process} for process, _ in found}


# -- FastAPI


def test_fastapi_serves_more_clients_than_connections_without_an_error(
    run: Run, pg_url: str, pg_observer: Observer, eventually: Callable[..., None]
) -> None:
    """60 clients write and read at once: no error, nothing is lost, never more backends than max_size; and
    when it stops, none is left."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    url = f"http://127.0.0.1:{(port := free_port())}/visits/home"
    program = run(
        documented("fastapi", "uvicorn fastapi"), UVICORN_PORT=str(port), UVICORN_LOG_LEVEL="warning"
    )
    wait_for(url, program, eventually)

    with highest(lambda: len(backends(pg_observer, pg_url))) as seen:
        load(lambda: ask(url, b""))  # an answer that is an error is an exception

    assert ask(url) == {"page": "home", "visits": CLIENTS * REQUESTS}
    assert max(seen) == 5  # max_size: it was busy, and kept to it
    program.stop()
    assert program.said() == ""
    eventually(lambda: not backends(pg_observer, pg_url), "no connection is left")


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=pytest.mark.exhaustive)])
def test_async_endpoints_serve_more_clients_than_connections_without_an_error(
    loop: str, run: Run, pg_url: str, pg_observer: Observer, eventually: Callable[..., None]
) -> None:
    """60 clients write and read at once, and the page of the pool is looked at meanwhile: no error, nothing
    is lost, never more backends than max_size; and when the server stops, none is left."""
    for module in ("a2wsgi", "asyncpg", "fastapi", "sqlmodel", "uvicorn", loop):
        pytest.importorskip(module)
    address = f"http://127.0.0.1:{(port := free_port())}"
    url = f"{address}/visits/home"
    program = run(
        documented("fastapi-async", "uvicorn"),
        DATABASE_URL=url_of(pg_url, "asyncpg"),
        UVICORN_PORT=str(port),
        UVICORN_LOG_LEVEL="warning",
        UVICORN_LOOP=loop,
    )
    wait_for(url, program, eventually)

    labels: set[str] = set()
    with (
        highest(lambda: len(backends(pg_observer, pg_url))) as seen,
        highest(lambda: look(f"{address}/pools/data.json", labels)) as held,
    ):
        load(lambda: ask(url, b""))  # an answer that is an error is an exception

    assert ask(url) == {"page": "home", "visits": CLIENTS * REQUESTS}
    assert max(seen) == 5  # max_size: it was busy, and kept to it
    assert max(held) == 5
    assert labels == {"POST /visits/home"}
    program.stop()
    assert program.said() == ""
    eventually(lambda: not backends(pg_observer, pg_url), "no connection is left")


def look(page: str, labels: set[str]) -> int:
    """How many connections are held, as the page of the pool tells; it adds what they are for.

    The pool itself may have one for a moment, to ask the server for its limits.
    """
    [pool] = ask(page)["pools"]
    labels.update(holder["label"] for holder in pool["holders"] if holder["name"] != "the pool itself")
    return len(pool["holders"])


def test_async_endpoints_answer_503_when_there_is_no_connection_and_the_log_says_who_has_them(
    run: Run, tmp_path: Path, pg_url: str, eventually: Callable[..., None]
) -> None:
    """The pool is held by tasks of the application; one request more is told so, and others go on."""
    for module in ("a2wsgi", "asyncpg", "fastapi", "sqlmodel", "uvicorn"):
        pytest.importorskip(module)
    (tmp_path / "held_app.py").write_text(HELD)
    address = f"http://127.0.0.1:{(port := free_port())}"
    program = run(
        ["uvicorn", "held_app:app"],
        DATABASE_URL=url_of(pg_url, "asyncpg"),
        UVICORN_PORT=str(port),
        UVICORN_LOG_LEVEL="warning",
    )
    wait_for(f"{address}/none", program, eventually)
    assert ask(f"{address}/hold", b"") is True
    with pytest.raises(AssertionError, match="503: busy, please try again"):
        ask(f"{address}/visits/home")
    assert "task 'import 1' [nightly import]" in program.said()
    assert ask(f"{address}/go", b"") is True
    assert ask(f"{address}/visits/home") == {"page": "home", "visits": 0}


HELD = """
import asyncio
import fastapi_async_app
from fastapi_async_app import app
from sqlalchemy.ext.asyncio import create_async_engine
from sqla_queries_pool import QueriesPool, labelled

options = {"poolclass": QueriesPool, "max_size": 1, "pool_timeout": 0.2}
engine = fastapi_async_app.engine = create_async_engine(fastapi_async_app.engine.url, **options)
go = asyncio.Event()
imports = []

async def hold(got):
    with labelled("nightly import"):
        async with engine.connect():
            got.set()
            await go.wait()

@app.post("/hold")
async def begin() -> bool:
    got = asyncio.Event()
    imports.append(asyncio.create_task(hold(got), name="import 1"))
    await got.wait()
    return True

@app.post("/go")
async def end() -> bool:
    go.set()
    await imports[0]
    return True
"""


ANYIO = """
@pytest.fixture(params=["asyncio", "asyncio+uvloop"])
def anyio_backend(request):
    return ("asyncio", {"use_uvloop": "uvloop" in request.param})
"""


@pytest.mark.parametrize("plugin", ["asyncio", pytest.param("anyio", marks=pytest.mark.exhaustive)])
def test_an_engine_at_module_level_serves_tests_with_a_loop_each(
    plugin: str,
    environment: dict[str, str],
    tmp_path: Path,
    pg_url: str,
    pg_observer: Observer,
    eventually: Callable[..., None],
) -> None:
    """The example's tests pass with pytest-asyncio and with anyio's plugin, warnings being errors."""
    for module in ("asyncpg", "pytest_asyncio", "anyio", "uvloop"):
        pytest.importorskip(module)
    [command, *_, file] = documented("../asyncio", "pytest ")
    program = (EXAMPLES / file).read_text()
    if plugin == "anyio":
        program = program.replace("pytest.mark.asyncio", "pytest.mark.anyio") + ANYIO
    (tmp_path / "test_example.py").write_text(program)
    arguments = ["-W", "error", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path / "test_example.py")]
    if plugin == "asyncio":
        arguments += [
            "-o",
            "asyncio_default_fixture_loop_scope=function",
        ]  # unstated, it warns
    else:
        arguments += ["-p", "no:asyncio"]
    environment["DATABASE_URL"] = url_of(pg_url, "asyncpg")
    said = run_to_its_end([command, *arguments], environment)
    assert ("3 passed" if plugin == "asyncio" else "6 passed") in said
    eventually(lambda: not backends(pg_observer, pg_url), "no connection is left")


# -- Celery

TASKS = """
import json
import whole_files
from celery_app import take_order
results = [take_order.delay(f"article {n}") for n in range(30)]
print(json.dumps([result.get(timeout=60) for result in results]))
"""

BRIEF = """
from celery_app import app, engine, take_order
from sqla_queries_pool import PoolManager
PoolManager.set_idle_ttl(engine.pool.pid, 1)
"""


@pytest.mark.exhaustive
def test_the_children_of_a_celery_worker_have_connections_of_their_own(
    run: Run,
    environment: dict[str, str],
    pg_url: str,
    pg_observer: Observer,
    eventually: Callable[..., None],
) -> None:
    """Every child has its own backend, none the one that its parent had before it forked; and the parent
    still has that one."""
    pytest.importorskip("celery")
    environment["DATABASE_URL"] = documented_url("celery", pg_url)
    worker = run(documented("celery", "celery"))
    eventually(lambda: worker.ended() or len(backends(pg_observer, pg_url)) == 1, "the parent's", seconds=60)
    [parents] = backends(pg_observer, pg_url)

    found: list[list[int]] = [json.loads(run_to_its_end(documented("celery", "python"), environment))]
    assert found[0][0] == 1  # the number of the order
    for _ in range(ROUNDS):  # who gets how many tasks is Celery's choice
        found += json.loads(run_to_its_end([sys.executable, "-c", TASKS], environment))
        of = by_process([(child, backend) for _, child, backend in found])
        if len(of) == 3:  # as many as the command says
            break

    assert sorted(number for number, _, _ in found) == list(range(1, len(found) + 1))
    assert worker.pid not in of
    assert [len(own) for own in of.values()] == [1, 1, 1]  # each uses its connection again
    assert len(set.union(*of.values())) == 3
    assert backends(pg_observer, pg_url) == {parents}.union(*of.values())
    worker.stop()
    assert "Traceback" not in worker.said()
    assert worker.said().count(": drained, nothing is out after") == 3, worker.said()  # as many as children
    eventually(lambda: not backends(pg_observer, pg_url), "no connection is left")


def run_to_its_end(command: Sequence[str], environment: dict[str, str]) -> str:
    """What a command prints that ends by itself."""
    ended = subprocess.run(
        command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.exhaustive
def test_idle_connections_close_in_the_children_of_a_celery_worker_and_in_itself(
    run: Run, environment: dict[str, str], tmp_path: Path, pg_url: str, pg_observer: Observer, eventually: Any
) -> None:
    """Although the parent has used the engine before it forked; and the next task has a connection again."""
    pytest.importorskip("celery")
    (tmp_path / "brief_app.py").write_text(BRIEF)
    worker = run(["celery", "-A", "brief_app", "worker", "--concurrency", "2"])
    program = TASKS.replace("celery_app", "brief_app")
    for _ in range(2):
        assert json.loads(run_to_its_end([sys.executable, "-c", program], environment))
        eventually(lambda: not backends(pg_observer, pg_url), "all idle connections close", seconds=30)
    assert not worker.ended()


# -- gunicorn

WSGI = """
import os
from flask_app import Note, create_app, db
from sqlalchemy import func, select

ttl = float(os.environ["IDLE_TTL"])
app = create_app(SQLALCHEMY_ENGINE_OPTIONS={"max_size": 3, "idle_ttl": ttl, "pool_timeout": 30})

@app.post("/busy")
def busy():
    "Have a connection for a while."
    db.session.execute(select(func.pg_sleep(0.02)))
    return [os.getpid(), db.session.scalars(select(func.pg_backend_pid())).one()]

with app.app_context():  # where it is preloaded, the parent does this, and has the connection idle
    db.session.scalars(select(1)).one()
    db.session.remove()
"""
WORKERS, MAX_SIZE = 2, 3


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("gunicorn -c gunicorn_conf.py --preload", marks=pytest.mark.exhaustive),
        "gunicorn -c gunicorn_conf.py",
    ],
)
def test_gunicorn_has_at_most_workers_times_max_size_connections(
    command: str,
    run: Run,
    tmp_path: Path,
    pg_url: str,
    pg_observer: Observer,
    eventually: Callable[..., None],
) -> None:
    """Each worker gets all of its max_size, on backends of its own; a parent that has preloaded has one
    besides, and keeps it."""
    pytest.importorskip("gunicorn")
    pytest.importorskip("flask_sqlalchemy")
    (tmp_path / "loaded_app.py").write_text(WSGI)
    address = f"127.0.0.1:{free_port()}"
    program = run(
        [*shlex.split(command), "loaded_app:app"], GUNICORN_CMD_ARGS=arguments(address), IDLE_TTL="600"
    )
    wait_for(f"http://{address}/none", program, eventually)
    of_parent = 1 if "--preload" in command else 0
    parents = backends(pg_observer, pg_url) if of_parent else set()
    assert len(parents) == of_parent

    found: list[tuple[int, int]] = []
    with highest(lambda: len(backends(pg_observer, pg_url))) as seen:
        for _ in range(ROUNDS):  # who gets how many requests is the kernel's choice
            found += load(lambda: tuple(ask(f"http://{address}/busy", b"")))
            of = by_process(found)
            if len(of) == WORKERS and min(map(len, of.values())) >= MAX_SIZE:
                break

    assert program.pid not in of
    assert [len(own) for own in of.values()] == [MAX_SIZE] * WORKERS
    assert len(set.union(*of.values())) == WORKERS * MAX_SIZE
    assert max(seen) == WORKERS * MAX_SIZE + of_parent
    assert backends(pg_observer, pg_url) == parents.union(*of.values())
    program.stop()
    assert "Traceback" not in program.said()
    assert program.said().count(": drained, nothing is out after") == WORKERS, program.said()
    eventually(lambda: not backends(pg_observer, pg_url), "no connection is left")


@pytest.mark.exhaustive
def test_idle_connections_close_in_preloaded_workers_and_in_their_parent(
    run: Run, tmp_path: Path, pg_url: str, pg_observer: Observer, eventually: Callable[..., None]
) -> None:
    """Although the parent has used the engine before it forked, and so its housekeeper lived; and afterwards
    the workers serve."""
    pytest.importorskip("gunicorn")
    pytest.importorskip("flask_sqlalchemy")
    (tmp_path / "loaded_app.py").write_text(WSGI)
    address = f"127.0.0.1:{free_port()}"
    command = shlex.split("gunicorn -c gunicorn_conf.py --preload loaded_app:app")
    program = run(command, GUNICORN_CMD_ARGS=arguments(address), IDLE_TTL="1")
    wait_for(f"http://{address}/none", program, eventually)
    for _ in range(2):
        found: list[tuple[int, int]] = []
        while len(by_process(found)) < WORKERS:
            found += load(lambda: tuple(ask(f"http://{address}/busy", b"")))
        assert program.pid not in by_process(found)
        eventually(lambda: not backends(pg_observer, pg_url), "all idle connections close", seconds=30)
    assert not program.ended()


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param("gunicorn -c gunicorn_conf.py --preload", marks=pytest.mark.exhaustive),
        'gunicorn -c gunicorn_conf.py "',
    ],
)
def test_the_commands_of_the_gunicorn_recipe_serve_the_flask_example(
    beginning: str,
    run: Run,
    environment: dict[str, str],
    pg_url: str,
    pg_observer: Observer,
    eventually: Callable[..., None],
) -> None:
    """As they stand: notes that many clients add at once are all there, and the workers have ten connections
    together."""
    pytest.importorskip("gunicorn")
    pytest.importorskip("flask_sqlalchemy")
    environment["DATABASE_URL"] = documented_url("gunicorn", pg_url)
    run_to_its_end(documented("gunicorn", "python -c"), environment)
    address = f"127.0.0.1:{free_port()}"
    program = run(documented("gunicorn", beginning), GUNICORN_CMD_ARGS=arguments(address))
    wait_for(f"http://{address}/notes", program, eventually)

    with highest(lambda: len(backends(pg_observer, pg_url))) as seen:
        ids = load(lambda: ask(f"http://{address}/notes", b"text=tea")["id"])

    assert max(seen) == 10
    assert sorted(ids) == list(range(1, CLIENTS * REQUESTS + 1))
    assert [note["id"] for note in ask(f"http://{address}/notes")] == sorted(ids)[:-21:-1]


def arguments(address: str) -> str:
    """Where to listen.  The control socket would be a file below the user's home."""
    return f"--bind {address} --no-control-socket"
