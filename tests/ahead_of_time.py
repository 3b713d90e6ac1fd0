"""Compile every Triton kernel for GPUs that are not there, by running its launchers without a launch.

``python tests/ahead_of_time.py [--brief] 80 90`` prints one JSON line for each kernel, dtype, option and compute
capability: registers, bytes spilled, instructions an element where a kernel streams rows, or the error. Launchers see
CPU tensors, so types, alignments and constants of a compilation are those of a real launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from discdiff.kernels import triton_head, triton_rows, triton_step
from discdiff.kernels.reference import Reading, group_size
from discdiff.kernels.rows import LinearHead, Rows, Step

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNT = 32  # rows: their strides are then as divisible as a batch's


class Absent:
    """A driver that names a GPU and has none."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def adjusted(source: Rows) -> Iterator[tuple[str, Rows]]:
    """Rows with no adjustment, with each, and with all."""
    ids, zeros = torch.zeros(COUNT, dtype=torch.int64), torch.zeros(COUNT, dtype=source.dtype)
    yield "plain", source
    yield "hidden", replace(source, hidden=(0,))
    yield "shift", replace(source, own=ids, shift=zeros)
    yield "temperature", replace(source, temperature=0.5)
    yield "floor", replace(source, floor=zeros)
    yield "all", replace(source, hidden=(0, 1), temperature=0.5, own=ids, shift=zeros, floor=zeros)


def reverse_step(states: int, asks: bool) -> Step:
    ids, share = torch.arange(COUNT), torch.full((COUNT,), 0.5, dtype=torch.float64)
    cumulated = torch.linspace(0, 1, states, dtype=torch.float64)
    odds = share if asks else None
    tags = {"where": 1, "accept": 2, "data": 3, "token": 4, "noise": 5}
    return Step(ids, ids, 1, share, None, None, odds, share, cumulated, states - 1, 5, 3, tags)


def launches(brief: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launcher) of every kernel with every dtype, width and option; a few of them if brief."""
    ids = torch.arange(COUNT)
    key: dict[str, Any] = {"seed": 2**64 - 1, "ids": ids, "positions": ids, "step": 3, "tag": 7, "first_group": 0}
    for dtype in DTYPES[: 2 if brief else None]:
        for width in (50257,) if brief else (5, 1024, 50304, 50257):
            groups = -(-width // group_size(width))
            for option, rows in adjusted(Rows.of(torch.zeros(COUNT, width, dtype=dtype))):
                if brief and option not in ("plain", "all"):
                    continue
                name = f"{str(dtype)[6:]} V={width} {option}"
                part = torch.zeros(COUNT, groups, dtype=rows.dtype)
                yield f"read {name}", lambda r=rows: triton_rows.statistics(r)
                yield f"race {name}", lambda r=rows, p=part: triton_rows.race(r, Reading(p, p, p), **key)
                yield f"largest {name}", lambda r=rows: triton_rows.largest(r, ids)
                for asks in (False, True):
                    what = reverse_step(width + 1, asks)
                    yield f"step{' accept' * asks} {name}", lambda r=rows, w=what: triton_step.step(r, w)
    for dtype in DTYPES[: 2 if brief else 3]:
        for depth, width in ((64, 50304),) if brief else ((64, 50304), (768, 50257), (50, 300)):
            for bias in (None, torch.zeros(width, dtype=dtype)):
                head = LinearHead(torch.zeros(width, depth, dtype=dtype), bias)
                hidden = Rows(torch.zeros(1, COUNT, depth, dtype=dtype), torch.zeros_like(ids), ids, width, head)
                for option, rows in adjusted(hidden):
                    if brief and (option not in ("plain", "all") or bias is not None):
                        continue
                    name = f"head {str(dtype)[6:]} D={depth} V={width} {option}{'' if bias is None else ' bias'}"
                    yield name, lambda r=rows, h=head: triton_head.race(r, h, **key)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of a compiled kernel, as the assembler states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", out)
    assert found, out
    registers, stack, shared, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "shared": shared, "local": local}


def main(capabilities: list[int], brief: bool) -> int:
    made: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN002, ANN003, ANN202
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.fn.__name__.strip("_"), kernel))
        return kernel

    JITFunction.run = compile_only
    failures = 0
    seen: set[int] = set()
    for capability in capabilities:
        driver.set_active(Absent(capability))
        for name, launch in launches(brief):
            made.clear()
            error = None
            try:
                launch()
            except Exception as wrong:
                error = f"{type(wrong).__name__}: {str(wrong)[-400:]}"
                if os.environ.get("TRACE"):
                    traceback.print_exc()
                failures += 1
            line: dict[str, Any] = {"sm": capability, "launch": name} | ({"error": error} if error else {})
            for kernel, compiled in made:
                if id(compiled) not in seen:
                    seen.add(id(compiled))
                    line[kernel] = resources(compiled.asm["cubin"])
            print(json.dumps(line), flush=True)
    return failures


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(min(1, main([int(w) for w in words if w.isdigit()] or [80, 90], "--brief" in words)))
