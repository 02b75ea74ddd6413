"""Looks into a checkpoint from a process of its own, for the process that will start the engine.

vLLM may start its EngineCore by fork(), and TensorStore aborts a forked process once its threads run. The front end needs a
few numbers from the metadata only: they are read by a short-lived child process, and the front end stays without threads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_maxtext_loader import errors
from vllm_maxtext_loader.checkpoint.storage.retry import TIMEOUT_VARIABLE, no_progress_seconds
from vllm_maxtext_loader.conversion.dims import ModelDims

_MARK = "vllm-maxtext-probe "

_LIMITS = 10
"""Every read gives up by itself after the time limit; the process ends after this many of them, whatever it hangs in."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the front end needs to know of a checkpoint.

    Attributes:
        items: path or URL of the item directory: the exact step, whatever is committed later.
        dims: the model's dimensions.
        tokenizer: local directory of the tokenizer, where `probe` was given a path or a gs:// URL of one.
        step: training step; None where no directory's name tells it.
        digest: see `Checkpoint.digest`.
        newest: whether the step was chosen as the newest one of a run.
    """

    items: str
    dims: ModelDims
    tokenizer: str | None = None
    step: int | None = None
    digest: str = ""
    newest: bool = False


def probe(
    source: str,
    step: int | None,
    *,
    trim: bool,
    model_name: str | None = None,
    tokenizer: str | None = None,
    cache: Path | None = None,
    draft: str | None = None,
) -> Probe:
    """Opens and plans a checkpoint in a child process.

    Args:
        source: path or URL, as `open_checkpoint` takes it.
        step: likewise.
        model_name: MaxText's name of the published model, or None.
        trim: do not count padded vocabulary rows; for when no configuration tells the vocabulary's size.
        tokenizer: what the user gave as tokenizer; a Hugging Face name is left alone.
        cache: directory below which a tokenizer from a bucket is stored.
        draft: what the user gave as draft model; likewise.

    Raises:
        MaxTextLoadError: what `open_checkpoint` raised there, by the same name.
        EngineError: `tokenizer` is a checkpoint, or a URL without a tokenizer (nothing of it was copied); or `draft` is a
            checkpoint.
    """
    request: dict[str, Any] = {"path": source, "step": step, "trim": trim, "model_name": model_name}
    if tokenizer is not None and _is_path(tokenizer):
        request |= {"tokenizer": tokenizer, "cache": str(cache)}
    if draft is not None and _is_path(draft):
        request["draft"] = draft
    found = _ask(request, source)
    return Probe(
        found["items"],
        ModelDims.from_json(found["dims"]),
        found.get("tokenizer"),
        found["step"],
        found["digest"],
        found["newest"],
    )


def check_vocabulary(items: str, vocab: int) -> None:
    """Reads the vocabulary rows past `vocab` in a child process.

    Raises:
        ConfigMismatchError: one of them is not zero.
        MaxTextLoadError: the checkpoint cannot be read.
    """
    _ask({"path": items, "step": None, "trim": False, "vocab": vocab}, items)


def no_tokenizer(where: str) -> errors.EngineError:
    """The error for a checkpoint without a tokenizer, or where a tokenizer should be."""
    return errors.EngineError(
        f"{where}: a MaxText checkpoint holds no tokenizer. Give one: --tokenizer google/gemma-4-26B-A4B-it "
        f"(or the name or directory that was used for training)."
    )


def _is_path(name: str) -> bool:
    """Whether this is a path or a gs:// URL; else it is a Hugging Face name, or a URL that vLLM knows to handle."""
    scheme, separator, _ = name.partition("://")
    if separator:
        return scheme.lower() in ("gs", "gcs", "file")
    return os.path.exists(os.path.expanduser(name))


def _ask(request: dict[str, Any], source: str) -> dict[str, Any]:
    """The child's answer to a request about `source`; raises what the child raised."""
    # -P: Python would put the current directory first on the child's path, and run a json.py that lies there.
    command = [sys.executable, "-P", "-m", "vllm_maxtext_loader.engine.probe"]
    seconds = _LIMITS * no_progress_seconds()
    try:
        # Its stderr is the terminal's: warnings are for the user.
        done = subprocess.run(
            command,
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise errors.EngineError(
            f"{source}: its metadata could not be read within {seconds:g} s. Check that the storage answers; "
            f"{TIMEOUT_VARIABLE} (seconds) raises the limit."
        ) from error
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        raise errors.EngineError(
            f"{source}: its metadata could not be read: the process that reads it ended with code {done.returncode}; "
            f"its messages are above."
        )
    found = json.loads(lines[-1].removeprefix(_MARK))
    if "error" in found:
        kind = getattr(errors, found["error"], errors.MaxTextLoadError)
        raise kind(found["message"])
    return found


def answer() -> None:
    """The child process: a request on stdin, one marked line on stdout."""
    request = json.load(sys.stdin)
    try:
        found = _look(request)
    except errors.MaxTextLoadError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print(_MARK + json.dumps(found), flush=True)


def _look(request: dict[str, Any]) -> dict[str, Any]:
    from vllm_maxtext_loader.api import open_checkpoint
    from vllm_maxtext_loader.conversion.plan import make_plan
    from vllm_maxtext_loader.conversion.vocabulary import refuse_used_rows

    checkpoint = open_checkpoint(request["path"], step=request["step"], model_name=request.get("model_name"))
    dims = (checkpoint.trimmed_plan() if request["trim"] else checkpoint.plan).dims
    if "vocab" in request:
        plan = make_plan(checkpoint.tree, checkpoint.plan.family, dims.with_sizes(vocab=request["vocab"]))
        refuse_used_rows(checkpoint.tree, plan)
    location = checkpoint.location
    found: dict[str, Any] = {
        "items": location.items.url,
        "step": location.step,
        "dims": dims.to_json(),
        "digest": checkpoint.digest,
        "newest": request["step"] is None and location.is_of_run,
    }
    if "draft" in request:
        from vllm_maxtext_loader.engine.tokenizer import refuse_checkpoint_as_draft

        refuse_checkpoint_as_draft(request["draft"])
    if "tokenizer" in request:
        from vllm_maxtext_loader.engine.tokenizer import local_tokenizer

        found["tokenizer"] = local_tokenizer(request["tokenizer"], checkpoint.location, request["cache"])
    return found


if __name__ == "__main__":
    # vLLM sets up logging in its own processes only. Which directories were passed over is logged as INFO.
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())
    answer()
