"""Loader options: every key, and what an unusable value says."""

from __future__ import annotations

import pytest

from vllm_maxtext_loader import MaxTextLoadError
from vllm_maxtext_loader.errors import OptionError
from vllm_maxtext_loader.options import (
    GIB,
    Options,
    available_nbytes,
    fetch_window,
    memory_nbytes,
    read_budget,
)


def test_defaults() -> None:
    options = Options.parse(None)
    assert options == Options()
    assert options.fold_expert_scales == "auto"


def test_every_key() -> None:
    given = {
        "checkpoint": "gs://b/run/checkpoints",
        "step": 7,
        "model_name": "gemma4-26b",
        "fold_expert_scales": True,
        "concurrent_gib": 0.5,
    }
    assert Options.parse(given) == Options(**given)


def test_json_is_the_same_as_a_dictionary() -> None:
    assert Options.parse('{"step": 7, "checkpoint": "gs://b/run"}') == Options(
        step=7, checkpoint="gs://b/run"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [("{step: 7}", "is not JSON"), ("", "is not JSON"), ("[7]", "must be a dictionary or a JSON object")],
)
def test_what_is_not_a_json_object_is_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Options.parse(text)


def test_given_options_are_parsed_to_the_same() -> None:
    options = Options(checkpoint="gs://b/run", fold_expert_scales=False)
    assert options.given() == {"checkpoint": "gs://b/run", "fold_expert_scales": False}
    assert Options.parse(options.given()) == options


def test_unknown_key_is_refused_with_the_list() -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({"chekpoint": "x"})
    message = str(caught.value)
    assert "'chekpoint'" in message
    assert "Did you mean checkpoint?" in message
    for key in ("checkpoint", "step", "model_name", "fold_expert_scales", "concurrent_gib"):
        assert key in message
    assert isinstance(caught.value, MaxTextLoadError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint", 3),
        ("checkpoint", ""),
        ("step", -1),
        ("step", "newest"),
        ("step", True),
        ("model_name", 26),
        ("fold_expert_scales", "yes"),
        ("concurrent_gib", 0),
        ("concurrent_gib", float("inf")),
        ("concurrent_gib", "1GB"),
    ],
)
def test_unusable_value_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(OptionError, match=key) as caught:
        Options.parse({key: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "chunk", "cores", "budget", "remote"),
    [
        # An eighth of the weights, within its bounds; from a bucket a sixteenth and three sixteenths, within theirs.
        (3 * GIB, 40 << 20, 2, 3 * GIB // 8, 3 * GIB * 4 // 16),
        (1 << 20, 1 << 18, 8, GIB // 8, 256 << 20),
        (62 * GIB, 1 << 20, 8, 4 * GIB, 3 * GIB),
        # Chunks so large that fewer would be in flight than cores could decode: up to an eighth, in all.
        (48 * GIB, 793 << 20, 4, 4 * GIB, 4 * (793 << 20) + GIB),
        (48 * GIB, 793 << 20, 180, 6 * GIB, 6 * GIB),
        (16 * GIB, 793 << 20, 180, 2 * GIB, 2 * GIB),
    ],
)
def test_read_budget(nbytes: int, chunk: int, cores: int, budget: int, remote: int) -> None:
    assert read_budget(None, nbytes, chunk, cores) == budget
    assert read_budget(None, nbytes, chunk, cores, remote=True) == remote
    assert read_budget(0.5, nbytes, chunk, cores, remote=True) == GIB // 2
    assert read_budget(0.5, nbytes, chunk, cores) == GIB // 2


def test_budget_beyond_memory_is_refused_with_both_numbers() -> None:
    memory = memory_nbytes() / GIB
    assert 0.5 < memory < 100_000
    says = rf"concurrent_gib is 1e\+06, but this machine .* has {memory:.1f} GiB of memory\. Leave it out"
    with pytest.raises(OptionError, match=says):
        Options.parse({"concurrent_gib": 1e6})
    with pytest.raises(OptionError, match=says):
        read_budget(1e6, GIB, GIB, 1)
    assert Options.parse({"concurrent_gib": memory / 2}).concurrent_gib == memory / 2
    with pytest.raises(OptionError, match="concurrent_gib must be a number of GiB > 0, found -1"):
        read_budget(-1, GIB, GIB, 1)


def test_stored_bytes_take_no_more_than_is_free() -> None:
    assert fetch_window(GIB // 8) == 96 << 20
    assert fetch_window(1 << 50) <= min(GIB, memory_nbytes() // 4)
    assert 0 < available_nbytes() <= memory_nbytes()
