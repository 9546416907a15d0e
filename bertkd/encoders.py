"""What an encoder looks like: its size, its blocks, where its attention sits.

Everything here reads a model or its config by name and shape only, so nothing of transformers is
imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from bertkd.errors import UnsupportedEncoderError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes of an encoder.

    Attributes:
        model_type: Hugging Face's name of the architecture, e.g. ``"bert"``.
        num_blocks: how many blocks a forward runs through.
        num_heads: attention heads per block.
        head_dim: width of one head's query, key and value.
        hidden_size: width of the hidden states between blocks.
        vocab_size: rows of the token embedding.
        max_positions: the longest sequence the position embeddings allow; None where nothing
            limits it (rotary and relative positions).
        has_maps: whether a block's attention map is softmax(q k^T scale), and not also of relative positions
            that are added to the scores.
    """

    model_type: str
    num_blocks: int
    num_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    has_maps: bool = True


@dataclass(frozen=True)
class _Layout:
    """Where an architecture keeps its blocks (in the base model) and attention (in a block).

    ``projections`` are the layers of an attention module that make its queries, keys and values where it computes
    attention itself, with relative positions in its scores, and not by transformers' AttentionInterface.
    """

    blocks: str = "encoder.layer"
    attention: str = "attention.self"
    depth: str = "num_hidden_layers"
    rotary: bool = False
    projections: tuple[str, str, str] | None = None


_LAYOUTS = {
    "albert": _Layout(blocks="encoder.albert_layer_groups", attention="attention"),
    "bert": _Layout(),
    "camembert": _Layout(),
    # Versions 2 and 3.
    "deberta-v2": _Layout(projections=("query_proj", "key_proj", "value_proj")),
    "distilbert": _Layout(blocks="transformer.layer", attention="attention", depth="n_layers"),
    "electra": _Layout(),
    "ernie": _Layout(),
    "mobilebert": _Layout(),
    "modernbert": _Layout(blocks="layers", attention="attn", rotary=True),
    "mpnet": _Layout(attention="attention.attn", projections=("q", "k", "v")),
    "nomic_bert": _Layout(blocks="layers", attention="self_attn", rotary=True),
    "roberta": _Layout(),
    "xlm-roberta": _Layout(),
}

SUPPORTED: tuple[str, ...] = tuple(_LAYOUTS)

# RoBERTa and its kin number positions from pad_token_id + 1.
_PADDED_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")


def describe_config(config: PretrainedConfig) -> EncoderSpec:
    """Read the sizes of the encoder that ``config`` describes.

    Raises:
        UnsupportedEncoderError: the architecture is not in ``SUPPORTED``, the config makes a
            decoder of it, or ALBERT has several layers per group.
    """
    layout = _layout(config)
    hidden = config.hidden_size
    # MobileBERT attends in its bottleneck, NomicBERT may state a head width of its own.
    head_dim = getattr(config, "head_dim", None) or (
        getattr(config, "true_hidden_size", hidden) // config.num_attention_heads
    )
    return EncoderSpec(
        model_type=config.model_type,
        num_blocks=getattr(config, layout.depth),
        num_heads=config.num_attention_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        vocab_size=config.vocab_size,
        max_positions=None if layout.rotary else _max_positions(config),
        has_maps=layout.projections is None,
    )


def describe(model: nn.Module) -> EncoderSpec:
    """Read the sizes of ``model``: an encoder, bare or with a task head, compiled or wrapped.

    Raises:
        TypeError: ``model`` is not a Hugging Face model.
        UnsupportedEncoderError: see ``describe_config``; or the model is not built as its
            architecture is in transformers, or has another number of blocks than its config says.
    """
    config: Any = base_model(model).config
    spec = describe_config(config)
    if (found := len(block_list(model))) != spec.num_blocks:
        raise UnsupportedEncoderError(
            f"the config says {depth_field(config)}={spec.num_blocks}, but the model has {found} "
            f"blocks. Set model.config.{depth_field(config)} = {found}."
        )
    return spec


def base_model(model: nn.Module) -> nn.Module:
    """Return the bare encoder inside ``model``, without task head and wrappers.

    The wrappers of ``torch.compile``, ``DistributedDataParallel``, ``DataParallel`` and PEFT are looked
    through, outside and inside the task model.

    Raises:
        TypeError: ``model`` is not a Hugging Face model.
        UnsupportedEncoderError: PEFT puts trained prompts in front of its tokens, or it is in FSDP's first version.
    """
    inner: Any = unwrap(model)
    if not hasattr(inner, "config") or not hasattr(inner, "base_model_prefix"):
        raise TypeError(
            f"model must be a Hugging Face encoder, got {type(inner).__name__}. Pass the "
            "transformers model itself (of a sentence-transformers model: model[0].auto_model)."
        )
    return unwrap(getattr(inner, inner.base_model_prefix, inner))


