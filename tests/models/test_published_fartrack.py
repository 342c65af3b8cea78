"""Published FARTrack weights: what they are mapped to, and what they say."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from published_fartrack import (
    StateDict,
    chosen_templates,
    fartrack_box,
    fartrack_logits,
    fartrack_state_dict,
)
from published_ostrack import clip_box, map_box_back, sample_target
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.errors import CheckpointError
from edgetrack.export import export_bundle
from edgetrack.models.fartrack import CONFIGS, FARTrack
from edgetrack.models.published import PublishedCheckpoint, load_fartrack
from edgetrack.models.segmented import State
from edgetrack.tracker import Tracker

TOLERANCE = FROM_TWIN["float32"]
RELEASES = pytest.mark.parametrize("is_sparse", [False, True], ids=["distilled", "sparse"])


def small_state_dict(*, is_sparse: bool = True) -> StateDict:
    return fartrack_state_dict(
        dim=64,
        is_sparse=is_sparse,
        num_blocks=3,
        num_extensions=2,
        template_tokens=9,
        search_tokens=36,
        bins=40,
    )


def load(weights: StateDict) -> FARTrack:
    return load_fartrack(PublishedCheckpoint(weights))


def images(model: FARTrack) -> tuple[Tensor, Tensor]:
    """Templates ``(2, 5, H, H, 3)`` and search regions ``(2, S, S, 3)``, all of them different."""
    template, search = model.crops.template_size_px, model.crops.search_size_px
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randint(0, 256, (2, 5, template, template, 3), generator=generator).byte(),
        torch.randint(0, 256, (2, search, search, 3), generator=generator).byte(),
    )


@torch.no_grad()
def state_of(model: FARTrack, templates: Tensor, search_region: Tensor) -> State:
    bboxes = torch.tensor([0.5, 0.5, 0.5, 0.5]).expand(*templates.shape[:2], 4)
    state = model.embed_templates(templates, bboxes, is_sparse=True)
    return state | {"search_region": search_region}


@torch.no_grad()
def kept_cells(model: FARTrack, templates: Tensor) -> list[list[list[int]]]:
    """Sample → template → cells that the model keeps."""
    tokens = model.backbone.embed(templates.flatten(0, 1)) + model.backbone.pos_embed_z
    rows: list[list[list[int]]] = (
        model.kept_cells(tokens).reshape(*templates.shape[:2], -1).tolist()
    )
    return rows


def assert_equals_the_slow_twin(weights: StateDict, depths: Sequence[int]) -> None:
    model = load(weights)
    templates, search_region = images(model)
    kept = kept_cells(model, templates)
    state = state_of(model, templates, search_region)
    is_sparse = model.config.retention < 1
    for depth in depths:
        expected = torch.cat(
            [
                fartrack_logits(
                    weights,
                    templates[sample : sample + 1],
                    search_region[sample : sample + 1],
                    num_layers=depth,
                    kept=kept[sample] if is_sparse else None,
                )
                for sample in range(2)
            ]
        )
        cut = model.cut(exit_after=(depth,))
        with torch.no_grad():
            (logits,) = cut.logits_at([depth], state)
            answer = cut.run_segment(0, state)

        assert_close(logits, expected.float(), atol=TOLERANCE, rtol=TOLERANCE)
        boxes = torch.tensor([fartrack_box(one) for one in expected])
        boxes[:, 2:].clamp_(min=1e-3)
        assert_close(answer["bbox_cxcywh"], boxes, atol=TOLERANCE, rtol=0)
        assert expected.std(-1).min() > 0.1  # logits that are all the same would show nothing


@RELEASES
def test_published_weights_say_what_the_released_code_says(is_sparse: bool) -> None:
    assert_equals_the_slow_twin(small_state_dict(is_sparse=is_sparse), depths=(5, 4, 3))


@pytest.mark.slow
@RELEASES
def test_published_weights_of_full_size_say_what_the_released_code_says(is_sparse: bool) -> None:
    """Tiny, Nano and Pico: 15, 10 and 6 layers of one checkpoint."""
    weights = fartrack_state_dict(dim=192, is_sparse=is_sparse)

    assert_equals_the_slow_twin(weights, depths=(15, 10, 6))


def test_the_norms_of_the_masked_pass_are_the_ones_that_count() -> None:
    weights = small_state_dict()
    changed = {k: v + 1 if ".norm1." in k else v for k, v in weights.items()}

    for name, value in load(changed).state_dict().items():
        assert torch.equal(value, load(weights).state_dict()[name]), name


@RELEASES
def test_the_published_architecture_is_recognised(is_sparse: bool) -> None:
    weights = fartrack_state_dict(dim=192, is_sparse=is_sparse)

    model = load(weights)

    released = {"geometry": "ostrack"} | ({"norm_eps": 1e-5} if is_sparse else {"retention": 1.0})
    assert vars(model.config) == vars(CONFIGS["tiny"]) | released
    assert model.crops.geometry == "ostrack"
    assert not model.training
    for variant in ("nano", "pico"):
        depth = CONFIGS[variant].exit_after
        assert vars(model.cut(exit_after=depth).config) == vars(CONFIGS[variant]) | released


def test_command_words_are_as_long_as_the_sparse_release_lets_them_be() -> None:
    sparse = load(small_state_dict()).vocabulary.word_embeddings[-5:]
    dense = load(small_state_dict(is_sparse=False)).vocabulary.word_embeddings[-5:]

    assert_close(sparse[:4].norm(dim=1), torch.ones(4))
    assert sparse[4].norm() > 1.1
    assert (dense.norm(dim=1) > 1.1).all()


def test_a_search_factor_that_the_training_left_is_kept() -> None:
    settings = {"search_area_factor": {"template": 2.0, "search": 4.5}}
    checkpoint = PublishedCheckpoint(small_state_dict(), settings)

    assert load_fartrack(checkpoint).crops.search_factor == 4.5
    assert load_fartrack(checkpoint, search_factor=3).crops.search_factor == 3
    assert load(small_state_dict()).crops.search_factor == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("identity"), "got no identity; got 'backbone"),
        (lambda d: d.pop("backbone.word_embeddings.weight"), "no backbone.word_embeddings.weight"),
        (lambda d: d.pop("backbone.output_bias"), "missing: backbone.output_bias"),
        (
            lambda d: d.pop("backbone.extension.1.masknorm2.norm.bias"),
            "missing: backbone.extension.1.masknorm2.norm.bias",
        ),
        (lambda d: d.update({"head.weight": torch.ones(1)}), "unknown: head.weight"),
        (
            lambda d: d.update({"backbone.position_embeddings.weight": torch.ones(5, 64)}),
            r"other shape: backbone.position_embeddings.weight \(5, 64\) instead of \(4, 64\)",
        ),
        (
            lambda d: d.update({"identity": torch.ones(6, 64)}),
            r"identity of \(1, slots \+ 1, width\) .* got \(6, 64\)",
        ),
        (
            lambda d: d.update({"backbone.pos_embed_z0": torch.ones(1, 7, 64)}),
            r"backbone.pos_embed_z0 of \(1, n \* n, width\), got \(1, 7, 64\)",
        ),
        (
            lambda d: [d.pop(name) for name in list(d) if "masknorm" in name],
            "got backbone.prev_position_embeddings.weight without .* FARTrackSeq's",
        ),
        (
            lambda d: d.update({"backbone.patch_embed.proj.weight": torch.ones(0, 3, 16, 16)}),
            r"got \(0, 3, 16, 16\) and",
        ),
        (
            lambda d: d.update({"backbone.patch_embed.proj.weight": torch.tensor(1.0)}),
            r"got \(\) and",
        ),
        (
            lambda d: d.update({"identity": torch.ones(1, 1, 64)}),
            "got shapes that cannot be: num_templates: expected at least 1",
        ),
        (lambda d: (d.clear(), d.update({"conv1.weight": torch.ones(1)})), "got 'conv1.weight'"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named(
    change: Callable[[StateDict], object], named: str
) -> None:
    weights = small_state_dict()
    change(weights)

    with pytest.raises(CheckpointError, match=f"^FARTrack checkpoint: expected .*{named}"):
        load(weights)


def track_slowly(
    weights: StateDict, frames: list[np.ndarray], bbox: list[float], *, sizes_px: tuple[int, int]
) -> list[list[float]]:
    """The released closed loop, written out: RGB frames, plain Python numbers, all templates."""

    def crop(frame: np.ndarray, box: list[float], factor: float, size: int) -> tuple[Tensor, float]:
        pixels, resize_factor = sample_target(frame, box, factor=factor, size_px=size)
        return torch.from_numpy(np.ascontiguousarray(pixels)), resize_factor

    template_px, search_px = sizes_px
    rgb = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    templates = [crop(rgb[0], bbox, 2.0, template_px)[0]]
    state, track = list(bbox), []
    for frame in rgb[1:]:
        search, resize_factor = crop(frame, state, 4.0, search_px)
        slots = torch.stack([templates[k] for k in chosen_templates(len(templates))])
        logits = fartrack_logits(weights, slots[None], search[None], num_layers=5)
        back = map_box_back(
            fartrack_box(logits[0]), state, size_px=search_px, resize_factor=resize_factor
        )
        state = clip_box(back, height=frame.shape[0], width=frame.shape[1])
        templates.append(crop(frame, state, 2.0, template_px)[0])
        track.append(state)
    return track


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(
        load(small_state_dict()).cut(retention=1.0),
        tmp_path_factory.mktemp("fartrack") / "bundle",
        name="fartrack-small",
        operating_points={"balanced": ()},
        operating_point="balanced",
        provenance={},
        licence="random weights",
    )


@pytest.mark.parametrize("start", [(60.0, 50.0, 40.0, 30.0), (205.5, 150.25, 30.0, 24.0)])
def test_the_closed_loop_is_the_released_one(
    bundle: Bundle, start: tuple[float, float, float, float]
) -> None:
    """With all tokens, and as many frames as the bank remembers; windows leave the frame."""
    frames = [frame for frame, _ in render_clip(num_frames=12, width=240, height=180, seed=3)]

    with Tracker(bundle, backend="onnxruntime") as tracker:
        tracker.init(frames[0], start)
        track = [tracker.update(frame).bbox for frame in frames[1:]]

    sizes_px = (bundle.crops.template_size_px, bundle.crops.search_size_px)
    expected = track_slowly(small_state_dict(), frames, list(start), sizes_px=sizes_px)
    assert_allclose(track, expected, atol=1e-2)
