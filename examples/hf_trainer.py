"""Distil with the Hugging Face Trainer instead of `bertkd distill`.

The Trainer drops columns that the model's forward does not name, and saves the module it trains.
`DistillTrainer` keeps what teacher and terms need (token types, labels, index) and saves the
student as a plain checkpoint that `from_pretrained` loads, with what the terms train beside it.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

import bertkd
from bertkd.distiller import DistillOutput
from bertkd.encoders import unwrap

OBJECTIVE = "objective.pt"  # projections, memory banks


class DistillTrainer(Trainer):
    """Trains a `Distiller`; terms are logged beside the loss."""

    def __init__(self, distiller: bertkd.Distiller, args: TrainingArguments, **kwargs: Any) -> None:
        for name in ("neftune_noise_alpha", "label_smoothing_factor"):
            if getattr(args, name):
                raise ValueError(f"{name} has no use here: the objective says what the loss is.")
        super().__init__(model=distiller, args=args, **kwargs)
        self.latest_terms: dict[str, torch.Tensor] = {}

    def _set_signature_columns_if_needed(self) -> None:
        distiller = unwrap(self.model)
        names = {"labels", "label", "index"}
        for model in (distiller.teacher, distiller.student):
            names |= set(inspect.signature(unwrap(model).forward).parameters)
        self._signature_columns = sorted(names)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, DistillOutput]:
        output = model(inputs)
        self.latest_terms = output.terms
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            output = model(self._prepare_inputs(inputs))
        return output.loss, None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        terms = {f"term/{name}": value.item() for name, value in self.latest_terms.items()}
        super().log({**logs, **terms}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        unwrap(unwrap(self.model).student).save_pretrained(directory)
        torch.save(unwrap(self.model).objective.state_dict(), directory / OBJECTIVE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        distiller, directory = unwrap(model or self.model), Path(resume_from_checkpoint)
        student = unwrap(distiller.student)
        student.load_state_dict(type(student).from_pretrained(directory).state_dict())
        distiller.objective.load_state_dict(torch.load(directory / OBJECTIVE, map_location="cpu"))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def main(teacher_path: str, output_dir: str, texts: list[str]) -> None:
    """Distil the encoder at ``teacher_path`` into one of half its depth, on ``texts``."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher = AutoModel.from_pretrained(teacher_path)
    student = bertkd.create_student(teacher, f"uniform:{teacher.config.num_hidden_layers // 2}")
    rows = [dict(tokenizer(text, truncation=True, max_length=128)) for text in texts]
    trainer = DistillTrainer(
        bertkd.Distiller(teacher, student, "att_kl + hid_seq"),
        TrainingArguments(output_dir, learning_rate=3e-4, num_train_epochs=1, report_to="none"),
        train_dataset=rows,
        data_collator=lambda batch: tokenizer.pad(batch, return_tensors="pt"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(output_dir)


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 4:
        sys.exit("usage: hf_trainer.py TEACHER OUTPUT_DIR TEXTS (a file, one text a line)")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_text("utf-8").splitlines())
