"""Information propagation: a block keeps what rebuilds the image, and gains what tells the classes apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.dgl import BatchNorm, image_of
from bpfx.losses.predsim import classes_and_labels, unit, widened
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, Predictor, Target, average, fitting
from bpfx.losses.supervised import LinearHead

Pair = tuple[float, float]
CONTRASTS = ("ce", "supcon")
TEMPERATURE = 0.07
EMBEDDING = 128


def unit_range(image: Tensor) -> Tensor:
    """Every sample of ``(samples, …)`` stretched to 0 … 1; a constant one becomes 0."""
    rows = image.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    width = high - low
    return ((rows - low) / torch.where(width > 0, width, 1.0)).view_as(image)


def supcon(directions: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss: every sample's others of its class against all others.

    ``mean_i −1/|P(i)| Σ_{p∈P(i)} log softmax_{a≠i}(z_i·z_a/τ)_p`` over the samples with any of their class (``P(i)``).

    Args:
        directions: ``(samples, features)`` of length 1.
        labels: ``(samples,)``; rows with a negative one (ignored) take no part.
        temperature: τ.
    """
    known = labels >= 0
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device) & known[:, None] & known
    positives = others & (labels[:, None] == labels)
    # Not minus infinity: a row without others would be infinite minus infinite.
    logits = (directions @ directions.T / temperature).masked_fill(~others, -1e4)
    logs = F.log_softmax(logits, 1).masked_fill(~positives, 0.0)
    counts = positives.sum(1)
    anchors = (counts > 0).sum().clamp_min(1)
    return -(logs.sum(1) / counts.clamp_min(1)).sum() / anchors


class Maps(nn.Module):
    """What crosses as one feature map: several ones are resized to the largest and joined."""

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.features = list(features)
        self.channels = sum(f.channels for f in self.features)

    def forward(self, *values: Tensor) -> Tensor:
        images = [image_of(f, v) for v, f in zip(values, self.features, strict=True)]
        if len(images) == 1:
            return images[0]
        largest = max((i.shape[2:] for i in images), key=math.prod)
        return torch.cat([_resize(i, largest) for i in images], 1)


def _resize(image: Tensor, sides: Sequence[int]) -> Tensor:
    return F.interpolate(image, size=tuple(sides), mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """``(maps, image) -> reconstruction loss``."""

    def __init__(self, channels: int, image: Feature) -> None:
        super().__init__()
        self.image = image
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1),
            BatchNorm(12),
            nn.ReLU(),
            nn.Conv2d(12, image.channels, 3, padding=1),
        )

    def forward(self, maps: Tensor, image: Tensor) -> Tensor:
        wanted = unit_range(widened(image_of(self.image, image)))
        logits = widened(self.layers(_resize(maps, wanted.shape[2:])))
        # The sigmoid is inside: its logarithm alone would overflow.
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))


