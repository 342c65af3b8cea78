"""The command line as a person meets it: its output, its exit code."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from edgetrack.cli import main

Done = subprocess.CompletedProcess[str]


def edgetrack(*args: object, cwd: Path) -> Done:
    """Run a command in a process of its own; a warning is an error."""
    command = [sys.executable, "-W", "error", "-m", "edgetrack", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def edgetrack_here(*args: object, cwd: Path) -> Done:
    """Run a command in this process, where torch is imported once and not by each command."""
    code: object = 0
    printed = [io.BytesIO(), io.BytesIO()]
    out, err = (io.TextIOWrapper(raw, "utf-8", write_through=True) for raw in printed)
    before = sys.argv, Path.cwd()
    sys.argv = ["edgetrack", *map(str, args)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    assert isinstance(code, int)
    return subprocess.CompletedProcess(args, code, *(raw.getvalue().decode() for raw in printed))
