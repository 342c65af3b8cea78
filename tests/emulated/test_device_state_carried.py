"""Heads and state that is carried from frame to frame, on the emulated device."""

import ctypes
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_segments import EmulatedBackend, EmulatedSegment
from device_frames import DECISIONS, Clip, OnDevice, follow, make_clip, opened, without_time
from emulator.hooks import EmulatedDriver
from tolerances import BETWEEN_LOOPS

from edgetrack.backends.cuda import CudaContext
from edgetrack.bundle import Bundle, GraphSpec
from edgetrack.errors import EngineMismatchError
from edgetrack.runtime.policies import ExitPolicy
from edgetrack.runtime.target import TargetRules
from edgetrack.tracker import Tracker, TrackResult

NUM_EXITS = 3
RULES = TargetRules(
    centre_smoothing=0.1,
    max_size_change=1.1,
    unsure_score=0.86,  # all but the last exit are unsure
    patience=1,
    search_growth=1.4,
    lost_after=2,
    look_around=0.3,
)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return make_clip()[:16]


@pytest.fixture(autouse=True)
def nothing_leaks(emulated: EmulatedDriver) -> Iterator[None]:
    before = emulated.live_bytes, emulated.live_handles()
    yield
    emulated.reset()
    assert (emulated.live_bytes, emulated.live_handles()) == before


@pytest.fixture
def context() -> Iterator[CudaContext]:
    context = CudaContext.open()
    yield context
    context.close()


def on_cpu(bundle: Bundle, **options: Any) -> Tracker:
    return Tracker(bundle, backend="onnxruntime", num_threads=1, **options)


def follow_around(tracker: Tracker, frames: Sequence[Any], bbox: Any) -> list[TrackResult]:
    """Results at exit 0, 1, 2, 0, …"""
    tracker.init(frames[0], bbox)
    results = []
    for number, frame in enumerate(frames[1:]):
        tracker.exit_policy = ExitPolicy.fixed(number % NUM_EXITS, num_exits=NUM_EXITS)
        results.append(tracker.update(frame))
    return without_time(results)


def assert_close(found: list[TrackResult], expected: list[TrackResult]) -> None:
    """The pixels of the two crops differ by a grey level at most."""
    assert [r.exit_index for r in found] == [r.exit_index for r in expected]
    assert [r.is_lost for r in found] == [r.is_lost for r in expected]
    boxes = np.array([r.bbox for r in found]) - [r.bbox for r in expected]
    assert np.abs(boxes).max() <= BETWEEN_LOOPS["bbox_px"]
    scores = np.array([r.score for r in found]) - [r.score for r in expected]
    assert np.abs(scores).max() <= 1e-3


