"""What every program of every block needs, found by running each once on fake tensors; equal blocks are run once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bpfx.passes import programs
from bpfx.passes.graph import HEADS, tensor_bytes
from bpfx.passes.liveness import LivenessError, mark, predict_peak
from bpfx.passes.programs import ForwardOnce, LocalGradient, LossGradient, Sink, VectorJacobian
from bpfx.passes.stages import Stage

Categories = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Cost:
    """One program: peak bytes above what it is given, those bytes by category, FLOPs, and bytes of its gradients."""

    peak: int = 0
    categories: Categories = dataclasses.field(default_factory=dict)
    flops: int = 0
    gradients: int = 0


class StageCosts:
    """The programs of one block; what is asked for is found at the first asking.

    Attributes:
        stage: the programs.
        outputs, cotangents: bytes of values that cross, and of their cotangents, by the name of the value.
        trainable: bytes of the parameters that train, by name.
        largest_parameter: bytes of the largest of them.
    """

    def __init__(self, runner: _Runner, named: dict[str, Tensor]) -> None:
        self._runner = runner
        self.stage = stage = runner.stage
        sizes = {n.name: tensor_bytes(v) for n, v in runner.crossing.items()}
        block = stage.block
        self.outputs = {n.name: sizes[n.name] for n in block.outputs}
        self.cotangents = {n.name: sizes[n.name] for n in block.inputs if n.name in block.differentiable}
        self.trainable = {n: tensor_bytes(named[n]) for n in block.trainable}
        self.largest_parameter = max(self.trainable.values(), default=0)

    @property
    def forward(self) -> Cost:
        return self._runner.forward()[0]

    def local(self, keep: bool) -> Cost:
        """The local gradient. ``keep``: its gradients are alive at its end; otherwise each is taken away at once."""
        return self._runner.local(keep)

    @property
    def head(self) -> Cost | None:
        """The head's forward and backward alone; ``None`` where the block has none."""
        return self._runner.head()

    @property
    def head_bytes(self) -> int:
        """Bytes of the head's gradient."""
        program = self.stage.local
        loss = program.local_loss if isinstance(program, LocalGradient) else None
        return sum(map(tensor_bytes, loss.parameters_now())) if loss is not None else 0

    def vjp(self, keep: bool) -> Cost:
        """Recomputation and backward; ``keep`` as for :meth:`local`."""
        return self._runner.vjp(keep)


def stage_costs(
    graph_inputs: Sequence[fx.Node | None],
    weights: Any,
    stages: Sequence[Stage],
    named: dict[str, Tensor],
    tensors: Sequence[Tensor],
) -> list[StageCosts]:
    """Costs of all stages on inputs of these shapes.

    Args:
        graph_inputs: the graph's user inputs.
        weights: the weight store that the programs look names up in.
        stages: of one variant.
        named: every weight and every tensor of the heads, by name.
        tensors: a batch, or a micro-batch; only its shapes matter.

    Raises:
        LivenessError: a program cannot run on fake tensors.
    """
    # Tensors that are fake already have a mode of their own, and fakes of two modes do not mix.
    mode = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    try:
        fakes: dict[str, Tensor] = {n: mode.from_tensor(t) for n, t in named.items()}
        values: dict[str, Any] = {
            n.name: t if isinstance(t, FakeTensor) else mode.from_tensor(t)
            for n, t in zip(graph_inputs, tensors, strict=True)
            if n is not None
        }
    except Exception as error:
        raise LivenessError(f"a tensor has no fake version: {type(error).__name__}: {error}") from error
    known: dict[Any, tuple[Cost, list[Any]]] = {}
    found = []
    for stage in stages:
        runner = _Runner(stage, weights, fakes, values, mode, known)
        outputs = runner.forward()[1]
        values.update((n.name, v) for n, v in zip(stage.block.outputs, outputs, strict=True))
        runner.crossing = {n: values[n.name] for n in (*stage.block.inputs, *stage.block.outputs)}
        found.append(StageCosts(runner, named))
    return found


