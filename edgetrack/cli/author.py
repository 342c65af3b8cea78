"""``edgetrack train`` and ``edgetrack export``: from data to a bundle."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.bundle import RESEARCH_LICENCE
from edgetrack.cli.options import check_criterion, parse_rules, progress_bar
from edgetrack.cli.tables import when_to_stop
from edgetrack.errors import BackendUnavailableError, DataError

if TYPE_CHECKING:
    from edgetrack.data.sequences import Sequence
    from edgetrack.models.segmented import SegmentedModel
    from edgetrack.train.loop import Progress
    from edgetrack.train.recipes import Recipe, Stage

__all__ = ["author_side", "cut", "export", "train"]


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, such as early_exit_vit-tiny")],
    data: Annotated[
        list[str],
        typer.Option(help="Training folder, or LAYOUT=ROOT such as got10k=/data/GOT-10k; repeat"),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run [default: runs/RECIPE]")
    ] = None,
    stem: Annotated[Path | None, typer.Option(help="Pretrained ShuffleNetV2 stem, .npz")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Bundle whose weights to start from")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Bundle to learn from, for recipes that have a teacher")
    ] = None,
    pseudo_tracks: Annotated[
        Path | None, typer.Option(help="Tracks that edgetrack pseudolabel made")
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Weights of sources that replace the recipe's: got10k=2,coco=1"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's")] = None,
    samples: Annotated[
        str | None,
        typer.Option(help="Pairs of each stage instead of the recipe's: N,M, or N for all"),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Pairs per step instead of the recipe's, of all processes together: N,M, or N for "
            "all stages; the learning rate stays"
        ),
    ] = None,
    search_size: Annotated[
        str | None,
        typer.Option(
            help="Side of the search region, px, instead of the recipe's: N,M; a run for each, in "
            "its own folder; the template keeps its share"
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each batch (one GPU or core each)")
    ] = 1,
    is_compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the step with torch.compile; for GPUs")
    ] = False,
) -> None:
    """Train a model; the same command resumes an interrupted run.

    Example: edgetrack train early_exit_vit-tiny --data data/train --processes 2
    """
    with author_side():
        from edgetrack.bundle import Bundle
        from edgetrack.data.layouts import FOLDER, parse_source
        from edgetrack.train.recipes import get_recipe
        from edgetrack.train.run import run_recipe

    try:
        chosen = get_recipe(recipe)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RECIPE") from error
    if mix is not None:
        chosen = dataclasses.replace(chosen, mix=_parse_mix(mix))
    if seed is not None:
        chosen = dataclasses.replace(chosen, seed=seed)
    if samples is not None:
        chosen = dataclasses.replace(chosen, stages=_with(chosen.stages, samples=samples))
    if batch_size is not None:
        chosen = dataclasses.replace(chosen, stages=_with(chosen.stages, batch_size=batch_size))
    if any(stage.batch_size % processes for stage in chosen.stages):
        raise typer.BadParameter(
            f"expected a divisor of the batch size {[s.batch_size for s in chosen.stages]}, "
            f"got {processes}",
            param_hint="--processes",
        )
    sources = [parse_source(text) for text in data]
    for name, root in sources:
        if not root.is_dir():
            kind = "training folder" if name == FOLDER else f"folder of {name} data"
            raise DataError(f"{root}: expected a {kind}, got none; check --data")
    if stem is not None and not stem.is_file():
        raise typer.BadParameter(f"expected a file, got {stem}", param_hint="--stem")
    start_bundle = None if start is None else Bundle.load(start)
    teacher_bundle = None if teacher is None else Bundle.load(teacher)
    runs = {output or Path("runs") / recipe: chosen}
    if search_size is not None:
        whole = next(iter(runs))
        sized = _at_sizes(chosen, search_size)
        runs = {whole.with_name(f"{whole.name}-{size}"): one for size, one in sized.items()}
    if processes > 1 and "RANK" not in os.environ:
        _relaunch(processes)
    is_first = os.environ.get("RANK", "0") == "0"
    with progress_bar(is_shown=is_first) as bar:
        task = bar.add_task("reading data", total=None)

        def show_reading(name: str, num_done: int, num_parts: int) -> None:
            bar.update(task, description=f"reading {name}", completed=num_done, total=num_parts)

        def show(progress: "Progress") -> None:
            terms = "  ".join(f"{k} {progress.terms[k]:.3f}" for k in sorted(progress.terms)
                              if k == "loss" or k.startswith("iou"))  # fmt: skip
            bar.update(
                task,
                description=f"stage {progress.stage}  {terms}  {progress.samples_per_s:.0f}/s",
                completed=progress.step,
                total=progress.num_steps,
            )

        def show_start(num_loaded: int, num_all: int) -> None:
            rest = ", the others are new" if num_loaded < num_all else ""
            typer.echo(f"{num_loaded} of {num_all} tensors start from {start}{rest}")

        next_steps = []
        for folder, one in runs.items():
            try:
                model = run_recipe(
                    one,
                    sources,
                    folder,
                    stem=stem,
                    start=start_bundle,
                    teacher=teacher_bundle,
                    pseudo_tracks=pseudo_tracks,
                    is_compiled=is_compiled,
                    on_reading=show_reading,
                    on_start=show_start,
                    on_progress=show,
                )
            except KeyboardInterrupt:
                typer.echo(f"interrupted: kept in {folder}; the same command goes on", err=True)
                raise typer.Exit(130) from None
            option = " --calibrate DATA" if model.num_exits > 1 else ""
            next_steps.append(
                f"trained: {folder}; next: edgetrack export {folder} --output "
                f"{folder.resolve().name}_bundle{option}"
            )
    for line in next_steps if is_first else ():
        typer.echo(line)


def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folder of a training run; of several, which started from the same weights, the "
            "mean of their weights",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The bundle's folder, replaced if it exists")],
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Choose the operating points accurate, balanced and fast on the recipe's "
            "calibration clips of this training folder, on this folder of sequences, or on "
            "LAYOUT:SPLIT=ROOT such as got10k:val=/data/GOT-10k"
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="Operating point name=t0,t1: thresholds per exit but the last; repeat"),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What thresholds are compared with: entropy, score or combined "
            "[default: the family's]"
        ),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            help="How answers become the target's state: name=number,... or nothing, '' "
            "[default: what was tuned on the model's scores, if anything]"
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Sequences to score every exit and operating point on, for the manifest"),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(help="Layers with an exit behind them, of a fartrack: 6 or 6,10,15"),
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="Share of a template's tokens that stays, of a fartrack")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name [default: the model's]")] = None,
    licence: Annotated[
        str, typer.Option(help="What the weights may be used for")
    ] = RESEARCH_LICENCE,
) -> None:
    """Turn a training run into a bundle.

    Example: edgetrack export runs/early_exit_vit-tiny --output my_bundle --calibrate data/train
    """
    from edgetrack.data.sequences import read_sequences
    from edgetrack.evaluate.exits import calibrate_exits, score_exits

    with author_side():
        from edgetrack.export import export_bundle
        from edgetrack.train.run import read_provenance
        from edgetrack.train.soup import load_soup

    if criterion is not None:
        check_criterion(criterion)
    target_rules = None if rules is None else parse_rules(rules)
    model = cut(load_soup(runs), exits=exits, retention=retention)
    provenance = read_provenance(runs[0])
    if len(runs) > 1:
        provenance |= {"mean_of": [read_provenance(run) for run in runs]}
    points = dict(_parse_point(p) for p in point or ())
    for label, thresholds in points.items():
        if not label or len(thresholds) != model.num_exits - 1:
            raise typer.BadParameter(
                f"expected a name and {model.num_exits - 1} thresholds, got {label!r} and "
                f"{len(thresholds)}",
                param_hint="--point",
            )
    if points and calibrate is not None:
        raise typer.BadParameter("expected it alone, got --point too", param_hint="--calibrate")
    if calibrate is not None and model.num_exits == 1:
        raise typer.BadParameter(
            "expected a model with exits to choose between, got one exit", param_hint="--calibrate"
        )
    sequences = _calibration_sequences(calibrate, provenance) if calibrate is not None else []
    with progress_bar() as bar:
        task = bar.add_task("exporting", total=None)
        bundle = export_bundle(
            model,
            output,
            name=name or provenance["recipe"]["model"],
            operating_points=points,
            provenance=provenance,
            licence=licence,
            criterion=criterion,
            rules=model.rules if target_rules is None else target_rules,
        )
        if sequences:
            bar.update(task, description="calibrating")
            bundle = calibrate_exits(bundle, sequences)
        if evaluate is not None:
            bundle = score_exits(
                bundle,
                read_sequences(evaluate),
                on_progress=lambda name: bar.update(task, description=f"scoring {name}"),
            )
    for label, thresholds in bundle.operating_points.items():
        typer.echo(f"{label}: {when_to_stop(bundle.criterion, thresholds)}")
    typer.echo(f"bundle: {bundle.path}; next: edgetrack build {bundle.path}")


def cut(model: "SegmentedModel", *, exits: str | None, retention: float | None) -> "SegmentedModel":
    """The part of a model that is to be exported."""
    from edgetrack.models.fartrack import FARTrack

    hint = "--retention" if exits is None else "--exits"
    if exits is None and retention is None:
        return model
    if not isinstance(model, FARTrack):
        raise typer.BadParameter(f"expected a fartrack, got {model.family}", param_hint=hint)
    changes: dict[str, Any] = {} if retention is None else {"retention": retention}
    if exits is not None:
        if not all(part.strip().isdecimal() for part in exits.split(",")):
            raise typer.BadParameter(
                f"expected numbers of layers such as 6,10,15, got {exits!r}", param_hint=hint
            )
        changes["exit_after"] = tuple(int(part) for part in exits.split(","))
    try:
        return model.cut(**changes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from error


def _calibration_sequences(source: str, provenance: Mapping[str, Any]) -> "list[Sequence]":
    """The recipe's calibration clips of a training folder, or the sequences of another source."""
    from edgetrack.data.layouts import FOLDER, parse_source, read_layout_sequences
    from edgetrack.data.sequences import read_sequence, read_sequences

    layout, folder = parse_source(source)
    if layout != FOLDER:
        return read_layout_sequences(layout, folder)
    clips = provenance["recipe"].get("calibration_clips", ())
    if not (folder / "videos").is_dir():
        return list(read_sequences(folder))
    if not clips:
        raise DataError(
            f"{folder}: expected sequences, got a training folder, and the recipe kept none of its "
            "clips out of training; name a folder of sequences that were not trained on"
        )
    return [read_sequence(folder / "videos" / clip) for clip in clips]


