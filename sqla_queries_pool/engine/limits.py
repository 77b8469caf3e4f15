"""Has the server room for what the pool may open?  One question in the background, and a line in the log.

It is asked on a connection that is idle anyway, while no checkout waits; what the server does not say, or not
to this user, is not asked for again.
"""

from __future__ import annotations

import os
import re
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from ..budget import ages
from ..budget.slots import Attachment
from ..sockets.transactions import of_server

ASK_AFTER = 1.0
"""Seconds from the first connection to the question, and from one try to the next."""
MOST_TRIES = 60
"""How often an idle connection is looked for."""
QUERY = """
    SELECT current_setting('max_connections')::int,
        CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
            + coalesce(nullif(current_setting('reserved_connections', true), ''), '0')::int END,
        CASE WHEN r.rolsuper THEN -1 ELSE r.rolconnlimit END,
        CASE WHEN r.rolsuper THEN -1 ELSE d.datconnlimit END,
        (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')::int,
        pg_backend_pid()
    FROM pg_roles r, pg_database d WHERE r.rolname = session_user AND d.datname = current_database()
    """


class Room(NamedTuple):
    """What the server said."""

    max_connections: int
    reserved: int
    """Those of them that this user does not get."""
    of_role: int
    """The role's ``CONNECTION LIMIT``, -1 for none."""
    of_database: int
    """The database's, -1 for none."""
    in_use: int
    backend: int
    """The process id of the backend that said so."""

    @property
    def most(self) -> int:
        """How many connections this user can have to this database."""
        limits = [limit for limit in (self.of_role, self.of_database) if limit >= 0]
        return min([self.max_connections - self.reserved, *limits])

    def __str__(self) -> str:
        said = [f"max_connections is {self.max_connections}, of which {self.reserved} are reserved"]
        said += [f"the role's limit is {self.of_role}"] if self.of_role >= 0 else []
        said += [f"the database's limit is {self.of_database}"] if self.of_database >= 0 else []
        return f"{'; '.join(said)}; {self.in_use} are in use now"


def warning(room: Room, size: int, processes: int, shared: bool) -> str | None:
    """Return what there is to say, or None if all fits.

    :param size: the ``max_size`` of each process, or of all that share it.
    :param processes: how many there are.
    :param shared: do they share it?
    """
    wanted, most = size * processes, room.most
    if wanted <= most:
        return None
    if shared:
        what, remedy = f"the limit of the host, max_size={size},", f"Write max_size={most}"
    elif processes == 1:
        what, remedy = f"max_size={size}", f"Write max_size={most}"
    else:
        what = f"max_size={size} in each of {processes} processes, {wanted} connections together,"
        remedy = f'Write share="host" and max_size={most} for all of them, or max_size={most // processes}'
        if most < processes:
            remedy = f'Write share="host" and max_size={most}'
    return f"{what} is more than the server has room for, {most}: {room}. {remedy}, or raise that limit"


def processes() -> int:
    """Return how many processes there are like this one: children of the same parent that run the same.

    As far as Linux tells; else 1.  Numbers in a command are not compared: they are descriptors and ports.
    """
    try:
        parent, me = os.getppid(), _command(os.getpid())
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    except OSError:
        return 1
    same = 0
    for child in children:
        try:
            same += _command(int(child)) == me
        except OSError:  # it has ended
            continue
    return max(1, same)


def _command(process: int) -> bytes:
    return re.sub(rb"\d+", b"", Path(f"/proc/{process}/cmdline").read_bytes())


class Check:
    """Asks once for a pool, and for a larger limit that it gets later; the housekeeper calls :meth:`sweep`.

    :param pool: an engine's, which it does not keep alive.
    :param attachment: the engine's side on which a connection was opened.
    """

    def __init__(self, pool: Any, attachment: Attachment) -> None:
        self._pool = weakref.ref(pool)
        self._attachment = weakref.ref(attachment)
        self._core = pool._core
        self._tries = 0
        self.size: float = self._core.limit
        """The limit for which it asks."""
        self.done = False
        """Was it asked?"""
        self.neglected = self._again

    def _again(self) -> None:
        if self._tries < MOST_TRIES:
            self._tries += 1
            self._core.housekeeper.schedule(self, ASK_AFTER)

    begin = _again

    def sweep(self) -> None:
        """Have the question asked where this engine's connections are used: by the opener, or in the loop."""
        attachment = self._attachment()
        if attachment is not None and self._core.limits_check is self:  # else a later one asks for more
            attachment.runtime.submit(self._core.opener, self._ask)

    def _ask(self) -> None:
        pool, attachment, core = self._pool(), self._attachment(), self._core
        if pool is None or attachment is None:
            return
        found = core.section.decide(ages.borrow, core.ledger, attachment)
        if found is None:
            self._again()
            return
        entry, since = found
        room, self.size = None, core.limit
        try:
            room = _room(entry)
        finally:
            core.section.run(ages.give_borrowed, core.ledger, entry.slot, entry, since, core.now())
        if room is not None and self.size != float("inf"):
            shared = core.share is not None
            said = warning(room, int(self.size), 1 if shared else processes(), shared)
            if said is not None:
                pool.logger.warning("%s: %s", core.section.label, said)
        self.done = True


def _room(record: Any) -> Room | None:
    """Ask; None where the server, or what is in front of it, does not say."""
    handle, slot = record.dbapi_connection, record.slot
    backend = None if handle is None else of_server(slot.handle)[0]
    if backend is None:
        return None
    try:
        cursor = handle.cursor()
        try:
            cursor.execute(QUERY)
            row = cursor.fetchone()
        finally:
            cursor.close()
            handle.rollback()
        room = Room(*map(int, row))
    except Exception:  # another server than PostgreSQL, or a connection that is lost
        slot.suspect = True  # it is looked at before its next use
        return None
    return room if room.backend == backend else None  # PgBouncer has a number of its own
