"""Training, validation and test parts of a collection of docstrings, divided by module."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable

from bertkd.data.docstrings import Docstring

HELD_OUT = 1 / 5


def group_of(record: Docstring) -> str:
    """The package, or two levels of it (``"torch.nn"``) outside the standard library.

    Python's own packages are many and small; numpy, torch and transformers are few and large.
    """
    levels = 1 if record.source == "stdlib" else 2
    return ".".join(record.module.split(".")[:levels])


def digest(text: str) -> str:
    """A hash that is the same in every process, unlike ``hash``."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_by_module(records: Iterable[Docstring]) -> dict[str, list[Docstring]]:
    """Divide docstrings so that no unit of code stands on two sides.

    A unit is a module; where a module holds more than a fifth of its group (``group_of``), its
    top-level classes and functions are the units instead. In each group the units are taken in the
    order of a hash of their names; each goes to validation if that stays within a fifth of the
    group, else to test if that does, else to training. A group thus stands on all three sides
    unless most of it is one class.

    Returns:
        ``{"train": ..., "validation": ..., "test": ...}``, each in the order of ``records``.
    """
    records = list(records)
    group_sizes = Counter(map(group_of, records))
    module_sizes = Counter((group_of(r), r.module) for r in records)
    units: dict[str, Counter[str]] = defaultdict(Counter)
    unit_of = []
    for record in records:
        group = group_of(record)
        unit = record.module
        if module_sizes[group, record.module] > HELD_OUT * group_sizes[group]:
            unit += ":" + record.qualname.split(".")[0]
        units[group][unit] += 1
        unit_of.append(unit)

    side: dict[str, str] = {}
    for group, sizes in units.items():
        room = dict.fromkeys(("validation", "test"), HELD_OUT * group_sizes[group])
        for unit in sorted(sizes, key=digest):
            side[unit] = next((name for name in room if sizes[unit] <= room[name]), "train")
            if side[unit] != "train":
                room[side[unit]] -= sizes[unit]
    splits: dict[str, list[Docstring]] = {"train": [], "validation": [], "test": []}
    for record, unit in zip(records, unit_of, strict=True):
        splits[side[unit]].append(record)
    return splits
