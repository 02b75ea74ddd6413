"""`vllm-maxtext fit`: whether a checkpoint fits a slice, with how much context, before anybody rents it.

From metadata only. First by arithmetic (`tpu_memory`); then, where asked, by the TPU's own compiler
(`tpu/measure.py`). The engine fills `gpu_memory_utilization` of the memory with weights and KV cache.
Programs live in the rest.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import TYPE_CHECKING, Any

from vllm_maxtext_loader.errors import EngineError, OptionError
from vllm_maxtext_loader.options import GIB
from vllm_maxtext_loader.tools import serve_defaults, slices
from vllm_maxtext_loader.tools.kv_cache import KVCache, kv_cache
from vllm_maxtext_loader.tools.text_model import text_model
from vllm_maxtext_loader.tools.tpu_memory import DeviceArray, device_arrays, rotary_bytes

if TYPE_CHECKING:
    from vllm_maxtext_loader.api import Checkpoint

_KV_ITEMSIZES = {"auto": 2, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}

_ROUND_LENGTH = 1024
"""A proposed --max-model-len is a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user wants to serve with; None and False are vLLM's defaults."""

    tensor_parallel_size: int | None = None
    expert_parallel: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = serve_defaults.UTILIZATION
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in _KV_ITEMSIZES:
            raise OptionError(f"--kv-cache-dtype {self.kv_cache_dtype}: known: {', '.join(_KV_ITEMSIZES)}.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise OptionError(
                f"--gpu-memory-utilization {self.gpu_memory_utilization:g}: expected more than 0, at most 1."
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """A checkpoint on a slice. All bytes are of one chip.

    Attributes:
        topology, chips: the slice.
        tensor_parallel_size, expert_parallel: how weights are spread.
        hbm_bytes: memory.
        weight_bytes: weights with padding and rotary tables.
        padding_bytes, rotary_bytes: of these.
        program_bytes: code and temporaries of programs; None until they were compiled.
        kv_bytes_per_token: of the KV cache, in a request of `max_model_len` tokens.
        kv_tokens: that the KV cache holds.
        max_model_len: length to serve with: as asked where that fits, else the longest that fits; 0 where
            none does.
        max_num_seqs: requests of that length at once, at most as many as asked for.
        fits: whether an engine started as asked would start.
        reason: why it would not; "" where it would.
        line: command that would start one, or None.
    """

    topology: str
    chips: int
    tensor_parallel_size: int
    expert_parallel: bool
    hbm_bytes: int
    weight_bytes: int
    padding_bytes: int
    program_bytes: int | None
    kv_bytes_per_token: int
    kv_tokens: int
    max_model_len: int
    max_num_seqs: int
    fits: bool
    reason: str
    rotary_bytes: int = 0
    line: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        hidden = ("rotary_bytes", "line")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in hidden}


