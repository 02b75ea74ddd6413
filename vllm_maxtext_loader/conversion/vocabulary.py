"""Vocabulary rows that the configuration does not have: padding if they are zero, trained tokens if they are not.

Shapes cannot tell the two apart, so these rows are read, and no others.
"""

from __future__ import annotations

from vllm_maxtext_loader.checkpoint.rows import count_nonzero_rows
from vllm_maxtext_loader.checkpoint.tree import Tree
from vllm_maxtext_loader.conversion.plan import Plan
from vllm_maxtext_loader.errors import ConfigMismatchError


def refuse_used_rows(tree: Tree, plan: Plan) -> None:
    """Refuses a plan that drops vocabulary rows which are not zero.

    Args:
        tree: the checkpoint; rows past the plan's vocabulary are read, one row of chunks at a time.
        plan: for the vocabulary size that is to be served.

    Raises:
        ConfigMismatchError: with the leaf, both sizes and the number of rows that are not zero.
        ReadError: a chunk is missing, truncated or corrupt.
        StorageError: the storage refuses or does not answer.
    """
    for entry in plan.leaves:
        axis = entry.converter.padded_axis()
        if axis is None or entry.scan_axes:
            continue
        stored, kept = entry.leaf.shape[axis], entry.copies[0].sizes[entry.converter.padded or ""]
        if stored <= kept:
            continue
        if used := count_nonzero_rows(entry.leaf, tree.arrays, plan.where, axis, kept):
            raise ConfigMismatchError(
                f"{plan.where}: leaf {entry.leaf.key} has {stored} vocabulary rows, the configuration has vocab_size "
                f"{kept}, and {used} of the {stored - kept} rows past it are not zero. They are trained tokens, not "
                f"padding. Serve with a configuration whose vocab_size is {stored} (--model HF_DIR, the checkpoint in "
                f"--model-loader-extra-config), and with the tokenizer that has these tokens."
            )
