"""``bertkd distill``: a smaller student from a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bertkd.cli.options import RunOptions, StageOptions, TaskOptions, overridden, task_of

if TYPE_CHECKING:
    from bertkd.study.workload import Workload
    from bertkd.training.recipe import Recipe, Stage


@dataclass(kw_only=True)
class Config(TaskOptions, StageOptions, RunOptions):
    """Distil a teacher into a smaller student, on a task or on plain text.

    Without a recipe: att_kl + hid_seq, and kd where there is a task head to train, into 3 blocks, for 3
    epochs of batches of 32 with a peak learning rate of 5e-5. First look at the plan:

      bertkd distill --teacher runs/rte-teacher/model --recipe rte --output_dir runs/rte --dry_run
      bertkd distill --teacher roberta-base --text corpus.txt --objective minilm --output_dir runs/lm

    Attributes:
        teacher: Model to learn from: a folder, or a name on the Hugging Face Hub. For a labelled task
            it should have been fine-tuned on it.
        text: Unlabelled text instead of a task: a file with a text per line, a folder of .txt
            files, pydocs, or hub:<dataset>.
        masked: With text: hide words, so that kd and ce have masked words to work on.
        recipe: Shipped recipe (rte, sst2, ...) or YAML file with the stages.
        objective: Sum of terms, e.g. "att_kl + 0.5*hid_seq", or a preset, e.g. minilm.
        layer_map: Teacher block of each student block: uniform, last, random, or "0:3,1:7,2:11"; terms on
            hidden states match the outputs of these blocks.
        layers: Teacher blocks that the student is made of: uniform:3, first:3, last:3, or "[3,7,11]".
        hidden_size: Width of the student. Default: the teacher's.
        copy_head: Start with the teacher's task head. Default: the recipe's.
        student: Start from this model instead of making one from the teacher.
        teacher_precision: Of the teacher's weights; half precision halves their memory, and is faster on
            GPUs and on CPUs that have instructions for it.
        impl: Which implementation computes the losses; see bertkd info.
    """

    teacher: str
    text: str | None = None
    masked: bool = False
    recipe: str | None = None
    objective: str | None = None
    layer_map: str | dict[str, int] | None = None
    layers: str | list[int] | None = None
    hidden_size: int | None = None
    copy_head: bool | None = None
    student: str | None = None
    teacher_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    impl: str = "auto"


def prepare(config: Config) -> Callable[[], None]:
    """Load and check everything, print the plan; the result trains.

    Raises:
        ValueError, TypeError, FileNotFoundError: whatever cannot work, by the name of its option.
    """
    from bertkd.compiling import compile_in_place
    from bertkd.encoders import describe_config
    from bertkd.study.files import check_output_dir
    from bertkd.study.jobs import Job, run_job
    from bertkd.study.models import head_of, load_config, load_model, load_tokenizer, saved_head
    from bertkd.study.workload import check_labels
    from bertkd.training.pipeline import distiller_for

    _check_together(config)
    check_output_dir(config.output_dir, "distill", reuse=bool(config.resume))
    recipe = _recipe(config)
    _check_heads_have_a_use(config, recipe.stages)
    config.check_machine(recipe.stages)
    teacher_config = load_config(config.teacher, "teacher")
    # Before anyone is told to fine-tune it first.
    describe_config(teacher_config)
    tokenizer = load_tokenizer(config.teacher, "teacher", teacher_config)
    workload = _workload(config, recipe, tokenizer, teacher_config)
    head = _head(config, workload, head_of(teacher_config))
    teacher = load_model(config.teacher, "teacher", head)
    if workload.task is not None:
        check_labels(teacher, workload.task, "teacher")
    own_head = saved_head(config.student, "student") if config.student is not None else None
    student = _student(config, recipe, teacher, workload, own_head)
    if config.student is not None:
        _check_tokens(config.student, student, teacher, tokenizer)
    settings = _settings(config, recipe, teacher, student)
    facts = {"student made of": config.student or f"the teacher's blocks {recipe.layers}"}
    if config.teacher_precision != "fp32":
        # Loaded anew: a cast would round what from_pretrained keeps, rotary frequencies for one.
        teacher = load_model(config.teacher, "teacher", head, config.teacher_precision)
        facts["teacher's weights"] = config.teacher_precision
    if config.torch_compile:
        compile_in_place(teacher, student)
        facts["networks"] = "compiled with torch.compile"
    rows = len(workload.train)
    build = distiller_for(teacher, student, impl=config.impl, num_examples=rows, seed=recipe.seed)
    # Every stage is built once before any is trained, so that a mistake in the last one shows now.
    trains_head = [build(stage).uses_student_logits for stage in recipe.stages]
    start = _head_at_start(config, recipe, workload, own_head)
    stages = config.patient(
        [
            _judged(stage, trains_head[:number], start, workload)
            for number, stage in enumerate(recipe.stages, start=1)
        ]
    )
    untrained = None if any(trains_head) else start
    _show_plan(stages, build, workload, recipe.max_length, untrained)
    job = Job(
        command="distill",
        source=config.teacher,
        student=student,
        tokenizer=tokenizer,
        stages=stages,
        build=build,
        workload=workload,
        output_dir=Path(config.output_dir),
        teacher=teacher,
        facts=facts,
        settings=settings,
        untrained_head=untrained,
        seed=recipe.seed,
        resume=config.resume,
        log_with=config.trackers(),
    )
    return (lambda: None) if config.dry_run else lambda: run_job(job)


def _show_plan(
    stages: Sequence[Stage],
    build: Callable[[Stage], Any],
    workload: Workload,
    max_length: int,
    untrained: str | None,
) -> None:
    from bertkd.study.card import UNTRAINED
    from bertkd.study.stages import stage_steps
    from bertkd.training.machine import this_process

    say = this_process().print
    for number, stage in enumerate(stages, start=1):
        updates = f"{stage_steps(stage, workload):,} updates of {stage.batch_size} examples"
        say(f"\nstage {number} of {len(stages)}: {stage.name}, {updates} from {workload.name}")
        say(build(stage).plan(stage.batch_size // stage.accumulate, max_length))
    if untrained is not None:
        say(f"\n{UNTRAINED[untrained]}")


def _check_together(config: Config) -> None:
    """Refuse an option that another one leaves without a use."""
    from bertkd.student import STRATEGIES

    if config.text is None and config.masked:
        raise ValueError("masked is for --text, a task has labels of its own.")
    if config.text is not None and config.task is not None:
        raise ValueError(f"give task={config.task!r} or text={config.text!r}, not both.")
    if config.student is not None and config.student.partition(":")[0] in STRATEGIES:
        raise ValueError(
            f"student={config.student!r} says which of the teacher's blocks to take, not a model to start from; "
            f"write --layers {config.student}"
        )
    making = {name: getattr(config, name) for name in ("layers", "hidden_size", "copy_head")}
    columns = {f.name: getattr(config, f.name) for f in fields(TaskOptions)}
    for other, options, use in (
        ("student", making, "is for a student that is made of the teacher"),
        ("text", columns, "is for labelled tasks"),
    ):
        for name, value in options.items():
            if getattr(config, other) is not None and value is not None:
                raise ValueError(
                    f"{name}={value!r} {use}, and {other}={getattr(config, other)!r} leaves no use for it; "
                    "leave one of them out."
                )


def _check_heads_have_a_use(config: Config, stages: Sequence[Stage]) -> None:
    """Refuse terms on logits on plain text, for which both models are loaded without a head."""
    from bertkd.objectives import read_objective

    if config.text is None or config.masked:
        return
    for stage in stages:
        kinds = [term.kind for term in read_objective(stage.objective).terms]
        if needing := [kind for kind in ("kd", "ce") if kind in kinds]:
            raise ValueError(
                f"objective={stage.objective!r} has {' and '.join(needing)}, which work on masked words: add --masked."
            )


def _recipe(config: Config) -> Recipe:
    from bertkd.training.recipe import Recipe, Stage

    if config.recipe is None:
        stage = Stage(objective=config.objective or _default_objective(config), epochs=3)
        recipe = Recipe(stages=(stage,))
    else:
        recipe = Recipe.load(config.recipe)
        if config.objective is not None:
            if len(recipe.stages) > 1:
                raise ValueError(
                    f"objective={config.objective!r} fits one stage, but recipe={config.recipe!r} has "
                    f"{len(recipe.stages)}; write a recipe of your own."
                )
            recipe = recipe.with_stages(objective=config.objective)
    if config.layer_map is not None:
        recipe = recipe.with_stages(layer_map=config.layer_map)
    changes = {name: getattr(config, name) for name in ("layers", "hidden_size", "copy_head")}
    changes = {name: value for name, value in changes.items() if value is not None}
    return overridden(dataclasses.replace(recipe, **changes), config, config)


def _default_objective(config: Config) -> str:
    """Inner layers, and the logits where the data has a use for the task head: no other term trains it."""
    from bertkd.study.workload import RETRIEVAL

    has_head = config.task != RETRIEVAL if config.text is None else config.masked
    return "att_kl + hid_seq + kd" if has_head else "att_kl + hid_seq"


def _workload(config: Config, recipe: Recipe, tokenizer: Any, teacher_config: Any) -> Workload:
    from bertkd.study.models import saved_labels
    from bertkd.study.workload import is_local, load_text

    if config.text is None:
        task = task_of(config, recipe)
        # A file says what its labels are called, not in which order the teacher has them.
        labels = saved_labels(teacher_config) if is_local(task) else {}
        return config.workload(task, tokenizer, recipe.max_length, **labels)
    return load_text(config.text, tokenizer, recipe.max_length, masked=config.masked)


def _head(config: Config, workload: Workload, saved: str | None) -> str | None:
    if workload.head is not None and saved != workload.head:
        if workload.head == "mlm":
            raise ValueError(
                f"teacher={config.teacher!r} has no head for masked words; leave out --masked."
            )
        raise ValueError(
            f"teacher={config.teacher!r} has no head for labels of whole texts; make a teacher of it first: bertkd "
            "finetune --model ... --task ..."
        )
    return workload.head


def _student(
    config: Config, recipe: Recipe, teacher: Any, workload: Workload, own_head: str | None
) -> Any:
    from bertkd.student import create_student
    from bertkd.study.models import label_config, load_model
    from bertkd.study.workload import check_labels
    from bertkd.training.machine import this_process

    if config.student is None:
        return create_student(
            teacher,
            recipe.layers,
            hidden_size=recipe.hidden_size,
            copy_head=recipe.copy_head,
            seed=recipe.seed,
            verbose=this_process().is_main_process,
        )
    labels = {}
    if workload.task is not None and own_head != "labels":
        labels = label_config(workload.task)
    student = load_model(config.student, "student", workload.head, seed=recipe.seed, **labels)
    if workload.task is not None:
        check_labels(student, workload.task, "student")
    return student


def _check_tokens(path: str, student: Any, teacher: Any, tokenizer: Any) -> None:
    """Refuse a student that comes with another tokenizer than its teacher's, which both will be fed by.

    Raises:
        ValueError: a token has another id.
    """
    from bertkd.objectives.sides import check_models
    from bertkd.study.models import load_tokenizer

    try:
        own = load_tokenizer(path, "student")
    except ValueError:
        return  # it has none: both are fed by the teacher's
    check_models(student, teacher, own, tokenizer)


def _settings(config: Config, recipe: Recipe, teacher: Any, student: Any) -> dict[str, Any]:
    """What a resumed run must not change besides its stages, data and teacher; by the options' names."""
    from bertkd.encoders import describe
    from bertkd.student import teacher_layers
    from bertkd.training.run_record import identity

    making: dict[str, Any] = dict.fromkeys(("layers", "hidden_size", "copy_head", "student"))
    if config.student is not None:
        making["student"] = identity(student)
    else:
        making["layers"] = teacher_layers(recipe.layers, describe(teacher).num_blocks)
        making["hidden_size"] = describe(student).hidden_size
        making["copy_head"] = recipe.copy_head
    return making | {"teacher_precision": config.teacher_precision}


