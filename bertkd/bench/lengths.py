"""Sequence lengths as GLUE has them."""

from __future__ import annotations

import math
import random


def glue_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of ``count`` sequences, drawn from a log-normal law with median 36 tokens, 8 to ``longest``.

    A stand-in for GLUE, whose sentence pairs are mostly 20 to 60 tokens long: no data set is read. The
    longest sequence is made ``longest``, as the padding of a batch would have it.
    """
    draw = random.Random(seed)
    lengths = [
        max(8, min(longest, round(math.exp(draw.gauss(math.log(36), 0.5))))) for _ in range(count)
    ]
    lengths[0] = longest
    return lengths
