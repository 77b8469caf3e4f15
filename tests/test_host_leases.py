"""Leases and letters on the real kernel: locks, passed descriptors, and what others put in the way."""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import exc

from sqla_queries_pool.host import lease
from sqla_queries_pool.host.lease import HOST, YOUNG, Folder, Lease, base_of, folders_of
from sqla_queries_pool.host.letters import (
    FULL,
    GONE,
    KINDS,
    LONGEST,
    SENT,
    Ask,
    Here,
    Mailbox,
    Offer,
    Passed,
    Take,
    is_read,
    read,
    write,
)
from sqla_queries_pool.host.watch import Watch

pytestmark = pytest.mark.skipif(not lease.AVAILABLE, reason="there are no flock and Unix sockets")

Eventually = Callable[..., None]
_numbers = itertools.count(1)


def aged(folder: Folder) -> Folder:
    """Its files are no longer new."""
    for name in os.listdir(folder.path):
        os.utime(os.path.join(folder.path, name), (0, 0))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A budget's folder, with four slots that are not new."""
    made = Folder(str(tmp_path), "a pool")
    made.prepare(4)
    yield aged(made)
    made.close()


@pytest.fixture
def other(tmp_path: Path, folder: Folder) -> Iterator[Folder]:
    """The same folder as another process has it open."""
    made = Folder(str(tmp_path), "a pool")
    yield made
    made.close()


