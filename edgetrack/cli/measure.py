"""``edgetrack bench`` and ``edgetrack eval``: how fast, and how accurate."""

import contextlib
import functools
import hashlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.options import (
    DEFAULT_ENGINES,
    BackendOption,
    BundleOption,
    DeviceOption,
    EnginesOption,
    ExitDecisionOption,
    ExitPolicyOption,
    JsonOption,
    OperatingPointOption,
    PrecisionOption,
    RulesOption,
    ThreadsOption,
    ThresholdOption,
    open_tracker,
    parse_bbox,
    print_json,
    print_table,
    progress_bar,
)
from edgetrack.cli.tables import print_bench

if TYPE_CHECKING:
    from edgetrack.evaluate.results import Evaluation
    from edgetrack.tracker import Tracker

__all__ = ["bench", "evaluate"]

_SYNTHETIC = "a rendered clip"
_ENERGY_S = 3.0  # at each exit: 150 samples of each rail


def bench(
    source: Annotated[
        str | None, typer.Option(help="Video or folder to track [default: a rendered clip]")
    ] = None,
    bbox: Annotated[
        str | None, typer.Option(help="The target in its first frame: x,y,w,h in pixels")
    ] = None,
    frames: Annotated[int, typer.Option(min=2, help="Frames to time")] = 300,
    warm_up: Annotated[int, typer.Option(min=0, help="Updates before, not counted")] = 20,
    power: Annotated[bool, typer.Option("--power", help="Measure energy per frame too")] = False,
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    engines: EnginesOption = DEFAULT_ENGINES,
    operating_point: OperatingPointOption = None,
    exit_policy: ExitPolicyOption = None,
    threshold: ThresholdOption = None,
    rules: RulesOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = 0,
    exit_decision: ExitDecisionOption = "auto",
    json: JsonOption = False,
) -> None:
    """Time a tracker: every exit, the operating point, every stage.

    On a GPU also who decides to stop: the device, the host by a flag, or the host by waiting.

    Example: edgetrack bench --source car.mp4 --bbox 412,230,96,54 --threads 1 --power --json
    """
    from edgetrack.bench import bench as run_bench
    from edgetrack.doctor import examine
    from edgetrack.power import Nvml

    if (source is None) != (bbox is None):
        raise typer.BadParameter("--source and --bbox x,y,w,h go together", param_hint="--bbox")
    images, box = _frames(source, bbox, frames)
    open_deciding = functools.partial(
        open_tracker,
        bundle=bundle,
        backend=backend,
        precision=precision,
        engines=engines,
        operating_point=operating_point,
        exit_policy=exit_policy,
        threshold=threshold,
        rules=rules,
        threads=threads,
        device=device,
    )
    with contextlib.ExitStack() as opened:
        tracker = opened.enter_context(open_deciding(exit_decision=exit_decision))
        bar = opened.enter_context(progress_bar(is_shown=not json))
        nvml = Nvml.open(device) if tracker.gpu_memory_bytes else None
        opened.callback(nvml.close if nvml else lambda: None)
        num_passes = tracker.bundle.num_exits + 1
        total = num_passes * (3 if tracker.gpu_memory_bytes else 1) + (num_passes + 1) * power
        task = bar.add_task("", total=total)
        report = run_bench(
            tracker,
            images,
            box,
            num_warm_up=warm_up,
            on_pass=lambda name: bar.update(task, advance=1, description=name),
            open_deciding=lambda way: open_deciding(exit_decision=way),
            energy_s=_ENERGY_S if power else 0.0,
            nvml=nvml,
        )
    machine = {f.name: f.value for f in examine() if f.is_present}
    if json:
        print_json({**report.as_dict(), "source": source or _SYNTHETIC, "machine": machine})
        return
    print_bench(report, source or _SYNTHETIC, machine)


