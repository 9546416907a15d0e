"""The losses of ``bertkd.functional`` as modules: options given once, projections owned and trained."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from bertkd import functional
from bertkd.errors import unknown_name, whole_number
from bertkd.ops.checks import check_clamps, check_number, check_options, check_window
from bertkd.ops.dispatch import requested

# Losses that hand their options on.
_OPTIONS_FROM: dict[Any, Any] = {
    functional.attention_kl: functional.relation_kl,
    functional.value_relation_kl: functional.relation_kl,
    functional.logit_kl: functional.softmax_kl,
}


def _options(loss: Any) -> list[str]:
    """Names of a loss's keyword-only arguments."""
    parameters = signature(_OPTIONS_FROM.get(loss, loss)).parameters.values()
    return [x.name for x in parameters if x.kind is Parameter.KEYWORD_ONLY]


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse now the values that the loss would refuse at its first call; tensors are its own business."""
    check_options(name, options.get("reduction", "mean"), options.get("temperature", 1.0))
    for option in ("scale_s", "scale_t"):
        if options.get(option) is not None:
            check_number(name, option, options[option])
    check_clamps(name, options.get("min_prob"), options.get("min_score"))
    if options.get("relation_heads") is not None:
        whole_number(f"{name}: relation_heads", options["relation_heads"], least=1)
    if options.get("window") is not None:
        check_window(name, options["window"])
    if "impl" in options:
        eager_only = (x for x in ("min_prob", "min_score") if options.get(x) is not None)
        requested(options["impl"], next(eager_only, None))


def _widths(name: str, widths: Any) -> list[int]:
    """Widths of several states as a list.

    Raises:
        TypeError, ValueError: they are no sequence of whole numbers from 1 on, or none.
    """
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise TypeError(f"{name} must be a sequence of widths, one per state, got {widths!r}")
    if not widths:
        raise ValueError(f"{name} is empty: give the width of each state")
    return [whole_number(f"{name}[{i}]", width, least=1) for i, width in enumerate(widths)]


class _Loss(nn.Module):
    """A loss whose keyword options are fixed at construction; ``forward`` takes the tensors and may add options.

    Raises:
        TypeError, ValueError: an unknown option, or a value that the loss would refuse later; whether ``impl`` can
            run depends on the tensors, so the loss says.
    """

    loss: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = _options(type(self).loss)
        for name in options:
            if name not in known:
                raise unknown_name(f"option of {type(self).__name__}", name, known)
        _check_options(type(self).__name__, options)
        self.options = options

    def forward(self, *tensors: Any, **options: Any) -> Tensor:
        return type(self).loss(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


class RelationKL(_Loss):
    """``functional.relation_kl`` with fixed options: ``forward(a_s, b_s, a_t, b_t, mask=None)``."""

    loss = staticmethod(functional.relation_kl)


class AttentionKL(_Loss):
    """``functional.attention_kl`` with fixed options: ``forward(q_s, k_s, q_t, k_t, mask=None)``."""

    loss = staticmethod(functional.attention_kl)


class ValueRelationKL(_Loss):
    """``functional.value_relation_kl`` with fixed options: ``forward(v_s, v_t, mask=None)``."""

    loss = staticmethod(functional.value_relation_kl)


class AttentionMSE(_Loss):
    """``functional.attention_mse`` with fixed options: ``forward(q_s, k_s, q_t, k_t, mask=None)``."""

    loss = staticmethod(functional.attention_mse)


class HiddenCosine(_Loss):
    """``functional.hidden_cosine`` with fixed options: ``forward(h_s, h_t, mask=None)``."""

    loss = staticmethod(functional.hidden_cosine)


class SoftmaxKL(_Loss):
    """``functional.softmax_kl`` with fixed options: ``forward(z_s, z_t, mask=None)``."""

    loss = staticmethod(functional.softmax_kl)


class LogitKL(_Loss):
    """``functional.logit_kl`` with fixed options: ``forward(z_s, z_t, mask=None)``."""

    loss = staticmethod(functional.logit_kl)


class LinearKL(_Loss):
    """``functional.linear_kl`` with fixed options: ``forward(h_s, w_s, h_t, w_t, mask=None)``."""

    loss = staticmethod(functional.linear_kl)


class HiddenMSE(_Loss):
    """``functional.hidden_mse`` with a projection of the student's states where one is needed.

    Args:
        width_s: student width d_s.
        width_t: teacher width d_t.
        project: ``"auto"`` makes a trainable ``nn.Linear(d_s, d_t)`` if the widths differ, True always,
            False never.
        bias: whether the projection has one.
        **options: as for ``functional.hidden_mse``.

    Raises:
        TypeError, ValueError: a width that is no whole number from 1 on, ``project=False`` with different
            widths, or a ``weight`` beside the module's own.
    """

    loss = staticmethod(functional.hidden_mse)

    def __init__(
        self,
        width_s: int,
        width_t: int,
        *,
        project: bool | str = "auto",
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        width_s = whole_number("width_s", width_s, least=1)
        width_t = whole_number("width_t", width_t, least=1)
        if project not in (True, False, "auto"):
            raise ValueError(f"project must be True, False or 'auto', got {project!r}.")
        if not project and width_s != width_t:
            raise ValueError(
                f"project=False needs equal widths, got {width_s} and {width_t}. Use project='auto'."
            )
        needed = width_s != width_t if project == "auto" else project
        if needed and options.get("weight") is not None:
            raise ValueError(
                "weight is given, but the module trains a projection of its own; give forward the weight, or take "
                "functional.hidden_mse"
            )
        self.projection = nn.Linear(width_s, width_t, bias=bias) if needed else None

    def forward(self, *tensors: Any, **options: Any) -> Tensor:
        """Loss of states (..., d_s) and (..., d_t) under a mask (...,): ``h_s, h_t, mask=None``."""
        if self.projection is not None:
            options = {"weight": self.projection.weight, "bias": self.projection.bias, **options}
        return super().forward(*tensors, **options)


class HiddenCombineMSE(_Loss):
    """``functional.hidden_combine_mse`` with its projection of all teacher states, which is trained.

    Args:
        widths_s: widths of the student's states.
        widths_t: widths of the teacher's states.
        bias: whether the projection has one.
        **options: as for ``functional.hidden_combine_mse``.

    Raises:
        TypeError, ValueError: widths that are no sequence of whole numbers from 1 on, or none.
    """

    loss = staticmethod(functional.hidden_combine_mse)

    def __init__(
        self,
        widths_s: Sequence[int],
        widths_t: Sequence[int],
        *,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        into, out_of = _widths("widths_s", widths_s), _widths("widths_t", widths_t)
        self.projection = nn.Linear(sum(out_of), sum(into), bias=bias)

    def forward(  # type: ignore[override]
        self,
        h_s: Sequence[Tensor],
        h_t: Sequence[Tensor],
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Loss of states (..., d_s) and (..., d_t), one of each width given, under a mask (...,)."""
        weight, bias = self.projection.weight, self.projection.bias
        return super().forward(h_s, h_t, weight, bias, mask, **options)
