"""``edgetrack import``: a checkpoint that others published → a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrack.cli.author import author_side, cut
from edgetrack.cli.options import progress_bar

if TYPE_CHECKING:
    from edgetrack.models.segmented import SegmentedModel

__all__ = ["import_checkpoint"]

FAMILIES = ("fartrack", "loretrack", "ostrack")
_LICENCE = "as the imported checkpoint's: see where it was published"


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="What torch.save wrote: .pth, .pth.tar")],
    family: Annotated[str, typer.Option(help=f"Whose weights: {', '.join(FAMILIES)}")],
    output: Annotated[
        Path | None,
        typer.Option(help="The bundle's folder, replaced if it exists [default: the model's name]"),
    ] = None,
    candidate_elimination: Annotated[
        bool | None,
        typer.Option(
            help="Whether candidates are eliminated; weights do not say [default: what the "
            "checkpoint's settings say, else no]",
            show_default=False,
        ),
    ] = None,
    search_factor: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Side of the search region over the root of the target's area [default: what the "
            "checkpoint's settings say, else 4 for OSTrack-256 and FARTrack, and 5 for all others]",
        ),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            help="Layers with an exit behind them, of a fartrack: 15, 10 and 6 are its Tiny, Nano "
            "and Pico, and 6,10,15 an early-exit model [default: the last layer]"
        ),
    ] = None,
    retention: Annotated[
        float | None,
        typer.Option(
            help="Share of a template's tokens that stays, of a fartrack [default: 0.75 of a "
            "sparse checkpoint, else 1]"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name [default: family and size]")] = None,
    licence: Annotated[str, typer.Option(help="What the weights may be used for")] = _LICENCE,
) -> None:
    """Turn a published checkpoint into a bundle; nothing in the file is executed.

    Example: edgetrack import OSTrack_ep0300.pth.tar --family ostrack --output ostrack_256
    """
    if family not in FAMILIES:
        raise typer.BadParameter(
            f"expected one of {', '.join(FAMILIES)}, got {family!r}", param_hint="--family"
        )
    with author_side():
        from edgetrack.bundle import sha256_of
        from edgetrack.export import export_bundle
        from edgetrack.models.published import load_fartrack, load_ostrack, read_checkpoint

    published = read_checkpoint(checkpoint)
    model: SegmentedModel
    if family == "fartrack":
        if candidate_elimination is not None:
            raise typer.BadParameter(
                "expected it with ostrack, got fartrack, which drops template tokens instead: see "
                "--retention", param_hint="--candidate-elimination",
            )  # fmt: skip
        model = load_fartrack(published, search_factor=search_factor)
    else:
        model = load_ostrack(
            published,
            family=family,
            search_factor=search_factor,
            is_eliminating=candidate_elimination,
        )
    model = cut(model, exits=exits, retention=retention)
    name = name or _name_of(model)
    with progress_bar() as bar:
        bar.add_task("exporting", total=None)
        bundle = export_bundle(
            model,
            output or Path(name),
            name=name,
            provenance={"imported": {"file": checkpoint.name, "sha256": sha256_of(checkpoint)}},
            licence=licence,
        )
    config = model.config
    typer.echo(
        f"{config.exit_after[-1]} blocks of width {config.dim}, template "
        f"{config.template_size_px} px, search region {config.search_size_px} px at factor "
        f"{config.search_factor:g}, {_tokens_of(model)}"
    )
    if model.num_exits > 1:
        typer.echo("no exit was calibrated: say when to stop with --exit-policy and --threshold")
    typer.echo(f"bundle: {bundle.path}; next: edgetrack build {bundle.path}")


def _name_of(model: "SegmentedModel") -> str:
    """Family and size, and what tells variants of one size apart."""
    config = model.config
    parts = [model.family, str(config.search_size_px)]
    if model.family == "fartrack":
        parts += [str(depth) for depth in config.exit_after]
        if config.retention < 1:
            parts.append(f"r{100 * config.retention:g}")
    elif config.eliminate_at:
        parts.append("ce")
    return "-".join(parts)


def _tokens_of(model: "SegmentedModel") -> str:
    """What becomes of the tokens on their way."""
    config = model.config
    if model.family == "fartrack":
        return (
            f"{config.num_templates} templates of {config.kept_tokens} tokens each, exits behind "
            f"{', '.join(map(str, config.exit_after))}"
        )
    return f"candidate elimination {'on' if config.eliminate_at else 'off'}"
