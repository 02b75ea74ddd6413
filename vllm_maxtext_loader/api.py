"""`open_checkpoint`: a checkpoint as a Hugging Face configuration and Hugging Face tensors."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_maxtext_loader import families
from vllm_maxtext_loader.checkpoint.find import ItemLocation, locate
from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, Wait, first_regions, read_regions
from vllm_maxtext_loader.checkpoint.regions import Region
from vllm_maxtext_loader.checkpoint.rows import trailing_zero_rows
from vllm_maxtext_loader.checkpoint.storage.path import tensorstore_context
from vllm_maxtext_loader.checkpoint.storage.ranges import Transfers
from vllm_maxtext_loader.checkpoint.tree import EMBEDDING_LEAF, Leaf, Tree, read_tree
from vllm_maxtext_loader.conversion.config_check import VOCAB
from vllm_maxtext_loader.conversion.convert import convert
from vllm_maxtext_loader.conversion.plan import Plan, make_plan
from vllm_maxtext_loader.conversion.published import published_tensors
from vllm_maxtext_loader.conversion.vocabulary import refuse_used_rows
from vllm_maxtext_loader.dtypes import BFLOAT16, FLOATS
from vllm_maxtext_loader.options import read_budget

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from vllm_maxtext_loader.checkpoint.exchange.exchange import Exchange

logger = logging.getLogger("vllm." + __name__)


class Checkpoint:
    """A MaxText checkpoint whose metadata has been read and planned; no array data has.

    Attributes:
        tree: leaves, shapes, storage.
        plan: what a load would make of them.
        model_name: the MaxText model name the user gave, or None.
        configured: whether a Hugging Face configuration was given (its vocab_size then decides).
        concurrent_bytes: read budget in bytes.
    """

    def __init__(
        self, tree: Tree, plan: Plan, model_name: str | None, concurrent_bytes: int, configured: bool = False
    ) -> None:
        self.tree = tree
        self.plan = plan
        self.model_name = model_name
        self.configured = configured
        self._vocab_known = False
        self.concurrent_bytes = concurrent_bytes

    def __repr__(self) -> str:
        return f"Checkpoint({self.location.items}, {len(self.plan.targets)} tensors)"

    @property
    def location(self) -> ItemLocation:
        """Where it was found."""
        return self.tree.location

    @property
    def digest(self) -> str:
        """The same wherever the same checkpoint is found: of where it lies, and of leaves, shapes, dtypes and chunks."""
        leaves = sorted(
            (leaf.key, leaf.shape, str(leaf.dtype), leaf.chunks) for leaf in self.tree.leaves.values()
        )
        return hashlib.sha256(f"{self.location.items.url} {leaves}".encode()).hexdigest()[:16]

    def with_config(self, config: Any) -> Checkpoint:
        """The same checkpoint, planned for a given Hugging Face configuration.

        Args:
            config: a transformers configuration of the model's family.

        Raises:
            ConfigMismatchError: the configuration contradicts the shapes, or would drop vocabulary rows that are
                not zero; only such rows are read.
        """
        wanted = families.dims_of_config(config, self.plan.where)
        plan = make_plan(self.tree, self.plan.family, wanted)
        refuse_used_rows(self.tree, plan)
        return Checkpoint(self.tree, plan, self.model_name, self.concurrent_bytes, configured=True)

    def hf_config(self) -> PretrainedConfig:
        """The model's configuration: dimensions from the shapes, the rest from the published preset.

        Raises:
            ConfigMismatchError: no published model, or several, have these dimensions, and no model name was given.
        """
        from vllm_maxtext_loader.huggingface.config import make_config

        return make_config(self.trimmed_plan().dims, self.model_name, self.plan.where)

    def iter_regions(
        self,
        *,
        on_wait: Callable[[Wait], None] | None = None,
        needed: Callable[[Leaf, Region], bool] | None = None,
        transfers: Transfers | None = None,
        exchange: Exchange | None = None,
        in_parts: bool = False,
        reserved: int = 0,
    ) -> Iterator[DecodedRegion]:
        """Decoded regions of the planned leaves, in stored order. Reading begins with the call.

        Args:
            on_wait: told how long each region of decoded data was waited for.
            needed: whether a region is wanted; regions that are not are not read. None means all are.
            transfers: what is fetched from a bucket is added to it.
            exchange: with other hosts, of regions; `needed` is then not asked.
            in_parts: whether large chunks from a bucket may come as several regions, those of several leaves in turn.
            reserved: bytes of the read budget that the caller takes for itself.

        Raises:
            ReadError: a chunk is missing, truncated or corrupt.
            StorageError: the storage refuses or does not answer.
        """
        plan = self.trimmed_plan()
        return read_regions(
            [entry.leaf for entry in plan.leaves],
            self.tree.arrays,
            self.concurrent_bytes - reserved,
            plan.where,
            outer={entry.leaf.key: entry.scan_axes for entry in plan.leaves},
            needed=needed,
            on_wait=on_wait,
            transfers=transfers,
            exchange=exchange,
            in_parts=in_parts,
        )

    def first_regions(self, *, in_parts: bool = False, reserved: int = 0) -> Iterator[tuple[Leaf, Region]]:
        """The region of every planned leaf that `iter_regions` is expected to yield first, where all are needed.

        Args:
            in_parts, reserved: see `iter_regions`.
        """
        leaves = [entry.leaf for entry in self.trimmed_plan().leaves]
        budget = self.concurrent_bytes - reserved
        return first_regions(leaves, budget, remote=self.location.items.is_remote, in_parts=in_parts)

    def hf_weights(
        self,
        *,
        fold_expert_scales: bool = False,
        dtype: torch.dtype | None = None,
        fused_experts: bool = False,
        regions: Iterator[DecodedRegion] | None = None,
        on_region: Callable[[DecodedRegion, float], None] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor of the model under its Hugging Face name, streaming.

        Args:
            fold_expert_scales: multiply per_expert_scale into down_proj (float32, one rounding), and give
                ones in its place.
            dtype: dtype of all tensors; None keeps the stored dtype.
            fused_experts: yield the experts of a layer as one tensor [experts, …], as vLLM takes them, also where they
                are published one by one.
            regions: an iterator from `iter_regions()`, to start reading early or to filter; a tensor without any region is
                not yielded. None means that reading begins when the first tensor is requested.
            on_region: told each region, and the seconds it took to convert.

        Raises:
            ReadError: a chunk is missing, truncated or corrupt.
            StorageError: the storage refuses or does not answer.
        """
        plan = self.trimmed_plan()
        for name, array in convert(
            plan,
            self.iter_regions() if regions is None else regions,
            dtype=None if dtype is None else numpy_dtype(dtype),
            fold_expert_scales=fold_expert_scales,
            on_region=on_region,
        ):
            spec = plan.targets[name]
            if fused_experts or not spec.expert_names:
                yield name, to_torch(array)
                continue
            parts = array.reshape(-1, *published_tensors(spec)[0][1])
            for (published, _), part in zip(published_tensors(spec), parts, strict=True):
                yield published, to_torch(part)

    def trimmed_plan(self) -> Plan:
        """The plan, without vocabulary rows that are padding.

        With a configuration its vocab_size decides. Without one, rows past the published vocabulary, or zero rows
        at the end of a table of another size, are MaxText's padding.

        Raises:
            ConfigMismatchError: rows past the published vocabulary are not zero.
        """
        if self.configured or self._vocab_known:
            return self.plan
        from vllm_maxtext_loader.huggingface.config import choose_preset, match_presets, with_config_tags

        stored = vocab = self.plan.dims.sizes[VOCAB]
        if matched := {preset.dims.sizes[VOCAB] for preset in match_presets(self.plan.dims)}:
            vocab = max(matched)
        elif vocab not in {preset.dims.sizes[VOCAB] for preset in self.plan.family.presets}:
            leaf = self.tree.leaves[".".join(EMBEDDING_LEAF)]
            vocab -= trailing_zero_rows(leaf, self.tree.arrays, self.plan.where)
        if vocab != stored:
            plan = make_plan(self.tree, self.plan.family, self.plan.dims.with_sizes(vocab=vocab))
            refuse_used_rows(self.tree, plan)
            logger.info("Dropping %d padded vocabulary rows of %s", stored - vocab, self.plan.where)
            self.plan = plan
        if self.plan.family.config_tags:
            # How some values are stored is told by no shape: a preset decides, or the user is asked.
            preset = choose_preset(self.plan.dims, self.model_name, self.plan.where)
            wanted = with_config_tags(self.plan.dims, preset)
            self.plan = make_plan(self.tree, self.plan.family, wanted)
        self._vocab_known = True
        return self.plan


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    model_name: str | None = None,
    concurrent_gib: float | None = None,
) -> Checkpoint:
    """Reads a checkpoint's metadata and plans its conversion.

    Args:
        path: local path or gs:// URL of an items directory, a step directory or a run's checkpoint directory.
        step: step to take from a run's checkpoint directory; None means the newest committed one.
        model_name: MaxText's name of the published model (gemma4-26b, qwen3-8b, …) to take from what shapes cannot
            tell (sliding window, rope, top-k); None means chosen by shape.
        concurrent_gib: GiB of array data in flight at a time; None means chosen by size.

    Raises:
        MaxTextLoadError: one of its kinds; see `vllm_maxtext_loader.errors`.
    """
    location = locate(path, step)
    tree = read_tree(location, tensorstore_context())
    plan = make_plan(tree, families.identify(tree.leaves, str(location.items)))
    chunk = max((entry.leaf.chunk_nbytes for entry in plan.leaves), default=0)
    cores = len(os.sched_getaffinity(0))
    budget = read_budget(concurrent_gib, plan.nbytes, chunk, cores, remote=location.items.is_remote)
    return Checkpoint(tree, plan, model_name, budget)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same memory as a torch tensor; bfloat16 travels as its bits."""
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Inverse of `to_torch`, for a tensor of the host's."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """numpy's dtype of a torch one.

    Raises:
        TypeError: weights are not of such a dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise TypeError(f"dtype must be one of torch.{', torch.'.join(FLOATS)}, found {dtype}")
    return FLOATS[name]
