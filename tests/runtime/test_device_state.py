import dataclasses
import math

import numpy as np
import pytest
from compiled_kernels import STRUCTS, CompiledKernels

from edgetrack.bundle import CropSpec
from edgetrack.crops import CropWindow
from edgetrack.runtime import device_state
from edgetrack.runtime.device_state import (
    FORMATS,
    KERNEL_NAMES,
    RESULT,
    RING,
    RULES,
    SOURCE,
    TARGET,
    pack_decision,
    pack_rules,
    pack_target,
    read_ptx,
)
from edgetrack.runtime.policies import CRITERIA, ExitPolicy
from edgetrack.runtime.target import TargetRules, TargetState

CROPS = CropSpec(template_size_px=8, template_factor=2.5, search_size_px=16, search_factor=4.5)


@pytest.mark.parametrize("name", STRUCTS)
def test_a_dtype_is_the_struct_of_the_kernels_byte_for_byte(
    kernels: CompiledKernels, name: str
) -> None:
    dtype = getattr(device_state, name.upper())
    fields = {
        field: (dtype.fields[field][1], dtype[field].itemsize, dtype[field].base.kind)
        for field in dtype.names
    }

    assert kernels.layout(name) == (dtype.itemsize, fields)


@pytest.mark.parametrize("dtype", [SOURCE, TARGET, RESULT])
def test_what_host_and_device_share_does_not_share_cache_lines(dtype: np.dtype) -> None:
    assert dtype.itemsize == 64


def test_every_kernel_that_is_named_can_be_launched(kernels: CompiledKernels) -> None:
    assert all(kernels.parameter_sizes(name) for name in KERNEL_NAMES)
    assert kernels.parameter_sizes("edgetrack_no_such_kernel") is None


def test_slots_go_round_also_when_the_frame_number_wraps() -> None:
    assert 2**32 % RING == 0


def test_formats_have_numbers_of_their_own() -> None:
    assert sorted(FORMATS.values()) == list(range(len(FORMATS)))


def test_packed_rules_are_the_rules() -> None:
    values = {
        field.name: 0.01 * k + (3 if field.name in ("patience", "lost_after") else 0.5)
        for k, field in enumerate(dataclasses.fields(TargetRules))
    }
    values |= {"max_size_change": 1.25, "search_growth": 1.5, "patience": 3, "lost_after": 7}

    crops = dataclasses.replace(CROPS, geometry="ostrack")
    packed = pack_rules(TargetRules.of(values), crops=crops, frame_shape=(240, 320, 3))

    assert {name: packed[name].item() for name in values} == values
    others = {"search_factor": 4.5, "template_factor": 2.5, "width_px": 320, "height_px": 240}
    others |= {"is_ostrack": 1, "padding": 0}
    assert {name: packed[name].item() for name in others} == others
    assert set(RULES.names or ()) == {*values, *others}


@pytest.mark.parametrize(("patience", "packed"), [(2.5, 3), (1, 1), (math.inf, 2**30)])
def test_counts_become_whole_numbers_that_are_reached_in_the_same_frame(
    patience: float, packed: int
) -> None:
    rules = TargetRules(patience=patience, lost_after=patience)  # type: ignore[arg-type]

    values = pack_rules(rules, crops=CROPS, frame_shape=(10, 10))

    assert values["patience"] == values["lost_after"] == packed


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_packed_decision_is_the_policy(criterion: str) -> None:
    packed = pack_decision(ExitPolicy((0.25, math.inf), criterion), num_exits=3)

    assert (packed["weight"], packed["score_weight"]) == CRITERIA[criterion]
    assert packed["thresholds"].tolist() == [0.25, math.inf] + [0.0] * 6
    assert packed["num_exits"] == 3


class LongWinded(ExitPolicy):
    def should_exit(self, exit_index: int, uncertainty: float, score: float) -> bool:
        return score > 0.5


@pytest.mark.parametrize(
    ("policy", "num_exits", "error", "match"),
    [
        (ExitPolicy((0.5,)), 3, ValueError, "expected 2 thresholds, got 1"),
        (ExitPolicy((0.5,) * 9), 10, ValueError, "expected at most 9 on a device, got 10"),
        (LongWinded((0.5,)), 2, TypeError, "got a should_exit of LongWinded; make the tracker"),
    ],
)
def test_a_policy_that_the_device_cannot_follow_is_refused(
    policy: ExitPolicy, num_exits: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        pack_decision(policy, num_exits)


def test_a_packed_target_is_the_state() -> None:
    bbox_xywh = np.array([1.5, 2.5, 30.25, 40.75], np.float32)
    state = TargetState(bbox_xywh, frame_shape=(240, 320), rules=TargetRules.off())
    state.num_unsure, state.is_lost = 5, True

    packed = pack_target(state, CropWindow(-3, 4, 50, -0.25, 0.5), frame_index=9)

    assert [packed[name].item() for name in ("x", "y", "w", "h")] == bbox_xywh.tolist()
    assert packed[["num_unsure", "is_lost", "frame_index", "exit_index"]].item() == (5, 1, 9, 0)
    assert packed["window"].item() == (-3, 4, 50)
    assert packed[["corner_x_px", "corner_y_px"]].item() == (-3.25, 4.5)


def test_the_ptx_ends_as_a_driver_expects() -> None:
    ptx = read_ptx()

    assert ptx.count(b"\0") == 1
    assert ptx.endswith(b"}\n\0")
