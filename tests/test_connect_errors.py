"""Errors of connecting: which of them pass by themselves, and what the pool does about those that do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from statistics import median
from types import ModuleType
from typing import Any

import inside
import psutil
import psycopg
import psycopg2
import pytest
from conftest import in_memory
from fakes import FakeClock, Task
from hazards import assert_whole, eventually, new_pid, pool_of
from proxy import Proxy
from sqlalchemy import Engine, create_engine, event, exc, make_url, text

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.demo.embedded import EmbeddedPostgres
from sqla_queries_pool.runtime import jitter as retirement
from sqla_queries_pool.sockets.connect_errors import is_authentication, passes

pytestmark = pytest.mark.slow
Eventually = Callable[..., None]
Case = Callable[["Places"], Any]
HOUR = 3600.0
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
each_driver = pytest.mark.parametrize("driver", [psycopg2, psycopg], ids=["psycopg2", "psycopg"])

# -- what servers say ------------------------------------------------------------------------------


class Places:
    """A server with little room, a proxy in front of it, and what a test opens to fill it."""

    def __init__(self, server: EmbeddedPostgres, proxy: Proxy, driver: ModuleType, stack: ExitStack) -> None:
        self.server = server
        self.proxy = proxy
        self.driver = driver
        self.stack = stack

    def arguments(self, **changed: Any) -> dict[str, Any]:
        """How to connect; roles other than `postgres` have their name for a password."""
        user = changed.get("user", self.server.user)
        password = self.server.password if user == self.server.user else user
        where = {"host": self.server.host, "port": self.server.port}
        return where | {"user": user, "password": password, "dbname": "postgres"} | changed

    def connect(self, **changed: Any) -> Any:
        """Connect until the end of the test."""
        return self.stack.enter_context(closing(self.driver.connect(**self.arguments(**changed))))

    def fill(self, **changed: Any) -> None:
        """Connect until the server refuses."""
        with suppress(self.driver.OperationalError):
            for _ in range(20):
                self.connect(**changed)


@pytest.fixture(scope="module")
def small_server() -> Iterator[EmbeddedPostgres]:
    """A server for 8 connections, two of them for superusers, with roles and databases that have limits."""
    settings = {"max_connections": "8", "superuser_reserved_connections": "2"}
    with (
        EmbeddedPostgres(settings, in_memory()) as server,
        closing(psycopg2.connect(server.url().replace("+psycopg2", ""))) as connection,
    ):
        connection.autocommit = True
        with connection.cursor() as cursor:
            for role, options in (("plain", ""), ("alone", "CONNECTION LIMIT 1")):
                cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{role}' {options}")
            cursor.execute("CREATE ROLE nobody NOLOGIN PASSWORD 'nobody'")
            for database in ("narrow CONNECTION LIMIT 1", "shut ALLOW_CONNECTIONS false", "private"):
                cursor.execute(f"CREATE DATABASE {database}")
            cursor.execute("REVOKE CONNECT ON DATABASE private FROM PUBLIC")
        yield server


@pytest.fixture
def places(small_server: EmbeddedPostgres, driver: ModuleType, eventually: Eventually) -> Iterator[Places]:
    """See Places; nobody is connected when the test begins."""
    eventually(lambda: backends(small_server) == 1, "the last test's connections are gone")
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(small_server.host, small_server.port))
        yield Places(small_server, proxy, driver, stack)


def backends(server: EmbeddedPostgres) -> int:
    """How many connections a server has, by its processes: to ask it would take one more."""
    count = 0
    for process in psutil.Process(server.pid).children():
        with suppress(psutil.Error):  # it has gone meanwhile
            count += server.host in " ".join(process.cmdline())
    return count


def wrong_password(places: Places) -> None:
    """The password is another one."""
    places.connect(password="wrong")


def no_password(places: Places) -> None:
    """None was given."""
    places.connect(password=None, passfile="/dev/null")


def unknown_database(places: Places) -> None:
    """There is no such database."""
    places.connect(dbname="nowhere")


def unknown_role(places: Places) -> None:
    """There is no such role."""
    places.connect(user="nemo")


def role_without_login(places: Places) -> None:
    """The role may not log in."""
    places.connect(user="nobody")


def database_without_connections(places: Places) -> None:
    """The database is closed to everybody; "not currently accepting connections" is for good."""
    places.connect(dbname="shut")


def database_without_privilege(places: Places) -> None:
    """The role may not connect to the database."""
    places.connect(user="plain", dbname="private")


def unknown_setting(places: Places) -> None:
    """What was asked for does not exist."""
    places.connect(options="-c nonsense=1")


def no_tls(places: Places) -> None:
    """TLS is asked for, and the server has none."""
    places.connect(sslmode="require")


def wrong_password_on_the_second_host(places: Places) -> None:
    """Nobody listens on the first: `localhost` is two addresses, and servers often listen on one."""
    places.proxy.refuse()
    hosts, ports = f"{places.server.host},{places.server.host}", f"{places.proxy.port},{places.server.port}"
    places.connect(host=hosts, port=ports, password="wrong")


PERMANENT: list[tuple[Case, str]] = [
    (wrong_password, "password authentication failed"),
    (no_password, "no password supplied"),
    (unknown_database, 'database "nowhere" does not exist'),
    (unknown_role, 'password authentication failed for user "nemo"'),
    (role_without_login, "not permitted to log in"),
    (database_without_connections, 'database "shut" is not currently accepting connections'),
    (database_without_privilege, "permission denied"),
    (unknown_setting, "unrecognized configuration parameter"),
    (no_tls, "server does not support SSL"),
    (wrong_password_on_the_second_host, "password authentication failed"),
]


def role_is_full(places: Places) -> None:
    """The role's own limit."""
    places.fill(user="alone")
    places.connect(user="alone")


