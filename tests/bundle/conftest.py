"""A bundle of plain files to spoil."""

import shutil
from pathlib import Path

import pytest
from toy_bundle import write_toy_bundle


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("pristine") / "bundle").path


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A bundle's folder to spoil."""
    return shutil.copytree(pristine, tmp_path / "bundle")
