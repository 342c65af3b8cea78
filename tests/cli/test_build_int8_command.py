"""``edgetrack build`` for INT8, as a person meets it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import edgetrack
from toy_bundle import write_toy_bundle

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip, write_clip

INT8 = ("--precision", "int8", "--backend", "onnxruntime")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a video, two labelled sequences and a cache of another bundle."""
    folder = tmp_path_factory.mktemp("home")
    write_toy_bundle(folder / "toy")
    clip = list(render_clip(num_frames=12, width=160, height=120))
    truth = write_clip(folder / "car.mp4", clip)
    for name in ("one", "two"):
        images = folder / "sequences" / name / "img"
        images.mkdir(parents=True)
        for index, (frame, _) in enumerate(clip):
            cv2.imwrite(str(images / f"{index:03d}.png"), frame)
        np.savetxt(images.parent / "groundtruth.txt", truth, "%.3f", ",")
    write_clip(folder / "short.mp4", clip[:3])
    return folder


def test_frames_of_ones_own_make_a_cache_and_engines(home: Path) -> None:
    done = edgetrack(
        *("build", "toy", *INT8, "--output", "video", "--calibration", "video-caches"),
        *("--calibration-frames", "car.mp4", "--bbox", "60,40,30,30", "--json"),
        cwd=home,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (cache,) = (home / "video-caches").iterdir()
    content = json.loads(cache.read_text(encoding="utf-8"))
    assert [name for name, _ in content["frames"]] == [f"car/{k:06d}" for k in range(1, 12)]
    assert found["is_new"] is True
    assert found["operating_points"].keys() == {"accurate", "balanced", "fast"}
    assert found["gate"]["source"] == "car"
    assert found["gate"]["num_crops"] == 11
    for name, graph in found["gate"]["graphs"].items():
        assert graph["precision"] == found["graphs"][name]["precision"]
    assert found["gate"]["sentence"]


def test_labelled_sequences_need_no_box_and_a_table_is_printed(home: Path) -> None:
    build = ("build", "toy", *INT8, "--output", "folder", "--calibration", "folder-caches")

    first = edgetrack(*build, "--calibration-frames", "sequences", cwd=home)
    again = edgetrack(*build, cwd=home)

    assert first.returncode == 0, first.stderr
    assert "fp32 → int8, on one, two" in first.stdout
    lines = first.stdout.splitlines()
    for name in ("graph", "template", "segment_0", "segment_1", "segment_2", "as chosen"):
        assert sum(line.strip().startswith(name) for line in lines) == 1, name
    assert "balanced: " in first.stdout
    assert "boxes overlap by " in lines[-1]
    assert again.stdout == f"up to date: {first.stdout.splitlines()[0]}\n{first.stdout}"


def test_inspect_shows_what_was_measured_and_the_fitted_thresholds(home: Path) -> None:
    edgetrack(
        *("build", "toy", *INT8, "--output", "seen", "--calibration", "seen-caches", "--strict"),
        *("--calibration-frames", "sequences"),
        cwd=home,
    )
    (engines,) = (home / "seen").glob("toy-int8-*")

    shown = edgetrack("inspect", engines, cwd=home)
    as_json = edgetrack("inspect", engines, "--json", cwd=home)

    assert "INT8 in all graphs, as --strict asks" in shown.stdout
    assert "operating point balanced, fitted to these engines: " in shown.stdout
    assert json.loads(as_json.stdout)["gate"]["is_strict"] is True


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--calibration-frames", "none.mp4", "--bbox", "1,2,30,30"), 1, "none.mp4: expected"),
        (("--calibration-frames", "none"), 1, "none: expected folders that hold"),
        (("--calibration-frames", "car.mp4"), 1, "car.mp4: expected the target's box"),
        (("--calibration-frames", "short.mp4", "--bbox", "60,40,30,30"), 1, "8 crops"),
        (("--calibration-frames", "car.mp4", "--bbox", "1,2"), 2, "expected x,y,w,h"),
        (("--calibration-frames", "car.mp4", "--bbox", "900,2,3,3"), 1, "overlaps"),
        (("--bbox", "1,2,30,30"), 2, "expected --calibration-frames with it"),
        ((), 1, "expected a calibration cache of toy"),
        (("--calibration", "toy/manifest.json"), 1, "expected a calibration cache"),
        (("--strict", "--precision", "fp32"), 2, "expected int8 with --calibration"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    home: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    before = sorted(home.iterdir())

    done = edgetrack("build", "toy", *INT8, "--output", "bad", *args, cwd=home)

    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert sorted(home.iterdir()) == before


def test_the_cache_of_another_bundle_is_refused(home: Path, shipped_bundle: Bundle) -> None:
    cache = next((shipped_bundle.path / "calibration").glob("*.json"))

    done = edgetrack("build", "toy", *INT8, "--calibration", cache, cwd=home)

    assert done.returncode == 1
    assert "expected one of toy" in done.stderr
