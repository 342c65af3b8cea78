"""What ``edgetrack bench`` prints, and what ``edgetrack build`` does about INT8."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from edgetrack.cli.options import milliseconds, print_table

if TYPE_CHECKING:
    from edgetrack.bench import BenchReport, Energy, EnergyPerFrame, Gpu, Percentiles
    from edgetrack.power import Clock, MachineState

__all__ = ["print_bench", "print_gate", "when_to_stop"]

_UNKNOWN = "unknown"
_COMPARED = {
    "entropy": "entropy",
    "score": "1 - score",
    "combined": "the mean of entropy and 1 - score",
}


def print_bench(report: "BenchReport", source: str, machine: Mapping[str, str]) -> None:
    """Print a report as tables and lines; what this machine does not have is left out."""

    def row(name: str, p: "Percentiles") -> tuple[str, ...]:
        return (name, *(milliseconds(v) for v in (p.p50, p.p90, p.p99, p.mean)), str(p.count))

    setup = report.setup
    title = f"{setup['bundle']} {setup['precision']} on {setup['backend']}, {setup['frame']}"
    rows = [row(f"always exit {k}", p) for k, p in enumerate(report.exits)]
    rows.append(row("operating point", report.overall))
    if report.gpu is not None:
        rows.append(row("operating point, submit alone*", report.submit))
    print_table(title, ("update", "p50 ms", "p90 ms", "p99 ms", "mean ms", "count"), rows)
    if report.gpu is not None:
        typer.echo("* the host hands in the frame and does not wait: no update")
        _print_ways(report.gpu)
    _print_stages(report)
    if report.energy is not None:
        _print_energy(report.energy)
    _print_state(report.before, report.after)
    total = sum(report.exit_histogram)
    shares = ", ".join(f"{k}: {n / total:.0%}" for k, n in enumerate(report.exit_histogram))
    typer.echo(f"fps {report.fps:.0f} (updates over the seconds spent in them)")
    typer.echo(f"exits {shares}; {when_to_stop(setup['criterion'], setup['thresholds'])}")
    memory = f"peak memory {report.peak_memory_mb:.0f} MB"
    if report.gpu is not None:
        memory += f"; GPU memory {report.gpu.memory_bytes / 1e6:.1f} MB, engines not counted"
    typer.echo(f"{memory}; warm-up {setup['num_warm_up']}")
    typer.echo(f"source {source}; timed: {setup['timed']}")
    typer.echo("machine " + "; ".join(machine.values()))


def print_gate(gate: Mapping[str, Any], title: str) -> None:
    """Print what INT8 is worth here, and what was chosen (see ``gate.Verdict``)."""
    name, agreement = gate["float_precision"], gate["agreement"]
    graphs: Mapping[str, Mapping[str, Any]] = gate["graphs"]
    rows = [
        (
            graph,
            found["precision"],
            _beside(found["float_ms"], found["int8_ms"]),
            _beside(_megabytes([found["float_bytes"]]), _megabytes([found["int8_bytes"]])),
            f"{found['num_int8_products']}/{found['num_products']}",
            _beside(found["box_iou"], digits=3),
            "",
        )
        for graph, found in graphs.items()
    ]
    each = list(graphs.values())
    chosen_bytes = [g["int8_bytes" if g["precision"] == "int8" else "float_bytes"] for g in each]
    num_int8 = sum(g["num_int8_products"] for g in each if g["precision"] == "int8")
    rows.append(
        (
            "as chosen",
            "",
            _beside(gate["update_ms"].get("float"), gate["update_ms"].get("chosen")),
            _beside(_megabytes([g["float_bytes"] for g in each]), _megabytes(chosen_bytes)),
            f"{num_int8}/{sum(g['num_products'] for g in each)}",
            _beside(sum(agreement["box_iou"]) / len(agreement["box_iou"]), digits=3),
            f"{min(agreement['exits'].values(), default=1.0):.1%}",
        )
    )
    print_table(
        f"{title}\n{name} → int8, on {gate['source']}",
        ("graph", "runs", "ms", "MB", "in int8", "IoU", "exits"),
        rows,
    )
    typer.echo(
        f"ms: of a segment at full depth, as chosen of an update at {gate['operating_point']}; in "
        f"int8: products that are; IoU: of boxes with those of {name}; exits: share of "
        f"{gate['num_crops']} crops that stop where {name} does, at the worst operating point"
    )
    for point, share in agreement["exits"].items():
        unfitted = agreement["exits_unfitted"][point]
        typer.echo(f"  {point}: {share:.1%}, by the bundle's own thresholds {unfitted:.1%}")
    typer.echo(gate["sentence"])


def when_to_stop(criterion: str, thresholds: Sequence[float]) -> str:
    """An exit policy in words."""
    if not thresholds:
        return "there is one exit"
    below = ", ".join(f"{t:.4g}" for t in thresholds)
    return f"stop where {_COMPARED.get(criterion, criterion)} is below {below}"


def _beside(*numbers: float | None, digits: int = 2) -> str:
    """Those of the numbers that are known."""
    return " → ".join(f"{number:.{digits}f}" for number in numbers if number is not None)


def _megabytes(sizes_bytes: Sequence[int | None]) -> float | None:
    """The sum, if all are known."""
    known = [size for size in sizes_bytes if size is not None]
    return sum(known) / 1e6 if len(known) == len(sizes_bytes) else None


def _print_ways(gpu: "Gpu") -> None:
    """Median per update by who decides."""
    ways = gpu.ways.values()
    stars = ["*" if way in gpu.unlike else "" for way in gpu.ways]
    rows = [
        (f"always exit {k}", *(f"{way.exits[k].p50:.3f}" for way in ways))
        for k in range(len(gpu.ways[gpu.exit_decision].exits))
    ]
    overall = (f"{way.overall.p50:.3f}{star}" for way, star in zip(ways, stars, strict=True))
    rows.append(("operating point", *overall))
    rows.append(("submit alone", *(f"{way.submit.p50:.3f}" for way in ways)))
    title = f"who decides to stop (this tracker: {gpu.exit_decision})"
    print_table(title, ("update", *(f"{way} p50 ms" for way in gpu.ways)), rows)
    if gpu.unlike:
        typer.echo("* took other exits: not to be compared")
    for way, reason in gpu.unavailable.items():
        typer.echo(f"{way} does not work here: {reason}")


def _print_stages(report: "BenchReport") -> None:
    stages, title, gpu = report.stages_ms, "full depth, median per stage", report.gpu
    # On a GPU only the host that waits for each stage has a time for it.
    is_of_another = gpu is not None and gpu.exit_decision != "host" and "host" in gpu.ways
    if gpu is not None and is_of_another:
        stages, title = gpu.ways["host"].stages_ms, f"{title}, where the host decides*"
    rows = [(name, milliseconds(ms)) for name, ms in stages.items()]
    print_table(title, ("stage", "ms"), rows)
    if gpu is not None and is_of_another:
        typer.echo(f"* this tracker runs them without waiting: {gpu.exit_decision}")


def _print_energy(energy: "Energy") -> None:
    if not energy.overall.rails_mj:
        typer.echo("energy unknown: this machine has no power monitor that edgetrack can read")
        return

    parts = [rail for rail in energy.overall.rails_mj if (rail,) != energy.total_rails]

    def row(name: str, e: "EnergyPerFrame") -> tuple[str, ...]:
        values = (e.total_mj, e.above_idle_mj, *(e.rails_mj[rail] for rail in parts))
        return (name, *(_UNKNOWN if v is None else f"{v:.2f}" for v in values), str(e.num_frames))

    rows = [row(f"always exit {k}", e) for k, e in enumerate(energy.exits)]
    rows.append(row("operating point", energy.overall))
    columns = ("update", "mJ", "above idle mJ", *parts, "count")
    print_table("energy per frame, back to back", columns, rows)
    idle = _UNKNOWN if energy.idle_mw is None else f"{energy.idle_mw / 1e3:.2f} W"
    typer.echo(f"mJ is {' + '.join(energy.total_rails) or _UNKNOWN}; idle {idle}")


def _print_state(before: "MachineState | None", after: "MachineState | None") -> None:
    if before is None or after is None:
        return
    first, second = dict(_state_rows(before)), dict(_state_rows(after))
    rows = [(name, first.get(name, _UNKNOWN), value) for name, value in second.items()]
    print_table("this machine", ("", "before", "after"), rows, is_numeric=False)
    if before.moving_clocks:
        hint = ", to fix them run: sudo jetson_clocks" if before.power_mode else ""
        typer.echo(f"clocks that follow the load: {', '.join(before.moving_clocks)}{hint}")


def _state_rows(state: "MachineState") -> Iterator[tuple[str, str]]:
    if state.power_mode is not None:
        name, index = state.power_mode.name or _UNKNOWN, state.power_mode.index
        yield "power mode", name if index is None else f"{name} ({index})"
    for name, clock in state.clocks.items():
        yield f"{name} clock, MHz", _clock(clock)
    for name, value in state.temperatures_c.items():
        yield f"{name}, °C", _UNKNOWN if value is None else f"{value:.1f}"
    for name, value in state.power_mw.items():
        yield f"{name}, mW", _UNKNOWN if value is None else f"{value:.0f}"


def _clock(clock: "Clock") -> str:
    now, lowest, highest = (
        "?" if mhz is None else f"{mhz:.0f}"
        for mhz in (clock.now_mhz, clock.lowest_mhz, clock.highest_mhz)
    )
    return f"{now} fixed" if clock.is_fixed else f"{now} in {lowest} to {highest}"
