"""The monitor's page as people see it: in Chromium, served over HTTP, with pools at work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import inside
import pytest
from browser import Browser, Tab, program
from hazards import Thread, free_port, new_pid, new_pool
from sqlalchemy import create_engine, text
from test_monitor import HOSTILE, fetch, held, served

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.labels import labelled
from sqla_queries_pool.monitor import Monitor, page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_other_pools"),
    pytest.mark.skipif(
        program() is None, reason="no Chromium: apt-get install chromium, or name one: CHROMIUM"
    ),
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests; each has a profile of its own in it."""
    with closing(Browser()) as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A new tab.  At the end the browser has nothing against what it has shown."""
    with closing(browser.tab()) as tab:
        yield tab
        assert tab.complaints() == []


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A monitor of this process, served."""
    with served(Monitor()) as url:
        yield url


class Counted:
    """An application, and how often it was asked."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.asked = 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.asked += 1
        return self._application(environ, start_response)


@contextmanager
def shop(url: str, pid: str) -> Iterator[None]:
    """Two engines of one database, and more threads than the limit of connections, at work."""
    options: dict[str, Any] = {"pool_id": pid, "max_size": 3, "pool_timeout": 0.05, "track_stacks": True}
    engines = [create_engine(url, poolclass=QueriesPool, **options) for _ in range(2)]
    end = threading.Event()

    def work(number: int) -> None:
        while not end.is_set():
            try:
                with labelled(f"order {number}"), engines[number % 2].connect() as connection:
                    connection.execute(text("SELECT pg_sleep(0.02)"))
            except CheckoutTimeout:
                continue

    threads = [Thread(work, number, name=f"web-{number}") for number in range(12)]
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()
        for engine in engines:
            engine.dispose()


@pytest.mark.exhaustive
def test_under_load_the_page_lives(
    tab: Tab, url: str, pg_url: str, eventually: Callable[..., None], tmp_path: Path
) -> None:
    """Bar, charts, holders, waiting checkouts, and timeouts with their reason; nothing is loaded again."""
    pid = new_pid()
    with shop(pg_url, pid):
        tab.go(f"{url}/?pool={pid}")
        tab.run("window.same = true")
        eventually(lambda: tab.text("#status") == "Live", "it is live")
        eventually(lambda: re.search(r"web-\d+\s+order \d+\s+held", tab.text("article")), "holders are shown")
        eventually(lambda: "Waiting, longest first" in tab.text("article"), "waiting checkouts are shown")
        eventually(lambda: "Last timeouts, and why" in tab.text("article"), "timeouts are shown", 30)
        for kind in ("columns", "area.wait", "line.wait", "area.use", "line.use", "ticks"):
            drawn = f"document.querySelector('article path.{kind}').getBoundingClientRect().width"
            eventually(lambda drawn=drawn: tab.run(drawn) > 10, f"{kind} is drawn", 30)
        assert tab.run("document.querySelector('article .bar .held').getBoundingClientRect().width") > 100
        assert tab.run("document.querySelector('article .bar').getAttribute('aria-label')").endswith(
            "limit 3"
        )
        rate = re.search(r"([\d.]+) per second", tab.text("article"))
        assert rate is not None
        assert float(rate[1]) > 1
        assert re.search(r"too-small|long-use|leak", tab.text(".timeouts"))
        tab.screenshot(tmp_path / "page.png")
    eventually(lambda: "Nobody holds a connection." in tab.text("article"), "they are gone from the page")
    assert tab.run("window.same") is True
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_what_is_held_appears_and_goes(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """Within a look or two, and the numbers with it."""
    pool = new_pool()
    tab.go(f"{url}/?pool={inside.shared(pool).id}")
    assert "order 4711" not in tab.text("main")
    with held(pool, "order 4711", "the night shift"):
        eventually(lambda: "order 4711" in tab.text("main"), "it appears")
        assert "the night shift" in tab.text("main")
        assert re.search(r"held\s+1", tab.text("article .key"))
    eventually(lambda: "order 4711" not in tab.text("main"), "it goes")
    assert re.search(r"held\s+0", tab.text("article .key"))


def test_nothing_is_loaded_from_elsewhere(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """All that the page asks for is itself."""
    tab.go(url)
    eventually(lambda: len(tab.requests()) > 3, "it asks again")
    assert {each for each in tab.requests() if not each.startswith("data:")} == {f"{url}/"}


def test_hostile_names_are_read_and_not_run(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """As loaded, as put into place later, and after a click: it is text, and looks like nothing else."""
    name = f"{HOSTILE[:-1]}<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
    pool = new_pool(pid=f"{name} {new_pid()}", max_size=1, timeout=0)
    other = new_pool()  # of one pool there is no overview
    tab.go(url)
    with held(pool, name, name):
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        eventually(lambda: "window.pwned=1" in tab.text(".overview"), "it is put into place")
        link = "[...document.querySelectorAll('.overview tbody a')].find(a => a.innerText.includes('pwned'))"
        tab.run(f"{link}.click()")
        eventually(lambda: "?pool=" in tab.run("location.href"), "the link leads to it")
        eventually(lambda: "<script>alert(1)</script>" in tab.text("main"), "it is shown as text")
        assert tab.run("document.querySelectorAll('main img, main script').length") == 0
        assert tab.run("window.pwned") is None
        assert "\u202e" not in tab.run("document.documentElement.outerHTML")
    other.dispose()


def test_a_server_that_goes_and_comes_back(tab: Tab, eventually: Callable[..., None]) -> None:
    """It is said that there is no answer, and since when; what was there stays; then it goes on."""
    port = free_port()
    pool = new_pool()
    with held(pool, "order 4711"):
        with served(Monitor(), port) as url:
            tab.go(f"{url}/?pool={inside.shared(pool).id}")
            eventually(lambda: tab.text("#status") == "Live", "it is live")
        eventually(
            lambda: f"no answer; showing process {os.getpid()} as of" in tab.text("#status"), "it is said"
        )
        assert "order 4711" in tab.text("main")
        assert tab.run("document.body.classList.contains('stale')") is True
        with served(Monitor(), port):
            eventually(lambda: tab.text("#status") == "Live", "it goes on")
            assert tab.run("document.body.classList.contains('stale')") is False


def test_an_answer_that_is_no_page_is_said(tab: Tab, eventually: Callable[..., None]) -> None:
    """Who may no longer see it is told so, and what was shown is marked as old."""
    allowed = [True]
    with served(Monitor(allow=lambda environ: allowed[0])) as url:
        tab.go(url)
        eventually(lambda: tab.text("#status") == "Live", "it is live")
        allowed[0] = False
        eventually(lambda: "the server answered 403" in tab.text("#status"), "it is said")


def test_a_tab_that_nobody_sees_asks_for_nothing(tab: Tab, eventually: Callable[..., None]) -> None:
    """And asks at once when somebody comes back."""
    counted = Counted(Monitor())
    with served(counted) as url:
        tab.go(url)
        eventually(lambda: counted.asked > 2, "it asks")
        # Chromium without a window shows all its tabs: what a page is told when it is hidden is told here.
        hide = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s});"
        changed = "document.dispatchEvent(new Event('visibilitychange'))"
        tab.run(hide % "true" + changed)
        assert "while the page is hidden" in tab.text("#status")
        # Longer than the second after which it would ask again; an answer may have been under way.
        tab.run("new Promise(done => setTimeout(done, 300))")
        before = counted.asked
        tab.run("new Promise(done => setTimeout(done, 2500))")
        assert counted.asked == before
        tab.run(hide % "false" + changed)
        eventually(lambda: counted.asked > before, "it asks again")
        eventually(lambda: tab.text("#status") == "Live", "it is live")


def test_a_reader_may_stop_it(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """The button says what it is for, and the page stays as it is meanwhile."""
    pool = new_pool()
    tab.go(f"{url}/?pool={inside.shared(pool).id}")
    eventually(lambda: tab.text("#status") == "Live", "it is live")
    tab.click("#pause")
    assert (tab.text("#pause"), tab.text("#status")) == ("Resume", "Paused")
    with held(pool, "order 4711"):
        tab.run("new Promise(done => setTimeout(done, 2500))")
        assert "order 4711" not in tab.text("main")
        tab.click("#pause")
        eventually(lambda: "order 4711" in tab.text("main"), "it goes on")


def test_what_the_reader_has_opened_stays_open(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """A stack, while holders before it come and go; and what is selected stays selected."""
    pool = new_pool(max_size=3, track_stacks=True)
    tab.go(f"{url}/?pool={inside.shared(pool).id}")
    row = "[...document.querySelectorAll('.holders tbody tr')].find(r => r.innerText.includes('the second'))"
    with ExitStack() as first:
        first.enter_context(held(pool, "the first"))
        with held(pool, "the second"):
            eventually(lambda: tab.run(f"!!{row}"), "it is shown")
            tab.run(f"{row}.querySelector('summary').click()")
            tab.run(f"getSelection().selectAllChildren({row}.children[2]); window.row = {row}")
            first.close()
            eventually(lambda: "the first" not in tab.text(".holders"), "the row before it goes")
            with held(pool, "the third"):
                eventually(lambda: "the third" in tab.text(".holders"), "a row after it comes")
                assert tab.run(f"{row} === window.row && {row}.querySelector('details').open") is True
                assert tab.run("getSelection().toString()") == "the second"
                assert "test_monitor.py" in tab.run(f"{row}.querySelector('ol').innerText")


def test_what_comes_before_it_does_not_close_it(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """The newest timeout comes first; an older one that was opened stays that one, and open."""
    pool = new_pool(max_size=1, timeout=0)
    with held(pool):
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        tab.go(f"{url}/?pool={inside.shared(pool).id}")
        assert tab.run("document.querySelectorAll('.timeouts > li').length") == 1
        tab.run("window.row = document.querySelector('.timeouts > li')")
        tab.click(".timeouts summary")
        when = tab.run("row.querySelector('time').dateTime")
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        eventually(lambda: tab.run("document.querySelectorAll('.timeouts > li').length") == 2, "it comes")
    assert tab.run("[...document.querySelectorAll('.timeouts > li')].indexOf(row)") == 1
    assert tab.run("row.querySelector('details').open") is True
    assert tab.run("row.querySelector('time').dateTime") == when
    assert tab.run("document.querySelectorAll('.timeouts [open]').length") == 1


@pytest.mark.exhaustive
def test_without_javascript_it_shows_the_state_and_loads_again(
    tab: Tab, eventually: Callable[..., None]
) -> None:
    """The whole state, once; and again after some seconds."""
    counted, pool = Counted(Monitor()), new_pool()
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    with served(counted) as url, held(pool, "order 4711"):
        tab.go(f"{url}/?pool={inside.shared(pool).id}")
        assert "order 4711" in tab.text("main")
        assert "Without JavaScript" in tab.text("#status")
        assert tab.run("document.querySelector('#pause').hidden") is True
        eventually(lambda: counted.asked > 1, "it loads again", page.REFRESH + 20)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_can_be_read_on_any_screen(tab: Tab, url: str, scheme: str, width: int) -> None:
    """Nothing runs out of the page to the right, and text stands out from its ground (WCAG AA)."""
    pool = new_pool(pid=f"{new_pid()} {'a-very-long-name-' * 8}", max_size=1, timeout=0)
    tab.resize(width)
    tab.prefer(scheme)
    with held(pool, "label " * 20, "thread " * 20):
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        tab.go(f"{url}/?pool={inside.shared(pool).id.replace(' ', '+')}")
        assert tab.text("article") != ""
        assert tab.run("document.documentElement.scrollWidth") <= width
        poor = tab.run(CONTRAST)
    assert poor == []


CONTRAST = """
(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const lightness = (c) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parse(c).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if ((parse(c)[3] ?? 1) > 0) return c;
    }
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *:not(svg, svg *, script, noscript)")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.offsetWidth) continue;
    const [a, b] = [lightness(getComputedStyle(e).color), lightness(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${e.tagName} ${e.className}: ${e.innerText.slice(0, 40)}`);
  }
  return poor;
})()
"""


def test_it_can_be_read_aloud(tab: Tab, url: str) -> None:
    """Tables have captions and heads, drawings words, the status is announced, headings are in order."""
    pool = new_pool(max_size=1, timeout=0)
    with held(pool, "order 4711"):
        with pytest.raises(CheckoutTimeout):
            pool.connect()
        tab.go(f"{url}/?pool={inside.shared(pool).id}")
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if "role" in node
    }
    images = {name for role, name in named if role == "image"}
    assert "held 1, opening 0, closing 0, idle 0, waiting 0, limit 1" in images
    assert any(name.startswith("Wait in the queue in the last minute") for name in images)
    assert "" not in images
    assert ("table", "Held, longest first (1)") in named
    assert {("columnheader", name) for name in ("For", "Held by", "Label", "State")} <= named
    assert {"main", "status", "article", "heading"} <= {role for role, _ in named}
    assert all(name for role, name in named if role in ("button", "link", "table", "heading"))


@pytest.mark.exhaustive
def test_many_pools_and_connections_stay_usable(tab: Tab, url: str, eventually: Callable[..., None]) -> None:
    """120 pools, and one with 10,000 connections: the page goes on, and a click leads to one of them."""
    pools = [new_pool(max_size=1) for _ in range(120)]
    large = new_pool(max_size=None)
    out = [large.connect() for _ in range(10_000)]
    for each in out[5_000:]:
        each.close()
    tab.go(url)
    eventually(lambda: tab.text("#status") == "Live", "it is live")
    for _ in range(3):
        before = tab.text("#clock")
        eventually(lambda before=before: tab.text("#clock") != before, "it goes on")
    assert f"{len(PoolManager.pools())} pools" in tab.text(".overview h2")
    assert re.search(r"and \d+ more", tab.text(".overview"))
    link = tab.run("document.querySelector('.overview tbody a').href")
    tab.click(".overview tbody a")
    eventually(lambda: tab.run("location.href") == link, "it leads there")
    eventually(lambda: tab.run("document.querySelectorAll('article').length") == 1, "it is shown alone")
    tab.go(f"{url}/?pool={inside.shared(large).id}")
    eventually(lambda: re.search(r"held\s+5,000", tab.text("article .key")), "all are counted")
    assert "4,975 more" in tab.text("main")
    before = tab.text("#clock")
    eventually(lambda: tab.text("#clock") != before, "it goes on")
    for each in out[:5_000]:
        each.close()
    large.dispose()
    del pools


def test_of_several_processes_one_is_shown_until_another_is_chosen(
    tab: Tab, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """gunicorn's workers answer in turn: the page does not change from one to the other by itself."""
    pytest.importorskip("gunicorn")
    (tmp_path / "monitored.py").write_text("from sqla_queries_pool.monitor import Monitor\napp = Monitor()\n")
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "-w", "2", "monitored:app"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    chosen = "document.querySelector('#processes [aria-pressed=true]').dataset.process"
    shown = "document.querySelector('main').dataset.process"
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            eventually(lambda: answers(url), "it answers", 30)
            tab.go(url)
            first = tab.run(shown)
            both = "document.querySelectorAll('#processes button').length === 2"
            eventually(lambda: tab.run(both), "both are offered", 60)
            assert tab.run(shown) == tab.run(chosen) == first
            tab.click("#processes [aria-pressed=false]")
            second = tab.run(shown)
            assert second == tab.run(chosen) != first
            assert {int(first), int(second)} <= told(url)
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Is there somebody at that address?"""
    try:
        return bool(fetch(url))
    except OSError:
        return False


def told(url: str) -> set[int]:
    """The processes that answer, of two."""
    found: set[int] = set()
    for _ in range(1000):
        found.add(json.loads(fetch(f"{url}/data.json"))["process"])
        if len(found) == 2:
            break
    return found
