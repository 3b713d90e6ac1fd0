"""Compile every Triton kernel for GPUs that are not there, by running its launchers without a launch.

``python tests/ahead_of_time.py [--brief] 80 90`` prints one JSON line for each launcher, dtype, option and compute
capability: of its kernels the registers a thread, bytes spilled, bytes of shared memory, and instructions an element
where a kernel reads rows in bulk; or the error. ``--write`` stores all of them in docs/bench/kernels.json and a
summary in docs/kernels.md, in a quarter of an hour. Launchers see CPU tensors, so types, alignments and constants of a
compilation are those of a real launch.
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
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from discdiff.kernels import triton_head, triton_rows, triton_step
from discdiff.kernels.keys import Key
from discdiff.kernels.reference import Reading, group_size
from discdiff.kernels.rows import LinearHead, Rows
from discdiff.kernels.step_inputs import Step

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DOCS = Path(__file__).parent.parent / "docs"
BRIEF = (("float32", 50257, "all"), ("bfloat16", 50304, "plain"), ("bfloat16", 50257, "all"))
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
    keys = {name: Key(5, ids, 3, name=name) for name in ("where", "accept", "data", "token", "noise")}
    return Step(ids, 1, share, None, None, odds, share, cumulated, states - 1, keys)


def launches(brief: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launcher) of every kernel with every dtype, width and option; a few of them if brief."""
    ids = torch.arange(COUNT)
    key = Key(2**64 - 1, ids, 3, name=7)
    for dtype in DTYPES:
        for width in (5, 1024, 50304, 50257):
            groups = -(-width // group_size(width))
            for option, rows in adjusted(Rows.of(torch.zeros(COUNT, width, dtype=dtype))):
                if brief and (str(dtype)[6:], width, option) not in BRIEF:
                    continue
                name = f"{str(dtype)[6:]} V={width} {option}"
                part = torch.zeros(COUNT, groups, dtype=rows.dtype)
                yield f"read {name}", lambda r=rows: triton_rows.statistics(r, tilt=False)
                yield f"read tilt {name}", lambda r=rows: triton_rows.statistics(r)
                yield f"race {name}", lambda r=rows, p=part: triton_rows.race(r, key, ids, Reading(p, p, p), 0)
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
                    yield name, lambda r=rows, h=head: triton_head.race(r, h, key, ids, 0)


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+) )?([A-Z]\S*)([^;]*);")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def shortest_path(code: str, bytes_loaded: int) -> int:
    """Instructions of the shortest path through a kernel on which a thread loads that many bytes, each loop once.

    Branches of a kernel end here: a tile within the width is counted, not the masked one at the end of a row, and not
    the slow paths of divisions.
    """
    lines = [(int(at, 16), predicate, name, rest) for at, predicate, name, rest in INSTRUCTION.findall(code)]
    states: dict[int, dict[int, int]] = {lines[0][0]: {0: 0}}  # by address: bytes loaded so far -> fewest instructions
    found: list[int] = []
    for (address, predicate, name, rest), following in zip(lines, [*(at for at, *_ in lines[1:]), None], strict=True):
        operation, *suffixes = name.split(".")
        width = next((WIDTHS[s] for s in suffixes if s in WIDTHS), 4) if operation == "LDG" else 0
        state: dict[int, int] = {}
        for loaded, count in states.pop(address, {}).items():
            loaded = min(loaded + width, bytes_loaded)
            state[loaded] = min(count + 1, state.get(loaded, count + 1))
        always = not predicate and "DIV" not in suffixes and "," not in rest  # a branch may name its condition
        targets = [int(rest.split()[-1], 16)] if operation == "BRA" else []
        if not (always and operation in ("BRA", "EXIT", "RET", "CALL")) and following is not None:
            targets.append(following)
        for target in targets:
            if target > address:
                there = states.setdefault(target, {})
                there.update({loaded: min(count, there.get(loaded, count)) for loaded, count in state.items()})
        if operation == "EXIT" and bytes_loaded in state:
            found.append(state[bytes_loaded])
    return min(found)


