"""What made a run, kept in its checkpoints, and what may differ when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import bertkd
from bertkd.data.encode import EncodedRows
from bertkd.errors import CheckpointError
from bertkd.training.recipe import Stage
from bertkd.training.rng import kept_rng

SAMPLE = 64  # examples, spread over the data

logger = logging.getLogger(__name__)


def describe_run(
    module: nn.Module,
    stage: Stage,
    seed: int,
    data: Any,
    lengths: Sequence[int],
    accelerator: Accelerator,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The run as plain values: its settings, its data and teacher by checksum, and what it runs on.

    ``settings`` are what the caller states besides, as ``train`` takes them.
    """
    teacher = getattr(module, "teacher", None)
    run: dict[str, Any] = {
        "module": type(module).__name__,
        "stage": stage.to_dict(),
        "seed": seed,
        "processes": accelerator.num_processes,
        "data": describe_data(data, lengths),
        # It is in no checkpoint, but the run depends on it.
        "teacher": _checksum(teacher.parameters()) if isinstance(teacher, nn.Module) else None,
        "environment": {
            "device": accelerator.device.type,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "bertkd": bertkd.__version__,
        },
    }
    if accelerator.device.type == "cpu":
        # Sums are divided among them.
        run["environment"]["threads"] = torch.get_num_threads()
    if settings is not None:
        run["settings"] = json.loads(json.dumps(settings))  # as it will be read again
    return run


def describe_data(data: Any, lengths: Sequence[int]) -> dict[str, int]:
    """What examples are known by: their number, and checksums of their lengths and of all or some of them."""
    found = {
        "examples": len(lengths),
        "checksum_of_lengths": zlib.crc32(np.asarray(lengths, dtype=np.int64).tobytes()),
        "checksum_of_a_sample": _checksum_of_sample(data),
    }
    if isinstance(data, EncodedRows):  # others may have to read or to make each of their examples
        found["checksum"] = data.checksum()
    return found


def refuse_other_run(path: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Check that a checkpoint was made by the run that wants to go on from it.

    Settings that leave the sequence of updates alone (how often to save, evaluate or log) may
    differ, and what only one of the two states is passed over: earlier versions stated less. Another
    device, number of threads or version of a library is warned of: the results may differ in bits.

    Raises:
        CheckpointError: naming ``path`` and listing what differs.
    """
    free = {f.name for f in dataclasses.fields(Stage) if f.metadata.get("resume") == "free"}
    then, now = (_flat(run, free) for run in (saved, present))
    keys = [key for key in now if key in then and then[key] != now[key]]
    soft = [key for key in keys if key.startswith("environment.")]
    hard = [key for key in keys if key not in soft]
    if hard:
        raise CheckpointError(
            f"{path} was made by another run: "
            + "; ".join(f"{key} was {then[key]!r}, now {now[key]!r}" for key in hard)
            + ". Resume with the old settings, or start afresh in another output_dir"
        )
    for key in soft:
        logger.warning(
            "%s: %s was %s, now %s; results may differ in bits",
            path.name,
            key.removeprefix("environment."),
            then[key],
            now[key],
        )


def refuse_different_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Check that the processes of a run, whose records these are, have been given the same.

    Those with fewer updates or other evaluations would end while the rest wait for them, and parts of different data
    make no batch.

    Raises:
        ValueError: listing what differs.
    """
    first, *others = (_flat(run, set()) for run in runs)
    for rank, other in enumerate(others, start=1):
        wrong = [
            f"{key} is {first[key]!r} in process 0, {other.get(key)!r} in process {rank}"
            for key in first
            if first[key] != other.get(key) and not key.startswith("environment.")
        ]
        if wrong:
            raise ValueError(
                f"the processes were given different runs: {'; '.join(wrong)}. Give all the same settings and data"
            )


def identity(model: Any) -> str:
    """What a model is known by in a run's settings: the CRC-32 of its encoder's weights as loaded.

    Not its name: a folder may be moved, or hold another model by now. Pooler and head may be new, and so another
    machine's.

    Args:
        model: a Hugging Face model, with or without a head.
    """
    named = model.base_model.named_parameters()
    return f"weights {_checksum(weight for name, weight in named if 'pooler' not in name):08x}"


def _checksum_of_sample(data: Any) -> int:
    """CRC-32 of tokens and labels of some examples; other data may have the same lengths."""
    checksum = 0
    rows = sorted({i * (len(data) - 1) // (SAMPLE - 1) for i in range(SAMPLE)})
    with kept_rng(0):  # reading an example may draw
        for row in rows:
            example = data[row]
            for value in (example.get(name) for name in ("input_ids", "labels")):
                plain = value.tolist() if hasattr(value, "tolist") else value
                checksum = zlib.crc32(repr(plain).encode(), checksum)
    return checksum


def _checksum(weights: Iterable[Tensor]) -> int:
    checksum = 0
    for weight in weights:
        raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(raw.numpy().data, checksum)
    return checksum


def _flat(run: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    """One level deep: ``{"stage.lr": ...}``, without the free fields of the stage."""
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if isinstance(value, Mapping):
            kept = {k: v for k, v in value.items() if key != "stage" or k not in free}
            flat |= {f"{key}.{k}": v for k, v in kept.items()}
        else:
            flat[key] = value
    return flat
