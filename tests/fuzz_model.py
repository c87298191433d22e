"""Random models as plain data.

A :class:`Recipe` is a small program over named values, in segments; :class:`Net` runs it as a module. Whoever wants to
run the same program otherwise (detached between two segments, say) calls its segments one by one. What the recipes are
made to hit: residuals, several values across a boundary, tied weights, modules called twice, dropout, BatchNorm and
LayerNorm, in-place operations, views across boundaries, inputs in tuples and mappings, several outputs, integer and
boolean inputs, frozen parts, values nobody reads, scalar parameters, buffers, custom functions, branches in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES, LENGTH, SIDE, WORDS = 4, 3, 2, 2, 5
FORMS = ("vector", "tokens", "image")


@dataclass(frozen=True)
class Op:
    """One line of the program: reads values, writes values, may call a layer."""

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    layer: str = ""


@dataclass(frozen=True)
class Layer:
    """A module of the program; `tied` names another of the same kind whose weight it shares."""

    kind: str
    frozen: bool = False
    tied: str = ""


@dataclass(frozen=True)
class Recipe:
    """A random model, its batch and its loss.

    Attributes:
        form: shape of every value: vectors, tokens or images, of `WIDTH` channels.
        segments: the program; a block may begin at each but the first.
        layers: by name.
        owner: the modules of a segment belong to "segment", or all of them to the "root".
        stem: "layer", "frozen" or "none": what the input passes first (tokens always pass an embedding).
        inputs: how the model is called: "single" or "tuple" (by position), "dict" (by name).
        outputs: what the model returns; "logits" and "aux" are in the loss, "raw" is not.
        packing: as a "single" tensor, a "tuple" or a "dict".
        dense: one prediction per position.
        loss: "mean", "sum", "squares", or "inside" the model.
        tied: the readout shares the weight of the stem's embedding.
        frozen_readout: the readout does not train.
        offset: which of the checks' offsets to train with.
        batch: samples.
        seed: of weights and batches.
    """

    form: str
    segments: tuple[tuple[Op, ...], ...]
    layers: dict[str, Layer] = field(default_factory=dict)
    owner: str = "segment"
    stem: str = "layer"
    inputs: str = "single"
    outputs: tuple[str, ...] = ("logits",)
    packing: str = "single"
    dense: bool = False
    loss: str = "mean"
    tied: bool = False
    frozen_readout: bool = False
    offset: int = 0
    batch: int = 4
    seed: int = 0

    @property
    def ops(self) -> list[Op]:
        return [op for segment in self.segments for op in segment]

    @property
    def more(self) -> tuple[str, ...]:
        """Names of the inputs beside x."""
        read = {name for op in self.ops for name in op.reads}
        return tuple(name for name in ("ids", "extra", "mask") if name in read)

    @property
    def random(self) -> bool:
        kinds = {op.kind for op in self.ops} | {self.layers[op.layer].kind for op in self.ops if op.layer}
        return bool(kinds & {"dropout", "drop", "noise"})

    @property
    def classes(self) -> int:
        return WORDS if self.tied else CLASSES

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the predictions of one sample."""
        return {"vector": (), "tokens": (LENGTH,), "image": (SIDE, SIDE)}[self.form] if self.dense else ()

    def shape(self, output: str) -> tuple[int, ...]:
        return self.batch, 1 if output == "aux" else self.classes, *self.positions

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Equal for recipes that hardly differ."""
        kinds = [[op.kind if not op.layer else self.layers[op.layer].kind for op in ops] for ops in self.segments]
        return self.form, tuple(map(tuple, kinds)), self.loss, self.stem == "none", self.dense

    def last(self, back: int = 0) -> str:
        """A whole value near the end of the program; `back` steps further back."""
        names = ["a0", *(name for op in self.ops for name in op.writes if name.startswith("a"))]
        return names[max(len(names) - 1 - back, 0)]


# --- the modules -----------------------------------------------------------------------------------------------------


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign() * 0.5 + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2 * torch.cos(ctx.saved_tensors[0])


class Sign(nn.Module):
    """A custom function, whose backward no tracer can see."""

    def forward(self, x: Tensor) -> Tensor:
        return _Sign.apply(x)


class Branch(nn.Module):
    """A branch on the data, which no tracer passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(()) + 0.75)  # of its own: equal values could not be told apart

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if float(x.detach().sum()) > 0 else x * self.weight * 0.5


class Scale(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(()) + 0.75)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Shift(nn.Module):
    """A parameter that belongs to no layer of torch's, and a buffer."""

    def __init__(self, form: str) -> None:
        super().__init__()
        shape = (WIDTH, 1, 1) if form == "image" else (WIDTH,)
        self.weight = nn.Parameter(torch.randn(shape))
        self.register_buffer("factor", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.weight) * self.factor


class Running(nn.Module):
    """A buffer that every forward pass changes, in place, and one that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
            self.mean.mul_(0.9).add_(x.detach().mean() * 0.1)
        return x - self.mean


class Attend(nn.Module):
    """Attention of the tokens to each other, from one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class TokenNorm(nn.BatchNorm1d):
    """BatchNorm over the channels of tokens, on a transposed view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Checkpointed(nn.Module):
    """A layer that is recomputed in the backward pass."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner = _linear(form)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda v: torch.tanh(self.inner(v)), x, use_reentrant=False)


