"""Task heads of students that `bertkd distill` makes: trained by default, never scored untrained."""

from __future__ import annotations

import json
import re

import pytest
from cli_runs import FAST, distill, save_place
from huggingface_hub import ModelCard
from tiny_models import tiny_model
from tiny_task import review_rows, save_csv, save_tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from bertkd.cli.main import main
from bertkd.study import stages
from bertkd.training import loop


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_place(tmp_path_factory.mktemp("cli"))


def heads_of(place, folder, *words):
    """A short run without a recipe: the printed text, the results and the card."""
    assert distill(place, folder, "--task", place["task"], "--steps", "2", *words) == 0
    results = json.loads((folder / "results.json").read_text())
    return results, (folder / "model" / "README.md").read_text()


def test_the_default_objective_trains_the_task_head_where_there_is_one(place, tmp_path, capsys):
    results, card = heads_of(place, tmp_path / "task")
    assert results["stages"][0]["objective"] == "att_kl + hid_seq + kd"
    assert results["stages"][0]["metric"] == "accuracy"
    assert "accuracy" in results["scores"]["student"]["test"]
    assert "task head" not in card + capsys.readouterr().out
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(row["text"] for row in review_rows(60, seed=5)))
    words = ["--text", str(text), "--steps", "2"]
    assert distill(place, tmp_path / "text", *words) == 0
    results = json.loads((tmp_path / "text" / "results.json").read_text())
    assert results["stages"][0]["objective"] == "att_kl + hid_seq"
    masked = save_tiny_model(tmp_path / "masked", head_cls="mlm")
    words += ["--masked", "--teacher", masked]
    assert distill(place, tmp_path / "words", *words) == 0
    results = json.loads((tmp_path / "words" / "results.json").read_text())
    assert results["stages"][0]["objective"] == "att_kl + hid_seq + kd"


def test_a_new_head_that_nothing_trains_is_said_and_not_scored(place, tmp_path, capsys):
    results, card = heads_of(place, tmp_path / "out", "--objective", "att_kl")
    plan, _, end = capsys.readouterr().out.partition("validation accuracy")
    for text in (plan, end, card):
        assert "No stage trains the task head, which is new" in text
    assert results["scores"]["student"] == {}
    assert "accuracy" in results["scores"]["teacher"]["test"]
    front = ModelCard.load(tmp_path / "out" / "model" / "README.md").data
    assert not front.eval_results
    assert front.pipeline_tag == "feature-extraction"
    assert "AutoModelForSequenceClassification" not in card
    assert re.search(r"\| student +\| +-", card)


def test_a_copied_head_that_nothing_trains_is_said_and_scored(place, tmp_path, capsys):
    results, card = heads_of(place, tmp_path / "out", "--objective", "hid_seq", "--copy_head")
    for text in (capsys.readouterr().out, card):
        assert "No stage trains the task head: the scores are those of the copy" in text
    assert "accuracy" in results["scores"]["student"]["test"]


