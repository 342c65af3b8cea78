import math
import time

import numpy as np
import onnxruntime
import pytest
from recorded import record_inputs
from toy_bundle import NUM_SEGMENTS, SCORES, plain_search_region

from edgetrack.backends.engine import Buffers
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.bundle import ANSWER_NAMES, Bundle
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy


class ScriptedEngine:
    """An engine that answers as it is told, and notes what is done to it."""

    def __init__(self, name: str, notes: list[str], uncertainty: float = 0.0) -> None:
        self.name, self.notes, self.uncertainty = name, notes, uncertainty

    def bind(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def enqueue(self) -> None:
        self.notes.append(self.name)
        time.sleep(0.002)
        self.buffers["uncertainty"][0] = self.uncertainty

    def close(self) -> None:
        self.notes.append(f"close {self.name}")


def scripted_chain(toy: Bundle, uncertainties: tuple[float, ...]) -> tuple[Chain, list[str]]:
    notes: list[str] = []
    segments = [ScriptedEngine(str(k), notes, u) for k, u in enumerate(uncertainties)]
    return Chain(toy, [ScriptedEngine("template", notes), *segments]), notes


def real_chain(bundle: Bundle) -> Chain:
    backend = OnnxRuntimeBackend(num_threads=1)
    return Chain(bundle, [backend.load_onnx(bundle.graph_path(g), g) for g in bundle.graphs])


def put(chain: Chain, inputs: dict[str, np.ndarray]) -> None:
    for name in inputs.keys() & chain.buffers.keys():
        chain.buffers[name][...] = inputs[name]


def answer_of(chain: Chain) -> dict[str, np.ndarray]:
    return {name: chain.buffers[name].copy() for name in ANSWER_NAMES}


def last_answer(bundle: Bundle, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The last head's answer, from plain sessions with the backend's options."""
    state = dict(inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for graph in bundle.graphs:
        path = str(bundle.graph_path(graph))
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],
        )
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {i.name: state[i.name] for i in session.get_inputs()})
        state |= dict(zip(names, values, strict=True))
    return {name: state[name] for name in ANSWER_NAMES}


@pytest.mark.parametrize(
    ("uncertainties", "ran"),
    [
        ((0.4, 0.0, 0.0), ["0"]),
        ((0.5, 0.4, 0.0), ["0", "1"]),
        ((0.6, 0.5, 0.0), ["0", "1", "2"]),
        ((math.nan, math.nan, math.nan), ["0", "1", "2"]),
    ],
)
def test_segments_run_until_an_exitis_sure(
    toy: Bundle, uncertainties: tuple[float, ...], ran: list[str]
) -> None:
    chain, notes = scripted_chain(toy, uncertainties)

    exit_index = chain.run(ExitPolicy((0.5, 0.5)))

    assert notes == ran
    assert exit_index == len(ran) - 1


def test_the_template_is_run_on_its_own(toy: Bundle) -> None:
    chain, notes = scripted_chain(toy, (0.0, 0.0, 0.0))

    chain.run_template()

    assert notes == ["template"]


def test_times_are_of_the_segments_that_ran(toy: Bundle) -> None:
    chain, _ = scripted_chain(toy, (0.9, 0.1, 0.1))
    chain.run(ExitPolicy.always_last(num_exits=3))

    chain.run(ExitPolicy((0.5, 0.5)))

    assert np.isnan(chain.segment_ms).tolist() == [False, False, True]
    assert (chain.segment_ms[:2] >= 2).all()
    assert chain.run_ms >= chain.segment_ms[:2].sum()


def test_closing_closes_every_engine(toy: Bundle) -> None:
    chain, notes = scripted_chain(toy, (0.0, 0.0, 0.0))

    chain.close()

    assert sorted(notes) == ["close 0", "close 1", "close 2", "close template"]


@pytest.mark.parametrize("exit_index", range(NUM_SEGMENTS))
def test_the_answer_is_of_the_exit_that_was_taken(toy: Bundle, exit_index: int) -> None:
    uncertainties = [0.8] * NUM_SEGMENTS
    uncertainties[exit_index] = 0.2
    chain = real_chain(toy)
    chain.buffers["search_region"][...] = plain_search_region(uncertainties)
    chain.run_template()

    taken = chain.run(ExitPolicy((0.5, 0.5)))

    assert taken == exit_index
    assert chain.buffers["score"][0] == pytest.approx(SCORES[exit_index])
    assert chain.buffers["uncertainty"][0] == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("name", ["toy", "small_bundle", "shipped_bundle"])
def test_a_threshold_of_zero_gives_the_last_heads_answer_bit_for_bit(
    name: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    chain = real_chain(bundle)

    for inputs in record_inputs(bundle.crops):
        put(chain, inputs)
        chain.run_template()
        exit_index = chain.run(ExitPolicy.entropy(0.0, num_exits=bundle.num_exits))

        assert exit_index == bundle.num_exits - 1
        expected = last_answer(bundle, inputs)
        for answer, value in answer_of(chain).items():
            np.testing.assert_array_equal(value, expected[answer])


def mean_depths(bundle: Bundle) -> list[float]:
    """Mean exit over recorded crops, for thresholds from 0 to above 1."""
    chain, recorded = real_chain(bundle), record_inputs(bundle.crops, num_frames=12)
    seen = []
    for inputs in recorded:
        put(chain, inputs)
        chain.run_template()
        for index in range(bundle.num_exits - 1):
            chain.run(ExitPolicy.fixed(index, num_exits=bundle.num_exits))
            seen.append(float(chain.buffers["uncertainty"][0]))
    depths = []
    for threshold in (0.0, *np.quantile(seen, np.linspace(0.1, 0.9, 9)), 1.01):
        policy = ExitPolicy.entropy(float(threshold), num_exits=bundle.num_exits)
        taken = []
        for inputs in recorded:
            put(chain, inputs)
            chain.run_template()
            taken.append(chain.run(policy))
        depths.append(float(np.mean(taken)))
    return depths


@pytest.mark.parametrize(
    "name",
    [
        "toy",
        "small_bundle",
        "shipped_bundle",
        pytest.param("random_bundle", marks=pytest.mark.slow),
    ],
)
def test_on_recorded_crops_depth_falls_as_the_threshold_rises(
    name: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(name)

    depths = mean_depths(bundle)

    assert depths == sorted(depths, reverse=True)
    assert (depths[0], depths[-1]) == (bundle.num_exits - 1, 0)
    assert len(set(depths)) > 3  # it falls step by step
