"""How the losses of parts of a batch combine into the loss of the whole: ``loss = Σ share_i · loss(piece_i)``.

A share is n_i / n where the loss is a mean over samples and 1 where it is a sum. Where the loss divides by a number
that the data decide (labels that are not ignored, class weights, a mask) the share is that number's: D_i / D. No answer
is given before it held on a few samples, on other predictions for them, and on copies with entries masked, so that
an example without padding does not pass for one that never has any. A loss between samples has no shares at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bpfx.errors import BpfxError
from bpfx.passes import tail
from bpfx.passes.batch import BatchSpec
from bpfx.passes.capture import Captured
from bpfx.passes.graph import ModelGraph, Weights, ancestors
from bpfx.passes.rng import preserve, preserved

_aten = torch.ops.aten
Pieces = Sequence[Sequence[Tensor]]
_CLASS_LOSSES = (_aten.cross_entropy_loss, _aten.nll_loss, _aten.nll_loss2d, _aten.nll_loss_nd)
_SAME = (_aten.alias, _aten.clone, _aten.to, _aten._to_copy, _aten.view, _aten.reshape, _aten.contiguous, _aten.squeeze)
_COMPARISONS = (_aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge)
_MEAN = 1  # as ATen numbers the reductions
# A graph of one batch size holds that size as plain numbers, so a factor in it may be a batch size in disguise; a loss
# of these operations alone has none. Shapes that are written into a view make the trial itself fail.
_SIZELESS = {
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "mean", "sum"),
    *("binary_cross_entropy_with_logits", "cross_entropy_loss", "nll_loss", "nll_loss2d", "nll_loss_nd"),
    *("log_softmax", "softmax", "sigmoid", "to", "_to_copy", "contiguous", "clone", "alias", "view", "reshape"),
    *("flatten", "squeeze", "unsqueeze", "transpose", "permute", "lift_fresh_copy", "detach", "detach_"),
}
# Pieces have at least two samples each: a graph is captured for two and more.
_SIZES = (7, 6, 5)
# Rounding of a sum in another order; a loss in low precision is looked at in double wherever it can be computed so.
_TOLERANCE = {torch.float64: 3e-6, torch.float32: 2e-5}


@dataclasses.dataclass(frozen=True)
class _Term:
    """One addend of the loss: its share of each piece (``None``: it is the same constant in every piece)."""

    kind: str
    shares: Callable[[Pieces], list[float]] | None


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the losses of pieces combine.

    Attributes:
        kind: "mean", "sum", "counted" (the data decide the shares) or "unknown" (no shares were found).
        reason: in words; for "unknown" what was found, with the numbers.
    """

    kind: str
    reason: str
    terms: tuple[_Term, ...] = ()

    def shares(self, pieces: Pieces) -> list[float]:
        """Share of each piece (the flattened user inputs, as :meth:`BatchSpec.narrow` gives them) in the whole batch.

        A piece in which every label is ignored has share 0 and, on its own, a loss of NaN: skip pieces with share 0
        instead of multiplying. Where the whole batch is ignored the shares are those of the samples, and the loss
        is NaN as it plainly is. Counting waits for the device, once a piece.

        Raises:
            BpfxError: the kind is "unknown", or addends of the loss need different shares on these data.
        """
        if self.kind == "unknown":
            raise BpfxError(f"the loss cannot be put together from parts of the batch: {self.reason}")
        found = [term.shares(pieces) for term in self.terms if term.shares is not None]
        for other in found[1:]:
            if any(abs(a - b) > 1e-6 for a, b in zip(found[0], other, strict=True)):
                raise BpfxError(
                    f"the addends of the loss need different shares for these parts of the batch, {_words(found[0])} "
                    f"and {_words(other)}: they divide by different counts; pass whole batches"
                )
        if len(found) < len(self.terms) and abs(sum(found[0]) - 1) > 1e-6:
            raise BpfxError(f"the loss has a constant addend, and the shares {_words(found[0])} do not add up to 1")
        return found[0]


