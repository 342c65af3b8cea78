"""``edgetrack prune``: from one bundle to narrower ones."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.author import author_side
from edgetrack.cli.options import (
    BackendOption,
    JsonOption,
    ThreadsOption,
    check_choices,
    milliseconds,
    print_json,
    print_table,
    progress_bar,
)
from edgetrack.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from edgetrack.bundle import Bundle
    from edgetrack.data.sequences import Sequence as LabelledSequence
    from edgetrack.train.loop import Progress
    from edgetrack.train.prune import Pruned
    from edgetrack.train.prune_run import PruneData
    from edgetrack.train.prune_target import FoundBudget, Timing

__all__ = ["prune"]

# Turns are short, so that all bundles of a round meet the same load: this many updates of each at
# most, and no more than a few of those that take long.
_ROUNDS, _TIMED_FRAMES, _WARM_UP, _TURN_MS = 7, 12, 2, 500.0


def prune(
    source: Annotated[Path, typer.Argument(help="Bundle with weights, or folder of a run")],
    budget: Annotated[
        str | None, typer.Option(help="Shares of the units to keep, a bundle each: 0.75,0.5,0.25")
    ] = None,
    target_ms: Annotated[
        float | None,
        typer.Option(
            help="Find the largest budget whose full-depth update takes no longer on this machine, "
            "by timing narrow bundles in turns"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the bundles and runs")] = Path(
        "runs/pruned"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Search and fine-tune on this, as for edgetrack train; repeat [default: rate by "
            "weights, no training]"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Pairs of the search, and of each fine-tuning")
    ] = 8_000,
    parts: Annotated[
        str, typer.Option(help="What shrinks: some of trunk, head and stem")
    ] = "trunk,head,stem",
    heads: Annotated[
        str,
        typer.Option(help="uniform: heads of a layer keep as many; free: empty heads may go"),
    ] = "uniform",
    multiple: Annotated[
        int, typer.Option(min=1, help="Round kept numbers up to a multiple of this")
    ] = 8,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Choose operating points anew, on this folder of labelled sequences"),
    ] = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Cut units out of a model until a share of them is left, and write a bundle for each share.

    Example: edgetrack prune my_bundle --budget 0.5,0.25 --data data/train
    """
    check_choices(backend, None)
    budgets = _budgets(budget, target_ms)
    from edgetrack.evaluate.exits import calibrate_exits

    with author_side():
        from edgetrack.train.prune import PARTS, Rounding
        from edgetrack.train.prune import prune as cut
        from edgetrack.train.prune_run import open_dense, rate_units

    chosen = tuple(parts.split(","))
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise typer.BadParameter(
            f"expected some of {', '.join(PARTS)}, got {', '.join(unknown)}", param_hint="--parts"
        )
    try:
        rounding = Rounding(heads=heads, multiple=multiple)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--heads") from error
    training = _data(data or [], samples)
    with progress_bar(is_shown=not json) as bar, tempfile.TemporaryDirectory() as scratch:
        report = _Report(bar)
        dense, model = open_dense(source, output)
        sequences = _calibration_sequences(calibrate, dense)
        scores = rate_units(dense, model, output, data=training, on_progress=report.of("search"))
        job = _Job(
            dense=dense,
            cut_to=lambda share: cut(model, scores, share, rounding=rounding, parts=chosen),
            time_in_turns=lambda bundles: _time_in_turns(
                bundles, backend, threads, engines=Path(scratch) / "engines"
            ),
            data=training,
            output=output,
            report=report,
        )
        found = None if target_ms is None else job.find(target_ms, Path(scratch))
        bundles = [job.bundle_of(share) for share in (budgets if found is None else [found.budget])]
        if sequences:
            report.say("calibrating")
            bundles = [calibrate_exits(bundle, sequences) for bundle in bundles]
        report.say("timing")
        timings = job.time_in_turns([dense, *bundles])
        rows = [_row(b, timing) for b, timing in zip([dense, *bundles], timings, strict=True)]
        rows[0]["parameters"] = sum(p.numel() for p in model.parameters())
    if json:
        print_json(rows)
        return
    if found is not None and target_ms is not None:
        typer.echo(
            f"budget {found.budget:.3g} for {target_ms:g} ms: {found.timings[found.budget]}, the "
            f"largest within it of {len(found.timings)} timed in turns at full depth; dense: "
            f"{found.timings[1.0]}"
        )
    title = f"{dense.name} pruned" + ("" if training else ", rated by weights, not fine-tuned")
    columns = ("budget", "units", "parameters", "MACs", "ms at full depth", "half of rounds")
    print_table(title, columns, [_cells(row) for row in rows])
    for row in (row for row in rows if row["floored"]):
        typer.echo(
            f"{row['bundle']}: {row['floored']} layers, which the budget empties, keep one unit"
        )
    if calibrate is None and dense.num_exits > 1:
        typer.echo("thresholds are the dense bundle's: --calibrate SEQUENCES chooses them anew")
    typer.echo(f"next: edgetrack build {bundles[-1].path}")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is the same for every budget."""

    dense: "Bundle"
    cut_to: Callable[[float], "Pruned"]
    time_in_turns: "Callable[[Sequence[Bundle]], list[Timing]]"
    data: "PruneData | None"
    output: Path
    report: "_Report"

    def find(self, target_ms: float, folder: Path) -> "FoundBudget":
        """The budget for a time; training does not change times, so nothing is trained.

        Narrow bundles are written into the folder.
        """
        from edgetrack.train.prune_run import export_pruned
        from edgetrack.train.prune_target import budget_for

        narrow = {1.0: self.dense}

        def time_together(shares: Sequence[float]) -> "list[Timing]":
            for share in shares:
                if share not in narrow:
                    self.report.say(f"cutting to {share:.3f}")
                    pruned, path = self.cut_to(share), folder / f"{share:.6f}"
                    narrow[share] = export_pruned(
                        self.dense, pruned.model, pruned, path, budget=share, samples=0
                    )
            self.report.say("timing " + ", ".join(f"{share:.3f}" for share in shares))
            return self.time_in_turns([narrow[share] for share in shares])

        return budget_for(target_ms, time_together)

    def bundle_of(self, share: float) -> "Bundle":
        """The bundle with a share of the units, fine-tuned if there is data."""
        from edgetrack.train.prune_run import export_pruned, fine_tune

        pruned, label = self.cut_to(share), f"tuned-{share:.3g}"
        model = pruned.model
        if self.data is not None:
            show = self.report.of(label)
            model = fine_tune(
                self.dense, pruned, self.output, label=label, data=self.data, on_progress=show
            )
        self.report.say(f"exporting {share:.3g}")
        return export_pruned(
            self.dense,
            model,
            pruned,
            self.output / f"{self.dense.name}-{share:.3g}",
            budget=share,
            samples=0 if self.data is None else self.data.samples,
        )


def _budgets(text: str | None, target_ms: float | None) -> list[float]:
    from edgetrack.train.prune import check_budget

    if (text is None) == (target_ms is None):
        raise typer.BadParameter("expected it or --target-ms, one of the two",
                                 param_hint="--budget")  # fmt: skip
    if target_ms is not None and not target_ms > 0:
        raise typer.BadParameter(f"expected above 0, got {target_ms:g}", param_hint="--target-ms")
    try:
        return [] if text is None else [check_budget(float(part)) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected shares above 0 and up to 1 such as 0.5,0.25, got {text!r}: {error}",
            param_hint="--budget",
        ) from error


def _data(texts: list[str], samples: int) -> "PruneData | None":
    if not texts:
        return None
    from edgetrack.data.layouts import FOLDER, parse_source
    from edgetrack.train.prune_run import PruneData

    sources = [parse_source(text) for text in texts]
    for name, root in sources:
        if not root.is_dir():
            kind = "training folder" if name == FOLDER else f"folder of {name} data"
            raise DataError(f"{root}: expected a {kind}, got none; check --data")
    batch_size = min(samples, PruneData.batch_size)
    return PruneData(
        sources=sources, search_samples=samples, samples=samples, batch_size=batch_size
    )


def _calibration_sequences(folder: Path | None, dense: "Bundle") -> "list[LabelledSequence]":
    """What --calibrate names: checked before anything is trained."""
    from edgetrack.data.sequences import read_sequences

    if folder is None:
        return []
    if dense.num_exits == 1:
        raise typer.BadParameter(
            "expected a model with exits to choose between, got one exit; leave it out",
            param_hint="--calibrate",
        )
    return read_sequences(folder)


class _Report:
    """What the progress bar says."""

    def __init__(self, bar: "Bar") -> None:
        self.bar, self.task = bar, bar.add_task("opening", total=None)

    def say(self, text: str) -> None:
        self.bar.update(self.task, description=text, total=None)

    def of(self, label: str) -> Callable[["Progress"], None]:
        def show(progress: "Progress") -> None:
            self.bar.update(
                self.task,
                description=f"{label}  loss {progress.terms['loss']:.3f}",
                completed=progress.step,
                total=progress.num_steps,
            )

        return show


def _time_in_turns(
    bundles: "Sequence[Bundle]", backend: str, threads: int | None, *, engines: Path
) -> "list[Timing]":
    """Time of an update that runs every segment, on a rendered clip, as bundles are built."""
    from edgetrack.build import build
    from edgetrack.data.synthetic import render_clip
    from edgetrack.runtime.policies import ExitPolicy
    from edgetrack.tracker import Tracker
    from edgetrack.train.prune_target import Timing

    clip = list(render_clip(num_frames=1 + _WARM_UP + _TIMED_FRAMES, seed=0))
    for bundle in bundles:
        build(bundle, backend=backend, output=engines)
    rounds: list[list[float]] = [[] for _ in bundles]
    for _ in range(_ROUNDS):
        for bundle, medians in zip(bundles, rounds, strict=True):
            policy = ExitPolicy.always_last(num_exits=bundle.num_exits)
            with Tracker(
                bundle, backend=backend, engines=engines, exit_policy=policy, num_threads=threads
            ) as tracker:
                tracker.init(clip[0][0], clip[0][1].tolist())
                times: list[float] = []
                for frame, _ in clip[1:]:
                    times.append(tracker.update(frame).latency_ms)
                    if len(times) > _WARM_UP and sum(times) > _TURN_MS:
                        break
            medians.append(statistics.median(times[_WARM_UP:]))
    return [Timing(rounds_ms=tuple(medians)) for medians in rounds]


def _row(bundle: "Bundle", timing: "Timing") -> dict[str, Any]:
    pruning = bundle.provenance.get("pruning", {})
    return {
        "bundle": bundle.path.name,
        "budget": pruning.get("budget", 1.0),
        "share_of_units": pruning.get("share_of_units", 1.0),
        "floored": len(pruning.get("floored", ())),
        "parameters": pruning.get("parameters"),
        "macs": sum(graph.macs for graph in bundle.segments),
        "full_depth_ms": timing.median_ms,
        "spread_ms": list(timing.spread_ms),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['budget']:.3g}",
        f"{row['share_of_units']:.1%}",
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['macs'] / 1e6:.0f} M",
        milliseconds(row["full_depth_ms"]),
        " to ".join(map(milliseconds, row["spread_ms"])),
    )
