from __future__ import annotations

import fcntl
import itertools
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import inside
import psutil
import psycopg
import psycopg2
import pytest
from conftest import Observer, SessionServer
from fakes import SECONDS, FakeClock, FakeConnection, FakeDriver, Task
from hazards import descriptors_of, driver_connection_of, eventually
from proxy import Proxy
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.pool import Pool as SQLAlchemyPool
from sqlalchemy.pool import PoolProxiedConnection

from sqla_queries_pool import CheckoutTimeout, PoolManager, QueriesPool
from sqla_queries_pool.concurrency.housekeeping import Housekeeper
from sqla_queries_pool.sockets import liveness
from sqla_queries_pool.sockets.liveness import ALIVE, DEAD, DOUBT, PingTimeout, hang_up, look, poll_of

resource = pytest.importorskip("resource", reason="POSIX has it, and poll")

Wire = tuple[socket.socket, socket.socket]
NewEngine = Callable[..., Engine]
_numbers = itertools.count(1)
DRIVERS = ("psycopg2", "psycopg")
TRANSPORTS = ("tcp", "unix", "tls")
WAYS = [(driver, transport) for driver in DRIVERS for transport in TRANSPORTS]


def message(kind: bytes, body: bytes = b"") -> bytes:
    """One message of PostgreSQL's protocol."""
    return kind + struct.pack("!i", 4 + len(body)) + body


NOTIFICATION = message(b"A", struct.pack("!i", 4711) + b"channel\0payload\0")
NOTICE = message(b"N", b"SNOTICE\0C00000\0Mhello\0\0")
PARAMETER = message(b"S", b"TimeZone\0Mars/Phobos\0")
ERROR = message(b"E", b"SFATAL\0C57P01\0Mterminating connection due to administrator command\0\0")


# -- sockets ---------------------------------------------------------------------------------------


def _tcp() -> Wire:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


def _above_1024(sock: socket.socket) -> socket.socket:
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 1100))


@contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """Allow as many descriptors as that."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < soft:
        pytest.skip(f"no more than {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@pytest.fixture(params=["tcp", "unix", "above 1024"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """Our end of a connection and the server's; a socket is a handle, for it has a fileno()."""
    with descriptors(4096):
        ours, theirs = socket.socketpair() if request.param == "unix" else _tcp()
        if request.param == "above 1024":
            ours = _above_1024(ours)
            assert ours.fileno() > 1024
        with ours, theirs:
            yield ours, theirs


def judge(ours: socket.socket) -> str:
    """What liveness says about a socket."""
    return look(ours, poll_of(ours))


def lowest_free() -> int:
    """The number that the next descriptor gets: a leak raises it."""
    fd = os.dup(0)
    os.close(fd)
    return fd


def test_a_silent_socket_has_no_news(wire: Wire) -> None:
    """Which is all that a checkout asks of a healthy connection."""
    ours, _ = wire
    assert not poll_of(ours)(0)
    assert judge(ours) is ALIVE


def test_the_end_of_the_stream_is_news_and_dead(wire: Wire) -> None:
    """The server has closed the connection."""
    ours, theirs = wire
    poll = poll_of(ours)
    theirs.close()
    assert poll(0)
    assert look(ours, poll) is DEAD


def test_a_half_closed_connection_is_dead(wire: Wire) -> None:
    """PostgreSQL knows none: who does not send any more has gone."""
    ours, theirs = wire
    theirs.shutdown(socket.SHUT_WR)
    assert judge(ours) is DEAD


def test_a_reset_is_news_and_dead() -> None:
    """The server, or the network, has reset the connection."""
    ours, theirs = _tcp()
    with ours:
        poll = poll_of(ours)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        assert poll(0)
        assert look(ours, poll) is DEAD


