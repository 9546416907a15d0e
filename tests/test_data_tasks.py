"""Tasks from local files: what is encoded, and what is refused."""

import json
import math

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from bertkd.data import load_task


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def jsonl(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def movies(count=10, **more):
    return [{"text": f"film {i}", "label": ["bad", "good"][i % 2], **more} for i in range(count)]


def load(path, tokenizer, **options):
    options.setdefault("validation_path", path)
    return load_task(path, tokenizer=tokenizer, **options)


# What comes out


def test_rows_are_what_the_tokenizer_makes_of_the_texts(tmp_path, tokenizer):
    rows = [
        {"a": "the cat runs", "b": "a dog", "y": "yes"},
        {"a": "x", "b": "the story was great", "y": "no"},
    ]
    data = load(
        jsonl(tmp_path, rows),
        tokenizer,
        text_column="a",
        pair_column="b",
        label_column="y",
    )
    for i, row in enumerate(rows):
        expected = tokenizer(row["a"], row["b"])
        assert data.train[i] == {
            "input_ids": expected["input_ids"],
            "token_type_ids": expected["token_type_ids"],
            "labels": ["no", "yes"].index(row["y"]),
            "index": i,
        }
    assert (data.label_names, data.num_labels, data.regression) == (("no", "yes"), 2, False)
    assert (data.metric_names, data.primary_metric) == (("accuracy", "f1"), "accuracy")
    assert data.train.lengths.tolist() == [len(row["input_ids"]) for row in data.train]
    assert data.name == "train"
    assert data.test is None
    assert data.notes == ()


def test_slices_keep_index_and_labels(tmp_path, tokenizer):
    train = load(jsonl(tmp_path, movies()), tokenizer).train
    part = train[4:8]
    assert list(part) == [train[i] for i in range(4, 8)]
    assert part[0]["index"] == 4
    assert train[-1] == train[9]
    assert list(train.take([7, 2])) == [train[7], train[2]]
    with pytest.raises(IndexError):
        train[10]


def test_tokenizer_without_token_types(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    data = load(jsonl(tmp_path, movies()), tokenizer)
    assert data.train[0].keys() == {"input_ids", "labels", "index"}


def test_directory_with_all_splits(tmp_path, tokenizer):
    jsonl(tmp_path, movies(6))
    (tmp_path / "dev.csv").write_text("text,label\nfilm,good\n")
    (tmp_path / "test.tsv").write_text("text\tlabel\nfilm\tbad\nplot\tgood\n")
    data = load_task(tmp_path, tokenizer=tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 1, 2]
    assert data.validation[0]["labels"] == 1


def test_rows_longer_than_chunk_are_all_encoded(tmp_path, tokenizer):
    rows = [{"text": f"film {i}", "label": i % 3} for i in range(2501)]
    data = load(jsonl(tmp_path, rows), tokenizer)
    for i in (0, 1999, 2000, 2500):
        assert data.train[i]["input_ids"] == tokenizer(f"film {i}")["input_ids"]
        assert data.train[i]["labels"] == i % 3
    assert data.metric_names == ("accuracy", "macro_f1")


# Classes or numbers


def test_float_labels_are_regression_unless_told(tmp_path, tokenizer):
    path = jsonl(tmp_path, [{"text": "a", "label": 0.25}, {"text": "b", "label": 3}])
    data = load(path, tokenizer)
    assert (data.regression, data.num_labels, data.label_names) == (True, 1, ())
    assert [row["labels"] for row in data.train] == [0.25, 3.0]
    assert data.train.labels.dtype == np.float32
    assert data.primary_metric == "pearson"
    with pytest.raises(ValueError, match="is a fraction, not a class"):
        load(path, tokenizer, regression=False)


def test_whole_floats_are_regression_with_a_warning_or_classes_if_told(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,0.0\nb,1.0\n")
    with pytest.warns(UserWarning, match="or pass regression=False to load_task"):
        assert load(path, tokenizer).regression
    data = load(path, tokenizer, regression=False)
    assert data.label_names == ("0", "1")
    assert data.train.labels.tolist() == [0, 1]


def test_integers_are_classes_in_numerical_order(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,10\nb,2\nc,2\n")
    data = load(path, tokenizer)
    assert data.label_names == ("2", "10")
    assert data.train.labels.tolist() == [1, 0, 0]
    assert load(path, tokenizer, num_labels=1).regression
    assert load(path, tokenizer, regression=True).train.labels.tolist() == [10.0, 2.0, 2.0]


def test_integer_labels_stay_themselves_where_num_labels_leaves_room(tmp_path, tokenizer):
    path = jsonl(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    data = load(path, tokenizer, num_labels=4)
    assert data.label_names == ("0", "1", "2", "3")
    assert data.train.labels.tolist() == [0, 2]


def test_label_names_give_the_order_and_take_numbers_too(tmp_path, tokenizer):
    names = ["good", "bad"]
    data = load(jsonl(tmp_path, movies(4)), tokenizer, label_names=names)
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    data = load(jsonl(tmp_path, rows), tokenizer, label_names=names)
    assert data.train.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            movies(4),
            {"num_labels": 1},
            "row 1: the label in column 'label' must be a finite number",
        ),
        (movies(4), {"num_labels": 3}, "3 classes are expected .*holds 2: 'bad', 'good'"),
        ([*movies(2), {"text": "c", "label": "ok"}], {"num_labels": 2}, "2 classes are .*holds 3"),
        (movies(1), {}, "holds one class only"),
        (movies(2), {"num_labels": 3, "label_names": ["bad", "good"]}, "there are 2 classes"),
        (movies(2), {"regression": True, "num_labels": 2}, "regression=True has one output"),
        (movies(2), {"num_labels": 0}, "num_labels must be at least 1"),
        (movies(2), {"label_names": ["a", "a"]}, "names a class twice"),
        ([{"text": "a", "label": 0.5}], {"num_labels": 2}, "0.5 .* is a fraction"),
        ([{"text": "a", "label": [0, 1]}], {}, r"row 1: column 'label' holds \[0, 1\], not one"),
        (movies(2), {"num_labels": "2"}, "num_labels must be a whole number, got '2'"),
        (movies(2), {"num_labels": True}, "num_labels must be a whole number, got True"),
        (
            movies(2),
            {"label_names": "ab"},
            "label_names must be a list of names, got the text 'ab'",
        ),
    ],
)
def test_labels_that_contradict_the_arguments(tmp_path, tokenizer, rows, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load(jsonl(tmp_path, rows), tokenizer, **options)


@pytest.mark.parametrize("missing", [None, math.nan, "", "NaN"])
@pytest.mark.parametrize("regression", [True, False])
def test_missing_label_names_file_and_row(tmp_path, tokenizer, missing, regression):
    rows = [{"text": "a", "label": i} for i in (0, 1)] + [{"text": "c", "label": missing}]
    path = jsonl(tmp_path, rows)
    with pytest.raises(ValueError, match="row 3: no label in column 'label'") as caught:
        load(path, tokenizer, regression=regression)
    assert str(path) in str(caught.value)


def test_infinite_label(tmp_path, tokenizer):
    path = jsonl(tmp_path, [{"text": "a", "label": 0.5}, {"text": "b", "label": math.inf}])
    with pytest.raises(ValueError, match=r"row 2: .*finite number for regression, got inf"):
        load(path, tokenizer)


def test_unknown_label_in_validation(tmp_path, tokenizer):
    train = jsonl(tmp_path, movies(4))
    other = jsonl(tmp_path, [*movies(2), {"text": "c", "label": "goood"}], "dev.jsonl")
    with pytest.raises(ValueError, match=r"unknown label 'goood'.*Did you mean 'good'") as caught:
        load_task(train, validation_path=other, tokenizer=tokenizer)
    assert f"{other}, row 3" in str(caught.value)
    assert f"Known from {train}: 'bad', 'good'" in str(caught.value)
    with pytest.raises(ValueError, match=r"row 1: unknown label 'bad'.*Known from label_names"):
        load(train, tokenizer, label_names=["worst", "good"])


# Texts


@pytest.mark.parametrize("text", ["", "  \t", None, 7, "half \ud800", "\udc00"])
@pytest.mark.parametrize("column", ["text", "other"])
def test_texts_that_are_none_name_file_row_and_column(tmp_path, tokenizer, text, column):
    rows = movies(3, other="dog")
    rows[1][column] = text
    path = jsonl(tmp_path, rows)
    with pytest.raises(ValueError, match=f"row 2: column '{column}' holds") as caught:
        load(path, tokenizer, pair_column="other")
    assert str(path) in str(caught.value)


def test_over_long_texts_are_cut_counted_and_told_once(tmp_path, tokenizer):
    lengths = [1, 5, 6, 7, 40]
    rows = [{"text": "cat " * n, "label": n % 2} for n in lengths]
    path = jsonl(tmp_path, rows)
    with pytest.warns(UserWarning, match="were cut") as caught:
        data = load(path, tokenizer, max_length=8)
    assert len(caught) == 1
    # 6 cats and two special tokens fit; each file is read as training and as validation data
    for said in ("4 of 10 examples", "train: 2, validation: 2", "max_length=8", "longest has 42"):
        assert said in str(caught[0].message)
    assert "up to 128" in str(caught[0].message)
    assert data.train.lengths.tolist() == [3, 7, 8, 8, 8]
    cut = data.train[4]["input_ids"]
    assert cut == tokenizer("cat " * 6)["input_ids"]
    assert data.notes == (str(caught[0].message),)


@pytest.mark.parametrize(
    ("max_length", "pair", "message"),
    [
        (2, None, "leaves no room for text: this tokenizer adds 2"),
        (4, "other", "leaves no room for text: this tokenizer adds 3"),
        (129, None, "more than this tokenizer's model_max_length=128"),
        ("32", None, "max_length must be a whole number, got '32'"),
        (32.0, None, "max_length must be a whole number, got 32.0"),
    ],
)
def test_impossible_max_length(tmp_path, tokenizer, max_length, pair, message):
    path = jsonl(tmp_path, movies(other="dog"))
    with pytest.raises((ValueError, TypeError), match=message):
        load(path, tokenizer, max_length=max_length, pair_column=pair)


# Columns and names


@pytest.mark.parametrize("argument", ["text_column", "pair_column", "label_column"])
def test_missing_column_names_argument_file_and_nearest(tmp_path, tokenizer, argument):
    path = jsonl(tmp_path, movies(sentance="dog"))
    with pytest.raises(ValueError, match=f"{argument}='sentence'") as caught:
        load(path, tokenizer, **{argument: "sentence"})
    for said in (str(path), "Did you mean 'sentance'?", "'text', 'label', 'sentance'"):
        assert said in str(caught.value)


@pytest.mark.parametrize("argument", ["text_column", "pair_column"])
def test_missing_column_names_its_argument_also_where_rows_are_held_out(
    tmp_path, tokenizer, argument
):
    with pytest.raises(ValueError, match=f"{argument}='sentence'"):
        load_task(jsonl(tmp_path, movies()), tokenizer=tokenizer, **{argument: "sentence"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text_column": "label"}, "text_column and label_column are both 'label'"),
        ({"pair_column": "text"}, "text_column and pair_column are both 'text'"),
        ({"pair_column": "label"}, "pair_column and label_column are both 'label'"),
    ],
)
def test_one_column_cannot_be_two_things(tmp_path, tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        load(jsonl(tmp_path, movies()), tokenizer, **columns)


def test_unlabelled_test_split_says_what_to_do(tmp_path, tokenizer):
    path, test = jsonl(tmp_path, movies()), jsonl(tmp_path, [{"text": "a"}], "test.jsonl")
    with pytest.raises(ValueError, match=r"test.jsonl has no column 'label': the test split is sc"):
        load(path, tokenizer, test_path=test)


def test_glue_dir_of_a_local_task_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="glue_dir is for GLUE's tasks only"):
        load(jsonl(tmp_path, movies()), tokenizer, glue_dir=tmp_path)


def test_column_missing_in_validation_only(tmp_path, tokenizer):
    other = jsonl(tmp_path, [{"txt": "a", "label": "bad"}], "dev.jsonl")
    with pytest.raises(ValueError, match=r"dev.jsonl has no such column. Did you mean 'txt'"):
        load_task(jsonl(tmp_path, movies()), validation_path=other, tokenizer=tokenizer)


def test_no_usual_column(tmp_path, tokenizer):
    path = jsonl(tmp_path, [{"comment": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"pass text_column= .* 'comment', 'label'"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("pydocs-topics", ValueError, "unknown task.*Did you mean 'pydocs-topic'"),
        ("sst-3", ValueError, "unknown task.*Did you mean 'sst2'"),
        ("pydocs-retrieval", ValueError, "load_retrieval"),
        ("none.csv", FileNotFoundError, "no such file or directory: none.csv"),
        ("some/where", FileNotFoundError, "no such file or directory: some/where"),
    ],
)
def test_unknown_task(tokenizer, name, error, message):
    with pytest.raises(error, match=message):
        load_task(name, tokenizer=tokenizer)


def test_directory_without_training_file(tmp_path, tokenizer):
    jsonl(tmp_path, movies(), "dev.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no training file .* train or training"):
        load_task(tmp_path, tokenizer=tokenizer)


def test_local_arguments_do_not_go_with_built_in_tasks(tokenizer):
    with pytest.raises(ValueError, match=r"text_column, regression: only for local files.*\./rte"):
        load_task("rte", tokenizer=tokenizer, text_column="a", regression=True)


# Held-out rows


def split_texts(tokenizer, path, **options):
    with pytest.warns(UserWarning, match="comes without validation data") as caught:
        data = load_task(path, tokenizer=tokenizer, **options)
    texts = [
        [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in part]
        for part in (data.train, data.validation)
    ]
    assert data.notes == (str(caught[0].message),)
    return data, *texts


def test_held_out_rows_are_a_function_of_text_and_seed(tmp_path, tokenizer):
    rows = movies(200)
    data, train, held = split_texts(tokenizer, jsonl(tmp_path, rows))
    assert (len(train), len(held)) == (180, 20)
    assert sorted(train + held) == sorted(row["text"] for row in rows)
    assert [row["index"] for row in data.train] == list(range(180))
    shuffled = jsonl(tmp_path, rows[::-1], "turned.jsonl")
    assert set(split_texts(tokenizer, shuffled)[2]) == set(held)
    assert set(split_texts(tokenizer, shuffled, seed=1)[2]) != set(held)
    assert len(split_texts(tokenizer, shuffled, validation_fraction=0.5)[2]) == 100


def test_held_out_texts_are_never_trained_on(tmp_path, tokenizer):
    rows = [{"text": f"film {i % 20}", "label": i % 2} for i in range(200)]
    _, train, held = split_texts(tokenizer, jsonl(tmp_path, rows))
    assert held
    assert not set(train) & set(held)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_impossible_fraction(tmp_path, tokenizer, fraction):
    with pytest.raises(ValueError, match="validation_fraction must lie between 0 and 1"):
        load_task(jsonl(tmp_path, movies()), tokenizer=tokenizer, validation_fraction=fraction)


def test_one_text_cannot_be_held_out(tmp_path, tokenizer):
    rows = [{"text": "film", "label": i % 2} for i in range(9)]
    with pytest.raises(ValueError, match="too few different ones to hold out"):
        load_task(jsonl(tmp_path, rows), tokenizer=tokenizer)
