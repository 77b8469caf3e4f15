"""The WSGI application."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, quote

from . import access, page
from .data import collect
from .history import History

Environ = dict[str, Any]
HTML, JSON = "text/html; charset=utf-8", "application/json"
HEADERS = [
    ("Content-Security-Policy", page.POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
]
HINT = "To let others see it, use Monitor(allow=…), a function of the WSGI environ that returns a bool."


class Monitor:
    """A page that shows all pools of this process, live; and the same as JSON, at ``data.json``.

    A WSGI application: serve it alone, or mount it in another.  It changes nothing.

    :param allow: given the WSGI environ of a request; may it see the page?  Without it, only clients on this
        machine may, by a name of this machine, and not through a proxy for others.
    """

    def __init__(self, allow: Callable[[Environ], bool] | None = None) -> None:
        if allow is not None and not callable(allow):
            raise TypeError(f"allow={allow!r}: pass a function of the WSGI environ that returns a bool")
        self._allow = allow
        self._history = History()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        status, kind, body, *more = self._answer(environ)
        encoded = body.encode()
        headers = [("Content-Type", kind), ("Content-Length", str(len(encoded))), *HEADERS, *more]
        start_response(status, headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else encoded]

    def _answer(self, environ: Environ) -> tuple[Any, ...]:
        if refused := self._refused(environ):
            return "403 Forbidden", HTML, page.message("Access denied", *refused)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            said = page.message("This page is read-only", "It answers GET and HEAD.")
            return "405 Method Not Allowed", HTML, said, ("Allow", "GET, HEAD")
        path = environ.get("PATH_INFO", "")
        only = parse_qs(environ.get("QUERY_STRING", "")).get("pool", [None])[0]
        if path in ("", "/"):
            data = collect(self._history, only, detailed=page.DETAILED)
            return "200 OK", HTML, page.document(data, _prefix(environ))
        if path == "/data.json":
            return "200 OK", JSON, json.dumps(collect(self._history, only), separators=(",", ":"))
        return "404 Not Found", HTML, page.message("Page not found")

    def _refused(self, environ: Environ) -> tuple[str, ...]:
        """Why a client may not see the page; empty if it may."""
        if self._allow is not None:
            return (
                () if self._allow(environ) else ("The application that serves this page does not allow it.",)
            )
        why = access.refusal(environ)
        return (
            () if why is None else (why, "By default, only clients on this machine may see this page.", HINT)
        )


def _prefix(environ: Environ) -> str:
    """Where it is mounted, as the beginning of a path: never of another host's."""
    prefix: str = environ.get("SCRIPT_NAME", "").strip("/")
    return f"/{quote(prefix.encode('latin-1'))}" if prefix else ""