def test_without_rdhup_the_bytes_tell_the_end(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no POLLRDHUP; the end of the stream is read there, and before it the error."""
    ours, theirs = wire
    inside.without_rdhup(monkeypatch)
    theirs.shutdown(socket.SHUT_WR)
    assert judge(ours) is DEAD


@pytest.mark.parametrize(
    "sent",
    [
        NOTIFICATION,
        NOTICE,
        PARAMETER,
        NOTIFICATION + NOTICE + PARAMETER + NOTIFICATION,
        NOTIFICATION * 200,
        message(b"A", b"E" * 300),
        NOTICE + NOTIFICATION[:-1],
        NOTICE + NOTIFICATION[:6],
        message(b"S"),
    ],
    ids=["A", "N", "S", "ANSA", "200 A", "A full of E", "half", "head", "empty"],
)
def test_what_a_healthy_server_sends_unasked_is_news_and_alive(wire: Wire, sent: bytes) -> None:
    """Also in chains, or not all there yet."""
    ours, theirs = wire
    theirs.setblocking(False)
    theirs.send(sent)
    assert poll_of(ours)(0)
    assert judge(ours) is ALIVE


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_message_whose_length_is_not_there_yet_is_not_dead(wire: Wire, cut: int) -> None:
    """A healthy server is about to send the rest; a ping may tell."""
    ours, theirs = wire
    for kind in (NOTIFICATION, NOTICE, PARAMETER):
        theirs.send(kind[:cut])
        assert judge(ours) in (ALIVE, DOUBT)
        assert ours.recv(cut, socket.MSG_DONTWAIT)


@pytest.mark.parametrize(
    "sent",
    [ERROR, b"E", NOTIFICATION + NOTICE + PARAMETER + ERROR, NOTICE + b"E", NOTIFICATION * 100 + ERROR],
)
def test_an_error_is_dead(wire: Wire, sent: bytes) -> None:
    """The server says why it hangs up before it does: whatever was sent before, and all of it or not."""
    ours, theirs = wire
    theirs.send(sent)
    assert judge(ours) is DEAD


def test_what_was_sent_before_the_end_does_not_hide_it(wire: Wire) -> None:
    """As a restart in the mode immediate does it: a warning, then the end."""
    ours, theirs = wire
    theirs.send(NOTICE)
    theirs.close()
    assert judge(ours) is DEAD


@pytest.mark.parametrize(
    "sent",
    [
        b"\x17\x03\x03\x00\x20" + b"E" * 32,
        b"\x15\x03\x03\x00\x02\x01\x00",
        b"\x00" * 16,
        message(b"Z", b"I"),
        message(b"D", b"\0\0") + ERROR,
        NOTICE + b"\x17\x03\x03",
        b"A\x00\x00\x00\x03" + b"E" * 8,
        b"N\xff\xff\xff\xff"[:3] + b"\x00\x01",
    ],
    ids=["TLS data", "TLS alert", "zeros", "Z", "D and E", "N and TLS", "length 3", "odd length"],
)
def test_what_nobody_can_read_is_never_dead(wire: Wire, sent: bytes) -> None:
    """Under TLS everything is encrypted, and other databases have other protocols: a ping tells."""
    ours, theirs = wire
    theirs.send(sent)
    assert judge(ours) is not DEAD


@pytest.mark.parametrize("sent", [b"\x17\x03\x03\x00\x20" + b"E" * 32, message(b"Z", b"I"), NOTICE + b"D"])
def test_what_a_healthy_server_does_not_say_unasked_is_in_doubt(wire: Wire, sent: bytes) -> None:
    """It is not taken for alive: the answer to a statement, for one, would be given to the next holder."""
    ours, theirs = wire
    theirs.send(sent)
    assert judge(ours) is DOUBT


@pytest.mark.parametrize("sent", [NOTIFICATION * 400, message(b"N", b"E" * 100_000)], ids=["many", "large"])
def test_more_than_one_look_can_judge_is_in_doubt(wire: Wire, sent: bytes) -> None:
    """An error, or the end, may stand behind it."""
    ours, theirs = wire
    theirs.setblocking(False)
    theirs.send(sent)
    assert judge(ours) is DOUBT


def test_looking_leaves_the_bytes_to_the_driver(wire: Wire) -> None:
    """All of them, however often it is looked."""
    ours, theirs = wire
    sent = NOTIFICATION + NOTICE
    theirs.send(sent)
    for _ in range(3):
        judge(ours)
    assert ours.recv(len(sent) + 1, socket.MSG_DONTWAIT) == sent


def test_what_was_read_meanwhile_is_alive(wire: Wire) -> None:
    """Another thread may have the connection, too: there was news, and there is nothing left to read."""
    ours, _ = wire
    assert look(ours, lambda _: [(ours.fileno(), select.POLLIN)]) is ALIVE


@pytest.mark.parametrize("sent", [NOTICE, ERROR, b"\x17", b""], ids=["alive", "dead", "doubt", "end"])
def test_looking_leaves_no_descriptor_open(wire: Wire, sent: bytes) -> None:
    """One per look would be the end of a process that listens to notifications."""
    ours, theirs = wire
    theirs.send(sent)
    theirs.shutdown(socket.SHUT_WR)
    judge(ours)
    look(ours, lambda _: [(ours.fileno(), select.POLLIN)])
    assert descriptors_of(os.fstat(ours.fileno()).st_ino) == 1


def test_looking_leaves_a_blocking_socket_blocking(wire: Wire) -> None:
    """Whatever `socket.setdefaulttimeout` says: the flag is the driver's, whose reads would fail."""
    ours, theirs = wire
    theirs.send(NOTICE)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30.0)
    try:
        judge(ours)
    finally:
        socket.setdefaulttimeout(before)
    assert os.get_blocking(ours.fileno())


def test_a_process_without_a_free_descriptor_loses_no_healthy_connection(wire: Wire) -> None:
    """It could not open another one: what can't be looked at may be asked."""
    ours, theirs = wire
    theirs.send(NOTICE)
    with descriptors(lowest_free()):
        verdict = judge(ours)
    assert verdict in (ALIVE, DOUBT)


def test_what_is_no_socket_is_in_doubt() -> None:
    """A driver's `fileno()` may mean something else: a ping tells, and no descriptor is lost."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as handle, os.fdopen(writing, "wb", 0) as other:
        other.write(b"news")
        assert look(handle, poll_of(handle)) is DOUBT
        assert descriptors_of(os.fstat(reading).st_ino) == 2  # of both ends


class Telling:
    """A handle whose `fileno()` tells something."""

    def __init__(self, told: object) -> None:
        self.told = told

    def fileno(self) -> object:
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


@pytest.mark.parametrize(
    "handle",
    [object(), Telling(None), Telling(-1), Telling("3"), Telling(psycopg2.InterfaceError("closed"))],
    ids=["no method", "None", "-1", "text", "raises"],
)
def test_without_a_descriptor_there_never_is_news(handle: object) -> None:
    """Such a connection is used as if nobody looked."""
    poll = poll_of(handle)
    assert not poll(0)
    assert look(handle, poll) is ALIVE


def test_without_poll_everything_is_in_doubt(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the ping tells, each time."""
    monkeypatch.setattr(liveness, "AVAILABLE", False)
    ours, _ = wire
    poll = poll_of(ours)
    assert poll(0)
    assert look(ours, poll) is DOUBT


def test_a_handle_that_was_closed_is_dead(wire: Wire) -> None:
    """A socket's descriptor is -1 then."""
    ours, _ = wire
    poll = poll_of(ours)
    ours.close()
    assert poll(0)
    assert look(ours, poll) is DEAD


@pytest.mark.parametrize("error", [psycopg2.InterfaceError("closed"), psycopg.OperationalError("closed")])
def test_a_handle_whose_descriptor_is_gone_is_dead(error: Exception) -> None:
    """The drivers raise their own errors for one that was closed; no checkout is to see them."""
    assert look(Telling(error), lambda _: [(0, select.POLLNVAL)]) is DEAD


# -- hanging up ------------------------------------------------------------------------------------


def test_hanging_up_ends_a_read_and_keeps_the_descriptor(wire: Wire) -> None:
    """A closed one could be another file's a moment later, under a driver that still uses it."""
    ours, theirs = wire
    reader = Task(lambda: ours.recv(1))
    hang_up(ours)
    assert reader.result() == b""
    assert judge(ours) is DEAD
    assert theirs.recv(1) == b""
    os.fstat(ours.fileno())


