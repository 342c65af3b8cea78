"""Every tensor of a bundle, allocated once at a fixed, aligned address."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.bundle import Bundle

__all__ = ["ALIGNMENT_BYTES", "allocate"]

ALIGNMENT_BYTES = 256


def allocate(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    """Zeroed arrays for all tensors of a bundle, by name.

    A tensor that several graphs write or read (the answer, tokens) is one array, so handing it
    from graph to graph copies nothing.
    """
    specs = {t.name: t for g in bundle.graphs for t in (*g.inputs, *g.outputs)}
    return {name: _aligned(spec.shape, np.dtype(spec.dtype)) for name, spec in specs.items()}


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + size_bytes].view(dtype).reshape(shape)
