"""What lies behind a boundary, in parts, and heads made of copies of some of them.

The way from a boundary to the predictions is cut where exactly one value is alive that layers have made: between two
layers of a plain network, between two residual blocks. A part is what lies between two such points and holds at least
one matrix or kernel; all of one numbered layer is one part. Shapes and masks that follow from the batch alone are
computed once for all parts.
"""

from __future__ import annotations

import dataclasses
import itertools
import os.path
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from bpfx.errors import BpfxError
from bpfx.losses import Feature, Predictor, TailHead
from bpfx.passes.alias import Aliases, analyse
from bpfx.passes.graph import ModelGraph, Weights, is_differentiable_dtype, module_path, tensor_bytes
from bpfx.passes.lower import Block
from bpfx.passes.opaque import draws
from bpfx.passes.tail import _DROPOUT, SubProgram

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
# As in the heads pass: nothing smaller than this is borrowed for its size.
HEAD_COPY = 2**20
_NUMBERED = re.compile(r".*\d\.")  # a path up to its last numbered module


@dataclasses.dataclass
class Part:
    """A piece of the way from a boundary to the predictions.

    Attributes:
        name: path of the modules whose weights it reads.
        start: the value that it reads.
        ends: the value that it makes; the predictions, where it is the last.
        nodes: of the forward graph, in execution order.
        optional: whether what it makes could stand for what it reads: the same shape and dtype.
    """

    name: str
    start: fx.Node
    ends: list[fx.Node]
    nodes: list[fx.Node]
    optional: bool


