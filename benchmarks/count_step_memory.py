"""Peak memory of the benchmark's training steps on a GPU, counted without one.

    python benchmarks/count_step_memory.py [--pair bert_base_to_6] [--batch 32] [--length 512]

A step runs on tensors that have shapes and no data, and every storage is counted while it lives. They say that they are
on a CPU; what a GPU does otherwise and what costs memory is put in its place: autocast takes layer norms and softmaxes
in float32, and scaled dot product attention has kernels without a map. What a kernel holds inside itself (statistics
of rows, a workspace) is not seen. Steps measured on a GPU agree with the count within 0.13 % (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bertkd
from bertkd.bench import step_cases
from bertkd.bench.step_models import PAIRS, new_teacher
from bertkd.study.table import Table

CPU = torch.device("cpu")
# Compiled code would be compiled for this CPU.
_COUNTABLE = [name for name, pair in PAIRS.items() if not pair.compiled]
BLOCK = 512  # the smallest unit of PyTorch's allocator on GPUs, in bytes


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most that there were.

    ``answer`` is what code gets that asks for a value where there are no data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.answer = False
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _in_float32(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``op`` as CUDA's autocast runs it; a CPU's autocast leaves these in half precision."""

    def run(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return op(x, *args, **options)
        args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        with torch.autocast("cpu", enabled=False):
            return op(x.float(), *args, **options)

    return run


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot product attention by the kernels that PyTorch takes on a GPU, with a mask and without."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    # The kernel adds its mask, and keeps what it adds for the backward.
    mask = (
        torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
    )
    mask = mask.expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with (
        mock.patch.object(F, "layer_norm", _in_float32(F.layer_norm)),
        mock.patch.object(F, "softmax", _in_float32(F.softmax)),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        # Where transformers sees that it is traced, it keeps masks that mask nothing.
        mock.patch("transformers.masking_utils.is_tracing", return_value=False),
    ):
        yield


def _networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Teacher in bfloat16 and student, made within the mode: without data, modules cannot be moved or cast."""
    student = bertkd.create_student(new_teacher(name, CPU), PAIRS[name].layers, verbose=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        teacher: Any = new_teacher(name, CPU)
    finally:
        torch.set_default_dtype(default)
    teacher.to = lambda *_, **__: teacher
    return teacher.eval(), student.train()


def peak_bytes(pair: str, batch: int, length: int, *, eager: bool) -> int:
    """Most bytes that a step in bfloat16 holds beyond weights and optimiser state.

    Args:
        pair: one of the benchmark's pairs of networks.
        batch, length: sequences and their tokens; there are no pads.
        eager: the step as one writes it without bertkd, else a Distiller's.

    Raises:
        ValueError: a size below 1, or a sequence longer than the networks take.
    """
    if min(batch, length) < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    case = step_cases.step_case(pair, batch, length, dtype="bfloat16")
    # All implementations of an op return tensors of the same shapes, and chunked is there on every machine.
    impl = "eager" if eager else "chunked"
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_a_gpu(), Held() as held:
        models = _networks(pair)
        longest = models[0].config.max_position_embeddings
        if length > longest:
            raise ValueError(f"length must be at most {longest} for {pair}, got {length}")
        with mock.patch.object(step_cases, "networks", return_value=models):
            trainer = step_cases.Trainer(case, impl, CPU)
        # A step asks for one: whether all tokens are real.
        held.answer = True
        # The first step makes the optimiser's state.
        trainer()
        held.peak = before = held.now
        trainer()
    return held.peak - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=_COUNTABLE, default="bert_base_to_6")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    sizes = options.pair, options.batch, options.length
    try:
        eager, ours = (peak_bytes(*sizes, eager=eager) for eager in (True, False))
    except ValueError as error:
        parser.error(str(error))
    table = Table(["step", "MiB", "of eager's"])
    table.add("eager", f"{eager / 2**20:.1f}", "")
    table.add("bertkd", f"{ours / 2**20:.1f}", f"{ours / eager:.1%}")
    print(f"{options.pair}, B {options.batch}, L {options.length}, bfloat16\n\n{table.text()}")


if __name__ == "__main__":
    main()
