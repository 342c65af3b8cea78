"""The committed calibration cache of the bundle that ships, from clips that this project renders.

    python benchmarks/make_calibration.py [--bundle B]

Tracks 32 short rendered clips (seeds 0 to 31, 8 crops each), calibrates on all of them, and ranks
the layers on every eighth crop. The same versions of the tools give the same bytes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetrack.bundle import Bundle
from edgetrack.data.synthetic import render_clip
from edgetrack.quantize.cache import FOLDER_NAME
from edgetrack.quantize.calibrate import calibrate
from edgetrack.quantize.sensitivity import keep_worst_in_float, rank_layers
from edgetrack.runtime.recording import record_crops

CALIBRATION = Path(__file__).parents[1] / "calibration"
NUM_CLIPS, NUM_FRAMES = 32, 9
SIZES = ((320, 240), (480, 360), (640, 480))
# Rendered frames vary less than real ones, so nothing is clipped: on other videos it lost least.
METHOD = "max"
MAX_LOSS = 0.012


def rendered_crops(bundle: Bundle) -> Iterator[tuple[str, dict[str, Any]]]:
    """Crops that the tracker cuts from rendered clips."""
    for seed in range(NUM_CLIPS):
        width, height = SIZES[seed % len(SIZES)]
        clip = list(render_clip(num_frames=NUM_FRAMES, width=width, height=height, seed=seed))
        frames = [frame for frame, _ in clip]
        yield from record_crops(bundle, frames, clip[0][1].tolist(), name=f"synthetic-{seed:02d}")


def main() -> None:
    args = _arguments()
    bundle = Bundle.load(args.bundle)
    crops = list(rendered_crops(bundle))
    cache = calibrate(bundle, crops, method=METHOD, on_progress=_show("calibrating"))
    cache = rank_layers(bundle, cache, crops[::8], on_progress=_show("ranking layers"))
    cache = keep_worst_in_float(bundle, cache, crops[::8], max_loss=MAX_LOSS)
    for folder in (args.output, bundle.path / FOLDER_NAME):
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"{bundle.name}-*.json"):
            old.unlink()
        cache.write(folder / cache.file_name)
    print(f"\n{cache.file_name}: {len(crops)} crops, in float: {cache.float_layers}")


def _show(what: str) -> Any:
    return lambda fraction: print(f"\r{what} {fraction:4.0%}", end="", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--output", type=Path, default=CALIBRATION)
    return parser.parse_args()


if __name__ == "__main__":
    main()
