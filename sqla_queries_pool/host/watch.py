"""A watch on a folder: its descriptor is readable when something in it, or the way to it, is another by now.

Linux's inotify(7).  Where there is none, or no more can be had, the folder is looked at all the time instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
ITSELF = IN_DELETE_SELF | IN_MOVE_SELF
INSIDE = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE


class Watch:
    """Watches one folder.

    :param path: the folder.
    :raises OSError: it can't be watched here.
    """

    def __init__(self, path: str) -> None:
        self._fd = -1
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            begin, add = libc.inotify_init1, libc.inotify_add_watch
        except AttributeError:
            raise OSError("there is no inotify") from None
        self._fd = begin(os.O_NONBLOCK | os.O_CLOEXEC)
        events, at = INSIDE | ITSELF, os.path.realpath(path)
        while self._fd >= 0 and add(self._fd, os.fsencode(at), events) >= 0:
            if at == os.path.dirname(at):
                return
            events, at = ITSELF, os.path.dirname(at)
        error = ctypes.get_errno()
        self.close()
        raise OSError(error, os.strerror(error), at)

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._fd

    def seen(self) -> bool:
        """Has anything happened since the last call?"""
        happened = False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 65536):
                happened = True
        return happened

    def close(self) -> None:
        """Watch no longer."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
