"""The hosts of a load find each other through a store that all can reach, prove that they belong together, and agree.

Each host listens on one address and writes it to the store, next to what the others must know. The first host also writes a random
token. A connection proves that it knows the token before anything else; the token never crosses it. Then every host says whether it
is connected to all others, and the first one decides for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_maxtext_loader.checkpoint.exchange.peers import Peers
from vllm_maxtext_loader.checkpoint.exchange.sharing import Assignment

logger = logging.getLogger("vllm." + __name__)

_CONNECT_SECONDS = 10.0
"""A host that does not answer within this time is behind a firewall."""

_NONCE_BYTES = 32
_HELLO = struct.Struct(f"!Q{_NONCE_BYTES}s32s")
"""Number of the host that connects, its nonce, and its proof."""


class NoExchangeError(Exception):
    """Why every host reads for itself: one sentence, the same on all hosts where they could agree on it."""


class Store(Protocol):
    """Strings by key that all hosts can reach. A key is written once."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""
        ...

    def get(self, key: str, seconds: float) -> str:
        """A value, as soon as it is there.

        Raises:
            TimeoutError: it is not there in time.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a host brings to the meeting.

    Attributes:
        host: its number.
        hosts: all numbers, ascending; the first one decides.
        address: on which it listens.
        nbytes: regions that it can read: bytes of the largest. The least of all hosts' counts.
        where: path of the checkpoint, for messages.
        seconds: time limit of a wait.
    """

    host: int
    hosts: Sequence[int]
    address: str
    nbytes: int
    where: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What a host says of itself: its name, where it listens, `Terms.nbytes`; or why it does not take part."""

    name: str
    address: str = ""
    port: int = 0
    nbytes: int = 0
    reason: str = ""


def stay_away(store: Store, host: int, reason: str) -> None:
    """Tells the others that this host takes no part, so that they do not wait for it."""
    store.set(f"host/{host}", json.dumps(dataclasses.asdict(_Entry(socket.gethostname(), reason=reason))))


def meet(store: Store, terms: Terms, assign: Callable[[int], Assignment]) -> tuple[Peers, Assignment]:
    """Connects to all other hosts, and agrees with them on who reads what.

    Args:
        store: for this load only.
        terms: of this host.
        assign: who reads what, where regions have at most so many bytes.

    Raises:
        NoExchangeError: the hosts do not exchange.
    """
    sockets: dict[int, socket.socket] = {}
    try:
        with _Listener(store, terms) as listener:
            try:
                entries = _entries(store, terms)
                assignment = assign(min(entry.nbytes for entry in entries.values()))
                if not assignment.is_gain:
                    raise NoExchangeError("the hosts would read hardly less in all")
                sockets |= listener.connect(entries)
                verdict = {"reason": "", "plan": assignment.digest()}
            except (NoExchangeError, OSError) as error:
                verdict, assignment, entries = {"reason": str(error), "plan": ""}, None, {}
            _decide(store, terms, verdict)
        assert assignment is not None
    except BaseException:
        for connected in sockets.values():
            connected.close()
        raise
    names = {host: entry.name for host, entry in entries.items()}
    return Peers(terms.host, names, sockets, terms.where, terms.seconds), assignment


def _entries(store: Store, terms: Terms) -> dict[int, _Entry]:
    """What every host says of itself.

    Raises:
        NoExchangeError: a host takes no part, or says nothing in time.
    """
    entries: dict[int, _Entry] = {}
    for host in terms.hosts:
        try:
            entries[host] = _Entry(**json.loads(store.get(f"host/{host}", terms.seconds)))
        except TimeoutError:
            raise NoExchangeError(
                f"process {host} did not begin to load within {terms.seconds:g} s of the others"
            ) from None
        if entries[host].reason:
            raise NoExchangeError(f"host {entries[host].name}: {entries[host].reason}")
    return entries


def _decide(store: Store, terms: Terms, verdict: dict[str, str]) -> None:
    """The first host decides for all, by what every host says.

    Raises:
        NoExchangeError: some host is not connected to all others, or would have another one read.
    """
    store.set(f"verdict/{terms.host}", json.dumps(verdict))
    reason, first = verdict["reason"], terms.hosts[0]
    patience = terms.seconds + 2 * _CONNECT_SECONDS
    if terms.host == first:
        reason = reason or _first_objection(store, terms, verdict["plan"], patience)
        store.set("decision", json.dumps(reason))
    elif not reason:
        # A host that objects need not wait: the first one will hear of it. That one has waited for all others before it decides.
        try:
            reason = json.loads(store.get("decision", 2 * patience))
        except TimeoutError:
            reason = f"process {first} does not decide"
    if reason:
        raise NoExchangeError(reason)


def _first_objection(store: Store, terms: Terms, plan: str, patience: float) -> str:
    """Why some host cannot exchange; "" where all can."""
    for host in terms.hosts:
        try:
            said = json.loads(store.get(f"verdict/{host}", patience))
        except TimeoutError:
            return f"process {host} does not say whether it reaches the others"
        if said["reason"]:
            return said["reason"]
        if said["plan"] != plan:
            return f"process {host} has another plan of who reads what"
    return ""


class _Listener:
    """Accepts the connections of hosts with higher numbers, and connects to those with lower ones."""

    def __init__(self, store: Store, terms: Terms) -> None:
        self._store, self._terms = store, terms
        self._accepted: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self._token = b""

    def __enter__(self) -> _Listener:
        terms, store = self._terms, self._store
        try:
            if terms.host == terms.hosts[0]:
                store.set("token", secrets.token_hex(_NONCE_BYTES))
            family = socket.AF_INET6 if ":" in terms.address else socket.AF_INET
            # On the one address that the others reach: what else this host is connected to is no way in.
            self._socket = socket.create_server((terms.address, 0), family=family, backlog=len(terms.hosts))
        except OSError as error:
            stay_away(store, terms.host, f"cannot listen on {terms.address} ({error})")
            raise NoExchangeError(
                f"host {socket.gethostname()} cannot listen on {terms.address} ({error})"
            ) from error
        port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="maxtext-accept", daemon=True).start()
        entry = _Entry(socket.gethostname(), terms.address, port, terms.nbytes)
        store.set(f"host/{terms.host}", json.dumps(dataclasses.asdict(entry)))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._changed:
            for accepted in self._accepted.values():
                accepted.close()

    def connect(self, entries: dict[int, _Entry]) -> dict[int, socket.socket]:
        """Connections to all others.

        Raises:
            NoExchangeError: one cannot be reached, or does not come.
        """
        terms = self._terms
        limit = min(_CONNECT_SECONDS, terms.seconds)
        with self._changed:
            self._token = bytes.fromhex(self._store.get("token", terms.seconds))
            self._changed.notify_all()
        found: dict[int, socket.socket] = {}
        try:
            for host in (host for host in terms.hosts if host < terms.host):
                found[host] = self._connect(host, entries[host], limit)
            higher = [host for host in terms.hosts if host > terms.host]
            with self._changed:
                if not self._changed.wait_for(
                    lambda: all(host in self._accepted for host in higher), limit + 1
                ):
                    absent = next(host for host in higher if host not in self._accepted)
                    raise NoExchangeError(
                        f"host {entries[absent].name} (process {absent}) does not come to {terms.address} port "
                        f"{entries[terms.host].port} of host {entries[terms.host].name} (process {terms.host}). Is there a firewall?"
                    )
                found |= {host: self._accepted.pop(host) for host in higher}
        except BaseException:
            for connected in found.values():
                connected.close()
            raise
        return {host: found[host] for host in sorted(found)}

    def _connect(self, host: int, entry: _Entry, limit: float) -> socket.socket:
        try:
            sock = socket.create_connection((entry.address, entry.port), timeout=limit)
            try:
                nonce, own = _read(sock, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
                sock.sendall(_HELLO.pack(self._terms.host, own, self._proof("connects", nonce, host)))
                if not hmac.compare_digest(_read(sock, 32), self._proof("accepts", own, host)):
                    raise ConnectionError("whoever listens there does not know the token")
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise NoExchangeError(
                f"host {socket.gethostname()} (process {self._terms.host}) does not reach {entry.address} port {entry.port} of host "
                f"{entry.name} (process {host}): {error}. Is there a firewall?"
            ) from error
        return _ready(sock)

    def _proof(self, what: str, nonce: bytes, listener: int, connecting: int | None = None) -> bytes:
        """What only a host that knows the token can say."""
        connecting = self._terms.host if connecting is None else connecting
        said = f"{what} {connecting} {listener} ".encode() + nonce
        return hmac.digest(self._token, said, "sha256")

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            # One that says nothing must not keep the others waiting.
            threading.Thread(target=self._admit, args=(sock,), name="maxtext-admit", daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        """Lets a host in that knows the token; closes any other connection."""
        terms = self._terms
        try:
            sock.settimeout(min(_CONNECT_SECONDS, terms.seconds))
            nonce = secrets.token_bytes(_NONCE_BYTES)
            sock.sendall(nonce)
            host, other, proof = _HELLO.unpack(_read(sock, _HELLO.size))
            with self._changed:
                # A host may come before this one has read the token.
                self._changed.wait_for(lambda: self._token, terms.seconds)
                known = host in terms.hosts and host > terms.host and host not in self._accepted
                known = known and bool(self._token)
            if not known or not hmac.compare_digest(proof, self._proof("connects", nonce, terms.host, host)):
                raise ConnectionError("it does not know the token")
            sock.sendall(self._proof("accepts", other, terms.host, host))
        except OSError as error:
            logger.warning("A connection for the exchange between hosts was refused: %s.", error)
            sock.close()
            return
        with self._changed:
            self._accepted[host] = _ready(sock)
            self._changed.notify_all()


def _read(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        if not (part := sock.recv(nbytes - len(data))):
            raise ConnectionError("the connection was closed")
        data += part
    return data


def _ready(sock: socket.socket) -> socket.socket:
    """For the exchange: small frames go at once, and a wait ends by what `Peers` sees."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
