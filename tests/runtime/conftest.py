"""Fixtures of the tests of kernels."""

import pytest
from compiled_kernels import CompiledKernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CompiledKernels:
    """The kernels, compiled for the CPU."""
    return CompiledKernels(tmp_path_factory.mktemp("kernels"))
