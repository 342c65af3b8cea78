"""One slice of a long training run: go on where the last slice stopped, stop when the time is over.

    python benchmarks/gpu/train.py --pack PARTS --recipe NAME --output DIR --seconds 540
    python benchmarks/gpu/train.py --join DIR --output RUN

``--output`` gets the checkpoint in parts, ``slice.json`` (which lists them, and says how fast the
slice was), the log, the recipe and the provenance: few files, none of them large, that can be
fetched from a machine that is about to go away. The next slice takes them from ``--output`` or from
``--work``, whichever is further on. ``--join`` makes a run's folder of them, for ``edgetrack
export``. Step by step: README.md beside this file.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import MIB, PARTS_NAME, PSEUDO_NAME, join, read_list, split, unpack

from edgetrack.errors import BackendUnavailableError, CheckpointError, EdgeTrackError

CHECKPOINT, SLICE, LOG, PICTURE = "checkpoint.pt", "slice.json", "log.jsonl", "training.png"
KEPT = (LOG, "provenance.json", "recipe.json", PICTURE)
MEASURED = "measured.json"
_BYTES_PER_PARAMETER = 16  # weights, their average, and two moments, float32 each
_GRACE_S = 40.0
_PRINT_EVERY_S = 10.0


def run_slice(args: argparse.Namespace) -> int:
    """Train for a while in processes of their own, and write what is reached to the output."""
    from edgetrack.train.recipes import get_recipe

    started = time.monotonic()
    recipe = get_recipe(args.recipe)
    _check_room(recipe, args)
    run = args.work / args.recipe
    data = _unpacked(args.pack, args.work)
    resume([args.output, args.work], run, recipe_name=args.recipe)
    before = position(run)
    (args.work / MEASURED).unlink(missing_ok=True)
    code = train_in_processes(args, data, seconds=args.seconds - (time.monotonic() - started))
    after = position(run)
    if code not in (0, 130) and after == before:
        return code  # the process has said why
    if after == (0, 0):
        raise CheckpointError(
            f"{run}: expected a first step within {args.seconds:g} s, got none; raise --seconds"
        )
    stages = recipe.stages
    seen = [_samples(reached, stages) for reached in (before, after)]
    report = {
        "recipe": args.recipe,
        "is_done": after == (len(stages), stages[-1].num_steps),
        "stage": after[0],
        "step": after[1],
        "num_steps": stages[after[0] - 1].num_steps,
        "samples": seen[1] - seen[0],
        "samples_in_all": seen[1],
        "samples_to_do": sum(s.num_steps * s.batch_size for s in stages) - seen[1],
        "seconds": round(time.monotonic() - started, 1),
        "samples_per_s": _speed(run / LOG, before),
        "processes": args.processes,
    }
    if (args.work / MEASURED).is_file():
        report |= json.loads((args.work / MEASURED).read_text("utf-8"))
    write_back(run, args.output, report, part_bytes=int(args.part_mib * MIB))
    print(json.dumps(report, indent=1))
    print(
        f"done; next: train.py --join {args.output} --output RUN"
        if report["is_done"]
        else f"stage {after[0]}, step {after[1]} of {report['num_steps']}: the same command goes on"
    )
    return 0 if code in (0, 130) else code


def train_in_processes(args: argparse.Namespace, data: Path, *, seconds: float) -> int:
    """Train in other processes until they are done, one fails, or the time is over.

    The first process alone is interrupted: the others then wait for it in the next step, so it
    keeps a checkpoint of a whole one.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--train-on", str(data)]
    running = [
        subprocess.Popen(command, env=environment, start_new_session=True)
        for environment in _environments(args.processes)
    ]
    first, *others = running
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and first.poll() is None:
            if any(process.poll() for process in others):
                break
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("train.py: interrupted; writing what is reached", file=sys.stderr)
    try:
        if first.poll() is None:
            first.send_signal(signal.SIGINT)
        return first.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        print(f"train.py: no end after {_GRACE_S:g} s; ended", file=sys.stderr)
        return 1
    finally:
        for process in running:
            process.kill()
            process.wait()


