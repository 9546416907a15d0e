"""Metrics of classification and regression, computed by scikit-learn and scipy.

Every metric is larger for better and always a number. Where a formula has no value, its value here
is 0.0: the correlations when predictions or labels are constant (or there is one row only), MCC
when there is one class only among predictions or labels, F1 of a class that is neither predicted
nor there. GLUE's conventions: accuracy for all classification tasks, with F1 of class 1 for MRPC
and QQP and MCC for CoLA; Pearson and Spearman for STS-B.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bertkd.errors import NonFiniteError, unknown_name


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        compute: ``(predictions, labels) -> float``; both of shape (rows,).
        regression: predictions and labels are numbers, not classes.
        help: one line for a table or ``--help``.
    """

    compute: Callable[[np.ndarray, np.ndarray], float]
    regression: bool
    help: str


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predictions)


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predictions, pos_label=1, zero_division=0.0)


def _macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predictions, average="macro", zero_division=0.0)


def _mcc(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a single class, whose value is defined above
        return matthews_corrcoef(labels, predictions)


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlate(predictions: np.ndarray, labels: np.ndarray) -> float:
        from scipy import stats

        if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nearly constant input
            return getattr(stats, name)(predictions, labels).statistic

    return correlate


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(_accuracy, False, "share of right answers"),
    "f1": Metric(_f1, False, "F1 of class 1 of two classes"),
    "macro_f1": Metric(_macro_f1, False, "mean of the F1 of the classes that occur"),
    "mcc": Metric(_mcc, False, "Matthews correlation coefficient"),
    "pearson": Metric(_correlation("pearsonr"), True, "Pearson correlation"),
    "spearman": Metric(_correlation("spearmanr"), True, "Spearman rank correlation"),
}


def check_computable(names: Sequence[str]) -> None:
    """To be asked before a training that is scored with these metrics at its end.

    Raises:
        ImportError: scikit-learn or scipy is not installed, or does not fit what is.
    """
    for name in names:
        importlib.import_module("scipy.stats" if METRICS[name].regression else "sklearn.metrics")


def compute_metrics(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Compute metrics from a model's outputs.

    Args:
        names: keys of ``METRICS``, all for classification or all for regression.
        logits: (rows, classes), whose largest is the prediction; for regression (rows,) or (rows,
            1).
        labels: (rows,), integer classes, or floats for regression.

    Returns:
        ``{name: value}`` in the order of ``names``; plain finite floats.

    Raises:
        ValueError: unknown name, mixed kinds, no rows, shapes that do not fit, a label that is no
            class of the logits, or F1 with other than two classes.
        NonFiniteError: a logit or label is NaN or infinite.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    kinds = {METRICS[name].regression for name in names}
    if len(kinds) != 1:
        raise ValueError(
            f"metrics must be one or more of one kind, got {names}: "
            + "; ".join(f"{name}: {metric.help}" for name, metric in METRICS.items())
        )
    logits, labels = np.asarray(logits), np.asarray(labels)
    regression = kinds.pop()
    predictions = _predictions(names, logits, labels, regression)
    labels = labels.astype(np.float64 if regression else np.int64)
    values = {name: float(METRICS[name].compute(predictions, labels)) for name in names}
    return {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}


def _predictions(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray, regression: bool
) -> np.ndarray:
    if regression:
        wanted, fits = "(rows,) or (rows, 1)", logits.ndim == 1 or logits.shape[1:] == (1,)
    else:
        wanted = "(rows, classes), two classes or more"
        fits = logits.ndim == 2 and logits.shape[1] > 1
    if not fits:
        raise ValueError(f"{', '.join(names)}: logits must be {wanted}, got shape {logits.shape}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be ({len(logits)},) to fit the logits, got {labels.shape}")
    if not len(labels):
        raise ValueError("no rows to compute metrics from")
    for what, values in (("logits", logits), ("labels", labels)):
        bad = ~np.isfinite(values)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise NonFiniteError(
                f"{what} hold NaN or infinity, first in row {row} of {len(values)}"
            )
    if regression:
        return logits.reshape(-1).astype(np.float64)
    classes = logits.shape[1]
    if "f1" in names and classes != 2:
        raise ValueError(f"f1 is for two classes, the logits have {classes}: use macro_f1")
    strange = (labels < 0) | (labels >= classes) | (labels != labels.astype(np.int64))
    if strange.any():
        raise ValueError(
            f"label {labels[strange][0]} is no class: the logits have classes 0 to {classes - 1}"
        )
    return logits.argmax(axis=1)