def database_is_full(places: Places) -> None:
    """The database's own limit."""
    places.fill(user="plain", dbname="narrow")
    places.connect(user="plain", dbname="narrow")


def only_superusers_left(places: Places) -> None:
    """What is left is kept back."""
    places.fill(user="plain")
    places.connect(user="plain")


def server_is_full(places: Places) -> None:
    """Superusers have taken what was kept back for them, too."""
    places.fill()
    places.connect()


def nobody_listens(places: Places) -> None:
    """The server is down."""
    places.proxy.refuse()
    places.connect(port=places.proxy.port)


def meanwhile(places: Places, fault: Callable[[], None]) -> None:
    """Have something happen after the connection was accepted and before the server has said anything."""
    places.proxy.accept_and_hang()
    connecting = Task(lambda: places.connect(port=places.proxy.port))
    eventually(lambda: places.proxy.accepted, "the connection is accepted")
    fault()
    connecting.result()


def reset_by_the_server(places: Places) -> None:
    """The server has gone down meanwhile."""
    meanwhile(places, places.proxy.reset)


def closed_by_the_server(places: Places) -> None:
    """The server closes the connection without a word."""
    meanwhile(places, places.proxy.close)


def no_unix_socket(places: Places) -> None:
    """The server is down, and its socket is not there."""
    places.connect(host=str(places.server.folder / "data"))


def a_dead_unix_socket(places: Places) -> None:
    """The server is down, and has left its socket."""
    with socket.socket(socket.AF_UNIX) as unix:
        path = places.server.folder / ".s.PGSQL.1"
        path.unlink(missing_ok=True)
        unix.bind(str(path))
        path.chmod(0o777)
    places.connect(host=str(places.server.folder), port=1)


def no_answer(places: Places) -> None:
    """It accepts connections, and that is all."""
    places.proxy.accept_and_hang()
    places.connect(port=places.proxy.port, connect_timeout=2)  # the least that libpq takes


def full_after_one_that_is_down(places: Places) -> None:
    """Of two hosts the first is down, the second one full: both may pass."""
    places.proxy.refuse()
    places.fill()
    hosts, ports = f"{places.server.host},{places.server.host}", f"{places.proxy.port},{places.server.port}"
    places.connect(host=hosts, port=ports)


PASSING: list[Any] = [
    (role_is_full, 'too many connections for role "alone"'),
    (database_is_full, 'too many connections for database "narrow"'),
    (only_superusers_left, "remaining connection slots are reserved"),
    (server_is_full, "too many clients already"),
    (nobody_listens, "Connection refused"),
    (reset_by_the_server, "Connection reset by peer|server closed the connection unexpectedly"),
    (closed_by_the_server, "server closed the connection unexpectedly"),
    (no_unix_socket, "No such file or directory"),
    (a_dead_unix_socket, "Connection refused"),
    (full_after_one_that_is_down, "too many clients already"),
    pytest.param(no_answer, "timeout expired", marks=pytest.mark.slow),
]


