"""Launcher of linear_kl: chunks of rows of both decoders' logits, the row kernel in place, four GEMMs a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bertkd.ops.rows import counted_rows
from bertkd.ops.tensors import bias_gradient, laid_out_like, unit_stride
from bertkd.ops.triton.sizes import cdiv
from bertkd.ops.triton.softmax_kl import row_kl
from bertkd.ops.triton.states import add_product, aligned_size, operand_dtype, product

# Logits of one side in a chunk: 64 MiB of fp32. The rows depend on V alone: taking what memory happens to be free would
# change the order of the sums, and with it the last bits, from run to run.
CHUNK = 1 << 24
# GEMMs with fewer rows no longer fill a GPU, and every chunk passes over the (V, d) gradient of the weight once.
MIN_ROWS = 256
# From this many logits a side on, leaving out rows of weight 0 saves more than waiting for their number costs.
COMPACT = 1 << 26
# Bound of fp16 gradients of logits: as they are, small as probabilities, they would underflow.
HALF_PEAK = 2.0**14


def chunk_rows(classes: int) -> int:
    """Rows in a chunk of logits of so many classes."""
    return max(MIN_ROWS, CHUNK // classes // 128 * 128)


def leaves_rows_out(n_rows: int, classes: int) -> bool:
    """Whether rows of weight 0 are so much work that a GPU is waited for to count them."""
    return n_rows * classes >= COMPACT


def size_of_form(tensors: Sequence[Tensor]) -> int | None:
    """A small number of rows, of which half may be of weight 0, with chunks like the tensors'; None: any below that."""
    n_rows, classes = tensors[0].shape[0], tensors[1].shape[0]
    several = chunk_rows(classes) + 3
    if leaves_rows_out(n_rows, classes):
        return max(cdiv(COMPACT, classes), 2 * several)
    return several if n_rows > chunk_rows(classes) else None


class _Side(NamedTuple):
    """One decoder: states (N, d) and weight (V, d) as operands, and the bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Side:
    dtype = operand_dtype(hidden, weight)
    return _Side(hidden.to(dtype), weight.to(dtype), None if bias is None else unit_stride(bias))


class _Logits:
    """fp32 logits of both sides without the biases, a chunk of rows at a time in memory that all chunks share.

    Rounded logits would cost digits of the difference of probabilities. The last few of a number of classes that is no
    multiple of 8 are projected once for all rows: as products of their own in every chunk they would take a tenth of
    the device's time, and a third of the launches.
    """

    def __init__(self, student: _Side, teacher: _Side) -> None:
        self.sides = (student, teacher)
        n_rows, device = student.hidden.shape[0], student.hidden.device
        self.classes = student.weight.shape[0]
        self.whole = aligned_size(self.classes)
        self.step = chunk_rows(self.classes)
        self.n_rows = n_rows
        # Rows that start at multiples of 16 bytes, as wide loads and matrix units want them.
        size = 2, min(self.step, n_rows), 8 * cdiv(self.classes, 8)
        self.memory = torch.empty(size, dtype=torch.float32, device=device)
        self.weights = [side.weight[: self.whole].T for side in self.sides]
        self.rest: Tensor | None = None
        if self.whole < self.classes:
            size = 2, n_rows, self.classes - self.whole
            self.rest = torch.empty(size, dtype=torch.float32, device=device)
            for side, out in zip(self.sides, self.rest, strict=True):
                product(side.hidden, side.weight[self.whole :].T, out=out)

    def chunks(self) -> Iterator[slice]:
        """The rows of every chunk."""
        for start in range(0, self.n_rows, self.step):
            yield slice(start, min(start + self.step, self.n_rows))

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(n, V) of student and teacher; overwritten by the next call."""
        both = self.memory[:, : rows.stop - rows.start]
        for z, side, weight in zip(both, self.sides, self.weights, strict=True):
            product(side.hidden[rows], weight, out=z[:, : self.whole])
        if self.rest is not None:
            both[..., self.whole : self.classes] = self.rest[:, rows]
        z_s, z_t = both[..., : self.classes]
        return z_s, z_t


