"""Is this socket alive?  Asked without a round trip (design 12).

A connection that nobody uses has nothing to say: its socket is readable only if the server has hung up,
or has sent something unasked.  Which of these it is, a look at the bytes tells; they stay where they are,
for the driver.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from ..budget.slots import UNKNOWN, Attachment

AVAILABLE: Final = hasattr(select, "poll") and hasattr(socket, "MSG_DONTWAIT")
"""Has the platform the calls?  Windows has no ``poll``; ``select`` knows no descriptor above 1023."""

Poll = Callable[[int], Any]
"""Called with 0, returns something true if there may be news: then :func:`look`."""

ALIVE, DEAD, DOUBT = "alive", "dead", "in doubt"
POLL, PING, NONE = "poll", "ping", "none"
"""What is done to see whether an idle connection is alive; :attr:`.Statistics.liveness` explains them."""

_HUNG_UP = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)
_UNASKED: Final = b"ANS"
"""Types of messages that a healthy server sends unasked: notification, notice, parameter status.
https://www.postgresql.org/docs/current/protocol-message-formats.html"""
_PEEKED: Final = 8192
_CLOSED: Final = (errno.EBADF, errno.ENOTCONN)
SHUT_DOWN: Final = "shut a connection down"
_anything: Final[Poll] = str  # the same: what it returns, "0", may be news
_nothing: Final[Poll] = dict[int, Any]().get  # without a frame of Python's; what it returns, None, is no news


Failed = Callable[[str, object], None]
"""Called with what could not be done, and why: :class:`.Failures`."""


def unheard(_: str, __: object) -> None:
    """Nobody is told."""


def way(seen: bool, ping_after: float) -> str:
    """Return what is done to see whether a connection is alive.

    :param seen: does its driver tell its socket?
    :param ping_after: seconds after which an idle one is pinged, 0 for always, ``inf`` for never.
    """
    if seen and ping_after:
        return POLL if AVAILABLE else PING
    return PING if ping_after < math.inf else NONE


def of_all(attachments: Iterable[Attachment]) -> str:
    """Return what is done for some engines, each word once."""
    words = {attachment.liveness for attachment in attachments} - {UNKNOWN}
    return ", ".join(sorted(words)) or UNKNOWN


def poll_of(handle: Any) -> Poll:
    """Return what tells at once whether there is news on the socket of a connection.

    The functions here take the :attr:`.Slot.socket` of a connection: anything that tells its descriptor.
    Where the driver does not tell its descriptor there never is any; where the platform can't look there
    always may be.
    """
    try:
        fd = handle.fileno()
    except Exception:  # no such method, or closed
        return _nothing
    if not isinstance(fd, int) or fd < 0:
        return _nothing
    if not AVAILABLE:
        return _anything
    poll = select.poll()
    poll.register(fd, select.POLLIN | getattr(select, "POLLRDHUP", 0))
    return poll.poll


def look(handle: Any, poll: Poll, failed: Failed = unheard) -> str:
    """Return whether a connection is alive, dead or in doubt, which takes a ping to tell.

    Dead is one that the server has hung up on, or said an error to: it says why before it hangs up.
    In doubt is what can't be read: under TLS everything is encrypted, and one look reads 8 KB.

    :param failed: is called for a socket that can't be read at all.
    """
    if not AVAILABLE:
        return DOUBT
    news = poll(0)
    if not news:
        return ALIVE
    if any(events & _HUNG_UP for _, events in news):
        return DEAD
    try:
        fd = handle.fileno()
    except Exception:  # closed behind the pool's back
        return DEAD
    if fd < 0:  # so is a socket of Python's
        return DEAD
    try:
        with borrowed(fd) as end:
            return _read(end.recv(_PEEKED, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return ALIVE  # it was read meanwhile
    except ConnectionError:
        return DEAD
    except OSError as error:  # no socket at all
        failed("look at a socket, so the server is pinged", error)
        return DOUBT


def hang_up(handle: Any, how: int = socket.SHUT_RDWR, failed: Failed = unheard) -> bool:
    """Shut the socket down, without a word to the server and without closing the descriptor.

    A read from it or a write to it, in the driver or in TLS, finds its end at once; so what follows
    on a connection that is half dead, its close for one, can't block.

    :param how: ``SHUT_WR`` where somebody wants to see the server's end of it, too.
    :param failed: is told where it can't be done, unless it is closed already.
    :return: is it shut down, or closed?
    """
    if handle is None:  # it was closed meanwhile
        return True
    try:
        fd = handle.fileno()
    except AttributeError:
        failed(SHUT_DOWN, "its driver does not tell its socket")
        return False
    except Exception:  # closed
        return True
    try:
        with borrowed(fd) as end:
            end.shutdown(how)
    except OSError as error:
        if error.errno not in _CLOSED:
            failed(SHUT_DOWN, error)
            return False
    except Exception as error:  # it is no descriptor
        failed(SHUT_DOWN, error)
        return False
    return True


def traffic(handle: Any) -> tuple[int, ...] | None:
    """How many bytes were ever acknowledged and received, where that can be known: TCP on Linux.

    ``tcpi_bytes_acked`` and ``tcpi_bytes_received`` of ``struct tcp_info``, since Linux 4.1; see tcp(7).
    """
    try:
        with borrowed(handle.fileno()) as end:
            info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        return struct.unpack_from("=QQ", info, 120)
    except Exception:  # no TCP, no Linux, no socket
        return None


@contextlib.contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket object for a descriptor that is and remains another's.

    It has a duplicate: an exception from outside may leave it to the collector, which closes what it has.
    """
    blocking = os.get_blocking(fd)
    duplicate = os.dup(fd)
    try:
        end = socket.socket(fileno=duplicate)
    except OSError:  # no socket at all
        os.close(duplicate)
        raise
    try:
        yield end
    finally:
        end.close()
        if os.get_blocking(fd) != blocking:  # socket.setdefaulttimeout() was called
            os.set_blocking(fd, blocking)


class PingTimeout:
    """Hangs a connection up that takes too long to answer.

    A driver that waits for an answer can't be told to stop waiting, least of all by another thread; but its
    socket can be ended under it.

    :param failed: is told where it can't.
    """

    def __init__(self, handle: Any, failed: Failed = unheard) -> None:
        self._handle: Any = handle
        self._failed = failed
        self._lock = threading.Lock()
        self.expired = False
        """Has it hung up?"""

    def sweep(self) -> None:
        """It took too long."""
        with self._lock:
            if self._handle is not None:
                self.expired = True
                hang_up(self._handle, failed=self._failed)

    def neglected(self) -> None:
        """The housekeeper's thread has died."""

    def start(self, schedule: Callable[[PingTimeout, float], None], seconds: float) -> None:
        """Have :meth:`sweep` called in so many seconds, by ``schedule``: the housekeeper's."""
        schedule(self, seconds)

    def cancel(self) -> None:
        """There was an answer."""
        with self._lock:
            self._handle = None


def _read(peeked: bytes) -> str:
    """Judge by the messages that are waiting: a byte of type, then the length, which counts itself."""
    if not peeked:
        return DEAD  # the end of the stream
    position = 0
    while position < len(peeked):
        kind = peeked[position : position + 1]
        if kind == b"E":
            return DEAD
        length = int.from_bytes(peeked[position + 1 : position + 5], "big")
        if kind not in _UNASKED or length < 4:
            return DOUBT
        position += 1 + length
    # Behind what fills the look may be an error.  And where the socket is full the end can't be seen: it has
    # not arrived.
    return ALIVE if len(peeked) < _PEEKED else DOUBT
