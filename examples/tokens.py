"""Credentials that expire: a token of RDS IAM, Azure, Cloud SQL or Vault for each connect.

tokens = Tokens(functools.partial(rds, boto3.client("rds"), host, 5432, "app"))
use(tokens, engine)  # or use_async(tokens, async_engine)

A thread renews what is there ahead of its end, so that no connect waits for the service.
"""

import asyncio
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

log = logging.getLogger(__name__)
LEAST = 10.0  # seconds from one request to the next, where a wrong clock says that a token has ended already


class Fetched(NamedTuple):
    """What a service gives."""

    arguments: dict[str, str]
    """The driver's: ``password``, perhaps ``user``."""
    seconds: float
    """For how long it can be used."""


class Tokens:
    """What the service gave last, renewed in the background when a third of its time is left."""

    def __init__(self, fetch: Callable[[], Fetched], on_renewed: Callable[[], object] = lambda: None) -> None:
        self._fetch = fetch
        self._on_renewed = on_renewed
        self._one = threading.Lock()  # one request to the service at a time
        self._ended = threading.Event()
        self._renew_at = 0.0
        self.current: dict[str, str] = {}
        self.renewed(self.current)  # the first one, here: without it nothing connects
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # the parent's thread is not there

    def _begin(self) -> None:
        self._one = threading.Lock()
        if not self._ended.is_set():
            threading.Thread(target=self._run, name="tokens", daemon=True).start()

    def renewed(self, refused: dict[str, str]) -> dict[str, str]:
        """Return others than these, which the service gives now if nobody has asked since."""
        with self._one:
            if self.current is refused:
                arguments, seconds = self._fetch()
                self.current, self._renew_at = arguments, time.monotonic() + max(LEAST, seconds * 2 / 3)
                self._on_renewed()
            return self.current

    def end(self) -> None:
        """Renew no more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(max(0.0, self._renew_at - time.monotonic())):
            try:
                if time.monotonic() >= self._renew_at:
                    self.renewed(self.current)
            except Exception:
                log.exception("no new token; trying again, the old one can be used for a while")
                self._ended.wait(1.0)


def use(tokens: Tokens, engine: Engine) -> None:
    """Have each connect of an engine use them; the pool asks once more after an authentication error."""

    @event.listens_for(engine, "do_connect")
    def give(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
        current = tokens.current
        if "authentication_error" in record.info:
            current = tokens.renewed(record.info["tokens"])
        record.info["tokens"] = current
        cparams.update(current)


def use_async(tokens: Tokens, engine: AsyncEngine) -> None:
    """The same for an engine of asyncio: its loop goes on while the service is asked."""

    @event.listens_for(engine.sync_engine, "do_connect")
    def give(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
        current = tokens.current
        if "authentication_error" in record.info:
            current = await_only(asyncio.to_thread(tokens.renewed, record.info["tokens"]))
        record.info["tokens"] = current
        cparams.update(current)


# -- the services; what they are given is their own client


def rds(client: Any, host: str, port: int, user: str) -> Fetched:
    """Amazon RDS and Aurora, IAM: ``boto3.client("rds")``.  A token is good for 15 minutes."""
    return Fetched({"password": client.generate_db_auth_token(host, port, user)}, 900)


def azure(credential: Any) -> Fetched:
    """Azure Database for PostgreSQL, Entra ID: ``azure.identity.DefaultAzureCredential()``."""
    token = credential.get_token("https://ossrdbms-aad.database.windows.net/.default")
    return Fetched({"password": token.token}, token.expires_on - time.time())


def cloud_sql(credentials: Any, request: Any) -> Fetched:
    """Cloud SQL, IAM: ``google.auth.default(scopes=["https://www.googleapis.com/auth/sqlservice.login"])[0]``
    and ``google.auth.transport.requests.Request()``."""
    credentials.refresh(request)
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)  # as `expiry` is
    return Fetched({"password": credentials.token}, (credentials.expiry - now).total_seconds())


def vault(client: Any, role: str) -> Fetched:
    """Vault's database secrets engine: ``hvac.Client()``.  Each time it makes another user."""
    secret = client.secrets.database.generate_credentials(name=role)
    arguments = {"user": secret["data"]["username"], "password": secret["data"]["password"]}
    return Fetched(arguments, secret["lease_duration"])
