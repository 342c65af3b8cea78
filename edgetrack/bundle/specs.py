"""What a manifest says of graphs, tensors and crops."""

import dataclasses
from dataclasses import dataclass

__all__ = [
    "ANSWERS",
    "ANSWER_NAMES",
    "GEOMETRIES",
    "CropSpec",
    "GraphSpec",
    "TensorSpec",
    "host_tensors",
]

GEOMETRIES = ("edgetrack", "ostrack")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype (NumPy's name for it) and static shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


ANSWERS = (
    TensorSpec(name="bbox_cxcywh", dtype="float32", shape=(1, 4)),
    TensorSpec(name="score", dtype="float32", shape=(1,)),
    TensorSpec(name="uncertainty", dtype="float32", shape=(1,)),
)
ANSWER_NAMES = tuple(spec.name for spec in ANSWERS)


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One ONNX graph of a bundle.

    Attributes:
        name: ``template``, ``segment_<k>``, ``head_<k>`` or ``update``.
        file: File name inside the bundle.
        inputs: What it reads, in the order of the graph.
        outputs: What it writes.
        macs: Multiply-accumulates of one run, attention products included.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int = 0


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """Sizes of the two crops.

    Attributes:
        template_size_px: Side of the template crop.
        template_factor: Side of its window in the frame over the root of the box's area.
        search_size_px: Side of the search-region crop.
        search_factor: The same factor for the search region.
        geometry: What happens at the frame's border and to the window's fractions of a pixel:
            ``edgetrack``, or ``ostrack`` for published weights (see ``crops``).
    """

    template_size_px: int
    template_factor: float
    search_size_px: int
    search_factor: float
    geometry: str = "edgetrack"

    def __post_init__(self) -> None:
        """Refuse what cannot be cropped."""
        numbers = (value for value in dataclasses.astuple(self) if not isinstance(value, str))
        if not all(value > 0 for value in numbers):
            raise ValueError(f"crops: expected positive sizes and factors, got {self}")
        if self.geometry not in GEOMETRIES:
            raise ValueError(
                f"crops: expected a geometry among {GEOMETRIES}, got {self.geometry!r}"
            )


def host_tensors(graph_name: str, crops: CropSpec) -> dict[str, TensorSpec]:
    """What a tracker writes before it runs a graph, by name."""

    def image(name: str, side_px: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="uint8", shape=(1, side_px, side_px, 3))

    bbox = TensorSpec(name="template_bbox_cxcywh", dtype="float32", shape=(1, 4))
    template = (image("template", crops.template_size_px), bbox)
    specs = {
        "template": template,
        "segment_0": (image("search_region", crops.search_size_px),),
        "update": template,
    }
    return {spec.name: spec for spec in specs.get(graph_name, ())}
