"""The protocol of local losses: what they are told about a boundary, and what a head is given at every step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpfx.errors import BpfxError


@dataclasses.dataclass(frozen=True)
class Feature:
    """One tensor that crosses a boundary, enters a block, or is an input of the model.

    Attributes:
        name: of the value in the graph.
        shape: in the example batch.
        batch_dim: the dimension that counts samples.
        channel_dim: the dimension that counts features.
        dtype, device: of the value.
    """

    name: str
    shape: tuple[int, ...]
    batch_dim: int
    channel_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor, name: str = "feature") -> Feature:
        """Of a tensor whose samples come first; features second in an image, last otherwise."""
        channel = 1 if value.dim() >= 4 else max(value.dim() - 1, 0)
        return cls(name, tuple(value.shape), 0, channel, value.dtype, value.device)

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    @property
    def kind(self) -> str:
        """``vector``, ``tokens`` (features last) or ``image`` (features anywhere, two or more positions)."""
        if len(self.shape) == 2:
            return "vector"
        return "tokens" if len(self.shape) == 3 and self.channel_dim == 2 else "image"

    @property
    def floating(self) -> torch.dtype | None:
        """The dtype for a head's parameters; ``None`` for torch's default."""
        return self.dtype if self.dtype.is_floating_point else None

    def rows(self, value: Tensor) -> Tensor:
        """The value with samples first, features last and positions in between."""
        return value.movedim((self.batch_dim, self.channel_dim), (0, -1))

    def image(self, value: Tensor) -> Tensor:
        """The value with samples first, features second and positions after them."""
        return value.movedim((self.batch_dim, self.channel_dim), (0, 1))

    def pooled(self, value: Tensor) -> Tensor:
        """Mean over the positions: ``(samples, features)``."""
        return average(self.rows(value))


def average(rows: Tensor) -> Tensor:
    """Mean over the positions between samples and features."""
    positions = list(range(1, rows.dim() - 1))
    # A sum's backward is an expanded view, a mean's would be a second activation.
    return rows.sum(positions) / math.prod(rows.shape[1:-1]) if positions else rows


@dataclasses.dataclass(frozen=True)
class Target:
    """A prediction that the task loss is computed from: its shape in the example batch and its batch dimension."""

    shape: tuple[int, ...]
    batch_dim: int | None


@dataclasses.dataclass
class Boundary:
    """What a local loss may know of a boundary when it builds a head for it.

    Attributes:
        features: what crosses it and depends on everything that trains in the block; one, as a rule.
        targets: the predictions that the task loss is computed from; empty where there is no task loss.
        index, count: the block's position, from 0, and the number of blocks.
        inputs: the tensors of the batch; those that are no features of samples, as well.
        labels: position among ``inputs`` of the one integer class label per sample; ``None`` without such a thing.
        answers: positions among ``inputs`` of what the loss reads and the model does not.
        entering: what enters the block and carries a gradient or is an input, first one first.
        tail: the model's own last layers for these features, where the shapes allow; ``tail(copy)`` makes a head that
            owns copies, or reads the model's weights without a gradient.
        last_linear: weight and bias of the model's own last linear layer.
        downstream: ``downstream(depth)`` makes a head of copies of ``depth`` later parts of the model.
    """

    features: list[Feature]
    targets: list[Target] = dataclasses.field(default_factory=list)
    index: int = 0
    count: int = 2
    inputs: list[Feature] = dataclasses.field(default_factory=list)
    labels: int | None = None
    answers: tuple[int, ...] = ()
    entering: list[Feature] = dataclasses.field(default_factory=list)
    tail: Callable[[bool], Predictor] | None = None
    last_linear: tuple[Tensor, Tensor | None] | None = None
    downstream: Callable[[int], Predictor] | None = None

    @classmethod
    def of(
        cls,
        feature: Tensor,
        *,
        classes: int | None = None,
        inputs: Sequence[Tensor] = (),
        labels: int | None = None,
        entering: Tensor | None = None,
        index: int = 0,
        count: int = 2,
    ) -> Boundary:
        """For a loss that is used alone, without a converted model.

        Args:
            feature: an example of what crosses, samples first.
            classes: how many a classification has.
            inputs: examples of the batch's tensors.
            labels: which of them are the class labels.
            entering: an example of what enters the block.
            index, count: the block's position and the number of blocks.
        """
        return cls(
            [Feature.of(feature)],
            [Target((feature.shape[0], classes), 0)] if classes is not None else [],
            index,
            count,
            [Feature.of(t, f"input_{i}") for i, t in enumerate(inputs)],
            labels,
            () if labels is None else (labels,),
            [Feature.of(entering, "entering")] if entering is not None else [],
        )

    @property
    def feature(self) -> Feature:
        """The newest tensor that crosses."""
        return self.features[0]

    @property
    def classes(self) -> int:
        """How many classes a prediction per sample tells apart.

        Raises:
            BpfxError: the task is not a classification of samples.
        """
        if len(self.targets) == 1 and len(self.targets[0].shape) == 2 and self.targets[0].batch_dim == 0:
            return self.targets[0].shape[1]
        shapes = ", ".join(str(t.shape) for t in self.targets) or "none"
        raise BpfxError(f"one prediction per sample over classes is needed, shaped (samples, classes); found: {shapes}")

    def input(self) -> int:
        """Position among ``inputs`` of the first floating-point tensor that the model reads: the image.

        Raises:
            BpfxError: there is none.
        """
        for i, feature in enumerate(self.inputs):
            if feature.dtype.is_floating_point and i not in self.answers:
                return i
        raise BpfxError("no input of the model is a floating-point tensor")


@dataclasses.dataclass
class Given:
    """What a head is given at every step.

    Attributes:
        features: the values of the boundary's features.
        inputs: the batch's tensors, ``None`` for those that the head did not ask for.
        entering: what enters the block, where the head asked for it.
        task: the task loss of predictions.
    """

    features: tuple[Tensor, ...]
    inputs: tuple[Any, ...] = ()
    entering: tuple[Tensor, ...] = ()
    task: Callable[..., Tensor] | None = None

    @classmethod
    def of(
        cls,
        feature: Tensor,
        inputs: Sequence[Tensor] = (),
        entering: Tensor | None = None,
        task: Callable[..., Tensor] | None = None,
    ) -> Given:
        """For a loss that is used alone; ``task(predictions)`` is a scalar."""
        return cls((feature,), tuple(inputs), (entering,) if entering is not None else (), task)

    @property
    def feature(self) -> Tensor:
        """The value of the newest feature."""
        return self.features[0]

    def judged(self, *predictions: Tensor) -> Tensor:
        """The task loss of these predictions.

        Raises:
            BpfxError: there is no task loss.
        """
        if self.task is None:
            raise BpfxError(
                "there is no task loss to judge predictions by: the head has to say uses_task = True, and the batch "
                "needs targets (or the local loss has to be a label-free one)"
            )
        return self.task(*predictions)


def fitting(
    name: str,
    boundary: Boundary,
    words: str = "the features of one value per sample and position",
    most: int | None = None,
) -> None:
    """Raise where a head cannot read what crosses.

    Args:
        name: of the loss.
        boundary: what crosses.
        words: what the head reads.
        most: dimensions that it can take.

    Raises:
        BpfxError: which value, and why.
    """
    for f in boundary.features:
        if f.floating is None or not 2 <= len(f.shape) <= (most or len(f.shape)) or f.batch_dim == f.channel_dim:
            dimensions = f"2 to {most}" if most else "2 or more"
            raise BpfxError(
                f"{name} reads {words}: a floating-point tensor of {dimensions} dimensions with samples and features "
                f"apart, but what crosses behind block {boundary.index} is {f.name} {f.shape} {f.dtype}; cut elsewhere"
            )


class Head(nn.Module):
    """An auxiliary head: ``forward(given) -> scalar local loss``. It may have parameters, which are trained with it.

    Attributes:
        inputs: positions among the batch's tensors that it reads.
        uses_task: whether it calls ``given.judged``.
        uses_entering: whether it reads ``given.entering``.
        random: whether it draws random numbers, other than by dropout modules; the blocks' draws are kept apart from
            its own.
        description: one short line for the plan.
        borrows: names of the weights of the model that it reads, without a gradient.
    """

    inputs: tuple[int, ...] = ()
    uses_task: bool = False
    uses_entering: bool = False
    random: bool = False
    description: str = ""
    borrows: tuple[str, ...] = ()

    def forward(self, given: Given) -> Tensor:
        raise NotImplementedError

    def place(self, feature: Feature) -> None:
        """Move the parameters to the device and dtype of the feature; called for every head that a loss builds."""
        self.to(device=feature.device, dtype=feature.floating)


class Predictor(Head):
    """A head that predicts what the model does, and is judged by the task loss.

    ``predict(*features, *inputs)`` returns predictions shaped like the model's own (a tensor, or a tuple of them).
    """

    uses_task = True

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        raise NotImplementedError

    def predictions(self, given: Given) -> tuple[Tensor, ...]:
        """Its predictions, always as a tuple."""
        found = self.predict(*given.features, *(given.inputs[i] for i in self.inputs))
        return found if isinstance(found, tuple) else (found,)

    def forward(self, given: Given) -> Tensor:
        return given.judged(*self.predictions(given))


class LocalLoss:
    """A local loss: builds a head for what crosses a boundary.

    Attributes:
        name: as it is registered.
        label_free: whether it works without a task loss.
        horizon: how many blocks a gradient comes through, where the caller does not say.
        rows: rows that the loss makes of one sample (two views: 2). With more than one, :meth:`expand` is called on
            every batch before a step.
    """

    name: str = ""
    label_free: bool = False
    horizon: int = 1
    rows: int = 1

    def head(self, boundary: Boundary) -> Head:
        """Build the head for one boundary.

        Raises:
            BpfxError: the loss does not fit this boundary or this batch; the words say what would.
        """
        raise NotImplementedError

    def expand(self, batch: list[Tensor], image: int, targets: Sequence[int]) -> list[Tensor]:
        """The batch with ``rows`` rows for every sample, one sample's rows next to each other.

        Args:
            batch: the tensors that have one entry per sample.
            image: position of the first floating-point one.
            targets: positions of the targets of an outside loss.
        """
        raise NotImplementedError
