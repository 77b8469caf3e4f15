"""Processes that share a budget, simulated: letters late, lost and out of order, processes that die anywhere.

Time is a number.  The kernel is simulated as far as it matters: a lease is wherever its descriptor is, in a
process or in a letter under way, and free when nobody has it any more.  ``HOST_SEEDS=500 pytest
tests/test_host_policy.py`` searches for longer.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest

from sqla_queries_pool.host.letters import Ask, Letter, Passed
from sqla_queries_pool.host.policy import IDLE_FOR, Member, Own, Post

STEP = 0.005
SEEDS = int(os.environ.get("HOST_SEEDS", "3"))
CLOSING = 0.01
"""Seconds that the server takes to let go of a connection."""


@dataclass(frozen=True)
class Lock:
    """A lease."""

    number: int


@dataclass
class Load:
    """What a process has to do."""

    threads: int = 0
    work: float = 0.01
    pause: float = 0.0


@dataclass
class Process:
    """A process: its member, and a pool that does what a ledger would do."""

    name: str
    load: Load
    member: Member = field(default_factory=Member)
    busy: list[float] = field(default_factory=list)
    """When each connection that is out is returned."""
    idle: list[float] = field(default_factory=list)
    """Since when each is idle."""
    closing: list[float] = field(default_factory=list)
    """When the server has let go of it."""
    waiting: list[float] = field(default_factory=list)
    """Since when each checkout waits."""
    resting: list[float] = field(default_factory=list)
    served: int = 0
    opened: int = 0
    longest: float = 0.0
    mail: list[tuple[float, str, Letter, Lock | None]] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Connections on the server."""
        return len(self.busy) + len(self.idle) + len(self.closing)

    def own(self, now: float) -> Own:
        """What the member is told."""
        spare = 0 if self.waiting else sum(now - since >= IDLE_FOR for since in self.idle)
        waited = now - self.waiting[0] if self.waiting else 0.0
        return Own(self.used, spare, len(self.busy), len(self.waiting), waited, 100)

    def work(self, now: float, draw: random.Random) -> None:
        """Threads return connections, rest, ask again; what exceeds the limit is closed."""
        self.closing = [at for at in self.closing if at > now]
        for at in [at for at in self.busy if at <= now]:
            self.busy.remove(at)
            self.idle.append(now)
            self.resting.append(now + self.load.pause * draw.random() * 2)
        threads = len(self.busy) + len(self.waiting) + len(self.resting)
        self.resting += [now] * (self.load.threads - threads)
        for at in sorted(at for at in self.resting if at <= now):
            if len(self.busy) + len(self.waiting) >= self.load.threads:
                break
            self.resting.remove(at)
            self.waiting.append(now)
        while self.idle and self.used - len(self.closing) > self.member.limit:
            self.idle.pop(0)
            self.closing.append(now + CLOSING)
        while self.waiting:
            if self.idle:
                self.idle.pop()
            elif self.used < self.member.limit:
                self.opened += 1
            else:
                break
            self.longest = max(self.longest, now - self.waiting.pop(0))
            self.served += 1
            self.busy.append(now + self.load.work * draw.uniform(0.5, 1.5))


