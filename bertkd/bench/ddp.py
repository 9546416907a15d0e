"""Training steps over processes: DistributedDataParallel over gloo on the CPU, one thread a process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn

from bertkd.bench.cases import Case
from bertkd.bench.children import child_environment, pack, unpack
from bertkd.bench.op_cases import Settings
from bertkd.bench.record import Row
from bertkd.bench.step_cases import Trainer, step_case
from bertkd.bench.timing import spread
from bertkd.ops.implementations import unavailable

SECONDS = 240  # that processes may take before they are taken for stuck


def ddp_cases_for(device: str) -> list[Case]:
    """Twice the processes with the same batch each; CPU only, where a process is a core."""
    if device.startswith("cuda"):
        return []
    sizes = {"importance": 5, "kind": "scaling"}
    return [step_case("minilm_l6_to_3", 8, 128, processes=count, **sizes) for count in (1, 2)]


def run_ddp(case: Case, settings: Settings) -> Iterator[Row]:
    """Tokens per second of all processes together."""
    impl = "chunked" if unavailable("native") else "native"
    if not (settings.selection.allows("impl", impl) and settings.selection.allows("mode", "step")):
        return
    columns = {**case.columns, "impl": impl, "mode": "step", **settings.stamp, "threads": 1}
    try:
        answer = _launch(case, impl, min(settings.rounds, 7))
    except (OSError, RuntimeError) as failure:
        note = str(failure).splitlines()[-1][:160]
        yield Row(**columns, metric="throughput", unit="tokens/s", status="error", note=note)
        return
    per_second = spread([answer["tokens"] / s for s in answer["seconds"]])
    yield Row(
        **columns,
        metric="throughput",
        unit="tokens/s",
        rounds=len(answer["seconds"]),
        **per_second._asdict(),
    )


def _launch(case: Case, impl: str, rounds: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(case.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "bertkd.bench.ddp", pack(case, impl, rounds)]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(**common, RANK=str(rank)),
        )
        for rank in range(case.processes)
    ]
    with ThreadPoolExecutor(len(processes)) as pool:
        answers = [pool.submit(_answer, process) for process in processes]
        try:
            # What one has died of is its error; the others would wait for it.
            done, late = wait(answers, SECONDS, FIRST_EXCEPTION)
        finally:
            for process in processes:
                process.kill()
    for answer in done:
        answer.result()
    if late:
        raise TimeoutError(f"no answer within {SECONDS} s")
    return json.loads(answers[0].result().strip().splitlines()[-1])


def _answer(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.strip() or f"exit code {process.returncode}")
    return output


class _Step(nn.Module):
    """What DDP wraps: the student is a submodule, the teacher is out of its sight."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.student = trainer.student
        self.loss_of = trainer.loss_of

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss_of(batch)


def _work(job: str) -> None:
    case, impl, rounds = unpack(job)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    trainer = Trainer(case, impl, torch.device("cpu"))
    # The student stops after its last matched block, so some weights get no gradient.
    wrapped = nn.parallel.DistributedDataParallel(_Step(trainer), find_unused_parameters=True)
    seconds = []
    for number in range(rounds + 1):
        torch.distributed.barrier()
        start = time.perf_counter()
        for batch in trainer.batches:
            trainer.optimizer.zero_grad(set_to_none=True)
            wrapped(batch).backward()
            trainer.optimizer.step()
        torch.distributed.barrier()
        if number:
            seconds.append(time.perf_counter() - start)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"seconds": seconds, "tokens": trainer.tokens * case.processes}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _work(sys.argv[1])
