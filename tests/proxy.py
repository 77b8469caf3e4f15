"""A TCP proxy in front of a PostgreSQL server, whose faults are switched while it runs.

``with Proxy(host, port) as proxy: create_engine(proxy.url(pg_url))``
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

from sqlalchemy import make_url

HOST = "127.0.0.1"
CHUNK = 65536
LIMIT = 16 * CHUNK
"""Bytes for one end above which no more is read from the other."""
BACKLOG = 128
SECONDS = 20.0
"""The longest that a method may take on a machine that is busy with other things."""
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
GSS_REQUEST = struct.pack("!ii", 8, 80877104)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Stands in front of ``host:port`` and passes on what comes, until it is told otherwise.

    When a method has returned, its mode is in force; it holds until the next method.  Of connections that
    are held nothing is read: the kernel keeps what was sent, also that one end was closed, and it goes on
    later, as after a network partition.  But the kernel acknowledges it: keepalive and ``tcp_user_timeout``
    find nothing wrong.

    :param tls: answer PostgreSQL's request for TLS, with a certificate for 127.0.0.1 and localhost by
        ``certificate_authority`` (needs trustme); plain towards the server.
    :param unix: a folder; listen there, too, as PostgreSQL does.  There is no RST, a reset is a close.
    """

    def __init__(self, host: str, port: int, *, tls: bool = False, unix: Path | None = None) -> None:
        self._server = (host, port)
        self._context: ssl.SSLContext | None = None
        if tls:
            import trustme

            self.certificate_authority = trustme.CA()
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.certificate_authority.issue_cert(HOST, "localhost").configure_cert(self._context)
        # Bound, and never listening: it keeps the port while refuse() holds.  Nobody else gets it then, and
        # no client happens to connect from it to itself, which TCP allows.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((HOST, 0))
        self.port: int = self._reserved.getsockname()[1]
        self.folder = unix
        self.accepted = 0
        """How many connections there ever were."""
        self._listeners: list[socket.socket] = []
        self._links: set[_Link] = set()
        self._hold_new = False
        self._delay = 0.0
        self._selector = DefaultSelector()
        self._bell, self._ear = socket.socketpair()  # wakes the thread for an order
        self._selector.register(self._ear, EVENT_READ)
        self._one_at_a_time = threading.Lock()
        self._order: tuple[Callable[[], None], Future[None]] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"proxy {self.port}", daemon=True)
        self._thread.start()
        try:
            self.pass_on()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def url(self, url: str, *, unix: bool = False) -> str:
        """The SQLAlchemy URL with the proxy in place of its host and port."""
        changed = make_url(url).set(host=HOST, port=self.port)
        if unix:
            query = {"host": str(self.folder), "port": str(self.port)}
            changed = make_url(url)._replace(host=None, port=None).update_query_dict(query)
        return changed.render_as_string(hide_password=False)

    @property
    def connections(self) -> int:
        """How many connections are open; of one that is held, its end is not seen."""
        return len(self._links)

    def pass_on(self) -> None:
        """Pass on everything, also what was held until now."""
        self.delay(0.0)

    def delay(self, seconds: float) -> None:
        """Pass on each chunk this long after it came."""
        self._switch(hold=False, hold_new=False, delay=seconds)

    def blackhole(self) -> None:
        """Accept connections, keep all of them open, and let no byte through in either direction."""
        self._switch(hold=True, hold_new=True)

    def accept_and_hang(self) -> None:
        """Accept connections and hold them; those that there are go on as they were."""
        self._switch(hold_new=True)

    def refuse(self) -> None:
        """Refuse new connections; those that there are go on as they were."""
        self._do(self._close_listeners)

    def reset(self) -> None:
        """Reset the connections that there are, also towards the server.  What was under way is lost."""
        self._do(lambda: self._end_all(reset=True))

    def close(self) -> None:
        """End the connections that there are, also towards the server.  What was under way is lost."""
        self._do(lambda: self._end_all(reset=False))

    def stop(self) -> None:
        """End everything.  May be called again."""
        with self._one_at_a_time:
            if self._stopped:
                return
            self._stopped = True
            self._bell.send(b"!")
            self._thread.join()
            self._accept()  # closing the listeners would reset who has just connected
            self._end_all(reset=False)
            self._close_listeners()
            if self.folder is not None:
                self._socket_file.unlink(missing_ok=True)
            for closeable in (self._reserved, self._selector, self._bell, self._ear):
                closeable.close()

    # -- orders: the thread alone touches sockets, between two rounds, so that none sees half a switch -----

    def _do(self, action: Callable[[], None]) -> None:
        with self._one_at_a_time:
            if self._stopped:
                raise RuntimeError("the proxy is stopped")
            done: Future[None] = Future()
            self._order = action, done
            self._bell.send(b"!")
            done.result(SECONDS)

    def _obey(self) -> None:
        self._ear.recv(CHUNK)
        if self._order is None:
            return  # it is stop()
        (action, done), self._order = self._order, None
        try:
            action()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _switch(self, *, hold_new: bool, hold: bool | None = None, delay: float | None = None) -> None:
        def action() -> None:
            if not self._listeners:
                self._listen()
            self._hold_new = hold_new
            self._delay = self._delay if delay is None else delay
            for link in self._links:
                link.held = link.held if hold is None else hold

        self._do(action)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped:
            ordered = False
            for key, events in self._selector.select(self._until_due()):
                if key.fileobj is self._ear:
                    ordered = True
                elif key.data is None:
                    self._accept()
                elif events & EVENT_READ:
                    self._receive(*key.data)
            if ordered:  # last, so that who has connected before the order is accepted before it
                self._obey()
            for link in list(self._links):
                self._move(link)

    def _until_due(self) -> float | None:
        if not self._delay:
            return None
        first = [end.queue[0][0] for link in self._links if not link.held for end in link.ends if end.queue]
        return max(0.0, min(first) + self._delay - time.monotonic()) if first else None

    def _listen(self) -> None:
        if self.folder is not None:  # first, because it may fail
            self._socket_file.unlink(missing_ok=True)  # refuse() leaves it, as a server that crashed does
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.bind(str(self._socket_file))
            except OSError:
                listener.close()
                raise
            listener.listen(BACKLOG)
            self._listeners.append(listener)
        self._listeners.append(socket.create_server((HOST, self.port), backlog=BACKLOG))
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, EVENT_READ)

    def _close_listeners(self) -> None:
        while self._listeners:
            with self._listeners.pop() as listener:
                self._selector.unregister(listener)

    @property
    def _socket_file(self) -> Path:
        assert self.folder is not None, "no unix socket was asked for"
        return self.folder / f".s.PGSQL.{self.port}"

    def _accept(self) -> None:
        for listener in self._listeners:
            with suppress(BlockingIOError):
                while True:
                    client = _End(listener.accept()[0])
                    self._links.add(_Link(client, self._hold_new, self._context))
                    self.accepted += 1

    def _receive(self, link: _Link, end: _End) -> None:
        if link not in self._links:
            return  # ended in this round
        try:
            link.take(end, end.socket.recv(CHUNK))
        except BlockingIOError:
            pass
        except OSError:
            self._end(link, reset=True)

    def _move(self, link: _Link) -> None:
        due = time.monotonic() - self._delay
        try:
            if not link.held:
                if link.server is None:
                    link.server = _End(socket.create_connection(self._server, SECONDS))
                if any(end.flush(due) for end in link.ends):
                    self._end(link, reset=False)
                    return
        except OSError:  # what one side suffers, the other shall
            self._end(link, reset=True)
            return
        for end in link.ends:
            self._watch(end, link.wants(end, due), link)

    def _watch(self, end: _End, events: int, link: _Link) -> None:
        if events != end.watched:
            if end.watched:
                self._selector.unregister(end.socket)
            if events:
                self._selector.register(end.socket, events, (link, end))
            end.watched = events

    def _end_all(self, *, reset: bool) -> None:
        for link in list(self._links):
            self._end(link, reset=reset)

    def _end(self, link: _Link, *, reset: bool) -> None:
        for end in link.ends:
            self._watch(end, 0, link)
            with end.socket, suppress(OSError):
                if reset:
                    end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                else:
                    end.socket.shutdown(socket.SHUT_RDWR)
                    while end.socket.recv(CHUNK):  # to close with something unread would send RST
                        pass
        self._links.remove(link)  # last: who sees that there is none any more relies on its end


