"""Prediction and similarity matching: samples of one class shall have similar features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.dgl import image_of, pool
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, Predictor, Target, fitting
from bpfx.losses.supervised import LinearHead

MODES = ("both", "pred", "sim")
LIMIT = 2048  # features that the linear prediction reads
_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def widened(value: Tensor) -> Tensor:
    """The value, in float32 where its own dtype is half as wide."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def unit(rows: Tensor, floor: Tensor | None = None) -> Tensor:
    """Rows of length 1; a row of length zero stays zero and gets no gradient.

    Args:
        rows: one vector per sample.
        floor: ``(samples, 1)``; rows without a larger entry than this count as zero.
    """
    least = torch.finfo(rows.dtype).tiny ** 0.5  # the square of what is smaller is zero
    largest = rows.detach().abs().amax(1, keepdim=True)
    dead = largest <= (floor.clamp_min(least) if floor is not None else least)
    # Their direction is that of any multiple of them: small ones would overflow in the backward.
    rows = rows / torch.where(dead, 1.0, largest)
    squares = rows.square().sum(1, keepdim=True)
    return torch.where(dead, 0.0, rows * torch.where(dead, 1.0, squares).rsqrt())


def similarity(rows: Tensor) -> Tensor:
    """Cosine similarities of all pairs of rows, each centred over its own features: ``(samples, samples)``."""
    # Centring what is constant leaves rounding noise, which must not be blown up to length 1.
    noise = 8 * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(1, keepdim=True)
    directions = unit(rows - rows.mean(1, keepdim=True), noise)
    return directions @ directions.T


def spread(positions: Tensor) -> Tensor:
    """Standard deviation over the last dimension, with gradient zero where it is zero.

    A single position has no deviation, its value stands for it.
    """
    if positions.shape[-1] == 1:
        return positions.squeeze(-1)
    variance = positions.var(-1)
    flat = variance <= 0
    return torch.where(flat, 0.0, torch.where(flat, 1.0, variance).sqrt())


class Similarity(nn.Module):
    """``MSE(S(conv(h)), S(onehot))``, over the samples whose label is one of the classes."""

    classes: Tensor

    def __init__(self, features: Sequence[Feature], classes: int) -> None:
        super().__init__()
        self.features = list(features)
        self.maps = nn.ModuleList(_map(f) for f in self.features)
        self.register_buffer("classes", torch.arange(classes, device=features[0].device), persistent=False)

    def forward(self, values: Sequence[Tensor], labels: Tensor) -> Tensor:
        rows = [_rows(v, f, m) for v, f, m in zip(values, self.features, self.maps, strict=True)]
        onehot = labels[:, None] == self.classes
        mine = similarity(torch.cat(rows, 1))
        wanted = similarity(onehot.to(mine.dtype))
        known = onehot.any(1).to(mine.dtype)
        pairs = known[:, None] * known
        return ((mine - wanted).square() * pairs).sum() / pairs.sum().clamp_min(1)


def _map(feature: Feature) -> nn.Module:
    c = feature.channels
    if feature.kind == "image":
        return _CONV[len(feature.shape) - 2](c, c, 3, padding=1, bias=False)
    return nn.Linear(c, c, bias=False)


def _rows(value: Tensor, feature: Feature, mapping: nn.Module) -> Tensor:
    """One vector per sample: what the map makes of a vector, its spread over the positions of everything else."""
    if feature.kind == "image":
        return spread(widened(mapping(image_of(feature, value))).flatten(2))
    mapped = widened(mapping(feature.rows(value)))
    return mapped if feature.kind == "vector" else spread(mapped.transpose(1, 2))


