"""Rendered clips as files: what commands and runs read."""

from pathlib import Path

import cv2
import numpy as np

from edgetrack.data.synthetic import render_clip


def write_sequence(folder: Path, *, seed: int, num_frames: int = 6) -> None:
    """A sequence in the layout of GOT-10k: ``img`` and ``groundtruth.txt``."""
    (folder / "img").mkdir(parents=True)
    boxes = []
    for index, (frame, bbox) in enumerate(render_clip(num_frames=num_frames, seed=seed), 1):
        cv2.imwrite(str(folder / "img" / f"{index:06d}.jpg"), frame)
        boxes.append(bbox)
    np.savetxt(folder / "groundtruth.txt", np.array(boxes), "%.3f", ",")
