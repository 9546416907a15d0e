"""Which student blocks and states learn from which of the teacher's.

Blocks run ``0..N-1``; states run ``0..N``, state 0 being the embedding output and state ``i + 1``
the output of block ``i``. Each has its function, so that one is never taken for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch

from bertkd.errors import unknown_name, whole_number

Pairs = tuple[tuple[int, int], ...]
MapSpec = str | Mapping[Any, Any] | Iterable[Any]

BLOCK_MAPS = ("uniform", "last", "random")
STATE_MAPS = ("uniform", "skip", "last", "random", "combine")

_HOW = "write pairs (student:teacher) as '0:3,1:7', [(0, 3), (1, 7)] or {0: 3, 1: 7}"


def block_pairs(
    spec: MapSpec,
    num_student: int,
    num_teacher: int,
    *,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Pairs (student block, teacher block), sorted.

    - ``"uniform"``: student block ``i`` learns from the end of its share of the teacher,
      ``round_half_up((i + 1) * num_teacher / num_student) - 1``. 12 -> 3 is 3, 7, 11 (blocks 4, 8,
      12 counted from 1), 12 -> 5 is 1, 4, 6, 9, 11. The last block always has the last block.
    - ``"last"``: the last block of each.
    - ``"random"``: teacher blocks drawn without replacement and sorted, anew on each call.
    - explicit pairs: ``"0:3,1:7"``, ``[(0, 3), (1, 7)]`` or ``{0: 3}``. One student block may
      learn from several teacher blocks, and the other way round.

    Args:
        spec: the map, as above.
        num_student: number of student blocks.
        num_teacher: number of teacher blocks.
        generator: CPU generator for ``"random"``; PyTorch's default one when not given.

    Raises:
        TypeError: if ``spec`` is neither text nor a collection of pairs (an iterator such as
            ``zip(...)`` can be read only once, and each term reads the map), or a depth no whole number.
        ValueError: for a depth below 1, an unknown or unreadable map, a number out of range, a pair given twice, a
            student deeper than its teacher (``"uniform"``, ``"random"``), a map for states only.
    """
    _check_depths(num_student, num_teacher)
    name = _name_of(spec)
    if name in ("skip", "combine"):
        raise ValueError(
            f"layer map {name!r} is for states only (it uses the embedding output); "
            f"for blocks use one of {', '.join(BLOCK_MAPS)}, or explicit pairs, and give it to the "
            f"terms on states alone, e.g. hid_seq(map={name!r})"
        )
    if name is not None:
        return _named_blocks(name, num_student, num_teacher, generator)
    pairs = _read_pairs(spec)
    for side, who, blocks in ((0, "student", num_student), (1, "teacher", num_teacher)):
        for pair in pairs:
            if not 0 <= pair[side] < blocks:
                raise ValueError(
                    f"layer map pair {format_pairs([pair])}: {who} block {pair[side]} is out of "
                    f"range; the {who} has blocks 0..{blocks - 1} (numbers are 0-based)"
                )
    return pairs


