"""Forward-Forward: a block's output has a large goodness for right labels and a small one for wrong ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, Predictor, fitting
from bpfx.losses.views import interleave, parts_of

VARIANTS = ("goodness", "symba", "channels")
IGNORED = -100  # the target that torch's cross-entropy leaves out


class ForwardForward(LocalLoss):
    """Hinton's Forward-Forward, and two of its descendants. The heads have no parameters.

    With the goodness ``g`` of a sample, the mean square of what crosses the boundary::

        goodness    softplus(theta - g⁺) + softplus(g⁻ - theta)
        symba       softplus(-alpha (g⁺ - g⁻))
        channels    cross-entropy of the labels and the mean squares of one group of channels for each class

    ``g⁺`` is of an image with its right label written into it, ``g⁻`` of the same image with a wrong one: the first
    ``classes`` entries of each channel, rows joined, are set to 0 and that of the label to the image's largest value.
    A sample so becomes three rows: right label, wrong label, and the image as it is. The first two get the target -100,
    so that the task loss (that of the last block and of BP) is of the plain rows alone. The ``loss_fn`` must leave such
    targets out of its mean, as ``torch.nn.functional.cross_entropy`` and ``nll_loss`` do; one that fails on -100, or
    counts it, cannot be used. ``channels`` needs no negatives and leaves the batch as it is.

    **What it does to a model.** bpfx never changes what a model computes, and the published method does: it normalises
    the length of a block's output before the next block, because that block could otherwise read the goodness off it
    and learn nothing. Build a model for it in which every block begins with a :class:`LengthNorm`, and name those
    modules as ``blocks``: at a boundary right behind a norm every goodness is 1. A pretrained backbone is broken by
    ``goodness`` and ``symba``: it has never seen a label in its input, it has no such normalisation, and the size of
    its activations is what its later layers were fitted to. What comparisons of fine-tuning call Forward-Forward is a
    supervised head on every block: ``local_loss="supervised"`` with ``horizon=1``. Three rows for each sample take
    three times the memory of a batch, and BatchNorm's statistics are of all three.

    Args:
        variant: ``"goodness"``, ``"symba"`` or ``"channels"``.
        theta: the goodness between right and wrong (``goodness``).
        alpha: how steep ``symba`` is.
        classes: labels are ``0 … classes-1``; ``None`` for 10 where labels are written into images, and for as many as
            the model predicts with ``channels``.

    Raises:
        BpfxError: an argument out of its range; labels or images that do not fit ``classes``; a batch without one
            integer label per sample; fewer channels than classes.

    Sources: Hinton, *The Forward-Forward Algorithm: Some Preliminary Investigations*, 2022. Lee, Song, *SymBa:
    Symmetric Backpropagation-Free Contrastive Learning with Forward-Forward Algorithm for Optimizing Convergence*,
    2023. Papachristodoulou et al., *Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm*,
    AAAI 2024; Sun et al., *DeeperForward*, ICLR 2025.

    Example:
        >>> import torch
        >>> from bpfx.losses.protocol import Boundary, Given
        >>> loss, x, y = ForwardForward(classes=3), torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 1])
        >>> rows, targets = loss.expand([x, y], image=0, targets=[1])
        >>> rows.shape, targets[:6]
        (torch.Size([12, 1, 6, 6]), tensor([-100, -100,    0, -100, -100,    1]))
        >>> loss.head(Boundary.of(rows))(Given.of(rows)).shape
        torch.Size([])
    """

    name = "forward_forward"

    def __init__(
        self, variant: str = "goodness", theta: float = 2.0, alpha: float = 4.0, classes: int | None = None
    ) -> None:
        if variant not in VARIANTS:
            raise BpfxError(f"ForwardForward: variant={variant!r} is not known; pass one of {', '.join(VARIANTS)}")
        for what, number in {"theta": theta, "alpha": alpha}.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
                raise BpfxError(f"ForwardForward: {what}={number!r} must be a positive number")
        if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 2):
            raise BpfxError(f"ForwardForward: classes={classes!r} must be a whole number of at least 2")
        self.variant, self.theta, self.alpha = variant, float(theta), float(alpha)
        self.asked = classes
        self.classes = classes if classes is not None else 10
        self.rows = 1 if variant == "channels" else 3

    def head(self, boundary: Boundary) -> Head:
        fitting("forward_forward", boundary)
        if self.variant == "channels":
            return ChannelHead(boundary, self.asked)
        shape = boundary.targets[0].shape if len(boundary.targets) == 1 else ()
        # Labels that no sample has would be wrong ones that any network tells at a glance.
        if len(shape) == 2 and (shape[1] < self.classes or (self.asked is None and shape[1] != self.classes)):
            raise BpfxError(
                f"forward_forward draws wrong labels among {self.classes} classes, but the model predicts {shape[1]}; "
                f"pass bpfx.losses.ForwardForward(classes={shape[1]})"
            )
        return GoodnessHead(boundary.features, self.variant, self.theta, self.alpha)

    def expand(self, batch: list[Tensor], image: int, targets: Sequence[int]) -> list[Tensor]:
        x, y = batch[image], self._labels(batch, image, targets)
        wrong = (y + torch.randint(1, self.classes, y.shape, device=y.device, dtype=y.dtype)) % self.classes
        ignored = torch.full_like(y, IGNORED)
        made = [t.repeat_interleave(3, 0) for t in batch]
        made[image] = interleave([self.written(x, y), self.written(x, wrong), x])
        made[targets[0]] = interleave([ignored, ignored, y])
        return made

    def written(self, x: Tensor, labels: Tensor) -> Tensor:
        """Images with these labels in the first entries of each channel (of the whole, where there are no channels)."""
        flat = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(1)).clone()
        code = F.one_hot(labels.long(), self.classes).to(x.dtype)
        flat[:, :, : self.classes] = (code * x.flatten(1).amax(1, keepdim=True)).unsqueeze(1)
        return flat.view(x.shape)

    def _labels(self, batch: list[Tensor], image: int, targets: Sequence[int]) -> Tensor:
        """The one target, once it and the image are known to fit."""
        shown = ", ".join(f"{tuple(batch[i].shape)} {batch[i].dtype}" for i in targets) or "none"
        y = batch[targets[0]] if len(targets) == 1 else None
        if y is None or y.dim() != 1 or y.dtype not in (torch.int64, torch.int32):
            raise BpfxError(
                "forward_forward writes labels into images: it needs a loss_fn and a batch (images, labels) with one "
                f"integer label per sample; found targets: {shown}"
            )
        x = batch[image]
        entries = math.prod(x.shape[2:] if x.dim() > 2 else x.shape[1:])
        if entries < self.classes:
            raise BpfxError(
                f"forward_forward writes one entry for each of {self.classes} classes into every channel, but images "
                f"of shape {tuple(x.shape)} have {entries} in a channel; pass larger images"
            )
        low, high = (int(v) for v in torch.stack(torch.aminmax(y)).tolist()) if y.numel() else (0, 0)
        if low < 0 or high >= self.classes:
            bad = low if low < 0 else high
            advice = "samples that have labels"
            if low >= 0:
                advice = f"ForwardForward(classes=…) with how many the task has, {high + 1} or more"
            raise BpfxError(
                f"forward_forward writes labels 0 to {self.classes - 1} into images, but one is {bad}; pass {advice}"
            )
        return y


class GoodnessHead(Head):
    """Compares the goodness of rows with the right label and rows with a wrong one."""

    def __init__(self, features: Sequence[Feature], variant: str, theta: float, alpha: float) -> None:
        super().__init__()
        self.features, self.variant, self.theta, self.alpha = list(features), variant, theta, alpha
        first = self.features[0]
        words = f"gap of goodness, alpha {alpha:g}" if variant == "symba" else f"goodness, theta {theta:g}"
        self.description = f"{first.kind} {first.channels} → {words}"

    def forward(self, given: Given) -> Tensor:
        rows = [f.rows(v) for f, v in zip(self.features, given.features, strict=True)]
        if rows[0].shape[0] % 3:
            raise BpfxError(
                f"forward_forward takes three rows of every sample, made by expand(), but got {rows[0].shape[0]} rows"
            )
        goodness = sum(_wide(r).square().flatten(1).mean(1) for r in rows) / len(rows)
        assert isinstance(goodness, Tensor)
        right, wrong, _ = parts_of(goodness, 3)
        if self.variant == "symba":
            return F.softplus(-self.alpha * (right - wrong)).mean()
        return (F.softplus(self.theta - right) + F.softplus(wrong - self.theta)).mean()


class ChannelHead(Predictor):
    """Cross-entropy over the goodness of one group of channels for each class."""

    uses_task = False  # the goodness is made for one loss

    def __init__(self, boundary: Boundary, classes: int | None) -> None:
        super().__init__()
        if boundary.labels is None:
            raise BpfxError(
                "forward_forward's channels need one integer label per sample that the loss reads; this batch has none"
            )
        self.classes = classes if classes is not None else boundary.classes
        self.features, self.inputs = list(boundary.features), (boundary.labels,)
        for feature in self.features:
            if feature.channels < self.classes:
                raise BpfxError(
                    f"{feature.name} of shape {feature.shape} has {feature.channels} channels, channel counts that the "
                    f"goodness cannot group into {self.classes} classes; use at least {self.classes} channels, or "
                    "another local loss for this block"
                )
        if classes is not None and boundary.targets and boundary.classes != classes:
            raise BpfxError(
                f"forward_forward's channels would have {classes} groups, but the model predicts {boundary.classes} "
                "classes; leave classes out"
            )
        first = self.features[0]
        self.description = f"{first.kind} {first.channels} → goodness of {self.classes} groups of channels"

    def predict(self, *values: Tensor) -> Tensor:
        """The goodness of every class, (samples, classes)."""
        parts = [self._by_class(f.image(v)) for f, v in zip(self.features, values, strict=False)]
        return torch.stack(parts).mean(0)

    def forward(self, given: Given) -> Tensor:
        goodness = self.predict(*given.features)
        labels = given.inputs[self.inputs[0]].long()
        kept = (labels != IGNORED).sum().clamp(min=1)  # a mean over no label would be NaN
        return F.cross_entropy(goodness, labels, ignore_index=IGNORED, reduction="sum") / kept

    def _by_class(self, image: Tensor) -> Tensor:
        """Mean square of each group, (samples, classes). Neighbours form a group; the first ones have one more."""
        squares = _wide(image).square()
        energy = squares.flatten(2).mean(2) if image.dim() > 2 else squares
        size, larger = divmod(energy.shape[1], self.classes)
        cut = larger * (size + 1)
        groups = [energy[:, cut:].unflatten(1, (self.classes - larger, size)).mean(2)]
        if larger:
            groups.insert(0, energy[:, :cut].unflatten(1, (larger, size + 1)).mean(2))
        return torch.cat(groups, 1)


class LengthNorm(nn.Module):
    """Divides every sample by its root mean square over everything else, for models that are built for Forward-Forward.

    Args:
        eps: added to the mean square.

    Example:
        >>> import torch
        >>> LengthNorm()(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
        tensor([[0.8485, 1.1314],
                [0.8485, 1.1314]])
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        square = _wide(x).square().mean(list(range(1, x.dim())), keepdim=True)
        return x * torch.rsqrt(square + self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _wide(value: Tensor) -> Tensor:
    """In a precision that squares can be summed in."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
