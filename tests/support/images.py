"""Twins with a vision tower that take images: a tokenizer, an image processor, two images, and the engine's arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tiny_tokenizer import write_tokenizer

CASE = "moe_mm"
SOFT_TOKENS = 70
"""The fewest that Gemma 4's image processor makes of an image."""

IMAGE, BEGIN, END = 300, 303, 304
"""Token ids in the twin's config.json."""

VISION_TOKENS = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
AUDIO_TOKENS = {"audio_token": 302, "boa_token": 305, "eoa_token": 306}


GEMMA3 = "gemma3_mm"
GEMMA3_IMAGE, NEWLINES, GEMMA3_SOFT_TOKENS = 320, (310, 311, 312, 313), 256
"""The image's token id in the twin's config.json; ids for one to four newlines, which vLLM's processor looks for."""


def write_gemma4(twin: Path, out: Path) -> Path:
    """Gemma 4's twin with a tokenizer and an image processor, as a published repository has them."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
        PreTrainedTokenizerFast,
    )

    shutil.copytree(twin, out)
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


def write_gemma3(twin: Path, out: Path) -> Path:
    """Likewise, of Gemma 3."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    shutil.copytree(twin, out)
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


def write_images(directory: Path) -> list[Path]:
    """Two different images."""
    from PIL import Image

    paths = []
    for seed in (1, 2):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = directory / f"image{seed}.png"
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BILINEAR).save(path)
        paths.append(path)
    return paths


def engine_arguments(directory: Path) -> dict[str, Any]:
    """What an engine that answers after images is started with; `directory`: see `write_gemma4` and `write_gemma3`."""
    config = json.loads((directory / "config.json").read_text())
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "max_logprobs": config["text_config"]["vocab_size"],
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "disable_chunked_mm_input": True,
    }
    if config["model_type"] == "gemma3":
        return {**arguments, "limit_mm_per_prompt": {"image": 1}}
    return {
        **arguments,
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
        "mm_processor_kwargs": {"max_soft_tokens": SOFT_TOKENS},
    }
