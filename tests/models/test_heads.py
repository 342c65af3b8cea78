import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.heads import (
    BypassBranch,
    CenterHead,
    CenterMaps,
    GeneralDistributionHead,
    center_boxes,
    decode_answer,
    decode_center,
    edge_distances,
    edge_entropy,
    hann_window,
    search_grid,
)

NUM_BINS = 17
BIN_SIZE = 1 / 16


def one_hot_logits(index: int) -> Tensor:
    logits = torch.zeros(1, 4, NUM_BINS)
    logits[..., index] = 1000.0
    return logits


def softmax_by_hand(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def decode_slowly(
    cls_logits: Tensor, edge_logits: Tensor, *, window: Tensor, bin_size: float
) -> list[tuple[list[float], float, float]]:
    """Twin of ``decode_answer``: sample by sample, cell by cell, edge by edge, in float64."""
    grid = int(len(window) ** 0.5)
    answers = []
    samples = zip(cls_logits.double().numpy(), edge_logits.double().numpy(), strict=True)
    for logits, edges in samples:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        best = 0
        for cell in range(len(scores)):
            if scores[cell] * float(window[cell]) > scores[best] * float(window[best]):
                best = cell
        centre_x, centre_y = (best % grid + 0.5) / grid, (best // grid + 0.5) / grid
        distances, entropies = [], []
        for edge in edges[best]:
            probs = softmax_by_hand(edge)
            distances.append(sum(k * p for k, p in enumerate(probs)) * bin_size)
            entropies.append(-sum(p * math.log(p) for p in probs) / math.log(len(probs)))
        left, top, right, bottom = distances
        x1, y1, x2, y2 = centre_x - left, centre_y - top, centre_x + right, centre_y + bottom
        bbox = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        answers.append((bbox, scores[best], sum(entropies) / 4))
    return answers


def test_entropy_of_a_uniform_distribution_is_one() -> None:
    entropy = edge_entropy(torch.full((2, 5, 4, NUM_BINS), 3.0))

    assert_close(entropy, torch.ones(2, 5, 4))


@pytest.mark.parametrize("index", [0, 8, NUM_BINS - 1])
def test_entropy_of_a_certain_edge_is_zero(index: int) -> None:
    assert_close(edge_entropy(one_hot_logits(index)), torch.zeros(1, 4))


def test_entropy_of_two_even_bins_is_ln_2_over_ln_17() -> None:
    logits = torch.full((1, 4, NUM_BINS), -1000.0)
    logits[..., 6:8] = 0.0

    entropy = edge_entropy(logits)

    assert_close(entropy, torch.full((1, 4), math.log(2) / math.log(17)))


@pytest.mark.parametrize("index", [0, 5, NUM_BINS - 1])
def test_a_certain_edge_lies_at_its_bin(index: int) -> None:
    distances = edge_distances(one_hot_logits(index), bin_size=BIN_SIZE)

    assert_close(distances, torch.full((1, 4), index / 16))


def test_an_edge_between_two_bins_lies_between_them() -> None:
    logits = torch.full((1, 4, NUM_BINS), -1000.0)
    logits[..., 3], logits[..., 4] = math.log(0.25), math.log(0.75)

    assert_close(edge_distances(logits, bin_size=BIN_SIZE), torch.full((1, 4), 3.75 / 16))


def test_the_window_is_ostracks() -> None:
    window = hann_window(16).reshape(16, 16)

    for row in (0, 4, 15):
        for column in (0, 7, 15):
            by_hand = math.prod(
                0.5 * (1 - math.cos(2 * math.pi * (k + 1) / 17)) for k in (row, column)
            )
            assert window[row, column] == pytest.approx(by_hand, abs=1e-6)
    assert (window > 0).all()


@pytest.mark.parametrize("grid", [3, 4, 16])
def test_decoding_equals_the_slow_twin(grid: int) -> None:
    generator = torch.Generator().manual_seed(grid)
    cls_logits = 3 * torch.randn(6, grid**2, generator=generator)
    edge_logits = 2 * torch.randn(6, grid**2, 4, NUM_BINS, generator=generator)
    window = hann_window(grid)

    answer = decode_answer(cls_logits, edge_logits, window=window, bin_size=BIN_SIZE)

    expected = decode_slowly(cls_logits, edge_logits, window=window, bin_size=BIN_SIZE)
    for name, values in zip(
        ("bbox_cxcywh", "score", "uncertainty"), zip(*expected, strict=True), strict=True
    ):
        assert_allclose(answer[name].numpy(), values, atol=FROM_TWIN["float32"])


def test_the_window_decides_which_cell_wins_but_not_its_score() -> None:
    cls_logits = torch.full((1, 9), -4.0)
    cls_logits[0, 0], cls_logits[0, 4] = 2.0, 1.0  # the corner is surer than the middle
    edge_logits = torch.zeros(1, 9, 4, NUM_BINS)

    answer = decode_answer(cls_logits, edge_logits, window=hann_window(3), bin_size=BIN_SIZE)

    assert_close(answer["bbox_cxcywh"][0, :2], torch.tensor([0.5, 0.5]))
    assert_close(answer["score"], torch.tensor([1.0]).sigmoid())


def test_an_answer_is_float32_whatever_the_maps_are() -> None:
    cls_logits, edge_logits = torch.randn(2, 9), torch.randn(2, 9, 4, NUM_BINS)

    answer = decode_answer(
        cls_logits.bfloat16(), edge_logits.bfloat16(), window=hann_window(3), bin_size=BIN_SIZE
    )

    assert {value.dtype for value in answer.values()} == {torch.float32}


@pytest.mark.parametrize("num_towers", [1, 2])
def test_maps_are_in_the_order_of_cells_edges_bins(num_towers: int) -> None:
    torch.manual_seed(0)
    head = GeneralDistributionHead((6, 8), num_bins=5, num_towers=num_towers).eval()
    features = torch.randn(2, 6, 3, 3)

    cls_logits, edge_logits = head(features)

    cls_map = head.cls(head.towers[0](features))
    edge_map = head.edges(head.towers[-1](features))
    for row in range(3):
        for column in range(3):
            cell = row * 3 + column
            assert_close(cls_logits[:, cell], cls_map[:, 0, row, column])
            for edge in range(4):
                bins = edge_map[:, 5 * edge : 5 * edge + 5, row, column]
                assert_close(edge_logits[:, cell, edge], bins)


def test_a_fresh_head_believes_in_one_cell_of_a_hundred() -> None:
    head = GeneralDistributionHead((6, 8), num_bins=5).eval()

    cls_logits, _ = head(torch.zeros(1, 6, 4, 4))

    assert cls_logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)


def test_a_bypass_branch_maps_the_search_tokens_row_by_row() -> None:
    torch.manual_seed(0)
    branch = BypassBranch(8, dim=12, num_heads=3, grid=3).eval()
    tokens = torch.randn(2, 4 + 9, 8)

    features = branch(tokens)

    mixed = branch.block(branch.reduce(tokens))
    by_hand = torch.empty(2, 12, 3, 3)
    for row in range(3):
        for column in range(3):
            by_hand[:, :, row, column] = mixed[:, 4 + 3 * row + column]
    assert_close(features, by_hand + branch.mix(by_hand))
    assert_close(search_grid(mixed, grid=3), by_hand)


def test_a_bypass_branch_relates_search_tokens_to_the_template() -> None:
    torch.manual_seed(0)
    branch = BypassBranch(8, dim=12, num_heads=3, grid=3).eval()
    tokens = torch.randn(1, 4 + 9, 8)
    other_template = tokens.clone()
    other_template[:, :4] = torch.randn(1, 4, 8)

    assert not torch.equal(branch(tokens), branch(other_template))


def test_a_bypass_branch_leaves_the_trunks_tokens_alone() -> None:
    branch = BypassBranch(8, dim=12, num_heads=3, grid=3)
    tokens = torch.randn(1, 4 + 9, 8)
    before = tokens.clone()

    branch(tokens)

    assert torch.equal(tokens, before)


def random_center_maps(*, batch: int = 3, grid: int = 6, seed: int = 0) -> CenterMaps:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(batch, grid**2, generator=generator).clamp(1e-4, 1 - 1e-4)
    offset = torch.randn(batch, grid**2, 2, generator=generator)
    return CenterMaps(score, offset, torch.rand(batch, grid**2, 2, generator=generator))


def test_a_center_heads_parameters_have_the_published_names_and_shapes() -> None:
    widths = (768, 256, 128, 64, 32)
    expected: dict[str, tuple[int, ...]] = {}
    for tower, out in (("ctr", 1), ("offset", 2), ("size", 2)):
        for k in range(4):
            name = f"conv{k + 1}_{tower}"
            expected[f"{name}.0.weight"] = (widths[k + 1], widths[k], 3, 3)
            for suffix in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
                expected[f"{name}.{suffix}"] = (widths[k + 1],)
            expected[f"{name}.1.num_batches_tracked"] = ()
        expected[f"conv5_{tower}.weight"] = (out, 32, 1, 1)
        expected[f"conv5_{tower}.bias"] = (out,)

    found = CenterHead(widths).state_dict()

    assert {name: tuple(value.shape) for name, value in found.items()} == expected


@torch.no_grad()
def test_a_center_heads_maps_are_its_towers_cell_by_cell() -> None:
    torch.manual_seed(0)
    head = CenterHead((8, 6, 4)).eval()
    features = 3 * torch.randn(2, 8, 5, 5)

    maps = head(features)

    found = {"ctr": maps.score[..., None], "offset": maps.offset, "size": maps.size}
    for name, values in found.items():
        tower = [head.get_submodule(f"conv{k}_{name}") for k in (1, 2, 3)]
        raw = tower[2](tower[1](tower[0](features)))
        bounded = raw if name == "offset" else raw.sigmoid().clamp(1e-4, 1 - 1e-4)
        for row in range(5):
            for column in range(5):
                assert_close(values[:, 5 * row + column], bounded[:, :, row, column])


@torch.no_grad()
def test_a_certain_center_score_stays_off_0_and_1_in_bfloat16() -> None:
    head = CenterHead((4, 4)).eval()
    for bias, expected in ((50.0, 1 - 1e-4), (-50.0, 1e-4)):
        head.get_submodule("conv2_ctr").bias.fill_(bias)  # type: ignore[operator]  # a tensor
        with torch.autocast("cpu", torch.bfloat16):
            maps = head(torch.zeros(1, 4, 3, 3))

        assert maps.score.dtype == torch.float32
        assert_close(maps.score, torch.full((1, 9), expected))


def test_decoding_center_maps_equals_the_slow_twin() -> None:
    maps, window = random_center_maps(), hann_window(6)

    answer = decode_center(maps, window=window)

    for b in range(3):
        weighed = [float(maps.score[b, cell] * window[cell]) for cell in range(36)]
        best = weighed.index(max(weighed))
        offset_x, offset_y = maps.offset[b, best].tolist()
        centre = [(best % 6 + offset_x) / 6, (best // 6 + offset_y) / 6]
        expected = torch.tensor([*centre, *maps.size[b, best].tolist()])
        assert_close(answer["bbox_cxcywh"][b], expected, atol=FROM_TWIN["float32"], rtol=0)
        assert answer["score"][b] == maps.score[b, best]


def test_the_window_chooses_among_equal_center_cells() -> None:
    maps = random_center_maps(batch=1)
    flat = maps._replace(score=torch.full_like(maps.score, 0.5))
    window = torch.zeros(36)
    window[20] = 1.0

    box = decode_center(flat, window=window)["bbox_cxcywh"]

    assert torch.equal(box, center_boxes(flat)[:, 20])
