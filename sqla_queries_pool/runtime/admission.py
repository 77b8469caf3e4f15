"""May one connect now?  Not in the pause after the server has refused, nor where it has no room yet."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..budget import choice
from ..budget.ledger import Ledger
from ..errors import QueriesException
from ..sockets.connect_errors import is_full, passes
from .connections import Connections
from .critical_section import CriticalSection
from .jitter import pause

REMEMBERED = 30.0
"""Seconds for which a database that was there counts as one that will be there again."""


class Admission:
    """What the server last said to a connect, and when it is asked again.

    :param section: the pool's critical section.
    :param ledger: the pool's ledger, which knows the pauses.
    :param connections: those that are open, or were a moment ago.
    """

    def __init__(self, section: CriticalSection, ledger: Ledger, connections: Connections) -> None:
        self._section = section
        self._ledger = ledger
        self._connections = connections
        self.last_error: BaseException | None = None
        """A copy of why opening failed last, without traceback (that has the password in its
        frames, and the engine); None once a connection was opened."""

    def refused(self, error: BaseException) -> bool:
        """Is it worth trying again?  Then there is a pause now, in which nobody of this pool connects.

        It is, where the error passes by itself, and the database is there, or was a moment ago; one that is
        not there when the application starts is the application's affair.
        """
        section, connections = self._section, self._connections
        known = connections.by_handle or section.clock() - connections.last_open <= REMEMBERED
        known = known or self._unreachable()
        if not isinstance(error, Exception):
            return False
        if not (known or is_full(error)) or not passes(error):
            # The others wait for nothing: each is to have its own error.
            section.run(self._ledger.let_in, section.clock())
            return False
        section.decide(self._ledger.backoff.refused, pause, section.clock())
        return True

    def _unreachable(self) -> bool:
        """Do checkouts fail fast?  Then they go on to, however long ago the database was there."""
        ledger, now = self._ledger, self._section.clock()
        attachments = [a for a in ledger.everyone() if a.fail_fast_after < math.inf]
        return any(self._section.decide(choice.unreachable, ledger, a, now) for a in attachments)

    def may_connect(self) -> bool:
        """May the caller connect now, and does it then?  Not in the pause after a refusal."""
        ledger, section = self._ledger, self._section
        return not ledger.backoff.refusals or section.decide(ledger.backoff.may_connect, section.clock())

    def refusal(self) -> Exception | None:
        """Return the last refusal, during the pauses after it, where there would be a slot."""
        error, ledger = self.last_error, self._ledger
        is_why = ledger.backoff.refusals and len(ledger.slots) < ledger.limit
        return retold(error) if is_why and isinstance(error, Exception) else None

    def failed(self, error: Exception) -> None:
        """Remember why opening failed, for the error of a checkout that gets nothing."""
        self.last_error = retold(error)
        self._section.post(self._ledger.totals.one_more, "connect_errors")

    def wait_for_room(self, seconds: float, pause: Callable[[list[int], float], None]) -> None:
        """Wait until the server has let go of those that were closed, where there is no room for another.

        :param seconds: at most.
        :param pause: see :meth:`.Lingering.wait`.
        """
        if self._connections.lingering:
            self._connections.lingering.wait(self._room, seconds, pause)

    def _room(self) -> float:
        if self._ledger.backoff.refusals:  # the server may be full, of what was just closed for one
            return 0
        numbers = self._ledger.numbers()
        return self._ledger.limit - numbers.total + numbers.hollow


def retold(error: Exception) -> Exception:
    """The kind and the text of an error, and nothing that it refers to.

    Its traceback knows the engine and the password, and drivers hang the failed connection on it (which
    copy.copy() takes off the original: psycopg 3).
    """
    text = str(error)
    plain = all(isinstance(argument, (int, str)) for argument in error.args)
    for arguments in (error.args, (text,)) if plain else ((text,),):  # MySQL's drivers have a number in there
        try:
            same = type(error)(*arguments)
            if str(same) == text:
                return same
        except Exception:  # one that is made of something else
            pass
    return QueriesException(f"{type(error).__name__}: {text}")
