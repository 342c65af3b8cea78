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
        samples: Pairs to see.
        batch_size: Pairs per step.
        learning_rate: Peak rate; it rises linearly, then falls as a cosine.
        warmup_steps: Steps of the rise; a fifth of the stage at most.
        stem_rate: Factor on the rate of what was pretrained (``SegmentedModel.pretrained``).
        frozen_stem_share: First part of the stage in which the stem does not learn.
        weight_decay: On matrices and kernels; vectors have none.
        clip_norm: Largest norm of the gradient.
        ema_decay: Of the averaged weights, which are the ones that ship.
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

    def __post_init__(self) -> None:
        """Refuse a stage without steps."""
        for name in ("samples", "batch_size", "warmup_steps"):
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
        Recipe(
            name="early_exit_vit-smoke",
            model="early_exit_vit-tiny",
            stages=(
                Stage(objective="final_exit", samples=32, batch_size=8, warmup_steps=2),
                Stage(objective="shallow_exits", samples=16, batch_size=8, warmup_steps=2),
            ),
            num_synthetic_clips=2,
        ),
        # OSTrack's schedule: 300 epochs of 60,000 pairs, then 80 for the shallow exits.
        Recipe(
            name="early_exit_vit-base",
            model="early_exit_vit-base",
            stages=(
                Stage(
                    objective="final_exit",
                    samples=18_000_000,
                    batch_size=128,
                    learning_rate=4e-4,
                    stem_rate=0.1,
                    weight_decay=1e-4,
                    clip_norm=0.1,
                    ema_decay=0.9998,
                ),
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
            mix={"lasot": 1.0, "got10k": 1.0, "coco": 1.0, "trackingnet": 1.0},
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
