"""Every tensor of a bundle, allocated once at a fixed, aligned address."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda import CudaContext, Stream
from edgetrack.backends.engine import DeviceEngine
from edgetrack.bundle import Bundle, TensorSpec
from edgetrack.errors import EngineMismatchError

__all__ = ["ALIGNMENT_BYTES", "DeviceBuffers", "allocate"]

ALIGNMENT_BYTES = 256


def allocate(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    """Zeroed arrays in host memory for all tensors of a bundle, by name.

    A tensor that several graphs write or read (the answer, tokens) is one array, so handing it
    from graph to graph copies nothing.
    """
    return {
        name: _aligned(spec.shape, np.dtype(spec.dtype)) for name, spec in _tensors(bundle).items()
    }


class DeviceBuffers:
    """The same in device memory: one block, with the scratch memory that engines share.

    Args:
        context: Where; current in this thread.
        bundle: Whose tensors.
        engines: What will read and write them, in the types that they want.

    Attributes:
        addresses: Tensor name → device address.
        sizes: Tensor name → bytes, a multiple of 256.
        scratch: Device address of the scratch memory.
        num_bytes: Size of the block.

    Raises:
        EngineMismatchError: One engine writes a tensor in another type than the next one reads.
        DeviceMemoryError: The device has no room for them.
    """

    def __init__(
        self, context: CudaContext, bundle: Bundle, engines: Iterable[DeviceEngine]
    ) -> None:
        engines = list(engines)
        self._context = context
        self._shapes = {name: spec.shape for name, spec in _tensors(bundle).items()}
        self._dtypes = _dtypes(bundle, engines)
        self.sizes: Mapping[str, int] = {
            name: _rounded(math.prod(shape) * self._dtypes[name].itemsize)
            for name, shape in self._shapes.items()
        }
        offsets: dict[str, int] = {}
        size = 0
        for name, num_bytes in self.sizes.items():
            offsets[name] = size
            size += num_bytes
        self.num_bytes = size + max(engine.scratch_bytes for engine in engines)
        self._memory = context.allocate(self.num_bytes, what=f"the buffers of {bundle.name}")
        base = self._memory.address
        self.addresses: Mapping[str, int] = {name: base + o for name, o in offsets.items()}
        self.scratch = base + size

    def write(self, name: str, value: npt.NDArray[Any], stream: Stream) -> None:
        """Copy a tensor in, cast to its type there."""
        array = np.ascontiguousarray(value, self._dtypes[name]).reshape(self._shapes[name])
        self._context.copy_to_device(self.addresses[name], array, stream)

    def read(self, name: str, stream: Stream) -> npt.NDArray[Any]:
        """Wait for the stream and copy a tensor out."""
        array = np.empty(self._shapes[name], self._dtypes[name])
        self._context.copy_from_device(array, self.addresses[name], stream)
        return array

    def clear(self, stream: Stream) -> None:
        """Set everything to zero."""
        self._context.set_bytes(self._memory.address, 0, self.num_bytes, stream)

    def close(self) -> None:
        """Free the block; calling it twice is fine."""
        self._memory.close()


def _tensors(bundle: Bundle) -> dict[str, TensorSpec]:
    return {t.name: t for g in bundle.graphs for t in (*g.inputs, *g.outputs)}


def _dtypes(bundle: Bundle, engines: list[DeviceEngine]) -> dict[str, np.dtype[Any]]:
    """The type of each tensor, on which all engines that touch it must agree."""
    found: dict[str, str] = {}
    for graph, engine in zip(bundle.graphs, engines, strict=True):
        for spec in (*graph.inputs, *graph.outputs):
            dtype = engine.dtypes[spec.name]
            if found.setdefault(spec.name, dtype) != dtype:
                raise EngineMismatchError(
                    f"{graph.name}: expected {spec.name!r} as {found[spec.name]}, as the engines "
                    f"before it have it, got {dtype}; run: edgetrack build --force"
                )
    for name, source in bundle.carried.items():
        if found[name] != found[source]:
            raise EngineMismatchError(
                f"carried {name!r}: expected {source!r} as {found[name]}, as the template graph's "
                f"engine has it, got {found[source]}; run: edgetrack build --force"
            )
    return {name: np.dtype(dtype) for name, dtype in found.items()}


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + size_bytes].view(dtype).reshape(shape)
