"""``edgetrack inspect`` and ``edgetrack doctor``: what is in a folder, what is on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edgetrack.cli.options import JsonOption, print_json, print_table
from edgetrack.errors import BundleError

__all__ = ["doctor", "inspect"]


def inspect(
    path: Annotated[
        Path | None, typer.Argument(help="Bundle or engine folder [default: the one that ships]")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what is in a bundle or in a folder of engines.

    Example: edgetrack inspect my_bundle
    """
    from edgetrack.backends.engine import SIDECAR_NAME

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
                "criterion": bundle.criterion,
                "rules": dict(bundle.rules),
                "config": dict(bundle.config),
                "provenance": dict(bundle.provenance),
                "licence": bundle.licence,
                "files": sizes,
            }
        )
        return
    total, done, rows = sum(g.macs for g in bundle.segments) or 1, 0, []
    for g in bundle.graphs:
        done += g.macs if g is not bundle.template else 0
        share = "once" if g is bundle.template else f"{done / total:.0%}"
        tensors = " ".join(t.name for t in g.inputs), " ".join(t.name for t in g.outputs)
        rows.append((g.name, f"{g.macs / 1e6:.0f} M", share, f"{sizes[g.file] / 1e6:.2f} MB",
                     *tensors))  # fmt: skip
    columns = ("graph", "MACs", "of full depth", "size", "reads", "writes")
    print_table(f"{bundle.name}  {bundle.path}", columns, rows, is_numeric=False)
    typer.echo(f"paper: {bundle.paper}")
    for name, thresholds in bundle.operating_points.items():
        default = " (default)" if name == bundle.operating_point else ""
        below = ", ".join(f"{t:.4g}" for t in thresholds)
        typer.echo(
            f"operating point {name}{default}: stop where {bundle.criterion} is below {below}"
        )
    rules = ", ".join(f"{name} {value:g}" for name, value in bundle.rules.items())
    typer.echo(f"rules: {rules or 'none'}")
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
        key = vars(engines.key)
        print_json({"path": str(path), "key": key, "built_at": engines.built_at, "graphs": graphs})
        return
    rows = [
        (
            name,
            f"{graph.size_bytes / 1e6:.2f} MB",
            f"{graph.build_s:.2f} s",
            len(tables[name]) or "",
            sum(row.is_attention for row in tables[name]) or "",
            graph.sha256[:12],
        )
        for name, graph in engines.graphs.items()
    ]
    columns = ("engine", "size", "build", "kernels", "fused attentions", "SHA-256")
    print_table(str(path), columns, rows)
    for name, value in vars(engines.key).items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"built_at: {engines.built_at}")


def _print_provenance(provenance: Any) -> None:
    evaluation = provenance.get("evaluation", {})
    for key, value in provenance.items():
        if value is not evaluation:
            typer.echo(f"{key}: {value}")
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
