"""Terms on the task head's output: distillation of logits and the task's own labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bertkd import functional
from bertkd.objectives.base import (
    Memory,
    Needs,
    Setup,
    Shape,
    Side,
    StepContext,
    Term,
    register_term,
)
from bertkd.objectives.options import chosen_impl, flag, positive

IGNORED = -100


def rows_of(side: Side, shape: Shape) -> int:
    """Rows of logits in a batch: one per example, or one per token."""
    return shape.batch * (1 if side.head == "sequence" else shape.length)


def classes_of(side: Side) -> int:
    """Logits per row: the vocabulary for a masked-language-model head, else the labels."""
    return side.head_vocab_size if side.head == "mlm" else side.num_labels


def need_head(side: Side, term: str) -> None:
    """Refuse a model that gives no logits.

    Raises:
        ValueError: it has no task head, or one whose logits are not rows of classes.
    """
    if side.head == "none":
        raise ValueError(
            f"{term} needs logits, but the {side.role} is a bare encoder; load it with a head, e.g. "
            f"AutoModelForSequenceClassification or AutoModelForMaskedLM, or leave {term} out"
        )
    if side.head == "foreign":
        raise ValueError(
            f"{term} needs rows of logits over classes, which the {side.role}'s head does not give; use a head for "
            f"sequences, tokens or masked language modelling, or leave {term} out"
        )


@register_term
class KD(Term):
    """Distillation of logits: T^2 KL(softmax(z_t / T) || softmax(z_s / T)), mean over rows.

    Sequence heads have one row per example; token and masked-language-model heads one per position
    whose label is not -100, or per real token where there are no labels or with ``all_tokens=True``.
    Regression is the mean squared difference of the logits, for which a temperature does nothing: one other than 1
    is warned of.

    Source: Hinton et al. 2015. The released code's KD baseline uses T = 2 (``@released``).
    """

    kind: ClassVar[str] = "kd"
    RELEASED: ClassVar[Mapping[str, Any]] = {"temperature": 2.0, "t_squared": True}
    op = "softmax_kl"

    def __init__(
        self,
        setup: Setup,
        *,
        temperature: float = 1.0,
        t_squared: bool = True,
        all_tokens: bool = False,
        impl: str | None = None,
    ) -> None:
        """Check that both heads give comparable logits.

        Raises:
            ValueError: a head is missing, or labels, their order or the heads' kinds differ.
        """
        super().__init__()
        for side in (setup.student, setup.teacher):
            need_head(side, "kd")
            if side.problem == "multi_label":
                raise ValueError(
                    f"kd is a softmax over classes, but the {side.role}'s config has "
                    "problem_type='multi_label_classification'; leave kd out"
                )
        _same_labels(setup.student, setup.teacher)
        self.temperature = positive("temperature", temperature)
        self.t_squared = flag("t_squared", t_squared)
        self.all_tokens = flag("all_tokens", all_tokens)
        self.regression = setup.teacher.problem == "regression"
        self.impl = chosen_impl(impl, setup.impl)
        self._student = setup.student
        if self.regression and self.temperature != 1:
            warnings.warn(
                f"kd: temperature={self.temperature} does nothing for regression, whose loss is the squared difference "
                "of the logits",
                stacklevel=2,
            )

    def needs(self) -> Needs:
        """Both models' logits."""
        return Needs(student_logits=True, teacher_logits=True)

    def forward(self, step: StepContext) -> Tensor:
        """The loss; labels in the batch matter for per-token logits only."""
        z_s, z_t = step.logits("student"), step.logits("teacher")
        if self.regression:
            return step.mean((z_s.float() - z_t.float()).square().flatten(1).mean(-1))
        rows = _rows_that_count(z_s, step, self.all_tokens)
        return functional.softmax_kl(
            z_s,
            z_t,
            rows,
            temperature=self.temperature,
            t_squared=self.t_squared,
            impl=self.impl,
        )

    def memory(self, shape: Shape) -> Memory:
        """Naive: log P_s, P_t and log P_t in fp32; fused: the gradient and one number per row."""
        rows, classes = rows_of(self._student, shape), classes_of(self._student)
        return Memory(3 * 4 * rows * classes, rows * (shape.student_bytes * classes + 4))


