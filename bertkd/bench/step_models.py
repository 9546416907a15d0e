"""The pairs of networks whose training steps are timed: real configurations, random weights, no hub."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Pair:
    """A teacher's configuration, its student and the objective between them.

    Attributes:
        config: class of the configuration in transformers.
        model: class of the model.
        options: what differs from the configuration's defaults.
        layers: student's blocks, as ``create_student`` takes them.
        objective: of the distillation.
        blocks: matched (student block, teacher block) pairs.
        relation_heads: heads that q, k and v are re-split into; None leaves the models' own.
        dropout: of the student, everywhere that BERT has one; steps are compared without it and timed with it.
        compiled: both networks by torch.compile, those of the baseline too.
    """

    config: str
    model: str
    layers: str
    objective: str
    blocks: Sequence[tuple[int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    relation_heads: int | None = None
    dropout: float = 0.0
    compiled: bool = False


QKV = "qkv_kl(student_block={0}, teacher_block={1}, relation_heads={2})"

_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_ROBERTA = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
_MODERN_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 576,
}
_TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}

_MINILM_TO_3 = Pair(
    "BertConfig", "BertModel", "uniform:3", "att_kl", [(0, 1), (1, 3), (2, 5)], _MINILM
)
_BASE_TO_6 = Pair(
    "BertConfig", "BertModel", "uniform:6", "att_kl", [(i, 2 * i + 1) for i in range(6)]
)

PAIRS: dict[str, Pair] = {
    "minilm_l6_to_3": _MINILM_TO_3,
    # With the dropout that a student has unless its user switches it off.
    "minilm_l6_to_3_dropout": replace(_MINILM_TO_3, dropout=0.1),
    "minilm_l6_to_3_compiled": replace(_MINILM_TO_3, compiled=True),
    "bert_base_to_6": _BASE_TO_6,
    "bert_base_to_6_compiled": replace(_BASE_TO_6, compiled=True),
    # MiniLMv2 takes one block of a large teacher, not its last.
    "bert_large_to_6_qkv": Pair("BertConfig", "BertModel", "uniform:6", QKV, [(5, 20)], _LARGE, 64),
    "roberta_base_to_3": Pair(
        "RobertaConfig", "RobertaModel", "uniform:3", "att_kl", [(0, 3), (1, 7), (2, 11)], _ROBERTA
    ),
    # Every third block of the teacher attends to everything, the others to a window; of the student's, 1, 4, 7 and 10.
    "modernbert_base_to_11": Pair(
        "ModernBertConfig",
        "ModernBertModel",
        "uniform:11",
        "att_kl",
        [(i, 2 * i + 1) for i in range(11)],
    ),
    # As narrow as MiniLM, for CPUs; two of the student's blocks attend to a window.
    "modernbert_small_to_3": Pair(
        "ModernBertConfig",
        "ModernBertModel",
        "uniform:3",
        "att_kl",
        [(0, 1), (1, 3), (2, 5)],
        _MODERN_SMALL,
    ),
    "tiny": Pair("BertConfig", "BertModel", "first:1", "att_kl", [(0, 1)], _TINY),
    "tiny_qkv": Pair("BertConfig", "BertModel", "first:1", QKV, [(0, 1)], _TINY, 4),
}


def networks(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with random weights, the pair's dropout and eager-capable attention.

    Raises:
        ImportError: transformers is not installed.
    """
    teacher, student = (copy.deepcopy(model).to(device) for model in _networks(name, device))
    return teacher.eval(), student.train()


# Every contestant of a case gets a copy: drawing a student anew takes ten seconds.
@functools.lru_cache(maxsize=1)
def _networks(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Both networks on the CPU, where they are in nobody's way."""
    import bertkd

    torch.manual_seed(0)
    # A GPU draws the hundreds of millions of weights in no time.
    teacher = new_teacher(name, device)
    student: Any = bertkd.create_student(teacher, PAIRS[name].layers, verbose=False)
    return teacher.cpu(), student.cpu()


def new_teacher(name: str, device: torch.device) -> Any:
    """A pair's teacher with random weights, drawn on ``device``."""
    import transformers

    pair = PAIRS[name]
    config = getattr(transformers, pair.config)(**pair.options)
    for field_name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, field_name):
            setattr(config, field_name, pair.dropout)
    # Queries and keys of unit size: the usual small weights make flat maps, and a loss that is all rounding.
    config.initializer_range = config.hidden_size**-0.5
    options = {"add_pooling_layer": False} if "ModernBert" not in pair.model else {}
    with device:
        return getattr(transformers, pair.model)._from_config(config, **options)
