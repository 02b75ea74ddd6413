"""What in a tree is not a plain weight: state of the trainer, LoRA adapters, quantized weights.

All of it is recognized by the names and dtypes that MaxText, Tunix, flax, AQT and Qwix write, so that a
refusal says what the checkpoint is. State is skipped; adapters and quantized weights are refused. Optimizer
state never counts: it may be quantized where the weights are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_maxtext_loader.checkpoint.storage.path import Location
from vllm_maxtext_loader.errors import (
    MaxTextLoadError,
    UnknownLeafError,
    UnknownModelError,
    UnsupportedDtypeError,
)

if TYPE_CHECKING:
    from vllm_maxtext_loader.checkpoint.tree import Leaf

Key = tuple[str, ...]

RANDOM = "random number state"
OPTIMIZER = "optimizer state"
STEP = "training step"

_RANDOM_NAME = re.compile(r"rngs?|.*_rngs?|dropout")
"""MaxText 0.2.5 skips "rngs" and "*_rngs" when it converts (`extract_nnx_weights`), "rng" when it restores;
its trainer's state is "rngs" and "dropout" (`train_state_nnx._NNX_RNG_STATE_KEYS`)."""

_OPTIMIZER_NAME = re.compile(r"(?:.+_)?opt(?:imizer)?_state|optimizer|mu|nu")
_AUXILIARY = "nnx_aux"

_STATE_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    # flax's collections and variables, as MaxText 0.2.5 names them (kvcache.py, `sow` of its layers).
    (re.compile(r"cache|cached_.+|cache_(?:prefill|ar)_.+|KVCache_\d+"), "key and value cache"),
    (
        re.compile(
            r"intermediates|moe_lb_loss|moe_bias_updates|hidden_states|max_logits"
            r"|activation_(?:mean|stdev|fraction_zero)|out_projection_activations"
        ),
        "intermediate values",
    ),
    (re.compile(r"batch_stats"), "batch statistics"),
    (
        re.compile(r"quant_stats|_overwrite_with_gradient|\w+_amax_history"),
        "statistics of quantized training",
    ),
)

_LORA = re.compile(r"(?:.*[_.])?lora(?:[_.].*)?")
_AQT = re.compile(r"qrhs|Aqt(?:DotGeneral|Einsum)_\d+")
_KERNELS = frozenset({"kernel", "wi", "wi_0", "wi_1", "wo"})
_NARROW = re.compile(r"u?int[248]|float[4-8]_.+")
"""dtypes that only quantized values have; wider integers are counters and the like."""


def plain(key: Key) -> Key:
    """`key` without the "value" that NNX puts below each variable."""
    return key[:-1] if key[-1] == "value" and len(key) > 1 else key


def random_streams(keys: Iterable[Key]) -> frozenset[Key]:
    """Paths of NNX's random number streams, whatever they are called: each has a `count` and a `key`."""
    inside: dict[Key, set[str]] = {}
    for key in map(plain, keys):
        inside.setdefault(key[:-1], set()).add(key[-1])
    return frozenset(path for path, names in inside.items() if names == {"count", "key"})


def state_reason(key: Key, prefix: Key | None = None, streams: Collection[Key] = ()) -> str | None:
    """Why an array is no weight of a model; None where its names do not tell.

    Args:
        key: its names.
        prefix: what precedes the model's leaves; None where that is not known.
        streams: see `random_streams`.
    """
    path = plain(key)
    if path[:-1] in streams or any(_RANDOM_NAME.fullmatch(part) for part in path):
        return RANDOM
    inside = prefix is not None and path[: len(prefix)] == prefix
    # "mu" may be what a model calls a weight; outside it is Adam's.
    outer = path[len(prefix or ()) :][:1] if inside else path
    if any(_OPTIMIZER_NAME.fullmatch(part) for part in outer):
        return STEP if path[-2:] == ("optimizer", "step") else OPTIMIZER
    if path in (("step",), ("training_step",)):
        return STEP
    if path[0] == _AUXILIARY:
        return "other state of the trainer"
    for names, reason in _STATE_NAMES:
        if any(names.fullmatch(part) for part in path):
            return reason
    return None


def refuse_foreign(keys: Sequence[Key], prefix: Key | None, items: Location) -> None:
    """Refuses weights that are quantized, and adapters without a base, by their names.

    Args:
        keys: all arrays of the tree.
        prefix: what precedes the model's leaves; None where no embedding was found.
        items: where they are.

    Raises:
        UnsupportedDtypeError: the weights are quantized.
        UnknownModelError: the tree holds LoRA adapters without a base model.
    """
    streams = random_streams(keys)
    candidates = [key for key in keys if state_reason(key, prefix, streams) is None]
    adapters = [key for key in candidates if _is_adapter(key)]
    quantized = [key for key in candidates if "qvalue" in key]
    if prefix is not None:
        # AQT's values are in a collection next to the weights; where no kernel is gone, nothing is missing.
        kernels = {plain(key)[:-1] for key in candidates if _is_kernel(key, prefix)}
        quantized = [
            key for key in quantized if key[: len(prefix)] == prefix or _lacks_kernel(key, prefix, kernels)
        ]
    if quantized:
        also = f" (with {len(adapters)} LoRA leaves)" if adapters else ""
        quantizer = "AQT" if _module_of_aqt(quantized[0]) is not None else "Qwix"
        raise UnsupportedDtypeError(
            f"{items}: is quantized by {quantizer}: {len(quantized)} weights{also} are stored as quantized "
            f"values and scales, such as {'.'.join(quantized[0])}. {_LOAD_UNQUANTIZED}"
        )
    if adapters and prefix is None:
        raise UnknownModelError(_adapters_only(adapters, len(candidates) - len(adapters), items))


