"""OSTrack as its paper and released code describe it, written out slowly.

Functions of weights by their published names, and no module of ours: what ours computes is compared
with these.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

StateDict = dict[str, Tensor]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ostrack_state_dict(
    *,
    dim: int,
    depth: int,
    template_tokens: int,
    search_tokens: int,
    head_dim: int = 256,
    seed: int = 0,
) -> StateDict:
    """Random weights under the names of a published OSTrack checkpoint, CENTER head included.

    Norms are near the identity and matrices keep the size of what they multiply, so that answers
    depend on all of them.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.cls_token": (1, 1, dim),
        "backbone.pos_embed": (1, 197, dim),
        "backbone.pos_embed_z": (1, template_tokens, dim),
        "backbone.pos_embed_x": (1, search_tokens, dim),
        "backbone.patch_embed.proj.weight": (dim, 3, 16, 16),
        "backbone.patch_embed.proj.bias": (dim,),
        "backbone.norm.weight": (dim,),
        "backbone.norm.bias": (dim,),
    }
    hidden = 4 * dim
    for index in range(depth):
        block = f"backbone.blocks.{index}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", hidden, dim),
            ("mlp.fc2", dim, hidden),
        ):
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    widths = (dim, head_dim, head_dim // 2, head_dim // 4, head_dim // 8)
    for tower, outputs in (("ctr", 1), ("offset", 2), ("size", 2)):
        for layer in range(1, 5):
            conv, norm = f"box_head.conv{layer}_{tower}.0", f"box_head.conv{layer}_{tower}.1"
            shapes[f"{conv}.weight"] = (widths[layer], widths[layer - 1], 3, 3)
            shapes[f"{conv}.bias"] = (widths[layer],)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{norm}.{name}"] = (widths[layer],)
            shapes[f"{norm}.num_batches_tracked"] = ()
        shapes[f"box_head.conv5_{tower}.weight"] = (outputs, widths[4], 1, 1)
        shapes[f"box_head.conv5_{tower}.bias"] = (outputs,)
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    values = torch.randn(shape, generator=generator)
    is_norm = ".norm" in name or name.split(".")[-2] == "1"
    if name.endswith("running_var"):
        return values.abs() + 0.5
    if is_norm and name.endswith("weight"):
        return 1 + 0.1 * values
    if len(shape) > 1 and not name.endswith(("pos_embed_z", "pos_embed_x")):
        return values * math.prod(shape[1:]) ** -0.5
    return 0.1 * values


def ostrack_maps(
    weights: StateDict,
    template: Tensor,
    search_region: Tensor,
    *,
    num_heads: int,
    eliminate_at: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Score ``(B, 1, H, W)``, size and offset ``(B, 2, H, W)`` of uint8 crops ``(B, S, S, 3)``."""
    tokens = ostrack_search_tokens(
        weights,
        normalised(template),
        normalised(search_region),
        num_heads=num_heads,
        eliminate_at=eliminate_at,
    )
    side = math.isqrt(tokens.shape[1])
    features = tokens.permute(0, 2, 1).reshape(tokens.shape[0], -1, side, side)

    def tower(name: str) -> Tensor:
        x = features
        for layer in range(1, 5):
            conv, norm = (f"box_head.conv{layer}_{name}.{k}" for k in (0, 1))
            x = F.conv2d(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=1)
            mean, var = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
            x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
            x = x * weights[f"{norm}.weight"][:, None, None]
            x = torch.relu(x + weights[f"{norm}.bias"][:, None, None])
        last = f"box_head.conv5_{name}"
        return F.conv2d(x, weights[f"{last}.weight"], weights[f"{last}.bias"])

    score, size = (tower(name).sigmoid().clamp(1e-4, 1 - 1e-4) for name in ("ctr", "size"))
    return score, size, tower("offset")


def ostrack_box(score: Tensor, size: Tensor, offset: Tensor) -> list[float]:
    """Cxcywh of one sample's maps under the window, normalised to the search region."""
    side = score.shape[-1]
    hann = [0.5 * (1 - math.cos(2 * math.pi * k / (side + 1))) for k in range(1, side + 1)]
    rows = range(side)
    best = max(
        ((iy, ix) for iy in rows for ix in rows),
        key=lambda cell: hann[cell[0]] * hann[cell[1]] * float(score[0, cell[0], cell[1]]),
    )
    iy, ix = best
    centre = (ix + float(offset[0, iy, ix])) / side, (iy + float(offset[1, iy, ix])) / side
    return [*centre, float(size[0, iy, ix]), float(size[1, iy, ix])]


def normalised(image: Tensor) -> Tensor:
    """Uint8 ``(B, S, S, 3)`` → float ``(B, 3, S, S)``, as torchvision's transforms have it."""
    pixels = image.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def ostrack_search_tokens(
    weights: StateDict,
    template: Tensor,
    search_region: Tensor,
    *,
    num_heads: int,
    eliminate_at: tuple[int, ...] = (),
) -> Tensor:
    """The trunk: normalised pixels to search tokens behind the last norm; eliminated ones are 0."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"backbone.{name}.weight"].T + weights[f"backbone.{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"backbone.{name}.weight"], weights[f"backbone.{name}.bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale + shift

    def embed(pixels: Tensor, position: str) -> Tensor:
        proj = "backbone.patch_embed.proj"
        grid = F.conv2d(pixels, weights[f"{proj}.weight"], weights[f"{proj}.bias"], stride=16)
        return grid.flatten(2).transpose(1, 2) + weights[f"backbone.{position}"]

    depth = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("backbone.blocks."))
    z, x = embed(template, "pos_embed_z"), embed(search_region, "pos_embed_x")
    num_template, num_search = z.shape[1], x.shape[1]
    side = math.isqrt(num_template)
    # ce_utils.generate_mask_cond: slice(3, 4) of 8 cells, slice(5, 6) of 12
    middle = {8: 3, 12: 5}.get(side, (side - 1) // 2)
    rows = []
    for z_one, x_one in zip(z, x, strict=True):
        tokens, left = torch.cat([z_one, x_one]), list(range(num_search))
        for index in range(depth):
            block = f"blocks.{index}"
            qkv = linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv")
            q, k, v = (
                part.unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=-1)
            )
            attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            mixed = (attention @ v).transpose(0, 1).flatten(1)
            tokens = tokens + linear(mixed, f"{block}.attn.proj")
            if index in eliminate_at:
                rank = attention[:, middle * side + middle, num_template:].mean(0)
                order = rank.argsort(descending=True)[: math.ceil(0.7 * len(left))].tolist()
                left = [left[i] for i in order]
                tokens = torch.cat([tokens[:num_template], tokens[num_template:][order]])
            hidden = F.gelu(linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1"))
            tokens = tokens + linear(hidden, f"{block}.mlp.fc2")
        cells = torch.zeros(num_search, tokens.shape[1])
        cells[left] = norm(tokens, "norm")[num_template:]
        rows.append(cells)
    return torch.stack(rows)


def sample_target(
    frame: np.ndarray, bbox_xywh: list[float], *, factor: float, size_px: int
) -> tuple[np.ndarray, float]:
    """OSTrack's crop of a frame, padded a pixel too wide, and its resize factor."""
    x, y, w, h = bbox_xywh
    side = math.ceil(math.sqrt(w * h) * factor)
    left, top = round(x + 0.5 * w - side * 0.5), round(y + 0.5 * h - side * 0.5)
    right, bottom = left + side, top + side
    pads = (
        max(0, -top),
        max(bottom - frame.shape[0] + 1, 0),
        max(0, -left),
        max(right - frame.shape[1] + 1, 0),
    )
    cut = frame[top + pads[0] : bottom - pads[1], left + pads[2] : right - pads[3]]
    padded = cv2.copyMakeBorder(cut, *pads, cv2.BORDER_CONSTANT)
    return cv2.resize(padded, (size_px, size_px)), size_px / side


def map_box_back(
    box_cxcywh: list[float], state_xywh: list[float], *, size_px: int, resize_factor: float
) -> list[float]:
    """A box, normalised to the search region, in frame pixels, xywh."""
    cx, cy, w, h = (v * size_px / resize_factor for v in box_cxcywh)
    half = 0.5 * size_px / resize_factor
    x, y, state_w, state_h = state_xywh
    return [cx + x + 0.5 * state_w - half - 0.5 * w, cy + y + 0.5 * state_h - half - 0.5 * h, w, h]


def clip_box(box_xywh: list[float], *, height: int, width: int, margin: int = 10) -> list[float]:
    """A box kept in the frame, with sides of at least the margin."""
    x1, y1, w, h = box_xywh
    x2, y2 = x1 + w, y1 + h
    x1, x2 = min(max(0, x1), width - margin), min(max(margin, x2), width)
    y1, y2 = min(max(0, y1), height - margin), min(max(margin, y2), height)
    return [x1, y1, max(margin, x2 - x1), max(margin, y2 - y1)]