def find_reduction(
    captured: Captured, spec: BatchSpec, predictions: list[fx.Node], tensors: Sequence[Tensor]
) -> Reduction:
    """Find out how the loss adds up, from the graph where it says so and by trial otherwise.

    Args:
        captured: its graph has the shapes of ``shapes.propagate``.
        predictions: what the loss is computed from (``tail.find_predictions``).
        tensors: the user inputs of a few samples.
    """
    try:
        trial = _Trial(captured, spec, predictions, tensors)
        terms = [_classify(trial, node) for node in _terms(trial, captured.graph.loss)]
        kinds = {term.kind for term in terms} - {"constant"}
        if not kinds:
            raise _Unknown("the loss depends on no sample")
        kind = kinds.pop() if len(kinds) == 1 else "counted"
        found = Reduction(kind, _REASONS[kind], tuple(terms))
        trial.check(found)
    except _Unknown as unknown:
        return Reduction("unknown", str(unknown))
    return found


_REASONS = {
    "mean": "the loss of a batch is the mean over its samples",
    "sum": "the loss of a batch is the sum over its samples",
    "counted": "the loss is divided by a count that the data decide (labels not ignored, class weights, a mask)",
}


class _Unknown(Exception):
    """No shares; the message says why."""


@dataclasses.dataclass
class _Case:
    label: str
    predictions: list[Tensor]
    tensors: list[Tensor]


