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
import itertools
import json
import os
import reprlib
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
    "TensorSpec",
    "default_bundle_path",
    "sha256_of",
    "whole_folder",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.safetensors"
_ANSWER_SHAPES = {"bbox_cxcywh": (1, 4), "score": (1,), "uncertainty": (1,)}
ANSWER_NAMES = tuple(_ANSWER_SHAPES)
_KIND_NAMES: Mapping[type, str] = {
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
}


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

    def __post_init__(self) -> None:
        """Refuse what cannot be cropped."""
        if not all(value > 0 for value in dataclasses.astuple(self)):
            raise ValueError(f"crops: expected positive sizes and factors, got {self}")


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
        operating_points: Name → thresholds on the criterion, one per exit but the last.
        operating_point: The name of the default operating point.
        criterion: What the thresholds are compared with (see ``runtime.policies``).
        rules: How answers become the target's state: name → number (see ``runtime.target``); a
            rule that is not named is off.
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
    criterion: str = "entropy"
    rules: Mapping[str, float] = field(default_factory=dict)
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
        except (ValueError, RecursionError) as error:
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
        files = (f.name for f in self.path.iterdir() if f.is_file())
        names = sorted(name for name in files if MANIFEST_NAME not in name)
        bundle = dataclasses.replace(self, files={n: sha256_of(self.path / n) for n in names})
        _check(bundle)
        manifest = dataclasses.asdict(bundle)
        del manifest["path"]
        text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1)
        partial = self.path / f".{MANIFEST_NAME}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path / MANIFEST_NAME)
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
    old = partial.with_name(partial.name + ".old")
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)  # interrupted between the two renames
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


def _from_manifest(folder: Path, manifest: Any) -> Bundle:
    where = folder / MANIFEST_NAME
    if not isinstance(manifest, dict):
        raise BundleFormatError(f"{where}: expected a JSON object, got {type(manifest).__name__}")
    version = manifest.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleFormatError(
            f"{where}: expected a whole number under 'format_version', from 1 on, got "
            f"{reprlib.repr(version)}; export the bundle again"
        )
    if version > FORMAT_VERSION:
        raise BundleFormatError(
            f"{where}: expected format version <= {FORMAT_VERSION}, got {version}; "
            "update edgetrack: pip install --upgrade edgetrack"
        )
    try:
        bundle = _parsed(folder, manifest)
    except KeyError as error:
        raise BundleFormatError(
            f"{where}: expected the key {error.args[0]!r}, got none; export the bundle again"
        ) from error
    except ValueError as error:
        raise BundleFormatError(f"{where}: {error}; export the bundle again") from error
    _check(bundle)
    return bundle


def _parsed(folder: Path, manifest: Mapping[str, Any]) -> Bundle:
    """The bundle that a manifest describes.

    Raises:
        KeyError: A key is missing.
        ValueError: A value is of another kind; the message says which.
    """
    points = _get(manifest, "operating_points", dict)
    return Bundle(
        path=folder,
        name=_get(manifest, "name", str),
        family=_get(manifest, "family", str),
        paper=_get(manifest, "paper", str),
        config=_get(manifest, "config", dict),
        crops=_crops(_get(manifest, "crops", dict)),
        template=_graph(_get(manifest, "template", dict)),
        segments=tuple(_graph(s) for s in _all(_get(manifest, "segments", list), dict, "segments")),
        operating_points={
            k: tuple(_all(_typed(v, list, f"operating point {k!r}"), float, f"thresholds of {k!r}"))
            for k, v in points.items()
        },
        operating_point=_get(manifest, "operating_point", str),
        criterion=_get(manifest, "criterion", str),
        rules={
            k: _typed(v, float, f"rule {k!r}") for k, v in _get(manifest, "rules", dict).items()
        },
        provenance=_get(manifest, "provenance", dict),
        licence=_get(manifest, "licence", str),
        files={
            k: _typed(v, str, f"hash of {k!r}") for k, v in _get(manifest, "files", dict).items()
        },
    )


def _crops(entry: Mapping[str, Any]) -> CropSpec:
    names = [field.name for field in dataclasses.fields(CropSpec)]
    if extra := sorted(entry.keys() - names):
        raise ValueError(f"crops: expected the keys {names}, got {extra} besides")
    return CropSpec(
        template_size_px=_get(entry, "template_size_px", int),
        template_factor=_get(entry, "template_factor", float),
        search_size_px=_get(entry, "search_size_px", int),
        search_factor=_get(entry, "search_factor", float),
    )


