"""Weights that others published, mapped onto our models."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgetrack.errors import CheckpointError
from edgetrack.models.layers import ShuffleStem

__all__ = ["load_ostrack_trunk", "load_shuffle_stem"]

_UNUSED_BY_OSTRACK = ("cls_token", "pos_embed")


def load_ostrack_trunk(trunk: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the ``backbone.*`` keys of an OSTrack checkpoint into a ``patch`` trunk, unchanged.

    Its CENTER head (``box_head.*``) has no place in a General Distribution tracker and is left out.

    Args:
        trunk: ``EarlyExitViT.backbone`` of the ``base`` variant.
        state_dict: The checkpoint's network weights.

    Raises:
        CheckpointError: Keys are missing, unknown or of another shape; they are named, and
            nothing is loaded.
    """
    ours = trunk.state_dict()
    theirs = {
        key.removeprefix("backbone."): value
        for key, value in state_dict.items()
        if key.startswith("backbone.")
    }
    for key in _UNUSED_BY_OSTRACK:
        theirs.pop(key, None)
    foreign = [k for k in state_dict if not k.startswith(("backbone.", "box_head."))]
    missing = [f"backbone.{k}" for k in ours if k not in theirs]
    unknown = [f"backbone.{k}" for k in theirs if k not in ours] + foreign
    shapes = [
        f"backbone.{k} {tuple(theirs[k].shape)} instead of {tuple(v.shape)}"
        for k, v in ours.items()
        if k in theirs and theirs[k].shape != v.shape
    ]
    found = {"missing": missing, "unknown": unknown, "other shape": shapes}
    if problems := "; ".join(f"{k}: {', '.join(v)}" for k, v in found.items() if v):
        raise CheckpointError(
            f"OSTrack checkpoint: expected the keys of a ViT-B/16 trunk, got {problems}; "
            "use a checkpoint without candidate elimination layers of another size"
        )
    trunk.load_state_dict(theirs)


def load_shuffle_stem(stem: ShuffleStem, path: Path) -> None:
    """Load ShuffleNetV2 weights from an ``.npz`` of NanoDet's names, batch norm folded.

    Their input is BGR; the first kernel's channels are turned round, since ours is RGB.

    Args:
        stem: The stem.
        path: The file.

    Raises:
        CheckpointError: It cannot be read, or lacks keys; they are named.
    """
    try:
        # numpy opens other kinds of files too, and answers with something else than an archive
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            arrays = {k: torch.from_numpy(archive[k]) for k in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: expected an .npz of ShuffleNetV2, got: {error}") from error
    ours = stem.state_dict()
    if missing := [k for k in ours if k not in arrays or arrays[k].shape != ours[k].shape]:
        raise CheckpointError(f"{path}: expected ShuffleNetV2 1.0x, got no fitting {missing}")
    weights = {k: arrays[k].float() for k in ours}
    weights["stem.conv.weight"] = weights["stem.conv.weight"].flip(1)
    stem.load_state_dict(weights)
