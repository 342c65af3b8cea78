"""How many training pairs per second are planned and rendered, and how busy that keeps a GPU.

    python benchmarks/bench_sampling.py --data FOLDER [--model M] [--threads N]

Planning is NumPy in one thread; rendering runs on the GPU if there is one. There, the busy share is
the time of all kernels of training steps of the model (its final exit alone) over the time that the
steps take, with planning one batch ahead.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from edgetrack.backends.ort import cpu_name
from edgetrack.data.folder import read_training_pack
from edgetrack.models.registry import create_model
from edgetrack.train.sampling import PairSampler

BATCH_SIZES = (64, 512)
WARM_UP = 3


def seconds_of(work: Callable[[int], object], *, repeats: int) -> float:
    """Median time of ``work(step)``, the device's part included."""
    times = []
    for step in range(WARM_UP + repeats):
        start = time.perf_counter()
        work(step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def training_steps(sampler: PairSampler, model_name: str, *, num_steps: int) -> Iterator[int]:
    """Run training steps; yields before each."""
    model = create_model(model_name).to(sampler.device)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, batch in enumerate(sampler.batches(0, num_steps)):
        yield step
        with torch.autocast(sampler.device.type, torch.bfloat16):
            state = model.embed_template(batch["template"], batch["template_bbox_cxcywh"])
            state["search_region"] = batch["search_region"]
            for index in range(model.num_exits):
                state |= model.run_trunk(index, state)
            logits = model.exit_logits(model.num_exits - 1, state)
            loss = sum(part.float().square().mean() for part in logits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def busy_share(sampler: PairSampler, model_name: str, *, repeats: int) -> float:
    """Time of all kernels of training steps over the time of the steps."""
    steps = training_steps(sampler, model_name, num_steps=WARM_UP + repeats)
    for _ in range(WARM_UP):
        next(steps)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in steps:
            pass
        torch.cuda.synchronize()
    passed_s = time.perf_counter() - start
    return sum(e.self_device_time_total for e in profiled.key_averages()) * 1e-6 / passed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="early_exit_vit-tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    has_gpu = torch.cuda.is_available()
    pack, crops = read_training_pack(args.data), create_model(args.model).crops
    report = {
        "device": torch.cuda.get_device_name() if has_gpu else cpu_name(),
        "threads": args.threads,
        "crops_px": [crops.template_size_px, crops.search_size_px],
        "rows": [],
    }
    for batch_size in BATCH_SIZES:
        sampler = PairSampler(
            pack, crops=crops, seed=0, batch_size=batch_size, device="cuda" if has_gpu else "cpu"
        )
        plan_s = seconds_of(sampler.plan, repeats=args.repeats)
        planned = sampler.plan(0)
        render_s = seconds_of(lambda _, s=sampler, p=planned: s.render(p), repeats=args.repeats)
        row = {
            "batch_size": batch_size,
            "planned_pairs_per_s": round(batch_size / plan_s, 1),
            "rendered_pairs_per_s": round(batch_size / render_s, 1),
        }
        if has_gpu:
            share = busy_share(sampler, args.model, repeats=args.repeats)
            row["busy_share_of_a_training_step"] = round(share, 3)
        report["rows"].append(row)
        print(row)
    name = "cuda" if has_gpu else "cpu"
    path = Path(__file__).parent / "results" / f"sampling-{name}-torch-fp32.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
