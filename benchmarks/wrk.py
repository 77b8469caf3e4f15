"""wrk, a load tool of Debian's: so many clients, each of whom asks again when it was answered."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


@dataclass(frozen=True)
class Answers:
    """What wrk's clients got."""

    goodput: float
    """Answers per second that were no errors, ..."""
    good: int
    """... and all of them."""
    p50: float
    p99: float
    """Milliseconds."""
    errors: int


def ask(url: str, clients: int, seconds: int, timeout: int) -> Answers:
    """Have so many clients ask for so long, each of whom waits for ``timeout`` seconds."""
    options = ["--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s"]
    command = ["wrk", *options, "--timeout", f"{timeout}s", "--latency", url]
    return understand(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def understand(said: str) -> Answers:
    """Read what wrk printed."""
    answers, took, unit = _found(r"(\d+) requests in ([\d.]+)(ms|s|m)\b", said)
    bad = int((_found(r"Non-2xx or 3xx responses: (\d+)", said) or "0")[0])
    sockets = sum(
        map(int, _found(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said))
    )
    good = int(answers) - bad
    p50, p99 = (_milliseconds(rf"\b{part}%\s+([\d.]+)(us|ms|s|m)\b", said) for part in (50, 99))
    return Answers(1000 * good / (float(took) * UNITS[unit]), good, p50, p99, bad + sockets)


def _found(pattern: str, said: str) -> tuple[str, ...]:
    match = re.search(pattern, said)
    return match.groups() if match else ()


def _milliseconds(pattern: str, said: str) -> float:
    number, unit = _found(pattern, said)
    return float(number) * UNITS[unit]
