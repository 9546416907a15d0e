"""Tiny random models of every supported architecture, and batches for them."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

MODEL_TYPES = [
    "albert",
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "ernie",
    "mobilebert",
    "modernbert",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
]
# Encoders that compute attention themselves, with relative positions in their scores.
OWN_ATTENTION = ["deberta-v2", "mpnet"]
ALL_TYPES = sorted([*MODEL_TYPES, *OWN_ATTENTION])
VOCAB_SIZE = 200  # as many as tiny_tokenizer has
_CLASSES = {
    None: AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
}


def tiny_model(
    model_type: str,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    head_cls: str | None = None,
    num_labels: int = 3,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    **overrides,
) -> PreTrainedModel:
    """A random model in eval mode, with weights large enough that attention is far from uniform.

    ``head_cls`` is None (bare encoder), "sequence" or "mlm"; ``overrides`` go to the config.
    """
    sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 130, "initializer_range": 0.2}
    if model_type == "distilbert":
        sizes |= {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 2 * hidden}
    else:
        sizes |= {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 2 * hidden,
        }
    if model_type in ("albert", "electra", "mobilebert"):
        sizes["embedding_size"] = hidden // 2
    if model_type == "mobilebert":
        sizes["intra_bottleneck_size"] = hidden // 2
    if model_type == "modernbert":
        # The defaults lie outside the tiny vocabulary.
        sizes |= {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if model_type == "deberta-v2":
        # As the third version is configured.
        sizes |= {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        sizes |= {
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        }
    if model_type in OWN_ATTENTION:
        attn_implementation = "eager"
    config = AutoConfig.for_model(model_type, num_labels=num_labels, **(sizes | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _CLASSES[head_cls].from_config(config, attn_implementation=attn_implementation)
        _perturb(model)
    return model.eval()


def _perturb(model: nn.Module) -> None:
    """Move biases off 0 and norm weights off 1, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def tiny_batch(
    model: nn.Module,
    batch: int = 3,
    length: int = 12,
    padding: str | None = "right",
    seed: int = 0,
    labels: bool = False,
) -> dict[str, Tensor]:
    """Random ``input_ids`` and ``attention_mask`` (and ``token_type_ids`` where they matter).

    ``padding``: "right" or "left" pads every row but the first, "ragged" also leaves holes in the
    middle, None gives no mask at all. ``labels`` adds one class per row.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        pads = min(2 * row, length - 2)
        if padding == "left":
            mask[row, :pads] = 0
        elif padding is not None:
            mask[row, length - pads :] = 0
        if padding == "ragged":
            mask[row, 1 : length - pads - 1 : 3] = 0
    tensors = {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id)}
    if padding is not None:
        tensors["attention_mask"] = mask
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(config, "type_vocab_size", 0) > 1:
        types = (torch.arange(length) >= length // 2).long()
        tensors["token_type_ids"] = types.expand(batch, length).contiguous()
    if labels:
        tensors["labels"] = torch.randint(config.num_labels, (batch,), generator=generator)
    return tensors


def tiny_pair(**student) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A BERT of four blocks and one of two, which ``student`` may change."""
    teacher = tiny_model("bert", layers=4)
    return teacher, tiny_model("bert", **{"layers": 2, "seed": 1, **student})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that a model has, by name; afterwards it has none."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
