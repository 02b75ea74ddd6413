"""Compiles the engine's programs for a TPU that is not there, with the TPU's own compiler (libtpu).

The engine is up on JAX's CPU backend (`dry_load.start`). Its reference kernels are taken back, its mesh is
exchanged for one over the devices of a topology, and its step, logits and vision encoder are lowered with
abstract arguments, at the largest shapes that tpu-inference itself would compile when it starts. Nothing runs.

This reaches into tpu-inference 0.32.0: runner/compilation_manager.py (shapes) and
models/vllm/vllm_model_wrapper.py (programs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vllm_maxtext_loader import versions
from vllm_maxtext_loader.cpu_kernels.install import tpu_kernels
from vllm_maxtext_loader.errors import EngineError
from vllm_maxtext_loader.tpu.tile_programs import LocalDevices, ShardKind

if TYPE_CHECKING:
    from vllm_maxtext_loader.tpu.dry_load import DryEngine


STEP, STEP_WITH_EMBEDDINGS, LOGITS = "step", "step with embeddings", "logits"
VISION_ENCODER = "vision encoder"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program. All bytes are of one device.

    Attributes:
        name: STEP (prefill and decode are one program), STEP_WITH_EMBEDDINGS (of a batch with images), LOGITS,
            or VISION_ENCODER.
        shape: what its inputs are padded to ({"num_tokens": 2048, "num_reqs": 128}).
        variants: programs of this kind that tpu-inference compiles at start, for smaller shapes.
        seconds: that the compiler took.
        argument_bytes, temporary_bytes, code_bytes: as XLA accounts for them.
        kv_cache_bytes: of the arguments, the KV cache.
        layouts: by parameter, the order of its axes in memory, slowest first; without those the program never
            reads.
    """

    name: str
    shape: Mapping[str, int]
    variants: int
    seconds: float
    argument_bytes: int
    temporary_bytes: int
    code_bytes: int
    kv_cache_bytes: int
    layouts: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An engine's programs for one topology.

    Attributes:
        topology: its name ("v6e:2x4").
        device_kind: what JAX calls its devices ("TPU v6 lite").
        programs: see `Program`.
        unread: parameters and buffers that no program reads.
    """

    topology: str
    device_kind: str
    programs: tuple[Program, ...]
    unread: frozenset[str]

    @property
    def relaid(self) -> dict[str, tuple[int, ...]]:
        """Parameters whose memory layout on the device is not row-major, with the order of their axes."""
        return {
            name: layout
            for program in self.programs
            for name, layout in program.layouts.items()
            if layout != tuple(range(len(layout)))
        }

    @property
    def program_bytes(self) -> int:
        """What programs take of a device: the code of all variants, and the temporaries of the one that needs
        most.

        Without the vision encoder, which tpu-inference does not compile as one program unless told to.
        """
        programs = [program for program in self.programs if program.name != VISION_ENCODER]
        code = sum(program.code_bytes * program.variants for program in programs)
        return code + max(program.temporary_bytes for program in programs)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that tpu-inference would compile for."""

    make: Callable[[], Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    shape: dict[str, int]


def compile_for(engine: DryEngine, topology: str) -> Compiled:
    """Compiles the programs of an engine for a topology.

    Args:
        engine: see `dry_load.start`; with as many devices as the tensor parallel size.
        topology: libtpu's name of it, e.g. "v6e:2x4".

    Raises:
        EngineError: an unknown topology or one with too few devices; or tpu-inference or the TPU's compiler
            refuses (its message is in ours).
    """
    if (reason := versions.unsupported()) is not None:
        raise EngineError(reason)
    devices = topology_devices(topology)
    mesh: Mesh = engine.runner.mesh
    if len(devices) < mesh.size:
        raise EngineError(f"{topology} has {len(devices)} devices, the engine needs {mesh.size}.")
    grid = np.array(devices[: mesh.size]).reshape(mesh.devices.shape)
    target = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    calls = _calls(engine.runner)
    programs: list[Program] = []
    # tpu-inference chooses block sizes by the first device's kind.
    with (
        tpu_kernels(),
        _exchanged(mesh, target),
        patch.object(jax, "devices", lambda *_, **__: list(devices)),
        # A compile-only client cannot read the persistent cache's entries back.
        _setting("jax_enable_compilation_cache", False),
        jax.sharding.use_abstract_mesh(target.abstract_mesh),
    ):
        jax.clear_caches()
        for name, variants in calls.items():
            largest = max(variants, key=lambda call: tuple(call.shape.values()))
            try:
                programs.append(_compile(name, largest, len(variants), target))
            except EngineError:
                raise
            except Exception as error:
                message = " ".join(str(error).split())[:1000]
                raise EngineError(
                    f"{topology}: the {name} program {largest.shape} cannot be compiled: "
                    f"{type(error).__name__}: {message}"
                ) from error
    jax.clear_caches()
    read = {parameter for program in programs for parameter in program.layouts}
    return Compiled(topology, devices[0].device_kind, tuple(programs), frozenset(set(engine.state) - read))


@dataclasses.dataclass(frozen=True)
class Update:
    """How devices take tiles into their shards of an array. All bytes are of one device.

    Attributes:
        temporary_bytes: besides the shard and the tile.
        aliased_bytes: of the shard's memory, what the program writes in place.
        layout: order of the shard's axes in memory, slowest first.
    """

    temporary_bytes: int
    aliased_bytes: int
    layout: tuple[int, ...]


def compile_update(topology: str, kind: ShardKind, tile: tuple[int, ...], devices: int) -> Update:
    """Compiles the program that fills the arrays of one kind (`tile_programs.LocalDevices.update`).

    Args:
        topology: libtpu's name.
        kind: of the arrays.
        tile: shape of what is sent at a time.
        devices: how many have a shard.

    Raises:
        EngineError: libtpu does not know the topology.
    """
    local = LocalDevices(topology_devices(topology)[:devices])
    with _setting("jax_enable_compilation_cache", False):
        compiled = local.update(kind, tile).lower(*local.update_arguments(kind, tile)).compile()
    memory: Any = compiled.memory_analysis()
    layout = compiled.output_formats[0].layout
    assert compiled.input_formats[0][0].layout == layout
    return Update(memory.temp_size_in_bytes, memory.alias_size_in_bytes, tuple(layout.major_to_minor))


def compile_allocation(topology: str, kinds: Sequence[ShardKind], devices: int) -> int:
    """Compiles the program that makes the arrays of a load.

    Returns:
        Bytes that it needs of a device besides the arrays.

    Raises:
        EngineError: libtpu does not know the topology.
    """
    local = LocalDevices(topology_devices(topology)[:devices])
    with _setting("jax_enable_compilation_cache", False):
        return local.allocation(kinds).lower().compile().memory_analysis().temp_size_in_bytes


def topology_devices(topology: str) -> list[Any]:
    """Devices of a topology that libtpu knows, without their machine.

    Raises:
        EngineError: it does not know the topology, or libtpu is not installed.
    """
    options: dict[str, Any] = {}
    if re.fullmatch(r"\w+:(1x1|2x4|1x1x1)", topology):
        # libtpu takes it that a host has four chips. A single chip, and eight of v5e or v6e, are one host,
        # too.
        lengths = [int(length) for length in topology.partition(":")[2].split("x")]
        options["chips_per_host_bounds"] = [*lengths, 1][:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
        return list(found.devices)
    except Exception as error:
        raise EngineError(
            f"{topology}: libtpu knows no such topology ({' '.join(str(error).split())[:300]}). "
            f"Examples: v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1."
        ) from error


def _calls(runner: Any) -> dict[str, list[_Call]]:
    """By program, the calls that tpu-inference would compile when it starts, recorded by its own code."""
    wrapper, manager = runner.model, runner.compilation_manager
    makers = {
        id(runner.model_fn): (STEP, wrapper.jit_step_func),
        id(runner.compute_logits_fn): (LOGITS, wrapper.jit_compute_logits_func),
    }
    calls: dict[str, list[_Call]] = {}

    def record(
        name: str, function: Any, *arguments: Any, call_kwargs: Mapping[str, Any] | None = None, **rest: Any
    ) -> None:
        if (found := makers.get(id(function))) is None:
            return
        program, make = found
        if program == STEP and name.endswith("with embeds"):
            program = STEP_WITH_EMBEDDINGS
        keywords = dict(call_kwargs or {})
        if "shared_attention_metadata" in rest:
            keywords["shared_attention_metadata"] = rest["shared_attention_metadata"]
        shape = {key: value for key, value in rest.items() if key in ("num_tokens", "num_reqs")}
        calls.setdefault(program, []).append(_Call(make, arguments, keywords, shape))

    with patch.object(manager, "_run_compilation", record):
        manager._precompile_backbone_text_only()
        if runner.is_multimodal_model:
            manager._precompile_backbone_with_inputs_embeds()
        manager._precompile_compute_logits()
    if runner.is_multimodal_model and (encoder := _encoder_call(runner)) is not None:
        calls[VISION_ENCODER] = [encoder]
    return calls


def _encoder_call(runner: Any) -> _Call | None:
    """The vision encoder as one program, for the fewest image tokens; None for a model that has no such form
    of it.

    tpu-inference 0.32 runs it operation by operation unless told otherwise. It reads the same weights.
    """
    from tpu_inference.runner.mm_encoder_jit_manager import MMEncoderJITManager
    from vllm.model_executor.models.interfaces import supports_encoder_cudagraph

    vllm_runner = runner.model.model
    if not supports_encoder_cudagraph(vllm_runner.vllm_model):
        return None
    # The templates of many images would take gigabytes of the host's memory.
    with (
        patch.object(
            runner.vllm_config.compilation_config, "encoder_cudagraph_max_vision_items_per_batch", 1
        ),
        patch.object(MMEncoderJITManager, "_generate_budgets", lambda _, fewest, most: [fewest]),
    ):
        manager = MMEncoderJITManager(runner.vllm_config, vllm_runner, vllm_runner.vllm_model, runner.state)
    encoder: Any = manager.model
    ((budget, template),) = manager.budget_templates.items()
    with _torchax():
        values = jax.tree.map(encoder._t2j_if_tensor, template)
    return _Call(lambda: encoder._jit_forward, (runner.state, values), {}, {"num_tokens": budget})


@contextlib.contextmanager
def _torchax() -> Iterator[None]:
    """As tpu-inference sets torchax up around the vision encoder."""
    import torchax
    from vllm.ir import enable_torch_wrap

    with torchax.default_env(), enable_torch_wrap(False):
        yield


def _compile(name: str, call: _Call, variants: int, mesh: Mesh) -> Program:
    """Lowers and compiles one program for the devices of `mesh`."""

    def abstract(value: Any) -> Any:
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            return value
        spec = value.sharding.spec if isinstance(value.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))

    arguments, keywords = jax.tree.map(abstract, (call.arguments, call.keywords))
    with _torchax() if name == VISION_ENCODER else contextlib.nullcontext():
        lowered = call.make().lower(*arguments, **keywords)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    formats = compiled.input_formats[0]
    caches = arguments[1] if isinstance(arguments[1], list) else []
    return Program(
        name=name,
        shape=call.shape,
        variants=variants,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        kv_cache_bytes=sum(
            math.prod(cache.sharding.shard_shape(cache.shape)) * cache.dtype.itemsize for cache in caches
        ),
        layouts={
            parameter: tuple(form.layout.major_to_minor)
            for parameter, form in formats[0].items()
            if form is not None and form.layout is not None
        },
    )


@contextlib.contextmanager
def _exchanged(old: Mesh, new: Mesh) -> Iterator[None]:
    """Puts `new` in the place of `old` wherever an object of this process holds it, alone or in a sharding.

    tpu-inference hands its mesh to every layer. There is no one place to change it.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for holder in _attributes():
        for key, value in list(holder.items()):
            # By type(): isinstance() would make lazy modules' attributes import what they stand for.
            if type(value) is Mesh and value == old:
                replacement: Any = new
            elif type(value) is NamedSharding and value.mesh == old:
                replacement = NamedSharding(new, value.spec)
            else:
                continue
            changed.append((holder, key, value))
            holder[key] = replacement
    try:
        yield
    finally:
        for holder, key, value in changed:
            holder[key] = value


def _attributes() -> Iterator[dict[str, Any]]:
    """The attributes of every object that the garbage collector knows."""
    seen: set[int] = set()
    for thing in gc.get_objects():
        try:
            holder = object.__getattribute__(thing, "__dict__")
        except (AttributeError, TypeError):
            continue
        if type(holder) is dict and id(holder) not in seen:
            seen.add(id(holder))
            yield holder


@contextlib.contextmanager
def _setting(name: str, value: Any) -> Iterator[None]:
    """A setting of JAX's, for a while."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)
