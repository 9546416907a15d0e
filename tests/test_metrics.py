"""Metrics against their formulas written out, and their values where the formulas have none."""

import math

import numpy as np
import pytest

from bertkd.errors import NonFiniteError
from bertkd.training.metrics import METRICS, compute_metrics

CLASSES = ("accuracy", "f1", "macro_f1", "mcc")
NUMBERS = ("pearson", "spearman")


def one_hot(predictions):
    return np.eye(2)[np.asarray(predictions)]


def test_binary_metrics_are_their_formulas():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    tp = sum((predictions == 1) & (labels == 1))
    fp = sum((predictions == 1) & (labels == 0))
    fn = sum((predictions == 0) & (labels == 1))
    tn = sum((predictions == 0) & (labels == 0))
    values = compute_metrics(CLASSES, one_hot(predictions), labels)
    assert list(values) == list(CLASSES)
    assert values["accuracy"] == pytest.approx((tp + tn) / 50)
    assert values["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert values["macro_f1"] == pytest.approx(
        (2 * tp / (2 * tp + fp + fn) + 2 * tn / (2 * tn + fp + fn)) / 2
    )
    product = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert values["mcc"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(product))
    assert all(type(value) is float for value in values.values())


def test_correlations_are_their_formulas():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=30), rng.normal(size=30)
    values = compute_metrics(NUMBERS, x[:, None], y)
    assert values["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    assert values["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert compute_metrics(["pearson"], x, y)["pearson"] == pytest.approx(values["pearson"])


def test_the_largest_logit_is_the_prediction():
    logits = np.array([[-3.0, -1.0, -2.0], [0.1, 0.0, 0.2]], np.float32)
    assert compute_metrics("accuracy", logits, np.array([1, 2])) == {"accuracy": 1.0}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("predicted", [0, 1])
@pytest.mark.parametrize("labelled", [0, 1])
def test_constant_predictions_have_values(predicted, labelled):
    values = compute_metrics(CLASSES, one_hot([predicted] * 4), np.full(4, labelled))
    right = float(predicted == labelled)
    assert values["accuracy"] == right
    assert values["f1"] == float(predicted == labelled == 1)
    assert values["mcc"] == 0.0
    mixed = compute_metrics(CLASSES, one_hot([predicted] * 4), np.array([0, 0, 1, 1]))
    assert mixed["mcc"] == 0.0
    assert mixed["accuracy"] == 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([1, 1, 1], [1, 2, 3]),
        ([1, 2, 3], [2, 2, 2]),
        ([1], [2]),
    ],
)
def test_constant_correlations_are_zero(logits, labels):
    values = compute_metrics(NUMBERS, np.array(logits, float), np.array(labels, float))
    assert values == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.filterwarnings("error")
def test_nearly_constant_predictions_give_a_finite_value():
    logits = 1.0 + np.array([0.0, 1e-16, 2.3e-16, 0.0])
    values = compute_metrics(NUMBERS, logits, np.array([1.0, 2.0, 3.0, 4.0]))
    assert all(map(math.isfinite, values.values()))


@pytest.mark.parametrize(
    ("names", "logits", "labels", "message"),
    [
        (["acuracy"], np.eye(2), [0, 1], "unknown metric 'acuracy'. Did you mean 'accuracy'"),
        (["accuracy", "pearson"], np.eye(2), [0, 1], "one kind"),
        ([], np.eye(2), [0, 1], "one kind"),
        (["accuracy"], np.zeros(2), [0, 1], "two classes or more, got shape"),
        (["accuracy"], np.zeros((2, 1)), [0, 1], "two classes or more, got shape"),
        (["pearson"], np.eye(2), [0, 1], r"\(rows, 1\), got shape \(2, 2\)"),
        (["accuracy"], np.eye(2), [0], r"labels must be \(2,\)"),
        (["accuracy"], np.zeros((0, 2)), [], "no rows"),
        (["accuracy"], np.eye(2), [0, 2], "label 2 is no class"),
        (["accuracy"], np.eye(2), [0, -100], "label -100 is no class"),
        (["accuracy"], np.eye(2), [0, 0.5], "label 0.5 is no class"),
        (["f1"], np.eye(3), [0, 1, 2], "use macro_f1"),
    ],
)
def test_what_does_not_fit_is_refused(names, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(names, logits, np.array(labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_are_an_error_not_a_score(bad):
    logits = np.eye(4)
    logits[2, 1] = bad
    with pytest.raises(NonFiniteError, match="logits hold NaN or infinity, first in row 2 of 4"):
        compute_metrics(["accuracy"], logits, np.arange(4))
    with pytest.raises(NonFiniteError, match="labels hold"):
        compute_metrics(["pearson"], np.arange(3.0), np.array([1, bad, 2]))


def test_every_metric_says_what_it_is():
    assert set(METRICS) == {*CLASSES, *NUMBERS}
    assert all(metric.help for metric in METRICS.values())
    assert {name for name, metric in METRICS.items() if metric.regression} == set(NUMBERS)
