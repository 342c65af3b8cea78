"""Weights of one model as a start for another: other resolutions, other exits.

What lies on a grid of cells is resized with it: positions bicubically, as OSTrack makes its own
from a pretrained trunk's; a correlation prior's template cells bilinearly.
"""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

__all__ = ["adapt_weights"]

_EXITS = "exits."
_POSITIONS = ("pos_embed_z", "pos_embed_x")
_CELL_NORM = "correlation.mix.0."
_CELL_KERNEL = "correlation.mix.1.0.weight"


def adapt_weights(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make weights fit another model where that means the same.

    Args:
        weights: Of any model.
        target: The state of the model to start, for its names and shapes; not written to.

    Returns:
        The same weights: positions and template cells resized to the target's grids, and the last
        exit under the number of the target's last, unless that number's own exit fits. All else,
        fitting or not, as it was.
    """
    source, end = _last_exit(weights), _last_exit(target)
    is_moved = not _fits(weights, end, target, end) and _fits(weights, source, target, end)
    adapted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if is_moved and name.startswith(end):
            continue
        if is_moved and name.startswith(source):
            name = end + name.removeprefix(source)
        adapted[name] = _resized(name, value, target[name]) if name in target else value
    return adapted


def _last_exit(weights: Mapping[str, Tensor]) -> str:
    """Prefix of the last exit's names, such as ``exits.2.``; that of none is ``exits.``."""
    numbers = {int(name.split(".")[1]) for name in weights if name.startswith(_EXITS)}
    return f"{_EXITS}{max(numbers)}." if numbers else _EXITS


def _fits(
    weights: Mapping[str, Tensor], source: str, target: Mapping[str, Tensor], end: str
) -> bool:
    """Whether all of one exit's weights are there under another prefix, in the same shapes."""
    pairs = [(source + n.removeprefix(end), v) for n, v in target.items() if n.startswith(end)]
    return all(name in weights and weights[name].shape == value.shape for name, value in pairs)


def _resized(name: str, value: Tensor, target: Tensor) -> Tensor:
    if value.shape == target.shape or value.ndim != target.ndim:
        return value
    if name.endswith(_POSITIONS) and value.shape[2] == target.shape[2]:
        grid = _on_grid(value.transpose(1, 2), side=math.isqrt(target.shape[1]), mode="bicubic")
        return grid.transpose(1, 2)
    if _CELL_NORM in name:
        return _on_grid(value[None, None], side=math.isqrt(target.shape[0]), mode="bilinear")[0, 0]
    if name.endswith(_CELL_KERNEL):
        # (out, cells, 3, 3): sums over more cells, each of which counts less
        out, count, height, width = value.shape
        cells = value.permute(0, 2, 3, 1).reshape(out, height * width, count)
        resized = _on_grid(cells, side=math.isqrt(target.shape[1]), mode="bilinear")
        resized = resized.reshape(out, height, width, -1).permute(0, 3, 1, 2)
        return resized * (count / target.shape[1])
    return value


def _on_grid(values: Tensor, *, side: int, mode: str) -> Tensor:
    """Values ``(B, C, N)`` of a square grid's cells, resized to ``(B, C, side * side)``."""
    old = math.isqrt(values.shape[2])
    grid = values.reshape(*values.shape[:2], old, old)
    return F.interpolate(grid, size=(side, side), mode=mode, align_corners=False).flatten(2)
