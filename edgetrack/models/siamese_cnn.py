"""Siamese convolutional tracker with General Distribution heads and exits after its stages.

A house model, not one paper's: the CNN of the comparison that "On Designing Light-Weight Object
Trackers Through Network Pruning: Use CNNs or Transformers?" (Aggarwal et al., ICASSP 2023, arXiv
2211.13769) makes. From the literature come the siamese trunk and the correlation of template and
search features (SiamFC: Bertinetto et al., ECCV 2016 workshops, arXiv 1606.09549), bottlenecks with
a residual (He et al., CVPR 2016, arXiv 1512.03385), a ShuffleNetV2 stem, and box edges as General
Distributions (see ``heads``).

Template and search region meet once, in maps of cosine similarity at stride 8; all that follows is
convolutions on the search region's grid. The first stage works on fine features alone, so that
easy frames pay neither for the coarser half of the stem nor for the stages behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgetrack.bundle import CropSpec
from edgetrack.models.general_distribution import GeneralDistributionModel
from edgetrack.models.heads import GeneralDistributionHead, hann_window
from edgetrack.models.layers import BatchNorm2d, ConvNormAct, Normalise, ShuffleStem
from edgetrack.models.segmented import State
from edgetrack.models.trunk import MAP_CHANNELS, CorrelationMaps
from edgetrack.models.units import Units, channels_between

__all__ = ["CONFIGS", "SiameseCNN", "SiameseCNNConfig"]

FINE_STRIDE, COARSE_STRIDE = 8, 16


@dataclass(frozen=True, kw_only=True)
class SiameseCNNConfig:
    """Architecture of a ``SiameseCNN``.

    Attributes:
        template_size_px: Side of the template crop.
        template_factor: Its window over the root of the target's area.
        search_size_px: Side of the search region.
        search_factor: Its window over the root of the target's area.
        correlation_dim: Width of the features that are correlated.
        width: Channels between the bottlenecks.
        inner_width: Channels inside one.
        depths: Bottlenecks per stage; an exit follows each stage.
        head_channels: Widths of each head's convolutions.
        num_bins: Bins per edge.
        bin_size: Width of a bin as a share of the search region.
    """

    template_size_px: int = 64
    template_factor: float = 2.0
    search_size_px: int = 128
    search_factor: float = 4.0
    correlation_dim: int = 64
    width: int = 128
    inner_width: int = 64
    depths: tuple[int, ...] = (2, 2, 3)
    head_channels: tuple[int, ...] = (64,)
    num_bins: int = 17
    bin_size: float = 1 / 26

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("template_size_px", "search_size_px"):
            value = getattr(self, name)
            if value < COARSE_STRIDE or value % COARSE_STRIDE:
                raise ValueError(f"{name}: expected a multiple of {COARSE_STRIDE}, got {value}")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths: expected at least 1 for every stage, got {self.depths}")


CONFIGS: dict[str, SiameseCNNConfig] = {"tiny": SiameseCNNConfig()}


class Bottleneck(nn.Module):
    """Narrow, convolve, widen, add."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.enter = ConvNormAct(width, inner_width, kernel=1)
        self.mix = ConvNormAct(inner_width, inner_width)
        self.leave = nn.Sequential(nn.Conv2d(inner_width, width, 1, bias=False), BatchNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, C, H, W)`` → features of the same shape."""
        return nn.functional.relu(features + self.leave(self.mix(self.enter(features))))

    def prunable_units(self) -> tuple[Units, ...]:
        """The inner channels; those between bottlenecks stay, as in the paper's ResNets."""
        return (
            channels_between(self, "enter", ("mix.0",)),
            channels_between(self, "mix", ("leave.0",)),
        )


