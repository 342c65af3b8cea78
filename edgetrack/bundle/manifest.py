"""The bundle as a folder with a manifest: read, checked, written."""

import dataclasses
import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetrack.bundle.checks import find_problem
from edgetrack.bundle.folder import sha256_of
from edgetrack.bundle.specs import GEOMETRIES, CropSpec, GraphSpec, TensorSpec, host_tensors
from edgetrack.errors import BundleError, BundleFormatError, BundleTamperedError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "WEIGHTS_NAME",
    "Bundle",
    "default_bundle_path",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.safetensors"
# What weights may be used for unless somebody knows better: most training sets allow no more.
RESEARCH_LICENCE = "research data: research use"
_OPTIONAL_KEYS = ("heads", "update", "carried")
_KIND_NAMES: Mapping[type, str] = {
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
}


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
        heads: Empty, or one graph per exit: what gives its box, run only where it is taken.
        update: The graph that is run once per frame behind the answer, if there is one.
        carried: Tensor that the next frame reads → tensor that the update graph wrote.
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
    heads: tuple[GraphSpec, ...] = ()
    update: GraphSpec | None = None
    carried: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_exits(self) -> int:
        """Number of exits: one per segment."""
        return len(self.segments)

    @property
    def graphs(self) -> tuple[GraphSpec, ...]:
        """All graphs: the template graph, segments, heads, and the update graph."""
        graphs = (self.template, *self.segments, *self.heads, self.update)
        return tuple(graph for graph in graphs if graph is not None)

    @property
    def graphs_in_turn(self) -> tuple[GraphSpec, ...]:
        """All graphs as a frame runs them that asks every exit: each head behind its segment."""
        exits = itertools.chain(*itertools.zip_longest(self.segments, self.heads))
        graphs = (self.template, *exits, self.update)
        return tuple(graph for graph in graphs if graph is not None)

    @property
    def exit_macs(self) -> tuple[int, ...]:
        """Multiply-accumulates of a frame that stops at each exit, its head and the update in."""
        heads = [head.macs for head in self.heads] or [0] * self.num_exits
        update = 0 if self.update is None else self.update.macs
        segments = itertools.accumulate(segment.macs for segment in self.segments)
        return tuple(done + head + update for done, head in zip(segments, heads, strict=True))

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

    def recorded_inputs(self, graph: GraphSpec) -> Mapping[str, TensorSpec]:
        """What a graph reads that no graph wrote in the same frame: crops, and what was carried.

        Returns:
            Name under which ``runtime.recording`` keeps it → the tensor. They differ where one
            tensor is written twice in a frame: the update graph's crop is ``update.template``.
        """
        host = host_tensors(graph.name, self.crops)
        prefix = "update." if graph is self.update else ""
        recorded = {prefix + spec.name: spec for spec in graph.inputs if spec.name in host}
        carried = {spec.name: spec for spec in graph.inputs if spec.name in self.carried}
        return {**recorded, **carried}

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
        for key in _OPTIONAL_KEYS:  # those of a family that has them
            if not manifest[key]:
                del manifest[key]
        text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1)
        partial = self.path / f".{MANIFEST_NAME}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path / MANIFEST_NAME)
        return bundle


def default_bundle_path() -> Path:
    """Folder of the bundle that ships with the package."""
    return Path(__file__).parents[1] / "zoo" / "early_exit_vit-tiny"


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
        segments=_graphs(_get(manifest, "segments", list), "segments"),
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
        heads=_graphs(_typed(manifest.get("heads", []), list, "'heads'"), "heads"),
        update=_graph(_get(manifest, "update", dict)) if "update" in manifest else None,
        carried={
            k: _typed(v, str, f"carried {k!r}")
            for k, v in _typed(manifest.get("carried", {}), dict, "'carried'").items()
        },
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
        geometry=_typed(entry.get("geometry", GEOMETRIES[0]), str, "'geometry'"),
    )


def _graph(entry: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(
        name=_get(entry, "name", str),
        file=_get(entry, "file", str),
        inputs=_tensors(_get(entry, "inputs", list)),
        outputs=_tensors(_get(entry, "outputs", list)),
        macs=_get(entry, "macs", int),
    )


def _graphs(entries: Sequence[Any], what: str) -> tuple[GraphSpec, ...]:
    return tuple(_graph(entry) for entry in _all(entries, dict, what))


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
    if problem := find_problem(bundle):
        raise BundleFormatError(
            f"{bundle.path / MANIFEST_NAME}: {problem}; export the bundle again"
        )
