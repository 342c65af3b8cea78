import itertools
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_models import PATCH, make_model
from torch import Tensor
from toy_bundle import write_toy_bundle

from edgetrack.bundle import Bundle, CropSpec
from edgetrack.errors import BundleError
from edgetrack.export import OPSET, export_bundle
from edgetrack.models.early_exit_vit import EarlyExitViTConfig
from edgetrack.models.registry import load_model
from edgetrack.models.segmented import SegmentedModel, State

BUNDLES = pytest.mark.parametrize(
    "bundle",
    ["small_bundle", "shipped_bundle", pytest.param("random_bundle", marks=pytest.mark.slow)],
    indirect=True,
)
MAX_BUNDLE_BYTES = 24_000_000


@pytest.fixture
def bundle(request: pytest.FixtureRequest) -> Bundle:
    loaded: Bundle = request.getfixturevalue(request.param)
    return loaded


class Plain(SegmentedModel):
    """The smallest model that meets the contract: one segment that answers a pixel's brightness.

    Args:
        fault: ``raises`` in its segment, or ``branches`` on the host.
    """

    family, paper, num_exits = "plain", "none", 1
    crops = CropSpec(template_size_px=8, template_factor=2, search_size_px=8, search_factor=4)

    def __init__(self, fault: str | None = None) -> None:
        super().__init__()
        self.fault = fault
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))

    @property
    def config_dict(self) -> dict[str, Any]:
        return {}

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        return {"template_tokens": template.float().mean((1, 2)) * self.scale}

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        return ("search_region", "template_tokens")

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        if self.fault == "raises":
            raise RuntimeError("no such operator")
        score = state["search_region"].float().mean((1, 2, 3)) * self.scale
        if self.fault == "branches":
            score = torch.cond(score.sum() > 0.5, lambda s: s * 2, lambda s: s + 1, (score,))
        bbox = state["template_tokens"].mean(1, keepdim=True).expand(1, 4) + 0.0
        return {"bbox_cxcywh": bbox, "score": score, "uncertainty": 1 - score}


class Remembering(Plain):
    """Two exits, a head for each, and a running mean of the target's brightness."""

    num_exits = 2
    has_heads = True
    update_inputs = ("template", "template_bbox_cxcywh", "brightness", "score", "side")
    carried = MappingProxyType({"brightness": "next_brightness"})

    def embed_template(self, template: Tensor, template_bbox_cxcywh: Tensor) -> State:
        return {"brightness": template.float().mean((1, 2)) * self.scale}

    def segment_inputs(self, index: int) -> tuple[str, ...]:
        return ("search_region", "brightness") if index == 0 else ("light",)

    def run_segment(self, index: int, state: Mapping[str, Tensor]) -> State:
        if index == 0:
            light = state["search_region"].float().mean((1, 2)) * self.scale
            score = (light - state["brightness"]).abs().mean(1)
            return {"light": light, "score": score, "uncertainty": 1 - score}
        score = state["light"].mean(1) * self.scale
        return {"score": score, "uncertainty": 1 - score}

    def head_inputs(self, index: int) -> tuple[str, ...]:
        return ("light",)

    def run_head(self, index: int, state: Mapping[str, Tensor]) -> State:
        side = state["light"].mean(1, keepdim=True) * (index + 1)
        return {"bbox_cxcywh": side.expand(-1, 4) + 0.0, "side": side}

    def run_update(self, state: Mapping[str, Tensor]) -> State:
        found = state["template"].float().mean((1, 2)) * self.scale
        found = found * state["template_bbox_cxcywh"][:, 2:3] + state["side"]
        is_sure = (state["score"] > 0.1)[:, None]
        return {"next_brightness": torch.where(is_sure, found, state["brightness"])}


def export_plain(folder: Path, *, fault: str | None = None) -> Bundle:
    return export_bundle(
        Plain(fault),
        folder,
        name="plain",
        operating_points={"balanced": ()},
        operating_point="balanced",
        provenance={"recipe": {"seed": 3}},
        licence="ours",
    )


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_plain(tmp_path_factory.mktemp("plain"))


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def block_macs(tokens: int, *, dim: int, mlp_ratio: float) -> int:
    """Projections, both attention products, MLP."""
    return tokens * dim * int((4 + 2 * mlp_ratio) * dim) + 2 * tokens * tokens * dim


def head_macs(config: EarlyExitViTConfig, cells: int, *widths: int) -> int:
    """Both towers of 3x3 convolutions, then score and edges."""
    towers = sum(9 * a * b for a, b in itertools.pairwise(widths))
    return cells * (2 * towers + widths[-1] * (1 + 4 * config.num_bins))


def test_a_bundle_says_what_it_was_given(plain_bundle: Bundle) -> None:
    names = (plain_bundle.name, plain_bundle.family, plain_bundle.licence)

    assert names == ("plain", "plain", "ours")
    assert plain_bundle.provenance == {"recipe": {"seed": 3}}
    assert sorted(plain_bundle.files) == ["segment_0.onnx", "template.onnx", "weights.safetensors"]
    assert Bundle.load(plain_bundle.path) == plain_bundle


def test_what_a_graph_does_not_read_is_no_input(plain_bundle: Bundle) -> None:
    assert [spec.name for spec in plain_bundle.template.inputs] == ["template"]


