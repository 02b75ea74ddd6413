"""One named error per way a checkpoint can be unusable; all of them are `MaxTextLoadError`, a `ValueError`.

A message names the path, the leaf, what was expected and found, and what to do about it.
All but `ReadError` are raised from metadata, before any array data is read.
"""

from __future__ import annotations


class MaxTextLoadError(ValueError):
    """A MaxText checkpoint cannot be loaded; the base of every error of this package."""


class CheckpointNotFoundError(MaxTextLoadError):
    """Nothing exists at the given path or URL."""


class NotACheckpointError(MaxTextLoadError):
    """The path exists but holds no Orbax PyTree checkpoint."""


class UncommittedCheckpointError(MaxTextLoadError):
    """The checkpoint was never committed: its writer is still at work, or died."""


class StepNotFoundError(MaxTextLoadError):
    """The requested step is not among the committed ones."""


class CorruptMetadataError(MaxTextLoadError):
    """The checkpoint's metadata cannot be parsed or contradicts itself."""


class UnknownModelError(MaxTextLoadError):
    """The tree is not one of the model families this package knows."""


class LayoutError(MaxTextLoadError):
    """The layers cannot be placed: scan axes do not fit the shapes, or two readings fit."""


class MissingLeafError(MaxTextLoadError):
    """The model needs tensors that no leaf of the checkpoint provides."""


class UnknownLeafError(MaxTextLoadError):
    """The checkpoint has leaves the model has no place for."""


class WrongShapeError(MaxTextLoadError):
    """A leaf's shape is not the one the model's configuration demands."""


class UnsupportedDtypeError(MaxTextLoadError):
    """A leaf is stored in a dtype that is not a plain floating point one."""


class ConfigMismatchError(MaxTextLoadError):
    """The Hugging Face configuration and the checkpoint's shapes contradict each other."""


class OptionError(MaxTextLoadError):
    """`--model-loader-extra-config` has an unknown key or an unusable value."""


class EngineError(MaxTextLoadError):
    """The engine is set up in a way, or is of a version, this loader cannot serve."""


class IncompleteLoadError(MaxTextLoadError):
    """After loading, a parameter of the engine did not come from the checkpoint, or a tensor was left over."""


class StorageError(MaxTextLoadError):
    """The storage refused or did not answer: permissions, network, time limit."""


class ReadError(MaxTextLoadError):
    """Array data could not be read: a missing, truncated or corrupt chunk."""


class HuggingFaceDirectoryError(MaxTextLoadError):
    """A Hugging Face directory cannot be used: missing, damaged, incomplete, or in the way."""
