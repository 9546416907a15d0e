"""What a kernel may cost, and the compilation that shows what it does cost; no GPU and no driver needed.

To add cases, put a file beside this one (any name) with a function ``cases() -> list[Case]``; the report finds it.
A case names one compilation: a kernel with its argument types, constants and launch configuration for one
architecture, and what the cubin may use. Take constants and configuration from the launcher's own functions, so that
what is proved is what is shipped::

    from harness import Case

    from bertkd.kernels.softmax_kl import softmax_kl_loop_kernel
    from bertkd.ops.triton.softmax_kl import loop_config

    def cases():
        constants = loop_config(...)
        launch = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
        return [
            Case(
                op="softmax_kl", form="loop", dtype="bf16", width=30522, arch=arch,
                kernel=softmax_kl_loop_kernel,
                # Run-time arguments by name: "*bf16", "*fp32", "*i1" (a bool tensor), "i32", "i64", "fp32"; a tuple of
                # these for a tuple argument.
                signature={"z_s": "*bf16", "z_t": "*bf16", ..., "classes": "i32"},
                # tl.constexpr arguments, and run-time ones that are specialised to a value (strides of 1, None).
                constants=constants,
                # Integers known to be multiples of 16; pointers always are aligned.
                divisible=("stride_s",),
                **launch,
                max_registers=128,          # default 255
                max_spills=32,              # default 0; bytes, where measuring showed that they do not matter
                tensor_cores=False,         # True: HMMA or HGMMA must be there; False: must not; None: either
                pairs=4096, max_per_pair=9, # elements that one turn of the loop handles; instructions for each
                quick=True,                 # also part of the short run that the tests make
            )
            for arch in (80, 90)
        ]

``loop`` says which innermost loop of the machine code ``pairs`` speaks of, counted from 0 in program order (-1 is the
last); ``--loops`` prints them all. Count pairs of a pipelined or unrolled loop as often as its body occurs. Shared
memory is held to the chip's limit, or to ``max_shared`` if that is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from cubin import Machine, read
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KIB = 1024
# Shared memory a program may have, in bytes, by compute capability.
SHARED_LIMIT = {
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
}


@dataclass(frozen=True)
class Case:
    """One compilation and its budget; the module's docstring explains the fields."""

    op: str
    form: str
    dtype: str
    width: int
    arch: int
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int = 255
    max_spills: int = 0
    max_shared: int | None = None
    tensor_cores: bool | None = None
    pairs: int | None = None
    loop: int = 0
    max_per_pair: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.form} {self.dtype} D={self.width} sm_{self.arch}"


@dataclass(frozen=True)
class Result:
    """What a compiled case uses, and which of its budgets it breaks."""

    registers: int
    spills: int
    shared: int
    matrix: int
    mufu: int
    per_pair: float | None
    loops: tuple[str, ...]
    broken: tuple[str, ...]


def compile_case(case: Case) -> Any:
    """Compile to a cubin for an architecture that need not be there."""
    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constants)) ^ set(names)
    if unknown:
        raise ValueError(f"{case.name}: {sorted(unknown)} missing from, or not among, {names}")
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    source = ASTSource(
        case.kernel,
        signature=signature,
        constexprs=dict(case.constants),
        attrs={path: [["tt.divisibility", 16]] for path in _aligned(case)},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        # The default of this option depends on Triton's version, and with it numerics and speed.
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def _aligned(case: Case) -> Iterator[tuple[int, ...]]:
    """Paths of the arguments that are multiples of 16; into a tuple argument a path has two steps."""
    for i, name in enumerate(case.kernel.arg_names):
        kinds = case.signature.get(name, "")
        for j, kind in enumerate((kinds,) if isinstance(kinds, str) else kinds):
            if kind.startswith("*") or name in case.divisible:
                yield (i,) if isinstance(kinds, str) else (i, j)


def examine(case: Case) -> Result:
    """Compile a case and compare what the cubin uses with its budget; what does not compile breaks it too."""
    try:
        compiled = compile_case(case)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Result(0, 0, 0, 0, 0, None, (), (f"does not compile: ...{reason[-200:]}",))
    machine = read(compiled.asm["cubin"])
    per_pair = None
    if case.pairs is not None and machine.loops:
        body = machine.loops[min(case.loop, len(machine.loops) - 1)]
        per_pair = len(body) * 32 * case.num_warps / case.pairs
    return Result(
        registers=machine.registers,
        spills=machine.spills,
        shared=compiled.metadata.shared,
        matrix=machine.count("HMMA", "HGMMA", "UTCHMMA"),
        mufu=machine.count("MUFU"),
        per_pair=per_pair,
        loops=tuple(_describe(body) for body in machine.loops),
        broken=tuple(_broken(case, machine, compiled.metadata.shared, per_pair)),
    )


def _broken(case: Case, machine: Machine, shared: int, per_pair: float | None):
    limit = case.max_shared if case.max_shared is not None else SHARED_LIMIT[case.arch]
    if machine.registers > case.max_registers:
        yield f"{machine.registers} registers, allowed {case.max_registers}"
    if machine.spills > case.max_spills:
        yield f"spills ({machine.spills} bytes of stack or local accesses)"
    if shared > limit:
        yield f"{shared} bytes of shared memory, allowed {limit}"
    matrix = machine.count("HMMA", "HGMMA", "UTCHMMA")
    if case.tensor_cores is not None and case.tensor_cores != bool(matrix):
        yield "no tensor-core instruction" if case.tensor_cores else "tensor-core instructions"
    if case.max_per_pair is not None:
        if per_pair is None:
            yield "no loop found to count instructions in"
        elif per_pair > case.max_per_pair:
            yield f"{per_pair:.2f} instructions a pair, allowed {case.max_per_pair}"


def _describe(body: list[str]) -> str:
    kinds = ("HMMA", "HGMMA", "MUFU", "LDG", "LDGSTS", "LDS", "STG", "BAR")
    counts = {kind: sum(op.split(".")[0] == kind for op in body) for kind in kinds}
    return f"{len(body)} instructions" + "".join(f" {k}={n}" for k, n in counts.items() if n)
