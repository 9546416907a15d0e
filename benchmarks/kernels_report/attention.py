"""Cases of the attention kernels: every form, dtype and head width with the configuration that is shipped for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from harness import Case

from bertkd.kernels import attention_mse as mse
from bertkd.kernels import relation_kl as general
from bertkd.kernels.primitives import sequence_extents
from bertkd.kernels.relation_kl_short import relation_kl_short_kernel
from bertkd.kernels.self_relation_kl import self_relation_kl_short_kernel
from bertkd.ops.triton.attention import padded
from bertkd.ops.triton.config import WIDTHS, Config, shipped

BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
ARCHES = (80, 90)
# The same configurations are shipped for these; a few cases show that they fit.
OTHER_ARCHES = (86, 89, 100, 120)
# The one case of most forms that the tests compile too.
QUICK = ("bf16", 64, 90)

# Instructions for each pair of row and key of the inner loop, by form, bits, table and head width. sm_80 carries the
# operands of its matrix instructions through registers; at width 128 both carry twice the accumulators; a product of
# fp32 operands is three of parts of them.
BUDGETS = {
    ("rows", 16, 90): (15, 15, 16, 19),
    ("grad_rows", 16, 90): (18, 19, 21, 41),
    ("grad_keys", 16, 90): (16, 17, 18, 32),
    ("pairs", 16, 90): (19, 20, 27, 33),
    ("pairs_keys", 16, 90): (14, 16, 22, 29),
    ("rows", 16, 80): (14, 16, 21, 27),
    ("grad_rows", 16, 80): (18, 20, 32, 82),
    ("grad_keys", 16, 80): (16, 18, 36, 36),
    ("pairs", 16, 80): (19, 23, 30, 42),
    ("pairs_keys", 16, 80): (11, 15, 22, 38),
    ("rows", 32, 90): (28, 38, 144, 222),
    ("grad_rows", 32, 90): (58, 73, 100, 614),
    ("grad_keys", 32, 90): (103, 158, 106, 371),
    ("pairs", 32, 90): (46, 53, 169, 334),
    ("pairs_keys", 32, 90): (41, 48, 108, 293),
    ("rows", 32, 80): (37, 56, 175, 215),
    ("grad_rows", 32, 80): (72, 109, 166, 354),
    ("grad_keys", 32, 80): (99, 146, 185, 361),
    ("pairs", 32, 80): (58, 86, 169, 314),
    ("pairs_keys", 32, 80): (53, 81, 107, 285),
}

# How many times as many where a window asks of every pair whether it lies inside, and the bytes of the few registers
# that some fp32 forms then spill, once a program and outside the loops.
WINDOW_FACTOR, WINDOW_SPILLS = 1.45, 40

# Forms whose tiles an H200 measured to be the fastest although they spill a few registers (bytes, by bits).
MEASURED_SPILLS = {
    ("short", 16): 288, ("self_short", 16): 128, ("grad_rows", 16): 128, ("grad_keys", 16): 128,
    ("self_keys", 16): 128, ("grad_keys", 32): 512, ("self_keys", 32): 512,
}  # fmt: skip

# Arguments by name: what they are when they are no 32-bit integers that are multiples of 16.
STUDENT = ("a_s", "b_s", "x_s", "y_s", "q_s", "k_s", "grad_a", "grad_x", "grad")
TEACHER = ("a_t", "b_t", "x_t", "y_t", "q_t", "k_t")
POINTERS = {
    "mask": "*u8", "extents": "*i32", "peak": "*fp32", "weight": "*fp32", "rows": "*fp32", "stats": "*fp32",
    "sums": "*fp32", "grams": "*fp32", "other": "*fp32", "own": "*fp32",
}  # fmt: skip
NUMBERS = ("scale_s", "scale_t", "grad_scale", "scale_a", "scale_b", "ratio")
# Strides and sizes that need not be multiples of anything.
RAGGED = ("L", "heads", "splits", "weight_heads", "total", "mask_b", "weight_b", "own_b", "other_b")


def cases() -> list[Case]:
    made = []
    for arch in ARCHES:
        for dtype in BITS:
            for width in WIDTHS:
                made += _relation(arch, dtype, width)
                made += _mse(arch, dtype, width)
        # Sides of different dtypes and widths, one of them no power of two.
        made += _relation(arch, "bf16", 64, teacher="fp32", teacher_width=40, mixed=True)
        made.append(_extents(arch))
    masked = (case for case in made if case.form != "gram_rows")
    made += [_unmasked(case) for case in masked if (case.dtype, case.width) == QUICK[:2]]
    for arch in OTHER_ARCHES:
        made += _relation(arch, "bf16", 64)
    return made


def _relation(arch, dtype, width, teacher=None, teacher_width=None, mixed=False) -> Iterator[Case]:
    """All forms of relation_kl and self_relation_kl."""
    teacher, teacher_width = teacher or dtype, teacher_width or width
    bits = max(BITS[dtype], BITS[teacher])
    sides = {
        "D_S": width, "D_T": teacher_width, "PAD_S": padded(width), "PAD_T": padded(teacher_width),
        "FP32_S": dtype == "fp32", "FP32_T": teacher == "fp32", "UPCAST": False, "HAS_MASK": True, "mask_l": 1,
    }  # fmt: skip
    weights = {"weight_h": 0, "weight_l": 1}
    none = dict.fromkeys(("weight_b", "weight_h", "weight_l", "ga_b", "ga_h", "ga_l"), 0)
    rows = general.relation_kl_rows_kernel
    forms = {
        "rows": (rows, {"GRAD": False, "WEIGHTED": False, **none}),
        "grad_rows": (rows, {"GRAD": True, "WEIGHTED": True, **weights}),
        "grad_keys": (general.relation_kl_keys_kernel, {"ADD": False}),
        "self_keys": (general.relation_kl_keys_kernel, {"ADD": True}),
    }
    for form, (kernel, extra) in forms.items():
        table = form.replace("self", "grad")
        config = shipped(table, bits, width, arch)
        tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        case = _case(
            "self_relation_kl" if form == "self_keys" else "relation_kl", form, dtype, teacher, width, arch,
            kernel, {**sides, **tile, **extra, "window": None}, config,
            pairs=config.block_m * config.block_n,
            max_per_pair=_per_pair(table, bits, width, arch),
            quick=not mixed and dtype == "bf16" and width == 64,
            max_spills=_spills(form, bits, arch),
        )  # fmt: skip
        yield case
        if form != "self_keys":
            yield _windowed(case)
    for form, kernel in (
        ("short", relation_kl_short_kernel),
        ("self_short", self_relation_kl_short_kernel),
    ):
        for name in (f"{form}_16", f"{form}_32", f"{form}_64", form):
            config = shipped(name, bits, width, arch)
            if config is not None:
                op = "self_relation_kl" if form == "self_short" else "relation_kl"
                constants = {
                    **sides,
                    **weights,
                    "BLOCK_L": config.block_n,
                    "STREAM": config.num_stages > 1,
                }
                yield _case(
                    op, name, dtype, teacher, width, arch, kernel, constants, config,
                    quick=not mixed and (dtype, width, arch) == QUICK,
                    max_spills=_spills(name, bits, arch),
                )  # fmt: skip


def _per_pair(form: str, bits: int, width: int, arch: int) -> int:
    return BUDGETS[form, bits, 90 if arch in (90, 100) else 80][WIDTHS.index(width)]


def _spills(form: str, bits: int, arch: int) -> int:
    return MEASURED_SPILLS.get((form, bits), 0) if arch >= 90 else 0


def _mse(arch: int, dtype: str, width: int) -> Iterator[Case]:
    """All forms of attention_mse."""
    pad, bits = padded(width), BITS[dtype]
    sides = {"D_S": width, "D_T": width}
    config = shipped("pairs", bits, width, arch)
    for form in ("pairs", "pairs_keys", "pairs value"):
        keys, gradient = form == "pairs_keys", form != "pairs value"
        constants = {
            **sides, "PAD_S": pad, "PAD_T": pad, "FP32_S": bits == 32, "FP32_T": bits == 32, "UPCAST": False,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "OWN": gradient, "OTHER": True,
            "KEYS": keys, "SUM": gradient, "GRAD": gradient, "own_h": 0, "own_l": 1, "other_h": 0, "other_l": 1,
            "window": None,
        }  # fmt: skip
        flags = {"own": "*u8"} if keys else {"other": "*u8"}
        case = _case(
            "attention_mse", form, dtype, dtype, width, arch, mse.attention_mse_pairs_kernel, constants, config,
            other_types=flags, pairs=config.block_m * config.block_n,
            max_per_pair=_per_pair(form.removesuffix(" value"), bits, width, arch), quick=(dtype, width, arch) == QUICK,
        )  # fmt: skip
        yield case
        yield _windowed(case)
    gram, grad = mse.attention_mse_gram_kernel, mse.attention_mse_gram_grad_kernel
    weights = {"HAS_MASK": True, "mask_l": 1, "weight_h": 0, "weight_l": 1}
    forms = {
        "gram": (gram, {**weights, "SIDES": 2}),
        "gram value": (gram, {**weights, "SIDES": 1}),
        "gram_rows": (mse.attention_mse_gram_rows_kernel, {}),
        "gram_grad": (grad, {**weights, "KEYS": False}),
        "gram_grad_keys": (grad, {**weights, "KEYS": True}),
    }
    for form, (kernel, extra) in forms.items():
        config = shipped(form.removesuffix("_keys").removesuffix(" value"), bits, width, arch)
        if config is not None:
            constants = {**sides, "BLOCK": config.block_m, "PAD": pad, "EQUAL": True, **extra}
            yield _case(
                "attention_mse", form, dtype, dtype, width, arch, kernel, constants, config,
                quick=(dtype, width, arch) == QUICK,
            )  # fmt: skip


def _windowed(case: Case) -> Case:
    """The case as it runs where rows compare the keys of a window."""
    return replace(
        case,
        op=f"window_{case.op}",
        signature={**case.signature, "window": "i32"},
        constants={name: value for name, value in case.constants.items() if name != "window"},
        max_per_pair=case.max_per_pair * WINDOW_FACTOR,
        max_spills=max(case.max_spills, WINDOW_SPILLS if case.dtype == "fp32" else 0),
        quick=case.quick and case.arch == QUICK[-1],
    )


def _unmasked(case: Case) -> Case:
    """The case as it runs without a mask of keys; its pointer is another's, and is not read."""
    flag = "HAS_MASK"
    if flag not in case.constants:
        flag = "OWN" if case.constants["KEYS"] else "OTHER"
    name = flag.removeprefix("HAS_").lower()
    constants = {**case.constants, flag: False}
    del constants[f"{name}_l"]
    # Four registers, spilled once a program; tiles that need none read the Gram matrices twice as often.
    few = 16 if (case.form, case.arch) == ("gram_grad_keys", 80) else 0
    return replace(
        case,
        form=f"{case.form} no mask",
        constants=constants,
        signature={**case.signature, name: "*i32", f"{name}_l": "i32"},
        divisible=(*case.divisible, f"{name}_b", f"{name}_l"),
        max_spills=max(case.max_spills, few),
        quick=False,
    )


