"""``bertkd verify``: are the fast implementations right on this machine, at these shapes?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

DTYPES = ("float32", "float16", "bfloat16")
RIGHT = "right"


@dataclass(kw_only=True)
class Config:
    """Compare every implementation with float64 on this machine: values and gradients.

    A result is right when its error is at most twice that of the portable PyTorch code in the same dtype, plus
    2e-5 (float32), 2e-3 (float16) or 1.6e-2 (bfloat16). Exit code 1 if any is wrong, or none could be checked.

      bertkd verify
      bertkd verify --ops "[attention_kl]" --length 1000 --head_width 96 --dtypes "[bfloat16]"

    Attributes:
        ops: Losses to check. Default: all.
        impls: Implementations to check. Default: those that run here.
        dtypes: float32, float16, bfloat16.
        device: "cpu", "cuda" or "cuda:N". Default: the GPU if there is one.
        batch_size: Sequences, of full and half length in turn; of three or more the last is all pads.
        heads: Attention heads.
        length: Tokens per sequence.
        head_width: Width of the attention heads of both sides.
        hidden_width: Width of the hidden states of both sides.
        classes: Classes or vocabulary of the logit losses.
        seed: Of the random numbers.
    """

    ops: list[str] = field(default_factory=list)
    impls: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))
    device: str | None = None
    batch_size: int = 3
    heads: int = 4
    length: int = 200
    head_width: int = 64
    hidden_width: int = 384
    classes: int = 3000
    seed: int = 0


def prepare(config: Config) -> Callable[[], None]:
    """Check names and sizes; the result compares and prints a table.

    Raises:
        ValueError: a name that does not exist, a size that is not positive, or nothing to check.
    """
    from bertkd.bench.environment import find_device
    from bertkd.errors import unknown_name
    from bertkd.ops.dispatch import op_of_loss
    from bertkd.ops.implementations import IMPLS, unavailable

    ops = list(dict.fromkeys(op_of_loss(name) for name in config.ops))
    if not config.dtypes:
        raise ValueError(f"dtypes is empty; name some of {', '.join(DTYPES)}.")
    for dtype in config.dtypes:
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
    for name in ("batch_size", "heads", "length", "head_width", "hidden_width", "classes"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    device = find_device(config.device)
    fast = [impl for impl in IMPLS if impl not in ("eager", "chunked")]
    for impl in config.impls:
        if impl not in fast:
            raise unknown_name("impl", impl, fast)
        if (reason := unavailable(impl)) is not None:
            raise ValueError(f"impls: {impl!r} cannot run here: {reason}.")
    impls = list(dict.fromkeys(config.impls)) or [
        impl for impl in fast if unavailable(impl) is None
    ]
    if not impls:
        reasons = "; ".join(f"{impl}: {unavailable(impl)}" for impl in fast)
        return lambda: _nothing_to_check(reasons)
    return lambda: _run(config, ops, impls, list(dict.fromkeys(config.dtypes)), device)


def _nothing_to_check(reasons: str) -> NoReturn:
    # Found when the command runs: there is nothing wrong with its options.
    raise ValueError(f"no fast implementation runs here, nothing to check ({reasons}).")


def _run(config: Config, ops, impls, dtypes, device) -> None:
    from bertkd.ops.implementations import implementation
    from bertkd.ops.tensors import float_tensors
    from bertkd.ops.verify import TENSORS
    from bertkd.study.table import Table

    table = Table(["op", "impl", "dtype", "error", "allowed", "portable", "verdict"])
    wrong = checked = 0
    for op in ops or TENSORS:
        for dtype in dtypes:
            case = _case(config, op, dtype, device)
            for impl in impls:
                refusal = implementation(impl).refusal(op, float_tensors(case[1:]))
                if refusal is not None:
                    table.add(op, impl, dtype, "", "", "", f"not run: {refusal}")
                    continue
                errors, verdict = _judged(op, impl, case)
                table.add(op, impl, dtype, *errors, verdict)
                checked += 1
                wrong += verdict != RIGHT
    print(table.text())
    if wrong:
        raise ValueError(f"{wrong} of {checked} results are wrong; do not use that implementation.")
    if not checked:
        raise ValueError(f"nothing was checked on {device}: see the table for the reasons.")
    print(f"{checked} results checked on {device}, all right.")


def _case(config: Config, op: str, dtype: str, device) -> list:
    import torch

    from bertkd.ops.verify import TENSORS, Sizes, random_case

    sizes = Sizes(
        config.batch_size, config.heads, config.length, _widths(config, op), config.classes
    )
    try:
        dtypes = [getattr(torch, dtype)] * TENSORS[op]
        return random_case(op, dtypes, sizes, device, config.seed)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise ValueError(
            f"the tensors of {op} do not fit into memory; lower --batch_size, --heads, --length, "
            "or the widths."
        ) from error


def _judged(op: str, impl: str, case: list) -> tuple[list[str], str]:
    """Cells of the errors, and the verdict, of the worse of the op's two forms."""
    from bertkd.ops.schema import value_form
    from bertkd.ops.verify import compare

    try:
        forms = [compare(op, impl, case, form) for form in ("fwd_bwd", value_form(op))]
    except Exception as error:
        # A compiler's or a driver's: it is a finding, not an end.
        return ["", "", ""], f"WRONG: {type(error).__name__}: {error}"
    found = max(forms, key=lambda each: each.error / each.allowed)
    errors = [f"{x:.1e}" for x in (found.error, found.allowed, found.portable_error)]
    return errors, RIGHT if found.agrees else "WRONG"


def _widths(config: Config, op: str) -> tuple[int, int]:
    from bertkd.ops.verify import ATTENTION

    if op in ATTENTION:
        return config.head_width, config.head_width
    width = config.classes if op == "softmax_kl" else config.hidden_width
    return width, width
