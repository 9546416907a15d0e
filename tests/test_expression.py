"""The text form of objectives: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertkd.objectives.expression import Expression, TermSpec, distinct_names, parse

OPTIONS = st.one_of(
    st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(st.characters(categories=["L", "N"]), max_size=5),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3),
)
TERM = st.builds(
    TermSpec,
    kind=st.sampled_from(["att_kl", "hid_seq", "kd"]),
    options=st.dictionaries(st.sampled_from(["map", "temperature", "impl"]), OPTIONS).map(
        lambda options: tuple(options.items())
    ),
    weight=st.floats(0, 1e6),
    released=st.booleans(),
)


def test_sum_of_weighted_terms_with_options_and_variant():
    expression = parse("0.5*hid_seq(map='skip') + att_kl@released + kd(temperature=2) * 3")
    assert [term.kind for term in expression.terms] == ["hid_seq", "att_kl", "kd"]
    assert [term.weight for term in expression.terms] == [0.5, 1.0, 3.0]
    assert [term.released for term in expression.terms] == [False, True, False]
    assert [dict(term.options) for term in expression.terms] == [
        {"map": "skip"},
        {},
        {"temperature": 2},
    ]


@pytest.mark.parametrize(
    ("text", "weights", "released"),
    [
        ("0.5*att_kl@released", [0.5], [True]),
        ("att_kl@released*0.5", [0.5], [True]),
        ("2*(att_kl + 0.5*val_kl)", [2.0, 1.0], [False, False]),
        ("(att_kl + val_kl)@released", [1.0, 1.0], [True, True]),
        ("att_kl(weight=0.25)", [0.25], [False]),
        ("2*att_kl(weight=0.25)", [0.5], [False]),
        ("  att_kl\n  + val_kl ", [1.0, 1.0], [False, False]),
        ("0*att_kl", [0.0], [False]),
    ],
)
def test_weights_and_variants_distribute(text, weights, released):
    terms = parse(text).terms
    assert [term.weight for term in terms] == weights
    assert [term.released for term in terms] == released


def test_explicit_pairs_are_plain_values():
    pairs, mapping = parse("hid_seq(map=[(0, 0), (3, 12)]) + att_kl(map={0: 3})").terms
    assert dict(pairs.options) == {"map": [(0, 0), (3, 12)]}
    assert dict(mapping.options) == {"map": {0: 3}}


def test_repeated_terms_get_distinct_names():
    terms = parse("att_kl(map='last') + val_kl + att_kl + att_kl").terms
    assert [term.name for term in terms] == ["att_kl", "val_kl", "att_kl_2", "att_kl_3"]


@given(st.lists(TERM, min_size=1, max_size=4))
def test_text_of_an_expression_reads_back_to_it(terms):
    expression = Expression(distinct_names(tuple(terms)))
    assert parse(str(expression)) == expression


def test_equality_sees_every_part():
    base = parse("0.5*kd(temperature=2)")
    for other in ("0.4*kd(temperature=2)", "0.5*kd(temperature=3)", "0.5*kd@released", "0.5*ce"):
        assert parse(other) != base


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("att_kl - hid_seq", "negative", "att_kl"),
        ("-1*att_kl", "not negative", "-1"),
        ("att_kl + -0.5*kd", "not negative", "-0.5"),
        ("kd(weight=-1)", "not negative", "kd"),
        ("1e999*kd", "finite", "1e999"),
        ("kd(2)", "options of kd are written with their names", "2"),
        ("kd(temperature=T)", "plain value", "T)"),
        ("kd(temperature=open('x'))", "plain value", "open"),
        ("kd(**{})", "not allowed", "{}"),
        ("kd(weight='x')", "weight of kd", "kd"),
        ("kd(weight=True)", "weight of kd", "kd"),
        ("att_kl@exact", "only 'released'", "exact"),
        ("att_kl*val_kl", "must be a number", "att_kl"),
        ("att_kl/2", "expected a term", "att_kl"),
        ("True*kd", "must be a number", "True"),
        ("att_kl.x", "expected a term", "att_kl.x"),
        ("[att_kl]", "expected a term", "["),
        ("'att_kl'", "expected a term", "'att_kl'"),
        ("3", "expected a term", "3"),
        ("f()()", "only a term's name", "f"),
        ("1é*kd", None, None),
        ("att_kl +", None, None),
        ("kd(temperature=1, temperature=2)", "given twice", None),
        ("att_kl hid_seq", None, None),
    ],
)
def test_refusals_show_text_and_place(text, message, marked):
    with pytest.raises(ValueError, match=message) as caught:
        parse(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown.strip() == text
    if marked is not None:
        assert shown[caret.index("^") :].startswith(marked)


def test_caret_counts_characters_not_bytes():
    with pytest.raises(ValueError, match="after @") as caught:
        parse("kd(map='é') + att_kl@x")
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^") :] == "x"


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="empty"):
        parse(text)


@pytest.mark.parametrize("value", [None, 3, ["att_kl"]])
def test_other_than_text_is_refused(value):
    with pytest.raises(TypeError, match="must be text"):
        parse(value)


@pytest.mark.parametrize("text", ["(" * 5000 + "kd" + ")" * 5000, "kd\0", "+".join(["kd"] * 3000)])
def test_hostile_text_is_refused_and_not_run(text):
    with pytest.raises(ValueError, match="objective"):
        parse(text)