def state_pairs(
    spec: MapSpec,
    num_student: int,
    num_teacher: int,
    *,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Pairs (student state, teacher state), sorted; ``num_*`` count BLOCKS, states run ``0..num``.

    - ``"uniform"``, ``"last"``, ``"random"``: the outputs of the blocks that `block_pairs` gives,
      so both numbers are one higher and the embedding output (state 0) is left out.
    - ``"skip"``: ``"uniform"`` and the embedding output, ``(0, 0)``. 12 -> 3 is 0, 4, 8, 12.
    - explicit pairs of states, written as for `block_pairs`: what a term's own ``map`` means (a map that all terms
      share is of blocks, see `shared_state_pairs`).

    ``"combine"`` (all states of each side, concatenated) has no pairs: test for it before.

    Raises:
        TypeError: as `block_pairs`.
        ValueError: as `block_pairs`; also for ``"combine"``.
    """
    _check_depths(num_student, num_teacher)
    name = _name_of(spec)
    if name == "combine":
        raise ValueError(
            "layer map 'combine' joins all states and has no pairs; only the hidden-state terms "
            "hid_seq and hid_cls can use it"
        )
    if name is not None:
        if name not in STATE_MAPS:
            raise unknown_name("layer map", name, STATE_MAPS)
        of_blocks = "uniform" if name == "skip" else name
        behind = outputs(_named_blocks(of_blocks, num_student, num_teacher, generator))
        return ((0, 0), *behind) if name == "skip" else behind
    pairs = _read_pairs(spec)
    for side, who, blocks in ((0, "student", num_student), (1, "teacher", num_teacher)):
        for pair in pairs:
            if not 0 <= pair[side] <= blocks:
                raise ValueError(
                    f"layer map pair {format_pairs([pair])}: {who} state {pair[side]} is out of "
                    f"range; the {who}'s states run 0..{blocks}, state 0 = embeddings, "
                    f"state {blocks} = output of its last block"
                )
    return pairs


def shared_state_pairs(spec: MapSpec, num_student: int, num_teacher: int) -> Pairs:
    """Pairs of states for a map that terms on blocks read as well: explicit pairs are of blocks, and give the states
    behind these, as the named maps do.

    Raises:
        TypeError, ValueError: as `block_pairs`; for names as `state_pairs`.
    """
    if _name_of(spec) is not None:
        return state_pairs(spec, num_student, num_teacher)
    return outputs(block_pairs(spec, num_student, num_teacher))


def outputs(blocks: Pairs) -> Pairs:
    """Pairs of the states behind pairs of blocks."""
    return tuple((s + 1, t + 1) for s, t in blocks)


def check_map(spec: MapSpec) -> None:
    """Refuse a map that neither blocks nor states could read, before their numbers are known.

    Raises:
        TypeError, ValueError: as `state_pairs`, except for numbers out of range.
    """
    name = _name_of(spec)
    if name is None:
        _read_pairs(spec)
    elif name not in STATE_MAPS:
        raise unknown_name("layer map", name, STATE_MAPS)


def is_random(spec: MapSpec) -> bool:
    """Whether the map differs from call to call, so that it must be asked for at every step."""
    return _name_of(spec) == "random"


def format_pairs(pairs: Iterable[tuple[int, int]]) -> str:
    """Write pairs so that they can be read back: ``((0, 3), (1, 7))`` -> ``"0:3,1:7"``."""
    return ",".join(f"{s}:{t}" for s, t in pairs)


def uniform_blocks(num_student: int, num_teacher: int) -> list[int]:
    """Teacher blocks that end ``num_student`` even shares of the teacher; see `block_pairs`.

    Raises:
        ValueError: if ``num_student > num_teacher``.
    """
    _refuse_deeper("uniform", num_student, num_teacher)
    # In integers, because round() sends halves to the even neighbour.
    return [
        (2 * (i + 1) * num_teacher + num_student) // (2 * num_student) - 1
        for i in range(num_student)
    ]


def _named_blocks(
    name: str, num_student: int, num_teacher: int, generator: torch.Generator | None
) -> Pairs:
    if name == "uniform":
        return tuple(enumerate(uniform_blocks(num_student, num_teacher)))
    if name == "last":
        return ((num_student - 1, num_teacher - 1),)
    if name == "random":
        _refuse_deeper(name, num_student, num_teacher)
        drawn = torch.randperm(num_teacher, generator=generator, device="cpu")[:num_student]
        return tuple(enumerate(sorted(drawn.tolist())))
    raise unknown_name("layer map", name, BLOCK_MAPS)


def _name_of(spec: MapSpec) -> str | None:
    """The name of a named map; None for explicit pairs, which as text hold digits."""
    if isinstance(spec, str) and not any(char.isdigit() for char in spec):
        return spec
    return None


def _read_pairs(spec: MapSpec) -> Pairs:
    """Explicit pairs in any accepted form, sorted; the ranges are the caller's to check."""
    if isinstance(spec, str):
        items: list[Any] = spec.split(",")
    elif isinstance(spec, Mapping):
        items = list(spec.items())
    elif isinstance(spec, Iterator):
        raise TypeError(
            f"layer map is a {type(spec).__name__}, which can be read only once: pass list(...)"
        )
    elif isinstance(spec, Iterable):
        items = list(spec)
    else:
        raise TypeError(f"layer map must be text or pairs, got {type(spec).__name__}; {_HOW}")
    if not items:
        raise ValueError(f"the layer map is empty; {_HOW}")
    pairs = sorted(_read_pair(item, spec) for item in items)
    twice = [pair for pair, following in pairwise(pairs) if pair == following]
    if twice:
        raise ValueError(
            f"the layer map has a pair twice: {format_pairs(twice)}; to count a pair more, "
            "give its term a weight"
        )
    return tuple(pairs)


def _read_pair(item: Any, spec: MapSpec) -> tuple[int, int]:
    try:
        student, teacher = item.split(":") if isinstance(item, str) else item
        return _index(student), _index(teacher)
    except (TypeError, ValueError):
        raise ValueError(f"cannot read the layer map {spec!r} at {item!r}; {_HOW}") from None


def _index(value: Any) -> int:
    # int() would take 3.7 and True without a word.
    if isinstance(value, bool) or not isinstance(value, Integral | str):
        raise TypeError
    if isinstance(value, str) and "_" in value:
        raise ValueError  # int() reads "1_1" as 11
    return int(value)


def _refuse_deeper(name: str, num_student: int, num_teacher: int) -> None:
    if num_student > num_teacher:
        raise ValueError(
            f"layer map {name!r} needs a student no deeper than its teacher, got {num_student} "
            f"student and {num_teacher} teacher blocks; use 'last' or explicit pairs ('0:0,1:0')"
        )


def _check_depths(num_student: int, num_teacher: int) -> None:
    for name, value in (("num_student", num_student), ("num_teacher", num_teacher)):
        whole_number(name, value, least=1)
