"""What to train and how: a recipe is a list of stages, written in YAML or Python."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bertkd.errors import unknown_name
from bertkd.training.fields import check_types, from_mapping

RECIPES = Path(__file__).parent.parent / "recipes"

# Fields that may differ between a run and its resumption: they leave the sequence of updates alone.
FREE = {"resume": "free"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One objective, trained with one optimiser from a fresh state.

    Exactly one of ``steps`` and ``epochs`` is given. All counts are in optimiser updates ("steps").

    Attributes:
        objective: the objective's text or preset, e.g. ``"att_kl + val_kl"``.
        name: names the stage's folder and its log.
        layer_map: which student block learns from which teacher block, and its output from whose output; see
            ``bertkd.layer_maps``.
        steps: number of updates.
        epochs: number of passes over the data, fractions allowed.
        batch_size: examples per update, over all processes and micro-batches together.
        accumulate: micro-batches per update, to save memory. Each counts by its share of the examples, so
            a loss that is a mean over examples stays what it was. A mean over tokens does only where the
            parts hold equally many, and a loss that compares the examples of a batch sees fewer of them.
        lr: peak learning rate.
        projection_lr: peak learning rate of the objective's own weights; ``lr`` if None.
        weight_decay: AdamW's, not applied to biases and norms.
        betas: AdamW's.
        eps: AdamW's.
        max_grad_norm: clip the gradient's norm to this; None leaves it alone.
        schedule: of the learning rate after the warmup.
        warmup: updates of linear warmup if an int, a share of all updates if a float below 1.
        lr_end: the learning rate at the end of a polynomial schedule.
        power: of the polynomial schedule; 1 is linear.
        precision: of the forward pass; weights and optimiser stay fp32.
        eval_every: evaluate after so many updates, after each "epoch", or never (None). Where there
            is something to evaluate, the last update is always followed by an evaluation.
        save_every: likewise for checkpoints; the last update is always saved.
        keep_last: checkpoints to keep, besides the best.
        log_every: updates between two rows of the history; the device is read only then.
        metric: the evaluation result that decides which checkpoint is best.
        maximize: whether a larger ``metric`` is better.
        patience: stop after so many evaluations without a better ``metric``; None never stops.
        restore: weights the stage ends with: "best" by ``metric`` (where one is given) or "last".
    """

    objective: str
    name: str = "distil"
    layer_map: Any = "uniform"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 5e-5
    projection_lr: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    schedule: Literal["linear", "polynomial", "cosine", "constant"] = "linear"
    warmup: int | float = 0.06
    lr_end: float = 0.0
    power: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_every: int | Literal["epoch"] | None = field(default="epoch", metadata=FREE)
    save_every: int | Literal["epoch"] | None = field(default="epoch", metadata=FREE)
    keep_last: int = field(default=2, metadata=FREE)
    log_every: int = field(default=50, metadata=FREE)
    metric: str | None = None
    maximize: bool = True
    patience: int | None = field(default=None, metadata=FREE)
    restore: Literal["best", "last"] = field(default="best", metadata=FREE)

    def __post_init__(self) -> None:
        check_types(self)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"give exactly one of steps and epochs, got steps={self.steps} and "
                f"epochs={self.epochs}"
            )
        self._check_ranges()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) is examples per update and must be a multiple of "
                f"accumulate ({self.accumulate})"
            )
        if not self.objective.strip():
            raise ValueError("objective is empty; write e.g. 'att_kl + hid_seq'")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"name must be usable as a folder's name, got {self.name!r}: use letters, digits, _, . and -"
            )
        if self.patience is not None and (self.metric is None or self.eval_every is None):
            raise ValueError("patience needs metric and eval_every: it counts evaluations")

    def _check_ranges(self) -> None:
        for name in ("batch_size", "accumulate", "keep_last", "log_every"):
            _positive(name, getattr(self, name))
        for name in ("steps", "epochs", "eval_every", "save_every", "patience", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value != "epoch":
                _positive(name, value)
        for name in ("lr", "eps", "power"):
            _positive(name, getattr(self, name))
        if self.projection_lr is not None:
            _positive("projection_lr", self.projection_lr)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not 0 <= self.lr_end < self.lr:
            raise ValueError(f"lr_end must lie in [0, lr), got {self.lr_end} with lr {self.lr}")
        share = isinstance(self.warmup, float)
        if not 0 <= self.warmup < (1 if share else math.inf):
            raise ValueError(
                f"warmup must be a number of updates (int) or a share below 1 (float), got {self.warmup}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; ``from_mapping(Stage, ...)`` reads them back."""
        values = dataclasses.asdict(self)
        if isinstance(self.layer_map, Mapping):
            values["layer_map"] = {str(key): value for key, value in self.layer_map.items()}
        return json.loads(json.dumps(values, default=_plain))


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays in a layer map, as JSON takes them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(
        f"layer_map: a recipe cannot hold a {type(value).__name__}; write pairs, e.g. '0:3,1:7'"
    )


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole distillation: the student's making, the data's, and the stages in order.

    Attributes:
        stages: run one after the other; each starts from the student the one before left.
        task: what the data is, as ``bertkd.data.load_task`` names it, or "pydocs-retrieval".
        layers: the teacher blocks a student is made of, as ``create_student`` takes them.
        hidden_size: the student's width; the teacher's if None.
        copy_head: whether the student starts with the teacher's task head.
        max_length: tokens per example at most.
        seed: of the data order, dropout and new weights.
        teacher: how the task's teacher is fine-tuned, if the recipe says.
    """

    stages: tuple[Stage, ...]
    task: str | None = None
    layers: Any = "uniform:3"
    hidden_size: int | None = None
    copy_head: bool = False
    max_length: int = 128
    seed: int = 1
    teacher: Stage | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not self.stages:
            raise ValueError("stages is empty: a recipe needs one stage at least")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"each stage needs a name of its own, got {', '.join(names)}")
        _positive("max_length", self.max_length)
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a recipe from a YAML file, or one of those shipped by name (``recipe_names()``).

        Keys under ``every_stage`` are defaults of all stages and of ``teacher``.

        Raises:
            ValueError: no such recipe, not YAML, an unknown key, a missing one, a wrong value.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = RECIPES / f"{name_or_path}.yaml"
            if not path.is_file():
                raise unknown_name("recipe", str(name_or_path), recipe_names())
        if not path.is_file():
            raise ValueError(f"no such recipe file: {path}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        return cls.from_dict(values, where=path.name)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        """Build a recipe from plain values, as YAML gives them; see ``load``."""
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected keys and values, got {values!r}")
        values = dict(values)
        shared = values.pop("every_stage", None) or {}
        if not isinstance(shared, dict):
            raise ValueError(f"{where}: every_stage must be keys and values, got {shared!r}")
        stages = values.get("stages")
        if not isinstance(stages, (list, tuple)):
            raise ValueError(f"{where}: stages must be a list of stages, got {stages!r}")
        values["stages"] = [_merge(shared, stage) for stage in stages]
        if values.get("teacher") is not None:
            values["teacher"] = _merge(shared, values["teacher"])
        return from_mapping(cls, values, where)

    def with_stages(self, **changes: Any) -> Recipe:
        """The same recipe with ``changes`` made in every stage, e.g. ``with_stages(lr=1e-4)``.

        ``steps`` replaces ``epochs`` and the other way round.
        """
        for given, other in (("steps", "epochs"), ("epochs", "steps")):
            if changes.get(given) is not None:
                changes.setdefault(other, None)
        names = [f.name for f in dataclasses.fields(Stage)]
        for name in changes:
            if name not in names:
                raise unknown_name("stage field", name, names)
        stages = tuple(dataclasses.replace(stage, **changes) for stage in self.stages)
        return dataclasses.replace(self, stages=stages)


def recipe_names() -> list[str]:
    """The recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _merge(shared: dict[str, Any], stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    # A stage that counts in epochs overrides a shared number of steps, and the other way round.
    own_length = {"steps", "epochs"} & stage.keys()
    kept = {k: v for k, v in shared.items() if not (own_length and k in ("steps", "epochs"))}
    return kept | stage
