"""``--list``: the cases of a run and who can take part in them."""

from __future__ import annotations

from bertkd.bench.contestants import IMPLS, applies, why_not
from bertkd.bench.ops import SPECS
from bertkd.bench.runner import Job


def listing(job: Job) -> str:
    """One case a line, then one contestant a line with the reason if it is out of all its cases."""
    lines = [f"{len(job.cases)} cases on {job.device.type}, the most important first:"]
    lines += [f"  {case.importance}  {case.kind:8}{case.name}" for case in job.cases]
    lines.append("contestants of the losses:")
    cases = [case for case in job.cases if case.op in SPECS]
    for impl in filter(lambda name: job.selection.allows("impl", name), IMPLS):
        own = [case for case in cases if applies(impl, case.op, "fwd_bwd")]
        reasons = [why_not(impl, case, job.device, "fwd_bwd") for case in own]
        runs = sum(reason is None for reason in reasons)
        why = next((f"; not the others: {r}" for r in reasons if r is not None), "")
        lines.append(f"  {impl:11}{runs} of {len(own)} cases{why}")
    return "\n".join(lines)