def train_here(args: argparse.Namespace) -> int:
    """What each of these processes does."""
    import torch

    from edgetrack.bundle import Bundle
    from edgetrack.data.layouts import FOLDER
    from edgetrack.train.recipes import get_recipe
    from edgetrack.train.run import run_recipe

    is_first = os.environ.get("RANK", "0") == "0"
    has_counter = torch.cuda.is_available() and importlib.util.find_spec("pynvml") is not None
    busy: list[float] = []
    is_over = threading.Event()
    started = time.monotonic()
    times = {"reading": 0.0, "printed": 0.0}

    def watch() -> None:
        while not is_over.wait(1.0):
            busy.append(torch.cuda.utilization() / 100)

    watcher = threading.Thread(target=watch, daemon=True)

    def show_reading(name: str, num_done: int, num_parts: int) -> None:
        times["reading"] = time.monotonic() - started

    def show(progress: Any) -> None:
        if has_counter and not watcher.is_alive():
            watcher.start()
        if time.monotonic() - times["printed"] > _PRINT_EVERY_S:
            times["printed"] = time.monotonic()
            terms = "  ".join(f"{k} {v:.3f}" for k, v in sorted(progress.terms.items())
                              if k == "loss" or k.startswith("iou"))  # fmt: skip
            print(f"stage {progress.stage} {progress.step}/{progress.num_steps}  {terms}  "
                  f"{progress.samples_per_s:.0f}/s", file=sys.stderr, flush=True)  # fmt: skip

    tracks = args.train_on / PSEUDO_NAME
    try:
        run_recipe(
            get_recipe(args.recipe),
            [(FOLDER, args.train_on)],
            args.work / args.recipe,
            stem=args.stem,
            start=None if args.start is None else Bundle.load(args.start),
            pseudo_tracks=tracks if tracks.is_file() else None,
            is_compiled=args.is_compiled,
            on_reading=show_reading,
            on_progress=show,
        )
    except BackendUnavailableError as error:
        print(f"train.py: no {PICTURE}: {error}", file=sys.stderr)  # the training itself is done
    finally:
        is_over.set()
        if is_first:
            is_gpu = torch.cuda.is_available()
            content = {
                "device": torch.cuda.get_device_name() if is_gpu else "CPU",
                "gpu_busy": round(sum(busy) / len(busy), 3) if busy else None,
                "peak_memory_mib": round(torch.cuda.max_memory_allocated() / MIB)
                if is_gpu
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "reading_s": round(times["reading"], 1),
                "torch": torch.__version__,
            }
            (args.work / MEASURED).write_text(json.dumps(content), "utf-8")
    return 0


def resume(sources: Sequence[Path], run: Path, *, recipe_name: str) -> None:
    """Bring the checkpoint that is furthest on into the run's folder, if it is not there.

    Raises:
        CheckpointError: The parts are of another recipe, or lack their list.
        DataError: A part is missing or damaged.
    """
    best = position(run)
    for source in sources:
        content = read_slice(source)
        if content is None:
            continue
        if content["recipe"] != recipe_name:
            raise CheckpointError(f"{source}: expected slices of {recipe_name}, got some of "
                                  f"{content['recipe']}; name another folder")  # fmt: skip
        if (content["stage"], content["step"]) > best:
            join_run(source, content, run)
            best = content["stage"], content["step"]


