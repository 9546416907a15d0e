"""What `bertkd distill` and `finetune` refuse: before anything is loaded, and when they go on with a run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_runs import FAST, distill, save_place
from tiny_models import tiny_model
from tiny_task import save_tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModel

from bertkd.cli.main import main
from bertkd.training import checkpoint, machine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_place(tmp_path_factory.mktemp("cli"))


@pytest.mark.parametrize("command", ["finetune", "distill"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--log_with", "tensorbord"], "unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (["--log_with", "comet_ml"], "log_with='comet_ml': the package 'comet_ml' is not inst"),
        (["--precision", "fp16"], "precision='fp16' needs a GPU"),
        (["--output_dir", "/proc/none"], "output_dir '/proc/none' cannot be created: '/proc'"),
    ],
)
def test_what_this_machine_lacks_is_told_before_anything_is_loaded(
    command, words, message, tmp_path, capsys, on_cpu
):
    if "comet_ml" in words and importlib.util.find_spec("comet_ml"):
        pytest.skip("it is installed")
    if "/proc/none" in words and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    out = tmp_path / "out"
    given = ["--model" if command == "finetune" else "--teacher", "./never-loaded"]
    given += ["--task", "never-loaded", "--output_dir", str(out)]
    assert main([command, *given, *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", ["demo", "study topic"])
def test_what_runs_in_one_process_is_not_started_in_two(command, tmp_path, capsys, monkeypatch):
    # Not this_process, which a module that is first imported meanwhile would keep for good.
    monkeypatch.setattr(
        machine, "PartialState", lambda cpu: SimpleNamespace(num_processes=2, backend=None)
    )
    assert main([*command.split(), "--output_dir", str(tmp_path / "out")]) == 2
    text = (
        f"`bertkd {command}` runs in one process, but was started in 2; start it without torchrun"
    )
    assert text in capsys.readouterr().err


def test_options_that_leave_no_use_for_another_are_refused_together(tmp_path, capsys):
    given = ["--teacher", "./never-loaded", "--output_dir", str(tmp_path / "out")]
    other = {"--layers": "first:2", "--hidden_size": "16", "--copy_head": "true"}
    columns = ("text_column", "pair_column", "label_column", "validation_path", "test_path")
    for name, value in other.items():
        assert main(["distill", *given, "--student", "mine", name, value]) == 2
        text = capsys.readouterr().err
        assert f"{name[2:]}=" in text
        assert "student='mine' leaves no use for it" in text
    assert main(["distill", *given, "--student", "uniform:2"]) == 2
    assert "write --layers uniform:2" in capsys.readouterr().err
    for name in (*columns, "glue_dir"):
        assert main(["distill", *given, "--text", "a.txt", f"--{name}", "x"]) == 2
        assert f"{name}='x' is for labelled tasks, and text='a.txt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--layers", "first:2"], "settings.layers was [1, 3], now [0, 1]"),
        (["--hidden_size", "16"], "settings.hidden_size was 32, now 16"),
        (["--copy_head"], "settings.copy_head was False, now True"),
        (["--teacher_precision", "bf16"], "settings.teacher_precision was 'fp32', now 'bf16'"),
        (["--student"], "settings.student was None, now 'weights "),
    ],
)
def test_a_run_is_not_resumed_with_another_student(
    place, begun, tmp_path, changed, message, capsys
):
    words = ["--task", place["task"], "--steps", "2", "--resume"]
    if changed == ["--student"]:
        changed = ["--student", save_tiny_model(tmp_path / "student", layers=2)]
    assert distill(place, begun, *words, *changed) == 1
    text = capsys.readouterr().err
    assert "was made by another run: " in text
    assert message in text


@pytest.fixture(scope="module")
def begun(place, tmp_path_factory):
    """A run of two updates on the teacher's blocks 1 and 3."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    assert distill(place, folder, "--task", place["task"], "--steps", "2") == 0
    return folder


