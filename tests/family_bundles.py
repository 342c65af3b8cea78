"""Small models with random weights of the families that have heads or state, as bundles."""

from pathlib import Path

from small_fartrack import FARTRACK_PATCH, make_fartrack
from small_models import DYTRACK_PATCH, make_dytrack

from edgetrack.bundle import Bundle
from edgetrack.export import export_bundle


def export_family(family: str, folder: Path) -> Bundle:
    """A bundle of ``dytrack`` or ``fartrack`` with one operating point."""
    model = make_dytrack(DYTRACK_PATCH) if family == "dytrack" else make_fartrack(FARTRACK_PATCH)
    return export_bundle(
        model,
        folder,
        name=f"{family}-small",
        operating_points={"balanced": (0.5,) * (model.num_exits - 1)},
        operating_point="balanced",
        provenance={},
        licence="random weights",
    )