def unwrap(model: nn.Module) -> nn.Module:
    """Strip the wrappers of ``torch.compile``, DDP, ``DataParallel`` and PEFT off ``model``.

    PEFT's names few arguments of a forward, while the model inside, whose layers hold the adapters, takes all.

    Raises:
        UnsupportedEncoderError: see `base_model`.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif (adapted := inside_peft(inner)) is not None:
            # Where adapters are mixed, none can be a prompt.
            config = getattr(inner, "active_peft_config", None)
            if config is not None and config.is_prompt_learning:
                raise UnsupportedEncoderError(
                    f"{type(inner).__name__} puts prompts in front of the tokens, whose states and maps match none "
                    "of another model: use adapters in its layers, e.g. LoRA"
                )
            inner = adapted
        elif type(inner).__name__ == "FullyShardedDataParallel":
            raise UnsupportedEncoderError(
                "model is in FullyShardedDataParallel, whose backward goes by the outputs of its modules and not by "
                "what is captured inside: use torch.distributed.fsdp.fully_shard"
            )
        else:
            return inner


def inside_peft(model: Any) -> nn.Module | None:
    """Return the model inside PEFT's ``PeftModel`` or ``PeftMixedModel``, with the adapters in its layers, or None."""
    if hasattr(type(model), "get_base_model"):
        return model.get_base_model()
    return model.base_model.model if type(model).__name__ == "PeftMixedModel" else None


def block_list(model: nn.Module) -> nn.ModuleList | list[nn.Module]:
    """Return the blocks of ``model`` in the order a forward runs them.

    For ALBERT this is a plain list in which the shared layer stands once per block.

    Raises:
        TypeError, UnsupportedEncoderError: see ``describe``.
    """
    base: Any = base_model(model)
    layout = _layout(base.config)
    try:
        blocks: Any = base.get_submodule(layout.blocks)
    except AttributeError as error:
        raise UnsupportedEncoderError(
            f"{type(base).__name__} calls itself {base.config.model_type!r} but has no "
            f"{layout.blocks!r}. Load it without trust_remote_code."
        ) from error
    if base.config.model_type != "albert":
        return blocks
    num_blocks, num_groups = base.config.num_hidden_layers, len(blocks)
    # With transformers' own rounding: in floats 9 / (18 / 14) is less than 7.
    return [blocks[int(i / (num_blocks / num_groups))].albert_layers[0] for i in range(num_blocks)]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return, per block, the module that calls the attention function (repeated where shared).

    Raises:
        TypeError, UnsupportedEncoderError: see ``describe``.
    """
    base: Any = base_model(model)
    path = _layout(base.config).attention.split(".")
    found = []
    for block in block_list(model):
        module: Any = block
        # getattr, not get_submodule: it also looks through a block wrapped by torch.compile.
        for name in path:
            module = getattr(module, name)
        found.append(module)
    return found


def projections(model: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of the layers of an attention module that make q, k and v, where it attends by itself.

    None where attention goes through transformers' AttentionInterface, which shows q, k and v.
    """
    config: Any = base_model(model).config
    return _layout(config).projections


def last_norm(model: nn.Module) -> nn.Module | None:
    """Return the norm that follows the last block outside of it (ModernBERT), or None."""
    return getattr(base_model(model), "final_norm", None)


def not_loaded(weight: str) -> UnsupportedEncoderError:
    """Build the error for a teacher with a weight, given by its name, that is on device "meta"."""
    return UnsupportedEncoderError(
        f"the teacher's weights are not loaded, {weight!r} is on device 'meta': load it with from_pretrained, "
        "without a device_map that offloads"
    )


def depth_field(config: PretrainedConfig) -> str:
    """Return the name of the config's field that holds the number of blocks."""
    return _layout(config).depth


def _layout(config: PretrainedConfig) -> _Layout:
    name = getattr(config, "model_type", None)
    if name not in _LAYOUTS:
        raise UnsupportedEncoderError(
            f"model type {name!r} is not supported: its attention cannot be captured. "
            f"Supported: {', '.join(SUPPORTED)}. The losses in bertkd.functional take tensors of any model."
        )
    if getattr(config, "is_decoder", False):
        raise UnsupportedEncoderError(
            f"this {name!r} config has is_decoder=True; only encoders are supported. "
            "Load it with is_decoder=False."
        )
    if getattr(config, "inner_group_num", 1) != 1:
        raise UnsupportedEncoderError(
            f"ALBERT with inner_group_num={config.inner_group_num} is not supported; only 1 is "
            "(every published ALBERT has 1)."
        )
    if getattr(config, "conv_kernel_size", 0) > 0 and name == "deberta-v2":
        raise UnsupportedEncoderError(
            f"DeBERTa with a convolution beside its first block (conv_kernel_size={config.conv_kernel_size}), as "
            "v2-xlarge has, is not supported; v3 and v2 without one are."
        )
    return _LAYOUTS[name]


def _max_positions(config: PretrainedConfig) -> int | None:
    if not getattr(config, "position_biased_input", True):
        return None  # DeBERTa's third version has relative positions alone
    offset = config.pad_token_id + 1 if config.model_type in _PADDED_POSITIONS else 0
    return config.max_position_embeddings - offset
