"""Say what the development set is, so that who owns the public sets can rebuild and check it.

    python benchmarks/make_devset.py DATA_ROOT            # writes benchmarks/devset.json
    python benchmarks/make_devset.py DATA_ROOT --check    # compares a folder with it

DATA_ROOT holds a folder per sequence: ``img/000001.jpg …``, ``groundtruth.txt``, and, to write the
description, ``meta.json`` with the sequence's origin. No picture is copied.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgetrack.bundle import sha256_of
from edgetrack.data.sequences import TRUTH_NAME, Sequence, read_sequences
from edgetrack.errors import EdgeTrackError

DESCRIPTION = Path(__file__).with_name("devset.json")
META_NAME = "meta.json"
ABOUT = {
    "rebuild": "Take source_frames from the public sequence, resize them to stored_size_px, write "
    "them as JPEG of jpeg_quality, named 000001.jpg and so on. The truth is the public one, scaled "
    "by stored_size_px / source_size_px; where note says so, the extent of the public mask.",
    "source_frames": "first and last, counted from 1, none between them left out",
    "boxes": "x,y,w,h in pixels of the stored frames, from 0; a row of NaN where the target is "
    "absent",
    "truth_sha256": "of groundtruth.txt",
    "pixels_sha256": "of the SHA-256 of each frame's decoded pixels, in order, in hexadecimal: "
    "uint8, BGR, row by row; decoders of JPEG may differ in the last bit",
    "files_sha256": "of the SHA-256 of each stored frame's file, in order, in hexadecimal; "
    "encoders of JPEG differ, so frames that were rebuilt may differ here and in pixels_sha256",
}
# The public set and its name for the sequence.
SOURCES = {
    "davis_car-shadow": ("DAVIS 2016 val", "car-shadow"),
    "davis_dog": ("DAVIS 2016 val", "dog"),
    "davis_drift-straight": ("DAVIS 2016 val", "drift-straight"),
    "davis_horsejump-high": ("DAVIS 2016 val", "horsejump-high"),
    "davis_soapbox": ("DAVIS 2016 val", "soapbox"),
    "otb_Crossing": ("OTB", "Crossing"),
    "otb_Diving": ("OTB", "Diving"),
    "otb_david": ("OTB", "David"),
    "otb_faceocc2": ("OTB", "FaceOcc2"),
    "tld_car": ("TLD", "06_car"),
    "tld_jumping": ("TLD", "02_jumping"),
    "tld_pedestrian2": ("TLD", "04_pedestrian2"),
    "uav_boat1": ("UAV123_10fps", "boat1"),
    "uav_person12_1": ("UAV123_10fps", "person12_1"),
    "vot_bag": ("VOT2015", "bag"),
    "vot_car1": ("VOT2015", "car1"),
}


def contents(sequence: Sequence) -> dict[str, Any]:
    """What can be read off a sequence's files."""
    pixels, files, sizes = hashlib.sha256(), hashlib.sha256(), set()
    for path in sequence.frame_paths:
        frame = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if frame is None:
            raise OSError(f"{path}: expected a picture, got a file that does not decode")
        sizes.add(frame.shape[1::-1])
        pixels.update(hashlib.sha256(np.ascontiguousarray(frame)).hexdigest().encode())
        files.update(sha256_of(path).encode())
    if len(sizes) > 1:
        raise OSError(f"{sequence.name}: expected frames of one size, got {sorted(sizes)}")
    folder = sequence.frame_paths[0].parents[1]
    return {
        "num_frames": len(sequence.frame_paths),
        "num_absent": int(np.isnan(sequence.boxes_xywh).any(1).sum()),
        "stored_size_px": list(sizes.pop()),
        "truth_sha256": sha256_of(folder / TRUTH_NAME),
        "pixels_sha256": pixels.hexdigest(),
        "files_sha256": files.hexdigest(),
    }


def origin(folder: Path) -> dict[str, Any]:
    """Where a sequence comes from, by its ``meta.json``."""
    meta = json.loads((folder / META_NAME).read_text("utf-8"))
    data_set, name = SOURCES[folder.name]
    first = meta["first_source_frame"]
    found = {
        "data_set": data_set,
        "source_sequence": name,
        "source_repository": meta["source_repo"],
        "source_path": meta["source_path"],
        "source_frames": [first, first + meta["frames"] - 1],
        "source_size_px": meta["original_size"],
        "jpeg_quality": meta["jpeg_quality"],
        "licence": meta["licence"],
    }
    return found | ({"note": meta["note"]} if "note" in meta else {})


def differences(expected: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each thing that differs."""
    lines = [f"{name}: not in {DESCRIPTION.name}" for name in sorted(found.keys() - expected)]
    for name, entry in expected.items():
        if name not in found:
            lines.append(f"{name}: missing")
            continue
        for key, value in found[name].items():
            if value != entry[key]:
                lines.append(f"{name}: {key}: expected {entry[key]}, got {value}")
    return lines


def main() -> None:
    args = _arguments()
    try:
        found = {}
        for sequence in read_sequences(args.root):
            print(f"\r{sequence.name:32s}", end="", file=sys.stderr)
            found[sequence.name] = contents(sequence)
        print(file=sys.stderr)
        if args.check:
            expected = json.loads(DESCRIPTION.read_text("utf-8"))["sequences"]
            lines = differences(expected, found)
            print("\n".join(lines) or f"{args.root}: {len(found)} sequences, as described")
            sys.exit(1 if lines else 0)
        described = {name: origin(args.root / name) | entry for name, entry in found.items()}
    except (EdgeTrackError, OSError, KeyError) as error:
        sys.exit(f"make_devset.py: {error}")
    content = {"about": ABOUT, "sequences": described}
    DESCRIPTION.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    frames = sum(entry["num_frames"] for entry in described.values())
    print(f"{DESCRIPTION}: {len(described)} sequences, {frames} frames")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path)
    parser.add_argument("--check", action="store_true", help="compare the folder with the JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
