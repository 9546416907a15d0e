"""What the figures of a training step mean: memory beyond weights and optimiser state, time of one step."""

import json
import runpy
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from bertkd.bench import ddp, op_cases, step_cases, step_losses, step_models, step_runs
from bertkd.bench.children import pack
from bertkd.bench.contestants import IMPLS
from bertkd.bench.selection import Selection
from bertkd.bench.step_cases import Trainer, step_case


def test_no_gradients_of_the_last_step_are_in_the_baseline_of_memory():
    trainer = Trainer(step_case("tiny", 2, 16), "eager", torch.device("cpu"))
    trainer()
    assert trainer.optimizer.state
    assert all(p.grad is None for p in trainer.student.parameters())


def test_where_lengths_differ_the_time_is_that_of_one_step():
    case = step_case("tiny", 4, 32, padding="glue")
    settings = op_cases.Settings(
        torch.device("cpu"), Selection({"impl": ("eager",)}), IMPLS, 3, 5.0, weigh=False
    )
    rows = {row.metric: row for row in step_runs.run_step(case, settings)}
    trainer = Trainer(case, "eager", torch.device("cpu"))
    assert len(trainer.batches) == 4
    tokens_a_step = rows["throughput"].p50 * rows["time"].p50 / 1e3
    assert tokens_a_step == pytest.approx(trainer.tokens / 4, rel=0.01)


def test_a_profile_of_a_step_shows_its_parts(monkeypatch, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "profile_step.py"
    arguments = ["--pair", "tiny", "--batch", "2", "--length", "16", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    parts = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [name for name, *_ in parts] == [
        "teacher forward", "student forward", "both, and the loss", "whole step"
    ]  # fmt: skip
    assert all(float(wall) > 0 for _, wall, *_ in parts)


def test_a_trainer_matches_the_last_blocks_and_keeps_the_teacher_in_half_precision(monkeypatch):
    seen = []
    tiny = step_models.networks("tiny", torch.device("cpu"))
    monkeypatch.setattr(step_cases, "networks", lambda name, device: tiny)
    monkeypatch.setattr(step_losses, "eager", lambda *args: seen.append(args))
    case = step_case("minilm_l6_to_3", 1, 8, layers=2, dtype="bfloat16")
    Trainer(case, "eager", torch.device("cpu"))
    _, teacher, student, pairs = seen[0]
    assert pairs == list(step_models.PAIRS["minilm_l6_to_3"].blocks)[1:]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize("pair", ["tiny", "tiny_qkv"])
def test_nobodys_teacher_in_half_precision_runs_under_autocast(pair, impl, monkeypatch):
    seen = []
    networks = step_models.networks(pair, torch.device("cpu"))
    monkeypatch.setattr(step_cases, "networks", lambda name, device: networks)

    def watch(module, *_):
        autocast = torch.is_autocast_enabled("cpu")
        seen.append((module.word_embeddings.weight.dtype, autocast, torch.is_grad_enabled()))

    for model in networks:
        model.embeddings.register_forward_pre_hook(watch)
    trainer = Trainer(step_case(pair, 2, 12, dtype="bfloat16"), impl, torch.device("cpu"))
    trainer.loss(trainer.batches[0])
    assert seen == [(torch.bfloat16, False, False), (torch.float32, True, True)]


def test_a_student_with_dropout_is_compared_without_and_timed_with_it(monkeypatch):
    pair = replace(step_models.PAIRS["tiny"], dropout=0.5)
    monkeypatch.setitem(step_models.PAIRS, "tiny_dropout", pair)
    trainer = Trainer(step_case("tiny_dropout", 2, 12), "eager", torch.device("cpu"))
    first, second = (trainer.probe() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trainer.student.training
    batch = trainer.batches[0]
    assert trainer.loss(batch) != trainer.loss(batch)


def test_a_process_of_many_times_its_steps_and_counts_all_tokens(monkeypatch, capsys):
    """What ``run_ddp`` starts several of, as the only one of its group."""
    wrapped, threads = [], torch.get_num_threads()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in found.items():
        monkeypatch.setenv(name, value)

    class Counted(torch.nn.parallel.DistributedDataParallel):
        def forward(self, *args):
            wrapped.append(self)
            return super().forward(*args)

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Counted)
    case = step_case("tiny", 2, 8, processes=3)
    try:
        ddp._work(pack(case, "chunked", 2))
    finally:
        torch.set_num_threads(threads)
    answer = json.loads(capsys.readouterr().out)
    # A step that is not measured comes first.
    assert (len(answer["seconds"]), len(wrapped)) == (2, 3)
    assert answer["tokens"] == 3 * 2 * 8