@register_term
class CE(Term):
    """The task's own loss on ``batch["labels"]``.

    Cross-entropy for classes (labels of -100 are left out, so this is also the masked-language-model
    loss), mean squared error for regression, binary cross-entropy for multi-label heads.
    """

    kind: ClassVar[str] = "ce"

    def __init__(self, setup: Setup) -> None:
        """Check that the student has a head.

        Raises:
            ValueError: it has none.
        """
        super().__init__()
        need_head(setup.student, "ce")
        self.problem = setup.student.problem
        self._student = setup.student

    def needs(self) -> Needs:
        """The student's logits and the labels."""
        return Needs(student_logits=True, labels=True)

    def forward(self, step: StepContext) -> Tensor:
        """The loss. With nothing but ignored labels it is 0."""
        logits, labels = step.logits("student").float(), step.batch["labels"]
        labels = labels.to(logits.device)
        self._check(logits, labels)
        if self.problem == "regression":
            return F.mse_loss(logits.flatten(), labels.flatten().float())
        if self.problem == "multi_label":
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        flat = labels.flatten().long()
        total = F.cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum")
        return total / (flat != IGNORED).sum().clamp_min(1)

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if self.problem == "classification" and labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype}, but the head tells {logits.shape[-1]} classes apart and wants "
                "integers; for regression load it with num_labels=1, for several labels a row with "
                "problem_type='multi_label_classification'"
            )
        per_class = self.problem == "multi_label" or (
            self.problem == "regression" and self._student.num_labels > 1
        )
        rows = logits.shape if per_class else logits.shape[:-1]
        if labels.numel() != rows.numel():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the logits need {tuple(rows)}; check which "
                "head the student was loaded with"
            )
        # Asking a GPU would mean waiting for it.
        if (
            self.problem == "classification"
            and labels.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
            if wrong.numel():
                raise ValueError(
                    f"labels must be 0..{logits.shape[-1] - 1}, or {IGNORED} where ignored, got {int(wrong[0])}; check "
                    "num_labels of the student"
                )

    def memory(self, shape: Shape) -> Memory:
        """The log-probabilities, either way."""
        size = 4 * rows_of(self._student, shape) * classes_of(self._student)
        return Memory(size, size)


def _rows_that_count(logits: Tensor, step: StepContext, all_tokens: bool) -> Tensor | None:
    if logits.ndim == 2:
        return step.examples
    labels = None if all_tokens else step.batch.get("labels")
    if labels is not None and labels.shape == logits.shape[:2]:
        return labels.to(logits.device) != IGNORED
    return step.mask


def _same_labels(student: Side, teacher: Side) -> None:
    if student.head != teacher.head:
        raise ValueError(
            f"kd compares logits, but the teacher has a {teacher.head} head and the student a "
            f"{student.head} head; give both the same kind of head"
        )
    if student.head == "mlm":
        if student.head_vocab_size != teacher.head_vocab_size:
            raise ValueError(
                f"kd needs equal vocabularies, got {student.head_vocab_size} (student) and "
                f"{teacher.head_vocab_size} (teacher) logits; make the student with create_student"
            )
        return
    if student.num_labels != teacher.num_labels:
        raise ValueError(
            f"kd needs equal label counts, got num_labels={student.num_labels} (student) and "
            f"{teacher.num_labels} (teacher); create the student with num_labels="
            f"{teacher.num_labels}"
        )
    if student.problem != teacher.problem:
        raise ValueError(
            f"kd needs the same problem_type, got {student.problem} (student) and "
            f"{teacher.problem} (teacher); set it in the student's config"
        )
    ours, theirs = student.label_names, teacher.label_names
    if ours and theirs and ours != theirs:
        what = "in another order" if set(ours) == set(theirs) else "under other names"
        raise ValueError(
            f"kd needs the same labels, but the student's id2label has them {what}: {ours} and "
            f"{theirs} (teacher); set student.config.id2label to the teacher's"
        )
