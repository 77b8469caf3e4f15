"""Serves the page alone, to this machine."""

from __future__ import annotations

import socketserver
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

HOST = "127.0.0.1"


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's asks the resolver for a name of the address, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks once per second."""


def server(application: Any, port: int) -> WSGIServer:
    """A server for this machine's own clients, with a thread for each request.

    :param port: 0 for one that is free.
    :raises OSError: the port is taken.
    """
    made = _Server((HOST, port), _Handler)
    made.set_app(application)
    return made
