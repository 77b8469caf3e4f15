from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from once import once
from sqlalchemy import make_url

from sqla_queries_pool.demo.embedded import ENV, EmbeddedPostgres
from sqla_queries_pool.demo.run import KINDS, QUERIES, QUEUE, Parameters
from sqla_queries_pool.demo.server import DemoError, read_url

pytestmark = pytest.mark.slow  # they start programs

COMMAND = (sys.executable, "-m", "sqla_queries_pool")


class Ran(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str


def run(*arguments: str, command: Sequence[str] = COMMAND, environment: Mapping[str, str] = {}) -> Ran:
    """Run the command line as a user does, without a DATABASE_URL unless it is stated."""
    own = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    ended = subprocess.run(
        [*command, *arguments],
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> tuple[Ran, str]:
    """A short demo on the tests' own server, as JSON, and the password of that server."""

    def make(folder: Path) -> None:
        server = request.getfixturevalue("pg_server")
        ran = run("demo", "--json", "--seconds", "0.3", "--url", server.url())
        (folder / "ran.json").write_text(json.dumps([*ran, server.password]), encoding="utf-8")

    path = once(tmp_path_factory, worker_id, "demo", make) / "ran.json"
    *ran, password = json.loads(path.read_text(encoding="utf-8"))
    return Ran(*ran), password


@pytest.fixture(scope="module")
def ran(kept: tuple[Ran, str]) -> Ran:
    """What it was, and what it printed."""
    return kept[0]


@pytest.fixture(scope="module")
def facts(ran: Ran) -> Any:
    """What it printed."""
    return json.loads(ran.out)


@pytest.mark.slow
def test_the_demo_prints_json_and_nothing_else_and_tells_its_progress_on_stderr(ran: Ran, facts: Any) -> None:
    """Exit status 0; stdout is one JSON document; stderr has a line for each step, and no traceback."""
    assert ran.status == 0
    assert set(facts) == {
        "parameters", "environment", "three_engines", "fairness", "burst", "exhausted", "summary",
    }  # fmt: skip
    for demonstration in ("three_engines", "fairness", "burst", "exhausted"):
        assert list(facts[demonstration]) == list(KINDS)
    assert len(ran.err.splitlines()) == 7
    assert "Traceback" not in ran.err


@pytest.mark.slow
def test_the_parameters_that_were_chosen_are_printed(facts: Any) -> None:
    """All of them, with the one that was changed."""
    assert set(facts["parameters"]) == set(Parameters.__dataclass_fields__)
    assert facts["parameters"]["seconds"] == 0.3


@pytest.mark.slow
def test_three_engines_stay_within_one_max_size(facts: Any) -> None:
    """The server never saw more than max_size, and one that it was about to forget."""
    seen = facts["three_engines"][QUERIES]
    assert 0 < seen["most_connections"] <= facts["parameters"]["max_size"] + 1
    assert seen["looks"] > 0


@pytest.mark.slow
def test_every_load_says_what_the_threads_got(facts: Any) -> None:
    """Checkouts per thread are in order, somebody was served, and the index is between 1/n and 1."""
    for demonstration in ("three_engines", "fairness"):
        for load in facts[demonstration].values():
            assert load["fewest_checkouts"] <= load["median_checkouts"] <= load["most_checkouts"]
            assert load["most_checkouts"] > 0
            assert 1 / facts["parameters"]["threads"] <= load["jain"] <= 1.0001
            assert load["timeouts"] >= 0
            assert load["connects"] > 0


@pytest.mark.slow
def test_every_load_says_how_many_checkouts_each_server_connection_served(facts: Any) -> None:
    """It is the throughput, divided by the most connections that the server saw."""
    for demonstration in ("three_engines", "fairness"):
        for load in facts[demonstration].values():
            expected = load["checkouts_per_second"] / load["most_connections"]
            assert load["checkouts_per_second_per_connection"] == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
def test_after_a_burst_only_the_busy_connection_is_left_though_nobody_used_the_pool(facts: Any) -> None:
    """All were open at its height, one is after the idle TTL, or on a busy machine a few that are about to
    go, without a checkout in between."""
    burst = facts["burst"][QUERIES]
    assert burst["connections"] == facts["parameters"]["burst"]
    assert 1 <= burst["left"] < burst["connections"] / 2
    assert burst["checkouts_meanwhile"] == 0


@pytest.mark.slow
def test_the_exhausted_pool_names_all_its_holders(facts: Any) -> None:
    """Each thread that has a connection is in the message, and counted; QueuePool's names none."""
    exhausted = facts["exhausted"]
    assert exhausted[QUERIES]["holders_named"] == len(facts["parameters"]["holders"])
    assert all(name in exhausted[QUERIES]["message"] for name in facts["parameters"]["holders"])
    assert exhausted[QUEUE]["holders_named"] == 0


@pytest.mark.slow
def test_the_summary_quotes_figures_of_the_same_run(facts: Any) -> None:
    """One or two sentences, and every number in them is to be found among the facts."""
    assert 1 <= len(facts["summary"]) <= 2
    assert f"had {facts['three_engines'][QUERIES]['most_connections']} connections" in facts["summary"][0]
    load = facts["fairness"][QUERIES]
    assert f"{load['fewest_checkouts']} to {load['most_checkouts']} checkouts" in facts["summary"][1]


@pytest.mark.slow
def test_the_demo_prints_no_password(kept: tuple[Ran, str]) -> None:
    """Neither what it finds out nor its progress has it."""
    ran, password = kept
    assert password not in ran.out + ran.err


@pytest.mark.slow
def test_the_demo_prints_a_table_of_the_database_that_the_environment_names(
    pg_server: EmbeddedPostgres,
) -> None:
    """Without --json, with a URL as hosters write it: both columns, the four parts, no password."""
    url = pg_server.url().replace("postgresql+psycopg2", "postgres")
    ran = run("demo", "--seconds", "0.1", environment={"DATABASE_URL": url})
    assert ran.status == 0
    assert QUEUE in ran.out
    assert QUERIES in ran.out
    assert re.findall(r"│ \((\w)\)", ran.out) == list("abcd")
    part_a = ran.out[ran.out.index("│ (a)") : ran.out.index("│ (b)")]
    assert re.search(r"checkouts per second and server connection +│ +[\d,]+ │ +[\d,]+ │", part_a)
    assert ran.out.count("per second and server connection") == 1
    assert pg_server.password not in ran.out + ran.err


@pytest.mark.slow
def test_an_interrupted_demo_ends_and_leaves_no_connection(
    pg_url: str, pg_observer: Any, eventually: Callable[..., None]
) -> None:
    """Ctrl-C under load: status 130, one line, no traceback, and the server has nothing of it left."""
    database = str(make_url(pg_url).database)
    demo = subprocess.Popen(
        [*COMMAND, "demo", "--url", pg_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with demo:
        eventually(lambda: pg_observer.backends(database) > 5, "the load runs", seconds=30.0)
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    eventually(lambda: pg_observer.backends(database) == 0, "all connections are gone")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "not a database URL"),
        ("nonsense", "not a database URL"),
        ("postgresql://user:s3cret@host:port/database", "not a database URL"),
        ("mysql://user:s3cret@host/database", "needs PostgreSQL"),
        ("sqlite://", "needs PostgreSQL"),
        ("postgresql+asyncpg://user:s3cret@host/database", "postgresql+psycopg2://"),
        ("postgresql://user:s3cret@127.0.0.1/database?plugin=queries", "leave plugin"),
        ("postgresql://user:s3cret@127.0.0.1:1/database?password=s3cret", "can't connect"),
        ("postgresql+psycopg://user:s3cret@127.0.0.1:1/database", "can't connect"),
    ],
)
def test_a_database_that_does_not_do_is_refused_in_one_line_with_a_remedy(url: str, said: str) -> None:
    """Exit status 2, one line on stderr, and no password in it."""
    ran = run("demo", "--json", "--url", url)
    assert ran.status == 2
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1
    assert said in ran.err
    assert "s3cret" not in ran.err


def test_a_wrong_password_is_refused_and_not_printed(pg_server: EmbeddedPostgres) -> None:
    """Exit status 2 and the server's own reason."""
    ran = run("demo", "--json", "--url", pg_server.url().replace(pg_server.password, "s3cret"))
    assert ran.status == 2
    assert "password authentication failed" in ran.err
    assert "s3cret" not in ran.err


def test_the_variable_is_named_where_its_url_does_not_do() -> None:
    """So that somebody who does not know that it is set learns about it."""
    ran = run("demo", "--json", environment={"DATABASE_URL": "mysql://user:s3cret@host/database"})
    assert ran.status == 2
    assert "DATABASE_URL" in ran.err


def test_a_missing_extra_is_named_with_the_command_that_installs_it() -> None:
    """Without rich, and without anything to start a PostgreSQL from: exit status 2, before any work."""
    without = (
        "import sys; sys.modules['rich'] = None\n"
        "from sqla_queries_pool.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    for ran in (
        run("demo", command=(sys.executable, "-c", without)),
        run("demo", "--json", environment={ENV: os.devnull}),
    ):
        assert ran.status == 2
        assert "Traceback" not in ran.err
    assert 'pip install "sqla-queries-pool[demo]"' in run("demo", command=(sys.executable, "-c", without)).err


@pytest.mark.parametrize("arguments", [(), ("demo", "--seconds", "0"), ("demo", "--seconds", "soon")])
def test_a_command_line_that_means_nothing_is_refused(arguments: tuple[str, ...]) -> None:
    """With argparse's exit status, 2, and the program's name as people type it."""
    ran = run(*arguments)
    assert ran.status == 2
    assert "python -m sqla_queries_pool" in ran.err


def test_a_server_with_too_little_room_is_refused(pg_own_server: Callable[..., EmbeddedPostgres]) -> None:
    """The demo never makes a server refuse its other users: it reads its limits first."""
    ran = run("demo", "--json", "--url", pg_own_server(max_connections="6").url())
    assert ran.status == 2
    assert "raise max_connections" in ran.err


def test_the_demo_takes_no_more_connections_than_the_server_has_room_for() -> None:
    """What is compared is scaled down, and refused where nothing could be seen any more."""
    chosen = Parameters().fitted(16)
    assert (chosen.max_size, chosen.burst, chosen.connections) == (5, 8, 4)
    assert Parameters().fitted(97) == Parameters()
    with pytest.raises(DemoError, match="room for 5 more connections"):
        Parameters().fitted(5)


def test_a_url_without_a_driver_gets_the_one_that_the_package_requires() -> None:
    """What hosters write works, and a driver that is stated stays."""
    assert read_url("postgres://user:s3cret@host/database").drivername == "postgresql+psycopg2"
    assert read_url("postgresql://host/database").drivername == "postgresql+psycopg2"
    assert read_url("postgresql+psycopg://host/database").drivername == "postgresql+psycopg"
