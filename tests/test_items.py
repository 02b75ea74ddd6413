"""Which item of a step holds the model, as its tree tells, not its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import gcs
from support.checkpoints import cases, read_orbax
from support.damage import Place
from vllm_maxtext_loader import errors, open_checkpoint
from vllm_maxtext_loader.checkpoint.find import TREE_METADATA, locate

MODEL: dict[str, Any] = {"token_embedder": {"embedding": np.ones((4, 4), np.float32)}}
OPTIMIZER: dict[str, Any] = {"count": np.ones(1), "opt_state": {"mu": MODEL, "nu": MODEL}}
OTHER: dict[str, Any] = {"rng": np.ones(2), "data": {"position": np.ones(1)}}


def save(run: Path, **items: dict[str, Any]) -> Path:
    """A step with these items, as Orbax's checkpoint manager writes it."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    with ocp.CheckpointManager(run, options=options) as manager:
        trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        manager.save(3, args=ocp.args.Composite(**trees))
    return run / "3"


@pytest.mark.parametrize(
    ("items", "chosen"),
    [
        ({"params": MODEL, "state": OPTIMIZER}, "params"),
        ({"state": {"params": {"params": MODEL}, **OPTIMIZER}, "params": OTHER}, "state"),
        ({"weights": MODEL, "adam": OTHER}, "weights"),
        ({"a": OTHER, "b": OPTIMIZER, "z": {"base": MODEL}}, "z"),
        ({"items": OTHER, "weights": MODEL}, "weights"),
        ({"items": MODEL, "reference": MODEL}, "items"),
        ({"model_params": MODEL, "ema": MODEL, "optimizer_state": OPTIMIZER}, "model_params"),
        ({"model_params": MODEL, "optimizer_state": MODEL}, "model_params"),
        ({"default": OTHER, "pytree": MODEL}, "pytree"),
    ],
)
def test_item_is_chosen_by_its_tree(place: Place, items: dict[str, Any], chosen: str) -> None:
    save(place.root / "run", **items)
    run = place.url("run")
    for named in (run, f"{run}/3", f"{run}/3/{chosen}"):
        found = locate(named)
        assert (found.items.url, found.step) == (f"{run}/3/{chosen}", 3)


def test_two_models_are_a_question(place: Place) -> None:
    save(place.root / "run", params=MODEL, ema=MODEL, state=OPTIMIZER)
    run = place.url("run")
    for named in (run, f"{run}/3"):
        with pytest.raises(errors.UnknownModelError) as raised:
            locate(named)
        message = str(raised.value)
        assert f"{run}/3: 2 items hold a MaxText model (params, ema)" in message
        assert f"Give the path of the one to load: {run}/3/params or {run}/3/ema." in message
    assert locate(f"{run}/3/ema").items.url == f"{run}/3/ema"


def test_items_without_a_model_are_listed(place: Place) -> None:
    save(place.root / "run", weights=OTHER, state=OPTIMIZER)
    run = place.url("run")
    with pytest.raises(errors.UnknownModelError) as raised:
        locate(run)
    message = str(raised.value)
    assert "no item holds a MaxText model" in message
    assert "weights (top-level keys: data, rng)" in message
    assert "state (top-level keys: count, opt_state)" in message
    assert f"give its path, e.g. {run}/3/state" in message


def test_damaged_item_among_several(place: Place) -> None:
    step = save(place.root / "run", weights=MODEL, adam=OTHER)
    (step / "adam" / TREE_METADATA).write_text("{")
    run = place.url("run")
    with pytest.raises(errors.CorruptMetadataError, match=rf"of adam is damaged\. .*{run}/3/weights"):
        locate(run)
    assert locate(f"{run}/3/weights").step == 3


def test_single_item_of_any_name_costs_no_request(tmp_path: Path) -> None:
    proxy = gcs.shared()[1]
    with gcs.environment(proxy.url):
        place = Place(tmp_path, tmp_path.name)
        save(tmp_path / "run", weights=OTHER)
        save(tmp_path / "two", weights=MODEL, adam=OTHER)
        for run, kinds in (("run", {"list": 2, "stat": 1, "read": 1}), ("two", {"list": 2, "read": 3})):
            url = place.url(run)
            proxy.clear()
            assert locate(url).items.name == "weights"
            assert proxy.counts() == kinds


def test_model_next_to_an_optimizer_is_read(tmp_path: Path) -> None:
    items = cases()["dense_024"].items
    tree = read_orbax(items)
    save(tmp_path / "run", params=tree["params"], state=OPTIMIZER)
    expected, found = open_checkpoint(items), open_checkpoint(tmp_path / "run")
    assert found.location.items.name == "params"
    assert found.plan.targets.keys() == expected.plan.targets.keys()


def test_any_tree_metadata_is_judged_or_refused(tmp_path: Path) -> None:
    step = save(tmp_path / "run", weights=MODEL, adam=OTHER)
    good = json.loads((step / "weights" / TREE_METADATA).read_text())
    entry = st.fixed_dictionaries({"key_metadata": st.lists(st.fixed_dictionaries({"key": st.text()}))})
    trees = st.one_of(
        st.none(),
        st.just(good),
        st.lists(st.integers()),
        st.fixed_dictionaries({"tree_metadata": st.dictionaries(st.text(), st.one_of(entry, st.integers()))}),
    )

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(trees)
    def run(tree: object) -> None:
        (step / "adam" / TREE_METADATA).write_text(json.dumps(tree))
        message = str(tmp_path / "run")
        try:
            assert locate(tmp_path / "run").items.name == "weights"
        except errors.MaxTextLoadError as error:
            message = str(error)
        assert str(tmp_path / "run") in message

    run()
    shutil.rmtree(step / "adam")
    assert locate(tmp_path / "run").items.name == "weights"
