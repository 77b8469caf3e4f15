"""Who may see the page by default: clients on this machine that do not come through a proxy."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

_FORWARDED = re.compile(r"""for\s*=\s*("[^"]*"|[^;,\s]*)""", re.IGNORECASE)
_FROM = ("HTTP_X_FORWARDED_FOR", "HTTP_X_REAL_IP", "HTTP_TRUE_CLIENT_IP", "HTTP_CF_CONNECTING_IP")
"""Headers in which proxies name the client; lists of addresses."""
_MARKS = ("HTTP_X_FORWARDED", "HTTP_FORWARDED", "HTTP_VIA")
"""How headers begin that only proxies add."""


def refusal(environ: Mapping[str, Any]) -> str | None:
    """Why a request is none of this machine's own; None if it is."""
    if not is_loopback(str(environ.get("REMOTE_ADDR", ""))):
        return "The request comes from another machine, or from an unknown address."
    if not all(is_loopback(address) for address in _clients(environ)):
        return "The request comes through a proxy, from a client on another machine."
    if not _is_local_name(str(environ.get("HTTP_HOST", ""))):
        # A page of somebody else's may have its own name lead here, and so make a browser ask us for it.
        return "The request's Host header does not name this machine (localhost, 127.0.0.1)."
    return None


def is_loopback(address: str) -> bool:
    """Is it a loopback address: of IPv4, IPv6, or IPv4 in IPv6?"""
    try:
        parsed = ipaddress.ip_address(address.strip().partition("%")[0])
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _clients(environ: Mapping[str, Any]) -> list[str]:
    """The addresses that proxies say a request comes from; "" for what is none."""
    found = [part for name in _FROM if name in environ for part in str(environ[name]).split(",")]
    found += _FORWARDED.findall(str(environ.get("HTTP_FORWARDED", "")))
    if not found and any(name.startswith(_MARKS) for name in environ):
        found.append("")  # there was a proxy, and it does not say for whom
    return [_without_port(address.strip().strip('"')) for address in found]


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _is_local_name(host: str) -> bool:
    name = _without_port(host.strip()).lower()
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)
