"""The monitor: who may see it, what it shows, and that what it shows does no harm."""

from __future__ import annotations

import base64
import collections
import gc
import hashlib
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import inside
import psycopg2
import pytest
from fakes import FakeClock
from hazards import Handle, Thread, free_port, new_pid, new_pool
from sqlalchemy import create_engine, make_url, text

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.__main__ import main
from sqla_queries_pool.budget.stats import BOUNDS, Histogram
from sqla_queries_pool.insight.report import SHARED_FOR
from sqla_queries_pool.labels import labelled
from sqla_queries_pool.monitor import Monitor, access, markup, page, serving
from sqla_queries_pool.monitor.data import MOST_CHARACTERS, MOST_HOLDERS, MOST_TIMEOUTS, clean, duration
from sqla_queries_pool.monitor.history import GAP, LINGER, WINDOW, History, Sample, minute, quantile, series

pytestmark = pytest.mark.usefixtures("no_other_pools")
ROOT = Path(__file__).parent.parent
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'>&amp; \u202egnp.exe \x1b[31m \ud800"
"""A name that means harm to HTML, to attributes, to the order of what is read, to terminals and to UTF-8."""


@dataclass
class Answer:
    """What the application said."""

    status: str
    headers: dict[str, str]
    body: str

    def json(self) -> Any:
        return json.loads(self.body)


def ask(application: Any, path: str = "/", method: str = "GET", query: str = "", **environ: str) -> Answer:
    """Ask as a WSGI server does, from this machine, with a validator in between."""
    said: list[Any] = []
    full: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "127.0.0.1:8765",
    } | environ
    setup_testing_defaults(full)

    def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], object]:
        said.append((status, headers))
        return lambda data: None

    with closing(validator(application)(full, start_response)) as body:  # type: ignore[type-var]
        text = b"".join(body).decode()
    [(status, headers)] = said
    assert len({name for name, _ in headers}) == len(headers)
    return Answer(status, dict(headers), text)


def of_pool(pid: str, application: Any = None, path: str = "/data.json") -> Any:
    """What is shown of one pool."""
    answer = ask(application or Monitor(), path, query=f"pool={urllib.request.quote(pid, errors='replace')}")  # type: ignore[attr-defined]
    return answer.json()["pools"][0] if path == "/data.json" else answer.body


