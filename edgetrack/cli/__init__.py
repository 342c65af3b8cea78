"""The command line: parse, call, print. One file per kind of command.

Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 130 interrupted.
"""

import sys
from collections.abc import Callable

import typer

from edgetrack.cli import (
    author,
    build,
    calibrate,
    import_,
    inspect,
    measure,
    prune,
    pseudolabel,
    run,
)
from edgetrack.errors import EdgeTrackError

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgetrack",
    help="Follow one object on an edge device, and spend compute only where a frame needs it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
_NAMES: dict[Callable[..., None], str] = {
    import_.import_checkpoint: "import",
    measure.evaluate: "eval",
}
for command in (
    build.build,
    calibrate.calibrate,
    run.track,
    run.demo,
    measure.bench,
    measure.evaluate,
    pseudolabel.pseudolabel,
    author.train,
    author.export,
    import_.import_checkpoint,
    prune.prune,
    inspect.inspect,
    inspect.doctor,
):
    app.command(_NAMES.get(command))(command)


def main() -> None:
    """Run the command line; a failure is one line on the error stream."""
    try:
        app()
    except (EdgeTrackError, ValueError, TypeError, OSError) as error:
        print(f"edgetrack: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("edgetrack: interrupted", file=sys.stderr)
        sys.exit(130)
