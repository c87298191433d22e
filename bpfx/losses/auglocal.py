"""Heads that look ahead: copies of some of the model's own later parts."""

from __future__ import annotations

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, LocalLoss, Predictor


class AugLocal(LocalLoss):
    """The task loss on what copies of a few later parts of the model make of a block's output.

    With n parts between the boundary and the readout, the head of depth d has the parts ``round(n · i / d)``,
    i = 1 … d, all those that change the shape (without them nothing behind would fit), and the readout. A part is
    what lies between two places at which a single value is alive: a layer with its norm and activation, a residual
    block, a transformer's layer. ``pyramid`` makes heads shallower towards the end: block k of K
    has ``round((1 − p) · d + p)`` with ``p = pyramid · k / (K − 2)``, at least 1.

    The copies start at the model's current values (a pretrained model's stay pretrained) and then train on their own;
    the paper's auxiliary networks start at random. What is frozen in the model is read, not copied. Dropout is left
    out. A last matrix that outweighs the block and the rest of the head, such as that of a large vocabulary, is read
    from the model without a gradient.

    Source: Ma, Wu, Si, Tan, *Scaling Supervised Local Learning with Augmented Auxiliary Networks*, ICLR 2024.

    Args:
        head: ``"downstream:d"``, d parts.
        pyramid: how much shallower the last head is, from 0 to 1; ``None`` for the same depth everywhere.

    Raises:
        BpfxError: an argument does not read so. From :meth:`head`: several values cross the boundary (skips over it),
            a part that has to be copied is opaque, or the loss is used without a converted model.

    Example:
        >>> loss = AugLocal("downstream:5")
        >>> [loss.depth(block, 8) for block in range(7)]
        [5, 5, 4, 4, 4, 3, 3]

        Used alone, the boundary must be told what lies behind it.

        >>> import dataclasses
        >>> import torch
        >>> from bpfx.losses import Boundary, Supervised
        >>> boundary = Boundary.of(torch.zeros(2, 8), classes=3)
        >>> behind = dataclasses.replace(boundary, downstream=lambda depth: Supervised().head(boundary))
        >>> loss.head(behind).description
        'vector 8 → pooled linear'
    """

    name = "auglocal"

    def __init__(self, head: str = "downstream:2", pyramid: float | None = 0.5) -> None:
        kind, _, number = head.partition(":") if isinstance(head, str) else ("", "", "")
        if kind != "downstream" or not number.isdecimal() or int(number) < 1:
            raise BpfxError(f"auglocal: head={head!r}; pass 'downstream:d' with a depth d of at least 1")
        if pyramid is not None and (
            isinstance(pyramid, bool) or not isinstance(pyramid, (int, float)) or not 0 <= pyramid <= 1
        ):
            raise BpfxError(f"auglocal: pyramid={pyramid!r}; pass a number from 0 to 1, or None")
        self.deepest, self.pyramid = int(number), pyramid

    def depth(self, index: int, count: int) -> int:
        """Depth of the head of block ``index`` of ``count``."""
        if self.pyramid is None or count <= 2:
            return self.deepest
        p = self.pyramid * index / (count - 2)
        return max(1, round((1 - p) * self.deepest + p))

    def head(self, boundary: Boundary) -> Predictor:
        if boundary.downstream is None:
            raise BpfxError(
                "auglocal copies later parts of the model, which are not known here; use it through bpfx.convert with "
                "a task loss, or set boundary.downstream"
            )
        return boundary.downstream(self.depth(boundary.index, boundary.count))
