"""A small module, examples and a collate function that stand in for a Distiller and its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bertkd.training import Stage, train

VOCAB = 20
CLASSES = 3


@dataclass
class Output:
    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class TinyModel(nn.Module):
    """Mean of embeddings, a layer with dropout, a head; ``unused`` never gets a gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)
        self.unused = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        mean = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        return self.head(self.dropout(self.norm(torch.tanh(self.layer(mean)))))


class FakeDistiller(nn.Module):
    """Learns labels and an unregistered teacher's logits; both terms are means over sequences."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = TinyModel(dropout=dropout)
            torch.manual_seed(100)
            self._teacher = (TinyModel().requires_grad_(False).eval(),)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def _apply(self, fn: Any, recurse: bool = True) -> FakeDistiller:
        super()._apply(fn, recurse)
        self.teacher._apply(fn, recurse)
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> Output:
        inputs = batch["input_ids"], batch["attention_mask"]
        logits = self.student(*inputs)
        ce = nn.functional.cross_entropy(logits, batch["labels"])
        with torch.no_grad():
            target = self.teacher(*inputs)
        mse = nn.functional.mse_loss(logits, target)
        if self.training:
            self.seen += 1
        terms = {"ce": ce.detach(), "mse": mse.detach()}
        return Output(ce + 0.5 * mse, terms, logits)


def examples(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Random token ids of 3 to 9 tokens, with labels and row numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(3, 10, (), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": sum(ids) % CLASSES, "index": index})
    return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Right-pad with 0."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": (torch.tensor(ids) > 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "index": torch.tensor([row["index"] for row in rows]),
    }


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold bitwise equal state."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


STAGE = {"objective": "x", "lr": 0.02, "batch_size": 8, "log_every": 1}
STAGE |= {"eval_every": None, "save_every": None}


def run(tmp_path, module=None, data=None, **options):
    """Train a fake in ``tmp_path``: the module and the result. Options are the stage's or ``train``'s."""
    stage = {name: options.pop(name) for name in list(options) if name in Stage.__annotations__}
    settings = {"output_dir": tmp_path / "run", "log_with": None, "progress": False}
    settings |= {"collate": collate, "seed": 3}
    if not {"steps", "epochs"} & stage.keys():
        stage["steps"] = 9
    module = module or FakeDistiller()
    result = train(module, Stage(**STAGE | stage), data or examples(), **settings | options)
    return module, result
