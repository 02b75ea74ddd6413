"""Generate text from a MaxText Gemma 4 checkpoint, in this process.

    python examples/offline.py                                  # the tiny checkpoint in tests/fixtures, on any machine
    python examples/offline.py gs://bucket/run/checkpoints google/gemma-4-26B-A4B-it --tensor-parallel-size 8

Without a TPU, set JAX_PLATFORMS=cpu (the first form sets it): tpu-inference then runs with plain JAX in place of its
TPU kernels. Correct but slow: for tests.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "tests" / "fixtures" / "moe_v2" / "checkpoints"
DEMO_CONFIG = ROOT / "tests" / "fixtures" / "hf" / "moe"


def main() -> None:
    """Loads the checkpoint and prints what the model generates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="local path or gs:// URL; default: the tiny demo checkpoint"
    )
    parser.add_argument("tokenizer", nargs="?", help="Hugging Face name or directory of the tokenizer")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=None)
    args = parser.parse_args()
    if args.checkpoint is not None and args.tokenizer is None:
        parser.error("a MaxText checkpoint holds no tokenizer: name one, e.g. google/gemma-4-26B-A4B-it")
    if args.checkpoint is None:
        demo(args.max_tokens)
        return

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.checkpoint,
        load_format="maxtext",
        tokenizer=args.tokenizer,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
    )
    for output in llm.generate([args.prompt], SamplingParams(temperature=0, max_tokens=args.max_tokens)):
        print(output.prompt + output.outputs[0].text)


def demo(max_tokens: int) -> None:
    """Loads a tiny checkpoint that MaxText wrote: 12 random layers with 8 experts, so its text means nothing."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    from tiny_tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        # No published Gemma 4 has these dimensions, so the configuration is given; a real model needs none.
        llm = LLM(
            model=str(DEMO_CONFIG),
            tokenizer=str(write_tokenizer(Path(directory), vocab_size=320)),
            load_format="maxtext",
            model_loader_extra_config={"checkpoint": str(DEMO)},
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=128,
        )
        prompts = ["tokens out of a checkpoint", "that MaxText wrote"]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
        for output in outputs:
            print(f"{output.prompt!r} -> {list(output.outputs[0].token_ids)} {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
