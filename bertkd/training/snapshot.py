"""A run's state as tensors and JSON, and back: what a checkpoint is filled with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bertkd.errors import CheckpointError
from bertkd.training.checkpoint import Contents

# How the step is computed is the present machine's business, not the checkpoint's.
_MACHINE = {"params", "fused", "foreach", "capturable"}


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: updates done.
        skipped: updates that fp16's loss scaler skipped, counted in ``step`` too.
        seconds: time spent, over all sittings.
        metrics: results of the last evaluation.
        best_metric, best_step: the best evaluation so far.
        bad_evals: evaluations since then.
        stopped: whether patience has run out.
        window: rows of loss and terms that no history row holds yet.
        history: rows of ``history.jsonl``.
    """

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best_metric: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    stopped: bool = False
    window: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def take(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    scaler: Any,
    state: TrainState,
    rng: list[dict[str, Any]],
    run: dict[str, Any],
) -> Contents:
    """Everything needed to go on exactly as if nothing had happened.

    Args:
        module: its ``state_dict`` must hold tensors only.
        optimizer: the plain one, not Accelerate's wrapper.
        schedule: of the learning rate.
        scaler: the ``GradScaler`` or None.
        state: the run's counters and history.
        rng: ``rng_state()`` of each process.
        run: what made the run, to compare with on resumption.
    """
    model, aliases = _model_tensors(module)
    trainer = {
        "state": asdict(state),
        "groups": [
            {key: value for key, value in group.items() if key not in _MACHINE}
            for group in optimizer.param_groups
        ],
        "trained": _trained(module, optimizer),
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "aliases": aliases,
    }
    return Contents(
        tensors={"model": model, "optimizer": _optimizer_tensors(module, optimizer)},
        documents={"trainer_state": trainer, "rng": {"processes": rng}, "run": run},
    )


def restore(
    contents: Contents,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    scaler: Any,
) -> TrainState:
    """Put ``contents`` into freshly built objects; generators are the caller's to restore.

    Raises:
        CheckpointError: the weights do not fit ``module``, or other ones of them were trained.
    """
    trainer = contents.documents["trainer_state"]
    restore_model(contents, module)
    then, now = trainer["trained"], _trained(module, optimizer)
    if then != now:
        before, after = ({name for group in groups for name in group} for groups in (then, now))
        changed = sorted(before ^ after) or ["the same ones in other groups"]
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise CheckpointError(
            "the checkpoint was made with other weights frozen or trained: "
            f"{', '.join(changed[:5])}{more}; freeze the same ones, or start afresh"
        )
    _restore_optimizer(contents, module, optimizer)
    missing = {"lr_lambdas": [None] * len(optimizer.param_groups)}
    schedule.load_state_dict(trainer["schedule"] | missing)
    if scaler is not None and trainer["scaler"] is not None:
        scaler.load_state_dict(trainer["scaler"])
    return TrainState(**trainer["state"])


def restore_model(contents: Contents, module: nn.Module) -> None:
    """Put the checkpoint's weights into ``module``.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.
    """
    tensors = dict(contents.tensors["model"])
    for alias, name in contents.documents["trainer_state"]["aliases"].items():
        tensors[alias] = tensors[name]
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != got:
        wrong = [
            f"{name}: {got.get(name, 'missing')} in the checkpoint, "
            f"{expected.get(name, 'missing')} in the model"
            for name in sorted(expected.keys() | got.keys())
            if expected.get(name) != got.get(name)
        ]
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError("the weights do not fit the model: " + "; ".join(wrong[:5]) + more)
    module.load_state_dict(tensors)


def check_saveable(module: nn.Module) -> None:
    """Refuse a module whose state cannot go into a safetensors file.

    Raises:
        TypeError: naming the entries of ``state_dict()`` that are not tensors.
    """
    wrong = [name for name, value in module.state_dict().items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(
            f"state_dict() of {type(module).__name__} must hold tensors only, but {', '.join(wrong)} "
            "is something else; keep it in a buffer"
        )


def _model_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CPU copies, with tied weights stored once: ``aliases`` maps the other names to the first."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in module.state_dict().items():
        same = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and same in first:
            aliases[name] = first[same]
        else:
            first[same] = name
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return tensors, aliases


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the weights in each of the optimiser's groups."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [
        [names.get(id(p), "(not the module's)") for p in group["params"]]
        for group in optimizer.param_groups
    ]


def _parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if id(p) in trained}


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().to("cpu", copy=True).contiguous()
        for name, parameter in _parameter_names(module, optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    contents: Contents, module: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    wanted = optimizer.state_dict()
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    place = {parameter: i for i, parameter in enumerate(order)}
    index = {name: place[id(p)] for name, p in _parameter_names(module, optimizer).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in contents.tensors["optimizer"].items():
        name, _, entry = key.rpartition("|")
        state.setdefault(index[name], {})[entry] = value
    saved = contents.documents["trainer_state"]["groups"]
    for group, values in zip(wanted["param_groups"], saved, strict=True):
        group.update(values, betas=tuple(values["betas"]))
    optimizer.load_state_dict({"state": state, "param_groups": wanted["param_groups"]})
