"""The command line as a person meets it: a process, its output, its exit code."""

import subprocess
import sys
from pathlib import Path


def edgetrack(*args: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command; a warning is an error."""
    command = [sys.executable, "-W", "error", "-m", "edgetrack", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)
