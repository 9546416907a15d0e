"""`bertkd evaluate`: which rows of a file are scored, and by whose labels."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from tiny_task import save_csv, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertkd.cli.main import main
from bertkd.training import machine

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
    ("output", "message"),
    [
        ("", "name a JSON file"),
        (".", "is no plain file"),
        ("no/x.json", "'no'"),
        # Which root may replace.
        ("/dev/null", "is no plain file"),
        ("/proc/self/exe", "is no plain file"),
    ],
)
def test_where_scores_cannot_go_is_told_before_any_work(output, message, capsys):
    words = ["--model", "never-loaded", "--task", "never-loaded", "--output", output]
    assert main(["evaluate", *words]) == 2
    text = capsys.readouterr().err
    assert f"output={output!r}" in text
    assert message in text


@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"], [0]])
def test_classes_named_by_numbers_are_not_merged_with_class_numbers(tmp_path, capsys, labels):
    names = {"id2label": {0: "1", 1: "2"}, "num_labels": 2}
    model = save_tiny_model(tmp_path / "model", head_cls="sequence", **names)
    task, _ = save_rows(tmp_path, labels)
    assert main(["evaluate", "--model", model, "--task", task, "--split", "all"]) == 2
    text = capsys.readouterr().err
    assert "unknown label '0'" in text
    assert "the model: '1', '2'." in text


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_the_order_of_unnamed_classes_is_said_once(tmp_path, caplog, role):
    names = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}}
    paths = {
        name: save_tiny_model(
            tmp_path / name, head_cls="sequence", **({"num_labels": 2} if name == role else names)
        )
        for name in ("model", "teacher")
    }
    task, _ = save_rows(tmp_path, ["good", "bad"])
    evaluate(tmp_path, paths["model"], task, "--split", "all", "--teacher", paths["teacher"])
    said = [each for each in caplog.messages if "does not name its classes" in each]
    assert len(said) == 1
    assert said[0].startswith(f"the {role} does not name its classes: taking LABEL_0 for 'bad', L")


@pytest.mark.parametrize(
    ("names", "labels"),
    [({}, [0, 1]), ({"id2label": {0: "good", 1: "bad"}}, ["good", "bad"])],
)
def test_nothing_is_said_where_no_order_is_assumed(tmp_path, caplog, names, labels):
    model = save_tiny_model(tmp_path / "model", head_cls="sequence", num_labels=2, **names)
    task, _ = save_rows(tmp_path, labels)
    evaluate(tmp_path, model, task, "--split", "all")
    assert caplog.messages == []


def test_a_teacher_with_another_order_is_refused_before_anything_runs(tmp_path, capsys):
    for name, names in (("model", ["bad", "good"]), ("teacher", ["good", "bad"])):
        save_tiny_model(
            tmp_path / name, head_cls="sequence", num_labels=2, id2label=dict(enumerate(names))
        )
    task, _ = save_rows(tmp_path, ["good", "bad"])
    words = ["--model", str(tmp_path / "model"), "--teacher", str(tmp_path / "teacher")]
    assert main(["evaluate", *words, "--task", task]) == 2
    assert "the teacher's labels are good, bad" in capsys.readouterr().err


def test_the_folder_of_a_run_is_not_its_model(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "run" / "model", head_cls="sequence", num_labels=2)
    task, _ = save_rows(tmp_path, [0, 1])
    run = str(tmp_path / "run")
    for words, name in (
        (["evaluate", "--model", run], "model"),
        (["evaluate", "--model", model, "--teacher", run], "teacher"),
        (["distill", "--teacher", run, "--output_dir", str(tmp_path / "out")], "teacher"),
        (["finetune", "--model", run, "--output_dir", str(tmp_path / "out")], "model"),
    ):
        assert main([*words, "--task", task]) == 2
        text = capsys.readouterr().err
        assert f"{name}={run!r} is the folder of a run; name its model, {model!r}." in text


def test_every_config_is_read_once(tmp_path, monkeypatch):
    from bertkd.study import models

    model = save_tiny_model(tmp_path / "model", head_cls="sequence", num_labels=2)
    task, _ = save_rows(tmp_path, [0, 1])
    load_config, read = models.load_config, []

    def counted(path, argument):
        read.append(argument)
        return load_config(path, argument)

    monkeypatch.setattr(models, "load_config", counted)
    evaluate(tmp_path, model, task, "--split", "all", "--teacher", model)
    assert sorted(read) == ["model", "teacher"]


def test_texts_are_not_longer_than_either_model_takes(tmp_path, capsys):
    path = save_tiny_model(tmp_path / "model", head_cls="sequence", num_labels=2)
    short = save_tiny_model(
        tmp_path / "short", head_cls="sequence", num_labels=2, max_position_embeddings=7
    )
    task, _ = save_rows(tmp_path, [0, 1])
    for words in (["--teacher", short, "--model", path], ["--teacher", path, "--model", short]):
        assert main(["evaluate", *words, "--task", task]) == 2
        text = capsys.readouterr().err
        assert "max_length=128 is more than this tokenizer's model_max_length" in text
        assert main(["evaluate", *words, "--task", task, "--max_length", "7"]) == 0


def test_of_several_processes_the_first_speaks(tmp_path, monkeypatch, capsys):
    model = save_tiny_model(tmp_path / "model", head_cls="sequence", num_labels=2)
    task, _ = save_rows(tmp_path, [0, 1])
    levels = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: levels.append(options["level"]))
    path = tmp_path / "scores.json"
    words = ["evaluate", "--model", model, "--task", task, "--output", str(path)]
    for rank in range(2):
        process = SimpleNamespace(
            device="cpu",
            backend=None,
            is_main_process=not rank,
            print=print if not rank else lambda text: None,
        )
        monkeypatch.setattr(machine, "PartialState", lambda cpu, process=process: process)
        monkeypatch.setenv("RANK", str(rank))
        assert main(words) == 0
        assert bool(capsys.readouterr().out) == path.exists() == (not rank)
        path.unlink(missing_ok=True)
    assert levels == [logging.WARNING, logging.ERROR]
