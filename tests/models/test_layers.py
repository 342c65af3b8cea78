import math

import pytest
import torch
from tolerances import FROM_TWIN
from torch import Tensor, nn
from torch.testing import assert_close

from edgetrack.models.layers import Block, ConvNormAct, Normalise, PatchEmbed, box_coverage


def layer_norm_by_hand(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = tokens.mean(-1, keepdim=True)
    variance = ((tokens - mean) ** 2).mean(-1, keepdim=True)
    return (tokens - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def block_by_hand(block: Block, tokens: Tensor, *, num_heads: int) -> Tensor:
    """OSTrack's block, head by head and token by token."""
    batch, count, dim = tokens.shape
    width = dim // num_heads
    qkv = layer_norm_by_hand(tokens, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    mixed = torch.empty(batch, count, dim)
    for head in range(num_heads):
        columns = slice(head * width, (head + 1) * width)
        q, k, v = (qkv[..., dim * part : dim * part + dim][..., columns] for part in range(3))
        for sample in range(batch):
            for token in range(count):
                logits = (k[sample] @ q[sample, token]) * width**-0.5
                weights = logits.exp() / logits.exp().sum()
                mixed[sample, token, columns] = weights @ v[sample]
    tokens = tokens + mixed @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = layer_norm_by_hand(tokens, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return tokens + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_pixels_are_normalised_as_imagenets() -> None:
    image = torch.arange(2 * 3 * 2 * 3, dtype=torch.uint8).reshape(2, 3, 2, 3) * 7

    pixels = Normalise()(image)

    for channel, (mean, std) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        assert_close(pixels[:, channel], (image[..., channel] / 255 - mean) / std)


def test_coverage_equals_counted_points() -> None:
    grid, points = 4, 250
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.1, 0.9, 0.4, 0.6], [0.3, 0.2, 0.04, 0.02]])

    coverage = box_coverage(boxes, grid=grid).reshape(3, grid, grid)

    steps = (torch.arange(grid * points) + 0.5) / (grid * points)
    for box, shares in zip(boxes, coverage, strict=True):
        cx, cy, w, h = box.tolist()
        inside_x = ((steps - cx).abs() < w / 2).reshape(grid, points).float().mean(1)
        inside_y = ((steps - cy).abs() < h / 2).reshape(grid, points).float().mean(1)
        assert_close(shares, inside_y[:, None] * inside_x[None], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("bbox", "share"), [((0.5, 0.5, 1.0, 1.0), 1.0), ((2.0, 0.5, 0.5, 0.5), 0.0)]
)
def test_coverage_of_a_box_over_all_or_outside(bbox: tuple[float, ...], share: float) -> None:
    assert_close(box_coverage(torch.tensor([bbox]), grid=8), torch.full((1, 64), share))


def test_a_block_equals_the_slow_twin() -> None:
    torch.manual_seed(0)
    block = Block(12, 3, mlp_ratio=2.0).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    tokens = torch.randn(2, 7, 12)

    expected = block_by_hand(block, tokens, num_heads=3)

    assert_close(block(tokens), expected, atol=FROM_TWIN["float32"], rtol=0)


def test_drop_path_is_off_outside_training() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, mlp_ratio=2.0, drop_path=0.5).eval()
    tokens = torch.randn(2, 5, 8)

    assert torch.equal(block(tokens), block(tokens))


def test_drop_path_drops_a_whole_branch_of_a_sample_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, mlp_ratio=2.0, drop_path=0.25).train()
    nn.init.zeros_(block.mlp.fc2.weight)  # only the attention branch is left
    nn.init.zeros_(block.mlp.fc2.bias)
    tokens = torch.randn(1, 5, 8).expand(4000, 5, 8)
    branch = block.attn(block.norm1(tokens[:1]))

    added = block(tokens) - tokens

    dropped = (added == 0).all(-1).all(-1)
    assert_close(added[~dropped], (branch / 0.75).expand_as(added[~dropped]))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_patches_become_tokens_row_by_row() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(5, 4)
    image = torch.randn(1, 3, 8, 12)

    tokens = embed(image)

    patch = image[0, :, 4:8, 8:12]  # second row, third column
    by_hand = (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias
    assert_close(tokens[0, 3 + 2], by_hand)


@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 1, 6), (3, 2, 3), (1, 1, 6)])
def test_a_convolution_keeps_the_grid_up_to_its_stride(kernel: int, stride: int, side: int) -> None:
    layer = ConvNormAct(2, 4, kernel=kernel, stride=stride)

    out = layer(torch.randn(3, 2, 6, 6))

    assert out.shape == (3, 4, side, side)
    assert (out >= 0).all()
