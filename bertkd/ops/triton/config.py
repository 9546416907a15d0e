"""Tile shapes of the attention kernels: shipped tables, and what ``bertkd tune`` measured on this machine's GPU.

A shipped row is keyed by architecture, kernel form, bits of the wider operand and head width padded to a power of
two. Rows of table 90 were measured on an H200: all for 16-bit operands of width 64, most for 16, 32 and 128, and the
gradients' for fp32 ones of 64 (docs/gpu.md). The others were chosen by compiling: no spills (but for four registers of
``gram_grad`` of width 64 without a mask on table 80), shared memory within the smallest chip's of the group, and of
those the fewest instructions per pair of row and key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd._files import user_cache_dir, whole_file
from bertkd.ops.triton.sizes import resident_programs

DIRECTORY_VARIABLE = "BERTKD_TUNE_DIR"
WIDTHS = (16, 32, 64, 128)


class Config(NamedTuple):
    """Rows and keys of a tile, warps of a program, and tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# The interpreter gains nothing from large tiles, and small ones have more edges to get wrong.
INTERPRETED = Config(32, 32, 4, 2)
# Length up to which the interpreter takes the forms in which a program owns a head.
INTERPRETED_SHORT = 64

# Takes the place of a factor of 0 on the scores, which would let pads through; too small to show in a score.
TINY = 1e-20

# Compute capability -> table; a newer one takes the last. The rows of 80 fit into the 99 KiB of sm_86, 89 and 120.
_TABLES = {80: 80, 86: 80, 89: 80, 90: 90, 100: 90, 120: 80}

# (table, form, bits) -> a configuration for each of WIDTHS. In the forms in which a program owns a head block_n is the
# longest sequence, and None sends a width to the general form.
_SHIPPED: dict[tuple[int, str, int], tuple[Config | None, ...]] = {}


def _ship(tables: tuple[int, ...], form: str, bits: int, *rows: tuple[int, ...] | None) -> None:
    for table in tables:
        _SHIPPED[table, form, bits] = tuple(None if row is None else Config(*row) for row in rows)


_BOTH = (80, 90)
_ship((80,), "rows", 16, (128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3))
_ship((90,), "rows", 16, (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3))
_ship((80,), "grad_rows", 16, (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (32, 32, 4, 3))
_ship((90,), "grad_rows", 16, (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3))
_ship((80,), "grad_keys", 16, (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 4, 3), (64, 32, 4, 2))
_ship((90,), "grad_keys", 16, (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2))
_ship((80,), "rows", 32, (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2))
_ship((90,), "rows", 32, (64, 64, 4, 2), (64, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2))
_ship((80,), "grad_rows", 32, (128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2))
_ship((90,), "grad_rows", 32, (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (16, 16, 4, 2))
_ship((80,), "grad_keys", 32, (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1))
_ship((90,), "grad_keys", 32, (32, 32, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2), (16, 32, 4, 1))
for _form in ("short", "self_short"):
    _ship(_BOTH, f"{_form}_16", 16, *[(16, 16, 1, 1)] * 4)
    _ship(_BOTH, f"{_form}_32", 16, *[(32, 32, 1, 1)] * 3, (32, 32, 2, 1))
    _ship(_BOTH, f"{_form}_64", 16, *[(64, 64, 4, 1)] * 4)
    _ship((80,), _form, 16, (128, 128, 8, 1), (128, 128, 8, 1), None, None)
    _ship(_BOTH, f"{_form}_16", 32, (16, 16, 1, 1), (16, 16, 1, 1), (16, 16, 2, 1), None)
    _ship(_BOTH, f"{_form}_32", 32, None, (32, 32, 4, 1), None, None)
    _ship(_BOTH, _form, 32, None, None, None, None)
    _ship((80,), f"{_form}_64", 32, (64, 64, 8, 1), None, None, None)
    _ship((90,), f"{_form}_64", 32, (64, 64, 8, 1), (64, 64, 8, 1), None, None)
_ship((90,), "short_16", 16, (16, 16, 1, 1), (16, 16, 1, 1), (16, 16, 1, 2), (16, 16, 1, 1))
_ship((90,), "short_32", 16, (32, 32, 2, 1), (32, 32, 2, 1), (32, 32, 1, 1), (32, 32, 2, 1))
_ship((90,), "short", 16, *[(128, 128, 8, 2)] * 3, (128, 128, 8, 1))
_ship((90,), "self_short", 16, *[(128, 128, 8, 2)] * 4)
_ship((80,), "pairs", 16, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2))
_ship((90,), "pairs", 16, (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2))
_ship(_BOTH, "pairs", 32, (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1))
# Their products are in fp32 whatever the operands are.
for _bits in (16, 32):
    _ship((80,), "gram", _bits, (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), None)
    _ship((90,), "gram", _bits, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), None)
    _ship(_BOTH, "gram_rows", _bits, (64, 64, 4, 1), (64, 64, 4, 1), (32, 64, 8, 1), None)
    _ship((80,), "gram_grad", _bits, (64, 64, 4, 1), (64, 64, 4, 1), (32, 64, 4, 1), None)
    _ship((90,), "gram_grad", _bits, (64, 64, 4, 1), (64, 64, 4, 1), (128, 64, 8, 1), None)

