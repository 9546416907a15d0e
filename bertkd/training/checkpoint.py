"""Checkpoint folders: written whole, checked before they are read, found by step.

``checkpoint-<step>/`` holds safetensors and JSON files and a ``manifest.json`` with the size and
SHA-256 of each, so that a truncated, altered or foreign folder is refused by name and reason.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bertkd._files import clear_leftovers
from bertkd.errors import CheckpointError
from bertkd.training.atomic import whole_directory

FORMAT = "bertkd-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTS = {f"{name}.safetensors" for name in ("model", "optimizer")} | {
    f"{name}.json" for name in ("trainer_state", "rng", "run")
}

logger = logging.getLogger(__name__)


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: by file (without ``.safetensors``), then by name; on the CPU.
        documents: by file (without ``.json``): plain JSON values.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)


def save(output_dir: Path, step: int, contents: Contents) -> Path:
    """Write ``output_dir/checkpoint-<step>``; it is complete and on disk when this returns.

    Raises:
        OSError: it could not be written; nothing of it is left, and older ones are untouched.
    """
    path = output_dir / f"checkpoint-{step}"
    try:
        with whole_directory(path) as temporary:
            _fill(temporary, step, contents)
    except (OSError, SafetensorError) as error:
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{path} could not be written ({error}). The checkpoints before it are untouched: make "
            "room, and resume=True goes on from the last one",
        ) from error
    return path


def _fill(folder: Path, step: int, contents: Contents) -> None:
    for name, tensors in contents.tensors.items():
        save_file(tensors, folder / f"{name}.safetensors")
    for name, document in contents.documents.items():
        text = json.dumps(document, indent=1, allow_nan=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    files = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: naming ``path`` and the reason: missing, not ours, written by a newer
            version, or a file missing, truncated or altered.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}; it was not written by bertkd's training")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        kind, version = manifest["format"], int(manifest["version"])
        files = {name: (int(f["bytes"]), f["sha256"]) for name, f in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({error!r})") from error
    if kind != FORMAT:
        raise CheckpointError(f"{path}: {MANIFEST} says format {kind!r}, not {FORMAT!r}")
    if version > VERSION:
        raise CheckpointError(
            f"{path}: written in format version {version}, this bertkd reads up to {VERSION}"
        )
    if unlisted := _PARTS - files.keys():
        raise CheckpointError(f"{path}: {MANIFEST} does not list {', '.join(sorted(unlisted))}")
    for name, (size, digest) in files.items():
        _check_file(path, name, size, digest)
    return manifest


def _check_file(path: Path, name: str, size: int, digest: str) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{path}: {name} is missing")
    found = file.stat().st_size
    if found != size:
        what = "truncated" if found < size else "longer than it was written"
        raise CheckpointError(f"{path}: {name} is {what}: {found} bytes of {size}")
    if _fingerprint(file)["sha256"] != digest:
        raise CheckpointError(f"{path}: {name} is not what was written (SHA-256 differs)")


def read(path: Path) -> Contents:
    """Verify a checkpoint and read all of it.

    Raises:
        CheckpointError: as ``verify``.
    """
    path = Path(path)
    contents = Contents()
    for name in verify(path)["files"]:
        stem, kind = os.path.splitext(name)
        if kind == ".safetensors":
            contents.tensors[stem] = load_file(path / name)
        else:
            contents.documents[stem] = json.loads((path / name).read_text(encoding="utf-8"))
    return contents


def read_best(path: Path) -> Contents:
    """``read`` for the best checkpoint of a run that is at its end.

    Raises:
        CheckpointError: as ``verify``, saying how to end without it: resuming alone would come here again.
    """
    try:
        return read(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. It holds the best weights; the last ones are whole: resume with restore='last' (on the "
            "command line: --restore last) to end with these"
        ) from error


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoints in ``output_dir`` by step, oldest first; damaged ones too."""
    if not output_dir.is_dir():
        return {}
    found = {}
    for path in output_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find(output_dir: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint to resume from; None to start afresh.

    Args:
        output_dir: where the run keeps its checkpoints.
        resume: False starts afresh. True takes the newest checkpoint, or starts afresh where there
            is none yet. ``"last-good"`` takes the newest undamaged one. Else the path of one of
            them.

    Raises:
        CheckpointError: the one to be taken is damaged, or ``"last-good"`` found none that is not.
        ValueError: ``resume`` is False but the folder already holds checkpoints, or a path elsewhere.
        TypeError: ``resume`` is none of these.
    """
    if not isinstance(resume, (bool, str, Path)):
        raise TypeError(f"resume must be True, False, 'last-good' or a path, got {resume!r}")
    found = checkpoints(output_dir)
    if not isinstance(resume, bool) and resume != "last-good":
        path = Path(resume)
        verify(path)
        if path.resolve() not in [other.resolve() for other in found.values()]:
            raise ValueError(f"resume={str(resume)!r} is no checkpoint of output_dir {output_dir}")
        return path
    if not found:
        return None
    if resume is False:
        raise ValueError(
            f"{output_dir} already holds {', '.join(p.name for p in found.values())}; pass "
            "resume=True to go on, or choose another output_dir"
        )
    for path in reversed(found.values()):
        try:
            verify(path)
        except CheckpointError as error:
            if resume is True:
                raise CheckpointError(
                    f"{error}. Give resume the value 'last-good' to fall back to an older checkpoint"
                ) from error
            logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return path
    raise CheckpointError(f"{output_dir}: none of its {len(found)} checkpoints is undamaged")


def tidy(output_dir: Path, resumed: int) -> None:
    """Make the folder fit a run that goes on from step ``resumed``.

    What killed processes left half-written is removed. Newer checkpoints, which would otherwise
    pass for this run's, are set aside as ``discarded-checkpoint-<step>``.
    """
    for stem in ("checkpoint-", "history.jsonl"):
        clear_leftovers(output_dir, stem)
    for step, path in checkpoints(output_dir).items():
        if step > resumed:
            aside = output_dir / f"discarded-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            logger.warning("set %s aside as %s", path.name, aside.name)


def prune(output_dir: Path, keep_last: int, best: int | None) -> None:
    """Delete all checkpoints but the ``keep_last`` newest and the one of step ``best``."""
    found = checkpoints(output_dir)
    for step in list(found)[:-keep_last]:
        if step != best:
            shutil.rmtree(found[step])


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
