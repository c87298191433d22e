"""What random models have found, each as small as it gets; every property holds for them now."""

from __future__ import annotations

import warnings

import fuzz_checks
import pytest
import torch
from fuzz_model import Layer, Op, Recipe
from oracles import assert_gradients
from torch import nn

import bpfx


def layer(name: str, read: str, write: str) -> Op:
    return Op("layer", (read,), (write,), name)


LINEAR, FROZEN = Layer("linear"), Layer("linear", frozen=True)

FINDINGS: dict[str, tuple[int, Recipe]] = {  # and into how many blocks each is cut now
    # an output of the model that a later block reads as well died with that block
    "an output that crosses a boundary, in an exact step": (
        3,
        Recipe(
            "vector",
            ((layer("l0", "a0", "a1"),), (layer("l0", "a1", "a2"),), (layer("l1", "a2", "a3"),)),
            {"l0": LINEAR, "l1": Layer("norm")},
            outputs=("raw", "logits"),
            packing="dict",
            offset=1,
        ),
    ),
    # heads were asked to predict it, too
    "features returned beside the logits made of them": (
        2,
        Recipe(
            "tokens",
            ((layer("l0", "a0", "a1"),), (layer("l1", "a1", "a2"),)),
            {"l0": LINEAR, "l1": Layer("norm")},
            outputs=("raw", "logits"),
            packing="tuple",
            loss="sum",
        ),
    ),
    # the last block trained, but its loss depended on nothing that trains
    "a layer that nobody reads": (
        1,
        Recipe(
            "vector",
            ((layer("l0", "a0", "a1"),), (layer("l1", "a1", "h2"), Op("act", ("a1",), ("a3",)))),
            {"l0": LINEAR, "l1": LINEAR},
            frozen_readout=True,
        ),
    ),
    # the cut went into the layer that nobody reads
    "a boundary behind a layer that nobody reads": (
        1,
        Recipe(
            "tokens",
            (
                (Op("gelu", ("a0",), ("a1",)),),
                (layer("l0", "a1", "h2"),),
                (layer("l1", "a1", "a3"),),
            ),
            {"l0": Layer("attend"), "l1": Layer("dropout")},
            stem="frozen",
        ),
    ),
    # a block had parameters and nothing to put a head on
    "a block that only changes its own buffers": (
        4,
        Recipe(
            "image",
            (
                (layer("l0", "a0", "a1"),),
                (layer("l1", "a1", "a2"),),
                (layer("l2", "a1", "h3"),),
                (layer("l3", "a2", "a4"),),
            ),
            {"l0": LINEAR, "l1": LINEAR, "l2": Layer("batchnorm"), "l3": LINEAR},
        ),
    ),
    # dropout was taken for its own input, and what was added in place for both
    "in place behind dropout, its input read later": (
        2,
        Recipe(
            "image",
            (
                (layer("l0", "a0", "a1"), Op("add_", ("a1", "a1"), ("a2",)), layer("l1", "a0", "a3")),
                (Op("add", ("a3", "a2"), ("a4",)),),
            ),
            {"l0": Layer("dropout"), "l1": LINEAR},
            stem="none",
        ),
    ),
    # two blocks each wrote the buffer; the second write was lost
    "a buffer that two segments change": (
        1,
        Recipe(
            "vector",
            ((layer("l0", "a0", "a1"),), (layer("l1", "a1", "a2"),), (layer("l0", "a2", "a3"),)),
            {"l0": Layer("running"), "l1": LINEAR},
        ),
    ),
    # what was written into a slice had no edge to what reads the whole, so its gradient and its head were lost
    "a tensor filled through a view": (
        2,
        Recipe(
            "vector",
            (
                (layer("l0", "a0", "a1"),),
                (layer("l0", "a1", "a2"), Op("fill", ("a2",), ("a3",))),
                (layer("l1", "a3", "a4"),),
            ),
            {"l0": LINEAR, "l1": LINEAR},
            loss="squares",
        ),
    ),
    # only the other write was replaced by a copy
    "one of two views of the input, and the input, in place": (
        2,
        Recipe(
            "image",
            (
                (
                    Op("split", ("a0",), ("h1", "h2")),
                    Op("add_", ("a0", "a0"), ("a3",)),
                    Op("half_relu_", ("h1",), ("h4",)),
                    layer("l0", "a0", "a5"),
                ),
                (layer("l1", "a5", "a6"),),
            ),
            {"l0": LINEAR, "l1": LINEAR},
            stem="none",
        ),
    ),
    # a head copied from a graph that holds the number of samples did not take half of them
    "a graph for one number of samples, measured in two parts": (
        2,
        Recipe(
            "image",
            (
                (layer("l1", "a0", "a1"), layer("l0", "a0", "a2")),
                (Op("sized", ("a2",), ("a3",)),),
            ),
            {"l0": LINEAR, "l1": Layer("sign")},
            stem="layer",
            offset=5,
            batch=4,
        ),
    ),
    # the head read the sum alone, from which no gradient reaches the layer
    "a layer's output, and a sum that it is detached in": (
        2,
        Recipe(
            "vector",
            (
                (layer("l0", "a0", "a1"), Op("detached", ("a0", "a1"), ("a2",))),
                (layer("l1", "a1", "a3"), Op("act", ("a2",), ("a4",)), layer("l2", "a4", "a5")),
            ),
            {"l0": LINEAR, "l1": LINEAR, "l2": LINEAR},
            outputs=("logits", "aux"),
            packing="tuple",
        ),
    ),
    # a head, which draws nothing, let its copy of dropout write into the feature
    "a sum in place behind the last dropout": (
        2,
        Recipe(
            "image",
            (
                (layer("l0", "a0", "a1"),),
                (layer("l1", "a1", "a2"), Op("add_", ("a2", "a1"), ("a3",))),
            ),
            {"l0": LINEAR, "l1": Layer("dropout")},
            outputs=("logits", "aux"),
            packing="tuple",
        ),
    ),
    # a head was put on a value that only a draw reads, and whose layer's input is overwritten
    "a value that only a draw reads": (
        2,
        Recipe(
            "vector",
            (
                (layer("l0", "a0", "a1"), Op("add_", ("a0", "a0"), ("a2",)), layer("l1", "a2", "a3")),
                (layer("l2", "a1", "a4"), Op("act", ("a3",), ("a5",))),
            ),
            {"l0": Layer("norm"), "l1": LINEAR, "l2": Layer("dropout")},
        ),
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_finding(name: str) -> None:
    blocks, recipe = FINDINGS[name]
    assert fuzz_checks.check(recipe).removesuffix(", opaque parts") == f"{blocks} blocks"


def test_a_matching_head_is_converted_without_a_warning() -> None:
    """The distance between two gradients was turned into a number with its graph attached."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(6, 4), torch.randint(0, 2, (6,))
    step = bpfx.convert(net, nn.functional.cross_entropy, batch, blocks=2, offset=bpfx.Offset(period=1, match=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batch).backward()


def test_code_that_nobody_reads_is_left_out_and_its_draws_stay() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.used(x)
            self.unused(x).tanh()
            torch.nn.functional.dropout(x, 0.5)
            self.norm(x)
            return self.last(torch.nn.functional.dropout(x, 0.5))

    net, batch = Wasteful(), (torch.randn(6, 4), torch.randint(0, 2, (6,)))
    with pytest.warns(bpfx.BpfxWarning, match="no gradient"):
        step = bpfx.convert(net, nn.functional.cross_entropy, batch, blocks=2)
    read = {name for block in step.plan.blocks for name in block.parameter_names}
    assert not any(name.startswith("unused") for name in read)
    torch.manual_seed(3)
    expected = nn.functional.cross_entropy(net(batch[0]), batch[1])
    torch.manual_seed(3)
    assert torch.equal(step.run_bp(*batch).loss, expected.detach())
    assert net.norm.num_batches_tracked == 2


class Filled(nn.Module):
    """Writes what a layer has made into a slice of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.second, self.last = (nn.Linear(4, n) for n in (4, 2, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        out = torch.zeros_like(x)
        out[:, :2] = self.part(x)
        return self.last(self.second(out.tanh()))


def weighted(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss that fills its own weights the same way."""
    target, weight = torch.zeros_like(output), torch.ones_like(output)
    target[:, 0] = 0.5
    weight[:, 1:] = output[:, 1:].sigmoid()
    return (output.log_softmax(1) * weight * (target + nn.functional.one_hot(y, 3))).sum(1).mean()


@pytest.mark.parametrize("cut", ["second", "last"])
def test_what_is_written_through_a_view_is_seen(cut: str) -> None:
    torch.manual_seed(0)
    net, x, y = Filled(), torch.randn(5, 4), torch.randint(0, 3, (5,))
    loss = weighted(net(x), y)
    expected = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))
    step = bpfx.convert(net, weighted, (x, y), blocks=[cut], offset=None)
    assert_gradients(step.run_bp(x, y).grads, expected)
    assert "part.weight" in step.plan.blocks[0].parameter_names
    given = []
    step.heads[0].register_forward_pre_hook(lambda head, args: given.append(args[0].features))
    found = step.run_local(x, y)
    prediction = step.heads[0].predict(*given[0])
    assert torch.allclose(found.local_losses[0], weighted(prediction, y))
    assert found.grads["part.weight"].norm() > 0


def test_a_loss_that_overwrites_its_input_leaves_the_features_alone() -> None:
    """The head's loss works on copies: what it would overwrite goes on to the next block."""

    def overwriting(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output[:, 0] += 1.0
        return nn.functional.cross_entropy(output.mul_(2.0), y)

    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), torch.randn(5, 4), torch.randint(0, 3, (5,))
    expected = overwriting(net(x), y).detach()
    step = bpfx.convert(net, overwriting, (x, y), blocks=["1"], offset=None)
    for found in (step.run_local(x, y), step.run_bp(x, y)):
        assert torch.allclose(found.loss, expected)


class Shifted(nn.Module):
    """Writes into a part of its own input, which is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids[:, 0] += 1
        return self.last(self.first(self.embedding(ids).mean(1)).tanh())


def test_integers_that_the_model_writes_to_are_written_once() -> None:
    """The recomputation in an exact step starts from what the caller gave."""
    torch.manual_seed(0)
    model, ids, y = Shifted().double(), torch.randint(0, 6, (4, 5)), torch.randint(0, 3, (4,))
    loss = nn.functional.cross_entropy(model(ids.clone()), y)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True))
    step = bpfx.convert(model, nn.functional.cross_entropy, (ids.clone(), y), blocks=["last"], offset=None)
    given = ids.clone()
    found = step.run_bp(given, y)
    assert_gradients(found.grads, expected)
    assert torch.equal(given, ids)