class Pooled(Predictor):
    """Average pool until at most 2048 features are left, then one linear layer that starts at zero."""

    def __init__(self, features: Sequence[Feature], targets: Sequence[Target]) -> None:
        super().__init__()
        self.features = list(features)
        self.positional = any(len(t.shape) > 2 or t.batch_dim is None for t in targets)
        self.sides = [_sides(f, LIMIT // len(features)) for f in self.features]
        width = sum(f.channels * math.prod(s) for f, s in zip(self.features, self.sides, strict=True))
        flat = dataclasses.replace(features[0], shape=(1, width), batch_dim=0, channel_dim=1)
        self.linear = LinearHead(features if self.positional else [flat], targets)
        for parameter in self.linear.linears.parameters():
            nn.init.zeros_(parameter)
        sides = "+".join("×".join(map(str, s)) for s in self.sides if s)
        self.description = "linear from zero" if self.positional or not sides else f"pool {sides}, linear from zero"

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = values[: len(self.features)]
        if self.positional:
            return self.linear.predict(*values)
        pooled = [
            (pool(image_of(f, v), s) if s else f.image(v)).flatten(1)
            for v, f, s in zip(values, self.features, self.sides, strict=True)
        ]
        return self.linear.predict(torch.cat(pooled, 1))


def _sides(feature: Feature, limit: int) -> list[int]:
    """Sides of the positions to pool to: the longest is halved until the features fit."""
    sides = [n for i, n in enumerate(feature.shape) if i not in (feature.batch_dim, feature.channel_dim)]
    while feature.channels * math.prod(sides) > limit and max(sides, default=1) > 1:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return sides


class PredictionHead(Predictor):
    """The task loss of a pooled linear prediction, with the similarity loss where there is one."""

    def __init__(
        self, features: Sequence[Feature], prediction: Pooled, similar: Similarity | None, beta: float
    ) -> None:
        super().__init__()
        self.prediction, self.similar, self.beta = prediction, similar, beta
        self.description = f"{_shown(features)} → {prediction.description}"
        if similar is not None:
            self.description += f" + similarity, β={beta:g}"
        self.place(features[0])

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.prediction.predict(*values)

    def forward(self, given: Given) -> Tensor:
        task = super().forward(given)
        if self.similar is None:
            return task
        return (1 - self.beta) * task + self.beta * self.similar(given.features, given.inputs[self.inputs[0]])


class SimilarityHead(Head):
    """The similarity loss alone."""

    def __init__(self, features: Sequence[Feature], similar: Similarity) -> None:
        super().__init__()
        self.similar = similar
        self.description = f"{_shown(features)} → similarity"
        self.place(features[0])

    def forward(self, given: Given) -> Tensor:
        found: Tensor = self.similar(given.features, given.inputs[self.inputs[0]])
        return found


def _shown(features: Sequence[Feature]) -> str:
    return f"{features[0].kind} {'+'.join(str(f.channels) for f in features)}"


class PredSim(LocalLoss):
    r"""A prediction, and features that are alike where the classes are.

    .. math:: (1-β)\,\text{task}(\text{pred}(h)) + β\,\text{MSE}\big(S(\text{conv}(h)),\, S(\text{onehot}(y))\big)

    ``S`` is the matrix of cosine similarities between the samples' vectors, each centred over its own features. A
    feature map becomes a vector by its standard deviation over the positions, channel by channel; tokens likewise, over
    the tokens. With one position, where nothing deviates, the values themselves are taken.

    ``conv`` is a 3×3 convolution C → C without bias, for tokens and vectors a linear layer without bias. ``pred``
    averages the longest side in halves until 2048 features are left, and maps them linearly; it starts at zero, so in
    the first step the block is moved by the similarities alone (with ``mode="pred"``: not at all). Predictions per
    token or pixel are a linear map of every position. Where several tensors cross, their vectors are joined.

    Constant features and zero vectors are similar to nothing (0) and get no gradient from the similarities. Rows whose
    label is none of the classes, such as an ignored -100, are left out of them.

    Args:
        beta: weight of the similarities, from 0 to 1; the paper's .99 because they are much smaller than a task loss.
        mode: ``"both"``, ``"pred"`` (the task loss alone) or ``"sim"`` (the similarities alone), both without a weight.

    Shapes: features of 2 to 5 dimensions. Similarities need predictions ``(samples, classes)`` and one integer label
    per sample among the inputs.

    Source: Nøkland, Eidnes, *Training Neural Networks with Local Error Signals*, ICML 2019.

    Raises:
        BpfxError: ``beta`` or ``mode`` is none of these; in :meth:`head`, that there are no classes or labels, or that
            what crosses is no floating-point tensor of 2 to 5 dimensions.

    Example:
        >>> import torch
        >>> from bpfx.losses import Boundary, Given
        >>> from bpfx.losses.predsim import PredSim
        >>> feature, labels = torch.randn(8, 6, 9, 9), torch.arange(8) % 3
        >>> head = PredSim().head(Boundary.of(feature, classes=3, inputs=[labels], labels=0))
        >>> task = lambda scores: torch.nn.functional.cross_entropy(scores, labels)
        >>> head(Given.of(feature, [labels], task=task)).shape
        torch.Size([])
    """

    name = "predsim"

    def __init__(self, beta: float = 0.99, mode: str = "both") -> None:
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
            raise BpfxError(f"PredSim(beta={beta!r}): pass the weight of the similarities, from 0 to 1")
        if mode not in MODES:
            raise BpfxError(f"PredSim(mode={mode!r}): pass one of {', '.join(map(repr, MODES))}")
        self.beta, self.mode = float(beta), mode

    def head(self, boundary: Boundary) -> Head:
        fitting("predsim", boundary, most=5)
        features = boundary.features
        if self.mode != "sim" and not boundary.targets:
            raise BpfxError(
                f"predsim, mode {self.mode!r}, is judged by the task loss, but there are no predictions to make; pass "
                "a loss_fn and targets, or use a label-free local loss"
            )
        similar = self._similarity(boundary) if self.mode != "pred" else None
        if self.mode == "sim":
            assert similar is not None
            head: Head = SimilarityHead(features, similar)
        else:
            head = PredictionHead(features, Pooled(features, boundary.targets), similar, self.beta)
        if similar is not None:
            assert boundary.labels is not None
            head.inputs = (boundary.labels,)
        return head

    def _similarity(self, boundary: Boundary) -> Similarity:
        classes, _ = classes_and_labels("predsim", boundary, "use PredSim(mode='pred') or 'supervised'")
        return Similarity(boundary.features, classes)


def classes_and_labels(name: str, boundary: Boundary, otherwise: str) -> tuple[int, int]:
    """How many classes there are, and which input holds the label of every sample.

    Raises:
        BpfxError: either is not there.
    """
    try:
        classes = boundary.classes
    except BpfxError as error:
        raise BpfxError(f"{name} compares samples by their class: {error}; {otherwise}") from None
    if boundary.labels is None:
        raise BpfxError(
            f"{name} compares samples by their class, but no input of the loss is one integer label per sample; pass "
            f"targets as a 1-d tensor of class indices, or {otherwise}"
        )
    return classes, boundary.labels
