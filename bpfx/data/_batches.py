"""The order in which samples are seen: a function of seed and epoch, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bpfx.data._splits import Split
from bpfx.errors import BpfxError

__all__ = ["batch_count", "batches"]


def batch_count(split: Split, batch_size: int, drop_last: bool = False) -> int:
    """Number of batches in one epoch.

    Args:
        split: the samples.
        batch_size: samples per batch, at least 1.
        drop_last: leave out the last batch when it is smaller than the others (never the only one).

    Raises:
        BpfxError: the split is empty or `batch_size` is not positive.

    Example:
        >>> from bpfx import data
        >>> data.batch_count(data.load().test, batch_size=300), data.batch_count(data.load().test, 300, drop_last=True)
        (7, 6)
    """
    if batch_size < 1:
        raise BpfxError(f"The batch size must be at least 1, not {batch_size}.")
    if len(split) == 0:
        raise BpfxError("The data hold no samples, so there is nothing to make batches of.")
    full, rest = divmod(len(split), batch_size)
    return full if rest == 0 or (drop_last and full > 0) else full + 1


def batches(
    split: Split,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of one epoch, from batch `start` on; the same arguments give the same batches, bit for bit.

    Args:
        split: the samples.
        batch_size: samples per batch.
        seed: shuffles the samples, differently in every epoch; None keeps their order.
        epoch: 0 for the first pass over the data.
        start: number of batches to skip without loading them, for a resumed run.
        drop_last: leave out a smaller last batch.

    Yields:
        `(x, y)`: float32 images of shape `(B, channels, image_size, image_size)` and int64 labels of shape `(B,)`.

    Raises:
        BpfxError: as `batch_count`.

    Example:
        >>> import torch
        >>> from bpfx import data
        >>> test = data.load().test
        >>> whole = [y for _, y in data.batches(test, 500, seed=1, epoch=3)]
        >>> resumed = [y for _, y in data.batches(test, 500, seed=1, epoch=3, start=2)]
        >>> len(whole), len(resumed), torch.equal(whole[2], resumed[0])
        (4, 2, True)
    """
    count = batch_count(split, batch_size, drop_last)
    order = torch.arange(len(split)) if seed is None else _order(len(split), seed, epoch)
    for index in range(start, count):
        yield split.fetch(order[index * batch_size : (index + 1) * batch_size])


def _order(samples: int, seed: int, epoch: int) -> torch.Tensor:
    # Its own generator, so that neither drawing from the global one nor a resume changes the order.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)