@pytest.mark.parametrize("head", ["saved", "new"])
def test_a_student_of_ones_own_and_its_head(place, tmp_path, head):
    names = {0: "bad", 1: "good"}
    options = (
        {"head_cls": "sequence", "num_labels": 2, "id2label": names} if head == "saved" else {}
    )
    student = save_tiny_model(tmp_path / "student", layers=2, **options)
    words = ["--student", student, "--task", place["task"], "--steps", "1"]
    assert distill(place, tmp_path / "out", *words, "--objective", "att_kl") == 0
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert bool(scores["student"]) == (head == "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.id2label == names


@pytest.mark.parametrize("numbers", [False, True])
def test_a_file_is_read_by_the_teachers_labels(tmp_path, numbers):
    names = {0: "ugly", 1: "good", 2: "bad"}
    teacher = save_tiny_model(
        tmp_path / "teacher", head_cls="sequence", initializer_range=1.0, id2label=names
    )
    rows = review_rows(40, seed=0)  # of two of the three classes
    if numbers:
        order = {name: number for number, name in names.items()}
        rows = [row | {"label": order[row["label"]]} for row in rows]
    task = save_csv(tmp_path / "rows.csv", rows)
    words = ["--task", task, "--validation_path", task, "--steps", "1"]
    assert distill({"teacher": teacher}, tmp_path / "out", *words) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.id2label == names
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["teacher"]
    path = tmp_path / "scores.json"
    words = ["--model", teacher, "--task", task, "--split", "all", "--output", str(path)]
    assert main(["evaluate", "--max_length", "16", *words]) == 0
    found = json.loads(path.read_text())["scores"]["model"]["all"]
    assert scores["validation"] == found
    assert 0 < found["accuracy"] < 1


def test_a_student_for_other_labels_is_refused_before_it_is_trained(place, tmp_path, capsys):
    student = save_tiny_model(tmp_path / "student", layers=2, head_cls="sequence", num_labels=3)
    words = ["--student", student, "--task", place["task"]]
    assert distill(place, tmp_path / "out", *words) == 2
    assert "the student predicts 3 labels" in capsys.readouterr().err


def test_models_for_several_labels_a_row_or_for_tokens_are_refused(place, tmp_path, capsys):
    several = {"num_labels": 2, "problem_type": "multi_label_classification"}
    several = save_tiny_model(tmp_path / "several", head_cls="sequence", **several)
    tokens = tiny_model("bert")
    tokens.config.architectures = ["BertForTokenClassification"]
    tokens.config.save_pretrained(tmp_path / "tokens")
    tiny_tokenizer().save_pretrained(tmp_path / "tokens")
    for model, said in (
        (several, "may give a row several labels .* gives it one"),
        (str(tmp_path / "tokens"), "no head for labels of whole texts"),
    ):
        assert main(["evaluate", "--model", model, "--task", place["task"]]) == 2
        assert re.search(f"the model {said}|model=.* {said}", capsys.readouterr().err)
        words = ["--task", place["task"], "--objective", "att_kl"]
        assert distill(place | {"teacher": model}, tmp_path / "out", *words) == 2
        assert re.search(f"the teacher {said}|teacher=.* {said}", capsys.readouterr().err)


def test_a_stage_is_not_judged_by_a_head_that_nothing_has_trained(place, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"task: {place['task']}\nmax_length: 16\nstages:\n"
        "- {name: inner, objective: att_kl, steps: 2, metric: accuracy}\n"
        "- {name: outer, objective: kd, steps: 2}\n"
    )
    words = ["--recipe", str(recipe), "--dry_run"]
    assert distill(place, tmp_path / "out", *words) == 2
    text = capsys.readouterr().err
    assert "stage 'inner' is to be judged by accuracy, but 'att_kl' does not train" in text
    assert distill(place, tmp_path / "out", *words, "--copy_head") == 0


@pytest.mark.parametrize("data", ["task", "text"])
def test_a_stage_is_not_judged_by_a_score_that_there_will_not_be(place, tmp_path, data, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("the film was good\n" * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "max_length: 16\nteacher: {objective: ce, steps: 2, metric: pearson}\nstages:\n"
        "- {name: inner, objective: att_kl, steps: 2}\n"
        "- {name: outer, objective: att_kl, steps: 2, metric: pearson}\n"
    )
    words = ["--recipe", str(recipe), f"--{data}", place["task"] if data == "task" else str(texts)]
    assert distill(place, tmp_path / "out", *words) == 2
    text = capsys.readouterr().err
    has = (
        "reviews has accuracy, f1; " if data == "task" else "texts.txt has nothing to score with; "
    )
    assert "stage 'outer' is to be judged by metric='pearson', but " in text
    assert has in text
    if data == "task":
        model = ["--model", place["teacher"], "--output_dir", str(tmp_path / "out")]
        assert main(["finetune", *model, *words]) == 2
        assert "is to be judged by metric='pearson'" in capsys.readouterr().err


def test_a_student_is_compared_with_its_teacher_by_the_same_score(place, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n- {objective: kd, steps: 2, metric: f1}\n")
    compared = []

    def train(*given, teacher_score, **options):
        compared.append(teacher_score)
        return loop.train(*given, teacher_score=teacher_score, **options)

    monkeypatch.setattr(stages, "train", train)
    words = ["--recipe", str(recipe), "--task", place["task"]]
    assert distill(place, tmp_path / "out", *words) == 0
    teacher = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["teacher"]
    assert compared == [teacher["validation"]["f1"]]
    assert teacher["validation"]["f1"] != teacher["validation"]["accuracy"]


def test_patience_is_for_the_stages_that_are_judged(place, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "every_stage: {steps: 9, lr: 1.0e-9}\nstages:\n"
        "- {name: inner, objective: att_kl, eval_every: null}\n- {name: outer, objective: kd}\n"
    )
    words = ["--recipe", str(recipe), "--patience", "1", "--eval_every", "2"]
    labels = ["--task", place["task"]]
    # It stops before the first row of losses is due, and all the same ends with a model.
    assert distill(place, tmp_path / "out", *words, *labels) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == {"inner": 9, "outer": 4}
    assert (tmp_path / "out" / "model" / "config.json").exists()
    alone = ["--model", place["teacher"], "--output_dir", str(tmp_path / "tuned"), *FAST]
    assert main(["finetune", *alone, *labels, "--steps", "9", *words[2:], "--lr", "1e-9"]) == 0
    assert json.loads((tmp_path / "tuned" / "results.json").read_text())["steps"] == {"teacher": 4}
    assert distill(place, tmp_path / "none", *labels, "--objective", "att_kl", *words[2:]) == 2
    assert "patience=1 counts evaluations, and no stage is evaluated" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["distilbert", "att_kl + kd"])
def test_logits_on_plain_text_ask_for_masked_words(place, tmp_path, capsys, objective):
    texts = tmp_path / "texts.txt"
    texts.write_text("the film is good\nthe plot was sad\n" * 20)
    teacher = save_tiny_model(tmp_path / "mlm", head_cls="mlm")
    words = ["--text", str(texts), "--objective", objective, "--dry_run"]
    place = {**place, "teacher": teacher}
    assert distill(place, tmp_path / "out", *words) == 2
    assert f"objective='{objective}' has kd" in (error := capsys.readouterr().err)
    assert "add --masked" in error
    assert distill(place, tmp_path / "out", *words, "--masked") == 0
