"""``bertkd bench``: what bertkd gains on this machine against what one would use instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Config:
    """Time losses and whole training steps on this machine: bertkd's against PyTorch's and other packages'.

    Every contestant is compared with float64 before it is timed, and all of them take turns. Results are a CSV
    file, a Markdown summary and plots; a later run into the same folder replaces the cases that it measures.

    Examples:
      bertkd bench --list
      bertkd bench --select "relation_kl,L=128|512,impl=native|chunked,mode=fwd_bwd"
      bertkd bench --select step --budget_minutes 5

    Attributes:
        select: Conditions that must all hold, FIELD=VALUE|VALUE with * and ?, comma-separated; the fields are
            kind, op, impl, mode, dtype, padding, B, H, L, D, N, V, n, P. A bare word is an op or a kind. Default: all.
        device: "cpu" or "cuda". Default: the GPU if there is one.
        output_dir: Folder of the results. Default: benchmarks/results/DEVICE in a checkout, else bench/DEVICE.
        rounds: Timed rounds of a case; fewer where they take longer than `seconds`, but at least 3.
        seconds: Time for the rounds of a case in a mode.
        budget_minutes: Start no case after this time, and name those left out. Default: no limit.
        memory: Measure peak memory too.
        largest_batch: On a GPU, search for the largest batch with which a training step fits, which takes a minute.
        plots: Draw the pictures too; needs matplotlib.
        list: Show the cases and who can take part, and run nothing.
    """

    select: str | None = None
    device: str | None = None
    output_dir: str | None = None
    rounds: int = 15
    seconds: float = 15.0
    budget_minutes: float | None = None
    memory: bool = True
    largest_batch: bool = True
    plots: bool = True
    list: bool = False


def prepare(config: Config) -> Callable[[], object]:
    """Check the options; the result runs the benchmark.

    Raises:
        ValueError: a wrong option.
    """
    from dataclasses import asdict

    from bertkd.bench.listing import listing
    from bertkd.bench.runner import Options, plan, run

    options = asdict(config)
    only_list = options.pop("list")
    job = plan(Options(**options))
    return (lambda: print(listing(job))) if only_list else (lambda: run(job, apart=True))