def test_hanging_up_leaves_no_descriptor_open(wire: Wire) -> None:
    """Also where there is nothing left to hang up."""
    ours, theirs = wire
    before = lowest_free()
    hang_up(ours)
    hang_up(ours)
    hang_up(theirs)
    assert lowest_free() == before


@pytest.mark.parametrize("handle", [object(), Telling(-1), Telling(psycopg2.InterfaceError("closed"))])
def test_hanging_up_what_has_no_socket_does_nothing(handle: object) -> None:
    """It is done to connections that are dead already."""
    hang_up(handle)


def test_a_fuse_that_is_swept_ends_the_connection(wire: Wire) -> None:
    """Who reads from it finds its end, and the ping_timeout says that it was the ping_timeout."""
    ours, _ = wire
    ping_timeout = PingTimeout(ours)
    reader = Task(lambda: ours.recv(1))
    assert not ping_timeout.expired
    ping_timeout.sweep()
    assert reader.result() == b""
    assert ping_timeout.expired


def test_a_fuse_that_was_removed_ends_nothing(wire: Wire) -> None:
    """The answer came in time; the housekeeper may still come by."""
    ours, theirs = wire
    ping_timeout = PingTimeout(ours)
    ping_timeout.cancel()
    ping_timeout.sweep()
    assert not ping_timeout.expired
    theirs.send(b"x")
    assert ours.recv(1) == b"x"


# -- servers ---------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How a test gets to its database."""

    url: str
    datname: str
    tls: bool
    proxy: Proxy | None
    """With TLS, and where the test asks for one: the server of the tests speaks no TLS itself."""

    def arrived(self) -> None:
        """What the server has ended is ended on our side as well."""
        if self.proxy is not None:
            proxy = self.proxy
            eventually(lambda: proxy.connections == 0, "the proxy has passed on the ends")


def _way(
    request: pytest.FixtureRequest, server: SessionServer, url: str, folder: Path, proxied: bool
) -> Iterator[Way]:
    driver, transport = request.param
    database = make_url(url).database
    assert database is not None
    tls, unix = transport == "tls", transport == "unix"
    if not (tls or proxied):
        yield Way(server.url(driver, database, unix=unix), database, tls, None)
        return
    with Proxy(server.host, server.port, tls=tls, unix=folder if unix else None) as proxy:
        reached = make_url(proxy.url(server.url(driver, database), unix=unix))
        if tls:
            reached = reached.update_query_dict({"sslmode": "require"})
        yield Way(reached.render_as_string(hide_password=False), database, tls, proxy)


@pytest.fixture(params=WAYS, ids="-".join)
def way(
    request: pytest.FixtureRequest, pg_server: SessionServer, pg_url: str, tmp_path: Path
) -> Iterator[Way]:
    """Each driver through TCP and the unix socket, straight to the server, and through TLS."""
    yield from _way(request, pg_server, pg_url, tmp_path, False)


@pytest.fixture(params=WAYS, ids="-".join)
def proxied(
    request: pytest.FixtureRequest, pg_server: SessionServer, pg_url: str, tmp_path: Path
) -> Iterator[Way]:
    """The same, always through a proxy."""
    yield from _way(request, pg_server, pg_url, tmp_path, True)


@pytest.fixture
def new_engine() -> Iterator[NewEngine]:
    """``create_engine`` with a QueriesPool, disposed of at the end."""
    engines: list[Engine] = []

    def new(url: str, **kw: Any) -> Engine:
        engines.append(create_engine(url, poolclass=QueriesPool, **kw))
        return engines[-1]

    yield new
    for engine in engines:
        engine.dispose()


def end(observer: Observer, datname: str) -> int:
    """End all backends of a database, return when their processes are gone; how many there were."""
    sql = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
    processes = [
        process for process, _ in observer.query(f"{sql} AND backend_type = 'client backend'", datname)
    ]
    eventually(lambda: not any(psutil.pid_exists(process) for process in processes), "the backends end")
    return len(processes)


def slots(engine: Engine) -> list[Any]:
    """The connections of an engine's pool."""
    return inside.slots(engine)


def fill(engine: Engine, number: int) -> list[int]:
    """Have so many idle connections; their backends, the one that is used next first."""
    out = [engine.raw_connection() for _ in range(number)]
    backends = [backend(connection) for connection in out]
    for connection in reversed(out):
        connection.close()
    return backends


def backend(connection: Any) -> int:
    """The backend's process, as the driver knows it."""
    return int(connection.dbapi_connection.info.backend_pid)


def ask(connection: Any) -> int:
    """The backend's process, as the server says."""
    with closing(connection.cursor()) as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def next_one(engine: Engine) -> int:
    """Check out, ask the server which backend it is, check in."""
    with closing(engine.raw_connection()) as connection:
        return ask(connection)


def encrypted(connection: Any) -> bool:
    """Does the driver speak TLS on it?"""
    driver = connection.dbapi_connection
    return bool(getattr(driver, "pgconn", driver.info).ssl_in_use)


class Pings:
    """Counts the pings of an engine, and may do something else before and after each."""

    def __init__(self, engine: Engine) -> None:
        self.number = 0
        self.begun = threading.Event()
        self.before: Callable[[Any], object] = lambda handle: None
        self.after: Callable[[Any], object] = lambda handle: None
        self._ping = engine.dialect.do_ping
        engine.dialect.do_ping = self  # type: ignore[assignment, method-assign]

    def __call__(self, handle: Any) -> bool:
        self.number += 1
        self.begun.set()
        self.before(handle)
        try:
            return self._ping(handle)
        finally:
            self.after(handle)


def new_pid() -> str:
    """A pool id that no other test has."""
    return f"liveness-{next(_numbers)}"


def aged(pid: str) -> FakeClock:
    """Make a pool whose idle connections get older when the test says so."""
    clock = FakeClock()
    PoolManager.create(pid, max_size=5, idle_ttl=None, time_method=clock)
    return clock


# -- dead --------------------------------------------------------------------------------------------