def _head_at_start(
    config: Config, recipe: Recipe, workload: Workload, own_head: str | None
) -> Literal["new", "copied"] | None:
    """Where the task head comes from before any stage trains it; None where there is none."""
    if workload.head is None:
        return None
    if config.student is None:
        return "copied" if recipe.copy_head else "new"
    return "copied" if own_head == workload.head else "new"


def _judged(stage: Stage, trains_head: list[bool], start: str | None, workload: Workload) -> Stage:
    """Judge by the workload's metric where the student's output means something to it.

    Args:
        stage: what to do.
        trains_head: of each stage up to this one, whether it trains the task head.
        start: as ``_head_at_start`` gives it.
        workload: data and judges.

    Raises:
        ValueError: the stage is to be judged by the outputs of a head that nothing has trained, or by a score
            that there will not be.
    """
    workload.check_metric(stage)
    if stage.eval_every is None or not workload.judges:
        return stage
    if stage.metric is None:
        means_something = start is None or trains_head[-1]
        return dataclasses.replace(stage, metric=workload.metric) if means_something else stage
    if start == "new" and not any(trains_head):
        raise ValueError(
            f"stage {stage.name!r} is to be judged by {stage.metric}, but {stage.objective!r} does not train "
            "the task head, which is new: add kd or ce, or give the stage metric: null and eval_every: null."
        )
    return stage
