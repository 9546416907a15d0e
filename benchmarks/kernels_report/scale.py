"""Cases of the kernel that multiplies gradients in place: one tensor, those of six blocks, all that a launch takes."""

from __future__ import annotations

from harness import Case

from bertkd.kernels.scale import scale_kernel
from bertkd.ops.triton.scale import BLOCK
from bertkd.ops.triton.states import TENSORS_PER_LAUNCH


def cases() -> list[Case]:
    return [
        Case(
            op="scale",
            form=f"{count} tensors",
            dtype=dtype,
            width=BLOCK,
            arch=arch,
            kernel=scale_kernel,
            signature={
                "xs": (f"*{dtype}",) * count,
                "factor": "*fp32",
                "count": "i32",
                "blocks": "i32",
            },
            constants={"BLOCK": BLOCK},
            divisible=("count",),
            max_registers=96,
            tensor_cores=False,
            pairs=BLOCK,
            max_per_pair=5,
            quick=dtype == "bf16" and (count == 12 or arch == 90),
        )
        for arch in (80, 90)
        for dtype in ("bf16", "fp16", "fp32")
        for count in (1, 12, TENSORS_PER_LAUNCH)
    ]
