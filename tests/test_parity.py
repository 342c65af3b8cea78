"""The same inputs through torch and through ONNX Runtime, graph by graph."""

import numpy as np
import pytest
import torch
from recorded import record_inputs
from tolerances import BETWEEN_BACKENDS

from edgetrack.backends.eager import EagerBackend
from edgetrack.backends.engine import Backend
from edgetrack.backends.ort import OnnxRuntimeBackend
from edgetrack.bundle import ANSWER_NAMES, Bundle
from edgetrack.models.registry import load_model
from edgetrack.runtime.buffers import allocate
from edgetrack.runtime.chain import Chain
from edgetrack.runtime.policies import ExitPolicy

BUNDLES = pytest.mark.parametrize(
    "bundle",
    ["small_bundle", "shipped_bundle", pytest.param("random_bundle", marks=pytest.mark.slow)],
    indirect=True,
)


@pytest.fixture
def bundle(request: pytest.FixtureRequest) -> Bundle:
    loaded: Bundle = request.getfixturevalue(request.param)
    return loaded


def chain_on(backend: Backend, bundle: Bundle) -> Chain:
    return Chain(bundle, [backend.load_onnx(bundle.graph_path(g), g) for g in bundle.graphs])


def exact_answers(bundle: Bundle, inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Answers of all exits from one forward pass of the author's model."""
    with torch.inference_mode():
        answers = load_model(bundle)(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    return [{name: value.numpy() for name, value in answer.items()} for answer in answers]


def chain_answers(
    chain: Chain, bundle: Bundle, inputs: dict[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Answers of all exits, each from a run that ends there."""
    for name in inputs.keys() & chain.buffers.keys():
        chain.buffers[name][...] = inputs[name]
    chain.run_template()
    answers = []
    for index in range(bundle.num_exits):
        chain.run(ExitPolicy.fixed(index, num_exits=bundle.num_exits))
        answers.append({name: chain.buffers[name].copy() for name in ANSWER_NAMES})
    return answers


@BUNDLES
def test_every_graph_computes_in_onnx_runtime_what_it_computes_in_torch(bundle: Bundle) -> None:
    tolerance = BETWEEN_BACKENDS["float32"]
    worst = dict.fromkeys([*ANSWER_NAMES, "tokens"], 0.0)
    sides = []
    for backend in (EagerBackend(), OnnxRuntimeBackend()):
        buffers = allocate(bundle)
        engines = [backend.load_onnx(bundle.graph_path(g), g) for g in bundle.graphs]
        for engine in engines:
            engine.bind(buffers)
        sides.append((engines, buffers))
    (eager, exact), (ort, got) = sides

    for inputs in record_inputs(bundle.crops):
        for name in inputs.keys() & exact.keys():
            exact[name][...] = inputs[name]
        for graph, eager_engine, ort_engine in zip(bundle.graphs, eager, ort, strict=True):
            for spec in graph.inputs:
                got[spec.name][...] = exact[spec.name]
            eager_engine.enqueue()
            ort_engine.enqueue()
            for spec in graph.outputs:
                kind = spec.name if spec.name in ANSWER_NAMES else "tokens"
                difference = float(np.abs(got[spec.name] - exact[spec.name]).max())
                worst[kind] = max(worst[kind], difference)

    assert {k: v for k, v in worst.items() if not v <= tolerance[k]} == {}


@BUNDLES
def test_the_chain_in_torch_equals_the_forward_pass_bit_for_bit(bundle: Bundle) -> None:
    inputs = record_inputs(bundle.crops, num_frames=1)[0]

    got = chain_answers(chain_on(EagerBackend(), bundle), bundle, inputs)

    for answer, expected in zip(got, exact_answers(bundle, inputs), strict=True):
        for name in ANSWER_NAMES:
            np.testing.assert_array_equal(answer[name], expected[name])


@BUNDLES
def test_the_chain_in_onnx_runtime_equals_the_forward_pass(bundle: Bundle) -> None:
    chain = chain_on(OnnxRuntimeBackend(), bundle)
    tolerance = BETWEEN_BACKENDS["float32"]

    for inputs in record_inputs(bundle.crops, seed=1):
        expected = exact_answers(bundle, inputs)
        for answer, other in zip(chain_answers(chain, bundle, inputs), expected, strict=True):
            for name in ANSWER_NAMES:
                np.testing.assert_allclose(answer[name], other[name], atol=tolerance[name], rtol=0)
