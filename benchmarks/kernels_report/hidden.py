"""Cases of the hidden-state kernels, at BERT's widths and at ones that fit no tile."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from harness import Case

from bertkd.kernels.hidden_cosine import hidden_cosine_kernel
from bertkd.kernels.hidden_mse import hidden_mse_kernel
from bertkd.kernels.hidden_proj_mse import hidden_proj_mse_kernel
from bertkd.ops.triton.hidden_mse import cosine_config, mse_config
from bertkd.ops.triton.hidden_proj_mse import proj_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHES = (80, 90)
# The same configurations are shipped for these; a few cases show that they fit.
OTHER_ARCHES = (86, 89, 100, 120)


def _split(config: dict) -> dict:
    """Fields of a case from a launcher's configuration."""
    launch = {k: config[k] for k in ("num_warps", "num_stages")}
    return {"constants": {k: v for k, v in config.items() if k not in launch}, **launch}


def cases() -> list[Case]:
    made = []
    for arch in ARCHES:
        for dtype in DTYPES:
            made += [_mse(arch, dtype, dtype, width) for width in (128, 301, 312, 768, 1024)]
            made += [_cosine(arch, dtype, dtype, width) for width in (300, 768, 1024, 4096)]
            made += [_proj(arch, dtype, d, 1024) for d in (301, 308, 312, 768)]
            # Many rows get other tiles where 16-bit rows are aligned.
            made += [_proj(arch, dtype, d, 16384) for d in (308, 312, 768) if dtype != "fp32"]
        made += [_mse(arch, "bf16", "fp32", 768), _cosine(arch, "bf16", "fp32", 768)]
        made += [_combine(arch, "bf16"), _mixed_proj(arch), _tf32_proj(arch)]
        made += [_alone(case) for case in made if case.arch == arch and case.width == 768]
    for arch in OTHER_ARCHES:
        made += [_mse(arch, "bf16", "bf16", 768), _cosine(arch, "bf16", "bf16", 768)]
        made += [_proj(arch, dtype, 768, 16384) for dtype in ("bf16", "fp32")]
        made += [_combine(arch, "bf16")]
    return made


# Argument of each kernel that is None where the value alone is wanted, and those that go with it.
WRITTEN = {
    "hidden_mse": ("grads", "row_g"),
    "hidden_cosine": ("grad", "row_g"),
    "hidden_proj_mse": ("outputs", "bias_sums", "row_g"),
    "hidden_combine_mse": ("outputs", "bias_sums", "row_g"),
}


def _alone(case: Case) -> Case:
    """The case without gradients, as it runs in evaluation; it must not take more than with them."""
    absent = WRITTEN[case.op]
    return replace(
        case,
        form=f"{case.form} value",
        signature={name: kind for name, kind in case.signature.items() if name not in absent},
        constants={**case.constants, **{name: 0 if name == "row_g" else None for name in absent}},
        divisible=tuple(name for name in case.divisible if name not in absent),
    )


def _mse(arch: int, student: str, teacher: str, width: int) -> Case:
    states = 6
    config = _split(mse_config(width))
    tile = config["constants"]["ROWS"] * config["constants"]["COLS"]
    return Case(
        op="hidden_mse",
        form=f"{states} states",
        dtype=student if student == teacher else f"{student}/{teacher}",
        width=width,
        arch=arch,
        kernel=hidden_mse_kernel,
        signature={
            "students": (f"*{student}",) * states,
            "teachers": (f"*{teacher}",) * states,
            "grads": (f"*{student}",) * states,
            "row_weight": "*fp32",
            "partials": "*fp32",
            "n_rows": "i32",
            "width": "i32",
            "row_s": "i32",
            "row_t": "i32",
            "row_g": "i32",
        },
        divisible=("width", "row_s", "row_t", "row_g") if width % 16 == 0 else (),
        max_registers=96 if width % 8 == 0 else 255,
        tensor_cores=False,
        pairs=tile,
        max_per_pair=10 if width % 8 == 0 else None,
        quick=width == 768 and student == teacher == "bf16",
        **_with(config, ALIGN=math.gcd(8, width), stride_w=1),
    )


def _with(config: dict, **constants) -> dict:
    """The configuration with more constants."""
    return {**config, "constants": {**config["constants"], **constants}}


def _cosine(arch: int, student: str, teacher: str, width: int) -> Case:
    return Case(
        op="hidden_cosine",
        form="whole rows" if width <= 2048 else "loop",
        dtype=student if student == teacher else f"{student}/{teacher}",
        width=width,
        arch=arch,
        kernel=hidden_cosine_kernel,
        signature={
            "student": f"*{student}",
            "teacher": f"*{teacher}",
            "grad": f"*{student}",
            "row_weight": "*fp32",
            "partials": "*fp32",
            "n_rows": "i32",
            "width": "i32",
            "row_s": "i32",
            "row_t": "i32",
            "row_g": "i32",
            "eps": "fp32",
        },
        divisible=("width", "row_s", "row_t", "row_g") if width % 16 == 0 else (),
        max_registers=128,
        tensor_cores=False,
        quick=arch == 90 and student == "bf16" and width >= 768 and width != 1024,
        **_with(_split(cosine_config(width)), ALIGN=math.gcd(8, width), stride_w=1),
    )


def _proj(arch: int, dtype: str, width: int, n_rows: int) -> Case:
    return _gemm(arch, "hidden_proj_mse", f"N={n_rows}", dtype, dtype, width, n_rows, 1, 1)


def _combine(arch: int, dtype: str) -> Case:
    return _gemm(arch, "hidden_combine_mse", "12 to 4 states", dtype, dtype, 768, 16384, 12, 4)


def _mixed_proj(arch: int) -> Case:
    return _gemm(arch, "hidden_proj_mse", "N=16384", "bf16", "fp32", 768, 16384, 1, 1)


def _tf32_proj(arch: int) -> Case:
    form = "N=16384 tf32"
    return _gemm(arch, "hidden_proj_mse", form, "fp32", "fp32", 768, 16384, 1, 1)


def _gemm(arch, op, form, states, weight, width, n_rows, n_inputs, n_targets) -> Case:
    compute = states if states == weight else "fp32"
    config = _with(
        _split(proj_config(n_rows, width, DTYPES[compute], math.gcd(8, width))),
        stride_rw=1,
        SIGN=1.0 if n_targets == 1 else -1.0,
        UPCAST=compute == "fp32",
        PRECISION="tf32" if form.endswith("tf32") else "ieee",
    )
    strides = ("row_x", "row_w", "row_y", "row_g")
    return Case(
        op=op,
        form=form,
        dtype=states if states == weight else f"{states}/{weight}",
        width=width,
        arch=arch,
        kernel=hidden_proj_mse_kernel,
        signature={
            "inputs": (f"*{states}",) * n_inputs,
            "weight": f"*{weight}",
            "bias": f"*{weight}",
            "targets": (f"*{states}",) * n_targets,
            "outputs": (f"*{compute}",) * n_targets,
            "row_weight": "*fp32",
            "losses": "*fp32",
            "bias_sums": "*fp32",
            "n_rows": "i32",
            "k_width": "i32",
            "m_width": "i32",
            **dict.fromkeys(strides, "i32"),
        },
        divisible=("k_width", "m_width", *strides) if width % 16 == 0 else (),
        tensor_cores=compute != "fp32" or form.endswith("tf32"),
        quick=width == 768
        and (weight == "bf16" or form.endswith("tf32"))
        and (arch == 90 or (form == "N=16384" and weight == "bf16")),
        **config,
    )