@each_driver
@pytest.mark.parametrize(("case", "said"), PERMANENT)
def test_what_is_wrong_for_good_does_not_pass(places: Places, case: Case, said: str) -> None:
    """Passwords, names, privileges: to try again is no use, whatever else stands in the text."""
    with pytest.raises(places.driver.OperationalError, match=said) as caught:
        case(places)
    assert not passes(caught.value)
    of_credentials = "authentication failed|not permitted"
    assert is_authentication(caught.value) == (re.search(of_credentials, said) is not None)


@each_driver
@pytest.mark.parametrize(("case", "said"), PASSING)
def test_what_a_restart_or_too_many_connections_bring_about_passes(
    places: Places, case: Case, said: str
) -> None:
    """Full, down, or just going down: it may be over in a moment."""
    with pytest.raises(places.driver.OperationalError, match=said) as caught:
        case(places)
    assert passes(caught.value)


@each_driver
@pytest.mark.parametrize("state", ["53300", "57P01", "57P02", "57P03", "28P01", "28000", "3D000", "P0001"])
def test_where_there_is_an_sqlstate_it_counts_and_not_the_text(places: Places, state: str) -> None:
    """Drivers know it once there is a connection; what the message then says may be anybody's."""
    said = "too many clients already" if state[0] not in "5" else "in another language"
    with (
        closing(places.connect()) as connection,
        closing(connection.cursor()) as cursor,
        pytest.raises(places.driver.Error) as caught,
    ):
        cursor.execute(f"DO $$BEGIN RAISE EXCEPTION '{said}' USING ERRCODE = '{state}'; END$$")
    assert passes(caught.value) == (state[0] == "5")
    assert is_authentication(caught.value) == (state in ("28P01", "28000"))


@contextmanager
def starting(server: EmbeddedPostgres) -> Iterator[None]:
    """The server has begun to start, and comes no further than to its recovery."""
    go, data = server.folder / "go", server.folder / "data"
    server.stop(keep=True)
    (data / "recovery.signal").touch()
    with open(data / "postgresql.conf", "a") as conf:
        conf.write(f"restore_command = 'until [ -e \"{go}\" ]; do sleep 0.02; done; false'\n")
    start = Task(server.start)
    try:
        yield
    finally:
        go.touch()
        start.result()


@contextmanager
def stopping(server: EmbeddedPostgres) -> Iterator[None]:
    """The server goes down as soon as its last client has left."""
    with closing(psycopg2.connect(server.url().replace("+psycopg2", ""))):
        os.kill(server.pid or 0, signal.SIGTERM)
        yield


@contextmanager
def crashed(server: EmbeddedPostgres) -> Iterator[None]:
    """One of its processes has died, and another one keeps the server from starting anew."""
    url = server.url().replace("+psycopg2", "")
    with closing(psycopg2.connect(url)) as one, closing(psycopg2.connect(url)) as other:
        os.kill(other.info.backend_pid, signal.SIGSTOP)
        os.kill(one.info.backend_pid, signal.SIGKILL)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # the server does not wait for long
                os.kill(other.info.backend_pid, signal.SIGCONT)
    server.restart("immediate")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "said"),
    [
        (starting, "the database system is starting up"),
        (stopping, "the database system is shutting down"),
        (crashed, "the database system is in recovery mode"),
    ],
)
def test_a_server_that_comes_or_goes_says_something_that_passes(
    pg_own_server: Callable[..., EmbeddedPostgres], eventually: Eventually, state: Any, said: str
) -> None:
    """Until it is up, or down: with both drivers, and whatever is said on the way there."""
    server = pg_own_server()
    errors: list[Exception] = []

    def refused(driver: ModuleType) -> bool:
        try:
            driver.connect(server.url().replace("+psycopg2", "")).close()
        except driver.OperationalError as error:
            errors.append(error)
            return said in str(error)
        return False

    with state(server):
        for driver in (psycopg2, psycopg):
            eventually(lambda driver=driver: refused(driver), said)
    assert [str(error) for error in errors if not passes(error)] == []


# -- what PgBouncer says ---------------------------------------------------------------------------


