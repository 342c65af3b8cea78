"""``edgetrack calibrate``: the ranges that INT8 needs, from crops that the tracker cuts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.cli.options import parse_bbox, print_table, progress_bar

if TYPE_CHECKING:
    from edgetrack.bundle import Bundle
    from edgetrack.quantize.cache import CalibrationCache

__all__ = ["calibrate"]

_NUM_WANTED = 200
_SENSITIVITY_CROPS = 32
_DEFAULT_MAX_LOSS = 0.012
_NUM_SHOWN = 10

OnFraction = Callable[[float], None]
NamedCrops = Sequence[tuple[str, Mapping[str, Any]]]


def calibrate(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder [default: the one that ships]")
    ] = None,
    frames: Annotated[
        list[str] | None,
        typer.Option(
            help="Video, folder or list of pictures, or folder of labelled sequences; repeat"
        ),
    ] = None,
    bbox: Annotated[
        str | None,
        typer.Option(help="The target in the first frame, without a truth file beside: x,y,w,h"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of caches")] = Path("calibration"),
    method: Annotated[
        str, typer.Option(help="max, percentile, entropy or mse: how ranges are chosen")
    ] = "mse",
    percentile: Annotated[
        float, typer.Option(help="For percentile: the share that is not clipped, in percent")
    ] = 99.99,
    limit: Annotated[int, typer.Option(min=2, help="Frames of one sequence, at most")] = 300,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Rank the layers by what INT8 costs each alone, plot that, and keep the worst in "
            "float until --max-loss holds",
        ),
    ] = False,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="With --sensitivity, and implies it: the mean of 1 - IoU plus that of "
            f"uncertainty's error [default: {_DEFAULT_MAX_LOSS}]",
        ),
    ] = None,
) -> None:
    """Track on frames of your own, and keep the ranges of all activations for INT8 builds.

    Example: edgetrack calibrate --frames car.mp4 --bbox 412,230,96,54
    """
    from edgetrack.bundle import Bundle
    from edgetrack.data.target_clips import read_target_clips
    from edgetrack.gate import gather
    from edgetrack.quantize.calibrate import calibrate as find_ranges

    if not frames:
        raise typer.BadParameter("expected a video or a folder, got none", param_hint="--frames")
    loaded = Bundle.load(bundle)
    is_ranked = sensitivity or max_loss is not None
    box = None if bbox is None else parse_bbox(bbox)
    clips = read_target_clips(frames, bbox=box, limit=limit)
    with progress_bar() as bar:
        task = bar.add_task("tracking", total=1.0)

        def show(what: str) -> OnFraction:
            return lambda done: bar.update(task, description=what, completed=done)

        crops = gather(loaded, clips, on_progress=show("tracking")).crops
        cache = find_ranges(
            loaded, crops, method=method, percentile=percentile, on_progress=show("calibrating")
        )
        if is_ranked:
            budget = _DEFAULT_MAX_LOSS if max_loss is None else max_loss
            cache = _ranked(loaded, cache, crops, budget, show("ranking layers"))
    file = output / cache.file_name
    cache.write(file)
    if len(crops) < _NUM_WANTED:
        typer.echo(
            f"warning: expected {_NUM_WANTED} crops or more, got {len(crops)}: what they do not "
            "show may be clipped; give more frames",
            err=True,
        )
    typer.echo(f"calibration cache: {file} from {len(crops)} crops")
    if is_ranked:
        _show_ranking(cache, file.with_suffix(".png"))
    typer.echo("next: edgetrack build --precision int8")


def _ranked(
    bundle: "Bundle",
    cache: "CalibrationCache",
    crops: NamedCrops,
    max_loss: float,
    on_progress: OnFraction,
) -> "CalibrationCache":
    from edgetrack.quantize.sensitivity import keep_worst_in_float, rank_layers

    some = crops[:: max(len(crops) // _SENSITIVITY_CROPS, 1)]
    cache = rank_layers(bundle, cache, some, on_progress=on_progress)
    return keep_worst_in_float(bundle, cache, some, max_loss=max_loss)


def _show_ranking(cache: "CalibrationCache", picture: Path) -> None:
    rows = [
        (name, f"{loss:.2g}", "float" if name in cache.float_layers else "INT8")
        for name, loss in list(cache.losses.items())[:_NUM_SHOWN]
    ]
    title = f"the {len(rows)} of {len(cache.losses)} layers that INT8 costs most"
    print_table(title, ("layer", "loss", "runs in"), rows)
    typer.echo(f"layers that stay in float: {len(cache.float_layers)}")

    from edgetrack.viz import plot_losses

    plot_losses(cache.losses, picture, in_float=cache.float_layers, title=cache.model)
    typer.echo(f"plot: {picture}")
