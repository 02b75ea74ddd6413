"""A checkpoint with a vision tower answers about an image: the real engine against transformers in float32.

The image goes the whole way: vLLM's processor cuts it into patches, the vision tower and the projector that came from the
checkpoint turn them into soft tokens, and the language model attends to them. The twin's configuration asks for causal attention within
an image, which is what tpu-inference 0.32 computes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.checkpoints import cases
from support.engine import bound, distance, run_jobs
from tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.engine

CASE = "moe_mm"
SOFT_TOKENS = 70
"""The fewest that Gemma 4's image processor makes of an image."""

IMAGE, BEGIN, END = 300, 303, 304
"""Token ids in the twin's config.json."""

BEFORE, AFTER = [2, 17, 99], [41, 8, 120, 7]
VISION_TOKENS = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
AUDIO_TOKENS = {"audio_token": 302, "boa_token": 305, "eoa_token": 306}


GEMMA3 = "gemma3_mm"
GEMMA3_IMAGE, NEWLINES, GEMMA3_SOFT_TOKENS = 320, (310, 311, 312, 313), 256
"""The image's token id in the twin's config.json; ids for one to four newlines, which vLLM's processor looks for."""


@pytest.fixture(scope="module")
def directory(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin with a tokenizer and an image processor, as a published repository has them."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
        PreTrainedTokenizerFast,
    )

    out = Path(shutil.copytree(twin(CASE), tmp_path_factory.mktemp("images") / "twin"))
    write_tokenizer(out, vocab_size=320)
    plain = PreTrainedTokenizerFast.from_pretrained(out)
    special = {
        name: plain.convert_ids_to_tokens(number)
        for name, number in {**VISION_TOKENS, **AUDIO_TOKENS}.items()
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, extra_special_tokens=special)
    vision = json.loads((out / "config.json").read_text())["vision_config"]
    sizes = {
        "patch_size": vision["patch_size"],
        "pooling_kernel_size": vision["pooling_kernel_size"],
        "max_soft_tokens": SOFT_TOKENS,
    }
    Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(**sizes),
        image_seq_length=SOFT_TOKENS,
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def gemma3_directory(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, of Gemma 3."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    out = Path(shutil.copytree(twin(GEMMA3), tmp_path_factory.mktemp("gemma3") / "twin"))
    write_tokenizer(out, vocab_size=336)
    stored = json.loads((out / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    words = {number: word for word, number in vocabulary.items()}
    for count, number in enumerate(NEWLINES, 1):
        del vocabulary[words[number]]
        vocabulary["\n" * count] = number
    (out / "tokenizer.json").write_text(json.dumps(stored))
    special = {"image_token": words[GEMMA3_IMAGE], "boi_token": words[BEGIN], "eoi_token": words[END]}
    size = json.loads((out / "config.json").read_text())["vision_config"]["image_size"]
    Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": size, "width": size}),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(out, extra_special_tokens=special),
        image_seq_length=GEMMA3_SOFT_TOKENS,
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two different images."""
    from PIL import Image

    paths = []
    for seed in (1, 2):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = tmp_path_factory.getbasetemp() / f"image{seed}.png"
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BILINEAR).save(path)
        paths.append(path)
    return paths


def job(case: str, directory: Path, images: list[Path], placeholder: int, **arguments: Any) -> dict[str, Any]:
    """An engine that answers after each image."""
    vocab_size = json.loads((directory / "config.json").read_text())["text_config"]["vocab_size"]
    return {
        "name": case,
        "model": str(directory),
        "arguments": {
            "load_format": "maxtext",
            "model_loader_extra_config": {"checkpoint": str(cases()[case].items)},
            "skip_tokenizer_init": False,
            "max_logprobs": vocab_size,
            "max_model_len": 512,
            "max_num_batched_tokens": 512,
            "disable_chunked_mm_input": True,
            **arguments,
        },
        "prompts": [[*BEFORE, placeholder, *AFTER]] * len(images),
        "images": [str(image) for image in images],
        "vocab_size": vocab_size,
    }


@pytest.fixture(scope="module")
def answers(
    directory: Path, gemma3_directory: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the engines say after each image."""
    gemma4 = {
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
        "mm_processor_kwargs": {"max_soft_tokens": SOFT_TOKENS},
    }
    jobs = [
        job(CASE, directory, images, IMAGE, **gemma4),
        # vLLM's processor looks for the token that begins an image.
        job(GEMMA3, gemma3_directory, images, BEGIN, limit_mm_per_prompt={"image": 1}),
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
