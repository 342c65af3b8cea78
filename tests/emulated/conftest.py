"""Tests that need the emulated CUDA driver: ``python tests/emulator/run.py`` runs them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import Driver
from emulator.hooks import EmulatedDriver

IS_EMULATED = os.environ.get("EDGETRACK_EMULATED") == "1"


class SkippedModule(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(
            "needs the emulated CUDA driver; run: python tests/emulator/run.py",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Skip a file before it is imported: it may need PyCUDA."""
    return None if IS_EMULATED else SkippedModule.from_parent(parent, path=module_path)


@pytest.fixture
def emulated() -> Iterator[EmulatedDriver]:
    """The emulated driver; log, failures and settings are those of a fresh one."""
    driver = EmulatedDriver()
    driver.reset()
    yield driver
    driver.reset()


@pytest.fixture
def driver(emulated: EmulatedDriver) -> Iterator[Driver]:
    """The driver's calls, in a primary context of this test's own."""
    driver = Driver(emulated)
    yield driver
    driver.close()
