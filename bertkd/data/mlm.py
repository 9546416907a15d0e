"""Dynamic masking for masked language modelling (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertkd.data.collate import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MaskingCollator:
    """Batches for masked language modelling: of the chosen tokens 80 % read ``[MASK]``, 10 % a random token.

    Gives ``Collator``'s tensors with ``labels`` int64 (B, L): the original token where one was
    chosen, -100 elsewhere. Each call draws anew (dynamic masking); special tokens are never chosen.
    The drawing is transformers' ``DataCollatorForLanguageModeling``.

    Args:
        tokenizer: with a mask token.
        probability: share of the tokens that are chosen.
        seed: ``None`` draws from torch's global generator, which the training loop seeds batch by
            batch; a number makes the masks a function of it and the batch, the same each time
            (for evaluation).
        pad_to_multiple_of: as for ``Collator``.

    Raises:
        ValueError: no mask token, or a ``probability`` outside (0, 1].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float = 0.15,
        *,
        seed: int | None = None,
        pad_to_multiple_of: int = 8,
    ) -> None:
        from transformers import DataCollatorForLanguageModeling

        if not 0 < probability <= 1:
            raise ValueError(f"probability must lie in (0, 1], got {probability}")
        self.seed = seed
        self._collate = Collator(tokenizer, pad_to_multiple_of)
        self._masking = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=probability, seed=seed
        )
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of ``examples``, whose own ``labels`` are ignored."""
        batch = self._collate([{k: v for k, v in e.items() if k != "labels"} for e in examples])
        ids = batch["input_ids"]
        special = torch.isin(ids, self._special)
        if special.all():
            raise ValueError(
                "this batch holds nothing but special tokens: there is nothing to mask"
            )
        if self.seed is not None:
            text = f"{self.seed}:{ids.tolist()}".encode()
            number = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
            self._masking.generator = torch.Generator().manual_seed(number)
        while True:
            masked, labels = self._masking.torch_mask_tokens(
                ids.clone(), special_tokens_mask=special
            )
            # A small batch may be left without any chosen token, and its loss would be 0 / 0.
            if (labels != -100).any():
                return {**batch, "input_ids": masked, "labels": labels}
