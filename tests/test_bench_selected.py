"""A selection runs what it names, and nothing for nobody."""

import pytest
import torch

from bertkd.bench import op_cases, runner, step_runs
from bertkd.bench.cases import attention
from bertkd.bench.ops import SPECS
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import step_case
from bertkd.bench.step_models import PAIRS

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("select", "kinds", "ops"),
    [
        ("mode=step", {"step", "scaling"}, set(PAIRS)),
        ("mode=fwd", {"op", "scaling"}, set(SPECS)),
        ("impl=sdpa", {"op"}, {"self_attention", "window_self_attention"}),
        ("impl=liger", {"op"}, {"softmax_kl", "linear_kl"}),
    ],
)
def test_no_case_is_run_that_nobody_takes_part_in(select, kinds, ops):
    cases = runner.plan(runner.Options(select, "cpu")).cases
    assert {case.kind for case in cases} == kinds
    assert {case.op for case in cases} <= ops
    with pytest.raises(ValueError, match="leaves no case"):
        runner.plan(runner.Options("impl=products,mode=fwd", "cpu"))


@pytest.mark.parametrize(
    ("case", "run", "module"),
    [
        (attention("relation_kl", (2, 2, 12, 8), "float32"), op_cases.run_case, op_cases),
        (step_case("tiny", 2, 12), step_runs.run_step, step_runs),
    ],
)
def test_a_baseline_that_nobody_asked_for_is_not_timed_by_itself(case, run, module, monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("it was timed"))
    impls = ("eager", "triton")
    settings = op_cases.Settings(CPU, Selection({"impl": ("triton",)}), impls, 3, 0.1, weigh=False)
    assert {(row.impl, row.status) for row in run(case, settings)} == {("triton", "unavailable")}