@pytest.mark.parametrize("rules", [None, RULES], ids=["own rules", "all rules"])
@pytest.mark.parametrize("name", ["toy_with_heads", "toy_with_memory"])
def test_all_ways_agree_bit_for_bit_and_with_the_cpu(
    name: str, rules: TargetRules | None, clip: Clip, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    frames, bbox = [frame for frame, _ in clip], clip[0][1]
    found = {}
    for decision in DECISIONS:
        with opened(bundle, decision, rules=rules) as tracker:
            found[decision] = follow_around(tracker, frames, bbox)
    with on_cpu(bundle, rules=rules) as tracker:
        expected = follow_around(tracker, frames, bbox)

    assert found["device"] == found["host"]
    assert found["flag"] == found["host"]
    assert_close(found["host"], expected)
    assert any(r.is_lost for r in expected) == (rules is not None)


@pytest.mark.parametrize("family", ["dytrack", "fartrack"])
def test_all_ways_agree_on_the_families_that_have_heads_or_state(
    family: str, clip: Clip, tmp_path: Path
) -> None:
    from family_bundles import export_family

    bundle = export_family(family, tmp_path / "bundle")
    frames, bbox = [frame for frame, _ in clip], clip[0][1]
    found = {}
    for decision in DECISIONS:
        with opened(bundle, decision) as tracker:
            found[decision] = follow(tracker, clip)
    with on_cpu(bundle) as tracker:
        expected = follow(tracker, clip)

    assert found["device"] == found["flag"] == found["host"]
    assert len({result.score for result in found["host"]}) == len(frames) - 1
    # Random weights make much of a grey level, but they start from the same.
    first = np.array([found["host"][0].bbox, expected[0].bbox])
    assert np.abs(first[0] - first[1]).max() <= BETWEEN_LOOPS["bbox_px"] + 0.1 * bbox[2]


@pytest.mark.parametrize("decision", DECISIONS)
def test_heads_of_other_exits_do_not_run(
    toy_with_memory: Bundle, clip: Clip, decision: str
) -> None:
    names = [graph.name for graph in toy_with_memory.graphs]
    for exit_index in range(NUM_EXITS):
        backend = EmulatedBackend()
        policy = ExitPolicy.fixed(exit_index, num_exits=NUM_EXITS)
        with Tracker(
            toy_with_memory, backend=backend, exit_decision=decision, exit_policy=policy
        ) as tracker:
            tracker.init(*clip[0])
            before = [segment.num_runs for segment in backend.segments]
            for frame, _ in clip[1:6]:
                assert tracker.update(frame).exit_index == exit_index
        runs = [s.num_runs - b for s, b in zip(backend.segments, before, strict=True)]
        expected = {f"segment_{k}": 5 for k in range(exit_index + 1)}
        expected |= {f"head_{exit_index}": 5, "update": 5}
        assert dict(zip(names, runs, strict=True)) == {n: expected.get(n, 0) for n in names}


@pytest.mark.parametrize("decision", DECISIONS)
def test_an_answer_that_is_no_number_is_not_carried(
    toy_with_memory: Bundle, clip: Clip, decision: str
) -> None:
    frames = [frame for frame, _ in clip]
    frames[5:7] = [np.zeros_like(frames[0])] * 2
    with opened(toy_with_memory, decision) as tracker:
        found = follow_around(tracker, frames, clip[0][1])
    with on_cpu(toy_with_memory) as tracker:
        expected = follow_around(tracker, frames, clip[0][1])

    assert [r.score == 0 for r in found] == [4 <= k < 6 for k in range(len(found))]
    assert_close(found, expected)


@pytest.mark.parametrize("decision", DECISIONS)
def test_init_starts_the_state_anew(toy_with_memory: Bundle, clip: Clip, decision: str) -> None:
    with opened(toy_with_memory, decision) as tracker:
        first, again = follow(tracker, clip), follow(tracker, clip)

    assert first == again
    assert len({result.score for result in first}) == len(first), "a score per state"


@pytest.mark.parametrize("decision", DECISIONS)
def test_frames_handed_in_ahead_give_the_same_results(
    toy_with_memory: Bundle, clip: Clip, decision: str, emulated: EmulatedDriver
) -> None:
    with opened(toy_with_memory, decision) as tracker:
        one_by_one = follow(tracker, clip)
        emulated.configure(latency_us=500)
        tracker.init(*clip[0])
        pending = [tracker.update_async(frame) for frame, _ in clip[1:]]

        assert without_time([p.result() for p in pending]) == one_by_one


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_frame_on_the_device_may_be_written_to_once_its_result_is_there(
    toy_with_memory: Bundle,
    clip: Clip,
    decision: str,
    context: CudaContext,
    emulated: EmulatedDriver,
) -> None:
    with opened(toy_with_memory, decision) as tracker:
        expected = follow(tracker, clip)
    emulated.configure(latency_us=1000)  # what a result does not wait for comes too late
    place = OnDevice(context, clip[0][0])
    memory = (ctypes.c_uint8 * clip[0][0].nbytes).from_address(place.memory.address)
    pixels = np.frombuffer(memory, np.uint8).reshape(clip[0][0].shape)

    found = []
    with opened(toy_with_memory, decision) as tracker:
        tracker.init(place, clip[0][1])
        for frame, _ in clip[1:]:
            pixels[...] = frame
            found.append(tracker.update(place))
            pixels[...] = 255
    place.memory.close()

    assert without_time(found) == expected


@pytest.mark.parametrize("is_integrated", [0, 1])
def test_a_host_frame_is_there_where_the_target_was_found(
    toy_with_memory: Bundle, context: CudaContext, emulated: EmulatedDriver, is_integrated: int
) -> None:
    """The update's crop reaches beside the search region when the target is at its edge."""
    emulated.configure(integrated=is_integrated)
    rng = np.random.default_rng(1)
    frames = []
    for number in range(10):
        frame = rng.integers(0, 90, (160, 320, 3), np.uint8)
        left = 60 + 34 * (number % 2)
        frame[60:80, left : left + 20] = 255
        frames.append(frame)
    bbox = (60, 60, 20, 20)
    there = [OnDevice(context, frame) for frame in frames]
    with opened(toy_with_memory) as tracker:
        expected = follow_around(tracker, there, bbox)
        found = follow_around(tracker, frames, bbox)
    for place in there:
        place.memory.close()

    centres = np.array([r.bbox[0] + r.bbox[2] / 2 for r in expected])
    assert np.ptp(centres) > 30, "it jumps to the edge"
    assert found == expected


def test_a_frame_costs_one_launch_and_no_copy(
    toy_with_memory: Bundle, clip: Clip, context: CudaContext, emulated: EmulatedDriver
) -> None:
    frames = [OnDevice(context, frame) for frame, _ in clip[:4]]
    with opened(toy_with_memory) as tracker:
        tracker.init(frames[0], clip[0][1])
        tracker.update(frames[1])
        emulated.clear_calls()
        pending = tracker.update_async(frames[2])
        calls = [c for c in emulated.calls() if not c.startswith("cuCtx")]
        pending.result()
    for frame in frames:
        frame.memory.close()

    assert calls == ["cuPointerGetAttribute", "cuGraphLaunch"]


@pytest.mark.parametrize(
    ("name", "num_launches"),
    [
        ("toy", 6),  # crop, two segments, two gates, settle
        ("toy_with_heads", 7),  # besides: one head
        ("toy_with_memory", 12),  # besides: crop, tell, update, carry two tensors
    ],
)
def test_bundles_pay_for_what_they_have(
    name: str,
    num_launches: int,
    clip: Clip,
    emulated: EmulatedDriver,
    request: pytest.FixtureRequest,
) -> None:
    policy = ExitPolicy.fixed(1, num_exits=NUM_EXITS)
    with opened(request.getfixturevalue(name), exit_policy=policy) as tracker:
        tracker.init(*clip[0])
        before = emulated.num_launches
        for frame, _ in clip[1:6]:
            tracker.update(frame)

    assert emulated.num_launches - before == 5 * num_launches


def test_memory_stays_flat_over_a_long_video(
    toy_with_memory: Bundle, clip: Clip, emulated: EmulatedDriver
) -> None:
    frames = [np.ascontiguousarray(frame[::4, ::4]) for frame, _ in clip]
    with opened(toy_with_memory) as tracker:
        tracker.init(frames[0], (20, 20, 12, 12))
        tracker.update(frames[1])
        before = emulated.live_bytes, emulated.live_handles(), tracker.gpu_memory_bytes
        for number in range(600):
            tracker.update_async(frames[number % len(frames)])
        last = tracker.update(frames[0])

        assert (emulated.live_bytes, emulated.live_handles(), tracker.gpu_memory_bytes) == before
    assert np.isfinite([*last.bbox, last.score]).all()


def test_stages_tell_of_the_head_and_of_the_update(toy_with_memory: Bundle, clip: Clip) -> None:
    policy = ExitPolicy.fixed(1, num_exits=NUM_EXITS)
    with opened(toy_with_memory, "host", exit_policy=policy) as tracker:
        tracker.init(*clip[0])
        tracker.update(clip[1][0])

        stages = tracker.stage_ms

    assert list(stages) == ["crop", "segment_0", "segment_1", "head_1", "update"]
    assert all(ms > 0 for ms in stages.values())


def test_a_policy_may_ask_for_the_box_of_each_exit(toy_with_heads: Bundle, clip: Clip) -> None:
    asked: dict[str, list[Any]] = {}

    def ask(name: str, tracker: Tracker) -> None:
        class Asking(ExitPolicy):
            def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
                asked.setdefault(name, []).append(tracker.read_answer())
                return super().should_exit(exit_index, uncertainty, score)

        tracker.exit_policy = Asking((0.0, 0.0))
        tracker.init(*clip[0])
        for frame, _ in clip[1:4]:
            tracker.update(frame)

    with opened(toy_with_heads, "host") as tracker:
        ask("device", tracker)
    with on_cpu(toy_with_heads) as tracker:
        ask("cpu", tracker)

    assert len(asked["device"]) == 3 * NUM_EXITS
    np.testing.assert_allclose(asked["device"], asked["cpu"], atol=BETWEEN_LOOPS["bbox_px"])


@pytest.mark.parametrize("name", ["toy", "toy_with_memory"])
def test_the_geometry_of_published_weights_is_followed(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain: Bundle = request.getfixturevalue(name)
    folder = shutil.copytree(plain.path, tmp_path / "ostrack")
    crops = dataclasses.replace(plain.crops, geometry="ostrack")
    bundle = dataclasses.replace(plain, path=folder, crops=crops).write()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 60, (96, 128, 3), np.uint8) for _ in range(8)]
    for number, frame in enumerate(frames):  # into the corner, where the last row and column are
        left, top = 78 + 4 * number, 60 + 3 * number
        frame[top : top + 20, left : left + 20] = 255
    found = {}
    for decision in DECISIONS:
        with opened(bundle, decision) as tracker:
            found[decision] = follow_around(tracker, frames, (78, 60, 20, 20))
            raw = tracker.read_answer()
    with on_cpu(bundle) as tracker:
        expected = follow_around(tracker, frames, (78, 60, 20, 20))
        expected_raw = tracker.read_answer()
    with on_cpu(plain) as tracker:
        other = follow_around(tracker, frames, (78, 60, 20, 20))

    assert found["device"] == found["flag"] == found["host"]
    assert_close(found["host"], expected)
    np.testing.assert_allclose(raw, expected_raw, atol=BETWEEN_LOOPS["bbox_px"])
    assert other != expected


class OtherTypes(EmulatedBackend):
    """Gives an update whose engine is of another precision than the template's."""

    def load_onnx(self, onnx_path: Path, graph: GraphSpec) -> EmulatedSegment:
        segment = super().load_onnx(onnx_path, graph)
        if graph.name == "update":
            segment.dtypes = {**segment.dtypes, "next_memory": "float16"}
        return segment


def test_engines_that_carry_another_type_are_refused(toy_with_memory: Bundle) -> None:
    message = r"carried 'memory': expected 'next_memory' as float32, .*, got float16; run: edgetr"
    with pytest.raises(EngineMismatchError, match=message):
        Tracker(toy_with_memory, backend=OtherTypes())
