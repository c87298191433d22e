"""The two steps for one range of input shapes, and what they are made of."""

from __future__ import annotations

import dataclasses
import functools

from torch import fx, nn

from bpfx.passes.capture import Captured
from bpfx.passes.lower import Block
from bpfx.passes.programs import BoundaryLoss
from bpfx.passes.stages import Stage


@dataclasses.dataclass
class Variant:
    """The two steps for one range of input shapes."""

    captured: Captured
    blocks: list[Block]
    stages: list[Stage]
    heads: nn.ModuleList
    losses: list[BoundaryLoss | None]
    local_step: fx.GraphModule
    bp_step: fx.GraphModule

    @functools.cached_property
    def read_locally(self) -> frozenset[str]:
        """Values that cross between blocks in the local sweep."""
        return frozenset(n for stage in self.stages for n in stage.dead_after_local)

    @functools.cached_property
    def read_in_reverse(self) -> frozenset[str]:
        """Values that cross between blocks in a forward and reverse sweep."""
        return frozenset(n for stage in self.stages for n in stage.dead_after_reverse)

    @functools.cached_property
    def draws(self) -> bool:
        """Whether any block or local loss may draw random numbers."""
        return any(b.random for b in self.blocks) or any(loss is not None and loss.random for loss in self.losses)
