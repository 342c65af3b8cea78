"""The GPU runtime against an emulated CUDA driver: all of ``tests/emulated``, in one process."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "emulator" / "run.py"
EXIT_CANNOT_BUILD = 77


@pytest.mark.slow
def test_the_gpu_runtime_on_the_emulated_driver() -> None:
    done = subprocess.run(
        [sys.executable, str(RUN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    tail = "\n".join(done.stdout.splitlines()[-60:])
    if done.returncode == EXIT_CANNOT_BUILD:
        pytest.skip(tail)
    assert done.returncode == 0, tail
