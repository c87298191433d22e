"""The isolation check that runs after emission: every value that enters a block in the local step is cut off.

This is the structural half; :func:`bpfx.audit` measures the same with real gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from bpfx.passes.lower import Block
from bpfx.passes.stop_gradient import hand_over, stop_gradient


def check_isolation(local_step: fx.GraphModule, blocks: Sequence[Block]) -> None:
    """Raise ``AssertionError`` when a value that carries a gradient enters a block uncut (an error of the compiler)."""
    differentiable = set().union(*(b.differentiable for b in blocks))
    for node in local_step.graph.nodes:
        if node.op != "call_module" and node.target is not hand_over:
            continue
        for argument in node.all_input_nodes:
            if argument.op == "placeholder" or argument.target in (stop_gradient, hand_over):
                continue
            uncut = argument.name in differentiable
            assert not uncut, f"{argument.name} enters {node.name} without a stop-gradient"
