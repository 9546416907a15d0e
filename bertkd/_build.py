"""What the installation built, and why a part of it is missing: the record that setup.py leaves in the package."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

PARTS = ("cpu", "cuda")


@lru_cache(maxsize=1)
def record() -> dict[str, Any]:
    """The record of this installation.

    Returns:
        ``parts`` that were built (of "cpu", "cuda"), ``missing`` (part -> one clause with the remedy),
        ``compiler``, ``isa`` (instruction sets beside the portable one), ``nvcc``, ``cuda_archs`` and
        ``cuda_ptx`` (the architecture that newer GPUs compile from), ``python``, ``machine``, ``mode``
        (the value of ``BERTKD_BUILD``). Without a record every part is missing.
    """
    path = Path(__file__).with_name("_build_info.json")
    if not path.exists():
        reason = "bertkd runs from a source tree that was not installed (run pip install)"
        return {"parts": [], "missing": dict.fromkeys(PARTS, reason)}
    return json.loads(path.read_text())


def missing(part: str) -> str | None:
    """Why ``part`` ("cpu" or "cuda") was not built, in one clause, or None if it was."""
    if part in record()["parts"]:
        return None
    return record()["missing"].get(part, "it was not built")


def lost() -> str:
    """Why ``bertkd._C`` is not found although it was built, in one clause."""
    built, here = record().get("python", "another Python"), sys.implementation.cache_tag
    if built != here:
        return f"it was built for {built}, this is {here} (reinstall bertkd with this Python)"
    return "its file is gone (reinstall bertkd)"


def lines() -> list[str]:
    """The record for people, one line a part."""
    found = record()
    shown = {
        "cpu": lambda: (
            f"built by {found['compiler']} for {found['machine']}, "
            + ", ".join(["portable", *found["isa"]])
        ),
        "cuda": lambda: (
            f"built by nvcc {found['nvcc']} for sm_" + ", sm_".join(found["cuda_archs"]) + _ptx()
        ),
    }
    return [
        f"{part}: {shown[part]() if part in found['parts'] else f'not built: {missing(part)}'}"
        for part in PARTS
    ]


def serves(capability: tuple[int, int]) -> bool:
    """Whether the CUDA part has code for a GPU of this compute capability, e.g. ``(9, 0)``."""
    major, minor = capability
    found = record()
    for arch in found.get("cuda_archs", []):
        number = int(arch.rstrip("af"))
        same_major, older = number // 10 == major, number % 10 <= minor
        # Code for 90a runs on that GPU alone, for 100f on later ones of its family too, as for a number.
        if same_major and (number % 10 == minor if arch.endswith("a") else older):
            return True
    ptx = found.get("cuda_ptx")
    return ptx is not None and int(ptx) <= 10 * major + minor


def _ptx() -> str:
    ptx = record().get("cuda_ptx")
    return f" and, from PTX, newer than sm_{ptx}" if ptx else ""
