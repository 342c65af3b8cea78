"""Training runs as data: which model, how many samples, which rates.

A recipe has two stages, after the source paper: the first trains the trunk and the final head,
the second freezes both and trains the bypass branches and shallow heads, with self-distillation
from the final head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetrack.train.losses import LossWeights
from edgetrack.train.sampling import DEFAULT_MIX

__all__ = ["RECIPES", "Recipe", "Stage", "get_recipe"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
        samples: Pairs to see.
        batch_size: Pairs per step.
        learning_rate: Peak rate; it rises linearly, then falls as a cosine.
        warmup_steps: Steps of the rise.
        stem_rate: Factor on the rate of a pretrained stem.
        frozen_stem_share: First part of the stage in which the stem does not learn.
        weight_decay: On matrices and kernels; vectors have none.
        clip_norm: Largest norm of the gradient.
        ema_decay: Of the averaged weights, which are the ones that ship.
    """

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
        stages: Stage 1 and stage 2.
        loss_weights: Of all terms.
        mix: Source of pairs → weight (see ``sampling.PairSampler``).
        num_synthetic_clips: Rendered clips that join the pack.
        autocast: Run the forward pass in bfloat16.
        seed: Of the weights and of the pairs.
    """

    name: str
    model: str
    stages: tuple[Stage, Stage]
    loss_weights: LossWeights = field(default_factory=LossWeights)
    mix: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    num_synthetic_clips: int = 48
    autocast: bool = True
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="early_exit_vit-tiny",
            model="early_exit_vit-tiny",
            stages=(
                Stage(samples=240_000, learning_rate=1e-3, frozen_stem_share=0.5),
                Stage(samples=48_000, learning_rate=1e-3),
            ),
        ),
        Recipe(
            name="early_exit_vit-smoke",
            model="early_exit_vit-tiny",
            stages=(
                Stage(samples=32, batch_size=8, warmup_steps=2),
                Stage(samples=16, batch_size=8, warmup_steps=2),
            ),
            num_synthetic_clips=2,
        ),
        # OSTrack's schedule: 300 epochs of 60,000 pairs, then 80 for the shallow exits.
        Recipe(
            name="early_exit_vit-base",
            model="early_exit_vit-base",
            stages=(
                Stage(
                    samples=18_000_000,
                    batch_size=128,
                    learning_rate=4e-4,
                    stem_rate=0.1,
                    weight_decay=1e-4,
                    clip_norm=0.1,
                    ema_decay=0.9998,
                ),
                Stage(
                    samples=4_800_000,
                    batch_size=128,
                    learning_rate=4e-4,
                    weight_decay=1e-4,
                    clip_norm=0.1,
                    ema_decay=0.9998,
                ),
            ),
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