class Elements(HTMLParser):
    """What a browser finds in a page: elements with their attributes, scripts and styles, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.inline.get(self._inside, self.text).append(data)

    def names(self) -> set[str]:
        return {name for name, _ in self.found}

    def attributes(self) -> Iterator[tuple[str, str, str]]:
        for element, attributes in self.found:
            for name, value in attributes.items():
                yield element, name, value or ""


@contextmanager
def held(pool: QueriesPool, label: str | None = None, name: str | None = None) -> Iterator[None]:
    """Another thread has a connection meanwhile."""
    has, end = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            if label is not None:
                stack.enter_context(labelled(label))
            with closing(pool.connect()):
                has.set()
                assert end.wait(20)

    thread = Thread(hold, name=name)
    assert has.wait(20)
    try:
        yield
    finally:
        end.set()
        thread.join()


# -- who may look ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"REMOTE_ADDR": "127.3.2.1"},
        {"REMOTE_ADDR": "::1", "HTTP_HOST": "[::1]:8765"},
        {"REMOTE_ADDR": "::1%lo", "HTTP_HOST": "[::1]"},
        {"REMOTE_ADDR": "::ffff:127.0.0.1"},
        {"HTTP_HOST": "localhost"},
        {"HTTP_HOST": "LOCALHOST:8765"},
        {"HTTP_HOST": "shop.localhost:8765"},
        {"HTTP_X_FORWARDED_FOR": "127.0.0.1"},
        {"HTTP_X_FORWARDED_FOR": "::1, 127.0.0.1", "HTTP_X_FORWARDED_PROTO": "http"},
        {"HTTP_FORWARDED": 'for="[::1]:4711";proto=http, for=127.0.0.1'},
        {"HTTP_X_CLIENT_IP": "127.0.0.1", "HTTP_X_ENVOY_EXTERNAL_ADDRESS": "::1"},
        {
            "HTTP_X_SKIP": "yes",
            "HTTP_ACCEPT": "text/html",
            "HTTP_SEC_FETCH_SITE": "none",
            "HTTP_COOKIE": "ip=1",
        },
    ],
)
def test_without_a_rule_this_machine_may_look(environ: dict[str, str]) -> None:
    """IPv4, IPv6 and IPv4 in IPv6; also through a proxy that says that its client is on this machine."""
    assert ask(Monitor(), **environ).status == "200 OK"


@pytest.mark.parametrize(
    "environ",
    [
        {"REMOTE_ADDR": "192.0.2.1"},
        {"REMOTE_ADDR": "10.0.0.1"},
        {"REMOTE_ADDR": "2001:db8::1"},
        {"REMOTE_ADDR": "::ffff:192.0.2.1"},
        {"REMOTE_ADDR": "0.0.0.0"},
        {"REMOTE_ADDR": ""},
        {"REMOTE_ADDR": "localhost"},
        {"HTTP_X_FORWARDED_FOR": "192.0.2.1"},
        {"HTTP_X_FORWARDED_FOR": "127.0.0.1, 192.0.2.1"},
        {"HTTP_X_FORWARDED_FOR": "192.0.2.1, 127.0.0.1"},
        {"HTTP_X_FORWARDED_FOR": ""},
        {"HTTP_X_REAL_IP": "192.0.2.1"},
        {"HTTP_X_REAL_IP": "192.0.2.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1"},
        *[
            {f"HTTP_{name}": "192.0.2.1"}
            for name in (
                *("X_CLIENT_IP", "FLY_CLIENT_IP", "X_ENVOY_EXTERNAL_ADDRESS", "TRUE_CLIENT_IP", "CLIENT_IP"),
                *("X_CLUSTER_CLIENT_IP", "FASTLY_CLIENT_IP", "X_AZURE_CLIENTIP", "X_AZURE_SOCKETIP"),
                *("CF_CONNECTING_IP", "CF_CONNECTING_IPV6", "DO_CONNECTING_IP", "X_APPENGINE_USER_IP"),
                *("X_ORIGINAL_FORWARDED_FOR", "X_REMOTE_IP", "X_REMOTE_ADDR", "X_PROXYUSER_IP"),
            )
        ],
        {"HTTP_X_CLIENT_IP": "127.0.0.1, 192.0.2.1"},
        {"HTTP_X_CLIENT_IP": "127.0.0.1", "HTTP_FLY_CLIENT_IP": "192.0.2.1"},
        {"HTTP_X_ENVOY_EXPECTED_RQ_TIMEOUT_MS": "15000"},
        {"HTTP_FLY_REGION": "ams"},
        {"HTTP_CF_RAY": "230b030023ae2822-SJC"},
        {"HTTP_CDN_LOOP": "cloudflare"},
        {"HTTP_FORWARDED": "for=192.0.2.60;proto=http;by=127.0.0.1"},
        {"HTTP_FORWARDED": 'For="[2001:db8:cafe::17]:4711"'},
        {"HTTP_FORWARDED": "for=127.0.0.1, for=unknown"},
        {"HTTP_FORWARDED": "for=_hidden"},
        {"HTTP_FORWARDED": "proto=https"},
        {"HTTP_X_FORWARDED_PROTO": "https"},
        {"HTTP_X_FORWARDED_HOST": "localhost"},
        {"HTTP_VIA": "1.1 proxy"},
        {"HTTP_HOST": "evil.example"},
        {"HTTP_HOST": "evil.example:8765"},
        {"HTTP_HOST": "localhost.evil.example"},
        {"HTTP_HOST": "127.0.0.1.evil.example"},
        {"HTTP_HOST": "evil.example@127.0.0.1"},
        {"HTTP_HOST": "192.0.2.1"},
        {"HTTP_HOST": ""},
    ],
)
def test_without_a_rule_nobody_else_may_look(environ: dict[str, str]) -> None:
    """Not from elsewhere, through a proxy, nor by a name that leads here (DNS rebinding); with a remedy."""
    pool = new_pool()
    for path in ("/", "/data.json", "/nothing"):
        answer = ask(Monitor(), path, **environ)
        assert answer.status == "403 Forbidden"
        assert "Monitor(allow=" in answer.body
        assert inside.shared(pool).id not in answer.body


def test_a_request_without_a_host_header_is_refused() -> None:
    """As HTTP/1.0 allows it: nothing says by which name it came."""
    environ: dict[str, Any] = {"REMOTE_ADDR": "127.0.0.1"}
    assert access.refusal(environ) is not None
    assert access.refusal(environ | {"HTTP_HOST": "127.0.0.1"}) is None


def test_a_callable_decides_alone() -> None:
    """It is given the environ; who it lets in may come from anywhere, others get nothing, not even a hint."""
    monitor = Monitor(allow=lambda environ: environ.get("REMOTE_USER") == "ada")
    far = {"REMOTE_ADDR": "192.0.2.1", "HTTP_HOST": "shop.example", "HTTP_X_FORWARDED_FOR": "192.0.2.9"}
    assert ask(monitor, REMOTE_USER="ada", **far).status == "200 OK"
    refused = ask(monitor, REMOTE_USER="bob")
    assert refused.status == "403 Forbidden"
    assert "allow=" not in refused.body


def test_a_callable_that_fails_shows_nothing() -> None:
    """Its error is the server's to log; no page is made."""

    def fails(environ: dict[str, Any]) -> bool:
        raise RuntimeError("no session")

    with pytest.raises(RuntimeError, match="no session"):
        ask(Monitor(allow=fails))


def test_what_is_not_callable_is_refused_at_once() -> None:
    """`allow=True` would read as if everybody may."""
    with pytest.raises(TypeError, match="allow=True"):
        Monitor(allow=True)  # type: ignore[arg-type]


# -- how it answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "", "/data.json"])
def test_head_is_get_without_the_body(path: str) -> None:
    """The same status and headers."""
    whole, head = ask(Monitor(), path), ask(Monitor(), path, "HEAD")
    assert (head.status, head.body) == ("200 OK", "")
    assert whole.headers.keys() == head.headers.keys()
    assert int(whole.headers["Content-Length"]) == len(whole.body.encode())


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/data.json", "/nothing"])
def test_it_only_shows(path: str, method: str) -> None:
    """No method that changes anything has an answer."""
    answer = ask(Monitor(), path, method)
    assert answer.status == "405 Method Not Allowed"
    assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/nothing", "/data.json/", "/../data.json", "/page.js", "/<script>"])