def descriptors(below: Path) -> int:
    """How many lead to files there.  What other threads open and close meanwhile is no matter."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith(str(below))
    return count


def locked(folder: Folder, number: int) -> Lease:
    """A lease that is free."""
    found = folder.lock(number)
    assert found is not None
    return found


# -- leases ----------------------------------------------------------------------------------------------


def test_a_slot_has_one_owner_until_it_is_released(folder: Folder, other: Folder) -> None:
    """A second open file does not get the lock, in this process or another."""
    mine = locked(folder, 0)
    assert other.lock(0) is None
    assert folder.lock(0) is None
    mine.release()
    locked(other, 0).release()


def test_the_lock_of_a_process_that_was_killed_is_free(folder: Folder, eventually: Eventually) -> None:
    """There is nothing to be cleaned."""
    code = (
        "import sys; from sqla_queries_pool.host.lease import Folder\n"
        "mine = Folder(sys.argv[1], 'a pool').lock(2); print(mine, flush=True); sys.stdin.read()"
    )
    base = str(Path(folder.path).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", code, base], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "<Lease 2>\n"
        assert folder.lock(2) is None
        child.send_signal(signal.SIGKILL)
    locked(folder, 2).release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_that_closes_what_it_inherited_frees_nothing(folder: Folder, other: Folder) -> None:
    """And the parent's release frees it, even if a child has kept its copy."""
    mine = locked(folder, 0)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        mine.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert other.lock(0) is None
    if not (child := os.fork()):  # one that was made in C, and knows of nothing
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    mine.release()
    locked(other, 0).release()
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_a_file_that_is_new_is_only_for_one_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a folder that was deleted under running processes is theirs first."""
    folder = Folder(str(tmp_path), "new")
    folder.prepare(1)
    assert YOUNG > 0.1
    monkeypatch.setattr(lease, "YOUNG", 3600.0)
    assert folder.lock(0) is None
    mine = folder.lock(0, moved=True)
    assert mine is not None
    mine.release()
    locked(aged(folder), 0).release()
    os.utime(Path(folder.path) / "slot.0", (4e9, 4e9))  # the clock was set back
    locked(folder, 0).release()
    folder.close()


def test_a_folder_that_was_deleted_is_made_again(folder: Folder) -> None:
    """And a lease says that its file is gone."""
    mine = locked(folder, 0)
    assert not folder.renew()
    assert not mine.is_orphan
    for path in Path(folder.path).iterdir():
        path.unlink()
    Path(folder.path).rmdir()
    assert mine.is_orphan
    assert folder.renew()
    assert not folder.renew()
    again = folder.lock(0, moved=True)
    assert again is not None
    again.release()
    mine.release()


def test_a_descriptor_that_is_something_else_by_now_is_left_alone(folder: Folder, tmp_path: Path) -> None:
    """A process that becomes a daemon closes all that it has inherited, and then opens files of its own."""
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR)
    taken = folder.fd
    os.dup2(log, taken)
    assert folder.renew()
    assert os.path.sameopenfile(taken, log)
    os.close(taken)
    os.dup2(log, taken := folder.fd)
    folder.close()
    assert os.path.sameopenfile(taken, log)
    os.close(taken)
    os.close(log)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_what_happens_in_a_folder_and_on_the_way_to_it_is_seen(tmp_path: Path) -> None:
    """And nothing else."""
    (home := tmp_path / "above" / "home").mkdir(parents=True)
    watch = Watch(str(home))
    (tmp_path / "beside").mkdir()
    assert not watch.seen()
    for act in (
        (home / "one").touch,
        (home / "one").unlink,
        lambda: home.rename(tmp_path / "above" / "away"),
        lambda: (tmp_path / "above").rename(tmp_path / "beyond"),
        (tmp_path / "beyond" / "away").rmdir,
    ):
        act()
        assert watch.seen()
        assert not watch.seen()
    watch.close()
    with pytest.raises(OSError, match="nowhere"):
        Watch(str(tmp_path / "nowhere"))


# -- letters ---------------------------------------------------------------------------------------------

LETTERS = (
    Ask(1, 2.5, 0.25, True),
    Offer(2, 0.5, 3.0),
    Take(1),
    Passed(7),
    Here(1, 2.0, 3, 4711, "gunicorn: worker", "postgresql://me@host/shop", 12),
)


def test_what_was_written_is_read() -> None:
    """Each kind."""
    assert {type(letter) for letter in LETTERS} == set(KINDS.values())
    for letter in LETTERS:
        assert read(write(letter)) == letter


def test_what_is_no_letter_is_forgotten() -> None:
    """Of any kind, and whatever is changed in one."""
    for data in (b"", b"null", b"[]", b"[1]", b'["no"]', b'["ask"]', b"\xff", b"[" * 500, b'[["ask"]]'):
        assert read(data) is None, data
    for bad in (
        '["ask", -1, 1, 1, true]',
        '["ask", 1, NaN, 1, true]',
        '["ask", 1, Infinity, 1, true]',
        '["ask", 1, 1, 1, 1]',
        '["ask", true, 1, 1, true]',
        '["ask", 1.5, 1, 1, true]',
        '["take", 1e300]',
        '["take", 1, 2]',
        '["take", null]',
        '["take", 99999999999999]',
        json.dumps(["here", 1, 1, 1, 1, "x" * 101, "", 1]),
    ):
        assert read(bad.encode()) is None, bad
    assert read(write(Take(1)) + b" " * LONGEST) is None
    draw = random.Random(1)
    for letter in LETTERS * 200:
        changed = bytearray(write(letter))
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        found = read(bytes(changed))
        assert found is None or isinstance(found, tuple)


def test_a_lease_moves_without_ever_being_free(folder: Folder, other: Folder) -> None:
    """While it is in a letter it is nobody else's; then it is the reader's."""
    mine, writer, reader = locked(folder, 3), Mailbox(folder, 4), Mailbox(other, 4)
    assert writer.send(reader.name, Passed(3), mine.fd) == SENT
    mine.close()
    assert folder.lock(3) is None
    received = reader.receive()
    assert received is not None
    sender, letter, fd = received
    assert (sender, letter) == (writer.name, Passed(3))
    its = other.adopt(3, fd)
    assert its is not None
    assert not os.get_inheritable(its.fd)
    assert folder.lock(3) is None
    its.release()
    locked(folder, 3).release()
    writer.remove()
    reader.remove()


def test_a_lease_in_the_mailbox_of_one_that_dies_is_free(folder: Folder, other: Folder) -> None:
    """The kernel closes what nobody has read."""
    mine, writer, reader = locked(folder, 3), Mailbox(folder, 4), Mailbox(other, 4)
    assert writer.send(reader.name, Passed(3), mine.fd) == SENT
    mine.close()
    assert is_read(folder, reader.name)
    reader.close()
    locked(folder, 3).release()
    assert not is_read(folder, reader.name)
    assert writer.send(reader.name, Take(1)) == GONE
    folder.remove(reader.name)
    assert writer.send(reader.name, Take(1)) == GONE
    assert list(folder.boxes()) == [writer.name]
    writer.remove()
    assert list(folder.boxes()) == []


def test_who_is_asked_whether_it_lives_is_not_woken(folder: Folder) -> None:
    """There is no letter."""
    box = Mailbox(folder, 4)
    assert is_read(folder, box.name)
    assert box.receive() is None
    box.close()
    assert not is_read(folder, box.name)


def test_a_mailbox_that_is_full_says_so(folder: Folder) -> None:
    """And nobody waits for it."""
    box = Mailbox(folder, 4)
    assert FULL in {box.send(box.name, Take(1)) for _ in range(10_000)}
    assert box.receive() == (box.name, Take(1), -1)
    box.remove()


def test_descriptors_that_are_no_lease_are_closed(folder: Folder, tmp_path: Path) -> None:
    """Another file's, one without its lock, one too many, and one in a letter that has none."""
    before = descriptors(tmp_path)
    theirs, box = locked(folder, 1), Mailbox(folder, 4)
    unlocked = os.open(Path(folder.path) / "slot.1", os.O_RDWR)
    foreign = os.open(tmp_path / "slot.0", os.O_RDWR | os.O_CREAT)
    for number, fd in ((1, unlocked), (0, foreign), (9999999, foreign)):
        assert folder.adopt(number, os.dup(fd)) is None
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    raw.bind(os.path.join(f"/proc/self/fd/{folder.fd}", f"box.1.1.{'a' * 16}"))
    for data, fds in (
        (write(Take(1)), [foreign]),
        (write(Passed(1)), [foreign, foreign]),
        (write(Passed(1)), [foreign] * 50),
        (write(Passed(1)), []),
        (b"x" * 5000, [foreign]),
    ):
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        raw.sendmsg([data], passed if fds else [], 0, f"/proc/self/fd/{folder.fd}/{box.name}")
        received = box.receive()
        assert received is not None
        assert received[1:] == (None, -1)
    assert box.receive() is None
    raw.close()
    nameless = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    nameless.sendto(write(Take(1)), f"/proc/self/fd/{folder.fd}/{box.name}")
    assert box.receive() == ("", None, -1)
    nameless.close()
    for fd in (unlocked, foreign):
        os.close(fd)
    theirs.release()
    box.remove()
    assert descriptors(tmp_path) == before


