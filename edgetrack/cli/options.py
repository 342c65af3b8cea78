"""Options that several commands share, and how they are parsed and printed."""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrack.errors import EngineNotFoundError
from edgetrack.runtime.policies import CRITERIA, ExitPolicy

if TYPE_CHECKING:
    from rich.progress import Progress

    from edgetrack.bundle import Bundle
    from edgetrack.tracker import Tracker

__all__ = [
    "DEFAULT_ENGINES",
    "BackendOption",
    "BundleOption",
    "DeviceOption",
    "EnginesOption",
    "ExitDecisionOption",
    "ExitPolicyOption",
    "JsonOption",
    "OperatingPointOption",
    "PrecisionOption",
    "RulesOption",
    "ThreadsOption",
    "ThresholdOption",
    "check_choices",
    "check_criterion",
    "milliseconds",
    "open_tracker",
    "parse_bbox",
    "parse_rules",
    "print_json",
    "print_table",
    "progress_bar",
]

DEFAULT_ENGINES = Path("engines")

BundleOption = Annotated[
    Path | None, typer.Option("--bundle", "-b", help="Bundle folder [default: the one that ships]")
]
BackendOption = Annotated[
    str, typer.Option(help="auto, onnxruntime, eager, torch-cuda, tensorrt or tensorrt-rtx")
]
DeviceOption = Annotated[
    int, typer.Option(min=0, help="Number of the CUDA device, for backends that run on one")
]
ExitDecisionOption = Annotated[
    str,
    typer.Option(
        help="Who decides to stop, on a CUDA device: device, flag, host, or auto for the first "
        "that works"
    ),
]
PrecisionOption = Annotated[
    str | None, typer.Option(help="fp32, fp16 or int8 [default: the backend's own]")
]
EnginesOption = Annotated[Path, typer.Option(help="Folder of built engines")]
OperatingPointOption = Annotated[
    str | None, typer.Option(help="Named operating point of the bundle [default: its default]")
]
ExitPolicyOption = Annotated[
    str | None,
    typer.Option(
        help="entropy, score (1 minus it) or combined: stop where it is below --threshold (or the "
        "operating point's); fixed: stop at exit --threshold; always-last"
    ),
]
ThresholdOption = Annotated[
    str | None,
    typer.Option(
        help="For a criterion: one number or one per exit but the last (0.2,0.3); for fixed: the "
        "exit"
    ),
]
RulesOption = Annotated[
    str | None,
    typer.Option(
        help="How answers become the target's state, instead of the bundle's rules: "
        "size_smoothing=0.35,search_growth=1.4; '' is none"
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of a CPU backend [default: it chooses]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]


def parse_bbox(text: str) -> tuple[float, float, float, float]:
    """``x,y,w,h`` in pixels; anything else is wrong usage."""
    try:
        x, y, w, h = (float(v) for v in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected x,y,w,h in pixels such as 412,230,96,54, got {text!r}", param_hint="--bbox"
        ) from None
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        raise typer.BadParameter(
            f"expected finite numbers and a positive width and height, got {text!r}",
            param_hint="--bbox",
        )
    return x, y, w, h


def check_choices(backend: str, precision: str | None, exit_decision: str = "auto") -> None:
    """Unknown names are wrong usage."""
    from edgetrack.backends import BACKEND_NAMES
    from edgetrack.runtime.loop import EXIT_DECISIONS

    if exit_decision not in EXIT_DECISIONS:
        raise typer.BadParameter(
            f"expected one of {', '.join(EXIT_DECISIONS)}, got {exit_decision!r}",
            param_hint="--exit-decision",
        )

    if backend not in BACKEND_NAMES:
        raise typer.BadParameter(
            f"expected one of {', '.join(BACKEND_NAMES)}, got {backend!r}", param_hint="--backend"
        )
    if precision not in (None, "fp32", "fp16", "int8"):
        raise typer.BadParameter(
            f"expected fp32, fp16 or int8, got {precision!r}", param_hint="--precision"
        )


def check_criterion(name: str) -> None:
    """An unknown criterion is wrong usage."""
    if name not in CRITERIA:
        raise typer.BadParameter(
            f"expected one of {', '.join(CRITERIA)}, got {name!r}", param_hint="--criterion"
        )


def parse_rules(text: str) -> dict[str, float]:
    """``name=number,...`` → rules of the target; an empty text is none."""
    from edgetrack.runtime.target import TargetRules

    try:
        parts = [part.partition("=") for part in text.split(",") if part]
        values = {name: float(value) for name, _, value in parts}
        TargetRules.of(values)
    except ValueError as error:
        raise typer.BadParameter(
            f"expected name=number,..., got {text!r}: {error}", param_hint="--rules"
        ) from error
    return values


def open_tracker(
    *,
    bundle: Path | None = None,
    backend: str,
    precision: str | None,
    engines: Path,
    operating_point: str | None = None,
    exit_policy: str | None = None,
    threshold: str | None = None,
    rules: str | None = None,
    threads: int | None = None,
    device: int = 0,
    exit_decision: str = "auto",
) -> "Tracker":
    """A tracker from the shared options."""
    from edgetrack.bundle import Bundle
    from edgetrack.runtime.target import TargetRules
    from edgetrack.tracker import Tracker

    check_choices(backend, precision, exit_decision)
    if operating_point is not None and (exit_policy, threshold) != (None, None):
        raise typer.BadParameter(
            "expected it alone, got an exit policy or threshold too", param_hint="--operating-point"
        )
    if engines != DEFAULT_ENGINES and not engines.is_dir():
        raise EngineNotFoundError(
            f"{engines}: expected a folder of engines, got none; run: edgetrack build --output "
            f"{engines}"
        )
    loaded = Bundle.load(bundle)
    return Tracker(
        loaded,
        backend=backend,
        precision=precision,
        operating_point=operating_point,
        exit_policy=_policy(loaded, exit_policy, threshold),
        rules=None if rules is None else TargetRules.of(parse_rules(rules)),
        engines=engines,
        num_threads=threads,
        device=device,
        exit_decision=exit_decision,
    )


def _policy(bundle: "Bundle", name: str | None, threshold: str | None) -> ExitPolicy | None:
    num_exits = bundle.num_exits
    if name is None and threshold is None:
        return None
    name = name or bundle.criterion
    if name == "always-last":
        if threshold is not None:
            raise typer.BadParameter("expected none with always-last", param_hint="--threshold")
        return ExitPolicy.always_last(num_exits=num_exits)
    if name not in (*CRITERIA, "fixed"):
        raise typer.BadParameter(
            f"expected {', '.join(CRITERIA)}, fixed or always-last, got {name!r}",
            param_hint="--exit-policy",
        )
    if threshold is None:
        if name == bundle.criterion:
            return None
        raise typer.BadParameter("expected --threshold EXIT with it", param_hint="--exit-policy")
    try:
        if name == "fixed":
            if not threshold.isdecimal():
                raise ValueError(f"expected the number of an exit, got {threshold!r}")
            return ExitPolicy.fixed(int(threshold), num_exits=num_exits)
        values = [float(v) for v in threshold.split(",")]
        thresholds = values[0] if len(values) == 1 else values
        return ExitPolicy.below(thresholds, criterion=name, num_exits=num_exits)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--threshold") from error


def print_json(content: Any) -> None:
    """Print JSON; NaN and infinity, which JSON lacks, become null."""
    typer.echo(json.dumps(_json_safe(content), indent=1))


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, is_numeric: bool = True
) -> None:
    """Print a table; numbers stand right, and every column but the first holds them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    typer.echo(title)
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        is_number = index > 0 and is_numeric
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(markup=False).print(table)  # markup would swallow the extra of edgetrack[cuda]


def milliseconds(value: float) -> str:
    """A latency as it stands in tables."""
    return f"{value:.2f}"


@contextlib.contextmanager
def progress_bar(*, is_shown: bool = True) -> Iterator["Progress"]:
    """A progress bar on the error stream, so that results can be piped."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not is_shown,
    ) as progress:
        yield progress
