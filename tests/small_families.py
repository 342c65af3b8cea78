"""A small model of every family that prunes, with weights that exercise it."""

from collections.abc import Callable

import torch
from small_models import (
    DYTRACK_PATCH,
    DYTRACK_PRIOR,
    PATCH,
    PRIOR,
    make_dytrack,
    make_model,
    randomise_norms,
)
from torch import nn

from edgetrack.models.fartrack import FARTrack, FARTrackConfig
from edgetrack.models.ostrack import OSTrack, OSTrackConfig
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.siamese_cnn import SiameseCNN, SiameseCNNConfig

CNN = SiameseCNNConfig(
    template_size_px=32,
    search_size_px=64,
    correlation_dim=16,
    width=24,
    inner_width=16,
    depths=(1, 1, 2),
    head_channels=(16, 12),
)
_SMALL = {
    "template_size_px": 32,
    "search_size_px": 64,
    "dim": 32,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}


def make_cnn(config: SiameseCNNConfig = CNN, *, seed: int = 0) -> SiameseCNN:
    """A model in eval mode whose heads are sharp at some cells and flat at others."""
    torch.manual_seed(seed)
    model = SiameseCNN(config).eval()
    randomise_norms(model)
    for head in model.exits:
        nn.init.normal_(head.cls.weight, std=0.3)
        nn.init.normal_(head.edges.weight, std=1.0)
    return model


def _make(kind: type[SegmentedModel], config: object) -> SegmentedModel:
    torch.manual_seed(0)
    model = kind(config).eval()  # type: ignore[call-arg]  # every family takes its configuration
    randomise_norms(model)
    return model


FAMILIES: dict[str, Callable[[], SegmentedModel]] = {
    "early_exit_vit": lambda: make_model(PATCH),
    "early_exit_vit, prior": lambda: make_model(PRIOR),
    "dytrack": lambda: make_dytrack(DYTRACK_PATCH),
    "dytrack, prior": lambda: make_dytrack(DYTRACK_PRIOR),
    "ostrack": lambda: _make(OSTrack, OSTrackConfig(**_SMALL, head_channels=(16, 8))),
    "fartrack": lambda: _make(
        FARTrack, FARTrackConfig(**_SMALL, exit_after=(1, 2), selection_layers=1, num_bins=64)
    ),
    "siamese_cnn": make_cnn,
}
