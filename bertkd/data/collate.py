"""Examples to a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertkd.errors import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Pad examples to the longest of the batch, on the tokenizer's padding side.

    Called with a list of dicts with ``input_ids`` and optionally ``token_type_ids``,
    ``attention_mask``, ``labels`` (an int or a float) and ``index`` (an int), it gives a dict of
    tensors: ``input_ids``, ``attention_mask`` (1 = token) and ``token_type_ids`` int64 of shape
    (B, L), ``labels`` int64 or, for float labels, float32 of shape (B,), ``index`` int64 of shape
    (B,). Other keys are left out.

    Args:
        tokenizer: says the pad ids and the side.
        pad_to_multiple_of: L is a multiple of this, unless that were more than the tokenizer's
            ``model_max_length``. 8 suits tensor cores; 1 pads no further than needed.

    Raises:
        TypeError: ``pad_to_multiple_of`` is no whole number.
        ValueError: the tokenizer has no pad token; or, when called, no examples, examples with
            different keys or numbers of labels, or one whose masks or types are not as many as its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 8) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "this tokenizer has no pad token: set tokenizer.pad_token (e.g. to its eos_token)"
            )
        whole_number("pad_to_multiple_of", pad_to_multiple_of, least=1)
        if tokenizer.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be left or right, got {tokenizer.padding_side!r}")
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = tokenizer.model_max_length
        self.left = tokenizer.padding_side == "left"
        self.pads = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of ``examples``."""
        if not examples:
            raise ValueError("cannot make a batch of no examples")
        if any(example.keys() != examples[0].keys() for example in examples):
            keys = sorted({", ".join(sorted(example)) for example in examples})
            raise ValueError(f"the examples of a batch have different keys: {' | '.join(keys)}")
        for name in self.pads.keys() & examples[0].keys():
            for example in examples:
                if len(example[name]) != len(example["input_ids"]):
                    raise ValueError(
                        f"an example has {len(example['input_ids'])} input_ids, but "
                        f"{len(example[name])} {name}"
                    )
        longest = max(len(example["input_ids"]) for example in examples)
        step = self.pad_to_multiple_of
        width = max(longest, min(-(-longest // step) * step, self.max_length))
        batch = {
            name: self._pad([example[name] for example in examples], width, pad)
            for name, pad in self.pads.items()
            if name in examples[0]
        }
        if "attention_mask" not in batch:
            ones = [[1] * len(example["input_ids"]) for example in examples]
            batch["attention_mask"] = self._pad(ones, width, 0)
        if "labels" in examples[0]:
            several = [x["labels"] for x in examples if isinstance(x["labels"], (list, tuple))]
            counts = sorted({len(labels) for labels in several})
            if len(counts) > 1:
                raise ValueError(
                    f"the examples have {', '.join(map(str, counts))} labels each; labels of tokens are padded "
                    "by transformers' DataCollatorForTokenClassification, which takes the place of this collator"
                )
            labels = torch.as_tensor([example["labels"] for example in examples])
            batch["labels"] = labels.float() if labels.is_floating_point() else labels.long()
        if "index" in examples[0]:
            batch["index"] = torch.as_tensor([example["index"] for example in examples]).long()
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], width: int, pad: int) -> Tensor:
        padded = torch.full((len(rows), width), pad, dtype=torch.long)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if self.left else slice(len(row))
            padded[i, span] = torch.as_tensor(row)
        return padded
