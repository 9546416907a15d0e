"""Peak extra memory of one run on a CPU: the resident set of a fresh child process."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from bertkd.bench.children import child_environment, pack, unpack


def peak_in_child(prepare: Callable[..., Callable[[], object]], *args: object) -> int:
    """Most bytes of resident memory that a run takes beyond what its inputs take, in a process of its own.

    Sees what the allocator's events do not: scratch memory of native code and of BLAS.

    Args:
        prepare: a module-level function that builds the inputs, runs something small to load what is loaded
            once, and returns what to measure.
        *args: of ``prepare``; must be picklable.

    Raises:
        OSError: this system does not tell a process's peak (it needs Linux).
        RuntimeError: the child failed; the message is the child's.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("the peak of a process's memory is read from /proc, which only Linux has")
    job = pack(torch.get_num_threads(), prepare, args)
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(job + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline() or '{"error": "the measuring process died"}')
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return int(answer["bytes"])


@cache
def _server() -> subprocess.Popen[str]:
    """A process that imports torch once and forks for every job, so that each starts with an untouched heap."""
    command = [sys.executable, "-m", "bertkd.bench.memory"]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=child_environment(),
    )
    atexit.register(server.kill)
    return server


def serve() -> None:
    """Read jobs from standard input, one a line; write one line of JSON for each."""
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.write(writer, json.dumps(_measured(line)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        print(text or '{"error": "the measuring process died (out of memory?)"}', flush=True)


def _measured(line: str) -> dict[str, object]:
    try:
        threads, prepare, args = unpack(line)
        torch.set_num_threads(threads)
        run = prepare(*args)
        # What the warm-up freed must go back, or the run would find it there for nothing.
        ctypes.CDLL(None).malloc_trim(0)
        # "5" resets the high-water mark of the resident set.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return {"bytes": max(0, _status("VmHWM") - before)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    import bertkd.bench.op_cases  # noqa: F401 - loaded before the first fork

    serve()
