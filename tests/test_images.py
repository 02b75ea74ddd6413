"""A checkpoint with a vision tower answers about an image: the real engine against transformers in float32.

The image goes the whole way: vLLM's processor cuts it into patches, the vision tower and the projector that came from the
checkpoint turn them into soft tokens, and the language model attends to them. The twin's configuration asks for causal attention within
an image, which is what tpu-inference 0.32 computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.checkpoints import cases
from support.engine import bound, distance, run_jobs
from support.images import (
    BEGIN,
    CASE,
    END,
    GEMMA3,
    IMAGE,
    engine_arguments,
    write_gemma3,
    write_gemma4,
    write_images,
)

pytestmark = pytest.mark.engine

BEFORE, AFTER = [2, 17, 99], [41, 8, 120, 7]


@pytest.fixture(scope="module")
def directory(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin with a tokenizer and an image processor."""
    return write_gemma4(twin(CASE), tmp_path_factory.mktemp("images") / "twin")


@pytest.fixture(scope="module")
def gemma3_directory(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, of Gemma 3."""
    return write_gemma3(twin(GEMMA3), tmp_path_factory.mktemp("gemma3") / "twin")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two different images."""
    return write_images(tmp_path_factory.mktemp("pictures"))


def job(case: str, directory: Path, images: list[Path], placeholder: int) -> dict[str, Any]:
    """An engine that answers after each image."""
    arguments = engine_arguments(directory)
    return {
        "name": case,
        "model": str(directory),
        "arguments": {
            "load_format": "maxtext",
            "model_loader_extra_config": {"checkpoint": str(cases()[case].items)},
            **arguments,
        },
        "prompts": [[*BEFORE, placeholder, *AFTER]] * len(images),
        "images": [str(image) for image in images],
        "vocab_size": arguments["max_logprobs"],
    }


@pytest.fixture(scope="module")
def answers(
    directory: Path, gemma3_directory: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the engines say after each image."""
    jobs = [
        job(CASE, directory, images, IMAGE),
        # vLLM's processor looks for the token that begins an image.
        job(GEMMA3, gemma3_directory, images, BEGIN),
    ]
    found = run_jobs(jobs, tmp_path_factory.mktemp("said"), devices=1)
    for answer in found.values():
        assert "error" not in answer, answer.get("traceback")
    return found


@pytest.fixture(scope="module")
def said(answers: dict[str, Any]) -> dict[str, Any]:
    """What the engine says about Gemma 4's images."""
    return answers[CASE]


def reference(
    directory: Path, images: list[Path], change: Callable[[Any], None] | None = None
) -> list[np.ndarray]:
    """Log-probs of the next token after each image and prompt: transformers, float32, on the twin."""
    from PIL import Image
    from transformers import AutoProcessor, Gemma4ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(directory)
    model = Gemma4ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        if change is not None:
            change(model)
        for path in images:
            seen = processor.image_processor(Image.open(path), return_tensors="pt")
            count = int(seen["num_soft_tokens_per_image"][0])
            tokens = torch.tensor([[*BEFORE, BEGIN, *[IMAGE] * count, END, *AFTER]])
            logits = model(
                input_ids=tokens,
                pixel_values=seen["pixel_values"],
                image_position_ids=seen["image_position_ids"],
                mm_token_type_ids=(tokens == IMAGE).long(),
            ).logits
            rows.append(logits[0, -1].log_softmax(-1).numpy())
    return rows


def limit_for(directory: Path, rows: list[np.ndarray]) -> float:
    """What bfloat16 explains, over the layers of both towers."""
    config = json.loads((directory / "config.json").read_text())
    layers = config["text_config"]["num_hidden_layers"] + config["vision_config"]["num_hidden_layers"]
    return bound(layers, float(np.mean([np.std(row) for row in rows])))


def test_answers_are_transformers_float32(said: dict[str, Any], directory: Path, images: list[Path]) -> None:
    rows = reference(directory, images)
    assert distance(said["logprobs"], rows) < limit_for(directory, rows)
    # The placeholder became an image: more than fifty soft tokens, between their marks.
    assert all(length > 50 + len(BEFORE) + len(AFTER) + 2 for length in said["prompt_lengths"])


def test_another_image_has_another_answer(said: dict[str, Any], directory: Path, images: list[Path]) -> None:
    rows = reference(directory, list(reversed(images)))
    assert distance(said["logprobs"], rows) > limit_for(directory, rows)


def _transpose_positions(model: Any) -> None:
    table = model.model.vision_tower.patch_embedder.position_embedding_table
    table.data = table.data.flip(0)


def _forget_standardization(model: Any) -> None:
    model.model.vision_tower.std_scale.fill_(1)


@pytest.mark.parametrize("mistake", [_transpose_positions, _forget_standardization])
def test_bound_catches_mistakes_in_the_vision_tower(
    said: dict[str, Any], directory: Path, images: list[Path], mistake: Callable[[Any], None]
) -> None:
    rows = reference(directory, images, mistake)
    assert distance(said["logprobs"], rows) > limit_for(directory, rows)


def gemma3_reference(
    directory: Path, images: list[Path], change: Callable[[Any], None] | None = None
) -> list[np.ndarray]:
    """As `reference`. Without types of tokens, transformers attends causally within an image, as tpu-inference 0.32 does."""
    from PIL import Image
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(directory)
    model = Gemma3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    image = processor.tokenizer.encode(processor.full_image_sequence, add_special_tokens=False)
    rows = []
    with torch.no_grad():
        if change is not None:
            change(model)
        for path in images:
            seen = processor.image_processor(Image.open(path), return_tensors="pt")
            tokens = torch.tensor([[*BEFORE, *image, *AFTER]])
            logits = model(input_ids=tokens, pixel_values=seen["pixel_values"]).logits
            rows.append(logits[0, -1].log_softmax(-1).numpy())
    return rows


def test_gemma3_answers_are_transformers_float32(
    answers: dict[str, Any], gemma3_directory: Path, images: list[Path]
) -> None:
    rows = gemma3_reference(gemma3_directory, images)
    limit = limit_for(gemma3_directory, rows)
    assert distance(answers[GEMMA3]["logprobs"], rows) < limit
    other = gemma3_reference(gemma3_directory, list(reversed(images)))
    assert distance(answers[GEMMA3]["logprobs"], other) > limit


def _swap_projections(model: Any) -> None:
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = layer.self_attn.v_proj, layer.self_attn.q_proj


def test_bound_catches_a_mistake_in_gemma3s_vision_tower(
    answers: dict[str, Any], gemma3_directory: Path, images: list[Path]
) -> None:
    rows = gemma3_reference(gemma3_directory, images, _swap_projections)
    assert distance(answers[GEMMA3]["logprobs"], rows) > limit_for(gemma3_directory, rows)