def _linear(form: str) -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if form == "image" else nn.Linear(WIDTH, WIDTH)


NORMS = {"vector": nn.BatchNorm1d, "tokens": TokenNorm, "image": nn.BatchNorm2d}
LAYERS: dict[str, Callable[[str], nn.Module]] = {
    "linear": _linear,
    "norm": lambda form: nn.GroupNorm(2, WIDTH) if form == "image" else nn.LayerNorm(WIDTH),
    "batchnorm": lambda form: NORMS[form](WIDTH),
    "dropout": lambda form: nn.Dropout(0.25),
    "scale": lambda form: Scale(),
    "shift": Shift,
    "running": lambda form: Running(),
    "relu_": lambda form: nn.ReLU(inplace=True),
    "embed": lambda form: nn.Embedding(WORDS, WIDTH),
    "attend": lambda form: Attend(),
    "checkpointed": Checkpointed,
    "sign": lambda form: Sign(),
    "branch": lambda form: Branch(),
}
TIEABLE = {"linear", "scale", "shift", "embed"}
RARE = {"checkpointed", "sign", "branch"}  # captured as opaque modules, which takes several attempts


def _across(x: Tensor) -> Tensor:
    """The same numbers in another order, as a view: channels and positions change places."""
    return x.transpose(1, -1) if x.dim() > 2 else x.view(x.shape[0], 2, -1).transpose(1, 2)


def _back(x: Tensor) -> Tensor:
    return x.transpose(1, -1) if x.shape[1:] != (WIDTH // 2, 2) else x.transpose(1, 2).reshape(x.shape[0], -1)


def _channel(x: Tensor, form: str) -> int:
    return 1 if form == "image" else x.dim() - 1


def _write(x: Tensor, form: str) -> Tensor:
    y = x.clone()
    y.narrow(_channel(x, form), 0, 1).mul_(2.0)
    return y


def _fill(x: Tensor, form: str) -> Tensor:
    y, dim = torch.zeros_like(x), _channel(x, form)
    y.narrow(dim, 0, 2).copy_(x.narrow(dim, 1, 2))
    return y


def _write_through(x: Tensor, form: str) -> Tensor:
    x.narrow(_channel(x, form), 1, 2).mul_(1.5)
    return x


def _stepped(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _without_gradient(x: Tensor, layer: nn.Module) -> Tensor:
    with torch.no_grad():
        kept = layer(x)
    return x + kept


# what each operation does; the layer, the form and whether the model trains are given to those that ask
PLAIN: dict[str, Callable[..., Any]] = {
    "act": torch.tanh,
    "gelu": F.gelu,
    "relu_": torch.relu_,
    "half_act": torch.sigmoid,
    "half_relu_": torch.relu_,
    "add": torch.add,
    "add_": _stepped,
    "mul": lambda x, y: x * torch.sigmoid(y),
    "detached": lambda x, y: x + y.detach(),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "mask": lambda x: torch.where(x > 0, x, 0.1 * x),
    "expand": lambda x: x + x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1)).expand_as(x),
    "turn": _across,
    "turned_act": lambda x: torch.tanh(x),
    "back": _back,
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "extra": torch.add,
    "masked": lambda x, mask: x.masked_fill(mask.view(-1, *[1] * (x.dim() - 1)), 0.0),
    "sized": lambda x: x / x.shape[0] + torch.arange(x.shape[-1], dtype=x.dtype),
}


WRITES = {"write": _write, "fill": _fill, "write_through": _write_through}


class Segment(nn.Module):
    """Some lines of the program: takes all values by name and returns them with those that it made."""

    def __init__(self, form: str, ops: tuple[Op, ...], layers: dict[str, nn.Module], own: bool) -> None:
        super().__init__()
        self.form, self.ops = form, ops
        used = {op.layer: layers[op.layer] for op in ops if op.layer}
        if own:
            self.layers = nn.ModuleDict(used)
        else:
            self.__dict__["layers"] = used

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(values)
        for op in self.ops:
            given = [values[name] for name in op.reads]
            made = self._run(op, given)
            values.update(zip(op.writes, made if isinstance(made, (tuple, list)) else (made,), strict=True))
        return values

    def _run(self, op: Op, given: list[Tensor]) -> Any:
        if op.kind == "embed":
            value = self.layers[op.layer](given[1])
            while value.dim() < given[0].dim() and self.form == "image":
                value = value.unsqueeze(-1)
            return given[0] + (value.unsqueeze(1) if self.form == "tokens" else value)
        if op.kind == "no_grad":
            return _without_gradient(given[0], self.layers[op.layer])
        if op.layer:
            return self.layers[op.layer](*given)
        if op.kind in WRITES:
            return WRITES[op.kind](given[0], self.form)
        if op.kind == "split":
            return given[0].chunk(2, _channel(given[0], self.form))
        if op.kind == "join":
            return torch.cat(given, _channel(given[0], self.form))
        if op.kind == "drop":
            return F.dropout(given[0], 0.25, self.training)
        return PLAIN[op.kind](*given)


