"""``bertkd bench``: what bertkd gains on this machine against what one would use instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bertkd.bench.commandline import Options


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Time losses and whole training steps on this machine: bertkd's against PyTorch's and other packages'.

    Every contestant is compared with float64 before it is timed, and all of them take turns. Results are a CSV
    file, a Markdown summary and plots; a later run into the same folder replaces the cases that it measures.
    Exit code 1 if a result of bertkd's was wrong, or a case failed.

    Examples:
      bertkd bench --list
      bertkd bench --select "relation_kl,L=128|512,impl=native|chunked,mode=fwd_bwd"
      bertkd bench --select step --budget_minutes 5

    Attributes:
        list: Show the cases and who can take part, and run nothing.
    """

    list: bool = False


def prepare(config: Config) -> Callable[[], object]:
    """Check the options; the result runs the benchmark.

    Raises:
        ValueError: a wrong option, or a folder that must not be written to.
    """
    from bertkd.bench.listing import listing
    from bertkd.bench.runner import plan, run_apart
    from bertkd.study.files import check_output_dir

    job = plan(config)
    if config.list:
        return lambda: print(listing(job))
    check_output_dir(job.output_dir, "bench", reuse=True)
    return lambda: run_apart(job)