def _convolutions(channels: int) -> nn.Sequential:
    layers = nn.Sequential()
    for before, after, stride in ((channels, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers.extend([nn.Conv2d(before, after, 3, stride, 1), BatchNorm(after), nn.ReLU()])
    return layers


class Classifier(nn.Module):
    """Convolutions, pool, 128 features, prediction; without the pool where the prediction is one per pixel."""

    def __init__(self, maps: Maps, targets: Sequence[Target]) -> None:
        super().__init__()
        first = maps.features[0]
        self.convolutions = _convolutions(maps.channels)
        self.dense = all(len(t.shape) == 4 for t in targets)
        self.linear = nn.Linear(64, EMBEDDING)
        shape = (first.shape[first.batch_dim], EMBEDDING, *((1, 1) if self.dense else ()))
        self.last = LinearHead([dataclasses.replace(first, shape=shape, batch_dim=0, channel_dim=1)], targets)

    def forward(self, maps: Tensor) -> Tensor | tuple[Tensor, ...]:
        rows = self.convolutions(maps).movedim(1, -1)
        hidden = F.relu(self.linear(rows if self.dense else average(rows)))
        return self.last.predict(hidden.movedim(-1, 1))


class Embedding(nn.Module):
    """Convolutions, pool, 128 features of length 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = _convolutions(channels)
        self.linear = nn.Linear(64, EMBEDDING)

    def forward(self, maps: Tensor) -> Tensor:
        return unit(widened(self.linear(average(self.convolutions(maps).movedim(1, -1)))))


class _InfoPro(Head):
    """What both heads of :class:`InfoPro` share: the weighted reconstruction."""

    def __init__(self, maps: Maps, decoder: Decoder | None, weights: Pair, image: int | None) -> None:
        super().__init__()
        self.maps, self.decoder, self.weights, self.image = maps, decoder, weights, image
        self.inputs = (image,) if image is not None else ()

    def _describe(self, task: str) -> None:
        named = zip(("reconstruction", task), self.weights, strict=True)
        terms = " + ".join(f"{w:g} {name}" for name, w in named if w)
        self.description = f"image {self.maps.channels} → {terms}"
        self.place(self.maps.features[0])

    def _reconstruction(self, maps: Tensor, given: Given) -> list[Tensor]:
        if self.decoder is None or self.image is None:
            return []
        return [self.weights[0] * self.decoder(maps, given.inputs[self.image])]


class ClassifierHead(_InfoPro, Predictor):
    """Reconstruction and the task loss of a prediction."""

    def __init__(
        self, maps: Maps, decoder: Decoder | None, weights: Pair, image: int | None, targets: Sequence[Target]
    ) -> None:
        super().__init__(maps, decoder, weights, image)
        self.classifier = Classifier(maps, targets)
        self._describe("task")

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = self.classifier(self.maps(*values[: len(self.maps.features)]))
        return found

    def forward(self, given: Given) -> Tensor:
        maps = self.maps(*given.features)
        found = self.classifier(maps)
        task = given.judged(*(found if isinstance(found, tuple) else (found,)))
        return sum(self._reconstruction(maps, given), start=self.weights[1] * task)


class ContrastHead(_InfoPro):
    """Reconstruction and the supervised contrastive loss, or either."""

    def __init__(
        self, maps: Maps, decoder: Decoder | None, weights: Pair, image: int | None, labels: int | None
    ) -> None:
        super().__init__(maps, decoder, weights, image)
        self.labels = labels
        self.embedding = Embedding(maps.channels) if labels is not None else None
        if labels is not None:
            self.inputs = (*self.inputs, labels)
        self._describe("SupCon")

    def forward(self, given: Given) -> Tensor:
        maps = self.maps(*given.features)
        terms = self._reconstruction(maps, given)
        if self.embedding is not None and self.labels is not None:
            terms.append(self.weights[1] * supcon(self.embedding(maps), given.inputs[self.labels]))
        return sum(terms[1:], start=terms[0])


class InfoPro(LocalLoss):
    r"""Keep the image, gain the classes.

    .. math:: λ_1\,\text{BCE}(\text{decoder}(h), \text{image}) + λ_2\,(\text{task}(\text{head}(h)) \text{ or SupCon})

    Both weights go linearly from the first block to the last but one (the last has the task loss itself).

    The decoder resizes the feature map to the image (bilinear), then 3×3 convolution → 12, batch norm, ReLU, 3×3 →
    the image's channels, sigmoid. The task head: three 3×3 convolutions (C → 32 stride 2, 32 → 64 stride 2, 64 → 64),
    each with batch norm and ReLU, mean over the positions, linear → 128; from there ReLU and a linear prediction that
    the task loss judges, or, for the supervised contrastive loss (τ = .07), the 128 features at length 1. A term whose
    weight is 0 at a block is not built there.

    The image is the first floating-point input, stretched to 0 … 1 sample by sample: the cross-entropy needs such
    targets, inputs are normalised as a rule, and with which mean and deviation is not known here.

    Args:
        reconstruction: λ₁ at the first block and at the last but one; ``None`` for 5 to 0, and for 5 everywhere where
            there is nothing else to train by.
        task: λ₂ likewise. ``(0, 0)`` trains without labels (``label_free``). The defaults, 5 to 0 and 0.5 to 1, are
            those that the authors use for ResNet-110 on CIFAR-10 in two blocks at the first one (5, 0.5), and in eight
            blocks at the last but one (0, 1); they tune them for every number of blocks.
        contrast: ``"ce"`` for the task loss, whatever it is, or ``"supcon"``.

    Shapes: feature maps of two spatial dimensions of any size, an image of any size. ``"supcon"`` needs predictions
    ``(samples, classes)`` and one integer label per sample; rows with a negative label are left out.

    A batch of one sample is normalised by the running statistics in batch norms that see one value per feature.

    Source: Wang, Ni, Song, Yang, Huang, *Revisiting Locally Supervised Learning: an Alternative to End-to-end
    Training*, ICLR 2021; the contrastive loss: Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020.

    Raises:
        BpfxError: an argument is out of range; in :meth:`head`, that what crosses is no feature map, that the model's
            input is no image, that there is nothing to predict or no labels, or that both weights are 0 at a block.

    Example:
        >>> import torch
        >>> from bpfx.losses import Boundary, Given
        >>> from bpfx.losses.infopro import InfoPro
        >>> image, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
        >>> feature = torch.randn(8, 6, 9, 9)
        >>> head = InfoPro().head(Boundary.of(feature, classes=3, inputs=[image, labels], labels=1))
        >>> task = lambda scores: torch.nn.functional.cross_entropy(scores, labels)
        >>> head(Given.of(feature, [image, labels], task=task)).shape
        torch.Size([])
    """

    name = "infopro"

    def __init__(self, reconstruction: Pair | None = None, task: Pair = (0.5, 1.0), contrast: str = "ce") -> None:
        self.task = _pair("task", task)
        chosen = reconstruction if reconstruction is not None else (5.0, 0.0 if any(self.task) else 5.0)
        self.reconstruction = _pair("reconstruction", chosen)
        if contrast not in CONTRASTS:
            raise BpfxError(f"InfoPro(contrast={contrast!r}): pass one of {', '.join(map(repr, CONTRASTS))}")
        if not any(self.reconstruction) and not any(self.task):
            raise BpfxError("InfoPro(reconstruction=(0, 0), task=(0, 0)): nothing is left to train by; raise one")
        self.contrast = contrast
        self.label_free = not any(self.task)

    def weights(self, index: int, count: int) -> Pair:
        """λ₁ and λ₂ of a block; of the model's output, which is the one boundary of one, those at the end."""
        way = min(index / (count - 2), 1.0) if count > 2 else float(count == 1)
        first, second = ((1 - way) * a + way * b for a, b in (self.reconstruction, self.task))
        return first, second

    def head(self, boundary: Boundary) -> Head:
        fitting("infopro", boundary, "feature maps", most=5)
        for f in boundary.features:
            if f.kind != "image" or len(f.shape) != 4:
                kind = "a feature map of other dimensions" if f.kind == "image" else f.kind
                raise BpfxError(
                    "infopro rebuilds the image from feature maps (samples, channels, height, width), but what crosses "
                    f"behind block {boundary.index} is {kind}: {f.name} {f.shape}; use 'dgl' or 'predsim' there"
                )
        weights = self.weights(boundary.index, boundary.count)
        if not any(weights):
            where = "the model's output" if boundary.count == 1 else f"block {boundary.index} of {boundary.count}"
            raise BpfxError(
                f"infopro has both weights 0 at {where} (reconstruction="
                f"{self.reconstruction}, task={self.task}); raise one of them"
            )
        maps = Maps(boundary.features)
        image = _image(boundary) if weights[0] else None
        decoder = Decoder(maps.channels, boundary.inputs[image]) if image is not None else None
        if weights[1] and self.contrast == "ce":
            if not boundary.targets:
                raise BpfxError(
                    "infopro's second term is judged by the task loss, but there are no predictions to make; pass a "
                    "loss_fn and targets, or InfoPro(task=(0, 0))"
                )
            return ClassifierHead(maps, decoder, weights, image, boundary.targets)
        labels = None
        if weights[1]:
            _, labels = classes_and_labels("infopro, contrast='supcon',", boundary, "use contrast='ce'")
        return ContrastHead(maps, decoder, weights, image, labels)


def _pair(name: str, value: Pair) -> Pair:
    numbers = isinstance(value, (tuple, list)) and len(value) == 2
    if not numbers or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise BpfxError(f"InfoPro({name}={value!r}): pass two weights, at the first block and at the last but one")
    if not all(0 <= v < float("inf") for v in value):
        raise BpfxError(f"InfoPro({name}={value!r}): weights must be finite and not negative")
    return float(value[0]), float(value[1])


def _image(boundary: Boundary) -> int:
    try:
        found = boundary.input()
    except BpfxError as error:
        raise BpfxError(f"infopro rebuilds the input image, but {error}; use 'dgl' or 'predsim'") from None
    image = boundary.inputs[found]
    if len(image.shape) != 4:
        raise BpfxError(
            "infopro rebuilds the input image (samples, channels, height, width), but the model's input is "
            f"{image.name} {image.shape}; use 'dgl' or 'predsim'"
        )
    return found