@pytest.fixture
def bouncer(small_server: EmbeddedPostgres, eventually: Eventually) -> Iterator[Callable[..., int]]:
    """Start a PgBouncer in front of a port, with settings: `bouncer(port, max_client_conn=1)`; its port.

    Its files are in the server's folder, since it does not run as root, who may own the temporary one.
    """
    if PGBOUNCER is None:
        pytest.skip("there is no pgbouncer")
    running: list[subprocess.Popen[bytes]] = []
    account = {"user": "nobody", "group": None, "extra_groups": []} if os.geteuid() == 0 else {}  # type: ignore[var-annotated]

    def start(port: int, **settings: object) -> int:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            listens: int = probe.getsockname()[1]
        password = small_server.password
        (small_server.folder / "users.txt").write_text(f'"postgres" "{password}"\n"nemo" "nemo"\n')
        lines = {"listen_addr": "127.0.0.1", "listen_port": listens, "unix_socket_dir": ""}
        lines |= {"auth_type": "plain", "auth_file": "users.txt"} | settings
        config = small_server.folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in lines.items())
        )
        log = small_server.folder / "pgbouncer.log"
        with open(log, "ab") as out:
            command = [str(PGBOUNCER), "pgbouncer.ini"]
            process = subprocess.Popen(
                command,
                cwd=small_server.folder,
                stdout=out,
                stderr=out,
                **account,  # type: ignore[call-overload]
            )
        running.append(process)

        def listening() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", listens)) == 0

        eventually(listening, "pgbouncer")
        return listens

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@each_driver
def test_pgbouncer_that_is_full_or_has_no_server_says_something_that_passes(
    places: Places, bouncer: Callable[..., int]
) -> None:
    """It has as many clients as it may have; or its own server was not there when it started."""
    port = bouncer(places.server.port, max_client_conn=1)
    places.connect(port=port)
    with pytest.raises(places.driver.OperationalError, match="no more connections allowed") as caught:
        places.connect(port=port)
    assert passes(caught.value)

    places.proxy.refuse()
    port = bouncer(places.proxy.port, client_login_timeout=1)
    with pytest.raises(places.driver.OperationalError, match="server down") as caught:
        places.connect(port=port)
    assert passes(caught.value)


@each_driver
def test_pgbouncer_that_knows_no_such_database_or_password_says_something_that_does_not_pass(
    places: Places, bouncer: Callable[..., int]
) -> None:
    """Its own words for a wrong password, and the server's for a database that is not there."""
    port = bouncer(places.server.port)
    for changed in ({"password": "wrong"}, {"user": "nemo"}, {"dbname": "nowhere"}):
        with pytest.raises(places.driver.OperationalError) as caught:
            places.connect(port=port, **changed)
        assert not passes(caught.value), caught.value


# -- what the pool does ----------------------------------------------------------------------------


class Outside:
    """A database behind a proxy, a pool of its own for the test, engines on it, and what they attempt."""

    def __init__(self, url: str, proxy: Proxy, clock: FakeClock) -> None:
        self.url = proxy.url(url)
        self.proxy = proxy
        self.clock = clock
        self.pid = new_pid()
        self.engines: list[Engine] = []
        self.attempts: Counter[Engine] = Counter()
        """How often each of the engines has called the driver's connect."""

    def engine(self, url: str | None = None, **kw: Any) -> Engine:
        """One more engine on the same pool; a checkout that waits too long hangs visibly."""
        settings = {"max_size": 20, "pool_timeout": None, "idle_ttl": None} | kw
        engine = create_engine(url or self.url, poolclass=QueriesPool, pool_id=self.pid, **settings)
        self.engines.append(engine)

        @event.listens_for(engine, "do_connect")
        def count(*_: Any) -> None:
            self.attempts[engine] += 1

        return engine

    @property
    def shared(self) -> Any:
        """The pool."""
        return inside.shared(pool_of(self.engines[0]))

    def outage(self) -> None:
        """The server goes: connections end, and no more are accepted."""
        self.proxy.refuse()
        self.proxy.close()

    def pause_is_over(self) -> None:
        """As the pool's clock says."""
        self.clock.now += 2 * HOUR

    def connecting(self, engine: Engine, number: int = 1) -> list[Task[Any]]:
        """Threads that check out and at once check in; what they return is whom they got."""

        def use() -> int:
            with engine.connect() as connection:
                return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

        return [Task(use) for _ in range(number)]


