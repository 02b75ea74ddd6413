"""The classes of errors, and what becomes of foreign names in their messages."""

from __future__ import annotations

import copy
import pickle

import pytest

from vllm_maxtext_loader import errors

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
]
STORAGE_FAULTS = {errors.CheckpointNotFoundError, errors.StorageError, errors.ReadError, errors.ServerError}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_storage_faults_are_os_errors_and_wrong_input_is_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.MaxTextLoadError)
    if kind is errors.MaxTextLoadError:
        assert not issubclass(kind, OSError | ValueError)
    else:
        assert issubclass(kind, OSError) == (kind in STORAGE_FAULTS)
        assert issubclass(kind, ValueError) != issubclass(kind, OSError)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_message_survives_pickling(kind: type[errors.MaxTextLoadError]) -> None:
    error = kind("gs://b/run: is damaged")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(twin), str(twin), twin.args) == (kind, "gs://b/run: is damaged", error.args)


def test_os_errors_take_one_argument_only() -> None:
    with pytest.raises(TypeError):
        errors.StorageError(2, "gs://b/run")  # type: ignore[call-arg]
    assert errors.StorageError("x").errno is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("decoder_norm.scale", "decoder_norm.scale"),
        ("größe × 2", "größe × 2"),
        ("a\nWARNING forged", r"a\nWARNING forged"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("a\ud800", r"a\ud800"),
    ],
)
def test_non_printable_characters_are_escaped(name: str, shown: str) -> None:
    assert errors.printable(name) == shown
    assert str(errors.ReadError(name)) == shown


@pytest.mark.parametrize("kind", [errors.ReadError, errors.StorageError, errors.TornWeightsError])
def test_error_of_another_process_is_restored(kind: type[errors.MaxTextLoadError]) -> None:
    described = errors.describe_error(kind("gs://b/run/100: what: is wrong"))
    restored = errors.restore_error(described, "tpu-3")
    assert type(restored) is kind
    assert str(restored) == "Host tpu-3: gs://b/run/100: what: is wrong"
    assert str(errors.restore_error(described)) == "gs://b/run/100: what: is wrong"


def test_error_of_another_class_becomes_one_of_ours() -> None:
    restored = errors.restore_error(errors.describe_error(RuntimeError("RESOURCE_EXHAUSTED")))
    assert type(restored) is errors.ReloadError
    assert str(restored) == "RuntimeError: RESOURCE_EXHAUSTED"
