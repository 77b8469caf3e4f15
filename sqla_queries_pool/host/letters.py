"""Letters between the processes that share a budget: datagrams of a Unix socket in the budget's folder.

* ``Ask``: I have so many, want so many, and my first checkout has waited for so long.  To all, repeatedly.
* ``Offer``: to one that asks: I could give you so many.  It binds nobody.
* ``Take``: to one that offered: give me so many.
* ``Passed``: here is one; its descriptor is in the letter (``SCM_RIGHTS``), and the lock is the reader's.
* ``Here``: who I am and what I have, to one that wants to know.

A letter may get lost, come late, twice or after another; nothing depends on it.  It is read with mistrust:
bounded, checked, and forgotten if anything in it is not as it should be.  The worst that one can do is to
have an idle connection closed.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import secrets
import socket
from typing import Any, Final, NamedTuple, TypeAlias, get_type_hints

from .lease import BOX, Folder

LONGEST = 1024
"""Bytes of a letter."""
LONGEST_TEXT = 100
"""Characters of a text in a letter."""
MOST_AT_ONCE = 64
"""Letters that are read in one go: who sends more waits for its turn."""
_FDS = 4
"""Descriptors for which there is room in a letter; one is right."""


class Ask(NamedTuple):
    """I want more than I have, or want to know who is there."""

    have: int
    want: float
    """What it would use: a mean of the last second, or 0 of one that only wants to know."""
    waited: float
    """Seconds that its first checkout has waited, or that it has wanted more.  Clocks may differ, durations
    don't."""
    tell: bool
    """Is an answer wanted in any case?"""


class Offer(NamedTuple):
    """I could give something."""

    spare: int
    """How many of which it has no need itself."""
    share: float
    """Without any to spare: what would be left to it, as a part of what it wants."""
    turn: float
    """Seconds for which it has had its last one."""


class Take(NamedTuple):
    """Then give me so many."""

    number: int


class Passed(NamedTuple):
    """Here is one: the number of its file."""

    number: int


class Here(NamedTuple):
    """Who I am and what I have."""

    have: int
    want: float
    waiting: int
    process: int
    """Its process id, as it sees it."""
    program: str
    database: str
    budget: int


Letter: TypeAlias = Ask | Offer | Take | Passed | Here
KINDS: Final[dict[str, Any]] = {kind.__name__.lower(): kind for kind in (Ask, Offer, Take, Passed, Here)}
_FIELDS: Final = {kind: list(get_type_hints(kind).values()) for kind in KINDS.values()}


def write(letter: Letter) -> bytes:
    """Return a letter as it is sent."""
    return json.dumps([type(letter).__name__.lower(), *letter]).encode()


def read(data: bytes) -> Letter | None:
    """Return what was sent, or None if it is not a letter."""
    if len(data) > LONGEST:
        return None
    try:
        words = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(words, list) or not words or not isinstance(words[0], str):
        return None
    kind = KINDS.get(words[0])
    if kind is None or len(words) != 1 + len(_FIELDS[kind]):
        return None
    if not all(_is(wanted, value) for wanted, value in zip(_FIELDS[kind], words[1:], strict=True)):
        return None
    letter: Letter = kind(*words[1:])
    return letter


def _is(wanted: type, value: object) -> bool:
    if wanted is str:
        return isinstance(value, str) and len(value) <= LONGEST_TEXT
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    if not isinstance(value, int if wanted is int else (int, float)):
        return False
    return 0 <= value <= (2**32 if wanted is int else 1e9)  # NaN is neither


_NOBODY = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTSOCK, errno.EPROTOTYPE)
SENT, FULL, GONE = "sent", "full", "gone"
"""What became of a letter: it is in the other's mailbox; there is no room in it now; there is nobody."""


def _path(folder: Folder, name: str) -> str:
    # A socket's path may have 107 bytes; through the descriptor it is short,
    # and nobody can get in between.
    short = f"/proc/self/fd/{folder.fd}"
    return os.path.join(short if os.path.isdir(short) else folder.path, name)


def is_read(folder: Folder, name: str) -> bool:
    """Does the process of that mailbox live?  It is not woken by the question."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            probe.connect(_path(folder, name))
    except OSError as error:
        return error.errno not in _NOBODY
    return True


class Mailbox:
    """Where one process gets its letters.

    :param folder: the budget's folder.
    :param size: the budget that the process states; part of the name, so that others see it.
    :raises OSError: no socket can be made there.
    """

    def __init__(self, folder: Folder, size: int) -> None:
        self._folder = folder
        self.size = size
        self.name = f"box.{os.getpid()}.{size}.{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0))
        try:
            self._socket.setblocking(False)
            self._socket.bind(_path(self._folder, self.name))
            os.chmod(self.name, 0o600, dir_fd=folder.fd)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, name: str, letter: Letter, fd: int = -1) -> str:
        """Send a letter, with a descriptor or without; return :data:`SENT`, :data:`FULL` or :data:`GONE`.

        Never waits.
        """
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            self._socket.sendmsg([write(letter)], passed, 0, _path(self._folder, name))
        except OSError as error:
            return GONE if error.errno in _NOBODY else FULL
        return SENT

    def receive(self) -> tuple[str, Letter | None, int] | None:
        """Return the next letter, its sender and its descriptor (-1 for none), or None if there is none.

        The letter is None if it is not one; then it had no descriptor either, as far as the caller knows.
        """
        room = socket.CMSG_SPACE(_FDS * array.array("i").itemsize)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        try:
            data, ancillary, got, address = self._socket.recvmsg(LONGEST + 1, room, flags)
        except OSError:
            return None
        fds = array.array("i")
        for level, kind, passed in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(passed[: len(passed) - len(passed) % fds.itemsize])
        name = os.path.basename(os.fsdecode(address)) if isinstance(address, (str, bytes)) else ""
        letter = (
            read(data) if BOX.fullmatch(name) and not got & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else None
        )
        if letter is not None and len(fds) == isinstance(letter, Passed):
            return name, letter, fds[0] if fds else -1
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        return name, None, -1

    def close(self) -> None:
        """Close it without removing it: in a forked child it is still the parent's."""
        self._socket.close()

    def remove(self) -> None:
        """Close it, and remove its name."""
        self._folder.remove(self.name)
        self.close()
