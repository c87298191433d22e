"""Greedy InfoMax: a block's output predicts itself a few positions further on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, fitting

_EPS = 1e-5


class GIM(LocalLoss):
    """InfoNCE over positions, without labels.

    ``z_t`` is a block's own output at position ``t``, ``f_k(j, t) = exp(z_jᵀ W_k z_t)``. For every ``k`` up to
    ``steps``::

        -log( f_k(t + k, t) / (f_k(t + k, t) + Σ_{j in drawn} f_k(j, t)) ),  the mean over samples, positions and k

    In an image ``t + k`` lies ``k`` rows below in the same column (``k`` entries on along the first dimension with two
    or more), in tokens ``k`` further along the sequence. Where a batch is too small for a ``k``, it is left out.

    Args:
        steps: how far ahead; no more than a boundary has positions for. ``W_k`` are ``steps`` matrices of C × C: choose
            fewer steps for wide blocks, and no output as wide as a vocabulary.
        negatives: drawn from all positions of all samples of the batch, as in the paper with replacement and without
            sparing the right one. The positions of a sample share what is drawn for it: the expected loss is the
            paper's, and what is kept for the backward is ``negatives`` vectors a sample instead of a position.
        normalise: divide every ``z_t`` by its root mean square and ``z_jᵀ W_k z_t`` by √C, so that a pretrained block's
            large outputs do not saturate the softmax. ``False`` is the paper's formula to the letter.

    Raises:
        BpfxError: an argument out of its range; what crosses a boundary has one position.

    Source: Löwe, O'Connor, Veeling, *Putting An End to End-to-End: Gradient-Isolated Learning of Representations*,
    NeurIPS 2019.

    Example:
        >>> import torch
        >>> from bpfx.losses.protocol import Boundary, Given
        >>> feature = torch.randn(4, 16, 6, 6)
        >>> head = GIM(steps=3).head(Boundary.of(feature))
        >>> head(Given.of(feature)).shape
        torch.Size([])
    """

    name = "gim"
    label_free = True

    def __init__(self, steps: int = 5, negatives: int = 16, normalise: bool = True) -> None:
        for what, number in {"steps": steps, "negatives": negatives}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise BpfxError(f"GIM: {what}={number!r} must be a whole number of at least 1")
        self.steps, self.negatives, self.normalise = steps, negatives, normalise

    def head(self, boundary: Boundary) -> Head:
        fitting("gim", boundary)
        if all(_along(f) == (0, 1) for f in boundary.features):
            shapes = ", ".join(f"{f.name} {f.shape}" for f in boundary.features)
            raise BpfxError(
                f"gim predicts one position from another, but what crosses behind block {boundary.index} has one "
                f"position only ({shapes}); end the block before the pooling, or choose another local loss for it"
            )
        return PositionHead(boundary.features, self.steps, self.negatives, self.normalise)


def _along(feature: Feature) -> tuple[int, int]:
    """The dimension of :meth:`Feature.rows` that is predicted along, and its length; (0, 1) where there is none."""
    sizes = [s for d, s in enumerate(feature.shape) if d not in (feature.batch_dim, feature.channel_dim)]
    return next(((d, s) for d, s in enumerate(sizes, 1) if s > 1), (0, 1))


class PositionHead(Head):
    """One matrix for every step ahead."""

    random = True

    def __init__(self, features: Sequence[Feature], steps: int, negatives: int, normalise: bool) -> None:
        super().__init__()
        self.features, self.negatives, self.normalise = list(features), negatives, normalise
        self.along = [_along(f)[0] for f in self.features]
        first, counts = self.features[0], [min(steps, _along(f)[1] - 1) for f in self.features]
        self.matrices = nn.ModuleList(
            nn.ModuleList(nn.Linear(f.channels, f.channels, bias=False) for _ in range(count))
            for f, count in zip(self.features, counts, strict=True)
        )
        self.description = (
            f"{first.kind} {first.channels} predicts {max(counts)} positions ahead, {negatives} negatives"
            f"{', normalised' if normalise else ''}"
        )
        self.place(first)

    def forward(self, given: Given) -> Tensor:
        losses: list[Tensor] = []
        for feature, value, dim, matrices in zip(self.features, given.features, self.along, self.matrices, strict=True):
            assert isinstance(matrices, nn.ModuleList)
            if matrices:
                losses += self._of(feature.rows(value).movedim(dim, 1), matrices)
        if not losses:
            # Nothing is far enough apart in this batch: no loss, but a gradient that is there and zero.
            return sum((v.flatten()[:0].sum() for v in given.features), torch.zeros((), device=given.feature.device))
        return torch.stack(losses).mean()

    def _of(self, rows: Tensor, matrices: nn.ModuleList) -> list[Tensor]:
        """The losses of all steps; rows are (samples, positions along, other positions …, channels)."""
        z = rows.flatten(2, -2) if rows.dim() > 3 else rows.unsqueeze(2)
        samples, length, across, width = z.shape
        if self.normalise:
            # A norm keeps no squares for the backward, and sums them in a precision that holds them.
            wide = z.dtype if z.dtype in (torch.float32, torch.float64) else torch.float32
            norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide)
            z = z * torch.rsqrt(norm.square() / width + _EPS).to(z.dtype)
        scale = 1 / math.sqrt(width) if self.normalise else 1.0
        everywhere = z.flatten(0, 2)
        losses = []
        for k, matrix in enumerate(matrices, 1):
            if k >= length:
                break
            chosen = torch.randint(0, samples * length * across, (samples, self.negatives), device=z.device)
            drawn = everywhere[chosen.flatten()].unflatten(0, (samples, self.negatives))
            predicted = matrix(z[:, : length - k]).flatten(1, 2)
            right = (predicted * z[:, k:].flatten(1, 2)).sum(-1, keepdim=True)
            wrong = torch.bmm(predicted, drawn.transpose(1, 2))
            scores = torch.cat([right, wrong], -1) * scale
            scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
            losses.append((scores.logsumexp(-1) - scores[..., 0]).mean())
        return losses
