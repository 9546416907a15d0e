"""The training loop, from the first batch to the last checkpoint, in one function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from tqdm.auto import tqdm

from bertkd.data.sampler import LengthBucketSampler
from bertkd.errors import CheckpointError, whole_number
from bertkd.training import checkpoint
from bertkd.training.evaluate import EvalFn, check_judged, note, run_eval
from bertkd.training.in_use import kept_from_others
from bertkd.training.machine import (
    LossOnly,
    check_accelerator,
    check_module,
    make_accelerator,
    trackers,
)
from bertkd.training.meter import Meter, at_step, check_finite
from bertkd.training.recipe import Stage
from bertkd.training.rng import rng_state, seed_all, set_rng_state
from bertkd.training.run_record import describe_run, refuse_different_runs, refuse_other_run
from bertkd.training.schedule import advance, build_optimizer, build_schedule, stage_lengths
from bertkd.training.snapshot import TrainState, check_saveable, restore, restore_model, take
from bertkd.training.stream import Collate, Plan, example_lengths, stream
from bertkd.training.tracking import History, Stopwatch


@dataclass(frozen=True)
class TrainResult:
    """What a stage came to.

    Attributes:
        steps: updates done.
        history: rows of numbers with a ``step`` each, as in ``history.jsonl``.
        metrics: results of the last evaluation.
        best_metric, best_step: of ``stage.metric``; None without one.
        last_checkpoint, best_checkpoint: their folders.
        stopped_early: whether patience ran out.
        skipped_steps: updates that fp16's loss scaler skipped.
        seconds: time spent, over all sittings.
    """

    steps: int
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    best_metric: float | None
    best_step: int | None
    last_checkpoint: Path
    best_checkpoint: Path | None
    stopped_early: bool
    skipped_steps: int
    seconds: float


def train(
    module: nn.Module,
    stage: Stage,
    train_data: Any,
    *,
    output_dir: str | Path,
    collate: Collate,
    eval_fn: EvalFn | None = None,
    accelerator: Accelerator | None = None,
    resume: bool | str | Path = False,
    seed: int = 0,
    log_with: str | list[str] | None = "tensorboard",
    teacher_score: float | None = None,
    settings: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Train ``module`` through one stage; resuming continues bit by bit where the checkpoint stood.

    Args:
        module: ``module(batch)`` gives an object with ``loss`` (scalar) and ``terms`` (scalars by
            name): a ``Distiller``, a ``Supervised``. Left in eval mode, with the best weights where
            the stage says so.
        stage: what to do.
        train_data: a sequence of examples with ``input_ids``.
        output_dir: gets ``checkpoint-<step>/``, ``history.jsonl`` and the trackers' files.
        collate: a list of examples to a batch of tensors.
        eval_fn: ``eval_fn(student)`` to metrics by name; called in eval mode, without gradients.
        accelerator: to train on a prepared one; its precision must be the stage's. With DDP and a
            stage that leaves weights unused it needs ``find_unused_parameters``.
        resume: see ``checkpoint.find``.
        seed: of the order of the data and of dropout.
        log_with: trackers of Accelerate's by name, or None; not for a given ``accelerator``.
        teacher_score: the teacher's ``stage.metric``; a student that passes it gets a warning.
        settings: what else the run depends on, as JSON values by name, e.g. how the student was made; a
            checkpoint of a run that stated other ones is refused.
        num_workers: processes that fetch and collate batches; the result does not depend on it.
        progress: show a progress bar.

    Raises:
        ValueError: no data, a folder that holds another run or in which one is at work, settings that cannot
            work or that are not the same in all processes.
        CheckpointError: a damaged checkpoint, or one of another run.
        NonFiniteError: loss, term or gradient not finite; naming step and terms. Found at once on a
            CPU, elsewhere at the next row of the history, and always before a checkpoint.
    """
    output_dir = Path(output_dir)
    lengths = example_lengths(train_data)
    check_module(module)
    check_saveable(module)
    check_judged(stage, eval_fn)
    seed = whole_number("seed", seed)
    if accelerator is None:
        accelerator = make_accelerator(stage.precision, log_with, output_dir / "logs")
    check_accelerator(accelerator, stage.precision)
    device, main = accelerator.device, accelerator.is_main_process
    # Processes must not drop the same units; the factor keeps those of nearby seeds apart.
    seed_all(seed + 1000 * accelerator.process_index)

    sampler = LengthBucketSampler(lengths, stage.batch_size, seed=seed)
    plan = Plan(
        sampler.batches,
        len(sampler),
        accumulate=stage.accumulate,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    due = stage_lengths(stage, plan.steps_per_epoch)
    evaluates = eval_fn is not None and stage.eval_every is not None

    module.to(device).train()
    adamw = build_optimizer(module, stage)
    schedule = build_schedule(adamw, stage, due)
    model, optimizer = accelerator.prepare(LossOnly(module), adamw)
    trained = [p for group in adamw.param_groups for p in group["params"]]
    meter = Meter(accelerator, min(stage.log_every, due.total))

    run = describe_run(module, stage, seed, train_data, lengths, accelerator, settings)
    refuse_different_runs(gather_object([run]))
    with kept_from_others(output_dir, accelerator):
        state = TrainState()
        found = checkpoint.find(output_dir, resume)
        if found is not None:
            contents = checkpoint.read(found)
            refuse_other_run(found, contents.documents["run"], run)
            state = restore(contents, module, adamw, schedule, accelerator.scaler)
            meter.load(state.window, keep=state.step % stage.log_every)
            set_rng_state(contents.documents["rng"]["processes"][accelerator.process_index])
            del contents
        steps = gather_object([state.step])
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{output_dir}: the processes found checkpoints of different steps ({steps}); it must be a "
                "folder that all of them see"
            )
        if main:
            checkpoint.tidy(output_dir, state.step)
            # Killed after its last checkpoint, a run has nothing left to do that would do this.
            checkpoint.prune(output_dir, stage.keep_last, state.best_step)
        history = History(accelerator, output_dir / "history.jsonl", state.history)

        batches = stream(
            train_data,
            collate,
            plan,
            start=state.step,
            stop=due.total,
            seed=seed,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
        )
        bar = tqdm(
            total=due.total, initial=state.step, desc=stage.name, disable=not (progress and main)
        )
        clock = Stopwatch(state.seconds)
        with closing(bar), trackers(accelerator, run, resumed=state.step):
            while True:
                # First of all, and after the checkpoint: a run killed in the evaluation resumes here.
                if eval_fn is not None and evaluates and due.evaluates(state.step):
                    with clock.aside():
                        metrics = run_eval(accelerator, module, eval_fn)
                    note(state, metrics, stage, teacher_score)
                    named = {f"eval_{name}": value for name, value in metrics.items()}
                    history.add({"step": state.step, "epoch": state.step / due.epoch, **named})
                if state.stopped or state.step == due.total:
                    break

                step = state.step + 1
                for micro in range(stage.accumulate):
                    batch, weight, examples = next(batches)
                    batch = send_to_device(batch, device, non_blocking=True)
                    # Processes exchange gradients once per update, in its last micro-batch.
                    last = micro + 1 == stage.accumulate
                    with at_step(step), nullcontext() if last else accelerator.no_sync(model):
                        loss, values = model(batch)
                        accelerator.backward(loss * weight)
                    meter.add(values, weight)
                accelerator.unscale_gradients(optimizer)
                meter.end_update(nn.utils.clip_grad_norm_(trained, stage.max_grad_norm or math.inf))

                logs = due.logs(step)
                saves = due.saves(step) or (evaluates and due.evaluates(step))
                if logs or saves or device.type == "cpu":
                    # Before the step, so that no checkpoint and, on a CPU, no weight gets to see it.
                    check_finite(meter, step, module, values, batch, accelerator.scaler)
                lr = schedule.get_last_lr()[0]
                optimizer.step()
                optimizer.zero_grad()
                advance(schedule, optimizer.step_was_skipped)
                state.step = step
                state.skipped += optimizer.step_was_skipped
                clock.count(examples)
                bar.update()

                if logs:
                    row = meter.read()
                    meter.clear()
                    times = {"examples_per_second": clock.rate(), "seconds": clock.seconds()}
                    history.add({"step": step, "epoch": step / due.epoch, "lr": lr, **row, **times})
                    bar.set_postfix({name: f"{value:.4g}" for name, value in row.items()})
                if saves:
                    state.seconds = clock.seconds()
                    state.window = meter.state()
                    with clock.aside():
                        rng = gather_object([rng_state()])
                        if main:
                            contents = take(
                                module, adamw, schedule, accelerator.scaler, state, rng, run
                            )
                            checkpoint.save(output_dir, step, contents)
                            checkpoint.prune(output_dir, stage.keep_last, state.best_step)
                        accelerator.wait_for_everyone()

        best_checkpoint = None
        if state.best_step is not None:
            best_checkpoint = output_dir / f"checkpoint-{state.best_step}"
            if stage.restore == "best" and state.best_step != state.step:
                restore_model(checkpoint.read_best(best_checkpoint), module)

    module.eval()
    return TrainResult(
        steps=state.step,
        history=history.rows,
        metrics=state.metrics,
        best_metric=state.best_metric,
        best_step=state.best_step,
        last_checkpoint=output_dir / f"checkpoint-{state.step}",
        best_checkpoint=best_checkpoint,
        stopped_early=state.stopped,
        skipped_steps=state.skipped,
        seconds=state.seconds,
    )