class Way:
    """The way from a boundary to the predictions.

    Args:
        graph: the forward graph.
        weights: looks up what trains.
        predictions: the values that the loss is computed from.
    """

    def __init__(self, graph: ModelGraph, weights: Weights, predictions: Sequence[fx.Node]) -> None:
        self.graph, self.weights, self.predictions = graph, weights, list(predictions)
        self.order = {n: i for i, n in enumerate(graph.compute_nodes())}
        self.aliases: Aliases = analyse(graph.graph)
        self.upstream = _closure(predictions)
        self.hidden = self._hidden_writes()
        self.upstream |= _closure(self.hidden)
        self.free = self._free()

    def _hidden_writes(self) -> list[fx.Node]:
        """In-place operations whose result nobody reads by name, though their memory is read later."""
        end = max((self.order.get(p, -1) for p in self.predictions), default=-1)
        return [
            m.node
            for root, mutations in self.aliases.mutations.items()
            if root not in self.graph.weight_of and any(n in self.upstream for n in self.aliases.groups[root])
            for m in mutations
            if m.node not in self.upstream and self.order.get(m.node, end) < end
        ]

    def _free(self) -> set[fx.Node]:
        """Values that follow from the batch and from buffers alone: no layer has to run again to make them."""
        parameters = set(self.weights.parameter_names)
        written = {r: ms for r, ms in self.aliases.mutations.items() if r.op != "placeholder"}
        barred: set[fx.Node] = set()
        while True:
            free: set[fx.Node] = set()
            for node in self.graph.graph.nodes:
                if node.op == "placeholder":
                    known = self.graph.weight_of.get(node) not in parameters
                elif node.op == "get_attr":
                    known = True
                else:
                    known = node.op == "call_function" and not draws(node, self.graph.root) and node not in barred
                    known = known and all(a in free for a in node.all_input_nodes)
                if known:
                    free.add(node)
            # Memory that a layer's result is written into is that layer's, from the first.
            more = {
                n
                for root, mutations in written.items()
                if any(m.node not in free or m.node in self.hidden for m in mutations)
                for n in self.aliases.groups[root]
            }
            if more <= barred:
                return free
            barred |= more

    def parts(self, boundary: fx.Node, position: int) -> list[Part]:
        """The parts behind a boundary, in order.

        Args:
            boundary: the value that crosses.
            position: index of the last node before the boundary.

        Raises:
            BpfxError: other values cross as well, or no weights are left.
        """
        made = [n for n in self.order if n in self.upstream and n not in self.free]
        ahead = len(self.order)
        until = {
            n: ahead if n in self.predictions else max(self.order.get(u, -1) for u in n.users if u in self.upstream)
            for n in made
            if n in self.predictions or any(u in self.upstream for u in n.users)
        }
        alive = {n for n in made if self.order[n] <= position and until.get(n, -1) > position}
        if alive != {boundary}:
            names = ", ".join(sorted(f"{n.name} {_shape(n)}" for n in alive)) or "nothing"
            raise BpfxError(f"it needs one value that everything behind it follows from, but {names} cross there")
        points = [(position, boundary)]
        for node in made:
            p = self.order[node]
            if p <= position:
                continue
            alive = {n for n in alive if until[n] > p}
            if until.get(node, -1) > p:
                alive.add(node)
            if len(alive) == 1 and (s := next(iter(alive))) is not points[-1][1] and s not in self.predictions:
                if is_differentiable_dtype(s.meta.get("val")):
                    points.append((p, s))
        segments = []
        for (p, start), after in itertools.zip_longest(points, points[1:]):
            last, ends = after if after is not None else (ahead, None)
            nodes = [n for n in made if p < self.order[n] <= last]
            segments.append(Part("", start, [ends] if ends is not None else self.predictions, nodes, False))
        return self._merged(segments)

    def _merged(self, segments: list[Part]) -> list[Part]:
        """Parts with a matrix each. An activation, and a norm beside its layer, ends a part; a pooling begins one."""
        groups: list[list[Part]] = []
        pending: list[Part] = []
        for segment in segments:
            if self._matrices(segment.nodes):
                groups.append([*pending, segment])
                pending = []
            elif pending or not groups or self._begins(segment, groups[-1]):
                pending.append(segment)
            else:
                groups[-1].append(segment)
        if not groups:
            raise BpfxError("it needs layers with weights behind the boundary, and there are none")
        groups[-1].extend(pending)
        parts: list[Part] = []
        for group in groups:
            nodes = [n for segment in group for n in segment.nodes]
            start, ends = group[0].start, group[-1].ends
            part = Part(self._name(nodes), start, ends, nodes, self._alike(start, ends))
            if parts and part.optional and parts[-1].optional and _same_layer(parts[-1].name, part.name):
                # Attention and what follows it are one layer: chosen one by one, all of a kind could go.
                before = parts.pop()
                nodes = [*before.nodes, *part.nodes]
                part = Part(self._name(nodes), before.start, ends, nodes, True)
            parts.append(part)
        parts[-1].name, parts[-1].optional = "readout", False
        return parts

    def _begins(self, segment: Part, group: list[Part]) -> bool:
        if not self._alike(segment.start, segment.ends):
            return True
        norms = [n for n in segment.nodes if any(a in self.graph.weight_of for a in n.all_input_nodes)]
        layers = self._matrices([n for s in group for n in s.nodes])
        return bool(norms) and _parent(module_path(norms[0])) != _parent(module_path(layers[-1]))

    def _alike(self, start: fx.Node, ends: list[fx.Node]) -> bool:
        a, b = start.meta.get("val"), ends[0].meta.get("val")
        if len(ends) != 1 or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        dims = self.graph.batch_dims
        return (a.shape, a.dtype, dims.get(start)) == (b.shape, b.dtype, dims.get(ends[0]))

    def _matrices(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes that read a parameter of two dimensions or more; an opaque module counts as one."""
        of, own = self.graph.weight_of, set(self.weights.parameter_names)
        return [
            n
            for n in nodes
            if n.op == "call_module"
            or any(a in of and of[a] in own and self.weights[of[a]].dim() >= 2 for a in n.all_input_nodes)
        ]

    def _name(self, nodes: Sequence[fx.Node]) -> str:
        paths = list(dict.fromkeys(p for n in self._matrices(nodes) if (p := module_path(n))))
        common = os.path.commonpath([p.replace(".", "/") for p in paths]).replace("/", ".") if paths else ""
        return common or (f"{paths[0]} … {paths[-1]}" if paths else "layers without a module")

    def sides(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Values made of the batch alone that these nodes read."""
        read = dict.fromkeys(a for n in nodes for a in n.all_input_nodes)
        return [a for a in read if a in self.free and a in self.order]

    def shared(self, sides: Sequence[fx.Node]) -> SubProgram:
        """The program of such values: ``(*inputs, *weights) -> a tuple of them``."""
        needed = _closure(sides)
        return self.program([n for n in self.order if n in needed], [], list(sides))

    def program(self, nodes: Sequence[fx.Node], values: list[fx.Node], ends: list[fx.Node]) -> SubProgram:
        """These nodes as a module, without dropout: ``(*values, *inputs, *weights) -> a tuple of the ends``."""
        graph, inside = self.graph, set(nodes)
        read = {a for n in nodes for a in n.all_input_nodes}
        inputs = [i for i, n in enumerate(graph.inputs) if n in read]
        placeholders = [n for n in graph.weight_of if n in read]
        new = fx.Graph()
        env = {n: new.placeholder(n.name) for n in (*values, *(graph.inputs[i] for i in inputs), *placeholders) if n}
        random = False
        for node in graph.graph.nodes:
            if node in env or not (node in inside or node.op == "get_attr" and any(u in inside for u in node.users)):
                continue
            written = self.aliases.root[node] in self.aliases.mutations
            if node.target in _DROPOUT:
                before = env[node.args[0]]
                # What is written into later was a tensor of its own.
                env[node] = new.call_function(_aten.clone.default, (before,)) if written else before
                continue
            copied = env[node] = new.node_copy(node, env.__getitem__)
            if node.target is _ATTENTION:
                copied.args = tuple(0.0 if i == 4 else a for i, a in enumerate(copied.args))
                copied.kwargs = {k: v for k, v in copied.kwargs.items() if k != "dropout_p"}
            elif node.target is _aten.view.default and not written:
                copied.target = _aten.reshape.default  # with a part left out, the memory's layout may be another
            else:
                random = random or draws(node, graph.root)
        new.output(tuple(env[n] for n in ends))
        module = fx.GraphModule(graph.root, new)
        return SubProgram(module, values, inputs, [graph.weight_of[n] for n in placeholders], random)


class Piece(TailHead):
    """One part, or what the parts share, with weights of its own.

    Args:
        program: the part.
        copied: which of its weights are copies; the others are read from the model without a gradient.
        weights: of the model.
    """

    def __init__(self, program: SubProgram, copied: Callable[[str], bool], weights: Weights) -> None:
        rows, keys = [], set()
        for name in program.weights:
            own, key = copied(name), name
            while own and (key.replace(".", "_") in keys or hasattr(TailHead, key.replace(".", "_"))):
                key += "_"
            keys.add(key.replace(".", "_"))
            rows.append((key, weights[name], own))
        super().__init__(program.module, program.inputs, rows, weights.__getitem__)
        self.random = program.random
        code = program.module.graph
        aliases = analyse(code)
        given = len(program.values) + len(program.inputs)
        # A boundary's value is also the next block's, and an input the whole model's: only a clone may be overwritten.
        self._cloned = frozenset(
            i
            for i, n in enumerate(itertools.islice(code.nodes, given))
            if any(m.target in aliases.groups[n] for ms in aliases.mutations.values() for m in ms)
        )

    def run(self, *values: Tensor) -> tuple[Tensor, ...]:
        """What it makes of ``(*values, *inputs)``."""
        return tuple(super().predict(*(v.clone() if i in self._cloned else v for i, v in enumerate(values))))


class DownstreamHead(Predictor):
    """Copies of some of the model's later parts, one behind the other.

    Args:
        way: what they are cut from.
        parts: the first one reads the boundary, the last one makes the predictions.
        copied: for a part (its position) and a weight's name, whether the head owns a copy.
    """

    def __init__(self, way: Way, parts: Sequence[Part], copied: Callable[[int, str], bool]) -> None:
        super().__init__()
        sides = list(dict.fromkeys(n for part in parts for n in way.sides(part.nodes)))
        buffers = lambda name: name not in way.weights.parameter_names  # noqa: E731
        self.shared = Piece(way.shared(sides), buffers, way.weights) if sides else None
        pieces = []
        self._sides: list[list[int]] = []
        for k, part in enumerate(parts):
            read = way.sides(part.nodes)
            program = way.program(part.nodes, [part.start, *read], part.ends)
            pieces.append(Piece(program, lambda name, k=k: copied(k, name), way.weights))  # type: ignore[misc]
            self._sides.append([sides.index(n) for n in read])
        self.parts = torch.nn.ModuleList(pieces)
        every = [*pieces, *([self.shared] if self.shared is not None else [])]
        self.inputs = tuple(sorted({i for piece in every for i in piece.inputs}))
        self.borrows = tuple(dict.fromkeys(n for piece in every for n in piece.borrows))
        self.random = any(piece.random for piece in every)
        first = parts[0].start
        self._static = None if way.graph.dynamic else (way.graph.batch_dims.get(first, 0), way.graph.batch_size)
        names = ", ".join(part.name for part in parts)
        self.description = f"{len(parts)} copied part{'s' if len(parts) > 1 else ''}: {names}" + (
            f"; {len(self.borrows)} weights borrowed" if self.borrows else ""
        )

    def place(self, feature: Feature) -> None:
        """The copies are where the model's own weights are, in their dtypes."""

    def predict(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self._static is not None and values[0].shape[self._static[0]] != self._static[1]:
            try:
                return self._predict(*values)
            except RuntimeError as error:
                raise BpfxError(
                    f"this model was captured for batches of {self._static[1]} only, and its later parts, copied into "
                    f"a head, do not take {values[0].shape[self._static[0]]}; leave the last batch out (drop_last=True)"
                ) from error
        return self._predict(*values)

    def _predict(self, value: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        shared: tuple[Tensor, ...] = ()
        if self.shared is not None:
            shared = self.shared.run(*(given[i] for i in self.shared.inputs))
        made: tuple[Tensor, ...] = (value,)
        for piece, sides in zip(self.parts, self._sides, strict=True):
            assert isinstance(piece, Piece)
            made = piece.run(made[0], *(shared[i] for i in sides), *(given[i] for i in piece.inputs))
        return made[0] if len(made) == 1 else made


def uniform(count: int, depth: int) -> list[int]:
    """Which of ``count`` layers an auxiliary network of ``depth`` layers has, from 0: every (count / depth)-th one.

    Example:
        >>> uniform(6, 2), uniform(7, 3), uniform(2, 5)
        ([2, 5], [1, 4, 6], [0, 1])
    """
    if depth >= count:
        return list(range(count))
    return [round(count / depth * i) - 1 for i in range(1, depth + 1)]


def maker(
    graph: ModelGraph,
    weights: Weights,
    first: Block,
    block: Block,
    features: Sequence[fx.Node],
    predictions: Sequence[fx.Node],
) -> Callable[[int], Predictor]:
    """Makes heads of copies of ``depth`` later parts for a boundary.

    Args:
        first: the block that the head trains.
        block: the one in front of the boundary.
        features: what crosses.
        predictions: what the loss is computed from.
    """

    def make(depth: int) -> DownstreamHead:
        where = f"a head of the model's later parts does not fit behind block {block.index} ({block.name})"
        instead = f"use another local loss there, as in local_loss={{'*': 'auglocal', {first.index}: 'supervised'}}"
        if not predictions:
            raise BpfxError(f"{where}: the model makes no predictions; {instead}")
        way = Way(graph, weights, predictions)
        try:
            if len(features) != 1:
                names = ", ".join(f"{n.name} {_shape(n)}" for n in features)
                raise BpfxError(f"it needs one value that everything behind it follows from, but {names} cross there")
            parts = way.parts(features[0], way.order[block.nodes[-1]])
        except BpfxError as error:
            raise BpfxError(f"{where}: {error}; {instead}") from None
        wanted = set(uniform(len(parts) - 1, depth))
        chosen = [part for i, part in enumerate(parts) if i in wanted or not part.optional]
        for part in chosen:
            call = next((n for n in part.nodes if n.op == "call_module"), None)
            if call is not None:
                path = module_path(call) or "the model"
                raise BpfxError(f"{where}: {path} runs as one opaque module and cannot be copied; {instead}")
        return DownstreamHead(way, chosen, _copied(way, chosen, {*first.weights, *block.weights}))

    return make


def _copied(way: Way, parts: Sequence[Part], own: set[str]) -> Callable[[int, str], bool]:
    """What trains is copied, and so are buffers; a readout that outweighs all the rest (a vocabulary's) is read."""
    of, weights = way.graph.weight_of, way.weights
    used = [{of[a] for n in part.nodes for a in n.all_input_nodes if a in of} for part in parts]
    sizes = [{n: tensor_bytes(weights[n]) for n in names if weights[n].requires_grad} for names in used]
    total = sum(tensor_bytes(weights[n]) for n in own) + sum(sum(s.values()) for s in sizes)

    def copied(part: int, name: str) -> bool:
        if name not in weights.parameter_names:
            return True
        size = sizes[part].get(name)
        return size is not None and not (part == len(parts) - 1 and size > max(HEAD_COPY, total - size))

    return copied


def _closure(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they depend on."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _same_layer(first: str, second: str) -> bool:
    """Whether two parts belong to one of several numbered layers: ``h.1.attn`` and ``h.1.mlp``."""
    a, b = (_NUMBERED.match(f"{path}.") for path in (first, second))
    return a is not None and b is not None and (a[0].startswith(b[0]) or b[0].startswith(a[0]))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "of no fixed shape"
