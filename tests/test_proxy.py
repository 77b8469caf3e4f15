from __future__ import annotations

import gc
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import psycopg2.extensions
import pytest
from conftest import Observer, SessionServer
from fakes import SECONDS, Task
from proxy import BACKLOG, CHUNK, GSS_REQUEST, HOST, RESET_ON_CLOSE, SSL_REQUEST, Proxy
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError

MUCH = 8_000_000
"""Bytes: more than all buffers on the way have room for."""
LONG = 3600.0
"""Seconds: a delay that no test waits for."""
Eventually = Callable[..., None]


class Client:
    """An application with one of the drivers, on the database of the test."""

    def __init__(self, url: str, driver: str, stack: ExitStack) -> None:
        self.url = make_url(url).set(drivername=driver).render_as_string(hide_password=False)
        self.database = make_url(url).database or ""
        self._stack = stack

    def connect(self, proxy: Proxy | None, *, unix: bool = False, **options: str) -> Connection:
        """A new connection, through the proxy or directly, closed when the test ends."""
        url = self.url if proxy is None else proxy.url(self.url, unix=unix)
        with_options = make_url(url).update_query_dict(options)
        engine = create_engine(with_options, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        return self._stack.enter_context(engine.connect())


@pytest.fixture(params=["postgresql+psycopg2", "postgresql+psycopg"])
def client(request: pytest.FixtureRequest, pg_url: str) -> Iterator[Client]:
    """See Client."""
    with ExitStack() as stack:
        yield Client(pg_url, request.param, stack)


@pytest.fixture
def proxy(pg_server: SessionServer) -> Iterator[Proxy]:
    """A proxy in front of the server of the tests."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        yield proxy


@pytest.fixture
def tls_proxy(pg_server: SessionServer) -> Iterator[Proxy]:
    """The same, and it offers TLS."""
    pytest.importorskip("trustme")
    with Proxy(pg_server.host, pg_server.port, tls=True) as proxy:
        yield proxy


@pytest.fixture
def unix_proxy(pg_server: SessionServer, tmp_path: Path) -> Iterator[Proxy]:
    """The same, without TLS, and it listens on a unix socket, too."""
    with Proxy(pg_server.host, pg_server.port, unix=tmp_path) as proxy:
        yield proxy


class Wire:
    """Both ends of a connection through a proxy, without PostgreSQL: what passes is seen byte by byte."""

    def __init__(self, stack: ExitStack) -> None:
        self._listener = stack.enter_context(socket.create_server((HOST, 0), backlog=BACKLOG))
        self._listener.settimeout(SECONDS)
        self._stack = stack
        self.proxy = stack.enter_context(Proxy(HOST, self._listener.getsockname()[1]))

    def dial(self) -> socket.socket:
        """The client's end of a new connection."""
        return self._stack.enter_context(socket.create_connection((HOST, self.proxy.port), SECONDS))

    def answer(self) -> socket.socket:
        """The server's end of the next one."""
        server = self._stack.enter_context(self._listener.accept()[0])
        server.settimeout(SECONDS)
        return server

    def close_server(self) -> None:
        """Nobody listens behind the proxy any more."""
        self._listener.close()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection over which a byte has passed each way."""
        client, server = self.dial(), self.answer()
        for source, sink in ((client, server), (server, client)):
            source.sendall(b"!")
            assert sink.recv(1) == b"!"
        return client, server


@pytest.fixture
def wire() -> Iterator[Wire]:
    """See Wire."""
    with ExitStack() as stack:
        yield Wire(stack)


def rounds(proxy: Proxy) -> None:
    """Let the proxy look at all its sockets again and again, without a change of what it does."""
    for _ in range(100):
        proxy._do(lambda: None)


def silent(sock: socket.socket) -> bool:
    """Whether there is nothing to be read, and the connection is open."""
    return not select.select([sock], [], [], 0)[0]


def writable(sock: socket.socket, seconds: float = 0.0) -> bool:
    """Whether there is room for more, at once or within that time."""
    return bool(select.select([], [sock], [], seconds)[1])


def drain(sock: socket.socket) -> None:
    """Read what has arrived."""
    while not silent(sock):
        sock.recv(1_000_000)


def drained(sock: socket.socket) -> bool:
    """Read what has arrived; is there no more?"""
    drain(sock)
    return silent(sock)


def applications(observer: Observer, database: str) -> list[Any]:
    """The names that the clients of a database have told to the server."""
    sql = "SELECT application_name FROM pg_stat_activity WHERE datname = %s AND application_name <> ''"
    return [name for (name,) in observer.query(sql, database)]


def say(connection: Connection, name: str) -> Any:
    """A statement that the server shows to have come: it names the client."""
    return connection.scalar(text("SELECT set_config('application_name', :name, false)"), {"name": name})


def assert_lost(connection: Connection) -> None:
    """SQLAlchemy understands that the connection is gone."""
    assert_lost_with(connection, "SELECT 1")


def assert_lost_with(connection: Connection, sql: str) -> None:
    """The same, by this statement."""
    with pytest.raises(DBAPIError) as caught:
        connection.execute(text(sql))
    assert caught.value.connection_invalidated


def encrypted(connection: Connection) -> bool:
    """Whether the driver speaks TLS."""
    raw: Any = connection.connection.dbapi_connection
    return bool((raw.info if isinstance(raw, psycopg2.extensions.connection) else raw.pgconn).ssl_in_use)


def open_files() -> int:
    """How many file descriptors this process has, garbage left aside."""
    gc.collect()
    return psutil.Process().num_fds()


def assert_hangs(
    proxy: Proxy, client: Client, observer: Observer, eventually: Eventually, others: int = 0, **how: Any
) -> None:
    """New connections are accepted, the server hears nothing of them, and they come about when it passes."""
    accepted = proxy.accepted
    connecting = Task(lambda: client.connect(proxy, **how))
    eventually(lambda: proxy.accepted == accepted + 1, "the proxy accepts")
    for _ in range(50):
        assert observer.backends(client.database) == others
    assert connecting.is_alive()
    proxy.pass_on()
    assert say(connecting.result(), "late") == "late"


def assert_holds(
    client: Client,
    connection: Connection,
    observer: Observer,
    hold: Callable[[], None],
    go_on: Callable[[], None],
) -> None:
    """Between the two, a statement does not arrive at the server, and then it does after all."""
    say(connection, "before")
    hold()
    held = Task(lambda: say(connection, "after"))
    for _ in range(50):
        assert applications(observer, client.database) == ["before"]
    assert held.is_alive()
    go_on()
    assert held.result() == "after"
    assert applications(observer, client.database) == ["after"]


# -- passing on ------------------------------------------------------------------------------------


def test_what_is_sent_is_passed_on_both_ways(proxy: Proxy, client: Client) -> None:
    """More than all buffers hold, to the server and back."""
    connection = client.connect(proxy)
    assert connection.scalar(text("SELECT CAST(:much AS text)"), {"much": "x" * MUCH}) == "x" * MUCH


def test_who_does_not_read_slows_the_other_side_down(wire: Wire) -> None:
    """The proxy keeps a limited amount, and nothing of it is lost."""
    client, server = wire.pair()
    sent = bytearray()
    while writable(client, 0.2):
        chunk = len(sent).to_bytes(8, "big") * (CHUNK // 8)
        sent += chunk[: client.send(chunk)]
        assert len(sent) < 10 * MUCH
    client.shutdown(socket.SHUT_WR)
    with server.makefile("rb") as file:
        assert file.read() == sent


def test_connections_are_counted(proxy: Proxy, client: Client, eventually: Eventually) -> None:
    """`connections` are those that are open, `accepted` those that there ever were."""
    first, second = client.connect(proxy), client.connect(proxy)
    assert (proxy.connections, proxy.accepted) == (2, 2)
    first.close()
    eventually(lambda: proxy.connections == 1, "the proxy sees the end")
    second.close()
    eventually(lambda: proxy.connections == 0, "the proxy sees the end")
    assert proxy.accepted == 2


def test_the_end_of_one_side_comes_to_the_other_after_what_was_sent(wire: Wire) -> None:
    """In both directions, and nothing that was sent before is lost."""
    for which in (0, 1):
        ends = wire.pair()
        ends[which].sendall(b"x" * 100_000)
        ends[which].close()
        with ends[1 - which].makefile("rb") as file:
            assert len(file.read()) == 100_000


def test_a_reset_by_one_side_comes_to_the_other(wire: Wire, eventually: Eventually) -> None:
    """The application tells a server that crashed from one that closed the connection."""
    client, server = wire.pair()
    client.sendall(b"unread")
    eventually(lambda: server.recv(1, socket.MSG_PEEK), "it is there")
    server.close()  # with something unread, so it is a reset
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_the_servers_last_words_come_through(proxy: Proxy, client: Client, pg_observer: Observer) -> None:
    """Of a backend that is terminated, an application learns what it learns without the proxy."""
    learnt = []
    connections = client.connect(proxy), client.connect(None)
    assert pg_observer.terminate(client.database) == 2
    for connection in connections:
        with pytest.raises(DBAPIError) as caught:
            say(connection, "lost")
        learnt.append(str(caught.value))
    assert learnt[0] == learnt[1]
    assert "psycopg2" in learnt[0] or "due to administrator command" in learnt[0]


def test_without_a_server_a_connection_is_reset(wire: Wire, eventually: Eventually) -> None:
    """The proxy has accepted it before it can know; it goes on working."""
    wire.close_server()
    with pytest.raises(ConnectionResetError):
        wire.dial().recv(1)
    eventually(lambda: wire.proxy.connections == 0, "the proxy has forgotten it")
    wire.proxy.pass_on()


# -- blackhole -------------------------------------------------------------------------------------


def test_no_byte_passes_a_blackhole(wire: Wire, eventually: Eventually) -> None:
    """From the moment that the method has returned, while both sides send all the time."""
    client, server = wire.pair()
    over = threading.Event()

    def talk(end: socket.socket) -> None:
        while not over.is_set():
            if writable(end, 0.01):
                end.send(b"x" * CHUNK)

    talkers = [Task(lambda end=end: talk(end)) for end in (client, server)]  # type: ignore[misc]
    try:
        eventually(lambda: not any(writable(end) for end in (client, server)), "all buffers are full")
        wire.proxy.blackhole()
        for end in (client, server):  # what was passed on before may still arrive
            eventually(lambda end=end: drained(end), "what was under way has arrived")
        rounds(wire.proxy)
        assert silent(client)
        assert silent(server)
        wire.proxy.pass_on()
        for end in (client, server):
            assert end.recv(1) == b"x"
    finally:
        over.set()
        for talker in talkers:
            talker.result()


def test_a_blackhole_holds_statements_until_they_pass_again(
    proxy: Proxy, client: Client, pg_observer: Observer
) -> None:
    """As after a network partition: what was sent arrives late, and the connection works on."""
    assert_holds(client, client.connect(proxy), pg_observer, proxy.blackhole, proxy.pass_on)


def test_a_blackhole_holds_an_answer_until_it_passes_again(
    proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually
) -> None:
    """The server has done what it was told, and the application does not know."""
    connection, other = client.connect(proxy), client.connect(None)
    other.execute(text("SELECT pg_advisory_lock(1)"))
    sql = text("SELECT 'done' FROM pg_advisory_lock(1)")
    held = Task(lambda: connection.scalar(sql))
    eventually(lambda: pg_observer.backends(client.database, "active") == 1, "the statement waits")
    proxy.blackhole()
    other.execute(text("SELECT pg_advisory_unlock(1)"))
    eventually(lambda: pg_observer.backends(client.database, "idle") == 2, "the server has answered")
    rounds(proxy)
    assert held.is_alive()
    proxy.pass_on()
    assert held.result() == "done"


def test_a_blackhole_accepts_connections_and_answers_none(
    proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually
) -> None:
    """The server hears nothing of them, until they pass."""
    proxy.blackhole()
    assert_hangs(proxy, client, pg_observer, eventually)


def test_a_blackhole_hides_an_end(
    proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually
) -> None:
    """The server does not learn that the application has gone, until it passes again."""
    connection = client.connect(proxy)
    proxy.blackhole()
    connection.close()
    rounds(proxy)
    assert pg_observer.backends(client.database) == 1
    assert proxy.connections == 1
    proxy.pass_on()
    eventually(lambda: pg_observer.backends(client.database) == 0, "the server sees the end")
    eventually(lambda: proxy.connections == 0, "the proxy sees the end")


def test_a_blackhole_hides_a_reset(wire: Wire) -> None:
    """The other side learns of it when it passes again."""
    client, server = wire.pair()
    wire.proxy.blackhole()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    client.close()
    rounds(wire.proxy)
    assert silent(server)
    wire.proxy.pass_on()
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_what_was_delayed_goes_before_what_a_blackhole_held(wire: Wire) -> None:
    """What waits in the proxy for its time is kept, too, and stays before what came later."""
    client, server = wire.pair()
    wire.proxy.delay(LONG)
    client.sendall(b"first ")
    rounds(wire.proxy)
    wire.proxy.blackhole()
    client.sendall(b"second")
    rounds(wire.proxy)
    assert silent(server)
    wire.proxy.pass_on()
    with server.makefile("rb") as file:
        assert file.read(12) == b"first second"


# -- accept_and_hang, refuse -----------------------------------------------------------------------


def test_a_proxy_that_hangs_accepts_connections_and_answers_none(
    proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually
) -> None:
    """Those that there are go on, new ones wait until they pass."""
    connection = client.connect(proxy)
    proxy.accept_and_hang()
    assert say(connection, "goes on") == "goes on"
    assert_hangs(proxy, client, pg_observer, eventually, others=1)
    assert say(connection, "goes on") == "goes on"


def test_what_connected_before_the_proxy_hangs_goes_on(wire: Wire) -> None:
    """Also where the proxy had not got round to accepting it."""
    for _ in range(20):
        client = wire.dial()
        wire.proxy.accept_and_hang()
        client.sendall(b"x")
        assert wire.answer().recv(1) == b"x"
        wire.proxy.pass_on()


def test_modes_for_new_connections_leave_those_that_are_held(wire: Wire) -> None:
    """What a blackhole holds is not let go by a proxy that hangs or refuses."""
    client, server = wire.pair()
    wire.proxy.blackhole()
    client.sendall(b"x")
    wire.proxy.accept_and_hang()
    rounds(wire.proxy)
    wire.proxy.refuse()
    rounds(wire.proxy)
    assert silent(server)
    wire.proxy.pass_on()
    assert server.recv(1) == b"x"


def test_a_proxy_that_refuses_comes_back_on_its_port(proxy: Proxy, client: Client) -> None:
    """New connections fail at once, those that there are go on."""
    connection = client.connect(proxy)
    proxy.refuse()
    with pytest.raises(OperationalError, match=r"[Cc]onnection refused"):
        client.connect(proxy)
    proxy.refuse()
    assert say(connection, "goes on") == "goes on"
    proxy.pass_on()
    assert say(client.connect(proxy), "comes back") == "comes back"
    assert proxy.accepted == 2


def test_a_proxy_that_refuses_keeps_its_port(wire: Wire) -> None:
    """Nobody else can have it meanwhile."""
    wire.proxy.refuse()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, wire.proxy.port))
    wire.proxy.pass_on()
    wire.pair()


def test_what_connected_before_the_proxy_refuses_goes_on(wire: Wire) -> None:
    """Also where the proxy had not got round to accepting it."""
    for _ in range(20):
        client = wire.dial()
        wire.proxy.refuse()
        client.sendall(b"x")
        assert wire.answer().recv(1) == b"x"
        wire.proxy.pass_on()


# -- reset, close ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "close"])
def test_connections_are_lost_and_new_ones_pass(
    proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually, how: str
) -> None:
    """Of a reset and of an end, the drivers, SQLAlchemy and the server learn."""
    connections = [client.connect(proxy) for _ in range(3)]
    getattr(proxy, how)()
    assert proxy.connections == 0
    for connection in connections:
        assert_lost(connection)
    eventually(lambda: pg_observer.backends(client.database) == 0, "the server sees the end")
    assert say(client.connect(proxy), "new") == "new"


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_statement_under_way_is_lost(
    proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually, how: str
) -> None:
    """Whoever waits for an answer is told, also out of a blackhole."""
    connection = client.connect(proxy)
    lost = Task(lambda: assert_lost_with(connection, "SELECT pg_sleep(600)"))
    eventually(lambda: pg_observer.backends(client.database, "active") == 1, "the statement runs")
    proxy.blackhole()
    getattr(proxy, how)()
    lost.result()


def test_a_reset_is_a_reset_to_both_sides(wire: Wire) -> None:
    """RST, also with nothing unread."""
    ends = wire.pair()
    wire.proxy.reset()
    for end in ends:
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_an_end_is_an_end_to_both_sides(wire: Wire) -> None:
    """FIN, also where the proxy has not read yet what was sent."""
    ends = wire.pair()
    wire.proxy.blackhole()
    for end in ends:
        end.sendall(b"unread")
    wire.proxy.close()
    for end in ends:
        assert end.recv(1) == b""


@pytest.mark.parametrize(("how", "error"), [("reset", True), ("close", False)])
def test_what_has_just_connected_is_lost_as_well(wire: Wire, how: str, error: bool) -> None:
    """Also where the proxy had not got round to accepting it."""
    for _ in range(20):
        client = wire.dial()
        getattr(wire.proxy, how)()
        if error:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == b""
    assert wire.proxy.accepted == 20


# -- delay -----------------------------------------------------------------------------------------


def test_a_delay_holds_a_statement_until_its_time(
    proxy: Proxy, client: Client, pg_observer: Observer
) -> None:
    """A long one keeps it away from the server; with the end of the delay its time has come."""
    connection = client.connect(proxy)
    assert_holds(client, connection, pg_observer, lambda: proxy.delay(LONG), proxy.pass_on)


def test_a_delay_passes_by_itself_and_in_order(proxy: Proxy, client: Client) -> None:
    """Connecting, many statements and a long answer pass, and nobody else moves the proxy."""
    proxy.delay(0.005)
    connection = client.connect(proxy)
    assert [say(connection, name) for name in "abc"] == ["a", "b", "c"]
    assert connection.scalar(text("SELECT repeat('x', 1000000)")) == "x" * 1_000_000


def test_an_end_is_delayed_like_a_byte(wire: Wire) -> None:
    """The other side sees it after what was sent before, and not earlier."""
    client, server = wire.pair()
    wire.proxy.delay(LONG)
    client.sendall(b"x")
    client.close()
    rounds(wire.proxy)
    assert silent(server)
    wire.proxy.pass_on()
    assert (server.recv(1), server.recv(1)) == (b"x", b"")


# -- TLS -------------------------------------------------------------------------------------------


def test_tls_ends_at_the_proxy(
    tls_proxy: Proxy, client: Client, pg_observer: Observer, tmp_path: Path
) -> None:
    """The driver verifies the certificate and encrypts; the server sees a plain connection."""
    authority = tmp_path / "ca.pem"
    tls_proxy.certificate_authority.cert_pem.write_to_path(str(authority))
    connection = client.connect(tls_proxy, sslmode="verify-full", sslrootcert=str(authority))
    assert encrypted(connection)
    assert connection.scalar(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")) is False
    assert connection.scalar(text("SELECT CAST(:much AS text)"), {"much": "x" * MUCH}) == "x" * MUCH


def test_a_certificate_that_the_client_does_not_trust_fails(
    tls_proxy: Proxy, client: Client, tmp_path: Path
) -> None:
    """It is told so by the driver, and the proxy goes on."""
    import trustme

    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    with pytest.raises(OperationalError, match="certificate verify failed"):
        client.connect(tls_proxy, sslmode="verify-full", sslrootcert=str(other))
    assert encrypted(client.connect(tls_proxy, sslmode="require"))


def test_who_does_not_ask_for_tls_gets_none(tls_proxy: Proxy, client: Client) -> None:
    """As from PostgreSQL, unless its `pg_hba.conf` insists."""
    connection = client.connect(tls_proxy, sslmode="disable")
    assert not encrypted(connection)
    assert say(connection, "plain") == "plain"


def test_a_request_for_gss_is_declined_and_tls_may_follow(tls_proxy: Proxy) -> None:
    """What libpq does where there is a Kerberos ticket, in as many pieces as the network likes."""
    with socket.create_connection((HOST, tls_proxy.port), SECONDS) as sock:
        for request, answer in ((GSS_REQUEST, b"N"), (SSL_REQUEST, b"S")):
            sock.sendall(request[:3])
            rounds(tls_proxy)
            assert silent(sock)
            sock.sendall(request[3:])
            assert sock.recv(1) == answer


def test_faults_are_the_same_with_tls(
    tls_proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually
) -> None:
    """What is encrypted is held, delayed, reset and ended like anything else."""
    connection = client.connect(tls_proxy, sslmode="require")
    assert_holds(client, connection, pg_observer, tls_proxy.blackhole, tls_proxy.pass_on)
    assert_holds(client, connection, pg_observer, lambda: tls_proxy.delay(LONG), tls_proxy.pass_on)
    tls_proxy.reset()
    assert_lost(connection)
    connection = client.connect(tls_proxy, sslmode="require")
    tls_proxy.close()
    assert_lost(connection)
    eventually(lambda: pg_observer.backends(client.database) == 0, "the server sees the ends")
    tls_proxy.accept_and_hang()
    assert_hangs(tls_proxy, client, pg_observer, eventually, sslmode="require")


# -- the unix socket -------------------------------------------------------------------------------


def test_faults_are_the_same_at_a_unix_socket(
    unix_proxy: Proxy, client: Client, pg_observer: Observer, eventually: Eventually
) -> None:
    """Held, delayed, ended, refused; both sockets belong to one proxy."""
    connection = client.connect(unix_proxy, unix=True)
    assert_holds(client, connection, pg_observer, unix_proxy.blackhole, unix_proxy.pass_on)
    assert_holds(client, connection, pg_observer, lambda: unix_proxy.delay(LONG), unix_proxy.pass_on)
    unix_proxy.refuse()
    for unix in (True, False):
        with pytest.raises(OperationalError, match=r"[Cc]onnection refused"):
            client.connect(unix_proxy, unix=unix)
    assert say(connection, "goes on") == "goes on"
    unix_proxy.reset()
    assert_lost(connection)
    unix_proxy.pass_on()
    connections = [client.connect(unix_proxy, unix=unix) for unix in (True, False)]
    unix_proxy.close()
    for connection in connections:
        assert_lost(connection)
    eventually(lambda: pg_observer.backends(client.database) == 0, "the server sees the ends")
    unix_proxy.accept_and_hang()
    assert_hangs(unix_proxy, client, pg_observer, eventually, unix=True)


def test_an_end_is_an_end_at_a_unix_socket(unix_proxy: Proxy, tmp_path: Path) -> None:
    """Also where the proxy has not read yet what was sent."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(str(tmp_path / f".s.PGSQL.{unix_proxy.port}"))
        unix_proxy.blackhole()
        sock.sendall(b"unread")
        unix_proxy.close()
        assert sock.recv(1) == b""


# -- starting and stopping -------------------------------------------------------------------------


def test_nothing_is_left_when_it_is_stopped(pg_server: SessionServer, client: Client, tmp_path: Path) -> None:
    """No socket, no thread, no file, and no warning of a resource, whatever it was doing; twice is once."""
    before = open_files()
    proxy = Proxy(pg_server.host, pg_server.port, unix=tmp_path)
    connections = [client.connect(proxy, unix=unix) for unix in (True, False)]
    proxy.blackhole()
    with socket.create_connection((HOST, proxy.port), SECONDS) as hanging:
        proxy.stop()
        proxy.stop()
        assert hanging.recv(1) == b""
    for connection in connections:
        assert_lost(connection)
        connection.close()
    assert list(tmp_path.iterdir()) == []
    assert open_files() <= before  # less, where what other tests have closed was waited for
    assert not [thread for thread in threading.enumerate() if thread.name == f"proxy {proxy.port}"]
    with pytest.raises(OperationalError, match=r"[Cc]onnection refused"):
        client.connect(proxy)
    with pytest.raises(RuntimeError, match="stopped"):
        proxy.pass_on()


def test_what_has_just_connected_when_it_stops_is_ended(wire: Wire) -> None:
    """Not reset, also where the proxy had not got round to accepting it."""
    for _ in range(20):
        proxy = Proxy(HOST, wire.proxy.port)
        with socket.create_connection((HOST, proxy.port), SECONDS) as client:
            proxy.stop()
            assert client.recv(1) == b""


def test_nothing_is_left_when_it_can_not_start(tmp_path: Path) -> None:
    """The reason comes out, and no socket stays."""
    before = open_files()
    with pytest.raises(OSError, match=r"too long|No such file"):
        Proxy(HOST, 5432, unix=tmp_path / "missing")
    assert open_files() <= before  # less, where what other tests have closed was waited for


def test_the_url_keeps_all_but_host_and_port(wire: Wire) -> None:
    """User, password, database and options stay as they are."""
    url = "postgresql+psycopg2://scott:ti%40ger@db.example.com:5432/shop?application_name=x"
    assert wire.proxy.url(url) == (
        f"postgresql+psycopg2://scott:ti%40ger@{HOST}:{wire.proxy.port}/shop?application_name=x"
    )