def test_what_is_not_there_is_not_found(path: str) -> None:
    """404, and what was asked for is not repeated."""
    answer = ask(Monitor(), path)
    assert answer.status == "404 Not Found"
    assert "<script>" not in answer.body


@pytest.mark.parametrize(
    ("path", "environ"),
    [("/", {}), ("/data.json", {}), ("/nothing", {}), ("/", {"REMOTE_ADDR": "192.0.2.1"})],
)
def test_every_answer_is_guarded_by_headers(path: str, environ: dict[str, str]) -> None:
    """Nothing is kept, framed, guessed, sent on, or loaded from anywhere."""
    headers = ask(Monitor(), path, **environ).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize("environ", [{}, {"REMOTE_ADDR": "192.0.2.1"}])
def test_the_policy_knows_the_page_s_own_script_and_style_by_their_digests(environ: dict[str, str]) -> None:
    """What is inline is what the digests are of, and there is no style or handler in an attribute."""
    answer = ask(Monitor(), **environ)
    elements = Elements(answer.body)
    policy = answer.headers["Content-Security-Policy"]
    for kind in ("script", "style"):
        for inline in elements.inline[kind]:
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
    assert len(elements.inline["style"]) == 1
    assert not [name for _, name, _ in elements.attributes() if name == "style" or name.startswith("on")]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """Every address in it is relative, or data."""
    with held(new_pool()):
        elements = Elements(ask(Monitor()).body)
    addresses = [value for _, name, value in elements.attributes() if name in ("src", "href")]
    assert addresses
    assert all(value.startswith(("?", "/data.json", "data:image/svg+xml,")) for value in addresses)
    assert not elements.names() & {"img", "iframe", "object", "embed", "form", "base", "audio", "video"}
    assert "://" not in "".join(elements.inline["script"] + elements.inline["style"])


def test_without_javascript_the_page_shows_the_state_and_loads_again() -> None:
    """All of it is made by the server; the refresh is for who runs no scripts."""
    with held(pool := new_pool(), "order 4711"):
        body = of_pool(inside.shared(pool).id, path="/")
    assert re.search(r'<noscript><meta http-equiv="refresh" content="\d+"></noscript></?', body)
    assert "order 4711" in body


