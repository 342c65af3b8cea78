"""Fixtures that several test files share."""

from pathlib import Path

import pytest

DATA_PACK = Path(__file__).parents[2] / "shared" / "data"


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
