"""Docstring tasks: what is read, that nothing leaks between splits, that all is the same everywhere."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from bertkd.data import load_retrieval, load_task, open_corpus
from bertkd.data.doc_splits import group_of, split_by_module
from bertkd.data.docstrings import Docstring, text_key
from bertkd.data.pydocs import pydocs_task


@pytest.fixture(scope="session")
def topic(cache_dir):
    return pydocs_task("pydocs-topic", cache_dir=cache_dir)


@pytest.fixture(scope="session")
def match(cache_dir):
    return pydocs_task("pydocs-match", cache_dir=cache_dir)


# Splits


def test_no_unit_of_code_stands_on_two_sides(records):
    splits = split_by_module(records)
    assert sum(map(len, splits.values())) == len(records)
    sizes = Counter(map(group_of, records))
    modules = Counter(record.module for record in records)
    sides = {}
    for name, part in splits.items():
        for record in part:
            whole = modules[record.module] <= sizes[group_of(record)] / 5
            unit = (record.module, "" if whole else record.qualname.split(".")[0])
            sides.setdefault(unit, set()).add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert sum(unit[1] == "" for unit in sides) > 200


def test_split_sizes(records):
    splits = split_by_module(records)
    sizes = Counter(map(group_of, records))
    for name in ("validation", "test"):
        counts = Counter(map(group_of, splits[name]))
        assert all(count <= sizes[group] / 5 for group, count in counts.items())
        assert 0.13 * len(records) < len(splits[name]) <= 0.2 * len(records)
    large = [group for group, size in sizes.items() if size >= 50]
    trained = Counter(map(group_of, splits["train"]))
    assert all(trained[group] >= 0.5 * sizes[group] for group in large)
    assert set(large) <= set(map(group_of, splits["validation"]))


# Topic


def test_topic_texts_do_not_name_packages(topic):
    names = [name.lower() for name in topic.label_names]
    assert {"email", "asyncio", "logging"} <= set(names)
    texts = [text for table in topic.tables.values() for text in table.columns["text"]]
    for text in texts:
        assert not set(re.findall("[a-z0-9]+", text.lower())) & set(names), text
    # "_pydecimal" is two words to the test above
    assert not any("_pydecimal" in text for text in texts)
    assert any("package" in text for text in texts)


def test_topic_labels_are_the_packages(topic, records):
    package = {text_key(record.text): record.package for record in records}
    checked = 0
    for table in topic.tables.values():
        for text, label in zip(table.columns["text"], table.columns["label"], strict=True):
            if (key := text_key(text)) in package:
                checked += 1
                assert package[key] == topic.label_names[label]
    assert checked > 2000
    counts = Counter(label for t in topic.tables.values() for label in t.columns["label"])
    assert min(counts.values()) >= 40
    assert set(topic.tables["train"].columns["label"]) == set(range(len(topic.label_names)))


@pytest.mark.parametrize("task", ["topic", "match"])
def test_no_text_stands_on_two_sides(task, request):
    tables = request.getfixturevalue(task).tables
    texts = {name: {text_key(t) for t in table.columns["text"]} for name, table in tables.items()}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def some_docstrings(names, texts):
    """One function for each text, in turn of one of the packages; each in a module of its own."""
    return [
        Docstring(
            source="stdlib",
            package=(package := names[i % len(names)]),
            module=f"{package}.m{i}",
            qualname=f"f{i}",
            kind="function",
            signature="()",
            text=text,
            path="",
        )
        for i, text in enumerate(texts)
    ]


def spell(number):
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def test_texts_that_are_equal_without_the_names_count_once(monkeypatch):
    texts = [f"Words about {spell(i)} for all." for i in range(200)]
    texts += [f"Give the version of {name}.sub now." for name in ("alpha", "beta")]
    some = some_docstrings(["alpha", "beta"], texts)
    monkeypatch.setattr("bertkd.data.pydocs.read_docstrings", lambda *args, **options: some)
    task = pydocs_task("pydocs-topic")
    found = [text for table in task.tables.values() for text in table.columns["text"]]
    assert len(found) == 201
    assert found.count("Give the version of package now.") == 1


# Match


def test_functions_with_the_same_signature_are_no_wrong_answers(monkeypatch):
    some = some_docstrings(["alpha"], [f"Words about {spell(i)} for all." for i in range(60)])
    some = [replace(record, qualname="main") for record in some]
    some += some_docstrings(["beta"], [f"Texts about {spell(i)} for all." for i in range(60)])
    monkeypatch.setattr("bertkd.data.pydocs.read_docstrings", lambda *args, **options: some)
    for table in pydocs_task("pydocs-match").tables.values():
        columns = (table.columns[name] for name in ("text", "signature", "label"))
        for text, signature, label in zip(*columns, strict=True):
            if text.startswith("Words"):
                assert (signature == "main()") == bool(label)


def test_match_is_balanced_in_answers_texts_and_signatures(match):
    assert match.label_names[1] == "described"
    for table in match.tables.values():
        labels = np.array(table.columns["label"])
        assert labels.mean() == 0.5
        for column in ("text", "signature"):
            values = np.array(table.columns[column])
            right, wrong = Counter(values[labels == 1]), Counter(values[labels == 0])
            # a few pairs were left out because two functions have the same signature
            assert (right - wrong).total() < 0.02 * len(labels)
            if column == "text":
                assert right == wrong


def test_match_answers_are_right_and_wrong_ones_half_from_the_same_package(match, records):
    cut = {}
    for record in records:
        cut.setdefault(" ".join(record.text.split()[:64]), record)
    owners = {}
    for record in records:
        if record.kind == "function":
            owners.setdefault(record.qualname + record.signature, set()).add(group_of(record))
    near = wrong = 0
    for table in match.tables.values():
        columns = (table.columns[name] for name in ("text", "signature", "label"))
        for text, signature, label in zip(*columns, strict=True):
            own = cut[text].qualname + cut[text].signature
            assert (own == signature) == bool(label)
            if not label:
                wrong += 1
                near += group_of(cut[text]) in owners[signature]
    assert near / wrong == pytest.approx(0.5, abs=0.05)


def test_match_order_tells_nothing(match):
    labels = np.array(match.tables["train"].columns["label"])
    assert 0.4 < (labels[1:] != labels[:-1]).mean() < 0.6


# Retrieval


@pytest.mark.parametrize("split", ["validation", "test"])
def test_retrieval_asks_about_held_out_functions(cache_dir, records, split):
    data = load_retrieval(split=split, cache_dir=cache_dir)
    assert 600 < len(data.queries) == len(data.documents)
    for texts in (data.queries, data.documents, data.train_texts):
        assert len(set(texts)) == len(texts)
    held = {}
    for record in split_by_module(records)[split]:
        held.setdefault(record.qualname + record.signature, []).append(record)
    right = 0
    for query, document in zip(data.queries, data.documents, strict=True):
        right += any(" ".join(r.text.split()[:64]) == document for r in held.get(query, ()))
    # cut texts that coincide are dropped before splitting, which may move a unit or two
    assert right > 0.97 * len(data.queries)
    seen = {text_key(text) for text in data.train_texts}
    assert not seen & {text_key(document) for document in data.documents}


def test_retrieval_splits_are_apart_and_can_be_smaller(cache_dir):
    validation = load_retrieval(cache_dir=cache_dir)
    test = load_retrieval(split="test", cache_dir=cache_dir)
    assert validation.train_texts == test.train_texts
    assert not set(validation.documents) & set(test.documents)
    small = load_retrieval(max_queries=50, cache_dir=cache_dir)
    assert small.queries == validation.queries[:50]
    assert small.documents == validation.documents[:50]
    with pytest.raises(ValueError, match="unknown retrieval split 'dev'"):
        load_retrieval(split="dev", cache_dir=cache_dir)
    with pytest.raises(ValueError, match="max_queries must be at least 2"):
        load_retrieval(max_queries=1, cache_dir=cache_dir)


# As tasks


@pytest.mark.parametrize("name", ["pydocs-topic", "pydocs-match"])
def test_load_task_takes_them_by_name(name, records, monkeypatch):
    some = [record for record in records if record.package in ("email", "http", "inspect")]
    monkeypatch.setattr("bertkd.data.pydocs.read_docstrings", lambda *args, **options: some)
    raw = pydocs_task(name)
    data = load_task(name, tokenizer=tiny_tokenizer(), max_length=32)
    assert len(data.train) == len(raw.tables["train"])
    assert len(data.test) == len(raw.tables["test"])
    assert data.train.labels.tolist() == raw.tables["train"].columns["label"]
    assert data.num_labels == len(data.label_names) == len(raw.label_names)
    assert data.primary_metric == "accuracy"
    assert max(data.train.lengths) == 32
    assert len(data.notes) == 1


def test_pretraining_corpus_is_the_training_side(cache_dir, records):
    texts = set(open_corpus("pydocs", cache_dir=cache_dir).texts())
    splits = split_by_module(records)
    assert texts == {" ".join(record.text.split()) for record in splits["train"]}


def test_everything_is_the_same_in_another_process(cache_dir, topic, match):
    script = """
import hashlib, json, sys
from bertkd.data.pydocs import load_retrieval, pydocs_task
def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
def tables(name):
    task = pydocs_task(name, cache_dir=sys.argv[1])
    return digest({split: table.columns for split, table in task.tables.items()})
data = load_retrieval(cache_dir=sys.argv[1])
print(tables("pydocs-topic"), tables("pydocs-match"), digest([data.queries, data.documents]))
"""
    found = subprocess.run(
        [sys.executable, "-c", script, str(cache_dir)],
        env={**os.environ, "PYTHONHASHSEED": "123"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()

    def digest(value):
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    data = load_retrieval(cache_dir=cache_dir)
    tables = [{split: t.columns for split, t in task.tables.items()} for task in (topic, match)]
    assert found == [*map(digest, tables), digest([data.queries, data.documents])]
