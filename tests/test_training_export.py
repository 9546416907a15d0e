"""The exported student: a plain Hugging Face checkpoint, and nobody else's files lost."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import tiny_batch, tiny_model

from bertkd.training import export


def test_it_reloads_and_holds_nothing_of_the_training(tmp_path):
    from tiny_tokenizer import tiny_tokenizer
    from transformers import AutoModel, AutoTokenizer

    model = tiny_model("bert", hidden=16, heads=2)
    path = export(model, tiny_tokenizer(), tmp_path / "student", "# My student\n\nSmall.")
    loaded = AutoModel.from_pretrained(path)
    assert type(loaded) is type(model)
    batch = tiny_batch(model)
    torch.testing.assert_close(
        loaded(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=0, atol=0
    )
    assert AutoTokenizer.from_pretrained(path).vocab_size
    card = (path / "README.md").read_text()
    assert card.startswith("# My student\n\nSmall.\n")
    known = {"config.json", "model.safetensors", "README.md"}
    known |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
    assert set(os.listdir(path)) <= known
    assert os.listdir(tmp_path) == ["student"]


def test_who_may_read_the_config_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        path = export(tiny_model("bert", hidden=16, heads=2), None, tmp_path / "student")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


def test_only_our_own_or_an_empty_folder_is_replaced(tmp_path):
    model = tiny_model("bert", hidden=16, heads=2)
    path = tmp_path / "student"
    path.mkdir()
    export(model, None, path)
    (path / "stray").write_text("left by nobody")
    export(model, None, path, "# New")
    assert sorted(os.listdir(path)) == ["README.md", "config.json", "model.safetensors"]
    assert "# New" in (path / "README.md").read_text()

    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "README.md").write_bytes(b"\xff my thesis")
    with pytest.raises(FileExistsError, match="thesis exists and was not made by an export"):
        export(model, None, foreign)
    assert (foreign / "README.md").read_bytes() == b"\xff my thesis"
    with pytest.raises(FileExistsError, match=r"config\.json exists"):
        export(model, None, path / "config.json")


def test_a_full_disk_leaves_the_old_one_and_is_said(tmp_path, monkeypatch):
    model = tiny_model("bert", hidden=16, heads=2)
    path = export(model, None, tmp_path / "student", "# Old")

    def fail(*words, **options):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"student could not be written \(No space left"):
        export(model, None, path, "# New")
    assert "# Old" in (path / "README.md").read_text()
    assert os.listdir(tmp_path) == ["student"]


def test_a_disk_that_is_full_at_the_tokenizer_is_said_too(tmp_path, monkeypatch):
    from tiny_tokenizer import tiny_tokenizer

    model = tiny_model("bert", hidden=16, heads=2)
    path = export(model, None, tmp_path / "student", "# Old")
    save = model.save_pretrained

    def save_and_fill(folder):
        save(folder)
        (folder / "tokenizer.json").symlink_to("/dev/full")

    monkeypatch.setattr(model, "save_pretrained", save_and_fill)
    with pytest.raises(OSError, match=r"student could not be written \(No space left"):
        export(model, tiny_tokenizer(), path, "# New")
    assert "# Old" in (path / "README.md").read_text()
    assert os.listdir(tmp_path) == ["student"]


def test_a_failing_export_leaves_the_old_one(tmp_path):
    model = tiny_model("bert", hidden=16, heads=2)
    path = export(model, None, tmp_path / "student", "# Old")
    with pytest.raises(RuntimeError, match="disk full"):
        export(Broken(model), None, path, "# New")
    assert "# Old" in (path / "README.md").read_text()
    assert os.listdir(tmp_path) == ["student"]


class Broken:
    def __init__(self, model):
        self.model = model

    def save_pretrained(self, path):
        self.model.save_pretrained(path)
        raise RuntimeError("disk full")
