"""The file that an interrupted run goes on from: written whole or not at all, checked when read."""

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgetrack.errors import CheckpointError

__all__ = [
    "CHECKPOINT_NAME",
    "checkpoint_fits",
    "find_checkpoint",
    "read_checkpoint",
    "write_checkpoint",
]

CHECKPOINT_NAME = "checkpoint.pt"
_KEYS = {"recipe", "stage", "step", "model", "average", "optimizer", "rng"}
# What torch.load was seen to raise at damaged files.
_UNREADABLE = (EOFError, LookupError, OSError, RuntimeError, ValueError, pickle.UnpicklingError)


def find_checkpoint(folder: Path, *, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a run, if it has one.

    Args:
        folder: Folder of the run.
        recipe: The run's recipe, as JSON can hold it.

    Raises:
        CheckpointError: It belongs to another recipe, or is damaged.
    """
    if not (folder / CHECKPOINT_NAME).is_file():
        return None
    saved = read_checkpoint(folder)
    if saved["recipe"] != recipe:
        raise CheckpointError(
            f"{folder / CHECKPOINT_NAME}: expected a run of this recipe, got one of "
            f"{saved['recipe']['name']!r} with other settings; choose another --output, or delete "
            "the folder"
        )
    return saved


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the checkpoint of a run; nothing in it is executed.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    file = folder / CHECKPOINT_NAME
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: expected {CHECKPOINT_NAME}, got none; run: edgetrack train"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, where the file is no checkpoint
            saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # Not torch's own words: they advise to switch its safety off.
        raise CheckpointError(
            f"{file}: expected a checkpoint of edgetrack train, got a damaged or foreign file "
            f"({type(error).__name__}); delete it to start afresh"
        ) from error
    if not isinstance(saved, dict) or not saved.keys() >= _KEYS:
        raise CheckpointError(
            f"{file}: expected a checkpoint of edgetrack train, got another file; delete it to "
            "start afresh"
        )
    return saved


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace the checkpoint of a run; a kill meanwhile leaves the old one.

    Args:
        folder: Folder of the run.
        content: ``recipe``, ``stage``, ``step``, ``model``, ``average``, ``optimizer``, ``rng``.
    """
    assert content.keys() == _KEYS
    partial = folder / f".{CHECKPOINT_NAME}.partial"
    torch.save(content, partial)
    partial.replace(folder / CHECKPOINT_NAME)


@contextlib.contextmanager
def checkpoint_fits(folder: Path) -> Iterator[None]:
    """Say what it means if the weights of a run's checkpoint do not load in this block.

    Raises:
        CheckpointError: They did not.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CHECKPOINT_NAME}: expected weights of this version of the model, got: "
            f"{error}; train it again in another folder"
        ) from error
