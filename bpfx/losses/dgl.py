"""The task loss on the prediction of a small perceptron behind strong pooling (decoupled greedy learning)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, Feature, LocalLoss, Predictor, Target, average, fitting
from bpfx.losses.supervised import LinearHead

DEPTH = 3  # layers of either half
_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of ``(samples, features, *any positions)``, usable on a single value per feature.

    A single value has no spread of its own (torch refuses it while training), so it is normalised by the running
    statistics, as in evaluation, and leaves them as they are. A last batch of one sample therefore trains like the
    others.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected samples and features, got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def image_of(feature: Feature, value: Tensor) -> Tensor:
    """``feature.image(value)``, of sides that a compiler takes as constants where they are the example's.

    ``torch.compile`` shares one piece of code among the heads of all boundaries, so it holds their sides for variable,
    and inductor cannot order the strides of a convolution's or a pool's input then. Comparing sides fixes them; others
    than the example's still run.
    """
    image = feature.image(value)
    example = [n for i, n in enumerate(feature.shape) if i not in (feature.batch_dim, feature.channel_dim)]
    if all(a == b for a, b in zip(image.shape[2:], example, strict=True)):
        return image
    return image.contiguous()


def pool(image: Tensor, sides: Sequence[int]) -> Tensor:
    """Average-pool ``(samples, features, *positions)``, one to three dimensions of them, to the given sides."""
    return _POOL[len(sides)](image, tuple(sides))


class DGLHead(Predictor):
    """The head of :class:`DGL`; described there.

    Args:
        features: what crosses.
        targets: the predictions to make.
        width: the most features of a hidden layer.
    """

    def __init__(self, features: Sequence[Feature], targets: Sequence[Target], width: int | None = None) -> None:
        super().__init__()
        self.features = list(features)
        self.dense = _per_position(self.features, targets)
        cap = width if width is not None else max(f.channels for f in features)
        self.stages = nn.ModuleList(_pointwise(f, min(f.channels, cap)) for f in self.features)
        read = [_after(f, min(f.channels, cap)) for f in self.features]
        self.mlp = nn.Sequential()
        if not self.dense:
            norm = BatchNorm if all(f.kind == "image" for f in self.features) else nn.LayerNorm
            size = sum(f.channels * 2 ** (len(f.shape) - 2 if f.kind == "image" else 0) for f in read)
            hidden = size if width is None else min(size, width)
            for k in range(DEPTH):
                self.mlp.extend([nn.Linear(hidden if k else size, hidden), norm(hidden), nn.ReLU()])
            read = [dataclasses.replace(read[0], shape=(read[0].shape[0], hidden), channel_dim=1)]
        self.last = LinearHead(read, targets)
        widths = "+".join(str(f.channels) for f in self.features)
        form = "per position" if self.dense else f"MLP {read[0].channels}"
        self.description = f"{self.features[0].kind} {widths} → DGL {form} → {self.last.description}"
        self.place(self.features[0])

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        staged = [self._stage(v, f, s) for v, f, s in zip(values, self.features, self.stages, strict=True)]
        if self.dense:
            return self.last.predict(*staged)
        flat = [self._flat(v, f) for v, f in zip(staged, self.features, strict=True)]
        return self.last.predict(self.mlp(torch.cat(flat, 1)))

    def _stage(self, value: Tensor, feature: Feature, stage: nn.Module) -> Tensor:
        if feature.kind != "image":
            found: Tensor = stage(value)
            return found
        image = image_of(feature, value)
        small = pool(image, [-(-side // 4) for side in image.shape[2:]])
        # A 1×1 convolution is the same over any arrangement of the positions.
        return stage(small.flatten(2)).unflatten(2, small.shape[2:])

    def _flat(self, staged: Tensor, feature: Feature) -> Tensor:
        if feature.kind != "image":
            return average(feature.rows(staged))
        return pool(staged, [2] * (staged.dim() - 2)).flatten(1)


def _pointwise(feature: Feature, width: int) -> nn.Module:
    """The first half: three layers over every position alone."""
    layers = nn.Sequential()
    if feature.kind == "image":
        for k in range(DEPTH):
            layers.extend([nn.Conv1d(width if k else feature.channels, width, 1), BatchNorm(width), nn.ReLU()])
    elif feature.kind == "tokens":
        for k in range(DEPTH):
            layers.extend([nn.Linear(width if k else feature.channels, width), nn.LayerNorm(width), nn.ReLU()])
    return layers


def _after(feature: Feature, width: int) -> Feature:
    """What a value is behind the first half: an image has its samples first and its features second there."""
    if feature.kind == "vector":
        return feature
    if feature.kind == "tokens":
        return dataclasses.replace(feature, shape=(*feature.shape[:2], width))
    sides = [n for i, n in enumerate(feature.shape) if i not in (feature.batch_dim, feature.channel_dim)]
    shape = (feature.shape[feature.batch_dim], width, *(-(-n // 4) for n in sides))
    return dataclasses.replace(feature, shape=shape, batch_dim=0, channel_dim=1)


def _per_position(features: Sequence[Feature], targets: Sequence[Target]) -> bool:
    """Whether every prediction has an entry for each position (tokens of a language model, pixels of a mask)."""
    first = features[0]
    if all(f.kind == "tokens" for f in features):
        count = first.shape[0] * first.shape[1]
        flat = [len(t.shape) == 2 and t.batch_dim is None and t.shape[0] == count for t in targets]
        return all(f or len(t.shape) == 3 for f, t in zip(flat, targets, strict=True))
    single = len(features) == 1 and first.kind == "image" and len(first.shape) == 4
    return single and all(len(t.shape) == 4 for t in targets)


class DGL(LocalLoss):
    r"""The task loss on the prediction of the MLP-SR head, whose pooling makes it cheap beside the block it trains.

    For feature maps of C channels and side s: average pool to ⌈s/4⌉; 3 × (1×1 convolution C → C, batch norm, ReLU);
    average pool to 2×2; 3 × (linear 4C → 4C, batch norm, ReLU); linear to the prediction. Maps of one or three
    spatial dimensions are treated alike (2C and 8C); a map of one position is repeated to 2×2.

    The analogue for tokens ``(samples, tokens, features)``: 3 × (linear C → C, layer norm, ReLU) over every token;
    mean over the tokens; 3 × (linear C → C, layer norm, ReLU); linear. Layer norm, because tokens may be padding and
    because a batch norm over them would show a language model its future. A prediction per token (three dimensions, or
    samples and tokens as one) is a linear map of every token behind the first three layers, and one per pixel is, with
    bilinear interpolation. For vectors, which have no positions, only the second half is left. Where several tensors
    cross, the first half runs on each and the second on all of them together.

    A batch of one sample is normalised by the running statistics in the batch norms that see one value per feature.

    Args:
        width: the most features a hidden layer may have; ``None`` for the widths above, as in the paper. At 2048
            channels the linear layers alone have 200 million weights; ``width=512`` keeps them at 5 million.

    Shapes: features of 2 to 5 dimensions; predictions of any shape.

    Source: Belilovsky, Eickenberg, Oyallon, *Decoupled Greedy Learning of CNNs*, ICML 2020.

    Raises:
        BpfxError: ``width`` is no positive integer; in :meth:`head`, that there is nothing to predict, or that what
            crosses is no floating-point tensor of 2 to 5 dimensions.

    Example:
        >>> import torch
        >>> from bpfx.losses import Boundary, Given
        >>> from bpfx.losses.dgl import DGL
        >>> feature, labels = torch.randn(8, 6, 9, 9), torch.arange(8) % 3
        >>> head = DGL().head(Boundary.of(feature, classes=3))
        >>> task = lambda scores: torch.nn.functional.cross_entropy(scores, labels)
        >>> loss = head(Given.of(feature, task=task))
        >>> loss.shape, head.predict(feature).shape
        (torch.Size([]), torch.Size([8, 3]))
    """

    name = "dgl"

    def __init__(self, width: int | None = None) -> None:
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
            raise BpfxError(f"DGL(width={width!r}): pass a positive number of features, or None for the paper's widths")
        self.width = width

    def head(self, boundary: Boundary) -> Predictor:
        fitting("dgl", boundary, most=5)
        if not boundary.targets:
            raise BpfxError(
                "dgl is judged by the task loss, but there are no predictions to make; pass a loss_fn and targets, or "
                "use a label-free local loss"
            )
        return DGLHead(boundary.features, boundary.targets, self.width)
