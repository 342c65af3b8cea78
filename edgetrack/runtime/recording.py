"""Record the crops that a tracker cuts: what its networks read, frame by frame."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.engine import Buffers, Engine
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.boxes import as_bbox_xywh
from edgetrack.bundle import Bundle, TensorSpec
from edgetrack.runtime.host_loop import HostLoop
from edgetrack.runtime.loop import checked_array
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules

__all__ = ["record_crops"]

Arrays = dict[str, npt.NDArray[Any]]


def record_crops(
    bundle: Bundle, frames: Iterable[npt.NDArray[np.uint8]], bbox: Sequence[float], *, name: str
) -> Iterator[tuple[str, Arrays]]:
    """Track with the last exit on ONNX Runtime, and give what was read at each frame.

    Args:
        bundle: What tracks.
        frames: uint8 BGR, as ``Tracker.update`` takes them; the target is in the first.
        bbox: The target in the first frame: x, y, w, h in pixels.
        name: Of the sequence; frames are called ``<name>/<index>``, from 000001 on.

    Yields:
        Per frame after the first its name, and copies of ``template``, ``template_bbox_cxcywh``
        and ``search_region`` by name; of a bundle with an update graph also what was carried into
        the frame, and that graph's crop (see ``Bundle.recorded_inputs``).

    Raises:
        TypeError: A frame is not a uint8 array.
        ValueError: There is no frame, one has a wrong shape, or the box does not overlap it.
    """
    tracked = iter(frames)
    frame = next(tracked, None)
    if frame is None:
        raise ValueError(f"{name}: expected frames, got none")
    first = checked_array(frame)
    height, width = first.shape[:2]
    read: Arrays = {}
    policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
    with contextlib.closing(_open_loop(bundle, read.update)) as loop:
        loop.start(first, as_bbox_xywh(bbox, width_px=width, height_px=height))
        for index, frame in enumerate(tracked, start=1):
            loop.submit(checked_array(frame), policy)
            yield f"{name}/{index:06d}", dict(read)


def _open_loop(bundle: Bundle, tell: Callable[[Arrays], None]) -> HostLoop:
    backend = OnnxRuntimeBackend()
    engines = [
        _Tapped(
            backend.load_onnx(bundle.graph_path(graph), graph), bundle.recorded_inputs(graph), tell
        )
        for graph in bundle.graphs
    ]
    return HostLoop(bundle, engines, rules=TargetRules.of(bundle.rules))


class _Tapped:
    """An engine that tells what it reads before each run, by the names of a record."""

    def __init__(
        self, engine: Engine, inputs: Mapping[str, TensorSpec], tell: Callable[[Arrays], None]
    ) -> None:
        self._engine, self._inputs, self._tell = engine, inputs, tell
        self._buffers: Buffers = {}

    def bind(self, buffers: Buffers) -> None:
        self._engine.bind(buffers)
        self._buffers = buffers

    def enqueue(self) -> None:
        self._tell({name: self._buffers[spec.name].copy() for name, spec in self._inputs.items()})
        self._engine.enqueue()

    def close(self) -> None:
        self._engine.close()
