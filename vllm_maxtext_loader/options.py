"""The keys of `--model-loader-extra-config` that `--load-format maxtext` understands."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_maxtext_loader.errors import OptionError

LOAD_FORMAT = "maxtext"
"""What `--load-format` is for this loader."""

TRAVELLING = "_maxtext_config_dir"
"""Attribute of a vLLM ModelConfig with the files of configuration in its directory (`engine.config_dir`)."""

SERVED = "_maxtext_served"
"""Attribute of a vLLM ModelConfig with what the engine starts with: {"path": the checkpoint as the user gave it, "items": where
it was found, "step": its step or None, "model": ModelConfig.model, "digest": of the checkpoint, "versions": by distribution,
"engine": a random name of this start}."""

GIB = 1 << 30

DIRECT_VARIABLE = "VLLM_MAXTEXT_DIRECT"
"""Environment variable, for tpu-inference. 0: load through Hugging Face tensors and `model.load_weights` there, too. "device": fill
arrays by operations of the device even where its memory is the host's, so that what an accelerator does can be tested without one."""

EXCHANGE_VARIABLE = "VLLM_MAXTEXT_EXCHANGE"
"""Environment variable. 0: of several hosts, each reads all it needs from the bucket itself."""

VARIABLES = (
    DIRECT_VARIABLE,
    EXCHANGE_VARIABLE,
    "VLLM_MAXTEXT_CPU_KERNELS",
    "VLLM_MAXTEXT_DEBUG",
    "VLLM_MAXTEXT_TIMEOUT",
)
"""All environment variables of this package. vLLM warns of a VLLM_… that it does not know; `plugin` makes these known."""


def is_off(variable: str) -> bool:
    """Whether an environment variable turns off what is on without it."""
    return os.environ.get(variable, "1").strip().lower() in ("0", "false")


@dataclasses.dataclass(frozen=True)
class Options:
    """Validated loader options.

    Attributes:
        checkpoint: path or gs:// URL of the checkpoint; None when `--model` itself names it.
        step: training step to load from a run directory; None means the newest committed one.
        model_name: MaxText model name (`gemma4-26b`, `qwen3-8b`, …) that picks the preset of what shapes cannot tell;
            None means chosen by shape.
        fold_expert_scales: multiply `per_expert_scale` into the experts' `down_proj`.
            "auto" folds where the engine does not apply the scale itself (tpu-inference).
        concurrent_gib: bytes of array data in flight at a time, in GiB; None means chosen by size
            (`read_budget`).
        checksums: file that `vllm-maxtext checksum` wrote; array data is compared with it while streaming.
    """

    checkpoint: str | None = None
    step: int | None = None
    model_name: str | None = None
    fold_expert_scales: bool | Literal["auto"] = "auto"
    concurrent_gib: float | None = None
    checksums: str | None = None

    def given(self) -> dict[str, Any]:
        """The options that are not the default, as `parse` takes them."""
        default = Options()
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != getattr(default, field.name)
        }

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | str | None) -> Options:
        """Validates the dictionary, or its JSON, that the user gave.

        Raises:
            OptionError: not a JSON object, an unknown key (with the list of known ones), a value of the wrong type, or a
                `concurrent_gib` beyond this machine's memory.
        """
        config = _json_object(extra_config) if isinstance(extra_config, str) else extra_config or {}
        if not isinstance(config, Mapping):
            raise OptionError(
                f"--model-loader-extra-config must be a dictionary or a JSON object, found {extra_config!r}."
            )
        config = dict(config)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(config) - set(known))
        if unknown:
            hints = [match for key in unknown for match in difflib.get_close_matches(str(key), known, n=1)]
            meant = f" Did you mean {', '.join(hints)}?" if hints else ""
            raise OptionError(
                f"--model-loader-extra-config: unknown key {', '.join(map(repr, unknown))} for --load-format "
                f"maxtext.{meant} Known keys: {', '.join(known)}."
            )
        for key, check, wanted in (
            ("checkpoint", lambda v: isinstance(v, str) and v != "", "a path or gs:// URL"),
            ("step", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "an integer >= 0"),
            ("model_name", lambda v: isinstance(v, str) and v != "", "a MaxText model name"),
            ("fold_expert_scales", lambda v: v == "auto" or isinstance(v, bool), '"auto", true or false'),
            (
                "concurrent_gib",
                lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < float("inf"),
                "a number of GiB > 0",
            ),
            ("checksums", lambda v: isinstance(v, str) and v != "", "a path"),
        ):
            if config.get(key) is not None and not check(config[key]):
                raise OptionError(
                    f"--model-loader-extra-config: {key} must be {wanted}, found {config[key]!r}."
                )
        options = cls(**{key: value for key, value in config.items() if value is not None})
        if options.concurrent_gib is not None:
            _budget(options.concurrent_gib)
        return options


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f"--model-loader-extra-config is not JSON ({error}): {text!r}.") from error


