"""``edgetrack import`` from end to end, on files of published names and shapes."""

import re
from pathlib import Path

import cv2
import pytest
import torch
from command_line import edgetrack, edgetrack_here
from published_fartrack import fartrack_state_dict
from published_ostrack import ostrack_state_dict

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.models.registry import create_model, load_fitting_weights, load_model

StateDict = dict[str, torch.Tensor]


def small_state_dict(search_px: int, *, depth: int = 10) -> StateDict:
    """Ten blocks are the fewest in which candidates can be eliminated as published."""
    side = search_px // 32
    return ostrack_state_dict(
        dim=64, depth=depth, template_tokens=side**2, search_tokens=4 * side**2, head_dim=16
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("import")
    weights = small_state_dict(128)
    torch.save({"net": weights, "epoch": 300, "net_type": "OSTrack"}, folder / "net.pth.tar")
    return folder


@pytest.fixture(scope="module")
def mine(home: Path) -> Path:
    """A bundle that was made of it."""
    done = edgetrack(
        "import", "net.pth.tar", "--family", "ostrack", "--candidate-elimination",
        "--output", "mine", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 blocks of width 64, template 64 px, search region 128 px" in done.stdout
    assert "factor 5, candidate elimination on" in done.stdout
    return home / "mine"


@pytest.mark.slow
def test_the_bundle_holds_the_weights_unchanged_and_says_where_they_come_from(mine: Path) -> None:
    bundle = Bundle.load(mine)
    weights = small_state_dict(128)

    model = load_model(bundle)

    assert (bundle.name, bundle.family) == ("ostrack-128-ce", "ostrack")
    assert bundle.provenance["imported"]["file"] == "net.pth.tar"
    assert "imported checkpoint's" in bundle.licence
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_the_bundle_tracks_a_rendered_clip(home: Path, mine: Path) -> None:
    frames = list(render_clip(num_frames=6, width=240, height=180, seed=3))
    (home / "clip").mkdir()
    for index, (frame, _) in enumerate(frames):
        cv2.imwrite(str(home / "clip" / f"{index:03d}.png"), frame)
    bbox = ",".join(f"{v:.1f}" for v in frames[0][1])

    done = edgetrack(
        "track", "clip", "--bundle", mine, "--bbox", bbox, "--results", "track.csv", cwd=home
    )

    assert done.returncode == 0, done.stderr
    assert len((home / "track.csv").read_text().splitlines()) == 1 + len(frames)


@pytest.mark.slow
@pytest.mark.parametrize("search_px", [128, 96])
def test_a_loretrack_is_imported_at_its_own_size(home: Path, search_px: int) -> None:
    torch.save(small_state_dict(search_px, depth=2), home / f"low_{search_px}.pth")

    done = edgetrack_here("import", f"low_{search_px}.pth", "--family", "loretrack", cwd=home)

    assert done.returncode == 0, done.stderr
    bundle = Bundle.load(home / f"loretrack-{search_px}")
    assert bundle.family == "loretrack"
    assert bundle.crops.search_size_px == search_px
    assert bundle.crops.search_factor == 5.0
    assert load_model(bundle).family == "loretrack"


@pytest.mark.slow
def test_a_fartrack_is_imported_at_the_depths_and_retention_that_are_asked_for(home: Path) -> None:
    weights = fartrack_state_dict(
        dim=64, is_sparse=True, num_blocks=3, num_extensions=2, template_tokens=9,
        search_tokens=36, bins=40,
    )  # fmt: skip
    torch.save({"net": weights, "epoch": 15, "net_type": "FARTrackSparse"}, home / "sparse.pth.tar")

    done = edgetrack(
        "import", "sparse.pth.tar", "--family", "fartrack", "--exits", "3,5", "--retention", "0.5",
        cwd=home,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "5 blocks of width 64, template 48 px, search region 96 px at factor 4" in done.stdout
    assert "5 templates of 5 tokens each, exits behind 3, 5" in done.stdout
    assert "--exit-policy and --threshold" in done.stdout
    bundle = Bundle.load(home / "fartrack-96-3-5-r50")
    assert (bundle.num_exits, bundle.crops.geometry) == (2, "ostrack")
    assert load_model(bundle).config.norm_eps == 1e-5


@pytest.mark.slow
def test_an_imported_trunk_starts_an_early_exit_model(mine: Path) -> None:
    config = {
        **create_model("early_exit_vit-base").config_dict,
        "template_size_px": 64, "search_size_px": 128, "dim": 64, "num_heads": 1,
        "exit_after": (3, 6, 10),
    }  # fmt: skip
    model = create_model("early_exit_vit-base", config)
    weights = small_state_dict(128)

    kept = load_fitting_weights(model, Bundle.load(mine))

    assert all(name.startswith("exits.") for name in kept)
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("net.pth.tar", "--family", "siamfc"), 2, "expected one of .*ostrack, got 'siamfc'"),
        (("none.pth", "--family", "ostrack"), 1, "none.pth: expected a checkpoint"),
        (("text.pth", "--family", "ostrack"), 1, "text.pth: expected .*damaged or foreign"),
        (("cut.pth", "--family", "ostrack"), 1, "cut.pth: expected .*damaged or foreign"),
        (("keys.pth", "--family", "ostrack"), 1, "missing: backbone.norm.bias; unknown: neck.bias"),
        (
            ("net.pth.tar", "--family", "loretrack", "--candidate-elimination"),
            1,
            "expected no candidate elimination",
        ),
        (("net.pth.tar", "--family", "ostrack", "--output", "."), 1, "expected a new folder or a"),
        (
            ("net.pth.tar", "--family", "fartrack"),
            1,
            "FARTrack checkpoint: .*no backbone.pos_embed_",
        ),
        (("net.pth.tar", "--family", "ostrack", "--exits", "6"), 2, "fartrack, got ostrack"),
    ],
)
def test_what_cannot_be_imported_is_named_in_one_line(
    home: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    (home / "text.pth").write_text("hello")
    whole = (home / "net.pth.tar").read_bytes()
    (home / "cut.pth").write_bytes(whole[: len(whole) // 2])
    weights = small_state_dict(128)
    weights["neck.bias"] = weights.pop("backbone.norm.bias")
    torch.save(weights, home / "keys.pth")
    before = sorted(home.iterdir())

    done = edgetrack_here("import", *options, cwd=home)

    assert done.returncode == code, done.stderr
    assert re.search(message, " ".join(done.stderr.replace("│", " ").split()))
    assert code == 2 or len(done.stderr.strip().splitlines()) == 1
    assert sorted(home.iterdir()) == before
