"""Kernels against what the host computes; the crop has a file of its own."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from compiled_kernels import CompiledKernels

from edgetrack.bundle import CropSpec
from edgetrack.crops import CropWindow
from edgetrack.runtime.device_state import (
    RESULT,
    RING,
    TARGET,
    pack_decision,
    pack_rules,
    pack_target,
)
from edgetrack.runtime.policies import CRITERIA, ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

FRAME_SHAPE = (240, 320, 3)
HANDLE = 0xFEDC_BA98_7654_3210
UNTOUCHED = 99
NOWHERE = np.uint64(0)
TEMPLATE_FACTOR = 2.0
Float32Array = npt.NDArray[np.float32]


def float32(*values: float) -> Float32Array:
    return np.array(values, np.float32)


# ``edgetrack_gate`` and ``edgetrack_gate_flag``

CRITERION_VALUES = (0.0, 1e-30, 0.1, 0.25, 0.3, 0.5, 1.0, 2.0, math.nan, math.inf, -math.inf)
THRESHOLDS = (0.0, 0.25, 0.3, math.inf)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_gates_decide_as_the_policy(kernels: CompiledKernels, criterion: str) -> None:
    rng = np.random.default_rng(1)
    rounded = tuple(float(np.float32(t)) for t in (0.1, 0.3))  # equal to what an exit may say
    policy = ExitPolicy((*THRESHOLDS, *rounded), criterion)
    num_exits = len(policy.thresholds) + 1
    decision, target = pack_decision(policy, num_exits), np.zeros((), TARGET)
    flag = np.zeros((), np.uint32)
    cases = list(itertools.product(CRITERION_VALUES, CRITERION_VALUES))
    cases += rng.uniform(0, 1, (200, 2)).tolist()
    seen = Counter[bool]()
    for exit_index, case in itertools.product(range(num_exits), cases):
        uncertainty, score = (float32(value) for value in case)
        stops = policy.should_exit(exit_index, float(uncertainty[0]), float(score[0]))
        index = np.int32(exit_index)
        seen[stops] += 1

        target["exit_index"] = UNTOUCHED
        kernels.launch(
            "edgetrack_gate", uncertainty, score, decision, target, index, np.uint64(HANDLE)
        )
        assert kernels.conditions[HANDLE] == (not stops), (exit_index, case)
        assert target["exit_index"] == exit_index + (not stops)

        target["exit_index"] = UNTOUCHED
        kernels.launch(
            "edgetrack_gate_with_head",
            *(uncertainty, score, decision, target, index, np.uint64(HANDLE), np.uint64(5)),
        )
        assert kernels.conditions == {HANDLE: not stops, 5: stops}, (exit_index, case)
        assert target["exit_index"] == exit_index + (not stops)

        target["exit_index"] = UNTOUCHED
        kernels.launch("edgetrack_gate_flag", uncertainty, score, decision, target, index, flag)
        assert flag == (1 << 1 | (not stops)), (exit_index, case)
        assert target["exit_index"] == exit_index + (not stops)
    assert min(seen[True], seen[False]) > 100


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_gate_stops_only_below_its_threshold(kernels: CompiledKernels, criterion: str) -> None:
    value = float32(0.5)
    target = np.zeros((), TARGET)
    for threshold, stops in ((0.5, False), (np.nextafter(0.5, 1), True)):
        decision = pack_decision(ExitPolicy((float(threshold),), criterion), num_exits=2)

        kernels.launch(
            "edgetrack_gate", value, value, decision, target, np.int32(0), np.uint64(HANDLE)
        )

        assert kernels.conditions == {HANDLE: not stops}


@pytest.mark.parametrize("frame_index", [0, 1, 2**30, 2**31 - 1])
def test_a_flag_holds_the_low_bits_of_the_frame_s_number(
    kernels: CompiledKernels, frame_index: int
) -> None:
    decision = pack_decision(ExitPolicy((0.5,)), num_exits=2)
    target, flag = np.zeros((), TARGET), np.zeros((), np.uint32)
    target["frame_index"] = frame_index
    sure, unsure = float32(0.1), float32(0.9)

    for uncertainty, goes_on in ((sure, 0), (unsure, 1)):
        kernels.launch(
            "edgetrack_gate_flag", uncertainty, sure, decision, target, np.int32(0), flag
        )
        assert flag == ((frame_index + 1) << 1 & 0xFFFF_FFFF | goes_on)


@pytest.mark.parametrize(("value", "condition"), [(0, 0), (1, 1), (6, 0), (7, 1)])
def test_the_probe_writes_its_word_and_sets_its_condition(
    kernels: CompiledKernels, value: int, condition: int
) -> None:
    word = np.zeros((), np.uint32)

    kernels.launch("edgetrack_probe", word, np.uint32(value), np.uint64(HANDLE))

    assert word == value
    assert kernels.conditions == {HANDLE: condition}


# ``edgetrack_settle``

RULE_VALUES: dict[str, float] = {
    "centre_smoothing": 0.3,
    "size_smoothing": 0.45,
    "max_size_change": 1.07,
    "size_hold": 0.8,
    "found_score": 0.7,
    "look_around": 0.35,
    "search_growth": 1.6,
    "patience": 2,
    "lost_after": 4,
}
# Rules that do something only when a frame can be unsure, and the target lost.
UNSURE: dict[str, float] = {"unsure_score": 0.5, "lost_after": 3}
RULE_SETS: dict[str, dict[str, float]] = {
    "off": {},
    "unsure": UNSURE,
    **{name: UNSURE | {name: value} for name, value in RULE_VALUES.items()},
    **{f"{n} alone": {n: RULE_VALUES[n]} for n in ("centre_smoothing", "max_size_change")},
    "never wider": {"patience": 1, "search_growth": 1.6},  # no score is unsure, but no box is
    "never lost": {"unsure_score": 0.5, "look_around": 0.5, "lost_after": math.inf},
    "always wider": {"unsure_score": 1.0, "patience": 1, "search_growth": 2.0},
    "together": UNSURE | RULE_VALUES,
}


class Twins:
    """One target that the host settles, as ``Tracker`` does, and one that the kernel settles."""

    def __init__(
        self,
        kernels: CompiledKernels,
        rules: TargetRules,
        *,
        search_factor: float,
        geometry: str = "edgetrack",
    ) -> None:
        self._kernels, self._search_factor = kernels, search_factor
        self._geometry = geometry
        self.state = TargetState(
            float32(100, 80, 40, 30), frame_shape=FRAME_SHAPE, rules=rules, geometry=geometry
        )
        self.window = self.state.search_window(search_factor)
        self.target = pack_target(self.state, self.window, frame_index=0)
        self.results = np.zeros(RING, RESULT)
        crops = CropSpec(
            template_size_px=16,
            template_factor=TEMPLATE_FACTOR,
            search_size_px=32,
            search_factor=search_factor,
            geometry=geometry,
        )
        self.rules = pack_rules(rules, crops=crops, frame_shape=FRAME_SHAPE)

    def settle(self, bbox_cxcywh: Float32Array, score: float, *, exit_index: int) -> None:
        """Let both take in an answer, and compare all that they say of it."""
        number, scores, uncertainty = int(self.target["frame_index"]) + 1, float32(score), 0.25
        self.target["exit_index"] = exit_index
        other_slots = np.delete(self.results, number % RING).tobytes()

        with np.errstate(over="ignore", invalid="ignore"):
            answer = self.window.to_frame(bbox_cxcywh)
        is_sane = self.state.settle(answer, float(scores[0]))
        self.window = self.state.search_window(self._search_factor)
        self._kernels.launch(
            "edgetrack_settle",
            *(bbox_cxcywh, scores, float32(uncertainty), self.rules, self.target, self.results),
            *(NOWHERE, NOWHERE),
        )

        expected = pack_target(self.state, self.window, frame_index=number)
        expected["exit_index"], expected["is_sane"] = exit_index, is_sane
        assert self.target.tobytes() == expected.tobytes(), (self.target, expected)
        result = expected_result(expected, score=float(scores[0]) if is_sane else 0.0)
        result["uncertainty"], result["answer"] = uncertainty, answer
        assert self.results[number % RING].tobytes() == result.tobytes(), (self.results, result)
        assert np.delete(self.results, number % RING).tobytes() == other_slots


def expected_result(target: npt.NDArray[Any], *, score: float) -> npt.NDArray[Any]:
    result = np.zeros((), RESULT)
    for name in ("x", "y", "w", "h", "exit_index", "is_lost", "window"):
        result[name] = target[name]
    result["score"], result["sequence"] = score, target["frame_index"]
    return result


def answers(rng: np.random.Generator, num_frames: int) -> list[tuple[Float32Array, float]]:
    """Boxes and scores of a target that is followed, left, lost and found; some are no numbers."""
    given = []
    surety = 0.5
    for _ in range(num_frames):
        surety = min(max(surety + rng.normal(0, 0.15), 0.0), 1.0)
        bbox = rng.normal([0.5, 0.5, 0.25, 0.25], [0.12, 0.12, 0.05, 0.05])
        kind = rng.uniform()
        if kind < 0.05:  # far away, or with no size
            bbox = rng.normal(0, 3, 4)
        elif kind < 0.08:
            bbox[rng.integers(4)] = rng.choice([math.nan, math.inf, -math.inf, 0.0])
        score = math.nan if rng.uniform() < 0.02 else surety
        given.append((bbox.astype(np.float32), score))
    return given


@pytest.mark.parametrize("name", RULE_SETS)
def test_the_kernel_settles_as_the_host_does_bit_for_bit(
    kernels: CompiledKernels, name: str
) -> None:
    rng = np.random.default_rng(sorted(RULE_SETS).index(name))
    twins = Twins(kernels, TargetRules.of(RULE_SETS[name]), search_factor=4.0)

    for bbox_cxcywh, score in answers(rng, 400):
        twins.settle(bbox_cxcywh, score, exit_index=int(rng.integers(4)))


@pytest.mark.parametrize("name", ["off", "together"])
def test_the_kernel_settles_as_the_host_does_with_the_geometry_of_ostrack(
    kernels: CompiledKernels, name: str
) -> None:
    rng = np.random.default_rng(23)
    rules = TargetRules.of(RULE_SETS[name])
    twins = Twins(kernels, rules, search_factor=4.0, geometry="ostrack")
    plain = Twins(kernels, rules, search_factor=4.0)

    for bbox_cxcywh, score in answers(rng, 400):
        twins.settle(bbox_cxcywh, score, exit_index=0)
        plain.settle(bbox_cxcywh, score, exit_index=0)
        shifts = twins.window.shift_x_px, twins.window.shift_y_px
        assert twins.target["corner_x_px"] == np.float32(twins.window.left_px + shifts[0])
    assert plain.target.tobytes() != twins.target.tobytes()
    assert any(shifts)


@pytest.mark.parametrize("geometry", ["edgetrack", "ostrack"])
def test_the_update_s_crop_is_aimed_at_the_box_that_was_settled_on(
    kernels: CompiledKernels, geometry: str
) -> None:
    rng = np.random.default_rng(29)
    twins = Twins(kernels, TargetRules.off(), search_factor=4.0, geometry=geometry)
    aimed, bbox_in_crop = np.zeros((), TARGET), float32(0, 0, 0, 0)
    for number, (bbox_cxcywh, score) in enumerate(answers(rng, 300), start=1):
        before, results = twins.target.copy(), np.zeros(RING, RESULT)
        twins.settle(bbox_cxcywh, score, exit_index=1)
        after, box = twins.target, twins.state.bbox_xywh

        before["exit_index"] = 1
        kernels.launch(
            "edgetrack_settle",
            *(bbox_cxcywh, float32(score), float32(0.25), twins.rules, before, results),
            *(aimed, bbox_in_crop),
        )

        window = CropWindow.around(box, factor=TEMPLATE_FACTOR, geometry=geometry)
        expected = pack_target(twins.state, window, frame_index=number - 1)
        for name in ("window", "frame_index", "corner_x_px", "corner_y_px"):
            assert aimed[name] == expected[name], name
        assert bbox_in_crop.tobytes() == window.to_crop(box).tobytes()
        assert before.tobytes() == after.tobytes()

        slot = number % RING
        assert results[slot]["sequence"] == 0, "the frame is still read"
        kernels.launch("edgetrack_tell", before, results)
        assert results[slot].tobytes() == twins.results[slot].tobytes()


def test_a_graph_that_does_not_read_the_box_in_the_crop_is_not_given_it(
    kernels: CompiledKernels,
) -> None:
    twins, aimed = Twins(kernels, TargetRules.off(), search_factor=4.0), np.zeros((), TARGET)

    kernels.launch(
        "edgetrack_settle",
        *(float32(0.5, 0.5, 0.2, 0.2), float32(0.9), float32(0.1)),
        *(twins.rules, twins.target, twins.results, aimed, NOWHERE),
    )

    assert aimed["window"]["side_px"] > 0
    assert aimed["frame_index"] == 0


@pytest.mark.parametrize("is_sane", [0, 1])
@pytest.mark.parametrize("num_chunks", [1, 255, 256, 5000])
def test_state_is_carried_unless_the_answer_was_no_number(
    kernels: CompiledKernels, is_sane: int, num_chunks: int
) -> None:
    rng = np.random.default_rng(num_chunks)
    target = np.zeros((), TARGET)
    target["is_sane"] = is_sane
    source, out = rng.integers(0, 256, (2, 16 * (num_chunks + 1)), np.uint8)
    before = out.copy()

    kernels.launch(
        "edgetrack_carry",
        *(target, source, out, np.uint32(num_chunks)),
        grid=(4, 1, 1),
        block=(64, 1, 1),
    )

    size = 16 * num_chunks
    np.testing.assert_array_equal(out[:size], (source if is_sane else before)[:size])
    np.testing.assert_array_equal(out[size:], before[size:])


@pytest.mark.parametrize("seed", range(20))
def test_the_kernel_settles_as_the_host_does_under_random_rules(
    kernels: CompiledKernels, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shares = ("centre_smoothing", "size_smoothing", "unsure_score", "size_hold", "look_around")
    rules = {name: float(rng.uniform()) for name in (*shares, "found_score")}
    rules |= {"max_size_change": rng.uniform(1, 2), "search_growth": rng.uniform(1, 2)}
    rules |= {"patience": int(rng.integers(1, 5)), "lost_after": rng.uniform(1, 6)}
    twins = Twins(kernels, TargetRules.of(rules), search_factor=float(rng.uniform(1.5, 5)))

    for bbox_cxcywh, score in answers(rng, 300):
        twins.settle(bbox_cxcywh, score, exit_index=0)


def test_the_roll_outs_meet_what_they_are_for(kernels: CompiledKernels) -> None:
    rng = np.random.default_rng(7)
    met = Counter[str]()

    for name in ("look_around", "together"):
        twins = Twins(kernels, TargetRules.of(RULE_SETS[name]), search_factor=4.0)
        for bbox_cxcywh, score in answers(rng, 500):
            beside = twins.state.is_lost and twins.state.num_unsure % 2 == 1
            before = twins.state.bbox_xywh
            twins.settle(bbox_cxcywh, score, exit_index=0)
            x, y, w, h = twins.state.bbox_xywh.tolist()
            is_taken = twins.state.bbox_xywh is not before
            met["lost"] += twins.state.is_lost
            met["looked beside in vain"] += beside and not is_taken
            met["found beside"] += beside and is_taken
            met["no number"] += not (np.isfinite(bbox_cxcywh).all() and math.isfinite(score))
            met["at the frame's border"] += x == 0 or y == 0 or x + w == 320 or y + h == 240
            met["smallest side"] += min(w, h) == 2

    assert min(met.values()) >= 3, met


def test_a_window_between_two_pixels_is_rounded_as_python_rounds(kernels: CompiledKernels) -> None:
    rng = np.random.default_rng(11)
    twins = Twins(kernels, TargetRules.off(), search_factor=4.0)
    no_box = float32(math.nan, 0, 0, 0)  # keeps the state, so that the window is of the box below

    for _ in range(300):
        x, y, side = rng.integers(0, 200), rng.integers(0, 200), rng.integers(2, 40)
        twins.state.bbox_xywh = float32(x + 0.5, y, side, side)
        twins.target = pack_target(twins.state, twins.window, frame_index=3)
        twins.settle(no_box, 0.9, exit_index=0)


def test_the_search_goes_on_when_the_numbers_of_frames_wrap(kernels: CompiledKernels) -> None:
    twins = Twins(kernels, TargetRules.off(), search_factor=4.0)
    twins.target["frame_index"] = 2**31 - 1

    kernels.launch(
        "edgetrack_settle",
        *(float32(0.5, 0.5, 0.2, 0.2), float32(0.9), float32(0.1)),
        *(twins.rules, twins.target, twins.results, NOWHERE, NOWHERE),
    )

    assert twins.target["frame_index"] == -(2**31)
    assert twins.results[0]["sequence"] == 2**31


@pytest.mark.parametrize(
    ("bbox_xywh", "search_growth"),
    [
        ((math.nan, 0, 9, 9), 1.0),
        ((0, 0, math.inf, 9), 1.0),
        ((5, 5, 9, 9), 1e7),
        ((5, 5, 9, 9), math.inf),
    ],
)
def test_a_window_that_cannot_be_is_one_pixel(
    kernels: CompiledKernels, bbox_xywh: tuple[float, ...], search_growth: float
) -> None:
    rules = TargetRules(unsure_score=0.5, patience=1, search_growth=search_growth)
    twins = Twins(kernels, rules, search_factor=4.0)
    twins.state.bbox_xywh = float32(*bbox_xywh)
    target = pack_target(twins.state, twins.window, frame_index=0)
    no_box = float32(math.nan, 0, 0, 0)

    kernels.launch(
        "edgetrack_settle",
        *(no_box, float32(0.9), float32(0.1), twins.rules, target, twins.results),
        *(NOWHERE, NOWHERE),
    )

    left, top, side = target["window"].item()
    assert side == (36 if math.isnan(bbox_xywh[0]) else 1)
    assert max(abs(left), abs(top)) < 2**20


def test_huge_answers_stay_in_the_frame(kernels: CompiledKernels) -> None:
    huge = float(np.finfo(np.float32).max) / 256
    for signs in itertools.product((-1, 0, 1), repeat=4):
        twins = Twins(kernels, TargetRules.of(RULE_SETS["together"]), search_factor=4.0)
        with np.errstate(over="ignore", invalid="ignore"):
            twins.settle(float32(*signs) * np.float32(huge), 0.9, exit_index=0)
