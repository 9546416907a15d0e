"""Killed at any moment and resumed, a run ends bitwise where the uninterrupted one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bertkd.training import checkpoint

TIMES = ("seconds", "examples_per_second")


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    victim = Path(__file__).with_name("training_victim.py")
    on_cpu = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, victim, tmp_path, "0"], check=True, timeout=300, env=on_cpu)

    kills = json.loads((tmp_path / "report.json").read_text())["kills"]
    assert len(kills) == 8, kills
    assert len(set(kills.values())) >= 3  # at different places of the run

    ends = []
    for name in ("straight", "killed"):
        folder = tmp_path / name
        steps = checkpoint.checkpoints(folder)
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        rows = [{key: row[key] for key in row if key not in TIMES} for row in rows]
        ends.append((list(steps), rows, checkpoint.read(steps[max(steps)])))
        assert not list(folder.glob(".*"))  # nothing half-written is left

    (steps, rows, straight), (killed_steps, killed_rows, killed) = ends
    assert steps == killed_steps
    assert rows == killed_rows
    assert len([row for row in rows if "eval_accuracy" in row]) >= 4
    for file, tensors in straight.tensors.items():
        assert tensors.keys() == killed.tensors[file].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, killed.tensors[file][key]), f"{file}: {key}"
    assert straight.documents["rng"] == killed.documents["rng"]
