"""Which class or number a label is, where a column leaves room for doubt."""

import warnings

import numpy as np
import pytest

from bertkd.data.labels import infer_labels
from bertkd.data.tables import Table


def table(values):
    return Table({"label": values}, (("rows.csv", len(values)),))


def read(values, **options):
    """Labels as numbers, and the names of the classes."""
    space = infer_labels(table(values), "label", **options)
    return space.encode(table(values), "label").tolist(), space.names


# Names or class numbers


@pytest.mark.parametrize(
    ("names", "values", "numbers"),
    [
        (["bad", "good"], ["good", "bad"], [1, 0]),
        (["bad", "good"], [1, 0], [1, 0]),
        (["bad", "good"], ["1.0", "0.0"], [1, 0]),
        (["1", "2"], ["1", "2"], [0, 1]),
        (["1", "2"], [2], [1]),
        (["1.0", "2.0"], ["1.0", "2.0"], [0, 1]),
        (["2", "1", "0"], [0, 1, 2], [2, 1, 0]),
    ],
)
def test_labels_are_names_or_else_class_numbers(names, values, numbers):
    assert read(values, label_names=names) == (numbers, tuple(names))


@pytest.mark.parametrize("values", [["0", "1"], [1, 0], ["0"], [0.0, 1.0]])
def test_classes_named_by_numbers_are_not_taken_for_class_numbers(values):
    with pytest.raises(ValueError, match=r"unknown label '0'.* write the names") as caught:
        read(values, label_names=["1", "2"])
    held = ", ".join(sorted({repr(str(int(float(value)))) for value in values}))
    for said in ("rows.csv, row ", f"The column holds {held};", "'1', '2'."):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["good", "bad", "1"],
            "row 3: column 'label' mixes class numbers and names, 'good' and '1'",
        ),
        ([0, 1, "bad"], "row 3: column 'label' mixes class numbers and names, '0' and 'bad'"),
        ([0, 2], r"row 2: unknown label '2' .* Known from the label names: 'bad', 'good'"),
    ],
)
def test_names_and_class_numbers_are_not_mixed(values, message):
    with pytest.raises(ValueError, match=message):
        read(values, label_names=["bad", "good"])


def test_one_class_is_not_named_twice():
    with pytest.raises(ValueError, match="names a class twice"):
        read(["1"], label_names=["1", "1.0"])


# Classes or numbers to predict


def test_whole_floats_are_classes_where_classes_are_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(["1.0", "0.0"], num_labels=2) == ([1, 0], ("0", "1"))


def test_whole_floats_are_numbers_to_predict_and_how_to_make_them_classes_is_said():
    with pytest.warns(UserWarning, match=r"without a point in the file \(3, not 3.0\)"):
        assert read(["3.0", "1.0"]) == ([3.0, 1.0], ())
    assert read(["3", "1"]) == ([1, 0], ("1", "3"))


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        ({}, ["2.0", "1.5", "two"], "row 2: '1.5' .* fraction, not a class, and 'two' in the same"),
        ({"num_labels": 2}, [1, 0.5], "row 2: 0.5 .* need a single output .* or a model that has"),
        ({"regression": False}, [1, 0.5], "row 2: 0.5 .* need a single output"),
    ],
)
def test_fractions_are_no_classes(options, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(values, **options)
    assert "regression=False" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["pos", "neg"],
            "these are is unknown: write class numbers, 0 to 2, instead, or give all 3",
        ),
        (["a", "b", "c", "d"], r"Take a model or num_labels with 4 classes\.$"),
        (
            [1, 2, 3, 4],
            "Take a model or num_labels with 4 classes, or one output to predict numbers",
        ),
    ],
)
def test_another_number_of_classes_than_expected(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(values, num_labels=3)
    assert "3 classes are expected (num_labels, or the model's)" in str(caught.value)


# Words for a missing value


@pytest.mark.parametrize("word", ["NA", "None", "NULL", "n/a", " NA "])
@pytest.mark.parametrize("values", [["0", "1"], ["0.5", "0.25"], [0, 1]])
def test_a_word_for_a_missing_value_is_no_label_beside_numbers(word, values):
    with pytest.raises(ValueError, match=f"row 3: no label in column 'label' .got '{word}'"):
        read([*values, word])


def test_such_a_word_is_a_class_beside_names_which_is_said():
    with pytest.warns(UserWarning, match="'NA', 'None', in 3 of 4 rows, is taken for") as caught:
        assert read(["pos", "NA", "None", "NA"])[1] == ("NA", "None", "pos")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(["favor", "NONE", "none"])[1] == ("NONE", "favor", "none")
        assert read(["None", "pos"], label_names=["None", "pos"])[0] == [0, 1]
        # A split, or a file to be scored, may hold that class alone.
        assert read(["None", "None"], label_names=["None", "pos"])[0] == [0, 0]
    space = infer_labels(table(["None", "pos"]), "label", label_names=["None", "pos"])
    assert space.encode(table(["None"]), "label").tolist() == [0]


@pytest.mark.parametrize("values", [[f"{i},25" for i in range(20)], list(range(0, 60, 3))])
def test_a_column_that_is_hardly_one_of_classes_is_said(values):
    with pytest.warns(UserWarning, match=r"20 classes in 20 rows, such as .* \(label_column\)"):
        read(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(values[:19])
        read(values * 2)
        read(list(range(20)), num_labels=20)


@pytest.mark.parametrize("number", [1, "1", 0.0])
def test_true_and_1_are_not_two_classes(number):
    with pytest.raises(ValueError, match=f"row 3: {number!r} in column 'label' stands beside true"):
        read([True, False, number])
    assert read([True, False]) == ([1, 0], ("False", "True"))


def test_no_rows_have_no_labels():
    space = infer_labels(table(["a", "b"]), "label", label_names=["a", "b"])
    empty = space.encode(table([]), "label")
    assert (empty.dtype, empty.shape) == (np.int64, (0,))