@pytest.mark.parametrize(
    ("mounted", "link"),
    [
        ("", "/data.json"),
        ("/pools", "/pools/data.json"),
        ("/a b/p", "/a%20b/p/data.json"),
        ('/"><script>', "/%22%3E%3Cscript%3E/data.json"),
        ("//evil.example", "/evil.example/data.json"),
    ],
)
def test_it_may_be_mounted_anywhere(mounted: str, link: str) -> None:
    """Its links lead to where it is mounted, with and without a slash at the end, never to another host."""
    monitor = Monitor()
    environ: dict[str, Any] = {"SCRIPT_NAME": mounted, "REQUEST_METHOD": "GET"}
    environ |= {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost", "PATH_INFO": ""}
    setup_testing_defaults(environ)
    body = b"".join(monitor(environ, lambda *_: None)).decode()
    links = [value for _, name, value in Elements(body).attributes() if name == "href"]
    assert [each for each in links if "data.json" in each] == [link]


def test_flask_serves_it_under_a_path() -> None:
    """With Werkzeug's DispatcherMiddleware, beside the application's own pages, as the documentation says."""
    pytest.importorskip("flask")
    from flask import Flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = Flask("shop")
    app.add_url_rule("/", view_func=lambda: "the shop")
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/pools": Monitor()})  # type: ignore[method-assign]
    client = app.test_client()
    assert client.get("/").text == "the shop"
    for path in ("/pools", "/pools/"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert 'href="/pools/data.json"' in answer.text
    assert json.loads(client.get("/pools/data.json").text)["process"] == os.getpid()
    assert client.post("/pools/").status_code == 405
    assert client.get("/pools/", environ_base={"REMOTE_ADDR": "192.0.2.1"}).status_code == 403


# -- what it shows -------------------------------------------------------------------------------------


def test_the_numbers_are_the_pool_s(eventually: Callable[..., None]) -> None:
    """Held, idle, waiting and limit as in its statistics; holders and waiting checkouts by name and label."""
    pool = new_pool(max_size=2)
    pid = inside.shared(pool).id
    with held(pool, "order 1", "web-1"), held(pool, "order 2", "web-2"):
        with labelled("order 3"):
            waiter = Thread(lambda: pool.connect().close(), name="web-3")
        eventually(lambda: inside.shared(pool).numbers.waiting == 1, "it waits")
        told = of_pool(pid)
        html = of_pool(pid, path="/")
    waiter.join()
    n = told["statistics"]
    assert (n["held"], n["idle"], n["waiting"], n["limit"]) == (2, 0, 1, 2)
    assert [(h["name"], h["label"]) for h in told["holders"]] == [("web-1", "order 1"), ("web-2", "order 2")]
    assert [w["name"] for w in told["waiting"]] == ["web-3"]
    assert "held 2, opening 0, closing 0, idle 0, waiting 1, limit 2" in html
    for name in ("web-1", "order 1", "web-2", "order 2", "web-3"):
        assert f"<bdi>{name}</bdi>" in html


def test_who_waited_in_the_queue_is_shown_with_a_label_of_its_own(eventually: Callable[..., None]) -> None:
    """Not with that of who had the connection before."""
    pool = new_pool(max_size=1)
    has, end = threading.Event(), threading.Event()

    def second() -> None:
        with labelled("second"), closing(pool.connect()):
            has.set()
            assert end.wait(20)

    with held(pool, "first"):
        thread = Thread(second)
        eventually(lambda: inside.shared(pool).numbers.waiting == 1, "it waits")
        assert [w["label"] for w in of_pool(inside.shared(pool).id)["waiting"]] == ["second"]
    assert has.wait(20)
    try:
        assert [h["label"] for h in of_pool(inside.shared(pool).id)["holders"]] == ["second"]
    finally:
        end.set()
        thread.join()


def test_the_last_timeouts_are_shown_with_their_reason_newest_first(clock: FakeClock) -> None:
    """Who held what at that moment, the cause, and what to do; and how many there were before."""
    pid = new_pid()
    PoolManager.create(pid, None, 1, clock)
    pool = new_pool(pid, timeout=0)
    with held(pool, "the culprit"):
        for _ in range(MOST_TIMEOUTS + 2):
            clock.now += SHARED_FOR
            with pytest.raises(CheckoutTimeout):
                pool.connect()
        told, html = of_pool(inside.shared(pool).id), of_pool(inside.shared(pool).id, path="/")
    assert len(told["timeouts"]) == MOST_TIMEOUTS
    assert told["more_timeouts"] == 2
    assert [each["taken_at"] for each in told["timeouts"]] == sorted(
        (each["taken_at"] for each in told["timeouts"]), reverse=True
    )
    last = told["timeouts"][0]
    assert last["holders"][0]["label"] == "the culprit"
    assert last["diagnosis"]["kind"] in html
    assert last["diagnosis"]["remedy"] in Elements(html).text
    assert last["seconds_ago"] >= 0


def test_of_a_tracked_checkout_it_is_told_where_it_was() -> None:
    """With `track_stacks=True`: this function's name, and no line of the program."""
    pool = new_pool(track_stacks=True)
    with closing(pool.connect()):
        told = of_pool(inside.shared(pool).id)
    [holder] = told["holders"]
    assert "test_of_a_tracked_checkout_it_is_told_where_it_was" in holder["stack"][-1]
    assert "closing(" not in "".join(holder["stack"])


def test_what_it_shows_does_no_harm(eventually: Callable[..., None]) -> None:
    """Names of databases, threads and labels are text: in elements, in attributes, in any direction."""
    pool = new_pool(pid=f"{HOSTILE[:-1]} {new_pid()}", max_size=1, timeout=0)
    monitor = Monitor()
    with held(pool, HOSTILE, HOSTILE):
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        pages = [ask(monitor).body, of_pool(inside.shared(pool).id, monitor, "/")]
        data = ask(monitor, "/data.json").body
    harmless = Elements(of_pool(inside.shared(new_pool()).id, monitor, "/"))
    for body in pages:
        elements = Elements(body)
        assert elements.inline == harmless.inline
        assert not elements.names() & {"img"}
        assert not [name for _, name, _ in elements.attributes() if name.startswith("on")]
        assert "\u202e" not in body
        assert "\x1b" not in body
        assert any("<script>alert(1)</script>" in text for text in elements.text)
    assert "<script>alert(1)</script>" in json.dumps(json.loads(data)["pools"])
    assert "\u202e" not in json.dumps(json.loads(data)["pools"][0]["statistics"], ensure_ascii=False)


def test_a_pool_id_that_is_no_unicode_is_shown() -> None:
    """It spoils neither the page nor the JSON for the others."""
    pool = new_pool(pid=f"\udcff {new_pid()}")
    monitor = Monitor()
    assert "\\udcff" in ask(monitor, "/data.json").body
    assert ask(monitor).status == "200 OK"
    del pool


def test_a_long_name_is_cut() -> None:
    """10 kB of a label are a line in the page."""
    with held(pool := new_pool(), "x" * 10_000):
        [holder] = of_pool(inside.shared(pool).id)["holders"]
        html = of_pool(inside.shared(pool).id, path="/")
    assert holder["label"] == f"{'x' * MOST_CHARACTERS}…"
    assert "x" * (MOST_CHARACTERS + 1) not in html


def test_neither_a_password_nor_a_query_is_shown(pg_url: str) -> None:
    """Not while one runs, and not after a timeout."""
    engine = create_engine(pg_url, poolclass=QueriesPool, max_size=1, pool_timeout=0, track_stacks=True)
    password = make_url(pg_url).password
    assert password
    monitor = Monitor()
    with engine.connect() as connection:
        connection.execute(text("SELECT 'a secret of the query'"))
        with pytest.raises(CheckoutTimeout):
            engine.connect()
        pid = inside.shared(engine.pool).id
        told = [of_pool(pid, monitor, "/"), json.dumps(of_pool(pid, monitor))]
    engine.dispose()
    for each in told:
        assert password not in each
        assert "secret of the query" not in each
    assert '"transaction": "in transaction"' in told[1]


def test_a_password_that_the_driver_quotes_is_not_shown() -> None:
    """libpq repeats what it does not understand."""
    pool = new_pool(creator=lambda: psycopg2.connect("postgresqlx://scott:s3cret@localhost/shop"), max_size=1)
    with pytest.raises(psycopg2.ProgrammingError, match="s3cret"):
        pool.connect()
    told = [json.dumps(of_pool(inside.shared(pool).id)), of_pool(inside.shared(pool).id, path="/")]
    for each in told:
        assert "s3cret" not in each
        assert "postgresqlx://scott:***@localhost/shop" in each


@pytest.mark.parametrize(
    "said", ["password=s3cret host=x", "Password = 's3 cret' x", "pwd=s3cret", "a://:s3cret@b"]
)
def test_what_looks_like_a_password_in_an_error_is_starred(said: str) -> None:
    """In the ways in which drivers write it."""

    def refuse() -> Handle:
        raise RuntimeError(said)

    pool = new_pool(creator=refuse)
    with pytest.raises(RuntimeError):
        pool.connect()
    error = of_pool(inside.shared(pool).id)["last_connect_error"]
    assert "***" in error
    assert "cret" not in error


@pytest.mark.slow
def test_ten_thousand_connections_are_as_easy_to_look_at_as_ten() -> None:
    """Idle or held, the page stays small, and says how many there are that it does not show."""
    pool = new_pool(max_size=None)
    out = [pool.connect() for _ in range(10_000)]
    told, html = of_pool(inside.shared(pool).id), of_pool(inside.shared(pool).id, path="/")
    assert len(told["holders"]) == MOST_HOLDERS
    assert told["more_holders"] == 10_000 - MOST_HOLDERS
    assert f"and {10_000 - MOST_HOLDERS:,} more" in html
    assert len(html) < 200_000
    for each in out:
        each.close()
    del out
    n = of_pool(inside.shared(pool).id)["statistics"]
    assert (n["idle"], n["held"]) == (10_000, 0)
    pool.dispose()


def test_of_many_pools_those_are_shown_first_where_somebody_waits(eventually: Callable[..., None]) -> None:
    """A hundred are rows, a few are shown with all, the rest is counted; each can be asked for."""
    pools = [new_pool(max_size=1) for _ in range(page.MOST_ROWS + 20)]
    monitor = Monitor()
    with held(pools[-1], "the busy one"):
        waiter = Thread(lambda: pools[-1].connect().close())
        eventually(lambda: inside.shared(pools[-1]).numbers.waiting == 1, "it waits")
        html = ask(monitor).body
    waiter.join()
    there = len(PoolManager.pools())
    assert f"{there} pools" in html
    assert html.count("<article") == page.DETAILED
    assert "the busy one" in html
    assert html.count('class="bar small"') == page.MOST_ROWS
    assert f"and {there - page.MOST_ROWS:,} more" in html
    assert len(html) < 500_000
    alone = of_pool(inside.shared(pools[-2]).id, monitor, "/")
    assert f'<article class="card" data-key="{inside.shared(pools[-2]).id}">' in alone


def test_a_pool_that_is_not_there_is_said_to_be_gone() -> None:
    """The page goes on asking: it may come back."""
    _kept = new_pool()
    answer = ask(Monitor(), query="pool=nobody")
    assert answer.status == "200 OK"
    assert "no pool with this id" in answer.body


def test_a_database_that_is_named_in_arabic_does_not_turn_the_page_around() -> None:
    """It is shown as it is, in an element of its own direction."""
    pool = new_pool(pid=f"متجر {new_pid()}")
    assert f"<bdi>{inside.shared(pool).id}</bdi>" in of_pool(inside.shared(pool).id, path="/")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("עברית und 日本語", "עברית und 日本語"),
        ("a\u202eb", "a\\u202eb"),
        ("\x1b[0m\n", "\\x1b[0m\\n"),
        ("\ud800", "\\ud800"),
        ("x" * 300, "x" * MOST_CHARACTERS + "…"),
    ],
)
def test_a_text_is_shown_as_far_as_it_can_be_seen(text: str, shown: str) -> None:
    """Scripts of all languages as they are; what controls a terminal or a direction is spelled out."""
    assert clean({"a": [text]}) == {"a": [shown]}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "\N{EN DASH}"),
        (0.0, "0 ms"),
        (0.00042, "0.42 ms"),
        (0.0123, "12 ms"),
        (0.9994, "999 ms"),
        (1.0, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (125, "2 min 5 s"),
        (7325, "2 h 2 min"),
    ],
)
def test_durations_are_written_as_people_do(seconds: float | None, said: str) -> None:
    """With two or three digits, and no more."""
    assert duration(seconds) == said


