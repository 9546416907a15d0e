"""Retrieval with mean-pooled sentence embeddings: MRR, top-1, agreement with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bertkd.errors import NonFiniteError
from bertkd.objectives.terms_sentence import mean_pool
from bertkd.training.metrics import compute_metrics


@torch.no_grad()
def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 64,
    on_batch: Callable[[float], object] | None = None,
) -> Tensor:
    """Mean-pooled, unit-length embeddings of ``texts``, in their order.

    Texts of similar length share a batch, so that little is spent on pads.

    Args:
        model: encoder whose output has ``last_hidden_state``; runs in eval mode and is put back.
        tokenizer: its Hugging Face tokenizer.
        texts: N strings.
        max_length: longer texts are cut to this many tokens.
        batch_size: texts per forward pass.
        on_batch: called with the fraction done, in [0, 1], after each batch.

    Returns:
        (N, d) fp32 tensor on the CPU.

    Raises:
        ValueError: ``texts`` is empty.
        NonFiniteError: an embedding holds NaN or infinity.
    """
    if not texts:
        raise ValueError("texts is empty: there is nothing to embed.")
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    chunks = []
    try:
        for start in range(0, len(order), batch_size):
            picked = [{"input_ids": rows[i]} for i in order[start : start + batch_size]]
            batch = tokenizer.pad(picked, return_tensors="pt").to(device)
            states = model(**batch).last_hidden_state
            pooled = mean_pool(states, batch["attention_mask"])
            chunks.append(nn.functional.normalize(pooled, dim=-1).cpu())
            if on_batch is not None:
                on_batch(min(1.0, (start + batch_size) / len(order)))
    finally:
        model.train(was_training)
    result = torch.empty(len(order), chunks[0].shape[-1])
    result[order] = torch.cat(chunks)
    if not torch.isfinite(result).all():
        raise NonFiniteError("the model's sentence embeddings hold NaN or infinity.")
    return result


def score_similarities(similarities: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """Scores from a (queries, documents) matrix whose diagonal holds the right pairs.

    Tied documents share the mean of their ranks, so that a model which maps every text to one
    point scores like chance, not like a perfect one.

    Args:
        similarities: (N, N) floating point; row = query, column = document.
        teacher: the teacher's matrix of the same shape.

    Returns:
        ``mrr``, the mean reciprocal rank of the right document; ``top1``, the share of queries
        where it ranks first; with a teacher ``spearman``, the rank correlation of all N * N
        similarities with the teacher's (0 where either are all the same).

    Raises:
        ValueError: the matrix is not square or the shapes differ.
    """
    if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1]:
        raise ValueError(f"similarities must be square, got shape {tuple(similarities.shape)}.")
    right = similarities.diagonal().unsqueeze(1)
    above = (similarities > right).sum(1)
    tied = (similarities == right).sum(1) - 1
    rank = 1.0 + above + tied / 2.0
    scores = {"mrr": float((1.0 / rank).mean()), "top1": float((rank == 1.0).float().mean())}
    if teacher is not None:
        if teacher.shape != similarities.shape:
            raise ValueError(
                f"teacher similarities have shape {tuple(teacher.shape)}, "
                f"the student's {tuple(similarities.shape)}."
            )
        scores |= compute_metrics(["spearman"], similarities.flatten(), teacher.flatten())
    return scores


class RetrievalJudge:
    """Scores models on one set of queries and documents, against one teacher if there is any.

    Args:
        queries: N texts.
        documents: ``documents[i]`` answers ``queries[i]``.
        tokenizer: of teacher and students alike.

    Attributes:
        teacher: (N, N) similarities that Spearman's rho compares with; set it from
            ``similarities(teacher)``.
    """

    def __init__(self, queries: Sequence[str], documents: Sequence[str], tokenizer: Any) -> None:
        if len(queries) != len(documents):
            raise ValueError(f"got {len(queries)} queries for {len(documents)} documents.")
        self.texts = [*queries, *documents]
        self.tokenizer = tokenizer
        self.teacher: Tensor | None = None

    def similarities(
        self, model: nn.Module, on_batch: Callable[[float], object] | None = None
    ) -> Tensor:
        """(N, N) cosines of all queries (rows) with all documents (columns)."""
        both = embed(model, self.tokenizer, self.texts, on_batch=on_batch)
        queries, documents = both.chunk(2)
        return queries @ documents.T

    def __call__(
        self, model: nn.Module, on_batch: Callable[[float], object] | None = None
    ) -> dict[str, float]:
        """Scores of ``score_similarities``; ``on_batch`` is told the fraction done."""
        return score_similarities(self.similarities(model, on_batch), self.teacher)
