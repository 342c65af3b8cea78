"""``edgetrack build``: engines for this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrack.cli.options import (
    BackendOption,
    DeviceOption,
    JsonOption,
    PrecisionOption,
    check_choices,
    print_json,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    from edgetrack.backends.engine import EngineSet
    from edgetrack.build import BuildProgress

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
    json: JsonOption = False,
) -> None:
    """Compile a bundle's segments into engines for this machine.

    Example: edgetrack build --precision fp16 --backend tensorrt
    """
    engines, is_new = build_engines(
        bundle,
        precision=precision,
        backend=backend,
        output=output,
        force=force,
        device=device,
        calibration=calibration,
        is_quiet=json,
    )
    if json:
        content = {name: vars(graph) for name, graph in engines.graphs.items()}
        print_json({"path": str(engines.path), "is_new": is_new, "graphs": content})
    elif not is_new:
        typer.echo(f"up to date: {engines.path}")
    else:
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
            is_new = True
            bar.update(
                task,
                description=f"building {progress.graph}: {progress.phase}",
                completed=progress.index + int(progress.fraction),
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
            on_progress=show,
        )
    return engines, is_new
