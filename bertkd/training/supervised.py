"""A model trained on its task's labels alone, in the shape the training loop takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertkd.objectives.sides import accepted


@dataclass
class SupervisedOutput:
    """What one batch gave.

    Attributes:
        loss: scalar fp32, to call ``backward`` on.
        terms: its parts by name, detached scalars.
        logits: the model's, as it gave them.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None = None


# As DistillOutput is.
torch.export.register_dataclass(SupervisedOutput)


class Supervised(nn.Module):
    """Fine-tune ``model`` on labels: how a task's teacher is made, and what students compare with.

    Args:
        model: any Hugging Face model that computes a loss from ``labels``.

    Attributes:
        student: ``model``; the name is the one evaluation and export look for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not accepted(model, {"labels": None}):
            raise ValueError(
                f"{type(model).__name__} takes no labels; load the model with a task head, e.g. "
                "AutoModelForSequenceClassification"
            )
        self.student = model
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        self._several_labels = kind == "multi_label_classification"

    def forward(self, batch: Mapping[str, Tensor]) -> SupervisedOutput:
        """The model's own loss on ``batch``; columns its forward does not know are left out.

        Raises:
            ValueError: the batch has no labels.
        """
        if "labels" not in batch:
            raise ValueError(f"batch has no 'labels', only {', '.join(batch)}")
        if self._several_labels:
            # The models' binary cross-entropy takes no integers.
            batch = {**batch, "labels": batch["labels"].float()}
        output = self.student(**accepted(self.student, batch))
        loss = output.loss.float()
        return SupervisedOutput(loss=loss, terms={"ce": loss.detach()}, logits=output.logits)
