"""Layer maps: the named ones against hand-written tables, explicit ones in every form, refusals."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertkd.layer_maps import block_pairs, format_pairs, is_random, state_pairs, uniform_blocks

depths = st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda x: (x[0], x[0] + x[1]))


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "teacher"),
    [
        (3, 12, [3, 7, 11]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (5, 12, [1, 4, 6, 9, 11]),
        (8, 12, [1, 2, 4, 5, 7, 8, 10, 11]),
        (4, 6, [1, 2, 4, 5]),
        (12, 12, list(range(12))),
        (1, 12, [11]),
    ],
)
def test_uniform_table(num_student: int, num_teacher: int, teacher: list[int]) -> None:
    assert block_pairs("uniform", num_student, num_teacher) == tuple(enumerate(teacher))
    after = [(s + 1, t + 1) for s, t in enumerate(teacher)]
    assert state_pairs("uniform", num_student, num_teacher) == tuple(after)
    assert state_pairs("skip", num_student, num_teacher) == ((0, 0), *after)


@given(depths)
def test_uniform_properties(depth: tuple[int, int]) -> None:
    num_student, num_teacher = depth
    blocks = uniform_blocks(num_student, num_teacher)
    assert len(blocks) == num_student
    assert all(a < b for a, b in pairwise(blocks))
    assert blocks[0] >= 0
    assert blocks[-1] == num_teacher - 1
    for i, block in enumerate(blocks):
        exact = Fraction((i + 1) * num_teacher, num_student)
        assert block == floor(exact + Fraction(1, 2)) - 1


def test_last() -> None:
    assert block_pairs("last", 3, 12) == ((2, 11),)
    assert state_pairs("last", 3, 12) == ((3, 12),)
    assert block_pairs("last", 12, 3) == ((11, 2),)


@given(depths, st.integers(0, 2**31))
def test_random_is_sorted_and_without_replacement(depth: tuple[int, int], seed: int) -> None:
    num_student, num_teacher = depth
    generator = torch.Generator().manual_seed(seed)
    students, teachers = zip(
        *block_pairs("random", num_student, num_teacher, generator=generator), strict=True
    )
    assert students == tuple(range(num_student))
    assert list(teachers) == sorted(set(teachers))
    assert teachers[0] >= 0
    assert teachers[-1] < num_teacher


def test_random_is_redrawn_and_follows_the_generator() -> None:
    def draws(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        return [state_pairs("random", 3, 12, generator=generator) for _ in range(8)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)
    assert len(set(draws(0))) > 1
    assert all(pair[0] >= 1 and pair[1] >= 1 for pairs in draws(0) for pair in pairs)
    seen = {t for seed in range(20) for pairs in draws(seed) for _, t in pairs}
    assert seen == set(range(1, 13))


@pytest.mark.parametrize(
    "spec",
    [
        "0:3,1:7,2:11",
        " 2:11, 1 : 7 ,0:3",
        [(0, 3), (1, 7), (2, 11)],
        [[2, 11], [0, 3], [1, 7]],
        ["0:3", "1:7", "2:11"],
        {0: 3, 1: 7, 2: 11},
        {"0": "3", "1": 7, 2: 11},
        ((0, 3), (1, 7), (2, 11)),
        [(np.int64(0), np.int64(3)), np.array([1, 7]), (2, 11)],
    ],
)
def test_explicit_forms(spec: object) -> None:
    assert block_pairs(spec, 3, 12) == ((0, 3), (1, 7), (2, 11))
    assert state_pairs(spec, 3, 12) == ((0, 3), (1, 7), (2, 11))


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 11)), min_size=1))
def test_format_reads_back(pairs: set[tuple[int, int]]) -> None:
    expected = tuple(sorted(pairs))
    assert block_pairs(format_pairs(expected), 6, 12) == expected


def test_a_block_may_appear_in_several_pairs() -> None:
    assert block_pairs("0:3,0:4,1:4", 2, 12) == ((0, 3), (0, 4), (1, 4))


def test_states_reach_one_further_than_blocks() -> None:
    assert state_pairs("0:0,3:12", 3, 12) == ((0, 0), (3, 12))
    with pytest.raises(ValueError, match=r"3:11: student block 3 .* blocks 0\.\.2 .*0-based"):
        block_pairs("3:11", 3, 12)
    with pytest.raises(ValueError, match=r"2:12: teacher block 12 .* blocks 0\.\.11 .*0-based"):
        block_pairs([(2, 12)], 3, 12)
    with pytest.raises(ValueError, match=r"4:12: student state 4 .*0\.\.3, state 0 = embeddings"):
        state_pairs("4:12", 3, 12)
    with pytest.raises(ValueError, match=r"teacher state 13 .*0\.\.12, state 0 = embeddings"):
        state_pairs("3:13", 3, 12)


@pytest.mark.parametrize("spec", ["-1:3", [(-1, 3)], [(0, -1)]])
@pytest.mark.parametrize("pairs", [block_pairs, state_pairs])
def test_negative_numbers_are_out_of_range(pairs: object, spec: object) -> None:
    with pytest.raises(ValueError, match="out of range"):
        pairs(spec, 3, 12)


@pytest.mark.parametrize("pairs", [block_pairs, state_pairs])
@pytest.mark.parametrize("name", ["uniform", "random"])
def test_deeper_student_is_refused(pairs: object, name: str) -> None:
    with pytest.raises(ValueError, match="got 13 student and 12 teacher blocks; use 'last' or"):
        pairs(name, 13, 12)


def test_maps_for_states_only() -> None:
    for name in ("skip", "combine"):
        with pytest.raises(ValueError, match="states only"):
            block_pairs(name, 3, 12)
    with pytest.raises(ValueError, match="has no pairs"):
        state_pairs("combine", 3, 12)


@pytest.mark.parametrize("pairs", [block_pairs, state_pairs])
def test_unreadable_maps(pairs: object) -> None:
    with pytest.raises(ValueError, match="Did you mean 'uniform'"):
        pairs("unifrom", 3, 12)
    for text in ("0-3", "0:3;1:7", "0:3,", "0:1:2", "3,7,11", "0:a", "0:1.5", "0_1:3"):
        with pytest.raises(ValueError, match="cannot read the layer map"):
            pairs(text, 3, 12)
    for spec in ([3, 7, 11], [(0, 1, 2)], [(0, 1.0)], [(True, 1)], {"0": None}, [(0, "x")]):
        with pytest.raises(ValueError, match="cannot read the layer map"):
            pairs(spec, 3, 12)
    for empty in ([], {}):
        with pytest.raises(ValueError, match="empty"):
            pairs(empty, 3, 12)
    with pytest.raises(TypeError, match="got int"):
        pairs(3, 3, 12)
    # A second term would find it used up.
    with pytest.raises(TypeError, match=r"is a zip, which can be read only once: pass list"):
        pairs(zip([0, 1], [3, 7], strict=True), 3, 12)
    with pytest.raises(ValueError, match="pair twice: 0:3;"):
        pairs("0:3,1:7,0:3", 3, 12)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None])
def test_depths_must_be_positive_whole_numbers(bad: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"num_student must be .*, got {bad}"):
        block_pairs("last", bad, 3)
    with pytest.raises((TypeError, ValueError), match=f"num_teacher must be .*, got {bad}"):
        state_pairs("last", 3, bad)


def test_is_random() -> None:
    assert is_random("random")
    assert not is_random("uniform")
    assert not is_random([(0, 0)])