class _Runner:
    """Runs the programs of one stage on fake tensors, or finds them among those of an equal stage."""

    def __init__(
        self,
        stage: Stage,
        weights: Any,
        fakes: dict[str, Tensor],
        values: dict[str, Any],
        mode: FakeTensorMode,
        known: dict[Any, tuple[Cost, list[Any]]],
    ) -> None:
        self.stage, self.weights, self.fakes, self.values = stage, weights, fakes, values
        self.mode, self.known = mode, known
        self.crossing: dict[fx.Node, Any] = {}

    def local(self, keep: bool) -> Cost:
        program = self.stage.local
        if isinstance(program, ForwardOnce):
            return Cost()
        key: tuple[Any, ...] = ("local", keep, *(id(p.block.source) for p in (program, *program.ahead)))
        loss = program.local_loss
        if loss is not None:
            key += (*self._head_key(loss), len(program.feature_names))

        def run(given: list[Any], sink: Sink) -> list[Any]:
            *outputs, _, _ = program(given, sink)
            mark("boundaries", outputs)
            return outputs

        return self._cost(key, [self.values[n.name] for n in self.stage.arguments], run, keep)[0]

    def head(self) -> Cost | None:
        program = self.stage.local
        loss = program.local_loss if isinstance(program, LocalGradient) else None
        if loss is None:
            return None
        assert isinstance(program, LocalGradient)
        names = (program.feature_names, program.entering_names, program.user_inputs)
        given = [[self.values.get(n) for n in part] for part in names]
        count, after = len(given[0]), len(given[0]) + len(given[1])

        def run(values: list[Any], sink: Sink) -> list[Any]:
            features = [v.detach().requires_grad_() for v in values[:count]]
            with torch.enable_grad():
                value = loss(features, values[after:], values[count:after])
                torch.autograd.grad(value, [*features, *loss.parameters_now()], allow_unused=True)
            return []

        return self._cost(("head", *self._head_key(loss)), [v for part in given for v in part], run, False)[0]

    def _head_key(self, loss: programs.BoundaryLoss) -> tuple[Any, ...]:
        head = [(tuple(t.shape), t.dtype) for t in loss.tensors_now()]
        return type(loss.head), loss.head.description, str(head)

    def forward(self) -> tuple[Cost, list[Any]]:
        program = self.stage.forward
        if program is None:  # the last block: only its outputs are wanted
            program = programs.Forward(self.stage.block, self.weights)

        def run(given: list[Any], sink: Sink) -> list[Any]:
            outputs = list(program(*given))
            given.clear()
            mark("boundaries", outputs)
            return outputs

        return self._cost((type(program).__name__, id(self.stage.block.source)), self._inputs(), run, False)

    def vjp(self, keep: bool) -> Cost:
        program = self.stage.vjp
        if program is None:
            return Cost()
        where = (tuple(program.wanted), tuple(program.given))
        key = (type(program).__name__, keep, id(self.stage.block.source), where)
        if isinstance(program, LossGradient):

            def last(given: list[Any], sink: Sink) -> list[Any]:
                results, found, _ = program.pull(given, 1.0, sink)
                mark("boundaries", [*found, *results])
                return [*results, *found]

            return self._cost(key, self._inputs(), last, keep)[0]
        with self.mode:
            cotangents = [torch.empty_like(self.crossing[self.stage.block.outputs[i]]) for i in program.given]

        def run(given: list[Any], sink: Sink) -> list[Any]:
            assert isinstance(program, VectorJacobian)
            count = len(given) - len(cotangents)
            found, _ = program.pull(None, given[:count], given[count:], sink)
            mark("boundaries", found)
            return list(found)

        return self._cost(key, [*self._inputs(), *cotangents], run, keep)[0]

    def _inputs(self) -> list[Any]:
        return [self.values[n.name] for n in self.stage.block.inputs]

    def _cost(
        self, key: tuple[Any, ...], given: list[Any], run: Callable[[list[Any], Sink], list[Any]], keep: bool
    ) -> tuple[Cost, list[Any]]:
        shapes = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in given)
        key = (*key, shapes)
        if key in self.known:
            return self.known[key]
        results: list[Any] = []
        sizes: list[int] = []

        def fn(weights: dict[str, Tensor], values: list[Any]) -> Any:
            kept: list[Tensor] = []

            def sink(name: str, grad: Tensor) -> None:
                mark("heads" if name.startswith(HEADS) else "gradients", grad)
                sizes.append(tensor_bytes(grad))
                if keep:
                    kept.append(grad)

            with self.weights.override(weights):
                results.extend(run(values, sink))
            return results, kept

        inputs = [v.detach() if isinstance(v, Tensor) else v for v in given]
        with _eager(self.stage):
            prediction = predict_peak(fn, self.fakes, inputs)
        cost = Cost(prediction.peak_bytes, prediction.categories, prediction.flops, sum(sizes))
        outputs = [v.detach() if isinstance(v, Tensor) else v for v in results]
        self.known[key] = cost, outputs
        return self.known[key]


@contextmanager
def _eager(stage: Stage) -> Iterator[None]:
    """The uncompiled programs: compiled code does not run on fake tensors."""
    local = stage.local if isinstance(stage.local, LocalGradient) else None
    loss = local.local_loss if local is not None else None
    blocks = [stage.block, *(p.block for p in (local.ahead if local is not None else ()))]
    codes = [block.code for block in blocks]
    joint, call = (local.joint if local is not None else None), (loss.call if loss is not None else None)
    try:
        for block in blocks:
            block.code = block.source
        if local is not None:
            local.__dict__["joint"] = None
        if loss is not None:
            loss.__dict__["call"] = loss.head
        yield
    finally:
        for block, code in zip(blocks, codes, strict=True):
            block.code = code
        if local is not None:
            local.__dict__["joint"] = joint
        if loss is not None:
            loss.__dict__["call"] = call