def tool(*words: str, binary: bytes) -> str:
    """What cuobjdump prints of a compiled kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([program, *words, file.name], capture_output=True, text=True, check=True).stdout


def resources(compiled: CompiledKernel, options: dict[str, Any], size: int) -> dict[str, float]:
    """What a compiled kernel uses; ``size`` is the bytes of an element of the rows."""
    usage = tool("-res-usage", binary=compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    used: dict[str, float] = {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared}
    if "TILE" in options:  # a kernel that reads rows in bulk: TILE groups of SIZE columns, padded to LANES
        threads = 32 * compiled.metadata.num_warps
        columns, lanes = options["TILE"] * options["SIZE"], options["TILE"] * options["LANES"]
        if columns >= threads:
            path = shortest_path(tool("-sass", binary=compiled.asm["cubin"]), lanes // threads * size)
            used["instructions"] = round(path * threads / columns, 1)
    return used


def measured(capabilities: list[int], brief: bool) -> Iterator[dict[str, Any]]:
    """One line for each launcher and capability."""
    made: dict[str, tuple[CompiledKernel, dict[str, Any], int]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN002, ANN003, ANN202
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made[self.fn.__name__.strip("_")] = kernel, kwargs, args[0].element_size()
        return kernel

    known: dict[int, tuple[CompiledKernel, dict[str, float]]] = {}  # launches share kernels
    JITFunction.run = compile_only
    try:
        for capability in capabilities:
            driver.set_active(Absent(capability))
            for name, launch in launches(brief):
                made.clear()
                line: dict[str, Any] = {"sm": capability, "launch": name}
                try:
                    launch()
                except Exception as wrong:
                    line["error"] = f"{type(wrong).__name__}: {str(wrong)[-400:]}"
                    if os.environ.get("TRACE"):
                        traceback.print_exc()
                for kernel, (compiled, options, size) in made.items():
                    if id(compiled) not in known:
                        known[id(compiled)] = compiled, resources(compiled, options, size)
                    line[kernel] = known[id(compiled)][1]
                yield line
    finally:
        JITFunction.run = run


def page(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: of each kernel, dtype and place of rows in memory the smallest and largest over the options."""
    rows: dict[tuple[str, str, str], dict[str, set[float]]] = {}
    for line in lines:
        words = line["launch"].split()
        dtype = next(word for word in words if word in {str(dtype)[6:] for dtype in DTYPES})
        place = {"V=50304": "aligned", "V=50257": "unaligned"}.get(next(word for word in words if word[:2] == "V="))
        for kernel in [name for name in line if name.endswith("_kernel")]:
            bulk = kernel in ("read_kernel", "groups_kernel")
            if bulk and place is None:
                continue
            name = f"`_{kernel}`{' with tilt' * (bulk and 'tilt' in words)}"
            row = rows.setdefault((name, dtype, (place or "") if bulk else ""), {})
            for key, value in line[kernel].items():
                row.setdefault(f"instructions {line['sm']}" if key == "instructions" else key, set()).add(value)
    keys = ("instructions 80", "instructions 90", "registers", "spilled", "shared")
    out = [
        "| kernel | dtype | rows | instructions an element, sm_80 | sm_90 | registers | bytes spilled | bytes shared |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for named, row in sorted(rows.items()):
        ends = [sorted({min(row[key]), max(row[key])}) if key in row else [] for key in keys]
        out.append(f"| {' | '.join((*named, *(' to '.join(f'{end:g}' for end in pair) for pair in ends)))} |")
    return "\n".join(out)


def store(lines: list[dict[str, Any]]) -> None:
    """Write docs/bench/kernels.json, one line for each launch and capability, and the table of docs/kernels.md."""
    record = ",\n".join(json.dumps(line) for line in lines)
    (DOCS / "bench" / "kernels.json").write_text(f'{{"triton": "{triton.__version__}", "launches": [\n{record}\n]}}\n')
    begin, end = "<!-- kernels -->\n", "<!-- end kernels -->"
    head, rest = (DOCS / "kernels.md").read_text().split(begin)
    table = f"Compiled by triton {triton.__version__}.\n\n{page(lines)}\n"
    (DOCS / "kernels.md").write_text(head + begin + table + end + rest.split(end)[1])


def main(capabilities: list[int], brief: bool, write: bool = False) -> int:
    lines = []
    for line in measured(capabilities, brief):
        lines.append(line)
        print(json.dumps(line), flush=True)
    failures = sum("error" in line for line in lines)
    if write and not failures:
        store(lines)
    return failures


if __name__ == "__main__":
    words = sys.argv[1:]
    numbers = [int(word) for word in words if word.isdigit()] or [80, 90]
    sys.exit(min(1, main(numbers, "--brief" in words, "--write" in words)))
