"""Random models: BP step, local step, isolation, exact steps, micro-batches and resuming, each against plain PyTorch.

The properties are in fuzz_checks.py, the models in fuzz_model.py and fuzz.py, which also has a longer run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import fuzz_checks
import pytest
import torch
from fuzz import hunt
from fuzz_model import Layer, Op, Recipe

PARTS, EXAMPLES = 4, 10
SEEN: set[Any] = set()  # by this process


@pytest.mark.parametrize("part", range(PARTS))
def test_random_models(part: int) -> None:
    tally: Counter[str] = Counter()
    hunt(EXAMPLES, part, tally, SEEN)
    assert sum(tally.values()) - tally["invalid"] == EXAMPLES
    cut = sum(n for kind, n in tally.items() if kind[0] in "234")
    assert cut >= EXAMPLES // 3, f"hardly any of these models was cut: {tally}"


# the checks themselves: what is broken on purpose is found

CHAIN = Recipe(
    "vector",
    ((Op("layer", ("a0",), ("a1",), "l0"), Op("act", ("a1",), ("a2",))), (Op("layer", ("a2",), ("a3",), "l1"),)),
    {"l0": Layer("linear"), "l1": Layer("dropout")},
)


def test_the_plain_chain_passes() -> None:
    assert fuzz_checks.check(CHAIN) == "2 blocks"


@pytest.mark.parametrize(
    "broken",
    [
        "bpfx.passes.stop_gradient.accumulate",  # a second cotangent is forgotten
        "bpfx.passes.programs.set_rng_state",  # the recomputation draws other numbers
        "bpfx._offset_state.OffsetState.load",  # a resumed run has no offsets
    ],
)
def test_a_broken_part_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"accumulate": lambda first, second: second, "set_rng_state": lambda state: None}
    monkeypatch.setattr(broken, wrong.get(broken.rpartition(".")[2], lambda *args: None))
    skip = Op("add", ("a3", "a1"), ("a4",))
    first, second = CHAIN.segments
    layers = {**CHAIN.layers, "l2": Layer("linear"), "l3": Layer("dropout")}
    drop, deeper = Op("layer", ("a4",), ("a5",), "l3"), Op("layer", ("a5",), ("a6",), "l2")
    recipe = Recipe("vector", (first, (*second, skip, drop), (deeper, Op("add", ("a6", "a1"), ("a7",)))), layers)
    with pytest.raises((AssertionError, KeyError)):
        fuzz_checks.check(recipe)


def test_what_plain_pytorch_refuses_is_no_example() -> None:
    segments = ((Op("act", ("a0",), ("a1",)), Op("relu_", ("a1",), ("a2",))), (Op("layer", ("a2",), ("a3",), "l0"),))
    with pytest.raises(fuzz_checks.Invalid, match="modified by an inplace operation"):
        fuzz_checks.check(Recipe("vector", segments, {"l0": Layer("linear")}))


def test_a_recipe_is_a_fixed_model() -> None:
    """The same text is the same model and the same batch, in every process."""
    twice = [fuzz_checks.plain_step(CHAIN).reference for _ in range(2)]
    assert torch.equal(twice[0].loss, twice[1].loss)
    assert eval(repr(CHAIN)) == CHAIN
