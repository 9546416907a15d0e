"""Eager definitions of every op: the specification, and the oracle of the tests.

Everything here is written the obvious way, builds every map and lets autograd differentiate. Computation is in
float32, or in float64 when any input is float64. Shapes: B batch, H heads, L tokens, D head width, d hidden width,
C classes. ``mask`` is (B, L), true at real tokens: pad keys take no part in any softmax, and a row with nothing to
attend to is 0 with zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from bertkd.windows import is_near

Definition = TypeVar("Definition", bound=Callable[..., Tensor])

# Squared norm up to which a hidden state counts as 0.
COSINE_EPS = 1e-16


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any tensor is float64, else float32: the dtype all sums are made in."""
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def full_precision(definition: Definition) -> Definition:
    """Run a definition with autocast off: it would round the products to half precision."""

    @wraps(definition)
    def run(first: Tensor, *args, **kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return definition(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def scores(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scaled dot products (B, H, L, L): ``a @ b^T * scale``."""
    return a.to(dtype) @ b.to(dtype).transpose(-1, -2) * scale


def attended_keys(
    mask: Tensor | None, window: int | None, length: int, device: torch.device
) -> Tensor:
    """Which keys every row may attend to, (B or 1, 1, L or 1, L): real ones, at most ``window`` tokens away."""
    keys = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
    if mask is not None:
        keys = keys & mask.bool()[:, None, None, :]
    if window is not None:
        everything = slice(0, length)
        keys = keys & is_near(window, everything, everything, device)
    return keys


@full_precision
def relation_kl_rows(
    a_s: Tensor,
    b_s: Tensor,
    a_t: Tensor,
    b_t: Tensor,
    mask: Tensor | None = None,
    *,
    scale_s: float,
    scale_t: float,
    window: int | None = None,
    min_prob: float | None = None,
) -> Tensor:
    """KL(softmax(a_t b_t^T scale_t) || softmax(a_s b_s^T scale_s)) of every query row.

    Args:
        a_s, b_s: student (B, H, L, D_s).
        a_t, b_t: teacher (B, H, L, D_t).
        mask: (B, L) keys that may be attended to.
        scale_s, scale_t: factors on the scores.
        window: how many tokens to either side a row may attend to; None for all.
        min_prob: clamp of the student's probabilities before the logarithm, as the paper's released
            code does with 1e-7 (it removes the gradient of everything below).

    Returns:
        (B, H, L), pad rows included (the caller decides whether they count).
    """
    dtype = compute_dtype(a_s, b_s, a_t, b_t)
    s_s = scores(a_s, b_s, scale_s, dtype)
    s_t = scores(a_t, b_t, scale_t, dtype)
    keys = attended_keys(mask, window, s_s.shape[-1], s_s.device)
    # A finite stand-in for minus infinity keeps fully masked rows free of NaN.
    low = torch.finfo(dtype).min / 4
    log_p_t = torch.log_softmax(s_t.masked_fill(~keys, low), -1)
    log_p_s = torch.log_softmax(s_s.masked_fill(~keys, low), -1)
    if min_prob is not None:
        log_p_s = log_p_s.exp().clamp(min_prob, 1.0).log()
    terms = log_p_t.exp() * (log_p_t - log_p_s)
    return terms.masked_fill(~keys, 0.0).sum(-1)


@full_precision
def attention_mse_rows(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None = None,
    *,
    scale_s: float,
    scale_t: float,
    window: int | None = None,
    min_score: float | None = None,
) -> Tensor:
    """Sum over real keys of (S_s - S_t)^2 for every query row, on scaled scores before softmax.

    Args:
        q_s, k_s: student (B, H, L, D_s).
        q_t, k_t: teacher (B, H, L, D_t).
        mask: (B, L) keys that count.
        scale_s, scale_t: factors on the scores.
        window: how many tokens to either side of a row count; None for all.
        min_score: scores at or below it are set to 0 on either side, as the released code does with -1e2.

    Returns:
        (B, H, L), pad rows included.
    """
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    s_s = scores(q_s, k_s, scale_s, dtype)
    s_t = scores(q_t, k_t, scale_t, dtype)
    if min_score is not None:
        s_s = s_s.masked_fill(s_s <= min_score, 0.0)
        s_t = s_t.masked_fill(s_t <= min_score, 0.0)
    squares = (s_s - s_t).square()
    if mask is not None or window is not None:
        keys = attended_keys(mask, window, s_s.shape[-1], s_s.device)
        squares = squares.masked_fill(~keys, 0.0)
    return squares.sum(-1)


@full_precision
def hidden_mse_rows(
    h_s: Tensor, h_t: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Sum over the width of (h_s W^T + b - h_t)^2 for every row: (..., d_s), (..., d_t) -> (...)."""
    dtype = compute_dtype(h_s, h_t, weight)
    x = h_s.to(dtype)
    if weight is not None:
        x = x @ weight.to(dtype).T
    if bias is not None:
        x = x + bias.to(dtype)
    return (x - h_t.to(dtype)).square().sum(-1)


@full_precision
def hidden_cosine_rows(h_s: Tensor, h_t: Tensor) -> Tensor:
    """1 - cos(h_s, h_t) of every row: (..., d), (..., d) -> (...).

    A student's vector of a squared norm up to ``COSINE_EPS`` has cosine 0 and, as it has no direction to turn, no
    gradient.
    """
    dtype = compute_dtype(h_s, h_t)
    x, y = h_s.to(dtype), h_t.to(dtype)
    square = x.square().sum(-1)
    # The norms are clamped inside the square root so that the gradient at 0 is finite.
    norm = (square.clamp_min(COSINE_EPS) * y.square().sum(-1).clamp_min(COSINE_EPS)).sqrt()
    return 1.0 - torch.where(square <= COSINE_EPS, 0.0, (x * y).sum(-1) / norm)


@full_precision
def softmax_kl_rows(z_s: Tensor, z_t: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)) of every row: (..., C), (..., C) -> (...)."""
    dtype = compute_dtype(z_s, z_t)
    log_p_s = torch.log_softmax(z_s.to(dtype) / temperature, -1)
    log_p_t = torch.log_softmax(z_t.to(dtype) / temperature, -1)
    p_t = log_p_t.exp()
    # 0 log 0 = 0: a class masked with -inf on both sides adds nothing.
    return (p_t * (log_p_t - log_p_s)).masked_fill(p_t == 0, 0.0).sum(-1)


@full_precision
def linear_kl_rows(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``softmax_kl_rows`` of the two decoders' logits: (N, d_s), (V, d_s), (N, d_t), (V, d_t) -> (N,)."""
    dtype = compute_dtype(h_s, w_s, h_t, w_t)
    z_s = h_s.to(dtype) @ w_s.to(dtype).T
    z_t = h_t.to(dtype) @ w_t.to(dtype).T
    if bias_s is not None:
        z_s = z_s + bias_s.to(dtype)
    if bias_t is not None:
        z_t = z_t + bias_t.to(dtype)
    return softmax_kl_rows(z_s, z_t, temperature)
