from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the soak counts descriptors in /proc"),
]

ROOT = Path(__file__).parent.parent
SHORT, LONG = "5", os.environ.get("SOAK_SECONDS") or "30"
SEED = os.environ.get("SQLA_QUERIES_POOL_SEED")


@pytest.mark.parametrize(
    ("seconds", "interval"),
    [
        (SHORT, "0.005"),
        pytest.param(LONG, "0.005", marks=pytest.mark.exhaustive),
        pytest.param("15", "0.000001", marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_is_lost_leaked_or_mixed_up_whatever_happens_to_64_threads(
    seconds: str, interval: str
) -> None:
    """All that `tests/soak.py` promises holds, in a process of its own, whose threads and files it counts.

    The last one lets another thread run after each microsecond, nearly wherever that can be.
    """
    faulthandler.cancel_dump_traceback_later()  # SOAK_SECONDS may be more; the soak has a watchdog of its own
    command = [sys.executable, "tests/soak.py", "--seconds", seconds, "--switch-interval", interval]
    command += ["--seed", SEED] if SEED else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"see above; {done.stdout.splitlines()[:1]}"
