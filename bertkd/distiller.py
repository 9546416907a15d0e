"""Teacher, student and objective wired together: one module whose forward is the distillation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bertkd import cpu_attention
from bertkd._blame import blame
from bertkd.capture import Capture, Recording, is_distributed, nothing_of
from bertkd.compiling import allow_graphs, compile_in_place
from bertkd.encoders import unwrap
from bertkd.errors import NonFiniteError, unknown_name
from bertkd.layer_maps import MapSpec
from bertkd.objectives import Expression, Needs, Objective, StepContext, build_objective
from bertkd.objectives.base import Side
from bertkd.objectives.batch import check_batch
from bertkd.objectives.options import not_negative
from bertkd.objectives.sides import check_models, check_trains, check_wrapper, model_inputs
from bertkd.ops.checks import HALVES
from bertkd.ops.dispatch import requested
from bertkd.plan import Plan, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class DistillOutput:
    """One step's result.

    Attributes:
        loss: the weighted sum of the terms, a float32 scalar with gradient.
        terms: each term's own unweighted value, detached 0-d tensors.
        logits: the student's logits, detached; None where no term needs them.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


# DDP's static graph and torch.export look for tensors in what is registered only.
torch.export.register_dataclass(DistillOutput)


class Distiller(nn.Module):
    """Distils a teacher into a student; ``forward(batch)`` returns the loss.

    The student and the objective (its projections, banks and random maps) are submodules. The
    teacher is not: it is in no ``parameters()``, ``state_dict()`` or ``train()``, is frozen and put
    in eval mode for good, follows ``.to(device)``, and is not wrapped by DDP. Neither model is run
    further than its last matched layer when no logits are needed, so some student parameters (head,
    pooler, upper layers) get no gradient then: wrap in DDP with ``find_unused_parameters=True``
    unless ``uses_student_logits``.

    Under autocast the student runs as autocast has it, and so does a teacher in float32. A teacher that was loaded
    in half precision runs in that, as it would on its own.

    Example::

        distiller = Distiller(teacher, create_student(teacher, "uniform:3"), "att_kl + hid_seq")
        optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=3e-4))
        distiller.train()  # the student has dropout now, the teacher has not; loaded models are in eval mode
        distiller(batch).loss.backward()
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        objective: str | Expression = "att_kl + hid_seq",
        *,
        layer_map: MapSpec = "uniform",
        impl: str = "auto",
        attention: str = "auto",
        num_examples: int | None = None,
        seed: int = 0,
        teacher_tokenizer: Any = None,
        student_tokenizer: Any = None,
    ) -> None:
        """Build the objective and refuse whatever could not work later.

        Args:
            teacher: a Hugging Face encoder; it is frozen in place.
            student: a Hugging Face encoder, possibly compiled.
            objective: text such as ``"att_kl + 0.5*hid_seq"``, or a preset's name.
            layer_map: the map of terms that name none, see `layer_maps`. Explicit pairs such as
                ``"0:3,1:7,2:11"`` are of blocks, 0-based; terms on states match the states behind these.
            impl: the implementation of terms that name none.
            attention: ``"auto"`` lets models on a CPU that use SDPA attend with bertkd's kernel (see
                `use_cpu_attention`) while ``forward`` lasts, unless ``impl`` asks for another
                implementation than the native one, or the model trains with gradient checkpointing;
                ``"keep"`` runs both models with their own attention.
            num_examples: rows of the training set; for terms that keep a bank of them.
            seed: of projections, banks and random maps.
            teacher_tokenizer, student_tokenizer: compared id by id where both are given.

        Raises:
            TypeError, ValueError: naming what does not fit and what to change.
        """
        super().__init__()
        if attention not in ("auto", "keep"):
            raise unknown_name("attention", attention, ("auto", "keep"))
        check_models(student, teacher, student_tokenizer, teacher_tokenizer)
        self.student = student
        self.objective: Objective = build_objective(
            objective,
            student,
            teacher,
            layer_map=layer_map,
            impl=impl,
            num_examples=num_examples,
            seed=seed,
        )
        check_wrapper(student, self.objective.needs())
        self.finite_checks: bool | None = None
        # A tuple keeps nn.Module from registering the teacher.
        self._teacher: tuple[Any] = (teacher.requires_grad_(False).eval(),)
        self._take_teacher_along()
        wanted = requested(impl) in ("auto", "native")
        self._chooses_attention = attention == "auto" and wanted

    @property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def uses_student_logits(self) -> bool:
        """Whether some term needs the student's logits, so that its whole forward is run."""
        return self.objective.needs().student_logits

    def forward(self, batch: Mapping[str, Any]) -> DistillOutput:
        """Run both models on a batch and compute the objective.

        Args:
            batch: ``input_ids`` (B, L), and where they matter ``attention_mask``,
                ``token_type_ids``, ``labels``, ``index`` (the example's row in the training set).
                Each model gets what its forward takes, never the labels.

        Raises:
            TypeError: the batch is no mapping, a column no tensor, or the mask one of floats.
            ValueError: a column is missing or empty, the text is longer than a model's positions, an id beyond its
                vocabulary (told on CPUs only, outside compiled graphs), nothing that the terms read is trained (in
                train mode, unless gradients are off), or this is a copy made by ``nn.DataParallel``.
            NonFiniteError: the loss is NaN or infinite; names the first cause. Checked at each step
                on CPUs only (``finite_checks`` True or False overrides), elsewhere by `check_finite`.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel copies models in a way that captures cannot follow. Use "
                "DistributedDataParallel (torchrun, accelerate launch) or one device."
            )
        self.objective.redraw()
        needs = self.objective.needs()
        check_batch(batch, needs, self.objective, self.student, self.teacher)
        if not torch.compiler.is_compiling():
            allow_graphs(self.teacher, self.student)
        inputs, has_pads = self._inputs(batch)
        teacher = self._record_teacher(inputs, needs, has_pads)
        student = self._record(
            self.student,
            inputs,
            needs.student_blocks,
            needs.student_states,
            needs.student_logits,
            has_pads=has_pads,
        )
        setup = self.objective.setup
        step = StepContext(
            student=student,
            teacher=teacher,
            mask=batch.get("attention_mask"),
            student_logits=_logits(student, setup.student) if needs.student_logits else None,
            teacher_logits=_logits(teacher, setup.teacher) if needs.teacher_logits else None,
            batch=batch,
        )
        loss, terms = self.objective(step)
        if self.training:
            check_trains(loss, self.student)
        if not needs.student_logits and is_distributed(self.student):
            loss = loss + nothing_of(student.output)
        checks = loss.device.type == "cpu" if self.finite_checks is None else self.finite_checks
        if checks and not torch.isfinite(loss):
            raise NonFiniteError(blame(step, terms))
        logits = None if step.student_logits is None else step.student_logits.detach()
        return DistillOutput(loss, terms, logits)

    def check_finite(self, output: DistillOutput, batch: Mapping[str, Any]) -> None:
        """Raise if an output's loss is NaN or infinite; made for logging time, as it syncs the device.

        Args:
            output: what `forward` returned.
            batch: the batch it came from; the teacher is run on it again to find the cause.

        Raises:
            NonFiniteError: names the first teacher tensor that is not finite, or the terms.
        """
        if torch.isfinite(output.loss):
            return
        needs, side = self.objective.needs(), self.objective.setup.teacher
        teacher = self._record_teacher(batch, needs)
        step = StepContext(
            student=Recording(),
            teacher=teacher,
            teacher_logits=_logits(teacher, side) if needs.teacher_logits else None,
        )
        raise NonFiniteError(blame(step, output.terms))

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.01, projection_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimiser groups: weights, and biases and norms without weight decay.

        Args:
            lr: learning rate of the student.
            weight_decay: of everything with two or more dimensions.
            projection_lr: learning rate of the objective's own parameters; ``lr`` by default.

        Returns:
            Groups for ``torch.optim``, empty ones left out; every trainable parameter in exactly one.

        Raises:
            ValueError: a rate or decay that is no finite number of at least 0 (``torch.optim`` checks
                its own defaults, not those of groups).
        """
        rates = {"lr": lr, "weight_decay": weight_decay, "projection_lr": projection_lr}
        for name, value in rates.items():
            if value is not None or name != "projection_lr":
                not_negative(name, value)
        groups = []
        for module, rate in (
            (self.student, lr),
            (self.objective, lr if projection_lr is None else projection_lr),
        ):
            trained = [p for p in module.parameters() if p.requires_grad]
            decayed = [p for p in trained if p.ndim > 1]
            plain = [p for p in trained if p.ndim <= 1]
            groups.append({"params": decayed, "lr": rate, "weight_decay": weight_decay})
            groups.append({"params": plain, "lr": rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Checkpoint the student's activations, with the options of Hugging Face's method of this name.

        The teacher runs without gradients and keeps none anyway. The Hugging Face Trainer calls this.
        """
        student: Any = unwrap(self.student)
        student.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The same by its newer name in transformers."""
        student: Any = unwrap(self.student)
        student.activation_checkpointing_enable(**options)

    def compile(self, **options: Any) -> None:
        """Compile both networks in place with ``torch.compile``: for GPUs, on CPUs steps took longer.

        Not the forward around the networks, as ``nn.Module.compile`` would: it sets and takes off hooks. The first
        steps take longer, by about a minute: there is a graph for batches with pads and one for others, and another
        once lengths differ. A compiled network always runs to its end. Without dropout results are the same up to
        rounding, with it other units are dropped; a run that was interrupted goes on the same up to rounding.

        Args:
            options: as ``torch.compile`` takes them, e.g. ``dynamic=True``.
        """
        compile_in_place(self.teacher, self.student, **options)

    def plan(self, batch_size: int = 32, length: int = 128) -> Plan:
        """Layer maps, weights, parameter counts and bytes per term; ``print`` it for a table.

        Raises:
            TypeError: a size that is no whole number.
            ValueError: a size that is not positive, or a length without positions.
        """
        attention = self._attention_of(self.teacher), self._attention_of(self.student)
        return make_plan(self.teacher, self.student, self.objective, batch_size, length, attention)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Move the teacher along with ``.to(device)``, but leave its dtype alone."""
        super()._apply(fn, recurse)
        self._take_teacher_along()
        return self

    def _take_teacher_along(self) -> None:
        device = next(self.student.parameters()).device
        # On "meta" its weights would be lost.
        if device.type != "meta":
            self._teacher[0].to(device)

    def _instead_of_sdpa(self, model: nn.Module) -> str | None:
        """The attention implementation that a model is lent for a forward, or None if it keeps its own."""
        if self._chooses_attention and cpu_attention.why_not(unwrap(model)) is None:
            return cpu_attention.NAME
        return None

    def _attention_of(self, model: nn.Module) -> str:
        """Hugging Face's name of the attention implementation that a model runs with here."""
        config: Any = unwrap(model).config
        return self._instead_of_sdpa(model) or config._attn_implementation or "eager"

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """The batch as the models get it, without a mask of ones, and whether it is known to have pads.

        Models on SDPA would each ask the device, the second once the first has run to its end; a GPU would be
        idle meanwhile. Here it is asked once, before there is anything to wait for.
        """
        mask = batch.get("attention_mask")
        if mask is None or torch.compiler.is_compiling():
            return batch, False
        if any(
            self._attention_of(model) not in ("sdpa", cpu_attention.NAME)
            for model in (self.teacher, self.student)
        ):
            return batch, False
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return batch, False
        if not mask.all():
            return batch, True
        return {name: column for name, column in batch.items() if name != "attention_mask"}, False

    def _record_teacher(
        self, batch: Mapping[str, Any], needs: Needs, has_pads: bool = False
    ) -> Recording:
        if not (needs.teacher_blocks or needs.teacher_states or needs.teacher_logits):
            return Recording()
        device = batch["input_ids"].device
        if next(self.teacher.parameters()).device != device:
            self._teacher[0].to(device)
        training, half = _look_over(self.teacher)
        if training:
            self.teacher.eval()
        # Autocast would take a teacher in half precision back to float32 at every norm.
        precision = torch.autocast(device.type, enabled=False) if half else nullcontext()
        with torch.no_grad(), precision:
            return self._record(
                self.teacher,
                batch,
                needs.teacher_blocks,
                needs.teacher_states,
                needs.teacher_logits,
                "".join(sorted(needs.teacher_parts)) or "qkv",  # without blocks none is kept
                has_pads,
            )

    def _record(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        blocks: frozenset[int],
        states: frozenset[int],
        logits: bool,
        parts: str = "qkv",
        has_pads: bool = False,
    ) -> Recording:
        capture = Capture(
            model,
            blocks=sorted(blocks),
            states=sorted(states),
            parts=parts,
            instead_of_sdpa=self._instead_of_sdpa(model),
            has_pads=has_pads,
        )
        return capture(stop_early=not logits, **model_inputs(model, batch))


def _look_over(model: nn.Module) -> tuple[bool, bool]:
    """Whether some module is in training mode, and whether all weights are in half precision.

    By hand, as ``modules()`` and ``parameters()`` take several times as long: this is looked up at every step.
    """
    training, half = False, True
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            training = training or module.training
            waiting.extend(module._modules.values())
            for weight in module._parameters.values():
                half = half and (weight is None or weight.dtype in HALVES)
    return training, half


def _logits(recording: Recording, side: Side) -> Tensor:
    output: Any = recording.output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple) and side.head in ("sequence", "token", "mlm"):
        logits = output[0]  # return_dict=False; there is no loss before them without labels
    if logits is None:
        raise ValueError(
            f"the {side.role}'s output has no .logits, got {type(output).__name__}; use a model "
            "with one classification or language-modelling head"
        )
    return logits