class Host:
    """Several processes and what is under way between them.

    :param loss: the part of the letters that is lost; one with a lease in it comes back instead.
    :param delay: seconds that a letter takes at most.
    """

    def __init__(self, budget: int, seed: int, loss: float = 0.0, delay: float = 0.001) -> None:
        self.budget, self.loss, self.delay = budget, loss, delay
        self.draw = random.Random(seed)
        self.now = 0.0
        self.processes: list[Process] = []
        self.numbers = 0
        self.locked: set[int] = set()
        """The locks that are taken, as the kernel counts."""

    def start(self, load: Load) -> Process:
        """A process begins."""
        self.numbers += 1
        process = Process(f"p{self.numbers}", load)
        self.processes.append(process)
        return process

    def kill(self, process: Process) -> None:
        """It dies: what it had is free, what is in its mailbox, too."""
        self.processes.remove(process)
        self.locked -= {lock.number for lock in process.member.leases}
        self.locked -= {lock.number for *_, lock in process.mail if lock is not None}

    def taken(self) -> list[int]:
        """The leases that somebody has, or that are under way."""
        found = [lock.number for process in self.processes for lock in process.member.leases]
        return found + [lock.number for p in self.processes for *_, lock in p.mail if lock is not None]

    def check(self) -> None:
        """No lease has two owners or none, and there are never more connections than leases."""
        taken = self.taken()
        assert len(taken) == len(set(taken)), sorted(taken)
        assert set(taken) == self.locked
        assert len(taken) <= self.budget
        for process in self.processes:
            assert process.used <= len(process.member.leases), process
        assert sum(process.used for process in self.processes) <= self.budget

    def send(self, sender: Process, post: Post, dying: bool = False) -> None:
        """A letter is on its way, unless it is lost; the sender may die before or after it."""
        if dying and self.draw.random() < 0.5:
            if post.lease is not None:
                self.locked.discard(post.lease.number)
            self.kill(sender)
            return
        readers = [p for p in self.processes if p is not sender and post.to in ("", p.name)]
        if post.lease is not None:
            reader = next(iter(readers), None)
            if not post.to:
                self.locked.discard(post.lease.number)
            elif reader is None or self.draw.random() < self.loss:
                sender.member.kept(post, gone=reader is None)
            else:
                self.deliver(sender, reader, post)
        else:
            for reader in readers:
                if self.draw.random() >= self.loss:
                    self.deliver(sender, reader, post)
        if dying and sender in self.processes:
            self.kill(sender)

    def deliver(self, sender: Process, reader: Process, post: Post) -> None:
        """It arrives, some time, perhaps after a later one."""
        at = self.now + self.draw.random() * self.delay
        reader.mail.append((at, sender.name, post.letter, post.lease))

    def step(self, dying: float = 0.0) -> None:
        """Let some milliseconds pass.

        :param dying: the probability that a process dies at one of its letters.
        """
        self.now += STEP
        for process in self.draw.sample(self.processes, len(self.processes)):
            process.work(self.now, self.draw)
            self.letters(process, dying)
            self.check()

    def letters(self, process: Process, dying: float) -> None:
        """What share.py does: read, lock, ask, give."""
        member, now = process.member, self.now
        posts: list[Post] = []
        due = [letter for letter in process.mail if letter[0] <= now]
        process.mail = [letter for letter in process.mail if letter[0] > now]
        self.draw.shuffle(due)
        for _, sender, letter, lock in due:
            if isinstance(letter, Passed):
                member.got(lock, now, sender)
            else:
                posts += member.heard(sender, letter, process.own(now), now)
        free = sorted(set(range(self.budget)) - self.locked)
        for number in free[: member.needs(process.own(now), now)]:
            self.locked.add(number)
            member.got(Lock(number), now)
        posts += member.look(process.own(now), now)
        member.free_unused(process.own(now), now)
        process.work(now, self.draw)  # its limit may be another one by now
        for post in posts:
            self.send(process, post, self.draw.random() < dying)
            if process not in self.processes:
                return
        for post in member.ready(process.own(now)):
            self.send(process, post, self.draw.random() < dying)
            if process not in self.processes:
                return

    def run(self, seconds: float, dying: float = 0.0) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now < until:
            self.step(dying)

    def measure(self, seconds: float) -> tuple[float, float, float]:
        """Checkouts per second, Jain's index over processes, and connects per second."""
        before = [(p, p.served, p.opened) for p in self.processes]
        self.run(seconds)
        served = [p.served - then for p, then, _ in before]
        jain = sum(served) ** 2 / (len(served) * sum(n * n for n in served) or 1)
        return sum(served) / seconds, jain, sum(p.opened - then for p, _, then in before) / seconds


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_lease_is_lost_or_doubled_whatever_happens(seed: int) -> None:
    """Loads change, letters get lost and overtake each other, processes die at their letters, others begin.

    ``check`` runs after each step of each process.
    """
    draw = random.Random(seed)
    host = Host(draw.randint(1, 12), seed, loss=draw.choice([0.0, 0.1, 0.4]), delay=draw.choice([0.001, 0.2]))
    for _ in range(draw.randint(2, 8)):
        host.start(Load(draw.randint(0, 6), draw.choice([0.005, 0.05]), draw.choice([0.0, 0.1])))
    for _ in range(20):
        host.run(0.25, dying=0.003)
        if draw.random() < 0.5:
            host.start(Load(draw.randint(0, 6)))
        for process in host.processes:
            if draw.random() < 0.3:
                process.load.threads = draw.randint(0, 8)
        if host.processes and draw.random() < 0.3:
            host.kill(draw.choice(host.processes))
    survivor = host.start(Load(host.budget))
    for process in [p for p in host.processes if p is not survivor]:
        host.kill(process)
    host.run(1.0)
    assert len(survivor.member.leases) == host.budget


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("budget", "processes"), [(4, 8), (12, 8), (3, 3), (1, 4)])
def test_nobody_waits_for_ever(budget: int, processes: int, seed: int) -> None:
    """With a fifth of the letters lost, each process is served again and again."""
    host = Host(budget, seed, loss=0.2, delay=0.02)
    for _ in range(processes):
        host.start(Load(threads=4))
    host.run(3.0)
    for _ in range(2):
        before = {p.name: p.served for p in host.processes}
        host.run(5.0)
        assert all(p.served > before[p.name] for p in host.processes)


