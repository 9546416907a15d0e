"""attention_kl forward and backward, eager against chunked, on this machine's CPU (or GPU, with --device cuda).

    python benchmarks/relation_kl.py [--device cpu] [--dtype float32] [--rounds 15]

The case is verified against float64 before it is timed. Rows go to standard output; the last column is the median of
the rounds' ratios.
"""

from __future__ import annotations

import argparse

import torch
from timing import interleaved, quantiles, ratio

from bertkd import functional

SHAPES = [(8, 12, 128, 64), (4, 12, 512, 64), (4, 12, 512, 32)]


def make(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Student's and teacher's queries and keys as they come out of a model: transposed views."""
    batch, heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, length, heads, width, generator=generator) for _ in range(4)]
    return [x.to(device, dtype).transpose(1, 2) for x in tensors]


def step(tensors: list[torch.Tensor], impl: str) -> list[torch.Tensor]:
    """Loss and both gradients."""
    student = [x.detach().requires_grad_() for x in tensors[:2]]
    loss = functional.attention_kl(*student, *tensors[2:], impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def verify(tensors: list[torch.Tensor]) -> None:
    """Refuse to time a wrong result: the first sequence against float64."""
    small = [x[:1, :2] for x in tensors]
    exact = step([x.double() for x in small], "eager")
    for got, want in zip(step(small, "chunked"), exact, strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        limit = 1e-5 if got.dtype == torch.float32 else 1e-2
        if not error < limit:
            raise SystemExit(f"chunked is wrong: relative error {error:.1e}; no figure is printed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, {args.dtype}"
    )
    print("(B, H, L, D)          eager ms  chunked ms  eager/chunked")
    for shape in SHAPES:
        tensors = make(shape, args.device, getattr(torch, args.dtype))
        verify(tensors)
        runs = {impl: lambda impl=impl, t=tensors: step(t, impl) for impl in ("eager", "chunked")}
        seconds = interleaved(runs, rounds=args.rounds)
        eager, chunked = (quantiles(seconds[impl])[1] for impl in ("eager", "chunked"))
        print(
            f"{shape!s:20s} {eager:9.1f} {chunked:11.1f} {ratio(seconds, 'eager', 'chunked'):14.2f}"
        )


if __name__ == "__main__":
    main()
