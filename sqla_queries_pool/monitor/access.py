"""Who may see the page by default: clients on this machine that do not come through a proxy."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

_FORWARDED = re.compile(r"""for\s*=\s*("[^"]*"|[^;,\s]*)""", re.IGNORECASE)
_FROM = re.compile(r"HTTP_(.*_)?(FORWARDED_FOR|(CLIENT|SOCKET)?_?(IP|IPV6|ADDR|ADDRESS))")
"""Headers in which proxies name the client; lists of addresses.  By a pattern, for each proxy has its own:
``X-Real-IP``, ``X-Client-IP``, ``Fly-Client-IP``, ``X-Azure-ClientIP``, ``X-Envoy-External-Address``."""
_MARKS = (
    *("HTTP_X_FORWARDED", "HTTP_FORWARDED", "HTTP_VIA", "HTTP_CDN_LOOP"),
    *("HTTP_X_ENVOY_", "HTTP_FLY_", "HTTP_CF_", "HTTP_X_AMZN_"),
)
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
    found = [part for name in environ if _FROM.fullmatch(name) for part in str(environ[name]).split(",")]
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