@pytest.mark.slow
def test_twelve_for_eight_busy_processes_are_shared_and_stay() -> None:
    """Each has one or two: Jain 0.9, and no connection moves any more."""
    host = Host(12, 1)
    for _ in range(8):
        host.start(Load(threads=8))
    host.run(5.0)
    _, jain, connects = host.measure(10.0)
    assert sorted(len(p.member.leases) for p in host.processes) == [1] * 4 + [2] * 4
    assert jain > 0.88
    assert connects < 1


def test_sixteen_for_eight_busy_processes_are_shared_evenly() -> None:
    """Each has two."""
    host = Host(16, 2)
    for _ in range(8):
        host.start(Load(threads=8))
    host.run(5.0)
    _, jain, connects = host.measure(10.0)
    assert [len(p.member.leases) for p in host.processes] == [2] * 8
    assert jain > 0.98
    assert connects < 1


def test_leases_follow_demand() -> None:
    """One that wants three times as much has about three times as many."""
    host = Host(12, 3)
    small, large = host.start(Load(threads=6)), host.start(Load(threads=18))
    host.run(5.0)
    assert len(small.member.leases) in (3, 4)
    assert len(large.member.leases) in (8, 9)


def test_what_is_idle_gives_way_soon() -> None:
    """One process has used all, and stops; another begins, and has them within 0.2 s."""
    host = Host(12, 4)
    first = host.start(Load(threads=12))
    host.run(1.0)
    first.load.threads = 0
    first.resting.clear()
    host.run(0.1)
    second = host.start(Load(threads=12))
    host.run(0.2)
    assert second.longest < 0.2
    assert len(second.member.leases) == 12


def test_one_that_starts_late_is_served_within_a_second() -> None:
    """On a host that is full and busy."""
    host = Host(8, 5)
    for _ in range(4):
        host.start(Load(threads=16))
    host.run(3.0)
    late = host.start(Load(threads=4))
    host.run(1.0)
    assert late.served > 0


@pytest.mark.slow
def test_more_processes_than_leases_take_turns() -> None:
    """Eight processes, four leases: each has its part, and few connections are opened for it."""
    host = Host(4, 6)
    for _ in range(8):
        host.start(Load(threads=4))
    host.run(2.0)
    _, jain, connects = host.measure(20.0)
    assert jain > 0.9
    assert connects < 25
    assert max(p.longest for p in host.processes) < 3


def test_a_promise_that_nothing_comes_of_ends() -> None:
    """A process is asked for a lease, and its transactions take for ever: it has all of its leases again."""
    host = Host(2, 7)
    slow = host.start(Load(threads=2, work=1000.0))
    host.run(0.1)
    other = host.start(Load(threads=1))
    host.run(1.0)
    assert slow.member.promises
    host.kill(other)
    host.run(2.5)
    assert not slow.member.promises
    assert slow.member.limit == 2


def test_one_that_did_not_look_for_long_knows_what_it_wants_when_it_is_asked() -> None:
    """It was idle, and is busy now: an ask of one that has about as many gets nothing."""
    member = Member()
    for number in range(4):
        member.got(Lock(number), 0.0)
    member.look(Own(4, 4, 0, 0, 0.0, 8), 0.0)
    asks = Ask(3, 4.0, 0.1, False)
    assert member.heard("other", asks, Own(4, 0, 4, 4, 0.1, 8), 300.0) == []
