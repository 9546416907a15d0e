"""Loading models and tokenizers with errors that say what to do."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from bertkd.data import TaskData

_UNREADABLE = (OSError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no warnings about unused heads, which say nothing new to users here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(path: str | os.PathLike[str], argument: str, *configs: PretrainedConfig) -> Any:
    """The tokenizer of a checkpoint, which takes no more tokens than the models have positions.

    Args:
        path: directory of the checkpoint, or its name on the Hugging Face Hub.
        argument: what the user calls it, for messages.
        configs: of all models that are to read its tokens; by default the checkpoint's own.

    Raises:
        ValueError: nothing there, or no tokenizer beside the model; names ``argument``.
    """
    from transformers import AutoTokenizer

    from bertkd.encoders import describe_config
    from bertkd.errors import UnsupportedEncoderError

    with quiet_transformers(), _said_plainly(path, argument, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Transformers makes one from the class's special tokens where there are no files.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError(
                "it has no words, so that all text would be unknown; save the model's own there, "
                "tokenizer.save_pretrained(...)"
            )
    # Many state no limit, and texts or their padding would run past the last position.
    for config in configs or (load_config(path, argument),):
        with contextlib.suppress(UnsupportedEncoderError):
            most = describe_config(config).max_positions
            tokenizer.model_max_length = min(tokenizer.model_max_length, most or math.inf)
    return tokenizer


def load_model(
    path: str | os.PathLike[str],
    argument: str,
    head: str | None = None,
    precision: str = "fp32",
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """An encoder, with a head for labels or masked words if asked for.

    Args:
        path: directory of a checkpoint, or its name on the Hugging Face Hub.
        argument: what the user calls it, for messages.
        head: ``"labels"`` (sequence classification or regression), ``"mlm"``, or ``None``.
        precision: of the weights, "fp32", "bf16" or "fp16", whatever the checkpoint was saved in:
            in half precision they could not be trained.
        seed: of weights that the checkpoint lacks, as those of a new head.
        config: overrides of the model's config, e.g. ``num_labels=2``.

    Raises:
        ValueError: nothing there, not a Hugging Face encoder, weights that are damaged or incomplete, or a
            saved head for another number of labels than ``config`` asks for; names ``argument``.
    """
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    from bertkd._seeding import seeded

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    classes = {
        "labels": AutoModelForSequenceClassification,
        "mlm": AutoModelForMaskedLM,
        None: AutoModel,
    }
    with (
        quiet_transformers(),
        _said_plainly(path, argument, "a model"),
        seeded(seed),
    ):
        try:
            model, report = classes[head].from_pretrained(
                path, dtype=dtypes[precision], output_loading_info=True, **config
            )
        except RuntimeError as error:
            # What differs stands in a report that quiet_transformers holds back.
            saved, wanted = load_config(path, argument).num_labels, config.get("num_labels")
            if head != "labels" or wanted in (None, saved):
                raise ValueError(
                    "its weights are damaged, or not those of its config.json"
                ) from error
            raise ValueError(
                f"its head has {saved} labels, but the task has {wanted}. Save the encoder alone "
                "(AutoModel.from_pretrained(...).save_pretrained(...)) and name that folder."
            ) from error
        has_head = head is not None and head_of(model.config) == head
        _refuse_new_weights(model, report["missing_keys"], has_head)
        return model


def _refuse_new_weights(model: PreTrainedModel, missing: Iterable[str], has_head: bool) -> None:
    """Refuse a checkpoint that lacks weights of its encoder, or of the head that it says it has: they would be random.

    Transformers only mentions it, in a report that ``quiet_transformers`` holds back.
    """
    missing = set(missing)
    encoder = {id(w) for name, w in model.base_model.named_parameters() if "pooler" not in name}
    lacking = [
        name
        for name, weight in model.named_parameters()
        if name in missing and (has_head or id(weight) in encoder)
    ]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"its weights lack {', '.join(lacking[:3])}{more}, which would be random; the files are not complete, "
            "or another model's"
        )


def load_config(path: str | os.PathLike[str], argument: str) -> PretrainedConfig:
    """The config of a checkpoint as it was saved.

    Raises:
        ValueError: nothing there; names ``argument``.
    """
    from transformers import AutoConfig

    with _said_plainly(path, argument, "a model"):
        return AutoConfig.from_pretrained(path)


def saved_head(path: str | os.PathLike[str], argument: str) -> str | None:
    """Which head the checkpoint was saved with: ``"labels"``, ``"mlm"`` or ``None``."""
    return head_of(load_config(path, argument))


def head_of(config: PretrainedConfig) -> str | None:
    """Which head a checkpoint with this config was saved with: ``"labels"``, ``"mlm"`` or ``None``."""
    names = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "labels"
    masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
    return "mlm" if masked else None


def label_config(task: TaskData) -> dict[str, Any]:
    """What a model's config says about the task's labels."""
    if task.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(task.label_names))
    return {
        "num_labels": task.num_labels,
        "problem_type": "single_label_classification",
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }


def class_names(config: PretrainedConfig) -> list[str] | None:
    """The names of classes 0, 1, ...; ``None`` where they are transformers' ``LABEL_0``, ``LABEL_1``, ..."""
    names = [config.id2label.get(number) for number in range(config.num_labels)]
    unnamed = [f"LABEL_{number}" for number in range(config.num_labels)]
    return None if names == unnamed else list(map(str, names))


def saved_labels(config: PretrainedConfig) -> dict[str, Any]:
    """The labels of a checkpoint with that head, as arguments of ``load_task``: a file may lack some."""
    if head_of(config) != "labels":
        return {}
    if config.num_labels == 1:
        return {"regression": True}
    names = class_names(config)
    return {"num_labels": config.num_labels} if names is None else {"label_names": names}


@contextlib.contextmanager
def _said_plainly(path: str | os.PathLike[str], argument: str, what: str) -> Iterator[None]:
    name = os.fspath(path)
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"{argument}={name!r}: no such directory.")
    model = Path(name) / "model"
    if not (Path(name) / "config.json").is_file() and (model / "config.json").is_file():
        raise ValueError(
            f"{argument}={name!r} is the folder of a run; name its model, {str(model)!r}."
        )
    try:
        yield
    except Exception as error:
        # What tokenizers cannot read raises an Exception of no kind.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        place = "directory" if Path(name).is_dir() else "directory or model on the Hugging Face Hub"
        raise ValueError(
            f"{argument}={name!r}: cannot load {what} from this {place}: {reason}"
        ) from error
