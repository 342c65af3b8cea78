"""Weights of several runs as one model.

Model soups: Wortsman et al., ICML 2022, arXiv 2203.05482.
"""

from collections.abc import Sequence
from pathlib import Path

from edgetrack.errors import CheckpointError
from edgetrack.models.segmented import SegmentedModel
from edgetrack.train.loop import load_trained

__all__ = ["load_soup"]


def load_soup(runs: Sequence[Path]) -> SegmentedModel:
    """The mean of the weights of runs, in eval mode; of one run, its weights.

    Runs that went on from the same weights with other seeds stay close enough to be averaged; runs
    from random weights do not.

    Args:
        runs: Their folders; one at least, of one architecture.

    Raises:
        CheckpointError: One holds no checkpoint, a damaged one, or one of another architecture.
    """
    model, *others = map(load_trained, runs)
    mean = {name: value.double() / len(runs) for name, value in model.state_dict().items()}
    for run, other in zip(runs[1:], others, strict=True):
        if (other.family, other.config_dict) != (model.family, model.config_dict):
            raise CheckpointError(
                f"{run}: expected the architecture of {runs[0]}, got another; average runs of one "
                "recipe"
            )
        for name, value in other.state_dict().items():
            mean[name] += value.double() / len(runs)
    model.load_state_dict({k: mean[k].to(v.dtype) for k, v in model.state_dict().items()})
    return model