class _End:
    """One of the two sockets of a connection, and what is under way to it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.queue: deque[tuple[float, bytes]] = deque()
        """When each chunk came, and the chunk, which is empty for the end."""
        self.size = 0
        self.ended = False
        self.watched = 0

    def put(self, data: bytes) -> None:
        self.queue.append((time.monotonic(), data))
        self.size += len(data)

    def flush(self, due: float) -> bool:
        """Send what came until then, as far as that is possible; whether the end was reached."""
        while self.queue and self.queue[0][0] <= due:
            came, data = self.queue[0]
            if not data:
                return True
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                return False
            self.size -= sent
            self.queue.popleft()
            if sent < len(data):
                self.queue.appendleft((came, data[sent:]))
        return False


class _Link:
    """One connection through the proxy; towards the server none is opened while it is held from the start."""

    def __init__(self, client: _End, held: bool, context: ssl.SSLContext | None) -> None:
        self.client = client
        self.server: _End | None = None
        self.held = held
        self.tls = _Tls(context) if context else None

    @property
    def ends(self) -> list[_End]:
        return [self.client] if self.server is None else [self.client, self.server]

    def take(self, end: _End, data: bytes) -> None:
        """Put what came from one end where it belongs: with TLS, some of it is for the proxy to answer."""
        assert self.server is not None, "nothing is read before there is a server"
        other = self.client if end is self.server else self.server
        if not data:
            end.ended = True
            other.put(b"")  # PostgreSQL knows no half-closed connections: the end of one side ends both
        elif self.tls is None:
            other.put(data)
        else:
            convert = self.tls.from_client if end is self.client else self.tls.from_server
            for to, converted in zip((self.client, self.server), convert(data), strict=True):
                if converted:
                    to.put(converted)

    def wants(self, end: _End, due: float) -> int:
        """The events to wait for at an end."""
        if self.held:
            return 0
        other = self.client if end is self.server else self.server
        assert other is not None
        read = EVENT_READ if not end.ended and other.size < LIMIT else 0
        return read | (EVENT_WRITE if end.queue and end.queue[0][0] <= due else 0)


class _Tls:
    """The server's side of TLS; its methods return what is for the client and what is for the server."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._start: bytes | None = b""  # of what the client says, until it is known whether it wants TLS
        self._encrypted = False

    def from_client(self, data: bytes) -> tuple[bytes, bytes]:
        if self._start is not None:
            data, self._start = self._start + data, None
            if len(data) < len(SSL_REQUEST):
                self._start = data
                return b"", b""
            if data == GSS_REQUEST:
                self._start = b""  # it may ask for TLS next
                return b"N", b""
            self._encrypted = data == SSL_REQUEST
            return (b"S", b"") if self._encrypted else (b"", data)
        if not self._encrypted:
            return b"", data
        self._incoming.write(data)
        plain = []
        with suppress(ssl.SSLWantReadError):
            while chunk := self._object.read(CHUNK):  # shakes hands, too
                plain.append(chunk)
        return self._outgoing.read(), b"".join(plain)

    def from_server(self, data: bytes) -> tuple[bytes, bytes]:
        if not self._encrypted:
            return data, b""
        self._object.write(data)
        return self._outgoing.read(), b""
