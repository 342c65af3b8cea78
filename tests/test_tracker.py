import dataclasses
import gc
import math
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from toy_bundle import SCORES

from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.errors import (
    BackendUnavailableError,
    BundleError,
    BundleFormatError,
    BundleTamperedError,
    EngineBuildError,
    EngineError,
    EngineNotFoundError,
    FrameSizeError,
    TrackerStateError,
)
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.tracker import Tracker, TrackResult

UInt8Array = npt.NDArray[np.uint8]
WIDTH, HEIGHT = 320, 240
BBOX = (140.0, 100.0, 40.0, 40.0)


def frame_with(centre: tuple[float, float] = (160.0, 120.0), *, side_px: int = 40) -> UInt8Array:
    """A grey frame with a white square, which the toy bundle follows."""
    frame = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    x, y = (round(c - side_px / 2) for c in centre)
    frame[max(y, 0) : max(y + side_px, 0), max(x, 0) : max(x + side_px, 0)] = 255
    return frame


def noise(*shape: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def tracker(toy: Bundle) -> Iterator[Tracker]:
    with Tracker(toy, num_threads=1) as tracker:
        yield tracker


def respond(toy: Bundle, folder: Path, **constants: float) -> Bundle:
    """A copy of the toy bundle in which constants of the last segment have another value."""
    shutil.copytree(toy.path, folder)
    path = folder / "segment_2.onnx"
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name in constants:
            value = np.full_like(numpy_helper.to_array(tensor), constants[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(proto, path)
    return dataclasses.replace(Bundle.load(folder, verify=False), path=folder).write()


def centre_of(bbox: tuple[float, float, float, float]) -> tuple[float, float]:
    x, y, w, h = bbox
    return x + w / 2, y + h / 2


def without_time(result: TrackResult) -> TrackResult:
    return dataclasses.replace(result, latency_ms=0.0)


def test_a_target_is_followed(tracker: Tracker) -> None:
    tracker.init(frame_with(), BBOX)

    for step in range(1, 30):
        target = (160 + 3 * step, 120 - 2 * step)
        result = tracker.update(frame_with(target))

        assert centre_of(result.bbox) == pytest.approx(target, abs=12)


def test_a_result_is_made_of_plain_numbers(tracker: Tracker) -> None:
    tracker.init(frame_with(), BBOX)

    result = tracker.update(frame_with())

    assert [type(value) for value in result.bbox] == [float] * 4
    assert type(result.score) is type(result.uncertainty) is type(result.latency_ms) is float
    assert type(result.exit_index) is int
    assert result.latency_ms > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.score = 1.0  # type: ignore[misc]  # that is the point


def test_the_current_box_can_be_read(tracker: Tracker) -> None:
    assert tracker.bbox is None

    tracker.init(frame_with(), BBOX)
    assert tracker.bbox == BBOX

    result = tracker.update(frame_with((165, 120)))
    assert tracker.bbox == result.bbox


@pytest.mark.parametrize(("threshold", "exit_index"), [(0.0, 2), (1.01, 0)])
def test_thresholds_decide_the_exit(toy: Bundle, threshold: float, exit_index: int) -> None:
    policy = ExitPolicy.entropy(threshold, num_exits=3)
    with Tracker(toy, exit_policy=policy) as tracker:
        tracker.init(noise(HEIGHT, WIDTH, 3), BBOX)

        results = [tracker.update(noise(HEIGHT, WIDTH, 3, seed=k)) for k in range(10)]

    assert {result.exit_index for result in results} == {exit_index}
    assert all(result.score == pytest.approx(SCORES[exit_index]) for result in results)


def test_operating_points_are_found_by_name(toy: Bundle) -> None:
    with Tracker(toy, operating_point="fast") as tracker:
        assert tracker.exit_policy.thresholds == (0.9, 0.9)
    with Tracker(toy) as tracker:
        assert tracker.exit_policy.thresholds == toy.thresholds()


def test_another_policy_takes_effect_at_the_next_frame(tracker: Tracker) -> None:
    tracker.init(frame_with(), BBOX)

    taken = []
    for index in (2, 0, 1):
        tracker.exit_policy = ExitPolicy.fixed(index, num_exits=3)
        taken.append(tracker.update(frame_with()).exit_index)

    assert taken == [2, 0, 1]


def test_a_policy_for_other_exits_is_refused_and_the_old_one_kept(
    toy: Bundle, tracker: Tracker
) -> None:
    message = r"^exit_policy: expected 2 thresholds for toy, got 1"
    with pytest.raises(ValueError, match=message):
        Tracker(toy, exit_policy=ExitPolicy((0.5,)))
    with pytest.raises(ValueError, match=message):
        tracker.exit_policy = ExitPolicy((0.5,))

    assert tracker.exit_policy.thresholds == toy.thresholds()


def test_times_are_told_apart(tracker: Tracker) -> None:
    tracker.init(frame_with(), BBOX)
    tracker.exit_policy = ExitPolicy.fixed(1, num_exits=3)

    result = tracker.update(frame_with())

    stages = tracker.stage_ms
    assert stages.keys() == {"crop", "segment_0", "segment_1", "decide"}
    assert all(ms >= 0 for ms in stages.values())
    assert sum(stages.values()) <= result.latency_ms


def test_a_second_run_gives_the_same_bits(toy: Bundle) -> None:
    frames = [noise(HEIGHT, WIDTH, 3, seed=k) for k in range(6)]

    def results() -> list[TrackResult]:
        with Tracker(toy) as tracker:
            tracker.init(frames[0], BBOX)
            return [without_time(tracker.update(frame)) for frame in frames]

    assert results() == results()


def test_init_starts_afresh(toy: Bundle, tracker: Tracker) -> None:
    tracker.init(noise(100, 100, 3), (10, 10, 30, 30))
    for seed in range(5):
        tracker.update(noise(100, 100, 3, seed=seed))

    tracker.init(frame_with(), BBOX)
    again = tracker.update(frame_with((170, 120)))

    with Tracker(toy, num_threads=1) as fresh:
        fresh.init(frame_with(), BBOX)
        assert without_time(fresh.update(frame_with((170, 120)))) == without_time(again)


def test_update_before_init_is_refused(tracker: Tracker) -> None:
    with pytest.raises(TrackerStateError, match=r"^tracker: expected init before update.*call ini"):
        tracker.update(frame_with())


def test_a_closed_tracker_does_nothing_more(toy: Bundle) -> None:
    tracker = Tracker(toy)
    tracker.init(frame_with(), BBOX)

    tracker.close()
    tracker.close()

    with pytest.raises(TrackerStateError, match=r"^tracker: expected an open one, got a closed"):
        tracker.update(frame_with())
    with pytest.raises(TrackerStateError, match=r"^tracker: expected an open one, got a closed"):
        tracker.init(frame_with(), BBOX)


def test_leaving_the_block_closes_even_after_an_error(toy: Bundle) -> None:
    with pytest.raises(TrackerStateError, match="expected init"), Tracker(toy) as tracker:
        tracker.update(frame_with())

    with pytest.raises(TrackerStateError, match="got a closed one"):
        tracker.init(frame_with(), BBOX)


BAD_FRAMES = {
    "float": (frame_with().astype(np.float32), TypeError, "got dtype float32; scale it to 0..255"),
    "int": (frame_with().astype(np.int64), TypeError, "got dtype int64"),
    "list": ([[1, 2], [3, 4]], TypeError, "got list"),
    "none": (None, TypeError, "got NoneType"),
    "one row": (frame_with()[0, :, 0], ValueError, r"got \(320,\)"),
    "two channels": (frame_with()[..., :2], ValueError, r"got \(240, 320, 2\)"),
    "five channels": (noise(8, 8, 5), ValueError, r"got \(8, 8, 5\)"),
    "a batch": (frame_with()[None], ValueError, r"got \(1, 240, 320, 3\)"),
    "no rows": (frame_with()[:0], ValueError, r"got \(0, 320, 3\)"),
    "no columns": (frame_with()[:, :0], ValueError, r"got \(240, 0, 3\)"),
    "no channels": (frame_with()[..., :0], ValueError, r"got \(240, 320, 0\)"),
}


@pytest.mark.parametrize(("frame", "error", "message"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_bad_frame_is_refused_and_tracking_goes_on(
    tracker: Tracker, frame: Any, error: type[Exception], message: str
) -> None:
    tracker.init(frame_with(), BBOX)

    with pytest.raises(error, match=f"^frame: expected .*{message}"):
        tracker.update(frame)
    with pytest.raises(error, match=f"^frame: expected .*{message}"):
        tracker.init(frame, BBOX)

    assert tracker.bbox == BBOX
    assert centre_of(tracker.update(frame_with((165, 120))).bbox) == pytest.approx(
        (165, 120), abs=6
    )


@pytest.mark.parametrize(
    "bbox",
    [
        (10, 10, math.nan, 10),
        (10, 10, -5, 10),
        (10, 10, 0, 10),
        (WIDTH, 10, 5, 5),
        (-50, 10, 5, 5),
        (10, 10, 5),
        (0, 0, 1e6, 1e6),
        (0, 0, 1e30, 1e30),
        "car",
    ],
)
def test_a_bad_box_is_refused_and_the_old_target_kept(tracker: Tracker, bbox: Any) -> None:
    tracker.init(frame_with(), BBOX)

    with pytest.raises(ValueError, match=r"^bbox: expected"):
        tracker.init(frame_with(), bbox)

    assert tracker.bbox == BBOX


def test_a_box_that_the_caller_changes_later_is_the_callers(tracker: Tracker) -> None:
    bbox = np.array(BBOX, np.float32)
    tracker.init(frame_with(), bbox)

    bbox[:] = 0

    assert tracker.bbox == BBOX


def test_frames_that_change_size_are_refused(tracker: Tracker) -> None:
    tracker.init(frame_with(), BBOX)
    tracker.update(frame_with())

    with pytest.raises(FrameSizeError, match=r"^frame 2: expected shape \(240, 320, 3\)"):
        tracker.update(noise(HEIGHT, WIDTH + 2, 3))

    assert tracker.update(frame_with()).bbox == pytest.approx(BBOX, abs=6)
    tracker.init(noise(100, 90, 3), (10, 10, 20, 20))
    tracker.update(noise(100, 90, 3))


def as_memory_of_another_kind(kind: str, frame: UInt8Array) -> UInt8Array:
    padded = np.zeros((HEIGHT + 2, WIDTH + 2, 4), np.uint8)
    padded[1:-1, 1:-1, :3] = frame
    read_only = frame.copy()
    read_only.flags.writeable = False
    return {
        "part of a larger one": padded[1:-1, 1:-1, :3],
        "flipped rows": frame[::-1].copy()[::-1],
        "flipped channels": frame[..., ::-1].copy()[..., ::-1],
        "column by column": np.asfortranarray(frame),
        "planes": frame.transpose(2, 0, 1).copy().transpose(1, 2, 0),
        "every other": np.repeat(np.repeat(frame, 2, 0), 2, 1)[::2, ::2],
        "read-only": read_only,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "part of a larger one",
        "flipped rows",
        "flipped channels",
        "column by column",
        "planes",
        "every other",
        "read-only",
    ],
)
def test_how_a_frame_lies_in_memory_does_not_matter(tracker: Tracker, kind: str) -> None:
    frames = [noise(HEIGHT, WIDTH, 3, seed=k) for k in range(2)]
    tracker.init(frames[0], BBOX)
    expected = tracker.update(frames[1])

    tracker.init(as_memory_of_another_kind(kind, frames[0]), BBOX)
    result = tracker.update(as_memory_of_another_kind(kind, frames[1]))

    assert without_time(result) == without_time(expected)


@pytest.mark.parametrize(
    "convert",
    [lambda f: f[..., 0], lambda f: f[..., :1], lambda f: np.dstack([f, 255 - f[..., :1]])],
    ids=["grey", "one channel", "BGRA"],
)
def test_grey_and_bgra_frames_track_as_bgr_does(
    tracker: Tracker, convert: Callable[[UInt8Array], UInt8Array]
) -> None:
    frames = [np.repeat(noise(HEIGHT, WIDTH, 1, seed=k), 3, axis=2) for k in range(2)]
    tracker.init(frames[0], BBOX)
    expected = tracker.update(frames[1])

    tracker.init(convert(frames[0]), BBOX)
    result = tracker.update(convert(frames[1]))

    assert without_time(result) == without_time(expected)


def test_frames_are_not_written_to(tracker: Tracker) -> None:
    frame = noise(HEIGHT, WIDTH, 3)
    before = frame.copy()

    tracker.init(frame, (-10, -10, 60, 60))
    tracker.update(frame)

    np.testing.assert_array_equal(frame, before)


@pytest.mark.parametrize("start", [(150, 110, 30, 20), (-10, -10, 25, 25), (310, 230, 60, 60)])
def test_over_noise_the_box_stays_sane(tracker: Tracker, start: tuple[float, ...]) -> None:
    tracker.init(noise(HEIGHT, WIDTH, 3), start)

    for seed in range(200):
        assert_sane(tracker.update(noise(HEIGHT, WIDTH, 3, seed=seed)).bbox)


@pytest.mark.parametrize("size", [0.0, 0.01, 0.9, 5.0, 1e9], ids=str)
def test_whatever_size_a_network_answers_the_box_stays_sane(
    toy: Bundle, tmp_path: Path, size: float
) -> None:
    bundle = respond(toy, tmp_path / "bundle", size=size)
    with Tracker(bundle, exit_policy=ExitPolicy.always_last(num_exits=3)) as tracker:
        tracker.init(frame_with(), BBOX)

        for seed in range(40):
            assert_sane(tracker.update(noise(HEIGHT, WIDTH, 3, seed=seed)).bbox)


@pytest.mark.parametrize("place", [-3.0, 3.0, 1e9], ids=str)
def test_a_target_that_left_leaves_its_box_at_the_border(
    toy: Bundle, tmp_path: Path, place: float
) -> None:
    bundle = respond(toy, tmp_path / "bundle", places=place)
    with Tracker(bundle, exit_policy=ExitPolicy.always_last(num_exits=3)) as tracker:
        tracker.init(frame_with(), BBOX)

        for _ in range(40):
            result = tracker.update(frame_with())
            assert_sane(result.bbox)

    assert result.score == pytest.approx(SCORES[-1])


def assert_sane(bbox: tuple[float, float, float, float]) -> None:
    """Finite, of a size that can be cropped, and with a strip of it in the frame."""
    x, y, w, h = bbox
    assert all(math.isfinite(value) for value in bbox)
    assert 2 <= w <= WIDTH
    assert 2 <= h <= HEIGHT
    assert 0 <= x <= WIDTH - 2
    assert 0 <= y <= HEIGHT - 2


@pytest.mark.parametrize(
    "constants",
    [{"size": math.nan}, {"size": math.inf}, {"size": 3e38}, {"exit_score": math.nan}],
    ids=str,
)
def test_an_answer_that_is_not_finite_keeps_the_last_box(
    toy: Bundle, tmp_path: Path, constants: dict[str, float]
) -> None:
    bundle = respond(toy, tmp_path / "bundle", **constants)
    with Tracker(bundle) as tracker:
        tracker.init(frame_with(), BBOX)
        tracker.exit_policy = ExitPolicy.fixed(0, num_exits=3)
        before = tracker.update(frame_with((165, 120)))
        tracker.exit_policy = ExitPolicy.always_last(num_exits=3)

        result = tracker.update(frame_with((170, 120)))

        assert result.bbox == before.bbox == tracker.bbox
        assert result.score == 0.0
        tracker.exit_policy = ExitPolicy.fixed(0, num_exits=3)
        found = tracker.update(frame_with((175, 120)))
        assert centre_of(found.bbox) == pytest.approx((175, 120), abs=6)


def bytes_kept() -> int:
    """Bytes of Python objects, without what Python itself keeps to be faster.

    Those are lists of objects to use again, and the names of attributes that were last looked up:
    an ONNX Runtime session makes such a name in every run, and the cache holds hundreds of them.
    """
    sys._clear_type_cache()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("at_border", [False, True])
def test_updates_keep_no_memory_and_take_little(toy: Bundle, at_border: bool) -> None:
    bbox = (2.0, 100.0, 40.0, 40.0) if at_border else BBOX
    target = centre_of(bbox)  # type: ignore[arg-type]  # four numbers
    frame = frame_with(target)
    with Tracker(toy, num_threads=1) as tracker:
        tracker.init(frame, bbox)
        for _ in range(10):
            tracker.update(frame)

        tracemalloc.start()
        tracker.update(frame)
        before_bytes = bytes_kept()
        largest_bytes = 0
        for _ in range(300):
            now_bytes, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            tracker.update(frame)
            largest_bytes = max(largest_bytes, tracemalloc.get_traced_memory()[1] - now_bytes)
        after_bytes = bytes_kept()
        tracemalloc.stop()

    assert after_bytes - before_bytes < 300 * 8  # a float has 24 bytes, the smallest object 16
    assert largest_bytes < 8_000  # a search region alone has 12,288 bytes


def test_a_bundle_is_found_by_its_folder(toy: Bundle) -> None:
    with Tracker(toy.path) as tracker:
        assert tracker.bundle == toy
        assert (tracker.backend, tracker.precision) == ("onnxruntime", "fp32")
        assert tracker.engines_path is None


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a bundle"):
        Tracker(tmp_path)


def test_a_changed_bundle_is_refused(toy: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(toy.path, tmp_path / "bundle")
    (folder / "segment_2.onnx").write_bytes(b"another network")

    with pytest.raises(BundleTamperedError, match=r"segment_2\.onnx"):
        Tracker(folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": "coreml"},
            BackendUnavailableError,
            "^backend: expected one of auto, ",
        ),
        ({"precision": "fp16"}, ValueError, "^precision: expected one of .* on onnxruntime"),
        ({"precision": "fp64"}, ValueError, "^precision: expected one of .* on onnxruntime"),
        ({"precision": "int8"}, EngineNotFoundError, "run: edgetrack build --precision int8"),
        ({"operating_point": "quick"}, ValueError, "^operating_point: expected one of"),
        ({"num_threads": 0}, ValueError, "^num_threads: expected at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_named(
    toy: Bundle, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Tracker(toy, **options)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All engines that trackers open during a test."""

    class Watched(OnnxRuntimeBackend):
        def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> Any:
            engines.append(super().load_onnx(onnx_path, graph))
            return engines[-1]

    engines: list[Any] = []
    monkeypatch.setattr("edgetrack.tracker.get_backend", lambda *_, **__: Watched())
    return engines


def assert_closed(engines: list[Any]) -> None:
    for engine in engines:
        with pytest.raises(EngineError, match="got a closed one"):
            engine.bind({})


def test_closing_frees_every_engine(toy: Bundle, opened: list[Any]) -> None:
    Tracker(toy).close()

    assert len(opened) == 4
    assert_closed(opened)


def test_engines_before_one_that_fails_are_freed(
    toy: Bundle, tmp_path: Path, opened: list[Any]
) -> None:
    folder = shutil.copytree(toy.path, tmp_path / "bundle")
    (folder / "segment_2.onnx").write_bytes(b"no graph")
    bundle = Bundle.load(folder, verify=False)

    with pytest.raises(EngineBuildError, match=r"segment_2\.onnx"):
        Tracker(bundle)

    assert len(opened) == 3
    assert_closed(opened)


def test_a_tracker_follows_the_rules_of_its_bundle_or_those_it_is_given(toy: Bundle) -> None:
    with_rules = dataclasses.replace(toy, rules={"size_smoothing": 0.5})

    with Tracker(with_rules) as tracker, Tracker(with_rules, rules=TargetRules.off()) as plain:
        for one in (tracker, plain):
            one.init(frame_with(), BBOX)
        smoothed, own = (one.update(frame_with(side_px=80)).bbox for one in (tracker, plain))

    assert tracker.rules == TargetRules(size_smoothing=0.5)
    assert smoothed[2] == pytest.approx((BBOX[2] + own[2]) / 2, abs=1e-3)


def test_an_unsure_target_is_reported_lost(toy: Bundle) -> None:
    rules = TargetRules(unsure_score=0.99, lost_after=2)

    with Tracker(toy, rules=rules) as tracker:
        tracker.init(frame_with(), BBOX)
        lost = [tracker.update(frame_with()).is_lost for _ in range(3)]

    assert lost == [False, True, True]


def test_an_unsure_target_is_looked_for_in_a_wider_window(toy: Bundle) -> None:
    rules = TargetRules(unsure_score=0.99, patience=1, search_growth=2.0)
    far = frame_with((160.0 + 120.0, 120.0), side_px=20)

    with Tracker(toy, rules=rules) as tracker, Tracker(toy) as plain:
        for one in (tracker, plain):
            one.init(frame_with(), BBOX)
            one.update(frame_with())
        found, missed = (one.update(far).bbox for one in (tracker, plain))

    assert found[0] + found[2] / 2 > 220
    assert missed[0] + missed[2] / 2 < 180


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "luck"}, "criterion: expected one of"),
        ({"rules": {"growth": 1.0}}, "rules: expected names among"),
        ({"rules": {"size_smoothing": 2.0}}, "size_smoothing: expected"),
    ],
)
def test_a_bundle_with_unknown_rules_is_refused(
    toy: Bundle, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleFormatError, match=message):
        Tracker(dataclasses.replace(toy, **change))
