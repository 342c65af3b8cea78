"""LoReTrack: a low-resolution student of a frozen high-resolution teacher.

Paper: "LoReTrack: Efficient and Accurate Low-Resolution Transformer Tracking", S. Dong, Y. Feng,
Q. Yang, Y. Lin, H. Fan; arXiv 2405.17660 (IROS 2025). Code: github.com/ShaohuaDong2021/LoReTrack
(MIT), whose training is the specification here: the network is its teacher's, at a lower
resolution, and all that is new lies in training (see ``train.objectives.low_resolution``). So this
family adds nothing to run time.

``base`` is OSTrack without candidate elimination and with a search factor of 5, as published.
``tiny`` is no model of the paper: the stem, trunk, prior and final exit of ``early_exit_vit-tiny``
with its other exits left out, because a patch embedding learns nothing from little data.
"""

import dataclasses

from edgetrack.models import early_exit_vit, ostrack
from edgetrack.models.early_exit_vit import EarlyExitViT, EarlyExitViTConfig
from edgetrack.models.ostrack import OSTrack, OSTrackConfig

__all__ = ["CONFIGS", "LoReTrack", "LoReTrackTiny"]

_PAPER = (
    "LoReTrack: Efficient and Accurate Low-Resolution Transformer Tracking, IROS 2025, "
    "arXiv 2405.17660"
)


class LoReTrack(OSTrack):
    """OSTrack at a low resolution."""

    family = "loretrack"
    paper = _PAPER


class LoReTrackTiny(EarlyExitViT):
    """The final exit of an ``early_exit_vit-tiny``, at any resolution."""

    family = "loretrack"
    paper = _PAPER


_TINY = early_exit_vit.CONFIGS["tiny"]
CONFIGS: dict[str, EarlyExitViTConfig | OSTrackConfig] = {
    "tiny": dataclasses.replace(_TINY, exit_after=_TINY.exit_after[-1:]),
    "base": dataclasses.replace(ostrack.CONFIGS["256"], search_factor=5.0),
}