@pytest.fixture
def outside(pg_url: str, pg_server: EmbeddedPostgres) -> Iterator[Outside]:
    """See Outside."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        outside = Outside(pg_url, proxy, FakeClock())
        yield outside
        proxy.pass_on()
        for engine in outside.engines:
            engine.dispose()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order alone matters."""
    monkeypatch.setattr(retirement, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retirement, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch, outside: Outside) -> None:
    """Pauses are an hour, and the time stands still until the test says that one is over."""
    monkeypatch.setattr(retirement, "FIRST_PAUSE", HOUR)
    monkeypatch.setattr(retirement, "LONGEST_PAUSE", HOUR)
    monkeypatch.setattr("sqla_queries_pool.runtime.admission.REMEMBERED", 1000 * HOUR)
    PoolManager.create(outside.pid, max_size=20, idle_ttl=None, time_method=outside.clock)


def wrong(url: str, **changed: Any) -> str:
    """The URL with something else in it."""
    return make_url(url).set(**changed).render_as_string(hide_password=False)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
@pytest.mark.parametrize(
    "changed",
    [{"password": "wrong"}, {"database": "nowhere"}, {"username": "nemo"}],
    ids=lambda c: next(iter(c)),
)
def test_a_permanent_error_comes_at_once_although_the_database_is_there(
    outside: Outside, driver: str, changed: dict[str, str]
) -> None:
    """One attempt, the driver's own class, no pause for the others, and every slot is there afterwards."""
    good = outside.engine()
    with good.connect():
        bad = outside.engine(wrong(outside.url, drivername=f"postgresql+{driver}", **changed))
        with pytest.raises(exc.OperationalError, match="failed: FATAL") as caught:
            Task(bad.connect).result()
        assert type(caught.value.orig) is {"psycopg2": psycopg2, "psycopg": psycopg}[driver].OperationalError
        with pytest.raises(type(caught.value.orig)):  # type: ignore[type-var]
            Task(pool_of(bad).connect).result()
    # The first one of SQLAlchemy's engine reads the server's version and the like, by the same connection.
    # What has no valid password is tried once more: the listener that counts might have another one.
    assert outside.attempts[bad] == (2 if "database" in changed else 4)
    assert inside.ledger(outside.shared).backoff.refusals == 0
    assert outside.shared.numbers.total == 1
    for task in outside.connecting(good, 20):
        task.result()


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_passing_error_is_tried_again_until_the_server_is_back(
    outside: Outside, eventually: Eventually, timeout: float | None, driver: str
) -> None:
    """While a connection of the pool is open: nobody sees an error, whether he waits for ever or not."""
    url = wrong(outside.url, drivername=f"postgresql+{driver}")
    engine = outside.engine(url, pool_timeout=timeout)
    with engine.connect():
        outside.proxy.refuse()
        (task,) = outside.connecting(engine)
        eventually(lambda: outside.attempts[engine] > 4, "it tries again")
        outside.proxy.pass_on()
        task.result()
    assert inside.ledger(outside.shared).backoff.refusals == 0


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(("idle", "again"), [(29.9, True), (30.1, False)])
@pytest.mark.parametrize("detached", [False, True])
def test_a_database_that_was_there_is_remembered_for_half_a_minute(
    outside: Outside, eventually: Eventually, idle: float, again: bool, detached: bool
) -> None:
    """After the last connection was closed or detached a refusal is an outage; later the driver's error."""
    PoolManager.create(outside.pid, max_size=20, time_method=outside.clock)
    outside.clock.now = 1000.0
    engine = outside.engine()
    with engine.connect() as connection:
        if detached:
            connection.detach()
    engine.dispose()
    before = outside.attempts[engine]
    outside.clock.now += idle
    outside.proxy.refuse()
    (task,) = outside.connecting(engine)
    if not again:
        with pytest.raises(exc.OperationalError, match="Connection refused"):
            task.result()
        assert outside.attempts[engine] == before + 1
        return
    eventually(lambda: outside.shared.numbers.waiting, "it waits")
    outside.proxy.pass_on()
    outside.clock.now += 1
    task.result()


