"""``--select``: which cases, contestants and modes to run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from bertkd.errors import unknown_name

# What a field of the selection is called, and the attribute it looks at.
FIELDS = {
    "kind": "kind",
    "op": "op",
    "impl": "impl",
    "mode": "mode",
    "dtype": "dtype",
    "padding": "padding",
    "B": "batch",
    "H": "heads",
    "L": "length",
    "D": "width_s",
    "N": "rows",
    "V": "classes",
    "n": "layers",
    "P": "processes",
}


@dataclass(frozen=True)
class Selection:
    """What was asked for; an absent field allows everything."""

    allowed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def allows(self, name: str, value: object) -> bool:
        """Whether a field may have this value."""
        patterns = self.allowed.get(name)
        return patterns is None or any(fnmatchcase(str(value), p) for p in patterns)

    def takes(self, case: Any) -> bool:
        """Whether a case's own attributes are all allowed; ``impl`` and ``mode`` are not a case's."""
        names = [name for name in self.allowed if name not in ("impl", "mode")]
        return all(self.allows(name, getattr(case, FIELDS[name], 0)) for name in names)


def parse_selection(text: str | None, known: Mapping[str, Collection[str]]) -> Selection:
    """Read ``"relation_kl,L=128|512,impl=native|eager"``.

    Comma-separated conditions that must all hold; ``|`` separates alternatives, ``*`` and ``?`` match parts of
    a name. A word without ``=`` is an op or a kind ("op", "scaling", "step").

    Args:
        text: what the user wrote; None or "" selects everything.
        known: field -> the values there are, for ``kind``, ``op``, ``impl``, ``mode`` and the like.

    Raises:
        ValueError: an unknown field, or a value that nothing has, with the nearest one that exists.
    """
    if text is not None and text.strip() and not text.strip(" ,"):
        raise ValueError(f"select={text!r} names nothing; leave it out to take everything.")
    allowed: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            name, value = _bare(name, known), name
        if name not in FIELDS:
            raise unknown_name("field of select", name, FIELDS)
        if name in allowed:
            raise ValueError(
                f"select={text!r} says {name} twice; write the alternatives as {name}=one|two."
            )
        patterns = tuple(word.strip() for word in value.split("|"))
        for pattern in patterns:
            _check(name, pattern, known.get(name))
        allowed[name] = patterns
    return Selection(allowed)


def known_values(cases: Iterable[Any], **others: Collection[str]) -> dict[str, Collection[str]]:
    """The values that the fields of these cases have, and those given."""
    known: dict[str, Collection[str]] = dict(others)
    listed = list(cases)
    for name, attribute in FIELDS.items():
        if name not in known:
            values = {str(getattr(case, attribute)) for case in listed if hasattr(case, attribute)}
            known[name] = values - {"0"}
    return known


def _bare(word: str, known: Mapping[str, Collection[str]]) -> str:
    first = word.split("|")[0].strip()
    return "kind" if first in known.get("kind", ()) else "op"


def _check(name: str, pattern: str, values: Collection[str] | None) -> None:
    if values is None or any(fnmatchcase(value, pattern) for value in values):
        return
    raise unknown_name(f"{name} in select", pattern, values)
