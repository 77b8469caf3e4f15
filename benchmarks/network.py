"""A network with faults, in a process of its own: in ours it would take the processor from what is measured.

It is the proxy of the tests, and takes its orders as lines.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from sqlalchemy.engine import URL

PROXY = Path(__file__).parent.parent / "tests" / "proxy.py"
ORDERS = ("pass_on", "blackhole", "refuse", "reset")


class Network:
    """Between us and a server: passes on what comes, until it is told otherwise."""

    def __init__(self, host: str, port: int) -> None:
        command = [sys.executable, __file__, host, str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self._answer())

    def url(self, url: URL) -> URL:
        """The server's URL, with the way through this network."""
        return url.set(host="127.0.0.1", port=self.port)

    def pass_on(self) -> None:
        """Pass on everything, also what was held until now."""
        self._order("pass_on")

    def blackhole(self) -> None:
        """Keep all connections, accept new ones, and let nothing through."""
        self._order("blackhole")

    def refuse(self) -> None:
        """End the connections that there are, and refuse new ones."""
        self._order("refuse")
        self._order("reset")

    def stop(self) -> None:
        """End everything."""
        self._process.communicate()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _order(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("the network has ended, see above")
        return answer


def _obey(host: str, port: int) -> None:
    """Run the proxy; each line is the name of a method, and is answered when that is done."""
    with runpy.run_path(str(PROXY))["Proxy"](host, port) as proxy:
        print(proxy.port, flush=True)
        for line in sys.stdin:
            order = line.strip()
            assert order in ORDERS, order
            getattr(proxy, order)()
            print(order, flush=True)


if __name__ == "__main__":
    _obey(sys.argv[1], int(sys.argv[2]))
