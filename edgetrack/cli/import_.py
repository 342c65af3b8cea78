"""``edgetrack import``: a checkpoint that others published → a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from edgetrack.cli.author import author_side
from edgetrack.cli.options import progress_bar

__all__ = ["import_checkpoint"]

FAMILIES = ("loretrack", "ostrack")
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
            "checkpoint's settings say, else 4 for OSTrack-256 and 5 for all others]",
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
        from edgetrack.models.published import load_ostrack, read_checkpoint

    model = load_ostrack(
        read_checkpoint(checkpoint),
        family=family,
        search_factor=search_factor,
        is_eliminating=candidate_elimination,
    )
    config = model.config
    name = name or f"{family}-{config.search_size_px}{'-ce' if config.eliminate_at else ''}"
    with progress_bar() as bar:
        bar.add_task("exporting", total=None)
        bundle = export_bundle(
            model,
            output or Path(name),
            name=name,
            operating_points={"balanced": ()},
            operating_point="balanced",
            provenance={"imported": {"file": checkpoint.name, "sha256": sha256_of(checkpoint)}},
            licence=licence,
        )
    typer.echo(
        f"{config.exit_after[0]} blocks of width {config.dim}, template {config.template_size_px} "
        f"px, search region {config.search_size_px} px at factor {config.search_factor:g}, "
        f"candidate elimination {'on' if config.eliminate_at else 'off'}"
    )
    typer.echo(f"bundle: {bundle.path}; next: edgetrack build {bundle.path}")
