"""What `vllm serve` takes on a TPU where the user says nothing. Written against vLLM 0.32.0."""

from __future__ import annotations

UTILIZATION = 0.92
"""--gpu-memory-utilization. Source: config/cache.py."""

SEQUENCES = 256
"""--max-num-seqs. Source: engine/arg_utils.py, `get_batch_defaults`."""

BATCHED_TOKENS = 2048
"""--max-num-batched-tokens. Source: likewise; it knows no TPU by the name that tpu-inference 0.32.0 gives."""

CONCURRENT_BATCHES = 2
"""Batches under way, with asynchronous scheduling. Source: config/vllm.py, `max_concurrent_batches`."""