class Trunk(nn.Module):
    """Stem and stages.

    Args:
        config: The architecture.
    """

    def __init__(self, config: SiameseCNNConfig) -> None:
        super().__init__()
        fine, coarse = ShuffleStem.channels
        self.normalise = Normalise()
        self.stem = ShuffleStem()
        self.reduce = ConvNormAct(fine + MAP_CHANNELS, config.width, kernel=1)
        spread = COARSE_STRIDE // FINE_STRIDE
        self.join = nn.Sequential(
            nn.Conv2d(coarse, config.width * spread**2, 1), nn.PixelShuffle(spread)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Bottleneck(config.width, config.inner_width) for _ in range(depth)))
            for depth in config.depths
        )

    def fine(self, image: Tensor) -> Tensor:
        """Pixels ``(B, H, W, 3)`` → features at stride 8."""
        return self.stem.fine(self.normalise(image))

    def joined(self, features: Tensor, fine: Tensor) -> Tensor:
        """Add the coarser half of the stem to the first stage's features."""
        return nn.functional.relu(features + self.join(self.stem.coarse(fine)))


class SiameseCNN(GeneralDistributionModel):
    """Convolutional tracker that may stop after any of its stages.

    Args:
        config: The architecture.
    """

    family = "siamese_cnn"
    paper = (
        "A house model after SiamFC, arXiv 1606.09549; the CNN of a comparison after "
        "On Designing Light-Weight Object Trackers Through Network Pruning, arXiv 2211.13769"
    )
    config_class = SiameseCNNConfig
    config: SiameseCNNConfig

    def __init__(self, config: SiameseCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.num_exits = len(config.depths)
        self.crops = CropSpec(
            template_size_px=config.template_size_px,
            template_factor=config.template_factor,
            search_size_px=config.search_size_px,
            search_factor=config.search_factor,
        )
        self.backbone = Trunk(config)
        self.correlation = CorrelationMaps(
            ShuffleStem.channels[0],
            dim=config.correlation_dim,
            template_grid=config.template_size_px // FINE_STRIDE,
        )
        self.exits = nn.ModuleList(
            GeneralDistributionHead(
                (config.width, *config.head_channels), num_bins=config.num_bins, num_towers=1
            )
            for _ in config.depths
        )
        window = hann_window(config.search_size_px // FINE_STRIDE)
        self.register_buffer("window", window, persistent=False)
        self.bin_size = config.bin_size

    def stem_requires_grad(self, is_trained: bool) -> None:
        """Freeze the stem, or let it learn."""
        self.backbone.stem.requires_grad_(is_trained)

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        """The template's cells as correlation kernels."""
        fine = self.backbone.fine(template)
        return {"correlation_kernel": self.correlation.kernel(fine, template_bbox_cxcywh)}

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        """Names of the tensors that a segment reads."""
        if index == 0:
            return "search_region", "correlation_kernel"
        joins = ("fine_features",) if index == 1 else ()
        return (f"features_{index - 1}", *joins)

    def run_trunk(self, index: int, state: Mapping[str, Tensor]) -> State:
        """A stage: ``features_<index>``, and the first one's ``fine_features``."""
        written: State = {}
        if index == 0:
            fine = self.backbone.fine(state["search_region"])
            maps = self.correlation.maps(fine, state["correlation_kernel"])
            features = self.backbone.reduce(torch.cat([fine, maps], 1))
            if self.num_exits > 1:
                written["fine_features"] = fine
        else:
            features = state[f"features_{index - 1}"]
        if index == 1:
            features = self.backbone.joined(features, state["fine_features"])
        return written | {f"features_{index}": self.backbone.stages[index](features)}

    def exit_logits(self, index: int, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Maps of one exit from what the trunk wrote.

        Returns:
            Score logits ``(B, HW)`` and edge logits ``(B, HW, 4, K)``.
        """
        maps: tuple[Tensor, Tensor] = self.exits[index](state[f"features_{index}"])
        return maps

    def prunable_units(self) -> tuple[Units, ...]:
        """The channels of the correlation maps; modules list their own."""
        return (self.correlation.map_units({"backbone.reduce.0": ShuffleStem.channels[0]}),)