def test_a_database_that_was_never_there_is_not_tried_again(outside: Outside) -> None:
    """When the application starts it is to learn at once that the database is down, each thread of it."""
    engine = outside.engine()
    outside.proxy.refuse()
    for task in outside.connecting(engine, 20):
        with pytest.raises(exc.OperationalError, match="Connection refused"):
            task.result()
    assert outside.attempts[engine] == 20
    assert inside.ledger(outside.shared).backoff.refusals == 0


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_at_the_end_of_the_timeout_the_drivers_own_error_is_raised(outside: Outside, driver: str) -> None:
    """What callers catch; not CheckoutTimeout, although a checkout timed out."""
    engine = outside.engine(wrong(outside.url, drivername=f"postgresql+{driver}"), pool_timeout=1.2)
    with engine.connect():
        outside.proxy.refuse()
        with pytest.raises(exc.OperationalError, match="Connection refused") as caught:
            engine.connect()
        assert isinstance(
            caught.value.orig, {"psycopg2": psycopg2, "psycopg": psycopg}[driver].OperationalError
        )
        assert outside.attempts[engine] > 2
    assert outside.shared.numbers.total == 1


@pytest.mark.usefixtures("long_pauses")
def test_who_had_no_attempt_of_his_own_gets_the_drivers_error_too(
    outside: Outside, eventually: Eventually
) -> None:
    """In an outage few are let try; the others time out for the same reason, and can't know of it."""
    patient = outside.engine()
    with patient.connect():
        outside.proxy.refuse()
        (task,) = outside.connecting(patient)
        eventually(lambda: outside.shared.numbers.waiting == 1, "the refusal")
        for timeout in (0, 0.1):
            engine = outside.engine(pool_timeout=timeout)
            with pytest.raises(exc.OperationalError, match="Connection refused"):
                engine.connect()
            assert outside.attempts[engine] == 0
        full = outside.engine(max_size=1, pool_timeout=0.1)
        PoolManager.set_max_size(outside.pid, 1)
        with pytest.raises(CheckoutTimeout):  # no server would help here
            full.connect()
        PoolManager.set_max_size(outside.pid, 20)
        outside.proxy.pass_on()
        outside.pause_is_over()
        task.result()


