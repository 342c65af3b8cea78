"""``edgetrack pseudolabel``: tracks to train on, from videos that nobody labelled."""

import dataclasses
import fnmatch
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrack.cli.options import (
    DEFAULT_ENGINES,
    BackendOption,
    BundleOption,
    EnginesOption,
    ThreadsOption,
    open_tracker,
    print_table,
    progress_bar,
)
from edgetrack.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from edgetrack.data.pseudo_tracks import PseudoTrack, UnlabelledClip
    from edgetrack.tracker import Tracker
    from edgetrack.train.pseudo_tracks import PseudoTrackSettings

__all__ = ["pseudolabel"]

_VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_LONG_SIDE_PX = 512


def pseudolabel(
    folder: Annotated[
        Path, typer.Argument(help="Training folder (videos/CLIP/img), folder of videos, or video")
    ],
    output: Annotated[
        Path,
        typer.Option(help="File of tracks (.jsonl); frames of videos go to videos/ beside it"),
    ],
    bundle: BundleOption = None,
    clips: Annotated[str, typer.Option(help="Names of clips or videos, with * and ?")] = "*",
    per_clip: Annotated[int, typer.Option(min=1, help="Tracks of one clip, at most")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Another one gives other tracks")] = 0,
    backend: BackendOption = "auto",
    engines: EnginesOption = DEFAULT_ENGINES,
    threads: ThreadsOption = None,
) -> None:
    """Track things in unlabelled videos, and keep the tracks that lead back to their start.

    Example: edgetrack pseudolabel data/train --output data/pseudo_tracks.jsonl --clips 'u_*'
    """
    from edgetrack.data.folder import folder_digest
    from edgetrack.data.pseudo_tracks import read_unlabelled_clips, write_pseudo_tracks
    from edgetrack.train.pseudo_tracks import PseudoTrackSettings

    if output.is_dir() or not output.parent.is_dir():
        raise typer.BadParameter(
            f"expected a file in a folder that exists, got {output}", param_hint="--output"
        )
    settings = PseudoTrackSettings(per_clip=per_clip, seed=seed)
    is_training_folder = (folder / "videos").is_dir()
    videos = [] if is_training_folder else _find_videos(folder, clips, output.parent)
    with (
        open_tracker(
            bundle=bundle,
            backend=backend,
            precision=None,
            engines=engines,
            exit_policy="always-last",
            threads=threads,
        ) as tracker,
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as staged,
        progress_bar() as bar,
    ):
        root = folder if is_training_folder else Path(staged)
        try:
            _extract(videos, root, bar)
            found = _track(tracker, read_unlabelled_clips(root, clips), settings, bar)
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing was kept", err=True)
            raise typer.Exit(130) from None
        tracks = [track for of_clip in found.values() for track in of_clip]
        if not tracks:
            raise DataError(
                f"{folder}: expected tracks that lead back to their start, got none in "
                f"{len(found)} clips; try another --seed, or clips of 8 frames and more"
            )
        data_digest = folder_digest(root)
        for video in videos:
            (output.parent / "videos").mkdir(exist_ok=True)
            (root / "videos" / video.stem).rename(output.parent / "videos" / video.stem)
        write_pseudo_tracks(
            output,
            tracks,
            bundle_digest=tracker.bundle.digest,
            settings=dataclasses.asdict(settings),
            data_digest=data_digest,
        )
    rows = [(name, len(of), sum(len(t.boxes_xywh) for t in of)) for name, of in found.items()]
    rows.append(("all", len(tracks), sum(len(t.boxes_xywh) for t in tracks)))
    print_table("pseudo-tracks", ("clip", "tracks", "frames"), rows)
    typer.echo(f"tracks: {output}")


def _find_videos(folder: Path, pattern: str, target: Path) -> list[Path]:
    """The videos to take frames from; each needs a name of its own."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    videos = [
        path
        for path in paths
        if path.is_file()
        and path.suffix.lower() in _VIDEO_SUFFIXES
        and fnmatch.fnmatchcase(path.stem, pattern)
    ]
    if not videos:
        raise DataError(
            f"{folder}: expected a training folder (videos/<clip>/img), a video or a folder of "
            f"videos named {pattern!r}, got {'none' if folder.exists() else 'no such path'}; "
            "check the path and --clips"
        )
    names = [video.stem for video in videos]
    for name in names:
        if names.count(name) > 1 or (target / "videos" / name).exists():
            raise DataError(
                f"{target / 'videos' / name}: expected to put the frames of one video there, got "
                "two of that name or a folder that exists; rename the video, or remove the folder"
            )
    return videos


def _extract(videos: list[Path], root: Path, bar: "Progress") -> None:
    """Write the frames of videos as the clips of a training folder."""
    from edgetrack.data.pseudo_tracks import extract_frames

    for video in videos:
        task = bar.add_task(f"{video.stem}: frames", total=None)

        def show(done: int, total: int | None, task: "TaskID" = task) -> None:
            bar.update(task, completed=done, total=total)

        extract_frames(
            video,
            root / "videos" / video.stem / "img",
            long_side_px=_LONG_SIDE_PX,
            on_progress=show,
        )
        bar.remove_task(task)


def _track(
    tracker: "Tracker",
    clips: "tuple[UnlabelledClip, ...]",
    settings: "PseudoTrackSettings",
    bar: "Progress",
) -> "dict[str, list[PseudoTrack]]":
    """Clip → its tracks."""
    from edgetrack.train.pseudo_tracks import find_pseudo_tracks

    bundle = f"{tracker.bundle.name}-{tracker.bundle.digest[:12]}"
    found: dict[str, list[PseudoTrack]] = {}
    task = bar.add_task("tracking", total=len(clips))
    for number, clip in enumerate(clips):
        bar.update(task, description=clip.name)

        def show(done: int, total: int, number: int = number) -> None:
            bar.update(task, completed=number + done / total)

        found[clip.name] = find_pseudo_tracks(
            tracker,
            clip.frames(),
            clip.start_boxes,
            clip=clip.name,
            bundle=bundle,
            settings=settings,
            on_progress=show,
        )
        bar.update(task, completed=number + 1)
    return found
