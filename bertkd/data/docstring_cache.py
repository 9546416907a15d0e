"""Docstrings of the standard library and of installed packages, parsed once and kept on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bertkd._files import user_cache_dir, whole_file
from bertkd.data.docstrings import Docstring, parse_folder, text_key
from bertkd.errors import unknown_name

logger = logging.getLogger(__name__)

SOURCES = ("stdlib", "numpy", "torch", "transformers")
_CACHE_FORMAT = 1


def read_docstrings(
    sources: Iterable[str] = ("stdlib",), *, cache_dir: str | os.PathLike[str] | None = None
) -> list[Docstring]:
    """Every docstring of five words or more in ``sources``, each text once.

    Two docstrings with the same words (case, punctuation, numbers and layout aside) count as one;
    the first in source order and then path order stays. So no text stands on both sides of a split.

    Args:
        sources: some of ``SOURCES`` (or one as a string); packages other than ``"stdlib"`` must be
            installed.
        cache_dir: where parsed results are kept; default ``$XDG_CACHE_HOME/bertkd`` or
            ``~/.cache/bertkd``. One file per source, keyed by version and place of its files.

    Returns:
        Records in a fixed order, independent of file system order and hash seed.

    Raises:
        ValueError: unknown or empty ``sources``.
        ModuleNotFoundError: a source is not installed.
        FileNotFoundError: the source files are not on disk (a zipped standard library).
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources:
        raise ValueError(f"sources is empty: give at least one of {', '.join(SOURCES)}")
    kept: dict[str, Docstring] = {}
    for source in sources:
        if source not in SOURCES:
            raise unknown_name("docstring source", source, SOURCES)
        for record in _read_cached(source, cache_dir):
            kept.setdefault(text_key(record.text), record)
    return list(kept.values())


def _locate(source: str) -> tuple[Path, str | None, str]:
    """Root folder, package name (None for the standard library) and version of a source."""
    if source == "stdlib":
        root, package, version = Path(sysconfig.get_path("stdlib")), None, platform.python_version()
    else:
        spec = importlib.util.find_spec(source)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"docstring source {source!r} is not installed: pip install {source}, or leave it "
                "out of sources"
            )
        root, package = Path(spec.origin).parent, source
        version = importlib.metadata.version(source)
    if not any(root.glob("*.py")):
        raise FileNotFoundError(f"no .py files of {source} under {root}: its source is not on disk")
    return root, package, version


def _read_cached(source: str, cache_dir: str | os.PathLike[str] | None) -> list[Docstring]:
    root, package, version = _locate(source)
    # The running Python decides what parses, the place what is there (distributions leave parts out).
    key = json.dumps([_CACHE_FORMAT, platform.python_version(), version, str(root)])
    name = f"docstrings-{source}-{version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
    path = (Path(cache_dir) if cache_dir is not None else user_cache_dir()) / name
    cached = _load(path)
    if cached is not None:
        return cached
    records = list(parse_folder(root, source, package))
    _store(path, records)
    return records


def _load(path: Path) -> list[Docstring] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header, *rows = [json.loads(line) for line in lines]
        return [Docstring(**row) for row in rows] if header["count"] == len(rows) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # absent, damaged or foreign: it is only a cache, so read the sources again


def _store(path: Path, records: list[Docstring]) -> None:
    rows = [{"count": len(records)}, *(asdict(record) for record in records)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning("docstrings are not cached (%s); pass a writable cache_dir", error)
