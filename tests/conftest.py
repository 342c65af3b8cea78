"""Fixtures that several test files share."""

import signal
import sys
from pathlib import Path

import pytest

from edgetrack.bundle import Bundle

# A shell starts background jobs with Ctrl-C ignored, and every process below would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

DATA_PACK = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers with torch on every run, alone or among the others.

    Fixtures that are shared are made before this: they seed for themselves.
    """
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_pack() -> Path:
    """The research data pack, where a developer has it beside the checkout."""
    if not DATA_PACK.is_dir():
        pytest.skip(f"needs the research data pack at {DATA_PACK}")
    return DATA_PACK


@pytest.fixture(scope="session")
def pretrained(data_pack: Path) -> Path:
    """Pretrained stems and their reference, beside the data pack."""
    folder = data_pack.parent / "pretrained"
    if not folder.is_dir():
        pytest.skip(f"needs the pretrained stems at {folder}")
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose answers the pixels decide (see ``toy_bundle``)."""
    from toy_bundle import write_toy_bundle

    return write_toy_bundle(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_with_heads(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with a head per exit."""
    from toy_bundle import write_toy_bundle

    return write_toy_bundle(tmp_path_factory.mktemp("toy_with_heads"), heads=True)


@pytest.fixture(scope="session")
def toy_with_memory(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with heads, and a memory that is carried from frame to frame."""
    from toy_bundle import write_toy_bundle

    return write_toy_bundle(tmp_path_factory.mktemp("toy_with_memory"), heads=True, memory=True)


@pytest.fixture(scope="session")
def shipped_bundle() -> Bundle:
    """The bundle that ships."""
    return Bundle.load()


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An exported ``early_exit_vit-tiny`` with random weights; takes 15 s, so for slow tests."""
    from small_models import export_random

    from edgetrack.models.early_exit_vit import CONFIGS

    folder = tmp_path_factory.mktemp("random") / "bundle"
    return export_random(CONFIGS["tiny"], folder, name="early_exit_vit-tiny")


@pytest.fixture(scope="session")
def base_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An ``early_exit_vit-base`` with random weights; takes half a minute, so for slow tests."""
    import torch
    from compiled import export_untrained

    from edgetrack.models.registry import create_model

    folder = tmp_path_factory.mktemp("base") / "bundle"
    torch.manual_seed(0)
    return export_untrained(create_model("early_exit_vit-base"), folder)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An exported ``small_models.PATCH`` with random weights."""
    from small_models import PATCH, export_random

    folder = tmp_path_factory.mktemp("small") / "bundle"
    return export_random(PATCH, folder, name="early_exit_vit-small")
