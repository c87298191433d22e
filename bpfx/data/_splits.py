"""Samples that become a batch when it is needed: from tensors in memory, or from images that are decoded then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bpfx.errors import BpfxError

__all__ = ["LazySplit", "Normalisation", "Split", "Splits", "TensorSplit", "to_channels"]


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels in [0, 1], as tuples of one entry per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixels` in [0, 1], of shape `(B, C, H, W)`, with mean 0 and standard deviation 1 over the training set."""
        shape = (1, -1, 1, 1)
        return (pixels - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)

    @staticmethod
    def of(images: torch.Tensor) -> Normalisation:
        """Measured on uint8 `images` of shape `(N, C, H, W)`, in pieces so that no float copy of them all is made."""
        total = torch.zeros(images.shape[1], dtype=torch.float64)
        squares = torch.zeros_like(total)
        for piece in images.split(1000):
            pixels = piece.to(torch.float64) / 255
            total += pixels.sum(dim=(0, 2, 3))
            squares += pixels.square().sum(dim=(0, 2, 3))
        count = images.numel() / images.shape[1]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))


class Split(ABC):
    """Labelled images of one kind, training or test; `len(split)` of them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples at `indices` (int64, shape `(B,)`): float32 images `(B, C, S, S)` and int64 labels `(B,)`."""

    @abstractmethod
    def take(self, count: int | None) -> Split:
        """At most `count` samples, spread evenly over the split; all of them for None."""


@dataclass(frozen=True)
class TensorSplit(Split):
    """All images in memory as uint8; resized and normalised per batch, since a float copy at 224 px would not fit.

    Args:
        images: uint8, shape `(N, C, H, W)`.
        labels: int64, shape `(N,)`.
        normalisation: of the training images.
        image_size: side of the images in a batch, pixels.
        channels: channels of the images in a batch; a grey image is repeated, a coloured one averaged to grey.
    """

    images: torch.Tensor
    labels: torch.Tensor
    normalisation: Normalisation
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.normalisation.apply(self.images[indices].float() / 255)
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        return to_channels(x, self.channels), self.labels[indices]

    def take(self, count: int | None) -> TensorSplit:
        chosen = _spread(len(self), count)
        return TensorSplit(self.images[chosen], self.labels[chosen], self.normalisation, self.image_size, self.channels)


@dataclass(frozen=True)
class LazySplit(Split):
    """Images decoded when a batch asks for them.

    Args:
        read: gives the image (a `PIL.Image.Image`) and the class index of a sample.
        items: what `read` is called with, one per sample.
        normalisation: applied to the pixels in [0, 1].
        image_size: the shorter side is scaled to it and the centre is cut out, pixels.
        channels: 1 or 3.
    """

    read: Callable[[Any], tuple[Any, int]]
    items: Sequence[Any]
    normalisation: Normalisation
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [self.read(self.items[index]) for index in indices.tolist()]
        x = torch.stack([self._pixels(image) for image, _ in samples])
        return self.normalisation.apply(x), torch.tensor([label for _, label in samples])

    def take(self, count: int | None) -> LazySplit:
        items = [self.items[index] for index in _spread(len(self), count).tolist()]
        return LazySplit(self.read, items, self.normalisation, self.image_size, self.channels)

    def _pixels(self, image: Any) -> torch.Tensor:
        image = image.convert("L" if self.channels == 1 else "RGB")
        scale = self.image_size / min(image.size)
        width, height = (max(self.image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), resample=2)  # PIL's bilinear, which filters when it shrinks
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.image_size, self.image_size, self.channels).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Splits:
    """A data set: what to train on, what to test on, and what a model for it must look like.

    Attributes:
        train: training samples.
        test: samples that are never trained on.
        classes: names of the classes, in the order of the labels.
        channels: channels of an image in a batch.
        image_size: side of an image in a batch, pixels.
        name: what it was loaded as.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    channels: int
    image_size: int
    name: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def to_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Images of shape `(B, C, H, W)` with `channels` channels: grey ones repeated, coloured ones averaged to grey.

    Raises:
        BpfxError: neither is possible.
    """
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1).contiguous()
    if channels == 1:
        return x.mean(dim=1, keepdim=True)
    raise BpfxError(f"Images of {x.shape[1]} channels cannot be turned into images of {channels} channels.")


def _spread(total: int, count: int | None) -> torch.Tensor:
    if count is None or count >= total:
        return torch.arange(total)
    return (torch.arange(count, dtype=torch.float64) * (total / count)).long()
