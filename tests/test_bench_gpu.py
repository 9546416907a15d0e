"""The benchmark on a GPU: run by `make gpu`."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from bertkd.bench import op_cases, step_runs
from bertkd.bench.cases import Case, attention
from bertkd.bench.contestants import IMPLS
from bertkd.bench.roofline import MeasuredCeilings
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import step_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SELECTION = Selection({"impl": ("eager", "chunked", "triton")})


def settings():
    device = torch.device("cuda")
    return op_cases.Settings(device, SELECTION, IMPLS, 5, 2.0, ceilings=MeasuredCeilings(device))


@pytest.mark.parametrize(
    "case",
    [
        attention("relation_kl", (4, 4, 96, 64), "bfloat16", padding="glue"),
        attention("attention_mse", (4, 4, 96, 64), "float16"),
        Case("linear_kl", width_s=64, width_t=64, rows=256, classes=1000, dtype="bfloat16"),
    ],
    ids=lambda case: case.op,
)
def test_cases_are_replayed_from_graphs_and_weighed(case):
    rows = list(op_cases.run_case(case, settings()))
    eager = {(r.mode, r.metric): r for r in rows if r.impl == "eager"}
    for mode in ("fwd", "fwd_bwd"):
        assert eager[mode, "time"].status == "ok", eager[mode, "time"]
        assert eager[mode, "time"].note == "cuda graph"
        # The least work cannot take longer than the measurement: a clock that stopped early would.
        assert 0 < eager[mode, "roofline"].p50 < 1
    assert eager["fwd_bwd", "memory"].p50 > 0
    assert any(r.impl in ("chunked", "triton") and r.metric == "speedup" for r in rows)
    assert not [r for r in rows if r.status in ("red", "error")]


def test_a_step_runs_under_autocast():
    rows = list(step_runs.run_step(step_case("tiny", 4, 32, dtype="bfloat16"), settings()))
    assert not [r for r in rows if r.status in ("red", "error")], rows
    assert {r.metric for r in rows if r.impl == "eager"} >= {"time", "throughput", "memory"}


def test_a_steps_profile_names_our_kernels(monkeypatch, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "profile_step.py"
    arguments = ["--pair", "tiny", "--batch", "4", "--length", "32", "--impl", "triton"]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "whole step" in printed
    assert "relation_kl_short_kernel" in printed
