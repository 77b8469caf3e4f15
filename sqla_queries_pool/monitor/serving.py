"""Serves the page alone, to this machine."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

HOST = "127.0.0.1"
MOST = 32
"""How many requests are served at once, with a thread for each."""
PATIENCE = 10.0
"""Seconds for which nothing may arrive from a client, or be taken by it."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128  # with five, some of many clients at once wait for a second

    def __init__(self, *args: Any) -> None:
        self._served: dict[socket.socket, None] = {}
        """The connections, the oldest first."""
        self._lock = threading.Lock()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a request in a thread.  One too many ends the oldest: a whole request takes a moment, so that
        is most likely one that never ends."""
        with self._lock:
            if len(self._served) >= MOST:
                oldest = next(iter(self._served))
                del self._served[oldest]
                with contextlib.suppress(OSError):  # it has just ended
                    oldest.shutdown(socket.SHUT_RDWR)
            self._served[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """It was served."""
        with self._lock:
            self._served.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is that the client has left, or was too slow."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        # HTTPServer's asks the resolver for a name of the address, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


class Handler(WSGIRequestHandler):
    """Reads one request, and answers it."""

    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks once per second."""


def server(application: Any, port: int) -> WSGIServer:
    """A server for this machine's own clients, with a thread for each request, :data:`MOST` at once.

    :param port: 0 for one that is free.
    :raises OSError: the port is taken.
    """
    made = _Server((HOST, port), Handler)
    made.set_app(application)
    return made
