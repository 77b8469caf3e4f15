from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import inside
import pytest
from conftest import Observer, SessionServer
from sqlalchemy import create_engine, make_url
from sqlalchemy.engine import Engine

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sqla_queries_pool import Pool, PoolManager, QueriesPool
from sqla_queries_pool.budget.stats import BOUNDS
from sqla_queries_pool.exporters import prometheus

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "monitoring" / "exporters.rst"
DASHBOARD = ROOT / "docs" / "monitoring" / "grafana.json"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
SECONDS = 60.0
"""What servers and processes get to do what they are asked."""
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="no prometheus installed (Debian: prometheus)"
)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool (of prometheus) is not installed")

# A process with real traffic: two connections for six threads, until it reads a line.  It then brings about
# a known number of what does not happen by itself, tells what its pool says of itself, and serves its metrics
# until the end of its input.
APP = """
import json, sys, threading
from prometheus_client import start_http_server
from sqlalchemy import create_engine, text
from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.exporters import prometheus

prometheus.register()
server, _ = start_http_server(0, "127.0.0.1")
url = sys.argv[1]
engine = create_engine(url, poolclass=QueriesPool, max_size=2)
impatient = create_engine(url, poolclass=QueriesPool, max_size=2, pool_timeout=0)
missing = create_engine(url + "_missing", poolclass=QueriesPool)
done = threading.Event()

def work():
    while not done.is_set():
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_sleep(0.005)"))

threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
print(server.server_port, flush=True)
sys.stdin.readline()
done.set()
for thread in threads:
    thread.join()
for _ in range(3):
    try:
        with engine.connect(), engine.connect():
            impatient.connect()
    except CheckoutTimeout:
        pass
for _ in range(2):
    try:
        missing.connect()
    except Exception:
        pass
with engine.connect() as connection:
    connection.invalidate()
with engine.connect() as held:
    [pool] = [pool for pool in PoolManager.pools() if pool.id == engine.pool.pid]
    [other] = [pool for pool in PoolManager.pools() if pool.id == missing.pool.pid]
    print(json.dumps([pool.statistics().as_dict(), other.statistics().as_dict()]), flush=True)
    sys.stdin.read()
"""


