"""Leases: the right of a process to one slot of a budget that all processes of a host share.

A lease is an exclusive ``flock`` on a file ``slot.N``.  The kernel gives it back when its process dies,
however it dies, so that there is nothing to be cleaned.  The lock belongs to the *open file*, not to the
process or the descriptor (flock(2)): it goes with a descriptor that is passed to another process, without
ever being free, and it stays until the last duplicate is closed.  So a forked child closes what it has
inherited, and never unlocks.  (``fcntl.lockf`` would lose it when any descriptor of the file is closed.)
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator

from ..errors import ParameterError

try:
    import fcntl
    import socket

    AVAILABLE = hasattr(socket, "AF_UNIX") and hasattr(socket, "SCM_RIGHTS") and os.open in os.supports_dir_fd
except ImportError:  # Windows
    AVAILABLE = False

HOST = "host"
"""The share that names no folder."""
RUNTIME_DIRS = "/run/user"
"""Where systemd has the ``XDG_RUNTIME_DIR`` of each user."""
YOUNG = 0.5
"""Seconds for which nobody locks a file that is new: so the processes whose folder was deleted lock the new
files first, for what they have.  They look for it more than twice as often (share.py)."""
MOST = 10_000
"""The largest budget."""
BOX = re.compile(r"box\.(\d{1,10})\.(\d{1,6})\.([0-9a-f]{16})")
"""A mailbox: the process id, the ``max_size`` that the process states, and what makes it the only one."""


class Lease:
    """One lock that this process has.

    :param number: that of its file, from 0.
    :param fd: the descriptor that has the lock.
    """

    __slots__ = ("fd", "number")

    def __init__(self, number: int, fd: int) -> None:
        self.number = number
        self.fd = fd

    def close(self) -> None:
        """Give this process's descriptor up.  The lock is free if nobody else was passed it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()  # an interrupt came between two steps: it is nobody's, and so is free

    def release(self) -> None:
        """Free the lock, also if a process that was forked without Python's hooks has a duplicate."""
        if self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            self.close()

    @property
    def is_orphan(self) -> bool:
        """Was its file deleted?  Then others would lock a new one of the same name."""
        return os.fstat(self.fd).st_nlink == 0

    def __repr__(self) -> str:
        return f"<Lease {self.number}>"


def base_of(share: str) -> str:
    """Return the folder below which a share has its own: the stated one, else this user's for such things."""
    if share != HOST:
        return os.path.realpath(share)
    return os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()


def folders_of(share: str) -> list[str]:
    """Return the folders of all budgets of a share that this process may see, also other users'.

    ``host`` is wherever processes may have it: a service and a login shell differ in it.
    """
    bases = [base_of(share)]
    if share == HOST:
        bases.append(tempfile.gettempdir())
        with contextlib.suppress(OSError):
            bases += [os.path.join(RUNTIME_DIRS, name) for name in sorted(os.listdir(RUNTIME_DIRS))]
    found = []
    for base in dict.fromkeys(bases):
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(base)):
                if re.fullmatch(r"sqla_queries_pool\.\d+", name):
                    with contextlib.suppress(OSError):
                        inner = os.path.join(base, name)
                        found += [os.path.join(inner, each) for each in sorted(os.listdir(inner))]
    return found


THROUGH_PROC = os.path.isdir("/proc/self/fd")
"""Is a socket in an open folder reached by a short path?"""
LONGEST_PATH = 60
"""Bytes of a folder's path, where not: macOS has 103 for a socket's, and its name takes 43 at most."""


