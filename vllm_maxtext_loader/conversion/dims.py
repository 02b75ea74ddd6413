"""The dimensions of a model: everything that determines the names and shapes of its weights, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VISION_LAYERS = "vision_layers"
"""Size that counts the layers of a vision tower."""

VISION_TAG = "vision"


@dataclasses.dataclass(frozen=True)
class LayerDims:
    """One decoder layer.

    Attributes:
        sizes: by axis name, of the axes that may differ between layers ("head_dim", "kv_heads", "mlp").
        tags: which kinds of weights the layer has, and what kind of layer it is ("sliding").
    """

    sizes: Mapping[str, int]
    tags: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class ModelDims:
    """A model.

    Attributes:
        family: name of its family.
        sizes: by axis name, of all axes that are the same in every layer; of a vision tower with prefix "vision_".
        layers: one entry per decoder layer.
        tags: which kinds of weights the model has ("moe", "untied", "vision").
    """

    family: str
    sizes: Mapping[str, int]
    layers: tuple[LayerDims, ...]
    tags: frozenset[str] = frozenset()

    @property
    def has_vision(self) -> bool:
        """Whether there is a vision tower."""
        return VISION_TAG in self.tags

    def has(self, tag: str, layer: int | None = None) -> bool:
        """Whether the model, or one of its layers, has a tag. "!tag" asks for its absence, "" is always true."""
        if tag.startswith("!"):
            return not self.has(tag[1:], layer)
        return not tag or tag in self.tags or (layer is not None and tag in self.layers[layer].tags)

    def with_sizes(self, **sizes: int) -> ModelDims:
        """The same model with other sizes."""
        return dataclasses.replace(self, sizes={**self.sizes, **sizes})

    def without_vision(self) -> ModelDims:
        """The text model alone."""
        return dataclasses.replace(
            self,
            sizes={name: size for name, size in self.sizes.items() if not name.startswith("vision_")},
            tags=frozenset(tag for tag in self.tags if not tag.startswith(VISION_TAG)),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON's types; see `from_json`."""
        return {
            "family": self.family,
            **self.sizes,
            "tags": sorted(self.tags),
            "layers": [{**layer.sizes, "tags": sorted(layer.tags)} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ModelDims:
        """Inverse of `to_json`."""
        sizes = {name: value for name, value in found.items() if isinstance(value, int)}
        layers = tuple(
            LayerDims({k: v for k, v in layer.items() if k != "tags"}, frozenset(layer["tags"]))
            for layer in found["layers"]
        )
        return cls(found["family"], sizes, layers, frozenset(found["tags"]))