@pytest.mark.usefixtures("long_pauses")
def test_an_outage_that_lasts_comes_to_everybody_at_once(
    outside: Outside, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it was half a minute ago that the database was there, nobody waits for his turn to be refused."""
    monkeypatch.setattr("sqla_queries_pool.runtime.admission.REMEMBERED", HOUR)
    engine = outside.engine()
    engine.connect().close()
    outside.outage()
    engine.dispose()
    tasks = outside.connecting(engine, 10)
    eventually(lambda: outside.shared.numbers.waiting == 10, "all of them wait")
    outside.pause_is_over()
    for task in [*tasks, *outside.connecting(engine, 3)]:
        with pytest.raises(exc.OperationalError, match="Connection refused"):
            task.result()


@pytest.mark.usefixtures("long_pauses")
def test_with_a_timeout_of_0_there_is_one_attempt(outside: Outside) -> None:
    """Who can't wait waits for no pause, and has the driver's error at once."""
    engine = outside.engine(pool_timeout=0)
    with engine.connect():
        outside.proxy.refuse()
        for _ in range(2):
            with pytest.raises(exc.OperationalError, match="Connection refused"):
                engine.connect()
        assert outside.attempts[engine] == 2


@pytest.mark.usefixtures("long_pauses")
def test_a_checkout_that_waits_for_the_server_takes_what_is_returned_meanwhile(
    outside: Outside, eventually: Eventually
) -> None:
    """A connection of our own is as good as a new one: no waiting for the end of the pause."""
    engine = outside.engine()
    held = engine.connect()
    mine = held.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    outside.proxy.refuse()
    tasks = outside.connecting(engine, 3)
    eventually(lambda: outside.shared.numbers.waiting == 3, "they wait")
    held.close()
    assert [task.result() for task in tasks] == [mine] * 3


@pytest.mark.usefixtures("long_pauses")
@pytest.mark.parametrize("idle", [0, 15])
def test_in_an_outage_one_tries_after_each_pause_and_then_everybody_is_served(
    outside: Outside, eventually: Eventually, idle: int
) -> None:
    """40 threads, 20 slots: no more attempts than slots to begin with, then one per pause, one error in all:
    none.  Connections that have died meanwhile are no reason for a storm."""
    engine = outside.engine(max_size=20)
    with ExitStack() as stack:
        for _ in range(idle or 1):
            stack.enter_context(engine.connect())
    if not idle:
        engine.dispose()
    outside.outage()
    before = outside.attempts[engine]
    tasks = outside.connecting(engine, 40)

    def all_wait(attempts: int) -> bool:
        return outside.attempts[engine] >= attempts and outside.shared.numbers.waiting == 40

    eventually(lambda: all_wait(before + 1), "all of them wait")
    first = outside.attempts[engine]
    assert first - before <= 20
    for pause in range(1, 4):
        outside.pause_is_over()
        eventually(lambda pause=pause: all_wait(first + pause), "the next one is refused")
        assert outside.attempts[engine] == first + pause
    outside.proxy.pass_on()
    outside.pause_is_over()
    for task in tasks:
        task.result()
    assert outside.attempts[engine] <= first + 3 + 20
    assert_whole(pool_of(engine), eventually, 20)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("how", ["invalidated", "found dead", "soft", "recycle"])
def test_a_reopening_is_tried_again_as_well(outside: Outside, eventually: Eventually, how: str) -> None:
    """Whoever finds that a connection has to be replaced, the pool or SQLAlchemy: its server may be full."""
    engine = outside.engine(pool_recycle=0 if how == "recycle" else -1)
    with engine.connect(), engine.connect() as connection:
        if how == "invalidated":
            connection.invalidate()
        elif how == "soft":
            inside.invalidate_all(
                pool_of(engine), connection.connection
            )  # as an engine does after a disconnect
    if how == "found dead":
        outside.outage()
    else:
        outside.proxy.refuse()
    before = outside.attempts[engine]
    (task, other) = outside.connecting(engine, 2)
    eventually(lambda: outside.attempts[engine] > before + 2 or not (task.is_alive() or other.is_alive()))
    outside.proxy.pass_on()
    task.result()
    other.result()


@pytest.mark.usefixtures("long_pauses")
def test_two_engines_on_one_pool_have_one_pause(outside: Outside, eventually: Eventually) -> None:
    """It is one server: what one of them has found out the other needs not try; a success lets both in."""
    first, second = outside.engine(), outside.engine(wrong(outside.url, drivername="postgresql+psycopg"))
    with first.connect():
        outside.proxy.refuse()
        tasks = outside.connecting(first)
        eventually(lambda: outside.shared.numbers.waiting == 1, "the refusal")
        tasks += outside.connecting(second, 5)
        eventually(lambda: outside.shared.numbers.waiting == 6, "all of them wait")
        assert outside.attempts[second] == 0
        outside.proxy.pass_on()
        outside.pause_is_over()
        for task in tasks:
            task.result()
        assert outside.attempts[second] > 0


@pytest.mark.usefixtures("long_pauses")
def test_a_wait_in_a_queue_that_no_server_could_shorten_asks_as_seldom_as_ever(
    outside: Outside, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals of long ago, which nobody has tried to overcome, make no waiting checkout busy."""
    small, other = outside.engine(max_size=1), outside.engine(pool_timeout=0)
    with small.connect():
        outside.proxy.refuse()
        with pytest.raises(exc.OperationalError):
            other.connect()
        outside.pause_is_over()
        slices: list[float] = []
        wait = "sqla_queries_pool.concurrency.threads.ThreadWaiter.wait"

        def wait_less(waiter: Any, seconds: float) -> None:
            slices.append(seconds)
            inside.sleep_lightly(waiter, seconds)

        monkeypatch.setattr(wait, wait_less)
        (task,) = outside.connecting(small)
        eventually(lambda: len(slices) > 10, "it waits")
        assert median(slices[4:10]) > 0.5  # one may be short, where the machine was busy before it
    task.result()


@pytest.mark.usefixtures("long_pauses")
def test_ctrl_c_during_a_pause_loses_nothing(outside: Outside, eventually: Eventually) -> None:
    """Who is interrupted while it waits for the server leaves the queue, and the others are served."""
    engine = outside.engine()
    main = threading.get_ident()
    with engine.connect():
        outside.proxy.refuse()
        (task,) = outside.connecting(engine)
        eventually(lambda: outside.shared.numbers.waiting == 1, "the refusal")

        def interrupt() -> None:
            eventually(lambda: outside.shared.numbers.waiting == 2, "the main thread waits")
            signal.pthread_kill(main, signal.SIGINT)

        interrupting = Task(interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.connect()
        interrupting.result()
        assert outside.shared.numbers.waiting == 1
        outside.proxy.pass_on()
        outside.pause_is_over()
        task.result()
    assert_whole(pool_of(engine), eventually, 20)


@pytest.mark.usefixtures("short_pauses")
def test_what_is_no_error_of_the_driver_is_not_tried_again(outside: Outside, eventually: Eventually) -> None:
    """Ctrl-C and the like while connecting, whatever its text: it goes to the caller, and the slot on."""
    engine = outside.engine()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("Connection refused")

    with engine.connect():
        event.listen(engine, "do_connect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Task(engine.connect).result()
        event.remove(engine, "do_connect", interrupt)
        assert outside.attempts[engine] == 2
    assert_whole(pool_of(engine), eventually, 20)


@pytest.mark.usefixtures("short_pauses")
def test_no_secret_is_in_what_is_raised_or_logged(outside: Outside, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the password nor an address with it, while it is tried again and at the end."""
    caplog.set_level("DEBUG")
    password = make_url(outside.url).password
    engine = outside.engine(pool_timeout=0.1, echo_pool="debug")
    bad = outside.engine(wrong(outside.url, password="hunter2"), pool_timeout=0.1, echo_pool="debug")
    said = ""
    with engine.connect():
        with pytest.raises(exc.OperationalError) as caught:
            bad.connect()
        said += "".join(traceback.format_exception(caught.value))
        outside.proxy.refuse()
        for one in (engine, bad):
            with pytest.raises(exc.OperationalError) as caught:
                one.connect()
            said += "".join(traceback.format_exception(caught.value)) + repr(one.pool) + str(outside.shared)
    assert password
    for secret in (password, "hunter2"):
        assert secret not in said
        assert secret not in caplog.text


# -- a server that is full -------------------------------------------------------------------------


@pytest.fixture
def full_server(pg_own_server: Callable[..., EmbeddedPostgres]) -> EmbeddedPostgres:
    """A server for 8 connections."""
    return pg_own_server(max_connections="8", superuser_reserved_connections="0")


@pytest.mark.slow
@pytest.mark.parametrize("engines", [1, 2])
def test_a_server_with_fewer_connections_than_the_pool_may_have_makes_no_errors(
    full_server: EmbeddedPostgres, engines: int
) -> None:
    """8 connections, a limit of 20, 40 threads: each of them gets its share, and none an error."""
    pid = new_pid()
    several = [
        create_engine(
            full_server.url(driver), poolclass=QueriesPool, pool_id=pid, max_size=20, pool_timeout=60
        )
        for driver in ("psycopg2", "psycopg")[:engines]
    ]
    begin, stop = threading.Barrier(40), threading.Event()
    served: Counter[int] = Counter()

    def use(engine: Engine) -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_sleep(0.002)"))

    def work(number: int) -> None:
        engine = several[number % engines]
        begin.wait(20)
        use(engine)  # one of them is SQLAlchemy's first, which reads this and that and takes long
        begin.wait(60)
        while not stop.is_set():
            use(engine)
            served[number] += 1
            if len(served) == 40 and min(served.values()) >= 5:
                stop.set()

    tasks = [Task(lambda number=number: work(number)) for number in range(40)]  # type: ignore[misc]
    for task in tasks:
        try:
            task.result()
        except BaseException:
            begin.abort()
            raise
    if engines == 1:  # slots move between two engines once in each pause: that takes a while
        assert max(served.values()) <= 10 * min(served.values()), served
    for engine in several:
        engine.dispose()


def test_an_engine_does_not_starve_beside_what_another_one_has_idle(full_server: EmbeddedPostgres) -> None:
    """The server is full of our own connections, the limit is not reached: one of them gives way."""
    pid = new_pid()
    first, second = [
        create_engine(full_server.url(), poolclass=QueriesPool, pool_id=pid, max_size=20, pool_timeout=20)
        for _ in range(2)
    ]
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(first.connect())
    with second.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
    assert pool_of(first).checkedin() == 7
    for engine in (first, second):
        engine.dispose()
