"""A pool's part in the budget of its host: it locks what is free, reads and writes letters, passes leases.

One thread per process (postman.py) does the letters of all its shares.  It runs while a share has a lease or
wants one: only then there is a mailbox, too.  A checkout that waits locks what is free itself.

The limit of the pool is lowered *before* a lease is let go of, and what is open is counted after that: so
there is no moment with more connections than leases.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from typing import Protocol

from ..budget.stats import NEW_FOLDER, HostProcess, HostStatistics
from ..errors import ParameterError
from ..logs import logger
from .lease import BOX, MOST, Folder, Lease
from .letters import (
    GONE,
    LONGEST_TEXT,
    MOST_AT_ONCE,
    SENT,
    Ask,
    Here,
    Mailbox,
    Passed,
    is_read,
)
from .policy import ASK_EVERY, Member, Own, Post
from .postman import postman
from .watch import Watch

HOME_EVERY = 0.2
"""Seconds between two looks whether the folder, the mailbox and the locked files are still there."""
HOME_SOON = 0.05
"""Seconds from something that happened in the folder to the look: by then it may be deleted as a whole."""
CALM = 300.0
"""Seconds between two looks at nothing: an idle process costs nothing, for events wake it."""
LOOK_AGAIN = 0.005
"""Seconds between two looks whether a connection is closed whose lease is promised."""
LINGER = 5.0
"""Seconds for which a mailbox stays that has no use any more."""
TELL_EVERY = 2.0
"""Seconds between two questions who else is there."""
BURY_EVERY = 10.0
"""Seconds between two looks for the mailboxes of the dead: one of them may have stated the largest budget."""
LOG_EVERY = 60.0
"""Seconds from one line in the log about a problem to the next."""
REMEMBERED = 15.0
"""Seconds for which an answer to that is believed."""


class Side(Protocol):
    """What a share asks of its pool, and tells it."""

    label: str
    """Which database it is, without the password."""

    def own(self) -> Own:
        """Return what the pool has and wants."""

    def waiting(self) -> int:
        """Return how many checkouts wait; takes no lock."""

    def size(self) -> int:
        """Return the ``max_size`` that this process states."""

    def set_limit(self, limit: int) -> None:
        """Set how many connections the pool may have."""


class Share:
    """One pool's part in a budget.

    :param share: ``host``, or a folder.
    :param pool_id: the pool id.
    :param side: the pool.
    :raises ParameterError: the folder can't be used.
    """

    def __init__(self, share: str, pool_id: str, side: Side) -> None:
        self.name = share
        self._side = side
        self._folder = Folder(share, pool_id)
        self._largest = 0
        """The largest ``max_size`` above this process's that a living one stated at the last look."""
        self._others: dict[str, tuple[Here, float]] = {}
        """Mailbox -> what its process said of itself, and when."""
        self._problem: str | None = None
        self._unlogged: str | None = None
        """The problem, until it is logged."""
        self._log_at: dict[str, float] = {}
        """A problem -> when it is logged again: where two take turns, each has a line of its own."""
        self._begin()

    def _begin(self) -> None:
        """Have nothing: at first, and in a forked child."""
        self._member = Member()
        self._box: Mailbox | None = None
        self._watch: Watch | None = None
        """Tells that something has happened in the folder; None where it has to be looked for."""
        self._watch_tried = self._happened = False
        """Has one been tried for this folder?  Has something happened since the last look?"""
        self._nothing_to_do = False
        """Has a checkout that begins to wait nothing to do here?  Where the thread knows that checkouts wait,
        and where the process has all that it may use; not while there is no thread.  Written with
        ``postman.lock``."""
        self._applied = 0
        """The limit that the pool has."""
        self._lock_at = self._home_at = 0.0
        """When to try again to lock what is free; when to look for the folder."""
        self._tell = False
        """Has somebody asked who else is there?"""
        self._told_at = self._buried_at = 0.0
        self._used_at = 0.0
        """When it was of use last."""
        self.due = 0.0
        """When :meth:`tick` is to be called at the latest, by ``time.monotonic``."""

    def prepare(self, size: int) -> None:
        """Make the files of a budget.

        :raises ParameterError: that can't be done.
        """
        self._folder.prepare(min(size, MOST))

    def prepare_more(self, size: int) -> None:
        """One more engine states a size.  Where no file can be made now, that is no error: the process goes
        on with what it has, and makes them when they are needed."""
        try:
            self.prepare(size)
        except ParameterError as error:
            with postman.lock:
                self._failed(str(error))
        self.log()

    @property
    def limit(self) -> float:
        """How many connections the pool may have now."""
        return self._applied

    # -- what checkouts do -------------------------------------------------------------------------

    def wanted(self) -> None:
        """A checkout waits: lock what is free, or have the other processes asked."""
        if self._nothing_to_do and postman.runs:
            return
        with postman.lock:
            now = time.monotonic()
            own = self._side.own()
            if self._member.needs(own, now) and now >= self._lock_at:
                self._lock_free(self._member.needs(own, now), now)
                self._apply()
                own = self._side.own()
            self._nothing_to_do = self._member.needs(own, now) > 0 or self._has_all
            if not self._has_all or not postman.attends(self):
                postman.attend(self)
        self.log()

    @property
    def _has_all(self) -> bool:
        """Has the process all that it may use?  Then none of its checkouts waits for another process."""
        return self._applied >= min(self._side.size(), MOST)

    def resized(self) -> None:
        """The ``max_size`` of this process may be another one by now."""
        with postman.lock:
            self._nothing_to_do, self._lock_at, self._home_at = False, 0.0, 0.0
            postman.wake()

    def closed(self) -> None:
        """A connection is no longer open, and its lease may be of no use soon; takes no lock."""
        postman.wake()

    def room(self) -> None:
        """Somebody is about to open one more, if there is room: lock one that is free."""
        with postman.lock:
            now = time.monotonic()
            if self._member.limit <= self._side.own().used:
                self._lock_free(1, now)
                self._apply()
            if not postman.attends(self):
                postman.attend(self)
        self.log()

    def _lock_free(self, count: int, now: float) -> None:
        if self._box is None:  # the thread has not looked for the folder yet; if it can't be had, it says so
            with contextlib.suppress(OSError, ParameterError):
                self._find_home()
        self._look_around()
        mine = {lease.number for lease in self._member.leases}
        for number in range(self.budget):
            if count <= 0:
                return
            if number in mine:
                continue
            try:
                lease = self._folder.lock(number)
            except OSError as error:
                self._failed(f"{self._folder.path}: {error.strerror}")
                break
            if lease is not None:
                self._member.got(lease, now)
                count -= 1
        self._lock_at = now + ASK_EVERY

    def _apply(self) -> None:
        """Tell the pool its limit, if that is another one by now."""
        if (limit := self._member.limit) != self._applied:
            self._applied = limit
            self._side.set_limit(limit)

    # -- what is to be told ------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """The largest ``max_size`` that a process states."""
        return min(MOST, max(self._side.size(), self._largest))

    @property
    def is_elsewhere(self) -> bool:
        """May other processes have what this one lacks?"""
        return len(self._member.leases) < self.budget

    def _look_around(self) -> None:
        """See what others state; the mailbox of one that was killed stays until somebody buries it."""
        found = (BOX.fullmatch(name) for name in self._folder.boxes())
        stated = sorted(((int(match[2]), match[0]) for match in found if match), reverse=True)
        larger = itertools.takewhile(lambda each: each[0] > self._side.size(), stated)
        self._largest = next((size for size, name in larger if is_read(self._folder, name)), 0)

    def statistics(self) -> HostStatistics:
        """Return what is known of the host; takes no lock.  Others are asked for what they have, and answer a
        moment later."""
        now = time.monotonic()
        if not self._tell and now - self._told_at >= TELL_EVERY:
            self._tell = True
            postman.wake()
        waiting = self._side.waiting()
        me = HostProcess(os.getpid(), program(), len(self._member.leases), waiting, me=True)
        others = [
            HostProcess(here.process, here.program, here.have, here.waiting, me=False)
            for here, at in list(self._others.values())
            if now - at < REMEMBERED
        ]
        return HostStatistics(
            self.name,
            self.budget,
            (me, *sorted(others, key=lambda each: -each.leases)),
            self._problem or (NEW_FOLDER if self._folder.is_new else None),
        )

    def _failed(self, why: str) -> None:
        self._problem, now = why, time.monotonic()
        if now >= self._log_at.get(why, 0.0):
            self._log_at[why], self._unlogged = now + LOG_EVERY, why

    def log(self) -> None:
        """Log a new problem; called without ``postman.lock``, for a log may take as long as it likes."""
        why, self._unlogged = self._unlogged, None
        if why is not None:
            logger.warning("%s: the budget of the host can't be used fully: %s", self._side.label, why)

    # -- what the thread does ----------------------------------------------------------------------

    @property
    def fds(self) -> list[int]:
        """The descriptors of the mailbox and of the watch, as far as there are some."""
        return [each.fileno() for each in (self._box, self._watch) if each is not None]

    def tick(self, now: float) -> bool:
        """Read letters and do what is due; return whether it is still of use."""
        if self._watch is not None and self._watch.seen() and not self._happened:
            self._happened, self._home_at = True, now + HOME_SOON
        if now >= self._home_at:
            self._happened, self._home_at = False, now + HOME_EVERY
            self._look_for_home(now)
        posts = self._read_all(now)
        # First: a checkout that comes from now on is seen here, or calls itself, and waits for the lock.
        self._nothing_to_do = False
        own, member = self._side.own(), self._member
        if (needs := member.needs(own, now)) and now >= self._lock_at:
            self._lock_free(needs, now)
        posts += member.look(own, now)
        member.free_unused(own, now)
        self._apply()
        self._send_all(posts, member.needs(own, now) > 0, now)
        if member.promises:
            self._give(now)
        needs = member.needs(own, now)
        self._nothing_to_do = needs > 0 or self._has_all
        if needs or member.leases or own.waiting:
            self._used_at = now
        if self._is_calm(own):
            else_in = BURY_EVERY if self._largest > self._side.size() else CALM
        else:
            else_in = HOME_EVERY if member.leases else ASK_EVERY if own.waiting else LINGER
        self.due = now + (LOOK_AGAIN if member.promises else member.look_in(own, now, else_in))
        return now - self._used_at < LINGER

    def _is_calm(self, own: Own) -> bool:
        """Will all that may happen next be told: a letter, an event, a checkout that waits, a close?

        Not while it works, for its demand is a mean; nor while anything else is under way.
        """
        if self._watch is None or self._happened or self._problem is not None:
            return False
        return 0 < self._member.limit <= own.used == own.spare

    def _find_home(self) -> None:
        """Open the folder again if it is another one by now.

        :raises OSError, ParameterError: it can't be made again.
        """
        if self._folder.renew():
            self._watch_tried = False  # that of the other folder
            self.prepare(self._side.size())

    def _look_for_home(self, now: float) -> None:
        """Make what was deleted again, lock new files for what it has, have a mailbox of the right name.

        What fails is tried again at the next look, not later: when the folder can be made again, another
        process may make it, and lock its files as soon as they are not new.
        """
        problem, size, box = None, self._side.size(), self._box
        try:
            self._find_home()
        except (OSError, ParameterError) as error:
            problem = str(error)  # those whose folder it was go on in it
        self._bury(now)
        self._look_around()
        try:
            if box is None or box.size != size or not self._folder.has(box.name):
                self._box = Mailbox(self._folder, size)
                if box is not None:  # a lease that is still in it is free then
                    box.remove()
        except OSError as error:
            problem = problem or f"no mailbox can be made in the folder {self._folder.path}: {error.strerror}"
        if problem is not None:
            self._failed(problem)
            return
        self._problem = None
        if not self._watch_tried:
            self._watch_folder()
        budget = self.budget
        if any(lease.is_orphan or lease.number >= budget for lease in self._member.leases):
            self._move_home(budget)
            self._member.give_up(budget, now)

    def _bury(self, now: float) -> None:
        """Remove the mailboxes of the dead."""
        box = self._box
        if box is not None and now - self._buried_at >= BURY_EVERY:
            self._buried_at = now
            for name in self._folder.boxes():
                if name != box.name and not is_read(self._folder, name):
                    self._gone(name)

    def _watch_folder(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch, self._watch_tried = None, True
        with contextlib.suppress(OSError):  # then it is looked at all the time
            self._watch = Watch(self._folder.path)
            # Once more, for what happened before.
            self._happened, self._home_at = True, time.monotonic() + HOME_SOON

    def _move_home(self, budget: int) -> None:
        """Lock other files for leases whose own was deleted, or is above the budget."""
        leases = self._member.leases
        for index, lease in enumerate(leases):
            gone = lease.is_orphan
            if not gone and lease.number < budget:
                continue
            for number in sorted(range(budget), key=lambda number, own=lease.number: number != own):  # type: ignore[misc]
                with contextlib.suppress(OSError):
                    if (new := self._folder.lock(number, moved=gone)) is not None:
                        leases[index] = new
                        lease.close()
                        break
            else:
                lease.number = MOST  # it is above any budget: freed as soon as a connection is closed

    def _read_all(self, now: float) -> list[Post]:
        posts: list[Post] = []
        own: Own | None = None
        for _ in range(MOST_AT_ONCE):
            received = None if self._box is None else self._box.receive()
            if received is None:
                break
            sender, letter, fd = received
            if isinstance(letter, Passed):
                lease = self._folder.adopt(letter.number, fd)
                if lease is not None:
                    self._member.got(lease, now, sender)
                    self._apply()
                    own = None
            elif isinstance(letter, Here):
                self._others[sender] = letter, now
            elif letter is not None:
                own = own or self._side.own()  # as it was when the first of them came
                posts += self._member.heard(sender, letter, own, now)
                if isinstance(letter, Ask) and letter.tell:
                    posts.append(Post(sender, self._here(own)))
        return posts

    def _here(self, own: Own) -> Here:
        member = self._member
        label = self._side.label[:LONGEST_TEXT]
        want = min(1e9, member.want)
        return Here(len(member.leases), want, own.waiting, os.getpid(), program(), label, self.budget)

    def _send_all(self, posts: list[Post], needs: bool, now: float) -> None:
        box = self._box
        if box is None:
            return
        tell = (self._tell or needs) and now - self._told_at >= TELL_EVERY
        if tell and not any(isinstance(post.letter, Ask) for post in posts):
            posts.append(Post("", Ask(len(self._member.leases), 0.0, 0.0, True)))
        for post in posts:
            letter = post.letter
            if isinstance(letter, Ask):
                if tell:
                    self._told_at, self._tell = now, False
                    letter = letter._replace(tell=True)
                    self._others = {n: o for n, o in self._others.items() if now - o[1] < REMEMBERED}
                for name in self._folder.boxes():
                    if name != box.name and box.send(name, letter) == GONE:
                        self._gone(name)
            elif box.send(post.to, letter) == GONE:
                self._gone(post.to)

    def _gone(self, name: str) -> None:
        """Nobody reads that mailbox any more."""
        self._folder.remove(name)
        self._member.forget(name)
        self._others.pop(name, None)

    def _give(self, now: float) -> None:
        """Pass on what is promised and has no connection any more."""
        for post in self._member.ready(self._side.own()):
            lease: Lease = post.lease
            if not post.to:
                lease.release()
                continue
            sent = GONE if self._box is None else self._box.send(post.to, post.letter, lease.fd)
            if sent == SENT:
                lease.close()
            else:
                self._member.kept(post, sent == GONE)
                if sent == GONE:
                    self._gone(post.to)
        self._apply()

    def end(self) -> None:
        """It is of no use for now."""
        box, self._box = self._box, None
        if box is not None:
            box.remove()
        watch, self._watch, self._watch_tried = self._watch, None, False
        if watch is not None:
            watch.close()

    def after_fork_in_child(self) -> None:
        """What is open is the parent's: close it, and free nothing."""
        for lease in self._member.leases:
            lease.close()
        for each in (self._box, self._watch):
            if each is not None:
                each.close()
        self._others.clear()
        self._begin()


def program() -> str:
    """What this process runs, for people: the command, without its arguments, which may be anything."""
    command = getattr(sys, "orig_argv", sys.argv)[:1] + sys.argv[:1]
    name = os.path.basename(command[-1]) if command else ""
    return name.encode("ascii", "replace").decode()[:LONGEST_TEXT] or "python"
