"""Where the processes of an engine find each other before a load: Ray's key-value store, or that of jax.distributed.

tpu-inference 0.32.0 does not call jax.distributed.initialize: on a TPU, libtpu joins the processes, and JAX has no store. Its
workers on several hosts are Ray actors, though. Both stores are private interfaces; whatever goes wrong here ends in "no exchange".
"""

from __future__ import annotations

import collections
import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from vllm_maxtext_loader.checkpoint.exchange.rendezvous import NoExchangeError, Store

_NAMESPACE = "vllm_maxtext_loader"
_POLL_SECONDS = 0.05

_loads: collections.Counter[str] = collections.Counter()
"""Loads of this process, by what their keys begin with: a process may load more than once."""


class AddressedStore(Store, Protocol):
    """A store, and the address by which this host is reached by those that reach the store."""

    def address(self) -> str:
        """An IP address of this host."""
        ...


def find(decided: Mapping[str, Any] | None, digest: str) -> AddressedStore:
    """The store for the next load of this process, and of its peers.

    Args:
        decided: what travels in the ModelConfig (`options.SERVED`).
        digest: of the checkpoint.

    Raises:
        NoExchangeError: the processes have no store in common.
    """
    engine = (decided or {}).get("engine", "")
    try:
        if _is_ray_actor():
            return _RayStore(_prefix(f"{engine} {digest}"))
        from jax._src import distributed

        if distributed.global_state.client is not None:
            return _JaxStore(distributed.global_state, _prefix(digest))
    except Exception as error:
        raise NoExchangeError(
            f"the processes find no store in common ({type(error).__name__}: {error})"
        ) from error
    raise NoExchangeError(
        "the processes have no store in common: they are not Ray's, and jax.distributed was not initialized"
    )


def _prefix(scope: str) -> str:
    """What the keys of one load begin with; the same in every process that has made as many loads."""
    _loads[scope] += 1
    return f"{_NAMESPACE}/{scope}/{_loads[scope]}/"


class _JaxStore:
    """The key-value store of jax.distributed. Read from JAX 0.11.2, jax/_src/distributed.py: `global_state`, a `State`.

    Args:
        state: JAX's.
        prefix: of the load.
    """

    def __init__(self, state: Any, prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def set(self, key: str, value: str) -> None:
        """See `Store`."""
        with _translated():
            self._state.client.key_value_set(self._prefix + key, value)

    def get(self, key: str, seconds: float) -> str:
        """See `Store`."""
        with _translated():
            return self._state.client.blocking_key_value_get(self._prefix + key, int(seconds * 1000))

    def address(self) -> str:
        """The address from which the coordinator is reached."""
        host, _, port = self._state.coordinator_address.rpartition(":")
        return _address_towards(host.strip("[]"), int(port))


class _RayStore:
    """The key-value store of a Ray cluster. Read from Ray 2.60.0, ray/experimental/internal_kv.py.

    Args:
        prefix: of the load.
    """

    def __init__(self, prefix: str) -> None:
        from ray.experimental import internal_kv

        self._store, self._prefix = internal_kv, prefix

    def set(self, key: str, value: str) -> None:
        """See `Store`."""
        with _translated():
            self._store._internal_kv_put(self._prefix + key, value, namespace=_NAMESPACE)

    def get(self, key: str, seconds: float) -> str:
        """See `Store`."""
        deadline = time.monotonic() + seconds
        while True:
            with _translated():
                value = self._store._internal_kv_get(self._prefix + key, namespace=_NAMESPACE)
            if value is not None:
                return value.decode()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{key} is not there after {seconds:g} s")
            time.sleep(_POLL_SECONDS)

    def address(self) -> str:
        """The address by which the cluster knows this node."""
        import ray.util

        with _translated():
            return ray.util.get_node_ip_address()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Makes what a store raises a TimeoutError or a NoExchangeError."""
    try:
        yield
    except Exception as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(str(error)) from error
        raise NoExchangeError(f"the processes' store fails ({type(error).__name__}: {error})") from error


def _is_ray_actor() -> bool:
    """Whether this process is an actor of Ray's, as the workers of tpu-inference's Ray executors are."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def _address_towards(host: str, port: int) -> str:
    """This host's address on the way to another one. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
