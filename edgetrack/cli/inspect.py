"""``edgetrack inspect`` and ``edgetrack doctor``: what is in a folder, what is on this machine."""

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.options import JsonOption, parse_bbox, print_json, print_table
from edgetrack.cli.tables import print_gate, when_to_stop
from edgetrack.errors import BundleError

if TYPE_CHECKING:
    from edgetrack.bundle import Bundle
    from edgetrack.parity import EngineRunner, ParityReport
    from edgetrack.runtime.policies import ExitPolicy

__all__ = ["doctor", "inspect"]

_MAX_SHOWN = 300  # characters of one entry of a provenance; one run may have started from others


def inspect(
    path: Annotated[
        Path | None, typer.Argument(help="Bundle or engine folder [default: the one that ships]")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Run the bundle's crops through two engine folders, or backends by name, and say "
            "where B departs from A",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Video or folder to cut the crops from [default: a rendered clip]"),
    ] = None,
    bbox: Annotated[str | None, typer.Option(help="The target in its first frame: x,y,w,h")] = None,
    frames: Annotated[int, typer.Option(min=2, help="Frames to compare on, at most")] = 60,
    tolerance: Annotated[
        float, typer.Option(help="Relative RMS difference above which a tensor departs")
    ] = 1e-3,
    plot: Annotated[Path | None, typer.Option(help="Write the differences as a picture")] = None,
    json: JsonOption = False,
) -> None:
    """Show what is in a bundle or in a folder of engines, or where two sets of engines differ.

    Example: edgetrack inspect --compare onnxruntime engines/early_exit_vit-tiny-int8-…
    """
    from edgetrack.backends.engine import SIDECAR_NAME

    if compare is not None:
        crops = _Crops(source, bbox, frames)
        _compare(path, compare, crops, tolerance=tolerance, plot=plot, as_json=json)
        return
    if path is not None and (path / SIDECAR_NAME).is_file():
        _inspect_engines(path, as_json=json)
    elif path is not None and not path.is_dir():
        got = "a file" if path.is_file() else "nothing"
        raise BundleError(f"{path}: expected a bundle or engine folder, got {got}; check the path")
    elif path is not None and (found := sorted(path.glob(f"*/{SIDECAR_NAME}"))):
        names = ", ".join(str(sidecar.parent) for sidecar in found)
        raise BundleError(f"{path}: expected one folder of engines, got several; inspect {names}")
    else:
        _inspect_bundle(path, as_json=json)


@dataclass(frozen=True)
class _Crops:
    """Where crops to compare on come from."""

    source: str | None
    bbox: str | None
    num_frames: int

    def record(self, bundle: "Bundle") -> "list[dict[str, Any]]":
        """What the bundle's own tracker cuts."""
        from edgetrack.runtime.recording import record_crops

        if (self.source is None) != (self.bbox is None):
            raise typer.BadParameter("--source and --bbox go together", param_hint="--bbox")
        if self.source is None or self.bbox is None:
            from edgetrack.data.synthetic import render_clip

            clip = list(render_clip(num_frames=self.num_frames))
            images, box = [frame for frame, _ in clip], clip[0][1].tolist()
        else:
            from edgetrack.frames import read_frames

            box = parse_bbox(self.bbox)
            with read_frames(self.source) as frames:
                images = list(itertools.islice(frames, self.num_frames))
        return [crops for _, crops in record_crops(bundle, images, box, name="frames")]


