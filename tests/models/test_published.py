import dataclasses
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from small_models import PATCH, make_inputs
from torch import Tensor
from torch.testing import assert_close

from edgetrack.errors import CheckpointError
from edgetrack.models.early_exit_vit import Backbone, EarlyExitViT
from edgetrack.models.layers import ShuffleStem, normalise
from edgetrack.models.published import load_ostrack_trunk, load_shuffle_stem
from edgetrack.models.registry import create_model

StateDict = dict[str, Tensor]
SMALL = dataclasses.replace(PATCH, mlp_ratio=4.0)
STEM_FILE = "shufflenetv2_x1_0_nanodet.npz"


def ostrack_state_dict(
    *, dim: int, depth: int, template_tokens: int, search_tokens: int
) -> StateDict:
    """Random weights under the names of a published OSTrack checkpoint, CENTER head included."""
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.cls_token": (1, 1, dim),
        "backbone.pos_embed": (1, 197, dim),
        "backbone.pos_embed_z": (1, template_tokens, dim),
        "backbone.pos_embed_x": (1, search_tokens, dim),
        "backbone.patch_embed.proj.weight": (dim, 3, 16, 16),
        "backbone.patch_embed.proj.bias": (dim,),
        "backbone.norm.weight": (dim,),
        "backbone.norm.bias": (dim,),
    }
    hidden = 4 * dim
    for index in range(depth):
        block = f"backbone.blocks.{index}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", hidden, dim),
            ("mlp.fc2", dim, hidden),
        ):
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    for tower, outputs in (("ctr", 1), ("offset", 2), ("size", 2)):
        widths = (dim, 256, 128, 64, 32)
        for layer in range(1, 5):
            conv, norm = f"box_head.conv{layer}_{tower}.0", f"box_head.conv{layer}_{tower}.1"
            shapes[f"{conv}.weight"] = (widths[layer], widths[layer - 1], 3, 3)
            shapes[f"{conv}.bias"] = (widths[layer],)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{norm}.{name}"] = (widths[layer],)
            shapes[f"{norm}.num_batches_tracked"] = ()
        shapes[f"box_head.conv5_{tower}.weight"] = (outputs, 32, 1, 1)
        shapes[f"box_head.conv5_{tower}.bias"] = (outputs,)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ostrack_search_tokens(weights: StateDict, template: Tensor, search_region: Tensor) -> Tensor:
    """OSTrack's trunk as a function of its published weights: normalised pixels to tokens."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"backbone.{name}.weight"], weights[f"backbone.{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"backbone.{name}.weight"], weights[f"backbone.{name}.bias"]
        return F.layer_norm(x, scale.shape, scale, shift, eps=1e-6)

    def embed(pixels: Tensor, position: str) -> Tensor:
        proj = "backbone.patch_embed.proj"
        grid = F.conv2d(pixels, weights[f"{proj}.weight"], weights[f"{proj}.bias"], stride=16)
        return grid.flatten(2).transpose(1, 2) + weights[f"backbone.{position}"]

    x = torch.cat([embed(template, "pos_embed_z"), embed(search_region, "pos_embed_x")], 1)
    heads = SMALL.num_heads
    for index in range(SMALL.exit_after[-1]):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights_of_tokens = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        mixed = (weights_of_tokens @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, weights["backbone.pos_embed_z"].shape[1] :]


def small_state_dict() -> StateDict:
    weights = ostrack_state_dict(dim=SMALL.dim, depth=2, template_tokens=4, search_tokens=16)
    return {name: value * 0.3 for name, value in weights.items()}


def small_trunk() -> Backbone:
    torch.manual_seed(1)
    return EarlyExitViT(SMALL).backbone


def load_reference(folder: Path) -> ModuleType:
    """The stem's reference module, which lies beside its weights."""
    spec = importlib.util.spec_from_file_location("shufflenetv2", folder / "shufflenetv2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stem_arrays() -> dict[str, np.ndarray]:
    torch.manual_seed(2)
    weights = {name: value.numpy().copy() for name, value in ShuffleStem().state_dict().items()}
    weights["stage4.0.branch1.dw.weight"] = np.zeros(3)  # deeper layers have no place in the stem
    return weights


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    return path


def test_a_published_state_dict_loads_into_base_unchanged() -> None:
    model = create_model("early_exit_vit-base")
    assert isinstance(model, EarlyExitViT)
    published = ostrack_state_dict(dim=768, depth=12, template_tokens=64, search_tokens=256)

    load_ostrack_trunk(model.backbone, published)

    ours = model.backbone.state_dict()
    trunk = {k.removeprefix("backbone.") for k in published if k.startswith("backbone.")}
    assert ours.keys() == trunk - {"cls_token", "pos_embed"}
    assert all(torch.equal(ours[name], published[f"backbone.{name}"]) for name in ours)
    # OSTrack-256's backbone, with the two embeddings that it keeps but does not use.
    assert sum(v.numel() for v in ours.values()) + 768 + 197 * 768 == 86_044_416


@torch.no_grad()
def test_a_trunk_with_published_weights_computes_what_ostrack_does() -> None:
    torch.manual_seed(1)
    model = EarlyExitViT(SMALL).eval()
    published = small_state_dict()
    inputs = make_inputs(SMALL)

    load_ostrack_trunk(model.backbone, published)
    state = model.embed_template(inputs["template"], inputs["template_bbox_cxcywh"])
    state["search_region"] = inputs["search_region"]
    for index in range(model.num_exits):
        state |= model.run_trunk(index, state)
    tokens = model.backbone.norm(state["tokens_1"])[:, -16:]

    pixels = [normalise(inputs[name]) for name in ("template", "search_region")]
    assert_close(tokens, ostrack_search_tokens(published, *pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("backbone.blocks.1.attn.qkv.bias"), "missing: .*blocks.1.attn.qkv.bias"),
        (lambda d: d.pop("backbone.pos_embed_x"), "missing: backbone.pos_embed_x"),
        (lambda d: d.update({"backbone.extra": torch.ones(1)}), "unknown: backbone.extra"),
        (lambda d: d.update({"neck.weight": torch.ones(1)}), "unknown: neck.weight"),
        (
            lambda d: d.update({"backbone.norm.bias": torch.ones(5)}),
            r"other shape: backbone.norm.bias \(5,\) instead of \(32,\)",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named_and_nothing_is_loaded(
    change: Callable[[StateDict], object], named: str
) -> None:
    trunk, published = small_trunk(), small_state_dict()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    change(published)

    with pytest.raises(CheckpointError, match=f"^OSTrack checkpoint: expected .*{named}"):
        load_ostrack_trunk(trunk, published)

    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


def test_all_problems_of_a_state_dict_are_named_at_once() -> None:
    published = small_state_dict()
    published["neck.weight"] = torch.ones(1)
    del published["backbone.norm.weight"]

    with pytest.raises(CheckpointError, match=r"missing: backbone.norm.weight; unknown: neck"):
        load_ostrack_trunk(small_trunk(), published)


@pytest.mark.data
@torch.no_grad()
def test_the_stem_equals_its_reference_at_both_strides(pretrained: Path) -> None:
    reference_module = load_reference(pretrained)
    reference = reference_module.load(pretrained / STEM_FILE, last_stage=3)
    stem = ShuffleStem().eval()
    rgb = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)

    load_shuffle_stem(stem, pretrained / STEM_FILE)
    features = stem(normalise(rgb))

    bgr = rgb.flip(-1).float() - torch.tensor(reference_module.MEAN_BGR)
    bgr = (bgr / torch.tensor(reference_module.STD_BGR)).permute(0, 3, 1, 2)
    for ours, expected in zip(features, reference(bgr), strict=True):
        assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_stem_is_loaded_with_its_input_channels_turned_round(tmp_path: Path) -> None:
    arrays, stem = stem_arrays(), ShuffleStem()

    load_shuffle_stem(stem, write_npz(tmp_path / "stem.npz", arrays))

    for name, value in stem.state_dict().items():
        expected = arrays[name][:, ::-1] if name == "stem.conv.weight" else arrays[name]
        assert np.array_equal(value.numpy(), expected), name


@pytest.mark.parametrize("fault", ["missing", "other shape"])
def test_a_stem_of_another_network_is_named_and_nothing_is_loaded(
    fault: str, tmp_path: Path
) -> None:
    arrays, stem = stem_arrays(), ShuffleStem()
    before = {name: value.clone() for name, value in stem.state_dict().items()}
    if fault == "missing":
        del arrays["stage3.7.branch2.pw2.bias"]
    else:
        arrays["stage3.7.branch2.pw2.bias"] = np.zeros(7, np.float32)

    with pytest.raises(CheckpointError, match=r"expected ShuffleNetV2.*stage3\.7\.branch2\.pw2"):
        load_shuffle_stem(stem, write_npz(tmp_path / "stem.npz", arrays))

    assert all(torch.equal(value, before[name]) for name, value in stem.state_dict().items())


def npy_bytes() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def half_an_npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **stem_arrays())  # type: ignore[arg-type]  # its stub takes names for options
    return stream.getvalue()[:5000]


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", npy_bytes(), half_an_npz()],
    ids=["empty", "text", "npy", "half a file"],
)
def test_a_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stem.npz"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"stem\.npz: expected an \.npz of ShuffleNetV2"):
        load_shuffle_stem(ShuffleStem(), path)


def test_a_missing_stem_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.npz: expected an \.npz of ShuffleNetV2"):
        load_shuffle_stem(ShuffleStem(), tmp_path / "nowhere.npz")