class Fitter:
    """Answers for one checkpoint.

    Args:
        checkpoint: whose metadata has been read.
        requested: its path as the user wrote it.
        request: what to serve with.
        step: the training step that the user asked for; None for the newest.
    """

    def __init__(
        self, checkpoint: Checkpoint, requested: str, request: Request, step: int | None = None
    ) -> None:
        self.request, self.requested = request, requested
        named = {"step": step, "model_name": checkpoint.model_name}
        self._extra_config = {key: value for key, value in named.items() if value is not None}
        self._model = text_model(checkpoint)

    def row(self, name: str) -> Row:
        """A slice, by its name, as asked; with the command that would work.

        Raises:
            OptionError: there is no such slice.
        """
        chosen = slices.parse(name)
        row = self._as_asked(chosen, self.request.expert_parallel)
        options = [row]
        if self._model.has_experts and not row.expert_parallel and row.tensor_parallel_size > 1:
            spread = self._as_asked(chosen, True)
            if spread.max_model_len and (not row.fits or spread.weight_bytes < row.weight_bytes):
                options.insert(0, spread)
        working = [option for option in options if option.max_model_len]
        # What fits as asked comes before what takes less memory.
        best = next((option for option in working if option.fits), working[0] if working else None)
        if best is not None:
            return dataclasses.replace(row, line=self._line(best))
        return dataclasses.replace(row, line=self._elsewhere(chosen))

    def _as_asked(self, chosen: slices.Slice, expert_parallel: bool) -> Row:
        request = self.request
        devices = request.tensor_parallel_size or chosen.devices
        per_chip = min(chosen.devices_per_chip, devices)
        wanted = request.max_model_len or self._model.max_position_embeddings
        row = Row(
            topology=chosen.name,
            chips=chosen.chips,
            tensor_parallel_size=devices,
            expert_parallel=expert_parallel,
            hbm_bytes=chosen.hbm_bytes,
            weight_bytes=0,
            padding_bytes=0,
            program_bytes=None,
            kv_bytes_per_token=0,
            kv_tokens=0,
            max_model_len=0,
            max_num_seqs=0,
            fits=False,
            reason="",
        )
        try:
            if devices > chosen.devices:
                raise EngineError(
                    f"--tensor-parallel-size {devices}: {chosen.name} has {chosen.devices} devices"
                )
            self._model.check(devices, expert_parallel=expert_parallel, sparse_core=chosen.has_sparse_core)
            arrays = self._arrays(devices, expert_parallel)
            cache = self._cache(devices, wanted)
        except EngineError as error:
            return dataclasses.replace(row, reason=str(error))
        rotary = rotary_bytes(self._model)
        weights = sum(array.nbytes for array in arrays) + rotary
        row = dataclasses.replace(
            row,
            weight_bytes=weights * per_chip,
            padding_bytes=sum(array.padding for array in arrays) * per_chip,
            rotary_bytes=rotary * per_chip,
            kv_bytes_per_token=cache.bytes_per_token * per_chip // devices,
        )
        return self._with_cache(row, chosen, wanted)

    def _with_cache(self, row: Row, chosen: slices.Slice, wanted: int) -> Row:
        """Fills in what the KV cache holds, and the verdict."""
        devices = row.tensor_parallel_size
        per_chip = min(chosen.devices_per_chip, devices)
        # As tpu-inference computes it (worker/tpu_worker.py, determine_available_memory).
        limit = devices * (chosen.hbm_bytes // chosen.devices_per_chip)
        used = devices * (row.weight_bytes // per_chip)
        left = int(limit * self.request.gpu_memory_utilization - used)
        usable = chosen.hbm_bytes * self.request.gpu_memory_utilization
        if left <= 0:
            return dataclasses.replace(
                row,
                reason=f"out of memory: weights take {_gib(row.weight_bytes)} of each chip, "
                f"{_gib(usable)} of {_gib(chosen.hbm_bytes)} may be used "
                f"(--gpu-memory-utilization {self.request.gpu_memory_utilization:g})",
            )
        length, reason = wanted, ""
        if not (cache := self._cache(devices, wanted)).holds(left, wanted):
            needed = cache.request_bytes(wanted) * per_chip / devices
            length = self._longest(devices, left, wanted)
            best = f"the longest that fits has {length:,}" if length else "none fits"
            reason = (
                f"KV cache: one request of {wanted:,} tokens needs {_gib(needed)} of each chip, "
                f"{_gib(left * per_chip / devices)} are left next to {_gib(row.weight_bytes)} of weights; "
                f"{best}"
            )
        cache = self._cache(devices, length or wanted)
        tokens = cache.tokens(left)
        most = self.request.max_num_seqs or serve_defaults.SEQUENCES
        return dataclasses.replace(
            row,
            kv_bytes_per_token=cache.bytes_per_token * per_chip // devices,
            kv_tokens=tokens,
            max_model_len=length,
            max_num_seqs=min(most, tokens // length) if length else 0,
            fits=not reason,
            reason=reason,
        )

    def _longest(self, devices: int, left: int, most: int) -> int:
        """The longest request that fits and is shorter than `most`, as a multiple of _ROUND_LENGTH; 0: none is."""
        # A shorter length makes smaller blocks, which hold what larger ones hold.
        low, high = 0, -(-most // _ROUND_LENGTH)
        while high - low > 1:
            middle = (low + high) // 2
            length = middle * _ROUND_LENGTH
            if self._cache(devices, length).holds(left, length):
                low = middle
            else:
                high = middle
        return low * _ROUND_LENGTH

    def engine_arguments(self, row: Row) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs for the engine of a row."""
        request = self.request
        return {
            "tensor_parallel_size": row.tensor_parallel_size,
            "enable_expert_parallel": row.expert_parallel,
            "max_model_len": row.max_model_len,
            "max_num_seqs": request.max_num_seqs or serve_defaults.SEQUENCES,
            "gpu_memory_utilization": request.gpu_memory_utilization,
            "kv_cache_dtype": request.kv_cache_dtype,
        }

    def with_programs(self, row: Row, measured: dict[str, Any]) -> Row:
        """A row with the compiler's numbers.

        Args:
            row: by arithmetic.
            measured: what `tpu/measure.py` answers.
        """
        if "error" in measured:
            return dataclasses.replace(row, fits=False, reason=measured["error"], line=None)
        per_chip = min(slices.parse(row.topology).devices_per_chip, row.tensor_parallel_size)
        program = measured["program_bytes"] * per_chip
        rest = row.hbm_bytes * (1 - self.request.gpu_memory_utilization)
        row = dataclasses.replace(
            row,
            program_bytes=program,
            weight_bytes=measured["weight_bytes"] * per_chip,
            kv_tokens=measured["kv_tokens"],
        )
        if program <= rest:
            return row
        fitting = int((1 - program / row.hbm_bytes) * 100) / 100
        return dataclasses.replace(
            row,
            fits=False,
            reason=f"programs need {_gib(program)} of each chip, {_gib(rest)} are left for them: "
            f"--gpu-memory-utilization {fitting:g}",
        )

    def _arrays(self, devices: int, expert_parallel: bool) -> list[DeviceArray]:
        return device_arrays(self._model, devices, expert_parallel=expert_parallel)

    def _cache(self, devices: int, max_model_len: int) -> KVCache:
        return kv_cache(
            self._model,
            devices,
            max_model_len=max_model_len,
            max_num_seqs=self.request.max_num_seqs or serve_defaults.SEQUENCES,
            itemsize=_KV_ITEMSIZES[self.request.kv_cache_dtype],
        )

    def _elsewhere(self, chosen: slices.Slice) -> str | None:
        """The command for another slice of the same generation that would do, after its name.

        The smallest larger one, for memory; else the largest smaller one, for heads that cannot be spread so wide.
        """
        if self.request.tensor_parallel_size is not None:
            return None
        for name in (*slices.larger(chosen), *slices.smaller(chosen)):
            row = self._as_asked(slices.parse(name), self.request.expert_parallel)
            if row.max_model_len:
                return f"{self._line(row)}  # on {name}"
        return None

    def _line(self, row: Row) -> str:
        """The command that serves like this."""
        request = self.request
        words = ["vllm", "serve", self.requested, "--load-format", "maxtext", "--tokenizer", "TOKENIZER"]
        words += ["--tensor-parallel-size", str(row.tensor_parallel_size)]
        if row.expert_parallel:
            words.append("--enable-expert-parallel")
        if request.max_model_len is not None or not row.fits:
            words += ["--max-model-len", str(row.max_model_len)]
        if request.max_num_seqs is not None:
            words += ["--max-num-seqs", str(request.max_num_seqs)]
        if request.gpu_memory_utilization != serve_defaults.UTILIZATION:
            words += ["--gpu-memory-utilization", f"{request.gpu_memory_utilization:g}"]
        if request.kv_cache_dtype != "auto":
            words += ["--kv-cache-dtype", request.kv_cache_dtype]
        if self._extra_config:
            words += ["--model-loader-extra-config", json.dumps(self._extra_config)]
        return shlex.join(words)


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"
