"""The plan of a distillation, and the example that hands a Distiller to the Trainer."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_batch, tiny_model, tiny_pair

from bertkd import encoders
from bertkd.distiller import Distiller


def test_plan_counts_parameters_and_bytes():
    teacher, student = tiny_pair(hidden=16)
    distiller = Distiller(teacher, student, "att_kl + 0.5*hid_seq + qkv_kl")
    plan = distiller.plan(batch_size=2, length=10)
    assert plan.teacher_parameters == sum(p.numel() for p in teacher.parameters())
    assert plan.student_parameters == sum(p.numel() for p in student.parameters())
    assert plan.objective_parameters == 2 * (16 * 32 + 32)
    assert [t.weight for t in plan.terms] == [1.0, 0.5, 1.0]
    assert [t.layer_map for t in plan.terms] == ["0:1,1:3", "1:2,2:4", "1:3 in 2 heads"]
    one_map = 4 * 2 * 4 * 10 * 10  # float32, batch, heads, length squared
    att_kl, hid_seq, _ = plan.terms
    assert att_kl.naive_bytes == (4 + 2) * one_map + 2 * 2 * one_map
    # Pairs, then float32 q and k of (2, 10) tokens: the teacher's, and the student's gradients.
    assert att_kl.fused_bytes == 2 * 4 * 2 * (2 * 10) * (32 + 16)
    assert hid_seq.naive_bytes == 2 * 10 * 32 * (5 + 2) * 4
    assert hid_seq.fused_bytes == 2 * 2 * 10 * (32 + 16) * 4
    table = str(plan).splitlines()
    assert any("of terms on states 0 is the embedding output" in line for line in table)
    assert table[0] == "objective  att_kl + 0.5*hid_seq + qkv_kl"
    assert any(line.split()[:3] == ["hid_seq", "0.5", "1:2,2:4"] for line in table)
    assert max(map(len, table)) <= 110


def test_pairs_that_all_terms_share_are_of_blocks_and_a_terms_own_of_states():
    objective = "att_kl + hid_seq + hid_cls + hid_cos + hid_cos(map='0:0,2:4')"
    uniform, explicit, array = (
        [
            term.layer_map
            for term in Distiller(*tiny_pair(), objective, layer_map=pairs).plan().terms
        ]
        for pairs in ("uniform", "0:1,1:3", np.array([[0, 1], [1, 3]]))
    )
    assert explicit == ["0:1,1:3", "1:2,2:4", "1:2,2:4", "1:2,2:4", "0:0,2:4"]
    assert uniform == array == explicit
    with pytest.raises(ValueError, match=r"term hid_seq: .*teacher block 4 is out of range"):
        Distiller(*tiny_pair(), "hid_seq", layer_map="0:1,1:4")


def test_fused_bytes_grow_with_length_and_naive_ones_with_its_square():
    teacher, student = tiny_pair()
    distiller = Distiller(teacher, student, "att_kl + val_kl + qkv_kl + att_pearson")
    short, long = (distiller.plan(8, length).terms for length in (60, 120))
    for a, b in zip(short, long, strict=True):
        assert b.naive_bytes == 4 * a.naive_bytes
        assert b.fused_bytes == 2 * a.fused_bytes
        assert b.fused_bytes < b.naive_bytes


@pytest.mark.parametrize("sizes", [(0, 8), (2, 0), (2, 2.5), (2, 131)])
def test_plan_refuses_sizes_that_cannot_be(sizes):
    with pytest.raises((TypeError, ValueError), match=r"batch_size|length"):
        Distiller(*tiny_pair(), "att_kl").plan(*sizes)


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "hf_trainer.py"
    spec = importlib.util.spec_from_file_location("hf_trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_example_says_what_it_wants(example, monkeypatch):
    monkeypatch.setattr("sys.argv", [example.__file__])
    with pytest.raises(SystemExit, match="TEACHER OUTPUT_DIR TEXTS"):
        runpy.run_path(example.__file__, run_name="__main__")


def test_the_trainer_example_resumes_bitwise_and_loads_the_best(example, tmp_path):
    from transformers import TrainingArguments

    batch = tiny_batch(tiny_pair()[0], batch=8, padding=None)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(8)]

    def trainer(steps, **options):
        # hid_seq with widths that differ trains a projection.
        teacher, student = tiny_pair()[0], tiny_model("bert", layers=2, hidden=16, seed=1)
        arguments = {
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return example.DistillTrainer(
            Distiller(teacher, student, "hid_seq"),
            TrainingArguments(str(tmp_path), **arguments | options),
            train_dataset=rows,
            eval_dataset=rows,
        )

    straight = trainer(4)
    straight.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    ours, theirs = (x.model.state_dict() for x in (resumed, straight))
    assert any(name.startswith("objective") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    best = trainer(
        6, learning_rate=0.5, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    best.train()
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric)


def test_gradient_checkpointing_changes_nothing_but_memory(example, tmp_path):
    from transformers import TrainingArguments

    batch = tiny_batch(tiny_pair()[0], batch=4, padding=None)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    trained, recomputed = [], []
    for checkpointing in (False, True):
        teacher, student = tiny_pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        block = encoders.block_list(student)[0]
        forward, calls = block.attention.forward, []
        block.attention.forward = lambda *a, run=forward, n=calls, **k: n.append(1) or run(*a, **k)
        example.DistillTrainer(
            Distiller(teacher, student, "att_kl + hid_seq"),
            TrainingArguments(
                str(tmp_path),
                max_steps=2,
                gradient_checkpointing=checkpointing,
                optim="sgd",
                learning_rate=0.01,
                per_device_train_batch_size=2,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
        ).train()
        trained.append(student.state_dict())
        recomputed.append(len(calls))
    assert recomputed == [2, 4]
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", ["neftune_noise_alpha", "label_smoothing_factor"])
def test_the_trainer_example_refuses_what_it_would_ignore(example, option, tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **{option: 0.1})
    with pytest.raises(ValueError, match=f"{option} has no use here"):
        example.DistillTrainer(Distiller(*tiny_pair(), "att_kl"), arguments)


def test_the_trainer_example_keeps_columns_and_saves_a_plain_student(example, tmp_path):
    from transformers import AutoModel, TrainingArguments

    teacher, student = tiny_pair()
    batch = tiny_batch(teacher, batch=4, padding=None)
    rows = [
        {**{k: v[i] for k, v in batch.items()}, "index": torch.tensor(i), "title": "x"}
        for i in range(4)
    ]
    trainer = example.DistillTrainer(
        Distiller(teacher, student, "hid_seq + hid_cls_contrast", num_examples=4),
        TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            logging_steps=1,
            save_steps=2,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    assert {"term/hid_seq", "term/hid_cls_contrast"} <= set(trainer.state.log_history[0])
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "student"))
    for directory in ("student", "checkpoint-2"):
        loaded = AutoModel.from_pretrained(tmp_path / directory)
        assert encoders.describe(loaded).num_blocks == 2
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, student.state_dict()[name])
