"""What the losses as modules refuse when they are made, not at their first batch."""

from __future__ import annotations

import numpy as np
import pytest

from bertkd import modules


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: modules.HiddenMSE("8", 12), TypeError, "width_s must be a whole number, got '8'"),
        (lambda: modules.HiddenMSE(0, 12), ValueError, "width_s must be at least 1, got 0"),
        (lambda: modules.HiddenMSE(8, 12.0), TypeError, "width_t must be a whole number, got 12.0"),
        (lambda: modules.HiddenMSE(8, 8, reduction="max"), ValueError, "HiddenMSE: reduction must"),
        (lambda: modules.HiddenMSE(4, 8, weight=[[1.0]]), ValueError, "weight is given, but"),
        (lambda: modules.HiddenMSE(4, 8, project=0), ValueError, "needs equal widths, got 4 and 8"),
        (lambda: modules.HiddenCombineMSE(8, 12), TypeError, "widths_s must be a sequence of wid"),
        (lambda: modules.HiddenCombineMSE("8", [12]), TypeError, "widths_s must be a sequence of"),
        (lambda: modules.HiddenCombineMSE([8], []), ValueError, "widths_t is empty"),
        (
            lambda: modules.HiddenCombineMSE([8], [4, -1]),
            ValueError,
            r"widths_t\[1\] must be at le",
        ),
        (
            lambda: modules.AttentionKL(temperature=-1),
            ValueError,
            "AttentionKL: temperature must b",
        ),
        (
            lambda: modules.LogitKL(temperature="2"),
            TypeError,
            "LogitKL: temperature must be a numb",
        ),
        (
            lambda: modules.LinearKL(reduction="avg"),
            ValueError,
            "LinearKL: reduction must be one o",
        ),
        (
            lambda: modules.AttentionMSE(scale_t="8"),
            TypeError,
            "AttentionMSE: scale_t must be a nu",
        ),
        (
            lambda: modules.RelationKL(relation_heads=2.0),
            TypeError,
            "relation_heads must be a whol",
        ),
        (
            lambda: modules.AttentionMSE(window=-1),
            ValueError,
            "AttentionMSE: window .tokens to either side. must be at least 0",
        ),
        (
            lambda: modules.RelationKL(relation_heads=0),
            ValueError,
            "relation_heads must be at leas",
        ),
        (lambda: modules.SoftmaxKL(impl="chunkd"), ValueError, "Did you mean 'chunked'"),
        (
            lambda: modules.AttentionKL(min_prob=1e-7, impl="chunked"),
            ValueError,
            "does not implement min_prob",
        ),
        (lambda: modules.AttentionKL(min_prob=0.0), ValueError, "AttentionKL: min_prob must lie"),
        (lambda: modules.AttentionMSE(min_score="x"), TypeError, "min_score must be a number"),
        (
            lambda: modules.AttentionMSE(min_score=-1e2, impl="chunked"),
            ValueError,
            "does not implement min_score",
        ),
    ],
)
def test_what_could_not_work_is_refused_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_works_is_taken():
    modules.HiddenMSE(np.int64(8), 12, reduction="none")
    assert modules.HiddenCombineMSE((3, 3), range(4, 6)).projection.weight.shape == (6, 9)
    modules.AttentionKL(temperature=2, scale_s=None, relation_heads=None, min_prob=1e-7)
    modules.AttentionMSE(min_score=-1e2, impl="eager", relation_heads=np.int64(2), window=64)
