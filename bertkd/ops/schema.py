"""Every op's schema and fake implementation, in one place.

An op comes in two forms. ``<op>_rows`` gives the loss of every row. ``<op>_fwd_bwd`` gives the weighted sum of the
rows and its gradient with respect to the student's tensors in one visit: a loss is a scalar and its gradient is
linear in the upstream gradient, so nothing has to be computed twice. The backward of the row form is the second form
with the upstream gradient as weights. The hidden-state losses have no row form, as a row needs no tiles there; where
nobody wants a gradient ``<op>_sum`` gives the weighted sum alone.

All ops are functional (nothing is mutated, no output aliases an input) and opaque to ``torch.compile``. ``impl`` says
which code runs; where it says "auto", ``dispatch`` decides inside the op, where the tensors are real.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bertkd.ops.dispatch import resolve
from bertkd.ops.implementations import implementation
from bertkd.ops.rows import counted_rows
from bertkd.ops.tensors import float_tensors, has_mask
from bertkd.reference import compute_dtype

_ATTENTION = "Tensor {0}_s, Tensor {1}_s, Tensor {0}_t, Tensor {1}_t, Tensor? mask, float scale_s, float scale_t"
_AB = _ATTENTION.format("a", "b")
_QK = _ATTENTION.format("q", "k")
_WINDOW = "int window"  # tokens to either side that a row compares
_SELF = "Tensor x_s, Tensor x_t, Tensor? mask, float scale_s, float scale_t"
_LINEAR = (
    "Tensor h_s, Tensor w_s, Tensor? bias_s, Tensor h_t, Tensor w_t, Tensor? bias_t, float temperature, "
    "bool decoder_grad"
)
_PROJ = "Tensor h_s, Tensor weight, Tensor? bias, Tensor h_t"
_COMBINE = "Tensor[] h_s, Tensor weight, Tensor? bias, Tensor[] h_t"

# row_weight: (B, H, L) for the attention ops, (N,) for the others, in the dtype of the sums.
# decoder_grad: whether w_s or bias_s is trained; the row form has it for its backward alone.
SCHEMAS = {
    "relation_kl_rows": f"({_AB}, str impl) -> Tensor",
    "relation_kl_fwd_bwd": f"(Tensor row_weight, {_AB}, str impl) -> (Tensor, Tensor, Tensor)",
    "self_relation_kl_rows": f"({_SELF}, str impl) -> Tensor",
    "self_relation_kl_fwd_bwd": f"(Tensor row_weight, {_SELF}, str impl) -> (Tensor, Tensor)",
    "attention_mse_rows": f"({_QK}, str impl) -> Tensor",
    "attention_mse_fwd_bwd": f"(Tensor row_weight, {_QK}, str impl) -> (Tensor, Tensor, Tensor)",
    "window_relation_kl_rows": f"({_AB}, {_WINDOW}, str impl) -> Tensor",
    "window_relation_kl_fwd_bwd": f"(Tensor row_weight, {_AB}, {_WINDOW}, str impl) -> (Tensor, Tensor, Tensor)",
    "window_attention_mse_rows": f"({_QK}, {_WINDOW}, str impl) -> Tensor",
    "window_attention_mse_fwd_bwd": f"(Tensor row_weight, {_QK}, {_WINDOW}, str impl) -> (Tensor, Tensor, Tensor)",
    "hidden_mse_fwd_bwd": "(Tensor row_weight, Tensor[] h_s, Tensor[] h_t, str impl) -> (Tensor, Tensor[])",
    "hidden_mse_sum": "(Tensor row_weight, Tensor[] h_s, Tensor[] h_t, str impl) -> Tensor",
    "hidden_proj_mse_fwd_bwd": (
        f"(Tensor row_weight, {_PROJ}, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "hidden_proj_mse_sum": f"(Tensor row_weight, {_PROJ}, str impl) -> Tensor",
    "hidden_combine_mse_fwd_bwd": (
        f"(Tensor row_weight, {_COMBINE}, str impl) -> (Tensor, Tensor[], Tensor, Tensor)"
    ),
    "hidden_combine_mse_sum": f"(Tensor row_weight, {_COMBINE}, str impl) -> Tensor",
    "hidden_cosine_fwd_bwd": "(Tensor row_weight, Tensor h_s, Tensor h_t, str impl) -> (Tensor, Tensor)",
    "hidden_cosine_sum": "(Tensor row_weight, Tensor h_s, Tensor h_t, str impl) -> Tensor",
    "softmax_kl_rows": "(Tensor z_s, Tensor z_t, float temperature, str impl) -> Tensor",
    "softmax_kl_fwd_bwd": (
        "(Tensor row_weight, Tensor z_s, Tensor z_t, float temperature, str impl) -> (Tensor, Tensor)"
    ),
    "linear_kl_rows": f"({_LINEAR}, Tensor? row_weight, str impl) -> Tensor",
    "linear_kl_fwd_bwd": (
        f"(Tensor row_weight, {_LINEAR}, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


FORMS = ("rows", "sum", "fwd_bwd")

# Ops whose rows are projected first: their row form takes the weights too, and gives 0 for rows of weight 0.
LEAVES_ROWS_OUT = ("linear_kl",)


def value_form(op: str) -> str:
    """The form of an op that gives its value without gradients."""
    return "rows" if f"{op}_rows" in SCHEMAS else "sum"


def _loss(like: Tensor, *tensors: Tensor | None) -> Tensor:
    return like.new_empty((), dtype=compute_dtype(like, *tensors))


def _rows(like: Tensor, *tensors: Tensor | None) -> Tensor:
    return like.new_empty(like.shape[:-1], dtype=compute_dtype(like, *tensors))


def _bias_grad(bias: Tensor | None, weight: Tensor) -> Tensor:
    """An empty tensor stands for the gradient of an absent bias."""
    return weight.new_empty(0) if bias is None else torch.empty_like(bias)


def _fake_rows(student, teacher, *_):
    """Of an op with one tensor a side."""
    return _rows(student, teacher)


def _fake_fwd_bwd(row_weight, student, teacher, *_):
    """Of an op with one tensor a side."""
    return _loss(student, teacher), torch.empty_like(student)


def _fake_sum(row_weight, *inputs):
    return _loss(row_weight, *float_tensors(inputs))


def _fake_relation_rows(a_s, b_s, a_t, b_t, *_):
    return _rows(a_s, b_s, a_t, b_t)


def _fake_relation_fwd_bwd(row_weight, a_s, b_s, a_t, b_t, *_):
    return _loss(a_s, b_s, a_t, b_t), torch.empty_like(a_s), torch.empty_like(b_s)


def _fake_hidden_mse(row_weight, h_s, h_t, impl):
    return _loss(*h_s, *h_t), [torch.empty_like(x) for x in h_s]


def _fake_hidden_proj_mse(row_weight, h_s, weight, bias, h_t, impl):
    grads = torch.empty_like(h_s), torch.empty_like(weight), _bias_grad(bias, weight)
    return _loss(h_s, weight, h_t), *grads


def _fake_hidden_combine_mse(row_weight, h_s, weight, bias, h_t, impl):
    grads = [torch.empty_like(x) for x in h_s], torch.empty_like(weight), _bias_grad(bias, weight)
    return _loss(*h_s, weight, *h_t), *grads


def _fake_linear_rows(h_s, w_s, bias_s, h_t, w_t, *_):
    return _rows(h_s, w_s, h_t, w_t)


def _fake_linear_fwd_bwd(
    row_weight, h_s, w_s, bias_s, h_t, w_t, bias_t, temperature, decoder_grad, impl
):
    """Empty tensors stand for the gradients of a frozen decoder too."""
    grad_w, grad_b = torch.empty_like(w_s), _bias_grad(bias_s, w_s)
    if not decoder_grad:
        grad_w, grad_b = w_s.new_empty(0), grad_b.new_empty(0)
    return _loss(h_s, w_s, h_t, w_t), torch.empty_like(h_s), grad_w, grad_b


FAKES: dict[str, Callable[..., Any]] = {
    "relation_kl_rows": _fake_relation_rows,
    "relation_kl_fwd_bwd": _fake_relation_fwd_bwd,
    "self_relation_kl_rows": _fake_rows,
    "self_relation_kl_fwd_bwd": _fake_fwd_bwd,
    "attention_mse_rows": _fake_relation_rows,
    "attention_mse_fwd_bwd": _fake_relation_fwd_bwd,
    "window_relation_kl_rows": _fake_relation_rows,
    "window_relation_kl_fwd_bwd": _fake_relation_fwd_bwd,
    "window_attention_mse_rows": _fake_relation_rows,
    "window_attention_mse_fwd_bwd": _fake_relation_fwd_bwd,
    "hidden_mse_fwd_bwd": _fake_hidden_mse,
    "hidden_mse_sum": _fake_sum,
    "hidden_proj_mse_fwd_bwd": _fake_hidden_proj_mse,
    "hidden_proj_mse_sum": _fake_sum,
    "hidden_combine_mse_fwd_bwd": _fake_hidden_combine_mse,
    "hidden_combine_mse_sum": _fake_sum,
    "hidden_cosine_fwd_bwd": _fake_fwd_bwd,
    "hidden_cosine_sum": _fake_sum,
    "softmax_kl_rows": _fake_rows,
    "softmax_kl_fwd_bwd": _fake_fwd_bwd,
    "linear_kl_rows": _fake_linear_rows,
    "linear_kl_fwd_bwd": _fake_linear_fwd_bwd,
}


def _kernel(name: str):
    """The registered function of an op: hands on to the module of the implementation that ``impl`` stands for."""
    stem, form = next((name.removesuffix(f"_{f}"), f) for f in FORMS if name.endswith(f"_{f}"))

    def run(*args):
        *inputs, impl = args
        row_weight = None
        if stem in LEAVES_ROWS_OUT and form == "rows":
            *inputs, row_weight = inputs
        tensors = float_tensors(inputs if form == "rows" else inputs[1:])
        choice = resolve(stem, impl, tensors, form, masked=has_mask(inputs))
        if form != "rows" and choice.impl != "chunked":
            # The weights are float64 only if another block of the loss is; the kernels read float32.
            inputs[0] = inputs[0].float()
        function = getattr(implementation(choice.impl), name)
        if row_weight is not None:
            function = partial(_counted_rows, function, row_weight)
        device = tensors[0].device.type
        # A program of torch.export calls the op outside the Function around it, where autograd would look inside.
        with torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return function(*inputs)
            # Autocast would run the products in half precision.
            with torch.autocast(device, enabled=False):
                return function(*inputs)

    return run


def _counted_rows(function: Callable[..., Tensor], row_weight: Tensor, *inputs: Any) -> Tensor:
    """``linear_kl_rows`` of the rows that weigh anything, 0 for the others."""
    kept = counted_rows(row_weight)
    if kept is None:
        return function(*inputs)
    h_s, w_s, bias_s, h_t, *rest = inputs
    rows = function(h_s[kept], w_s, bias_s, h_t[kept], *rest)
    return rows.new_zeros(row_weight.shape[0]).index_copy_(0, kept, rows)


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bertkd::{_name}", _schema)
    torch.library.impl(f"bertkd::{_name}", "CompositeExplicitAutograd", _kernel(_name))
    torch.library.register_fake(f"bertkd::{_name}", FAKES[_name])

# Bound once: looking an overload up costs as much as calling it.
OPS = {name: getattr(torch.ops.bertkd, name).default for name in SCHEMAS}
