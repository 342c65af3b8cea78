"""Training runs as data: which model, how many samples, which rates.

A recipe is a sequence of stages, and each names its objective (see ``train.objectives``): what is
minimised, and what learns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetrack.models.registry import create_model
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.losses import LossWeights
from edgetrack.train.sampling import DEFAULT_MIX

__all__ = ["RECIPES", "Recipe", "Stage", "create_changed_model", "get_recipe"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
        objective: What it minimises: a name in ``train.objectives``.
        samples: Pairs to see, or runs of frames.
        batch_size: Pairs per step, or runs.
        learning_rate: Peak rate; it rises linearly, then falls as a cosine.
        warmup_steps: Steps of the rise; a fifth of the stage at most.
        stem_rate: Factor on the rate of what was pretrained (``SegmentedModel.pretrained``).
        frozen_stem_share: First part of the stage in which the stem does not learn.
        weight_decay: On matrices and kernels; vectors have none.
        clip_norm: Largest norm of the gradient.
        ema_decay: Of the averaged weights, which are the ones that ship.
        num_templates: Templates of each pair.
        num_frames: Frames of a run, for objectives that roll a tracker out; 0 gives pairs.
    """

    objective: str
    samples: int
    batch_size: int = 64
    learning_rate: float = 8e-4
    warmup_steps: int = 200
    stem_rate: float = 0.25
    frozen_stem_share: float = 0.0
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    num_templates: int = 1
    num_frames: int = 0

    def __post_init__(self) -> None:
        """Refuse a stage without steps."""
        for name in ("samples", "batch_size", "warmup_steps", "num_templates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        return max(self.samples // self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        name: What ``edgetrack train`` calls it.
        model: ``<family>-<variant>``.
        model_config: Changes to the variant's configuration.
        stages: In their order; one that has nothing to train in the model is left out.
        loss_weights: Of all terms.
        mix: Source of pairs → weight (see ``sampling.PairSampler``).
        num_synthetic_clips: Rendered clips that join the pack.
        calibration_clips: Clips of the training folder that are kept out of training, to choose
            the operating points on.
        autocast: Run the forward pass in bfloat16.
        seed: Of the weights and of the pairs.
    """

    name: str
    model: str
    stages: tuple[Stage, ...]
    model_config: Mapping[str, Any] = field(default_factory=dict)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    mix: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    num_synthetic_clips: int = 48
    calibration_clips: tuple[str, ...] = ()
    autocast: bool = True
    seed: int = 0

    def create_model(self) -> SegmentedModel:
        """The recipe's model, with random weights.

        Raises:
            ValueError: There is no such model, or a change does not fit.
        """
        return create_changed_model(self.model, self.model_config)


def create_changed_model(name: str, changes: Mapping[str, Any]) -> SegmentedModel:
    """A variant with changes to its configuration, and random weights.

    Raises:
        ValueError: There is no such variant, or a change does not fit.
    """
    model = create_model(name)
    return create_model(name, {**model.config_dict, **changes}) if changes else model


# Whole videos of the development training folder, so that no piece of one is trained on.
CALIBRATION_CLIPS = (
    "davis_camel",
    "davis_motocross-jump",
    "davis_parkour",
    "otb_Skiing_01",
    "otb_Skiing_02",
    "uav_car16_1_01",
    "uav_car16_1_02",
    "uav_car16_1_03",
)

# OSTrack's schedule: 300 epochs of 60,000 pairs, on four sets in equal parts.
_OSTRACK: dict[str, Any] = {
    "samples": 18_000_000,
    "batch_size": 128,
    "learning_rate": 4e-4,
    "stem_rate": 0.1,
    "weight_decay": 1e-4,
    "clip_norm": 0.1,
    "ema_decay": 0.9998,
}
_OSTRACK_MIX = {"lasot": 1.0, "got10k": 1.0, "coco": 1.0, "trackingnet": 1.0}
# FARTrack's: 500 epochs of 76,800 frames twice, then 20 epochs of 1,000 sequences.
_FARTRACK: dict[str, Any] = {
    "samples": 38_400_000,
    "batch_size": 256,
    "weight_decay": 1e-4,
    "clip_norm": 0.1,
    "ema_decay": 0.9998,
    "num_templates": 5,
}
# A reduced budget, minutes of one CPU core.
_LORETRACK_TINY: dict[str, Any] = {
    "samples": 9_600,
    "batch_size": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 30,
    "ema_decay": 0.99,
}
# This trunk's features have a mean square of 0.77; 0.8 has 3/4 of the target's cells above it, and
# 1 in 14 of the others.
_LORETRACK_TINY_WEIGHTS = LossWeights(target_energy=0.8)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # An hour of two CPU cores, from the weights of an earlier hour.
        Recipe(
            name="early_exit_vit-tiny",
            model="early_exit_vit-tiny",
            stages=(
                Stage(
                    objective="final_exit",
                    samples=320_000,
                    learning_rate=8e-4,
                    warmup_steps=300,
                    frozen_stem_share=0.7,
                    ema_decay=0.999,
                ),
                Stage(objective="shallow_exits", samples=80_000, learning_rate=1e-3),
            ),
            calibration_clips=CALIBRATION_CLIPS,
            seed=7,
        ),
        # From weights that track: twenty minutes of one CPU core.
        Recipe(
            name="early_exit_vit-tiny-tune",
            model="early_exit_vit-tiny",
            stages=(
                Stage(
                    objective="final_exit",
                    samples=24_000,
                    batch_size=32,
                    learning_rate=4e-4,
                    warmup_steps=50,
                    frozen_stem_share=0.5,
                ),
                Stage(objective="shallow_exits", samples=40_000, batch_size=32, learning_rate=1e-3),
            ),
            calibration_clips=CALIBRATION_CLIPS,
        ),
        # One GPU for twenty minutes.
        Recipe(
            name="early_exit_vit-tiny-gpu",
            model="early_exit_vit-tiny",
            stages=(
                Stage(
                    objective="final_exit",
                    samples=6_000_000,
                    batch_size=512,
                    learning_rate=2e-3,
                    warmup_steps=500,
                    frozen_stem_share=0.1,
                    ema_decay=0.9995,
                ),
                Stage(
                    objective="shallow_exits",
                    samples=1_000_000,
                    batch_size=512,
                    learning_rate=2e-3,
                    ema_decay=0.999,
                ),
            ),
            calibration_clips=CALIBRATION_CLIPS,
            num_synthetic_clips=96,
        ),
        # From the pretrained stem, as early_exit_vit-tiny: an hour of two CPU cores.
        Recipe(
            name="siamese_cnn-tiny",
            model="siamese_cnn-tiny",
            stages=(
                Stage(
                    objective="final_exit",
                    samples=320_000,
                    learning_rate=1e-3,
                    warmup_steps=300,
                    frozen_stem_share=0.7,
                    ema_decay=0.999,
                ),
                Stage(objective="shallow_exits", samples=80_000, learning_rate=1e-3),
            ),
            calibration_clips=CALIBRATION_CLIPS,
        ),
        Recipe(
            name="early_exit_vit-smoke",
            model="early_exit_vit-tiny",
            stages=(
                Stage(objective="final_exit", samples=32, batch_size=8, warmup_steps=2),
                Stage(objective="shallow_exits", samples=16, batch_size=8, warmup_steps=2),
            ),
            num_synthetic_clips=2,
        ),
        # From the weights of early_exit_vit-tiny: a reduced budget, minutes of one CPU core.
        Recipe(
            name="dytrack-tiny",
            model="dytrack-tiny",
            stages=(
                Stage(
                    objective="dytrack_branches",
                    samples=28_800,
                    batch_size=32,
                    learning_rate=8e-4,
                    frozen_stem_share=1.0,
                    ema_decay=0.99,
                ),
                Stage(
                    objective="dytrack_decisioners",
                    samples=9_600,
                    batch_size=32,
                    learning_rate=4e-4,
                    ema_decay=0.99,
                ),
            ),
            loss_weights=LossWeights(boxes_at="heatmap"),
            calibration_clips=CALIBRATION_CLIPS,
        ),
        # OSTrack's schedule, then 40 epochs for the decisioners.
        Recipe(
            name="dytrack-base",
            model="dytrack-base",
            stages=(
                Stage(objective="dytrack_branches", **_OSTRACK),
                Stage(
                    objective="dytrack_decisioners",
                    samples=2_400_000,
                    batch_size=128,
                    learning_rate=4e-4,
                    weight_decay=1e-4,
                    clip_norm=0.1,
                    ema_decay=0.9998,
                ),
            ),
            mix=_OSTRACK_MIX,
        ),
        # From the weights of early_exit_vit-tiny: a reduced budget, half an hour of one CPU core.
        Recipe(
            name="fartrack-micro",
            model="fartrack-micro",
            stages=(
                Stage(
                    objective="fartrack_frames",
                    samples=8_000,
                    batch_size=32,
                    learning_rate=8e-4,
                    frozen_stem_share=1.0,
                    ema_decay=0.99,
                    num_templates=5,
                ),
                Stage(
                    objective="fartrack_depths",
                    samples=52_000,
                    batch_size=32,
                    learning_rate=8e-4,
                    frozen_stem_share=1.0,
                    ema_decay=0.99,
                    num_templates=5,
                ),
                Stage(
                    objective="fartrack_rollout",
                    samples=240,
                    batch_size=4,
                    learning_rate=1e-4,
                    warmup_steps=10,
                    frozen_stem_share=1.0,
                    ema_decay=0.95,
                    num_templates=5,
                    num_frames=12,
                ),
            ),
            calibration_clips=CALIBRATION_CLIPS,
        ),
        # The published schedule; the exits 6, 10 and 15 are its Pico, Nano and Tiny.
        Recipe(
            name="fartrack-exits",
            model="fartrack-exits",
            stages=(
                Stage(objective="fartrack_frames", learning_rate=4e-4, stem_rate=0.1, **_FARTRACK),
                Stage(objective="fartrack_depths", learning_rate=4e-5, stem_rate=1.0, **_FARTRACK),
                Stage(
                    objective="fartrack_rollout",
                    learning_rate=4e-6,
                    stem_rate=0.1,
                    num_frames=32,
                    **{**_FARTRACK, "samples": 20_000, "batch_size": 64, "weight_decay": 0.05},
                ),
            ),
            mix=_OSTRACK_MIX,
        ),
        # From the weights of early_exit_vit-tiny: its final exit at a higher resolution.
        Recipe(
            name="loretrack-tiny-teacher",
            model="loretrack-tiny",
            model_config={"template_size_px": 96, "search_size_px": 192},
            stages=(Stage(objective="final_exit", **_LORETRACK_TINY),),
            calibration_clips=CALIBRATION_CLIPS,
        ),
        Recipe(
            name="loretrack-tiny",
            model="loretrack-tiny",
            stages=(Stage(objective="low_resolution", **_LORETRACK_TINY),),
            loss_weights=_LORETRACK_TINY_WEIGHTS,
            calibration_clips=CALIBRATION_CLIPS,
        ),
        # Distil into the final exit, then train the others.
        Recipe(
            name="early_exit_vit-tiny-loretrack",
            model="early_exit_vit-tiny",
            stages=(
                Stage(objective="low_resolution", **_LORETRACK_TINY),
                Stage(objective="shallow_exits", samples=4_000, batch_size=32, ema_decay=0.99),
            ),
            loss_weights=_LORETRACK_TINY_WEIGHTS,
            calibration_clips=CALIBRATION_CLIPS,
        ),
        # LoReTrack's teacher, and its students.
        Recipe(
            name="ostrack-384",
            model="ostrack-384",
            stages=(Stage(objective="center_exit", **_OSTRACK),),
            mix=_OSTRACK_MIX,
        ),
        Recipe(
            name="loretrack-base",
            model="loretrack-base",
            stages=(Stage(objective="low_resolution", **_OSTRACK),),
            mix=_OSTRACK_MIX,
        ),
        # On the frozen trunk of an imported OSTrack: a new final head, then the shallow exits.
        Recipe(
            name="early_exit_vit-base-imported",
            model="early_exit_vit-base",
            stages=(
                Stage(objective="final_head", **{**_OSTRACK, "samples": 4_800_000}),
                Stage(objective="shallow_exits", **{**_OSTRACK, "samples": 4_800_000}),
            ),
            mix=_OSTRACK_MIX,
        ),
        # OSTrack's schedule: 300 epochs of 60,000 pairs, then 80 for the shallow exits.
        Recipe(
            name="early_exit_vit-base",
            model="early_exit_vit-base",
            stages=(
                Stage(objective="final_exit", **_OSTRACK),
                Stage(
                    objective="shallow_exits",
                    samples=4_800_000,
                    batch_size=128,
                    learning_rate=4e-4,
                    weight_decay=1e-4,
                    clip_norm=0.1,
                    ema_decay=0.9998,
                ),
            ),
            mix=_OSTRACK_MIX,
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {sorted(RECIPES)}, got {name!r}")
    return RECIPES[name]
