"""TPU slices by the names people rent them under, and what JAX knows of their chips."""

from __future__ import annotations

import dataclasses
import math
import re

from vllm_maxtext_loader.errors import EngineError, OptionError

COMMON = ("v5e-4", "v5e-8", "v6e-1", "v6e-4", "v6e-8", "tpu7x-4")
"""What is looked at unless the user names slices."""

_GRIDS = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"},
}
"""By dimensions of the interconnect and number of chips: how they are arranged."""

_FLAT = ("v5e", "v6e")
_DEVICES_PER_CHIP = {"7x": 2}
"""JAX devices of a chip, where it is not one. Two cores with one memory (megacore) are one device."""

_UNSUPPORTED = ("v2", "v3", "v4", "v4i")
"""tpu-inference 0.32's attention kernel knows v5e and later ("Unsupported tpu_version=4")."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice.

    Attributes:
        name: as the user wrote it.
        generation: "v5e", "v5p", "v6e", "tpu7x".
        chips, devices: how many; devices are JAX's.
        topology: libtpu's name.
        hbm_bytes: memory of one chip.
        has_sparse_core: whether a chip has SparseCores.
    """

    name: str
    generation: str
    chips: int
    devices: int
    topology: str
    hbm_bytes: int
    has_sparse_core: bool

    @property
    def devices_per_chip(self) -> int:
        """JAX devices of one chip."""
        return self.devices // self.chips


def parse(name: str) -> Slice:
    """A slice by its name: "v6e-8" (chips; of v5p, cores: "v5p-8" has four chips), or libtpu's "v6e:2x4".

    Raises:
        OptionError: there is no such slice.
        EngineError: JAX is not installed, or tpu-inference has no kernels for the chip.
    """
    match = re.fullmatch(r"(?P<generation>[a-z0-9]+?)(?:-(?P<count>\d+)|:(?P<grid>\d+x\d+(?:x\d+)?))", name)
    if match is None:
        raise OptionError(
            f"--topology {name}: expected a slice such as v6e-8, or a topology such as v6e:2x4."
        )
    generation = match["generation"]
    version = generation.removeprefix("tpu")
    grids = _GRIDS[2 if generation in _FLAT else 3]
    if match["grid"]:
        grid = match["grid"]
    else:
        chips = int(match["count"]) // (2 if generation == "v5p" else 1)
        if (grid := grids.get(chips, "")) == "":
            raise OptionError(
                f"--topology {name}: no slice of {generation} has {chips} chips; "
                f"known: {', '.join(map(str, grids))}."
            )
    count = math.prod(map(int, grid.split("x")))
    devices = count * _DEVICES_PER_CHIP.get(version, 1)
    hbm_bytes, has_sparse_core = _chip(name, version)
    return Slice(name, generation, count, devices, f"{generation}:{grid}", hbm_bytes, has_sparse_core)


def larger(found: Slice) -> list[str]:
    """Names of the slices of the same generation with more chips, smallest first."""
    return [name for chips, name in _same_generation(found) if chips > found.chips]


def smaller(found: Slice) -> list[str]:
    """Names of the slices of the same generation with fewer chips, largest first."""
    return [name for chips, name in reversed(_same_generation(found)) if chips < found.chips]


def _same_generation(found: Slice) -> list[tuple[int, str]]:
    """Chips and names of all slices of a generation, smallest first."""
    counts = _GRIDS[2 if found.generation in _FLAT else 3]
    factor = 2 if found.generation == "v5p" else 1
    return [(chips, f"{found.generation}-{chips * factor}") for chips in counts]


def _chip(name: str, version: str) -> tuple[int, bool]:
    """Memory of a chip, and whether it has SparseCores, from JAX's table of TPUs."""
    try:
        # The public way, jax.experimental.pallas.tpu, imports all of Pallas.
        from jax._src import tpu_info as tpu
    except ImportError as error:
        raise EngineError(
            "vllm-maxtext fit needs JAX's table of TPUs, which comes with vllm-tpu: "
            'pip install "vllm-maxtext-loader[tpu]" (no TPU is needed).'
        ) from error
    known = {chip.value: chip for chip in tpu.ChipVersion}
    if version not in known:
        raise OptionError(
            f"--topology {name}: JAX knows no TPU {version}; known: {', '.join(known)} (7x is written tpu7x)."
        )
    if version in _UNSUPPORTED:
        raise EngineError(
            f"{name}: tpu-inference 0.32 has no attention kernel for TPU {version}. "
            f"Use v5e, v5p, v6e or tpu7x."
        )
    chip = known[version]
    core = tpu.get_tpu_info_for_chip(chip, 1)
    hbm_bytes = core.hbm_capacity_bytes * chip.num_physical_tensor_cores_per_chip
    return hbm_bytes, core.sparse_core is not None
