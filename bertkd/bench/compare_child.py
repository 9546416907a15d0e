"""One process of a comparison: time one case of one tree and print the median as JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

import bertkd
from bertkd.bench.children import unpack
from bertkd.bench.contestants import loss_of, step, why_not
from bertkd.bench.op_cases import Settings, make_inputs, times_of
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import Trainer
from bertkd.bench.timing import interleaved
from bertkd.bench.verify import Oracle


def work(tree: str, job: str) -> None:
    """Print ``{"seconds": median}``, or ``{"reason": ...}`` where the tree cannot run the case.

    Raises:
        RuntimeError: the library was not imported from ``tree``.
    """
    if Path(tree).resolve() not in Path(bertkd.__file__).resolve().parents:
        raise RuntimeError(f"bertkd was imported from {bertkd.__file__}, not from {tree}")
    case, impl, mode, rounds, device_name = unpack(job)
    device = torch.device(device_name)
    reason = why_not(impl, case, device, mode) if mode != "step" else None
    if reason is not None:
        print(json.dumps({"reason": reason}))
        return
    if mode == "step":
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        run = {impl: Trainer(case, impl, device)}
        times = interleaved(run, rounds=rounds, warmup=2, synchronise=wait)[impl]
    else:
        inputs, loss = make_inputs(case, device), loss_of(impl, case.op)
        wrong = Oracle(case.op, inputs).judge(impl, loss, mode).wrong
        if wrong is not None:
            print(json.dumps({"reason": wrong, "red": True}))
            return
        settings = Settings(device, Selection(), (impl,), rounds=rounds)
        runs = {impl: step(impl, case.op, loss, mode)}
        times = times_of(case, inputs, runs, settings)[0][impl]
    print(json.dumps({"seconds": statistics.median(times)}))