def _compare(
    path: Path | None,
    names: tuple[str, str],
    crops: _Crops,
    *,
    tolerance: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    from edgetrack.bundle import Bundle
    from edgetrack.parity import compare

    bundle = Bundle.load(path)
    with contextlib.ExitStack() as opened:
        (first, policy), (second, other_policy) = (_runner(bundle, name, opened) for name in names)
        report = compare(
            bundle,
            first,
            second,
            crops.record(bundle),
            policy=policy,
            other_policy=other_policy,
            tolerance=tolerance,
        )
    if plot is not None:
        _plot_differences(report, plot, title=f"{names[1]} beside {names[0]}")
    if as_json:
        print_json(report.as_dict())
        return
    rows = [
        (t.graph, t.tensor, f"{t.max_abs:.2e}", f"{t.rms:.2e}", f"{t.cosine:.6f}")
        for t in report.tensors
    ]
    header = ("graph", "tensor", "max", "relative RMS", "cosine")
    print_table(f"{names[1]} beside {names[0]}", header, rows)
    typer.echo(
        f"boxes: IoU {report.bbox_iou_mean:.4f} mean, {report.bbox_iou_min:.4f} at worst; "
        f"exits agree on {report.exit_agreement:.1%} of {report.num_crops} crops"
    )
    departing = report.first_departing
    typer.echo(
        f"no tensor departs by more than {tolerance:g}"
        if departing is None
        else f"first to depart by more than {tolerance:g}: {departing.tensor} of {departing.graph}"
    )


def _runner(
    bundle: "Bundle", name: str, opened: contextlib.ExitStack
) -> "tuple[EngineRunner, ExitPolicy]":
    """Engines in a folder, or made in memory by a backend of this name; and how they exit."""
    from edgetrack.backends import BACKEND_NAMES, get_backend
    from edgetrack.backends.engine import EngineSet
    from edgetrack.parity import open_runner
    from edgetrack.runtime.policies import ExitPolicy

    engines = None if name in BACKEND_NAMES else EngineSet.read(Path(name))
    backend = get_backend(name if engines is None else engines.key.backend)
    if engines is not None:
        key = engines.key
        engines.verify(
            backend.key(model=key.model, bundle_digest=key.bundle_digest, precision=key.precision)
        )
    runner = open_runner(bundle, backend, engines=engines)
    opened.callback(runner.close)
    thresholds = bundle.thresholds() if engines is None else engines.thresholds(bundle)
    return runner, ExitPolicy(thresholds, bundle.criterion)


def _plot_differences(report: "ParityReport", path: Path, *, title: str) -> None:
    from edgetrack.viz import plot_curves

    answers = ("bbox_cxcywh", "score", "uncertainty")
    curves: dict[str, list[tuple[float, float]]] = {}
    for position, t in enumerate(report.tensors):
        curves.setdefault(t.tensor if t.tensor in answers else "tokens", []).append(
            (position, t.rms)
        )
    graphs = "template, then segment by segment"
    plot_curves(
        curves, path, x_label=f"outputs in order: {graphs}", y_label="relative RMS", title=title
    )


def doctor(json: JsonOption = False) -> None:
    """Show what this machine has, and what to install for the rest.

    Example: edgetrack doctor
    """
    from edgetrack.doctor import examine

    report = examine()
    if json:
        print_json(report.as_dict())
        return
    rows = [(f.name, f.value, f.hint) for f in report]
    print_table("this machine", ("what", "found", "to do"), rows, is_numeric=False)


def _inspect_bundle(path: Path | None, *, as_json: bool) -> None:
    from edgetrack.bundle import Bundle

    bundle = Bundle.load(path)
    sizes = {name: (bundle.path / name).stat().st_size for name in bundle.files}
    graphs = [
        {
            "name": g.name,
            "macs": g.macs,
            "size_bytes": sizes[g.file],
            "inputs": [_shape(t) for t in g.inputs],
            "outputs": [_shape(t) for t in g.outputs],
        }
        for g in bundle.graphs
    ]
    if as_json:
        print_json(
            {
                "path": str(bundle.path),
                "name": bundle.name,
                "family": bundle.family,
                "paper": bundle.paper,
                "digest": bundle.digest,
                "graphs": graphs,
                "operating_points": dict(bundle.operating_points),
                "operating_point": bundle.operating_point,
                "carried": dict(bundle.carried),
                "criterion": bundle.criterion,
                "rules": dict(bundle.rules),
                "config": dict(bundle.config),
                "provenance": dict(bundle.provenance),
                "licence": bundle.licence,
                "files": sizes,
            }
        )
        return
    full, rows = bundle.exit_macs[-1] or 1, []
    shares = {"template": "once", "update": "every frame"}
    shares |= {f"segment_{k}": f"{macs / full:.0%}" for k, macs in enumerate(bundle.exit_macs)}
    for g in bundle.graphs:
        share = shares.get(g.name, "where taken")
        tensors = " ".join(t.name for t in g.inputs), " ".join(t.name for t in g.outputs)
        rows.append((g.name, f"{g.macs / 1e6:.0f} M", share, f"{sizes[g.file] / 1e6:.2f} MB",
                     *tensors))  # fmt: skip
    columns = ("graph", "MACs", "of full depth", "size", "reads", "writes")
    print_table(f"{bundle.name}  {bundle.path}", columns, rows, is_numeric=False)
    typer.echo(f"paper: {bundle.paper}")
    for name, thresholds in bundle.operating_points.items():
        default = " (default)" if name == bundle.operating_point else ""
        typer.echo(f"operating point {name}{default}: {when_to_stop(bundle.criterion, thresholds)}")
    rules = ", ".join(f"{name} {value:g}" for name, value in bundle.rules.items())
    typer.echo(f"rules: {rules or 'none'}")
    if bundle.carried:
        carried = ", ".join(f"{source} as {name}" for name, source in bundle.carried.items())
        typer.echo(f"carried to the next frame: {carried}")
    typer.echo(f"licence: {bundle.licence}")
    _print_provenance(bundle.provenance)


def _inspect_engines(path: Path, *, as_json: bool) -> None:
    from edgetrack.backends.engine import EngineSet
    from edgetrack.backends.trt.layer_table import read_layer_table

    engines = EngineSet.read(path)
    engines.verify(engines.key)
    tables = {n: read_layer_table(path / g.file) for n, g in engines.graphs.items()}
    if as_json:
        graphs = {
            name: {**vars(graph), "kernels": [vars(row) for row in tables[name]]}
            for name, graph in engines.graphs.items()
        }
        content = {**vars(engines), "key": vars(engines.key), "graphs": graphs}
        print_json({**content, "path": str(path)})
        return
    rows = [
        (
            name,
            graph.precision,
            f"{graph.size_bytes / 1e6:.2f} MB",
            f"{graph.build_s:.2f} s",
            len(tables[name]) or "",
            sum(row.is_attention for row in tables[name]) or "",
            graph.sha256[:8],
        )
        for name, graph in engines.graphs.items()
    ]
    columns = ("engine", "runs", "size", "build", "kernels", "fused attentions", "SHA-256")
    print_table(str(path), columns, rows)
    if engines.gate:
        print_gate(engines.gate, "what INT8 is worth here")
    for name, thresholds in engines.operating_points.items():
        below = ", ".join(f"{t:.4g}" for t in thresholds)
        typer.echo(f"operating point {name}, fitted to these engines: {below}")
    for name, value in vars(engines.key).items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"built_at: {engines.built_at}")


def _print_provenance(provenance: Any) -> None:
    evaluation = provenance.get("evaluation", {})
    for key, value in provenance.items():
        if value is not evaluation:
            text = f"{key}: {value}"
            typer.echo(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} … (all: --json)")
    if metrics := evaluation.get("metrics"):
        columns = ("stops", "success_auc", "precision_20px", "ao")
        rows = [
            (name, *(f"{row[column]:.3f}" for column in columns[1:]))
            for name, row in metrics.items()
        ]
        title = f"{evaluation['protocol']}, {len(evaluation['sequences'])} sequences"
        print_table(title, columns, rows)


def _shape(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
