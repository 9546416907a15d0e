"""Networks under torch.compile: the same training, whole graphs, and none given up for their number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distiller import BOTH, gradients, models
from tiny_models import tiny_batch, tiny_model
from tiny_task import save_reviews, save_tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from bertkd.bench import op_cases, step_runs
from bertkd.bench.contestants import IMPLS
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import step_case
from bertkd.bench.step_models import PAIRS
from bertkd.capture import Capture
from bertkd.cli.main import main
from bertkd.compiling import compile_in_place, is_compiled
from bertkd.distiller import Distiller

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_a_compiled_distiller_trains_as_before():
    teacher, student = models("sequence")
    distiller = Distiller(teacher, student, f"{BOTH} + kd")
    batch, names = tiny_batch(teacher, labels=True), list(distiller.state_dict())
    want = distiller(batch).loss
    want.backward()
    expected = gradients(student)
    student.zero_grad()
    counter = CompileCounter()
    distiller.compile(backend=counter, fullgraph=True)
    got = distiller(batch).loss
    got.backward()
    assert counter.frame_count == 2
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(student), expected, rtol=1e-4, atol=1e-6)
    assert list(distiller.state_dict()) == names


def test_what_is_compiled_already_is_left():
    inner, outer = models()
    compile_in_place(inner, backend="eager")
    call = inner._compiled_call_impl
    wrapped = torch.compile(outer, backend="eager")
    compile_in_place(inner, wrapped, nn.DataParallel(outer), backend=CompileCounter())
    assert inner._compiled_call_impl is call
    assert outer._compiled_call_impl is not None


def test_more_ways_to_run_than_pytorch_keeps_graphs_for():
    model = tiny_model("bert")
    batch, counter = tiny_batch(model), CompileCounter()
    compile_in_place(model, backend=counter)
    ways = [(blocks, [state]) for blocks in ([0], [1], [0, 1]) for state in range(3)]
    for blocks, states in ways:
        Capture(model, blocks=blocks, states=states)(**batch)
    assert counter.frame_count == len(ways) > 8


@torch._dynamo.config.patch(recompile_limit=8)
def test_networks_that_their_user_compiled_may_have_as_many_graphs():
    # Few blocks, as every one is traced for every graph.
    teacher, student = tiny_model("bert"), tiny_model("bert", layers=1, seed=1)
    distiller = Distiller(teacher, student, BOTH, attention="keep")
    padded = [tiny_batch(teacher, length=length) for length in (6, 8, 12)]
    full = [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in padded]
    for model in (teacher, student):
        model.compile(backend="eager", fullgraph=True)
    # Beyond PyTorch's limit, which fullgraph makes an error.
    for mode in (True, False):
        distiller.train(mode)
        for batch in (*padded, *full):
            distiller(batch).loss.backward()
            with torch.no_grad():
                student(**batch)


def test_compiled_is_seen_through_wrappers():
    teacher, headed = models()[0], tiny_model("bert", head_cls="sequence")
    assert not is_compiled(teacher)
    assert is_compiled(torch.compile(teacher))
    assert not is_compiled(headed)
    assert is_compiled(torch.compile(headed))
    headed.bert.compile()
    assert is_compiled(headed)
    other = tiny_model("bert", head_cls="sequence")
    other.bert = torch.compile(other.bert)
    assert is_compiled(other)
    # As in DistributedDataParallel around a compiled model; this wrapper needs no process group.
    assert is_compiled(nn.DataParallel(torch.compile(teacher)))
    assert not is_compiled(nn.DataParallel(teacher))


@pytest.fixture
def counter(monkeypatch):
    """Stands in for Inductor, which takes a minute for what these tests are about."""
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compile_module(self, backend=counter, fullgraph=True)
    )
    return counter


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in next(folder.glob("1-*/history.jsonl")).open()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_command_line_compiles_what_it_trains(tmp_path, counter):
    model = save_tiny_model(tmp_path / "pretrained", layers=2)
    task = save_reviews(tmp_path / "reviews")
    config = Path(model, "config.json")
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | dropouts))
    fixed = ["--task", task, "--steps", "3", "--lr", "3e-3", "--log_with", "none"]
    fixed += ["--max_length", "16", "--batch_size", "16", "--eval_every", "1000"]
    teacher = str(tmp_path / "teacher" / "model")
    commands = {
        "teacher": ["finetune", "--model", model],
        "student": ["distill", "--teacher", teacher, "--layers", "[1]", "--objective", "att_kl+kd"],
    }
    for name, words in commands.items():
        assert main([*words, *fixed, "--output_dir", str(tmp_path / name)]) == 0
        assert not counter.frame_count
        compiled = tmp_path / f"{name}-compiled"
        assert main([*words, *fixed, "--torch_compile", "--output_dir", str(compiled)]) == 0
        assert counter.frame_count >= (2 if name == "student" else 1)
        assert losses(compiled) == pytest.approx(losses(tmp_path / name), rel=1e-4)
        counter.clear()
    assert "torch.compile" in (tmp_path / "student-compiled/model/README.md").read_text()


def test_a_step_of_compiled_networks_is_timed_against_compiled_eager(monkeypatch, counter):
    monkeypatch.setitem(PAIRS, "tiny_compiled", replace(PAIRS["tiny"], compiled=True))
    selection = Selection({"impl": ("eager", "chunked")})
    settings = op_cases.Settings(torch.device("cpu"), selection, IMPLS, 3, 0.1, weigh=False)
    rows = list(step_runs.run_step(step_case("tiny_compiled", 2, 16), settings))
    assert {(row.impl, row.metric, row.status) for row in rows} >= {
        ("eager", "time", "ok"),
        ("chunked", "speedup", "ok"),
    }
    # Teacher and student, of each of the two.
    assert counter.frame_count >= 4
