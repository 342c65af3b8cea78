"""Runs pytest where ``libcuda.so.1`` is the emulator: ``python tests/emulator/run.py [arguments]``.

Where the arguments name no tests it runs ``tests/emulated``.
"""

import subprocess
import sys

from build import ROOT, CannotBuildError, build_environment

EXIT_CANNOT_BUILD = 77


def main(arguments: list[str]) -> int:
    """Build, then run pytest; its exit code, or 77 where this machine cannot build."""
    try:
        environment = build_environment()
    except CannotBuildError as error:
        print(error)
        return EXIT_CANNOT_BUILD
    names_tests = any((ROOT / argument.split("::")[0]).exists() for argument in arguments)
    where = [] if names_tests else ["tests/emulated"]
    command = [sys.executable, "-m", "pytest", "-m", "", *arguments, *where]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
