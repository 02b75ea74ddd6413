"""An engine whose weights have shape, dtype and sharding, but no values: for compiling, not for answering.

A dry load takes the steps of a load: the same plan, the same refusals, the same `find_weights`. It reads no
array data. What is placed directly is memory that is never touched; the rest (norms, scalars, the vision tower)
is zeros.

Not a mode of `vllm serve`: only `start` turns it on, in its own process, and what it returns has no scheduler
that could answer. Written against vLLM 0.32.0 v1/engine/core.py, `_initialize_kv_caches`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from vllm_maxtext_loader import versions
from vllm_maxtext_loader.api import numpy_dtype, to_torch
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.options import LOAD_FORMAT

if TYPE_CHECKING:
    import jax
    import torch
    from jax.sharding import NamedSharding

    from vllm_maxtext_loader.checkpoint.reader import DecodedRegion
    from vllm_maxtext_loader.conversion.plan import Plan


@dataclasses.dataclass
class DryLoad:
    """A dry load, for the loader that carries it out.

    Attributes:
        weights: parameters of the model that a load would have filled from the checkpoint; the loader adds
            them.
    """

    weights: set[str] = dataclasses.field(default_factory=set)


_current: ContextVar[DryLoad | None] = ContextVar("_current", default=None)


def current() -> DryLoad | None:
    """The dry load that is going on; None in a load that is none."""
    return _current.get()


def no_regions(**_: Any) -> Iterator[DecodedRegion]:
    """In place of `Checkpoint.iter_regions`: reads nothing."""
    return iter(())


def zeros(plan: Plan, given: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The plan's tensors that are not `given`, as zeros; they take no memory until they are copied."""
    for name, target in plan.targets.items():
        if name not in given:
            yield name, to_torch(np.zeros(target.shape, numpy_dtype(dtype)))


@dataclasses.dataclass(frozen=True)
class DryEngine:
    """vLLM's executor with its worker, without an engine core.

    Attributes:
        config: vLLM's configuration (VllmConfig).
        runner: tpu-inference's model runner (TPUModelRunner).
        kv_cache_config: what vLLM makes of the memory that is left (KVCacheConfig).
        weights: names in `state` of what a load would have filled from the checkpoint.
    """

    config: Any
    runner: Any
    kv_cache_config: Any
    weights: frozenset[str]

    @property
    def state(self) -> dict[str, jax.Array]:
        """Every parameter and buffer of the model."""
        return self.runner.state

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds, as vLLM reports them."""
        return self.config.cache_config.kv_cache_size_tokens


def start(model: str, *, hbm_bytes: int, used_bytes: int | None = None, **engine_arguments: Any) -> DryEngine:
    """Brings an engine up on JAX's CPU backend, without weights.

    Args:
        model: the checkpoint, or a Hugging Face configuration with the checkpoint in
            `model_loader_extra_config`.
        hbm_bytes: memory of each device that the engine is to believe in.
        used_bytes: how much of it weights take; None counts the arrays' bytes.
        engine_arguments: of vLLM's EngineArgs.

    Raises:
        MaxTextLoadError: what a load of this checkpoint would raise.
        EngineError: this vLLM or tpu-inference is not supported.
    """
    if (reason := versions.unsupported()) is not None:
        raise EngineError(reason)
    from tpu_inference.runner import kv_cache
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    arguments = {"skip_tokenizer_init": True, "distributed_executor_backend": "uni", **engine_arguments}
    config = EngineArgs(model=model, load_format=LOAD_FORMAT, **arguments).create_engine_config()
    with _dry_load() as load:
        executor: Any = Executor.get_class(config)(config)
    runner = executor.driver_worker.worker.model_runner
    used = bytes_per_device(runner.state) if used_bytes is None else used_bytes
    # An engine core that was never initialized: it has what sizes the KV cache, and no scheduler.
    core: Any = object.__new__(EngineCore)
    core.model_executor = executor
    with (
        patch("tpu_inference.utils.hbm_usage_bytes", lambda devices: [(used, hbm_bytes)] * len(devices)),
        # The KV cache would fill the host's memory with zeros.
        patch.object(kv_cache, "_get_kv_cache_allocator", _abstract_allocator),
    ):
        kv_cache_config = core._initialize_kv_caches(config)
    weights = frozenset(f"vllm_model.{name}" for name in load.weights)
    return DryEngine(config, runner, kv_cache_config, weights)


@contextlib.contextmanager
def _dry_load() -> Iterator[DryLoad]:
    load = DryLoad()
    token = _current.set(load)
    try:
        yield load
    finally:
        _current.reset(token)


def place_untouched(values: Any, sharding: NamedSharding) -> jax.Array:
    """An array like `values` with a copy on every device, none of which is ever written."""
    import jax

    from vllm_maxtext_loader.tpu.shards import HostShard

    shards = [
        HostShard(sharding.shard_shape(values.shape), values.dtype, device).array()
        for device in sharding.addressable_devices
    ]
    return jax.make_array_from_single_device_arrays(values.shape, sharding, shards)


def bytes_per_device(state: Mapping[str, Any], but: Mapping[str, Any] | None = None) -> int:
    """Bytes that the fullest device holds of some arrays.

    Args:
        state: arrays by name. Memory under two names (a tied output head) counts once.
        but: arrays whose memory does not count.
    """
    seen = {_memory(shard) for array in (but or {}).values() for shard in array.addressable_shards}
    held: dict[Any, int] = {}
    for array in state.values():
        for shard in array.addressable_shards:
            if _memory(shard) not in seen:
                seen.add(_memory(shard))
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)


def _memory(shard: Any) -> int:
    """Where a shard lies. Two arrays may share it."""
    return shard.data.unsafe_buffer_pointer()


def _abstract_allocator(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """In place of tpu-inference's `_get_kv_cache_allocator`: arrays without memory."""
    import jax

    return lambda: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
