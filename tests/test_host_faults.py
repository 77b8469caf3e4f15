"""What may be wrong with the folder of a budget: a full disk, one that is read-only, no locks, other users.

Each disk is real: a small tmpfs, in a mount namespace that ends with the test.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Observer, SessionServer
from hosts import WORKER, Host, Worker
from sqlalchemy import exc

from sqla_queries_pool.host import lease
from sqla_queries_pool.host.lease import YOUNG, Folder

pytestmark = pytest.mark.skipif(not lease.AVAILABLE, reason="there are no flock and Unix sockets")

Eventually = Callable[..., None]
NOBODY = 65534


class Disk:
    """A file system with room for so many files and folders, the first one included.

    :param inside: the beginning of a command that runs another one where the disk is.
    """

    def __init__(self, path: Path, files: int) -> None:
        self.path = path
        path.mkdir()
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        mount = f"mount -t tmpfs -o nr_inodes={files},mode=0700 none {path} && echo ready && exec cat"
        self._process = subprocess.Popen(
            ["unshare", *user, "--mount", "--propagation", "private", "sh", "-c", mount],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.is_there = self._process.stdout.readline() == "ready\n"
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self.inside = ["nsenter", "--target", str(self._process.pid), *user, "--mount"]

    def remount(self, options: str) -> None:
        """Change it."""
        subprocess.run([*self.inside, "mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def start(self) -> str:
        """Have a process begin, which fails; its error."""
        told = f'{{"url": "postgresql+psycopg2://me@host/shop", "share": "{self.path}", "max_size": 4}}'
        command = [*self.inside, sys.executable, str(WORKER), told]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return ended.stderr

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Make a disk."""
    made: list[Disk] = []

    def make(files: int) -> Disk:
        if shutil.which("unshare") is None or shutil.which("nsenter") is None:
            pytest.skip("there are no mount namespaces")
        made.append(Disk(tmp_path / "disk", files))
        if not made[-1].is_there:
            pytest.skip("this user may not mount anything")
        return made[-1]

    yield make
    for each in made:
        each.end()


Hosts = Callable[[int], Host]


@pytest.fixture
def host(pg_server: SessionServer, pg_observer: Observer, pg_url: str, tmp_path: Path) -> Iterator[Hosts]:
    """Make a host with such a budget, whose connections are watched."""
    made: list[Host] = []

    def make(budget: int) -> Host:
        made.append(Host(pg_server, pg_observer, pg_url, tmp_path / "shared", budget))
        made[-1].folder.mkdir()
        made[-1].watch()
        return made[-1]

    yield make
    for each in made:
        each.end()


# -- at the start ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_is_an_error_at_once(disk: Callable[[int], Disk]) -> None:
    """It says which folder, why, and what to do."""
    small = disk(5)  # two folders and two of four slots
    assert "no file can be made in the folder" in (said := small.start())
    assert "No space left on device. Make room there, or name another folder" in said
    small.remount("nr_inodes=20")
    assert small.start() == ""
    small.remount("ro")
    assert "no file can be made in the folder" in (said := small.start())
    assert "Read-only file system" in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_folder_of_somebody_else_is_an_error_at_once() -> None:
    """Whoever may not make anything in it."""
    base = tempfile.mkdtemp(dir="/tmp")
    os.chmod(base, 0o755)
    try:
        os.seteuid(NOBODY)
        with pytest.raises(exc.ArgumentError, match=r"the folder .* can't be used: Permission denied"):
            Folder(base, "a pool")
    finally:
        os.seteuid(0)
        os.rmdir(base)


SOMEBODY_ELSE = """
import os, sys
from sqlalchemy import create_engine
from sqla_queries_pool import QueriesPool
url, base, user = sys.argv[1:]
engine = create_engine(url, poolclass=QueriesPool, share=base, max_size=1, pool_timeout=10)
os.setuid(int(user))
with engine.connect():
    print(engine.pool.statistics().host.problem, os.listdir(base))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_process_that_becomes_another_user_has_that_users_budget(pg_url: str) -> None:
    """As servers do that load the application as root, and then have their workers be somebody else."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    base.chmod(0o777)
    try:
        command = [sys.executable, "-c", SOMEBODY_ELSE, pg_url, str(base), str(NOBODY)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.stdout.startswith("None "), ended.stderr
        assert f"'sqla_queries_pool.{NOBODY}'" in ended.stdout
    finally:
        shutil.rmtree(base)


WITHOUT_LOCKS = """
import ctypes, platform, struct, sys
number = {"x86_64": 73, "aarch64": 32}[platform.machine()]  # flock
step = lambda code, yes, no, value: struct.pack("HBBI", code, yes, no, value)
program = (
    step(0x20, 0, 0, 0)  # load the number of the system call
    + step(0x15, 0, 1, number)
    + step(0x06, 0, 0, 0x00050000 | 37)  # ENOLCK
    + step(0x06, 0, 0, 0x7FFF0000)
)
steps = ctypes.create_string_buffer(program, len(program))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # no new privileges
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(steps)))
assert libc.prctl(22, 2, filters, 0, 0) == 0, "no seccomp"
from sqlalchemy import create_engine
from sqla_queries_pool import QueriesPool
create_engine("postgresql+psycopg2://me@host/shop", poolclass=QueriesPool, share=sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_a_file_system_without_locks_is_an_error_at_once(tmp_path: Path) -> None:
    """The kernel says ENOLCK, as it does for one of the network without a lock server."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    if "no seccomp" in said or "KeyError" in said:
        pytest.skip("there is no seccomp")
    assert "nothing can be locked in the folder" in said
    assert "No locks available. Name one on a local file system" in said


def all_locked(folder: Folder) -> bool:
    """Has somebody locked each slot, as the kernel sees it?"""
    lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    found = {int(line.split()[-3].rpartition(":")[2]) for line in lines}
    return {path.stat().st_ino for path in Path(folder.path).glob("slot.*")} <= found


@contextmanager
def frozen(worker: Worker) -> Iterator[None]:
    """A process does nothing meanwhile."""
    worker.kill(signal.SIGSTOP)
    os.waitpid(worker.pid, os.WUNTRACED)
    yield
    worker.kill(signal.SIGCONT)


# -- under running processes -----------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_disk_that_is_full_by_now_takes_nothing_away(
    disk: Callable[[int], Disk], host: Hosts, eventually: Eventually
) -> None:
    """One that can't have a mailbox says why it waits, and is served as soon as there is room."""
    small, one = disk(8), host(4)  # two folders, four slots, and the mailbox of the first
    first, second = one.start(2, inside=small.inside, share=str(small.path))
    assert first.do("take", 4) == 4
    eventually(lambda: one.peak == 4, "all are seen")
    eventually(lambda: first.do("state")["host"]["problem"] is None)
    second.begin("take", 1)
    first.do("release")
    assert first.do("take", 3) == 3
    small.remount("nr_inodes=20")
    assert second.result() == 1
    eventually(lambda: second.do("state")["host"]["problem"] is None)
    assert one.peak == 4
    assert not one.refused()


