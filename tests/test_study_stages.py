"""Stages with progress, curves and costs, and the models and tokenizers that commands load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_task import save_reviews, save_tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from bertkd.study.costs import measure_costs, measure_loss_memory
from bertkd.study.models import load_model, load_tokenizer, saved_head
from bertkd.study.stages import loss_curves, score_curves, ticking
from bertkd.study.workload import load_workload


def test_ticking_counts_batches_and_lets_go():
    module, seen = nn.Linear(2, 2), []
    with ticking(module, 4, lambda fraction, note: seen.append((fraction, note)), start=1):
        for _ in range(2):
            module(torch.zeros(1, 2))
    module(torch.zeros(1, 2))
    assert seen == [(0.5, "step 2 of 4"), (0.75, "step 3 of 4")]


def test_curves_from_a_history():
    history = [
        {
            "step": 5,
            "epoch": 0.1,
            "lr": 1e-3,
            "kd": 2.0,
            "loss": 2.0,
            "grad_norm": 1.0,
            "seconds": 3,
        },
        {"step": 10, "epoch": 0.2, "eval_mrr": 0.4},
        {"step": 10, "epoch": 0.2, "lr": 1e-3, "kd": None, "loss": None, "grad_norm": None},
        {"step": 15, "epoch": 0.3, "lr": 1e-3, "kd": 1.0, "loss": 1.0, "grad_norm": 1.0},
    ]
    assert loss_curves(history) == {"kd": ([5, 15], [2.0, 1.0])}
    assert score_curves(history) == {"mrr": ([10], [0.4])}


def test_fused_loss_needs_less_memory_at_length_512():
    found = measure_loss_memory(1, 12, 512, 64)
    # Eager builds several maps of 12 * 512 * 512 floats.
    assert found.eager > 3 * 12 * 512 * 512 * 4
    assert found.fused < found.eager / 4


def test_costs_count_what_is_there(tmp_path):
    teacher, student = tiny_model("bert", layers=4), tiny_model("bert", layers=2)
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "m"), "model")
    costs = measure_costs(teacher, student, tokenizer, ["a film", "the plot"], rounds=3)
    assert costs.blocks == {"teacher": 4, "student": 2}
    assert costs.parameters["student"] == sum(p.numel() for p in student.parameters())
    assert costs.latency_batch == 2
    ratio = costs.latency.seconds["teacher"] / costs.latency.seconds["student"]
    assert costs.speedup == pytest.approx(ratio)


def test_models_are_loaded_or_refused_by_name(tmp_path):
    path = save_tiny_model(tmp_path / "model", layers=2, head_cls="sequence")
    assert saved_head(path, "model") == "labels"
    assert saved_head(save_tiny_model(tmp_path / "bare", layers=2), "model") is None
    assert load_model(path, "model").config.num_hidden_layers == 2
    assert load_model(path, "model", "labels", num_labels=3).config.num_labels == 3
    with pytest.raises(ValueError, match=r"teacher='\./nowhere': no such"):
        load_model("./nowhere", "teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load a model from this directory"):
        load_model(tmp_path / "empty", "teacher")
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path / "empty", "teacher")
    # Of a kind that this version of tokenizers does not know: it raises a plain Exception.
    Path(path, "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "New"}}')
    with pytest.raises(ValueError, match=r"teacher='.*cannot load a tokenizer .*: data did not"):
        load_tokenizer(path, "teacher")


@pytest.mark.parametrize("kept", [0, 100, 5000, -10])
def test_weights_cut_off_midway_are_refused_by_name(tmp_path, kept):
    path = save_tiny_model(tmp_path / "model", head_cls="sequence")
    weights = Path(path, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"teacher='.*cannot load a model from this directory: \w"):
        load_model(path, "teacher", "labels")


@pytest.mark.parametrize("lost", ["bert.", "layer.2.output", "classifier", "pooler"])
def test_weights_that_are_not_there_are_not_made_up(tmp_path, lost):
    path = save_tiny_model(tmp_path / "model", head_cls="sequence")
    weights = Path(path, "model.safetensors")
    kept = {name: w for name, w in load_file(weights).items() if lost not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"teacher='.*its weights lack \S*{lost}.*would be random"
    ):
        load_model(path, "teacher", "labels")
    # A head that nobody asks for may be missing, and the pooler, which only heads have a use for.
    if lost in ("classifier", "pooler"):
        assert load_model(path, "teacher").config.num_hidden_layers == 4


def test_weights_of_other_sizes_than_the_config_are_refused(tmp_path):
    path = save_tiny_model(tmp_path / "model")
    weights = Path(path, "model.safetensors")
    cut = {
        name: w[:10].clone() if "intermediate" in name else w
        for name, w in load_file(weights).items()
    }
    save_file(cut, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"teacher='.*weights are damaged, or not those of its config"
    ):
        load_model(path, "teacher")


def test_a_new_head_is_drawn_without_the_global_generators(tmp_path, monkeypatch):
    path = save_tiny_model(tmp_path / "model", layers=2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs reseeded"))
    state = torch.get_rng_state()
    heads = [load_model(path, "model", "labels", seed=seed).classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(*heads[:2])
    assert not torch.equal(*heads[1:])
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_and_their_padding_end_where_the_positions_of_the_model_do(tmp_path):
    tokenizer = load_tokenizer(
        save_tiny_model(tmp_path / "model", max_position_embeddings=13), "model"
    )
    task = save_reviews(tmp_path / "reviews")
    with pytest.raises(
        ValueError, match="max_length=16 is more than this tokenizer's model_max_len"
    ):
        load_workload(task, tokenizer, 16)
    workload = load_workload(task, tokenizer, 13)
    batch = workload.collate([workload.train[row] for row in range(len(workload.train))])
    assert batch["input_ids"].shape[1] <= 13


def test_a_head_for_other_labels_is_refused_with_both_numbers(tmp_path):
    path = save_tiny_model(tmp_path / "model", head_cls="sequence", num_labels=3)
    with pytest.raises(ValueError, match=r"model='.*its head has 3 labels, but the task has 2\."):
        load_model(path, "model", "labels", num_labels=2)
    assert load_model(path, "model", "labels", num_labels=3).num_labels == 3


def test_scores_of_other_labels_are_refused(tmp_path):
    workload = load_workload(save_reviews(tmp_path / "reviews"), tiny_tokenizer(), 16)
    judge = workload.judge("test")

    def model(*names):
        labels = {"id2label": dict(enumerate(names)), "num_labels": len(names)}
        return tiny_model("bert", head_cls="sequence", **labels)

    assert "accuracy" in judge(model("bad", "good"))
    assert "accuracy" in judge(model("LABEL_0", "LABEL_1"))
    with pytest.raises(ValueError, match=r"labels are good, bad, those of task reviews bad, good"):
        judge(model("good", "bad"))
    with pytest.raises(ValueError, match="the model predicts 3 labels, task reviews has 2"):
        judge(model("bad", "good", "fair"))
