"""The automatic partition of deep models: exact, heads counted, balanced. Nothing here is timed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, fx, nn

from bpfx._predict import ordered
from bpfx.passes import partition, shapes, tail
from bpfx.passes.batch import BatchSpec, as_call
from bpfx.passes.capture import capture
from bpfx.passes.liveness import node_saved_bytes


def liveness_of(model: nn.Module, loss_fn: Any, batch: Any) -> partition.Liveness:
    """As the compiler makes it."""
    spec = BatchSpec.of(batch, loss_fn is not None)
    args, kwargs = as_call(batch)
    tensors = spec.flatten(args, kwargs)
    captured = capture(model, loss_fn, spec, tensors)
    graph, weights = captured.graph, captured.weights
    shapes.propagate(graph, weights, tensors)
    predictions = tail.find_predictions(graph, weights, spec.targets if loss_fn is not None else None)
    saved = node_saved_bytes(
        fx.GraphModule(graph.root, graph.graph),
        ordered(graph, {n: weights[n] for n in graph.weight_of.values()}, tensors),
    )
    return partition.Liveness(graph, weights, saved, predictions, captured.mutated_buffers)


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def language_model(layers: int, vocabulary: int, width: int = 32, length: int = 16) -> partition.Liveness:
    model = nn.Sequential(
        nn.Embedding(vocabulary, width), *(Layer(width) for _ in range(layers)), nn.Linear(width, vocabulary)
    )
    ids = torch.randint(0, vocabulary, (4, length))
    return liveness_of(model, lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()), (ids, ids))


def of_zoo(name: str) -> partition.Liveness:
    case = zoo.ZOO[name].case()
    return liveness_of(case.model, case.loss_fn, case.batch)


@pytest.fixture(scope="module", params=["unet", "language_model"])
def small(request: Any) -> partition.Liveness:
    return language_model(2, 11) if request.param == "language_model" else of_zoo(request.param)


def resnet152() -> partition.Liveness:
    import torchvision

    model = torchvision.models.resnet152(weights=None)
    return liveness_of(model, nn.CrossEntropyLoss(), (torch.randn(4, 3, 64, 64), torch.arange(4)))


DEEP = {"resnet152": resnet152, "48 layers": lambda: language_model(48, 101)}


@pytest.fixture(scope="module", params=DEEP)
def deep(request: Any) -> partition.Liveness:
    return DEEP[request.param]()


def natural(liveness: partition.Liveness) -> list[int]:
    return [p.position for p in liveness.candidates() if p.natural]


def combinations(liveness: partition.Liveness, count: int) -> list[list[int]]:
    places = natural(liveness)
    thinned = places[:: max(1, len(places) // 14)]
    return [list(c) for c in itertools.combinations(thinned, count - 1)]


def stored(liveness: partition.Liveness, cuts: list[int]) -> int:
    crossing = {n for c in cuts for n in liveness.crossing(c)}
    return sum(size for node, size in zip(liveness.nodes, liveness.sizes, strict=True) if node in crossing)


def written_out(liveness: partition.Liveness, cuts: list[int], k: int) -> tuple[float, float]:
    """Memory of block ``k`` in the local step and in the BP step, from the definition."""
    size = dict(zip(liveness.nodes, liveness.sizes, strict=True))
    ends = [-1, *cuts, len(liveness.nodes) - 1]
    inside = range(ends[k] + 1, ends[k + 1] + 1)
    if not any(liveness.trains[p] for p in inside):
        return math.inf, math.inf
    reads = sum(size[n] for n in liveness.crossing(ends[k])) if k else 0
    hands_on = sum(size[n] for n in liveness.crossing(ends[k + 1]))
    saved, transient = sum(liveness.saved[p] for p in inside), 2 * max(liveness.sizes[p] for p in inside)
    own = max(sum(liveness.owned[p] for p in inside), partition.HEAD_COPY)
    head, copied = liveness.head_values, sum(w for w in liveness.head_weights if w <= own)
    if k == len(cuts):
        head = copied = 0
    local = reads + saved + sum(liveness.gradients[: inside.stop]) + copied + max(head, transient)
    before = stored(liveness, cuts[:k])
    return local, before + saved + sum(liveness.gradients[inside.start :]) + hands_on + transient


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_costs_are_those_of_the_definition(small: partition.Liveness, count: int) -> None:
    for cuts in combinations(small, count)[::7] if count > 1 else [[]]:
        blocks = [written_out(small, cuts, k) for k in range(count)]
        assert partition.largest(small, cuts) == max(local for local, _ in blocks)
        assert partition.serial(small, cuts) == max(bp for _, bp in blocks)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_cuts_are_better(small: partition.Liveness, count: int) -> None:
    pool = sorted({c for cuts in combinations(small, count) for c in cuts})
    every = {tuple(c): partition.largest(small, c) for c in combinations(small, count)}
    least = min(every.values())
    costs = partition.Costs(small, pool)
    assert costs.bottleneck(count) == least
    cuts = costs.cuts(count)
    assert cuts is not None
    equal = [list(c) for c, size in every.items() if size <= partition.SLACK * least]
    assert cuts in equal
    # Ties are broken by memory, a thousandth of which counts beside what is stored.
    assert stored(small, cuts) <= min(stored(small, c) for c in equal) + 1e-3 * count * partition.SLACK * least


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_cuts_are_better_for_the_bp_step(small: partition.Liveness, count: int) -> None:
    pool = sorted({c for cuts in combinations(small, count) for c in cuts})
    least = min(partition.serial(small, c) for c in combinations(small, count))
    costs = partition.Costs(small, pool)
    known = costs.cuts(count)
    assert known is not None
    assert partition.serial(small, costs.serial_cuts(count, known)) <= 1.01 * least


def test_every_count_at_once_is_every_count_alone(small: partition.Liveness) -> None:
    points = small.candidates()
    found = partition.by_count(small, 6)
    assert found == {count: partition.balanced(small, points, count) for count in found}
    assert list(found) == list(range(1, len(found) + 1))


def test_no_more_counts_than_blocks_that_train(small: partition.Liveness) -> None:
    most = partition.most_blocks(small, small.candidates())
    assert max(partition.by_count(small, most + 3)) <= most


def test_candidates_know_what_crosses(small: partition.Liveness) -> None:
    for point in small.candidates():
        size = dict(zip(small.nodes, small.sizes, strict=True))
        assert point.crossing_bytes == sum(size[n] for n in small.crossing(point.position))
        assert point.saved_bytes == sum(small.saved[: point.position + 1])


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_counted_at_every_boundary() -> None:
    """Logits far larger than the layers: a block with a head is at least as large as they are."""
    liveness = language_model(4, 5000)
    logits = 4 * 16 * 5000 * 4
    assert liveness.head_values == 3 * logits
    costs = partition.Costs(liveness, partition.by_count(liveness, 4)[4])
    assert float(costs.local.diagonal(-1).min()) >= 3 * logits


def test_a_vocabulary_moves_the_cuts() -> None:
    """With the heads left out the last block, which has the task's own logits, gets fewer layers."""
    with_heads, without = language_model(8, 600), language_model(8, 600)
    without.head_values, without.head_weights = 0, []
    last, bare = (partition.by_count(found, 3)[3][-1] for found in (with_heads, without))
    assert last < bare


