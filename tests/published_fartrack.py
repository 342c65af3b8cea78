"""FARTrack as its paper and released code describe it, written out slowly.

Functions of weights by their published names, in float64, and no module of ours: what ours computes
is compared with these.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from published_ostrack import normalised
from torch import Tensor

StateDict = dict[str, Tensor]


def fartrack_state_dict(
    *,
    dim: int,
    is_sparse: bool,
    num_blocks: int = 12,
    num_extensions: int = 3,
    template_tokens: int = 49,
    search_tokens: int = 196,
    bins: int = 300,
    seed: int = 0,
) -> StateDict:
    """Random weights under the names of a published checkpoint.

    Norms are near the identity and matrices keep the size of what they multiply, so that answers
    depend on all of them; command words are longer than the sparse release lets them be. Corners
    are mostly left and right of the middle, because boxes inside out are told apart by no tracker.
    """
    words = 2 * bins + 5
    shapes: dict[str, tuple[int, ...]] = {
        "identity": (1, 6, dim),
        "backbone.cls_token": (1, 1, dim),
        "backbone.pos_embed": (1, 197, dim),
        "backbone.output_bias": (words,),
        "backbone.pos_embed_z0": (1, template_tokens, dim),
        "backbone.pos_embed_z1": (1, template_tokens, dim),
        "backbone.pos_embed_x": (1, search_tokens, dim),
        "backbone.word_embeddings.weight": (words, dim),
        "backbone.position_embeddings.weight": (4, dim),
        "backbone.patch_embed.proj.weight": (dim, 3, 16, 16),
        "backbone.patch_embed.proj.bias": (dim,),
        "backbone.norm.weight": (dim,),
        "backbone.norm.bias": (dim,),
    }
    norms = ["norm1", "norm2"]
    if is_sparse:
        norms += ["masknorm1.norm", "masknorm2.norm"]
        shapes["backbone.pos_embed_z"] = (1, template_tokens, dim)
        shapes["backbone.prev_position_embeddings.weight"] = (12, dim)
    hidden = 4 * dim
    for stack, count in (("blocks", num_blocks), ("extension", num_extensions)):
        for index in range(count):
            block = f"backbone.{stack}.{index}"
            for norm in norms:
                shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
            for name, rows, columns in (
                ("attn.qkv", 3 * dim, dim),
                ("attn.proj", dim, dim),
                ("mlp.fc1", hidden, dim),
                ("mlp.fc2", dim, hidden),
            ):
                shapes |= {f"{block}.{name}.weight": (rows, columns)}
                shapes |= {f"{block}.{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    weights["backbone.output_bias"][-5:] = -9.0  # trained ones are never a special word
    places = torch.arange(words) / bins - 0.5
    commands = weights["backbone.position_embeddings.weight"]
    for rows, feature, place in ((slice(0, 2), 0, 0.35), (slice(2, 4), 1, 0.65)):
        commands[rows, feature] += 6.0
        bump = torch.exp(-(((places - place) / 0.1) ** 2))
        weights["backbone.word_embeddings.weight"][:, feature] += 3.0 * bump
    return weights


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * values
    if name.endswith("word_embeddings.weight"):
        return 1.5 * values * shape[1] ** -0.5
    if len(shape) > 1 and name.endswith("weight") and "position" not in name:
        return values * math.prod(shape[1:]) ** -0.5
    return 0.3 * values if len(shape) > 1 else 0.1 * values


def fartrack_logits(
    weights: StateDict,
    templates: Tensor,
    search_region: Tensor,
    *,
    num_layers: int,
    kept: list[list[int]] | None = None,
) -> Tensor:
    """Logits ``(B, 4, words)``: all tokens, those that were dropped hidden from attention.

    Args:
        weights: By their published names.
        templates: uint8 RGB ``(B, 5, H, H, 3)``, oldest first.
        search_region: uint8 RGB ``(B, S, S, 3)``.
        num_layers: Layers before the head, those of ``extension`` included.
        kept: Cells of each template that are left; by default all.
    """
    own = {name: value.double() for name, value in weights.items()}
    is_sparse = any("masknorm" in name for name in weights)
    norms = ("masknorm1.norm", "masknorm2.norm") if is_sparse else ("norm1", "norm2")
    eps = 1e-5 if is_sparse else 1e-6
    words = own["backbone.word_embeddings.weight"].clone()
    for row in range(len(words) - 5, len(words) - 1) if is_sparse else ():
        words[row] /= max(float(words[row].norm()), 1.0)  # max_norm=1 of what is looked up
    commands = words[-5:-1] + own["backbone.position_embeddings.weight"]
    answers = []
    for own_templates, search in zip(templates, search_region, strict=True):
        row = [
            _patches(own, template) + own["backbone.pos_embed_z0"][0] + own["identity"][0, slot]
            for slot, template in enumerate(own_templates)
        ]
        cells = len(row[0])
        x = _patches(own, search) + own["identity"][0, -1] + own["backbone.pos_embed_x"][0]
        tokens = torch.cat([*row, x, commands])
        hidden = torch.zeros(len(tokens), dtype=torch.float64)
        for slot, left in enumerate(kept or ()):
            gone = sorted(set(range(cells)) - set(left))
            hidden[[slot * cells + cell for cell in gone]] = -math.inf
        for layer in range(num_layers):
            block = _block_name(own, layer)
            normed = _norm(own, tokens, f"{block}.{norms[0]}", eps)
            tokens = tokens + _attention(own, normed, f"{block}.attn", hidden)
            normed = _norm(own, tokens, f"{block}.{norms[1]}", eps)
            tokens = tokens + _linear(
                own, F.gelu(_linear(own, normed, f"{block}.mlp.fc1")), f"{block}.mlp.fc2"
            )
        states = _norm(own, tokens[-4:], "backbone.norm", 1e-6)
        answers.append(states @ words.T + own["backbone.output_bias"])
    return torch.stack(answers)


def fartrack_box(logits: Tensor) -> list[float]:
    """Cxcywh of one sample's logits ``(4, words)``, normalised to the search region.

    Its last tracker's: the mean of the likeliest word's place and of the expected one.
    """
    coordinates = logits.shape[1] - 5
    bins = coordinates // 2
    corners = []
    for row in logits:
        word = int(row.argmax())
        probs = row[:coordinates].softmax(0).tolist()
        expected = sum(p * (-0.5 + k / bins) for k, p in enumerate(probs))
        corners.append((expected + (word + 0.5) / (bins - 1) - 0.5) / 2)
    x1, y1, x2, y2 = corners
    return [x1 + (x2 - x1) / 2, y1 + (y2 - y1) / 2, x2 - x1, y2 - y1]


def chosen_templates(count: int) -> list[int]:
    """Which of ``count`` templates its tracker puts into the five slots, oldest first."""
    if count < 5:
        return [max(0, slot - (5 - count)) for slot in range(5)]
    middle = [int((count - 1) * (1 - 0.7**i)) for i in range(1, 4)]
    return [0, *middle, count - 1]


def _block_name(weights: StateDict, layer: int) -> str:
    num_blocks = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("backbone.blocks."))
    if layer < num_blocks:
        return f"backbone.blocks.{layer}"
    return f"backbone.extension.{layer - num_blocks}"


def _patches(weights: StateDict, image: Tensor) -> Tensor:
    proj = "backbone.patch_embed.proj"
    pixels = normalised(image[None]).double()
    grid = F.conv2d(pixels, weights[f"{proj}.weight"], weights[f"{proj}.bias"], stride=16)
    return grid.flatten(2)[0].T


def _linear(weights: StateDict, x: Tensor, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: StateDict, x: Tensor, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(weights: StateDict, x: Tensor, name: str, hidden: Tensor) -> Tensor:
    heads = []
    for q, k, v in zip(
        *(part.split(64, dim=1) for part in _linear(weights, x, f"{name}.qkv").chunk(3, dim=1)),
        strict=True,
    ):
        heads.append((q @ k.T / 8 + hidden).softmax(1) @ v)
    return _linear(weights, torch.cat(heads, 1), f"{name}.proj")
