from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from recorded import record_inputs

from edgetrack.backends import get_backend
from edgetrack.bundle import Bundle
from edgetrack.gate.choice import MIN_BOX_IOU, Choice, choose
from edgetrack.parity import EngineRunner, open_runner

Damage = Mapping[tuple[str, str], float]  # graph and tensor → what is added to it


class Damaged:
    """Engines whose outputs are off by something."""

    def __init__(self, bundle: Bundle, runner: EngineRunner, damage: Damage) -> None:
        self._bundle, self._runner, self._damage = bundle, runner, damage

    def run(self, index: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        written = self._runner.run(index, inputs)
        for (graph, tensor), offset in self._damage.items():
            if self._bundle.graphs[index].name == graph:
                written[tensor] = written[tensor] + np.asarray(offset, written[tensor].dtype)
        return written

    def close(self) -> None:
        self._runner.close()


@pytest.fixture(scope="module")
def runner(toy: Bundle) -> Iterator[EngineRunner]:
    opened = open_runner(toy, get_backend("onnxruntime"), engines=None)
    yield opened
    opened.close()


def choice_of(
    bundle: Bundle,
    runner: EngineRunner,
    damage: Damage,
    *,
    ruled_out: Mapping[str, str] | None = None,
    is_fixed: bool = False,
) -> Choice:
    return choose(
        bundle,
        record_inputs(bundle.crops, num_frames=40),
        reference=runner,
        quantized=Damaged(bundle, runner, damage),
        ruled_out=ruled_out or {},
        is_fixed=is_fixed,
        on_step=lambda phase, fraction: None,
    )


def test_engines_that_say_the_same_all_stay(toy: Bundle, runner: EngineRunner) -> None:
    choice = choice_of(toy, runner, {})

    assert choice.float_graphs == {}
    assert choice.operating_points == toy.operating_points
    assert choice.agreement.box_iou == pytest.approx((1.0, 1.0, 1.0))
    assert choice.agreement.worst_exits == 1


def test_a_graph_that_does_harm_goes_back_to_float(toy: Bundle, runner: EngineRunner) -> None:
    choice = choice_of(toy, runner, {("segment_1", "bbox_cxcywh"): 0.1})

    assert list(choice.float_graphs) == ["segment_1"]
    assert "costs too much" in choice.float_graphs["segment_1"]
    assert choice.agreement.mean_box_iou == pytest.approx(1)


def test_harm_that_shows_behind_is_found_where_it_was_done(
    toy: Bundle, runner: EngineRunner
) -> None:
    # The exit of segment 0 does not read what its segment hands on.
    noise = np.random.default_rng(0).normal(0, 1, (1, 80, 8))

    choice = choice_of(toy, runner, {("segment_0", "tokens_0"): noise})

    assert list(choice.float_graphs) == ["segment_0"]


def test_all_graphs_that_do_harm_go_back(toy: Bundle, runner: EngineRunner) -> None:
    damage = {("segment_0", "bbox_cxcywh"): 0.1, ("segment_2", "bbox_cxcywh"): 0.2}

    assert list(choice_of(toy, runner, damage).float_graphs) == ["segment_0", "segment_2"]


def test_harm_within_the_budget_is_taken(toy: Bundle, runner: EngineRunner) -> None:
    choice = choice_of(toy, runner, {("segment_1", "bbox_cxcywh"): [0.005, 0, 0, 0]})

    assert choice.float_graphs == {}
    assert MIN_BOX_IOU < choice.agreement.mean_box_iou < 1


def test_a_shifted_entropy_is_met_by_thresholds_not_by_float(
    toy: Bundle, runner: EngineRunner
) -> None:
    choice = choice_of(toy, runner, {("segment_0", "uncertainty"): 0.05})

    assert choice.float_graphs == {}
    fitted = choice.operating_points["balanced"]
    assert fitted == pytest.approx((toy.operating_points["balanced"][0] + 0.05, 0.5))


def test_boxes_that_are_no_numbers_are_harm(toy: Bundle, runner: EngineRunner) -> None:
    choice = choice_of(toy, runner, {("segment_2", "bbox_cxcywh"): np.nan})

    assert list(choice.float_graphs) == ["segment_2"]


def test_what_is_fixed_stays_whatever_it_says(toy: Bundle, runner: EngineRunner) -> None:
    choice = choice_of(toy, runner, {("segment_1", "bbox_cxcywh"): 0.1}, is_fixed=True)

    assert choice.float_graphs == {}
    assert choice.agreement.excess > 0


def test_a_slower_graph_stays_in_float_and_is_not_asked(toy: Bundle, runner: EngineRunner) -> None:
    damage = {("segment_1", "bbox_cxcywh"): 0.1}

    choice = choice_of(toy, runner, damage, ruled_out={"segment_1": "INT8 is not faster"})

    assert choice.float_graphs == {"segment_1": "INT8 is not faster"}
    assert choice.agreement.mean_box_iou == 1


def test_harm_without_a_remedy_ends_in_float(toy: Bundle, runner: EngineRunner) -> None:
    damage = {(f"segment_{k}", "bbox_cxcywh"): 0.3 for k in range(3)}
    damage["template", "template_tokens"] = 5.0

    choice = choice_of(toy, runner, damage)

    assert set(choice.float_graphs) >= {f"segment_{k}" for k in range(3)}
    assert choice.agreement.excess == 0


def test_no_crops_are_refused(toy: Bundle, runner: EngineRunner) -> None:
    with pytest.raises(ValueError, match="expected crops to ask on, got none"):
        choose(
            toy,
            [],
            reference=runner,
            quantized=runner,
            ruled_out={},
            on_step=lambda phase, fraction: None,
        )
