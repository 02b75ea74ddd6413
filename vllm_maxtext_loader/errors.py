"""One named error per way a checkpoint can be unusable.

All of them are `MaxTextLoadError`. Storage faults are also `OSError`s, wrong input and configuration `ValueError`s.
A message names the path, the leaf, what was expected and found, and what to do about it.
All are raised from metadata, before any array data is read, except `ReadError`, `IncompleteLoadError`, where the
storage fails later, `StorageError`, for vocabulary rows that would be dropped, `ConfigMismatchError`, and
`TornWeightsError`. Every message is escaped here (`printable`).
"""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with its non-printable characters escaped ("\n", "\x1b", "\u202e"), for logs, messages and tables.

    Names in a checkpoint or a listing are foreign input: a line break forges a log line, ESC steers a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class MaxTextLoadError(Exception):
    """A MaxText checkpoint cannot be loaded; the base of every error of this package.

    Args:
        message: the whole message. The only argument: with two, an `OSError` takes the first for an errno.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointNotFoundError(MaxTextLoadError, OSError):
    """Nothing exists at the given path or URL."""


class NotACheckpointError(MaxTextLoadError, ValueError):
    """The path exists but holds no Orbax PyTree checkpoint."""


class UncommittedCheckpointError(MaxTextLoadError, ValueError):
    """The checkpoint was never committed: its writer is still at work, or died."""


class StepNotFoundError(MaxTextLoadError, ValueError):
    """The requested step is not among the committed ones."""


class CorruptMetadataError(MaxTextLoadError, ValueError):
    """The checkpoint's metadata cannot be parsed or contradicts itself."""


class OldLayoutError(MaxTextLoadError, ValueError):
    """An Orbax wrote the checkpoint that did not record tree metadata yet."""


class UnknownModelError(MaxTextLoadError, ValueError):
    """The tree is not one of the model families this package knows."""


class LayoutError(MaxTextLoadError, ValueError):
    """The layers cannot be placed: scan axes do not fit the shapes, or two readings fit."""


class MissingLeafError(MaxTextLoadError, ValueError):
    """The model needs tensors that no leaf of the checkpoint provides."""


class UnknownLeafError(MaxTextLoadError, ValueError):
    """The checkpoint has leaves the model has no place for."""


class WrongShapeError(MaxTextLoadError, ValueError):
    """A leaf's shape is not the one the model's configuration demands."""


class UnsupportedDtypeError(MaxTextLoadError, ValueError):
    """A leaf is stored in a dtype that is not a plain floating point one."""


class ConfigMismatchError(MaxTextLoadError, ValueError):
    """The Hugging Face configuration and the checkpoint's shapes contradict each other."""


class OptionError(MaxTextLoadError, ValueError):
    """An option is unknown or unusable: in `--model-loader-extra-config`, or an environment variable of ours."""


class EngineError(MaxTextLoadError, ValueError):
    """The engine is set up in a way, or is of a version, this loader cannot serve."""


class IncompleteLoadError(MaxTextLoadError, ValueError):
    """After loading, a parameter of the engine did not come from the checkpoint, or a tensor was left over."""


class StorageError(MaxTextLoadError, OSError):
    """The storage refused or did not answer: permissions, network, time limit."""


class ReadError(MaxTextLoadError, OSError):
    """Array data could not be read: a missing, truncated or corrupt chunk."""


class HuggingFaceDirectoryError(MaxTextLoadError, ValueError):
    """A Hugging Face directory cannot be used: missing, damaged, incomplete, or in the way."""


class TornWeightsError(MaxTextLoadError, ValueError):
    """An exchange of weights broke off half-way, and could not be completed: the engine must not answer."""


class ReloadError(MaxTextLoadError, ValueError):
    """Weights cannot be exchanged now: requests run, hosts disagree, memory is short, a server refuses a step."""


class ServerError(MaxTextLoadError, OSError):
    """A running server cannot be reached, does not answer in time, or fails."""


def describe_error(error: BaseException) -> str:
    """An error's class and message, for another process; see `restore_error`."""
    return f"{type(error).__name__}: {error}"


def restore_error(described: str, host: str | None = None) -> MaxTextLoadError:
    """The error of another process.

    Args:
        described: by `describe_error`. A class that is not of this package becomes a `ReloadError`.
        host: whose it is, to be named where there are several.
    """
    where = "" if host is None else f"Host {host}: "
    name, _, message = described.partition(": ")
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, MaxTextLoadError):
        return kind(where + message)
    return ReloadError(where + described)