def test_what_is_no_markup_is_escaped() -> None:
    """In an element and in an attribute; nobody has to remember it."""
    assert markup.tag("b", '<i>"', title='"><i>') == '<b title="&quot;&gt;&lt;i&gt;">&lt;i&gt;&quot;</b>'
    assert markup.tag("b", markup.tag("i", "x"), None, hidden=True, id=None) == "<b hidden><i>x</i></b>"


# -- the last minute -----------------------------------------------------------------------------------


def sample(at: float, checkouts: int = 0, *waits: float) -> Sample:
    """A sample of a pool in which some waited."""
    counts = [
        sum(low < wait <= high for wait in waits) for low, high in zip((0, *BOUNDS), BOUNDS, strict=False)
    ]
    return Sample(at, 0, 0, checkouts, 0, Histogram((*counts, 0), sum(waits)), Histogram())


def test_a_series_is_what_happened_between_two_samples() -> None:
    """Per second, whatever the distance of the samples was."""
    found = series([sample(0, 10), sample(1, 30), sample(3, 90, 0.02, 0.03, 0.04)], now=4)
    assert found["seconds_ago"] == [3, 1]
    assert found["checkouts_per_second"] == [20, 30]
    assert found["wait_median"][0] is None
    assert 0.025 < found["wait_median"][1] < 0.05
    assert found["wait_median"][1] < found["wait_95"][1] <= 0.05


