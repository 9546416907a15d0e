"""The portable implementation: pure PyTorch, closed-form gradients, memory linear in the sequence length."""

from bertkd.ops.chunked.attention_mse import (
    attention_mse_fwd_bwd,
    attention_mse_rows,
    window_attention_mse_fwd_bwd,
    window_attention_mse_rows,
)
from bertkd.ops.chunked.hidden import (
    hidden_combine_mse_fwd_bwd,
    hidden_combine_mse_sum,
    hidden_cosine_fwd_bwd,
    hidden_cosine_sum,
    hidden_mse_fwd_bwd,
    hidden_mse_sum,
    hidden_proj_mse_fwd_bwd,
    hidden_proj_mse_sum,
)
from bertkd.ops.chunked.linear_kl import linear_kl_fwd_bwd, linear_kl_rows
from bertkd.ops.chunked.relation_kl import (
    relation_kl_fwd_bwd,
    relation_kl_rows,
    self_relation_kl_fwd_bwd,
    self_relation_kl_rows,
    window_relation_kl_fwd_bwd,
    window_relation_kl_rows,
)
from bertkd.ops.chunked.softmax_kl import softmax_kl_fwd_bwd, softmax_kl_rows

__all__ = [
    "attention_mse_fwd_bwd",
    "attention_mse_rows",
    "hidden_combine_mse_fwd_bwd",
    "hidden_combine_mse_sum",
    "hidden_cosine_fwd_bwd",
    "hidden_cosine_sum",
    "hidden_mse_fwd_bwd",
    "hidden_mse_sum",
    "hidden_proj_mse_fwd_bwd",
    "hidden_proj_mse_sum",
    "linear_kl_fwd_bwd",
    "linear_kl_rows",
    "relation_kl_fwd_bwd",
    "relation_kl_rows",
    "self_relation_kl_fwd_bwd",
    "self_relation_kl_rows",
    "softmax_kl_fwd_bwd",
    "softmax_kl_rows",
    "window_attention_mse_fwd_bwd",
    "window_attention_mse_rows",
    "window_relation_kl_fwd_bwd",
    "window_relation_kl_rows",
]