# -- what is in the way ------------------------------------------------------------------------------------


def test_only_this_user_can_read_or_write(folder: Folder) -> None:
    """Folders and files; and the names tell nothing but numbers."""
    box = Mailbox(folder, 4)
    for path in (Path(folder.path).parent, Path(folder.path), *Path(folder.path).iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert Path(folder.path).parent.name == f"sqla_queries_pool.{os.getuid()}"
    assert "pool" not in Path(folder.path).name
    assert folders_of(str(Path(folder.path).parent.parent)) == [folder.path]
    box.remove()


def in_the_way(base: Path, name: str) -> None:
    """Put something where a folder should be."""
    outer = base / f"sqla_queries_pool.{os.getuid()}"
    if name == "open to others":
        outer.mkdir()
        outer.chmod(0o770)
    elif name == "a symlink":
        (base / "elsewhere").mkdir(mode=0o700)
        outer.symlink_to(base / "elsewhere")
    elif name == "a file":
        outer.write_text("")
    elif name == "another user's":
        outer.mkdir(mode=0o700)
        os.chown(outer, 12345, -1)
    else:
        base.rmdir()


@pytest.mark.parametrize("name", ["open to others", "a symlink", "a file", "another user's", "no base"])
def test_a_folder_that_is_not_ours_alone_is_refused(name: str, tmp_path: Path) -> None:
    """The error says which, why, and what to do."""
    base = tmp_path / "base"
    base.mkdir()
    if name == "another user's" and os.getuid():
        pytest.skip("only root can give a folder away")
    in_the_way(base, name)
    with pytest.raises(exc.ArgumentError, match=r"the folder .* can't be used: .*share='/path'"):
        Folder(str(base), "a pool")


@pytest.mark.parametrize("kind", ["a symlink", "a pipe", "a folder"])
def test_what_is_no_file_is_no_slot(kind: str, folder: Folder, tmp_path: Path) -> None:
    """It can't be locked, and nobody waits for it."""
    path = Path(folder.path) / "slot.9"
    if kind == "a symlink":
        (tmp_path / "file").touch()
        path.symlink_to(tmp_path / "file")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with contextlib.suppress(OSError):
        assert folder.lock(9) is None
    with pytest.raises(exc.ArgumentError, match="no file can be made"):
        folder.prepare(10)


def test_a_folder_that_is_read_only_is_refused(tmp_path: Path) -> None:
    """At once, with the reason."""
    if not os.getuid():
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(exc.ArgumentError, match="Permission denied"):
        Folder(str(tmp_path), "a pool")


def test_a_platform_without_locks_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says what is missing, and what to do."""
    monkeypatch.setattr(lease, "AVAILABLE", False)
    with pytest.raises(exc.ArgumentError, match=r"needs flock and Unix sockets.*max_size"):
        Folder(str(tmp_path), "a pool")


def test_a_path_that_no_socket_may_have_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is no short way to it: a process without a mailbox would never be asked for its leases."""
    (long := tmp_path / ("x" * 60)).mkdir()
    Folder(str(long), "a pool").close()
    monkeypatch.setattr(lease, "THROUGH_PROC", False)
    with pytest.raises(exc.ArgumentError, match=r"too long for Unix sockets.*shorter path"):
        Folder(str(long), "a pool")


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system has a place for such things, else with the temporary files; or where one says."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert base_of(HOST) == "/run/user/1"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", "/tmp/here")
    assert base_of(HOST) == "/tmp/here"
    assert base_of(str(tmp_path)) == str(tmp_path)


def test_budgets_of_the_host_are_found_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a service, which has them with the temporary files, and of users who are logged in."""
    monkeypatch.setattr(lease, "RUNTIME_DIRS", str(tmp_path / "run"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    made = []
    for base in ("tmp", "run/1", "run/2"):
        (tmp_path / base).mkdir(parents=True)
        made.append(Folder(str(tmp_path / base), "a pool"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run" / "2"))
    assert sorted(folders_of(HOST)) == sorted(folder.path for folder in made)
    assert folders_of(str(tmp_path / "tmp")) == [made[0].path]
    for folder in made:
        folder.close()
