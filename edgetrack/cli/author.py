"""``edgetrack train`` and ``edgetrack export``: from data to a bundle."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.options import progress_bar
from edgetrack.errors import BackendUnavailableError, DataError

if TYPE_CHECKING:
    from edgetrack.train.loop import Progress

__all__ = ["export", "train"]

_RESEARCH_LICENCE = "research data: research use"


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, such as early_exit_vit-tiny")],
    data: Annotated[Path, typer.Option(help="Training folder")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run [default: runs/RECIPE]")
    ] = None,
    stem: Annotated[Path | None, typer.Option(help="Pretrained ShuffleNetV2 stem, .npz")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each batch (one GPU or core each)")
    ] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes per process that make pairs")] = 0,
) -> None:
    """Train a model in two stages; the same command resumes an interrupted run.

    Example: edgetrack train early_exit_vit-tiny --data data/train --processes 2
    """
    with _author_side():
        from edgetrack.train.recipes import get_recipe
        from edgetrack.train.run import run_recipe

    try:
        chosen = get_recipe(recipe)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RECIPE") from error
    if not data.is_dir():
        raise DataError(f"{data}: expected a training folder, got none; check --data")
    if stem is not None and not stem.is_file():
        raise typer.BadParameter(f"expected a file, got {stem}", param_hint="--stem")
    if processes > 1 and "RANK" not in os.environ:
        _relaunch(processes)
    folder = output or Path("runs") / recipe
    is_first = os.environ.get("RANK", "0") == "0"
    with progress_bar(is_shown=is_first) as bar:
        task = bar.add_task("reading data", total=None)

        def show(progress: "Progress") -> None:
            terms = "  ".join(f"{k} {progress.terms[k]:.3f}" for k in sorted(progress.terms)
                              if k == "loss" or k.startswith("iou"))  # fmt: skip
            bar.update(
                task,
                description=f"stage {progress.stage}  {terms}  {progress.samples_per_s:.0f}/s",
                completed=progress.step,
                total=progress.num_steps,
            )

        try:
            run_recipe(chosen, data, folder, stem=stem, num_workers=workers, on_progress=show)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: kept in {folder}; the same command goes on", err=True)
            raise typer.Exit(130) from None
    if is_first:
        typer.echo(f"trained: {folder}; next: edgetrack export {folder} --output my_bundle")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run")],
    output: Annotated[Path, typer.Option(help="The bundle's folder, replaced if it exists")],
    point: Annotated[
        list[str] | None,
        typer.Option(help="Operating point name=t0,t1: thresholds per exit but the last; repeat"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name [default: the model's]")] = None,
    licence: Annotated[
        str, typer.Option(help="What the weights may be used for")
    ] = _RESEARCH_LICENCE,
) -> None:
    """Turn a training run into a bundle.

    Example: edgetrack export runs/early_exit_vit-tiny --output my_bundle --point balanced=0.2,0.25
    """
    with _author_side():
        from edgetrack.export import export_bundle
        from edgetrack.train.loop import load_trained
        from edgetrack.train.run import read_provenance

    model = load_trained(run)
    provenance = read_provenance(run)
    points = dict(_parse_point(p) for p in point or ())
    for label, thresholds in points.items():
        if not label or len(thresholds) != model.num_exits - 1:
            raise typer.BadParameter(
                f"expected a name and {model.num_exits - 1} thresholds, got {label!r} and "
                f"{len(thresholds)}",
                param_hint="--point",
            )
    if not points:
        points = {"balanced": (0.3,) * (model.num_exits - 1)}
    with typer.progressbar(length=1, label="exporting", file=sys.stderr) as bar:
        bundle = export_bundle(
            model,
            output,
            name=name or provenance["recipe"]["model"],
            operating_points=points,
            operating_point=next(iter(points)),
            provenance=provenance,
            licence=licence,
        )
        bar.update(1)
    typer.echo(f"bundle: {bundle.path}; next: edgetrack build {bundle.path}")


@contextlib.contextmanager
def _author_side() -> Iterator[None]:
    """Import what only the author side has; a base install lacks it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"training: expected the packages of the author side, got: {error}; install torch, "
            "then run: pip install 'edgetrack[train]'"
        ) from error


def _parse_point(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, values = text.partition("=")
    try:
        return name, tuple(float(v) for v in values.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected name=t0,t1 such as balanced=0.2,0.25, got {text!r}", param_hint="--point"
        ) from None


def _relaunch(processes: int) -> Any:
    """Run this command again in several processes that find each other."""
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(processes), "-m", "edgetrack", *sys.argv[1:]]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with subprocess.Popen(command, env=environment) as running:
        try:
            code = running.wait()
        except KeyboardInterrupt:
            running.wait()  # the processes got it too, and keep a checkpoint before they end
            code = 130
    raise typer.Exit(code)
