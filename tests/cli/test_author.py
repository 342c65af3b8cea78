"""``edgetrack train`` and ``edgetrack export`` from end to end, on a folder rendered here."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import edgetrack

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip

TINY_RUN = ("train", "early_exit_vit-smoke", "--data", "data", "--samples", "16,8")


def write_sequence(folder: Path, *, seed: int, num_frames: int = 8) -> None:
    (folder / "img").mkdir(parents=True)
    boxes = []
    for index, (frame, bbox) in enumerate(render_clip(num_frames=num_frames, seed=seed), 1):
        cv2.imwrite(str(folder / "img" / f"{index:06d}.jpg"), frame)
        boxes.append(bbox)
    np.savetxt(folder / "groundtruth.txt", np.array(boxes), "%.3f", ",")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training folder, a GOT-10k folder and sequences to calibrate on."""
    folder = tmp_path_factory.mktemp("author")
    for seed in (1, 2):
        write_sequence(folder / "data" / "videos" / f"clip_{seed}", seed=seed)
        write_sequence(folder / "sequences" / f"held_out_{seed}", seed=10 + seed)
    return folder


@pytest.fixture(scope="module")
def bundle(home: Path) -> Bundle:
    """What the commands make of it."""
    trained = edgetrack(*TINY_RUN, cwd=home)
    assert trained.returncode == 0, trained.stderr
    assert "--output early_exit_vit-smoke_bundle --calibrate DATA" in trained.stdout
    exported = edgetrack(
        "export", "runs/early_exit_vit-smoke", "--output", "mine", "--calibrate", "sequences",
        "--evaluate", "sequences", "--rules", "size_smoothing=0.2", "--criterion", "combined",
        cwd=home,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert "balanced: stop below" in exported.stdout
    return Bundle.load(home / "mine")


@pytest.mark.slow
def test_a_calibrated_bundle_has_three_points_rules_and_where_it_comes_from(bundle: Bundle) -> None:
    assert list(bundle.operating_points) == ["accurate", "balanced", "fast"]
    assert bundle.operating_point == "balanced"
    assert (bundle.criterion, bundle.rules) == ("combined", {"size_smoothing": 0.2})
    assert bundle.provenance["samples"] == [16, 8]
    assert bundle.provenance["calibration"]["sequences"] == ["held_out_1", "held_out_2"]
    scored = bundle.provenance["evaluation"]["metrics"]
    assert set(scored) == {"exit 0", "exit 1", "exit 2", "accurate", "balanced", "fast"}
    assert 0 <= scored["exit 2"]["success_auc"] <= 1


@pytest.mark.slow
def test_training_starts_from_another_bundle_and_another_mix(home: Path, bundle: Bundle) -> None:
    done = edgetrack(
        *TINY_RUN, "--from", str(bundle.path), "--mix", "video=2,extra=1", "--seed", "3",
        "--output", "again", cwd=home,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert re.search(rf"^(\d+) of \1 tensors start from {bundle.path}$", done.stdout, re.M)
    provenance = json.loads((home / "again" / "provenance.json").read_text())
    assert provenance["start"]["digest"] == bundle.digest
    assert provenance["recipe"]["mix"] == {"video": 2.0, "extra": 1.0}
    assert provenance["recipe"]["seed"] == 3
    log = [json.loads(line) for line in (home / "again" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == [1, 2]


@pytest.mark.slow
def test_a_dytrack_starts_from_early_exit_vit_and_has_presets_of_one_threshold(home: Path) -> None:
    trained = edgetrack(
        "train", "dytrack-tiny", "--data", "data", "--samples", "32,32",
        "--from", str(Bundle.load().path), cwd=home,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    exported = edgetrack(
        "export", "runs/dytrack-tiny", "--output", "dytrack", "--calibrate", "sequences",
        "--evaluate", "sequences", cwd=home,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr

    bundle = Bundle.load(home / "dytrack")

    assert set(bundle.operating_points) == {"base", "medium", "fast"}
    assert all(len(set(thresholds)) == 1 for thresholds in bundle.operating_points.values())
    assert bundle.operating_point == "medium"
    scored = bundle.provenance["evaluation"]["metrics"]
    assert set(scored) == {"exit 0", "exit 1", "exit 2", "base", "medium", "fast"}


@pytest.mark.slow
def test_a_ladder_of_resolutions_learns_from_one_teacher(home: Path) -> None:
    """And a student with early exits is distilled into, then trained on."""
    shipped = str(Bundle.load().path)
    small = ("--data", "data", "--from", shipped)
    taught = edgetrack(
        "train", "loretrack-tiny-teacher", *small, "--samples", "32", "--search-size", "160",
        cwd=home,
    )  # fmt: skip
    assert taught.returncode == 0, taught.stderr
    teacher = edgetrack(
        "export", "runs/loretrack-tiny-teacher-160", "--output", "teacher", cwd=home
    )
    assert teacher.returncode == 0, teacher.stderr

    ladder = edgetrack(
        "train", "loretrack-tiny", *small, "--samples", "32", "--search-size", "128,96",
        "--teacher", "teacher", cwd=home,
    )  # fmt: skip
    composed = edgetrack(
        "train", "early_exit_vit-tiny-loretrack", *small, "--samples", "32,32",
        "--teacher", "teacher", cwd=home,
    )  # fmt: skip

    assert ladder.returncode == 0, ladder.stderr
    assert composed.returncode == 0, composed.stderr
    assert ladder.stdout.count("the others are new") == 0
    assert "--calibrate" not in ladder.stdout
    for size in (128, 96):
        next_step = f"export runs/loretrack-tiny-{size} --output loretrack-tiny-{size}_bundle\n"
        assert next_step in ladder.stdout
        run, output = f"runs/loretrack-tiny-{size}", f"student_{size}"
        exported = edgetrack("export", run, "--output", output, cwd=home)
        assert exported.returncode == 0, exported.stderr
        student = Bundle.load(home / output)
        assert (student.family, student.num_exits) == ("loretrack", 1)
        assert student.crops.search_size_px == size
        assert student.crops.template_size_px == size // 2
        assert student.provenance["teacher"]["bundle"] == "loretrack-tiny"
    calibrated = edgetrack(
        "export", "runs/loretrack-tiny-96", "--output", "never", "--calibrate", "sequences",
        cwd=home,
    )  # fmt: skip
    assert calibrated.returncode == 2
    assert "expected a model with exits to choose between" in " ".join(calibrated.stderr.split())
    log = (home / "runs/early_exit_vit-tiny-loretrack/log.jsonl").read_text().splitlines()
    stages = [json.loads(line) for line in log]
    assert [entry["stage"] for entry in stages] == [1, 2]
    assert {"qkv", "disc"} <= stages[0].keys()
    assert "distil_0" in stages[1]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--mix", "video"), 2, "expected name=weight"),
        (("--search-size", "128,x"), 2, "expected sides that the model can have"),
        (("--search-size", "100"), 2, "template_size_px: expected a multiple of 16, got 50"),
        (("--samples", "0,1"), 2, "expected 2 whole numbers"),
        (("--data", "imagenet=data"), 1, "expected a training folder or LAYOUT=ROOT"),
        (("--data", "got10k=nowhere"), 1, "expected a folder of got10k data, got none"),
        (("--from", "nowhere"), 1, "expected a bundle"),
    ],
)
def test_wrong_training_options_are_named(
    home: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = edgetrack(*TINY_RUN, *options, "--output", "never", cwd=home)

    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (home / "never").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--rules", "luck=1"), 2, "rules: expected names among"),
        (("--criterion", "luck"), 2, "expected one of entropy, score, combined"),
    ],
)
def test_wrong_export_options_are_named(
    home: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    done = edgetrack("export", "runs/none", "--output", "never", *options, cwd=home)

    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