def test_a_time_in_which_nobody_looked_is_a_gap() -> None:
    """Neither a slow second nor an average: nothing; and what is older than the window is not shown."""
    found = series([sample(0, 1), sample(1, 2), sample(1 + GAP + 1, 900), sample(6, 901)], now=6)
    assert found["seconds_ago"] == [5, 0]
    assert series([sample(0), sample(1)], now=2 + WINDOW)["seconds_ago"] == []


def test_the_last_minute_is_the_first_sample_to_the_last() -> None:
    """Nothing can be said of a single one."""
    assert minute([sample(0)]) is None
    last = minute([sample(0, 10), sample(30, 20), sample(60, 70, 0.2)])
    assert last is not None
    assert (last["seconds"], last["checkouts_per_second"]) == (60, 1)
    assert 0.1 < last["wait_median"] <= 0.25


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_quantile_is_in_the_bucket_of_the_true_one(share: float) -> None:
    """For any durations: the buckets are all that is known."""
    durations = sorted((n * 0.0137) ** 3 for n in range(1, 300))
    counts = [
        sum(low < d <= high for d in durations) for low, high in zip((0, *BOUNDS), BOUNDS, strict=False)
    ]
    found = quantile(Histogram((*counts, sum(d > BOUNDS[-1] for d in durations)), sum(durations)), share)
    true = durations[int(share * len(durations))]
    assert found is not None
    high = next((bound for bound in BOUNDS if bound >= true), BOUNDS[-1])
    assert max([0.0, *(bound for bound in BOUNDS if bound < true)]) <= found <= high


def test_a_quantile_of_what_took_longer_than_all_bounds_is_the_last_bound() -> None:
    """And of nothing it is nothing."""
    assert quantile(Histogram((0,) * len(BOUNDS) + (3,), 300.0), 0.5) == BOUNDS[-1]
    assert quantile(Histogram(), 0.5) is None


def test_checkouts_show_in_the_history(eventually: Callable[..., None]) -> None:
    """What was done between two looks is in the series, as many as there were."""
    pool, clock = new_pool(), FakeClock()
    history = History(clock)
    history.look()
    for _ in range(7):
        pool.connect().close()
    clock.now = 1.0
    history.sample()
    [before, after] = history.of(inside.shared(pool))
    assert after.checkouts - before.checkouts == 7
    assert (after.use_time - before.use_time).count == 7


def test_samples_that_are_too_old_are_forgotten_and_two_at_once_are_one() -> None:
    """A minute of seconds is kept, however many look; what rests is kept once."""
    pool, clock = new_pool(), FakeClock()
    pool.connect().close()
    history = History(clock)
    for tick in range(400):
        clock.now = tick / 4
        history.sample()
    samples = history.of(inside.shared(pool))
    assert samples[-1].at - samples[0].at <= WINDOW + 2
    assert min(b.at - a.at for a, b in itertools.pairwise(samples)) >= 0.5
    assert len({id(each.use_time) for each in samples}) == 1