class Folder:
    """The folder of one budget: a file for each slot, and a mailbox for each process.

    It belongs to this user, who alone may read or write it.  It is opened once, and all in it is opened
    relative to that and never through a symlink: what others put in its way later is not looked at.

    :param share: ``host``, or the folder to use.
    :param pool_id: the pool id, of which a digest names the folder.
    :raises ParameterError: there is no such thing on this platform; the folder can't be made, or is not this
        user's alone.
    """

    def __init__(self, share: str, pool_id: str) -> None:
        if not AVAILABLE:
            raise ParameterError(
                f"share={share!r} needs flock and Unix sockets, which this platform does not have. Leave it "
                "out, and give each process its part of the connections by max_size"
            )
        self.share = share
        digest = hashlib.sha256(pool_id.encode(errors="backslashreplace")).hexdigest()[:24]
        self.path = os.path.join(base_of(share), _name_of_user(), digest)
        if not THROUGH_PROC and len(os.fsencode(self.path)) > LONGEST_PATH:
            raise ParameterError(
                f"share={share!r}: the path {self.path} is too long for Unix sockets in it on this platform. "
                "Pass share='/path' of a folder with a shorter path, to all processes"
            )
        self._new_until = -math.inf
        self.fd = self._open()
        self._is = _identity(os.fstat(self.fd))

    def _open(self) -> int:
        above, path = -1, os.path.dirname(self.path)
        try:
            above = _own_folder(path, -1)
            path = self.path
            fd = _own_folder(os.path.basename(path), above)
        except (OSError, _NotOurs) as error:
            why = error if isinstance(error, _NotOurs) else error.strerror
            raise ParameterError(
                f"share={self.share!r}: the folder {path} can't be used: {why}. It has to be this user's "
                "alone (mode 0700), and on this host. Remove what is in the way, or name another folder: "
                "share='/path'"
            ) from None
        finally:
            if above >= 0:
                os.close(above)
        try:  # systemd-tmpfiles leaves a folder alone that somebody has locked
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as error:
            os.close(fd)
            raise ParameterError(
                f"share={self.share!r}: nothing can be locked in the folder {self.path}: {error.strerror}. "
                "Name one on a local file system: share='/path'"
            ) from None
        return fd

    @classmethod
    def at(cls, path: str) -> Folder:
        """Open one that is there, perhaps another user's, to look at it.

        :raises OSError: there is none, or this user may not.
        """
        self = cls.__new__(cls)
        self.share, self.path = HOST, path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._is = _identity(os.fstat(self.fd))
        return self

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget the folder; what is in it stays.

        A process that becomes a daemon closes all that is open, and the number may be that of something else
        by now: only the folder itself is closed.
        """
        fd, self.fd = getattr(self, "fd", -1), -1
        with contextlib.suppress(OSError):
            if fd >= 0 and _identity(os.fstat(fd)) == self._is:
                os.close(fd)

    def renew(self) -> bool:
        """Open it again if it is gone or another one by now; return whether it is.

        It is another one for a process that has become another user since: servers load the application as
        root, and then have their workers be somebody else.

        :raises ParameterError: it can't be made again.
        """
        outer, name = os.path.split(self.path)
        self.path = os.path.join(os.path.dirname(outer), _name_of_user(), name)
        with contextlib.suppress(OSError):
            here, there = os.fstat(self.fd), os.stat(self.path, follow_symlinks=False)
            if _identity(here) == _identity(there):
                return False
        new = self._open()
        if new != self.fd:  # else somebody has closed it, and its number was free
            self.close()
        self.fd, self._is = new, _identity(os.fstat(new))
        return True

    # -- slots -------------------------------------------------------------------------------------

    def prepare(self, size: int) -> None:
        """Make the files of so many slots, so that they are old when they are needed.

        :raises ParameterError: that can't be done.
        """
        try:
            for number in range(size):
                os.close(self._slot(number)[0])
        except (OSError, _NotOurs) as error:
            why = error if isinstance(error, _NotOurs) else error.strerror
            raise ParameterError(
                f"share={self.share!r}: no file can be made in the folder {self.path}: {why}. Make room "
                "there, or name another folder: share='/path'"
            ) from None

    @property
    def is_new(self) -> bool:
        """Was :meth:`lock` asked for a slot that is too new to be locked, a moment ago?"""
        return time.monotonic() < self._new_until

    def lock(self, number: int, moved: bool = False) -> Lease | None:
        """Lock a slot if it is free; else return None.

        :param moved: for a lease whose own file was deleted: also a file that is new.
        :raises OSError: the file can't be opened or made.
        """
        try:
            fd, young = self._slot(number)
        except _NotOurs:
            return None
        if young and not moved:
            self._new_until = time.monotonic() + YOUNG
        try:
            if moved or not young:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # It may have been deleted between the two: then it is nobody's.
                if self._is_slot(fd, number):
                    lease, fd = Lease(number, fd), -1
                    self._new_until = -math.inf
                    return lease
        except BlockingIOError:
            pass
        finally:
            if fd >= 0:
                os.close(fd)
        return None

    def adopt(self, number: int, fd: int) -> Lease | None:
        """Return the lease whose descriptor another process has passed; None, and closed, if it is none.

        It is one if the descriptor is that file's, and has its lock: to lock it again says so.
        """
        try:
            if number < MOST and self._is_slot(fd, number):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.set_inheritable(fd, False)
                lease, fd = Lease(number, fd), -1
                return lease
        except OSError:
            pass
        finally:
            if fd >= 0:
                os.close(fd)
        return None

    def _slot(self, number: int) -> tuple[int, bool]:
        """Open the file of a slot, which is made if there is none; is it new?"""
        name, flags = f"slot.{number}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(name, flags, dir_fd=self.fd)
        except FileNotFoundError:
            fd = os.open(name, flags | os.O_CREAT, 0o600, dir_fd=self.fd)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            os.close(fd)
            raise _NotOurs(f"{name} is not a file of this user's")
        # A clock that was set back makes no file new.
        return fd, 0.0 <= time.time() - found.st_mtime < YOUNG

    def _is_slot(self, fd: int, number: int) -> bool:
        try:
            here, there = os.fstat(fd), os.stat(f"slot.{number}", dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(here.st_mode) and _identity(here) == _identity(there)

    # -- mailboxes ---------------------------------------------------------------------------------

    def boxes(self) -> Iterator[str]:
        """The names of all mailboxes in it, also of processes that have died."""
        with contextlib.suppress(OSError):
            yield from (name for name in os.listdir(self.fd) if BOX.fullmatch(name))

    def has(self, box: str) -> bool:
        """Is there a mailbox of that name?"""
        return os.access(box, os.F_OK, dir_fd=self.fd, follow_symlinks=False)

    def remove(self, box: str) -> None:
        """Remove the mailbox of a process that has died."""
        with contextlib.suppress(OSError):
            os.unlink(box, dir_fd=self.fd)


class _NotOurs(Exception):
    """What is there is not what it should be: the text says why."""


def _name_of_user() -> str:
    return f"sqla_queries_pool.{os.geteuid()}"


def _identity(found: os.stat_result) -> tuple[int, int]:
    """Return what tells one file or folder from another."""
    return found.st_dev, found.st_ino


def _own_folder(path: str, above: int) -> int:
    """Open a folder that is this user's alone; it is made if there is none.

    :param above: the descriptor of the folder that it is in, -1 where the path says it.
    """
    at = None if above < 0 else above
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700, dir_fd=at)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    except NotADirectoryError:
        raise _NotOurs("it is no folder, or a symlink to one") from None
    found = os.fstat(fd)
    why = ""
    if found.st_uid != os.geteuid():
        why = f"it belongs to the user with the id {found.st_uid}"
    elif found.st_mode & 0o077:
        why = f"others may use it (mode {stat.S_IMODE(found.st_mode):04o})"
    if why:
        os.close(fd)
        raise _NotOurs(why)
    return fd