def linear_kl_rows(
    h_s: Tensor,
    w_s: Tensor,
    bias_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    bias_t: Tensor | None,
    temperature: float,
    decoder_grad: bool,
) -> Tensor:
    """``softmax_kl_rows`` of the decoders' logits: (N, d_s), (V, d_s), (N, d_t), (V, d_t) -> (N,)."""
    student, teacher = _side(h_s, w_s, bias_s), _side(h_t, w_t, bias_t)
    out = torch.empty((h_s.shape[0],), dtype=torch.float32, device=h_s.device)
    logits = _Logits(student, teacher)
    for rows in logits.chunks():
        row_kl(
            *logits.of(rows), temperature, bias_s=student.bias, bias_t=teacher.bias, out=out[rows]
        )
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
    decoder_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum(row_weight * KL)`` and its gradients with respect to the student's states, weight and bias; without
    ``decoder_grad`` the last two are empty."""
    kept = _kept(row_weight, w_s.shape[0])
    used = slice(None) if kept is None else kept
    student, teacher = _side(h_s[used], w_s, bias_s), _side(h_t[used], w_t, bias_t)
    weight = row_weight[used]
    factor: Tensor | None = None
    if student.weight.dtype == torch.float16:
        peak = weight.abs().amax() if weight.numel() else weight.sum()
        factor = HALF_PEAK * temperature / peak.clamp_min(1e-30)
        weight = weight * factor
    results = _gradients(student, teacher, weight, temperature, decoder_grad)
    loss, grad_h, grad_w, grad_b = results if factor is None else (x / factor for x in results)
    if kept is None:
        whole_h = laid_out_like(h_s, grad_h)
    else:
        whole_h = torch.zeros_like(h_s).index_copy_(0, kept, grad_h.to(h_s.dtype))
    grad_w = laid_out_like(w_s, grad_w) if decoder_grad else grad_w.to(w_s.dtype)
    return loss, whole_h, grad_w, bias_gradient(grad_b, bias_s, w_s)


def _gradients(
    student: _Side, teacher: _Side, row_weight: Tensor, temperature: float, decoder_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of the student's states, weight and bias, all in fp32."""
    hidden, weight, bias = student
    logits = _Logits(student, teacher)
    n_rows, classes, whole = logits.n_rows, logits.classes, logits.whole
    losses, grad_h, grad_w = (
        torch.empty(shape, dtype=torch.float32, device=weight.device)
        for shape in ((n_rows,), hidden.shape, weight.shape if decoder_grad else (0,))
    )
    biased = decoder_grad and bias is not None
    grad_b = torch.zeros((classes if biased else 0,), dtype=torch.float32, device=weight.device)
    if n_rows == 0:
        return losses.sum(), grad_h, grad_w.zero_(), grad_b
    # In place of the logits, unless the products that follow want another dtype.
    in_place = weight.dtype == torch.float32
    rounded = (
        logits.memory[0] if in_place else torch.empty_like(logits.memory[0], dtype=weight.dtype)
    )
    rest = torch.empty((n_rows, classes - whole), dtype=weight.dtype, device=weight.device)
    weight_h, grad_w_whole = weight[:whole], grad_w[:whole]
    for rows in logits.chunks():
        difference = rounded[: rows.stop - rows.start, :classes]
        row_kl(
            *logits.of(rows),
            temperature,
            row_weight=row_weight[rows],
            grad=difference,
            bias_s=bias,
            bias_t=teacher.bias,
            out=losses[rows],
        )
        used = difference[:, :whole]
        product(used, weight_h, out=grad_h[rows])
        if whole < classes:
            rest[rows] = difference[:, whole:]
        if decoder_grad:
            if rows.start == 0:
                product(used.T, hidden[rows], out=grad_w_whole)
            else:
                add_product(grad_w_whole, used.T, hidden[rows])
        if biased:
            grad_b += difference.sum(0, dtype=torch.float32)
    if whole < classes:
        add_product(grad_h, rest, weight[whole:])
        if decoder_grad:
            product(rest.T, hidden, out=grad_w[whole:])
    return losses.sum(), grad_h, grad_w, grad_b


def _kept(row_weight: Tensor, vocabulary: int) -> Tensor | None:
    """Rows worth projecting, or None for all of them.

    Their number must be known on the host, because the GEMMs are the vendor's: the host waits for the device once, and
    only where the projections saved (85 % in masked language modelling) outweigh that. Rows of weight 0 that are
    projected all the same still cost the row kernel nothing.
    """
    if row_weight.is_cuda and not leaves_rows_out(row_weight.shape[0], vocabulary):
        return None
    return counted_rows(row_weight)
