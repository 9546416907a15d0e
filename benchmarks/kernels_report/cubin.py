"""Reads a cubin with the tools that Triton's wheel brings along: resources, instructions, innermost loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# An instruction of the disassembly: /*0a10*/  @P0 BRA.U `(.L_x_1) ;
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
MEMORY = {"LDG", "LDGSTS", "LDS", "LDSM", "STG", "STS", "UBLKCP", "UTMALDG"}
# Scheduling notes may follow the address.
ADDRESS = re.compile(r"0x([0-9a-f]+)(?:\s|$)")


@dataclass(frozen=True)
class Machine:
    """Machine code of one kernel.

    Attributes:
        registers: per thread.
        spills: bytes of stack, or the number of local-memory instructions where there is no stack.
        instructions: opcodes with their modifiers, in program order.
        loops: opcodes of every innermost loop, in program order.
    """

    registers: int
    spills: int
    instructions: list[str]
    loops: list[list[str]]

    def count(self, *kinds: str) -> int:
        """Instructions whose opcode, without modifiers, is one of ``kinds``."""
        return sum(op.split(".")[0] in kinds for op in self.instructions)


def read(cubin: bytes) -> Machine:
    """Disassemble a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    code = [(int(a, 16), op, rest) for a, op, rest in INSTRUCTION.findall(sass)]
    ops = [op for _, op, _ in code]
    local = sum(op.split(".")[0] in ("LDL", "STL") for op in ops)
    return Machine(int(found[1]), int(found[2]) or local, ops, list(_innermost(code)))


def _innermost(code: list[tuple[int, str, str]]):
    """Bodies of backward branches that contain no other backward branch."""
    spans = []
    for address, op, rest in code:
        target = ADDRESS.search(rest)
        # The branch to itself behind the last instruction is padding, not a loop.
        if op.split(".")[0] == "BRA" and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    for start, end in sorted(spans):
        inside = (other for other in spans if other != (start, end))
        body = [op for address, op, _ in code if start <= address <= end]
        # A loop that touches no memory waits for a barrier.
        works = any(op.split(".")[0] in MEMORY for op in body)
        if works and not any(start <= s and e <= end for s, e in inside):
            yield body


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
