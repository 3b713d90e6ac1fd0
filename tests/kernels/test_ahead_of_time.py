"""The Triton kernels compile for GPUs that are not there, and use no more than docs/bench/kernels.json says."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = ROOT / "tests" / "ahead_of_time.py"
TABLE = SCRIPT.parent.parent / "docs" / "bench" / "kernels.json"


def compiled(*words: str) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return lines


def bound(kernel: str, launch: str) -> dict[str, float]:
    """What a kernel may use whatever triton compiles it: a little more than was measured, hardly a spill."""
    if kernel == "head_kernel":  # its tile of products does not always fit registers: 6392 bytes at most were measured
        return {"spilled": 9588}
    double = "float64" in launch
    return {
        "spilled": 16,
        "instructions": (80 if double else 30) if launch.endswith("plain") else 110 if double else 45,
    }


def worse(lines: list[dict[str, Any]], table: dict[str, Any]) -> list[str]:
    """What does not compile, is out of bounds, or is worse than the table if the same triton wrote it."""
    same = table["triton"] == importlib.metadata.version("triton")
    stored = {(line["sm"], line["launch"]): line for line in table["launches"] if same}
    found = []
    for line in lines:
        name = f"sm_{line['sm']} {line['launch']}"
        found += [f"{name}: {line['error']}"] if "error" in line else []
        for kernel in [key for key in line if key.endswith("_kernel")]:
            limits = bound(kernel, line["launch"])
            was = stored.get((line["sm"], line["launch"]), {}).get(kernel)
            if was is not None:
                limits |= {"registers": was["registers"] + 16, "spilled": was["spilled"] * 1.1}
                limits |= {"instructions": was["instructions"] * 1.1} if "instructions" in was else {}
            elif same:
                found.append(f"{name}: {kernel} is not in docs/bench/kernels.json")
            found += [
                f"{name}: {kernel}, {key}: {line[kernel][key]} where {limit:g} are allowed"
                for key, limit in limits.items()
                if line[kernel].get(key, 0) > limit
            ]
    return found


def check(lines: list[dict[str, Any]]) -> None:
    assert worse(lines, json.loads(TABLE.read_text())) == []
    kernels = {name for line in lines for name in line if name.endswith("kernel")}
    assert kernels == {
        "read_kernel", "pick_kernel", "largest_kernel", "decide_kernel", "groups_kernel", "finish_kernel",
        "head_kernel", "head_pick_kernel",
    }  # fmt: skip
    wide = [line for line in lines if " V=5 " not in line["launch"]]  # there a thread reads less than a column
    bulk = [line[kernel] for line in wide for kernel in ("read_kernel", "groups_kernel") if kernel in line]
    assert all("instructions" in used for used in bulk)


def test_kernels_compile_for_two_gpus() -> None:
    check(compiled("--brief", "80", "90"))


@pytest.mark.slow
def test_kernels_compile_with_every_dtype_width_and_option() -> None:
    """For one of the two GPUs of the test above: this takes minutes for each."""
    check(compiled("90"))


@pytest.mark.parametrize("same", [True, False])
def test_a_kernel_that_became_worse_is_told(same: bool, lesser_kernels: list[dict[str, Any]]) -> None:
    """Columns that do not lie side by side, and tiles that do not fit registers, under the name of the right kernel."""
    table = json.loads(TABLE.read_text()) | {"triton": importlib.metadata.version("triton") if same else "0"}
    found = [worse([line], table) for line in lesser_kernels]
    name = "sm_90 read bfloat16 V=50304 plain: read_kernel, "
    apart, spilling = ({text.removeprefix(name).split(":")[0] for text in texts} for texts in found)
    assert apart == ({"registers", "instructions"} if same else set())
    assert spilling == ({"spilled", "instructions"} if same else {"spilled"})
    assert worse(table["launches"], table) == []


def run_with(fault: str, folder: Path) -> list[dict[str, Any]]:
    """Lines of the script with other launches."""
    (folder / "fault.py").write_text(
        "import sys; sys.path.insert(0, sys.argv[1]); import ahead_of_time as ahead\n"
        f"import torch, triton, triton.language as tl\n{fault}\nsys.exit(ahead.main([90], True))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(
        [sys.executable, folder / "fault.py", SCRIPT.parent], capture_output=True, text=True, env=environment
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def lesser_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The reading kernel with columns apart, and with tiles of 32768 columns in two warps."""
    fault = """
rows, name = ahead.triton_rows, "read bfloat16 V=50304 plain"
def read(source, tile):
    rows._TILE = tile
    return rows.statistics(ahead.Rows.of(source), tilt=False)
apart, right = torch.zeros(32, 2 * 50304, dtype=torch.bfloat16)[:, ::2], torch.zeros(32, 50304, dtype=torch.bfloat16)
ahead.launches = lambda brief: [(name, lambda: read(apart, 2048)), (name, lambda: read(right, 32768))]
"""
    return run_with(fault, tmp_path_factory.mktemp("fault"))


def test_a_kernel_that_does_not_compile_is_told(tmp_path: Path) -> None:
    """The fault that the interpreter cannot see: a name whose type one branch changes."""
    fault = """
@triton.jit
def broken(x_ptr):
    code = tl.load(x_ptr)
    if code != 0:
        code = 2
    tl.store(x_ptr, code)
ahead.launches = lambda brief: [("broken", lambda: broken[(1,)](torch.zeros(1, dtype=torch.int8)))]
"""
    (line,) = run_with(fault, tmp_path)
    assert "int8" in line["error"]
    assert worse([line], {"triton": "0", "launches": []}) == [f"sm_90 broken: {line['error']}"]