def _graph(entry: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(
        name=_get(entry, "name", str),
        file=_get(entry, "file", str),
        inputs=_tensors(_get(entry, "inputs", list)),
        outputs=_tensors(_get(entry, "outputs", list)),
        macs=_get(entry, "macs", int),
    )


def _tensors(entries: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=_get(entry, "name", str),
            dtype=_get(entry, "dtype", str),
            shape=tuple(_all(_get(entry, "shape", list), int, "shape")),
        )
        for entry in _all(entries, dict, "tensors")
    )


def _get(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    return _typed(entry[key], kind, f"{key!r}")


def _all(values: Sequence[Any], kind: type, what: str) -> list[Any]:
    return [_typed(value, kind, what) for value in values]


def _typed(value: Any, kind: type, what: str) -> Any:
    """A value of the manifest, refused if it is of another kind; ``true`` is no number."""
    is_kind = isinstance(value, (int, float) if kind is float else kind)
    if not is_kind or isinstance(value, bool):
        raise ValueError(f"{what}: expected {_KIND_NAMES[kind]}, got {reprlib.repr(value)}")
    return value


def _check(bundle: Bundle) -> None:
    """Refuse a bundle whose parts do not fit together."""
    problems = itertools.chain(
        _value_problems(bundle),
        _file_problems(bundle),
        _dataflow_problems(bundle),
        _threshold_problems(bundle),
    )
    for problem in problems:
        raise BundleFormatError(
            f"{bundle.path / MANIFEST_NAME}: {problem}; export the bundle again"
        )


def _value_problems(bundle: Bundle) -> Iterator[str]:
    """The name becomes part of file names; shares of the work are counted in MACs."""
    if bundle.name in ("", ".", "..") or "/" in bundle.name or "\\" in bundle.name:
        yield f"'name': expected a name without path separators, got {bundle.name!r}"
    for graph in bundle.graphs:  # a graph without products has none
        if graph.macs < 0:
            yield f"{graph.name}: expected 'macs' of at least 0, got {graph.macs}"


def _file_problems(bundle: Bundle) -> Iterator[str]:
    """Files lie in the bundle's own folder, whatever a manifest from elsewhere says."""
    for name in bundle.files:
        if name == ".." or Path(name).name != name:
            yield f"expected names of files in this folder under 'files', got {name!r}"
    for graph in bundle.graphs:
        if graph.file not in bundle.files:
            yield f"{graph.name}: expected a file listed under 'files', got {graph.file!r}"


def _dataflow_problems(bundle: Bundle) -> Iterator[str]:
    """Every tensor that a graph reads is written before it, with the same dtype and shape."""
    names = [graph.name for graph in bundle.graphs]
    expected = ["template", *(f"segment_{k}" for k in range(max(bundle.num_exits, 1)))]
    if names != expected:
        yield f"expected the graphs {expected}, got {names}"
    known: dict[str, TensorSpec] = {}
    for graph in bundle.graphs:
        readable = known | _host_tensors(graph.name, bundle.crops)
        for spec in graph.inputs:
            if readable.get(spec.name) != spec:
                yield (
                    f"{graph.name}: expected input {spec} to be written before, got "
                    f"{readable.get(spec.name)}"
                )
        outputs = {t.name: t for t in graph.outputs}
        # The answer is one buffer for all exits, so all must agree on it.
        for name, shape in _ANSWER_SHAPES.items() if graph is not bundle.template else ():
            spec = TensorSpec(name=name, dtype="float32", shape=shape)
            if outputs.get(name) != spec:
                yield f"{graph.name}: expected output {spec}, got {outputs.get(name)}"
        for spec in graph.outputs:
            if known.setdefault(spec.name, spec) != spec:
                yield f"{graph.name}: expected output {known[spec.name]} as before, got {spec}"


def _host_tensors(graph_name: str, crops: CropSpec) -> dict[str, TensorSpec]:
    """What the host writes before it runs a graph."""

    def image(name: str, side_px: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="uint8", shape=(1, side_px, side_px, 3))

    bbox = TensorSpec(name="template_bbox_cxcywh", dtype="float32", shape=(1, 4))
    specs = {
        "template": (image("template", crops.template_size_px), bbox),
        "segment_0": (image("search_region", crops.search_size_px),),
    }
    return {spec.name: spec for spec in specs.get(graph_name, ())}


def _threshold_problems(bundle: Bundle) -> Iterator[str]:
    """Every operating point has a threshold for each exit but the last."""
    count = bundle.num_exits - 1
    for name, thresholds in bundle.operating_points.items():
        if len(thresholds) != count or not all(t >= 0 for t in thresholds):
            yield (
                f"operating point {name!r}: expected {count} thresholds of at least 0, got "
                f"{list(thresholds)}"
            )
    if bundle.operating_point not in bundle.operating_points:
        yield (
            f"expected operating_point among {sorted(bundle.operating_points)}, got "
            f"{bundle.operating_point!r}"
        )