@pytest.mark.exhaustive
def test_what_another_user_puts_in_the_place_of_the_folder_changes_nothing(
    host: Hosts, tmp_path: Path, eventually: Eventually
) -> None:
    """Those that run go on, and say so; nobody begins there; and then all is as before."""
    one = host(3)
    first, second = one.start(2)
    assert first.do("take", 3) == 3
    eventually(lambda: one.peak == 3, "all are seen")
    second.do("state")
    outer = one.home.parent
    outer.rename(tmp_path / "away")
    (tmp_path / "elsewhere").mkdir()
    outer.symlink_to(tmp_path / "elsewhere")
    eventually(lambda: "can't be used" in (first.do("state")["host"]["problem"] or ""))
    with pytest.raises(exc.ArgumentError, match="it is no folder, or a symlink to one"):
        Folder(str(one.folder), "a pool")
    second.begin("take", 2)
    first.do("release")
    assert second.result() == 2
    outer.unlink()
    (tmp_path / "away").rename(outer)
    eventually(lambda: first.do("state")["host"]["problem"] is None)
    (third,) = one.start()
    assert third.do("take", 1) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert one.peak == 3
    assert not one.refused()


@pytest.mark.exhaustive
def test_containers_that_share_a_volume_share_the_budget(host: Hosts, eventually: Eventually) -> None:
    """Each has process ids of its own, and both the same one."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    container = ["unshare", *user, "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*container, "true"], check=False).returncode:
        pytest.skip("there are no process namespaces")
    one = host(3)
    first, second = one.start(2, inside=container)
    assert first.do("take", 3) == 3
    second.begin("take", 2)
    first.do("release")
    assert second.result() == 2
    assert first.do("take", 1) == 1
    assert [worker.do("state")["pid"] for worker in (first, second)] == [1, 1]
    eventually(lambda: one.peak == 3, "all are seen, and never one more")
    assert not one.refused()


@pytest.mark.exhaustive
def test_a_folder_that_can_be_made_again_is_no_second_budget(
    host: Hosts, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes it: what the others have is locked in it before anybody else may lock anything."""
    one = host(3)
    (worker,) = one.start()
    assert worker.do("take", 3) == 3
    outer = one.home.parent
    for _ in range(2):
        with frozen(worker):  # or else it makes it again meanwhile
            shutil.rmtree(outer)
            outer.touch()
        eventually(lambda: worker.do("state")["host"]["problem"] is not None)
        outer.unlink()
        made = Folder(str(one.folder), worker.do("pool_id"))
        made.prepare(3)
        until: float | None = None
        # It has the time for which files are new.  On a busy machine that may be too short, so they stay new
        # until it has locked them.
        monkeypatch.setattr(lease, "YOUNG", 3600.0)
        while until is None or time.monotonic() < until:
            assert [made.lock(number) for number in range(3)] == [None] * 3
            if until is None and all_locked(made):
                monkeypatch.setattr(lease, "YOUNG", 0.0)
                until = time.monotonic() + YOUNG
        made.close()


@pytest.mark.exhaustive
def test_processes_that_are_killed_all_the_time_cost_the_others_nothing(
    host: Hosts, eventually: Eventually
) -> None:
    """Eight busy ones, of which one is killed at random again and again, and replaced; in the end one has all
    slots."""
    draw = random.Random(1)
    one = host(12)
    workers = one.start(8)
    for worker in workers:
        worker.do("load", 4, 0.005)
    for _ in range(6):
        victim = workers.pop(draw.randrange(len(workers)))
        victim.kill()
        workers += one.start()
        workers[-1].do("load", 4, 0.005)
        for worker in workers:
            before = worker.do("state")["served"]
            eventually(lambda w=worker, before=before: w.do("state")["served"] > before)
    states = [worker.do("state") for worker in workers]
    assert [error for state in states for error in state["errors"]] == []
    assert max(state["longest"] for state in states) < 15  # 2 s, and more for a busy machine
    survivor, *others = workers
    for worker in others:
        worker.kill()
    survivor.do("unload")
    assert survivor.do("take", 12) == 12
    assert one.peak == 12
