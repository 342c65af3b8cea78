"""Every command, as a person meets it."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import edgetrack, edgetrack_here
from toy_bundle import write_toy_bundle

from edgetrack.cli import app
from edgetrack.data.synthetic import render_clip, write_clip
from edgetrack.frames import read_frames


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a video and two labelled sequences."""
    folder = tmp_path_factory.mktemp("home")
    write_toy_bundle(folder / "toy")
    truth = write_clip(folder / "clip.mp4", render_clip(num_frames=20, width=320, height=240))
    for name in ("one", "two"):
        images = folder / "sequences" / name / "img"
        images.mkdir(parents=True)
        for index, frame in enumerate(read_frames(folder / "clip.mp4"), 1):
            cv2.imwrite(str(images / f"{index:06d}.jpg"), frame)
        np.savetxt(images.parent / "groundtruth.txt", truth, "%.3f", ",")
    return folder


def test_every_command_has_help_with_an_example(home: Path) -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]

    helps = {name: edgetrack(name, "--help", cwd=home) for name in names}

    assert {"build", "track", "bench", "eval", "train", "export", "inspect", "doctor"} <= set(names)
    for name, done in helps.items():
        assert done.returncode == 0, name
        assert f"Example: edgetrack {name}" in done.stdout, name


def test_build_says_up_to_date_the_second_time(home: Path) -> None:
    first = edgetrack("build", "toy", "--output", "built", "--json", cwd=home)

    second = edgetrack("build", "toy", "--output", "built", cwd=home)

    assert json.loads(first.stdout)["is_new"] is True
    assert second.stdout.startswith("up to date")


