"""A look at budgets from outside: who is there, and what each has."""

from __future__ import annotations

import os
import select
import time

from .lease import Folder
from .letters import GONE, SENT, Ask, Here, Mailbox

PATIENCE = 0.5
"""Seconds within which processes answer."""


def visit(path: str) -> tuple[list[Here], int]:
    """Ask the processes of one budget who they are; return the answers, and how many did not answer.

    :param path: the budget's folder.
    :raises OSError: there is none, or this user may not look.
    """
    folder = Folder.at(path)
    box = Mailbox(folder, 0)
    try:
        os.chmod(box.name, 0o666, dir_fd=folder.fd)  # they may be another user's: the folder is theirs alone
        asked: set[str] = set()
        for name in folder.boxes():
            if name == box.name:
                continue
            sent = box.send(name, Ask(0, 0.0, 0.0, True))
            if sent == SENT:
                asked.add(name)
            elif sent == GONE:
                folder.remove(name)
        found: list[Here] = []
        deadline, poll = time.monotonic() + PATIENCE, select.poll()
        poll.register(box, select.POLLIN)
        while asked and (left := deadline - time.monotonic()) > 0:
            poll.poll(1000 * left)
            while (received := box.receive()) is not None:
                if isinstance(received[1], Here) and received[0] in asked:
                    asked.discard(received[0])
                    found.append(received[1])
        return sorted(found, key=lambda here: -here.have), len(asked)
    finally:
        box.remove()
        folder.close()
