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