class _Trial:
    """The loss as a function of predictions and inputs, on a few samples and on variations of them."""

    def __init__(
        self, captured: Captured, spec: BatchSpec, predictions: list[fx.Node], tensors: Sequence[Tensor]
    ) -> None:
        self.captured, self.spec, self.nodes = captured, spec, predictions
        self.graph, self.weights = captured.graph, captured.weights
        self.loss = self.program(self.graph.loss)
        given, self.flexible = self._samples(tensors)
        self.size = size = spec.samples(given)
        try:
            values, loss = _run(self.graph, self.weights, predictions, given)
            again, _ = self._evaluate(self.loss, values, given)
        except Exception as error:  # a model may refuse samples that repeat, or so few of them
            raise _Unknown(f"the model does not run on {size} samples of the example: {error}") from error
        # Numbers for one sample of each prediction: (dimension, entries); ``None`` where it has no samples.
        self.layout = [self._layout(node, value, size) for node, value in zip(predictions, values, strict=True)]
        scale = max(abs(loss), 1e-30)
        if math.isfinite(loss) and not abs(again - loss) <= 2e-2 * scale:
            raise _Unknown(f"the loss cannot be computed from the predictions alone: {again:.6g} instead of {loss:.6g}")
        if not self.flexible:  # take the rows of what it gave
            self.size = _SIZES[0]
            pairs = zip(given, spec.per_sample, strict=True)
            given = [_rows(t, 0, 1, size, self.size) if per else t for t, per in pairs]
            laid = zip(values, self.layout, strict=True)
            values = [v if at is None else _rows(v, *at, size, self.size) for v, at in laid]
        self.cases = self._cases(values, given)

    def program(self, node: fx.Node) -> tail.SubProgram:
        """The loss, or an addend of it, from the predictions."""
        found = tail.extract(self.graph, [node], self.nodes, drop=False) if self.nodes else None
        if found is None:
            raise _Unknown("the loss cannot be told apart from the model: it needs more than the predictions")
        if found.random:
            raise _Unknown("the loss draws random numbers")
        return found

    def _samples(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """A few samples that the graph serves, and whether it serves other numbers of them than the batch's."""
        n, per_sample = self.spec.samples(tensors), self.spec.per_sample
        for size in _SIZES if self.graph.dynamic and self.graph.guard is not None else ():
            found = [_rows(t, 0, 1, n, size) if per else t for t, per in zip(tensors, per_sample, strict=True)]
            if size == self.graph.batch_size:
                continue  # shapes at another batch size tell which dimension counts samples
            try:
                self.graph.guard(*found)  # type: ignore[misc]
            except Exception:  # the guard's message speaks of symbols; another number of samples may do
                continue
            return found, True
        size = self.graph.batch_size
        if size == 1:
            raise _Unknown("the example has one sample, and the graph serves no other number")
        return [_rows(t, 0, 1, n, size) if per else t for t, per in zip(tensors, per_sample, strict=True)], False

    def _layout(self, node: fx.Node, value: Tensor, size: int) -> tuple[int, int] | None:
        if self.flexible:
            planned = [int(s) for s in node.meta["val"].shape]
            found = [d for d, (a, b) in enumerate(zip(planned, value.shape, strict=True)) if a != b]
        else:
            found = [d for d, s in enumerate(value.shape) if s == size]
        if len(found) > 1:
            raise _Unknown(f"{node.name} of shape {tuple(value.shape)} may have an entry for every pair of samples")
        if found and value.shape[found[0]] % size == 0:
            return found[0], value.shape[found[0]] // size
        if _inputs_of(self.graph, node):
            raise _Unknown(f"the loss reads {node.name} of shape {tuple(value.shape)}, which has no entry per sample")
        return None

    def _cases(self, values: list[Tensor], given: list[Tensor]) -> list[_Case]:
        noise = torch.Generator().manual_seed(0)
        # Factors below 1 keep probabilities and log-probabilities what they are.
        scaled = [v * (1 - 0.3 * torch.rand(v.shape, generator=noise)).to(v) for v in values]
        cases = [_Case("the example", values, given), _Case("other predictions", scaled, given)]
        for i in self.loss.inputs:
            if self.spec.per_sample[i]:
                for number in _fillings(self.loss.module.graph, given[i]):
                    masked = given[i].clone(memory_format=torch.contiguous_format)
                    masked[0].view(-1)[::2] = number
                    masked[2] = number
                    label = f"entries of {self.spec.names[i]} set to {number}"
                    cases.append(_Case(label, scaled, [*given[:i], masked, *given[i + 1 :]]))
        return cases

    def piece(self, case: _Case, start: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
        cut = [
            v if at is None else v.narrow(at[0], start * at[1], length * at[1])
            for v, at in zip(case.predictions, self.layout, strict=True)
        ]
        return cut, self.spec.narrow(case.tensors, start, length)

    def _evaluate(
        self, program: tail.SubProgram, values: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[float, float]:
        """The value, and the rounding to allow for."""
        arguments = [*values, *(tensors[i] for i in program.inputs), *(self.weights[n] for n in program.weights)]
        with torch.no_grad():
            try:
                loss = program.module(*(t.double() if t.is_floating_point() else t.clone() for t in arguments))
            except Exception:  # a loss that insists on its own precision
                loss = program.module(*(t.clone() for t in arguments))
        return float(loss), _TOLERANCE.get(loss.dtype, 2e-2)

    def splits(self) -> list[list[int]]:
        return [[2, self.size - 2], [self.size - 3, 3]] + [[2, 2, self.size - 4]] * (self.size >= 6)

    def outcomes(self, program: tail.SubProgram) -> list[tuple[_Case, list[int], float, list[float], float]]:
        """Every case and split: the whole loss, those of the pieces, and the tolerance. The example must be there."""
        found = []
        for case in self.cases:
            try:
                whole, rounding = self._evaluate(program, case.predictions, case.tensors)
                rows = []
                for lengths in self.splits():
                    starts = [sum(lengths[:i]) for i in range(len(lengths))]
                    pieces = [self.piece(case, s, k) for s, k in zip(starts, lengths, strict=True)]
                    rows.append((case, lengths, whole, [self._evaluate(program, *p)[0] for p in pieces], rounding))
            except Exception as error:
                if case is self.cases[0]:
                    raise _Unknown(f"the loss cannot be computed on parts of the batch: {error}") from error
                continue  # a mask that this loss has no meaning for
            if math.isfinite(whole):
                found.extend(rows)
        if not found:
            raise _Unknown("the loss of the example is not finite")
        return found

    def check(self, reduction: Reduction) -> None:
        """Raise unless the loss is the sum of the shares on every case."""
        for case, lengths, whole, parts, rounding in self.outcomes(self.loss):
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            pieces = [self.piece(case, s, k)[1] for s, k in zip(starts, lengths, strict=True)]
            try:
                shares = reduction.shares(pieces)
            except BpfxError as error:
                if case is self.cases[0]:
                    raise _Unknown(str(error)) from error
                continue  # raised again when such data come
            if not _adds_up(whole, parts, shares, rounding):
                raise _Unknown(_numbers(case, lengths, whole, parts) + f", with shares {_words(shares)}")


def _classify(trial: _Trial, node: fx.Node) -> _Term:
    graph = trial.graph
    if _is_constant(graph, node):
        return _Term("constant", None)
    packet = _packet(node)
    program = trial.program(node)
    if not trial.flexible:
        for inner in program.module.graph.nodes:
            if inner.op == "call_function" and getattr(_packet(inner), "__name__", "") not in _SIZELESS:
                raise _Unknown(f"the graph serves one batch size only, and {inner.name} in the loss may depend on it")
    if _counts_labels(node):
        return _Term("counted", _label_shares(trial, node))
    divisor = node.args[1] if packet is _aten.div and len(node.args) > 1 else None
    if isinstance(divisor, fx.Node) and isinstance(divisor.meta.get("val"), Tensor) and _is_scalar(divisor):
        by_divisor = _divisor_shares(trial, divisor)
        if by_divisor is not None:
            return _Term("counted", by_divisor)
    inside = ancestors(node) - set().union(*(ancestors(p) for p in trial.nodes))
    if any(_counts_labels(n) for n in inside):
        raise _Unknown(f"a mean over labels goes into {node.name}, which is not a sum of losses")
    return _by_trial(trial, program)


def _terms(trial: _Trial, node: fx.Node) -> list[fx.Node]:
    """The addends of the loss, without constant factors: shares do not depend on those."""
    packet = _packet(node)
    scalars = [a for a in node.args if isinstance(a, fx.Node) and _is_scalar(a)]
    if packet in _SAME and len(scalars) == 1:
        return _terms(trial, scalars[0])
    if not trial.flexible:
        return [node]  # what looks constant may be a batch size
    if packet in (_aten.add, _aten.sub) and len(scalars) == 2:
        return _terms(trial, scalars[0]) + _terms(trial, scalars[1])
    if packet in (_aten.mul, _aten.div, _aten.neg) and scalars:
        varying = [a for a in scalars if not _is_constant(trial.graph, a)]
        if len(varying) == 1 and (packet is not _aten.div or varying[0] is node.args[0]):
            # A number that is a node is a size, which is no constant.
            if all(a in scalars or not isinstance(a, fx.Node) for a in node.args):
                return _terms(trial, varying[0])
    return [node]


def _is_constant(graph: ModelGraph, node: fx.Node) -> bool:
    """Whether no sample has a part in this value (a penalty on weights)."""
    return not _inputs_of(graph, node)


def _counts_labels(node: fx.Node) -> bool:
    """Whether this is a mean over labels, some of which may be ignored or weighted."""
    if _packet(node) not in _CLASS_LOSSES or _argument(node, 3, "reduction", _MEAN) != _MEAN:
        return False
    target = _argument(node, 1, "target", None).meta.get("val")
    return isinstance(target, Tensor) and not target.is_floating_point()  # probabilities are never ignored


def _label_shares(trial: _Trial, node: fx.Node) -> Callable[[Pieces], list[float]]:
    target, weight = _argument(node, 1, "target", None), _argument(node, 2, "weight", None)
    ignored = _argument(node, 4, "ignore_index", -100)
    wanted = [target] + [a for a in (weight, ignored) if isinstance(a, fx.Node)]
    values = _of_inputs(trial.captured, wanted)
    if values is None:
        raise _Unknown(f"the labels of {node.name} are not made from the batch alone")

    def count(tensors: Sequence[Tensor]) -> float:
        labels, *rest = values(tensors)
        classes = rest.pop(0) if isinstance(weight, fx.Node) else None
        kept = labels[labels != (rest[0] if rest else ignored)]
        return float(kept.numel() if classes is None else classes.double()[kept].sum())

    def shares(pieces: Pieces) -> list[float]:
        counts = [count(piece) for piece in pieces]
        total = sum(counts)
        return [c / total for c in counts] if total else _sample_shares(trial.spec, pieces)

    return shares


def _divisor_shares(trial: _Trial, divisor: fx.Node) -> Callable[[Pieces], list[float]] | None:
    value = _of_inputs(trial.captured, [divisor])
    if value is None:
        return None
    joined = {i for i in _inputs_of(trial.graph, divisor) if trial.spec.per_sample[i]}

    def shares(pieces: Pieces) -> list[float]:
        # Not the sum of the pieces' divisors: a mask's count may be clamped from below.
        whole = [torch.cat([p[i] for p in pieces]) if i in joined else t for i, t in enumerate(pieces[0])]
        total = float(value(whole)[0])
        return [float(value(p)[0]) / total for p in pieces] if total else _sample_shares(trial.spec, pieces)

    return shares


def _inputs_of(graph: ModelGraph, node: fx.Node) -> list[int]:
    """Indices of the user inputs that a value is made from."""
    upstream = ancestors(node) | {node}
    return [i for i, n in enumerate(graph.inputs) if n in upstream]


def _of_inputs(captured: Captured, results: list[fx.Node]) -> Callable[[Sequence[Tensor]], list[Any]] | None:
    """These values as a function of the user inputs; ``None`` where training has a part in them."""
    program = tail.extract(captured.graph, results, [], drop=False)
    moving = {*captured.weights.parameter_names, *captured.mutated_buffers}
    if program is None or program.random or not program.inputs or moving & set(program.weights):
        return None
    inputs, names, weights = program.inputs, program.weights, captured.weights
    writes = any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in program.module.graph.nodes)

    def run(tensors: Sequence[Tensor]) -> list[Any]:
        given = [*(tensors[i] for i in inputs), *(weights[n] for n in names)]
        with torch.no_grad():
            found = program.module(*(t.clone() if writes else t for t in given))
        return [found] if len(results) == 1 else list(found)

    return run


def _by_trial(trial: _Trial, program: tail.SubProgram) -> _Term:
    """Mean or sum, whichever holds on every case."""
    possible = {
        "mean": lambda pieces: _sample_shares(trial.spec, pieces),
        "sum": lambda pieces: [1.0] * len(pieces),
    }
    held = set(possible)
    for case, lengths, whole, parts, rounding in trial.outcomes(program):
        shares = {"mean": [k / sum(lengths) for k in lengths], "sum": [1.0] * len(lengths)}
        held &= {kind for kind, of in shares.items() if _adds_up(whole, parts, of, rounding)}
        if not held:
            raise _Unknown(_numbers(case, lengths, whole, parts))
    if len(held) > 1:
        raise _Unknown(f"the loss of the example is {whole:.6g}, as a mean over samples and as a sum")
    kind = held.pop()
    return _Term(kind, possible[kind])


def _adds_up(whole: float, parts: Sequence[float], shares: Sequence[float], rounding: float) -> bool:
    addends = [s * p for s, p in zip(shares, parts, strict=True) if s]
    return abs(sum(addends) - whole) <= rounding * max(abs(whole), *(abs(a) for a in addends), 1e-30)


def _numbers(case: _Case, lengths: list[int], whole: float, parts: list[float]) -> str:
    mean = sum(k * p for k, p in zip(lengths, parts, strict=True)) / sum(lengths)
    return (
        f"on {case.label}, {sum(lengths)} samples have the loss {whole:.6g}, but parts of "
        f"{' + '.join(map(str, lengths))} samples have the mean {mean:.6g} and the sum {sum(parts):.6g}"
    )


def _run(
    graph: ModelGraph, weights: Weights, nodes: Sequence[fx.Node], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """Values of these nodes, and the loss, of one run of the graph that leaves no trace."""
    seen: dict[str, Any] = {}
    names = {n.name for n in nodes}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                seen[n.name] = value.clone()  # the loss may write into it
            return value

    queue = iter(tensors)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    given = [weights[graph.weight_of[n]] if n in graph.weight_of else next(queue).clone() for n in placeholders]
    with preserve(weights), preserved(0), torch.no_grad():
        loss, *_ = Watch(fx.GraphModule(graph.root, graph.graph)).run(*given)
    return [seen[n.name] for n in nodes], float(loss)


def _rows(tensor: Tensor, dim: int, entries: int, n: int, size: int) -> Tensor:
    """``size`` samples from the first of ``n``, over again where there are fewer."""
    index = [(i % n) * entries + j for i in range(size) for j in range(entries)]
    return tensor.index_select(dim, torch.tensor(index, device=tensor.device))


def _fillings(graph: fx.Graph, tensor: Tensor) -> list[Any]:
    """Numbers that may mean "not this one" in an input of the loss."""
    if not tensor.numel():
        return []
    if tensor.dtype == torch.bool:
        return [False, True]
    if tensor.is_floating_point() or tensor.is_complex():
        return [0]
    low, high = int(tensor.min()), int(tensor.max())
    compared = [a for n in graph.nodes if _packet(n) in _COMPARISONS for a in n.args if isinstance(a, int)]
    found = list(dict.fromkeys([0, low, high, *compared, -100]))[:8]
    # An index out of range is an exception on the CPU, and the end of the process's work on any other device.
    return found if tensor.device.type == "cpu" else [c for c in found if low <= c <= high or c == 0]


def _sample_shares(spec: BatchSpec, pieces: Pieces) -> list[float]:
    counts = [spec.samples(piece) for piece in pieces]
    return [c / sum(counts) for c in counts]


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


def _words(shares: Sequence[float]) -> str:
    return "[" + ", ".join(f"{s:.4g}" for s in shares) + "]"