# --- deep models -----------------------------------------------------------------------------------------------------


def test_deep_models_are_cut_into_any_count(deep: partition.Liveness) -> None:
    found = partition.by_count(deep)
    places = {p.position for p in deep.candidates()}
    assert sorted(found) == list(range(1, partition.MAX_AUTO + 1))
    for count, cuts in found.items():
        assert len(cuts) == count - 1
        assert cuts == sorted(set(cuts))
        assert set(cuts) <= places
        assert math.isfinite(partition.largest(deep, cuts))


def test_every_candidate_of_a_deep_model_is_looked_at(deep: partition.Liveness) -> None:
    assert len(natural(deep)) <= partition.MAX_CANDIDATES


@pytest.mark.parametrize("count", [2, 3])
def test_deep_models_are_balanced(deep: partition.Liveness, count: int) -> None:
    """No worse than the best of a few places, all of which are tried, but for what counts as equally good."""
    least = min(partition.largest(deep, cuts) for cuts in combinations(deep, count))
    assert partition.largest(deep, partition.by_count(deep, count)[count]) <= partition.SLACK * least


def test_more_blocks_are_smaller(deep: partition.Liveness) -> None:
    found = partition.by_count(deep)
    sizes = [partition.largest(deep, found[count]) for count in (1, 2, 4, 8, 16)]
    assert all(more <= partition.SLACK * fewer for fewer, more in itertools.pairwise(sizes))


def test_the_bp_step_has_cuts_of_its_own(deep: partition.Liveness) -> None:
    found, own = partition.by_count(deep, 8), partition.by_count(deep, 8, serial=True)
    assert list(found) == list(own)
    for count in found:
        assert partition.serial(deep, own[count]) <= partition.serial(deep, found[count])