def test_a_terminated_backend_is_not_handed_out(
    way: Way, new_engine: NewEngine, pg_observer: Observer
) -> None:
    """Not one of them, without a ping for what was idle for a moment, and nobody sees an error."""
    engine = new_engine(way.url)
    with closing(engine.raw_connection()) as connection:
        assert encrypted(connection) == way.tls
    dead = fill(engine, 4)
    assert end(pg_observer, way.datname) == 4
    way.arrived()
    alive = fill(engine, 4)
    assert not set(dead) & set(alive)
    assert [next_one(engine) for _ in range(4)] == [alive[0]] * 4
    assert pg_observer.backends(way.datname) == 4


def test_it_takes_no_round_trip_to_see_the_dead_or_the_living(
    way: Way, new_engine: NewEngine, pg_observer: Observer
) -> None:
    """Neither is pinged."""
    engine = new_engine(way.url)
    pings = Pings(engine)
    (living,) = fill(engine, 1)
    assert next_one(engine) == living
    end(pg_observer, way.datname)
    way.arrived()
    assert next_one(engine) != living
    assert pings.number == 0


def test_a_connection_whose_descriptor_is_above_1024_is_looked_at(
    way: Way, new_engine: NewEngine, pg_observer: Observer
) -> None:
    """``select`` could not; busy servers have as many."""
    engine = new_engine(way.url)
    with descriptors(4096):
        taken = [os.open(os.devnull, os.O_RDONLY)]

        def connection_above_1024() -> PoolProxiedConnection:
            """One that got a high number; another, where a file of an earlier test is closed meanwhile."""
            while True:
                while taken[-1] <= 1024:
                    taken.append(os.dup(taken[0]))
                connection = engine.raw_connection()
                assert connection.dbapi_connection is not None
                if connection.dbapi_connection.fileno() > 1024:
                    return connection
                connection.invalidate()
                connection.close()
                taken.append(os.dup(taken[0]))

        try:
            with closing(connection_above_1024()) as connection:
                dead = backend(connection)
            assert next_one(engine) == dead
            end(pg_observer, way.datname)
            way.arrived()
            assert next_one(engine) != dead
            engine.dispose()
        finally:
            for fd in taken:
                os.close(fd)


@pytest.mark.parametrize("fault", ["reset", "close"])
def test_what_the_network_ended_is_not_handed_out(proxied: Way, new_engine: NewEngine, fault: str) -> None:
    """A firewall that resets, a proxy that was restarted."""
    assert proxied.proxy is not None
    engine = new_engine(proxied.url)
    dead = fill(engine, 3)
    getattr(proxied.proxy, fault)()
    eventually(lambda: all(slot.poll(0) for slot in slots(engine)), "the end has come")
    assert not set(dead) & set(fill(engine, 3))


