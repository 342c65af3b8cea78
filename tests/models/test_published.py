import importlib.util
import io
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from published_ostrack import ostrack_state_dict
from torch import Tensor
from torch.testing import assert_close

from edgetrack.errors import CheckpointError
from edgetrack.models.layers import Normalise, ShuffleStem
from edgetrack.models.ostrack import CONFIGS
from edgetrack.models.published import (
    PublishedCheckpoint,
    load_ostrack,
    load_shuffle_stem,
    read_checkpoint,
)

StateDict = dict[str, Tensor]
STEM_FILE = "shufflenetv2_x1_0_nanodet.npz"


def small_state_dict(*, template_tokens: int = 4, search_tokens: int = 16) -> StateDict:
    return ostrack_state_dict(
        dim=64,
        depth=10,
        template_tokens=template_tokens,
        search_tokens=search_tokens,
        head_dim=16,
    )


@pytest.mark.parametrize(
    "content",
    [
        lambda w: w,
        lambda w: {"net": w, "epoch": 300},
        lambda w: {"net": w, "stats": {"loss": np.float64(3)}, "device": torch.device("cuda:0")},
    ],
    ids=["bare", "training", "training with figures"],
)
def test_bare_weights_and_those_of_a_training_are_read(
    content: Callable[[StateDict], dict[str, Any]], tmp_path: Path
) -> None:
    weights = small_state_dict()
    torch.save(content(weights), tmp_path / "net.pth.tar")

    checkpoint = read_checkpoint(tmp_path / "net.pth.tar")

    assert checkpoint.weights.keys() == weights.keys()
    assert all(torch.equal(checkpoint.weights[k], weights[k]) for k in weights)
    assert checkpoint.settings == {}


class Settings:
    """Pickled under the name of OSTrack's own class, as its trainer does."""

    __module__ = "lib.train.admin.settings"
    __qualname__ = "Settings"

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"project_path": "train/ostrack/vitb_256_mae_ce_32x4_ep300",
                 "search_area_factor": {"template": 2.0, "search": 4.5}}  # fmt: skip
        return (Settings, (), state)


def save_with(settings: object, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, and settings under the name of OSTrack's own class, which only exists meanwhile."""
    module = ModuleType("lib.train.admin.settings")
    module.Settings = type(settings)  # type: ignore[attr-defined]  # a module of the test
    with monkeypatch.context() as patch:
        for name in ("lib", "lib.train", "lib.train.admin"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"net": small_state_dict(), "settings": settings}, path)


def test_settings_that_a_training_left_are_read_without_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with(Settings(), tmp_path / "net.pth.tar", monkeypatch)

    checkpoint = read_checkpoint(tmp_path / "net.pth.tar")
    model = load_ostrack(checkpoint)

    assert checkpoint.settings["search_area_factor"] == {"template": 2.0, "search": 4.5}
    assert model.config.eliminate_at == (3, 6, 9)
    assert model.config.search_factor == 4.5
    assert load_ostrack(checkpoint, is_eliminating=False, search_factor=3).config.eliminate_at == ()
    assert load_ostrack(checkpoint, search_factor=3).config.search_factor == 3


class BareSettings:
    """Pickled under the name of OSTrack's own class, without attributes."""

    __module__ = "lib.train.admin.settings"
    __qualname__ = "Settings"


