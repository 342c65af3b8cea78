"""Models that are small enough to test with, and random weights that exercise them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from edgetrack.bundle import Bundle
from edgetrack.export import export_bundle
from edgetrack.models.dytrack import DyTrack, DyTrackConfig
from edgetrack.models.early_exit_vit import EarlyExitViT, EarlyExitViTConfig
from edgetrack.models.one_stream import TrunkConfig
from edgetrack.models.segmented import SegmentedModel

torch.set_num_threads(1)  # layers as small as these are slower on several

# OSTrack's kind of trunk. Drop path is on, so that training draws random numbers.
PATCH = EarlyExitViTConfig(
    template_size_px=32,
    search_size_px=64,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(1, 2),
    bypass_dim=16,
    bypass_heads=2,
    head_channels=(16,),
    shallow_head_channels=(16,),
    drop_path=0.1,
)
# The kind of ``tiny``: pretrained stem, correlation prior, an exit before any block, fine grid.
PRIOR = EarlyExitViTConfig(
    template_size_px=32,
    search_size_px=64,
    stem="shuffle",
    correlation_dim=16,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(0, 2, 3),
    bypass_dim=16,
    bypass_heads=2,
    head_channels=(16,),
    shallow_head_channels=(16,),
    num_towers=1,
    head_upsample=2,
    bin_size=1 / 26,
)

DYTRACK_PATCH = DyTrackConfig(
    template_size_px=32,
    search_size_px=64,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(1, 2, 3),
    head_channels=(16, 8),
)
DYTRACK_PRIOR = DyTrackConfig(
    template_size_px=32,
    search_size_px=64,
    stem="shuffle",
    correlation_dim=16,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(1, 3),
    head_channels=(16,),
    head_upsample=2,
)


def make_model(config: EarlyExitViTConfig, *, seed: int = 0) -> EarlyExitViT:
    """A model in eval mode that gives answers of every kind.

    Fresh heads are as unsure as can be, everywhere, and fresh batch norms do nothing; here the
    edges' distributions are sharp at some cells and flat at others, and norms count.
    """
    torch.manual_seed(seed)
    model = EarlyExitViT(config).eval()
    randomise_norms(model)
    for path in model.exits:
        nn.init.normal_(path.head.cls.weight, std=0.3)
        nn.init.normal_(path.head.edges.weight, std=1.0)
    return model


def make_dytrack(config: DyTrackConfig, *, seed: int = 0) -> DyTrack:
    """A model in eval mode whose branches are unlike and recycle, and whose boxes differ."""
    torch.manual_seed(seed)
    model = DyTrack(config).eval()
    randomise_norms(model)
    for branch in model.branches:
        if branch.recycle is not None:
            nn.init.normal_(branch.recycle.weight, std=0.2)
        nn.init.normal_(branch.decisioner[-1].weight, std=0.5)
    return model


def randomise_norms(model: SegmentedModel) -> None:
    """Statistics and weights of all norms as if they had been trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.1)


def make_inputs(config: TrunkConfig, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random crops and template boxes, by name."""
    generator = torch.Generator().manual_seed(seed)

    def image(side_px: int) -> Tensor:
        shape = (batch, side_px, side_px, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    centres = 0.4 + 0.2 * torch.rand(batch, 2, generator=generator)
    sizes = 0.3 + 0.3 * torch.rand(batch, 2, generator=generator)
    return {
        "template": image(config.template_size_px),
        "template_bbox_cxcywh": torch.cat([centres, sizes], 1),
        "search_region": image(config.search_size_px),
    }


def export_random(config: EarlyExitViTConfig, folder: Path, *, name: str) -> Bundle:
    """A bundle of ``make_model``, with one operating point."""
    thresholds = (0.5,) * (len(config.exit_after) - 1)
    return export_bundle(
        make_model(config),
        folder,
        name=name,
        operating_points={"balanced": thresholds},
        operating_point="balanced",
        provenance={"data": "none", "samples": 0},
        licence="none",
    )