def _parse_mix(text: str) -> dict[str, float]:
    try:
        return {k: float(v) for k, _, v in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise typer.BadParameter(
            f"expected name=weight,... such as got10k=2,coco=1, got {text!r}", param_hint="--mix"
        ) from None


def _with(stages: "tuple[Stage, ...]", **texts: str) -> "tuple[Stage, ...]":
    """Stages with one of their numbers changed: one for all, or one per stage."""
    ((name, text),) = texts.items()
    try:
        numbers = [int(v) for v in text.split(",")]
        numbers *= len(stages) if len(numbers) == 1 else 1
        changes: list[dict[str, Any]] = [{name: number} for number in numbers]
        pairs = zip(stages, changes, strict=True)
        return tuple(dataclasses.replace(stage, **change) for stage, change in pairs)
    except ValueError:
        raise typer.BadParameter(
            f"expected a whole number of at least 1, or {len(stages)}, one per stage, such as "
            f"{','.join(str(getattr(s, name)) for s in stages)}, got {text!r}",
            param_hint=f"--{name.replace('_', '-')}",
        ) from None


def _at_sizes(recipe: "Recipe", text: str) -> "dict[int, Recipe]":
    """Side of the search region → the recipe at it."""
    crops = recipe.create_model().crops
    found = {}
    for part in text.split(","):
        try:
            size = int(part)
            sides = {
                "search_size_px": size,
                "template_size_px": size * crops.template_size_px // crops.search_size_px,
            }
            changed = {**recipe.model_config, **sides}
            found[size] = dataclasses.replace(
                recipe, name=f"{recipe.name}-{size}", model_config=changed
            )
            found[size].create_model()
        except (ValueError, ZeroDivisionError) as error:
            raise typer.BadParameter(
                f"expected sides that the model can have, such as 128,96, got {part!r}: {error}",
                param_hint="--search-size",
            ) from None
    return found


@contextlib.contextmanager
def author_side() -> Iterator[None]:
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
