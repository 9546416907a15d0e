"""A dataclass from a mapping, strictly: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bertkd.errors import unknown_name

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from ``values``, as read from YAML or JSON.

    Args:
        cls: a dataclass; nested dataclasses and tuples of them are built the same way.
        values: field names and values. ``"1e-5"``, text to YAML, is taken where a float is due.
        where: what is being read, for the messages.

    Raises:
        ValueError: an unknown key (the nearest name is suggested), a missing one, a wrong type, or
            whatever ``cls`` itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}: {unknown_name('key', str(key), fields)}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: {name!r} is missing")
    converted = {
        key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()
    }
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_types(instance: Any) -> None:
    """Convert the fields of a dataclass to their types in place, as ``from_mapping`` does.

    For ``__post_init__``: built in Python, a dataclass is as strict as when it is read from a file.

    Raises:
        ValueError: a wrong type, naming the field.
    """
    for name, hint in get_type_hints(type(instance)).items():
        # Frozen ones too: nobody has seen the instance yet.
        object.__setattr__(instance, name, _convert(getattr(instance, name), hint, name))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where}: {unknown_name('value', str(value), map(str, arguments))}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {value!r}")
        pairs = enumerate(zip(value, arguments, strict=True))
        return tuple(_convert(item, kind, f"{where}[{i}]") for i, (item, kind) in pairs)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    return _convert_plain(value, hint, where)


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    # An exact type wins, so that 3 stays an int where a float would do too.
    for option in options:
        if option is type(value) or (get_origin(option) is Literal and value in get_args(option)):
            return value
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(value, option, where)
            except ValueError as error:
                errors.append(str(error))
    if len(errors) == 1:
        raise ValueError(errors[0])
    wanted = [
        " or ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else option.__name__
        for option in options
        if option is not type(None)
    ]
    raise ValueError(f"{where}: cannot use {value!r}, expected {' or '.join(wanted)}")


def _convert_plain(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, (Real, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    # NumPy's numbers are taken too, but not kept: JSON knows none of them.
    elif kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    elif kind is not int and isinstance(value, kind):
        return value
    raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
