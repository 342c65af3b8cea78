"""The one contract of all backends: what compiles a graph, and what runs it.

An *engine* is what one backend runs for one graph of a bundle: a TensorRT plan, or for ONNX
Runtime the graph optimised for this CPU. Engines of one bundle lie in one folder,
``<model>-<precision>-<backend><version>-<arch>-<hash>/``, with ``engines.json`` that says what
they were built from, by what, for what. That is checked before anything is deserialised. Engines of
an INT8 build may be in two precisions: a graph stays in float where INT8 does not pay.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from edgetrack.bundle import Bundle, GraphSpec, sha256_of
from edgetrack.errors import EngineMismatchError, EngineNotFoundError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "Backend",
    "Buffers",
    "BuiltGraph",
    "DeviceEngine",
    "Engine",
    "EngineKey",
    "EngineSet",
    "find_engines",
]

SIDECAR_NAME = "engines.json"

_GRAPH_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "file": str,
    "sha256": str,
    "size_bytes": int,
    "build_s": (int, float),
    "precision": str,
}

Buffers: TypeAlias = "Mapping[str, npt.NDArray[Any]]"


class Engine(Protocol):
    """One compiled graph, bound to buffers at fixed addresses."""

    def bind(self, buffers: Buffers) -> None:
        """Read inputs from and write outputs to ``buffers``, by name, from now on.

        The buffers must outlive the engine and keep their addresses.
        """

    def enqueue(self) -> None:
        """Run once over the bound buffers."""

    def close(self) -> None:
        """Free what it holds; calling it twice is fine."""


class DeviceEngine(Protocol):
    """One compiled graph that runs on a CUDA device, in the primary context.

    Attributes:
        dtypes: Tensor name → NumPy's name of the type that this engine reads or writes; tokens of
            an FP16 plan are ``float16`` whatever the manifest says.
        scratch_bytes: Memory that it needs while it runs. Engines that run one after another share
            one such block.
    """

    dtypes: Mapping[str, str]
    scratch_bytes: int

    def bind_device(self, addresses: Mapping[str, int], *, scratch: int, stream: int) -> None:
        """Read and write device memory at these addresses, by tensor name, from now on.

        Args:
            addresses: Tensor name → device address; other names are ignored.
            scratch: Device address of at least ``scratch_bytes``.
            stream: A stream for what has to run once before work can be captured.
        """

    def enqueue_on(self, stream: int) -> None:
        """Run once, in stream order; the stream may be capturing a graph."""

    def close(self) -> None:
        """Free what it holds; calling it twice is fine."""


class Backend(Protocol):
    """One way to compile and run graphs.

    Attributes:
        name: Its name on the command line.
        precisions: What it can build.
        engine_suffix: File suffix of its engines.
        runs_on: Where its engines run; ``load`` gives an ``Engine`` on ``cpu`` and a
            ``DeviceEngine`` on ``cuda``, where the primary context must be current.
        device: Number of the CUDA device that they run on; 0 on a CPU.
    """

    name: str
    runs_on: Literal["cpu", "cuda"]
    device: int
    precisions: tuple[str, ...]
    engine_suffix: str

    def key(self, *, model: str, bundle_digest: str, precision: str) -> "EngineKey":
        """The key of engines that this backend builds here.

        Raises:
            ValueError: The backend has no such precision; the message says why.
        """

    def compile(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        precision: str,
        on_step: Callable[[str, float], None] | None = None,
    ) -> None:
        """Compile one graph to a file; ``on_step(phase, fraction)`` reports progress.

        Raises:
            EngineBuildError: The compiler refused the graph.
        """

    def load(self, engine_path: Path, graph: GraphSpec) -> Engine | DeviceEngine:
        """Load an engine that ``compile`` wrote."""

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> Engine | DeviceEngine:
        """Compile a graph in memory, where the backend can do that at once.

        Raises:
            EngineNotFoundError: It cannot; the message names the build command.
        """


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """What decides whether engines fit: source, precision, compiler, device, options.

    Attributes:
        model: Name of the bundle.
        bundle_digest: ``Bundle.digest``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        backend: Backend name.
        backend_version: Version of the compiler.
        device: Device name, such as ``Orin`` or a CPU's model name.
        arch: ``sm_87``, ``x86_64`` …
        options: Build options that change the engine.
        quantization: For INT8, what else was decided by: the calibration cache, operating points,
            whether INT8 was kept regardless. Does not enter the folder's name, which holds the last
            build; ``None`` in a key that is looked for means that any will do.
    """

    model: str
    bundle_digest: str
    precision: str
    backend: str
    backend_version: str
    device: str
    arch: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None

    @property
    def folder_name(self) -> str:
        """``<model>-<precision>-<backend><version>-<arch>-<hash>``."""
        named = dataclasses.asdict(self)
        del named["quantization"]
        text = json.dumps(named, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        readable = f"{self.model}-{self.precision}-{self.backend}{self.backend_version}-{self.arch}"
        return re.sub(r"[^\w.+-]", "_", f"{readable}-{digest}")


@dataclass(frozen=True, kw_only=True)
class BuiltGraph:
    """One engine file: its name, SHA-256, size, build time, and the precision that it runs in."""

    file: str
    sha256: str
    size_bytes: int
    build_s: float
    precision: str


@dataclass(frozen=True, kw_only=True)
class EngineSet:
    """All engines of one bundle in one folder.

    Attributes:
        path: The folder.
        key: What they were built from, by and for.
        graphs: Graph name → engine file.
        built_at: UTC time, ISO 8601.
        operating_points: For INT8, the bundle's operating points with thresholds that fit the
            entropies of these engines; empty where the bundle's own hold.
        gate: For INT8, how it was compared with float, and what was chosen (see ``gate.Verdict``).
    """

    path: Path
    key: EngineKey
    graphs: Mapping[str, BuiltGraph]
    built_at: str
    operating_points: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    gate: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "EngineSet":
        """Read ``engines.json``.

        Raises:
            EngineNotFoundError: There is none.
            EngineMismatchError: It is not readable as one.
        """
        sidecar = path / SIDECAR_NAME
        if not sidecar.is_file():
            raise EngineNotFoundError(
                f"{path}: expected engines (a folder with {SIDECAR_NAME}), got none; "
                "run: edgetrack build"
            )
        try:
            content = json.loads(sidecar.read_text(encoding="utf-8"))
            return cls(
                path=path,
                key=EngineKey(**content["key"]),
                graphs={k: _built_graph(k, v) for k, v in content["graphs"].items()},
                built_at=content["built_at"],
                operating_points={
                    name: tuple(float(t) for t in thresholds)
                    for name, thresholds in content["operating_points"].items()
                },
                gate=dict(content["gate"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EngineMismatchError(
                f"{sidecar}: expected a description of engines, got: {error}; "
                "run: edgetrack build --force"
            ) from error

    def write(self) -> None:
        """Write ``engines.json``."""
        content = {
            "key": dataclasses.asdict(self.key),
            "graphs": {k: dataclasses.asdict(v) for k, v in self.graphs.items()},
            "built_at": self.built_at,
            "operating_points": self.operating_points,
            "gate": self.gate,
        }
        (self.path / SIDECAR_NAME).write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def thresholds(self, bundle: Bundle, operating_point: str | None = None) -> tuple[float, ...]:
        """Thresholds of an operating point for these engines: fitted ones, or the bundle's own.

        Args:
            bundle: What the engines were built from.
            operating_point: Its name; ``None`` is the bundle's default.

        Raises:
            EngineMismatchError: They were fitted to another criterion or other thresholds than the
                bundle now has.
            ValueError: The bundle has no such operating point.
        """
        own = bundle.thresholds(operating_point)
        if not self.operating_points:
            return own
        name = bundle.operating_point if operating_point is None else operating_point
        source = self.key.quantization or {}
        now = bundle.criterion, list(own)
        then = source.get("criterion"), source.get("operating_points", {}).get(name)
        if now != then or name not in self.operating_points:
            raise EngineMismatchError(
                f"{self.path}: expected engines for the thresholds {now[1]} on {now[0]} of "
                f"{name!r}, got those for {then[1]} on {then[0]}; run: "
                "edgetrack build --precision int8"
            )
        return self.operating_points[name]

    def verify(self, expected: EngineKey) -> None:
        """Refuse engines that were built for something else, or changed since.

        Raises:
            EngineMismatchError: The first field that differs is named, with the command to run.
        """
        for field in dataclasses.fields(EngineKey):
            want, got = getattr(expected, field.name), getattr(self.key, field.name)
            is_any = field.name == "quantization" and want is None
            if want != got and not is_any:
                raise EngineMismatchError(
                    f"{self.path.name}: expected {field.name} {want!r}, got {got!r}; engines run "
                    "only where they were built, run: edgetrack build"
                )
        for name, graph in self.graphs.items():
            file = self.path / graph.file
            got_hash = sha256_of(file) if file.is_file() else "no file"
            if got_hash != graph.sha256:
                raise EngineMismatchError(
                    f"{file}: expected SHA-256 {graph.sha256[:12]}… for {name}, got "
                    f"{got_hash[:12]}; run: edgetrack build --force"
                )


def find_engines(root: Path, key: EngineKey, *, graphs: Iterable[str]) -> EngineSet | None:
    """The engines under ``root`` with exactly this key, checked; ``None`` if there are none.

    Args:
        root: The folder that holds engine folders.
        key: What the engines must have been built from, by and for.
        graphs: Names of the graphs that must all be there.

    Raises:
        EngineMismatchError: The folder is there but its content was changed, or lacks a graph.
    """
    folder = root / key.folder_name
    if not (folder / SIDECAR_NAME).is_file():
        return None
    engines = EngineSet.read(folder)
    engines.verify(key)
    expected = list(graphs)
    if missing := [name for name in expected if name not in engines.graphs]:
        raise EngineMismatchError(
            f"{folder / SIDECAR_NAME}: expected the graphs {expected}, got none of {missing}; "
            "run: edgetrack build --force"
        )
    return engines


def _built_graph(name: str, entry: Mapping[str, Any]) -> BuiltGraph:
    """An engine file as the sidecar describes it, refused if a value is of another kind."""
    graph = BuiltGraph(**entry)
    for field, kind in _GRAPH_KINDS.items():
        value = getattr(graph, field)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{value!r} as the {field} of {name}")
    return graph