FORMS = tuple(sorted({form for _, form, _ in _SHIPPED}))


def shipped(form: str, bits: int, width: int, capability: int) -> Config | None:
    """The shipped configuration, of the nearest architecture that is not newer and the next width.

    Args:
        form: one of ``FORMS``.
        bits: of the wider operand, 16 or 32.
        width: of the wider head.
        capability: compute capability times 10, e.g. 90.

    Returns:
        None where the form is not for that width.
    """
    known = [c for c in _TABLES if c <= capability]
    table = _TABLES[max(known, default=80)]
    return _SHIPPED[table, form, bits][_index(width)]


def _index(width: int) -> int:
    return next(i for i, limit in enumerate(WIDTHS) if width <= limit)


def lookup(form: str, *tensors: Tensor) -> Config:
    """The configuration of a form for tensors (..., D) of both sides on their device; tuned ones come first.

    Raises:
        KeyError: where the form is not for that width.
    """
    config = _find(form, tensors)
    if config is None:
        raise KeyError(f"{form} has no configuration for head width {tensors[0].shape[-1]}")
    return config


def short_config(form: str, x_s: Tensor, x_t: Tensor) -> Config | None:
    """How a program can own a head of (B, H, L, D), ``form`` "short" or "self_short"; None if L is too long for it."""
    length = x_s.shape[2]
    if not x_s.is_cuda:
        return INTERPRETED if length <= INTERPRETED_SHORT else None
    for name in (f"{form}_16", f"{form}_32", f"{form}_64", form):
        config = _find(name, (x_s, x_t))
        if config is not None and length <= config.block_n:
            return config
    return None


def short_programs(heads: int, config: Config, x: Tensor) -> int:
    """Programs of a form that visits whole heads: one a head, or with a pipeline as many as run at the same time."""
    return resident_programs(heads, config.num_warps, x) if config.num_stages > 1 else heads


def _find(form: str, tensors: tuple[Tensor, ...]) -> Config | None:
    device = tensors[0].device
    bits = 8 * max(x.dtype.itemsize for x in tensors)
    width = max(x.shape[-1] for x in tensors)
    if _trials and tuned_key(form, bits, width) in _trials:
        return _trials[tuned_key(form, bits, width)]
    if device.type != "cuda":
        return INTERPRETED
    return _on_device(form, bits, width, device.index or 0)


_trials: dict[str, Config] = {}


@contextmanager
def trial(key: str, config: Config) -> Iterator[None]:
    """Use ``config`` for a ``tuned_key`` meanwhile, whatever was shipped or tuned: how candidates are measured."""
    _trials[key] = config
    try:
        yield
    finally:
        del _trials[key]


@cache
def _on_device(form: str, bits: int, width: int, index: int) -> Config | None:
    tuned = read_tuned(torch.cuda.get_device_name(index))
    key = tuned_key(form, bits, width)
    if key in tuned:
        return tuned[key]
    major, minor = torch.cuda.get_device_capability(index)
    return shipped(form, bits, width, 10 * major + minor)


def tuned_key(form: str, bits: int, width: int) -> str:
    """Key of a tuned configuration, e.g. ``"grad_rows/16/64"``."""
    return f"{form}/{bits}/{WIDTHS[_index(width)]}"


def tuned_file(device_name: str) -> Path:
    """Where the tuned configurations of a GPU model lie: ``BERTKD_TUNE_DIR``, or the user's cache."""
    folder = os.environ.get(DIRECTORY_VARIABLE)
    path = Path(folder) if folder else user_cache_dir() / "tune"
    return path / (re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-") + ".json")


def read_tuned(device_name: str) -> dict[str, Config]:
    """Tuned configurations by ``tuned_key``; none if the file is not there, or out of this user's reach.

    Raises:
        ValueError: naming a file that does not hold configurations.
    """
    file = tuned_file(device_name)
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}  # a home that is another user's, as root's in a container, must not cost the kernels
    try:
        return {key: Config(*map(int, row)) for key, row in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no configurations ({error}). Delete it; `bertkd tune` makes a new one."
        ) from error


def write_tuned(device_name: str, configs: dict[str, Config]) -> Path:
    """Store tuned configurations beside what the file already holds; they count from the next process on."""
    file = tuned_file(device_name)
    merged = {**read_tuned(device_name), **configs}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    return file


def candidates(form: str, bits: int, width: int, capability: int) -> Iterator[Config]:
    """Configurations worth measuring, the shipped one first; those that do not compile are for the caller to skip."""
    first = shipped(form, bits, width, capability)
    if first is None:
        return
    yield first
    if form.startswith(("short", "self_short")):
        tiles = [(first.block_m, first.block_n)]
    elif form.startswith("gram"):
        tiles = [(rows, first.block_n) for rows in (16, 32, 64, 128)]
    else:
        tiles = [(rows, keys) for rows in (16, 32, 64, 128) for keys in (16, 32, 64, 128)]
    for rows, keys in tiles:
        for warps in (1, 2, 4, 8) if form.endswith(("_16", "_32", "_64")) else (4, 8):
            for stages in (1, 2, 3):
                config = Config(rows, keys, warps, stages)
                if config != first:
                    yield config