class Server:
    """A Prometheus server that scrapes processes, four times a second."""

    def __init__(self, folder: Path, targets: Sequence[str], rules: str) -> None:
        (folder / "rules.yml").write_text(rules)
        self.config = folder / "prometheus.yml"
        self.config.write_text(
            "global: {scrape_interval: 250ms, evaluation_interval: 250ms}\n"
            f"rule_files: [{folder / 'rules.yml'}]\n"
            f"scrape_configs: [{{job_name: shop, static_configs: [{{targets: {json.dumps(targets)}}}]}}]\n"
        )
        self.folder = folder
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it on a free port, and on another if that is gone by then: it can't tell which."""
        assert PROMETHEUS
        for _ in range(5):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
            with open(self.folder / "log", "ab") as log:
                self.process = subprocess.Popen(
                    [
                        PROMETHEUS,
                        f"--config.file={self.config}",
                        f"--storage.tsdb.path={self.folder / 'data'}",
                        f"--web.listen-address=127.0.0.1:{self.port}",
                    ],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            if self._ready():
                return
        raise AssertionError((self.folder / "log").read_text())

    def _ready(self) -> bool:
        deadline = time.monotonic() + SECONDS
        while self.process and self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return get(f"http://127.0.0.1:{self.port}/-/ready") is not None
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        """End it."""
        if self.process:
            self.process.terminate()
            self.process.wait(SECONDS)

    def ask(self, what: str, **parameters: str) -> Any:
        """Call its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        answer = json.loads(get(f"http://127.0.0.1:{self.port}/api/v1/{what}?{query}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What an expression is now: labels and value."""
        result = self.ask("query", query=expression)["result"]
        return [(found["metric"], float(found["value"][1])) for found in result]

    def value(self, expression: str) -> float:
        """The one value of an expression, NaN where there is none."""
        found = self.values(expression)
        assert len(found) < 2, found
        return found[0][1] if found else math.nan


class App:
    """The process that Prometheus scrapes."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", APP, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.port = int(self._line())
        self._told: list[dict[str, Any]] | None = None

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def settled(self) -> list[dict[str, Any]]:
        """End the traffic; what the two pools say of themselves from then on."""
        if self._told is None:
            assert self.process.stdin
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self._told = json.loads(self._line())
        return self._told

    def stop(self) -> None:
        """End it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(SECONDS)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def app(pg_server: SessionServer) -> Iterator[App]:
    """A process with traffic on a real PostgreSQL."""
    made = App(pg_server.url())
    yield made
    made.stop()


@pytest.fixture(scope="module")
def server(app: App, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real Prometheus server that scrapes it."""
    made = Server(tmp_path_factory.mktemp("prometheus"), [f"127.0.0.1:{app.port}"], block("yaml", "groups:"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def registry(no_other_pools: None) -> CollectorRegistry:
    """A registry with nothing but the pools."""
    made = CollectorRegistry()
    prometheus.register(made)
    return made


@pytest.fixture
def engine(pg_url: str) -> Iterator[Engine]:
    """An engine with two connections at most."""
    made = create_engine(pg_url, poolclass=QueriesPool, max_size=2)
    yield made
    made.dispose()


def get(url: str) -> str:
    """What a server says."""
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        return str(answer.read().decode())


def block(language: str, beginning: str) -> str:
    """The block of the page that begins so."""
    for found in re.finditer(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", PAGE.read_text()):
        text = textwrap.dedent(found[1]).strip("\n") + "\n"
        if text.startswith(beginning):
            return text
    raise AssertionError(f"no block of {language} that begins with {beginning!r}")


def expressions() -> list[str]:
    """All PromQL of the dashboard, Grafana's variables replaced as Grafana does."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert found
    filled = [text.replace("$__rate_interval", "5s") for text in found]
    for name in ("job", "instance", "database"):
        filled = [text.replace(f"${name}", ".*") for text in filled]
    assert "$" not in "".join(filled)
    return filled


def pool_of(engine: Engine) -> Pool:
    """The pool of an engine."""
    assert isinstance(engine.pool, QueriesPool)
    [pool] = [pool for pool in PoolManager.pools() if pool.id == engine.pool.pid]
    return pool


def samples(registry: CollectorRegistry, pool: Pool) -> dict[tuple[str, ...], float]:
    """What is exported of a pool: (name without the prefix, the label that is not the pool's) -> value."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("pool") == pool.id:
                assert labels.pop("database") == pool.label
                found[(sample.name.removeprefix(prometheus.PREFIX), *labels.values())] = sample.value
    return found


def test_what_is_told_is_what_the_pool_says_of_itself(registry: CollectorRegistry, engine: Engine) -> None:
    """Each number of the statistics has its sample, with a real connection out."""
    pool = pool_of(engine)
    for _ in range(3):
        engine.connect().close()
    with engine.connect() as connection:
        connection.invalidate()
    with engine.connect():
        told, n = samples(registry, pool), pool.statistics()
    expected: dict[tuple[str, ...], float] = {
        ("connections", "idle"): 0,
        ("connections", "held"): 1,
        ("connections", "opening"): 0,
        ("connections", "closing"): 0,
        ("connections_max",): 2,
        ("connections_peak",): 1,
        ("waiting_checkouts",): 0,
        ("checkouts_total",): n.checkouts,
        ("timeouts_total",): n.timeouts,
        ("rejected_total",): n.rejected,
        ("deadlocks_total",): n.deadlocks,
        ("connects_total",): 2,
        ("connect_errors_total",): n.connect_errors,
        ("evictions_total",): n.evictions,
        ("dead_total",): n.dead,
        ("failed_resets_total",): n.failed_resets,
        ("bypasses_total",): n.bypasses,
        ("mended_total",): n.mended,
        **{("closes_total", reason): 0 for reason in prometheus.REASONS},
        **{("closes_total", reason): number for reason, number in n.closes.items()},
    }
    for name, histogram in (("wait", n.wait_time), ("use", n.use_time), ("connect", n.connect_time)):
        expected[f"{name}_seconds_count",] = histogram.count
        expected[f"{name}_seconds_sum",] = histogram.seconds
        for i, bound in enumerate((*map(str, BOUNDS), "+Inf")):
            expected[f"{name}_seconds_bucket", bound] = sum(histogram.counts[: i + 1])
    assert told == expected
    assert n.closes
    assert n.checkouts >= 4


def test_each_kind_of_number_is_the_one_of_its_name(registry: CollectorRegistry, engine: Engine) -> None:
    """With numbers that all differ, none is told under another's name."""
    pool = pool_of(engine)
    totals = inside.ledger(pool).totals
    names = (
        "timeouts",
        "rejected",
        "deadlocks",
        "connect_errors",
        "bypasses",
        "dead",
        "failed_resets",
        "mended",
    )
    for number, name in enumerate(names, 11):
        setattr(totals, name, number)
    inside.ledger(pool).peak_held = 9
    totals.closes["gave way to another engine"] = 7
    for number, durations in enumerate((totals.waited, totals.used, totals.connects), 2):
        for _ in range(number):
            durations.add(float(number))
    told = samples(registry, pool)
    for number, name in enumerate(names, 11):
        assert told[f"{name}_total",] == number
    assert (told["connections_peak",], told["evictions_total",], told["connects_total",]) == (9, 7, 4)
    for number, name in enumerate(("wait", "use", "connect"), 2):
        assert (told[f"{name}_seconds_count",], told[f"{name}_seconds_sum",]) == (number, number * number)


def test_a_blocked_checkout_is_told(
    registry: CollectorRegistry, engine: Engine, eventually: Callable[..., None]
) -> None:
    """While it waits, and no longer."""
    pool = pool_of(engine)
    thread = threading.Thread(target=lambda: engine.connect().close())
    with engine.connect(), engine.connect():
        thread.start()
        eventually(lambda: samples(registry, pool)["waiting_checkouts",] == 1, "a blocked checkout")
    thread.join()
    told = samples(registry, pool)
    assert told["waiting_checkouts",] == 0
    assert told["wait_seconds_count",] == 1


def test_no_limit_is_infinity(registry: CollectorRegistry, engine: Engine) -> None:
    """So that the part of it that is in use is 0."""
    PoolManager.set_max_size(pool_of(engine).id, None)
    assert samples(registry, pool_of(engine))["connections_max",] == math.inf


def test_a_password_is_never_told(registry: CollectorRegistry, engine: Engine) -> None:
    """The label says which database it is, and who uses it."""
    engine.connect().close()
    password = engine.url.password
    assert password
    assert password not in generate_latest(registry).decode()


def test_nothing_asks_the_pools_but_a_scrape(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that is registered waits until somebody asks."""
    asked: list[int] = []
    collect = prometheus.QueriesPoolCollector.collect

    def counting(self: prometheus.QueriesPoolCollector) -> Any:
        asked.append(1)
        return collect(self)

    monkeypatch.setattr(prometheus.QueriesPoolCollector, "collect", counting)
    registry = CollectorRegistry()
    prometheus.register(registry)
    engine.connect().close()
    assert asked == []
    generate_latest(registry)
    assert asked == [1]


def test_registered_twice_is_an_error() -> None:
    """Everything would be told twice, which Prometheus refuses to read."""
    registry = CollectorRegistry(auto_describe=True)
    collector = prometheus.register(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        prometheus.register(registry)
    registry.unregister(collector)
    prometheus.register(registry)


def test_without_the_library_the_error_names_the_extra() -> None:
    """Somebody who imports it without the extra is told what to install."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "try: import sqla_queries_pool.exporters.prometheus\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert "sqla-queries-pool[prometheus]" in said.stdout


def test_the_dashboard_and_the_alerts_ask_for_what_there_is(
    registry: CollectorRegistry, engine: Engine
) -> None:
    """Each name of a metric in them is one that is told, and the dashboard shows each."""
    engine.connect().invalidate()
    told = {
        sample.name
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    names = re.compile(rf"{prometheus.PREFIX}\w+")
    shown = set(names.findall(" ".join(expressions())))
    assert set(names.findall(DASHBOARD.read_text() + block("yaml", "groups:"))) <= told
    suffixes = ("_count", "_sum")
    assert {name for name in told if not name.endswith(suffixes)} <= shown
    assert {name.removesuffix("_total") for name in told if not name.endswith((*suffixes, "_bucket"))} <= set(
        names.findall(PAGE.read_text().replace("_total", ""))
    )


def test_the_dashboard_is_one_that_grafana_can_load() -> None:
    """Numbered panels with a place each, none on another, on the data source that one chooses."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"title", "uid", "schemaVersion", "templating", "panels", "time"} <= set(dashboard)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells
        for target in panel.get("targets", ()):
            assert (
                target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            )
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@needs_promtool
def test_the_metrics_pass_promtool(registry: CollectorRegistry, engine: Engine) -> None:
    """Prometheus' own linter of names, units and texts has nothing to say."""
    engine.connect().invalidate()
    assert promtool("check", "metrics", stdin=generate_latest(registry)) == ""


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    """`promtool test rules`: one bad pool, where all of them fire, and one that is just busy."""
    rules = tmp_path / "rules.yml"
    rules.write_text(block("yaml", "groups:"))
    names = re.findall(r"alert: (\w+)", rules.read_text())
    bad, busy = "{pool='1', database='bad', instance='a'}", "{pool='2', database='busy', instance='a'}"
    series = []
    for pool, numbers in ((bad, BAD), (busy, BUSY)):
        for metric, values in numbers.items():
            name, _, more = metric.partition("{")
            labels = pool if not more else f"{pool[:-1]}, {more}"
            series.append({"series": f"{prometheus.PREFIX}{name}{labels}", "values": values})
    # As series: what is expected of alerts themselves is compared with all their texts.
    expected = [
        {
            "eval_time": "20m",
            "expr": f"count by (database) (ALERTS{{alertname='{name}', alertstate='firing'}})",
            "exp_samples": [{"labels": '{database="bad"}', "value": 1}],
        }
        for name in names
    ]
    unit = tmp_path / "tests.yml"
    # JSON is YAML.
    test = {"interval": "15s", "input_series": series, "promql_expr_test": expected}
    unit.write_text(json.dumps({"rule_files": [str(rules)], "tests": [test]}))
    assert promtool("check", "rules", str(rules)).count("SUCCESS") == 1
    assert "SUCCESS" in promtool("test", "rules", str(unit))
    assert len(names) == 7


@needs_promtool
def test_the_configuration_that_the_page_shows_is_valid(tmp_path: Path) -> None:
    """What tells Prometheus where to scrape."""
    (tmp_path / "prometheus.yml").write_text(block("yaml", "scrape_configs:"))
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml"))


BAD = {
    "connections{state='held'}": "4x80",
    "connections{state='opening'}": "0x80",
    "connections_max": "4x80",
    "waiting_checkouts": "3x80",
    "timeouts_total": "0+1x80",
    "deadlocks_total": "0+1x80",
    "connect_errors_total": "0+1x80",
    "mended_total": "0x60 1x20",
    "closes_total{reason='abandoned by its holder'}": "0+1x80",
    "wait_seconds_bucket{le='0.5'}": "0x80",
    "wait_seconds_bucket{le='1.0'}": "0+9x80",
    "wait_seconds_bucket{le='+Inf'}": "0+9x80",
}
"""A pool with everything that is bad, every 15 seconds."""
BUSY = {
    "connections{state='held'}": "3x80",
    "connections{state='opening'}": "0x80",
    "connections_max": "4x80",
    "waiting_checkouts": " ".join(["3", "0", "2", "0"] * 20),
    "timeouts_total": "7x80",
    "deadlocks_total": "2x80",
    "connect_errors_total": "0x40 1x40",
    "mended_total": "1x80",
    "closes_total{reason='abandoned by its holder'}": "5x80",
    "closes_total{reason='idle for longer than idle_ttl'}": "0+9x80",
    "wait_seconds_bucket{le='0.5'}": "0+9x80",
    "wait_seconds_bucket{le='1.0'}": "0+9x80",
    "wait_seconds_bucket{le='+Inf'}": "0+9x80",
}
"""One that is busy, with what was bad in the past."""


def promtool(*arguments: str, stdin: bytes = b"") -> str:
    """Have promtool check something; what it says."""
    assert PROMTOOL
    ended = subprocess.run(
        [PROMTOOL, *arguments], input=stdin, capture_output=True, timeout=SECONDS, check=False
    )
    said = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0, said
    return said


@needs_prometheus
@pytest.mark.slow
def test_a_real_server_sees_rates_and_quantiles(server: Server, eventually: Callable[..., None]) -> None:
    """While the process works: checkouts, their use, 5 ms at least as the query takes, and waits."""
    eventually(lambda: server.value("up") == 1, "the first scrape", SECONDS)

    def of(name: str) -> str:
        return f"sqla_queries_pool_{name}{{database!~'.*_missing'}}"

    eventually(lambda: server.value(f"rate({of('checkouts_total')}[5s])") > 0, "a rate", SECONDS)
    median = f"histogram_quantile(0.5, rate({of('use_seconds_bucket')}[5s]))"
    eventually(lambda: server.value(median) >= 0.005, "a quantile of the use", SECONDS)
    assert server.value(f"{of('use_seconds_sum')} / {of('use_seconds_count')}") >= 0.005
    waiting = f"max_over_time({of('waiting_checkouts')}[5s])"
    eventually(lambda: server.value(waiting) >= 1, "a blocked checkout", SECONDS)
    waits = f"histogram_quantile(0.9, rate({of('wait_seconds_bucket')}[5s]))"
    eventually(lambda: server.value(waits) > 0, "a quantile of the waits", SECONDS)
    assert server.value(f"max_over_time(sum({of('connections')})[5s:250ms])") <= 2
    assert server.value(of("connections_max")) == 2


@needs_prometheus
@pytest.mark.slow
def test_a_real_server_ends_up_with_the_numbers_of_the_pool(
    app: App, server: Server, eventually: Callable[..., None]
) -> None:
    """When the traffic has ended, each number is exactly the pool's, and the pool's is what was done."""
    pool, other = app.settled()
    assert (pool["timeouts"], other["connect_errors"], pool["held"]) == (3, 2, 1)
    told = {
        "checkouts_total": pool["checkouts"],
        "timeouts_total": 3,
        "connects_total": pool["connects"],
        "use_seconds_count": pool["use_time"]["count"],
        "use_seconds_sum": pool["use_time"]["seconds"],
        "wait_seconds_count": pool["waits"],
        "connections_peak": 2,
        **{f"closes_total{{reason='{reason}'}}": number for reason, number in pool["closes"].items()},
        "connections{state='held'}": 1,
        "use_seconds_bucket{le='0.01'}": sum(pool["use_time"]["counts"][:5]),
    }
    assert pool["closes"]
    for name, number in told.items():
        metric, _, labels = name.partition("{")
        selector = f"sqla_queries_pool_{metric}{{pool='{pool['pid']}', {labels or '}'}"
        eventually(lambda s=selector, n=number: server.value(s) == n, f"{name} {number}", SECONDS)
    failed = f"sqla_queries_pool_connect_errors_total{{pool='{other['pid']}'}}"
    eventually(lambda: server.value(failed) == 2, "the errors of connecting", SECONDS)


@needs_prometheus
@pytest.mark.slow
def test_a_real_server_answers_all_that_the_dashboard_asks(
    app: App, server: Server, eventually: Callable[..., None]
) -> None:
    """Each expression is accepted, and finds something in a process that worked."""
    app.settled()
    eventually(lambda: server.values("sqla_queries_pool_closes_total"), "the numbers at the end", SECONDS)
    for expression in expressions():
        eventually(lambda e=expression: server.values(e), expression, SECONDS)


@needs_prometheus
@pytest.mark.slow
def test_a_real_server_accepts_the_alerts(server: Server, eventually: Callable[..., None]) -> None:
    """It evaluates each of them without an error."""

    def health() -> set[str]:
        return {rule["health"] for group in server.ask("rules")["groups"] for rule in group["rules"]}

    eventually(lambda: health() == {"ok"}, "all rules evaluated", SECONDS)


@contextlib.contextmanager
def gunicorn(folder: Path, url: str) -> Iterator[tuple[int, list[int]]]:
    """Two workers with the page's configuration; its port, and those for metrics, of which two are used."""
    pytest.importorskip("gunicorn")
    (folder / "web.py").write_text(WEB)
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
        web, *ports = [one.getsockname()[1] for one in free]
    text = block("python", "from prometheus_client import CollectorRegistry")
    assert "workers = 4" in text
    assert "range(9101, 9109)" in text
    config = text.replace("workers = 4", "workers = 2").replace("range(9101, 9109)", repr(ports))
    (folder / "gunicorn.conf.py").write_text(config)
    told = {"PYTHONPATH": f"{ROOT}:{folder}", "DATABASE_URL": url, "XDG_RUNTIME_DIR": str(folder)}
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--preload", "-b", f"127.0.0.1:{web}", "web:app"],
            cwd=folder,
            env={**os.environ, **told},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            yield web, ports
        finally:
            process.terminate()
            process.wait(SECONDS)


@pytest.mark.slow
def test_each_worker_of_gunicorn_serves_its_own_numbers(
    pg_url: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """With the page's configuration: a port for each, and together they have told each checkout once."""
    with gunicorn(tmp_path, pg_url) as (web, ports):
        eventually(lambda: sum(checkouts(port) is not None for port in ports) == 2, "two workers", SECONDS)
        pids = {get(f"http://127.0.0.1:{web}/") for _ in range(20)}
        told = [number for port in ports if (number := checkouts(port)) is not None]
        assert sum(told) == 20
        assert 1 <= len(pids) <= 2
        assert sorted(number > 0 for number in told)[-len(pids) :] == [True] * len(pids)


@needs_prometheus
@pytest.mark.exhaustive
def test_prometheus_adds_up_what_the_workers_of_a_host_have(
    pg_url: str, tmp_path: Path, pg_observer: Observer, eventually: Callable[..., None]
) -> None:
    """Both workers of gunicorn share three connections: their sum is what the server sees."""
    shared = make_url(pg_url).update_query_dict({"plugin": "queries", "share": "host", "max_size": "3"})
    with gunicorn(tmp_path, shared.render_as_string(False)) as (web, ports):
        eventually(lambda: sum(checkouts(port) is not None for port in ports) == 2, "two workers", SECONDS)
        server = Server(tmp_path, [f"127.0.0.1:{port}" for port in ports], "groups: []")
        server.start()
        try:
            with ThreadPoolExecutor(8) as clients:
                list(clients.map(lambda _: get(f"http://127.0.0.1:{web}/"), range(100)))
            database = make_url(pg_url).database
            assert database is not None
            for expression, value in (
                ("sum(up)", 2),
                ("sum(sqla_queries_pool_checkouts_total)", 100),
                ("max(sqla_queries_pool_host_connections_max)", 3),
                ("count(sqla_queries_pool_host_leases)", 2),
                ("sum(sqla_queries_pool_connections)", pg_observer.backends(database)),
            ):
                eventually(
                    lambda e=expression, v=value: server.value(e) == v, f"{expression} is {value}", SECONDS
                )
            leases = server.value("sum(sqla_queries_pool_host_leases)")
            assert pg_observer.backends(database) <= leases <= 3
        finally:
            server.stop()


WEB = """
import os
from sqlalchemy import create_engine
from sqla_queries_pool import QueriesPool

engine = create_engine(os.environ["DATABASE_URL"], poolclass=QueriesPool)

def app(environ, start_response):
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


def checkouts(port: int) -> float | None:
    """What is told at a port; None where nobody listens."""
    try:
        text = get(f"http://127.0.0.1:{port}/metrics")
    except OSError:
        return None
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "sqla_queries_pool_checkouts_total"
    )