class Net(nn.Module):
    """The recipe as a module."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        form = recipe.form
        self.stem: nn.Module = nn.Embedding(WORDS, WIDTH) if form == "tokens" else _linear(form)
        if recipe.stem == "none" and form != "tokens":
            self.stem = nn.Identity()
        layers = {name: LAYERS[layer.kind](form) for name, layer in recipe.layers.items()}
        if recipe.owner == "root":
            self.layers = nn.ModuleDict(layers)
        self.segments = nn.ModuleList(Segment(form, ops, layers, recipe.owner == "segment") for ops in recipe.segments)
        self.readout = nn.Linear(WIDTH, recipe.classes)
        self.auxiliary = nn.Linear(WIDTH, 1) if "aux" in recipe.outputs else None
        for name, layer in recipe.layers.items():
            if layer.tied:
                layers[name].weight = layers[layer.tied].weight
        if recipe.tied:
            self.readout.weight = self.stem.weight
        for name, layer in recipe.layers.items():
            if layer.frozen:
                layers[name].requires_grad_(False)
        if recipe.stem == "frozen":
            self.stem.requires_grad_(False)
        if recipe.frozen_readout:
            self.readout.requires_grad_(False)

    def start(self, x: Tensor, **more: Tensor) -> dict[str, Tensor]:
        return {"a0": self.stem(x), **more}

    def finish(self, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs, in order."""
        made = {"raw": values[self.recipe.last(1)], "logits": self._read(self.readout, values[self.recipe.last()])}
        if self.auxiliary is not None:
            made["aux"] = self._read(self.auxiliary, values[self.recipe.last(2)])
        return tuple(made[name] for name in self.recipe.outputs)

    def _read(self, readout: nn.Module, x: Tensor) -> Tensor:
        rows = x.movedim(_channel(x, self.recipe.form), -1)
        dense = self.recipe.dense and rows.dim() > 2
        found = readout(rows if dense else rows.reshape(rows.shape[0], -1, WIDTH).mean(1))
        return found.movedim(-1, 1)

    def forward(self, x: Tensor, *more: Tensor, labels: Tensor | None = None, **named: Tensor) -> Any:
        values = self.start(x, **dict(zip(self.recipe.more, more, strict=False)), **named)
        for segment in self.segments:
            values = segment(values)
        outputs = self.finish(values)
        if labels is not None:
            return {"loss": task_loss(self.recipe, outputs, labels), "logits": outputs[0]}
        if self.recipe.packing == "single":
            return outputs[0]
        return outputs if self.recipe.packing == "tuple" else {f"out{i}": o for i, o in enumerate(outputs)}


def task_loss(recipe: Recipe, outputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """The task loss of the outputs, in the recipe's order; those named "raw" are not looked at."""
    total = y.new_zeros((), dtype=outputs[0].dtype)
    reduction = "sum" if recipe.loss == "sum" else "mean"
    for name, value in zip(recipe.outputs, outputs, strict=True):
        if name == "logits" and recipe.loss == "squares":
            wanted = F.one_hot(y, recipe.classes).movedim(-1, 1).to(value)
            wanted[:, 0] += 0.25
            total = total + F.mse_loss(value, wanted)
        elif name == "logits":
            total = total + F.cross_entropy(value, y, reduction=reduction)
        elif name == "aux":
            total = total + getattr(value.square(), reduction)()
    return total


def build(recipe: Recipe) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Net(recipe).double().train()


def loss_fn(recipe: Recipe) -> Callable[[Any, Tensor], Tensor] | None:
    if recipe.loss == "inside":
        return None
    return lambda output, y: task_loss(recipe, leaves(output), y)


def leaves(output: Any) -> tuple[Tensor, ...]:
    """The model's outputs in order, whatever it packs them into."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(output.values()) if isinstance(output, dict) else tuple(output)


def batch_of(recipe: Recipe, number: int = 0) -> Any:
    """One of many batches: `(inputs, labels)`, or a mapping where the loss is inside the model."""
    draw = torch.Generator().manual_seed(1000 * recipe.seed + number)
    n = recipe.batch
    shape = {"vector": (n, WIDTH), "tokens": (n, LENGTH, WIDTH), "image": (n, WIDTH, SIDE, SIDE)}[recipe.form]
    words = torch.randint(WORDS, (n, LENGTH), generator=draw)
    x = words if recipe.form == "tokens" else torch.randn(shape, generator=draw, dtype=torch.float64)
    known = {
        "ids": torch.randint(WORDS, (n,), generator=draw),
        "extra": torch.randn(shape, generator=draw, dtype=torch.float64),
        "mask": torch.rand(n, generator=draw) > 0.7,
    }
    more = {name: known[name] for name in recipe.more}
    y = torch.randint(recipe.classes, (n, *recipe.positions), generator=draw)
    if recipe.loss == "inside":
        return {"x": x, **more, "labels": y}
    if recipe.inputs == "dict":
        return {"x": x, **more}, y
    return ((x, *more.values()), y) if more or recipe.inputs == "tuple" else (x, y)