def test_a_waiter_is_not_given_a_dead_one(way: Way, new_engine: NewEngine, pg_observer: Observer) -> None:
    """What is returned goes to the waiter directly, and is looked at all the same."""
    engine = new_engine(way.url, max_size=1, isolation_level="AUTOCOMMIT")
    held = engine.raw_connection()
    dead = backend(held)
    waiter = Task(lambda: next_one(engine))
    eventually(lambda: inside.shared(engine.pool).numbers.waiting, "somebody waits")
    end(pg_observer, way.datname)
    way.arrived()
    held.close()
    assert waiter.result() != dead


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_error_on_the_socket_is_enough(
    driver: str, pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """The server has said why it will hang up, and has not done it yet."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        engine = new_engine(proxy.url(pg_server.url(driver, make_url(pg_url).database)))
        (dead,) = fill(engine, 1)
        say(proxy, ERROR)
        eventually(lambda: slots(engine)[0].poll(0), "the error has come")
        assert next_one(engine) != dead


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_handle_that_was_closed_in_the_pool_is_replaced(
    driver: str, pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """Its holder has closed the driver's connection, and no reset has noticed: no checkout sees the error."""
    url = pg_server.url(driver, make_url(pg_url).database)
    engine = new_engine(url, pool_reset_on_return=None)
    with closing(engine.raw_connection()) as connection:
        assert connection.dbapi_connection is not None
        connection.dbapi_connection.close()
    assert next_one(engine)


@pytest.mark.parametrize("driver", [psycopg2, psycopg], ids=DRIVERS)
@pytest.mark.parametrize("ping_after", [None, 30, 0])
def test_a_pool_without_an_engine_hands_out_none_of_the_dead(
    driver: Any,
    ping_after: float | None,
    pg_server: SessionServer,
    pg_url: str,
    pg_observer: Observer,
) -> None:
    """It has no dialect to ping with, but it can look; also at those that the first one made suspect."""
    datname = make_url(pg_url).database
    assert datname is not None
    dsn = f"host={pg_server.host} port={pg_server.port} user={pg_server.user} dbname={datname}"
    pool = QueriesPool(
        lambda: driver.connect(dsn, password=pg_server.password), max_size=4, ping_after=ping_after
    )
    out = [pool.connect() for _ in range(4)]
    dead = {backend(connection) for connection in out}
    for connection in out:
        connection.close()
    again = [pool.connect() for _ in range(4)]
    assert {backend(connection) for connection in again} == dead
    for connection in again:
        connection.close()
    end(pg_observer, datname)
    out = [pool.connect() for _ in range(4)]
    assert not dead & {ask(connection) for connection in out}
    for connection in out:
        connection.close()
    pool.dispose()


# -- alive -------------------------------------------------------------------------------------------


def say(proxy: Proxy, data: bytes) -> None:
    """Have the server say something on all connections of a proxy, encrypted where the client speaks TLS."""

    def action() -> None:
        for link in proxy._links:
            assert link.server is not None
            link.take(link.server, data)

    proxy._do(action)


@pytest.fixture
def tell(pg_url: str) -> Iterator[Callable[[str], None]]:
    """Run a statement in the test's database, from another connection."""
    url = make_url(pg_url)
    with closing(
        psycopg2.connect(
            host=url.host, port=url.port, user=url.username, password=url.password, dbname=url.database
        )
    ) as connection:
        connection.autocommit = True

        def run(statement: str) -> None:
            with connection.cursor() as cursor:
                cursor.execute(statement)

        yield run


def received(connection: Any) -> list[str]:
    """Have the driver read; which notifications it got."""
    driver = connection.dbapi_connection
    if hasattr(driver, "notifies") and isinstance(driver.notifies, list):  # psycopg2
        ask(connection)
        return [note.payload for note in driver.notifies]
    notes: list[str] = []
    driver.add_notify_handler(lambda note: notes.append(note.payload))
    ask(connection)
    return notes


def test_a_notification_that_waits_costs_no_connection_and_is_not_lost(
    way: Way, new_engine: NewEngine, tell: Callable[[str], None]
) -> None:
    """The driver reads it later.  Only under TLS, where nobody can look, it takes a ping to tell."""
    engine = new_engine(way.url, isolation_level="AUTOCOMMIT")
    pings = Pings(engine)
    with closing(engine.raw_connection()) as connection:
        listener = backend(connection)
        with closing(connection.cursor()) as cursor:
            cursor.execute("LISTEN news")
    for number in range(3):
        tell(f"NOTIFY news, '{number}'")
    eventually(lambda: slots(engine)[0].poll(0), "the notification has come")
    if not way.tls:
        with closing(engine.raw_connection()) as connection:
            assert backend(connection) == listener
            assert slots(engine)[0].poll(0), "nothing was read"
        assert pings.number == 0
        with closing(engine.raw_connection()) as connection:
            assert received(connection)[:3] == ["0", "1", "2"]
    assert next_one(engine) == listener
    assert pings.number == way.tls


def test_a_dead_connection_with_megabytes_of_unread_notifications_is_not_handed_out(
    way: Way, new_engine: NewEngine, pg_observer: Observer, tell: Callable[[str], None]
) -> None:
    """The end of the stream is behind them, where no look can see it: the server does not get rid of them."""
    engine = new_engine(way.url, isolation_level="AUTOCOMMIT")
    with closing(engine.raw_connection()) as connection:
        listener = backend(connection)
        with closing(connection.cursor()) as cursor:
            cursor.execute("LISTEN news")
    tell(f"SELECT pg_notify('news', n || repeat('x', 7900)) FROM generate_series(1, {40_000_000 // 7900}) n")
    sql = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
    eventually(
        lambda: pg_observer.query(sql, listener) == [("ClientWrite",)], "nothing more fits into the socket"
    )
    end(pg_observer, way.datname)
    assert next_one(engine) != listener


@pytest.mark.parametrize("driver", ["psycopg2"])
def test_a_notification_that_a_ping_read_is_not_lost(
    driver: str,
    pg_server: SessionServer,
    pg_url: str,
    new_engine: NewEngine,
    tell: Callable[[str], None],
) -> None:
    """Under TLS, the ping reads what waits; psycopg2 keeps it until it is asked for."""
    with Proxy(pg_server.host, pg_server.port, tls=True) as proxy:
        url = f"{proxy.url(pg_server.url(driver, make_url(pg_url).database))}?sslmode=require"
        engine = new_engine(url, isolation_level="AUTOCOMMIT")
        with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute("LISTEN news")
        tell("NOTIFY news, 'hello'")
        eventually(lambda: slots(engine)[0].poll(0), "the notification has come")
        with closing(engine.raw_connection()) as connection:
            assert received(connection) == ["hello"]


def test_a_notice_that_waits_costs_no_connection(
    way: Way, new_engine: NewEngine, tell: Callable[[str], None]
) -> None:
    """A server that traces notifications speaks of each one to who listens, hence also to who is idle."""
    engine = new_engine(way.url, isolation_level="AUTOCOMMIT")
    with closing(engine.raw_connection()) as connection:
        listener = backend(connection)
        with closing(connection.cursor()) as cursor:
            cursor.execute("LISTEN news")
            cursor.execute("SET trace_notify = on")
            cursor.execute("SET client_min_messages = debug1")
    tell("NOTIFY other")
    tell("NOTIFY news")
    eventually(lambda: slots(engine)[0].poll(0), "the notice has come")
    assert [next_one(engine) for _ in range(3)] == [listener] * 3


@pytest.mark.parametrize("said", [PARAMETER, NOTICE, NOTICE + PARAMETER * 50], ids=["S", "N", "many"])
def test_a_changed_parameter_that_waits_costs_no_connection(
    proxied: Way, new_engine: NewEngine, said: bytes
) -> None:
    """What the server says unasked is for the driver, which has it after its next statement."""
    assert proxied.proxy is not None
    engine = new_engine(proxied.url)
    pings = Pings(engine)
    living = fill(engine, 3)
    say(proxied.proxy, said)
    eventually(lambda: all(slot.poll(0) for slot in slots(engine)), "it has come to all")
    assert fill(engine, 3) == living
    assert pings.number == (3 if proxied.tls else 0)
    with closing(engine.raw_connection()) as connection:
        assert ask(connection) == living[0]
        assert connection.dbapi_connection is not None
        zone = connection.dbapi_connection.info.parameter_status("TimeZone")
        assert (zone == "Mars/Phobos") == (PARAMETER in said)


def test_a_change_of_the_servers_configuration_costs_no_connection(
    way: Way, new_engine: NewEngine, pg_server: SessionServer, pg_observer: Observer
) -> None:
    """`ALTER SYSTEM` and a reload, of a parameter that the server reports to its clients."""
    engine = new_engine(way.url)
    living = fill(engine, 3)
    try:
        pg_observer.query("ALTER SYSTEM SET \"DateStyle\" = 'German, DMY'")
        pg_observer.query("SELECT pg_reload_conf()")
        eventually(lambda: pg_observer.query("SHOW DateStyle")[0][0].startswith("German"), "the reload")
        assert fill(engine, 3) == living
        assert next_one(engine) == living[0]
    finally:
        pg_observer.query('ALTER SYSTEM RESET "DateStyle"')
        pg_observer.query("SELECT pg_reload_conf()")


# -- ping_after --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "idle", "pings"),
    [
        ({}, 29.9, 0),
        ({}, 30.0, 1),
        ({"ping_after": 30}, 29.9, 0),
        ({"ping_after": 2.5}, 2.4, 0),
        ({"ping_after": 2.5}, 2.5, 1),
        ({"ping_after": None}, 1e9, 0),
        ({"ping_after": 0}, 0.0, 1),
    ],
    ids=lambda value: str(value),
)
def test_what_was_idle_for_ping_after_is_pinged(
    pg_url: str, new_engine: NewEngine, stated: dict[str, Any], idle: float, pings: int
) -> None:
    """30 seconds where nothing is stated, None for never, 0 for always; once, if it answers."""
    pid = new_pid()
    clock = aged(pid)
    engine = new_engine(pg_url, pool_id=pid, **stated)
    counted = Pings(engine)
    (living,) = fill(engine, 1)
    assert counted.number == 0, "one that was just opened is not asked"
    clock.now += idle
    assert next_one(engine) == living
    assert counted.number == pings
    if idle:
        assert next_one(engine) == living
        assert counted.number == pings, "it was used just now"


