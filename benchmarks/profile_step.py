"""Where a training step's time goes: what the host takes to launch each part, what the GPU works, kernel by kernel.

    python benchmarks/profile_step.py [--pair bert_base_to_6] [--batch 32] [--length 512] [--dtype bfloat16]
                                      [--impl triton] [--device cuda] [--top 25]

A part whose host time is close to its wall time is late because of the host: faster kernels would not help it. Parts
run one after another here, each waited for, so their walls add up to more than a step. On a CPU, where nothing runs
beside the host, only walls are shown. The pairs of networks are those of the benchmark's steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bertkd.bench.contestants import OURS
from bertkd.bench.environment import find_device
from bertkd.bench.step_cases import Trainer, step_case
from bertkd.bench.step_models import PAIRS
from bertkd.study.table import Table

ROUNDS, PROFILED = 9, 3


def parts_of(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """The step and what it consists of, each to be called by itself."""
    distiller, batch = trainer.distiller, trainer.batches[0]
    assert distiller is not None
    needs = distiller.objective.needs()
    inputs, has_pads = distiller._inputs(batch)

    def teacher() -> None:
        with trainer.precision():
            distiller._record_teacher(inputs, needs, has_pads)

    def student() -> None:
        wanted = needs.student_blocks, needs.student_states, needs.student_logits
        with trainer.precision():
            distiller._record(distiller.student, inputs, *wanted, has_pads=has_pads)

    return {
        "teacher forward": teacher,
        "student forward": student,
        "both, and the loss": lambda: trainer.loss(batch),
        "whole step": trainer,
    }


def timed(run: Callable[[], object], wait: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds until ``run`` returns, and until the device is done."""
    host, wall = [], []
    for number in range(-2, ROUNDS):
        wait()
        start = time.perf_counter()
        run()
        returned = time.perf_counter()
        wait()
        if number >= 0:
            host.append(1e3 * (returned - start))
            wall.append(1e3 * (time.perf_counter() - start))
    return statistics.median(host), statistics.median(wall)


def kernels_of(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Calls of every kernel, and its milliseconds, in one run."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name][0] += 1
            sums[event.name][1] += event.device_time / 1e3
    return {
        name: (round(calls / PROFILED), time_ / PROFILED) for name, (calls, time_) in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=PAIRS, default="bert_base_to_6")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--impl", choices=("auto", *OURS), default="auto")
    parser.add_argument("--device")
    parser.add_argument("--top", type=int, default=25, help="kernels to list")
    options = parser.parse_args()
    device = find_device(options.device)
    on_gpu = device.type == "cuda"
    case = step_case(options.pair, options.batch, options.length, dtype=options.dtype)
    trainer = Trainer(case, options.impl, device)
    table = Table(["part", "wall ms", "host ms", "GPU ms", "kernels"])
    kernels: dict[str, tuple[int, float]] = {}
    for name, run in parts_of(trainer).items():
        host, wall = timed(run, torch.cuda.synchronize if on_gpu else lambda: None)
        if not on_gpu:
            table.add(name, f"{wall:.2f}", "-", "-", "-")
            continue
        kernels = kernels_of(run)
        busy, calls = sum(t for _, t in kernels.values()), sum(n for n, _ in kernels.values())
        table.add(name, f"{wall:.2f}", f"{host:.2f}", f"{busy:.2f}", str(calls))
    print(f"{case.name}, impl={options.impl}, {device}\n\n{table.text()}")
    if kernels:
        print("\nkernels of the whole step, ms and calls:")
    for name, (calls, time_) in sorted(kernels.items(), key=lambda x: -x[1][1])[: options.top]:
        print(f"{time_:8.3f} {calls:4d}  {name[:140]}")


if __name__ == "__main__":
    main()
