"""``bertkd tune``: the best tile shapes of the Triton kernels for the GPU at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertkd.bench.tune import Found

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(kw_only=True)
class Config:
    """Measure the tile shapes of the Triton attention kernels on this GPU and store those that are faster.

    The result is a JSON file for this GPU model in $BERTKD_TUNE_DIR, or in bertkd/tune in $XDG_CACHE_HOME
    or ~/.cache; every later process uses it, and deleting it brings the shipped shapes back.

      bertkd tune
      bertkd tune --dtypes "[bfloat16]" --head_widths "[64,32]" --budget_minutes 10

    Attributes:
        dtypes: bfloat16, float16, float32.
        head_widths: Widths of the attention heads, 1 to 128.
        forms: Kernel forms to tune. Default: all.
        budget_minutes: Start no further form after this time, and name those left out. Default: no limit.
    """

    dtypes: list[str] = field(default_factory=lambda: ["bfloat16"])
    head_widths: list[int] = field(default_factory=lambda: [64])
    forms: list[str] = field(default_factory=list)
    budget_minutes: float | None = None


def prepare(config: Config) -> Callable[[], None]:
    """Check the options and the device; the result measures.

    Raises:
        ValueError: a wrong option, or no CUDA device.
    """
    import torch

    from bertkd.errors import unknown_name
    from bertkd.ops.implementations import unavailable

    for name in ("dtypes", "head_widths"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; there is nothing to tune.")
    if config.budget_minutes is not None and not 0 < config.budget_minutes < math.inf:
        raise ValueError(f"budget_minutes must be positive, got {config.budget_minutes}.")
    for dtype in config.dtypes:
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
    for width in config.head_widths:
        if not 1 <= width <= 128:
            raise ValueError(f"head_widths must lie between 1 and 128, got {width}.")
    if (reason := unavailable("triton")) is not None:
        raise ValueError(f"there is nothing to tune: Triton cannot run here, {reason}.")
    from bertkd.bench.tune import WORKLOADS

    for form in config.forms:
        if form not in WORKLOADS:
            raise unknown_name("form", form, WORKLOADS)
    if not torch.cuda.is_available():
        raise ValueError("there is nothing to tune: no CUDA device was found.")
    return lambda: _run(config)


def _run(config: Config) -> None:
    import torch

    from bertkd.bench.tune import FORMS, tune
    from bertkd.ops.triton.config import tuned_file

    dtypes = [getattr(torch, name) for name in config.dtypes]
    stored = 0
    for found in tune(
        dtypes,
        config.head_widths,
        config.forms or FORMS,
        budget_minutes=config.budget_minutes,
    ):
        stored += found.is_faster
        print(f"{found.key:20s} {_change(found)}", flush=True)
    where = tuned_file(torch.cuda.get_device_name())
    print(f"{stored} faster configurations stored in {where}" if stored else "nothing to store")


def _change(found: Found) -> str:
    if not found.is_faster:
        return "the shipped one stays"
    runs = math.isfinite(found.shipped_milliseconds)
    shipped = f"{found.shipped_milliseconds:.3f} ms" if runs else "wrong or does not run here"
    best = f"{tuple(found.config)} {found.milliseconds:.3f} ms"
    return f"{tuple(found.shipped)} {shipped} -> {best}"
