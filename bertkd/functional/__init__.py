"""The drop-in losses.

All accept fp32, fp16, bf16 (and fp64), mixed between teacher and student, compute in fp32 (fp64 for fp64 inputs) and
return that; the gradient has the dtype of its tensor, and the teacher never gets one.

Common arguments:
    mask: (B, L) bool or integer, 1 = real token. Pad keys take no part in a softmax, pad rows in no mean.
        What pads hold must be finite. With any impl but "eager" the logit losses take anything there, and so do
        hidden_mse without a projection and hidden_cosine if there is a reduction.
    count_pads: True lets pad rows count in the mean, as the paper's released code does.
    row_weight: (B, L) or (B,), multiplies rows and leaves the count alone; it gets no gradient.
    reduction: "mean" over the rows that count (and heads, widths), "sum", or "none" for the rows themselves.
    impl: "auto", "eager", "chunked", "native", "triton", "cuda": see ``bertkd.explain``. For reduction "none"
        hidden_mse and hidden_cosine are what "eager" computes, whatever is asked for: a row a token needs no tiles.
"""

from bertkd.functional.attention import attention_kl, attention_mse, relation_kl, value_relation_kl
from bertkd.functional.hidden import hidden_combine_mse, hidden_cosine, hidden_mse
from bertkd.functional.logits import linear_kl, logit_kl, softmax_kl

__all__ = [
    "attention_kl",
    "attention_mse",
    "hidden_combine_mse",
    "hidden_cosine",
    "hidden_mse",
    "linear_kl",
    "logit_kl",
    "relation_kl",
    "softmax_kl",
    "value_relation_kl",
]
