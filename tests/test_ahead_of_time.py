"""The Triton kernels compile for GPUs that are not there, and none keeps a row in local memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).parent / "ahead_of_time.py"


def compiled(*words: str) -> list[dict[str, object]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return lines


def check(lines: list[dict[str, object]]) -> None:
    assert [line for line in lines if "error" in line] == []
    kernels = {name for line in lines for name in line if name.endswith("kernel")}
    assert kernels == {
        "read_kernel", "pick_kernel", "largest_kernel", "decide_kernel", "groups_kernel", "finish_kernel",
        "head_kernel", "head_pick_kernel",
    }  # fmt: skip
    for line in lines:
        for name, used in line.items():
            if name.endswith("kernel") and name != "head_kernel":  # a tile of float32 products does not fit registers
                assert isinstance(used, dict)
                assert used["stack"] <= 16, line


def test_kernels_compile_for_two_gpus() -> None:
    check(compiled("--brief", "80", "90"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_with_every_dtype_width_and_option(capability: str) -> None:
    check(compiled(capability))


def test_a_kernel_that_does_not_compile_is_told(tmp_path: Path) -> None:
    """The fault that the interpreter cannot see: a name whose type one branch changes."""
    fault = tmp_path / "fault.py"
    fault.write_text(
        "import sys; sys.path.insert(0, sys.argv[1]); import ahead_of_time as ahead\n"
        "import torch, triton, triton.language as tl\n"
        "@triton.jit\ndef broken(x_ptr):\n    code = tl.load(x_ptr)\n    if code != 0:\n        code = 2\n"
        "    tl.store(x_ptr, code)\n"
        "ahead.launches = lambda brief: [('broken', lambda: broken[(1,)](torch.zeros(1, dtype=torch.int8)))]\n"
        "sys.exit(ahead.main([90], True))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run([sys.executable, fault, SCRIPT.parent], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "int8" in json.loads(done.stdout)["error"]
