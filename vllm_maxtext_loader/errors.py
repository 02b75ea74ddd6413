"""One named error per way a checkpoint can be unusable; all of them are `MaxTextLoadError`.

Storage faults are `OSError`s as well; wrong input and wrong configuration are `ValueError`s. A message names the path,
the leaf, what was expected and found, and what to do about it. All but `ReadError` and `IncompleteLoadError` are
raised from metadata, before any array data is read.
"""

from __future__ import annotations


class MaxTextLoadError(Exception):
    """A MaxText checkpoint cannot be loaded; the base of every error of this package."""


class _InputError(MaxTextLoadError, ValueError):
    """What was given is wrong: a path, a checkpoint's content, a configuration, an option."""


class _StorageFault(MaxTextLoadError, OSError):
    """What was given may be right; it could not be read."""


class CheckpointNotFoundError(_InputError):
    """Nothing exists at the given path or URL."""


class NotACheckpointError(_InputError):
    """The path exists but holds no Orbax PyTree checkpoint."""


class UncommittedCheckpointError(_InputError):
    """The checkpoint was never committed: its writer is still at work, or died."""


class StepNotFoundError(_InputError):
    """The requested step is not among the committed ones."""


class CorruptMetadataError(_InputError):
    """The checkpoint's metadata cannot be parsed or contradicts itself."""


class UnknownModelError(_InputError):
    """The tree is not one of the model families this package knows."""


class LayoutError(_InputError):
    """The layers cannot be placed: scan axes do not fit the shapes, or two readings fit."""


class MissingLeafError(_InputError):
    """The model needs tensors that no leaf of the checkpoint provides."""


class UnknownLeafError(_InputError):
    """The checkpoint has leaves the model has no place for."""


class WrongShapeError(_InputError):
    """A leaf's shape is not the one the model's configuration demands."""


class UnsupportedDtypeError(_InputError):
    """A leaf is stored in a dtype that is not a plain floating point one."""


class ConfigMismatchError(_InputError):
    """The Hugging Face configuration and the checkpoint's shapes contradict each other."""


class OptionError(_InputError):
    """An option or environment variable has an unknown key or an unusable value."""


class EngineError(_InputError):
    """The engine is set up in a way, or is of a version, this loader cannot serve."""


class IncompleteLoadError(_InputError):
    """After loading, a parameter of the engine did not come from the checkpoint, or a tensor was left over."""


class StorageError(_StorageFault):
    """The storage refused or did not answer: permissions, network, time limit."""


class ReadError(_StorageFault):
    """Array data could not be read: a missing, truncated or corrupt chunk."""


class HuggingFaceDirectoryError(_InputError):
    """A Hugging Face directory cannot be used: missing, damaged, incomplete, or in the way."""
