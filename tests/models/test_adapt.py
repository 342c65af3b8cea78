import pytest
import torch
from torch.testing import assert_close

from edgetrack.models.adapt import adapt_weights


def test_positions_are_resized_bicubically() -> None:
    """Bicubic interpolation keeps a plane, away from the border."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    plane = (2 * rows + 3 * columns).reshape(1, 256, 1)
    weights = {"backbone.pos_embed_x": plane.expand(1, 256, 5)}

    adapted = adapt_weights(weights, {"backbone.pos_embed_x": torch.zeros(1, 64, 5)})

    small = adapted["backbone.pos_embed_x"].reshape(8, 8, 5)
    steps = torch.arange(8.0) * 2 + 0.5
    expected = 2 * steps[:, None] + 3 * steps[None]
    assert small.shape == (8, 8, 5)
    for channel in range(5):
        assert_close(small[1:-1, 1:-1, channel], expected[1:-1, 1:-1], atol=1e-4, rtol=0)


def test_a_correlation_over_more_cells_weighs_each_less() -> None:
    name = "correlation.mix.1.0.weight"
    weights = {name: torch.ones(3, 16, 3, 3), "correlation.mix.0.bias": torch.arange(16.0)}
    target = {name: torch.zeros(3, 64, 3, 3), "correlation.mix.0.bias": torch.zeros(64)}

    adapted = adapt_weights(weights, target)

    assert_close(adapted[name], torch.full((3, 64, 3, 3), 0.25))
    assert adapted["correlation.mix.0.bias"].shape == (64,)
    assert adapted["correlation.mix.0.bias"].mean() == pytest.approx(7.5)


def exit_weights(**exits: float) -> dict[str, torch.Tensor]:
    return {f"exits.{k[1:]}.cls.weight": torch.full((4,), v) for k, v in exits.items()}


def test_the_last_exit_stays_the_last() -> None:
    theirs = exit_weights(e0=0.0, e1=1.0) | {"exits.0.cls.weight": torch.zeros(9)}

    adapted = adapt_weights(theirs, {"exits.0.cls.weight": torch.zeros(4)})

    assert torch.equal(adapted["exits.0.cls.weight"], torch.ones(4))


def test_an_exit_that_fits_under_its_own_number_is_not_replaced() -> None:
    adapted = adapt_weights(exit_weights(e0=0.0, e1=1.0), {"exits.0.cls.weight": torch.ones(4)})

    assert torch.equal(adapted["exits.0.cls.weight"], torch.zeros(4))


def test_weights_that_mean_something_else_are_left_alone() -> None:
    weights = {"backbone.norm.weight": torch.ones(5), "other": torch.ones(2)}

    adapted = adapt_weights(weights, {"backbone.norm.weight": torch.ones(7)})

    assert adapted.keys() == weights.keys()
    assert all(torch.equal(adapted[k], weights[k]) for k in weights)
