"""Weights that others published, mapped onto our models; nothing in their files is executed."""

import dataclasses
import math
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetrack.errors import CheckpointError
from edgetrack.models.coordinates import NUM_COMMANDS, NUM_SPECIAL_WORDS
from edgetrack.models.fartrack import FARTrack, FARTrackConfig
from edgetrack.models.layers import ShuffleStem
from edgetrack.models.loretrack import LoReTrack
from edgetrack.models.ostrack import CONFIGS, OSTrack, OSTrackConfig
from edgetrack.models.segmented import SegmentedModel

__all__ = [
    "PublishedCheckpoint",
    "load_fartrack",
    "load_ostrack",
    "load_shuffle_stem",
    "read_checkpoint",
]

# What torch.load was seen to raise at damaged files.
_UNREADABLE = (EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_UNUSED_BY_OSTRACK = ("backbone.cls_token", "backbone.pos_embed")
_PATCH_KEY = "backbone.patch_embed.proj.weight"
_PATCH_PX, _HEAD_DIM = 16, 64
_OSTRACK_KEYS = "OSTrack checkpoint: expected the keys of a ViT trunk and a CENTER head"
_FARTRACK_KEYS = (
    "FARTrack checkpoint: expected the keys of a ViT trunk, identities and a vocabulary"
)
_OF_SEQUENCES = "backbone.prev_position_embeddings.weight"
# What FARTrack's code makes and never reads.
_UNUSED_BY_FARTRACK = (
    "backbone.cls_token",
    "backbone.pos_embed",
    "backbone.pos_embed_z",
    "backbone.pos_embed_z1",
    _OF_SEQUENCES,
)
_FARTRACK_NAMES = {
    "identity": "identity",
    "backbone.pos_embed_z": "backbone.pos_embed_z0",
    "vocabulary.word_embeddings": "backbone.word_embeddings.weight",
    "vocabulary.position_embeddings": "backbone.position_embeddings.weight",
    "vocabulary.output_bias": "backbone.output_bias",
}
_MASKED_NORM_EPS = 1e-5


class _Inert:
    """Stands for an object of OSTrack's own training code: keeps what was stored, does nothing."""

    # Of the class: an object without attributes is made without ``__init__`` or ``__setstate__``.
    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


# Published checkpoints of this lineage carry these beside the weights. No code of theirs is run:
# they are names under which ``_Inert`` is put.
_INERT_NAMES = (
    "lib.train.admin.environment.EnvironmentSettings",
    "lib.train.admin.local.EnvironmentSettings",
    "lib.train.admin.settings.Settings",
    "lib.train.admin.stats.AverageMeter",
    "lib.train.admin.stats.StatValue",
    "_codecs.encode",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What a file of weights holds.

    Attributes:
        weights: By the names that they were published under.
        settings: What the training that wrote it says of itself; empty where it says nothing.
    """

    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> PublishedCheckpoint:
    """Read ``{"net": weights, ...}`` or bare weights; nothing in the file is executed.

    Raises:
        CheckpointError: It cannot be read, holds objects that only code could make, or no weights.
    """
    inert = [(_Inert, name) for name in _INERT_NAMES]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(inert):  # type: ignore[arg-type]  # its stub lacks the pairs
            warnings.simplefilter("ignore")  # of pickle protocols, where the file is no checkpoint
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own words: they advise to switch its safety off.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"an object of {named[1]!r}" if named else "a damaged or foreign file"
        raise CheckpointError(
            f"{path}: expected tensors alone, got {found}; loading it could run code, so save its "
            "weights again: torch.save({'net': model.state_dict()}, path)"
        ) from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint that torch.save wrote, got a damaged or foreign file "
            f"({type(error).__name__}); download it again"
        ) from error
    weights = content.get("net", content) if isinstance(content, dict) else content
    is_weights = isinstance(weights, dict) and all(isinstance(v, Tensor) for v in weights.values())
    if not is_weights or not weights:
        raise CheckpointError(
            f"{path}: expected weights by name, or under the key 'net', got {_description(content)}"
        )
    settings = content.get("settings")
    return PublishedCheckpoint(weights, settings.state if isinstance(settings, _Inert) else {})


def load_ostrack(
    checkpoint: PublishedCheckpoint,
    *,
    family: str = "ostrack",
    search_factor: float | None = None,
    is_eliminating: bool | None = None,
) -> OSTrack:
    """An OSTrack or a LoReTrack with published weights, unchanged.

    Sizes and widths are read off the weights. Two things are not in them: the search factor and
    whether candidates are eliminated. Where neither the caller nor the checkpoint's settings say,
    they are the family's own for that size (4 for OSTrack-256, else 5), and no.

    Args:
        checkpoint: With OSTrack's names.
        family: ``ostrack`` or ``loretrack``.
        search_factor: Window of the search region over the root of the target's area.
        is_eliminating: Whether candidates are eliminated, after blocks 3, 6 and 9.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: Keys are missing, unknown or of another shape; they are named.
    """
    weights = {k: v for k, v in checkpoint.weights.items() if k not in _UNUSED_BY_OSTRACK}
    config = _ostrack_config(weights, family=family)
    said_factor, said_eliminating = _said(checkpoint.settings)
    factor = search_factor or said_factor or config.search_factor
    eliminates = said_eliminating if is_eliminating is None else is_eliminating
    if eliminates and family == "loretrack":
        raise CheckpointError("LoReTrack checkpoint: expected no candidate elimination, which its "
                              "distillation cannot have, got it; use --family ostrack")  # fmt: skip
    config = dataclasses.replace(
        config,
        search_factor=float(factor),
        eliminate_at=CONFIGS["256-ce"].eliminate_at if eliminates else (),
    )
    model = {"ostrack": OSTrack, "loretrack": LoReTrack}[family](config)
    _load(model, weights, expected=_OSTRACK_KEYS)
    return model.eval()


def load_fartrack(
    checkpoint: PublishedCheckpoint, *, search_factor: float | None = None
) -> FARTrack:
    """A FARTrack with published weights, at its full depth and with one exit.

    Names, shapes and arithmetic are those of the three releases of github.com/MIV-XJTU/FARTrack:
    ``FARTrack``, ``FARTrackDistill`` and ``FARTrackSparse``. Of the last, the norms that its masked
    forward pass uses are loaded, ``masknorm``, and tokens are dropped; the two others keep all.
    Nano and Pico are the same weights cut short: ``cut(exit_after=(10,))`` and ``(6,)``.

    A frame's logits are those of the released code, given the templates and which of their tokens
    are left, and boxes and crops are those of its last tracker, ``FARTrackSparse``. Not its own are
    the choice of the tokens that are left, a bank that forgets, and that no coordinate is ever a
    special word: see ``fartrack``, ``template_bank`` and ``coordinates``.

    Args:
        checkpoint: With FARTrack's names.
        search_factor: Window of the search region over the root of the target's area; by default
            what the checkpoint's settings say, else 4.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: Keys are missing, unknown or of another shape; they are named.
    """
    weights = {k: v for k, v in checkpoint.weights.items() if k not in _UNUSED_BY_FARTRACK}
    is_sparse = _is_sparse(weights)
    if _OF_SEQUENCES in checkpoint.weights and not is_sparse:
        raise CheckpointError(
            f"{_FARTRACK_KEYS} of FARTrack, FARTrackDistill or FARTrackSparse, got {_OF_SEQUENCES} "
            "without masked norms, which is FARTrackSeq's; import the FARTrackSparse that was "
            "trained from it"
        )
    if is_sparse:
        weights = {k: v for k, v in weights.items() if not re.search(r"\.norm[12]\.", k)}
    config = _fartrack_config(weights)
    factor = search_factor or _said(checkpoint.settings)[0] or config.search_factor
    model = FARTrack(dataclasses.replace(config, search_factor=float(factor)))
    num_blocks = _count(weights, "blocks")

    def published(name: str) -> str:
        name = _FARTRACK_NAMES.get(name, name)
        if is_sparse:
            name = re.sub(r"\.norm([12])\.", r".masknorm\1.norm.", name)
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        if block is None or int(block[1]) < num_blocks:
            return name
        return f"backbone.extension.{int(block[1]) - num_blocks}.{name[block.end() :]}"

    weights["identity"] = weights["identity"][0]
    _load(model, weights, expected=_FARTRACK_KEYS, published=published)
    if is_sparse:
        # Its embedding layer shortens the words that it looks up, the commands, to a norm of 1.
        commands = slice(config.num_bins, config.num_bins + NUM_COMMANDS)
        model.vocabulary.word_embeddings.data[commands].renorm_(2, 0, 1.0)
    return model.eval()


def _ostrack_config(weights: Mapping[str, Tensor], *, family: str) -> OSTrackConfig:
    """The architecture that weights of OSTrack's names have."""
    convolutions = tuple(f"box_head.conv{layer}_ctr.0.weight" for layer in range(1, 5))
    trunk = _trunk_of(weights, _OSTRACK_KEYS, template="pos_embed_z", others=convolutions)
    is_ostrack_256 = (
        family == "ostrack" and trunk["search_size_px"] == CONFIGS["256"].search_size_px
    )
    return OSTrackConfig(
        **trunk,
        search_factor=CONFIGS["256" if is_ostrack_256 else "384"].search_factor,
        exit_after=(_count(weights, "blocks"),),
        head_channels=tuple(weights[name].shape[0] for name in convolutions),
    )


def _fartrack_config(weights: Mapping[str, Tensor]) -> FARTrackConfig:
    """The architecture that weights of FARTrack's names have."""
    others = ("identity", _FARTRACK_NAMES["vocabulary.word_embeddings"])
    trunk = _trunk_of(weights, _FARTRACK_KEYS, template="pos_embed_z0", others=others)
    identity, words = (weights[name] for name in others)
    if identity.ndim != 3 or len(identity) != 1 or words.ndim != 2:
        raise CheckpointError(
            f"{_FARTRACK_KEYS}, identity of (1, slots + 1, width) and words of (bins + "
            f"{NUM_SPECIAL_WORDS}, width), got {tuple(identity.shape)} and {tuple(words.shape)}"
        )
    is_sparse = _is_sparse(weights)
    depth = _count(weights, "blocks") + _count(weights, "extension")
    try:
        return FARTrackConfig(
            **trunk,
            exit_after=(depth,),
            selection_layers=min(FARTrackConfig.selection_layers, depth),
            num_templates=identity.shape[1] - 1,
            num_bins=len(words) - NUM_SPECIAL_WORDS,
            retention=FARTrackConfig.retention if is_sparse else 1.0,
            norm_eps=_MASKED_NORM_EPS if is_sparse else FARTrackConfig.norm_eps,
            geometry="ostrack",
        )
    except ValueError as error:
        raise CheckpointError(f"{_FARTRACK_KEYS}, got shapes that cannot be: {error}") from error


def _trunk_of(
    weights: Mapping[str, Tensor], expected: str, *, template: str, others: tuple[str, ...]
) -> dict[str, Any]:
    """Sizes and widths of a ViT trunk, as keywords of a ``TrunkConfig``.

    Args:
        weights: By published names.
        expected: How errors begin.
        template: The positions of template tokens.
        others: Names that the caller reads besides.
    """
    tables = (f"backbone.{template}", "backbone.pos_embed_x")
    read = (_PATCH_KEY, *tables, "backbone.blocks.0.mlp.fc1.weight")
    if missing := [k for k in (*read, *others) if k not in weights]:
        raise CheckpointError(f"{expected}, got no {', '.join(missing)}; got {_some(weights)}")
    sizes = []
    for name in tables:
        shape = tuple(weights[name].shape)
        if len(shape) != 3 or math.isqrt(shape[1]) ** 2 != shape[1]:
            raise CheckpointError(f"{expected}, {name} of (1, n * n, width), got {shape}")
        sizes.append(math.isqrt(shape[1]) * _PATCH_PX)
    patch, hidden = weights[_PATCH_KEY], weights[read[-1]]
    dim = len(patch) if patch.ndim else 0
    is_patch = dim > 0 and tuple(patch.shape) == (dim, 3, _PATCH_PX, _PATCH_PX)
    if not is_patch or dim % _HEAD_DIM or hidden.ndim != 2:
        raise CheckpointError(
            f"{expected}, {_PATCH_KEY} of (n * {_HEAD_DIM}, 3, {_PATCH_PX}, {_PATCH_PX}) and "
            f"matrices in the MLP, got {tuple(patch.shape)} and {tuple(hidden.shape)}"
        )
    return {
        "template_size_px": sizes[0],
        "search_size_px": sizes[1],
        "dim": dim,
        "num_heads": dim // _HEAD_DIM,
        "mlp_ratio": hidden.shape[0] / dim,
    }


def _count(weights: Mapping[str, Tensor], stack: str) -> int:
    """Blocks of ``backbone.<stack>``."""
    found = (re.match(rf"backbone\.{stack}\.(\d+)\.", name) for name in weights)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def _is_sparse(weights: Mapping[str, Tensor]) -> bool:
    """Whether they are those of ``FARTrackSparse``."""
    return any(".masknorm" in name for name in weights)


def _said(settings: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Search factor and candidate elimination, as the training's own settings have them."""
    factors, path = settings.get("search_area_factor"), settings.get("project_path")
    factor = factors.get("search") if isinstance(factors, dict) else None
    is_eliminating = isinstance(path, str) and "_ce_" in f"{path}_"
    return (factor if isinstance(factor, (int, float)) else None), is_eliminating


def _load(
    model: SegmentedModel,
    weights: Mapping[str, Tensor],
    *,
    expected: str,
    published: Callable[[str], str] = str,
) -> None:
    """Load all weights into all parameters.

    Args:
        model: Written.
        weights: By published names.
        expected: How errors begin.
        published: A parameter's name → its published name.
    """
    ours = model.state_dict()
    names = {published(name): name for name in ours}
    found = {
        "missing": [k for k in names if k not in weights],
        "unknown": [k for k in weights if k not in names],
        "other shape": [
            f"{k} {tuple(weights[k].shape)} instead of {tuple(ours[name].shape)}"
            for k, name in names.items()
            if k in weights and weights[k].shape != ours[name].shape
        ],
    }
    if problems := "; ".join(f"{k}: {', '.join(v)}" for k, v in found.items() if v):
        raise CheckpointError(f"{expected}, got {problems}")
    model.load_state_dict({name: weights[k] for k, name in names.items()})


def _description(content: object) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return _some(content) if content else "nothing"


def _some(names: Mapping[Any, object], *, count: int = 4) -> str:
    """A few of the keys, for a message."""
    shown = ", ".join(repr(k) for k in list(names)[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


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
