"""How an example batch is taken apart into graph inputs and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.losses.views import Views

LossFn = Callable[..., Tensor]


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as the call ``(args, kwargs)``: a mapping becomes keywords, a tuple or list arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


@dataclasses.dataclass
class BatchSpec:
    """Structure of the example batch.

    Attributes:
        spec: pytree structure of ``(args, kwargs)``.
        constants: leaves that are no tensors, by position; they are part of the graph.
        tensor_positions: positions of the tensor leaves; these are the graph's inputs.
        names: a readable name for every tensor leaf.
        dtypes, shapes: of the tensor leaves in the example.
        batch_size: samples in the example.
        per_sample: which tensor leaves have one entry per sample in dimension 0.
        targets: indices (among the tensor leaves) of the targets, where an external loss names them.
        rows: rows that the local loss makes of one sample; shapes and ``batch_size`` count rows.
        expand: makes them of a batch: called with the per-sample tensors, the position of the first floating-point one
            among them, and those of the targets.
    """

    spec: pytree.TreeSpec
    constants: dict[int, Any]
    tensor_positions: list[int]
    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[tuple[int, ...]]
    batch_size: int
    per_sample: list[bool]
    targets: list[int]
    rows: int = 1
    expand: Callable[[list[Tensor], int, Sequence[int]], list[Tensor]] | None = None

    @classmethod
    def of(cls, batch: Any, has_loss_fn: bool) -> BatchSpec:
        args, kwargs = as_call(batch)
        if has_loss_fn and (kwargs or len(args) < 2):
            raise BpfxError(
                f"with a loss_fn the example batch is a tuple (inputs, targets), but it is {_describe(batch)}; "
                "pass loss_fn=None for a model that computes its loss itself"
            )
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        leaves = [leaf.first if isinstance(leaf, Views) else leaf for _, leaf in paths]
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in positions]
        if not tensors:
            raise BpfxError(f"the example batch holds no tensor: {_describe(batch)}")
        sized = [t for t in tensors if t.dim() > 0]
        if not sized:
            raise BpfxError("no tensor of the example batch has a batch dimension; every one is a scalar")
        batch_size = sized[0].shape[0]
        last = len(args) - 1
        targets = [
            k
            for k, i in enumerate(positions)
            if has_loss_fn and _index(paths[i][0], 0) == 0 and _index(paths[i][0], 1) == last
        ]
        return cls(
            spec=spec,
            constants={i: leaf for i, leaf in enumerate(leaves) if i not in positions},
            tensor_positions=positions,
            names=_names([paths[i][0] for i in positions], targets, has_loss_fn),
            dtypes=[t.dtype for t in tensors],
            shapes=[tuple(t.shape) for t in tensors],
            batch_size=batch_size,
            per_sample=[t.dim() > 0 and t.shape[0] == batch_size for t in tensors],
            targets=targets,
        )

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensor leaves of a call, after checking that it is built like the example, and expanded.

        Raises:
            BpfxError: another structure, another constant, another dtype or another number of dimensions.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        views = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Views)}
        leaves = [views[i].first if i in views else leaf for i, leaf in enumerate(leaves)]
        if spec != self.spec:
            reordered = self._reordered(args, kwargs)
            if reordered is not None:
                return self.flatten(*reordered)
            raise BpfxError(
                f"this batch is built otherwise than the example: got {_structure(args, kwargs)}, "
                f"the example had {self.describe()}; call bpfx.convert again with a batch of the new structure"
            )
        for i, constant in self.constants.items():
            if type(leaves[i]) is not type(constant) or leaves[i] != constant:
                raise BpfxError(
                    f"this batch has the constant {leaves[i]!r} where the example had {constant!r}, and constants are "
                    "part of the graph; call bpfx.convert again, or pass the value as a tensor"
                )
        tensors = [leaves[i] for i in self.tensor_positions]
        for name, tensor, dtype, shape in zip(self.names, tensors, self.dtypes, self.shapes, strict=True):
            if not isinstance(tensor, Tensor):
                raise BpfxError(f"{name} is {type(tensor).__name__}, the example had a tensor")
            if tensor.dim() != len(shape):
                raise BpfxError(
                    f"{name} has shape {tuple(tensor.shape)}, the example had {shape}: the number of dimensions differs"
                )
            if tensor.dtype != dtype:
                raise BpfxError(
                    f"{name} has dtype {tensor.dtype}, the example had {dtype}; convert the batch, or, where the "
                    "model's own dtype has changed since, call bpfx.convert again"
                )
        return self._expanded(tensors, {k: views[i] for k, i in enumerate(self.tensor_positions) if i in views})

    def _reordered(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The same call with its keywords in the example's order; ``None`` where it differs in more than that."""
        try:
            leaves = self.spec.flatten_up_to((tuple(args), dict(kwargs)))
        except ValueError:
            return None
        call = pytree.tree_unflatten(leaves, self.spec)
        return call if pytree.tree_structure(call) == self.spec else None

    def expanded(self, rows: int, expand: Callable[[list[Tensor], int, Sequence[int]], list[Tensor]]) -> BatchSpec:
        """The same structure with ``rows`` rows for every sample, made by ``expand``."""
        sizes = [(s[0] * rows, *s[1:]) if per else s for s, per in zip(self.shapes, self.per_sample, strict=True)]
        return dataclasses.replace(self, shapes=sizes, batch_size=self.batch_size * rows, rows=rows, expand=expand)

    def _expanded(self, tensors: list[Tensor], views: Mapping[int, Views]) -> list[Tensor]:
        if views and self.rows != 2:
            raise BpfxError("the batch holds bpfx.losses.Views, but the local loss takes no second view")
        if self.rows == 1:
            return tensors
        chosen = [k for k, per in enumerate(self.per_sample) if per]
        if views:
            made = [views[k].rows if k in views else tensors[k].repeat_interleave(2, 0) for k in chosen]
        else:
            assert self.expand is not None
            image = next((i for i, k in enumerate(chosen) if tensors[k].is_floating_point()), None)
            if image is None:
                raise BpfxError(f"no input is a floating-point tensor that rows could be made of: {self.describe()}")
            given = [tensors[k] for k in chosen]
            made = self.expand(given, image, [chosen.index(k) for k in self.targets if k in chosen])
            for k, old, new in zip(chosen, given, made, strict=True):
                if new.shape != (old.shape[0] * self.rows, *old.shape[1:]) or new.dtype != old.dtype:
                    raise BpfxError(
                        f"the rows made of {self.names[k]} are {tuple(new.shape)} {new.dtype}, but {self.rows} "
                        f"for each sample of {tuple(old.shape)} {old.dtype} are needed, of the same shape and dtype"
                    )
        for k, new in zip(chosen, made, strict=True):
            tensors[k] = new
        return tensors

    def unflatten(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves: list[Any] = [None] * (len(self.constants) + len(self.tensor_positions))
        for i, constant in self.constants.items():
            leaves[i] = constant
        for i, tensor in zip(self.tensor_positions, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def describe(self) -> str:
        return ", ".join(f"{n} {s}" for n, s in zip(self.names, self.shapes, strict=True))

    def narrow(self, tensors: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
        """Samples ``start : start+length`` of every per-sample tensor."""
        return [
            t.narrow(0, start, length) if per_sample else t
            for t, per_sample in zip(tensors, self.per_sample, strict=True)
        ]

    def split(self, tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        """At most ``count`` pieces, one sample with all its rows each at least, their sizes as equal as can be."""
        samples = self.samples(tensors) // self.rows
        count = min(count, samples)
        starts = [samples * i // count * self.rows for i in range(count + 1)]
        return [self.narrow(tensors, a, b - a) for a, b in zip(starts, starts[1:], strict=False)]

    def largest(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """The largest of the pieces that :meth:`split` gives."""
        return max(self.split(tensors, count), key=self.samples)

    def samples(self, tensors: Sequence[Tensor]) -> int:
        """Samples in these inputs; every row of a sample counts."""
        return next(t.shape[0] for t, per in zip(tensors, self.per_sample, strict=True) if per)


def call_model(
    model: Callable[..., Any], loss_fn: LossFn | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Run the plain model: return ``(loss, output)``. The last argument is the target where ``loss_fn`` is given."""
    if judges_output(loss_fn):
        output = model(*args, **kwargs)
        assert loss_fn is not None
        return loss_fn(output, pytree.tree_leaves((args, kwargs))), output
    if loss_fn is None:
        output = model(*args, **kwargs)
        return loss_of(output), output
    *inputs, target = args
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        output = model(*inputs[0])
    elif len(inputs) == 1 and isinstance(inputs[0], Mapping):
        output = model(**inputs[0])
    else:
        output = model(*inputs)
    return loss_fn(output, target), output


def loss_of(output: Any) -> Any:
    """The loss inside a model's output: the output itself, ``.loss``, ``["loss"]``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        loss = output[0]
    if loss is None:
        raise BpfxError(
            f"loss_fn is None, but the model returned {type(output).__name__} without a loss; "
            "pass labels in the batch, or a loss_fn"
        )
    return loss


class OutputLoss(nn.Module):
    """A loss of the model's output and its inputs, without targets: ``forward(output, inputs)``."""


def judges_output(loss_fn: LossFn | None) -> bool:
    """Whether a loss takes no target."""
    return isinstance(loss_fn.loss_fn if isinstance(loss_fn, Loss) else loss_fn, OutputLoss)


class Loss(nn.Module):
    """The caller's ``loss_fn`` as a module, so that it has a path of its own in the graph."""

    def __init__(self, loss_fn: LossFn) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, output: Any, target: Any) -> Any:
        return self.loss_fn(output, target)


def _index(path: tuple[Any, ...], depth: int) -> Any:
    key = path[depth]
    return getattr(key, "idx", getattr(key, "key", None))


def _names(paths: list[tuple[Any, ...]], targets: list[int], has_loss_fn: bool) -> list[str]:
    """``x``, ``y`` for a plain pair, keys for mappings, ``x_0``, ``x_1`` for several inputs."""
    names: list[str] = []
    for k, path in enumerate(paths):
        keys = [str(getattr(p, "key", "")) for p in path if hasattr(p, "key")]
        stem = "_".join(key for key in keys if key) or ("y" if k in targets else "x")
        names.append("".join(c if c.isalnum() or c == "_" else "_" for c in stem))
    counts = {n: names.count(n) for n in names}
    seen: dict[str, int] = {}
    result = []
    for n in names:
        if counts[n] == 1:
            result.append(n)
        else:
            result.append(f"{n}_{seen.setdefault(n, 0)}")
            seen[n] += 1
    return result


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "a mapping with keys " + ", ".join(repr(k) for k in batch)
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def _structure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    parts = [_leaf(a) for a in args] + [f"{k}={_leaf(v)}" for k, v in kwargs.items()]
    return "(" + ", ".join(parts) + ")"


def _leaf(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