def test_it_samples_while_somebody_looks_and_for_a_moment_longer(
    monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    """No thread before the first look, one then, however many look, none when nobody looked for a while."""
    monkeypatch.setattr("sqla_queries_pool.monitor.history.EVERY", 0.01)
    clock = FakeClock()
    history = History(clock)
    assert not history.sampling
    history.look()
    thread = inside.history_thread(history)
    history.look()
    assert history.sampling
    assert inside.history_thread(history) is thread
    clock.now = LINGER + 1
    eventually(lambda: not history.sampling, "it ends")
    history.look()
    assert history.sampling
    clock.now = 3 * LINGER
    eventually(lambda: not history.sampling, "it ends again")


def test_a_pool_that_is_gone_leaves_no_samples(eventually: Callable[..., None]) -> None:
    """The history keeps no pool alive."""
    pool, history = new_pool(), History(FakeClock())
    history.sample()
    shared = weakref.ref(inside.shared(pool))
    assert history.of(inside.shared(pool))
    pid = inside.shared(pool).id
    del pool
    gc.collect()
    PoolManager.remove(pid)

    def gone() -> bool:
        gc.collect()
        return shared() is None

    eventually(gone, "it is gone")


def test_a_forked_child_has_a_history_of_its_own() -> None:
    """Also where the parent was sampling at that moment, with its lock taken."""
    script = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
sys.path.insert(0, "tests")
import inside
from sqla_queries_pool.monitor.history import History
history = History()
history.look()
inside.history_lock(history).acquire()
child = os.fork()
if child == 0:
    import faulthandler; faulthandler.dump_traceback_later(50, exit=True)
    assert not history.sampling
    history.look()
    assert history.sampling and inside.history_process(history) == os.getpid()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


# -- served ----------------------------------------------------------------------------------------------


@contextmanager
def served(application: Any, port: int = 0) -> Iterator[str]:
    """Its address, as the command line serves it."""
    with serving.server(application, port) as server:
        thread = Thread(lambda: server.serve_forever(0.02), name="server")
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def fetch(url: str) -> str:
    """What a server answers, without a proxy."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{url}: {error}") from None


def test_it_is_served_alone_and_to_several_at_once() -> None:
    """A slow client, whose request does not end, holds up nobody."""
    with (
        served(Monitor()) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow,
    ):
        slow.sendall(b"GET / HT")
        assert "Connection pools" in fetch(url)
        assert json.loads(fetch(f"{url}/data.json"))["process"] == os.getpid()


def test_requests_that_never_end_hold_few_threads_and_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    """Five hundred of them: the oldest make room for those that come."""
    monkeypatch.setattr(serving.Handler, "timeout", None)  # or else they would end by themselves
    with served(Monitor()) as url, ExitStack() as stack:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        most = threading.active_count() + 40
        for number in range(500):
            half = stack.enter_context(socket.create_connection(address, 20))
            half.sendall(b"GET / HTTP/1.1\r\nHost: loca"[: number % 27])
            if number % 100 == 99:
                assert "Connection pools" in fetch(url)  # all that came before it were accepted
                eventually(lambda: threading.active_count() <= most, "few threads are left")
        assert json.loads(fetch(f"{url}/data.json"))["process"] == os.getpid()


def test_a_client_that_sends_nothing_more_is_left(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Also where nobody else comes; and nothing is printed for it."""
    monkeypatch.setattr(serving.Handler, "timeout", 0.05)
    with served(Monitor()) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 20) as half:
            half.sendall(b"GET / HT")
            assert half.recv(100) == b""
        assert "Connection pools" in fetch(url)
    assert not capfd.readouterr().err


@pytest.mark.slow
def test_gunicorn_serves_it(tmp_path: Path, eventually: Callable[..., None]) -> None:
    """As the documentation has it, with --preload and two workers: each tells of itself."""
    pytest.importorskip("gunicorn")
    (tmp_path / "monitored.py").write_text("from sqla_queries_pool.monitor import Monitor\napp = Monitor()\n")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-b",
        f"127.0.0.1:{port}",
        "-w",
        "2",
        "--preload",
        "monitored:app",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) as process,
    ):
        try:

            def answers() -> bool:
                try:
                    return "Connection pools" in fetch(f"http://127.0.0.1:{port}/")
                except OSError:
                    return False

            eventually(answers, "it answers", seconds=30.0)
            told: set[int] = set()

            def both() -> bool:
                told.add(json.loads(fetch(f"http://127.0.0.1:{port}/data.json"))["process"])
                return len(told) == 2

            eventually(both, "both workers answer", seconds=30.0)
        finally:
            process.terminate()
    assert process.pid not in told


# -- in a terminal -----------------------------------------------------------------------------------------