def test_a_ping_is_a_real_one(pg_url: str, new_engine: NewEngine, pg_observer: Observer) -> None:
    """The server has seen it."""
    engine = new_engine(pg_url, ping_after=0, isolation_level="AUTOCOMMIT")
    with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("SELECT 'mine'")
    said = "SELECT query FROM pg_stat_activity WHERE datname = %s"
    datname = make_url(pg_url).database
    assert pg_observer.query(said, datname) == [("SELECT 'mine'",)]
    with closing(engine.raw_connection()):
        assert pg_observer.query(said, datname) != [("SELECT 'mine'",)]


def test_a_ping_leaves_the_connection_as_it_was(way: Way, new_engine: NewEngine) -> None:
    """No transaction is open, and none is in the way."""
    engine = new_engine(way.url, ping_after=0)
    (living,) = fill(engine, 1)
    with closing(engine.raw_connection()) as connection:
        assert connection.dbapi_connection is not None
        assert int(connection.dbapi_connection.info.transaction_status) == 0
        assert not connection.dbapi_connection.autocommit
        assert ask(connection) == living


def test_ping_after_survives_a_dispose(pg_url: str, new_engine: NewEngine) -> None:
    """``Engine.dispose()`` makes a new pool, with the same parameters."""
    engine = new_engine(pg_url, ping_after=0, ping_timeout=7)
    pings = Pings(engine)
    engine.dispose()
    fill(engine, 1)
    next_one(engine)
    assert pings.number == 1
    pool = engine.pool
    assert isinstance(pool, QueriesPool)
    assert (inside.setting(pool, "ping_after"), inside.setting(pool, "ping_timeout")) == (0, 7)


