"""Data sets of the Hugging Face hub, through the ``datasets`` library, which is imported only when needed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from bertkd.data.tables import Table


def import_datasets() -> ModuleType:
    """The ``datasets`` module.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            "loading data from the hub needs the datasets library: pip install datasets"
        ) from error
    return datasets


def load_from_hub(path: str, config: str | None = None, *, hint: str = "", **options: Any) -> Any:
    """A hub data set.

    Args:
        path: the data set's name, e.g. ``"nyu-mll/glue"``.
        config: its configuration, e.g. ``"rte"``.
        hint: what else the user can do, for the message when loading fails.
        options: the rest of what ``datasets.load_dataset`` takes.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        OSError: the data set cannot be loaded, for whatever reason the library has.
    """
    library = import_datasets()
    try:
        return library.load_dataset(path, config, **options)
    except Exception as error:  # the library's errors share no base class
        raise OSError(
            f"cannot load {_name(path, config)} from the hub ({type(error).__name__}: {error})"
            + (f"; {hint}" if hint else "")
        ) from error


def load_hub_tables(path: str, config: str | None = None, *, hint: str = "") -> dict[str, Table]:
    """Every split of a hub data set, by the split's name; arguments and errors are those of ``load_from_hub``."""
    loaded = load_from_hub(path, config, hint=hint)
    return {
        split: Table(
            {column: list(data[column]) for column in data.column_names},
            ((f"{_name(path, config)} {split}", len(data)),),
        )
        for split, data in loaded.items()
    }


def _name(path: str, config: str | None) -> str:
    return f"{path}/{config}" if config else path