def evaluate(
    root: Annotated[Path, typer.Argument(help="Folder that holds a folder per sequence")],
    protocol: Annotated[
        str, typer.Option(help="ope: first frame not scored; otb: the toolkit's convention")
    ] = "ope",
    output: Annotated[
        Path | None, typer.Option(help="Keep boxes and scores here; a second run resumes")
    ] = None,
    bundle: BundleOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    engines: EnginesOption = DEFAULT_ENGINES,
    operating_point: OperatingPointOption = None,
    exit_policy: ExitPolicyOption = None,
    threshold: ThresholdOption = None,
    rules: RulesOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = 0,
    exit_decision: ExitDecisionOption = "auto",
    json: JsonOption = False,
) -> None:
    """Score a tracker on labelled sequences, one pass each.

    Example: edgetrack eval data/eval --output runs/eval --exit-policy always-last
    """
    from edgetrack.data.sequences import read_sequences
    from edgetrack.evaluate.protocols import PROTOCOLS
    from edgetrack.evaluate.results import evaluate as run_evaluation

    if protocol not in PROTOCOLS:
        raise typer.BadParameter(
            f"expected one of {', '.join(PROTOCOLS)}, got {protocol!r}", param_hint="--protocol"
        )
    if output is not None and output.exists() and not output.is_dir():
        raise typer.BadParameter(f"expected a folder, got the file {output}", param_hint="--output")
    sequences = read_sequences(root)
    with (
        open_tracker(
            bundle=bundle,
            backend=backend,
            precision=precision,
            engines=engines,
            operating_point=operating_point,
            exit_policy=exit_policy,
            threshold=threshold,
            rules=rules,
            threads=threads,
            device=device,
            exit_decision=exit_decision,
        ) as tracker,
        progress_bar(is_shown=not json) as bar,
    ):
        task = bar.add_task("evaluating", total=len(sequences))
        try:
            result = run_evaluation(
                tracker,
                sequences,
                protocol="otb" if protocol == "otb" else "ope",
                output=output,
                fingerprint=_fingerprint(tracker),
                on_sequence=lambda s: bar.update(task, advance=1, description=s.name),
            )
        except KeyboardInterrupt:
            hint = "the same command goes on" if output else "with --output it could be resumed"
            typer.echo(f"interrupted: {hint}", err=True)
            raise typer.Exit(130) from None
    if json:
        print_json(result.as_dict())
    else:
        _print_evaluation(result)


def _frames(source: str | None, bbox: str | None, count: int) -> tuple[list[Any], tuple[Any, ...]]:
    if source is None or bbox is None:
        from edgetrack.data.synthetic import render_clip

        clip = list(render_clip(num_frames=count))
        return [frame for frame, _ in clip], tuple(float(v) for v in clip[0][1])
    from edgetrack.frames import read_frames

    box = parse_bbox(bbox)
    with read_frames(source) as frames:
        return list(itertools.islice(frames, count)), box


def _fingerprint(tracker: "Tracker") -> str:
    """All that decides what the tracker says, for resuming an evaluation."""
    key = (
        tracker.bundle.digest,
        tracker.backend,
        tracker.precision,
        tracker.exit_policy.thresholds,
    )
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _print_evaluation(result: "Evaluation") -> None:
    def cells(name: str, metrics: Any, fps: float, histogram: tuple[int, ...]) -> tuple[str, ...]:
        return (
            name,
            f"{metrics.success_auc:.3f}",
            f"{metrics.precision_20px:.3f}",
            f"{metrics.norm_precision:.3f}",
            f"{fps:.0f}",
            "/".join(map(str, histogram)),
        )

    rows = [cells(s.name, s.metrics, s.fps, s.exit_histogram) for s in result.sequences]
    rows.append(cells("mean", result.mean, result.fps, result.exit_histogram))
    columns = ("sequence", "success AUC", "P@20px", "norm P", "fps", "exits")
    print_table(f"protocol {result.sequences[0].protocol}", columns, rows)
    rho = ", ".join(f"{k}: {v:.2f}" for k, v in enumerate(result.uncertainty_rho))
    typer.echo(f"Spearman's rho of uncertainty and IoU per exit: {rho}")