def test_the_same_student_in_other_words_is_resumed_and_so_are_older_runs(place, begun, tmp_path):
    words = ["--task", place["task"], "--steps", "2", "--resume"]
    assert distill(place, begun, *words, "--layers", "[1,3]", "--impl", "chunked") == 0
    # Checkpoints of versions before do not say how the student was made.
    older = shutil.copytree(begun, tmp_path / "older")
    folder = older / "1-distil" / "checkpoint-2"
    contents = checkpoint.read(folder)
    assert contents.documents["run"].pop("settings")["layers"] == [1, 3]
    shutil.rmtree(folder)
    checkpoint.save(folder.parent, 2, contents)
    assert distill(place, older, *words, "--layers", "first:2") == 0


def test_fine_tuning_is_not_resumed_from_another_model(place, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    words = ["--task", place["task"], "--output_dir", str(tmp_path / "out"), "--steps", "1", *FAST]
    assert main(["finetune", "--model", model, *words]) == 0
    moved = shutil.copytree(model, tmp_path / "moved")
    assert main(["finetune", "--model", str(moved), *words, "--resume"]) == 0
    other = save_tiny_model(tmp_path / "other", initializer_range=0.03)
    assert main(["finetune", "--model", other, *words, "--resume"]) == 1
    assert "settings.model was 'weights " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "distill"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "albert", "modernbert"])
def test_a_model_without_its_tokenizer_is_refused(command, model_type, place, tmp_path, capsys):
    # Transformers makes one without words: all text was unknown, and the run went on.
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    words = ["--model" if command == "finetune" else "--teacher", str(tmp_path / "model"), *FAST]
    words += ["--task", place["task"], "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert main([command, *words]) == 2
    assert "cannot load a tokenizer from this directory" in capsys.readouterr().err


def test_a_student_with_another_tokenizer_is_refused_and_one_without_is_not(
    place, tmp_path, capsys
):
    student = tmp_path / "student"
    tiny_model("bert", head_cls="sequence", num_labels=2, seed=1).save_pretrained(student)
    words = ["--task", place["task"], "--student", str(student), "--dry_run"]
    assert distill(place, tmp_path / "out", *words) == 0
    tiny_tokenizer().save_pretrained(student)
    assert distill(place, tmp_path / "out", *words) == 0
    vocabulary = json.loads((student / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["good"], ids["bad"] = ids["bad"], ids["good"]
    (student / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert distill(place, tmp_path / "out", *words) == 2
    assert "tokenizers differ, e.g. 'bad' has id" in capsys.readouterr().err


def test_a_model_that_cannot_teach_is_fine_tuned_with_a_warning(place, tmp_path, caplog, capsys):
    words = ["--task", place["task"], "--steps", "1", *FAST]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = AutoConfig.for_model("roformer", **sizes, intermediate_size=16, vocab_size=200)
    AutoModel.from_config(config).save_pretrained(tmp_path / "roformer")
    tiny_tokenizer().save_pretrained(tmp_path / "roformer")
    for model, warned in ((str(tmp_path / "roformer"), True), (place["teacher"], False)):
        caplog.clear()
        given = ["--model", model, "--output_dir", str(tmp_path / f"out-{warned}"), "--dry_run"]
        assert main(["finetune", *given, *words]) == 0
        assert (
            "can be fine-tuned, but not distilled: model type 'roformer'" in caplog.text
        ) == warned
    given = ["--teacher", str(tmp_path / "roformer"), "--output_dir", str(tmp_path / "student")]
    assert main(["distill", *given, *words]) == 2
    assert "model type 'roformer' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "distill"])
@pytest.mark.parametrize("module", ["matplotlib.figure", "sklearn.metrics"])
def test_a_library_that_comes_last_is_asked_for_first(
    command, module, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "out"
    words = ["--model" if command == "finetune" else "--teacher", place["teacher"]]
    words += ["--task", place["task"], "--output_dir", str(out), "--steps", "1", *FAST]
    assert main([command, *words]) == 1
    assert f"import of {module} halted" in capsys.readouterr().err
    assert not out.exists()
