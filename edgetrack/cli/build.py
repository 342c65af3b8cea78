"""``edgetrack build``: engines for this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrack.cli.options import (
    BackendOption,
    DeviceOption,
    JsonOption,
    PrecisionOption,
    check_choices,
    parse_bbox,
    print_json,
    print_table,
    progress_bar,
)
from edgetrack.cli.tables import print_gate

if TYPE_CHECKING:
    from edgetrack.backends.engine import EngineSet
    from edgetrack.build import BuildProgress
    from edgetrack.data.target_clips import TargetClip

__all__ = ["build", "build_engines"]


def build(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder [default: the one that ships]")
    ] = None,
    precision: PrecisionOption = None,
    backend: BackendOption = "auto",
    output: Annotated[Path, typer.Option(help="Where engine folders go")] = Path("engines"),
    force: Annotated[bool, typer.Option("--force", help="Build even what is up to date")] = False,
    device: DeviceOption = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For int8: a calibration cache or a folder of them [default: calibration/, then "
            "the bundle's own]"
        ),
    ] = None,
    calibration_frames: Annotated[
        list[str] | None,
        typer.Option(
            help="For int8: calibrate first, on a video or folder of pictures, with --bbox; or on "
            "a folder of labelled sequences; repeat"
        ),
    ] = None,
    bbox: Annotated[
        str | None, typer.Option(help="The target in the first of --calibration-frames: x,y,w,h")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Keep INT8 where it is no faster, or does harm, as well"),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Compile a bundle's segments into engines for this machine.

    INT8 is compared with float on this device; what is not faster, or says something else, stays in
    float.

    Example: edgetrack build --precision int8 --calibration-frames car.mp4 --bbox 412,230,96,54
    """
    if precision != "int8" and (calibration_frames or strict or calibration is not None):
        raise typer.BadParameter(
            "expected int8 with --calibration, --calibration-frames or --strict, got "
            f"{precision or 'none'}",
            param_hint="--precision",
        )
    clips = _clips(calibration_frames or [], bbox)
    engines, is_new = build_engines(
        bundle,
        precision=precision,
        backend=backend,
        output=output,
        force=force,
        device=device,
        calibration=calibration,
        calibration_clips=clips,
        is_strict=strict,
        is_quiet=json,
    )
    if json:
        content = {name: vars(graph) for name, graph in engines.graphs.items()}
        print_json(
            {
                "path": str(engines.path),
                "is_new": is_new,
                "graphs": content,
                "operating_points": dict(engines.operating_points),
                "gate": dict(engines.gate),
            }
        )
        return
    if not is_new:
        typer.echo(f"up to date: {engines.path}")
    if engines.gate:
        print_gate(engines.gate, str(engines.path))
    elif is_new:
        rows = [
            (name, f"{g.build_s:.2f} s", f"{g.size_bytes / 1e6:.2f} MB")
            for name, g in engines.graphs.items()
        ]
        print_table(str(engines.path), ("graph", "build", "size"), rows)


def build_engines(
    bundle: Path | None,
    *,
    precision: str | None = None,
    backend: str = "auto",
    output: Path,
    force: bool = False,
    device: int = 0,
    calibration: Path | None = None,
    calibration_clips: "Sequence[TargetClip]" = (),
    is_strict: bool = False,
    is_quiet: bool = False,
) -> "tuple[EngineSet, bool]":
    """Build with a progress bar; also says whether anything had to be built."""
    import edgetrack

    check_choices(backend, precision)
    is_new = False
    with progress_bar(is_shown=not is_quiet) as bar:
        task = bar.add_task("building", total=None, visible=False)

        def show(progress: "BuildProgress") -> None:
            nonlocal is_new
            is_new = is_new or bool(progress.graph)  # calibrating builds nothing yet
            subject = f"building {progress.graph}: " if progress.graph else ""
            bar.update(
                task,
                description=f"{subject}{progress.phase}",
                completed=progress.index + progress.fraction,
                total=progress.num_graphs,
                visible=True,
            )

        engines = edgetrack.build(
            bundle,
            precision=precision,
            backend=backend,
            output=output,
            force=force,
            device=device,
            calibration=calibration,
            calibration_clips=calibration_clips,
            is_strict=is_strict,
            on_progress=show,
        )
    return engines, is_new


def _clips(sources: list[str], bbox: str | None) -> "list[TargetClip]":
    """What ``--calibration-frames`` names."""
    if not sources:
        if bbox is not None:
            raise typer.BadParameter("expected --calibration-frames with it", param_hint="--bbox")
        return []
    from edgetrack.data.target_clips import read_target_clips

    return read_target_clips(sources, bbox=None if bbox is None else parse_bbox(bbox))
