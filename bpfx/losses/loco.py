"""LoCo: a contrastive loss between two views of a sample (or the task loss) on a deep decoder, with horizon 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, fitting
from bpfx.losses.supervised import LinearHead
from bpfx.losses.views import interleave

VIEWS = ("both", "second")
Augment = Callable[[Tensor], Tensor]


class LoCo(LocalLoss):
    """InfoNCE between two views of every sample, with overlapping blocks.

    Rows ``2i`` and ``2i + 1`` of the batch are the views of sample ``i``; ``z`` is what a deep MLP makes of the pooled
    output of the block, ``sim`` the cosine. With ``n`` rows, for row ``i`` and its other view ``j`` (NT-Xent)::

        -log( exp(sim(z_i, z_j) / temperature) / Σ_{k ≠ i} exp(sim(z_i, z_k) / temperature) ),  the mean over all rows

    All other rows are negatives, so small batches (and small micro-batches) make an easy task; a single sample has no
    negatives and the loss 0. The horizon is 2: a block is trained through the one behind it. It needs no labels.

    Args:
        augment: a function of a tensor of images that returns another of the same shape, dtype and device. It draws its
            random numbers itself, one set for every image.
        temperature: of the softmax; SimCLR's 0.1.
        supervised: the task loss on the decoder's prediction instead; one row for a sample, no ``augment``.
        hidden: width of the decoder's hidden layers.
        out: width of the embeddings.
        layers: linear layers of the decoder. The paper's point is that it is deep.
        views: ``"both"`` (SimCLR: two augmentations of a sample) or ``"second"`` (the sample and one augmentation).

    Instead of ``augment``, a batch may hold ``bpfx.losses.Views(first, second)`` in the place of its images. The task
    loss, where there is one, and BatchNorm see both views.

    Raises:
        BpfxError: an argument out of its range; no images and no way to a second view; an ``augment`` that returns
            something else than such images.

    Source: Xiong, Ren, Urtasun, *LoCo: Local Contrastive Representation Learning*, NeurIPS 2020; the loss is that of
    Chen, Kornblith, Norouzi, Hinton, *A Simple Framework for Contrastive Learning*, ICML 2020.

    Example:
        >>> import torch
        >>> from bpfx.losses.protocol import Boundary, Given
        >>> feature = torch.randn(8, 16, 5, 5)  # four samples, two views of each
        >>> head = LoCo().head(Boundary.of(feature))
        >>> head(Given.of(feature)).shape
        torch.Size([])
    """

    name = "loco"
    label_free = True
    horizon = 2
    rows = 2

    def __init__(
        self,
        augment: Augment | None = None,
        temperature: float = 0.1,
        supervised: bool = False,
        hidden: int = 512,
        out: int = 128,
        layers: int = 4,
        views: str = "both",
    ) -> None:
        if augment is not None and not callable(augment):
            raise BpfxError(
                f"LoCo: augment={augment!r} is a {type(augment).__name__}; pass a function of a tensor of images that "
                "returns another of the same shape"
            )
        if supervised and augment is not None:
            raise BpfxError("LoCo: supervised=True compares no views, so it takes no augment; leave one of them out")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < 1e6:
            raise BpfxError(f"LoCo: temperature={temperature!r} must be a positive number, such as 0.1")
        for what, number in {"hidden": hidden, "out": out, "layers": layers}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise BpfxError(f"LoCo: {what}={number!r} must be a whole number of at least 1")
        if views not in VIEWS:
            raise BpfxError(f"LoCo: views={views!r} is not known; pass 'both' or 'second'")
        self.augment, self.temperature, self.supervised, self.views = augment, float(temperature), supervised, views
        self.hidden, self.out, self.layers = hidden, out, layers
        if supervised:
            self.rows, self.label_free = 1, False

    def head(self, boundary: Boundary) -> Head:
        fitting("loco", boundary)
        if self.supervised:
            if not boundary.targets:
                raise BpfxError("LoCo(supervised=True) needs a task loss; pass targets, or leave supervised out")
            return DeepHead(boundary, self.hidden, self.layers)
        return ContrastiveHead(boundary.features, self.temperature, self.hidden, self.out, self.layers)

    def expand(self, batch: list[Tensor], image: int, targets: Sequence[int]) -> list[Tensor]:
        if image in targets:
            raise BpfxError("loco makes views of images, but only the target of this batch is a floating-point tensor")
        if self.augment is None:
            raise BpfxError(
                "loco compares two views of every sample and this batch has one: pass bpfx.losses.LoCo(augment=...) "
                "with a function that augments a tensor of images, or bpfx.losses.Views(first, second) in their place"
            )
        x = batch[image]
        pair = [self._augmented(x) if self.views == "both" else x, self._augmented(x)]
        return [interleave(pair) if i == image else t.repeat_interleave(2, 0) for i, t in enumerate(batch)]

    def _augmented(self, x: Tensor) -> Tensor:
        assert self.augment is not None
        with torch.no_grad():
            found = self.augment(x.clone())  # it may write into what it gets, and the batch is the caller's
        if not isinstance(found, Tensor):
            raise BpfxError(
                f"LoCo's augment returned a {type(found).__name__}; it must return a tensor of images {tuple(x.shape)}"
            )
        if (found.shape, found.dtype, found.device) != (x.shape, x.dtype, x.device):
            raise BpfxError(
                f"LoCo's augment made {tuple(found.shape)} {found.dtype} on {found.device} of images "
                f"{tuple(x.shape)} {x.dtype} on {x.device}; it must keep all three"
            )
        return found


def decoder(width: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    """An MLP of that many linear layers with ReLUs between them."""
    sizes = [width, *[hidden] * (layers - 1), out]
    parts: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        linear = nn.Linear(a, b)
        # torch's own start shrinks what differs between samples by more than half in every layer, and the biases stay.
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class ContrastiveHead(Head):
    """Pool, decode, and tell the other view of a sample from all other rows."""

    def __init__(self, features: Sequence[Feature], temperature: float, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        self.features, self.temperature = list(features), temperature
        width = sum(f.channels for f in self.features)
        self.decoder = decoder(width, hidden, out, layers)
        self.description = (
            f"{self.features[0].kind} {width} → {layers}-layer MLP → {out}, contrastive, temperature {temperature:g}"
        )
        self.place(self.features[0])

    def forward(self, given: Given) -> Tensor:
        pooled = [f.pooled(v) for f, v in zip(self.features, given.features, strict=True)]
        z = self.decoder(torch.cat(pooled, 1))
        return nt_xent(z, self.temperature)


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """The normalised and temperature-scaled cross-entropy of embeddings, rows ``2i`` and ``2i + 1`` a pair."""
    z = z if z.dtype in (torch.float32, torch.float64) else z.float()
    z = F.normalize(z, dim=1, eps=1e-6)
    row = torch.arange(z.shape[0], device=z.device)
    itself = row[:, None] == row[None, :]
    # The lowest number and not -inf: a lone row has nothing else, and its softmax must be finite.
    scores = (z @ z.t() / temperature).masked_fill(itself, torch.finfo(z.dtype).min)
    other = row ^ 1
    # An odd number of rows leaves one without a partner; it is no more than a negative.
    paired = torch.where(other < z.shape[0], other, -100)
    return F.cross_entropy(scores, paired, reduction="sum") / z.shape[0]


class DeepHead(LinearHead):
    """The linear prediction head with a deep decoder in the place of every linear layer."""

    def __init__(self, boundary: Boundary, hidden: int, layers: int) -> None:
        super().__init__(boundary.features, boundary.targets)
        shapes = [(m.in_features, m.out_features) for m in self.linears if isinstance(m, nn.Linear)]
        self.linears = nn.ModuleList(decoder(a, hidden, b, layers) for a, b in shapes)
        self.description = f"{self.description.removesuffix(' linear')} by a {layers}-layer MLP"
        self.place(boundary.feature)
