"""``bertkd finetune`` and ``bertkd distill`` from start to a model that loads, and what they refuse."""

import errno
import json

import pytest
import torch
from cli_runs import FAST, distill
from tiny_models import tiny_model
from tiny_task import review_rows, save_csv, save_reviews, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertkd.cli.main import main
from bertkd.distiller import Distiller
from bertkd.study import jobs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pretrained model, a task, and a teacher that `bertkd finetune` made of them."""
    root = tmp_path_factory.mktemp("cli")
    model = save_tiny_model(root / "pretrained")
    task = save_reviews(root / "reviews")
    words = ["--model", model, "--task", task, "--output_dir", str(root / "teacher")]
    assert main(["finetune", *words, "--steps", "50", "--lr", "3e-3", *FAST]) == 0
    return {"root": root, "task": task, "model": model, "teacher": str(root / "teacher" / "model")}


def test_finetuned_teacher_has_learnt_and_is_a_plain_checkpoint(place):
    results = json.loads((place["root"] / "teacher" / "results.json").read_text())
    assert results["scores"]["model"]["test"]["accuracy"] > 0.8
    teacher = AutoModelForSequenceClassification.from_pretrained(place["teacher"])
    assert teacher.config.id2label == {0: "bad", 1: "good"}
    assert "text-classification" in (place["root"] / "teacher/model/README.md").read_text()


def test_the_seed_is_that_of_a_new_head_too(place, tmp_path):
    words = ["--model", place["model"], "--task", place["task"], "--steps", "1", "--lr", "1e-9"]
    heads = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        assert main(["finetune", *words, "--output_dir", str(out), "--seed", str(seed), *FAST]) == 0
        model = AutoModelForSequenceClassification.from_pretrained(out / "model")
        heads.append(model.classifier.weight.detach())
    torch.testing.assert_close(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2], atol=1e-3)


def test_a_task_that_the_hub_does_not_give_is_one_line_and_code_2(
    place, tmp_path, capsys, monkeypatch
):
    import datasets

    def fails(path, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    words = ["--model", place["model"], "--recipe", "rte", "--output_dir", str(tmp_path / "out")]
    assert main(["finetune", *words]) == 2
    text = capsys.readouterr().err
    assert (
        "cannot load nyu-mll/glue/rte from the hub (ConnectionError: no network); pass glue_dir="
        in text
    )
    assert "Traceback" not in text


def test_distill_from_start_to_a_loadable_student(place, tmp_path, capsys):
    out = tmp_path / "student"
    words = ["--task", place["task"], "--objective", "kd + att_kl", "--steps", "30", "--lr", "3e-3"]
    assert distill(place, out, *words) == 0
    text = capsys.readouterr().out
    assert "0:1,1:3" in text.replace(" ", "")
    results = json.loads((out / "results.json").read_text())
    scores = results["scores"]

    # The figures in results.json are those of the exported model, computed anew without bertkd.
    student = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    rows = review_rows(24, seed=2)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = student(**batch).logits.argmax(-1)
    right = [
        student.config.id2label[int(i)] == row["label"] for i, row in zip(found, rows, strict=True)
    ]
    assert scores["student"]["test"]["accuracy"] == pytest.approx(sum(right) / 24)
    assert scores["teacher"]["test"]["accuracy"] > 0.8
    assert student.config.num_hidden_layers == 2
    assert {path.name for path in (out / "model").iterdir()} >= {"README.md", "model.safetensors"}
    assert (out / "1-distil.png").stat().st_size > 10_000

    # A finished run is refused without --resume, and resumed has nothing left to do.
    before = (out / "model" / "model.safetensors").read_bytes()
    assert distill(place, out, *words) == 2
    assert "--resume" in capsys.readouterr().err
    assert distill(place, out, *words, "--resume") == 0
    assert (out / "model" / "model.safetensors").read_bytes() == before

    # evaluate gives the same figures.
    path = tmp_path / "scores.json"
    fixed = ["--max_length", "16", "--split", "test", "--output", str(path)]
    assert main(["evaluate", "--model", str(out / "model"), "--task", place["task"], *fixed]) == 0
    again = json.loads(path.read_text())["scores"]["model"]["test"]
    assert again == pytest.approx(scores["student"]["test"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(
    place, tmp_path, precision, monkeypatch
):
    taught = []
    build = Distiller.__init__

    def note(self, teacher, *args, **options):
        taught.append(teacher.dtype)
        build(self, teacher, *args, **options)

    monkeypatch.setattr(Distiller, "__init__", note)
    teacher, tokenizer = str(tmp_path / "half"), AutoTokenizer.from_pretrained(place["teacher"])
    half = AutoModelForSequenceClassification.from_pretrained(place["teacher"]).bfloat16()
    half.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    assert AutoModelForSequenceClassification.from_pretrained(teacher).dtype == torch.bfloat16
    words = ["--task", place["task"], "--objective", "kd + att_kl + hid_seq", "--steps", "4"]
    words += ["--teacher", teacher, "--layers", "uniform:2", "--teacher_precision", precision]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "out"), *FAST]) == 0
    assert set(taught) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    words = ["--model", teacher, "--task", place["task"], "--steps", "4"]
    assert main(["finetune", *words, "--output_dir", str(tmp_path / "tuned"), *FAST]) == 0
    for folder in ("out", "tuned"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder / "model")
        assert model.dtype == torch.float32
        weight = model.bert.encoder.layer[0].attention.self.query.weight
        assert not torch.equal(weight, weight.bfloat16().float())
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert ("teacher's weights" in card) == (precision == "bf16")


def test_two_stages_of_a_recipe_and_no_judging_of_a_random_head(place, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"task: {place['task']}\nlayers: [0, 3]\nmax_length: 16\n"
        "every_stage: {batch_size: 16, steps: 3, eval_every: 2, log_every: 1}\n"
        "stages:\n- {name: inner, objective: att_kl}\n- {name: outer, objective: kd}\n"
    )
    out = tmp_path / "out"
    words = ["--teacher", place["teacher"], "--recipe", str(recipe), "--output_dir", str(out)]
    assert main(["distill", *words, "--log_with", "none"]) == 0
    rows = {name: (out / name / "history.jsonl").read_text() for name in ("1-inner", "2-outer")}
    assert "eval_accuracy" not in rows["1-inner"]
    assert "eval_accuracy" in rows["2-outer"]
    assert (
        main(["distill", *words[:4], "--output_dir", str(tmp_path / "x"), "--objective", "kd"]) == 2
    )
    assert "write a recipe of your own" in capsys.readouterr().err


def test_plain_text_needs_no_labels(place, tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(row["text"] for row in review_rows(60, seed=5)))
    out = tmp_path / "out"
    assert distill(place, out, "--text", str(text), "--objective", "hid_seq", "--steps", "3") == 0
    assert json.loads((out / "results.json").read_text())["scores"]["student"] == {}


def test_dry_run_prints_the_plan_and_writes_nothing(place, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--task", place["task"], "--objective", "att_kl", "--dry-run"]
    assert distill(place, out, *words) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    student = tiny_model("bert", head_cls="sequence", num_labels=2)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert f"{count:,} parameters" in text
    assert all(word in text for word in ("att_kl", "naive", "fused", "updates"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "att_kll"], "att_kl"),
        (["--layer_map", "0:9"], "9"),
        (["--layers", "uniform:9"], "uniform:9"),
        (["--task", "no/such/folder"], "no/such/folder"),
        (["--text_column", "sentnce"], "sentnce"),
        (["--label_column", "lable"], "'label'"),
        (["--teacher", "./nowhere"], "no such directory"),
        (["--recipe", "rtee"], "rte"),
        (["--warmup", "50", "--steps", "5"], "warmup"),
        (["--lr", "-1"], "lr"),
        (["--impl", "cudaa"], "cuda"),
        (["--text", "also.txt"], "not both"),
        (["--seed", "-1"], "seed must lie between 0 and"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(words, message, place, tmp_path, capsys):
    out = tmp_path / "out"
    assert distill(place, out, "--task", place["task"], *words) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.startswith("bertkd distill: error: ")
    assert len(text.splitlines()) == 1
    assert not out.exists()


def test_data_and_teachers_that_do_not_fit(place, tmp_path, capsys):
    out = tmp_path / "out"
    empty = save_csv(tmp_path / "empty.csv", [])
    assert distill(place, out, "--task", empty) == 2
    assert "empty.csv" in capsys.readouterr().err

    three = [{"text": f"a film {i}", "label": "xyz"[i % 3]} for i in range(30)]
    assert distill(place, out, "--task", save_csv(tmp_path / "three.csv", three)) == 2
    assert "unknown label 'x'" in capsys.readouterr().err

    others = [{"text": f"a film {i}", "label": "yn"[i % 2]} for i in range(30)]
    assert distill(place, out, "--task", save_csv(tmp_path / "others.csv", others)) == 2
    assert "unknown label 'y'" in capsys.readouterr().err

    words = ["--task", place["task"], "--teacher", place["model"]]
    assert distill(place, out, *words) == 2
    assert "bertkd finetune" in capsys.readouterr().err


def test_foreign_folders_are_left_alone(place, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert distill(place, tmp_path, "--task", place["task"]) == 2
    assert "not made by bertkd" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_whose_results_found_no_room_is_completed_by_resuming(
    place, tmp_path, capsys, monkeypatch
):
    def fail(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    words = ["--task", place["task"], "--objective", "kd", "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_json", fail)
        assert distill(place, out, *words) == 1
    text = capsys.readouterr().err
    assert f"{out} is not complete ([Errno 28] No space left on device). The training has" in text
    assert not (out / "model").exists()
    (out / ".1-distil.png.4194305.tmp").write_text("of a run that was killed here")
    assert distill(place, out, *words, "--resume") == 0
    assert (out / "model").exists()
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("split", "message"),
    [("train", "data.checksum was"), ("validation", "settings.validation was")],
)
def test_a_row_that_was_changed_meanwhile_is_noticed(place, tmp_path, capsys, split, message):
    out = tmp_path / "out"
    rows = {"train": review_rows(400, seed=0), "validation": review_rows(100, seed=1)}
    for name, found in rows.items():
        save_csv(tmp_path / f"{name}.csv", found)
    words = ["--task", str(tmp_path), "--objective", "kd", "--steps", "2", "--eval_every", "1"]
    assert distill(place, out, *words) == 0
    rows[split][3]["label"] = "bad"
    save_csv(tmp_path / f"{split}.csv", rows[split])
    assert distill(place, out, *words, "--resume") == 1
    assert message in capsys.readouterr().err


def test_damaged_checkpoint_is_named_and_code_1(place, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--task", place["task"], "--objective", "kd", "--steps", "4", "--save_every", "2"]
    assert distill(place, out, *words) == 0
    broken = out / "1-distil" / "checkpoint-4" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    assert distill(place, out, *words, "--resume") == 1
    text = capsys.readouterr().err
    assert "checkpoint-4" in text
    # The same words serve `--resume last-good` and resume='last-good'.
    assert "Give resume the value 'last-good'" in text
    assert distill(place, out, *words, "--resume", "last-good") == 0


def test_a_teacher_that_computes_nan_is_told_apart_from_the_student(place, tmp_path, capsys):
    teacher = AutoModelForSequenceClassification.from_pretrained(place["teacher"])
    torch.nn.init.constant_(teacher.classifier.bias, float("nan"))
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(place["teacher"]).save_pretrained(tmp_path / "teacher")
    broken = {"teacher": str(tmp_path / "teacher")}
    assert distill(broken, tmp_path / "run", "--task", place["task"], "--steps", "2") != 0
    assert "the teacher on validation: logits hold NaN" in capsys.readouterr().err