def read_budget(
    concurrent_gib: float | None, nbytes: int, chunk_nbytes: int, cores: int, *, remote: bool = False
) -> int:
    """Bytes of array data in flight at a time: decoded, and what is held before it is in its place.

    Args:
        concurrent_gib: what the user asked for, in GiB; None means a sixteenth of the checkpoint for decoded regions, so
            that they are small beside the weights, but at least 64 MiB and at most 2 GiB, and as much again for what TensorStore
            reads from a disk and decodes meanwhile; and more than that, up to an eighth of the checkpoint, where stored chunks are
            so large that cores would have none to decode.
        nbytes: decoded size of all that will be read.
        chunk_nbytes: decoded size of the largest stored chunk. One chunk is decoded by one core; a chunk of the
            published 26B-A4B's experts, converted with MaxText's default of 16 devices, has 793 MB.
        cores: that decode.
        remote: whether the checkpoint is in a bucket. In TensorStore's place are the bytes that are under way: three sixteenths
            of the checkpoint, but at least 192 MiB and at most 1 GiB. Both together are at most an eighth of a checkpoint of
            16 GiB or more.

    Raises:
        OptionError: `concurrent_gib` is not positive, or more than this machine's memory.
    """
    if concurrent_gib is not None:
        return _budget(concurrent_gib)
    decoded = min(max(nbytes // 16, GIB // 16), 2 * GIB)
    if not remote:
        return max(2 * decoded, min(cores * chunk_nbytes, nbytes // 8))
    stored = min(max(3 * nbytes // 16, _LEAST_STORED), _MOST_STORED)
    return stored + max(decoded, min(cores * chunk_nbytes, nbytes // 8 - stored))


_MOST_STORED = GIB
"""Stored bytes in flight at most: 128 requests of 8 MiB."""

_LEAST_STORED = 192 << 20


def fetch_window(budget: int) -> int:
    """Bytes of a read budget that stored bytes may take, where they come from a bucket; the rest is for decoded ones.

    What was requested and has not arrived counts, although it takes no memory yet: three quarters of the budget, and at
    most a quarter of the memory that is free.
    """
    return min(budget * 3 // 4, _MOST_STORED, available_nbytes() // 4)


def _budget(concurrent_gib: float) -> int:
    """The read budget that a user asks for, in bytes.

    Raises:
        OptionError: it is not positive, or more than this machine's memory.
    """
    if not concurrent_gib > 0:
        raise OptionError(f"concurrent_gib must be a number of GiB > 0, found {concurrent_gib!r}.")
    memory = memory_nbytes()
    if concurrent_gib * GIB > memory:
        raise OptionError(
            f"concurrent_gib is {concurrent_gib:g}, but this machine (or container) has {memory / GIB:.1f} GiB of memory. "
            "Leave it out: the read budget is then chosen by the checkpoint's size, 2 GiB or an eighth of it at most."
        )
    return int(concurrent_gib * GIB)


def memory_nbytes() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # cgroup v2 and v1. In a container its own group is mounted at the root; "max" means no limit.
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return memory


def available_nbytes() -> int:
    """Bytes of memory that are free: the machine's, or what its container's limit leaves where that is less."""
    available = memory_nbytes()
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = min(available, int(fields["MemAvailable"].split()[0]) << 10)
    except (OSError, ValueError, KeyError):
        pass
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        # The page cache counts as used, and is given back.
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used = int((cgroup / "memory.current").read_text()) - int(statistics["inactive_file"])
        available = min(available, max(0, limit - used))
    except (OSError, ValueError, KeyError):
        pass
    return available
