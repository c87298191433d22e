"""Prediction heads judged by the task loss: the model's own last layers, or a pooled linear map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, Feature, LocalLoss, Predictor, Target, average, fitting


class TailHead(Predictor):
    """The model's own last layers, copied (or read without a gradient where a copy would outweigh the block).

    Args:
        program: called with ``(feature, *inputs, *weights)``.
        weights: ``(name, tensor, copied)`` for every weight, in the program's order.
        borrow: looks up the current value of a weight that is not copied.
    """

    program: Callable[..., Tensor]
    _borrow: Callable[[str], Tensor]

    def __init__(
        self,
        program: fx.GraphModule,
        inputs: Sequence[int],
        weights: Sequence[tuple[str, Tensor, bool]],
        borrow: Callable[[str], Tensor],
    ) -> None:
        super().__init__()
        self.__dict__["program"] = program  # it owns no weights; they are this head's
        self.inputs = tuple(inputs)
        self._order: list[tuple[str, bool]] = []
        self.__dict__["_borrow"] = borrow
        borrowed: list[str] = []
        for name, tensor, copied in weights:
            key = name.replace(".", "_")
            if not copied:
                self._order.append((name, False))
                borrowed.append(name)
                continue
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(key, nn.Parameter(tensor.detach().clone()))
            else:
                self.register_buffer(key, tensor.detach().clone())
            self._order.append((key, True))
        self.borrows = tuple(borrowed)
        self.description = "copy of the model's last layers" + (
            f", {len(borrowed)} weights borrowed" if borrowed else ""
        )

    def place(self, feature: Feature) -> None:
        """The copies are where the model's own weights are, in their dtypes."""

    def predict(self, *values: Tensor) -> Tensor:
        weights = [getattr(self, key) if own else self._borrow(key).detach() for key, own in self._order]
        return self.program(*values, *weights)


class LinearHead(Predictor):
    """Normalise (tokens), pool, one linear layer: a prediction of any shape from features of any kind.

    Images are averaged over their positions, or mapped by a 1×1 convolution and resized where the prediction is dense;
    tokens are normalised and averaged, or mapped one by one where the prediction has one entry per token.
    """

    def __init__(self, features: Sequence[Feature], targets: Sequence[Target]) -> None:
        super().__init__()
        first = features[0]
        self.features, self.targets = list(features), list(targets)
        self.norms = nn.ModuleList(
            nn.LayerNorm(f.channels) if f.kind == "tokens" else nn.Identity() for f in self.features
        )
        width = sum(f.channels for f in self.features)
        self.linears = nn.ModuleList(nn.Linear(width, _outputs(t, self._form(t))) for t in self.targets)
        forms = ", ".join(dict.fromkeys(self._form(t) for t in self.targets))
        self.description = f"{first.kind} {width} → {forms} linear"
        self.place(first)

    def _form(self, target: Target) -> str:
        """How the positions of the features become those of the prediction."""
        single = len(self.features) == 1
        if single and len(target.shape) == 4 and self.features[0].kind == "image" and len(self.features[0].shape) == 4:
            return "dense"
        if self.features[0].kind == "tokens" and all(f.kind == "tokens" for f in self.features):
            batch, length = self.features[0].shape[:2]
            if len(target.shape) == 3:
                return "per token"
            if len(target.shape) == 2 and target.batch_dim is None and target.shape[0] == batch * length:
                return "per token, flat"
        return "pooled"

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        # Samples first, features last, positions in between.
        rows = [norm(f.rows(v)) for v, f, norm in zip(values, self.features, self.norms, strict=True)]
        results = tuple(self._predict(rows, t, linear) for t, linear in zip(self.targets, self.linears, strict=True))
        return results[0] if len(results) == 1 else results

    def _predict(self, rows: list[Tensor], target: Target, linear: nn.Module) -> Tensor:
        form = self._form(target)
        if form == "dense":
            image = linear(rows[0]).movedim(-1, 1)
            return F.interpolate(image, size=target.shape[2:], mode="bilinear", align_corners=False)
        if form.startswith("per token"):
            first, dim = self.features[0], target.batch_dim or 0
            length = first.shape[1 - first.batch_dim] if form.endswith("flat") else target.shape[1 - dim]
            # Another sequence than the predicted one (an encoder's) is resized along its tokens. Which one that is, the
            # example batch says; how long the predicted one is, each batch.
            others = [f.shape[1 - f.batch_dim] != length for f in self.features]
            length = next((r.shape[1] for r, other in zip(rows, others, strict=True) if not other), length)
            rows = [_resized(r, length) if other else r for r, other in zip(rows, others, strict=True)]
            tokens = linear(torch.cat(rows, -1))
            if form.endswith("flat"):
                # In the order of the feature's own dimensions: a sequence that comes first stays first.
                return (tokens.transpose(0, 1) if first.batch_dim else tokens).flatten(0, 1)
            return tokens.transpose(0, 1) if dim == 1 else tokens
        flat = linear(torch.cat([average(r) for r in rows], -1))
        shape = list(target.shape)
        dim = target.batch_dim if target.batch_dim is not None else 0
        rest = shape[:dim] + shape[dim + 1 :]
        return flat.reshape(flat.shape[0], *rest).movedim(0, dim)


def _resized(rows: Tensor, length: int) -> Tensor:
    """`rows`, (samples, tokens, channels), averaged or repeated to `length` tokens."""
    return F.adaptive_avg_pool1d(rows.transpose(1, 2), length).transpose(1, 2)


def _outputs(target: Target, form: str) -> int:
    if form == "dense":
        return target.shape[1]
    if form.startswith("per token"):
        return target.shape[-1]
    dim = target.batch_dim if target.batch_dim is not None else 0
    return math.prod(target.shape[:dim] + target.shape[dim + 1 :])


class Supervised(LocalLoss):
    """The task loss on the prediction of a head (greedy local learning).

    The head starts as a copy of the model's own last layers where a block's output has the shape they expect, and is
    a pooled linear map otherwise (its weights the model's own where at least those fit).

    Source: Belilovsky, Eickenberg, Oyallon, *Greedy Layerwise Learning Can Scale to ImageNet*, ICML 2019.
    """

    name = "supervised"

    def head(self, boundary: Boundary) -> Predictor:
        if boundary.tail is not None:
            return boundary.tail(True)
        fitting("supervised", boundary)
        if not boundary.targets:
            raise BpfxError("supervised needs predictions to make; pass a loss_fn and targets, or a label-free loss")
        head = LinearHead(boundary.features, boundary.targets)
        if boundary.last_linear is not None and len(head.linears) == 1:
            linear, (weight, bias) = head.linears[0], boundary.last_linear
            assert isinstance(linear, nn.Linear)
            if linear.weight.shape == weight.shape:
                with torch.no_grad():
                    linear.weight.copy_(weight)
                    linear.bias.copy_(bias if bias is not None else torch.zeros_like(linear.bias))
                head.description += ", from the model's own"
        return head
