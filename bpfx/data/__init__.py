"""Image classification data for `bpfx train`, the benchmarks and the tests.

A bundled real subset of Fashion-MNIST needs no download and no NumPy; any torchvision classification set and any image
folder load by name. Batches come in an order that depends only on the seed and the epoch, so a run can be resumed at
any iteration and sees the same samples.

Example:
    >>> from bpfx import data
    >>> splits = data.load()
    >>> len(splits.train), len(splits.test), splits.num_classes, splits.channels, splits.image_size
    (6000, 2000, 10, 1, 28)
    >>> x, y = next(data.batches(splits.train, batch_size=100, seed=0))
    >>> x.shape, x.dtype, y.dtype
    (torch.Size([100, 1, 28, 28]), torch.float32, torch.int64)
"""

from bpfx.data._batches import batch_count, batches
from bpfx.data._load import BUNDLED, load
from bpfx.data._splits import Split, Splits

__all__ = ["BUNDLED", "Split", "Splits", "batch_count", "batches", "load"]
