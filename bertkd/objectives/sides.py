"""What is asked of the two models before the first step: heads, labels, inputs, vocabularies."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bertkd.encoders import base_model, block_list, describe, inside_peft, not_loaded, unwrap
from bertkd.objectives.base import Needs, Side

_HEADS = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForMaskedLM": "mlm",
}
# Their output has no .logits, or logits that are not rows of classes (ELECTRA's discriminator has one per token).
_FOREIGN = ("ForPreTraining", "ForQuestionAnswering", "ForMultipleChoice")
_PROBLEMS = {
    "regression": "regression",
    "multi_label_classification": "multi_label",
}
# Inputs that make a model compute its own loss, which nobody would use.
_LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label")


def describe_side(role: str, model: nn.Module) -> Side:
    """Describe a model as a term needs to know it.

    Args:
        role: "student" or "teacher", for messages.
        model: a Hugging Face encoder, bare or with a head, compiled or not.

    Raises:
        TypeError, UnsupportedEncoderError: it is no encoder that can be captured.
        ValueError: its forward takes no ``attention_mask``.
    """
    spec = describe(model)
    inner = unwrap(model)
    if "attention_mask" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"the {role}'s forward takes no attention_mask, so it would attend to padding; use a model "
            "whose forward(input_ids, attention_mask, ...) honours it"
        )
    config = inner.config
    head = _head(inner)
    labels = int(getattr(config, "num_labels", 0) or 0)
    problem = _PROBLEMS.get(getattr(config, "problem_type", None) or "", "classification")
    if head == "sequence" and labels == 1:
        problem = "regression"
    return Side(
        role=role,
        spec=spec,
        head=head,
        problem=problem,
        num_labels=labels,
        label_names=_label_names(config, labels) if head in ("sequence", "token") else (),
        head_vocab_size=_decoder_rows(inner) if head == "mlm" else 0,
    )


def check_models(
    student: nn.Module,
    teacher: nn.Module,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
) -> None:
    """Refuse two models that cannot be fed the same ids, or are one and the same.

    Raises:
        TypeError: one of them is no model, such as a path.
        ValueError: shared parameters, nothing to train, a teacher without weights, or different vocabularies.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{role} must be a Hugging Face model, got {model!r:.80}; load it, e.g. with "
                "AutoModel.from_pretrained"
            )
    frozen = {id(p) for p in teacher.parameters()}
    if any(id(p) in frozen for p in student.parameters()):
        raise ValueError(
            "student and teacher share parameters, so freezing one freezes the other; make the student "
            "with create_student or copy.deepcopy"
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "the student has no trainable parameter; call student.requires_grad_(True)"
        )
    unloaded = [name for name, weight in teacher.named_parameters() if weight.is_meta]
    if unloaded and not any(p.is_meta for p in student.parameters()):
        raise not_loaded(unloaded[0])
    if (student_tokenizer is None) != (teacher_tokenizer is None):
        raise ValueError("give both teacher_tokenizer and student_tokenizer, or neither")
    ours, theirs = describe(student).vocab_size, describe(teacher).vocab_size
    if student_tokenizer is None:
        if ours != theirs:
            raise ValueError(
                f"vocabularies differ: {ours} ids (student) and {theirs} (teacher). Both see the same "
                "input_ids; use models of one tokenizer, or pass student_tokenizer and "
                "teacher_tokenizer if only unused rows differ"
            )
        return
    _check_tokenizers(student_tokenizer, teacher_tokenizer, ours, theirs)


def check_trains(loss: Tensor, student: nn.Module) -> None:
    """Refuse a loss without a gradient where there should be one: its backward would not say what is frozen.

    Raises:
        ValueError: see above.
    """
    if loss.requires_grad or not torch.is_grad_enabled():
        return
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    names = ", ".join(trained[:3]) + ", ..." * (len(trained) > 3)
    found = (
        f"no term reads what is trained of the student ({names})"
        if trained
        else "the student is frozen"
    )
    raise ValueError(
        f"the loss has no gradient: {found}. Unfreeze what the terms read, e.g. student.requires_grad_(True); where "
        "the loss is only looked at, use torch.no_grad()"
    )


