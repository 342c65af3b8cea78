"""Make a training folder small enough to be carried to another machine.

    python benchmarks/gpu/pack_data.py DATA OUTPUT [--max-side 320] [--part-mib 35] [--check]

Pictures become WebP with a long side of at most ``--max-side`` pixels; masks, boxes and areas are
scaled with them. OUTPUT gets zip files, none larger than ``--part-mib``, and ``parts.json``, which
lists them; it is written whole or not at all. Unpacked over one another, the zip files are again a
training folder (see ``edgetrack/data/folder.py``). ``--check`` reads it back and compares it with
DATA; without it, what is in OUTPUT already is replaced.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from parts import MIB, PARTS_NAME, PSEUDO_NAME, ZipParts, describe, unpack

from edgetrack.data.folder import TrainingPack, read_training_pack
from edgetrack.data.sequences import TRUTH_NAME
from edgetrack.errors import DataError, EdgeTrackError

_QUALITY = 75


class Packer:
    """Writes the sets and clips of a training folder into parts."""

    def __init__(self, root: Path, parts: ZipParts, *, max_side_px: int) -> None:
        self.root, self.parts, self.max_side_px = root, parts, max_side_px
        self.scales: dict[str, np.ndarray] = {}

    def add_set(self, folder: Path) -> None:
        rows = []
        for row in _read_lines(folder / "manifest.jsonl"):
            scale = self._add_picture(folder / row["img"])
            if row.get("mask"):
                self._add_mask(folder / row["mask"], folder / row["img"])
            rows.append(_scaled_row(row, scale))
        self._add_lines(folder / "manifest.jsonl", rows)
        if (folder / "boxes.jsonl").is_file():
            self._add_detections(folder / "boxes.jsonl")
        self._add_as_it_is(folder / "info.json")

    def add_clip(self, folder: Path) -> None:
        pictures = _files(folder / "img")
        scales = [self._add_picture(file) for file in pictures]
        if (folder / "mask").is_dir():
            for mask, picture in zip(_files(folder / "mask"), pictures, strict=False):
                self._add_mask(mask, picture)
        if (folder / TRUTH_NAME).is_file():
            boxes = _read_truth(folder / TRUTH_NAME) * np.array(scales)
            rows = (",".join("NaN" if np.isnan(v) else f"{v:.2f}" for v in b) for b in boxes)
            self._add(folder / TRUTH_NAME, "".join(f"{row}\n" for row in rows))
        if (folder / "meta.json").is_file():
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            self._add(folder / "meta.json", json.dumps(_scaled_row(meta, scales[0])))

    def add_videos(self, folder: Path) -> None:
        """What lies beside the clips; to be called after them."""
        if (folder / "boxes.jsonl").is_file():
            self._add_detections(folder / "boxes.jsonl")
        if (folder / "manifest.jsonl").is_file():
            rows = _read_lines(folder / "manifest.jsonl")
            scales = {name.split("/")[1]: s for name, s in self.scales.items()}
            one = np.ones(4)
            self._add_lines(
                folder / "manifest.jsonl",
                [_scaled_row(row, scales.get(row.get("name", ""), one)) for row in rows],
            )

    def add_pseudo_tracks(self, file: Path) -> None:
        """Tracks in the clips of the folder; to be called after them."""
        header, *rows = _read_lines(file)
        for row in rows:
            folder = self.root / "videos" / row["clip"] / "img"
            names = [f.relative_to(self.root).as_posix() for f in _files(folder)]
            scales = [self.scales[name] for name in names[row["first"] :]]
            boxes = [_scaled(b, s) for b, s in zip(row["boxes"], scales, strict=False)]
            row["boxes"] = boxes
        self._add_lines(self.root / PSEUDO_NAME, [header, *rows])

    def _add_picture(self, file: Path) -> np.ndarray:
        image = _read(file, cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        factor = min(1.0, self.max_side_px / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if factor < 1 else image
        self._add(file.with_suffix(".webp"), _encoded(".webp", small))
        scale = np.array([size[0] / width, size[1] / height] * 2)
        self.scales[file.relative_to(self.root).as_posix()] = scale
        return scale

    def _add_mask(self, file: Path, picture: Path) -> None:
        mask = _read(file, cv2.IMREAD_UNCHANGED)
        scale = self.scales[picture.relative_to(self.root).as_posix()]
        height, width = mask.shape[:2]
        size = round(width * scale[0]), round(height * scale[1])
        # Plain INTER_NEAREST would shift the mask by half a pixel.
        small = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
        self._add(file.with_suffix(".png"), _encoded(".png", small))

    def _add_detections(self, file: Path) -> None:
        rows = []
        for row in _read_lines(file):
            scale = self.scales.get((file.parent / row["img"]).relative_to(self.root).as_posix())
            if scale is not None:  # detections may be of pictures that are not there
                boxes = [[*_scaled(b[:4], scale), *b[4:]] for b in row["boxes"]]
                rows.append({**row, "img": _webp(row["img"]), "boxes": boxes})
        self._add_lines(file, rows)

    def _add_as_it_is(self, file: Path) -> None:
        if file.is_file():
            self._add(file, file.read_text("utf-8"))

    def _add_lines(self, file: Path, rows: list[dict[str, Any]]) -> None:
        self._add(file, "".join(json.dumps(row) + "\n" for row in rows))

    def _add(self, file: Path, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.parts.add(file.relative_to(self.root).as_posix(), data)


def pack(args: argparse.Namespace) -> None:
    """Write the parts and their list."""
    if args.output.exists() and not (args.output / PARTS_NAME).is_file():
        raise DataError(f"{args.output}: expected a packed folder or nothing, got another folder; "
                        "name a new one")  # fmt: skip
    sets = [p.parent for p in sorted(args.data.glob("*/*/manifest.jsonl"))]
    clips = [p.parent for p in sorted(args.data.glob("videos/*/img"))]
    if not sets and not clips:
        raise DataError(f"{args.data}: expected a training folder, got none; check the path")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".pack", dir=args.output.parent) as temporary:
        folder = Path(temporary) / "parts"
        folder.mkdir()
        parts = ZipParts(folder, part_bytes=int(args.part_mib * MIB))
        packer = Packer(args.data, parts, max_side_px=args.max_side)
        for index, source in enumerate(sets + clips, 1):
            print(f"\r{index}/{len(sets + clips)} {source.name:32.32s}", end="", file=sys.stderr)
            packer.add_set(source) if index <= len(sets) else packer.add_clip(source)
        print(file=sys.stderr)
        packer.add_videos(args.data / "videos")
        if args.pseudo_tracks is not None:
            packer.add_pseudo_tracks(args.pseudo_tracks)
        parts.close()
        content = {
            "max_side_px": args.max_side,
            "webp_quality": _QUALITY,
            "pictures": len(packer.scales),
            "parts": describe(parts.files),
        }
        (folder / PARTS_NAME).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        if args.output.exists():
            shutil.rmtree(args.output)
        folder.rename(args.output)
    before = sum(f.stat().st_size for f in args.data.rglob("*") if f.is_file())
    after = sum(part["bytes"] for part in content["parts"])
    kinds = ", ".join(f"{k} {n / MIB:.1f}" for k, n in parts.kinds.most_common())
    print(
        f"{args.output}: {len(packer.scales)} pictures, {before / MIB:.1f} MiB packed into "
        f"{after / MIB:.1f} MiB ({kinds}) in {len(parts.files)} parts of at most "
        f"{max(p['bytes'] for p in content['parts']) / MIB:.1f} MiB, "
        f"{time.monotonic() - started:.0f} s"
    )


def compare(args: argparse.Namespace) -> None:
    """Read what was packed, and print how it differs from its source."""
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / "data"
        unpack(args.output, packed)
        deviations: list[float] = []
        extents: list[float] = []
        for path in sorted(args.data.glob("*/*/manifest.jsonl")):
            own = packed / path.parent.relative_to(args.data)
            _compare_set(path.parent, own, deviations, extents)
        for path in sorted(args.data.glob("videos/*/" + TRUTH_NAME)):
            own = packed / path.parent.relative_to(args.data)
            pictures = zip(_files(path.parent / "img"), _files(own / "img"), strict=True)
            scales = [_scale_between(a, b) for a, b in pictures]
            off = _read_truth(path) * np.array(scales) - _read_truth(own / TRUTH_NAME)
            assert np.array_equal(np.isnan(off), np.isnan(_read_truth(path)))
            deviations += np.abs(off[np.isfinite(off)]).tolist()
        print(f"boxes: {len(deviations) // 4}, at most {max(deviations):.4f} px off")
        if extents:
            print(
                f"extents of masked objects: {len(extents)}, median {np.median(extents):.2f} px, "
                f"99 % within {np.quantile(extents, 0.99):.2f} px of the source's, "
                f"at most {max(extents):.2f}"
            )
        counts = _counts(read_training_pack(packed))
    theirs = _counts(read_training_pack(args.data))
    for name in theirs:
        print(f"{name:40s} {theirs[name]:6d} -> {counts.get(name, 0):6d}")


def _compare_set(source: Path, packed: Path, deviations: list[float], extents: list[float]) -> None:
    rows = _read_lines(source / "manifest.jsonl")
    for theirs, ours in zip(rows, _read_lines(packed / "manifest.jsonl"), strict=True):
        scale = _scale_between(source / theirs["img"], packed / ours["img"])
        masks = [
            _read(folder / row["mask"], cv2.IMREAD_UNCHANGED) if row.get("mask") else None
            for folder, row in ((source, theirs), (packed, ours))
        ]
        pairs = zip(theirs.get("objects", ()), ours.get("objects", ()), strict=True)
        for a, b in pairs:
            off = np.array(a["box"]) * scale - b["box"]
            deviations += np.abs(off).tolist()
            if masks[0] is None:
                continue
            found = [_extent(mask == a["id"]) for mask in masks]
            if found[0] is not None and found[1] is not None:
                extents.append(float(np.abs(found[0] * scale - found[1]).max()))


def _counts(pack: TrainingPack) -> dict[str, int]:
    counts = {"cutouts": len(pack.cutouts), "backgrounds": len(pack.backgrounds)}
    for name, pictures in pack.pictures.items():
        counts[f"{name}: pictures"] = len(pictures)
        counts[f"{name}: boxes"] = sum(len(p.boxes_xywh) for p in pictures)
    for name, clips in pack.clips.items():
        counts[f"{name}: clips"] = len(clips)
        counts[f"{name}: frames with a box"] = sum(
            int(np.isfinite(clip.boxes_xywh).all(1).sum()) for clip in clips
        )
    return counts


def _scaled_row(row: dict[str, Any], scale: np.ndarray) -> dict[str, Any]:
    """A line of a manifest, for pictures that were scaled in x and y."""
    across, down = float(scale[0]), float(scale[1])
    changed = dict(row)
    for key in ("w", "width"):
        if key in row:
            changed[key] = round(row[key] * across)
    for key in ("h", "height"):
        if key in row:
            changed[key] = round(row[key] * down)
    if "img" in row:
        changed["img"] = _webp(row["img"])
    if row.get("mask"):
        changed["mask"] = str(Path(row["mask"]).with_suffix(".png"))
    if "objects" in row:
        changed["objects"] = [_scaled_object(found, scale) for found in row["objects"]]
    return changed


def _scaled_object(found: dict[str, Any], scale: np.ndarray) -> dict[str, Any]:
    across, down = float(scale[0]), float(scale[1])
    changed = {**found, "box": _scaled(found["box"], scale)}
    if "area" in found:
        changed["area"] = round(found["area"] * across * down, 1)
    if "border_pixels" in found:
        changed["border_pixels"] = round(found["border_pixels"] * (across + down) / 2)
    return changed


def _scaled(bbox_xywh: Any, scale: np.ndarray) -> list[float]:
    return [round(float(v), 2) for v in np.asarray(bbox_xywh) * scale]


def _scale_between(source: Path, packed: Path) -> np.ndarray:
    sizes = [_read(file, cv2.IMREAD_COLOR).shape[1::-1] for file in (source, packed)]
    return np.array([sizes[1][0] / sizes[0][0], sizes[1][1] / sizes[0][1]] * 2)


def _extent(mask: np.ndarray) -> np.ndarray | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _webp(name: str) -> str:
    return str(Path(name).with_suffix(".webp"))


def _encoded(suffix: str, image: np.ndarray) -> bytes:
    flags = [cv2.IMWRITE_WEBP_QUALITY, _QUALITY] if suffix == ".webp" else [
        cv2.IMWRITE_PNG_COMPRESSION, 9]  # fmt: skip
    is_written, content = cv2.imencode(suffix, image, flags)
    assert is_written
    return bytes(content)


def _read(file: Path, flags: int) -> np.ndarray:
    image = cv2.imread(str(file), flags)
    if image is None:
        raise DataError(f"{file}: expected a picture, got a file that does not decode, or none; "
                        "replace it")  # fmt: skip
    return image


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]


def _read_truth(file: Path) -> np.ndarray:
    rows = [line.replace(",", " ").split() for line in file.read_text().splitlines() if line]
    return np.array(rows, float)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file())


def main() -> None:
    args = _arguments()
    try:
        compare(args) if args.check else pack(args)
    except (EdgeTrackError, OSError) as error:
        sys.exit(f"pack_data.py: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path, help="training folder")
    parser.add_argument("output", type=Path, help="folder of the parts")
    parser.add_argument("--max-side", type=int, default=320, help="pixels; default 320")
    parser.add_argument("--part-mib", type=float, default=35, help="default 35")
    parser.add_argument("--pseudo-tracks", type=Path, help="tracks of edgetrack pseudolabel")
    parser.add_argument("--check", action="store_true", help="compare OUTPUT with DATA")
    return parser.parse_args()


if __name__ == "__main__":
    main()
