"""`bertkd evaluate`: which rows of a file are scored, and by whose labels."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_task import save_csv, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertkd.cli.main import main

WORDS = ["film", "movie", "plot", "story", "great", "sad"]


def save_rows(folder, labels):
    rows = [
        {"text": f"the {WORDS[i % 6]} is {WORDS[i % 5]}", "label": labels[i % len(labels)]}
        for i in range(40)
    ]
    return save_csv(folder / "rows.csv", rows), rows


def evaluate(folder, model, task, *words):
    path = folder / "scores.json"
    words = ("--model", model, "--task", task, "--output", str(path), *words)
    assert main(["evaluate", *words]) == 0
    return json.loads(path.read_text())["scores"]["model"]


def predictions(model, rows):
    """Without bertkd."""
    plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    texts = [row["text"] for row in rows]
    batch = AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return plain(**batch).logits, plain.config.id2label


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {0: "bad", 1: "good", 2: "ugly"}}, ["good", "ugly"]),
        ({"id2label": {0: "ugly", 1: "good", 2: "bad"}}, ["bad", "good", "ugly"]),
        ({"num_labels": 3}, [1, 2]),
    ],
)
def test_every_row_of_a_file_counts_by_the_models_labels(tmp_path, config, labels):
    model = save_tiny_model(
        tmp_path / "model", head_cls="sequence", initializer_range=1.0, **config
    )
    task, rows = save_rows(tmp_path, labels)
    logits, names = predictions(model, rows)
    numbers = {name: number for number, name in names.items()}
    wanted = torch.tensor([numbers.get(row["label"], row["label"]) for row in rows])
    right = (logits.argmax(-1) == wanted).float().mean().item()
    assert 0 < right < 1
    assert evaluate(tmp_path, model, task, "--split", "all")["all"]["accuracy"] == pytest.approx(
        right
    )


def test_a_regression_model_takes_whole_numbers_for_numbers(tmp_path):
    model = save_tiny_model(tmp_path / "model", head_cls="sequence", num_labels=1)
    task, rows = save_rows(tmp_path, [1, 2, 5])
    scores = evaluate(tmp_path, model, task, "--split", "all")["all"]
    both = torch.stack(
        [predictions(model, rows)[0][:, 0], torch.tensor([r["label"] for r in rows])]
    )
    assert scores["pearson"] == pytest.approx(torch.corrcoef(both)[0, 1].item(), abs=1e-4)


def test_held_out_rows_are_said_to_be_some(tmp_path, caplog):
    model = save_tiny_model(tmp_path / "model", head_cls="sequence")
    task, _ = save_rows(tmp_path, [0, 1])
    evaluate(tmp_path, model, task)
    assert "of its 40 rows are held out" in caplog.text
    assert "--split all counts every row" in caplog.text


def test_all_is_for_single_files(tmp_path, capsys):
    task, _ = save_rows(tmp_path, [0, 1])
    for words, message in (
        (["--task", "rte"], "is for a single file, and 'rte' has splits"),
        (["--task", str(tmp_path)], "is for a single file"),
        (["--task", task, "--test_path", task], "leaves no use for test_path"),
    ):
        assert main(["evaluate", "--model", "never-loaded", "--split", "all", *words]) == 2
        assert message in capsys.readouterr().err


def test_labels_that_the_model_does_not_know(tmp_path, capsys):
    model = save_tiny_model(
        tmp_path / "model", head_cls="sequence", num_labels=2, id2label={0: "bad", 1: "good"}
    )
    task, _ = save_rows(tmp_path, ["good", "awful"])
    assert main(["evaluate", "--model", model, "--task", task, "--split", "all"]) == 2
    assert "unknown label 'awful'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"), [("", "name a JSON file"), (".", "is no file"), ("no/x.json", "'no'")]
)
def test_where_scores_cannot_go_is_told_before_any_work(output, message, capsys):
    words = ["--model", "never-loaded", "--task", "never-loaded", "--output", output]
    assert main(["evaluate", *words]) == 2
    text = capsys.readouterr().err
    assert f"output={output!r}" in text
    assert message in text