def _extents(arch: int) -> Case:
    constants = {"HAS_MASK": True, "HAS_WEIGHT": True, "BLOCK": 1024, "mask_l": 1, "weight_l": 1}
    config = Config(0, 0, 4, 1)
    return _case(
        "attention", "extents", "fp32", "fp32", 0, arch, sequence_extents, constants, config,
        tensor_cores=False, quick=arch == QUICK[-1],
    )  # fmt: skip


def _case(
    op, form, dtype, teacher, width, arch, kernel, constants, config, other_types=None, **budget
) -> Case:
    """A case whose argument types follow from their names."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in STUDENT or (
            name == "grad_b" and kernel is not mse.attention_mse_gram_grad_kernel
        ):
            signature[name] = f"*{dtype}"
        elif name in TEACHER:
            signature[name] = f"*{teacher}"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
    if kernel is mse.attention_mse_pairs_kernel:
        signature["grad_b"] = "i32"
    signature.update(other_types or {})
    divisible = (n for n, t in signature.items() if t == "i32" and n not in RAGGED)
    budget.setdefault("tensor_cores", True)
    return Case(
        op=op,
        form=form,
        dtype=dtype if dtype == teacher else f"{dtype}/{teacher}",
        width=width,
        arch=arch,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=tuple(divisible),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **budget,
    )
