"""The model's dimensions, read off the shapes of its leaves.

Every dimension is stated by several leaves; the majority counts, so that one leaf that is out of shape is
named by the plan instead of bending the model. What shapes cannot tell (sliding window, rope, top-k) is
not here but in `hf_config`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

from vllm_maxtext_loader.conversion.layout import Layout, MatchedLeaf
from vllm_maxtext_loader.errors import MissingLeafError
from vllm_maxtext_loader.families.gemma4 import Dims, LayerDims, Scope, VisionDims

_Votes = dict[tuple[str, int], collections.Counter[int]]


def read_dims(layout: Layout, where: str) -> Dims:
    """Dimensions of the model in `layout`.

    Args:
        layout: placed leaves.
        where: path, for messages.

    Raises:
        MissingLeafError: a dimension is stated by no leaf at all.
    """
    votes = _count(layout.placed)

    def get(name: str, layer: int = 0) -> int:
        counter = votes.get((name, layer))
        if not counter:
            raise MissingLeafError(
                f"{where}: no leaf of layer {layer} tells the dimension {name}: the layer is incomplete."
            )
        return counter.most_common(1)[0][0]

    def maybe(name: str, layer: int = 0) -> int | None:
        counter = votes.get((name, layer))
        return counter.most_common(1)[0][0] if counter else None

    present = {
        (entry.rule.hf, int(layer))
        for entry in layout.placed
        if entry.rule.scope is Scope.LAYER
        for layer in entry.layers.flat
    }
    count = layout.num_layers
    shared_from = count
    # Only trailing layers share keys and values, and only beside per-layer embeddings (E2B, E4B).
    if maybe("P") is not None:
        while (
            shared_from > 0
            and not {
                ("self_attn.k_proj.weight", shared_from - 1),
                ("self_attn.k_norm.weight", shared_from - 1),
            }
            & present
        ):
            shared_from -= 1
    head_dims = [get("D", layer) for layer in range(count)]
    sliding = _sliding(layout, head_dims, present, shared_from)
    # One global layer without a value leaf and without a contradiction makes "keys serve as values" true of all.
    k_eq_v = not any(
        ("self_attn.v_proj.weight", layer) in present for layer in range(shared_from) if not sliding[layer]
    )
    layers = tuple(
        LayerDims(
            sliding=sliding[layer],
            head_dim=head_dims[layer],
            kv_heads=get("K", layer) if layer < shared_from else None,
            k_eq_v=k_eq_v and not sliding[layer] and layer < shared_from,
            mlp=get("M", layer),
        )
        for layer in range(count)
    )
    experts = maybe("E")
    expert_mlp = maybe("F") or (maybe("G") or 0) // 2
    if experts and not expert_mlp:
        raise MissingLeafError(
            f"{where}: has a router for {experts} experts, but no expert weights (wi_0, wi_1, wo)."
        )
    return Dims(
        vocab=get("V"),
        hidden=get("H"),
        heads=get("N"),
        layers=layers,
        experts=experts,
        expert_mlp=expert_mlp if experts else None,
        ple=maybe("P"),
        ple_vocab=get("W") if maybe("P") else None,
        vision=_vision(layout.placed, get, maybe),
    )


def _count(placed: Iterable[MatchedLeaf]) -> _Votes:
    """How often each size is stated, by (axis name, layer); layer 0 for what all layers share."""
    votes: _Votes = collections.defaultdict(collections.Counter)
    for entry in placed:
        axes, shape = entry.rule.move.maxtext_axes, entry.layer_shape
        if len(axes) != len(shape):
            continue
        for name, size in zip(axes, shape, strict=True):
            if entry.rule.scope is Scope.LAYER and name in "DKM":
                for layer in entry.layers.flat:
                    votes[name, int(layer)][size] += 1
            else:
                votes[name, 0][size] += 1
    return votes


def _sliding(
    layout: Layout, head_dims: list[int], present: set[tuple[str, int]], shared_from: int
) -> list[bool]:
    """Which layers attend to a sliding window: told by the container, the head dim, or a missing `value`."""
    count = layout.num_layers
    full: set[int] = set()
    for entry in layout.placed:
        if ".global_layer." in entry.leaf.name:
            full |= {int(layer) for layer in entry.layers.flat}
    if not full and len(set(head_dims)) == 2:
        # Global layers are the wider ones in every published Gemma 4 (512 against 256).
        full = {layer for layer in range(count) if head_dims[layer] == max(head_dims)}
    if not full:
        valued = {layer for layer in range(shared_from) if ("self_attn.v_proj.weight", layer) in present}
        if valued and len(valued) < shared_from:
            full = set(range(shared_from)) - valued
    if not full:
        full = {layer for layer in range(count) if layer % 6 == 5}
    return [layer not in full for layer in range(count)]


def _vision(placed: Iterable[MatchedLeaf], get, maybe) -> VisionDims | None:  # type: ignore[no-untyped-def]
    tower = [entry for entry in placed if entry.rule.scope in (Scope.VISION, Scope.VISION_LAYER)]
    if not tower:
        return None
    layers = [int(entry.layers) for entry in tower if entry.rule.scope is Scope.VISION_LAYER]
    return VisionDims(
        layers=max(layers, default=-1) + 1,
        hidden=get("C"),
        heads=get("A"),
        head_dim=get("B"),
        mlp=get("I"),
        patch_inputs=get("X"),
        positions=get("T"),
        standardize=any(entry.rule.hf == "vision_tower.std_scale" for entry in tower),
    )
