"""A trained student as a plain Hugging Face checkpoint, with nothing of the training in it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bertkd._files import clear_leftovers
from bertkd.training.atomic import whole_directory

# An invisible line of the model card tells our folders from other people's.
MARK = "<!-- exported by bertkd -->"


def export(student: Any, tokenizer: Any | None, path: str | Path, card_text: str = "") -> Path:
    """Write ``student`` to ``path`` so that ``AutoModel.from_pretrained(path)`` loads it.

    The folder appears whole or not at all. One that an earlier export made is replaced.

    Args:
        student: a Hugging Face model.
        tokenizer: saved with it; None to leave it out.
        path: the folder.
        card_text: of the model card, ``README.md``.

    Returns:
        ``path``.

    Raises:
        FileExistsError: ``path`` is a file, or a folder with something else in it.
        OSError: it could not be written; what an earlier export made is untouched.
    """
    path = Path(path)
    clear_leftovers(path.parent, f"{path.name}.")
    if not _may_replace(path):
        raise FileExistsError(
            f"{path} exists and was not made by an export of bertkd; choose another path or remove it"
        )
    try:
        with whole_directory(path) as temporary:
            student.save_pretrained(temporary)
            for weights in temporary.glob("*.safetensors"):
                # safetensors lets nobody but the owner read what it writes.
                shutil.copymode(temporary / "config.json", weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            card = card_text.rstrip() or f"# {path.name}"
            (temporary / "README.md").write_text(f"{card}\n\n{MARK}\n", encoding="utf-8")
    except Exception as error:
        # On a full disk safetensors raises an error of its own, and a tokenizer a plain Exception.
        if type(error) not in (SafetensorError, Exception):
            raise
        raise OSError(errno.EIO, f"{path} could not be written ({error})") from error
    return path


def _may_replace(path: Path) -> bool:
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    card = path / "README.md"
    return not os.listdir(path) or (
        card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    )