COMMAND = (sys.executable, "-m", "sqla_queries_pool", "monitor")


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **(environment or {})}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, env=env, cwd=ROOT
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says, in this process, when it ends with exit status 2."""
    try:
        status: Any = main(["monitor", *arguments])
    except SystemExit as ended:  # argparse's
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_the_terminal_shows_what_a_monitor_elsewhere_tells() -> None:
    """`--text --url --once`: label, numbers, holders and the last timeout of another process, this one."""
    pytest.importorskip("rich")
    pool = new_pool(max_size=1, timeout=0)
    with held(pool, "order 4711", "web-1"), served(Monitor()) as url:
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        ran = run("--text", "--url", f"{url}/?pool={inside.shared(pool).id}", "--once")
        assert ran.returncode == 2  # a page, not an address to put data.json behind
        ran = run("--text", "--url", url, "--once")
    assert ran.returncode == 0, ran.stderr
    assert f"process {os.getpid()}" in ran.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_terminal_goes_on_when_the_monitor_goes_and_comes_back(eventually: Callable[..., None]) -> None:
    """Each second, until Ctrl-C; while there is no answer it says so, and shows what there was."""
    pytest.importorskip("rich")
    port, pool = free_port(), new_pool()
    with ExitStack() as stack:
        command = [*COMMAND, "--text", "--url", f"http://127.0.0.1:{port}"]
        with served(Monitor(), port), held(pool, "order 4711"):
            eventually(
                lambda: f'"{inside.shared(pool).id}"' in fetch(f"http://127.0.0.1:{port}/data.json"),
                "it is served",
            )
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any("process" in line for line in lines)
            assert any("process" in line for line in lines)
        assert any("trying again" in line for line in lines)
        with served(Monitor(), port):
            heads = (line for line in lines if "process" in line or "trying again" in line)
            assert any("process" in a and "process" in b for a, b in itertools.pairwise(heads))
        process.send_signal(signal.SIGINT)
        with process:  # not communicate(): some of what it said is in the text's buffer
            collections.deque(lines, maxlen=0)
            assert process.stderr is not None
            err = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in err


def test_the_terminal_shows_a_pool_with_its_holders_and_timeouts() -> None:
    """The same as the page, in characters, and nothing that the terminal would obey."""
    pytest.importorskip("rich")
    from rich.console import Console

    from sqla_queries_pool.monitor.data import collect
    from sqla_queries_pool.monitor.text import picture

    pool = new_pool(pid=f"\x1b]0;title\x07[red]shop[/red] {new_pid()}", max_size=1, timeout=0)
    with held(pool, "[bold]order\x1b[2J 4711", "[red]web-\x1b[31m1"):
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        data = collect(History(), inside.shared(pool).id)
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=False).print(picture(data, "no answer; trying again"))
    said = out.getvalue()
    assert "\x1b" not in said
    assert "\x07" not in said
    for shown in (
        "[red]shop[/red]",
        "[bold]order\\x1b[2J 4711",
        "[red]web-\\x1b[31m1",
        "held 1",
        "limit 1",
        "timeout, ",
    ):
        assert shown in said
    assert "no answer; trying again" in said


def test_what_a_monitor_elsewhere_says_is_not_obeyed_either() -> None:
    """The terminal is not at the mercy of who answers at that address."""
    pytest.importorskip("rich")
    from sqla_queries_pool.monitor.text import there

    def evil(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"pools": [{"statistics": {"label": "\x1b[2J"}}]}).encode()]

    with served(evil) as url:
        assert there(url)()["pools"][0]["statistics"]["label"] == "\\x1b[2J"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--demo"),
        (("--text",), "--url"),
        (("--url", "http://127.0.0.1:1/"), "--url needs --text"),
        (("--demo", "--text", "--url", "http://127.0.0.1:1/"), "can't be used with --demo"),
        (("--text", "--once", "--url", "http://127.0.0.1:1/"), "does not answer"),
        (("--text", "--once", "--url", "127.0.0.1:1"), "write the URL"),
        (("--text", "--once", "--url", "file:///etc/passwd"), "write the URL"),
        (("--text", "--once", "--url", "http://scott:s3cret@127.0.0.1:1/"), "without a password"),
        (("--demo", "--port", "70000"), "write a port"),
        (("--demo", "--database", "mysql://scott:s3cret@host/shop"), "needs PostgreSQL"),
    ],
)
def test_a_command_line_that_does_not_do_is_refused_with_a_remedy(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, no traceback and no password."""
    err = refused(capsys, *arguments)
    assert said in err
    assert "Traceback" not in err
    assert "s3cret" not in err


def test_an_address_that_is_no_monitor_s_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither an error page nor other JSON nor HTML is taken for one."""

    def other(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        status, body = {
            "/json/data.json": ("200 OK", b"[1]"),
            "/html/data.json": ("200 OK", b"<html>"),
        }.get(environ["PATH_INFO"], ("403 Forbidden", b""))
        start_response(status, [("Content-Type", "text/plain")])
        return [body]

    with served(other) as url:
        for path, said in (
            ("/json", "is not a QueriesPool monitor"),
            ("/html", "does not answer"),
            ("/none", "answered 403"),
        ):
            err = refused(capsys, "--text", "--once", "--url", f"{url}{path}")
            assert said in err
            assert len(err.splitlines()) == 1


def test_a_port_that_is_taken_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, one line."""
    with served(Monitor()) as url:
        err = refused(capsys, "--demo", "--port", url.rpartition(":")[2])
    assert "--port" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_the_demo_in_the_terminal_shows_a_shop_at_work(pg_url: str) -> None:
    """`--demo --text --once`, on a database that is stated: its pools by name, and no password."""
    ran = run("--demo", "--text", "--once", "--database", pg_url)
    assert ran.returncode == 0, ran.stderr
    for name in ("reports", "exports", str(make_url(pg_url).database)):
        assert name in ran.stdout
    assert str(make_url(pg_url).password) not in ran.stdout + ran.stderr


@pytest.mark.slow
def test_the_demo_serves_a_page_until_it_is_interrupted(
    pg_url: str, pg_observer: Any, eventually: Callable[..., None]
) -> None:
    """It prints the address; Ctrl-C ends it with status 130 and leaves no connection."""
    database = str(make_url(pg_url).database)
    demo = subprocess.Popen(
        [*COMMAND, "--demo", "--port", "0", "--database", pg_url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with demo:
        try:
            assert demo.stdout is not None
            url = demo.stdout.readline().split()[0]
            eventually(lambda: "GET /" in fetch(url), "a request is shown", seconds=30.0)
            assert pg_observer.backends(database) > 0
            demo.send_signal(signal.SIGINT)
            _, err = demo.communicate(timeout=60)
        finally:
            demo.kill()
    assert demo.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    eventually(lambda: pg_observer.backends(database) == 0, "all connections are gone")
