"""``edgetrack calibrate``: the ranges that INT8 needs, from crops that the tracker cuts."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.options import parse_bbox, progress_bar

if TYPE_CHECKING:
    from edgetrack.bundle import Bundle

__all__ = ["calibrate"]

_SENSITIVITY_STRIDE = 8


def calibrate(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder [default: the one that ships]")
    ] = None,
    frames: Annotated[
        list[str] | None,
        typer.Option(
            help="Video or folder of pictures, with --bbox; or folder of labelled sequences; repeat"
        ),
    ] = None,
    bbox: Annotated[
        str | None, typer.Option(help="The target in the first frame of a video: x,y,w,h")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of caches")] = Path("calibration"),
    method: Annotated[
        str, typer.Option(help="max, percentile, entropy or mse: how ranges are chosen")
    ] = "mse",
    percentile: Annotated[
        float, typer.Option(help="For percentile: the share that is not clipped, in percent")
    ] = 99.99,
    limit: Annotated[int, typer.Option(min=2, help="Frames of one sequence, at most")] = 100,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Rank the layers, and keep the worst in float until the loss is below this"
        ),
    ] = None,
) -> None:
    """Track on frames of your own, and keep the ranges of all activations for INT8 builds.

    Example: edgetrack calibrate --frames car.mp4 --bbox 412,230,96,54
    """
    from edgetrack.bundle import Bundle
    from edgetrack.quantize.calibrate import calibrate as find_ranges
    from edgetrack.quantize.sensitivity import keep_worst_in_float, rank_layers

    if not frames:
        raise typer.BadParameter("expected a video or a folder, got none", param_hint="--frames")
    loaded = Bundle.load(bundle)
    with progress_bar() as bar:
        task = bar.add_task("tracking", total=1.0)

        def show(what: str) -> Callable[[float], None]:
            return lambda done: bar.update(task, description=what, completed=done)

        crops = list(_crops(loaded, frames, bbox, limit))
        cache = find_ranges(
            loaded, crops, method=method, percentile=percentile, on_progress=show("calibrating")
        )
        if max_loss is not None:
            some = crops[::_SENSITIVITY_STRIDE]
            cache = rank_layers(loaded, cache, some, on_progress=show("ranking layers"))
            cache = keep_worst_in_float(loaded, cache, some, max_loss=max_loss)
    output.mkdir(parents=True, exist_ok=True)
    cache.write(output / cache.file_name)
    kept = f"; {len(cache.float_layers)} layers stay in float" if max_loss is not None else ""
    typer.echo(f"calibration cache: {output / cache.file_name} from {len(crops)} crops{kept}")
    typer.echo("next: edgetrack build --precision int8")


def _crops(
    bundle: "Bundle", sources: list[str], bbox: str | None, limit: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    from edgetrack.data.sequences import read_sequences
    from edgetrack.frames import read_frames
    from edgetrack.runtime.recording import record_crops

    for source in sources:
        if bbox is not None:
            box = parse_bbox(bbox)
            with read_frames(source) as images:
                name = Path(source).stem
                yield from record_crops(bundle, itertools.islice(images, limit), box, name=name)
            continue
        for sequence in read_sequences(source):
            box = tuple(sequence.boxes_xywh[0].tolist())
            some = itertools.islice(sequence.frames(), limit)
            yield from record_crops(bundle, some, box, name=sequence.name)