def test_heads_and_the_update_are_graphs_of_their_own(tmp_path: Path) -> None:
    model = Remembering().eval()
    bundle = export_bundle(
        model,
        tmp_path / "bundle",
        name="remembering",
        operating_points={"balanced": (0.5,)},
        operating_point="balanced",
        provenance={},
        licence="ours",
    )

    state: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(0)
    for name in ("template", "search_region"):
        state[name] = generator.integers(0, 256, (1, 8, 8, 3), np.uint8)
    state["template_bbox_cxcywh"] = np.array([[0.5, 0.5, 0.4, 0.4]], np.float32)
    answers = model(**{name: torch.from_numpy(value) for name, value in state.items()})
    exits = iter(answers)
    for graph in bundle.graphs_in_turn:
        session = onnxruntime.InferenceSession(bundle.graph_path(graph))
        names = [output.name for output in session.get_outputs()]
        written = session.run(names, {i.name: state[i.name] for i in session.get_inputs()})
        state |= dict(zip(names, written, strict=True))
        if graph.name.startswith("head"):
            for name, expected in next(exits).items():
                np.testing.assert_allclose(state[name], expected.detach().numpy(), atol=1e-6)
    torch_state = {name: torch.from_numpy(value) for name, value in state.items()}
    expected = model.run_update(torch_state)["next_brightness"].detach().numpy()
    np.testing.assert_allclose(state["next_brightness"], expected, atol=1e-6)
    assert [g.name for g in bundle.heads] == ["head_0", "head_1"]
    assert bundle.update is not None
    assert [s.name for s in bundle.update.inputs] == list(Remembering.update_inputs)
    assert bundle.carried == Remembering.carried


@BUNDLES
def test_graphs_and_manifest_agree_and_shapes_are_static(bundle: Bundle) -> None:
    for graph in bundle.graphs:
        proto = onnx.load(bundle.graph_path(graph))
        for specs, values in (
            (graph.inputs, proto.graph.input),
            (graph.outputs, proto.graph.output),
        ):
            found = [
                (
                    value.name,
                    onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                    tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
                )
                for value in values
            ]
            assert found == [(spec.name, spec.dtype, spec.shape) for spec in specs]


@BUNDLES
def test_graphs_hold_nothing_that_engines_cannot(bundle: Bundle) -> None:
    for graph in bundle.graphs:
        proto = onnx.load(bundle.graph_path(graph))
        operators = {node.op_type for node in proto.graph.node}
        assert operators.isdisjoint({"If", "Loop", "Scan", "NonZero", "Unique", "Shape"})
        assert {node.domain for node in proto.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
        assert len(proto.functions) == 0


@BUNDLES
def test_graphs_take_the_image_straight_into_a_cast(bundle: Bundle) -> None:
    """TensorRT takes a uint8 input only so."""
    for graph in bundle.graphs[:2]:
        images = [spec.name for spec in graph.inputs if spec.dtype == "uint8"]
        nodes = onnx.load(bundle.graph_path(graph)).graph.node
        readers = [node.op_type for node in nodes if images[0] in node.input]
        assert readers == ["Cast"]


@BUNDLES
def test_graphs_tell_nothing_of_the_machine_that_made_them(bundle: Bundle) -> None:
    for graph in bundle.graphs:
        proto = onnx.load(bundle.graph_path(graph))
        parts = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
        parts += [*proto.graph.node, *proto.graph.initializer, proto.graph, proto]
        assert not any(part.metadata_props or part.doc_string for part in parts)
        for tensor in proto.graph.initializer:
            tensor.ClearField("raw_data")
        text = proto.SerializeToString()
        for path in (Path.cwd(), Path.home(), Path(sys.prefix), bundle.path, "site-packages"):
            assert str(path).encode() not in text
        assert b".py" not in text


def test_the_weights_in_a_bundle_are_the_models(small_bundle: Bundle) -> None:
    model = load_model(small_bundle)

    expected = make_model(PATCH).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_every_user_may_read_a_bundle(small_bundle: Bundle) -> None:
    assert small_bundle.path.stat().st_mode & stat.S_IXOTH
    for file in small_bundle.path.iterdir():
        assert file.stat().st_mode & stat.S_IROTH, file.name


def test_the_bundle_that_ships_fits_into_the_repository(shipped_bundle: Bundle) -> None:
    size_bytes = sum(file.stat().st_size for file in shipped_bundle.path.iterdir())

    assert size_bytes <= MAX_BUNDLE_BYTES


def test_multiply_accumulates_equal_the_closed_form(small_bundle: Bundle) -> None:
    dim, narrow, template, search = PATCH.dim, PATCH.bypass_dim, 4, 16
    tokens = template + search
    patches = 3 * 16 * 16 * dim
    block = block_macs(tokens, dim=dim, mlp_ratio=2.0)
    bypass = tokens * dim * narrow + block_macs(tokens, dim=narrow, mlp_ratio=2.0)
    bypass += search * 9 * narrow

    assert [graph.macs for graph in small_bundle.graphs] == [
        template * patches,
        search * patches + block + bypass + head_macs(PATCH, search, narrow, 16),
        block + head_macs(PATCH, search, dim, 16),
    ]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("raises", RuntimeError, "no such operator"),
        ("branches", BundleError, r"^segment_0\.onnx: expected static shapes .* got \['If'\]"),
    ],
)
def test_a_failed_export_leaves_the_old_bundle(
    tmp_path: Path, fault: str, error: type[Exception], message: str
) -> None:
    folder = write_toy_bundle(tmp_path / "bundle").path
    before = bytes_in(folder)

    with pytest.raises(error, match=message):
        export_plain(folder, fault=fault)

    assert bytes_in(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_an_export_replaces_the_old_bundle(tmp_path: Path) -> None:
    folder = write_toy_bundle(tmp_path / "bundle").path

    export_plain(folder)

    assert Bundle.load(folder).name == "plain"
    assert not (folder / "segment_1.onnx").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_an_export_does_not_replace_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(BundleError, match="expected a new folder or a bundle to replace"):
        export_plain(tmp_path)

    assert (tmp_path / "thesis.tex").read_text() == "years of work"
