"""The bundle: the one thing that the author side and the device side share.

A bundle is a folder of plain files: ``manifest.json``, ``template.onnx`` (run once per template),
``segment_0.onnx … segment_n.onnx``, and optionally ``weights.safetensors`` (trainable weights;
only the author side reads them).

Tensor names are one flat name space: a graph reads the tensor that another graph wrote under
the same name. The template graph reads ``template`` and ``template_bbox_cxcywh``; segment 0 reads
``search_region``; every segment writes its answer, ``bbox_cxcywh``, ``score`` and ``uncertainty``,
over the answer of the segment before it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetrack.errors import BundleError, BundleFormatError, BundleTamperedError

__all__ = [
    "ANSWER_NAMES",
    "FORMAT_VERSION",
    "Bundle",
    "CropSpec",
    "GraphSpec",
    "SegmentSpec",
    "TensorSpec",
    "default_bundle_path",
    "sha256_of",
    "whole_folder",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.safetensors"
ANSWER_NAMES = ("bbox_cxcywh", "score", "uncertainty")
_TEMPLATE_INPUTS = ("template", "template_bbox_cxcywh")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype (NumPy's name for it) and static shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One ONNX graph of a bundle.

    Attributes:
        name: ``template`` or ``segment_<k>``.
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


SegmentSpec = GraphSpec


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """Sizes of the two crops.

    Attributes:
        template_size_px: Side of the template crop.
        template_factor: Side of its window in the frame over the root of the box's area.
        search_size_px: Side of the search-region crop.
        search_factor: The same factor for the search region.
    """

    template_size_px: int
    template_factor: float
    search_size_px: int
    search_factor: float


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A tracker as plain files, and what its manifest says.

    Attributes:
        path: The folder.
        name: Model name, such as ``early_exit_vit-tiny``.
        family: Model family, a module of ``edgetrack.models``.
        paper: Title, venue and identifier of the source paper.
        config: The family's configuration (only the author side reads it).
        crops: Crop sizes and factors.
        template: The graph that is run once per template.
        segments: The graphs that are run in order until one is sure enough.
        operating_points: Name → thresholds on ``uncertainty``, one per exit but the last.
        operating_point: The name of the default operating point.
        provenance: How the weights came to be: data, recipe, samples seen, metrics.
        licence: A note on what the weights may be used for.
        files: File name → SHA-256 of its content.
    """

    path: Path
    name: str
    family: str
    paper: str
    config: Mapping[str, Any]
    crops: CropSpec
    template: GraphSpec
    segments: tuple[GraphSpec, ...]
    operating_points: Mapping[str, tuple[float, ...]]
    operating_point: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_exits(self) -> int:
        """Number of exits: one per segment."""
        return len(self.segments)

    @property
    def graphs(self) -> tuple[GraphSpec, ...]:
        """The template graph and all segments, in the order in which they run."""
        return (self.template, *self.segments)

    @property
    def digest(self) -> str:
        """SHA-256 over all graphs: what engines are built from (thresholds do not enter)."""
        graphs = [[g.name, self.files[g.file]] for g in self.graphs]
        return hashlib.sha256(json.dumps(graphs).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, *, verify: bool = True) -> "Bundle":
        """Read a bundle and check it.

        Args:
            path: The folder; ``None`` is the bundle that ships.
            verify: Compare every file with its hash.

        Raises:
            BundleError: There is no bundle at ``path``.
            BundleFormatError: The manifest lacks a key, is of a newer format, or its graphs do
                not fit together.
            BundleTamperedError: A file is missing or differs from its hash.
        """
        folder = default_bundle_path() if path is None else Path(path)
        manifest_path = folder / MANIFEST_NAME
        if not manifest_path.is_file():
            raise BundleError(
                f"{folder}: expected a bundle (a folder with {MANIFEST_NAME}), got "
                f"{'a folder without one' if folder.is_dir() else 'nothing'}; "
                "make one with: edgetrack export"
            )
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BundleFormatError(f"{manifest_path}: expected JSON, got: {error}") from error
        bundle = _from_manifest(folder, manifest)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            BundleTamperedError: A file is missing or differs.
        """
        for name, expected in self.files.items():
            file = self.path / name
            if not file.is_file():
                raise BundleTamperedError(
                    f"{file}: expected a file of the bundle, got none; copy the bundle again"
                )
            got = sha256_of(file)
            if got != expected:
                raise BundleTamperedError(
                    f"{file}: expected SHA-256 {expected[:12]}…, got {got[:12]}…; the file was "
                    "changed or damaged, copy the bundle again"
                )

    def graph_path(self, graph: GraphSpec) -> Path:
        """Where a graph of this bundle lies."""
        return self.path / graph.file

    def thresholds(self, operating_point: str | None = None) -> tuple[float, ...]:
        """Thresholds of an operating point, one per exit but the last.

        Raises:
            ValueError: The bundle has no such operating point.
        """
        name = self.operating_point if operating_point is None else operating_point
        if name not in self.operating_points:
            raise ValueError(
                f"operating_point: expected one of {sorted(self.operating_points)}, got {name!r}"
            )
        return self.operating_points[name]

    def write(self) -> "Bundle":
        """Hash the files that lie in ``path`` and write the manifest beside them.

        Returns:
            The bundle with its hashes filled in.
        """
        names = sorted(f.name for f in self.path.iterdir() if f.name != MANIFEST_NAME)
        bundle = dataclasses.replace(self, files={n: sha256_of(self.path / n) for n in names})
        _check_dataflow(bundle)
        manifest = dataclasses.asdict(bundle)
        del manifest["path"]
        text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1)
        (self.path / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        return bundle


def default_bundle_path() -> Path:
    """Folder of the bundle that ships with the package."""
    return Path(__file__).parent / "zoo" / "early_exit_vit-tiny"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` only if the block succeeds.

    A killed or failed writer leaves no half-written ``target``, and the old one stays until the
    new one is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            old = partial.with_name(partial.name + ".old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _from_manifest(folder: Path, manifest: Any) -> Bundle:
    where = folder / MANIFEST_NAME
    if not isinstance(manifest, dict):
        raise BundleFormatError(f"{where}: expected a JSON object, got {type(manifest).__name__}")
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise BundleFormatError(f"{where}: expected the key 'format_version', got none")
    if version > FORMAT_VERSION:
        raise BundleFormatError(
            f"{where}: expected format version <= {FORMAT_VERSION}, got {version}; "
            "update edgetrack: pip install --upgrade edgetrack"
        )
    try:
        bundle = Bundle(
            path=folder,
            name=manifest["name"],
            family=manifest["family"],
            paper=manifest["paper"],
            config=manifest["config"],
            crops=CropSpec(**manifest["crops"]),
            template=_graph(manifest["template"]),
            segments=tuple(_graph(s) for s in manifest["segments"]),
            operating_points={k: tuple(v) for k, v in manifest["operating_points"].items()},
            operating_point=manifest["operating_point"],
            provenance=manifest["provenance"],
            licence=manifest["licence"],
            files=manifest["files"],
        )
    except KeyError as error:
        raise BundleFormatError(
            f"{where}: expected the key {error.args[0]!r}, got none; export the bundle again"
        ) from error
    except (TypeError, AttributeError) as error:
        raise BundleFormatError(f"{where}: expected a valid manifest, got: {error}") from error
    _check_dataflow(bundle)
    return bundle


def _graph(entry: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(
        name=entry["name"],
        file=entry["file"],
        inputs=_tensors(entry["inputs"]),
        outputs=_tensors(entry["outputs"]),
        macs=entry["macs"],
    )


def _tensors(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=e["name"], dtype=e["dtype"], shape=tuple(e["shape"])) for e in entries
    )


def _check_dataflow(bundle: Bundle) -> None:
    """Every tensor that a graph reads is written before it, with the same dtype and shape."""

    def fail(what: str) -> None:
        raise BundleFormatError(f"{bundle.path / MANIFEST_NAME}: {what}; export the bundle again")

    if not bundle.segments:
        fail("expected at least one segment, got none")
    for graph in bundle.graphs:
        if Path(graph.file).name != graph.file or graph.file not in bundle.files:
            fail(f"{graph.name}: expected a file listed under 'files', got {graph.file!r}")
    for spec in bundle.template.inputs:
        if spec.name not in _TEMPLATE_INPUTS:
            fail(f"template: expected inputs from {_TEMPLATE_INPUTS}, got {spec.name!r}")
    known = {t.name: t for t in bundle.template.outputs}
    for index, segment in enumerate(bundle.segments):
        for spec in segment.inputs:
            if spec.name == "search_region" and index == 0:
                continue
            if known.get(spec.name) != spec:
                fail(f"{segment.name}: expected input {spec} to be written before, got "
                     f"{known.get(spec.name)}")  # fmt: skip
        outputs = {t.name: t for t in segment.outputs}
        if missing := [n for n in ANSWER_NAMES if n not in outputs]:
            fail(f"{segment.name}: expected outputs {ANSWER_NAMES}, got none of {missing}")
        known |= outputs
    for name, thresholds in bundle.operating_points.items():
        if len(thresholds) != bundle.num_exits - 1:
            fail(f"operating point {name!r}: expected {bundle.num_exits - 1} thresholds, got "
                 f"{len(thresholds)}")  # fmt: skip
    if bundle.operating_point not in bundle.operating_points:
        fail(f"expected operating_point among {sorted(bundle.operating_points)}, got "
             f"{bundle.operating_point!r}")  # fmt: skip
