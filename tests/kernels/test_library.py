"""The draw as an operation of torch: compiled graphs hold it whole, autocast leaves it alone."""

import subprocess
import sys

import torch
from places import ROOT

from discdiff import kernels

# In a process of its own: the tests' shape checker is not for tracing.
COMPILED = """
import torch
from discdiff import kernels

def head_and_draw(hidden, weight, rows, positions):
    return kernels.draw(hidden @ weight, seed=2**63 + 1, rows=rows, positions=positions, step=2, tag=3) + 1

torch.manual_seed(0)
hidden, weight, ids = torch.randn(6, 8), torch.randn(8, 1500), torch.arange(6)
graphs = []

def keep(graph, inputs):
    graphs.append(str(graph.graph))
    return graph.forward

compiled = torch.compile(head_and_draw, backend=keep, fullgraph=True)
assert torch.equal(compiled(hidden, weight, ids, ids), head_and_draw(hidden, weight, ids, ids))
print(len(graphs), "discdiff.draw" in graphs[0] or "discdiff::draw" in graphs[0])
"""


def test_a_compiled_graph_holds_the_draw() -> None:
    out = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, cwd=ROOT)
    assert out.stdout == "1 True\n", out.stderr


def test_the_operation_keeps_torchs_rules() -> None:
    """Schema, fake tensors and dynamic shapes, by torch's own checker."""
    ids = torch.arange(5)
    torch.library.opcheck(torch.ops.discdiff.draw.default, (torch.randn(5, 1500), ids, ids, -3, 2, 3))


def test_autocast_leaves_the_logits_alone() -> None:
    logits, ids = torch.randn(64, 5000), torch.arange(64)
    key = {"seed": 1, "rows": ids, "positions": ids}
    expected = kernels.draw(logits, **key)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.draw(logits, **key), expected)
        assert torch.equal(torch.ops.discdiff.draw(logits, ids, ids, 1, 0, 0), expected)
    assert not torch.equal(kernels.draw(logits.bfloat16(), **key), expected), "planted: what a cast would do"