_LOAD_UNQUANTIZED = (
    "Quantized checkpoints are not supported: load the unquantized checkpoint that it was made from, or "
    "save one (MaxText's `quantization` and `use_qwix_quantization` unset; not what "
    "`save_quantized_params_path` names)."
)


def is_foreign(key: Key) -> bool:
    """Whether an array that is not state belongs to an adapter or to a quantized weight."""
    return _is_adapter(key) or "qvalue" in key


def _is_adapter(key: Key) -> bool:
    return any(_LORA.fullmatch(part) for part in key)


def _is_kernel(key: Key, prefix: Key) -> bool:
    return plain(key)[-1] in _KERNELS and key[: len(prefix)] == prefix


def _lacks_kernel(key: Key, prefix: Key, kernels: Collection[Key]) -> bool:
    """Whether a value outside the model is AQT's, and its module has no plain kernel."""
    module = _module_of_aqt(key)
    return module is not None and (*prefix, *module) not in kernels


def _module_of_aqt(key: Key) -> Key | None:
    """Path, inside the model, of the module whose kernel AQT has quantized; None for other arrays."""
    place = next((place for place, part in enumerate(key) if _AQT.fullmatch(part)), None)
    if place is None:
        return None
    return key[key.index("aqt") + 1 : place] if "aqt" in key[:place] else key[:place]


def _adapters_only(adapters: Sequence[Key], others: int, items: Location) -> str:
    recorded = _recorded_lora(items)
    rank, alpha = recorded.get("lora_rank"), recorded.get("lora_alpha")
    facts = ", ".join(
        f"{name} {value:g}"
        for name, value in (("rank", rank), ("alpha", alpha))
        if isinstance(value, int | float)
    )
    names = " and ".join(dict.fromkeys(plain(key)[-1] for key in adapters[:8]))
    alone = "only" if not others else f"and {others} other leaves"
    return (
        f"{items}: holds LoRA adapters {alone} ({len(adapters)} leaves such as {'.'.join(adapters[0])}; "
        f"{names}; {facts or 'rank and alpha are not recorded'}), no base weights. Merge them into "
        "their base with MaxText: `python -m maxtext.checkpoint_conversion.to_huggingface "
        f"src/maxtext/configs/base.yml model_name=… load_parameters_path=BASE lora.lora_restore_path={items} "
        f"lora.lora_rank={_value(rank)} lora.lora_alpha={_value(alpha)} base_output_directory=OUT` writes a "
        "Hugging Face directory; serve that, without this load format."
    )


def _value(number: object) -> str:
    return f"{number:g}" if isinstance(number, int | float) else "…"


def _recorded_lora(items: Location) -> Mapping[str, object]:
    """MaxText's record of the adapters (`custom_metadata.lora`), for a message; empty where there is none."""
    for directory in (items, items.parent):
        if directory is None:
            continue
        try:
            custom = json.loads((directory / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]["lora"]
        except (OSError, MaxTextLoadError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(custom, dict):
            return custom
    return {}


def refuse_adapters(leaves: Iterable[Leaf], where: str) -> None:
    """Refuses LoRA leaves among the base weights, which they change only when they are merged.

    Raises:
        UnknownLeafError: with the leaves.
    """
    adapters = [leaf for leaf in leaves if _is_adapter(leaf.path)]
    if not adapters:
        return
    listed = "; ".join(f"{leaf.key} {list(leaf.shape)}" for leaf in adapters[:4])
    raise UnknownLeafError(
        f"{where}: holds {len(adapters)} LoRA leaves next to the base weights: "
        f"{listed}{'; …' if len(adapters) > 4 else ''}. They are not merged, and the base alone is not the "
        "trained model. Merge them with MaxText first: `python -m "
        "maxtext.checkpoint_conversion.to_huggingface` with load_parameters_path and lora.lora_restore_path "
        "writes a Hugging Face directory; serve that, without this load format."
    )


def dtype_error(
    name: str, path: Key, shape: Sequence[int], dtype: str, supported: Iterable[str], items: Location
) -> MaxTextLoadError:
    """The error for a leaf of the model that is not stored as plain floating point numbers.

    Args:
        name: the leaf's key.
        path: its path inside the model.
        shape: its shape.
        dtype: TensorStore's name of its dtype.
        supported: names of the dtypes that are read.
        items: where it is.
    """
    found = (
        f"{items}: leaf {name} {list(shape)} is stored as {dtype}; expected one of {', '.join(supported)}."
    )
    if _NARROW.fullmatch(dtype) and (dtype.startswith("float") or path[-1] in _KERNELS or len(shape) > 1):
        return UnsupportedDtypeError(f"{found} The weights are quantized. {_LOAD_UNQUANTIZED}")
    if dtype.startswith(("int", "uint", "bool")):
        return UnsupportedDtypeError(
            f"{found} No weight is stored as {dtype}, and the use of this leaf is not known: by its name it "
            "is neither random number state nor other state that is skipped. Save the checkpoint without "
            "it, or, if it is a weight, as floating point numbers."
        )
    return UnsupportedDtypeError(f"{found} Save the weights with MaxText's weight_dtype=bfloat16 or float32.")
