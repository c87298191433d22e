"""Random models by Hypothesis, and a long run over many of them: ``python tests/fuzz.py --examples 5000 --seed 1``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from fuzz_checks import OFFSETS, Invalid, check
from fuzz_model import FORMS, RARE, TIEABLE, Layer, Op, Recipe
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# what an operation reads and writes: a whole value, a half of one, a turned one; a layer; another input
_UNARY = ("act", "gelu", "relu_", "mean", "mask", "expand", "drop", "noise", "write", "fill", "write_through", "sized")
_BINARY = ("add", "add_", "mul", "detached")
_VIEWS = ("split", "join", "turn", "back", "half_act", "half_relu_", "turned_act")
_OTHER = (*_VIEWS, "extra", "masked", "embed", "no_grad")
_LAYERS = ("linear", "norm", "batchnorm", "dropout", "scale", "shift", "running", "relu_", "attend")


class _Writer:
    """Draws a program line by line."""

    def __init__(self, draw: Callable[..., Any], form: str) -> None:
        self.draw, self.form = draw, form
        self.values: dict[str, list[str]] = {"a": ["a0"], "h": [], "t": []}
        self.layers: dict[str, Layer] = {}

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def read(self, kind: str = "a") -> str:
        return str(self.pick(self.values[kind][::-1][:4]))  # the newest first

    def new(self, kind: str = "a") -> str:
        name = f"{kind}{sum(len(v) for v in self.values.values())}"
        self.values[kind].append(name)
        return name

    def layer(self, kind: str) -> str:
        """A new layer of a kind, or one that is there already."""
        same = [name for name, layer in self.layers.items() if layer.kind == kind]
        if same and self.pick([False, False, True]):
            return str(self.pick(same))
        tied = self.pick(["", "", *same]) if kind in TIEABLE else ""
        name = f"l{len(self.layers)}"
        self.layers[name] = Layer(kind, self.pick([False] * 4 + [True]), tied)
        return name

    def op(self) -> Op:
        usual = [k for k in _LAYERS if k != "attend" or self.form == "tokens"]
        group = self.pick(["layer"] * 4 + ["unary"] * 2 + ["binary", "binary", "other", "other"])
        if group == "layer":
            rare = self.pick([False] * 24 + [True])
            kind = self.pick(sorted(RARE) if rare else usual)
            return Op("layer", (self.read(),), (self.new(),), self.layer(kind))
        if group == "unary":
            return Op(self.pick(_UNARY), (self.read(),), (self.new(),))
        if group == "binary":
            return Op(self.pick(_BINARY), (self.read(), self.read()), (self.new(),))
        kind = self.pick(_OTHER)
        if kind == "split":
            return Op(kind, (self.read(),), (self.new("h"), self.new("h")))
        if kind == "turn":
            return Op(kind, (self.read(),), (self.new("t"),))
        if kind in ("half_act", "half_relu_", "join") and self.values["h"]:
            reads = (self.read("h"), self.read("h")) if kind == "join" else (self.read("h"),)
            return Op(kind, reads, (self.new("a" if kind == "join" else "h"),))
        if kind in ("turned_act", "back") and self.values["t"]:
            return Op(kind, (self.read("t"),), (self.new("a" if kind == "back" else "t"),))
        if kind in ("extra", "masked"):
            return Op(kind, (self.read(), {"extra": "extra", "masked": "mask"}[kind]), (self.new(),))
        if kind == "embed":
            return Op(kind, (self.read(), "ids"), (self.new(),), self.layer("embed"))
        if kind == "no_grad":
            return Op(kind, (self.read(),), (self.new(),), self.layer("linear"))
        return Op("layer", (self.read(),), (self.new(),), self.layer("linear"))


@st.composite
def recipes(draw: Callable[..., Any]) -> Recipe:
    """Random recipes; the simplest is a stem, two linear layers and a readout."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    form = pick(*FORMS)
    writer = _Writer(draw, form)
    segments = tuple(tuple(writer.op() for _ in range(draw(st.integers(1, 4)))) for _ in range(draw(st.integers(2, 4))))
    loss = pick("mean", "sum", "squares", "inside")
    outputs = pick(("logits",), ("logits",), ("logits", "aux"), ("raw", "logits"), ("aux", "logits", "raw"))
    if loss == "inside":
        outputs = ("logits",)
    return Recipe(
        form,
        segments,
        writer.layers,
        owner=pick("segment", "root"),
        stem=pick("layer", "layer", "frozen", "none"),
        inputs=pick("single", "tuple", "dict"),
        outputs=outputs,
        packing="single" if outputs == ("logits",) and pick(True, False) else pick("tuple", "dict"),
        dense=pick(False, False, True),
        loss=loss,
        tied=form == "tokens" and pick(False, True),
        frozen_readout=pick(False, False, False, True),
        offset=draw(st.integers(0, len(OFFSETS) - 1)),
        batch=pick(4, 5, 6),
        seed=draw(st.integers(0, 99)),
    )


# --- many of them ---
def hunt(count: int, start: int, tally: Counter[str], seen: set[Any], shrink: bool = True) -> None:
    """Check `count` random recipes that differ from each other and from those in `seen`.

    Hypothesis varies what it has drawn before in little ways; most of those would be the same model again.

    Args:
        start: the seed.
        tally: counts what came out.
        seen: fingerprints; grows.
        shrink: look for the smallest recipe that fails in the same way.

    Raises:
        Exception: whatever the check of the smallest failing recipe raises.
    """
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    progress = {"checked": 0, "failed": 0}

    @seed(start)
    @settings(
        max_examples=20 * count, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    @given(recipes())
    def one(recipe: Recipe) -> None:
        known = recipe.fingerprint in seen or progress["checked"] == count
        if known and not progress["failed"]:  # a failing one is run again, and others like it
            return
        seen.add(recipe.fingerprint)
        try:
            found = check(recipe)
        except Invalid:
            tally["invalid"] += 1
            return
        except Exception:
            progress["failed"] += 1
            raise
        if not progress["failed"]:
            progress["checked"] += 1
            tally[found] += 1

    one()


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description="Check bpfx on many random models.")
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-shrink", action="store_true", help="show failing recipes as they were found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally: Counter[str] = Counter()
    seen: set[Any] = set()
    failures, began, rounds = 0, time.monotonic(), 0
    while sum(tally.values()) - tally["invalid"] < options.examples:
        left = options.examples - (sum(tally.values()) - tally["invalid"])
        try:
            hunt(min(left, 25), 100_000 * options.seed + rounds, tally, seen, not options.no_shrink)
        except Exception as error:
            failures += 1
            tally["failed"] += 1
            print(f"\nfailure {failures}, in round {rounds}: {type(error).__name__}: {error}", flush=True)
            print("\n".join(getattr(error, "__notes__", [])), flush=True)
        rounds += 1
        done = sum(tally.values()) - tally["invalid"]
        print(f"{done} examples, {failures} failures, {time.monotonic() - began:.0f} s", flush=True)
    kinds = ", ".join(f"{n} with {what}" for what, n in tally.most_common())
    print(f"{options.examples} examples, seed {options.seed}: {failures} failures ({kinds})")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