def read_slice(folder: Path) -> dict[str, Any] | None:
    """What a slice wrote about itself; nothing if no slice wrote there.

    Raises:
        CheckpointError: It is damaged, or there are parts without it.
    """
    file = folder / SLICE
    if not file.is_file():
        if any(folder.glob(f"{CHECKPOINT}.part*")):
            raise CheckpointError(f"{file}: expected it beside the parts, got none: the slice was "
                                  "cut off; fetch it again, or delete the parts")  # fmt: skip
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        names = [part["name"] for part in content["checkpoint"]]
        if any(Path(name).name != name for name in names) or not names:
            raise ValueError(f"parts {names}")
        (content["recipe"], int(content["stage"]), int(content["step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: expected what train.py writes, got: {error!r}; fetch it again"
        ) from error
    return content


def join_run(folder: Path, content: dict[str, Any], run: Path) -> None:
    """Make a run's folder of what a slice wrote.

    Raises:
        DataError: A part is missing or damaged.
    """
    run.mkdir(parents=True, exist_ok=True)
    join(folder, content["checkpoint"], run / CHECKPOINT)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, run / name)


def write_back(run: Path, output: Path, report: dict[str, Any], *, part_bytes: int) -> None:
    """Write a run in few files; ``slice.json`` comes last."""
    output.mkdir(parents=True, exist_ok=True)
    (output / SLICE).unlink(missing_ok=True)
    parts = split(run / CHECKPOINT, output, part_bytes=part_bytes)
    for name in KEPT:
        if (run / name).is_file():
            shutil.copyfile(run / name, output / name)
    content = json.dumps({**report, "checkpoint": parts}, indent=1)
    (output / SLICE).write_text(content + "\n", "utf-8")


def position(run: Path) -> tuple[int, int]:
    """Stage and step of a run's checkpoint; zeros if there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    from edgetrack.train.checkpoints import read_checkpoint

    if not (run / CHECKPOINT).is_file():
        return 0, 0
    saved = read_checkpoint(run)
    return saved["stage"], saved["step"]


def _check_room(recipe: Any, args: argparse.Namespace) -> None:
    num_parts = args.max_files - len(KEPT) - 1
    size = _BYTES_PER_PARAMETER * sum(p.numel() for p in recipe.create_model().parameters())
    if size > num_parts * args.part_mib * MIB:
        raise ValueError(
            f"--max-files: expected room for a checkpoint of {size / MIB:.0f} MiB, got "
            f"{num_parts} parts of {args.part_mib:g} MiB; raise --max-files or --part-mib"
        )


def _unpacked(pack: Path, work: Path) -> Path:
    """The training folder that the parts hold; unpacked once."""
    read_list(pack)
    listed, mark, data = (pack / PARTS_NAME).read_text("utf-8"), work / PARTS_NAME, work / "data"
    if not data.is_dir() or not mark.is_file() or mark.read_text("utf-8") != listed:
        work.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        unpack(pack, data)
        mark.write_text(listed, "utf-8")
    return data


def _environments(num_processes: int) -> list[dict[str, str]]:
    if num_processes == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
    }
    return [{**shared, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(num_processes)]


def _samples(reached: tuple[int, int], stages: Sequence[Any]) -> int:
    stage, step = reached
    done = sum(s.num_steps * s.batch_size for s in stages[: max(stage - 1, 0)])
    return done + (step * stages[stage - 1].batch_size if stage else 0)


def _speed(log: Path, since: tuple[int, int]) -> float | None:
    """Samples per second over the reports after a position; their first steps included."""
    samples, seconds, last = 0.0, 0.0, since
    for line in log.read_text("utf-8").splitlines() if log.is_file() else ():
        entry = json.loads(line)
        here = entry["stage"], entry["step"]
        if here > last:
            steps = here[1] - (last[1] if last[0] == here[0] else 0)
            count = steps * entry["samples"] / entry["step"]
            samples, seconds, last = samples + count, seconds + count / entry["samples_per_s"], here
    return round(samples / seconds, 1) if seconds else None


def join_for_export(args: argparse.Namespace) -> int:
    """Turn what a slice wrote into a run's folder."""
    from edgetrack.viz import plot_training

    content = read_slice(args.join)
    if content is None:
        raise CheckpointError(f"{args.join}: expected what a slice wrote, got no {SLICE}")
    join_run(args.join, content, args.output)
    if content.get("is_done") and not (args.output / PICTURE).is_file():
        plot_training(args.output / LOG, args.output / PICTURE)
    where = f"stage {content['stage']}, step {content['step']}"
    print(f"{args.output}: {'done' if content.get('is_done') else f'not done, at {where}'}; next: "
          f"edgetrack export {args.output} --output BUNDLE")  # fmt: skip
    return 0


def main() -> None:
    args = _arguments()
    if args.join is None:
        # What ends a slice from outside must not lose it; a shell's background jobs ignore Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
    job = join_for_export if args.join else train_here if args.train_on else run_slice
    try:
        sys.exit(job(args))
    except (EdgeTrackError, ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pack", type=Path, help="folder that pack_data.py wrote")
    parser.add_argument("--recipe", help="name, as for edgetrack train")
    parser.add_argument("--output", type=Path, required=True, help="what is to be fetched")
    parser.add_argument("--seconds", type=float, default=540, help="of the slice; default 540")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="default runs/gpu")
    parser.add_argument("--start", type=Path, help="bundle whose weights to start from")
    parser.add_argument("--stem", type=Path, help="pretrained stem, .npz")
    parser.add_argument("--processes", type=int, default=1, help="one GPU or core each")
    parser.add_argument("--compile", action="store_true", dest="is_compiled")
    parser.add_argument("--part-mib", type=float, default=15, help="default 15")
    parser.add_argument("--max-files", type=int, default=8, help="in the output; default 8")
    parser.add_argument("--join", type=Path, help="make a run's folder of this output instead")
    parser.add_argument("--train-on", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.join is None and (args.pack is None or args.recipe is None):
        parser.error("expected --pack and --recipe, or --join")
    return args


if __name__ == "__main__":
    main()
