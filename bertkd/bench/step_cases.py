"""Whole training steps: which there are, and how one is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertkd.bench import step_losses
from bertkd.bench.cases import Case
from bertkd.bench.lengths import glue_lengths
from bertkd.bench.step_models import PAIRS, networks
from bertkd.compiling import compile_in_place

if TYPE_CHECKING:
    from bertkd import Distiller

BATCHES = 4  # of different lengths, where lengths differ


def step_case(name: str, batch: int, length: int, **options: Any) -> Case:
    """A training step of a pair of networks."""
    layers = options.pop("layers", len(PAIRS[name].blocks))
    return Case(name, batch=batch, length=length, layers=layers, **{"kind": "step", **options})


def step_cases_for(device: str) -> list[Case]:
    """All step cases of a device type, the most important first."""
    if not device.startswith("cuda"):
        name = "minilm_l6_to_3"
        sweep = {"importance": 4, "kind": "scaling"}
        return [
            step_case(name, 32, 128),
            step_case(name, 8, 512),
            step_case(name, 32, 128, padding="glue", importance=2),
            step_case("modernbert_small_to_3", 2, 2048, importance=2),
            step_case("minilm_l6_to_3_dropout", 8, 512, importance=2),
            step_case("minilm_l6_to_3_compiled", 32, 128, importance=3),
            *(step_case(name, 8, 256, layers=count, **sweep) for count in (1, 2, 3)),
        ]
    bf16 = "bfloat16"
    cases = [step_case("bert_base_to_6", b, n, dtype=bf16) for b, n in ((256, 128), (32, 512))]
    cases.append(step_case("bert_base_to_6", 256, 128, dtype=bf16, padding="glue", importance=2))
    cases += [
        step_case("bert_large_to_6_qkv", 32, 512, dtype=bf16, importance=2),
        step_case("roberta_base_to_3", 64, 512, dtype=bf16, importance=2),
    ]
    cases.append(step_case("bert_base_to_6_compiled", 32, 512, dtype=bf16, importance=4))
    cases += [
        step_case("modernbert_base_to_11", 8192 // n, n, dtype=bf16, importance=3)
        for n in (1024, 2048, 4096, 8192)
    ]
    cases += [
        step_case("bert_base_to_6", 32, 512, dtype=bf16, layers=count, importance=4, kind="scaling")
        for count in (1, 3, 6)
    ]
    return sorted(cases, key=lambda case: case.importance)


def make_batches(case: Case, device: torch.device) -> list[dict[str, Tensor]]:
    """Random token ids, each batch padded to its longest; one batch where all lengths are equal."""
    vocabulary = PAIRS[case.op].options.get("vocab_size", 30000)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(1 if case.padding == "full" else BATCHES):
        lengths = [case.length] * case.batch
        if case.padding != "full":
            lengths = glue_lengths(case.batch, case.length, seed=number)
            # A batch is as long as its own longest, not as the model's limit.
            lengths[0] = max(lengths[1:], default=case.length)
        longest = max(lengths)
        # Ids from 5 on: padding and other special tokens come first in every vocabulary used here.
        ids = torch.randint(5, vocabulary, (case.batch, longest), generator=generator)
        mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


class Trainer:
    """Models, loss and optimiser of one contestant; calling it makes a step on every batch.

    Args:
        case: of kind "step" or "scaling".
        impl: "eager" or an implementation of bertkd.
        device: to train on. On CUDA, products run in the case's dtype under autocast and the teacher's weights
            are kept in it.

    Raises:
        ValueError: the implementation is not available.
        ImportError: transformers is not installed.
    """

    def __init__(self, case: Case, impl: str, device: torch.device) -> None:
        self.case, self.impl, self.device = case, impl, device
        self.dtype = getattr(torch, case.dtype)
        teacher, student = networks(case.op, device)
        if self.dtype != torch.float32:
            teacher.to(self.dtype)
        pairs = list(PAIRS[case.op].blocks)[-case.layers :]
        self.student = student
        self.distiller: Distiller | None = None
        self.loss_of: step_losses.StepLoss
        if impl == "eager":
            self.loss_of = step_losses.eager(case.op, teacher, student, pairs)
        else:
            distiller = step_losses.ours(case.op, teacher, student, impl, pairs)
            self.distiller, self.loss_of = distiller, lambda batch: distiller(batch).loss
        # A tiny rate: values do not matter, and what was verified stays true.
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-8, fused=True)
        self.batches = make_batches(case, device)
        if PAIRS[case.op].compiled:
            # The hooks that fetch eager's maps are set in the first forward, under a lock that breaks a graph.
            with torch.no_grad():
                self.loss(self.batches[0])
            compile_in_place(teacher, student)

    @property
    def tokens(self) -> int:
        """Real tokens of a call; pads do not count."""
        return int(sum(batch["attention_mask"].sum().item() for batch in self.batches))

    def resize(self, batch: int) -> None:
        """Go on with batches of another size."""
        self.case = replace(self.case, batch=batch)
        self.batches = make_batches(self.case, self.device)

    def precision(self) -> torch.autocast:
        """Autocast, where the case is not one of float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        with self.precision():
            return self.loss_of(batch)

    def __call__(self) -> None:
        for batch in self.batches:
            self.loss(batch).backward()
            self.optimizer.step()
            # Behind the step and not before it: a baseline of memory must not hold the last one's gradients.
            self.optimizer.zero_grad(set_to_none=True)

    def probe(self, cut: int | None = None) -> list[Tensor]:
        """Loss of the first batch and the gradients that it gives, flattened into one vector.

        Args:
            cut: take one sequence of this many tokens only.
        """
        batch = self.batches[0]
        if cut is not None:
            batch = {name: x[:1, :cut] for name, x in batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        # Two contestants never drop the same units.
        was_training = self.student.training
        self.student.train(was_training and not PAIRS[self.case.op].dropout)
        loss = self.loss(batch)
        self.student.train(was_training)
        loss.backward()
        grads = [p.grad.flatten().float() for p in self.student.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return [loss.detach().float(), torch.cat(grads)]


def prepared(case: Case, impl: str) -> Callable[[], object]:
    """For a child process: a trainer that has made a step, so that the optimiser's state exists."""
    trainer = Trainer(case, impl, torch.device("cpu"))
    trainer()
    return trainer