def test_without_poll_the_ping_finds_the_dead(
    way: Way, new_engine: NewEngine, pg_observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: also what was idle for a moment alone."""
    monkeypatch.setattr(liveness, "AVAILABLE", False)
    engine = new_engine(way.url)
    pings = Pings(engine)
    dead = fill(engine, 3)
    assert next_one(engine) == dead[0]
    assert pings.number == 1
    end(pg_observer, way.datname)
    way.arrived()
    assert not set(dead) & set(fill(engine, 3))


def test_what_is_handed_over_is_pinged_where_everything_is(pg_url: str, new_engine: NewEngine) -> None:
    """``ping_after=0`` is for always: its holder may have had it for an hour, and done nothing with it."""
    engine = new_engine(pg_url, max_size=1, ping_after=0)
    pings = Pings(engine)
    held = engine.raw_connection()
    living = backend(held)
    waiter = Task(lambda: next_one(engine))
    eventually(lambda: inside.shared(engine.pool).numbers.waiting, "somebody waits")
    held.close()
    assert waiter.result() == living
    assert pings.number == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_connection_in_a_transaction_is_not_pinged_away(
    driver: str, pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """Without a reset it is returned in one, where the driver refuses to ping; it is not dead for that."""
    url = pg_server.url(driver, make_url(pg_url).database)
    engine = new_engine(url, ping_after=0, pool_reset_on_return=None)
    assert len({next_one(engine) for _ in range(3)}) == 1


# -- suspicion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_one_found_dead_makes_the_older_ones_suspect(
    driver: str, pg_server: SessionServer, pg_url: str, new_engine: NewEngine, pg_observer: Observer
) -> None:
    """They are pinged once, and what answers is used; what was opened since is not asked."""
    engine = new_engine(pg_server.url(driver, make_url(pg_url).database))
    pings = Pings(engine)
    dead, *living = fill(engine, 3)
    pg_observer.query("SELECT pg_terminate_backend(%s, 5000)", dead)
    new, *others = fill(engine, 3)
    assert new != dead
    assert others == living
    assert pings.number == 2
    assert fill(engine, 3) == [new, *living]
    assert pings.number == 2


def test_what_is_suspect_and_dead_is_replaced(
    pg_server: SessionServer, pg_url: str, new_engine: NewEngine, pg_observer: Observer
) -> None:
    """A failover shows on one connection; of the others' sockets nobody has told us yet."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        engine = new_engine(proxy.url(pg_url), ping_timeout=0.1)
        dead = fill(engine, 3)
        pg_observer.query("SELECT pg_terminate_backend(%s, 5000)", dead[0])
        eventually(lambda: any(slot.poll(0) for slot in slots(engine)), "the news")
        proxy.blackhole()
        route(engine, pg_server)
        assert not set(dead) & set(Task(lambda: fill(engine, 3)).result())


# -- nobody hangs --------------------------------------------------------------------------------------


def route(engine: Engine, server: SessionServer) -> None:
    """Have an engine connect straight to the server from now on, past its proxy."""

    @event.listens_for(engine, "do_connect")
    def past_the_proxy(dialect: Any, record: Any, args: Any, params: dict[str, Any]) -> None:
        params |= {"host": server.host, "port": server.port, "sslmode": "prefer"}


def stuff(handle: Any) -> None:
    """Fill the socket's send buffer, so that whoever sends one byte more has to wait."""
    with socket.socket(fileno=os.dup(handle.fileno())) as copy, suppress(BlockingIOError):
        while True:
            copy.send(bytes(65536), socket.MSG_DONTWAIT)


def test_a_fuse_ends_a_statement_that_nobody_answers(proxied: Way, new_engine: NewEngine) -> None:
    """The housekeeper lights it, and the driver raises its error in the thread that waits."""
    assert proxied.proxy is not None
    engine = new_engine(proxied.url)
    with closing(engine.raw_connection()) as connection:
        proxied.proxy.blackhole()
        statement = Task(lambda: ask(connection))
        ping_timeout = PingTimeout(connection.dbapi_connection)
        Housekeeper().schedule(ping_timeout, 0.05)
        with pytest.raises((psycopg2.OperationalError, psycopg.OperationalError)):
            statement.result()
        assert ping_timeout.expired
        connection.invalidate()


def test_a_ping_that_nobody_answers_ends_and_the_checkout_gets_another_connection(
    proxied: Way, new_engine: NewEngine, pg_server: SessionServer
) -> None:
    """After ``ping_timeout``; all idle connections are behind the same black hole, and each is replaced."""
    assert proxied.proxy is not None
    engine = new_engine(proxied.url, ping_after=0, ping_timeout=0.1)
    dead = fill(engine, 2)
    proxied.proxy.blackhole()
    route(engine, pg_server)
    assert not set(dead) & set(Task(lambda: fill(engine, 2)).result())


def test_a_ping_has_no_more_time_than_the_checkout(
    pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """A ``ping_timeout`` far beyond ``timeout`` does not count: it is half a second then."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        engine = new_engine(proxy.url(pg_url), ping_after=0, ping_timeout=10 * SECONDS, pool_timeout=0)
        (dead,) = fill(engine, 1)
        proxy.blackhole()
        route(engine, pg_server)
        assert Task(lambda: next_one(engine)).result() != dead


def test_a_connect_after_a_ping_that_nobody_answers_is_left_when_the_time_is_over(
    pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """The two don't each take all the time that there is; what the connect brings is the next checkout's."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        engine = new_engine(proxy.url(pg_url), ping_after=0, pool_timeout=0.1)
        (dead,) = fill(engine, 1)
        proxy.blackhole()
        with pytest.raises(CheckoutTimeout, match="answered neither a ping nor a connect"):
            Task(lambda: next_one(engine)).result()
        proxy.pass_on()
        pool: Any = engine.pool
        eventually(lambda: pool.statistics().idle == 1, "it is connected")
        inside.set_timeout(pool, SECONDS)  # and so the ping has its time
        assert next_one(engine) != dead
        assert pool.statistics().connects == 2


def test_without_a_ping_timeout_a_ping_lasts_until_it_is_answered(
    pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """A slow server is no dead one to who says so: nothing is scheduled to end it."""
    with Proxy(pg_server.host, pg_server.port) as proxy:
        engine = new_engine(proxy.url(pg_url), ping_after=0, ping_timeout=None, pool_timeout=0)
        pings = Pings(engine)
        (living,) = fill(engine, 1)
        proxy.blackhole()
        checkout = Task(lambda: next_one(engine))
        assert pings.begun.wait(SECONDS)
        proxy.pass_on()
        assert checkout.result() == living


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("timeout", [0, 0.5])
def test_a_checkout_raises_after_one_connect_when_its_time_is_over(
    driver: str, timeout: float, pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """However many dead connections there are.

    The connect has a second, less than the driver's limit: after one attempt no time is left for another.
    """
    with Proxy(pg_server.host, pg_server.port) as proxy:
        engine = new_engine(
            proxy.url(pg_server.url(driver, make_url(pg_url).database)),
            ping_after=0,
            ping_timeout=0.1,
            pool_timeout=timeout,
        )
        fill(engine, 4)

        @event.listens_for(engine, "do_connect")
        def give_up_soon(dialect: Any, record: Any, args: Any, params: dict[str, Any]) -> None:
            params |= {"connect_timeout": 2}

        proxy.blackhole()
        before = proxy.accepted
        with pytest.raises(CheckoutTimeout, match="answered neither a ping nor a connect"):
            Task(engine.connect).result()
        assert proxy.accepted - before == 1


def test_a_fuse_that_blows_as_the_answer_comes_costs_the_connection(
    way: Way, new_engine: NewEngine, pg_observer: Observer
) -> None:
    """It has ended the connection, so nobody is to get it, whatever the ping says."""
    engine = new_engine(way.url, ping_after=0, ping_timeout=0.05)
    pings = Pings(engine)
    (dead,) = fill(engine, 1)

    def linger(handle: Any) -> None:
        poll = select.poll()
        poll.register(handle.fileno(), select.POLLRDHUP)
        assert poll.poll(1000 * SECONDS), "the ping_timeout does not blow"

    pings.after = linger
    assert next_one(engine) != dead
    assert pings.number == 1


def test_a_listener_that_takes_longer_than_a_ping_may_has_the_connection(
    pg_url: str, new_engine: NewEngine
) -> None:
    """Also one of the class, which is called before all of the engine's: the limit ends with the ping."""

    def linger(handle: Any, *_: Any) -> None:
        poll = select.poll()
        poll.register(handle.fileno(), select.POLLRDHUP)
        assert not poll.poll(200), "the connection of a checkout listener was hung up"

    event.listen(SQLAlchemyPool, "checkout", linger, insert=True)
    try:
        engine = new_engine(pg_url, pool_pre_ping=True, ping_timeout=0.05)
        (backend,) = fill(engine, 1)
        assert next_one(engine) == backend
    finally:
        event.remove(SQLAlchemyPool, "checkout", linger)


def test_a_ping_that_hangs_is_felt_by_nobody_else(
    pg_server: SessionServer, pg_url: str, new_engine: NewEngine
) -> None:
    """Not by what waits in the same pool, nor by another pool: its checkouts, its pings, its waiters."""
    pid = new_pid()
    with Proxy(pg_server.host, pg_server.port) as proxy:
        stuck = new_engine(proxy.url(pg_url), pool_id=pid, max_size=2, ping_after=0, ping_timeout=None)
        pings = Pings(stuck)
        (living,) = fill(stuck, 1)
        proxy.blackhole()
        checkout = Task(lambda: next_one(stuck))
        assert pings.begun.wait(SECONDS)
        same = new_engine(pg_url, pool_id=pid, max_size=2, ping_after=0)
        other = new_engine(pg_url, pool_id=new_pid(), max_size=1, ping_after=0)
        for engine in (same, other):
            assert [Task(lambda e=engine: next_one(e)).result() for _ in range(10)]  # type: ignore[misc]
            held = engine.raw_connection()
            waiter = Task(lambda e=engine: next_one(e))  # type: ignore[misc]
            numbers = inside.shared(engine.pool)
            eventually(lambda n=numbers: n.numbers.waiting, "somebody waits")  # type: ignore[misc]
            held.close()
            assert waiter.result()
        assert checkout.is_alive()
        proxy.pass_on()
        assert checkout.result() == living


@pytest.mark.parametrize("how", ["no answer", "an error"])
def test_closing_what_was_found_dead_blocks_nobody(
    proxied: Way, new_engine: NewEngine, pg_server: SessionServer, how: str
) -> None:
    """Its send buffer is full, so a driver that says goodbye would wait for a peer that reads nothing.

    Found dead by a ping that nobody answered, or by one that failed at once.
    """
    assert proxied.proxy is not None
    engine = new_engine(proxied.url, ping_after=0, ping_timeout=0.1)
    with closing(engine.raw_connection()) as connection:
        dead = backend(connection)
        handle = connection.dbapi_connection
    proxied.proxy.blackhole()
    stuff(handle)
    route(engine, pg_server)
    if how == "an error":

        def fail(handle: Any) -> None:
            raise ValueError("no")

        Pings(engine).before = fail
    del connection
    assert Task(lambda: next_one(engine)).result() != dead


# -- other databases ---------------------------------------------------------------------------------


def test_an_in_memory_database_is_never_pinged_away(new_engine: NewEngine) -> None:
    """Its one connection is the database."""
    engine = new_engine("sqlite://", ping_after=0)
    pings = Pings(engine)
    pings.before = lambda handle: 1 / 0
    with closing(engine.raw_connection()) as connection:
        connection.cursor().execute("CREATE TABLE kept (x)")
    for _ in range(3):
        with closing(engine.raw_connection()) as connection:
            connection.cursor().execute("SELECT x FROM kept")
    assert pings.number == 0


def test_a_database_in_a_file_is_pinged(tmp_path: Path, new_engine: NewEngine) -> None:
    """SQLite's connections have no socket, and answer."""
    engine = new_engine(f"sqlite:///{tmp_path}/file.db", ping_after=0)
    pings = Pings(engine)
    seen = set()
    for _ in range(3):
        with closing(engine.raw_connection()) as connection:
            seen.add(id(connection.dbapi_connection))
    assert len(seen) == 1
    assert pings.number == 2


def fake_engine(new_engine: NewEngine, **kw: Any) -> tuple[Engine, FakeDriver]:
    """An engine whose driver has no sockets."""
    driver = FakeDriver()
    return new_engine("fake://host/database", module=driver, pool_id=new_pid(), **kw), driver


def test_a_driver_without_sockets_is_pinged(new_engine: NewEngine) -> None:
    """What answers is used; what does not is closed, and replaced."""
    engine, driver = fake_engine(new_engine, ping_after=0)
    for _ in range(3):
        engine.raw_connection().close()
    (first,) = driver.connections
    assert first.calls["ping"] == 2

    def refuse(connection: FakeConnection) -> None:
        if connection is first:
            raise driver.OperationalError("gone")

    driver.on_ping = refuse
    with closing(engine.raw_connection()) as connection:
        assert driver_connection_of(connection) is driver.connections[1]
    assert first.closed
    assert driver.numbers() == [2]


def test_a_driver_without_sockets_makes_the_older_ones_suspect(new_engine: NewEngine) -> None:
    """A ping that found one dead is followed by a ping of those that were idle then."""
    pid = new_pid()
    clock = aged(pid)
    driver = FakeDriver()
    engine = new_engine("fake://host/database", module=driver, pool_id=pid, ping_after=0.4)
    out = [engine.raw_connection() for _ in range(3)]
    for connection in out[:2]:
        connection.close()
    clock.now += 0.2
    out[2].close()
    engine.raw_connection().close()
    assert [c.calls["ping"] for c in driver.connections] == [0, 0, 0]
    clock.now += 0.2  # for the first two it is 0.4

    def refuse(connection: FakeConnection) -> None:
        raise driver.OperationalError("gone")

    again = [engine.raw_connection(), engine.raw_connection()]
    assert [c.calls["ping"] for c in driver.connections] == [0, 1, 0]
    driver.on_ping = refuse
    third = engine.raw_connection()
    assert [c.calls["ping"] for c in driver.connections] == [1, 1, 0, 0]
    assert driver.numbers() == [2, 3, 4]
    for connection in (*again, third):
        connection.close()


def test_the_one_that_is_younger_than_ping_after_is_pinged_when_another_was_dead(
    new_engine: NewEngine,
) -> None:
    """Suspicion does not ask how long it was idle, and ends with the answer."""
    pid = new_pid()
    clock = aged(pid)
    driver = FakeDriver()
    engine = new_engine(
        "fake://host/database", module=driver, pool_id=pid, ping_after=10, pool_use_lifo=False
    )
    out = [engine.raw_connection() for _ in range(2)]
    out[0].close()
    clock.now += 9
    out[1].close()
    clock.now += 1
    first, second = driver.connections

    def refuse(connection: FakeConnection) -> None:
        if connection is first:
            raise driver.OperationalError("gone")

    driver.on_ping = refuse
    replaced = engine.raw_connection()
    assert (first.calls["ping"], second.calls["ping"]) == (1, 0)
    for pings in (1, 1):
        with closing(engine.raw_connection()) as connection:
            assert driver_connection_of(connection) is second
            assert second.calls["ping"] == pings
    replaced.close()
