import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edgetrack.errors import BackendUnavailableError, DataError
from edgetrack.viz import draw_result, exit_colour, plot_curves, plot_losses, plot_training

SIZES = [(320, 240), (1920, 1080), (64, 48)]


def draw(frame: np.ndarray, **options: Any) -> np.ndarray:
    defaults: dict[str, Any] = {
        "bbox_xywh": (20, 12, 24, 16),
        "exit_index": 0,
        "num_exits": 3,
        "score": 0.9,
        "uncertainty": 0.25,
        "latency_ms": 3.2,
    }
    return draw_result(frame, **defaults | options)


def grey_frame(width: int = 320, height: int = 240) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def has_colour(image: np.ndarray, colour: tuple[int, ...]) -> bool:
    return bool((image == np.array(colour)).all(-1).any())


def write_log(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_drawing_leaves_the_frame_alone() -> None:
    frame = grey_frame()

    drawn = draw(frame)

    assert_array_equal(frame, grey_frame())
    assert drawn.shape == frame.shape
    assert not np.array_equal(drawn, frame)


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_the_box_has_the_colour_of_its_exit_on_its_edges(exit_index: int) -> None:
    drawn = draw(grey_frame(), exit_index=exit_index, bbox_xywh=(100, 60, 80, 50))

    colour = exit_colour(exit_index, num_exits=3)
    for x, y in ((100, 85), (179, 85), (140, 60), (140, 109)):
        assert_array_equal(drawn[y, x], colour)
    assert_array_equal(drawn[85, 140], (128, 128, 128))
    columns = np.flatnonzero((drawn[85] != 128).any(-1))
    assert 100 - columns.min() == columns.max() - 179


@pytest.mark.parametrize("num_exits", [2, 3, 6])
def test_exits_are_told_apart_by_colour(num_exits: int) -> None:
    colours = np.array([exit_colour(k, num_exits=num_exits) for k in range(num_exits)])

    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(num_exits)
    assert distances.min() > 50


def test_a_lost_target_is_red_and_says_so() -> None:
    found, lost = draw(grey_frame()), draw(grey_frame(), lost=True)

    assert has_colour(lost, (0, 0, 235))
    assert not has_colour(found, (0, 0, 235))
    assert not has_colour(lost, exit_colour(0, num_exits=3))
    assert not np.array_equal(found[-15:, 20:], lost[-15:, 20:])


def test_the_truth_is_drawn_where_it_is_known() -> None:
    without = draw(grey_frame())

    assert_array_equal(draw(grey_frame(), truth_xywh=[np.nan] * 4), without)
    assert has_colour(draw(grey_frame(), truth_xywh=(200, 80, 40, 40))[75:125, 195:245], (255,) * 3)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_text_stays_inside_the_frame_and_grows_with_it(width: int, height: int) -> None:
    bar_px = max(round(height / 18), 20)

    drawn = draw(grey_frame(width, height), uncertainty=0.99, score=1.0, latency_ms=1234.5)

    bar = drawn[height - bar_px :].astype(int)
    is_bright = bar.min(-1) > 100
    rows, columns = np.nonzero(is_bright)
    assert columns.max() < width - 1
    assert rows.min() > 0
    assert rows.max() < bar_px - 1
    if width >= 320:
        assert np.ptp(rows) > 0.3 * bar_px


@pytest.mark.parametrize(
    ("field", "value"), [("uncertainty", 0.75), ("score", 0.1), ("latency_ms", 99.9)]
)
def test_each_number_shows(field: str, value: float) -> None:
    assert not np.array_equal(draw(grey_frame()), draw(grey_frame(), **{field: value}))


@pytest.mark.parametrize(
    "bbox",
    [(-50, -50, 20, 20), (1e9, 1e9, 5, 5), (-10, -10, 1e12, 1e12), (np.nan, 1, 2, 3), (9, 9, 0, 0)],
)
def test_any_box_can_be_drawn(bbox: tuple[float, ...]) -> None:
    assert draw(grey_frame(), bbox_xywh=bbox).shape == (240, 320, 3)


def test_a_training_log_becomes_a_picture(tmp_path: Path) -> None:
    lines = [
        {"stage": k // 5, "step": k, "samples": 8 * k, "loss": 1 / (k + 1), "giou": k, "note": "x"}
        for k in range(10)
    ]
    log = write_log(tmp_path / "log.jsonl", *lines)
    with log.open("a") as file:
        file.write('{"step": 11, "lo')

    plot_training(log, tmp_path / "log.png")

    image = cv2.imread(str(tmp_path / "log.png"))
    assert image.shape[1] > 600
    assert image.std() > 5


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", {"step": 1, "loss": 2.0}, [3], {"step": 2, "loss": 1.0})

    with pytest.raises(DataError, match=r"log\.jsonl:2: expected a JSON object"):
        plot_training(log, tmp_path / "log.png")


@pytest.mark.parametrize("lines", [[], [{"step": 1}], [{"loss": 1.0}]])
def test_a_log_without_numbers_is_refused(tmp_path: Path, lines: list[object]) -> None:
    log = write_log(tmp_path / "log.jsonl", *lines)

    with pytest.raises(DataError, match="expected numbers such as loss"):
        plot_training(log, tmp_path / "log.png")


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; train first"):
        plot_training(tmp_path / "log.jsonl", tmp_path / "log.png")


def test_curves_become_a_picture(tmp_path: Path) -> None:
    curves = {"tiny": [(1.0, 0.5), (2.0, 0.6)], "base": [(1.0, 0.6), (3.0, 0.7)]}

    plot_curves(curves, tmp_path / "out.png", x_label="mean depth", y_label="success AUC")

    assert cv2.imread(str(tmp_path / "out.png")).std() > 5


def test_no_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curves: expected at least one"):
        plot_curves({}, tmp_path / "out.png", x_label="x", y_label="y")


def test_losses_become_bars_that_tell_float_layers(tmp_path: Path) -> None:
    losses = {"segment_0/a": 0.4, "segment_1/b": 0.1, "segment_1/c": 0.0}

    for name, kept in (("one", ["segment_0/a"]), ("none", [])):
        plot_losses(losses, tmp_path / f"{name}.png", in_float=kept, title="model")

    one, none = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("one", "none"))
    int8, in_float = (178, 114, 0), (0, 94, 213)
    assert has_colour(one, int8)
    assert has_colour(one, in_float)
    assert has_colour(none, int8)
    assert not has_colour(none, in_float)


def test_no_losses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="losses: expected at least one layer"):
        plot_losses({}, tmp_path / "out.png")


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(BackendUnavailableError, match=r"pip install 'edgetrack\[plot\]'"):
        plot_curves({"a": [(0.0, 1.0)]}, tmp_path / "out.png", x_label="x", y_label="y")
