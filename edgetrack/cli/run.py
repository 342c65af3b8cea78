"""``edgetrack track`` and ``edgetrack demo``: follow an object through a video."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.build import build_engines
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
    milliseconds,
    open_tracker,
    parse_bbox,
    print_json,
    print_table,
    progress_bar,
)
from edgetrack.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgetrack.evaluate.protocols import FrameRow
    from edgetrack.frames import VideoSink
    from edgetrack.tracker import Tracker, TrackResult

__all__ = ["demo", "track"]

_DEMO_FRAMES = 240


def track(
    source: Annotated[
        str, typer.Argument(help="Video file, folder of pictures, camera number or URL")
    ],
    bbox: Annotated[
        str | None, typer.Option(help="The target in the first frame: x,y,w,h in pixels")
    ] = None,
    select: Annotated[
        bool, typer.Option("--select", help="Draw the box in a window (needs a display)")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write an mp4 with the boxes drawn")] = None,
    results: Annotated[Path | None, typer.Option(help="Write a CSV with a row per frame")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show frames in a window")] = False,
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
    """Follow an object through a video.

    Example: edgetrack track car.mp4 --bbox 412,230,96,54 --save out.mp4 --results boxes.csv
    """
    if (bbox is None) == (not select):
        raise typer.BadParameter("give either --bbox x,y,w,h or --select", param_hint="--bbox")
    box = None if bbox is None else parse_bbox(bbox)
    if results is not None and (results.is_dir() or not results.parent.is_dir()):
        raise typer.BadParameter(
            f"expected a file in a folder that exists, got {results}", param_hint="--results"
        )
    with open_tracker(
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
    ) as tracker:
        run = _follow(tracker, source, box, save=save, show=show, is_quiet=json)
    _print_summary(run, tracker, source=source, as_json=json)
    if results is not None:
        from edgetrack.evaluate.results import write_rows

        write_rows(results, run.rows)
    _finish(run)


def demo(
    output: Annotated[Path, typer.Option(help="Where the annotated video goes")] = Path("demo.mp4"),
    engines: EnginesOption = DEFAULT_ENGINES,
    backend: BackendOption = "auto",
    json: JsonOption = False,
) -> None:
    """Build engines, render a clip with exact truth, and track it.

    Example: edgetrack demo --output demo.mp4
    """
    import tempfile

    from edgetrack.data.synthetic import render_clip, write_clip

    built, _ = build_engines(None, backend=backend, output=engines, is_quiet=json)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        truth = write_clip(clip, render_clip(num_frames=_DEMO_FRAMES))
        with open_tracker(
            backend=backend, precision=built.key.precision, engines=engines
        ) as tracker:
            x, y, w, h = (float(v) for v in truth[0])
            run = _follow(tracker, str(clip), (x, y, w, h), save=output, truth=truth, is_quiet=json)
    _print_summary(run, tracker, source="a rendered clip", as_json=json, truth=truth)
    _finish(run)
    if not json:
        typer.echo(f"engines: {built.path}\nvideo: {output}")


@dataclass
class _Run:
    """What came of following a source, however it ended."""

    rows: "list[FrameRow]"
    failure: SourceError | None = None
    is_interrupted: bool = False


@dataclass(frozen=True)
class _Outlet:
    """Where drawn frames go: a video, a window, both or neither."""

    sink: "VideoSink | None"
    is_shown: bool
    num_exits: int
    truth: "npt.NDArray[np.float32] | None"

    def put(self, frame: Any, index: int, result: "TrackResult") -> bool:
        """Draw and hand on one frame; ``False`` once the person wants to stop."""
        from edgetrack.viz import draw_result, show_frame

        if self.sink is None and not self.is_shown:
            return True
        drawn = draw_result(
            frame,
            bbox_xywh=result.bbox,
            exit_index=result.exit_index,
            num_exits=self.num_exits,
            score=result.score,
            uncertainty=result.uncertainty,
            latency_ms=result.latency_ms,
            truth_xywh=None if self.truth is None else self.truth[index],
        )
        if self.sink is not None:
            self.sink.write(drawn)
        return not self.is_shown or show_frame(drawn)


def _follow(
    tracker: "Tracker",
    source: str,
    bbox: tuple[float, float, float, float] | None,
    *,
    save: Path | None = None,
    show: bool = False,
    truth: "npt.NDArray[np.float32] | None" = None,
    is_quiet: bool = False,
) -> _Run:
    """Track a source to its end; what was tracked before a failure or Ctrl-C is kept."""
    from edgetrack.evaluate.protocols import FrameRow
    from edgetrack.frames import VideoSink, read_frames
    from edgetrack.viz import select_bbox

    run = _Run([])
    try:
        with contextlib.ExitStack() as stack:
            frames = stack.enter_context(read_frames(source))
            bar = stack.enter_context(progress_bar(is_shown=not is_quiet))
            task = bar.add_task("tracking", total=frames.num_frames)
            first = next(frames)
            box = select_bbox(first) if bbox is None else bbox
            tracker.init(first, box)
            run.rows.append(FrameRow(0, *box))
            sink = None
            if save is not None:
                sink = VideoSink(save, fps=frames.fps or 30.0, size=frames.size)
                stack.enter_context(sink)
            outlet = _Outlet(sink, show, tracker.bundle.num_exits, truth)
            for index, frame in enumerate(frames, 1):
                result = tracker.update(frame)
                run.rows.append(
                    FrameRow(
                        index,
                        *result.bbox,
                        score=result.score,
                        exit_index=result.exit_index,
                        uncertainty=result.uncertainty,
                        latency_ms=result.latency_ms,
                    )
                )
                bar.update(task, completed=index + 1)
                if not outlet.put(frame, index, result):
                    break
    except SourceError as error:
        if not run.rows:
            raise
        run.failure = error
    except KeyboardInterrupt:
        run.is_interrupted = True
    if len(run.rows) == 1 and run.failure is None and not run.is_interrupted:
        raise SourceError(f"{source}: expected at least 2 frames to track, got 1; check the source")
    return run


def _finish(run: _Run) -> None:
    """Say how a run ended, if not at the end of its source."""
    if run.failure is not None:
        raise run.failure
    if run.is_interrupted:
        typer.echo("interrupted: what was tracked until now is kept", err=True)
        raise typer.Exit(130)


def _print_summary(
    run: _Run,
    tracker: "Tracker",
    *,
    source: str,
    as_json: bool,
    truth: "npt.NDArray[np.float32] | None" = None,
) -> None:
    import numpy as np

    from edgetrack.evaluate.metrics import score_boxes

    rows = run.rows[1:]
    if not rows:
        return
    latencies = [r.latency_ms or 0.0 for r in rows]
    p50, p90, p99 = (float(v) for v in np.percentile(latencies, (50, 90, 99)))
    num_exits = tracker.bundle.num_exits
    histogram = np.bincount([r.exit_index or 0 for r in rows], minlength=num_exits).tolist()
    content: dict[str, Any] = {
        "source": source,
        "bundle": tracker.bundle.name,
        "backend": tracker.backend,
        "precision": tracker.precision,
        "engines": None if tracker.engines_path is None else str(tracker.engines_path),
        "thresholds": list(tracker.exit_policy.thresholds),
        "num_frames": len(run.rows),
        "exit_histogram": histogram,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "fps": len(rows) / (sum(latencies) / 1e3),
    }
    if truth is not None:
        boxes = np.array([(r.x, r.y, r.w, r.h) for r in rows])
        seen = np.isfinite(truth[1 : len(run.rows)]).all(1)
        metrics = score_boxes(boxes[seen], truth[1 : len(run.rows)][seen].astype(np.float64))
        content = {"success_auc": metrics.success_auc, **content}
    if as_json:
        print_json(content)
        return
    cells = [
        *([("success AUC", f"{content['success_auc']:.3f}")] if truth is not None else []),
        ("frames", len(run.rows)),
        *((f"exit {k}", f"{n} ({n / len(rows):.0%})") for k, n in enumerate(histogram)),
        *((f"{n} ms", milliseconds(content[f"{n}_ms"])) for n in ("p50", "p90", "p99")),
        ("fps", f"{content['fps']:.0f}"),
    ]
    print_table("tracked", ("", "value"), cells)
