"""A model without a task loss: the local loss judges its output as well, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from bpfx.errors import BpfxError
from bpfx.losses import Boundary, Feature, Given, Head, Weighted
from bpfx.passes.batch import OutputLoss


class OwnLoss(OutputLoss):
    """The loss of a label-free local loss on the model's output. Its head is built after a first capture."""

    head: Head | None

    def __init__(self, weighted: Weighted) -> None:
        super().__init__()
        self.head, self.weighted = None, weighted

    def build(self, features: Sequence[Feature], inputs: Sequence[Feature], count: int) -> None:
        """Build the head, now that the output is known.

        Args:
            features: the model's floating-point outputs.
            inputs: the tensors of the batch.
            count: of the output as a boundary, which lies behind the last block.
        """
        loss = self.weighted.loss
        self.head = loss.head(Boundary(list(features), index=count - 1, count=count, inputs=list(inputs)))
        if self.head.uses_task or self.head.uses_entering:
            raise BpfxError(
                f"{loss.name} needs a task loss, or what enters a block, and cannot judge a model's output alone; "
                "pass a loss_fn"
            )

    def forward(self, output: Any, inputs: Sequence[Any]) -> Tensor:
        values = floating(output)
        if self.head is None:  # only to find out what the output is
            total: Tensor = sum(v.float().square().mean() for v in values)  # type: ignore[assignment]
            return total
        found: Tensor = self.head(Given(tuple(values), tuple(inputs)))
        return found * self.weighted.weight


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output.

    Raises:
        BpfxError: there is none.
    """
    found = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
    if not found:
        raise BpfxError("the model returned no floating-point tensor, so no local loss can judge it")
    return found