def test_track_writes_a_row_per_frame_and_a_video(home: Path) -> None:
    done = edgetrack(
        *("track", "clip.mp4", "--bbox", "100,80,40,40", "--bundle", "toy", "--json"),
        *("--results", "boxes.csv", "--save", "out.mp4", "--exit-policy", "always-last"),
        cwd=home,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exit_histogram"] == [0, 0, 19]
    rows = list(csv.reader((home / "boxes.csv").read_text("utf-8").splitlines()))
    assert rows[0] == ["frame", "x", "y", "w", "h", "score", "exit", "uncertainty", "ms"]
    assert len(rows) == 21
    with read_frames(home / "out.mp4") as frames:
        assert len(list(frames)) == 19


@pytest.mark.parametrize(
    ("policy", "histogram"),
    [
        (("--exit-policy", "fixed", "--threshold", "0"), [19, 0, 0]),
        (("--exit-policy", "fixed", "--threshold", "1"), [0, 19, 0]),
        (("--threshold", "0"), [0, 0, 19]),
        (("--threshold", "1.1"), [19, 0, 0]),
        (("--threshold", "0,1.1"), [0, 19, 0]),
    ],
)
def test_track_obeys_the_exit_policy(
    home: Path, policy: tuple[str, ...], histogram: list[int]
) -> None:
    done = edgetrack(
        *("track", "clip.mp4", "--bbox", "100,80,40,40", "--bundle", "toy", "--json", *policy),
        cwd=home,
    )

    assert json.loads(done.stdout)["exit_histogram"] == histogram


def test_track_keeps_what_it_tracked_of_a_video_that_is_cut_off(home: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*"MJPG"), 30, (320, 240))
    for frame, _ in render_clip(num_frames=60, width=320, height=240):
        writer.write(frame)
    writer.release()
    (tmp_path / "cut.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    done = edgetrack(
        *("track", tmp_path / "cut.avi", "--bbox", "100,80,40,40", "--bundle", "toy"),
        *("--results", tmp_path / "boxes.csv"),
        cwd=home,
    )

    assert done.returncode == 1
    assert "expected 60 frames" in done.stderr
    assert len((tmp_path / "boxes.csv").read_text().splitlines()) > 10


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("track", "none.mp4", "--bbox", "1,2,3,4"), 1, "no such file"),
        (("track", "clip.mp4", "--bbox", "1,2,3"), 2, "expected x,y,w,h"),
        (("track", "clip.mp4"), 2, "--bbox"),
        (("track", "clip.mp4", "--bbox", "nan,1,5,5"), 2, "finite"),
        (("track", "clip.mp4", "--bbox", "900,1,5,5"), 1, "overlaps"),
        (("track", "clip.mp4", "--bbox", "9,1,-5,5"), 2, "positive"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--exit-policy", "x"), 2, "always-last"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--exit-policy", "fixed"), 2, "--threshold"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--threshold", "-1"), 2, "at least 0"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--threshold", "1,1,1"), 2, "thresholds"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--operating-point", "x"), 1, "operating_p"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--backend", "x"), 2, "tensorrt-rtx"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--backend", "tensorrt"), 1, "tensorrt"),
        (("track", "clip.mp4", "--select"), 1, "display"),
        (("build", "nowhere"), 1, "expected a bundle"),
        (("build", "toy", "--precision", "int8"), 1, "edgetrack calibrate"),
        (("build", "toy", "--precision", "fp16"), 1, "slower"),
        (("inspect", "nowhere"), 1, "nothing"),
        (("eval", "nowhere"), 1, "no such folder"),
        (("eval", "sequences", "--protocol", "x"), 2, "ope"),
        (("train", "nothing", "--data", "."), 2, "expected one of"),
        (("train", "early_exit_vit-smoke", "--data", ".", "--stem", "nope"), 2, "--stem"),
        (("train", "early_exit_vit-smoke", "--data", "nowhere"), 1, "training folder"),
        (("export", "nowhere", "--output", "b"), 1, "checkpoint"),
        (("bench", "--source", "clip.mp4"), 2, "--bbox"),
        (("bench", "--bbox", "1,1,9,9"), 2, "--source"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--results", "no/x.csv"), 2, "--results"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--save", "no/x.mp4"), 1, "folder exists"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--engines", "no"), 1, "edgetrack build"),
        (("track", "clip.mp4", "--bbox", "9,1,5,5", "--precision", "fp99"), 2, "fp16"),
        (
            (
                *("track", "clip.mp4", "--bbox", "9,1,5,5"),
                "--exit-policy",
                "fixed",
                "--threshold",
                "0.5",
            ),
            2,
            "number of an exit",
        ),
        (
            (
                *("track", "clip.mp4", "--bbox", "9,1,5,5"),
                "--exit-policy",
                "always-last",
                "--threshold",
                "1",
            ),
            2,
            "expected none",
        ),
        (("nothing",), 2, "No such command"),
    ],
)
def test_bad_input_gives_one_clear_error(
    home: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    needs_bundle = args[0] in ("track", "eval", "bench")

    done = edgetrack(*args, *(("--bundle", "toy") if needs_bundle else ()), cwd=home)

    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_scores_every_sequence_and_resumes(home: Path, tmp_path: Path) -> None:
    args = ("eval", "sequences", "--bundle", "toy", "--output", tmp_path, "--json")
    first = json.loads(edgetrack(*args, cwd=home).stdout)
    kept = (tmp_path / "one.csv").read_bytes()

    second = json.loads(edgetrack(*args, cwd=home).stdout)

    assert [s["name"] for s in first["sequences"]] == ["one", "two"]
    assert second == first
    assert (tmp_path / "one.csv").read_bytes() == kept


def test_bench_reports_exits_stages_and_the_machine(home: Path) -> None:
    done = edgetrack("bench", "--bundle", "toy", "--frames", 30, "--json", cwd=home)

    report = json.loads(done.stdout)
    assert [e["count"] for e in report["exits"]] == [29, 29, 29]
    assert sum(report["exit_histogram"]) == 29
    assert set(report["stages_ms"]) == {
        *("crop", "segment_0", "segment_1", "segment_2", "decide", "rest")
    }
    assert report["overall"]["p50"] <= report["overall"]["p99"]
    assert report["machine"]["CPU"]


def test_inspect_shows_a_bundle_and_its_engines(home: Path) -> None:
    edgetrack("build", "toy", "--output", "inspected", cwd=home)
    folder = next((home / "inspected").glob("toy-*"))

    bundle = json.loads(edgetrack("inspect", "toy", "--json", cwd=home).stdout)
    engines = json.loads(edgetrack("inspect", folder, "--json", cwd=home).stdout)

    assert [g["name"] for g in bundle["graphs"]] == [
        *("template", "segment_0", "segment_1", "segment_2")
    ]
    assert set(engines["graphs"]) == {g["name"] for g in bundle["graphs"]}
    assert engines["key"]["bundle_digest"] == bundle["digest"]


def test_inspect_cuts_a_long_record_and_names_what_shows_all(home: Path) -> None:
    shown = edgetrack_here("inspect", cwd=home).stdout.splitlines()

    (start,) = (line for line in shown if line.startswith("start: "))
    assert start.endswith(" … (all: --json)")
    assert len(start) < 350


def test_inspect_shows_heads_and_what_is_carried(home: Path) -> None:
    bundle = write_toy_bundle(home / "remembering", heads=True, memory=True)

    content = json.loads(edgetrack("inspect", "remembering", "--json", cwd=home).stdout)
    text = edgetrack("inspect", "remembering", cwd=home).stdout

    assert [g["name"] for g in content["graphs"]] == [g.name for g in bundle.graphs]
    assert content["carried"] == {"memory": "next_memory", "age": "next_age"}
    assert "carried to the next frame: next_memory as memory, next_age as age" in text
    shares = {line.split()[0]: line for line in text.splitlines() if " M " in line}
    assert "where taken" in shares["head_1"]
    assert "every frame" in shares["update"]
    assert "100%" in shares["segment_2"]


def test_doctor_says_what_this_machine_has(home: Path) -> None:
    report = json.loads(edgetrack("doctor", "--json", cwd=home).stdout)

    assert report["onnxruntime"]["is_present"]
    assert report["opencv"]["is_present"]


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.4, 0.9, 1.4])
def test_interrupted_track_keeps_what_it_tracked(home: Path, delay_s: float) -> None:
    for name in ("boxes.csv", "out.mp4"):
        (home / "cut" / name).unlink(missing_ok=True)
    (home / "cut").mkdir(exist_ok=True)
    write_clip(home / "long.mp4", render_clip(num_frames=600, width=320, height=240))
    command = [sys.executable, "-m", "edgetrack", "track", "long.mp4", "--bbox", "100,80,40,40"]
    command += ["--bundle", "toy", "--results", "cut/boxes.csv", "--save", "cut/out.mp4"]
    running = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True)
    while not list((home / "cut").iterdir()):
        time.sleep(0.01)
    time.sleep(delay_s / 4)

    running.send_signal(signal.SIGINT)

    _, errors = running.communicate(timeout=20)
    assert running.returncode == 130, errors
    assert "is kept" in errors
    num_rows = len((home / "cut" / "boxes.csv").read_text("utf-8").splitlines())
    assert 1 < num_rows < 601


def test_track_needs_a_second_frame(home: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((60, 60, 3), np.uint8))

    done = edgetrack("track", tmp_path, "--bbox", "9,9,9,9", "--bundle", "toy", cwd=home)

    assert done.returncode == 1
    assert "at least 2 frames" in done.stderr


@pytest.mark.slow
def test_interrupted_eval_keeps_finished_sequences(home: Path, tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / "many" / f"s{index:03d}").parent.mkdir(exist_ok=True)
        (tmp_path / "many" / f"s{index:03d}").symlink_to(home / "sequences" / "one")
    command = [sys.executable, "-m", "edgetrack", "eval", str(tmp_path / "many"), "--bundle"]
    output = tmp_path / "kept"
    running = subprocess.Popen([*command, str(home / "toy"), "--output", str(output)])
    while not list(output.glob("s00*.json")):
        time.sleep(0.05)

    running.send_signal(signal.SIGINT)

    assert running.wait(20) == 130
    num_kept = len(list(output.glob("*.json")))
    assert 0 < num_kept < 200
    assert not list(output.glob(".*"))
