"""Launcher of linear_kl: chunks of rows of both decoders' logits, the row kernel in place, four GEMMs a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.ops.tensors import laid_out_like, unit_stride
from bertkd.ops.triton.softmax_kl import row_kl
from bertkd.ops.triton.states import add_product, aligned_parts, operand_dtype, product

# Logits of one side in a chunk: 64 MiB of fp32. The rows depend on V alone: taking what memory happens to be free would
# change the order of the sums, and with it the last bits, from run to run.
CHUNK = 1 << 24
# GEMMs with fewer rows no longer fill a GPU, and every chunk passes over the (V, d) gradient of the weight once.
MIN_ROWS = 256
# From this many logits a side on, leaving out rows of weight 0 saves more than waiting for their number costs.
COMPACT = 1 << 26
# Bound of fp16 gradients of logits: as they are, small as probabilities, they would underflow.
HALF_PEAK = 2.0**14


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why ``op`` cannot run on ``tensors``: every width, vocabulary and mix of dtypes is supported."""
    return None


class _Side(NamedTuple):
    """One decoder: states (N, d) and weight (V, d) as operands, and the bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Side:
    dtype = operand_dtype(hidden, weight)
    return _Side(hidden.to(dtype), weight.to(dtype), None if bias is None else unit_stride(bias))


def _chunks(n_rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(MIN_ROWS, CHUNK // vocabulary // 128 * 128)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


class _Logits:
    """fp32 logits of a chunk of rows of both sides, without the biases, in memory that all chunks share.

    Rounded logits would cost digits of the difference of probabilities.
    """

    def __init__(self, student: _Side, teacher: _Side) -> None:
        self.sides = (student, teacher)
        self.parts = aligned_parts(student.weight.shape[0])
        self.buffers: list[Tensor] = []

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(n, V) of student and teacher; overwritten by the next call."""
        n_rows = rows.stop - rows.start
        if not self.buffers:
            self.buffers = [aligned(n_rows, side.weight, torch.float32) for side in self.sides]
        z_s, z_t = (buffer[:n_rows] for buffer in self.buffers)
        for side, z in zip(self.sides, (z_s, z_t), strict=True):
            for part in self.parts:
                product(side.hidden[rows], side.weight[part].T, out=z[:, part])
        return z_s, z_t


def aligned(n_rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for (n, V) whose rows start at multiples of 16 bytes, as wide loads and matrix units want it."""
    vocabulary = weight.shape[0]
    stride = (vocabulary + 7) // 8 * 8
    return torch.empty((n_rows, stride), dtype=dtype, device=weight.device)[:, :vocabulary]


def linear_kl_rows(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
) -> Tensor:
    """``softmax_kl_rows`` of the decoders' logits: (N, d_s), (V, d_s), (N, d_t), (V, d_t) -> (N,)."""
    student, teacher = _side(h_s, w_s, bias_s), _side(h_t, w_t, bias_t)
    out = torch.empty((h_s.shape[0],), dtype=torch.float32, device=h_s.device)
    logits = _Logits(student, teacher)
    for rows in _chunks(h_s.shape[0], w_s.shape[0]):
        z_s, z_t = logits.of(rows)
        out[rows] = row_kl(z_s, z_t, temperature, bias_s=student.bias, bias_t=teacher.bias)
    return out


def linear_kl_fwd_bwd(
    row_weight: Tensor,
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients with respect to the student's states, weight and bias."""
    kept = _kept(row_weight, w_s.shape[0])
    used = slice(None) if kept is None else kept
    student, teacher = _side(h_s[used], w_s, bias_s), _side(h_t[used], w_t, bias_t)
    weight = row_weight[used]
    factor: Tensor | None = None
    if student.weight.dtype == torch.float16:
        peak = weight.abs().amax() if weight.numel() else weight.sum()
        factor = HALF_PEAK * temperature / peak.clamp_min(1e-30)
        weight = weight * factor
    sums = _Sums(student, teacher)
    for rows in _chunks(student.hidden.shape[0], w_s.shape[0]):
        sums.add(rows, weight, temperature)
    results = sums.finish()
    loss, grad_h, grad_w, grad_b = results if factor is None else (x / factor for x in results)
    if kept is None:
        whole_h = laid_out_like(h_s, grad_h)
    else:
        whole_h = torch.zeros_like(h_s).index_copy_(0, kept, grad_h.to(h_s.dtype))
    bias_dtype = w_s.dtype if bias_s is None else bias_s.dtype
    return loss, whole_h, laid_out_like(w_s, grad_w), grad_b.to(bias_dtype)


class _Sums:
    """fp32 sums over chunks: the loss, and the gradients of the student's states, weight and bias."""

    def __init__(self, student: _Side, teacher: _Side) -> None:
        hidden, weight, bias = student
        self.student, self.teacher = student, teacher
        self.logits: _Logits | None = _Logits(student, teacher)
        self.loss = torch.zeros((), dtype=torch.float32, device=weight.device)
        self.grad_h = torch.empty(hidden.shape, dtype=torch.float32, device=weight.device)
        self.grad_w = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        size = 0 if bias is None else weight.shape[0]
        self.grad_b = torch.zeros((size,), dtype=torch.float32, device=weight.device)
        self.rounded: Tensor | None = None

    def add(self, rows: slice, row_weight: Tensor, temperature: float) -> None:
        """Project a chunk of rows, and add what it contributes."""
        assert self.logits is not None
        hidden, weight, bias = self.student
        z_s, z_t = self.logits.of(rows)
        # In place, unless the products that follow want another dtype.
        difference = z_s
        if weight.dtype != torch.float32:
            if self.rounded is None:
                self.rounded = aligned(z_s.shape[0], weight, weight.dtype)
            difference = self.rounded[: z_s.shape[0]]
        self.loss += row_kl(
            z_s,
            z_t,
            temperature,
            row_weight=row_weight[rows],
            grad=difference,
            bias_s=bias,
            bias_t=self.teacher.bias,
        ).sum()
        first, *rest = self.logits.parts
        product(difference[:, first], weight[first], out=self.grad_h[rows])
        for part in rest:
            add_product(self.grad_h[rows], difference[:, part], weight[part])
        for part in self.logits.parts:
            add_product(self.grad_w[part], difference[:, part].T, hidden[rows])
        if bias is not None:
            self.grad_b += difference.sum(0, dtype=torch.float32)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums; the logits' memory is free again, for the gradients in the weight's own dtype."""
        self.logits = self.rounded = None
        return self.loss, self.grad_h, self.grad_w, self.grad_b


def _kept(row_weight: Tensor, vocabulary: int) -> Tensor | None:
    """Rows worth projecting, or None for all of them.

    Their number must be known on the host, because the GEMMs are the vendor's: one wait for the device, never during a
    graph capture, and only where the projections saved (85 % in masked language modelling) outweigh it. Rows that
    are projected all the same still cost the row kernel nothing.
    """
    small = row_weight.shape[0] * vocabulary < COMPACT
    if row_weight.is_cuda and (small or torch.cuda.is_current_stream_capturing()):
        return None
    return row_weight.nonzero().squeeze(-1)
