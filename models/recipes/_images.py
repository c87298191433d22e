"""Batches of images for the recipes: read ahead by threads, normalised as ImageNet's, augmented on the device."""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfx import data
from bpfx.data._splits import LazySplit, Normalisation, TensorSplit

# What torchvision's weights were trained with, whatever the new data's own statistics are.
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PADDING = 8  # a random crop moves the image by up to an 8th of its side: 4 of CIFAR's 32 pixels


def augment(x: Tensor) -> Tensor:
    """Every image mirrored or not, then moved at random within a margin of zeros, the mean colour.

    Args:
        x: normalised images, `(B, C, S, S)`.

    Example:
        >>> augment(torch.ones(4, 3, 16, 16)).shape
        torch.Size([4, 3, 16, 16])
    """
    count, side = x.shape[0], x.shape[-1]
    mirrored = torch.rand(count, device=x.device) < 0.5
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    margin = side // PADDING
    padded = F.pad(x, (margin,) * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, count), device=x.device)
    rows = (top[:, None] + torch.arange(side, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(side, device=x.device))[:, None, None, :]
    images = torch.arange(count, device=x.device).view(-1, 1, 1, 1)
    channels = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return padded[images, channels, rows, columns]


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set as a recipe sees it: batches of float32 images `(B, 3, S, S)` and int64 labels `(B,)` on a device.

    Attributes:
        splits: the images, from `bpfx.data.load`.
        batch_size: images in a batch.
        device: where batches go.
        seed: of the order of the training images.
        workers: threads that read batches ahead.
        augmented: whether training images are cropped and mirrored at random.
    """

    splits: data.Splits
    batch_size: int
    device: str
    seed: int
    workers: int
    augmented: bool

    @staticmethod
    def load(arguments: argparse.Namespace) -> Images:
        """The images that the arguments of a recipe ask for.

        Raises:
            BpfxError: the data are unknown or missing.
        """
        splits = data.load(
            arguments.data, arguments.data_root, arguments.image_size, channels=3, download=arguments.download
        )
        train, test = _as_imagenet(splits.train), _as_imagenet(splits.test)
        splits = dataclasses.replace(
            splits, train=train.take(arguments.train_images), test=test.take(arguments.test_images)
        )
        size = min(arguments.batch_size, len(splits.train))
        return Images(
            splits, size, arguments.device, arguments.seed, arguments.workers, augmented=not arguments.no_augment
        )

    @property
    def num_classes(self) -> int:
        return self.splits.num_classes

    @property
    def image_size(self) -> int:
        return self.splits.image_size

    @property
    def train_count(self) -> int:
        return len(self.splits.train)

    @property
    def test_count(self) -> int:
        return len(self.splits.test)

    @property
    def batches_per_epoch(self) -> int:
        return data.batch_count(self.splits.train, self.batch_size, drop_last=True)

    def example(self) -> tuple[Tensor, Tensor]:
        """The first training images, for the conversion."""
        x, y = self.splits.train.fetch(torch.arange(self.batch_size))
        return x.to(self.device), y.to(self.device)

    def training(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in an order of its own, without the smaller last batch (BatchNorm cannot train on one image)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.train_count, generator=generator)
        for x, y in self._ahead(self.splits.train, order[: self.batches_per_epoch * self.batch_size]):
            yield (augment(x) if self.augmented else x), y

    def testing(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in their order."""
        return self._ahead(self.splits.test, torch.arange(self.test_count))

    def _ahead(self, split: data.Split, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: collections.deque[Future[tuple[Tensor, Tensor]]] = collections.deque()
        # Threads suffice: decoding and resizing let go of the interpreter's lock.
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for indices in order.split(self.batch_size):
                    waiting.append(pool.submit(split.fetch, indices))
                    if len(waiting) > self.workers:
                        yield self._moved(waiting.popleft())
                while waiting:
                    yield self._moved(waiting.popleft())
            finally:
                for future in waiting:
                    future.cancel()

    def _moved(self, future: Future[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = future.result()
        return x.to(self.device), y.to(self.device)


def _as_imagenet(split: data.Split) -> data.Split:
    assert isinstance(split, TensorSplit | LazySplit)
    return dataclasses.replace(split, normalisation=IMAGENET)
