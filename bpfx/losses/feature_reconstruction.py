"""Label-free: what entered a block must be linearly readable from what leaves it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.dgl import pool
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, average


class ReconstructionHead(Head):
    """A linear decoder, position by position: ``mean((D(leaving) − entering)²) / var(entering)``."""

    uses_entering = True

    def __init__(self, feature: Feature, target: Feature) -> None:
        super().__init__()
        self.feature, self.target = feature, target
        here, there = _positions(feature), _positions(target)
        if here == there:
            self.match = "each"
        else:
            self.match = "pooled" if len(here) == len(there) and 1 <= len(here) <= 3 else "averaged"
        self.decoder = nn.Linear(feature.channels, target.channels)
        same = feature.channels == target.channels
        if same:
            nn.init.eye_(self.decoder.weight)
            nn.init.zeros_(self.decoder.bias)
        words = {"each": "", "pooled": ", target pooled to the positions", "averaged": ", positions averaged"}
        self.description = (
            f"{feature.kind} {feature.channels} → {target.channels} linear decoder"
            + (" from the identity" if same else "")
            + words[self.match]
        )
        self.place(feature)

    def forward(self, given: Given) -> Tensor:
        rows, target = self.feature.rows(given.feature), given.entering[0].detach()
        if self.match == "averaged":
            rows, wanted = average(rows), self.target.pooled(target)
        elif self.match == "pooled":
            wanted = pool(self.target.image(target), rows.shape[1:-1]).movedim(1, -1)
        else:
            wanted = self.target.rows(target)
        found = self.decoder(rows)
        # Half precision has no room for the squares of a large stream.
        kind = torch.promote_types(found.dtype, torch.float32)
        wanted = wanted.to(kind)
        spread = (wanted - wanted.mean()).square().mean()
        return (found.to(kind) - wanted).square().mean() / (spread + torch.finfo(kind).eps)


class FeatureReconstruction(LocalLoss):
    """What entered a block is reconstructed from what leaves it: ``mean((D(h) − x)²) / var(x)``.

    ``x`` is what enters the block (the first of the values, without a gradient), ``h`` what leaves it, and D a linear
    map of each token or position, the identity at the start where the widths agree. ``var(x)`` is over all entries, so
    that the scale of the stream does not matter. Where a block changes the number of positions (a stride), x is
    averaged to those of h; where one of the two has no positions, or positions of another kind (patches of an image),
    both are averaged over theirs. With a horizon above 1, ``x`` is what enters the first block of the window.

    It keeps representations and learns no task: a block that passes on what it was given has loss 0. It is meant for
    the early blocks of a pretrained model, with a task loss behind them. Token ids have no features to reconstruct, so
    the first block of a language model needs another loss.

    Source: the idea is that of LoPT, *Rethinking Local Learning: A Cheaper and Faster Recipe for LLM Post-Training*
    (arXiv 2605.04913), whose first half is updated by a light feature reconstruction. The formula is our reading of
    it, not theirs.

    Raises:
        BpfxError: from :meth:`head`, where nothing of floating point enters the block, or has no features.

    Example:
        >>> import torch
        >>> from bpfx.losses import Boundary, Given
        >>> x = torch.randn(2, 5, 8)
        >>> head = FeatureReconstruction().head(Boundary.of(x, entering=x))
        >>> head(Given.of(x, entering=x)).item()
        0.0
    """

    name = "feature_reconstruction"
    label_free = True

    def head(self, boundary: Boundary) -> Head:
        k, feature = boundary.index, boundary.feature
        if not boundary.entering or not boundary.entering[0].dtype.is_floating_point:
            raise BpfxError(
                f"feature_reconstruction rebuilds what enters a block, but nothing of floating point enters block {k} "
                f"(token ids have no features); use another loss there, as in "
                f"local_loss={{'*': 'feature_reconstruction', {k}: 'tied_readout'}}"
            )
        target = boundary.entering[0]
        for value in (feature, target):
            if len(value.shape) < 2 or not value.dtype.is_floating_point:
                raise BpfxError(
                    f"feature_reconstruction needs samples with features, but {value.name} of block {k} is "
                    f"{value.shape} of {value.dtype}; use another loss there"
                )
        if feature.shape[feature.batch_dim] != target.shape[target.batch_dim]:
            raise BpfxError(
                f"feature_reconstruction compares samples, but {target.name} {target.shape} enters block {k} and "
                f"{feature.name} {feature.shape} leaves it, which are not as many; use another loss there"
            )
        return ReconstructionHead(feature, target)


def _positions(feature: Feature) -> tuple[int, ...]:
    return tuple(s for i, s in enumerate(feature.shape) if i not in (feature.batch_dim, feature.channel_dim))
