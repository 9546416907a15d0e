"""Hugging Face encoders on CPUs with bertkd's own attention: an attention implementation like "sdpa".

PyTorch's scaled dot product attention has no dropout in its kernel for CPUs: a student that trains with the usual
0.1 makes its (B, H, L, L) maps after all. ``bertkd.ops.self_attention`` makes none, and is the faster one without
dropout too. Keys outside of a window, as ModernBERT's local blocks have, it does not visit, while SDPA computes all.
What it cannot do (causal attention, other devices, export to TorchScript and ONNX) is handed on to SDPA, call by call.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bertkd.ops.native.library import isa, unavailable
from bertkd.ops.self_attention import self_attention
from bertkd.ops.tensors import DTYPES
from bertkd.windows import is_near

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Hugging Face's name of the implementation, as in ``model.set_attn_implementation``.
NAME = "bertkd_cpu"

# Keyword arguments of an attention function that change its result and are not known to the kernel. How wide a window
# is says the mask, as to SDPA: of what models hand over here, some add one to it and some do not.
_FOREIGN = {"position_bias", "softcap", "sliding_window", "cache", "s_aux"}


def use_cpu_attention(model: PreTrainedModel) -> str | None:
    """Let a model that runs on PyTorch's SDPA attend with bertkd's kernel wherever that can do it.

    Equivalent to `register` and ``model.set_attn_implementation("bertkd_cpu")``; ``set_attn_implementation("sdpa")``
    undoes it. The name is in no checkpoint that the model writes, but in a pickle of it: call `register` in the process
    that unpickles it, or undo it before. A program of ``torch.export`` holds the kernel: import `bertkd.cpu_attention`
    where it is loaded, or undo it before. A Distiller does not need this: it lends its models the kernel for the time
    of its own forward.

    Args:
        model: a Hugging Face model, in place.

    Returns:
        None, or why the model was left as it is: it does not use SDPA, is not on a CPU, or the native kernels are
        not built.

    Raises:
        TypeError: it is no Hugging Face model.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a Hugging Face PreTrainedModel, got {type(model).__name__}")
    if model.config._attn_implementation == NAME:
        return None
    if reason := why_not(model):
        return reason
    register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return "transformers cannot change the attention implementation of this architecture"
    return None


def why_not(model: Any) -> str | None:
    """Why a model cannot attend with bertkd's kernel in place of SDPA, or None if it can."""
    now = model.config._attn_implementation
    if now != "sdpa":
        return f"its attention implementation is {now!r}, not 'sdpa'"
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    return unavailable()


@functools.cache
def register() -> None:
    """Make "bertkd_cpu" known to transformers, for ``from_pretrained(..., attn_implementation=...)``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """A mask function of transformers: the (B, L) mask of pads where that is all, else SDPA's (B, 1, L, L).

    Of pads and a window it is (B, L, window + 1), the mask of pads expanded: `attend` reads the window off its shape.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    window = options.get("local_size")
    if (
        (mask_function is bidirectional_mask_function or window is not None)
        # Otherwise the caller wants to add to the mask. With it, transformers itself takes a mask for one of pads and
        # of the local size, if there is one: where all keys are inside it makes none.
        and allow_is_bidirectional_skip
        and q_length == kv_length
        and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
    ):
        if window is None:
            return attention_mask
        if attention_mask is None:
            shape, device = (batch_size, kv_length), options.get("device")
            attention_mask = torch.ones(shape, dtype=torch.bool, device=device)
        return attention_mask[:, :, None].expand(-1, -1, window + 1)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: (B, H, L, D) to (B, L, H, D), and no map."""
    mask, window = _pads_and_window(attention_mask)
    if mask is not None:
        is_causal = False
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    foreign = _FOREIGN if window is None else _FOREIGN - {"sliding_window"}
    if (
        not is_causal
        and (mask is not None or attention_mask is None)
        and all(options.get(name) is None for name in foreign)
        and _suits(query, key, value, dropout)
    ):
        out = self_attention(
            query, key, value, mask, scale=scaling, dropout=float(dropout), window=window
        )
        return out.transpose(1, 2), None
    if mask is not None:
        attention_mask = mask[:, None, None, :].expand(-1, -1, query.shape[2], -1)
        if window is not None:
            everything = slice(0, query.shape[2])
            attention_mask = attention_mask.bool() & is_near(
                window, everything, everything, query.device
            )
    sdpa = _sdpa()
    return sdpa(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )


def _pads_and_window(mask: Tensor | None) -> tuple[Tensor | None, int | None]:
    """What `make_mask` has put into two or three dimensions; of others, which are not its own, nothing."""
    if mask is None or mask.ndim > 3:
        return None, None
    return (mask, None) if mask.ndim == 2 else (mask[..., 0], mask.shape[2] - 1)


def _suits(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel can do it, and is the better choice."""
    if query.device.type != "cpu" or query.dtype not in DTYPES:
        return False
    # TorchScript and ONNX know operators of PyTorch only.
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    if not query.shape == key.shape == value.shape or not query.dtype == key.dtype == value.dtype:
        return False
    if dropout:
        return dropout < 1
    # A head is one thread's work.
    heads = query.shape[0] * query.shape[1]
    return heads >= _threads() and (query.dtype == torch.float32 or _leads_in_half())


# A graph of torch.compile would break at the number itself.
@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


# From 32 tokens on SDPA took 1.03 to 4 times the kernel's time in bfloat16 on a processor with AVX-512 (AVX512-BF16
# too), in float16 2.3 times and more. With AMX, and where the kernel is a portable one, SDPA has instructions that the
# kernel lacks.
@torch.compiler.assume_constant_result
def _leads_in_half() -> bool:
    return isa() != "portable" and not torch.cpu._is_amx_tile_supported()


def _sdpa() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"]
