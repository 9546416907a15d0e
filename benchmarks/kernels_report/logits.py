"""Cases of the row KL: few classes in registers, a vocabulary in a loop, and the chunks of linear_kl."""

from __future__ import annotations

import math

import torch
from harness import Case

from bertkd.kernels.softmax_kl import softmax_kl_block_kernel, softmax_kl_loop_kernel
from bertkd.ops.triton.softmax_kl import BLOCK_CLASSES, block_config, loop_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A label set, widths around the limit of the first form, and the vocabularies of BERT, RoBERTa and ModernBERT.
CLASSES = (3, 1000, BLOCK_CLASSES, 30522, 50265, 50368)


def cases() -> list[Case]:
    made = []
    for arch in (80, 90):
        for dtype in ("bf16", "fp16", "fp32"):
            made += [_case(arch, "gradient", classes, dtype) for classes in CLASSES]
            made += [_case(arch, "value", classes, dtype) for classes in (1000, 30522)]
        made += [_case(arch, "gradient", 30522, "bf16", teacher="fp32")]
        # linear_kl: fp32 logits and a bias; the gradient in place, or rounded once for bf16 products.
        made += [_case(arch, "chunk", classes, "fp32", bias="fp32") for classes in (1000, 30522)]
        made += [_case(arch, "chunk", 30522, "fp32", bias="bf16", grad="bf16")]
    for arch in (86, 89, 100, 120):
        made += [_case(arch, "gradient", classes, "bf16") for classes in (1000, 30522)]
    return made


def _case(arch, form, classes, student, *, teacher=None, bias=None, grad=None) -> Case:
    teacher, grad = teacher or student, grad or student
    whole = classes <= BLOCK_CLASSES
    align = 8 if form == "chunk" and not whole else math.gcd(8, classes)
    looped = loop_config(align, DTYPES[student], DTYPES[teacher])
    constants = block_config(classes, align) if whole else looped
    launch = {k: constants.pop(k) for k in ("num_warps", "num_stages")}
    signature = {
        "z_s": f"*{student}",
        "z_t": f"*{teacher}",
        "bias_s": f"*{bias}",
        "bias_t": f"*{bias}",
        "grad": f"*{grad}",
        "row_weight": "*fp32",
        "out": "*fp32",
        "n_rows": "i32",
        "classes": "i32",
        "row_s": "i32",
        "row_t": "i32",
        "row_g": "i32",
        "stride_w": "i32",
        "inverse_t": "fp32",
    }
    absent = ("bias_s", "bias_t") if bias is None else ()
    absent += ("grad", "row_weight") if form == "value" else ()
    for name in absent:
        del signature[name]
        constants[name] = None
    strides = ("classes", "row_s", "row_t", "row_g") if classes % 16 == 0 else ()
    if form != "value":
        del signature["stride_w"]
        constants["stride_w"] = 1
    return Case(
        op="softmax_kl" if form != "chunk" else "linear_kl",
        form=f"{form} {'block' if whole else 'loop'}",
        dtype=student if {student} == {teacher, grad} else f"{student}/{teacher}/{grad}",
        width=classes,
        arch=arch,
        kernel=softmax_kl_block_kernel if whole else softmax_kl_loop_kernel,
        signature=signature,
        constants=constants,
        divisible=strides,
        # To hide the reads, an SM should hold two programs of whole rows, three of the other form.
        max_registers=128 if whole else 80,
        tensor_cores=False,
        # Loop 0 writes the zeros of a row of weight 0; the first sweep follows it.
        loop=0 if form == "value" else 1,
        pairs=None if whole else constants["WRAPS"] * constants["LANES"] * constants["VEC"],
        max_per_pair=None if whole else 27,
        quick=(classes == 30522 and student == teacher == "bf16")
        or (arch == 90 and (form == "chunk" or (classes, student) == (1000, "fp32"))),
        **launch,
    )
