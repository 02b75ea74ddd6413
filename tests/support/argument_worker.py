"""Makes vLLM's configuration for many EngineArgs in one process, and writes down what came of each; no engine starts.

    python argument_worker.py JOBS.json ANSWERS.json

A job: {"name", "arguments": {…}, "again": {field: value}, "peer": directory}. `again` changes the same EngineArgs and makes a
second configuration ("second" in the answer). `peer` is the cache of another node: the ModelConfig is pickled, the first
node's directory removed, and the worker's first call made ("peer" in the answer).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

SMALL = {"load_format": "maxtext", "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128}


class Records(logging.Handler):
    """Keeps the messages of this package's loggers."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def contents(directory: str) -> dict[str, str]:
    """Text of every file of a directory, by name."""
    return {file.name: file.read_text() for file in Path(directory).iterdir()}


def facts(config: Any) -> dict[str, Any]:
    """What tests look at in a ModelConfig."""
    return {
        "model": config.model,
        "files": sorted(contents(config.model)),
        "served": config.served_model_name,
        "tokenizer": config.tokenizer,
        "experts": config.hf_text_config.num_experts,
        "vocab": config.get_vocab_size(),
        "stops": config.try_get_generation_config().get("eos_token_id"),
        "sampling": config.get_diff_sampling_param(),
    }


def on_peer(config: Any, cache: str) -> dict[str, Any]:
    """The ModelConfig as a worker on another node has it."""
    before = contents(config.model)
    copy = pickle.loads(pickle.dumps(config))
    shutil.rmtree(config.model)
    root, os.environ["VLLM_CACHE_ROOT"] = os.environ["VLLM_CACHE_ROOT"], cache
    try:
        copy.maybe_pull_model_tokenizer_for_runai(copy.model, copy.tokenizer)
        return {"same": contents(copy.model) == before, **facts(copy)}
    finally:
        os.environ["VLLM_CACHE_ROOT"] = root


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job's answer."""
    from vllm.engine.arg_utils import EngineArgs

    answer: dict[str, Any] = {}
    records = Records()
    logger = logging.getLogger("vllm.vllm_maxtext_loader")
    logger.addHandler(records)
    # vLLM's own level is set when an engine's configuration is made.
    logger.setLevel(logging.INFO)
    try:
        args = EngineArgs(**{**SMALL, **job["arguments"]})
        before = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
        config = args.create_model_config()
        answer |= facts(config)
        answer["left alone"] = all(getattr(args, name) is value for name, value in before.items())
        if "again" in job:
            answer["replaced"] = facts(dataclasses.replace(args, **job["again"]).create_model_config())
            for name, value in job["again"].items():
                setattr(args, name, value)
            answer["second"] = facts(args.create_model_config())
        if "peer" in job:
            answer["peer"] = on_peer(config, job["peer"])
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    finally:
        logger.removeHandler(records)
        answer["log"] = records.lines
    return answer


def main() -> None:
    """Runs all jobs."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = {job["name"]: run(job) for job in jobs}
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
