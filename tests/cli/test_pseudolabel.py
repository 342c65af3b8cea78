"""``edgetrack pseudolabel`` as a person meets it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgetrack.boxes import iou_xywh
from edgetrack.data.pseudo_tracks import read_pseudo_tracks
from edgetrack.data.synthetic import render_clip, write_clip

COMMAND = [sys.executable, "-W", "error", "-m", "edgetrack", "pseudolabel"]


def pseudolabel(*args: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a video of 24 frames, and room for the output."""
    clip = render_clip(num_frames=24, width=320, height=240, seed=3, has_occlusion=False)
    write_clip(tmp_path / "ball.mp4", clip)
    (tmp_path / "out").mkdir()
    return tmp_path


def test_a_video_becomes_frames_and_tracks_that_training_can_read(home: Path) -> None:
    done = pseudolabel(
        "ball.mp4", "--output", "out/tracks.jsonl", "--per-clip", 16, "--threads", 1, cwd=home
    )

    assert done.returncode == 0, done.stderr
    clips = read_pseudo_tracks(home / "out" / "tracks.jsonl", home / "out")
    assert clips
    assert all(clip.name.startswith("ball#") for clip in clips)
    assert all(len(clip.images) == len(clip.boxes_xywh) >= 8 for clip in clips)
    assert len(list((home / "out" / "videos" / "ball" / "img").glob("*.jpg"))) == 24
    assert sorted(p.name for p in (home / "out").iterdir()) == ["tracks.jsonl", "videos"]
    assert "tracks: out/tracks.jsonl" in done.stdout


def test_a_detection_in_a_training_folder_gives_a_track_of_it(home: Path) -> None:
    images = home / "data" / "videos" / "u_ball" / "img"
    images.mkdir(parents=True)
    truth, rows = [], []
    clip = render_clip(num_frames=24, width=320, height=240, seed=3, has_occlusion=False)
    for index, (frame, bbox) in enumerate(clip):
        cv2.imwrite(str(images / f"{index:06d}.jpg"), frame)
        truth.append(bbox)
        rows.append({"img": f"u_ball/img/{index:06d}.jpg", "boxes": [[*bbox.tolist(), 0.9, 0]]})
    (home / "data" / "videos" / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))

    options = ("--clips", "u_*", "--per-clip", 3, "--threads", 1)
    done = [pseudolabel("data", "--output", f"out/{k}.jsonl", *options, cwd=home) for k in (1, 2)]

    assert [d.returncode for d in done] == [0, 0], done[0].stderr
    lines, again = ((home / "out" / f"{k}.jsonl").read_text().splitlines() for k in (1, 2))
    assert lines[1:] == again[1:]
    header, *tracks = map(json.loads, lines)
    assert header["settings"]["per_clip"] == 3
    assert {t["clip"] for t in tracks} == {"u_ball"}
    assert header["bundle_digest"][:12] in tracks[0]["bundle"]
    boxes = [np.array(t["boxes"]) for t in tracks]
    firsts = [t["first"] for t in tracks]
    overlaps = [
        iou_xywh(b, np.stack(truth)[f : f + len(b)]).min()
        for f, b in zip(firsts, boxes, strict=True)
    ]
    assert max(overlaps) > 0.5


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("nowhere", "--output", "out/t.jsonl"), 1, "nowhere: expected a training folder"),
        (("ball.mp4", "--output", "out/t.jsonl", "--clips", "x*"), 1, "named 'x*', got none"),
        (("ball.mp4", "--output", "no/t.jsonl"), 2, "expected a file in a folder that exists"),
        (("ball.mp4", "--output", "out/t.jsonl", "--per-clip", "0"), 2, "--per-clip"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(
    home: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    done = pseudolabel(*args, cwd=home)

    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert list((home / "out").iterdir()) == []


def test_frames_that_are_there_already_are_not_replaced(home: Path) -> None:
    (home / "out" / "videos" / "ball").mkdir(parents=True)

    done = pseudolabel("ball.mp4", "--output", "out/t.jsonl", cwd=home)

    assert done.returncode == 1
    assert "rename the video, or remove the folder" in done.stderr
    assert not (home / "out" / "t.jsonl").exists()


def test_a_clip_too_short_for_a_track_is_told(home: Path) -> None:
    write_clip(home / "short.mp4", render_clip(num_frames=6, width=320, height=240))

    done = pseudolabel("short.mp4", "--output", "out/t.jsonl", cwd=home)

    assert done.returncode == 1
    assert "expected tracks that lead back to their start, got none in 1 clips" in done.stderr
    assert list((home / "out").iterdir()) == []


def test_an_interrupt_leaves_nothing(home: Path) -> None:
    write_clip(home / "long.mp4", render_clip(num_frames=60, width=320, height=240))
    command = [*COMMAND, "long.mp4", "--output", "out/t.jsonl", "--per-clip", "500"]

    with subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not list((home / "out").glob(".t.jsonl.*/videos/long/img/000060.jpg")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate()

    assert running.returncode == 130
    assert "interrupted" in stderr
    assert list((home / "out").iterdir()) == []
