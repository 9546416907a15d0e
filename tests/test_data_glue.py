"""GLUE from its own files, from parquet and from the hub."""

import sys

import pytest
from tiny_tokenizer import tiny_tokenizer

from bertkd.data import load_task
from bertkd.data.glue import GLUE_TASKS


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


GLUE_FILES = {
    "CoLA": "gj04\t{label}\t\t{a}\n",
    "SST-2": "sentence\tlabel\n{a}\t{label}\n",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{label}\t1\t2\t{a}\t{b}\n",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\t{a}\t{b}\t{label}\nx\ty\n",
    "STS-B": "index\tgenre\tsentence1\tsentence2\tscore\n0\tg\t{a}\t{b}\t{label}\n",
    "MNLI": "index\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    "0\tp\t{a}\t{b}\tneutral\t{label}\n",
    "QNLI": "index\tquestion\tsentence\tlabel\n0\t{a}\t{b}\t{label}\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\t{a}\t{b}\t{label}\n",
    "WNLI": "index\tsentence1\tsentence2\tlabel\n0\t{a}\t{b}\t{label}\n",
}
# label as GLUE writes it, and the class number on the hub
GLUE_LABELS = {
    "STS-B": ("2.500", 2.5),
    "MNLI": ("contradiction", 2),
    "QNLI": ("not_entailment", 1),
    "RTE": ("entailment", 0),
    "WNLI": ("entailment", 1),
}


@pytest.mark.parametrize("folder", GLUE_FILES)
def test_glue_in_its_own_files(tmp_path, tokenizer, folder):
    written, label = GLUE_LABELS.get(folder, ("1", 1))
    text = GLUE_FILES[folder].format(a='a "cat', b="the dog", label=written)
    (tmp_path / folder).mkdir()
    names = ["train", "dev_matched", "dev_mismatched"] if folder == "MNLI" else ["train", "dev"]
    for name in names:
        (tmp_path / folder / f"{name}.tsv").write_text(text)
    data = load_task(folder, tokenizer=tokenizer, glue_dir=tmp_path)
    texts = ['a "cat'] if folder in ("CoLA", "SST-2") else ['a "cat', "the dog"]
    for part in (data.train, data.validation, *data.extra_validation.values()):
        assert part[0]["input_ids"] == tokenizer(*texts)["input_ids"]
        assert part[0]["labels"] == label
        assert len(part) == 1
    assert set(data.extra_validation) == ({"mismatched"} if folder == "MNLI" else set())
    assert data.regression == (folder == "STS-B")
    assert data.name in GLUE_TASKS


def test_glue_metrics_follow_its_conventions():
    metrics = {name: set(task.metrics) for name, task in GLUE_TASKS.items()}
    for name in ("mrpc", "qqp"):
        assert metrics.pop(name) == {"accuracy", "f1"}
    assert metrics.pop("stsb") == {"pearson", "spearman"}
    assert metrics.pop("cola") == {"mcc", "accuracy"}
    assert len(metrics) == 5
    assert all(names == {"accuracy"} for names in metrics.values())


def test_glue_as_parquet_shards_with_hub_names(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "sst2").mkdir()
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("validation", 1)):
        table = pa.table({"sentence": ["film"] * rows, "label": [1] * rows, "idx": [0] * rows})
        parquet.write_table(table, tmp_path / "sst2" / f"{name}.parquet")
    data = load_task("sst2", tokenizer=tokenizer, glue_dir=tmp_path)
    assert (len(data.train), len(data.validation)) == (5, 1)
    assert data.label_names == ("negative", "positive")


def test_glue_keeps_empty_questions(tmp_path, tokenizer):
    (tmp_path / "QQP").mkdir()
    for name in ("train", "dev"):
        text = GLUE_FILES["QQP"].format(a="cat", b="", label="0")
        (tmp_path / "QQP" / f"{name}.tsv").write_text(text)
    data = load_task("qqp", tokenizer=tokenizer, glue_dir=tmp_path)
    cls, cat, sep = tokenizer("cat")["input_ids"]
    assert data.train[0]["input_ids"] == [cls, cat, sep, sep]


def test_glue_from_the_hub(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        part = {"premise": ["a cat"], "hypothesis": ["a dog"], "label": [2], "idx": [0]}
        splits = ("train", "validation_matched", "validation_mismatched", "test_matched")
        return datasets.DatasetDict({name: datasets.Dataset.from_dict(part) for name in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task("MNLI", tokenizer=tokenizer)
    assert asked == [("nyu-mll/glue", "mnli")]
    assert data.train[0]["input_ids"] == tokenizer("a cat", "a dog")["input_ids"]
    assert data.train[0]["labels"] == 2
    assert len(data.extra_validation["mismatched"]) == 1
    assert data.test is None
    with pytest.raises(ValueError, match="num_labels=2, but there are 3 classes"):
        load_task("MNLI", tokenizer=tokenizer, num_labels=2)

    def fails(path, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(OSError, match=r"cannot load nyu-mll/glue/rte .*no network.*glue_dir="):
        load_task("rte", tokenizer=tokenizer)


def test_hub_without_datasets(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        load_task("rte", tokenizer=tokenizer)


def test_glue_folder_or_file_missing(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="looked for SST-2, sst2, SST2"):
        load_task("sst2", tokenizer=tokenizer, glue_dir=tmp_path)
    (tmp_path / "SST-2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train file in .*SST-2"):
        load_task("sst2", tokenizer=tokenizer, glue_dir=tmp_path)