def check_wrapper(student: nn.Module, needs: Needs) -> None:
    """Refuse a student in DDP whose output no term reads to its end.

    DDP waits for gradients of everything its output depends on. Pooler, head and what lies above the last matched
    layer get none, so that gradients are not exchanged, and the second step fails.

    Raises:
        ValueError: see above.
    """
    wrapper: Any = getattr(student, "_orig_mod", student)
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel) or needs.student_logits:
        return
    # A static graph goes by gradients of the output itself.
    if _ends_in_a_state(student, needs) and not wrapper.static_graph:
        return
    raise ValueError(
        "student is in DistributedDataParallel, which would wait for gradients of all its output while no term "
        "reads that: wrap the Distiller instead, DistributedDataParallel(Distiller(teacher, student.module, ...), "
        "find_unused_parameters=True)"
    )


def _ends_in_a_state(student: nn.Module, needs: Needs) -> bool:
    """Whether the last state is read, and nothing is trained above it."""
    encoder = base_model(student).named_parameters()
    below = {id(weight) for name, weight in encoder if not name.startswith("pooler")}
    above = any(p.requires_grad and id(p) not in below for p in student.parameters())
    return len(block_list(student)) in needs.student_states and not above


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that ``model.forward`` takes of a batch, without anything that holds labels."""
    return {
        key: value
        for key, value in accepted(unwrap(model), batch).items()
        if key not in _LABELS and isinstance(value, Tensor)
    }


def accepted(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that ``model.forward`` takes.

    ``token_type_ids`` are left out for models with a single type (RoBERTa), which cannot embed others.
    """
    # PEFT's wrappers name few of the arguments that they hand on, or none.
    inner = inside_peft(model) or model
    names = _arguments_of(inner.forward)
    one_type = getattr(getattr(inner, "config", None), "type_vocab_size", 2) in (0, 1)
    return {
        key: value
        for key, value in batch.items()
        if key in names and not (one_type and key == "token_type_ids")
    }


def _arguments_of(forward: Any) -> frozenset[str]:
    """Names of a forward's arguments; those of a class's own method are looked up once, as that takes time."""
    function = getattr(forward, "__func__", None)
    if function is None:
        return frozenset(inspect.signature(forward).parameters)
    return _arguments_of_method(function)


@functools.lru_cache(maxsize=64)
def _arguments_of_method(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _head(inner: Any) -> str:
    if base_model(inner) is inner:
        return "none"
    name = type(inner).__name__
    if name.endswith(_FOREIGN):
        return "foreign"
    return next((kind for suffix, kind in _HEADS.items() if name.endswith(suffix)), "other")


def _label_names(config: Any, count: int) -> tuple[str, ...]:
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names.get(i, "")).lower() for i in range(count))
    # Hugging Face's placeholders say nothing about what the labels mean.
    placeholder = all(name in ("", f"label_{i}") for i, name in enumerate(ordered))
    return () if placeholder else ordered


def _decoder_rows(inner: Any) -> int:
    decoder = inner.get_output_embeddings()
    weight = getattr(decoder, "weight", None)
    return inner.config.vocab_size if weight is None else weight.shape[0]


def _check_tokenizers(ours: Any, theirs: Any, our_rows: int, their_rows: int) -> None:
    ids, others = ours.get_vocab(), theirs.get_vocab()
    if ids != others:
        # Vocabularies come in an order that differs from process to process.
        token = min(t for t in {**ids, **others} if ids.get(t) != others.get(t))
        raise ValueError(
            f"tokenizers differ, e.g. {token!r} has id {ids.get(token)} (student) and "
            f"{others.get(token)} (teacher); both models see the same input_ids, so use one tokenizer"
        )
    top = max(ids.values(), default=-1)
    for role, rows in (("student", our_rows), ("teacher", their_rows)):
        if top >= rows:
            raise ValueError(
                f"the tokenizer has ids up to {top}, but the {role} embeds only {rows}; resize it with "
                "resize_token_embeddings"
            )