def test_settings_without_attributes_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with(BareSettings(), tmp_path / "net.pth", monkeypatch)

    checkpoint = read_checkpoint(tmp_path / "net.pth")

    assert checkpoint.settings == {}
    assert load_ostrack(checkpoint).config.eliminate_at == ()


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise AssertionError('code of a checkpoint was run')",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.save({"net": Runs()}, p), r"got an object of '[\w.]*exec'; loading it"),
        (lambda p: p.write_bytes(pickle.dumps(Runs())), "expected .*, got a"),
        (lambda p: p.write_bytes(b""), "expected a checkpoint that torch.save wrote"),
        (lambda p: p.write_bytes(b"hello" * 99), "expected .*got a damaged or foreign file"),
        (lambda p: p.mkdir(), "expected a checkpoint that torch.save wrote"),
        (lambda p: torch.save({}, p), "under the key 'net', got nothing"),
        (lambda p: torch.save([1, 2], p), "under the key 'net', got a list"),
        (lambda p: torch.save({"net": 3}, p), "under the key 'net', got 'net'"),
        (
            lambda p: torch.save(dict.fromkeys(range(9), 1.0), p),
            "under the key 'net', got 0, 1, 2, 3 and 5 more",
        ),
    ],
    ids=[
        "code",
        "bare code",
        "empty",
        "text",
        "folder",
        "nothing",
        "list",
        "no weights",
        "numbers",
    ],
)
def test_a_file_without_weights_is_refused_and_nothing_is_run(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.pth"
    write(path)

    with pytest.raises(CheckpointError, match=rf"^{path}: .*{message}") as error:
        read_checkpoint(path)

    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"net": small_state_dict()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(CheckpointError, match=r"expected a checkpoint that torch\.save wrote"):
        read_checkpoint(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: expected a checkpoint"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("family", "search_px", "factor"),
    [
        ("ostrack", 256, 4.0),
        ("ostrack", 384, 5.0),
        ("ostrack", 192, 5.0),
        ("loretrack", 256, 5.0),
        ("loretrack", 128, 5.0),
        ("loretrack", 96, 5.0),
    ],
)
def test_sizes_are_read_off_the_weights(family: str, search_px: int, factor: float) -> None:
    side = search_px // 32
    weights = small_state_dict(template_tokens=side**2, search_tokens=4 * side**2)

    model = load_ostrack(PublishedCheckpoint(weights), family=family)

    assert model.family == family
    assert model.crops.template_size_px == search_px // 2
    assert model.crops.search_size_px == search_px
    assert model.crops.search_factor == factor
    assert model.crops.geometry == "ostrack"
    assert model.config.exit_after == (10,)
    assert model.config.eliminate_at == ()
    assert not model.training


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_architecture_is_recognised(name: str) -> None:
    config = CONFIGS[name]
    weights = ostrack_state_dict(
        dim=768,
        depth=12,
        template_tokens=(config.template_size_px // 16) ** 2,
        search_tokens=config.search_grid**2,
    )

    is_eliminating = bool(config.eliminate_at)
    model = load_ostrack(PublishedCheckpoint(weights), is_eliminating=is_eliminating)

    assert model.config == config
    unused = {"backbone.cls_token", "backbone.pos_embed"}
    ours = model.state_dict()
    assert ours.keys() == weights.keys() - unused
    assert all(torch.equal(ours[k], weights[k]) for k in ours)


def test_the_number_of_parameters_is_the_published_one() -> None:
    weights = ostrack_state_dict(dim=768, depth=12, template_tokens=64, search_tokens=256)

    def count(*prefixes: str) -> int:
        return sum(
            math.prod(v.shape)
            for k, v in load_ostrack(PublishedCheckpoint(weights)).named_parameters()
            if k.startswith(prefixes)
        )

    # 92.52 M, of which 768 + 197 * 768 are two embeddings that are never used.
    assert round(count("backbone.") / 1e6, 2) == 85.89
    assert round(count("box_head.") / 1e6, 2) == 6.47
    assert round((count("") + 768 + 197 * 768) / 1e6, 2) == 92.52


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("backbone.blocks.1.attn.qkv.bias"), "missing: .*blocks.1.attn.qkv.bias"),
        (lambda d: d.pop("backbone.pos_embed_x"), "got no backbone.pos_embed_x; got 'backbone"),
        (lambda d: d.pop("box_head.conv5_size.bias"), "missing: box_head.conv5_size.bias"),
        (lambda d: d.update({"backbone.extra": torch.ones(1)}), "unknown: backbone.extra"),
        (lambda d: d.update({"neck.weight": torch.ones(1)}), "unknown: neck.weight"),
        (
            lambda d: d.update({"backbone.norm.bias": torch.ones(5)}),
            r"other shape: backbone.norm.bias \(5,\) instead of \(64,\)",
        ),
        (
            lambda d: d.update({"backbone.pos_embed_z": torch.ones(1, 7, 64)}),
            r"backbone.pos_embed_z of \(1, n \* n, width\), got \(1, 7, 64\)",
        ),
        (
            lambda d: d.update({"backbone.patch_embed.proj.weight": torch.ones(64, 3, 14, 14)}),
            r"got \(64, 3, 14, 14\)",
        ),
        (lambda d: (d.clear(), d.update({"conv1.weight": torch.ones(1)})), "got 'conv1.weight'"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named(
    change: Callable[[StateDict], object], named: str
) -> None:
    published = small_state_dict()
    change(published)

    with pytest.raises(CheckpointError, match=f"^OSTrack checkpoint: expected .*{named}"):
        load_ostrack(PublishedCheckpoint(published))


def test_all_problems_of_a_state_dict_are_named_at_once() -> None:
    published = small_state_dict()
    published["neck.weight"] = torch.ones(1)
    del published["backbone.norm.weight"]

    with pytest.raises(CheckpointError, match=r"missing: backbone.norm.weight; unknown: neck"):
        load_ostrack(PublishedCheckpoint(published))


def test_a_loretrack_does_not_eliminate_candidates() -> None:
    with pytest.raises(CheckpointError, match=r"^LoReTrack checkpoint: expected no candidate"):
        load_ostrack(
            PublishedCheckpoint(small_state_dict()), family="loretrack", is_eliminating=True
        )


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


@pytest.mark.data
@torch.no_grad()
def test_the_stem_equals_its_reference_at_both_strides(pretrained: Path) -> None:
    reference_module = load_reference(pretrained)
    reference = reference_module.load(pretrained / STEM_FILE, last_stage=3)
    stem = ShuffleStem().eval()
    rgb = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)

    load_shuffle_stem(stem, pretrained / STEM_FILE)
    features = stem(Normalise()(rgb))

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
