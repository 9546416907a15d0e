"""attention_mse: Gram matrices for long sequences, score tiles for short ones.

With A = [c_s q_s, -c_t q_t] and B = [k_s, k_t] the difference of the scores is A_i . B_j, so its squares sum to
<A^T A, B^T B>: no L x L work. Written like that the sum cancels as the student converges. When both sides have one
head width, the same difference is (c_s q_s - c_t q_t) . k_s + c_t q_t . (k_s - k_t), and with A = [c_s q_s - c_t q_t,
c_t q_t], B = [k_s, k_s - k_t] every term is already small when the two networks agree: the error is relative, and
equal networks give exactly 0. With different widths the absolute error stays within about
eps * sum_i |A_i|^2 * sum_j |B_j|^2 / rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertkd.ops.chunked.tiles import Workspace, keys_of, left_out, rows_of, score_tile, tiles
from bertkd.reference import compute_dtype


def gram_pays(length: int, width_s: int, width_t: int) -> bool:
    """Whether O(L (D_s + D_t)^2) is less work than O(L^2 (D_s + D_t)): two Grams of L (D_s + D_t)^2 against tiles."""
    return length > 2 * (width_s + width_t)


def attention_mse_rows(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """Sum over real keys of (S_s - S_t)^2 of every query row, (B, H, L)."""
    if gram_pays(q_s.shape[2], q_s.shape[-1], q_t.shape[-1]):
        dtype = compute_dtype(q_s, k_s, q_t, k_t)
        out = torch.zeros(q_s.shape[:-1], dtype=dtype, device=q_s.device)
        for b in range(q_s.shape[0]):
            a, keys = _factors(
                q_s[b], k_s[b], q_t[b], k_t[b], _keys(mask, b), scale_s, scale_t, dtype
            )
            out[b] = (a @ (keys.transpose(1, 2) @ keys)).mul_(a).sum(-1)
        return out
    return _tile_rows(q_s, k_s, q_t, k_t, mask, scale_s, scale_t)


def attention_mse_fwd_bwd(
    row_weight: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i sum_j (S_s - S_t)_ij^2`` and its gradients with respect to q_s and k_s."""
    inputs = (row_weight, q_s, k_s, q_t, k_t, mask, scale_s, scale_t)
    if gram_pays(q_s.shape[2], q_s.shape[-1], q_t.shape[-1]):
        return _gram_fwd_bwd(*inputs)
    return _tile_fwd_bwd(*inputs)


def _keys(mask: Tensor | None, b: int) -> Tensor | None:
    return None if mask is None else mask[b]


def _factors(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, dtype) -> tuple[Tensor, Tensor]:
    """A and B of one sequence, (H, L, D_s + D_t) each, with S_s - S_t = A B^T at real keys and 0 at pads."""
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in (q_s, k_s, q_t, k_t))
    a_s, a_t = q_s * scale_s, q_t * scale_t
    if _one_width(q_s, q_t):
        a, b = torch.cat([a_s - a_t, a_t], -1), torch.cat([k_s, k_s - k_t], -1)
    else:
        a, b = torch.cat([a_s, -a_t], -1), torch.cat([k_s, k_t], -1)
    if mask is not None:
        b.mul_(mask.to(dtype)[None, :, None])
    return a, b


def _one_width(q_s: Tensor, q_t: Tensor) -> bool:
    return q_s.shape[-1] == q_t.shape[-1]


def _gram_fwd_bwd(row_weight, q_s, k_s, q_t, k_t, mask, scale_s, scale_t):
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    width = q_s.shape[-1]
    loss = torch.zeros((), dtype=dtype, device=q_s.device)
    grad_q, grad_k = torch.empty_like(q_s), torch.empty_like(k_s)
    # One sequence at a time: the factors are the only copies of q and k, and short-lived.
    for n in range(q_s.shape[0]):
        a, b = _factors(q_s[n], k_s[n], q_t[n], k_t[n], _keys(mask, n), scale_s, scale_t, dtype)
        weighted = a * row_weight[n].to(dtype).unsqueeze(-1)
        gram_a, gram_b = weighted.transpose(1, 2) @ a, b.transpose(1, 2) @ b
        loss += torch.dot(gram_a.flatten(), gram_b.flatten())
        grad_q[n] = (weighted @ gram_b[..., :width]).mul_(2 * scale_s)
        columns = gram_a[..., :width]
        if _one_width(q_s, q_t):
            # k_s stands in both halves of B, so both halves' gradients reach it.
            columns = columns + gram_a[..., width:]
        grad_k[n] = (b @ columns).mul_(2)
    return loss, grad_q, grad_k


def _difference(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window, tile, work):
    """S_s - S_t of a tile (G, rows, keys), 0 at pairs that take no part, and the student's rows and keys."""
    q, k = rows_of(q_s, tile, work.dtype), keys_of(k_s, tile, work.dtype)
    s = score_tile(q, k, scale_s, work, "s")
    t = score_tile(
        rows_of(q_t, tile, work.dtype), keys_of(k_t, tile, work.dtype), scale_t, work, "t"
    )
    difference = s.sub_(t)
    hidden = left_out(mask, tile, window, q_s)
    if hidden is not None:
        difference.masked_fill_(hidden, 0.0)
    return difference, q, k


def _tile_rows(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window=None):
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    work = Workspace(dtype, q_s.device)
    out = torch.zeros(q_s.shape[:-1], dtype=dtype, device=q_s.device)
    for tile in tiles(q_s, mask, window=window):
        difference, *_ = _difference(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window, tile, work)
        at_tile = tile.rows_in(out)
        at_tile.copy_(difference.square_().sum(-1).view_as(at_tile))
    return out


def _tile_fwd_bwd(row_weight, q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window=None):
    dtype = compute_dtype(q_s, k_s, q_t, k_t)
    work = Workspace(dtype, q_s.device)
    loss = torch.zeros((), dtype=dtype, device=q_s.device)
    grad_q, grad_k = torch.zeros_like(q_s), torch.zeros_like(k_s, dtype=dtype)
    for tile in tiles(q_s, mask, row_weight, window):
        difference, q, k = _difference(
            q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window, tile, work
        )
        weight = rows_of(row_weight, tile, dtype)
        squares = torch.mul(difference, difference, out=work.get("t", *difference.shape)).sum(-1)
        loss += torch.dot(squares.flatten(), weight.flatten())
        weight = weight.unsqueeze(-1) * (2 * scale_s)
        at_rows, at_keys = tile.rows_in(grad_q), tile.keys_in(grad_k)
        at_rows.copy_(torch.bmm(difference, k).mul_(weight).view_as(at_rows))
        at_keys.add_(torch.bmm(difference.transpose(1, 2), q * weight).view_as(at_keys))
    return loss, grad_q, grad_k.to(k_s.dtype)


def window_attention_mse_rows(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> Tensor:
    """``attention_mse_rows`` over the keys that are at most ``window`` tokens away, O(L window)."""
    return _tile_rows(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window)


def window_attention_mse_fwd_bwd(
    row_weight: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_mse_fwd_bwd`` over the keys that are at most ``window`` tokens away."""
    return _tile_fwd_bwd(row_weight, q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window)
